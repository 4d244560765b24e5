"""A secret is in no argument list, log line, error or file, wherever it comes from."""

from __future__ import annotations

import logging
import re
import secrets
import subprocess
from pathlib import Path
from typing import Callable
from unittest.mock import Mock

import pytest

import cmp_ca_handler
from conftest import OPENSSL, Handlers, as_host, binaries, csr_pem, nobody_at
from demo_ca import DemoCA
from proxy import Forward, Proxy, message_parts, nested, poll_rep, protected, with_body
from shared import SECTION, SHORT, Desk, begin, hold, recorder, script

CSR = csr_pem(["a.example"], "a.example")
REJECTED = bytes.fromhex("020102")  # PKIStatus


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    """An administrator's directory."""
    return Desk(tmp_path)


# --- Where it comes from ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["ref", "secret"])
def test_an_empty_credential_leaves_it_to_the_variable(
    key: str, ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cmp_ref:` without a value is no value, and so is a variable without one."""
    monkeypatch.setenv("TEST_CREDENTIAL", getattr(ca, key))
    changes = {key: "", f"{key}_variable": "TEST_CREDENTIAL"}
    assert handlers(ca.options(), **changes).enroll(CSR)[0] is None
    monkeypatch.setenv("TEST_CREDENTIAL", "")
    assert f"cmp_{key}_variable: the environment variable TEST_CREDENTIAL is not set" in str(
        handlers(ca.options(), **changes).enroll(CSR)[0]
    )


@pytest.mark.parametrize("form", ["demo:secret", "pass:demo:secret", "env:TEST_SECRET", "file:secret.txt"])
def test_all_sources_of_a_secret_keep_it_out_of_the_arguments(
    form: str,
    make_ca: Callable[..., DemoCA],
    handlers: Handlers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A secret with a colon, as it is, or by pass:, env: and file:: enrolled, and openssl's arguments lack it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEST_SECRET", "demo:secret")
    Path("secret.txt").write_text("demo:secret\n")
    ca = make_ca(secret="demo:secret")
    openssl = recorder(tmp_path / "openssl", tmp_path / "calls")
    assert handlers(ca.options(), secret=form, openssl_bin=openssl).enroll(CSR)[0] is None
    assert "demo:secret" not in Path("calls").read_text()


@pytest.mark.parametrize("secret", ["ab #c of them", "true", "off", "file:/etc/passwd", '"quoted"', "pass:word"])
def test_a_variable_holds_the_secret_as_it_is(
    secret: str, make_ca: Callable[..., DemoCA], handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no text of a configuration file: nothing in it is a comment, a switch or a prefix. Nor with `env:`."""
    monkeypatch.setenv("CMP_SECRET", secret)
    ca = make_ca(secret=secret)
    for changes in ({"secret_variable": "CMP_SECRET"}, {"secret": "env:CMP_SECRET"}):
        handler = handlers(ca.options(), **{"secret": None, **changes})
        assert handler.handler_check() is None
        assert handler.enroll(CSR)[0] is None


REFERENCES = {
    "blank before it": (" demo", "begins or ends with a blank"),
    "blank behind it": ("demo ", "begins or ends with a blank"),
    "line break behind it": ("demo\n", "begins or ends with a blank or a line break"),
    "line break in it": ("de\nmo", "more than one line"),
    "quotes": ('"demo"', "quotes"),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_a_variable_with_a_reference_as_it_cannot_be_is_an_error(
    case: str, ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `docker run --env-file`, or reading a file, leaves around a reference: an error that names the entry."""
    value, words = REFERENCES[case]
    monkeypatch.setenv("CMP_REF", value)
    handler = handlers(ca.options(), ref=None, ref_variable="CMP_REF")
    for text in (handler.handler_check(), handler.enroll(as_host(CSR))[0]):
        assert text and "cmp_ref_variable: " in text and words in text
    assert ca.messages == []


# --- Where it does not go ---------------------------------------------------------------------------------------------


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


def test_a_secret_in_place_of_its_variable_is_not_shown(handlers: Handlers) -> None:
    """What is set as the variable's name, and does not look like one, may be the secret: it is not shown."""
    fault = str(handlers(SECTION, secret=None, secret_variable="HUSHASECRET").handler_check())
    assert (
        "cmp_secret_variable: the variable named there (perhaps a secret) is not set" in fault and "HUSH" not in fault
    )


def test_what_openssl_gets_is_masked(handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever openssl gets, wherever it comes from, and what only looks like a secret."""
    (tmp_path / "secret").write_text("from a file\nmore\n")
    monkeypatch.setenv("KEYPASS", "from a variable")
    changes: dict[str, str | None] = {"secret": f"file:{tmp_path}/secret", "keypass": "env:KEYPASS"}
    changes.update(tls_keypass="pass:from here")
    hidden = cmp_ca_handler._settings(handlers(SECTION, **changes).section).hidden
    assert {"from a file", "from a variable", "from here"} <= {*hidden}
    text = "a from a file, FROM a from here http://me:from%20a%20proxy@127.0.0.1:1 pin-value=12&x"
    assert cmp_ca_handler._hide(text, hidden) == "a ***, FROM a *** http://***@127.0.0.1:1 pin-value=***&x"


def test_a_secret_is_masked_before_the_text_is_cut() -> None:
    """The longest one first, also where its blanks are not those that were configured, and before the text is cut."""
    assert cmp_ca_handler._hide("a long secret", cmp_ca_handler._hidden({"A": "long", "B": "long secret"})) == "a ***"
    assert cmp_ca_handler._hide("two blanks", cmp_ca_handler._hidden({"A": "two  blanks"})) == "***"
    text = cmp_ca_handler._foreign("x" * (cmp_ca_handler.MAX_TEXT - 10) + " s3cret-words", ["s3cret-words"])
    assert text.endswith("x ***")


def test_a_secret_in_an_answer_is_masked(
    ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA that writes the secret and a line as of openssl into its text: it is masked, and makes no line."""
    details = nested(f"the secret is {ca.secret}\nCMP error: forged".encode(), 0x30, 0x0C)
    body = nested(nested(REJECTED, 0x30) + details, 0xB7, 0x30)
    proxy.spoil = lambda _, forward: with_body(forward(), body)
    # Only the CA can do this, as it takes the secret; or else whoever is believed without it.
    handler = handlers(ca.options(), server=proxy.server, unprotected_errors="True")
    with caplog.at_level(logging.DEBUG):
        error = handler.enroll(as_host(CSR))[0]
    assert "an unverified answer says: rejection, 'the secret is *** CMP error: forged'" in str(error)
    assert "the secret is ***" in caplog.text
    assert ca.secret not in caplog.text + str(error)
    assert not re.search("^CMP error", caplog.text, re.M)


@pytest.mark.parametrize("between", [" ", "\n  "], ids=["one line", "block"])
@pytest.mark.parametrize("entry", ["key", "tls_key"])
def test_the_content_of_a_key_is_not_shown(
    entry: str, between: str, ca: DemoCA, desk: Desk, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """The private key itself in the place of its path, on one line or as an indented block: the error says what to
    write there, and nothing of it is in an error, in the log or in what `check` prints.
    """
    lines = (ca.directory / "stranger.key").read_text().split("\n")[:-1]
    assert lines[0] == "-----BEGIN PRIVATE KEY-----" and len(lines) > 3
    section = {**ca.options("certificate"), f"cmp_{entry}": between.join(lines)}
    handler = handlers(section)
    with caplog.at_level(logging.DEBUG):
        texts = [str(handler.handler_check()), str(handler.enroll(as_host(CSR))[0])]
    desk.configure(section)
    results = [desk(*words) for words in (["check"], ["check", "--json"], ["enroll", "acme_srv.cfg", "-v"])]
    assert all(f"cmp_{entry}: is the content of a file: write its path" in text for text in texts)
    assert "write its path" in results[0].stdout
    for shown in (*texts, caplog.text, *(result.stdout + result.stderr for result in results)):
        assert [line for line in lines[1:-1] if line[:12] in shown] == []


@pytest.mark.parametrize("quoted", [False, True])
def test_a_secret_in_a_line_without_a_colon_is_masked(
    quoted: bool, ca: DemoCA, handlers: Handlers, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    """openssl shows the reason of a pollRep in a line of INFO: whole lines are masked, whatever they look like."""
    hold(ca)
    reason = f"'{ca.secret}'" if quoted else f"{ca.secret} and more"

    def answer(forward: Forward) -> bytes:
        header, _, _, extra = message_parts(forward())
        return protected(header, header, poll_rep(3600, [reason.encode()]), extra)

    proxy.spoil_next("pollReq", answer)
    with caplog.at_level(logging.DEBUG):
        begin(handlers(ca.options(), server=proxy.server, **SHORT), csr_pem(["a.example"]))
    assert "reason = " in caplog.text and "***" in caplog.text
    assert ca.secret not in caplog.text


@pytest.mark.parametrize("where", ["_load_config", "_settings", "_read_csr", "_begin"])
def test_the_text_of_an_unexpected_exception_is_not_shown(
    where: str, ca: DemoCA, handlers: Handlers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows what is in it: the type and the line must do."""
    monkeypatch.setattr(cmp_ca_handler, where, Mock(side_effect=KeyError(f"hush, {ca.secret}")))
    handler = handlers(ca.options())
    texts = [str(handler.enroll(as_host(CSR))[0]), str(handler.revoke((ca.directory / "ra.pem").read_text(), "1")[2])]
    texts += [str(handler.handler_check())] if where in ("_load_config", "_settings") else []
    for text in texts[:1] if where == "_read_csr" else texts:
        assert re.search(r"internal error: KeyError \(lines? [\d, ]+\)", text)
    for text in (caplog.text, *texts):
        assert "hush" not in text and ca.secret not in text


@binaries
@pytest.mark.parametrize("password", ["hush@tiger", "hush/tiger"])
def test_the_password_of_a_proxy_is_not_shown(
    password: str,
    openssl: str,
    ca: DemoCA,
    handlers: Handlers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """openssl prints the proxy's address as it is, or the part of it that it cannot understand."""
    monkeypatch.setenv("http_proxy", f"http://user:{password}@127.0.0.1:9")
    with caplog.at_level(logging.DEBUG):
        error = str(
            handlers(ca.options(), openssl_bin=openssl, msg_timeout="1", total_timeout="1").enroll(as_host(CSR))[0]
        )
    assert "failed" in error and "via http" in caplog.text
    assert "tiger" not in error + caplog.text


@pytest.mark.parametrize("user", ["tok3n", "user:xyz"])
def test_the_user_of_a_proxy_without_a_scheme_is_not_shown(
    user: str,
    ca: DemoCA,
    desk: Desk,
    handlers: Handlers,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A token, or a short password, in http_proxy, whose address has no http:// before it: it is shown nowhere."""
    times = {"msg_timeout": "1", "total_timeout": "1"}
    with nobody_at() as port, caplog.at_level(logging.DEBUG):
        monkeypatch.setenv("http_proxy", f"{user}@127.0.0.1:{port}")
        error = handlers(ca.options(), **times).enroll(as_host(CSR))[0]
        desk.configure(ca.options(), **times)
        said = [desk("check"), desk("check", "--connect", "-v")]
    assert error and f"127.0.0.1:{port}" in caplog.text + said[1].stdout
    for text in (error, caplog.text, *(result.stdout + result.stderr for result in said)):
        assert user.rpartition(":")[2] not in text


# --- `check` ----------------------------------------------------------------------------------------------------------

HIDDEN = {
    "cmp_secert": "hush-hush",
    "cmp_SECRET": "hush-hush",
    "cmp_keypas": "hush-hush",
    "cmp_newkeypass": "hush-hush",
    "cmp_pin": "hush-hush",
    "cmp_secret_variable": "hush-hush",
    "cmp_secret": "hush-hush",
    "cmp_srv_secret": "hush-quietly",
    "cmp_key": "pkcs11:token=ra;object=ra?pin-value=hush-hush",
    "cmp_tls_key": "pkcs11:token=ra;object=ra?pin-value = hush-hush",
    "cmp_provparam": "pkcs11:pin=hush-hush",
    "cmp_tmp_dir": "/tmp/pin-value=hush-hush",
    "cmp_proxy": "http://user:hush-hush@127.0.0.1:1",
    "cmp_server": "user:hush-hush@127.0.0.1:1",
}


@pytest.mark.parametrize("key", HIDDEN)
def test_secrets_stay_hidden(key: str, ca: DemoCA, desk: Desk) -> None:
    """A secret under a misspelt key, in an address or in a token's URI: `check --connect` does not print it."""
    desk.configure({**ca.options(), key: HIDDEN[key]}, msg_timeout="1")
    result = desk("check", "--connect", http_proxy="http://user:hush-proxy@127.0.0.1:1")
    assert "hush" not in result.stdout + result.stderr


BROKEN = {
    "no colon": "cmp_secret hush-aGVzaA==",
    "no colon, in a pair": "cmp_secret hush:hush",
    "indented": "  cmp_secret: hush-hush",
    "in the same line": "cmp_path: pkix/ cmp_secret: hush-hush",
    "capitals": "CMP_SECRET hush = hush",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_secret_in_a_broken_section_is_not_shown(case: str, desk: Desk) -> None:
    """A colon that is missing, a line that begins with a blank: the secret is a part of something that is no secret."""
    for before in ("cmp_ref: 1", "cmp_tmp_dir: work", "cmp_openssl_bin: openssl", "cmp_trusted: x.pem"):
        lines = ["[CAhandler]", "cmp_server: 127.0.0.1:9", before, BROKEN[case], ""]
        (desk.directory / "acme_srv.cfg").write_text("\n".join(lines))
        for command in (["check"], ["check", "--json"], ["enroll", "acme_srv.cfg", "-v"]):
            result = desk(*command)
            assert result.returncode == 4 and "hush" not in result.stdout + result.stderr, before


@pytest.mark.parametrize("secret", ["hush-a-secret", 'hush,a+"secret'])
def test_a_secret_in_the_names_of_a_certificate_is_masked(
    secret: str, make_ca: Callable[..., DemoCA], handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A CA that puts the shared secret into the subject: the log does not show it, nor with the escapes of a name."""
    ca = make_ca(secret=secret)
    caplog.set_level(logging.INFO)
    csr = csr_pem([], f"{secret} and more")
    assert handlers(ca.options()).enroll(as_host(csr))[0] is None
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("certificate issued")]
    assert "CN=*** and more" in line


def test_what_is_no_secret_is_shown(ca: DemoCA, desk: Desk) -> None:
    """The name of the secret's variable and the server are printed, the variable's value is not."""
    desk.configure(ca.options(), secret=None, secret_variable="RA_SECRET", tls_keypass="file:/dev/null")
    result = desk("check", RA_SECRET="demo-secret")
    assert "cmp_secret_variable:     RA_SECRET" in result.stdout and "demo-secret" not in result.stdout
    assert f"cmp_server:              {ca.server}" in result.stdout
