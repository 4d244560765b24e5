"""A CSR is read alike by acme2certifier, by openssl and by the handler, or refused before it is sent."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import logging
import re
import subprocess
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from acme import client, errors, messages
from acme2certifier.acme_srv import helper as acme_server
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from hypothesis import given
from hypothesis import strategies as st
from josepy.jwk import JWKRSA

import cmp_ca_handler
import programs
from conftest import BINARIES, ENDS, OPENSSL, Handlers, as_host, binaries, csr_pem, needs
from demo_ca import DemoCA, read_der, write_der
from host import CONTACT, HANDLER, Host
from shared import (
    BMP,
    CHANGES,
    DNS,
    IA5,
    KEY,
    LONG,
    PRINTABLE,
    TELETEX,
    UTF8,
    Asked,
    Wire,
    base64url,
    cases,
    changed,
    in_csr,
    name_der,
    oid,
    on_wire,
    wire,
)

__all__ = ["wire"]  # a fixture

PKCS9, MICROSOFT = "1.2.840.113549.1.9.14", "1.3.6.1.4.1.311.2.1.14"
SAN, BASIC_CONSTRAINTS, KEY_USAGE = "2.5.29.17", "2.5.29.19", "2.5.29.15"
CN = "2.5.4.3"
TRUE, FALSE = b"\x01\x01\xff", b"\x01\x01\x00"


def sequence(*parts: bytes) -> bytes:
    return write_der(0x30, b"".join(parts))


def ber(tag: int, content: bytes) -> bytes:
    """An element whose length has an octet more than DER allows."""
    octets = len(content).to_bytes(3, "big")
    return bytes([tag, 0x83]) + octets + content


def extension(kind: str, value: bytes, critical: bytes = b"") -> bytes:
    return sequence(oid(kind), critical, write_der(0x04, value))


def names(*names: str | bytes) -> bytes:
    """A subjectAltName extension: DNS names, and others as they are encoded."""
    parts = [write_der(0x82, name.encode()) if isinstance(name, str) else name for name in names]
    return extension(SAN, sequence(*parts))


def request(*extensions: bytes, kind: str = PKCS9) -> bytes:
    """An extension request: an attribute of a CSR."""
    return sequence(oid(kind), write_der(0x31, sequence(*extensions)))


def public_key(key: Any) -> bytes:
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes((key if hasattr(key, "public_bytes") else key.public_key()).public_bytes(*form))


ECDSA_SHA256, RSA_SHA256 = sequence(oid("1.2.840.10045.4.3.2")), sequence(oid("1.2.840.113549.1.1.11"), b"\x05\x00")
PLAIN = name_der([[(CN, UTF8, "a.example")]])
VERSION = b"\x02\x01\x00"


def signed(information: bytes, sign: Callable[[bytes], bytes] | None = None, algorithm: bytes = ECDSA_SHA256) -> bytes:
    """A CSR with a good signature, whatever it is that is signed."""
    signature = sign(information) if sign else KEY.sign(information, ec.ECDSA(hashes.SHA256()))
    return sequence(information, algorithm, write_der(0x03, b"\x00" + signature))


def csr(*attributes: bytes, subject: bytes = PLAIN, key: bytes = b"", version: bytes = VERSION) -> bytes:
    """A CSR of these attributes."""
    return signed(sequence(version, subject, key or public_key(KEY), write_der(0xA0, b"".join(attributes))))


def of_rsa_exponent_1() -> bytes:
    """A CSR for anybody's RSA modulus: with the exponent 1, the padded hash is its own signature."""
    modulus = rsa.generate_private_key(65537, 2048).public_key().public_numbers().n
    number = write_der(0x02, b"\x00" + modulus.to_bytes(256, "big"))
    key = sequence(number, write_der(0x02, b"\x01"))
    info = sequence(sequence(oid("1.2.840.113549.1.1.1"), b"\x05\x00"), write_der(0x03, b"\x00" + key))

    def sign(information: bytes) -> bytes:
        digest = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(information).digest()
        return b"\x00\x01" + b"\xff" * (253 - len(digest)) + b"\x00" + digest

    return signed(sequence(VERSION, PLAIN, info, write_der(0xA0, request(MINE))), sign, RSA_SHA256)


def of_point_at_infinity() -> bytes:
    """A CSR for the point at infinity of P-256, whose signature anybody can make: r = G.x, s = hash."""
    key = sequence(sequence(oid("1.2.840.10045.2.1"), oid("1.2.840.10045.3.1.7")), write_der(0x03, b"\0\0"))
    generator = bytes.fromhex("6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296")

    def sign(information: bytes) -> bytes:
        numbers = generator, hashlib.sha256(information).digest()
        return sequence(*(write_der(0x02, b"\0" * (number[0] >> 7) + number) for number in numbers))

    algorithm = sequence(oid("1.2.840.10045.4.3.2"))
    return signed(sequence(VERSION, PLAIN, key, write_der(0xA0, request(MINE))), sign, algorithm)


def of_foreign_dsa_generator() -> bytes:
    """A CSR for a victim's DSA value y: it is the generator too, so the private key is 1."""
    numbers = dsa.generate_private_key(1024).public_key().public_numbers()  # noqa: S505 - quickly made
    p, q, y = numbers.parameter_numbers.p, numbers.parameter_numbers.q, numbers.y
    foreign = dsa.DSAPublicNumbers(y, dsa.DSAParameterNumbers(p, q, y))
    key = dsa.DSAPrivateNumbers(1, foreign).private_key()
    information = sequence(VERSION, PLAIN, public_key(key), write_der(0xA0, request(MINE)))
    algorithm = sequence(oid("2.16.840.1.101.3.4.3.2"))
    return signed(information, lambda data: key.sign(data, hashes.SHA256()), algorithm)


def of_point(point: bytes, *algorithm: str) -> bytes:
    """A CSR for such a public key, with a signature that does not matter."""
    key = sequence(sequence(*map(oid, algorithm)), write_der(0x03, b"\0" + point))
    information = sequence(VERSION, PLAIN, key, write_der(0xA0, request(MINE)))
    return signed(information, lambda _: bytes(64), sequence(oid("1.3.101.112")))


MINE, VICTIM = names("a.example"), names("victim.example")
TELEPHONES = extension("1.3.6.1.5.5.7.1.26", sequence(write_der(0xA0, write_der(IA5, b"709J"))))  # TNAuthList, RFC 8226
SEQUENCE_OF_NAMES = sequence(write_der(0x82, b"a.example"))
UPN = write_der(0xA0, oid("1.3.6.1.4.1.311.20.2.3") + write_der(0xA0, write_der(UTF8, b"admin@victim.example")))
DIRECTORY_NAME = write_der(0xA4, name_der([[(CN, UTF8, "victim.example")]]))
CONSTRAINTS = extension(BASIC_CONSTRAINTS, sequence())


def cn(value: str | bytes, tag: int = UTF8) -> bytes:
    """A subject of one CN."""
    content = value if isinstance(value, bytes) else value.encode()
    return sequence(write_der(0x31, sequence(oid(CN), write_der(tag, content))))


REFUSED: dict[str, tuple[Callable[[], bytes] | bytes, str]] = {
    # extension requests
    "Microsoft's, then PKCS #9's": (csr(request(MINE, kind=MICROSOFT), request(VICTIM)), "2 extension requests"),
    "PKCS #9's, then Microsoft's": (csr(request(MINE), request(VICTIM, kind=MICROSOFT)), "2 extension requests"),
    "two of PKCS #9": (csr(request(MINE), request(VICTIM)), "2 extension requests"),
    "two of PKCS #9, no subject": (csr(request(MINE), request(VICTIM), subject=sequence()), "2 extension requests"),
    "two of Microsoft": (csr(*[request(MINE, kind=MICROSOFT)] * 2), "2 extension requests"),
    "two values": (
        csr(sequence(oid(PKCS9), write_der(0x31, sequence(MINE) + sequence(VICTIM)))),
        "not exactly one list",
    ),
    "value is no sequence": (csr(sequence(oid(PKCS9), write_der(0x31, write_der(0x04, MINE)))), "not exactly one list"),
    "values are no set": (csr(sequence(oid(PKCS9), sequence(sequence(MINE)))), "not exactly one list"),
    "trailing attribute fields": (
        csr(sequence(oid(PKCS9), write_der(0x31, sequence(MINE)), b"\x05\x00")),
        "not a PKCS #10 request",
    ),
    # extensions
    "two subjectAltNames": (csr(request(MINE, VICTIM)), "the extension 2.5.29.17 twice"),
    "unknown extension twice": (csr(request(MINE, *[extension("1.2.3.4", b"\x05\x00")] * 2)), "1.2.3.4 twice"),
    "critical FALSE": (csr(request(extension(SAN, SEQUENCE_OF_NAMES, FALSE))), "extension 2.5.29.17 is not DER"),
    "critical 01": (csr(request(extension(SAN, SEQUENCE_OF_NAMES, b"\x01\x01\x01"))), "extension 2.5.29.17 is not DER"),
    "critical twice": (csr(request(extension(SAN, SEQUENCE_OF_NAMES, TRUE * 2))), "extension 2.5.29.17 is not DER"),
    "value is no octet string": (csr(request(sequence(oid(SAN), SEQUENCE_OF_NAMES))), "extension 2.5.29.17 is not DER"),
    "more fields": (csr(request(sequence(oid(SAN), write_der(4, SEQUENCE_OF_NAMES), b"\x05\x00"))), "is not DER"),
    "long identifier": (
        csr(request(sequence(b"\x06\x04\x55\x1d\x80\x11", write_der(4, SEQUENCE_OF_NAMES)))),
        "object id",
    ),
    "long length of the request": (csr(sequence(oid(PKCS9), ber(0x31, sequence(MINE)))), "BER, not DER"),
    "long length of an extension": (csr(request(ber(0x30, oid(SAN) + write_der(4, SEQUENCE_OF_NAMES)))), "BER, not"),
    "broken basicConstraints": (csr(request(MINE, extension(BASIC_CONSTRAINTS, b"\x30\x03\x01"))), "2.5.29.19 is malf"),
    "empty basicConstraints": (csr(request(MINE, extension(BASIC_CONSTRAINTS, b""))), "not one DER sequence"),
    "CA 01": (csr(request(MINE, extension(BASIC_CONSTRAINTS, sequence(b"\x01\x01\x01")))), "basicConstraints"),
    "CA TRUE": (csr(request(MINE, extension(BASIC_CONSTRAINTS, sequence(TRUE)))), "asks for a CA certificate"),
    "keyCertSign": (csr(request(MINE, extension(KEY_USAGE, b"\x03\x02\x01\x06"))), "asks for a CA certificate"),
    "bits that are no bits": (csr(request(MINE, extension(KEY_USAGE, b"\x03\x02\x05\xbf"))), "keyUsage"),
    "name constraints": (csr(request(MINE, extension("2.5.29.30", sequence()))), "nameConstraints"),
    "SID": (csr(request(MINE, extension("1.3.6.1.4.1.311.25.2", sequence()))), "Active Directory SID"),
    # subjectAltNames
    "long length of the names": (csr(request(extension(SAN, ber(0x30, SEQUENCE_OF_NAMES[2:])))), "BER, not DER"),
    "long length of a name": (csr(request(names(ber(0x82, b"a.example")))), "BER, not DER"),
    "one octet too many for a length": (csr(request(names(b"\x82\x81\x09a.example"))), "BER, not DER"),
    "indefinite length": (csr(request(extension(SAN, b"\x30\x80" + SEQUENCE_OF_NAMES[2:] + b"\0\0"))), "malformed"),
    "cut short": (csr(request(extension(SAN, SEQUENCE_OF_NAMES[:-1]))), "2.5.29.17 is malformed"),
    "trailing octets": (csr(request(extension(SAN, SEQUENCE_OF_NAMES + b"\x05\x00"))), "not one DER sequence"),
    "names in a set": (csr(request(extension(SAN, write_der(0x31, SEQUENCE_OF_NAMES[2:])))), "not one DER sequence"),
    "no names": (csr(request(names())), "subjectAltName is malformed"),
    "empty name": (csr(request(names("a.example", ""))), "DNS '' is malformed"),
    "NUL": (csr(request(names("a.example\0.victim.example"))), "a.example\\x00.victim.example' is malformed"),
    "8 bits": (csr(request(names(write_der(0x82, "bücher.example".encode())))), "DNS 'b\\xc3\\xbccher.example' is"),
    "8 bits, Latin-1": (csr(request(names(write_der(0x82, b"v\xe9.example")))), "DNS 'v\\xe9.example' is malformed"),
    "8 bits in an e-mail address": (csr(request(names(write_der(0x81, b"\xfc@a.example")))), "email '\\xfc@a.example'"),
    "line break": (csr(request(names("a.example\nb.example"))), "is malformed"),
    "blank": (csr(request(names("a.example b.example"))), "is malformed"),
    "address of 5 octets": (csr(request(names(write_der(0x87, b"\1\2\3\4\5")))), "IP '\\x01\\x02\\x03\\x04\\x05' is"),
    "network": (csr(request(names(write_der(0x87, b"\x0a\0\0\0\xff\0\0\0")))), "is malformed"),
    "constructed name": (csr(request(names(write_der(0xA2, b"\x16\x01a")))), "subjectAltName [2] '"),
    "primitive otherName": (csr(request(names(write_der(0x80, b"x")))), "subjectAltName [0] '"),
    "x400Address": (csr(request(names("a.example", write_der(0xA3, sequence())))), "subjectAltName [3] '"),
    "ediPartyName": (csr(request(names("a.example", write_der(0xA5, b"\x81\x01a")))), "subjectAltName [5] '"),
    "universal tag": (csr(request(names("a.example", write_der(IA5, b"a.example")))), "subjectAltName [22] '"),
    "URI": (csr(request(names("a.example", write_der(0x86, b"spiffe://victim")))), "URI 'spiffe://victim' is not a"),
    "otherName": (
        csr(request(names("a.example", UPN))),
        "admin@victim.example' is not a type that cmp_san_types allows: DNS, IP, email",
    ),
    "directoryName": (csr(request(names("a.example", DIRECTORY_NAME))), "subjectAltName dirName"),
    "registeredID": (csr(request(names("a.example", write_der(0x88, b"\x2a\x03")))), "subjectAltName RID"),
    "registeredID that is none": (csr(request(names("a.example", write_der(0x88, b"\xe9")))), "subjectAltName RID"),
    # subject
    "two CNs": (csr(request(MINE), subject=name_der([[(CN, UTF8, "a.example")], [(CN, UTF8, "v.example")]])), "2 comm"),
    "two CNs in one": (csr(subject=name_der([[(CN, UTF8, "a.example"), (CN, UTF8, "v.example")]])), "2 common names"),
    "CN with NUL": (csr(request(MINE), subject=cn("a.example\0.v.example")), "common name (CN) is no string"),
    "CN of 8 bits": (csr(subject=cn("bücher.example", IA5)), "common name (CN) is no string"),
    "CN in broken UTF-8": (csr(subject=cn(b"\xff.example")), "common name (CN) is no string"),
    "CN in UTF-8 or Latin-1": (csr(subject=cn("bücher.example", TELETEX)), "common name (CN) is no string"),
    "CN in Latin-1": (csr(request(DNS), subject=cn("Müller".encode("latin-1"), TELETEX)), "common name (CN) is no str"),
    "CN of half a character": (csr(subject=cn(b"\0a\0", BMP)), "common name (CN) is no string"),
    "CN is a number": (csr(subject=cn(b"\1", 0x02)), "common name (CN) is no string"),
    "host that is no name": (csr(request(MINE), subject=cn("victim.example")), "(CN) victim.example is not among its"),
    "host with a dot behind": (
        csr(request(MINE), subject=cn("victim.example.")),
        "(CN) victim.example is not among its",
    ),
    "host beside a URI alone": (
        csr(request(names(write_der(0x86, b"urn:x"))), subject=cn("victim.example")),
        "not a type that cmp_san_types allows",
    ),
    "host with a leader for a dot": (
        csr(request(MINE), subject=cn("victim\u2024example")),
        "(CN) victim.example is not",
    ),
    "host with other dots": (csr(request(MINE), subject=cn("victim\u3002example")), "(CN) victim.example is not among"),
    "wildcard": (csr(request(MINE), subject=cn("*.a.example")), "(CN) *.a.example is not among its subjectAltNames"),
    "address": (csr(request(MINE), subject=cn("192.0.2.1")), "(CN) 192.0.2.1 is not among its subjectAltNames"),
    "address of IPv6": (csr(request(MINE), subject=cn("2001:db8::1")), "(CN) 2001:db8::1 is not among its"),
    # the rest
    "another version": (
        csr(request(MINE), version=b"\x02\x01\x02"),
        "not a PKCS #10 request of version 1",
    ),
    "no version": (csr(request(MINE), version=b"\x05\x00"), "not a PKCS #10 request"),
    "telephone numbers and a name": (csr(request(MINE, TELEPHONES)), "acme2certifier checks only one of them"),
    "telephone numbers and a host": (csr(request(TELEPHONES), subject=cn("v.example")), "checks only one of them"),
    "another tag for attributes": (
        signed(sequence(VERSION, PLAIN, public_key(KEY), write_der(0xA1, request(MINE)))),
        "not a PKCS #10 request",
    ),
    "attributes twice": (
        signed(sequence(VERSION, PLAIN, public_key(KEY), *[write_der(0xA0, request(MINE))] * 2)),
        "not a PKCS #10 request",
    ),
    "trailing data": (csr(request(MINE)) + b"\x05\x00", "not one DER sequence"),
    "more behind the signature": (
        sequence(read_der(csr(request(MINE))).content, b"\x05\x00"),
        "not a PKCS #10 request",
    ),
    "nested without end": (
        csr(
            sequence(
                oid("1.2.3.4"), write_der(0x31, functools.reduce(lambda inner, _: sequence(inner), range(3000), b""))
            )
        ),
        "nested too deeply",
    ),
    "long length of all": (ber(0x30, read_der(csr(request(MINE))).content), "BER, not DER"),
    # keys
    "RSA exponent 1": (of_rsa_exponent_1, "so its signature proves nothing"),
    "point at infinity": (of_point_at_infinity, "anybody can sign"),
    "binary curve": (
        of_point(b"\4" + bytes(60), "1.2.840.10045.2.1", "1.3.132.0.26"),
        "anybody can sign, or is unknown",
    ),
    **{
        f"Ed25519, a point of order {order}": (of_point(bytes.fromhex(point), "1.3.101.112"), "anybody can sign")
        for order, point in (
            (1, "01" + 31 * "00"),
            (2, "ec" + 30 * "ff" + "7f"),
            (4, 32 * "00"),
            ("4, its other sign", 31 * "00" + "80"),
            ("4, p for 0", "ed" + 30 * "ff" + "7f"),
            ("8", "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
            ("8, the other one", "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
        )
    },
    "Ed448, a point of order 4": (of_point(bytes(57), "1.3.101.113"), "anybody can sign"),
    "Ed448, a point of order 4, its other sign": (of_point(bytes(56) + b"\x80", "1.3.101.113"), "anybody can sign"),
    "ML-DSA, a key of zeros": (of_point(bytes(range(32)) + bytes(1280), "2.16.840.1.101.3.4.3.17"), "anybody can sign"),
    "OCSPSigning": (
        csr(request(MINE, extension("2.5.29.37", sequence(oid("1.3.6.1.5.5.7.3.1"), oid("1.3.6.1.5.5.7.3.9"))))),
        "OCSPSigning",
    ),
    "foreign DSA generator": (of_foreign_dsa_generator, "key has explicit parameters, so its signature"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_csr_is_refused_before_anything_is_sent(case: str, ca: DemoCA, handlers: Handlers) -> None:
    """Each CSR of the table REFUSED: one error line with the reason, no message, no file."""
    made, words = REFUSED[case]
    der = made() if callable(made) else made
    error, *rest = handlers(ca.options()).enroll(base64url(der))
    assert error and error.startswith("not a usable CSR: ") and words in error
    assert "\n" not in error
    assert (rest, ca.messages, handlers.left()) == ([None, None, None], [], [])


# Each of these is DER, but the library of acme2certifier gives up on all extensions, so the name in it is not checked.
UNSEEN: dict[str, bytes] = {
    "CA FALSE encoded": csr(request(MINE, extension(BASIC_CONSTRAINTS, sequence(FALSE)))),
    "path length": csr(request(MINE, extension(BASIC_CONSTRAINTS, sequence(b"\x02\x01\x00")))),
    "bits behind the last one": csr(request(MINE, extension(KEY_USAGE, b"\x03\x02\x05\xa2"))),
    "encipherOnly alone": csr(request(MINE, extension(KEY_USAGE, b"\x03\x02\x00\x01"))),
    "decipherOnly alone": csr(request(MINE, extension(KEY_USAGE, b"\x03\x03\x07\x00\x80"))),
    "no key purpose": csr(request(MINE, extension("2.5.29.37", sequence()))),
    "unknown TLS feature": csr(request(MINE, extension("1.3.6.1.5.5.7.1.24", sequence(b"\x02\x01\x06")))),
    "number with a zero before it": csr(
        request(MINE, extension("1.3.6.1.4.1.311.21.7", sequence(oid("1.2.3"), b"\x02\x02\x00\x05")))
    ),
}
UNCHECKED = "acme2certifier reads 0 of the CSR's 1 subjectAltNames: the others are not checked"


class Reader(NamedTuple):
    """A helper of acme2certifier that reads a CSR's names, and nothing else."""

    csr_san_get: Callable[[logging.Logger, str], list[str]] = acme_server.csr_san_get


@pytest.mark.parametrize("case", UNSEEN)
def test_a_csr_whose_names_acme2certifier_does_not_read_is_refused(case: str, ca: DemoCA, handlers: Handlers) -> None:
    """A CSR whose names acme2certifier gives up on: nobody has checked them, so nothing is sent."""
    handler = handlers(ca.options())
    handler._helper = Reader()  # type: ignore[assignment]
    assert handler.enroll(base64url(UNSEEN[case])) == (UNCHECKED, None, None, None)
    assert (ca.messages, handlers.left()) == ([], [])


UNLOADABLE = {
    "no attributes": signed(sequence(VERSION, PLAIN, public_key(KEY))),
    "PrintableString of 8 bits": csr(
        request(MINE), subject=sequence(write_der(0x31, sequence(oid("2.5.4.10"), write_der(PRINTABLE, b"\xe9"))))
    ),
    "unsorted attributes": csr(request(MINE), sequence(oid("1.2.3"), write_der(0x31, b"\5\0"))),
}


@pytest.mark.parametrize("case", UNLOADABLE)
def test_a_csr_that_acme2certifier_cannot_load_is_refused(case: str, ca: DemoCA, handlers: Handlers) -> None:
    """A CSR on which acme2certifier fails: the error says so, and nothing is sent."""
    handler = handlers(ca.options())
    handler._helper = Reader()  # type: ignore[assignment]
    error = str(handler.enroll(base64url(UNLOADABLE[case]))[0])
    assert error.startswith("acme2certifier cannot read this CSR: ") and "internal" not in error
    assert (ca.messages, handlers.left()) == ([], [])


@pytest.mark.parametrize("case", ["RSA exponent 1", "foreign DSA generator"])
def test_weak_possession_is_real(case: str, tmp_path: Path) -> None:
    """openssl accepts these signatures, made without the private key that belongs to the victim's number."""
    made = REFUSED[case][0]
    assert callable(made)
    (tmp_path / "csr.der").write_bytes(made())
    command = [OPENSSL, "req", "-inform", "DER", "-in", "csr.der", "-verify", "-noout"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "verify OK" in run.stdout + run.stderr


# --- Kinds of names


@pytest.mark.parametrize(
    "kinds, refused",
    [
        (None, ["URI", "otherName", "dirName", "RID"]),
        ("URI", ["otherName", "dirName", "RID"]),
        ("dns, othername URI", ["IP", "email", "dirName", "RID"]),
        ("DNS IP email URI otherName dirName RID", []),
        ("DNS", ["IP", "email", "URI", "otherName", "dirName", "RID"]),
    ],
)
def test_kinds_of_names_are_sent_if_they_are_allowed(kinds: str | None, refused: list[str], wire: Wire) -> None:
    """A CSR with one of seven kinds of names: sent if cmp_san_types allows the kind, else refused with the name."""
    every = {
        "DNS": write_der(0x82, b"*.a.example"),
        "IP": write_der(0x87, ip_address("2001:db8::1").packed),
        "email": write_der(0x81, b"a@a.example"),
        "URI": write_der(0x86, b"spiffe://a.example/x"),
        "otherName": UPN,
        "dirName": DIRECTORY_NAME,
        "RID": write_der(0x88, b"\x2a\x03"),
    }
    handler = wire.handler(san_types=kinds)
    for kind, name in every.items():
        der = csr(request(names(name)), subject=cn("Build server"))
        if kind in refused:
            error = str(handler.enroll(base64url(der))[0])
            assert f"its subjectAltName {kind} '" in error and "is not a type that cmp_san_types allows: " in error
        else:
            assert wire(handler, base64url(der)) == in_csr(der)


@pytest.mark.parametrize("value, word", [("URL", "URI"), ("DNS, othername, dir", "dirName"), ("", "")])
def test_an_unknown_kind_of_names_is_a_configuration_error(
    value: str, word: str, ca: DemoCA, handlers: Handlers
) -> None:
    """A misspelt or empty cmp_san_types: check and enrolment list the kinds, and suggest the nearest."""
    handler = handlers(ca.options(), san_types=value)
    error = str(handler.handler_check())
    assert "cmp_san_types: '" in error and "' is none of email, DNS, URI, IP, RID, otherName, dirName" in error
    assert (f"did you mean {word}?" in error) == bool(word)
    assert handler.enroll(csr_pem(["a.example"]))[0] == f"configuration error: {error}"


def test_default_kinds_are_those_that_acme2certifier_checks() -> None:
    """Measured: which names of a CSR acme2certifier compares with the order, and that it takes the CN for one."""
    every = [
        x509.DNSName("a.example"),
        x509.IPAddress(ip_address("192.0.2.1")),
        x509.RFC822Name("a@a.example"),
        x509.UniformResourceIdentifier("https://a.example"),
        x509.RegisteredID(x509.ObjectIdentifier("1.2.3")),
        x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x05\x00"),
        x509.DirectoryName(x509.Name([])),
    ]
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cn.example")])
    )
    request = builder.add_extension(x509.SubjectAlternativeName(every), False).sign(KEY, hashes.SHA256())
    text = base64url(request.public_bytes(serialization.Encoding.DER))
    seen = {name.partition(":")[0].lower() for name in acme_server.csr_san_get(logging.getLogger(), text)}
    assert seen == {kind.lower() for kind in cmp_ca_handler.CHECKED_KINDS}
    assert acme_server.csr_cn_get(logging.getLogger(), text) == "cn.example"


class Blind(NamedTuple):
    """A helper of acme2certifier that cannot read a CSR's extensions: a stand-in for libraries to come."""

    seen: list[str]
    load: Callable[..., Any]

    def load_config(self, *arguments: object) -> Any:
        return self.load(None, *arguments[:1])

    def csr_san_get(self, _logger: logging.Logger, _csr: str) -> list[str]:
        return self.seen


@pytest.mark.parametrize(
    "seen, sent", [([], False), (["DNS:a.example"], False), (["DNS:a.example", "DNS:b.example"], True)]
)
def test_names_that_acme2certifier_does_not_see_are_refused(
    seen: list[str], sent: bool, ca: DemoCA, handlers: Handlers
) -> None:
    """acme2certifier reads none or one of the CSR's two names: refused; both: issued."""
    handler = handlers(ca.options())
    handler._helper = Blind(seen, cmp_ca_handler._load_config)  # type: ignore[assignment]
    error, bundle, *_ = handler.enroll(csr_pem(["a.example", "b.example"]))
    if sent:
        assert error is None and bundle
    else:
        assert error == f"acme2certifier reads {len(seen)} of the CSR's 2 subjectAltNames: the others are not checked"
        assert (ca.messages, handlers.left()) == ([], [])


# --- Honest CSRs


def tool(tmp_path: Path, *command: str | Path) -> str:
    """Run a program that makes a CSR, and give its output."""
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert run.returncode == 0, run.stderr + run.stdout
    return run.stdout


def made_by(openssl: str, tmp_path: Path, key: str, *options: str) -> bytes:
    """The CSR that `openssl req` makes."""
    command = [openssl, "req", "-new", "-newkey", *key.split(), "-nodes", "-keyout", "key.pem", "-outform", "DER"]
    tool(tmp_path, *command, "-out", "made.csr", *options)
    return (tmp_path / "made.csr").read_bytes()


FORMS: dict[str, list[str]] = {
    "acme.sh, dehydrated": ["-subj", "/CN=a.example", "-addext", "subjectAltName=DNS:a.example,DNS:b.example"],
    "must-staple": ["-subj", "/CN=a", "-addext", "subjectAltName=DNS:a.example", "-addext", "tlsfeature=5"],
    "usual extensions": [
        *("-subj", "/C=DE/O=Demo/CN=a.example"),
        *("-addext", "basicConstraints=CA:FALSE", "-addext", "keyUsage=critical,digitalSignature,keyEncipherment"),
        *("-addext", "subjectAltName=critical,DNS:*.a.example,DNS:a.example"),
        *("-addext", "extendedKeyUsage=serverAuth,clientAuth"),
        *("-addext", "subjectKeyIdentifier=hash", "-addext", "certificatePolicies=2.23.140.1.2.1,1.2.3"),
    ],
    "of an old certificate": [
        *("-subj", "/CN=a.example", "-addext", "subjectAltName=DNS:a.example"),
        *("-addext", "crlDistributionPoints=URI:http://a.example/crl", "-addext", "noCheck=ignored"),
        *("-addext", "authorityInfoAccess=OCSP;URI:http://a.example/,caIssuers;URI:http://a.example/ca"),
    ],
    "addresses": ["-subj", "/CN=192.0.2.1", "-addext", "subjectAltName=IP:192.0.2.1,IP:2001:db8::1,email:a@a.example"],
    "no names": ["-subj", "/CN=a.example"],
    "e-mail in the subject": ["-subj", "/C=DE/CN=a.example/emailAddress=admin@a.example"],
}
KEYS = ["rsa:2048", "ec -pkeyopt ec_paramgen_curve:P-256", "ec -pkeyopt ec_paramgen_curve:P-521", "ed25519", "ed448"]
KEYS += ["rsa-pss -pkeyopt rsa_keygen_bits:2048"]


@pytest.mark.parametrize("form", FORMS)
def test_a_csr_of_openssl_reaches_the_ca_as_it_is(form: str, wire: Wire, tmp_path: Path) -> None:
    """What ACME clients make with `openssl req` reaches the CA as it is."""
    der = made_by(OPENSSL, tmp_path, KEYS[1], *FORMS[form])
    assert wire(wire.handler(san_types=None), base64url(der)) == with_lonely_name(in_csr(der))


@binaries
def test_a_lonely_name_that_openssl_would_misread_is_not_repeated(openssl: str, wire: Wire, tmp_path: Path) -> None:
    """As a subjectAltName it would be another address, a URI, or nothing: what is sent is the CN alone."""
    for name in ("010.0.0.1", "12:34:56:78:9a:bc", "critical"):
        der = made_by(OPENSSL, tmp_path, KEYS[1], "-subj", f"/CN={name}")
        assert wire(wire.handler(openssl_bin=openssl), base64url(der)) == in_csr(der)


@binaries
@pytest.mark.parametrize("key", KEYS)
def test_all_kinds_of_keys_reach_the_ca(key: str, openssl: str, wire: Wire, tmp_path: Path) -> None:
    """RSA, elliptic curves, Edwards curves, PSS: the key and all the rest reach the CA as they are."""
    der = made_by(OPENSSL, tmp_path, key, *FORMS["usual extensions"])
    assert wire(wire.handler(openssl_bin=openssl, san_types=None), base64url(der)) == in_csr(der)


NEWEST = BINARIES[-1]  # the machine's own comes first, which may be any; of the others the newest is the last


@pytest.mark.skipif(not BINARIES[1:], reason="OpenSSL 3.5 is not there")
@pytest.mark.parametrize("key", ["ml-dsa-44", "ml-dsa-65", "slh-dsa-sha2-128f"])
def test_keys_after_the_quantum_computer_reach_the_ca(key: str, wire: Wire, tmp_path: Path) -> None:
    """With an openssl that knows them."""
    der = made_by(NEWEST, tmp_path, key, *FORMS["usual extensions"])
    assert wire(wire.handler(openssl_bin=NEWEST, san_types=None), base64url(der)) == in_csr(der)


@needs("keytool")
@pytest.mark.parametrize("algorithm", ["RSA", "EC"])
def test_a_csr_of_keytool_reaches_the_ca_as_it_is(algorithm: str, wire: Wire, tmp_path: Path) -> None:
    """Java sends extensions of its own accord, and a subject of PrintableStrings and UTF8Strings."""
    keytool = programs.find("keytool")
    store = ["-keystore", "store.p12", "-storepass", "password", "-alias", "a"]
    subject = ["-dname", "CN=a.example, OU=Müller & Söhne, C=DE"]
    tool(tmp_path, keytool, "-genkeypair", "-keyalg", algorithm, *subject, *store)
    extensions = ["-ext", "SAN=dns:a.example,dns:b.example,ip:192.0.2.1,email:a@a.example", "-ext", "BC=ca:false"]
    extensions += ["-ext", "KU:critical=digitalSignature", "-ext", "EKU=serverAuth"]
    tool(tmp_path, keytool, "-certreq", "-file", "made.csr", *extensions, *store)
    pem = (tmp_path / "made.csr").read_text()
    assert "NEW CERTIFICATE REQUEST" in pem
    assert wire(wire.handler(san_types=None), pem) == in_csr(base64.urlsafe_b64decode(as_host(pem) + "=="))


@needs("certtool")
def test_a_csr_of_gnutls_reaches_the_ca(wire: Wire, tmp_path: Path) -> None:
    """With a challengePassword, and a basicConstraints that says CA:FALSE."""
    lines = ["cn = a.example", "dns_name = a.example", "ip_address = 192.0.2.1", "email = a@a.example"]
    lines += ["signing_key", "tls_www_server", "challenge_password = secret"]
    (tmp_path / "template").write_text("\n".join(lines) + "\n")
    certtool = programs.find("certtool")
    tool(tmp_path, certtool, "--generate-privkey", "--key-type", "ecdsa", "--outfile", "key.pem")
    command = [certtool, "--generate-request", "--load-privkey", "key.pem", "--template", "template", "--outder"]
    tool(tmp_path, *command, "--outfile", "made.csr")
    der = (tmp_path / "made.csr").read_bytes()
    assert wire(wire.handler(san_types=None), base64url(der)) == in_csr_of_any_attribute(der)


WINDOWS = [
    sequence(oid("1.3.6.1.4.1.311.13.2.3"), write_der(0x31, write_der(IA5, b"10.0.20348.2"))),
    sequence(
        oid("1.3.6.1.4.1.311.21.20"),
        write_der(
            0x31,
            sequence(
                write_der(0x02, b"\5"),
                *[write_der(UTF8, text) for text in (b"www.corp.example", b"CORP\\admin", b"certreq.exe")],
            ),
        ),
    ),
    sequence(
        oid("1.3.6.1.4.1.311.13.2.2"),
        write_der(
            0x31,
            sequence(
                write_der(0x02, b"\1"),
                write_der(BMP, "Microsoft RSA SChannel Cryptographic Provider".encode("utf-16-be")),
                write_der(0x03, b"\0"),
            ),
        ),
    ),
]
TEMPLATES = [
    extension("1.3.6.1.4.1.311.20.2", write_der(BMP, "WebServer".encode("utf-16-be"))),
    extension("1.3.6.1.4.1.311.21.7", sequence(oid("1.3.6.1.4.1.311.21.8.1.2"), b"\x02\x01\x64", b"\x02\x01\x02")),
    extension("1.3.6.1.4.1.311.21.10", sequence(sequence(oid("1.3.6.1.5.5.7.3.1")))),
    extension("1.2.840.113549.1.9.15", sequence(sequence(oid("2.16.840.1.101.3.4.1.42")))),
]
USAGE = extension(KEY_USAGE, b"\x03\x02\x05\xa0", TRUE)
PASSWORD = sequence(oid("1.2.840.113549.1.9.7"), write_der(0x31, write_der(PRINTABLE, b"secret")))
UNSTRUCTURED = sequence(oid("1.2.840.113549.1.9.2"), write_der(0x31, write_der(UTF8, b"router.example")))

# As other programs make them, which are not here: their bytes are those that these programs write.
HONEST: dict[str, bytes] = {
    "certbot": csr(request(names("a.example", "b.example")), subject=sequence()),
    "cert-manager": csr(request(names("a.example"), USAGE), subject=sequence()),
    "Windows certreq": csr(*WINDOWS, request(*TEMPLATES, names("a.example"), USAGE, kind=MICROSOFT)),
    "Windows, PKCS #9's": csr(*WINDOWS, request(*TEMPLATES, names("a.example"), USAGE)),
    "mbedTLS": csr(request(extension("2.16.840.1.113730.1.1", b"\x03\x02\x06\x40"), USAGE), subject=cn("a.example")),
    "network equipment": csr(PASSWORD, UNSTRUCTURED, request(names("a.example"))),
    "no attributes": csr(),
    "attributes left out": signed(sequence(VERSION, PLAIN, public_key(KEY))),
    "empty extension request": csr(request()),
    "extension request without a list": csr(sequence(oid(PKCS9), write_der(0x31, b""))),
    "BMPString": csr(request(DNS), subject=cn("Müller".encode("utf-16-be"), BMP)),
    "plain TeletexString": csr(request(DNS), subject=cn("a.example", TELETEX)),
    "400 names": csr(request(names("a.example", *[f"host-{number}.some.where.example" for number in range(400)]))),
    "A-label and underscore": csr(
        request(names("xn--bcher-kva.example", "_x.a.example", "*.B.EXAMPLE", "A.example", "a.b."))
    ),
    "no subject identifier": csr(request(DNS, extension("2.5.29.14", b"\x04\x00"))),
    "unknown extension that is no DER": csr(request(DNS, extension("1.2.3.4", b"\x01\x02"))),
}


@pytest.mark.parametrize("form", HONEST)
def test_an_honest_csr_reaches_the_ca(form: str, wire: Wire) -> None:
    """Unusual, but every reader reads it alike: all of it reaches the CA."""
    expected = with_lonely_name(in_csr_of_any_attribute(HONEST[form]))
    if expected.subject == sequence():
        expected = expected._replace(subject=PLAIN)
    for openssl in ENDS:
        assert wire(wire.handler(openssl_bin=openssl, san_types=None), base64url(HONEST[form])) == expected, openssl


def with_lonely_name(asked: Asked) -> Asked:
    """A CN that looks like a host and is alone becomes a subjectAltName: clients look at these only."""
    lonely = not any(oid(SAN) in part for part in asked.extensions) and b"a.example" in asked.subject
    return asked._replace(extensions=[names("a.example"), *asked.extensions]) if lonely else asked


def in_csr_of_any_attribute(der: bytes) -> Asked:
    """As `in_csr`, where the extension request is not the first attribute."""
    _, name, key, *attributes = read_der(der).parts()[0].parts()
    found = [a.parts() for a in (attributes[0].parts() if attributes else [])]
    lists = [part for kind, values in found if kind.whole in (oid(PKCS9), oid(MICROSOFT)) for part in values.parts()]
    return Asked(name.whole, key.content, [part.whole for part in (lists[0].parts() if lists else [])])


# --- Any CSR: what the handler lets through, everybody reads alike

GENERAL = st.sampled_from(["a.example", "b.example", "victim.example", "*.a.example"]).map(
    lambda name: write_der(0x82, name.encode())
)
GENERAL |= st.sampled_from(
    [
        write_der(0x87, b"\xc0\0\2\1"),
        write_der(0x87, ip_address("2001:db8::1").packed),
        write_der(0x81, b"a@a.example"),
        write_der(0x86, b"https://a.example"),
        write_der(0x88, b"\x2a\x03"),
        UPN,
        DIRECTORY_NAME,
    ]
)
ODD_GENERAL = GENERAL | st.builds(
    write_der,
    st.sampled_from([0x81, 0x82, 0x86, 0x87, 0x88, 0xA0, 0xA2, 0xA3, 0xA4, 0xA5, 0x16]),
    st.sampled_from([b"", b"a\0b", b"\xe9", b"a b", b"a,DNS:b", b"\xc3\xa9", b"\x30\x00", b"\x06\x01\x2a"])
    | st.binary(max_size=20),
)
LISTS = st.lists(GENERAL, min_size=1, max_size=4) | st.lists(ODD_GENERAL, max_size=4)
VALUES: dict[str, list[bytes]] = {
    BASIC_CONSTRAINTS: [sequence(), sequence(TRUE), sequence(FALSE), sequence(b"\x02\x01\0"), b"\x30\x03\x01"],
    KEY_USAGE: [b"\3\2\5\xa0", b"\3\2\0\1", b"\3\2\1\6", b"\3\1\0", b"\3\2\0\x09", b"\3\3\7\0\x80", b"\3\2\5\xbf"],
    "2.5.29.37": [sequence(), sequence(oid("1.3.6.1.5.5.7.3.1")), sequence(b"\x06\0"), sequence(b"\x06\1\x80")],
    "1.3.6.1.5.5.7.1.24": [sequence(b"\2\1\5"), sequence(b"\2\1\5", b"\2\1\x11"), sequence(b"\2\1\6"), sequence()],
    "2.5.29.14": [write_der(4, b"x" * 20), b"\4\0", b"\5\0"],
    "2.5.29.35": [sequence(), sequence(write_der(0x80, b"x")), sequence(write_der(0x82, b"\1"))],
    "2.5.29.32": [sequence(sequence(oid("1.2.3"))), sequence(), sequence(sequence())],
    "2.5.29.31": [sequence(sequence(write_der(0xA0, write_der(0xA0, write_der(0x86, b"http://a"))))), sequence(), b""],
    "2.5.29.30": [sequence(write_der(0xA0, sequence(write_der(0x82, b"a")))), b"\5\0"],
    "2.5.29.18": [SEQUENCE_OF_NAMES, sequence(write_der(0xA3, b""))],
    "2.5.29.54": [b"\2\1\0", b"\2\1\xff", b"\5\0"],
    "2.5.29.36": [sequence(), sequence(b"\x80\1\0")],
    "2.5.29.46": [sequence(), b"\5\0"],
    "2.5.29.16": [sequence(), b"\5\0"],
    "1.3.6.1.5.5.7.1.1": [sequence(sequence(oid("1.3.6.1.5.5.7.48.1"), write_der(0x86, b"http://a"))), sequence()],
    "1.3.6.1.5.5.7.1.11": [sequence(), b"\5\0"],
    "1.3.6.1.5.5.7.48.1.5": [b"\5\0", b"\4\0", b""],
    "1.3.6.1.4.1.311.21.7": [sequence(oid("1.2.3"), b"\2\1\1"), sequence(oid("1.2.3"), b"\2\1\xff"), b"\5\0"],
    "1.3.6.1.4.1.11129.2.4.2": [b"\4\2\0\0", b"\5\0"],
    "1.3.6.1.4.1.11129.2.4.3": [b"\5\0", b"\4\0"],
    "1.3.36.8.3.3": [sequence(sequence()), b"\5\0"],
    "1.3.6.1.4.1.311.25.2": [sequence()],
    "1.2.3.4": [b"\5\0", b"", b"\1\1\1"],
}
CRITICAL = st.sampled_from([b"", b"", b"", TRUE, TRUE, FALSE, b"\1\1\1", b"\1\1\x80"])


def rarely(odd: st.SearchStrategy[Any], usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One of ten is odd: a CSR of odd parts only would teach nothing."""
    return st.integers(0, 9).flatmap(lambda number: usual if number else odd)


def mutated(parts: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """These bytes, and rarely other ones: damaged, or with a length of BER."""
    damaged = st.builds(changed, parts, CHANGES.map(lambda changes: changes[:1]))
    longer = parts.filter(bool).map(lambda part: ber(part[0], part[2:] if part[1] < 0x80 else part[1:]))
    return rarely(damaged | longer, parts)


SANS = LISTS.map(lambda parts: sequence(*parts))
NAMED = st.builds(
    lambda value, critical: extension(SAN, value, critical), mutated(SANS), rarely(CRITICAL, st.just(b""))
)
USUAL = st.sampled_from([(kind, values[0]) for kind, values in VALUES.items()])
UNUSUAL = st.sampled_from([(kind, value) for kind, values in VALUES.items() for value in values])
OTHER = st.builds(
    lambda pair, value, critical: extension(pair[0], value or pair[1], critical),
    rarely(UNUSUAL, USUAL) | UNUSUAL,
    rarely(st.binary(max_size=12), st.just(b"")),
    rarely(CRITICAL, st.just(b"")),
)
EXTENSIONS = st.builds(lambda san, others: [*san, *others], st.lists(NAMED, max_size=1), st.lists(OTHER, max_size=2))
EXTENSIONS = rarely(st.lists(NAMED | OTHER, max_size=4), EXTENSIONS)
KINDS = st.sampled_from([PKCS9, PKCS9, MICROSOFT])
REQUESTS = mutated(st.builds(lambda parts, kind: request(*parts, kind=kind), EXTENSIONS, KINDS))
ATTRIBUTES = st.lists(st.sampled_from([PASSWORD, UNSTRUCTURED, *WINDOWS]), max_size=1)
ATTRIBUTES = st.builds(lambda parts, more: [*parts, *more], ATTRIBUTES, st.lists(REQUESTS, max_size=1))
ATTRIBUTES = rarely(st.lists(REQUESTS, max_size=3), ATTRIBUTES)
STRINGS = st.sampled_from([UTF8, UTF8, PRINTABLE, IA5, TELETEX, BMP, 0x1C, 0x1A, 0x12, 0x1B, 0x02, 0x03])
TEXT = st.sampled_from([b"a.example", b"victim.example", b"\xc3\xa9.example", b"\xe9", b"a\0b", b"\0a\0b", b""])
CNS = st.lists(st.builds(lambda tag, text: (CN, tag, text), STRINGS, TEXT), min_size=1, max_size=2)
SUBJECTS = st.sampled_from([sequence(), cn("Build server"), cn("device", PRINTABLE), PLAIN])
SUBJECTS = rarely(
    CNS.map(
        lambda parts: sequence(
            *[write_der(0x31, sequence(oid(kind), write_der(tag, text))) for kind, tag, text in parts]
        )
    ),
    SUBJECTS,
)
INFORMATION = st.builds(
    lambda subject, attributes: sequence(
        VERSION, subject, public_key(KEY), write_der(0xA0, b"".join(sorted(attributes)))
    ),
    mutated(SUBJECTS),
    ATTRIBUTES,
)
CSRS = mutated(INFORMATION).map(signed)


UNREADABLE = "unreadable"
ADDRESS = re.compile(r"[0-9.]+$|.*:")


class Names(NamedTuple):
    """What a reader sees: the CN, if there is one, and the subjectAltNames as tag and contents."""

    cn: str | None
    sans: list[tuple[int, bytes]]


def as_cryptography_sees(der: bytes) -> Names | None:
    """What acme2certifier compares with the order, and the other kinds of names; None for a CSR that it refuses.

    Where it gives up on the extensions it sees no names: then there may be none that it has to check.
    """
    try:
        loaded = x509.load_der_x509_csr(der)
    except ValueError:  # a PrintableString with other characters
        return None
    try:
        values = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        values = x509.SubjectAlternativeName([])
    sans = [encoded(value) for value in values]
    try:
        cns = [a.value for a in loaded.subject if a.oid == x509.NameOID.COMMON_NAME and a.value]
    except ValueError:  # a TeletexString in Latin-1: the order fails
        return Names(UNREADABLE, sans)
    assert len(cns) < 2
    return Names(str(cns[0]) if cns else None, sans)


def encoded(name: x509.GeneralName) -> tuple[int, bytes]:
    """A name of cryptography as it stands in a CSR."""
    if isinstance(name, x509.IPAddress):
        return 0x87, getattr(name.value, "packed", b"network")
    if isinstance(name, x509.OtherName):
        return 0xA0, oid(name.type_id.dotted_string) + write_der(0xA0, name.value)
    if isinstance(name, x509.RegisteredID):
        return 0x88, read_der(oid(name.value.dotted_string)).content
    if isinstance(name, x509.DirectoryName):
        return 0xA4, name.value.public_bytes()
    tags = {x509.DNSName: 0x82, x509.RFC822Name: 0x81, x509.UniformResourceIdentifier: 0x86}
    return tags[type(name)], name.value.encode("latin-1")


def as_the_handler_sees(text: str, kinds: Sequence[str]) -> Names:
    seen = cmp_ca_handler._read_csr(text, kinds)
    cns = [attribute.text for rdn in seen.subject for attribute in rdn if attribute.type == CN]
    value = seen.extensions.get(SAN, sequence())
    return Names(cns[0] if cns else None, [(part.tag, part.content) for part in read_der(value).parts()])


def as_the_ca_sees(asked: Asked) -> Names:
    """The names in the CertTemplate."""
    found: list[tuple[int, bytes]] = []
    for part in asked.extensions:
        kind, *_, value = read_der(part).parts()
        if kind.whole == oid(SAN):
            assert not found, "two subjectAltNames"
            found = [(name.tag, name.content) for name in read_der(value.content).parts()]
    cns = []
    for rdn in read_der(asked.subject).parts():
        for pair in rdn.parts():
            kind, value = pair.parts()
            if kind.whole == oid(CN):
                cns.append(value.content.decode(cmp_ca_handler.STRINGS[value.tag]))
    cns = list(filter(None, cns))  # an empty one names nobody
    assert len(cns) < 2
    return Names(cns[0] if cns else None, found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Attribute's length:UserWarning")
def test_everybody_reads_the_same(wire: Wire) -> None:
    """cryptography, for the ACME server; the handler; and the CA in what openssl sends."""
    every = [*cmp_ca_handler.SAN_KINDS.values()]
    handlers = [wire.handler(openssl_bin=binary, san_types=", ".join(every)) for binary in BINARIES]
    for handler in handlers:
        handler._helper = Reader()  # type: ignore[assignment]
    count = {"let through": 0, "refused": 0, "refused by acme2certifier": 0}

    @cases(600, 0.05)
    @given(CSRS, st.integers(0, len(BINARIES) - 1))
    def run(der: bytes, binary: int) -> None:
        wire.saved.unlink(missing_ok=True)
        text = base64url(der)
        error = handlers[binary].enroll(text)[0]
        if not wire.saved.exists():
            count["refused"] += 1
            assert error and "\n" not in error
            return
        count["let through"] += 1
        handler, ca = as_the_handler_sees(text, every), as_the_ca_sees(on_wire(wire.saved))
        if handler.cn is None and ca.cn is not None:  # for a CSR without a subject
            subject = read_der(der).parts()[0].parts()[1]
            named = [(0x82, ca.cn.encode()), (0x87, ip_address(ca.cn).packed if ADDRESS.match(ca.cn) else b"")]
            assert not any(pair.parts()[1].content for rdn in subject.parts() for pair in rdn.parts())
            assert {*named} & {*handler.sans}
            ca = ca._replace(cn=None)
        if handler.cn and not handler.sans and ca.sans:  # a host that is named in the CN alone
            assert ca.sans == [(0x82, handler.cn.encode())]
            ca = ca._replace(sans=[])
        assert handler == ca
        server = as_cryptography_sees(der)
        if server is None:
            count["refused by acme2certifier"] += 1
            return
        checked = [san for san in handler.sans if san[0] in (0x81, 0x82, 0x87)]
        assert server.sans == handler.sans or (server.sans, checked) == ([], [])
        assert server.cn in (handler.cn, UNREADABLE)

    run()
    # else the cases are all of one kind
    assert count["refused"] > 50 and count["let through"] > 50 + 10 * count["refused by acme2certifier"], count
    if LONG:
        print(f"\nfuzz: test_everybody_reads_the_same: {sum(count.values())} cases: {count}", flush=True)


# --- In acme2certifier

# What it lets through in an order for a.example: it does not see the rest, or gives up on the extensions and looks at
# the CN alone.
LET_THROUGH = [
    "Microsoft's, then PKCS #9's",
    "two of PKCS #9",
    "two subjectAltNames",
    "critical FALSE",
    "critical 01",
    "long length of the names",
    "broken basicConstraints",
    "8 bits, Latin-1",
    "x400Address",
    "two CNs",
    "empty name",
    "URI",
    "otherName",
    "CA TRUE",
    "keyCertSign",
    "SID",
    "RSA exponent 1",
    "foreign DSA generator",
]
GIVEN_UP = ["CA FALSE encoded", "unknown TLS feature", "encipherOnly alone"]


class Client(NamedTuple):
    """An ACME client that sends any CSR it likes."""

    acme: client.ClientV2
    key: JWKRSA

    @classmethod
    def of(cls, host: Host) -> Client:
        key = JWKRSA(key=rsa.generate_private_key(65537, 2048))
        network = client.ClientNetwork(key, user_agent="tests")
        found = cls(client.ClientV2(client.ClientV2.get_directory(f"{host.url}/directory", network), network), key)
        found.acme.new_account(messages.NewRegistration.from_data(email=CONTACT, terms_of_service_agreed=True))
        return found

    def order(self, der: bytes) -> str:
        """The certificate for an order of a.example alone with this CSR, empty where there is none."""
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=60)
        order = self.acme.new_order(csr_pem(["a.example"]).encode())
        for authorization in order.authorizations:
            for challenge in authorization.body.challenges:
                if challenge.chall.typ == "http-01":
                    self.acme.answer_challenge(challenge, challenge.response(self.key))
        order = self.acme.poll_authorizations(order, deadline)
        pem = b"-----BEGIN CERTIFICATE REQUEST-----\n%s-----END CERTIFICATE REQUEST-----\n" % base64.encodebytes(der)
        try:
            return str(self.acme.finalize_order(order.update(csr_pem=pem), deadline).fullchain_pem)
        except (errors.Error, messages.Error):
            return ""


@pytest.mark.e2e
def test_attacks_are_refused_in_acme2certifier(ca: DemoCA, tmp_path: Path) -> None:
    """The attacks that a real acme2certifier lets through are refused; a CSR of certreq is issued."""
    section = {"handler_module": str(HANDLER), **ca.options()}
    with Host(tmp_path, section, {"Certificate": {"csr_binding_strict": "True", "enrollment_timeout": "60"}}) as host:
        acme = Client.of(host)
        unseen = {case: (UNSEEN[case], UNCHECKED) for case in GIVEN_UP}
        attacks = {**{case: REFUSED[case] for case in LET_THROUGH}, **unseen}
        for number, (case, (made, words)) in enumerate(attacks.items(), 1):
            assert acme.order(made() if callable(made) else made) == ""
            lines = host.log("CMP enrolment failed: ").splitlines()
            last = lines[-1].replace("\\\\", "\\")
            assert len(lines) == number and words in last, (case, host.log()[-400:])
        assert ca.messages == []
        assert "BEGIN CERTIFICATE" in acme.order(HONEST["Windows certreq"])
