"""The handler is one file that can be read from top to bottom: its parts in order, each entry before what it calls.

And its tests can be read as a specification: each file says its promise, each test its case.
"""

from __future__ import annotations

import ast
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


def test_parts() -> None:
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


def test_map() -> None:
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


def every_test() -> list[tuple[str, str, str]]:
    """File, name and docstring of every test, those that only an option of `python3 tests` runs among them."""
    functions = [(path, node) for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return [
        (path.name, node.name, ast.get_docstring(node) or "")
        for path, node in functions
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_every_test_says_its_case() -> None:
    """A test or a file of tests without a docstring: it is named here."""
    assert len(every_test()) > 500
    assert [(file, name) for file, name, case in every_test() if not case] == []
    assert [path.name for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_no_name_of_a_test_occurs_twice() -> None:
    """Two tests of one name, in one file or in two: the second would hide the first, or be taken for it."""
    assert {name: count for name, count in Counter(name for _, name, _ in every_test()).items() if count > 1} == {}


def test_no_file_of_tests_stands_outside_of_a_promise() -> None:
    """A new test_*.py beside conftest.py, or in a folder that is a package and would hide a module of that name."""
    folders = {path.parent for path in FILES if path.name.startswith("test_")}
    assert {folder.parent for folder in folders} == {ROOT / "tests"}
    assert {folder.name for folder in folders if (folder / "__init__.py").exists()} == {"clients", "servers"}
