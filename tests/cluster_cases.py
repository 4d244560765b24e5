"""acme2certifier on two hosts with one database and one cmp_tmp_dir: every order is sent once, gets one certificate.

`python3 tests --cluster` runs these; pytest does not collect the file by itself.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest
from cryptography import x509

import cluster
from cluster import LIMIT, Cluster, Machine, until

ORDERS, FEW = 50, 5
ALL = 10 * LIMIT  # on a machine with other work; alone it is two minutes


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The machines. The CA lets each request wait until it is approved, and for a second at least."""
    reason = cluster.hindrance()
    if reason:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("cluster"), ["--hold", "--check-after", "1"]) as running:
        yield running


class Pollers:
    """acme2certifier's poller on each host, again and again, as cron runs it, but without its minutes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.over = cluster, threading.Event()
        self.codes: dict[str, list[int]] = {machine.name: [] for machine in cluster.hosts}
        self.threads = [threading.Thread(target=self._poll, args=[machine]) for machine in cluster.hosts]

    def _poll(self, machine: Machine) -> None:
        while not self.over.is_set():
            self.codes[machine.name].append(self.cluster.poller(machine).wait())

    def __enter__(self) -> Pollers:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()


@contextlib.contextmanager
def waiting(hosts: Cluster, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """Clients whose orders all wait for the CA, and go on with them."""
    three = hosts.machines["three"]
    with hosts.clients(count) as clients:
        try:
            until(lambda: "waiting" in three.log("clients.log") or clients.poll() is not None, "the orders", ALL)
            assert clients.poll() is None, three.log("clients.log")
            yield clients
        finally:
            three.kill("tests/cluster.py")  # where a test has failed: nobody is to wait for what they wait for


def finish(hosts: Cluster, clients: subprocess.Popen[bytes]) -> None:
    """Wait until the clients have all their certificates."""
    until(lambda: clients.poll() is not None, "the last certificate", ALL)
    assert clients.returncode == 0, hosts.machines["three"].log("clients.log")


@pytest.fixture
def tell(hosts: Cluster, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print what the CA has counted so far."""

    def tell(what: str) -> None:
        counts = f"{hosts.asked('ir')} ir, {len(hosts.issued())} certificates, {hosts.asked('certConf')} certConf"
        with capsys.disabled():
            print(f"\n{what}: at the CA {counts}")

    return tell


def got(hosts: Cluster, count: int) -> list[str]:
    """The serial numbers of what the clients got, each for the key of its CSR."""
    serials, directory = [], hosts.machines["three"].directory / "got"
    for number in range(count):
        csr = x509.load_pem_x509_csr((directory / f"{number}.csr").read_bytes())
        leaf = x509.load_pem_x509_certificates((directory / f"{number}.pem").read_bytes())[0]
        assert leaf.public_key() == csr.public_key()
        serials.append(f"{leaf.serial_number:032X}")
    return sorted(serials)


def test_a_lock_excludes_between_hosts(hosts: Cluster) -> None:
    """Until its holder lets go of it, or is killed."""
    one, two = hosts.hosts
    lock = "/srv/orders/cmp/lock-of-a-test"
    one.run("touch", lock)
    taken = ["flock", "--nonblock", "--conflict-exit-code=75", lock]
    assert two.run(*taken, "echo", "mine") == "mine\n"
    one.start(*taken, "sleep", "1000", log="lock.log")
    until(lambda: len(one.pids("sleep 1000")) == 2, "the lock")  # flock starts `sleep` when it has the lock
    assert two.run(*taken, "echo", "mine", check=False) == ""
    assert one.kill("sleep 1000") >= 1
    until(lambda: two.run(*taken, "echo", "mine", check=False) == "mine\n", "the release of the lock")
    one.run("rm", lock)


def test_every_order_has_one_certificate(hosts: Cluster, tell: Callable[[str], None]) -> None:
    """50 orders, pollers on both hosts; one of them is killed while its openssl asks the CA, then a brick."""
    one, two = hosts.hosts
    with waiting(hosts, ORDERS) as clients:
        assert (hosts.asked("ir"), hosts.issued()) == (ORDERS, [])
        for machine in hosts.hosts:
            assert "/finalize" in machine.log("acme.log")
        assert f"approve: {ORDERS}" in hosts.ca("approve", "all")
        with Pollers(hosts) as pollers:
            until(lambda: len(hosts.issued()) > ORDERS // 5 and bool(two.pids("openssl cmp")), "an openssl on two", ALL)
            assert two.kill("a2c_cert_poll") == 1
            until(lambda: len(hosts.issued()) > ORDERS // 2, "half of the certificates", ALL)
            assert one.kill("glusterfsd") == 1
            finish(hosts, clients)
    hosts.restore()
    tell(f"{ORDERS} orders, a poller and a brick killed")
    assert pollers.codes["two"].count(-signal.SIGKILL) == 1
    # Counted at the CA: one request for each order, one certificate, and none that nobody has.
    assert hosts.asked("ir") == hosts.asked("certConf") == ORDERS
    assert sorted(hosts.issued()) == got(hosts, ORDERS)
    for machine in hosts.hosts:
        assert "certificate_add" in machine.log("poller.log")  # acme2certifier's, where it stores one
    assert one.run("find", "/srv/orders/cmp", "-type", "f", "!", "-name", "issued") == ""


def test_quorum_is_lost_and_comes_back(hosts: Cluster, tell: Callable[[str], None]) -> None:
    """With one brick of three nobody can read or write: orders stay as they are, and go on later."""
    _, two = hosts.hosts
    sent, issued = hosts.asked("ir"), hosts.issued()
    with waiting(hosts, FEW) as clients:
        hosts.ca("approve", "all")
        for name in ("one", "three"):
            assert hosts.machines[name].kill("glusterfsd") == 1
        until(lambda: not hosts.mounted(two), "the loss of quorum")
        assert hosts.poller(two).wait() == 0
        assert hosts.issued() == issued
        processing = "select count(*) from acme_srv_order o join acme_srv_status s on o.status_id = s.id"
        assert hosts.sql(f"{processing} where s.name = 'processing'") == [str(FEW)]
        hosts.restore()
        with Pollers(hosts):
            finish(hosts, clients)
    tell(f"{FEW} more, quorum lost in between")
    assert hosts.asked("ir") == sent + FEW
    assert sorted(hosts.issued()[len(issued) :]) == got(hosts, FEW)
