"""Only the CA's own messages end an order, and none of a man in the middle."""

from __future__ import annotations

import base64
import datetime
import functools
import logging
import os
import sys
from pathlib import Path
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed448

import cmp_ca_handler
import demo_ca
from conftest import BINARIES, OPENSSL, Handlers, Pair, as_host, binaries, bundle_certificates, csr_pem, every_binary
from demo_ca import DemoCA, read_der, write_der
from other_cas import mutual_tls
from proxy import (
    FORGED,
    KEY,
    PKICONF,
    REJECTED,
    Forward,
    Proxy,
    body,
    cert_response,
    error_body,
    forge,
    integer,
    name,
    nested,
    note,
    protected,
    sender_of,
    signed,
    spoilt,
    status_info,
    stranger,
    with_body,
)
from shared import SHORT, begin, check_issued, clock_jumps, hold, requests, version

REFUSAL = nested(bytes.fromhex("020100") + nested(REJECTED, 0x30), 0xA1, 0x30, 0x30, 0x30)  # ip


def with_protection(answer: bytes, body: bytes) -> bytes:
    """The message with another body under the protection that it had, which does not fit any more."""
    header, _, protection, *_ = (part.whole for part in read_der(answer).parts())
    return write_der(0x30, header + body + protection)


@every_binary
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_a_text_that_swallows_lines_ends_no_order(
    authentication: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A text that openssl's own lines hold, too: what says that it did not accept the message must not disappear."""
    handler = handlers({**hold(ca).options(authentication), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr)
    subject = sender_of(ca, authentication)
    chain = [stranger(f"x\n\nCMP error: {FORGED}\n\nCMP error: {FORGED}\n", subject)]
    for told in (error_body("\nCMP error: "), error_body("\n")):
        proxy.spoil = functools.partial(lambda told, _, forward: signed(forward(), told, KEY, chain), told)
        error, *rest = handler.poll("name", identifier, "")
        assert error
        assert rest == [None, None, identifier, False]
        assert handlers.left() == [identifier]


@every_binary
@pytest.mark.parametrize("attack", ["unprotected", "wrong MAC", "unknown signer", "ordinary certificate"])
def test_a_refusal_by_somebody_else_ends_no_order(
    attack: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """Whatever is configured, and however little openssl says, only an authentic refusal ends an order that waits."""
    changes = {"openssl_bin": openssl, "verbosity": "3", "unprotected_errors": "True", **SHORT}
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **changes)
    ordinary = bundle_certificates(str(handler.enroll(as_host(csr_pem(["o.example"], key=KEY)))[1]))
    hold(ca)
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr)

    chain = ordinary if attack == "ordinary certificate" else [stranger("x", sender_of(ca, "secret"))]
    forgers: dict[str, Callable[[bytes, bytes], bytes]] = {"unprotected": with_body, "wrong MAC": with_protection}

    def forged(answer: bytes, told: bytes) -> bytes:
        return forgers[attack](answer, told) if attack in forgers else signed(answer, told, KEY, chain)

    for told in (error_body("no"), REFUSAL):

        def forge_answer(_: str, forward: Forward, told: bytes = told) -> bytes:
            return forged(forward(), told)

        proxy.spoil = forge_answer
        error, *rest = handler.poll("name", identifier, "")
        assert error
        assert rest == [None, None, identifier, False]


def as_answer(recorded: bytes, directory: Path) -> bytes:
    """The CA's last answer in this order with the nonce of the newest request, which the CA itself does not get."""
    last = cmp_ca_handler._saved_message(str(max(directory.glob("[0-9]*.der"))))
    request = cmp_ca_handler._saved_message(str(max(directory.glob("*.req"))))
    assert last and request
    answer = recorded.replace(last.nonces[1], request.nonces[0])
    assert answer != recorded
    return answer


@pytest.mark.parametrize("how", ["unprotected", "tampered"])
def test_still_waiting_is_not_believed_from_somebody_else(
    how: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """With the nonce of our request, which he sees. Were it kept as the CA's, no later poll could go on from it."""
    answers: list[bytes] = []
    proxy.spoil_next("pollReq", note(answers))
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, **SHORT)
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr)
    proxy.spoil_next("pollReq", lambda _: spoilt(how, as_answer(answers[0], handlers.work / identifier)))
    error, *rest = handler.poll("name", identifier, "")
    assert error
    assert rest == [None, None, identifier, False]
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


@binaries
def test_already_revoked_is_not_believed_from_somebody_else(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """acme2certifier would take the certificate for revoked."""
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, unprotected_errors="True")
    certificate = str(handler.enroll(as_host(csr_pem(["a.example"])))[2])
    info = REJECTED + bytes.fromhex("0303050020")  # certRevoked
    body = nested(info, 0xAC, 0x30, 0x30, 0x30)  # rp
    chain = [stranger("x", sender_of(ca, "secret"))]  # unprotected, or with a wrong MAC: test_revocation
    proxy.spoil = lambda _, forward: signed(forward(), body, KEY, chain)
    code, message, detail = handler.revoke(certificate, "superseded")
    assert (code, message) == (500, "urn:ietf:params:acme:error:serverInternal")
    assert "an unverified answer says: certRevoked" in str(detail)


@binaries
@pytest.mark.parametrize("what", ["order", "order by p10cr", "order that waits", "revocation"])
def test_mutual_tls_with_another_root_does_not_hide_the_no_of_the_ca(
    what: str, openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A client certificate in TLS of another root than the server's, which openssl calls an error at each run: the
    CA's no is believed all the same, and what openssl says about it is no error in the log.
    """
    ca = make_ca(tls=True)
    command = "p10cr" if what == "order by p10cr" else None
    handler = handlers(mutual_tls(ca), openssl_bin=openssl, cmd=command, **SHORT)
    csr = csr_pem(["a.example"])
    if what == "revocation":
        certificate = str(handler.enroll(as_host(csr))[2])
        assert handler.revoke(certificate, "superseded") == (200, None, None)
        code, message, error = handler.revoke(certificate, "superseded")
        assert (code, message) == (400, "urn:ietf:params:acme:error:alreadyRevoked")
    elif what != "order that waits":
        ca.reject = "certRevoked"
        error = handler.enroll(csr)[0]
    else:
        hold(ca)
        identifier = begin(handler, csr)
        ca.reject = "certRevoked"
        ca.refuse("all")
        error, *_, rejected = handler.poll("name", identifier, "")
        assert rejected, error
    assert f"CMP server {ca.server} rejected the request: certRevoked" in str(error)
    assert handler.failure == "refused"
    errors = [r.getMessage() for r in caplog.records if r.levelno > logging.WARNING]
    assert [line for line in errors if "reject" not in line] == []


def answer(body: int, status: int | None = None, certificate: bytes = b"") -> cmp_ca_handler.Message:
    return cmp_ca_handler.Message("001.der", body, status=status, certificate=certificate)


WAITS, ERROR_WAITS, GRANTS, REFUSES = answer(1, 3), answer(23, 3), answer(1, 0, b"certificate"), answer(1, 2)
POLL_REP, PKI_CONF = answer(26), answer(19)


@pytest.mark.parametrize(
    ("answers", "usable"),
    [
        ([WAITS, POLL_REP, POLL_REP, GRANTS, PKI_CONF], 5),
        ([WAITS, POLL_REP, GRANTS, ERROR_WAITS, POLL_REP, PKI_CONF], 6),  # the confirmation takes its time, too
        ([GRANTS, ERROR_WAITS], 2),
        ([WAITS, WAITS], 1),
        ([WAITS, ERROR_WAITS], 1),
        ([WAITS, REFUSES], 1),
        ([WAITS, PKI_CONF], 1),
        ([GRANTS, WAITS], 1),
        ([GRANTS, GRANTS], 1),
        ([GRANTS, POLL_REP], 1),
        ([POLL_REP], 0),
        ([PKI_CONF], 0),
        ([REFUSES], 0),
    ],
)
def test_answers_out_of_order_are_not_used(answers: list[cmp_ca_handler.Message], usable: int) -> None:
    """What comes out of turn is not the CA's answer to what was asked, so it is not replayed."""
    assert cmp_ca_handler._usable(answers) == answers[:usable]


def test_a_run_that_was_ended_or_cut_proves_nothing() -> None:
    """Where openssl did not end by itself, or not all it said is here, the line that matters may be missing."""
    text = f"CMP error: {FORGED}\n"
    run = cmp_ca_handler.Run(1, text, cmp_ca_handler._lines(text))
    assert run.only(cmp_ca_handler.AFTER_ACCEPTANCE)
    ends = (cmp_ca_handler.HUNG, cmp_ca_handler.ASLEEP, cmp_ca_handler.LOST, -9)
    for unproven in (*(run._replace(code=code) for code in ends), run._replace(cut=True)):
        assert not unproven.only(cmp_ca_handler.AFTER_ACCEPTANCE), unproven


def test_an_openssl_that_ends_when_it_should_be_ended_proves_nothing() -> None:
    """Between a look at its answers and its end it may say more, which nobody reads: no line is missing for sure."""

    def asleep() -> bool:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        return True

    run = cmp_ca_handler._run(["/bin/sh", "-c", "echo one; sleep 1; exit 1"], asleep=asleep)
    assert run.code == cmp_ca_handler.ASLEEP and not run.complete()


def test_last_words_after_the_time_count_as_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine pauses; then the program has ended, and the time is up: what it has said meanwhile nobody reads."""
    go = tmp_path / "go"
    paused: list[bool] = []

    def pause() -> bool:
        go.touch()
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        paused.append(True)
        return False

    clock_jumps(monkeypatch, lambda: bool(paused))
    script = f"while [ ! -e {go} ]; do sleep 0.01; done; echo words; exit 1"
    run = cmp_ca_handler._run(["/bin/sh", "-c", script], asleep=pause)
    assert (run.code, run.output, run.cut, run.complete()) == (1, "", True, False)


def test_more_output_than_is_kept_is_cut() -> None:
    """A certificate's details can be longer than what is kept, and openssl's own lines come last."""
    size = cmp_ca_handler.MAX_OUTPUT
    for length, cut in ((size, False), (size + 1, True)):
        run = cmp_ca_handler._run([sys.executable, "-c", f"print(end='x' * {length})"], 60)
        assert (run.code, len(run.output), run.cut) == (0, size, cut)


# --- An openssl that is not as we know it


def wrapped(directory: Path, openssl: str, script: str) -> str:
    """A fake: runs `cmp` as the shell script says, where $OPENSSL is the real program and "$@" its arguments."""
    path = directory / "openssl-wrapped"
    other = f'export OPENSSL={openssl}\n[ "$1" = cmp ] && [ "$2" != -help ] || exec $OPENSSL "$@"\n'
    path.write_text(f"#!/bin/sh\n{other}{script}\n")
    path.chmod(0o700)
    return str(path)


OTHER_WORDS = (
    """{ $OPENSSL "$@"; echo "$?" > "$0.$$"; } 2>&1 | sed 's/\\(CMP [a-z]*:\\).*/\\1 words that nobody knows/'\n"""
    """code=$(cat "$0.$$"); rm "$0.$$"; exit "$code"\n"""
)
CRASH = '$OPENSSL "$@"; kill -SEGV $$'


@binaries
@pytest.mark.parametrize("script", [OTHER_WORDS, CRASH], ids=["words", "crash"])
@pytest.mark.parametrize("check_after", [0, 3600])
def test_an_order_that_waits_finishes(
    check_after: int, script: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, tmp_path: Path
) -> None:
    """Whatever openssl says about it, and however it ends; and with a forged answer in between."""
    ca.hold, ca.check_after = True, check_after
    strange = wrapped(tmp_path, openssl, script)
    csr = csr_pem(["a.example"])
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=strange, **SHORT)
    identifier = begin(handler, csr)
    for _ in range(2):
        assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    proxy.spoil = lambda _, forward: with_body(b"0\x04" + bytes(4), b"")
    assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    proxy.spoil = lambda _, forward: forward()
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert requests(ca)["ir"] == 1
    assert handlers.left() == []


@binaries
def test_a_crash_after_the_certificate_costs_no_certificate(
    openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """An openssl that crashes when it has the certificate: the order is issued all the same."""
    csr = csr_pem(["a.example"])
    handler = handlers(ca.options(), openssl_bin=wrapped(tmp_path, openssl, CRASH))
    error, bundle, certificate, _ = handler.enroll(as_host(csr))
    check_issued((error, bundle, certificate, None, False), csr)
    assert handlers.left() == []


@binaries
@pytest.mark.parametrize("implicit", [True, False])
def test_a_certificate_that_cannot_be_saved_is_issued_by_the_next_poll(
    implicit: bool, openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """The CA has issued, so its answer is not thrown away."""
    csr = csr_pem(["a.example"])
    option = "implicit_confirm" if implicit else "disable_confirm"
    full = f'$OPENSSL "$@"; code=$?; for f in {handlers.work}/*/cert.pem; do [ -f $f ] && rm $f && code=1; done'
    strange = wrapped(tmp_path, openssl, full + "; exit $code")
    handler = handlers(ca.options(), openssl_bin=strange, **{option: "True"})
    identifier = begin(handler, csr)
    handler = handlers(ca.options(), openssl_bin=openssl, **{option: "True"})
    check_issued(handler.poll("name", identifier, ""), csr)
    assert requests(ca)["ir"] == 1
    assert handlers.left() == []


@binaries
@pytest.mark.parametrize(
    "changes",
    [
        {"implicit_confirm": "True"},
        {"disable_confirm": "True"},
        {"verbosity": "3"},
        {"verbosity": "8"},
        {"cmd": "cr"},
        {"cmd": "p10cr"},
    ],
    ids=lambda c: "-".join(*c.items()),
)
def test_waiting_ends_in_a_certificate_with_any_of_these_options(
    changes: dict[str, str], openssl: str, ca: DemoCA, handlers: Handlers
) -> None:
    """Options that change what openssl sends or prints: the order waits for two polls, and the third gets it."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), openssl_bin=openssl, **SHORT, **changes)
    identifier = begin(handler, csr)
    for _ in range(2):
        assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
    assert handlers.left() == []


def test_an_openssl_that_saves_no_answers_sends_its_requests(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, tmp_path: Path
) -> None:
    """The gate before a request is opened by looking at the answers: without these there must be none."""
    program = tmp_path / "openssl"
    hiding = f'case "$*" in *-help*) {OPENSSL} "$@" 2>&1 | grep -v -e -rsp; exit;; esac'
    program.write_text(f'#!/bin/sh\n{hiding}\nexec {OPENSSL} "$@"\n')
    program.chmod(0o700)
    ca.hold, ca.check_after = True, 1

    def approve(request: str, forward: Forward) -> bytes:
        if request == "pollReq":
            ca.approve("all")
        return forward()

    proxy.spoil = approve
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=str(program))
    assert "rspout" not in cmp_ca_handler._binary(str(program)).options
    check_issued((*handler.enroll(csr := csr_pem(["a.example"])), False), csr)
    assert requests(ca) == {"ir": 1, "pollReq": 1, "certConf": 1}


@every_binary
def test_waiting_with_more_than_the_status_is_still_waiting(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """CertResponse may end with rspInfo, an OCTET STRING where the certificate would be (RFC 4210, 5.3.4)."""
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)

    def with_info(forward: Forward) -> bytes:
        told = write_der(0x30, integer(0) + status_info(3, [], b"") + write_der(0x04, b"utf8text?waiting%"))
        return saying(forward(), body(1, write_der(0x30, told)))

    proxy.spoil_next("ir", with_info)
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


def test_a_confirmation_with_a_hash_algorithm_is_read() -> None:
    """RFC 9480 adds hashAlg to the certConf, for certificates whose signature names no hash, such as Ed25519's."""
    parts = write_der(0x04, bytes(32)) + integer(0)
    algorithm = write_der(0xA0, bytes.fromhex("300b0609608648016503040203"))
    for info, status in ((b"", 0), (status_info(0, [], b""), 0), (status_info(2, [b"no"], b""), 2)):
        for more in (b"", algorithm):
            content = write_der(0x30, write_der(0x30, parts + info + more))
            assert cmp_ca_handler._body(cmp_ca_handler.CERTCONF, content)["status"] == status


def test_a_certificate_beside_a_private_key_is_found() -> None:
    """In a CertifiedKeyPair both may have the tag [0] (RFC 4210, 5.3.4): the first is the certificate."""
    pair = write_der(0x30, write_der(0xA0, b"certificate") + write_der(0xA0, b"key"))
    response = write_der(0x30, integer(0) + write_der(0x30, integer(0)) + pair)
    content = write_der(0x30, write_der(0x30, response))
    assert cmp_ca_handler._body(cmp_ca_handler.IP, content)["certificate"] == b"certificate"


@every_binary
def test_a_recorded_first_answer_does_not_stop_an_order(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """OpenSSL 3.5 takes it: the next poll goes on from what was there before."""
    answers: list[bytes] = []

    def record(_: str, forward: Forward) -> bytes:
        answers.append(forward())
        return answers[-1]

    proxy.spoil = record
    csr = csr_pem(["a.example"])
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    assert len(answers) == 2
    for answer in answers:
        proxy.spoil = lambda request, forward, answer=answer: answer if request == "pollReq" else None  # type: ignore
        assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    proxy.spoil = lambda _, forward: forward()
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


@binaries
def test_a_secret_that_is_wrong_for_a_while_costs_no_answer(openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    """An answer of which nobody knows yet is not thrown away for it."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    newest = max((handlers.work / identifier).glob("[0-9]*.der"))
    newest.rename(newest.with_suffix(".new"))  # as a process leaves it that is killed in this moment
    error, *rest = handlers(ca.options(), openssl_bin=openssl, secret="wrong", **SHORT).poll("name", identifier, "")
    assert error
    assert rest == [None, None, identifier, False]
    ca.approve("all")
    check_issued(handlers(ca.options(), openssl_bin=openssl, **SHORT).poll("name", identifier, ""), csr)


def test_the_thousandth_answer_is_the_newest(ca: DemoCA, handlers: Handlers) -> None:
    """Its name is longer."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), **SHORT)
    identifier = begin(handler, csr)
    newest = max((handlers.work / identifier).glob("[0-9]*.der"))
    old = newest.with_name("999.der")
    newest.rename(old)
    content = old.read_bytes()
    assert handler.poll("name", identifier, "") == (None, None, None, identifier, False)
    assert old.with_name("1000.der").exists()
    old.write_bytes(content)  # as if the process had been killed before it was deleted
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


# --- What the CA says to the confirmation of a certificate


def saying(answer: bytes, told: bytes) -> bytes:
    """The CA's message with another body, protected by its secret."""
    header = read_der(answer).parts()[0].whole
    return protected(header, header, told, b"")


def instead(told: bytes, forward: Forward) -> bytes:
    """The CA gets the request, and says this."""
    return saying(forward(), told)


def error_of(failure: int, *texts: str, status: int = 2) -> bytes:
    """An error message with one bit of failInfo."""
    bits = bytearray(4)
    bits[failure // 8] = 0x80 >> failure % 8
    return body(23, status_info(status, [text.encode() for text in texts], b"\0" + bytes(bits)))


CERT_CONFIRMED, CERT_REVOKED = 11, 10  # bits of failInfo
GENP = nested(b"", 0xB6, 0x30)
CONFIRMATIONS: dict[str, Callable[[Forward], bytes | None]] = {
    "unprotected": lambda forward: with_body(forward(), PKICONF),
    "certConfirmed": lambda forward: saying(forward(), error_of(CERT_CONFIRMED, "again?")),
    "unexpected body": lambda forward: saying(forward(), GENP),
    "waiting": lambda forward: saying(forward(), error_of(CERT_CONFIRMED, status=3)),
    "never": lambda forward: None,
}


@binaries
@pytest.mark.parametrize("how", CONFIRMATIONS)
def test_a_confirmation_that_is_not_confirmed_costs_no_certificate(
    how: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The certificate is issued: after some polls it is handed out, with a warning."""
    asked: list[str] = []
    recorded: list[bytes] = []

    def answer(request: str, forward: Forward) -> bytes | None:
        asked.append(request)
        if request == "ir":
            recorded.append(forward())
            return recorded[0]
        if request != "certConf" or asked.count("certConf") == 1:
            return None
        return CONFIRMATIONS[how](forward)

    proxy.spoil = answer
    csr = csr_pem(["a.example"])
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    for _ in range(4):
        result = handler.poll("name", identifier, "")
        if result[1]:
            break
        assert result[1:] == (None, None, identifier, False)
    check_issued(result, csr)
    assert "its confirmation is not proven" in caplog.text
    assert asked.count("ir") == 1


@binaries
def test_a_confirmation_that_a_proxy_repeats_costs_no_certificate(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets the answer to the second certConf, which is certConfirmed: its certificate is not lost."""
    answer = CONFIRMATIONS["certConfirmed"]
    proxy.spoil = lambda request, forward: answer(forward) if request == "certConf" else forward()
    csr = csr_pem(["a.example"])
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    check_issued(handler.poll("name", identifier, ""), csr)
    assert "its confirmation is not proven" in caplog.text


STATUSES: dict[str, tuple[bytes, str]] = {
    "granted, without a certificate": (
        cert_response(1, status_info(0, [b"soon"], b""), b""),
        "answered status 0, and no",
    ),
    "granted with changes, without one": (cert_response(1, status_info(1, [], b""), b""), "answered status 1, and no"),
    "a key update": (cert_response(1, status_info(6, [], b""), b""), "answered status 6"),
    "rejected": (cert_response(1, status_info(2, [], b""), b""), "rejected the request: rejection"),
    "a certificate for another request": (
        cert_response(1, status_info(0, [], b""), forge(KEY, name("a"), name("b")), 7),
        "certresponse not found",
    ),
}


@pytest.mark.parametrize("case", STATUSES)
def test_no_certificate_is_not_always_a_rejection(case: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """A CA that sends none, or none for this request, whatever its status: the error says what it has said."""
    told, expected = STATUSES[case]
    proxy.spoil = lambda _, forward: saying(forward(), told)
    handler = handlers({**ca.options(), "cmp_server": proxy.server})
    error, *rest = handler.enroll(csr_pem(["a.example"]))
    assert expected in str(error) and rest == [None, None, None]
    assert handler.failure == "refused"  # openssl has accepted the message: the CA itself has said that


@binaries
@pytest.mark.parametrize("held", [True, False])
def test_a_no_to_the_first_confirmation_ends_the_order(
    held: bool, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A CA that answers certConf with an error: the order ends with its reason, and nothing is left."""
    ca.hold, ca.check_after = held, 3600
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr) if held else ""
    proxy.spoil_next("certConf", lambda forward: saying(forward(), error_of(2, "not this one")))
    ca.approve("all")
    error, *rest = handler.poll("name", identifier, "") if held else handler.enroll(as_host(csr))
    assert rest == ([None, None, identifier, True] if held else [None, None, None])
    assert "rejected the request: badRequest, 'not this one'" in str(error)
    (serial,) = [path.stem.lower() for path in (ca.directory / "issued").glob("*.pem")]
    assert str(error).startswith(f"the CA has issued serial {serial}, but refuses its confirmation; CMP server ")
    assert handlers.left() == []


def test_a_confirmation_that_is_refused_for_a_moment_is_sent_again(
    ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A CA that answers the first certConf with what passes, or somebody changed: the next poll confirms again."""
    csr = csr_pem(["a.example"])
    for openssl in BINARIES:
        handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
        for failure in ("systemUnavail", "systemFailure", "badMessageCheck"):
            told = error_of(demo_ca.FailInfo[failure], "just now")
            proxy.spoil_next("certConf", functools.partial(instead, told))
            check_issued(handler.poll("name", begin(handler, csr), ""), csr)


def test_a_yes_that_openssl_does_not_take_ends_the_order(
    ca: DemoCA, pair: Pair, handlers: Handlers, proxy: Proxy
) -> None:
    """Authentic, but with another certReqId, or two certificates: it will never be taken, so the order ends."""
    certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
    der = certificate.public_bytes(serialization.Encoding.DER)
    other, one = (cert_response(1, status_info(0, [], b""), der, number) for number in (1, 0))
    two = body(1, write_der(0x30, 2 * read_der(one).parts()[0].parts()[0].content))
    hold(ca)
    for openssl in BINARIES:
        handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
        for told in (other, two):
            identifier = begin(handler, csr_pem(["a.example"]))
            proxy.spoil_next("pollReq", functools.partial(instead, told))
            error, *rest = handler.poll("name", identifier, "")
            assert error and rest == [None, None, identifier, True], (openssl, error)
            assert handlers.left() == []


@pytest.mark.parametrize("openssl", [path for path in BINARIES if version(path) >= (3, 5)])
def test_a_certificate_that_openssl_cannot_confirm_waits(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A CA that signs by Ed448, which has no hash for the certConf: the order waits for cmp_disable_confirm."""
    options, csr = {**hold(ca).options(), "cmp_server": proxy.server}, csr_pem(["a.example"], "a.example")
    handler = handlers(options, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    request, now = x509.load_pem_x509_csr(csr.encode()), datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(request.subject).issuer_name(name("ca")).serial_number(7)
    builder = builder.public_key(request.public_key()).not_valid_before(now)
    builder = builder.not_valid_after(now + datetime.timedelta(1))
    certificate = builder.sign(ed448.Ed448PrivateKey.generate(), None).public_bytes(serialization.Encoding.DER)
    ca.approve("all")
    told = cert_response(1, status_info(0, [], b""), certificate)
    proxy.spoil_next("pollReq", lambda forward: saying(forward(), told))
    for _ in range(2):
        error, *rest = handler.poll("name", identifier, "")
        assert str(error).endswith(
            "(openssl cannot confirm such a certificate: cmp_disable_confirm: True, if the CA allows that)"
        )
        assert rest == [None, None, identifier, False]
    handler = handlers(options, openssl_bin=openssl, disable_confirm="True", **SHORT)
    error, _, issued, _, rejected = handler.poll("name", identifier, "")
    assert (error, issued, rejected) == (None, base64.b64encode(certificate).decode(), False)
    assert (requests(ca)["ir"], requests(ca)["certConf"]) == (1, 0)


@binaries
@pytest.mark.parametrize("words", [True, False])
def test_a_certificate_that_is_not_trusted_is_not_handed_out(
    words: bool, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, tmp_path: Path
) -> None:
    """By cmp_out_trusted. It is not handed out later either, when its refusal does not arrive at the CA."""
    pem = stranger("x", name("other root")).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "other.pem").write_bytes(pem)
    program = openssl if words else wrapped(tmp_path, openssl, OTHER_WORDS)
    changes = {"openssl_bin": program, "out_trusted": str(tmp_path / "other.pem"), **SHORT}
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **changes)
    proxy.spoil = lambda request, forward: None if request == "certConf" else forward()
    identifier = begin(handler, csr_pem(["a.example"]))
    for _ in range(4):
        assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    proxy.spoil = lambda _, forward: forward()
    assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, words)


# --- Other answers


@binaries
@pytest.mark.parametrize("failure", ["badMessageCheck", "badTime", "badDataFormat", "systemUnavail"])
def test_a_poll_that_arrives_damaged_ends_no_order(
    failure: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A CA that cannot read a pollReq, which somebody may have changed, or cannot work now: the order waits on.

    After ir it is over.
    """
    told = error_of(demo_ca.FailInfo[failure], "cannot read that")
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    csr = csr_pem(["a.example"])
    proxy.spoil_next("ir", lambda forward: saying(forward(), told))
    error, *rest = handler.enroll(as_host(csr))
    assert f"rejected the request: {failure}, 'cannot read that'" in str(error)
    assert (rest, handler.failure, handlers.left()) == ([None, None, None], "refused", [])

    answers: list[bytes] = []
    hold(ca)
    proxy.spoil_next("pollReq", note(answers))
    identifier = begin(handler, csr)
    proxy.spoil_next("pollReq", lambda _: saying(as_answer(answers[0], handlers.work / identifier), told))
    error, *still = handler.poll("name", identifier, "")
    assert f"rejected the request: {failure}, 'cannot read that'" in str(error)
    assert still == [None, None, identifier, False]
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


@pytest.mark.parametrize("openssl", [path for path in BINARIES if version(path) >= (3, 3)])
def test_an_error_message_that_waits_leaves_the_order_waiting(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """As the first answer of all. (An ip that waits may not follow it: to OpenSSL that is an unexpected status.)"""
    proxy.spoil_next("ir", lambda forward: saying(forward(), error_of(0, "later", status=3)))
    csr = csr_pem(["a.example"])
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    for _ in range(2):
        assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


@binaries
def test_a_flood_keeps_the_log_short(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Of text, by the CA and by a stranger: the log stays short, and the order goes on."""
    csr = csr_pem(["a.example"])
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, csr)
    lines = "\nCMP error: forged" * 4000
    text = write_der(0x30, write_der(0x0C, lines.encode()))
    proxy.spoil_next(
        "pollReq", lambda forward: saying(forward(), nested(bytes.fromhex("02010002020e10") + text, 0xBA, 0x30, 0x30))
    )
    assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    newest = max((handlers.work / identifier).glob("[0-9]*.der"))
    chain = [stranger(lines, sender_of(ca, "secret"))]
    proxy.spoil_next("pollReq", lambda _: signed(newest.read_bytes(), error_body("x"), KEY, chain))
    assert handler.poll("name", identifier, "")[1:] == (None, None, identifier, False)
    assert len(caplog.records) < 1000
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)


@binaries
@pytest.mark.parametrize(
    ("how", "code"),
    [("authentic", 400), ("unprotected", 500), ("wrong MAC", 500), ("error", 500), ("waiting", 500), ("garbage", 500)],
)
def test_only_an_authentic_answer_revokes(
    how: str, code: int, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """alreadyRevoked, which ends the matter, is said by an authentic rp alone."""
    revoked = nested(status_info(2, [b"before"], b"\x05\x08\x20"), 0xAC, 0x30, 0x30)  # badCertId and certRevoked
    answers: dict[str, Callable[[bytes], bytes]] = {
        "authentic": lambda answer: saying(answer, revoked),
        "unprotected": lambda answer: with_body(answer, revoked),
        "wrong MAC": lambda answer: with_protection(answer, revoked),
        "error": lambda answer: saying(answer, error_of(CERT_REVOKED, "your certificate")),
        "waiting": lambda answer: saying(answer, nested(b"\x02\x01\x03", 0xAC, 0x30, 0x30, 0x30)),
        "garbage": lambda _: b"PKIFailureInfo: certRevoked",
    }
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    certificate = handler.enroll(as_host(csr_pem(["a.example"])))[2]
    proxy.spoil = lambda _, forward: answers[how](forward())
    result = handler.revoke(str(certificate), "keyCompromise")
    assert result[0] == code, result
    assert ("alreadyRevoked" in str(result[1])) == (code == 400)
    assert ("waiting" in str(result[2])) == (how == "waiting")
    assert handlers.left() == []


@every_binary
def test_a_first_answer_to_another_request_is_refused(
    openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A recorded ip with a certificate for the same key, as a renewal has it: it is no part of this order."""
    csr = csr_pem(["a.example"])
    recorded: list[bytes] = []
    proxy.spoil_next("ir", note(recorded))
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    assert handler.enroll(csr)[1]
    proxy.spoil_next("ir", lambda _: recorded[0])
    error, *rest = handler.enroll(csr)
    assert error and "unmatched" in error
    assert rest == [None, None, None]
    assert handlers.left() == []
