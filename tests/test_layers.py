"""What may import what: the library knows no stage, and no module imports itself by way of others."""

import ast
from graphlib import TopologicalSorter

from conftest import REPOSITORY


def imports(package: str) -> dict[str, set[str]]:
    """Modules of a package and what each imports, inside functions too."""
    found = {}
    for path in (REPOSITORY / package).glob("*.py"):
        names = found[f"{package}.{path.stem}"] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names.add(node.module)
            elif isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
    return found


def test_the_library_knows_no_stage():
    ours = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"hps"}
    for module, names in imports("hps").items():
        assert not {name.partition(".")[0] for name in names} & ours, module


def test_no_module_of_the_library_imports_itself():
    TopologicalSorter(imports("hps")).prepare()  # raises CycleError


def test_the_registry_needs_no_torch():
    for module in ("methods", "combinations", "settings", "errors"):
        assert "torch" not in imports("hps")[f"hps.{module}"]
