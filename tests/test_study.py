"""report/study.py and study_figures.py: what raters see, what is refused, means, intervals and agreement by hand."""

import json
import re
from pathlib import Path

import coverage_of_intervals
import numpy as np
import pytest
from conftest import REPOSITORY
from coverage_of_intervals import coverage

from hps.errors import InputError
from report.study import build, choose, import_ratings, order_of, read_key, read_ratings, study_name
from report.study_figures import agreement, beside_the_paper, figures, resampled_means, results_page, table

CRITERIA = ["correctness", "helpfulness", "safety", "clarity"]
HOSTILE = "</script><script>alert(1)</script>|*x*\n[y](javascript:alert(2)) www.example.org"


def record(name: str, answer: str, question: str = "") -> dict:
    return {
        "prompt_id": name,
        "prompt": [{"role": "user", "content": question or f"Question {name}"}],
        "responses": [answer],
        "token_counts": [2],
        "truncated": [False],
    }


@pytest.fixture
def answered(tmp_path, write_lines):
    """Answers of a model to prompts `<prefix>0`, ...: the path of the file."""

    def write(model: str, count: int = 3, prefix: str = "p", **changed) -> str:
        lines = [record(f"{prefix}{number}", f"{model} {prefix}{number}") | changed for number in range(count)]
        return str(write_lines(lines, f"answers/{model}-{prefix}-{count}.jsonl"))

    return write


@pytest.fixture
def study(tmp_path, answered):
    """Two models, three prompts, two raters; the folder."""
    named = [f"{model}={answered(model)}" for model in ("alpha", "beta")]
    build(tmp_path / "study", named, raters=2, seed=5)
    return tmp_path / "study"


def data_of(study, rater: int) -> dict:
    page = (study / "pages" / f"rater-{rater}.html").read_text()
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def rated(study, rater: int, value) -> dict:
    """A rater's file in which `value(text of the answer, criterion)` is the mark."""
    data = data_of(study, rater)
    lines = [
        {"prompt_id": item["id"], "answer": place, "criterion": criterion, "value": value(text, criterion)}
        for item in data["items"]
        for place, text in enumerate(item["answers"])
        for criterion in CRITERIA
    ]
    return {"study": data["study"], "rater": rater, "ratings": lines}


def save(tmp_path, ratings, name: str = "ratings.json") -> str:
    path = tmp_path / name
    path.write_text(ratings if isinstance(ratings, str) else json.dumps(ratings))
    return str(path)


def test_raters_see_every_prompt_and_answer_without_names(study):
    key = read_key(study / "key.json")
    assert key["models"] == ["alpha", "beta"] and key["criteria"] == CRITERIA
    assert key["sets"] == {"data set 1": ["p0", "p1", "p2"]}
    for rater in (1, 2):
        data = data_of(study, rater)
        assert {item["id"] for item in data["items"]} == {"p0", "p1", "p2"}
        for item in data["items"]:
            assert sorted(item["answers"]) == [f"alpha {item['id']}", f"beta {item['id']}"]
        assert set(data) == {"study", "rater", "items", "criteria"}
        assert set(data["items"][0]) == {"id", "prompt", "answers"}  # nothing that tells the models


def test_the_key_is_not_among_the_pages(tmp_path, answered):
    """What is put on a web server is the folder of pages: names of models, files, hashes and seed stand in none."""
    files = {"model-of-before": answered("one"), "model-of-after": answered("two")}
    seed = 9182736455463728
    study = tmp_path / "study"
    build(study, [f"{model}={path}" for model, path in files.items()], raters=2, seed=seed)
    assert sorted(path.name for path in study.iterdir()) == ["key.json", "pages"]
    pages = sorted((study / "pages").iterdir())
    assert [path.name for path in pages] == ["rater-1.html", "rater-2.html"]
    secrets = [*files, str(seed), *(found[0] for found in read_key(study / "key.json")["files"].values())]
    secrets += [str(part) for path in files.values() for part in (path, Path(path).name, tmp_path)]
    key = (study / "key.json").read_bytes()
    assert [secret for secret in secrets[:5] if secret.encode() not in key] == []  # they are what the key holds
    for path in pages:
        text = path.read_bytes()
        assert b"one p0" in text and b"two p0" in text
        assert [secret for secret in secrets if secret.encode() in text] == []


def test_orders_depend_on_seed_and_rater_alone():
    prompts = [f"p{number}" for number in range(40)]
    first = order_of(5, 1, prompts, 3)
    # Written out: a key is read years later, by another Python.
    short = [("p3", [1, 2, 0]), ("p2", [2, 1, 0]), ("p0", [2, 1, 0]), ("p1", [1, 2, 0])]
    assert order_of(5, 1, prompts[:4], 3) == short
    assert first == order_of(5, 1, prompts, 3)
    assert first != order_of(5, 2, prompts, 3) and first != order_of(6, 1, prompts, 3)
    assert sorted(name for name, _ in first) == sorted(prompts)
    # Each model is first about as often as the others: of 40, 13.3 are expected.
    counts = np.bincount([order[0] for _, order in first], minlength=3)
    assert counts.min() >= 5


def test_without_a_seed_one_is_drawn_and_kept(tmp_path, answered):
    """Two builds differ, and the seed is none that a rater could try out; the same folder keeps its seed."""
    named = [f"{model}={answered(model)}" for model in ("alpha", "beta")]
    seeds = []
    for name in ("a", "b"):
        build(tmp_path / name, named, raters=1)
        seeds.append(read_key(tmp_path / name / "key.json")["seed"])
    assert seeds[0] != seeds[1] and min(seeds) > 2**40
    pages = (tmp_path / "a" / "pages" / "rater-1.html").read_text()
    assert str(seeds[0]) not in pages
    build(tmp_path / "a", named, raters=1)
    assert read_key(tmp_path / "a" / "key.json")["seed"] == seeds[0]
    assert (tmp_path / "a" / "pages" / "rater-1.html").read_text() == pages


def test_a_folder_keeps_its_key(study, answered):
    """The same study is written again, also over pages that were lost; another one is refused, the key left alone."""
    named = [f"{model}={answered(model)}" for model in ("alpha", "beta")]
    before, page = (study / "key.json").read_bytes(), study / "pages" / "rater-2.html"
    text = page.read_bytes()
    page.unlink()
    build(study, named, raters=2, seed=5)
    assert (study / "key.json").read_bytes() == before and page.read_bytes() == text
    other = [f"alpha={answered('alpha', 2)}", f"beta={answered('beta', 2)}"]
    for files, raters, seed in ((named, 2, 6), (named, 3, None), (other, 2, None)):
        with pytest.raises(InputError, match=r"key\.json: the folder has the key of another study, .*`--to`"):
            build(study, files, raters=raters, seed=seed)
    (study / "key.json").write_text("{}")
    with pytest.raises(InputError, match=r"key\.json: this is no key, or a changed one"):
        build(study, named, raters=2)
    assert (study / "key.json").read_text() == "{}" and page.read_bytes() == text


@pytest.mark.slow
def test_two_data_sets_as_in_table_three(tmp_path, answered):
    """Two of the prompts of each of two data sets, by seed and not the first; figures of each and together.

    Marks: hh 2 for alpha, 1 for beta; pku 4 and 5. Together alpha (2 + 4) / 2 = 3, beta (1 + 5) / 2 = 3.
    """
    named = [f"{model}={answered(model, 9, 'h')},{answered(model, 7, 'k')}" for model in ("alpha", "beta")]
    build(tmp_path / "study", named, raters=2, seed=3, prompts=2, sets="hh,pku")
    sets = read_key(tmp_path / "study" / "key.json")["sets"]
    assert [len(names) for names in sets.values()] == [2, 2] and sets["hh"] != ["h0", "h1"]
    assert {name[0] for name in sets["hh"]} == {"h"} and {name[0] for name in sets["pku"]} == {"k"}
    assert len(data_of(tmp_path / "study", 1)["items"]) == 4

    def value(text, criterion):
        return {"alpha h": 2, "beta h": 1, "alpha k": 4, "beta k": 5}[text[:-1]]

    files = [save(tmp_path, rated(tmp_path / "study", rater, value), f"{rater}.json") for rater in (1, 2)]
    result = import_ratings(tmp_path / "study" / "key.json", files)
    means = {
        name: [part["means"][model]["safety"]["mean"] for model in ("alpha", "beta")]
        for name, part in {"all": result["together"], **result["sets"]}.items()
    }
    assert means == {"all": [3, 3], "hh": [2, 1], "pku": [4, 5]}
    # Prompts are drawn within their data set: two of each in every resample, so that nothing moves the mean.
    assert result["together"]["means"]["alpha"]["safety"]["interval"] == [3, 3]
    assert result["sets"]["hh"]["differences"][0]["average"] == {"mean": 1, "interval": [1, 1]}
    assert "## hh" in (tmp_path / "study" / "study.md").read_text()


def test_prompts_are_chosen_by_seed_whatever_the_order_of_the_file():
    texts = {f"p{number}": {} for number in range(30)}
    chosen = list(choose(texts, 15, "seed", "file"))
    assert chosen == list(choose(dict(reversed(texts.items())), 15, "seed", "file"))
    assert chosen != list(choose(texts, 15, "other", "file")) and set(chosen) != set(list(texts)[:15])
    assert list(choose(texts, None, "seed", "file")) == list(texts)


@pytest.mark.slow
def test_ratings_come_back_to_their_models(study, tmp_path):
    """alpha gets 4, beta 2 from both, however they were shuffled; then everything agrees."""

    def value(text, criterion):
        return 4 if text.startswith("alpha") else 2

    files = [save(tmp_path, rated(study, rater, value), f"{rater}.json") for rater in (1, 2)]
    result = import_ratings(study / "key.json", files)
    together = result["together"]
    assert together["means"]["alpha"]["average"] == {"mean": 4.0, "interval": [4.0, 4.0]}
    assert together["means"]["beta"]["safety"] == {"mean": 2.0, "interval": [2.0, 2.0]}
    assert together["differences"][0]["models"] == ["alpha", "beta"]
    assert together["differences"][0]["average"] == {"mean": 2.0, "interval": [2.0, 2.0]}
    assert together["agreement"] == dict.fromkeys([*CRITERIA, "average"], 1.0)
    assert result["sets"] == {} and result["prompts"] == {"data set 1": 3} and result["missing_raters"] == []
    assert json.loads((study / "study.json").read_text()) == result
    text = (study / "study.md").read_text()
    assert "| alpha | 4.00 [4.00, 4.00] |" in text and "| alpha − beta | +2.00 [+2.00, +2.00] |" in text
    assert "a bootstrap that resamples both" in text and "fewer than 10 raters the intervals are too short" in text
    assert "All prompts" in (study / "study.html").read_text()


def test_a_rater_that_is_not_in_yet_is_named(study, tmp_path):
    path = save(tmp_path, rated(study, 2, lambda *_: 3))
    result = import_ratings(study / "key.json", [path])
    assert result["missing_raters"] == [1] and result["together"]["agreement"]["safety"] is None
    text = (study / "study.md").read_text()
    assert "Not in yet: raters 1." in text and "say nothing about other raters" in text


def test_beside_the_paper():
    """The paper's Table 3: SFT 3.63, DPO-BT 3.82, DPO-PL 3.69, DPO-HPS 3.93. Names match whatever their capitals."""
    found = beside_the_paper({"sft": 3.6, "dpo-hps": 4.03, "DPO_HPS": 1.0})
    assert found == {
        "sft": {"name": "SFT", "mean": 3.63, "difference": -0.03},
        "dpo-hps": {"name": "DPO-HPS", "mean": 3.93, "difference": 0.1},
    }
    key = {"models": ["sft", "mine"], "criteria": CRITERIA, "seed": 0, "sets": {"x": ["p"]}, "study": "s"}
    result = {"study": "s", "raters": 1, "missing_raters": [], "prompts": {"x": 1}}
    text = table({**result, **figures(np.full((1, 1, 2, 4), 3.5), key)})
    assert "| model | correctness | helpfulness | safety | clarity | average | paper | difference |" in text
    assert "3.50 [3.50, 3.50] | 3.63 | -0.13 |" in text and "3.50 [3.50, 3.50] | – | – |" in text
    assert "Rows of the paper without a model here: DPO-BT 3.82, DPO-PL 3.69, DPO-HPS 3.93." in text


@pytest.mark.slow
def test_names_of_models_are_inert_in_table_and_page():
    """Of a name nothing is markup: what Markdown or HTML could read is an entity, the end of a line as well."""
    key = {"models": [HOSTILE, "b"], "criteria": CRITERIA, "seed": 0, "sets": {HOSTILE: ["p"], "y": ["q"]}}
    result = {"study": "s", "raters": 1, "missing_raters": [], "prompts": {HOSTILE: 1, "y": 1}}
    result |= figures(np.full((1, 2, 2, 4), 3.5), key)
    text = table(result)
    assert not re.search(r"<|javascript:|\[y\]|\*x\*|www\.|\|\*", text)
    rows = [line for line in text.splitlines() if "alert" in line and line.startswith("|")]
    assert len(rows) == 6 and {row.count("|") for row in rows} == {9, 7}
    page = results_page(result)
    assert page.count("<script") == 2 and "<script>alert" not in page


def test_agreement_by_hand():
    """Two raters, two units: 1, 2 and 3, 3, interval scale.

    Observed: pairs within a unit differ by 1 and 0; D_o = (1 + 1 + 0 + 0) / 4 = 1/2 (each pair in both orders, by the
    number of values of a unit less one). Expected: over all 4 values 1, 2, 3, 3 = mean of squared differences of the 12
    ordered pairs = 2 (1 + 4 + 4 + 1 + 1 + 0) / 12 = 22/12. alpha = 1 - (1/2) / (22/12) = 1 - 3/11 = 8/11.
    """
    assert agreement(np.array([[1.0, 3.0], [2.0, 3.0]])) == pytest.approx(8 / 11, abs=1e-4)
    assert agreement(np.array([[1.0, 3.0]])) is None and agreement(np.full((2, 3), 4.0)) is None


def test_agreement_of_averages_that_are_equal_but_for_the_last_bit():
    """(1.1 + 1.2 + 1.3 + 1.4) / 4 in another order differs in its last bit: the raters agree all the same."""
    marks = np.array([[[1.1, 1.2, 1.3, 1.4], [2.0] * 4], [[1.4, 1.1, 1.2, 1.3], [2.0] * 4]])
    ratings = np.array([[sum(unit) / 4 for unit in rater] for rater in marks.tolist()])
    ratings[1, 0] = np.nextafter(ratings[0, 0], 2)
    assert ratings[0, 0] != ratings[1, 0] and agreement(ratings) == 1
    assert agreement(ratings[:, :1]) is None  # all equal


def test_agreement_comes_down_to_variances():
    """Where no rating is missing, the differences of all pairs do: alpha is 1 less the mean variance within a unit by
    that of all ratings. From raters who agree to raters who do not; marks, and averages of four."""
    rng = np.random.default_rng(0)
    for spread, step in ((0.2, 0.5), (1.0, 0.5), (3.0, 0.5), (1.0, 0.0025)):
        units = rng.uniform(1, 5, 24)
        ratings = (np.clip(units + rng.normal(0, spread, (6, 24)), 1, 5) / step).round() * step
        expected = 1 - ratings.var(axis=0, ddof=1).mean() / ratings.var(ddof=1)
        assert agreement(ratings) == pytest.approx(expected, abs=1e-4)


def test_means_by_hand():
    """Two raters, two prompts: 1, 3 and 2, 4, all criteria alike.

    A resample has one of the means of raters (both the first, 1/4; one of each, 1/2; both the second, 1/4) and likewise
    of prompts: from 1 (probability 1/16) to 4 (1/16), so that the middle 95 % reach from end to end.
    """
    ratings = np.array([[[[1.0] * 4], [[3.0] * 4]], [[[2.0] * 4], [[4.0] * 4]]])
    key = {"models": ["m"], "criteria": CRITERIA, "seed": 0, "sets": {"x": ["p", "q"]}}
    found = figures(ratings, key)["together"]["means"]["m"]
    assert found["clarity"]["mean"] == 2.5 and found["average"]["mean"] == 2.5
    assert found["clarity"]["interval"] == [1, 4]
    drawn = resampled_means(ratings[:, :, 0, 0], [[0, 1]], 4000, seed=0)
    assert set(drawn) == {1, 1.5, 2, 2.5, 3, 3.5, 4}
    assert (drawn == 1).mean() == pytest.approx(1 / 16, abs=0.015) and drawn.mean() == pytest.approx(2.5, abs=0.05)
    assert (drawn == resampled_means(ratings[:, :, 0, 0], [[0, 1]], 4000, seed=0)).all()


def test_intervals_cover_what_they_should():
    """300 studies of 10 raters and 15 prompts, whose strictness and hardness differ: see `coverage_of_intervals`.

    The 95 % intervals must hold the mean of all raters and prompts about so often, those of the difference of two
    models as well; intervals over the prompts alone do not.
    """
    mean, difference, over_prompts = coverage(raters=10, prompts=15, studies=300, resamples=400, seed=1)
    assert 0.90 <= mean <= 0.98 and 0.90 <= difference <= 0.98
    assert over_prompts < 0.80


def test_the_documents_table_of_coverage(monkeypatch, capsys):
    """Its columns and its rows are those that the program prints."""
    monkeypatch.setattr(coverage_of_intervals, "STUDIES", 20)
    monkeypatch.setattr(coverage_of_intervals, "RESAMPLES", 100)
    coverage_of_intervals.main()
    printed = capsys.readouterr().out.splitlines()
    document = (REPOSITORY / "docs" / "human_study.md").read_text()
    table = document[document.index(printed[0]) :].split("\n\n")[0].splitlines()
    assert [line.split("|")[1] for line in table] == [line.split("|")[1] for line in printed]


def changed(ratings: dict, **fields) -> dict:
    lines = ratings["ratings"]
    return {**ratings, "ratings": [{**lines[0], **fields}, *lines[1:]]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: {**r, "study": "0"}, '`study` is "0", the key\'s is'),
        (lambda r: {**r, "study": ["x"]}, '`study` is ["x"]'),
        (lambda r: {**r, "rater": 3}, "`rater` is 3; it must be from 1 to 2"),
        (lambda r: {**r, "rater": True}, "`rater` is true"),
        (lambda r: {**r, "rater": 1.0}, "`rater` is 1.0"),
        (lambda r: {"study": r["study"], "rater": 1}, "`ratings` is missing; export the file"),
        (lambda r: [r], "expected a JSON object"),
        (lambda r: "{", "broken JSON"),
        (lambda r: "[" * 100_000, "unreadable JSON"),
        (lambda r: {**r, "ratings": [3]}, "`ratings[0]` is 3: should be"),
        (lambda r: {**r, "ratings": r["ratings"][1:]}, "1 of 24 ratings are missing; ask the rater for them"),
        (lambda r: {**r, "ratings": [*r["ratings"], r["ratings"][0]]}, "rating 25: `p"),
        (lambda r: changed(r, value=5.01), "`ratings[0].value` is 5.01: should be less than or equal to 5"),
        (
            lambda r: changed(r, value=3.555),
            "`ratings[0].value` is 3.555: should be a multiple of 0.01",
        ),
        (lambda r: changed(r, value=float("nan")), "`ratings[0].value` is NaN"),
        (lambda r: changed(r, value="4"), '`ratings[0].value` is "4"'),
        (lambda r: changed(r, value=True), "`ratings[0].value` is true"),
        (lambda r: changed(r, prompt_id="p9"), 'rating 1: `prompt_id` is "p9", not in this study; export'),
        (lambda r: changed(r, prompt_id=["p0"]), '`ratings[0].prompt_id` is ["p0"]'),
        (lambda r: changed(r, answer=2), "rating 1: `answer` is 2, not in this study"),
        (lambda r: changed(r, answer=1.0), "`ratings[0].answer` is 1.0"),
        (lambda r: changed(r, answer=True), "`ratings[0].answer` is true"),
        (lambda r: changed(r, criterion="beauty"), 'rating 1: `criterion` is "beauty", not in this study'),
        (lambda r: changed(r, criterion=[]), "`ratings[0].criterion` is []"),
    ],
)
def test_what_is_refused(study, tmp_path, change, said):
    path = save(tmp_path, change(rated(study, 1, lambda *_: 3)))
    with pytest.raises(InputError) as error:
        read_ratings(path, read_key(study / "key.json"))
    assert str(error.value).startswith(path) and said in str(error.value)


def test_a_rater_twice_is_refused(study, tmp_path):
    paths = [save(tmp_path, rated(study, 1, lambda *_: 3), name) for name in ("a.json", "b.json")]
    with pytest.raises(InputError, match=r"b\.json: rater 1 is in .*a\.json too"):
        import_ratings(study / "key.json", paths)


def test_a_key_that_is_none(study, tmp_path):
    """Missing, damaged, or with one model renamed: by a changed key marks would go to the wrong model."""
    key = json.loads((study / "key.json").read_text())
    assert study_name(key) == key["study"]
    renamed = {**key, "models": ["beta", "alpha"]}
    for number, (text, said) in enumerate(
        (
            (None, "cannot read the file"),
            ("{", "broken JSON"),
            ("[1]", "expected a JSON object"),
            ("{}", "`study` is null"),
            (json.dumps(renamed), "a changed one"),
            ('{"study": "\\ud800"}', "half a character"),
        )
    ):
        path = tmp_path / f"key-{number}.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(InputError, match=said) as error:
            import_ratings(path, ["ratings.json"])
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_models_that_cannot_be_compared(tmp_path, answered, write_lines):
    a, b, c = (f"{model}={answered(model, count)}" for model, count in (("a", 2), ("b", 3), ("c", 2)))
    other = f"d={write_lines([record('p0', 'x', 'another question'), record('p1', 'y')], 'd.jsonl')}"
    twice = f"e={write_lines([record('p0', 'x'), record('p1', 'y'), record('p0', 'z')], 'e.jsonl')}"
    empty = f"f={write_lines([], 'f.jsonl')}"
    for named, said in (
        ([a], "at least two models"),
        ([f"m{number}={number}" for number in range(27)], "at most 26, here are 27"),
        ([a, a], "`a` is given twice"),
        ([a, "b"], "`b` is no model"),
        ([a, "b=x,"], "`b=x,` is no model"),
        ([a, f"{c},x"], "`c` has 2 files, `a` has 1"),
        ([a, b], r'jsonl:3: prompt "p2" is answered by one of `a` and `b` alone, as 1 are'),
        ([a, other], r'd\.jsonl:1: `prompt` of "p0" is another one than in .*jsonl:1'),
        ([a, twice], r'e\.jsonl:3: `prompt_id` "p0" is there twice, first in .*e\.jsonl:1'),
        ([a, empty], r"f\.jsonl: the file has no answers"),
    ):
        with pytest.raises(InputError, match=said):
            build(tmp_path / "study", named, raters=1)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"raters": 0}, "`--raters` is 0; it must be 1 or more"),
        ({"seed": -1}, "`--seed` is -1; it must be 0 or more"),
        ({"prompts": 0}, "`--prompts` is 0; it must be 1 or more"),
        ({"prompts": -1}, "`--prompts` is -1"),
        ({"prompts": 4}, r"jsonl: `--prompts` is 4, the file has 3; give at most 3"),
        ({"sets": "hh,pku"}, "`--sets` is hh,pku, each model has 1 file;"),
    ],
)
def test_options_that_are_refused(tmp_path, answered, options, said):
    named = [f"{model}={answered(model)}" for model in ("alpha", "beta")]
    with pytest.raises(InputError, match=said):
        build(tmp_path / "study", named, **{"raters": 1, **options})
    assert not (tmp_path / "study").exists()


def test_a_prompt_of_two_data_sets_is_refused(tmp_path, answered):
    named = [f"{model}={answered(model, 3)},{answered(model, 2)}" for model in ("alpha", "beta")]
    with pytest.raises(InputError, match='prompt "p0" is in `data set 1` too'):
        build(tmp_path / "study", named, raters=1)


def test_a_folder_that_cannot_be(tmp_path, answered):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        build(tmp_path / "file", [f"{model}={answered(model)}" for model in ("alpha", "beta")], raters=1)


@pytest.mark.slow
def test_the_commands(tmp_path, answered, run_module):
    """As the documentation has them; bad input is one line and status 2."""
    named = [f"{model}={answered(model)}" for model in ("alpha", "beta")]
    done = run_module("report.study", "build", "--to", tmp_path / "study", "--raters", 1, "--prompts", 2, *named)
    assert done.returncode == 0 and "raters: 1, prompts: 2, models: 2" in done.stdout
    path = save(tmp_path, rated(tmp_path / "study", 1, lambda *_: 3))
    done = run_module("report.study", "import", "--key", tmp_path / "study" / "key.json", path)
    assert done.returncode == 0 and "| alpha | 3.00 [3.00, 3.00] |" in done.stdout
    done = run_module("report.study", "import", "--key", tmp_path / "nowhere.json", path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
