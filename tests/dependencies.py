"""The packages of both environments: version, licence as declared, native code, and why each is there.

Reads   the metadata of `.venv-train` and `.venv-infer` (importlib.metadata), requirements-{train,infer}-cpu.txt
Run     .venv-train/bin/python -m tests.dependencies     # after setup.sh; prints a table in Markdown

A package has native code when its wheel is built for a platform or holds a shared library. Licences are as declared
(`-`: none). The reason is the comment of a direct dependency in the lock, else what requires it (`option of`: only as
an extra).
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions

from packaging.requirements import Requirement

from pipeline.recipe import REPOSITORY

KINDS = ("train", "infer")


def normal(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(kind: str) -> dict[str, Distribution]:
    """The packages of an environment but this repository itself, by name."""
    (folder,) = (REPOSITORY / f".venv-{kind}" / "lib").glob("python3*/site-packages")
    found = {normal(each.metadata["Name"]): each for each in distributions(path=[str(folder)])}
    return {name: each for name, each in sorted(found.items()) if name not in ("hps-alignment", "pip")}


def pins(kind: str) -> Iterator[tuple[str, str, str]]:
    """Name, version and comment of each line of a lock; only direct dependencies have a comment."""
    for line in (REPOSITORY / f"requirements-{kind}-cpu.txt").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([\w.-]+)(?:\[.*\])?==(\S+)(?:\s+# (.*))?$", line):
            yield normal(found[1]), found[2], found[3] or ""


def licence(package: Distribution) -> str:
    """What a package declares: the expression, the classifiers, or the first line of the text."""
    data = package.metadata
    classifiers = [each for each in data.get_all("Classifier") or [] if each.startswith("License")]
    classified = [each.rpartition(" :: ")[2] for each in classifiers if each.count("::") > 1 or "Other" in each]
    declared = data.get("License-Expression") or ", ".join(classified) or (data.get("License") or "").strip() or "-"
    line = declared.splitlines()[0].replace("|", "/")
    return line if len(line) <= 70 else f"{line[:67]}..."


def is_native(package: Distribution) -> bool:
    names = [path.name for path in package.files or ()]
    built = "Root-Is-Purelib: false" in (package.read_text("WHEEL") or "")
    return built or any(name.endswith(".so") or ".so." in name for name in names)


def required_by(packages: dict[str, Distribution]) -> dict[str, tuple[list[str], list[str]]]:
    """For each package those that need it, and those that may (an extra of theirs)."""
    found: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name, package in packages.items():
        for text in package.requires or ():
            wanted = Requirement(text)
            always = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            places = found[normal(wanted.name)][0 if always else 1]
            if name not in places:
                places.append(name)
    return found


def why(name: str, comment: str, needed: list[tuple[list[str], list[str]]]) -> str:
    """The reason for a package: the comment of a direct dependency, or what requires it in any environment."""
    if comment:
        return comment
    always, optional = (list(dict.fromkeys(each for pair in needed for each in pair[place])) for place in (0, 1))
    names, text = (always, "required by") if always else (optional, "option of")
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{text} {', '.join(names[:3])}{more}" if names else "in the lock; nothing installed says that it needs it"


def rows() -> Iterator[list[str]]:
    """A row a package: name, versions in both environments, licence, native, why."""
    packages = {kind: installed(kind) for kind in KINDS}
    comments = {name: comment for kind in KINDS[::-1] for name, _, comment in pins(kind) if comment}
    needed = [required_by(packages[kind]) for kind in KINDS]
    for name in sorted({*packages["train"], *packages["infer"]}):
        versions = [packages[kind][name].version if name in packages[kind] else "" for kind in KINDS]
        package = packages["train"].get(name) or packages["infer"][name]
        reason = why(name, comments.get(name, ""), [each[name] for each in needed])
        yield [name, *versions, licence(package), "yes" if is_native(package) else "", reason]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = list(rows())
    heads = ["package", "training", "inference", "licence", "native", "why"]
    for row in (heads, ["---"] * len(heads), *table):
        print(f"| {' | '.join(row)} |")
    direct = {name for kind in KINDS for name, _, comment in pins(kind) if comment}
    native = sum(row[4] == "yes" for row in table)
    other = [f"{row[0]} ({row[3]})" for row in table if re.search(r"GPL|MPL|Proprietary|^-$", row[3])]
    print(f"\n{len(table)} packages, {len(direct)} of them direct dependencies, {native} with native code.")
    print(f"Other than a permissive licence, or none declared: {', '.join(other)}.")


if __name__ == "__main__":
    main()
