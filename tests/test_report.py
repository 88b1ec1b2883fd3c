"""report/: what reaches a page, the page of a run with and without its parts, the explorer."""

import json
import re

import pytest
from conftest import REPOSITORY, ranked_records

from alignment.plan import plan
from hps.errors import InputError
from hps.manifest import finish
from hps.records import write_json
from report.explore import explorer
from report.figures import curve, histogram, picture
from report.page import render, script_json
from report.run import answers, drawn_places, report
from report.table import page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&amp;"


def data_of(page: str):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


def test_json_cannot_end_its_block():
    text = script_json({"text": HOSTILE})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"text": HOSTILE}


def test_a_page_names_its_own_script_and_style_and_no_other():
    """The hashes of the policy are those of what stands in the page; nothing else may run or load."""
    import base64
    import hashlib

    page = render("explore", HOSTILE, {"records": [], "seed": 0}, path=HOSTILE, count=0, left=0)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    blocks = re.findall(r"<style>(.*?)</style>|<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256("".join(b).encode()).digest()).decode() for b in blocks]
    assert len(hashes) == 2
    assert policy == f"default-src 'none'; img-src data:; style-src '{hashes[0]}'; script-src '{hashes[1]}'"
    assert "<img src=x" not in page and "<script>alert" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_the_same_figures_are_the_same_bytes():
    def one():
        return picture(
            [curve("a", {"b": ([1, 2], [3.0, 4.0])}), histogram("c", {"d": [1.0, 2.0]}, "e")], "text", "caption"
        )

    assert one() == one() and one().source.startswith("data:image/svg+xml;base64,")


def test_places_of_draws_by_hand():
    """y_1 is the third of five: those before it keep their place + 1, those behind it have their own index."""
    row = {"preferred": 2, "dispreferred": [0, 4], "weights": [0.25, 0.75]}
    assert drawn_places(row) == 0.25 * 1 + 0.75 * 4
    assert drawn_places({"preferred": 0, "dispreferred": [1, 3], "weights": None}) == 2


@pytest.fixture
def trained(ranked_recipe):
    """A run folder with plan, log and manifest, as training leaves it."""
    recipe = ranked_recipe()
    plan(recipe)
    finished_training(recipe)
    return recipe


def finished_training(recipe) -> None:
    lines = [
        {"step": step, "loss": 0.7 - 0.1 * step, "gamma": -5.0 + step, "rewards/chosen": 0.1, "rewards/rejected": 0.0}
        | {"rewards/margins": 0.1, "rewards/accuracies": 1.0, "lengths/chosen": 5.0, "lengths/rejected": 6.0}
        for step in (1, 2, 3)
    ]
    run = recipe.run_folder()
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finish(run, recipe, {}, [run / "plan.jsonl", run / "log.jsonl"])


def test_a_run_without_evaluation_says_what_makes_it(trained):
    page = report(trained)
    assert "There are no held-out figures yet: <code>bash run.sh RECIPE</code>" in page
    assert page.count("<code>bash evaluate.sh RECIPE</code>") == 2
    assert data_of(page) == {"answers": []}
    assert page.count("<img src=") == 3  # training, rewards, lengths
    assert report(trained) == page


def test_a_run_that_is_not_finished_is_refused(trained):
    (trained.run_folder() / "manifest.json").unlink()
    with pytest.raises(InputError, match="the run is not finished"):
        report(trained)


def evaluated(recipe) -> None:
    """Answers and scores of two prompts before and after, one of them hostile, and held-out figures."""
    figure = {"mean": 0.5, "interval": [0.25, 0.75]}
    run, sft = recipe.run_folder(), recipe.sft_folder()
    for number, folder in enumerate((sft, run)):
        (folder / "answers").mkdir(parents=True)
        (folder / "scores").mkdir()
        texts = [[HOSTILE, "b"], ["c", "d"]]
        for name, write in (("answers/test.jsonl", True), ("scores/scores.jsonl", False)):
            lines = []
            for prompt, pair in zip(("p1", "p2"), texts, strict=True):
                answer = {"prompt_id": prompt, "prompt": [{"role": "user", "content": f"{prompt} {HOSTILE}"}]}
                answer |= {"responses": pair, "token_counts": [3, 4], "truncated": [False, True]}
                score = {"prompt_id": prompt, "answers": [{"score": 1.0 + number}, {"score": 2.0}], "given": []}
                lines.append(json.dumps(answer if write else score) + "\n")
            (folder / name).write_text("".join(lines))
        write_json(folder / "scores" / "manifest.json", {})
    pair = {"set": "ranked", "reference": [-3.0, -2.0], "policy": [-2.0, -2.0]}
    (run / "evaluation").mkdir()
    (run / "evaluation" / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    sets = {"ranked": {"pairs": 1, "rm_dpo": figure, "along": [{"step": 1, "rm_dpo": figure}]}}
    write_json(run / "evaluation" / "margins.json", {"sets": sets})
    write_json(run / "metrics.json", {"prompts": 2, "figures": {"reward_best": figure}})


def test_answers_stand_side_by_side_with_scores(trained, monkeypatch):
    evaluated(trained)
    shown, left = answers(trained)
    assert left == 0 and [entry["prompt"][0]["content"][:2] for entry in shown] == ["p1", "p2"]
    assert [answer["score"] for answer in shown[0]["before"]] == [2.0, 1.0]
    assert shown[0]["after"][0] == {"text": HOSTILE, "score": 2.0, "tokens": 3, "cut": False}
    page = report(trained)
    assert data_of(page)["answers"] == shown
    assert "0.500</td><td>[0.250, 0.750]" in page and "Sampled answers to 2 test prompts" in page
    assert "<script>alert" not in page and "<img src=x" not in page
    monkeypatch.setattr("report.run.MOST_ANSWERS", 1)
    assert answers(trained)[1] == 1 and "1 more are left out of this page" in report(trained)


TABLES = sorted((REPOSITORY / "results" / "quickstart").glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_committed_table_has_a_page(path):
    """Each row, ours and the paper's figure as the Markdown has them."""
    text = page(path)
    table = json.loads(path.read_text())
    assert text.count("<img src=") >= 2 * len(table["parts"])
    for part in table["parts"]:
        for row in part["rows"]:
            assert f'<th scope="row">{row["label"]}</th>' in text
            for entry in row["figures"].values():
                if "paper" in entry and "mean" in entry:
                    assert f"paper {entry['paper']:g} ({entry['difference']:+.3f})" in text


@pytest.mark.parametrize(("content", "said"), [(None, "cannot read the file"), ("{", "no table"), ("{}", "no table")])
def test_what_is_no_table(tmp_path, content, said):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        page(path)


def test_the_explorer_holds_what_it_says(write_lines):
    path = write_lines(ranked_records(5), "run/ranked/train.jsonl")
    page = explorer(path, 3, 7)
    assert "3 prompts, 2 more are left out" in page
    found = data_of(page)
    assert found["seed"] == 7 and [r["rewards"] for r in found["records"]] == [
        r["rewards"] for r in ranked_records(5)[:3]
    ]
    with pytest.raises(InputError, match="the file has no prompts"):
        explorer(write_lines([], "empty.jsonl"), 3, 7)
