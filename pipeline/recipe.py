"""The typed recipe: one YAML file drives every stage.

The defaults below come first, then the recipe (`configs/*.yaml`), then the `key=value` overrides. Unknown keys, wrong
types, impossible values and combinations without a meaning are refused with one line that names file, line, field,
value and remedy.

    python -m pipeline.recipe configs/quickstart.yaml loss.beta=0.25    # the resolved recipe
    python -m pipeline.recipe --fields > docs/recipe.md                 # every field with default, bounds and meaning
"""

import argparse
import inspect
import json
import re
from collections.abc import Iterator
from functools import reduce
from operator import attrgetter, getitem
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import AfterValidator, Field, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from yaml.constructor import ConstructorError

from hps.combinations import refused
from hps.errors import InputError, run_main
from hps.methods import FAMILIES, PREFERENCES
from hps.settings import Loss, Schedule, Section

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = "configs/quickstart.yaml"
SPLITS = ("train", "test")
SFT = "sft"  # the folder of the model before training, beside the runs
SCORERS = ("reward", "evaluator")  # the roles of which a function can do the work
LEAVE = "leave one of them out"
SHIPPED = "annotation/rewards.py"  # the functions that a recipe names without a file
RANKED = "ranked"  # the folder of a ranking, unless the recipe names another
RESERVED = (".", "..", "candidates", RANKED, "reference", "judge", SFT)  # names in `output` that are not runs
CHOICES = {"loss.family": FAMILIES, "loss.preference": PREFERENCES}
REFERENCE = r"\$\{([^}]*)\}"  # to another field
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "flex", "flash_attention_2", "eager"]


def _absent(function: str | None) -> None:
    if function is not None:
        raise PydanticCustomError("extra_forbidden", "a Reward alone has one")


class Model(Section):
    """A model folder, or a name on the hub with an optional pinned revision."""

    path: str = Field(description="folder of a model, or its name on the hub")
    revision: str | None = Field(None, description="commit on the hub (null: the newest)")
    function: Annotated[str | None, AfterValidator(_absent)] = Field(None, exclude=True)  # a Reward alone has one


class Reward(Model):
    """A reward model, or a `function` instead of one (pipeline/functions.py)."""

    # ty: ignore[incompatible-attribute-override] -- null where there is a function
    path: str | None = Field(None, description="folder of a model, or its name on the hub")
    function: str | None = Field(None, exclude=False, description="of annotation/rewards.py, or `file.py:name`")


class Models(Section):
    """`generator` writes the candidates, `policy` is aligned and is its own reference, `reward` ranks.

    `evaluator` is the reward model of the evaluation, another one than `reward`. `judge` is the chat model of the win
    rate. A `function` takes the place of a reward model: `sentiment`, `brevity` or `checks` of annotation/rewards.py,
    or one of your own in a file beside the recipe. The defaults are the names in the release's README; the paper
    shortens them.
    """

    generator: Model = Model(path="RLHFlow/Llama3-v2-iterative-DPO-iter3")
    policy: Model = Model(path="RLHFlow/Llama3-SFT-v2.0-epoch3")
    reward: Reward = Reward(path="Skywork/Skywork-Reward-Llama-3.1-8B")
    evaluator: Reward = Reward(path="RLHFlow/ArmoRM-Llama3-8B-v0.1")
    judge: Model = Model(path="Qwen/Qwen2.5-72B-Instruct")


class Split(Section):
    """A prompts file, and how many responses are generated for each prompt."""

    path: str = Field(description="prompts, one a line (docs/formats.md)")
    limit: int | None = Field(None, ge=1, description="how many of the lines are used, from the first (null: all)")
    responses: int = Field(100, ge=0, description="K, the responses generated for each prompt")


class HeldOut(Split):
    """The prompts of the evaluation."""

    responses: int = Field(5, ge=0, description="K, the responses generated for each prompt")


class Data(Section):
    """The prompts.

    `special_tokens` says what becomes of texts that spell out a special token of the generator. `neutralize` counts
    them, and such a token is ordinary text at every model call; `refuse` puts them into the ledger.
    """

    train: Split
    test: HeldOut
    special_tokens: Literal["neutralize", "refuse"] = Field("neutralize", description="in prompts and responses")


class Generation(Section):
    """Sampling of the candidates, and the settings of vLLM."""

    temperature: float = Field(0.9, ge=0, description="of sampling")
    top_p: float = Field(1.0, gt=0, le=1, description="of sampling")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts go to the ledger")
    max_new_tokens: int = Field(2048, ge=1, description="longer responses are cut and marked")
    keep_given: bool = Field(True, description="given responses are candidates, too")
    workers: int | None = Field(None, ge=1, description="engines (null: one for each GPU, one on a CPU)")
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one engine")
    dtype: Dtype = Field("auto", description="type of the weights")
    enforce_eager: bool = Field(False, description="capture no CUDA graphs")
    gpu_memory_utilization: float = Field(0.9, ge=0.01, le=1, description="share of a GPU's memory that vLLM takes")
    max_sequences: int | None = Field(
        None, ge=1, description="responses that an engine writes at a time (null: vLLM's, 256, 1,024 on a large GPU)"
    )


class Annotation(Section):
    """Scoring by the reward model.

    `noise` is drawn from seed, prompt and text. The ranked file keeps the rewards without it, too.
    """

    batch_tokens: int = Field(16384, ge=1, description="tokens of one forward pass, copies of the prompt included")
    dtype: Dtype = Field("auto", description="type of the weights")
    workers: int | None = Field(None, ge=1, description="reward models (null: one for each GPU, one on a CPU)")
    noise: float = Field(0.0, ge=0, description="standard deviation of Gaussian noise on the rewards of the ranking")


# What says how fast a section is computed and in how much memory, and does not change what comes out.
OF_DEVICES = {
    "generation": {"workers", "tensor_parallel", "gpu_memory_utilization", "max_sequences"},
    "annotation": {"batch_tokens", "workers"},
}


class RoundsSchedule(Schedule):
    __doc__ = f"""{inspect.getdoc(Schedule)}

`bash rounds.sh` does `rounds` rounds: the policy of the round before writes the candidates and trains on. Epochs, gamma
and learning rate begin again in each. The evaluation compares with the first policy in every round.
"""

    rounds: int = Field(1, ge=1, description="of rounds.sh: sample, rank, train")
    round_reference: Literal["first", "previous"] = Field(
        "first", description="reference of a later round: the first policy, or that of the round before"
    )
    round_candidates: Literal["new", "all"] = Field(
        "new", description="of a later round: those of its policy, or those of all rounds so far"
    )


OF_ROUNDS = {"rounds", "round_reference", "round_candidates"}  # what the plan of a round does not read
MOVES = "the reference is the adapter that the first step changes"


class Lora(Section):
    """LoRA on the policy. The model's own dropout is always off."""

    enabled: bool = Field(True, description="false: train every weight against a frozen copy")
    r: int = Field(8, ge=1, description="rank")
    alpha: int = Field(16, ge=1, description="the update is scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's input")
    target_modules: list[str] = Field(["q_proj", "v_proj"], description="layers; `[all-linear]`: all but the output")

    @property
    def targets(self) -> list[str] | str:
        """As PEFT wants them: every linear layer but the output's is a word, not a list."""
        return "all-linear" if self.target_modules == ["all-linear"] else list(self.target_modules)


class Optimizer(Section):
    """AdamW. The paper states the learning rate and its cosine."""

    learning_rate: float = Field(5e-7, ge=0, description="at its highest")
    scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="of the learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises from 0")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="longer gradients are clipped to it")


class Training(Section):
    """How the steps are run.

    `shared_prefix` puts the responses of a prompt after one copy of it. A longer list is split over rows of
    `row_tokens`, shorter groups share one (null: split above 2,048, share up to the longest group). `precomputed`
    takes the reference's log-probabilities before the training and keeps them in `<output>/reference/`. Flex attention
    needs CUDA; `auto` takes it there if its kernels compute the right thing on the card, else sdpa (docs/operations.md,
    "Speed").
    """

    processes: int | None = Field(None, ge=1, description="null: one for each GPU, one on a CPU")
    deepspeed: str | None = Field(None, description="a file of configs/deepspeed/")
    attention: Attention = Field(
        "auto", description="auto: on CUDA flex for LoRA, and separate rows where these are faster; else sdpa"
    )
    gradient_checkpointing: bool | None = Field(
        None, description="compute activations twice and keep few of them (null: unless the GPU has room for all)"
    )
    shared_prefix: bool = Field(True, description="compute a prompt once for all its responses in a step")
    row_tokens: int | None = Field(None, ge=1, description="most tokens of a row of shared prompts")
    reference: Literal["precomputed", "in_step"] = Field(
        "precomputed", description="when its log-probabilities are computed: once, or in each step"
    )
    save_steps: int = Field(50, ge=1, description="steps between checkpoints to resume from")
    merge: bool = Field(False, description="write merged weights, too")
    wandb: bool = Field(False, description="log to Weights & Biases, too")
    tensorboard: bool = Field(False, description="log to TensorBoard, too")

    @property
    def may_be_flex(self) -> bool:
        """Whether `auto` may take flex attention for an adapter: prompts are shared in a micro-batch's one row."""
        return self.attention == "auto" and self.shared_prefix and self.row_tokens is None


class Evaluation(Section):
    """Figures on the test split, with bootstrap intervals over prompts.

    `on` names another recipe, whose test split and ranking are evaluated instead (transfer, Tables 5 and 7). With
    `proxy`, a reader can compare what the policy was trained for with what it is judged by.
    """

    bootstrap: int = Field(2000, ge=1, description="resamples for the intervals")
    answers: int = Field(3, ge=0, description="test prompts shown with an answer before and after")
    prompts: int | None = Field(None, ge=1, description="test prompts evaluated, from the first (null: all)")
    checkpoints: int = Field(4, ge=0, description="points before the end at which the policy is kept and evaluated")
    samples: int = Field(5, ge=1, description="answers to a prompt, for BLEU, reward and KL")
    samples_along: int = Field(0, ge=0, description="answers to a prompt at each of these points (0: at the end alone)")
    proxy: bool = Field(False, description="`models.reward` scores the answers, too")
    on: str | None = Field(None, description="recipe whose test split is evaluated (null: this one)")


class Judge(Section):
    """Win rate by a chat model. With 2 or more `repeats` it says how far the judge agrees with itself.

    With an `endpoint` another server judges, which speaks OpenAI's protocol and knows the judge as `models.judge.path`;
    its key, if it wants one, is in the environment variable JUDGE_API_KEY. `max_prompt_tokens` and `tensor_parallel`
    are not read then.
    """

    enabled: bool = Field(False, description="take the win rate")
    answers: int = Field(1, ge=1, description="answers judged of a prompt")
    repeats: int = Field(1, ge=1, description="verdicts on each of them")
    max_new_tokens: int = Field(256, ge=32, description="length of a verdict")
    max_prompt_tokens: int = Field(6144, ge=1, description="length of rubric, prompt and answer")
    temperature: float = Field(0.0, ge=0, description="of the judge's sampling")
    tensor_parallel: int = Field(8, ge=1, description="GPUs of the judge's engine")
    endpoint: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")] | None = Field(
        None, description="URL of a server that judges, e.g. http://localhost:8000/v1 (null: an engine here)"
    )
    requests: int = Field(8, ge=1, le=256, description="requests that the server at `endpoint` gets at a time")

    @property
    def local(self) -> bool:
        """Whether the judge is a model that is loaded here, if there is a judge at all."""
        return self.enabled and self.endpoint is None


class Recipe(Section):
    """Everything one experiment needs, in one YAML file that drives every stage.

    Unknown keys fail with file and line. `key=value` on the command line overrides a field: `bash run.sh
    configs/quickstart.yaml loss.beta=0.25 run=beta-0.25`. A text may refer to another field: `run: beta-${loss.beta}`.
    `--dry-run` prints the resolved recipe and the plan. One folder never mixes two settings: a changed setting asks
    for another `output` (candidates), `ranking` or `run` (training). Rankings in one output share candidates and the
    answers of the model before training.
    """

    output: str = Field(min_length=1, description="folder of the experiment")
    run: str = Field("${loss.family}-${loss.preference}", description="folder in it for one training")
    ranking: str = Field(RANKED, description="folder in it for one ranking of the candidates")
    round: int = Field(1, ge=1, description="which round this is; rounds.sh sets it")
    seed: int = Field(42, ge=0, lt=2**31, description="of sampling, plan and training")
    models: Models = Models()
    data: Data
    generation: Generation = Generation()
    annotation: Annotation = Annotation()
    loss: Loss = Loss()
    schedule: RoundsSchedule = RoundsSchedule()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    judge: Judge = Judge()
    _first_generator: Model | None = PrivateAttr(None)  # the recipe's, kept in a later round

    @property
    def name(self) -> str:
        """The run, and the round unless it is the first."""
        return self.run if self.round == 1 else f"{self.run}-round-{self.round}"

    @property
    def round_seed(self) -> int:
        """The seed of this round. With the same one a policy that hardly moved would write the same texts again."""
        return (self.seed + (self.round - 1) * 1_000_003) % 2**31

    @property
    def first_generator(self) -> Model:
        """What writes the candidates of the first round."""
        return self._first_generator or self.models.generator

    def before(self) -> "Recipe | None":
        """The round before, for its folders; None in the first."""
        return None if self.round == 1 else self.model_copy(update={"round": self.round - 1})

    def start(self) -> Path | None:
        """The adapter (or the whole model) that the training starts from; None: from `models.policy`."""
        before = self.before()
        return before.checkpoint_folder() if before else None

    def candidates(self, split: str) -> Path:
        folder = Path(self.output) if self.round == 1 else self.run_folder()
        return folder / "candidates" / f"{split}.jsonl"

    def ranked(self, split: str) -> Path:
        folder = Path(self.output) / self.ranking if self.round == 1 else self.run_folder() / RANKED
        return folder / f"{split}.jsonl"

    def run_folder(self) -> Path:
        first = Path(self.output) / self.run
        return first if self.round == 1 else first / f"round-{self.round}"

    def sft_folder(self) -> Path:
        return Path(self.output) / SFT

    def tested(self) -> "Recipe":
        """The recipe whose test split is evaluated: this one, or that of `evaluation.on` with these settings."""
        if self.evaluation.on is None:
            return self
        evaluation = self.evaluation.model_copy(update={"on": None})
        other = load_recipe(self.evaluation.on)
        return other.model_copy(update={"evaluation": evaluation, "generation": self.generation})

    def evaluated_folder(self, step: int | None = None) -> Path:
        """Where the evaluation of the run is: in the run's folder, or in one for the other test split.

        Args:
            step: of the policy that was kept there (`evaluation.samples_along`); None: of the trained policy.
        """
        folder = self.run_folder()
        if self.evaluation.on is not None:
            folder = folder / "on" / Path(self.tested().output).name
        return folder if step is None else folder / "along" / f"step-{step}"

    def checkpoint_folder(self, step: int | None = None) -> Path:
        """The trained policy, or the adapter that was kept at a step."""
        return self.run_folder() / ("checkpoint" if step is None else f"checkpoints/step-{step}")


# ---- loading ----


def split_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """The recipe's path (the first argument without `=`, else the default) and the overrides."""
    paths = [argument for argument in arguments if "=" not in argument]
    for path in paths:
        if not path.endswith((".yaml", ".yml")):
            raise InputError(f"`{path}` is neither a recipe (*.yaml) nor key=value", where="command line")
    if len(paths) > 1:
        problem = f"two recipes given: {' and '.join(paths)}"
        raise InputError(problem, where="command line", remedy="give one, then key=value")
    return (paths[0] if paths else DEFAULT_RECIPE), [argument for argument in arguments if "=" in argument]


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge, resolve and check a recipe.

    Args:
        path: the YAML file; relative paths inside it are relative to the working folder, those of reward functions to
            the recipe's folder, or to this repository.
        overrides: `key=value` strings of the command line, the value in YAML.

    Raises:
        InputError: missing file, broken YAML, unknown key, wrong type, missing field, impossible value.
    """
    source = _Source(path)
    values = _defaults()
    for layer in (source.read(), *map(source.override, overrides or [])):
        _merge(values, layer, source)
    try:
        recipe = Recipe.model_validate(_resolve(values, values, "", source))
    except ValidationError as error:
        raise _refusal(error, source) from None
    for wrong, key, reason, remedy in _contradictions(recipe):
        if wrong:
            raise source.error(key, f"`{key}` is `{get(recipe, key)}`, but {reason}", remedy)
    for role in SCORERS:
        _settle_scorer(getattr(recipe.models, role), f"models.{role}", source)
    if recipe.round > 1:
        recipe._first_generator = recipe.models.generator
        # With LoRA the policy's adapter answers on top of it (generation.generate).
        whole = Model(path=str(recipe.start()))
        recipe.models.generator = recipe.models.policy.model_copy() if recipe.lora.enabled else whole
    return recipe


def _defaults() -> dict:
    """The defaults as nested mappings, without the fields that a recipe must give."""
    data = Data.model_construct(train=Split.model_construct(), test=HeldOut.model_construct())
    return Recipe.model_construct(data=data).model_dump(warnings=False)


def _merge(base: dict, layer: dict, source: "_Source", prefix: str = "") -> None:
    """Lay values over earlier ones in place.

    A function takes the place of a model that was named before, and vice versa.

    Raises:
        InputError: a single value in the place of a section.
    """
    if layer.get("function") is not None:
        base.update(path=None, revision=None)
    elif layer.get("path") is not None and "function" in base:
        base["function"] = None
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if not isinstance(base.get(name), dict):
            base[name] = value
        elif isinstance(value, dict):
            _merge(base[name], value, source, f"{key}.")
        else:
            raise source.error(key, f"`{key}` is `{_shown(value)}`", "give its fields as a mapping")


def _resolve(value: Any, values: dict, key: str, source: "_Source", seen: tuple[str, ...] = ()) -> Any:
    """Put the field's value where a text says `${section.field}`. Nothing else is looked up, so no secret gets in."""
    if isinstance(value, dict):
        inner = {name: f"{key}.{name}".lstrip(".") for name in value}
        return {name: _resolve(value[name], values, inner[name], source, seen) for name in value}
    if isinstance(value, list):
        return [_resolve(each, values, key, source, seen) for each in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match) -> Any:
        name = match[1]
        try:
            found = reduce(getitem, name.split("."), values)
        except (KeyError, TypeError):
            remedy = "write the value itself, or ${section.field}"
            raise source.error(key, f"`{key}` refers to `{name}`, which is not a field", remedy) from None
        if name in seen:
            raise source.error(key, f"`{key}` refers to itself", "write the value")
        return _resolve(found, values, key, source, (*seen, name))

    whole = re.fullmatch(REFERENCE, value)
    return look_up(whole) if whole else re.sub(REFERENCE, lambda match: str(look_up(match)), value)


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def _refusal(error: ValidationError, source: "_Source") -> InputError:
    """Pydantic's first error as one line; an unknown key comes before the field that may be missing because of it."""
    errors = error.errors(include_url=False)
    unknown = ("extra_forbidden", "invalid_key")
    first = next((one for one in errors if one["type"] in unknown), errors[0])
    key = ".".join(map(str, first["loc"]))
    if first["type"] in unknown:
        return source.error(key, f"unknown key `{key}`", "docs/recipe.md has every field")
    if first["type"] == "missing":
        return source.error(key, f"`{key}` is missing", "add the field to the recipe")
    remedy = re.sub("^(Input|String|List) should", "it must", first["msg"]).partition(", unable")[0]
    return source.error(key, f"`{key}` is `{_shown(first['input'])}`", remedy)


def _settle_scorer(scorer: Reward, key: str, source: "_Source") -> None:
    """Check that a model or a function is named, not both, and settle which file a function is in."""
    overrides = [source.overridden.get(f"{key}.{name}", "=null") for name in ("path", "function")]
    twice = not any(override.endswith("=null") for override in overrides)
    if twice or (scorer.path is not None and scorer.function is not None):
        raise source.error(f"{key}.function", f"`{key}` has both a `path` and a `function`", LEAVE)
    if scorer.function is None and scorer.path is None:
        raise source.error(key, f"`{key}.path` is missing", "name a model, or a `function`")
    if scorer.function is not None:
        if scorer.revision is not None:
            raise source.error(key, f"`{key}.revision` is of a model, and `{key}.function` is given", LEAVE)
        scorer.function = _settled(scorer.function, f"{key}.function", source)


def _settled(function: str, key: str, source: "_Source") -> str:
    """The name of a shipped function, or `file.py:name`: the file below this repository, else with its whole path."""
    file, separator, name = function.rpartition(":")
    if not name.isidentifier() or (separator and not file.endswith(".py")):
        remedy = f"give the name of a function of {SHIPPED}, or `file.py:name`"
        raise source.error(key, f"`{key}` is `{function}`", remedy)
    if not separator:
        return name
    beside = source.path.parent.resolve()
    try:
        places = [(folder / file).resolve() for folder in (beside, REPOSITORY)]
        path = next((found for found in places if found.is_file()), None)
    except (OSError, ValueError, RuntimeError):  # a name too long, a null byte, a link to itself
        path = None
    if path is None:
        problem = f"`{key}`: there is no file {file} beside the recipe, and none in this repository"
        raise source.error(key, problem, "write its path from the recipe's folder")
    if path.is_relative_to(REPOSITORY):
        within = path.relative_to(REPOSITORY).as_posix()
        return name if within == SHIPPED else f"{within}:{name}"
    if not path.is_relative_to(beside):
        problem = f"`{key}`: {path} is neither below the recipe's folder nor in this repository"
        raise source.error(key, problem, "put the file beside the recipe: a recipe runs no other code")
    return f"{path}:{name}"


class _Loader(yaml.SafeLoader):
    """Leaves a scalar as it is written (or null), because the field's type says what it means; refuses a key twice."""

    def parse(self) -> tuple[yaml.Node | None, Any]:
        """The document's node and value. YAMLError: broken, given twice, or an alias inside its own anchor."""
        node = self.get_single_node()
        return node, self.construct_object(node, deep=True) if node else None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = set()
        for key, _ in node.value:
            if str(key.value) in names:
                raise ConstructorError(None, None, f"found duplicate key {key.value}", key.start_mark)
            names.add(str(key.value))
        return super().construct_mapping(node, deep)


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] in _KEPT] for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


class _Source:
    """Reads a recipe's file and the overrides, and finds where a field was given, for error messages."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines: dict[str, int] = {}
        self.overridden: dict[str, str] = {}

    def read(self) -> dict:
        """The file's values, its scalars as text. InputError: it cannot be read, or is not a mapping in YAML."""
        file = str(self.path)
        try:
            node, values = _Loader(self.path.read_text(encoding="utf-8")).parse()
            self._walk(node, "")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(f"cannot read the recipe ({reason})", where=file, remedy="see configs/") from None
        except (yaml.YAMLError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise InputError(f"broken YAML ({problem})", where=f"{file}:{mark.line + 1}" if mark else file) from None
        if not isinstance(values or {}, dict):
            raise InputError("the recipe is not a mapping of sections", where=file)
        return values or {}

    def _walk(self, node: yaml.Node | None, prefix: str) -> None:
        """Note the lines of the fields."""
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            self.lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
            self._walk(value, f"{prefix}{key.value}.")

    def override(self, text: str) -> dict:
        """A `key=value` of the command line as nested mappings, its scalars as text."""
        key, separator, value = text.partition("=")
        if not separator or not key:
            remedy = "write key=value, e.g. loss.beta=0.25"
            raise InputError(f"`{text}` is not an override", where="command line", remedy=remedy)
        self.overridden[key] = text
        try:
            _, layer = _Loader(value).parse()
        except (yaml.YAMLError, RecursionError):
            raise self.error(key, f"`{key}` is broken YAML", "put the value in quotes") from None
        for name in reversed(key.split(".")):
            layer = {name: layer}
        return layer

    def error(self, key: str, problem: str, remedy: str) -> InputError:
        return InputError(problem, where=self.of(key), remedy=remedy)

    def of(self, key: str) -> str:
        """File and line of a field, or of the section that it is in; or the override that gives one of them."""
        parts = key.split(".")
        around = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        inside = [] if key in self.lines else [name for name in self.overridden if name.startswith(f"{key}.")]
        for name in (*around, *inside):
            if name in self.overridden:
                return f"command line, `{self.overridden[name]}`"
        line = next((self.lines[name] for name in around if name in self.lines), None)
        return f"{self.path}:{line}" if line else str(self.path)


# ---- combinations: (is so, field, reason, remedy) ----


def _contradictions(recipe: Recipe) -> Iterator[tuple[bool, str, str, str]]:
    """Settings that cannot go together."""
    schedule, generation, judge = recipe.schedule, recipe.generation, recipe.judge
    not_multiple = f"`schedule.device_batch` is {schedule.device_batch}"
    remedy = "choose a multiple of the second"
    yield schedule.global_batch % schedule.device_batch > 0, "schedule.global_batch", not_multiple, remedy

    long = generation.max_prompt_tokens >= schedule.max_length
    remedy = "leave room for a response in training: lower the first or raise the second"
    yield long, "generation.max_prompt_tokens", f"`schedule.max_length` is {schedule.max_length}", remedy

    for split in SPLITS:
        same = generation.temperature == 0 and getattr(recipe.data, split).responses > 1
        reason = f"`data.{split}.responses` is more than 1, and all would be the same"
        yield same, "generation.temperature", reason, "raise the temperature, or ask for one response"

    same = judge.enabled and judge.repeats > 1 and judge.temperature == 0
    reason = "`judge.temperature` is 0, and all repeats would be the same"
    yield same, "judge.repeats", reason, "raise the temperature, or use judge.repeats=1"

    many, reason = judge.answers > recipe.evaluation.samples, f"`evaluation.samples` is {recipe.evaluation.samples}"
    yield judge.enabled and many, "judge.answers", reason, "lower the first or raise the second"

    key, along = "evaluation.samples_along", recipe.evaluation.samples_along > 0
    none = along and recipe.evaluation.checkpoints == 0
    yield none, key, "`evaluation.checkpoints` is 0", "raise the second, or leave the first at 0"
    full = along and not recipe.lora.enabled
    yield full, key, "`lora.enabled` is false, and nothing is kept along the training", "leave the first at 0"

    empty = recipe.lora.enabled and not recipe.lora.target_modules
    yield empty, "lora.target_modules", "`lora.enabled` is true", "name modules, e.g. q_proj"

    for key, taken in (("run", {*RESERVED, recipe.ranking}), ("ranking", {*RESERVED} - {RANKED})):
        name = get(recipe, key)
        wrong = not name or "/" in name or name in taken
        yield wrong, key, "it must be a new folder in `output`", "give the name of a folder"

    for key, known in CHOICES.items():
        unknown, problem = get(recipe, key) not in known, f"there is no such {key.removeprefix('loss.')}"
        yield unknown, key, problem, f"use one of: {', '.join(known)}"
    for refusal in refused(recipe.loss, recipe.schedule):
        yield True, *refusal

    for key in ("schedule.rounds", "round"):
        nothing_new = get(recipe, key) > 1 and recipe.data.train.responses == 0
        reason = "`data.train.responses` is 0, and all rounds would train on the same responses"
        yield nothing_new, key, reason, "raise the second: a round samples"

    key, previous = "schedule.round_reference", schedule.round_reference == "previous"
    none = previous and not FAMILIES[recipe.loss.family].reference
    yield none, key, f"the loss of {recipe.loss.family} has no reference", f"use {key}=first"
    moves = previous and recipe.lora.enabled and recipe.training.reference == "in_step"
    yield moves, key, f"`training.reference` is in_step: {MOVES}", "use training.reference=precomputed"


def get(recipe: Recipe, key: str) -> Any:
    """A field by its dotted name."""
    return attrgetter(key)(recipe)


def as_dict(recipe: Recipe) -> dict:
    """The resolved recipe as plain values, for manifests."""
    return recipe.model_dump()


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, as `--dry-run` prints it."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)


# ---- docs/recipe.md ----

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a section and of the sections in it, by its dotted name."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        elif not field.exclude:
            yield f"{prefix}{name}", field


def allowed(field: FieldInfo) -> str:
    """The bounds of a number, or the choices."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(get_args(field.annotation))
    bounds = ((sign, getattr(limit, name, None)) for limit in field.metadata for name, sign in SIGNS.items())
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


def fields_page() -> str:
    """docs/recipe.md: every field with its default, its bounds and its meaning."""
    defaults, title = _defaults(), ""
    lines = ["# The recipe", "", *_heading(Recipe)]
    for key, field in fields():
        section = key.rpartition(".")[0].partition(".")[0]
        if section != title:
            title = section
            lines += ["", f"## {title}", "", *_heading(Recipe.model_fields[title].annotation)]
        try:
            value = reduce(getitem, key.split("."), defaults)
        except KeyError:
            value = "required"
        default = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"| `{key}` | {default} | {allowed(field)} | {field.description} |")
    return "\n".join([*lines, "", f"Written by `{COMMAND}`.", ""])


def _heading(section: Any) -> list[str]:
    return [inspect.getdoc(section) or "", "", "| field | default | allowed | meaning |", "|---|---|---|---|"]


COMMAND = "python -m pipeline.recipe --fields > docs/recipe.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="RECIPE | key=value", help=f"default: {DEFAULT_RECIPE}")
    parser.add_argument("--fields", action="store_true", help="print docs/recipe.md")
    options = parser.parse_args()
    print(fields_page() if options.fields else as_yaml(load_recipe(*split_arguments(options.arguments))), end="")


if __name__ == "__main__":
    run_main(main)
