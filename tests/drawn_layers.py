"""Layers on grids as Hypothesis draws them: any model, grid, kernel, experts, placement, moments, tokens of each dp rank.

What the runner refuses is drawn again. The draws follow its plainest rules, so that this happens to a fifth of them.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from harness import models
from harness.case import KERNELS, OPTIONS, Case, Grid
from harness.errors import UsageError
from harness.systems.runner import RunnerSystem
from reference.spec import MoESpec

RUNNER = RunnerSystem()
DTYPES = ("fp32", "bf16", "fp16")
GRIDS = tuple(
    Grid(tp=tp, ep=ep, dp=dp, sp=sp)
    for tp, dp in ((1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 3), (2, 3), (1, 4), (2, 4))
    for ep in range(1, tp * dp + 1)
    if tp * dp % ep == 0
    for sp in sorted({1, tp} if ep == tp * dp else {1})
)
DEEPSEEK = models.load("deepseek_v3").twin
# identity experts beside routed and shared ones: no page has all three
ZERO_EXPERTS = replace(
    DEEPSEEK,
    routing=replace(
        DEEPSEEK.routing, num_zero_experts=4, n_group=1, topk_group=1, scoring_func="softmax", renormalize=False, top_k=6
    ),
)  # fmt: skip


class ZeroExpertCase(Case):
    """A case of a layer that no page has."""

    @property
    def spec(self) -> MoESpec:
        return ZERO_EXPERTS


NAMES = (*models.names(), "zero experts")


def case_of(name: str, **fields: object) -> Case:
    """A case by the name of its layer."""
    return ZeroExpertCase(model="deepseek_v3", **fields) if name == "zero experts" else Case(model=name, **fields)  # type: ignore[arg-type]


def fits(name: str, grid: Grid) -> bool:
    """Whether the grid cuts every width of the layer evenly."""
    try:
        case_of(name, grid=grid)
    except UsageError:
        return False
    return True


FITTING = {name: tuple(grid for grid in GRIDS if fits(name, grid)) for name in NAMES}


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    """A case of that layer which the runner has; a dp rank may have no tokens at all."""
    grid = draw(st.sampled_from(FITTING[name]))
    counts = st.one_of(st.sampled_from((0, 1, 2, 3)), st.integers(9, 24))
    split = tuple(draw(counts) for _ in range(grid.dp))
    plain = case_of(name, grid=grid, tokens=sum(split), split=split)
    spec, ranks = plain.spec, grid.ranks
    kernels = KERNELS if grid.ep == ranks > 1 else ("partial", "reduced")
    kernel = draw(st.sampled_from(kernels))
    experts = {"partial": OPTIONS["experts"][0], "reduced": OPTIONS["experts"][0], "deepep_ll": ("auto", "batched")}
    zero, one_router = spec.routing.num_zero_experts > 0, spec.vision is None
    fused = spec.shared is not None and grid.ep == 1 and not zero and one_router

    def option(option: str, where: bool) -> str:
        values, _ = OPTIONS[option]
        return draw(st.sampled_from(values)) if where else values[0]

    case = replace(
        plain,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2)),
        kernel=kernel,
        experts=draw(st.sampled_from(experts.get(kernel, ("auto", "slots")))),
        scale="router" if zero else option("scale", spec.routing.routed_scaling_factor is not None),
        placement=option("placement", grid.ep > 1),
        shared=option("shared", fused),
        pad=option("pad", True),
        junk=option("junk", grid.sp == 1),
        swap=draw(st.one_of(st.just("none"), st.sampled_from(kernels))) if one_router else "none",
    )
    case = replace(case, order=option("order", spec.shared is not None and case.shared == "separate"))
    case = replace(case, batches=option("batches", grid.sp == 1 and case.junk == "0" and one_router))
    case = replace(case, reduce=option("reduce", kernel == "partial" and grid.sp == 1 and not zero))
    assume(RUNNER.supports(case) is None)
    return case
