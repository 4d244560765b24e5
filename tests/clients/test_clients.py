"""Every ACME client of the package registries gets, renews and revokes certificates, and everybody can read them.

`python3 tests --clients` runs these, and prints a table. The certificates are read by OpenSSL, Go, Java and Python,
with only the CA's root trusted.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store

from clients.acme_clients import CLIENTS, PATIENCE, AcmeTiny, Client, Entry, is_address
from clients.fetch import place
from conftest import OPENSSL, bundle_certificates, wait_until
from demo_ca import DemoCA
from host import GUNICORN, ROOT, Host

pytestmark = pytest.mark.e2e
Done = Callable[[str, str], None]
Make = Callable[..., Client]
# acme2certifier tells clients to come back after so many seconds; its default, 600, is longer than most wait.
SOON = {"Order": {"retry_after_timeout": "2"}}
each = pytest.mark.parametrize("name", CLIENTS)


@pytest.fixture
def make(ca: DemoCA, tmp_path: Path) -> Iterator[Make]:
    """`make("lego, Debian 12")` is that client, with an acme2certifier of its own."""
    with contextlib.ExitStack() as stack:

        def client(name: str, **options: str) -> Client:
            entry: Entry = CLIENTS[name]
            if entry.missing():
                pytest.skip(f"{name}: {entry.missing()}")
            server: dict[str, Any] = {}
            if entry.kind.tls:
                certificate = [f"--certfile={ca.directory}/tls.pem", f"--keyfile={ca.directory}/tls.key"]
                # One process: several make acme2certifier's database at once, and fail.
                server = {"server": [*GUNICORN, "--workers=1", *certificate]}
            section = {"handler_module": "cmp_ca_handler", **ca.options(), **options}
            host = stack.enter_context(Host(tmp_path, section, SOON, pythonpath=ROOT, **server))
            return stack.enter_context(entry.of(host))

        yield client


def read(chain: Path, names: list[str], ca: DemoCA) -> x509.Certificate:
    """The leaf of a chain that OpenSSL, Go, Java and Python have read, with these names, trusting only the root."""
    root = ca.directory / "root.pem"
    hosts = [name.replace("*", "any") for name in names]
    for host in hosts:
        option = "-verify_ip" if is_address(host) else "-verify_hostname"
        said(OPENSSL, "verify", "-CAfile", root, "-untrusted", chain, option, host, chain)
    go = place("go") / "read"
    if go.exists():
        said(go, root, chain, *hosts)
    java = said("keytool", "-printcert", "-file", chain)
    for name in names:
        assert name in java.lower() or ":" in name, java
    leaf, *issuers = bundle_certificates(chain.read_text())
    builder = PolicyBuilder().store(Store(bundle_certificates(root.read_text())))
    for host in hosts:
        subject = x509.IPAddress(ip_address(host)) if is_address(host) else x509.DNSName(host)
        builder.build_server_verifier(subject).verify(leaf, issuers)
    return leaf


def said(*command: str | Path) -> str:
    """What a reader says; it must be content."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
    return done.stdout


def seconds(since: float) -> str:
    return f"{time.monotonic() - since:.0f} s"


@each
def test_each_client_orders_renews_and_revokes_as_it_can(
    name: str, make: Make, ca: DemoCA, record_property: Done
) -> None:
    """Several names, with each kind of key; renewed, and what came last revoked."""
    client = make(name)
    record_property("client", name)
    record_property("version", client.version())
    names = ["www.example.com", "example.com"]
    names += ["*.wild.example.com"] if client.wildcards else []
    names += ["192.0.2.1", "2001:db8::1"] if client.addresses else []
    began = time.monotonic()
    for key in client.keys:
        chains = client.order(names, key)
        for chain, own in zip(chains, [[each] for each in names] if client.separate else [names] * len(chains)):
            leaf = read(chain, own, ca)
    record_property("names", "one each" if client.separate else ", ".join(kinds(names)))
    record_property("order", f"{', '.join(client.keys).upper()}: {seconds(began)}")
    if client.renews:
        began = time.monotonic()
        chain = client.renew(names, client.keys[-1])
        renewed = read(chain, names, ca)
        assert renewed.serial_number != leaf.serial_number
        record_property("renew", seconds(began))
    if client.revokes:
        began = time.monotonic()
        client.revoke(chain)
        (entry,) = x509.load_pem_x509_crl((ca.directory / "ca.crl").read_bytes())
        assert entry.serial_number == renewed.serial_number
        if client.reason:
            reason = entry.extensions.get_extension_for_class(x509.CRLReason).value.reason
            assert reason is x509.ReasonFlags.superseded
        record_property("revoke", f"{'superseded' if client.reason else 'no reason'}: {seconds(began)}")


def kinds(names: list[str]) -> list[str]:
    """What kinds of names there are, in words."""
    found = ["several"]
    found += ["wildcard"] if any("*" in name for name in names) else []
    return found + (["IPv4, IPv6"] if any(map(is_address, names)) else [])


def test_an_address_without_a_name_is_issued(make: Make, ca: DemoCA) -> None:
    """No DNS name can be the subject's CN: without any, the subjectAltName is critical, and Java reads it then only."""
    (chain,) = make("Python's acme").order(["192.0.2.1"], "ec")
    read(chain, ["192.0.2.1"], ca)


def test_a_name_that_is_too_long_for_a_cn_leaves_the_subject_empty(make: Make, ca: DemoCA) -> None:
    """A CN has 64 characters at most."""
    name = f"{'a' * 60}.example.com"
    (chain,) = make("Python's acme").order([name], "ec")
    assert not read(chain, [name], ca).subject.rdns


@pytest.mark.parametrize("name", [name for name, entry in CLIENTS.items() if entry.kind is AcmeTiny])
def test_a_name_in_the_cn_only_becomes_a_subjectaltname(name: str, make: Make, ca: DemoCA) -> None:
    """A CSR without subjectAltName, as acme-tiny takes it: the certificate has the name where it is looked for."""
    client = make(name)
    assert isinstance(client, AcmeTiny)
    csr, chain = client.csr("/CN=only.example.com", "ec"), client.directory / "chain.pem"
    read(client.sign(csr, chain), ["only.example.com"], ca)


@each
def test_an_order_that_waits_is_issued_to_the_client(name: str, make: Make, ca: DemoCA, record_property: Done) -> None:
    """The CA wants an approval, acme2certifier's poller gets the certificate, the client has waited for it."""
    ca.hold = True
    ca.check_after = 1
    client = make(name, cmp_total_timeout="3", cmp_msg_timeout="3")
    record_property("client", name)
    began = time.monotonic()
    host = client.host
    names = ["slow.example.com"]
    with ThreadPoolExecutor(1) as pool:
        ordered = pool.submit(client.order, names, client.keys[0])
        wait_until(lambda: host.log("'status': 'processing'") or ordered.done(), "an order in process", PATIENCE)
        assert not ordered.done(), ordered.result()
        while not ordered.done():
            ca.approve("all")
            assert host.tool("a2c-cert-poll").returncode == 0
            time.sleep(0.5)
        chain = ordered.result()[0]
    read(chain, names, ca)
    record_property("wait", seconds(began))
