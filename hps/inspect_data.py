"""Look at preference data as a trainer sees it: what is trained, what is wrong, and whether anything can move.

Reads   DATASET: JSON Lines, JSON, Parquet, a saved data set or a hub name, for any trainer (hps/preferences.py)
Writes  a summary, a row's token ids and the findings on the screen; with --json the figures as one object
Run     python -m hps.inspect_data pairs.jsonl models/smollm2-135m-instruct
        python -m hps.inspect_data pairs.jsonl MODEL --batch 64 --epochs 2 --learning-rate 5e-7 --lora 8 16
        python -m hps.inspect_data pairs.jsonl MODEL --same-as report.json      # of an earlier --json

A finding is a line with its severity, its count, the first row and a remedy; data without faults has none. A fault ends
with status 1. docs/inspector.md says what each finding means and which report it comes from.
"""

import argparse
import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hps.chat import load_tokenizer, prompt_token_ids
from hps.errors import InputError, positive, printable, run_main
from hps.inspection import FAULT, PROBE, WARNING, Findings, Inspection, Template, template_hash
from hps.preferences import Row, read_records, read_row
from hps.settings import Loss, Schedule

STUCK = 0.69  # the loss that Online-RLHF#17 saw for a whole training
JUMP = 10.0  # beta x nats that one step may move a margin; ours
FIRST_LOSS = 0.02  # nats that a logged first loss may be from ln 2; loggers average the first steps


def show_row(row: Row, tokenizer: Any) -> Iterator[str]:
    """A row's ids, `id:token`, with each trained span between `>>` and `<<`."""
    yield f"row {row.where} ({row.kind}), preferred first; what is trained is between >> and <<"
    order = sorted(range(len(row.responses)), key=lambda place: place != row.best)
    for number, place in enumerate(order):
        words = ["prompt", *_pieces(tokenizer, row.prompt)] if number == 0 else ["prompt as above"]
        yield from _wrapped([*words, ">>", *_pieces(tokenizer, row.responses[place]), "<<"])
    if row.by_text is not None and row.by_text != row.prompt:
        yield "by way of a text that is tokenised with special tokens, the prompt would be"
        yield from _wrapped(_pieces(tokenizer, row.by_text))


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    return [f"{token}:{piece}" for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)]


def _wrapped(words: list[str]) -> list[str]:
    text = printable(" ".join(words))
    return textwrap.wrap(text, 116, initial_indent="  ", subsequent_indent="    ", break_long_words=False)


def steps_of(options: argparse.Namespace, rows: int, findings: Findings) -> dict:
    """Global batch and steps; a fault where the batch is not what devices and accumulation make."""
    parts = (options.devices, options.device_batch, options.accumulation)
    made = math.prod(part or 1 for part in parts) if any(parts) else None
    if made and options.batch and made != options.batch:
        what = f"--batch {options.batch} is asked for, and {' x '.join(str(part or 1) for part in parts)} = {made}"
        remedy = "change --accumulation, or say the batch that you mean (devices x rows of a device x accumulation)"
        findings.say("batch", FAULT, what, remedy)
    batch = options.batch or made
    return {"batch": batch, "steps": options.epochs * math.ceil(rows / batch)} if batch else {}


def first_step(options: argparse.Namespace, inspection: Inspection, steps: int | None) -> dict:
    """Figures of `hps.first_step` on the kept rows; their findings."""
    from hps import first_step as step  # torch, PEFT and TRL take seconds to load
    from hps.trainer import dropouts

    findings, moves = inspection.findings, bool(options.learning_rate and steps)
    model = step.load_model(options.model, options.model_revision)
    pairs = [step.as_pair(row, options.max_length) for row in inspection.kept]
    pad, lora = inspection.template.pad, options.lora and tuple(options.lora)
    found = step.start(model, pairs, options.beta, pad, lora, moves)
    figures: dict[str, Any] = asdict(found)
    if not found.share <= 1:
        drops = ", ".join(dropouts(model.config))
        what = f"before the first update |s| is {found.s:.3g} nats, {found.share:.3g} times what rounding explains"
        remedy = f"set to 0 in config.json: {drops}" if drops else "check that the weights are finite"
        findings.say("start", FAULT, what, remedy)
    if moves and steps and found.gradient is not None:
        path = options.learning_rate * step.rates(options.scheduler, steps)
        reach, jump = path * found.gradient, options.learning_rate * found.gradient * options.beta
        least = step.least_loss(options.beta, reach)
        figures |= {"sum_of_rates": path, "reach": reach, "least_loss": least, "jump": jump}
        if least > STUCK:
            what = (
                f"{steps} steps at {options.learning_rate:g} move a margin by at most {reach:.2g} nats to first order: "
                f"the loss stays at {least:.4f} or above"
            )
            remedy = (
                "raise the learning rate (alignment-handbook: 5e-7 for all weights, 5e-6 for an adapter) or the steps"
            )
            findings.say("stuck", FAULT, what, remedy)
        elif jump > JUMP:
            what = f"one step at {options.learning_rate:g} can move beta x margin by {jump:.2g}"
            findings.say("jump", WARNING, what, "lower the learning rate; a larger batch alone makes fewer such steps")
    return figures


def first_loss(logged: float, findings: Findings) -> None:
    """Compare a trainer's first loss with ln 2."""
    if not abs(logged - math.log(2)) <= FIRST_LOSS:
        what = f"the first loss of a DPO training is ln 2 = 0.693, and {logged:g} is {logged / math.log(2):.1f} ln 2"
        remedy = (
            "policy and reference see different tokens (packing, padding, dropout), or the loss is a sum over the batch"
        )
        findings.say("first loss", FAULT, what, remedy)


def same_template(options: argparse.Namespace, tokenizer: Any, findings: Findings) -> str:
    """Compare the template of the evaluation's model, by its hash and by the ids of a conversation."""
    other = load_tokenizer(options.evaluated_with, None)
    ids = []
    for each in (tokenizer, other):
        try:
            ids.append(prompt_token_ids(each, PROBE))
        except InputError:  # no system messages
            ids.append(prompt_token_ids(each, PROBE[1:]))
    if ids[0] != ids[1]:
        what = f"{options.evaluated_with} writes other token ids for a conversation than the model that is trained"
        remedy = "evaluate with the template and the tokenizer of the training"
        findings.say("evaluation", FAULT, what, remedy)
    return template_hash(other)


def compare(earlier: dict, now: dict, findings: Findings) -> None:
    """Name what differs from an earlier report."""
    titles = {
        "template": "chat template",
        "data": "token ids of the data",
        "order": "order of the data",
        "batch": "global batch",
        "steps": "number of steps",
        "max_length": "--max-length",
    }
    differing = {name for name in titles if earlier.get(name) != now.get(name)}
    if "data" in differing:
        differing -= {"order"}  # follows
    for name in sorted(differing, key=list(titles).index):
        what = f"the {titles[name]} was {earlier.get(name)} in the earlier report and is {now.get(name)}"
        findings.say(f"other {name}", FAULT, what, "train and evaluate on the same, or do not compare the results")


def inspect(options: argparse.Namespace) -> tuple[dict, Inspection]:
    """All figures, and the inspection with its findings.

    Raises:
        InputError: data, model or an earlier report cannot be read.
    """
    tokenizer = load_tokenizer(options.model, options.model_revision)
    probes = 0 if options.tokens_only else options.pairs
    inspection = Inspection(Template(tokenizer), options.max_length, options.row, probes)
    findings = inspection.findings
    for number, (where, record) in enumerate(read_records(options.dataset, options.revision, options.split)):
        if options.limit is not None and number >= options.limit:
            break
        try:
            inspection.add(read_row(tokenizer, record, where), record)
        except InputError as error:
            inspection.refuse(error, where)
    if not inspection.rows:
        raise InputError("no rows", where=options.dataset, remedy="check the file, or --split")
    if not 0 <= options.row < inspection.rows:
        remedy = f"give a row from 0 to {inspection.rows - 1}"
        raise InputError(f"--row is {options.row}, of {inspection.rows} rows", where=options.dataset, remedy=remedy)
    inspection.judge()
    figures: dict[str, Any] = {"template": template_hash(tokenizer), "max_length": options.max_length}
    figures |= inspection.figures() | steps_of(options, inspection.rows, findings)
    if inspection.kept:
        figures["first_step"] = first_step(options, inspection, figures.get("steps"))
    if options.first_loss is not None:
        first_loss(options.first_loss, findings)
    if options.evaluated_with:
        figures["template_of_the_evaluation"] = same_template(options, tokenizer, findings)
    if options.same_as:
        try:
            earlier = json.loads(Path(options.same_as).read_bytes())["figures"]
        except (OSError, ValueError, KeyError, TypeError):
            remedy = "give what --json wrote"
            raise InputError("no report of an inspection", where=options.same_as, remedy=remedy) from None
        compare(earlier, figures, findings)
    return figures, inspection


def report(figures: dict, inspection: Inspection) -> Iterator[str]:
    """The summary, a row, and the findings, as lines."""
    kinds = ", ".join(f"{count} as {kind}" for kind, count in figures["kinds"].items())
    scored = figures["rows_with_scores"]
    yield f"rows: {figures['rows']} ({kinds}); {figures['answers']} answers, {scored} rows with scores"
    yield (
        f"trained: BOS in front of a prompt {_counts(figures['bos_in_front'])}, and of the template's own "
        f"{figures['bos_of_the_template']}; ends of an answer {_counts(figures['ends_of_an_answer'])}; the "
        f"assistant's header in front of the answers of {figures['prompts_with_the_header']} rows"
    )
    if figures["prompts_that_differ_by_text"]:
        yield (
            f"by way of a text: {figures['prompts_that_differ_by_text']} prompts have other ids in trainers that write "
            "the template as text and tokenise it with special tokens"
        )
    yield (
        f"lengths: prompt {figures['prompt_tokens']:g} tokens; the preferred answer is longer in "
        f"{figures['preferred_longer']} rows, shorter in {figures['preferred_shorter']}; {figures['cut_answers']} "
        f"answers are cut at {figures['max_length']}"
    )
    if figures["columns_not_read"]:
        yield f"columns that are not read: {', '.join(figures['columns_not_read'])}"
    if "steps" in figures:
        yield f"training: {figures['steps']} steps of {figures['batch']}"
    if step := figures.get("first_step"):
        yield from _first_step_lines(step)
    yield f"hashes: template {figures['template']}, data {figures['data']}, order {figures['order']}"
    if inspection.row:
        yield from show_row(inspection.row, inspection.template.tokenizer)
    else:
        yield f"row {inspection.shown} cannot be read, so it is not shown"
    for found in inspection.findings.values():
        yield found.line(inspection.rows)


def _counts(counted: dict[int, int]) -> str:
    return ", ".join(f"{number} ({count} times)" for number, count in counted.items()) or "none"


def _first_step_lines(step: dict) -> Iterator[str]:
    pairs, s, loss = step["pairs"], step["s"], step["loss"]
    yield f"before the first update, {pairs} pairs: largest |s| {s:.3g} nats, DPO loss {loss:.6f} (ln 2 = 0.693147)"
    if "reach" in step:
        yield (
            f"to first order the margin moves by at most {step['reach']:.3g} nats (sum of the rates "
            f"{step['sum_of_rates']:.3g}, {step['trainable']:,} weights): loss {step['least_loss']:.4f} or above"
        )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser("python -m hps.inspect_data", description="Look at preference data.")
    add = parser.add_argument
    count, rate = positive(int), positive(float)
    add("dataset", help="file (.jsonl, .json, .parquet, .csv), folder, saved data set, or hub name")
    add("model", help="model before training: folder or hub name; its tokenizer makes the ids")
    add("--revision", help="of the data set on the hub")
    add("--split", default="train")
    add("--model-revision")
    add("--limit", type=count, metavar="N", help="look at the first N rows")
    add("--row", type=int, default=0, metavar="N", help="show the ids of row N, from 0")
    longest = Schedule.model_fields["max_length"].default
    add("--max-length", type=count, default=longest, help=f"tokens of prompt and answer ({longest})")
    add("--tokens-only", action="store_true", help="do not load the model")
    add("--pairs", type=count, default=4, help="rows that pass the model before the first update (4)")
    add("--beta", type=rate, default=Loss.model_fields["beta"].default)
    add("--batch", type=count, help="pairs of a step over all devices")
    add("--devices", type=count)
    add("--device-batch", type=count, help="pairs that a device computes at a time")
    add("--accumulation", type=count, help="gradient accumulation steps")
    add("--epochs", type=count, default=1)
    add("--learning-rate", type=rate, help="with a batch: how far can the settings move a margin?")
    add("--scheduler", choices=("cosine", "linear", "constant"), default="cosine")
    add("--lora", type=count, nargs=2, metavar=("RANK", "ALPHA"), help="an adapter trains, on all linear layers")
    add("--first-loss", type=float, help="what your DPO trainer logged first")
    add("--evaluated-with", metavar="MODEL", help="the model whose template and tokenizer the evaluation uses")
    add("--same-as", metavar="FILE", help="an earlier --json that this must agree with")
    add("--json", action="store_true", help="print figures and findings as one JSON object")
    return parser


def parsed(parser: argparse.ArgumentParser, given: list[str] | None = None) -> argparse.Namespace:
    """The options; the parser's error where one would be ignored for want of another."""
    options = parser.parse_args(given)
    model, rate = not options.tokens_only, options.learning_rate
    batch = any((options.batch, options.devices, options.device_batch, options.accumulation))
    loaded = (model, "the model, which --tokens-only leaves out")
    needs = {
        "learning_rate": loaded if not model else (batch, "a batch (--batch)"),
        "scheduler": (rate, "--learning-rate"),
        "epochs": (batch, "a batch (--batch)"),
        **dict.fromkeys(("lora", "pairs", "beta"), loaded),
    }
    for name, (there, what) in needs.items():
        if not there and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} needs {what}")
    return options


def main() -> None:
    options = parsed(arguments())
    figures, inspection = inspect(options)
    if options.json:
        found = {name: asdict(finding) for name, finding in inspection.findings.items()}
        print(json.dumps({"figures": figures, "findings": found}, indent=2))
    else:
        print("\n".join(report(figures, inspection)))
    if inspection.findings.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
