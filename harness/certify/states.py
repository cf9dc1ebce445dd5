"""Every state of the runner: how a layer is built, and how it is called. Axes as data; what is legal, the layer says.

A state is a layer and a call. Nothing here is drawn: `layers_of(grid)` goes through the whole product of the axes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, cast

from harness.case import KERNELS, Grid, parse_grid
from harness.runner.layer import Kernel, LayerSettings, check_settings
from harness.runner.parallel import FusedMoEParallelConfig
from harness.runner.router import make_router
from reference.spec import Activation, Experts, MoESpec, Output, RouterPrecision, Routing, Shared

S = 2.5  # exact in binary, and apart from tp, its own square, its inverse and their products
RANKS = (1, 2, 3, 4, 8)
PAD = 8


def _grids() -> Iterator[Grid]:
    """Every tp, dp and ep, each with sequence parallelism where that can be."""
    for ranks in RANKS:
        sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
        for tp, ep in itertools.product(sizes, sizes):
            yield Grid(tp=tp, ep=ep, dp=ranks // tp)
            if tp > 1 and ep == ranks:
                yield Grid(tp=tp, ep=ep, dp=ranks // tp, sp=tp)


class LayerState(NamedTuple):
    """What is fixed when a layer is built, each by its word in LAYER_AXES.

    scaling: who is asked to multiply by s: a router that folds it into its weights, a plain one that has no place for
    it, the kernel, or the runner at the output; absent: the layer has no s, and the same three are asked.
    shared: under sequence parallelism every rank holds the shared experts whole.    bias: of the experts.
    share: the factor of the whole output.
    """

    grid: str
    experts: str
    scaling: str
    shared: str
    order: str
    latent: str
    bias: str
    zero: str
    reduce: str
    pad: str
    share: str


class CallState(NamedTuple):
    """What may change from call to call. history: the first call of the layer, whole or as two micro-batches in flight
    together; or the same after a call with another kernel, which was then swapped for this one."""

    dtype: str
    kernel: str
    history: str


State = tuple[LayerState, CallState]
LAYER_AXES: dict[str, tuple[str, ...]] = {
    "grid": tuple(map(str, _grids())),
    "experts": ("modular", "monolithic"),
    "scaling": ("router", "plain", "kernel", "output", "absent", "absent_kernel", "absent_output"),
    "shared": ("none", "sharded", "gated", "fused"),
    "order": ("auto", "1", "2", "3"),
    "latent": ("none", "linear", "bias"),
    "bias": ("no", "yes"),
    "zero": ("no", "yes"),
    "reduce": ("layer", "caller"),
    "pad": ("0", str(PAD)),
    "share": ("1", "0.5"),
}
CALL_AXES: dict[str, tuple[str, ...]] = {
    "dtype": ("fp32", "fp16"),
    "kernel": KERNELS,
    "history": tuple(
        batches + when for batches in ("", "two_batches_") for when in ("first", *(f"after_{name}" for name in KERNELS))
    ),
}
# states of the whole product; a kernel swapped for itself is none
PRODUCT = math.prod(map(len, LAYER_AXES.values())) * len(CALL_AXES["dtype"]) * len(KERNELS) * 2 * len(KERNELS)


def batches_of(history: str) -> int:
    """How many micro-batches the call is made of."""
    return 2 if history.startswith("two_batches_") else 1


def before(history: str) -> str | None:
    """The kernel of the call before this one, None if this is the first."""
    return history.rpartition("after_")[2] if "after_" in history else None


@functools.cache
def histories(kernel: str, kernels: tuple[str, ...]) -> tuple[str, ...]:
    """Of a call with this kernel, in a layer that these may serve."""
    whole = ("first", *(f"after_{other}" for other in kernels if other != kernel))
    return *whole, *(f"two_batches_{history}" for history in whole)


def told(state: State) -> str:
    """'tp2.ep4.dp2 experts=modular ... kernel=deepep_ht history=first': every axis by name."""
    layer, call = state
    named = {**layer._asdict(), **call._asdict()}
    return " ".join([named.pop("grid"), *(f"{name}={value}" for name, value in named.items())])


def layer_code(layer: LayerState) -> int:
    """The layer's place in the product of LAYER_AXES, the last axis fastest."""
    return code(layer, LAYER_AXES)


@functools.cache
def call_code(call: CallState) -> int:
    return code(call, CALL_AXES)


def layer_at(code: int) -> LayerState:
    return LayerState(*words(code, LAYER_AXES))


@functools.cache
def call_at(code: int) -> CallState:
    return CallState(*words(code, CALL_AXES))


def code(state: tuple[str, ...], axes: dict[str, tuple[str, ...]]) -> int:
    """The place of one word from each axis in the product of the axes, the last axis fastest."""
    found = 0
    for word, values in zip(state, axes.values(), strict=True):
        found = found * len(values) + _place(values)[word]
    return found


@functools.cache
def _place(values: tuple[str, ...]) -> dict[str, int]:
    return {value: place for place, value in enumerate(values)}


def words(place: int, axes: dict[str, tuple[str, ...]]) -> list[str]:
    """The words at a place: `code` backwards."""
    found = []
    for values in reversed(axes.values()):
        place, at = divmod(place, len(values))
        found.append(values[at])
    return found[::-1]


def layers_of(grid: str) -> Iterator[tuple[LayerState, tuple[str, ...]]]:
    """Every layer of a grid that some kernel may serve, and those kernels.

    Padding and share are no part of what `check_settings` is asked: it reads neither.
    """
    asked = [values for name, values in LAYER_AXES.items() if name not in ("grid", "pad", "share")]
    for words in itertools.product(*asked):
        plain = LayerState._make((grid, *words, "0", "1"))
        kernels = tuple(kernel for kernel in KERNELS if refusal(plain, kernel) is None)
        if kernels:
            for pad, share in itertools.product(LAYER_AXES["pad"], LAYER_AXES["share"]):
                yield plain._replace(pad=pad, share=share), kernels


@functools.cache
def calls_of(kernels: tuple[str, ...]) -> list[CallState]:
    """Every call of a layer that these kernels may serve."""
    calls = []
    for dtype, kernel in itertools.product(CALL_AXES["dtype"], kernels):
        calls += [CallState(dtype, kernel, history) for history in histories(kernel, kernels)]
    return calls


def refusal(layer: LayerState, kernel: str) -> str | None:
    """Why no such layer may be built, in the layer's own words."""
    spec = spec_of(layer)
    try:
        check_settings(spec, settings_of(layer, kernel), parallel_of(layer.grid))
        _check_router(spec.routing)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def _check_router(routing: Routing) -> None:
    import torch

    make_router(routing, torch.zeros(routing.num_logits) if routing.correction_bias else None, None, 1.0)


@functools.cache
def parallel_of(grid: str) -> FusedMoEParallelConfig:
    """Of rank 0; the checks ask for sizes alone."""
    sizes = parse_grid(grid)
    return FusedMoEParallelConfig(
        tp_size=sizes.tp, tp_rank=0, dp_size=sizes.dp, dp_rank=0, moe_tp_size=sizes.moe_tp, moe_tp_rank=0,
        ep_size=sizes.ep, ep_rank=0, sequence_parallel=sizes.sp > 1,
    )  # fmt: skip


def settings_of(layer: LayerState, kernel: str) -> LayerSettings:
    return _settings(layer[1:5], layer.reduce, layer.pad, layer.grid.find("sp") >= 0, kernel)


@functools.cache
def _settings(how: tuple[str, ...], reduce: str, pad: str, sequence_parallel: bool, kernel: str) -> LayerSettings:
    experts, scaling, shared, order = how
    return LayerSettings(
        apply_routed_scale_to_output=scaling in ("output", "absent_output"),
        kernel_scales=scaling in ("kernel", "absent_kernel"),
        kernel=cast(Kernel, kernel),
        experts="monolithic" if experts == "monolithic" else "auto",
        fuse_shared_experts=shared == "fused",
        shared_order=order,  # type: ignore[arg-type]  # LAYER_AXES lists the same words
        padding=int(pad),
        sequence_parallel=sequence_parallel,
        reduce_results=reduce == "layer",
    )


def spec_of(layer: LayerState) -> MoESpec:
    """One expert for each ep rank, every one of them chosen by every token with the weight 1 (saturated sigmoid)."""
    return _spec(layer.grid, layer.scaling, layer.shared, layer.latent, layer.bias, layer.zero, layer.share)


_SILU = Activation(kind="silu", gated=True, clamp="none", limit=None, alpha=1.0, up_offset=0.0)


@functools.cache
def _spec(grid: str, scaling: str, shared: str, latent: str, bias: str, zero: str, share: str) -> MoESpec:
    sizes = parse_grid(grid)
    ranks, zeros = sizes.ranks, int(zero == "yes")
    return MoESpec(
        hidden_size=hidden_of(ranks),
        routing=Routing(
            num_experts=sizes.ep, top_k=sizes.ep + zeros, scoring_func="sigmoid", score_after_topk=False,
            correction_bias=scaling != "plain", n_group=1, topk_group=1, group_score="max", group_fill=-math.inf,
            renormalize=False, renormalize_rule="add", renormalize_epsilon=0.0,
            routed_scaling_factor=None if scaling.startswith("absent") else S, per_expert_scale=False,
            router_bias=False, router_norm_epsilon=None, sparsemixer_epsilon=None, weight_on="output",
            num_zero_experts=zeros, precision=RouterPrecision(logits="fp32", scores="fp32", weights="fp32"),
        ),
        experts=Experts(
            intermediate_size=ranks, activation=_SILU, bias=bias == "yes", layout="halved", transposed=False,
            latent_size=None if latent == "none" else latent_of(ranks), latent_bias=latent == "bias",
        ),
        shared=None if shared == "none" else Shared(
            n_shared_experts=1, intermediate_size=ranks, activation=_SILU, bias=False, sigmoid_gate=shared == "gated"
        ),
        output=Output(combine="sum" if share == "1" else "average"),
        vision=None,
    )  # fmt: skip


def latent_of(ranks: int) -> int:
    """Columns: the token, the routed shard of each rank, the expert bias as each rank may add it."""
    return 1 + 2 * ranks


def hidden_of(ranks: int) -> int:
    """The columns of `latent_of`, then the shared shard of each rank, then the bias of the output transform."""
    return latent_of(ranks) + ranks + 1
