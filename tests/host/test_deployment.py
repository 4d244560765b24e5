"""It works where acme2certifier really runs: threads, HTTPS, the poller beside a waiting client, a volume."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import programs
from conftest import OPENSSL, bundle_certificates, csr_pem, free_port, listens, needs, wait_until
from demo_ca import DemoCA
from host import GUNICORN, HANDLER, PROGRAMS, ROOT, Host, write_configuration
from shared import BY_PATH, LOAD_CONFIG, check_chain

pytestmark = pytest.mark.e2e
HOST = ROOT / "tests" / "host.py"
PAGE = ROOT / "docs" / "deployment.md"
NOTHING: Mapping[str, str] = {}
WAITS = "CMP enrolment.* waits"  # what the handler logs


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `pip install .` has put the handler; what builds it is there already."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-build-isolation"]
    command += ["--target", str(target), "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def loading(way: str, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[dict[str, str], Path | None, Path]:
    """The keys, the PYTHONPATH and the file that acme2certifier then loads."""
    by_name, by_path = {"handler_module": "cmp_ca_handler"}, {"handler_file": str(HANDLER)}
    if way == "copied":
        copy = tmp_path / "tree" / "acme_srv" / "ca_handler.py"
        copy.parent.mkdir(parents=True)
        (copy.parent / "__init__.py").touch()
        shutil.copy(HANDLER, copy)
        return {}, tmp_path / "tree", copy
    if way == "handler_file":
        return by_path, None, HANDLER
    target = request.getfixturevalue("installed")
    return {**by_name, **(by_path if way == "both keys" else {})}, target, target / "cmp_ca_handler.py"


@pytest.mark.xdist_group("installed")
@pytest.mark.parametrize("way", ["installed", "both keys", "copied", "handler_file"])
def test_the_handler_is_loaded_in_each_way(
    way: str, ca: DemoCA, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The recommended ways under gunicorn with threads, and no request fails while the file is being loaded.

    A file named by its path is loaded without a lock (by acme2certifier 0.45 and on, its own handlers too): with
    threads the first requests can fail. So handler_file gets its first request alone, as handler_module by path
    does in test_host.py.
    """
    option, pythonpath, loaded = loading(way, tmp_path, request)
    server = [HOST] if way == "handler_file" else GUNICORN
    with Host(tmp_path, {**option, **ca.options()}, pythonpath=pythonpath, server=server) as host:
        with ThreadPoolExecutor(1 if way == "handler_file" else 16) as pool:
            answers = list(pool.map(lambda _: host.get("/directory")[0], range(64)))
        assert set(answers) == {200}, host.log()
        ordered = host.certbot("certonly", "-d", "a.example.com")
        assert ordered.returncode == 0, ordered.stdout + host.log()
        assert f"({loaded})" in host.log("Loaded .*CA ?handler")
        check_chain(host.certbot_chain("a.example.com"), ca)


def test_certbot_waits_for_an_approval(ca: DemoCA, tmp_path: Path) -> None:
    """certbot asks again after retry_after_timeout seconds; acme2certifier's default, 600, is longer than it waits."""
    ca.hold = True
    ca.check_after = 1
    options = {**BY_PATH, **ca.options(), "cmp_total_timeout": "3", "cmp_msg_timeout": "3"}
    with Host(tmp_path, options, {"Order": {"retry_after_timeout": "2"}}) as host:
        with ThreadPoolExecutor(1) as pool:
            ordered = pool.submit(host.certbot, "certonly", "-d", "slow.example.com")
            wait_until(lambda: host.log(WAITS), "the note that the order waits", 60)
            assert not ordered.done()
            ca.approve("all")
            wait_until(lambda: "certificate issued" in host.tool("a2c-cert-poll").stdout, "the CA's answer", 60)
            result = ordered.result()
        assert result.returncode == 0, result.stdout + host.log()
        check_chain(host.certbot_chain("slow.example.com"), ca)
    assert [message.request for message in ca.messages].count("ir") == 1


def test_cron_line_keeps_what_the_poller_says(ca: DemoCA, tmp_path: Path) -> None:
    """`certificate issued` and the CA's refusals are in no other log: the page's line hands them to logger(1)."""
    (line,) = re.findall(r"^\* \* \* \* \* www-data (.+)$", PAGE.read_text(encoding="utf-8"), re.M)
    ca.hold = True
    ca.check_after = 1
    options = {**BY_PATH, **ca.options(), "cmp_total_timeout": "3", "cmp_msg_timeout": "3"}
    logger = tmp_path / "bin" / "logger"
    logger.parent.mkdir()
    logger.write_text(f'#!/bin/sh\n[ "$*" = "-t a2c-cert-poll" ] && exec cat >> {tmp_path}/syslog\n')
    logger.chmod(0o755)
    with Host(tmp_path, options, {"Order": {"retry_after_timeout": "2"}}) as host, ThreadPoolExecutor(1) as pool:
        ordered = pool.submit(host.certbot, "certonly", "-d", "slow.example.com")
        wait_until(lambda: host.log(WAITS), "the note that the order waits", 60)
        names = ("ACME_SRV_CONFIGFILE", "ACME2CERTIFIER_I_KNOW_THE_RISK", "PYTHONDONTWRITEBYTECODE")
        text = "".join(f"{name}='{host.environment[name]}'\n" for name in names)
        (tmp_path / "environment").write_text(text)
        line = line.replace("/opt/acme2certifier/venv/bin", str(PROGRAMS))
        line = line.replace("/etc/acme2certifier", str(tmp_path))
        ca.approve("all")

        def kept() -> str:
            path = f"{logger.parent}:/usr/bin:/bin"  # all that cron gives, and our logger
            done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, env={"PATH": path}, capture_output=True)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            return (tmp_path / "syslog").read_text()

        wait_until(lambda: "certificate issued" in kept(), "the CA's answer", 60)
        assert ordered.result().returncode == 0, host.log()
        assert not host.log("certificate issued")


# --- HTTPS in front -------------------------------------------------------------------------------------------------

# What a Debian's nginx.conf has around a site, with every file in a directory of the test's.
AROUND = """\
daemon off;
master_process off;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory};
    proxy_temp_path {directory};
    fastcgi_temp_path {directory};
    uwsgi_temp_path {directory};
    scgi_temp_path {directory};
{site}
}}
"""


def site_of_the_page(changes: Mapping[str, str]) -> str:
    """nginx's site as docs/deployment.md shows it: but for what `changes` names, each of which it has to hold."""
    (site,) = re.findall(r"^```nginx\n(.+?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    for old, new in changes.items():
        assert old in site, old
        site = site.replace(old, new)
    return str(site)


class Front:
    """nginx before a host, on a port of its own: a context manager."""

    def __init__(self, directory: Path, host: Host, ca: DemoCA, port: int, leave_out: str = "") -> None:
        directory.mkdir()
        self.port, self.log = port, directory / "log"
        self.root = directory / "root.pem"
        self.root.write_bytes((ca.directory / "root.pem").read_bytes())
        changes = {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "    listen [::]:443 ssl;\n": "",
            "/etc/nginx/acme.pem": f"{ca.directory}/tls.pem",
            "/etc/nginx/acme.key": f"{ca.directory}/tls.key",
            "http://127.0.0.1:8000": host.url,
            "acme.example.com": "localhost",
            **({leave_out: ""} if leave_out else {}),
        }
        (directory / "conf").write_text(AROUND.format(directory=directory, site=site_of_the_page(changes)))
        arguments = ["-e", "stderr", "-p", str(directory), "-c", str(directory / "conf")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([programs.find("nginx"), *arguments], stdout=log, stderr=log)

    def __enter__(self) -> Front:
        wait_until(lambda: listens(self.port) or self.process.poll() is not None, "the start of nginx")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def new_order(self) -> str:
        """The address for orders, from the directory."""
        trust = ssl.create_default_context(cafile=str(self.root))
        with urllib.request.urlopen(f"https://localhost:{self.port}/directory", context=trust, timeout=60) as answer:
            return str(json.load(answer)["newOrder"])


@needs("nginx")
def test_certbot_orders_with_https_in_front(ca: DemoCA, tmp_path: Path) -> None:
    """certbot orders through the site of the page; without its X-Forwarded-Proto clients are sent to http://."""
    port = free_port()
    named = {"DEFAULT": {"debug": "False", "server_name": f"localhost:{port}"}}
    with Host(tmp_path, {**BY_PATH, **ca.options()}, named) as host, Front(tmp_path / "nginx", host, ca, port) as front:
        assert front.new_order() == f"https://localhost:{port}/acme/neworders"
        host.url = f"https://localhost:{port}"
        host.environment["REQUESTS_CA_BUNDLE"] = str(front.root)
        ordered = host.certbot("certonly", "-d", "a.example.com")
        assert ordered.returncode == 0, ordered.stdout + host.log()
        check_chain(host.certbot_chain("a.example.com"), ca)


@needs("nginx")
@pytest.mark.parametrize(
    ("name", "left_out", "address"),
    [
        ("localhost:{}", "        proxy_set_header X-Forwarded-Proto https;\n", "http://localhost:{}/acme/neworders"),
        ("https://localhost:{}", "", "https://https://localhost:{}/acme/neworders"),
    ],
    ids=["no header", "scheme in server_name"],
)
def test_https_in_front_needs_both(name: str, left_out: str, address: str, ca: DemoCA, tmp_path: Path) -> None:
    """What the page says of the header and of server_name: without either, the directory's addresses are of no use."""
    port = free_port()
    named = {"DEFAULT": {"debug": "False", "server_name": name.format(port)}}
    section = {**BY_PATH, **ca.options()}
    with Host(tmp_path, section, named) as host, Front(tmp_path / "nginx", host, ca, port, left_out) as front:
        assert front.new_order() == address.format(port)


# --- A container ----------------------------------------------------------------------------------------------------

WWW_DATA = 33  # its number in Debian's and Ubuntu's images; it need not exist here


class Container:
    """The tree of acme2certifier's images up to 0.44, as their Dockerfile and docker-entrypoint.sh make it.

    There is no Docker here: the tree stands in a directory, its commands run in it. As root they run as the user of
    the image, without root as the user who runs the tests.
    """

    def __init__(self, root: Path, volume: Path) -> None:
        self.home, self.volume = root / "acme2certifier", volume
        package = self.home / "acme_srv"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "helper.py").write_text(LOAD_CONFIG)
        for name in ("acme_srv.cfg", "ca_handler.py"):
            (package / name).symlink_to(volume / name)
        if os.geteuid() == 0:
            for path in (self.home, *self.home.rglob("*"), volume, *volume.rglob("*")):
                os.chown(path, WWW_DATA, WWW_DATA, follow_symlinks=False)

    def run(
        self, *arguments: str, environment: Mapping[str, str] = NOTHING, as_root: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`docker exec -u www-data`: the handler's command line in the working directory of the image."""
        user = WWW_DATA if os.geteuid() == 0 and not as_root else None
        groups: list[int] | None = None if user is None else []
        command = [python_for_all(), "-B", "acme_srv/ca_handler.py", *arguments]
        path = {"PATH": os.environ["PATH"], "TMPDIR": str(self.volume), **environment}
        return subprocess.run(
            command,
            cwd=self.home,
            env=path,
            user=user,
            group=user,
            extra_groups=groups,
            capture_output=True,
            text=True,
        )


def python_for_all() -> str:
    """A Python that another user may run, too: that of the tests may lie in somebody's home."""
    for name in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        try:
            user = WWW_DATA if os.geteuid() == 0 else None
            subprocess.run([name, "-I", "-c", ""], check=True, capture_output=True, user=user)
        except (OSError, subprocess.CalledProcessError):
            continue
        return name
    raise AssertionError("another user can run neither the Python of the tests nor /usr/bin/python3")


@pytest.fixture
def var_www() -> Iterator[Path]:
    """A directory that every user may enter; the tests' own temporary directory belongs to one."""
    with tempfile.TemporaryDirectory(prefix="var-www-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_container_is_replaced_while_an_order_waits(ca: DemoCA, var_www: Path, tmp_path: Path) -> None:
    """Handler, configuration and cmp_tmp_dir are in the volume, the secret in the container's environment."""
    ca.hold = True
    ca.check_after = 1
    volume = var_www / "volume"
    volume.mkdir()
    shutil.copy(HANDLER, volume / "ca_handler.py")
    shutil.copy(ca.directory / "root.pem", volume / "root.pem")
    section = {**ca.options(), "cmp_openssl_bin": OPENSSL, "cmp_tmp_dir": str(volume / "cmp")}
    section.update({"cmp_trusted": str(volume / "root.pem"), "cmp_total_timeout": "3", "cmp_msg_timeout": "3"})
    secret = {"CMP_SECRET": section.pop("cmp_secret")}
    write_configuration(volume / "acme_srv.cfg", {"CAhandler": {**section, "cmp_secret_variable": "CMP_SECRET"}})
    (volume / "www.csr").write_text(csr_pem(["www.example.com"]))

    first = Container(var_www / "first", volume)
    without = first.run("check")
    assert without.returncode and "CMP_SECRET is not set" in without.stdout, without.stdout
    checked = first.run("check", "--connect", environment=secret)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    waiting = first.run("enroll", str(volume / "www.csr"), environment=secret)
    assert waiting.returncode == 3, waiting.stderr
    if os.geteuid() == 0:  # what happens to whoever forgets `-u www-data`
        as_root = first.run("check", environment=secret, as_root=True)
        assert as_root.returncode and "acme_srv.cfg belongs to another user: run this as www-data" in as_root.stderr, (
            as_root.stderr
        )
    shutil.rmtree(first.home)

    second = Container(var_www / "second", volume)
    ca.approve("all")
    polled = second.run("poll", waiting.stdout.strip(), environment=secret)
    assert polled.returncode == 0, polled.stderr
    assert len(bundle_certificates(polled.stdout)) == 3
    # kept for a day, in case the container ends before acme2certifier has stored the certificate
    assert os.listdir(volume / "cmp" / waiting.stdout.strip()) == ["issued"]
