"""Every option of every openssl: a key arrives as that flag with that value, and what an option promises, it holds."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import itertools
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

import cmp_ca_handler
from conftest import BINARIES, OPENSSL, Handlers, as_host, binaries, csr_pem, every_binary, start_mock
from demo_ca import DemoCA, read_envelope
from host import ROOT
from proxy import TcpServer
from shared import CN, SECTION, UTF8, C, findings, name_der, oid, script

# --- A key is one option, whatever the process's hash seed ----------------------------------------------------------

# `openssl cmp -help` of the Windows binary that acme2certifier's document names, by the sources of that month (October
# 2019); "=" stands behind what takes a value. It has no mock server. It needs Windows to run, so a stand-in has its
# help text.
OF_2019 = """
help config= section= server= proxy= path= msgtimeout= totaltimeout= trusted= untrusted= srvcert= recipient=
expect_sender= ignore_keyusage unprotectederrors extracertsout= cacertsout= ref= secret= cert= key= keypass= digest=
mac= extracerts= unprotectedrequests cmd= infotype= geninfo= newkey= newkeypass= subject= issuer= days= reqexts= sans=
san_nodefault policies= policies_critical popo= csr= out_trusted= implicitconfirm disableconfirm certout= oldcert=
revreason= ownform= keyform= crlform= otherform= otherpass= engine= tls_used tls_cert= tls_key= tls_keypass=
tls_extra= tls_trusted= tls_host= batch repeat= reqin= reqout= rspin= rspout= crl_download crls= crl_timeout=
ocsp_check_all ocsp_use_aia ocsp_url= ocsp_timeout= ocsp_status rand= writerand= policy= purpose= verify_name=
verify_depth= auth_level= attime= verify_hostname= verify_email= verify_ip= ignore_critical issuer_checks crl_check
crl_check_all policy_check explicit_policy inhibit_any inhibit_map x509_strict extended_crl use_deltas policy_print
check_ss_sig trusted_first suiteB_128_only suiteB_128 suiteB_192 partial_chain no_alt_chains no_check_time
allow_proxy_certs
"""
# What OpenSSL 3 calls those that it has renamed.
RENAMED = {
    "msgtimeout": "msg_timeout",
    "totaltimeout": "total_timeout",
    "implicitconfirm": "implicit_confirm",
    "disableconfirm": "disable_confirm",
    "unprotectederrors": "unprotected_errors",
    "unprotectedrequests": "unprotected_requests",
}

FILES = {
    "ra.pem": "cert tls_cert srvcert",
    "ra.key": "key tls_key",
    "root.pem": "trusted untrusted out_trusted own_trusted tls_trusted extracerts tls_extra",
}
NAME, SLASHES = "C=DE, O=Acme\\, Inc., CN=x", "/C=DE/O=Acme, Inc./CN=x"
VALUES = {
    **dict.fromkeys("recipient issuer expect_sender subject".split(), NAME),
    **dict.fromkeys("secret keypass tls_keypass otherpass newkeypass".split(), "pass:hush-hush"),
    **dict.fromkeys("days verify_depth auth_level msg_timeout".split(), "3"),
    "attime": "1700000000",
    "cmd": "cr",
    "digest": "sha384",
    "geninfo": "1.2.3.4:int:5",
    "keep_alive": "2",
    "keyform": "PEM",
    "mac": "hmacWithSHA256",
    "path": "other/",
    "policy": "1.2.3.4",
    "policy_oids": "1.2.3.4",
    "popo": "0",
    "proxy": "127.0.0.1:3",
    "purpose": "any",
    "server": "127.0.0.1:2",
    "total_timeout": "40",
    "verbosity": "7",
    "verify_email": "a@cmp.example",
    "verify_hostname": "cmp.example",
    "verify_ip": "127.0.0.1",
    "verify_name": "default",
}
# Run in a process for each hash seed: it prints what arrived otherwise than as the flag with the value.
TABLE = """
import json, sys, cmp_ca_handler
base, tables, values, slashes = json.load(sys.stdin)
failures, counts = [], {}

def look(binary, key, flag, name, value):
    settings = cmp_ca_handler._settings({**base, "cmp_openssl_bin": binary, "cmp_" + key: value})
    if any(text.startswith(("cmp_" + key + ": ", "cmp_" + name + ": ")) for text in settings.errors):
        return "refused"
    if any(text.startswith("cmp_" + name + " is set by the handler") for text in settings.warnings):
        return "set"
    command = cmp_ca_handler._command(settings, [])
    if name == "subject":  # depends on the CSR
        command += [flag, settings.options["subject"]]
    if command.count(flag) != 1:
        return f"{command.count(flag)} times {flag}, {settings.errors}"
    found = command[command.index(flag) + 1]
    if found[:4] == "env:":
        found = "pass:" + settings.secrets[found[4:]]
    expected = slashes if value == values["subject"] else value
    return "arrives" if found == expected or (value == "True" and found[0] == "-") else found

for binary, table in tables.items():
    for key, flag, name, takes_value, wanted in table:
        verdict = look(binary, key, flag, name, values.get(name, "a-value") if takes_value else "True")
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict != wanted:
            failures.append(f"{binary}: {key}: {verdict}, not {wanted}")
print(json.dumps([failures, counts]))
"""


def help_of(openssl: str) -> dict[str, bool]:
    """Every option in `openssl cmp -help`, and whether it takes a value."""
    run = subprocess.run([openssl, "cmp", "-help"], capture_output=True, text=True)
    return {name: bool(kind) for name, kind in re.findall(r"^ -([\w-]+)(?: ([^\s]+))?", run.stdout + run.stderr, re.M)}


def binary_of_2019(path: Path) -> str:
    """A program with the help text of the Windows binary."""
    lines = [f" -{word.replace('=', ' val')}".ljust(24) + "What it is for" for word in OF_2019.split()]
    listing = "\n".join(["Usage: cmp [options]", "Valid options are:", *lines])
    says = f"cmp) cat <<'END'\n{listing}\nEND\n;;\nversion) echo 'OpenSSL 3.0.0-dev xx XXX xxxx' ;;"
    return script(path, f'case $1 in\n{says}\n*) exec {OPENSSL} "$@" ;;\nesac\n')


@pytest.fixture
def programs_there(tmp_path: Path) -> list[str]:
    """The programs that there are, and the one of 2019."""
    return [*BINARIES, binary_of_2019(tmp_path / "openssl-2019")]


def verdicts() -> dict[str, str]:
    """What docs/options.md says of each option: "set" by the handler, "refused", or else it "arrives"."""
    page = (ROOT / "docs" / "options.md").read_text()
    found: dict[str, str] = {}
    for cells in (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `cmp_")):
        verdict = cells[3].strip() if len(cells) > 3 else ""
        said = verdict if verdict in ("set", "refused") else "arrives"
        found.update(dict.fromkeys(re.findall(r"`cmp_([\w-]+)`", cells[0]), said))
    return found


def folded(names: Iterable[str]) -> Counter[str]:
    """How many of the names are one without underscores."""
    return Counter(name.replace("_", "") for name in names)


def test_help_texts_are_read(programs_there: list[str]) -> None:
    """Every program lists more than a hundred options, with values and without."""
    counts = [len(help_of(binary)) for binary in programs_there]
    assert min(counts) > 100, counts
    for binary in programs_there:
        assert help_of(binary)["server"] and not help_of(binary)["tls_used"]


def test_no_two_names_collide(programs_there: list[str]) -> None:
    """Of all options there are: each has a name of its own, but for what OpenSSL 3 has renamed."""
    binaries = [cmp_ca_handler._binary(path) for path in programs_there]
    for path, binary in zip(programs_there, binaries):
        spelled = {RENAMED.get(name, name): name for name in help_of(path)}
        assert binary.spelled == spelled, path
    union = set(verdicts()).union(*map(help_of, programs_there)) - set(RENAMED)
    for name in union:
        assert cmp_ca_handler._option_name(name, union) == name
    twice = {name for name, count in folded(union).items() if count > 1}
    assert twice == {"srvcert"}, "these differ by an underscore alone: does each arrive as itself?"


def spellings(name: str, modern: str, union: Counter[str]) -> set[str]:
    """The keys that mean an option: as this openssl has it, as OpenSSL 3 has it, and without underscores."""
    plain = name.replace("_", "")
    return {name, modern, *([plain] if union[plain] == 1 else [])}


def test_every_key_arrives_as_its_flag(programs_there: list[str], ca_directory: Path, tmp_path: Path) -> None:
    """Each option of each openssl, in every spelling, under several hash seeds."""
    tables: dict[str, list[tuple[str, str, str, bool, str]]] = {}
    said = verdicts()
    union = folded(set(verdicts()).union(*map(help_of, programs_there)) - set(RENAMED))
    for path in programs_there:
        tables[path] = [
            (key, f"-{name}", RENAMED.get(name, name), takes_value, said.get(RENAMED.get(name, name), "arrives"))
            for name, takes_value in help_of(path).items()
            for key in sorted(spellings(name, RENAMED.get(name, name), union))
        ]
    values = {name: str(ca_directory / file) for file, names in FILES.items() for name in names.split()}
    config = tmp_path / "openssl.cnf"
    config.write_text("[cmp]\n")
    base = {**SECTION, "cmp_tmp_dir": str(tmp_path / "work"), "cmp_tls_used": "True"}
    base.update({f"cmp_{key}": values[key] for key in ("cert", "key", "tls_cert", "tls_key")})  # pairs
    given = json.dumps([base, tables, {**VALUES, **values, "config": str(config)}, SLASHES])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TABLE],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(6)
    ]
    for process in processes:
        out, err = process.communicate(given, timeout=120)
        assert process.returncode == 0, err
        failures, counts = json.loads(out)
        assert not failures, "\n".join(failures)
        assert counts["arrives"] > 80 * len(programs_there)


def test_an_option_of_openssl_4_1_is_taken_with_a_warning(
    ca: DemoCA, handlers: Handlers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-nonmatched_error_nonces` takes refusals that belong to another request: a warning, and no profile sets it."""
    line = " -nonmatched_error_nonces  Accept a nonce mismatch for error messages"
    newer = f"""\
        [ "$2" = -help ] && {{ {OPENSSL} "$@"; echo "{line}"; exit; }}
        for word; do
            shift
            [ "$word" = -nonmatched_error_nonces ] && echo "$*" >>{tmp_path}/taken || set -- "$@" "$word"
        done
        exec {OPENSSL} "$@"
        """
    program = script(tmp_path / "openssl-4.1", newer)
    handler = handlers(ca.options(), openssl_bin=program, nonmatched_error_nonces="True")
    errors, warnings = findings(handlers, capsys)
    assert errors == []
    assert any("cmp_nonmatched_error_nonces weakens security" in warning for warning in warnings)
    (tmp_path / "taken").unlink()
    assert handler.enroll(as_host(csr_pem(["a.example"])))[0] is None
    assert (tmp_path / "taken").exists()


# --- What an option promises, it holds: the right party gets in, the wrong one does not ------------------------------

DAY = datetime.timedelta(days=1)
PHRASE = b"pass phrase"


class Pki:
    """Certificates and keys, made when they are asked for: `pki("signer-by-sub")` is the path of signer-by-sub.pem, and
    its key lies beside it. What stands behind an underscore says what is odd about one: `signer_expired`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.keys: dict[str, Any] = {}

    def __call__(self, name: str, suffix: str = "pem") -> str:
        path = self.directory / f"{name}.pem"
        if not path.exists():
            path.write_bytes(self._certificate(name).public_bytes(serialization.Encoding.PEM))
        return str(path.with_suffix(f".{suffix}"))

    def certificate(self, name: str) -> x509.Certificate:
        return x509.load_pem_x509_certificates(Path(self(name)).read_bytes())[0]

    def key(self, name: str) -> Any:
        if name not in self.keys:
            weak = "_weak" in name
            key = rsa.generate_private_key(65537, 1024) if weak else ec.generate_private_key(ec.SECP256R1())  # noqa: S505
            self.keys[name] = key
            ways = {"key": serialization.NoEncryption(), "locked": serialization.BestAvailableEncryption(PHRASE)}
            for suffix, way in ways.items():
                path = self.directory / f"{name}.{suffix}"
                form = serialization.PrivateFormat.PKCS8
                path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, way))
                path.chmod(0o600)
        return self.keys[name]

    def _certificate(self, name: str) -> x509.Certificate:
        role, _, issuer = name.partition("-by-")
        kind, _, odd = role.partition("_")
        is_ca = kind in ("root", "other", "sub")
        issuer = issuer or (name if kind in ("root", "other") else "root")
        subject = distinguished(kind)
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = x509.CertificateBuilder().subject_name(subject).serial_number(x509.random_serial_number())
        builder = builder.issuer_name(subject if issuer == name else self.certificate(issuer).subject)
        builder = builder.public_key(self.key(name).public_key()).not_valid_before(now - 90 * DAY)
        builder = builder.not_valid_after(now + (-30 if odd == "expired" else 400) * DAY)
        identifier, signer = x509.SubjectKeyIdentifier.from_public_key, self.key(issuer)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(is_ca, None), True),
            (identifier(self.key(name).public_key()), False),
            (authority, False),
            (key_usage(is_ca, signs=not is_ca and odd != "unusable"), True),
        ]
        if odd == "policy":
            policy = x509.PolicyInformation(x509.ObjectIdentifier("1.2.3.4"), None)
            extensions.append((x509.CertificatePolicies([policy]), False))
        if odd == "client":
            extensions.append((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False))
        if odd == "loose":
            extensions.remove((authority, False))
        if odd == "critical":
            extensions.append((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\5\0"), True))
        if kind in ALTERNATIVE_NAMES:
            extensions.append((x509.SubjectAlternativeName(ALTERNATIVE_NAMES[kind]), False))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(signer, hashes.SHA256())


LOOPBACK, ELSEWHERE = ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("192.0.2.7")
ALTERNATIVE_NAMES: dict[str, list[x509.GeneralName]] = {
    "tls": [x509.DNSName("cmp.example"), x509.IPAddress(LOOPBACK)],
    "named": [x509.DNSName("cmp.example")],
    "leaf": [x509.DNSName("leaf.example"), x509.RFC822Name("a@leaf.example"), x509.IPAddress(ELSEWHERE)],
}


def distinguished(name: str) -> x509.Name:
    pairs = {x509.NameOID.COUNTRY_NAME: "DE", x509.NameOID.COMMON_NAME: name}
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in pairs.items()])


def key_usage(is_ca: bool, signs: bool) -> x509.KeyUsage:
    """For a CA, for signatures, or else for encryption alone."""
    return x509.KeyUsage(signs, False, not is_ca and not signs, False, False, is_ca, is_ca, False, False)


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("parties"))


class Try(NamedTuple):
    """An option, the party at the other end, and what is to become of the order.

    In `keys`, `signer.pem` is a file of the Pki. The CA is openssl's mock server behind a relay, which may speak TLS,
    and may serve only messages with `needs` in them.
    """

    issued: bool
    option: str
    party: str
    keys: dict[str, str | None]
    signer: str = "signer"
    leaf: str = "leaf"
    mock: str = ""  # more options of the mock server
    tls: str = ""  # its certificate for TLS
    client: str = ""  # the root of its clients' certificates
    needs: bytes = b""
    asked: str = ""  # the messages that it got
    words: str = ""  # in the error


def right(option: str, party: str, keys: dict[str, str | None], **more: Any) -> Try:
    return Try(True, option, party, keys, **more)


def wrong(option: str, party: str, keys: dict[str, str | None], words: str, **more: Any) -> Try:
    return Try(False, option, party, keys, words=words, **more)


# Which option holds what off. "wrong" below shows each; docs/options.md and docs/security.md promise it.
HOLDS_OFF = {
    "srvcert": "answers of everybody but this certificate: not its name, not its root, not cmp_trusted are enough",
    "trusted": "answers of a signer below another root",
    "untrusted": "nobody by itself; in place of cmp_trusted, beside a secret, every signed answer",
    "expect_sender": "answers of everybody who has another name, with a certificate of the same CA",
    "out_trusted": "certificates of another CA",
    "own_trusted": "requests that we sign with a certificate of another CA",
    "tls_used": "a connection without TLS",
    "tls_trusted": "TLS servers below another root",
    "tls_host": "TLS servers with another name, below the right root",
    "tls_cert": "us, at a server of TLS that does not know our certificate",
    "tls_key": "us, with a key that is not the certificate's",
    "tls_keypass": "us, with a key that we cannot open",
    "cert": "us, at a CA that does not know our certificate",
    "key": "us, with a key that is not the certificate's",
    "keypass": "us, with a key that we cannot open",
    "secret": "answers of everybody who does not know it, and us at a CA that has another",
    "ref": "us, at a CA that does not know it",
    "mac": "us, at a CA that wants another",
    "digest": "us, at a CA that wants another",
    "recipient": "us, at a CA that has another name",
    "issuer": "us, at a CA that has another name",
    "ignore_keyusage": "nobody: without it, a signer that is not for signatures",
    "partial_chain": "nobody: without it, a chain that does not end at a root",
    "no_check_time": "nobody: without it, a signer that has expired",
    "attime": "nobody: it chooses the time at which a certificate must be valid",
    "ignore_critical": "nobody: without it, a signer with a critical extension that openssl does not know",
    "unprotected_errors": "nobody: without it, unprotected refusals; with it, unprotected certificates still",
    "unprotected_requests": "nobody: a CA that wants protection refuses us",
    "implicit_confirm": "nobody: the certificate must be ours, and a CA that does not grant it gets its certConf",
    "disable_confirm": "nobody: the certificate must be ours, and the CA gets no certConf",
    "auth_level": "signers with a weak key",
    "verify_depth": "signers below too many CAs",
    "policy": "signers with another policy, if cmp_explicit_policy is set as well, else nobody",
    "explicit_policy": "signers without a policy; everybody without cmp_policy",
    "purpose": "signers whose extended key usages do not allow it",
    "x509_strict": "signers with a certificate that breaks RFC 5280",
    "crl_check": "everybody: openssl cmp cannot be given a CRL",
    "suiteB_128_only": "signers with RSA",
    "suiteB_192": "signers with P-256",
    "verify_hostname": "issued certificates for another name, if cmp_out_trusted is set, else nobody",
    "verify_email": "issued certificates for another address, if cmp_out_trusted is set, else nobody",
    "verify_ip": "issued certificates for another address, if cmp_out_trusted is set, else nobody",
}
# What docs/security.md names beside these, and where it is tried.
TRIED_ELSEWHERE = {
    "san_types": "test_csr.py",
    "refuse_changes": "test_changes.py",
    "secret_variable": "test_secrets.py",
    "tmp_dir": "test_attack.py",
    "msg_timeout": "test_faults.py",
    "total_timeout": "test_faults.py",
}

# No part of a revocation.
ENROLMENT_ALONE = {"issuer", "implicit_confirm", "disable_confirm"}

SIGNED: dict[str, str | None] = {
    "cert": "ra.pem",
    "key": "ra.key",
    "trusted": "root.pem",
    "expect_sender": "C=DE, CN=signer",
}
SECRET: dict[str, str | None] = {
    **dict.fromkeys(SIGNED),
    "ref": "reference-1234",
    "secret": "a-long-secret",
}
MOCK_SECRET = "-srv_ref reference-1234 -srv_secret pass:a-long-secret"
PIN: dict[str, str | None] = {"srvcert": "signer.pem", "trusted": None, "expect_sender": None}
ANY: dict[str, str | None] = {"expect_sender": None}
TLS: dict[str, str | None] = {"tls_used": "True", "tls_trusted": "root.pem"}
CLIENT: dict[str, str | None] = {**TLS, "tls_cert": "client.pem", "tls_key": "client.key"}
OURS = name_der([[(C, 0x13, "DE")], [(CN, UTF8, "Plant CA")]])
HMAC_SHA256, ECDSA_SHA384 = oid("1.2.840.113549.2.9"), oid("1.2.840.10045.4.3.3")
THEN = str(int((datetime.datetime.now() - 60 * DAY).timestamp()))
UNTRUSTED, CHAIN, MISMATCH = "unable to get local issuer certificate", "unable to get issuer certificate", "mismatch"
ANY_POLICY = "2.5.29.32.0"
SENDER, OTHER_KEY, FORBIDDEN = "cmp_expect_sender", "does not match our enrollment key", "403"

TRIES = [
    right("srvcert", "the pinned certificate", PIN),
    right(
        "srvcert", "the pinned certificate, expired", {**PIN, "srvcert": "signer_expired.pem"}, signer="signer_expired"
    ),
    wrong("srvcert", "another of that CA", PIN, "sender", signer="impostor"),
    wrong(
        "srvcert", "another of that CA, cmp_trusted set", {**PIN, "trusted": "root.pem"}, "sender", signer="impostor"
    ),
    wrong("srvcert", "the same name of another CA", PIN, "srvcert does not validate", signer="signer-by-other"),
    right("trusted", "a signer below it", ANY),
    wrong("trusted", "a signer below another root", ANY, UNTRUSTED, signer="signer-by-other"),
    right(
        "trusted", "a signature in place of the secret", {**SECRET, "trusted": "root.pem"}, mock="-accept_unprotected"
    ),
    right("untrusted", "a signer below it", {"untrusted": "sub.pem"}, signer="signer-by-sub"),
    wrong("untrusted", "a signer below another", {"untrusted": "other.pem"}, UNTRUSTED, signer="signer-by-sub"),
    wrong(
        "untrusted",
        "a signature in place of the secret",
        {**SECRET, "untrusted": "root.pem"},
        "missing trust",
        mock="-accept_unprotected",
    ),
    right("expect_sender", "the sender", {}),
    wrong("expect_sender", "another of that CA", {}, SENDER, signer="impostor"),
    right("out_trusted", "a certificate below it", {"out_trusted": "root.pem"}),
    wrong(
        "out_trusted", "a certificate of another CA", {"out_trusted": "other.pem"}, "failed to validate newly enrolled"
    ),
    right("own_trusted", "our certificate below it", {"own_trusted": "root.pem"}),
    wrong(
        "own_trusted", "our certificate of another CA", {"own_trusted": "other.pem"}, "cmp_own_trusted must", asked="-"
    ),
    right("tls_used", "a server of TLS", {"tls_used": "True", "tls_trusted": None}, tls="tls"),
    wrong("tls_used", "a server of plain HTTP", TLS, "", asked="-"),
    right("tls_trusted", "a server below it", TLS, tls="tls"),
    wrong(
        "tls_trusted",
        "a server below another root",
        {**TLS, "tls_trusted": "other.pem"},
        UNTRUSTED,
        tls="tls",
        asked="-",
    ),
    right("tls_host", "a server of that name", {**TLS, "tls_host": "cmp.example"}, tls="named"),
    wrong("tls_host", "a server of another name", {**TLS, "tls_host": "tls.example"}, MISMATCH, tls="named", asked="-"),
    wrong("tls_host", "another address, without it", TLS, MISMATCH, tls="named", asked="-"),
    right("tls_cert", "a server that knows it", CLIENT, tls="tls", client="root"),
    wrong("tls_cert", "a server that does not know it", CLIENT, "", tls="tls", client="other", asked="-"),
    wrong("tls_cert", "a server that wants one", TLS, "", tls="tls", client="root", asked="-"),
    right("tls_key", "the certificate's key", CLIENT, tls="tls", client="root"),
    wrong("tls_key", "another key", {**CLIENT, "tls_key": "impostor.key"}, "cmp_tls_key", tls="tls", asked="-"),
    right(
        "tls_keypass",
        "its pass phrase",
        {**CLIENT, "tls_key": "client.locked", "tls_keypass": PHRASE.decode()},
        tls="tls",
    ),
    wrong(
        "tls_keypass", "another", {**CLIENT, "tls_key": "client.locked", "tls_keypass": "x"}, "", tls="tls", asked="-"
    ),
    right("cert", "a CA that knows it", {}),
    wrong("cert", "a CA that does not know it", {"cert": "ra-by-other.pem", "key": "ra-by-other.key"}, "rejected"),
    right("key", "the certificate's key", {}),
    wrong("key", "another key", {"key": "impostor.key"}, "cmp_key does not belong to cmp_cert", asked="-"),
    right("keypass", "its pass phrase", {"key": "ra.locked", "keypass": PHRASE.decode()}),
    wrong("keypass", "another", {"key": "ra.locked", "keypass": "x"}, "", asked="-"),
    right("secret", "a CA that knows it", SECRET, mock=MOCK_SECRET),
    wrong(
        "secret", "a CA that has another", {**SECRET, "secret": "another-secret"}, "wrong pbm value", mock=MOCK_SECRET
    ),
    wrong(
        "secret",
        "somebody who does not know it",
        SECRET,
        "check cmp_ref and cmp_secret",
        mock="-accept_unprotected -srv_ref reference-1234 -srv_secret pass:another-secret",
    ),
    right("ref", "a CA that knows it", SECRET, mock=MOCK_SECRET, needs=b"reference-1234"),
    wrong(
        "ref", "a CA that knows another", {**SECRET, "ref": "1"}, FORBIDDEN, mock=MOCK_SECRET, needs=b"reference-1234"
    ),
    right("mac", "a CA that wants it", {**SECRET, "mac": "hmacWithSHA256"}, mock=MOCK_SECRET, needs=HMAC_SHA256),
    wrong(
        "mac",
        "a CA that wants another",
        {**SECRET, "mac": "hmacWithSHA512"},
        FORBIDDEN,
        mock=MOCK_SECRET,
        needs=HMAC_SHA256,
    ),
    right("digest", "a CA that wants it", {"digest": "sha384"}, needs=ECDSA_SHA384),
    wrong("digest", "a CA that wants another", {"digest": "sha512"}, FORBIDDEN, needs=ECDSA_SHA384),
    right("recipient", "the CA of that name", {"recipient": "C=DE, CN=Plant CA"}, needs=OURS),
    wrong("recipient", "a CA of another name", {"recipient": "C=DE, CN=Other CA"}, FORBIDDEN, needs=OURS),
    right("issuer", "the CA of that name", {"issuer": "C=DE, CN=Plant CA", "recipient": "/CN=x"}, needs=OURS),
    wrong("issuer", "a CA of another name", {"issuer": "C=DE, CN=Other CA"}, FORBIDDEN, needs=OURS),
    right("ignore_keyusage", "not for signatures", {"ignore_keyusage": "True"}, signer="signer_unusable"),
    wrong("ignore_keyusage", "not for signatures, without it", {}, "key usage", signer="signer_unusable"),
    wrong(
        "ignore_keyusage",
        "not for signatures, of another CA",
        {"ignore_keyusage": "True"},
        UNTRUSTED,
        signer="signer_unusable-by-other",
    ),
    right(
        "partial_chain",
        "below a CA that is no root",
        {"trusted": "sub.pem", "partial_chain": "True"},
        signer="signer-by-sub",
    ),
    wrong("partial_chain", "the same without it", {"trusted": "sub.pem"}, CHAIN, signer="signer-by-sub"),
    wrong("partial_chain", "not below that CA", {"trusted": "sub.pem", "partial_chain": "True"}, UNTRUSTED),
    right("no_check_time", "expired", {"no_check_time": "True"}, signer="signer_expired"),
    wrong("no_check_time", "expired, without it", {}, "", signer="signer_expired"),
    wrong(
        "no_check_time", "expired, another CA", {"no_check_time": "True"}, UNTRUSTED, signer="signer_expired-by-other"
    ),
    right("attime", "valid then", {"attime": THEN}, signer="signer_expired"),
    wrong("attime", "not valid then", {"attime": "1700000000"}, ""),
    right("ignore_critical", "an unknown critical extension", {"ignore_critical": "True"}, signer="signer_critical"),
    wrong("ignore_critical", "the same without it", {}, "unhandled critical extension", signer="signer_critical"),
    right("unprotected_errors", "a CA that does not refuse", {"unprotected_errors": "True"}),
    wrong("unprotected_errors", "an unprotected refusal", {}, "unverified", mock="-pkistatus 2 -send_unprot_err"),
    wrong(
        "unprotected_errors",
        "an unprotected refusal, believed",
        {"unprotected_errors": "True"},
        "rejected the request",
        mock="-pkistatus 2 -send_unprot_err",
    ),
    wrong(
        "unprotected_errors",
        "an unprotected certificate",
        {"unprotected_errors": "True"},
        "missing protection",
        mock="-send_unprotected",
    ),
    right("unprotected_requests", "a CA that wants it", {"unprotected_requests": "True"}, mock="-accept_unprotected"),
    wrong("unprotected_requests", "a CA that wants protection", {"unprotected_requests": "True"}, "missing protection"),
    right("implicit_confirm", "grants it", {"implicit_confirm": "True"}, mock="-grant_implicitconf", asked="ir"),
    right("implicit_confirm", "does not grant it", {"implicit_confirm": "True"}, asked="ir certConf"),
    wrong(
        "implicit_confirm",
        "a certificate for another key",
        {"implicit_confirm": "True"},
        OTHER_KEY,
        leaf="leaf_other",
        mock="-grant_implicitconf",
    ),
    right("disable_confirm", "a CA that takes it", {"disable_confirm": "True"}, asked="ir"),
    wrong(
        "disable_confirm", "a certificate for another key", {"disable_confirm": "True"}, OTHER_KEY, leaf="leaf_other"
    ),
    right("auth_level", "a strong key", {"auth_level": "2"}),
    wrong("auth_level", "a weak key", {"auth_level": "2"}, "too weak", signer="signer_weak"),
    right("verify_depth", "one CA", {"verify_depth": "1", "untrusted": "sub.pem"}, signer="signer-by-sub"),
    wrong(
        "verify_depth",
        "one too many",
        {"verify_depth": "0", "untrusted": "sub.pem"},
        "too long",
        signer="signer-by-sub",
    ),
    right("policy", "that policy", {"policy": "1.2.3.4", "explicit_policy": "True"}, signer="signer_policy"),
    wrong("policy", "another", {"policy": "1.2.3.5", "explicit_policy": "True"}, "policy", signer="signer_policy"),
    right("policy", "another, without cmp_explicit_policy", {"policy": "1.2.3.5"}, signer="signer_policy"),
    right("explicit_policy", "any policy", {"explicit_policy": "True", "policy": ANY_POLICY}, signer="signer_policy"),
    wrong("explicit_policy", "no policy", {"explicit_policy": "True", "policy": ANY_POLICY}, "policy"),
    wrong("explicit_policy", "everybody, alone", {"explicit_policy": "True"}, "policy", signer="signer_policy"),
    right("purpose", "for that", {"purpose": "sslclient"}, signer="signer_client"),
    wrong("purpose", "for something else", {"purpose": "sslserver"}, "unsuitable", signer="signer_client"),
    right("x509_strict", "a certificate by the book", {"x509_strict": "True"}),
    wrong("x509_strict", "no authorityKeyIdentifier", {"x509_strict": "True"}, "Missing", signer="signer_loose"),
    right("crl_check", "without it", {"crl_check": "False"}),
    wrong("crl_check", "everybody", {"crl_check": "True"}, "unable to get certificate CRL"),
    right("suiteB_128_only", "P-256", {"suiteB_128_only": "True"}),
    wrong("suiteB_128_only", "RSA", {"suiteB_128_only": "True"}, "Suite B", signer="signer_weak"),
    right("suiteB_192", "without it", {"suiteB_192": "False"}),
    wrong("suiteB_192", "P-256", {"suiteB_192": "True"}, "Suite B"),
    *(
        attempt
        for option, good, bad in (
            ("verify_hostname", "leaf.example", "cmp.example"),
            ("verify_email", "a@leaf.example", "b@leaf.example"),
            ("verify_ip", str(ELSEWHERE), str(LOOPBACK)),
        )
        for attempt in (
            right(option, "that name", {option: good, "out_trusted": "root.pem"}),
            wrong(option, "another name", {option: bad, "out_trusted": "root.pem"}, "newly enrolled"),
            right(option, "another name, without cmp_out_trusted", {**TLS, option: bad}, tls="tls"),
        )
    ),
]


class Relay:
    """Stands before a CA: speaks TLS for it, sends away what it does not serve, and remembers what it was asked."""

    def __init__(self, pki: Pki, attempt: Try, url: str) -> None:
        self.attempt, self.url = attempt, url
        self.asked: list[str] = []
        self.context: ssl.SSLContext | None = None
        if attempt.tls:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(pki(attempt.tls), pki(attempt.tls, "key"))
            if attempt.client:
                self.context.verify_mode = ssl.CERT_REQUIRED
                self.context.load_verify_locations(pki(attempt.client))

    def serve(self, connection: socket.socket) -> None:
        if self.context:
            connection = self.context.wrap_socket(connection, server_side=True)
        with connection, connection.makefile("rb") as stream:
            if not stream.readline().startswith(b"POST"):
                return
            header = dict(line.lower().split(b":", 1) for line in iter(stream.readline, b"\r\n"))
            message = stream.read(int(header[b"content-length"]))
            self.asked.append(read_envelope(message).name)
            status, answer = self._answer(message)
            kind = "application/pkixcmp" if status == "200 OK" else "text/plain"
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(answer)}\r\n\r\n"
            connection.sendall(head.encode() + answer)

    def _answer(self, message: bytes) -> tuple[str, bytes]:
        if self.asked == self.asked[:1] and self.attempt.needs not in message:
            return "403 Forbidden", b"not for us"
        request = urllib.request.Request(self.url, message, {"Content-Type": "application/pkixcmp"})
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return "200 OK", bytes(response.read())
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.reason}", error.read()


@contextlib.contextmanager
def party(pki: Pki, attempt: Try, tcp_server: TcpServer) -> Iterator[tuple[str, Relay]]:
    """The CA of one attempt: its address and its relay."""
    command = [OPENSSL, "cmp", "-config", "", "-accept_raverified", "-srv_trusted", pki("root")]
    command += [
        "-srv_cert",
        pki(attempt.signer),
        "-srv_key",
        pki(attempt.signer, "key"),
        "-rsp_cert",
        pki(attempt.leaf),
    ]
    process, port = start_mock([*command, *attempt.mock.split()], pki.directory / "mock.log")
    with process:
        try:
            relay = Relay(pki, attempt, f"http://127.0.0.1:{port}/pkix/")
            yield f"127.0.0.1:{tcp_server(relay.serve)}", relay
        finally:
            process.kill()


def configured(pki: Pki, attempt: Try, server: str) -> dict[str, str | None]:
    """The section, with the paths of the files."""
    keys = {**SIGNED, "path": "pkix/", "server": server, **attempt.keys}
    files = r"[\w-]+\.(pem|key|locked)"
    return {
        key: pki(*value.rsplit(".", 1)) if value and re.fullmatch(files, value) else value
        for key, value in keys.items()
    }


@binaries
@pytest.mark.parametrize("option", HOLDS_OFF)
def test_each_option_tells_the_right_party_from_the_wrong(
    option: str, openssl: str, pki: Pki, handlers: Handlers, tcp_server: TcpServer
) -> None:
    """The right one: issued, and revoked. The wrong one: refused, and nothing is kept."""
    for attempt in TRIES:
        if attempt.option == option:
            print(attempt.party)  # pytest shows the last one where it fails
            order_and_revoke(attempt, openssl, pki, handlers, tcp_server)


def order_and_revoke(attempt: Try, openssl: str, pki: Pki, handlers: Handlers, tcp_server: TcpServer) -> None:
    """One attempt, with an enrolment and, where the option counts there, a revocation."""
    csr = as_host(csr_pem(["leaf.example"], key=pki.key("leaf")))
    with party(pki, attempt, tcp_server) as (server, relay):
        handler = handlers({}, openssl_bin=openssl, **configured(pki, attempt, server))
        error, bundle, _, identifier = handler.enroll(csr)
    assert identifier is None
    assert (bundle is not None, error is None) == (attempt.issued, attempt.issued), error
    assert attempt.words in str(error)
    assert handlers.left() == []
    if attempt.asked:
        assert " ".join(relay.asked) == attempt.asked.strip("-")
    if attempt.option in ENROLMENT_ALONE or "out_trusted" in attempt.keys:
        return
    with party(pki, attempt, tcp_server) as (server, relay):
        handler = handlers({}, openssl_bin=openssl, **configured(pki, attempt, server))
        status, kind, detail = handler.revoke(Path(pki("leaf")).read_text())
    assert (status == 200) is attempt.issued, detail
    assert attempt.issued or kind != "urn:ietf:params:acme:error:alreadyRevoked"
    assert handlers.left() == []


def test_every_promise_is_tried() -> None:
    """Each option of the table with both, and each key that docs/security.md names."""
    for issued in (True, False):
        assert {attempt.option for attempt in TRIES if attempt.issued is issued} == set(HOLDS_OFF)
    page = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"\bcmp_([a-z_]+)\b(?!\.py)", page)) - {"ca_handler"}
    assert named - set(HOLDS_OFF) - set(TRIED_ELSEWHERE) == set()


# --- What has no effect, or cannot work, is said ---------------------------------------------------------------------

CONFIGURED: dict[str, str | None] = {"server": "127.0.0.1:1", "ref": "1234", "secret": "a-long-secret"}
# By the name of its row: keys, and what a fault or a warning names.
FAULTS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "reqexts without a file": ({"reqexts": "extensions"}, ["cmp_reqexts", "cmp_config"]),
    "policies without a file": ({"policies": "policies"}, ["cmp_policies", "cmp_config"]),
    "days": ({"days": "-1"}, ["cmp_days"]),
    "keep_alive": ({"keep_alive": "3"}, ["keep_alive"]),
    "verbosity": ({"verbosity": "9"}, ["verbosity"]),
    "geninfo": ({"geninfo": "wrong-geninfo"}, ["cmp_geninfo"]),
    "purpose": ({"purpose": "wrong-purpose"}, ["cmp_purpose", "Invalid purpose"]),
    "verify_name": ({"verify_name": "wrong-name"}, ["cmp_verify_name"]),
    "verify_ip": ({"verify_ip": "wrong-address"}, ["cmp_verify_ip"]),
    "policy_oids": ({"policy_oids": "wrong-policy"}, ["cmp_policy_oids"]),
    "rand": ({"rand": "/none/random"}, ["cmp_rand"]),
    "a provider that is not there": ({"provider": "no-provider"}, ["cmp_provider"]),
    "a section that is not there": ({"section": "no-section"}, ["cmp_section"]),
    "verify_depth": ({"verify_depth": "-1"}, ["cmp_verify_depth"]),
    "attime": ({"attime": "-1"}, ["cmp_attime"]),
    "two providers": ({"provider": "default,legacy"}, ["cmp_provider"]),
}
WARNINGS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "policy": ({"policy": "1.2.3.4"}, ["cmp_policy", "cmp_explicit_policy"]),
    "explicit_policy": ({"explicit_policy": "True"}, ["cmp_explicit_policy", "cmp_policy"]),
    "verify_hostname": ({"verify_hostname": "www.example"}, ["cmp_verify_hostname", "cmp_out_trusted"]),
    "verify_email": ({"verify_email": "a@b.example"}, ["cmp_verify_email", "cmp_out_trusted"]),
    "verify_ip": ({"verify_ip": "192.0.2.7"}, ["cmp_verify_ip", "cmp_out_trusted"]),
    "p10cr": (
        {"cmd": "p10cr", "days": "9", "issuer": "CN=x", "subject": "CN=x", "policy_oids": "1.2.3.4"},
        ["cmp_days", "cmp_issuer", "cmp_subject", "cmp_policy_oids", "cmp_cmd"],
    ),
    "srvcertout": ({"srvcertout": "/none/x.pem"}, ["cmp_srvcertout", "ignored"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_value_that_openssl_refuses_is_named(name: str, handlers: Handlers) -> None:
    """A value that openssl refuses is found by the check, which names the option."""
    keys, named = FAULTS[name]
    section = {f"cmp_{key}": str(value) for key, value in {**CONFIGURED, **keys}.items()}
    fault = str(handlers(section).handler_check())
    assert [word for word in named if word not in fault] == [], fault


@pytest.mark.parametrize("name", WARNINGS)
def test_option_without_effect_is_a_warning(name: str, handlers: Handlers, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the option, and the one that is missing beside it; the check passes."""
    keys, named = WARNINGS[name]
    able = [path for path in BINARIES if {"srvcertout"} & set(keys) <= set(help_of(path))]  # 3.0 has no -srvcertout
    if not able:
        pytest.skip("no openssl here has the option")
    for openssl in able:
        handlers({}, **{**CONFIGURED, **keys}, openssl_bin=openssl)
        errors, warnings = findings(handlers, capsys)
        assert any(all(word in warning for word in named) for warning in warnings), (openssl, warnings)
        assert errors == [], openssl


@every_binary
def test_p10cr_says_nothing_at_each_order(
    openssl: str, pki: Pki, handlers: Handlers, tcp_server: TcpServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What has no effect there is left out, for openssl would warn of it each time."""
    attempt = right("cmd", "p10cr", {"cmd": "p10cr", "days": "9", "issuer": "CN=x", "policy_oids": "1.2.3.4"})
    with party(pki, attempt, tcp_server) as (server, relay):
        handler = handlers({}, openssl_bin=openssl, **configured(pki, attempt, server))
        assert handler.enroll(as_host(csr_pem(["leaf.example"], key=pki.key("leaf"))))[0] is None
    assert relay.asked[0] == "p10cr"
    assert [r.getMessage() for r in caplog.records if "option is ignored" in r.getMessage()] == []


def test_no_file_beside_decides_an_order(pki: Pki, handlers: Handlers, tcp_server: TcpServer) -> None:
    """Where the signer's certificate cannot be saved, the order goes on."""
    able = [path for path in BINARIES if "srvcertout" in help_of(path)]  # 3.0 has it not
    if not able:
        pytest.skip("no openssl here has the option")
    for openssl, changes in itertools.product(able, ({}, {"implicit_confirm": "True"})):
        attempt = right("srvcertout", "", {"srvcertout": "/none/x.pem", **changes}, mock="-grant_implicitconf")
        with party(pki, attempt, tcp_server) as (server, _):
            handler = handlers({}, openssl_bin=openssl, **configured(pki, attempt, server))
            assert handler.enroll(as_host(csr_pem(["leaf.example"], key=pki.key("leaf"))))[0] is None, openssl
        assert handlers.left() == []


PROXY = "http://127.0.0.1:9"
PROXIES: dict[str, tuple[dict[str, str], bool, str]] = {
    "http": ({"http_proxy": PROXY}, False, "openssl takes the proxy from http_proxy"),
    "http, capitals": ({"HTTP_PROXY": PROXY}, False, "openssl takes the proxy from HTTP_PROXY"),
    "http, the one for TLS": ({"https_proxy": PROXY}, False, ""),
    "http, excluded": ({"http_proxy": PROXY, "no_proxy": "a.example,127.0.0.1"}, False, ""),
    "http, another excluded": ({"http_proxy": PROXY, "no_proxy": "0.0.1"}, False, "openssl takes the proxy"),
    "TLS, both": ({"http_proxy": PROXY, "https_proxy": PROXY}, True, "openssl takes the proxy from"),
    "TLS, http alone": ({"http_proxy": PROXY}, True, "cannot connect with TLS"),
    "TLS, https alone": ({"https_proxy": PROXY}, True, "cannot connect with TLS"),
    "TLS, excluded": ({"http_proxy": PROXY, "NO_PROXY": "127.0.0.1"}, True, ""),
}


@pytest.mark.parametrize("name", PROXIES)
def test_a_proxy_of_the_environment_is_warned_of(
    name: str, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning says what openssl does, and there is none where it uses no proxy."""
    environment, tls, expected = PROXIES[name]
    for variable in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    changes = {"tls_used": "True"} if tls else {}
    handlers({}, **CONFIGURED, **changes)
    about = [warning for warning in findings(handlers, capsys)[1] if "proxy" in warning]
    assert len(about) == bool(expected), about
    assert expected in "".join(about)
