"""acme2certifier as it is released, on loopback, and the clients that talk to it.

    with Host(tmp_path, {"handler_module": ".../cmp_ca_handler.py", **ca.options()}) as host:
        host.lego("a.example")

This file is also the program that runs in the host's own process: `python host.py` serves the host's WSGI
application on a free port, `python host.py N` asks that application for its directory N times instead.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIServer, make_server
from wsgiref.util import setup_testing_defaults

from openssl_versions import CACHE, locked, run

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "cmp_ca_handler.py"
PROGRAMS = Path(sys.executable).parent  # certbot is installed beside this Python
# acme2certifier under gunicorn, for `server`: a port of its own, and threads as an administrator would have them.
GUNICORN = ["-m", "gunicorn", "--workers=4", "--threads=4", "--bind=127.0.0.1:0"]
GUNICORN += ["acme2certifier.share.acme2certifier_wsgi:application"]
CONTACT = "admin@example.com"
TIMEOUT = 120


class Host:
    """acme2certifier in a process of its own, configured by `handler`, its [CAhandler] section, and more `sections`.

    The client's proof of control over a name is switched off: the host asks the DNS for the name, and connects to
    port 80, neither of which can be had on loopback. Everything else is as in production.
    """

    def __init__(
        self,
        directory: Path,
        handler: Mapping[str, str],
        sections: Mapping[str, Mapping[str, str]] | None = None,
        *,
        pythonpath: Path | None = None,
        python: Path = Path(sys.executable),
        server: Sequence[str | Path] = (__file__,),
    ) -> None:
        self.directory = directory
        self.python = python  # beside which acme2certifier is installed
        self.server = server
        self.work = directory / "work"
        self.log_file = directory / "host.log"
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        configuration: dict[str, Mapping[str, str]] = {
            "DEFAULT": {"debug": "False"},
            "DBhandler": {"handler": "wsgi", "dbfile": str(directory / "acme.db")},
            "Challenge": {"challenge_validation_disable": "True"},
            # The default, 5 seconds, is short for a busy machine: the order would become "processing".
            "Certificate": {"enrollment_timeout": "60"},
            "CAhandler": {"cmp_openssl_bin": "openssl", "cmp_tmp_dir": str(self.work), **handler},
            **(sections or {}),
        }
        write_configuration(directory / "acme_srv.cfg", configuration)
        self.environment = {
            **os.environ,
            "ACME_SRV_CONFIGFILE": str(directory / "acme_srv.cfg"),
            "ACME2CERTIFIER_I_KNOW_THE_RISK": "1",  # for challenge_validation_disable
            "PYTHONDONTWRITEBYTECODE": "1",  # the handler is loaded from the tree
            "PYTHONPATH": str(pythonpath or ""),
            "TMPDIR": str(directory / "tmp"),
            "HOME": str(directory),
        }
        (directory / "tmp").mkdir()

    def __enter__(self) -> Host:
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [self.python, *self.server],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + TIMEOUT
        while self._process.poll() is None and time.monotonic() < deadline:
            listening = re.search(r"listening (?:on|at:) (http\S+)", self.log(), re.I)
            if listening:
                self.url = listening.group(1)
                return self
            time.sleep(0.05)
        self.__exit__()
        raise AssertionError(f"the host did not start:\n{self.log()}")

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()  # gunicorn has to end its workers
            self._process.wait()

    def log(self, pattern: str = "") -> str:
        """The host's log: the lines in which `pattern` is found."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        return "\n".join(line for line in text.splitlines() if re.search(pattern, line))

    def get(self, path: str) -> tuple[int, Any]:
        """HTTP status and JSON document."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=TIMEOUT) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def tool(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one of the programs that are installed with the host."""
        return self._run(self.python.parent / arguments[0], *arguments[1:])

    def poll_until(self, words: str, tries: int = 30) -> str:
        """Run the poller, as cron does, until it says this: a CA is not asked before its checkAfter has passed."""
        for _ in range(tries):
            polled = self.tool("a2c-cert-poll")
            assert polled.returncode == 0, polled.stdout
            if re.search(words, polled.stdout):
                return polled.stdout
            time.sleep(0.5)
        raise AssertionError(f"no '{words}' in {polled.stdout}")

    def certbot(self, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run certbot, as an administrator's script does."""
        own = self.directory / "certbot"
        options: list[str | Path] = ["--non-interactive", "--config-dir", own]
        options += ["--work-dir", own / "work", "--logs-dir", own / "logs"]
        if command != "renew":  # which remembers its server
            options += ["--server", f"{self.url}/directory"]
        if command == "certonly":
            (self.directory / "webroot").mkdir(exist_ok=True)
            options += ["--agree-tos", "-m", CONTACT, "--webroot", "-w", self.directory / "webroot"]
        return self._run(PROGRAMS / "certbot", command, *options, *arguments)

    def certbot_chain(self, name: str) -> Path:
        """The newest certificate that certbot has got, with its chain."""
        return self.directory / "certbot" / "live" / name / "fullchain.pem"

    def lego_command(self, name: str, *options: str, contact: str = CONTACT) -> list[str]:
        """The command line by which lego orders a certificate. It has an ACME account for each contact."""
        lego = shutil.which("lego")
        assert lego, "the ACME client lego is missing (on Debian: apt-get install lego)"
        (self.directory / "webroot").mkdir(exist_ok=True)
        server = ["--server", f"{self.url}/directory", "--path", str(self.directory / "lego"), "-a", "-m", contact]
        webroot = ["--http", "--http.webroot", str(self.directory / "webroot")]
        return [lego, *server, *webroot, *options, "-d", name, "run"]

    def lego(self, name: str, *options: str, contact: str = CONTACT) -> subprocess.CompletedProcess[str]:
        """Order a certificate with lego."""
        return self._run(*self.lego_command(name, *options, contact=contact))

    def lego_chain(self, name: str) -> Path:
        """The certificate that lego has got, with its chain."""
        return self.directory / "lego" / "certificates" / f"{name}.crt"

    def _run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
        )


def pinned(version: str) -> Path:
    """The Python of a virtual environment with this release of acme2certifier: made once, below `.cache`."""
    directory = CACHE.parent / f"acme2certifier-{version}-{sys.version_info.major}.{sys.version_info.minor}"
    python, made = directory / "bin" / "python", directory / "made"
    if not made.exists():
        with locked(CACHE.parent / "pinned.lock"):
            if not made.exists():
                run([sys.executable, "-m", "venv", "--clear", str(directory)])
                pip = [str(python), "-I", "-m", "pip", "install", "--quiet", "--no-input"]
                run([*pip, f"acme2certifier=={version}"])
                made.touch()
    return python


def write_configuration(path: Path, sections: Mapping[str, Mapping[str, str]]) -> None:
    """An acme_srv.cfg."""
    lines = []
    for section, options in sections.items():
        lines += [f"[{section}]", *(f"{key}: {value}" for key, value in options.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


class Server(ThreadingMixIn, WSGIServer):
    """As the host's own wsgiref server, but for any number of clients at once."""

    daemon_threads = True


def serve(application: Any) -> None:
    """Serve the host on a free port, until the process is killed."""
    server = make_server("127.0.0.1", 0, application, Server)
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def ask(application: Any, count: int) -> None:
    """GET the directory `count` times, then print what that took, as JSON."""
    started: list[int] = []
    answered: list[int] = []

    def watch(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"):
            started.append(len(answered) + 1)

    sys.addaudithook(watch)
    begin = time.perf_counter()
    for _ in range(count):
        environment: dict[str, Any] = {"PATH_INFO": "/directory", "REMOTE_ADDR": "127.0.0.1"}
        setup_testing_defaults(environment)
        application(environment, lambda status, _headers: answered.append(int(status.split()[0])))
    seconds = time.perf_counter() - begin
    print(json.dumps({"answers": sorted(set(answered)), "started": started, "rate": round(count / seconds)}))


if __name__ == "__main__":
    from acme2certifier.share.acme2certifier_wsgi import application as acme2certifier

    if len(sys.argv) > 1:
        ask(acme2certifier, int(sys.argv[1]))
    else:
        serve(acme2certifier)
