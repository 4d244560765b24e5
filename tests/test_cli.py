"""The command line: convert, check, enroll, poll and revoke, as an administrator types them."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from conftest import OPENSSL, bundle_certificates, csr_pem, nobody_at, wait_until
from demo_ca import DemoCA
from host import HANDLER
from shared import Desk, run

# The user's document, word for word: its command line, and the section that it says this gives. The document's
# section has the directory of the files, and cmp_tmp_dir, which no command line knows.
DOCUMENT_COMMAND = (
    "acme_srv/cmp/WindowsCMPOpenSSL/openssl.exe cmp -cmd ir -server 192.168.14.137:8080 -path pkix/ -ref 1234 "
    '-secret pass:xxx -recipient "/C=DE/CN=tst_sub_ca" -newkey pubkey.pem -cert ra_cert.pem -trusted capubs.pem '
    "-popo 0 -subject /CN=test-cert -extracertsout ca_certs.pem -certout test-cert.pem  -ignore_keyusage"
)
DOCUMENT_SECTION = """\
[CAhandler]
cmp_openssl_bin: acme_srv/cmp/WindowsCMPOpenSSL/openssl.exe
cmp_server: 192.168.14.137:8080
cmp_path: pkix/
cmp_cert: ra_cert.pem
cmp_ref: 1234
cmp_secret: pass:xxx
cmp_trusted: capubs.pem
cmp_recipient: C=DE, CN=tst_sub_ca
cmp_ignore_keyusage: True
"""


def section_of(text: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(text)
    return dict(parser["CAhandler"])


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_convert_gives_the_documents_section() -> None:
    result = run("convert", stdin=DOCUMENT_COMMAND)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if not line.startswith("#")] == DOCUMENT_SECTION.splitlines()
    assert "set by the handler itself: -cmd -newkey -popo -subject -extracertsout -certout" in result.stdout
    assert "better cmp_secret_variable" in result.stdout


def test_convert_without_a_configuration_file() -> None:
    """The command that `check` prints has an empty -config, which the handler sets itself."""
    result = run("convert", "--", "openssl", "cmp", "-config", "", "-server", "127.0.0.1:80")
    assert section_of(result.stdout) == {"cmp_openssl_bin": "openssl", "cmp_server": "127.0.0.1:80"}
    assert "# set by the handler itself: -config" in result.stdout


def test_convert_of_an_empty_value() -> None:
    """To openssl it is a value: none, and not True."""
    result = run("convert", "--", "openssl", "cmp", "-path", "", "-server=127.0.0.1:80", "-ignore_keyusage")
    expected = {"cmp_openssl_bin": "openssl", "cmp_server": "127.0.0.1:80", "cmp_ignore_keyusage": "True"}
    assert (result.returncode, section_of(result.stdout)) == (0, expected)


@pytest.mark.parametrize(
    "pasted",
    [
        "$ openssl cmp -cmd ir \\\n   -server 127.0.0.1:80 \\\n -recipient '/C=DE/O=A, B/CN=x\\/y' -implicit_confirm\n",
        "openssl cmp -server=127.0.0.1:80 --recipient '/C=DE/O=A, B/CN=x\\/y' -implicit_confirm -popo 0",
    ],
    ids=["continued", "equals"],
)
def test_convert_pasted(pasted: str) -> None:
    result = run("convert", stdin=pasted)
    assert result.returncode == 0, result.stderr
    section = section_of(result.stdout)
    assert section["cmp_server"] == "127.0.0.1:80"
    assert section["cmp_recipient"] == "C=DE, O=A\\, B, CN=x/y"
    assert section["cmp_implicit_confirm"] == "True"
    assert "cmp_popo" not in section


def test_convert_reports_unknown_options() -> None:
    result = run("convert", "--", OPENSSL, "cmp", "-server", "h:1", "-trsted", "-port", "80")
    assert result.returncode == 1
    assert "no option -trsted; did you mean -trusted?" in result.stderr
    assert "-port is not for enrolling" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("words", ["", "ls -l", "openssl req -new", "openssl cmp -server 'x"])
def test_convert_what_is_no_cmp_command(words: str) -> None:
    result = run("convert", stdin=words)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_from_a_working_command_line_to_a_certificate(ca: DemoCA, desk: Desk) -> None:
    """What the user's document asks for: try on the command line, convert, check, enroll, revoke."""
    command = [OPENSSL, "cmp", "-cmd", "ir", "-server", ca.server, "-path", "pkix/", "-ref", "1234"]
    command += ["-secret", "pass:demo-secret", "-recipient", "/C=DE/O=Demo/CN=Demo Issuing CA", "-newkey", "key.pem"]
    command += ["-trusted", ca.options()["cmp_trusted"]]
    command += ["-subject", "/CN=x", "-certout", "x.pem"]
    subprocess.run([OPENSSL, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", "key.pem"],
                   cwd=desk.directory, check=True, capture_output=True)  # fmt: skip
    subprocess.run(command, cwd=desk.directory, check=True, capture_output=True)

    converted = run("convert", "--", *command)
    (desk.directory / "acme_srv.cfg").write_text(converted.stdout + "cmp_tmp_dir: work\n")
    checked = desk("check", "--connect")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "no errors found" in checked.stdout and "trust: yes, credentials: yes" in checked.stdout
    assert "demo-secret" not in checked.stdout + checked.stderr

    (desk.directory / "www.csr").write_text(csr_pem(["www.example", "example"]))
    enrolled = desk("-v", "enroll", "www.csr", "-o", "www.pem")
    assert (enrolled.returncode, enrolled.stdout) == (0, ""), enrolled.stderr
    assert "openssl cmp: received IP" in enrolled.stderr and "demo-secret" not in enrolled.stderr
    leaf, issuer, root = bundle_certificates((desk.directory / "www.pem").read_text())
    assert leaf.issuer == issuer.subject and issuer.issuer == root.subject
    assert desk("revoke", "www.pem", "--reason", "superseded").returncode == 0
    assert ca.is_revoked(f"{leaf.serial_number:X}".zfill(32))
    again = desk("revoke", "www.pem")
    assert again.returncode == 1 and "alreadyRevoked" in again.stderr
    assert os.listdir(desk.directory / "work") == []


def test_waiting(ca: DemoCA, desk: Desk) -> None:
    ca.hold = True
    desk.configure(ca.options(), total_timeout="5")
    (desk.directory / "www.csr").write_text(csr_pem(["www.example"]))
    enrolled = desk("enroll", "www.csr")
    assert enrolled.returncode == 3, enrolled.stderr
    identifier = enrolled.stdout.strip()
    assert f"poll {identifier}" in enrolled.stderr
    assert desk("poll", identifier).returncode == 3
    wait_until(lambda: ca.approve("all"), "a request to approve")
    polled = desk("poll", identifier)
    assert polled.returncode == 0, polled.stderr
    assert len(bundle_certificates(polled.stdout)) == 3
    assert desk("poll", identifier).stdout == polled.stdout  # kept for a day
    unknown = desk("poll", "0" * 32)
    assert unknown.returncode == 1 and "no transaction" in unknown.stderr


def test_der_files(ca: DemoCA, desk: Desk) -> None:
    desk.configure(ca.options())
    (desk.directory / "www.pem").write_text(csr_pem(["www.example"]))
    command = [OPENSSL, "req", "-in", "www.pem", "-outform", "DER", "-out", "www.der"]
    subprocess.run(command, cwd=desk.directory, check=True)
    assert len(bundle_certificates(desk("enroll", "www.der").stdout)) == 3


def expired(desk: Desk, ca: DemoCA) -> dict[str, str | None]:
    """An RA certificate that is valid no more."""
    key = serialization.load_pem_private_key(Path(ca.options("certificate")["cmp_key"]).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "old")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(datetime(2020, 1, 1)).not_valid_after(datetime(2020, 2, 1))
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    (desk.directory / "old.pem").write_bytes(pem)
    return {"cert": "old.pem"}


def other_key(desk: Desk, ca: DemoCA) -> dict[str, str | None]:
    return {"key": str(Path(ca.options("certificate")["cmp_key"]).with_name("tls.key"))}


def encrypted_key(desk: Desk, ca: DemoCA) -> dict[str, str | None]:
    command = [OPENSSL, "pkey", "-in", ca.options("certificate")["cmp_key"], "-aes128", "-passout", "pass:right"]
    subprocess.run([*command, "-out", "locked.key"], cwd=desk.directory, check=True)
    return {"key": "locked.key", "keypass": "pass:wrong-one"}


BROKEN: dict[str, tuple[Any, str]] = {
    "typo": ({"trsted": "x.pem"}, "did you mean cmp_trusted?"),
    "missing file": ({"trusted": "nowhere.pem"}, "nowhere.pem is not a file"),
    "unset variable": ({"secret": "env:NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE is not set"),
    "no server": ({"server": None}, "cmp_server is missing"),
    "no credentials": ({"cert": None, "key": None}, "no credentials"),
    "no openssl": ({"openssl_bin": "/nowhere/openssl"}, "is not an executable program"),
    "no cmp": ({"openssl_bin": "/bin/true"}, "has no cmp command"),
    "switch with a value": ({"ignore_keyusage": "1"}, "set it to True or False"),
    "value that is a switch": ({"server": "True"}, "needs a value"),
    "recipient": ({"recipient": "Demo Issuing CA"}, "is not a distinguished name"),
    "time-out": ({"total_timeout": "soon"}, "must be a number of seconds"),
    "directory": ({"tmp_dir": "/dev/null"}, "cmp_tmp_dir"),
    "server option": ({"port": "80"}, "is not for enrolling"),
    "expired": (expired, "has expired"),
    "not a pair": (other_key, "does not belong to"),
    "pass phrase": (encrypted_key, "cannot be opened"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_finds(case: str, ca: DemoCA, desk: Desk) -> None:
    changes, expected = BROKEN[case]
    if callable(changes):
        changes = changes(desk, ca)
    desk.configure(ca.options("certificate"), **changes)
    result = desk("check")
    assert result.returncode == 1
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0]
    assert result.stderr == "" and "wrong-one" not in result.stdout


def test_check_names_every_fault(ca: DemoCA, desk: Desk) -> None:
    desk.configure(ca.options(), trsted="x", trusted="nowhere", server=None)
    errors = [line for line in desk("check").stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3


def test_check_connect_says_that_nobody_answers(ca: DemoCA, desk: Desk) -> None:
    desk.configure(ca.options())
    ca.stop()
    with nobody_at(ca.port):
        result = desk("check", "--connect")
    assert result.returncode == 1 and "does not answer" in result.stdout


def test_check_fits_a_terminal(ca: DemoCA, desk: Desk) -> None:
    desk.configure({**ca.options(), "cmp_trusted": "root.pem"})
    shutil.copy(ca.options()["cmp_trusted"], desk.directory / "root.pem")
    result = desk("check")
    assert result.returncode == 0
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("file ", "tmp_dir ", "warning: "))]
    assert max(map(len, lines)) <= 80 and "\x1b" not in result.stdout
    assert max(map(len, run("--help").stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("nonsense",), 2),
        (("--help",), 0),
        (("--version",), 0),
        (("enroll", "nowhere.csr"), 1),
        (("poll", "../x"), 1),
    ],
)
def test_exit_codes(arguments: tuple[str, ...], code: int, ca: DemoCA, desk: Desk) -> None:
    desk.configure(ca.options())
    result = desk(*arguments)
    assert result.returncode == code
    assert "Traceback" not in result.stderr


def test_sections_of_several_cas(make_ca: Callable[..., DemoCA], desk: Desk) -> None:
    first, second = make_ca(), make_ca()
    desk.configure(first.options())
    with (desk.directory / "acme_srv.cfg").open("a") as file:
        file.write(f"[CAhandler:second]\ncmp_server: {second.server}\n")
    (desk.directory / "www.csr").write_text(csr_pem(["www.example"]))
    assert desk("--section", "CAhandler:second", "enroll", "www.csr").returncode == 0
    assert (len(first.issued()), len(second.issued())) == (0, 1)
    missing = desk("--section", "CAhandler:third", "check")
    assert missing.returncode == 1 and "no section [CAhandler:third]" in missing.stderr


def test_copied_into_an_old_host(ca: DemoCA, desk: Desk) -> None:
    """`python3 acme_srv/ca_handler.py check` in a host's tree finds the host's configuration beside it."""
    host = desk.directory / "acme_srv"
    host.mkdir()
    shutil.copy(HANDLER, host / "ca_handler.py")
    desk.configure(ca.options())
    shutil.move(str(desk.directory / "acme_srv.cfg"), host / "acme_srv.cfg")
    command = [sys.executable, "-S", "acme_srv/ca_handler.py", "check"]
    environment = {key: value for key, value in os.environ.items() if key != "ACME_SRV_CONFIGFILE"}
    result = subprocess.run(command, cwd=desk.directory, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and ca.server in result.stdout, result.stdout + result.stderr


def test_loading_is_cheap() -> None:
    """The host loads the file at every start: argparse, difflib and the like stay out."""
    code = (
        "import sys, cmp_ca_handler; print(sorted({'argparse', 'difflib', 'configparser', 'shlex'} & set(sys.modules)))"
    )
    command = [sys.executable, "-S", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(HANDLER.parent)}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == "[]"
