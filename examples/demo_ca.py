#!/usr/bin/env python3
"""A CMP certificate authority for trials and tests; its keys lie unencrypted in a directory.

    demo_ca.py DIR                  serve on 127.0.0.1:8080 until Ctrl-C; makes DIR the first time
    demo_ca.py DIR --hold           let every request wait until somebody approves it, which is done by
    demo_ca.py DIR pending          (in another terminal) listing what waits, and
    demo_ca.py DIR approve all      (or a serial number, a transaction ID, a name)

In a test:

    with DemoCA(tmp_path / "ca") as ca:
        ca.hold = True
        section = ca.section("certificate")     # the [CAhandler] section that fits
        ...
        ca.approve("all")

Nothing cryptographic is done in Python. CMP itself (parsing, protection, nonces, proof of possession) is
OpenSSL's own server, OSSL_CMP_SRV_CTX_new(3), called in libcrypto through ctypes. Certificates and CRLs are made
by the openssl program. Left to this file is what a CA decides: what goes into a certificate, and when.

One thing that a real CA does and this one does not: ask who may request what. Whoever knows the secret, or holds
any certificate that this CA has issued, gets every name.
"""

import argparse
import base64
import ctypes
import ctypes.util
import enum
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

__all__ = ["DemoCA", "DemoError", "Message", "Pending"]

LOG = logging.getLogger("demo_ca")
LOG.addHandler(logging.NullHandler())

MAX_REQUEST = 1 << 20
MAX_TRANSACTIONS = 10_000  # clients that never confirm must not fill the memory
SOCKET_TIMEOUT = 30

# The alternatives of PKIBody by tag, RFC 4210 section 5.1.2
Body = enum.IntEnum(
    "Body",
    "ir ip cr cp p10cr popdecc popdecr kur kup krr krp rr rp ccr ccp ckuann cann rann crlann pkiConf nested "
    "genm genp error certConf pollReq pollRep",
    start=0,
)
# The bits of PKIFailureInfo, RFC 4210 section 5.2.3
FailInfo = enum.IntEnum(
    "FailInfo",
    "badAlg badMessageCheck badRequest badTime badCertId badDataFormat wrongAuthority incorrectData "
    "missingTimeStamp badPOP certRevoked certConfirmed wrongIntegrity badRecipientNonce timeNotAvailable "
    "unacceptedPolicy unacceptedExtension addInfoNotAvailable badSenderNonce badCertTemplate "
    "signerNotTrusted transactionIdInUse unsupportedVersion notAuthorized systemUnavail systemFailure duplicateCertReq",
    start=0,
)
ACCEPTED, GRANTED_WITH_MODS, REJECTION, WAITING = range(4)  # PKIStatus, in the same section
TRANSACTION_OPEN = -2  # OSSL_CMP_PKISTATUS_trans

MAC_ALGORITHMS = ("1.2.840.113533.7.66.13", "1.2.840.113549.1.5.14")  # PasswordBasedMac, PBMAC1
EXTENSION_REQUEST = "1.2.840.113549.1.9.14"
SUBJECT_ALT_NAME, REASON_CODE = "2.5.29.17", "2.5.29.21"
BASIC_CONSTRAINTS, AUTHORITY_KEY_IDENTIFIER = "2.5.29.19", "2.5.29.35"

# What a certificate gets unless the request says otherwise, as lines of openssl's extension files
DEFAULT_EXTENSIONS = {
    BASIC_CONSTRAINTS: "basicConstraints = critical,CA:FALSE",
    "2.5.29.15": "keyUsage = critical,digitalSignature",
    "2.5.29.37": "extendedKeyUsage = serverAuth",
    "2.5.29.14": "subjectKeyIdentifier = hash",
    AUTHORITY_KEY_IDENTIFIER: "authorityKeyIdentifier = keyid:always",
}
# ... and what no request can change: whether it is a CA, and who signed it
OWN_EXTENSIONS = {oid: DEFAULT_EXTENSIONS[oid] for oid in (BASIC_CONSTRAINTS, AUTHORITY_KEY_IDENTIFIER)}

# CRLReason (RFC 5280 section 5.3.1) as `openssl ca` calls them; it has no name for 9 and 10, and 8 takes back
CRL_REASONS = {
    0: "unspecified",
    1: "keyCompromise",
    2: "CACompromise",
    3: "affiliationChanged",
    4: "superseded",
    5: "cessationOfOperation",
    6: "certificateHold",
    9: "",
    10: "",
}

CA_CONFIG = """\
[ca]
default_ca = demo
[demo]
database = index.txt
crlnumber = crlnumber
certificate = sub.pem
private_key = sub.key
default_md = sha256
default_crl_days = 30
crl_extensions = crl
[crl]
authorityKeyIdentifier = keyid:always
[req]
distinguished_name = req
"""

STRING_ENCODINGS = {
    0x0C: "utf-8",  # UTF8String
    0x12: "ascii",  # NumericString
    0x13: "ascii",  # PrintableString
    0x14: "latin-1",  # TeletexString, in the way that everybody has used it
    0x16: "ascii",  # IA5String
    0x1A: "ascii",  # VisibleString
    0x1C: "utf-32-be",  # UniversalString
    0x1E: "utf-16-be",  # BMPString
}


class DemoError(Exception):
    """Something that the user can put right, in one line."""


class Refusal(Exception):
    """The CA's no: the failInfo and the statusString of its answer."""

    def __init__(self, fail_info: str, text: str) -> None:
        super().__init__(fail_info, text)
        self.fail_info = fail_info
        self.text = text


class Message(NamedTuple):
    """One exchange: a request and its answer, by their names in RFC 4210."""

    transaction: str
    request: str
    response: str


class Pending(NamedTuple):
    """A request that waits for approval. The names are its subject, if it has one, and its DNS names."""

    transaction: str
    serial: str
    names: tuple[str, ...]


def clean(text: str) -> str:
    """Text from elsewhere, fit for one line of a log."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


def serial_hex(number: int) -> str:
    """A serial number as openssl prints it and keeps it in the index: whole bytes."""
    digits = f"{number:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


def new_serial() -> str:
    """128 bits, 126 of them random: positive and of one length (RFC 5280 section 4.1.2.2)."""
    return serial_hex(secrets.randbits(126) | 1 << 126)


# --- DER. OpenSSL has parsed each message before, and encoded it again; here its parts are found.


class Der(NamedTuple):
    """One element: its tag, its content, and all of its bytes."""

    tag: int
    content: bytes
    whole: bytes

    def parts(self) -> "list[Der]":
        """The elements in a constructed one."""
        found: list[Der] = []
        rest = self.content
        while rest:
            found.append(read_der(rest))
            rest = rest[len(found[-1].whole) :]
        return found

    def part(self, tag: int) -> "Optional[Der]":
        """The first element with this tag."""
        return next((part for part in self.parts() if part.tag == tag), None)


def read_der(data: bytes) -> Der:
    """The first element of data. Raises ValueError."""
    if len(data) < 2 or data[0] & 0x1F == 0x1F:
        raise ValueError("not DER")
    length, start = data[1], 2
    if length & 0x80:
        start = 2 + (length & 0x7F)
        length = int.from_bytes(data[2:start], "big")
    if start + length > len(data):
        raise ValueError("DER cut short")
    return Der(data[0], data[start : start + length], data[: start + length])


def write_der(tag: int, content: bytes) -> bytes:
    """An element with this content."""
    length = len(content)
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, length] if length < 0x80 else [tag, 0x80 | len(octets), *octets]) + content


def dotted(oid: bytes) -> str:
    """The content of an OBJECT IDENTIFIER in dotted form. Raises ValueError."""
    arcs, value = [], 0
    for byte in oid:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(value)
            value = 0
    if not arcs:
        raise ValueError("empty OBJECT IDENTIFIER")
    first = min(arcs[0] // 40, 2)
    return ".".join(map(str, [first, arcs[0] - 40 * first, *arcs[1:]]))


class Envelope(NamedTuple):
    """What must be known of a message before OpenSSL works on it."""

    name: str
    body: Der
    transaction: str
    mac: bool
    reference: bytes


def read_envelope(message: bytes) -> Envelope:
    """PKIMessage ::= SEQUENCE { header, body, .. }, RFC 4210 section 5.1. Raises ValueError, IndexError."""
    header, body = read_der(message).parts()[:2]
    # after pvno, sender and recipient, whose tags are those of GeneralName
    fields = {field.tag: read_der(field.content) for field in header.parts()[3:]}
    if 0xA4 not in fields:
        raise ValueError("no transactionID")
    algorithm = dotted(fields[0xA1].parts()[0].content) if 0xA1 in fields else ""
    reference = fields[0xA2].content if 0xA2 in fields else b""
    name = Body(body.tag & 0x1F).name
    return Envelope(name, body, fields[0xA4].content.hex(), algorithm in MAC_ALGORITHMS, reference)


def repeat_last_certificate(message: bytes) -> bytes:
    """Add the last of the extraCerts once more: OpenSSL's server does not repeat any, other CAs do.

    The extraCerts are outside of the protection (RFC 4210 section 5.1), so this breaks nothing.
    """
    *others, extra_certs = read_der(message).parts()
    certificates = read_der(extra_certs.content)
    repeated = write_der(0x30, certificates.content + certificates.parts()[-1].whole)
    return write_der(0x30, b"".join(part.whole for part in others) + write_der(0xA1, repeated))


# --- libcrypto

P, I, S = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p  # noqa: E741
PP = ctypes.POINTER(P)
# OSSL_CMP_SRV_cert_request_cb_t and so on, in the order in which OSSL_CMP_SRV_CTX_init takes them; cmp.h
CALLBACKS = (
    ctypes.CFUNCTYPE(P, P, P, I, P, P, PP, PP, PP),
    ctypes.CFUNCTYPE(P, P, P, P, P),
    ctypes.CFUNCTYPE(I, P, P, P, PP),
    ctypes.CFUNCTYPE(None, P, P, P, P, P),
    ctypes.CFUNCTYPE(I, P, P, I, P, P),
    ctypes.CFUNCTYPE(I, P, P, I, PP, ctypes.POINTER(ctypes.c_int64)),
)
LOG_CALLBACK = ctypes.CFUNCTYPE(I, S, S, I, I, S)

# Result, arguments, and the functions that have these: without them ctypes would cut pointers to 32 bits
FUNCTIONS: tuple[tuple[Any, Sequence[Any], Sequence[str]], ...] = (
    (ctypes.c_uint, (), ["OPENSSL_version_major"]),
    (None, (), ["ERR_clear_error"]),
    (None, (P,), ["OSSL_CMP_MSG_free", "OSSL_CMP_SRV_CTX_free"]),
    (I, (S,), ["OBJ_txt2nid"]),
    (S, (I,), ["OBJ_nid2sn"]),
    (P, (), ["OPENSSL_sk_new_null", "X509_STORE_new"]),
    (P, (P,), ["X509_get_subject_name", "OSSL_CMP_SRV_CTX_get0_cmp_ctx"]),
    (P, (P, PP, ctypes.c_long), ["d2i_X509", "d2i_AutoPrivateKey", "d2i_OSSL_CMP_MSG"]),
    (I, (P,), ["X509_up_ref", "OSSL_CMP_CTX_get_status"]),
    (I, (P, P), ["OPENSSL_sk_push", "X509_NAME_cmp", "X509_STORE_add_cert", "OSSL_CMP_CTX_set1_subjectName"]),
    (I, (P, P), ["OSSL_CMP_CTX_set1_cert", "OSSL_CMP_CTX_set1_pkey", "OSSL_CMP_CTX_set0_trustedStore"]),
    (I, (P, PP), ["i2d_OSSL_CMP_MSG"]),
    (I, (P, S, I), ["OSSL_CMP_CTX_set1_referenceValue", "OSSL_CMP_CTX_set1_secretValue"]),
    (I, (P, LOG_CALLBACK), ["OSSL_CMP_CTX_set_log_cb"]),
    (I, (P, I), ["OSSL_CMP_SRV_CTX_set_accept_raverified", "OSSL_CMP_SRV_CTX_set_grant_implicit_confirm"]),
    (I, (P, P, *CALLBACKS), ["OSSL_CMP_SRV_CTX_init"]),
    (P, (P, S), ["OSSL_CMP_SRV_CTX_new"]),
    (P, (P, P), ["OSSL_CMP_SRV_process_request"]),
    (P, (I, I, S), ["OSSL_CMP_STATUSINFO_new"]),
)


@functools.cache
def libcrypto() -> Any:
    """The system's OpenSSL 3 or 4. Raises DemoError if there is none, or one without CMP."""
    names = ["libcrypto.so.3", "libcrypto.so.4"]
    names += ["libcrypto.3.dylib", "/opt/homebrew/opt/openssl@3/lib/libcrypto.3.dylib"]
    if sys.platform != "darwin":  # macOS kills processes that load Apple's own libcrypto
        names.append(ctypes.util.find_library("crypto") or "libcrypto.so")
    for name in names:
        try:
            library = ctypes.CDLL(name)
            for result, arguments, functions in FUNCTIONS:
                for function in functions:
                    getattr(library, function).restype = result
                    getattr(library, function).argtypes = arguments
        except (OSError, AttributeError):
            continue
        if library.OPENSSL_version_major() >= 3:
            return library
    raise DemoError("no usable libcrypto: the demo CA needs OpenSSL 3.0 or later, built with CMP")


def from_der(function: str, data: bytes) -> Optional[int]:
    """A new object by one of the d2i functions, None if it cannot be parsed. The caller owns it."""
    buffer = ctypes.create_string_buffer(data, len(data))
    position = P(ctypes.addressof(buffer))
    result: Optional[int] = getattr(libcrypto(), function)(None, ctypes.byref(position), len(data))
    return result


def message_der(message: int) -> bytes:
    """An OSSL_CMP_MSG as DER. Raises ValueError."""
    length = libcrypto().i2d_OSSL_CMP_MSG(message, None)
    if length <= 0:
        raise ValueError("OpenSSL cannot encode the message")
    buffer = ctypes.create_string_buffer(length)
    libcrypto().i2d_OSSL_CMP_MSG(message, ctypes.byref(P(ctypes.addressof(buffer))))
    return buffer.raw


def certificate_stack(certificates: Iterable[int]) -> int:
    """A new STACK_OF(X509), with a reference to each certificate. Who gets it frees it."""
    stack: int = libcrypto().OPENSSL_sk_new_null()
    for certificate in certificates:
        libcrypto().X509_up_ref(certificate)
        libcrypto().OPENSSL_sk_push(stack, certificate)
    return stack


def status_info(status: int, fail_info: str = "", text: str = "") -> Optional[int]:
    """A new PKIStatusInfo. Who gets it frees it."""
    bits = 1 << FailInfo[fail_info] if fail_info else 0
    result: Optional[int] = libcrypto().OSSL_CMP_STATUSINFO_new(status, bits, text.encode() or None)
    return result


def safely(function: Callable[..., Any], otherwise: Any) -> Callable[..., Any]:
    """A callback for OpenSSL. An exception has nowhere to go in C: it is logged and becomes a result."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception:
            LOG.exception("error in %s", function.__name__)
            return otherwise

    return call


def first_pem(text: str) -> bytes:
    """The content of the first block of a PEM file."""
    return base64.b64decode(text.split("-----")[2])


# --- What a request asks for


class Wanted(NamedTuple):
    """A certificate as the openssl program has to be told of it."""

    subject: str = ""  # slash form
    types: tuple[str, ...] = ()  # attribute types of the subject that openssl does not know, dotted
    public_key: str = ""  # PEM
    extensions: tuple[tuple[str, str], ...] = ()  # object identifier, line of an extension file
    dns_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What a human calls it."""
        return (self.subject, *self.dns_names) if self.subject else self.dns_names


def type_alias(oid: str) -> str:
    """A name for an attribute type that has none: openssl skips these unless the configuration names them."""
    return "type_" + oid.replace(".", "_")


def read_subject(name: Der) -> tuple[str, tuple[str, ...]]:
    """A Name in slash form, and the attribute types in it that openssl does not know. Raises Refusal."""
    text, unknown = "", []
    for rdn in name.parts():
        separator = "/"
        for attribute in rdn.parts():
            oid, value = attribute.parts()
            plain = value.content.decode(STRING_ENCODINGS.get(value.tag, "ascii"))
            if value.tag not in STRING_ENCODINGS or "\0" in plain:
                raise Refusal("badCertTemplate", "a subject attribute is not text")
            number = dotted(oid.content)
            nid = libcrypto().OBJ_txt2nid(number.encode())
            if not nid:
                unknown.append(number)
            type_name = libcrypto().OBJ_nid2sn(nid).decode() if nid else type_alias(number)
            text += separator + type_name + "=" + re.sub(r"([/+=\\])", r"\\\1", plain)
            separator = "+"
    return text, tuple(sorted(set(unknown)))


def read_extensions(extensions: Iterable[Der]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """The lines for an extension file, and the DNS names. Raises Refusal."""
    lines: dict[str, str] = {}
    dns_names: tuple[str, ...] = ()
    for extension in extensions:
        first, *middle, value = extension.parts()
        oid = dotted(first.content)
        if oid in lines:  # RFC 5280 section 4.2
            raise Refusal("badCertTemplate", f"the extension {oid} is requested twice")
        critical = "critical," if middle and middle[0].content != b"\0" else ""
        lines[oid] = f"{oid} = {critical}DER:{value.content.hex()}"
        if oid == SUBJECT_ALT_NAME:
            names = read_der(value.content).parts()
            dns_names = tuple(name.content.decode("ascii", "replace") for name in names if name.tag == 0x82)
    return tuple(lines.items()), dns_names


def read_request(body: Der) -> Wanted:
    """What an ir, cr, kur (CertTemplate, RFC 4211 section 5) or p10cr (RFC 2986) asks for.

    Raises:
        Refusal: no certificate can be made of it.
        ValueError, IndexError: it is malformed.
    """
    content = read_der(body.content)
    requested: list[Der] = []
    if body.tag & 0x1F == Body.p10cr:
        _, name, public_key, *attributes = content.parts()[0].parts()
        for attribute in attributes[0].parts() if attributes else []:
            oid, values = attribute.parts()
            if dotted(oid.content) == EXTENSION_REQUEST:
                requested = values.parts()[0].parts()
        subject, key = name.whole, public_key.content
    else:
        # CertReqMessages, CertReqMsg, CertRequest { certReqId, certTemplate, .. }
        template = content.parts()[0].parts()[0].parts()[1]
        fields = {field.tag: field for field in template.parts()}
        if 0xA6 not in fields:
            raise Refusal("badCertTemplate", "the request has no public key")
        subject = fields[0xA5].content if 0xA5 in fields else b"\x30\x00"
        key = fields[0xA6].content
        requested = fields[0xA9].parts() if 0xA9 in fields else []
    text, types = read_subject(read_der(subject))
    extensions, dns_names = read_extensions(requested)
    if not text and SUBJECT_ALT_NAME not in dict(extensions):
        raise Refusal("badCertTemplate", "the request has neither a subject nor a subjectAltName")
    block = base64.encodebytes(write_der(0x30, key)).decode()
    pem = f"-----BEGIN PUBLIC KEY-----\n{block}-----END PUBLIC KEY-----\n"
    return Wanted(text, types, pem, extensions, dns_names)


# --- The approval desk: files, so that other processes can use it, too. DIR/held/SERIAL.json describes a request
# --- that waits, and an empty file SERIAL.approve or SERIAL.refuse beside it decides.


def held_requests(directory: Path) -> list[Pending]:
    """The requests that nobody has decided yet."""
    found = []
    for path in sorted((directory / "held").glob("*.json")):
        if path.with_suffix(".approve").exists() or path.with_suffix(".refuse").exists():
            continue
        try:
            entry = json.loads(path.read_text())
        except FileNotFoundError:  # it has ended in the meantime
            continue
        found.append(Pending(entry["transaction"], path.stem, tuple(entry["names"])))
    return found


def decide(directory: Path, what: str, verdict: str) -> int:
    """Decide "all", a serial number, a transaction ID, a subject or its CN, a DNS name. Returns how many."""
    count = 0
    for request in held_requests(directory):
        fits = what in ("all", request.transaction, *request.names) or what.upper() == request.serial
        if fits or any(name.endswith("/CN=" + what) for name in request.names):
            (directory / "held" / f"{request.serial}.{verdict}").touch()
            count += 1
    return count


# --- The CA


class Transaction:
    """One CMP transaction: OpenSSL's server context for it, and what the CA knows about it."""

    def __init__(self, identifier: str, context: int) -> None:
        self.identifier = identifier
        self.context: Optional[int] = context  # None: ended
        self.lock = threading.Lock()  # a context works on one message at a time
        self.body = Der(0, b"", b"")  # of the message in work
        self.request = b""  # the message that asks for a certificate; the end of polling comes back to it
        self.wanted = Wanted()
        self.serial = ""
        self.certificate = b""
        self.waiting = False
        self.polls_left = 0
        self.verdict = ""  # set by the poll that ends the waiting: go, approve, refuse
        self.note = ""  # for the log


class DemoCA:
    """A CMP CA on 127.0.0.1, see the top of this file. start() and stop() it, or use it in a with statement.

    The attributes may be changed at any time, they are read for each request.

    Attributes:
        hold: answer "waiting" until the request is approved or refused.
        polls: answer "waiting", and finish with the Nth poll.
        check_after: the seconds until its next poll that a waiting client is told.
        reject: a failInfo such as "badCertTemplate": reject what asks for a certificate.
        status_text: the statusString of the rejection.
        junk: send a stranger, the root and the issuing CA (twice) in the extraCerts.
        ca_pubs_only: send the issuing CA and the root in the caPubs only.
        implicit_confirm: grant implicit confirmation to those who ask for it.
        messages: every exchange so far.
    """

    path = "pkix/"

    def __init__(
        self,
        directory: Union[str, "os.PathLike[str]"],
        *,
        port: int = 0,
        openssl: str = "openssl",
        tls: bool = False,
        ref: str = "1234",
        secret: str = "demo-secret",  # noqa: S107
    ) -> None:
        self.directory = Path(directory).absolute()
        self.port = port
        self.openssl = os.path.abspath(shutil.which(openssl) or openssl)
        self.tls = tls
        self.ref = ref
        self.secret = secret
        self.hold = False
        self.polls = 0
        self.check_after = 1
        self.reject = ""
        self.status_text = ""
        self.junk = False
        self.ca_pubs_only = False
        self.implicit_confirm = True
        self.messages: list[Message] = []
        self._http: Optional[HttpServer] = None
        self._transactions: dict[str, Transaction] = {}
        self._lock = threading.Lock()  # of _transactions
        self._index_lock = threading.Lock()
        self._working = threading.local()  # .transaction: what the callbacks in this thread are about
        self._objects: dict[str, int] = {}  # the CA's certificates and its key, in libcrypto
        # libcrypto keeps bare pointers to these, so they must live as long as the contexts do
        methods: list[tuple[Callable[..., Any], Any]] = [
            (self._on_cert_request, None), (self._on_rr, None), (self._on_genm, 0),
            (self._on_error, None), (self._on_cert_conf, 0), (self._on_poll_req, 0),
        ]  # fmt: skip
        self._callbacks = [kind(safely(method, otherwise)) for kind, (method, otherwise) in zip(CALLBACKS, methods)]
        self._log_callback = LOG_CALLBACK(safely(self._on_log, 1))

    def start(self) -> "DemoCA":
        """Make the directory if need be, and listen.

        Raises:
            DemoError: no usable OpenSSL, something else in the directory, or the port is taken.
        """
        libcrypto()
        self._set_up()
        try:
            for name in ("root", "sub", "cmp", "stranger"):
                pem = (self.directory / f"{name}.pem").read_text()
                self._objects[name] = from_der("d2i_X509", first_pem(pem)) or 0
            pem = (self.directory / "cmp.key").read_text()
            self._objects["key"] = from_der("d2i_AutoPrivateKey", first_pem(pem)) or 0
        except (OSError, ValueError, IndexError) as error:
            raise DemoError(f"{self.directory}: {error}") from error
        if not all(self._objects.values()):
            raise DemoError(f"{self.directory}: a certificate, or the CMP signer's key, cannot be read")
        self.forget()
        try:
            self._http = HttpServer(self)
        except (OSError, OverflowError) as error:
            raise DemoError(f"cannot listen on port {self.port}: {error}") from error
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop listening, drop all transactions. Another start() listens on the same port."""
        if self._http is not None:
            http, self._http = self._http, None
            http.shutdown()
            http.server_close()
            self.forget()

    def __enter__(self) -> "DemoCA":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether requests are answered."""
        return self._http is not None

    @property
    def server(self) -> str:
        """Host and port, as in cmp_server."""
        return f"127.0.0.1:{self.port}"

    def options(self, authentication: str = "secret") -> dict[str, str]:
        """The keys and values of a [CAhandler] section, for authentication by "secret" or "certificate"."""
        options = {
            "cmp_server": self.server,
            "cmp_path": self.path,
            "cmp_recipient": "C=DE, O=Demo, CN=Demo Issuing CA",
        }
        if authentication == "secret":
            options.update(cmp_ref=self.ref, cmp_secret=self.secret)
            options["cmp_expect_sender"] = options["cmp_recipient"]
        else:
            options.update(cmp_cert=f"{self.directory}/ra.pem", cmp_key=f"{self.directory}/ra.key")
            options["cmp_expect_sender"] = "C=DE, O=Demo, CN=Demo CMP Signer"
        options["cmp_trusted"] = f"{self.directory}/trusted.pem"
        if self.tls:
            options.update(cmp_tls_used="True", cmp_tls_trusted=f"{self.directory}/trusted.pem")
        return options

    def section(self, authentication: str = "secret") -> str:
        """The [CAhandler] section, for authentication by "secret" or "certificate"."""
        lines = [f"{key}: {value}\n" for key, value in self.options(authentication).items()]
        return "[CAhandler]\n" + "".join(lines)

    def pending(self) -> list[Pending]:
        """The requests that wait for approve() or refuse()."""
        return held_requests(self.directory)

    def approve(self, what: str) -> int:
        """Approve "all", a serial number, a transaction ID or a name. Returns how many requests that were."""
        return decide(self.directory, what, "approve")

    def refuse(self, what: str) -> int:
        """Reject at the next poll, with `reject` or badRequest. Returns how many requests that were."""
        return decide(self.directory, what, "refuse")

    def issued(self) -> list[str]:
        """The serial numbers of all issued certificates, in hexadecimal, oldest first."""
        return [row[3] for row in self._index()]

    def is_revoked(self, serial: str) -> bool:
        """Whether the certificate with this serial number, in hexadecimal, is revoked."""
        return any(row[0] == "R" and row[3] == serial.upper() for row in self._index())

    def forget(self) -> None:
        """Drop all transactions, as a CA does that was restarted."""
        with self._lock:
            dropped = list(self._transactions.values())
            self._transactions.clear()
        for transaction in dropped:
            with transaction.lock:
                self._close(transaction)
        for path in (self.directory / "held").iterdir():
            path.unlink()

    # --- One message

    def answer(self, data: bytes) -> bytes:
        """The response to a request, both in DER. Raises ValueError or IndexError if it is none."""
        request = from_der("d2i_OSSL_CMP_MSG", data)
        if request is None:
            raise ValueError("not a CMP message")
        try:
            der = message_der(request)
            envelope = read_envelope(der)
            while True:
                transaction = self._transaction(envelope)
                with transaction.lock:
                    if transaction.context is not None:  # else it ended while this thread waited for the lock
                        return self._answer(transaction, request, der, envelope)
        finally:
            libcrypto().OSSL_CMP_MSG_free(request)

    def _answer(self, transaction: Transaction, request: int, der: bytes, envelope: Envelope) -> bytes:
        """Have OpenSSL answer, which calls the callbacks below."""
        transaction.body, transaction.note = envelope.body, ""
        if envelope.name in ("ir", "cr", "p10cr", "kur") and not transaction.waiting:
            transaction.request = der
        self._working.transaction = transaction
        library = libcrypto()
        library.ERR_clear_error()  # else an old one of this thread could be given as the reason
        library.OSSL_CMP_SRV_CTX_set_grant_implicit_confirm(transaction.context, int(self.implicit_confirm))
        response = library.OSSL_CMP_SRV_process_request(transaction.context, request)
        try:
            result = message_der(response) if response else b""
        finally:
            library.OSSL_CMP_MSG_free(response)
        status = library.OSSL_CMP_CTX_get_status(library.OSSL_CMP_SRV_CTX_get0_cmp_ctx(transaction.context))
        # OpenSSL keeps a transaction open after a rejection, but nothing can follow
        if status != TRANSACTION_OPEN or not (transaction.waiting or transaction.certificate):
            with self._lock:
                if self._transactions.get(transaction.identifier) is transaction:
                    del self._transactions[transaction.identifier]
            self._close(transaction)
        if not result:
            raise ValueError("OpenSSL has no answer to this message")
        message = Message(transaction.identifier, envelope.name, read_envelope(result).name)
        self.messages.append(message)
        identifier = message.transaction[:8]
        LOG.info("%s %s -> %s%s", identifier, message.request, message.response, transaction.note)
        if self.junk and transaction.certificate and message.response in ("ip", "cp", "kup"):
            result = repeat_last_certificate(result)
        return result

    def _transaction(self, envelope: Envelope) -> Transaction:
        """The transaction that a message belongs to; a new one if there is none."""
        with self._lock:
            transaction = self._transactions.get(envelope.transaction)
            if transaction is None:
                if len(self._transactions) >= MAX_TRANSACTIONS:
                    raise ValueError("too many open transactions")
                transaction = Transaction(envelope.transaction, self._new_context(envelope))
                self._transactions[envelope.transaction] = transaction
            return transaction

    def _new_context(self, envelope: Envelope) -> int:
        """OpenSSL's server for one transaction; it protects in the way of the transaction's first message."""
        library = libcrypto()
        context: int = library.OSSL_CMP_SRV_CTX_new(None, None)
        library.OSSL_CMP_SRV_CTX_init(context, None, *self._callbacks)
        library.OSSL_CMP_SRV_CTX_set_accept_raverified(context, 1)  # -popo 0: the RA has verified possession
        cmp = library.OSSL_CMP_SRV_CTX_get0_cmp_ctx(context)
        library.OSSL_CMP_CTX_set_log_cb(cmp, self._log_callback)
        if envelope.mac:
            # OpenSSL does not look at the reference. To an unknown one belongs a secret that nobody knows.
            reference = self.ref.encode()
            secret = self.secret.encode() if envelope.reference == reference else secrets.token_bytes(32)
            library.OSSL_CMP_CTX_set1_referenceValue(cmp, reference, len(reference))
            library.OSSL_CMP_CTX_set1_secretValue(cmp, secret, len(secret))
            library.OSSL_CMP_CTX_set1_subjectName(cmp, library.X509_get_subject_name(self._objects["sub"]))
        else:
            # without a secret, for OpenSSL would prefer that
            library.OSSL_CMP_CTX_set1_cert(cmp, self._objects["cmp"])
            library.OSSL_CMP_CTX_set1_pkey(cmp, self._objects["key"])
            store = library.X509_STORE_new()
            library.X509_STORE_add_cert(store, self._objects["root"])
            library.OSSL_CMP_CTX_set0_trustedStore(cmp, store)
        return context

    def _close(self, transaction: Transaction) -> None:
        """Free a transaction whose lock is held."""
        if transaction.context is not None:
            libcrypto().OSSL_CMP_SRV_CTX_free(transaction.context)
            transaction.context = None
        if transaction.serial:
            for path in (self.directory / "held").glob(f"{transaction.serial}.*"):
                path.unlink()

    # --- OpenSSL's callbacks; what they get and return is said in OSSL_CMP_SRV_CTX_init(3)

    def _on_cert_request(
        self, _ctx: int, _req: int, _id: int, _crm: int, _p10: int, certificate: Any, chain: Any, ca_pubs: Any
    ) -> Optional[int]:
        """ir, cr, kur, p10cr, and the same once more when polling is over: decide, and issue."""
        transaction: Transaction = self._working.transaction
        try:
            if not self._decided(transaction):
                transaction.note = f": waiting, serial {transaction.serial}"
                return status_info(WAITING)
            transaction.certificate = self._issue(transaction.wanted, transaction.serial)
        except (ValueError, IndexError) as error:
            return self._rejection(Refusal("badDataFormat", f"the request cannot be read: {error}"))
        except Refusal as refusal:
            return self._rejection(refusal)
        transaction.note = clean(f": issued {transaction.serial} {' '.join(transaction.wanted.names)}")
        certificate[0] = from_der("d2i_X509", transaction.certificate)
        stranger, root, sub = (self._objects[name] for name in ("stranger", "root", "sub"))
        if self.ca_pubs_only:
            ca_pubs[0] = certificate_stack([sub, root])
        else:
            chain[0] = certificate_stack([stranger, root, sub] if self.junk else [sub])
        return status_info(ACCEPTED)

    def _rejection(self, refusal: Refusal) -> Optional[int]:
        self._working.transaction.note = clean(f": rejected, {refusal.fail_info} {refusal.text}")
        return status_info(REJECTION, refusal.fail_info, refusal.text)

    def _decided(self, transaction: Transaction) -> bool:
        """Whether to issue now; else it waits. Raises Refusal."""
        verdict, transaction.verdict = transaction.verdict, ""
        if not verdict:  # it is not a poll that has brought us here
            transaction.wanted = read_request(transaction.body)
            transaction.serial = new_serial()
            transaction.certificate = b""
            transaction.polls_left = 0 if self.hold else self.polls
            transaction.waiting = self.hold or self.polls > 0
            if self.hold:
                entry = {"transaction": transaction.identifier, "names": transaction.wanted.names}
                partial = self.directory / "held" / f"{transaction.serial}.partial"
                partial.write_text(json.dumps(entry))
                partial.rename(partial.with_suffix(".json"))
            if transaction.waiting:
                return False
        if verdict == "refuse" or (self.reject and verdict != "approve"):
            raise Refusal(self.reject or "badRequest", self.status_text)
        return True

    def _on_poll_req(self, _ctx: int, _req: int, _id: int, original: Any, check_after: Any) -> int:
        """pollReq: give back the original request, to be answered now, or the seconds until the next poll."""
        transaction: Transaction = self._working.transaction
        original[0] = None  # OpenSSL passes it uninitialised
        if not transaction.waiting:
            return 0
        verdict = ""
        if transaction.polls_left:
            transaction.polls_left -= 1
            verdict = "" if transaction.polls_left else "go"
        else:
            for decision in ("approve", "refuse"):
                if (self.directory / "held" / f"{transaction.serial}.{decision}").exists():
                    verdict = decision
        if verdict:
            transaction.verdict, transaction.waiting = verdict, False
            original[0] = from_der("d2i_OSSL_CMP_MSG", transaction.request)
        else:
            check_after[0] = self.check_after
            transaction.note = f": still waiting, serial {transaction.serial}"
        return 1

    def _on_cert_conf(self, _ctx: int, _req: int, _id: int, _hash: int, _status: int) -> int:
        """certConf: is it about the certificate that was issued? RFC 4210 section 5.3.18."""
        transaction: Transaction = self._working.transaction
        cert_hash = read_der(transaction.body.content).parts()[0].parts()[0].content
        # the hash algorithm is the one of the certificate's signature, and all are signed with SHA-256
        return int(cert_hash == hashlib.sha256(transaction.certificate).digest())

    def _on_rr(self, _ctx: int, _req: int, issuer: Optional[int], _serial: Optional[int]) -> Optional[int]:
        """rr: RevDetails { certDetails, crlEntryDetails }, RFC 4210 section 5.3.9."""
        transaction: Transaction = self._working.transaction
        details = read_der(transaction.body.content).parts()[0].parts()
        number = details[0].part(0x81)
        serial = serial_hex(int.from_bytes(number.content, "big")) if number else ""
        reason = 0
        for extension in details[1].parts() if len(details) > 1 else []:
            if dotted(extension.parts()[0].content) == REASON_CODE:
                reason = int.from_bytes(read_der(extension.parts()[-1].content).content, "big")
        library = libcrypto()
        own_name = library.X509_get_subject_name(self._objects["sub"])
        known = serial and issuer and library.X509_NAME_cmp(issuer, own_name) == 0
        try:
            if not known or not (self.directory / "issued" / f"{serial}.pem").exists():
                raise Refusal("badCertId", "this CA has not issued the certificate")
            self._revoke(serial, reason)
        except Refusal as refusal:
            return self._rejection(refusal)
        transaction.note = f": revoked {serial}, reason {reason}"
        return status_info(ACCEPTED if CRL_REASONS[reason] else GRANTED_WITH_MODS)

    def _on_genm(self, _ctx: int, _req: int, _items: int, answer: Any) -> int:
        """genm: an empty genp, which will do to see whether the CA is there."""
        answer[0] = libcrypto().OPENSSL_sk_new_null()
        return 1

    def _on_error(self, _ctx: int, _req: int, _status: int, _code: int, _details: int) -> None:
        """error: OpenSSL's answer, a pkiConf, is all there is to do."""

    def _on_log(self, _function: bytes, _file: bytes, _line: int, level: int, text: bytes) -> int:
        """OpenSSL's remarks, which would else go to standard error: errors and warnings (severity 4)."""
        if level <= 4:
            LOG.info("OpenSSL: %s", clean(text.decode(errors="replace")))
        return 1

    # --- Certificates, made by the openssl program in the directory

    def _issue(self, wanted: Wanted, serial: str) -> bytes:
        """A new certificate, entered into the index, in DER. Raises Refusal."""
        extensions = {**DEFAULT_EXTENSIONS, **dict(wanted.extensions), **OWN_EXTENSIONS}
        try:
            output = self._sign(wanted, list(extensions.values()), serial, "sub", 90)
        except DemoError as error:
            raise Refusal("badCertTemplate", f"no certificate can be made of this: {error}") from error
        # notAfter=2027-01-31 23:59:59Z, subject=/CN=..., and the PEM block
        until, name, pem = output.split("\n", 2)
        row = ["V", re.sub("[^0-9]", "", until)[2:] + "Z", "", serial, "unknown", name[8:] or serial]
        with self._index_lock:
            (self.directory / "issued" / f"{serial}.pem").write_text(pem)
            with (self.directory / "index.txt").open("a") as index:
                index.write("\t".join(row) + "\n")
        return first_pem(pem)

    def _sign(self, wanted: Wanted, extensions: list[str], serial: str, issuer: str, days: int) -> str:
        """End, subject and PEM of a new certificate. The issuer "" signs itself with wanted.public_key's key."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix="work-") as work:
            config, key, csr = (str(Path(work, name)) for name in ("openssl.cnf", "key.pem", "subject.csr"))
            Path(key).write_text(wanted.public_key)
            Path(config).write_text(
                "\n".join(
                    ["openssl_conf = start", "[start]", "oid_section = types", "[types]"]
                    + [f"{type_alias(oid)} = {oid}" for oid in wanted.types]
                    + ["[req]", "distinguished_name = req", "[extensions]", *extensions, ""]
                )
            )
            subject = ["-subj", wanted.subject or "/"]
            source = ["-new", *subject]
            if not wanted.subject.isascii():
                # `openssl x509 -subj` takes Latin-1, `openssl req -utf8 -subj` everything; the key does not matter
                self._openssl(config, "req", "-new", "-key", "cmp.key", "-utf8", *subject, "-out", csr)
                source = ["-req", "-in", csr]
            return self._openssl(
                config, "x509", *source, "-set_serial", f"0x{serial}", "-days", str(days),
                "-extfile", config, "-extensions", "extensions",
                *(["-key", key] if not issuer else ["-force_pubkey", key]),
                *(["-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key"] if issuer else []),
                "-enddate", "-dateopt", "iso_8601", "-subject", "-nameopt", "compat",
            )  # fmt: skip

    def _revoke(self, serial: str, reason: int) -> None:
        """Revoke in the index, and make a new CRL. Raises Refusal."""
        if reason not in CRL_REASONS:
            raise Refusal("badRequest", f"this CA cannot do that: CRLReason {reason}")
        with self._index_lock:
            if self.is_revoked(serial):
                raise Refusal("certRevoked", "the certificate is already revoked")
            name = CRL_REASONS[reason] or CRL_REASONS[0]
            self._openssl("ca.cnf", "ca", "-revoke", f"issued/{serial}.pem", "-crl_reason", name)
            self._make_crl()

    def _make_crl(self) -> None:
        self._openssl("ca.cnf", "ca", "-gencrl", "-out", "ca.crl.new")
        (self.directory / "ca.crl.new").replace(self.directory / "ca.crl")

    def _index(self) -> list[list[str]]:
        """The index of `openssl ca`: status, end of validity, revocation, serial number, file, subject."""
        return [line.split("\t") for line in (self.directory / "index.txt").read_text().splitlines()]

    def _set_up(self) -> None:
        """Make the directory, whole or not at all. The CRL comes last: where it is, the directory is complete."""
        directory = self.directory
        if (directory / "ca.crl").exists():
            return
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(directory.iterdir()):
                raise DemoError(f"{directory} is neither empty nor a complete demo CA")
        except OSError as error:
            raise DemoError(f"{directory}: {error.strerror or error}") from error
        try:
            self._fill()
        except BaseException:  # Ctrl-C, too
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _fill(self) -> None:
        """Make what is in the directory."""
        directory = self.directory
        directory.chmod(0o700)
        (directory / "held").mkdir()
        (directory / "issued").mkdir()
        (directory / "ca.cnf").write_text(CA_CONFIG)
        (directory / "index.txt").touch()
        (directory / "index.txt.attr").write_text("unique_subject = no\n")
        (directory / "crlnumber").write_text("01\n")
        ca = ["basicConstraints = critical,CA:TRUE", "keyUsage = critical,keyCertSign,cRLSign"]
        leaf = ["basicConstraints = critical,CA:FALSE", "keyUsage = critical,digitalSignature"]
        self._identity("root", "Demo Root CA", "", ca)
        self._identity("stranger", "A Stranger", "", ca)
        self._identity("sub", "Demo Issuing CA", "root", ["basicConstraints = critical,CA:TRUE,pathlen:0", ca[1]])
        # by the root, so that the client can verify it where the issuing CA comes only in caPubs
        self._identity("cmp", "Demo CMP Signer", "root", leaf)
        self._identity("ra", "Demo RA", "sub", [*leaf, "subjectAltName = DNS:ra.example"])
        server = ["extendedKeyUsage = serverAuth", "subjectAltName = DNS:localhost,IP:127.0.0.1"]
        self._identity("tls", "localhost", "sub", [*leaf, *server])
        shutil.copyfile(directory / "root.pem", directory / "trusted.pem")
        self._make_crl()

    def _identity(self, name: str, common_name: str, issuer: str, extensions: list[str]) -> None:
        """A key and its certificate; with the issuing CA's behind it if that is the issuer."""
        key, certificate = self.directory / f"{name}.key", self.directory / f"{name}.pem"
        self._openssl("ca.cnf", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key.name)
        key.chmod(0o600)
        half = key.read_text() if not issuer else self._openssl("ca.cnf", "pkey", "-in", key.name, "-pubout")
        wanted = Wanted(f"/C=DE/O=Demo/CN={common_name}", public_key=half)
        identifiers = ["subjectKeyIdentifier = hash"] + ["authorityKeyIdentifier = keyid:always"] * bool(issuer)
        output = self._sign(wanted, extensions + identifiers, new_serial(), issuer, 3650)
        chain = (self.directory / "sub.pem").read_text() if issuer == "sub" else ""
        certificate.write_text(output.split("\n", 2)[2] + chain)

    def _openssl(self, config: str, *arguments: str) -> str:
        """What the openssl program prints, run in the directory. Raises DemoError."""
        try:
            run = subprocess.run(
                [self.openssl, *arguments],
                cwd=self.directory,
                env={**os.environ, "OPENSSL_CONF": config},  # not the machine's, which may ask for anything
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DemoError(f"cannot run {self.openssl}: {error}") from error
        if run.returncode:
            message = run.stderr.decode(errors="replace").strip()
            raise DemoError(clean(f"openssl {arguments[0]}: {message}"))
        return run.stdout.decode(errors="replace")


# --- HTTP


class HttpServer(ThreadingHTTPServer):
    """The listener of one demo CA."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, ca: DemoCA) -> None:
        self.ca = ca
        self.tls: Optional[ssl.SSLContext] = None
        if ca.tls:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(ca.directory / "tls.pem", ca.directory / "tls.key")
        super().__init__(("127.0.0.1", ca.port), CmpHandler)

    def server_bind(self) -> None:
        """As HTTPServer's own, which would ask the DNS for this machine's name first."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            # the handshake is left to the connection's thread: one slow client must not stop all others
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        LOG.info("connection lost: %s", clean(str(sys.exc_info()[1])))


class CmpHandler(BaseHTTPRequestHandler):
    """CMP over HTTP, RFC 6712: one POST, one message."""

    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT
    wbufsize = 1 << 16  # header and body in one packet
    server: HttpServer

    def do_POST(self) -> None:
        """Answer a request, or say what is wrong with it by an HTTP status."""
        length = self.headers.get("Content-Length", "")
        if not self.server.ca.running:  # on a connection that has outlived stop()
            self.send_error(503)
        elif not self.path.rstrip("/").endswith("/pkix"):
            self.send_error(404)
        elif self.headers.get_content_type() != "application/pkixcmp":
            self.send_error(415)
        elif not re.fullmatch("[0-9]{1,9}", length):
            self.send_error(411)
        elif int(length) > MAX_REQUEST:
            self.send_error(413)
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, request: bytes) -> None:
        try:
            response = self.server.ca.answer(request)
        except (ValueError, IndexError) as error:
            LOG.info("not answered: %s", clean(str(error)))
            self.send_error(400)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/pkixcmp")
        self.send_header("Content-Length", str(len(response)))
        self.send_header("Connection", "close" if self.close_connection else "keep-alive")
        self.end_headers()
        self.wfile.write(response)

    def log_message(self, format: str, *args: Any) -> None:
        """One line per message is enough, and _answer writes it."""


# --- The command line


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    result = argparse.ArgumentParser(description="A CMP CA for trials, on 127.0.0.1, until Ctrl-C.")
    add = result.add_argument
    add("directory", metavar="DIR", help="its keys, certificates, index and CRL; made the first time")
    commands = ("serve", "pending", "approve", "refuse")
    add("command", choices=commands, nargs="?", default="serve", help="serve, or decide what --hold lets wait")
    add("what", metavar="WHAT", nargs="?", help="all, a serial number, a transaction ID or a name")
    add("--port", type=int, default=8080)
    add("--openssl", default="openssl", help="the program that makes the certificates")
    add("--tls", action="store_true", help="HTTPS")
    add("--hold", action="store_true", help="let requests wait until they are approved")
    add("--polls", type=int, default=0, metavar="N", help="let requests wait for N polls")
    add("--check-after", type=int, default=1, metavar="S", help="tell those who wait to poll in S seconds")
    add("--reject", choices=FailInfo.__members__, default="", metavar="FAILINFO", help="reject requests")
    add("--text", default="", help="the statusString of the rejection")
    add("--junk", action="store_true", help="fill the extraCerts with what nobody needs")
    add("--ca-pubs-only", action="store_true", help="send the issuing CA in the caPubs only")
    return result


def serve(arguments: argparse.Namespace) -> int:
    """Run the CA until Ctrl-C."""
    ca = DemoCA(arguments.directory, port=arguments.port, openssl=arguments.openssl, tls=arguments.tls)
    ca.hold, ca.polls, ca.check_after = arguments.hold, arguments.polls, arguments.check_after
    ca.reject, ca.status_text = arguments.reject, arguments.text
    ca.junk, ca.ca_pubs_only = arguments.junk, arguments.ca_pubs_only
    LOG.addHandler(logging.StreamHandler(sys.stdout))
    LOG.setLevel(logging.INFO)
    with ca:
        print(ca.section())
        other = ca.options("certificate")
        print("# To authenticate by certificate, instead of cmp_ref, cmp_secret and cmp_expect_sender:")
        print(
            "\n".join(f"# {key}: {other[key]}" for key in ("cmp_cert", "cmp_key", "cmp_expect_sender")),
            "\n",
            flush=True,
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
    return 0


def desk(arguments: argparse.Namespace) -> int:
    """List what waits, or decide it. Exit code 1 if there was nothing to decide."""
    directory = Path(arguments.directory)
    if not (directory / "held").is_dir():
        raise DemoError(f"{directory}: no demo CA here")
    if arguments.command == "pending":
        for request in held_requests(directory):
            print(request.serial, clean(" ".join(request.names)))
        return 0
    count = decide(directory, arguments.what or "all", arguments.command)
    print(f"{arguments.command}: {count}")
    return 0 if count else 1


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command line. Returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.command in ("approve", "refuse") and not arguments.what:
        parser().error(f"{arguments.command} what?")
    try:
        return serve(arguments) if arguments.command == "serve" else desk(arguments)
    except (DemoError, OSError) as error:
        print(f"demo_ca: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
