"""The human study in a real browser: rating, export, import; keyboard; two tabs; hostile text; accessibility by axe."""

import json
from pathlib import Path

import pytest
from browser import SIZES, overflow, violations
from playwright.sync_api import expect
from test_report import HOSTILE

from report.study import build, import_ratings
from report.study_figures import results_page

CRITERIA = ("correctness", "helpfulness", "safety", "clarity")
NO_STORAGE = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"

pytestmark = pytest.mark.slow


@pytest.fixture
def make_study(write_lines, tmp_path):
    """A study of two prompts; the folder of its pages."""

    def make(models=("alpha", "beta"), raters: int = 1) -> Path:
        named = []
        for model in models:
            records = [
                {"prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"Question {number} {HOSTILE}"}]}
                | {"responses": [f"{model} {number} {HOSTILE}"], "token_counts": [2], "truncated": [False]}
                for number in range(2)
            ]
            named.append(f"{model}={write_lines(records, f'{model}.jsonl')}")
        build(tmp_path / "study", named, raters, seed=1)
        return tmp_path / "study" / "pages"

    return make


@pytest.fixture
def page(open_page, make_study):
    """The page of the only rater of two models."""
    return open_page(make_study() / "rater-1.html", accept_downloads=True)


@pytest.fixture
def rater_page(make_study) -> Path:
    return make_study() / "rater-1.html"


def rate(page, value: str) -> None:
    for place in range(2):
        for criterion in CRITERIA:
            page.fill(f"#mark-{place}-{criterion}", value)


def export(page, folder: Path) -> Path:
    with page.expect_download() as download:
        page.click("#export")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def progress(page) -> str:
    return page.inner_text("#progress-text")


def test_rate_reload_export_import(page, tmp_path):
    """Marks survive a reload, which goes on where a mark is missing; what is exported is imported."""
    assert page.get_attribute("#instructions", "open") is not None
    rate(page, "4.25")
    page.reload()
    assert page.get_attribute("#instructions", "open") is None
    assert progress(page) == "prompt 2 of 2; 8 of 16 marks"
    page.click("#previous")
    assert page.input_value("#mark-1-clarity") == "4.25"
    page.click("#missing")
    assert progress(page).startswith("prompt 2 of 2")
    assert page.evaluate("document.activeElement.id") == "mark-0-correctness"
    rate(page, "3,5")
    path = export(page, tmp_path)
    assert "all marks are there" in page.inner_text("#said") and path.name == "ratings-1.json"
    page.click("#missing")
    assert page.inner_text("#said") == "No mark is missing."
    means = import_ratings(tmp_path / "study" / "key.json", [path])["together"]["means"]
    assert means["alpha"]["average"]["mean"] == means["beta"]["average"]["mean"] == 3.875


@pytest.mark.parametrize("size", SIZES)
def test_what_a_button_answers_is_in_the_window(open_page, make_study, tmp_path, size):
    """The controls are the end of a page of many answers: after Export, Load and «first missing»."""
    page = open_page(make_study(tuple(f"model {number}" for number in range(6))) / "rater-1.html", size)
    height = SIZES[size][1]
    assert page.evaluate("document.documentElement.scrollHeight") > 2 * height

    def said() -> str:
        box = page.locator("#said").bounding_box()
        assert box["height"] > 0 and box["y"] >= 0 and box["y"] + box["height"] <= height
        return page.inner_text("#said")

    page.fill("#mark-0-safety", "2")
    path = export(page, tmp_path)
    assert said() == "Exported to ratings-1.json; marks still missing: 47. The file can be loaded again."
    page.set_input_files("#load", path)
    expect(page.locator("#said")).to_contain_text("Loaded")
    assert said() == "Loaded 1 mark from ratings-1.json."
    page.evaluate("for (const mark of marks) typed.set(mark.name, '3')")
    page.locator("#missing").scroll_into_view_if_needed()
    page.click("#missing")
    assert said() == "No mark is missing."


def test_a_prompt_of_several_turns(open_page, write_lines, tmp_path):
    """What was said before stands apart from what the answers answer."""
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi!"), ("user", "And now?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    line = {"prompt_id": "p", "prompt": prompt, "responses": ["Later"], "token_counts": [1], "truncated": [False]}
    named = [f"{model}={write_lines([line], f'{model}.jsonl')}" for model in "ab"]
    build(tmp_path / "study", named, raters=1, seed=1)
    page = open_page(tmp_path / "study" / "pages" / "rater-1.html", bypass_csp=True)
    assert page.locator("#item > h2, #item > h3, #item > p").all_inner_texts() == [
        *("Conversation so far", "System", "Be brief.", "User", "Hello", "Assistant", "Hi!", "Prompt", "And now?")
    ]
    assert violations(page) == []


def test_marks_come_back_to_their_models_through_the_browser(open_page, make_study, tmp_path):
    """Three models, two raters, each answer marked by what is read in it: every mean is that of its own model.

    A mark is the model's base, plus 0.1 for each criterion from the first, plus 0.2 from the second rater; prompt 1 has
    0.5 more. Mean of a criterion: base + 0.1 place + (0 + 0.2) / 2 + (0 + 0.5) / 2; average: place 1.5 on average.
    """
    base = {"alpha": 1.5, "beta": 2.5, "gamma": 3.75}
    pages = make_study(tuple(base), raters=2)
    files = []
    for rater in (1, 2):
        page = open_page(pages / f"rater-{rater}.html", accept_downloads=True)
        for prompt in range(2):
            for answer in range(3):
                model, number = page.locator(".answers > li").nth(answer).locator(".text").inner_text().split()[:2]
                for place, criterion in enumerate(CRITERIA):
                    value = base[model] + 0.1 * place + 0.2 * (rater - 1) + 0.5 * int(number)
                    page.fill(f"#mark-{answer}-{criterion}", f"{value:.2f}")
            if prompt == 0:
                page.click("#next")
        files.append(export(page, tmp_path))
    means = import_ratings(tmp_path / "study" / "key.json", files)["together"]["means"]
    for model in base:
        for place, criterion in enumerate(CRITERIA):
            assert means[model][criterion]["mean"] == pytest.approx(base[model] + 0.1 * place + 0.1 + 0.25)
        assert means[model]["average"]["mean"] == pytest.approx(base[model] + 0.15 + 0.1 + 0.25)


def test_the_wheel_changes_no_mark(page):
    """A number field changes under the wheel in some browsers and some versions; a text field in none."""
    assert page.get_attribute("#mark-0-safety", "type") == "text"
    page.fill("#mark-0-safety", "4")
    page.focus("#mark-0-safety")
    page.hover("#mark-0-safety")
    page.mouse.wheel(0, 100)
    page.mouse.wheel(0, -300)
    page.wait_for_timeout(200)
    assert page.input_value("#mark-0-safety") == "4"


@pytest.mark.parametrize(
    ("text", "mark"),
    [("3.5", 3.5), ("3,5", 3.5), (" 4 ", 4), ("5.00", 5), ("1,", 1)]
    + [(text, None) for text in ("7", "0.99", "5.01", "abc", "3.555", "3..5", "3 5", "-3", "1e0", "٣")],
)
def test_what_is_a_mark(page, tmp_path, text, mark):
    """Point and comma are one; whatever else was typed stays, is said to be wrong, and is not in the file."""
    page.fill("#mark-0-safety", text)
    assert page.get_attribute("#mark-0-safety", "aria-invalid") == ("true" if mark is None else "false")
    said = "Give a number from 1.00 to 5.00." if mark is None else ""
    assert page.inner_text("#problem-0-safety") == said
    assert progress(page) == "prompt 1 of 2; " + ("0 of 16 marks, 1 to correct" if mark is None else "1 of 16 marks")
    ratings = json.loads(export(page, tmp_path).read_text())["ratings"]
    assert [line["value"] for line in ratings] == ([] if mark is None else [mark])


def test_a_wrong_mark_stays_until_it_is_corrected(page):
    """To the next prompt and back, and over a reload: the text, the message below its field, and the count."""
    page.fill("#mark-1-safety", "6")
    colours = [
        page.evaluate(f"getComputedStyle(document.getElementById('mark-1-{name}')).borderColor")
        for name in ("safety", "clarity")
    ]
    assert colours[0] != colours[1]
    assert page.get_attribute("#mark-1-safety", "aria-describedby") == "problem-1-safety"
    for way in (lambda: (page.click("#next"), page.click("#previous")), page.reload):
        way()
        assert page.input_value("#mark-1-safety") == "6" and page.is_visible("#problem-1-safety")
        assert "0 of 16 marks, 1 to correct" in progress(page)
    page.fill("#mark-1-safety", "")
    assert not page.is_visible("#problem-1-safety") and progress(page).endswith("0 of 16 marks")


def test_two_tabs_lose_nothing(page, rater_page, tmp_path):
    """Both open before anything is marked; each marks something else, and changes and empties what the other marked."""
    other = page.context.new_page()
    other.goto(rater_page.resolve().as_uri())
    page.fill("#mark-0-safety", "2")
    other.fill("#mark-1-clarity", "4")
    expect(page.locator("#mark-1-clarity")).to_have_value("4")
    expect(other.locator("#mark-0-safety")).to_have_value("2")
    other.fill("#mark-0-safety", "3")
    page.fill("#mark-1-clarity", "")
    expect(other.locator("#mark-1-clarity")).to_have_value("")
    for tab in (page, other):
        ratings = json.loads(export(tab, tmp_path).read_text())["ratings"]
        assert [(line["answer"], line["criterion"], line["value"]) for line in ratings] == [(0, "safety", 3)]
    page.reload()
    assert page.input_value("#mark-0-safety") == "3" and "1 of 16 marks" in progress(page)


def test_an_exported_file_is_loaded_in_another_browser(page, open_page, rater_page, tmp_path):
    rate(page, "4,5")
    path = export(page, tmp_path)
    assert "still missing: 8" in page.inner_text("#said")
    other = open_page(rater_page)
    other.fill("#mark-0-safety", "2")
    other.set_input_files("#load", path)
    expect(other.locator("#said")).to_have_text("Loaded 8 marks from ratings-1.json; 1 field had another mark.")
    assert other.input_value("#mark-0-safety") == "4.50" and "8 of 16 marks" in progress(other)
    other.reload()
    assert "prompt 2 of 2; 8 of 16 marks" in progress(other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: "{", "it is not JSON"),
        (lambda given: "null", "it belongs to another study"),
        (lambda given: {**given, "study": "x"}, "it belongs to another study"),
        (lambda given: {**given, "rater": 2}, "it belongs to another rater, this page to rater 1"),
        (lambda given: {**given, "ratings": {}}, "it has no ratings"),
        (lambda given: {**given, "ratings": [*given["ratings"], 3]}, "its rating 2 is none of this page"),
        *(
            (
                lambda given, value=value: {**given, "ratings": [{**given["ratings"][0], "value": value}]},
                "its rating 1 is none of this page",
            )
            for value in (6, 3.555, "3")
        ),
    ],
)
def test_a_file_that_is_not_loaded(page, tmp_path, change, said):
    """All of a file or nothing: the reason is said, no mark changes."""
    page.fill("#mark-0-safety", "2")
    given = change(json.loads(export(page, tmp_path).read_text()))
    path = tmp_path / "file.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    page.fill("#mark-0-safety", "3")
    page.set_input_files("#load", path)
    expect(page.locator("#said")).to_have_text(f"file.json was not loaded: {said}.")
    assert page.input_value("#mark-0-safety") == "3"


@pytest.mark.parametrize(("keeps", "exported"), [(False, False), (False, True), (True, False)])
def test_leaving_warns_where_nothing_is_kept(browser, rater_page, tmp_path, keeps, exported):
    """A browser that keeps nothing says so all the time, and asks before marks are lost that no file holds."""
    context = browser.new_context()
    page = context.new_page()
    if not keeps:
        page.add_init_script(NO_STORAGE)
    asked = []
    page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    page.goto(rater_page.resolve().as_uri())
    page.fill("#mark-0-safety", "9")
    page.click("#mark-0-safety")
    page.keyboard.type("9")
    assert page.inner_text("#problem-0-safety") != ""
    assert page.inner_text("#storage") == (
        "" if keeps else "This browser keeps nothing: export before you close the page."
    )
    if exported:
        export(page, tmp_path)
    page.reload()
    assert asked == ([] if keeps or exported else ["beforeunload"])
    context.close()


def test_the_file_is_there_until_the_browser_has_read_it(browser, rater_page, tmp_path):
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script("window.gone = 0; URL.revokeObjectURL = () => { window.gone++; };")
    page.clock.install()
    page.goto(rater_page.resolve().as_uri())
    export(page, tmp_path)
    assert page.evaluate("gone") == 0
    page.clock.run_for(61_000)
    assert page.evaluate("gone") == 1
    context.close()


def test_rating_by_keyboard_alone(page):
    """Tab reaches every control, and a mark is typed into every field."""
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.tagName")
        if name in ("BODY", "HTML"):
            break
        reached.append(name)
        if name.startswith("mark-"):
            page.keyboard.type("3.5")
    assert {f"mark-{place}-{criterion}" for place in range(2) for criterion in CRITERIA} <= set(reached)
    assert {"next", "missing", "export", "load"} <= set(reached)
    assert "8 of 16 marks" in progress(page)


def test_arrows_change_a_mark(page):
    """By 0.1, with Shift by 1, never below 1 or above 5; from an empty field, or one without a mark, at 3."""
    field = page.locator("#mark-0-safety")
    for start, key, expected in (
        ("", "ArrowUp", "3.00"),
        ("", "Shift+ArrowDown", "3.00"),
        ("x", "ArrowUp", "3.00"),
        ("3", "ArrowUp", "3.10"),
        ("3,25", "ArrowDown", "3.15"),
        ("3", "Shift+ArrowUp", "4.00"),
        ("2.5", "Shift+ArrowDown", "1.50"),
        ("4.95", "ArrowUp", "5.00"),
        ("5", "Shift+ArrowUp", "5.00"),
        ("1.05", "ArrowDown", "1.00"),
        ("1.5", "Shift+ArrowDown", "1.00"),
    ):
        field.fill(start)
        field.press(key)
        assert field.input_value() == expected, (start, key)
    assert "1 of 16 marks" in progress(page)
    page.reload()
    assert page.input_value("#mark-0-safety") == "1.00"


def test_from_prompt_to_prompt(page):
    """By button and by key the first mark has the focus; on a Mac, Alt with a letter types another one."""
    focused = "document.activeElement.id"
    for way, number in (
        (lambda: page.click("#next"), 2),
        (lambda: page.click("#previous"), 1),
        (lambda: page.keyboard.press("Alt+n"), 2),
        (lambda: page.keyboard.press("Alt+p"), 1),
    ):
        page.focus("#mark-1-clarity")
        way()
        assert progress(page).startswith(f"prompt {number} of 2")
        assert page.evaluate(focused) == "mark-0-correctness"
    pressed = """([key, code, ctrlKey]) => !document.activeElement.dispatchEvent(
        new KeyboardEvent('keydown', { key, code, altKey: true, ctrlKey, bubbles: true, cancelable: true }))"""
    assert page.evaluate(pressed, ["Dead", "KeyN", False]) and progress(page).startswith("prompt 2 of 2")
    assert page.evaluate(focused) == "mark-0-correctness"
    assert page.evaluate(pressed, ["π", "KeyP", False]) and progress(page).startswith("prompt 1 of 2")
    assert not page.evaluate(pressed, ["n", "KeyN", True])  # AltGr on Windows
    assert progress(page).startswith("prompt 1 of 2")


@pytest.fixture
def results(tmp_path) -> Path:
    """A page of results with a hostile name and one of the paper's."""
    import numpy as np

    from report.study_figures import figures

    key = {"models": [HOSTILE, "dpo-hps", "SFT"], "criteria": list(CRITERIA), "seed": 0}
    key["sets"] = {"hh_rlhf": ["a", "b", "c"], HOSTILE: ["d", "e", "f"]}
    ratings = np.random.default_rng(0).uniform(1, 5, (4, 6, 3, 4)).round(2)
    result = {"study": "s", "raters": 4, "missing_raters": [5], "prompts": {"hh_rlhf": 3, HOSTILE: 3}}
    path = tmp_path / "study.html"
    path.write_text(results_page(result | figures(ratings, key)), encoding="utf-8")
    return path


def test_pictures_of_results(open_page, results):
    """Of all prompts and of each set a panel of means and one of differences for the average and each criterion; what
    they show stands in the tables too. The paper's mean: of the average, over all prompts."""
    page = open_page(results)
    texts = [each.get_attribute("alt") for each in page.locator("figure img").all()]
    assert len(texts) == 3 * 2 * 5
    assert all(image.evaluate("(each) => each.naturalWidth") > 0 for image in page.locator("figure img").all())
    assert texts[0].startswith("All prompts, average: ") and texts[0].endswith(" The paper: dpo-hps 3.93; SFT 3.63.")
    assert not any("The paper" in text for text in texts[1:])
    row = page.locator("tr", has_text="dpo-hps").first.inner_text().split("\t")
    assert f"dpo-hps {row[5]}; SFT" in texts[0] and f"dpo-hps {row[1]}; SFT" in texts[1]
    row = page.locator("tr", has_text="dpo-hps − SFT").first.inner_text().split("\t")
    assert texts[5].startswith("All prompts, differences, average: ")
    assert texts[5].endswith(f"dpo-hps − SFT {row[5]}.") and texts[6].endswith(f"dpo-hps − SFT {row[1]}.")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_nothing_overflows(open_page, rater_page, results, size, scheme):
    """The rater's page as it opens and with a mark that is none, the results; the pages' policy refuses the checker."""
    page = open_page(rater_page, size, scheme, bypass_csp=True)
    assert violations(page) == [] and overflow(page) == 0
    page.fill("#mark-0-safety", "seven")
    assert violations(page) == [] and overflow(page) == 0
    page = open_page(results, size, scheme, bypass_csp=True)
    assert violations(page) == [] and overflow(page) == 0


@pytest.mark.parametrize("name", ["rater_page", "results"])
def test_hostile_text_stays_text(open_page, request, name):
    """No element of a model's making, and none that runs: the page's own script is the only one."""
    page = open_page(request.getfixturevalue(name))
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in page.inner_text("body")
    assert page.locator("body script").count() == 2 and page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("name", ["rater_page", "results"])
def test_a_page_holds_its_data(request, name):
    """One file: it names no other file and no address."""
    page = request.getfixturevalue(name).read_text()
    assert isinstance(json.loads(page.split('id="data">')[1].split("</script>")[0]), dict)
    assert page.count("://") == 0
