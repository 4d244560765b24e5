"""The log has what an administrator finds a certificate by, and what tells somebody that something is wrong."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from conftest import Handlers, as_host, bundle_certificates, csr_pem
from demo_ca import DemoCA
from shared import pairs

ROOT = Path(__file__).parents[2]


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


def test_issued_and_revoked_are_logged_in_one_line_each(
    ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """Subject, serial, end of validity, and the transaction under which the CA has logged it."""
    handler = handlers(ca.options())
    _, bundle, certificate, _ = handler.enroll(as_host(csr_pem(["a.example"], "a.example")))
    assert bundle and certificate
    leaf = bundle_certificates(bundle)[0]
    (line,) = lines(caplog, "certificate issued|" + alert())
    assert line.startswith("certificate issued: ")
    found = pairs(line)
    assert float(found.pop("seconds")) < 60
    assert found.pop("transaction").lower() in {message.transaction.lower() for message in ca.messages}
    assert found == {
        "subject": "CN=a.example",
        "serial": f"{leaf.serial_number:x}",
        "issuer": "C=DE, O=Demo, CN=Demo Issuing CA",
        "notAfter": f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        "chain": "3",
        "server": ca.server,
    }
    assert handler.revoke(certificate, "superseded") == (200, None, None)
    (line,) = lines(caplog, "certificate revoked|" + alert())
    assert line.startswith("certificate revoked: ")
    kept = {key: found[key] for key in ("serial", "issuer", "server")}
    assert pairs(line) == {**kept, "reason": "superseded"}


def test_a_refusal_is_one_line_in_the_log(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """A CA that refuses an order: one line with class, subject, server, transaction and the CA's reason."""
    ca.reject = "badCertTemplate"
    assert handlers(ca.options()).enroll(as_host(csr_pem(["a.example"])))[0]
    (line,) = lines(caplog, alert())
    assert line.startswith("CMP enrolment failed: ")
    found = pairs(line)
    assert found.pop("transaction").lower() == ca.messages[0].transaction.lower()
    assert "rejected the request: badCertTemplate" in found.pop("error")
    assert found == {"class": "refused", "subject": "DNS:a.example", "server": ca.server}


def test_what_waits_is_no_failure_in_the_log(ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture) -> None:
    """An order that waits, and goes on waiting, is nothing to be told of; the CA's no is."""
    ca.hold = True
    ca.check_after = 1
    handler = handlers(ca.options(), total_timeout="3", msg_timeout="3")
    identifier = handler.enroll(as_host(csr_pem([], "a.example")))[3]
    assert identifier
    about = {"id": identifier, "subject": "CN=a.example", "server": ca.server}
    (line,) = lines(caplog, "CMP enrolment waits|" + alert())
    assert line.startswith("CMP enrolment waits: ")
    assert not re.search(alert(), line)
    found = pairs(line)
    transaction = found.pop("transaction")
    assert transaction.lower() == ca.messages[0].transaction.lower()
    assert found == {**about, "reason": "the CA has not decided"}
    handler.poll("", identifier, "")
    assert lines(caplog, alert()) == []
    ca.refuse("all")
    handler.ask_always = True
    assert handler.poll("", identifier, "")[4]
    (line,) = lines(caplog, alert())
    assert line.startswith("CMP poll failed: ")
    found = pairs(line)
    assert "rejected the request" in found.pop("error")
    assert found == {"class": "refused", **about, "transaction": transaction}


def test_a_configuration_error_is_one_line_in_the_log(
    ca: DemoCA, handlers: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the CSR is read nobody knows the subject, but it is a failure all the same."""
    assert handlers(ca.options(), trsted="x").enroll(as_host(csr_pem(["a.example"])))[0]
    (line,) = lines(caplog, alert())
    assert line.startswith("CMP enrolment failed: class=configuration ")
    assert "did you mean cmp_trusted?" in pairs(line)["error"]
