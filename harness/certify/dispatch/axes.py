"""The states: how a layer is built, and how it is called. What is legal, the layer says.

E experts, K of them for each row.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, cast

from harness.case import KERNELS, parse_grid
from harness.certify import states
from harness.runner.layer import Kernel, LayerSettings, check_settings
from harness.runner.placement import Placement, physical, replicated, round_robin
from reference.spec import Activation, Experts, MoESpec, Output, RouterPrecision, Routing, Shared

JUNK = 2  # rows of nobody behind those of each rank


class Layer(NamedTuple):
    """Each by its word in LAYER_AXES. beside: what enters beside the routed experts: nothing, shared experts as a module
    or as slots of the kernel, zero experts.    placement: "moved" is linear in a first call, then another one.
    """

    grid: str
    experts: str
    beside: str
    placement: str


class Call(NamedTuple):
    """history: as of the other space.    rows: "junk" has rows of padding behind the tokens."""

    kernel: str
    history: str
    rows: str


State = tuple[Layer, Call]
LAYER_AXES: dict[str, tuple[str, ...]] = {
    "grid": states.LAYER_AXES["grid"],
    "experts": ("auto", "slots", "batched", "monolithic"),
    "beside": ("none", "shared", "fused", "zero"),
    "placement": ("linear", "round_robin", "permuted", "replicas", "moved"),
}
CALL_AXES: dict[str, tuple[str, ...]] = {
    "kernel": KERNELS,
    "history": states.CALL_AXES["history"],
    "rows": ("whole", "junk"),
}
# states of the whole product; a kernel swapped for itself is none
PRODUCT = math.prod(map(len, LAYER_AXES.values())) * len(KERNELS) * 2 * len(KERNELS) * len(CALL_AXES["rows"])


def told(state: State) -> str:
    """'dispatch tp2.ep4.dp2 experts=auto ... rows=junk': every axis by name."""
    layer, call = state
    named = {**layer._asdict(), **call._asdict()}
    return " ".join(["dispatch", named.pop("grid"), *(f"{name}={value}" for name, value in named.items())])


@functools.cache
def code_of(part: Layer | Call) -> int:
    """The place of a layer or a call in the product of its axes."""
    return states.code(part, LAYER_AXES if isinstance(part, Layer) else CALL_AXES)


def state_at(layer: int, call: int) -> State:
    return Layer(*states.words(layer, LAYER_AXES)), Call(*states.words(call, CALL_AXES))


def layers_of(grid: str) -> Iterator[tuple[Layer, tuple[str, ...]]]:
    """Every layer of a grid that some kernel may serve, and those kernels."""
    _, *asked = LAYER_AXES.values()
    for words in itertools.product(*asked):
        layer = Layer(grid, *words)
        kernels = tuple(kernel for kernel in KERNELS if refusal(layer, kernel) is None)
        if kernels:
            yield layer, kernels


def calls_of(layer: Layer, kernels: tuple[str, ...]) -> Iterator[Call]:
    """Every call of a layer that these kernels may serve."""
    for kernel in kernels:
        for history in states.histories(kernel, kernels):
            for rows in rows_of(layer, history):
                yield Call(kernel, history, rows)


def rows_of(layer: Layer, history: str) -> tuple[str, ...]:
    """Rows are marked as junk for the router of a whole call: sequence parallelism and a kernel that routes pass it by."""
    return _rows_of(layer.grid, layer.experts, history)


@functools.cache
def _rows_of(grid: str, experts: str, history: str) -> tuple[str, ...]:
    marked = experts != "monolithic" and parse_grid(grid).sp == 1 and states.batches_of(history) == 1
    return CALL_AXES["rows"] if marked else ("whole",)


def refusal(layer: Layer, kernel: str) -> str | None:
    """Why no such layer may be built or placed anew, in the layer's own words."""
    if layer.placement == "moved" and parse_grid(layer.grid).ep == 1:
        return "placement=moved: every rank holds a piece of all experts"
    if layer.experts in ("slots", "batched") and not _asked(layer, kernel):
        return "the same as with experts=auto, which is asked"
    try:
        for later in (False, True):
            check_settings(spec_of(layer), settings_of(layer, kernel, later), states.parallel_of(layer.grid))
    except ValueError as error:
        return str(error)
    return None


def _asked(layer: Layer, kernel: str) -> bool:
    """Of experts that leave the weighing to the finalize. Not asked are: shared experts as a module, which meets the kernel
    in when it runs and never its rows; zero experts beside other ranks, whose slots are -1 behind a dispatch, as those of
    every expert on another rank are; and batched ones behind deepep_ll, since "auto" is that.
    """
    apart = layer.beside == "shared" or (layer.beside == "zero" and parse_grid(layer.grid).ep > 1)
    return not apart and (layer.experts, kernel) != ("batched", "deepep_ll")


@functools.cache
def settings_of(layer: Layer, kernel: str, later: bool = False) -> LayerSettings:
    """later: behind the call after which experts are moved."""
    return LayerSettings(
        apply_routed_scale_to_output=False,
        kernel=cast(Kernel, kernel),
        experts=layer.experts,  # type: ignore[arg-type]  # LAYER_AXES lists the same words
        placement=moved(layer.grid) if later and layer.placement == "moved" else _placement(layer),
        fuse_shared_experts=layer.beside == "fused",
        sequence_parallel=parse_grid(layer.grid).sp > 1,
    )


def _placement(layer: Layer) -> Placement | None:
    """When it is built; None for linear, which is the layer's own."""
    count, ep = experts_of(layer.grid), parse_grid(layer.grid).ep
    match layer.placement:
        case "round_robin":
            return round_robin(count, ep)
        case "permuted":
            return physical(_order(count), count, ep)
        case "replicas":
            return replicated(count, ep, ep)
        case _:
            return None


@functools.cache
def moved(grid: str) -> Placement:
    """Another order, and one expert more for each rank, so that half of them are held twice."""
    count, ep = experts_of(grid), parse_grid(grid).ep
    order = _order(count)
    return physical((*order[::-1], *order[:ep]), count, ep)


def _order(count: int) -> tuple[int, ...]:
    """Odd numbers first: every rank gets experts of others, and no stride is the same."""
    return tuple(sorted(range(count), key=lambda e: (e % 2 == 0, (3 * e) % 8, e)))


def experts_of(grid: str) -> int:
    """E: two on each rank."""
    return 2 * parse_grid(grid).ep


def chosen_of(grid: str) -> int:
    """K, so many that four different choices meet every expert."""
    return max(2, experts_of(grid) // 4)


_SQUARE = Activation(kind="relu2", gated=False, clamp="none", limit=None, alpha=1.0, up_offset=0.0)


def spec_of(layer: Layer) -> MoESpec:
    return _spec(layer.grid, layer.beside)


@functools.cache
def _spec(grid: str, beside: str) -> MoESpec:
    sizes, count, zeros = parse_grid(grid), experts_of(grid), int(beside == "zero")
    return MoESpec(
        hidden_size=1 + count * sizes.moe_tp + sizes.ranks,
        routing=Routing(
            num_experts=count, top_k=chosen_of(grid) + zeros, scoring_func="sigmoid", score_after_topk=False,
            correction_bias=True, n_group=1, topk_group=1, group_score="max", group_fill=-math.inf, renormalize=False,
            renormalize_rule="add", renormalize_epsilon=0.0, routed_scaling_factor=None, per_expert_scale=False,
            router_bias=False, router_norm_epsilon=None, sparsemixer_epsilon=None, weight_on="output",
            num_zero_experts=zeros, precision=RouterPrecision(logits="fp32", scores="fp32", weights="fp32"),
        ),
        experts=Experts(
            intermediate_size=sizes.moe_tp, activation=_SQUARE, bias=False, layout="halved", transposed=False,
            latent_size=None, latent_bias=False,
        ),
        shared=None if beside in ("none", "zero") else Shared(
            n_shared_experts=1, intermediate_size=sizes.ranks, activation=_SQUARE, bias=False, sigmoid_gate=False
        ),
        output=Output(combine="sum"),
        vision=None,
    )  # fmt: skip
