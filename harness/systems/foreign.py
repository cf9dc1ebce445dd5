"""Anybody's own layer, from a file or a module: path/to/file.py:build, package.module:build, or an installed plugin.

The contract (README, "Bring your own layer"): build(spec, weights, comm) -> forward(hidden_states) -> hidden_states;
forward may carry output_unit and stages() (docs/instruments.md, "Stages"). Beside build, if not every case can be built,
supports(case) -> None | "reason"; and quant = ("int8",) if it can load experts that are stored so (`w13_scale` and
`w2_scale` are then among the weights).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.errors import CouldNotRun, UsageError
from harness.systems import OUR_OPTIONS, beyond

if TYPE_CHECKING:
    from torch import Tensor

    from harness.case import Case
    from harness.comm import Communicator
    from harness.systems import Layer
    from reference.spec import MoESpec, RouterPrecision

ENTRY_POINTS = "moe_harness.systems"


def installed(name: str) -> ForeignSystem | None:
    """The system that an installed package offers under this name in the entry-point group, or None."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
        return ForeignSystem(point.value, name)
    return None


def installed_names() -> list[str]:
    """All names that `installed` knows."""
    return sorted(importlib.metadata.entry_points(group=ENTRY_POINTS).names)


class ForeignSystem:
    """A layer that is not ours. Made without importing it; imported once, when first asked for something.

    target: "path/to/file.py:build" or "package.module:build".    name: what reports call it; the target by default.
    Raises UsageError if the target has another form, or if there is no such file or package.
    """

    foreign = True

    def __init__(self, target: str, name: str | None = None) -> None:
        self.name = name or target
        self._where, colon, self._attribute = target.rpartition(":")
        if not (colon and self._where and self._attribute.isidentifier()):
            raise UsageError(
                f"system {target!r}: expected a file or module, a colon and its build function. "
                f"Type path/to/file.py:build or package.module:build"
            )
        if _is_file(self._where):
            _check_file(target, Path(self._where))
            _check_function(target, Path(self._where))
        else:
            _check_module(target, self._where)
            source = _module_file(self._where)
            if source is not None:
                _check_function(target, source)
        self._module: ModuleType | None = None
        self._refused: CouldNotRun | None = None

    def supports(self, case: Case) -> str | None:
        """What the module's own supports(case) says; None without one. CouldNotRun if it cannot be asked."""
        known = getattr(self._loaded(), "quant", ()) if case.quant != "none" else ()
        options = [option for option in OUR_OPTIONS if option != "quant" or case.quant not in known]
        if reason := beyond(case, options, "a layer from outside"):
            return reason
        supports = getattr(self._loaded(), "supports", None)
        if supports is None:
            return None
        with self._blamed("supports(case)", supports):
            reason = supports(case)
        if reason is not None and not isinstance(reason, str):
            raise CouldNotRun(f"{self.name}: supports(case) returned {reason!r}, expected None or the reason as text")
        return reason

    def precision(self, spec: MoESpec) -> RouterPrecision:
        """The page's: who writes a layer of a model is expected to round where the model does."""
        return spec.routing.precision

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        """The module's build(spec, weights, comm). CouldNotRun if it is missing, raises, or returns no function."""
        build = self._function(self._loaded())
        with self._blamed(f"{self._attribute}(spec, weights, comm)", build):
            layer: Layer = build(case.spec, weights, comm)
        if not callable(layer):
            raise CouldNotRun(
                f"{self.name}: {self._attribute} returned {_kind(layer)}, "
                f"expected a function forward(hidden_states) -> hidden_states. Return the function itself"
            )
        return layer

    def load(self) -> None:
        """Import it, where that has a time limit of its own. CouldNotRun if that fails."""
        self._loaded()

    def _loaded(self) -> ModuleType:
        """The module; one that could not be imported is not tried again, for the second error would mislead."""
        if self._refused is not None:
            raise self._refused
        if self._module is None:
            try:
                with self._blamed("importing it", None):
                    self._module = _load_file(Path(self._where)) if _is_file(self._where) else _load(self._where)
            except CouldNotRun as error:
                self._refused = error
                raise
        return self._module

    def _function(self, module: ModuleType) -> Callable[..., Any]:
        found: Callable[..., Any] | None = getattr(module, self._attribute, None)
        if callable(found):
            return found
        if found is not None:
            raise CouldNotRun(f"{self.name}: {self._attribute} is {_kind(found)}, expected a function build")
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        functions = ", ".join(n for n in own if callable(getattr(module, n))) or "none"
        raise CouldNotRun(f"{self.name}: no {self._attribute} in {self._where}. Functions that it has: {functions}")

    @contextmanager
    def _blamed(self, doing: str, function: object) -> Iterator[None]:
        """Turns what the foreign code raises into CouldNotRun with the line of that code."""
        try:
            yield
        except (Exception, SystemExit) as error:
            where = _line(error, self._folder()) or _definition(function)
            told = f"{self.name}: {doing} raised {type(error).__name__}: {error}"
            raise CouldNotRun(f"{told} ({where})" if where else told) from error

    def _folder(self) -> Path:
        """The folder whose code is theirs."""
        if _is_file(self._where):
            return Path(self._where).resolve().parent
        top = importlib.machinery.PathFinder.find_spec(self._where.partition(".")[0], _search_path())
        return Path(top.origin or next(iter(top.submodule_search_locations or ["."]))).parent if top else Path.cwd()


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or os.sep in where


def _check_file(target: str, file: Path) -> None:
    if file.is_file() and file.suffix == ".py":
        return
    what = "is a folder" if file.is_dir() else "is no Python file" if file.exists() else "does not exist"
    folder = file if file.is_dir() else file.parent
    if not folder.is_dir():
        raise UsageError(f"system {target!r}: there is no folder {folder}. Type path/to/file.py:build")
    files = sorted(path.name for path in folder.glob("*.py"))
    near = difflib.get_close_matches(file.name, files, n=3) or files[:3]
    attribute = target.rpartition(":")[2]
    hint = (
        " or ".join(f"{folder / name}:{attribute}" for name in near)
        or f"path/to/file.py:build; {folder} has no .py file"
    )
    raise UsageError(f"system {target!r}: {file} {what}. Type {hint}")


def _check_module(target: str, module: str) -> None:
    top = module.partition(".")[0]
    if not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"system {target!r}: {module!r} is no module's name. Type package.module:build")
    if importlib.machinery.PathFinder.find_spec(top, _search_path()) is None:
        raise UsageError(
            f"system {target!r}: no package {top!r} is installed or in {Path.cwd()}. "
            f"Install it, or type path/to/file.py:build"
        )


def _module_file(module: str) -> Path | None:
    """The source of a module, found without importing its package; None if it is not a plain file."""
    top, *rest = module.split(".")
    spec = importlib.machinery.PathFinder.find_spec(top, _search_path())
    if spec is None or not rest:
        return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
    for folder in spec.submodule_search_locations or []:
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _check_function(target: str, file: Path) -> None:
    """Refuse a function that the source plainly does not have; what only importing can tell is left to the import."""
    where, _, wanted = target.rpartition(":")
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    bound = _bound_names(tree.body)
    if wanted in bound or "*" in bound or "__getattr__" in bound:
        return
    functions = [name for name, is_function in bound.items() if is_function]
    near = difflib.get_close_matches(wanted, functions, n=1) or functions[:1]
    hint = (
        f"Functions that it has: {', '.join(functions)}. Type {where}:{near[0]}" if near else "It defines no function"
    )
    raise UsageError(f"system {target!r}: no {wanted} in {where}. {hint}")


def _bound_names(body: Sequence[ast.stmt]) -> dict[str, bool]:
    """Names that the statements of a module bind, and whether each is a function or class of its own."""
    bound: dict[str, bool] = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound[statement.name] = True
            continue
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).partition(".")[0]: False for alias in statement.names}
            continue
        for inner in ("body", "orelse", "finalbody"):
            bound |= _bound_names(getattr(statement, inner, []))
        for handler in getattr(statement, "handlers", []):
            bound |= _bound_names(handler.body)
        if not hasattr(statement, "body"):
            nodes = ast.walk(statement)
            bound |= {n.id: False for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return bound


def _search_path() -> list[str]:
    """As `python -m` has it: the command moe-harness starts without the current folder."""
    return [str(Path.cwd()), *sys.path]


_FOLDERS: set[Path] = set()


def _load_file(file: Path) -> ModuleType:
    """Runs the file as a module of its own, with its folder first on the path; later imports find the folder last."""
    file = file.resolve()
    _forget_namesakes(file.parent)
    name = f"foreign:{file}"  # no import statement can mean it, so my_layer.py and torch.py are both safe
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None  # for the suffix is .py
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _first_on_path(file.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load(module: str) -> ModuleType:
    with _first_on_path(Path.cwd()):
        return importlib.import_module(module)


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _forget_namesakes(folder: Path) -> None:
    """Two versions of a layer, each beside its own kernels.py: the second must not get the first one's kernels."""
    own = {entry.stem for entry in folder.iterdir()}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in own and file and (_FOLDERS - {folder}) & set(Path(file).parents):
            del sys.modules[name]
    _FOLDERS.add(folder)


def _line(error: BaseException, folder: Path) -> str | None:
    """file:line of the innermost frame in the folder; a SyntaxError carries its own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if folder in Path(frame.filename).parents and "site-packages" not in frame.filename[len(str(folder)) :]:
            return f"{frame.filename}:{frame.lineno}"
    return None


def _definition(function: object) -> str | None:
    """Where a function begins, for a call that failed before its first line."""
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else None


def _kind(value: object) -> str:
    """'None', 'a dict', 'an int'."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
