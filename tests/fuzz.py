"""The long run of the fuzzing: verdict/test_fuzz.py, and any CSR in request/test_csr.py, with thousands of cases.

The cases are other ones each time.

    python3 tests/fuzz.py                   20,000 cases, some minutes
    python3 tests/fuzz.py --cases 500000    spread over the tests by what they cost
    python3 tests/fuzz.py -k response       further arguments go to pytest

A failure prints the smallest case that shows it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from soak import ROOT, in_test_environment


def main() -> int:
    """Run, and say how many cases that were."""
    parser = argparse.ArgumentParser(description="Fuzz for a long time.")
    parser.add_argument("--cases", type=int, default=20_000, metavar="N", help="at least so many (20,000)")
    arguments, rest = parser.parse_known_args()
    in_test_environment("fuzz")
    os.environ["CMP_FUZZ_CASES"] = str(arguments.cases)
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/verdict/test_fuzz.py",
        "tests/request/test_csr.py::test_everybody_reads_the_same",
        "-q",
        "-s",
        "--show-capture=no",
        "--tb=short",
        *rest,
    ]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        count = 0
        for line in run.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if line.startswith("fuzz: "):
                count += int(line.split(": ")[2].split()[0])
    print(f"{count} cases in {time.monotonic() - started:.0f} s")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
