"""No answer makes an order wait for ever, or costs one that waits: absurd numbers, a signer at which openssl loops."""

from __future__ import annotations

import pytest

import cmp_ca_handler
from conftest import Handlers, as_host, binaries, csr_pem
from demo_ca import DemoCA, write_der
from proxy import (
    KEY,
    REJECTED,
    Forward,
    Proxy,
    body,
    cert_response,
    error_body,
    message_parts,
    nested,
    protected,
    sender_of,
    signed,
    stranger,
    with_body,
)
from shared import begin, check_issued, hold

HUGE = write_der(2, b"\x01" + bytes(4000))  # an INTEGER of ten thousand digits
SHORT = {"msg_timeout": "2", "total_timeout": "2"}
NUMBERS = {
    "errorCode": body(23, nested(REJECTED, 0x30) + HUGE),
    "status of an error": body(23, nested(HUGE, 0x30)),
    "checkAfter": body(26, write_der(0x30, write_der(2, b"\0") + HUGE)),
    "status of an ip": cert_response(1, nested(HUGE, 0x30), b""),
}


@pytest.mark.parametrize("authentic", [False, True], ids=["unprotected", "protected"])
@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_larger_than_any_is_an_ordinary_failure(
    number: str, authentic: bool, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A number of thousands of digits, from the CA or from anybody: an ordinary failure, and nothing waits."""

    def spoil(request: str, forward: Forward) -> bytes:
        answer = forward()
        if not authentic:
            return with_body(answer, NUMBERS[number])
        header, _, _, certificates = message_parts(answer)
        return protected(header, header, NUMBERS[number], certificates)

    proxy.spoil = spoil
    error, *rest = handlers(ca.options(), server=proxy.server, **SHORT).enroll(as_host(csr_pem(["a.example"])))
    assert error and "internal error" not in error
    assert rest == [None, None, None]
    assert handlers.left() == []


def test_a_number_larger_than_any_ends_no_order_that_waits(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """The same in answer to a poll, from nobody: the order is asked about again, and issued."""
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), server=proxy.server, **SHORT)
    identifier = begin(handler, csr)
    proxy.spoil_next("pollReq", lambda forward: with_body(forward(), NUMBERS["checkAfter"]))
    error, _, _, same, rejected = handler.poll("name", identifier, "")
    assert error and same == identifier and not rejected
    ca.approve("all")
    result = handler.poll("name", identifier, "")  # the CA's nonce of the lost answer is gone: its own no, or a yes
    assert result[4] or result[1], result[0]


@binaries
@pytest.mark.parametrize("when", ["ir", "pollReq", "certConf"])
def test_a_signer_at_which_openssl_loops_ends_no_order_that_waits(
    when: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL prints a signer with a very long authorityCertIssuer for ever: that answer is not the CA's.

    An enrolment fails, an order that waits goes on: the next poll asks the CA, with what was there before.
    """
    monkeypatch.setattr(cmp_ca_handler, "GRACE", 1)  # meanwhile it takes a whole processor
    csr, chain = csr_pem(["a.example"]), [stranger("x" * 6000, sender_of(ca, "certificate"))]
    options = ca.options("certificate")
    handler = handlers(options, openssl_bin=openssl, server=proxy.server, **SHORT)

    def endless(forward: Forward) -> bytes:
        return signed(forward(), error_body("no"), KEY, chain)

    if when == "ir":
        proxy.spoil_next("ir", endless)
        error, *rest = handler.enroll(as_host(csr))
        assert error and "did not end in time" in error
        assert rest == [None, None, None]
        assert handlers.left() == []
        return
    hold(ca)
    identifier = begin(handler, csr)
    if when == "certConf":
        ca.approve("all")
    proxy.spoil_next(when, endless)
    error, _, _, same, rejected = handler.poll("name", identifier, "")
    assert error and same == identifier and not rejected
    ca.approve("all")
    asked = len(ca.messages)
    result = handler.poll("name", identifier, "")
    assert len(ca.messages) > asked, "the CA is asked again"
    if when == "certConf":
        check_issued(result, csr)
