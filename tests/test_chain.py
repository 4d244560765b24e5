"""The bundle: the leaf, then its issuers in order, each once, and nothing else."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type

from conftest import Handlers, Mock, binaries, bundle_certificates, csr_pem
from demo_ca import DemoCA

DEMO = ["CN=a.example", "CN=Demo Issuing CA,O=Demo,C=DE", "CN=Demo Root CA,O=Demo,C=DE"]


def subjects(bundle: str | None) -> list[str]:
    """The subjects of a bundle, in order."""
    assert bundle
    return [certificate.subject.rfc4514_string() for certificate in bundle_certificates(bundle)]


# --- Real chains, from the demo CA ----------------------------------------------------------------------------------


@binaries
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
@pytest.mark.parametrize("trick", ["junk", "ca_pubs_only"])
def test_demo_ca(trick: str, authentication: str, openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    setattr(ca, trick, True)  # a stranger, the root, and the issuing CA twice; or nothing but caPubs
    error, bundle, _, _ = handlers(ca.options(authentication), openssl_bin=openssl).enroll(csr_pem(["a.example"]))
    assert error is None
    assert subjects(bundle) == DEMO
    leaf, issuer, root = bundle_certificates(bundle or "")
    leaf.verify_directly_issued_by(issuer)
    issuer.verify_directly_issued_by(root)


# --- Chains that no sane CA has, from OpenSSL's mock server ---------------------------------------------------------


class Authority(NamedTuple):
    """A name, its key, and how certificates refer to the key (None: not at all)."""

    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    identifier: bytes | None = None


def authority(common_name: str, identifier: bytes | None = None, *, printable: bool = False) -> Authority:
    tag = _ASN1Type.PrintableString if printable else None
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name, tag)])
    return Authority(name, ec.generate_private_key(ec.SECP256R1()), identifier)


def certificate(subject: Authority, issuer: Authority, number: int = 0) -> str:
    """A certificate in PEM; the number sets those apart that are alike otherwise."""
    start = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject.name).issuer_name(issuer.name)
    builder = builder.public_key(subject.key.public_key()).serial_number(x509.random_serial_number() + number)
    builder = builder.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=30))
    if subject.name != authority("leaf").name:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    if subject.identifier:
        builder = builder.add_extension(x509.SubjectKeyIdentifier(subject.identifier), False)
    if issuer.identifier:
        builder = builder.add_extension(x509.AuthorityKeyIdentifier(issuer.identifier, None, None), False)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


LEAF = authority("leaf")
ROOT, SUB, OTHER = authority("root", b"root"), authority("sub", b"sub"), authority("other", b"other")
NAMESAKE = Authority(SUB.name, OTHER.key, b"namesake")
NAMELESS_KEY = Authority(SUB.name, SUB.key)
SPELLED = authority("Some  ISSUING ca", printable=True)
LEAF_SUB, SUB_ROOT, ROOT_ROOT = certificate(LEAF, SUB), certificate(SUB, ROOT), certificate(ROOT, ROOT)
STRANGER = certificate(OTHER, OTHER)
SUB_OTHER, OTHER_SUB = certificate(SUB, OTHER), certificate(OTHER, SUB)

# name -> certificate, extraCerts, the expected bundle
CHAINS: dict[str, tuple[str, list[str], list[str]]] = {
    "in order": (LEAF_SUB, [SUB_ROOT, ROOT_ROOT], [LEAF_SUB, SUB_ROOT, ROOT_ROOT]),
    "the other way round": (LEAF_SUB, [ROOT_ROOT, SUB_ROOT], [LEAF_SUB, SUB_ROOT, ROOT_ROOT]),
    "each twice": (LEAF_SUB, [SUB_ROOT, ROOT_ROOT] * 2, [LEAF_SUB, SUB_ROOT, ROOT_ROOT]),
    "with the leaf": (LEAF_SUB, [LEAF_SUB, SUB_ROOT], [LEAF_SUB, SUB_ROOT]),
    "without the root": (LEAF_SUB, [SUB_ROOT], [LEAF_SUB, SUB_ROOT]),
    "gap": (LEAF_SUB, [ROOT_ROOT], [LEAF_SUB]),
    "stranger": (LEAF_SUB, [STRANGER, SUB_ROOT], [LEAF_SUB, SUB_ROOT]),
    "self-signed leaf": ((own := certificate(LEAF, LEAF)), [SUB_ROOT, ROOT_ROOT], [own]),
    "same name, another key": (LEAF_SUB, [certificate(NAMESAKE, ROOT), SUB_ROOT], [LEAF_SUB, SUB_ROOT]),
    "only of the same name": (LEAF_SUB, [certificate(NAMESAKE, ROOT)], [LEAF_SUB]),
    "no key identifiers": (
        (bare := certificate(LEAF, NAMELESS_KEY)),
        [(issuer := certificate(NAMELESS_KEY, ROOT)), ROOT_ROOT],
        [bare, issuer, ROOT_ROOT],
    ),
    "loop of two": (LEAF_SUB, [SUB_OTHER, OTHER_SUB], [LEAF_SUB, SUB_OTHER, OTHER_SUB]),
    "cross-signed": (LEAF_SUB, [SUB_ROOT, SUB_OTHER, OTHER_SUB, ROOT_ROOT], [LEAF_SUB, SUB_ROOT, ROOT_ROOT]),
    # RFC 5280, 7.1: neither case nor white space nor the type of string counts
    "spelled differently": (
        (odd := certificate(LEAF, Authority(authority("some issuing CA").name, SPELLED.key))),
        [(upper := certificate(SPELLED, ROOT))],
        [odd, upper],
    ),
}
MockServer = Callable[..., Mock]


@pytest.fixture
def serve(mock: MockServer, tmp_path: Path) -> Callable[[str, list[str]], Mock]:
    """A mock server that answers with a certificate and these extraCerts."""

    def start(leaf: str, extra: list[str]) -> Mock:
        (tmp_path / "leaf.pem").write_text(leaf)
        (tmp_path / "extra.pem").write_text("".join(extra) or STRANGER)
        return mock(tmp_path / "leaf.pem", "-rsp_extracerts", str(tmp_path / "extra.pem"))

    return start


def pem(certificates: list[str]) -> str:
    """As cryptography writes it, so that line lengths do not matter."""
    return "".join(
        c.public_bytes(serialization.Encoding.PEM).decode() for c in bundle_certificates("".join(certificates))
    )


@pytest.mark.parametrize("chain", CHAINS)
def test_chain(
    chain: str, serve: Callable[[str, list[str]], Mock], handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    leaf, extra, expected = CHAINS[chain]
    error, bundle, _, _ = handlers(serve(leaf, extra).options()).enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem(expected)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    alone = len(expected) == 1 and chain != "self-signed leaf"
    assert any("issuer" in warning and "cmp_untrusted" in warning for warning in warnings) == alone
    assert handlers.left() == []


# --- Issuers that only the configuration names ----------------------------------------------------------------------

KEY_PEM = OTHER.key.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()


@pytest.mark.parametrize(
    "files",
    [
        {"issuers.pem": SUB_ROOT + ROOT_ROOT},
        {"sub.pem": SUB_ROOT, "root.pem": ROOT_ROOT},
        {"garbage.pem": "\xff\x00 text before\n" + ROOT_ROOT + "a note\n" + SUB_ROOT + "-----BEGIN"},
        {"key.pem": SUB_ROOT + KEY_PEM + ROOT_ROOT},
    ],
    ids=["one file", "two files", "garbage around", "a key among them"],
)
def test_issuers_in_cmp_untrusted(
    files: dict[str, str], serve: Callable[[str, list[str]], Mock], handlers: Handlers, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    untrusted = ",".join(str(tmp_path / name) for name in files)
    handler = handlers(serve(LEAF_SUB, []).options(), untrusted=untrusted)
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([LEAF_SUB, SUB_ROOT, ROOT_ROOT])


def test_issuers_in_der(serve: Callable[[str, list[str]], Mock], handlers: Handlers, tmp_path: Path) -> None:
    der = x509.load_pem_x509_certificate(SUB_ROOT.encode()).public_bytes(serialization.Encoding.DER)
    (tmp_path / "sub.der").write_bytes(der)
    handler = handlers(serve(LEAF_SUB, []).options(), untrusted=str(tmp_path / "sub.der"))
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([LEAF_SUB, SUB_ROOT])


@pytest.mark.parametrize("trusted", ["", "no certificate at all\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END"])
def test_pool_file_that_openssl_refuses(trusted: str, ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text(trusted)
    error = handlers(ca.options(), trusted=str(tmp_path / "bad.pem")).enroll(csr_pem(["a.b"]))[0]
    assert error and error.isprintable() and "bad.pem" in error
    assert (ca.messages, handlers.left()) == ([], [])


def test_junk_at_length(serve: Callable[[str, list[str]], Mock], handlers: Handlers) -> None:
    """A long way up, and a lot that leads nowhere."""
    line = [authority(f"ca {i}", str(i).encode()) for i in range(40)]
    path = [certificate(low, high) for low, high in zip(line, line[1:])]
    strays = [certificate(Authority(a.name, OTHER.key, b"stray"), OTHER) for a in line]
    leaf = certificate(LEAF, line[0])
    server = serve(leaf, [*strays, *reversed(path)])
    error, bundle, _, _ = handlers(server.options()).enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([leaf, *path[:9]])  # no chain of this world is longer
