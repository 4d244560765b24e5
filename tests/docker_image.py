"""What `python3 tests --docker` needs beside Docker: a Debian base image, once, and a daemon of its own while it runs.

The Dockerfile is the one that docs/deployment.md shows. Its base image comes from debootstrap, not from a registry.
The daemon has its own directory, socket, mounts and processes: other containers of this machine are not seen, and
however this ends, nothing is left running.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from fresh_machine import CERTIFICATES, NAMESPACES, network
from openssl_versions import Missing, archives, locked, run

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "docker"
BASE = CACHE / "base.tar"
CASES = ROOT / "tests" / "docker_cases.py"  # a name that pytest does not collect by itself
IMAGE = "cmp-ca-handler-test"
WWW_DATA = 33  # its number in Debian's images

PROGRAMS = {"dockerd": "docker.io", "docker": "docker.io", "debootstrap": "debootstrap", "setpriv": "util-linux"}
# No bridge and no firewall rules: containers use the machine's network, where the tests listen on loopback only.
DAEMON = ("dockerd", "--bridge=none", "--iptables=false", "--ip6tables=false")
FILES = ("cmp_ca_handler.py", "pyproject.toml", "README.md", "LICENSE")


def needs_root() -> None:
    """Raises Missing for any other user."""
    if os.geteuid() != 0:
        raise Missing("--docker needs root: it starts a Docker daemon of its own")


def missing() -> dict[str, str]:
    """What this machine has not got: program -> Debian package."""
    return {name: package for name, package in PROGRAMS.items() if not shutil.which(name)}


def plans() -> list[str]:
    """What is made first, in words."""
    made = BASE.exists() and (CACHE / "data").exists()
    return [] if made else ["makes a Debian base image and fetches what belongs into an image, 600 MB, once"]


def dockerfile() -> str:
    """The Dockerfile of docs/deployment.md."""
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^```dockerfile\n(.+?)^```$", text, re.M | re.S)
    return str(found)


def base_name() -> str:
    """The image that the Dockerfile begins with, such as debian:trixie-slim."""
    return dockerfile().split()[1]


def make() -> None:
    """Make the base image, and see whether a daemon can run a container of it. Raises Missing."""
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE / "lock"):
            if not BASE.exists():
                make_base(re.split("[:-]", base_name())[1])
        with daemon() as docker:
            docker.run("run", "--rm", "--network=host", base_name(), "true")
    except OSError as error:
        raise Missing(f"Docker: {error}") from error


def own(path: Path, user: int = WWW_DATA) -> None:
    """Give a file of the volume to a user of the container."""
    os.chown(path, user, user)


def make_base(suite: str) -> None:
    """Have debootstrap make the least Debian, with this machine's way to the network."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="docker-base-") as directory:
        root = Path(directory, "root")
        command = [*NAMESPACES, "debootstrap", "--variant=minbase", "--include=ca-certificates", suite, str(root)]
        try:
            run([*command, archives()[0]])
        except Missing as error:
            raise Missing(f"debootstrap: {error}") from error
        settings = run(["apt-config", "dump"])
        reach = re.findall(r"(?im)^Acquire::.*(?:proxy|check|verify|cainfo|timeout).*$", settings)
        (root / "etc/apt/apt.conf.d/00machine").write_text("\n".join([*reach, ""]))
        if Path("/", CERTIFICATES).exists():  # a proxy's own authority, for instance
            shutil.copy(Path("/", CERTIFICATES), root / CERTIFICATES)
        run(["tar", "-C", str(root), "-cf", f"{BASE}.part", "."])
        Path(f"{BASE}.part").replace(BASE)


class Docker:
    """The daemon that `daemon` has started, by its socket."""

    def __init__(self, socket: Path) -> None:
        self.environment = {**os.environ, "DOCKER_HOST": f"unix://{socket}", "DOCKER_BUILDKIT": "0"}

    def call(self, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """`docker ...`: standard output and error together."""
        return subprocess.run(
            ["docker", *arguments],
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )

    def run(self, *arguments: str | Path, cwd: Path = ROOT) -> str:
        """What `docker ...` prints. Raises Missing with its last line if it fails."""
        done = self.call(*arguments, cwd=cwd)
        if done.returncode:
            lines = done.stdout.strip().splitlines() or ["no output"]
            raise Missing(f"docker {arguments[0]}: {lines[-1]}")
        return done.stdout

    def build(self, files: Mapping[str, str]) -> None:
        """Build IMAGE by the Dockerfile of docs/deployment.md; `files` are its context."""
        with tempfile.TemporaryDirectory() as directory:
            for name, text in files.items():
                Path(directory, name).write_text(text, encoding="utf-8")
            Path(directory, "Dockerfile").write_text(dockerfile(), encoding="utf-8")
            proxies = [f"--build-arg={name}" for name in network(os.environ) if name.lower().endswith("_proxy")]
            self.run("build", "--network=host", *proxies, f"--tag={IMAGE}", directory)


@contextlib.contextmanager
def daemon() -> Iterator[Docker]:
    """A daemon that has the base image, until the end of the block. Raises Missing with the daemon's own words."""
    log = CACHE / "dockerd.log"
    with locked(CACHE / "daemon.lock"), tempfile.TemporaryDirectory(prefix="docker-") as directory:
        socket = Path(directory, "socket")
        places = [f"--data-root={CACHE / 'data'}", f"--exec-root={directory}/exec", f"--pidfile={directory}/pid"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*NAMESPACES, "--mount-proc", *DAEMON, *places, f"--host=unix://{socket}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            docker = Docker(socket)
            while docker.call("info").returncode or not socket.exists():
                if process.poll() is not None:
                    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
                    raise Missing(f"no Docker daemon can run here: {lines[-1]}")
                time.sleep(0.2)
            docker.call("container", "prune", "--force")  # those of a run that was killed
            if docker.call("image", "inspect", base_name()).returncode:
                docker.run("import", BASE, base_name())
            yield docker
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the daemon as its administrator would; `process` is its parent, in our namespace."""
    with contextlib.suppress(OSError):  # it has ended by itself
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    process.kill()
    process.wait()
