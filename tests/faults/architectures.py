"""Every causal class of the installed transformers: are its log-probabilities in our rows those of its forward pass?

Run     .venv-train/bin/python -m tests.faults.architectures [NAME ...] [--seconds 120]

For each class a tiny model with random weights, from its default configuration made small as `prove` does it. `prove`
says how it may compute responses; then conversations on both sides of the limit that it names, made 16, are computed
in the rows of that layout and by the class's forward pass on rows of their own. A class whose values differ ends this
with exit status 1. Classes of which no tiny model can be made are listed with the reason: nothing is known of them.
"""

import argparse
import concurrent.futures
import copy
import math
import multiprocessing
import re
import sys
import warnings
from collections import defaultdict

PROMPTS = [list(range(3, 9)), list(range(20, 44))]
RESPONSES = [[[5, 7, 9, 11], [60, 61, 62, 63, 55, 45]], [list(range(40, 60)), [3, 4, 5]]]


def check(name: str) -> tuple[str, str]:
    """What was found of a class: a kind of `KINDS`, and words to it."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from hps.response_head import add_response_head, response_log_probs
    from hps.shared_prefix import make_rows
    from hps.trial import TOLERANCE, Trial, own_log_probs, prove, trial_log_probs, with_number

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    try:
        config = config_class()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # it decides class and attention
        trial = Trial(type(model), model.config, own_log_probs, trial_log_probs)
    except Exception as error:
        return "no model", f"{type(error).__name__}: {error}".splitlines()[0][:110]
    model, dtype = trial.model, trial.model.dtype
    layout = trial.layout(math.inf)
    if place := re.match(r"`([\w.]+)` of its", layout.reason):  # make the limit short enough to be passed
        changed = with_number(copy.deepcopy(trial.config), tuple(place[1].split(".")), 16)
        weights = dict(model.named_parameters())
        model = trial.architecture(changed).to(dtype).eval()
        model.load_state_dict(weights, strict=False)
        layout = prove(model, math.inf)
    add_response_head(model, layout.gathers)
    rows = make_rows(layout, PROMPTS, RESPONSES, pad=0)
    found = response_log_probs(model, rows)
    pairs = [(prompt, response) for prompt, each in zip(PROMPTS, RESPONSES, strict=True) for response in each]
    expected = torch.stack([own_log_probs(model, *pair) for pair in pairs])
    off = float(((found - expected).abs() / expected.abs().clamp(min=1)).max())
    if not off <= TOLERANCE[dtype]:
        return "WRONG", f"off by {off:.1e} with {layout}"
    if "segments" in rows:
        return "shared", "" if layout.gathers else "whole forward pass"
    kind = "padded" if "attention_mask" in rows else "alone"
    return (f"{kind} above a limit" if layout.shared else kind), layout.reason


def _ended(pool) -> None:
    for process in pool._processes.values():
        process.kill()
    pool.shutdown(wait=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types (all)")
    parser.add_argument("--seconds", type=float, default=120, help="for a class")
    options = parser.parse_args()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = defaultdict(list)
    names = options.names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    pool = None
    for name in names:
        pool = pool or concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver"))
        try:
            kind, words = pool.submit(check, name).result(timeout=options.seconds)
        except concurrent.futures.TimeoutError:
            kind, words = "no model", f"not finished in {options.seconds:.0f} s"
            pool = _ended(pool)
        except Exception as error:
            kind, words = "WRONG", f"{type(error).__name__}: {error}".splitlines()[0][:110]
            pool = _ended(pool)
        found[kind].append(name)
        print(f"{name:32s} {kind:22s} {words}", flush=True)
    print()
    for kind, members in sorted(found.items()):
        print(f"{kind}: {len(members)} of {len(names)}: {', '.join(members)}")
    sys.exit(1 if found["WRONG"] else 0)


if __name__ == "__main__":
    main()
