"""All methods train a tiny model from their recipe: the loss falls, and all that should move does, no more."""

import math
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import REPOSITORY

from alignment.plan import plan
from alignment.reference import add_reference
from alignment.train import build_trainer, training_config
from hps import losses
from hps import methods as registry
from hps.chat import load_tokenizer
from hps.errors import InputError
from hps.methods import methods
from hps.settings import LATER, Loss, own_settings
from pipeline.recipe import load_recipe

VARIANTS = {
    "exact": ["loss.estimator=exact"],
    "exact with N": ["loss.estimator=exact", "loss.factor_n=true"],
    "three draws": ["loss.samples=3"],
    "Appendix E": ["loss.positives=2"],
    "Appendix E, intended": ["loss.positives=2", "loss.appendix_e_reading=intended", "loss.estimator=exact"],
    "EXO exact with N": ["loss.family=exo", "loss.estimator=exact", "loss.factor_n=true"],
    "SPPO exact": ["loss.family=sppo", "loss.estimator=exact"],
    "whole lists": ["loss.preference=pl", "loss.list_size=null"],
    "SPPO sigmoid": ["loss.family=sppo", "loss.preference=pl", "loss.sppo_win=sigmoid"],
    "IPO per token": ["loss.family=ipo", "loss.preference=bt", "loss.ipo_per_token=true"],
    "SimPO margin": ["loss.family=simpo", "loss.preference=bt", "loss.simpo_margin=0.5"],
    "rDPO": ["loss.preference=bt", "loss.label_smoothing=0.1", "loss.smoothing=rdpo"],
    "length-normalised": ["loss.preference=bt", "loss.dpo_per_token=true", "loss.beta=5"],
    "NLL": ["loss.preference=bt", "loss.nll=1"],
    "S-DPO": ["loss.estimator=exact", "loss.factor_n=true", "loss.negatives=uniform"],
    "SLiC-HF with its regulariser": ["loss.family=slic", "loss.preference=bt", "loss.nll=0.5"],
    "RPO exact": ["loss.family=rpo", "loss.estimator=exact", "loss.rpo_eta=2"],
    "released": [
        *("loss.beta=0.25", "loss.label_smoothing=0.1", "schedule.gamma_ends=exclusive", "schedule.ties=exclude"),
        *("lora.enabled=false", "optimizer.learning_rate=3e-4"),
    ],
}


def train_tiny(recipe):
    """Plan and train as the stage does; the trainer, its weights before, and `last_loss` before and after."""
    plan(recipe)
    tokenizer = load_tokenizer(recipe.models.policy.path)
    trainer = build_trainer(recipe, tokenizer, training_config(recipe, 1))
    add_reference(recipe, trainer)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    first = last_loss(trainer)
    trainer.train()
    return trainer, before, (first, last_loss(trainer))


def last_loss(trainer) -> float:
    """Mean loss of the rows of the last two steps, an epoch of eight prompts, with the weights as they are now."""
    rows = list(trainer.train_dataset)[-8:]
    trainer.model.eval()
    with torch.no_grad():
        return trainer._compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)), False).item()


def check(recipe):
    trainer, before, (first, last) = train_tiny(recipe)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(("gamma" in line) == recipe.loss.reads_gamma for line in lines)
    assert all(math.isfinite(line["loss"]) for line in lines)
    # On the same draws: the loss of families that learn the rewards' difference depends most on which pair was drawn.
    assert last < first - 1e-3
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or not recipe.lora.enabled}


STEADY = ("schedule.epochs=4", "schedule.gamma_start=0", "schedule.gamma_end=0", "optimizer.learning_rate=3e-3")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "preference"), methods())
def test_every_method_trains(ranked_recipe, family, preference):
    check(ranked_recipe(f"loss.family={family}", f"loss.preference={preference}", *STEADY))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains(ranked_recipe, name):
    check(ranked_recipe(*STEADY, *VARIANTS[name]))


# ---- what docs/methods.md says of them ----

PAGE = (REPOSITORY / "docs/methods.md").read_text()


def by_name() -> dict[str, list[str]]:
    """The rows of its table "By name": the settings of each."""
    section = PAGE.partition("## By name")[2].partition("\n## ")[0]
    return {name: settings.split() for name, settings in re.findall(r"^\| ([^|`]+) \| `([^`]+)` \|$", section, re.M)}


@pytest.mark.parametrize("settings", by_name().values(), ids=by_name())
def test_methods_by_name_are_recipes(settings):
    """From the paper's recipe, whose loss is dpo-hps."""
    recipe = load_recipe(REPOSITORY / "configs/hh_rlhf.yaml", settings)
    changed = Loss(family="dpo", preference="hps").model_dump().items() ^ recipe.loss.model_dump().items()
    given = {setting.partition("=")[0].removeprefix("loss.") for setting in settings}
    assert {name for name, _ in changed} == given - {"run"}
    # Else the run's folder would be claimed already by plain DPO, say.
    assert ("run" in given) == (not given <= {"family", "preference"})


def test_every_family_and_list_of_pairs_has_a_row():
    assert len(by_name()) == 11
    runs = [load_recipe(REPOSITORY / "configs/hh_rlhf.yaml", settings).run for settings in by_name().values()]
    assert len({*runs, "dpo-hps"}) == 12  # the recipe's own, too
    named = {f"| {family} |" for family in registry.FAMILIES} | {f"| `{name}` |" for name in ("pairs", "lipo")}
    assert {row for row in named if f"\n{row}" not in PAGE} == set()


# ---- a loss in three edits ----


def edits() -> list[str]:
    """The three pieces of code of docs/methods.md, "Add a loss in three edits"."""
    section = (REPOSITORY / "docs/methods.md").read_text().partition("## Add a loss in three edits")[2]
    return [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)]


@pytest.fixture
def hinge(monkeypatch):
    """The three edits, made as they are printed: a function, a row of the table, an entry of the registry."""
    formula, row, entry = edits()
    code = dict(vars(losses))
    exec(formula, code)
    for table, text, names in (
        (losses.FORMULAS, row, code),
        (registry.FAMILIES, entry, vars(registry)),
    ):
        for name, value in eval("{" + text + "}", dict(names)).items():
            monkeypatch.setitem(table, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("preference", ["bt", "hps", "pairs"])
def test_a_loss_added_in_three_edits_trains(hinge, ranked_recipe, preference):
    """rho = 0 before the first update: max(0, 1 - 0)^2 = 1, for a pair and for any mixture of pairs."""
    recipe = ranked_recipe("loss.family=hinge", f"loss.preference={preference}", "optimizer.learning_rate=3e-3")
    trainer, before, _ = train_tiny(recipe)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(1, abs=1e-5) and losses[-1] < 0.999
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_what_an_added_loss_does_not_support_is_refused(hinge, ranked_recipe):
    with pytest.raises(InputError, match="`loss.preference` is `pl`, but the family hinge has no loss for it; use"):
        ranked_recipe("loss.family=hinge", "loss.preference=pl")
    with pytest.raises(InputError, match="the pair loss of hinge has none; use .* or the family dpo, exo"):
        ranked_recipe("loss.family=hinge", "loss.factor_n=true")
    with pytest.raises(InputError, match="hinge-hps has none; use loss.label_smoothing=0$"):
        ranked_recipe("loss.family=hinge", "loss.label_smoothing=0.1")


def test_another_familys_constants_do_not_identify_a_run(hinge, monkeypatch):
    """A constant of a new family appears in no claim but that family's own."""
    before = own_settings({"family": "exo", "beta": 0.1, "exo_epsilon": 0.02, "nca_alpha": 1.0})
    assert before == {"family": "exo", "beta": 0.1, "exo_epsilon": 0.02}
    margin = registry.Constant(1.0, "the margin", {"gt": 0})
    monkeypatch.setitem(registry.FAMILIES, "hinge", registry.Family({"hinge_margin": margin}))
    assert own_settings({"family": "exo", "beta": 0.1, "exo_epsilon": 0.02, "hinge_margin": 1.0}) == before
    own = own_settings({"family": "hinge", "beta": 0.1, "exo_epsilon": 1e-3, "hinge_margin": 1.0})
    assert own == {"family": "hinge", "beta": 0.1, "hinge_margin": 1.0}


def test_later_settings_identify_a_run_only_where_they_differ_from_their_default():
    """Claims and result keys of runs that were made before `loss.negatives` existed still match."""
    assert LATER == ("negatives", "negative_deviations", "smoothing", "nll", "dpo_per_token")
    settings = Loss().model_dump()
    earlier = own_settings({name: value for name, value in settings.items() if name not in LATER})
    assert own_settings(settings) == earlier
    assert own_settings({**settings, "negatives": "worst"}) == {**earlier, "negatives": "worst"}
    earlier_fields = "family preference beta label_smoothing estimator samples factor_n positives appendix_e_lambda"
    assert [*earlier] == [*earlier_fields.split(), "appendix_e_reading", "list_size"]
    below = {"negatives": "below_mean", "negative_deviations": 1.0}
    assert own_settings({**settings, **below}) == {**earlier, **below}


@pytest.mark.parametrize("name", ["beta", "margin", "simpo_beta"])
def test_a_constant_is_named_after_its_family(hinge, monkeypatch, name):
    """`beta` would replace the field that all families share."""
    monkeypatch.setitem(registry.FAMILIES, "hinge", registry.Family({name: registry.Constant(1.0, "a constant")}))
    with pytest.raises(ValueError, match=f"the constant `{name}` of the family hinge must be called `hinge_...`"):
        registry.constants()


@pytest.mark.full
@pytest.mark.slow
def test_the_page_says_all_that_a_new_loss_needs(tmp_path):
    """The three edits, the constant and "Before you commit it" in a copy of the repository: all quick tests pass."""
    for name in subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name in ("models", ".venv-train"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    subprocess.run("git init -q && git add -A", shell=True, cwd=tmp_path, check=True)
    formula, row, entry = edits()
    formula = formula.replace("worst: torch.Tensor)", "worst: torch.Tensor, margin: float)").replace(
        "(1 -", "(margin -"
    )
    row = row.replace("hinge_loss(best, worst)", "hinge_loss(best, worst, loss.hinge_margin)")
    (constant,) = re.findall(r"`Family\((\{.*?\}), preferences", PAGE, flags=re.DOTALL)
    entry = entry.replace("Family(", f"Family({' '.join(constant.split())}, ")
    in_plain_python = "    if loss.family == 'hinge':\n        return max(0.0, loss.hinge_margin - w + l) ** 2\n"
    for path, before, added in (
        ("hps/losses.py", "\n\nFORMULAS = {\n", f"\n\n{formula}"),
        ("hps/losses.py", '    "exo": Formulas(', textwrap.indent(row, "    ")),
        ("hps/methods.py", '    "exo": Family(', textwrap.indent(entry, "    ")),
        ("docs/methods.md", "| ipo | `s` |", "| hinge | `rho = beta s` | ... | none | arXiv 2402.05749 |\n"),
        ("tests/test_losses.py", '    if loss.family == "slic":\n', in_plain_python),
        ("tests/test_recipe.py", '    "loss.exo_epsilon": (', '    "loss.hinge_margin": (1e-9, None),\n'),
        ("tests/test_recipe.py", '    "loss.exo_epsilon": 1e-3', '    "loss.hinge_margin": 1.0,\n'),
    ):
        text = (tmp_path / path).read_text()
        assert text.count(before) == 1, (path, before)
        (tmp_path / path).write_text(text.replace(before, added + before))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    (tmp_path / "docs/recipe.md").write_text(python("-m", "pipeline.recipe", "--fields"))
    python("-m", "theory.reproduce")
    quick = "not full and not slow and not infer and not gpu"  # `bash test.sh fast`
    python("-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", "-m", quick)


def test_a_misspelt_bound_is_refused():
    with pytest.raises(ValueError, match="`bounds` has min; use gt, ge, lt, le"):
        registry.Constant(1.0, "a constant", {"min": 0})


def test_every_family_has_its_formulas():
    assert losses.FORMULAS.keys() == registry.FAMILIES.keys()
    assert {preference for _, preference in methods()} == {*registry.PREFERENCES}
    for name, family in registry.FAMILIES.items():
        assert (losses.FORMULAS[name].list is None) == ("pl" not in family.preferences)
