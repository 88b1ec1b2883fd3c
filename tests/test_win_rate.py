"""evaluation/win_rate.py: outcomes by hand, and judges with a planted fault, which the diagnostics must show."""

import json
import sys

import numpy as np
import pytest
from scipy import stats
from test_judge import SAME, overrides_of, write_answers

from evaluation import win_rate as stage
from evaluation.judge import CRITERIA, GRID, TOO_LONG, cache_path, judge, judged_answers, verdict_key
from evaluation.win_rate import compare, correlation, flags, sign_test, win_rates
from generation import generate
from hps.chat import load_tokenizer
from hps.errors import InputError, run_main
from pipeline.files import Appender
from pipeline.recipe import Judge, load_recipe
from tools.verify import check_stage


def answers_of(model: str, lengths, samples: int = 1) -> list[dict]:
    """Lines of answers/test.jsonl; every text is another one."""
    return [
        {
            "prompt_id": f"p{place}",
            "prompt": [{"role": "user", "content": f"question {place}"}],
            "responses": [f"{model} {place} {sample}" for sample in range(samples)],
            "token_counts": [int(length)] * samples,
            "truncated": [False] * samples,
        }
        for place, length in enumerate(lengths)
    ]


def verdicts_on(answers: list[dict], scores, repeats: int = 1) -> dict[str, dict]:
    """Verdict lines; `scores(place, sample, repeat)` gives the four scores, or the text of an error."""
    lines = {}
    for place, record in enumerate(answers):
        for sample, text in enumerate(record["responses"]):
            for repeat in range(repeats):
                key, given = verdict_key(record["prompt"], text, repeat), scores(place, sample, repeat)
                error = isinstance(given, str)
                lines[key] = (
                    {"key": key, "error": given}
                    if error
                    else {"key": key, "scores": dict(zip(CRITERIA, given, strict=True))}
                )
    return lines


# ---- outcomes by hand ----

OURS = [[4, 4, 5, 3], [2, 2, 2, 2], [5, 5, 5, 5], [1, 1.5, 1, 0.5], [3, 3, 3, 3]]  # averages 4, 2, 5, 1, 3
THEIRS = [[3, 3, 3, 3], [2.5, 2, 2, 2], [4, 4, 4, 4], [1, 1, 1, 1], [2, 2.5, 2, 2]]  # averages 3, 2.125, 4, 1, 2.125


def planted(ours=OURS, theirs=THEIRS):
    a, b = answers_of("a", [10] * len(ours)), answers_of("b", [20] * len(theirs))
    return a, b, {**verdicts_on(a, lambda p, *_: ours[p]), **verdicts_on(b, lambda p, *_: theirs[p])}


def test_win_lose_tie_by_hand():
    """Differences of the averages: 1, -0.125, 1, 0, 0.875."""
    result = compare(*planted(), Judge(), 500, 0)
    assert [result[name]["count"] for name in ("win", "lose", "tie")] == [3, 1, 1]
    assert [result[name]["percent"] for name in ("win", "lose", "tie")] == [60, 20, 20]
    assert result["prompts"] == 5 and result["left_out"] == {}
    assert result["difference"]["mean"] == 0.55
    assert result["scores"]["run"]["clarity"]["mean"] == 2.7
    assert result["scores"]["against"]["correctness"]["mean"] == 2.5
    assert (result["scores"]["run"]["average"]["mean"], result["scores"]["against"]["average"]["mean"]) == (3, 2.45)
    low, high = result["win"]["interval"]
    assert 0 <= low < 60 < high <= 100
    json.dumps(result, allow_nan=False)


def test_the_other_way_round_wins_are_losses():
    a, b, verdicts = planted()
    there, back = (compare(x, y, verdicts, Judge(), 200, 0) for x, y in ((a, b), (b, a)))
    assert there["win"] == back["lose"] and there["lose"] == back["win"] and there["tie"] == back["tie"]
    assert there["difference"]["mean"] == -back["difference"]["mean"]


def test_average_over_answers_and_repeats():
    """Ours 1, 1, 3, 2, theirs 1.5, 2, 2, 1.5: both 1.75, a tie."""
    a, b = answers_of("a", [5], samples=2), answers_of("b", [5], samples=2)
    table = [[1, 1], [3, 2]]
    theirs = [[1.5, 2], [2, 1.5]]
    verdicts = {
        **verdicts_on(a, lambda _, sample, repeat: [table[sample][repeat]] * 4, 2),
        **verdicts_on(b, lambda _, sample, repeat: [theirs[sample][repeat]] * 4, 2),
    }
    result = compare(a, b, verdicts, Judge(answers=2, repeats=2), 50, 0)
    assert result["tie"]["count"] == 1
    assert result["scores"]["run"]["safety"]["mean"] == 1.75


def test_equal_averages_tie_in_spite_of_rounding():
    """The same twelve scores over three repeats in another order: without rounding the averages differ by 4e-16."""
    a, b = answers_of("a", [5]), answers_of("b", [5])
    ours = [[4.5, 3.5, 2.5, 1], [1.5, 0, 0, 0], [0.5, 4, 3.5, 5]]
    theirs = [[1, 2.5, 5, 0.5], [0, 4.5, 3.5, 1.5], [4, 0, 0, 3.5]]
    assert np.sum(ours) == np.sum(theirs)
    verdicts = {
        **verdicts_on(a, lambda _p, _s, repeat: ours[repeat], 3),
        **verdicts_on(b, lambda _p, _s, repeat: theirs[repeat], 3),
    }
    assert compare(a, b, verdicts, Judge(repeats=3), 50, 0)["tie"]["count"] == 1


def test_missing_verdicts_are_counted_not_dropped():
    """One of ours was too long, one of theirs was never judged, a prompt stands in one file alone."""
    a, b, verdicts = planted()
    verdicts[verdict_key(a[0]["prompt"], a[0]["responses"][0], 0)] = {"error": TOO_LONG}
    del verdicts[verdict_key(b[1]["prompt"], b[1]["responses"][0], 0)]
    result = compare(a, b[:4], verdicts, Judge(), 50, 0)
    assert result["prompts"] == 2
    assert result["left_out"] == {
        f"run, verdicts: {TOO_LONG}": 1,
        "against, verdicts: not judged": 1,
        "prompts: of one model alone": 1,
        "prompts: no verdict on a model": 2,
    }
    assert [result[name]["count"] for name in ("win", "lose", "tie")] == [1, 0, 1]


def test_a_prompt_keeps_the_verdicts_that_it_has():
    """Of two repeats one was cut: the other counts alone."""
    a, b = answers_of("a", [5]), answers_of("b", [5])
    verdicts = {
        **verdicts_on(a, lambda _p, _s, repeat: "cut" if repeat else [4] * 4, 2),
        **verdicts_on(b, lambda *_: [3] * 4, 2),
    }
    result = compare(a, b, verdicts, Judge(repeats=2), 50, 0)
    assert result["win"]["count"] == 1 and result["scores"]["run"]["average"]["mean"] == 4
    assert result["left_out"] == {"run, verdicts: cut": 1}


def test_nothing_to_compare():
    a, b, _ = planted()
    with pytest.raises(InputError, match="no prompt has verdicts on both models.*not judged.*run `python -m"):
        compare(a, b, {}, Judge(), 50, 0)


# ---- judges with a planted fault ----

PROMPTS = 200


def judged_by(judge, repeats: int = 2, seed: int = 0) -> dict:
    """Compare a better model with a worse one under `judge(quality, length, rng)`, the quality of an answer its own.

    Better by 0.8 of the spread of the answers; lengths have nothing to do with quality.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(20, 400, (2, PROMPTS))
    quality = rng.normal(2.5, 1, (2, PROMPTS)) + np.array([[0.8], [0.0]])
    sides = [answers_of(name, lengths[side]) for side, name in enumerate("ab")]
    verdicts = {}
    for side, answers in enumerate(sides):
        verdicts |= verdicts_on(answers, lambda p, _s, _r, i=side: judge(quality[i, p], lengths[i, p], rng), repeats)
    return compare(*sides, verdicts, Judge(repeats=repeats), 200, 0)


def on_grid(values) -> list[float]:
    return [GRID[int(place)] for place in np.clip(np.round(2 * np.asarray(values)), 0, 10)]


def good(quality, _length, rng):
    return on_grid(quality + rng.normal(0, 0.4, 4))


def constant(_quality, _length, rng):
    """Four everywhere, now and then half a point less."""
    return [4, 4, 4, 4] if rng.random() < 0.9 else [4, 4, 4, 3.5]


def length_loving(_quality, length, rng):
    return on_grid(length / 80 + rng.normal(0, 0.4, 4))


def dice(_quality, _length, rng):
    return on_grid(rng.uniform(0, 5, 4))


def kinds(result: dict) -> set[str]:
    return {flag.partition("?")[0] for flag in result["flags"]}


def test_a_good_judge_is_cleared():
    result = judged_by(good)
    assert result["flags"] == []
    assert result["win"]["count"] > result["lose"]["count"]
    facts = result["judge"]
    assert facts["verdicts"] == 4 * PROMPTS and facts["distinct_averages"] > 20
    assert facts["repeat_correlation"] > 0.9 and abs(facts["length_correlation"]) < 0.2
    assert facts["sign_test"] < 1e-4


def test_a_good_judge_without_repeats_is_cleared_too():
    result = judged_by(good, repeats=1)
    assert result["flags"] == []
    assert (result["judge"]["repeat_correlation"], result["judge"]["repeat_equal"]) == (None, None)


def test_a_constant_judge_is_exposed():
    result = judged_by(constant)
    assert "constant judge" in kinds(result)
    text = " ".join(result["flags"])
    assert (
        "of the verdicts are equal" in text
        and "of different answers tie" in text
        and "only 2 different averages" in text
    )
    assert result["judge"]["most_common"] > 0.8 and result["judge"]["distinct_averages"] == 2


def test_a_wholly_constant_judge_has_no_correlations():
    facts = judged_by(lambda *_: [4, 4, 4, 4])["judge"]
    assert facts["length_correlation"] is facts["repeat_correlation"] is facts["longer_wins"] is None
    assert (facts["tie_rate"], facts["most_common"], facts["sign_test"], facts["repeat_equal"]) == (1, 1, 1, 1)


def test_a_length_loving_judge_is_exposed():
    result = judged_by(length_loving)
    assert "judge of length" in kinds(result) and "constant judge" not in kinds(result)
    assert result["judge"]["length_correlation"] > 0.8 and result["judge"]["longer_wins"] > 0.8
    assert any("score and length correlate by 0." in flag for flag in result["flags"])


def test_a_random_judge_is_exposed():
    result = judged_by(dice)
    first, second = result["flags"]
    assert first.startswith("random judge? repeated verdicts correlate by ")
    assert second.startswith("wins and losses look like coin tosses (")
    assert abs(result["judge"]["repeat_correlation"]) < 0.2


@pytest.mark.slow
def test_the_sign_test_alone_shows_a_random_judge_without_repeats():
    """By chance 5 in 100 random judges pass; of twenty seeds at most four (P(more) = 0.003)."""
    passed = sum(not judged_by(dice, repeats=1, seed=seed)["flags"] for seed in range(20))
    assert passed <= 4


def test_an_answer_of_both_models_counts_once():
    """The same text under the same prompt has one verdict: a tie that says nothing about the judge."""
    a, b, verdicts = planted()
    b[0]["responses"] = a[0]["responses"]
    facts = compare(a, b, verdicts, Judge(), 50, 0)["judge"]
    assert facts["verdicts"] == 9 and facts["same_answers"] == 1
    assert facts["tie_rate"] == 0.25  # of the other four


def test_few_verdicts_need_not_show_many_scores():
    facts = {"verdicts": 19, "distinct_averages": 4, "most_common": 0.5, "tie_rate": 0.5, "length_correlation": None}
    facts |= {"longer_wins": None, "repeat_correlation": None, "sign_test": 0.01}
    assert flags(facts) == []
    assert len(flags({**facts, "verdicts": 20})) == 1


# ---- statistics ----


def test_sign_test_by_hand():
    """3 of 12: 2 (1 + 12 + 66 + 220) / 2^12; an even split and nothing at all say nothing."""
    assert sign_test(3, 9) == sign_test(9, 3) == round(598 / 4096, 4)
    assert sign_test(7, 7) == sign_test(1, 0) == sign_test(0, 0) == 1


def test_rank_correlation_by_hand():
    """Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: 4.5 / sqrt(4.5 x 5); two pairs, or equal values, have none."""
    x, y = np.array([1.0, 7, 7, 9]), np.array([0.0, 2, 1, 50])
    assert correlation(stats.spearmanr, x, y)[0] == round(4.5 / 22.5**0.5, 4)
    assert correlation(stats.spearmanr, x[:2], y[:2]) == correlation(stats.pearsonr, np.ones(4), y) == (None, None)


# ---- the command ----


@pytest.fixture
def judged_run(tiny_recipe):
    """A recipe with answers of three models in its output, and verdicts on all of them."""
    overrides = ["judge.enabled=true", f"models.judge.path={load_recipe(tiny_recipe).models.policy.path}"]
    recipe = load_recipe(tiny_recipe, overrides)
    a, b, verdicts = planted()
    with Appender(cache_path(recipe)) as file:
        for line in verdicts.values():
            file.append(line)
    for folder, answers in ((recipe.run_folder(), a), (recipe.sft_folder(), b)):
        with Appender(folder / "answers" / "test.jsonl") as file:
            for record in answers:
                file.append(record)
        (folder / "answers" / "manifest.json").write_text("{}")
    return tiny_recipe, overrides, recipe


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["win_rate", *map(str, arguments)])
    run_main(stage.main)


def test_the_command_prints_and_writes(judged_run, monkeypatch, capsys):
    path, overrides, recipe = judged_run
    run(monkeypatch, path, *overrides)
    text = capsys.readouterr().out
    assert "5 prompts: win 60.0 [" in text and "lose 20.0" in text and "tie 20.0" in text
    assert "how far the judge agrees with itself was not measured" in text
    figures = json.loads((recipe.run_folder() / "win_rate.json").read_text())
    assert figures["against"][str(recipe.sft_folder())]["win"]["count"] == 3


def test_the_verdicts_that_the_judge_writes_are_compared(tiny_recipe, tiny_model, monkeypatch):
    """The judge's own stage, with planned scores in the place of the engine: the run's answers to even prompts win, to
    odd ones lose; the first SAME answers are those of both models."""
    recipe = load_recipe(tiny_recipe, overrides_of(tiny_model))
    write_answers(recipe)
    tokenizer = load_tokenizer(str(tiny_model))
    ours = [record["responses"][0] for record in judged_answers(recipe.run_folder(), 1)]

    class Planned:
        def __init__(self, **arguments):
            pass

        def stream(self, items):
            for item in items:
                request = tokenizer.decode(item["ids"])
                score = next(
                    (5 - 5 * (n % 2) for n, text in enumerate(ours) if f"---\n{text}\n--- end" in request), 2.5
                )
                text = json.dumps(dict.fromkeys(CRITERIA, score))
                yield {"key": item["key"], "samples": [{"text": text, "tokens": 9, "truncated": False}]}

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(generate, "Generator", Planned)
    judge(recipe)
    (result,) = win_rates(recipe, [recipe.sft_folder()])["against"].values()
    assert SAME == 3 and result["prompts"] == 12 and result["left_out"] == {}
    assert [result[name]["count"] for name in ("win", "lose", "tie")] == [4, 5, 3]  # 4 6 8 10; 3 5 7 9 11; 0 1 2


@pytest.mark.parametrize("name", ["win_rate.json", "answers/test.jsonl"])
def test_a_flipped_byte_of_the_figures_or_of_the_answers_is_named(judged_run, monkeypatch, capsys, name):
    path, overrides, recipe = judged_run
    run(monkeypatch, path, *overrides)
    manifest, changed = recipe.run_folder() / "win_rate.manifest.json", recipe.run_folder() / name
    assert check_stage(manifest)[0] == []
    content = bytearray(changed.read_bytes())
    content[5] ^= 1
    changed.write_bytes(content)
    (wrong,) = check_stage(manifest)[0]
    assert wrong.startswith(f"{changed}: ") and "has changed since the stage" in wrong


def test_against_several_folders(judged_run, monkeypatch, capsys):
    path, overrides, recipe = judged_run
    run(monkeypatch, path, *overrides, "--against", recipe.sft_folder(), recipe.run_folder())
    capsys.readouterr()
    figures = json.loads((recipe.run_folder() / "win_rate.json").read_text())
    assert figures["against"][str(recipe.run_folder())]["tie"]["count"] == 5


def test_off(tiny_recipe, monkeypatch, capsys):
    run(monkeypatch, tiny_recipe)
    assert capsys.readouterr().out == "win rate: off (`judge.enabled: false` in the recipe)\n"


def test_another_judge_has_no_verdicts(judged_run, monkeypatch, capsys):
    path, overrides, _ = judged_run
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, path, *overrides, "judge.temperature=0.5")
    assert end.value.code == 2
    assert "there are no verdicts of this judge; run `python -m evaluation.judge` first" in capsys.readouterr().err
