"""The handler works in acme2certifier up to 0.44: helper `acme_srv.helper`, handler `acme_srv/ca_handler.py`.

None of these releases is on PyPI. So this is a stand-in: a package `acme_srv` with as much of the helper's documented
functions as each test says, in a process that cannot import acme2certifier. The real ones, 0.17 to 0.43.1, were taken
from their tags and run by hand on 25 November 2026: docs/compatibility.md says how, and which ways of loading worked.

0.45 is on PyPI, and has tests with the real one: here and in test_profiles.py.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import OPENSSL, as_host, bundle_certificates, csr_pem, needs
from demo_ca import DemoCA
from host import HANDLER, Host, pinned, write_configuration
from shared import LOAD_CONFIG

# What later releases added, one after the other.
OPTIONAL = {
    "config_eab_profile_load": """
def config_eab_profile_load(logger, config_dic):
    return False, None
""",
    "config_headerinfo_load": """
def config_headerinfo_load(logger, config_dic):
    return None
""",
    "config_profile_load": """
def config_profile_load(logger, config_dic):
    return {}
""",
    "eab_profile_header_info_check": """
def eab_profile_header_info_check(logger, cahandler, csr, handler_hifield="profile_name"):
    return None
""",
    "eab_profile_revocation_check": """
def eab_profile_revocation_check(logger, cahandler, certificate_raw):
    return None
""",
}
# What the old host does for an order, and for a revocation.
DRIVER = """
import importlib, json, logging, sys
sys.path.insert(0, sys.argv[1])
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
module = importlib.import_module("acme_srv.ca_handler")
csr = sys.stdin.read()
with module.CAhandler(False, logging.getLogger("acme2certifier")) as handler:
    check = handler.handler_check()
    enrolled = handler.enroll(csr)
with module.CAhandler(False, logging.getLogger("acme2certifier")) as handler:
    revoked = handler.revoke(enrolled[2], "unspecified", "2026-01-01T00:00:00Z") if enrolled[2] else None
new = [name for name in sys.modules if name.startswith("acme2certifier")]
print(json.dumps({"check": check, "enrolled": enrolled, "revoked": revoked, "new": new}))
"""


def in_old_host(tmp_path: Path, helper: str, section: dict[str, str]) -> dict[str, Any]:
    """Enrol and revoke in the stand-in's own process."""
    package = tmp_path / "host" / "acme_srv"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "helper.py").write_text(helper)
    shutil.copy(HANDLER, package / "ca_handler.py")
    work = {"cmp_openssl_bin": OPENSSL, "cmp_tmp_dir": str(tmp_path / "work")}
    write_configuration(package / "acme_srv.cfg", {"CAhandler": {**work, **section}})
    environment = {key: value for key, value in os.environ.items() if key != "ACME_SRV_CONFIGFILE"}
    result = subprocess.run(
        # -I -S: neither PYTHONPATH nor the packages that are installed beside the tests
        [sys.executable, "-I", "-S", "-B", "-c", DRIVER, str(tmp_path / "host")],
        input=as_host(csr_pem(["old.example"])),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout)
    answer["log"] = result.stderr
    return answer


SUBSETS = [[], *([name] for name in OPTIONAL), list(OPTIONAL)]


@pytest.mark.parametrize("functions", SUBSETS, ids=lambda names: "all" if len(names) > 1 else "-".join(names) or "none")
def test_only_load_config_is_needed(functions: list[str], ca: DemoCA, tmp_path: Path) -> None:
    """Every other function may be there or not, in any combination."""
    helper = LOAD_CONFIG + "".join(OPTIONAL[name] for name in functions)
    answer = in_old_host(tmp_path, helper, ca.options())
    assert answer["new"] == [], "acme2certifier 0.45 or later had a part in this"
    assert answer["check"] is None
    error, bundle, certificate, identifier = answer["enrolled"]
    assert (error, identifier) == (None, None), answer["log"]
    assert certificate and len(bundle_certificates(bundle)) == 3
    assert answer["revoked"] == [200, None, None], answer["log"]
    assert os.listdir(tmp_path / "work") == []


def test_error_is_the_hosts_to_tell(ca: DemoCA, tmp_path: Path) -> None:
    """An old host that says no by its profile check is obeyed."""
    helper = LOAD_CONFIG + OPTIONAL["eab_profile_header_info_check"].replace("return None", "return 'not for you'")
    answer = in_old_host(tmp_path, helper, ca.options())
    assert answer["enrolled"] == ["not for you", None, None, None]
    assert ca.messages == []


@pytest.mark.parametrize("version", [(3, 8, 10), (3, 8, 18)], ids=str)
def test_old_python_is_named(version: tuple[int, ...], tmp_path: Path) -> None:
    """The host logs an exception's text, so that is what tells. The older Python is a pretended one here."""
    load = "import runpy, sys; sys.version_info = {0}; sys.version = '{1} (main)'; runpy.run_path({2!r})"
    text = load.format(version, ".".join(map(str, version)), str(HANDLER))
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    last = f"ImportError: cmp_ca_handler needs Python 3.9 or later, this is {'.'.join(map(str, version))}"
    assert result.stderr.splitlines()[-1] == last


def test_old_python_can_read_the_file() -> None:
    """As far as that line: no later syntax may stand anywhere in the file."""
    ast.parse(HANDLER.read_text(encoding="utf-8"), feature_version=(3, 8))


@needs("lego")
@pytest.mark.e2e
def test_sections_of_several_cas_are_of_later_releases(make_ca: Callable[..., DemoCA], tmp_path: Path) -> None:
    """0.45 does not know them, so one CA gets all orders: its [CAhandler], whatever else is configured."""
    plain, north = make_ca(), make_ca()
    several = {"multi_handler": "True", "default_handler": "north"}
    sections = {"CAhandler:north": {"handler_module": str(HANDLER), **north.options()}}
    section = {"handler_module": str(HANDLER), **several, **plain.options()}
    with Host(tmp_path, section, sections, python=pinned("0.45")) as host:
        ordered = host.lego("a.example.com")
        assert ordered.returncode == 0, ordered.stdout + host.log()
    assert plain.messages and not north.messages
