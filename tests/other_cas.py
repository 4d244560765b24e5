"""Demo CAs that do what CAs elsewhere do, and what nobody needs who tries the demo."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

import demo_ca
from demo_ca import DemoCA, Issued, Work, read_der, write_der

PrivateKey = Union[ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey]


def make_stranger(directory: Path) -> None:
    """The self-signed certificate of a CA that has nothing to do with the demo CA, and its key: stranger.pem, .key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "A Stranger")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(3650))
    builder = builder.add_extension(x509.BasicConstraints(True, None), True)
    certificate = builder.sign(key, hashes.SHA256())
    (directory / "stranger.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "stranger.key").touch(0o600)
    (directory / "stranger.key").write_bytes(key_pem(key))


def key_pem(key: PrivateKey) -> bytes:
    """A private key in PEM."""
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def mutual_tls(ca: DemoCA) -> dict[str, str]:
    """The section for a CA behind TLS, with a client certificate of another root than the server's."""
    own = {"cmp_tls_cert": f"{ca.directory}/stranger.pem", "cmp_tls_key": f"{ca.directory}/stranger.key"}
    return {**ca.options(), **own}


def new_signer(directory: Path, kind: str = "EC", subject: x509.Name | None = None) -> tuple[bytes, bytes]:
    """Another certificate and key, in PEM, for the signer of the demo CA's answers, under another name if told so."""
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "EC" else rsa.generate_private_key(65537, 2048)
    old, issuer = (x509.load_pem_x509_certificate((directory / f"{name}.pem").read_bytes()) for name in ("cmp", "root"))
    builder = x509.CertificateBuilder(issuer.subject, subject or old.subject, key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    for extension in old.extensions:
        same = not isinstance(extension.value, x509.SubjectKeyIdentifier)
        value = extension.value if same else x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(value, extension.critical)
    root = serialization.load_pem_private_key((directory / "root.key").read_bytes(), None)
    assert isinstance(root, ec.EllipticCurvePrivateKey)
    return builder.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), key_pem(key)


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
