"""tools/chat.py: the answers before and after training to a typed prompt."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hps.chat import end_of_turn_ids, load_tokenizer, prompt_token_ids, sampled_text
from hps.errors import InputError
from pipeline.stage import Work, claim
from tools.chat import Both, chat, main, recipe_of

LORA = ("lora.enabled=true", "lora.enabled=false")


@pytest.fixture
def run_of(finished):
    """The folder of a run with a real manifest."""

    def make(*overrides: str, trained: bool):
        recipe = finished(*overrides, trained=trained)
        claim(recipe.run_folder(), {})
        Work(recipe.run_folder(), recipe, {}).finish([])
        return recipe.run_folder()

    return make


def likeliest(model, tokenizer, prompt: str, count: int) -> str:
    """The most probable tokens one after another, each by a forward pass of its own."""
    ids = prompt_token_ids(tokenizer, [{"role": "user", "content": prompt}])
    start, ends = len(ids), end_of_turn_ids(tokenizer)
    with torch.no_grad():
        while len(ids) < start + count and (len(ids) == start or ids[-1] not in ends):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return sampled_text(tokenizer, ids[start:], truncated=ids[-1] not in ends).strip()


@pytest.mark.parametrize("lora", LORA)
def test_the_first_answer_is_the_model_before_training(run_of, lora, tiny_model):
    """Both are the same while the adapter does nothing; a trained policy differs, and the model before it does not."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = load_tokenizer(str(tiny_model))
    expected = likeliest(base, tokenizer, "What is tea?", 12)
    both = Both(recipe_of(run_of(lora, "run=untrained", trained=False)), tokens=12, greedy=True)
    assert both.answer("What is tea?", 0) == (expected, expected)
    both = Both(recipe_of(run_of(lora, trained=True)), tokens=12, greedy=True)
    before, after = both.answer("What is tea?", 0)
    assert before == expected != after


def test_sampled_answers_are_random_and_come_again(run_of):
    recipe = recipe_of(run_of("generation.temperature=1.5", trained=False))
    found = [[Both(recipe, tokens=8).answer("Why?", number) for number in (0, 1)] for _ in range(2)]
    assert found[0] == found[1] and found[0][0] != found[0][1]
    assert all(before == after for before, after in found[0])  # the same random numbers, and nothing was trained


def test_prompts_are_answered_side_by_side(run_of, capsys):
    both = Both(recipe_of(run_of(trained=True)), tokens=4, greedy=True)
    lines = list(chat(both, ["What is tea?\n", "  \n", "Why?\n"], 60))
    titles = [line for line in lines if line.startswith("BEFORE TRAINING")]
    assert len(titles) == 2 and all(line == "" or line[28:31] == " | " for line in lines)


def test_the_folder_may_have_moved(run_of, tmp_path):
    run = run_of(trained=False)
    moved = tmp_path / "elsewhere" / "kept"
    moved.parent.mkdir()
    run.rename(moved)
    assert recipe_of(moved).checkpoint_folder() == moved / "checkpoint"


def test_a_later_round_is_opened_in_its_own_folder(run_of, tmp_path):
    """Also where it is moved; before training is the first policy."""
    run = run_of("round=2", trained=True)
    assert run.name == "round-2" and recipe_of(run).checkpoint_folder() == run / "checkpoint"
    before, after = Both(recipe_of(run), tokens=12, greedy=True).answer("What is tea?", 0)
    assert before != after
    run.rename(moved := tmp_path / "kept")
    assert recipe_of(moved).checkpoint_folder() == moved / "checkpoint"


@pytest.mark.parametrize("tokens", ["-5", "0"])
def test_an_answer_has_a_token_at_least(tokens, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["chat", "run", "--tokens", tokens])
    with pytest.raises(SystemExit):
        main()
    assert f"--tokens: {tokens} is not above 0" in capsys.readouterr().err


def test_other_folders_are_refused(run_of, tmp_path):
    with pytest.raises(InputError, match="the run is not finished|bash run.sh"):
        recipe_of(tmp_path)
    run = run_of(trained=False)
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(InputError, match="the manifest itself"):
        recipe_of(run)
    assert json.loads(manifest.read_text())["recipe"]["seed"] == 8
