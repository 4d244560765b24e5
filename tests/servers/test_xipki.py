"""The handler works with XiPKI's CA, behind its CMP gateway."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

import cmp_ca_handler
from conftest import Handlers, binaries, csr_pem
from servers.javaservers import Xipki
from servers.scenarios import REASONS, csr_of_kind, enrol_many, enrolled, leaf_for_host, newest, refused, version


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Xipki]:
    with Xipki(tmp_path_factory.mktemp("xipki")) as running:
        yield running


@pytest.fixture(scope="module")
def strict_ca(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Xipki]:
    """It wants every certificate confirmed, and sends no issuers."""
    with Xipki(tmp_path_factory.mktemp("strict"), confirm=True, chain=False) as running:
        yield running


@pytest.fixture
def root(ca: Xipki) -> Path:
    return ca.directory / "root.pem"


@pytest.mark.parametrize("certificate", ["ra-ec", "ra-rsa"])
@binaries
def test_each_certificate_of_the_ra_enrols_at_xipki(
    openssl: str, certificate: str, ca: Xipki, root: Path, handlers: Handlers
) -> None:
    """Our certificate has an EC or RSA key: issued, with XiPKI's chain and both names."""
    handler = handlers(ca.options(certificate), openssl_bin=openssl)
    csr = csr_pem(["www.example.com", "example.com"], "www.example.com")
    chain = enrolled(handler, csr, root)
    assert [c.subject.rfc4514_string().split(",")[0] for c in chain[1:]] == ["CN=XiPKI Issuing CA", "CN=XiPKI Root"]
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["www.example.com", "example.com"]
    assert handlers.left() == []


@pytest.mark.parametrize("mutual", [False, True], ids=["one-way", "mutual"])
@binaries
def test_tls_enrols_at_xipki(openssl: str, mutual: bool, ca: Xipki, root: Path, handlers: Handlers) -> None:
    """TLS with and without a certificate of ours: issued."""
    handler = handlers({**ca.options("ra-ec"), **ca.tls(mutual=mutual)}, openssl_bin=openssl)
    assert len(enrolled(handler, csr_pem(["www.example.com"], "www.example.com"), root)) == 3


@binaries
def test_a_chain_that_the_ca_does_not_send_is_completed(openssl: str, strict_ca: Xipki, handlers: Handlers) -> None:
    """Then it comes from cmp_trusted and cmp_untrusted."""
    csr = csr_pem(["www.example.com"], "www.example.com")
    handler = handlers(strict_ca.options("ra-ec"), openssl_bin=openssl)
    assert len(enrolled(handler, csr, strict_ca.directory / "root.pem")) == 3


@binaries
def test_a_demanded_confirmation_makes_xipki_revoke(openssl: str, strict_ca: Xipki, handlers: Handlers) -> None:
    """certConf is sent, asked for implicit confirmation or not.

    XiPKI expects a SHA-1 hash in it, whatever has signed the certificate (RFC 4210, 5.3.18, has it otherwise), says
    pkiConf all the same, and revokes the certificate: a fault of XiPKI's, so `confirmCert` must stay off there.
    """
    handler = handlers(strict_ca.options("ra-ec"), implicit_confirm="True", openssl_bin=openssl)
    csr = csr_pem(["www.example.com"], "www.example.com")
    chain = enrolled(handler, csr, strict_ca.directory / "root.pem")
    code, kind, detail = handler.revoke(leaf_for_host(chain), "superseded")
    assert (code, kind) == (400, "urn:ietf:params:acme:error:alreadyRevoked")
    assert detail and "cessationOfOperation" in detail


@binaries
def test_implicit_confirmation_sends_no_certconf_at_xipki(
    openssl: str, ca: Xipki, root: Path, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """cmp_implicit_confirm: a p10cr is sent, and no certConf."""
    handler = handlers(ca.options("ra-ec"), implicit_confirm="True", openssl_bin=openssl)
    assert len(enrolled(handler, csr_pem(["www.example.com"], "www.example.com"), root)) == 3
    assert "sending P10CR" in caplog.text and "sending CERTCONF" not in caplog.text


@pytest.mark.parametrize("kind", ["rsa:2048", "ec:P-256", "ec:P-384", "ed25519"])
@binaries
def test_kinds_of_keys_are_enrolled_at_xipki(
    openssl: str, kind: str, ca: Xipki, root: Path, handlers: Handlers, tmp_path: Path
) -> None:
    """CSRs with RSA, P-256, P-384 and Ed25519 keys: issued."""
    enrolled(handlers(ca.options("ra-ec"), openssl_bin=openssl), csr_of_kind(kind, tmp_path), root)


@pytest.mark.skipif(version(newest()) < (3, 5), reason="no openssl here makes keys of ML-DSA")
def test_a_key_that_the_ca_does_not_know_fails(ca: Xipki, handlers: Handlers, tmp_path: Path) -> None:
    """This version of XiPKI does not know ML-DSA: it fails, with HTTP 500 and no more."""
    error = refused(handlers(ca.options("ra-ec"), openssl_bin=newest()), csr_of_kind("ML-DSA-65", tmp_path))
    assert "content type" in error, error


@binaries
def test_extensions_of_the_csr_are_issued_if_the_profile_knows_them(
    openssl: str, ca: Xipki, root: Path, handlers: Handlers, tmp_path: Path
) -> None:
    """The certificate has the key usages that the profile knows; the others this CA leaves out, without a word."""
    wanted = ["keyUsage=critical,digitalSignature", "extendedKeyUsage=serverAuth,clientAuth"]
    csr = csr_of_kind("ec:P-256", tmp_path, *wanted)
    handler = handlers(ca.options("ra-ec"), openssl_bin=openssl)
    leaf = enrolled(handler, csr, root)[0]
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {usage.dotted_string for usage in usages} == {"1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"}
    # What its profile does not know, this CA leaves out without a word.
    leaf = enrolled(handler, csr_of_kind("ec:P-256", tmp_path, "extendedKeyUsage=serverAuth,codeSigning"), root)[0]
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {usage.dotted_string for usage in usages} == {"1.3.6.1.5.5.7.3.1"}


@pytest.mark.parametrize("command", ["ir", "cr"])
@binaries
def test_ra_verified_is_refused(openssl: str, command: str, ca: Xipki, handlers: Handlers) -> None:
    """XiPKI wants the proof of possession itself, from every RA: that is p10cr."""
    error = refused(handlers(ca.options("ra-ec"), cmd=command, openssl_bin=openssl))
    assert "badPOP" in error and "cmp_cmd: p10cr" in error, error


@binaries
def test_a_shared_secret_works_from_openssl_4_on(openssl: str, ca: Xipki, root: Path, handlers: Handlers) -> None:
    """XiPKI wants at least 1000 iterations of PasswordBasedMac. OpenSSL makes 1024 from 4.0 on, and 500 before."""
    handler = handlers(ca.options("secret"), openssl_bin=openssl)
    if version(openssl) < (4, 0):
        error = refused(handler)
        assert "an unverified answer says: badMessageCheck" in error and "cmp_cert" in error, error
        return
    chain = enrolled(handler, csr_pem(["www.example.com"], "www.example.com"), root)
    assert len(chain) == 3
    assert handler.revoke(leaf_for_host(chain), "superseded") == (200, None, None)


@pytest.mark.parametrize("change", [{"secret": "another"}, {"mac": None}], ids=["wrong", "default mac"])
@binaries
def test_shared_secret_is_refused(openssl: str, change: dict[str, str | None], ca: Xipki, handlers: Handlers) -> None:
    """A wrong one, and the MAC that openssl takes by itself: every refusal is an unprotected badMessageCheck."""
    error = refused(handlers(ca.options("secret"), openssl_bin=openssl, **change))
    assert "an unverified answer says: badMessageCheck" in error and "cmp_cert" in error, error


def test_an_unknown_ra_is_refused(ca: Xipki, handlers: Handlers) -> None:
    """A CA that does not know our certificate: the error has its text, and names cmp_cert."""
    error = refused(handlers(ca.options("stranger")))
    assert "'request is protected but the requestor is not authorized'" in error and "cmp_cert" in error, error


def test_an_ra_without_rights_is_refused_at_xipki(ca: Xipki, handlers: Handlers) -> None:
    """A CA that gives our certificate no right to enrol: the error has notAuthorized."""
    error = refused(handlers(ca.options("no-rights")))
    assert "notAuthorized" in error and "rights" in error, error


def test_a_wrong_recipient_is_refused(ca: Xipki, handlers: Handlers) -> None:
    """It takes nothing that is for another: its name is that of its CMP signer, not the CA's."""
    error = refused(handlers(ca.options("ra-ec"), recipient="C=DE, O=Acme, CN=XiPKI Issuing CA"))
    assert "'I am not the intended recipient'" in error, error


@pytest.mark.parametrize("subject", ["forbidden.example.com", ""], ids=["forbidden", "none"])
def test_a_name_that_the_profile_does_not_allow_is_refused(subject: str, ca: Xipki, handlers: Handlers) -> None:
    """A subject that the profile forbids, or none: the error has badCertTemplate."""
    error = refused(handlers(ca.options("ra-ec")), csr_pem([subject or "www.example.com"], subject))
    assert "badCertTemplate" in error and "profile" in error, error


@binaries
def test_the_path_names_the_profile(openssl: str, ca: Xipki, root: Path, handlers: Handlers) -> None:
    """cmp_path names the profile: 90 days with one, 7 with the other."""
    csr = csr_pem(["www.example.com"], "www.example.com")
    for profile, days in {"tls": 90, "short": 7}.items():
        handler = handlers(ca.options("ra-ec", f"cmp/acme/{profile}"), openssl_bin=openssl)
        assert lifetime(enrolled(handler, csr, root)[0]) == days


@binaries
def test_a_profile_is_chosen_by_its_name(openssl: str, ca: Xipki, root: Path, handlers: Handlers) -> None:
    """Without one at all, this CA refuses. OpenSSL before 3.3 cannot name one, and says so."""
    csr = csr_pem(["www.example.com"], "www.example.com")
    handler = handlers(ca.options("ra-ec", "cmp/acme"), profile="short", openssl_bin=openssl)
    if version(openssl) < (3, 3):
        assert "cmp_profile" in refused(handler, csr)
    else:
        assert lifetime(enrolled(handler, csr, root)[0]) == 7
    error = refused(handlers(ca.options("ra-ec", "cmp/acme"), openssl_bin=openssl), csr)
    assert "badCertTemplate" in error and "cmp_profile" in error, error


def lifetime(certificate: x509.Certificate) -> int:
    """In days."""
    seconds = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return round(seconds / datetime.timedelta(days=1))


def test_a_forbidden_profile_is_refused(ca: Xipki, handlers: Handlers) -> None:
    """A profile that is not for our certificate: the error has notAuthorized and the profile's name."""
    error = refused(handlers(ca.options("ra-ec", "cmp/acme/secret-profile")))
    assert "notAuthorized" in error and "secret-profile is not allowed" in error, error


def test_an_unknown_profile_and_ca_are_refused(ca: Xipki, handlers: Handlers) -> None:
    """A profile or a CA that is not there: rejected; another path: the error names cmp_path."""
    assert "rejected the request" in refused(handlers(ca.options("ra-ec", "cmp/acme/nothing")))
    assert "rejected the request" in refused(handlers(ca.options("ra-ec", "cmp/nobody/tls")))
    assert "check cmp_path" in refused(handlers(ca.options("ra-ec", "nowhere")))


@binaries
def test_reasons_revoke_at_xipki_but_for_two(openssl: str, ca: Xipki, root: Path, handlers: Handlers) -> None:
    """Every reason: revoked; two that this CA does not take for a server's certificate are an error."""
    handler = handlers(ca.options("ra-ec"), openssl_bin=openssl)
    for reason in REASONS:
        chain = enrolled(handler, csr_pem(["www.example.com"], "www.example.com"), root)
        code, kind, detail = handler.revoke(leaf_for_host(chain), reason)
        if reason in ("cACompromise", "aACompromise"):  # not for a server's certificate, says this CA
            assert (code, kind) == (500, "urn:ietf:params:acme:error:serverInternal") and detail
        else:
            assert (code, kind, detail) == (200, None, None)


@binaries
def test_a_second_revocation_is_told(openssl: str, ca: Xipki, root: Path, handlers: Handlers) -> None:
    """A certificate that is revoked already: alreadyRevoked."""
    handler = handlers(ca.options("ra-ec"), openssl_bin=openssl)
    chain = enrolled(handler, csr_pem(["www.example.com"], "www.example.com"), root)
    assert handler.revoke(leaf_for_host(chain), "superseded") == (200, None, None)
    code, kind, _ = handler.revoke(leaf_for_host(chain), "superseded")
    assert (code, kind) == (400, "urn:ietf:params:acme:error:alreadyRevoked")


def test_revocation_of_a_certificate_of_another_ca_fails_at_xipki(ca: Xipki, handlers: Handlers) -> None:
    """One of another CA. To a serial number of its own that it does not know, XiPKI says yes."""
    handler = handlers(ca.options("ra-ec"))
    code, kind, detail = handler.revoke(leaf_for_host(ca.pki.made["stranger"][1]), "superseded")
    assert (code, kind) == (500, "urn:ietf:params:acme:error:serverInternal") and detail
    assert handler.revoke(leaf_for_host(ca.pki.made["cmp"][1]), "superseded") == (200, None, None)


@binaries
def test_check_connect_finds_no_error_at_xipki(
    openssl: str, ca: Xipki, handlers: Handlers, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check --connect` of a right configuration finds no error."""
    handlers(ca.options("ra-ec"), openssl_bin=openssl)
    assert cmp_ca_handler.main(["--config", str(handlers.config), "check", "--connect"]) == 0, capsys.readouterr()


def test_a_hundred_enrolments_from_eight_threads_succeed_at_xipki(ca: Xipki, handlers: Handlers) -> None:
    """All of them get a certificate, and nothing is left."""
    assert len(enrol_many(handlers(ca.options("ra-ec")), 100, 8)) == 100
    assert handlers.left() == []


@pytest.fixture(autouse=True)
def openssl_messages(caplog: pytest.LogCaptureFixture) -> None:
    """Where a test fails, pytest shows what openssl said."""
    caplog.set_level(logging.INFO)
