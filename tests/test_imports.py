"""Modules import each other in one direction, imports inside functions included."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import REPOSITORY

FOLDERS = sorted(path.parent.name for path in REPOSITORY.glob("*/__init__.py"))
MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path
    for folder in FOLDERS
    for path in (REPOSITORY / folder).rglob("*.py")
}


def imported(text: str) -> set[str]:
    """The repository's modules that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def test_imports_inside_functions_are_seen():
    text = "import json\nfrom report import page\n\ndef f():\n    from hps.errors import InputError\n"
    assert imported(text) == {"report.page", "hps.errors"}


def test_no_import_cycle():
    graph = {name: imported(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_the_library_knows_no_stage():
    for name, path in MODULES.items():
        if name.startswith("hps."):
            assert {each for each in imported(path.read_text(encoding="utf-8")) if not each.startswith("hps.")} == set()


def test_the_registry_needs_no_torch():
    """Nor does anything that it imports."""
    modules = ", ".join(f"hps.{name}" for name in ("methods", "combinations", "settings", "errors"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "False\n"


def test_what_the_stages_share_imports_no_stage_and_no_tool():
    """But for the preflight, which asks the stages what a run needs."""
    for name, path in MODULES.items():
        if name.startswith("pipeline.") and name != "pipeline.preflight":
            folders = {each.partition(".")[0] for each in imported(path.read_text(encoding="utf-8"))}
            assert folders <= {"hps", "pipeline"}, name
