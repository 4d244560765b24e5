"""The handler works with Siemens' CMP RA component, between it and a CA."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

import cmp_ca_handler
from conftest import Handlers, as_host, binaries, csr_pem
from demo_ca import DemoCA
from other_cas import ModifyingCA
from servers.javaservers import SiemensRa, demo_upstream
from servers.scenarios import REASONS, checked, csr_of_kind, enrol_many, enrolled, leaf_for_host, refused, version

WAYS = ["secret", "signed", "kept"]  # what protects the answers, see SiemensRa.java
SHORT = {"msg_timeout": "6", "total_timeout": "6"}  # for an order that waits: openssl uses it up


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoCA]:
    with ModifyingCA(tmp_path_factory.mktemp("demo") / "ca") as running:
        yield running


@pytest.fixture(scope="module")
def ra(ca: DemoCA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiemensRa]:
    with SiemensRa(tmp_path_factory.mktemp("siemens"), demo_upstream(ca)) as running:
        yield running


@pytest.fixture
def root(ca: DemoCA) -> Path:
    return ca.directory / "root.pem"


@pytest.mark.parametrize("command", ["ir", "cr"])
@pytest.mark.parametrize("way", WAYS)
@binaries
def test_every_kind_is_enrolled_at_siemens(
    openssl: str, way: str, command: str, ra: SiemensRa, root: Path, handlers: Handlers
) -> None:
    """`ir` and `cr`, by secret or signature, the answers protected by the RA or the CA: issued, with both names."""
    handler = handlers(ra.options(way), cmd=command, openssl_bin=openssl)
    chain = enrolled(handler, csr_pem(["www.example.com", "example.com"]), root)
    assert len(chain) == 3
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["www.example.com", "example.com"]
    assert handlers.left() == []


@pytest.mark.parametrize("certificate", ["ra-ec", "ra-rsa"])
@binaries
def test_each_certificate_of_the_ra_enrols_at_siemens(
    openssl: str, certificate: str, ra: SiemensRa, root: Path, handlers: Handlers
) -> None:
    """Our certificate has an EC or RSA key: issued."""
    handler = handlers(ra.options("signed", certificate), openssl_bin=openssl)
    assert len(enrolled(handler, csr_pem(["www.example.com"]), root)) == 3


@pytest.mark.parametrize("mutual", [False, True], ids=["one-way", "mutual"])
@binaries
def test_tls_enrols_at_siemens(openssl: str, mutual: bool, ra: SiemensRa, root: Path, handlers: Handlers) -> None:
    """TLS with and without a certificate of ours: issued."""
    handler = handlers({**ra.options("secret"), **ra.tls(mutual=mutual)}, openssl_bin=openssl)
    assert len(enrolled(handler, csr_pem(["www.example.com"]), root)) == 3


@binaries
def test_tls_without_our_certificate_names_cmp_tls_cert(openssl: str, ra: SiemensRa, handlers: Handlers) -> None:
    """An RA that wants a certificate in TLS, and gets none: the error names cmp_tls_cert."""
    options = {**ra.options("secret"), **ra.tls(mutual=True)}
    error = refused(handlers(options, tls_cert=None, tls_key=None, openssl_bin=openssl))
    assert "cmp_tls_cert" in error, error


@pytest.mark.parametrize("implicit", [False, True])
@binaries
def test_a_confirmation_is_sent_unless_it_is_implicit(
    openssl: str, implicit: bool, ca: DemoCA, ra: SiemensRa, root: Path, handlers: Handlers
) -> None:
    """Without cmp_implicit_confirm the CA behind the RA gets a certConf, with it none."""
    before = len(ca.messages)
    options = {"implicit_confirm": str(implicit), "openssl_bin": openssl}
    enrolled(handlers(ra.options("signed"), **options), csr_pem(["www.example.com"]), root)
    assert [message.request for message in ca.messages[before:]] == (["ir"] if implicit else ["ir", "certConf"])


@pytest.mark.parametrize("kind", ["rsa:2048", "ec:P-384", "ed25519"])
@binaries
def test_kinds_of_keys_are_enrolled_at_siemens(
    openssl: str, kind: str, ra: SiemensRa, root: Path, handlers: Handlers, tmp_path: Path
) -> None:
    """CSRs with RSA, P-384 and Ed25519 keys: issued."""
    enrolled(handlers(ra.options("secret"), openssl_bin=openssl), csr_of_kind(kind, tmp_path), root)


@binaries
def test_every_extension_of_the_csr_is_in_the_certificate(
    openssl: str, ra: SiemensRa, root: Path, handlers: Handlers, tmp_path: Path
) -> None:
    """Must-staple and both kinds of key usage in the CSR: the certificate has them."""
    wanted = ("tlsfeature=status_request", "keyUsage=critical,digitalSignature", "extendedKeyUsage=serverAuth")
    csr = csr_of_kind("ec:P-256", tmp_path, *wanted)
    leaf = enrolled(handlers(ra.options("signed"), openssl_bin=openssl), csr, root)[0]
    for extension in x509.load_pem_x509_csr(csr.encode()).extensions:
        assert leaf.extensions.get_extension_for_oid(extension.oid).value == extension.value


def test_a_wrong_secret_at_siemens_names_cmp_secret(ra: SiemensRa, handlers: Handlers) -> None:
    """An RA that knows another secret: the error names cmp_secret."""
    error = refused(handlers(ra.options("secret"), secret="another"))
    assert "cmp_secret" in error, error


def test_an_unknown_reference_is_not_authorized(ra: SiemensRa, handlers: Handlers) -> None:
    """An RA that does not know cmp_ref: the error has its notAuthorized and its text."""
    error = refused(handlers(ra.options("secret"), ref="nobody"))
    assert "notAuthorized" in error and "no shared secret is provided" in error, error


def test_an_unknown_certificate_of_the_ra_names_cmp_cert(ra: SiemensRa, handlers: Handlers) -> None:
    """An RA that does not trust our certificate: signerNotTrusted, and the error names cmp_cert."""
    error = refused(handlers(ra.options("signed", "stranger")))
    assert "signerNotTrusted" in error and "cmp_cert" in error, error


def test_an_ra_without_rights_is_refused_at_siemens(ra: SiemensRa, handlers: Handlers) -> None:
    """An RA whose inventory gives our certificate no rights: the error has its text."""
    error = refused(handlers(ra.options("signed", "no-rights")))
    assert "request refused by external inventory" in error, error


def test_a_forbidden_name_is_refused(ra: SiemensRa, handlers: Handlers) -> None:
    """An RA whose inventory forbids the name: the error has badCertTemplate and its text."""
    error = refused(handlers(ra.options("secret")), csr_pem(["www.forbidden.example"]))
    assert "badCertTemplate" in error and "request refused by external inventory" in error, error


def test_an_unknown_path_names_cmp_path(ra: SiemensRa, handlers: Handlers) -> None:
    """A cmp_path that the RA does not have: the error names cmp_path."""
    error = refused(handlers(ra.options("secret"), path="nowhere"))
    assert "check cmp_path" in error, error


@binaries
def test_a_profile_reaches_the_ra(openssl: str, ra: SiemensRa, root: Path, handlers: Handlers) -> None:
    """certProfile reaches the RA: this one refuses one profile. OpenSSL before 3.3 cannot send it, and says so."""
    if version(openssl) < (3, 3):
        assert "cmp_profile" in refused(handlers(ra.options("signed"), profile="tls", openssl_bin=openssl))
        return
    enrolled(handlers(ra.options("signed"), profile="tls", openssl_bin=openssl), csr_pem(["www.example.com"]), root)
    error = refused(handlers(ra.options("signed"), profile="forbidden", openssl_bin=openssl))
    assert "request refused by external inventory" in error, error


@pytest.mark.parametrize("way", ["secret", "kept"])
@binaries
def test_waiting_survives_a_restart_of_the_ra(
    openssl: str, way: str, ra: SiemensRa, root: Path, handlers: Handlers
) -> None:
    """Delayed delivery as in RFC 9483, 4.4; "kept": the RA signs its own answers, and the CA has signed the others."""
    ra.release(go=False)
    handler = handlers(ra.options(f"held-{way}"), **SHORT, openssl_bin=openssl)
    csr = csr_pem(["slow.example.com"])
    error, bundle, _, identifier = handler.enroll(as_host(csr))
    assert (error, bundle) == (None, None) and identifier
    ra.restart()
    ra.release(go=True)
    for _ in range(3):
        error, bundle, _, _, rejected = handler.poll("slow", identifier, as_host(csr))
        if error or bundle:
            break
    if version(openssl) < (3, 3):  # it expects another nonce than the one that RFC 9483 wants: docs/compatibility.md
        assert bundle is None and not rejected
        return
    assert (error, rejected) == (None, False) and bundle
    checked(bundle, csr, root)
    assert handlers.left() == []


@binaries
def test_sender_of_the_ca_does_not_fit_an_answer_of_the_ra(openssl: str, ra: SiemensRa, handlers: Handlers) -> None:
    """Where the RA passes the CA's answers on and signs only its own, cmp_expect_sender refuses one of the two."""
    ra.release(go=False)
    sender = "C=DE, O=Demo, CN=Demo CMP Signer"
    handler = handlers(ra.options("held-kept"), expect_sender=sender, **SHORT, openssl_bin=openssl)
    assert "cmp_expect_sender" in refused(handler)


@binaries
def test_every_reason_revokes_at_siemens(
    openssl: str, ca: DemoCA, ra: SiemensRa, root: Path, handlers: Handlers
) -> None:
    """Every reason: revoked; two that the CA grants with modifications are an error; twice is alreadyRevoked."""
    handler = handlers(ra.options("signed"), openssl_bin=openssl)
    for reason in REASONS:
        chain = enrolled(handler, csr_pem(["www.example.com"]), root)
        code, kind, detail = handler.revoke(leaf_for_host(chain), reason)
        if reason in ("privilegeWithdrawn", "aACompromise"):
            # This CA grants these with modifications, and the RA takes only "accepted" for a yes.
            assert (code, kind) == (500, "urn:ietf:params:acme:error:serverInternal") and detail
        else:
            assert (code, kind, detail) == (200, None, None)
        assert ca.is_revoked(f"{chain[0].serial_number:X}")
    code, kind, _ = handler.revoke(leaf_for_host(chain), "superseded")
    assert (code, kind) == (400, "urn:ietf:params:acme:error:alreadyRevoked")


def test_revocation_of_an_unknown_certificate_fails_at_siemens(ra: SiemensRa, handlers: Handlers) -> None:
    """A certificate that the CA has not issued: serverInternal, with a reason."""
    handler = handlers(ra.options("signed"))
    stranger = [ra.pki.made["stranger"][1][0]]
    code, kind, detail = handler.revoke(leaf_for_host(stranger), "superseded")
    assert (code, kind) == (500, "urn:ietf:params:acme:error:serverInternal") and detail


@binaries
def test_check_connect_finds_no_error_at_siemens(
    openssl: str, ra: SiemensRa, handlers: Handlers, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check --connect` of a right configuration finds no error."""
    handlers(ra.options("secret"), openssl_bin=openssl)
    assert cmp_ca_handler.main(["--config", str(handlers.config), "check", "--connect"]) == 0, capsys.readouterr()


def test_a_hundred_enrolments_from_eight_threads_succeed_at_siemens(ra: SiemensRa, handlers: Handlers) -> None:
    """All of them get a certificate, and nothing is left."""
    assert len(enrol_many(handlers(ra.options("signed")), 100, 8)) == 100
    assert handlers.left() == []


@pytest.fixture(autouse=True)
def openssl_messages(caplog: pytest.LogCaptureFixture) -> None:
    """Where a test fails, pytest shows what openssl said."""
    caplog.set_level(logging.INFO)
