"""The log: what an administrator finds a certificate by, and what tells somebody that something is wrong."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from conftest import Handlers, as_host, bundle_certificates, csr_pem
from demo_ca import DemoCA

ROOT = Path(__file__).parent.parent


def alert() -> str:
    """The regular expression that docs/deployment.md gives for monitoring."""
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```text\n(CMP \(enrolment.+)\n```", text)
    return str(found)


def lines(caplog: pytest.LogCaptureFixture, wanted: str) -> list[str]:
    """The handler's lines in which `wanted` is found; then the log is empty again."""
    found = [text for text in (record.getMessage() for record in caplog.records) if re.search(wanted, text)]
    caplog.clear()
    return found


@pytest.fixture(autouse=True)
def from_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "test")


def test_issued_and_revoked(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """Subject, serial, end of validity, and the transaction under which the CA has logged it."""
    handler = handlers(ca.options())
    _, bundle, certificate, _ = handler.enroll(as_host(csr_pem(["a.example"], "a.example")))
    assert bundle and certificate
    leaf = bundle_certificates(bundle)[0]
    (line,) = lines(caplog, "certificate issued|" + alert())
    found = re.search(r"subject=CN=a\.example serial=(\w+) .* notAfter=(\S+) .*transaction=(\w+) ", line)
    assert found, line
    assert found.group(1) == f"{leaf.serial_number:x}"
    assert found.group(2) == f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
    assert {message.transaction.lower() for message in ca.messages} == {found.group(3).lower()}
    assert handler.revoke(certificate, "superseded") == (200, None, None)
    assert len(lines(caplog, f"revoked at .*serial={leaf.serial_number:x}|" + alert())) == 1


def test_refused(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    ca.reject = "badCertTemplate"
    assert handlers(ca.options()).enroll(as_host(csr_pem(["a.example"])))[0]
    (line,) = lines(caplog, alert())
    about = f"DNS:a\\.example, CMP transaction {ca.messages[0].transaction}"
    assert re.search(f"^CMP enrolment of {about} failed: ", line, re.I)


def test_waiting(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """An order that waits, and goes on waiting, is nothing to be told of; the CA's no is."""
    ca.hold = True
    ca.check_after = 1
    handler = handlers(ca.options(), total_timeout="3", msg_timeout="3")
    identifier = handler.enroll(as_host(csr_pem([], "a.example")))[3]
    assert identifier
    about = rf"\(CN=a\.example, CMP transaction {ca.messages[0].transaction}\)"
    (line,) = lines(caplog, "waits for the CA|" + alert())
    assert re.search(rf"^CMP enrolment {identifier} waits for the CA: .*{about}$", line, re.I)
    assert not re.search(alert(), line)
    handler.poll("", identifier, "")
    assert lines(caplog, alert()) == []
    ca.refuse("all")
    handler.ask_always = True
    assert handler.poll("", identifier, "")[4]
    (line,) = lines(caplog, alert())
    assert re.search(rf"^CMP poll of {identifier} {about}: ", line, re.I)


def test_configuration(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """Before the CSR is read nobody knows the subject, but it is a failure all the same."""
    assert handlers(ca.options(), trsted="x").enroll(as_host(csr_pem(["a.example"])))[0]
    (line,) = lines(caplog, alert())
    assert "did you mean cmp_trusted?" in line
