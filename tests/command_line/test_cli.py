"""All can be done on the command line: convert, check, enroll, poll and revoke, as an administrator types them."""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

import cmp_ca_handler
from conftest import OPENSSL, bundle_certificates, csr_pem, wait_until
from demo_ca import DemoCA
from host import HANDLER
from shared import Desk, age, called, hold, run

# The user's document, word for word: its command line, and the section that it says this gives. The document's
# section has the directory of the files, and cmp_tmp_dir, which no command line knows.
DOCUMENT_COMMAND = (
    "acme_srv/cmp/WindowsCMPOpenSSL/openssl.exe cmp -cmd ir -server 192.168.14.137:8080 -path pkix/ -ref 1234 "
    '-secret pass:xxx -recipient "/C=DE/CN=tst_sub_ca" -newkey pubkey.pem -cert ra_cert.pem -trusted capubs.pem '
    "-popo 0 -subject /CN=test-cert -extracertsout ca_certs.pem -certout test-cert.pem  -ignore_keyusage"
)
DOCUMENT_SECTION = """\
[CAhandler]
handler_module: cmp_ca_handler
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
    section = dict(parser["CAhandler"])
    assert section.pop("handler_module") == "cmp_ca_handler"
    return section


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_convert_gives_the_documents_section() -> None:
    """The document's command line: its section, and notes on what the handler sets and on the secret."""
    result = run("convert", stdin=DOCUMENT_COMMAND)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if not line.startswith("#")] == DOCUMENT_SECTION.splitlines()
    assert "set by the handler itself: -cmd -newkey -popo -subject -extracertsout -certout" in result.stdout
    assert "this file contains the secret; use cmp_secret_variable: NAME instead" in result.stdout


def test_convert_leaves_out_an_empty_config() -> None:
    """The command that `check` prints has an empty -config, which the handler sets itself."""
    result = run("convert", "--", "openssl", "cmp", "-config", "", "-server", "127.0.0.1:80")
    assert section_of(result.stdout) == {"cmp_openssl_bin": "openssl", "cmp_server": "127.0.0.1:80"}
    assert "# set by the handler itself: -config" in result.stdout


def test_convert_leaves_out_an_empty_value() -> None:
    """To openssl it is a value: none, and not True."""
    result = run("convert", "--", "openssl", "cmp", "-path", "", "-server=127.0.0.1:80", "-ignore_keyusage")
    expected = {"cmp_openssl_bin": "openssl", "cmp_server": "127.0.0.1:80", "cmp_ignore_keyusage": "True"}
    assert (result.returncode, section_of(result.stdout)) == (0, expected)


@pytest.mark.parametrize(
    "pasted",
    [
        "$ openssl cmp -cmd ir \\\n   -server 127.0.0.1:80 \\\n -recipient '/C=DE/O=A, B/CN=x\\/y' -implicit_confirm\n",
        "openssl cmp -server=127.0.0.1:80 --recipient '/C=DE/O=A, B/CN=x\\/y' -implicit_confirm -popo 0",
        "C:\\work>openssl cmp -cmd ir ^\nMore? -server 127.0.0.1:80 `\n>> -recipient '/C=DE/O=A, B/CN=x\\/y' \\\n"
        "> -implicit_confirm",
    ],
    ids=["continued", "equals", "prompts"],
)
def test_convert_reads_a_pasted_line(pasted: str) -> None:
    """A line with prompts and backslashes, or with `-server=` and `--recipient`: the same section."""
    result = run("convert", stdin=pasted)
    assert result.returncode == 0, result.stderr
    section = section_of(result.stdout)
    assert (section["cmp_openssl_bin"], section["cmp_server"]) == ("openssl", "127.0.0.1:80")
    assert section["cmp_recipient"] == "C=DE, O=A\\, B, CN=x/y"
    assert section["cmp_implicit_confirm"] == "True"
    assert "cmp_popo" not in section


def test_convert_reports_unknown_options() -> None:
    """A misspelt option and one of a server, an option given twice, no server: each is named; exit code 1."""
    result = run("convert", "--", OPENSSL, "cmp", "-server", "h:1", "-trsted", "-port", "80")
    assert result.returncode == 1
    assert "no option -trsted; did you mean cmp_trusted?" in result.stderr
    assert "-port is not for enrolling" in result.stderr
    twice = run("convert", "openssl", "cmp", "-provider", "default", "-provider", "legacy")
    assert twice.returncode == 1 and "cmp_provider: is there twice" in twice.stderr
    assert "there is no -server, nor -config or -section" in twice.stderr and "no -server" not in result.stderr
    assert run("convert", "openssl", "cmp", "-section", "x").returncode == 0
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("words", ["", "ls -l", "openssl req -new", "openssl cmp -server 'x"])
def test_convert_refuses_what_is_no_cmp_command(words: str) -> None:
    """No words, another program, `openssl req`, an open quote: one error line and exit code 4."""
    result = run("convert", stdin=words)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words, key",
    [(["-ref", "no"], "cmp_ref"), (["-secret", "pass:x "], "cmp_secret"), (["-ref", '"x"'], "cmp_ref")],
    ids=["switch", "blank", "quotes"],
)
def test_convert_reports_what_a_section_cannot_hold(words: list[str], key: str) -> None:
    """A value that a file would turn into a switch, cut, or show in quotes: an error names the key; exit code 1."""
    result = called("convert", "--", OPENSSL, "cmp", "-server", "127.0.0.1:80", *words)
    (error,) = result.stderr.splitlines()
    assert result.returncode == 1 and error.startswith(f"error: {key}: ")


def test_a_working_command_line_leads_to_a_certificate(ca: DemoCA, desk: Desk) -> None:
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
    assert again.returncode == 1 and "certRevoked" in again.stderr and "urn:" not in again.stderr
    assert os.listdir(desk.directory / "work") == []


def test_an_order_that_waits_on_the_command_line_is_polled(ca: DemoCA, desk: Desk) -> None:
    """`enroll` ends with 3 and prints an identifier; `poll` prints the bundle after the approval, twice."""
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


def test_der_files_are_enrolled(ca: DemoCA, desk: Desk) -> None:
    """`enroll` of a CSR in DER prints the bundle."""
    desk.configure(ca.options())
    (desk.directory / "www.pem").write_text(csr_pem(["www.example"]))
    command = [OPENSSL, "req", "-in", "www.pem", "-outform", "DER", "-out", "www.der"]
    subprocess.run(command, cwd=desk.directory, check=True)
    assert len(bundle_certificates(desk("enroll", "www.der").stdout)) == 3


def other_key(desk: Desk, ca: DemoCA) -> dict[str, str | None]:
    return {"key": str(Path(ca.options("certificate")["cmp_key"]).with_name("tls.key"))}


def encrypted_key(desk: Desk, ca: DemoCA) -> dict[str, str | None]:
    command = [OPENSSL, "pkey", "-in", ca.options("certificate")["cmp_key"], "-aes128", "-passout", "pass:right"]
    subprocess.run([*command, "-out", "locked.key"], cwd=desk.directory, check=True)
    return {"key": "locked.key", "keypass": "pass:wrong-one"}


# What handler_check() says, which test_configuration.py is about, is what `check` prints.
BROKEN: dict[str, tuple[Any, str]] = {
    "typo": ({"trsted": "x.pem"}, "did you mean cmp_trusted?"),
    "no cmp": ({"openssl_bin": "/bin/true"}, "has no cmp command"),
    "not a pair": (other_key, "does not belong to"),
    "pass phrase": (encrypted_key, "check cmp_keypass"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_finds_each_fault(case: str, ca: DemoCA, desk: Desk) -> None:
    """A typo, an openssl without CMP, a key of another certificate, a wrong pass phrase: one error, exit code 4."""
    changes, expected = BROKEN[case]
    if callable(changes):
        changes = changes(desk, ca)
    desk.configure(ca.options("certificate"), **changes)
    result = desk("check")
    assert result.returncode == 4
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and expected in errors[0]
    assert result.stderr == "" and "wrong-one" not in result.stdout


def test_check_fits_a_terminal(ca: DemoCA, desk: Desk) -> None:
    """`check` and `--help` print no line over 80 columns, but for paths and warnings, and no colours."""
    desk.configure({**ca.options(), "cmp_trusted": "root.pem"})
    shutil.copy(ca.options()["cmp_trusted"], desk.directory / "root.pem")
    result = desk("check")
    assert result.returncode == 0
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("file ", "tmp_dir ", "warning: "))]
    assert max(map(len, lines)) <= 80 and "\x1b" not in result.stdout
    assert max(map(len, run("--help").stdout.splitlines())) <= 80


def test_options_work_before_and_after_the_command(make_ca: Callable[..., DemoCA], desk: Desk) -> None:
    """`--config` and `--section` work on both sides; so does --json."""
    desk.configure(make_ca().options())
    with (desk.directory / "acme_srv.cfg").open("a") as file:
        file.write("[CAhandler:second]\ncmp_path: another/\n")
    named = ["--config", "acme_srv.cfg", "--section", "CAhandler:second", "--json"]
    for words in ([*named, "check"], ["check", *named]):
        result = subprocess.run(
            [sys.executable, "-S", str(HANDLER), *words], cwd=desk.directory, capture_output=True, text=True, timeout=60
        )
        told = json.loads(result.stdout)
        assert told["ok"] and " -path another/ " in told["command"] and result.returncode == 0, result.stdout


def test_convert_works_without_dashes() -> None:
    """As the words stand in a shell's history."""
    result = run("convert", "openssl", "cmp", "-cmd", "ir", "-server", "127.0.0.1:80", "-v", "-section", "x")
    assert "no option -v" in result.stderr
    result = run("convert", "openssl", "cmp", "-cmd", "ir", "-server", "127.0.0.1:80", "-config", "", "-section", "x")
    expected = {"cmp_openssl_bin": "openssl", "cmp_server": "127.0.0.1:80", "cmp_section": "x"}
    assert (result.returncode, section_of(result.stdout)) == (0, expected), result.stderr


def test_convert_does_not_take_a_variable_for_a_value() -> None:
    """A shell would put its value there."""
    for word in ("$SECRET", '"${SECRET}"', "pass:$SECRET", '"pass:$(cat secret)"', "pass:`cat secret`", "%SECRET%"):
        result = run("convert", stdin=f"openssl cmp -server 127.0.0.1:80 -ref 1 -secret {word}")
        assert result.returncode == 4 and result.stdout == ""
        assert "is a variable of the shell" in result.stderr and "env:NAME" in result.stderr


def test_convert_takes_a_secret_in_quotes_as_it_is() -> None:
    """Between single quotes a dollar sign is no variable; what is one is named without what stands around it."""
    command = "openssl cmp -server 127.0.0.1:80 -ref 1 -secret"
    assert "cmp_secret: pass:pa$word" in run("convert", stdin=f"{command} 'pass:pa$word'").stdout
    refused = run("convert", stdin=f"{command} pass:hush$word")
    assert "$word is a variable" in refused.stderr and "hush" not in refused.stderr


def test_convert_reports_an_environment_before_the_command() -> None:
    """Variables before `openssl` are to be set for acme2certifier: each is named, its value is not shown."""
    result = run("convert", stdin="OPENSSL_CONF=/x HTTP_PROXY=hush openssl cmp -server 127.0.0.1:80")
    assert "OPENSSL_CONF=: set this variable for acme2certifier's process, too" in result.stderr
    assert "HTTP_PROXY=: set this variable" in result.stderr and "hush" not in result.stderr


def test_a_csr_in_utf_16_is_enrolled(ca: DemoCA, desk: Desk) -> None:
    """Exchange and PowerShell write these."""
    desk.configure(ca.options())
    for encoding in ("utf-16", "utf-8-sig"):
        (desk.directory / "www.csr").write_text(csr_pem(["www.example"]), encoding=encoding)
        assert desk("enroll", "www.csr").returncode == 0


def test_no_configuration_names_the_places_that_were_looked_at(tmp_path: Path) -> None:
    """The places that were looked at, and both ways to name another one."""
    environment = {key: value for key, value in os.environ.items() if key != "ACME_SRV_CONFIGFILE"}
    command = [sys.executable, "-S", str(HANDLER), "check"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    words = [f"{tmp_path}/acme_srv.cfg", f"{tmp_path}/acme_srv/acme_srv.cfg", "--config", "ACME_SRV_CONFIGFILE"]
    assert result.returncode == 4 and [word for word in words if word not in result.stderr] == []


def test_a_poll_beside_another_one_may_be_tried_again(ca: DemoCA, desk: Desk) -> None:
    """It may be tried again: another exit code than that of an order that waits."""
    desk.configure(hold(ca).options(), total_timeout="5")
    (desk.directory / "www.csr").write_text(csr_pem(["www.example"]))
    identifier = desk("enroll", "www.csr").stdout.strip()
    with (desk.directory / "work" / identifier / "waiting").open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        polled = desk("poll", identifier)
    assert polled.returncode == 5 and "another poll of it is in progress" in polled.stderr


def test_warnings_about_orders_are_shown(ca: DemoCA, desk: Desk) -> None:
    """Without -v, too: here what a killed enrolment has left. Those about the configuration are for `check`."""
    desk.configure(ca.options(), ignore_keyusage="True", no_check_time="True")
    left = desk.directory / "work" / ("0" * 32)
    left.mkdir(parents=True)
    (left / "enrolling").touch()
    age(left, 4000)
    (desk.directory / "www.csr").write_text(csr_pem(["www.example"]))
    said = desk("enroll", "www.csr").stderr
    assert said.startswith("deleted what a killed process left: ") and said.count("\n") == 1, said


def test_list_shows_the_orders_that_wait(ca: DemoCA, desk: Desk) -> None:
    """The orders that wait, for people and for programs: identifier, names, since when, next question, transaction."""
    desk.configure(ca.options(), total_timeout="5")
    assert (desk("list").returncode, desk("list").stdout, desk("list", "--json").stdout) == (0, "", "[]\n")
    ca.hold = True
    (desk.directory / "www.csr").write_text(csr_pem(["www.example"]))
    waiting = desk("enroll", "www.csr", "--json")
    told = json.loads(waiting.stdout)
    assert (waiting.returncode, told["status"]) == (3, "waiting")
    (order,) = json.loads(desk("list", "--json").stdout)
    assert order.keys() == {"id", "names", "since", "next", "transaction"}
    assert (order["id"], order["names"]) == (told["id"], "DNS:www.example")
    line = desk("list").stdout
    assert line.startswith(f"id={told['id']} names=DNS:www.example since=") and len(line.splitlines()) == 1


# What was typed -> the exit code, as `--help` tells it.
CODES: dict[str, tuple[dict[str, str | None], str, int]] = {
    "done": ({}, "enroll www.csr", 0),
    "the CA's no": ({}, "enroll refused.csr", 1),
    "an unusable CSR": ({}, "enroll bad.csr", 1),
    "wrong usage": ({}, "enroll", 2),
    "no such file": ({}, "enroll nowhere.csr", 2),
    "waiting": ({"total_timeout": "5"}, "enroll waiting.csr", 3),
    "openssl without words": ({"verbosity": "2"}, "enroll www.csr", 4),
    "wrong configuration": ({"trusted": "nowhere.pem"}, "enroll www.csr", 4),
    "wrong secret": ({"secret": "another-one"}, "enroll www.csr", 4),
    "nobody there": ({"server": "127.0.0.1:9", "msg_timeout": "2", "total_timeout": "2"}, "enroll www.csr", 5),
}


@pytest.mark.parametrize("case", CODES)
def test_exit_codes_tell_how_an_enrolment_ended(case: str, ca: DemoCA, desk: Desk) -> None:
    """A script can act on them; --json tells the same in words."""
    changes, words, code = CODES[case]
    desk.configure(ca.options(), **changes)
    for name in ("www", "waiting", "refused"):
        (desk.directory / f"{name}.csr").write_text(csr_pem([f"{name}.example"]))
    (desk.directory / "bad.csr").write_text("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END")
    ca.hold, ca.reject = case == "waiting", "badCertTemplate" if case == "the CA's no" else ""
    result = desk(*words.split(), "--json")
    assert result.returncode == code, result.stderr
    if result.stdout:
        told = json.loads(result.stdout)
        assert told["status"] == {0: "done", 3: "waiting"}.get(code, "failed")
        assert told.get("result", "").startswith("-----BEGIN CERTIFICATE-----") == (code == 0)


@pytest.mark.parametrize("words", ["cacerts", "list", "--section foo check", "--section foo list"])
def test_every_failure_is_told_in_json(words: str, ca: DemoCA, desk: Desk) -> None:
    """A CA that cannot be asked for its certificates, no section, or one that is not there: --json says so, too."""
    desk.configure(ca.options(), secret="another-one")
    if words == "list":
        (desk.directory / "acme_srv.cfg").write_text("[Order]\n")
    for typed in (["--json", *words.split()], [*words.split(), "--json"]):
        result = desk(*typed)
        told = json.loads(result.stdout)
        assert result.returncode == 4 and told["status"] == "failed" and told["error"] and told["class"], told
        assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 2),
        (("nonsense",), 2),
        (("--help",), 0),
        (("--version",), 0),
        (("enroll", "nowhere.csr"), 2),
        (("poll", "../x"), 1),
    ],
)
def test_exit_codes_come_without_a_traceback(arguments: tuple[str, ...], code: int, ca: DemoCA, desk: Desk) -> None:
    """No command, a wrong one, --help, --version, a CSR or an order that is not there: a code each, no traceback."""
    desk.configure(ca.options())
    result = desk(*arguments)
    assert result.returncode == code
    assert "Traceback" not in result.stderr


def test_sections_of_several_cas_have_to_be_named(make_ca: Callable[..., DemoCA], desk: Desk) -> None:
    """`--section CAhandler:second` enrols at the second CA alone; no section, or one that is not there: an error."""
    first, second = make_ca(), make_ca()
    desk.configure(first.options())
    with (desk.directory / "acme_srv.cfg").open("a") as file:
        file.write(f"[CAhandler:second]\ncmp_server: {second.server}\n")
    (desk.directory / "www.csr").write_text(csr_pem(["www.example"]))
    assert desk("--section", "CAhandler:second", "enroll", "www.csr").returncode == 0
    assert (len(first.issued()), len(second.issued())) == (0, 1)
    desk.configure(first.options(), server=None)
    with (desk.directory / "acme_srv.cfg").open("a") as file:
        file.write(f"[CAhandler:first]\ncmp_server: {first.server}\n[CAhandler:second]\ncmp_server: {second.server}\n")
    for words in ("check", "enroll www.csr", "poll x", "list", "cacerts", "revoke www.csr"):
        unnamed = desk(*words.split())
        assert (unnamed.returncode, unnamed.stdout) == (4, "")
        assert unnamed.stderr.endswith("name a section with --section: CAhandler:first, CAhandler:second\n")
    missing = desk("--section", "CAhandler:third", "check")
    assert missing.returncode == 4 and "no section [CAhandler:third]" in missing.stderr


def test_loading_is_cheap() -> None:
    """The host loads the file at every start: argparse, difflib and the like stay out."""
    code = (
        "import sys, cmp_ca_handler; print(sorted({'argparse', 'difflib', 'configparser', 'shlex'} & set(sys.modules)))"
    )
    command = [sys.executable, "-S", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(HANDLER.parent)}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == "[]"


def test_a_closed_stream_costs_no_certificate(ca: DemoCA, tmp_path: Path) -> None:
    """The shell has closed standard input, output or error: the bundle is in the file all the same."""
    desk = Desk(tmp_path)
    desk.configure(ca.options())
    (tmp_path / "www.csr").write_text(csr_pem(["www.example"]))
    for number, closed in enumerate(["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]):
        command = f"exec {sys.executable} {HANDLER} --config acme_srv.cfg enroll www.csr -o {number}.pem {closed}"
        assert subprocess.run(["sh", "-c", command], cwd=tmp_path).returncode == 0, closed
        assert "BEGIN CERTIFICATE" in (tmp_path / f"{number}.pem").read_text()


def test_a_full_standard_output_is_told(ca: DemoCA, tmp_path: Path) -> None:
    """What is full is not cmp_tmp_dir, and a second enrolment would not help."""
    desk = Desk(tmp_path)
    desk.configure(ca.options())
    (tmp_path / "www.csr").write_text(csr_pem(["www.example"]))
    for more, told in (("", "error: cannot write the result: No space left on device\n"), ("--json", "")):
        command = f"exec {sys.executable} {HANDLER} --config acme_srv.cfg {more} enroll www.csr >/dev/full"
        result = subprocess.run(["sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        assert (result.returncode, result.stderr) == (1, told)


def test_convert_names_an_option_without_its_value(capfd: pytest.CaptureFixture[str]) -> None:
    """The end of the command line was not copied."""
    assert cmp_ca_handler.main(["convert", "--", "openssl", "cmp", "-server", "ca:1", "-ref", "x", "-secret"]) == 1
    assert "error: cmp_secret: needs a value, and the command line ends there" in capfd.readouterr().err
