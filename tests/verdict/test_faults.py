"""Bad input and faults end in an error on one line that says what happened; nothing is left, and nothing raised.

Each error goes into the JUnit report too (`--junitxml`), with the seconds it took.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest

import cmp_ca_handler
from cmp_ca_handler import CAhandler
from conftest import OPENSSL, Handlers, Mock, Pair, as_host, csr_pem, needs_root, nobody_at, wait_until
from demo_ca import DemoCA, read_der, write_der
from shared import script
from soak import children

CSR = csr_pem(["a.example"])
LIMIT = 20  # seconds, far beyond what any of this takes: a bound against a hang


class Fault:
    """Runs an enrolment that must fail, and checks all that holds for every failure."""

    def __init__(
        self,
        handlers: Handlers,
        caplog: pytest.LogCaptureFixture,
        record_property: Callable[[str, object], None],
    ) -> None:
        self.handlers, self.caplog, self.record = handlers, caplog, record_property

    def __call__(self, handler: CAhandler, csr: Any, *words: str) -> str:
        """The error, which holds the words."""
        before, started = children(), time.monotonic()
        error, *rest = handler.enroll(csr)
        seconds = time.monotonic() - started
        assert isinstance(error, str) and rest == [None, None, None]
        self.record("error", error)
        self.record("seconds", f"{seconds:.2f}")
        assert [word for word in words if word not in error] == [], error
        assert error.isprintable() and len(error) < 1500, "one line, without control characters"
        assert "internal error" not in error and "Traceback" not in self.caplog.text
        ours = [record for record in self.caplog.records if record.name == "test"]
        assert all(record.getMessage().isprintable() for record in ours)
        quoted = error.replace("\\", "\\\\").replace('"', '\\"')
        assert [r for r in ours if r.levelno == logging.ERROR and r.getMessage().endswith(f'error="{quoted}"')]
        assert self.handlers.left() == []
        wait_until(lambda: children() <= before, "the end of all processes")
        assert seconds < LIMIT
        return error


@pytest.fixture
def fault(
    handlers: Handlers, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> Fault:
    return Fault(handlers, caplog, record_property)


# --- CSRs -----------------------------------------------------------------------------------------------------------

DER = base64.urlsafe_b64decode(as_host(CSR) + "==")
RUBBISH = "the quick brown fox" * 110_000


def base64url(der: bytes) -> str:
    return base64.urlsafe_b64encode(der).decode().rstrip("=")


BAD_CSRS: dict[str, tuple[Any, list[str]]] = {
    "None": (None, ["CSR", "empty"]),
    "empty": ("", ["CSR", "empty"]),
    "a number": (5, ["CSR"]),
    "empty bytes": (b"", ["CSR", "empty"]),
    "binary": (DER, ["CSR", "not base64"]),
    "not base64": ("This is no CSR!", ["CSR", "not base64"]),
    "one letter": ("A", ["CSR", "cut short"]),
    "not DER": (base64url(b"hello world"), ["CSR"]),
    "an empty sequence": (base64url(b"\x30\x00"), ["CSR"]),
    "cut short": (base64url(DER[:-20]), ["CSR", "cut short"]),
    "cut short in the base64": (as_host(CSR)[:-7], ["CSR", "cut short"]),
    "a key": ("-----BEGIN PUBLIC KEY-----\nMAAA\n-----END PUBLIC KEY-----\n", ["CSR", "PEM of another kind"]),
    "PEM cut short": (CSR[:200], ["CSR"]),
    "2 MB of rubbish": (RUBBISH, ["CSR", "larger than"]),
    "1 MB of it": (base64url(b"\x30\x83\x0f\xff\x00" + bytes(0xFFF00)), ["CSR"]),
    "unknown key type": (base64url(DER.replace(bytes.fromhex("2a8648ce3d0201"), b"*\x86H\xce=\x02\x7f")), ["CSR"]),
    "broken signature": (base64url(DER[:-1] + bytes([DER[-1] ^ 1])), ["CSR", "proof of possession"]),
    "fake log lines": ("\nERROR root: all is lost\x1b[2J\u202e", ["CSR", "not base64"]),
}


@pytest.mark.parametrize("name", BAD_CSRS)
def test_a_bad_csr_is_one_error(name: str, ca: DemoCA, handlers: Handlers, fault: Fault) -> None:
    """Each broken CSR of the table: one error with the reason, and the CA gets no message."""
    csr, words = BAD_CSRS[name]
    fault(handlers(ca.options()), csr, *words)
    assert ca.messages == []


@pytest.mark.parametrize("form", ["PEM", "base64url"])
def test_a_certificate_in_place_of_a_csr_is_refused(form: str, ca: DemoCA, handlers: Handlers, fault: Fault) -> None:
    """The host hands over a certificate, in PEM or base64url: an error that names the CSR, nothing is sent."""
    pem = (ca.directory / "root.pem").read_text()
    fault(handlers(ca.options()), pem if form == "PEM" else as_host(pem), "CSR")
    assert ca.messages == []


# --- Servers --------------------------------------------------------------------------------------------------------

Serve = Callable[[socket.socket], None]


def read_request(connection: socket.socket) -> bytes:
    """The body of an HTTP request."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    header, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", header, re.I)
    while length and len(body) < int(length.group(1)):
        body += connection.recv(65536)
    return body


def response(body: bytes, status: str = "200 OK", kind: str = "application/pkixcmp", more: str = "") -> bytes:
    header = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return header.encode() + body


def hang(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass  # until the client gives up


def drip(connection: socket.socket) -> None:
    """A byte a second: the wait is for the client to go away, which ends it at once."""
    read_request(connection)
    connection.settimeout(1)
    for octet in response(bytes(100)):
        connection.send(bytes([octet]))
        with contextlib.suppress(TimeoutError):
            if not connection.recv(1):
                return


def flood(head: bytes, more: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        while True:
            connection.sendall(more)

    return serve


def answer(data: bytes) -> Serve:
    def serve(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(data)

    return serve


HTML = b"<html><title>Welcome</title></html>"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/pkixcmp\r\n"
SERVERS: dict[str, tuple[Serve, list[str]]] = {
    "hangs": (hang, ["timeout"]),
    "drips": (drip, ["timeout"]),
    "floods the body": (flood(OK + b"Content-Length: 1000000000\r\n\r\n", bytes(65536)), ["max resp len exceeded"]),
    "floods the header": (flood(OK, b"X-Header: y\r\n" * 5000), []),  # on a busy machine openssl has to be killed
    "floods without a line": (flood(b"", b"x" * 65536), ["failed"]),
    "404": (answer(response(HTML, "404 Not Found", "text/html")), ["404", "cmp_path"]),
    "500": (answer(response(HTML, "500 Internal Server Error", "text/html")), ["500", "server failed"]),
    "HTML": (answer(response(HTML, kind="text/html")), ["content type", "check cmp_path"]),
    "garbage": (answer(secrets.token_bytes(5000).replace(b"HTTP", b"")), ["failed"]),
    "garbage as CMP": (answer(response(b"\x30\x03\x02\x01\x05" + bytes(100))), ["failed"]),
    "cut short": (answer(response(bytes(5000))[:300]), ["failed"]),
    "says nothing": (answer(b""), ["failed"]),
    "closes at once": (lambda connection: None, ["failed"]),
    "empty": (answer(response(b"")), ["failed"]),
    "redirects": (
        answer(response(b"", "301 Moved Permanently", more="Location: http://127.0.0.1:1/x\r\n")),
        ["redirect", "cmp_server"],
    ),
    "speaks something else": (answer(b"220 mail.example ESMTP\r\n"), ["failed", "no HTTP server"]),
}


@pytest.mark.parametrize("server", SERVERS)
def test_a_bad_server_is_named_with_the_reason(
    server: str, tcp_server: Callable[[Serve], int], handlers: Handlers, fault: Fault
) -> None:
    """A server that hangs, drips, floods or speaks something else than CMP: an error with address and reason."""
    serve, words = SERVERS[server]
    address = f"127.0.0.1:{tcp_server(serve)}"
    section = {"cmp_server": address, "cmp_ref": "1", "cmp_secret": "x", "cmp_recipient": "/CN=CA"}
    fault(handlers(section, msg_timeout="1", total_timeout="2"), CSR, address, *words)


def test_half_a_message_is_an_error_with_the_address(
    ca: DemoCA, tcp_server: Callable[[Serve], int], handlers: Handlers, fault: Fault
) -> None:
    """A CA whose answer is cut in the middle: an error with its address."""

    def serve(connection: socket.socket) -> None:
        message = ca.answer(read_request(connection))
        connection.sendall(response(message[: len(message) // 2]))

    address = f"127.0.0.1:{tcp_server(serve)}"
    fault(handlers({**ca.options(), "cmp_server": address}, msg_timeout="1", total_timeout="2"), CSR, address)


def test_a_server_that_refuses_connections_is_named(ca: DemoCA, handlers: Handlers, fault: Fault) -> None:
    """Nobody listens at the port: the error says so, and names cmp_server."""
    with nobody_at() as port:
        address = f"127.0.0.1:{port}"
        handler = handlers({**ca.options(), "cmp_server": address}, msg_timeout="1", total_timeout="2")
        fault(handler, CSR, address, "nothing answers there", "cmp_server")


@pytest.mark.parametrize("tls", [False, True], ids=["TLS to a plain server", "plain to a TLS server"])
def test_tls_on_one_side_only_names_cmp_tls_used(
    tls: bool, make_ca: Callable[..., DemoCA], handlers: Handlers, fault: Fault
) -> None:
    """TLS to a plain server, or plain HTTP to a TLS server: the error names cmp_tls_used."""
    ca = make_ca(tls=tls)
    handler = handlers(
        ca.options(),
        tls_used=None if tls else "True",
        tls_trusted=None if tls else str(ca.directory / "root.pem"),
        msg_timeout="1",
        total_timeout="2",
    )
    fault(handler, CSR, ca.server, "cmp_tls_used")


# --- What the CMP server says ---------------------------------------------------------------------------------------


# The second one is a word of openssl's own message, "wrong pbm value".
@pytest.mark.parametrize("secret", ["not-the-secret", "wrong"])
def test_a_wrong_secret_names_its_entries(secret: str, ca: DemoCA, handlers: Handlers, fault: Fault) -> None:
    """A CA that knows another secret: the error names cmp_ref and cmp_secret."""
    fault(handlers(ca.options(), secret=secret), CSR, ca.server, "cmp_ref and cmp_secret")


def test_a_wrong_reference_names_its_entries(ca: DemoCA, handlers: Handlers, fault: Fault) -> None:
    """A CA that does not know cmp_ref: the error names cmp_ref and cmp_secret."""
    fault(handlers(ca.options(), ref="9999"), CSR, ca.server, "cmp_ref and cmp_secret")


def test_an_untrusted_signer_names_cmp_trusted(ca: DemoCA, handlers: Handlers, fault: Fault) -> None:
    """A CA whose signer cmp_trusted does not cover: the error names cmp_trusted."""
    stranger = str(ca.directory / "stranger.pem")
    fault(handlers(ca.options("certificate"), trusted=stranger), CSR, ca.server, "cmp_trusted")


def test_an_unprotected_answer_is_refused(
    mock: Callable[..., Mock], pair: Pair, handlers: Handlers, fault: Fault
) -> None:
    """A server that protects no answer: the error says so, and no certificate is handed out."""
    server = mock(pair.certificate, "-send_unprotected")
    fault(handlers(server.options()), pair.csr, f"127.0.0.1:{server.port}", "protect")


def test_a_certificate_for_another_key_is_refused(
    mock: Callable[..., Mock], pair: Pair, handlers: Handlers, fault: Fault
) -> None:
    """A server that always sends the same certificate: the error says that it is for another key."""
    server = mock(pair.certificate)
    fault(handlers(server.options()), CSR, f"127.0.0.1:{server.port}", "issued for another key")


HOSTILE = {
    "line breaks": "no\nno\r\nno\x0b\x0c\x1c\x85\u2028no",
    "escape sequences": "\x1b[2J\x1b]0;title\x07 \x9b31m no",
    "direction": "abc\u202egnp.exe\u2066 \u200b no",
    "NUL and DEL": "no\x01\x7f no",
    "10 kB": "no " * 3500,
    "10 kB of line breaks": "no" + "\n" * 10_000,
    "time-out of openssl": "no\nCMP error: transfer timeout\nCMP error: total timeout\ncmp_main:x.c:1:CMP error: x",
    "end of the message": 'no"; errorCode: 1; x\nCMP info: received IP\nCMP warning: all is well\n',
    "success": "no\nCMP info: received 'IP' no errors\nCMP fatal: x: transfer error",
    "another rejection": 'no"\nCMP error: request rejected by server:PKIStatus: rejection; PKIFailureInfo: x',
    "log line": "no\n2026-01-01 00:00:00 ERROR root: forged",
    "format": "no %s %d %n {0} {} ${x} $(id) `id`",
}


@pytest.mark.parametrize(
    "text, authentication", [*((text, "secret") for text in HOSTILE), ("line breaks", "certificate")]
)
def test_a_hostile_rejection_is_one_error_line(
    text: str, authentication: str, ca: DemoCA, handlers: Handlers, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA whose reason holds line breaks, control characters or lines as of openssl: still one error line."""
    caplog.set_level(logging.DEBUG)
    ca.reject = "badCertTemplate"
    handler = handlers(ca.options(authentication))

    ca.status_text = HOSTILE[text]
    # A text with line breaks can add lines to openssl's: then nobody can tell whether openssl has accepted the answer.
    words = [] if "10 kB" in text else ["badCertTemplate, '"]
    error = fault(handler, CSR, ca.server, *words)
    assert "rejected the request: " in error or "an unverified answer says: " in error
    prefixes = ("openssl cmp: ", "CMP enrolment failed: class=", "running ", "configuration: ")
    assert [r for r in caplog.records if r.name == "test" and not r.getMessage().startswith(prefixes)] == []


# --- The directory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "/sub/directory"], ids=["a file", "below a file"])
def test_a_directory_that_is_a_file_is_named(
    below: str, ca: DemoCA, handlers: Handlers, fault: Fault, tmp_path: Path
) -> None:
    """cmp_tmp_dir is a file, or lies below one: the error names it, and nothing is sent."""
    (tmp_path / "file").touch()
    fault(handlers(ca.options(), tmp_dir=f"{tmp_path}/file{below}"), CSR, "cmp_tmp_dir", f"{tmp_path}/file", "not a d")
    assert ca.messages == []


@pytest.mark.parametrize("name", ["a b", "a,b", "a\tb", "a\\b", "a\0b"])
def test_a_directory_that_openssl_cannot_name_is_refused(
    name: str, ca: DemoCA, handlers: Handlers, fault: Fault
) -> None:
    """cmp_tmp_dir has a blank, comma, tab, backslash or NUL: the error says so, and nothing is sent."""
    fault(handlers(ca.options(), tmp_dir=str(handlers.directory / name)), CSR, "cmp_tmp_dir", "blank", "comma")
    assert ca.messages == []


ELSEWHERE = """\
import logging, os, sys
import cmp_ca_handler
cmp_ca_handler.HELPERS = ()
logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
with cmp_ca_handler.CAhandler(False, logging.getLogger("test")) as handler:
    result = handler.enroll(sys.stdin.read())
print(result[0], result[1:], sorted(os.listdir(sys.argv[1])), sep="\\n")
"""


def enroll_in(prefix: list[str], directory: Path) -> tuple[str, str, str]:
    """An enrolment in a process of its own, started by `prefix`: error, the rest of the result, what is left."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cmp_ca_handler.__file__).parent)}
    command = [*prefix, sys.executable, "-c", ELSEWHERE, str(directory)]
    run = subprocess.run(command, input=CSR, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    error, rest, left = run.stdout.splitlines()
    return error, rest, left


NOTHING = "(None, None, None)"


def test_a_directory_that_cannot_be_written_is_named(
    ca: DemoCA, handlers: Handlers, record_property: Callable[[str, object], None]
) -> None:
    """cmp_tmp_dir without the right to write: the error names it, and nothing is sent."""
    handlers(ca.options())
    handlers.work.mkdir(mode=0o500)
    # root may write everywhere, unless it gives up this one right
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    error, rest, left = enroll_in(drop, handlers.work)
    record_property("error", error)
    assert "cmp_tmp_dir" in error and str(handlers.work) in error and "cannot be written" in error
    assert (rest, left, ca.messages) == (NOTHING, "[]", [])


# Pages that the tmpfs has, and where they run out: in our own files, in openssl's responses, in its certificate
@needs_root
@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 6])
def test_a_full_disk_is_named_and_nothing_is_left(
    pages: int, ca: DemoCA, handlers: Handlers, record_property: Callable[[str, object], None]
) -> None:
    """A file system with one to six pages: the error names cmp_tmp_dir, and nothing is left."""
    handlers(ca.options())
    handlers.work.mkdir()
    size = pages * os.sysconf("SC_PAGE_SIZE")
    # In a mount namespace of its own: nothing of it is left afterwards.
    mount = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    error, rest, left = enroll_in(["unshare", "--mount", "sh", "-c", mount, str(handlers.work)], handlers.work)
    record_property("error", error)
    assert "No space left on device" in error or "write" in error or "full" in error, error
    assert "cmp_tmp_dir" in error
    assert (rest, left) == (NOTHING, "[]")


# --- openssl killed in the middle -----------------------------------------------------------------------------------


def test_an_openssl_that_crashes_at_its_end_costs_no_certificate(
    ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """As OpenSSL 3.5 does with some providers, in its own clean-up: the certificate is issued and confirmed."""
    openssl = tmp_path / "openssl"
    openssl.write_text(f'#!/bin/sh\n{OPENSSL} "$@" || exit 1\nif [ "$1$2" = cmp-cmd ]; then kill -SEGV $$; fi\n')
    openssl.chmod(0o700)
    error, bundle, _, identifier = handlers(ca.options(), openssl_bin=str(openssl)).enroll(as_host(csr_pem(["a.b"])))
    assert (error, identifier) == (None, None)
    assert bundle
    assert handlers.left() == []


@pytest.mark.parametrize("command", ["req", "cmp"])
def test_an_openssl_killed_at_its_start_is_told_and_sends_nothing(
    command: str, ca: DemoCA, handlers: Handlers, fault: Fault, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`openssl req` or `openssl cmp` is killed: the error says signal 9, nothing is sent, and a later try may help."""
    body = f'[ "$1" = {command} ] && [ "$2" != -help ] && kill -9 $$\nexec {OPENSSL} "$@"\n'
    fault(handlers(ca.options(), openssl_bin=script(tmp_path / "openssl", body)), CSR, "killed", "signal 9")
    assert ca.messages == []
    assert "class=unreachable" in caplog.text


@pytest.mark.parametrize("question", ["cmp -help", "version", "list -objects"])
def test_one_question_that_openssl_does_not_answer_is_asked_again(
    question: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once, or without memory once, it is not taken for an old one, or for none, for ever after."""
    monkeypatch.setattr(cmp_ca_handler, "FAULT_BELIEVED", 0.001)
    for end in ("kill -9 $$", "exit 127"):
        asked = tmp_path / end[:4] / "asked"
        body = f'if [ "$1 $2" = "{question}" ] || [ "$*" = "{question}" ]; then\n'
        body += f'    [ -e {asked} ] || {{ touch {asked}; {end}; }}\nfi\nexec {OPENSSL} "$@"\n'
        program = script(asked.parent / "openssl", body)
        cmp_ca_handler._object_names.cache_clear()
        section = handlers(ca.options(), openssl_bin=program, subject="CN=x, organizationIdentifier=y").section
        handlers(section).enroll(as_host(CSR))
        assert asked.exists()
        assert handlers(section).enroll(as_host(CSR))[1]


def test_no_descriptors_for_openssl_are_no_fault_of_the_configuration(
    ca: DemoCA, handlers: Handlers, fault: Fault, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system can start no process now: the error says what to raise, and a later try helps."""
    handler = handlers(ca.options())
    assert handler.handler_check() is None

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(subprocess, "Popen", none_left)
    cmp_ca_handler._described.cache_clear()
    fault(handler, CSR, "cannot run", "Too many open files", "raise the limit of open files")
    assert "class=disk" in caplog.text


def test_an_openssl_killed_while_it_waits_is_told(
    tcp_server: Callable[[Serve], int], handlers: Handlers, fault: Fault
) -> None:
    """openssl is killed while a server lets it wait: the error says signal 9 and names the server."""

    def serve(connection: socket.socket) -> None:
        read_request(connection)
        for pid in children():
            if b"-newkey" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
        hang(connection)

    address = f"127.0.0.1:{tcp_server(serve)}"
    section = {"cmp_server": address, "cmp_ref": "1", "cmp_secret": "x", "cmp_recipient": "/CN=CA"}
    fault(handlers(section), CSR, address, "killed by signal 9")


def test_an_openssl_that_does_not_end_is_killed(ca: DemoCA, handlers: Handlers, fault: Fault, tmp_path: Path) -> None:
    """One that ignores its own time limit is killed, and so is what it has started."""
    pids = tmp_path / "pids"
    body = f'[ "$1$2" = cmp-cmd ] || exec {OPENSSL} "$@"\nsleep 600 & echo $! >{pids}\necho $$ >>{pids}\nwait\n'
    openssl = script(tmp_path / "openssl", body)
    fault(handlers(ca.options(), openssl_bin=openssl, msg_timeout="1", total_timeout="1"), CSR, ca.server, "killed")
    for pid in pids.read_text().split():
        wait_until(partial(ended, pid), f"the end of process {pid}")


def ended(pid: str) -> bool:
    """Whether a process is gone, or a zombie that its parent has yet to take notice of."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_fault_of_the_handler_itself_says_where(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says where, also deep down; and a secret in the text of an exception stays one."""

    def broken(*_: object) -> None:
        raise KeyError(ca.secret)

    monkeypatch.setattr(cmp_ca_handler, "_prove_possession", broken)
    handler = handlers(ca.options())
    error = handler.enroll(as_host(csr_pem(["a.example"])))[0]
    lines = re.findall(r"\d+", str(re.search(r"internal error: KeyError \(lines (.*)\)", str(error))))
    source = Path(cmp_ca_handler.__file__).read_text().splitlines()
    assert any("_prove_possession(csr, transaction)" in source[int(line) - 1] for line in lines[-2:]), error
    assert ca.secret not in caplog.text


def test_a_helper_that_fails_does_not_hide_a_missing_configuration(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profiles are read from the configuration: where there is none, that is what is wrong."""
    handler = handlers({})
    handler.config_error = "cannot read acme_srv.cfg"
    helper = types.SimpleNamespace(eab_profile_header_info_check=broken_helper)
    monkeypatch.setattr(handler, "_helper", helper)
    assert handler.enroll(as_host(csr_pem(["a.example"])))[0] == "cannot read acme_srv.cfg"


def broken_helper(*_: object) -> str:
    """acme2certifier's, where there is nothing to read."""
    raise KeyError("CAhandler")


def test_a_saved_message_with_a_damaged_header_is_none(tmp_path: Path) -> None:
    """Nothing in it is no reason for an exception: it is no message."""
    header = write_der(0x30, b"\x02\x01\x02" + write_der(0xA4, b"") * 3)
    (tmp_path / "001.der").write_bytes(write_der(0x30, header + write_der(0xB7, b"")))
    assert cmp_ca_handler._saved_message(str(tmp_path / "001.der")) is None


def test_a_key_of_three_parts_is_refused(ca: DemoCA, handlers: Handlers) -> None:
    """A CSR whose SubjectPublicKeyInfo has a third part: it is no PKCS #10 request."""
    request = read_der(base64.b64decode("".join(csr_pem(["a.example"]).splitlines()[1:-1])))
    information, *rest = request.parts()
    version, subject, key, *attributes = information.parts()
    more = write_der(0x30, key.content + b"\x05\x00")
    parts = version.whole + subject.whole + more + b"".join(attribute.whole for attribute in attributes)
    der = write_der(0x30, write_der(0x30, parts) + b"".join(part.whole for part in rest))
    error = handlers(ca.options()).enroll(base64.b64encode(der).decode())[0]
    assert error == "not a usable CSR: it is not a PKCS #10 request"


def test_an_order_is_issued_without_select_poll(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eventlet takes select.poll() away from the whole process."""
    monkeypatch.delattr("select.poll")
    assert handlers(ca.options()).enroll(csr_pem(["a.example"]))[0] is None


def test_no_descriptor_is_lost_where_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """openssl cannot be started, for there is no room for its pipe: Python 3.11.2 itself would lose a descriptor."""

    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("os.pipe", none_left)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(cmp_ca_handler.CMPError, match="Too many open files"):
        cmp_ca_handler._run([OPENSSL, "version"])
    assert len(os.listdir("/proc/self/fd")) == len(before)
