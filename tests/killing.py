"""Enrolments and polls by many processes that are killed again and again, and what becomes of every order.

    python3 tests/killing.py                    two minutes: four processes with four threads each
    python3 tests/killing.py --seconds 20

The CA lets each request wait, and issues at its second poll. acme2certifier's part is played by files: an order is
noted when enroll() has returned its identifier, and finished when the result of poll() has been stored. Every second a
process, or one openssl, is killed. Then the rest is polled to its end, and all is counted. Exit code 1 if an order got
two certificates or none, or if a certificate is neither in an order nor named by the sweep.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from soak import in_test_environment, without_host

PROCESSES, THREADS = 4, 4


class Orders:
    """The database: an empty file for each order, in the directory of its state."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for state in ("waiting", "finished", "rejected"):
            (directory / state).mkdir(exist_ok=True)

    def all(self, state: str) -> list[str]:
        """The identifiers of the orders in this state."""
        return sorted(os.listdir(self.directory / state))

    def move(self, identifier: str, state: str) -> None:
        """An order is over."""
        with contextlib.suppress(FileNotFoundError):  # another one was quicker
            (self.directory / "waiting" / identifier).rename(self.directory / state / identifier)

    def poll(self, identifier: str) -> None:
        """As the poller does it."""
        from cmp_ca_handler import CAhandler

        with CAhandler(False, logging.getLogger("killing")) as handler:
            handler.ask_always = True
            error, bundle, _, _, rejected = handler.poll("name", identifier, "")
        if bundle or rejected:
            self.move(identifier, "finished" if bundle else "rejected")
        if rejected:
            (self.directory / "rejected" / identifier).write_text(str(error))

    def enrol(self) -> None:
        """As a request does it."""
        from cmp_ca_handler import CAhandler
        from conftest import as_host, csr_pem

        with CAhandler(False, logging.getLogger("killing")) as handler:
            identifier = handler.enroll(as_host(csr_pem([f"{random.getrandbits(64):x}.example"])))[3]
        if identifier:
            (self.directory / "waiting" / identifier).touch()


def work(directory: Path) -> None:
    """One process: threads that enrol and poll until somebody kills it."""
    orders = Orders(directory)

    def loop() -> None:
        while True:
            waiting = orders.all("waiting")
            if len(waiting) < 10 or random.random() < 0.4:  # noqa: S311 - no secret
                orders.enrol()
            else:
                orders.poll(random.choice(waiting))  # noqa: S311 - no secret

    threads = [threading.Thread(target=loop) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def openssls(text: str) -> list[int]:
    """The running `openssl cmp` of the workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes()
            if b"\0cmp\0" in arguments and os.fsencode(text) in arguments:
                found.append(int(path.parent.name))
    return found


def kill_for(directory: Path, seconds: float) -> Counter[str]:
    """Run the processes, and kill one each second: how many of which kind."""

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--work", str(directory)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    workers, kills, until = [start() for _ in range(PROCESSES)], Counter[str](), time.monotonic() + seconds
    try:
        time.sleep(3)
        while time.monotonic() < until:
            time.sleep(random.uniform(0.5, 1.5))  # noqa: S311 - no secret
            victims = openssls(str(directory)) if random.random() < 0.4 else []  # noqa: S311 - no secret
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(random.choice(victims), signal.SIGKILL)  # noqa: S311 - no secret
                    kills["openssl"] += 1
            else:
                number = random.randrange(PROCESSES)  # noqa: S311 - no secret
                workers[number].kill()
                workers[number].wait()
                kills["process"] += 1
                workers[number] = start()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return kills


class Lines(logging.Handler):
    """Collects what the sweep says."""

    def __init__(self) -> None:
        super().__init__()
        self.named: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Note the CMP transaction of a killed enrolment."""
        swept = "left by an enrolment that was killed.*CMP transaction ([0-9a-f]+)"
        self.named.update(re.findall(swept, record.getMessage()))


def finish(directory: Path, orders: Orders) -> Lines:
    """Poll what still waits, and sweep what the killed have left."""
    import cmp_ca_handler

    while openssls(str(directory)):
        time.sleep(0.1)
    for _ in range(5):
        for identifier in orders.all("waiting"):
            orders.poll(identifier)
    lines, logger = Lines(), logging.getLogger("killing")
    logger.addHandler(lines)
    logger.propagate = False
    work_directory, moment = directory / "work", time.time() - 2 * 24 * 3600
    for path in work_directory.iterdir():
        os.utime(path, (moment, moment))
    cmp_ca_handler._swept.clear()
    orders.enrol()
    return lines


def main() -> int:
    """Kill, finish, count."""
    parser = argparse.ArgumentParser(description="Kill enrolments and polls, and count what becomes of the orders.")
    parser.add_argument("--seconds", type=float, default=120, metavar="N", help="for how long to kill (120)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    in_test_environment("killing")
    if arguments.work:
        with without_host(arguments.work):
            work(arguments.work)
    from demo_ca import DemoCA

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with DemoCA(directory / "ca") as ca, without_host(directory):
            ca.polls, ca.check_after = 2, 3600
            options = {**ca.options(), "cmp_openssl_bin": "openssl", "cmp_tmp_dir": str(directory / "work")}
            lines = [f"{key}: {value}\n" for key, value in options.items()]
            (directory / "acme_srv.cfg").write_text("[CAhandler]\n" + "".join(lines))
            orders = Orders(directory)
            kills = kill_for(directory, arguments.seconds)
            swept = finish(directory, orders)
            first = {m.transaction: m for m in ca.messages if m.request == "ir"}
            issued = {m.transaction for m in ca.messages if m.request == "pollReq" and m.response == "ip"}
            confirmed = {m.transaction for m in ca.messages if m.request == "certConf" and m.response == "pkiConf"}
            finished, rejected, waiting = map(orders.all, ("finished", "rejected", "waiting"))
            lost = len(issued) - len(finished)
            print(f"killed: {kills['process']} processes with {THREADS} threads, {kills['openssl']} openssl alone")
            print(f"ir {len(first)}, issued {len(ca.issued())}, confirmed {len(confirmed)}, finished {len(finished)}")
            print(f"rejected {len(rejected)}, still waiting {len(waiting) - 1}")  # one was enrolled for its sweep
            for identifier in rejected:
                print("   ", (directory / "rejected" / identifier).read_text())
            left = len(os.listdir(directory / "work")) - len(waiting)
            print(f"left in cmp_tmp_dir {left}: killed when it waited, before anybody knew its identifier")
            print(f"enrolments killed and named by the sweep {len(swept.named)}; certificates in no order: {lost}")
            # OpenSSL's server takes no request twice: an answer that was lost with its openssl is the end of an order.
            good = len(rejected) <= kills["openssl"] and len(waiting) <= 1 and len(ca.issued()) == len(issued)
            good = good and lost <= len(swept.named) + len(rejected) + left
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
