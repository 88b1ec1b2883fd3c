"""evaluation/metrics.py: figures of answers by hand, from files to metrics.json."""

import json

import pytest
from sacrebleu import corpus_bleu

from evaluation import metrics as stage
from evaluation import text_figures
from evaluation.summary import examples, outcome, side_by_side
from hps.errors import InputError
from pipeline.files import write_json
from pipeline.records import read_jsonl, read_prompts
from tools.verify import check_stage

CAT = "the cat is on the mat"


@pytest.fixture(scope="module")
def bleu():
    return stage.Bleu()


def test_sentence_bleu_by_hand(bleu):
    """Precisions 5/6, 3/5, 1/4 and 0 of 3, which exponential smoothing counts as 1 of 2 x 3; equal lengths."""
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** (1 / 4)
    assert bleu.sentence("the cat sat on the mat", CAT) == pytest.approx(expected)
    assert bleu.sentence(CAT, CAT) == pytest.approx(1)


def test_bleu_of_a_short_answer_leaves_orders_out(bleu):
    """Two words of six: precisions 1 and 1, brevity exp(1 - 6 / 2)."""
    assert bleu.sentence("the cat", CAT) == pytest.approx(2.718281828 ** (1 - 3))


def test_released_bleu_counts_characters(bleu):
    """`ab cd` against `ab ce`: 4 of 5 characters, 3 of 4 pairs, 2 of 3 triples, 1 of 2 fours; the blank is one."""
    assert bleu.characters("ab cd", "ab ce") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    assert bleu.characters("abcd", "wxyz") == 0
    assert bleu.characters("ab\ncd", "ab\ncd") == pytest.approx(1) and bleu.characters("ab\ncd", "ab cd") < 1


def test_corpus_bleu_has_an_interval_around_it(bleu):
    answers = [f"word{number} stands in line number {number % 7} of the page" for number in range(40)]
    references = [text.replace("line", "row") if number % 3 else text for number, text in enumerate(answers)]
    found = bleu.corpus(bleu.counts([pair] for pair in zip(answers, references, strict=True)), 300, 0)
    low, high = found["interval"]
    assert 0 < low < found["mean"] < high < 1
    assert found["mean"] == pytest.approx(corpus_bleu(answers, [references]).score / 100, abs=5e-5)
    assert bleu.signatures()["corpus"].startswith("nrefs:1|")


def test_tokenized_texts_are_not_kept(bleu):
    """sacrebleu would keep every text of an evaluation."""
    for number in range(9):
        answers = answers_of(CAT, f"answer {number}", tokens=[6, 2])
        stage.bleu_figures(answers, [{"score": 0.0}] * 2, [CAT], [{"score": 0.0}], bleu)
        bleu.counts([[(text, CAT) for text in answers["responses"]]])
    for tokenizer in (text_figures.Tokenizer13a, text_figures.TokenizerRegexp):
        assert 0 < tokenizer.__call__.cache_info().currsize <= 3


def test_the_answers_to_a_prompt_are_drawn_together(bleu):
    """Five equal answers to each prompt say no more than one: the same interval."""
    answers = [f"word{number} stands in line number {number % 7} of the page" for number in range(40)]
    pairs = [(text, text.replace("line", "row") if number % 3 else text) for number, text in enumerate(answers)]
    once, often = (bleu.corpus(bleu.counts([pair] * count for pair in pairs), 300, 0) for count in (1, 5))
    assert once == often


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("Lilies are poisonous.", "13a"),
        ("한국어는 낱말 사이를 띄어 쓴다.", "13a"),
        ("42", "13a"),
        ("The word 百合 is a lily", "13a"),
        ("百合花对猫有毒，not for cats", "13a"),
        ("百合花对猫都有毒，请放在屋外。", "zh"),
        ("ユリは猫に有毒です。", "char"),
        ("ดอกลิลลี่เป็นพิษต่อแมว", "char"),
        ("ດອກລິລີເປັນພິດ", "char"),
        ("ផ្កាលីលីមានជាតិពុល", "char"),
        ("ལྗགས་ཀྱི་བོད་", "char"),
    ],
)
def test_the_script_decides_the_tokenizer(text, tokenizer, bleu):
    """And a text that is nearly its reference is near it, in every script."""
    assert stage.tokenizer_of(text) == tokenizer
    if tokenizer != "13a":
        assert bleu.sentence(text[:-1], text) > 0.5 and stage.repetition(text * 9) > 0.5


def test_bleu_of_chinese_by_hand(bleu):
    """`一二三四五六` against the same with another last character: 5/6, 4/5, 3/4 and 2/3 of the n-grams."""
    expected = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4)
    assert bleu.sentence("一二三四五六", "一二三四五七") == pytest.approx(expected)
    assert "tok:zh" in bleu.signatures()["sentence, zh"]


def test_corpus_bleu_of_prompts_with_different_tokenizers_does_not_apply(evaluated):
    """One prompt of four has a Chinese reference: sentence BLEU of all, no corpus BLEU, and a reason."""
    path = evaluated.sft_folder() / "prompts.jsonl"
    prompts = [record for _, record in read_prompts(evaluated.data.test.path, 4)]
    prompts[0]["responses"] = ["百合花对猫有毒。", "没有毒。"]
    path.write_text("".join(json.dumps(record) + "\n" for record in prompts))
    evaluated.data.test.path = str(path)
    metrics = stage.evaluate(evaluated, sft=True)
    assert metrics["bleu_tokenizers"] == {"zh": 1, "13a": 3} and metrics["figures"]["bleu_mean"]["prompts"] == 4
    assert "bleu_corpus_all" not in metrics["figures"]
    assert metrics["left_out"] == {"corpus BLEU: prompts need different tokenizers (13a, zh)": 1}
    assert metrics["evaluator_is_reward"] is True  # as the recipe of these tests has it


def test_distinct_and_repetition_by_hand():
    """`a b a b` and `b a`: words a b a b b a, 2 of 6; pairs ab ba ab, ba: 2 of 4."""
    assert stage.distinct(["a b a b", "B a"], 1) == pytest.approx(2 / 6)
    assert stage.distinct(["a b a b", "b a"], 2) == pytest.approx(2 / 4)
    assert stage.distinct(["", ""], 2) is None  # no words are not diverse ones
    assert stage.repetition("one two three four one two three four") == pytest.approx(1 - 4 / 5)
    assert stage.repetition("too short") == 0.0
    assert stage.repetition("我不知道" * 9) == pytest.approx(1 - 4 / 33)  # characters
    assert stage.repetition("我 不知 道x y") == pytest.approx(0)  # 我 不 知 道 x y


def answers_of(*texts: str, tokens: list[int]) -> dict:
    return {"responses": list(texts), "token_counts": tokens, "truncated": [False] * (len(texts) - 1) + [True]}


def test_best_and_mean_of_the_answers():
    figures = stage.answer_figures(
        answers_of("a", "b", "c", tokens=[1, 2, 6]),
        [{"score": 0.5, "objectives_mean": 0.2}, {"score": -1.0, "objectives_mean": 0.4}, {"score": 0.2}][:2]
        + [{"score": 0.2, "objectives_mean": 0.3}],
    )
    assert figures["reward_best"] == 0.5 and figures["reward_mean"] == pytest.approx(-0.1)
    assert figures["reward_objectives_best"] == 0.4 and figures["reward_objectives_mean"] == pytest.approx(0.3)
    assert figures["tokens_mean"] == 3 and figures["truncated_share"] == pytest.approx(1 / 3)


def test_released_bleu_takes_the_evaluators_choice_on_both_sides(bleu):
    """The evaluator likes the second answer and the second given response: those two are compared, equal here."""
    figures = stage.bleu_figures(
        answers_of(CAT, "quite another text here", tokens=[6, 4]),
        [{"score": 0.0}, {"score": 1.0}],
        [CAT, "quite another text here"],
        [{"score": 0.0}, {"score": 1.0}],
        bleu,
    )
    assert figures["bleu_characters_released"] == pytest.approx(1)
    assert figures["bleu_best"] == pytest.approx(1)
    assert figures["bleu_mean"] == pytest.approx((1 + bleu.sentence("quite another text here", CAT)) / 2)


# ---- from files ----


def write_stage(folder, name: str, lines: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "manifest.json").write_text("{}")


@pytest.fixture
def evaluated(ranked_recipe):
    """A recipe whose run has answers (the given ones, the preferred first), rewards and divergences, all made up."""
    recipe = ranked_recipe()
    prompts = [record for _, record in read_prompts(recipe.data.test.path, recipe.data.test.limit)]
    for place, folder in enumerate((recipe.sft_folder(), recipe.run_folder())):
        lines, scores, moved = [], [], []
        for number, record in enumerate(prompts):
            name = {"prompt_id": record["prompt_id"]}
            texts = [*record["responses"][:2], "I do not know."]
            counts = [10 + place, 20, 5]
            lines.append({**name, "prompt": record["prompt"], **answers_of(*texts, tokens=counts)})
            details = [{"score": value + place * number} for value in (0.0, 1.0, -1.0)]
            scores.append({**name, "answers": details, "given": [{"score": 0.0}, {"score": 1.0}]})
            moved.append({**name, "kl": [1.0, 2.0, 6.0], "log_ratio": [0.0, 1.0, 2.0], "tokens": counts})
        write_stage(folder / "answers", "test.jsonl", lines)
        write_stage(folder / "scores", "scores.jsonl", scores)
        proxies = [{**line, "answers": [{"score": 10.0 + 5 * place}] * 3, "given": []} for line in scores]
        write_stage(folder / "proxy_scores", "scores.jsonl", proxies)
        if place:
            write_stage(folder / "divergence", "divergence.jsonl", moved)
            (folder / "evaluation").mkdir()
            (folder / "evaluation" / "manifest.json").write_text("{}")
            write_json(folder / "evaluation" / "margins.json", {"sets": {"written": {"pairs": 4}}})
    return recipe


def test_metrics_of_a_run(evaluated):
    """The run's rewards are the model's before training plus the prompt's number: change 0, 1, 2, 3."""
    metrics = stage.evaluate(evaluated, sft=False)
    assert metrics == json.loads((evaluated.run_folder() / "metrics.json").read_text())
    records = [record for _, record in read_jsonl(evaluated.run_folder() / "metrics.jsonl")]
    assert [record["reward_best_change"] for record in records] == [0, 1, 2, 3]
    figures = metrics["figures"]
    assert metrics["prompts"] == 4 and metrics["left_out"] == {}
    assert figures["bleu_best"]["mean"] == 1 and figures["bleu_corpus_best"]["mean"] == 1
    assert figures["kl_sampled"] == {"mean": 3.0, "interval": [3.0, 3.0], "prompts": 4}
    assert figures["log_ratio_sampled"]["mean"] == 1.0
    assert figures["tokens_mean_change"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["reward_best"]["mean"] == 1 + 1.5 and figures["reward_mean_change"]["mean"] == 1.5
    # Of 9 pairs of answers: 3 ties; then 6 won and 2 ties; 8 and 1; 9.
    assert figures["reward_win_rate"]["mean"] == pytest.approx((4.5 + 7 + 8.5 + 9) / 36, abs=1e-4)
    assert metrics["sets"] == {"written": {"pairs": 4}}


@pytest.fixture
def along(evaluated):
    """The same, with two answers to each prompt by the policy that was kept at step 2."""
    evaluated.evaluation.samples_along = 2
    evaluated.checkpoint_folder(2).mkdir(parents=True)
    for name in ("answers/test.jsonl", "scores/scores.jsonl", "divergence/divergence.jsonl"):
        lines = [line for _, line in read_jsonl(evaluated.run_folder() / name)]
        shortened = [
            {key: value[:2] if isinstance(value, list) and key != "prompt" else value for key, value in line.items()}
            for line in lines
        ]
        path = evaluated.evaluated_folder(2) / name
        write_stage(path.parent, path.name, shortened[:0:-1])  # without the first prompt, in another order
    return evaluated


def test_answers_as_columns(along):
    """In the order of the test file, whatever the order of finishing; a number for each answer."""
    names = [record["prompt_id"] for _, record in read_prompts(along.data.test.path, along.data.test.limit)]
    found = stage.answer_columns(along, along.evaluated_folder(2))
    assert found.pop("prompt_id") == names[1:]
    expected = {"reward": [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]], "tokens": [[11, 20]] * 3, "kl": [[1.0, 2.0]] * 3}
    assert found.pop("repetition") == [[0.0, 0.0]] * 3 and found == expected
    along.evaluation.proxy = True
    before = stage.answer_columns(along, along.sft_folder(), sft=True)
    assert before.keys() == {"prompt_id", "reward", "proxy", "tokens", "repetition"}
    assert before["proxy"] == [[10.0] * 3] * 4 and before["reward"] == [[0.0, 1.0, -1.0]] * 4


def test_figures_along_the_training(along, capsys):
    metrics = stage.evaluate(along, sft=False)
    (point,) = metrics["along"]
    assert point["step"] == 2 and point["reward"]["mean"] == 2.5 and point["kl"]["mean"] == 1.5
    assert point["tokens"] == {"mean": 15.5, "interval": [15.5, 15.5]}
    stage.print_metrics(metrics, along.run_folder())
    assert (
        ", kl 1.5000 [1.5000, 1.5000], tokens 15.5000 [" in capsys.readouterr().out.partition("  at step 2: reward")[2]
    )
    manifest = along.run_folder() / "metrics.manifest.json"
    assert check_stage(manifest)[0] == []
    assert str(along.evaluated_folder(2) / "scores" / "scores.jsonl") in json.loads(manifest.read_text())["inputs"]


def test_a_divergence_of_other_answers_is_refused(along):
    path = along.evaluated_folder(2) / "divergence" / "divergence.jsonl"
    lines = [line for _, line in read_jsonl(path)]
    short = {key: value[:1] if isinstance(value, list) else value for key, value in lines[0].items()}
    write_stage(path.parent, path.name, [short, *lines[1:]])
    with pytest.raises(InputError, match=r"divergence\.jsonl:1: `kl` has 1 entries for 2 answers"):
        stage.evaluate(along, sft=False)


def test_what_training_changed(evaluated):
    """The lines that quickstart ends with; nothing before both models are evaluated."""
    evaluated.evaluation.answers = 3
    stage.evaluate(evaluated, sft=True)
    assert outcome(evaluated) is None
    stage.evaluate(evaluated, sft=False)
    learned = outcome(evaluated)
    path = evaluated.models.evaluator.path
    samples = evaluated.evaluation.samples
    assert learned["title"] == (f"{samples} answers to each of 4 test prompts, reward by {path} (mean [95% interval])")
    lines = dict(learned["lines"])
    assert lines["reward before training"] == "0.000 [0.000, 0.000]"
    assert lines["reward after"].startswith("1.500 [") and lines["change, prompt by prompt"].startswith("+1.500 [")
    assert lines["share of answers that beat one from before"].startswith("0.806 [")
    assert lines["KL from the model before training (nats)"] == "3.000 [3.000, 3.000]"
    assert lines["tokens after"] == "12.0 [12.0, 12.0]"
    evaluated.evaluation.answers = 2  # of four prompts, whose changes are 0, 1, 2, 3, in their order
    shown = list(side_by_side(evaluated))
    prompts = [record for _, record in read_prompts(evaluated.data.test.path, 4)]
    assert [each["prompt"] for each in shown] == [prompts[1]["prompt"], prompts[3]["prompt"]]
    assert [each["change"] for each in shown] == [1, 3]
    middle = {"text": prompts[3]["responses"][0], "cut": False}
    assert shown[1]["before"] == middle | {"score": 0.0, "tokens": 10, "proxy": 10.0}
    assert shown[1]["after"] == middle | {"score": 3.0, "tokens": 11, "proxy": 15.0}
    lines = list(examples(evaluated, 80))
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("> ") and lines[1].startswith("(0.00) ") and " | (1.00) " in lines[1]


def test_what_ranked_stands_beside_what_judges(evaluated):
    """By it the answers had 10 before training and have 15 after."""
    evaluated.evaluation.proxy = True
    before, after = (stage.evaluate(evaluated, sft)["figures"] for sft in (True, False))
    assert before["proxy_mean"]["mean"] == 10 and "proxy_mean_change" not in before
    assert (after["proxy_mean"]["mean"], after["proxy_mean_change"]["mean"]) == (15, 5)
    lines = dict(outcome(evaluated)["lines"])
    assert lines["ranking model's score, before training"] == "10.000 [10.000, 10.000]"
    assert lines["ranking model's score, change"] == "+5.000 [+5.000, +5.000]"
    inputs = json.loads((evaluated.run_folder() / "metrics.manifest.json").read_text())["inputs"]
    assert sum("proxy_scores" in name for name in inputs) == 2
    evaluated.evaluation.proxy = False
    stage.evaluate(evaluated, sft=True)  # for another run, without the proxy
    assert not any("ranked" in name for name, _ in outcome(evaluated)["lines"])
    assert "proxy_mean" not in stage.evaluate(evaluated, sft=False)["figures"]


def test_a_prompt_that_one_of_the_models_has_not_answered_is_counted(evaluated):
    """A prompt may end the engine of one model alone: it stands in that model's ledger."""
    reasons = {
        evaluated.run_folder(): "prompt without answers (the ledger beside them says why)",
        evaluated.sft_folder(): "prompt that the model before training has not answered (its ledger says why)",
    }
    for folder, reason in reasons.items():
        files = [folder / name for name in ("answers/test.jsonl", "scores/scores.jsonl")]
        before = [path.read_text() for path in files]
        for path, text in zip(files, before, strict=True):
            path.write_text("".join(text.splitlines(keepends=True)[1:]))
        metrics = stage.evaluate(evaluated, sft=False)
        assert metrics["prompts"] == 3 and metrics["left_out"] == {reason: 1}
        for path, text in zip(files, before, strict=True):
            path.write_text(text)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "scores/scores.jsonl",
            {"answers": [{"score": 1.0}], "given": []},
            r"scores\.jsonl:1: `answers` has 1 scores for 3",
        ),
        ("scores/scores.jsonl", {"prompt_id": "another"}, "scores: there is no line of prompt"),
        ("divergence/divergence.jsonl", {"prompt_id": "another"}, "divergence: there is no line of prompt"),
        ("divergence/divergence.jsonl", {"kl": 1.0}, r"divergence\.jsonl:1: `kl` is 1.0: should be a valid list"),
    ],
)
def test_lines_that_do_not_belong_together_are_refused(evaluated, name, line, message):
    path = evaluated.run_folder() / name
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps(json.loads(first) | line) + "\n" + "".join(others))
    with pytest.raises(InputError, match=message):
        stage.evaluate(evaluated, sft=False)


@pytest.mark.parametrize("name", ["metrics.json", "metrics.jsonl", "scores/scores.jsonl"])
@pytest.mark.parametrize("sft", [True, False])
def test_a_flipped_byte_of_the_figures_or_of_what_they_are_made_of_is_named(evaluated, sft, name):
    stage.evaluate(evaluated, sft)
    folder = stage.evaluated(evaluated, sft)
    assert check_stage(folder / "metrics.manifest.json")[0] == []
    content = bytearray((folder / name).read_bytes())
    content[5] ^= 1
    (folder / name).write_bytes(content)
    (wrong,) = check_stage(folder / "metrics.manifest.json")[0]
    assert wrong.startswith(f"{folder / name}: ") and "has changed since the stage" in wrong


def test_metrics_of_the_model_before_training(evaluated):
    metrics = stage.evaluate(evaluated, sft=True)
    assert metrics["run"] == "sft" and "sets" not in metrics
    assert "kl_sampled" not in metrics["figures"] and metrics["figures"]["reward_best"]["mean"] == 1


def test_what_is_missing_is_counted(evaluated):
    """A prompt without answers, and prompts without a given response, which have no BLEU."""
    path = evaluated.run_folder() / "answers" / "test.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    evaluated.data.test.path = str(path.parent / "prompts.jsonl")
    source = [record for _, record in read_jsonl(evaluated.sft_folder() / "answers" / "test.jsonl")]
    with open(evaluated.data.test.path, "w") as file:
        file.writelines(json.dumps({"prompt": record["prompt"]}) + "\n" for record in source)
    metrics = stage.evaluate(evaluated, sft=False)
    assert metrics["left_out"] == {
        "prompt without answers (the ledger beside them says why)": 1,
        "BLEU: prompt without a given response": 3,
    }
    assert not [name for name in metrics["figures"] if "bleu" in name]


def test_unfinished_stages_are_named(evaluated):
    (evaluated.run_folder() / "scores" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"dpo-hps/scores: the stage `scores` is not finished; run `bash evaluate.sh`"):
        stage.evaluate(evaluated, sft=False)
