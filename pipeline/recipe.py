"""The typed recipe: one YAML file drives every stage.

The defaults below are the profile `paper`; `profile: released` or `recommended` lays the differences of
`configs/profiles.yaml` over them, then come the recipe (`configs/*.yaml`) and the `key=value` overrides. Unknown keys,
wrong types, impossible values and combinations without a meaning are refused with one line that names file, line,
field, value and remedy. Look at one:

    python -m pipeline.recipe configs/quickstart.yaml loss.beta=0.25
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hps.combinations import refused
from hps.errors import InputError, run_main
from hps.methods import FAMILIES, PREFERENCES, constants
from hps.settings import Loss, Schedule

REPOSITORY = Path(__file__).resolve().parent.parent
PROFILES = REPOSITORY / "configs" / "profiles.yaml"
DEFAULT_RECIPE = "configs/quickstart.yaml"
SPLITS = ("train", "test")
SFT = "sft"  # the folder of the model before training, beside the runs
SCORERS = ("reward", "evaluator")  # the roles of which a function can do the work
LEAVE = "leave one of them out"
SHIPPED = "annotation/rewards.py"  # the functions that a recipe names without a file
RESERVED = (".", "..", "candidates", "ranked", "reference", "judge", SFT)  # names in `output` that are no run


@dataclass
class Model:
    """A model folder, or a name on the hub with an optional pinned revision (a commit hash)."""

    path: str = MISSING
    revision: str | None = None
    function: ClassVar[None] = None


@dataclass
class Reward(Model):
    """A reward model, or a `function` instead of one (pipeline/functions.py).

    `function` is the name of a shipped one, or `file.py:name`, the file in this repository or beside the recipe.
    """

    path: str | None = None
    function: str | None = None


@dataclass
class Models:
    """`generator` writes the candidates, `policy` is aligned (and is the reference), `reward` ranks.

    `evaluator` is the reward model of the evaluation, another one than `reward`; `judge` is the chat model of the win
    rate.
    """

    generator: Model = field(default_factory=lambda: Model(path="RLHFlow/Llama3-v2-DPO"))
    policy: Model = field(default_factory=lambda: Model(path="RLHFlow/Llama3-SFT-v2.0"))
    reward: Reward = field(default_factory=lambda: Reward(path="Skywork/Skywork-Reward-Llama-3.1-8B"))
    evaluator: Reward = field(default_factory=lambda: Reward(path="RLHFlow/ArmoRM-Llama3-8B-v0.1"))
    judge: Model = field(default_factory=lambda: Model(path="Qwen/Qwen2.5-72B-Instruct"))


@dataclass
class Split:
    """A prompts file, how many of its lines are used (null: all), and K, the responses generated for each."""

    path: str = MISSING
    limit: int | None = None
    responses: int = 100


@dataclass
class Data:
    """`special_tokens`: what becomes of prompts and responses that spell out a special token of the generator.

    `neutralize`: they are counted, and at every model call such a token is ordinary text (hps/chat.py). `refuse`: they
    go to the ledger.
    """

    train: Split = field(default_factory=Split)
    test: Split = field(default_factory=lambda: Split(responses=5))
    special_tokens: str = "neutralize"


@dataclass
class Generation:
    """Sampling of the candidates and the engine's settings. `workers: null` takes every device (one on a CPU)."""

    temperature: float = 0.9
    top_p: float = 1.0
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 2048
    keep_given: bool = True
    workers: int | None = None
    tensor_parallel: int = 1
    dtype: str = "auto"
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.9
    max_sequences: int = 256


@dataclass
class Annotation:
    """Scoring by the reward model. `batch_tokens` bounds prompt copies + responses of one forward pass.

    `noise` is the standard deviation of the Gaussian noise that is added to the rewards of the ranking.
    """

    batch_tokens: int = 16384
    dtype: str = "auto"
    workers: int | None = None
    noise: float = 0.0


@dataclass
class Lora:
    """LoRA on the policy; `enabled: false` trains every weight against a frozen copy."""

    enabled: bool = True
    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])

    @property
    def targets(self) -> list[str] | str:
        """As PEFT wants them: every linear layer but the output's is a word, not a list."""
        return "all-linear" if self.target_modules == ["all-linear"] else list(self.target_modules)


@dataclass
class Optimizer:
    """AdamW. The numbers of the paper: learning rate 5e-7, cosine."""

    learning_rate: float = 5e-7
    scheduler: str = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass
class Training:
    """How the steps are run. `processes: null` takes every GPU (one process on a CPU).

    `shared_prefix` computes a prompt once for all its responses in a step, in rows of at most `row_tokens`: a longer
    list is split over rows, shorter groups share one (null: split above 2,048, and share up to the longest group).
    """

    processes: int | None = None
    deepspeed: str | None = None
    attention: str = "auto"
    gradient_checkpointing: bool = True
    shared_prefix: bool = True
    row_tokens: int | None = None
    reference: str = "precomputed"
    save_steps: int = 50
    merge: bool = False
    wandb: bool = False
    tensorboard: bool = False


@dataclass
class Evaluation:
    """Held-out figures: `bootstrap` resamples for the intervals, `answers` prompts shown before and after.

    `prompts` of the test split are evaluated, the first ones (null: all). `checkpoints` is the number of points before
    the end of the training at which the policy is kept and its margins are taken. `samples` answers to a prompt are
    what BLEU, reward and KL are taken on. With `proxy`, `models.reward` scores them as well as `models.evaluator`, so
    that a reader can compare what the policy was trained for with what it is judged by. `on` names another recipe whose
    test split and ranking are evaluated instead (transfer, Tables 5 and 7).
    """

    bootstrap: int = 2000
    answers: int = 3
    answer_tokens: int = 256
    prompts: int | None = None
    checkpoints: int = 4
    samples: int = 5
    proxy: bool = False
    on: str | None = None


@dataclass
class Judge:
    """Win rate by a chat model, which scores `answers` answers to a prompt, each `repeats` times.

    `repeats` of 2 or more tell how far the judge agrees with itself.
    """

    enabled: bool = False
    answers: int = 1
    repeats: int = 1
    max_new_tokens: int = 256
    max_prompt_tokens: int = 6144
    temperature: float = 0.0
    tensor_parallel: int = 8


@dataclass
class Recipe:
    """Everything one experiment needs; see README.md, "The recipe", for a line on each field."""

    output: str = MISSING
    profile: str = "paper"
    run: str = "${loss.family}-${loss.preference}"
    seed: int = 42
    models: Models = field(default_factory=Models)
    data: Data = field(default_factory=Data)
    generation: Generation = field(default_factory=Generation)
    annotation: Annotation = field(default_factory=Annotation)
    loss: Loss = field(default_factory=Loss)
    schedule: Schedule = field(default_factory=Schedule)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)
    judge: Judge = field(default_factory=Judge)

    def candidates(self, split: str) -> Path:
        return Path(self.output) / "candidates" / f"{split}.jsonl"

    def ranked(self, split: str) -> Path:
        return Path(self.output) / "ranked" / f"{split}.jsonl"

    def run_folder(self) -> Path:
        return Path(self.output) / self.run

    def sft_folder(self) -> Path:
        return Path(self.output) / SFT

    def tested(self) -> "Recipe":
        """The recipe whose test split is evaluated: this one, or that of `evaluation.on` with these settings."""
        if self.evaluation.on is None:
            return self
        other = load_recipe(self.evaluation.on)
        return replace(other, evaluation=replace(self.evaluation, on=None), generation=self.generation)

    def evaluated_folder(self) -> Path:
        """Where the evaluation of the run stands: in the run's folder, or in one for the other test split."""
        if self.evaluation.on is None:
            return self.run_folder()
        return self.run_folder() / "on" / Path(self.tested().output).name


# (field, lowest, highest) for numbers; None is no bound on that side. NaN and infinity are refused everywhere.
BOUNDS: list[tuple[str, float | None, float | None]] = [
    ("data.train.limit", 1, None),
    ("data.test.limit", 1, None),
    ("data.train.responses", 0, None),
    ("data.test.responses", 0, None),
    ("generation.temperature", 0, None),
    ("generation.top_p", 1e-6, 1),
    ("generation.max_prompt_tokens", 1, None),
    ("generation.max_new_tokens", 1, None),
    ("generation.workers", 1, None),
    ("generation.tensor_parallel", 1, None),
    ("generation.gpu_memory_utilization", 0.01, 1),
    ("generation.max_sequences", 1, None),
    ("annotation.batch_tokens", 1, None),
    ("annotation.workers", 1, None),
    ("annotation.noise", 0, None),
    ("loss.beta", 1e-9, None),
    ("loss.label_smoothing", 0, 0.499999),
    ("loss.samples", 1, None),
    ("loss.positives", 1, 2),
    ("loss.appendix_e_lambda", 0, None),
    ("loss.list_size", 2, None),
    *((f"loss.{name}", one.low, one.high) for name, one in constants().items() if isinstance(one.default, float)),
    ("schedule.gamma_start", None, None),
    ("schedule.gamma_end", None, None),
    ("schedule.gamma_stages", 1, None),
    ("schedule.subsample", 2, None),
    ("schedule.epochs", 1, None),
    ("schedule.global_batch", 1, None),
    ("schedule.device_batch", 1, None),
    ("schedule.max_length", 2, None),
    ("lora.r", 1, None),
    ("lora.alpha", 1, None),
    ("lora.dropout", 0, 0.999999),
    ("optimizer.learning_rate", 0, None),
    ("optimizer.warmup_steps", 0, None),
    ("optimizer.weight_decay", 0, None),
    ("optimizer.max_grad_norm", 1e-9, None),
    ("training.processes", 1, None),
    ("training.row_tokens", 1, None),
    ("training.save_steps", 1, None),
    ("evaluation.bootstrap", 1, None),
    ("evaluation.answers", 0, None),
    ("evaluation.answer_tokens", 1, None),
    ("evaluation.prompts", 1, None),
    ("evaluation.checkpoints", 0, None),
    ("evaluation.samples", 1, None),
    ("judge.answers", 1, None),
    ("judge.repeats", 1, None),
    ("judge.max_new_tokens", 32, None),
    ("judge.max_prompt_tokens", 1, None),
    ("judge.temperature", 0, None),
    ("judge.tensor_parallel", 1, None),
    ("seed", 0, 2**31 - 1),
]
CHOICES: dict[str, Collection[str]] = {
    "data.special_tokens": ("neutralize", "refuse"),
    "generation.dtype": ("auto", "float32", "bfloat16", "float16"),
    "annotation.dtype": ("auto", "float32", "bfloat16", "float16"),
    "loss.family": FAMILIES,
    "loss.preference": PREFERENCES,
    "loss.estimator": ("sampled", "exact"),
    "loss.appendix_e_reading": ("printed", "intended"),
    **{f"loss.{name}": one.choices for name, one in constants().items() if one.choices},
    "schedule.gamma_ends": ("inclusive", "exclusive"),
    "schedule.best": ("reward", "human"),
    "schedule.ties": ("keep", "exclude"),
    "optimizer.scheduler": ("cosine", "linear", "constant"),
    "training.reference": ("precomputed", "in_step"),
    "training.attention": ("auto", "sdpa", "flash_attention_2", "eager"),
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, merge, resolve and check a recipe.

    Args:
        path: the YAML file; relative paths inside it are relative to the working folder, those of reward functions to
            the recipe's folder, or to this repository.
        overrides: `key=value` strings of the command line, the value in YAML.

    Raises:
        InputError: missing file, broken YAML, unknown key, wrong type, missing field, impossible value.
    """
    place = _Place(path)
    raw = place.read()
    recipe = OmegaConf.structured(Recipe)
    profile = _profile(raw, overrides or [], place)
    _merge(recipe, lambda: OmegaConf.create(profile), place, "profile")
    for name, section in raw.items():
        _merge(recipe, lambda name=name, section=section: OmegaConf.create({name: section}), place, name)
    for override in overrides or []:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise InputError(
                f"`{override}` is no override", where="command line", remedy="write key=value, e.g. loss.beta=0.25"
            )
        place.overridden[key] = override
        _refuse_resolver(override, "command line", key)
        _merge(recipe, lambda override=override: OmegaConf.from_dotlist([override]), place, key)
    try:
        typed: Any = OmegaConf.to_object(recipe)
    except OmegaConfBaseException as error:
        key = _key_of(error)
        missing = "missing mandatory value" in str(error).lower()
        problem = f"`{key}` is missing" if missing else _first_line(error)
        raise InputError(problem, where=place.of(key), remedy="add the field to the recipe") from None
    _check(typed, place)
    for role in SCORERS:
        _settle_scorer(getattr(typed.models, role), f"models.{role}", place)
    return typed


def _profile(raw: dict, overrides: list[str], place: "_Place") -> dict:
    """The differences from the defaults of the profile that the recipe or an override names."""
    name = raw.get("profile", Recipe.profile)
    for override in overrides:
        if override.startswith("profile="):
            name, place.overridden["profile"] = _plain(override.partition("=")[2]), override
    profiles = yaml.safe_load(PROFILES.read_text(encoding="utf-8"))
    if not isinstance(name, str) or name not in profiles:
        raise InputError(
            f"`profile` is `{name}`", where=place.of("profile"), remedy=f"use one of: {', '.join(profiles)}"
        )
    place.profile, place.from_profile = name, set(_dotted(profiles[name]))
    return profiles[name]


def _plain(text: str):
    """A value of the command line as YAML reads it; text that is no YAML stays as it is."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _dotted(tree: dict, prefix: str = "") -> list[str]:
    """The fields of nested mappings as `section.field`."""
    names = []
    for name, value in tree.items():
        names += _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else [f"{prefix}{name}"]
    return names


def _refuse_resolver(text: str, where: str, key: str) -> None:
    """OmegaConf's resolvers read the environment, and with it secrets that a manifest would then show."""
    if re.search(r"\$\{[^}]*:", text):
        raise InputError(
            f"`{key}` asks for a resolver: {text}", where=where, remedy="write the value itself, or ${another.field}"
        )


def _merge(recipe, make, place: "_Place", name: str) -> None:
    try:
        layer = make()
        recipe.merge_with(layer)
        _take_place(recipe, OmegaConf.to_container(layer), place)
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, AttributeError) as error:
        key = _key_of(error) or str(name)
        where = place.of(str(name) if str(name) in place.overridden else key)
        text = _first_line(error)
        if "not in 'Recipe'" in text or "not in '" in text:
            raise InputError(
                f"unknown key `{key}`", where=where, remedy='fields and their meaning stand in README.md, "The recipe"'
            ) from None
        remedy = "give a list: [one, two]" if "ListConfig" in text else "give a value of the right type"
        raise InputError(f"`{key}`: {text}", where=where, remedy=remedy) from None


def _take_place(recipe, layer: Any, place: "_Place") -> None:
    """A function takes the place of a model that an earlier layer (default, profile, recipe) names, and vice versa."""
    models = layer.get("models") if isinstance(layer, dict) else None
    for role in SCORERS:
        given = models.get(role) if isinstance(models, dict) else None
        if not isinstance(given, dict):
            continue
        if given.get("path") is not None and given.get("function") is not None:
            key = f"models.{role}.function"
            raise InputError(f"`models.{role}` has both a `path` and a `function`", where=place.of(key), remedy=LEAVE)
        if given.get("function") is not None:
            recipe.models[role].path, recipe.models[role].revision = None, given.get("revision")
        elif given.get("path") is not None:
            recipe.models[role].function = None


def _settle_scorer(scorer: Reward, key: str, place: "_Place") -> None:
    """Check that a model or a function is named, and settle which file a function is in."""
    written = [place.overridden.get(f"{key}.{name}", "=null") for name in ("path", "function")]
    if not any(override.endswith("=null") for override in written):
        raise InputError(f"`{key}` has both a `path` and a `function`", where="command line", remedy=LEAVE)
    if scorer.function is None:
        if scorer.path is None:
            raise InputError(f"`{key}.path` is missing", where=place.of(key), remedy="name a model, or a `function`")
        return
    if scorer.revision is not None:
        raise InputError(
            f"`{key}.revision` is of a model, and `{key}.function` is given", where=place.of(key), remedy=LEAVE
        )
    scorer.function = _settled(scorer.function, f"{key}.function", place)


def _settled(function: str, key: str, place: "_Place") -> str:
    """The name of a shipped function, or `file.py:name`: the file below this repository, else with its whole path."""
    file, separator, name = function.rpartition(":")
    if not name.isidentifier() or (separator and not file.endswith(".py")):
        raise InputError(
            f"`{key}` is `{function}`",
            where=place.of(key),
            remedy=f"give the name of a function of {SHIPPED}, or `file.py:name`",
        )
    if not separator:
        return name
    beside = place.path.parent.resolve()
    try:
        places = [(folder / file).resolve() for folder in (beside, REPOSITORY)]
        path = next((found for found in places if found.is_file()), None)
    except (OSError, ValueError, RuntimeError):  # a name too long, a null byte, a link to itself
        path = None
    if path is None:
        raise InputError(
            f"`{key}`: there is no file {file} beside the recipe, and none in this repository",
            where=place.of(key),
            remedy="write its path from the recipe's folder",
        )
    if path.is_relative_to(REPOSITORY):
        within = path.relative_to(REPOSITORY).as_posix()
        return name if within == SHIPPED else f"{within}:{name}"
    if not path.is_relative_to(beside):
        raise InputError(
            f"`{key}`: {path} is neither below the recipe's folder nor in this repository",
            where=place.of(key),
            remedy="put the file beside the recipe: a recipe runs no other code",
        )
    return f"{path}:{name}"


def _key_of(error: Exception) -> str:
    return getattr(error, "full_key", None) or ""


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


class _Place:
    """Finds file and line of a field, for error messages."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines: dict[str, int] = {}
        self.overridden: dict[str, str] = {}
        self.profile, self.from_profile = "paper", set()

    def read(self) -> dict:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise InputError(
                f"cannot read the recipe ({reason})", where=str(self.path), remedy="recipes are in configs/"
            ) from None
        try:
            self._walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
            raw = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else {}
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise InputError(f"broken YAML ({error.problem})", where=f"{self.path}:{line}") from None
        except (yaml.YAMLError, RecursionError) as error:  # a forbidden character; an alias inside its own anchor
            raise InputError(f"broken YAML ({_first_line(error)})", where=str(self.path)) from None
        except OmegaConfBaseException as error:
            raise InputError(_first_line(error), where=str(self.path)) from None
        if not isinstance(raw, dict):
            raise InputError("the recipe is no mapping of sections", where=str(self.path))
        return raw

    def _walk(self, node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            self.lines[name] = key.start_mark.line + 1
            if isinstance(value, yaml.ScalarNode):
                _refuse_resolver(value.value, f"{self.path}:{self.lines[name]}", name)
            self._walk(value, name + ".")

    def of(self, key: str) -> str:
        section = key
        while section:  # an override may give a whole section
            if section in self.overridden:
                return f"command line, `{self.overridden[section]}`"
            section = section.rpartition(".")[0]
        if key in self.from_profile and key not in self.lines:
            return f"{self.path}: profile `{self.profile}`"
        known = key
        while known and known not in self.lines:
            known = known.rpartition(".")[0]
        return f"{self.path}:{self.lines[known]}" if known else str(self.path)


def _check(recipe: Recipe, place: _Place) -> None:
    for key, low, high in BOUNDS:
        value = get(recipe, key)
        if value is None:
            continue
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            text = "finite" if low is None else f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
            raise InputError(f"`{key}` is {value}", where=place.of(key), remedy=f"it must be {text}")
    for key, allowed in CHOICES.items():
        value = get(recipe, key)
        if value not in allowed:
            raise InputError(f"`{key}` is `{value}`", where=place.of(key), remedy=f"use one of: {', '.join(allowed)}")
    _check_combinations(recipe, place)


def _check_combinations(recipe: Recipe, place: _Place) -> None:
    schedule = recipe.schedule
    if schedule.global_batch % schedule.device_batch:
        raise InputError(
            f"`schedule.global_batch` {schedule.global_batch} is no multiple of "
            f"`schedule.device_batch` {schedule.device_batch}",
            where=place.of("schedule.global_batch"),
            remedy="choose a multiple",
        )
    if recipe.generation.max_prompt_tokens >= schedule.max_length:
        raise InputError(
            f"`generation.max_prompt_tokens` is {recipe.generation.max_prompt_tokens}, "
            f"`schedule.max_length` is {schedule.max_length}",
            where=place.of("generation.max_prompt_tokens"),
            remedy="the longest prompt must leave room for a response in training: lower the first or raise the second",
        )
    for split in SPLITS:
        if recipe.generation.temperature == 0 and getattr(recipe.data, split).responses > 1:
            raise InputError(
                f"`generation.temperature` is 0 and `data.{split}.responses` is more than 1: all would be the same",
                where=place.of("generation.temperature"),
                remedy="raise the temperature, or ask for one response",
            )
    if recipe.judge.enabled:
        _check_judge(recipe, place)
    for key, reason, remedy in refused(recipe.loss, recipe.schedule):
        raise InputError(f"`{key}` is `{get(recipe, key)}`, but {reason}", where=place.of(key), remedy=remedy)
    if recipe.lora.enabled and not recipe.lora.target_modules:
        raise InputError(
            "`lora.target_modules` is empty", where=place.of("lora.target_modules"), remedy="name modules, e.g. q_proj"
        )
    for key in ("output", "run"):
        value = get(recipe, key)
        if not value or (key == "run" and ("/" in value or value in RESERVED)):
            raise InputError(f"`{key}` is `{value}`", where=place.of(key), remedy="give the name of a folder")


def _check_judge(recipe: Recipe, place: _Place) -> None:
    settings = recipe.judge
    if settings.repeats > 1 and settings.temperature == 0:
        raise InputError(
            f"`judge.repeats` is {settings.repeats} and `judge.temperature` is 0: all repeats would be the same",
            where=place.of("judge.repeats"),
            remedy="raise the temperature, or use judge.repeats=1",
        )
    if settings.answers > recipe.evaluation.samples:
        raise InputError(
            f"`judge.answers` is {settings.answers}, `evaluation.samples` is {recipe.evaluation.samples}",
            where=place.of("judge.answers"),
            remedy="lower the first or raise the second",
        )


def get(recipe: Recipe, key: str):
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


def as_dict(recipe: Recipe) -> dict:
    """The resolved recipe as plain values, for manifests."""
    return OmegaConf.to_container(OmegaConf.structured(recipe), resolve=True)


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, as `--dry-run` prints it."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe), resolve=True)


def main() -> None:
    # Here, because the command line needs the recipe.
    from pipeline.cli import parse

    print(as_yaml(parse(__doc__, dry_run=False)[0]), end="")


if __name__ == "__main__":
    run_main(main)
