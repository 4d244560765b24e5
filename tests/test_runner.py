"""`python3 tests` on a machine that lacks something: it says all of it at once, and makes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import programs
from conftest import OPENSSL, needs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A clone in which nothing was made yet, as far as the runner goes; `bin` beside it is all of PATH."""
    (tmp_path / "tree" / "tests").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for path in [ROOT / "pyproject.toml", *(ROOT / "tests").glob("*.*")]:
        if path.is_file():
            shutil.copy(path, tmp_path / "tree" / path.relative_to(ROOT))
    return tmp_path / "tree"


def run(tree: Path, ci: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(tree.parent / "bin"), "CI": ci}
    environment.pop("CMP_TEST_OPENSSL", None)
    return subprocess.run([sys.executable, "tests"], cwd=tree, env=environment, capture_output=True, text=True)


def test_everything_that_is_missing_is_named_at_once(tree: Path) -> None:
    """In one line, with what to install."""
    done = run(tree, ci="")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for word in ("openssl 3.0 or later", "lego", "apt-get install openssl", "Debian"):
        assert word in done.stderr
    assert sorted(path.name for path in tree.iterdir()) == ["pyproject.toml", "tests"]


def test_an_optional_program_ends_the_run_only_in_ci(tree: Path) -> None:
    """Before anything is made. Elsewhere it costs the tests that need it, see `needs`."""
    (tree.parent / "bin" / "openssl").symlink_to(OPENSSL)
    done = run(tree, ci="true")
    assert done.returncode == 2
    assert "missing: for some tests lego" in done.stderr.splitlines()[-1]
    assert "fetches" in done.stderr
    assert sorted(path.name for path in tree.iterdir()) == ["pyproject.toml", "tests"]


@pytest.mark.parametrize(("ci", "skipped"), [("", True), ("true", False)])
def test_needs(ci: str, skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is missing skips the test, with what to install; with CI=true it is left to fail."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(programs, "find", lambda name: "")
    mark = needs("lego").mark
    assert mark.args == (skipped,)
    assert mark.kwargs["reason"] == "lego not found (on Debian: apt-get install lego)"
    with pytest.raises(AssertionError, match=r"packages\.txt"):
        needs("no-such-program")
