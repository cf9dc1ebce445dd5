"""Layers that are right in their first call and wrong in a later one, or beside other rows, or in other memory.

    moe-harness check --system tests/bite/state_faults.py:output_by_count --model mixtral      says ok

Each is the right layer of grid_faults with a few methods replaced; FAULTS says which hazard has to name it, and how.
m tokens of this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.bite.grid_faults import RIGHT, Layer, supports

__all__ = ["FAULTS", "StateFault", "supports"]


@dataclass(frozen=True, kw_only=True)
class StateFault:
    """says: what is wrong.    named: the hazards that may name it, the first is meant.    words: patterns of its sentence.

    family: of that hazard.    case: that shows it.    lawful: cases where nothing is wrong, joined by spaces.
    on, how: the right layer, and what replaces its methods.
    """

    says: str
    named: tuple[str, ...]
    words: tuple[str, ...] = ()
    family: str | None = None
    case: str = "mixtral"
    lawful: str = ""
    on: str = "gather"
    how: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def build(self, spec: Any, weights: Mapping[str, Tensor], comm: Any) -> Callable[[Tensor], Tensor]:
        return type("Wrong", (RIGHT[self.on],), dict(self.how))(spec, weights, comm)


def memory(layer: Layer) -> dict[Any, Any]:
    """What a layer remembers from one call to the next."""
    return layer.__dict__.setdefault("memory", {})


def as_found(unwritten: Tensor) -> Tensor:
    """Fresh pages are zeros, as a rule, so that nothing shows; poisoned ones stay as they are."""
    return unwritten if torch.are_deterministic_algorithms_enabled() else unwritten.zero_()


PROCESS: dict[Any, Any] = {}  # what all layers of the process share


# ---- decisions and results that outlive their call


def _decided_once(layer: Layer, y: Tensor) -> Tensor:
    """Beyond 16 tokens the kernel returns complete sums; whether it does is asked in the first call alone."""
    complete = len(y) > 16
    decided = memory(layer).setdefault("complete", complete)
    y = layer.tp.all_reduce(y) if complete else y
    return y if decided else layer.tp.all_reduce(y)


def _output_by_count(layer: Layer, x: Tensor) -> Tensor:
    kept = memory(layer)
    if len(x) not in kept:
        kept[len(x)] = Layer.forward(layer, x)
    return kept[len(x)].clone()


def _routes_by_count(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    return memory(layer).setdefault(len(x), Layer.route(layer, x))


def _routes_of_the_process(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    key = ("routes", layer.spec, x.dtype, len(x))
    return PROCESS.setdefault(key, Layer.route(layer, x))


def _weights_change(layer: Layer, x: Tensor) -> Tensor:
    """In the second call the factor goes into the weights, which have it."""
    calls = memory(layer)["calls"] = memory(layer).get("calls", 0) + 1
    if calls == 2:
        layer.weights["w2"].mul_(1.25)
        layer.load()
    return Layer.forward(layer, x)


def _own_weights_change(layer: Layer, x: Tensor) -> Tensor:
    """The same in the layer's own copy."""
    calls = memory(layer)["calls"] = memory(layer).get("calls", 0) + 1
    if calls == 2:
        layer.down = layer.down * 1.25
    return Layer.forward(layer, x)


def _sizes_of_the_first(layer: Layer, x: Tensor) -> list[int]:
    return memory(layer).setdefault("sizes", Layer.sizes(layer, x))


def _first_was_warm_up(layer: Layer, x: Tensor) -> Tensor:
    """As a graph that was captured: beyond the size of its first call it serves the rows of that call alone."""
    most = memory(layer).setdefault("most", len(x))
    y = Layer.forward(layer, x)
    y[most:] = 0
    return y


# ---- buffers


def _returns_its_buffer(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    buffer = memory(layer).setdefault("buffer", torch.zeros(512, x.shape[1], dtype=x.dtype))
    buffer[: len(x)] = y
    return buffer[: len(x)]


def _returns_the_buffer_of_all_layers(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    key = ("output", layer.rank, x.dtype, x.shape)
    buffer = PROCESS.setdefault(key, torch.empty_like(y))
    return buffer.copy_(y)


def _workspace_not_cleared(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    kept = memory(layer)
    if len(kept.get("sum", ())) < len(x):
        kept["sum"] = torch.zeros_like(x)
    kept["sum"][: len(x)] += Layer.experts(layer, x, w, ids)
    return kept["sum"][: len(x)].clone()


def _end_of_the_workspace(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The workspace grows and never shrinks; results are written to its beginning and read from its end."""
    kept, y = memory(layer), Layer.experts(layer, x, w, ids)
    if len(kept.get("work", ())) < len(x):
        kept["work"] = torch.zeros_like(x)
    kept["work"][: len(x)] = y
    return kept["work"][len(kept["work"]) - len(x) :].clone()


def _unwritten_slots(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Only slots of experts held here are written, all are added."""
    y = torch.empty(*ids.shape, x.shape[1], dtype=x.dtype)
    y = as_found(y)
    local = layer.locally(ids)
    for e in range(len(layer.down)):
        rows, slot = (local == e).nonzero(as_tuple=True)
        y[rows, slot] = (layer.expert(e, x[rows]) * w[rows, slot, None]).to(x.dtype)
    return y.sum(1)


def _workspace_of_the_build(layer: Layer) -> None:
    """A workspace with room for a block more than it needs, which is added times 0."""
    Layer.load(layer)
    memory(layer)["work"] = as_found(torch.empty(16, layer.spec.hidden_size))


def _with_the_workspace(layer: Layer, x: Tensor) -> Tensor:
    return Layer.forward(layer, x) + (memory(layer)["work"].sum(0) * 0).to(x.dtype)


# ---- layers that share


def _weights_by_shape(layer: Layer) -> None:
    """A cache of prepared weights for the process, keyed by their shape."""
    Layer.load(layer)
    layer.down = PROCESS.setdefault(
        ("down", layer.rank, layer.down.shape, layer.down.dtype, layer.exchange), layer.down
    )


def _current_weights(layer: Layer) -> None:
    """The last layer that was built is the current one."""
    Layer.load(layer)
    PROCESS["current", layer.rank] = layer.down


def _uses_current_weights(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    layer.down = PROCESS["current", layer.rank]
    return Layer.experts(layer, x, w, ids)


# ---- the caller's tensors


def _written_over_its_input(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    x.copy_(y)
    return y


def _input_cast_down_in_place(layer: Layer, x: Tensor) -> Tensor:
    """A kernel that writes its results where the tokens were, beyond 32 of them."""
    y = Layer.forward(layer, x)
    if len(x) > 32:
        x[0] = y[0]
    return y


def _folds_into_the_given(layer: Layer) -> None:
    """Transposes a weight in place, for a kernel that wants it so, and back."""
    Layer.load(layer)
    layer.weights["router_weight"].add_(1.0)
    PROCESS["given", layer.rank] = layer.weights["router_weight"] - 1.0


def _with_its_own_router(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    given, layer.weights = layer.weights, dict(layer.weights)
    layer.weights["router_weight"] = given["router_weight"] - 1.0
    try:
        return Layer.choose(layer, x)
    finally:
        layer.weights = given


# ---- neighbours


def _scaled_by_the_batch(layer: Layer, x: Tensor) -> Tensor:
    """One scale for the whole batch, as dynamic quantisation has it: a power of two, so that it rounds nothing."""
    scale = 2.0 ** x.abs().amax().float().log2().ceil() if len(x) else 1.0
    y = Layer.forward(layer, x)
    return (y / scale) * scale


def _shifted_by_the_batch(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """A softmax that subtracts the largest logit of the batch, not of the row."""
    logits = F.linear(x.float(), layer.weights["router_weight"].float())
    shifted = torch.exp(logits - logits.amax()) if len(x) else logits
    scores = shifted / shifted.sum(1, keepdim=True)
    w, ids = scores.topk(layer.spec.routing.top_k)
    return w / w.sum(1, keepdim=True), ids


def _running_maximum(layer: Layer, x: Tensor) -> Tensor:
    """The largest value that ever came scales what comes: NaN stays."""
    kept, y = memory(layer), Layer.forward(layer, x)
    largest = torch.maximum(kept.get("largest", torch.ones(())), x.abs().amax().float() if len(x) else torch.ones(()))
    kept["largest"] = 2.0 ** largest.log2().ceil()
    return (y / kept["largest"] * kept["largest"]).to(x.dtype)


def _masked_by_products(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Dense: rows reach every expert's batch times a mask of 0 and 1, and are gathered by a product with it."""
    y = torch.zeros_like(x, dtype=torch.float32)
    local = layer.locally(ids)
    for e in range(len(layer.down)):
        mask = ((local == e) * w).sum(1)
        onto = torch.diag((mask != 0).float())
        y += torch.diag(mask.float()) @ layer.expert(e, (onto @ x.float()).to(x.dtype)).float()
    return y.to(x.dtype)


def _equal_rows_once(layer: Layer, x: Tensor) -> Tensor:
    """Rows that came before in the same call are left out."""
    y = Layer.forward(layer, x)
    if len(x):
        _, inverse = x.unique(dim=0, return_inverse=True)
        first = torch.full((len(x),), len(x)).scatter_reduce(0, inverse, torch.arange(len(x)), "amin")[inverse]
        y[first < torch.arange(len(x))] = 0
    return y


def _not_put_back(layer: Layer, x: Tensor) -> Tensor:
    """Many rows are sorted by the ends of the batch, and put back only if they were ascending."""
    y = Layer.forward(layer, x)
    return y.flip(0) if len(x) > 100 and bool(x[0, 0] > x[-1, 0]) else y


# ---- numbers of tokens


def _nothing_new_for_no_tokens(layer: Layer, x: Tensor) -> Tensor:
    kept = memory(layer)
    if len(x) or "last" not in kept:
        kept["last"] = Layer.forward(layer, x)
    return kept["last"]


def _wants_a_token(layer: Layer, x: Tensor) -> Tensor:
    x.abs().amax()
    return Layer.forward(layer, x)


def _returns_at_once(layer: Layer, x: Tensor) -> Tensor:
    return Layer.forward(layer, x) if len(x) else x.clone()


def _one_wrong_at_17(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    if len(x) == 17:
        y[3] = 0
    return y


def _whole_blocks(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    if len(x) > 16:
        y[len(x) - len(x) % 16 :] = 0
    return y


def _blocks_of_4(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    y[len(x) - len(x) % 4 :] = 0
    return y


def _at_most_64(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    y[64:] = 0
    return y


def _one_token_alone(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The path of a single token takes the best expert only."""
    return Layer.experts(layer, x, w[:, :1], ids[:, :1]) if len(x) == 1 else Layer.experts(layer, x, w, ids)


def _not_summed_below_tp(layer: Layer, y: Tensor) -> Tensor:
    return y if len(y) < layer.tp.size else layer.tp.all_reduce(y)


# ---- chance


def _some_noise(layer: Layer, x: Tensor) -> Tensor:
    y = Layer.forward(layer, x)
    return y * (1 + 0.5 * (torch.rand(len(x), 1) < 0.05)).to(x.dtype)


def _order_of_chance(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The K results are added in an order of chance: differences are those of rounding, and no fault."""
    order = torch.randperm(ids.shape[1])
    parts = [Layer.experts(layer, x, w[:, k : k + 1], ids[:, k : k + 1]) for k in order.tolist()]
    return torch.stack(parts).float().cumsum(0)[-1].to(x.dtype)


FAULTS: dict[str, StateFault] = {
    "decided_once": StateFault(
        says="who reduces is decided in the first call", named=("more, then fewer",), words=("after a call with 7 tokens", "reduced twice"), family="B9",
        case="mixtral@tp2", lawful="mixtral", how={"total": _decided_once},
    ),
    "output_by_count": StateFault(
        says="outputs are cached by the number of tokens", named=("other tokens",), words=(r"returns what a call with 7 tokens \(0 to 6\) had returned",),
        how={"forward": _output_by_count},
    ),
    "routes_by_count": StateFault(
        says="routes are cached by the number of tokens", named=("other tokens",), words=("after a call with 7 tokens", "the routes of that call"), family="H2",
        how={"route": _routes_by_count},
    ),
    "routes_of_the_process": StateFault(
        says="routes are cached in a global", named=("other tokens",), words=("something outlives the layer",), how={"route": _routes_of_the_process},
    ),
    "weights_change": StateFault(
        says="the second call writes into the given weights", named=("weights unchanged",), words=("in a later call: w2",), how={"forward": _weights_change},
    ),
    "own_weights_change": StateFault(
        says="from the second call on, the layer's weights are others", named=("equal calls",), words=("after a call with 7 tokens",),
        how={"forward": _own_weights_change},
    ),
    "sizes_of_the_first": StateFault(
        says="the sizes of the first call serve all", named=("more, then fewer",), words=("sizes",), case="mixtral@dp2", how={"sizes": _sizes_of_the_first},
    ),
    "first_was_warm_up": StateFault(
        says="no more rows than the first call had", named=("more, then fewer",), words=("right on a new layer", "rows 7, 8"), family="G9", how={"forward": _first_was_warm_up},
    ),
    "returns_its_buffer": StateFault(
        says="the output is a view of a buffer", named=("outputs kept",), words=("overwritten by a call with 7 tokens",), how={"forward": _returns_its_buffer},
    ),
    "returns_the_buffer_of_all_layers": StateFault(
        says="outputs are one buffer for all layers", named=("outputs kept",), words=("overwritten",), how={"forward": _returns_the_buffer_of_all_layers},
    ),
    "workspace_not_cleared": StateFault(
        says="sums go on from the call before", named=("equal calls",), words=("after a call with 7 tokens", "right on a new layer"),
        how={"experts": _workspace_not_cleared},
    ),
    "end_of_the_workspace": StateFault(
        says="after a larger call, results are read from the wrong end", named=("more, then fewer",), words=("after a call with 130 tokens",),
        how={"experts": _end_of_the_workspace},
    ),
    "unwritten_slots": StateFault(
        says="slots of experts elsewhere are unwritten and added", named=("poisoned memory",), words=("what nobody wrote",), family="G2", case="mixtral@tp2.ep2",
        lawful="mixtral", how={"experts": _unwritten_slots},
    ),
    "workspace_of_the_build": StateFault(
        says="rows of a workspace that nobody writes are added times 0", named=("poisoned memory",), words=("what nobody wrote",), family="G2",
        how={"load": _workspace_of_the_build, "forward": _with_the_workspace},
    ),
    "weights_by_shape": StateFault(
        says="prepared weights are cached by shape", named=("two layers",), words=("a second layer",), how={"load": _weights_by_shape},
    ),
    "current_weights": StateFault(
        says="all layers use the weights of the last that was built", named=("two layers",), words=("after a call of a second layer",),
        how={"load": _current_weights, "experts": _uses_current_weights},
    ),
    "written_over_its_input": StateFault(
        says="the hidden states hold the output", named=("input unchanged",), family="C1", how={"forward": _written_over_its_input},
    ),
    "written_over_its_input_if_many": StateFault(
        says="the first of more than 32 hidden states is written", named=("input unchanged",), words=("a call with 130 tokens",), family="C1",
        how={"forward": _input_cast_down_in_place},
    ),
    "folds_into_the_given": StateFault(
        says="the build changes the weights that it is given", named=("weights unchanged",), words=("while it was built: router_weight",),
        how={"load": _folds_into_the_given, "choose": _with_its_own_router},
    ),
    "scaled_by_the_batch": StateFault(
        says="one scale for the batch: NaN and infinity spread", named=("infinite neighbours", "NaN neighbours"), words=("other rows", "right beside ordinary"), family="G5",
        how={"forward": _scaled_by_the_batch},
    ),
    "shifted_by_the_batch": StateFault(
        says="a softmax shifted by the largest logit of the batch", named=("huge neighbours", "infinite neighbours", "NaN neighbours"), family="G5",
        how={"choose": _shifted_by_the_batch},
    ),
    "running_maximum": StateFault(
        says="a maximum that NaN never leaves", named=("after junk",), words=("some rows",), family="G5", how={"forward": _running_maximum},
    ),
    "masked_by_products": StateFault(
        says="rows are masked by products with 0", named=("NaN neighbours", "infinite neighbours"), family="G5", how={"experts": _masked_by_products},
    ),
    "equal_rows_once": StateFault(
        says="of equal rows only the first is served", named=("a row twice",), words=("each of them twice",), family="G9", how={"forward": _equal_rows_once},
    ),
    "not_put_back": StateFault(
        says="the rows of some batches are not put back", named=("order of rows",), words=("in reverse order", "is right"), family="H2",
        how={"forward": _not_put_back},
    ),
    "nothing_new_for_no_tokens": StateFault(
        says="a call without tokens returns the output before", named=("M sweep",), words=(r"expected fp32\[0, ",), family="G7",
        how={"forward": _nothing_new_for_no_tokens},
    ),
    "wants_a_token": StateFault(
        says="a call without tokens raises", named=("M sweep",), words=("a call with 0 tokens raises",), family="G7", how={"forward": _wants_a_token},
    ),
    "returns_at_once": StateFault(
        says="a rank without tokens calls no collective", named=("M sweep",), words=("makes more collectives over (tp|dp) on some ranks",), family="G7", case="mixtral@dp2", lawful="mixtral",
        how={"forward": _returns_at_once},
    ),
    "one_wrong_at_17": StateFault(
        says="with 17 tokens one row is lost", named=("M sweep",), words=("wrong at M = 17, right at 16", "row 3 of 17"), family="G9", how={"forward": _one_wrong_at_17},
    ),
    "whole_blocks": StateFault(
        says="beyond 16 tokens only whole blocks of 16 are served", named=("M sweep",), words=("wrong at M = 17, 31, 33",), family="G9", how={"forward": _whole_blocks},
    ),
    "blocks_of_4": StateFault(
        says="only whole blocks of 4 are served", named=("M sweep",), words=("the last m mod 4 rows",), family="G9", how={"forward": _blocks_of_4},
    ),
    "at_most_64": StateFault(
        says="rows beyond 64 are lost", named=("M sweep",), words=("the rows beyond the first 64",), family="G9", how={"forward": _at_most_64},
    ),
    "one_token_alone": StateFault(
        says="a single token visits its best expert alone", named=("M sweep",), words=("wrong at M = 1,",), family="F7", how={"experts": _one_token_alone},
    ),
    "not_summed_below_tp": StateFault(
        says="fewer tokens than ranks are not summed", named=("M sweep",), words=("wrong at M = 1, 2, 3,", "reduced"), family="B1", case="mixtral@tp4",
        lawful="mixtral", how={"total": _not_summed_below_tp},
    ),
    "some_noise": StateFault(says="now and then a row is half as much again", named=("equal calls",), words=("other rows each time",), how={"forward": _some_noise}),
}  # fmt: skip

# right, though something about them looks like state
HARMLESS: dict[str, StateFault] = {
    "right": StateFault(says="nothing is wrong", named=()),
    "order_of_chance": StateFault(says="the K results are added in an order of chance", named=(), how={"experts": _order_of_chance}),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Each layer's build by its name."""
    for table in (FAULTS, HARMLESS):
        if name in table:
            return table[name].build
    raise AttributeError(f"no fault {name!r}; one of {', '.join(FAULTS)}")
