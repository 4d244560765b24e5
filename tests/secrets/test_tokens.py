"""The RA's key and secrets need not stand in the configuration: tokens and systemd's credentials hold them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import openssl_versions
from conftest import BINARIES, OPENSSL, Handlers, as_host, csr_pem, needs
from demo_ca import DemoCA
from shared import Desk

CSR = as_host(csr_pem(["a.example"], "a.example"))
ENGINE = "/usr/lib/*/engines-3/pkcs11.so"
MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN, WRONG_PIN = "482913", "193482"
TRIXIE = [path for path in BINARIES if path.endswith("openssl-trixie")]  # 3.5, for which there is the provider


class Token(NamedTuple):
    """A SoftHSM token with the RA's key in it."""

    directory: Path
    uri: str
    section: dict[str, str]

    def file(self, name: str, text: str) -> Path:
        """A file that only its owner can read."""
        path = self.directory / name
        path.write_text(text)
        path.chmod(0o600)
        return path


@pytest.fixture
def token(ca: DemoCA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Token:
    """A token, made with SoftHSM's own tool, and the section without cmp_key."""
    directory = tmp_path / "hsm"
    (directory / "tokens").mkdir(parents=True)
    (directory / "softhsm2.conf").write_text(f"directories.tokendir = {directory}/tokens\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(directory / "softhsm2.conf"))
    monkeypatch.setenv("PKCS11_MODULE_PATH", MODULE)
    section = ca.options("certificate")
    key = ["pkcs8", "-topk8", "-nocrypt", "-in", section.pop("cmp_key"), "-out", str(directory / "ra.pkcs8")]
    initialize = ["--init-token", "--free", "--label", "ra", "--so-pin", "7777", "--pin", PIN]
    imported = [
        "--import",
        str(directory / "ra.pkcs8"),
        "--token",
        "ra",
        "--label",
        "ra-key",
        "--id",
        "01",
        "--pin",
        PIN,
    ]
    for command in ([OPENSSL, *key], ["softhsm2-util", *initialize], ["softhsm2-util", *imported]):
        subprocess.run(command, check=True, capture_output=True)
    (directory / "ra.pkcs8").unlink()
    return Token(directory, "pkcs11:token=ra;object=ra-key;type=private", section)


def issued(handlers: Handlers, section: dict[str, str], **changes: str | None) -> str:
    """Enrol: the error, or an empty string."""
    error, bundle, _, _ = handlers(section, **changes).enroll(CSR)
    assert (bundle is None) == bool(error)
    return error or ""


def check_works(handlers: Handlers, section: dict[str, str], directory: Path) -> None:
    """The CA issues, and `check --connect` proves trust and credentials, without the PIN."""
    assert issued(handlers, section) == ""
    desk = Desk(directory)
    desk.configure(section)
    result = desk("check", "--connect")
    assert result.returncode == 0 and "trust: yes, credentials: yes" in result.stdout, result.stdout
    assert PIN not in result.stdout + result.stderr


# --- The engine, with OpenSSL 3 ---------------------------------------------------------------------------------------


@needs("softhsm2-util", ENGINE)
@pytest.mark.parametrize("source", ["file", "keypass"])
def test_an_engine_may_hold_the_key(
    source: str, token: Token, handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key's URI names the engine. The PIN comes from a file, or from the environment."""
    monkeypatch.setenv("RA_PIN", PIN)
    uri = f"org.openssl.engine:pkcs11:{token.uri}"
    if source == "file":
        section = {**token.section, "cmp_key": f"{uri}?pin-source=file:{token.file('pin', PIN)}"}
    else:
        section = {**token.section, "cmp_key": uri, "cmp_keypass": "env:RA_PIN"}
    check_works(handlers, section, tmp_path)


@needs("softhsm2-util", ENGINE)
@pytest.mark.parametrize(
    "pin, label, expected",
    [
        (WRONG_PIN, "ra-key", "PIN incorrect.*check cmp_keypass, or the pin-source in cmp_key"),
        ("", "ra-key", "PIN incorrect.*check cmp_keypass, or the pin-source in cmp_key"),
        (PIN, "other-key", "object not found.*check cmp_key, and for a token"),
    ],
)
def test_engine_says_why(
    pin: str, label: str, expected: str, token: Token, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cause is in the error, the PIN is not."""
    monkeypatch.setenv("RA_PIN", pin)
    keypass = "env:RA_PIN" if pin else None
    uri = f"org.openssl.engine:pkcs11:{token.uri.replace('ra-key', label)}"
    error = issued(handlers, {**token.section, "cmp_key": uri}, keypass=keypass)
    assert re.search(expected, error), error
    assert not pin or pin not in error


# --- The provider, with OpenSSL 3.5 -----------------------------------------------------------------------------------

PROVIDER = """\
openssl_conf = openssl_init
[openssl_init]
providers = providers
[providers]
default = default_provider
pkcs11 = pkcs11_provider
[default_provider]
activate = 1
[pkcs11_provider]
module = {provider}
pkcs11-module-path = {module}
{quirks}activate = 1
"""
QUIRKS = "pkcs11-module-quirks = no-deinit\n"


@pytest.fixture
def provider(token: Token, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Name the provider in the OpenSSL configuration that the environment names."""
    try:
        path = openssl_versions.pkcs11_provider()
    except openssl_versions.Missing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))

    def configure(quirks: str) -> None:
        text = PROVIDER.format(provider=path, module=MODULE, quirks=quirks)
        monkeypatch.setenv("OPENSSL_CONF", str(token.file("openssl.cnf", text)))

    return configure


@needs("softhsm2-util")
@pytest.mark.parametrize("openssl", TRIXIE)
@pytest.mark.parametrize("source", ["file", "keypass"])
def test_a_provider_may_hold_the_key(
    source: str,
    openssl: str,
    token: Token,
    provider: Callable[[str], None],
    handlers: Handlers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key by its pkcs11: URI, the PIN from a file or a variable: issued, and no output has the PIN."""
    provider(QUIRKS)
    monkeypatch.setenv("RA_PIN", PIN)
    if source == "file":
        section = {**token.section, "cmp_key": f"{token.uri}?pin-source=file:{token.file('pin', PIN)}"}
    else:
        section = {**token.section, "cmp_key": token.uri, "cmp_keypass": "env:RA_PIN"}
    section["cmp_openssl_bin"] = openssl
    check_works(handlers, section, tmp_path)


@needs("softhsm2-util")
@pytest.mark.parametrize("openssl", TRIXIE)
@pytest.mark.parametrize("pin, label", [(WRONG_PIN, "ra-key"), (PIN, "other-key")])
def test_provider_says_why(
    pin: str,
    label: str,
    openssl: str,
    token: Token,
    provider: Callable[[str], None],
    handlers: Handlers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says less than the engine: no more than that there is no such key."""
    provider(QUIRKS)
    monkeypatch.setenv("RA_PIN", pin)
    section = {**token.section, "cmp_key": token.uri.replace("ra-key", label), "cmp_keypass": "env:RA_PIN"}
    error = issued(handlers, section, openssl_bin=openssl)
    assert "Could not find private key" in error and "check cmp_key, and for a token" in error and pin not in error, (
        error
    )


# --- Files ------------------------------------------------------------------------------------------------------------


def test_credentials_of_systemd_are_read(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """As LoadCredential= makes them, but for the file system: read-only, in a directory that nobody can write."""
    directory = tmp_path / "credentials"
    directory.mkdir(0o700)
    (directory / "cmp_secret").write_text(ca.secret)
    (directory / "cmp_secret").chmod(0o400)
    directory.chmod(0o500)
    assert issued(handlers, ca.options(), secret=f"file:{directory}/cmp_secret") == ""
    directory.chmod(0o700)
