"""A distinguished name of the configuration goes out as it is written, or an error names the attribute."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from pathlib import Path
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import cmp_ca_handler
from conftest import ENDS, OPENSSL, Handlers, binaries, csr_pem
from shared import called

CSR = csr_pem(["a.example"], "a.example")
NAMELESS = csr_pem(["a.example"])  # for cmp_subject
TYPES = {number: short for number, (short, _, _) in cmp_ca_handler.ATTRIBUTES.items()}

# as configured -> what must go out: attributes of one RDN with a plus sign between them, sorted by DER
EXACT = {
    "C=DE, CN=tst_sub_ca": "/C=DE/CN=tst_sub_ca",
    "CN=x,O=Demo,C=DE": "/CN=x/O=Demo/C=DE",
    " C = DE ,  CN = a b ": "/C=DE/CN=a b",
    'C = DE, O = "Foo, Inc.", CN = x': "/C=DE/O=Foo, Inc./CN=x",
    'O="a \\"quoted\\" name", CN=x': '/O=a "quoted" name/CN=x',
    'O="a+b=c;d", CN=x': "/O=a+b=c;d/CN=x",
    "O=Acme\\, Inc., CN=x": "/O=Acme, Inc./CN=x",
    "O=Foo \\+ Bar, CN=x": "/O=Foo + Bar/CN=x",
    "O=a\\\\b, CN=x": "/O=a\\b/CN=x",
    'O=a\\;b\\"c\\<d\\>e\\=f, CN=x': '/O=a;b"c<d>e=f/CN=x',
    "CN=\\#1": "/CN=#1",
    "CN=CA #2": "/CN=CA #2",
    "CN=\\ x\\ , O=y": "/CN= x /O=y",
    "CN=a\\\\, O=y": "/CN=a\\/O=y",
    "C = DE, CN = M\\C3\\BCller": "/C=DE/CN=Müller",
    "C=DE, CN=Müller": "/C=DE/CN=Müller",
    "CN=M\\c3\\bcller\\2C x": "/CN=Müller, x",
    "CN=\\E6\\BC\\A2 Ω 😀": "/CN=漢 Ω 😀",
    "CN=a\\0Ab": "/CN=a\nb",
    "CN=x=y": "/CN=x=y",
    "O=a/b, CN=c": "/O=a/b/CN=c",
    "O=a\\/b, CN=c": "/O=a/b/CN=c",
    "C=DE, CN=a+O=b": "/C=DE/CN=a+O=b",
    "C=DE, O=b + CN=a": "/C=DE/CN=a+O=b",
    "CN=x, OU=1, OU=2, DC=b, DC=a": "/CN=x/OU=1/OU=2/DC=b/DC=a",
    "c=DE, cn=x, Ou=y": "/C=DE/CN=x/OU=y",
    "countryName=DE, commonname=x, ORGANIZATIONNAME=y": "/C=DE/CN=x/O=y",
    "C=DE, E=ca@acme.de, CN=x": "/C=DE/emailAddress=ca@acme.de/CN=x",
    "EMAILADDRESS=ca@acme.de, email=b@c": "/emailAddress=ca@acme.de/emailAddress=b@c",
    "S=Bayern, ST=Hessen, sp=x, L=y": "/ST=Bayern/ST=Hessen/ST=x/L=y",
    "SERIALNUMBER=12, SN=Name, G=x, T=y": "/serialNumber=12/SN=Name/GN=x/title=y",
    "UID=a, userId=b, STREET=c": "/UID=a/UID=b/street=c",
    "OID.2.5.4.97=VATDE-1, oid.2.5.4.3=x": "/2.5.4.97=VATDE-1/CN=x",
    "2.5.4.97=VATDE-1, 2.5.4.3=x": "/2.5.4.97=VATDE-1/CN=x",
    "organizationIdentifier=VATDE-1, DNQ=a, postalCode=1": "/2.5.4.97=VATDE-1/2.5.4.46=a/2.5.4.17=1",
    "INN=77, CN=x": "/1.2.643.3.131.1.1=77/CN=x",
    "mail=a@b.de, CN=x": "/0.9.2342.19200300.100.1.3=a@b.de/CN=x",
    "subject=C = DE, CN = x": "/C=DE/CN=x",
    "subject=/C=DE/CN=x": "/C=DE/CN=x",
    "/C=DE/CN=x": "/C=DE/CN=x",
    "/c=DE/E=a@b/OID.2.5.4.97=x/cn=y": "/C=DE/emailAddress=a@b/2.5.4.97=x/CN=y",
    "/O=a\\/b\\+c\\\\d, e/CN= x": "/O=a/b+c\\d, e/CN= x",
    "/CN=a+O=b": "/CN=a+O=b",
    f"CN={'x' * 64}": f"/CN={'x' * 64}",
    f"CN={'ü' * 64}": f"/CN={'ü' * 64}",
}
# as configured -> words of the error
FAULTY = {
    "C=DE, O=Foo + Bar GmbH, CN=x": ["'Bar GmbH, CN=x'", "\\+"],
    "C=DE, O=Foo, Inc., CN=x": ["'Inc., CN=x'", "\\,"],
    "Issuing CA": ["'Issuing CA'", "C=DE, CN=Issuing CA"],
    "C=DE, =x": ["'=x'"],
    "C=DE,": ["C=DE, CN=Issuing CA"],
    "C=DE, X-Team=y": ["X-Team", "leave it out"],
    "C=DE, commonNam=y": ["commonNam", "leave it out"],
    "C=DE, 1.2.3.4=y": ["1.2.3.4", "leave it out"],
    "C=DE, OID.1.2.3.4=#0C0178": ["OID.1.2.3.4", "write the text itself for #hex"],
    "uid=x": ["uid", "UID", "uniqueIdentifier"],
    "C=DE, CN=": ["CN", "no value"],
    'C=DE, CN=""': ["CN", "no value"],
    # here openssl says so: the length, or a character that the attribute cannot have
    "C=DEU, CN=x": ["openssl says: ", "/C=DEU"],
    "C=D, CN=x": ["openssl says: ", "/C=D"],
    f"CN={'x' * 65}": ["openssl says: ", f"/CN={'x' * 65}"],
    f"E={'x' * 129}": ["openssl says: ", f"/emailAddress={'x' * 129}"],
    "SNILS=1234567890x, CN=x": ["openssl says: ", "/SNILS=1234567890x"],
    "friendlyName=\U0001f600, CN=x": ["openssl says: ", "/friendlyName=\U0001f600"],
    "serialNumber=a_b": ["openssl says: ", "/serialNumber=a_b"],
    "E=ü@x.de": ["openssl says: ", "/emailAddress=ü@x.de"],
    "C=ÖS": ["openssl says: ", "/C=ÖS"],
    "/C=DEU/CN=x": ["openssl says: ", "/C=DEU"],
    "CN=a\\00b": ["CN", "NUL"],
    "CN=DOM\\user": ["CN", "two backslashes"],
    "CN=DOM\\admin": ["CN", "two backslashes"],
    "CN=\\C3": ["CN", "not UTF-8"],
    "CN=x\\": ["CN=x\\' is not", "\\\\ for a backslash"],
    "CN=a;O=b": ["CN", "\\;"],
    'CN=a "b" c': ['CN=a "b" c\' is not a distinguished name'],
    'CN="a" b': ['CN="a" b\' is not a distinguished name'],
    'CN="a': ["CN=\"a' is not a distinguished name"],
    "CN=#1": ["CN", "\\#"],
    "CN=#0C0178": ["CN", "write the text itself for #hex"],
    "CN=x/emailAddress=a@b": ["CN", "emailAddress="],
    "O=x CN=y": ["O", "CN=", "comma"],
    "C=DE CN=x": ["C:", "CN="],
    '"C=DE, CN=x"': ["quotes"],
    "C=DE, CN=x  # the CA": ["comment", "backslash"],
    "C=DE, CN=x ; the CA": ["comment"],
    "/C=DE/CN=": ["CN", "no value"],
    "/O=Acme, CN=x": ["O", "CN=", "slash"],
    "/C=DE/X-Team=x": ["X-Team", "leave it out"],
    "/C=DE/CN=a/b": ["'b'", "\\/"],
    "/CN=a+b": ["'b'", "\\+"],
    "/CN=a\\": ["backslash"],
    "/C=DE/CN=M\\C3\\BCller": ["character itself"],
    "/C=DE/CN=M\\xC3\\xBCller": ["character itself"],
    "/=x": ["no attribute type"],
}


@pytest.fixture
def dead_end(tcp_server: Callable[[Callable[[socket.socket], None]], int], tmp_path: Path) -> int:
    """A server that saves the request that it gets, and says no: its port."""

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            header = [line.lower().partition(b":") for line in iter(stream.readline, b"\r\n")]
            length = next(int(value) for name, _, value in header if name == b"content-length")
            (tmp_path / "request").write_bytes(stream.read(length))
        connection.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    return tcp_server(serve)


def recipient(message: bytes) -> str:
    """The recipient of a CMP message (RFC 4210, 5.1.1), with the attributes that have no short name by number."""
    header = cmp_ca_handler._sequence(cmp_ca_handler._sequence(message)[0].raw)
    name = cmp_ca_handler._name(header[2].value)
    return "".join("/" + "+".join(f"{TYPES.get(a.type, a.type)}={a.text}" for a in rdn) for rdn in name)


@pytest.mark.parametrize("configured", EXACT)
def test_what_is_written_goes_out(configured: str, handlers: Handlers, tmp_path: Path, dead_end: int) -> None:
    """In the header of the request, whatever the version of OpenSSL."""
    section = {"cmp_server": f"127.0.0.1:{dead_end}", "cmp_ref": "1234", "cmp_secret": "demo-secret"}
    for openssl in ENDS:
        handler = handlers({**section, "cmp_recipient": configured, "cmp_openssl_bin": openssl})
        assert handler.handler_check() is None, openssl
        assert "404" in str(handler.enroll(CSR)[0]), openssl
        assert recipient((tmp_path / "request").read_bytes()) == EXACT[configured], openssl


@pytest.mark.parametrize(
    "configured, key",
    [(configured, "recipient") for configured in FAULTY]
    + [("C=DE, O=Foo, Inc., CN=x", key) for key in ("issuer", "expect_sender", "subject")],
)
def test_what_cannot_go_out_is_an_error(configured: str, key: str, handlers: Handlers, dead_end: int) -> None:
    """Neither a check nor an enrolment takes it, and both say what is wrong with it."""
    section = {"cmp_server": f"127.0.0.1:{dead_end}", "cmp_ref": "1234", "cmp_secret": "demo-secret"}
    handler = handlers(section, **{key: configured})
    assert cmp_ca_handler.OPTIONS[key].kind == "name"  # one function reads them all
    for text in (handler.handler_check(), handler.enroll(NAMELESS)[0]):
        assert text and [word for word in [f"cmp_{key}: ", *FAULTY[configured]] if word not in text] == []


NAMES = [
    [("C", "DE"), ("O", 'Foo, "Inc." + Co; #1 <x>'), ("CN", "Müller \\ Söhne / CA")],
    [("C", "DE"), ("ST", "漢"), ("emailAddress", "ca@acme.test"), ("serialNumber", "12:34"), ("UID", "x")],
    [("DC", "test"), ("DC", "acme"), ("CN", "#1 = +"), ("OU", "x")],
    [("O", "Acme"), ("2.5.4.97", "VATDE-12"), ("2.5.4.17", "12345"), ("CN", "a")],
]


@binaries
@pytest.mark.parametrize("form", ["oneline", "RFC2253", "compat", ""])
def test_what_openssl_prints_can_be_pasted(
    form: str, openssl: str, handlers: Handlers, tmp_path: Path, dead_end: int
) -> None:
    """troubleshooting.md tells people to copy the CA's name from there. Two forms do not escape."""
    numbers = {short: dotted for dotted, short in TYPES.items()}
    key = ec.generate_private_key(ec.SECP256R1())
    for name in NAMES:
        attributes = [x509.NameAttribute(x509.ObjectIdentifier(numbers.get(t, t)), text) for t, text in name]
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes)).sign(key, hashes.SHA256())
        (tmp_path / "ca.csr").write_bytes(csr.public_bytes(serialization.Encoding.PEM))
        words = [openssl, "req", "-in", str(tmp_path / "ca.csr"), "-noout", "-subject"]
        words += ["-nameopt", form] if form else []
        printed = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        section = {"cmp_server": f"127.0.0.1:{dead_end}", "cmp_ref": "1234", "cmp_secret": "demo-secret"}
        handler = handlers(section, recipient=printed)
        check = handler.handler_check()
        if form in ("compat", "") and check:  # the latter is openssl's default, which escapes in 3.0
            assert "cmp_recipient: " in check
            continue
        assert check is None, printed
        handler.enroll(CSR)
        expected = [f"{TYPES.get(t, t)}={text}" for t, text in (name[::-1] if form == "RFC2253" else name)]
        assert recipient((tmp_path / "request").read_bytes()) == "/" + "/".join(expected)


def test_convert_gives_the_name_back() -> None:
    """`convert` turns openssl's notation into that of the configuration, and back it is the same."""
    binary = cmp_ca_handler._binary(OPENSSL)
    for configured in EXACT:
        slash = cmp_ca_handler._slash_dn(configured.strip(), binary)
        assert cmp_ca_handler._slash_dn(cmp_ca_handler._comma_dn(slash), binary) == slash, configured


# as openssl gets it -> what must go out
TYPED = {
    "/CN=a # b": "/CN=a # b",
    "/CN=a #": "/CN=a #",
    "/": "",
    "/O=http:\\/\\/x\\/CN=y": "/O=http://x/CN=y",
}


@pytest.mark.parametrize("typed", TYPED)
def test_a_name_is_converted_and_goes_out(typed: str, handlers: Handlers, tmp_path: Path, dead_end: int) -> None:
    """A name on openssl's command line, which a section could take for something else: `convert` writes it so that
    the handler sends what was typed.
    """
    address = f"127.0.0.1:{dead_end}"
    words = [OPENSSL, "cmp", "-server", address, "-ref", "1234", "-secret", "pass:demo-secret", "-recipient", typed]
    words += ["-issuer", "/CN=another"]  # openssl's recipient where none is set
    converted = called("convert", "--", *words)
    assert (converted.returncode, converted.stderr) == (0, "")
    lines = [line.split(": ", 1) for line in converted.stdout.splitlines() if line.startswith("cmp_")]
    handler = handlers(dict(lines))
    assert handler.handler_check() is None
    assert "404" in str(handler.enroll(CSR)[0])
    assert recipient((tmp_path / "request").read_bytes()) == TYPED[typed]


def test_nothing_crashes_on_a_name() -> None:
    """3,000 names of special characters put together: each is converted, or refused with a CMPError."""
    binary = cmp_ca_handler._binary(OPENSSL)
    pieces = ["C=DE", "CN=x", ",", "+", "/", "\\", '"', "#", "0C01", "=", ";", " ", "ü", "\0", "OID.", "1.2", "\n"]
    state = 12345
    for _ in range(3000):
        text = ""
        for _ in range(6):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            text += pieces[(state >> 8) % len(pieces)]
        with contextlib.suppress(cmp_ca_handler.CMPError):
            assert cmp_ca_handler._slash_dn(text, binary).startswith("/")
