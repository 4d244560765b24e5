"""A man in the middle: what he can do to the exchange between the handler and a CA."""

from __future__ import annotations

import datetime
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
