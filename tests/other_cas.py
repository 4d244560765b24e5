"""Demo CAs that do what CAs elsewhere do, and what nobody needs who tries the demo."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import demo_ca
from demo_ca import DemoCA, Issued, Work, read_der, write_der


def make_stranger(directory: Path) -> None:
    """The self-signed certificate of a CA that has nothing to do with the demo CA: stranger.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "A Stranger")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(3650))
    builder = builder.add_extension(x509.BasicConstraints(True, None), True)
    certificate = builder.sign(key, hashes.SHA256())
    (directory / "stranger.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


class JunkCA(DemoCA):
    """Sends a stranger, the root and the issuing CA, this one twice, in the extraCerts."""

    def _on_cert_request(self, *arguments: Any) -> int | None:
        *_, chain, _ = arguments
        answer = super()._on_cert_request(*arguments)
        if isinstance(self._thread.work.transaction.state, Issued):
            stranger = demo_ca.from_der("d2i_X509", demo_ca.read_pem(self.directory / "stranger.pem"))
            assert stranger
            chain[0] = demo_ca.certificate_stack(
                [stranger, self._store.objects["root.pem"], self._store.objects["sub.pem"]]
            )
        return answer

    def _answer(self, request: int, work: Work) -> bytes:
        answer = super()._answer(request, work)
        if isinstance(work.transaction.state, Issued) and demo_ca.read_envelope(answer).name in ("ip", "cp", "kup"):
            return repeat_last_certificate(answer)
        return answer


class CaPubsCA(DemoCA):
    """Sends the issuing CA and the root in the caPubs only."""

    def _on_cert_request(self, *arguments: Any) -> int | None:
        *_, chain, ca_pubs = arguments
        answer = super()._on_cert_request(*arguments)
        chain[0], ca_pubs[0] = None, chain[0]
        if ca_pubs[0]:
            root = self._store.objects["root.pem"]
            demo_ca.libcrypto().X509_up_ref(root)
            demo_ca.libcrypto().OPENSSL_sk_push(ca_pubs[0], root)
        return answer


def repeat_last_certificate(message: bytes) -> bytes:
    """Add the last of the extraCerts once more: OpenSSL's server does not repeat any, other CAs do.

    The extraCerts are outside of the protection (RFC 4210 section 5.1), so this breaks nothing.
    """
    *others, extra_certs = read_der(message).parts()
    certificates = read_der(extra_certs.content)
    repeated = write_der(0x30, certificates.content + certificates.parts()[-1].whole)
    return write_der(0x30, b"".join(part.whole for part in others) + write_der(0xA1, repeated))


class ModifyingCA(DemoCA):
    """Revokes for a reason that it does not know with status grantedWithMods, RFC 4210 section 5.2.3."""

    def _on_rr(self, *arguments: Any) -> int | None:
        before = len(self._store.revoked())
        answer = super()._on_rr(*arguments)
        _, reason = demo_ca.read_revocation(self._thread.work.envelope.body)
        return demo_ca.status_info(1) if reason > 8 and len(self._store.revoked()) > before else answer
