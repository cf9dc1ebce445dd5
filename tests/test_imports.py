"""Imports go one way: a module imports from the rows above its own, and from its own package. TABLE is the whole rule."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From left to right of the arrow. A third column narrows "all rows above" to what is named there.
TABLE = [
    ("reference.spec", "data, no torch", "nothing"),
    ("reference.certificate", "judges certificates, knows nothing of ours", "nothing"),
    ("reference", "the law, the yardstick and the bounds", "reference.spec"),
    ("harness", "the version", "nothing"),
    ("harness.errors", "for all but the reference", "nothing"),
    ("harness.models", "the pages", "harness.errors reference.spec"),
    ("harness.labels.columns", "labelled layers", "reference.spec"),
    ("harness.labels.plan", "", "reference.spec"),
    (
        "harness.case",
        "the nouns",
        "harness.errors harness.models harness.labels.columns harness.labels.plan reference.spec",
    ),
    ("harness.philox", "", "nothing"),
    ("harness.weights", "", "harness.philox reference.spec"),
    ("harness.quantised", "", "harness.philox reference.spec"),
    (
        "harness.labels",
        "numbers of labelled layers",
        "harness.labels.columns harness.labels.plan harness.weights reference.spec",
    ),
    ("harness.finding", "", "nothing"),
    ("harness.comm", "the ranks", "harness.errors harness.case"),
    ("harness.runner", "what is judged", "harness.comm reference.spec"),
    (
        "harness.systems",
        "",
        "harness.errors harness.models harness.case harness.weights harness.comm harness.runner reference.spec",
    ),
    ("harness.layout", "what a diagnosis knows of a grid", "harness.errors harness.case"),
    ("harness.problem", "the steps of a check", None),
    ("harness.execution", "", None),
    ("harness.parts", "", None),
    ("harness.variants", "", None),
    ("harness.projection", "", None),
    ("harness.route_certificates", "", None),
    ("harness.yardstick", "", None),
    ("harness.compare", "", None),
    ("harness.stages", "", None),
    ("harness.algebra", "", None),
    ("harness.misplaced", "", "harness.layout"),
    ("harness.recover", "", None),
    ("harness.coarse_scores", "", None),
    ("harness.mixtures", "", None),
    ("harness.other_rows", "", None),
    ("harness.one_rank", "", None),
    ("harness.wrong_law", "", None),
    ("harness.visits", "", None),
    ("harness.many_rows", "", None),
    ("harness.unknown", "", None),
    ("harness.causes", "", None),
    ("harness.diagnose", "", None),
    ("harness.second_grid", "", None),
    ("harness.known", "", None),
    ("harness.outputs", "", None),
    ("harness.coefficients", "", None),
    ("harness.second_look", "", None),
    ("harness.probe", "", None),
    ("harness.hazards", "", None),
    ("harness.check", "the story of a run", None),
    ("harness.main_job", "", "harness.models harness.case"),
    ("harness.selection", "many checks", "harness.errors harness.models harness.case harness.main_job reference.spec"),
    ("harness.pool", "", None),
    ("harness.campaign", "", None),
    ("harness.report", "", None),
    ("harness.explain", "verbs", None),
    ("harness.faults", "", None),
    ("harness.certify", "", None),
    ("harness.nightly", "", None),
    ("harness.bench", "", None),
    ("harness.cli", "parse, call, exit code", None),
    ("harness.__main__", "", "harness.cli"),
]
ROWS = [name for name, _, _ in TABLE]
ONLY = {name: only for name, _, only in TABLE}


@dataclass(frozen=True, slots=True)
class Import:
    """at_once: executed when the importing module is; False inside a function or for type checkers alone."""

    importer: str
    imported: str
    place: str
    at_once: bool


@cache
def modules() -> dict[str, Path]:
    files = [path for package in ("reference", "harness") for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, path in modules().items() for found in imports_of(name, path))


def imports_of(name: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    late = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: relative import; write the whole name"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found = {each if each in modules() else str(node.module) for each in whole}
        else:
            continue
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        for each in sorted(found):
            yield Import(name, each, place, id(node) not in late)


def row_of(module: str) -> str:
    """The longest row that the module is, or lies in."""
    fitting = [row for row in ROWS if module == row or module.startswith(f"{row}.")]
    assert fitting, f"{module} has no row in TABLE of tests/test_imports.py"
    return max(fitting, key=len)


def ours(module: str) -> bool:
    return module.partition(".")[0] in ("reference", "harness")


def told(wrong: list[Import]) -> str:
    return "\n".join(f"{each.place}: {each.importer} imports {each.imported}" for each in wrong)


def test_every_module_has_a_row_of_its_own_or_its_packages():
    rows = {row_of(name) for name in modules()}
    assert set(ROWS) == rows, "rows without a module, or modules without a row"
    loose = [name for name in modules() if row_of(name) == "harness" != name]
    assert loose == [], "these modules of harness/ have no row in TABLE: add them where the arrow has them"


def test_imports_point_from_the_verbs_to_the_reference_and_never_back():
    def allowed(each: Import) -> bool:
        importer, imported = row_of(each.importer), row_of(each.imported)
        return importer == imported or ROWS.index(imported) < ROWS.index(importer)

    wrong = [each for each in imports() if ours(each.imported) and not allowed(each)]
    assert not wrong, told(wrong)


@pytest.mark.parametrize("row", [row for row in ROWS if ONLY[row] is not None])
def test_a_row_that_names_its_imports_imports_nothing_else_of_ours(row):
    allowed = {row, *(ONLY[row] or "").replace("nothing", "").split()}
    mine = [each for each in imports() if row_of(each.importer) == row and ours(each.imported)]
    wrong = [each for each in mine if row_of(each.imported) not in allowed]
    assert not wrong, told(wrong)


def test_runner_and_reference_share_only_the_spec():
    """Followed through everything that the judged side imports: no way leads from it to the law."""
    graph = {name: {each.imported for each in imports() if each.importer == name} for name in modules()}
    reached = {name for name in modules() if row_of(name) in ("harness.runner", "harness.systems")}
    waiting = list(reached)
    while waiting:
        new = {name for name in graph[waiting.pop()] if name in modules()} - reached
        reached |= new
        waiting += new
    assert {name for name in reached if name.startswith("reference")} <= {"reference", "reference.spec"}
    wrong = [
        each for each in imports() if each.importer.startswith("reference") and each.imported.startswith("harness")
    ]
    assert not wrong, told(wrong)


def test_the_reference_imports_torch_alone_and_its_spec_not_even_that():
    allowed = sys.stdlib_module_names | {"reference", "torch"}
    leaf = [each for each in imports() if each.importer.partition(".")[0] == "reference"]
    wrong = [each for each in leaf if each.imported.partition(".")[0] not in allowed]
    wrong += [each for each in leaf if each.importer == "reference.spec" and each.imported.startswith("torch")]
    assert not wrong, told(wrong)


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        name: {
            each.imported for each in imports() if each.importer == name and each.at_once and each.imported in modules()
        }
        for name in modules()
    }
    for name in modules():  # importing a.b imports a first
        package = name.rpartition(".")[0]
        if package and package not in graph[name] and name not in graph[package]:
            graph[name].add(package)
    try:
        tuple(TopologicalSorter({name: targets - {name} for name, targets in graph.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_every_module_begins_with_a_docstring():
    silent = [
        str(path.relative_to(ROOT)) for path in modules().values() if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_listing_models_never_imports_torch():
    """Nor do help and wrong arguments: they answer in a tenth of a second."""
    code = """
import contextlib, io, sys
from harness.cli import main
for line in ["--help", "--version", "check --help", "explain --help", "models", "models --json", "models mixtral step3p5",
             "", "chek", "check --tpp 2", "models nope", "check --model nope", "check --model mixtral --tp 5",
             "check mixtral@tp", "check --tokens x", "check --system nope", "check --system nope.py:build", "explain nope",
             "check --system transformers --model mixtral --tp 2"]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(line.split())
    loaded = {"torch", "transformers", "numpy"} & set(sys.modules)
    if loaded:
        sys.exit(f"moe-harness {line} imports {', '.join(sorted(loaded))}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
