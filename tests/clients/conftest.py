"""The table of what each client did, and how long it took, at the end of `python3 tests --clients`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

# What a test does with a client: the columns.
STEPS = ["order", "renew", "revoke", "wait"]


@pytest.fixture
def done(record_property: Any) -> Any:
    """`done("order", "12 s")` notes it for the table."""
    return record_property


def rows(reports: Iterator[Any]) -> dict[str, dict[str, str]]:
    """Client -> column -> text."""
    table: dict[str, dict[str, str]] = {}
    for report in reports:
        noted = dict(report.user_properties)
        client = noted.pop("client", None)
        if client is not None and report.when == "call":
            row = table.setdefault(client, {})
            row.update(noted)
            if report.failed:
                row["failed"] = report.nodeid.rpartition("::")[2].partition("[")[0]
    return table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table, as Markdown."""
    reports = (r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []))
    table = rows(reports)
    if not table:
        return
    columns = ["version", "names", *STEPS, "failed"]
    terminalreporter.section("ACME clients")
    for line in (["client", *columns], ["---"] * (len(columns) + 1)):
        terminalreporter.write_line("| " + " | ".join(line) + " |")
    for client, row in sorted(table.items()):
        terminalreporter.write_line("| " + " | ".join([client, *(row.get(column, "-") for column in columns)]) + " |")
