"""The pages of runs, rankings and tables in a real browser: filter, slider; hostile text; accessibility by axe."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from browser import Opened, overflow, violations
from conftest import REPOSITORY, ranked_records
from PIL import Image
from test_report import HOSTILE, evaluated, finished_training, judged

from alignment.plan import plan
from hps.negatives import hardness_weights
from report.explore import explorer
from report.run import report
from report.table import page as page_of_table

pytestmark = pytest.mark.slow


GAINS = (0.5, -0.25, 0.0, 1.5)  # of the best answer to p1 ... p4: gains, a loss and a tie


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def recipe(ranked_recipe):
    recipe = ranked_recipe()
    plan(recipe)
    finished_training(recipe)
    return recipe


@pytest.fixture
def run_page(recipe, tmp_path) -> Path:
    evaluated(recipe, GAINS)
    judged(recipe)
    return write(tmp_path / "report.html", report(recipe, ["recipe.yaml"]))


@pytest.fixture
def early_page(recipe, tmp_path) -> Path:
    """The page of a run that evaluate.sh has not seen."""
    return write(tmp_path / "early.html", report(recipe, ["recipe.yaml"]))


@pytest.fixture
def explore_page(write_lines, tmp_path) -> Path:
    records = ranked_records(6, responses=8)
    records[1]["responses"][0] = HOSTILE
    records[1]["responses"][1] = f"{HOSTILE} " * 20  # long enough to be collapsed
    records[1]["prompt"][0]["content"] = f"hostile {HOSTILE}"
    return write(tmp_path / "explorer.html", explorer(write_lines(records, "run/ranked/train.jsonl"), 10, 3))


@pytest.fixture(scope="module")
def table_page(tmp_path_factory) -> Path:
    table = REPOSITORY / "results" / "testbed" / "table2.json"
    return write(tmp_path_factory.mktemp("table") / "table.html", page_of_table(table))


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
    draw = "(button) => { button.click(); return document.querySelector('.drawn').dataset.index }"
    met = {page.locator("#draw").evaluate(draw) for _ in range(100)}
    assert len(met) >= 6


def test_one_chance_is_held_while_gamma_moves(open_page, explore_page):
    """The mark is where the cumulated weights pass u, at every gamma; it moves to harder ranks as gamma rises."""
    page = open_page(explore_page)
    rewards = np.array(ranked_records(1, responses=8)[0]["rewards"][1:])
    for _ in range(3):
        u, ranks = float(page.locator("#drawn").get_attribute("data-u")), []
        for gamma in (-10, -5, -1, 0, 1, 5, 10):
            page.fill("#gamma", str(gamma))
            ranks.append(int(page.locator(".drawn").get_attribute("data-index")))
            assert ranks[-1] == np.searchsorted(hardness_weights(rewards, gamma).cumsum(), u, side="right") + 1
            assert page.locator(".drawn").count() == page.locator("#strip .mark").count() == 1
            assert f"drawn is rank {ranks[-1]}." in page.get_attribute("#strip", "aria-label")
        assert float(page.locator("#drawn").get_attribute("data-u")) == u
        assert ranks == sorted(ranks, reverse=True)
        page.click("#draw")
        assert float(page.locator("#drawn").get_attribute("data-u")) != u


def test_a_hundred_responses_are_seen_at_once(open_page, write_lines, tmp_path):
    """A bar for each rank, as high as its weight; slider and bars stay in sight at the last response."""
    (record,) = ranked_records(1, responses=101)
    path = write_lines([record], "run/ranked/train.jsonl")
    page = open_page(write(tmp_path / "explorer.html", explorer(path, 10, 3)), "phone")
    page.fill("#gamma", "2")
    weights = hardness_weights(np.array(record["rewards"][1:]), 2)
    heights = page.evaluate("[...document.querySelectorAll('#strip span')].map((bar) => parseFloat(bar.style.height))")
    np.testing.assert_allclose(heights, 100 * weights / weights.max(), rtol=1e-4, atol=1e-4)
    page.locator(".item").last.scroll_into_view_if_needed()
    assert page.locator("#strip").bounding_box()["y"] >= 0 and page.locator("#draw").is_visible()
    page.click("#drawn a")
    page.wait_for_timeout(100)
    strip, drawn = page.locator("#hardness").bounding_box(), page.locator(".drawn").bounding_box()
    assert strip["y"] + strip["height"] <= drawn["y"] + 1


def test_the_explorer_searches(open_page, explore_page):
    page = open_page(explore_page)
    page.fill("#search", "hostile")
    assert page.inner_text("#found") == "1 prompt"
    assert HOSTILE.replace("\u2028", "") in page.inner_text("#question").replace("\u2028", "")
    page.fill("#search", "nothing holds this")
    assert page.inner_text("#found") == "No prompt contains these words."
    assert page.locator("#draw").is_disabled() and not page.locator("#hardness").is_visible()
    page.fill("#search", "")
    page.click("#draw")
    assert page.inner_text("#found") == "6 prompts" and page.locator(".drawn").count() == 1


def test_what_is_opened_stays_open(open_page, explore_page):
    page = open_page(explore_page)
    page.select_option("#prompt", "1")
    assert page.locator("#item details").count() == 1
    page.click("#item summary")
    page.fill("#gamma", "3")
    assert page.locator("#item details[open]").count() == 1


def ids(page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('article')].map((each) => each.dataset.id)")


def test_answers_are_filtered_sorted_and_searched(open_page, run_page):
    page = open_page(run_page)
    assert ids(page) == ["p1", "p2", "p3", "p4"]
    for name, found in (("better", ["p1", "p4"]), ("worse", ["p2"]), ("all", ["p1", "p2", "p3", "p4"])):
        page.select_option("#filter", name)
        assert ids(page) == found and page.inner_text("#found") == f"{len(found)} of 4 prompts"
    for name, found in (("up", ["p4", "p1", "p3", "p2"]), ("down", ["p2", "p3", "p1", "p4"])):
        page.select_option("#sort", name)
        assert ids(page) == found
    page.select_option("#filter", "better")
    assert ids(page) == ["p1", "p4"]
    page.fill("#search", "p4 ")
    assert ids(page) == ["p4"]


def test_the_first_answers_are_shown_until_all_are_asked_for(open_page, recipe, tmp_path):
    """Ten prompts, then all by a button, which hands the focus on to the first of the others; a filter counts all."""
    evaluated(recipe, tuple(range(1, 13)))
    page = open_page(write(tmp_path / "report.html", report(recipe, ["recipe.yaml"])))
    assert len(ids(page)) == 10 and page.inner_text("#found") == "12 of 12 prompts"
    page.select_option("#sort", "up")
    assert ids(page)[0] == "p12"
    page.click("#all")
    assert len(ids(page)) == 12 and not page.is_visible("#all")
    assert page.evaluate("document.activeElement.dataset.id") == ids(page)[10]


def test_a_tie_is_neither_good_nor_bad(open_page, run_page):
    page = open_page(run_page)
    assert page.locator("article[data-id=p1] > p.good").inner_text() == "change of the best answer's reward: +0.500"
    assert page.locator("article[data-id=p2] > p.bad").inner_text() == "change of the best answer's reward: -0.250"
    assert page.locator("article[data-id=p3] > p.soft").inner_text() == "change of the best answer's reward: 0.000"
    assert page.locator("article[data-id=p3] .good, article[data-id=p3] .bad").count() == 0


@pytest.mark.parametrize("width", [1280, 1920])
def test_a_wide_table_takes_the_window_and_shows_that_it_goes_on(open_page, table_page, width):
    """To the edge of the window; where that is not enough, a shadow lies on the side on which more is, and no other."""
    page = open_page(table_page)
    page.set_viewport_size({"width": width, "height": 900})
    box = page.locator(".wide").first
    left, right = box.evaluate("(each) => [each.getBoundingClientRect().left, each.getBoundingClientRect().right]")
    assert left == page.locator("main h2").first.bounding_box()["x"] and width - 50 <= right <= width
    assert overflow(page) == 0
    assert box.evaluate("(each) => each.scrollWidth > each.clientWidth")

    def edges() -> list[bool]:
        """Whether the left and the right edge are darker than white, above the first line of text."""
        picture = np.asarray(Image.open(BytesIO(box.screenshot())).convert("L"))[:6].astype(int)
        return [bool((255 - picture[:, columns]).mean() > 10) for columns in (slice(0, 4), slice(-4, None))]

    assert edges() == [False, True]
    box.evaluate("(each) => each.scrollBy(1e4, 0)")
    assert edges() == [True, False]


def test_rows_of_a_table_are_filtered(open_page, table_page):
    page = open_page(table_page)
    page.fill("#search", "dpo-hps")
    shown = [row.inner_text() for row in page.locator("tr.row th").all() if row.is_visible()]
    assert shown and all("DPO-HPS" in text for text in shown)


def later_states(page, name: str):
    """What a reader makes of a page: filtered, searched in vain, everything opened. Yields after each step."""
    if name == "table_page":
        page.fill("#search", "dpo")
        yield
    if name == "run_page":
        page.select_option("#filter", "worse")
        yield
        page.select_option("#filter", "all")
    if name == "explore_page":
        page.select_option("#prompt", "1")
        page.fill("#gamma", "4")
        page.click("#draw")
    page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    yield
    if name != "early_page":  # it has no answers to search in
        page.fill("#search", "nothing holds this")
        yield


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        ("light", "desktop"),
        ("dark", "phone"),
        pytest.param("light", "phone", marks=pytest.mark.full),
        pytest.param("dark", "desktop", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("name", ["run_page", "early_page", "explore_page", "table_page"])
def test_axe_finds_nothing_and_nothing_overflows(open_page, request, name, size, scheme):
    """WCAG A and AA, headings and landmarks, contrast, on a phone and on a desktop, light and dark, in every state."""
    path = request.getfixturevalue(name)
    page = open_page(path, size, scheme, bypass_csp=True)  # the checker is a script, which the page refuses
    assert violations(page) == [] and overflow(page) == 0
    for _ in later_states(page, name):
        assert violations(page) == [] and overflow(page) == 0


def test_pictures_are_legible_on_a_phone(open_page, run_page):
    """One below the other and as wide as the column; side by side on a desktop. Each says what it shows."""
    for size, columns in (("phone", 1), ("desktop", 2)):
        page = open_page(run_page, size)
        boxes = [each.bounding_box() for each in page.locator("#training + figure img").all()]
        assert len(boxes) == 6 and len({box["x"] for box in boxes}) == columns
        assert all(box["width"] >= 340 for box in boxes)
    assert all(len(each.get_attribute("alt")) > 30 for each in page.locator("figure img").all())


def test_figures_fit_a_phone(open_page, run_page):
    """The interval, a table's last column, is in sight without scrolling."""
    page = open_page(run_page, "phone")
    for table in page.locator(".tables .wide").all():
        assert table.evaluate("(each) => each.scrollWidth - each.clientWidth") <= 0


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
