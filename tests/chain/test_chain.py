"""The bundle is the leaf, then its issuers in order, each once, and nothing else."""

from __future__ import annotations

import datetime
import logging
import os
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NamedTuple
from unittest.mock import Mock as Mocked

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.name import _ASN1Type

import cmp_ca_handler
from conftest import OPENSSL, Handlers, Mock, binaries, bundle_certificates, csr_pem
from demo_ca import DemoCA, read_der, write_der
from other_cas import CaPubsCA, JunkCA

DEMO = ["CN=a.example", "CN=Demo Issuing CA,O=Demo,C=DE", "CN=Demo Root CA,O=Demo,C=DE"]


def subjects(bundle: str | None) -> list[str]:
    """The subjects of a bundle, in order."""
    assert bundle
    return [certificate.subject.rfc4514_string() for certificate in bundle_certificates(bundle)]


# --- Real chains, from the demo CA ----------------------------------------------------------------------------------


@binaries
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
@pytest.mark.parametrize("kind", [JunkCA, CaPubsCA])
def test_strangers_and_repetitions_are_left_out(
    kind: type[DemoCA], authentication: str, openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers
) -> None:
    """extraCerts with a stranger, the root, and the issuing CA twice; or nothing but caPubs."""
    ca = make_ca(kind)
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


NOW = datetime.datetime.now(datetime.timezone.utc)


def certificate(
    subject: Authority,
    issuer: Authority,
    days: tuple[int, int] = (0, 30),
    reference: tuple[x509.Name, int] | None = None,
    number: int = 0,
) -> str:
    """A certificate in PEM, valid from and to these `days` from now.

    `reference` is the issuer and the serial in its authorityKeyIdentifier, `number` its own serial.
    """
    builder = x509.CertificateBuilder().subject_name(subject.name).issuer_name(issuer.name)
    builder = builder.public_key(subject.key.public_key()).serial_number(number or x509.random_serial_number())
    start, end = (NOW + datetime.timedelta(days=day) for day in days)
    builder = builder.not_valid_before(start).not_valid_after(end)
    if subject.name != authority("leaf").name:
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    if subject.identifier:
        builder = builder.add_extension(x509.SubjectKeyIdentifier(subject.identifier), False)
    if issuer.identifier or reference:
        named = ([x509.DirectoryName(reference[0])], reference[1]) if reference else (None, None)
        builder = builder.add_extension(x509.AuthorityKeyIdentifier(issuer.identifier, *named), False)
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
def serve(mock: MockServer, tmp_path: Path) -> Callable[..., Mock]:
    """A mock server that answers with a certificate, these extraCerts and caPubs."""

    def start(leaf: str, extra: list[str], capubs: Sequence[str] = (), openssl: str = OPENSSL) -> Mock:
        (tmp_path / "leaf.pem").write_text(leaf)
        (tmp_path / "extra.pem").write_text("".join(extra) or STRANGER)
        (tmp_path / "capubs.pem").write_text("".join(capubs))
        more = ["-rsp_capubs", str(tmp_path / "capubs.pem")] if capubs else []
        return mock(tmp_path / "leaf.pem", "-rsp_extracerts", str(tmp_path / "extra.pem"), *more, openssl=openssl)

    return start


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log warns of, the configuration apart."""
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    return [message for message in messages if not message.startswith("configuration:")]


def verify(bundle: str | None, root: str, openssl: str, directory: Path) -> str:
    """What `openssl verify` has against a bundle, as a client sees it who trusts `root`."""
    leaf, *rest = bundle_certificates(bundle or "")
    files = {"client-root.pem": root, "client-leaf.pem": pem_of([leaf]), "client-rest.pem": pem_of(rest)}
    for name, text in files.items():
        (directory / name).write_text(text)
    command = [openssl, "verify", "-trusted", "client-root.pem"]
    command += ["-untrusted", "client-rest.pem"] if rest else []
    result = subprocess.run([*command, "client-leaf.pem"], cwd=directory, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def pem_of(certificates: list[x509.Certificate]) -> str:
    return "".join(c.public_bytes(serialization.Encoding.PEM).decode() for c in certificates)


def pem(certificates: list[str]) -> str:
    """As cryptography writes it, so that line lengths do not matter."""
    return pem_of(bundle_certificates("".join(certificates)))


@pytest.mark.parametrize("chain", CHAINS)
def test_the_bundle_is_the_chain_in_order(
    chain: str, serve: Callable[..., Mock], handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA that sends issuers in any order, twice, or with strangers: the exact bundle; none: a warning."""
    leaf, extra, expected = CHAINS[chain]
    error, bundle, _, _ = handlers(serve(leaf, extra).options()).enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem(expected)
    alone = len(expected) == 1 and chain != "self-signed leaf"
    assert any("issuer's certificate is not there" in warning for warning in warnings(caplog)) == alone
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
def test_issuers_in_cmp_untrusted_complete_the_chain(
    files: dict[str, str], serve: Callable[..., Mock], handlers: Handlers, tmp_path: Path
) -> None:
    """A CA that sends no issuers: they come from cmp_untrusted, one file or two, also from among other text."""
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    untrusted = ",".join(str(tmp_path / name) for name in files)
    handler = handlers(serve(LEAF_SUB, []).options(), untrusted=untrusted)
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([LEAF_SUB, SUB_ROOT, ROOT_ROOT])


@pytest.mark.parametrize("trusted", ["", "no certificate at all\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END"])
def test_a_pool_file_that_openssl_refuses_is_named(
    trusted: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """A cmp_trusted without a readable certificate: the error names the file, and nothing is sent."""
    (tmp_path / "bad.pem").write_text(trusted)
    error = handlers(ca.options(), trusted=str(tmp_path / "bad.pem")).enroll(csr_pem(["a.b"]))[0]
    assert error and error.isprintable() and "bad.pem" in error
    assert (ca.messages, handlers.left()) == ([], [])


def test_junk_at_length_does_not_hide_the_chain(serve: Callable[..., Mock], handlers: Handlers) -> None:
    """A long way up, and a lot that leads nowhere."""
    line = [authority(f"ca {i}", str(i).encode()) for i in range(40)]
    path = [certificate(low, high) for low, high in zip(line, line[1:])]
    strays = [certificate(Authority(a.name, OTHER.key, b"stray"), OTHER) for a in line]
    leaf = certificate(LEAF, line[0])
    server = serve(leaf, [*strays, *reversed(path)])
    error, bundle, _, _ = handlers(server.options()).enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([leaf, *path[:9]])  # no chain of this world is longer


# --- Several that could be the issuer: openssl decides, wherever they come from ------------------------------------

GOOD_ROOT = authority("good root", b"good root")
# The same authority, as certificates refer to its key: by an identifier, or not at all.
KNOWN, SILENT = authority("ca", b"ca"), Authority(authority("ca").name, ec.generate_private_key(ec.SECP256R1()))
IMPOSTOR = authority("ca")  # the name, another key
EVIL = authority("Evil Root", b"evil")
ROOT_PEM = certificate(GOOD_ROOT, GOOD_ROOT)
OLD, NEW = (-400, -1), (-1, 300)


def impostors(real: Authority) -> list[str]:
    """CAs of the name of `real` with another key: without an identifier, with another one, with the same one."""
    kinds = [IMPOSTOR, IMPOSTOR._replace(identifier=b"other"), IMPOSTOR._replace(identifier=b"ca")]
    return [certificate(kind, GOOD_ROOT) for kind in kinds] + [certificate(IMPOSTOR, IMPOSTOR)]


class Scene(NamedTuple):
    """A leaf, those who are to be seen in its bundle, and those who are not."""

    leaf: str
    good: list[str]
    bad: list[str]


def by_serial(real: Authority, number: int) -> Scene:
    """Two certificates for one key; the leaf names one of them by issuer and serial."""
    first, second = (certificate(real, GOOD_ROOT, number=n) for n in (number, number + 1))
    leaf = certificate(LEAF, real, reference=(GOOD_ROOT.name, number))
    elsewhere = certificate(real, EVIL, number=number)  # that serial, but another issuer
    return Scene(leaf, [first, ROOT_PEM], [second, elsewhere])


def own_name() -> Scene:
    """A CA below a CA of its own name."""
    above, below = authority("ca", b"above"), authority("ca", b"below")
    root = certificate(above, above)
    return Scene(certificate(LEAF, below), [certificate(below, above), root], [])


SCENES = {
    "key identifiers": Scene(certificate(LEAF, KNOWN), [certificate(KNOWN, GOOD_ROOT), ROOT_PEM], impostors(KNOWN)),
    "no identifiers": Scene(certificate(LEAF, SILENT), [certificate(SILENT, GOOD_ROOT), ROOT_PEM], impostors(SILENT)),
    "leaf without": Scene(
        certificate(LEAF, KNOWN._replace(identifier=None)), [certificate(KNOWN, GOOD_ROOT), ROOT_PEM], impostors(KNOWN)
    ),
    "expired": Scene(
        certificate(LEAF, KNOWN),
        [certificate(KNOWN, GOOD_ROOT, NEW), certificate(GOOD_ROOT, GOOD_ROOT, NEW)],
        [
            certificate(KNOWN, GOOD_ROOT, OLD),
            certificate(GOOD_ROOT, GOOD_ROOT, OLD),
            certificate(KNOWN, GOOD_ROOT, (9, 99)),
        ],
    ),
    "serial": by_serial(SILENT, 4711),
    "serial and key": by_serial(KNOWN, 4711),
    "below its own name": own_name(),
}
SOURCES = ("untrusted", "trusted", "capubs", "extra")
PLACES = [  # of the wrong ones, of the right ones, and whether they are in the usual order
    *((source, source, order) for source in SOURCES for order in (1, -1)),
    *(("untrusted", "extra", 1), ("untrusted", "capubs", 1), ("capubs", "extra", 1), ("extra", "capubs", 1)),
]


@pytest.mark.parametrize("scene", SCENES)
def test_the_right_issuer_is_chosen(
    scene: str,
    serve: Callable[..., Mock],
    handlers: Handlers,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The right ones in one source, the wrong ones in another, or in the same, in either order."""
    leaf, good, bad = SCENES[scene]
    for place in PLACES:
        false, real, order = place
        sources: dict[str, list[str]] = {source: [] for source in SOURCES}
        sources[real] += good
        sources[false] += bad
        files = {}
        for name, certificates in sources.items():
            if certificates and name in ("untrusted", "trusted"):
                (tmp_path / f"{name}.pem").write_text("".join(certificates[::order]))
                files[name] = str(tmp_path / f"{name}.pem")
        server = serve(leaf, sources["extra"][::order], sources["capubs"][::order])
        error, bundle, _, _ = handlers(server.options(), **files).enroll(csr_pem([], "leaf", key=LEAF.key))
        assert error is None, place
        assert pem([bundle or ""]) == pem([leaf, *good]), place
        assert verify(bundle, good[-1], OPENSSL, tmp_path) == "", place
    assert [w for w in warnings(caplog) if "passed over a certificate" not in w] == []
    assert handlers.left() == []


CROSS, EVIL_ROOT = certificate(KNOWN, EVIL), certificate(EVIL, EVIL)
CA_PEM, LEAF_KNOWN = certificate(KNOWN, GOOD_ROOT), certificate(LEAF, KNOWN)
ROOT_CROSS = certificate(GOOD_ROOT, EVIL)
EXPIRED = certificate(KNOWN, GOOD_ROOT, OLD)
ROOT_OLD = certificate(GOOD_ROOT, GOOD_ROOT, OLD)
# So many that to look at all of them would leave nothing for what is configured.
EVILS = [authority(f"Evil Root {n}", b"evil %d" % n) for n in range(26)]
STRANGERS = [certificate(authority("ca", b"ca"), evil) for evil in EVILS]
CROSSES = [certificate(KNOWN, evil) for evil in EVILS]


@pytest.mark.parametrize(
    ("configuration", "capubs", "extra", "expected"),
    [
        ({"trusted": [ROOT_PEM]}, [], [CROSS, EVIL_ROOT, CA_PEM], [CA_PEM, ROOT_PEM]),
        ({"untrusted": [CA_PEM]}, [], [CROSS, EVIL_ROOT], [CA_PEM]),
        ({"untrusted": [certificate(KNOWN, GOOD_ROOT, (0, 2)), CA_PEM]}, [], [], [CA_PEM]),  # the leaf lasts longer
        ({"untrusted": [CA_PEM, ROOT_PEM]}, [], [CROSS, EVIL_ROOT], [CA_PEM, ROOT_PEM]),
        ({}, [CA_PEM, ROOT_PEM], [CROSS, EVIL_ROOT], [CA_PEM, ROOT_PEM]),
        ({}, [ROOT_PEM], [CROSS, EVIL_ROOT, CA_PEM], [CA_PEM, ROOT_PEM]),
        ({"trusted": [ROOT_PEM]}, [], [ROOT_CROSS, CROSS, EVIL_ROOT, CA_PEM], [CA_PEM, ROOT_PEM]),
        ({"trusted": [ROOT_PEM], "untrusted": [EXPIRED]}, [], [CROSS, EVIL_ROOT], [EXPIRED, ROOT_PEM]),
        ({"trusted": [ROOT_PEM], "untrusted": [EXPIRED]}, [], STRANGERS, [EXPIRED, ROOT_PEM]),
        ({"trusted": [ROOT_PEM], "untrusted": [EXPIRED]}, [], CROSSES, [EXPIRED, ROOT_PEM]),
        ({"out_trusted": [ROOT_PEM]}, [], [CA_PEM], [CA_PEM, ROOT_PEM]),  # openssl itself is misled by the others
        # An authority higher up has expired, so the other way is better though it comes later.
        ({"untrusted": [CA_PEM, ROOT_OLD, CROSS, EVIL_ROOT]}, [], [], [CROSS, EVIL_ROOT]),
        # The anchor was renewed: the same name, the same key.
        ({"trusted": [ROOT_OLD], "untrusted": [CROSS, EVIL_ROOT, CA_PEM]}, [], [ROOT_PEM], [CA_PEM, ROOT_PEM]),
        # A known root is less than a trusted one.
        ({"trusted": [EVIL_ROOT], "untrusted": [CA_PEM, ROOT_PEM, CROSS]}, [], [], [CROSS, EVIL_ROOT]),
        # Here it is the cross-certificate that leads to what the administrator trusts.
        ({"trusted": [EVIL_ROOT], "untrusted": [CA_PEM]}, [], [CROSS], [CROSS, EVIL_ROOT]),
    ],
)
def test_a_cross_certificate_is_taken_only_where_its_way_is_better(
    configuration: dict[str, list[str]],
    capubs: list[str],
    extra: list[str],
    expected: list[str],
    serve: Callable[..., Mock],
    handlers: Handlers,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A certificate for the issuing CA's name and key, signed by a stranger: the signature below it is genuine."""
    files: dict[str, str | None] = {"trusted": None}
    for name, certificates in configuration.items():
        (tmp_path / f"{name}.pem").write_text("".join(certificates))
        files[name] = str(tmp_path / f"{name}.pem")
    server = serve(LEAF_KNOWN, extra, capubs)
    handler = handlers(server.options(), **files)
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([LEAF_KNOWN, *expected])
    assert any("valid only from" in w for w in warnings(caplog)) == (EXPIRED in expected)
    if EXPIRED not in expected:
        assert verify(bundle, expected[-1] if expected != [CA_PEM] else ROOT_PEM, OPENSSL, tmp_path) == ""


# --- What it costs -------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(tmp_path: Path) -> Callable[[], tuple[str, Callable[[], list[str]]]]:
    """An openssl that counts: its path, and a function that gives the commands that it ran."""

    def make() -> tuple[str, Callable[[], list[str]]]:
        log, program = tmp_path / "commands.log", tmp_path / "counting-openssl"
        program.write_text(f'#!/bin/sh\necho "$1" >> {log}\nexec {OPENSSL} "$@"\n')
        program.chmod(0o755)
        return str(program), lambda: log.read_text().split() if log.exists() else []

    return make


Counted = Callable[[], tuple[str, Callable[[], list[str]]]]


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("identifier", [b"ca", None])
def test_many_false_issuers_cost_few_processes(
    identifier: bytes | None, right: bool, serve: Callable[..., Mock], handlers: Handlers, counted: Counted
) -> None:
    """Anybody on the way can put as many into extraCerts as he likes. Each that is looked at costs a process."""
    program, commands = counted()
    false = [certificate(IMPOSTOR._replace(identifier=identifier), EVIL, number=n) for n in range(1, 181)]
    server = serve(LEAF_KNOWN, [*false, EVIL_ROOT, *([CA_PEM] if right else [])])
    handler = handlers(server.options(), openssl_bin=program)
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) in (pem([LEAF_KNOWN]), pem([LEAF_KNOWN, CA_PEM]))
    assert commands().count("verify") <= 6


def test_many_cross_certificates_cost_few_processes(
    serve: Callable[..., Mock], handlers: Handlers, counted: Counted
) -> None:
    """All of them are genuine, and none of them leads anywhere."""
    program, commands = counted()
    mesh = [authority(f"mesh {n}", b"mesh") for n in range(12)]
    extra = [certificate(KNOWN, m) for m in mesh] + [certificate(a, b) for a in mesh for b in mesh if a != b]
    error, bundle, _, _ = handlers(serve(LEAF_KNOWN, extra).options(), openssl_bin=program).enroll(
        csr_pem([], "leaf", key=LEAF.key)
    )
    assert error is None
    assert 1 < len(bundle_certificates(bundle or "")) <= 10
    assert commands().count("verify") <= 24


def test_a_mesh_of_known_authorities_is_searched_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links that are remembered cost no process, but there are 11! ways through this mesh. Here all are said to be."""
    mesh = [authority(f"mesh {n}", f"{n}".encode()) for n in range(12)]
    ders = [pem_der(certificate(a, b)) for a in mesh for b in mesh if a != b]
    finder = cmp_ca_handler.ChainFinder.__new__(cmp_ca_handler.ChainFinder)
    finder.sent = [cmp_ca_handler._certificate(der) for der in ders]
    finder.named, finder.anchors, finder.protected = [], set(), set()
    looked = Mocked(return_value=True)
    monkeypatch.setattr(cmp_ca_handler.ChainFinder, "signed_by", looked)
    finder.leaf = cmp_ca_handler._certificate(pem_der(certificate(LEAF, mesh[0])))
    chain, anchored, ends = finder.best()
    assert 1 < len(chain) <= 10
    assert (anchored, ends) == (False, False)
    assert 0 < looked.call_count < 1000


def pem_der(text: str) -> bytes:
    return x509.load_pem_x509_certificate(text.encode()).public_bytes(serialization.Encoding.DER)


def test_a_copy_of_the_issuer_that_calls_itself_a_root_is_passed_over(
    serve: Callable[..., Mock], handlers: Handlers, tmp_path: Path
) -> None:
    """A stranger's certificate of the issuer's name and key, which names itself as its issuer."""
    copy = certificate(KNOWN, KNOWN._replace(key=EVIL.key))
    (tmp_path / "issuer.pem").write_text(CA_PEM)
    server = serve(LEAF_KNOWN, [copy])
    handler = handlers(server.options(), untrusted=str(tmp_path / "issuer.pem"))
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([LEAF_KNOWN, CA_PEM])


@pytest.mark.parametrize("source", SOURCES)
def test_a_later_leaf_costs_nothing(
    source: str, serve: Callable[..., Mock], handlers: Handlers, tmp_path: Path, counted: Counted
) -> None:
    """The same issuers for a second leaf: no `openssl verify`; one for each that does not name its issuer's key."""
    program, commands = counted()
    (tmp_path / "issuers.pem").write_text(CA_PEM + ROOT_PEM)
    files = {source: str(tmp_path / "issuers.pem")} if source in ("untrusted", "trusted") else {}
    sent = {"extra": [CA_PEM, ROOT_PEM] * (source == "extra"), "capubs": [CA_PEM, ROOT_PEM] * (source == "capubs")}
    counts = []
    nameless, *more = (certificate(LEAF, KNOWN._replace(identifier=None)) for _ in range(99))
    another = next(leaf for leaf in more if len(pem_der(leaf)) == len(pem_der(nameless)))  # signatures vary in length
    for leaf in (LEAF_KNOWN, certificate(LEAF, KNOWN), nameless, another):
        server = serve(leaf, **sent)
        handler = handlers(server.options(), openssl_bin=program, **files)
        error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
        assert error is None
        assert pem([bundle or ""]) == pem([leaf, CA_PEM, ROOT_PEM])
        counts.append(commands().count("verify"))
        server.process.kill()
        server.process.wait()
    assert counts == [3, 3, 4, 5]


def test_a_renewed_issuer_of_the_same_key_is_the_one_that_a_later_leaf_names(
    serve: Callable[..., Mock], handlers: Handlers, tmp_path: Path
) -> None:
    """By issuer and serial (AKI): the older one is configured, and remembered for the leaf before."""
    old, new = (certificate(KNOWN, GOOD_ROOT, number=number) for number in (1, 2))
    (tmp_path / "old.pem").write_text(old + ROOT_PEM)
    for number, issuer in ((1, old), (2, new)):
        leaf = certificate(LEAF, KNOWN, reference=(GOOD_ROOT.name, number))
        server = serve(leaf, [issuer])
        handler = handlers(server.options(), untrusted=str(tmp_path / "old.pem"))
        assert pem([handler.enroll(csr_pem([], "leaf", key=LEAF.key))[1] or ""]) == pem([leaf, issuer, ROOT_PEM])
        server.process.kill()
        server.process.wait()


def test_two_keys_of_one_identifier_are_told_apart(
    serve: Callable[..., Mock], handlers: Handlers, tmp_path: Path
) -> None:
    """What is remembered of an issuer is not believed while another key claims to be it."""
    first, second = authority("ca", b"same"), authority("ca", b"same")
    issuers = {who: certificate(who, GOOD_ROOT) for who in (first, second)}
    (tmp_path / "one.pem").write_text(issuers[first])
    (tmp_path / "both.pem").write_text(issuers[first] + issuers[second])
    for who, file in ((first, "one.pem"), (second, "both.pem"), (first, "both.pem")):
        leaf = certificate(LEAF, who)
        server = serve(leaf, [])
        handler = handlers(server.options(), untrusted=str(tmp_path / file))
        error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
        assert error is None
        assert pem([bundle or ""]) == pem([leaf, issuers[who]])
        server.process.kill()
        server.process.wait()


def renamed(text: str, key: ec.EllipticCurvePrivateKey, old: bytes, new: bytes) -> str:
    """The certificate with other octets in its names, signed anew."""
    body, algorithm, _ = read_der(pem_der(text)).parts()
    changed = body.whole.replace(old, new)
    signature = write_der(0x03, b"\0" + key.sign(changed, ec.ECDSA(hashes.SHA256())))
    der = write_der(0x30, changed + algorithm.whole + signature)
    return ssl.DER_cert_to_PEM_cert(der)  # cryptography does not read such names


def test_eight_bits_in_a_printable_string_do_not_hide_the_issuer(
    serve: Callable[..., Mock], handlers: Handlers
) -> None:
    """Latin-1, whatever the type of string says: openssl takes the two for one name, and so is the issuer found."""
    issuer = authority("Muxller", printable=True)
    leaf = renamed(certificate(LEAF, issuer), issuer.key, b"\x13\x07Muxller", b"\x14\x07M\xdc\xdcller")
    above = renamed(certificate(issuer, GOOD_ROOT), GOOD_ROOT.key, b"\x13\x07Muxller", b"\x13\x07M\xdc\xdcller")
    error, bundle, _, _ = handlers(serve(leaf, [above]).options()).enroll(csr_pem([], "leaf", key=LEAF.key))
    assert (error, bundle) == (None, leaf + above)


def test_memory_does_not_grow(monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Mock], handlers: Handlers) -> None:
    """5,000 links are remembered: the next order forgets them, and remembers its own."""
    monkeypatch.setattr(cmp_ca_handler, "_links", {str(n).encode() for n in range(5000)})
    server = serve(LEAF_KNOWN, [CA_PEM, ROOT_PEM])
    assert handlers(server.options()).enroll(csr_pem([], "leaf", key=LEAF.key))[0] is None
    assert len(cmp_ca_handler._links) < 5


# --- The chain is best effort --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill -9 $$", "exec /no/such/program", "ulimit -v 4000; exec cat /dev/zero"])
def test_openssl_verify_that_cannot_run_costs_no_certificate(
    fault: str, serve: Callable[..., Mock], handlers: Handlers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The certificate is issued and confirmed: no fault here may cost it."""
    program = tmp_path / "openssl"
    program.write_text(f'#!/bin/sh\nif [ "$1" = verify ]; then {fault}; fi\nexec {OPENSSL} "$@"\n')
    program.chmod(0o755)
    server = serve(LEAF_KNOWN, [CA_PEM, ROOT_PEM])
    error, bundle, _, _ = handlers(server.options(), openssl_bin=str(program)).enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([LEAF_KNOWN])
    assert warnings(caplog)
    assert handlers.left() == []


@pytest.mark.parametrize("limited", ["descriptors", "files"])
def test_no_resources_for_the_chain_cost_no_certificate(
    limited: str,
    serve: Callable[..., Mock],
    handlers: Handlers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Simulated from the moment on when the chain is looked for: the machine has no descriptor, or no inode, left."""
    real = cmp_ca_handler._chain

    def limit(*arguments: Any) -> object:
        full = OSError(24, os.strerror(24)) if limited == "descriptors" else OSError(28, os.strerror(28), "issuer.pem")

        def fail(*_: object, **__: object) -> None:
            raise full

        target: tuple[object, str] = (subprocess, "Popen") if limited == "descriptors" else (cmp_ca_handler, "open")
        with monkeypatch.context() as patch:
            patch.setattr(target[0], target[1], fail, raising=False)
            return real(*arguments)

    monkeypatch.setattr(cmp_ca_handler, "_chain", limit)
    server = serve(LEAF_KNOWN, [CA_PEM, ROOT_PEM])
    error, bundle, _, _ = handlers(server.options()).enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert pem([bundle or ""]) == pem([LEAF_KNOWN])
    assert any("cannot" in warning for warning in warnings(caplog))


# --- Warnings ------------------------------------------------------------------------------------------------------

DEEP = authority("deep ca", b"deep")


@pytest.mark.parametrize(
    ("leaf", "extra", "configured", "expected", "warning"),
    [
        (LEAF_KNOWN, [], [], 0, "the issuer's certificate is not there: name it in cmp_untrusted"),
        (
            certificate(LEAF, DEEP),
            [certificate(DEEP, KNOWN)],
            [ROOT_PEM],
            1,
            "name its issuer, CN=ca, in cmp_untrusted",
        ),
        (LEAF_KNOWN, [CA_PEM], [], 1, ""),  # the CA leaves its root out
        (LEAF_KNOWN, [], [EXPIRED, ROOT_PEM], 2, "CN=ca, valid only from 20"),
        (LEAF_KNOWN, [], [EXPIRED], 1, "name its renewed certificate in cmp_untrusted"),  # better than none
        (LEAF_KNOWN, [], [certificate(KNOWN, GOOD_ROOT, (9, 99))], 1, "Z: set the clock, here or at the CA"),
        (certificate(LEAF, KNOWN, OLD), [CA_PEM], [ROOT_PEM], 2, "the bundle holds CN=leaf, valid only from "),
        (LEAF_KNOWN, [CA_PEM], [certificate(authority("good root"), GOOD_ROOT)], 1, "CN=good root, in cmp_untrusted"),
        (
            certificate(LEAF, SILENT),
            [],
            [certificate(IMPOSTOR, IMPOSTOR)],
            0,
            "(openssl does not take what is there for it: CN=ca (certificate signature failure))",
        ),
        (
            LEAF_KNOWN,
            [],
            [certificate(KNOWN._replace(identifier=b"another"), GOOD_ROOT)],
            0,
            f"(the CN=ca that is there has another key: its key identifier is {b'another'.hex()}, not {b'ca'.hex()})",
        ),
    ],
    ids="none,two missing,no root,expired,alone,future,old leaf,another root,another issuer,another key".split(","),
)
def test_a_warning_says_why_a_chain_ends(
    leaf: str,
    extra: list[str],
    configured: list[str],
    expected: int,
    warning: str,
    serve: Callable[..., Mock],
    handlers: Handlers,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A chain that ends below its root: the warning says which issuer is missing, expired or another one."""
    (tmp_path / "configured.pem").write_text("".join(configured))
    files = {"untrusted": str(tmp_path / "configured.pem")} if configured else {}
    handler = handlers(serve(leaf, extra).options(), trusted=None, **files)
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    assert error is None
    assert len(bundle_certificates(bundle or "")) == 1 + expected
    found = warnings(caplog)
    assert any(warning in text for text in found) if warning else not found


# --- Formats -------------------------------------------------------------------------------------------------------


@binaries
@pytest.mark.parametrize("form", ["trusted", "pkcs12", "der", "pkcs7"])
def test_a_file_for_the_chain_is_read_in_pem_or_der(
    form: str,
    openssl: str,
    serve: Callable[..., Mock],
    handlers: Handlers,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file for the chain is PEM, or one certificate in DER. What openssl alone can read makes no chain."""
    (tmp_path / "sub.pem").write_text(CA_PEM)
    commands = {
        "trusted": "x509 -in sub.pem -trustout -addtrust serverAuth -out file",
        "pkcs12": "pkcs12 -export -nokeys -in sub.pem -passout pass:secret12 -out file",
        "der": "x509 -in sub.pem -outform DER -out file",
        "pkcs7": "crl2pkcs7 -nocrl -certfile sub.pem -out file",
    }
    subprocess.run([OPENSSL, *commands[form].split()], cwd=tmp_path, check=True, capture_output=True)
    password = {"otherpass": "secret12"} if form == "pkcs12" else {}
    server = serve(LEAF_KNOWN, [], (), openssl)
    handler = handlers(server.options(), openssl_bin=openssl, untrusted=str(tmp_path / "file"), **password)
    error, bundle, _, _ = handler.enroll(csr_pem([], "leaf", key=LEAF.key))
    if form == "pkcs7":  # openssl cmp cannot read it, so nothing is sent
        assert error
        assert "untrusted" in error
    else:
        assert error is None
        assert pem([bundle or ""]) == pem([LEAF_KNOWN, *([CA_PEM] if form != "pkcs12" else [])])
        assert any("make it PEM" in warning for warning in warnings(caplog)) == (form == "pkcs12")
