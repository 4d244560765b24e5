"""What the tests of each server share: CSRs of every kind, and how a certificate and its chain are looked at."""

from __future__ import annotations

import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cmp_ca_handler import CAhandler
from conftest import BINARIES, as_host, bundle_certificates, csr_pem

REASONS = (
    "unspecified keyCompromise cACompromise affiliationChanged superseded cessationOfOperation certificateHold"
    " privilegeWithdrawn aACompromise"
).split()


def version(openssl: str) -> tuple[int, ...]:
    """Of an openssl binary, such as (3, 5)."""
    word = subprocess.run([openssl, "version"], capture_output=True, text=True, check=True).stdout.split()[1]
    return tuple(int(part) for part in word.split(".")[:2])


def newest() -> str:
    """The newest of the binaries, to make keys that only it knows."""
    return max(BINARIES, key=version)


def csr_of_kind(kind: str, directory: Path, *extensions: str) -> str:
    """A CSR for www.example.com with a key of this kind, as "rsa:2048", "ec:P-256" or "ed25519"."""
    command = [newest(), "req", "-new", "-nodes", "-subj", "/CN=www.example.com", "-keyout", str(directory / "key.pem")]
    name, _, curve = kind.partition(":")
    command += ["-newkey", "ec", "-pkeyopt", f"ec_paramgen_curve:{curve}"] if name == "ec" else ["-newkey", kind]
    for extension in ("subjectAltName=DNS:www.example.com,DNS:example.com", *extensions):
        command += ["-addext", extension]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def enrolled(handler: CAhandler, csr: str, root: Path) -> list[x509.Certificate]:
    """What the handler gets for a CSR, once order and signatures of the bundle are checked."""
    error, bundle, _, identifier = handler.enroll(as_host(csr))
    assert (error, identifier) == (None, None)
    assert bundle
    return checked(bundle, csr, root)


def checked(bundle: str, csr: str, root: Path) -> list[x509.Certificate]:
    """The certificates of a bundle: for the CSR's key, in order, up to the root."""
    chain = bundle_certificates(bundle)
    spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    wanted = x509.load_pem_x509_csr(csr.encode())
    assert chain[0].public_key().public_bytes(*spki) == wanted.public_key().public_bytes(*spki)
    for certificate, issuer in zip(chain, chain[1:]):
        certificate.verify_directly_issued_by(issuer)
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(bundle)
        file.flush()
        verify = [newest(), "verify", "-CAfile", str(root), "-untrusted", file.name, file.name]
        result = subprocess.run(verify, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return chain


def refused(handler: CAhandler, csr: str = "") -> str:
    """The error that an enrolment ends with."""
    error, bundle, certificate, identifier = handler.enroll(as_host(csr or csr_pem(["www.example.com"])))
    assert error and (bundle, certificate, identifier) == (None, None, None)
    assert "\n" not in error
    return error


def enrol_many(handler: CAhandler, count: int, threads: int) -> set[int]:
    """Enrol that often from that many threads: the serial numbers."""

    def enrol(number: int) -> int:
        name = f"host{number}.example.com"
        error, bundle, _, _ = handler.enroll(as_host(csr_pem([name], name)))
        assert error is None and bundle, error
        leaf = bundle_certificates(bundle)[0]
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [name]
        return leaf.serial_number

    with ThreadPoolExecutor(threads) as pool:
        return set(pool.map(enrol, range(count)))


def leaf_for_host(chain: list[x509.Certificate]) -> str:
    """The leaf as acme2certifier hands it to revoke()."""
    return as_host(chain[0].public_bytes(serialization.Encoding.PEM).decode())
