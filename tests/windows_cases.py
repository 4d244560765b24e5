"""The handler on Windows: a Python and an OpenSSL for Windows, run by wine; the CA beside them runs as in all tests.

`python3 tests --windows` runs these; pytest does not collect the file by itself.
"""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography import x509

import cmp_ca_handler
import windows
from conftest import as_host, bundle_certificates, csr_pem, wait_until
from demo_ca import DemoCA
from host import ROOT
from shared import ISSUERS

TIMEOUT = 120


def dos(path: Path) -> str:
    """The path as Windows programs see it: wine's drive Z: is the root directory."""
    return "Z:" + str(path).replace("/", "\\")


class Wine:
    """Runs Windows programs, with a configuration of its own."""

    def __init__(self, directory: Path) -> None:
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CMP")},
            "WINEPREFIX": str(directory),
            "WINEDEBUG": "-all",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUTF8": "1",
        }

    def start(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        """Start a program. Its output goes to a pipe: Python for Windows does not take one of wine's files."""
        return subprocess.Popen(
            [windows.wine(), *command],
            cwd=cwd,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end."""
        with self.start(*command, cwd=cwd, **environment) as process:
            try:
                output, errors = process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)


@pytest.fixture(scope="session")
def wine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wine]:
    """Wine, started. What it starts in the background must not hold the pipe of a test."""
    wine = Wine(tmp_path_factory.mktemp("wine") / "prefix")

    def call(*command: str) -> None:
        null = subprocess.DEVNULL
        subprocess.run(command, env=wine.environment, stdin=null, stdout=null, stderr=null, timeout=TIMEOUT)

    server = str(Path(windows.wine()).resolve().parent / "wineserver")
    if not Path(server).exists():
        server = "/usr/lib/wine/wineserver"
    call(windows.wine(), "wineboot", "--init")
    call(server, "--persistent")
    yield wine
    call(server, "--kill")


class Windows:
    """A [CAhandler] section, and what to do with it."""

    def __init__(self, wine: Wine, directory: Path) -> None:
        self.wine, self.directory = wine, directory
        self.work, self.config = directory / "work", directory / "acme_srv.cfg"

    def configure(self, section: Mapping[str, str], **changes: str | None) -> None:
        """Write the configuration; `changes` are cmp_ keys without the prefix, None leaves one out."""
        options: dict[str, str | None] = {
            "cmp_openssl_bin": dos(windows.OPENSSL),
            "cmp_tmp_dir": dos(self.work),
            **section,
        }
        options["cmp_trusted"] = dos(Path(section["cmp_trusted"])) if "cmp_trusted" in section else None
        options.update({f"cmp_{key}": value for key, value in changes.items()})
        lines = [f"{key}: {value}" for key, value in options.items() if value is not None]
        self.config.write_text("\n".join(["[CAhandler]", *lines, ""]), encoding="utf-8")

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the handler's command line."""
        program = [dos(windows.PYTHON), dos(ROOT / "cmp_ca_handler.py"), "--config", dos(self.config)]
        return self.wine.run(*program, *arguments, cwd=self.directory, **environment)

    def file(self, name: str, text: str) -> str:
        """A file, by its path as Windows has it."""
        (self.directory / name).write_text(text)
        return dos(self.directory / name)

    def command(self, code: str, *arguments: Any) -> list[str]:
        """The command that runs `code` in Python for Windows, with `handler`, entered, and `given`, the arguments."""
        begin = "import json, os, subprocess, sys\nsys.path.insert(0, sys.argv[1])\nimport cmp_ca_handler\n"
        begin += "handler = cmp_ca_handler.CAhandler().__enter__()\ngiven = json.loads(sys.argv[2])\n"
        return [dos(windows.PYTHON), "-c", begin + code, dos(ROOT), json.dumps(arguments)]

    def evaluate(self, expression: str, *arguments: Any) -> Any:
        """What an expression gives there."""
        command = self.command(f"print(json.dumps({expression}))", *arguments)
        done = self.wine.run(*command, cwd=self.directory, ACME_SRV_CONFIGFILE=dos(self.config))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def left(self) -> list[str]:
        """What is left in cmp_tmp_dir."""
        return sorted(os.listdir(self.work)) if self.work.exists() else []


@pytest.fixture
def handler(wine: Wine, tmp_path: Path) -> Windows:
    """`handler.configure(ca.options())`, then `handler("enroll", csr)`."""
    return Windows(wine, tmp_path)


@pytest.fixture
def silent(tcp_server: Callable[[Callable[[socket.socket], None]], int]) -> tuple[str, list[bytes]]:
    """A server that never answers: its address, and how each connection began; b"closed" when it has ended."""
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        connection.settimeout(TIMEOUT)
        seen.append(connection.recv(65536)[:20])
        while connection.recv(65536):
            pass
        seen.append(b"closed")

    return f"127.0.0.1:{tcp_server(serve)}", seen


def subjects(bundle: str) -> list[str]:
    return [certificate.subject.rfc4514_string() for certificate in bundle_certificates(bundle)]


# --- Enrol ----------------------------------------------------------------------------------------------------------


def test_configuration_of_the_document_on_windows(handler: Windows, ca: DemoCA) -> None:
    """Its paths as they are: relative, with forward slashes."""
    place = handler.directory / "acme_srv" / "cmp"
    (place / "WindowsCMPOpenSSL").mkdir(parents=True)
    os.link(windows.OPENSSL, place / "WindowsCMPOpenSSL" / "openssl.exe")
    (place / "capubs.pem").write_bytes(Path(ca.options()["cmp_trusted"]).read_bytes())
    (place / "ra_cert.pem").write_bytes((ca.directory / "ra.pem").read_bytes())
    handler.config.write_text(
        f"""\
[CAhandler]
cmp_openssl_bin: acme_srv/cmp/WindowsCMPOpenSSL/openssl.exe
cmp_tmp_dir: acme_srv/cmp/tmp
cmp_server: {ca.options()["cmp_server"]}
cmp_path: pkix/
cmp_cert: acme_srv/cmp/ra_cert.pem
cmp_ref: 1234
cmp_secret: pass:demo-secret
cmp_trusted: acme_srv/cmp/capubs.pem
cmp_recipient: C=DE, O=Demo, CN=Demo Issuing CA
cmp_ignore_keyusage: True
"""
    )
    csr = csr_pem(["a.example", "b.example"], "a.example")
    error, bundle, raw, identifier = handler.evaluate("handler.enroll(given[0])", as_host(csr))
    assert (error, identifier) == (None, None)
    assert subjects(bundle) == ["CN=a.example", *ISSUERS]
    leaf = bundle_certificates(bundle)[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example", "b.example"]
    assert x509.load_der_x509_certificate(base64.b64decode(raw)) == leaf
    assert os.listdir(place / "tmp") == []


def test_backslashes_in_every_path(handler: Windows, ca: DemoCA) -> None:
    """Where openssl takes a list of files, it takes a backslash for a quote."""
    issuers = ",".join(dos(ca.directory / name) for name in ("sub.pem", "root.pem"))
    handler.configure(ca.options(), trusted=issuers, untrusted=issuers, extracerts=dos(ca.directory / "sub.pem"))
    done = handler("enroll", handler.file("www.csr", csr_pem(["a.example"])), "-o", dos(handler.directory / "www.pem"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert subjects((handler.directory / "www.pem").read_text()) == ["CN=a.example", *ISSUERS]
    assert handler.left() == []


def test_subject_outside_of_the_code_page(handler: Windows, ca: DemoCA) -> None:
    """A subject in German, Greek and Japanese letters: the certificate has it."""
    handler.configure(ca.options())
    done = handler("enroll", handler.file("www.csr", csr_pem(["a.example"], "Größe Ω 証明")))
    assert subjects(done.stdout)[0] == "CN=Größe Ω 証明"


def test_directory_of_our_own(handler: Windows, ca: DemoCA) -> None:
    """No cmp_tmp_dir: a directory below the temporary one is made, and nothing is left in it."""
    handler.configure(ca.options(), tmp_dir=None)
    (handler.directory / "temp").mkdir()
    enrol = "[os.environ.update(TMPDIR=given[1]), handler.enroll(given[0])]"  # TEMP is set by wine itself
    error, bundle, _, _ = handler.evaluate(enrol, csr_pem(["a.example"]), dos(handler.directory / "temp"))[1]
    assert (error, subjects(bundle)[0]) == (None, "CN=a.example")
    (directory,) = (handler.directory / "temp").iterdir()
    assert directory.name.startswith("cmp_ca_handler-")
    assert list(directory.iterdir()) == []


def test_false_proof_of_possession(handler: Windows, ca: DemoCA) -> None:
    """A CSR with a wrong signature: refused, and nothing is sent."""
    handler.configure(ca.options())
    der = bytearray(base64.b64decode("".join(csr_pem(["a.example"]).strip().splitlines()[1:-1])))
    der[-1] ^= 1
    error = handler.evaluate("handler.enroll(given[0])", base64.urlsafe_b64encode(der).decode())[0]
    assert "no proof of possession" in error
    assert ca.messages == []
    assert handler.left() == []


def test_wrong_secret_on_windows(handler: Windows, ca: DemoCA) -> None:
    """A CA that knows another secret: exit code 4 and the hint; the secret is not shown."""
    handler.configure(ca.options(), secret="wrong-secret")
    done = handler("-v", "enroll", handler.file("www.csr", csr_pem(["a.example"])))
    assert done.returncode == 4
    assert "check cmp_ref and cmp_secret" in done.stderr
    assert "wrong-secret" not in done.stderr
    assert handler.left() == []


# --- Poll -----------------------------------------------------------------------------------------------------------


def wait_for_the_ca(handler: Windows, ca: DemoCA, csr: str) -> str:
    """Enrol where the CA lets it wait: the poll identifier."""
    ca.hold, ca.check_after = True, 1
    handler.configure(ca.options(), msg_timeout="3", total_timeout="3")
    error, _, _, identifier = handler.evaluate("handler.enroll(given[0])", csr)
    assert error is None
    assert handler.left() == [identifier]
    return str(identifier)


def test_poll_on_windows(handler: Windows, ca: DemoCA) -> None:
    """An order that waits: exit code 3, and after the approval the bundle, in one transaction."""
    csr = as_host(csr_pem(["a.example"]))
    identifier = wait_for_the_ca(handler, ca, csr)
    done = handler("poll", identifier)
    assert (done.returncode, done.stdout.strip()) == (3, identifier)
    ca.approve("all")
    done = handler("poll", identifier)
    assert (done.returncode, done.stderr) == (0, "")
    assert subjects(done.stdout) == ["CN=a.example", *ISSUERS]
    assert len({message.transaction for message in ca.messages}) == 1


def test_refused_at_last(handler: Windows, ca: DemoCA) -> None:
    """A CA that refuses an order that waits: a poll says so, and nothing is left."""
    csr = as_host(csr_pem(["a.example"]))
    identifier = wait_for_the_ca(handler, ca, csr)
    ca.refuse("all")
    polls = iter(lambda: handler.evaluate("handler.poll('', *given)", identifier, csr), None)
    error, bundle, _, _, rejected = next(poll for poll in polls if poll[0])  # the first one may be too early
    assert "rejected the request" in error
    assert (bundle, rejected) == (None, True)
    assert handler.left() == []


def test_one_poll_at_a_time_on_windows(handler: Windows, ca: DemoCA, silent: tuple[str, list[bytes]]) -> None:
    """The first is killed, as the service may be: openssl goes with it, and the order can be polled again."""
    csr = as_host(csr_pem(["a.example"]))
    identifier = wait_for_the_ca(handler, ca, csr)
    good, (address, seen) = handler.config.read_text(), silent
    patient = re.sub("_timeout: .*", f"_timeout: {TIMEOUT}", good)
    handler.config.write_text(re.sub("cmp_server: .*", f"cmp_server: {address}", patient))
    code = "print(os.getpid(), flush=True)\nhandler.ask_always = True\nhandler.poll('', *given)"
    command = handler.command(code, identifier, csr)
    first = handler.wine.start(*command, cwd=handler.directory, ACME_SRV_CONFIGFILE=dos(handler.config))
    with first:
        wait_until(lambda: seen, "the request of the first poll", TIMEOUT)
        handler.config.write_text(good)
        done = handler("poll", identifier)
        assert "another poll of it is in progress" in done.stderr
        assert seen[1:] == []
        first.kill()
    wait_until(lambda: seen[1:] == [b"closed"], "the end of its openssl", TIMEOUT)
    ca.approve("all")
    done = handler("poll", identifier)
    assert subjects(done.stdout)[0] == "CN=a.example"


# --- Revoke ---------------------------------------------------------------------------------------------------------


def test_revoke_on_windows(handler: Windows, ca: DemoCA) -> None:
    """A certificate is revoked with a reason; the second time it is already revoked."""
    handler.configure(ca.options())
    bundle = handler("enroll", handler.file("www.csr", csr_pem(["a.example"]))).stdout
    certificate = handler.file("www.pem", bundle)
    done = handler("revoke", certificate, "--reason", "superseded")
    assert (done.returncode, done.stdout, done.stderr) == (0, "revoked\n", "")
    assert ca.is_revoked(f"{bundle_certificates(bundle)[0].serial_number:x}")
    assert "already revoked" in handler("revoke", certificate).stderr
    assert handler.left() == []


# --- The process ----------------------------------------------------------------------------------------------------


def command_lines(program: str) -> list[str]:
    """The arguments of all running processes of a program."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if words[0].decode(errors="replace").endswith(program):
            found.append(b" ".join(words).decode(errors="replace"))
    return found


def test_server_that_never_answers(handler: Windows, silent: tuple[str, list[bytes]]) -> None:
    """openssl ends by its own time-out; until then the secret stands in no argument list."""
    address, seen = silent
    section = {"cmp_server": address, "cmp_ref": "1234", "cmp_secret": "not-in-any-list"}
    handler.configure(section, msg_timeout="4", total_timeout="4")
    command = handler.command("print(handler.enroll(given[0])[0])", csr_pem(["a.example"]))
    with handler.wine.start(*command, cwd=handler.directory, ACME_SRV_CONFIGFILE=dos(handler.config)) as process:
        wait_until(lambda: seen, "the request", TIMEOUT)
        lines = [line for line in command_lines("openssl.exe") if address in line]
        assert lines
        assert "not-in-any-list" not in str(lines)
        output = process.communicate(timeout=TIMEOUT)[0]
    assert "transfer timeout" in output
    assert handler.left() == []


def test_program_that_does_not_end(handler: Windows, silent: tuple[str, list[bytes]]) -> None:
    """It is killed with what it has started, which holds its output."""
    address, seen = silent
    host, port = address.split(":")
    connect = (
        f"import socket, time; s = socket.create_connection(('{host}', {port})); s.sendall(b'here'); time.sleep(600)"
    )
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {connect!r}]).wait()"
    ended = handler.evaluate("cmp_ca_handler._run([sys.executable, '-c', given[0]], 8)[0]", child)
    assert ended == cmp_ca_handler.HUNG
    wait_until(lambda: seen == [b"here", b"closed"], "the end of what it had started", TIMEOUT)


def test_endless_output_on_windows(handler: Windows) -> None:
    """A program that prints for ever: between 128 and 256 KiB of it are kept."""
    code = "while True: print('x' * 10000)"
    length = handler.evaluate("len(cmp_ca_handler._run([sys.executable, '-c', given[0]], 4).output)", code)
    assert 1 << 17 < length <= 1 << 18


# --- Configuration and command line ---------------------------------------------------------------------------------


def test_check_on_windows(handler: Windows, ca: DemoCA) -> None:
    """`check --connect` of a right configuration: no errors, and no secret is shown."""
    handler.configure(ca.options())
    done = handler("check", "--connect")
    assert (done.returncode, done.stderr) == (0, "")
    assert "no errors found" in done.stdout
    assert ca.options()["cmp_secret"] not in done.stdout


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trsted": "x"}, "did you mean cmp_trusted"),
        ({"trusted": "Z:\\none\\ca.pem"}, "Z:/none/ca.pem is not a file"),
        ({"server": None}, "cmp_server is missing"),
        ({"openssl_bin": "Z:\\none\\openssl.exe"}, "is not an executable program"),
        ({"tmp_dir": "Z:\\a b\\work"}, "cannot use a name with a blank"),
        ({"tmp_dir": "Z:\\dev\\null\\work"}, "is not a directory"),
        ({"secret": None, "secret_variable": "NONE_SUCH"}, "the environment variable NONE_SUCH is not set"),
    ],
)
def test_error_in_the_configuration(changes: dict[str, str | None], expected: str, handler: Windows) -> None:
    """A wrong key, path, program or variable: the check names it."""
    handler.configure({"cmp_server": "127.0.0.1:1", "cmp_ref": "1234", "cmp_secret": "hush"}, **changes)
    assert expected in handler.evaluate("handler.handler_check()")


def test_batch_file(handler: Windows) -> None:
    """Windows has cmd.exe read its arguments, and some of these are the ACME client's."""
    program = handler.file("openssl.bat", "@echo off\r\n")
    handler.configure({"cmp_server": "127.0.0.1:1", "cmp_ref": "1234", "cmp_secret": "hush"}, openssl_bin=program)
    assert "is a batch file" in handler.evaluate("handler.handler_check()")


def test_convert_on_windows(handler: Windows) -> None:
    """A command line with a Windows path: the path is kept as it is."""
    words = ["cmp", "-cmd", "ir", "-server", "10.0.0.1:8080", "-trusted", "C:\\ca\\root.pem", "-ignore_keyusage"]
    done = handler("convert", "--", dos(windows.OPENSSL), *words)
    assert (done.returncode, done.stderr) == (0, "")
    expected = {
        f"cmp_openssl_bin: {dos(windows.OPENSSL)}",
        "cmp_trusted: C:\\ca\\root.pem",
        "cmp_ignore_keyusage: True",
    }
    assert expected <= set(done.stdout.splitlines())
