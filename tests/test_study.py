"""report/study.py: what raters see, what is refused, means and agreement by hand."""

import json

import numpy as np
import pytest

from hps.errors import InputError
from report.study import agreement, build, figures, import_ratings, order_of, read_ratings, table

CRITERIA = ["correctness", "helpfulness", "safety", "clarity"]


@pytest.fixture
def study(tmp_path, write_lines):
    """Two models, three prompts, two raters; the key."""

    def answers(name: str) -> str:
        records = [
            {"prompt_id": f"p{number}", "prompt": [{"role": "user", "content": f"Question {number}"}]}
            | {"responses": [f"{name} {number}"], "token_counts": [2], "truncated": [False]}
            for number in range(3)
        ]
        return f"{name}={write_lines(records, f'{name}.jsonl')}"

    build(tmp_path / "study", [answers("alpha"), answers("beta")], raters=2, seed=5, prompts=None)
    return tmp_path / "study"


def key_of(study) -> dict:
    return json.loads((study / "key.json").read_text())


def data_of(study, rater: int) -> dict:
    page = (study / f"rater-{rater}.html").read_text()
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


def save(tmp_path, ratings: dict, name: str = "ratings.json") -> str:
    path = tmp_path / name
    path.write_text(json.dumps(ratings))
    return str(path)


def test_raters_see_every_prompt_and_answer_without_names(study):
    key = key_of(study)
    assert key["models"] == ["alpha", "beta"] and key["criteria"] == CRITERIA and key["prompts"] == ["p0", "p1", "p2"]
    for rater in (1, 2):
        data = data_of(study, rater)
        assert {item["id"] for item in data["items"]} == {"p0", "p1", "p2"}
        for item in data["items"]:
            number = item["id"][1]
            assert sorted(item["answers"]) == [f"alpha {number}", f"beta {number}"]
        assert set(data) == {"study", "rater", "items", "criteria"}
        assert set(data["items"][0]) == {"id", "prompt", "answers"}  # nothing that tells the models


def test_orders_depend_on_seed_and_rater_alone():
    prompts = [f"p{number}" for number in range(40)]
    first = order_of(5, 1, prompts, 3)
    assert first == order_of(5, 1, prompts, 3)
    assert first != order_of(5, 2, prompts, 3) and first != order_of(6, 1, prompts, 3)
    assert sorted(name for name, _ in first) == sorted(prompts)
    # Each model is first about as often as the others: of 40, 13.3 are expected.
    counts = np.bincount([order[0] for _, order in first], minlength=3)
    assert counts.min() >= 5


def test_ratings_come_back_to_their_models(study, tmp_path):
    """alpha gets 4, beta 2 from both, however they were shuffled; then everything agrees."""

    def value(text, criterion):
        return 4 if text.startswith("alpha") else 2

    files = [save(tmp_path, rated(study, rater, value), f"{rater}.json") for rater in (1, 2)]
    result = import_ratings(study / "key.json", files)
    assert result["means"]["alpha"]["average"] == {"mean": 4.0, "interval": [4.0, 4.0]}
    assert result["means"]["beta"]["safety"] == {"mean": 2.0, "interval": [2.0, 2.0]}
    assert result["agreement"] == dict.fromkeys([*CRITERIA, "average"], 1.0)
    assert result["missing_raters"] == [] and json.loads((study / "study.json").read_text()) == result
    text = (study / "study.md").read_text()
    assert "| alpha | 4.00 [4.00, 4.00] |" in text and "| DPO-HPS | 3.93 |" in text


def test_a_rater_that_is_not_in_yet_is_named(study, tmp_path):
    path = save(tmp_path, rated(study, 2, lambda *_: 3))
    result = import_ratings(study / "key.json", [path])
    assert result["missing_raters"] == [1] and result["agreement"]["safety"] is None
    assert "Not in yet: raters 1." in table(result, key_of(study))


def test_agreement_by_hand():
    """Two raters, units (1, 2), (3, 3): D_o = mean squared difference within units = (1 + 0) / 2 = 1/2.

    D_e over all 4 values 1, 2, 3, 3 = mean of squared differences of the 12 ordered pairs
    = 2 (1 + 4 + 4 + 1 + 1 + 0) / 12 = 22/12. alpha = 1 - (1/2) / (22/12) = 1 - 3/11 = 8/11.
    """
    assert agreement(np.array([[1.0, 3.0], [2.0, 3.0]])) == pytest.approx(8 / 11, abs=1e-4)
    assert agreement(np.array([[1.0, 3.0]])) is None and agreement(np.full((2, 3), 4.0)) is None


def test_means_by_hand():
    """Raters 2 and 4 on one model, criteria alike; prompts 2, 4 and 4, 6 minus: means 3 and 4 over the prompts."""
    ratings = np.array([[[[1.0] * 4], [[3.0] * 4]], [[[2.0] * 4], [[4.0] * 4]]])
    key = {"models": ["m"], "criteria": CRITERIA, "seed": 0}
    found = figures(ratings, key)["means"]["m"]
    assert found["clarity"]["mean"] == 2.5 and found["average"]["mean"] == 2.5
    assert found["clarity"]["interval"] == [1.5, 3.5]  # of two prompts, 1.5 and 3.5


def changed(ratings: dict, **fields) -> dict:
    lines = ratings["ratings"]
    return {**ratings, "ratings": [{**lines[0], **fields}, *lines[1:]]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: {**r, "study": "0"}, "`study` is 0, the key's is"),
        (lambda r: {**r, "rater": 3}, "`rater` is 3; it must be from 1 to 2"),
        (lambda r: {**r, "rater": True}, "`rater` is True"),
        (lambda r: {"study": r["study"], "rater": 1}, "no ratings (KeyError: 'ratings')"),
        (lambda r: {**r, "ratings": r["ratings"][1:]}, "1 of 24 ratings are missing; ask the rater for them"),
        (lambda r: {**r, "ratings": [*r["ratings"], r["ratings"][0]]}, "rating 25: `p"),
        (lambda r: changed(r, value=5.01), "rating 1: `value` is 5.01; it must be from 1.00 to 5.00"),
        (lambda r: changed(r, value="4"), "rating 1: `value` is 4"),
        (lambda r: changed(r, prompt_id="p9"), "rating 1: there is no `p9`"),
        (lambda r: changed(r, answer=2), "answer 2"),
        (lambda r: changed(r, criterion="beauty"), "`beauty`"),
    ],
)
def test_what_is_refused(study, tmp_path, change, said):
    path = save(tmp_path, change(rated(study, 1, lambda *_: 3)))
    with pytest.raises(InputError) as error:
        read_ratings(path, key_of(study))
    assert str(error.value).startswith(path) and said in str(error.value)


def test_a_rater_twice_is_refused(study, tmp_path):
    paths = [save(tmp_path, rated(study, 1, lambda *_: 3), name) for name in ("a.json", "b.json")]
    with pytest.raises(InputError, match=r"b\.json: rater 1 stands in .*a\.json too"):
        import_ratings(study / "key.json", paths)


def test_models_that_cannot_be_compared(tmp_path, write_lines):
    def answers(name: str, count: int) -> str:
        records = [
            {"prompt_id": f"p{number}", "prompt": [{"role": "user", "content": "?"}]}
            | {"responses": ["x"], "token_counts": [1], "truncated": [False]}
            for number in range(count)
        ]
        return f"{name}={write_lines(records, f'{name}.jsonl')}"

    a, b = answers("a", 2), answers("b", 3)
    for named, said in (
        ([a], "at least two models"),
        ([a, a], "`a` is given twice"),
        ([a, "b"], "`b` is no model"),
        ([a, b], "prompt `p2` is answered by one of `a` and `b` alone, as 1 are"),
    ):
        with pytest.raises(InputError, match=said):
            build(tmp_path / "study", named, 1, 0, None)
