#!/usr/bin/env python3
"""From nothing to a certificate, with one command.

    python3 examples/demo.py              a CMP CA, a CSR, the handler, a certificate
    python3 examples/demo.py --pending    the same at a CA where an order waits for approval
    python3 examples/demo.py --acme       the same with acme2certifier and certbot, both of them from PyPI

Needs Python and openssl, nothing else; --acme installs into .venv/demo. All other files are temporary: it removes them.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = True  # leave no trace in the tree

from demo_ca import DemoCA, DemoError  # noqa: E402 - after the line above

ROOT = Path(__file__).resolve().parent.parent
HANDLER = ROOT / "cmp_ca_handler.py"
VENV = ROOT / ".venv" / "demo"
NAMES = ("www.example.com", "example.com")


class DemoFailed(Exception):
    """A step did not work. The text says what went wrong."""


# --- The three demos


def enroll(ca: DemoCA) -> None:
    """The short way: a CA, a CSR, enroll()."""
    log = Log()
    step(f"A CMP CA listens on {ca.server}. The configuration for it:")
    configure(ca)
    step("A key and a CSR, as certbot makes them")
    csr = make_csr()
    step("The handler, loaded as acme2certifier loads it, runs openssl")
    with load_handler().CAhandler(False, log.logger) as handler:
        error, bundle, _, _ = handler.enroll(csr)
    if error:
        raise DemoFailed(error)
    log.show_command()
    step("Its log")
    log.show()
    step("The bundle, as the ACME client gets it")
    show(bundle)
    show_chain(bundle)


def pending(ca: DemoCA) -> None:
    """An order that waits until somebody at the CA approves it."""
    log = Log()
    ca.hold, ca.check_after = True, 4
    step(f"A CMP CA on {ca.server} that wants to approve each request")
    # A real set-up gives the CA more time before the order counts as waiting
    configure(ca, cmp_total_timeout="3")
    step("A key and a CSR, as certbot makes them")
    csr = make_csr()
    module = load_handler()
    step("enroll(): the CA says wait, and come back in 4 seconds")
    with module.CAhandler(False, log.logger) as handler:
        error, _, _, identifier = handler.enroll(csr)
    log.show()
    if error or not identifier:
        raise DemoFailed(error or "there should have been an identifier")
    show(f"returned: no error, no certificate, identifier\n{identifier}\n")
    show("No process waits. The directory of that name in work/ is all that is kept:")
    show("\n".join(textwrap.wrap("  ".join(sorted(os.listdir(f"work/{identifier}"))), 74)))

    step("poll(), as acme2certifier's a2c-cert-poll does from cron: still waiting")
    poll(module, log, identifier, csr)
    step("Somebody at the CA approves:  demo_ca.py demo-ca approve all")
    for request in ca.pending():
        show(f"{request.serial} {request.names[0]}")
    show(f"approved: {ca.approve('all')}")
    time.sleep(ca.check_after)  # until then poll() does not ask the CA
    step("4 seconds later: poll() goes on with the same CMP transaction")
    bundle = poll(module, log, identifier, csr)
    if not bundle:
        raise DemoFailed("the CA has approved, but there is no certificate")
    show("the CA has seen: " + ", ".join(message.request for message in ca.messages))
    # in case acme2certifier is killed before it has stored what poll() returned
    show(f"left in work/ for a day, the bundle: {os.listdir('work/' + identifier)}")
    show_chain(bundle)


def acme(ca: DemoCA) -> None:
    """The whole way: certbot, acme2certifier, the handler, the CA."""
    step(f"acme2certifier and certbot, from PyPI into {VENV.relative_to(ROOT)}")
    if not (VENV / "bin" / "certbot").exists():
        run(sys.executable, "-m", "venv", VENV)
    run(VENV / "bin" / "python", "-m", "pip", "install", "--quiet", "acme2certifier", "certbot")
    for line in run(VENV / "bin" / "python", "-m", "pip", "list").splitlines():
        if line.split()[0] in ("acme2certifier", "certbot"):
            show(line)
    step(f"A CMP CA listens on {ca.server}. acme_srv.cfg:")
    configure(ca)
    show("\n" + ACME_SECTIONS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = f"http://127.0.0.1:{port}/directory"
    step(f"acme2certifier, on {server}")
    # acme2certifier skips the validation of names only if this is set, too
    environment = {**os.environ, "ACME2CERTIFIER_I_KNOW_THE_RISK": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with Path("acme2certifier.log").open("wb") as log:
        command = [str(VENV / "bin" / "python"), "-c", ACME_PROGRAM, str(port)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        wait_for(port, process)
        show("ready")
        step("certbot")
        Path("webroot").mkdir()
        places = ["--config-dir", "certbot", "--work-dir", "certbot/work", "--logs-dir", "certbot/logs"]
        options = ["--webroot", "-w", "webroot", "--agree-tos", "-m", "admin@example.com", "--server", server]
        names = [part for name in NAMES for part in ("-d", name)]
        show("$ certbot certonly --webroot -w webroot --agree-tos -m admin@example.com \\")
        show(f"    --server {server} {' '.join(names)}\n")
        output = run(VENV / "bin" / "certbot", "certonly", "-n", *places, *options, *names)
        show("\n".join(line for line in output.splitlines() if re.match("Account|Request|Success|This cert", line)))
        step("What acme2certifier has logged of it")
        for line in Path("acme2certifier.log").read_text().splitlines():
            if re.match("certificate issued|Certificate enrollment", line):
                show("\n    ".join(textwrap.wrap(line, 74)))
        show_chain(Path("certbot", "live", NAMES[0], "fullchain.pem").read_text())
    finally:
        process.terminate()
        process.wait()


# --- Their steps

# What acme2certifier needs beside the [CAhandler] section. Nobody can validate the names: they do not exist.
ACME_SECTIONS = """\
[DBhandler]
handler: wsgi
dbfile: acme_srv.db

[Challenge]
challenge_validation_disable: True
"""


def configure(ca: DemoCA, **more: str) -> None:
    """Write acme_srv.cfg, and show its [CAhandler] section."""
    own = {"handler_module": str(HANDLER), "cmp_openssl_bin": "openssl", "cmp_tmp_dir": "work"}
    options = {**own, **ca.options(), **more}
    section = "".join(["[CAhandler]\n", *(f"{key}: {value}\n" for key, value in options.items())])
    section = section.replace(f"{ca.directory}/", "demo-ca/")
    Path("acme_srv.cfg").write_text(f"{section}\n{ACME_SECTIONS}")
    os.environ["ACME_SRV_CONFIGFILE"] = str(Path("acme_srv.cfg").absolute())
    show(section)


def make_csr() -> str:
    """A key and a CSR like certbot's: no subject, two names. As acme2certifier hands it over: base64url DER."""
    run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "site.key")
    names = ",".join(f"DNS:{name}" for name in NAMES)
    subject = ["-subj", "/", "-addext", f"subjectAltName={names}"]
    run("openssl", "req", "-new", "-key", "site.key", *subject, "-out", "site.csr")
    show(f"site.key, site.csr: no subject, {' and '.join(NAMES)}")
    der = base64.b64decode("".join(Path("site.csr").read_text().split("-----")[2].split()))
    return base64.urlsafe_b64encode(der).decode().rstrip("=")


def load_handler() -> Any:
    """The handler, as acme2certifier loads what `handler_module` or `handler_file` names."""
    spec = importlib.util.spec_from_file_location("CAhandler", HANDLER)
    if spec is None or spec.loader is None:
        raise DemoFailed(f"{HANDLER} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules["CAhandler"] = module
    spec.loader.exec_module(module)
    return module


def poll(module: Any, log: Log, identifier: str, csr: str) -> str:
    """Call poll() once. Returns the bundle, "" while the order waits. Raises DemoFailed."""
    with module.CAhandler(False, log.logger) as handler:
        error, bundle, _, _, rejected = handler.poll("demo", identifier, csr)
    log.show()
    if error:
        raise DemoFailed(error)
    show(f"returned: no error, {'a' if bundle else 'no'} certificate, rejected {rejected}")
    return str(bundle or "")


def show_chain(bundle: str) -> None:
    """Who signed whom, and what openssl thinks of it."""
    step("The chain")
    for certificate in re.findall("-----BEGIN.*?-----END CERTIFICATE-----\n", bundle, re.S):
        Path("one.pem").write_text(certificate)
        names = run("openssl", "x509", "-in", "one.pem", "-noout", "-subject", "-issuer", "-nameopt", "RFC2253")
        show(names.replace("=", " ", 1).replace("issuer=", "  issued by "))
    step("openssl verify, which knows only the CA's root")
    Path("bundle.pem").write_text(bundle)
    command = ["openssl", "verify", "-CAfile", "demo-ca/root.pem", "-untrusted", "bundle.pem", "bundle.pem"]
    show(f"$ {' '.join(command)}\n{run(*command)}")


ACME_PROGRAM = """\
import sys
from wsgiref.simple_server import make_server
from acme2certifier.share.acme2certifier_wsgi import application
make_server("127.0.0.1", int(sys.argv[1]), application).serve_forever()
"""


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until acme2certifier listens. Raises DemoFailed if it ends."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise DemoFailed(f"acme2certifier did not start:\n{Path('acme2certifier.log').read_text()}")


# --- Running programs, and showing what comes of it


class Log(logging.Handler):
    """Keeps what the handler logs until it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []
        self.logger = logging.getLogger("demo")
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))

    def show_command(self) -> None:
        """The last openssl command, one option per line. No secret is in it: the handler never logs one."""
        command = [text for _, text in self.lines if text.startswith("running ")][-1]
        command = command.replace(f"{os.path.realpath(os.getcwd())}/", "")  # so that it fits into a terminal
        program, *options = re.split(r" (?=-[a-z_]+(?: |$))", command[len("running ") :])
        show(" \\\n    ".join([program.replace(shutil.which("openssl") or "", "openssl"), *options]))

    def show(self) -> None:
        """All lines from INFO on, but not openssl's own; then forget them."""
        for level, text in self.lines:
            if level >= logging.INFO and not text.startswith("openssl cmp: "):
                show("\n    ".join(textwrap.wrap(f"{logging.getLevelName(level)} {text}", 74)))
        self.lines.clear()


def step(text: str) -> None:
    """Say what comes next."""
    print(f"\n--- {text}\n", flush=True)


def show(text: str) -> None:
    """Something that was made or said, indented."""
    print(textwrap.indent(text.rstrip(), "  "), flush=True)


def run(*command: str | Path) -> str:
    """Run a program and return what it says. Raises DemoFailed if it fails."""
    try:
        pipe, null, both = subprocess.PIPE, subprocess.DEVNULL, subprocess.STDOUT
        result = subprocess.run([str(part) for part in command], text=True, stdin=null, stdout=pipe, stderr=both)
    except OSError as error:
        raise DemoFailed(f"cannot run {command[0]}: {error.strerror}") from error
    if result.returncode:
        raise DemoFailed(f"{' '.join(map(str, command[:3]))} failed:\n{result.stdout}")
    return str(result.stdout)


# --- The command line


def main() -> int:
    """Run the demo that the arguments ask for."""
    parser = argparse.ArgumentParser(description="From nothing to a certificate.")
    demos = parser.add_mutually_exclusive_group()
    demos.add_argument("--pending", action="store_true", help="an order that waits for approval")
    demos.add_argument("--acme", action="store_true", help="with acme2certifier and certbot, from PyPI")
    arguments = parser.parse_args()
    demo = pending if arguments.pending else acme if arguments.acme else enroll
    home = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="cmp-demo-") as directory:
        os.chdir(directory)
        try:
            with DemoCA("demo-ca") as ca:
                demo(ca)
        except (DemoFailed, DemoError) as error:
            print(f"\ndemo: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # the reader has seen enough; and Python is not to try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            os.chdir(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
