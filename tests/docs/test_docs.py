"""The pages are true: their links lead somewhere, and what they name exists."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

import pytest

import cmp_ca_handler
from conftest import BINARIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = ROOT / "docs" / "options.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
# What the page quotes of openssl, whose words the handler knows by a pattern, and of acme2certifier.
OF_OTHERS = {"could not read private key", "Certificate poll failed: None"}
EXAMPLES = sorted((ROOT / "examples").glob("*.cfg"))

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
    return options | newer | cmp_ca_handler.OURS


def of_kind(kind: str) -> set[str]:
    """The options of which the handler's table says so."""
    return {key for key, option in cmp_ca_handler.OPTIONS.items() if option.kind == kind}


def test_links_lead_somewhere() -> None:
    """A relative link leads to a file, its anchor to a heading."""
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
        assert links or page.name == "CHANGELOG.md", page
        for link in links:
            if re.match("https?:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), (page, link)
            assert not anchor or anchor in anchors(target), (page, link)


def test_named_keys_exist(known: set[str]) -> None:
    """A key is ours, or an option of openssl."""
    for page in PAGES:
        text = re.sub(r"\S*cmp_ca_handler\S*", "", page.read_text())
        named = set(re.findall(r"(?<![\w/.-])cmp_[a-z][\w-]*", text)) - MISSPELT - NO_KEYS
        assert {key for key in named if key[4:] not in known} == set(), page


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
    assert {key for key in options if verdicts[key].strip() == "set"} == options & of_kind("run")
    mock = set().union(*(cmp_ca_handler._binary(binary).mock_server for binary in BINARIES))
    assert {key for key in options if verdicts[key].strip() == "refused"} == options & of_kind("other") | mock


def test_an_option_exists_since_the_version_of_the_page() -> None:
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


def test_the_page_lists_all_protected_keys() -> None:
    """configuration.md lists what a profile may not set: all of it, but for what no configuration can set either."""
    section = (
        prose(ROOT / "docs" / "configuration.md").partition("What no profile may set:")[2].partition("\nWhich ")[0]
    )
    listed = set(re.findall(r"`cmp_([\w-]+)`", section)) | {"ref_variable", "secret_variable"}
    fixed = {key for key, option in cmp_ca_handler.OPTIONS.items() if option.fixed}
    assert listed == fixed - of_kind("run") - of_kind("other")


def literal_words(pattern: str) -> list[str]:
    """Of each alternative of a hint's pattern the words before anything special."""
    alternatives = re.split(r"\|(?![^(]*\))", pattern.replace("(code=|http code )", "code="))
    return [re.split(r"[(.\\]|\d", alternative)[0].strip() for alternative in alternatives]


def test_troubleshooting_has_every_hint() -> None:
    """The words that a hint is for stand on the page, for whoever searches there."""
    text = TROUBLESHOOTING.read_text(encoding="utf-8").lower()
    hints = [line.split(" -> ")[0] for line in cmp_ca_handler.HINTS.strip().splitlines()]
    assert len(hints) > 50
    assert [words for hint in hints for words in literal_words(hint) if words.lower() not in text] == []


def test_troubleshooting_quotes_the_handler() -> None:
    """The first column has the handler's own words, or those of other programs; "..." is whatever differs."""
    source = (ROOT / "cmp_ca_handler.py").read_text(encoding="utf-8").lower()
    page = prose(TROUBLESHOOTING).partition("## No line of the handler")[0]
    quoted = {
        words
        for line in page.splitlines()
        if line.startswith("| `")
        for words in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    }
    assert len(quoted) > 80
    parts = {part.strip() for words in quoted - OF_OTHERS for part in words.split("...")}
    assert {part for part in parts if part.lower() not in source} == set()


def test_named_tests_exist() -> None:
    """`x/test_x.py` is a file of tests, `x/test_x.py::test_y` a test; the table of promises names each file once."""
    tests = ROOT / "tests"
    table = (ROOT / "docs" / "development.md").read_text().partition("## Which test proves which promise")[2]
    named = sorted(re.findall(r"`(\w+/test_\w+\.py)`", table))
    assert named == sorted(path.relative_to(tests).as_posix() for path in tests.rglob("test_*.py"))
    text = "\n".join(page.read_text() for page in PAGES)
    for name in re.findall(r"`([\w/]*test_\w+\.py)`", text):
        assert (tests / name).exists(), name
    for name, function in re.findall(r"((?:\w+/)?test_\w+\.py)::(test_\w+)", text):
        assert (tests / name).exists(), name
        assert re.search(rf"^ *def {function}\(", (tests / name).read_text(), re.M), f"{name}::{function}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_have_keys_that_exist(example: Path, known: set[str]) -> None:
    """Each key of an example is ours or openssl's, the commented ones included."""
    config = configparser.ConfigParser(interpolation=None)
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config.read_string(re.sub(r"^#(?=cmp_\w+:)", "", example.read_text(), flags=re.M))
    keys = {key[4:] for key in config["CAhandler"] if key.startswith("cmp_")}
    assert "server" in keys
    assert keys <= known


def test_no_page_names_a_path_of_a_machine() -> None:
    """Paths are neutral."""
    for page in PAGES:
        found = re.search(r"/(?:root|home|work|Users)/|/tmp/(?!request\.der|signer\.pem)\w", page.read_text())
        assert not found, (page, found)
