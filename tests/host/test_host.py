"""In acme2certifier the handler serves real ACME clients: certbot and lego."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509 import ocsp

from conftest import OPENSSL, Handlers, as_host, csr_pem, needs, wait_until
from demo_ca import DemoCA
from host import HANDLER, ROOT, Host, write_configuration
from other_cas import JunkCA
from shared import BY_PATH, check_chain

pytestmark = pytest.mark.e2e


def revoked_serials(ca: DemoCA) -> list[int]:
    """The serial numbers in the CA's CRL."""
    return [entry.serial_number for entry in x509.load_pem_x509_crl((ca.directory / "ca.crl").read_bytes())]


def test_certbot_orders_renews_and_revokes(ca: DemoCA, tmp_path: Path) -> None:
    """certbot gets two names, another certificate, then a revocation: chain, log line and CRL are right."""
    with Host(tmp_path, {**BY_PATH, **ca.options()}) as host:
        ordered = host.certbot("certonly", "-d", "www.example.com", "-d", "example.com")
        assert ordered.returncode == 0, ordered.stdout + host.log()
        first = check_chain(host.certbot_chain("www.example.com"), ca)
        names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert sorted(names.get_values_for_type(x509.DNSName)) == ["example.com", "www.example.com"]
        (line,) = host.log("certificate issued").splitlines()
        assert f'subject="CN=www.example.com" serial={first.serial_number:x} ' in line
        issuer = 'issuer="C=DE, O=Demo, CN=Demo Issuing CA"'
        about = rf" {issuer} notAfter=\S+ chain=3 transaction=\w+ server=\S+ seconds=\d+\.\d\d$"
        assert re.search(about, line)

        renewed = host.certbot("renew", "--force-renewal", "--no-random-sleep-on-renew")
        assert renewed.returncode == 0, renewed.stdout + host.log()
        second = check_chain(host.certbot_chain("www.example.com"), ca)
        assert second.serial_number != first.serial_number

        options = ("--cert-name", "www.example.com", "--reason", "superseded", "--no-delete-after-revoke")
        revoked = host.certbot("revoke", *options)
        assert revoked.returncode == 0, revoked.stdout + host.log()
        assert revoked_serials(ca) == [second.serial_number]
        again = host.certbot("revoke", *options)
        assert (again.returncode, "the certificate is already revoked" in again.stdout) == (1, True), again.stdout
        assert "type=urn:ietf:params:acme:error:alreadyRevoked" in host.log("ACME problem code=400")
        assert ca.secret not in host.log()
    assert os.listdir(host.work) == []


@needs("lego")
def test_renewal_information_is_found_for_an_order_of_lego(make_ca: Callable[..., DemoCA], tmp_path: Path) -> None:
    """The host takes the second certificate of the bundle for the issuer, and finds ours again by it."""
    ca = make_ca(JunkCA)  # extraCerts that begin with anything but the issuer
    with Host(tmp_path, {**BY_PATH, **ca.options("certificate")}) as host:
        ordered = host.lego("shop.example.com")
        assert ordered.returncode == 0, ordered.stdout + host.log()
        leaf = check_chain(host.lego_chain("shop.example.com"), ca)
        issuer = x509.load_pem_x509_certificate((ca.directory / "sub.pem").read_bytes())

        key = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        assert key
        serial = leaf.serial_number.to_bytes(leaf.serial_number.bit_length() // 8 + 1, "big")
        by_request = ocsp.OCSPRequestBuilder().add_certificate(leaf, issuer, hashes.SHA256()).build()
        identifiers = [
            f"{base64url(key)}.{base64url(serial)}",  # RFC 9773, section 4.1
            base64url(by_request.public_bytes(serialization.Encoding.DER)),  # as its drafts had it, with the issuer
        ]
        for identifier in identifiers:
            status, document = host.get(f"/acme/renewal-info/{identifier}")
            assert (status, sorted(document)) == (200, ["suggestedWindow"]), host.log()


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@needs("lego")
def test_pending_order_is_finished_by_the_hosts_poller(ca: DemoCA, tmp_path: Path) -> None:
    """lego waits for its order, while a2c-cert-poll asks the CA."""
    ca.hold = True
    ca.check_after = 1
    with Host(tmp_path, {**BY_PATH, **ca.options(), "cmp_total_timeout": "3"}) as host:
        output = tmp_path / "lego.log"
        with output.open("wb") as log:
            command = host.lego_command("slow.example.com", "--cert.timeout", "100")
            client = subprocess.Popen(command, env=host.environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: host.log("CMP enrolment waits"), "the host's note that the order waits")
            assert host.tool("a2c-cert-poll").returncode == 0
            assert client.poll() is None, output.read_text() + host.log()
            assert len(os.listdir(host.work)) == 1
            ca.approve("all")
            polled = host.poll_until('certificate issued: subject="CN=slow.example.com"')
            assert "running " in polled and ca.secret not in polled  # the poller logs at DEBUG
            assert client.wait(60) == 0, output.read_text() + host.log() + polled
        finally:
            client.kill()
            client.wait()
        check_chain(host.lego_chain("slow.example.com"), ca)
    assert [message.request for message in ca.messages if message.request in ("ir", "certConf")] == ["ir", "certConf"]
    (transaction,) = host.work.iterdir()
    assert os.listdir(transaction) == ["issued"]  # for a day


@needs("lego")
def test_a_pending_order_that_the_ca_refuses_is_logged_once(ca: DemoCA, tmp_path: Path) -> None:
    """lego's order waits, and the CA refuses it: the poller logs the reason once, and nothing is left."""
    ca.hold = True
    ca.check_after = 1
    ca.status_text = "not this quarter"
    with Host(tmp_path, {**BY_PATH, **ca.options(), "cmp_total_timeout": "3"}) as host:
        assert host.lego("slow.example.com", "--cert.timeout", "1").returncode == 1  # lego does not wait this time
        ca.refuse("all")
        reason = "rejected the request: badRequest, 'not this quarter'"
        host.poll_until(f"Certificate poll failed: .* {reason}.*rejected=True")
        # The order is "invalid" now, so nobody asks for it again.
        assert "Certificate poll failed" not in host.tool("a2c-cert-poll").stdout
    assert os.listdir(host.work) == []


@needs("lego")
def test_a_rejected_order_has_its_reason_in_the_log(ca: DemoCA, tmp_path: Path) -> None:
    """A CA that refuses at once: lego gets serverInternal, and the log has the CA's reason."""
    ca.reject, ca.status_text = "badCertTemplate", "names under example.com only"
    with Host(tmp_path, {**BY_PATH, **ca.options()}) as host:
        ordered = host.lego("shop.example.org")
        assert ordered.returncode == 1
        assert "urn:ietf:params:acme:error:serverInternal" in ordered.stdout
        (line,) = host.log("CMP enrolment failed: class=refused").splitlines()
        reason = "rejected the request: badCertTemplate, 'names under example.com only' (the CA refuses the subject"
        assert f"CMP server {ca.server} {reason}" in line
    assert os.listdir(host.work) == []


def test_directory_is_refused_while_the_configuration_is_wrong(ca: DemoCA, tmp_path: Path) -> None:
    """handler_check() speaks to the administrator in the log; the client learns only that it is not its fault."""
    with Host(tmp_path, {**BY_PATH, **ca.options(), "cmp_trsted": "x", "cmp_cert": "missing.pem"}) as host:
        status, document = host.get("/directory")
        assert (status, document["detail"]) == (403, "error in ca_handler configuration")
        (line,) = host.log("failed handler_check").splitlines()
        assert "did you mean cmp_trusted?" in line and "cmp_cert: missing.pem is not a file" in line


@pytest.mark.parametrize(("works", "status"), [(True, 200), (False, 403)], ids=["good binary", "binary without cmp"])
def test_directory_costs_no_process_and_no_file(works: bool, status: int, ca: DemoCA, tmp_path: Path) -> None:
    """The host makes a new handler, and asks its handler_check(), at every GET of the directory, by anybody.

    The first asks the binary what it can do and what it says of the configuration; no later one starts a process.
    """
    program = tmp_path / "openssl"
    program.write_text(f'#!/bin/sh\nexec {OPENSSL} "$@"\n' if works else "#!/bin/sh\necho OpenSSL 1.1.1\n")
    program.chmod(0o755)
    host = Host(tmp_path, {**BY_PATH, **ca.options(), "cmp_openssl_bin": str(program)})
    result = host.tool("python", ROOT / "tests" / "host.py", "1000")
    assert result.returncode == 0, result.stdout
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["answers"] == [status]
    # What is no openssl cmp is asked once more each minute.
    assert set(report["started"]) == {1} if works else len(set(report["started"])) <= 2
    assert os.listdir(tmp_path / "tmp") == []
    assert not host.work.exists() or os.listdir(host.work) == []


def test_check_notices_another_binary(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """An upgrade under a running host: the file's time and size tell it from the one that was asked."""
    program = tmp_path / "openssl"
    program.write_text(f'#!/bin/sh\nexec {OPENSSL} "$@"\n')
    program.chmod(0o755)
    handler = handlers(ca.options(), openssl_bin=str(program))
    assert handler.handler_check() is None
    program.write_text("#!/bin/sh\necho OpenSSL 1.1.1\n")
    fault = handler.handler_check()
    assert fault and "has no cmp command" in fault and "\n" not in fault


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The host's own registry of CAs, filled from `sections`."""
    from acme2certifier.acme_srv.helpers import config
    from acme2certifier.acme_srv.helpers.cahandler_registry import CAHandlerRegistry

    def load(sections: dict[str, dict[str, str]]) -> Any:
        write_configuration(tmp_path / "acme_srv.cfg", sections)
        monkeypatch.setenv("ACME_SRV_CONFIGFILE", str(tmp_path / "acme_srv.cfg"))
        config.load_config_cache_clear()
        return CAHandlerRegistry(logging.getLogger("registry")).load()

    return load


@pytest.mark.parametrize("module", [str(HANDLER), "cmp_ca_handler"], ids=["a module each", "one module for all"])
def test_several_cas_at_once_keep_their_options_apart(
    module: str,
    make_ca: Callable[..., DemoCA],
    registry: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """[CAhandler:<name>] sections, used from many threads: no option of one ever reaches another."""
    caplog.set_level(logging.DEBUG, "several")
    cas = {
        "north": make_ca(ref="north", secret="the secret of the north"),
        "south": make_ca(ref="south", secret="the secret of the south"),
        "west": make_ca(),
    }
    own = {name: {**ca.options("certificate" if name == "west" else "secret")} for name, ca in cas.items()}
    own["north"]["cmp_days"] = "30"
    own["west"]["cmp_ignore_keyusage"] = "True"
    sections = {"CAhandler": {"multi_handler": "True", "default_handler": "north", "cmp_openssl_bin": OPENSSL}}
    for name, options in own.items():
        work = str(tmp_path / f"work-{name}")
        sections[f"CAhandler:{name}"] = {"handler_module": module, **options, "cmp_tmp_dir": work}
    loaded = registry(sections)

    def enrol(number: int) -> None:
        name = list(cas)[number % 3]
        csr = as_host(csr_pem([f"host{number}.{name}.example"]))
        with loaded.resolve(cahandler_name=name)(False, logging.getLogger("several")) as handler:
            assert handler.handler_check() is None
            error, bundle, certificate, _ = handler.enroll(csr)
            assert error is None and bundle
            # who revokes must be the one who has issued
            assert number > 5 or handler.revoke(certificate, "superseded", None) == (200, None, None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enrol, range(30)))
    commands = [record.getMessage() for record in caplog.records if record.getMessage().startswith("running ")]
    assert len(commands) == 36
    for name, ca in cas.items():
        issued = [x509.load_pem_x509_certificate(path.read_bytes()) for path in (ca.directory / "issued").iterdir()]
        assert len(issued) == 10
        assert all(f".{name}.example".encode() in certificate.tbs_certificate_bytes for certificate in issued)
        mine = [command for command in commands if f"-server {ca.server} " in command]
        assert len(mine) == 12
        wanted = {option for option in own[name] if option != "cmp_days"}
        for command in mine:
            flags = set(re.findall(r" -([a-z_]+)", command))
            enrols = "-cmd ir" in command
            assert {option[4:] for option in wanted} | ({"days"} if name == "north" and enrols else set()) <= flags
            foreign = {option for options in own.values() for option in options} - set(own[name])
            assert not {option[4:] for option in foreign} & flags
        assert os.listdir(tmp_path / f"work-{name}") == []
