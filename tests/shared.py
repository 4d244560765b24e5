"""What several test files use: the ways to enrol, poll, run and read, and DER by hand. A test file needs no other."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import logging
import os
import re
import string
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest import mock

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

import cmp_ca_handler
from cmp_ca_handler import CAhandler, main
from conftest import (
    OPENSSL,
    Handlers,
    as_host,
    bundle_certificates,
    csr_pem,
    forget,
)
from demo_ca import DemoCA, read_der, write_der
from host import HANDLER, ROOT

KEY = ec.generate_private_key(ec.SECP256R1())


UTF8, PRINTABLE, TELETEX, IA5, UNIVERSAL, BMP = 0x0C, 0x13, 0x14, 0x16, 0x1C, 0x1E


ENCODINGS = {UNIVERSAL: "utf-32-be", BMP: "utf-16-be", TELETEX: "latin-1"}


# An attribute as (type, string tag, text); a subject is a list of RDNs, an RDN a list of attributes.
Attribute = tuple[str, int, str]


Subject = list[list[Attribute]]


def oid(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER in DER."""
    first, second, *rest = map(int, dotted.split("."))
    content = b""
    for arc in (first * 40 + second, *rest):
        octets = [arc & 0x7F]
        while arc := arc >> 7:
            octets.insert(0, arc & 0x7F | 0x80)
        content += bytes(octets)
    return write_der(0x06, content)


def name_der(subject: Subject) -> bytes:
    """A distinguished name in DER: RDNs in order, the attributes of each sorted as X.690, 11.6 has it."""
    rdns = b""
    for rdn in subject:
        pairs = [
            write_der(0x30, oid(kind) + write_der(tag, text.encode(ENCODINGS.get(tag, "utf-8"))))
            for kind, tag, text in rdn
        ]
        rdns += write_der(0x31, b"".join(sorted(pairs)))
    return write_der(0x30, rdns)


def extension_der(extension: x509.ExtensionType, critical: bool = False) -> bytes:
    """An Extension in DER."""
    flag = write_der(0x01, b"\xff") if critical else b""
    return write_der(0x30, oid(extension.oid.dotted_string) + flag + write_der(0x04, extension.public_bytes()))


def base64url(der: bytes) -> str:
    return base64.urlsafe_b64encode(der).decode().rstrip("=")


class Asked(NamedTuple):
    """What a request asks for, and how it proves possession of the key."""

    subject: bytes
    public_key: bytes
    extensions: list[bytes]
    popo_tag: int = 0x80  # raVerified, RFC 4211 section 4


def in_csr(der: bytes) -> Asked:
    """CertificationRequestInfo, RFC 2986 section 4.1."""
    _, name, key, *attributes = read_der(der).parts()[0].parts()
    requests = [attribute.parts()[1] for attribute in attributes[0].parts()] if attributes else []
    extensions = requests[0].parts()[0].parts() if requests else []
    return Asked(name.whole, key.content, [extension.whole for extension in extensions])


def on_wire(path: Path) -> Asked:
    """CertTemplate, RFC 4211 section 5, of a saved message."""
    message = read_der(path.read_bytes())
    request, popo = read_der(message.parts()[1].content).parts()[0].parts()
    fields = {field.tag: field for field in request.parts()[1].parts()}
    subject = fields[0xA5].content if 0xA5 in fields else write_der(0x30, b"")
    extensions = fields[0xA9].parts() if 0xA9 in fields else []
    return Asked(subject, fields[0xA6].content, [extension.whole for extension in extensions], popo.tag)


def save_request(ca: DemoCA, path: Path) -> None:
    """Let the CA save the first request that it gets, to a file that is not there yet."""
    answer = ca.answer

    def saving(data: bytes) -> bytes:
        if not path.exists():
            path.write_bytes(data)
        return answer(data)

    ca.answer = saving  # type: ignore[method-assign]


class Wire:
    """Sends CSRs to a CA that says no, and returns what it got."""

    def __init__(self, ca: DemoCA, handlers: Handlers, directory: Path) -> None:
        self.ca, self.handlers, self.saved = ca, handlers, directory / "ir.der"
        ca.reject = "badRequest"  # spares the issuing
        save_request(ca, self.saved)

    def handler(self, **changes: str | None) -> CAhandler:
        # the RA's certificate has a subjectAltName of its own, which openssl would like to add
        kinds = "DNS, IP, email, URI, otherName, dirName, RID"
        changes = {"san_types": kinds, **changes}
        return self.handlers(self.ca.options("certificate"), **changes)

    def __call__(self, handler: CAhandler, csr: str) -> Asked:
        self.saved.unlink(missing_ok=True)
        error = handler.enroll(csr)[0]
        assert error and "rejected the request: bad" in error
        assert self.handlers.left() == []
        return on_wire(self.saved)


@pytest.fixture
def wire(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> Wire:
    return Wire(ca, handlers, tmp_path)


DNS = extension_der(x509.SubjectAlternativeName([x509.DNSName("a.example"), x509.DNSName("b.example")]))


CN, O, OU, C = "2.5.4.3", "2.5.4.10", "2.5.4.11", "2.5.4.6"  # noqa: E741


UNNAMED = "1.2.3.4.5"  # openssl has no name for it


texts = st.one_of(
    st.text(string.ascii_letters + " /+,=\\\"'#;<>-\n", max_size=12),
    st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xFFFF), max_size=12),
)


KINDS = [CN, O, OU, C, UNNAMED, "2.5.4.5", "2.5.4.97", "1.2.840.113549.1.9.1", "0.9.2342.19200300.100.1.1"]


@st.composite
def attributes(draw: st.DrawFn) -> Attribute:
    """An attribute of any type, with a text that its string type can hold."""
    tag = draw(st.sampled_from([UTF8, UTF8, PRINTABLE, IA5, BMP, UNIVERSAL]))
    if tag == PRINTABLE:
        text = draw(st.text(string.ascii_letters + string.digits + " '()+,-./:=?", min_size=1, max_size=12))
    elif tag == IA5:
        text = draw(st.text(string.printable, max_size=12))
    else:
        text = draw(texts)
    return draw(st.sampled_from(KINDS)), tag, text


ISSUERS = ["CN=Demo Issuing CA,O=Demo,C=DE", "CN=Demo Root CA,O=Demo,C=DE"]


def script(path: Path, body: str) -> str:
    """An executable shell script; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(path)


def recorder(path: Path, log: Path) -> str:
    """An openssl that writes the arguments of each call to a line of `log`."""
    return script(path, f'echo "$*" >>{log}\nexec {OPENSSL} "$@"\n')


def enrolled(handler: CAhandler, csr: str) -> list[x509.Certificate]:
    """The bundle of an enrolment that must succeed, leaf first."""
    error, bundle, raw, identifier = handler.enroll(csr)
    assert (error, identifier) == (None, None)
    assert bundle and raw
    certificates = bundle_certificates(bundle)
    assert raw == base64.b64encode(certificates[0].public_bytes(serialization.Encoding.DER)).decode()
    return certificates


SECTION = {"cmp_server": "127.0.0.1:1", "cmp_ref": "1234", "cmp_secret": "hush"}


# Waiting that is long enough for an answer, and short for the tests.
SHORT = {"msg_timeout": "2", "total_timeout": "2"}


# poll() as the host's poller calls it, in a process of its own: the result goes to standard output as JSON.
POLLER = """
import json, sys, cmp_ca_handler
cmp_ca_handler.HELPERS = ()
with cmp_ca_handler.CAhandler() as handler:
    handler.ask_always = True
    json.dump(handler.poll("name", *sys.argv[1:]), sys.stdout)
"""


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Another Python process that can import the handler. It takes its configuration from the environment, as we do."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def begin(handler: CAhandler, csr: str) -> str:
    """Enrol where the CA lets it wait: the poll identifier."""
    error, bundle, certificate, identifier = handler.enroll(as_host(csr))
    assert (error, bundle, certificate) == (None, None, None)
    assert identifier
    return identifier


def hold(ca: DemoCA) -> DemoCA:
    """The CA that lets requests wait until they are approved, and asks not to be bothered for an hour."""
    ca.hold, ca.check_after = True, 3600
    return ca


def check_issued(result: Any, csr: str) -> None:
    """The result of poll() is a certificate for the key of this CSR, with its chain."""
    error, bundle, certificate, _, rejected = result
    assert (error, rejected) == (None, False)
    leaf, *issuers = bundle_certificates(bundle)
    assert leaf == x509.load_der_x509_certificate(base64.b64decode(certificate))
    assert leaf.public_key() == x509.load_pem_x509_csr(csr.encode()).public_key()
    assert "CN=Demo Issuing CA" in issuers[0].subject.rfc4514_string()


def requests(ca: DemoCA) -> Counter[str]:
    """How many of each request the CA has answered."""
    return Counter(message.request for message in ca.messages)


def version(openssl: str) -> tuple[int, int]:
    """The first two numbers of an openssl's version."""
    words = subprocess.run([openssl, "version"], check=True, capture_output=True, text=True).stdout.split()
    major, minor, *_ = words[1].split(".")
    return int(major), int(minor)


def clock_jumps(monkeypatch: pytest.MonkeyPatch, paused: Callable[[], bool]) -> None:
    """Let the handler's clocks show an hour more from when that is true on, as after a pause of the machine."""
    jumped: list[bool] = []

    def jumping(clock: Callable[[], float]) -> Callable[[], float]:
        def now() -> float:
            if not jumped and paused():
                jumped.append(True)
            return clock() + 3600 * len(jumped)

        return now

    clocks = {"monotonic": jumping(time.monotonic), "time": jumping(time.time)}
    monkeypatch.setattr(cmp_ca_handler, "time", types.SimpleNamespace(**{**vars(time), **clocks}))


def processes(text: str | Path) -> list[int]:
    """The processes with this text in their arguments, but for our own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes()
        except OSError:  # it has ended
            continue
        if os.fsencode(text) in arguments and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


ENROLLER = POLLER.replace('poll("name", *', "enroll(*")


def sweep(handlers: Handlers, ca: DemoCA) -> None:
    """Enrol in a process of its own, as any later enrolment: its sweeping is what is of interest."""
    ca.hold = False
    process = python(ENROLLER, as_host(csr_pem(["later.example"])))
    out, err = process.communicate(timeout=60)
    assert json.loads(out)[0] is None, err


def age(path: Path, seconds: float) -> None:
    """Let a file or directory look older, or newer, than it is."""
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def unlocked(transaction: Path) -> bool:
    """Whether nobody holds it. A process that ends has no command line any more, but still its files for a moment."""
    with next(transaction / name for name in ("waiting", "enrolling") if (transaction / name).exists()).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(file, fcntl.LOCK_UN)  # at once, also where another thread forks in this moment
    return True


def run(
    *arguments: str, stdin: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the handler's file without the packages beside the tests: it stands alone."""
    clean = {key: value for key, value in os.environ.items() if key != "ACME_SRV_CONFIGFILE"}
    command = [sys.executable, "-S", str(HANDLER), *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=cwd, env={**clean, **environment}, timeout=60
    )


def called(
    *arguments: str, stdin: str = "", cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The same in this process, which knows what a new one knows. That is much faster."""
    log, out, err = logging.getLogger("cmp_ca_handler"), io.StringIO(), io.StringIO()
    level = log.level
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        forget(patch)
        os.environ.pop("ACME_SRV_CONFIGFILE", None)
        os.environ.update(environment)
        patch.setattr(log, "handlers", [])
        patch.setattr(log, "propagate", False)  # and back again
        patch.setattr(cmp_ca_handler, "HELPERS", ())
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        if cwd:
            patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(arguments)
            except SystemExit as end:  # of argparse
                code = int(end.code or 0)
            finally:
                log.setLevel(level)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def pairs(line: str) -> dict[str, str]:
    """What stands behind the colon of a line: `key=value`, in quotes where it is more than one word."""
    rest = line.partition(": ")[2]
    pattern = r'(\w+)=(?:"((?:[^"\\]|\\.)*)"|([^\s"]+))(?: |$)'
    found = {m[1]: re.sub(r"\\(.)", r"\1", m[2]) if m[3] is None else m[3] for m in re.finditer(pattern, rest)}
    assert re.sub(pattern, "", rest) == ""
    return found


def findings(handlers: Handlers, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    """The errors and the warnings of `check`, for the configuration of the last handler."""
    main(["--config", str(handlers.config), "check"])
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    errors, warnings = ([text for kind, _, text in lines if kind == which] for which in ("error", "warning"))
    return errors, warnings


class Desk:
    """An administrator's directory with a configuration in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def configure(self, section: dict[str, str], **changes: str | None) -> None:
        options: dict[str, str | None] = {"cmp_openssl_bin": OPENSSL, "cmp_tmp_dir": "work", **section}
        options.update({f"cmp_{key}": value for key, value in changes.items()})
        lines = [f"{key}: {value}" for key, value in options.items() if value is not None]
        (self.directory / "acme_srv.cfg").write_text("\n".join(["[CAhandler]", *lines, ""]))

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return called("--config", "acme_srv.cfg", *arguments, cwd=self.directory, **environment)


def knows_profiles(openssl: str) -> bool:
    """OpenSSL 3.3 and later."""
    return " -profile " in subprocess.run([openssl, "cmp", "-help"], capture_output=True, text=True).stderr


def requested_profile(request: Path) -> str:
    """certProfile (RFC 9483, section 4.1, id-it 21) in the header of a CMP message; empty if there is none."""
    oid = bytes.fromhex("06082b06010505070415")
    _, _, value = request.read_bytes().partition(oid)
    if not value:
        return ""
    assert (value[0], value[2]) == (0x30, 0x0C)  # SEQUENCE OF UTF8String, both short
    return value[4 : 4 + value[3]].decode()


BY_PATH = {"handler_module": str(HANDLER)}


def check_chain(chain: Path, ca: DemoCA) -> x509.Certificate:
    """The leaf of what a client has saved, once order and signatures of the chain are checked."""
    command = [OPENSSL, "verify", "-CAfile", str(ca.directory / "root.pem"), "-untrusted", str(chain), str(chain)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{chain}: OK\n"), result.stderr
    leaf, issuer, *_ = bundle_certificates(chain.read_text())
    leaf.verify_directly_issued_by(issuer)
    return leaf


# As in the old host: the file beside the helper unless ACME_SRV_CONFIGFILE names another, the case of the keys kept.
LOAD_CONFIG = """
import configparser, os

def load_config(logger=None, mfilter=None, cfg_file=None):
    config = configparser.ConfigParser(interpolation=None)
    config.optionxform = str
    config.read(cfg_file or os.path.join(os.path.dirname(__file__), "acme_srv.cfg"), encoding="utf8")
    return config
"""


# --- Hostile bytes

# Cases of the long run, for all of the tests together; without it, the short one.
LONG = int(os.environ.get("CMP_FUZZ_CASES", "0"))


def cases(short: int, share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """How many cases: `short` in every run, `share` of a long one. The short run is the same every time."""
    return settings(
        max_examples=int(LONG * share) or short,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )


class Change(NamedTuple):
    """One change to a string of bytes; positions are fractions of its length."""

    kind: str
    start: float
    size: int
    data: bytes

    def apply(self, old: bytes) -> bytes:
        """The changed bytes."""
        start = int(self.start * len(old))
        end = min(start + self.size, len(old))
        if self.kind == "flip" and old:
            start = min(start, len(old) - 1)
            return old[:start] + bytes([old[start] ^ 1 << self.size % 8]) + old[start + 1 :]
        parts = {"cut": old[:start], "delete": old[:start] + old[end:], "insert": old[:start] + self.data + old[start:]}
        parts.update(
            {"repeat": old[:end] + old[start:], "set": old[:start] + self.data + old[start + len(self.data) :]}
        )
        return parts.get(self.kind, old)


INTERESTING = [
    b"\0",
    b"\xff",
    b"\x80",
    b"\x84\xff\xff\xff\xff",
    b"\x30\x80",
    b"\x1f\x1f",
    b"\x0d\x0a",
    b"\x30\x00",
    b"A" * 9000,
]


CHANGES = st.lists(
    st.builds(
        Change,
        st.sampled_from(["flip", "flip", "cut", "delete", "insert", "repeat", "set"]),
        st.floats(0, 0.9999),
        st.integers(1, 300),
        st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def changed(old: bytes, changes: Sequence[Change]) -> bytes:
    """Every change, one after the other."""
    for change in changes:
        old = change.apply(old)
    return old
