"""The demo and the example configurations do what they say."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmp_ca_handler import CAhandler
from conftest import Handlers, as_host, bundle_certificates, csr_pem
from demo_ca import DemoCA, Work
from host import ROOT

CSR = csr_pem(["a.example"])
CONFIGURATIONS = {
    "acme_srv.cfg": ("cmp_secret", "127.0.0.1:8080"),
    "acme_srv_certificate.cfg": ("cmp_cert", "127.0.0.1:8080"),
    "acme_srv_tls.cfg": ("cmp_tls_used", "127.0.0.1:8443"),
}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["-secret env:", "cmp_secret: demo-secret", 'INFO certificate issued: subject="CN=www.example.com"']),
        (
            ["--pending"],
            ["no error, no certificate, rejected False", "approved: 1", "certConf", "the bundle: ['issued']"],
        ),
    ],
    ids=["enroll", "pending"],
)
def test_the_demo_tells_the_whole_story(arguments: list[str], said: list[str], tmp_path: Path) -> None:
    """One command, from any directory: the whole story in 80 columns, and nothing left behind."""
    files = ["cmp_ca_handler.py", "examples/demo.py", "examples/demo_ca.py"]
    (tmp_path / "project" / "examples").mkdir(parents=True)
    for file in files:  # a copy, for other tests may leave their caches in the tree itself
        shutil.copy(ROOT / file, tmp_path / "project" / file)
    (tmp_path / "tmp").mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", tmp_path / "project" / "examples" / "demo.py", *arguments],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, "")
    for words in [*said, "issued by CN=Demo Issuing CA", "issued by CN=Demo Root CA", "bundle.pem: OK"]:
        assert words in result.stdout
    # the secret stands in the configuration and nowhere else
    assert result.stdout.count("demo-secret") == 1
    # save for the place where the handler happens to lie
    assert [line for line in result.stdout.splitlines() if len(line) > 80 and "handler_module" not in line] == []
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == sorted(["project", "project/examples", *(f"project/{file}" for file in files), "tmp"])


def test_the_demo_ends_quietly_for_a_reader_who_has_seen_enough(tmp_path: Path) -> None:
    """`demo.py | head`."""
    command: list[str | Path] = [sys.executable, "-B", ROOT / "examples" / "demo.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_example_configuration_enrols(
    name: str,
    make_ca: Callable[..., DemoCA],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Enrols as it stands; only the port and the demo CA's directory are others."""
    key, address = CONFIGURATIONS[name]
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    ca = make_ca(tls="tls" in name)
    assert f"--port {address.rpartition(':')[2]}" in text, "the file says how to start its demo CA"
    assert f"cmp_server: {address}\n" in text and re.search(f"^{key}: ", text, re.M)
    shutil.copytree(ca.directory, tmp_path / "demo-ca")
    (tmp_path / "acme_srv.cfg").write_text(text.replace(address, ca.server), encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # the paths in it are relative
    monkeypatch.setenv("ACME_SRV_CONFIGFILE", "acme_srv.cfg")
    with caplog.at_level(logging.INFO, "example"), CAhandler(False, logging.getLogger("example")) as handler:
        assert handler.handler_check() is None
        error, bundle, _, _ = handler.enroll(as_host(csr_pem(["a.example"])))
    assert error is None and bundle
    assert len(bundle_certificates(bundle)) == 3
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert f"ill contact http{'s' * ca.tls}://" in caplog.text  # OpenSSL 4.0 begins with a capital letter
    assert os.listdir("cmp-transactions") == []


def test_configurations_are_complete() -> None:
    """What acme2certifier needs beside our section is there, once, and nothing in it opens a door."""
    from acme2certifier.acme_srv.helper import load_config

    for name in CONFIGURATIONS:
        config = load_config(logging.getLogger("example"), cfg_file=str(ROOT / "examples" / name))
        wanted = {"CAhandler", "DBhandler", "Certificate", "Challenge", "Nonce", "Order"}
        assert set(config.sections()) == wanted
        assert not config.getboolean("Challenge", "challenge_validation_disable")
        assert not config.getboolean("Nonce", "nonce_check_disable")
        # a client's request must outlast the handler's time-out, else every slow enrolment looks pending
        assert config.getint("Certificate", "enrollment_timeout") > config.getint("CAhandler", "cmp_total_timeout")


class WatchedCA(DemoCA):
    """The demo CA; it writes down in which state each answer leaves the transaction."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.states: list[str] = []
        self.requests: list[bytes] = []

    def _answer(self, request: int, work: Work) -> bytes:
        answer = super()._answer(request, work)
        line = f"{work.envelope.name}: {type(work.transaction.state).__name__}"
        if line not in self.states[-1:]:  # a client polls as often as it likes
            self.states.append(line)
        self.requests.append(work.envelope.message)
        return answer


@pytest.fixture
def watched(ca_directory: Path, tmp_path: Path) -> Iterator[WatchedCA]:
    shutil.copytree(ca_directory, tmp_path / "watched")
    ca = WatchedCA(tmp_path / "watched")
    with ca:
        yield ca


HELD, POLLS = {"hold": True, "check_after": 3600}, {"polls": 3, "check_after": 0}
WAITING, ISSUED = ["ir: Waiting", "pollReq: Waiting"], ["pollReq: Issued", "certConf: Issued"]
STATES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "at once": ({}, "", ["ir: Issued", "certConf: Issued"]),
    "rejected": ({"reject": "badRequest"}, "", ["ir: Decided"]),
    "third poll": (POLLS, "", WAITING + ISSUED),
    "third poll rejects": ({**POLLS, "reject": "badRequest"}, "", [*WAITING, "pollReq: Decided"]),
    "approved": (HELD, "approve", WAITING + ISSUED),
    "approved in spite of reject": ({**HELD, "reject": "badRequest"}, "approve", WAITING + ISSUED),
    "refused": (HELD, "refuse", [*WAITING, "pollReq: Decided"]),
}


@pytest.mark.parametrize("case", STATES)
def test_the_demo_ca_passes_through_its_states_and_keeps_nothing(
    case: str, watched: WatchedCA, handlers: Handlers
) -> None:
    """From New to the end; and at the end neither a transaction nor a request at the desk is left."""
    settings, verdict, states = STATES[case]
    for name, value in settings.items():
        setattr(watched, name, value)
    handler = handlers(watched.options())
    error, bundle, _, identifier = handler.enroll(CSR)
    if verdict:
        assert len(watched.pending()) == 1 and getattr(watched, verdict)("all") == 1
        assert watched.pending() == [] and getattr(watched, verdict)("all") == 0
    while not (error or bundle):
        assert identifier and len(watched.requests) < 9
        error, bundle, _, _, _ = handler.poll("x", identifier, CSR)
    assert watched.states == states
    assert bool(bundle) == (states[-1] == "certConf: Issued") == (not error)
    assert watched._transactions == {} and os.listdir(watched.directory / "held") == []


def test_a_client_that_begins_again_waits_once(watched: WatchedCA, handlers: Handlers) -> None:
    """OpenSSL takes the first request for aborted: nobody can be given its certificate, so it leaves the desk."""
    watched.hold, watched.check_after = True, 3600
    handlers(watched.options()).enroll(CSR)
    first = watched.pending()
    watched.answer(watched.requests[0])
    second = watched.pending()
    assert len(first) == len(second) == 1 and first != second
    watched.forget()
    assert watched.pending() == [] and os.listdir(watched.directory / "held") == []
