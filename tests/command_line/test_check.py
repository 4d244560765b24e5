"""`check` says which file it has read and what is wrong with it; `check --connect` asks the CMP server."""

from __future__ import annotations

import datetime
import functools
import http.server
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12

import cmp_ca_handler
import demo_ca
from conftest import BINARIES, OPENSSL, Handlers, Mock, Pair, binaries, csr_pem, every_binary, needs_root, nobody_at
from demo_ca import DemoCA, read_der
from host import HANDLER
from other_cas import new_signer
from proxy import Forward, Proxy, TcpServer, body, protected, spoilt, status_info
from proxy import name as common_name
from shared import SHORT, Desk, findings, run, save_request, version

EVERYTHING = "address: yes, path: yes, trust: yes, credentials: yes"
MakeCA = Callable[..., DemoCA]
StartMock = Callable[..., Mock]


def run_openssl(*arguments: str | Path) -> None:
    """Make a file with openssl."""
    subprocess.run([OPENSSL, *arguments], check=True, capture_output=True)


class Checked:
    """The end of one run of check."""

    def __init__(self, result: subprocess.CompletedProcess[str]) -> None:
        self.code, self.output = result.returncode, result.stdout
        assert result.stderr == ""
        lines = result.stdout.splitlines()
        self.proven = next((line[7:].strip() for line in lines if line.startswith("proven ")), "")
        self.errors = [line for line in lines if line.startswith("error: ")]
        self.warnings = [line for line in lines if line.startswith("warning: ")]
        assert self.code == (4 if self.errors else 0)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """An administrator's directory."""
    return Desk(tmp_path)


@pytest.fixture
def connect(desk: Desk) -> Callable[..., Checked]:
    """`connect(ca.options(), path="nowhere")` is what `check --connect` says."""

    def check(section: Mapping[str, str], openssl: str = OPENSSL, **changes: str | None) -> Checked:
        desk.configure(dict(section), openssl_bin=openssl, **changes)
        return Checked(desk("check", "--connect"))

    return check


# --- check --connect --------------------------------------------------------------------------------------------------


@every_binary
@pytest.mark.parametrize("authentication", ["secret", "certificate"])
def test_check_proves_that_all_is_well(
    authentication: str, openssl: str, ca: DemoCA, connect: Callable[..., Checked]
) -> None:
    """By secret or certificate: `check --connect` proves every point with one genm, and nothing is issued."""
    checked = connect(ca.options(authentication), openssl)
    assert (checked.code, checked.proven) == (0, EVERYTHING), checked.output
    assert f"connect   http://{ca.server}/pkix/" in checked.output
    assert [message.request for message in ca.messages] == ["genm"] and ca.issued() == []


@every_binary
def test_check_proves_that_all_is_well_with_tls(openssl: str, make_ca: MakeCA, connect: Callable[..., Checked]) -> None:
    """OpenSSL 3.5 and later use it for https:// without cmp_tls_used, too."""
    options = make_ca(tls=True).options()
    by_itself = {key: value for key, value in options.items() if key != "cmp_tls_used"}
    for section in (options, by_itself) if version(openssl) >= (3, 5) else (options,):
        checked = connect({**section, "cmp_server": "https://" + section["cmp_server"]}, openssl)
        assert checked.proven == "address: yes, TLS: yes, path: yes, trust: yes, credentials: yes", checked.output


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """A web server with files: it has no POST."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Standard error is the command line's."""

    handler = functools.partial(Silent, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


FAULTS: dict[str, tuple[str, dict[str, str | None], str, str]] = {
    "path": ("secret", {"path": "nowhere"}, "address: yes, path: no", "check cmp_path"),
    "web server": ("secret", {"server": "{web}"}, "address: yes, path: no", "check cmp_server and cmp_path"),
    "secret": (
        "secret",
        {"secret": "another"},
        "path: yes, trust: no, credentials: no",
        "check cmp_ref and cmp_secret",
    ),
    "reference": ("secret", {"ref": "4321"}, "path: yes, trust: no, credentials: no", "check cmp_ref and cmp_secret"),
    "signer": ("certificate", {"trusted": "{other}"}, "path: yes, trust: no", "cmp_trusted must hold"),
    "sender": ("certificate", {"expect_sender": "CN=x"}, "path: yes, trust: no", "cmp_expect_sender does not fit"),
    "TLS name": ("TLS", {"tls_host": "cmp.example"}, "address: yes, TLS: no, path: no", "cmp_tls_host its name"),
    "TLS trust": ("TLS", {"tls_trusted": "{other}"}, "address: yes, TLS: no, path: no", "cmp_tls_trusted must hold"),
    "path behind TLS": ("TLS", {"path": "nowhere"}, "address: yes, TLS: yes, path: no", "check cmp_path"),
    "no TLS": ("TLS", {"tls_used": None, "tls_trusted": None}, "address: yes, path: no", "check cmp_tls_used"),
}


@binaries
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_told_by_one_error(
    fault: str, openssl: str, make_ca: MakeCA, web_server: str, tmp_path: Path, connect: Callable[..., Checked]
) -> None:
    """Path, TLS, trust and credentials are told apart, by one error."""
    authentication, changes, proven, expected = FAULTS[fault]
    ca = make_ca(tls=authentication == "TLS")
    other = tmp_path / "other.pem"
    run_openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "/dev/null", "-subj", "/CN=o", "-out", other
    )
    filled = {key: value and value.format(web=web_server, other=other) for key, value in changes.items()}
    section = ca.options("certificate" if authentication == "certificate" else "secret")
    checked = connect(section, openssl, **filled)
    assert proven in checked.proven, checked.output
    assert len(checked.errors) == 1 and expected in checked.errors[0], checked.output


@pytest.mark.parametrize("who", ["server", "proxy"])
def test_nobody_is_there_means_not_reached(who: str, ca: DemoCA, connect: Callable[..., Checked]) -> None:
    """What cannot be reached is neither right nor wrong."""
    with nobody_at() as port:
        checked = connect(ca.options(), **{who: f"127.0.0.1:{port}", **SHORT})
    assert len(checked.errors) == 1 and "nothing answers there: check cmp_server" in checked.errors[0]
    assert checked.proven == EVERYTHING.replace("yes", "not reached"), checked.output


@binaries
def test_an_authentic_refusal_of_the_general_message_proves_everything(
    openssl: str, mock: StartMock, pair: Pair, connect: Callable[..., Checked]
) -> None:
    """Not all CAs know general messages: an answer is an answer."""
    checked = connect(mock(pair.certificate, "-send_error").options(), openssl)
    assert (checked.code, checked.proven) == (0, EVERYTHING), checked.output
    assert any("authentically" in warning and "badRequest" in warning for warning in checked.warnings)


@binaries
def test_an_authentic_refusal_of_our_signer_is_an_error(
    openssl: str, ca: DemoCA, proxy: Proxy, connect: Callable[..., Checked]
) -> None:
    """signerNotTrusted, authentic: the answer is proven, and it is an error, for no enrolment will work."""

    def refuse(_: str, forward: Forward) -> bytes:
        header = read_der(forward()).parts()[0].whole
        return protected(header, header, body(23, status_info(2, [b"who is that?"], b"\0\0\0\x08")), b"")

    proxy.spoil = refuse
    checked = connect({**ca.options(), "cmp_server": proxy.server}, openssl)
    assert "trust: yes" in checked.proven
    (error,) = checked.errors
    assert error.startswith("error: the CA does not accept the credentials: ") and "signerNotTrusted, 'who is" in error


@binaries
@pytest.mark.parametrize("unprotected", ["-send_unprotected", "-send_error -send_unprot_err"])
@pytest.mark.parametrize("believed", [None, "True"])
def test_what_nobody_has_protected_proves_nothing(
    believed: str | None, unprotected: str, openssl: str, mock: StartMock, pair: Pair, connect: Callable[..., Checked]
) -> None:
    """Not with cmp_unprotected_errors either, which lets openssl take it."""
    section = mock(pair.certificate, *unprotected.split()).options()
    checked = connect(section, openssl, unprotected_errors=believed)
    assert (checked.code, checked.proven) == (4, "address: yes, path: yes, trust: no, credentials: no"), checked.output


@binaries
def test_a_wrong_mac_proves_nothing(openssl: str, mock: StartMock, pair: Pair, connect: Callable[..., Checked]) -> None:
    """A server whose MAC does not fit our secret: address and path are proven, trust and credentials not."""
    section = mock(pair.certificate, "-send_error").options()
    checked = connect(section, openssl, secret="another", unprotected_errors="True")
    assert (checked.code, checked.proven) == (4, "address: yes, path: yes, trust: no, credentials: no"), checked.output


@binaries
def test_a_signed_refusal_does_not_prove_the_credentials(
    openssl: str, mock: StartMock, pair: Pair, tmp_path: Path, connect: Callable[..., Checked]
) -> None:
    """A CA signs its no for strangers, too: here for one whose certificate it does not know."""
    started = mock(pair.certificate)
    subject: list[str | Path] = ["-subj", "/CN=stranger", "-keyout", tmp_path / "x.key", "-out", tmp_path / "x.pem"]
    run_openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-addext", "keyUsage=digitalSignature", *subject)
    credentials = {"ref": None, "secret": None, "cert": str(tmp_path / "x.pem"), "key": str(tmp_path / "x.key")}
    checked = connect(started.options(), openssl, **credentials)
    assert checked.proven == "address: yes, path: yes, trust: yes, credentials: no", checked.output


@binaries
@pytest.mark.parametrize("how", ["tampered", "unprotected", "garbage", "empty", "cut short"])
def test_an_answer_that_somebody_has_changed_proves_no_trust(
    how: str, openssl: str, ca: DemoCA, tcp_server: TcpServer, connect: Callable[..., Checked]
) -> None:
    """It proves neither trust nor credentials."""
    proxy = Proxy(ca, tcp_server)
    proxy.spoil_next("genm", lambda forward: spoilt(how, forward()))
    checked = connect({**ca.options(), "cmp_server": proxy.server}, openssl, **SHORT)
    assert checked.code == 4 and "trust: no, credentials: no" in checked.proven, checked.output


class StrictCA(DemoCA):
    """A CA that finds the secret by the sender's name, as RFC 9483, 3.1, has it, and not by senderKID alone."""

    def _new_context(self, envelope: demo_ca.Envelope) -> int:
        wanted = common_name(self.ref).public_bytes()
        return super()._new_context(envelope if self.sender == wanted else envelope._replace(reference=b"unknown"))

    def answer(self, data: bytes) -> bytes:
        """Look at the sender first."""
        self.sender = read_der(data).parts()[0].parts()[1].content
        return super().answer(data)


@binaries
def test_a_ca_that_wants_the_reference_as_the_sender_gets_it(
    openssl: str, ca_directory: Path, tmp_path: Path, connect: Callable[..., Checked], desk: Desk
) -> None:
    """A certificate gives openssl the sender's name, and needs no key."""
    shutil.copytree(ca_directory, tmp_path / "strict")
    with StrictCA(tmp_path / "strict") as ca:
        sender: list[str | Path] = ["-subj", f"/CN={ca.ref}", "-out", tmp_path / "sender.pem"]
        run_openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "/dev/null", *sender)
        alone = connect(ca.options(), openssl)
        assert alone.code == 4 and "check cmp_ref and cmp_secret" in alone.errors[0], alone.output
        changes = {"cert": "sender.pem", "issuer": ca.options()["cmp_recipient"]}
        both = connect(ca.options(), openssl, **changes)
        assert (both.code, both.proven) == (0, EVERYTHING), both.output
        (tmp_path / "www.csr").write_text(csr_pem(["www.example"]))
        assert desk("enroll", "www.csr").returncode == 0


# --- Which file -------------------------------------------------------------------------------------------------------


def test_the_nearest_file_is_read(ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """The one in the current directory comes before the one beside the script; both are said to be read."""
    beside = tmp_path / "acme_srv"
    beside.mkdir()
    script = Path(shutil.copy(HANDLER, beside / "ca_handler.py"))
    environment = {key: value for key, value in os.environ.items() if key != "ACME_SRV_CONFIGFILE"}
    call = functools.partial(subprocess.run, capture_output=True, text=True, env=environment, timeout=60)
    desk.configure(ca.options())
    shutil.copy(tmp_path / "acme_srv.cfg", beside)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for directory, expected in ((tmp_path, tmp_path / "acme_srv.cfg"), (elsewhere, beside / "acme_srv.cfg")):
        result = call([sys.executable, "-S", str(script), "check"], cwd=directory)
        assert result.stdout.startswith(f"file      {expected}\n"), result.stdout + result.stderr


def test_the_file_that_acme2certifier_finds_is_read(tmp_path: Path, ca: DemoCA, desk: Desk) -> None:
    """Its helper, here the one of an old release in a tree, looks for itself."""
    tree = tmp_path / "host" / "acme_srv"
    tree.mkdir(parents=True)
    helper = "import configparser, os\ndef load_config(logger, section):\n    config = configparser.ConfigParser()\n"
    helper += "    config.read(os.path.join(os.path.dirname(__file__), 'conf', 'acme_srv.cfg'))\n    return config\n"
    (tree / "__init__.py").touch()
    (tree / "helper.py").write_text(helper)
    (tree / "conf").mkdir()
    desk.configure(ca.options())
    shutil.move(tmp_path / "acme_srv.cfg", tree / "conf")
    (tmp_path / "empty").mkdir()
    result = run("check", cwd=tmp_path / "empty", PYTHONPATH=str(tree.parent))
    assert result.stdout.startswith("file      that of acme2certifier\n"), result.stdout + result.stderr
    assert ca.server in result.stdout and result.returncode == 0


def test_a_file_that_is_not_there_is_named(desk: Desk) -> None:
    """`check` of an acme_srv.cfg that does not exist: exit code 2 and one error line."""
    result = desk("check")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: No such file or directory: acme_srv.cfg\n"


FILES = {
    "twice": ("[CAhandler]\ncmp_ref: 1\ncmp_ref: 2\n", "option 'cmp_ref' in section 'CAhandler' already exists"),
    "Latin-1": ("[CAhandler]\ncmp_recipient: CN=M\xfcller\n", "save it in UTF-8"),
    "no section": ("cmp_secret: hush-hush\n", "no [section] before line 1"),
    "no value": ("[CAhandler]\ncmp_ref: 1\ncmp_secret hush-hush\n", "no key and value in line 3"),
    "another section": ("[Certificate]\nenrollment_timeout: 30\n", "no [CAhandler] section"),
    "empty": ("", "no [CAhandler] section"),
    "prose": ("Dear colleague,\n\nthe CA is at 10.0.0.1.\n", "acme_srv.cfg"),
}


@pytest.mark.parametrize("helper", [False, True], ids=["alone", "acme2certifier"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_cannot_be_read_is_the_only_fault(file: str, helper: bool, desk: Desk, tmp_path: Path) -> None:
    """A broken acme_srv.cfg, read alone or by acme2certifier: one error, and no secret in it."""
    text, expected = FILES[file]
    (tmp_path / "acme_srv.cfg").write_text(text, encoding="latin-1")
    checked = Checked(checked_with_helper(tmp_path) if helper else desk("check"))
    assert len(checked.errors) == 1 and "internal" not in checked.output, checked.output
    assert "hush" not in checked.output
    if not (helper and file == "no section"):  # YAML, for acme2certifier
        assert expected in checked.errors[0], checked.output


def checked_with_helper(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`check` with the released acme2certifier at hand, which the tests install."""
    command = [sys.executable, str(HANDLER), "--config", "acme_srv.cfg", *arguments, "check"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)


def test_yaml_is_read(ca: DemoCA, tmp_path: Path) -> None:
    """acme2certifier reads YAML, too."""
    options = {"handler_module": str(HANDLER), "cmp_openssl_bin": OPENSSL, "cmp_tmp_dir": "work", **ca.options()}
    lines = [f'  {key}: "{value}"\n' for key, value in options.items()]
    (tmp_path / "acme_srv.cfg").write_text("CAhandler:\n" + "".join(lines))
    checked = Checked(checked_with_helper(tmp_path))
    assert checked.errors == [] and f"cmp_server:              {ca.server}" in checked.output


@pytest.mark.parametrize(
    "line, expected",
    [
        ("cmp_secret: *hush-hush", "line 2: found undefined alias '...'"),
        ("cmp_secret: !hush-hush x", "line 2: "),
        ("cmp_secret: !hush-hu'sh", "line 2: "),
        ("cmp_secret: 'hush-hush", "line "),
        ("cmp_secret: hush: hush-hush", "line 2: mapping values are not allowed here"),
        ("cmp_ref: 1\n  cmp_ref: 2", "duplicate"),
    ],
)
def test_yaml_that_cannot_be_read_is_not_shown(line: str, expected: str, tmp_path: Path) -> None:
    """The line is named, and not shown: it may hold a secret."""
    (tmp_path / "acme_srv.cfg").write_text(f"CAhandler:\n  {line}\n")
    checked = Checked(checked_with_helper(tmp_path))
    assert len(checked.errors) == 1 and expected in checked.errors[0], checked.output
    assert "hush" not in checked.output


# --- What acme2certifier is configured to do --------------------------------------------------------------------------

SECTIONS: dict[str, tuple[str, str]] = {
    "no time": ("[Certificate]\nenrollment_timeout: 10", "enrollment_timeout is 10: "),
    "default time": ("", "enrollment_timeout is not set, which means 5: "),
    "enough time": ("[Certificate]\nenrollment_timeout: 30", ""),
    "no validation": ("[Challenge]\nchallenge_validation_disable: True", "every ACME client gets every name"),
    "validation": ("[Challenge]\nchallenge_validation_disable: False", ""),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_other_sections_are_warned_of(case: str, ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """[Certificate] with too little time, [Challenge] without validation: one warning each, and none if all is well."""
    text, expected = SECTIONS[case]
    desk.configure(ca.options())
    sections = text if "time" in case else f"{text}\n[Certificate]\nenrollment_timeout: 30"
    with (tmp_path / "acme_srv.cfg").open("a") as file:
        file.write(sections + "\n")
    checked = Checked(desk("check"))
    found = [warning for warning in checked.warnings if "[Certificate]" in warning or "[Challenge]" in warning]
    assert len(found) == bool(expected) and expected in "".join(found), checked.output


BUNDLED = "acme2certifier.cahandlers.cmp_ca_handler"
OTHER_HANDLERS: dict[str, tuple[dict[str, str], str]] = {
    "by path": ({"handler_module": str(HANDLER)}, ""),
    "a copy": ({"handler_module": "copy.py"}, ""),
    "in handler_file": ({"handler_file": "copy.py"}, ""),
    "the one of acme2certifier": ({"handler_module": BUNDLED}, "set handler_module: cmp_ca_handler"),
    "an old handler_file": ({"handler_file": "other.py"}, "delete handler_file"),
    "another module": ({"handler_module": "acme2certifier.cahandlers.openssl_ca_handler"}, "not this file"),
    "no file": ({"handler_module": "nowhere/cmp_ca_handler.py"}, "loads no CA handler (handler_module: nowhere/"),
    "none at all": ({}, "(handler_module: not set): install this file (pip install .), set handler_module: cmp_ca"),
}


@pytest.mark.parametrize("case", OTHER_HANDLERS)
def test_another_handler_is_the_only_error(case: str, ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """acme2certifier itself says which file it loads: where that is another one, nothing else counts."""
    shutil.copy(HANDLER, tmp_path / "copy.py")
    (tmp_path / "other.py").write_text("class CAhandler: pass\n")
    entries, expected = OTHER_HANDLERS[case]
    desk.configure({**entries, **ca.options()})
    checked = Checked(checked_with_helper(tmp_path))
    assert len(checked.errors) == bool(expected) and expected in "".join(checked.errors), checked.output
    assert ("no errors found" in checked.output) != bool(expected)


def test_a_module_named_cmp_ca_handler_is_accepted(ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """What `convert` prints: this file is on the path of Python's modules."""
    desk.configure({"handler_module": "cmp_ca_handler", **ca.options()})
    assert Checked(checked_with_helper(tmp_path)).errors == []


@pytest.mark.parametrize("section", ["DEFAULT", "Directory"])
def test_a_server_name_with_a_scheme_is_warned_of(section: str, ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """acme2certifier puts a scheme before it."""
    desk.configure(ca.options())
    with (tmp_path / "acme_srv.cfg").open("a") as file:
        file.write(f"[{section}]\nserver_name: http://acme.example\n")
    assert any("server_name: delete http:// or https://" in w for w in Checked(desk("check")).warnings)


def test_check_leaves_no_directory_of_its_user(ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """Made by root, acme2certifier could not use it: only what was there before stays."""
    desk.configure(ca.options(), tmp_dir="above/work")
    for there, arguments in ((False, []), (False, ["--connect"]), (True, []), (True, ["--connect"])):
        if there:
            (tmp_path / "above" / "work").mkdir(parents=True, mode=0o700, exist_ok=True)
        assert Checked(desk("check", *arguments)).code == 0
        assert [path.name for path in tmp_path.glob("above/**/*")] == ["work"] * there
        assert (tmp_path / "above").exists() == there


@needs_root
def test_a_full_disk_ends_check_and_enroll_before_the_ca_is_asked(ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """An error of `check`, and of an enrolment that names the path: try again later."""
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", full], check=True)
    try:
        (full / "ballast").write_bytes(bytes(40000))
        desk.configure(ca.options(), tmp_dir=str(full))
        checked = Checked(desk("check"))
        assert f"cmp_tmp_dir {full}: No space left on device: make room there" in "".join(checked.errors)
        (tmp_path / "www.csr").write_text(csr_pem(["www.example"]))
        enrolled = desk("enroll", "www.csr")
        assert enrolled.returncode == 5 and str(full) in enrolled.stderr and "make room" in enrolled.stderr
        assert ca.messages == []
    finally:
        subprocess.run(["umount", full], check=True)


@binaries
def test_the_sender_to_expect_can_be_pasted(openssl: str, ca: DemoCA, connect: Callable[..., Checked]) -> None:
    """The verified sender is a line to paste, with which the same check succeeds; a MAC proves no name."""
    checked = connect(ca.options("certificate"), openssl, expect_sender=None)
    line = next(line for line in checked.output.splitlines() if line.startswith("sender "))
    key, name = line.split(None, 1)[1].split(": ", 1)
    assert (key, checked.proven) == ("cmp_expect_sender", EVERYTHING)
    again = connect(ca.options("certificate"), openssl, expect_sender=name)
    assert (again.code, again.proven) == (0, EVERYTHING), again.output
    assert "\nsender " not in connect(ca.options(), openssl).output


@pytest.mark.parametrize("common", ["#1 CA", "CA # 2", "CA #", "a # ; both"])
def test_the_sender_to_expect_can_be_pasted_with_a_hash_sign(
    common: str, ca_directory: Path, tmp_path: Path, connect: Callable[..., Checked]
) -> None:
    """A hash sign in the signer's name, which would begin a comment, or a value in hexadecimal: the line that `check
    --connect` prints can be pasted all the same.
    """
    directory = shutil.copytree(ca_directory, tmp_path / "ca")
    certificate, key = new_signer(directory, subject=common_name(common))
    (directory / "cmp.pem").write_bytes(certificate)
    (directory / "cmp.key").write_bytes(key)
    with DemoCA(directory) as ca:
        checked = connect(ca.options("certificate"), expect_sender=None)
        line = next(line for line in checked.output.splitlines() if line.startswith("sender "))
        name = line.split(None, 1)[1].partition(": ")[2]
        again = connect(ca.options("certificate"), expect_sender=name)
        assert (again.code, again.proven) == (0, EVERYTHING), again.output


@binaries
def test_the_general_message_has_the_recipient_of_an_enrolment(
    openssl: str, ca: DemoCA, connect: Callable[..., Checked], tmp_path: Path
) -> None:
    """cmp_issuer and no cmp_recipient, then `check --connect`: openssl takes the issuer where it enrols, and so a CA
    that is found by its name has to see it here, too.
    """
    save_request(ca, tmp_path / "genm")
    issuer = ca.options()["cmp_recipient"]
    assert connect(ca.options(), openssl, recipient=None, issuer=issuer).proven == EVERYTHING
    recipient = read_der((tmp_path / "genm").read_bytes()).parts()[0].parts()[2]
    name = x509.load_pem_x509_certificate((ca.directory / "sub.pem").read_bytes()).subject
    assert read_der(recipient.content).whole == name.public_bytes()


def test_the_messages_of_openssl_are_shown_with_v(ca: DemoCA, desk: Desk) -> None:
    """`check --connect -v` and `cacerts -v` show them."""
    desk.configure(ca.options())
    for words in (["check", "--connect", "-v"], ["-v", "cacerts"]):
        assert "openssl cmp: received GENP" in desk(*words).stderr
    assert "openssl cmp:" not in desk("check", "--connect").stderr


def test_a_quoted_secret_in_a_variable_is_warned_of(ca: DemoCA, desk: Desk) -> None:
    """`docker run --env-file` keeps the quotes."""
    desk.configure(ca.options(), secret=None, secret_variable="RA_SECRET")
    for quote in "'\"":
        checked = Checked(desk("check", RA_SECRET=f"{quote}demo-secret{quote}"))
        assert any("the secret stands in quotes" in w for w in checked.warnings) and "demo-secret" not in checked.output
    assert not any("quotes" in w for w in Checked(desk("check", RA_SECRET="demo-secret")).warnings)


def test_the_name_of_a_file_as_a_secret_is_warned_of(ca: DemoCA, desk: Desk) -> None:
    """Who has forgotten `file:` or `env:` is told so."""
    for name, kind in ((str(desk.directory / "acme_srv.cfg"), "file"), ("RA_SECRET", "variable")):
        desk.configure(ca.options(), secret=name)
        (warning,) = [w for w in Checked(desk("check", RA_SECRET="x")).warnings if f"name of a {kind}" in w]
        assert warning.startswith("warning: cmp_secret: ") and name not in warning


MOUNTS = {
    "nfs4 rw,vers=4.2,local_lock=none": False,
    "nfs rw,vers=3,nolock": True,
    "nfs rw,vers=3,local_lock=all": True,
    "fuse.sshfs rw,nosuid": True,
    "ext4 rw,nolock": False,
}


def test_a_file_system_whose_locks_nobody_else_sees_is_warned_of(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several machines would lose an order there: a warning. Simulated: the list of mounts is made up."""
    for mount, alone in MOUNTS.items():
        handler = handlers(ca.options())
        place = handler.section["cmp_tmp_dir"]
        table = f"/dev/sda1 / ext4 rw 0 0\nhost:/export {place} {mount} 0 0\nhost:/other {place}-other nfs nolock 0 0\n"

        def opened(path: Any, *mode: Any, table: str = table, **how: Any) -> Any:
            return io.StringIO(table) if path == "/proc/self/mounts" else open(path, *mode, **how)

        monkeypatch.setattr(cmp_ca_handler, "open", opened, raising=False)
        _, warnings = findings(handlers, capsys)
        said = [warning for warning in warnings if "whose locks other machines do not see" in warning]
        assert [mount.split()[0] in warning for warning in said] == [True] * alone, mount


def test_one_entry_in_two_spellings_is_an_error(ca: DemoCA, desk: Desk) -> None:
    """Neither wins in silence."""
    desk.configure({**ca.options(), "cmp_tmpdir": "other"})
    assert any("cmp_tmpdir is another spelling of cmp_tmp_dir" in e for e in Checked(desk("check")).errors)


def test_no_openssl_is_the_one_fault(ca: DemoCA, desk: Desk) -> None:
    """Nothing is blamed on the version of a program that is not there."""
    server = ca.options()["cmp_server"]
    desk.configure(
        {**ca.options(), "cmp_server": f"https://{server}"}, openssl_bin="/nowhere/openssl", provider="legacy"
    )
    (error,) = Checked(desk("check")).errors
    assert error.startswith("error: cmp_openssl_bin: ")


def test_a_file_is_named_by_its_entry_though_its_path_holds_other_values(ca: DemoCA, desk: Desk) -> None:
    """The entry is named that the words are about, not one whose value, such as ir, is a part of the path."""
    (desk.directory / "ir").mkdir()
    (desk.directory / "ir" / "1234.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    desk.configure(ca.options(), trusted=str(desk.directory / "ir" / "1234.pem"))
    (error,) = Checked(desk("check")).errors
    assert error.startswith("error: cmp_trusted: openssl says: ")


# --- PKCS #12 ---------------------------------------------------------------------------------------------------------


@binaries
def test_any_file_that_has_expired_is_warned_of(openssl: str, ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """Also in PKCS #12 and among the trusted ones: openssl says which file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "old")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.not_valid_before(datetime.datetime(2020, 1, 1)).not_valid_after(datetime.datetime(2021, 1, 1))
    certificate = builder.serial_number(1).sign(key, hashes.SHA256())
    secret = serialization.BestAvailableEncryption(b"password")
    (tmp_path / "old.p12").write_bytes(pkcs12.serialize_key_and_certificates(None, key, certificate, None, secret))
    (tmp_path / "old.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files = {"cert": "old.p12", "key": "old.p12", "keypass": "pass:password", "untrusted": "old.pem"}
    desk.configure(ca.options(), openssl_bin=openssl, secret=None, ref=None, **files)
    found = [w for w in Checked(desk("check")).warnings if "has expired" in w]
    assert len(found) == 2 and "old.p12" in "".join(found) and "old.pem" in "".join(found)


@pytest.mark.parametrize("openssl", BINARIES[:2])
def test_pkcs12_holds_certificate_and_key(openssl: str, ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """A PKCS #12 file holds the certificate and the key: one pass phrase opens both."""
    certificate, key = (ca.options("certificate")[name] for name in ("cmp_cert", "cmp_key"))
    command = ["pkcs12", "-export", "-in", certificate, "-inkey", key, "-passout", "pass:hush-hush"]
    run_openssl(*command, "-out", tmp_path / "ra.p12")
    desk.configure(ca.options("certificate"), openssl_bin=openssl, cert="ra.p12", key="ra.p12", keypass="hush-hush")
    checked = Checked(desk("check", "--connect"))
    assert (checked.code, checked.proven) == (0, EVERYTHING), checked.output
    assert "hush" not in checked.output
    desk.configure(ca.options("certificate"), cert="ra.p12", key="ra.p12", keypass="wrong")
    assert "check cmp_keypass" in Checked(desk("check")).errors[0]


# --- Output -----------------------------------------------------------------------------------------------------------


def test_verbose_works_before_and_after_the_command(ca: DemoCA, desk: Desk, pair: Pair, tmp_path: Path) -> None:
    """`-v` before or behind the command shows openssl's lines; without it there are none."""
    (tmp_path / "www.csr").write_text(pair.csr)
    desk.configure(ca.options())
    for words in (["-v", "enroll", "www.csr"], ["enroll", "-v", "www.csr"], ["enroll", "www.csr", "--verbose"]):
        result = desk(*words)
        assert result.returncode == 0 and "openssl cmp: received IP" in result.stderr, result.stderr
    assert "openssl cmp:" not in desk("enroll", "www.csr").stderr


def test_a_file_that_cannot_be_written_is_found_before_the_ca_is_asked(
    ca: DemoCA, desk: Desk, pair: Pair, tmp_path: Path
) -> None:
    """`enroll -o` into a directory that does not exist: exit code 2, and the CA gets no message."""
    (tmp_path / "www.csr").write_text(pair.csr)
    desk.configure(ca.options())
    result = desk("enroll", "www.csr", "-o", "nowhere/www.pem")
    assert result.returncode == 2 and "nowhere/www.pem" in result.stderr
    assert ca.messages == []


def test_what_cannot_be_written_goes_to_standard_output(ca: DemoCA, desk: Desk, pair: Pair, tmp_path: Path) -> None:
    """`enroll -o /dev/full`: the certificate is issued, so the bundle is printed, with an error and exit code 1."""
    (tmp_path / "www.csr").write_text(pair.csr)
    desk.configure(ca.options())
    result = desk("enroll", "www.csr", "-o", "/dev/full")
    assert (result.returncode, result.stderr) == (
        1,
        "error: /dev/full: No space left on device; the bundle is on standard output\n",
    )
    assert result.stdout.count("-----BEGIN CERTIFICATE-----") == 3


def test_a_failure_leaves_the_file_as_it_was(ca: DemoCA, desk: Desk, pair: Pair, tmp_path: Path) -> None:
    """A refused `enroll -o` makes no file and changes none; one that succeeds replaces the old file."""
    (tmp_path / "www.csr").write_text(pair.csr)
    (tmp_path / "old.pem").write_text("the old one\n")
    desk.configure(ca.options(), secret="wrong")
    for name in ("old.pem", "new.pem"):
        assert desk("enroll", "www.csr", "-o", name).returncode == 4
    assert (tmp_path / "old.pem").read_text() == "the old one\n" and not (tmp_path / "new.pem").exists()
    desk.configure(ca.options())
    assert desk("enroll", "www.csr", "-o", "old.pem").returncode == 0
    assert (tmp_path / "old.pem").read_text().startswith("-----BEGIN CERTIFICATE-----")


# --- No configuration ends in a traceback -----------------------------------------------------------------------------

VALUES: tuple[str, ...] = (
    "",
    " ",
    '"127.0.0.1:8080"',
    "127.0.0.1:8080  # the CA",
    "host:99999",
    "::1:8080",
    "[::1",
    "http://[x",
    "host:-1",
)
VALUES += (
    "a:b:c",
    "\u0130\u00fc\U0001f512",
    "%s%n%(x)s",
    "x" * 5000,
    "-help",
    "$(id)",
    "/",
    "\\",
    "True",
    "=",
    ",",
    "\ufeff",
)
VALUES += ("pass:", "env:", "file:", "stdin")
KEYS = "server path proxy recipient secret ref cert key keypass trusted tls_trusted tmp_dir openssl_bin msg_timeout"


@pytest.mark.parametrize("key", [*KEYS.split(), "secret_variable", "config", "\u00fc", "x y", "server2"])
def test_no_value_ends_in_a_traceback(
    key: str, web_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, for there are many; the file is really read, and the server says no at once."""
    import cmp_ca_handler

    monkeypatch.setattr(cmp_ca_handler, "HELPERS", ())
    monkeypatch.chdir(tmp_path)
    for value in VALUES:
        section = {"openssl_bin": OPENSSL, "server": web_server, "ref": "1", "secret": "hush", "msg_timeout": "1"}
        section[key] = value
        text = "".join(f"cmp_{name}: {line}\n" for name, line in section.items())
        Path("acme_srv.cfg").write_text(f"[CAhandler]\n{text}[Certificate]\nenrollment_timeout: {value}\n", "utf-8")
        code = cmp_ca_handler.main(["--config", "acme_srv.cfg", "check", "--connect"])
        output = capsys.readouterr()
        assert code in (4, 5) and "error: " in output.out + output.err, (value, output)
        assert "internal error" not in output.out + output.err and "Traceback" not in output.err, (value, output)


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_that_knows_no_umlauts_ends_in_no_traceback(
    environment: dict[str, str], ca: DemoCA, desk: Desk, tmp_path: Path
) -> None:
    """`check` with a recipient `CN=Müller` where output is ASCII: exit code 0 and no traceback."""
    desk.configure(ca.options(), recipient="CN=Müller")
    result = desk("check", **environment)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr


def test_a_reader_that_goes_away_ends_in_no_traceback(ca: DemoCA, desk: Desk, tmp_path: Path) -> None:
    """A pipe that nobody reads any more: exit code 1, and nothing on standard error."""
    desk.configure(ca.options())
    reader, writer = os.pipe()
    os.close(reader)
    command: list[Any] = [sys.executable, "-S", HANDLER, "--config", "acme_srv.cfg", "check"]
    with open(writer, "wb") as pipe:
        result = subprocess.run(command, cwd=tmp_path, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "")
