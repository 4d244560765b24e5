"""The handler is one file that can be read from top to bottom: its parts in order, each entry before what it calls.

And its tests can be read as a specification: each file says its promise, each test its case.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter, defaultdict
from pathlib import Path

import cmp_ca_handler
from host import ROOT

SOURCE = Path(cmp_ca_handler.__file__).read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
PARTS = [
    "The handler",
    "The request",
    "A transaction is a directory",
    "The exchange with the CA, and its verdict",
    "The certificate: its chain, and what it was asked for",
    "The configuration",
    "openssl",
    "Reading: DER, names, certificates, CMP messages",
    "The command line",
]


def starts() -> dict[str, int]:
    """Part -> its first line; the head is what stands before the first."""
    return {title: SOURCE[: found.start()].count("\n") + 1 for found in HEADINGS for title in [found.group(1)]}


HEADINGS = list(re.finditer(r"^# --- (.+?) -+$", SOURCE, re.M))
DEFINED = {node.name: node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def callers() -> dict[str, list[ast.FunctionDef | ast.ClassDef]]:
    """Function -> the functions and classes at the top of the file that name it."""
    found = defaultdict(list)
    for node in DEFINED.values():
        for name in {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} & DEFINED.keys() - {
            node.name
        }:
            found[name].append(node)
    return found


def test_parts_stand_in_their_order() -> None:
    """The parts that the design names, in its order."""
    assert list(starts()) == PARTS


def test_calls_go_down() -> None:
    """A function stands below the first one that calls it; what reads DER is apart, for everybody calls it."""
    reading, command_line = starts()[PARTS[-2]], starts()[PARTS[-1]]
    at_import = {"_table"}  # called where it stands
    for name, users in callers().items():
        node = DEFINED[name]
        if isinstance(node, ast.FunctionDef) and not reading < node.lineno < command_line and name not in at_import:
            assert min(user.lineno for user in users) < node.lineno, name


def test_command_line_is_apart() -> None:
    """Nothing above the command line calls anything in it."""
    start = starts()[PARTS[-1]]
    for name, users in callers().items():
        if DEFINED[name].lineno > start:
            assert [user.name for user in users if user.lineno < start] == [], name


def test_the_map_names_what_is_there() -> None:
    """Each name in the map at the top is there."""
    table = (ast.get_docstring(TREE) or "").partition("where to look\n")[2]
    names = re.findall(
        r"\b(_?[A-Za-z]\w*(?:\.\w+)?)", " ".join(line[55:] for line in table.splitlines() if "  " in line)
    )
    known = {*DEFINED, "OPTIONS", "HINTS"}
    assert {name.partition(".")[0] for name in names} & known, "the map names something"
    for name in re.findall(r"\b(?:CAhandler|Exchange|ChainFinder|Transaction)\.(\w+)", table):
        assert f"def {name}(" in SOURCE, name


def test_functions_are_short() -> None:
    """Each fits on a screen."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


FILES = [path for kind in ("test_*.py", "*_cases.py") for path in sorted((ROOT / "tests").rglob(kind))]


@functools.cache
def every_test() -> list[tuple[str, str, str]]:
    """File, name and docstring of every test, those that only an option of `python3 tests` runs among them."""
    functions = [(path, node) for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return [
        (path.name, node.name, ast.get_docstring(node) or "")
        for path, node in functions
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_every_test_says_its_case_under_its_own_name() -> None:
    """A test or a file of tests without a docstring, or two tests of one name: they are named here."""
    assert len(every_test()) > 500
    assert [(file, name) for file, name, case in every_test() if not case] == []
    assert [path.name for path in FILES if not path.read_text(encoding="utf-8").startswith('"""')] == []
    assert {name: count for name, count in Counter(name for _, name, _ in every_test()).items() if count > 1} == {}


# What tests use of the handler that no administrator and no host can reach. All else is tried through CAhandler, the
# command line, or an openssl that records its arguments.
INNER = {
    "_binary": "what the handler reads in a help text, beside the text itself",
    "_body": "a certConf with a field that no openssl sends yet, an ip with one that no CA of the tests sends",
    "_certificate": "for _changes, and for chains that no CA of the tests would send",
    "_chain": "from here on the machine has no descriptors left",
    "_changes": "openssl refuses another key before the handler can compare it",
    "_comma_dn": "the way back from _slash_dn",
    "_command": "every option of every openssl in every spelling: thousands of command lines",
    "_decode": "for _certificate",
    "_delete": "a poll comes while this runs",
    "_described": "what is remembered of a program is to be forgotten",
    "_exit_code": "a status that Python has lost",
    "_foreign": "where a text is cut, and what a long one costs",
    "_helper": "acme2certifier's reading of a CSR, or a fault in it",
    "_general_message": "`check --connect` is killed, and its directory is left",
    "_hidden": "for _hide",
    "_hide": "the order in which secrets are masked",
    "_lines": "for a run of openssl that did not end by itself",
    "_links": "5,000 orders before this one",
    "_load_config": "for _helper; an exception is made here",
    "_name": "reads the name in a request that was sent",
    "_object_names": "a list that was made before is to be forgotten",
    "_open_lock": "the order is finished between opening and locking",
    "_openssl_cmp": "the disk is full when openssl writes its next request",
    "_option_name": "no two names of all the programs become one",
    "_profile_entries": "which keys acme2certifier may set from a profile",
    "_prove_possession": "an exception is made here",
    "_read_csr": "any CSR, beside two other readers; for _changes",
    "_read_ini": "the benchmark's configuration, without a host",
    "_run": "a program that is not openssl: output without end, and its last moment",
    "_saved_message": "reads an answer that is on the disk between two calls",
    "_sequence": "for _name, and for a key in another form",
    "_settings": "for _command, _begin and _sweep_killed, and what it hides; an exception is made here",
    "_slash_dn": "3,000 names, which would be as many processes",
    "_sweep": "an hour after the end of a killed process",
    "_sweep_killed": "the sweep gets its lock at the wrong moment",
    "_swept": "the last sweep is long ago",
    "_sync": "the order in which names are written, synced and deleted",
    "_unlock": "for _begin: the process that held the lock is gone",
    "_usable": "answers out of turn, which no openssl would save",
}


def test_inner_functions_are_used_for_a_reason() -> None:
    """A test that calls or replaces another inner function of the handler, or a reason that no test needs any more."""
    used = set()
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        used.update(re.findall(r'(?:(?<!\bself)\.|cmp_ca_handler, ")(_[a-z]\w*)', text))
    assert {name for name in used if f"def {name}(" in SOURCE or re.search(rf"\b(self\.)?{name}\b.* = ", SOURCE)} == {
        *INNER
    }
