"""`cacerts` gets the CA's certificates, for cmp_untrusted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest

from conftest import BINARIES, OPENSSL, Handlers, Mock, Pair, binaries, bundle_certificates
from demo_ca import DemoCA

HANDLER = Path(__file__).resolve().parents[2] / "cmp_ca_handler.py"
MockServer = Callable[..., Mock]


def cacerts(
    handlers: Handlers, section: dict[str, str], *arguments: str, **changes: str | None
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command line."""
    handlers(section, **changes)
    command = [sys.executable, "-S", str(HANDLER), "--config", str(handlers.config), "cacerts", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@binaries
def test_cacerts_gives_the_issuers_for_a_whole_chain(
    openssl: str, mock: MockServer, pair: Pair, handlers: Handlers, tmp_path: Path, ca_directory: Path
) -> None:
    """A CA that sends no issuer with its certificates, asked for it. The server is a new openssl: 3.0's knows none."""
    (tmp_path / "cas.pem").write_text((ca_directory / "sub.pem").read_text() + (ca_directory / "root.pem").read_text())
    signer = str(ca_directory / "cmp.pem")
    options = ("-rsp_extracerts", signer, "-rsp_capubs", str(tmp_path / "cas.pem"))
    server = mock(pair.certificate, *options, openssl=BINARIES[-1])
    issuers = tmp_path / "issuers.pem"
    code, out, err = cacerts(handlers, server.options(), "-o", str(issuers), openssl_bin=openssl)
    assert (code, out) == (0, ""), err
    assert "C=DE, O=Demo, CN=Demo Issuing CA, valid until 20" in err
    assert bundle_certificates(issuers.read_text()) == bundle_certificates((tmp_path / "cas.pem").read_text())
    server.process.kill()
    # The same CA without caPubs: only the file can complete the chain.
    silent = mock(pair.certificate, "-rsp_extracerts", signer, openssl=openssl)
    bundle = handlers(silent.options(), openssl_bin=openssl, untrusted=str(issuers), trusted=None).enroll(pair.csr)[1]
    assert bundle_certificates(bundle or "")[1:] == bundle_certificates(issuers.read_text())
    assert handlers.left() == []


def test_cacerts_prints_the_root_on_standard_output(
    mock: MockServer, pair: Pair, handlers: Handlers, ca_directory: Path
) -> None:
    """A CA that sends its root, and no -o: the root is printed in PEM, and nothing else."""
    options = ("-rsp_capubs", str(ca_directory / "root.pem"))
    server = mock(pair.certificate, *options, openssl=BINARIES[-1])
    code, out, err = cacerts(handlers, server.options())
    assert code == 0, err
    assert bundle_certificates(out) == bundle_certificates((ca_directory / "root.pem").read_text())


def test_a_name_with_a_secret_is_masked(mock: MockServer, pair: Pair, handlers: Handlers, ca_directory: Path) -> None:
    """A CA that puts a secret of ours into the name of its certificate: it is masked."""
    server = mock(pair.certificate, "-rsp_capubs", str(ca_directory / "sub.pem"), openssl=BINARIES[-1])
    asked = {"recipient": None, "issuer": "CN=the CA", "keypass": "pass:Issuing"}  # the issuer becomes the recipient
    code, _, err = cacerts(handlers, server.options(), **asked)
    assert code == 0 and "CN=Demo *** CA, valid until 20" in err and "Issuing" not in err


@binaries
def test_a_ca_that_sends_no_certificates_is_named(openssl: str, ca: DemoCA, handlers: Handlers) -> None:
    """A CA that has no certificates to give: one error line that names it, and exit code 1."""
    code, out, err = cacerts(handlers, ca.options(), openssl_bin=openssl)
    assert (code, out) == (1, "")
    assert err == f"error: CMP server {ca.server} sends no certificates: ask the CA's operator\n"


def test_cacerts_with_a_wrong_secret_gives_the_hint(ca: DemoCA, handlers: Handlers) -> None:
    """A CA that knows another secret: exit code 4 and the hint; the secret is not shown."""
    code, out, err = cacerts(handlers, ca.options(), secret="another")
    assert (code, out) == (4, "")
    assert "check cmp_ref and cmp_secret" in err
    assert "another" not in err


def test_cacerts_names_the_missing_key_of_a_faulty_configuration(ca: DemoCA, handlers: Handlers) -> None:
    """No cmp_server is set: exit code 4, the key is named, and no CA is asked."""
    code, out, err = cacerts(handlers, ca.options(), server=None)
    assert (code, out) == (4, "")
    assert "cmp_server is missing" in err
    assert ca.messages == []


@pytest.mark.parametrize("lacking", ["infotype", "rspout"])
def test_an_old_openssl_cannot_ask_for_ca_certificates(
    lacking: str, ca: DemoCA, handlers: Handlers, tmp_path: Path
) -> None:
    """Simulated: one whose help does not name the option."""
    program = tmp_path / "old-openssl"
    hide = f'[ "$2" = -help ] && {OPENSSL} "$@" 2>&1 | grep -v "^ -{lacking}" && exit'
    program.write_text(f'#!/bin/sh\n{hide}\nexec {OPENSSL} "$@"\n')
    program.chmod(0o755)
    code, out, err = cacerts(handlers, ca.options(), openssl_bin=str(program))
    assert (code, out) == (4, "")
    assert "cannot ask for CA certificates" in err
