"""What `python3 tests --windows` needs beside wine: a Python and an OpenSSL for Windows, once, in `.cache/windows`.

The Python is a complete CPython that Maven fetches from Maven Central. OpenSSL is compiled from Debian's source
package, without what `openssl cmp` does not need.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from openssl_versions import Missing, archives, locked, own_apt_get, run

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "windows"
PYTHON, OPENSSL = CACHE / "python" / "python.exe", CACHE / "openssl.exe"
CASES = Path(__file__).resolve().parent / "windows_cases.py"  # a name that pytest does not collect by itself

ARTIFACT, UNPACKED = "org.bytedeco:cpython:3.13.5-1.5.12:jar:windows-x86_64", "org/bytedeco/cpython/windows-x86_64/"
PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy"
SUITE, COMPILER = "bookworm", "x86_64-w64-mingw32-"
LEFT_OUT = (
    "shared tests asm module engine dso comp dtls legacy srp ocsp cms ts ct sm2 sm3 sm4 aria camellia seed idea bf cast"
    " rc2 rc4 md4 mdc2 rmd160 whirlpool blake2 siphash gost psk srtp nextprotoneg"
)
# Debian's wine64 alone brings no command into PATH.
WINE = ("wine64", "wine", "/usr/lib/wine/wine64")
PROGRAMS = {f"{COMPILER}gcc": "gcc-mingw-w64-x86-64", "mvn": "maven", "make": "make", "perl": "perl", "apt-get": "apt"}


def wine() -> str:
    """The program, empty if it is missing."""
    return next(filter(None, map(shutil.which, WINE)), "")


def missing() -> dict[str, str]:
    """What this machine has not got: program -> Debian package."""
    lacking = {} if wine() else {"wine64": "wine64"}
    if not (PYTHON.exists() and OPENSSL.exists()):
        lacking.update({name: package for name, package in PROGRAMS.items() if not shutil.which(name)})
    return lacking


def plans() -> list[str]:
    """What is made first, in words."""
    todo = []
    if not PYTHON.exists():
        todo.append("fetches a Python for Windows from Maven Central into .cache, 80 MB, once")
    if not OPENSSL.exists():
        todo.append("fetches OpenSSL's source from Debian's archive and compiles it for Windows, some minutes, once")
    return todo


def make() -> None:
    """Make what is not there. Raises Missing."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE / "lock"), tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as directory:
            if not PYTHON.exists():
                fetch_python(Path(directory))
            if not OPENSSL.exists():
                compile_openssl(Path(directory))
    except OSError as error:
        raise Missing(f"Python and OpenSSL for Windows: {error}") from error


def fetch_python(work: Path) -> None:
    """Unpack the jar that Maven fetches."""
    run(["mvn", "--quiet", "--batch-mode", PLUGIN, f"-Dartifact={ARTIFACT}", f"-DoutputDirectory={work}"])
    with zipfile.ZipFile(next(work.glob("*.jar"))) as jar:
        jar.extractall(work, [name for name in jar.namelist() if name.startswith(UNPACKED)])
    (work / UNPACKED).rename(PYTHON.parent)


def compile_openssl(work: Path) -> None:
    """Fetch the source, without Debian's changes, and make one program of it that needs no library of its own."""
    source(work)
    tree = next(path for path in work.glob("openssl*") if path.is_dir())
    within = ["env", "-C", str(tree)]
    options = [f"--cross-compile-prefix={COMPILER}", "-O1", *(f"no-{word}" for word in LEFT_OUT.split())]
    run([*within, "./Configure", "mingw64", *options])
    run([*within, "make", "--silent", "build_generated"])
    run([*within, "make", "--silent", f"--jobs={os.cpu_count() or 1}", "apps/openssl.exe"])
    run([f"{COMPILER}strip", str(tree / "apps" / "openssl.exe")])
    (tree / "apps" / "openssl.exe").replace(OPENSSL)


def source(work: Path) -> None:
    """Have apt fetch OpenSSL's source from the first of the machine's archives that has it, and unpack it."""
    failures = []
    for archive in archives():
        try:
            apt_get = own_apt_get(archive, SUITE, work, "deb-src")
            run(["env", "-C", str(work), *apt_get, "source", "--tar-only", "openssl"])
            run(["tar", "-C", str(work), "-xf", str(next(work.glob("openssl_*.orig.tar.gz")))])
            return
        except Missing as failure:
            failures.append(failure)
    raise failures[0] if failures else Missing("no archive in apt's configuration")
