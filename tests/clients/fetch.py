"""Fetch the ACME clients, and build our programs around those that are libraries: once, into `.cache/clients`.

Debian's are unpacked, never installed: an old release has the clients that administrators run, sid has the new ones.
What cannot be had is left out, and its tests are skipped.
"""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from openssl_versions import Missing, locked, run, unpack
from servers.fetch import ITEM, POM, digest
from servers.fetch import up_to_date as is_made_from

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".cache" / "clients"

DEBIAN = {
    "bookworm": "certbot lego dehydrated uacme acme-tiny caddy apache2",
    "sid": "lego acme.sh dehydrated uacme acme-tiny caddy",
}
JARS = """
    org.shredzone.acme4j:acme4j-client:3.5.1 org.bitbucket.b_c:jose4j:0.9.6
    org.bouncycastle:bcpkix-jdk18on:1.80 org.bouncycastle:bcprov-jdk18on:1.80 org.bouncycastle:bcutil-jdk18on:1.80.2
    org.slf4j:slf4j-api:2.0.16 org.slf4j:slf4j-simple:2.0.16
"""
NPM = "acme-client@5.4.0"

# What is fetched -> megabytes, and the programs that this takes: program -> Debian package.
NEEDED: dict[str, tuple[int, dict[str, str]]] = {
    "bookworm": (280, {"apt-get": "apt", "dpkg-deb": "dpkg"}),
    "sid": (190, {"apt-get": "apt", "dpkg-deb": "dpkg"}),
    "acme4j": (12, {"mvn": "maven", "javac": "default-jdk-headless"}),
    "acme-client": (12, {"npm": "npm", "node": "nodejs"}),
    "instant-acme": (230, {"cargo": "cargo", "cc": "gcc"}),
    "go": (3, {"go": "golang-go"}),
}
# What the clients themselves run, and what reads their certificates.
TOOLS = {"curl": "curl", "bash": "bash", "keytool": "default-jre-headless"}


def place(what: str) -> Path:
    """The directory of one of NEEDED."""
    return CACHE / what


def made_from(what: str) -> str:
    """What a directory is made from, as text."""
    sources = {"acme4j": ["Acme4j.java"], "instant-acme": ["instant_acme/Cargo.toml", "instant_acme/src/main.rs"]}
    sources["go"] = ["read.go"]
    texts = [(HERE / source).read_text(encoding="utf-8") for source in sources.get(what, [])]
    return json.dumps([what, DEBIAN.get(what), JARS, NPM, *texts])


def up_to_date(what: str) -> bool:
    """Whether one of NEEDED is there, made from what it is to be made from."""
    return is_made_from(place(what), made_from(what))


def announcement() -> tuple[list[str], dict[str, str]]:
    """What prepare() is going to fetch, in words, and what of it the machine lacks: program -> Debian package."""
    wanted = [what for what in NEEDED if not up_to_date(what)]
    lacking = {name: package for name, package in TOOLS.items() if not shutil.which(name)}
    for what in wanted:
        lacking.update({name: package for name, package in NEEDED[what][1].items() if not shutil.which(name)})
    megabytes = sum(NEEDED[what][0] for what in wanted)
    plans = [f"fetches ACME clients ({', '.join(wanted)}) into .cache/clients, {megabytes} MB, once"] if wanted else []
    return plans, lacking


def prepare() -> list[str]:
    """Fetch and build what is not there; what could not be had is returned, in words. Later runs need no network."""
    makers: dict[str, Callable[[Path], None]] = {suite: functools.partial(make_suite, suite) for suite in DEBIAN}
    makers.update({"acme4j": make_acme4j, "acme-client": make_npm, "instant-acme": make_rust, "go": make_go})
    CACHE.mkdir(parents=True, exist_ok=True)
    failures = []
    with locked(CACHE / "lock"):
        for what, make in makers.items():
            try:
                make_once(what, make)
            except (Missing, OSError) as error:
                failures.append(f"{what}: {error}")
    return failures


def make_once(what: str, make: Callable[[Path], None]) -> None:
    """Make a directory, whole or not at all, unless it is there and was made from the same."""
    if up_to_date(what):
        return
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        fresh = Path(directory, "fresh")
        fresh.mkdir()
        make(fresh)
        (fresh / "made-from").write_text(digest(made_from(what)))
        shutil.rmtree(place(what), ignore_errors=True)
        fresh.rename(place(what))


def make_suite(suite: str, target: Path) -> None:
    """The clients of one of Debian's suites, with all that they need down to the C library."""
    unpack(suite, DEBIAN[suite].split(), target / "root")


def make_acme4j(target: Path) -> None:
    """The jars of acme4j, copied by Maven, and Acme4j.java compiled against them."""
    items = [ITEM.format(*jar.split(":"), target) for jar in JARS.split()]
    (target / "pom.xml").write_text(POM.format(items="\n".join(items)), encoding="utf-8")
    run(["mvn", "--batch-mode", "--file", str(target / "pom.xml"), "dependency:copy"])
    run(["javac", "-d", str(target), "-classpath", f"{target}/*", str(HERE / "Acme4j.java")])


def make_npm(target: Path) -> None:
    """npm's acme-client, with what it needs."""
    run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", f"--prefix={target}", NPM])


def make_rust(target: Path) -> None:
    """Our program around instant-acme."""
    shutil.copytree(HERE / "instant_acme", target / "source")
    run(["cargo", "build", "--quiet", f"--manifest-path={target}/source/Cargo.toml", f"--target-dir={target}/built"])
    shutil.copy(target / "built" / "debug" / "instant_acme_client", target)
    shutil.rmtree(target / "built")


def make_go(target: Path) -> None:
    """Go's reader of certificates; it needs nothing but Go."""
    run(["go", "build", "-o", str(target / "read"), str(HERE / "read.go")])
