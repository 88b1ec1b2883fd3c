"""The documents: links and files that they name exist, the README stays short and shows a command at once."""

import re
import tomllib
from importlib.util import find_spec

import pytest
from conftest import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), REPOSITORY / "data" / "README.md"])
SOURCES = ("*.py", "*.sh", "*.sbatch", "*.yaml", "*.toml")
FOLDERS = (
    *("alignment", "annotation", "benchmarks", "cluster", "configs", "data", "evaluation", "generation", "hps"),
    *("pipeline", "report", "tests", "theory", "tools"),
)


def prose(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """GitHub's names of the headings: lower case, no punctuation, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_are_those_of_github():
    assert anchors("# A b\n```\n# no heading\n```\n## testbed/: what, `x_y`\n") == {"a-b", "testbed-what-x_y"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_of_a_page_exist(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_of_a_page_exist(page):
    """Drivers, modules and programs that a page names."""
    text = page.read_text(encoding="utf-8")
    modules = set(re.findall(r"-m ([a-z_]+(?:\.[a-z_]+)+)", text))
    scripts = set(re.findall(r"\b((?:benchmarks|data|cluster|tests)/[\w/]+\.(?:py|sbatch))\b", text))
    drivers = set(re.findall(r"\bbash ([a-z_]+\.sh)\b", text))
    assert {name for name in modules if find_spec(name) is None} == set()
    assert {name for name in scripts | drivers if not (REPOSITORY / name).exists()} == set()


def test_pages_that_the_code_names_exist():
    files = [*(path for each in SOURCES for path in REPOSITORY.glob(each))]
    files += [path for folder in FOLDERS for each in SOURCES for path in (REPOSITORY / folder).rglob(each)]
    assert len(files) > 100
    named = {
        (str(path.relative_to(REPOSITORY)), page)
        for path in files
        for page in re.findall(r"\bdocs/\w+\.md", path.read_text(encoding="utf-8"))
    }
    assert [each for each in sorted(named) if not (REPOSITORY / each[1]).exists()] == []


def test_the_readme_is_short_and_begins_with_a_command():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert "bash quickstart.sh" in "\n".join(lines[:25])


def test_the_citation_names_this_version():
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"version: {version}" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8").splitlines()
