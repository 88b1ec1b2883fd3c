"""The pages in a real browser: filter, slider, rating, export; hostile text; accessibility by axe.

Chromium or Chrome from the PATH, headless (`bash setup.sh browser` finds or installs it); without one they are skipped.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, ranked_records
from test_report import HOSTILE, evaluated, finished_training

from alignment.plan import hardness_weights, plan
from report.explore import explorer
from report.run import report
from report.study import build, import_ratings
from report.table import page as page_of_table

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
CRITERIA = ("correctness", "helpfulness", "safety", "clarity")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH; bash setup.sh browser installs one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


class Opened:
    """A page in a context of its own, and everything that it said or did which it should not."""

    def __init__(self, browser, path: Path, size: str = "desktop", scheme: str = "light", **context):
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **context)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", self._request)
        self.page.goto(path.resolve().as_uri())

    def _request(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.trouble.append(f"asked for {request.url}")

    def close(self) -> None:
        self.context.close()
        assert self.trouble == []


@pytest.fixture
def open_page(browser):
    opened = []

    def open_it(path: Path, *arguments, **context):
        opened.append(Opened(browser, path, *arguments, **context))
        return opened[-1].page

    yield open_it
    for each in opened:
        each.close()


@pytest.fixture
def run_page(ranked_recipe, tmp_path) -> Path:
    recipe = ranked_recipe()
    plan(recipe)
    finished_training(recipe)
    evaluated(recipe)
    path = tmp_path / "report.html"
    path.write_text(report(recipe), encoding="utf-8")
    return path


@pytest.fixture
def explore_page(write_lines, tmp_path) -> Path:
    records = ranked_records(6, responses=8)
    records[1]["responses"][0] = HOSTILE
    records[1]["prompt"][0]["content"] = f"hostile {HOSTILE}"
    path = tmp_path / "explorer.html"
    path.write_text(explorer(write_lines(records, "run/ranked/train.jsonl"), 10, 3), encoding="utf-8")
    return path


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


def weights_shown(page) -> list[float]:
    return [float(each.get_attribute("data-weight")) for each in page.locator(".weight").all()]


def test_the_slider_moves_the_weights(open_page, explore_page):
    """The weights of the page are those of the plan, at every gamma and for every prompt looked at."""
    page = open_page(explore_page)
    records = ranked_records(6, responses=8)
    for place, gamma in ((0, 0), (0, 5), (3, -5), (5, 10)):
        page.select_option("#prompt", str(place))
        page.fill("#gamma", str(gamma))
        expected = hardness_weights(np.array(records[place]["rewards"][1:]), gamma)
        np.testing.assert_allclose(weights_shown(page), expected, rtol=1e-12, atol=1e-300)
    page.focus("#gamma")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#gamma-value") == "9.9"


def test_draws_follow_the_weights(open_page, explore_page):
    """At gamma 10 the hardest has almost all of q; at 0 a hundred draws meet nearly all responses."""
    page = open_page(explore_page)
    rewards = np.array(ranked_records(1, responses=8)[0]["rewards"][1:])
    page.fill("#gamma", "10")
    likeliest = int(hardness_weights(rewards, 10).argmax()) + 1
    drawn = []
    for _ in range(10):
        page.click("#draw")
        drawn.append(int(page.locator(".drawn").get_attribute("data-index")))
    assert drawn.count(likeliest) >= 10 * hardness_weights(rewards, 10).max() - 4
    page.fill("#gamma", "0")
    met = set()
    for _ in range(100):
        page.click("#draw")
        met.add(page.locator(".drawn").get_attribute("data-index"))
    assert len(met) >= 6


def test_the_explorer_searches(open_page, explore_page):
    page = open_page(explore_page)
    page.fill("#search", "hostile")
    assert "1 prompts" in page.inner_text("#found")
    assert HOSTILE.replace("\u2028", "") in page.inner_text("#item").replace("\u2028", "")
    page.fill("#search", "nothing holds this")
    assert page.inner_text("#found") == "No prompt holds these words."


def test_answers_are_filtered_sorted_and_searched(open_page, run_page):
    """Two prompts; the mock scores make neither better nor worse by its best answer."""
    page = open_page(run_page)
    assert page.locator("article").count() == 2
    page.select_option("#filter", "better")
    assert page.inner_text("#found") == "0 of 2 prompts"
    page.select_option("#filter", "all")
    page.fill("#search", "p2 ")
    assert page.locator("article").count() == 1 and "p2" in page.inner_text("article h3 + p")
    page.fill("#search", "")
    page.select_option("#sort", "down")
    assert page.locator("article").count() == 2


def test_rows_of_a_table_are_filtered(open_page, tmp_path):
    path = tmp_path / "table.html"
    path.write_text(page_of_table(REPOSITORY / "results" / "quickstart" / "table2.json"), encoding="utf-8")
    page = open_page(path)
    page.fill("#search", "dpo-hps")
    shown = [row.inner_text() for row in page.locator("tr.row th").all() if row.is_visible()]
    assert shown and all("DPO-HPS" in text for text in shown)


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
def test_axe_finds_nothing_and_nothing_overflows(open_page, run_page, explore_page, study, size, scheme):
    """WCAG A and AA, headings and landmarks, contrast, on a phone and on a desktop, light and dark."""
    from axe_playwright_python.sync_playwright import Axe

    table_page = explore_page.with_name("table.html")
    table_page.write_text(page_of_table(REPOSITORY / "results" / "quickstart" / "table2.json"), encoding="utf-8")
    for path in (run_page, explore_page, table_page, study / "rater-1.html"):
        page = open_page(path, size, scheme, bypass_csp=True)  # the checker is a script, which the page refuses
        found = Axe().run(page).response["violations"]
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], path.name
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, path.name


@pytest.mark.parametrize("name", ["run_page", "explore_page", "study"])
def test_hostile_text_stays_text(open_page, request, name):
    """No element of a model's making, and none that runs: the page's own script is the only one."""
    path = request.getfixturevalue(name)
    page = open_page(path / "rater-1.html" if name == "study" else path)
    if name == "explore_page":
        page.select_option("#prompt", "1")
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.inner_text("body")
    assert page.locator("body script").count() == 2 and page.locator("img[src=x]").count() == 0


def test_a_script_that_came_through_would_not_run(browser, explore_page):
    """The policy of the page, tried: what if the escaping failed. The browser refuses and says so."""
    text = explore_page.read_text().replace("<main", "<script>document.title='broken in'</script><main", 1)
    explore_page.write_text(text)
    opened = Opened(browser, explore_page)
    assert opened.page.title() != "broken in"
    assert any("Content Security Policy" in said for said in opened.trouble)
    opened.context.close()


def test_a_page_holds_its_data(study):
    """The rater's page alone is enough: it names no file and no address."""
    page = (study / "rater-1.html").read_text()
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["rater"] == 1
    assert "://" not in page.partition('id="data"')[0]
