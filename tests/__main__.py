"""Set up what the tests need, then run them.

    python3 tests                       all of them, on all cores
    python3 tests -x -k chain           arguments go to pytest
    python3 tests --servers             the tests with other makers' CMP servers, tests/servers, instead
    python3 tests --clients             the tests with the package registries' ACME clients, tests/clients, instead
    python3 tests --docker              acme2certifier in a Docker container; further arguments go to pytest
    python3 tests --lint                ruff and mypy instead of the tests
    python3 tests --cluster             two hosts with one cmp_tmp_dir, in namespaces; further arguments go to pytest
    python3 tests --windows             the handler in a Python for Windows, by wine; further arguments go to pytest
    python3 tests --mutants             how much the tests notice: see tests/mutants.py, or add --help

Works from any directory, as any user. The packages of the extra `test` in pyproject.toml go into
`.venv-tests`, the OpenSSL binaries that the machine has not got into `.cache`; both are made once, and later
runs find them. What will be fetched and what the machine lacks is said before anything is made.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cluster
import docker_image
import openssl_versions
import programs
import windows
from openssl_versions import CACHE, Missing, locked, run

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-tests"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "made-from"

VENV_MEGABYTES = 200
CORE_MINUTES = 8  # that all the tests take
IN_CI = os.environ.get("CI") == "true"  # where nothing may be left out

LINTERS = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])


def main(arguments: list[str]) -> int:
    """Run pytest with `arguments`, or the linters, and return their exit code; 2 if something is missing."""
    if sys.stdin is None:
        # Closed by the caller: without this the next file opened would be every process's standard input.
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    try:
        if arguments == ["--lint"]:
            announce(fetched_packages(), missing_venv(), {})
            make_venv()
            return lint()
        if arguments[:1] == ["--servers"]:
            arguments = prepare_servers(arguments[1:])
        elif arguments[:1] == ["--clients"]:
            arguments = prepare_clients(arguments[1:])
        elif arguments[:1] == ["--cluster"]:
            arguments = prepare_cluster(arguments[1:])
        elif arguments[:1] == ["--windows"]:
            arguments = prepare_windows(arguments[1:])
        elif arguments[:1] == ["--docker"]:
            arguments = prepare_docker(arguments[1:])
        elif arguments[:1] == ["--mutants"]:
            announce(fetched_packages(), missing_venv(), {})
            make_venv()
            name_other_openssl()
            os.execv(PYTHON, [str(PYTHON), str(ROOT / "tests" / "mutants.py"), *arguments[1:]])
        else:
            announce_tests(arguments)
            make_venv()
            name_other_openssl()
    except Missing as missing:
        print(f"python3 tests: {missing}", file=sys.stderr)
        return 2
    return run_pytest(arguments)


def prepare_servers(arguments: list[str]) -> list[str]:
    """Fetch other makers' CMP servers, and give pytest's arguments for the tests with them."""
    from servers import fetch  # only here: it is no part of the other runs

    plans, needed = fetch.announcement()
    announce([*fetched_packages(), *plans], {**missing_venv(), **needed}, {})
    make_venv()
    name_other_openssl()
    fetch.prepare()
    return ["tests/servers", "--numprocesses=3", "--dist=loadfile", *arguments]


def prepare_clients(arguments: list[str]) -> list[str]:
    """Fetch the ACME clients that can be had, and give pytest's arguments for the tests with them."""
    from clients import fetch  # only here: it is no part of the other runs

    plans, optional = fetch.announcement()
    announce([*fetched_packages(), *plans], missing_venv(), optional)
    make_venv()
    failures = fetch.prepare()
    if failures and IN_CI:
        raise Missing("; ".join(failures))
    for failure in failures:
        print(f"python3 tests: not tested here: {failure}", file=sys.stderr)
    return ["tests/clients", "--numprocesses=4", "--dist=load", *arguments]


def announce_tests(arguments: list[str]) -> None:
    """Say what this run fetches, how long it takes and what is missing. Raises Missing."""
    plans, needed = fetched_packages(), missing_venv()
    try:
        run(["openssl", "cmp", "-help"])  # the first one on PATH is what most tests run
        others = [] if "CMP_TEST_OPENSSL" in os.environ else openssl_versions.missing()
    except Missing:
        needed["openssl 3.0 or later, with its `cmp` command"], others = "openssl", []
    optional = programs.missing()
    if others:
        versions = ", ".join(openssl_versions.SUITES[suite] for suite in others)
        size = len(others) * openssl_versions.MEGABYTES
        plans.append(f"fetches OpenSSL {versions} from Debian's archive into .cache, {size} MB, once")
        optional.update({name: name for name in ("apt-get", "dpkg-deb") if not shutil.which(name)})
    if not arguments:
        cores = os.cpu_count() or 1
        plans.append(f"runs every test, about {max(1, round(CORE_MINUTES / cores))} minutes on {cores} cores")
    announce(plans, needed, optional)


def announce(plans: list[str], needed: dict[str, str], optional: dict[str, str]) -> None:
    """Print the plans, and what is missing with its Debian packages. Raises Missing if that is `needed`."""
    for plan in plans if not needed else []:
        print(f"python3 tests: {plan}", file=sys.stderr)
    some = f"for some tests {', '.join(optional)}" if optional else ""
    packages = " ".join(dict.fromkeys([*needed.values(), *optional.values()]))
    text = f"missing: {'; '.join(filter(None, [', '.join(needed), some]))} (on Debian: apt-get install {packages})"
    if needed or (IN_CI and optional):
        raise Missing(text)
    if optional:
        print(f"python3 tests: {text}; these are skipped", file=sys.stderr)


def missing_venv() -> dict[str, str]:
    """What this Python lacks to make the virtual environment, where that is to be made -> Debian package."""
    if made_from() == made_of() or all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        return {}
    return {"venv and ensurepip of this Python": "python3-venv"}


def fetched_packages() -> list[str]:
    """What is fetched from PyPI, in words; nothing if all is there."""
    count = len(requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    plan = f"fetches {count} packages and what they need from PyPI into {VENV.name}, {VENV_MEGABYTES} MB, once"
    return [] if made_from() == made_of() else [plan]


def make_venv() -> None:
    """Make the virtual environment, unless it is there and was made from the same list by the same Python.

    The project itself is not installed: the tests load its file by path, as the host does.
    """
    key = made_of()
    try:
        if made_from() == key:
            return
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE.parent / "venv.lock"):
            if made_from() != key:
                fill_venv(requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
                STAMP.write_text(key)
    except OSError as error:
        raise Missing(f"the virtual environment for the tests: {error}") from error


def made_of() -> str:
    """What the virtual environment is to be made from: the list, and this Python."""
    packages = requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return f"{' '.join(packages)} {sys.base_prefix} {sys.version}"


def made_from() -> str:
    """What the virtual environment was made from; nothing if it was not completed, or its Python is gone."""
    return STAMP.read_text() if STAMP.exists() and PYTHON.exists() else ""


def requirements(pyproject: str) -> list[str]:
    """The extra `test`. Python 3.9 and 3.10 read no TOML, but a TOML list of strings is a Python list too."""
    extra = re.search(r"^test = (\[.*?^\])", pyproject, re.MULTILINE | re.DOTALL)
    if not extra:
        raise Missing("the extra `test` in pyproject.toml")
    packages: list[str] = ast.literal_eval(extra.group(1))
    return packages


def fill_venv(packages: list[str]) -> None:
    """Make it anew, with `packages`."""
    run([sys.executable, "-m", "venv", "--clear", str(VENV)])
    try:
        # -I: neither PYTHONPATH nor the user's own packages have a part in it.
        run([str(PYTHON), "-I", "-m", "pip", "install", "--quiet", "--no-input", *packages])
    except Missing as error:
        raise Missing(f"the test packages cannot be had from PyPI: {error}") from error


def name_other_openssl() -> None:
    """Set CMP_TEST_OPENSSL to the other binaries' paths, written as PATH is, unless the caller has set it."""
    if "CMP_TEST_OPENSSL" in os.environ:
        return
    paths, failures = openssl_versions.other_openssl()
    os.environ["CMP_TEST_OPENSSL"] = os.pathsep.join(map(str, paths))
    if failures and IN_CI:
        raise Missing("; ".join(failures))
    for failure in failures:
        print(f"python3 tests: not tested here: {failure}", file=sys.stderr)


def lint() -> int:
    """Run every linter, also after one that found something."""
    codes = [subprocess.run([PYTHON, "-m", *command], cwd=ROOT).returncode for command in LINTERS]
    return max(map(abs, codes))


def prepare_windows(arguments: list[str]) -> list[str]:
    """Make what the tests with wine need, and say how to run them. Raises Missing."""
    announce([*fetched_packages(), *windows.plans()], {**missing_venv(), **windows.missing()}, {})
    make_venv()
    windows.make()
    return [str(windows.CASES), *arguments]


def prepare_cluster(arguments: list[str]) -> list[str]:
    """Make what the tests with several hosts need, and say how to run them. Raises Missing."""
    if cluster.hindrance():  # the tests are skipped, and say why
        announce(fetched_packages(), missing_venv(), {})
        make_venv()
    else:
        announce([*fetched_packages(), *cluster.plans()], {**missing_venv(), **cluster.missing()}, {})
        make_venv()
        cluster.make()
    return [str(cluster.CASES), *arguments]


def prepare_docker(arguments: list[str]) -> list[str]:
    """Make what the tests in a container need, and say how to run them. Raises Missing, with why no daemon can run."""
    docker_image.needs_root()
    announce([*fetched_packages(), *docker_image.plans()], {**missing_venv(), **docker_image.missing()}, {})
    make_venv()
    docker_image.make()
    return [str(docker_image.CASES), *arguments]


def run_pytest(arguments: list[str]) -> int:
    """Become pytest: exit code, Ctrl-C and the last line are its own.

    It runs in ROOT, where its settings are. Tests use free ports and directories of their own, so they may
    run side by side; those that may not carry `pytest.mark.xdist_group`.
    """
    workers = 4 * (os.cpu_count() or 1)  # most of the time they wait for a time-out
    given = [from_root(argument) for argument in arguments] or [f"--numprocesses={workers}", "--dist=loadgroup"]
    os.chdir(ROOT)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the same modules
    os.execv(PYTHON, [str(PYTHON), "-m", "pytest", *given])


def from_root(argument: str) -> str:
    """A test file that the caller names, as seen from where pytest runs."""
    path, separator, test = argument.partition("::")
    if argument.startswith("-") or Path.cwd() == ROOT or not Path(path).exists():
        return argument
    return str(Path(path).resolve()) + separator + test


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
