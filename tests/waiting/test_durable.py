"""What the CA has said survives power failures, killed processes, full disks, slow answers and odd locales.

Real faults where a test can have them. File systems of their own stand in a mount namespace, so nothing of them is
left; that takes root, as in CI.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

import cmp_ca_handler
from conftest import BINARIES, Handlers, as_host, binaries, csr_pem, needs, needs_root, wait_until
from demo_ca import DemoCA, read_der, write_der
from host import ROOT
from proxy import Proxy, TcpServer, nested, signed
from shared import (
    ENROLLER,
    POLLER,
    SHORT,
    age,
    begin,
    check_issued,
    hold,
    processes,
    python,
    requests,
    sweep,
    unlocked,
    version,
)

DAY = 24 * 3600


def waiting(result: Any) -> str:
    """The identifier in what enroll() has returned: nothing else is there."""
    error, bundle, certificate, identifier = result
    assert (error, bundle, certificate) == (None, None, None)
    assert identifier
    return str(identifier)


# --- A power failure

EXT4_IOC_SHUTDOWN = """
import fcntl, os, struct, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587D, struct.pack("I", 2))  # what is not on the disk is lost
"""


class Disk:
    """An ext4 in a file, mounted by each process in a namespace of its own; the power fails at the process's end."""

    def __init__(self, directory: Path) -> None:
        self.image, self.mounted = directory / "disk.img", directory / "disk"
        self.mounted.mkdir()
        with self.image.open("wb") as file:
            file.truncate(32 << 20)
        subprocess.run(["mkfs.ext4", "-q", self.image], check=True)

    def run(self, script: str, *arguments: str) -> Any:
        """What the script prints, in JSON, before the power fails."""
        # Nothing is written back unless somebody has asked for it.
        shell = 'mount -o loop,commit=300 "$0" "$1" && "$2" -c "$3" "${@:5}" && "$2" -c "$4" "$1"'
        command = ["unshare", "--mount", "bash", "-c", shell, str(self.image), str(self.mounted)]
        command += [sys.executable, script, EXT4_IOC_SHUTDOWN, *arguments]
        run = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)


@needs_root
@needs("mkfs.ext4")
def test_a_power_failure_loses_no_order(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """After each call the power fails: the next process finds what the last one has promised."""
    if not Path("/dev/loop-control").exists():
        pytest.skip("this machine has no loop devices: test_a_power_failure_at_every_step_loses_no_order has to do")
    disk = Disk(tmp_path)
    handlers.work = disk.mounted / "work"
    csr = csr_pem(["durable.example"])
    handlers(hold(ca).options(), **SHORT)
    identifier = waiting(disk.run(ENROLLER, as_host(csr)))
    for _ in range(2):
        assert disk.run(POLLER, identifier, "") == [None, None, None, identifier, False]
    ca.approve("all")
    for _ in range(2):  # acme2certifier could not store what the first one returned
        check_issued(disk.run(POLLER, identifier, as_host(csr)), csr)
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 1)


class Recorder:
    """Notes what is on the disk: names since the last fsync of their directory, contents since that of their file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
        self.work, self.steps = work, 0
        self.names: dict[str, int] = {}
        self.contents: dict[int, bytes] = {}
        self.kept: list[int] = []  # descriptors, so that no inode number is used twice
        self.check: Callable[[dict[str, bytes]], None] = lambda _: None
        for function in ("fsync", "rename", "replace", "remove"):
            monkeypatch.setattr(os, function, self._wrapped(getattr(os, function)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *rest: Any) -> Any:
            result = function(first, *rest)
            if function.__name__ == "fsync":
                self._synced(first)
            self.steps += 1
            now = self._names()
            # Of what nobody has synced, nothing is on the disk; or all names are, as journals write them first.
            for names in (self.names, now):
                self.check({name: self.contents.get(inode, b"") for name, inode in names.items()})
            return result

        return call

    def _names(self) -> dict[str, int]:
        found = {}
        for path in self.work.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                found[path.name] = path.stat().st_ino
        return found

    def _synced(self, descriptor: int) -> None:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            self.names = self._names()
        else:
            self.kept.append(os.dup(descriptor))
            self.contents[info.st_ino] = os.pread(descriptor, 1 << 20, 0)

    def close(self) -> None:
        for descriptor in self.kept:
            os.close(descriptor)


def newest_nonce(files: dict[str, bytes], directory: Path) -> bytes:
    """The nonce of the newest whole answer in this image of a transaction; fails where a poll could not go on."""
    assert "waiting" in files
    assert files["csr.pem"].endswith(b"-----END CERTIFICATE REQUEST-----\n")
    assert files["pubkey.der"][:1] == b"\x30"
    answers = []
    for name in sorted(name for name in files if re.fullmatch(r"\d{3,}\.(der|new)", name)):
        path = directory / name
        path.write_bytes(files[name])
        answer = cmp_ca_handler._saved_message(str(path))
        answers += [answer] if answer else []
    usable = cmp_ca_handler._usable(answers)
    assert usable
    return usable[-1].nonces[0]


def test_a_power_failure_at_every_step_loses_no_order(
    ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without root, after every fsync, rename and deletion: a model of a disk, and the real handler."""
    image = tmp_path / "image"
    image.mkdir()
    csr = csr_pem(["durable.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    recorder = Recorder(monkeypatch, handlers.work)
    seen: list[bytes] = []

    def check_waiting(files: dict[str, bytes]) -> None:
        seen.append(newest_nonce(files, image))

    def check_issued_or_waiting(files: dict[str, bytes]) -> None:
        if not files.get("issued", b"").endswith(b"-----END CERTIFICATE-----\n"):
            check_waiting(files)

    try:
        identifier = begin(handler, csr)
        recorder.check = check_waiting
        for _ in range(3):
            assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
        ca.approve("all")
        recorder.check = check_issued_or_waiting
        check_issued(handler.poll("name", identifier, ""), csr)
    finally:
        recorder.close()
    assert recorder.steps > 20
    order = [nonce for number, nonce in enumerate(seen) if nonce not in seen[:number]]
    assert len(order) >= 4, "a poll has replaced the newest answer"


def test_an_order_that_does_not_wait_syncs_nothing_but_its_answers(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CA that issues at once: the handler does not call fsync."""
    synced: list[int] = []
    handler = handlers(ca.options())
    handlers.work.mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced.append)
        assert handler.enroll(as_host(csr_pem(["at-once.example"])))[0] is None
    assert synced == []


# --- poll(): what exists is read, not written

KILLED_AT = """
import os, signal, sys
left = int(sys.argv.pop(1))
def hook(event, arguments):
    global left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes or event in ("os.rename", "os.remove", "os.rmdir", "subprocess.Popen"):
        if os.environ["WORK"] in str(arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_POLLER = KILLED_AT + POLLER.replace("with cmp_ca", "sys.addaudithook(hook)\nwith cmp_ca")


def test_a_poll_killed_at_every_step_loses_no_order(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL before a file that poll() makes, renames or deletes, or before a process."""
    steps = [*range(1, 12), 14, 18, 22, *range(25, 32), 36, 40, 1000]  # between 12 and 24 it verifies the chain
    hold(ca).check_after = 0  # nobody sleeps
    monkeypatch.setenv("WORK", str(handlers.work))
    handler = handlers(ca.options(), **SHORT)
    csrs = {step: csr_pem([f"n{step}.example"]) for step in steps}

    def killed(step: int) -> bool:
        """Whether the process came to that step; in the end there is one certificate."""
        csr = csrs[step]
        identifier = begin(handler, csr)
        ca.approve(f"n{step}.example")
        process = python(KILLED_POLLER, str(step), identifier, "")
        out, err = process.communicate(timeout=60)
        lock = handlers.work / identifier / "waiting"
        wait_until(lambda: not processes(identifier) and (not lock.exists() or unlocked(lock.parent)), "openssl's end")
        if process.returncode == 0:
            check_issued(json.loads(out), csr)
        else:
            assert process.returncode == -signal.SIGKILL, err
        check_issued(handler.poll("name", identifier, as_host(csr)), csr)
        return process.returncode != 0

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(killed, steps))
    assert results.count(True) > 12
    assert not results[-1]
    assert requests(ca)["ir"] == len(steps) == len(ca.issued())
    for name in handlers.left():  # killed among the deletions: the sweep takes the rest
        assert "issued" in os.listdir(handlers.work / name)


def test_a_file_size_limit_leaves_the_order_as_it_was(ca: DemoCA, handlers: Handlers) -> None:
    """A limit of 0 bytes, so nothing can be written: the order is as it was."""
    csr = csr_pem(["limited.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    kept = ("csr.pem", "pubkey.der", "subject")
    before = [(handlers.work / identifier / name).stat() for name in kept]
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n" + POLLER
    process = python(limited, identifier, "")
    out, err = process.communicate(timeout=60)
    error, *rest = json.loads(out) if out else pytest.fail(err)
    assert error
    assert rest == [None, None, identifier, False]
    after = [(handlers.work / identifier / name).stat() for name in kept]
    assert [(info.st_ino, info.st_mtime_ns) for info in after] == [(info.st_ino, info.st_mtime_ns) for info in before]
    check_issued(handler.poll("name", identifier, ""), csr)
    assert handlers.left() == []


@needs_root
@pytest.mark.parametrize("option", ["size=1m", "nr_inodes=64"])
def test_a_full_disk_with_another_writer_loses_no_order(
    option: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """Blocks or inodes run out in the middle of twenty polls, after each has looked whether there is room."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "none", str(small)], check=True)
    try:
        handlers.work = small / "work"
        handler = handlers(hold(ca).options(), **SHORT)
        csrs = [csr_pem([f"n{number}.example"]) for number in range(3)]
        identifiers = [begin(handler, csr) for csr in csrs]
        ca.approve("all")

        def fill() -> None:
            with contextlib.suppress(OSError):
                for number in range(1000):
                    with (small / f"ballast-{number}").open("wb", buffering=0) as file:
                        while option.startswith("size") and file.write(bytes(4096)):
                            pass

        fill()
        result = handler.enroll(as_host(csr_pem(["other.example"])))
        assert "make room on the disk of cmp_tmp_dir" in str(result[0])
        assert result[1:] == (None, None, None)
        for identifier in identifiers:
            error, *rest = handler.poll("name", identifier, "")
            assert "make room on the disk of cmp_tmp_dir" in str(error)
            assert rest == [None, None, identifier, False]
        for ballast in small.glob("ballast-*"):
            ballast.unlink()
        for identifier, csr in zip(identifiers, csrs):
            check_issued(handler.poll("name", identifier, ""), csr)
        assert requests(ca)["ir"] == 3
        assert handlers.left() == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# --- The result of a poll

KILLED_AFTERWARDS = POLLER.replace(
    'json.dump(handler.poll("name", *sys.argv[1:]), sys.stdout)',
    'assert handler.poll("name", *sys.argv[1:])[1]\n    __import__("os").kill(__import__("os").getpid(), 9)',
)


def test_result_is_handed_out_for_a_day(ca: DemoCA, handlers: Handlers) -> None:
    """The host is killed after its poll() got the certificate: the next poll has it without the CA, for a day."""
    csr = csr_pem(["killed.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    process = python(KILLED_AFTERWARDS, identifier, "")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == -signal.SIGKILL
    seen = requests(ca)
    check_issued(handler.poll("name", identifier, as_host(csr)), csr)
    assert os.listdir(handlers.work / identifier) == ["issued"]
    assert "PRIVATE KEY" not in (handlers.work / identifier / "issued").read_text()
    assert requests(ca) == seen
    for seconds, stays in ((DAY - 3600, True), (DAY + 3600, False)):
        age(handlers.work / identifier, seconds)
        sweep(handlers, ca)
        assert (handlers.work / identifier).exists() == stays
    assert "no transaction" in str(handler.poll("name", identifier, "")[0])


def test_an_order_killed_between_the_result_and_the_end_is_swept(
    ca: DemoCA, handlers: Handlers, capsys: pytest.CaptureFixture[str]
) -> None:
    """A poller that was killed when `issued` and `waiting` were there: swept after a day, and no order that waits."""
    csr = csr_pem(["killed.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    (handlers.work / identifier / "waiting").touch()
    assert cmp_ca_handler.main(["--config", os.environ["ACME_SRV_CONFIGFILE"], "list"]) == 0
    assert capsys.readouterr().out == ""
    age(handlers.work / identifier, DAY + 3600)
    sweep(handlers, ca)
    assert not (handlers.work / identifier).exists()


def test_a_damaged_result_is_an_error(ca: DemoCA, handlers: Handlers) -> None:
    """Half a result on a broken disk is an error that says so, and no certificate."""
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr_pem(["a.example"]))
    (handlers.work / identifier / "issued").write_text("-----BEGIN CERTIFICATE-----\nMII")
    error, *rest = handler.poll("name", identifier, "")
    assert "internal" not in str(error) and rest == [None, None, identifier, False]


def test_allowed_kinds_that_have_changed_count_for_new_orders_only(ca: DemoCA, handlers: Handlers) -> None:
    """cmp_san_types is for new orders: one that waits, and one that has its certificate, keep what was allowed."""
    names = [x509.DNSName("a.example"), x509.UniformResourceIdentifier("urn:a")]
    csr = csr_pem([], extensions=[x509.SubjectAlternativeName(names)])
    identifier = begin(handlers(hold(ca).options(), san_types="DNS, URI", **SHORT), csr)
    ca.approve("all")
    handler = handlers(ca.options(), san_types="DNS", **SHORT)
    for _ in range(2):
        check_issued(handler.poll("name", identifier, as_host(csr)), csr)


def test_a_lock_whose_file_cannot_be_renamed_is_let_go(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed enrolment on a disk that is away for a moment: the next poll is not told that another one is at work."""
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr_pem(["a.example"]))
    (handlers.work / identifier / "waiting").rename(handlers.work / identifier / "enrolling")
    with monkeypatch.context() as broken:
        broken.setattr("os.rename", lambda *_: os.stat("/nonexistent/rename"))
        assert handler.poll("name", identifier, "")[0]
    ca.approve("all")
    assert handler.poll("name", identifier, "")[1]


# --- A fault of ours after the CA's first answer

FAULTY_ENROLLER = """
import json, logging, resource, signal, sys, cmp_ca_handler
cmp_ca_handler.HELPERS = ()
def interrupt(*_):
    raise RuntimeError("out of a signal handler")
signal.signal(signal.SIGUSR1, interrupt)
class Broken(logging.Handler):
    def emit(self, record):
        raise RuntimeError("the log is broken")
logger = logging.getLogger("faulty")
logger.setLevel(logging.DEBUG)
logger.addHandler(logging.StreamHandler())
with cmp_ca_handler.CAhandler(False, logger) as handler:
    json.dump(handler.enroll(sys.argv[1]), sys.stdout)
"""


def limit(process: subprocess.Popen[str], kind: int, value: int) -> None:
    """Lower a limit of a running process."""
    resource.prlimit(process.pid, kind, (value, resource.prlimit(process.pid, kind)[1]))


def kill_by_size(process: subprocess.Popen[str], work: Path) -> None:
    for pid in processes(work):
        if pid != process.pid:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, 0))


# What happens while the CA has the certConf -> whether enroll() may have the certificate all the same
FAULTS: dict[str, tuple[Callable[[subprocess.Popen[str], Path], object], bool]] = {
    "descriptors": (lambda process, _: limit(process, resource.RLIMIT_NOFILE, 4), True),
    "file size": (lambda process, _: limit(process, resource.RLIMIT_FSIZE, 0), True),
    "openssl by SIGXFSZ": (kill_by_size, False),
    "signal": (lambda process, _: process.send_signal(signal.SIGUSR1), False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_enroll_loses_no_order(fault: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """The certificate at once, or an order that waits, and gets it by its poll: never an error."""
    csr = csr_pem(["fault.example"])
    options = {**ca.options(), "cmp_server": proxy.server}
    handlers(options, msg_timeout="20", total_timeout="25")
    started: list[subprocess.Popen[str]] = []

    def spoil(forward: Callable[[], bytes]) -> bytes:
        FAULTS[fault][0](started[0], handlers.work)
        return forward()

    proxy.spoil_next("certConf", spoil)
    started.append(python(FAULTY_ENROLLER, as_host(csr), fault))
    out, err = started[0].communicate(timeout=60)
    result = json.loads(out) if out else pytest.fail(err)
    if result[1]:
        assert FAULTS[fault][1], err
        check_issued((*result, False), csr) if len(re.findall("BEGIN", result[1])) > 1 else None
    else:
        identifier = waiting(result)
        wait_until(lambda: not processes(handlers.work), "openssl's end")
        check_issued(handlers(options, **SHORT).poll("name", identifier, as_host(csr)), csr)
    assert requests(ca)["ir"] == 1
    assert handlers.left() == []


# --- A slow CA, and odd ideas of checkAfter


def test_held_orders_of_a_slow_ca_are_finished(
    make_ca: Callable[..., DemoCA], handlers: Handlers, tcp_server: TcpServer
) -> None:
    """2.5 seconds for each answer, with every version of openssl, and held orders: all are finished."""

    def finish(openssl: str, check_after: int) -> tuple[Any, str, int]:
        ca = cas[openssl, check_after]
        handler, csr = ready[openssl, check_after]
        identifier = begin(handler, csr)
        ca.approve("all")
        for _ in range(3):
            result = handler.poll("name", identifier, "")
            if result[1] or result[4]:
                break
        return result, csr, requests(ca)["ir"]

    # With OpenSSL 3.3 and later a long checkAfter leaves 2 seconds for an answer: docs/how-it-works.md.
    patient = [path for path in BINARIES if version(path) < (3, 3)]
    cases = [(path, 1) for path in BINARIES] + [(path, 3600) for path in patient]
    cas, ready = {}, {}
    for case in cases:
        cas[case] = ca = make_ca()
        ca.hold, ca.check_after = True, case[1]
        slow = Proxy(ca, tcp_server)
        slow.spoil = lambda _, forward: (time.sleep(2.5), forward())[1]  # type: ignore[func-returns-value]
        ready[case] = handlers({**ca.options(), "cmp_server": slow.server}, openssl_bin=case[0]), csr_pem(["s.example"])
    with ThreadPoolExecutor() as pool:
        for result, csr, count in pool.map(lambda case: finish(*case), cases):
            check_issued(result, csr)
            assert count == 1
    assert handlers.left() == []


@binaries
def test_check_after_zero_is_asked_a_few_times_only(openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    """A CA that says 0 seconds each time: a call asks a few times only, and the approved order is issued."""
    ca.hold, ca.check_after = True, 0
    csr = csr_pem(["now.example"])
    handler = handlers(ca.options(), openssl_bin=openssl)
    identifier = begin(handler, csr)
    for _ in range(4):
        assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
    assert requests(ca)["pollReq"] <= 15 + 4 * 4, "a bounded number for each call, though the CA has no patience"
    handler.ask_always = False
    age(next((handlers.work / identifier).glob("*2.der"), handlers.work), 0)
    ca.approve("all")
    for path in (handlers.work / identifier).glob("[0-9]*.der"):
        age(path, 2)
    check_issued(handler.poll("name", identifier, ""), csr)
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 1)


def with_check_after(answer: bytes, value: int, ca: DemoCA) -> bytes:
    """The pollRep with this checkAfter, signed anew by the CA: its own interface takes 64 bits."""
    body = read_der(answer).parts()[1]
    number = value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
    changed = nested(write_der(0x02, b"\0") + write_der(0x02, number), body.tag, 0x30, 0x30)
    key = load_pem_private_key((ca.directory / "cmp.key").read_bytes(), None)
    chain = x509.load_pem_x509_certificates((ca.directory / "cmp.pem").read_bytes())
    return signed(answer, changed, key, chain)  # type: ignore[arg-type]


@binaries
@pytest.mark.parametrize(
    "value", [-1, -(1 << 80), 1 << 31, 1 << 60, 1 << 63, 1 << 200], ids="-1 -2^80 2^31 2^60 2^63 2^200".split()
)
def test_check_after_out_of_range_ends_no_order(
    value: int, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """openssl can go on from a pollRep of up to 1.8e16 seconds only. The others are kept, and the order is not lost."""
    csr = csr_pem(["odd.example"])
    options = {**hold(ca).options("certificate"), "cmp_server": proxy.server}
    handler = handlers(options, openssl_bin=openssl, **SHORT)
    proxy.spoil_next("pollReq", lambda forward: with_check_after(forward(), value, ca))
    identifier = begin(handler, csr)
    handler.ask_always = False
    ca.approve("all")
    result = handler.poll("name", identifier, "")
    if value == 1 << 31:
        assert result == (None, None, None, identifier, False)
        handler.ask_always = True
        check_issued(handler.poll("name", identifier, ""), csr)
        return
    handler.ask_always = True
    for _ in range(2):
        error, *rest = handler.poll("name", identifier, "")
        assert "the CA gives no usable number of seconds" in str(error)
        assert rest == [None, None, identifier, False]
    assert requests(ca)["pollReq"] == 1, "nothing that would get the order rejected"
    assert handlers.left() == [identifier]


# --- The host's process

WITHOUT_STANDARD_FILES = """
import json, os, sys, cmp_ca_handler
for descriptor in (0, 1, 2):
    os.close(descriptor)
cmp_ca_handler.HELPERS = ()
with cmp_ca_handler.CAhandler() as handler:
    handler.ask_always = True
    result = handler.poll("name", sys.argv[1], "")
with open(sys.argv[2], "w") as file:
    json.dump(result, file)
"""


def test_the_lock_passes_to_openssl_with_standard_descriptors_closed(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, tmp_path: Path
) -> None:
    """The lock must pass to openssl, whatever number it gets: killed, the poll is still in progress."""
    csr = csr_pem(["closed.example"])
    options = {**hold(ca).options(), "cmp_server": proxy.server}
    identifier = begin(handlers(options, **SHORT), csr)
    ca.approve("all")
    handler = handlers(options, msg_timeout="20", total_timeout="25")
    reached, over = threading.Event(), threading.Event()

    def stall(_: Callable[[], bytes]) -> None:
        reached.set()
        over.wait(30)

    proxy.spoil_next("pollReq", stall)
    process = python(WITHOUT_STANDARD_FILES, identifier, str(tmp_path / "result"))
    try:
        assert reached.wait(30)
        process.kill()
        process.wait()
        assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
        assert handler.failure == "busy"
    finally:
        over.set()
        process.communicate()
    wait_until(lambda: unlocked(handlers.work / identifier), "the end of openssl, and so of its lock")
    process = python(WITHOUT_STANDARD_FILES, identifier, str(tmp_path / "result"))
    process.communicate(timeout=60)
    check_issued(json.loads((tmp_path / "result").read_text()), csr)


def test_killed_enrolment_is_named(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep says what to look for at the CA: subject and CMP transaction."""
    options = {**ca.options(), "cmp_server": proxy.server}
    handlers(options, msg_timeout="20", total_timeout="25")
    processes_: list[subprocess.Popen[str]] = []

    def kill(_: Callable[[], bytes]) -> None:
        processes_[0].kill()

    proxy.spoil_next("certConf", kill)
    processes_.append(python(ENROLLER, as_host(csr_pem(["lost.example"], "lost.example"))))
    processes_[0].communicate(timeout=60)
    (identifier,) = handlers.left()
    wait_until(lambda: unlocked(handlers.work / identifier), "the end of openssl")
    age(handlers.work / identifier, 4000)
    monkeypatch.setattr(cmp_ca_handler, "_swept", {})
    handler = handlers(options)
    assert handler.enroll(as_host(csr_pem(["later.example"])))[0] is None
    (line,) = [record.getMessage() for record in caplog.records if "killed process" in record.getMessage()]
    for words in ("lost.example", f"transaction={ca.messages[0].transaction}", identifier, "revoke it there"):
        assert words in line
    assert handlers.left() == []


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_clock_jump_makes_no_order_late(seconds: int, ca: DemoCA, handlers: Handlers) -> None:
    """The clock was set between an answer and its poll: the order is due at its time, or at once, never later."""
    csr = csr_pem(["clock.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    handler.ask_always = False
    assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
    asked = requests(ca)["pollReq"]
    for path in (handlers.work / identifier).glob("[0-9]*.der"):
        age(path, seconds)
    assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
    assert requests(ca)["pollReq"] == asked + 1
    ca.approve("all")
    handler.ask_always = True
    check_issued(handler.poll("name", identifier, ""), csr)


def test_a_relative_directory_stays_when_the_process_changes_its_own(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread of the host changes the directory of the process while the CA works."""
    csr = csr_pem(["relative.example"])
    monkeypatch.chdir(tmp_path)
    handlers.work = tmp_path / "relative"
    options = {**ca.options(), "cmp_server": proxy.server}
    handler = handlers(options, tmp_dir="relative")

    def change(forward: Callable[[], bytes]) -> bytes:
        os.chdir("/")
        return forward()

    proxy.spoil_next("certConf", change)
    result = handler.enroll(as_host(csr))
    check_issued((*result, False), csr)
    assert handlers.left() == []
    os.chdir(tmp_path)
    hold(ca)
    identifier = begin(handler, csr)
    proxy.spoil_next("pollReq", change)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert handlers.left() == []


@pytest.mark.parametrize("failing", [1, 2])
def test_no_order_is_lost_when_flock_fails(
    failing: int, ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without locks, or whose lock server goes away. Only a fake: no such file system is at hand."""
    csr = csr_pem(["lock.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    real, calls = fcntl.flock, 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= failing:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(descriptor, operation)

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        result = handler.poll("name", identifier, "")
        calls = 0
        error = handler.enroll(as_host(csr_pem(["other.example"])))[0]
    assert len(os.listdir("/proc/self/fd")) <= before
    if failing == 1:
        for text in (result[0], error):
            assert "the file system of cmp_tmp_dir must support flock" in str(text)
        assert handlers.left() == [identifier]
        result = handler.poll("name", identifier, "")
    check_issued(result, csr)


# --- Locales


@pytest.fixture(scope="session")
def latin1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose locale is German, in ISO-8859-1."""
    directory = tmp_path_factory.mktemp("locale")
    command = ["localedef", "-c", "-i", "de_DE", "-f", "ISO-8859-1", str(directory / "de_DE.ISO-8859-1")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"localedef cannot make a locale in ISO-8859-1: {error}")
    return {"LOCPATH": str(directory), "LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"}


IN_LOCALE = """
import json, locale, logging, sys, cmp_ca_handler
cmp_ca_handler.HELPERS = ()
locale.setlocale(locale.LC_ALL, "")
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
with cmp_ca_handler.CAhandler() as handler:
    handler.ask_always = True
    result = getattr(handler, sys.argv[1])(*sys.argv[2:])
    json.dump([sys.getfilesystemencoding(), handler.handler_check(), result], sys.stdout)
"""


@pytest.mark.parametrize("name", ["C", "ISO-8859-1"])
def test_any_locale_will_do(
    name: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Arguments and names of files are UTF-8, whatever the locale; the secret is masked all the same."""
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if name != "C":
        environment = request.getfixturevalue("latin1")
    ca.secret = "pässwört-€uro"
    handlers.work = tmp_path / "Prüfung" / "work"
    trusted = tmp_path / "Wurzel-ß.pem"
    trusted.write_bytes((ca.directory / "root.pem").read_bytes())
    csr = csr_pem(["müller.example".encode("idna").decode()], "Müller & Söhne €")
    changes = {"secret": ca.secret, "trusted": str(trusted), **SHORT}

    def call(*arguments: str, **more: str) -> Any:
        handlers(ca.options(), **{**changes, **more})
        run = subprocess.run(
            [sys.executable, "-c", IN_LOCALE, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            timeout=60,
        )
        assert run.returncode == 0, run.stderr
        encoding, fault, result = json.loads(run.stdout)
        assert "utf" not in encoding
        assert fault is None
        for form in (ca.secret.encode(), b"p\xe4ssw\xf6rt", b"ssw\\xf6rt", b"UnicodeEncodeError"):
            assert form not in run.stderr
        return result

    result = call("enroll", as_host(csr))
    check_issued((*result, False), csr)
    (leaf, *_) = x509.load_pem_x509_certificates(result[1].encode())
    assert leaf.subject.rfc4514_string() == "CN=Müller & Söhne €"
    hold(ca)
    identifier = waiting(call("enroll", as_host(csr)))
    ca.approve("all")
    check_issued(call("poll", "name", identifier, as_host(csr)), csr)
    # openssl and the CA's own words, secret included
    ca.hold, ca.reject, ca.status_text = False, "badRequest", f"nein: {ca.secret}, Grüße"
    error = call("enroll", as_host(csr))[0]
    assert "badRequest" in error
    assert "Gr" in error
    assert ca.secret not in error
    assert "sswört" not in error
    error = call("enroll", as_host(csr), recipient="C=DE, O=Müller, CN=Demo Issuing CA")[0]
    assert "internal" not in error
    assert handlers.left() == []


def test_an_answer_that_cannot_be_read_now_leaves_the_order_waiting(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CA has answered, and the process has no descriptor left to read it: the order waits all the same."""
    handler, csr = handlers(hold(ca).options(), **SHORT), csr_pem(["a.example"])

    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as broken:
        broken.setattr(cmp_ca_handler, "_saved_message", none_left)
        error, _, _, identifier = handler.enroll(as_host(csr))
    assert error is None and identifier
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


def test_a_disk_full_for_the_next_request_leaves_the_order_waiting(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openssl has taken the certificate; its certConf gets no answer, and is not on the disk: the order waits."""
    run, csr = cmp_ca_handler._openssl_cmp, csr_pem(["a.example"])

    def full(transaction: cmp_ca_handler.Transaction, *arguments: Any) -> cmp_ca_handler.Run:
        with contextlib.suppress(FileExistsError):
            os.symlink("/dev/full", transaction.file("002.req"))
        return run(transaction, *arguments)

    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **SHORT)
    proxy.spoil_next("certConf", lambda _: None)
    with monkeypatch.context() as broken:
        broken.setattr(cmp_ca_handler, "_openssl_cmp", full)
        error, _, _, identifier = handler.enroll(as_host(csr))
    assert error is None and identifier
    check_issued(handler.poll("name", identifier, ""), csr)
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 1)
