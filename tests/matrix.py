"""Run a part of the tests on every Python and OpenSSL that can be found, and print which passed.

    python3 tests/matrix.py                                  all of them, about twenty minutes with two cores
    python3 tests/matrix.py --python 3.9 --openssl 4.0       one combination

Interpreters: those of the machine, of pyenv, and of Debian's suites, unpacked into `.cache`, never installed. OpenSSL:
the machine's own and those that the tests fetch. What each run printed is kept in `.cache/matrix`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from openssl_versions import CACHE, SUITES, Missing, openssl_of, own_version, run, system_libraries, unpack

ROOT = Path(__file__).resolve().parent.parent
WORK = CACHE.parent / "matrix"
PIP = ROOT / ".venv-tests" / "bin" / "python"
PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")
DEBIAN = {"3.11": "bookworm", "3.13": "trixie", "3.14": "sid"}
PARTS = (
    "request/test_enroll",
    "waiting/test_poll",
    "revocation/test_revoke",
    "configuration/test_configuration",
    "chain/test_chain",
    "command_line/test_cli",
)
LOAD = ("at_once", "damaged_files", "many_")  # tests by the hundred, which say nothing about versions
# A loader of its own and a C library of its own. By --argv0 the interpreter finds its virtual environment.
WRAPPER = """\
#!/bin/sh
here=$(readlink -f "$0")
root=${{here%/usr/bin/*}}
exec "$root/{loader}" --library-path "$root/{libraries}" --argv0 "$0" "$root/usr/bin/python{version}.real" "$@"
"""


def main() -> int:
    """Run it; the exit code is 1 if a test failed, or a combination could not be had."""
    parser = argparse.ArgumentParser(description="Run a part of the tests on every Python and OpenSSL.")
    parser.add_argument("--python", action="append", choices=PYTHONS, metavar="VERSION", help="only this one")
    parser.add_argument("--openssl", action="append", choices=SUITES.values(), metavar="VERSION", help="only this one")
    args = parser.parse_args()
    if not PIP.exists():
        print("matrix.py: no .venv-tests: run `python3 tests --lint` first, which makes it", file=sys.stderr)
        return 2
    versions = args.openssl or list(SUITES.values())
    table = {}
    with tempfile.TemporaryDirectory(prefix="openssl-") as directory:  # a short path: it stands in what is printed
        for python in args.python or PYTHONS:
            table[python] = [combination(python, version, directory) for version in versions]
    print(f"| Python | {' | '.join('OpenSSL ' + version for version in versions)} |")
    print("| --- |" + " --- |" * len(versions))
    for python, cells in table.items():
        print(f"| {python} | {' | '.join(cells)} |")
    return int(any(cell != "passed" for cells in table.values() for cell in cells))


def combination(python: str, version: str, directory: str) -> str:
    """Run the tests with these two: "passed", or what else pytest's last line says, or why they did not run."""
    try:
        interpreter, path = environment(python), search_path(version, directory)
    except (Missing, OSError) as missing:
        return f"not run: {missing}"
    workers = 2 * (os.cpu_count() or 1)  # many tests wait for a CA that lets them wait
    command = [str(interpreter), "-m", "pytest", "-q", f"--numprocesses={workers}", "--dist=loadgroup"]
    command += ["-o", f"cache_dir={WORK / 'pytest'}", "-k", f"not ({' or '.join(LOAD)})"]
    files = [str(ROOT / "tests" / f"{part}.py") for part in PARTS]
    log = WORK / f"{python}-{version}.log"
    with log.open("wb") as output:
        subprocess.run(
            [*command, *files],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PATH": path, "CMP_TEST_OPENSSL": "", "PYTHONDONTWRITEBYTECODE": "1"},
        )
    said = log.read_text(errors="replace").strip().splitlines() or ["nothing printed"]
    result = re.sub(r"(, \d+ deselected)? in [\d.]+s.*", "", said[-1]).strip("= ")
    print(f"[{time.strftime('%H:%M:%S')}] Python {python}, OpenSSL {version}: {result}", file=sys.stderr, flush=True)
    return re.sub(r"^\d+ passed$", "passed", result)


def search_path(version: str, directory: str) -> str:
    """PATH with this OpenSSL as the first."""
    if version == own_version():
        return os.environ["PATH"]
    suite = next(suite for suite, has in SUITES.items() if has == version)
    wrapper = openssl_of(suite)
    found = run([str(wrapper), "version"]).split()[1]
    if not found.startswith(version + "."):
        raise Missing(f"Debian's {suite} has {found}")
    place = Path(directory, version)
    place.mkdir(exist_ok=True)
    (place / "openssl").write_text(f'#!/bin/sh\nexec "{wrapper}" "$@"\n')
    (place / "openssl").chmod(0o755)
    return os.pathsep.join([str(place), os.environ["PATH"]])


def environment(version: str) -> Path:
    """The Python of a virtual environment with pytest, made once. Raises Missing where there is no such Python."""
    directory = WORK / f"python-{version}"
    python = directory / "bin" / "python"
    if (directory / "complete").exists() and works(str(python), version):
        return python
    WORK.mkdir(parents=True, exist_ok=True)
    run([interpreter_of(version), "-m", "venv", "--clear", "--without-pip", str(directory)])
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.findall(r'"((?:cryptography|hypothesis|pytest|pytest-xdist)>=[^"]+)"', text)
    # pip of the tests' own environment, for Debian's interpreters come without.
    run([str(PIP), "-m", "pip", "--python", str(python), "install", "--quiet", "--no-input", *packages])
    (directory / "complete").touch()
    return python


def interpreter_of(version: str) -> str:
    """A Python of this version: the machine's, pyenv's, or Debian's."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}") or "", *sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python3")))]
    for python in [sys.executable, *found]:
        if works(python, version):
            return python
    if version not in DEBIAN:
        raise Missing("no such interpreter on this machine, and Debian's archive has none")
    place = WORK / f"debian-{version}"
    python = str(place / "usr" / "bin" / f"python{version}")
    if not works(python, version):
        unpack(DEBIAN[version], [f"python{version}-venv"], place)
        loader, libraries = system_libraries(place)
        os.rename(python, python + ".real")
        Path(python).write_text(WRAPPER.format(loader=loader, libraries=libraries, version=version))
        Path(python).chmod(0o755)
    return python


def works(python: str, version: str) -> bool:
    """Whether that is a Python of this version which can load what the tests need."""
    try:
        return run([python, "-c", "import ssl, sys, venv; print('%d.%d' % sys.version_info[:2])"]).strip() == version
    except Missing:
        return False


if __name__ == "__main__":
    sys.exit(main())
