"""Set up what the tests need, then run them.

    python3 tests                       all of them, on all cores
    python3 tests -x -k chain           arguments go to pytest
    python3 tests --lint                ruff and mypy instead of the tests

Works from any directory, as any user. The packages of the extra `test` in pyproject.toml go into
`.venv-tests`, newer OpenSSL binaries into `.cache`; both are made once, and later runs find them. What the
machine lacks is said in one line.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import programs
from openssl_versions import CACHE, Missing, locked, newer_openssl, run

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-tests"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "made-from"

LINTERS = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])


def main(arguments: list[str]) -> int:
    """Run pytest with `arguments`, or the linters, and return their exit code; 2 if something is missing."""
    if sys.stdin is None:
        # Closed by the caller: without this the next file opened would be every process's standard input.
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    try:
        if arguments == ["--lint"]:
            make_venv()
            return lint()
        check_openssl()
        check_programs()
        make_venv()
        name_newer_openssl()
    except Missing as missing:
        print(f"python3 tests: {missing}", file=sys.stderr)
        return 2
    return run_pytest(arguments)


def make_venv() -> None:
    """Make the virtual environment, unless it is there and was made from the same list by the same Python.

    The project itself is not installed: the tests load its file by path, as the host does.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    key = f"{hashlib.sha256(text.encode()).hexdigest()} {sys.base_prefix} {sys.version}"
    try:
        if made_from() == key:
            return
        if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
            raise Missing("this Python has no venv or no ensurepip (on Debian: apt-get install python3-venv)")
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE.parent / "venv.lock"):
            if made_from() != key:
                print(f"Making {VENV.name} for the tests, once", file=sys.stderr)
                fill_venv(requirements(text))
                STAMP.write_text(key)
    except OSError as error:
        raise Missing(f"the virtual environment for the tests: {error}") from error


def made_from() -> str:
    """What the virtual environment was made from; nothing if it was not completed, or its Python is gone."""
    return STAMP.read_text() if STAMP.exists() and PYTHON.exists() else ""


def requirements(pyproject: str) -> list[str]:
    """The extra `test`. Python 3.9 and 3.10 read no TOML, but a TOML list of strings is a Python list too."""
    extra = re.search(r"^test = (\[.*?^\])", pyproject, re.MULTILINE | re.DOTALL)
    if not extra:
        raise Missing("the extra `test` in pyproject.toml")
    packages: list[str] = ast.literal_eval(extra.group(1))
    return packages


def fill_venv(packages: list[str]) -> None:
    """Make it anew, with `packages`."""
    run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    try:
        # -I: neither PYTHONPATH nor the user's own packages have a part in it.
        run([str(PYTHON), "-I", "-m", "pip", "install", "--quiet", "--no-input", *packages])
    except Missing as error:
        raise Missing(f"the test packages cannot be had from PyPI: {error}") from error


def check_openssl() -> None:
    """The first openssl on PATH is the one that most tests run."""
    try:
        run(["openssl", "cmp", "-help"])
    except Missing as error:
        raise Missing(f"openssl with its `cmp` command, version 3.0 or later, is needed: {error}") from error


def check_programs() -> None:
    """What only some tests need costs those tests, which say so; in continuous integration, the run."""
    missing = programs.missing()
    if missing and os.environ.get("CI") == "true":
        packages = " ".join(dict.fromkeys(missing.values()))
        raise Missing(f"missing: {', '.join(missing)} (on Debian: apt-get install {packages})")


def name_newer_openssl() -> None:
    """Set CMP_TEST_OPENSSL to the other binaries' paths, written as PATH is, unless the caller has set it."""
    if "CMP_TEST_OPENSSL" in os.environ:
        return
    try:
        os.environ["CMP_TEST_OPENSSL"] = os.pathsep.join(map(str, newer_openssl()))
    except Missing as reason:
        note = f"OpenSSL 3.5 and 3.6 are not tested here: {reason}"
        if os.environ.get("CI") == "true":
            raise Missing(note) from reason
        print(note, file=sys.stderr)


def lint() -> int:
    """Run every linter, also after one that found something."""
    codes = [subprocess.run([PYTHON, "-m", *command], cwd=ROOT).returncode for command in LINTERS]
    return max(map(abs, codes))


def run_pytest(arguments: list[str]) -> int:
    """Become pytest: exit code, Ctrl-C and the last line are its own.

    It runs in ROOT, where its settings are. Tests use free ports and directories of their own, so they may
    run side by side; those that may not carry `pytest.mark.xdist_group`.
    """
    given = [from_root(argument) for argument in arguments] or ["--numprocesses=auto", "--dist=loadgroup"]
    os.chdir(ROOT)
    os.execv(PYTHON, [str(PYTHON), "-m", "pytest", *given])


def from_root(argument: str) -> str:
    """A test file that the caller names, as seen from where pytest runs."""
    path, separator, test = argument.partition("::")
    if argument.startswith("-") or Path.cwd() == ROOT or not Path(path).exists():
        return argument
    return str(Path(path).resolve()) + separator + test


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
