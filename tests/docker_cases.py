"""acme2certifier in a Docker container, by the Dockerfile of docs/deployment.md: nothing that waits is lost with it.

`python3 tests --docker` runs these: pytest does not collect a file of this name by itself. The images that
acme2certifier itself made, up to 0.43.1, cannot be had from the package registries: test_deployment.py has their tree.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import docker_image
from conftest import bundle_certificates, csr_pem, free_port, needs, wait_until
from demo_ca import DemoCA
from docker_image import IMAGE, ROOT, WWW_DATA, Docker
from host import Host, write_configuration
from shared import check_chain

WAITS = "CMP enrolment.* waits"  # what the handler logs
VOLUME = Path("/var/www/acme2certifier/volume")


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """A daemon that has the image."""
    with docker_image.daemon() as daemon:
        daemon.build({name: (ROOT / name).read_text(encoding="utf-8") for name in docker_image.FILES})
        yield daemon


class Container:
    """A container of the image, its volume, and the clients that ask it."""

    def __init__(self, docker: Docker, directory: Path, ca: DemoCA) -> None:
        self.docker = docker
        self.volume = directory / "data"
        self.volume.mkdir()
        section = {**ca.options(), "cmp_tmp_dir": f"{VOLUME}/cmp", "cmp_trusted": f"{VOLUME}/ca.pem"}
        section.update({"cmp_total_timeout": "3", "cmp_msg_timeout": "3"})
        section.update({"cmp_openssl_bin": "/usr/bin/openssl", "handler_module": "cmp_ca_handler"})
        self.secret = section.pop("cmp_secret")
        configuration = {
            "DEFAULT": {"debug": "False"},
            "CAhandler": {**section, "cmp_secret_variable": "CMP_SECRET"},
            "DBhandler": {"handler": "wsgi", "dbfile": f"{VOLUME}/acme_srv.db"},
            "Challenge": {"challenge_validation_disable": "True"},
            "Certificate": {"enrollment_timeout": "60"},
            "Order": {"retry_after_timeout": "2"},
        }
        write_configuration(self.volume / "acme_srv.cfg", configuration)
        (self.volume / "ca.pem").write_bytes((ca.directory / "root.pem").read_bytes())
        self.environment = directory / "cmp.env"
        self.environment.write_text(f"CMP_SECRET={self.secret}\nACME2CERTIFIER_I_KNOW_THE_RISK=1\n")
        self.clients = Host(directory, {})  # never started: only its clients
        self.port = free_port()
        self.clients.url = f"http://127.0.0.1:{self.port}"
        self.name = f"a2c-{self.port}"

    def options(self) -> list[str]:
        """What all containers of this volume get."""
        return ["--network=host", f"--env-file={self.environment}", f"--volume={self.volume}:{VOLUME}"]

    def start(self) -> None:
        """`docker run`, as the page has it: but for the port, it is a container of the machine's own network."""
        for path in (self.volume, *self.volume.rglob("*")):
            docker_image.own(path)
        listen = f"GUNICORN_CMD_ARGS=--bind=127.0.0.1:{self.port} --workers=2 --threads=4"
        self.docker.run("run", "--detach", f"--name={self.name}", *self.options(), f"--env={listen}", IMAGE)
        self.listens()

    def listens(self) -> None:
        """Wait until it does."""
        wait_until(lambda: "Listening at" in self.log().rpartition("Starting gunicorn")[2], self.log(), 60)

    def restart(self) -> None:
        """`docker restart`."""
        count = self.log().count("Listening at")
        self.docker.run("restart", self.name)
        wait_until(lambda: self.log().count("Listening at") > count, "the container's start", 60)

    def remove(self) -> None:
        """The container, not its volume."""
        self.docker.call("rm", "--force", self.name)

    def log(self) -> str:
        """`docker logs`."""
        return self.docker.call("logs", self.name).stdout

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """`docker exec`."""
        return self.docker.call("exec", self.name, *command)


@pytest.fixture
def container(docker: Docker, ca: DemoCA, tmp_path: Path) -> Iterator[Container]:
    """A running container whose CA is `ca`."""
    made = Container(docker, tmp_path, ca)
    try:
        made.start()
        yield made
    finally:
        print(made.log())
        made.remove()


@needs("lego")
def test_order_waits_over_a_restart(container: Container, ca: DemoCA) -> None:
    """An order, one that waits while the container restarts and goes on by the poller, and a revocation."""
    checked = container.execute("cmp-ca-handler", "check", "--connect")
    assert checked.returncode == 0, checked.stdout
    client = container.clients
    ordered = client.certbot("certonly", "-d", "a.example.com")
    assert ordered.returncode == 0, ordered.stdout + container.log()
    leaf = check_chain(client.certbot_chain("a.example.com"), ca)

    ca.hold = True
    ca.check_after = 1
    results: list[subprocess.CompletedProcess[str]] = []
    order = threading.Thread(
        target=lambda: results.append(client.lego("slow.example.com", "--cert.timeout", "110")), daemon=True
    )
    order.start()
    wait_until(lambda: re.search(WAITS, container.log()), "the note that the order waits", 60)
    container.restart()
    assert ca.approve("all") == 1
    said = wait_until(lambda: issued(container), "the CA's answer", 60)
    order.join(120)
    assert results and results[0].returncode == 0, said + container.log()
    check_chain(client.lego_chain("slow.example.com"), ca)
    # What the poller says is not in the container's log: docs/deployment.md has a cron line that keeps it.
    assert "slow.example.com" in said and container.log().count("certificate issued") == 1

    revoked = client.certbot("revoke", "--cert-name", "a.example.com", "--reason", "superseded")
    assert revoked.returncode == 0, revoked.stdout + container.log()
    assert ca.is_revoked(f"{leaf.serial_number:X}")
    asked = [message.request for message in ca.messages]
    counts = {kind: asked.count(kind) for kind in ("ir", "certConf", "rr")}
    print("at the CA:", counts)
    assert counts == {"ir": 2, "certConf": 2, "rr": 1}


def issued(container: Container) -> str:
    """Run the poller once: what it says, once it has the certificate."""
    polled = container.execute("a2c-cert-poll")
    assert polled.returncode == 0, polled.stdout
    return polled.stdout if "certificate issued" in polled.stdout else ""


def test_another_container_finishes_the_order(container: Container, ca: DemoCA) -> None:
    """The volume is all that lasts: handler, openssl and container are new, the CMP transaction goes on."""
    ca.hold = True
    ca.check_after = 1
    (container.volume / "www.csr").write_text(csr_pem(["www.example.com"]))
    waiting = container.execute("cmp-ca-handler", "enroll", "www.csr")
    assert waiting.returncode == 3, waiting.stdout
    (identifier,) = (path.name for path in (container.volume / "cmp").iterdir() if path.is_dir())
    container.remove()
    container.start()
    ca.approve("all")
    polled = wait_until(lambda: polled_by_hand(container, identifier), "the CA's answer")
    assert len(bundle_certificates(polled)) == 3
    assert [message.request for message in ca.messages].count("ir") == 1


def polled_by_hand(container: Container, identifier: str) -> str:
    """`poll`: the bundle, empty while the CA has not decided."""
    done = container.execute("cmp-ca-handler", "poll", identifier)
    return done.stdout if done.returncode == 0 else ""


def test_quotes_in_an_env_file_belong_to_the_secret(container: Container) -> None:
    """Docker, unlike a shell and systemd, takes the line as it is."""
    container.environment.write_text(f"CMP_SECRET='{container.secret}'\n")
    said = container.docker.run("run", "--rm", *container.options(), IMAGE, "printenv", "CMP_SECRET")
    assert said == f"'{container.secret}'\n"
    checked = container.docker.call("run", "--rm", *container.options(), IMAGE, "cmp-ca-handler", "check", "--connect")
    assert checked.returncode != 0
    assert "check cmp_ref and cmp_secret" in checked.stdout


@pytest.mark.parametrize(("owner", "mode", "error"), [(0, 0o600, True), (WWW_DATA, 0o400, False)], ids=["root", "33"])
def test_secret_in_a_file(container: Container, tmp_path: Path, owner: int, mode: int, error: bool) -> None:
    """`cmp_secret: file:...`: Docker mounts it as it is, and the container's user has to be able to read it."""
    secret = tmp_path / "secret"
    secret.write_text(f"{container.secret}\n")
    secret.chmod(mode)
    docker_image.own(secret, owner)
    configuration = container.volume / "acme_srv.cfg"
    text = configuration.read_text()
    configuration.write_text(re.sub("cmp_secret_variable: .*", "cmp_secret: file:/run/secrets/cmp_secret", text))
    mounts = [*container.options(), f"--volume={secret}:/run/secrets/cmp_secret:ro"]
    checked = container.docker.call("run", "--rm", *mounts, IMAGE, "cmp-ca-handler", "check", "--connect")
    assert (checked.returncode != 0) == error, checked.stdout
    assert ("/run/secrets/cmp_secret cannot be read" in checked.stdout) == error
