"""How much the tests notice: `python3 tests --mutants` changes the handler at 150 places, one at a time.

    python3 tests --mutants                       draw 150 mutants, run the tests against each, print a table
    python3 tests --mutants --count 10 --seed 7   others, and fewer
    python3 tests --mutants --list                print the mutants only
    python3 tests --mutants --files tests/chain/test_chain.py ...  these test files only
    python3 tests --mutants --tests-of COMMIT     the tests of another commit, against the handler as it is here

A mutant is the handler with one comparison, operator, constant, condition, `not` or `return` changed. They are drawn in
turns from these kinds, so that the many constants do not push out the rest. What is only text for people (in a log
line, an exception, a help text, an f-string) is left alone.

Which tests run a line is measured first, once, with a copy of the handler that notes its statements; it is kept in
`.cache/mutants` until the handler or the tests change. Each mutant then meets only the tests that run its line, in a
copy of the tree: one case of each test first, the fast ones before the slow. A test that fails is run once more, so
that a busy machine kills no mutant. A test that takes far longer than it should has noticed the mutant, too.

What is finished is kept: the same command goes on where it was stopped, and `--fresh` begins again. A mutant whose time
was up before all its tests had run is open: `--only N --limit 3000` tries it once more.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NAME = "cmp_ca_handler.py"
CACHE = ROOT / ".cache" / "mutants"
LEFT_OUT = (".git", ".cache", ".venv*", "__pycache__", "*_cache", ".hypothesis", ".coverage*")
NOTHING_RUNS = "pytest itself"  # the handler cannot be imported, for instance
SEPARATE = ("clients", "servers")  # folders whose tests need what others fetch, see tests/conftest.py
FIRST = 40  # so many tests are tried before the files of all others are loaded


# --- The mutants


class Mutant(NamedTuple):
    """One change: the bytes from start to end become `text`."""

    kind: str
    line: int
    start: int
    end: int
    text: str
    statements: frozenset[int]  # their first lines: who runs one of them runs the mutant; empty: everybody
    words: frozenset[str] = frozenset()  # of its statement, in small letters: a test that is called so comes first


COMPARISONS = {
    "==": "!=", "!=": "==", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
OPERATORS = {"-": "+", "//": "*", "%": "//", "<<": ">>", ">>": "<<", "|": "&", "&": "|", "^": "|"}
COMPARISON = re.compile(r"not\s+in\b|is\s+not\b|in\b|is\b|[=!<>]=|[<>]")
SPEAKING = re.compile(r"^(debug|info|warning|error|exception|critical|log|print|write|add_argument|\w*(Error|Fault))$")
SPOKEN = ("help", "description", "epilog", "metavar", "prog", "usage")


class Source:
    """The handler's text and its syntax tree."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.lines = [0]
        for line in text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.tree = ast.parse(text)
        self.dump = ast.dump(self.tree)
        self.parents: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node

    def start(self, node: Any) -> int:
        """Where a node begins, in bytes."""
        return int(self.lines[node.lineno - 1] + node.col_offset)

    def end(self, node: Any) -> int:
        """Where it ends."""
        return int(self.lines[node.end_lineno - 1] + node.end_col_offset)

    def of(self, node: ast.AST) -> str:
        """Its text."""
        return self.text[self.start(node) : self.end(node)].decode()

    def above(self, node: ast.AST) -> Iterator[ast.AST]:
        """The node and all that it is in, from the inside out."""
        here: ast.AST | None = node
        while here is not None:
            yield here
            here = self.parents.get(here)

    def mutants(self) -> list[Mutant]:
        """Every one that can be made, in the order of the text."""
        found = []
        for node in ast.walk(self.tree):
            if not self.left_alone(node):
                for kind, start, end, text in self.changes(node):
                    line = self.text.count(b"\n", 0, start) + 1
                    found.append(Mutant(kind, line, start, end, text, frozenset()))
        return sorted({mutant[2:5]: mutant for mutant in found}.values(), key=lambda mutant: mutant[2:5])

    def left_alone(self, node: ast.AST) -> bool:
        """Whether it is no code, or a text for people."""
        child = node
        for parent in self.above(node):
            # Before Python 3.12 nothing in an f-string knows its place.
            if isinstance(parent, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
                return True
            if isinstance(parent, ast.AnnAssign) and child is parent.annotation:
                return True
            if isinstance(parent, ast.arg) or (isinstance(parent, ast.FunctionDef) and child is parent.returns):
                return True
            child = parent
        return False

    def is_message(self, node: ast.AST) -> bool:
        """Whether a string is a text for people."""
        text = node.value if isinstance(node, ast.Constant) else ""
        several = isinstance(text, str) and len(text.split()) > 1
        for child, parent in zip(self.above(node), list(self.above(node))[1:]):
            if isinstance(parent, ast.Expr) or (isinstance(parent, ast.keyword) and parent.arg in SPOKEN):
                return True
            if isinstance(parent, ast.Call) and child is not parent.func:
                called = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
                if SPEAKING.match(called):
                    return True
                if called in ("match", "fullmatch", "search", "compile", "sub", "split", "findall", "finditer"):
                    return False
            if isinstance(parent, ast.Attribute) and parent.attr == "split":
                return False  # a list of words
            if isinstance(parent, ast.Compare):
                return False
            if isinstance(parent, ast.stmt):
                break
        return several

    def differs(self, mutant: Mutant) -> bool:
        """Whether it is Python, and another program."""
        try:
            return ast.dump(ast.parse(self.mutated(mutant))) != self.dump
        except (SyntaxError, ValueError):
            return False

    def mutated(self, mutant: Mutant) -> bytes:
        """The whole text with the change in it."""
        return self.text[: mutant.start] + mutant.text.encode() + self.text[mutant.end :]

    def changes(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        """What can be changed at a node: kind, start, end, text."""
        if isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators):
                yield from self.swap("comparison", left, right, COMPARISON, COMPARISONS)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:]):
                yield from self.swap("and, or", left, right, re.compile(r"\b(and|or)\b"), {"and": "or", "or": "and"})
        elif isinstance(node, ast.BinOp):
            yield from self.operator(node)
        elif isinstance(node, ast.AugAssign):
            gap = self.text[self.end(node.target) : self.start(node.value)].decode()
            yield "arithmetic", self.end(node.target), self.start(node.value), re.sub(r"\S+=", "=", gap, count=1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield "not", self.start(node), self.end(node), f"({self.of(node.operand)})"
        elif isinstance(node, ast.Return) and node.value is not None:
            yield "return", self.start(node.value), self.end(node.value), "None"
        elif isinstance(node, ast.Constant):
            yield from self.constant(node)
        else:
            yield from self.conditions(node)

    def conditions(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        """Never or always: the condition is still computed. A loop is not made endless."""
        tests = [node.test] if isinstance(node, (ast.If, ast.IfExp, ast.While)) else getattr(node, "ifs", [])
        for test in tests:
            start, end = self.start(test), self.end(test)
            yield "if", start, end, f"(({self.of(test)}) and False)"
            if not isinstance(node, ast.While):
                yield "if", start, end, f"(({self.of(test)}) or True)"

    def swap(
        self, kind: str, left: ast.expr, right: ast.expr, pattern: re.Pattern[str], others: dict[str, str]
    ) -> Iterator[tuple[str, int, int, str]]:
        """Another operator between two operands."""
        start, end = self.end(left), self.start(right)
        gap = self.text[start:end].decode()
        found = pattern.search(gap)
        if found:
            other = others[" ".join(found.group().split())]
            yield kind, start, end, f"{gap[: found.start()]}{other}{gap[found.end() :]}"

    def operator(self, node: ast.BinOp) -> Iterator[tuple[str, int, int, str]]:
        """Another operator; in place of `+`, `*` and `/`, which join texts, lists and paths, the left side alone."""
        if isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
            return
        start, end = self.end(node.left), self.start(node.right)
        gap = self.text[start:end].decode()
        found = re.search(r"//|<<|>>|\*\*|[-+*/%|&^]", gap)
        if found and found.group() in OPERATORS:
            yield "arithmetic", start, end, gap.replace(found.group(), OPERATORS[found.group()], 1)
        elif found:
            yield "arithmetic", self.start(node), self.end(node), f"({self.of(node.left)})"

    def constant(self, node: ast.Constant) -> Iterator[tuple[str, int, int, str]]:
        """Another value."""
        start, end, value = self.start(node), self.end(node), node.value
        if isinstance(value, bool):
            yield "constant", start, end, str(not value)
        elif isinstance(value, (int, float)):
            yield "constant", start, end, f"({self.of(node)} + 1)"
        elif isinstance(value, bytes):
            yield "text", start, end, f'(b"~" + {self.of(node)})'
        elif isinstance(value, str) and not self.is_message(node):
            yield "text", start, end, f'("~" + {self.of(node)})'

    # --- Who runs a mutant

    def with_statements(self, mutant: Mutant) -> Mutant:
        """The mutant, and the statements whose run counts as its own."""
        node: ast.AST = self.tree
        for candidate in ast.walk(self.tree):
            if hasattr(candidate, "lineno") and not isinstance(candidate, ast.Module):
                inside = self.start(candidate) <= mutant.start and mutant.end <= self.end(candidate)
                if inside and (node is self.tree or self.end(candidate) - self.start(candidate) <= self.size(node)):
                    node = candidate
        statement = next((above for above in self.above(node) if isinstance(above, ast.stmt)), node)
        text = self.of(statement).splitlines()[0] + self.text[mutant.start : mutant.end].decode()
        words = frozenset(word.lower() for word in re.findall("[A-Za-z]{4,}", text))
        return mutant._replace(statements=frozenset(self.runners(node)), words=words)

    def size(self, node: ast.AST) -> int:
        """How long its text is."""
        return self.end(node) - self.start(node)

    def runners(self, node: ast.AST) -> set[int]:
        """The statement in a function that holds the node; outside of functions all that use the name given there."""
        chain = list(self.above(node))
        for child, parent in zip(chain, chain[1:]):
            if isinstance(child, ast.stmt) and is_function(parent) and child in getattr(parent, "body", []):
                innermost = next(above for above in chain if isinstance(above, ast.stmt))
                return {innermost.lineno}
        return self.users([above for above in chain if isinstance(above, ast.stmt)])

    def users(self, statements: Sequence[ast.stmt]) -> set[int]:
        """The statements in functions that use what these define, and those in them."""
        names, seen, found = set(map(str, defined(statements))), set[str](), set[int]()
        for statement in statements:
            found |= set(statement_lines(statement))
        while names - seen:
            name = (names - seen).pop()
            seen.add(name)
            for node in ast.walk(self.tree):
                if name not in (getattr(node, "id", ""), getattr(node, "attr", "")):
                    continue
                if not isinstance(getattr(node, "ctx", None), ast.Load):
                    continue
                chain = [above for above in self.above(node) if isinstance(above, ast.stmt)]
                if any(map(is_function, chain[1:])):
                    found.add(chain[0].lineno)
                else:
                    names |= set(defined(chain))
                    found |= {line for above in chain if is_function(above) for line in statement_lines(above)}
        return found


def is_function(node: ast.AST) -> bool:
    """Whether it has statements that are run when it is called."""
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def defined(statements: Sequence[ast.stmt]) -> Iterator[str]:
    """The names that statements outside of functions define."""
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            yield statement.name
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        for target in filter(None, targets):
            yield from (node.id for node in ast.walk(target) if isinstance(node, ast.Name))


def statement_lines(node: ast.AST) -> Iterator[int]:
    """The first lines of the statements in the functions in a node."""
    for function in filter(is_function, ast.walk(node)):
        for inner in ast.walk(function):
            if isinstance(inner, ast.stmt) and inner is not function:
                yield inner.lineno


def draw(source: Source, seed: int, count: int) -> list[Mutant]:
    """Mutants of all kinds, in turns. Whether each is a program of its own takes too long to know of all."""
    generator = random.Random(seed)  # noqa: S311
    kinds: dict[str, list[Mutant]] = {}
    for mutant in source.mutants():
        kinds.setdefault(mutant.kind, []).append(mutant)
    for kind in sorted(kinds):
        generator.shuffle(kinds[kind])
    drawn: list[Mutant] = []
    while len(drawn) < count and any(kinds.values()):
        turn = [kinds[kind].pop() for kind in sorted(kinds) if kinds[kind]]
        drawn += [mutant for mutant in turn if source.differs(mutant)]
    return [source.with_statements(mutant) for mutant in drawn[:count]]


# --- The handler that notes what is run

NOTE = """
import os as _mutants_os
def _mutants_note(line, _seen=set(), _environ=_mutants_os.environ, _os=_mutants_os, _open=_mutants_os.open,
                  _write=_mutants_os.write, _close=_mutants_os.close, _pid=_mutants_os.getpid):
    test = _environ.get("PYTEST_CURRENT_TEST", "")
    if (test, line) not in _seen:
        _seen.add((test, line))
        try:
            file = _open(PLACE + str(_pid()), _os.O_WRONLY | _os.O_CREAT | _os.O_APPEND, 0o666)
            _write(file, ("%d %s\\n" % (line, test)).encode())
            _close(file)
        except Exception:
            pass
"""


class Noting(ast.NodeTransformer):
    """Puts a note before each statement of each function."""

    def __init__(self) -> None:
        self.depth = 0

    def visit(self, node: ast.AST) -> Any:
        """Depth first; only what is in a function gets notes."""
        self.depth += is_function(node)
        self.generic_visit(node)
        if self.depth:
            for name in ("body", "orelse", "finalbody"):
                body = getattr(node, name, None)
                if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                    setattr(node, name, noted(body, is_function(node)))
        self.depth -= is_function(node)
        return node


def noted(body: list[ast.stmt], whole: bool) -> list[ast.stmt]:
    """Statements with their notes; a docstring stays the first."""
    result: list[ast.stmt] = []
    for number, statement in enumerate(body):
        first = whole and number == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not first and not isinstance(statement, (ast.Global, ast.Nonlocal)):
            result.append(ast.parse(f"_mutants_note({statement.lineno})").body[0])
        result.append(statement)
    return result


def noting(text: bytes, place: str) -> str:
    """The handler, writing to files that begin with `place`."""
    tree = Noting().visit(ast.parse(text))
    first = [isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body].index(True) + 1
    tree.body[first:first] = ast.parse(NOTE.replace("PLACE", repr(place))).body
    return ast.unparse(ast.fix_missing_locations(tree))


# --- pytest's side: `-p mutants`


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep the tests that are wanted, in the order in which they are."""
    wanted = os.environ.get("MUTANTS_TESTS")
    if wanted:
        order = {name: number for number, name in enumerate(json.loads(Path(wanted).read_text()))}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])


def pytest_runtest_logstart(nodeid: str) -> None:
    """Tell when a test begins."""
    tell(test=nodeid, what="start")


def pytest_runtest_logreport(report: Any) -> None:
    """Tell how it went."""
    tell(test=report.nodeid, what=report.when, outcome=report.outcome, seconds=report.duration)


def tell(**event: Any) -> None:
    """Append a line to the record."""
    with open(os.environ["MUTANTS_RECORD"], "a") as record:
        record.write(json.dumps(event) + "\n")


# --- Trees and runs


RUNNING: set[subprocess.Popen[bytes]] = set()
STOPPED = threading.Event()


@contextlib.contextmanager
def stopping(pool: ThreadPoolExecutor) -> Iterator[None]:
    """After Ctrl-C nothing goes on, and nothing is begun."""
    try:
        yield
    except BaseException:
        STOPPED.set()
        pool.shutdown(wait=False, cancel_futures=True)
        for process in RUNNING.copy():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        raise


class Run(NamedTuple):
    """How some tests went."""

    seconds: dict[str, float]  # of those that passed
    failed: str  # the first that failed or hung; "" if all passed, or the time was up
    complete: bool
    output: str


class Tree:
    """A copy of the project in which one thing runs at a time."""

    def __init__(self, directory: Path, tests_of: str) -> None:
        self.root = directory / "tree"
        self.directory = directory
        if tests_of:
            self.root.mkdir(parents=True)
            with subprocess.Popen(["git", "-C", ROOT, "archive", tests_of], stdout=subprocess.PIPE) as archive:
                subprocess.run(["tar", "-x", "-C", self.root], stdin=archive.stdout, check=True)
        else:
            shutil.copytree(ROOT, self.root, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
        (self.root / ".cache").symlink_to(ROOT / ".cache")  # the tests' own
        (directory / "plugin").mkdir()
        shutil.copy(__file__, directory / "plugin" / "mutants.py")

    def write(self, text: bytes) -> None:
        """Another handler. What was compiled of the one before could pass for it."""
        (self.root / NAME).write_bytes(text)
        for compiled in self.root.glob(f"**/__pycache__/{Path(NAME).stem}.*"):
            compiled.unlink()

    def run(self, tests: Sequence[str], limits: dict[str, float], deadline: float, *options: str) -> Run:
        """Run tests, or a whole file; each has its limit, and all have the deadline."""
        if STOPPED.is_set():
            raise KeyboardInterrupt
        temporary = self.directory / "t"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        record, wanted = self.directory / "record", self.directory / "wanted"
        record.write_text("")
        wanted.write_text(json.dumps(tests))
        environment = {
            **os.environ,
            "MUTANTS_RECORD": str(record),
            "PYTHONPATH": str(self.directory / "plugin"),
            "TMPDIR": str(temporary),
        }
        if any("::" in test for test in tests):
            environment["MUTANTS_TESTS"] = str(wanted)
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        command = [*ISOLATED, sys.executable, "-m", "pytest", "-q", "-p", "mutants"]
        # A short path: the handler cuts long ones where it names them.
        command += ["-o", f"cache_dir={self.directory / 'cache'}", f"--basetemp={temporary / 'p'}"]
        with (self.directory / "output").open("w+") as output:
            process = subprocess.Popen(
                [*command, *options, *files],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            RUNNING.add(process)
            hangs = watch(process, record, limits, deadline)
            RUNNING.remove(process)
            return outcome(record, process.returncode, hangs, (self.directory / "output").read_text(errors="replace"))


def watch(process: subprocess.Popen[bytes], record: Path, limits: dict[str, float], deadline: float) -> str:
    """Wait for the end. Returns the test that took too long; "-" if all did."""
    running, since, read = "", time.monotonic(), 0
    try:
        while process.poll() is None:
            time.sleep(0.2)
            lines = record.read_text().splitlines()
            for event in map(json.loads, lines[read:]):
                running, since = (event["test"] if event["what"] != "teardown" else ""), time.monotonic()
            read = len(lines)
            if running and time.monotonic() > since + limits.get(running, 3600):
                return running
            if time.monotonic() > deadline:
                return "-"
        return ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def outcome(record: Path, code: int, hangs: str, output: str) -> Run:
    """What the record and the exit code say."""
    events = [json.loads(line) for line in record.read_text().splitlines()]
    failed = next((event["test"] for event in events if event.get("outcome") == "failed"), "")
    bad = {event["test"] for event in events if event.get("outcome") in ("failed", "skipped")}
    done = {event["test"] for event in events if event["what"] == "teardown"} - bad
    seconds = dict.fromkeys(done, 0.0)
    for event in events:
        if event["test"] in done:
            seconds[event["test"]] += event.get("seconds", 0)
    if not failed and hangs not in ("", "-"):
        failed = hangs
    if not failed and not hangs and code not in (0, 1, 5):
        failed = NOTHING_RUNS
    return Run(seconds, failed, not hangs, output)


def isolated() -> list[str]:
    """What a run is started with: in a process namespace of its own nothing of a mutant outlives it."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", '"$@"; exit $?', "run"]
    try:
        works = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        works = False
    return command if works else []


ISOLATED: list[str] = isolated() if __name__ == "__main__" else []


# --- Which tests run which statements


@dataclass
class Measured:
    """What is known of one test file."""

    seconds: dict[str, float] = field(default_factory=dict)  # of its tests that pass
    tests: dict[int, list[str]] = field(default_factory=dict)  # statement -> tests that run it
    all: list[int] = field(default_factory=list)  # statements that run for any of them: in a server, for instance


def measure(tree: Tree, file: str, handler: bytes, cached: Path) -> Measured:
    """Run a test file with the handler that notes, and what fails there with the true one."""
    if cached.exists():
        data = json.loads(cached.read_text())
        names = list(data["seconds"])
        tests = {int(line): [names[number] for number in numbers] for line, numbers in data["tests"].items()}
        return Measured(data["seconds"], tests, data["all"])
    notes = tree.directory / "notes"
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(mode=0o777)
    notes.chmod(0o777)  # some tests run the handler as another user
    tree.write(noting(handler, f"{notes}/").encode())
    first = tree.run([file], {}, time.monotonic() + 3600)
    if first.failed == NOTHING_RUNS:
        raise SystemExit(f"{file} cannot be run: {first.output[-2000:]}")
    events = [json.loads(line) for line in (tree.directory / "record").read_text().splitlines()]
    failed = sorted({event["test"] for event in events if event.get("outcome") == "failed"})
    tree.write(handler)
    again = tree.run(failed, {}, time.monotonic() + 3600).seconds if failed else {}
    result = Measured({**first.seconds, **again})
    everywhere, found = set(), dict[int, set[str]]()
    for note in notes.iterdir():
        for entry in note.read_text(errors="replace").splitlines():
            line, _, test = entry.partition(" ")
            name, _, phase = test.rpartition(" ")
            if phase not in ("(call)", "(teardown)"):
                everywhere.add(int(line))
            elif name in result.seconds:
                found.setdefault(int(line), set()).add(name)
    result.all, result.tests = sorted(everywhere), {line: sorted(names) for line, names in found.items()}
    temporary = cached.with_suffix(f".{threading.get_ident()}")
    numbers = {name: number for number, name in enumerate(result.seconds)}  # in place of the long names
    tests = {line: [numbers[name] for name in names] for line, names in result.tests.items()}
    temporary.write_text(json.dumps({**vars(result), "tests": tests}))
    temporary.replace(cached)
    lost = [name for name in failed if name not in again]
    more = f", not used because they fail: {' '.join(lost)}" if lost else ""
    say(f"measured {file}: {len(result.seconds)} tests{more}")
    return result


def suitable(mutant: Mutant, measured: dict[str, Measured]) -> list[str]:
    """The tests that run a mutant: those named like it, then a case of each before the others, the fast ones first."""
    seconds: dict[str, float] = {}
    for about in measured.values():
        everybody = not mutant.statements or mutant.statements & set(about.all)
        names = about.seconds if everybody else {n for line in mutant.statements for n in about.tests.get(line, [])}
        seconds.update({name: about.seconds[name] for name in names})
    ranks: dict[str, int] = {}
    order = []
    for name in sorted(seconds, key=lambda name: (seconds[name], name)):
        function = name.partition("[")[0]
        ranks[function] = ranks.get(function, -1) + 1
        alike = any(word in name.partition("::")[2].lower() for word in mutant.words)
        order.append((not alike, ranks[function], seconds[name], name))
    return [name for *_, name in sorted(order)]


# --- The verdicts


class Verdict(NamedTuple):
    """What became of a mutant."""

    number: int
    line: int
    change: str
    killed_by: str  # "" if it survived, or the time was up
    seconds: float
    tests: str  # how many were run of how many
    complete: bool = True  # else the time was up

    def outcome(self) -> str:
        """In words."""
        return self.killed_by or ("**survived**" if self.complete else "**open**: the time was up")


def judge(
    tree: Tree, number: int, mutant: Mutant, source: Source, measured: dict[str, Measured], limit: int
) -> Verdict:
    """Run the tests that suit a mutant until one fails, twice."""
    started, rest = time.monotonic(), suitable(mutant, measured)
    known = {name: seconds for about in measured.values() for name, seconds in about.seconds.items()}
    limits = {name: 3 * seconds + 40 for name, seconds in known.items()}
    count, passed, killer = len(rest), 0, ""
    tree.write(source.mutated(mutant))
    while rest and not killer and time.monotonic() < started + limit:
        batch = rest[:FIRST] if not passed else rest
        run = tree.run(batch, limits, started + limit, "-x")
        passed += len(run.seconds)
        if run.failed == NOTHING_RUNS:
            killer = run.failed
        elif run.failed:
            again = tree.run([run.failed], limits, time.monotonic() + 300, "-x")
            killer = run.failed if again.failed else ""
            rest = rest[rest.index(run.failed) + 1 :]
        else:
            rest = rest[len(batch) :] if run.complete else rest
    seconds = time.monotonic() - started
    tests = f"{passed + bool(killer)} of {count}" if count else "no test runs it"
    return Verdict(number, mutant.line, described(source, mutant), killer, seconds, tests, not rest or bool(killer))


def described(source: Source, mutant: Mutant) -> str:
    """`before -> after`, in one short line."""
    before = source.text[mutant.start : mutant.end].decode()
    return f"{mutant.kind}: {short(before)} -> {short(mutant.text)}"


def short(text: str) -> str:
    """A text on one line, cut in the middle."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:36]} ... {line[-20:]}"


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


def row(verdict: Verdict) -> str:
    """A line of the table."""
    change = verdict.change.replace("|", "\\|")
    killer = verdict.outcome().replace("|", "\\|")
    return f"| {verdict.number} | {verdict.line} | `{change}` | {killer} | {verdict.seconds:.0f} | {verdict.tests} |"


def digest(paths: Collection[Path]) -> str:
    """What a result depends on."""
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:12]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python3 tests --mutants", description="How much the tests notice.")
    parser.add_argument("--count", type=int, default=150, help="how many mutants (150)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (1)")
    parser.add_argument("--only", default="", metavar="N,N", help="of those only these numbers, once more")
    parser.add_argument("--files", nargs="*", default=[], metavar="FILE", help="the test files to run (all)")
    parser.add_argument("--tests-of", default="", metavar="COMMIT", help="take all but the handler from this commit")
    parser.add_argument("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="how many at a time")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one mutant (600)")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the results of the same command")
    return parser.parse_args()


def main() -> int:
    """Draw, measure, run, and print the table. 0 if all mutants were killed, else 1."""
    wanted = arguments()
    source = Source((ROOT / NAME).read_bytes())
    mutants = dict(enumerate(draw(source, wanted.seed, wanted.count), 1))
    if wanted.list:
        for number, mutant in mutants.items():
            say(f"{number:4} line {mutant.line:4}  {described(source, mutant)}")
        return 0
    work = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        work.chmod(0o755)  # some tests run the handler as another user
        trees = [Tree(work / str(number), wanted.tests_of) for number in range(wanted.jobs)]
        verdicts = run(wanted, source, mutants, trees)
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(work, ignore_errors=True)  # the tests' own directories may be anybody's
    for line in table(verdicts):
        say(line)
    killed = sum(bool(verdict.killed_by) for verdict in verdicts)
    opened = sum(not verdict.complete for verdict in verdicts)
    say(f"{len(verdicts)} mutants, {killed} killed, {len(verdicts) - killed - opened} survived, {opened} open")
    return int(killed < len(verdicts))


def run(wanted: argparse.Namespace, source: Source, mutants: dict[int, Mutant], trees: list[Tree]) -> list[Verdict]:
    """Measure, then judge every mutant; what is known already is not done again."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tests = trees[0].root / "tests"
    chosen = {Path(file).name for file in wanted.files}
    every = {path for path in tests.rglob("test_*.py") if path.parent.name not in SEPARATE}
    files = sorted(path for path in every if not chosen or path.name in chosen)
    shared = {*tests.glob("*.py"), *(trees[0].root / "examples").glob("*.py")} - every
    shared -= {tests / "mutants.py"}
    common = f"{digest([ROOT / NAME, *shared])}-{os.environ.get('CMP_TEST_OPENSSL', '')}"
    free = trees.copy()

    def measured(path: Path) -> Measured:
        file = path.relative_to(trees[0].root).as_posix()
        key = hashlib.sha256(f"{common}-{file}-{digest([path])}".encode()).hexdigest()[:12]
        tree = free.pop()
        try:
            return measure(tree, file, source.text, CACHE / f"{path.stem}-{key}.json")
        finally:
            free.append(tree)

    with ThreadPoolExecutor(len(trees)) as pool, stopping(pool):
        about = dict(zip([path.name for path in files], pool.map(measured, files)))

        results = CACHE / f"results-{wanted.seed}-{digest([ROOT / NAME, *shared, *files])}.jsonl"
        if wanted.fresh:
            results.unlink(missing_ok=True)
        lines = results.read_text().splitlines() if results.exists() else []
        done = {verdict.number: verdict for verdict in (Verdict(**json.loads(line)) for line in lines)}
        only = {int(number) for number in wanted.only.split(",") if number}

        def judged(number: int) -> Verdict:
            if number in done and number not in only:
                return done[number]
            tree = free.pop()
            try:
                verdict = judge(tree, number, mutants[number], source, about, wanted.limit)
            finally:
                free.append(tree)
            with results.open("a") as file:
                file.write(json.dumps(verdict._asdict()) + "\n")
            say(row(verdict))
            return verdict

        return list(pool.map(judged, sorted(only & set(mutants) or mutants)))


def table(verdicts: list[Verdict]) -> Iterator[str]:
    """All verdicts, those that survived last."""
    yield ""
    yield "| mutant | line | change | killed by | seconds | tests |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield from map(row, sorted(verdicts, key=lambda verdict: (not verdict.killed_by, verdict.number)))
    yield ""


if __name__ == "__main__":
    sys.exit(main())
