"""The certificate is what the CSR asked for: other names, another key or a CA flag are warned of, or revoked."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import re
import subprocess
from pathlib import Path
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

import cmp_ca_handler
import demo_ca
from conftest import Handlers, Mock, binaries, bundle_certificates, csr_pem
from demo_ca import DemoCA
from shared import SHORT, begin, check_issued, hold

SAN = "subjectAltName = "
WARNING = "the CA issued something else than the CSR asked for"


def san(*names: str) -> x509.SubjectAlternativeName:
    """`san("IP:10.0.0.1")` and so on."""
    return x509.SubjectAlternativeName(list(map(general_name, names)))


def general_name(name: str) -> x509.GeneralName:
    kind, _, value = name.partition(":")
    if kind == "IP":
        return x509.IPAddress(ipaddress.ip_address(value))
    return {"DNS": x509.DNSName, "email": x509.RFC822Name}[kind](value)


def alter(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Let the demo CA put these extensions into its certificates, whatever was asked for."""
    oids = {"subjectAltName": "2.5.29.17", "basicConstraints": "2.5.29.19", "keyUsage": "2.5.29.15"}
    own = {**demo_ca.OWN_EXTENSIONS, **{oids[line.split()[0]]: line for line in lines}}
    monkeypatch.setattr(demo_ca, "OWN_EXTENSIONS", own)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the warnings say about certificates: the end of the line, behind the serial."""
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return [re.sub(rf'^{WARNING}: subject="[^"]*" serial=\w+: ', "", text) for text in messages if WARNING in text]


def read_csr(pem: str) -> cmp_ca_handler.CSR:
    return cmp_ca_handler._read_csr(pem, cmp_ca_handler.CHECKED_KINDS)


CHANGED = {
    "added": (["DNS:a.tld"], "", [SAN + "DNS:a.tld,DNS:evil.example.org"], "added DNS:evil.example.org"),
    "missing": (["DNS:a.tld", "DNS:b.tld"], "", [SAN + "DNS:a.tld"], "missing DNS:b.tld"),
    "both": (["DNS:a.tld"], "", [SAN + "DNS:*.a.tld"], "missing DNS:a.tld; added DNS:*.a.tld"),
    "none left": (["DNS:a.tld"], "a.tld", [SAN + "email:x@y"], "missing DNS:a.tld; added email:x@y"),
    "another address": (["IP:10.0.0.1"], "", [SAN + "IP:10.0.0.2"], "missing IP:10.0.0.1; added IP:10.0.0.2"),
    "IPv6": (["IP:2001:db8::1"], "", [SAN + "IP:2001:db8::2"], "missing IP:2001:db8::1; added IP:2001:db8::2"),
    "another kind": (["DNS:10.0.0.1"], "x", [SAN + "IP:10.0.0.1"], "missing DNS:10.0.0.1; added IP:10.0.0.1"),
    "a UPN": (["DNS:a.tld"], "", [SAN + "DNS:a.tld,otherName:1.3.6.1.4.1.311.20.2.3;UTF8:u@x"], "added otherName:"),
    "CN of another name": (["DNS:a.tld"], "build", [SAN + "DNS:a.tld,DNS:built"], "added DNS:built"),
    # acme2certifier before 0.46 does not look at a CN beside subjectAltNames
    "CN as a name": (["DNS:a.tld"], "build-server", [SAN + "DNS:a.tld,DNS:build-server"], "added DNS:build-server"),
    "CN as an e-mail address": (["DNS:a.tld"], "u@a.tld", [SAN + "DNS:a.tld,email:u@a.tld"], "added email:u@a.tld"),
    "CA": (["DNS:a.tld"], "", ["basicConstraints = CA:TRUE"], "a CA certificate"),
    "keyCertSign": (["DNS:a.tld"], "", ["keyUsage = digitalSignature,keyCertSign"], "a CA certificate"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_certificate_is_warned_of(
    case: str, ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA that adds, drops or replaces a name, or makes a CA of it: handed out, with one warning that says what."""
    names, subject, lines, warning = CHANGED[case]
    alter(monkeypatch, *lines)
    csr = csr_pem([], subject, extensions=[san(*names)])
    error, bundle, _, _ = handlers(ca.options()).enroll(csr)
    assert error is None
    assert len(bundle_certificates(bundle or "")) == 3
    assert [text.startswith(warning) for text in said(caplog)] == [True]
    assert said(caplog)[0] == warning or case == "a UPN"


def test_an_unchecked_attribute_is_no_name(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An organizational unit or address in the CSR's subject, of which the CA makes a name: nobody has checked it."""
    alter(monkeypatch, SAN + "DNS:a.tld,DNS:victim.example,email:boss@victim.example")
    names = [
        (x509.NameOID.ORGANIZATIONAL_UNIT_NAME, "victim.example"),
        (x509.NameOID.EMAIL_ADDRESS, "boss@victim.example"),
    ]
    builder = x509.CertificateSigningRequestBuilder()
    builder = builder.subject_name(x509.Name([x509.NameAttribute(*name) for name in names]))
    request = builder.add_extension(san("DNS:a.tld"), False).sign(ec.generate_private_key(ec.SECP256R1()), SHA256())
    csr = request.public_bytes(serialization.Encoding.PEM).decode()
    assert handlers(ca.options()).enroll(csr)[0] is None
    assert said(caplog) == ["added DNS:victim.example, email:boss@victim.example"]


UNCHANGED = {
    "as asked": (["DNS:a.tld"], "", []),
    "letters": (["DNS:A.tld", "email:Me@a.tld"], "", [SAN + "DNS:a.TLD,email:me@A.tld"]),
    "another order": (["DNS:a.tld", "DNS:b.tld", "IP:10.0.0.1"], "", [SAN + "IP:10.0.0.1,DNS:b.tld,DNS:a.tld"]),
    "CN alone": ([], "www.a.tld", [SAN + "DNS:www.a.tld"]),
    "CN of one label alone": ([], "intranet", [SAN + "DNS:intranet"]),
    "CN stays": ([], "www.a.tld", []),
    "CN is no host": (["DNS:a.tld"], "Build server 3", []),
    "IPv6": (["IP:2001:db8::1"], "", []),
    "CA:FALSE": (["DNS:a.tld"], "", ["basicConstraints = CA:FALSE", "keyUsage = digitalSignature,keyEncipherment"]),
}


@binaries
@pytest.mark.parametrize("case", UNCHANGED)
def test_what_means_the_same_is_no_change(
    case: str,
    openssl: str,
    ca: DemoCA,
    handlers: Handlers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A CA that writes names in another order or in capitals, or the CN as a name: no warning, nothing is refused."""
    names, subject, lines = UNCHANGED[case]
    alter(monkeypatch, *lines)
    csr = csr_pem([], subject, extensions=[san(*names)] if names else [])
    error, bundle, _, _ = handlers(ca.options(), openssl_bin=openssl, refuse_changes="True").enroll(csr)
    assert (error, said(caplog)) == (None, [])
    assert bundle


@binaries
def test_the_same_name_in_another_spelling_is_no_change(
    openssl: str, ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """An address has many spellings, and may be repeated as a DNS name; a host may have a dot at its end."""
    spellings: list[tuple[list[str], str, list[str]]] = [
        ([], "2001:0DB8:0:0:0:0:0:1", []),
        (["IP:2001:db8::1"], "2001:db8:0:0:0:0:0:1", []),
        (["IP:10.0.0.1"], "10.0.0.1", [SAN + "IP:10.0.0.1,DNS:10.0.0.1"]),
        (["DNS:a.tld."], "a.tld.", [SAN + "DNS:a.tld"]),
    ]
    for names, subject, lines in spellings:
        with pytest.MonkeyPatch.context() as patch:
            alter(patch, *lines)
            csr = csr_pem([], subject, extensions=[san(*names)] if names else [])
            error, bundle, _, _ = handlers(ca.options(), openssl_bin=openssl, refuse_changes="True").enroll(csr)
        assert (error, said(caplog)) == (None, [])
        assert bundle


def test_a_certificate_without_a_name_for_clients_is_warned_of(
    mock: Callable[..., Mock], handlers: Handlers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA that leaves out the subjectAltName of a CSR with a CN alone: a warning, for most clients look there only."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a.example")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=9))
    (tmp_path / "a.pem").write_bytes(builder.sign(key, SHA256()).public_bytes(serialization.Encoding.PEM))
    handler = handlers(mock(tmp_path / "a.pem").options(), refuse_changes="True")
    assert handler.enroll(csr_pem([], "a.example", key=key))[0] is None
    assert 'issued no subjectAltName, and most clients look at nothing else: subject="CN=a.example"' in caplog.text


def test_a_configured_subject_is_no_change(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its CN is what the administrator has set, also where the CA makes a name of it; in either notation."""
    alter(monkeypatch, SAN + "DNS:a.tld,DNS:gateway.plant.example")
    for before, after in (("C=DE, ", ""), ("/C=DE/", ""), ("C=DE, ", "."), ("C=DE, OU=x + ", ""), ("/OU=x+", "/L=y")):
        subject = f"{before}CN=gateway.plant.example{after}"
        assert handlers(ca.options(), subject=subject).enroll(csr_pem(["a.tld"]))[0] is None
        assert said(caplog) == [], subject


def test_a_subject_that_is_configured_otherwise_since_is_no_change(
    ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """What counts is what the CA was asked for, not what the next order would ask for."""
    options = hold(ca).options()
    csr = csr_pem(["a.tld"])
    identifier = begin(handlers(options, subject="CN=gateway.plant.example", **SHORT), csr)
    ca.approve("all")
    result = handlers(options, subject="CN=other.example", refuse_changes="True", **SHORT).poll("name", identifier, "")
    check_issued(result, csr)
    assert said(caplog) == []


@binaries
def test_changed_names_are_refused_on_request(
    openssl: str, ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """cmp_refuse_changes, and a CA that adds a name: no certificate, and its CRL says cessationOfOperation."""
    alter(monkeypatch, SAN + "DNS:a.tld,DNS:evil.example.org")
    caplog.set_level(logging.INFO)
    handler = handlers(ca.options(), openssl_bin=openssl, refuse_changes="True")
    error, bundle, certificate, identifier = handler.enroll(csr_pem(["a.tld"]))
    assert error == f"{WARNING} (added DNS:evil.example.org): refused and revoked"
    assert (bundle, certificate, identifier) == (None, None, None)
    issued = x509.load_pem_x509_certificate(next((ca.directory / "issued").iterdir()).read_bytes())
    crl = x509.load_pem_x509_crl((ca.directory / "ca.crl").read_bytes())
    entry = crl.get_revoked_certificate_by_serial_number(issued.serial_number)
    assert entry is not None
    assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == "cessationOfOperation"
    assert "reason=cessationOfOperation" in caplog.text
    assert handlers.left() == []


def test_changed_names_are_refused_by_a_poll(ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CA that adds a name after its approval: the poll revokes the certificate and ends the order."""
    alter(monkeypatch, SAN + "DNS:evil.example.org")
    ca.hold, ca.check_after = True, 1
    handler = handlers(ca.options(), refuse_changes="True", msg_timeout="3", total_timeout="8")
    csr = csr_pem(["a.tld"])
    error, _, _, identifier = handler.enroll(csr)
    assert error is None
    assert identifier
    ca.approve("a.tld")
    error, bundle, certificate, _, rejected = handler.poll("name", identifier, csr)
    assert error and error.endswith("refused and revoked")
    assert (bundle, certificate, rejected) == (None, None, True)
    assert crl_count(ca) == 1
    assert handlers.left() == []


def crl_count(ca: DemoCA) -> int:
    return len(list(x509.load_pem_x509_crl((ca.directory / "ca.crl").read_bytes())))


def test_what_was_revoked_before_counts_as_revoked(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll that was killed has revoked it: the next one does not say that it could not be revoked."""
    alter(monkeypatch, SAN + "DNS:evil.example.org")
    again = (400, cmp_ca_handler.ACME_ERROR + "alreadyRevoked", "certRevoked")
    monkeypatch.setattr(cmp_ca_handler.CAhandler, "_revoke", lambda *_: again)
    error = handlers(ca.options(), refuse_changes="True").enroll(csr_pem(["a.tld"]))[0]
    assert error and error.endswith("refused and revoked")


def test_a_refused_certificate_that_is_not_revoked_is_named(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CA does not let this RA revoke: the error names the certificate that is left."""
    alter(monkeypatch, SAN + "DNS:evil.example.org")

    def refuse(*_: object) -> None:
        raise demo_ca.Refusal("notAuthorized", "this RA may not")

    monkeypatch.setattr(ca, "_revoke", refuse)
    error = handlers(ca.options(), refuse_changes="yes").enroll(csr_pem(["a.tld"]))[0]
    serial = next((ca.directory / "issued").iterdir()).stem.lower().lstrip("0")
    assert error and "and could not be revoked (" in error
    assert "notAuthorized" in error
    assert f"revoke serial {serial} at the CA" in error


def test_refuse_changes_is_a_switch(ca: DemoCA, handlers: Handlers) -> None:
    """cmp_refuse_changes is True, off or empty; `maybe` is a configuration error."""
    for value, fault in (("True", False), ("off", False), ("", False), ("maybe", True)):
        check = handlers(ca.options(), refuse_changes=value).handler_check()
        assert ("cmp_refuse_changes: is a switch" in str(check)) == fault, value


def test_another_key_is_a_change(ca: DemoCA, handlers: Handlers) -> None:
    """openssl refuses it long before, so the comparison is called here by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    bundle = handlers(ca.options()).enroll(csr_pem(["a.tld"], key=key))[1]
    leaf = bundle_certificates(bundle or "")[0]
    read = cmp_ca_handler._certificate(cmp_ca_handler._decode(leaf_pem(bundle), "CERTIFICATE"))
    assert leaf.public_key() == key.public_key()
    assert cmp_ca_handler._changes(read_csr(csr_pem(["a.tld"], key=key)), read, "") == ""
    assert cmp_ca_handler._changes(read_csr(csr_pem(["a.tld"])), read, "") == "another key"


def test_another_subject_is_a_change(ca: DemoCA, handlers: Handlers) -> None:
    """The demo CA takes the subject as it is, and OpenSSL writes no compressed points: the comparison by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    bundle = handlers(ca.options()).enroll(csr_pem(["a.tld"], key=key))[1]
    leaf = cmp_ca_handler._certificate(cmp_ca_handler._decode(leaf_pem(bundle), "CERTIFICATE"))
    csr = read_csr(csr_pem(["a.tld"], key=key))
    without_names = read_csr(csr_pem([], "b.tld", key=key))
    other = [[cmp_ca_handler.Attribute("2.5.4.3", cmp_ca_handler.UTF8, "evil.example", b"")]]
    assert cmp_ca_handler._changes(csr, leaf._replace(subject=other), "") == "added CN=evil.example"
    assert cmp_ca_handler._changes(without_names, leaf, "").startswith("missing b.tld; added DNS:a.tld")
    one_label = read_csr(csr_pem([], "intranet", key=key))
    extranet = [[other[0][0]._replace(text="extranet")]]
    nothing = leaf._replace(subject=extranet, extensions={})
    assert cmp_ca_handler._changes(one_label, nothing, "") == "missing intranet; added CN=extranet"
    form = serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint
    point = b"\0" + key.public_key().public_bytes(*form)
    algorithm = cmp_ca_handler._sequence(leaf.key)[0].raw
    compressed = demo_ca.write_der(0x30, algorithm + demo_ca.write_der(0x03, point))
    assert cmp_ca_handler._changes(csr, leaf._replace(key=compressed), "") == ""
    odd = demo_ca.write_der(0x30, algorithm + demo_ca.write_der(0x03, point[:1] + bytes([point[1] ^ 1]) + point[2:]))
    assert cmp_ca_handler._changes(csr, leaf._replace(key=odd), "") == "another key"


def test_a_key_that_is_the_beginning_of_another_is_another(ca: DemoCA, handlers: Handlers) -> None:
    """Whole keys are compared, not as far as the shorter one goes."""
    key = ec.generate_private_key(ec.SECP256R1())
    bundle = handlers(ca.options()).enroll(csr_pem(["a.tld"], key=key))[1]
    leaf = cmp_ca_handler._certificate(cmp_ca_handler._decode(leaf_pem(bundle), "CERTIFICATE"))
    algorithm, bits = cmp_ca_handler._sequence(leaf.key)
    csr = read_csr(csr_pem(["a.tld"], key=key))
    for length in (2, 20, 33, 65):
        cut = demo_ca.write_der(0x30, algorithm.raw + demo_ca.write_der(0x03, bits.value[:length]))
        assert cmp_ca_handler._changes(csr, leaf._replace(key=cut), "") == "another key"


def leaf_pem(bundle: str | None) -> str:
    return str(bundle).partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"


def test_names_that_cannot_be_read_are_warned_of(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA whose subjectAltName is cut short: handed out, with a warning that it cannot be compared."""
    alter(monkeypatch, SAN + "DER:30820005")
    error, bundle, _, _ = handlers(ca.options()).enroll(csr_pem(["a.tld"]))
    assert error is None
    assert bundle  # without a chain: to openssl verify, too, the extension is invalid
    assert said(caplog) == ["it cannot be compared with the CSR: DER cut short"]


@pytest.mark.parametrize(
    ("name", "twice", "warning"),
    [
        ("a.tld", False, ""),
        ("evil.example", False, "missing DNS:a.tld; added DNS:evil.example"),
        ("a.tld", True, "it cannot be compared with the CSR: its extensions are malformed, or one is there twice"),
    ],
)
def test_an_extension_that_cannot_be_read_does_not_hide_the_others(
    name: str, twice: bool, warning: str, ca: DemoCA
) -> None:
    """The other extensions count: no name is missing that is there, and none is added in silence."""
    (ca.directory / "odd.cnf").write_text(f"authorityKeyIdentifier = DER:30030401\n{SAN}DNS:{name}\n")
    (ca.directory / "odd.csr").write_text(csr_pem(["a.tld"], "x"))
    command = "openssl x509 -req -in odd.csr -CA sub.pem -CAkey sub.key -extfile odd.cnf -outform DER".split()
    made = subprocess.run(command, cwd=ca.directory, capture_output=True, check=True).stdout
    tbs, *signature = demo_ca.read_der(made).parts()
    *fields, extensions = tbs.parts()
    listed = [extension.whole for extension in extensions.parts()[0].parts()]
    again = demo_ca.write_der(0xA3, demo_ca.write_der(0x30, b"".join([*listed, *listed[:twice]])))
    parts = demo_ca.write_der(0x30, b"".join(field.whole for field in fields) + again), *(p.whole for p in signature)
    leaf = cmp_ca_handler._certificate(demo_ca.write_der(0x30, b"".join(parts)))
    assert cmp_ca_handler._changes(read_csr((ca.directory / "odd.csr").read_text()), leaf, "") == warning
