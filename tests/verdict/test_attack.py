"""An attacker gains nothing: what a review of the handler found, each with the attack itself."""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import tracemalloc
import types
from collections import Counter
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import cmp_ca_handler
from cmp_ca_handler import CAhandler
from conftest import (
    OPENSSL,
    Handlers,
    as_host,
    binaries,
    bundle_certificates,
    csr_pem,
    every_binary,
    needs_root,
    wait_until,
)
from demo_ca import DemoCA, read_der, write_der
from host import ROOT
from proxy import KEY as PROXY_KEY
from proxy import (
    Forward,
    Proxy,
    TcpServer,
    cert_response,
    error_body,
    forge,
    message_parts,
    name,
    nested,
    poll_rep,
    protected,
    sender_of,
    signed,
    spoilt,
    status_info,
    stranger,
    with_body,
    with_certificates,
)
from shared import (
    ENROLLER,
    SHORT,
    age,
    begin,
    check_issued,
    extension_der,
    hold,
    knows_profiles,
    processes,
    python,
    requested_profile,
    requests,
    run,
    save_request,
)

KEY = ec.generate_private_key(ec.SECP256R1())
OU = x509.NameOID.ORGANIZATIONAL_UNIT_NAME
ACCEPTED, REJECTED = bytes.fromhex("020100"), bytes.fromhex("020102")  # PKIStatus, and 0 as certReqId
RP, PKICONF = nested(ACCEPTED, 0xAC, 0x30, 0x30, 0x30), nested(b"", 0xB3, 0x05)
ERROR = nested(REJECTED, 0xB7, 0x30, 0x30)


def issuing_ca(ca: DemoCA) -> x509.Certificate:
    return x509.load_pem_x509_certificates((ca.directory / "sub.pem").read_bytes())[0]


def enroll(handler: CAhandler, csr: str = "") -> Any:
    return handler.enroll(as_host(csr or csr_pem(["a.example"])))


class Waiting(NamedTuple):
    """An enrolment that the CA has not decided, through the proxy."""

    ca: DemoCA
    handler: CAhandler
    csr: str
    identifier: str

    def poll(self, csr: str = "") -> Any:
        return self.handler.poll("name", self.identifier, csr)

    def fails(self, csr: str = "") -> str:
        """The error of a poll that ends nothing."""
        error, *rest = self.poll(csr)
        assert rest == [None, None, self.identifier, False]
        return str(error)

    def finish(self) -> None:
        self.ca.approve("all")
        check_issued(self.poll(), self.csr)
        assert requests(self.ca)["ir"] == 1


Wait = Callable[..., Waiting]


@pytest.fixture
def wait(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> Wait:
    """`wait()` is a waiting enrolment; `check_after` and the time-outs are such that it ends at once, unless given."""

    def start(check_after: int = 3600, total_timeout: str = "2") -> Waiting:
        hold(ca).check_after = check_after
        handler = handlers(ca.options(), server=proxy.server, msg_timeout="2", total_timeout=total_timeout)
        csr = csr_pem(["a.example"])
        return Waiting(ca, handler, csr, begin(handler, csr))

    return start


# --- The host's process


TRIES = 10  # for openssl's end may be seen by the one who waits for it, or by the other
NO_STATUS = f"""
import json, os, signal, sys, threading, time, cmp_ca_handler
cmp_ca_handler.HELPERS = ()
def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
else:
    threading.Thread(target=reap, daemon=True).start()
with cmp_ca_handler.CAhandler() as handler:
    json.dump([getattr(handler, sys.argv[2])(sys.argv[3]) for _ in range({TRIES})], sys.stdout)
"""


@pytest.mark.parametrize("how", ["ignored", "reaped"])
def test_an_exit_status_that_gets_lost_counts_as_a_failure(how: str, ca: DemoCA, handlers: Handlers) -> None:
    """Python's subprocess calls it 0, which would be a yes."""
    certificate = str(enroll(handlers(ca.options()))[2])
    handlers(ca.options(), secret="wrong")
    out, err = python(NO_STATUS, how, "revoke", certificate).communicate(timeout=60)
    assert [answer[0] for answer in json.loads(out)] == [500] * TRIES, err
    assert not any(map(ca.is_revoked, ca.issued()))
    if how == "ignored":
        ca.messages.clear()
        handlers(ca.options())
        out, err = python(NO_STATUS, how, "enroll", as_host(csr_pem(["b.example"]))).communicate(timeout=60)
        assert all("SIGCHLD" in answer[0] for answer in json.loads(out)), err
        assert ca.messages == []


def test_lost_exit_status_is_no_yes() -> None:
    """`openssl verify` says nothing else that counts: 0 would make an issuer of anybody."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        os.waitpid(process.pid, 0)
        assert cmp_ca_handler._exit_code(process) == cmp_ca_handler.LOST != 0


FORKING = """
import json, logging, os, sys, cmp_ca_handler
cmp_ca_handler.HELPERS = ()
children = []
class Fork(logging.Handler):
    def emit(self, record):
        if record.getMessage().startswith("running ") and not children:
            children.append(os.fork())
            if not children[0]:
                sys.stdin.read()
                os._exit(0)
logger = logging.getLogger("forking")
logger.addHandler(Fork())
logger.setLevel(logging.DEBUG)
with cmp_ca_handler.CAhandler(False, logger) as handler:
    print(json.dumps([*children, *handler.enroll(sys.argv[1]), *children]), flush=True)
"""


def test_a_host_that_forks_during_an_enrolment_does_not_block_its_poll(ca: DemoCA, handlers: Handlers) -> None:
    """The child inherits the lock."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    command = [sys.executable, "-c", FORKING, as_host(csr)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        error, _, _, identifier, child = json.loads(process.stdout.readline())
        assert error is None
        ca.approve("all")
        result = handler.poll("name", identifier, "")
        os.kill(child, 0)  # it is still there
    check_issued(result, csr)


def test_the_system_configuration_of_openssl_counts_only_if_named(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, wait: Wait, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its section `cmp` counts only for who names it: here it lets an unprotected error message reject."""
    (tmp_path / "openssl.cnf").write_text("[cmp]\nunprotected_errors = 1\n")
    monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "openssl.cnf"))
    waiting = wait()
    proxy.spoil = lambda _, forward: with_body(forward(), ERROR)
    assert "missing protection" in waiting.fails()
    assert handlers.left() == [waiting.identifier]
    for asked_for in ({"cmp_section": "cmp"}, {"cmp_config": str(tmp_path / "openssl.cnf")}):
        error = enroll(handlers({**ca.options(), **asked_for}, server=proxy.server))[0]
        assert "an unverified answer says: rejection" in str(error)


def test_directories_that_are_made_are_for_their_owner_alone(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """A cmp_tmp_dir with three levels to be made, and umask 0: each is for its owner alone."""
    handler = handlers(ca.options(), tmp_dir=str(tmp_path / "a/b/c"))
    before = os.umask(0)
    try:
        assert enroll(handler)[0] is None
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / path).stat().st_mode) for path in ("a", "a/b", "a/b/c")] == [0o700] * 3


@pytest.mark.parametrize("whose", ["another user", "every local user"])
def test_a_parent_directory_of_others_is_refused(
    whose: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can rename in it can put another key into a request."""
    parent = tmp_path / "parent"
    (parent / "work").mkdir(parents=True)
    handler = handlers(ca.options(), tmp_dir=str(parent / "work"))
    parent.chmod(0o1777)  # as /tmp
    assert handler.handler_check() is None
    if whose == "every local user":
        parent.chmod(0o777)
    elif os.geteuid() == 0:
        os.chown(parent, 65534, 65534)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)  # a fake: only root can give a directory away
    for error in (handler.handler_check(), enroll(handler)[0]):
        assert re.search(f"cmp_tmp_dir.*{whose}", str(error))
    assert ca.messages == []


def test_a_directory_where_everybody_can_put_something_is_refused(
    ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """cmp_tmp_dir: /tmp itself. A link that another user puts there led the sweep to files of acme2certifier's user."""
    shared, precious = tmp_path / "tmp", tmp_path / "precious"
    shared.mkdir()
    shared.chmod(0o1777)
    precious.mkdir()
    (precious / "ra.key").touch()
    age(precious, 7200)
    (shared / ("0" * 32)).symlink_to(precious)
    handler = handlers(ca.options(), tmp_dir=str(shared))
    for error in (handler.handler_check(), enroll(handler)[0]):
        assert "every local user can put something there: name a directory of your own in it" in str(error)
    assert (precious / "ra.key").exists() and ca.messages == []


def test_warnings_of_the_log_are_those_of_check(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the log and in `check`."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    handlers(ca.options(), expect_sender=None, **SHORT)
    _, log = python(ENROLLER, as_host(csr_pem(["a.example"]))).communicate(timeout=60)
    check = run("check", ACME_SRV_CONFIGFILE=str(handlers.config)).stdout
    for warning in ("takes the proxy from http_proxy", "cmp_trusted without cmp_expect_sender or cmp_srvcert"):
        assert warning in log
        assert warning in check


def test_an_openssl_of_endless_output_is_ended(
    ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake: openssl itself ends."""
    openssl = tmp_path / "openssl"
    noise = f"yes {handlers.work}"
    openssl.write_text(f'#!/bin/sh\n[ "$1$2" = cmp-cmd ] || exec {OPENSSL} "$@"\n{noise} & {noise} & exec {noise}\n')
    openssl.chmod(0o700)
    monkeypatch.setattr(cmp_ca_handler, "GRACE", 0)
    handler = handlers(ca.options(), openssl_bin=str(openssl), msg_timeout="1", total_timeout="1")
    assert "did not end in time" in str(enroll(handler)[0])
    wait_until(lambda: not processes(handlers.work), "the end of what it started")


# --- The ACME client


def test_a_csr_within_a_csr_is_not_read(ca: DemoCA, handlers: Handlers) -> None:
    """One text, two CSRs: base64url may spell PEM, and the host, which ignores blanks, reads what is around it."""
    victim = as_host(csr_pem(["victim.example"])).replace("-", "+").replace("_", "/")
    pem = f"-----BEGIN CERTIFICATE REQUEST-----{victim}-----END"
    plain = pem.replace("-", "+").replace(" ", "")
    inner = base64.b64decode(plain + "A" * (-len(plain) % 4))
    for shift in range(3):  # where groups of three octets begin
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"A" * shift + inner)
        outer = as_host(csr_pem(["mine.example"], extensions=[extension]))
        text = outer.replace("-", "+").replace("_", "/").replace(plain, pem)
        if pem in text:
            break
    assert pem in text
    leaf = bundle_certificates(str(handlers(ca.options()).enroll(text)[1]))[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["mine.example"]


def test_an_explicit_curve_is_refused(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """With a generator of one's own, the private key of any public point is known."""
    options = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -pkeyopt ec_param_enc:explicit -nodes -keyout key.pem"
    command = [OPENSSL, "req", "-new", "-subj", "/CN=a.example", *options.split()]
    csr = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "its key has explicit parameters" in str(enroll(handlers(ca.options()), csr)[0])
    assert ca.messages == []


@pytest.mark.parametrize("what", ["serial", "object identifier"])
def test_a_certificate_to_revoke_does_not_flood_the_log(
    what: str, ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A certificate to revoke whose serial number has 60,000 bytes, or whose issuer is endless: short log lines."""
    tbs, *rest = read_der(issuing_ca(ca).public_bytes(serialization.Encoding.DER)).parts()
    fields = [field.whole for field in tbs.parts()]
    if what == "serial":
        fields[1] = write_der(0x02, b"\x01" * 60_000)
    else:
        value = write_der(0x06, b"\xff" * 100 + b"\x7f") + write_der(0x0C, b"x")
        fields[3] = nested(value, 0x30, 0x31, 0x30)
    changed = write_der(0x30, b"".join([nested(b"".join(fields), 0x30), *(part.whole for part in rest)]))
    with caplog.at_level(logging.INFO):
        handlers(ca.options()).revoke(base64.b64encode(changed).decode(), "1")
    lines = [record.getMessage() for record in caplog.records if "serial=" in record.getMessage()]
    assert lines
    assert not any(len(line) > 1000 or re.search("[0-9.]{100}", line) for line in lines)


def test_a_profile_with_keys_of_the_handler_stops_no_poll(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake helper: it sets attributes as the host's did before it refused to set some of these."""
    keys = "logger poll section config_error debug _helper _config".split()
    section = {**hold(ca).options(), "cmp_openssl_bin": OPENSSL, "cmp_tmp_dir": str(handlers.work)}
    section.update(cmp_msg_timeout="2", cmp_total_timeout="2")

    def check(_: object, cahandler: object, *__: object) -> None:
        for key in keys:
            if hasattr(cahandler, key):
                setattr(cahandler, key, "x")

    helper = types.ModuleType("helper")
    vars(helper).update(load_config=lambda *_: {"CAhandler": section}, eab_profile_header_info_check=check)
    monkeypatch.setitem(sys.modules, "old_helper", helper)
    monkeypatch.setattr(cmp_ca_handler, "HELPERS", ("old_helper",))
    handler = handlers({})
    assert handler.poll("name", begin(handler, csr_pem(["a.example"])), "")[0] is None


@every_binary
def test_a_profile_named_off_is_no_switch(openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """A cmp_profile `off` is the name of a profile, and no switch; before OpenSSL 3.3 it is an error."""
    request = tmp_path / "request.der"
    save_request(ca, request)
    error = enroll(handlers(ca.options(), openssl_bin=openssl, profile="off"))[0]
    if knows_profiles(openssl):
        assert requested_profile(request) == "off"
    else:
        assert "needs OpenSSL 3.3" in str(error)


# --- A man in the middle


@pytest.mark.parametrize("configured", [True, False])
def test_a_forged_issuer_is_passed_over(
    configured: bool, ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the name and the key identifier of the issuer, and stands in extraCerts, which nothing protects."""
    issuer = issuing_ca(ca)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    root = name("Evil Root")
    forged = [forge(KEY, issuer.subject, root, identifier), forge(KEY, root, root)]
    proxy.spoil = lambda _, forward: with_certificates(forward(), forged)
    untrusted = str(ca.directory / "sub.pem") if configured else None
    bundle = enroll(handlers(ca.options(), server=proxy.server, untrusted=untrusted))[1]
    issuers = bundle_certificates(bundle)[1:]
    assert issuers[:1] == [issuer] * configured
    assert "Evil" not in str(issuers)
    assert ("passed over a certificate" in caplog.text) is not configured


def test_a_ladder_of_names_is_not_in_the_chain(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """Thirty forged certificates in cmp_untrusted, upward from the issuing CA's name: none is in the chain."""
    ladder = [issuing_ca(ca).subject, *(name(f"rung {number}") for number in range(30))]
    certificates = [x509.load_der_x509_certificate(forge(KEY, *pair)) for pair in zip(ladder, ladder[1:])]
    pem = b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)
    (tmp_path / "ladder.pem").write_bytes(pem)
    handler = handlers(ca.options(), untrusted=str(tmp_path / "ladder.pem"))
    # None of them has signed anything of the demo CA's, whatever they are called.
    bundle = bundle_certificates(str(enroll(handler)[1]))
    assert [certificate.subject for certificate in bundle[1:]] == [issuing_ca(ca).subject, issuing_ca(ca).issuer]


def test_a_ca_that_wants_no_pause_is_asked_a_few_times_only(ca: DemoCA, handlers: Handlers) -> None:
    """checkAfter 0 would let openssl poll a thousand times a second: it is asked some times, and the order waits."""
    ca.hold, ca.check_after = True, 0
    csr = csr_pem(["a.example"])
    handler = handlers(ca.options())
    identifier = begin(handler, csr)
    assert requests(ca) == {"ir": 1, "pollReq": requests(ca)["pollReq"]}
    assert len(ca.messages) <= 15
    for _ in range(3):
        ca.messages.clear()
        assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
        assert 1 <= len(ca.messages) == requests(ca)["pollReq"] <= 4
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert handlers.left() == []


def test_a_forged_second_answer_leaves_the_order_waiting(proxy: Proxy, wait: Wait) -> None:
    """The first one, that the CA has not decided, was its own: what it says stays true."""
    answers: list[bytes] = []

    def spoil(request: str, forward: Forward) -> bytes:
        if not answers:
            answers.append(forward())
            return answers[0]
        return spoilt("unprotected", answers[0])

    proxy.spoil = spoil
    waiting = wait(1, "10")
    assert len(requests(waiting.ca)) == len(answers) == 1
    proxy.spoil = lambda _, forward: forward()
    waiting.finish()


def test_an_order_killed_with_a_forged_answer_is_issued(ca: DemoCA, handlers: Handlers, wait: Wait) -> None:
    """The files are as they are when the worker dies after openssl has saved the answer and before it refuses it."""
    waiting = wait()
    last = max((handlers.work / waiting.identifier).glob("[0-9]*.der"))
    forged = last.with_name(f"{int(last.stem) + 1:03d}.new")
    forged.write_bytes(spoilt("unprotected", last.read_bytes()))
    assert "missing protection" in waiting.fails()
    waiting.finish()


def test_nothing_of_a_stranger_is_kept(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """Anybody can put large certificates into extraCerts, others each time: they cost memory for a moment only."""

    def large() -> bytes:
        rdns = [x509.RelativeDistinguishedName([x509.NameAttribute(OU, os.urandom(1).hex())]) for _ in range(1500)]
        return forge(KEY, x509.Name(rdns), x509.Name(rdns))

    certificates = [large() for _ in range(6)]
    handler = handlers(ca.options(), server=proxy.server)
    proxy.spoil = lambda _, forward: with_certificates(forward(), [certificates.pop()])
    assert enroll(handler)[0] is None  # what the first order leaves is for all of them
    tracemalloc.start()
    try:
        while certificates:
            assert enroll(handler)[0] is None
        gc.collect()
        found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, cmp_ca_handler.__file__)])
    finally:
        tracemalloc.stop()
    assert sum(trace.size for trace in found.traces) < 100_000


def test_many_texts_and_lines_cost_a_bounded_number_of_calls(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """11,000 texts, and 22,000 lines in a stranger's certificate: the handler's work for them, counted in calls."""
    chain = [stranger("y\n" * 22_000, sender_of(ca, "certificate"))]
    proxy.spoil = lambda _, forward: signed(forward(), error_body(*["x"] * 11_000), PROXY_KEY, chain)
    handler = handlers(ca.options("certificate"), server=proxy.server)
    calls: Counter[str] = Counter()

    def count(frame: types.FrameType, event: str, function: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename == cmp_ca_handler.__file__:
            calls[function.__name__] += 1

    sys.setprofile(count)
    try:
        error = str(enroll(handler)[0])
    finally:
        sys.setprofile(None)
    assert "an unverified answer says: rejection" in error
    assert sum(calls.values()) < 15 * 33_000, calls


# Both took minutes: what is asked at each word, or for each text, went through all of them.
LONG = """
import cmp_ca_handler
cmp_ca_handler._foreign("a-" * 50_000, ["secret"])
texts = [tuple(f"{letter}{number}" for number in range(200_000)) for letter in "ab"]
cmp_ca_handler.Message("", 23, texts=texts[0], details=texts[1]).words([])
"""


def test_long_texts_are_read_in_time() -> None:
    """An answer of 100 kB that nobody has protected: the work for it grows no faster than it does."""
    subprocess.run([sys.executable, "-c", LONG], cwd=ROOT, check=True, timeout=60)


@binaries
def test_names_of_a_tls_server_choose_no_hint(
    openssl: str, ca: DemoCA, handlers: Handlers, tcp_server: TcpServer, tmp_path: Path
) -> None:
    """They hold lines of openssl's that say that it has not even begun, and what the first hint of all looks for."""
    text = "x\nCMP error: cannot set up CMP context\nCMP error: approval\nunknown: 'COMMONNAME' must exist\n"
    (tmp_path / "tls.pem").write_bytes(stranger(text, name("127.0.0.1")).public_bytes(serialization.Encoding.PEM))
    pkcs8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "tls.key").write_bytes(PROXY_KEY.private_bytes(*pkcs8))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.pem", tmp_path / "tls.key")

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as tls:
            tls.recv(65536)

    options = {"server": f"https://127.0.0.1:{tcp_server(serve)}", "tls_used": "True", "openssl_bin": openssl}
    handler = handlers(ca.options(), tls_trusted=str(ca.directory / "root.pem"), **options)
    error = str(enroll(handler)[0])
    assert error.endswith("(cmp_tls_trusted must hold the issuer of the TLS certificate, cmp_tls_host its name)")
    assert handler.failure == "unauthentic"


def test_a_time_beyond_the_calendar_hides_no_order(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """A CA that wants to be asked in the year 146,000,000,000 stops no poll, and hides no order that waits."""
    hold(ca)

    def answer(forward: Forward) -> bytes:
        header, _, _, extra = message_parts(forward())
        return protected(header, header, poll_rep(1 << 62, []), extra)

    proxy.spoil_next("pollReq", answer)
    handler = handlers(ca.options(), server=proxy.server, **SHORT)
    identifier = begin(handler, csr_pem(["a.example"]))
    handler.ask_always = False
    assert "checkafter out of range" in str(handler.poll("name", identifier, "")[0])
    listed = run("--config", str(handlers.config), "list")
    assert (listed.returncode, listed.stdout[:35]) == (0, f"id={identifier}")


@binaries
@pytest.mark.parametrize("waits", [False, True])
def test_a_certificate_in_ber_costs_no_chain(
    waits: bool, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """In extraCerts, with a name that only openssl can read: it does not cost the chain that is configured."""
    data, *rest = read_der(forge(KEY, name("x"), name("x"))).parts()
    fields = [field.whole for field in data.parts()]
    fields[5] = b"\x30\x80" + data.parts()[5].content + b"\0\0"  # the subject, without a length
    certificate = write_der(0x30, write_der(0x30, b"".join(fields)) + b"".join(part.whole for part in rest))
    proxy.spoil = lambda _, forward: with_certificates(forward(), [certificate])
    changes = {"server": proxy.server, "untrusted": str(ca.directory / "sub.pem"), "openssl_bin": openssl}
    ca.hold, handler, csr = waits, handlers(ca.options(), **changes, **SHORT), csr_pem(["a.example"])
    identifier = begin(handler, csr) if waits else ""
    ca.approve("all")
    bundle = handler.poll("name", identifier, "")[1] if waits else enroll(handler, csr)[1]
    assert issuing_ca(ca) in bundle_certificates(str(bundle))[1:]


def test_a_certificate_with_two_lists_of_names_is_refused(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """The last one holds what was asked for. Who reads the first one sees another name."""
    csr = csr_pem(["a.example"], key=KEY)
    (issued, *_) = bundle_certificates(enroll(handlers(ca.options()), csr)[1])
    data, *rest = read_der(issued.public_bytes(serialization.Encoding.DER)).parts()
    *fields, extensions = data.parts()
    first = extension_der(x509.SubjectAlternativeName([x509.DNSName("evil.example")]))
    both = nested(first + read_der(extensions.content).content, 0xA3, 0x30)
    tbs = write_der(0x30, b"".join(field.whole for field in fields) + both)
    certificate = write_der(0x30, tbs + b"".join(part.whole for part in rest))

    bodies = {"ir": cert_response(1, status_info(0, [], b""), certificate), "certConf": PKICONF}

    def spoil(request: str, forward: Forward) -> bytes:
        header, body, _, extra = message_parts(forward())
        return protected(header, header, bodies.get(request, body), extra)

    proxy.spoil = spoil
    error = str(enroll(handlers(ca.options(), server=proxy.server, refuse_changes="True"), csr)[0])
    assert "the CA issued something else than the CSR asked for" in error


def test_a_poll_for_another_order_is_refused(wait: Wait) -> None:
    """A poll with another CSR than the order's is refused; one with its own CSR gets the certificate."""
    waiting = wait()
    waiting.ca.approve("all")
    assert "another CSR" in waiting.fails(as_host(csr_pem(["b.example"])))
    check_issued(waiting.poll(as_host(waiting.csr)), waiting.csr)


@pytest.mark.parametrize("expected", [True, False])
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_cmp_expect_sender_refuses_an_ordinary_certificate(
    authentication: str, expected: bool, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """Only cmp_expect_sender, as in the demo CA's section, says that it is not the CA's. Without it, it is believed."""
    options = {**ca.options(authentication), "cmp_server": proxy.server}
    changes = SHORT if expected else {**SHORT, "expect_sender": None}
    handler = handlers(options, **changes)
    certificate = str(enroll(handler, csr_pem(["victim.example"]))[2])
    chain = bundle_certificates(enroll(handler, csr_pem(["attacker.example"], key=KEY))[1])
    hold(ca)
    identifier = begin(handler, csr_pem(["waits.example"]))
    forged = forge(KEY, name("forged"), name("Evil CA"))
    ip = nested(ACCEPTED + nested(ACCEPTED, 0x30) + nested(forged, 0x30, 0xA0), 0xA1, 0x30, 0x30, 0x30)
    bodies = {"ir": ip, "certConf": PKICONF, "rr": RP, "pollReq": ERROR, "error": PKICONF}
    proxy.spoil = lambda request, forward: signed(forward(), bodies[request], KEY, chain)

    assert (enroll(handler, csr_pem(["b.example"], key=KEY))[0] is None) is not expected
    assert handler.poll("name", identifier, "")[4] is not expected
    if authentication == "secret":
        handler = handlers(options, **changes, secret="wrong")  # so that the CA itself says no
    assert (handler.revoke(certificate, "1")[0] == 200) is not expected


# --- A local user, and what else is not ours


def test_list_shows_nothing_of_what_anybody_can_make(ca: DemoCA, handlers: Handlers) -> None:
    """A directory that others can write to: no name in it reaches the terminal."""
    handler = handlers(ca.options())
    order = handlers.work / "\x1b[2Jforged"
    order.mkdir(parents=True)
    for file in ("waiting", "csr.pem"):
        (order / file).touch()
    handlers.work.chmod(0o777)
    listed = run("--config", str(handlers.config), "list")
    assert (listed.returncode, listed.stdout) == (4, "") and "can be written by every local user" in listed.stderr
    assert str(handler.poll("name", "x", "")[0]) in listed.stderr


def test_list_beside_a_poll_passes_over_half_an_order(ca: DemoCA, handlers: Handlers) -> None:
    """An order that is finished while it is looked at: half of its directory is gone."""
    handlers(ca.options())
    (handlers.work / ("a" * 32)).mkdir(mode=0o700, parents=True)
    (handlers.work / ("a" * 32) / "waiting").touch()
    listed = run("--config", str(handlers.config), "list")
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "", "")


@needs_root
def test_a_configuration_of_somebody_else_is_not_read_unasked(tmp_path: Path) -> None:
    """The tool runs in a directory such as /tmp: the file there says which program is to be run."""
    (tmp_path / "evil").write_text(f"#!/bin/sh\ntouch {tmp_path}/proof\n")
    (tmp_path / "evil").chmod(0o755)
    (tmp_path / "acme_srv.cfg").write_text(f"[CAhandler]\ncmp_openssl_bin: {tmp_path}/evil\n")
    os.chown(tmp_path / "acme_srv.cfg", 65534, 65534)
    checked = run("check", cwd=tmp_path)
    assert checked.returncode == 4 and "acme_srv.cfg belongs to another user" in checked.stderr
    assert not (tmp_path / "proof").exists()
    run("check", "--config", "acme_srv.cfg", cwd=tmp_path)
    assert (tmp_path / "proof").exists()


@binaries
@pytest.mark.parametrize("profile", ["-config", "-section", "-verbosity"])
def test_a_profile_that_is_an_option_is_refused(profile: str, openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    """An HTTP header may choose any profile, and openssl looks for these three words among all, values included."""
    error = str(enroll(handlers(ca.options(), openssl_bin=openssl, profile=profile))[0])
    assert re.search("cmp_profile: (begins with a hyphen|needs OpenSSL 3.3)", error)
