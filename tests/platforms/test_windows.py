"""The binaries of 2019 work: options without underscores, messages in capitals, and lines that end as on Windows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Callable

import pytest

from cmp_ca_handler import main
from conftest import OPENSSL, Handlers, csr_pem
from demo_ca import DemoCA
from shared import ISSUERS, SECTION, begin, enrolled, script

# The Windows binary of October 2019 spells these without underscores. It needs itself, or wine, to run, so this is a
# stand-in: the system's openssl does the work, behind that spelling.
SQUEEZED = "implicit_confirm disable_confirm unprotected_errors unprotected_requests msg_timeout total_timeout".split()
STAND_IN = """
for word; do
    case $word in
        {cases}
    esac
    set -- "$@" "$word"
    shift
done
said=$({openssl} "$@" 2>&1)
code=$?
printf '%s\\n' "$said" | sed -E '{help}; s/CMP (error|warning|info):/CMP \\U\\1:/; s/$/\\r/'
exit $code
"""


@pytest.fixture
def openssl_2019(tmp_path: Path) -> str:
    """An openssl with the names of options, the messages and the line ends of the Windows binary of 2019."""
    plain = {name.replace("_", ""): name for name in SQUEEZED}
    cases = "\n        ".join(
        f"-{old}) word=-{new} ;;\n        -{new}) echo 'cmp: Unknown option: -{new}'; exit 1 ;;"
        for old, new in plain.items()
    )
    names = "; ".join(f"s/^ -{new} ?/ -{old} /" for old, new in plain.items())
    return script(tmp_path / "openssl-2019", STAND_IN.format(cases=cases, openssl=OPENSSL, help=names))


def test_a_binary_of_2019_gets_its_own_spelling(openssl_2019: str, ca: DemoCA, handlers: Handlers) -> None:
    """Keys with underscores: the binary gets its own spelling, and the certificate is issued."""
    options = {"implicit_confirm": "True", "unprotected_errors": "True", "msg_timeout": "4", "ignore_keyusage": "True"}
    _, *issuers = enrolled(handlers(ca.options(), openssl_bin=openssl_2019, **options), csr_pem(["a.example"]))
    assert [c.subject.rfc4514_string() for c in issuers] == ISSUERS
    assert [m.request for m in ca.messages] == ["ir"]
    assert handlers.left() == []


def test_messages_of_2019_get_their_hint(
    openssl_2019: str, ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong secret: `CMP ERROR` gets its hint, and no line of the log ends with a carriage return."""
    error = handlers(ca.options(), openssl_bin=openssl_2019, secret="another-one").enroll(csr_pem(["a.example"]))[0]
    assert error
    assert "wrong pbm value" in error or "badMessageCheck" in error
    assert "check cmp_ref and cmp_secret" in error
    assert "\r" not in caplog.text
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert any(line.startswith("openssl cmp: ") and "CMP E" not in line for line in errors)


def test_binary_of_2019_waits(openssl_2019: str, make_ca: Callable[..., DemoCA], handlers: Handlers) -> None:
    """An order that waits: the poll gets the certificate, in the same transaction."""
    ca = make_ca()
    ca.hold = True
    handler = handlers(ca.options(), openssl_bin=openssl_2019, msg_timeout="2", total_timeout="2")
    csr = csr_pem(["a.example"])
    identifier = begin(handler, csr)
    ca.approve("all")
    error, bundle, _, _, rejected = handler.poll("a.example", identifier, csr)
    assert (error, rejected) == (None, False)
    assert bundle
    assert len({m.transaction for m in ca.messages}) == 1


def test_names_of_options_work_in_either_spelling(openssl_2019: str, handlers: Handlers) -> None:
    """With underscores or without, whichever the binary has."""
    for name in ("implicitconfirm", "implicit_confirm", "disableconfirm", "unprotectederrors"):
        for binary in (openssl_2019, OPENSSL):
            assert handlers(SECTION, openssl_bin=binary, **{name: "True"}).handler_check() is None, (name, binary)


def test_keys_without_underscores_are_treated_as_those_with_them(
    handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys without underscores at an openssl of today: taken, refused or ignored as those with them are."""
    assert handlers(SECTION, policycheck="True", verifydepth="3").handler_check() is None
    assert "-srv_ref" in str(handlers(SECTION, srvref="1").handler_check())
    assert handlers(SECTION, sannodefault="True").enroll("")[0]
    assert "cmp_san_nodefault is set by the handler itself" in caplog.text


def test_a_secret_under_another_name_is_not_shown(handlers: Handlers, capsys: pytest.CaptureFixture[str]) -> None:
    """`cmp_tlskeypass` in place of cmp_tls_keypass: `check` does not show its value."""
    handlers(SECTION, tlskeypass="hush-hush", tlskey=str(handlers.config), tlscert=str(handlers.config))
    main(["--config", str(handlers.config), "check"])
    said = capsys.readouterr()
    assert "hush-hush" not in said.out + said.err
    assert "env:CMP_CA_HANDLER_TLS_KEYPASS" in said.out + said.err or "(hidden)" in said.out


def test_a_profile_sets_nothing_more_under_another_name(handlers: Handlers) -> None:
    """What a profile must not set, it must not set under another spelling either."""
    assert handlers(SECTION, msgtimeout="2", path="a/")._profile_entries() == ["cmp_server", "cmp_path", "cmp_profile"]


def test_names_of_options_get_underscores_when_converted(openssl_2019: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line in the old spelling, by a binary of today or of 2019: keys with underscores."""
    words = ["cmp", "-cmd", "ir", "-server", "10.0.0.1:80", "-implicitconfirm", "-totaltimeout", "20", "-newkey", "k"]
    for program in (OPENSSL, openssl_2019):
        assert main(["convert", "--", program, *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {"cmp_implicit_confirm: True", "cmp_total_timeout: 20"} <= set(lines)


def test_a_binary_that_takes_only_a_private_key_is_refused(handlers: Handlers, tmp_path: Path) -> None:
    """The Ubuntu binary of September 2019 cannot serve an RA. This is a stand-in with its help text."""
    newkey = " -newkey val           Private key for the requested certificate. Default is that of -key"
    options = "printf '%s\\n' ' -cmd val   A' ' -server val   A' '" + newkey + "'"
    program = script(tmp_path / "openssl-u18", f'[ "$1" = version ] && echo OpenSSL 3.0.0-dev || {options}\n')
    fault = handlers(SECTION, openssl_bin=program).handler_check()
    assert fault
    assert "only a private key for -newkey" in fault
    assert "install OpenSSL 3" in fault
    assert handlers(SECTION, openssl_bin=program).enroll(csr_pem(["a.b"]))[0] == f"configuration error: {fault}"


def test_openssl_enrols_without_its_configuration_file(
    ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a slim container, and with most programs for Windows."""
    monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "none.cnf"))
    assert len(enrolled(handlers(ca.options()), csr_pem(["a.example"]))) == 3
