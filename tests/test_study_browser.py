"""The human study in a real browser: rating, export, import; keyboard; hostile text; accessibility by axe."""

import json
from pathlib import Path

import pytest
from browser import SIZES, overflow, violations
from test_report import HOSTILE

from report.study import build, import_ratings

CRITERIA = ("correctness", "helpfulness", "safety", "clarity")

pytestmark = pytest.mark.slow


@pytest.fixture
def study(write_lines, tmp_path) -> Path:
    named = []
    for name in ("alpha", "beta"):
        records = [
            {"prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"Question {number} {HOSTILE}"}]}
            | {"responses": [f"{name} {number} {HOSTILE}"], "token_counts": [2], "truncated": [False]}
            for number in range(2)
        ]
        named.append(f"{name}={write_lines(records, f'{name}.jsonl')}")
    build(tmp_path / "study", named, raters=1, seed=1, prompts=None)
    return tmp_path / "study"


def rate(page, value: str) -> None:
    for place in range(2):
        for criterion in CRITERIA:
            page.fill(f"#mark-{place}-{criterion}", value)


def test_rate_reload_export_import(open_page, study):
    """Marks survive a reload; what is exported is imported with its models' names."""
    page = open_page(study / "rater-1.html", accept_downloads=True)
    rate(page, "4.25")
    page.fill("#mark-0-safety", "7")
    assert "from 1.00 to 5.00" in page.inner_text("#said") and "7 of 16 marks" in page.inner_text("#progress-text")
    page.fill("#mark-0-safety", "4.25")
    page.reload()
    assert page.input_value("#mark-1-clarity") == "4.25" and "8 of 16 marks" in page.inner_text("#progress-text")
    page.click("#missing")
    assert "prompt 2 of 2" in page.inner_text("#progress-text")
    assert page.evaluate("document.activeElement.id") == "mark-0-correctness"
    rate(page, "3.5")
    with page.expect_download() as download:
        page.click("#export")
    assert "all marks are there" in page.inner_text("#said")
    path = study / download.value.suggested_filename
    download.value.save_as(path)
    result = import_ratings(study / "key.json", [path])
    assert path.name == "ratings-1.json"
    assert result["means"]["alpha"]["average"]["mean"] == result["means"]["beta"]["average"]["mean"] == 3.875


def test_rating_by_keyboard_alone(open_page, study):
    """Tab reaches every control; marks are typed, raised by an arrow, and the next prompt is a key away."""
    page = open_page(study / "rater-1.html")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.tagName")
        if name in ("BODY", "HTML"):
            break
        reached.append(name)
        if name.startswith("mark-"):
            page.keyboard.type("3.5")
            page.keyboard.press("ArrowUp")
    assert {f"mark-{place}-{criterion}" for place in range(2) for criterion in CRITERIA} <= set(reached)
    assert {"next", "missing", "export"} <= set(reached)
    assert page.input_value("#mark-0-safety") == "3.51" and "8 of 16 marks" in page.inner_text("#progress-text")
    page.keyboard.press("Alt+n")
    assert "prompt 2 of 2" in page.inner_text("#progress-text")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_overflows(open_page, study, size, scheme):
    page = open_page(study / "rater-1.html", size, scheme, bypass_csp=True)  # the page's policy refuses the checker
    assert violations(page) == [] and overflow(page) == 0


def test_hostile_text_stays_text(open_page, study):
    """No element of a model's making, and none that runs: the page's own script is the only one."""
    page = open_page(study / "rater-1.html")
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.inner_text("body")
    assert page.locator("body script").count() == 2 and page.locator("img[src=x]").count() == 0


def test_a_page_holds_its_data(study):
    """The rater's page alone is enough: it names no file and no address."""
    page = (study / "rater-1.html").read_text()
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["rater"] == 1
    assert "://" not in page.partition('id="data"')[0]
