"""What ends an order, and what does not: the CA's own messages, and those of a man in the middle."""

from __future__ import annotations

import sys
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

import cmp_ca_handler
from conftest import Handlers, as_host, binaries, bundle_certificates, csr_pem
from demo_ca import DemoCA, read_der, write_der
from proxy import Forward, Proxy, forge, name, nested, signed, with_body
from test_poll import SHORT, begin, hold

KEY = ec.generate_private_key(ec.SECP256R1())
REJECTED = bytes.fromhex("020102")  # PKIStatus
REFUSAL = nested(bytes.fromhex("020100") + nested(REJECTED, 0x30), 0xA1, 0x30, 0x30, 0x30)  # ip
FORGED = "request rejected by server:PKIStatus: rejection; PKIFailureInfo: badCertTemplate"


def error_body(*texts: str, status: bytes = REJECTED) -> bytes:
    """An error message (RFC 4210, 5.3.21) with a statusString."""
    strings = b"".join(write_der(0x0C, text.encode()) for text in texts)
    return nested(status + (write_der(0x30, strings) if texts else b""), 0xB7, 0x30, 0x30)


def stranger(text: str, subject: x509.Name) -> x509.Certificate:
    """Somebody's own certificate; openssl prints what its authorityKeyIdentifier calls the issuer as it is."""
    issuer = x509.AuthorityKeyIdentifier(None, [x509.UniformResourceIdentifier(text)], 7)
    return x509.load_der_x509_certificate(forge(KEY, subject, name("nobody"), issuer))


def with_protection(answer: bytes, body: bytes) -> bytes:
    """The message with another body under the protection that it had, which does not fit any more."""
    header, _, protection, *_ = (part.whole for part in read_der(answer).parts())
    return write_der(0x30, header + body + protection)


def sender_of(ca: DemoCA, authentication: str) -> x509.Name:
    """Who sends the CA's answers."""
    signer = {"secret": "sub", "certificate": "cmp"}[authentication]
    return x509.load_pem_x509_certificates((ca.directory / f"{signer}.pem").read_bytes())[0].subject


@binaries
@pytest.mark.parametrize("text", ["\nCMP error: ", "\n"])
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_text_that_swallows_lines(
    authentication: str, text: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A text that openssl's own lines hold, too: what says that it did not accept the message must not disappear."""
    handler = handlers({**hold(ca).options(authentication), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr)
    subject = sender_of(ca, authentication)
    chain = [stranger(f"x\n\nCMP error: {FORGED}\n\nCMP error: {FORGED}\n", subject)]
    proxy.spoil = lambda _, forward: signed(forward(), error_body(text), KEY, chain)
    error, *rest = handler.poll("name", identifier, "")
    assert error
    assert rest == [None, None, identifier, False]
    assert handlers.left() == [identifier]


@binaries
@pytest.mark.parametrize("attack", ["unprotected", "wrong MAC", "unknown signer", "ordinary certificate"])
def test_refusal_by_somebody_else(attack: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """Whatever is configured, and however little openssl says, only an authentic refusal ends an order that waits."""
    changes = {"openssl_bin": openssl, "verbosity": "3", "unprotected_errors": "True", **SHORT}
    handler = handlers({**ca.options(), "cmp_server": proxy.server}, **changes)
    ordinary = bundle_certificates(str(handler.enroll(as_host(csr_pem(["o.example"], key=KEY)))[1]))
    hold(ca)
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr)

    chain = ordinary if attack == "ordinary certificate" else [stranger("x", sender_of(ca, "secret"))]
    forgers: dict[str, Callable[[bytes, bytes], bytes]] = {"unprotected": with_body, "wrong MAC": with_protection}

    def forged(answer: bytes, body: bytes) -> bytes:
        return forgers[attack](answer, body) if attack in forgers else signed(answer, body, KEY, chain)

    for body in (error_body("no"), REFUSAL):

        def forge_answer(_: str, forward: Forward, body: bytes = body) -> bytes:
            return forged(forward(), body)

        proxy.spoil = forge_answer
        error, *rest = handler.poll("name", identifier, "")
        assert error
        assert rest == [None, None, identifier, False]


def test_run_that_proves_nothing() -> None:
    """Where openssl did not end by itself, or not all it said is here, the line that matters may be missing."""
    run = cmp_ca_handler.Run(1, f"CMP error: {FORGED}\n")
    assert run.only(cmp_ca_handler.AFTER_ACCEPTANCE)
    for change in ({"code": None}, {"code": -9}, {"code": cmp_ca_handler.LOST}, {"cut": True}, {"asleep": True}):
        assert not run._replace(**change).only(cmp_ca_handler.AFTER_ACCEPTANCE), change


def test_more_output_than_is_kept() -> None:
    """A certificate's details can be longer than what is kept, and openssl's own lines come last."""
    size = cmp_ca_handler.MAX_OUTPUT
    for length, cut in ((size, False), (size + 1, True)):
        run = cmp_ca_handler._run([sys.executable, "-c", f"print(end='x' * {length})"], 60)
        assert (run.code, len(run.output), run.cut) == (0, size, cut)
