"""Turn the published data sets into the prompts files that the recipes of the paper read.

Reads   data/sources.yaml; the files that it names, from the hub (or its cache), or from FOLDER/<repo>/<file>
Writes  data/<name>/{train,test}.jsonl (prompts), data/<name>/rejected.jsonl (rows that are left out: file, line, row,
        reason), data/<name>/prepare.json (last: counts, reasons, commits, hashes); `pin`: data/sources.yaml
Run     .venv-train/bin/python data/prepare.py hh_rlhf pku_safe [--from FOLDER] [--preference better|safer]
        .venv-train/bin/python data/prepare.py pin

Training: the authors' curated files. The two responses of a row are taken as ranked by people, best first, as in the
file. Test: the test files of the original sets; `--preference` chooses which of PKU-SafeRLHF's two rankings orders a
pair. Texts only lose the white space around them and carriage returns at line ends.

A test row is rejected if its prompt is also in training or came earlier in the test files (all messages are compared,
ignoring case and white space). Repeated prompts in training stay, as in the authors' file, and are counted; generation
merges exact repetitions.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from annotation.layouts import Rejected, turns
from hps.errors import InputError, run_main, shorten
from pipeline.files import file_hash, json_line, write_atomic, write_json
from pipeline.hub import COMMIT, asking, commit_of, write_revisions
from pipeline.records import ROLES, canonical, prompt_id, read_values, refusal, typed

DATA = Path(__file__).resolve().parent
SOURCES = DATA / "sources.yaml"
SETS = ("hh_rlhf", "pku_safe")
SPLITS = ("train", "test")
PREFERENCES = ("better", "safer")
FORMAT = "the file has another format than data/README.md describes; correct it, or pin an older revision"

Pair = tuple[list[dict], list[str]]  # chat messages; two responses, best first


Text = Annotated[str, Field(min_length=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Strict):
    """A dataset repository of the hub, the revision asked for (None: newest), its files in the order of reading."""

    repo: Annotated[str, Field(pattern="^[^/]+/[^/]+$")]
    revision: Text | None
    files: Annotated[list[Text], Field(min_length=1)]


class Sources(Strict):
    train: Source
    test: Source


class AllSources(Strict):
    hh_rlhf: Sources
    pku_safe: Sources


class Turn(TypedDict):
    role: str
    content: str


class Curated(TypedDict):
    prompt: list[Turn]
    responses: list[str]


class Transcripts(TypedDict):
    chosen: str
    rejected: str


class Question(TypedDict):
    prompt: str
    response_0: str
    response_1: str


@dataclass(frozen=True)
class Row:
    """A record and its place: `name` is <repo>/<file>, `where` names the file here; `line` and `row` count from 1."""

    name: str
    where: str
    line: int
    row: int
    record: dict

    @property
    def place(self) -> str:
        return f"{self.name}:{self.line}: row {self.row}"


@dataclass
class Split:
    """The outcome of a split's rows; `places`: where each written prompt came first, by its comparison key."""

    records: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)


def load_sources(path: Path) -> dict[str, dict[str, Source]]:
    """The sources by set and split; InputError names a field that is missing, unknown or mistyped."""
    try:
        found = AllSources.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise refusal(error, str(path)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"cannot read the sources ({problem})", where=str(path), remedy="restore the file") from None
    return {name: dict(splits) for name, splits in found}


def named(source: Source) -> str:
    """A source, for the reader."""
    return f"dataset {source.repo}" + (f", revision {source.revision}" if source.revision else "")


def read_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of a JSON array or of JSON Lines; InputError: broken JSON (with its line), or a row is not an object."""
    for number, (line, record) in enumerate(read_values(path), 1):
        where = f"{path}:{line}: row {number}"
        if not isinstance(record, dict):
            raise InputError(f"expected a JSON object, found {shorten(record)}", where=where, remedy=FORMAT)
        yield Row(name, where, line, number, record)


def tidy(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def two_responses(responses: list[str]) -> list[str]:
    """The responses, checked to be a preference: two different texts."""
    if len(responses) != 2:
        raise Rejected("not two responses")
    if not all(responses):
        raise Rejected("empty response")
    if responses[0] == responses[1]:
        raise Rejected("equal responses")
    return responses


def curated(row: Row) -> Pair:
    """A row of the authors' files: `prompt`, chat messages; `responses`, two texts, taken as best first."""
    record = typed(row.record, Curated, row.where, FORMAT)
    messages = [{"role": message["role"], "content": tidy(message["content"])} for message in record["prompt"]]
    if any(message["role"] not in ROLES for message in messages):
        raise Rejected(f"a role other than {', '.join(ROLES)}")
    if not messages or messages[-1]["role"] != "user":
        raise Rejected("prompt does not end with the user's turn")
    if not all(message["content"] for message in messages):
        raise Rejected("empty turn")
    return messages, two_responses(list(map(tidy, record["responses"])))


def transcripts(row: Row) -> Pair:
    """A row of Anthropic/hh-rlhf: the transcripts `chosen` and `rejected`, which differ in their last answer."""
    record = typed(row.record, Transcripts, row.where, FORMAT)
    chosen, rejected = turns(record["chosen"]), turns(record["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise Rejected("transcripts do not share the prompt")
    return chosen[:-1], two_responses([chosen[-1]["content"], rejected[-1]["content"]])


def questions(row: Row, preference: str) -> Pair:
    """A row of PKU-Alignment/PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, the number of the preferred one."""
    record = typed(row.record, Question, row.where, FORMAT)
    prompt, *responses = (tidy(record[name]) for name in ("prompt", "response_0", "response_1"))
    name = f"{preference}_response_id"
    if name not in row.record:
        raise InputError(f"`{name}` is missing", where=row.where, remedy=FORMAT)
    best = row.record[name]
    if isinstance(best, bool) or best not in (0, 1):
        raise Rejected(f"`{name}` is neither 0 nor 1")
    if not prompt:
        raise Rejected("empty turn")
    responses = two_responses(responses)
    return [{"role": "user", "content": prompt}], responses if best == 0 else responses[::-1]


def comparison_key(messages: list[dict]) -> str:
    """Equal for prompts that differ in case and white space only."""
    return prompt_id([{**message, "content": " ".join(message["content"].casefold().split())} for message in messages])


def convert(rows: Iterable[Row], parse: Callable[[Row], Pair], training: dict[str, str] | None = None) -> Split:
    """Prompts records of the rows, and what was rejected.

    Args:
        parse: gives the pair of a row, or raises `Rejected`.
        training: of a test split: the places of the training prompts, by comparison key.
    """
    split = Split()
    for row in rows:
        try:
            messages, responses = parse(row)
            # An escape in JSON can spell half a surrogate pair, but UTF-8 cannot store it.
            canonical([messages, responses]).encode("utf-8")
            key = comparison_key(messages)
            if training is not None and (first := training.get(key) or split.places.get(key)):
                raise Rejected("prompt in training" if key in training else "repeated prompt", first)
        except (Rejected, UnicodeEncodeError) as error:
            found = error if isinstance(error, Rejected) else Rejected("half a character")
            same = {"same_as": found.same_as} if found.same_as else {}
            facts = {"file": row.name, "line": row.line, "row": row.row, "reason": found.reason}
            split.rejected.append({**facts, **same})
            continue
        split.places.setdefault(key, row.place)
        split.records.append({"prompt": messages, "responses": responses, "source": row.place})
    return split


def counts(split: Split, name: str) -> dict:
    """`read` = `written` + `rejected`, and the reasons; a test split always counts the prompts that came twice."""
    reasons = Counter({"prompt in training": 0, "repeated prompt": 0} if name == "test" else {})
    reasons.update(line["reason"] for line in split.rejected)
    written, rejected = len(split.records), len(split.rejected)
    numbers = {"read": written + rejected, "written": written, "rejected": rejected}
    kept = {"repeated_prompts_kept": written - len(split.places)} if name == "train" else {}
    return {**numbers, "reasons": dict(sorted(reasons.items())), **kept}


def counted(facts: dict) -> str:
    """Counts as one line of text."""
    parts = [f"{reason}: {count}" for reason, count in facts["reasons"].items()] or ["nothing rejected"]
    if "repeated_prompts_kept" in facts:
        parts.append(f"repeated prompts kept: {facts['repeated_prompts_kept']}")
    return f"{facts['read']} rows read = {facts['written']} written + {facts['rejected']} rejected; {', '.join(parts)}"


def obtain(name: str, split: str, source: Source, folder: Path | None) -> tuple[dict[str, Path], str | None]:
    """The files of a split, from the hub's cache or `<folder>/<repo>`, and their commit (None for local files)."""
    from huggingface_hub import snapshot_download

    if folder is not None:
        root, commit, told = folder / source.repo, None, "local files, commit not known"
        remedy = "lay the folder out as FOLDER/<repo>/<file>, as data/README.md says, or leave --from out"
    else:
        with asking("dataset", named(source), ", or give local files with --from FOLDER"):
            settings = {"repo_type": "dataset", "revision": source.revision, "allow_patterns": source.files}
            root = Path(snapshot_download(source.repo, **settings))
        commit = root.name  # the cache keeps a file as .../snapshots/<commit>/<file>
        remark = f" ({source.revision or 'newest'}; `data/prepare.py pin` fixes it)"
        told = f"commit {commit}{'' if source.revision == commit else remark}"
        remedy = "correct `files` in data/sources.yaml"
    paths = {file: root / file for file in source.files}
    for path in paths.values():
        if not path.is_file():
            raise InputError("there is no such file", where=str(path), remedy=remedy)
    print(f"prepare: {name}: {split}: {source.repo}: {told}")
    return paths, commit


def prepare(
    name: str,
    sources: dict[str, Source],
    output: Path,
    preference: str = PREFERENCES[0],
    folder: Path | None = None,
) -> dict:
    """Prepare one set and return the content of prepare.json. Nothing is written unless all rows can be read.

    Args:
        sources: of this set, by split.
        output: the set's folder.
        folder: where downloaded files are (see `obtain`); None: the hub.
    """
    _refuse_foreign(output)
    original = transcripts if name == "hh_rlhf" else partial(questions, preference=preference)
    parsers = {"train": curated, "test": original}
    results, facts, training = {}, {}, None
    for split in SPLITS:
        source = sources[split]
        paths, commit = obtain(name, split, source, folder)
        rows = (row for file, path in paths.items() for row in read_rows(path, f"{source.repo}/{file}"))
        results[split] = convert(rows, parsers[split], training)
        training = results[split].places
        hashes = {file: file_hash(path) for file, path in paths.items()}
        facts[split] = {**source.model_dump(), "commit": commit, "files": hashes, **counts(results[split], split)}
        print(f"prepare: {name}: {split}: {counted(facts[split])}")
        if not results[split].records:
            problem = f"no row of {split} can be used ({counted(facts[split])})"
            raise InputError(problem, where=f"dataset {source.repo}", remedy=FORMAT)
    chosen = preference if name == "pku_safe" else None
    return write(output, results, {"set": name, "preference": chosen, "splits": facts})


def _refuse_foreign(output: Path) -> None:
    """Refuse to overwrite the user's prompts files; files of this command have a rejected.jsonl beside them."""
    for split in SPLITS:
        path = output / f"{split}.jsonl"
        if path.exists() and not (output / "rejected.jsonl").exists():
            problem = "there is a file that data/prepare.py did not write"
            raise InputError(problem, where=str(path), remedy="move it away, or keep it and do not prepare this set")


def write(output: Path, results: dict[str, Split], facts: dict) -> dict:
    """Write the files of a set. prepare.json is removed first and written last, so it always fits them."""
    (output / "prepare.json").unlink(missing_ok=True)
    rejected = [{"split": split, **line} for split, result in results.items() for line in result.rejected]
    files = {"rejected.jsonl": rejected, **{f"{split}.jsonl": result.records for split, result in results.items()}}
    for file, records in files.items():
        write_atomic(output / file, "".join(map(json_line, records)))
    facts = {**facts, "outputs": {file: file_hash(output / file) for file in files}}
    write_json(output / "prepare.json", facts)
    print(f"prepare: {facts['set']}: -> {output}")
    return facts


def pin(path: Path) -> None:
    """Write the current commits into the sources; full commits stay as they are."""
    sources = {(name, split): source for name, splits in load_sources(path).items() for split, source in splits.items()}
    commits = {
        key: commit_of("dataset", source.repo, source.revision, named(source))
        for key, source in sources.items()
        if not COMMIT.fullmatch(source.revision or "")
    }
    if commits:
        write_revisions(path, commits)
    for key, source in sources.items():
        outcome = f"{source.revision or 'newest'} -> {commits[key]}" if key in commits else "pinned already"
        print(f"pin: {'.'.join(key)}: {source.repo}: {outcome}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*SETS, "pin"], metavar="hh_rlhf | pku_safe | pin")
    parser.add_argument("--from", dest="folder", type=Path, metavar="FOLDER", help="downloaded files; no network")
    parser.add_argument("--preference", choices=PREFERENCES, default=PREFERENCES[0], help="pku_safe's; %(default)s")
    options = parser.parse_args()
    if options.names == ["pin"]:
        return pin(SOURCES)
    if "pin" in options.names:
        raise InputError("`pin` cannot be combined", where="command line", remedy="run it first, then prepare")
    sources = load_sources(SOURCES)
    for name in dict.fromkeys(options.names):
        prepare(name, sources[name], DATA / name, options.preference, options.folder)
    return None


if __name__ == "__main__":
    run_main(main)
