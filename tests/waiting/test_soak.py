"""Nothing grows in a process that enrols for long; `python3 tests/soak.py` is the long run.

The CA runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak import Held, Soak, demo_ca, without_host


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    """A process that has enrolled before, so that imports and caches are there."""
    with demo_ca(tmp_path / "ca") as section, without_host(tmp_path):
        soak = Soak(tmp_path, section)
        soak.row(3)
        yield soak


@pytest.mark.parametrize(("kind", "count"), [("row", 60), ("once", 20)])
def test_nothing_grows(soak: Soak, kind: str, count: int) -> None:
    """60 orders in a row, or 20 at once: no more memory, descriptors, threads, processes or files than before."""
    run = {"row": soak.row, "once": soak.once}[kind]
    if kind == "once":
        run(count)  # threads leave the allocator's arenas behind, once
    before = soak.held()
    assert before.files == 0
    run(count)
    assert soak.held().grown(before) == []


@pytest.mark.parametrize("field", Held._fields)
def test_growth_is_seen(field: str) -> None:
    """One of these numbers is larger than before: it is reported."""
    before = Held(50_000, 10, 2, 1, 0)
    assert before.grown(before) == []
    assert before._replace(**{field: getattr(before, field) + (5 << 10)}).grown(before)


def test_a_zombie_is_seen() -> None:
    """A child has ended, and nobody has waited for it: it counts as a process."""
    before = Held.now()
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has taken notice
        assert [what.split(":")[0] for what in Held.now().grown(before)] == ["processes"]
