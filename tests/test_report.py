"""report/: what reaches a page, the page of a run with and without its parts, the explorer, pages of tables."""

import json
import re
import shutil
from array import array
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, make_plan, ranked_records
from matplotlib.figure import Figure

from alignment.plan import plan, run_settings
from evaluation.intervals import FEW, estimate, few, figure, signed
from evaluation.render import number
from hps.errors import InputError
from hps.planning import row_figures, training_list
from hps.settings import Loss
from pipeline.files import file_hash, write_json
from pipeline.records import Lines
from pipeline.stage import Work, claim, write_manifest
from report import answer_examples as answers_of
from report import draws, run_pictures
from report.draws import Draws
from report.explore import explorer
from report.origin import origin
from report.page import HERE, counted, cut_texts, fitting, render, script_json
from report.pictures import (
    MOST_POINTS,
    MOST_STEPS,
    curve,
    forest,
    frontier_panels,
    histogram,
    picture,
    scatter,
    thinned,
)
from report.run import report
from report.table import page

pytestmark = pytest.mark.slow

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&amp;"


def data_of(page: str):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(text)


# ---- what every page has in common ----


def test_json_cannot_end_its_block():
    text = script_json({"text": HOSTILE})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"text": HOSTILE}


def test_a_page_names_its_own_script_and_style_and_no_other():
    """The hashes of the policy are those of what stands in the page; nothing else may run, load, or change its base."""
    import base64
    import hashlib

    page = render("explore", HOSTILE, {"records": [], "seed": 0}, path=HOSTILE, count=0, left=0, full=False)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    blocks = re.findall(r"<style>(.*?)</style>|<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = ["sha256-" + base64.b64encode(hashlib.sha256("".join(b).encode()).digest()).decode() for b in blocks]
    assert len(hashes) == 2
    assert policy == (
        f"default-src 'none'; img-src data:; style-src '{hashes[0]}'; script-src '{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    assert "<img src=x" not in page and "<script>alert" not in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_numbers_as_pages_write_them():
    """No sign before a zero; `1 prompt`."""
    assert [figure(value) for value in (-0.0004, 0.0, -0.0006, None)] == ["0.000", "0.000", "-0.001", "–"]
    assert [signed(value) for value in (-0.0004, 0.0004, 0.5, -0.5)] == ["0.000", "0.000", "+0.500", "-0.500"]
    assert [counted(count, "prompt") for count in (1, 2, 60000)] == ["1 prompt", "2 prompts", "60,000 prompts"]
    entry = {"mean": -0.0001, "interval": [-0.004, 1.0]}
    assert (estimate(entry, 2), estimate(entry, 2, signed)) == ("0.00 [-0.00, 1.00]", "0.00 [-0.00, +1.00]")
    assert number({"mean": -0.0001, "interval": [-0.0001, 1.0], "before_first_point": True}) == "0.000 [-0.000, 1.000]†"


def test_every_class_of_the_style_is_used():
    """A page has it in its template or sets it in its script."""
    style = (HERE / "static" / "page.css").read_text()
    using = "".join(path.read_text() for path in [*HERE.glob("templates/*"), *HERE.glob("static/*.js")])
    names = set(re.findall(r"\.([a-z][a-z-]*)(?=[^{}]*\{)", style))
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"""["' ]{name}["' ]""", using)] == []
    assert max(style.count(f"\n{name} {{") for name in (".wide", ".item", ".problem:empty", "table")) == 1


def test_texts_are_cut_and_say_so():
    """Seven characters to three; keys, numbers and short texts stay."""
    cut = cut_texts({"a": ["abcdefg", "abc"], "b": 1.5}, 3)
    assert cut == {"a": ["abc … [4 more characters are left out of this page]", "abc"], "b": 1.5}


def test_a_page_takes_the_first_entries_that_fit():
    """An entry `{"t": "..."}` of 100 letters has 108 bytes: two fit in 250, and the first one always does."""
    entries = [{"t": "x" * 100}] * 5
    assert [len(fitting(entries, most, room)) for most, room in ((9, 250), (1, 250), (9, 10**6))] == [2, 1, 5]
    (alone,) = fitting([{"t": "<" * 100_000}], 9, 1000)
    assert len(script_json(alone)) <= 1000 and "are left out of this page" in alone["t"]


# ---- pictures ----


def test_the_same_figures_are_the_same_bytes():
    def one():
        return [picture("x", curve, "a", {"b": ([1, 2], [3.0, 4.0])}), picture("y", histogram, "c", {"d": [1.0]}, "e")]

    assert one() == one() and one()[0].source.startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize("name", ["$x_{$", "_hidden", "x" * 10_000, "a\nb"])
def test_names_of_the_data_are_text_in_a_picture(name):
    """A `$` begins no formula, and matplotlib's own rules for names hide none."""
    drawn = picture("text", histogram, "rewards", {name: [1.0, 2.0], "other": [1.0]}, "reward")
    plain = picture("text", histogram, "rewards", {"other": [1.0]}, "reward")
    assert len(plain.source) < len(drawn.source) < 100_000


def test_long_curves_become_means():
    """800 steps are twice what a curve shows: means of two."""
    steps, values, window = thinned(range(1, 2 * MOST_STEPS + 1), [0.0, 1.0] * MOST_STEPS)
    assert window == 2 and len(steps) == MOST_STEPS and set(values) == {0.5} and list(steps[:2]) == [1.5, 3.5]
    assert thinned([1, 2], [3.0, 4.0])[2] == 1


def test_many_points_are_a_sample():
    """Thirty times the points make no larger picture."""
    sizes = []
    for count in (MOST_POINTS, 30 * MOST_POINTS):
        values = [0.001 * (number % 977) for number in range(count)]
        groups = ["all"] * count
        sizes.append(len(picture("text", scatter, "t", values, values[::-1], groups, "x", "y").source))
    assert sizes[1] < 1.1 * sizes[0] < 600_000


# ---- draws ----


def test_places_of_draws_by_hand():
    """y_1 is the third of five; the list without it is 0, 1, 3, 4: index 0 has place 1, index 4 place 4."""
    from pipeline.recipe import load_recipe

    record = {"prompt_id": "p", "rewards": [9.0, 5.0, 4.0, 2.0, 1.0], "token_counts": [5, 4, 10, 2, 1]}
    record["sources"] = ["generated", "generated", "given_1", "given_2", "generated"]
    record |= {"responses": list("abcde"), "truncated": [False] * 5}
    row = {"preferred": 2, "dispreferred": [0, 4], "weights": [0.25, 0.75]}
    recipe = load_recipe(REPOSITORY / "configs" / "quickstart.yaml", ["schedule.best=human"])
    listed, _ = training_list(record, recipe.loss, recipe.schedule, recipe.seed)
    figures = {"rank": 0.25 * 1 + 0.75 * 4, "reward_gap": 4 - (0.25 * 9 + 0.75 * 1)}
    assert row_figures(row, record, listed, recipe.loss) == figures | {"length_gap": 10 - (0.25 * 5 + 0.75 * 1)}


VARIANTS = (
    (),
    ("schedule.subsample=3",),
    ("schedule.ties=exclude",),
    ("schedule.best=human", "schedule.ties=exclude"),
    ("schedule.standardize_rewards=true", "loss.samples=3"),
    ("loss.estimator=exact",),
    ("loss.preference=bt", "schedule.subsample=4"),
    ("loss.preference=pl", "loss.list_size=3"),
    ("loss.positives=2", "loss.appendix_e_reading=intended"),
    ("loss.positives=2", "schedule.ties=exclude"),
)


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_draws_agree_with_the_plans_own_table(ranked_recipe, write_lines, overrides):
    """Rank, reward gap and length gap: their means by stage are the plan's diagnostics, whatever the settings."""
    recipe = ranked_recipe(*overrides)
    records = ranked_records(8, responses=6)
    for record in records:  # y_1 and the next one tie
        record["rewards"][1] = record["rewards"][0]
    rows, facts = make_plan(records, recipe)
    path = write_lines(rows, "plan.jsonl")
    found, _ = draws.read_draws(Lines(path), write_lines(records[::-1], "ranked.jsonl"), recipe)
    stages, first = facts["stages"], 0
    for stage in stages:
        last = first + stage["rows"]
        for name, values in zip(("rank", "reward_gap", "length_gap"), found.figures, strict=True):
            assert sum(values[first:last]) / stage["rows"] == pytest.approx(stage[name], abs=6e-4), (stage, name)
        first = last
    assert first == len(rows) == len(found.step)


def test_a_plan_of_another_ranked_file_is_refused(ranked_recipe, write_lines):
    recipe = ranked_recipe()
    records = ranked_records(4)
    rows, _ = make_plan(records, recipe)
    lines = Lines(write_lines(rows, "plan.jsonl"))
    with pytest.raises(InputError, match=r"plan.jsonl:\d+: the row does not fit the ranked file"):
        draws.read_draws(lines, write_lines(records[1:], "fewer.jsonl"), recipe)
    short = [
        {name: value[:2] if isinstance(value, list) and name != "prompt" else value for name, value in record.items()}
        for record in records
    ]
    with pytest.raises(InputError, match=r"plan.jsonl:\d+: the row does not fit the ranked file"):
        draws.read_draws(lines, write_lines(short, "short.jsonl"), recipe)


def test_rewards_by_source(write_lines):
    """The first two given ones apart, later ones together."""
    record = ranked_records(1, responses=9)[0]
    record["sources"] = ["given_1", "given_2", "given_3", "given_4", "a", "a", "b", "c", "d"]
    groups = draws.rewards_by_source(write_lines([record], "ranked.jsonl"))
    assert {name: len(values) for name, values in groups.items()} == {
        **{"given_1": 1, "given_2": 1, "given_3 and later": 2, "a": 2},
        **{"b": 1, "c": 1, "d": 1},
    }
    assert isinstance(groups["a"], array) and groups["a"].itemsize == 4


# ---- the page of a run ----


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
        | {"s/chosen": 1.0 - step, "s/rejected": 0.0 - step, "s_per_token/chosen": 0.2, "s_per_token/rejected": 0.0}
        for step in (1, 2, 3)
    ]
    folder = recipe.run_folder()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outputs = [folder / "plan.jsonl", folder / "log.jsonl"]
    Work(folder, recipe, run_settings(recipe)).finish(outputs, [recipe.ranked("train")])


def pictures(page: str) -> list[str]:
    """What the pictures of a page show, in words."""
    return re.findall(r'<img src="[^"]*" alt="([^"]*)"', page)


def test_a_run_without_evaluation_says_what_makes_it(trained):
    page = report(trained, ["configs/mine.yaml", "loss.beta=0.5"])
    assert "There are no held-out figures yet: <code>bash run.sh configs/mine.yaml loss.beta=0.5</code>" in page
    assert page.count("<code>bash evaluate.sh configs/mine.yaml loss.beta=0.5</code>") == 2
    assert data_of(page) == {"answers": []}
    shown = [re.split("[,:;]", text)[0] for text in pictures(page)]
    assert shown == [
        *("loss (nats)", "implicit reward (beta x nats)", "gamma", "hardness", "share of pairs in order"),
        "response length (tokens)",
        *("log-probability", "log-probability", "Rewards of the candidates of train prompts by source"),
        *("Rewards of the candidates of test prompts by source", "Each of 16 rows of the plan"),
    ]
    assert "loss (nats), over steps 1 to 3: loss from 0.600 to 0.400." in pictures(page)
    assert report(trained, ["configs/mine.yaml", "loss.beta=0.5"]) == page


def test_a_run_that_is_not_finished_is_refused(trained):
    (trained.run_folder() / "manifest.json").unlink()
    with pytest.raises(InputError, match="the run is not finished"):
        report(trained, [])


def test_the_recipe_is_that_of_the_training(ranked_recipe, trained):
    """Whatever the command line says now: the page describes what was trained."""
    page = report(ranked_recipe("loss.family=ipo", "run=dpo-hps"), [])
    assert "dpo under hps, 3 steps" in page and "family: dpo" in page and "family: ipo" not in page


def evaluated(recipe, gains: tuple[float, ...] = (1.0, -0.5)) -> None:
    """Answers and scores before and after of a prompt for each gain, one of them hostile, and held-out figures."""
    entry = {"mean": 0.5, "interval": [0.25, 0.75]}
    folders = recipe.tested().sft_folder(), recipe.evaluated_folder()
    for after, folder in enumerate(folders):
        (folder / "answers").mkdir(parents=True)
        (folder / "scores").mkdir()
        lines = {"answers/test.jsonl": [], "scores/scores.jsonl": []}
        for place, gain in enumerate(gains, 1):
            prompt = {"prompt_id": f"p{place}", "prompt": [{"role": "user", "content": f"p{place} {HOSTILE}"}]}
            texts = {"responses": [HOSTILE, "b"], "token_counts": [1, 4], "truncated": [False, True]}
            lines["answers/test.jsonl"].append(prompt | texts)
            scores = [{"score": 2.0 + gain * after}, {"score": 1.0}]
            lines["scores/scores.jsonl"].append({"prompt_id": f"p{place}", "answers": scores, "given": []})
        for name, records in lines.items():
            (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
            claim((folder / name).parent, {})
            Work((folder / name).parent, recipe, {}).finish([folder / name])
    pair = {"set": "ranked", "prompt_id": "p1", "prompt": [{"role": "user", "content": "p1"}], "responses": ["a", "b"]}
    pair |= {"truncated": [False, False], "tokens": [1, 1]}
    pair |= {"reference": [-3.0, -2.0], "policy": [-2.0, -2.0], "kl": [0.5]}
    target = recipe.evaluated_folder() / "evaluation"
    target.mkdir()
    (target / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    fell, before = ({"mean": mean, "interval": [mean - 0.75, mean + 0.75]} for mean in (-1.25, -0.25))
    figures = {"rm_dpo": entry, "s_1": fell, "s_1_per_token": fell}
    along = [{"step": 1, "rm_dpo": entry, "s_1": before, "s_1_per_token": before}]
    sets = {"ranked": {"pairs": 1, **figures, "along": along}}
    write_json(target / "margins.json", {"sets": sets, "flags": [f"fell {HOSTILE}"]})
    write_json(target.with_name("metrics.json"), {"prompts": 2, "figures": {"reward_best": entry}})
    before = {"prompts": 2, "figures": {"reward_best": entry | {"mean": 0.375}}}
    write_json(recipe.tested().sft_folder() / "metrics.json", before)


def judged(recipe) -> None:
    """A win rate as evaluation.win_rate writes it."""
    outcomes = {"win": 60.0, "lose": 30.0, "tie": 10.0}
    found = {
        name: {"count": 1, "percent": value, "interval": [value - 5, value + 5]} for name, value in outcomes.items()
    }
    average = {"average": {"mean": 3.25, "interval": [3.0, 3.5]}}
    found |= {"prompts": 1, "left_out": {"run, verdicts: no scores": 2}, "flags": [f"constant judge? {HOSTILE}"]}
    found["scores"] = {"run": average, "against": average}
    folder = Path(recipe.output) / "judge"
    folder.mkdir()
    verdicts = folder / "0123456789abcdef.jsonl"
    verdicts.write_text("{}\n")
    settings = {"model": {"weights": "the hash of the judge"}}
    write_manifest(folder / "0123456789abcdef.manifest.json", recipe, settings, [verdicts], {})
    figures = {"verdicts": verdicts.name, "against": {"runs/x/sft": found}}
    write_json(recipe.evaluated_folder() / "win_rate.json", figures)


def test_answers_stand_side_by_side_with_scores(trained, monkeypatch):
    evaluated(trained)
    shown, left = answers_of.answers(trained)
    assert left == 0 and [entry["id"] for entry in shown] == ["p1", "p2"]
    assert [answer["score"] for answer in shown[0]["before"]] == [2.0, 1.0]
    assert shown[0]["after"][0] == {"text": HOSTILE, "score": 3.0, "tokens": 1, "cut": False}
    proxies = trained.run_folder() / "proxy_scores"  # of what ranked, where it has scored the answers, too
    shutil.copytree(trained.run_folder() / "scores", proxies)
    assert answers_of.answers(trained)[0][0]["after"][0]["proxy"] == 3.0
    shutil.rmtree(proxies)
    page = report(trained, ["mine.yaml"])
    assert data_of(page)["answers"] == shown
    assert "0.500</td><td>[0.250, 0.750]" in page
    assert f"Sampled answers to 2 test prompts, rewards by {trained.models.evaluator.path}" in page
    assert 'reward, best answer<br><span class="soft">before: 0.375</span>' in page
    assert "There is no win rate by a judge: <code>bash evaluate.sh mine.yaml judge.enabled=true" in page
    assert "Held-out pairs, ranked (1 pair)" in page
    assert "<script>alert" not in page and "<img src=x" not in page
    texts = {"responses": ["a"], "token_counts": [1], "truncated": [False]}
    with (trained.run_folder() / "answers" / "test.jsonl").open("a") as file:  # a prompt that one model has answered
        file.write(json.dumps({"prompt_id": "p9", "prompt": [{"role": "user", "content": "q"}]} | texts) + "\n")
    assert answers_of.answers(trained)[1] == 1
    monkeypatch.setattr(answers_of, "MOST_PROMPTS", 1)
    assert answers_of.answers(trained)[1] == 2 and "2 more are left out of this page" in report(trained, [])


def test_the_page_opens_with_what_training_changed(trained):
    evaluated(trained)
    trained.evaluation.answers = 2
    path = trained.evaluated_folder() / "metrics.json"
    entry = {"mean": 0.25, "interval": [0.125, 0.375]}
    names = ("reward_mean", "reward_mean_change", "reward_win_rate", "kl_sampled", "tokens_mean")
    for each in (path, trained.sft_folder() / "metrics.json"):
        write_json(each, {"prompts": 2, "samples": 2, "figures": dict.fromkeys(names, entry)})
    page = report(trained, [])
    before, after = page.index('<h2 id="learned">'), page.index('<h2 id="figures">')
    opening = page[before:after]
    assert "change, prompt by prompt</th><td>+0.250 [+0.125, +0.375]</td>" in opening
    assert opening.count("<article") == 2 and opening.count("reward 1.000") == 4  # the lower of two answers
    assert "&lt;script&gt;alert" in opening and "<script>alert" not in page


def test_figures_stand_where_their_scores_were_deleted(trained):
    evaluated(trained)
    shutil.rmtree(trained.run_folder() / "scores")
    assert "Sampled answers to 2 test prompts<" in report(trained, [])


def test_margins_along_the_training_begin_at_zero_and_end_at_its_end(trained):
    """The log has three steps; the adapter was kept at the first."""
    evaluated(trained)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_pictures, "intervals", lambda axis, title, points, up: drawn.append(points))
        report(trained, [])
    (points,) = drawn
    assert [(step, entry["mean"]) for step, entry in points["ranked pairs"]] == [(0, 0.0), (1, 0.5), (3, 0.5)]


def test_displacement_on_the_page(trained):
    """Both panels: s by step, and the held-out pairs from zero over step 1 to the end at step 3."""
    evaluated(trained)
    page = report(trained, [])
    (text,) = [each for each in pictures(page) if each.startswith("log-probability: change (nats a response)")]
    assert text.endswith(
        ", at the end: y_1 of the training -2.000, its negatives -3.000, y_1 of ranked test pairs -1.250."
    )
    assert page.count('href="#displacement"') == 1 and 'id="displacement"' in page
    assert "log-probability of y_1: change (nats)</th><td>-1.250</td><td>[-2.000, -0.500]" in page
    assert f'<p class="warning">Warning: fell {HOSTILE[:2]}' not in page and "Warning: fell &lt;/script&gt;" in page
    path = trained.evaluated_folder() / "evaluation" / "margins.json"
    found = json.loads(path.read_text())["sets"]["ranked"]
    along = run_pictures.good_along({"ranked": found}, 3)["s_1"]["ranked"]
    assert [(step, entry["mean"]) for step, entry in along] == [(0, 0.0), (1, -0.25), (3, -1.25)]


def test_a_training_whose_preferred_responses_fell_has_a_warning(trained):
    """Its last two of ten steps; of the three that the fixture has, a fifth is none."""
    assert "Warning: the preferred responses of the training" not in report(trained, [])
    path = trained.run_folder() / "log.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    fell = [line | {"step": step, "s/chosen": -4.0 - step / 10} for step in range(1, 11)]
    path.write_text("".join(json.dumps(each) + "\n" for each in fell))
    page = report(trained, [])
    assert "Warning: the preferred responses of the training became less probable than before training" in page
    assert "is -4.950 [-5.585, -4.315] nats a response" in page  # t(1) = 12.706 times 0.05


def test_runs_of_earlier_versions_have_a_page_without_displacement(trained):
    """Neither their log nor their held-out figures have s."""
    evaluated(trained)
    path, log = trained.evaluated_folder() / "evaluation" / "margins.json", trained.run_folder() / "log.jsonl"
    found = json.loads(path.read_text())
    del found["flags"], found["sets"]["ranked"]["s_1"], found["sets"]["ranked"]["s_1_per_token"]
    write_json(path, found)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    old = [{name: value for name, value in line.items() if not name.startswith(("s/", "s_per"))} for line in lines]
    log.write_text("".join(json.dumps(line) + "\n" for line in old))
    page = report(trained, [])
    assert "isplacement" not in page and "log-probability of y_1" not in page and "Held-out pairs, ranked" in page


def test_gamma_and_hardness_are_of_hps_alone():
    """Logs of other preference models that an earlier version wrote have a gamma, which says nothing."""
    lines = [{"step": step, "loss": 0.5, "gamma": 0.0, "rewards/accuracies": 0.5} for step in (1, 2)]
    titles = {}
    for name, loss in {"hps": Loss(), "bt": Loss(preference="bt"), "worst": Loss(negatives="worst")}.items():
        found = run_pictures.training(lines, Draws(np.array([1, 2]), np.zeros(2), np.array([[3.0, 1.0]])), loss)
        titles[name] = [panel.text.partition(",")[0] for panel in found.panels]
        assert ("gamma" in found.caption) == (name == "hps")
    assert titles["bt"] == ["loss (nats)", "share of pairs in order"]
    assert set(titles["hps"]) - set(titles["bt"]) == {"gamma", "hardness: rank of the drawn (1 = hardest)"}
    assert set(titles["worst"]) == set(titles["hps"]) - {"gamma"}


def test_missing_figures_leave_a_gap():
    """Step 2 has no gamma and a loss that is not a number; no line has lengths, so they have no panel."""
    lines = [{"step": 1, "loss": 0.5, "gamma": 1.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 1.5, "gamma": 2.0}]
    assert run_pictures.series(lines, "gamma") == ([1, 3], [1.0, 2.0])
    steps, losses = run_pictures.series(lines, "loss")
    assert steps == [1, 2, 3] and losses[0] == 0.5 and losses[1] != losses[1] and losses[2] == 1.5
    titles = [panel.text.partition(",")[0] for panel in run_pictures.training(lines, None, Loss()).panels]
    assert titles == ["loss (nats)", "gamma"]


def test_the_papers_figures_do_not_stretch_the_scale():
    """A bar within the scale of ours, an arrow at the edge that is nearer to what lies beyond."""
    axis = Figure().subplots()
    entries = [{"mean": 1.0, "interval": [0.5, 1.5], "paper": paper} for paper in (1.2, 90.0, -90.0)]
    forest(axis, "x", [(str(place), entry) for place, entry in enumerate(entries)], zero=False)
    left, right = axis.get_xlim()
    assert 0 < left < 0.5 and 1.5 < right < 2
    marks = [(line.get_marker(), line.get_xdata()[0]) for line in axis.lines if line.get_color() == "tab:red"]
    assert marks == [("<", left), (">", right), ("|", 1.2)]


def test_few_prompts_have_intervals_that_are_too_narrow():
    assert few(FEW) == "" and "too narrow" in few(FEW - 1)


def test_the_win_rate_stands_on_the_page(trained):
    evaluated(trained)
    judged(trained)
    page = report(trained, [])
    assert "There is no win rate" not in page
    assert "Win rate by the judge against runs/x/sft (1 prompt)" in page
    assert "60.0</td><td>[55.0, 65.0]" in page and "3.25</td><td>[3.00, 3.50]" in page
    assert "constant judge?" in page and "2 (run, verdicts: no scores)" in page and "<script>alert" not in page


def test_where_a_run_comes_from(trained):
    """Hashes of inputs, outputs and models, versions and commits of every stage that left a manifest."""
    evaluated(trained)
    page = report(trained, [])
    folder = trained.run_folder()
    for path in (trained.ranked("train"), folder / "plan.jsonl", folder / "scores" / "scores.jsonl"):
        assert f'<th scope="row">{path}</th><td><code>{file_hash(path)}</code>' in page
    assert run_settings(trained)["policy"]["weights"] in page and trained.models.policy.path in page
    assert page.count("transformers ") == 5  # of the training, answers and scores of both models
    assert "was not the same for all stages" not in page
    judged(trained)
    page, folder = report(trained, []), Path(trained.output) / "judge"
    assert f'<th scope="row">{folder / "0123456789abcdef"}</th>' in page and page.count("transformers ") == 6
    assert f"{file_hash(folder / '0123456789abcdef.jsonl')}</code>" in page
    judge = trained.models.judge.path
    assert f'<th scope="row">judge</th><td class="words">{judge}</td><td><code>the hash of the judge' in page


def test_a_file_that_two_stages_know_differently(trained):
    """Ranked again after the training, then scored: the page says which stage knew which file."""
    evaluated(trained)
    ranked, scores = trained.ranked("train"), trained.run_folder() / "scores"
    before = file_hash(ranked)
    ranked.write_text(ranked.read_text() + "\n")
    write_manifest(scores / "manifest.json", trained, {}, [], {str(ranked): file_hash(ranked)})
    (found,) = origin(trained)["changed"]
    assert found == (str(ranked), {before: [str(trained.run_folder())], file_hash(ranked): [str(scores)]})


def test_another_test_set_has_a_page_of_its_own(ranked_recipe, trained, tmp_path, run_module):
    """Transfer (`evaluation.on`): a page in its own folder, that names the test set; the run's page stays."""
    recipe_path = tmp_path / "recipe.yaml"
    other = tmp_path / "other.yaml"
    other.write_text(recipe_path.read_text().replace(f"{tmp_path / 'runs'}", f"{tmp_path / 'elsewhere'}"))
    own = trained.run_folder() / "report.html"
    own.write_text("the run's own page")
    evaluated(ranked_recipe(f"evaluation.on={other}"))
    (trained.run_folder() / "on" / "elsewhere" / "metrics.json").unlink()
    done = run_module("report.run", recipe_path, f"evaluation.on={other}")
    assert done.returncode == 0, done.stderr
    page = (trained.run_folder() / "on" / "elsewhere" / "report.html").read_text()
    assert "<title>runs: dpo-hps, tested on elsewhere</title>" in page and len(data_of(page)["answers"]) == 2
    assert f"are not evaluated yet: <code>bash evaluate.sh {recipe_path} evaluation.on={other}</code>" in page
    assert own.read_text() == "the run's own page"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{"),
        ("manifest.json", "[1]"),
        ("log.jsonl", ""),
        ("log.jsonl", '{"loss": 1}\n'),
        ("plan.json", '{"ranked_sha256": 1}'),
        ("evaluation/margins.json", "[]"),
        ("evaluation/margins.json", '{"sets": {"ranked": {"pairs": 1, "rm_dpo": 3}}}'),
        ("evaluation/margins.json", '{"sets": {}, "flags": 3}'),
        ("evaluation/pairs.jsonl", '{"set": "ranked"}\n'),
        ("scores/scores.jsonl", '{"prompt_id": "p1", "answers": []}\n'),
        ("scores/manifest.json", '{"sha256": 1}'),
        ("metrics.json", '{"figures": []}'),
        ("win_rate.json", '{"against": {"sft": {"win": {}}}}'),
    ],
)
def test_damaged_files_are_named(trained, name, content):
    evaluated(trained)
    judged(trained)
    (trained.run_folder() / name).write_text(content)
    with pytest.raises(InputError, match="dpo-hps"):
        report(trained, [])


def test_a_run_whose_ranked_file_is_gone_still_has_a_page(trained):
    trained.ranked("train").unlink()
    page = report(trained, [])
    assert "The ranked training file is not there any more" in page
    assert not any(text.startswith("hardness") for text in pictures(page))


def make_large(recipe) -> None:
    """A plan of 60,000 rows and 5,000 steps, and 400 scored prompts of ten answers of 8,000 characters."""
    rows = list(Lines(recipe.run_folder() / "plan.jsonl"))
    many = [dict(rows[number % len(rows)], step=number // 12) for number in range(60_000)]
    (recipe.run_folder() / "plan.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    line = json.loads((recipe.run_folder() / "log.jsonl").read_text().splitlines()[0])
    log = "".join(json.dumps(line | {"step": step, "loss": 1 / step}) + "\n" for step in range(1, 5001))
    (recipe.run_folder() / "log.jsonl").write_text(log)
    evaluated(recipe, gains=(1.0,) * 400)
    for folder in (recipe.sft_folder(), recipe.run_folder()):
        path = folder / "answers" / "test.jsonl"
        path.write_text(path.read_text().replace('"b"', json.dumps("word " * 1600)))


def test_the_page_of_a_large_run_is_bounded(trained):
    make_large(trained)
    page = report(trained, [])
    assert len(page.encode()) < 5_000_000
    assert f"A sample of {MOST_POINTS:,} of the 60,000 points" in page
    shown = len(data_of(page)["answers"])
    assert 0 < shown < 400 and f"{400 - shown} more are left out of this page" in page


# ---- tables ----


@pytest.mark.parametrize(
    ("traits", "panels"),
    [
        ([("DPO", str(place)) for place in range(8)], [("", range(8))]),
        (
            [(family, str(place)) for family in ("DPO", "EXO") for place in range(5)],
            [("DPO", range(5)), ("EXO", range(5, 10))],
        ),
        ([(f"m{place}",) for place in range(10)], [("0 to 7", range(8)), ("8 to 9", range(8, 10))]),
    ],
    ids=["few", "families", "no two alike"],
)
def test_panels_of_a_frontier(traits, panels):
    """A row that did not move is in none."""
    rows = [{"label": str(place), "traits": each, "along": [1]} for place, each in enumerate(traits)]
    still = {"label": "still", "traits": ["DPO"], "along": []}
    assert frontier_panels([still, *rows]) == [(name, [str(place) for place in shown]) for name, shown in panels]


# As written before there were answers in the results.
PART = {"title": "x", "columns": ["kl"], "rows": [], "paired": [], "matched": {}, "frontier": {}}
EARLIER = json.dumps({"title": "x", "remarks": [], "parts": [PART], "flags": [], "failed": {}})
TABLES = [path for path in sorted((REPOSITORY / "results" / "testbed").glob("*.json")) if path.stem != "pilot"]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_committed_table_has_a_page(path):
    """Each row, ours and the paper's figure as the Markdown has them; what is read at one KL."""
    text = page(path)
    table = json.loads(path.read_text())
    assert text.count("<img src=") >= (1 if path.stem == "table4" else 3) * len(table["parts"])
    assert "_ranked" not in text and "_written" not in text  # names of the JSON
    assert "Written by bash reproduce.sh" in text and "how methods are compared, and why at equal KL" in text
    for part in table["parts"]:
        for row in part["rows"]:
            assert f'<th scope="row">{row["label"]}</th>' in text
            for entry in row["figures"].values():
                if "paper" in entry and "mean" in entry:
                    assert f"paper {figure(entry['paper'])} ({signed(entry['difference'])})" in text
        for row in part["compared"]:
            for found in row["at_kl"].values():
                assert f"<td>{estimate(found, write=signed)}" in text and f"<td>{found['at_kl']:.3f}</td>" in text
            change = row["at_kl"]["change"]
            seeds = " ".join(map(signed, change["by_seed"].values())) if "by_seed" in change else "-"
            assert f"<td>{change['verdict']}</td><td>{seeds}</td>" in text


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot read the file"), ("{", "no table"), ("{}", "damaged"), (EARLIER, "damaged")]
)
def test_what_is_no_table(tmp_path, content, said):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        page(path)


# ---- the explorer ----


def test_the_explorer_holds_what_it_says(write_lines):
    path = write_lines(ranked_records(5), "run/ranked/train.jsonl")
    page = explorer(path, 3, 7)
    assert "3 prompts, 2 more left out (--prompts takes more)" in page
    found = data_of(page)
    assert found["seed"] == 7 and [r["rewards"] for r in found["records"]] == [
        r["rewards"] for r in ranked_records(5)[:3]
    ]
    with pytest.raises(InputError, match="the file has no prompts"):
        explorer(write_lines([], "empty.jsonl"), 3, 7)


def test_the_page_of_a_large_ranking_is_bounded(write_lines):
    """Of 60 prompts with 100 responses of 6,000 characters some stand there, cut; a single huge prompt does, too."""
    record = ranked_records(1, responses=100)[0]
    record["responses"] = [f"{number} " + "wörter " * 850 for number in range(100)]
    path = write_lines([record | {"prompt_id": f"p{number}"} for number in range(60)], "run/ranked/train.jsonl")
    page = explorer(path, 200, 0)
    count = len(data_of(page)["records"])
    assert len(page.encode()) < 5_000_000 and 0 < count < 60
    assert f"{60 - count} more left out because a page has its limit" in page
    assert "more characters are left out of this page" in page
    record["responses"] = [text * 20 for text in record["responses"]] * 20
    for name in ("rewards", "sources", "token_counts", "truncated"):
        record[name] = [value for value in record[name] for _ in range(20)]
    alone = explorer(write_lines([record], "run/ranked/test.jsonl"), 200, 0)
    assert len(alone.encode()) < 5_000_000 and len(data_of(alone)["records"][0]["responses"]) == 2000
