"""Every kind of enrolment ends with a certificate, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from conftest import Handlers, as_host, binaries, csr_pem, every_binary, wait_until
from demo_ca import DemoCA
from shared import ISSUERS, enrolled, recorder
from soak import children


def public_key(owner: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """SubjectPublicKeyInfo in DER."""
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return owner.public_key().public_bytes(encoding, form)


@every_binary
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_every_kind_of_access_is_enrolled(
    authentication: str, tls: bool, openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers
) -> None:
    """By secret or certificate, over http or https: leaf and issuers in order, both names, nothing left."""
    ca = make_ca(tls=tls)
    certificates = enrolled(
        handlers(ca.options(authentication), openssl_bin=openssl), as_host(csr_pem(["a.example", "b.example"]))
    )
    assert [c.subject.rfc4514_string() for c in certificates] == ["CN=a.example", *ISSUERS]
    for certificate, issuer in zip(certificates, certificates[1:]):
        certificate.verify_directly_issued_by(issuer)
    names = certificates[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example", "b.example"]
    assert [m.request for m in ca.messages] == ["ir", "certConf"]
    assert handlers.left() == []


@every_binary
def test_tls_without_a_client_certificate_is_no_warning(
    openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenSSL 3.5 and later warn of it at each run."""
    enrolled(handlers(make_ca(tls=True).options(), openssl_bin=openssl), as_host(csr_pem(["a.example"])))
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == []


def test_a_tls_server_that_is_not_trusted_gets_no_message(make_ca: Callable[..., DemoCA], handlers: Handlers) -> None:
    """A TLS server that cmp_tls_trusted does not cover: the error says so, and the CA gets no message."""
    ca = make_ca(tls=True)
    error = handlers(ca.options(), tls_trusted=str(ca.directory / "stranger.pem")).enroll(as_host(csr_pem(["a.b"])))[0]
    assert error and "certificate verify failed" in error and ca.server in error
    assert (ca.messages, handlers.left()) == ([], [])


@binaries
def test_a_fault_of_tls_in_a_configuration_file_has_its_hint(
    openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers, tmp_path: Path
) -> None:
    """The options of TLS stand in openssl's own file, and the server's certificate is not trusted: that is no CA that
    cannot be reached, and the hint names the entry.
    """
    ca = make_ca(tls=True)
    trust = ca.directory / "stranger.pem"
    (tmp_path / "cmp.cnf").write_text(f"[cmp]\nserver = https://{ca.server}\ntls_used = 1\ntls_trusted = {trust}\n")
    section = {key: value for key, value in ca.options().items() if "tls" not in key and key != "cmp_server"}
    handler = handlers(section, config=str(tmp_path / "cmp.cnf"), openssl_bin=openssl)
    error = str(handler.enroll(as_host(csr_pem(["a.example"])))[0])
    assert (handler.failure, ca.messages) == ("unauthentic", [])
    assert "certificate verify failed" in error and "(cmp_tls_trusted must hold the issuer" in error


FORMS: dict[str, Callable[[str], str]] = {
    "base64url": as_host,
    "base64url with padding": lambda pem: as_host(pem) + "=" * (-len(as_host(pem)) % 4),
    "base64 with line breaks": lambda pem: "\n".join(pem.splitlines()[1:-1]) + "\n",
    "PEM": str,
    "PEM with CRLF": lambda pem: pem.replace("\n", "\r\n"),
    "PEM, old label": lambda pem: pem.replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_csr_are_enrolled(form: str, ca: DemoCA, handlers: Handlers) -> None:
    """base64url, base64 or PEM, with other line ends or another label: the certificate has the CSR's key."""
    pem = csr_pem(["a.example"])
    certificate = enrolled(handlers(ca.options()), FORMS[form](pem))[0]
    assert public_key(certificate) == public_key(x509.load_pem_x509_csr(pem.encode()))


@pytest.mark.parametrize("command, exchanges", [("cr", ["cr", "certConf"]), ("p10cr", ["p10cr", "certConf"])])
@binaries
def test_other_request_types_are_sent_and_confirmed(
    openssl: str, command: str, exchanges: list[str], ca: DemoCA, handlers: Handlers
) -> None:
    """cmp_cmd `cr` or `p10cr`: this request and a certConf reach the CA, and the chain is whole."""
    handler = handlers(ca.options(), cmd=command, openssl_bin=openssl)
    assert len(enrolled(handler, csr_pem(["a.example"], "a.example"))) == 3
    assert [m.request for m in ca.messages] == exchanges


# As it stands in the user's document, but for the server's address.
DOCUMENT = {
    "cmp_openssl_bin": "acme_srv/cmp/WindowsCMPOpenSSL/openssl.exe",
    "cmp_tmp_dir": "acme_srv/cmp/tmp",
    "cmp_server": "192.168.14.137:8080",
    "cmp_path": "pkix/",
    "cmp_cert": "acme_srv/cmp/ra_cert.pem",
    "cmp_ref": "1234",
    "cmp_secret": "pass:xxx",
    "cmp_trusted": "acme_srv/cmp/capubs.pem",
    "cmp_recipient": "C=DE, CN=tst_sub_ca",
    "cmp_ignore_keyusage": "True",
}


def test_the_configuration_of_the_document_is_enrolled(
    make_ca: Callable[..., DemoCA], handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document's section, at another port: enrolled, and openssl gets the document's own command line."""
    monkeypatch.chdir(tmp_path)
    ca = make_ca(secret="xxx")
    recorder(tmp_path / DOCUMENT["cmp_openssl_bin"], tmp_path / "calls")
    for source, target in [("ra.pem", "cmp_cert"), ("root.pem", "cmp_trusted")]:
        Path(DOCUMENT[target]).write_bytes((ca.directory / source).read_bytes())
    handler = handlers({**DOCUMENT, "cmp_server": ca.server})
    assert len(enrolled(handler, csr_pem(["test-cert"], "test-cert"))) == 3
    assert os.listdir(DOCUMENT["cmp_tmp_dir"]) == []
    call = next(line for line in Path("calls").read_text().splitlines() if line.startswith("cmp -cmd"))
    # The document's own command line, in its order where the configuration has one.
    assert call.startswith(
        f"cmp -cmd ir -popo 0 -server {ca.server} -path pkix/ -cert acme_srv/cmp/ra_cert.pem -ref 1234 -secret env:"
    )
    assert " -trusted acme_srv/cmp/capubs.pem -recipient /C=DE/CN=tst_sub_ca -ignore_keyusage " in call
    for option in (f"-newkey {os.getcwd()}/acme_srv/cmp/tmp/", "-extracertsout", "-certout", "-subject /CN=test-cert"):
        assert f" {option}" in call


@pytest.mark.parametrize("outcome", ["issued", "refused"])
def test_nothing_is_left(
    outcome: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six orders, all issued or all refused: no descriptor, process or file of them stays."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    ca.reject = "" if outcome == "issued" else "badRequest"
    handler, csr = handlers(ca.options()), csr_pem(["a.example"])
    handler.enroll(csr)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert (handler.enroll(csr)[0] is None) == (outcome == "issued")
    # The CA lives in this process too: its side of the last connection may take a moment longer.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the closing of all descriptors")
    wait_until(lambda: not children(), "the end of all processes")
    assert (handlers.left(), os.listdir(temporary)) == ([], [])


def test_many_at_once_each_get_their_own_certificate(ca: DemoCA, handlers: Handlers) -> None:
    """Twenty orders in as many threads: each gets the certificate for its own name and key."""
    names = [f"host{i}.example" for i in range(20)]
    csrs = [csr_pem([name]) for name in names]
    enter = [handlers(ca.options(), total_timeout="60", msg_timeout="60") for _ in names]
    with ThreadPoolExecutor(len(names)) as pool:
        leaves = [bundle[0] for bundle in pool.map(enrolled, enter, csrs)]
    assert [leaf.subject.rfc4514_string() for leaf in leaves] == [f"CN={name}" for name in names]
    assert [public_key(leaf) for leaf in leaves] == [public_key(x509.load_pem_x509_csr(c.encode())) for c in csrs]
    assert len(ca.issued()) == len(names)
    assert handlers.left() == []


def test_a_certificate_is_logged_in_one_line(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """An order that is issued: one line with subject, serial number, issuer, chain and seconds."""
    caplog.set_level(logging.INFO)
    leaf = enrolled(handlers(ca.options()), csr_pem(["a.example"]))[0]
    messages = [r.getMessage() for r in caplog.records if r.name == "test" and r.levelno == logging.INFO]
    (line,) = [message for message in messages if "issued" in message]
    for word in (
        'subject="CN=a.example"',
        f"serial={leaf.serial_number:x}",
        'issuer="C=DE, O=Demo, CN=Demo Issuing CA"',
        "chain=3",
    ):
        assert word in line
    assert re.search(r"seconds=\d+\.\d", line)
