"""Hostile CSRs, configurations, answers, revocations and saved orders end in one error line; nothing is left.

A few hundred cases, always the same, in every run of the tests. The long run is `python3 tests/fuzz.py`.
"""

from __future__ import annotations

import base64
import configparser
import contextlib
import http.client
import logging
import os
import shutil
import socketserver
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

import cmp_ca_handler
import proxy
from cmp_ca_handler import CAhandler
from conftest import OPENSSL, csr_pem, wait_until
from demo_ca import decide, read_der, write_der
from proxy import (
    PKICONF,
    SECRET,
    body,
    cert_response,
    free_text,
    integer,
    message_parts,
    poll_rep,
    protected,
    status_info,
)
from shared import CHANGES, LONG, Change, cases, changed
from soak import children, demo_ca

PATIENCE = 60  # seconds that no call takes unless it hangs

# The four tests share one arena, and so one process when the tests run side by side.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fuzz")]


# --- The arena: a handler, a CA, a hostile server between the two, and what must be true after every call


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message and, if there is one, its traceback."""
        self.lines.append(record.getMessage() + (str(record.exc_info) if record.exc_info else ""))


class Arena:
    """Everything that the handler may touch lies under one directory, and is looked at after each call."""

    secret = SECRET

    def __init__(self, root: Path, section: dict[str, str]) -> None:
        self.root, self.work, self.ca = root, root / "work", section
        self.section: dict[str, str] = {}
        self.records = Records()
        self.logger = logging.getLogger("fuzz")
        self.logger.handlers, self.logger.propagate = [self.records], False
        self.logger.setLevel(logging.DEBUG)
        self.server = HostileServer(section["cmp_server"])
        self.verdicts: Counter[str] = Counter()
        self.bundle, self.identifier = "", ""  # of the last call
        self.configure()
        self.own = children()  # the demo CA
        self.descriptors = len(os.listdir("/proc/self/fd"))

    def configure(self, **changes: str | None) -> None:
        """Set the section: of the demo CA, behind the hostile server. None leaves a key out."""
        section = {"cmp_openssl_bin": OPENSSL, "cmp_tmp_dir": str(self.work), **self.ca}
        section.update(cmp_server=self.server.address, cmp_msg_timeout="2", cmp_total_timeout="4")
        merged: dict[str, str | None] = {**section, **{"cmp_" + key: value for key, value in changes.items()}}
        self.section = {key: value for key, value in merged.items() if value is not None}
        shutil.rmtree(self.work, ignore_errors=True)  # what a case that failed has left does not spoil the next

    def load_config(self, *_: object) -> configparser.RawConfigParser:
        """The host's function. A stand-in, for no INI file can hold all of the values, but a host's YAML file can."""
        config = configparser.RawConfigParser()
        config.optionxform = str  # type: ignore[assignment,method-assign]
        config.read_dict({"CAhandler": self.section})
        return config

    def enroll(self, csr: Any, keep: bool = False) -> str:
        """Enrol, look at all that must be true, and give the verdict: issued, waiting or failed."""
        with self._watched() as result, CAhandler(False, self.logger) as handler:
            result.extend(handler.enroll(csr))
        assert len(result) == 4
        self._one_line(result[0])
        verdict = verdict_of(result[0], result[1:4])
        assert self._left() == ([result[3]] if verdict == "waiting" else [])
        self.bundle, self.identifier = result[1] or "", result[3] or ""
        if not keep:
            shutil.rmtree(self.work, ignore_errors=True)
        self.verdicts[verdict] += 1
        return verdict

    def poll(self, identifier: Any) -> str:
        """Poll, and the same; what may be left is this one transaction, where it goes on waiting."""
        before = self._left()
        with self._watched() as result, CAhandler(False, self.logger) as handler:
            handler.ask_always = True
            result.extend(handler.poll("name", identifier, ""))
        assert len(result) == 5
        error, bundle, raw, same, rejected = result
        self._one_line(error)
        assert same == identifier
        assert isinstance(rejected, bool)
        if bundle is not None or rejected:
            assert (bundle is None) == (raw is None) == rejected
            assert self._left() == []
        else:
            assert raw is None
            assert self._left() == before
        self.bundle = bundle or ""
        verdict = "rejected" if rejected else "issued" if bundle else "failed" if error else "waiting"
        self.verdicts[verdict] += 1
        return verdict

    def revoke(self, cert: Any, reason: Any) -> str:
        """Revoke, and the same."""
        with self._watched() as result, CAhandler(False, self.logger) as handler:
            result.extend(handler.revoke(cert, reason, None))
        code, message, detail = result
        self._one_line(detail)
        assert (code == 200) == (message is None) == (detail is None)
        assert code in (200, 400, 500)
        assert self._left() == []
        self.verdicts[str(code)] += 1
        return str(code)

    def check(self) -> str | None:
        """handler_check(), and the same."""
        with self._watched() as result, CAhandler(False, self.logger) as handler:
            result.append(handler.handler_check())
        self._one_line(result[0])
        assert self._left() == []
        return result[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Any]]:
        """Let a call happen; then: in time, no process, no file elsewhere, a log that is what it seems to be."""
        self.records.lines.clear()
        elsewhere = self._elsewhere()
        started = time.monotonic()
        result: list[Any] = []
        yield result
        assert time.monotonic() - started < PATIENCE
        assert children() == self.own
        assert self._elsewhere() == elsewhere
        assert [line for line in self.records.lines if not line.isprintable()] == []
        assert [line for line in self.records.lines if self.secret in line] == []

    def _elsewhere(self) -> list[str]:
        """What is in the system's temporary directory, in the current one, and beside all of them."""
        deep = [path for name in ("system", "here") for path in (self.root / name).rglob("*")]
        return sorted(str(path) for path in [*deep, *self.root.glob("*")] if path != self.work)

    def _left(self) -> list[str]:
        """What is in `work`: cmp_tmp_dir, or a place for it. Empty, it may stay; so may the result of a poll."""
        if not self.work.is_dir():
            return []
        own = os.path.basename(self.section.get("cmp_tmp_dir", "").strip())
        names = sorted(name for name in os.listdir(self.work) if name != own or os.listdir(self.work / name))
        return [name for name in names if not (self.work / name).is_dir() or os.listdir(self.work / name) != ["issued"]]

    def _one_line(self, error: str | None) -> None:
        """An error is for people: on one line, short, no secret, and not the last resort of the handler."""
        assert error is None or (error and error.isprintable() and len(error) < 2000)
        assert not error or (self.secret not in error and not error.startswith("internal error"))


def verdict_of(error: str | None, rest: list[str | None]) -> str:
    """The verdict, by which of the values are there. Anything but one of these three is a mistake."""
    known = {(True, False, False, False): "failed", (False, True, True, False): "issued"}
    known[(False, False, False, True)] = "waiting"
    bundle, raw = rest[:2]
    if bundle and raw:
        first = bundle.split("-----")[2]
        assert base64.b64decode(first) == base64.b64decode(raw)
        assert "\n" not in raw
    there = [value is not None for value in (error, *rest)]
    return known[(there[0], there[1], there[2], there[3])]


class HostileServer(socketserver.ThreadingTCPServer):
    """Stands between handler and CA. `alter(number, response)` changes the raw HTTP response to a message."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), HostileConnection)
        self.target = target
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.number = 0
        self.alter: Callable[[int, bytes], bytes] | None = None
        self.replay: bytes | None = None  # answer with this instead of asking the CA
        self.last: int | None = None  # from this message on the connection breaks off before it reaches the CA
        self.seen: list[bytes] = []
        self.play: Callable[[bytes], bytes | None] | None = None  # has the whole say: request -> raw HTTP response
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def set(
        self,
        alter: Callable[[int, bytes], bytes] | None = None,
        replay: bytes | None = None,
        last: int | None = None,
        play: Callable[[bytes], bytes | None] | None = None,
    ) -> None:
        """For the next call."""
        self.play = play
        self.number, self.alter, self.replay, self.last, self.seen = 0, alter, replay, last, []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client may go away at any time."""


class HostileConnection(socketserver.StreamRequestHandler):
    """One request, one response; the client opens another connection for the next."""

    server: HostileServer
    timeout = 30

    def handle(self) -> None:
        """Pass it on to the CA, and its answer back, altered."""
        server, length = self.server, 0
        for line in iter(self.rfile.readline, b"\r\n"):
            if not line:
                return  # the client has closed
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        request = self.rfile.read(length)
        if server.play is not None:
            self.wfile.write(server.play(request) or b"")
            return
        if server.last is not None and server.number >= server.last:
            return
        message = server.replay if server.replay is not None else ask(server.target, request)
        server.seen.append(message)
        number, server.number = server.number, server.number + 1
        self.wfile.write(server.alter(number, message) if server.alter else as_http(message))


def ask(address: str, request: bytes) -> bytes:
    """The CA's answer to a message; nothing where it has none."""
    connection = http.client.HTTPConnection(address, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", "/pkix/", request, {"Content-Type": "application/pkixcmp"})
        response = connection.getresponse()
        body = response.read()
        return body if response.status == 200 else b""


HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: application/pkixcmp\r\nConnection: close\r\n"


def as_http(message: bytes) -> bytes:
    """A response as a server should send it."""
    return HEADER + b"Content-Length: %d\r\n\r\n" % len(message) + message


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    """One for all: what it costs to start is shared, and what one case leaves behind the next one finds."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("system", "here"):
        (root / name).mkdir()
    with pytest.MonkeyPatch.context() as patch, demo_ca(root / "ca") as section:
        helper = ModuleType("acme_srv.helper")
        patch.setitem(sys.modules, "acme_srv.helper", helper)
        patch.setattr(cmp_ca_handler, "HELPERS", ("acme_srv.helper",))
        patch.setattr(tempfile, "tempdir", str(root / "system"))
        patch.chdir(root / "here")
        arena = Arena(root, section)
        helper.load_config = arena.load_config  # type: ignore[attr-defined]
        yield arena
        arena.server.shutdown()
        arena.server.server_close()


@pytest.fixture
def fresh(arena: Arena, request: pytest.FixtureRequest) -> Iterator[Arena]:
    """The arena for one test, with its standard configuration; afterwards no descriptor is open that was not before."""
    arena.configure()
    arena.server.set()
    assert arena.enroll(CSRS[0]) == "issued"
    arena.verdicts.clear()
    yield arena
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= arena.descriptors, "closing of every descriptor")
    if LONG:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(arena.verdicts.items()))
        print(f"\nfuzz: {request.node.name}: {sum(arena.verdicts.values())} cases: {verdicts}", flush=True)


# --- Bytes


def nested(depth: int, tag: int = 0x30, inner: bytes = b"") -> bytes:
    """An element in an element in an element."""
    for _ in range(depth):
        inner = write_der(tag, inner)
    return inner


DEEP = {depth: nested(depth) for depth in (10, 500, 5000)}

# --- Names, extensions and CSRs that are valid DER, and hostile

FORGED = "x\nCMP error: forged\r\n2026-01-01 ERROR forged \x1b[2J\u2028\u202e\u0085"
TEXTS = [
    "a.example",
    "",
    " ",
    FORGED,
    "/CN=x",
    "+O=y",
    "\\",
    "\\\\/",
    '",;<>=#',
    "-help",
    "-cmd",
    "ü\u4e00\U0001f600",
    "\0",
    "$(id)",
]
TEXTS += ["%s%n%(x)s", "a" * 63 + ".example", "x" * 5000, "../../etc/passwd", "env:PATH"]
ENCODINGS = {0x0C: "utf-8", 0x13: "utf-8", 0x16: "latin-1", 0x14: "latin-1", 0x1E: "utf-16-be", 0x1C: "utf-32-be"}
OIDS = [bytes.fromhex(text) for text in ("550403", "550406", "55040a", "550405", "2a864886f70d010901", "2a0304", "55")]
OIDS += [bytes.fromhex("0992268993f22c640119"), b"", b"\x80", b"\xff" * 40, b"\x2a" + b"\x81" * 20 + b"\x01"]
EXTENSION_OIDS = [
    bytes.fromhex(text) for text in ("551d11", "551d0f", "551d25", "551d13", "551d20", "551d0e", "551d23", "2a0304")
]


def value_of(tag: int, text: str) -> bytes:
    """A string of that type."""
    return write_der(tag, text.encode(ENCODINGS[tag], "replace"))


VALUES = st.builds(value_of, st.sampled_from(sorted(ENCODINGS)), st.sampled_from(TEXTS) | st.text(max_size=20))
VALUES |= st.builds(write_der, st.sampled_from([0x02, 0x03, 0x04, 0x05, 0x30, 0x0C, 0x1E, 0xA0]), st.binary(max_size=9))
ATTRIBUTES = st.builds(
    lambda oid, value: write_der(0x30, write_der(6, oid) + value),
    st.sampled_from(OIDS[:6]) | st.sampled_from(OIDS),
    VALUES,
)
RDNS = st.lists(ATTRIBUTES, min_size=0, max_size=3).map(lambda parts: write_der(0x31, b"".join(sorted(parts))))
PLAIN = write_der(0x31, write_der(0x30, write_der(6, OIDS[0]) + value_of(0x0C, "plain.example")))
NAMES = st.lists(RDNS | st.just(PLAIN), max_size=4).map(lambda parts: write_der(0x30, b"".join(parts)))

GENERAL_NAMES = st.builds(
    write_der,
    st.sampled_from([0x82, 0x82, 0x82, 0x86, 0x87, 0x81, 0x88, 0xA0, 0xA4, 0xA3]),
    st.sampled_from(TEXTS).map(str.encode) | st.binary(max_size=20),
)
SANS = st.lists(GENERAL_NAMES, max_size=5).map(lambda names: write_der(0x30, b"".join(names)))
SANS |= st.just(write_der(0x30, write_der(0x82, b"a.example") * 1500))
EXTENSION = st.builds(
    lambda oid, critical, value: write_der(0x30, write_der(6, oid) + critical + write_der(4, value)),
    st.sampled_from(EXTENSION_OIDS) | st.sampled_from(OIDS),
    st.sampled_from([b"", b"\1\1\xff", b"\1\1\0"]),
    SANS | st.binary(max_size=30) | st.sampled_from(sorted(DEEP.values())),
)
SAN = SANS.map(lambda value: write_der(0x30, write_der(6, EXTENSION_OIDS[0]) + write_der(4, value)))
EXTENSIONS = st.lists(SAN | EXTENSION, max_size=4).map(lambda parts: write_der(0x30, b"".join(parts)))
REQUESTED = EXTENSIONS.map(
    lambda value: write_der(0x30, write_der(6, bytes.fromhex("2a864886f70d01090e")) + write_der(0x31, value))
)

KEY = ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")


def signed(content: bytes) -> bytes:
    """A structure, its algorithm and its signature: a CSR or a certificate, by what the content is."""
    return write_der(0x30, content + ECDSA_SHA256 + write_der(3, b"\0" + KEY.sign(content, ec.ECDSA(hashes.SHA256()))))


def csr(name: bytes, attributes: bytes) -> bytes:
    """A CSR whose signature is good, whatever is in it."""
    return signed(write_der(0x30, b"\x02\x01\x00" + name + PUBLIC + write_der(0xA0, attributes)))


def certificate(issuer: bytes, subject: bytes, extensions: bytes) -> bytes:
    """A certificate that openssl can parse, with names that openssl would not make."""
    validity = write_der(0x30, write_der(0x17, b"260101000000Z") + write_der(0x17, b"360101000000Z"))
    fields = bytes.fromhex("a003020102020107") + ECDSA_SHA256 + issuer + validity + subject + PUBLIC
    return signed(write_der(0x30, fields + write_der(0xA3, extensions)))


CERTIFICATES = st.builds(certificate, NAMES, NAMES, EXTENSIONS)
CSRS = [csr_pem(["a.example", "b.example"]), csr_pem(["c.example"], "c.example"), csr_pem([], "no names")]
DERS = [base64.b64decode("".join(text.strip().splitlines()[1:-1])) for text in CSRS]


def as_pem(der: bytes, label: str = "CERTIFICATE REQUEST") -> str:
    """As a file would have it."""
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n"


def as_base64url(der: bytes) -> str:
    """As the host has it."""
    return base64.urlsafe_b64encode(der).decode().rstrip("=")


DER_CSRS = st.builds(csr, NAMES, REQUESTED)
DER_CSRS |= st.builds(
    csr, st.just(write_der(0x30, PLAIN)), st.sampled_from(sorted(DEEP.values())) | st.binary(max_size=40)
)
DER_CSRS |= st.builds(changed, st.sampled_from(DERS), CHANGES)
DER_CSRS |= st.builds(changed, st.builds(csr, NAMES, REQUESTED), CHANGES)
DER_CSRS |= st.sampled_from(sorted(DEEP.values())) | st.binary(max_size=400)
ARGUMENTS = st.builds(lambda form, der: form(der), st.sampled_from([as_pem, as_base64url]), DER_CSRS)
ARGUMENTS |= st.text(max_size=60) | st.binary(max_size=60) | st.none() | st.integers() | st.just("A" * 3_000_000)
ARGUMENTS |= st.builds(lambda text, changes: changed(text.encode(), changes), st.sampled_from(CSRS), CHANGES)


def test_any_csr_ends_in_a_verdict(fresh: Arena) -> None:
    """Whatever a client of ACME can send."""

    @cases(150, 0.35)
    @given(ARGUMENTS)
    def run(argument: Any) -> None:
        fresh.enroll(argument)

    run()
    assert fresh.verdicts["issued"] and fresh.verdicts["failed"]  # else the cases are all of one kind


# --- Configurations

# The options that write files are the administrator's to place; those that name a server stay on loopback.
WRITING = {"reqout", "rspout", "srvcertout", "crlout", "writerand", "newkeyout"}
HOSTILE = [
    *TEXTS,
    "True",
    "false",
    "0",
    "-1",
    "1e9",
    "9" * 400,
    "a,b",
    "a\tb",
    "x" * 200_000,
    "\udc80",
    "file:",
    "pass:",
    "fd:0",
]
HOSTILE += [
    "stdin",
    "fd:999",
    "env:",
    "file:/dev/null",
    "C=DE, CN=x",
    "/CN=a\nb/O=c",
    "C=DE,",
    "http://[",
    "p10cr",
    "rr",
    "genm",
]
SERVERS = [
    "",
    "127.0.0.1:0",
    "127.0.0.1:99999",
    "127.0.0.1:x",
    "127.0.0.1:1\nx",
    "http://127.0.0.1:1:2/",
    "-help",
    "a@127.0.0.1:1",
]
TIMEOUTS = ["1", "2", "x", "-1", "0", "", "1.5", "9" * 5000, "\u0661", "1\n"]
OPTIONS = (
    "cmd popo ref secret recipient issuer expect_sender subject days reqexts policies policy_oids"
    " implicit_confirm trusted untrusted srvcert cert key keypass keyform digest mac extracerts unprotected_errors"
    " unprotected_requests ignore_keyusage path tls_used tls_host tls_cert tls_key tls_keypass otherpass verbosity"
    " config section engine provider propquery geninfo profile keep_alive ref_variable secret_variable"
    " disable_confirm out_trusted own_trusted crls crl_download no_cache_extracerts openssl_bin tmp_dir certform"
    " csr san_nodefault port help use_mock_srv reqin check_after newkey oldcert revreason batch trsted"
).split()
ANYTHING = st.sampled_from(HOSTILE) | st.text(max_size=30)
SETTINGS = st.dictionaries(
    st.sampled_from(OPTIONS) | st.text(max_size=12).filter(lambda key: key not in WRITING | {"server", "proxy"}),
    st.none() | ANYTHING,
    min_size=1,
    max_size=4,
)
SERVER = st.none() | st.sampled_from(SERVERS)
MORE_SETTINGS = st.fixed_dictionaries(
    {},
    optional={"server": SERVER, "msg_timeout": st.sampled_from(TIMEOUTS), "total_timeout": st.sampled_from(TIMEOUTS)},
)


def usable(changes: dict[str, str | None]) -> dict[str, str | None]:
    """Without what would let a program of the machine's run, or make directories outside of the arena."""
    result = dict(changes)
    for key in ("openssl_bin", "tmp_dir"):
        if result.get(key, "x") is None or key not in result:
            result.pop(key, None)
            continue
        value = str(result[key]).replace("/", "_").replace("..", "__")
        result[key] = f"no-such-{value}" if key == "openssl_bin" else os.path.join("..", "work", value)
    return result


def test_any_configuration_with_a_fault_issues_nothing(fresh: Arena) -> None:
    """Whatever stands in the [CAhandler] section."""

    @cases(150, 0.25)
    @given(SETTINGS, st.just({}) | MORE_SETTINGS)
    def run(changes: dict[str, str | None], more: dict[str, str | None]) -> None:
        fresh.configure(**usable({**changes, **more}))
        fresh.server.set()
        fault = fresh.check()
        verdict = fresh.enroll(CSRS[1])
        assert not fault or verdict == "failed"

    run()
    assert fresh.verdicts["issued"] and fresh.verdicts["failed"]


# --- Responses


class Trick(NamedTuple):
    """How a response is altered on its way: which one, in which part, how."""

    number: int
    part: str
    changes: Sequence[Change] = ()
    certificates: Sequence[bytes] = ()
    text: str = ""
    status: int = 2
    http: bytes = b""

    def alter(self, number: int, message: bytes) -> bytes:
        """What goes to the client instead of this message, the `number`th of this exchange."""
        if number != self.number or not message:
            return as_http(message)
        if self.part == "http":
            return self.http % {b"length": len(message)} + message
        if self.part == "raw":
            return changed(as_http(message), self.changes)
        if self.part == "message":
            return as_http(changed(message, self.changes))
        header, body, _, extra = message_parts(message)
        if self.part == "extraCerts":
            parts = read_der(message).parts()
            extra = write_der(0xA1, write_der(0x30, b"".join(self.certificates)))
            return as_http(write_der(0x30, b"".join(part.whole for part in parts[:3]) + extra))
        if self.part == "rejection":  # an error message in the CA's name, with the CA's words
            words = write_der(0x30, write_der(0x0C, self.text.encode("utf-8", "replace")) * 2)
            status = write_der(0x30, write_der(2, bytes([self.status])) + words + b"\x03\x02\x05\x20")
            body = write_der(0xB7, write_der(0x30, status + (words if self.status & 1 else b"")))
        elif self.part == "body":
            body = changed(body, self.changes)
        else:
            changed_header = changed(header, self.changes)
            return as_http(protected(header, changed_header, body, extra))
        return as_http(protected(header, header, body, extra))


START = b"HTTP/1.1 200 OK\r\nContent-Type: application/pkixcmp\r\n"
TRICKS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: %(length)d\r\n\r\n",
    START + b"\r\n",
    START + b"Content-Length: -1\r\n\r\n",
    START + b"Content-Length: 99999999999999999999\r\n\r\n",
    START + b"Content-Length: 1\r\nContent-Length: %(length)d\r\n\r\n",
    START + b"Transfer-Encoding: chunked\r\n\r\n5\r\n",
    START + b"X: " + b"y" * 100_000 + b"\r\nContent-Length: %(length)d\r\n\r\n",
    START + b"X: y\r\n" * 5000 + b"Content-Length: %(length)d\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\x1b[2J\r\n\r\n",
    b"HTTP/1.1 500 x\x1b[2J\rCMP error: forged \x85\xe2\x80\xa8\r\n\r\n",
    b"HTTP/1.1 404 CMP error: request rejected by server:PKIStatus: rejection\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" + START + b"Content-Length: %(length)d\r\n\r\n",
    b"HTTP/9.9 200 OK\r\n\r\n",
    b"SSH-2.0-x\r\n",
    b"\0" * 300,
    b"\n" * 3000,
    b"",
]
WORDS = [*TEXTS, f"you are {Arena.secret}", 'x"; PKIFailureInfo: badPOP; StatusString: "y']
RESPONSES = st.builds(
    Trick,
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from(["http", "raw", "message", "extraCerts", "extraCerts", "rejection", "body", "rejection", "header"]),
    CHANGES,
    st.lists(CERTIFICATES, max_size=4),
    st.just(FORGED) | st.sampled_from(WORDS) | st.text(max_size=40),
    st.integers(0, 7),
    st.sampled_from(TRICKS) | st.binary(max_size=40).map(lambda data: data.replace(b"%", b"")),
)


def test_protection_can_be_made_anew(fresh: Arena) -> None:
    """Else no altered body would get past the check of its protection."""
    for alter in (lambda _, message: as_http(again(message)), lambda _, message: as_http(again(message)[:-1])):
        fresh.server.set(alter)
        verdict = fresh.enroll(CSRS[1])
    assert verdict == "failed"
    assert fresh.verdicts["issued"] == 1


@pytest.mark.parametrize("status", range(8))
def test_a_secret_that_the_ca_repeats_is_not_shown(fresh: Arena, status: int) -> None:
    """And forges lines; by every PKIStatus, for OpenSSL words each in another way. Found by a long run."""
    fresh.server.set(Trick(0, "rejection", text=f"you are {Arena.secret}{FORGED}", status=status).alter)
    assert fresh.enroll(CSRS[1]) == "failed"
    waiting = status == 3  # OpenSSL since 3.3 polls then, and prints nothing of the text
    assert waiting or any("you are" in line for line in fresh.records.lines)


def again(message: bytes) -> bytes:
    """The same message, protected once more."""
    header, body, _, extra = message_parts(message)
    return protected(header, header, body, extra)


@pytest.fixture(scope="module")
def recorded(arena: Arena) -> list[bytes]:
    """Real answers of the CA: a certificate, the end of a transaction, a refusal."""
    arena.configure()
    found: list[bytes] = []
    for changes in ({}, {"ref": "nobody"}):
        arena.configure(**changes)
        arena.server.set()
        arena.enroll(CSRS[1])
        found += arena.server.seen
    assert len(found) >= 3
    return found


def test_any_response_ends_in_a_verdict(fresh: Arena, recorded: list[bytes]) -> None:
    """Whatever a CA, or somebody in between, can answer: altered in flight, or played back from another time."""

    @cases(150, 0.25)
    @given(RESPONSES, st.none() | st.none() | st.sampled_from(recorded), st.booleans())
    def run(trick: Trick, replay: bytes | None, unprotected: bool) -> None:
        fresh.configure(**({"unprotected_errors": "True"} if unprotected else {}))
        fresh.server.set(trick.alter, replay)
        fresh.enroll(CSRS[1])

    run()
    assert fresh.verdicts["issued"] and fresh.verdicts["failed"] and fresh.verdicts["waiting"]


# --- Revocations

REASONS = st.sampled_from(
    ["keyCompromise", "0", 1, 5, "unspecified", None, "nonsense", "9" * 5000, "\uff11", "-1", "1\n", 1.5]
)
REVOKED = CERTIFICATES.map(as_base64url) | CERTIFICATES.map(lambda der: as_pem(der, "CERTIFICATE"))
REVOKED |= st.builds(lambda der, changes: as_base64url(changed(der, changes)), CERTIFICATES, CHANGES)
REVOKED |= st.sampled_from(CSRS) | st.text(max_size=30)


def test_any_revocation_ends_in_a_code(fresh: Arena) -> None:
    """Whatever a client can send to be revoked, and for whatever reason."""

    @cases(50, 0.05)
    @given(REVOKED, REASONS | st.text(max_size=10))
    def run(cert: Any, reason: Any) -> None:
        fresh.revoke(cert, reason)

    with CAhandler(False, fresh.logger) as handler:
        _, _, cert, _ = handler.enroll(CSRS[1])
    assert fresh.revoke(cert, "superseded") == "200"
    run()
    assert fresh.verdicts["400"] and fresh.verdicts["500"]


# --- Saved transactions


@pytest.fixture(scope="module")
def pending(arena: Arena, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, str]]:
    """A transaction that waits: its directory, its identifier and the CA, which holds it and takes no decision."""
    directory = tmp_path_factory.mktemp("held")
    with demo_ca(directory / "ca", "--hold", "--check-after", "0") as section:
        arena.own = children()
        arena.configure()
        server, arena.server.target = arena.server.target, section["cmp_server"]
        # "waiting", one pollRep, and then the connection breaks off: all within a moment. The CA does not see what
        # is sent after that: it would answer, and from then on insist on the nonce of an answer that nobody has got.
        arena.server.set(last=2)
        with CAhandler(False, arena.logger) as handler:
            error, _, _, identifier = handler.enroll(CSRS[1])
        assert identifier, error
        shutil.move(str(arena.work / identifier), str(directory / identifier))
        arena.server.target = server
        yield directory / identifier, identifier, section["cmp_server"]
    arena.own = children()


JSONS = [
    "[]",
    "null",
    "5",
    "{}",
    '{"cmp_path": 5}',
    '{"cmp_secret": "x", "cmp_openssl_bin": "/bin/false"}',
    "[" * 100_000,
]
JSONS += ["9" * 5000, '{"cmp_path": "a\\nb\\u0000"}', '{"cmp_path": ["-help"]}', '{"": ""}', "{", "\x85"]
DAMAGES = st.lists(
    st.tuples(
        st.integers(0, 20),  # which of the files, by number
        st.sampled_from(["change", "change", "change", "delete", "directory", "content", "new", "copy", "rename"]),
        CHANGES,
        st.sampled_from(JSONS).map(str.encode) | st.sampled_from(CSRS).map(str.encode) | st.binary(max_size=50),
        st.sampled_from(
            [
                "001.der",
                "002.new",
                "003.der",
                "999.new",
                "99999999999.der",
                "subject",
                "profile",
                "profile",
                "x",
            ]
        ),
    ),
    min_size=1,
    max_size=3,
)
IDENTIFIERS: st.SearchStrategy[Any] = st.sampled_from(
    ["", ".", "..", "../work", "/", "x" * 5000, "a\nb", "a\0b", "-h", "\u0661"]
)
IDENTIFIERS = IDENTIFIERS | st.text(max_size=20) | st.none() | st.integers() | st.binary(max_size=5)


def damage(directory: Path, damages: list[Any]) -> None:
    """Do all of it."""
    for number, how, changes, content, name in damages:
        files = sorted(path for path in directory.iterdir() if path.is_file())
        if not files:
            return
        path = files[number % len(files)]
        if how == "delete":
            path.unlink()
        elif how == "directory":
            path.unlink()
            path.mkdir()
        elif how in ("copy", "rename"):
            if not (directory / name).is_dir() and path.name != name:
                (shutil.copyfile if how == "copy" else os.replace)(path, directory / name)
        elif how == "new" and not (directory / name).is_dir():
            (directory / "new").write_bytes(content)
            (directory / "new").rename(directory / name)
        elif how != "new":
            path.write_bytes(changed(path.read_bytes(), changes) if how == "change" else content)


def test_any_saved_transaction_ends_in_a_verdict(
    fresh: Arena, pending: tuple[Path, str, str], recorded: list[bytes]
) -> None:
    """Whatever has become of the files of a transaction in the meantime, and whatever the CA answers then."""
    saved, identifier, server = pending
    assert {"csr.pem", "waiting", "001.der", "002.der"} <= set(os.listdir(saved))
    replies = st.sampled_from([None, b"", *recorded])

    def poll(damages: list[Any], reply: bytes | None) -> str:
        shutil.rmtree(fresh.work, ignore_errors=True)
        shutil.copytree(saved, fresh.work / identifier)
        damage(fresh.work / identifier, damages)
        fresh.server.set(None, reply)
        if reply is None:  # the CA itself, which after as many pollReps as a poll may ask for is away
            fresh.server.set(last=cmp_ca_handler.POLL_REQUESTS)
        return fresh.poll(identifier)

    @cases(100, 0.14)
    @given(DAMAGES, replies)
    def run(damages: list[Any], reply: bytes | None) -> None:
        poll(damages, reply)

    @cases(20, 0.01)
    @given(IDENTIFIERS)
    def other(identifier: Any) -> None:
        assert fresh.poll(identifier) == "failed"

    fresh.server.target, target = server, fresh.server.target
    assert poll([], None) == "waiting"
    run()
    other()
    fresh.server.target = target
    assert fresh.verdicts["failed"]


# --- A CA that says everything, and a man in the middle without credentials

SWALLOWING = [
    "\nCMP error: ",
    "\n",
    'x"\nCMP error: total timeout\n"',
    "missing protection",
    f"you are {Arena.secret}" + "\nCMP error: request rejected by server" * 900,
    "y" * 90_000,
]
SAID = st.sampled_from([*WORDS, *SWALLOWING]).map(lambda text: text.encode("utf-8", "replace"))


ACCEPTED = write_der(0x30, integer(0))


class Reply(NamedTuple):
    """What the CA says to one request: a body, and how it is protected."""

    kind: str  # waiting, pollRep, certificate, other, refusal, strange
    body: bytes
    protection: str = "good"
    nonce: str = "good"

    def fair(self, request: int) -> bool:
        """Whether an honest CA could say this, or else openssl refuses it: an order survives it."""
        if self.protection != "good":
            return True
        return self.nonce == "good" and (request, self.kind) in {(0, "waiting"), (25, "pollRep"), (24, "pkiConf")}


class Talker:
    """A CA that says what it is told to, and then is honest. It checks nothing."""

    def __init__(self, template: bytes, certificate: bytes) -> None:
        self.template, self.certificate = read_der(template).parts()[0], certificate
        self.replies: list[Reply] = []
        self.fair = True
        self.first = b""

    def __call__(self, request: bytes) -> bytes:
        """The raw HTTP response."""
        header, told = read_der(request).parts()[:2]
        fields = {field.tag: field for field in header.parts()[3:]}
        nonce, tag = fields[0xA5].content, told.tag & 0x1F
        self.first = self.first or nonce
        reply = self.replies.pop(0) if self.replies else self.honest(tag)
        self.fair = self.fair and (reply.fair(tag) or reply.kind == "honest")
        nonces = {"good": nonce, "first": self.first, "wrong": write_der(4, b"n" * 16)}
        changed = {0xA4: fields[0xA4].content, 0xA5: write_der(4, os.urandom(16)), 0xA6: nonces[reply.nonce]}
        parts = self.template.parts()
        new = [write_der(part.tag, changed.get(part.tag, part.content)) for part in parts[3:]]
        new_header = write_der(0x30, b"".join([*(part.whole for part in parts[:3]), *new]))
        if reply.protection == "none":
            return as_http(write_der(0x30, new_header + reply.body))
        message = protected(self.template.whole, new_header, reply.body, b"")
        return as_http(message if reply.protection == "good" else message[:-1] + bytes([message[-1] ^ 1]))

    def honest(self, request: int) -> Reply:
        """What it says when it has nothing else to say."""
        granted = cert_response(1, ACCEPTED, self.certificate)
        return Reply("honest", granted if request in (0, 25) else PKICONF)


def replies(certificate: bytes, other: bytes) -> st.SearchStrategy[Reply]:
    """Every body, status, failInfo and text; the likely ones more often."""
    texts = st.lists(SAID, max_size=2)
    infos = st.builds(
        status_info,
        st.sampled_from([2, 2, 3, 3, 0, 1, 4, 5, 6, 7, 9, -1, 1 << 70]),
        texts,
        st.sampled_from([b"", b"\x05\x20", b"\0", b"\x04\x00\x10", b"\0" + b"\xff" * 40, b"\x09"]),
    )
    waiting = st.builds(status_info, st.just(3), texts, st.just(b""))
    certificates = st.sampled_from([b"", certificate, other, certificate[:-9], b"\x30\x00"])
    after = st.sampled_from([0, 0, 0, 1, 3600, 1 << 31, 1 << 63, 1 << 80, -1, -(1 << 40)])
    sides = (
        st.sampled_from(["good", "good", "good", "none", "bad"]),
        st.sampled_from(["good", "good", "first", "wrong"]),
    )
    errors = st.builds(
        lambda info, code, details: body(23, info + code + details),
        infos,
        st.sampled_from([b"", integer(7), integer(1 << 90)]),
        st.just(b"") | texts.map(lambda found: free_text(*found)),
    )
    odd = st.binary(max_size=30).map(lambda data: body(1, data))
    odd |= infos.map(lambda info: body(12, write_der(0x30, info)))
    odd |= st.sampled_from([PKICONF, body(22, b""), body(20, b""), b"\xb3\x00", body(26, b"")])
    return st.one_of(
        st.builds(Reply, st.just("waiting"), waiting.map(lambda info: cert_response(1, info, b""))),
        st.builds(Reply, st.just("waiting"), waiting.map(lambda info: cert_response(1, info, b"")), *sides),
        st.builds(Reply, st.just("pollRep"), st.builds(poll_rep, st.sampled_from([0, 0, 3600]), texts)),
        st.builds(Reply, st.just("strange"), st.builds(poll_rep, after, texts), *sides),
        st.builds(
            Reply,
            st.just("strange"),
            st.builds(
                cert_response, st.sampled_from([1, 1, 3, 8]), infos, certificates, st.sampled_from([0, 0, -1, 1])
            ),
            *sides,
        ),
        st.builds(Reply, st.just("refusal"), errors, *sides),
        st.builds(Reply, st.just("strange"), odd, *sides),
    )


def leaf_of(bundle: str) -> bytes:
    """The DER of a bundle's first certificate."""
    return base64.b64decode(bundle.split("-----")[2])


def test_a_ca_that_says_everything_ends_no_order_unauthentically(fresh: Arena, recorded: list[bytes]) -> None:
    """At each step, protected or not. What it takes back by no authentic word, it can still fulfil afterwards."""
    fresh.enroll(CSRS[0])
    other = leaf_of(fresh.bundle)
    fresh.enroll(CSRS[1])
    certificate = leaf_of(fresh.bundle)
    assert certificate != other
    finished = Counter[bool]()

    @cases(50, 0.05)
    @given(st.lists(replies(certificate, other), min_size=1, max_size=5), st.booleans())
    def run(said: list[Reply], unprotected: bool) -> None:
        fresh.configure(**({"unprotected_errors": "True"} if unprotected else {}))
        talker = Talker(recorded[0], certificate)
        fresh.server.set(play=talker)
        talker.replies = said[:]
        verdict = fresh.enroll(CSRS[1], keep=True)
        identifier = fresh.identifier
        for _ in range(5):
            if verdict in ("issued", "rejected") or not identifier:
                break
            verdict = fresh.poll(identifier)
            assert verdict != "rejected" or not talker.fair or unprotected
        if verdict == "issued":
            assert leaf_of(fresh.bundle) == certificate
        elif identifier and not unprotected:
            assert not talker.fair
        finished[verdict == "issued"] += 1

    run()
    assert finished[True]
    assert finished[False]


class Wire:
    """What a man in the middle sees and does. He has no credentials, but a certificate of his own making."""

    def __init__(self, target: str, tricks: list[tuple[str, int, bytes]]) -> None:
        self.target, self.tricks = target, tricks
        self.recorded: list[bytes] = []
        self.lost = False  # an answer of the CA's did not arrive: no client can know its nonce
        self.refused = False  # the CA itself has said no

    def __call__(self, request: bytes) -> bytes | None:
        """The raw HTTP response, or none."""
        how, number, data = self.tricks.pop(0) if self.tricks else ("pass", 0, b"")
        if how == "pass":
            return as_http(self.forward(request))
        if how == "lose" or (how == "replace" and self.recorded):
            self.forward(request)
            self.lost = True
        if how in ("repeat", "replace") and self.recorded:
            return as_http(self.recorded[number % len(self.recorded)])
        if how == "forge" and self.recorded:
            return as_http(forgery(self.recorded[-1 - number % len(self.recorded)], number, data))
        return data if how == "http" else None

    def forward(self, request: bytes) -> bytes:
        """The CA's own answer."""
        answer = ask(self.target, request)
        self.recorded.append(answer)
        told = read_der(answer).parts()[1]
        refusal = told.tag & 0x1F == 23 or (told.tag & 0x1F == 1 and b"\x30\x03\x02\x01\x02" in told.whole)
        self.refused = self.refused or refusal
        return answer


def forgery(answer: bytes, number: int, text: bytes) -> bytes:
    """A message that looks like the one that follows `answer`, as well as one can make it without a secret."""
    rejected = status_info(2, [text], b"\x05\x20")
    bodies = [body(23, rejected), cert_response(1, rejected, b""), poll_rep(0, [text]), PKICONF, body(12, rejected)]
    bodies += [cert_response(1, status_info(3, [text], b""), b""), body(23, status_info(3, [text], b""))]
    number, which = divmod(number, 10)
    told = bodies[which] if which < len(bodies) else bodies[which % 2]  # most often a refusal
    number, how = divmod(number, 4)
    header, _, protection, *_ = read_der(answer).parts()
    if how == 0:
        return write_der(0x30, header.whole + told)
    if how == 1:
        return write_der(0x30, header.whole + told + protection.whole)
    return proxy.signed(answer, told, KEY, [STRANGERS[number % len(STRANGERS)]])


def stranger(text: str) -> x509.Certificate:
    """The demo CA's name on somebody's own certificate. What it calls its issuer, openssl prints as it is."""
    ca = x509.Name(
        [
            x509.NameAttribute(x509.NameOID.COUNTRY_NAME, "DE"),
            x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "Demo"),
            x509.NameAttribute(x509.NameOID.COMMON_NAME, "Demo Issuing CA"),
        ]
    )
    issuer = x509.AuthorityKeyIdentifier(None, [x509.UniformResourceIdentifier(text)], 7)
    return x509.load_der_x509_certificate(proxy.forge(KEY, ca, proxy.name("nobody"), issuer))


REFUSED = "request rejected by server:PKIStatus: rejection; PKIFailureInfo: badRequest"
STRANGERS = [
    stranger(f"x\n\nCMP error: {line}\n\nCMP error: {line}\n" + "\n" * size)
    for line in (REFUSED, "received error", "total timeout", "certificate not accepted", "CMP info: x" * 500)
    for size in (0, 9000)
]
LINES = [
    b"HTTP/1.1 200 CMP error: " + REFUSED.encode() + b"\r\nContent-Type: CMP error: total timeout\r\n\r\n",
    b"HTTP/1.1 503 received error\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: application/pkixcmp\r\nContent-Length: 9\r\n\r\nx\nCMP err",
    b"",
]
TRICKS_ON_THE_WAY = st.tuples(
    st.sampled_from(["pass", "pass", "drop", "repeat", "repeat", "forge", "forge", "forge", "http", "replace", "lose"]),
    st.integers(0, 9999),
    st.sampled_from(SWALLOWING[:3]).map(str.encode) | SAID | st.sampled_from(LINES),
)


def test_a_man_in_the_middle_ends_no_order(fresh: Arena, pending: tuple[Path, str, str]) -> None:
    """He replaces, repeats, drops and delays messages, and gives openssl lines to print.

    Nothing of it ends an order that waits, and when he is gone, the CA can finish it; unless an answer of the CA's was
    lost, for OpenSSL's server insists on its nonce.
    """
    directory, target = pending[0].parent / "ca", pending[2]
    finished = Counter[bool]()

    @cases(30, 0.05)
    @given(st.lists(TRICKS_ON_THE_WAY, min_size=1, max_size=7), st.integers(0, 4))
    def run(tricks: list[tuple[str, int, bytes]], decided: int) -> None:
        fresh.configure()
        wire = Wire(target, [("pass", 0, b""), *tricks])
        fresh.server.set(play=wire)
        verdict = fresh.enroll(CSRS[1], keep=True)
        assert verdict == "waiting"
        identifier, polls = fresh.identifier, 0
        while verdict in ("waiting", "failed") and polls < 12 and (polls < decided or not wire.lost):
            if polls == decided:
                decide(directory, "all", "approve")
            verdict, polls = fresh.poll(identifier), polls + 1
            assert verdict != "rejected" or wire.refused
        assert verdict == "issued" or wire.lost or wire.refused
        finished[verdict == "issued"] += 1

    run()
    assert finished[True]
