"""Every kind of enrolment ends with a certificate, and leaves nothing behind."""

from __future__ import annotations

import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from conftest import OPENSSL, Handlers, as_host, binaries, csr_pem, every_binary, wait_until
from demo_ca import DemoCA
from shared import ISSUERS, enrolled, recorder, script
from soak import children


def public_key(owner: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    """SubjectPublicKeyInfo in DER."""
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return owner.public_key().public_bytes(encoding, form)


@every_binary
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_every_kind(
    authentication: str, tls: bool, openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers
) -> None:
    """By secret or certificate, over http or https: leaf and issuers in order, both names, nothing left."""
    ca = make_ca(tls=tls)
    certificates = enrolled(
        handlers(ca.options(authentication), openssl_bin=openssl), as_host(csr_pem(["a.example", "b.example"]))
    )
    assert [c.subject.rfc4514_string() for c in certificates] == ["CN=a.example", *ISSUERS]
    for certificate, issuer in zip(certificates, certificates[1:]):
        certificate.verify_directly_issued_by(issuer)
    names = certificates[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example", "b.example"]
    assert [m.request for m in ca.messages] == ["ir", "certConf"]
    assert handlers.left() == []


@every_binary
def test_tls_without_a_client_certificate_is_no_warning(
    openssl: str, make_ca: Callable[..., DemoCA], handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenSSL 3.5 and later warn of it at each run."""
    enrolled(handlers(make_ca(tls=True).options(), openssl_bin=openssl), as_host(csr_pem(["a.example"])))
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == []


def test_tls_server_that_is_not_trusted(make_ca: Callable[..., DemoCA], handlers: Handlers) -> None:
    """A TLS server that cmp_tls_trusted does not cover: the error says so, and the CA gets no message."""
    ca = make_ca(tls=True)
    error = handlers(ca.options(), tls_trusted=str(ca.directory / "stranger.pem")).enroll(as_host(csr_pem(["a.b"])))[0]
    assert error and "certificate verify failed" in error and ca.server in error
    assert (ca.messages, handlers.left()) == ([], [])


FORMS: dict[str, Callable[[str], str]] = {
    "base64url": as_host,
    "base64url with padding": lambda pem: as_host(pem) + "=" * (-len(as_host(pem)) % 4),
    "base64 with line breaks": lambda pem: "\n".join(pem.splitlines()[1:-1]) + "\n",
    "PEM": str,
    "PEM with CRLF": lambda pem: pem.replace("\n", "\r\n"),
    "PEM, old label": lambda pem: pem.replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_csr(form: str, ca: DemoCA, handlers: Handlers) -> None:
    """base64url, base64 or PEM, with other line ends or another label: the certificate has the CSR's key."""
    pem = csr_pem(["a.example"])
    certificate = enrolled(handlers(ca.options()), FORMS[form](pem))[0]
    assert public_key(certificate) == public_key(x509.load_pem_x509_csr(pem.encode()))


@pytest.mark.parametrize("command, exchanges", [("cr", ["cr", "certConf"]), ("p10cr", ["p10cr", "certConf"])])
@binaries
def test_other_request_types(openssl: str, command: str, exchanges: list[str], ca: DemoCA, handlers: Handlers) -> None:
    """cmp_cmd `cr` or `p10cr`: this request and a certConf reach the CA, and the chain is whole."""
    handler = handlers(ca.options(), cmd=command, openssl_bin=openssl)
    assert len(enrolled(handler, csr_pem(["a.example"], "a.example"))) == 3
    assert [m.request for m in ca.messages] == exchanges


# As it stands in the user's document, but for the server's address.
DOCUMENT = {
    "cmp_openssl_bin": "acme_srv/cmp/WindowsCMPOpenSSL/openssl.exe",
    "cmp_tmp_dir": "acme_srv/cmp/tmp",
    "cmp_server": "192.168.14.137:8080",
    "cmp_path": "pkix/",
    "cmp_cert": "acme_srv/cmp/ra_cert.pem",
    "cmp_ref": "1234",
    "cmp_secret": "pass:xxx",
    "cmp_trusted": "acme_srv/cmp/capubs.pem",
    "cmp_recipient": "C=DE, CN=tst_sub_ca",
    "cmp_ignore_keyusage": "True",
}


def test_configuration_of_the_document(
    make_ca: Callable[..., DemoCA], handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document's section, at another port: enrolled, and openssl gets the document's own command line."""
    monkeypatch.chdir(tmp_path)
    ca = make_ca(secret="xxx")
    recorder(tmp_path / DOCUMENT["cmp_openssl_bin"], tmp_path / "calls")
    for source, target in [("ra.pem", "cmp_cert"), ("root.pem", "cmp_trusted")]:
        Path(DOCUMENT[target]).write_bytes((ca.directory / source).read_bytes())
    handler = handlers({**DOCUMENT, "cmp_server": ca.server})
    assert len(enrolled(handler, csr_pem(["test-cert"], "test-cert"))) == 3
    assert os.listdir(DOCUMENT["cmp_tmp_dir"]) == []
    call = next(line for line in Path("calls").read_text().splitlines() if line.startswith("cmp -cmd"))
    # The document's own command line, in its order where the configuration has one.
    assert call.startswith(
        f"cmp -cmd ir -popo 0 -server {ca.server} -path pkix/ -cert acme_srv/cmp/ra_cert.pem -ref 1234 -secret env:"
    )
    assert " -trusted acme_srv/cmp/capubs.pem -recipient /C=DE/CN=tst_sub_ca -ignore_keyusage " in call
    for option in (f"-newkey {os.getcwd()}/acme_srv/cmp/tmp/", "-extracertsout", "-certout", "-subject /CN=test-cert"):
        assert f" {option}" in call


@pytest.mark.parametrize("outcome", ["issued", "refused"])
def test_nothing_is_left(
    outcome: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six orders, all issued or all refused: no descriptor, process or file of them stays."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    ca.reject = "" if outcome == "issued" else "badRequest"
    handler, csr = handlers(ca.options()), csr_pem(["a.example"])
    handler.enroll(csr)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert (handler.enroll(csr)[0] is None) == (outcome == "issued")
    # The CA lives in this process too: its side of the last connection may take a moment longer.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the closing of all descriptors")
    wait_until(lambda: not children(), "the end of all processes")
    assert (handlers.left(), os.listdir(temporary)) == ([], [])


def test_many_at_once(ca: DemoCA, handlers: Handlers) -> None:
    """Twenty orders in as many threads: each gets the certificate for its own name and key."""
    names = [f"host{i}.example" for i in range(20)]
    csrs = [csr_pem([name]) for name in names]
    enter = [handlers(ca.options(), total_timeout="60", msg_timeout="60") for _ in names]
    with ThreadPoolExecutor(len(names)) as pool:
        leaves = [bundle[0] for bundle in pool.map(enrolled, enter, csrs)]
    assert [leaf.subject.rfc4514_string() for leaf in leaves] == [f"CN={name}" for name in names]
    assert [public_key(leaf) for leaf in leaves] == [public_key(x509.load_pem_x509_csr(c.encode())) for c in csrs]
    assert len(ca.issued()) == len(names)
    assert handlers.left() == []


def test_one_log_line_per_certificate(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """An order that is issued: one line with subject, serial number, issuer, chain and seconds."""
    caplog.set_level(logging.INFO)
    leaf = enrolled(handlers(ca.options()), csr_pem(["a.example"]))[0]
    messages = [r.getMessage() for r in caplog.records if r.name == "test" and r.levelno == logging.INFO]
    (line,) = [message for message in messages if "issued" in message]
    for word in (
        'subject="CN=a.example"',
        f"serial={leaf.serial_number:x}",
        'issuer="C=DE, O=Demo, CN=Demo Issuing CA"',
        "chain=3",
    ):
        assert word in line
    assert re.search(r"seconds=\d+\.\d", line)


# --- The secret -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True], ids=["issued", "refused by a CA that repeats the secret"])
@pytest.mark.parametrize("kind", ["secret", "pass: secret", "keys with pass phrases"])
def test_the_secret_is_nowhere(
    kind: str,
    refused: bool,
    make_ca: Callable[..., DemoCA],
    handlers: Handlers,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A CA that issues, or refuses and repeats the secret: no argument, file, log line or error has it."""
    caplog.set_level(logging.DEBUG)
    word = "hush" + secrets.token_hex(8)
    ca = make_ca(secret=word, tls=True)
    ca.reject, ca.status_text = ("badRequest", f"you are {word}") if refused else ("", "")
    section = ca.options("secret")
    if kind == "pass: secret":
        section["cmp_secret"] = f"pass:{word}"
    if kind == "keys with pass phrases":
        section = ca.options("certificate")
        key, locked = section["cmp_key"], str(tmp_path / "locked.key")
        lock = [OPENSSL, "pkey", "-in", key, "-aes256", "-passout", f"pass:{word}", "-out", locked]
        subprocess.run(lock, check=True, capture_output=True)
        section.update(cmp_key=locked, cmp_keypass=word)
        section.update(cmp_tls_cert=section["cmp_cert"], cmp_tls_key=locked, cmp_tls_keypass=f"pass:{word}")
    # Keeps every command line on the machine while openssl runs, and the transaction as openssl leaves it.
    seen = tmp_path / "seen"
    seen.mkdir()
    watch = f"""\
        {OPENSSL} "$@" & pid=$!
        echo "$0 $*" >{seen}/$$.arguments
        cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' >{seen}/$$.processes
        wait $pid; code=$?
        [ ! -d {handlers.work} ] || cp -r {handlers.work} {seen}/$$.files
        exit $code
        """
    error, bundle, _, _ = handlers(section, openssl_bin=script(tmp_path / "openssl", watch)).enroll(csr_pem(["a.b"]))
    assert (bundle is None) == refused, error
    assert not refused or (error and "rejected the request: badRequest" in error)
    files = {path.name: path.read_bytes() for path in seen.rglob("*") if path.is_file()}
    assert "csr.pem" in files and any("-secret env:" in str(f) or "-keypass env:" in str(f) for f in files.values())
    assert "running" in caplog.text  # else the log was not at its most talkative
    # What the CA itself writes is in its response, which is saved as it arrives.
    assert [name for name, content in files.items() if word.encode() in content and name[-4:] != ".new"] == []
    assert [r for r in caplog.records if r.name == "test" and word in r.getMessage()] == []
    assert word not in str(error)


# --- A cmpossl from before OpenSSL 3.0 ------------------------------------------------------------------------------

STAND_IN = '''\
#!{python}
"""Speaks like a cmpossl of 2019 or 2020, and has a real openssl do the work."""
import os, subprocess, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
if arguments == ["version"]:
    print({version!r})
elif arguments == ["cmp", "-help"]:
    print("Usage: cmp [options]\\nValid options are:")
    for option in {valued!r}.split():
        print(f" -{{option}} val".ljust(24) + "A description")
    for option in {switches!r}.split():
        print(f" -{{option}}".ljust(24) + "A description")
elif arguments[0] == "req":
    run = subprocess.run([{openssl!r}, *arguments], capture_output=True, text=True)
    sys.stdout.write(run.stdout)
    sys.stderr.write(run.stderr.replace("Certificate request self-signature verify OK", "verify OK"))
    sys.exit(run.returncode)
elif arguments[0] == "verify":
    os.execv({openssl!r}, [{openssl!r}, *arguments])
else:
    command, rest = ["cmp"], arguments[1:]
    while rest:
        option = rest.pop(0).lstrip("-")
        value = [rest.pop(0)] if option in {valued!r}.split() else []
        if not value and option not in {switches!r}.split():
            sys.exit(f"cmp: Unknown option: -{{option}}")
        if option == "csr" and "p10cr" not in arguments:
            print("CMP warning: -csr option is ignored for command other than p10cr")
            continue
        new = {{"msgtimeout": "msg_timeout", "totaltimeout": "total_timeout"}}.get(option, option)
        command += ["-" + new, *value]
    os.execv({openssl!r}, [{openssl!r}, *command])
'''
OLD_VALUED = (
    "cmd server path ref secret recipient expect_sender trusted newkey subject sans csr certout extracertsout popo"
    " cert key"
)
RELEASES = {
    "2020": ("OpenSSL 3.0.0-alpha9-dev ", "msg_timeout total_timeout cacertsout", "san_nodefault implicit_confirm"),
    "2019": ("OpenSSL 1.1.1d-dev  xx XXX xxxx", "msgtimeout totaltimeout", "implicit_confirm"),
}


@pytest.fixture
def old_openssl(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A stand-in for an old cmpossl, because no such release can be installed any more; and its log of calls."""
    version, valued, switches = RELEASES[request.param]
    path, log = tmp_path / "cmpossl", tmp_path / "calls"
    values = {"version": version, "valued": f"{OLD_VALUED} {valued}", "switches": switches}
    path.write_text(STAND_IN.format(python=sys.executable, openssl=OPENSSL, log=str(log), **values))
    path.chmod(0o755)
    return str(path), log


old_releases = pytest.mark.parametrize("old_openssl", RELEASES, indirect=True)


@old_releases
def test_old_cmpossl(
    old_openssl: tuple[str, Path], request: pytest.FixtureRequest, ca: DemoCA, handlers: Handlers
) -> None:
    """It knows no -csr for `ir`: names go by -sans, time limits in its own spelling, and it is issued."""
    path, log = old_openssl
    handler = handlers(ca.options(), openssl_bin=path, msg_timeout="4")
    leaf = enrolled(handler, csr_pem(["a.example", "b.example"]))[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["a.example", "b.example"]
    call = next(line for line in log.read_text().splitlines() if "-server" in line)
    assert " -sans a.example,b.example " in call + " "
    assert " -csr " not in call
    underscore = "_" if "2020" in request.node.name else ""
    assert f" -msg{underscore}timeout 4 " in call
    assert f" -total{underscore}timeout 10 " in call
    assert "-san_nodefault" not in call  # with -sans it would only make a warning
    enrolled(handler, csr_pem([], "Build server"))
    call = [line for line in log.read_text().splitlines() if "-server" in line][-1]
    assert ("-san_nodefault" in call) == ("2020" in request.node.name)


@old_releases
def test_old_cmpossl_and_p10cr(old_openssl: tuple[str, Path], ca: DemoCA, handlers: Handlers) -> None:
    """cmp_cmd `p10cr`: the CSR goes by -csr, and it is issued."""
    path, log = old_openssl
    assert len(enrolled(handlers(ca.options(), openssl_bin=path, cmd="p10cr"), csr_pem(["a.b"], "a.b"))) == 3
    assert " -csr " in log.read_text()


@old_releases
def test_what_an_old_cmpossl_cannot_carry(
    old_openssl: tuple[str, Path], ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A must-staple extension is left out with a warning; a subject with a line break is an error."""
    handler = handlers(ca.options(), openssl_bin=old_openssl[0])
    must_staple = x509.TLSFeature([x509.TLSFeatureType.status_request])
    enrolled(handler, csr_pem(["a.example"], extensions=[must_staple]))
    assert any("1.3.6.1.5.5.7.1.24" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    error = handler.enroll(csr_pem(["a.example"], "line\nbreak"))[0]
    assert error and "cannot carry the subject" in error and "OpenSSL 3.0" in error
