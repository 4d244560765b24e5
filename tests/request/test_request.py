"""All of the CSR reaches the CA: public key, subject and every extension, byte for byte."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ENDS, Handlers, as_host, binaries, csr_pem
from demo_ca import DemoCA, read_der, write_der
from shared import (
    BMP,
    CN,
    DNS,
    IA5,
    KEY,
    OU,
    PRINTABLE,
    TELETEX,
    UNIVERSAL,
    UNNAMED,
    UTF8,
    C,
    O,
    Subject,
    Wire,
    attributes,
    base64url,
    extension_der,
    in_csr,
    name_der,
    oid,
    save_request,
    wire,
)

__all__ = ["wire"]  # a fixture

SAN = bytes.fromhex("0603551d11")  # subjectAltName as an OBJECT IDENTIFIER


def csr_der(subject: bytes, extensions: list[bytes]) -> bytes:
    """A signed CSR with exactly these bytes as subject and extensions: no library would write some of them."""
    spki = KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    attributes = b""
    if extensions:
        request = write_der(0x31, write_der(0x30, b"".join(extensions)))
        attributes = write_der(0x30, oid("1.2.840.113549.1.9.14") + request)
    body = write_der(0x30, write_der(0x02, b"\0") + subject + spki + write_der(0xA0, attributes))
    algorithm = write_der(0x30, oid("1.2.840.10045.4.3.2"))
    signature = write_der(0x03, b"\0" + KEY.sign(body, ec.ECDSA(hashes.SHA256())))
    return write_der(0x30, body + algorithm + signature)


ALL_NAMES = x509.SubjectAlternativeName(
    [
        x509.DNSName("a.example"),
        x509.DNSName("*.a.example"),
        x509.IPAddress(ip_address("192.0.2.1")),
        x509.IPAddress(ip_address("2001:db8::1")),
        x509.UniformResourceIdentifier("https://a.example/x,y?z"),
        x509.RFC822Name("x@a.example"),
        x509.DirectoryName(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x, y/z")])),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3.4")),
        x509.OtherName(x509.ObjectIdentifier("1.3.6.1.4.1.311.20.2.3"), write_der(UTF8, b"upn@a.example")),
    ]
)
USAGE = x509.KeyUsage(True, False, True, False, False, False, False, False, False)
EXTENSIONS = {
    "DNS": [DNS],
    "every type of name": [extension_der(ALL_NAMES)],
    "critical names": [extension_der(ALL_NAMES, critical=True)],
    "must-staple": [DNS, extension_der(x509.TLSFeature([x509.TLSFeatureType.status_request]))],
    "key usages": [
        extension_der(USAGE, critical=True),
        DNS,
        extension_der(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
    ],
    "unknown": [DNS, extension_der(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\x00"))],
}


@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_request_equals_csr(extensions: str, wire: Wire) -> None:
    """Key, subject and extensions are those of the CSR, and nobody adds a second list of names."""
    der = csr_der(name_der([[("2.5.4.3", UTF8, "a.example")]]), EXTENSIONS[extensions])
    for openssl in ENDS:
        asked = wire(wire.handler(openssl_bin=openssl), base64url(der))
        assert asked == in_csr(der), openssl
        assert len([extension for extension in asked.extensions if SAN in extension]) == 1, openssl


@binaries
@pytest.mark.parametrize(
    "subject, expected", [("Build server", []), ("a.example", ["a.example"]), ("intranet", ["intranet"])]
)
def test_no_names_of_the_registration_authority_are_added(
    subject: str, expected: list[str], openssl: str, wire: Wire
) -> None:
    """Only the CN, where it may be a host's: clients look at subjectAltNames alone."""
    der = csr_der(name_der([[(CN, UTF8, subject)]]), [])
    names = [extension_der(x509.SubjectAlternativeName([x509.DNSName(name)])) for name in expected]
    assert wire(wire.handler(openssl_bin=openssl), base64url(der)).extensions == names


# --- Subjects -------------------------------------------------------------------------------------------------------


SUBJECTS: dict[str, Subject] = {
    "ordinary": [[(C, PRINTABLE, "DE")], [(O, UTF8, "Demo")], [(CN, UTF8, "a.example")]],
    "slashes": [[(O, UTF8, "a/CN=b/")], [(CN, UTF8, "/x")]],
    "pluses": [[(O, UTF8, "a+b+CN=c")]],
    "commas and equals": [[(O, UTF8, "Demo, Inc.=x")]],
    "quotes": [[(O, UTF8, "\"'`$HOME`'\"")]],
    "backslashes": [[(O, UTF8, "a\\"), (OU, UTF8, "\\/\\+\\\\")]],
    "umlauts": [[(O, UTF8, "Müller & Söhne \u4e2d\u6587 \U0001f600")]],
    "leading dash": [[(CN, UTF8, "-config")]],
    "blanks": [[(CN, UTF8, "  a  ")]],
    "one blank": [[(CN, UTF8, " ")]],
    "line breaks": [[(CN, UTF8, "a\nb\r\nc")]],
    "NUL": [[(O, UTF8, "a\0b")]],
    "escape sequence": [[(CN, UTF8, "\x1b[2J\u202e")]],
    "two in one RDN": [[(CN, UTF8, "a"), (OU, UTF8, "b")]],
    "two of a type in one RDN": [[(OU, UTF8, "b"), (OU, UTF8, "a")]],
    "repeated": [[(OU, UTF8, "a")], [(OU, UTF8, "a")]],
    "type without a name": [[(UNNAMED, UTF8, "x")], [(CN, UTF8, "a")]],
    "PrintableString": [[(CN, PRINTABLE, "a.example")]],
    "TeletexString": [[(O, TELETEX, "M\xfcller")]],
    "BMPString": [[(CN, BMP, "Müller")]],
    "UniversalString": [[(CN, UNIVERSAL, "Müller")]],
    "64 characters": [[(CN, UTF8, "x" * 64)]],
    "65 characters": [[(CN, UTF8, "x" * 65)]],
    "one letter of a country": [[(C, PRINTABLE, "D")]],
    "three letters of a country": [[(C, PRINTABLE, "DEU")]],
    "empty value": [[(CN, UTF8, "")], [(O, UTF8, "a")]],
    "e-mail address": [[("1.2.840.113549.1.9.1", IA5, "a@b.example")]],
    "domain components": [[("0.9.2342.19200300.100.1.25", IA5, "example")], [(CN, UTF8, "a")]],
    "serial number": [[("2.5.4.5", PRINTABLE, "12/34")], [("2.5.4.9", UTF8, "Way 1")], [("2.5.4.97", UTF8, "x")]],
    "many": [[(OU, UTF8, f"unit {i}")] for i in range(100)],
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_subject_is_sent_byte_for_byte(subject: str, wire: Wire) -> None:
    """Whatever stands in it, and in whichever type of string."""
    der = csr_der(name_der(SUBJECTS[subject]), [DNS])
    for openssl in ENDS:
        assert wire(wire.handler(openssl_bin=openssl), base64url(der)) == in_csr(der), openssl


def has_one_name(subject: Subject) -> bool:
    """A second CN is refused, and so is one with a NUL, or one that may be a host's; a subject without text is none."""
    names = [text for rdn in subject for kind, _, text in rdn if kind == CN]
    return (
        any(text for rdn in subject for _, _, text in rdn)
        and len(names) < 2
        and not any(set(name) & set("\0.:\u3002\uff0e\uff61") for name in names)
    )


subjects = st.lists(st.lists(attributes(), min_size=1, max_size=3), min_size=1, max_size=4).filter(has_one_name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(subject=subjects, extensions=st.sampled_from(sorted(EXTENSIONS)))
def test_any_subject_is_sent_as_it_is(subject: Subject, extensions: str, wire: Wire) -> None:
    """Subjects drawn at random, with each set of extensions."""
    der = csr_der(name_der(subject), EXTENSIONS[extensions])
    assert wire(wire.handler(), base64url(der)) == in_csr(der)


# --- The subject of a CSR that has none -----------------------------------------------------------------------------

IP_ONLY = x509.SubjectAlternativeName([x509.IPAddress(ip_address("192.0.2.1"))])
LONG = "x" * 60 + ".example"


@pytest.mark.parametrize(
    "names, configured, expected",  # without a subject the names have to be critical (RFC 5280, 4.2.1.6)
    [
        (["a.example", "b.example"], None, [[(CN, UTF8, "a.example")]]),
        (["*.a.example"], None, [[(CN, UTF8, "*.a.example")]]),
        ([LONG], None, []),
        ([], None, [[(CN, UTF8, "192.0.2.1")]]),
        (["a.example"], "/", []),
        (["a.example"], "C=DE, CN=fixed", [[(C, PRINTABLE, "DE")], [(CN, UTF8, "fixed")]]),
        (["a.example"], "/C=DE/CN=a\\/b", [[(C, PRINTABLE, "DE")], [(CN, UTF8, "a/b")]]),
    ],
    ids=["first name", "wildcard", "too long", "address", "none wanted", "configured", "slash form"],
)
def test_an_empty_subject_is_filled_or_its_names_are_critical(
    names: list[str], configured: str | None, expected: Subject, wire: Wire
) -> None:
    """It takes the first name, or what is configured; else the names are marked as critical."""
    extension = x509.SubjectAlternativeName([x509.DNSName(n) for n in names]) if names else IP_ONLY
    der = csr_der(name_der([]), [extension_der(extension)])
    critical = [] if expected else [extension_der(extension, critical=True)]
    right = in_csr(der)._replace(subject=name_der(expected), extensions=critical or in_csr(der).extensions)
    for openssl in ENDS:
        assert wire(wire.handler(openssl_bin=openssl, subject=configured), base64url(der)) == right, openssl


def test_names_are_not_critical_if_an_empty_subject_gets_one(wire: Wire) -> None:
    """instant-acme marks them as critical, for its CSR has no subject: with one they are not."""
    der = csr_der(name_der([]), [extension_der(IP_ONLY, critical=True)])
    right = in_csr(der)._replace(subject=name_der([[(CN, UTF8, "fixed")]]), extensions=[extension_der(IP_ONLY)])
    for openssl in ENDS:
        assert wire(wire.handler(openssl_bin=openssl, subject="CN=fixed"), base64url(der)) == right, openssl


def test_a_subject_of_an_empty_name_is_none(wire: Wire) -> None:
    """`CN=`, as some clients write it where there is none: it gets the first name, or what is configured."""
    der = csr_der(name_der([[(CN, UTF8, "")]]), [extension_der(IP_ONLY)])
    for configured, name in ((None, "192.0.2.1"), ("CN=fixed", "fixed")):
        asked = wire(wire.handler(subject=configured), base64url(der))
        assert asked.subject == name_der([[(CN, UTF8, name)]])


def test_configured_subject_is_for_empty_ones_only(wire: Wire) -> None:
    """A CSR with a subject keeps its own."""
    der = csr_der(name_der([[(CN, UTF8, "own")]]), [DNS])
    assert wire(wire.handler(subject="CN=fixed"), base64url(der)) == in_csr(der)


def test_the_recipient_has_the_right_types_of_strings_on_the_wire(wire: Wire) -> None:
    """A country is a PrintableString, everything else a UTF8String; test_names.py has every way of writing a name."""
    wire(wire.handler(recipient="C=DE, O=Demo\\, Inc., CN=a/b"), csr_pem(["a.example"]))
    recipient = read_der(wire.saved.read_bytes()).parts()[0].parts()[2]
    expected = [[(C, PRINTABLE, "DE")], [(O, UTF8, "Demo, Inc.")], [(CN, UTF8, "a/b")]]
    assert read_der(recipient.content).whole == name_der(expected)


# --- Proof of possession --------------------------------------------------------------------------------------------


def of_another_key(der: bytes) -> bytes:
    """The CSR with the public key of somebody else: what an impostor would send."""
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return der.replace(KEY.public_key().public_bytes(*form), other.public_bytes(*form))


@binaries
@pytest.mark.parametrize("command", ["ir", "cr", "p10cr"])
@pytest.mark.parametrize("tamper", [of_another_key, lambda der: der.replace(b"a.example", b"x.example")])
def test_broken_signature_never_reaches_the_ca(
    tamper: Callable[[bytes], bytes], command: str, openssl: str, ca: DemoCA, handlers: Handlers
) -> None:
    """Neither another key nor another name under it, in any kind of request."""
    der = csr_der(name_der([[(CN, UTF8, "a.example")]]), [DNS])
    handler = handlers(ca.options(), openssl_bin=openssl, cmd=command)
    error, bundle, raw, identifier = handler.enroll(base64url(tamper(der)))
    assert error and "signature" in error and "proof of possession" in error
    assert (bundle, raw, identifier, ca.messages, handlers.left()) == (None, None, None, [], [])
    assert handler.enroll(base64url(der))[0] is None  # as it is, it is fine


def test_p10cr_sends_the_csr_itself(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """Byte for byte, with the client's signature."""
    pem = csr_pem(["a.example"], "a/b+c")
    save_request(ca, tmp_path / "p10cr.der")
    assert handlers(ca.options(), cmd="p10cr").enroll(pem)[0] is None
    body = read_der((tmp_path / "p10cr.der").read_bytes()).parts()[1]
    assert base64url(read_der(body.content).whole) == as_host(pem)
