"""The documentation: its links lead somewhere, and what it names exists."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest

import cmp_ca_handler
from conftest import BINARIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = ROOT / "docs" / "options.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.cfg"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Keys that the pages spell wrong on purpose, to show what the handler says to it.
MISSPELT = {"cmp_secert", "cmp_trsted"}
# "cmp_x" stands for any key; "cmp_main" begins lines of openssl's own output.
NO_KEYS = {"cmp_x", "cmp_main"}


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings: lower case, punctuation out, blanks to hyphens."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: Path) -> list[list[str]]:
    """The rows of the page's tables, as cells."""
    return [line.strip("| ").split(" | ") for line in prose(page).splitlines() if line.startswith("| ")]


def options_of(binary: str) -> set[str]:
    """Every option of the `cmp` of one openssl."""
    run = subprocess.run([binary, "cmp", "-help"], capture_output=True, text=True)
    return set(re.findall(r"^ -([\w-]+)", run.stdout + run.stderr, re.M))


def newest_version() -> tuple[int, ...]:
    """Of the binaries there are."""
    runs = [subprocess.run([binary, "version"], capture_output=True, text=True) for binary in BINARIES]
    return max(tuple(map(int, run.stdout.split()[1].split(".")[:2])) for run in runs)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of `openssl cmp`, of all the binaries there are."""
    found = set().union(*map(options_of, BINARIES))
    assert "server" in found
    return found


@pytest.fixture(scope="module")
def known(options: set[str]) -> set[str]:
    """The keys that exist: ours, those of the binaries, and those that are newer than these, by the page's own word."""
    newer = set()
    for cells in rows(OPTIONS):
        since = re.findall(r"(\d)\.(\d+)", cells[2]) if len(cells) >= 4 else []  # "3.4", "3.0 to 3.4"
        if since and tuple(map(int, since[-1])) > newest_version():
            newer.update(re.findall(r"`cmp_([\w-]+)`", cells[0]))
    return options | newer | cmp_ca_handler.OUR_KEYS


@pages
def test_links(page: Path) -> None:
    """A relative link leads to a file, its anchor to a heading."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert links or page.name == "CHANGELOG.md"
    for link in links:
        if re.match("https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pages
def test_keys(page: Path, known: set[str]) -> None:
    """A key is ours, or an option of openssl."""
    text = re.sub(r"\S*cmp_ca_handler\S*", "", page.read_text())
    named = set(re.findall(r"(?<![\w/.-])cmp_[a-z][\w-]*", text)) - MISSPELT - NO_KEYS
    assert {key for key in named if key[4:] not in known} == set()


def test_every_option_has_its_row(options: set[str]) -> None:
    """options.md names each option once, and says "set" and "refused" of those that the handler treats so."""
    verdicts: dict[str, str] = {}
    for cells in rows(OPTIONS):
        if len(cells) < 4 or not re.match(r"[`\w-]+(, `cmp_[\w-]+`)*$", cells[0]):
            continue
        for key in re.findall(r"`cmp_([\w-]+)`", cells[0]):
            if re.search(r"needed|useful|rarely|harmful|^set$|^refused$", cells[3]):
                assert key not in verdicts, key
                verdicts[key] = cells[3]
    assert options - set(verdicts) == set()
    assert {key for key in options if verdicts[key].strip() == "set"} == options & cmp_ca_handler.RUNTIME_KEYS
    assert {key for key in options if verdicts[key].strip() == "refused"} == options & cmp_ca_handler.FORBIDDEN_KEYS


def test_since() -> None:
    """A binary has an option if, and only if, the page says so of its version: "3.0", "3.0 to 3.6"."""
    claims: dict[str, list[tuple[int, ...]]] = {}
    for cells in rows(OPTIONS):
        keys = re.findall(r"`cmp_([\w-]+)`", cells[0])
        versions = [tuple(map(int, pair)) for pair in re.findall(r"(\d)\.(\d+)", cells[2])] if len(cells) >= 4 else []
        if versions and (len(keys) == 1 or len(versions) == 1):  # a row of many, "3.0 to 3.5", only says when it grew
            claims.update({key: [*versions, (9, 9)][:2] for key in keys})
    assert len(claims) > 80
    for binary in BINARIES:
        release = subprocess.run([binary, "version"], capture_output=True, text=True).stdout.split()[1]
        version, has = tuple(map(int, release.split(".")[:2])), options_of(binary)
        for key, (first, last) in claims.items():
            assert (first <= version <= last) == (key in has), (key, version)


def test_protected_keys() -> None:
    """configuration.md lists what a profile may not set: all of it, but for what no configuration can set either."""
    section = (
        prose(ROOT / "docs" / "configuration.md").partition("What no profile may set:")[2].partition("\nWhich ")[0]
    )
    listed = set(re.findall(r"`cmp_([\w-]+)`", section)) | {"ref_variable", "secret_variable"}
    unsettable = cmp_ca_handler.RUNTIME_KEYS | cmp_ca_handler.FORBIDDEN_KEYS
    assert listed == cmp_ca_handler.PROTECTED_KEYS - unsettable


def test_hints_and_troubleshooting_agree() -> None:
    """Each hint has an entry: a heading with openssl's words, the hint as a quotation, lines with the words."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = re.findall(r"^### (.+)\n\n> (.+)\n\n```text\n((?:.+\n)+)```\n", text, re.M)
    documented = {"|".join(re.findall(r"`([^`]+)`", heading)): (hint, shown) for heading, hint, shown in entries}
    assert {words: hint for words, (hint, _) in documented.items()} == dict(cmp_ca_handler.HINTS)
    for words, (_, shown) in documented.items():
        assert shown.count("\n") == len(words.split("|")), words


def test_troubleshooting_shows_its_headings() -> None:
    """The words of a heading stand in the line below it; "..." is whatever differs."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = re.findall(r"^### `([^`]+)`\n\n```text\n(.+)\n```", text, re.M)
    assert len(entries) >= 20
    for heading, line in entries:
        assert all(part.strip() in line for part in heading.split("...")), heading


@pages
def test_named_tests_exist(page: Path) -> None:
    """`test_x.py::test_y` is a test."""
    for name, function in re.findall(r"((?:servers/)?test_\w+\.py)::(test_\w+)", page.read_text()):
        path = ROOT / "tests" / name
        assert path.exists(), name
        assert re.search(rf"^ *def {function}\(", path.read_text(), re.M), f"{name}::{function}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_have_keys_that_exist(example: Path, known: set[str]) -> None:
    """Each key of an example is ours or openssl's, the commented ones included."""
    config = configparser.ConfigParser(interpolation=None)
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config.read_string(re.sub(r"^#(?=cmp_\w+:)", "", example.read_text(), flags=re.M))
    keys = {key[4:] for key in config["CAhandler"] if key.startswith("cmp_")}
    assert "server" in keys
    assert keys <= known


@pages
def test_no_path_of_a_machine(page: Path) -> None:
    """Paths are neutral."""
    assert not re.search(r"/(?:root|home|work|Users)/|/tmp/(?!request\.der|signer\.pem)\w", page.read_text())
