"""The pages of runs, rankings and tables in a real browser: filter, slider; hostile text; accessibility by axe."""

from pathlib import Path

import numpy as np
import pytest
from browser import SIZES, Opened, overflow, violations
from conftest import REPOSITORY, ranked_records
from test_report import HOSTILE, evaluated, finished_training

from alignment.plan import hardness_weights, plan
from report.explore import explorer
from report.run import report
from report.table import page as page_of_table

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_overflows(open_page, run_page, explore_page, size, scheme):
    """WCAG A and AA, headings and landmarks, contrast, on a phone and on a desktop, light and dark."""
    table_page = explore_page.with_name("table.html")
    table_page.write_text(page_of_table(REPOSITORY / "results" / "quickstart" / "table2.json"), encoding="utf-8")
    for path in (run_page, explore_page, table_page):
        page = open_page(path, size, scheme, bypass_csp=True)  # the checker is a script, which the page refuses
        assert violations(page) == [], path.name
        assert overflow(page) == 0, path.name


@pytest.mark.parametrize("name", ["run_page", "explore_page"])
def test_hostile_text_stays_text(open_page, request, name):
    """No element of a model's making, and none that runs: the page's own script is the only one."""
    page = open_page(request.getfixturevalue(name))
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
