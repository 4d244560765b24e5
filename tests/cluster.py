"""Three machines on one: what `python3 tests --cluster` runs on, and what it needs.

Each machine is a process in namespaces of its own (network, mounts, processes), with all that it runs. A bridge in a
fourth one joins them. Nothing of it is seen outside, and all of it ends with the test.

    one     acme2certifier, its poller, a brick of the GlusterFS volume
    two     the same
    three   PostgreSQL, nginx before both acme2certifier, the CA, the volume's arbiter

Each process finds its machine's files in /srv: `own` (nobody else's), `orders` (GlusterFS, where cmp_tmp_dir is),
`repo` and `venv` (this tree, and the Python with acme2certifier). Run as a program, this file is the CA.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Callable

import programs
from openssl_versions import CACHE, Missing, locked, run

ROOT = Path(__file__).resolve().parent.parent
CASES = Path(__file__).resolve().parent / "cluster_cases.py"  # a name that pytest does not collect by itself

POSTGRES = "/usr/lib/postgresql/*/bin/initdb"
PROGRAMS = {
    "glusterd": "glusterfs-server",
    "glusterfs": "glusterfs-client",
    POSTGRES: "postgresql",
    "nginx": "nginx-light",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
PACKAGES = ["acme2certifier[django]>=0.45", "psycopg2-binary>=2.9", "gunicorn>=23"]
MADE_FROM = f"{PACKAGES} {sys.base_prefix} {sys.version}"
VENV = CACHE.parent / f"cluster-{sys.version_info.major}.{sys.version_info.minor}"

PYTHON = "/srv/venv/bin/python"  # there
USER = 33  # of acme2certifier and PostgreSQL, on each machine: Debian's www-data
ADDRESSES = {"one": "10.77.0.1", "two": "10.77.0.2", "three": "10.77.0.3"}
URL = f"http://{ADDRESSES['three']}"
CLIENTS = 5
LIMIT = 60  # seconds in which something has to come about


# The first process of a machine: it waits for those whose parents have ended, as init does.
INIT = """
import os, time
while True:
    try:
        os.wait()
    except ChildProcessError:
        time.sleep(0.1)
"""

NGINX = """\
daemon off;
pid /srv/own/nginx.pid;
error_log /srv/own/nginx-error.log;
events {}
http {
    access_log off;
    client_body_temp_path /srv/own/body;
    proxy_temp_path /srv/own/proxy;
    fastcgi_temp_path /srv/own/fastcgi;
    uwsgi_temp_path /srv/own/uwsgi;
    scgi_temp_path /srv/own/scgi;
    proxy_set_header Host $http_host;
    proxy_read_timeout 120s;
    upstream acme { server 10.77.0.1:8000; server 10.77.0.2:8000; }
    server { listen 10.77.0.3:80; location / { proxy_pass http://acme; } }
    server { listen 10.77.0.3:8080; location / { proxy_pass http://127.0.0.1:8080; } }
}
"""

ACME = """\
[DEFAULT]
debug: False

[DBhandler]
handler: django

[Challenge]
challenge_validation_disable: True

[Certificate]
enrollment_timeout: 60

[Order]
retry_after_timeout: 1

[CAhandler]
handler_module: cmp_ca_handler
cmp_tmp_dir: /srv/orders/cmp
cmp_openssl_bin: openssl
cmp_server: 10.77.0.3:8080
cmp_path: pkix/
cmp_recipient: C=DE, O=Demo, CN=Demo Issuing CA
cmp_expect_sender: C=DE, O=Demo, CN=Demo Issuing CA
cmp_ref: 1234
cmp_secret: demo-secret
cmp_trusted: /srv/own/trusted.pem
cmp_msg_timeout: 15
cmp_total_timeout: 15
"""


def missing() -> dict[str, str]:
    """What this machine has not got: program -> Debian package."""
    return {name: package for name, package in PROGRAMS.items() if not programs.find(name)}


def plans() -> list[str]:
    """What is made first, in words."""
    return [] if made() else ["fetches acme2certifier, Django and psycopg2 from PyPI into .cache, 140 MB, once"]


def made() -> bool:
    """Whether the virtual environment is there, from this list."""
    stamp = VENV / "made-from"
    return stamp.exists() and stamp.read_text(encoding="utf-8") == MADE_FROM


def make() -> None:
    """Make the virtual environment. Raises Missing."""
    VENV.parent.mkdir(parents=True, exist_ok=True)
    with locked(CACHE.parent / "cluster.lock"):
        if not made():
            run([sys.executable, "-m", "venv", "--clear", str(VENV)])
            run([str(VENV / "bin" / "python"), "-I", "-m", "pip", "install", "--quiet", "--no-input", *PACKAGES])
            (VENV / "made-from").write_text(MADE_FROM, encoding="utf-8")


def hindrance() -> str:
    """Why no machines can be made here, or nothing."""
    if os.geteuid() != 0:
        return "only root may make namespaces, and mount"
    try:
        run(["unshare", "--net", "--mount", "--pid", "--fork", "true"])
    except Missing as error:
        return f"no namespaces: {error}"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"no FUSE: /dev/fuse: {error.strerror}"
    return ""


def until(condition: Callable[[], bool], what: str, seconds: float = LIMIT) -> None:
    """Wait for a condition. Raises AssertionError if it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} seconds"
        time.sleep(0.1)


class Machine:
    """A host of the cluster."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.address = name, ADDRESSES.get(name, "")
        self.directory = directory / name
        self.directory.mkdir()
        self.started: list[subprocess.Popen[bytes]] = []
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", INIT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        until(lambda: bool(children.read_text().split()), "the first process of a machine")
        self.pid = int(children.read_text())
        # --mount-proc comes last, so all the namespaces are there.
        own_proc = f"/proc/{self.pid}/ns/mnt"
        until(lambda: os.readlink(own_proc) != os.readlink("/proc/self/ns/mnt"), "its mounts")
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *words: str, user: int = 0) -> list[str]:
        """The command line that runs this on the machine."""
        who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--wd=/", *who, *words]

    def run(self, *words: str, user: int = 0, environment: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Run a program to its end: what it prints. AssertionError where it fails."""
        done = subprocess.run(
            self.command(*words, user=user),
            env={**os.environ, "PATH": programs.PLACES, "LC_ALL": "C", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=2 * LIMIT,
        )
        assert not check or done.returncode == 0, f"{self.name}: {' '.join(words)}: {done.stdout}"
        return done.stdout

    def start(
        self, *words: str, log: str, user: int = 0, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program. It ends with the machine."""
        with (self.directory / log).open("ab") as file:
            process = subprocess.Popen(
                self.command(*words, user=user),
                env={**os.environ, "PATH": programs.PLACES, "LC_ALL": "C", **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self.started.append(process)
        return process

    def log(self, name: str) -> str:
        """What one of its programs has printed so far."""
        return (self.directory / name).read_text(encoding="utf-8", errors="replace")

    def pids(self, *words: str) -> list[int]:
        """Its processes with all these words in their command lines, as they are numbered outside."""
        found, own = [], os.readlink(f"/proc/{self.pid}/ns/pid")
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if all(word in line for word in words) and os.readlink(path / "ns" / "pid") == own:
                    found.append(int(path.name))
        return found

    def kill(self, *words: str) -> int:
        """kill -9 what has these words in its command line: how many processes that were."""
        pids = self.pids(*words)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def bind(self, source: Path | str, target: str) -> None:
        """Show a directory at another place too, on this machine alone."""
        self.run("mkdir", "-p", target)
        self.run("mount", "--bind", str(source), target)

    def end(self) -> None:
        """kill -9 the machine: all its processes, and with them its mounts and its network."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for process in [*self.started, self.process]:
            process.wait()


class Cluster:
    """The three machines, with all that runs on them but the pollers."""

    def __init__(self, directory: Path, ca_options: Sequence[str] = ()) -> None:
        self.directory, self.ca_options = directory, ca_options
        self.machines: dict[str, Machine] = {}
        self.switch: Machine | None = None
        self.environment = {
            "ACME_SRV_CONFIGFILE": "/srv/own/acme_srv.cfg",
            "ACME2CERTIFIER_I_KNOW_THE_RISK": "1",  # for challenge_validation_disable
            "ACME2CERTIFIER_BASE_DIR": "/srv/own",
            "ACME2CERTIFIER_SECRET_KEY": "a secret of Django's, for a test alone, and long enough for it",
            "ACME2CERTIFIER_ALLOWED_HOSTS": ADDRESSES["three"],
            "ACME2CERTIFIER_DATABASE_URL": f"postgres://acme@{ADDRESSES['three']}/acme",
            "PYTHONPATH": "/srv/repo",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore",
            "HOME": "/srv/own",
            "TMPDIR": "/srv/own/tmp",
        }

    def __enter__(self) -> Cluster:
        try:
            self._network()
            for machine in self.machines.values():
                self._files(machine)
            self._volume()
            self._database()
            self._ca()
            self._acme()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for machine in [*self.machines.values(), *filter(None, [self.switch])]:
            machine.end()

    @property
    def hosts(self) -> list[Machine]:
        """Those with acme2certifier."""
        return [self.machines["one"], self.machines["two"]]

    def _network(self) -> None:
        """A switch, and a cable from each machine to it."""
        self.switch = switch = Machine("switch", self.directory)
        switch.run("ip", "link", "add", "lan", "type", "bridge")
        switch.run("ip", "link", "set", "lan", "up")
        for name, address in ADDRESSES.items():
            machine = self.machines[name] = Machine(name, self.directory)
            plug = ["type", "veth", "peer", "name", name, "netns", str(switch.pid)]
            # From inside, for the machine that this runs on has to know nothing of it.
            subprocess.run(["ip", "link", "add", "lan", "netns", str(machine.pid), *plug], check=True)
            machine.run("ip", "address", "add", f"{address}/24", "dev", "lan")
            machine.run("ip", "link", "set", "lan", "up")
            switch.run("ip", "link", "set", name, "master", "lan", "up")

    def _files(self, machine: Machine) -> None:
        """What it sees in /srv, and directories of its own where GlusterFS has its state."""
        for name in ("tmp", "glusterd", "gluster-log", "brick"):
            (machine.directory / name).mkdir()
        machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "none", "/srv")
        machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "none", "/run")
        machine.bind(machine.directory, "/srv/own")
        machine.bind(ROOT, "/srv/repo")
        machine.bind(VENV, "/srv/venv")
        machine.bind(machine.directory / "glusterd", "/var/lib/glusterd")
        machine.bind(machine.directory / "gluster-log", "/var/log/glusterfs")
        machine.run("mkdir", "/srv/orders", "/run/gluster")
        closed = [path for path in Path(sys.base_prefix).parents if not path.stat().st_mode & 0o001]
        if closed:  # a Python of root's own: on this machine everybody sees it, and nothing else of what is there
            machine.bind(sys.base_prefix, "/srv/python")
            machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "none", str(closed[-1]))
            machine.bind("/srv/python", sys.base_prefix)
        machine.run("chown", f"{USER}:{USER}", "/srv/own", "/srv/own/tmp")

    def _volume(self) -> None:
        """A volume of GlusterFS on all three: two hold everything, the third the names alone."""
        one = self.machines["one"]
        for machine in self.machines.values():
            machine.start("glusterd", "-N", "-L", "WARNING", log="glusterd.log")
        for machine in self.machines.values():
            until(functools.partial(self._glusterd_answers, machine), "glusterd")
        for name in ("two", "three"):
            one.run("gluster", "peer", "probe", ADDRESSES[name])
        until(lambda: one.run("gluster", "peer", "status").count("Peer in Cluster (Connected)") == 2, "the peers")
        bricks = [f"{address}:/srv/own/brick" for address in ADDRESSES.values()]
        one.run(
            "gluster", "--mode=script", "volume", "create", "orders", "replica", "3", "arbiter", "1", *bricks, "force"
        )
        one.run("gluster", "--mode=script", "volume", "start", "orders")
        for machine in self.hosts:
            machine.run("mount", "-t", "glusterfs", f"{machine.address}:/orders", "/srv/orders")
        one.run("install", "-d", "-o", str(USER), "-g", str(USER), "-m", "0700", "/srv/orders/cmp")

    def _glusterd_answers(self, machine: Machine) -> bool:
        return "Number of Peers" in machine.run("gluster", "peer", "status", check=False)

    def mounted(self, machine: Machine) -> bool:
        """Whether cmp_tmp_dir is to be had there."""
        return "directory" in machine.run("stat", "--format=%F", "/srv/orders/cmp", check=False)

    def restore(self) -> None:
        """Start the bricks that were killed, and wait until they hold what they have missed."""
        one = self.machines["one"]
        one.run("gluster", "--mode=script", "volume", "start", "orders", "force")

        def whole() -> bool:
            told = one.run("gluster", "volume", "heal", "orders", "info", check=False)
            counts = [told.count(words) for words in ("Status: Connected", "Number of entries: 0\n")]
            return counts == [len(self.machines)] * 2

        until(whole, "the bricks' return")
        for machine in self.hosts:
            until(functools.partial(self.mounted, machine), "the volume")

    def _database(self) -> None:
        """PostgreSQL, with an empty database that acme2certifier then fills."""
        three = self.machines["three"]
        programs_of = str(Path(programs.find(POSTGRES)).parent)
        data = "/srv/own/postgres"
        three.run(f"{programs_of}/initdb", "-D", data, "-U", "acme", "-A", "trust", "--no-sync", user=USER)
        access = three.directory / "postgres" / "pg_hba.conf"
        access.write_text("local all all trust\nhost all all 10.77.0.0/24 trust\n", encoding="utf-8")
        options = [f"listen_addresses={three.address}", "unix_socket_directories=/srv/own/tmp", "max_connections=100"]
        words = [word for option in options for word in ("-c", option)]
        three.start(f"{programs_of}/postgres", "-D", data, *words, log="postgres.log", user=USER)
        psql = [f"{programs_of}/psql", "-h", three.address, "-U", "acme"]
        until(lambda: "ready to accept connections" in three.log("postgres.log"), "PostgreSQL")
        three.run(*psql, "-d", "postgres", "-c", "create database acme")

    def sql(self, statement: str) -> list[str]:
        """Ask the database: its lines."""
        psql = str(Path(programs.find(POSTGRES)).parent / "psql")
        three = self.machines["three"]
        return three.run(psql, "-h", three.address, "-U", "acme", "-At", "-c", statement).splitlines()

    def _ca(self) -> None:
        """The CA, at port 8080 of the third machine."""
        three = self.machines["three"]
        (three.directory / "nginx.conf").write_text(NGINX, encoding="utf-8")
        three.start("nginx", "-c", "/srv/own/nginx.conf", log="nginx.log")
        demo = [PYTHON, "/srv/repo/examples/demo_ca.py", "/srv/own/ca", "--port", "8080", *self.ca_options]
        three.start(*demo, log="ca.log")
        until(lambda: "# To authenticate by certificate" in three.log("ca.log"), "the CA")

    def _acme(self) -> None:
        """acme2certifier on both hosts."""
        trusted = (self.machines["three"].directory / "ca" / "trusted.pem").read_bytes()
        for machine in self.hosts:
            (machine.directory / "acme_srv.cfg").write_text(ACME, encoding="utf-8")
            (machine.directory / "trusted.pem").write_bytes(trusted)
        web = ["--workers=2", "--threads=4", "--timeout=120"]
        schema = ["-m", "acme2certifier.tools.a2c_schema_update"]
        self.hosts[0].run(PYTHON, *schema, environment=self.environment)
        for machine in self.hosts:
            bind = f"--bind={machine.address}:8000"
            application = "acme2certifier.django_project.wsgi:application"
            command = [PYTHON, "-m", "gunicorn", *web, bind, application]
            machine.start(*command, log="acme.log", user=USER, environment=self.environment)
        until(lambda: all("Booting worker" in machine.log("acme.log") for machine in self.hosts), "acme2certifier")

    def clients(self, count: int) -> subprocess.Popen[bytes]:
        """Start ACME clients with so many orders, on the third machine. What they get is in `got` there."""
        three = self.machines["three"]
        shutil.rmtree(three.directory / "got", ignore_errors=True)
        (three.directory / "got").mkdir()
        (three.directory / "clients.log").unlink(missing_ok=True)
        command = [PYTHON, "/srv/repo/tests/cluster.py", str(count), "/srv/own/got"]
        return three.start(*command, log="clients.log")

    def ca(self, *words: str) -> str:
        """What `demo_ca.py` says to this."""
        return self.machines["three"].run(PYTHON, "/srv/repo/examples/demo_ca.py", "/srv/own/ca", *words)

    def asked(self, request: str) -> int:
        """How many requests of this kind the CA has answered."""
        return len(re.findall(rf"^\w+ {request} -> ", self.machines["three"].log("ca.log"), re.M))

    def issued(self) -> list[str]:
        """The serial numbers of the certificates that the CA has issued, oldest first."""
        return re.findall(r"-> \w+: issued (\w+) ", self.machines["three"].log("ca.log"))

    def poller(self, machine: Machine) -> subprocess.Popen[bytes]:
        """Run acme2certifier's poller once."""
        command = [PYTHON, "-m", "acme2certifier.tools.a2c_cert_poll"]
        return machine.start(*command, log="poller.log", user=USER, environment=self.environment)


def order(count: int, directory: Path) -> None:
    """An ACME client for many orders: says `waiting` when all are placed, and then gets their certificates."""
    from acme import client, messages
    from acme.crypto_util import make_csr
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from josepy.jwk import JWKRSA

    def csr(name: str) -> bytes:
        pkcs8, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key = ec.generate_private_key(ec.SECP256R1())
        return make_csr(key.private_bytes(serialization.Encoding.PEM, pkcs8, secret), [name])

    deadline = datetime.datetime.now() + datetime.timedelta(seconds=10 * LIMIT)
    barrier = threading.Barrier(CLIENTS)

    def one(first: int) -> None:
        key = JWKRSA(key=rsa.generate_private_key(65537, 2048))
        network = client.ClientNetwork(key, user_agent="tests")
        acme = client.ClientV2(client.ClientV2.get_directory(f"{URL}/directory", network), network)
        acme.new_account(messages.NewRegistration.from_data(email="a@example.com", terms_of_service_agreed=True))
        placed = {}
        for number in range(first, count, CLIENTS):
            wanted = acme.new_order(csr(f"n{number}.example"))
            for authorization in wanted.authorizations:
                challenge = next(c for c in authorization.body.challenges if c.chall.typ == "http-01")
                acme.answer_challenge(challenge, challenge.response(key))
            placed[number] = acme.begin_finalization(acme.poll_authorizations(wanted, deadline))
        if barrier.wait() == 0:
            print("waiting", flush=True)
        for number, waiting in placed.items():
            chain = acme.poll_finalization(waiting, deadline).fullchain_pem
            (directory / f"{number}.csr").write_bytes(waiting.csr_pem)
            (directory / f"{number}.pem").write_text(chain)

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(one, range(CLIENTS)))


if __name__ == "__main__":
    order(int(sys.argv[1]), Path(sys.argv[2]))
