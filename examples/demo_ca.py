#!/usr/bin/env python3
"""A CMP certificate authority for trials and tests. Its keys lie unencrypted in a directory.

    demo_ca.py DIR                  serve on 127.0.0.1:8080 until Ctrl-C; makes DIR the first time
    demo_ca.py DIR --hold           let every request wait until somebody approves it. To do so, type in
    demo_ca.py DIR pending          another terminal: this lists the requests that wait,
    demo_ca.py DIR approve all      and this approves all (or one: a serial number, a transaction ID, a name)

In a test:

    with DemoCA(tmp_path / "ca") as ca:
        ca.hold = True
        section = ca.section("certificate")     # the [CAhandler] section that fits
        ...
        ca.approve("all")

The way of a message, and the order of this file:

    openssl cmp --HTTP--> CmpHandler --> DemoCA.answer: which transaction is it?
                                           --> OSSL_CMP_SRV_process_request(3): parses it, checks its protection
                                                 --> DemoCA._on_cert_request and other callbacks: decide
                                                       --> Store: makes the certificate, libcrypto signs it
                                           <-- the answer, protected

CMP itself (parsing, protection, nonces, proof of possession) is OpenSSL's own server, OSSL_CMP_SRV_CTX_new(3),
called in libcrypto through ctypes. libcrypto makes the keys, too, and signs certificates and the CRL. What this
file does is what a CA decides: what goes into a certificate, and when.

A real CA checks who may request what. This one does not: whoever knows the secret, or holds any certificate that
this CA has issued, gets every name.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
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
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Union

__all__ = ["DemoCA", "DemoError", "Message", "Pending"]

LOG = logging.getLogger("demo_ca")
LOG.addHandler(logging.NullHandler())

MAX_TRANSACTIONS = 10_000  # clients that never confirm must not fill the memory


class DemoError(Exception):
    """An error that the user can correct, in one line."""


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


# --- The CA: what its user calls, then the way of a message


class DemoCA:
    """A CMP CA on 127.0.0.1, see the top of this file. start() and stop() it, or use it in a with statement.

    The attributes may be changed at any time: they are read for each request.

    Attributes:
        hold: answer "waiting" until the request is approved or refused.
        polls: answer "waiting", and decide at the Nth poll.
        check_after: how many seconds a waiting client shall wait before its next poll.
        reject: a failInfo such as "badCertTemplate": reject every request for a certificate.
        status_text: the statusString of the rejection.
        messages: every exchange so far.
    """

    path = "pkix/"

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        port: int = 0,
        tls: bool = False,
        ref: str = "1234",
        secret: str = "demo-secret",  # noqa: S107
    ) -> None:
        self.directory = Path(directory).absolute()
        self.port = port
        self.tls = tls
        self.ref = ref
        self.secret = secret
        self.hold = False
        self.polls = 0
        self.check_after = 1
        self.reject = ""
        self.status_text = ""
        self.messages: list[Message] = []
        self._store = Store(self.directory)
        self._http: HttpServer | None = None
        self._transactions: dict[str, Transaction] = {}
        self._lock = threading.Lock()  # of _transactions
        self._thread = threading.local()  # .work: the message that the callbacks in this thread are about
        # libcrypto keeps bare pointers to these, so they must live as long as the contexts do
        methods: list[tuple[Callable[..., Any], Any]] = [
            (self._on_cert_request, None), (self._on_rr, None), (self._on_genm, 0),
            (self._on_error, None), (self._on_cert_conf, 0), (self._on_poll_req, 0),
        ]  # fmt: skip
        self._callbacks = [kind(safely(method, otherwise)) for kind, (method, otherwise) in zip(CALLBACKS, methods)]
        self._log_callback = LOG_CALLBACK(safely(self._on_log, 1))

    def start(self) -> DemoCA:
        """Make the directory if it is not there, and listen.

        Raises:
            DemoError: no usable OpenSSL, something else in the directory, or the port is taken.
        """
        self._store.set_up()
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

    def __enter__(self) -> DemoCA:
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
        return self._store.issued()

    def is_revoked(self, serial: str) -> bool:
        """Whether the certificate with this serial number, in hexadecimal, is revoked."""
        return serial.upper() in self._store.revoked()

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

    # --- The way of a message. HTTP comes first: CmpHandler below calls answer().

    def answer(self, data: bytes) -> bytes:
        """The answer to a request, both in DER. Raises ValueError or IndexError if it is not a request."""
        request = from_der("d2i_OSSL_CMP_MSG", data)
        if request is None:
            raise ValueError("not a CMP message")
        try:
            envelope = read_envelope(to_der("i2d_OSSL_CMP_MSG", request))
            while True:
                transaction = self._transaction(envelope)
                with transaction.lock:
                    if transaction.context is not None:  # else it ended while this thread waited for the lock
                        return self._answer(request, Work(transaction, envelope))
        finally:
            libcrypto().OSSL_CMP_MSG_free(request)

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
        """OpenSSL's server for one transaction. It protects in the same way as the transaction's first message."""
        library = libcrypto()
        context: int = library.OSSL_CMP_SRV_CTX_new(None, None)
        library.OSSL_CMP_SRV_CTX_init(context, None, *self._callbacks)
        library.OSSL_CMP_SRV_CTX_set_accept_raverified(context, 1)  # -popo 0: the RA has verified possession
        library.OSSL_CMP_SRV_CTX_set_grant_implicit_confirm(context, 1)
        cmp = library.OSSL_CMP_SRV_CTX_get0_cmp_ctx(context)
        library.OSSL_CMP_CTX_set_log_cb(cmp, self._log_callback)
        if envelope.mac:
            # OpenSSL does not look at the reference. An unknown one gets a secret that nobody knows.
            reference = self.ref.encode()
            secret = self.secret.encode() if envelope.reference == reference else secrets.token_bytes(32)
            library.OSSL_CMP_CTX_set1_referenceValue(cmp, reference, len(reference))
            library.OSSL_CMP_CTX_set1_secretValue(cmp, secret, len(secret))
            library.OSSL_CMP_CTX_set1_subjectName(cmp, library.X509_get_subject_name(self._store.objects["sub.pem"]))
        else:
            # no secret here: OpenSSL would use it and not the certificate
            library.OSSL_CMP_CTX_set1_cert(cmp, self._store.objects["cmp.pem"])
            library.OSSL_CMP_CTX_set1_pkey(cmp, self._store.objects["cmp.key"])
            trusted = library.X509_STORE_new()
            library.X509_STORE_add_cert(trusted, self._store.objects["root.pem"])
            library.OSSL_CMP_CTX_set0_trustedStore(cmp, trusted)
        return context

    def _answer(self, request: int, work: Work) -> bytes:
        """Let OpenSSL answer. It calls the callbacks below, and they may change the transaction's state."""
        transaction = work.transaction
        self._thread.work = work
        library = libcrypto()
        library.ERR_clear_error()  # else OpenSSL could give an old error of this thread as the reason
        response = library.OSSL_CMP_SRV_process_request(transaction.context, request)
        try:
            result = to_der("i2d_OSSL_CMP_MSG", response) if response else b""
        finally:
            library.OSSL_CMP_MSG_free(response)
        status = library.OSSL_CMP_CTX_get_status(library.OSSL_CMP_SRV_CTX_get0_cmp_ctx(transaction.context))
        # OpenSSL keeps a transaction open after a rejection, but nothing can follow
        if status != TRANSACTION_OPEN or not isinstance(transaction.state, (Waiting, Issued)):
            self._end(transaction)
        if not result:
            raise ValueError("OpenSSL has no answer to this message")
        message = Message(transaction.identifier, work.envelope.name, read_envelope(result).name)
        self.messages.append(message)
        LOG.info("%s %s -> %s%s", message.transaction[:8], message.request, message.response, work.note)
        return result

    def _end(self, transaction: Transaction) -> None:
        """Forget a transaction whose lock is held."""
        with self._lock:
            if self._transactions.get(transaction.identifier) is transaction:
                del self._transactions[transaction.identifier]
        self._close(transaction)

    def _close(self, transaction: Transaction) -> None:
        """Free what a transaction holds. Its lock is held."""
        if transaction.context is not None:
            libcrypto().OSSL_CMP_SRV_CTX_free(transaction.context)
            transaction.context = None
        self._leave_desk(transaction.state)

    def _leave_desk(self, state: State) -> None:
        """A request that waits does so no longer."""
        if isinstance(state, Waiting):
            drop_request(self.directory, state.order.serial)

    # --- OpenSSL's callbacks: what the CA decides. OSSL_CMP_SRV_CTX_init(3) says what they get and return.

    def _on_cert_request(
        self, _ctx: int, _req: int, _id: int, _crm: int, _p10: int, certificate: Any, chain: Any, _ca_pubs: Any
    ) -> int | None:
        """ir, cr, kur, p10cr: begin. After the last poll OpenSSL calls this again: then it is Decided already."""
        work: Work = self._thread.work
        transaction = work.transaction
        try:
            if not isinstance(transaction.state, Decided):
                self._leave_desk(transaction.state)  # of a client that waited, and now begins again
                transaction.state = self._begin(work)
            if isinstance(transaction.state, Waiting):
                work.note = f": waiting, serial {transaction.state.order.serial}"
                return status_info(WAITING)
            order = transaction.state.order
            if not transaction.state.approved:
                raise Refusal(self.reject or "badRequest", self.status_text)
            transaction.state = Issued(self._store.issue(order.wanted, order.serial))
        except (ValueError, IndexError) as error:
            return self._rejection(Refusal("badDataFormat", f"the request cannot be read: {error}"))
        except Refusal as refusal:
            return self._rejection(refusal)
        work.note = clean(f": issued {order.serial} {' '.join(order.wanted.names)}")
        certificate[0] = from_der("d2i_X509", transaction.state.certificate)
        chain[0] = certificate_stack([self._store.objects["sub.pem"]])
        return status_info(ACCEPTED)

    def _begin(self, work: Work) -> Waiting | Decided:
        """The state after a new request for a certificate. Raises Refusal, ValueError, IndexError."""
        order = Order(read_request(work.envelope.body), new_serial(), work.envelope.message)
        if self.hold:
            hold_request(self.directory, Pending(work.transaction.identifier, order.serial, order.wanted.names))
            return Waiting(order, 0)
        if self.polls > 0:
            return Waiting(order, self.polls)
        return Decided(order, not self.reject)

    def _on_poll_req(self, _ctx: int, _req: int, _id: int, original: Any, check_after: Any) -> int:
        """pollReq: return the original request, to be answered now, or the seconds until the next poll."""
        work: Work = self._thread.work
        original[0] = None  # OpenSSL passes it uninitialised
        if not isinstance(work.transaction.state, Waiting):
            return 0
        state = work.transaction.state = self._after_poll(work.transaction.state)
        if isinstance(state, Decided):
            original[0] = from_der("d2i_OSSL_CMP_MSG", state.order.message)
        else:
            check_after[0] = self.check_after
            work.note = f": still waiting, serial {state.order.serial}"
        return 1

    def _after_poll(self, waiting: Waiting) -> Waiting | Decided:
        """The state after a pollReq."""
        if waiting.polls > 1:
            return waiting._replace(polls=waiting.polls - 1)
        if waiting.polls == 1:
            return Decided(waiting.order, not self.reject)
        approved = decision(self.directory, waiting.order.serial)
        if approved is None:
            return waiting
        self._leave_desk(waiting)
        return Decided(waiting.order, approved)

    def _on_cert_conf(self, _ctx: int, _req: int, _id: int, _hash: int, _status: int) -> int:
        """certConf: is it about the certificate that was issued? RFC 4210 section 5.3.18."""
        work: Work = self._thread.work
        if not isinstance(work.transaction.state, Issued):
            return 0
        cert_hash = read_der(work.envelope.body.content).parts()[0].parts()[0].content
        # the hash algorithm is the one of the certificate's signature; all are signed with SHA-256
        return int(cert_hash == hashlib.sha256(work.transaction.state.certificate).digest())

    def _on_rr(self, _ctx: int, _req: int, issuer: int | None, _serial: int | None) -> int | None:
        """rr: revoke a certificate of this CA."""
        work: Work = self._thread.work
        serial, reason = read_revocation(work.envelope.body)
        library = libcrypto()
        own_name = library.X509_get_subject_name(self._store.objects["sub.pem"])
        try:
            if not issuer or library.X509_NAME_cmp(issuer, own_name) != 0 or not self._store.has_issued(serial):
                raise Refusal("badCertId", "this CA has not issued the certificate")
            self._revoke(serial, reason)
        except Refusal as refusal:
            return self._rejection(refusal)
        work.note = f": revoked {serial}, reason {reason}"
        return status_info(ACCEPTED)

    def _revoke(self, serial: str, reason: int) -> None:
        """Revoke, if it can be done. Raises Refusal."""
        if reason not in CRL_REASONS:
            raise Refusal("badRequest", f"this CA cannot do that: CRLReason {reason}")
        self._store.revoke(serial, reason)

    def _rejection(self, refusal: Refusal) -> int | None:
        """The CA's no, as OpenSSL wants it."""
        self._thread.work.note = clean(f": rejected, {refusal.fail_info} {refusal.text}")
        return status_info(REJECTION, refusal.fail_info, refusal.text)

    def _on_genm(self, _ctx: int, _req: int, _items: int, answer: Any) -> int:
        """genm: an empty genp. It is enough to see that the CA is there."""
        answer[0] = libcrypto().OPENSSL_sk_new_null()
        return 1

    def _on_error(self, _ctx: int, _req: int, _status: int, _code: int, _details: int) -> None:
        """error: there is nothing to do; OpenSSL answers with a pkiConf."""

    def _on_log(self, _function: bytes, _file: bytes, _line: int, level: int, text: bytes) -> int:
        """OpenSSL's messages, errors and warnings only (severity 4). Without this they go to standard error."""
        if level <= 4:
            LOG.info("OpenSSL: %s", clean(text.decode(errors="replace")))
        return 1


def clean(text: str) -> str:
    """Text from elsewhere, fit for one line of a log."""
    return "".join(c if c.isprintable() else " " for c in text)[:300]


# --- HTTP

MAX_REQUEST = 1 << 20
SOCKET_TIMEOUT = 30


class HttpServer(ThreadingHTTPServer):
    """The listener of one demo CA."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, ca: DemoCA) -> None:
        self.ca = ca
        self.tls: ssl.SSLContext | None = None
        if ca.tls:
            self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.tls.load_cert_chain(ca.directory / "tls.pem", ca.directory / "tls.key")
        super().__init__(("127.0.0.1", ca.port), CmpHandler)

    def server_bind(self) -> None:
        """Like HTTPServer's, which would ask the DNS for this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.socket.getsockname()[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self.tls is not None:
            # the connection's own thread does the handshake: one slow client must not stop all others
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
        """Answer a request. An HTTP status says what is wrong with one that is not for a CMP server."""
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
            self._send_answer(self.rfile.read(int(length)))

    def _send_answer(self, request: bytes) -> None:
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
        """Nothing: DemoCA._answer writes one line per message, which is enough."""


# --- A transaction and its state


class Order(NamedTuple):
    """A certificate that was asked for."""

    wanted: Wanted
    serial: str
    message: bytes  # the request, in DER: the last poll gives it back to OpenSSL, which answers it then


class New(NamedTuple):
    """Nobody has asked for a certificate. rr and genm change nothing here."""


class Waiting(NamedTuple):
    """The client has to poll."""

    order: Order
    polls: int  # how many are left; 0: until somebody at the approval desk has decided


class Decided(NamedTuple):
    """The answer is known, and OpenSSL asks for it in the same exchange. A refusal ends the transaction."""

    order: Order
    approved: bool


class Issued(NamedTuple):
    """The client has the certificate, and may still confirm it."""

    certificate: bytes  # DER


# New --ir--> Waiting --pollReq, the last one--> Decided --approved--> Issued --certConf--> end
# New --ir--> Decided ...                           `--refused--> end
# Another ir in the same transaction begins again, from New, Waiting or Issued.
State = Union[New, Waiting, Decided, Issued]


@dataclass
class Transaction:
    """One CMP transaction: OpenSSL's server context for it, and its state, the only thing that changes."""

    identifier: str
    context: int | None  # None: ended
    state: State = field(default_factory=New)
    lock: threading.Lock = field(default_factory=threading.Lock)  # a context works on one message at a time


@dataclass
class Work:
    """One message that is being answered, for the callbacks. They write the note; it ends the line in the log."""

    transaction: Transaction
    envelope: Envelope
    note: str = ""


# --- The parts of a message that this file reads. OpenSSL has parsed the message before.

# The alternatives of PKIBody by tag, RFC 4210 section 5.1.2
Body = enum.IntEnum(
    "Body",
    "ir ip cr cp p10cr popdecc popdecr kur kup krr krp rr rp ccr ccp ckuann cann rann crlann pkiConf nested "
    "genm genp error certConf pollReq pollRep",
    start=0,
)
MAC_ALGORITHMS = ("1.2.840.113533.7.66.13", "1.2.840.113549.1.5.14")  # PasswordBasedMac, PBMAC1


class Envelope(NamedTuple):
    """What must be known of a message before OpenSSL works on it."""

    message: bytes  # all of it, in DER
    name: str
    body: Der
    transaction: str
    mac: bool
    reference: bytes  # the senderKID


def read_envelope(message: bytes) -> Envelope:
    """PKIMessage ::= SEQUENCE { header, body, .. }, RFC 4210 section 5.1. Raises ValueError, IndexError."""
    header, body = read_der(message).parts()[:2]
    # without pvno, sender and recipient: those two have tags of GeneralName, which mean something else here
    fields = {field.tag: read_der(field.content) for field in header.parts()[3:]}
    if 0xA4 not in fields:
        raise ValueError("no transactionID")
    algorithm = dotted(fields[0xA1].parts()[0].content) if 0xA1 in fields else ""
    reference = fields[0xA2].content if 0xA2 in fields else b""
    name = Body(body.tag & 0x1F).name
    return Envelope(message, name, body, fields[0xA4].content.hex(), algorithm in MAC_ALGORITHMS, reference)


# --- What a request asks for

EXTENSION_REQUEST = "1.2.840.113549.1.9.14"
SUBJECT_ALT_NAME, REASON_CODE = "2.5.29.17", "2.5.29.21"
NO_NAME = b"\x30\x00"


class Refusal(Exception):
    """The CA's no: the failInfo and the statusString of its answer."""

    def __init__(self, fail_info: str, text: str) -> None:
        super().__init__(fail_info, text)
        self.fail_info = fail_info
        self.text = text


class Wanted(NamedTuple):
    """A certificate that was asked for. Bytes are DER."""

    subject: bytes  # a Name
    public_key: bytes  # a SubjectPublicKeyInfo
    extensions: dict[str, bytes]  # object identifier, the whole extension
    names: tuple[str, ...]  # what a human calls it: the subject, if it has one, and the DNS names


def one_line(name: bytes) -> str:
    """A Name in slash form. Raises Refusal."""
    parsed = from_der("d2i_X509_NAME", name)
    if not parsed:
        raise Refusal("badCertTemplate", "the subject cannot be read")
    text = ctypes.create_string_buffer(300)
    libcrypto().X509_NAME_oneline(parsed, text, len(text))
    libcrypto().X509_NAME_free(parsed)
    return text.value.decode(errors="replace")


def read_extensions(extensions: Iterable[Der]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The extensions by their object identifiers, and the DNS names. Raises Refusal."""
    found: dict[str, bytes] = {}
    dns_names: tuple[str, ...] = ()
    for extension in extensions:
        first, *_, value = extension.parts()
        oid = dotted(first.content)
        if oid in found:  # RFC 5280 section 4.2
            raise Refusal("badCertTemplate", f"the extension {oid} is requested twice")
        found[oid] = extension.whole
        if oid == SUBJECT_ALT_NAME:
            names = read_der(value.content).parts()
            dns_names = tuple(name.content.decode("ascii", "replace") for name in names if name.tag == 0x82)
    return found, dns_names


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
        subject, key = name.whole, public_key.whole
    else:
        # CertReqMessages, CertReqMsg, CertRequest { certReqId, certTemplate, .. }
        template = content.parts()[0].parts()[0].parts()[1]
        fields = {field.tag: field for field in template.parts()}
        if 0xA6 not in fields:
            raise Refusal("badCertTemplate", "the request has no public key")
        subject = fields[0xA5].content if 0xA5 in fields else NO_NAME
        key = write_der(0x30, fields[0xA6].content)
        requested = fields[0xA9].parts() if 0xA9 in fields else []
    extensions, dns_names = read_extensions(requested)
    if subject != NO_NAME:
        return Wanted(subject, key, extensions, (one_line(subject), *dns_names))
    if SUBJECT_ALT_NAME not in extensions:
        raise Refusal("badCertTemplate", "the request has neither a subject nor a subjectAltName")
    return Wanted(subject, key, extensions, dns_names)


def read_revocation(body: Der) -> tuple[str, int]:
    """Serial number ("" if there is none) and CRLReason of an rr: RevDetails, RFC 4210 section 5.3.9.

    Raises:
        ValueError, IndexError: it is malformed.
    """
    template, *extensions = read_der(body.content).parts()[0].parts()
    number = next((part for part in template.parts() if part.tag == 0x81), None)
    serial = serial_hex(int.from_bytes(number.content, "big")) if number else ""
    for extension in extensions[0].parts() if extensions else []:
        oid, *_, value = extension.parts()
        if dotted(oid.content) == REASON_CODE:
            return serial, int.from_bytes(read_der(value.content).content, "big")
    return serial, 0


# --- The approval desk. It consists of files, so that another process can decide: DIR/held/SERIAL.json describes a
# --- request that waits. An empty file SERIAL.approve or SERIAL.refuse beside it is the decision.


def hold_request(directory: Path, request: Pending) -> None:
    """Let a request wait for a decision. A reader sees the whole file or none."""
    partial = directory / "held" / f"{request.serial}.partial"
    partial.write_text(json.dumps({"transaction": request.transaction, "names": request.names}))
    partial.rename(partial.with_suffix(".json"))


def held_requests(directory: Path) -> list[Pending]:
    """The requests that nobody has decided yet."""
    found = []
    for path in sorted((directory / "held").glob("*.json")):
        if decision(directory, path.stem) is not None:
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


def decision(directory: Path, serial: str) -> bool | None:
    """Whether a request is approved. None: nobody has decided yet. A refusal wins."""
    if (directory / "held" / f"{serial}.refuse").exists():
        return False
    return True if (directory / "held" / f"{serial}.approve").exists() else None


def drop_request(directory: Path, serial: str) -> None:
    """Remove a request that does not wait any longer."""
    # the description first: without its decision it would look undecided
    for suffix in (".json", ".approve", ".refuse"):
        (directory / "held" / f"{serial}{suffix}").unlink(missing_ok=True)


# --- The directory: what is in a certificate, and in the CRL. libcrypto signs them.

KEY_IDENTIFIER, AUTHORITY_KEY_IDENTIFIER = "2.5.29.14", "2.5.29.35"
ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
CRL_REASONS = (0, 1, 2, 3, 4, 5, 6, 9, 10)  # RFC 5280 section 5.3.1, without 8, removeFromCRL: it does not revoke

DAY = 24 * 3600

# What a certificate gets unless the request says otherwise, as lines of openssl's extension files
DEFAULT_EXTENSIONS = {
    "2.5.29.15": "keyUsage = critical,digitalSignature",
    "2.5.29.37": "extendedKeyUsage = serverAuth",
}
# ... and what no request can change, beside the authorityKeyIdentifier
OWN_EXTENSIONS = {"2.5.29.19": "basicConstraints = critical,CA:FALSE"}
SUBJECT, AUTHORITY = "subjectKeyIdentifier = DER:0414", "authorityKeyIdentifier = DER:30168014"


class Signer(NamedTuple):
    """Who signs: the key, as an object of libcrypto, the Name in DER and the key's identifier."""

    key: int
    name: bytes
    identifier: bytes


class Store:
    """The CA's directory: keys, certificates, what is revoked, and the CRL."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.objects: dict[str, int] = {}  # file -> the certificate or key in it, in libcrypto
        self._lock = threading.Lock()  # of revoked.json and ca.crl

    def issue(self, wanted: Wanted, serial: str) -> bytes:
        """Make a certificate. Returns it in DER. Raises Refusal."""
        defaults = {oid: extension(line) for oid, line in DEFAULT_EXTENSIONS.items()}
        own = {oid: extension(line) for oid, line in OWN_EXTENSIONS.items()}
        extensions = {**defaults, **wanted.extensions, **own}
        if SUBJECT_ALT_NAME in extensions:  # RFC 5280 section 4.2.1.6: critical without a subject, else not
            parts = read_der(extensions[SUBJECT_ALT_NAME]).parts()
            critical = [write_der(0x01, b"\xff")] if wanted.subject == NO_NAME else []
            extensions[SUBJECT_ALT_NAME] = sequence(parts[0].whole, *critical, parts[-1].whole)
        try:
            certificate = make_certificate(wanted._replace(extensions=extensions), serial, 90, self._signer("sub"))
        except (ValueError, IndexError) as error:
            raise Refusal("badCertTemplate", f"no certificate can be made of this: {error}") from error
        (self.directory / "issued" / f"{serial}.pem").write_text(pem("CERTIFICATE", certificate))
        return certificate

    def _signer(self, name: str) -> Signer:
        """One of the CA's identities, to sign with."""
        fields = read_der(read_pem(self.directory / f"{name}.pem")).parts()[0].parts()
        return Signer(self.objects[f"{name}.key"], fields[5].whole, key_identifier(fields[6].whole))

    def issued(self) -> list[str]:
        """The serial numbers of all certificates, oldest first."""
        paths = (self.directory / "issued").iterdir()
        return [path.stem for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]

    def has_issued(self, serial: str) -> bool:
        """Whether there is a certificate with this serial number."""
        return (self.directory / "issued" / f"{serial}.pem").exists()

    def revoked(self) -> dict[str, tuple[int, float]]:
        """The serial numbers of all revoked certificates, with CRLReason and time."""
        found: dict[str, tuple[int, float]] = json.loads((self.directory / "revoked.json").read_text())
        return found

    def revoke(self, serial: str, reason: int) -> None:
        """Revoke, and make a new CRL. Raises Refusal."""
        with self._lock:
            revoked = self.revoked()
            if serial in revoked:
                raise Refusal("certRevoked", "the certificate is already revoked")
            self._write_revoked({**revoked, serial: (reason, time.time())})

    def _write_revoked(self, revoked: dict[str, tuple[int, float]]) -> None:
        """Write revoked.json, and the CRL: TBSCertList, RFC 5280 section 5.1."""
        signer = self._signer("sub")
        entries = []
        for serial, (reason, when) in revoked.items():
            extensions = [extension(f"CRLReason = DER:0a01{reason:02x}")] if reason else []  # RFC 5280 section 5.3.1
            entries.append(sequence(integer(int(serial, 16)), utc_time(when), *map(sequence, extensions)))
        number = extension(f"crlNumber = DER:{integer(len(revoked) + 1).hex()}")
        content = sequence(
            integer(1),  # version 2
            ECDSA_WITH_SHA256,
            signer.name,
            utc_time(time.time()),
            utc_time(time.time() + 30 * DAY),
            sequence(*entries) if entries else b"",
            write_der(0xA0, sequence(extension(AUTHORITY + signer.identifier.hex()), number)),
        )
        crl = pem("X509 CRL", sign("X509_CRL", content, signer.key))
        for name, text in (("ca.crl", crl), ("revoked.json", json.dumps(revoked))):
            (self.directory / f"{name}.new").write_text(text)
            (self.directory / f"{name}.new").replace(self.directory / name)

    def set_up(self) -> None:
        """Make the directory, whole or not at all, and load it. revoked.json is made last.

        Raises:
            DemoError: something else is in the directory, or it cannot be made or read.
        """
        directory = self.directory
        if not (directory / "revoked.json").exists():
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
        for name in ("root.pem", "sub.pem", "sub.key", "cmp.pem", "cmp.key"):
            function = "d2i_AutoPrivateKey" if name.endswith(".key") else "d2i_X509"
            try:
                found = from_der(function, read_pem(directory / name))
            except (OSError, ValueError, IndexError) as error:
                raise DemoError(f"{directory}: {error}") from error
            if not found:
                raise DemoError(f"{directory}: {name} cannot be read")
            self.objects[name] = found

    def _fill(self) -> None:
        """Make everything that belongs into the directory."""
        directory = self.directory
        directory.chmod(0o700)
        (directory / "held").mkdir()
        (directory / "issued").mkdir()
        ca = ["basicConstraints = critical,CA:TRUE", "keyUsage = critical,keyCertSign,cRLSign"]
        leaf = ["basicConstraints = critical,CA:FALSE", "keyUsage = critical,digitalSignature"]
        self._identity("root", "Demo Root CA", "root", ca)
        self._identity("sub", "Demo Issuing CA", "root", ["basicConstraints = critical,CA:TRUE,pathlen:0", ca[1]])
        # issued by the root: a client that does not know the issuing CA yet can verify it, too
        self._identity("cmp", "Demo CMP Signer", "root", leaf)
        self._identity("ra", "Demo RA", "sub", [*leaf, "subjectAltName = DNS:ra.example"])
        server = ["extendedKeyUsage = serverAuth", "subjectAltName = DNS:localhost,IP:127.0.0.1"]
        self._identity("tls", "localhost", "sub", [*leaf, *server])
        shutil.copyfile(directory / "root.pem", directory / "trusted.pem")
        self._write_revoked({})

    def _identity(self, name: str, common_name: str, issuer: str, lines: list[str]) -> None:
        """Make a key and its certificate, followed by the issuing CA's if that has issued it."""
        key = self.objects[f"{name}.key"] = libcrypto().EVP_PKEY_Q_keygen(None, None, b"EC", b"P-256")
        file = self.directory / f"{name}.key"
        file.touch(mode=0o600)
        file.write_text(pem("EC PRIVATE KEY", to_der("i2d_PrivateKey", key)))
        public_key = to_der("i2d_PUBKEY", key)
        subject = demo_name(common_name)
        signer = Signer(key, subject, key_identifier(public_key)) if issuer == name else self._signer(issuer)
        wanted = Wanted(subject, public_key, {line: extension(line) for line in lines}, (common_name,))
        certificate = pem("CERTIFICATE", make_certificate(wanted, new_serial(), 3650, signer))
        chain = (self.directory / "sub.pem").read_text() if issuer == "sub" else ""
        (self.directory / f"{name}.pem").write_text(certificate + chain)


def make_certificate(wanted: Wanted, serial: str, days: int, signer: Signer) -> bytes:
    """A TBSCertificate, RFC 5280 section 4.1, that libcrypto signs. Raises ValueError, IndexError."""
    extensions = {
        KEY_IDENTIFIER: extension(SUBJECT + key_identifier(wanted.public_key).hex()),
        **wanted.extensions,
        AUTHORITY_KEY_IDENTIFIER: extension(AUTHORITY + signer.identifier.hex()),
    }
    content = sequence(
        write_der(0xA0, integer(2)),  # version 3
        integer(int(serial, 16)),
        ECDSA_WITH_SHA256,
        signer.name,
        sequence(utc_time(time.time()), utc_time(time.time() + days * DAY)),
        wanted.subject,
        wanted.public_key,
        write_der(0xA3, sequence(*extensions.values())),
    )
    return sign("X509", content, signer.key)


def extension(line: str) -> bytes:
    """An extension in DER, of a line of openssl's extension files."""
    name, _, value = line.partition(" = ")
    made = libcrypto().X509V3_EXT_nconf(None, None, name.encode(), value.encode())
    try:
        return to_der("i2d_X509_EXTENSION", made)
    finally:
        libcrypto().X509_EXTENSION_free(made)


def key_identifier(public_key: bytes) -> bytes:
    """SHA-1 of the key, RFC 5280 section 4.2.1.2. Raises ValueError, IndexError."""
    return hashlib.sha1(read_der(public_key).parts()[1].content[1:], usedforsecurity=False).digest()


def demo_name(common_name: str) -> bytes:
    """C=DE, O=Demo, CN=... as a Name in DER."""
    values = ((6, 0x13, "DE"), (10, 0x0C, "Demo"), (3, 0x0C, common_name))
    parts = (sequence(bytes([6, 3, 0x55, 4, arc]), write_der(tag, text.encode())) for arc, tag, text in values)
    return sequence(*(write_der(0x31, part) for part in parts))


def serial_hex(number: int) -> str:
    """A serial number as openssl prints it: whole bytes."""
    digits = f"{number:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


def new_serial() -> str:
    """128 bits, 126 of them random: positive and of one length (RFC 5280 section 4.1.2.2)."""
    return serial_hex(secrets.randbits(126) | 1 << 126)


def read_pem(path: Path) -> bytes:
    """The content of the first block of a PEM file. Raises OSError, ValueError, IndexError."""
    return base64.b64decode(path.read_text().split("-----")[2])


def pem(label: str, der: bytes) -> str:
    """A block of a PEM file."""
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n"


# --- libcrypto

# The bits of PKIFailureInfo, RFC 4210 section 5.2.3
FailInfo = enum.IntEnum(
    "FailInfo",
    "badAlg badMessageCheck badRequest badTime badCertId badDataFormat wrongAuthority incorrectData "
    "missingTimeStamp badPOP certRevoked certConfirmed wrongIntegrity badRecipientNonce timeNotAvailable "
    "unacceptedPolicy unacceptedExtension addInfoNotAvailable badSenderNonce badCertTemplate "
    "signerNotTrusted transactionIdInUse unsupportedVersion notAuthorized systemUnavail systemFailure duplicateCertReq",
    start=0,
)
ACCEPTED, _, REJECTION, WAITING = range(4)  # PKIStatus, in the same section
TRANSACTION_OPEN = -2  # OSSL_CMP_PKISTATUS_trans

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

# Result, arguments, and the functions that have them. Without these lines ctypes cuts pointers to 32 bits.
FUNCTIONS: tuple[tuple[Any, Sequence[Any], Sequence[str]], ...] = (
    (ctypes.c_uint, (), ["OPENSSL_version_major"]),
    (None, (), ["ERR_clear_error"]),
    (None, (P,), ["OSSL_CMP_MSG_free", "OSSL_CMP_SRV_CTX_free"]),
    (None, (P,), ["X509_free", "X509_CRL_free", "X509_NAME_free", "X509_EXTENSION_free"]),
    (P, (), ["OPENSSL_sk_new_null", "X509_STORE_new", "EVP_sha256"]),
    (P, (P, S, S, S), ["EVP_PKEY_Q_keygen", "X509V3_EXT_nconf"]),
    (P, (P,), ["X509_get_subject_name", "OSSL_CMP_SRV_CTX_get0_cmp_ctx"]),
    (P, (P, PP, ctypes.c_long), ["d2i_OSSL_CMP_MSG", "d2i_X509", "d2i_X509_CRL", "d2i_X509_NAME"]),
    (P, (P, PP, ctypes.c_long), ["d2i_AutoPrivateKey"]),
    (I, (P,), ["X509_up_ref", "OSSL_CMP_CTX_get_status"]),
    (I, (P, P), ["OPENSSL_sk_push", "X509_NAME_cmp", "X509_STORE_add_cert", "OSSL_CMP_CTX_set1_subjectName"]),
    (I, (P, P), ["OSSL_CMP_CTX_set1_cert", "OSSL_CMP_CTX_set1_pkey", "OSSL_CMP_CTX_set0_trustedStore"]),
    (I, (P, PP), ["i2d_OSSL_CMP_MSG", "i2d_X509", "i2d_X509_CRL", "i2d_X509_EXTENSION"]),
    (I, (P, PP), ["i2d_PrivateKey", "i2d_PUBKEY"]),
    (I, (P, P, P), ["X509_sign", "X509_CRL_sign"]),
    (S, (P, S, I), ["X509_NAME_oneline"]),
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
    for name in ("libcrypto.so.3", "libcrypto.so.4"):
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


def from_der(function: str, data: bytes) -> int | None:
    """A new object, made by one of the d2i functions; None if it cannot be parsed. The caller owns it."""
    buffer = ctypes.create_string_buffer(data, len(data))
    position = P(ctypes.addressof(buffer))
    result: int | None = getattr(libcrypto(), function)(None, ctypes.byref(position), len(data))
    return result


def to_der(function: str, item: int) -> bytes:
    """An object as DER, by one of the i2d functions. Raises ValueError."""
    length = getattr(libcrypto(), function)(item, None)
    if length <= 0:
        raise ValueError(f"OpenSSL cannot encode this: {function}")
    buffer = ctypes.create_string_buffer(length)
    getattr(libcrypto(), function)(item, ctypes.byref(P(ctypes.addressof(buffer))))
    return buffer.raw


def sign(kind: str, content: bytes, key: int) -> bytes:
    """Let libcrypto sign the content of a certificate ("X509") or a CRL ("X509_CRL"). Raises ValueError."""
    library = libcrypto()
    item = from_der(f"d2i_{kind}", sequence(content, ECDSA_WITH_SHA256, write_der(0x03, b"\0")))
    if not item:
        raise ValueError("OpenSSL cannot read it")
    try:
        if not getattr(library, f"{kind}_sign")(item, key, library.EVP_sha256()):
            raise ValueError("OpenSSL cannot sign it")
        return to_der(f"i2d_{kind}", item)
    finally:
        getattr(library, f"{kind}_free")(item)


def certificate_stack(certificates: Iterable[int]) -> int:
    """A new STACK_OF(X509), with a reference to each certificate. OpenSSL, which gets it, frees it."""
    stack: int = libcrypto().OPENSSL_sk_new_null()
    for certificate in certificates:
        libcrypto().X509_up_ref(certificate)
        libcrypto().OPENSSL_sk_push(stack, certificate)
    return stack


def status_info(status: int, fail_info: str = "", text: str = "") -> int | None:
    """A new PKIStatusInfo. OpenSSL, which gets it, frees it."""
    bits = 1 << FailInfo[fail_info] if fail_info else 0
    result: int | None = libcrypto().OSSL_CMP_STATUSINFO_new(status, bits, text.encode() or None)
    return result


def safely(function: Callable[..., Any], otherwise: Any) -> Callable[..., Any]:
    """A callback for OpenSSL. C knows no exceptions: one is logged, and the result is `otherwise`."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception:
            LOG.exception("error in %s", function.__name__)
            return otherwise

    return call


# --- DER


class Der(NamedTuple):
    """One element: its tag, its content, and all of its bytes."""

    tag: int
    content: bytes
    whole: bytes

    def parts(self) -> list[Der]:
        """The elements in a constructed one."""
        found: list[Der] = []
        rest = self.content
        while rest:
            found.append(read_der(rest))
            rest = rest[len(found[-1].whole) :]
        return found


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


def sequence(*parts: bytes) -> bytes:
    """A SEQUENCE of these elements."""
    return write_der(0x30, b"".join(parts))


def integer(value: int) -> bytes:
    """An INTEGER that is not negative."""
    return write_der(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def utc_time(seconds: float) -> bytes:
    """A time since the epoch as UTCTime: until 2049, RFC 5280 section 4.1.2.5."""
    return write_der(0x17, time.strftime("%y%m%d%H%M%SZ", time.gmtime(seconds)).encode())


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


# --- The command line


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    result = argparse.ArgumentParser(description="A CMP CA for trials, on 127.0.0.1, until Ctrl-C.")
    add = result.add_argument
    add("directory", metavar="DIR", help="its keys, certificates, index and CRL; made the first time")
    commands = ("serve", "pending", "approve", "refuse")
    add(
        "command",
        choices=commands,
        nargs="?",
        default="serve",
        help="serve, or list and decide what waits because of --hold",
    )
    add("what", metavar="WHAT", nargs="?", help="all, a serial number, a transaction ID or a name")
    add("--port", type=int, default=8080)
    add("--tls", action="store_true", help="HTTPS")
    add("--hold", action="store_true", help="let requests wait until they are approved")
    add("--polls", type=int, default=0, metavar="N", help="let requests wait for N polls")
    add("--check-after", type=int, default=1, metavar="S", help="tell those who wait to poll in S seconds")
    add("--reject", choices=FailInfo.__members__, default="", metavar="FAILINFO", help="reject requests")
    add("--text", default="", help="the statusString of the rejection")
    return result


def serve(arguments: argparse.Namespace) -> int:
    """Run the CA until Ctrl-C."""
    ca = DemoCA(arguments.directory, port=arguments.port, tls=arguments.tls)
    ca.hold, ca.polls, ca.check_after = arguments.hold, arguments.polls, arguments.check_after
    ca.reject, ca.status_text = arguments.reject, arguments.text
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


def main(argv: Sequence[str] | None = None) -> int:
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
