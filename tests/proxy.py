"""A man in the middle: what he can do to the exchange between the handler and a CA; and messages in the CA's name."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import socket
import urllib.request
from collections.abc import Sequence
from typing import Callable

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import demo_ca
from demo_ca import DemoCA, read_der, write_der

TcpServer = Callable[[Callable[[socket.socket], None]], int]
Forward = Callable[[], bytes]
ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")  # AlgorithmIdentifier


def note(answers: list[bytes]) -> Callable[[Forward], bytes]:
    """For `spoil_next`: forwards a request, and notes the answer."""

    def forward_it(forward: Forward) -> bytes:
        answers.append(forward())
        return answers[-1]

    return forward_it


class Proxy:
    """Stands between the handler and a demo CA, and spoils one exchange if told so.

    `spoil(request, forward)` gets the name of each request ("ir", "pollReq", ..); it returns the answer, most often
    `forward()`, the CA's, or None to close the connection without one.
    """

    def __init__(self, ca: DemoCA, tcp_server: TcpServer) -> None:
        self.spoil: Callable[[str, Forward], bytes | None] = lambda _, forward: forward()
        self.url = f"http://{ca.server}/{ca.path}"
        self.server = f"127.0.0.1:{tcp_server(self._serve)}"

    def spoil_next(self, name: str, answer: Callable[[Forward], bytes | None]) -> None:
        """Spoil the next request of this name, and no other."""

        def spoil(request: str, forward: Forward) -> bytes | None:
            if request != name:
                return forward()
            self.spoil = lambda _, forward: forward()
            return answer(forward)

        self.spoil = spoil

    def _serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as stream:
            while stream.readline().startswith(b"POST"):
                header = dict(line.lower().split(b":", 1) for line in iter(stream.readline, b"\r\n"))
                message = stream.read(int(header[b"content-length"]))

                def forward(message: bytes = message) -> bytes:
                    request = urllib.request.Request(self.url, message, {"Content-Type": "application/pkixcmp"})
                    with urllib.request.urlopen(request, timeout=30) as response:
                        return bytes(response.read())

                answer = self.spoil(demo_ca.read_envelope(message).name, forward)
                if answer is None:
                    return
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/pkixcmp\r\nContent-Length: {len(answer)}\r\n\r\n"
                connection.sendall(head.encode() + answer)


def spoilt(how: str, answer: bytes) -> bytes:
    """A pollRep that is not what the client waits for."""
    parts = [part.whole for part in read_der(answer).parts()]
    if how == "tampered":  # as one made with another secret: the protection does not fit
        parts[2] = parts[2][:-1] + bytes([parts[2][-1] ^ 1])
    if how == "unprotected":
        parts = parts[:2]
    whole = write_der(0x30, b"".join(parts))
    return {"garbage": b"<html>garbage</html>", "empty": b"", "cut short": whole[:-20]}.get(how, whole)


def nested(content: bytes, *tags: int) -> bytes:
    """DER elements within each other, the outermost tag first."""
    for tag in reversed(tags):
        content = write_der(tag, content)
    return content


def with_body(answer: bytes, body: bytes) -> bytes:
    """A message with the header of this one, another body, and no protection that fits."""
    return write_der(0x30, read_der(answer).parts()[0].whole + body)


def with_certificates(answer: bytes, certificates: Sequence[bytes]) -> bytes:
    """The message with other extraCerts: they stand outside the protection (RFC 4210, 5.1)."""
    header, body, *rest = read_der(answer).parts()  # the tag of ip is that of extraCerts
    kept = [header.whole, body.whole, *(part.whole for part in rest if part.tag != 0xA1)]
    return write_der(0x30, b"".join([*kept, nested(b"".join(certificates), 0xA1, 0x30)]))


def name(common_name: str) -> x509.Name:
    """A distinguished name."""
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def forge(key: ec.EllipticCurvePrivateKey, subject: x509.Name, issuer: x509.Name, *more: x509.ExtensionType) -> bytes:
    """A CA certificate for this key, and by it, whatever its names and extensions say."""
    begins = datetime.datetime(2026, 1, 1)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(begins).not_valid_after(begins.replace(year=2050))
    for extension in (x509.BasicConstraints(True, None), *more):
        builder = builder.add_extension(extension, False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def signed(answer: bytes, body: bytes, key: ec.EllipticCurvePrivateKey, chain: Sequence[x509.Certificate]) -> bytes:
    """The message with another body, signed anew with this key, whose certificate `chain` begins with."""
    version, _, recipient, *fields = read_der(answer).parts()[0].parts()
    header = version.whole + write_der(0xA4, chain[0].subject.public_bytes()) + recipient.whole
    for field in fields:
        if field.tag != 0xA2:  # senderKID
            header += nested(ECDSA_WITH_SHA256, 0xA1) if field.tag == 0xA1 else field.whole
    protected = write_der(0x30, header) + body
    signature = key.sign(write_der(0x30, protected), ec.ECDSA(hashes.SHA256()))
    message = write_der(0x30, protected + nested(b"\0" + signature, 0xA0, 0x03))
    return with_certificates(message, [c.public_bytes(serialization.Encoding.DER) for c in chain])


# --- Messages in the name of the CA

SECRET = "demo-secret"  # of demo_ca.py
KEY = ec.generate_private_key(ec.SECP256R1())


REJECTED = bytes.fromhex("020102")  # PKIStatus


FORGED = "request rejected by server:PKIStatus: rejection; PKIFailureInfo: badCertTemplate"


PKICONF = bytes.fromhex("b3020500")


def message_parts(message: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """PKIMessage: header, body, protection and extraCerts, the last two empty if there are none (RFC 4210, 5.1)."""
    parts = read_der(message).parts()
    by_tag = {part.tag: part.whole for part in parts[2:]}
    return parts[0].whole, parts[1].whole, by_tag.get(0xA0, b""), by_tag.get(0xA1, b"")


def protected(old_header: bytes, header: bytes, body: bytes, extra: bytes) -> bytes:
    """A message protected by the shared secret, as its CA can make any (PasswordBasedMac, RFC 4210, 5.1.3.1).

    The one piece of cryptography that is done in Python here: no program can be told to protect nonsense.
    """
    algorithm = next(part for part in read_der(old_header).parts() if part.tag == 0xA1)
    salt, _, iterations, _ = read_der(algorithm.content).parts()[1].parts()
    key = SECRET.encode() + salt.content
    for _ in range(int.from_bytes(iterations.content, "big")):
        key = hashlib.sha256(key).digest()
    mac = hmac.new(key, write_der(0x30, header + body), "sha1").digest()
    return write_der(0x30, header + body + write_der(0xA0, write_der(3, b"\0" + mac)) + extra)


def integer(number: int) -> bytes:
    """An INTEGER."""
    return write_der(2, number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True))


def free_text(*texts: bytes) -> bytes:
    """PKIFreeText (RFC 4210, 5.1.1)."""
    return write_der(0x30, b"".join(write_der(0x0C, text) for text in texts))


def status_info(status: int, texts: Sequence[bytes], bits: bytes) -> bytes:
    """PKIStatusInfo (5.2.3)."""
    return write_der(
        0x30, integer(status) + (free_text(*texts) if texts else b"") + (write_der(3, bits) if bits else b"")
    )


def body(tag: int, content: bytes) -> bytes:
    """A PKIBody of one SEQUENCE."""
    return write_der(0xA0 | tag, write_der(0x30, content))


def cert_response(tag: int, info: bytes, certificate: bytes, number: int = 0) -> bytes:
    """CertRepMessage (5.3.4) with one response."""
    pair = write_der(0x30, write_der(0xA0, certificate)) if certificate else b""
    return body(tag, write_der(0x30, write_der(0x30, integer(number) + info + pair)))


def poll_rep(after: int, texts: Sequence[bytes]) -> bytes:
    """PollRepContent (5.3.22)."""
    return body(26, write_der(0x30, integer(0) + integer(after) + (free_text(*texts) if texts else b"")))


def error_body(*texts: str, status: bytes = REJECTED) -> bytes:
    """An error message (RFC 4210, 5.3.21) with a statusString."""
    strings = b"".join(write_der(0x0C, text.encode()) for text in texts)
    return nested(status + (write_der(0x30, strings) if texts else b""), 0xB7, 0x30, 0x30)


def stranger(text: str, subject: x509.Name) -> x509.Certificate:
    """Somebody's own certificate; openssl prints what its authorityKeyIdentifier calls the issuer as it is."""
    issuer = x509.AuthorityKeyIdentifier(None, [x509.UniformResourceIdentifier(text)], 7)
    return x509.load_der_x509_certificate(forge(KEY, subject, name("nobody"), issuer))


def sender_of(ca: DemoCA, authentication: str) -> x509.Name:
    """Who sends the CA's answers."""
    signer = {"secret": "sub", "certificate": "cmp"}[authentication]
    return x509.load_pem_x509_certificates((ca.directory / f"{signer}.pem").read_bytes())[0].subject
