"""Every causal class of the installed transformers: are its log-probabilities in our rows those of its forward pass?

Run     .venv-train/bin/python -m tests.faults.architectures [NAME ...] [--seconds 120]

For each class a tiny model with random weights, from the class's default configuration made small. `prove` says how it
may compute responses; then conversations on both sides of the limit that it names (made 16) are computed in the rows of
that layout and by the class's forward pass on rows of their own. A class whose values differ ends the program with exit
status 1. Classes of which no tiny model can be made are listed with the reason: nothing is known of them.
"""

import argparse
import concurrent.futures
import math
import multiprocessing
import sys
import warnings
from collections import defaultdict

SHORT = 16
PROMPTS = [list(range(3, 9)), list(range(20, 44))]
RESPONSES = [[[5, 7, 9, 11], [60, 61, 62, 63, 55, 45]], [list(range(40, 60)), [3, 4, 5]]]


def tiny(config, narrow: bool):
    """A model of a configuration made small. Raises whatever the class does."""
    import torch
    from transformers import AutoModelForCausalLM

    from hps.shared_prefix import small_config, with_large_weights

    small = small_config(config, narrow)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(small).parameters())
    if weights > 3e7:
        raise ValueError(f"{weights / 1e6:.0f} million weights with few layers")
    return with_large_weights(AutoModelForCausalLM.from_config(small).eval())


def of_any_width(config, dtype):
    """The narrow model, or the one of the default width, if the class computes with it."""
    from hps.shared_prefix import own_log_probs

    for narrow in (True, False):
        try:
            model = tiny(config, narrow).to(dtype)
            if not own_log_probs(model, PROMPTS[0], RESPONSES[0][0]).isfinite():
                raise ValueError("its values are not finite")
            return model
        except Exception as error:
            problem = error
    raise problem


def check(name: str) -> tuple[str, str]:
    """What was found of a class: a kind of `KINDS`, and words to it."""
    import torch
    import transformers

    from hps.shared_prefix import TOLERANCE, add_response_head, make_rows, own_log_probs, prove, response_log_probs

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[name]
    problem = None
    for dtype in TOLERANCE:
        try:
            model = of_any_width(config_class(), dtype)
            break
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0][:110]
    else:
        return "no model", problem
    layout = prove(model, math.inf)
    for limit in {layout.shared, layout.padded} - {0, math.inf}:  # make it short enough to be passed
        _shorten(model.config, limit)
    if min(layout.shared, layout.padded) not in (0, math.inf):
        model = with_config(model, dtype)
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


def _shorten(part, limit: int) -> None:
    from transformers import PreTrainedConfig

    items = part if isinstance(part, dict) else vars(part)
    for name, value in list(items.items()):
        if isinstance(value, dict | PreTrainedConfig):
            _shorten(value, limit)
        elif type(value) is int and value == limit:
            items[name] = SHORT


def with_config(model, dtype):
    """The same weights under a configuration that was changed."""
    other = type(model)(model.config).to(dtype).eval()
    other.load_state_dict(dict(model.named_parameters()), strict=False)
    return other


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
