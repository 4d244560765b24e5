"""What the tests share: certificate authorities, CSRs, handlers, and servers that misbehave."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import cmp_ca_handler
import programs
from cmp_ca_handler import CAhandler
from demo_ca import DemoCA
from other_cas import make_stranger
from proxy import Proxy

collect_ignore = ["clients", "servers"]  # they fetch what they need: `python3 tests --clients`, `--servers`
OPENSSL = shutil.which("openssl") or "openssl"
# The system's openssl, and the newer ones that `python3 tests` fetched.
BINARIES = [OPENSSL, *filter(None, os.environ.get("CMP_TEST_OPENSSL", "").split(os.pathsep))]
# Only root may mount file systems and give files away. CI runs as root.
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount file systems and give files away")


def of_binaries(paths: list[str]) -> pytest.MarkDecorator:
    """One case of a test for each."""
    return pytest.mark.parametrize("openssl", paths, ids=[Path(path).name for path in paths])


def by_version(path: str) -> list[int]:
    """What sorts binaries by their version."""
    run = subprocess.run([path, "version"], capture_output=True, text=True)
    return [int(number) for number in re.findall(r"\d+", run.stdout)[:3]]


# The oldest and the newest lie on the two sides of each difference that the handler knows (3.3 and 3.5). All of them
# are for tests of what versions say or do differently.
ENDS = list(dict.fromkeys([min(BINARIES, key=by_version), max(BINARIES, key=by_version)]))
binaries, every_binary = of_binaries(ENDS), of_binaries(BINARIES)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test, or with `pytestmark = needs("nginx")` a module, where an optional program is missing.

    Each name is the first word of a line in tests/packages.txt: add yours there. `programs.find("nginx")` is the
    path. With CI=true nothing is skipped: `python3 tests` ends before the first test, and says what to install.
    """
    packages = programs.packages()
    unknown = [name for name in names if name not in packages]
    assert not unknown, f"not in tests/packages.txt: {', '.join(unknown)}"
    lacking = [name for name in names if not programs.find(name)]
    how = "apt-get install " + " ".join(dict.fromkeys(packages[name] for name in lacking))
    skip = bool(lacking) and os.environ.get("CI") != "true"
    return pytest.mark.skipif(skip, reason=f"{', '.join(lacking)} not found (on Debian: {how})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: a worker that begins one last would let the others wait."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def csr_pem(names: list[str], subject: str = "", **more: Any) -> str:
    """A CSR as certbot makes it: EC key, DNS names, an empty subject unless one is given."""
    key = more.get("key") or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)] if subject else [])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), False)
    for extension in more.get("extensions", []):
        builder = builder.add_extension(extension, False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def as_host(pem: str) -> str:
    """A CSR or certificate as the host hands it over: base64url DER without padding."""
    der = base64.b64decode("".join(pem.strip().splitlines()[1:-1]))
    return base64.urlsafe_b64encode(der).decode().rstrip("=")


def bundle_certificates(bundle: str) -> list[x509.Certificate]:
    """The certificates of a bundle, in order."""
    return x509.load_pem_x509_certificates(bundle.encode())


@pytest.fixture(scope="session")
def ca_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo CA's keys and certificates, and a stranger's, made once: each test starts from a copy."""
    directory = tmp_path_factory.mktemp("demo-ca")
    with DemoCA(directory / "ca"):
        make_stranger(directory / "ca")
    return directory / "ca"


@pytest.fixture
def make_ca(ca_directory: Path, tmp_path: Path) -> Iterator[Callable[..., DemoCA]]:
    """Start demo CAs: `make_ca(tls=True)`, `make_ca(JunkCA)`."""
    with contextlib.ExitStack() as stack:

        def make(kind: type[DemoCA] = DemoCA, **options: Any) -> DemoCA:
            directory = tmp_path / f"ca-{len(list(tmp_path.glob('ca-*')))}"
            shutil.copytree(ca_directory, directory)
            return stack.enter_context(kind(directory, **options))

        yield make


@pytest.fixture
def ca(make_ca: Callable[..., DemoCA]) -> DemoCA:
    """A running demo CA."""
    return make_ca()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the handler know what a new process knows, until `monkeypatch` ends."""
    for name, value in vars(cmp_ca_handler).copy().items():
        if name[0] == "_" and name[1] != "_" and isinstance(value, (dict, list, set)):
            monkeypatch.setattr(cmp_ca_handler, name, type(value)())
        # Not what is known of a binary: that is true of it in every test, and costs two processes.
        if hasattr(value, "cache_clear") and name != "_described":
            value.cache_clear()


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the handler remembers for a process's life, it is to forget for each test: their order must not matter."""
    forget(monkeypatch)


class Handlers:
    """Makes handlers, configured by a file as without a host."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.work = directory / "work"
        self.config = directory / "acme_srv.cfg"
        monkeypatch.setenv("ACME_SRV_CONFIGFILE", str(self.config))
        # The released host is installed beside the tests: here the handler is to stand alone.
        monkeypatch.setattr(cmp_ca_handler, "HELPERS", ())

    def __call__(self, section: dict[str, str], **changes: str | None) -> CAhandler:
        """An entered handler for `section`; `changes` are cmp_ keys without the prefix, None leaves one out."""
        options: dict[str, str | None] = {
            "cmp_openssl_bin": OPENSSL,
            "cmp_tmp_dir": str(self.work),
            **section,
        }
        options.update({f"cmp_{key}": value for key, value in changes.items()})
        lines = [f"{key}: {value}" for key, value in options.items() if value is not None]
        self.config.write_text("\n".join(["[CAhandler]", *lines, ""]), encoding="utf-8")
        handler = CAhandler(False, logging.getLogger("test")).__enter__()
        handler.ask_always = True  # no test waits for a checkAfter that is not its subject
        return handler

    def left(self) -> list[str]:
        """What is left in cmp_tmp_dir, but for the results of polls, which are kept alone, for a day."""
        names = sorted(os.listdir(self.work)) if self.work.exists() else []
        return [name for name in names if not (self.work / name).is_dir() or os.listdir(self.work / name) != ["issued"]]


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Handlers:
    """`handlers(ca.options(), trusted=None)` is a handler; `handlers.left()` is what it left behind."""
    return Handlers(tmp_path, monkeypatch)


def free_port() -> int:
    """A port on loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_mock(command: list[str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start OpenSSL's server on a port that it takes itself, and says: a free one may be gone before it asks for it."""
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "-port", "0"], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    accepted = re.compile(r"^ACCEPT .*:(\d+) ", re.M)
    wait_until(lambda: accepted.search(log.read_text()) or process.poll() is not None, "the mock server's start")
    found = accepted.search(log.read_text())
    assert found, log.read_text()
    return process, int(found.group(1))


@contextlib.contextmanager
def nobody_at(port: int = 0) -> Iterator[int]:
    """A port at which nobody listens meanwhile, not even another test that runs beside this one."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        yield int(holder.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Wait for a condition, and fail if it does not come true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {seconds} seconds")


def listens(port: int) -> bool:
    """Whether a process listens there, without connecting: the mock server takes any connection for a request."""
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(wanted) and fields[3] == "0A":
                return True
    return False


class Mock(NamedTuple):
    """A running mock server of OpenSSL: its port and the options for a handler."""

    port: int
    directory: Path
    process: subprocess.Popen[bytes]

    def options(self) -> dict[str, str]:
        return {
            "cmp_server": f"127.0.0.1:{self.port}",
            "cmp_path": "pkix/",
            "cmp_recipient": "C=DE, O=Demo, CN=Demo Issuing CA",
            "cmp_ref": "1234",
            "cmp_secret": "demo-secret",
            "cmp_trusted": str(self.directory / "trusted.pem"),
        }


@pytest.fixture
def mock(ca_directory: Path, tmp_path: Path) -> Iterator[Callable[..., Mock]]:
    """OpenSSL's own mock server: `mock(response_certificate, "-poll_count", "3", openssl=...)`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(certificate: Path, *options: str, openssl: str = OPENSSL) -> Mock:
        file = ca_directory.joinpath
        command = [openssl, "cmp", "-config", "", "-accept_raverified"]
        command += [
            "-srv_ref",
            "1234",
            "-srv_secret",
            "pass:demo-secret",
            "-srv_trusted",
            str(file("root.pem")),
        ]
        command += ["-srv_cert", str(file("cmp.pem")), "-srv_key", str(file("cmp.key"))]
        command += ["-srv_untrusted", str(file("sub.pem")), "-rsp_cert", str(certificate)]
        command += ["-rsp_extracerts", str(file("sub.pem")), *options]
        process, port = start_mock(command, tmp_path / f"mock-{len(started)}.log")
        started.append(process)
        return Mock(port, ca_directory, process)

    yield start
    for process in started:
        process.kill()
        process.wait()


class Pair(NamedTuple):
    """A CSR and a certificate of the demo CA for the same key: what a mock server can answer with."""

    csr: str
    certificate: Path


@pytest.fixture
def pair(ca_directory: Path, tmp_path: Path) -> Pair:
    """A CSR, and the certificate that the demo CA's issuing key makes of it."""
    csr = csr_pem(["mock.example"], "mock.example")
    (tmp_path / "pair.csr").write_text(csr)
    command = [OPENSSL, "x509", "-req", "-in", "pair.csr", "-CA", str(ca_directory / "sub.pem")]
    command += ["-CAkey", str(ca_directory / "sub.key"), "-days", "30", "-out", "pair.pem"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return Pair(csr, tmp_path / "pair.pem")


@pytest.fixture
def tcp_server() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """A server on loopback that hands every connection to a function: returns its port."""
    with contextlib.ExitStack() as stack:

        def start(serve: Callable[[socket.socket], None]) -> int:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def handle(connection: socket.socket) -> None:
                with connection, contextlib.suppress(OSError):  # the client may go away at any time
                    connection.settimeout(30)
                    serve(connection)

            def loop() -> None:
                with contextlib.suppress(OSError):  # shut down, below
                    while True:
                        connection, _ = listener.accept()
                        threading.Thread(target=handle, args=(connection,), daemon=True).start()

            thread = threading.Thread(target=loop, daemon=True)
            thread.start()
            stack.callback(thread.join, 5)
            stack.callback(listener.shutdown, socket.SHUT_RDWR)
            return int(listener.getsockname()[1])

        yield start


@pytest.fixture
def proxy(ca: DemoCA, tcp_server: Callable[[Callable[[socket.socket], None]], int]) -> Proxy:
    """A man in the middle before `ca`."""
    return Proxy(ca, tcp_server)
