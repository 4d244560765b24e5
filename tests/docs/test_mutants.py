"""`python3 tests --mutants` changes one place at a time, leaves texts for people alone, and knows who runs a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mutants

TEXT = b'''\
"""A docstring - and more."""
from __future__ import annotations

import logging

LIMIT = 3
NAMES = {"one": 1}


def check(value: int | None, name: str = "x") -> bool:
    """Whether it is - or is not."""
    if value is None or not name:
        logging.warning("no value for %s", name)
        raise ValueError("no value")
    return value + 1 <= LIMIT


def unused() -> str:
    return f"{LIMIT + 1} words"
'''


def test_every_mutant_is_another_program() -> None:
    """One place, named by its line; the same seed draws the same."""
    source = mutants.Source(TEXT)
    drawn = mutants.draw(source, 1, 1000)
    assert len({source.mutated(mutant) for mutant in drawn}) == len(drawn) >= 14
    for mutant in drawn:
        changed = source.mutated(mutant).splitlines()
        differ = [n for n, (old, new) in enumerate(zip(TEXT.splitlines(), changed), 1) if old != new]
        assert differ == [mutant.line] and len(changed) == TEXT.count(b"\n")
    assert mutants.draw(source, 1, 5) == drawn[:5] != mutants.draw(source, 2, 5)


@pytest.mark.parametrize(
    "line",
    [
        b"    if value is not None or not name:",
        b"    if value is None and not name:",
        b"    if value is None or (name):",
        b"    if ((value is None or not name) and False):",
        b"    if ((value is None or not name) or True):",
        b"    return (value) <= LIMIT",
        b"    return value + 1 < LIMIT",
        b"    return value + (1 + 1) <= LIMIT",
        b"    return None",
        b"LIMIT = (3 + 1)",
        b'NAMES = {("~" + "one"): 1}',
    ],
)
def test_a_mutant_changes_one_thing_in_one_line(line: bytes) -> None:
    """Each line is one of the small program's with one comparison, operator, constant or return changed."""
    source = mutants.Source(TEXT)
    assert line in [source.mutated(mutant).splitlines()[mutant.line - 1] for mutant in source.mutants()]


def test_mutants_leave_texts_and_annotations_alone() -> None:
    """Docstrings, annotations, f-strings, and what a log line or an exception says."""
    changed = {mutant.line for mutant in mutants.Source(TEXT).mutants()}
    assert not {1, 2, 4, 11, 13, 14} & changed
    assert {mutant.kind for mutant in mutants.Source(TEXT).mutants() if mutant.line == 19} == {"return"}


def test_a_mutant_knows_the_statements_that_run_it() -> None:
    """The statement in a function; of what stands outside, the statements that use its name."""
    drawn = mutants.draw(mutants.Source(TEXT), 1, 1000)
    assert {mutant.statements for mutant in drawn if mutant.line == 15} == {frozenset({15})}
    assert {mutant.statements for mutant in drawn if mutant.line == 6} == {frozenset({15, 19})}


def test_the_handler_notes_each_statement_once_for_each_test(tmp_path: Path) -> None:
    """Each statement once for each test, by the line that it has in the true handler."""
    program = mutants.noting(TEXT, f"{tmp_path}/note-") + "\ncheck(1)\ncheck(1)\n"
    environment = {"PYTEST_CURRENT_TEST": "tests/test_a.py::test_b (call)"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    (note,) = tmp_path.iterdir()
    assert note.read_text() == "".join(f"{line} tests/test_a.py::test_b (call)\n" for line in (12, 15))
