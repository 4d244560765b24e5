"""The OpenSSL binaries that are not the machine's own: `openssl cmp` differs between 3.0, 3.5, 3.6 and 4.0.

They are Debian's packages of other releases, unpacked into `.cache/openssl/<suite>`, never installed. The
wrapper `.cache/openssl/openssl-<suite>` runs the binary through its own dynamic loader with its own C
library, so that the machine's have no part in it. apt fetches them, with directories of its own: it needs no
root, takes the mirror and the proxy that the machine is set up with, and checks the archive's signatures.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "openssl"

# Suite -> its OpenSSL. Those of releases stay what they are; what the others have is for the binary to say.
SUITES = {"bookworm": "3.0", "trixie": "3.5", "sid": "3.6", "experimental": "4.0"}
# Experimental has only what is new there, and takes the rest from sid.
EXPERIMENTAL = """\
Package: openssl libssl* openssl-provider-*
Pin: release a=experimental
Pin-Priority: 990
"""
MEGABYTES = 26  # that each takes, unpacked

KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")

# By `${0%/*}` it goes on working when the tree is moved or copied. The paths compiled into the binary lead to
# the machine's configuration and providers; these have to be of the binary's own release.
WRAPPER = """\
#!/bin/sh
root=${{0%/*}}/{suite}
export OPENSSL_CONF="${{OPENSSL_CONF-$root/etc/ssl/openssl.cnf}}"
export OPENSSL_MODULES="${{OPENSSL_MODULES-$root/{libraries}/ossl-modules}}"
exec "$root/{loader}" --library-path "$root/{libraries}" "$root/usr/bin/openssl" "$@"
"""


class Missing(Exception):
    """What this machine lacks, in one line."""


def own_version() -> str:
    """The first two numbers of the machine's openssl. Raises Missing where there is none."""
    return ".".join(run(["openssl", "version"]).split()[1].split(".")[:2])


def wanted() -> list[str]:
    """The suites whose OpenSSL is another than the machine's."""
    own = own_version()
    return [suite for suite, version in SUITES.items() if version != own]


def missing() -> list[str]:
    """What of `wanted` is still to be fetched."""
    return [suite for suite in wanted() if not (CACHE / f"openssl-{suite}").exists()]


def other_openssl() -> tuple[list[Path], list[str]]:
    """The wrappers of `wanted` that could be had, and for each other one, why not.

    The first call fetches them, later ones find them. Any number of processes may call at once: one fetches, the
    others wait for it.
    """
    wrappers, failures = [], []
    for suite in wanted():
        try:
            wrappers.append(openssl_of(suite))
        except Missing as failure:
            failures.append(f"OpenSSL {SUITES[suite]} of Debian's {suite}: {failure}")
    return wrappers, failures


def openssl_of(suite: str) -> Path:
    """The wrapper of one suite; fetches it if need be. Raises Missing."""
    wrapper = CACHE / f"openssl-{suite}"
    try:
        if not wrapper.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            with locked(CACHE / "lock"):
                if not wrapper.exists():
                    fetch(suite, wrapper)
    except OSError as error:
        raise Missing(str(error)) from error
    return wrapper


def pkcs11_provider() -> Path:
    """The provider for keys in tokens, unpacked beside the OpenSSL 3.5 that it is made for. Raises Missing."""
    root = CACHE / "trixie-pkcs11"
    if not root.exists():
        with locked(CACHE / "lock"):
            if not root.exists():
                unpack("trixie", ["pkcs11-provider"], root)
    found = list(root.glob("usr/lib/*/ossl-modules/pkcs11.so"))
    if not found:
        raise Missing("Debian's package pkcs11-provider holds no provider")
    return found[0]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fetch(suite: str, wrapper: Path) -> None:
    """Download openssl of `suite` with all that it depends on, and unpack it.

    The wrapper comes last, once it has been seen to work, so it marks the suite as complete.
    """
    unpack(suite, ["openssl"], CACHE / suite)
    trial = wrapper.with_suffix(".trial")  # beside the wrapper: a wrapper finds its binary by its own place
    trial.write_text(wrapper_text(suite))
    trial.chmod(0o755)
    run([str(trial), "version"])
    trial.replace(wrapper)


def unpack(suite: str, packages: list[str], place: Path) -> None:
    """Download packages of `suite` with all that they depend on, and unpack them to `place`. Raises Missing."""
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise Missing(f"no {program}")
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="fetching-") as directory:
        root = Path(directory, "root")
        root.mkdir()  # with the usual mode: another user may run the tests that root has set up
        for package in download(suite, packages, Path(directory)):
            run(["dpkg-deb", "-x", str(package), str(root)])
        for name in ("lib", "lib64"):  # those of bookworm still have both, and on a machine /lib is a link to /usr/lib
            if (root / name).is_dir() and not (root / name).is_symlink():
                shutil.copytree(root / name, root / "usr" / name, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        root.rename(place)


def download(suite: str, packages: list[str], work: Path) -> list[Path]:
    """The package files, from the first of the machine's archives that has the suite."""
    failures = []
    for archive in archives():
        try:
            return download_from(archive, suite, packages, work)
        except Missing as failure:
            failures.append(failure)
    raise failures[0] if failures else Missing("no archive in apt's configuration")


def archives() -> list[str]:
    """The addresses of the archives that apt is set up with, likely ones first.

    What apt would fetch says it even where the lists are still empty, as on a new machine. Debian's main
    archive has the machine's release under its bare name, others under names such as "bookworm-security".
    """
    would_fetch = run(["apt-get", "update", "--print-uris", "-o", "Debug::NoLocking=1"])
    found = re.findall(r"^'(\S+?)/dists/(\S+)/InRelease' ", would_fetch, re.MULTILINE)
    return list(dict.fromkeys(address for address, suite in sorted(found, key=lambda pair: "-" in pair[1])))


def download_from(archive: str, suite: str, packages: list[str], work: Path) -> list[Path]:
    """Have apt resolve and download packages as for a machine on which nothing is installed.

    That brings the C library too, and follows when a library's package changes its name.
    """
    apt_get = own_apt_get(archive, suite, work)
    run([*apt_get, "install", "--yes", "--download-only", "--no-install-recommends", *packages])
    return sorted((work / "archives").glob("*.deb"))


def own_apt_get(archive: str, suite: str, work: Path, kind: str = "deb") -> list[str]:
    """The beginning of a command: apt-get with all of its files in `work`, and the lists of `suite` fetched."""
    for directory in ("lists/partial", "archives/partial"):
        (work / directory).mkdir(parents=True, exist_ok=True)
    (work / "status").touch()
    keyrings = [path for path in (Path("/usr/share/keyrings", name) for name in KEYRINGS) if path.exists()]
    target = "Sources" if kind == "deb-src" else "Packages"
    marks = f"arch={run(['dpkg', '--print-architecture']).strip()} target={target}"
    if keyrings:
        marks += f" signed-by={keyrings[0]}"
    suites = ["sid", suite] if suite == "experimental" else [suite]
    (work / "sources.list").write_text("".join(f"{kind} [{marks}] {archive} {name} main\n" for name in suites))
    (work / "preferences").write_text(EXPERIMENTAL)
    settings = {
        "Dir::Etc::sourcelist": work / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": work / "preferences",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State::lists": work / "lists",
        "Dir::State::status": work / "status",
        "Dir::State::extended_states": work / "extended_states",
        "Dir::Cache::archives": work / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "Debug::NoLocking": 1,  # dpkg's lock is root's, and nothing is installed
        "APT::Sandbox::User": "root",  # the user that apt running as root changes to may not come in here
        "APT::Update::Error-Mode": "any",  # else an archive that cannot be reached is only a warning
        "Acquire::Retries": 2,
    }
    apt_get = ["apt-get", *(f"--option={key}={value}" for key, value in settings.items())]
    run([*apt_get, "update"])
    return apt_get


def wrapper_text(suite: str) -> str:
    """The wrapper's script, with loader and libraries where the packages of this architecture have them."""
    loader, libraries = system_libraries(CACHE / suite)
    return WRAPPER.format(suite=suite, loader=loader, libraries=libraries)


def system_libraries(root: Path) -> tuple[Path, Path]:
    """The dynamic loader and the directory of the libraries, as seen from `root`. Raises Missing."""
    loaders = [
        path
        for path in root.glob("usr/lib*/**/ld*.so.*")
        if re.match(r"ld(64|-linux)", path.name) and not path.is_symlink()  # to an absolute path, it may be
    ]
    libcrypto = list(root.glob("usr/lib/*/libcrypto.so.*"))
    if not loaders or not libcrypto:
        raise Missing(f"the packages in {root.name} hold no dynamic loader or no libcrypto")
    return loaders[0].relative_to(root), libcrypto[0].parent.relative_to(root)


def run(command: list[str]) -> str:
    """What `command` prints. If it fails: Missing, with the first line marked as an error, or else the last."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=1800,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(str(error)) from error
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        errors = [line for line in lines if line.startswith(("E: ", "ERROR: ", "[ERROR] "))]  # as apt, pip and Maven do
        raise Missing((errors[:1] or lines[-1:] or [f"{command[0]}: exit code {done.returncode}"])[0].strip())
    return done.stdout
