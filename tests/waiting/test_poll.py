"""An order waits, and poll() goes on with what enroll() left behind."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest

import cmp_ca_handler
import demo_ca
from cmp_ca_handler import CAhandler
from conftest import (
    BINARIES,
    OPENSSL,
    Handlers,
    Mock,
    Pair,
    as_host,
    binaries,
    csr_pem,
    nobody_at,
)
from demo_ca import DemoCA
from proxy import Proxy, TcpServer, note, spoilt
from shared import POLLER, SHORT, begin, check_issued, hold, processes, python, requests, script, version


def poll_elsewhere(identifier: str, csr: str = "") -> list[Any]:
    """What poll() says in another process."""
    process = python(POLLER, identifier, csr)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert isinstance(result, list)
    return result


def tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a directory, with its time and content."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- Waiting, and the end of it


@pytest.mark.parametrize(
    ("openssl", "kind"),
    [(path, kind) for path in BINARIES for kind in ("secret", "certificate")] + [(OPENSSL, "tls")],
    ids=lambda value: Path(value).name,
)
def test_an_order_is_finished_by_another_process(
    openssl: str, kind: str, make_ca: Callable[..., DemoCA], handlers: Handlers
) -> None:
    """An order that waits is approved: a poll in another process gets the certificate, and so does the next one."""
    ca = hold(make_ca(tls=kind == "tls"))
    csr = csr_pem(["a.example", "b.example"])
    options = ca.options("certificate" if kind == "certificate" else "secret")
    handler = handlers(options, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    assert handlers.left() == [identifier]
    assert processes(handlers.work) == []

    assert handler.poll("name", identifier, as_host(csr)) == (None, None, None, identifier, False)
    assert handlers.left() == [identifier]
    assert processes(handlers.work) == []

    assert ca.approve("all") == 1
    check_issued(poll_elsewhere(identifier, as_host(csr)), csr)
    assert handlers.left() == []
    assert len({message.transaction for message in ca.messages}) == 1
    found = requests(ca)
    assert (found["ir"], found["certConf"]) == (1, 1)
    assert ca.messages[-1].request == "certConf"

    # Whoever was killed before he had stored the result gets it again.
    check_issued(poll_elsewhere(identifier, as_host(csr)), csr)
    assert os.listdir(handlers.work / identifier) == ["issued"]
    assert "another CSR" in str(handler.poll("name", identifier, as_host(csr_pem(["a.example"])))[0])
    assert found == requests(ca)
    shutil.rmtree(handlers.work / identifier)
    error, *nothing, rejected = handler.poll("name", identifier, as_host(csr))
    assert "no transaction" in str(error)
    assert nothing == [None, None, identifier]
    assert not rejected


@binaries
def test_openssls_own_server_finishes_what_openssl_knows_to_wait_for(
    openssl: str, mock: Callable[..., Mock], pair: Pair, handlers: Handlers
) -> None:
    """Against the server of every version. From 3.5 on it delays the answer to certConf as well."""
    running = [mock(pair.certificate, "-poll_count", "2", "-check_after", "3600", openssl=path) for path in BINARIES]
    each = [handlers(server.options(), openssl_bin=openssl, keep_alive="0", **SHORT) for server in running]

    def finish(handler: CAhandler) -> tuple[int, Any]:
        identifier = begin(handler, pair.csr)
        for count in range(1, 9):
            result = handler.poll("name", identifier, "")
            if result != (None, None, None, identifier, False):
                return count, result
        return 9, result

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(finish, each))
    for server, (count, result) in zip(BINARIES, results):
        if version(server) < (3, 5):
            assert count == 1
            check_issued(result, pair.csr)
        elif version(openssl) < (3, 5):
            assert "OpenSSL" in str(result[0])  # that does not know this kind of waiting
        else:
            assert count == 2
            check_issued(result, pair.csr)
    assert not any(result[4] is False and result[0] is None and result[3] in handlers.left() for _, result in results)


@pytest.mark.parametrize("cmd", ["cr", "p10cr"])
def test_other_requests_that_wait_are_issued(cmd: str, ca: DemoCA, handlers: Handlers) -> None:
    """An order by `cr` or `p10cr` that waits: one request, one certConf, and the certificate."""
    csr = csr_pem(["a.example"], "a.example")
    handler = handlers(hold(ca).options(), cmd=cmd, **SHORT)
    identifier = begin(handler, csr)
    assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert (requests(ca)[cmd], requests(ca)["certConf"]) == (1, 1)
    assert handlers.left() == []


def test_implicit_confirmation_of_an_order_that_waits_sends_no_certconf(ca: DemoCA, handlers: Handlers) -> None:
    """An order that waits with cmp_implicit_confirm: issued, and no certConf is sent."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), implicit_confirm="True", **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 0)


def test_short_waiting_is_left_to_enroll(ca: DemoCA, handlers: Handlers) -> None:
    """What is decided within cmp_total_timeout needs no poll()."""
    ca.polls, ca.check_after = 2, 1
    csr = csr_pem(["a.example"])
    error, bundle, certificate, identifier = handlers(ca.options(), total_timeout="20").enroll(as_host(csr))
    assert identifier is None
    check_issued((error, bundle, certificate, identifier, False), csr)
    assert requests(ca) == {"ir": 1, "pollReq": 2, "certConf": 1}
    assert handlers.left() == []


def test_not_asked_before_its_time(ca: DemoCA, handlers: Handlers) -> None:
    """Until checkAfter has passed, the poller's poll() answers from the disk; the command line's asks."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    asked = requests(ca)
    handler.ask_always = False
    before = tree(handlers.work)
    assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
    assert (requests(ca), tree(handlers.work)) == (asked, before)
    for path in (handlers.work / identifier).glob("[0-9]*.der"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3601))
    check_issued(handler.poll("name", identifier, ""), csr)


def test_fifty_at_once_each_get_their_own_certificate(ca: DemoCA, handlers: Handlers) -> None:
    """Fifty orders that wait, polled by four threads in another order: each gets its own certificate."""
    handler = handlers(hold(ca).options(), **SHORT)
    csrs = [csr_pem([f"n{number}.example"]) for number in range(50)]
    with ThreadPoolExecutor(4) as pool:
        waiting = list(zip(pool.map(lambda csr: begin(handler, csr), csrs), csrs))
        assert handlers.left() == sorted(identifier for identifier, _ in waiting)
        assert ca.approve("all") == 50
        random.Random(50).shuffle(waiting)  # noqa: S311 - an order, not a secret
        for (_, csr), result in zip(waiting, pool.map(lambda item: handler.poll("name", item[0], ""), waiting)):
            check_issued(result, csr)
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (50, 50)
    assert len({message.transaction for message in ca.messages}) == 50
    assert handlers.left() == []


# --- The CA says no


@pytest.mark.parametrize("text", ["not in this life", "the sender does not match expected sender"])
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_an_order_refused_after_waiting_ends_with_the_reason(
    authentication: str, text: str, ca: DemoCA, handlers: Handlers
) -> None:
    """A CA that refuses an order that waits, in whatever words: the poll has them, and nothing is left."""
    handler = handlers(hold(ca).options(authentication), **SHORT)
    identifier = begin(handler, csr_pem(["a.example"]))
    ca.reject, ca.status_text = "notAuthorized", text
    assert ca.refuse("all") == 1
    error, bundle, certificate, _, rejected = handler.poll("name", identifier, "")
    assert "notAuthorized" in str(error)
    assert text in str(error)
    assert (bundle, certificate, rejected, handler.failure) == (None, None, True, "refused")
    assert handlers.left() == []


@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_an_order_forgotten_by_the_ca_ends_as_rejected(authentication: str, ca: DemoCA, handlers: Handlers) -> None:
    """A CA that no longer knows the order: the poll ends it as rejected, and no second ir is sent."""
    handler = handlers(hold(ca).options(authentication), **SHORT)
    identifier = begin(handler, csr_pem(["a.example"]))
    ca.forget()
    error, bundle, certificate, _, rejected = handler.poll("name", identifier, "")
    assert ca.server in str(error)
    assert "rejected" in str(error)
    assert (bundle, certificate, rejected) == (None, None, True)
    assert requests(ca)["ir"] == 1
    assert handlers.left() == []


# --- The CA cannot be asked


def http_error(status: str) -> Callable[[socket.socket], None]:
    """A server that has only this to say."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    return serve


@pytest.mark.parametrize(
    "serve",
    [
        None,
        lambda connection: connection.recv(1),
        lambda connection: [None for _ in iter(lambda: connection.recv(99), b"")],
    ]
    + [http_error(status) for status in ("404 Not Found", "500 Internal Server Error", "503 Service Unavailable")],
    ids="refused closed silent 404 500 503".split(),
)
def test_a_ca_that_is_away_ends_no_order(
    serve: Callable[[socket.socket], None] | None, ca: DemoCA, handlers: Handlers, tcp_server: TcpServer
) -> None:
    """A CA that is away, silent, or answers with an HTTP error: the order waits on, and the next poll gets it."""
    csr = csr_pem(["a.example"])
    identifier = begin(handlers(hold(ca).options(), **SHORT), csr)
    with nobody_at() as closed:
        port = tcp_server(serve) if serve else closed
        handler = handlers({**ca.options(), "cmp_server": f"127.0.0.1:{port}"}, **SHORT)
        error, *rest = handler.poll("name", identifier, "")
    assert f"127.0.0.1:{port}" in str(error)
    assert rest == [None, None, identifier, False]
    assert handlers.left() == [identifier]
    ca.approve("all")
    check_issued(handlers(ca.options(), **SHORT).poll("name", identifier, ""), csr)
    assert requests(ca)["ir"] == 1
    assert handlers.left() == []


@pytest.mark.parametrize("request_name", ["pollReq", "certConf"])
def test_a_connection_lost_before_the_ca_got_the_request_ends_no_order(
    request_name: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A pollReq or certConf that is lost on its way: the order waits, and is issued once."""
    ca.hold = request_name == "pollReq"
    ca.check_after = 3600
    proxy.spoil_next(request_name, lambda _: None)
    csr = csr_pem(["a.example"])
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    proxy.spoil_next("certConf", lambda _: None)  # and once more, in poll()
    error, *rest = handler.poll("name", identifier, "")
    assert error
    assert rest == [None, None, identifier, False]
    check_issued(handler.poll("name", identifier, ""), csr)
    assert (requests(ca)["ir"], requests(ca)["certConf"], len(ca.issued())) == (1, 1, 1)
    assert handlers.left() == []


def lose(forward: Callable[[], bytes]) -> None:
    """The CA gets the request, nobody gets its answer."""
    forward()


def test_a_lost_answer_to_a_poll_ends_the_order_at_openssls_server(
    ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """OpenSSL's server, unlike others, does not take a request twice, nor another one with an older nonce.

    So the CA's no ends it: an answer that nobody has seen holds the nonce that it expects next.
    """
    ca.hold, ca.check_after = True, 3600
    proxy.spoil_next("pollReq", lose)
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **SHORT)
    identifier = begin(handler, csr_pem(["a.example"]))
    error, bundle, certificate, _, rejected = handler.poll("name", identifier, "")
    assert "rejected" in str(error)
    assert (bundle, certificate, rejected) == (None, None, True)
    assert handlers.left() == []


@binaries
@pytest.mark.parametrize("held", [False, True])
def test_a_lost_answer_to_the_confirmation_costs_no_certificate(
    held: bool, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The CA has issued, and counts the certificate as confirmed: it is handed out, with a warning."""
    ca.hold, ca.check_after = held, 3600
    csr = csr_pem(["a.example"])
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    if held:
        identifier = begin(handler, csr)
        ca.approve("all")
        proxy.spoil_next("certConf", lose)
        assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    else:
        proxy.spoil_next("certConf", lose)
        identifier = begin(handler, csr)
    check_issued(handler.poll("name", identifier, ""), csr)
    assert "its confirmation is not proven" in caplog.text
    assert requests(ca)["ir"] == 1
    assert handlers.left() == []


def test_a_ca_away_before_the_confirmation_gets_it_later(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA that is away has not left the confirmation without an answer: it gets it when it is back, however late."""
    csr = csr_pem(["a.example"])
    options = {**ca.options(), "cmp_server": proxy.server}
    proxy.spoil_next("certConf", lambda _: None)
    identifier = begin(handlers(options, **SHORT), csr)
    with nobody_at() as port:
        away = handlers(options, **SHORT, server=f"127.0.0.1:{port}")
        for _ in range(3):
            error, *rest = away.poll("name", identifier, "")
            assert error
            assert rest == [None, None, identifier, False]
    check_issued(handlers(options, **SHORT).poll("name", identifier, ""), csr)
    assert "not proven" not in caplog.text
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 1)


@pytest.mark.parametrize(
    ("authentication", "how"),
    [("secret", how) for how in ("garbage", "empty", "cut short")]
    + [(kind, how) for kind in ("secret", "certificate") for how in ("tampered", "unprotected", "replayed")],
)
def test_a_wrong_answer_ends_no_order(
    authentication: str, how: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """Somebody else than the CA answers a poll: an error, and the next poll has the CA's own answer."""
    answers: list[bytes] = []
    proxy.spoil_next("pollReq", note(answers))
    csr = csr_pem(["a.example"])
    handler = handlers({**hold(ca).options(authentication), "cmp_server": proxy.server}, **SHORT)
    identifier = begin(handler, csr)
    # The CA itself does not get this request, for it would count as answered.
    proxy.spoil_next("pollReq", lambda _: spoilt(how, answers[0]))
    error, *rest = handler.poll("name", identifier, "")
    assert error
    assert rest == [None, None, identifier, False]
    assert handlers.left() == [identifier]
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 1)
    assert handlers.left() == []


def test_a_forged_rejection_ends_no_order(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """A no without the CA's protection ends nothing."""
    csr = csr_pem(["a.example"])
    handler = handlers({**hold(ca).options("certificate"), "cmp_server": proxy.server}, **SHORT)
    identifier = begin(handler, csr)
    other = begin(handler, csr_pem(["other.example"]))
    ca.refuse("other.example")
    rejections: list[bytes] = []
    proxy.spoil_next("pollReq", note(rejections))
    assert handler.poll("name", other, "")[4] is True
    header = demo_ca.read_der(rejections[0]).parts()[0].whole
    body = demo_ca.read_der(rejections[0]).parts()[1].whole
    for forged in (demo_ca.write_der(0x30, header + body), spoilt("tampered", rejections[0]), rejections[0]):
        proxy.spoil_next("pollReq", lambda _, forged=forged: forged)  # type: ignore[misc]
        error, *rest = handler.poll("name", identifier, "")
        assert error
        assert rest == [None, None, identifier, False]
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert handlers.left() == []


# --- Identifiers, locks, configuration, damage


BAD_IDENTIFIERS: list[Any] = ["", None, 7, "0" * 32, "unknown", ".", "..", "../x", "/etc", "a/b", "a\0b", "-rf"]
BAD_IDENTIFIERS += ["x" * 10_000, "{}/", "{}\n", "{}/../{}"]  # {}: one that is good


def test_a_bad_identifier_changes_nothing(ca: DemoCA, handlers: Handlers) -> None:
    """What is no order of this directory is an error, on one line, and nothing is changed."""
    handler = handlers(hold(ca).options(), **SHORT)
    good = begin(handler, csr_pem(["a.example"]))
    before = tree(handlers.directory)
    for bad in BAD_IDENTIFIERS:
        identifier = bad.replace("{}", good) if isinstance(bad, str) else bad
        error, bundle, certificate, same, rejected = handler.poll("name", identifier, "")
        assert error and "internal" not in error and "\n" not in error and len(error) < 400, ascii(bad)
        assert (bundle, certificate, same, rejected) == (None, None, identifier, False)
        assert tree(handlers.directory) == before, ascii(bad)


def test_one_poll_runs_at_a_time(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """The second one says so and changes nothing, whether it is in the same process or in another."""
    hold(ca).check_after = 1
    options = {**ca.options(), "cmp_server": proxy.server}
    csr = csr_pem(["a.example"])
    identifier = begin(handlers(options, **SHORT), csr)
    ca.approve("all")
    handler = handlers(options, msg_timeout="30")
    entered, release = threading.Event(), threading.Event()

    def delay(forward: Callable[[], bytes]) -> bytes:
        entered.set()
        release.wait(30)
        return forward()

    proxy.spoil_next("pollReq", delay)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(handler.poll, "name", identifier, "")
        try:
            assert entered.wait(30)
            before = tree(handlers.work)
            for result in (list(handler.poll("name", identifier, "")), poll_elsewhere(identifier)):
                assert result == [None, None, None, identifier, False]
            assert tree(handlers.work) == before
        finally:
            release.set()
        check_issued(first.result(60), csr)
    assert requests(ca)["certConf"] == 1
    assert handlers.left() == []


def test_an_order_finished_between_open_and_lock_is_left_as_it_is(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We have opened the lock file; the poll that holds it finishes and deletes it; we get the lock of no file."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    real = cmp_ca_handler._open_lock
    results: list[Any] = []

    def open_late(path: str, new: bool) -> int:
        descriptor = real(path, new)
        results.append(poll_elsewhere(identifier))
        return descriptor

    monkeypatch.setattr(cmp_ca_handler, "_open_lock", open_late)
    error, *rest = handler.poll("name", identifier, "")
    check_issued(results[0], csr)
    assert "no transaction" in str(error)
    assert rest == [None, None, identifier, False]
    assert os.listdir(handlers.work / identifier) == ["issued"]
    check_issued(handler.poll("name", identifier, ""), csr)


def test_nobody_polls_what_is_being_deleted(ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll that comes while the files of a refused order are deleted finds nothing, not the half of it."""
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr_pem(["a.example"]))
    ca.refuse("all")
    real = cmp_ca_handler._delete
    results: list[Any] = []

    def delete_late(path: str, but: str = "") -> None:
        if not results:
            results.append(None)  # once, whatever comes of it
            results[0] = handler.poll("name", identifier, "")
        real(path, but)

    monkeypatch.setattr(cmp_ca_handler, "_delete", delete_late)
    assert handler.poll("name", identifier, "")[4] is True
    ((error, *rest),) = results
    assert "no transaction" in str(error)
    assert rest == [None, None, identifier, False]
    assert requests(ca)["pollReq"] == 2
    assert handlers.left() == []


def test_the_lock_of_a_killed_process_is_let_go(ca: DemoCA, handlers: Handlers) -> None:
    """Another process holds the order's lock: `busy`; when it is killed, the next poll gets the certificate."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    # whatever file it is that is locked
    locking = """
import contextlib, fcntl, sys
files = [open(name, "rb+") for name in sys.argv[1:]]
for file in files:
    with contextlib.suppress(BlockingIOError):  # another name of a file that we have locked
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", locking, *map(str, (handlers.work / identifier).iterdir())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
        assert handler.failure == "busy"
        process.kill()
    check_issued(handler.poll("name", identifier, ""), csr)
    assert handlers.left() == []


def test_a_wrong_configuration_at_a_poll_ends_no_order(
    ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten wrong settings and a missing file at a poll: an error each, and the order waits until all is right."""
    csr = csr_pem(["a.example"])
    options = hold(ca).options()
    identifier = begin(handlers(options, **SHORT), csr)
    for wrong in (
        {"trusted": str(tmp_path / "missing.pem")},
        {"secret": None, "secret_variable": "NOT_SET_AT_ALL"},
        {"secret": "not the secret"},
        {"ref": None, "secret": None},
        {"trsted": "x"},
        {"server": None},
        {"openssl_bin": str(tmp_path / "missing")},
        {"openssl_bin": "/bin/true"},
        {"tmp_dir": str(tmp_path / "elsewhere")},
        {"tmp_dir": str(tmp_path / "acme_srv.cfg")},
    ):
        error, *rest = handlers(options, **{**SHORT, **wrong}).poll("name", identifier, "")
        assert error, wrong
        assert "internal" not in error
        assert rest == [None, None, identifier, False], wrong
        assert handlers.left() == [identifier]
    handlers(options, **SHORT)
    with monkeypatch.context() as patch:
        patch.setenv("ACME_SRV_CONFIGFILE", str(tmp_path / "missing.cfg"))
        error, *rest = poll_elsewhere(identifier)
    assert "missing.cfg" in str(error)
    assert rest == [None, None, identifier, False]
    ca.approve("all")
    check_issued(handlers(options, **SHORT).poll("name", identifier, ""), csr)
    assert requests(ca)["ir"] == 1
    assert handlers.left() == []


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "another file": lambda path: path.write_bytes((path.parent / "csr.pem").read_bytes() + b"[1]"),
    "removed": Path.unlink,
    "a directory": _directory,
}


def test_damaged_files_give_no_wrong_certificate(ca: DemoCA, handlers: Handlers) -> None:
    """Every file of a transaction, damaged in every way: no exception, no wrong certificate, nothing outside."""
    options = hold(ca).options()
    handler = handlers(options, **SHORT)
    csrs = {name: csr_pem([f"{name}.example"]) for name in map(str, range(80))}
    with ThreadPoolExecutor(12) as pool:
        waiting = list(pool.map(lambda csr: (begin(handler, csr), csr), csrs.values()))
        names = sorted(os.listdir(handlers.work / waiting[0][0]))
        cases = [(name, how) for name in names for how in DAMAGE]
        assert len(names) > 5
        assert len(cases) <= len(waiting)
        for (name, how), (identifier, _) in zip(cases, waiting):
            DAMAGE[how](handlers.work / identifier / name)
        ca.approve("all")
        outside = {
            path: state
            for path, state in tree(handlers.directory).items()
            if handlers.work.name not in path.split(os.sep)
        }
        results = list(pool.map(lambda item: handler.poll("name", item[0], ""), waiting))
    for (name, how), (identifier, csr), result in zip(cases, waiting, results):
        if result[1] is not None:
            check_issued(result, csr)
        else:
            assert result[0], (name, how)
            assert "internal error" not in result[0], (name, how, result)
            assert "\n" not in result[0]
            assert result[3] == identifier
        assert (identifier in handlers.left()) == (result[0] is not None and not result[4]), (name, how, result)
    for (identifier, csr), result in list(zip(waiting, results))[len(cases) :]:
        check_issued(result, csr)  # the undamaged ones among them
        assert identifier not in handlers.left()
    after = {
        path: state for path, state in tree(handlers.directory).items() if handlers.work.name not in path.split(os.sep)
    }
    own = {path for path in {*outside, *after} if outside.get(path) != after.get(path) and "/ca-0/" not in path}
    assert own == set()


def test_saved_profile_sets_what_a_profile_may(ca: DemoCA, handlers: Handlers) -> None:
    """The file outlives the configuration that it was made under, and the version of the handler."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    profile = {"cmp_openssl_bin": "/nonexistent", "cmp_secret": "another", "cmp_unprotected_errors": "True"}
    (handlers.work / identifier / "profile").write_text(json.dumps(profile))
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


def test_links_are_not_followed(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """Deleting a transaction takes nothing with it that somebody has linked into it."""
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("gold")
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    (handlers.work / identifier / "link").symlink_to(treasure)
    (handlers.work / "linked").symlink_to(treasure)
    assert handler.poll("name", "linked", "")[0]
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert handlers.left() == ["linked"]
    assert (treasure / "gold").read_text() == "gold"


def test_a_poll_with_an_openssl_that_cannot_go_on_leaves_the_order(
    ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """A cmpossl of before 3.0 (a script that says so) would use up the nonce: nothing is asked."""
    csr = csr_pem(["a.example"])
    identifier = begin(handlers(hold(ca).options(), **SHORT), csr)
    old = script(tmp_path / "old", f'[ "$1" = version ] && echo "OpenSSL 1.1.1g" && exit\nexec {OPENSSL} "$@"\n')
    asked = len(ca.messages)
    error, _, _, _, rejected = handlers(ca.options(), openssl_bin=old, **SHORT).poll("name", identifier, "")
    assert "cannot go on with an order: use OpenSSL 3.0" in str(error)
    assert (rejected, len(ca.messages)) == (False, asked)
    ca.approve("all")
    check_issued(handlers(ca.options(), **SHORT).poll("name", identifier, ""), csr)
