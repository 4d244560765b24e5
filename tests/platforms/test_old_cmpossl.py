"""The cmpossl of 2019 and 2020, from before OpenSSL 3.0, works: what it cannot carry is said."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from cryptography import x509

from conftest import OPENSSL, Handlers, csr_pem
from demo_ca import DemoCA
from shared import SHORT, begin, check_issued, enrolled, hold, script

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
def test_an_old_cmpossl_gets_its_own_options_and_enrols(
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
def test_an_old_cmpossl_sends_the_csr_by_p10cr(old_openssl: tuple[str, Path], ca: DemoCA, handlers: Handlers) -> None:
    """cmp_cmd `p10cr`: the CSR goes by -csr, and it is issued."""
    path, log = old_openssl
    assert len(enrolled(handlers(ca.options(), openssl_bin=path, cmd="p10cr"), csr_pem(["a.b"], "a.b"))) == 3
    assert " -csr " in log.read_text()


@old_releases
def test_what_an_old_cmpossl_cannot_carry_is_told(
    old_openssl: tuple[str, Path], ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """A must-staple extension is left out with a warning; a subject with a line break is an error."""
    handler = handlers(ca.options(), openssl_bin=old_openssl[0])
    must_staple = x509.TLSFeature([x509.TLSFeatureType.status_request])
    enrolled(handler, csr_pem(["a.example"], extensions=[must_staple]))
    lost = "openssl before 3.0 leaves out these parts of the CSR: 1.3.6.1.5.5.7.1.24"  # and no name
    assert lost in [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    error = handler.enroll(csr_pem(["a.example"], "line\nbreak"))[0]
    assert error and "cannot send the subject" in error and "OpenSSL 3.0" in error


def test_the_dynamic_linker_says_something_first(ca: DemoCA, handlers: Handlers, tmp_path: Path) -> None:
    """OpenSSL 3 stays OpenSSL 3: all extensions are sent, and an order can wait."""
    noise = "echo \"ERROR: ld.so: object 'libjemalloc.so.9' cannot be preloaded\" >&2"
    program = script(tmp_path / "openssl", f'{noise}\nexec {OPENSSL} "$@"\n')
    csr = csr_pem(["a.example"])
    handler = handlers(hold(ca).options(), openssl_bin=program, **SHORT)
    identifier = begin(handler, csr)
    ca.approve("all")
    check_issued(handler.poll("name", identifier, ""), csr)
