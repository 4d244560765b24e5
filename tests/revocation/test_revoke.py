"""A certificate is revoked with the reason of ACME, and the host is told what the CA says."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import demo_ca
from conftest import BINARIES, OPENSSL, Handlers, Mock, Pair, as_host, binaries, csr_pem, nobody_at
from demo_ca import DemoCA, read_der
from other_cas import ModifyingCA
from proxy import Forward, Proxy, error_body, integer, poll_rep, protected
from shared import version

ACME = "urn:ietf:params:acme:error:"
# RFC 5280, 5.3.1. Of these the demo CA refuses 8 (nothing is on hold) and can say 9 and 10 only as "unspecified".
REASONS = {
    "unspecified": 0,
    "keyCompromise": 1,
    "cACompromise": 2,
    "affiliationChanged": 3,
    "superseded": 4,
    "cessationOfOperation": 5,
    "certificateHold": 6,
    "removeFromCRL": 8,
    "privilegeWithdrawn": 9,
    "aACompromise": 10,
}


def enrolled(handler: Any, name: str = "revoke.example") -> str:
    """A new certificate, as the host keeps it: DER in base64."""
    error, _, certificate, _ = handler.enroll(as_host(csr_pem([name])))
    assert error is None
    assert isinstance(certificate, str)
    return certificate


def crl_entry(ca: DemoCA, certificate: str) -> x509.RevokedCertificate | None:
    """The entry for a certificate in the CA's CRL, whose signature is the CA's."""
    crl = x509.load_pem_x509_crl((ca.directory / "ca.crl").read_bytes())
    issuer = x509.load_pem_x509_certificate((ca.directory / "sub.pem").read_bytes())
    assert crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]
    serial = x509.load_der_x509_certificate(base64.b64decode(certificate)).serial_number
    return crl.get_revoked_certificate_by_serial_number(serial)


class Noting:
    """A program that notes its arguments and becomes openssl."""

    def __init__(self, directory: Path, openssl: str) -> None:
        self.program = directory / "noting-openssl"
        self.notes = directory / "notes"
        self.program.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$@\" end-of-call >>'{self.notes}'\nexec '{openssl}' \"$@\"\n"
        )
        self.program.chmod(0o755)

    def revocations(self) -> list[list[str]]:
        """The arguments of each revocation so far."""
        calls = [call.splitlines() for call in self.notes.read_text().split("end-of-call\n")]
        return [arguments for arguments in calls if "rr" in arguments]


@binaries
@pytest.mark.parametrize("kind", ["secret", "certificate", "tls"])
def test_a_certificate_is_revoked_once(
    openssl: str, kind: str, make_ca: Callable[..., DemoCA], handlers: Handlers
) -> None:
    """The CRL has the certificate with its reason, and no other; a second time it is alreadyRevoked."""
    ca = make_ca(tls=kind == "tls")
    handler = handlers(ca.options("certificate" if kind == "certificate" else "secret"), openssl_bin=openssl)
    certificate, other = enrolled(handler), enrolled(handler, "other.example")
    assert crl_entry(ca, certificate) is None

    assert handler.revoke(certificate, "keyCompromise", "20260101000000Z") == (200, None, None)
    entry = crl_entry(ca, certificate)
    assert entry is not None
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason is x509.ReasonFlags.key_compromise
    assert crl_entry(ca, other) is None

    code, message, detail = handler.revoke(certificate, "superseded", None)
    assert (code, message) == (400, ACME + "alreadyRevoked")
    assert "the certificate is already revoked" in str(detail)
    assert [(m.request, m.response) for m in ca.messages if m.request == "rr"] == [("rr", "rp")] * 2
    assert handlers.left() == []


@pytest.mark.parametrize(("name", "number"), REASONS.items())
def test_every_reason_reaches_the_ca(
    name: str, number: int, make_ca: Callable[..., DemoCA], handlers: Handlers, tmp_path: Path
) -> None:
    """Each reason, by name and by number, at a CA that says accepted, or grantedWithMods."""
    ca = make_ca(ModifyingCA)
    noting = Noting(tmp_path, OPENSSL)
    handler = handlers(ca.options(), openssl_bin=str(noting.program))
    for given in (name, str(number)):
        certificate = enrolled(handler)
        code, message, detail = handler.revoke(certificate, given, None)
        arguments = noting.revocations()[-1]
        assert arguments[arguments.index("-revreason") + 1] == str(number)
        entry = crl_entry(ca, certificate)
        if name == "removeFromCRL":
            assert (code, message) == (500, ACME + "serverInternal")
            assert "this CA cannot do that" in str(detail)
            assert entry is None
            continue
        assert (code, message, detail) == (200, None, None)
        assert entry is not None
        if number:
            assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == name
    assert len(noting.revocations()) == 2


def test_no_reason_is_unspecified(ca: DemoCA, handlers: Handlers) -> None:
    """The host gives no reason: the CA accepts, and its CRL has the certificate."""
    handler = handlers(ca.options())
    certificate = enrolled(handler)
    assert handler.revoke(certificate) == (200, None, None)
    assert crl_entry(ca, certificate) is not None


NO_REASONS = [
    "7",
    "11",
    "-1",
    "1.0",
    "",
    "keycompromise",
    "key Compromise",
    "superseded\nERROR x",
    "9" * 5000,
    "\u00b2",
]


def test_an_unknown_reason_is_a_bad_one(ca: DemoCA, handlers: Handlers) -> None:
    """What ACME does not know is a bad reason, and the CA is not asked."""
    handler = handlers(ca.options())
    certificate = enrolled(handler)
    before = len(ca.messages)
    for reason in NO_REASONS:
        code, message, detail = handler.revoke(certificate, reason, None)
        assert (code, message) == (400, ACME + "badRevocationReason"), ascii(reason)
        assert detail and "\n" not in detail and len(detail) < 200, ascii(reason)
    assert len(ca.messages) == before
    assert handlers.left() == []


def test_every_form_of_a_certificate_is_revoked(ca: DemoCA, handlers: Handlers) -> None:
    """base64, base64url or PEM: the CRL has the certificate."""
    handler = handlers(ca.options())
    for form in ("base64", "base64url", "PEM"):
        certificate = enrolled(handler)
        pem = x509.load_der_x509_certificate(base64.b64decode(certificate)).public_bytes(Encoding.PEM).decode()
        assert handler.revoke({"base64": certificate, "base64url": as_host(pem), "PEM": pem}[form]) == (200, None, None)
        assert crl_entry(ca, certificate) is not None, form


def test_what_is_not_a_certificate_is_malformed(ca: DemoCA, handlers: Handlers) -> None:
    """What cannot be read as one is malformed, and the CA is not asked."""
    handler = handlers(ca.options())
    good = enrolled(handler)
    der, csr = base64.b64decode(good), csr_pem(["a.example"])
    damaged = {
        "empty": "",
        "none": None,
        "text": "garbage, not base64",
        "bytes": base64.b64encode(b"garbage" * 99).decode(),
        "CSR": as_host(csr),
        "CSR in PEM": csr,
        "cut short": base64.b64encode(der[:-30]).decode(),
        "too long": base64.b64encode(der + b"more").decode(),
        "two megabytes": good * 5000,
    }
    before = len(ca.messages)
    for damage, argument in damaged.items():
        code, message, detail = handler.revoke(argument, "superseded", None)  # type: ignore[arg-type]
        assert (code, message) == (400, ACME + "malformed"), damage
        assert detail and "\n" not in detail, damage
    assert len(ca.messages) == before
    assert handlers.left() == []


@pytest.mark.parametrize("stranger", ["of another CA", "unknown to the CA"])
def test_a_certificate_that_the_ca_has_not_issued_gets_the_hint(
    stranger: str, ca: DemoCA, handlers: Handlers, pair: Pair
) -> None:
    """A certificate of another CA, or one that this CA does not know: serverInternal, with badCertId and its hint."""
    handler = handlers(ca.options())
    path = ca.directory / "stranger.pem" if stranger == "of another CA" else pair.certificate
    code, message, detail = handler.revoke(as_host(path.read_text()), "superseded", None)
    assert (code, message) == (500, ACME + "serverInternal")
    assert "badCertId" in str(detail)
    assert "this CA has not issued the certificate" in str(detail)
    assert handlers.left() == []


def test_a_revocation_while_the_ca_is_away_can_be_repeated(
    ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody answers: serverInternal, also in the log; when the CA is back, it is revoked."""
    handler = handlers(ca.options(), msg_timeout="2", total_timeout="3")
    certificate = enrolled(handler)
    ca.stop()
    with nobody_at(ca.port):
        code, message, detail = handler.revoke(certificate, "superseded", None)
    assert (code, message) == (500, ACME + "serverInternal")
    assert ca.server in str(detail)
    assert str(detail) in caplog.text
    ca.start()
    assert handler.revoke(certificate, "superseded", None) == (200, None, None)
    assert handlers.left() == []


def test_the_exit_code_of_a_wrapper_is_no_yes(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """A program around openssl that ends with 0 whatever happens: openssl's errors count."""
    program = tmp_path / "openssl"
    program.write_text(f'#!/bin/sh\n{OPENSSL} "$@"\nexit 0\n')
    program.chmod(0o755)
    certificate = enrolled(handlers(ca.options()))
    handler = handlers(ca.options(), openssl_bin=str(program), secret="wrong-secret")
    assert handler.revoke(certificate)[0] == 500
    assert crl_entry(ca, certificate) is None
    assert handlers(ca.options(), openssl_bin=str(program)).revoke(certificate) == (200, None, None)


@binaries
@pytest.mark.parametrize(
    ("options", "code", "message", "said"),
    [
        # PKIStatus, RFC 4210, 5.2.3; the statusString of a yes goes to the log, of a no to the host as well
        (["-pkistatus", "0"], 200, None, []),
        (["-pkistatus", "1", "-statusstring", "from tomorrow on"], 200, None, ["from tomorrow on"]),
        (["-pkistatus", "1", "-statusstring", "soon\nCMP error: x"], 200, None, ["soon"]),
        (["-pkistatus", "2", "-statusstring", "no\nERROR forged"], 500, "serverInternal", ["no ERROR forged"]),
        (["-pkistatus", "2", "-failure", "8", "-statusstring", "why"], 500, "serverInternal", ["missingTime", "why"]),
        (["-pkistatus", "2", "-failure", "10"], 400, "alreadyRevoked", ["certRevoked"]),
        (["-pkistatus", "3", "-statusstring", "ask me later"], 500, "serverInternal", ["waiting", "ask me later"]),
        (["-pkistatus", "4"], 200, None, ["revocation warning"]),
        (["-pkistatus", "5"], 200, None, ["revocation notification"]),
        (["-send_error"], 500, "serverInternal", ["error processing message"]),
        (["-send_unprotected"], 500, "serverInternal", ["missing protection"]),
    ],
    ids="accepted modified in-lines words-only rejected revoked waiting warning notification error unprotected".split(),
)
def test_the_status_of_the_ca_decides(
    openssl: str,
    options: list[str],
    code: int,
    message: str | None,
    said: list[str],
    mock: Callable[..., Mock],
    pair: Pair,
    handlers: Handlers,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Here the CA is OpenSSL's mock server, which can answer with any status."""
    server = mock(pair.certificate, *options, openssl=openssl)
    handler = handlers(server.options(), openssl_bin=openssl)
    caplog.set_level(logging.INFO)
    found = handler.revoke(as_host(pair.certificate.read_text()), "superseded", None)
    assert found[:2] == (code, ACME + message if message else None)
    warned = " ".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    for words in said:
        assert words in (warned if code == 200 else str(found[2]))
    assert not any("\n" in record.getMessage() for record in caplog.records)
    assert handlers.left() == []


INVALID = {
    "keyUsage without a bit": {"2.5.29.15": "keyUsage = DER:030100"},
    "broken extension": {"2.5.29.37": "extendedKeyUsage = DER:30820005"},
    "two subjectAltNames": {"a second one": "subjectAltName = DNS:other.example"},
}


@binaries
@pytest.mark.parametrize("fault", INVALID)
def test_a_certificate_that_openssl_calls_invalid_is_told_so(
    fault: str,
    openssl: str,
    ca: DemoCA,
    handlers: Handlers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is said what it is, not that its issuer is missing; and it can be revoked where openssl can name it."""
    monkeypatch.setattr(demo_ca, "OWN_EXTENSIONS", {**demo_ca.OWN_EXTENSIONS, **INVALID[fault]})
    handler = handlers(ca.options(), openssl_bin=openssl)
    certificate = enrolled(handler)
    assert "OpenSSL calls the issued certificate itself invalid" in caplog.text
    assert "issuer's certificate is not there" not in caplog.text and "name its issuer" not in caplog.text
    code, message, detail = handler.revoke(certificate, "superseded")
    if version(openssl) >= (3, 2):
        assert (code, message, detail) == (200, None, None)
        assert crl_entry(ca, certificate) is not None
    else:
        serial = f"{x509.load_der_x509_certificate(base64.b64decode(certificate)).serial_number:x}"
        assert (code, message) == (500, ACME + "serverInternal")
        assert f"cannot revoke it by issuer and serial: revoke serial {serial} at the CA" in str(detail)
    assert handlers.left() == []


def test_a_certificate_that_openssl_cannot_read_is_blamed_itself(ca: DemoCA, pair: Pair, handlers: Handlers) -> None:
    """Its times are no times: it is said that openssl cannot read it, and not that the configuration is wrong."""
    der = x509.load_pem_x509_certificate(pair.certificate.read_bytes()).public_bytes(Encoding.DER)
    broken = base64.b64encode(der.replace(b"\x17\x0d", b"\x0c\x0d")).decode()
    for openssl in BINARIES:
        code, message, detail = handlers(ca.options(), openssl_bin=openssl).revoke(broken, "superseded")
        assert (code, message) == (500, ACME + "serverInternal")
        assert "certificate to be revoked" in str(detail) and "configuration" not in str(detail), openssl
        assert (ca.messages, handlers.left()) == ([], [])


@binaries
@pytest.mark.parametrize("kind", ["secret", "certificate", "tls"])
def test_a_revocation_has_no_option_of_an_enrolment(
    openssl: str, kind: str, make_ca: Callable[..., DemoCA], handlers: Handlers, tmp_path: Path
) -> None:
    """The rr call has nothing of what only an enrolment knows, however much of it the configuration holds."""
    ca = make_ca(tls=kind == "tls")
    noting = Noting(tmp_path, openssl)
    (tmp_path / "extensions.cnf").write_text("[wanted]\n1.2.3.4 = DER:0500\n")
    enrolment = {
        "cmp_config": str(tmp_path / "extensions.cnf"),
        "cmp_reqexts": "wanted",
        "cmp_popo": "0",
        "cmp_subject": "/CN=from the configuration",
        "cmp_issuer": "C=DE, CN=from the configuration",
        "cmp_days": "30",
        "cmp_policy_oids": "1.2.3.5",
        "cmp_policy_oids_critical": "True",
        "cmp_out_trusted": f"{ca.directory}/trusted.pem",
        "cmp_implicit_confirm": "True",
        "cmp_disable_confirm": "True",
    }
    everywhere = ca.options("certificate" if kind == "certificate" else "secret")
    everywhere["cmp_ignore_keyusage"] = "True"
    enrolling = handlers(everywhere, openssl_bin=openssl)
    certificate = enrolled(enrolling)
    handler = handlers({**everywhere, **enrolment}, openssl_bin=str(noting.program))
    assert handler.handler_check() is None
    assert handler.revoke(certificate, "superseded", None) == (200, None, None)

    (arguments,) = noting.revocations()
    flags = [argument for argument in arguments if argument.startswith("-")]
    expected = {"-" + key[4:] for key in everywhere} | {"-config", "-keep_alive", "-msg_timeout", "-total_timeout"}
    assert sorted(flags) == sorted(expected | {"-cmd", "-oldcert", "-revreason", "-batch", "-rspout", "-reqout"})
    assert "demo-secret" not in noting.notes.read_text()
    assert handlers.left() == []


@binaries
def test_a_revocation_that_the_ca_lets_wait_ends_soon(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A CA that wants to be asked again and again, without a pause: fifteen requests at the most, and its own word."""
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl)
    certificate = handler.enroll(as_host(csr_pem(["a.example"])))[2]
    asked: list[str] = []

    def wait(request: str, forward: Forward) -> bytes:
        asked.append(request)
        answer = forward()
        header = read_der(answer).parts()[0].whole
        told = error_body(status=integer(3)) if request == "rr" else poll_rep(0, [])
        return protected(header, header, told, b"")

    proxy.spoil = wait
    code, _, detail = handler.revoke(str(certificate))
    assert code == 500
    assert "waiting" in str(detail)
    assert "understands that for an enrolment only" in str(detail)
    assert len(asked) <= 15
    assert handlers.left() == []
