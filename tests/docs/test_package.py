"""What `pip install` and a download from an index get: the handler alone, and a source archive that is whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cmp_ca_handler
from host import ROOT

# In a process of its own, for it builds what lies in the working directory.
BUILD = (
    "import sys; from flit_core import buildapi; buildapi.build_sdist(sys.argv[1]); buildapi.build_wheel(sys.argv[1])"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the backend that pyproject.toml names has put the two."""
    target = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-c", BUILD, target], cwd=ROOT, check=True)
    return target


def test_wheel_is_one_file(built: Path) -> None:
    """Nobody's site-packages gets a package called tests."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert names == ["cmp_ca_handler.py"]


def test_source_archive_is_whole(built: Path) -> None:
    """Its tests can be run, for what they need is there: conftest.py, examples, docs."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    tree = [ROOT / name for name in ("cmp_ca_handler.py", "pyproject.toml", "README.md", "LICENSE", ".gitignore")]
    tree += [path for name in (".ci", "docs", "examples", "tests") for path in (ROOT / name).rglob("*")]
    assert names == {str(path.relative_to(ROOT)) for path in tree if path.is_file() and "__pycache__" not in path.parts}


def test_version_is_the_same_everywhere() -> None:
    """In the handler, in pyproject.toml, and on top of the changes, with its date."""
    version = cmp_ca_handler.__version__
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changes = (ROOT / "docs" / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[\d.]+)\] - \d{4}-\d\d-\d\d$", changes, re.M)
    assert released[0] == version
