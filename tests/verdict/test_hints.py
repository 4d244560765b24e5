"""A hint names the real cause, and nobody but openssl and the CA's failInfo chooses one."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography import x509

import cmp_ca_handler
from conftest import BINARIES, ENDS, OPENSSL, Handlers, as_host, binaries, bundle_certificates, csr_pem, every_binary
from demo_ca import DemoCA, read_der, write_der
from other_cas import new_signer
from proxy import (
    FORGED,
    KEY,
    REJECTED,
    Forward,
    Proxy,
    TcpServer,
    error_body,
    nested,
    poll_rep,
    sender_of,
    signed,
    spoilt,
    stranger,
    with_body,
)
from shared import SHORT, begin, hold

CSR = csr_pem(["a.example"])
# PBMParameter (RFC 4210, 5.1.3.1): SHA-256, 500 times, HMAC-SHA256
SALT = bytes(16)
PBM = nested(
    bytes.fromhex("06092a864886f67d07420d")
    + nested(
        write_der(0x04, SALT) + bytes.fromhex("300b0609608648016503040201020201f4300a06082a864886f70d0209"),
        0x30,
    ),
    0xA1,
    0x30,
)
PVNO, PROTECTION_ALG, TRANSACTION, RECIP_NONCE = 0x02, 0xA1, 0xA4, 0xA6  # tags in the header of a message
WRONG = nested(bytes(16), 0x04)


HINTS = [line.split(" -> ") for line in cmp_ca_handler.HINTS.strip().splitlines()]


def hint(words: str) -> str:
    """The hint for what openssl says."""
    return next(hint for key, hint in HINTS if words in key or re.search(key, words, re.I))


def protected(answer: bytes, secret: str, body: bytes = b"", field: int = 0, value: bytes | None = b"") -> bytes:
    """The message with another body, or with another field in its header, under the secret: what only a CA can say."""
    header, old, _, *rest = read_der(answer).parts()
    version, sender, recipient, *fields = header.parts()
    changes = {PROTECTION_ALG: PBM, field: b"" if value is None else write_der(field, value)}
    header_parts = [changes.get(version.tag, version.whole), sender.whole, recipient.whole]
    header_parts += [changes.get(part.tag, part.whole) for part in fields]
    parts = write_der(0x30, b"".join(header_parts)) + (body or old.whole)
    key = secret.encode() + SALT
    for _ in range(500):
        key = hashlib.sha256(key).digest()
    mac = hmac.new(key, write_der(0x30, parts), "sha256").digest()
    return write_der(0x30, parts + nested(b"\0" + mac, 0xA0, 0x03) + b"".join(part.whole for part in rest))


def error_of(handler: Any, csr: str = CSR) -> str:
    """The error of an enrolment that fails."""
    error, *rest = handler.enroll(as_host(csr))
    assert rest == [None, None, None]
    return str(error)


# --- The CA's reasons


REASONS = """badMessageCheck wrongIntegrity signerNotTrusted notAuthorized badPOP badCertTemplate unacceptedExtension
badAlg badTime badDataFormat badRecipientNonce badSenderNonce transactionIdInUse duplicateCertReq systemUnavail
systemFailure wrongAuthority""".split()


def test_each_reason_of_the_ca_has_its_hint(ca: DemoCA, handlers: Handlers) -> None:
    """Each failInfo that an administrator can do something about has its hint."""
    handler = handlers(ca.options())
    for reason in REASONS:
        ca.reject = reason
        assert error_of(handler).endswith(f"rejected the request: {reason} ({hint(reason)})"), reason


def test_text_of_the_ca_chooses_no_hint(ca: DemoCA, handlers: Handlers) -> None:
    """A CA that says badTime, with words of other hints in its text: the hint for badTime."""
    ca.reject, ca.status_text = "badTime", "wrong pbm value; certificate verify failed; badMessageCheck"
    assert error_of(handlers(ca.options())).endswith(f"'{ca.status_text}' ({hint('badTime')})")


def test_an_approval_of_the_ca_has_its_hint(ca: DemoCA, handlers: Handlers) -> None:
    """EJBCA has no failInfo for it: of a text, this one word counts."""
    ca.reject, ca.status_text = "badRequest", "The request needs an Approval; wrong pbm value"
    assert error_of(handlers(ca.options())).endswith(f"({hint('approval')})")


@pytest.mark.parametrize("more", ["errorCode", "errorDetails"])
def test_a_ca_that_says_more_gets_no_hint(more: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """A CA may say signerNotTrusted and mean something else: what it says about it is not contradicted by a hint."""
    details = {
        "errorCode": bytes.fromhex("02021267"),
        "errorDetails": nested(b"profile web is not allowed", 0x30, 0x0C),
    }
    status = nested(REJECTED + bytes.fromhex("030403000008"), 0x30)
    body = nested(status + details[more], 0xB7, 0x30)
    proxy.spoil = lambda _, forward: protected(forward(), ca.secret, body)
    error = error_of(handlers(ca.options(), server=proxy.server))
    words = {"errorCode": "errorCode 4711", "errorDetails": "'profile web is not allowed'"}
    assert error.endswith(f"rejected the request: signerNotTrusted, {words[more]}")


# --- Messages that do not fit


@binaries
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (PVNO, b"\x01", "unexpected pvno"),
        (TRANSACTION, WRONG, "transactionid unmatched"),
        (RECIP_NONCE, WRONG, "recipnonce unmatched"),
    ],
    ids=["version", "transaction", "nonce"],
)
def test_an_unexpected_header_is_named(
    field: int, value: bytes, words: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """An answer with another version, transaction or nonce: the hint for that, whatever its text says."""
    body = error_body("INVALIDCERT")
    proxy.spoil = lambda _, forward: protected(forward(), ca.secret, body, field, value)
    error = error_of(handlers(ca.options(), server=proxy.server, openssl_bin=openssl))
    assert words in error
    assert error.endswith(f"; an unverified answer says: rejection, 'INVALIDCERT' ({hint(words)})")


def test_what_an_answer_is_made_of_chooses_the_hint(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """A yes without protection, one with PBMAC1, an error without transaction: openssl's words alone would mislead."""
    pbm, pbmac1 = bytes.fromhex("06092a864886f67d07420d"), bytes.fromhex("06092a864886f70d01050e")
    error = error_body("cannot read that")
    answers: dict[str, Callable[[Forward], bytes]] = {
        "answers are not protected": lambda forward: spoilt("unprotected", forward()),
        "another kind of MAC": lambda forward: forward().replace(pbm, pbmac1),
        "the request was not read": lambda forward: protected(forward(), ca.secret, error, TRANSACTION, None),
    }
    for openssl in BINARIES:
        for words, answer in answers.items():
            proxy.spoil_next("ir", answer)
            text = error_of(handlers(ca.options(), server=proxy.server, openssl_bin=openssl))
            assert text.endswith(f"({hint(words)})"), (openssl, text)


@every_binary
def test_an_unusable_check_after_ends_no_order(openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """openssl is ended as soon as there is such an answer, at times before it says anything: then the order waits."""
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, openssl_bin=openssl, **SHORT)
    identifier = begin(handler, CSR)
    pollrep = nested(bytes.fromhex("020100" + "0201fd"), 0xBA, 0x30, 0x30)
    proxy.spoil = lambda _, forward: protected(forward(), ca.secret, pollrep)
    error, *rest = handler.poll("name", identifier, "")
    assert error is None or error.endswith(f"({hint('checkafter')})")
    assert rest == [None, None, identifier, False]


def test_ended_is_not_killed(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """A pollRep that is not authentic: openssl may have no time to say so."""
    handler = handlers({**hold(ca).options(), "cmp_server": proxy.server}, **SHORT)
    identifier = begin(handler, CSR)
    proxy.spoil = lambda _, forward: spoilt("unprotected", forward())
    error = handler.poll("name", identifier, "")[0]
    assert error and "killed" not in error
    assert re.search("missing protection|openssl does not accept the answer", error)


@every_binary
def test_a_certificate_that_is_refused_has_its_own_hint(openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    """It is about the certificate that was issued, not about the one that signs the CA's answers."""
    stranger = str(ca.directory / "stranger.pem")
    error = error_of(handlers(ca.options(), out_trusted=stranger, openssl_bin=openssl))
    assert error.endswith(f"({hint('failed to validate')})")


@every_binary
@pytest.mark.parametrize(
    ("trusted", "words"),
    [("root.pem", "unable to get local issuer certificate"), ("sub.pem", "unable to get issuer certificate")],
)
def test_a_signer_behind_an_intermediate_has_its_hint(
    trusted: str, words: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """The CA sends the signer's certificate alone, and only one of those above it is configured."""
    section = {**ca.options(), "cmp_server": proxy.server}
    changes = {"openssl_bin": openssl, "expect_sender": None, "trusted": str(ca.directory / trusted)}
    bundle = handlers(ca.options()).enroll(as_host(csr_pem(["o.example"], key=KEY)))[1]
    signer = bundle_certificates(str(bundle))[:1]
    proxy.spoil = lambda _, forward: signed(forward(), error_body("no"), KEY, signer)
    assert error_of(handlers(section, **changes)).endswith(f"({hint(words)})")
    helps = {"root.pem": {"untrusted": str(ca.directory / "sub.pem")}, "sub.pem": {"partial_chain": "True"}}[trusted]
    assert "rejected the request" in error_of(handlers(section, **{**changes, **helps}))


@every_binary
@pytest.mark.parametrize("kind", ["RSA", "EC"])
def test_a_signer_that_was_renewed_is_told_by_cmp_srvcert(
    kind: str, openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """cmp_srvcert holds the signer's certificate with another key than the one that signs: the hint names the entry,
    and not what openssl has tried with it.
    """
    (tmp_path / "signer.pem").write_bytes(new_signer(ca.directory, kind)[0])
    section = {**ca.options("certificate"), "cmp_srvcert": str(tmp_path / "signer.pem")}
    error = error_of(handlers(section, trusted=None, recipient=None, openssl_bin=openssl))
    assert error.endswith("(cmp_srvcert is not the certificate that signs the CA's answers)"), error


@binaries
def test_another_sender_at_a_poll_is_unauthentic(openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """An answer by another holder of a certificate of that CA: the error says so, also where openssl only warns."""
    section = {**ca.options("certificate"), "cmp_server": proxy.server}
    handler = handlers(section, openssl_bin=openssl, **SHORT)
    chain = bundle_certificates(str(handler.enroll(as_host(csr_pem(["o.example"], "o.example", key=KEY)))[1]))
    hold(ca)
    identifier = begin(handler, CSR)
    proxy.spoil = lambda _, forward: signed(forward(), poll_rep(3600, []), KEY, chain)
    error, *rest = handler.poll("name", identifier, "")
    assert "expected sender" in str(error)
    assert str(error).endswith(f"({hint('expected sender')})")
    assert (rest, handler.failure) == ([None, None, identifier, False], "unauthentic")


# --- Keys


def make_key(path: Path, *kind: str, openssl: str = OPENSSL) -> str:
    subprocess.run([openssl, "genpkey", "-out", str(path), "-algorithm", *kind], check=True, capture_output=True)
    return str(path)


@binaries
@pytest.mark.parametrize("kind", [["RSA"], ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]], ids=["RSA", "EC"])
@pytest.mark.parametrize("whose", ["", "tls_"])
def test_a_key_that_does_not_belong_to_the_certificate_has_its_hint(
    whose: str, kind: list[str], openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers, tmp_path: Path
) -> None:
    """cmp_key or cmp_tls_key of another certificate, RSA or EC: the hint for that."""
    ca = make_ca(tls=bool(whose))
    section = ca.options("certificate")
    key = make_key(tmp_path / "other.key", *kind)
    section.update({f"cmp_{whose}cert": section["cmp_cert"], f"cmp_{whose}key": key})
    words = "does not match the TLS certificate" if whose else "cert and key do not match"
    assert error_of(handlers(section, openssl_bin=openssl)).endswith(f"({hint(words)})")


@every_binary
def test_a_wrong_pass_phrase_of_the_tls_key_has_its_hint(
    openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers, tmp_path: Path
) -> None:
    """A wrong cmp_tls_keypass: the hint for the private key of TLS."""
    ca = make_ca(tls=True)
    section = ca.options("certificate")
    locked = str(tmp_path / "locked.key")
    command = [OPENSSL, "pkey", "-in", section["cmp_key"], "-aes128", "-passout", "pass:right", "-out", locked]
    subprocess.run(command, check=True)
    handler = handlers(
        section, tls_cert=section["cmp_cert"], tls_key=locked, tls_keypass="pass:not-this", openssl_bin=openssl
    )
    assert error_of(handler).endswith(f"({hint('TLS client private key')})")


def is_3_0(openssl: str) -> bool:
    return b"OpenSSL 3.0" in subprocess.run([openssl, "version"], capture_output=True, check=True).stdout


@every_binary
def test_an_ed25519_key_of_the_ra_has_its_hint_with_openssl_3_0(
    openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """OpenSSL 3.0 cannot sign with it and gets the hint; later versions can, so the CA has the last word."""
    key, certificate = make_key(tmp_path / "ra.key", "ED25519"), str(tmp_path / "ra.pem")
    command = [OPENSSL, "req", "-x509", "-key", key, "-subj", "/CN=ra", "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    error = error_of(handlers(ca.options("certificate"), cert=certificate, key=key, openssl_bin=openssl))
    # Later versions sign, and the CA says what it thinks of it.
    assert error.endswith(f"({hint('unsupported key type')})") is is_3_0(openssl)


@every_binary
def test_a_csr_of_a_newer_kind_has_its_hint_with_openssl_3_0(
    openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """A CSR with an ML-DSA key: the hint with OpenSSL 3.0, and none with later versions."""
    command = [
        BINARIES[-1],
        "req",
        "-new",
        "-newkey",
        "ML-DSA-44",
        "-nodes",
        "-keyout",
        "key.pem",
        "-subj",
        "/CN=a.example",
    ]
    if is_3_0(BINARIES[-1]):
        pytest.skip("no openssl here makes such a key")
    csr = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    error = handlers(ca.options(), openssl_bin=openssl).enroll(as_host(csr))[0]
    assert str(error).endswith(f"({hint('cannot use the CSR')})") is is_3_0(openssl)


# --- HTTP servers


def http_server(tcp_server: TcpServer, status: str, kind: str, body: bytes = b"<html></html>") -> str:
    """The address of a server that gives this answer to everybody."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        fields = f"Content-Type: {kind}\r\n" if kind else ""
        connection.sendall(f"HTTP/1.1 {status}\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)

    return f"127.0.0.1:{tcp_server(serve)}"


CODES = [303, 307, 308, 400, 401, 402, 403, 404, 405, 407, 408, 410, 413, 415, 429, 500, 501, 502, 503, 504, 511]


@pytest.mark.parametrize("openssl", ENDS)
def test_each_status_code_has_its_hint(openssl: str, ca: DemoCA, handlers: Handlers, tcp_server: TcpServer) -> None:
    """Each code of an HTTP server has its hint; every version says it in the same words."""
    for code in CODES if openssl == ENDS[0] else (404, 503):
        address = http_server(tcp_server, f"{code} No", "text/html")
        error = error_of(handlers(ca.options(), server=address, openssl_bin=openssl))
        assert error.endswith(f"({hint(f'code={code}')})"), code


@binaries
@pytest.mark.parametrize("kind", ["application/pkixcmp;charset=UTF-8", "text/html", ""])
def test_a_wrong_content_type_has_its_hint(
    kind: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy, tcp_server: TcpServer
) -> None:
    """A charset behind the type is refused by OpenSSL 3.0 and no later one."""
    ca.reject = "badTime"
    proxy.spoil = lambda _, forward: protected(forward(), ca.secret)

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            head = b"".join(iter(stream.readline, b"\r\n"))
            found = re.search(rb"content-length: *(\d+)", head, re.I)
            assert found
            message = ca.answer(stream.read(int(found.group(1))))
        fields = f"Content-Type: {kind}\r\n" if kind else ""
        connection.sendall(f"HTTP/1.1 200 OK\r\n{fields}Content-Length: {len(message)}\r\n\r\n".encode() + message)

    error = error_of(handlers(ca.options(), server=f"127.0.0.1:{tcp_server(serve)}", openssl_bin=openssl))
    if "pkixcmp" in kind and not is_3_0(openssl):
        assert "badTime" in error
    else:
        assert error.endswith(f"({hint('unexpected content type' if kind else 'missing content type')})")


# What would be the first hint of all, and a verdict.
TEXT = "certificate verify failed; wrong pbm value; missing key usage digitalSignature\rCMP error: request rejected by \
server:PKIStatus: rejection; PKIFailureInfo: badTime"
PLACES = {
    "reason": "HTTP/1.1 503 {}\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nno",
    "reason without a number": "HTTP/1.1 {}\r\n\r\n",
    "reason of no failure": "HTTP/1.1 200 {}\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nno",
    "code that nobody knows": "HTTP/1.1 204 {}\r\n\r\n",
    "content type": "HTTP/1.1 200 OK\r\nContent-Type: {}\r\nContent-Length: 2\r\n\r\nno",
    "text/ content type": "HTTP/1.1 500 OK\r\nContent-Type: text/{}\r\nContent-Length: 2\r\n\r\nno",
    "content length": "HTTP/1.1 200 OK\r\nContent-Type: application/pkixcmp\r\nContent-Length: {}\r\n\r\nno",
    "location": "HTTP/1.1 301 Moved\r\nLocation: {}\r\n\r\n",
    "some header": "HTTP/1.1 404 No\r\n{}: {}\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nno",
    "no HTTP": "{}\r\n\r\n",
    "body": "HTTP/1.1 404 No\r\nContent-Type: text/html\r\nContent-Length: 100\r\n\r\n{}",
}


# What a proxy can say before the tunnel is there.
OF_A_PROXY = ["reason", "reason without a number", "code that nobody knows", "some header", "no HTTP", "body"]


@binaries
@pytest.mark.parametrize("place, proxied", [*((place, False) for place in PLACES), *((p, True) for p in OF_A_PROXY)])
def test_http_server_chooses_no_hint(
    place: str, proxied: bool, openssl: str, ca: DemoCA, handlers: Handlers, tcp_server: TcpServer
) -> None:
    """Nor a verdict. The hint is the same, or missing, as where the server writes something harmless."""

    def hint_for(text: str) -> str:
        def serve(connection: socket.socket) -> None:
            connection.recv(65536)
            connection.sendall(PLACES[place].replace("{}", text).encode())

        address = f"127.0.0.1:{tcp_server(serve)}"
        changes = {"server": "https://ca.example", "proxy": address, "tls_used": "True"} if proxied else {}
        error = error_of(handlers({**ca.options(), "cmp_server": address}, openssl_bin=openssl, **SHORT, **changes))
        assert "rejected the request" not in error
        return next((hint for _, hint in HINTS if error.endswith(f"({hint})")), "")

    assert hint_for(TEXT) == hint_for("x" * len(TEXT))


@binaries
def test_the_name_of_a_sender_chooses_no_hint(openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """openssl says whose certificate is missing: a name that holds the words of another hint does not choose it."""
    hints = []
    for common_name in ("nobody", "approval"):
        who = [stranger("x", x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]))]
        proxy.spoil = lambda _, forward, who=who: signed(forward(), error_body("no"), KEY, who)  # type: ignore[misc]
        error = error_of(handlers(ca.options("certificate"), server=proxy.server, openssl_bin=openssl))
        hints.append(error.rpartition(" (")[2])
    assert hints[0] == hints[1]


@binaries
def test_a_proxy_that_wants_a_password_has_its_hint(
    openssl: str, ca: DemoCA, handlers: Handlers, tcp_server: TcpServer
) -> None:
    """The answer to CONNECT is 407 or 403: the hint for that, not one about a CMP server that is away."""
    for status in (407, 403):
        address = http_server(tcp_server, f"{status} No", "text/html")
        options = {"server": "https://ca.example:443", "proxy": address, "tls_used": "True", "openssl_bin": openssl}
        error = error_of(handlers(ca.options(), **options, **SHORT))
        assert error.endswith(f"({hint(f'code={status}')})")


@binaries
def test_a_signer_that_is_out_of_date_has_its_hint(openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    """The CA's answers are signed with a certificate that has expired: the hint says so."""
    later = str(int(time.time()) + 40 * 365 * 86400)
    error = error_of(handlers(ca.options("certificate"), openssl_bin=openssl, attime=later))
    assert error.endswith(f"({hint('cert has expired')})"), error


@binaries
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_names_in_a_certificate_make_no_verdict(
    authentication: str, openssl: str, ca: DemoCA, handlers: Handlers, proxy: Proxy
) -> None:
    """A stranger's certificate puts lines into openssl's text: they make no verdict, and take no hint away."""
    subject = sender_of(ca, authentication)
    chain = [stranger(f"x\n\nCMP error: {FORGED}\nCMP error: received error:PKIStatus: rejection\n", subject)]
    proxy.spoil = lambda _, forward: signed(forward(), error_body("no"), KEY, chain)
    error = error_of(handlers(ca.options(authentication), server=proxy.server, openssl_bin=openssl))
    assert "rejected the request" not in error and "badCertTemplate" not in error
    assert "; an unverified answer says: rejection, 'no'" in error


def test_unverified_words_choose_no_hint(ca: DemoCA, handlers: Handlers, proxy: Proxy) -> None:
    """A man in the middle writes words of other hints: the hint for the missing protection."""
    words = "certificate verify failed; badTime"
    proxy.spoil = lambda _, forward: with_body(forward(), error_body(words))
    error = error_of(handlers(ca.options(), server=proxy.server))
    assert error.endswith(f"; an unverified answer says: rejection, '{words}' ({hint('missing protection')})")
