"""Messages to token ids: the template's own, one BOS, and exactly the tokens that a response is trained on."""

import copy

import pytest
from conftest import REPOSITORY

from hps.chat import (
    conversation_token_ids,
    end_of_turn_ids,
    inert,
    load_tokenizer,
    prompt_token_ids,
    response_token_ids,
)
from hps.errors import InputError

SMOLLM = REPOSITORY / "models" / "smollm2-135m-instruct"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Wie groß ist 3 x 4?"},
]
# The templates of tests/conftest.py applied by hand.
CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nWie groß ist 3 x 4?<|im_end|>\n<|im_start|>assistant\n"
)
LLAMA3_TEXT = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWie groß ist 3 x 4?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module", params=["chatml", "llama3", "smollm2"])
def any_tokenizer(request, tokenizer, llama3_tokenizer):
    if request.param == "smollm2":
        assert SMOLLM.is_dir(), "run `bash setup.sh train` first, as test.sh does"
        return load_tokenizer(str(SMOLLM))
    return {"chatml": tokenizer, "llama3": llama3_tokenizer}[request.param]


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_prompt_ids_are_those_of_the_chat_template(any_tokenizer):
    ids = prompt_token_ids(any_tokenizer, MESSAGES)
    assert ids == any_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert all(isinstance(token, int) for token in ids)


def test_prompt_ids_spell_the_template(tokenizer, llama3_tokenizer):
    """Byte-level tokens are lossless: decoding gives back every character of the templated text."""
    assert decoded(tokenizer, prompt_token_ids(tokenizer, MESSAGES)) == CHATML_TEXT
    assert decoded(llama3_tokenizer, prompt_token_ids(llama3_tokenizer, MESSAGES)) == LLAMA3_TEXT


def test_one_bos_and_the_mistake_of_two_would_be_found(llama3_tokenizer):
    """Templating to text and tokenising the text, as the released code does, adds a second BOS."""
    bos = llama3_tokenizer.bos_token_id
    ids = prompt_token_ids(llama3_tokenizer, MESSAGES)
    assert ids.count(bos) == 1
    assert ids[0] == bos
    text = llama3_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert llama3_tokenizer(text)["input_ids"] == [bos, *ids]


@pytest.mark.parametrize("truncated", [False, True])
def test_response_ids_end_with_the_turn_unless_truncated(any_tokenizer, truncated):
    """Nothing behind the end of the turn (ChatML's newline); without the end when the response was cut."""
    end = {"<|im_end|>", "<|eot_id|>"} & set(any_tokenizer.get_vocab())
    ids = response_token_ids(any_tokenizer, MESSAGES, "It is 12.", truncated)
    assert decoded(any_tokenizer, ids) == "It is 12." + ("" if truncated else end.pop())


def test_prompt_and_response_are_the_conversation(any_tokenizer):
    """The conversation as a whole begins with prompt and response; what follows is the newline of ChatML or nothing."""
    whole = conversation_token_ids(any_tokenizer, MESSAGES, "It is 12.", truncated=False)
    prompt = prompt_token_ids(any_tokenizer, MESSAGES)
    response = response_token_ids(any_tokenizer, MESSAGES, "It is 12.", truncated=False)
    assert whole[: len(prompt) + len(response)] == prompt + response
    assert decoded(any_tokenizer, whole[len(prompt) + len(response) :]) in ("\n", "")
    cut = conversation_token_ids(any_tokenizer, MESSAGES, "It is 12.", truncated=True)
    assert cut == prompt + response[:-1]


# What spells a special token is ordinary text, with a space in it; the template's own end of turn comes behind it.
@pytest.mark.parametrize(
    "response",
    ["I write <|im_end|> here", "<|im_end|>", "<|eot_id|>", "a<|im_start|>user\nb<|im_end|>", "<|begin_of_text|>x"],
)
def test_special_tokens_in_a_response_do_not_break_it(any_tokenizer, response):
    end = "<|eot_id|>" if "<|eot_id|>" in any_tokenizer.get_vocab() else "<|im_end|>"
    text = inert(any_tokenizer, response)
    assert decoded(any_tokenizer, response_token_ids(any_tokenizer, MESSAGES, response, False)) == text + end
    assert decoded(any_tokenizer, response_token_ids(any_tokenizer, MESSAGES, response, True)) == text


def test_ends_of_turn(tokenizer, llama3_tokenizer):
    """Llama-3 ends a turn with <|eot_id|>, which is not its end of sequence."""
    named = llama3_tokenizer.convert_tokens_to_ids
    assert end_of_turn_ids(llama3_tokenizer) == {named("<|eot_id|>"), named("<|end_of_text|>")}
    assert end_of_turn_ids(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_template_that_always_opens_a_turn(llama3_tokenizer):
    """Llama-3's first template. The header behind a conversation is no end of turn, and is no part of a response."""
    always = copy.deepcopy(llama3_tokenizer)
    always.chat_template = always.chat_template.replace("{% if add_generation_prompt %}", "{% if true %}")
    assert end_of_turn_ids(always) == end_of_turn_ids(llama3_tokenizer)
    cut, usual = (conversation_token_ids(each, MESSAGES, "12", truncated=True) for each in (always, llama3_tokenizer))
    assert cut == usual
    for truncated in (False, True):
        found, usual = (response_token_ids(each, MESSAGES, "12", truncated) for each in (always, llama3_tokenizer))
        assert found == usual


def test_a_prompt_whose_tokens_change_is_refused(llama3_tokenizer):
    """A template that drops earlier answers once a new one is there (as reasoning models' do)."""
    forgetful = copy.deepcopy(llama3_tokenizer)
    forgetful.chat_template = (
        "{% for message in messages %}"
        "{% if message['role'] != 'assistant' or loop.last or messages[-1]['role'] == 'user' %}"
        "[{{ message['role'] }}]{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(InputError, match="not the beginning of the conversation"):
        response_token_ids(forgetful, MESSAGES, "12", truncated=False)


def test_white_space_that_merges_with_the_header_is_refused_not_misread(tokenizer):
    """ChatML's header ends with a newline; a response that begins with two may share a token with it."""
    for response in ("\n\nTwelve", "  Twelve", "\tTwelve"):
        try:
            ids = response_token_ids(tokenizer, MESSAGES, response, truncated=True)
        except InputError as error:
            assert "cut white space in front of the response" in str(error)
        else:
            assert decoded(tokenizer, ids) == response


def test_tokenizers_that_cannot_serve_are_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match="no tokenizer there"):
        load_tokenizer(str(tmp_path))
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    without.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="plain: the tokenizer has no chat template"):
        load_tokenizer(str(tmp_path / "plain"))


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    without.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == tokenizer.eos_token_id
