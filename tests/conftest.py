"""Fixtures: throw-away tokenizers and tiny models with random weights, made in seconds, no network."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

# A test that reached for the hub would pass here and fail on a cluster. Set before any client of the hub is imported.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# The tests of training import its packages at their top; the inference environment has none of them, and runs only what
# is marked for it or for a GPU.
if importlib.util.find_spec("trl") is None:
    collect_ignore = [
        str(path)
        for path in Path(__file__).parent.rglob("test_*.py")
        if not any(mark in path.read_text("utf-8") for mark in ("mark.infer", "mark.gpu"))
    ]

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = REPOSITORY / "data" / "quickstart"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama-3's: the template writes the BOS itself, turns end with <|eot_id|>, contents are stripped.
LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def make_tokenizer(style: str):
    """A byte-level BPE tokenizer trained on the embedded data, in ChatML or in Llama-3's style (which adds a BOS)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {
        "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    }[style]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(DATA / "safety_train.jsonl")], trainer)
    if style == "llama3":
        bos = ("<|begin_of_text|>", 0)
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[bos])
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
        template = LLAMA3
    else:
        names, template = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


def tiny_config(tokenizer, **extra):
    """Two layers; head_dim 64, because vLLM on a CPU supports no small ones."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        # Larger than usual, so that random weights prefer some tokens clearly and scores differ.
        initializer_range=0.2,
        **extra,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer("chatml")


@pytest.fixture(scope="session")
def llama3_tokenizer():
    return make_tokenizer("llama3")


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory) -> Path:
    """Folder of a tiny chat model with random weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_reward_model(folder: Path, tokenizer, labels: int = 1) -> Path:
    """Folder of a tiny reward model with random weights."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=labels)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward(tokenizer, tmp_path_factory) -> Path:
    return make_reward_model(tmp_path_factory.mktemp("tiny") / "reward", tokenizer)


@pytest.fixture
def write_lines(tmp_path):
    """Write records (or raw strings) as JSON Lines; return the path."""

    def write(records, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def write_tiny_recipe(folder: Path, model: Path, reward: Path) -> Path:
    """A recipe for the tiny models on a few prompts of the embedded data, output in `folder / runs`."""
    lines = [
        f"output: {folder / 'runs'}",
        "seed: 7",
        "models:",
        f"  generator: {{path: {model}}}",
        f"  policy: {{path: {model}}}",
        f"  reward: {{path: {reward}}}",
        f"  evaluator: {{path: {reward}}}",
        f"  judge: {{path: {model}}}",
        "data:",
        f"  train: {{path: {DATA / 'safety_train.jsonl'}, limit: 8, responses: 4}}",
        f"  test: {{path: {DATA / 'safety_test.jsonl'}, limit: 4, responses: 2}}",
        "generation: {max_prompt_tokens: 256, max_new_tokens: 16, max_sequences: 16, dtype: float32}",
        "annotation: {dtype: float32}",
        "loss: {preference: hps}",
        "schedule: {epochs: 2, global_batch: 4, device_batch: 2, max_length: 384, gamma_stages: 2}",
        "lora: {r: 4, alpha: 8}",
        "optimizer: {learning_rate: 1.0e-2}",
        "training: {gradient_checkpointing: false, save_steps: 2}",
        "evaluation: {bootstrap: 200, answers: 1, samples: 3, checkpoints: 1}",
        "judge: {tensor_parallel: 1}",
    ]
    path = folder / "recipe.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tiny_recipe(tmp_path, tiny_model, tiny_reward) -> Path:
    return write_tiny_recipe(tmp_path, tiny_model, tiny_reward)


@pytest.fixture
def run_module():
    """Run `python -m MODULE ARGUMENTS` with this environment's interpreter; return the finished process."""

    def run(module: str, *arguments, timeout: int = 600, **kwargs):
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=timeout, **kwargs)

    return run


def run_forked(main, *arguments, env: dict | None = None) -> subprocess.CompletedProcess:
    """A stage's `main` in a copy of this process, which has its imports: several seconds less than a new one takes."""
    import traceback

    from hps.errors import run_main

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        if (child := os.fork()) == 0:
            status = 1
            try:
                sys.stdout, sys.stderr = out, errors
                for stream, number in ((out, 1), (errors, 2)):
                    os.dup2(stream.fileno(), number)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns of a fork
                os.chdir(REPOSITORY)
                signal.alarm(300)
                sys.argv = [main.__module__, *map(str, arguments)]
                run_main(main)
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                out.flush()
                errors.flush()
                os._exit(status)
        _, waited = os.waitpid(child, 0)
        for stream in (out, errors):
            stream.seek(0)
        return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(waited), out.read(), errors.read())


def ranked_records(count: int, responses: int = 5) -> list[dict]:
    """Ranked records with words of the embedded data, for tests of what comes after the ranking."""
    import random

    from pipeline.records import read_prompts

    rng = random.Random(0)
    records = []
    for _, prompt in read_prompts(DATA / "safety_train.jsonl", count):
        words = " ".join(prompt["responses"]).split()
        texts = [" ".join(rng.sample(words, rng.randint(3, 10))) + f" {number}" for number in range(responses)]
        rewards = sorted((rng.gauss(0, 1) for _ in texts), reverse=True)
        records.append(
            {
                "prompt_id": prompt["prompt_id"],
                "prompt": prompt["prompt"],
                "responses": texts,
                "rewards": rewards,
                "sources": ["given_1", "given_2", *["generated"] * (responses - 2)],
                "token_counts": [len(text.split()) for text in texts],
                "truncated": [number == 3 for number in range(responses)],
            }
        )
    return records


def candidate(number: int, *responses: str) -> dict:
    """A candidates record with four responses, or those given."""
    responses = list(responses) or [f"Answer {number}.", "No.", f"It is {number} times {number}.", "Perhaps"]
    return {
        "prompt_id": f"p{number}",
        "prompt": [{"role": "user", "content": f"What is {number} squared?"}],
        "responses": responses,
        "sources": ["given_1", "given_2", *["generated"] * (len(responses) - 2)],
        "token_counts": [len(response.split()) for response in responses],
        "truncated": [response == "Perhaps" for response in responses],
    }


def write_candidates(recipe, records: dict[str, list[dict]]) -> None:
    """Finished candidates by split, as the generation leaves them."""
    for split, lines in records.items():
        path = recipe.candidates(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path.parent / "manifest.json").write_text("{}")


@pytest.fixture
def ranked_recipe(tiny_recipe, monkeypatch):
    """Load the tiny recipe with overrides, with ranked files in its output folder (written once a test).

    One thread here and in child processes: a tiny model gains nothing from more and is several times slower on a busy
    machine; runs that are compared bit by bit must add in one order.
    """
    import torch

    from pipeline.recipe import Recipe, load_recipe

    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def load(*overrides: str, prompts: int = 8) -> Recipe:
        recipe = load_recipe(tiny_recipe, list(overrides))
        for split, count in (("train", prompts), ("test", 4)):
            path = recipe.ranked(split)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(record) + "\n" for record in ranked_records(count)))
        return recipe

    return load


@pytest.fixture
def finished(ranked_recipe):
    """Make a finished run without training: a fresh adapter (B = 0), or one of random numbers (`trained`)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hps.chat import load_tokenizer

    def make(*overrides: str, trained: bool):
        recipe = ranked_recipe(*overrides)
        folder = recipe.run_folder()
        model = AutoModelForCausalLM.from_pretrained(recipe.models.policy.path)
        if recipe.lora.enabled:
            torch.manual_seed(5)
            model = get_peft_model(
                model,
                LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=not trained),
            )
        elif trained:
            with torch.no_grad():
                model.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
        model.save_pretrained(folder / "checkpoint")
        load_tokenizer(recipe.models.policy.path).save_pretrained(folder / "checkpoint")
        (folder / "manifest.json").write_text("{}")
        return recipe

    return make


@pytest.fixture
def float64():
    with in_float64():
        yield


@contextmanager
def in_float64():
    """Trainings of this process run in float64, whose rounding (1e-16) no processor makes large enough to matter.

    Two ways to the same training then differ by 1e-9 at most. In fp32 they differ by what the processor's kernels
    round, times the sensitivity of the trajectory: AdamW divides a gradient by its own size, so a gradient of rounding
    size moves a weight by the whole learning rate. No bound fitted to one processor holds on another.

    Two parts of the libraries compute in fp32 whatever the model's dtype is: Llama's norm and TRL's fused LM head.
    """
    import torch
    from torch.nn.functional import linear, rms_norm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from alignment import train

    def exact_norm(self, hidden):
        return rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    class ExactHead:
        @staticmethod
        def apply(hidden, weight, bias, labels, *_):
            logits = linear(hidden, weight, bias)
            logps = logits.log_softmax(dim=-1)
            probs, picked = logps.detach().exp(), logps.gather(1, labels[:, None])[:, 0]
            entropy, squares = -(probs * logps.detach()).sum(dim=1), probs.square().sum(dim=1).log()
            return picked, entropy, squares, logits.detach().mean(dim=1), logits.argmax(dim=1) == labels

    load = train.load_policy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", ExactHead)
        patch.setattr(train, "load_policy", lambda *args, **kwargs: load(*args, **kwargs).double())
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def trained(recipe) -> tuple[list[dict], dict]:
    """`results` of a training in this process."""
    from alignment.plan import plan
    from alignment.train import train

    plan(recipe)
    train(recipe)
    return results(recipe)


class Rounding:
    """What fp32 does to one training here: the distance of a run in this process from the same run in float64.

    DeepSpeed and processes of their own compute in fp32. What they train is the same if it is off by rounding alone:
    each figure at most ten times as far from the exact one as that of the run in this process. Both distances are sums
    of thousands of roundings on this machine's kernels; the largest of several steps differs by a small factor. What
    a mistake adds (an eighth of the batch left out, a mean of means) is 1e4 times as much.

    Single weights prove nothing, since AdamW moves one whose gradient is of rounding size either way: the distance of
    the weights is the one that a hundredth of them exceeds.
    """

    def __init__(self, recipe, exact_recipe):
        with in_float64():
            self.exact = trained(exact_recipe)
        self.lines, self.weights = trained(recipe)
        self.near = {name: self.distance(name, self.lines) for name in ("loss", "grad_norm", "rewards/margins")}
        self.near_weights = self.weight_distance(self.weights)
        assert abs(self.lines[-1]["loss"] - self.lines[0]["loss"]) > 1e-3  # something is trained

    def distance(self, name: str, lines: list[dict]) -> float:
        """The largest of all steps, and not below the fp32 spacing of the figure."""
        pairs = [(line[name], exact[name]) for line, exact in zip(lines, self.exact[0], strict=True)]
        return max(max(abs(one - other), abs(other) * 2**-23) for one, other in pairs)

    def weight_distance(self, weights: dict) -> float:
        import torch

        assert weights.keys() == self.exact[1].keys()
        apart = [(value.double() - self.exact[1][name].double()).abs().flatten() for name, value in weights.items()]
        return torch.cat(apart).quantile(0.99).item()

    def check(self, recipe, about: object = None) -> None:
        """Another run of the same training is as near to the exact one."""
        lines, weights = results(recipe)
        assert [line["step"] for line in lines] == [line["step"] for line in self.lines]
        for line, ours in zip(lines, self.lines, strict=True):
            assert line["num_tokens"] == ours["num_tokens"] and line.get("gamma") == ours.get("gamma")
        for name, near in self.near.items():
            assert self.distance(name, lines) <= 10 * near, (about, name)
        assert self.weight_distance(weights) <= 10 * self.near_weights, about
        assert {name: value.dtype for name, value in weights.items()} == {
            name: value.dtype for name, value in self.weights.items()
        }


def make_plan(records: list[dict], recipe) -> tuple[list[dict], dict]:
    """All rows of a plan and its facts."""
    from hps.planning import Plan

    named = {record["prompt_id"]: record for record in records}
    assert len(named) == len(records)
    made = Plan(named, recipe.loss, recipe.schedule, recipe.seed)
    return list(made.rows()), made.facts()


def results(recipe) -> tuple[list[dict], dict]:
    """Lines of the log and weights of the checkpoint of a finished training."""
    from safetensors.torch import load_file

    from pipeline.records import read_jsonl

    lines = [line for _, line in read_jsonl(recipe.run_folder() / "log.jsonl")]
    (weights,) = (recipe.run_folder() / "checkpoint").glob("*.safetensors")
    return lines, load_file(weights)


@pytest.fixture(scope="session")
def browser():
    from browser import launched

    with launched() as found:
        yield found


@pytest.fixture
def open_page(browser):
    """Open a page; after the test nothing may have been said on its console, asked for or thrown."""
    from browser import Opened

    opened = []

    def open_it(path: Path, *arguments, **context):
        opened.append(Opened(browser, path, *arguments, **context))
        return opened[-1].page

    yield open_it
    for each in opened:
        each.close()
