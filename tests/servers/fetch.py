"""Fetch XiPKI and Siemens' RA with Maven, and compile our programs around them: once, into `.cache/servers`."""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from openssl_versions import Missing, locked, run

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / ".cache" / "servers"
JARS = CACHE / "jars"  # a directory for each of PROGRAMS
CLASSES = CACHE / "classes"

# Program -> group:artifact:version of all that it needs.
PROGRAMS = {
    "SiemensRa": """
        com.siemens.pki:CmpRaComponent:4.1.4
        org.bouncycastle:bcpkix-jdk18on:1.78.1 org.bouncycastle:bcprov-jdk18on:1.78.1
        org.bouncycastle:bcutil-jdk18on:1.78.1
        com.fasterxml.jackson.core:jackson-annotations:2.17.1 com.fasterxml.jackson.core:jackson-core:2.17.1
        com.fasterxml.jackson.core:jackson-databind:2.17.1
        com.fasterxml.jackson.dataformat:jackson-dataformat-yaml:2.17.0
        org.slf4j:slf4j-api:2.0.13 org.slf4j:slf4j-simple:2.0.13
    """,
    "XipkiCa": """
        org.xipki:ca-server:6.4.0 org.xipki:ca-api:6.4.0 org.xipki:ca-mgmt-api:6.4.0 org.xipki:ca-sdk:6.4.0
        org.xipki:certprofile-xijson:6.4.0 org.xipki:license-api:6.4.0
        org.xipki.gateway:cmp-gateway:6.4.0 org.xipki.gateway:cmp-client:6.4.0 org.xipki.gateway:gateway-common:6.4.0
        org.xipki.commons:audit:6.3.1 org.xipki.commons:datasource:6.3.1 org.xipki.commons:password:6.3.1
        org.xipki.commons:security:6.3.1 org.xipki.commons:util:6.3.1 org.xipki:ipkcs11wrapper:1.0.7
        org.bouncycastle:bcpkix-jdk18on:1.76 org.bouncycastle:bcprov-jdk18on:1.76 org.bouncycastle:bcutil-jdk18on:1.76
        com.fasterxml.jackson.core:jackson-annotations:2.15.2 com.fasterxml.jackson.core:jackson-core:2.15.2
        com.fasterxml.jackson.core:jackson-databind:2.15.2
        com.zaxxer:HikariCP:4.0.3 com.h2database:h2:2.2.220
        org.slf4j:slf4j-api:1.7.36 org.slf4j:slf4j-simple:1.7.36
    """,
}
MEGABYTES = {"SiemensRa": 13, "XipkiCa": 18}
MAVEN_MEGABYTES = 10  # what Maven fetches for itself, where it has never run

# Maven copies what is listed and resolves nothing, as this plugin does up to 2.x: the parent of XiPKI's gateway modules
# is not to be had.
POM = """\
<project xmlns="http://maven.apache.org/POM/4.0.0">
<modelVersion>4.0.0</modelVersion>
<groupId>cmp-ca-handler</groupId><artifactId>test-servers</artifactId><version>1</version><packaging>pom</packaging>
<build><plugins><plugin>
<groupId>org.apache.maven.plugins</groupId><artifactId>maven-dependency-plugin</artifactId><version>2.8</version>
<configuration><artifactItems>
{items}
</artifactItems></configuration>
</plugin></plugins></build>
</project>
"""
ITEM = """<artifactItem><groupId>{}</groupId><artifactId>{}</artifactId><version>{}</version>\
<outputDirectory>{}</outputDirectory></artifactItem>"""


def announcement() -> tuple[list[str], dict[str, str]]:
    """What prepare() is going to fetch, and what the machine lacks for it: program -> Debian package."""
    programs = [program for program, jars in PROGRAMS.items() if not up_to_date(JARS / program, jars)]
    megabytes = sum(MEGABYTES[program] for program in programs) + MAVEN_MEGABYTES
    plans = [f"fetches XiPKI and Siemens' RA with Maven, {megabytes} MB, once"] if programs else []
    needed = {"java": "default-jdk-headless", "javac": "default-jdk-headless", **({"mvn": "maven"} if programs else {})}
    return plans, {program: package for program, package in needed.items() if not shutil.which(program)}


def up_to_date(target: Path, made_from: str) -> bool:
    """Whether a directory is there, and was made from the same."""
    stamp = target / "made-from"
    return stamp.exists() and stamp.read_text() == digest(made_from)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prepare() -> None:
    """Fetch and compile what is not there. Raises Missing. Later runs find it and need no network."""
    release = java_release()
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / "lock"):
        for program, jars in PROGRAMS.items():
            made_once(JARS / program, jars, functools.partial(fetch, program))
            sources = [HERE / "Web.java", HERE / f"{program}.java"]
            made_from = "".join([release, jars, *(source.read_text(encoding="utf-8") for source in sources)])
            made_once(CLASSES / program, made_from, functools.partial(compile_java, program, sources))


def java_release() -> str:
    """The release of the JDK on PATH. Raises Missing without one that is new enough."""
    try:
        release = re.match(r"javac (\d+)", run(["javac", "-version"]))
    except Missing:
        release = None
    if not release or int(release.group(1)) < 17:
        raise Missing("a JDK, 17 or later, is needed (Debian: default-jdk-headless)")
    return release.group(1)


def made_once(target: Path, made_from: str, make: Callable[[Path], None]) -> None:
    """Make the directory `target`, whole or not at all, unless it is there and was made from the same."""
    if up_to_date(target, made_from):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        fresh = Path(directory, "fresh")
        fresh.mkdir()
        make(fresh)
        (fresh / "made-from").write_text(digest(made_from))
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)


def fetch(program: str, target: Path) -> None:
    """Have Maven copy the jars of a program into a directory."""
    if not shutil.which("mvn"):
        raise Missing("Maven is needed once, to fetch two CMP servers (Debian: maven)")
    items = [ITEM.format(*jar.split(":"), target) for jar in PROGRAMS[program].split()]
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        pom = Path(directory, "pom.xml")
        pom.write_text(POM.format(items="\n".join(items)), encoding="utf-8")
        try:
            # Not --quiet: its last line would say nothing.
            run(["mvn", "--batch-mode", "--file", str(pom), "dependency:copy"])
        except Missing as error:
            raise Missing(f"Maven cannot fetch {program}: {error}") from error


def compile_java(program: str, sources: list[Path], target: Path) -> None:
    """Compile one of our programs."""
    run(["javac", "-d", str(target), "-classpath", f"{JARS / program}/*", *map(str, sources)])
