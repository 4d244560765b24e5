"""Try the README's two commands on a fresh machine: a chroot of a Debian release, with a clean clone.

    python3 tests/fresh_machine.py bookworm trixie            both commands, as root and as an ordinary user
    python3 tests/fresh_machine.py --with lego trixie         with more packages; `--with all`: those of packages.txt
    python3 tests/fresh_machine.py --without python3-venv trixie

Runs what is committed, and takes as long as the tests do, for each release and user. Needs root, debootstrap and
a network. Mounts and processes live in namespaces of their own: however this ends, none is left. What the commands
print is kept in `.cache/fresh`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import programs
from openssl_versions import CACHE, Missing, archives

ROOT = Path(__file__).resolve().parent.parent
LOGS = CACHE.parent / "fresh"
BARE = ("python3", "python3-venv", "openssl", "git", "ca-certificates")  # what the README asks for
COMMANDS = ("python3 examples/demo.py", "python3 tests")
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
# Mounts and processes of its own; they end with the first process, and that ends with us.
NAMESPACES = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL")
# What a machine has and a chroot lacks, a file system as its root among it. bash stays, to wait for orphans.
INSIDE = """\
set -e
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --rbind /sys "$1/sys"
set +e
"$4" --userspec="$2" "$1" bash -c "$3"
exit $?
"""


def main() -> int:
    """Run it; the exit code is 1 if a command failed, 2 if something is missing."""
    parser = argparse.ArgumentParser(description="Try both commands of the README in a chroot of a Debian release.")
    parser.add_argument("suites", nargs="+", metavar="SUITE", help="a release of Debian, such as trixie")
    parser.add_argument("--with", action="append", default=[], dest="more", metavar="PACKAGE", help="install this, too")
    parser.add_argument("--without", action="append", default=[], metavar="PACKAGE", help="leave this out")
    parser.add_argument("--user", choices=("root", "user"), help="only as root, or only as an ordinary user")
    args = parser.parse_args()
    lacking = [name for name in ("debootstrap", "unshare", "setpriv", "git") if not shutil.which(name)]
    if os.geteuid() != 0 or lacking:
        print(f"fresh_machine.py: needs root, and {', '.join(lacking) or 'nothing else'}", file=sys.stderr)
        return 2
    more = sorted(set(programs.packages().values()) if "all" in args.more else set(args.more))
    bare = [name for name in BARE if name not in args.without]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the directory is deleted
    LOGS.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    try:
        for suite in args.suites:
            lines += try_suite(suite, bare, more, [args.user] if args.user else ["root", "user"])
    except Missing as missing:
        print(f"fresh_machine.py: {missing}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return int(any(": exit code 0" not in line for line in lines))


def try_suite(suite: str, bare: Iterable[str], more: Sequence[str], users: Iterable[str]) -> list[str]:
    """Make the machine, run both commands as each of the users, and delete it: a line for each command."""
    directory = tempfile.mkdtemp(prefix=f"fresh-{suite}-", dir="/var/tmp")
    root = Path(directory, "root")  # with the usual mode
    root.mkdir()
    try:
        note(f"{suite}: debootstrap")
        make_machine(suite, root, bare)
        if more:
            install(suite, root, more)
        return [line for user in users for command in COMMANDS for line in [try_command(suite, root, user, command)]]
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", directory], check=False)


def make_machine(suite: str, root: Path, packages: Iterable[str]) -> None:
    """Debian's minimum and `packages`, a network as here, an ordinary user, and a clone for each user."""
    command = [*NAMESPACES, "debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, str(root)]
    with (LOGS / f"{suite}-debootstrap.log").open("wb") as log:
        if subprocess.run([*command, archives()[0]], stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode:
            raise Missing(f"debootstrap failed, see {log.name}")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    settings = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    reach = re.findall(r"(?im)^Acquire::.*(?:proxy|check|verify|cainfo|timeout).*$", settings)  # a proxy, for instance
    (root / "etc/apt/apt.conf.d/00machine").write_text("\n".join([*reach, ""]))
    if Path("/", CERTIFICATES).exists():  # a proxy's own authority, for instance
        shutil.copy(Path("/", CERTIFICATES), root / CERTIFICATES)
    subprocess.run(["chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", "user"], check=True)
    for home, user in (("root", "root"), ("home/user", "user")):
        clone = root / home / "cmp_ca_handler"
        subprocess.run(["git", "clone", "--quiet", "--no-local", ROOT, clone], check=True)
        subprocess.run(["chroot", root, "chown", "-R", f"{user}:", f"/{home}/cmp_ca_handler"], check=True)


def install(suite: str, root: Path, packages: Sequence[str]) -> None:
    """More packages, by apt: debootstrap cannot install all that these need. No service is started."""
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    command = f"apt-get -q update && apt-get -q install --yes --no-install-recommends {' '.join(packages)}"
    log = LOGS / f"{suite}-apt-get.log"
    note(f"{suite}: apt-get install {' '.join(packages)}")
    if run_inside(root, "root", command, log, {"DEBIAN_FRONTEND": "noninteractive"}):
        raise Missing(f"apt-get failed, see {log}")


def run_inside(root: Path, user: str, command: str, log: Path, more: Mapping[str, str]) -> int:
    """Run a shell's command in the chroot as a user; the exit code."""
    inside = [*NAMESPACES, "bash", "-c", INSIDE, "bash", str(root), f"{user}:", command]
    inside.append(shutil.which("chroot") or "chroot")
    environment = {"PATH": search_path(user), **network(os.environ), **more}
    with log.open("wb") as output:
        return subprocess.run(
            inside, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ).returncode


def try_command(suite: str, root: Path, user: str, command: str) -> str:
    """Run one command in the clone of `user`: how it ended, in a line."""
    home = "/root" if user == "root" else f"/home/{user}"
    path = LOGS / f"{suite}-{user}-{command.split()[1].replace('/', '-')}.log"
    started = time.monotonic()
    inside = f"cd {home}/cmp_ca_handler && exec {command}"
    code = run_inside(root, user, inside, path, {"HOME": home, "USER": user, "LOGNAME": user})
    said = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(errors="replace")).strip().splitlines()
    line = f"{suite}, {user}, {command}: exit code {code}, {time.monotonic() - started:.0f} s: "
    line += said[-1].strip("= ") if said else "(nothing printed)"
    note(line)
    return line


def search_path(user: str) -> str:
    """PATH as Debian sets it."""
    return "/usr/local/bin:/usr/bin:/bin" + (":/usr/local/sbin:/usr/sbin:/sbin" if user == "root" else "")


def network(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the environment programs need to reach the network from here."""
    wanted = re.compile(r"(?i)(https?|all|no)_proxy|PIP_(CERT|INDEX_URL|DEFAULT_TIMEOUT)|SSL_CERT_FILE")
    return {name: value for name, value in environment.items() if wanted.fullmatch(name)}


def note(text: str) -> None:
    """What happens now, for whoever waits."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
