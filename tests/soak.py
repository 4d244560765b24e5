"""Thousands of enrolments in one process, and what they leave behind: nothing.

    python3 tests/soak.py                         2,000 in a row, then 200 at once
    python3 tests/soak.py --row 300 --once 50

Prints what the process holds before, between and after, and ends with exit code 1 if any of it has grown.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MEMORY = 4 << 10  # KiB by which the process may grow; a leak of 2 KiB for each of 2,000 enrolments is found


def children() -> set[int]:
    """The processes that this one has started and not waited for, zombies included."""
    found: set[int] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it may end at any time
            status = Path(f"/proc/{pid}/stat").read_text()
            # pid (name, which may hold anything) state parent ...
            if int(status.rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(pid))
    return found


class Held(NamedTuple):
    """What this process holds at one moment."""

    memory: int  # KiB
    descriptors: int
    threads: int
    processes: int  # zombies included
    files: int  # in the temporary directories

    @classmethod
    def now(cls, *directories: Path) -> Held:
        """Count it."""
        gc.collect()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
        files = sum(1 for directory in directories for _ in directory.rglob("*"))
        # The listing of /proc/self/fd has a descriptor of its own.
        return cls(memory, len(os.listdir("/proc/self/fd")) - 1, threading.active_count(), len(children()), files)

    def grown(self, before: Held) -> list[str]:
        """What has become more, in words; memory within limits apart."""
        more = [name for name in self._fields if getattr(self, name) > getattr(before, name) and name != "memory"]
        more += ["memory"] if self.memory > before.memory + MEMORY else []
        return [f"{name}: {getattr(before, name)}, then {getattr(self, name)}" for name in more]


@contextlib.contextmanager
def demo_ca(directory: Path, *options: str) -> Iterator[dict[str, str]]:
    """The demo CA in a process of its own, so that this one holds nothing for it: the section that fits."""
    command = [sys.executable, str(ROOT / "examples" / "demo_ca.py"), str(directory), "--port", "0", *options]
    log = directory.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while "# To authenticate by certificate" not in log.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the demo CA did not start: {log.read_text()}")
            time.sleep(0.02)
        section = log.read_text().split("[CAhandler]\n")[1].split("\n\n")[0]
        yield dict(line.split(": ", 1) for line in section.splitlines())
    finally:
        process.terminate()
        process.wait()


class Soak:
    """Enrols for new keys, any number at once, and checks what comes back."""

    def __init__(self, directory: Path, section: dict[str, str]) -> None:
        """Configure the handler as without a host. The system's temporary directory is ours, too, to be watched."""
        self.work, self.system = directory / "work", directory / "system"
        for path in (self.work, self.system):
            path.mkdir()
        options = {"cmp_openssl_bin": "openssl", "cmp_tmp_dir": str(self.work), **section}
        # 200 at once on a small machine: each has to wait for its turn.
        options.update(cmp_msg_timeout="120", cmp_total_timeout="240")
        self.config = directory / "acme_srv.cfg"
        self.config.write_text("[CAhandler]\n" + "".join(f"{key}: {value}\n" for key, value in options.items()))
        self.logger = logging.getLogger("soak")
        self.logger.propagate = False
        self.logger.setLevel(logging.CRITICAL)

    def held(self) -> Held:
        """What this process holds now."""
        return Held.now(self.work, self.system)

    def enrol(self, number: int) -> None:
        """One enrolment as the host does it: a new handler for each. AssertionError where it went wrong."""
        # Here, for who starts this file may have none of it before the virtual environment is made.
        from cryptography.hazmat.primitives.asymmetric import ec

        from cmp_ca_handler import CAhandler
        from conftest import as_host, bundle_certificates, csr_pem

        key = ec.generate_private_key(ec.SECP256R1())
        with CAhandler(False, self.logger) as handler:
            error, bundle, _, _ = handler.enroll(as_host(csr_pem([f"n{number}.example"], key=key)))
        assert bundle, error
        leaf, *issuers = bundle_certificates(bundle)
        assert leaf.public_key() == key.public_key(), f"enrolment {number} got another one's certificate"
        assert len(issuers) == 2

    def row(self, count: int) -> None:
        """One after the other."""
        for number in range(count):
            self.enrol(number)

    def once(self, count: int) -> None:
        """All at the same time: none begins before all threads are there."""
        barrier = threading.Barrier(count)

        def run(number: int) -> None:
            barrier.wait()
            self.enrol(number)

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(run, range(count)))


@contextlib.contextmanager
def without_host(directory: Path) -> Iterator[None]:
    """The handler alone, though the host is installed beside the tests, and its temporary directory in `directory`."""
    import cmp_ca_handler

    old = cmp_ca_handler.HELPERS, tempfile.tempdir, os.environ.get("ACME_SRV_CONFIGFILE")
    cmp_ca_handler.HELPERS, tempfile.tempdir = (), str(directory / "system")  # type: ignore[assignment]
    os.environ["ACME_SRV_CONFIGFILE"] = str(directory / "acme_srv.cfg")
    try:
        yield
    finally:
        cmp_ca_handler.HELPERS, tempfile.tempdir = old[:2]
        os.environ.pop("ACME_SRV_CONFIGFILE")
        if old[2] is not None:
            os.environ["ACME_SRV_CONFIGFILE"] = old[2]


def main() -> int:
    """Both runs, and a table."""
    parser = argparse.ArgumentParser(description="Enrol for a long time and look at what stays.")
    parser.add_argument("--row", type=int, default=2000, metavar="N", help="enrolments in a row (2000)")
    parser.add_argument("--once", type=int, default=200, metavar="N", help="enrolments at once (200)")
    arguments = parser.parse_args()
    in_test_environment("soak")
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with demo_ca(directory / "ca") as section, without_host(directory):
            soak = Soak(directory, section)
            print(f"{'':28}{'memory/KiB':>12}" + "".join(f"{field:>13}" for field in Held._fields[1:]))

            def stage(label: str) -> Held:
                held = soak.held()
                print(f"{label:<28}{held.memory:>12}" + "".join(f"{value:>13}" for value in held[1:]), flush=True)
                return held

            soak.row(20)  # imports, caches: what a process has after its first enrolments
            before = stage("after 20 to warm up")
            for count, run, label in ((arguments.row, soak.row, "in a row"), (arguments.once, soak.once, "at once")):
                started = time.monotonic()
                run(count)
                seconds = time.monotonic() - started
                after = stage(f"after {count} {label}")
                print(f"    {seconds:.0f} s, {count / seconds:.1f} a second; every certificate has its key")
                failures += [f"{label}: {what}" for what in after.grown(before)]
                if run == soak.row:
                    soak.once(arguments.once)  # 200 threads leave the allocator's arenas behind, once
                    before = stage(f"after {arguments.once} at once, to warm up")
    print("\n".join(failures) or "nothing has grown")
    return 1 if failures else 0


def in_test_environment(script: str) -> None:
    """Go on in the virtual environment of the tests, with the directories that they import from; make it if missing."""
    if os.environ.get("CMP_TEST_ENVIRONMENT") == script:
        return
    import runpy

    main_module = runpy.run_path(str(ROOT / "tests" / "__main__.py"))
    try:
        main_module["make_venv"]()
    except main_module["Missing"] as missing:
        sys.exit(f"tests/{script}.py: {missing}")
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "examples", ROOT / "tests"))
    environment = {**os.environ, "CMP_TEST_ENVIRONMENT": script, "PYTHONPATH": paths}
    python = str(main_module["PYTHON"])
    os.execve(python, [python, str(ROOT / "tests" / f"{script}.py"), *sys.argv[1:]], environment)


if __name__ == "__main__":
    sys.exit(main())
