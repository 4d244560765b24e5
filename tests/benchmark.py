"""What an enrolment costs, against what it cannot cost less than.

    python3 tests/benchmark.py              some minutes; prints a table, rewrites docs/benchmark.md and .svg
    python3 tests/benchmark.py --rounds 30 --dry    a short one that only prints

`enroll()` has to run two processes: `openssl req`, which verifies the CSR's signature and extracts its key, and
`openssl cmp`. They are run bare, in the cheapest way that Python has, beside it: the three contenders take turns
within each round, so that whatever else the machine does hits all of them. The third one is the CMP handler that
acme2certifier ships. The CA is OpenSSL's own mock server, which costs less than any other; it serves one
transaction at a time, so each thread has one of its own. All ask for implicit confirmation: without it, half of
the time is the mock server's wait for TCP's delayed acknowledgement (40 ms).
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import importlib.util
import logging
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, NamedTuple

from soak import ROOT, demo_ca, in_test_environment

OPENSSL = shutil.which("openssl") or "openssl"
SECRET = "demo-secret"
THREADS = (1, 2, 8, 32)
SHIPPED = "acme2certifier's own"
BARE, OURS = "two bare processes", "cmp_ca_handler"
SUBJECT = "/CN=www.example"
RECIPIENT = "/C=DE/O=Demo/CN=Demo Issuing CA"


# --- The CA


class Bench:
    """A directory with a CSR, a certificate for its key, and mock servers that answer with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trusted = str(directory / "ca" / "trusted.pem")
        self.places: list[Place] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def serving(self, servers: int) -> Iterator[Bench]:
        """Make what is needed, and start the servers."""
        from demo_ca import DemoCA

        with DemoCA(self.directory / "ca"):
            pass  # only its keys and certificates are needed
        names = "-addext subjectAltName=DNS:www.example,DNS:example"
        key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ee.key"
        self.run(f"req -new {key} -subj {SUBJECT} {names} -out ee.csr")
        (self.directory / "ee.ext").write_text(
            "subjectAltName=DNS:www.example,DNS:example\nauthorityKeyIdentifier=keyid\n"
        )
        self.run("x509 -req -in ee.csr -CA ca/sub.pem -CAkey ca/sub.key -days 30 -extfile ee.ext -out ee.pem")
        try:
            self.places += [self.start(number) for number in range(servers)]
            yield self
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def run(self, arguments: str) -> None:
        """Run openssl in the directory."""
        subprocess.run([OPENSSL, *arguments.split()], cwd=self.directory, check=True, capture_output=True)

    def start(self, number: int) -> Place:
        """Start a mock server, and write the configurations for it."""
        from conftest import free_port, listens, wait_until

        port = free_port()
        options = f"-srv_ref 1234 -srv_secret pass:{SECRET} -rsp_cert ee.pem -rsp_extracerts ca/sub.pem"
        command = [OPENSSL, "cmp", "-config", "", "-port", str(port), *options.split()]
        command += ["-accept_raverified", "-grant_implicitconf"]
        null = subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=self.directory, stdin=null, stdout=null, stderr=null)
        self.processes.append(process)
        wait_until(lambda: listens(port) or process.poll() is not None, "the mock server's start")
        place = Place(self.directory / f"place-{number}", port)
        place.directory.mkdir()
        section = [
            f"cmp_openssl_bin: {OPENSSL}",
            f"cmp_server: 127.0.0.1:{port}",
            "cmp_path: pkix/",
            "cmp_ref: 1234",
            f"cmp_secret: pass:{SECRET}",
            f"cmp_trusted: {self.trusted}",
            f"cmp_recipient: {RECIPIENT}",
            "cmp_ignore_keyusage: True",
            "cmp_implicit_confirm: True",
        ]
        # To the shipped handler this key is one more option of openssl, which then fails.
        ours = [*section, f"cmp_tmp_dir: {place.directory / 'work'}"]
        for name, lines in (("ours.cfg", ours), ("shipped.cfg", section)):
            (place.directory / name).write_text("\n".join(["[CAhandler]", *lines, ""]))
        return place


class Place(NamedTuple):
    """Where one thread works: a directory and a server of its own."""

    directory: Path
    port: int


# --- The contenders


def run_bare(command: list[str], environment: dict[str, str] | None = None) -> str:
    """Run a program as cheaply as `subprocess` can, and take what it says."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT, env=environment
    )
    assert process.stdout is not None
    with process.stdout as output:
        text = output.read().decode()
    if process.wait():
        raise RuntimeError(text)
    return text


def bare(bench: Bench, place: Place) -> Callable[[], None]:
    """The two processes, with the flags of the user's document and -csr, and a secret that is in no argument."""
    request = [OPENSSL, "req", "-in", str(bench.directory / "ee.csr"), "-verify", "-noout", "-pubkey"]
    path = place.directory / "bare"
    path.mkdir(exist_ok=True)
    key, certificate = path / "pubkey.pem", path / "cert.pem"
    cmp = f"cmp -cmd ir -server 127.0.0.1:{place.port} -path pkix/ -ref 1234 -secret env:BENCH_SECRET -popo 0"
    cmp += f" -newkey {key} -csr {bench.directory / 'ee.csr'} -trusted {bench.trusted} -subject {SUBJECT}"
    cmp += f" -extracertsout {path / 'ca.pem'} -certout {certificate} -ignore_keyusage -implicit_confirm"
    command = [OPENSSL, *cmp.split(), "-recipient", RECIPIENT]
    environment = {**os.environ, "BENCH_SECRET": SECRET}

    def enrol() -> None:
        text = run_bare(request)
        key.write_text(text[text.index("-----BEGIN") : text.rindex("-----END")] + "-----END PUBLIC KEY-----\n")
        run_bare(command, environment)
        certificate.unlink()  # fails if there was none

    return enrol


def handler(module: Any, bench: Bench) -> Callable[[], None]:
    """A handler, loaded and called as the host does it: a new object for each enrolment."""
    pem = (bench.directory / "ee.csr").read_text()
    logger = logging.getLogger("benchmark")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    csr = base64.urlsafe_b64encode(base64.b64decode("".join(pem.split("-----")[2].split()))).decode().rstrip("=")

    def enrol() -> None:
        with module.CAhandler(False, logger) as ca_handler:
            error, bundle, *_ = ca_handler.enroll(csr)
        if not bundle:
            raise RuntimeError(error)

    return enrol


class Contenders:
    """Functions that enrol once, by name. The two handlers read their configuration through the real host."""

    def __init__(self, bench: Bench) -> None:
        from acme2certifier.acme_srv import helper
        from acme2certifier.cahandlers import cmp_ca_handler as shipped

        import cmp_ca_handler as ours

        self.bench, self.helper = bench, helper
        self.modules = {OURS: ours, SHIPPED: shipped}
        self.here = threading.local()
        # The host parses a file once. Which one it is has to be by thread here, and by handler.
        self.configurations = {
            (name, place.port): helper.load_config(logging.getLogger("benchmark"), "CAhandler", str(path))
            for place in bench.places
            for name, path in ((OURS, place.directory / "ours.cfg"), (SHIPPED, place.directory / "shipped.cfg"))
        }
        helper.load_config = shipped.load_config = self.load_config

    def load_config(self, *_: object) -> Any:
        """In place of the host's function, whose configuration is one for all threads."""
        return self.configurations[self.here.configuration]

    def of(self, name: str, place: Place) -> Callable[[], None]:
        """To be called in the thread that will use it."""
        if name == BARE:
            return bare(self.bench, place)
        self.here.configuration = (name, place.port)
        enrol = handler(self.modules[name], self.bench)

        def configured() -> None:
            self.here.configuration = (name, place.port)
            enrol()

        return configured


# --- Measuring


def cpu() -> float:
    """Seconds of CPU that this process and those that it has waited for have used."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """The shipped handler lets openssl write to the terminal."""
    sys.stdout.flush()
    with open(os.devnull, "wb") as null, contextlib.ExitStack() as stack:
        for descriptor in (1, 2):
            saved = os.dup(descriptor)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, descriptor)
            os.dup2(null.fileno(), descriptor)
        yield


class Cost(NamedTuple):
    """Milliseconds, one value for each round."""

    wall: list[float]
    cpu: list[float]


def costs(contenders: Contenders, rounds: int) -> dict[str, Cost]:
    """Each contender once a round, in turns."""
    enrol = {name: contenders.of(name, contenders.bench.places[0]) for name in (BARE, OURS, SHIPPED)}
    found = {name: Cost([], []) for name in enrol}
    names = list(enrol)
    for number in range(-5, rounds):  # five to warm up
        for name in names[number % 3 :] + names[: number % 3]:
            used, started = cpu(), time.perf_counter()
            enrol[name]()
            seconds, used = time.perf_counter() - started, cpu() - used
            if number >= 0:
                found[name].wall.append(1000 * seconds)
                found[name].cpu.append(1000 * used)
    return found


def throughput(contenders: Contenders, rounds: int, enrolments: int) -> dict[str, dict[int, list[float]]]:
    """Enrolments per second by contender and number of threads, one value for each round."""
    found: dict[str, dict[int, list[float]]] = {BARE: {}, OURS: {}}
    for threads in THREADS:
        for number in range(rounds):
            for name in (BARE, OURS) if number % 2 else (OURS, BARE):
                rate = rate_of(contenders, name, threads, max(2, enrolments // threads))
                found[name].setdefault(threads, []).append(rate)
    return found


def rate_of(contenders: Contenders, name: str, threads: int, each: int) -> float:
    """Enrolments per second of so many threads."""
    barrier = threading.Barrier(threads + 1)
    failures: list[BaseException] = []

    def work(place: Place) -> None:
        enrol = contenders.of(name, place)
        barrier.wait()
        try:
            for _ in range(each):
                enrol()
        except (RuntimeError, OSError) as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(place,)) for place in contenders.bench.places[:threads]]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    if failures:
        raise failures[0]
    return threads * each / seconds


def peak_memory(name: str, bench: Bench) -> float:
    """The most memory (MiB) that a process of Python had that has done nothing but 20 enrolments."""
    place = bench.places[0]
    command = [sys.executable, __file__, "--only", name, str(bench.directory), str(place.directory), str(place.port)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    return int(output.rsplit("peak ", 1)[1]) / 1024


def enrol_only(name: str, directory: str, place: str, port: str) -> None:
    """In a process of its own: 20 enrolments as without a host, and the peak of its memory."""
    bench, here = Bench(Path(directory)), Place(Path(place), int(port))
    if name == BARE:
        enrol = bare(bench, here)
    else:
        import cmp_ca_handler

        cmp_ca_handler.HELPERS = ()  # type: ignore[assignment]
        os.environ["ACME_SRV_CONFIGFILE"] = str(here.directory / "ours.cfg")
        enrol = handler(cmp_ca_handler, bench)
    for _ in range(20):
        enrol()
    # Not ru_maxrss: that begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print("peak", status.partition("VmHWM:")[2].split()[0])


def import_time(rounds: int) -> tuple[float, float]:
    """Milliseconds that importing the handler takes: beyond `python -c pass`, and beyond its standard modules."""
    source = (ROOT / "cmp_ca_handler.py").read_text().partition("__all__")[0]
    standard = "; ".join(re.findall(r"^(?:import|from) (?!__future__).*", source, re.MULTILINE))
    found: dict[str, list[float]] = {}
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    for _ in range(rounds):
        for code in ("pass", standard, "import cmp_ca_handler"):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-I", "-c", start + code], check=True)
            found.setdefault(code, []).append(1000 * (time.perf_counter() - started))
    nothing, modules, ours = (statistics.median(found[code][1:]) for code in found)
    return ours - nothing, ours - modules


def check_time(contenders: Contenders) -> float:
    """Milliseconds of a handler_check(), with the making of the handler, as the host does at each GET."""
    logger = logging.getLogger("benchmark")
    contenders.here.configuration = (OURS, contenders.bench.places[0].port)
    found = []
    for _ in range(500):
        started = time.perf_counter()
        with contenders.modules[OURS].CAhandler(False, logger) as ca_handler:
            fault = ca_handler.handler_check()
        found.append(1000 * (time.perf_counter() - started))
        assert fault is None, fault
    return statistics.median(found)


class Waiting(NamedTuple):
    """What orders that wait cost."""

    enrolling: float  # milliseconds
    unsynced: float  # the same, were nothing to survive a power failure
    round: float  # seconds for a poll of each, none of them due


def waiting(contenders: Contenders, directory: Path, rounds: int, orders: int = 1000) -> Waiting:
    """Enrol at a CA that lets every order wait for an hour, then poll as many orders as a large site may have."""
    import cmp_ca_handler as ours

    csr = (contenders.bench.directory / "ee.csr").read_text()
    work, logger, fsync = directory / "waiting", logging.getLogger("benchmark"), os.fsync
    with demo_ca(directory / "waiting-ca", "--hold", "--check-after", "3600") as section:
        config = directory / "waiting.cfg"
        lines = [
            f"{key}: {value}"
            for key, value in {**section, "cmp_openssl_bin": OPENSSL, "cmp_tmp_dir": str(work)}.items()
        ]
        config.write_text("\n".join(["[CAhandler]", *lines, ""]))
        contenders.configurations["waiting", 0] = ours._read_ini(str(config))
        contenders.here.configuration = ("waiting", 0)

        def enrol() -> str:
            with ours.CAhandler(False, logger) as ca_handler:
                identifier = ca_handler.enroll(csr)[3]
            assert identifier
            return identifier

        found: dict[bool, list[float]] = {True: [], False: []}
        enrol()
        for number in range(2 * rounds):
            os.fsync = fsync if number % 2 else lambda _: None  # type: ignore[assignment]
            started = time.perf_counter()
            identifier = enrol()
            found[bool(number % 2)].append(1000 * (time.perf_counter() - started))
    identifiers = [f"{number:032x}" for number in range(orders)]
    for name in identifiers:
        shutil.copytree(work / identifier, work / name)  # the CA is not asked about any of them
    started = time.perf_counter()
    for name in identifiers:
        with ours.CAhandler(False, logger) as ca_handler:
            assert ca_handler.poll("name", name, csr) == (None, None, None, name, False)
    seconds = time.perf_counter() - started
    return Waiting(statistics.median(found[True]), statistics.median(found[False]), seconds)


# --- Reporting


class Results(NamedTuple):
    """All that was measured."""

    costs: dict[str, Cost]
    rates: dict[str, dict[int, list[float]]]
    memory: dict[str, float]
    importing: tuple[float, float]
    checking: float
    waiting: Waiting

    def ratio(self, name: str, field: str) -> float:
        """To the bare processes: the median over the rounds, each compared with its own."""
        base: list[float] = getattr(self.costs[BARE], field)
        values: list[float] = getattr(self.costs[name], field)
        return statistics.median(value / other for value, other in zip(values, base))

    def rate_ratio(self, threads: int) -> float:
        """Our throughput to that of the bare processes, in the same way."""
        pairs = zip(self.rates[OURS][threads], self.rates[BARE][threads])
        return statistics.median(ours / base for ours, base in pairs)


def target(what: str, value: float, goal: float, unit: str = "", least: bool = False) -> str:
    """A line of the table of goals, which says by itself where one is missed."""
    missed = value < goal if least else value > goal
    shown = f"{goal:.2f}" if not unit else f"{goal:g}{unit}"
    limit, verdict = "at least" if least else "at most", "**missed**" if missed else "reached"
    return f"| {what} | {value:.2f}{unit} | {limit} {shown}: {verdict} |"


def table(results: Results) -> str:
    """The tables, in Markdown."""
    median = statistics.median
    lines = ["| one enrolment, median of ms | wall | to bare | CPU | to bare |", "| --- | --- | --- | --- | --- |"]
    for name, cost in results.costs.items():
        wall, used = results.ratio(name, "wall"), results.ratio(name, "cpu")
        lines.append(f"| {name} | {median(cost.wall):.2f} | {wall:.2f} | {median(cost.cpu):.2f} | {used:.2f} |")
    lines += ["", "| enrolments per second, by threads |" + "".join(f" {n} |" for n in THREADS)]
    lines.append("| --- |" + " --- |" * len(THREADS))
    for name, rates in results.rates.items():
        lines.append(f"| {name} |" + "".join(f" {median(rates[n]):.0f} |" for n in THREADS))
    lines.append("| handler to bare |" + "".join(f" {results.rate_ratio(n):.2f} |" for n in THREADS))
    lines += ["", "| | measured | to reach |", "| --- | --- | --- |"]
    lines += [
        target("wall, to bare", results.ratio(OURS, "wall"), 1.10),
        target("CPU, to bare", results.ratio(OURS, "cpu"), 1.10),
        target("8 threads, to bare", results.rate_ratio(8), 0.92, least=True),
        f"| import | {results.importing[0]:.2f} ms | |",
        f"| its own part of that | {results.importing[1]:.1f} ms | |",
        target("`handler_check()`", results.checking, 1, " ms"),
        target("1,000 orders, none due: a round of polls", results.waiting.round, 1, " s"),
        f"| an enrolment that waits, without fsync "
        f"| {results.waiting.enrolling:.1f}, {results.waiting.unsynced:.1f} ms | |",
        f"| peak memory, of the bare processes | {results.memory[OURS]:.1f}, {results.memory[BARE]:.1f} MiB | |",
    ]
    return "\n".join(lines)


def circumstances(rounds: int) -> str:
    """What the figures depend on."""
    version = subprocess.run([OPENSSL, "version"], capture_output=True, text=True, check=True).stdout.split()[1]
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{rounds} rounds; OpenSSL {version}, Python {python}, {os.cpu_count()} CPUs"


def plot(results: Results, path: Path) -> None:
    """The picture: always the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "cmp_ca_handler", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    colours = {BARE: "#9aa5b1", OURS: "#1f6feb", SHIPPED: "#d29922"}
    for offset, field in ((-0.2, "wall"), (0.2, "cpu")):
        for position, (name, cost) in enumerate(results.costs.items()):
            value = statistics.median(getattr(cost, field))
            style = {"color": colours[name], "alpha": 1 if field == "wall" else 0.6}
            left.bar(position + offset, value, 0.38, **style)
            left.annotate(f"{field}\n{value:.1f}", (position + offset, value), ha="center", va="bottom")
    left.set_xticks(range(len(results.costs)), [name.replace(" ", "\n", 1) for name in results.costs])
    left.set(title="One enrolment", ylabel="milliseconds")
    left.margins(y=0.25)
    for name, rates in results.rates.items():
        values = [statistics.median(rates[n]) for n in THREADS]
        right.plot([str(n) for n in THREADS], values, marker="o", label=name, color=colours[name])
    right.set(title="Throughput", xlabel="threads", ylabel="enrolments per second")
    right.set_ylim(bottom=0)
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def write(results: Results, rounds: int) -> None:
    """The picture, and the tables between the markers of the page."""
    plot(results, ROOT / "docs" / "benchmark.svg")
    page = ROOT / "docs" / "benchmark.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- measured -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    middle = f"<!-- measured -->\n\n{circumstances(rounds)}.\n\n{table(results)}\n\n<!-- end -->\n"
    page.write_text(before + middle + after, encoding="utf-8")


def need_matplotlib() -> None:
    """Install the extra `benchmark` of pyproject.toml beside the test packages."""
    if importlib.util.find_spec("matplotlib") is None:
        extra = re.search(r"^benchmark = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
        packages: list[str] = ast.literal_eval(extra.group(1)) if extra else []
        command = [sys.executable, "-I", "-m", "pip", "install", "--quiet", "--no-input", *packages]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure what an enrolment costs.")
    parser.add_argument("--rounds", type=int, default=300, metavar="N", help="of single enrolments (300)")
    parser.add_argument("--dry", action="store_true", help="write nothing into docs/")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    in_test_environment("benchmark")
    if arguments.only:
        enrol_only(*arguments.only)
        return 0
    if not arguments.dry:
        need_matplotlib()
    print(f"load of the machine before: {os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory() as directory, Bench(Path(directory)).serving(max(THREADS)) as bench:
        contenders = Contenders(bench)
        with silence():
            found = costs(contenders, arguments.rounds)
            rates = throughput(contenders, 3 + arguments.rounds // 20, 128)
        checking = check_time(contenders)
        kept = waiting(contenders, Path(directory), 10 + arguments.rounds // 10)
        memory = {name: peak_memory(name, bench) for name in (BARE, OURS)}
    results = Results(found, rates, memory, import_time(max(10, arguments.rounds // 10)), checking, kept)
    print(circumstances(arguments.rounds), table(results), sep="\n\n")
    if not arguments.dry:
        write(results, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
