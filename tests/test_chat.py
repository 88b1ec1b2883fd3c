"""Messages to token ids: the template's own, one BOS, and exactly the tokens that a response is trained on."""

import copy
import itertools
import json
from datetime import datetime

import pytest
import transformers
from conftest import CHATML, DATA, REPOSITORY, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from hps import chat
from hps.chat import (
    check_records,
    conversation_token_ids,
    encode,
    end_of_turn_ids,
    inert,
    load_tokenizer,
    model_tokens,
    prompt_token_ids,
    response_token_ids,
    same_tokens,
    sampled_text,
)
from hps.errors import InputError
from pipeline.records import read_prompts

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


def test_a_template_that_leaves_a_message_out_is_refused(llama3_tokenizer):
    """Here earlier answers: the model would answer another conversation than the stored one."""
    forgetful = copy.deepcopy(llama3_tokenizer)
    forgetful.chat_template = (
        "{% for message in messages %}"
        "{% if message['role'] != 'assistant' or loop.last or messages[-1]['role'] == 'user' %}"
        "[{{ message['role'] }}]{% if message['role'] != 'assistant' %}{{ message['content'] }}{% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(InputError, match=r"leaves out message 3 of 4 \(assistant\)"):
        response_token_ids(forgetful, MESSAGES, "12", truncated=False)


@pytest.mark.parametrize("response", ["\n\nTwelve", "  Twelve", "\tTwelve", "Twelve\n"])
def test_white_space_around_a_response_stays(any_tokenizer, response):
    """ChatML's header ends with a newline, Llama-3's template strips texts: a response keeps its own all the same."""
    ids = response_token_ids(any_tokenizer, MESSAGES, response, truncated=True)
    assert decoded(any_tokenizer, ids) == response


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "reward-proxy"])
def test_the_embedded_models_see_what_their_template_writes(model):
    """ChatML ends with the end of the turn and a newline; of a cut response both go, of one to train the newline."""
    tokenizer = load_tokenizer(str(SMOLLM.with_name(model)))
    for _, record in itertools.islice(read_prompts(DATA / "safety_test.jsonl"), 12):
        asked = record["prompt"]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        for text in (record["responses"][0], "<think>\nno\n</think>\n\nYes."):
            reply = {"role": "assistant", "content": text}
            whole = tokenizer.apply_chat_template([*asked, reply], return_dict=False)
            assert whole[: len(prompt)] == prompt
            assert conversation_token_ids(tokenizer, asked, text, False) == whole
            assert conversation_token_ids(tokenizer, asked, text, True) == whole[:-2]
            assert response_token_ids(tokenizer, asked, text, False) == whole[len(prompt) : -1]
            assert response_token_ids(tokenizer, asked, text, True) == whole[len(prompt) : -2]


# ---- any template ----

TEMPLATES = st.fixed_dictionaries(
    {
        "ends": st.sampled_from(["", "<|im_end|>", "<|im_end|><|endoftext|>", "<|im_end|>\n"]),
        "at_the_end": st.sampled_from(["", "{{ eos_token }}", "<|im_start|>assistant\n"]),
        "reasoning": st.sampled_from(["kept", "rewritten", "dropped"]),
        "header": st.sampled_from(["", "<think>\n"]),  # behind the assistant's, where an answer is asked for
        "gap": st.sampled_from(["", " "]),
        "bos": st.booleans(),
        "trims": st.booleans(),
        "system": st.booleans(),
    }
)
REPLY = st.lists(
    st.sampled_from(
        ["It is 12.", "<think>", "</think>", "\n", "\n\n", " ", "x = 3", "é🙂", "<|im_end|>", "<|im_start|>"]
    ),
    max_size=6,
).map("".join)


def template_of(ends, at_the_end, reasoning, header, gap, bos, trims, system) -> str:
    """ChatML's headers; what stands around an answer, and what becomes of it, is drawn."""
    content = "m['content'] | trim" if trims else "m['content']"
    thoughts = "{% set thought = c.split('</think>')[0].split('<think>')[-1] if '</think>' in c else '' %}"
    answer = {
        "kept": "{{ c }}",
        "dropped": "{{ c.split('</think>')[-1] }}",
        "rewritten": thoughts + "<think>\n{{ thought }}\n</think>\n\n{{ c.split('</think>')[-1] }}",
    }[reasoning]
    refusal = "" if system else "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    return (
        f"{'<s>' if bos else ''}{{% for m in messages %}}{{% set c = {content} %}}{refusal}"
        f"<|im_start|>{{{{ m['role'] }}}}\n{{% if m['role'] == 'assistant' %}}{gap}{answer}{{% else %}}{{{{ c }}}}"
        f"{{% endif %}}{ends}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{header}{{% else %}}{at_the_end}{{% endif %}}"
    )


@pytest.fixture(scope="module")
def drawn():
    """A ChatML tokenizer with the tokens of the drawn templates; its end of sequence is not its end of turn."""
    tokenizer = make_tokenizer("chatml")
    tags = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    tokenizer.add_tokens([AddedToken("<s>", special=True), *tags])
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(TEMPLATES, REPLY)
def test_what_is_trained_and_scored_is_what_was_sampled(drawn, parts, reply):
    """Whatever a template makes of an answer that is over: its tokens spell it, and one token ends it unless it is cut.

    That is the first that the template writes behind every answer, else the end of sequence. A reward model sees the
    prompt, the answer, and what the template writes behind one.
    """
    drawn.chat_template = template_of(**parts)
    chat._prove(drawn)
    asked = [{"role": "user", "content": "What is 3 times 4?"}]
    for messages in (asked, [*asked, {"role": "assistant", "content": "11?"}, *asked]):
        prompt, text = prompt_token_ids(drawn, messages), inert(drawn, reply)
        whole, cut = (response_token_ids(drawn, messages, reply, truncated) for truncated in (False, True))
        assert decoded(drawn, cut) == text
        end = "<|im_end|>" if parts["ends"] else "<|endoftext|>"
        assert whole == [*cut, drawn.convert_tokens_to_ids(end)] and whole[-1] in end_of_turn_ids(drawn)
        assert conversation_token_ids(drawn, messages, reply, True) == prompt + cut
        behind = conversation_token_ids(drawn, messages, reply, False)[len(prompt + cut) :]
        assert decoded(drawn, behind) == parts["ends"] + parts["at_the_end"].replace("{{ eos_token }}", "<|endoftext|>")
    told = [{"role": "system", "content": "Be brief."}, *asked]
    if parts["system"]:
        assert prompt_token_ids(drawn, told)
    else:
        with pytest.raises(InputError, match=r"file:7: .*refuses the roles system, user \(no system role\)"):
            check_records(drawn, [("file:7", {"prompt": told})])


# Qwen3 and the R1 models in short.
QWEN3 = (
    "{% for m in messages %}{% set c = m.content %}{% set r = '' %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and (loop.last or r) %}"
    "<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


@pytest.mark.parametrize(("template", "end"), [(QWEN3, "<|im_end|>"), (R1, "<|endoftext|>")])
def test_reasoning_models_keep_what_they_sampled(drawn, template, end, tmp_path):
    """No thought is added and none is lost, of whole and of cut answers, with the warning that says so."""
    drawn.chat_template = template
    drawn.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the chat template does not keep answers"):
        tokenizer = load_tokenizer(str(tmp_path))
    asked = [{"role": "user", "content": "What is 3 times 4?"}]
    for text in (
        "It is 12.",
        "<think>\nThrice four.\n</think>\n\nIt is 12.",
        "Thrice four.\n</think>\n\n12",
        "<think>\nTh",
    ):
        assert decoded(tokenizer, response_token_ids(tokenizer, asked, text, False)) == text + end
        assert decoded(tokenizer, conversation_token_ids(tokenizer, asked, text, True)).endswith("\n" + text)


def test_a_template_without_an_end_is_said_and_one_that_can_have_none_refused(drawn, tmp_path):
    drawn.chat_template = CHATML.replace("<|im_end|>", "")
    drawn.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="writes no token after an answer; <|endoftext|> is trained as its end"):
        tokenizer = load_tokenizer(str(tmp_path))
    assert end_of_turn_ids(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    endless = copy.deepcopy(tokenizer)
    with pytest.raises(InputError, match="writes no token after an answer, and the tokenizer has no `eos_token`"):
        response_token_ids(endless, MESSAGES, "12", truncated=False)
    assert response_token_ids(endless, MESSAGES, "12", truncated=True) == encode(endless, "12")


def test_a_template_that_refuses_to_end_with_an_answer(drawn, tmp_path):
    """It can still be asked, and what it answers is put behind the question."""
    drawn.chat_template = "{{ raise_exception('ask') if messages[-1].role == 'assistant' }}" + CHATML
    drawn.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="is trained as its end"):
        tokenizer = load_tokenizer(str(tmp_path))
    assert decoded(tokenizer, response_token_ids(tokenizer, MESSAGES, "12", False)) == "12<|endoftext|>"


def test_a_clock_in_a_template_always_says_the_same_day(drawn, monkeypatch, tmp_path):
    drawn.chat_template = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
    asked, seen = [{"role": "user", "content": "Hi"}], []
    for year in (2025, 2031):

        class Then(datetime):
            @classmethod
            def now(cls, tz=None, year=year):
                return cls(year, 1, 2)

        monkeypatch.setattr(chat_template_utils, "datetime", Then)
        assert f"02 Jan {year}" in drawn.apply_chat_template(asked, tokenize=False)
        seen.append(decoded(drawn, prompt_token_ids(drawn, asked)))
    assert seen[0] == seen[1] and seen[0].startswith("Today is 26 Jul 2024.\n")
    drawn.chat_template = "{{ strftime_now('%F %e %p') }}" + CHATML  # whatever a format says
    assert drawn.decode(prompt_token_ids(drawn, asked)).startswith("2024-07-26 26 AM<|im_start|>")
    drawn.chat_template = CHATML + "{{ ['a', 'b'] | random }}"
    drawn.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the chat template draws at random"):
        load_tokenizer(str(tmp_path))


# ---- any tokenizer ----


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer of Llama-2's kind: a space in front of a text is part of its first token, bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["▁It▁is▁twelve", "▁What▁is▁[INST]▁[/INST]"] * 3, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are in the vocabulary, and no added tokens
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} "
        "{{ m.content }} </s>{% endif %}{% endfor %}"
    )
    return fast


@pytest.mark.filterwarnings("ignore:.*opens turns with ordinary text")
def test_a_tokenizer_whose_words_begin_with_a_space(tmp_path):
    """The first token of an answer is the one that the template's own turn gives it."""
    sentencepiece_like().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    asked = [{"role": "user", "content": "What is it?"}]
    ids = response_token_ids(tokenizer, asked, "It is twelve", truncated=False)
    assert tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁") and tokenizer.decode(ids) == "It is twelve</s>"
    for text in ("\nIt", "  It", "是 🙂", "It "):
        cut = response_token_ids(tokenizer, asked, text, truncated=True)
        assert decoded(tokenizer, cut).lstrip(" ") == text.lstrip(" ")


def test_a_tokenizer_that_loses_characters_is_refused(tokenizer, tmp_path):
    """Words alone: spaces, line ends and unknown characters are gone."""
    lossy = Tokenizer(models.WordLevel({"[UNK]": 0, "It": 1, "is": 2}, unk_token="[UNK]"))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=lossy, unk_token="[UNK]", eos_token="[UNK]")
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the tokenizer does not give texts back: .The quick brown"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": "BertTokenizer"}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("special_tokens_map.json", "[]"),
        ("chat_template.jinja", "{{ 1 / 0 }}"),
        ("chat_template.jinja", "{% for"),
    ],
)
def test_files_that_are_no_tokenizers_are_one_line(file, content, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match="no tokenizer that can be loaded there|the chat template refuses"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_strips_texts_is_refused(tokenizer, tmp_path):
    """The line end of the header would become part of the answer."""
    stripping = copy.deepcopy(tokenizer)
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    stripping.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the tokenizer drops a line end at the end of a text"):
        load_tokenizer(str(tmp_path))


BOTH = pytest.mark.parametrize("_", ["train", pytest.param("infer", marks=pytest.mark.infer)])


@BOTH
def test_a_tokenizer_is_read_as_its_own_file_says(_, tmp_path, monkeypatch):
    """DeepSeek's configuration names a class that one release of transformers rebuilds without spaces; another way of
    losing them stands in for it in the release that does not."""
    source = load_tokenizer(str(SMOLLM))
    source.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    text = "def f(x):\n    return  3 * x\n\n是 🙂"
    broken = AutoTokenizer.from_pretrained(SMOLLM)
    broken.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    for way in ("the class", "a fault"):
        if way == "a fault":
            monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: broken)
        loaded = load_tokenizer(str(tmp_path))
        assert encode(loaded, text) == encode(source, text) and decoded(loaded, encode(loaded, text)) == text
        assert prompt_token_ids(loaded, MESSAGES) == prompt_token_ids(source, MESSAGES)
    assert same_tokens(source, loaded) and not same_tokens(source, broken)
    assert model_tokens(str(tmp_path)) == model_tokens(str(SMOLLM)) is not None
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", lambda *_, **__: broken)
    with pytest.raises(InputError, match=r"transformers does not read its tokenizer.json: the ids of .The quick"):
        load_tokenizer(str(tmp_path))


@BOTH
def test_a_tokenizer_without_its_own_file_is_refused_by_both(_, tmp_path):
    """SentencePiece's library is in one environment alone: generation would run, and training refuse its model."""
    load_tokenizer(str(SMOLLM)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(
        InputError,
        match=r"tokenizer\.model is there and no tokenizer\.json, .*; write one, where sentencepiece is installed:",
    ):
        load_tokenizer(str(tmp_path))


# The hash of the probe texts' ids: whatever environment these tests run in, it is this one.
SMOLLM_TOKENS = "1ed41dbfb4550ebba48f3e4ec04cb581c66cfc2702b95459807e395fab04e933"


@BOTH
def test_the_embedded_tokenizer_gives_the_same_ids_in_both_environments(_):
    assert model_tokens(str(SMOLLM)) == SMOLLM_TOKENS


def test_half_a_character_at_a_cut_goes(tokenizer):
    ids = encode(tokenizer, "Ja 🙂")
    assert sampled_text(tokenizer, ids, True) == "Ja 🙂"
    assert sampled_text(tokenizer, ids[:-1], True) == "Ja "
    assert sampled_text(tokenizer, [*ids, tokenizer.eos_token_id], False) == "Ja 🙂"


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
