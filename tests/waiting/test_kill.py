"""After killed processes, full disks and other accidents what waits goes on; what else stays is swept later."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import cmp_ca_handler
from conftest import Handlers, Pair, as_host, binaries, bundle_certificates, csr_pem, needs_root, wait_until
from demo_ca import DemoCA
from proxy import Forward, Proxy, note
from shared import (
    ENROLLER,
    POLLER,
    SHORT,
    age,
    begin,
    check_issued,
    clock_jumps,
    hold,
    processes,
    python,
    requests,
    sweep,
    unlocked,
)

WEEK = 7 * 24 * 3600


class Step(NamedTuple):
    """When to kill: while the CA has this request, of an enrolment or of a poll, and does not answer yet."""

    call: str
    request: str
    pending: bool  # whether the CA has answered before, so that something is there to go on with


STEPS = [
    Step("enroll", "ir", False),
    Step("enroll", "certConf", True),
    Step("enroll", "pollReq", True),
    Step("poll", "pollReq", True),
    Step("poll", "certConf", True),
]


@pytest.mark.parametrize("victim", ["openssl", "handler", "both"])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.call}-{step.request}")
def test_an_order_survives_a_kill(step: Step, victim: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """openssl, the handler or both are killed at each step: what waits is issued later, the rest is swept."""
    options = {**ca.options(), "cmp_server": proxy.server}
    csr = csr_pem(["killed.example"])
    ca.hold, ca.check_after = step.call == "poll" or step.request == "pollReq", 1
    handler = handlers(options, **SHORT)
    identifier = begin(handler, csr) if step.call == "poll" else ""
    if step.call == "poll":
        ca.approve("all")
    reached, over = threading.Event(), threading.Event()

    def stall(_: Callable[[], bytes]) -> None:
        reached.set()
        over.wait(30)

    proxy.spoil_next(step.request, stall)
    handlers(options, msg_timeout="20", total_timeout="25")
    process = python(POLLER, identifier, "") if step.call == "poll" else python(ENROLLER, as_host(csr))
    try:
        assert reached.wait(30)
        (openssl,) = processes(handlers.work)
        if victim != "openssl":
            process.kill()
            process.wait()
        if victim != "handler":
            os.kill(openssl, signal.SIGKILL)
    finally:
        over.set()  # closes the connection, so that an openssl that is still there ends soon
        out, _ = process.communicate(timeout=60)
    wait_until(lambda: not processes(handlers.work), "openssl's end")

    if victim == "openssl":
        result = json.loads(out)
        assert result[1] is None
        identifier = result[3]
        assert (identifier is not None) == step.pending
        assert (result[0] is None) == (step.pending and step.call == "enroll")
        assert handlers.left() == ([identifier] if step.pending else [])
    else:
        (identifier,) = handlers.left()

    handler = handlers(options, **SHORT)
    if step.pending:
        wait_until(lambda: unlocked(handlers.work / identifier), "the release of its lock")
        ca.approve("all")
        check_issued(handler.poll("name", identifier, ""), csr)
        assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 1)
    elif victim != "openssl":
        # The host never learnt the identifier: the directory is nobody's until it is swept.
        age(handlers.work / identifier, 3000)
        sweep(handlers, ca)
        assert handlers.left() == [identifier]
        age(handlers.work / identifier, 4000)
        sweep(handlers, ca)
    assert handlers.left() == []


def test_an_order_killed_at_each_confirmation_waits_for_a_pkiconf(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """An openssl that was killed has not found the CA silent: the certificate is not handed out without a pkiConf."""
    csr = csr_pem(["killed.example"])
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **SHORT)

    def kill(_: Callable[[], bytes]) -> None:
        for process in processes(handlers.work):
            os.kill(process, signal.SIGKILL)

    proxy.spoil_next("certConf", kill)
    identifier = begin(handler, csr)
    for _ in range(3):
        proxy.spoil_next("certConf", kill)
        error, *rest = handler.poll("name", identifier, "")
        assert "killed by signal 9" in str(error)
        assert rest == [None, None, identifier, False]
    check_issued(handler.poll("name", identifier, ""), csr)
    assert "not proven" not in caplog.text
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 1)


@binaries
def test_a_machine_that_pauses_while_openssl_sleeps_loses_no_answer(
    openssl: str, ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than openssl has time, in enroll(): it is killed, the CA's answer stays, and with it its nonce."""
    ca.hold, ca.check_after = True, 1
    csr = csr_pem(["paused.example"])
    handler = handlers(ca.options(), openssl_bin=openssl, msg_timeout="1", total_timeout="10")

    def asleep() -> bool:
        return any(cmp_ca_handler._saved_message(str(path)) for path in handlers.work.glob("*/002.new"))

    with monkeypatch.context() as patch:
        clock_jumps(patch, asleep)
        identifier = begin(handler, csr)
    assert requests(ca) == {"ir": 1, "pollReq": 1}
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert requests(ca) == {"ir": 1, "pollReq": 2, "certConf": 1}


@binaries
def test_a_recording_while_the_clock_is_set_back_is_not_kept(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """An earlier pollRep comes in place of the CA's answer, which then looks older than its request: it is not kept."""
    recorded: list[bytes] = []
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    handler.ask_always = True
    proxy.spoil_next("pollReq", note(recorded))
    csr = csr_pem(["stepped.example"])
    identifier = begin(handler, csr)
    handler.poll("name", identifier, "")

    def replay(_: Forward) -> bytes:
        request = max((handlers.work / identifier).glob("*.req"))
        later = time.time() + 10  # as if it had been written before the clock was set back
        os.utime(request, (later, later))
        return recorded[0]

    proxy.spoil_next("pollReq", replay)
    assert not handler.poll("name", identifier, "")[4]
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


@binaries
@pytest.mark.parametrize("recording", ["certificate for the same key", "another order's pollRep", "earlier pollRep"])
def test_a_recording_sent_to_a_killed_poll_is_thrown_away(
    recording: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """The poller is killed, then openssl gets what the CA has said elsewhere: the next poll throws that away."""
    key = ec.generate_private_key(ec.SECP256R1())
    recorded: list[bytes] = []
    options = {**ca.options(), "cmp_server": proxy.server}
    handler = handlers(options, openssl_bin=openssl, **SHORT)
    if recording == "certificate for the same key":
        proxy.spoil_next("ir", note(recorded))
        assert handler.enroll(as_host(csr_pem(["killed.example"], key=key)))[1]
    hold(ca)
    proxy.spoil_next("pollReq", note(recorded))
    if recording == "another order's pollRep":
        begin(handler, csr_pem(["other.example"]))
    csr = csr_pem(["killed.example"], key=key)
    identifier = begin(handler, csr)
    assert handler.poll("name", identifier, "")[0] is None

    def kill(_: Callable[[], bytes]) -> bytes:
        poller.kill()
        poller.wait()
        return recorded[0]

    proxy.spoil_next("pollReq", kill)
    poller = python(POLLER, identifier, "")
    poller.communicate(timeout=60)
    wait_until(lambda: not processes(handlers.work), "openssl's end")
    # What openssl has saved before it has refused it.
    assert [path.read_bytes() for path in (handlers.work / identifier).glob("*.new")] == [recorded[0]]
    wait_until(lambda: unlocked(handlers.work / identifier), "the release of its lock")
    before = ca.issued()
    ca.approve("all")
    result = handler.poll("name", identifier, "")
    check_issued(result, csr)
    assert ca.issued() == [*before, f"{bundle_certificates(str(result[1]))[0].serial_number:X}"]


@binaries
def test_no_order_is_lost_when_two_polls_in_a_row_are_killed(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """Both at the certConf: the second one has made the request for the saved certificate anew, which says nothing."""
    csr = csr_pem(["twice.example"])
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")

    def kill(_: Callable[[], bytes]) -> bytes:
        poller.kill()
        poller.wait()
        for pid in processes(handlers.work):
            os.kill(pid, signal.SIGKILL)
        return b""

    for _ in range(2):
        proxy.spoil_next("certConf", kill)
        poller = python(POLLER, identifier, "")
        poller.communicate(timeout=60)
        wait_until(lambda: unlocked(handlers.work / identifier), "the release of its lock")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert requests(ca)["ir"] == 1


def test_only_what_nobody_needs_is_swept(ca: DemoCA, handlers: Handlers) -> None:
    """Older than an hour, not waiting for the CA, not locked, and one of ours."""
    options = hold(ca).options()
    csr = csr_pem(["waiting.example"])
    identifier = begin(handlers(options, **SHORT), csr)
    keep = {identifier: WEEK, "f" * 32: WEEK, "a" * 32: 60, "b" * 32: -WEEK, "someone-elses": WEEK}
    swept = {"0" * 32: 4000, "1" * 32: WEEK, "2" * 32: WEEK}
    for name, seconds in {**keep, **swept}.items():
        path = handlers.work / name
        if name != identifier:
            path.mkdir()
            if name[0] != "2":  # killed before it could even lock it
                (path / "enrolling").touch()
                (path / "csr.pem").touch()
        age(path, seconds)
    locking = (
        "import fcntl, sys\nfcntl.flock(file := open(sys.argv[1], 'rb+'), 2)\nprint(1, flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", locking, str(handlers.work / ("f" * 32) / "enrolling")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "1\n"
        sweep(handlers, ca)
        assert handlers.left() == sorted(keep)
        holder.kill()
    ca.approve("all")
    check_issued(handlers(options, **SHORT).poll("name", identifier, ""), csr)


def test_the_sweep_leaves_an_enrolment_that_begins_to_wait(ca: DemoCA, handlers: Handlers) -> None:
    """The sweep saw `enrolling`, then it was renamed to `waiting` and let go, then the sweep got its lock."""
    csr = csr_pem(["waiting.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    settings = cmp_ca_handler._settings(handler.section)
    with pytest.raises(cmp_ca_handler.CMPError):  # what comes after the first look
        cmp_ca_handler._sweep_killed(settings, identifier, "enrolling", handler.logger)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


def test_sweep_names_what_is_allowed_here_alone(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CSR whose names cmp_san_types allows is a readable one for the sweep, too."""
    uri = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://a.example/x")])
    options = hold(ca).options()
    identifier = begin(handlers(options, san_types="URI", **SHORT), csr_pem([], extensions=[uri]))
    (handlers.work / identifier / "waiting").rename(handlers.work / identifier / "enrolling")
    age(handlers.work / identifier, 4000)
    monkeypatch.setattr(cmp_ca_handler, "_swept", {})
    begin(handlers(options, san_types="URI", **SHORT), csr_pem(["later.example"]))
    (line,) = [record.getMessage() for record in caplog.records if "killed process" in record.getMessage()]
    assert 'subject="URI:spiffe://a.example/x"' in line or "subject=URI:spiffe://a.example/x" in line


def test_the_sweep_of_a_question_asks_nobody_to_revoke(
    ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A `check --connect` or `cacerts` that was killed has revoked nothing, and nobody has to revoke again."""
    handler = handlers(ca.options())
    settings = cmp_ca_handler._settings(handler.section)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as killed:
        killed.setattr(cmp_ca_handler.Transaction, "close", lambda _: None)  # what a killed process leaves
        cmp_ca_handler._general_message(settings, "", handler.logger)
    (name,) = handlers.left()
    age(handlers.work / name, WEEK)
    cmp_ca_handler._swept.clear()
    cmp_ca_handler._sweep(settings, handler.logger)
    assert handlers.left() == [] and "revoke" not in caplog.text


def test_the_sweep_of_a_revocation_says_to_revoke_again(
    ca: DemoCA, pair: Pair, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing was issued in it, so nobody has to look for a certificate at the CA."""
    handler = handlers(ca.options())
    with monkeypatch.context() as killed:  # what a killed process leaves
        killed.setattr(cmp_ca_handler.Transaction, "close", lambda self: cmp_ca_handler._unlock(self.lock))
        handler.revoke(as_host(pair.certificate.read_text()), "superseded")
    (name,) = handlers.left()
    age(handlers.work / name, WEEK)
    cmp_ca_handler._swept.clear()
    cmp_ca_handler._sweep(cmp_ca_handler._settings(handler.section), handler.logger)
    (line,) = [record.getMessage() for record in caplog.records if "killed process" in record.getMessage()]
    assert f"directory={handlers.work / name} " in line
    assert line.endswith("the CA may have revoked or not: revoke again")
    assert handlers.left() == []


def test_nothing_old_is_deleted_before_the_new_is_on_the_disk(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorder, for most file systems keep this order anyway: the new answer's name is synced, then the old goes."""
    handler = handlers(hold(ca).options(), **SHORT)
    path = str(handlers.work / begin(handler, csr_pem(["a.example"])))
    steps: list[tuple[str, str]] = []
    for module, name in ((os, "replace"), (cmp_ca_handler, "_sync"), (os, "remove")):

        def noted(*paths: str, name: str = name, real: Callable[..., None] = getattr(module, name)) -> None:
            steps.append((name, str(paths[-1])))
            real(*paths)

        monkeypatch.setattr(module, name, noted)
    assert handler.poll("name", os.path.basename(path), "")[0] is None
    (new,) = [step for step in steps if step[0] == "replace" and step[1].endswith(".der")]
    (old,) = [step for step in steps if step[0] == "remove" and step[1].endswith(".der")]
    assert steps.index(new) < steps.index(("_sync", path)) < steps.index(old)


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A small file system."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(directory: Path, spare: int) -> Path:
    """Fill the file system, but for some bytes."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - spare)
    return ballast


@needs_root
@pytest.mark.parametrize("spare", [0, 4096, 20480, 65536])
@pytest.mark.parametrize("call", ["enroll", "poll"])
def test_a_full_disk_loses_no_order(call: str, spare: int, ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """However far it gets: an error or a later poll, and what was pending before is finished when there is room."""
    csr, other = csr_pem(["pending.example"]), csr_pem(["other.example"])
    with tmpfs(tmp_path / "small", "4m") as small:
        handlers.work = small / "work"
        handler = handlers(hold(ca).options(), **SHORT)
        identifier = begin(handler, csr)
        ca.approve("all")
        ballast = fill(small, spare)
        if call == "enroll":
            ca.hold = False
            error, bundle, _, second = handler.enroll(as_host(other))
            ballast.unlink()
            assert (error is not None) + (bundle is not None) + (second is not None) == 1
            assert "internal" not in (error or "")
            assert handlers.left() == sorted(filter(None, [identifier, second]))
            if second:
                check_issued(handler.poll("name", second, ""), other)
            check_issued(handler.poll("name", identifier, ""), csr)
        else:
            result = handler.poll("name", identifier, "")
            ballast.unlink()
            assert "internal" not in str(result[0])
            if result[1] is None:
                assert result[0]
                assert result[2:] == (None, identifier, False)
                assert handlers.left() == [identifier]
                result = handler.poll("name", identifier, "")
            check_issued(result, csr)
        assert handlers.left() == []


LIMITED = """
import json, os, resource, sys, cmp_ca_handler
cmp_ca_handler.HELPERS = ()
results = []
with cmp_ca_handler.CAhandler() as handler:
    assert handler.handler_check() is None  # openssl's options are known now
    held = os.dup(0)
    os.close(held)
    for spare in range(int(sys.argv[3])):
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        results.append(handler.poll("name", sys.argv[1], ""))
        results.append(handler.enroll(sys.argv[2]))
    print(json.dumps(results))
"""


def test_exhausted_descriptors_lose_no_order(ca: DemoCA, handlers: Handlers) -> None:
    """With no descriptor to spare, with one, with two, ...: an error, nothing lost, and what is left is swept."""
    csr = csr_pem(["pending.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    process = python(LIMITED, identifier, as_host(csr_pem(["other.example"])), "4")
    out, err = process.communicate(timeout=60)
    results = json.loads(out) if out else pytest.fail(err)
    assert len(results) == 8
    assert all("Too many open files" in result[0] for result in results[:2])
    for result in results:
        assert "internal" not in (result[0] or "")
        assert result[1] is None
    waiting = {result[3] for result in results if result[0] is None}
    assert waiting | {identifier} <= set(handlers.left())
    for name in set(handlers.left()) - waiting - {identifier}:
        age(handlers.work / name, 4000)  # to delete a directory takes a descriptor, too
    ca.approve("all")
    sweep(handlers, ca)
    assert handlers.left() == sorted(waiting | {identifier})
    check_issued(handler.poll("name", identifier, ""), csr)


# --- cmp_tmp_dir between enroll() and poll()


def _remove(work: Path) -> None:
    work.rename(work.with_name("away"))


def _bring_back(work: Path) -> None:
    work.unlink(missing_ok=True)
    work.with_name("away").rename(work)


def _replace_by_link(work: Path) -> None:
    _remove(work)
    work.symlink_to(work.with_name("away"))


def _replace_by_file(work: Path) -> None:
    _remove(work)
    work.touch()


def _nothing(_: Path) -> None:
    pass


def _date(seconds: float) -> Callable[[Path], None]:
    """Give every file another date, as a clock that was wrong when they were made."""

    def change(work: Path) -> None:
        for path in work.rglob("*"):
            age(path, seconds)

    return change


# name: the accident, how it is put right, whether poll() can do its work all the same
ACCIDENTS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], bool]] = {
    "removed": (_remove, _bring_back, False),
    "a file": (_replace_by_file, _bring_back, False),
    "a link that the administrator made": (_replace_by_link, _nothing, True),
    "another user's": (lambda work: os.chown(work, 65534, 65534), lambda work: os.chown(work, 0, 0), False),
    "dated next week": (_date(-WEEK), _nothing, True),
    "dated last week": (_date(WEEK), _nothing, True),
}


@pytest.mark.parametrize(
    "accident", [pytest.param(name, marks=needs_root) if name == "another user's" else name for name in ACCIDENTS]
)
def test_a_directory_changed_between_enroll_and_poll_loses_no_order(
    accident: str, ca: DemoCA, handlers: Handlers
) -> None:
    """cmp_tmp_dir is removed, replaced, given away or dated otherwise: an error at most, then the certificate."""
    happen, put_right, works = ACCIDENTS[accident]
    csr = csr_pem(["pending.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    happen(handlers.work)
    ca.approve("all")
    result = handler.poll("name", identifier, "")
    if not works:
        assert result[0]
        assert "internal" not in result[0]
        assert result[1:] == (None, None, identifier, False)
        put_right(handlers.work)
        result = handler.poll("name", identifier, "")
    check_issued(result, csr)
    assert handlers.left() == []


def test_a_directory_deleted_during_an_enrolment_leaks_no_descriptor(
    ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """An error, and no descriptor stays open: of a worker that runs for months, they are the first thing to run out."""

    def delete(forward: Callable[[], bytes]) -> bytes:
        shutil.rmtree(handlers.work)
        return forward()

    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **SHORT)
    proxy.spoil_next("ir", delete)
    error, *rest = handler.enroll(as_host(csr_pem(["deleted.example"])))
    assert "No such file or directory" in str(error)
    assert rest == [None, None, None]
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(handlers.work))]


@needs_root
def test_a_read_only_file_system_loses_no_order(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """The file system becomes read-only while an order waits: errors that say so, and later the certificate."""
    csr = csr_pem(["pending.example"])
    with tmpfs(tmp_path / "small", "4m") as small:
        handlers.work = small / "work"
        handler = handlers(hold(ca).options(), **SHORT)
        identifier = begin(handler, csr)
        ca.approve("all")
        remount = ["mount", "-o", "remount,ro", str(small)]
        subprocess.run(remount, check=True)
        for result in (handler.poll("name", identifier, ""), handler.enroll(as_host(csr))):
            assert "Read-only file system" in str(result[0]) or "cannot be written now" in str(result[0])
            assert result[1] is None
        assert handlers.left() == [identifier]
        subprocess.run([*remount[:2], "remount,rw", remount[-1]], check=True)
        check_issued(handler.poll("name", identifier, ""), csr)
        assert handlers.left() == []
    assert requests(ca)["ir"] == 1
