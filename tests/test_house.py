"""The house: who imports whom, which knowledge stands in one place, and that no file runs code from elsewhere."""

import ast
import re
from pathlib import Path

import config

ROOT = Path(config.__file__).parent
FLOORS = [  # from top to bottom: a module imports only from those below it
    "main", "sweep", "runtime.dry_run", "runtime.preflight", "cache", "interop.circuit_tracer", "interop.neuronpedia",
    "interop.hub", "results", "analysis.measure", "analysis.dashboard", "training", "logs", "analysis.splice",
    "analysis.latents", "activation_store", "evaluation", "text", "interop.pretrained", "language_model", "checkpoint",
    "sae", "kernels.choose", "kernels.straight_through", "kernels.sparse", "analysis.figures", "runtime.machine",
    "runtime.progress", "runtime.cli", "runtime.ranks", "runtime.disk", "runtime.documents", "runtime.models",
    "config", "runtime.checks",
]  # fmt: skip
OTHERS = {"tests", "benchmarks", "assets", "notebooks"}
FILES = {
    ".".join(path.with_suffix("").parts): ROOT / path
    for path in sorted(file.relative_to(ROOT) for file in ROOT.rglob("*.py"))
    if not path.parts[0].startswith(".") and path.parts[0] not in OTHERS and path.name != "__init__.py"
}


def tree(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(FILES[module].read_text())))


def imported(module: str) -> set[str]:
    """What a module names in its imports, late ones too: modules, and what is taken from them."""
    names = set()
    for node in tree(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_every_module_stands_on_a_floor() -> None:
    assert sorted(FLOORS) == sorted(FILES)


def test_imports_go_downward_only() -> None:
    above = {module: imported(module) & set(FLOORS[: floor + 1]) for floor, module in enumerate(FLOORS)}
    assert {module: found for module, found in above.items() if found} == {}


def test_types_are_named_in_two_places_only() -> None:
    """And in other libraries' formats."""
    free = {"config", "sae"} | {module for module in FLOORS if module.startswith("interop.")}
    strings = {m: {n.value for n in tree(m) if isinstance(n, ast.Constant) and n.value in config.TYPES} for m in FILES}
    assert {module: found for module, found in strings.items() if found and module not in free} == {}


def test_no_pickle_and_no_code_from_elsewhere() -> None:
    for module, file in FILES.items():
        harmless = r"torch\.load\([^()]*, weights_only=True\)|, allow_pickle=False\)"
        text = re.sub(harmless, "", file.read_text())
        found = re.findall(r"pickle|torch\.(?:load|save)\b|trust_remote_code=True|\beval\(|\bexec\(", text)
        assert not [word for word in found if word != "eval("], module  # sae.eval()


def test_imports_inside_functions_are_few() -> None:
    functions = [(m, node) for m in FLOORS for node in tree(m) if isinstance(node, ast.FunctionDef)]
    late = [m for m, f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(late) <= 6, late
