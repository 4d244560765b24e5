"""A profile, of an order, an account or an HTTP header, chooses what is a client's business, and nothing else."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import types
from pathlib import Path

import pytest

from cmp_ca_handler import CAhandler
from conftest import BINARIES, OPENSSL, Handlers, as_host, csr_pem, every_binary, needs
from demo_ca import DemoCA
from host import HANDLER, Host, pinned
from shared import knows_profiles, recorder, requested_profile, save_request

pytestmark = pytest.mark.e2e
BY_PATH = {"handler_module": str(HANDLER)}
HMAC = base64.urlsafe_b64encode(b"a key that CA and client share..").decode()


def accounts(directory: Path, profiles: dict[str, dict[str, object]]) -> dict[str, str]:
    """The [EABhandler] section and the key file for accounts of these names."""
    key_file = directory / "kid_profiles.json"
    key_file.write_text(json.dumps({name: {"hmac": HMAC, "cahandler": profile} for name, profile in profiles.items()}))
    handler = "acme2certifier.eabhandlers.kid_profile_handler"
    return {"eab_handler_module": handler, "key_file": str(key_file), "eab_profiling": "True"}


def eab(name: str) -> list[str]:
    """lego's options for external account binding."""
    return ["--eab", "--kid", name, "--hmac", HMAC.rstrip("=")]


def test_names_the_field_that_an_acme_profile_sets() -> None:
    """acme2certifier asks the handler for it: cmp_profile."""
    assert CAhandler.profile_mapping_field == "cmp_profile"


@every_binary
@pytest.mark.parametrize(
    "source", ["order", *(pytest.param(name, marks=needs("lego")) for name in ("account", "header"))]
)
def test_profile_reaches_the_ca(source: str, openssl: str, ca: DemoCA, tmp_path: Path) -> None:
    """By OpenSSL 3.3 and later; with an older one the order fails, and the log says why."""
    sections: dict[str, dict[str, str]] = {
        "order": {"Order": {"profiles": '{"gold": "https://example.com/gold"}'}},
        "account": {"EABhandler": accounts(tmp_path, {"gilt": {"cmp_profile": "gold"}})},
        "header": {"Order": {"header_info_list": '["HTTP_USER_AGENT"]', "allowed_header_values": '["gold"]'}},
    }[source]
    request = tmp_path / "request.der"
    save_request(ca, request)
    options = {"cmp_openssl_bin": openssl}
    with Host(tmp_path, {**BY_PATH, **ca.options(), **options}, sections) as host:
        if source == "order":  # lego does not know ACME profiles
            ordered = host.certbot("certonly", "-d", "shop.example.com", "--required-profile", "gold")
        else:
            choice = eab("gilt") if source == "account" else ["--user-agent", "cmp_profile=gold"]
            ordered = host.lego("shop.example.com", *choice)
        if knows_profiles(openssl):
            assert ordered.returncode == 0, ordered.stdout + host.log()
            assert requested_profile(request) == "gold"
        else:
            assert ordered.returncode == 1, ordered.stdout
            assert "needs OpenSSL 3.3 or later, this is OpenSSL 3." in host.log("^CMP enrolment failed")
            assert ca.messages == []


@needs("lego")
def test_header_that_is_not_allowed_changes_nothing(ca: DemoCA, tmp_path: Path) -> None:
    """Any client may send any header: acme2certifier 0.46 uses a value only where the administrator has listed it."""
    order = {"header_info_list": '["HTTP_USER_AGENT"]', "allowed_header_values": '["gold"]'}
    save_request(ca, tmp_path / "request.der")
    options = {"cmp_openssl_bin": BINARIES[-1]}
    options.update({"cmp_profile": "iron"} if knows_profiles(BINARIES[-1]) else {})
    with Host(tmp_path, {**BY_PATH, **ca.options(), **options}, {"Order": order}) as host:
        ordered = host.lego("shop.example.com", "--user-agent", "cmp_profile=lead")
        assert ordered.returncode == 0, ordered.stdout + host.log()
    assert requested_profile(tmp_path / "request.der") == options.get("cmp_profile", "")


@needs("lego")
def test_a_header_that_is_allowed_in_an_older_release_names_the_profile(ca: DemoCA, tmp_path: Path) -> None:
    """acme2certifier 0.45, and lego with an allowed User-Agent: the request has the profile it names."""
    order = {"header_info_list": '["HTTP_USER_AGENT"]', "allowed_header_values": '["lead", "gold"]'}
    save_request(ca, tmp_path / "request.der")
    options = {"cmp_openssl_bin": BINARIES[-1]}
    with Host(tmp_path, {**BY_PATH, **ca.options(), **options}, {"Order": order}, python=pinned("0.45")) as host:
        ordered = host.lego("shop.example.com", "--user-agent", "cmp_profile=gold")
        if knows_profiles(BINARIES[-1]):
            assert ordered.returncode == 0, ordered.stdout + host.log()
            assert requested_profile(tmp_path / "request.der") == "gold"
        else:
            assert "needs OpenSSL 3.3 or later" in host.log("^CMP enrolment failed")


@needs("lego")
def test_each_account_has_its_own_path(ca: DemoCA, tmp_path: Path) -> None:
    """Each account's requests go to its own path at the CMP server; so do its revocations."""
    profiles: dict[str, dict[str, object]] = {
        "north": {"cmp_path": "north/pkix/"},
        "south": {"cmp_path": "south/pkix/"},
    }
    profiles["plain"] = {}
    with Host(tmp_path, {**BY_PATH, **ca.options()}, {"EABhandler": accounts(tmp_path, profiles)}) as host:

        def contacted() -> list[str]:
            return [line.rpartition(ca.server)[2] for line in host.log("[Ww]ill contact").splitlines()]

        unknown = host.lego("east.example.com", *eab("east"), contact="east@example.com")
        assert unknown.returncode == 1 and ca.messages == []
        for name in ("south", "plain"):
            ordered = host.lego(f"{name}.example.com", *eab(name), contact=f"{name}@example.com")
            assert ordered.returncode == 0, ordered.stdout + host.log()
        assert contacted() == ["/south/pkix/", "/pkix/"]
        options = ["--eab-kid", "north", "--eab-hmac-key", HMAC.rstrip("=")]
        ordered = host.certbot("certonly", "-d", "north.example.com", *options)
        assert ordered.returncode == 0, ordered.stdout + host.log()
        revoked = host.certbot("revoke", "--cert-name", "north.example.com", "--no-delete-after-revoke")
        assert revoked.returncode == 0, revoked.stdout + host.log()
        assert contacted()[2:] == ["/north/pkix/", "/north/pkix/"]


@needs("lego")
def test_the_path_of_an_account_stays_while_its_order_waits(ca: DemoCA, tmp_path: Path) -> None:
    """The poller finishes a transaction at the address where it began."""
    ca.hold = True
    ca.check_after = 1
    sections = {"EABhandler": accounts(tmp_path, {"north": {"cmp_path": "north/pkix/"}})}
    options = {**ca.options(), "cmp_total_timeout": "3"}
    with Host(tmp_path, {**BY_PATH, **options}, sections) as host:
        assert host.lego("north.example.com", "--cert.timeout", "1", *eab("north")).returncode == 1
        ca.approve("all")
        polled = host.poll_until('certificate issued: subject="CN=north.example.com"')
    assert f"{ca.server}/north/pkix/" in polled


@needs("lego")
def test_profile_sets_neither_program_nor_directory_nor_credentials(ca: DemoCA, tmp_path: Path) -> None:
    """Whoever may write an account's profile must not run programs, nor choose files, nor another identity."""
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\ntouch {tmp_path}/taken\nexec {OPENSSL} "$@"\n')
    program.chmod(0o755)
    own = {**ca.options(), "cmp_total_timeout": "30"}
    taken: dict[str, object] = {
        "cmp_openssl_bin": str(program),
        "cmp_tmp_dir": str(tmp_path / "taken"),
        "cmp_reqout": str(tmp_path / "taken"),
        "cmp_rspout": str(tmp_path / "taken"),
        "cmp_certout": str(tmp_path / "taken"),
        "cmp_config": str(program),
        "cmp_engine": str(program),
        "cmp_ref": "4321",
        "cmp_secret": "taken",
        "cmp_secret_variable": "HOME",
        "cmp_cert": str(ca.directory / "ra.pem"),
        "cmp_key": str(ca.directory / "ra.key"),
        "cmp_unprotected_requests": "True",
        "cmp_total_timeout": "1",
        "cmp_cmd": "p10cr",
        "cmp_path": "mine/pkix/",
    }
    lists: dict[str, object] = {key: [value] for key, value in taken.items()}
    for number, profile in enumerate([taken, lists]):
        directory = tmp_path / str(number)
        directory.mkdir()
        sections = {"DEFAULT": {"debug": "True"}, "EABhandler": accounts(directory, {"mallory": profile})}
        with Host(directory, {**BY_PATH, **own}, sections) as host:
            ordered = host.lego("mallory.example.com", *eab("mallory"))
            assert ordered.returncode == 0, ordered.stdout + host.log()
            (command,) = host.log("running .* cmp ").splitlines()
        # the one that it may set was set, so the profile was read
        assert " -path mine/pkix/ " in command
        assert " -cmd ir " in command and " -ref 1234 " in command and " -total_timeout 30 " in command
        assert "taken" not in command and str(program) not in command
        assert not {"-cert", "-key", "-engine", "-unprotected_requests"} & set(command.split())
        assert str(program) not in command
        assert not (tmp_path / "taken").exists()


def test_attributes_set_by_force_have_no_effect(ca: DemoCA, handlers: Handlers) -> None:
    """The host's functions set attributes of an object of their own, so those of the handler are nobody's business."""
    handler = handlers(ca.options(), cert=str(ca.directory / "ra.pem"), key=str(ca.directory / "ra.key"))
    assert not {name for name in dir(handler) if name.startswith("cmp_")}
    for name in ("cmp_openssl_bin", "cmp_tmp_dir", "cmp_secret", "cmp_ref", "cmp_cert", "cmp_key"):
        setattr(handler, name, "/nonexistent")
    error, bundle, _, _ = handler.enroll(as_host(csr_pem(["a.example"])))
    assert error is None and bundle
    assert not os.path.exists("/nonexistent")


def test_numbers_and_switches_in_a_profile_reach_openssl(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """JSON has them without quotes; a list of them reaches the handler as one of its values."""

    def choose(_: object, chosen: types.SimpleNamespace, *__: object) -> None:
        chosen.cmp_days, chosen.cmp_ignore_keyusage = 30, True

    log = tmp_path / "log"
    program = recorder(tmp_path / "openssl", log)
    handler = handlers(ca.options(), openssl_bin=program, days="10", ignore_keyusage="False")
    handler._helper = types.ModuleType("helper")
    handler._helper.eab_profile_header_info_check = choose  # type: ignore[attr-defined]
    assert handler.enroll(as_host(csr_pem(["a.example"])))[0] is None
    assert " -days 30 " in log.read_text() and " -ignore_keyusage " in log.read_text()


def test_a_fraction_in_a_profile_is_an_error(ca: DemoCA, handlers: Handlers) -> None:
    """A profile sets 30.5 days: an error names the entry, and no certificate of the configured time is issued."""

    def choose(_: object, chosen: types.SimpleNamespace, *__: object) -> None:
        chosen.cmp_days = 30.5

    handler = handlers(ca.options(), days="10")
    handler._helper = types.ModuleType("helper")
    handler._helper.eab_profile_header_info_check = choose  # type: ignore[attr-defined]
    error = handler.enroll(as_host(csr_pem(["a.example"])))[0]
    assert error and "cmp_days: must be a number" in error
    assert ca.messages == []


def test_an_error_is_ordinary_where_the_hosts_function_stumbles(ca: DemoCA, handlers: Handlers) -> None:
    """acme2certifier raises IndexError at an empty list in a profile, or at a header without "=": an ordinary error."""
    handler = handlers(ca.options())
    handler._helper = types.ModuleType("helper")
    handler._helper.eab_profile_header_info_check = lambda *_: [][0]  # type: ignore[attr-defined]
    handler._helper.eab_profile_revocation_check = lambda *_: [][0]  # type: ignore[attr-defined]
    handler._helper.config_eab_profile_load = lambda *_: (True, object())  # type: ignore[attr-defined]
    csr = csr_pem(["a.example"])
    certificate = subprocess.run(["openssl", "x509", "-in", ca.directory / "ra.pem"], capture_output=True, text=True)
    for error in (handler.enroll(as_host(csr))[0], handler.revoke(certificate.stdout)[2]):
        assert error and error.startswith(
            "acme2certifier cannot apply the profile of this account or order (IndexError)"
        )
    assert ca.messages == []
