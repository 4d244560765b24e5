"""`python3 tests` and `.ci/run` say what the machine lacks, all of it at once, and how the tests went."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import programs
from conftest import OPENSSL, needs

ROOT = Path(__file__).resolve().parents[2]


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
def test_a_missing_program_skips_its_tests(ci: str, skipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is missing skips the test, with what to install; with CI=true it is left to fail."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(programs, "find", lambda name: "")
    mark = needs("lego").mark
    assert mark.args == (skipped,)
    assert mark.kwargs["reason"] == "lego not found (on Debian: apt-get install lego)"
    with pytest.raises(AssertionError, match=r"packages\.txt"):
        needs("no-such-program")


# A python3 that runs no tests. Each line of `failing` lets one call of them fail: it is pytest's record of what failed.
PYTHON = f"""\
#!/bin/sh
[ "$1" = tests ] || exec '{sys.executable}' "$@"
[ "$2" = --lint ] && exit
read -r failed <../failing || exit 0
sed -i 1d ../failing
mkdir -p .cache/pytest/v/cache
echo "$failed" >.cache/pytest/v/cache/lastfailed
exit 1
"""


@pytest.fixture
def ci(tree: Path) -> Path:
    """A tree whose .ci/run finds every program; none of them is real but python3, for what is no test."""
    (tree / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tree / ".ci")
    (tree / "tests" / "packages.txt").write_text("")
    (tree / "tests" / "windows.py").write_text("def missing():\n    return {}\n")
    for name in ("openssl", "javac", "mvn"):
        (tree.parent / "bin" / name).symlink_to("/bin/true")
    (tree.parent / "bin" / "python3").write_text(PYTHON)
    (tree.parent / "bin" / "python3").chmod(0o755)
    return tree


def run_ci(ci: Path, *failing: str) -> subprocess.CompletedProcess[str]:
    (ci.parent / "failing").write_text("".join(f"{line}\n" for line in failing))
    environment = {**os.environ, "PATH": os.pathsep.join([str(ci.parent / "bin"), os.environ["PATH"]])}
    return subprocess.run([ci / ".ci" / "run"], env=environment, capture_output=True, text=True)


ONE, TWO = (
    '{"tests/test_a.py::test_x[a b]": true}',
    '{"tests/test_a.py::test_x": true, "tests/test_b.py::test_y": true}',
)


@pytest.mark.parametrize(
    ("failing", "count", "outcome"),
    [([], 0, "passed"), ([ONE], 1, "passed"), ([TWO], 2, "passed"), ([TWO, ONE], 0, "failed")],
    ids=["none", "one", "two", "one that fails twice"],
)
def test_ci_counts_what_passed_only_at_the_second_try(failing: list[str], count: int, outcome: str, ci: Path) -> None:
    """Its last line but one, after the names; also where the run has failed."""
    done = run_ci(ci, *failing)
    *names, counted, last = done.stdout.splitlines()
    assert (counted, last) == (f".ci/run: passed only at the second try: {count}", f".ci/run: {outcome}")
    assert (done.returncode == 0) == (outcome == "passed")
    assert [name for name in names if "test_x" in name or "test_y" in name] == names and len(names) == count


def test_a_broken_windows_module_ends_ci(ci: Path) -> None:
    """What cannot say what it needs ends the run before the first test."""
    (ci / "tests" / "windows.py").write_text("syntax error\n")
    done = run_ci(ci)
    assert done.returncode != 0 and "SyntaxError" in done.stderr
