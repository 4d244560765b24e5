"""docs/getting-started.md by the letter: each of its commands is typed, in its order."""

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


def commands(block: str) -> Iterator[str]:
    """What the reader types: behind "$ ", up to the end of a continued line or of a quotation."""
    typed = ""
    for line in block.splitlines():
        if not typed and not line.startswith("$ "):
            continue
        typed += line + "\n" if typed else line[2:] + "\n"
        try:
            shlex.split(typed)
        except ValueError:  # a quotation goes on
            continue
        if not typed.endswith("\\\n"):
            yield typed.strip()
            typed = ""


def script(page: str) -> str:
    """All of the page, for bash."""
    (configuration,) = re.findall(r"^```ini\n(.+?)^```", page, re.M | re.S)
    lines = [LISTENS]
    for section in page.split("\n## "):
        for block in re.findall(r"^```console\n(.+?)^```", section, re.M | re.S):
            for command in commands(block):
                if command.startswith(INSTALLING):
                    continue
                (port,) = [port for words, port in SERVERS.items() if words in command] or [""]
                lines += [f"echo {shlex.quote('$ ' + command)}", f"{command} &\nlistens {port}" if port else command]
        if configuration in section:
            lines.append(f"cat >acme_srv.cfg <<'END'\n{configuration}END")
    return "\n".join(lines)


def test_every_command_works(tmp_path: Path) -> None:
    """With other ports than the page's, which another program may have."""
    typed = script(PAGE.read_text(encoding="utf-8"))
    assert all(typed.count(word) for word in ("convert", "check", "enroll", "certonly", "renew", "revoke", *SERVERS))
    for port in SERVERS.values():
        typed = re.sub(rf"\b{port}\b", str(free_port()), typed)
    typed = typed.replace(
        "demo_ca.py demo-ca", f"demo_ca.py demo-ca --port {re.findall(r'listens ([0-9]+)', typed)[0]}"
    )
    shutil.copy(ROOT / "cmp_ca_handler.py", tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", typed],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    for said in (
        "proven: address: yes, path: yes, trust: yes, credentials: yes",
        "no errors found",
        "bundle.pem: OK",
        "WSGI database update completed successfully.",
        "Successfully received certificate.",
        "cert.pem: OK",
        "Congratulations, all renewals succeeded",
        "Congratulations! You have successfully revoked the certificate",
        "Superseded",
    ):
        assert said in run.stdout, said
    assert list((tmp_path / "cmp-transactions").iterdir()) == []
