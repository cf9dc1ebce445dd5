"""A case: everything that a run depends on, as one line of text and back.

    deepseek_v3@tp4.ep1.dp1.sp1.bf16.tokens7.seed42+scale=output.kernel=reduced.order=2

Fields at their default are left out: `mixtral` is mixtral@tp1.ep1.dp1.sp1.fp32.tokens7.seed0 at twin size.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from harness import models
from harness.errors import UsageError
from harness.labels.columns import Labels, labels
from harness.labels.plan import visits
from reference.spec import MoESpec, weight_shapes

DTYPES = ("fp32", "bf16", "fp16")
MAX_TOKENS = 65536
MAX_WEIGHTS = 50_000_000

# Each option, its values (the first is the default) and what it changes; the one list that parsing, help and docs read.
KERNELS = ("partial", "reduced", "deepep_ht", "deepep_ll", "nvlink_one_sided", "nvlink_two_sided")
OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "size": (("twin", "wide", "real", "labels"), "which layer of the model's page; labels: the twin whose experts each own a "
             "column, with tokens of its own"),
    "s": (("twin", "real"), "routed_scaling_factor: the twin's own or the checkpoint's"),
    "quant": (("none", "int8"), "how the routed experts are stored: in the dtype, or as int8 with a float32 scale for each "
              "output channel"),
    "calls": (("one", "many", "every"), "one: the call that is judged; many: the script of calls that shows state and "
              "hazards, with tokens of its own; every: the same with every M from 0 to 130"),
    "scale": (("page", "router", "kernel", "output"), "who multiplies by s: the page's placement or another"),
    "kernel": (KERNELS, "how tokens reach their experts and results come home: partial leaves the sum over tp to the runner, "
               "the others return it complete"),
    "experts": (("auto", "slots", "batched", "monolithic"), "who weighs and adds the K results: the experts themselves, the "
                "finalize slot by slot, the finalize of a batch by expert; monolithic routes inside the kernel as well"),
    "placement": (("linear", "round_robin", "permuted", "replicas", "moved"), "which rank holds which expert; replicas: "
                  "some twice; moved: placed anew between two calls"),
    "shared": (("separate", "fused"), "shared experts as an MLP of their own, or as more slots of the routed kernel"),
    "order": (("auto", "1", "2", "3"), "shared experts: 1 before the kernel, 2 in its finalize, 3 after it; auto: as the "
              "kernel allows"),
    "pad": (("0", "8"), "zero columns that the kernel's width has beyond the layer's"),
    "junk": (("0", "3"), "rows of NaN beyond the last token, which no expert may see"),
    "batches": (("1", "2"), "micro-batches in flight at the same time"),
    "swap": (("none", *KERNELS), "the kernel of a first call, before the one that is judged"),
    "reduce": (("layer", "caller"), "who makes the final all-reduce"),
    "backend": (("model", "transformers"), "legacy only: the model's own file or the wrapped transformers block"),
}  # fmt: skip
MAX_RANKS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Parallel sizes, each a number of ranks; tp * dp of them in all, dp outermost: rank = dp rank * tp + tp rank.

    tp: shares attention and shared experts.    dp: groups of tp ranks with tokens of their own.
    ep: of all ranks, how many hold whole experts of their own: 1 cuts every expert over all of them, tp * dp cuts none.
        In between, experts go to ep groups of neighbours, and the moe_tp ranks of a group cut theirs among them: rank =
        ep rank * moe_tp + moe_tp rank. vLLM knows only both ends, SGLang has the same rule in between.
    sp: 1, or tp: the tp ranks then take different rows of their tokens through the layer.
    Raises UsageError for a grid that cannot be.
    """

    tp: int = 1
    ep: int = 1
    dp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name}={value}: expected 1 or more")
        if self.ranks > MAX_RANKS:
            raise UsageError(f"tp={self.tp} and dp={self.dp} are {self.ranks} ranks: expected at most {MAX_RANKS}")
        if self.ranks % self.ep:
            fit = [n for n in range(1, self.ranks + 1) if self.ranks % n == 0]
            raise UsageError(
                f"ep={self.ep}: expected a divisor of tp*dp={self.ranks}, the ranks that hold experts. "
                f"Type one of ep {', '.join(map(str, fit))}"
            )
        if self.sp not in (1, self.tp):
            raise UsageError(
                f"sp={self.sp}: sequence parallelism splits the rows over the tp ranks, so sp is 1 or tp={self.tp}. "
                f"Type sp1 or sp{self.tp}"
            )
        if self.sp > 1 and self.ep != self.ranks:
            raise UsageError(
                f"sp={self.sp} with ep={self.ep}: under sequence parallelism each rank's rows need whole experts, on all "
                f"{self.ranks} ranks. Type ep{self.ranks}, or leave sp out"
            )

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    @property
    def moe_tp(self) -> int:
        """How many ranks cut an expert among them."""
        return self.ranks // self.ep

    @property
    def shared_tp(self) -> int:
        """How many ranks cut the shared experts among them: tp, but every rank holds them whole under sequence parallelism."""
        return 1 if self.sp > 1 else self.tp

    def __str__(self) -> str:
        """'tp2.ep4.dp2': the sizes that are not 1, 'tp1' if all are."""
        return ".".join(f"{n}{getattr(self, n)}" for n in SIZES if getattr(self, n) != 1) or "tp1"


SIZES = ("tp", "ep", "dp", "sp")


@functools.cache
def groups_of(grid: Grid) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Name -> the global ranks of each group: "tp", "ep" and "dp" meet in collectives, "moe.tp" cut an expert among them."""
    tp, moe_tp, ranks = grid.tp, grid.moe_tp, grid.ranks
    return {
        "tp": tuple(tuple(range(first, first + tp)) for first in range(0, ranks, tp)),
        "ep": tuple(tuple(range(piece, ranks, moe_tp)) for piece in range(moe_tp)),
        "dp": tuple(tuple(range(column, ranks, tp)) for column in range(tp)),
        "moe.tp": tuple(tuple(range(first, first + moe_tp)) for first in range(0, ranks, moe_tp)),
    }


def parse_grid(text: str) -> Grid:
    """The grid that 'tp2.ep4.dp2.sp1' names; sizes left out are 1. UsageError says what is malformed."""
    sizes: dict[str, int] = {}
    for part in text.split("."):
        number = re.fullmatch(r"(tp|ep|dp|sp)([0-9]{1,9})", part)
        if number is None:
            raise UsageError(
                f"grid {text!r}: cannot read {part!r}. Expected sizes joined by dots, as in tp2.ep4.dp2.sp1"
            )
        if number[1] in sizes:
            raise UsageError(f"grid {text!r}: {number[1]} is given twice")
        sizes[number[1]] = int(number[2])
    try:
        return Grid(**sizes)
    except UsageError as error:
        raise UsageError(f"grid {text!r}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One layer of one model on one grid with one set of tokens. Raises UsageError if no such layer can exist.

    tokens: M, of all data-parallel ranks together.    split: each one's number of them; None: as even as it goes.
    """

    model: str
    grid: Grid = Grid()
    dtype: str = "fp32"
    tokens: int = 7
    seed: int = 0
    size: str = "twin"
    s: str = "twin"
    quant: str = "none"
    calls: str = "one"
    scale: str = "page"
    split: tuple[int, ...] | None = None
    kernel: str = "partial"
    experts: str = "auto"
    placement: str = "linear"
    shared: str = "separate"
    order: str = "auto"
    pad: str = "0"
    junk: str = "0"
    batches: str = "1"
    swap: str = "none"
    reduce: str = "layer"
    backend: str = "model"

    def __post_init__(self) -> None:
        page = models.load(self.model)
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if not 0 <= self.tokens <= MAX_TOKENS:
            raise UsageError(f"tokens={self.tokens}: expected 0 to {MAX_TOKENS}")
        if self.size == "labels" and self.quant != "none":
            raise UsageError(
                f"size=labels with quant={self.quant}: labels are exact, quantised weights are not. Leave one out"
            )
        if self.size == "labels":  # its tokens are planned, and there is nothing random about it
            object.__setattr__(self, "tokens", _labelled_tokens(self.model) * self.grid.dp)
            object.__setattr__(self, "split", None)
            object.__setattr__(self, "seed", 0)
        if self.calls != "one":
            if self.size == "labels":
                raise UsageError(f"size=labels with calls={self.calls}: labels are read from one call. Leave one out")
            object.__setattr__(self, "tokens", _DEFAULT["tokens"])
            object.__setattr__(self, "split", None)
        if self.split is not None:
            _check_split(self.split, self.tokens, self.grid.dp)
            if self.split == _even(self.tokens, self.grid.dp):
                object.__setattr__(self, "split", None)  # one spelling for one case
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed={self.seed}: expected 0 to 2**64 - 1, the keys of Philox")
        for name, (values, _) in OPTIONS.items():
            if getattr(self, name) not in values:
                raise UsageError(f"{name}={getattr(self, name)}: expected one of {', '.join(values)}")
        if self.size == "wide" and page.wide is None:
            raise UsageError(f"{self.model} has no wide twin. Models that have one: {', '.join(_with_wide())}")
        if self.s == "real" and page.real.routing.routed_scaling_factor is None:
            raise UsageError(f"s=real: {self.model} has no routed_scaling_factor. Leave s out")
        _check_widths(self.model, self.grid, self.spec)

    @property
    def spec(self) -> MoESpec:
        """The layer to be computed."""
        return _spec(self.model, self.size, self.s) if self.size != "labels" else self.labels.spec

    @property
    def labels(self) -> Labels:
        """Whose column is whose, for a case with size=labels."""
        return _labels(self.model, self.s, self.grid.ranks)

    @property
    def rows(self) -> tuple[slice, ...]:
        """Which tokens each rank gets: those of its data-parallel rank, the same for all tp ranks of it."""
        return _rows(self.grid, self.tokens, self.split)

    @property
    def scaled_by(self) -> str:
        """Who multiplies by s: "router", "kernel" or "output"."""
        if self.scale != "page":
            return self.scale
        return "output" if models.load(self.model).apply_routed_scale_to_output else "router"

    def __str__(self) -> str:
        default = _DEFAULT
        parts = [f"{n}{getattr(self.grid, n)}" for n in SIZES if getattr(self.grid, n) != 1]
        parts += [self.dtype] if self.dtype != default["dtype"] else []
        if self.split is not None:
            parts.append(f"tokens{'_'.join(map(str, self.split))}")
        elif self.tokens != default["tokens"] and self.size != "labels":
            parts.append(f"tokens{self.tokens}")
        parts += [f"seed{self.seed}"] if self.seed != default["seed"] else []
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
        each = re.fullmatch(r"tokens([0-9]{1,9}(?:_[0-9]{1,9})+)", part)
        if part in DTYPES:
            _put(found, "dtype", part, text)
        elif each:
            split = tuple(map(int, each[1].split("_")))
            _put(found, "tokens", sum(split), text)
            found["split"] = split
        elif number and number[1] in ("tokens", "seed"):
            _put(found, number[1], int(number[2]), text)
        elif number:
            _put(sizes, number[1], int(number[2]), text)
        else:
            raise UsageError(
                f"case {text!r}: cannot read the part {part!r} after '@'. "
                f"Expected tpN, epN, dpN, spN, tokensN, tokensN_N for each data-parallel rank, seedN or {', '.join(DTYPES)}, joined by dots"
            )
    for part in tail.split(".") if plus else []:
        name, equals, value = part.partition("=")
        if not equals or name not in OPTIONS:
            raise UsageError(
                f"case {text!r}: cannot read the part {part!r} after '+'. Expected NAME=VALUE with {', '.join(OPTIONS)}"
            )
        _put(found, name, value, text)
    return Case(model=model, grid=Grid(**sizes), **found)


@functools.cache
def _labels(model: str, s: str, ranks: int) -> Labels:
    return labels(_spec(model, "twin", s), ranks)


@functools.cache
def _labelled_tokens(model: str) -> int:
    """Of each data-parallel rank."""
    twin = models.load(model).twin
    branches = (twin.routing,) if twin.vision is None else (twin.routing, twin.vision.routing)
    return sum(len(visits(routing)) for routing in branches)


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


def _check_widths(model: str, grid: Grid, spec: MoESpec) -> None:
    """Refuse a grid that would cut a width into unequal pieces."""
    for name, width in spec.tp_widths().items():
        cuts = {"tp": grid.shared_tp} if name.startswith("shared") else {"tp": grid.tp}
        if grid.dp > 1 or grid.ep > 1:
            cuts = {"tp": grid.shared_tp} if name.startswith("shared") else {"tp*dp/ep": grid.moe_tp}
        for what, cut in cuts.items():
            if width % cut == 0:
                continue
            fit = [n for n in range(1, 9) if all(w % n == 0 for w in spec.tp_widths().values())]
            remedy = f"tp up to 8 that do: {', '.join(map(str, fit))}"
            if what != "tp":
                remedy += f"; or whole experts: ep{grid.ranks}"
            raise UsageError(f"{what}={cut} does not divide {model}'s {name} {width}. {remedy}")


def _even(tokens: int, dp: int) -> tuple[int, ...]:
    """The tokens dealt out, the first ranks get one more."""
    base, rest = divmod(tokens, dp)
    return tuple(base + (d < rest) for d in range(dp))


def _check_split(split: tuple[int, ...], tokens: int, dp: int) -> None:
    text = f"tokens{'_'.join(map(str, split))}"
    if len(split) != dp:
        raise UsageError(
            f"{text}: expected one number for each of the dp={dp} data-parallel ranks. Type tokens{'_'.join(['7'] * dp)}"
        )
    if min(split) < 0 or sum(split) != tokens:
        raise UsageError(f"{text}: expected {dp} numbers of 0 or more that add up to tokens={tokens}")


@functools.lru_cache(maxsize=4096)
def _rows(grid: Grid, tokens: int, split: tuple[int, ...] | None) -> tuple[slice, ...]:
    starts = list(itertools.accumulate(split or _even(tokens, grid.dp), initial=0))
    return tuple(slice(starts[d], starts[d + 1]) for d in range(grid.dp) for _ in range(grid.tp))


def _with_wide() -> list[str]:
    return [name for name in models.names() if models.load(name).wide is not None]
