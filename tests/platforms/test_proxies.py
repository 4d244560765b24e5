"""The way to the CA may lead through real servers: nginx before it, which ends TLS; squid and tinyproxy."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

import programs
from cmp_ca_handler import CAhandler, Polled
from conftest import BINARIES, Handlers, as_host, binaries, csr_pem, free_port, listens, needs, nobody_at, wait_until
from demo_ca import DemoCA
from proxy import Forward, Proxy, TcpServer
from shared import Desk

CSR = as_host(csr_pem(["a.example"], "a.example"))
ISSUED = (None, None)
Enrol = Callable[..., "tuple[str | None, str | None]"]
Start = Callable[[str, str, "list[str]"], int]


@pytest.fixture
def enrol(handlers: Handlers) -> Enrol:
    """`enrol(section)` enrols; error and waiting identifier, both None where the certificate came."""

    def enrolled(section: dict[str, str], **changes: str | None) -> tuple[str | None, str | None]:
        error, bundle, _, identifier = handlers(section, **changes).enroll(CSR)
        assert (bundle is None) == bool(error or identifier)
        return error, identifier

    return enrolled


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., str]:
    """`check(section)` is what `check --connect` prints."""

    def checked(section: dict[str, str], **environment: str) -> str:
        desk = Desk(tmp_path)
        desk.configure(section)
        result = desk("check", "--connect", **environment)
        assert result.stderr == ""
        return result.stdout

    return checked


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Run a server until the test ends: `start("nginx", configuration, arguments)` is its port.

    In both, {port} is a free one, {directory} one of its own, and {file} the configuration.
    """
    running: list[subprocess.Popen[bytes]] = []

    def started(program: str, configuration: str, arguments: list[str]) -> int:
        directory, port = tmp_path / program, free_port()
        directory.mkdir()
        file = directory / "configuration"
        file.write_text(configuration.format(port=port, directory=directory))
        words = [word.format(directory=directory, file=file, port=port) for word in arguments]
        command = [programs.find(program), *words]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory)
        running.append(process)
        wait_until(lambda: listens(port) or process.poll() is not None, f"the start of {program}")
        assert process.poll() is None, (directory / "log").read_text()
        return port

    yield started
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# --- nginx ends TLS ---------------------------------------------------------------------------------------------------

HTTP = """\
daemon off;
master_process off;
pid {{directory}}/pid;
error_log stderr;
events {{{{}}}}
http {{{{
    access_log off;
    client_body_temp_path {{directory}};
    proxy_temp_path {{directory}};
    fastcgi_temp_path {{directory}};
    uwsgi_temp_path {{directory}};
    scgi_temp_path {{directory}};
"""
NGINX = (
    HTTP
    + """\
    server {{{{
        listen 127.0.0.1:{{port}} ssl;
        ssl_certificate {ca}/tls.pem;
        ssl_certificate_key {ca}/tls.key;
        {more}
        location /pkix/ {{{{
            proxy_pass http://{server};
        }}}}
    }}}}
}}}}
"""
)


def nginx(start: Start, ca: DemoCA, more: str = "") -> dict[str, str]:
    """The section for a CA behind nginx."""
    configuration = NGINX.format(ca=ca.directory, server=ca.server, more=more)
    port = start("nginx", configuration, ["-e", "stderr", "-p", "{directory}", "-c", "{file}"])
    trusted = ca.options()["cmp_trusted"]
    return {**ca.options(), "cmp_server": f"localhost:{port}", "cmp_tls_used": "True", "cmp_tls_trusted": trusted}


@needs("nginx")
@binaries
def test_nginx_may_end_tls(openssl: str, ca: DemoCA, start: Start, enrol: Enrol, check: Callable[..., str]) -> None:
    """nginx ends TLS before the CA: issued; a wrong TLS name, path or plain HTTP is told apart."""
    section = {**nginx(start, ca), "cmp_openssl_bin": openssl}
    assert enrol(section) == ISSUED
    output = check(section)
    assert "address: yes, TLS: yes, path: yes, trust: yes, credentials: yes" in output, output
    assert "address: yes, TLS: no" in check({**section, "cmp_tls_host": "cmp.example"})
    assert "address: yes, TLS: yes, path: no" in check({**section, "cmp_path": "nowhere"})
    error, _ = enrol({**section, "cmp_path": "nowhere"})
    assert error and "check cmp_path" in error
    error, _ = enrol({key: value for key, value in section.items() if "tls" not in key})
    assert error and "CMP with" in error


@needs("nginx")
def test_nginx_wants_a_certificate(ca: DemoCA, start: Start, enrol: Enrol, check: Callable[..., str]) -> None:
    """The RA's certificate, for TLS as well."""
    section = nginx(
        start, ca, f"ssl_client_certificate {ca.directory}/trusted.pem; ssl_verify_client on; ssl_verify_depth 3;"
    )
    error, _ = enrol(section)
    assert error and "400" in error
    ra = ca.options("certificate")
    with open(ca.directory / "ra-chain.pem", "w") as chain:  # -tls_extra does not send the intermediate CA
        chain.write((ca.directory / "ra.pem").read_text() + (ca.directory / "sub.pem").read_text())
    section.update(cmp_tls_cert=f"{ca.directory}/ra-chain.pem", cmp_tls_key=ra["cmp_key"])
    assert enrol(section) == ISSUED
    assert "TLS: yes, path: yes, trust: yes, credentials: yes" in check(section)


@needs("nginx")
def test_nginx_without_a_ca_behind_it_is_told(
    ca: DemoCA, start: Start, enrol: Enrol, check: Callable[..., str]
) -> None:
    """nginx answers 502: enrolment and `check` say that a proxy cannot reach the CMP server."""
    section = nginx(start, ca)
    ca.stop()
    with nobody_at(ca.port):
        error, _ = enrol(section)
        assert error and "502" in error and "a proxy on the way cannot reach the CMP server" in error
        assert "a proxy on the way cannot reach the CMP server" in check(section)


# --- nginx before two CMP servers -------------------------------------------------------------------------------------

TWO = (
    HTTP
    + """\
    upstream cmp {{{{
        server {first} max_fails=0;
        server {second} backup;
    }}}}
    server {{{{
        listen 127.0.0.1:{{port}};
        location / {{{{
            proxy_pass http://cmp;
            {more}
        }}}}
    }}}}
}}}}
"""
)


@pytest.fixture
def second(ca: DemoCA, tmp_path: Path) -> Iterator[DemoCA]:
    """A second server of the same CA, which shares its keys, and not its transactions."""
    shutil.copytree(ca.directory, tmp_path / "second")
    with DemoCA(tmp_path / "second") as running:
        yield running


def two_servers(start: Start, first: str, second: DemoCA, more: str = "") -> dict[str, str]:
    """What changes in the section: nginx takes `second` where the server at `first` does not answer."""
    configuration = TWO.format(first=first, second=second.server, more=more)
    port = start("nginx", configuration, ["-e", "stderr", "-p", "{directory}", "-c", "{file}"])
    return {"cmp_server": f"127.0.0.1:{port}"}


def issued(*servers: DemoCA) -> list[int]:
    return [len(server.issued()) for server in servers]


@needs("nginx")
def test_second_server_takes_over(ca: DemoCA, second: DemoCA, start: Start, enrol: Enrol) -> None:
    """As soon as nobody listens at the first; with one message for each order nothing gets lost."""
    section = {**ca.options(), **two_servers(start, ca.server, second), "cmp_implicit_confirm": "True"}
    assert enrol(section) == ISSUED
    ca.stop()
    with nobody_at(ca.port):
        assert enrol(section) == ISSUED
    assert issued(ca, second) == [1, 1]


@needs("nginx")
@pytest.mark.parametrize("repeats", [False, True], ids=["default", "non_idempotent"])
def test_a_lost_answer_costs_a_second_certificate_if_nginx_repeats(
    repeats: bool, ca: DemoCA, proxy: Proxy, second: DemoCA, start: Start, enrol: Enrol
) -> None:
    """nginx does not repeat what it has sent, unless it is told to: then the certificate is issued twice."""
    more = "proxy_next_upstream error timeout non_idempotent;" if repeats else ""
    section = {**ca.options(), **two_servers(start, proxy.server, second, more), "cmp_implicit_confirm": "True"}

    def lost(forward: Forward) -> None:
        forward()

    proxy.spoil_next("ir", lost)
    error, _ = enrol(section)
    assert issued(ca, second) == ([1, 1] if repeats else [1, 0])
    assert error is None if repeats else error and "502" in error


@needs("nginx")
def test_an_order_that_waits_is_lost_at_a_second_server(
    ca: DemoCA, second: DemoCA, start: Start, handlers: Handlers
) -> None:
    """The second does not know the transaction: the order is lost."""
    ca.hold = True
    handler = handlers({**ca.options(), **two_servers(start, ca.server, second), "cmp_total_timeout": "3"})
    error, _, _, identifier = handler.enroll(CSR)
    assert error is None and identifier
    ca.stop()
    with nobody_at(ca.port):
        error, _, _, _, rejected = polled(handler, identifier)
    assert error and rejected, error
    assert issued(ca, second) == [0, 0]


def polled(handler: CAhandler, identifier: str) -> Polled:
    """What the poll is about that asks the CA: earlier ones wait until its checkAfter has passed."""
    answers = []

    def asked() -> bool:
        answers.append(handler.poll("a.example", identifier, CSR))
        return bool(answers[-1][0])

    wait_until(asked, "a poll that reaches the CA")
    return answers[-1]


# --- HTTP proxies -----------------------------------------------------------------------------------------------------

SQUID = """\
http_port 127.0.0.1:{port}
http_access allow localhost
http_access deny all
pid_filename none
cache_log /dev/null
access_log none
cache deny all
coredump_dir none
shutdown_lifetime 0 seconds
visible_hostname localhost
pinger_enable off
"""
TINYPROXY = "Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nTimeout 60\nLogLevel Connect\n"


@pytest.fixture
def squid(start: Start) -> str:
    """The address of a running squid. By the service's name it tells its shared memory from that of another one."""
    return f"127.0.0.1:{start('squid', SQUID, ['-N', '-n', 'test{port}', '-f', '{file}'])}"


@needs("squid")
@binaries
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_squid_may_be_the_proxy(
    tls: bool, openssl: str, squid: str, make_ca: Callable[..., DemoCA], enrol: Enrol, check: Callable[..., str]
) -> None:
    """Over squid, http and https: issued; with the CA away, the error says that a proxy cannot reach it."""
    ca = make_ca(tls=tls)
    section = {**ca.options(), "cmp_proxy": squid, "cmp_openssl_bin": openssl}
    assert enrol(section) == ISSUED
    output = check(section)
    assert f"via {squid}" in output and "trust: yes, credentials: yes" in output, output
    ca.stop()
    with nobody_at(ca.port):
        texts = (enrol(section)[0], check(section))
    for text in texts:
        assert text and "a proxy on the way cannot reach the CMP server" in text


@needs("squid")
def test_squid_is_used_if_the_environment_names_it(
    squid: str, ca: DemoCA, make_ca: Callable[..., DemoCA], check: Callable[..., str]
) -> None:
    """As openssl has it: for TLS both variables must be set."""
    tls, proxy = make_ca(tls=True), f"http://{squid}"
    assert f"via http://{squid}" in check(ca.options(), http_proxy=proxy)
    output = check(tls.options(), http_proxy=proxy, https_proxy=proxy)
    assert f"via http://{squid}" in output and "trust: yes, credentials: yes" in output, output
    without = check({**ca.options(), "cmp_no_proxy": "127.0.0.1"}, http_proxy=proxy)
    assert "via" not in without and "trust: yes, credentials: yes" in without


@needs("tinyproxy")
@pytest.mark.parametrize("openssl", BINARIES)
def test_tinyproxy_may_be_the_proxy(openssl: str, ca: DemoCA, start: Start, enrol: Enrol) -> None:
    """It sends its header in pieces now and then, so openssl is to have no time-outs."""
    port = start("tinyproxy", TINYPROXY, ["-d", "-c", "{file}"])
    section = {**ca.options(), "cmp_proxy": f"127.0.0.1:{port}", "cmp_openssl_bin": openssl}
    for _ in range(10):
        assert enrol(section, msg_timeout="0", total_timeout="0") == ISSUED


@needs("tinyproxy")
@pytest.mark.parametrize("openssl", BINARIES)
def test_tinyproxy_passes_on_tls(openssl: str, make_ca: Callable[..., DemoCA], start: Start, enrol: Enrol) -> None:
    """What is in TLS, it passes on as it is."""
    port = start("tinyproxy", TINYPROXY, ["-d", "-c", "{file}"])
    section = {**make_ca(tls=True).options(), "cmp_proxy": f"127.0.0.1:{port}", "cmp_openssl_bin": openssl}
    for _ in range(5):
        assert enrol(section, msg_timeout="0", total_timeout="0") == ISSUED


@binaries
def test_a_header_in_pieces_needs_no_timeouts(openssl: str, ca: DemoCA, tcp_server: TcpServer, enrol: Enrol) -> None:
    """What tinyproxy does in one answer of ten, always: a server of our own, for tinyproxy cannot be told to."""

    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection.makefile("rb") as stream:
            stream.readline()
            header = dict(line.lower().split(b":", 1) for line in iter(stream.readline, b"\r\n"))
            request = stream.read(int(header[b"content-length"]))
        posted = urllib.request.Request(f"http://{ca.server}/{ca.path}", request)
        posted.add_header("Content-Type", "application/pkixcmp")
        with urllib.request.urlopen(posted, timeout=30) as response:
            answer = response.read()
        head = f"HTTP/1.0 200 OK\r\nContent-Type: application/pkixcmp\r\nContent-Length: {len(answer)}\r\n"
        connection.sendall(head.encode())
        time.sleep(0.3)  # so that the next is a segment of its own
        connection.sendall(b"\r\n" + answer)

    section = {**ca.options(), "cmp_server": f"127.0.0.1:{tcp_server(serve)}", "cmp_openssl_bin": openssl}
    error, _ = enrol(section)
    assert error and "missing content type" in error
    assert enrol(section, msg_timeout="0", total_timeout="0") == ISSUED
