"""A case: everything that a run depends on, as one line of text and back.

    deepseek_v3@tp4.ep1.dp1.sp1.bf16.tokens7.seed42+scale=output.kernel=reduced.order=2

Fields at their default are left out: `mixtral` is mixtral@tp1.ep1.dp1.sp1.fp32.tokens7.seed0 at twin size.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from harness import models
from harness.errors import UsageError
from reference.spec import MoESpec, weight_shapes

DTYPES = ("fp32", "bf16", "fp16")
MAX_TOKENS = 65536
MAX_WEIGHTS = 50_000_000

# Each option, its values (the first is the default) and what it changes; the one list that parsing, help and docs read.
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "size": (("twin", "wide", "real"), "which layer of the model's page"),
    "s": (("twin", "real"), "routed_scaling_factor: the twin's own or the checkpoint's"),
    "scale": (("page", "router", "kernel", "output"), "who multiplies by s: the page's placement or another"),
    "kernel": (("partial", "reduced"), "whether the kernel returns its rank's partial sum or the sum of all ranks"),
    "order": (("1", "2", "3"), "shared experts: 1 before the kernel, 2 in its finalize, 3 after it"),
    "pad": (("0", "8"), "zero columns that the kernel's width has beyond the layer's"),
    "backend": (("model", "transformers"), "legacy only: the model's own file or the wrapped transformers block"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Parallel sizes, each a number of ranks. Today tensor parallelism is simulated; the others are 1."""

    tp: int = 1
    ep: int = 1
    dp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "ep", "dp", "sp"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name}={value}: expected 1 or more")
        for name in ("ep", "dp", "sp"):
            value = getattr(self, name)
            if value > 1:
                raise UsageError(
                    f"{name}={value}: {_LONG[name]} parallelism is not simulated yet, only tensor parallelism is. "
                    f"Leave {name} out, or type --tp {value}"
                )

    @property
    def ranks(self) -> int:
        return self.tp * self.dp


_LONG = {"ep": "expert", "dp": "data", "sp": "sequence"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One layer of one model on one grid with one set of tokens. Raises UsageError if no such layer can exist."""

    model: str
    grid: Grid = Grid()
    dtype: str = "fp32"
    tokens: int = 7
    seed: int = 0
    size: str = "twin"
    s: str = "twin"
    scale: str = "page"
    kernel: str = "partial"
    order: str = "1"
    pad: str = "0"
    backend: str = "model"

    def __post_init__(self) -> None:
        page = models.load(self.model)
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if not 0 <= self.tokens <= MAX_TOKENS:
            raise UsageError(f"tokens={self.tokens}: expected 0 to {MAX_TOKENS}")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed={self.seed}: expected 0 to 2**64 - 1, the keys of Philox")
        for name, (values, _) in OPTIONS.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{name}={getattr(self, name)}: expected one of {', '.join(values)}")
        if self.size == "wide" and page.wide is None:
            raise UsageError(f"{self.model} has no wide twin. Models that have one: {', '.join(_with_wide())}")
        if self.s == "real" and page.real.routing.routed_scaling_factor is None:
            raise UsageError(f"s=real: {self.model} has no routed_scaling_factor. Leave s out")
        _check_tp(self.model, self.grid.tp, self.spec)

    @property
    def spec(self) -> MoESpec:
        """The layer to be computed."""
        return _spec(self.model, self.size, self.s)

    @property
    def scaled_by(self) -> str:
        """Who multiplies by s: "router", "kernel" or "output"."""
        if self.scale != "page":
            return self.scale
        return "output" if models.load(self.model).apply_routed_scale_to_output else "router"

    def __str__(self) -> str:
        default = _DEFAULT
        parts = [f"{n}{getattr(self.grid, n)}" for n in ("tp", "ep", "dp", "sp") if getattr(self.grid, n) != 1]
        parts += [self.dtype] if self.dtype != default["dtype"] else []
        parts += [f"{n}{getattr(self, n)}" for n in ("tokens", "seed") if getattr(self, n) != default[n]]
        options = [f"{n}={getattr(self, n)}" for n in OPTIONS if getattr(self, n) != default[n]]
        text = self.model + (f"@{'.'.join(parts)}" if parts else "")
        return text + (f"+{'.'.join(options)}" if options else "")


_DEFAULT: dict[str, object] = {f.name: f.default for f in fields(Case)}


def check_affordable(case: Case) -> None:
    """UsageError if the layer's weights are too many to be made at once; real sizes need them one expert at a time."""
    numbers = sum(math.prod(shape) for shape in weight_shapes(case.spec).values())
    if numbers > MAX_WEIGHTS:
        wide = ", or type size=wide for real E and K" if models.load(case.model).wide else ""
        raise UsageError(
            f"case {str(case)!r}: its {numbers / 1e9:.1f} billion weights are more than the {MAX_WEIGHTS / 1e6:.0f} million "
            f"that are made at once. Leave size out for the twin{wide}"
        )


def parse(text: str) -> Case:
    """The case that a text names. UsageError says which part of it is malformed and what is expected there."""
    head, plus, tail = text.partition("+")
    model, at, middle = head.partition("@")
    if not model:
        raise UsageError(
            f"case {text!r}: it starts with a model, as in mixtral@tp2.bf16.tokens7. See moe-harness models"
        )
    found: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    for part in middle.split(".") if at else []:
        number = re.fullmatch(r"(tp|ep|dp|sp|tokens|seed)([0-9]{1,20})", part)
        if part in DTYPES:
            _put(found, "dtype", part, text)
        elif number and number[1] in ("tokens", "seed"):
            _put(found, number[1], int(number[2]), text)
        elif number:
            _put(sizes, number[1], int(number[2]), text)
        else:
            raise UsageError(
                f"case {text!r}: cannot read the part {part!r} after '@'. "
                f"Expected tpN, epN, dpN, spN, tokensN, seedN or {', '.join(DTYPES)}, joined by dots"
            )
    for part in tail.split(".") if plus else []:
        name, equals, value = part.partition("=")
        if not equals or name not in OPTIONS:
            raise UsageError(
                f"case {text!r}: cannot read the part {part!r} after '+'. Expected NAME=VALUE with {', '.join(OPTIONS)}"
            )
        _put(found, name, value, text)
    return Case(model=model, grid=Grid(**sizes), **found)


def _put(found: dict[str, Any], name: str, value: object, text: str) -> None:
    if name in found:
        raise UsageError(f"case {text!r}: {name} is given twice")
    found[name] = value


@functools.cache
def _spec(model: str, size: str, s: str) -> MoESpec:
    page = models.load(model)
    spec = {"twin": page.twin, "wide": page.wide, "real": page.real}[size]
    assert spec is not None  # Case refuses a size that the page lacks
    if s == "twin" or size == "real":
        return spec
    return replace(
        spec,
        routing=replace(spec.routing, routed_scaling_factor=page.real.routing.routed_scaling_factor),
        vision=spec.vision
        and replace(
            spec.vision,
            routing=replace(spec.vision.routing, routed_scaling_factor=page.real.routing.routed_scaling_factor),
        ),
    )


def _check_tp(model: str, tp: int, spec: MoESpec) -> None:
    for name, width in spec.tp_widths().items():
        if width % tp:
            fit = [n for n in range(1, 9) if all(w % n == 0 for w in spec.tp_widths().values())]
            raise UsageError(
                f"tp={tp} does not divide {model}'s {name} {width}. tp up to 8 that do: {', '.join(map(str, fit))}"
            )


def _with_wide() -> list[str]:
    return [name for name in models.names() if models.load(name).wide is not None]
