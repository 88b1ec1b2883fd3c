"""The reward model: its input is one conversation, and sharing the prompt changes no score."""

import copy
import functools
import math
from dataclasses import replace

import pytest
import torch
from conftest import make_reward_model
from transformers import AutoModelForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from annotation import reward_model
from annotation.reward_model import RewardModel, TooLong
from hps.errors import InputError
from hps.response_head import run
from hps.shared_prefix import Layout, common_prefix, make_rows, portions
from pipeline.recipe import Model

MESSAGES = [
    {"role": "user", "content": "My bread does not rise. What can I do?"},
    {"role": "assistant", "content": "Is the yeast fresh?"},
    {"role": "user", "content": "I think so."},
]
# Uneven lengths, two with a common beginning, one a beginning of another, two identical.
RESPONSES = ["Wait.", "Let it rest in a warm place, for an hour or two.", "Let it rest", "No.", "Wait.", "é" * 40]
TRUNCATED = [False, False, True, False, False, True]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A tiny model gains nothing from more, and is many times slower with them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama3_reward(llama3_tokenizer, tmp_path_factory):
    return make_reward_model(tmp_path_factory.mktemp("llama3") / "reward", llama3_tokenizer)


@pytest.fixture(scope="module", params=["chatml", "llama3"])
def reward(request, tiny_reward, llama3_reward) -> RewardModel:
    return RewardModel(Model(path=str({"chatml": tiny_reward, "llama3": llama3_reward}[request.param])), "float32")


@functools.cache
def loaded(folder: str):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()


def library_scores(reward: RewardModel, rows: list[list[int]]) -> list[float]:
    """transformers' own classification forward, each row alone and without padding."""
    folder = reward.model.config.name_or_path
    model = loaded(folder)
    # Rows hold no padding; a padding token that no row has makes the library take the last token.
    model.config.pad_token_id = next(token for token in range(599, 0, -1) if all(token not in row for row in rows))
    with torch.no_grad():
        return [model(torch.tensor([row])).logits.item() for row in rows]


def same(scores: list[float], expected: list[float]) -> None:
    assert scores == pytest.approx(expected, rel=1e-4)


# ---- scores ----


def test_scores_are_those_of_the_library(reward):
    rows = reward.conversations(MESSAGES, RESPONSES, TRUNCATED)
    scores = reward.score(MESSAGES, RESPONSES, TRUNCATED)
    assert reward.layout == Layout(shared=math.inf, padded=math.inf, gathers=True, reason="")
    same(scores, library_scores(reward, rows))
    assert len({round(score, 3) for score in scores}) == len(set(RESPONSES))  # a model that tells them apart
    assert scores[0] == pytest.approx(scores[4], rel=1e-5)


def test_padding_as_on_a_card_changes_nothing(reward, monkeypatch):
    expected = reward.score(MESSAGES, RESPONSES, TRUNCATED)
    widths = []

    def gridded(*arguments, **_):
        rows = make_rows(*arguments, gridded=True)
        widths.append(rows["input_ids"].shape[1])
        return rows

    monkeypatch.setattr(reward_model, "make_rows", gridded)
    same(reward.score(MESSAGES, RESPONSES, TRUNCATED), expected)
    assert widths and all(width % 16 == 0 for width in widths)


# Batches of one response, of a few, of all.
@pytest.mark.parametrize("batch_tokens", [1, 500, 100_000])
def test_shared_and_plain_scores_are_equal_in_any_batches(reward, batch_tokens, monkeypatch):
    monkeypatch.setattr(reward, "batch_tokens", batch_tokens)
    rows = reward.conversations(MESSAGES, RESPONSES, TRUNCATED)
    same(reward.score_rows(rows), library_scores(reward, rows))
    same(reward.score_rows_plain(rows), library_scores(reward, rows))


@pytest.mark.parametrize("shared", [math.inf, 0], ids=["shared", "separate"])
def test_responses_of_like_length_pass_together(reward, shared, monkeypatch):
    """Short and long in turns: as they come, every pass would have a long one to which the short ones are padded."""
    passes, made = [], reward_model.make_rows

    def rows_of(layout, prompts, responses, *rest, **more):
        passes.append([len(prompts[0]) + len(response) for response in responses[0]])
        return made(layout, prompts, responses, *rest, **more)

    monkeypatch.setattr(reward_model, "make_rows", rows_of)
    monkeypatch.setattr(reward, "layout", replace(reward.layout, shared=shared))
    monkeypatch.setattr(reward, "batch_tokens", 300)
    responses = [letter * count for letter in "abcd" for count in (1, 40, 2, 80)]
    rows = reward.conversations(MESSAGES, responses, [False] * len(responses))
    scores = reward.score(MESSAGES, responses, [False] * len(responses))
    same(scores, library_scores(reward, rows))
    assert len(passes) > 1 and [length for each in passes for length in each] == sorted(map(len, rows))


def test_rows_beyond_the_shared_window_count_their_prompts(reward, monkeypatch):
    """Two of the longest fit into a forward pass, the prompt in each row; a budget without it would let all in."""
    rows = reward.conversations(MESSAGES, RESPONSES, TRUNCATED)
    budget, seen = 2 * max(map(len, rows)), []

    def counting(model, module, name, made):
        seen.append(int(made["attention_mask"].sum()))
        return run(model, module, name, made)

    monkeypatch.setattr(reward, "layout", Layout(shared=8, padded=math.inf, gathers=True, reason="a window"))
    monkeypatch.setattr(reward, "batch_tokens", budget)
    monkeypatch.setattr("annotation.reward_model.run", counting)
    same(reward.score_rows(rows), library_scores(reward, rows))
    assert sum(seen) == sum(map(len, rows)) and max(seen) <= budget and len(seen) < len(rows)


@pytest.mark.parametrize("responses", [["One."], ["Same."] * 3])
def test_one_response_and_identical_ones(reward, responses):
    rows = reward.conversations(MESSAGES, responses, [False] * len(responses))
    same(reward.score(MESSAGES, responses, [False] * len(responses)), library_scores(reward, rows))


def test_equal_token_rows_are_scored_once(reward, monkeypatch):
    """Whatever the forward pass makes of a row's place: here it scores by place, the shortest row first."""
    seen = []
    monkeypatch.setattr(
        reward, "_details", lambda rows: seen.extend(rows) or [{"score": float(n)} for n in range(len(rows))]
    )
    scores = reward.score(
        [{"role": "user", "content": "Hi"}], ["a", "b", "a", "a", "b"], [False, False, False, True, False]
    )
    assert scores == [1, 2, 1, 0, 2] and len(seen) == 3  # a cut `a` is another row


def test_order_and_company_do_not_matter(reward):
    scores = reward.score(MESSAGES, RESPONSES, TRUNCATED)
    same(reward.score(MESSAGES, RESPONSES[::-1], TRUNCATED[::-1]), scores[::-1])
    same(reward.score(MESSAGES, RESPONSES[1:2], TRUNCATED[1:2]), scores[1:2])


def test_padding_with_the_end_of_turn(llama3_tokenizer, tmp_path):
    """Rows end with the padding token. The score is at that token, not at the last token that differs from it."""
    padded = copy.deepcopy(llama3_tokenizer)
    padded.pad_token = "<|eot_id|>"
    reward = RewardModel(Model(path=str(make_reward_model(tmp_path / "reward", padded))), "float32")
    rows = reward.conversations(MESSAGES, RESPONSES[:3], [False] * 3)
    assert all(row[-1] == reward.tokenizer.pad_token_id for row in rows)
    scores = reward.score(MESSAGES, RESPONSES[:3], [False] * 3)
    same(scores, library_scores(reward, rows))
    before_the_end = library_scores(reward, [row[:-1] for row in rows])
    assert all(abs(a - b) > 1e-3 for a, b in zip(scores, before_the_end, strict=True))


def test_the_bias_of_the_head_counts(tiny_reward):
    reward = RewardModel(Model(path=str(tiny_reward)), "float32")
    before = reward.score(MESSAGES, RESPONSES, TRUNCATED)
    reward.model.score.bias = torch.nn.Parameter(torch.tensor([2.5]))
    same(reward.score(MESSAGES, RESPONSES, TRUNCATED), [score + 2.5 for score in before])


def test_scores_are_float32_numbers(reward):
    (score,) = reward.score(MESSAGES, ["One."], [False])
    assert isinstance(score, float)
    assert score == torch.tensor(score, dtype=torch.float32).item()


# ---- the input ----


def test_a_truncated_response_has_no_end_of_turn(reward):
    whole, cut = (reward.conversations(MESSAGES, ["Let it rest"], [truncated])[0] for truncated in (False, True))
    ends = {reward.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot_id|>")}
    assert whole[: len(cut)] == cut
    assert whole[len(cut)] in ends
    assert cut[-1] not in ends
    scores = [reward.score(MESSAGES, ["Let it rest"], [truncated])[0] for truncated in (False, True)]
    assert abs(scores[0] - scores[1]) > 1e-3


def count(tokenizer, ids: list[int], *tokens: str) -> list[int]:
    return [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def test_the_releases_concatenation_would_be_found(llama3_reward):
    """The released code scores template(prompt, with the assistant's header) + template(reply).

    Ours has one BOS and a header for each of 4 turns. Theirs has a second BOS in the middle and a fifth header: the
    assistant's stands twice in a row, around the BOS.
    """
    reward = RewardModel(Model(path=str(llama3_reward)), "float32")
    tokenizer, reply = reward.tokenizer, [{"role": "assistant", "content": "Wait."}]
    (ours,) = reward.conversations(MESSAGES, ["Wait."], [False])
    theirs = [
        *tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False),
        *tokenizer.apply_chat_template(reply, return_dict=False),
    ]
    named = ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")
    assert count(tokenizer, ours, *named) == [1, 4, 4]
    assert count(tokenizer, theirs, *named) == [2, 5, 4]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert f"{header}<|begin_of_text|>{header}Wait.<|eot_id|>" in tokenizer.decode(theirs)
    assert ours == tokenizer.apply_chat_template([*MESSAGES, *reply], return_dict=False)
    scores = library_scores(reward, [ours, theirs])
    assert abs(scores[0] - scores[1]) > 1e-3
    assert reward.score(MESSAGES, ["Wait."], [False]) == pytest.approx(scores[:1], rel=1e-4)


# ---- what is refused ----


def test_positions_that_begin_behind_the_padding(tokenizer, tmp_path):
    """RoBERTa's 42 positions hold 41 tokens if the padding token is 0; its conversations have rows of their own."""
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=42,
        num_labels=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel(Model(path=str(tmp_path)), "float32")
    longest = 42 - 1 - tokenizer.pad_token_id
    asked, before = [{"role": "user", "content": "a"}], 0
    for size in range(longest):
        rows = model.conversations(asked, ["b " * size], [True])
        if len(rows[0]) > longest:
            with pytest.raises(TooLong, match=f"has {len(rows[0])} tokens, and the reward model has positions for"):
                model.score(asked, ["b " * size], [True])
            break
        before = len(rows[0])
        model.score(asked, ["b " * size], [True])
    assert before in (longest - 1, longest)


def test_two_labels_are_refused(tokenizer, tmp_path):
    folder = make_reward_model(tmp_path / "reward", tokenizer, labels=2)
    with pytest.raises(InputError, match=r"reward: `models.reward`: the model has 2 labels"):
        RewardModel(Model(path=str(folder)))


def test_a_language_model_is_no_reward_model(tiny_model):
    with pytest.raises(InputError, match="labels; give a sequence classifier with one label"):
        RewardModel(Model(path=str(tiny_model)))


def test_a_folder_without_a_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="check the model's path; without a network"):
        RewardModel(Model(path=str(tmp_path)))


def test_scores_that_are_not_finite_name_the_response(tiny_reward):
    """The embedding of one token is not a number; the second response has the token."""
    reward = RewardModel(Model(path=str(tiny_reward)), "float32")
    (token,) = reward.tokenizer("~")["input_ids"]
    reward.model.base_model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(InputError, match="score of response 2 is nan"):
        reward.score(MESSAGES, ["Fine.", "Not ~ fine.", "Fine too."], [False] * 3)
    reward.score(MESSAGES, ["Fine.", "Fine too."], [False] * 2)


def test_weights_that_are_not_finite_are_no_reason_to_crash(tiny_reward, tmp_path):
    """All weights of the head are NaN in the file: the first response is named."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward)
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    RewardModel(Model(path=str(tiny_reward))).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="score of response 1 is nan; check the reward model"):
        RewardModel(Model(path=str(tmp_path))).score(MESSAGES, ["Fine."], [False])


# ---- helpers ----


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2]], 1),  # the shorter row keeps one token of its own
        ([[1, 2], [1, 2]], 1),
        ([[1, 2, 3]], 2),
        ([[1], [2]], 0),
        ([[3, 1], [3, 2], [4, 1]], 0),
    ],
)
def test_common_prefix(rows, shared):
    assert common_prefix(rows) == shared


def test_portions_keep_order_and_budget():
    """A prompt of 5 tokens counts once in a shared row; a budget below one response still takes one."""
    assert list(portions(5, [1, 2, 3, 1, 1], 8, shared=True)) == [[0, 1], [2], [3, 4]]
    assert list(portions(5, [1, 2, 3, 1, 1], 13, shared=False)) == [[0, 1], [2], [3, 4]]
    assert list(portions(5, [1, 2], 2, shared=True)) == [[0], [1]]
