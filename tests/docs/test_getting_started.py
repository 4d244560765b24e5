"""docs/getting-started.md by the letter: each of its commands is typed, in its order, and prints what is shown."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import free_port
from host import ROOT

pytestmark = pytest.mark.e2e
PAGE = ROOT / "docs" / "getting-started.md"
# The environment that the tests run in has what these install.
INSTALLING = ("git clone", "cd cmp_ca_handler", "python3 -m venv", ".venv/bin/pip install")
# What does not end runs in the background, until somebody listens on its port.
SERVERS = {"demo_ca.py demo-ca": "8080", "serve_forever()": "8000"}
LISTENS = """\
listens() { until (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; do kill -0 $! || exit 1; sleep 0.1; done; }
trap 'kill $(jobs -p)' EXIT
"""
# What each run prints differently, and the words of other releases of openssl: all that is not compared.
VARYING = {
    r"^\w+:\S*apps/cmp\.c:\d+:": "",
    r"OpenSSL \d\S* \d+ \w+ \d{4}": "OpenSSL",
    r"\b[0-9A-Fa-f]{28,40}\b": "NUMBER",
    r"\b\d{4}-\d\d-\d\d(T[\d:]+Z)?|\b\w{3} +\d+ [\d:]{8} \d{4} GMT": "DATE",
    r"seconds=[\d.]+": "seconds",
    r"profiles: (yes|no)": "profiles",
    r"[Rr]eceived 1 (newly )?enrolled": "received 1 enrolled",
    r" = ": "=",
    r" +$": "",
}


def commands(block: str) -> Iterator[tuple[str, str]]:
    """What the reader types, to the end of a continued line or of a quotation, and what it prints."""
    typed, complete, printed = "", False, ""
    for line in block[block.index("$ ") :].splitlines(keepends=True):  # "# " before it is a command for root
        if complete and line.startswith("$ "):
            yield typed, printed
            typed, complete, printed = "", False, ""
        if complete:
            printed += line
            continue
        typed += line if typed else line[2:]
        try:
            shlex.split(typed)
        except ValueError:  # a quotation goes on
            continue
        complete = not typed.endswith("\\\n")
    yield typed, printed


def steps(page: str) -> Iterator[tuple[str, str]]:
    """What is to be typed, and what it prints; files are written as the page shows them."""
    named = {"ini": "acme_srv.cfg", "sh": "command.sh"}
    for kind, block in re.findall(r"^```(console|ini|sh)\n(.+?)^```", page, re.M | re.S):
        if kind == "console":
            yield from (step for step in commands(block) if not step[0].startswith(INSTALLING))
        else:
            yield f"cat >{named[kind]} <<'END'\n{block}END\n", ""


def same_everywhere(text: str) -> str:
    """Without what differs from run to run."""
    for pattern, common in VARYING.items():
        text = re.sub(pattern, common, text, flags=re.M)
    return text


def shown(printed: str) -> str:
    """What the page shows, as a pattern: a line of three dots is any number of lines."""
    lines = same_everywhere(printed).splitlines(keepends=True)
    return "".join("(?:.*\n)*?" if line == "...\n" else re.escape(line) for line in lines)


def test_every_command_prints_what_the_page_shows(tmp_path: Path) -> None:
    """Whole outputs, in order; with other ports than the page's, which another program may have."""
    page = PAGE.read_text(encoding="utf-8")
    typed, ports = list(steps(page)), {port: str(free_port()) for port in SERVERS.values()}
    script = [LISTENS, "mkdir printed"]
    for number, (command, _) in enumerate(typed):
        here = "".join(port for words, port in SERVERS.items() if words in command)
        for port, free in ports.items():
            command = re.sub(rf"\b{port}\b", free, command)
        command = command.replace("demo_ca.py demo-ca", f"demo_ca.py demo-ca --port {ports['8080']}")
        if here:  # not in braces: bash would put a process between
            script.append(f"{command.strip()} >printed/{number} 2>&1 &\nlistens {ports[here]}")
        else:
            script.append(f"{{ {command}}} >printed/{number} 2>&1")
    shutil.copy(ROOT / "cmp_ca_handler.py", tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    printed = []
    for path in sorted((tmp_path / "printed").iterdir(), key=lambda path: int(path.name)):
        text = path.read_text(encoding="utf-8").replace(str(tmp_path), "...")
        for port, free in ports.items():
            text = text.replace(free, port)
        printed.append(same_everywhere(text))
    assert run.returncode == 0, run.stdout + printed[-1]
    for (command, text), output in zip(typed, printed):
        server = any(words in command for words in SERVERS)  # it goes on
        matches = re.match if server else re.fullmatch
        assert matches(shown(text), output), f"$ {command}{output}\nthe page shows:\n{same_everywhere(text)}"
    (log,) = re.findall(r"^```text\n(.+?)^```", page, re.M | re.S)
    assert same_everywhere(log) in printed[next(n for n, step in enumerate(typed) if "serve_forever()" in step[0])]
    assert list((tmp_path / "cmp-transactions").iterdir()) == []
