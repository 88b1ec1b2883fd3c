"""Rewards that are functions: values by hand, what is refused, what is claimed, and noise on the ranking."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import REPOSITORY, candidate, write_candidates

from annotation import annotate as stage
from annotation import score_answers as scoring
from annotation.annotate import add_noise, annotate, summarize, turned_pairs
from annotation.rewards import brevity, checks, sentiment
from evaluation.metrics import print_metrics
from evaluation.results import result_key
from hps.errors import InputError
from pipeline import functions
from pipeline.files import write_json
from pipeline.functions import FunctionScorer, function_hash
from pipeline.identity import check_model, identified, model_hash
from pipeline.models import same_model
from pipeline.preflight import preflight
from pipeline.recipe import Model, Reward, as_dict, as_yaml, load_recipe
from pipeline.records import read_jsonl, read_ranked
from pipeline.responses import rank
from tools.pin import pin
from tools.prefetch import prefetch
from tools.verify import verify

SHORT = "def short(prompts, completions, **kwargs):\n    return [-float(len(c[0]['content'])) for c in completions]\n"
MESSAGES = [{"role": "user", "content": "Hi"}]
CANDIDATES = {"train": [candidate(number) for number in range(4)], "test": [candidate(4), candidate(5)]}


@pytest.fixture
def file(tmp_path) -> Path:
    """The user's file beside the recipe."""
    path = tmp_path / "mine.py"
    path.write_text(SHORT)
    return path


@pytest.fixture
def load(tiny_recipe, file):
    """The tiny recipe, with `models.reward` as it is given, and candidates."""

    def load(reward: str = "{function: mine.py:short}", *overrides: str):
        text = re.sub(r"  reward: .*", f"  reward: {reward}", tiny_recipe.read_text())
        tiny_recipe.write_text(text)
        recipe = load_recipe(tiny_recipe, list(overrides))
        write_candidates(recipe, CANDIDATES)
        return recipe

    return load


@pytest.fixture
def scorer(file, tiny_model):
    def scorer(text: str, name: str = "f") -> FunctionScorer:
        file.write_text(text)
        return FunctionScorer(f"{file}:{name}", "models.reward.function", Model(path=str(tiny_model)))

    return scorer


def refusal(call, *arguments, **named) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


def completions(*texts: str) -> list:
    return [[{"role": "assistant", "content": text}] for text in texts]


def asking(request: str, *texts: str) -> list[float]:
    return checks([[{"role": "user", "content": request}]] * len(texts), completions(*texts))


# ---- the shipped functions ----


def test_sentiment():
    """VADER's own example: 'great' is 3.1 in its lexicon, and 3.1 / sqrt(3.1^2 + 15) = 0.6249; the compound score is
    rounded to four digits. 'bad' is -2.5: -0.5423. A text without such words has 0."""
    assert sentiment([], completions("great", "bad", "The table.")) == [0.6249, -0.5423, 0.0]


def test_brevity():
    assert brevity([], completions("a", "b"), [[1, 2, 3], []]) == [-3.0, 0.0]


@pytest.mark.parametrize(
    ("request_", "texts", "grades"),
    [
        ("Answer in two sentences.", ["One. Two!", "One.", "A. B. C.", "A. B. C. D. E."], [1, 0.5, 0.5, 0]),
        ("Three sentences, please", ['He said "Go." Then left. No', "Only one"], [1, 1 / 3]),
        ("Use at most 4 words.", ["a b", "a b c d e", "a b c d e f g h"], [1, 0.75, 0]),
        ("At least four words", ["a b c d e f", "a b"], [1, 0.5]),
        ("Give exactly one line", ["a\n", "a\n\nb"], [1, 0]),
        ("Write without the letter 'e'.", ["No such sign", "The end is it"], [1, 0.5]),
        ("Use no letter o", ["No"], [0]),
        ("Answer in capital letters", ["ABC!", "Ab"], [1, 0.5]),
        ("Answer in lower case", ["abc", "ABCd"], [1, 0.25]),
        ("no commas!", ["a b", "a, b, c"], [1, 1 / 3]),
        ('Begin with the word "Yes"', ["yes, it is", "It is"], [1, 0]),
        ("End with a question mark", ["Is it? ", "It is."], [1, 0]),
        ("In one sentence, without the letter e.", ["A cat sat. He left.", ""], [(0 + 3 / 5) / 2, 0]),
    ],
)
def test_checks(request_, texts, grades):
    assert asking(request_, *texts) == pytest.approx(grades)


@pytest.mark.parametrize(
    "request_",
    [
        *("Write 1,500 words", "Write 2.5 lines", "Use twenty-one words", "Give 2-3 sentences", "Two or three lines"),
        *("fewer than 4 words", "more than 4 words", "under 4 words", "between two and four lines", "2 to 4 lines"),
    ],
)
def test_a_number_that_is_no_count_is_not_graded(request_):
    with pytest.raises(ValueError, match="no instruction that `checks` can verify"):
        asking(request_, "a b c")


def test_only_the_last_message_instructs():
    messages = [{"role": "user", "content": "One line."}, {"role": "assistant", "content": "No."}]
    with pytest.raises(ValueError, match="no instruction that `checks` can verify"):
        checks([[*messages, {"role": "user", "content": "Why?"}]], completions("a"))


# ---- the recipe ----


def test_a_function_takes_the_models_place(load, file, tiny_recipe):
    """The later of default, recipe and command line counts, whichever of the two it names."""
    recipe = load()
    assert recipe.models.reward == Reward(path=None, revision=None, function=f"{file}:short")
    for override, reward in (
        ("models.reward.function=brevity", Reward(function="brevity")),
        ("models.reward.function=annotation/rewards.py:brevity", Reward(function="brevity")),
        ("models.reward={function: checks}", Reward(function="checks")),
        ("models.reward.path=models/b", Reward(path="models/b")),
    ):
        assert load_recipe(tiny_recipe, [override]).models.reward == reward
    assert load_recipe(tiny_recipe, ["models.evaluator.function=brevity"]).models.evaluator == Reward(
        function="brevity"
    )
    bare = tiny_recipe.with_name("bare.yaml")
    bare.write_text("output: x\nmodels: {reward: {function: checks}}\ndata: {train: {path: a}, test: {path: b}}\n")
    recipe = load_recipe(bare)
    assert recipe.models.reward == Reward(function="checks") and recipe.models.evaluator.path.startswith("RLHFlow/")


def test_the_resolved_recipe_is_a_recipe(load, tiny_recipe):
    for reward in ("{function: mine.py:short}", "{function: sentiment}"):
        recipe = load(reward)
        again = tiny_recipe.with_name("again.yaml")
        again.write_text(as_yaml(recipe))
        assert load_recipe(again) == recipe
        assert as_dict(recipe)["models"]["reward"]["path"] is None


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{function: sentiment, path: models/b}", "`models.reward` has both a `path` and a `function`; leave one"),
        ("{function: sentiment, revision: abc}", "`models.reward.revision` is of a model"),
        ("{path: null}", "`models.reward.path` is missing; name a model, or a `function`"),
        ("{function: my rewards}", "is `my rewards`; give the name of a function of annotation/rewards.py, or"),
        ("{function: mine.txt:short}", "is `mine.txt:short`; give the name"),
        ("{function: other.py:short}", "there is no file other.py beside the recipe, and none in this repository"),
        ("{function: sub/../../outside.py:f}", "is neither below the recipe's folder nor in this repository"),
        ("{function: loop.py:f}", "there is no file loop.py beside the recipe"),
        ("{function: " + "a" * 999 + ".py:f}", "beside the recipe, and none in this repository"),
        ("{function: link.py:f}", "is neither below the recipe's folder nor in this repository"),
    ],
)
def test_bad_names_are_refused_with_their_line(load, tiny_recipe, tmp_path, reward, message):
    outside = tmp_path.parent / "outside.py"
    outside.write_text("def f(): pass\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.py").symlink_to(outside)
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    text = refusal(load, reward)
    assert text.startswith(f"{tiny_recipe}:6: ") and message in text


def test_path_and_function_of_the_command_line_are_refused(load):
    overrides = ("models.reward.path=a", "models.reward.function=brevity")
    assert "has both a `path` and a `function`" in refusal(load, "{function: sentiment}", *overrides)
    load("{function: sentiment}", "models.reward.path=null", "models.reward.function=brevity")


@pytest.mark.parametrize("role", ["generator", "policy", "judge"])
def test_models_that_write_are_no_functions(load, role):
    assert f"unknown key `models.{role}.function`" in refusal(load, "{function: brevity}", f"models.{role}.function=f")


def test_noise_is_bounded(load):
    assert "`annotation.noise` is `-1`" in refusal(load, "{function: brevity}", "annotation.noise=-1")


# ---- bad functions, without running them and running them ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "def other(): pass\n",
            "mine.py: `models.reward.function`: the file has no `def f` at the left margin; it has: other",
        ),
        ("f = 1\n", "the file has no `def f` at the left margin; define one: def NAME(prompts, completions, **kwargs)"),
        ("class f: pass\n", "has no `def f` at the left margin"),
        ("async def f(**kwargs): return []\n", "has no `def f` at the left margin"),
        ("if True:\n    def f(**kwargs): return []\n", "has no `def f` at the left margin"),
        ("x = " + "-" * 100_000 + "1\n", "mine.py:1: this is not Python (nested too deeply); correct it"),
        ("def f(:\n", "mine.py:1: this is not Python (invalid syntax); correct it"),
        ("\n\0", "this is not Python (source code string cannot contain null bytes)"),
        (
            "import os\nimport helpers\n",
            "mine.py:2: the file imports `helpers`, which is not an installed package; install",
        ),
        ("def f():\n    from . import helpers\n", "mine.py:2: the file imports `.`"),
        ("from pipeline.records import canonical\n", "mine.py:1: the file imports `pipeline.records`"),
    ],
)
def test_a_bad_file_is_refused_without_running_it(file, text, message):
    (file.parent / "helpers.py").write_text("")
    file.write_text(text)
    reward = Reward(function=f"{file}:f")
    assert message in refusal(check_model, reward, "models.reward")


F = "def f(prompts, completions, **kwargs):\n    "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (F + "return 1.0", ":1: `models.reward.function` `f` returns float; return a list of floats"),
        (F + "return (1.0, 2.0, 3.0)", "`f` returns tuple"),
        (F + "return None", "`f` returns NoneType"),
        (F + "return [1.0]", "`f` returns 1 scores for 3 responses; return one for each of `completions`"),
        (F + "return [0.0, None, 1.0]", "`f` gives response 2 None; return a float for each response"),
        (F + "return [0.0, 1.0, 'x']", "`f` gives response 3 'x'"),
        (F + "return [True, 1.0, 1.0]", "`f` gives response 1 True"),
        (F + "import numpy\n    return [numpy.bool_(1)] * 3", "`f` gives response 1 "),
        (F + "import torch\n    return [torch.zeros(2)] * 3", "`f` gives response 1 tensor([0., 0.])"),
        (F + "return [0.0, float('nan'), 0.0]", "response 2 the score nan; return finite numbers within 1.7e+38"),
        (F + "return [0.0, 0.0, -float('inf')]", "response 3 the score -inf"),
        (F + "return [10**400, 0.0, 0.0]", "response 1 the score 1000"),
        (
            "def g(text):\n    return 1 / (text != 'two')\n\n" + F + "return [g(c[0]['content']) for c in completions]",
            "mine.py:2: `models.reward.function` `f` raised on response 2 ZeroDivisionError: division by zero; correct",
        ),
        (F + "raise SystemExit(3)", "mine.py:2: `models.reward.function` `f` raised on response 1 SystemExit: 3"),
        (
            "def f(prompts, completions):\n    return []",
            "mine.py:1: `models.reward.function` `f` raised on response 1 TypeError: f() got an unexpected keyword "
            "argument 'completion_ids'; correct the function (def NAME(prompts, completions, **kwargs))",
        ),
        (
            F + "prompts.clear()\n    return [1 / (c[0]['content'] != 'two') for c in completions]",
            "raised on response 2 ZeroDivisionError",
        ),
        ("class E(Exception):\n    def __str__(self): raise E\n" + F + "raise E", "on response 1 E: a E; correct"),
        ("class R:\n    def __repr__(self): raise KeyError\n" + F + "return [R()] * 3", "gives response 1 a R; return"),
        ("class R:\n    def item(self): raise KeyError\n" + F + "return [R()] * 3", "response 1 <hps_function"),
        ("class L(list):\n    def __len__(self): return 3\n" + F + "return L()", "`f` returns L; return a list"),
        ("import random\n" + F + "return [random.random() for _ in prompts]", "equal responses must get equal scores"),
        (F + "return [0.0, 1.0, 2.0]", "gives response 3 the score 2.0, and 0.0 as response 1; equal responses"),
    ],
)  # fmt: skip
def test_bad_scores_are_refused(scorer, text, message):
    """Responses: one, two, one."""
    bad = scorer(text + "\n")
    assert message in refusal(bad.score, MESSAGES, ["one", "two", "one"], [False] * 3)


def test_a_file_that_raises_names_its_line(scorer):
    message = "mine.py:2: the file of `models.reward.function` `f` raised KeyError: 'x'"
    assert message in refusal(scorer, "def f(): pass\n{}['x']\n")


def test_what_a_function_is_given(scorer, tiny_model, tmp_path):
    """The ids are those the writing model is trained on: its tokens, and the end of the turn unless it was cut."""
    from hps.chat import load_tokenizer, response_token_ids

    seen = tmp_path / "seen.json"
    found = scorer(
        "import json\nimport numpy\nimport torch\n"
        "def f(prompts, completions, completion_ids, truncated, prompt_id, **kwargs):\n"
        f"    columns = [prompts, completions, completion_ids, truncated, prompt_id]\n"
        f"    open({str(seen)!r}, 'w').write(json.dumps(columns))\n"
        "    prompts[0][0]['content'] = 'changed'\n"
        "    return [numpy.float32(0.5), torch.tensor(2)]\n"
    ).score(MESSAGES, ["Fine.", "No"], [False, True], "p1")
    assert found == [0.5, 2.0] and all(type(value) is float for value in found)
    tokenizer = load_tokenizer(str(tiny_model))
    ids = [response_token_ids(tokenizer, MESSAGES, *each) for each in (("Fine.", False), ("No", True))]
    assert ids[0][-1] == tokenizer.eos_token_id != ids[1][-1]
    assert json.loads(seen.read_text()) == [
        [MESSAGES, MESSAGES],
        completions("Fine.", "No"),
        ids,
        [False, True],
        ["p1", "p1"],
    ]


# ---- the stages ----


def ranked(recipe) -> dict[str, list[dict]]:
    return {split: [record for _, record in read_ranked(recipe.ranked(split))] for split in ("train", "test")}


def test_two_lines_rank_by_a_function_of_ones_own(load, file, capsys):
    """From candidates to the manifest: shorter is better, and a cut response stays marked."""
    recipe = load()
    annotate(recipe)
    assert capsys.readouterr().out.splitlines()[0] == f"reward function: short of {file}"
    for records in ranked(recipe).values():
        for record in records:
            assert record["responses"][:2] == ["No.", "Perhaps"] and record["rewards"][:2] == [-3.0, -7.0]
            assert record["truncated"][:2] == [False, True] and "rewards_without_noise" not in record
    manifest = json.loads((recipe.ranked("train").parent / "manifest.json").read_text())
    assert manifest["settings"]["model"] == {
        "function": "mine.py:short",
        "sha256": manifest["inputs"][str(file)],
        "packages": {},
    }
    assert not (Path(recipe.output).parent / "canaries").exists()
    capsys.readouterr()
    annotate(recipe)
    assert "annotation: finished before" in capsys.readouterr().out


def test_verify_finds_a_changed_function(load, file, capsys):
    recipe = load()
    annotate(recipe)
    file.write_text(SHORT.replace("-", "+"))
    assert verify(recipe.ranked("train").parent) == 1
    assert f"{file}: an input, has changed" in capsys.readouterr().out
    assert "model.sha256 was" in refusal(annotate, recipe)


def test_a_function_that_changes_under_a_running_stage_is_refused(load, file):
    recipe = load()
    file.write_text(f"open({str(file)!r}, 'a').write('# changed')\n" + SHORT)
    assert f"{file}: the file changed while this stage worked on it" in refusal(annotate, recipe)


def test_a_bad_score_names_the_record(load, file):
    recipe = load()
    file.write_text(
        "def short(prompts, completions, prompt_id, **kwargs):\n    return [1 / (prompt_id[0] != 'p2')] * 4\n"
    )
    start = f"{recipe.candidates('train')}:3: prompt p2: {file}:2: `models.reward.function` `short` raised on "
    assert refusal(annotate, recipe).startswith(start + "response 1 ZeroDivisionError: ")
    assert [record["prompt_id"] for record in ranked(recipe)["train"]] == ["p0", "p1"]
    file.write_text(SHORT)
    assert "model.sha256 was" in refusal(annotate, recipe)  # what was scored is another function's


def test_a_prompt_without_an_instruction_is_refused_by_name(load):
    recipe = load("{function: checks}")
    text = refusal(annotate, recipe)
    assert text.startswith(f"{recipe.candidates('train')}:1: prompt p0: annotation/rewards.py:")
    assert "raised on response 1 ValueError: the last message has no instruction that `checks` can verify" in text


def test_what_identifies_a_function(file, monkeypatch):
    file.write_text("import json\nimport yaml\nfrom annotation.rewards import brevity\n" + SHORT)
    one = function_hash(f"{file}:short")
    assert set(one["packages"]) == {"PyYAML", "annotation.rewards", "vaderSentiment"}
    elsewhere = file.parent / "folder" / "mine.py"
    elsewhere.parent.mkdir()
    shutil.copy(file, elsewhere)
    assert function_hash(f"{elsewhere}:short") == one  # no path of a machine
    assert same_model(Reward(function=f"{elsewhere}:short"), Reward(function=f"{file}:short"))
    assert not same_model(Reward(function=f"{file}:short"), Reward(path="a/b"))
    assert not same_model(Reward(function="brevity"), Reward(function="sentiment"))
    monkeypatch.setattr(functions, "version", lambda package: "0")
    other = function_hash(f"{file}:short")
    assert other["sha256"] == one["sha256"] and other != one
    assert model_hash(Reward(function="sentiment"))["packages"] == {"vaderSentiment": "0"}
    elsewhere.write_text(file.read_text() + "\n")
    assert function_hash(f"{elsewhere}:short")["sha256"] != one["sha256"]


def test_whatever_decides_the_ranking_is_claimed(load):
    recipe = load()
    before = stage.stage_settings(recipe)
    recipe.annotation.dtype = "bfloat16"  # of no model here
    assert stage.stage_settings(recipe) == before
    recipe.annotation.noise = 0.5
    assert stage.stage_settings(recipe) == before | {"noise": {"standard_deviation": 0.5, "seed": 7}}


def test_a_result_of_a_model_has_the_key_it_always_had(load, tiny_recipe, tiny_reward, file):
    key = result_key(load(f"{{path: {tiny_reward}}}"))
    assert key["models"]["reward"] == {"path": str(tiny_reward), "revision": None}
    assert key["annotation"] == {"dtype": "float32"}
    key = result_key(load_recipe(tiny_recipe, ["models.reward.function=mine.py:short", "annotation.noise=1"]))
    assert key["models"]["reward"]["function"] == "mine.py:short" and key["annotation"]["noise"] == 1.0
    assert result_key(load("{function: sentiment}"))["models"]["reward"] == {"function": "sentiment"}


def test_answers_are_scored_by_a_function(load, capsys):
    """The evaluation's side, by tokens of the policy: the model before training, with the given responses."""
    recipe = load("{function: brevity}", "models.evaluator.function=brevity", "evaluation.samples=2")
    from pipeline.prompts import evaluated_prompts

    prompts = evaluated_prompts(recipe)[0]
    folder = recipe.sft_folder() / "answers"
    folder.mkdir(parents=True)
    with (folder / "test.jsonl").open("w") as out:
        for name, prompt in prompts.items():
            line = {"prompt_id": name, "prompt": prompt["prompt"], "responses": ["Yes", "Yes"]}
            out.write(json.dumps({**line, "token_counts": [1, 1], "truncated": [True, False]}) + "\n")
    write_json(folder / "manifest.json", {})
    scoring.score(recipe, sft=True)
    assert capsys.readouterr().out.splitlines()[0] == "evaluator function: brevity of annotation/rewards.py"
    lines = [line for _, line in read_jsonl(scoring.scores_path(recipe, True))]
    assert len(lines) == len(prompts) == 4
    for line in lines:
        cut, whole = (each["score"] for each in line["answers"])
        assert whole == cut - 1 and len(line["given"]) == 2  # the end of the turn is a token


def test_the_preflight_says_and_tries_what_will_run(load, tiny_recipe, file, capsys):
    recipe = load("{function: mine.py:short}", "models.evaluator.function=mine.py:short", "annotation.noise=0.5")
    preflight("gene", recipe, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"reward function: short of {file}"
    assert f"plan: reward: function short of {file}" in lines
    assert "plan: reward: Gaussian noise of standard deviation 0.5 is added to the ranking rewards" in lines
    assert "plan: ranked and evaluated by the same function: this is the true reward of the experiment" in lines
    assert not any("WARNING" in line for line in lines)
    file.write_text("def short(prompts, completions, **kwargs):\n    return []\n")
    preflight("gene", recipe, dry_run=True)  # runs nothing
    text = refusal(preflight, "gene", recipe, dry_run=False)
    assert re.match(
        rf"{recipe.data.train.path}:1: prompt \w+: {file}:1: `models.reward.function` `short` returns 0", text
    )


def test_pages_and_commands_name_a_function(load, tiny_recipe, capsys):
    recipe = load("{function: sentiment}")
    pin(str(tiny_recipe))
    prefetch(recipe, str(tiny_recipe))
    said = capsys.readouterr().out
    assert "pin: reward: the function sentiment\n" in said and "prefetch: reward: the function sentiment\n" in said
    settings = {"model": model_hash(recipe.models.reward), "noise": {"seed": 7}}
    assert list(identified(settings)) == [("model", settings["model"])]
    metrics = {"run": "sft", "samples": 1, "prompts": 40, "evaluator_is_reward": True, "left_out": {}, "figures": {}}
    print_metrics(metrics, Path("x"), function=True)
    assert "ranked and evaluated by the same function" in capsys.readouterr().out


# ---- noise ----


def test_noise_is_of_seed_prompt_and_text_alone():
    record = rank(candidate(1, "a", "b", "c", "d"), [4.0, 3.0, 2.0, 1.0])
    noisy = add_noise(record, 2.0, seed=7)
    again = add_noise(rank(candidate(1, "d", "c", "b", "a"), [1.0, 2.0, 3.0, 4.0]), 2.0, seed=7)
    assert noisy["rewards"] == again["rewards"] and noisy["responses"] == again["responses"]
    before = dict(zip(noisy["responses"], noisy["rewards_without_noise"], strict=True))
    assert before == {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}
    assert noisy["rewards"] == sorted(noisy["rewards"], reverse=True)
    others = [add_noise(record, 2.0, seed=8), add_noise({**record, "prompt_id": "q"}, 2.0, seed=7)]
    assert all(set(other["rewards"]).isdisjoint(noisy["rewards"]) for other in others)
    tied = add_noise(rank(candidate(1, "a", "a"), [1.0, 1.0]), 2.0, seed=7)
    assert tied["rewards"][0] == tied["rewards"][1] != 1.0


def test_noise_is_gaussian():
    """Of 4,000 draws mean and deviation are within 4 standard errors (0.063 and 0.045), and 31.7 % beyond one."""
    texts = [f"text {number}" for number in range(4000)]
    record = {**candidate(1, *texts), "rewards": [10.0] * 4000}
    drawn = [reward - 10 for reward in add_noise(record, 1.0, seed=0)["rewards"]]
    mean = sum(drawn) / 4000
    assert abs(mean) < 0.063
    assert abs((sum((each - mean) ** 2 for each in drawn) / 4000) ** 0.5 - 1) < 0.045
    assert abs(sum(abs(each) > 1 for each in drawn) / 4000 - 0.317) < 0.03


def test_the_share_of_pairs_that_noise_turned():
    """Without noise 3 > 2 > 1 = 1: five pairs have an order. Now 2 is first: one of five is turned."""
    assert turned_pairs([9.0, 8.0, 1.0, 0.5], [2.0, 3.0, 1.0, 1.0]) == 0.2
    assert turned_pairs([2.0, 1.0], [1.0, 1.0]) == 0.0


def test_a_noisy_ranking_goes_on_where_it_was_stopped(load):
    recipe = load("{function: mine.py:short}", "annotation.noise=3")
    annotate(recipe)
    train = recipe.ranked("train")
    whole = train.read_bytes()
    lines = whole.splitlines(keepends=True)
    train.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    (train.parent / "manifest.json").unlink()
    annotate(recipe)
    assert train.read_bytes() == whole
    assert 0 < summarize(train)["pairs_turned_by_noise"] < 1
    record = json.loads(lines[0])
    record["rewards_without_noise"][1] = None
    train.write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError, match=r"`rewards_without_noise\[1\]` is null"):
        list(read_ranked(train))


# ---- the documentation ----


def test_the_example_of_the_documentation_ranks(tiny_recipe):
    """docs/operations.md, "Rewards that are functions": the first block of Python is the file, the YAML the lines."""
    section = (REPOSITORY / "docs" / "operations.md").read_text().partition("## Rewards that are functions")[2]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    yaml = re.search(r"```yaml\n(.*?)```", section, re.S)[1]
    tiny_recipe.with_name("my_rewards.py").write_text(code)
    first, line = yaml.splitlines()
    assert first == "models:"
    tiny_recipe.write_text(re.sub(r"  reward: .*", line, tiny_recipe.read_text()))
    recipe = load_recipe(tiny_recipe)
    write_candidates(recipe, CANDIDATES)
    annotate(recipe)
    for record in ranked(recipe)["train"]:
        assert record["rewards"] == [float("?" in text) for text in record["responses"]]
