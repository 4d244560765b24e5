"""Programs that only some tests need, as tests/packages.txt lists them."""

from __future__ import annotations

import glob
import os
import shutil
from pathlib import Path

LIST = Path(__file__).resolve().parent / "packages.txt"
# An ordinary user's PATH has no sbin, where Debian puts servers.
PLACES = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def packages() -> dict[str, str]:
    """Program, or pattern of a file, -> Debian package."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return {words[0]: words[1] for words in map(str.split, lines) if words and not words[0].startswith("#")}


def find(name: str) -> str:
    """The path of a program, or of the first file that fits a pattern such as `/usr/lib/*/x.so`; empty if missing."""
    if "/" in name:
        return next(iter(sorted(glob.glob(name))), "")
    return shutil.which(name, path=PLACES) or ""


def missing() -> dict[str, str]:
    """What of the list this machine has not got: program -> Debian package."""
    return {name: package for name, package in packages().items() if not find(name)}
