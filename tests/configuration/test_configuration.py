"""Each key of [CAhandler] does what its page says, and a wrong one is named before anything is sent."""

from __future__ import annotations

import datetime
import logging
import os
import pwd
import re
import stat
import subprocess
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs7, pkcs12

import cmp_ca_handler
from cmp_ca_handler import CAhandler
from conftest import BINARIES, OPENSSL, Handlers, Mock, Pair, binaries, csr_pem, every_binary, forget, needs_root
from demo_ca import DemoCA
from shared import SECTION, findings, pairs, recorder, script

CSR = csr_pem(["a.example"], "a.example")


class Commands:
    """Runs enrolments with an openssl that notes the `openssl cmp` command line and does no more."""

    def __init__(self, handlers: Handlers, directory: Path) -> None:
        self.handlers, self.log = handlers, directory / "command"
        enrols = '[ "$1" = cmp ] && [ "$2" != -help ] && [ "${*#*-rspin /dev/null}" = "$*" ]'
        note = f'{enrols} || exec {OPENSSL} "$@"\nprintf "%s\\n" "$@" >{self.log}\nexit 1\n'
        self.openssl = script(directory / "noting-openssl", note)

    def handler(self, section: dict[str, str], **changes: str | None) -> CAhandler:
        """A handler with this openssl."""
        return self.handlers({"cmp_openssl_bin": self.openssl, **section}, **changes)

    def __call__(self, section: dict[str, str], **changes: str | None) -> list[str]:
        """The command line of an enrolment, from `cmp` on."""
        self.log.unlink(missing_ok=True)
        error = self.handler(section, **changes).enroll(CSR)[0]
        assert self.log.exists(), error
        return self.log.read_text().splitlines()


@pytest.fixture
def command(handlers: Handlers, tmp_path: Path) -> Commands:
    return Commands(handlers, tmp_path)


def value_of(command: Sequence[str], option: str) -> str:
    """The value of an option that must be there once."""
    assert command.count(option) == 1, command
    return command[command.index(option) + 1]


# --- What becomes of a key ------------------------------------------------------------------------------------------


def test_options_stand_in_the_order_of_the_file(command: Commands) -> None:
    """Six keys in an unusual order: openssl gets them in that order, and none of the handler's own keys."""
    section = {"cmp_ref": "1", "cmp_days": "7", "cmp_server": "127.0.0.1:1", "cmp_secret": "x", "cmp_path": "pkix/"}
    line = command(section, implicit_confirm="True")
    expected = "cmp -cmd ir -popo 0 -ref 1 -days 7 -server 127.0.0.1:1 -secret env: -path pkix/ -implicit_confirm"
    assert [re.sub("^env:.*", "env:", word) for word in line[:16]] == expected.split()
    assert not {"-openssl_bin", "-tmp_dir"} & set(line)


def test_the_handler_adds_what_a_short_section_lacks(command: Commands) -> None:
    """A short section: openssl gets time limits, file names, a subject and an empty -config as well."""
    line = command(SECTION)
    assert (value_of(line, "-msg_timeout"), value_of(line, "-total_timeout")) == ("5", "10")
    for option in ("-newkey", "-csr", "-certout", "-extracertsout", "-cacertsout", "-rspout"):
        assert value_of(line, option).startswith(f"{command.handlers.work}/")
    assert value_of(line, "-subject") == "/CN=a.example"
    assert value_of(line, "-config") == "", "the section cmp of the system's openssl.cnf is nobody's wish"
    assert "-san_nodefault" in line and "-batch" in line and "-sans" not in line


def test_configured_values_override_the_defaults(command: Commands) -> None:
    """cmp_cmd and both time limits are configured: openssl gets these, and not the handler's own."""
    line = command(SECTION, cmd="cr", msg_timeout="3", total_timeout="30")
    values = [value_of(line, f"-{option}") for option in ("cmd", "popo", "msg_timeout", "total_timeout")]
    assert values == ["cr", "0", "3", "30"]


def test_no_proof_at_all_is_sent_or_refused(command: Commands) -> None:
    """OpenSSL 3.5 and later refuse that themselves, without saying so."""
    fault = command.handler(SECTION, popo="-1").handler_check()
    if fault is None:
        assert value_of(command(SECTION, popo="-1"), "-popo") == "-1"
    else:
        assert "sends no request without a proof" in fault


def test_true_is_the_bare_switch(command: Commands) -> None:
    """In every spelling that Python's configparser takes."""
    for value in ("True", "true", "TRUE", "yes", "Yes", "on", "ON"):
        line = command(SECTION, implicit_confirm=value, ignore_keyusage=value)
        assert [word for word in line if word in ("-implicit_confirm", "-ignore_keyusage")] == line[11:13], value
        assert value not in line


def test_false_leaves_the_option_out(command: Commands) -> None:
    """In every spelling, and also of an option that is no switch."""
    for value in ("False", "false", "FALSE", "no", "No", "off", "OFF"):
        line = command(SECTION, implicit_confirm=value, path=value)
        assert not {"-implicit_confirm", "-path", value} & set(line), value


RUNTIME = "newkey csr sans san_nodefault extracertsout cacertsout certout chainout rspin rspout oldcert revreason batch"


def test_what_the_handler_sets_is_ignored_with_a_warning(command: Commands, caplog: pytest.LogCaptureFixture) -> None:
    """One warning for each option that the handler sets itself."""
    line = command(SECTION, **dict.fromkeys(RUNTIME.split(), "elsewhere"))
    assert "elsewhere" not in line
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    for key in RUNTIME.split():
        assert any(f"cmp_{key} " in warning and "ignored" in warning for warning in warnings), key


def test_distinguished_names_get_the_notation_of_openssl(command: Commands) -> None:
    """Each option with a name gets openssl's notation; test_names.py has every way of writing one."""
    for key in ("recipient", "issuer", "expect_sender"):
        assert value_of(command(SECTION, **{key: "O=Demo\\, Inc., CN=a/b"}), f"-{key}") == "/O=Demo, Inc./CN=a\\/b"
        assert value_of(command(SECTION, **{key: "/C=DE/CN=x"}), f"-{key}") == "/C=DE/CN=x"


def test_configured_credentials_precede_variables(command: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """cmp_ref beside cmp_ref_variable: the key counts, and without it the variable."""
    monkeypatch.setenv("TEST_REF", "from the variable")
    line = command(SECTION, ref_variable="TEST_REF", secret_variable="TEST_NOT_SET")
    assert value_of(line, "-ref") == "1234"
    line = command(SECTION, ref=None, ref_variable="TEST_REF")
    assert value_of(line, "-ref") == "from the variable"


@pytest.mark.parametrize("section", ["cmp", "other"])
def test_an_openssl_configuration_file_takes_over(section: str, ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """All options stand in openssl's own file, in its section `cmp` or another: check and enrolment succeed."""
    options = {key[4:]: value for key, value in ca.options().items()}
    name = "/C=DE/O=Demo/CN=Demo Issuing CA"  # openssl's own notation: nobody rewrites this file
    options.update(secret=f"pass:{ca.secret}", recipient=name, expect_sender=name)
    options["expect_sender"] = options["recipient"]
    lines = [f"{key} = {value}" for key, value in options.items()]
    (tmp_path / "cmp.cnf").write_text("\n".join([f"[{section}]", *lines, ""]))
    keys = {"cmp_config": str(tmp_path / "cmp.cnf"), "cmp_section": section}
    handler = handlers({key: value for key, value in keys.items() if value != "cmp"})
    assert handler.handler_check() is None
    assert handler.enroll(CSR)[0] is None


# --- What is said about a fault -------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "no server": ({"server": None}, ["cmp_server", "missing"]),
    "typo": ({"trsted": "x"}, ["cmp_trsted", "no option -trsted", "did you mean cmp_trusted?"]),
    "typo in our own key": ({"opnssl_bin": "x"}, ["cmp_opnssl_bin", "did you mean cmp_openssl_bin?"]),
    "unknown": ({"frobnicate": "x"}, ["cmp_frobnicate", "no option -frobnicate"]),
    "mock server": ({"port": "8080"}, ["cmp_port"]),
    "requests from elsewhere": ({"reqin": "x.der"}, ["cmp_reqin"]),
    "repeated": ({"repeat": "10"}, ["cmp_repeat"]),
    "missing file": ({"trusted": "missing.pem"}, ["cmp_trusted", "missing.pem"]),
    "one of two files missing": ({"untrusted": "pki/cert.pem,missing.pem"}, ["cmp_untrusted", "missing.pem"]),
    "directory": ({"cert": "."}, ["cmp_cert", ". is not a file"]),
    "missing configuration file": ({"config": "missing.cnf"}, ["cmp_config", "missing.cnf"]),
    "reference not set": ({"ref": None, "ref_variable": "TEST_NOT_SET"}, ["cmp_ref_variable", "TEST_NOT_SET"]),
    "secret not set": ({"secret": None, "secret_variable": "TEST_NOT_SET"}, ["cmp_secret_variable", "TEST_NOT_SET"]),
    "env: not set": ({"secret": "env:TEST_NOT_SET"}, ["cmp_secret", "TEST_NOT_SET"]),
    "file: missing": ({"secret": "file:missing.txt"}, ["cmp_secret", "missing.txt"]),
    "no name": ({"recipient": "Issuing CA"}, ["cmp_recipient", "Issuing CA", "C=DE, CN=Issuing CA"]),
    "time in words": ({"msg_timeout": "soon"}, ["cmp_msg_timeout", "number of seconds"]),
    "negative time": ({"total_timeout": "-1"}, ["cmp_total_timeout", "number of seconds"]),
    "no end, but for one message": ({"total_timeout": "0", "msg_timeout": "3"}, ["cmp_total_timeout", "for both only"]),
    "quotes": ({"path": '"pkix/"'}, ["cmp_path", "quotes"]),
    "address in quotes": ({"server": "'127.0.0.1:1'"}, ["cmp_server", "quotes"]),
    "file in quotes": ({"trusted": '"ca.pem"'}, ["cmp_trusted", "quotes"]),
    "secret in quotes": ({"secret": '"hush hush"'}, ["cmp_secret", "quotes", "pass:"]),
    "secret is a variable of a shell": ({"secret": "$CMP_SECRET"}, ["cmp_secret", "env:NAME", "pass:"]),
    "secret is a variable in braces": ({"secret": "${CMP_SECRET}"}, ["cmp_secret", "env:NAME"]),
    "secret is a variable of Windows": ({"secret": "%CMP_SECRET%"}, ["cmp_secret", "env:NAME"]),
    "source in capitals": ({"secret": "ENV:CMP_SECRET"}, ["cmp_secret", "small letters"]),
    "home directory": ({"tmp_dir": "~/cmp"}, ["cmp_tmp_dir", "whole path"]),
    "directory of systemd": ({"tmp_dir": "%S/cmp"}, ["cmp_tmp_dir", "whole path"]),
    "directory in a variable": ({"tmp_dir": "$STATE_DIRECTORY"}, ["cmp_tmp_dir", "whole path"]),
    "file: twice, and a typo": (
        {"secret": "file:file:/etc/x", "trsted": "x"},
        ["cmp_secret: ", "is not a file", "did you mean cmp_trusted?"],
    ),
    "path is a variable of a shell": ({"path": "${CMP_PATH}"}, ["cmp_path: is no variable: write the value itself"]),
    "reference is a variable of a shell": ({"ref": "$CMP_REF"}, ["cmp_ref: is no variable: write the value itself"]),
    "long first line": ({"secret": "file:bin/long"}, ["cmp_secret", "1,023"]),
    "no colon": ({"ref aGVsbG8": "="}, ["cmp_ref", "colon"]),
    "two entries in a line": ({"path": "pkix/ cmp_days: 3"}, ["cmp_path", "cmp_days", "line of its own"]),
    "directory in quotes": ({"tmp_dir": '"work"'}, ["tmp_dir", "quotes"]),
    "comment": ({"server": "127.0.0.1:1  # the CA"}, ["cmp_server", "comment"]),
    "comment with a semicolon": ({"path": "pkix/ ; x"}, ["cmp_path", "comment"]),
    "comment at the secret": ({"secret": "hush # ours"}, ["cmp_secret", "comment", "pass:"]),
    "indented key": ({"path": "pkix/\n  cmp_ignore_keyusage: True"}, ["cmp_path", "cmp_ignore_keyusage", "blank"]),
    "two lines": ({"path": "pkix/\n  more"}, ["cmp_path", "more than one line"]),
    "port too high": ({"server": "127.0.0.1:99999"}, ["cmp_server", "99999", "port"]),
    "port 0": ({"server": "127.0.0.1:0"}, ["cmp_server", "'0'", "port"]),  # openssl takes 80
    "port in letters": ({"server": "cmp.acme.test:http"}, ["cmp_server", "'http'", "port"]),
    "no port": ({"server": "127.0.0.1:"}, ["cmp_server", "port"]),
    "IPv6": ({"server": "::1:8080"}, ["cmp_server", "[2001:db8::1]:8080"]),
    "no host": ({"server": ":8080"}, ["cmp_server", "address"]),
    "another protocol": ({"server": "ftp://127.0.0.1:1"}, ["cmp_server", "address"]),
    "protocol in capitals": ({"server": "HTTP://127.0.0.1:1"}, ["cmp_server", "address"]),
    "two addresses": ({"server": "127.0.0.1:1 127.0.0.1:2"}, ["cmp_server", "address"]),
    "proxy port": ({"proxy": "127.0.0.1:99999"}, ["cmp_proxy", "99999"]),
    "path is a URL": ({"path": "http://127.0.0.1/pkix"}, ["cmp_path", "path on the server"]),
    "empty trust": ({"trusted": "ca.pem"}, ["cmp_trusted", "ca.pem", "is empty"]),
    "request as trust": ({"trusted": "pki/request.pem"}, ["cmp_trusted", "pki/request.pem", "certificate request"]),
    "key as trust": ({"untrusted": "pki/cert.pem pki/key.pem"}, ["cmp_untrusted", "pki/key.pem", "a private key"]),
    "PKCS #7 as trust": ({"trusted": "pki/p7.pem"}, ["cmp_trusted", "PKCS #7", "-print_certs"]),
    "text as trust": ({"trusted": "bin/text"}, ["cmp_trusted", "bin/text", "neither PEM nor DER"]),
    "certificate as key": ({"cert": "pki/cert.pem", "key": "pki/cert.pem"}, ["cmp_key", "no private key"]),
    "files as a list of YAML": ({"trusted": '["a.pem", "b.pem"]'}, ["cmp_trusted", "one line", "commas"]),
    "expired": ({"secret": None, "cert": "pki/expired.pem", "key": "pki/key.pem"}, ["cmp_cert", "expired", "2001-"]),
    "not yet valid": (
        {"secret": None, "cert": "pki/future.pem", "key": "pki/key.pem"},
        ["cmp_cert", "not valid before"],
    ),
    "TLS trust without TLS": ({"tls_trusted": "pki/cert.pem"}, ["cmp_tls_trusted", "cmp_tls_used", "plain HTTP"]),
    "TLS name without TLS": ({"tls_host": "x"}, ["cmp_tls_host", "cmp_tls_used"]),
    "TLS certificate without key": (
        {"tls_used": "True", "tls_cert": "pki/cert.pem"},
        ["cmp_tls_cert without cmp_tls_key"],
    ),
    "TLS key without certificate": (
        {"tls_used": "True", "tls_key": "pki/key.pem"},
        ["cmp_tls_key without cmp_tls_cert"],
    ),
    "key form": ({"keyform": "ENGINE"}, ["cmp_keyform", "org.openssl.engine"]),
    "days in words": ({"days": "ninety"}, ["cmp_days", "number"]),
    "stdin": ({"secret": "stdin"}, ["cmp_secret", "stdin", "file:"]),
    "file: empty": ({"secret": "file:ca.pem"}, ["cmp_secret", "ca.pem", "empty"]),
    "file: with CR LF": ({"secret": "file:pki/crlf.txt"}, ["cmp_secret", "pki/crlf.txt", "Windows"]),
    "file: with a BOM": ({"secret": "file:pki/bom.txt"}, ["cmp_secret", "pki/bom.txt", "byte order mark"]),
    "file: in UTF-16": ({"secret": "file:pki/utf16.txt"}, ["cmp_secret", "pki/utf16.txt", "no text"]),
    "fd:": ({"secret": "fd:987"}, ["cmp_secret", "fd", "file:PATH"]),
    "pass: empty": ({"secret": "pass:"}, ["cmp_secret", "empty"]),
    "PIN in the address of a key": (
        {"cert": "pki/cert.pem", "key": "pkcs11:token=x;pin-value=hush%21"},
        ["cmp_key", "pin-source=file:", "cmp_keypass: env:"],
    ),
    "PIN in the address of a key, with blanks": (
        {"cert": "pki/cert.pem", "key": "pkcs11:token=x?pin-value = hush"},
        ["cmp_key", "pin-source=file:", "cmp_keypass: env:"],
    ),
    "secret for the name of its variable": (
        {"secret": None, "secret_variable": "hush-hush"},
        ["cmp_secret_variable", "not set"],
    ),
    "secret for the name in env:": ({"secret": "env:hushhush"}, ["cmp_secret", "not set"]),
    "password in the name of a server": ({"server": "http://u:hush@127.0.0.1:1"}, ["cmp_server", "password"]),
    "key update": ({"cmd": "kur"}, ["cmp_cmd", "ir, cr and p10cr"]),
    "no command": ({"cmd": "no"}, ["cmp_cmd: "]),
    "no proof": ({"popo": "off"}, ["cmp_popo: "]),
    "proof without a key": ({"popo": "1"}, ["cmp_popo", "private key"]),
    "password in the address": ({"server": "u:p@127.0.0.1:1"}, ["cmp_server", "password"]),
    "password in the proxy": ({"proxy": "http://u:p@127.0.0.1:1"}, ["cmp_proxy", "password"]),
    "value left out": ({"path": ""}, ["cmp_path", "no value"]),
    "switch for a value": ({"path": "True"}, ["cmp_path", "needs a value"]),
    "value for a switch": ({"implicit_confirm": "maybe"}, ["cmp_implicit_confirm", "True or False"]),
    "no binary": ({"openssl_bin": "bin/missing"}, ["cmp_openssl_bin", "bin/missing"]),
    "binary is a directory": ({"openssl_bin": "bin"}, ["cmp_openssl_bin", "bin"]),
    "binary is not executable": ({"openssl_bin": "bin/plain"}, ["cmp_openssl_bin", "bin/plain"]),
    "binary without cmp": ({"openssl_bin": "bin/libressl"}, ["cmp_openssl_bin", "LibreSSL 3.8.2", "no cmp command"]),
    "binary that is none": ({"openssl_bin": "bin/text"}, ["bin/text", "Exec format error"]),
    "directory for everybody": ({"tmp_dir": "open"}, ["cmp_tmp_dir", "open", "every local user"]),
    "several": (
        {"server": None, "trsted": "x", "cert": "missing.pem", "days": "True", "tmp_dir": "ca.pem"},
        ["cmp_server", "cmp_trsted", "missing.pem", "cmp_days", "cmp_tmp_dir"],
    ),
}


def make_files(directory: Path) -> None:
    """Files that people take for others."""
    directory.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name, day = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "RA")]), datetime.timedelta(days=1)
    pem, der = serialization.Encoding.PEM, serialization.Encoding.DER
    now = datetime.datetime.now(datetime.timezone.utc)
    old = datetime.datetime(2001, 1, 1)
    for file, start, end in (
        ("cert", now - day, now + 90 * day),
        ("soon", now - day, now + 20 * day),
        ("expired", old, old + day),
        ("future", now + day, now + 2 * day),
    ):
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, start, end)
        certificate = builder.sign(key, hashes.SHA256())
        (directory / f"{file}.pem").write_bytes(certificate.public_bytes(pem))
        if file == "cert":
            (directory / "p7.pem").write_bytes(pkcs7.serialize_certificates([certificate], pem))
            (directory / "p7.der").write_bytes(pkcs7.serialize_certificates([certificate], der))
            password = serialization.BestAvailableEncryption(b"hush")
            (directory / "ra.p12").write_bytes(
                pkcs12.serialize_key_and_certificates(b"x", key, certificate, None, password)
            )
            (directory / "damaged.pem").write_bytes(certificate.public_bytes(pem).replace(b"MII", b"AII"))
    request = x509.CertificateSigningRequestBuilder(name).sign(key, hashes.SHA256())
    (directory / "request.pem").write_bytes(request.public_bytes(pem))
    (directory / "request.der").write_bytes(request.public_bytes(der))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    (directory / "public.der").write_bytes(key.public_key().public_bytes(der, spki))
    form = serialization.PrivateFormat.PKCS8
    (directory / "key.pem").write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    (directory / "encrypted.pem").write_bytes(
        key.private_bytes(pem, form, serialization.BestAvailableEncryption(b"hush"))
    )
    (directory / "cmp.cnf").write_text("[cmp]\n")
    (directory / "crlf.txt").write_bytes(b"hush hush\r\n")
    (directory / "bom.txt").write_bytes(b"\xef\xbb\xbfhush hush\n")
    (directory / "blank.txt").write_bytes(b"hush hush \n")
    (directory / "open.txt").write_bytes(b"hush hush\n")
    (directory / "open.pem").write_bytes((directory / "key.pem").read_bytes())
    for made in directory.iterdir():
        made.chmod(0o644 if made.name.startswith("open") else 0o600)
    (directory / "utf16.txt").write_text("hush hush\n", encoding="utf-16")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_before_anything_is_sent(
    fault: str, command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each fault of the table: check, enrolment and log name it; openssl is not run, and no file is made."""
    monkeypatch.chdir(tmp_path)
    invalid = "openssl:Error: 'cmp' is an invalid command."
    script(Path("bin/libressl"), f'[ "$1" = version ] && echo "LibreSSL 3.8.2" && exit\necho "{invalid}" >&2\nexit 1\n')
    Path("bin/plain").write_text("#!/bin/sh\n")
    Path("bin/text").write_text("not a program")
    Path("bin/long").write_text("x" * 1024)
    Path("bin/text").chmod(0o755)
    Path("ca.pem").write_text("")
    Path("open").mkdir()
    Path("open").chmod(0o777)
    make_files(Path("pki"))
    changes, words = FAULTS[fault]
    before = sorted(tmp_path.rglob("*"))
    handler = command.handler(SECTION, **changes)
    check = handler.handler_check()
    error, bundle, raw, identifier = handler.enroll(CSR)
    assert check and error and (bundle, raw, identifier) == (None, None, None)
    for text in (check, error):
        # An enrolment gets to the directory only where the rest is right.
        expected = words[:-1] if fault == "several" and text is error else words
        assert [word for word in expected if word not in text] == []
        assert text.isprintable()
    assert "hush" not in check + error + caplog.text
    failures = [r.getMessage() for r in caplog.records if r.getMessage().startswith("CMP enrolment failed: ")]
    assert error in [pairs(line)["error"] for line in failures]
    assert not command.log.exists()
    # nothing was made, but for the configuration file
    assert sorted({*tmp_path.rglob("*")} - {*before}) in ([], [command.handlers.config])


# What openssl finds: the entry -> words of the error with each version.
FOUND_BY_OPENSSL: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "no credentials": ({"ref": None, "secret": None}, ["cmp_ref", "cmp_secret", "cmp_cert", "cmp_key"]),
    "certificate without key": ({"ref": None, "secret": None, "cert": "pki/cert.pem"}, ["cmp_key"]),
    "public key in DER": ({"trusted": "pki/public.der"}, ["cmp_trusted", "pki/public.der"]),
    "request in DER": ({"trusted": "pki/request.der"}, ["cmp_trusted", "pki/request.der"]),
    "PKCS #7 in DER": ({"trusted": "pki/p7.der"}, ["cmp_trusted", "pki/p7.der"]),
    "damaged certificate": ({"trusted": "pki/damaged.pem"}, ["cmp_trusted", "pki/damaged.pem"]),
    "MAC by another name": ({"mac": "hmac-sha256"}, ["cmp_mac", "hmacWithSHA256"]),
    "no MAC": ({"mac": "sha257"}, ["cmp_mac", "hmac-sha1"]),
    "digest by another name": ({"digest": "SHA-256"}, ["cmp_digest", "sha256"]),
    "file: before a key": (
        {"secret": None, "cert": "pki/cert.pem", "key": "file:///nonexistent.key"},
        ["cmp_key", "/nonexistent.key"],
    ),
    "encrypted key": ({"secret": None, "cert": "pki/cert.pem", "key": "pki/encrypted.pem"}, ["cmp_key", "cmp_keypass"]),
}


@pytest.mark.parametrize("right", [True, False])
def test_openssl_is_asked_once(
    right: bool, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """acme2certifier checks at each GET of its directory: no fault is believed for ever, a fault for a minute."""
    log = tmp_path / "log"
    program = recorder(tmp_path / "openssl", log)
    handler = handlers(ca.options(), openssl_bin=program, digest="sha256" if right else "sha-256")
    counts = []
    for believed in (60, 60, -1):
        monkeypatch.setattr(cmp_ca_handler, "FAULT_BELIEVED", believed)
        assert (handler.handler_check() is None) == right
        counts.append(log.read_text().count("-rspin"))
    assert counts == [1, 1, 1 if right else 2]


@pytest.mark.parametrize("fault", FOUND_BY_OPENSSL)
def test_what_openssl_finds_is_said_by_check_and_enrolment(
    fault: str, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check and an enrolment say the same, with what to do; the enrolment ends before anything is sent."""
    monkeypatch.chdir(tmp_path)
    make_files(Path("pki"))
    changes, words = FOUND_BY_OPENSSL[fault]
    for openssl in BINARIES:
        handler = handlers(SECTION, openssl_bin=openssl, **changes)
        for text in (handler.handler_check(), handler.enroll(CSR)[0]):
            assert text and [word for word in words if word not in text] == [], (openssl, text)
            assert "connect" not in text and "hush" not in text


# What an administrator mistypes or mixes up -> the entry, and what to do about it.
TYPOS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "missing trust": ({"trusted": "pki/nowhere.pem"}, ["cmp_trusted", "pki/nowhere.pem is not a file"]),
    "missing key": ({"cert": "pki/cert.pem", "key": "pki/nowhere.pem"}, ["cmp_key", "pki/nowhere.pem is not a file"]),
    "swapped": (
        {"cert": "pki/key.pem", "key": "pki/cert.pem"},
        ["cmp_cert: pki/key.pem holds no certificate, but a private key", "cmp_key: pki/cert.pem holds no private key"],
    ),
    "empty trust": ({"trusted": "pki/empty.pem"}, ["cmp_trusted: pki/empty.pem is empty"]),
    "HTML": (
        {"trusted": "pki/error.html"},
        ["cmp_trusted: pki/error.html holds no certificate", "neither PEM nor DER"],
    ),
    "PKCS #7": ({"trusted": "pki/p7.pem"}, ["cmp_trusted", "PKCS #7 (convert it: openssl pkcs7 -print_certs)"]),
    "glued": (
        {"untrusted": "pki/glued.pem"},
        ["cmp_untrusted: pki/glued.pem holds 2 certificates, 2 of them cut short"],
    ),
    "cut short": ({"trusted": "pki/cut.pem"}, ["cmp_trusted: pki/cut.pem holds 2 certificates, 1 of them cut short"]),
    "no credentials": ({"ref": None, "secret": None}, ["set cmp_ref and cmp_secret, or cmp_cert and cmp_key"]),
    "digest": ({"digest": "SHA-256"}, ["cmp_digest", "sha256"]),
    "TLS not used": ({"tls_trusted": "pki/cert.pem"}, ["cmp_tls_trusted", "set cmp_tls_used: True"]),
    "slash in a name": ({"recipient": "/C=DE/CN="}, ["cmp_recipient", "CN: has no value"]),
    "colon left out": ({"server": "http//127.0.0.1:1"}, ["cmp_server: 'http//127.0.0.1:1' is no address such as"]),
    "URL as path": ({"path": "http://127.0.0.1/pkix"}, ["cmp_path: is the path on the server alone, such as pkix/"]),
    "blank in the path": ({"path": "pkix /x"}, ["cmp_path", "without a blank"]),
    "comment behind the path": ({"path": "pkix/ #x"}, ["cmp_path: a comment needs a line of its own"]),
    "missing out_trusted": ({"out_trusted": "pki/nowhere.pem"}, ["cmp_out_trusted: pki/nowhere.pem is not a file"]),
    "wrong pass phrase": (
        {"secret": None, "ref": None, "cert": "pki/cert.pem", "key": "pki/encrypted.pem", "keypass": "wrong-phrase"},
        ["cmp_key", "check cmp_keypass"],
    ),
    "key of another": (
        {"secret": None, "ref": None, "cert": "pki/cert.pem", "key": "pki/other.pem"},
        ["cmp_key does not belong to cmp_cert"],
    ),
    "policy": ({"policy_oids": "gold"}, ["cmp_policy_oids: ", "gold"]),
    "days": ({"days": "-1"}, ["cmp_days: must be a number"]),
    "verbosity": ({"verbosity": "99"}, ["cmp_verbosity: ", "99"]),
    "address": ({"verify_ip": "zz"}, ["cmp_verify_ip: openssl says: "]),
    "provider": ({"provider": "foo"}, ["cmp_provider: ", "foo"]),
    "ordinary words": (
        {"secret": None, "ref": "certificate", "path": "key", "tls_used": "True"},
        ["the configuration: openssl says: ", "set cmp_ref and cmp_secret"],
    ),
    "quoted secret": ({"secret": '"demo-secret"'}, ["cmp_secret: write the value without the quotes"]),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_one_error(
    typo: str,
    handlers: Handlers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One error, or two for two files, that names the entry and what to do, whatever the version of OpenSSL."""
    monkeypatch.chdir(tmp_path)
    make_files(Path("pki"))
    Path("pki/empty.pem").touch()
    Path("pki/error.html").write_text("<html><body>404 Not Found</body></html>")
    certificate = Path("pki/cert.pem").read_text().strip()
    Path("pki/glued.pem").write_text(2 * certificate)  # `cat` of files without a line end
    Path("pki/cut.pem").write_text(f"{certificate}\n{certificate[:-40]}")
    subprocess.run([OPENSSL, "genpkey", "-algorithm", "RSA", "-out", "pki/other.pem"], check=True, capture_output=True)
    changes, words = TYPOS[typo]
    for openssl in BINARIES:
        handlers(SECTION, openssl_bin=openssl, **changes)
        errors, _ = findings(handlers, capsys)
        assert len(errors) == (2 if typo == "swapped" else 1), (openssl, errors)
        text = " ".join(errors)
        assert [word for word in words if word not in text] == [], (openssl, text)
        assert "wrong-phrase" not in text and "demo-secret" not in text


# More of them, none of which needs a run of openssl.
SLIPS: list[tuple[dict[str, str | None], str]] = [
    ({"tls_used": "True", "tls_host": "cmp.acme.test:8443"}, "cmp_tls_host: is the name in the server's certificate"),
    ({"tls_used": "True", "tls_host": "https://cmp.acme.test"}, "cmp_tls_host: is the name in the server's"),
    ({"tls_used": "True", "tls_host": "*.acme.test"}, "cmp_tls_host: is the name in the server's certificate alone"),
    ({"ref": "12\u200b34"}, "cmp_ref: holds a character that nobody sees, U+200B"),
    ({"path": "pkix\u00a0/"}, "cmp_path: holds a character that nobody sees, U+00A0"),
    ({"secret": "\ufeffhush-hush"}, "cmp_secret: holds a character that nobody sees, U+FEFF"),
    ({"ref": "\u201c1234\u201d"}, "cmp_ref: write the value without the quotes"),
    ({"secret": "\u201ehush-hush\u201c"}, "cmp_secret: write the value without the quotes; if it belongs"),
    ({"secret": "File:/x"}, "cmp_secret: write File in small letters, with a colon; if it is the secret itself"),
    ({"secret": "env=RA_HUSH"}, "cmp_secret: write env in small letters, with a colon; if it is the secret itself"),
    ({"secret": None, "secret_variable": "env:RA_HUSH"}, "cmp_secret_variable: write the name of the variable alone"),
    ({"secret": None, "secret_variable": "$RA_HUSH"}, "cmp_secret_variable: write the name of the variable alone"),
    ({"keypass_variable": "RA_HUSH"}, "cmp_keypass_variable: write cmp_keypass: env:NAME"),
    (
        {"server": None, "sever": "127.0.0.1:1"},
        "cmp_sever: this openssl has no option -sever; did you mean cmp_server?",
    ),
    ({"tls_used": "True", "tls_cert": "pki/cert.pem", "tls_kye": "x"}, "cmp_tls_kye: this openssl has no option"),
]


def test_a_slip_is_one_error(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error that names the entry and what to do, and no warning that is its consequence; no secret in it."""
    monkeypatch.chdir(tmp_path)
    make_files(Path("pki"))
    for changes, words in SLIPS:
        handlers(SECTION, **changes)
        errors, warnings = findings(handlers, capsys)
        assert len(errors) == 1 and errors[0].startswith(words), (errors, words)
        assert "hush" not in "".join(errors).lower()
        assert not any(re.match("cmp_(?!tls_trusted).* is not set", warning) for warning in warnings), warnings
    handler = handlers(
        SECTION, secret="pass:\u200bhush\u201d", ref="\u0434\u2019\u00e9", tls_host="2001:db8::1", tls_used="True"
    )
    assert handler.handler_check() is None


def test_a_file_below_a_closed_directory_cannot_be_read(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    """/etc/ssl/private: nobody but root knows what is in it. Simulated, for root may run the tests, too."""
    stat_of: Callable[..., os.stat_result] = os.stat

    def closed(path: object, **how: object) -> os.stat_result:
        if str(path).startswith("/closed/"):
            raise PermissionError(13, "Permission denied", path)
        return stat_of(path, **how)

    monkeypatch.setattr(os, "stat", closed)
    user = pwd.getpwuid(os.geteuid()).pw_name
    for changes in ({"trusted": "/closed/ca.pem"}, {"secret": "file:/closed/ca.pem"}):
        assert f"/closed/ca.pem cannot be read by {user}" in str(handlers(SECTION, **changes).handler_check())


def test_pass_phrases_of_pkcs12_are_named_by_their_entry(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hint names the entry that opens the file: another one for the RA's, for TLS, and for what is trusted."""
    monkeypatch.chdir(tmp_path)
    make_files(Path("pki"))
    files: dict[str, dict[str, str | None]] = {
        "keypass": {"cert": "pki/ra.p12", "key": "pki/ra.p12", "secret": None, "ref": None},
        "tls_keypass": {"tls_used": "True", "tls_cert": "pki/ra.p12", "tls_key": "pki/ra.p12"},
        "otherpass": {"trusted": "pki/ra.p12"},
    }
    for openssl in BINARIES:
        for option, changes in files.items():
            for phrase in (None, "wrong-one", "hush"):
                fault = handlers(SECTION, **{**changes, option: phrase}, openssl_bin=openssl).handler_check()
                expected = [] if phrase == "hush" else [f"cmp_{option}"]
                assert re.findall(r"cmp_\w+pass\b", str(fault)) == expected, (openssl, option, phrase, fault)
                assert (fault is None) == (phrase == "hush"), fault


def test_the_faults_of_check_are_the_faults_of_enroll(command: Commands) -> None:
    """A section with three faults: the enrolment's error holds the whole text of the check."""
    handler = command.handler(SECTION, server=None, trsted="x", frobnicate="y")
    check, error = handler.handler_check(), handler.enroll(CSR)[0]
    assert check and error and check in error


@pytest.mark.parametrize(
    "configuration, words",
    [
        (None, ["acme_srv.cfg"]),
        ("[CAhandlr]\ncmp_server: x\n", ["[CAhandler]"]),
        ("cmp_server: x\n", ["acme_srv.cfg"]),
        ("[CAhandler]\ncmp_ref: 1\ncmp_ref: 2\n", ["acme_srv.cfg", "cmp_ref"]),
        ("[CAhandler]\n\xff\0\x1b[31m\ncmp", ["acme_srv.cfg"]),
    ],
    ids=["missing", "no section", "no header", "key given twice", "garbage"],
)
def test_a_broken_configuration_file_is_told_on_one_line(
    configuration: str | None, words: list[str], command: Commands, tmp_path: Path
) -> None:
    """No file, no section, no header, a key given twice, or garbage: check and enrolment say so on one line."""
    command.handler(SECTION)
    config = command.handlers.config
    config.unlink() if configuration is None else config.write_bytes(configuration.encode("latin-1"))
    with CAhandler(False, logging.getLogger("test")) as handler:
        for text in (handler.handler_check(), handler.enroll(CSR)[0]):
            assert text and text.isprintable() and [word for word in words if word not in text] == []
    assert not command.log.exists()


def test_the_variable_is_named_if_no_configuration_file_is(monkeypatch: pytest.MonkeyPatch, handlers: Handlers) -> None:
    """ACME_SRV_CONFIGFILE is not set: check and enrolment name this variable."""
    monkeypatch.delenv("ACME_SRV_CONFIGFILE")
    with CAhandler() as handler:
        assert "ACME_SRV_CONFIGFILE" in str(handler.handler_check())
        assert "ACME_SRV_CONFIGFILE" in str(handler.enroll(CSR)[0])


def test_the_default_binary_is_run_with_a_warning(
    command: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No cmp_openssl_bin, or an empty one: the first openssl on PATH is run, and one warning names its path."""
    (tmp_path / "openssl").symlink_to(command.openssl)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for value in (None, ""):
        caplog.clear()
        forget(monkeypatch)
        assert command(SECTION, openssl_bin=value)[0] == "cmp"
        (warning,) = [r.getMessage() for r in caplog.records if "cmp_openssl_bin" in r.getMessage()]
        assert f"{tmp_path}/openssl" in warning


# --- handler_check() ------------------------------------------------------------------------------------------------


def test_check_costs_nothing_after_the_first_time(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """A hundred more checks of the same configuration: no process, no file, no message."""
    calls = tmp_path / "calls"
    openssl = recorder(tmp_path / "openssl", calls)
    handler = handlers(ca.options(), openssl_bin=openssl)
    assert not calls.exists(), "entering must start no process"
    assert handler.handler_check() is None
    first = calls.read_text()
    for _ in range(100):
        with CAhandler(False, logging.getLogger("test")) as again:
            assert again.handler_check() is None
    assert calls.read_text() == first
    assert handlers.left() == []
    assert ca.messages == []


def test_check_notices_changes(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """After a good check a file is deleted, openssl replaced, a key left out: the next check says so."""
    openssl = recorder(tmp_path / "openssl", tmp_path / "calls")
    section = ca.options("certificate")
    handler = handlers(section, openssl_bin=openssl)
    assert handler.handler_check() is None
    Path(section["cmp_cert"]).unlink()
    assert "ra.pem" in str(handler.handler_check())
    script(Path(openssl), "exit 1\n")
    assert "has no cmp command" in str(handler.handler_check())
    assert "cmp_server is missing" in str(handlers(section, server=None).handler_check())


@pytest.mark.parametrize("source", ["file", "variable", "env"])
def test_a_secret_that_changes_is_read_again(
    source: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read of a section is kept, but not beyond a change of a file or variable that it names."""
    file, right = tmp_path / "secret", ca.options()["cmp_secret"]
    entry = {"file": ("secret", f"file:{file}"), "variable": ("secret_variable", "THE_SECRET")}
    key, value = entry.get(source, ("secret", "env:THE_SECRET"))
    handler = handlers({**ca.options(), "cmp_secret": "", f"cmp_{key}": value})

    def enrol(secret: str) -> str | None:
        file.write_text(secret)
        monkeypatch.setenv("THE_SECRET", secret)
        return handler.enroll(CSR)[0]

    assert enrol(right) is None
    assert "wrong pbm value" in str(enrol("x" * len(right)))
    assert enrol(right) is None


def test_a_server_that_gives_up_root_gets_another_directory(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has asked handler_check() before: the directory of the other user is not what was kept for root."""
    section = handlers(ca.options(), tmp_dir=None).section
    before = cmp_ca_handler._settings(section).directory
    for function in ("getuid", "geteuid"):
        monkeypatch.setattr(os, function, lambda: 65534)
    after = cmp_ca_handler._settings(section).directory
    assert before != after and after.endswith("cmp_ca_handler-65534")


def test_a_working_directory_that_is_gone_stops_no_enrolment(
    ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the process: where all paths of the section are whole ones, nobody needs it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert handlers(ca.options()).enroll(CSR)[0] is None


def test_a_certificate_that_expires_meanwhile_is_found(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has changed but the time: what is said of the certificate of the RA is not what was said last month."""
    handler = handlers(ca.options("certificate"))
    assert handler.handler_check() is None
    later = {**vars(time), "time": lambda: time.time() + 40 * 366 * 86400}
    monkeypatch.setattr(cmp_ca_handler, "time", types.SimpleNamespace(**later))
    assert "has expired" in str(handler.handler_check())


@pytest.mark.parametrize("openssl", [*BINARIES, "no library"])
def test_an_openssl_that_cannot_start_is_quoted(
    openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken openssl.cnf, or library, is not a binary without CMP: what it says is what helps."""
    if openssl == "no library":
        openssl, said = str(tmp_path / "openssl"), "error while loading shared libraries: libssl.so.3"
        script(Path(openssl), f'echo "openssl: {said}: cannot open shared object file" >&2; exit 127\n')
    else:
        said = f'Error on line 1 of config file "{tmp_path}/openssl.cnf"; missing close square bracket'
        (tmp_path / "openssl.cnf").write_text("[default\n")
        monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "openssl.cnf"))
        monkeypatch.setattr(cmp_ca_handler, "_described", cmp_ca_handler._described.__wrapped__)
    fault = str(handlers(ca.options(), openssl_bin=openssl).handler_check())
    assert "cannot run its cmp command: " in fault and said in fault and "install" not in fault


# --- The handler's own directory ------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that is used where none is configured, below a system's temporary directory of our own."""
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    return tmp_path / "system" / f"cmp_ca_handler-{os.getuid()}"


def test_transactions_are_private(command: Commands) -> None:
    """While openssl runs, only the owner may look into the order's directory."""
    script(Path(command.openssl), f'exec >>{command.log}\nls -ld {command.handlers.work}/*\nexec {OPENSSL} "$@"\n')
    command.handler(SECTION).enroll(CSR)
    modes = re.findall(r"^(\S{10}).* \S+/[0-9a-zA-Z_-]+$", command.log.read_text(), re.M)
    assert modes and set(modes) == {"drwx------"}


def test_the_default_directory_is_made_for_its_owner_alone(ca: DemoCA, handlers: Handlers, own: Path) -> None:
    """No cmp_tmp_dir: an enrolment makes the directory for its owner alone, and leaves nothing in it."""
    handler = handlers(ca.options(), tmp_dir=None)
    assert handler.handler_check() is None
    assert os.listdir(own) == [], "a check leaves nothing in it"
    assert handler.enroll(CSR)[0] is None
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert os.listdir(own) == []


def test_a_default_directory_that_is_a_link_is_refused(command: Commands, own: Path, tmp_path: Path) -> None:
    """Somebody has put a link in its place: check and enrolment refuse it, and write nothing behind it."""
    (tmp_path / "target").mkdir()
    own.symlink_to(tmp_path / "target")
    handler = command.handler(SECTION, tmp_dir=None)
    for text in (handler.handler_check(), handler.enroll(CSR)[0]):
        assert text and str(own) in text and "symbolic link" in text
    assert os.listdir(tmp_path / "target") == []


def test_a_default_directory_of_somebody_else_is_refused(
    command: Commands, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user has made it: check and enrolment refuse it, and openssl is not run."""
    own.mkdir()
    if os.geteuid() == 0:
        os.chown(own, 65534, 65534)
    else:  # only root can give a directory away; anybody else can be taken for another user
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    handler = command.handler(SECTION, tmp_dir=None)
    for text in (handler.handler_check(), handler.enroll(CSR)[0]):
        assert text and str(own) in text and "another user" in text
    assert not command.log.exists()


@every_binary
def test_trust_in_a_root_that_the_answer_brings_is_told(
    openssl: str, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenSSL 4.0 has an option to trust it. That undoes cmp_trusted, and is said; older ones do not know it."""
    fault = handlers({**SECTION, "cmp_openssl_bin": openssl}, ta_in_ip_extracerts="True").handler_check()
    with caplog.at_level(logging.WARNING):
        handlers({**SECTION, "cmp_openssl_bin": openssl}, ta_in_ip_extracerts="True").enroll(CSR)
    if fault is None:
        assert "in spite of cmp_trusted" in caplog.text
    else:
        assert "this openssl has no option -ta_in_ip_extracerts" in fault


@needs_root
@pytest.mark.parametrize("link", ["of theirs", "in their directory"])
def test_a_link_that_somebody_else_can_change_is_refused(link: str, command: Commands, tmp_path: Path) -> None:
    """Where cmp_tmp_dir leads elsewhere, whoever can change the link chooses where requests are written."""
    theirs, target = tmp_path / "theirs", tmp_path / "target"
    for directory in (theirs, target):
        directory.mkdir(mode=0o700)
    (theirs / "work").symlink_to(target)
    os.chown(theirs if link == "in their directory" else theirs / "work", 65534, 65534, follow_symlinks=False)
    handler = command.handler(SECTION, tmp_dir=str(theirs / "work"))
    for text in (handler.handler_check(), handler.enroll(CSR)[0]):
        assert text and f"{theirs}" in text and "belongs to another user: run this as nobody" in text
    assert os.listdir(target) == []


def test_a_link_into_a_directory_of_everybody_is_refused(command: Commands, tmp_path: Path) -> None:
    """Our own link, but where it leads to somebody else can put another directory."""
    (tmp_path / "open" / "target").mkdir(parents=True, mode=0o700)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open" / "target")
    handler = command.handler(SECTION, tmp_dir=str(tmp_path / "link" / "work"))
    for text in (handler.handler_check(), handler.enroll(CSR)[0]):
        assert f"{tmp_path}/open can be written by every local user" in str(text)
    assert os.listdir(tmp_path / "open" / "target") == []


def test_a_link_that_goes_up_behind_a_link_is_followed_to_the_real_one(command: Commands, tmp_path: Path) -> None:
    """`..` in a link is the directory above the real one, not above the link that leads there."""
    for name in ("real", "real/inner", "real/work"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "real" / "work").chmod(0o777)
    (tmp_path / "real" / "inner" / "up").symlink_to("../work")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    handler = command.handler(SECTION, tmp_dir=str(tmp_path / "link" / "up"))
    for text in (handler.handler_check(), handler.enroll(CSR)[0]):
        assert f"{tmp_path}/real/work can be written by every local user" in str(text)


def test_a_link_of_our_own_is_accepted(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """cmp_tmp_dir leads over a link to a private directory: the certificate is issued."""
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert handlers(ca.options(), tmp_dir=str(tmp_path / "link" / "work")).enroll(CSR)[0] is None


# --- Warnings, and what is hidden -----------------------------------------------------------------------------------

WEAK = "unprotected_errors unprotected_requests no_check_time ignore_critical allow_proxy_certs"
WARNINGS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "recipient beside the pinned certificate": (
        {"recipient": "CN=x", "srvcert": "pki/cert.pem"},
        ["cmp_recipient", "cmp_srvcert"],
    ),
    "another time": ({"attime": "1000000000"}, ["cmp_attime weakens security"]),
    **{key: ({key: "True"}, [f"cmp_{key} weakens security"]) for key in WEAK.split()},
    "short secret": ({"secret": "hush"}, ["cmp_secret has fewer than 8 characters"]),
    "blank behind the secret": ({"secret": "file:pki/blank.txt"}, ["begins or ends with a blank"]),
    "secret for everybody": ({"secret": "file:pki/open.txt"}, ["cmp_secret: every local user can read pki/open.txt"]),
    "key for everybody": ({"cert": "pki/cert.pem", "key": "pki/open.pem"}, ["cmp_key: every local user can read"]),
    "configuration file": ({"config": "pki/cmp.cnf"}, ["cmp_config", "not checked"]),
    "section": ({"section": "cmp"}, ["cmp_section", "not checked"]),
    "expires soon": ({"secret": None, "cert": "pki/soon.pem", "key": "pki/key.pem"}, ["cmp_cert", "expires on"]),
    "expired, not used": ({"cert": "pki/expired.pem", "key": "pki/key.pem"}, ["cmp_cert", "expired on 2001-01-02"]),
    "certificate without key, not used": ({"cert": "pki/cert.pem"}, ["cmp_cert without cmp_key"]),
    "pass phrase without key": ({"keypass": "hush"}, ["cmp_keypass without cmp_key"]),
    "TLS switched off": ({"tls_used": "False", "tls_trusted": "pki/cert.pem"}, ["cmp_tls_trusted", "plain HTTP"]),
    "trust in certificates alone": ({"out_trusted": "pki/cert.pem"}, ["cmp_out_trusted without cmp_untrusted: "]),
    "TLS with anybody": ({"tls_used": "True"}, ["cmp_tls_trusted is not set"]),
    "no directory": ({"tmp_dir": None}, ["cmp_tmp_dir is not set", "PrivateTmp"]),
}


@pytest.mark.parametrize("what", WARNINGS)
def test_an_unwise_setting_is_warned_of(
    what: str, command: Commands, own: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each unwise setting of the table: the check passes, openssl is run, and a warning names it."""
    monkeypatch.chdir(command.handlers.directory)
    make_files(Path("pki"))
    changes, words = WARNINGS[what]
    section: dict[str, str | None] = {**SECTION, **{f"cmp_{key}": value for key, value in changes.items()}}
    unset = {key[4:]: None for key, value in section.items() if value is None}
    handler = command.handler({key: value for key, value in section.items() if value is not None}, **unset)
    assert handler.handler_check() is None
    handler.enroll(CSR)
    assert command.log.exists(), "it is a warning, no error"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(all(word in warning for word in words) for warning in warnings), warnings
    assert "hush" not in caplog.text


@pytest.mark.parametrize("key", ["CMP_EXPECT_SENDER", "cmp-expect-sender", "Cmp_Expect_Sender", "cmpexpect_sender"])
def test_a_key_that_would_be_ignored_is_an_error(key: str, command: Commands) -> None:
    """cmp_expect_sender in capitals or with a hyphen: an error that gives the right spelling."""
    command.handler(SECTION)
    with command.handlers.config.open("a") as file:
        file.write(f"{key}: CN=x\n")
    with CAhandler(False, logging.getLogger("test")) as handler:
        fault = handler.handler_check()
        assert fault and f"{key}: " in fault and "cmp_expect_sender?" in fault


@every_binary
def test_half_of_tls_in_the_address_is_told(
    openssl: str, handlers: Handlers, capsys: pytest.CaptureFixture[str]
) -> None:
    """OpenSSL 3.0 wants -tls_used for https://; 3.5 switches TLS on by itself, and trusts anybody."""
    section = {**SECTION, "cmp_server": "https://127.0.0.1:1", "cmp_openssl_bin": openssl}
    handlers(section)
    errors, warnings = findings(handlers, capsys)
    assert any(text.startswith("cmp_tls_") for text in errors + warnings), errors + warnings
    assert handlers(section, tls_used="True").handler_check() is None


@every_binary
def test_no_proof_of_possession_asks_for_no_key_of_the_ca(
    openssl: str, handlers: Handlers, pair: Pair, mock: Callable[..., Mock]
) -> None:
    """`-popo -1` works with 3.0; 3.5 wants to save a key that the CA makes."""
    server = mock(pair.certificate, "-accept_raverified", openssl=openssl)
    handler = handlers(server.options(), openssl_bin=openssl, popo="-1")
    fault = handler.handler_check()
    error = handler.enroll(pair.csr)[0]
    if fault:
        assert "cmp_popo" in fault and fault in str(error)
    else:
        assert "newkeyout" not in str(error)


PIN = "pkcs11:token=x?pin-value=s3cret%21x&y"  # with a semicolon before it: FAULTS


@pytest.mark.parametrize("where", ["key", "tls_key", "path"])
def test_a_pin_is_shown_nowhere(where: str, command: Commands, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in an error nor in the log, in whichever option the address of a token stands."""
    caplog.set_level(logging.DEBUG)
    handler = command.handler(SECTION, **{where: PIN})
    texts = [str(handler.handler_check()), str(handler.enroll(CSR)[0]), caplog.text]
    assert not re.search("s3cret", " ".join(texts))
    assert not command.log.exists()


@pytest.mark.parametrize(
    ("message", "total", "used"),
    [
        (None, None, ("5", "10")),
        ("20", None, ("20", "25")),
        (None, "3", ("3", "3")),
        ("9", "8", "cmp_total_timeout must be at least cmp_msg_timeout"),
        ("9", "0", "cmp_total_timeout must be at least cmp_msg_timeout; 0 is possible for both only"),
        (None, "0", ("0", "0")),
    ],
)
def test_timeouts_fit_each_other(
    message: str | None, total: str | None, used: tuple[str, str] | str, command: Commands
) -> None:
    """openssl takes no -total_timeout below -msg_timeout."""
    handler = command.handler(SECTION, msg_timeout=message, total_timeout=total)
    if isinstance(used, str):
        assert str(handler.handler_check()).startswith(used)
    else:
        assert handler.handler_check() is None
        line = command(SECTION, msg_timeout=message, total_timeout=total)
        assert (value_of(line, "-msg_timeout"), value_of(line, "-total_timeout")) == used


def test_no_timeouts_are_handed_to_openssl(ca: DemoCA, command: Commands, handlers: Handlers) -> None:
    """For servers whose HTTP header comes in pieces: openssl gets no time-out, and the handler ends it."""
    line = command(SECTION, msg_timeout="0", total_timeout="0")
    assert (value_of(line, "-msg_timeout"), value_of(line, "-total_timeout")) == ("0", "0")
    handler = handlers(ca.options(), msg_timeout="0", total_timeout="0")
    assert handler.enroll(CSR)[0] is None


@binaries
@pytest.mark.parametrize("format", ["pem", "der", "p12"])
def test_all_formats_of_credentials_are_read(
    format: str, openssl: str, ca: DemoCA, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """openssl finds out by itself what is in a file."""
    section = ca.options("certificate")
    if format == "der":  # holds one certificate: the intermediate CA comes from elsewhere
        section["cmp_extracerts"] = section["cmp_cert"]
        for name in ("cert", "key"):
            tool = ["x509"] if name == "cert" else ["pkey"]
            words = [*tool, "-in", section[f"cmp_{name}"], "-outform", "DER", "-out", str(tmp_path / name)]
            subprocess.run([openssl, *words], check=True, capture_output=True)
            section[f"cmp_{name}"] = str(tmp_path / name)
    if format == "p12":
        words = ["-in", section["cmp_cert"], "-inkey", section["cmp_key"], "-out", str(tmp_path / "ra.p12")]
        words += ["-certfile", section["cmp_trusted"], "-passout", "pass:demo-pass"]
        subprocess.run([openssl, "pkcs12", "-export", *words], check=True, capture_output=True)
        section.update(cmp_cert=str(tmp_path / "ra.p12"), cmp_key=str(tmp_path / "ra.p12"))
        assert "check cmp_keypass" in str(handlers(section).handler_check())
        section["cmp_keypass"] = "demo-pass"
    handler = handlers(section, openssl_bin=openssl)
    assert handler.handler_check() is None
    assert handler.enroll(CSR)[0] is None


@binaries
@pytest.mark.parametrize("form", ["PEM", "P12"])
def test_the_form_of_the_key_stops_no_enrolment(form: str, openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    """openssl applies it to the public key of the request, too."""
    assert handlers(ca.options(), openssl_bin=openssl, keyform=form).enroll(CSR)[0] is None


def test_keys_without_underscores_count(
    command: Commands, handlers: Handlers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """openssl of 2019 spells its options so. The handler's own keys are no exception: none is ignored in silence."""
    work = str(tmp_path / "tmp")
    handler = command.handler(SECTION, tmp_dir=None, tmpdir=work, santypes="DNS, URI", refusechanges="True")
    names = [x509.DNSName("a.example"), x509.UniformResourceIdentifier("spiffe://a.example/x")]
    handler.enroll(csr_pem([], "a.example", extensions=[x509.SubjectAlternativeName(names)]))
    assert value_of(command.log.read_text().splitlines(), "-newkey").startswith(f"{work}/")
    fault = handlers(SECTION, refusechanges="perhaps").handler_check()
    assert fault == "cmp_refuse_changes: is a switch: set it to True or False"
    handlers(SECTION, tlsused="False", tlshost="cmp.example")
    assert "cmp_tls_host: not used, the connection is plain HTTP" in findings(handlers, capsys)[1]


def test_pre_releases_count_from_3_0_on() -> None:
    """Those of 3.0 could not yet convert a CSR, later ones can."""
    for version, converts in (
        ("OpenSSL 3.0.0-alpha9-dev ", False),
        ("OpenSSL 3.0.19 ", True),
        ("OpenSSL 3.6.0-beta1 ", True),
        ("OpenSSL 4.1.0-dev ", True),
        ("OpenSSL 1.1.1w ", False),
        ("LibreSSL 3.8.2", False),
    ):
        assert cmp_ca_handler.Binary("", version).since(3, 0) is converts, version


def test_a_busy_machine_is_not_remembered(handlers: Handlers, ca: DemoCA, tmp_path: Path) -> None:
    """An openssl that is asked for its options and does not answer in time is asked again."""
    program = tmp_path / "openssl"
    program.symlink_to(OPENSSL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmp_ca_handler, "_run", lambda *_: cmp_ca_handler.Run(cmp_ca_handler.HUNG, ""))
        fault = handlers(ca.options(), openssl_bin=str(program)).handler_check()
        assert fault and f"cmp_openssl_bin: {program}: openssl did not end in time" in fault
    assert handlers(ca.options(), openssl_bin=str(program)).handler_check() is None
