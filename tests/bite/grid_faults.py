"""Wrong layers on grids: one right layer of an outsider, and each fault as a few of its methods replaced.

    moe-harness check --system tests/bite/grid_faults.py:nothing_reduced --model deepseek_v3 --tp 2
    python -m tests.bite.grid_faults [NAME ...]        what the harness says to each of them, as a table

`Layer` shares no code with the runner. FAULTS says of each fault what is wrong, on which grids it has to show, on which
it changes nothing, and what a diagnosis has to contain. M tokens, m of them on this rank, H hidden, K top-k.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# ---- the right layer


class Layer:
    """One rank's layer, right on every grid that `legal` allows. Its small methods are what faults replace.

    exchange: how tokens meet their experts. "gather": all tokens of the dp group on every rank, sums scattered back.
    "send": each row to the ep ranks that hold one of its experts, and back. "rows": as send, but the tp ranks take
    different rows through the whole layer and gather them in the end.
    """

    exchange = "gather"

    def __init__(self, spec: Any, weights: Mapping[str, Tensor], comm: Any) -> None:
        self.spec, self.weights, self.comm = spec, weights, comm
        self.tp, self.ep, self.dp, self.rank = comm.tp, comm.ep, comm.dp, comm.rank
        self.pieces = comm.world_size // comm.ep.size
        self.piece = comm.rank % self.pieces
        self.bias_counts = self.piece == 0
        self.shared_cut = (self.tp.rank, self.tp.size) if self.exchange != "rows" else (0, 1)
        self.held = self.place()
        self.number()
        self.load()

    # -- loading

    def place(self) -> list[list[int]]:
        """The experts of each ep rank; by default neighbours together, and the first ranks hold one more."""
        return [part.tolist() for part in torch.arange(self.spec.routing.num_experts).tensor_split(self.ep.size)]

    def number(self) -> None:
        """Slots are numbered through all ranks. slot, twin: of an expert, two slots where it has two.

        owner: of a slot.    local: a slot's place on this rank, -1 elsewhere; the last entry serves the id -1.
        """
        flat = [(rank, expert) for rank, experts in enumerate(self.held) for expert in experts]
        slots: dict[int, list[int]] = {}
        for number, (_, expert) in enumerate(flat):
            slots.setdefault(expert, []).append(number)
        self.slot, self.twin = (torch.tensor([slots[e][at] for e in sorted(slots)]) for at in (0, -1))
        self.owner = torch.tensor([rank for rank, _ in flat])
        mine = [number for number, (rank, _) in enumerate(flat) if rank == self.ep.rank]
        self.local = torch.full((len(flat) + 1,), -1)
        self.local[mine] = torch.arange(len(mine))

    def load(self) -> None:
        self.cut(self.held[self.ep.rank], self.piece, self.pieces)

    def cut(self, experts: list[int], piece: int, pieces: int) -> None:
        """This rank's piece of these experts: gate, up [e, i, H], down [e, H, i], and their biases or None."""
        rules, weights = self.spec.experts, self.weights
        at = torch.tensor(experts, dtype=torch.long)
        w13, w2 = (weights[name][at].mT if rules.transposed else weights[name][at] for name in ("w13", "w2"))

        def halves(t: Tensor) -> list[Tensor]:
            both = (t[:, 0::2], t[:, 1::2]) if rules.layout == "interleaved" else t.chunk(2, 1)
            return [half.chunk(pieces, 1)[piece] for half in both]

        self.gate, self.up = halves(w13)
        self.down = w2.chunk(pieces, 2)[piece]
        self.gate_b, self.up_b = halves(weights["b13"][at]) if rules.bias else (None, None)
        self.down_b = weights["b2"][at] if rules.bias else None

    # -- the call

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """[m, H] -> [m, H]."""
        if self.exchange == "rows":
            return self.forward_rows(x)
        return self.finish(self.routed(x), self.shared(x))

    def routed(self, x: Tensor) -> Tensor:
        """R of the own tokens, [m, H]: to be summed over tp."""
        if self.exchange == "gather":
            return self.by_gather(x, *self.route(x))
        mine = self.sent_rows(len(x))
        y = torch.zeros_like(x)
        y[mine] = self.by_sending(x[mine], *self.route(x[mine]))
        return y

    def finish(self, routed: Tensor, shared: Tensor | None) -> Tensor:
        return self.total(routed if shared is None else routed + shared)

    def total(self, y: Tensor) -> Tensor:
        return self.tp.all_reduce(y)

    def forward_rows(self, x: Tensor) -> Tensor:
        mine, real = self.own_rows(x)
        w, ids = self.route(mine)
        y = self.by_sending(mine, *self.masked(w, ids, real))
        shared = self.shared(mine)
        return self.joined(y if shared is None else y + shared, len(x))

    def own_rows(self, x: Tensor) -> tuple[Tensor, int]:
        """ceil(m / tp) rows, those beyond m zero; and how many are real."""
        share = -(-len(x) // self.tp.size)
        rows = F.pad(x, (0, 0, 0, share * self.tp.size - len(x))).split(share)[self.tp.rank] if share else x
        return rows, min(max(len(x) - self.tp.rank * share, 0), share)

    def masked(self, w: Tensor, ids: Tensor, real: int) -> tuple[Tensor, Tensor]:
        w, ids = w.clone(), ids.clone()
        w[real:], ids[real:] = 0.0, -1
        return w, ids

    def joined(self, y: Tensor, m: int) -> Tensor:
        return self.tp.all_gather(y)[:m]

    # -- exchange

    def by_gather(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        everyone = [self.gathered(t) for t in (x, w, ids)]
        return self.scattered(self.experts(*everyone), self.sizes(x))

    def gathered(self, t: Tensor) -> Tensor:
        return self.dp.all_gather(t)

    def sizes(self, x: Tensor) -> list[int]:
        return self.dp.all_gather(torch.tensor([len(x)])).tolist()

    def scattered(self, partial: Tensor, sizes: list[int]) -> Tensor:
        return self.dp.reduce_scatter(partial, sizes=sizes)

    def sent_rows(self, m: int) -> Tensor:
        """The own tokens that this tp rank sends; ranks with other pieces send the same ones."""
        return torch.arange(m).tensor_split(self.tp.size // self.pieces)[self.tp.rank // self.pieces]

    def by_sending(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        table = self.table(ids)
        sent = [[t[rows] for rows in table] for t in (x, w, ids)]
        came = zip(*(self.group.all_to_all(parts) for parts in sent), strict=True)
        back = self.group.all_to_all(self.answers([self.experts(*parts) for parts in came]))
        return self.combined(torch.zeros_like(x), table, back)

    @property
    def group(self) -> Any:
        return self.ep

    def table(self, ids: Tensor) -> list[Tensor]:
        """For each ep rank the rows that have an expert there."""
        owner = torch.cat([self.owner, self.owner.new_tensor([-1])])[ids]
        return [(owner == rank).any(1).nonzero()[:, 0] for rank in range(self.ep.size)]

    def answers(self, answers: list[Tensor]) -> list[Tensor]:
        return answers

    def combined(self, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
        for rows, part in zip(table, back, strict=True):
            y.index_add_(0, rows, part)
        return y

    # -- experts

    def experts(self, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        """What this rank's experts add for these tokens."""
        y = torch.zeros_like(x, dtype=torch.float32)
        local = self.locally(ids)
        for e in range(len(self.down)):
            rows, slot = (local == e).nonzero(as_tuple=True)
            if len(rows):
                rows, slot = self.served(rows, slot)
                y.index_add_(0, rows, (self.expert(e, x[rows]) * w[rows, slot, None]).float())
        return y.to(x.dtype)

    def locally(self, ids: Tensor) -> Tensor:
        return self.local[ids]

    def served(self, rows: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        return rows, slot

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate = F.linear(x, self.gate[e], None if self.gate_b is None else self.gate_b[e])
        up = F.linear(x, self.up[e], None if self.up_b is None else self.up_b[e])
        y = F.linear(self.activated(gate, up), self.down[e])
        return y + self.down_b[e] if self.down_b is not None and self.bias_counts else y

    def activated(self, gate: Tensor, up: Tensor) -> Tensor:
        rule = self.spec.experts.activation
        if rule.clamp == "before":
            gate, up = gate.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
        return gate * torch.sigmoid(gate * rule.alpha) * (up + rule.up_offset)

    def shared(self, x: Tensor) -> Tensor | None:
        """S of these tokens, this rank's piece."""
        if self.spec.shared is None:
            return None
        place, pieces = self.shared_cut
        gate, up = (half.chunk(pieces)[place] for half in self.weights["shared_w13"].chunk(2))
        down = self.weights["shared_w2"].chunk(pieces, 1)[place]
        y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return y * torch.sigmoid(F.linear(x, self.weights["shared_gate"])) if self.spec.shared.sigmoid_gate else y

    # -- router

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights times s, and slots: [m, K] each."""
        w, ids = self.choose(x)
        odd = (torch.arange(len(x)) % 2 == 1)[:, None]
        return w * self.spec.scale, torch.where(odd, self.twin[ids], self.slot[ids])

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rules, at = self.spec.routing, {"fp32": torch.float32, "model": x.dtype}
        bias = self.weights["router_bias"].to(at[rules.precision.logits]) if rules.router_bias else None
        kind = at[rules.precision.logits]
        logits = F.linear(x.to(kind), self.weights["router_weight"].to(kind), bias).to(at[rules.precision.scores])
        score = torch.sigmoid if rules.scoring_func == "sigmoid" else functools.partial(torch.softmax, dim=-1)
        if rules.score_after_topk:
            best, ids = logits.topk(rules.top_k)
            w = score(best)
        else:
            scores = score(logits)
            ranked = scores + self.weights["e_score_correction_bias"] if rules.correction_bias else scores
            if rules.n_group > 1:
                groups = ranked.unflatten(1, (rules.n_group, -1))
                worth = groups.topk(2).values.sum(-1) if rules.group_score == "top2" else groups.amax(-1)
                kept = torch.zeros_like(worth, dtype=torch.bool).scatter(1, worth.topk(rules.topk_group).indices, True)
                ranked = groups.masked_fill(~kept[..., None], rules.group_fill).flatten(1)
            ids = ranked.topk(rules.top_k).indices
            w = scores.gather(1, ids)
        w = w.to(at[rules.precision.weights])
        if rules.renormalize:
            w = w / (w.sum(1, keepdim=True) + rules.renormalize_epsilon)
        return w.float(), ids


class Sending(Layer):
    exchange = "send"


class Rows(Layer):
    exchange = "rows"


class Doubled(Layer):
    """Each ep rank has one more slot, for a second copy of the next rank's first expert; odd rows visit the copy."""

    def place(self) -> list[list[int]]:
        held = super().place()
        if len(held) == 1:
            return held
        return [[*experts, held[(rank + 1) % len(held)][0]] for rank, experts in enumerate(held)]


class DoubledSending(Doubled):
    exchange = "send"


RIGHT: dict[str, type[Layer]] = {
    "gather": Layer, "send": Sending, "rows": Rows, "doubled": Doubled, "doubled_send": DoubledSending,
}  # fmt: skip


def legal(name: str, grid: Any) -> bool:
    """Whether that right layer exists on a grid."""
    if name == "rows":
        return bool(grid.moe_tp == 1)
    return "send" not in name or grid.tp % grid.moe_tp == 0


def supports(case: Any) -> str | None:
    spec = case.spec
    if spec.vision is not None or spec.experts.latent_size is not None or not spec.experts.activation.gated:
        return "this layer knows neither vision branches, latent experts nor activations without a gate"
    return None


# ---- the faults


EVERY = ("deepseek_v3", "mixtral", "gpt_oss", "qwen2_moe")
WITH_SHARED, WITH_BIAS, WITH_SCALE = ("deepseek_v3", "qwen2_moe"), ("gpt_oss",), ("deepseek_v3",)
SPREAD = ("deepseek_v3", "mixtral", "gpt_oss")  # some of their tokens visit one of two ranks alone


@dataclass(frozen=True, kw_only=True)
class Fault:
    """family: those that a diagnosis may name, the first is meant.    says: what is wrong.

    shows: grids on which the harness has to object; lawful: on which nothing changes; 33 tokens unless the grid says.
    words: patterns, all of them in a diagnosis that has found the cause.    models: that have the parts in which the fault is.
    on: the right layer that is changed, and `how`.
    """

    family: str
    says: str
    words: tuple[str, ...]
    shows: str
    lawful: str = ""
    models: tuple[str, ...] = EVERY
    on: str = "gather"
    how: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def build(self, spec: Any, weights: Mapping[str, Tensor], comm: Any) -> Callable[[Tensor], Tensor]:
        return type("Wrong", (RIGHT[self.on],), dict(self.how))(spec, weights, comm)


def _last_rank(layer: Layer) -> bool:
    return bool(layer.rank == layer.comm.world_size - 1)


# -- reduce


def _reduced_over_ep_first(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    return Layer.scattered(layer, layer.ep.all_reduce(partial), sizes)


def _all_reduced_before_the_scatter(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    return Layer.scattered(layer, layer.dp.all_reduce(partial), sizes)


def _own_block(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    return partial.split(sizes)[layer.dp.rank]


def _shared_self_reduces(layer: Layer, x: Tensor) -> Tensor | None:
    s = Layer.shared(layer, x)
    return None if s is None else layer.tp.all_reduce(s)


def _shared_whole(layer: Layer) -> None:
    Layer.load(layer)
    layer.shared_cut = (0, 1)


def _shared_cut_over_all_ranks(layer: Layer) -> None:
    Layer.load(layer)
    layer.shared_cut = (layer.rank, layer.comm.world_size)


def _shared_with_the_gathered(layer: Layer, x: Tensor) -> Tensor:
    """S of all tokens of the dp group joins R before it is scattered."""
    everyone = [layer.gathered(t) for t in (x, *layer.route(x))]
    partial = layer.experts(*everyone) + Layer.shared(layer, everyone[0])
    return layer.tp.all_reduce(layer.scattered(partial, layer.sizes(x)))


def _summed_over_ep_where_there_is(layer: Layer, y: Tensor) -> Tensor:
    return layer.ep.all_reduce(y) if layer.ep.size > 1 else layer.tp.all_reduce(y)


def _summed_over_pieces_where_there_are(layer: Layer, y: Tensor) -> Tensor:
    if not 1 < layer.pieces < layer.tp.size:
        return layer.tp.all_reduce(y)
    first = layer.tp.rank // layer.pieces * layer.pieces
    return layer.tp.all_gather(y[None])[first : first + layer.pieces].sum(0)


def _only_the_routed_over_ep(layer: Layer, routed: Tensor, shared: Tensor | None) -> Tensor:
    group = layer.ep if layer.ep.size > 1 else layer.tp
    routed = group.all_reduce(routed)
    return routed if shared is None else routed + layer.tp.all_reduce(shared)


def _not_summed_over_tp_with_dp(layer: Layer, y: Tensor) -> Tensor:
    return y if layer.dp.size > 1 else layer.tp.all_reduce(y)


def _without_the_last(layer: Layer, y: Tensor) -> Tensor:
    return layer.tp.all_gather(y[None])[: max(layer.tp.size - 1, 1)].sum(0)


def _row_blocks(layer: Layer, y: Tensor) -> Tensor:
    return layer.tp.all_gather(y.tensor_split(layer.tp.size)[layer.tp.rank])


def _half_the_columns(layer: Layer, y: Tensor) -> Tensor:
    left, right = y.chunk(2, 1)
    return torch.cat([layer.tp.all_reduce(left), right], 1)


# -- biases


def _bias_everywhere(layer: Layer) -> None:
    Layer.load(layer)
    layer.bias_counts = True


def _foreign_bias_too(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The biases of experts that other ranks hold are added here as well."""
    y = Layer.experts(layer, x, w, ids)
    if not layer.bias_counts:
        return y
    w = w * (layer.locally(ids) < 0)
    return y + torch.einsum("mk,mkh->mh", w.to(x.dtype), layer.weights["b2"][ids])


def _biases_of_w13_dropped(layer: Layer) -> None:
    Layer.load(layer)
    if _last_rank(layer):
        layer.gate_b = layer.up_b = None


# -- gather and scatter


def _reversed_blocks(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    return layer.dp.reduce_scatter(torch.cat(partial.split(sizes)[::-1]), sizes=sizes[::-1])


def _next_ranks_rows(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    blocks = partial.split(sizes)
    return layer.dp.reduce_scatter(torch.cat([*blocks[1:], blocks[0]]), sizes=[*sizes[1:], sizes[0]])


def _equal_blocks(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    """Every dp rank is taken to have as many tokens as the average, rounded up."""
    share = -(-sum(sizes) // len(sizes))
    padded = F.pad(partial, (0, 0, 0, share * len(sizes) - sum(sizes)))
    mine, m = layer.dp.reduce_scatter(padded), sizes[layer.dp.rank]
    return F.pad(mine, (0, 0, 0, max(m - share, 0)))[:m]


def _padding_left_in(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Blocks are padded to the longest for the gather, and scattered by their true sizes."""
    sizes = layer.sizes(x)
    short = max(sizes) - len(x)
    everyone = [layer.dp.all_gather(F.pad(t, (0, 0, 0, short))) for t in (x, w, ids)]
    return layer.scattered(layer.experts(*everyone)[: sum(sizes)], sizes)


def _routes_gathered_in_reverse(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    sizes = layer.sizes(x)

    def reverse(t: Tensor) -> Tensor:
        return torch.cat(layer.dp.all_gather(t).split(sizes)[::-1])

    return layer.scattered(layer.experts(layer.dp.all_gather(x), reverse(w), reverse(ids)), sizes)


def _gathered_over_tp(layer: Layer, t: Tensor) -> Tensor:
    return layer.tp.all_gather(t)


def _sizes_over_tp(layer: Layer, x: Tensor) -> list[int]:
    return layer.tp.all_gather(torch.tensor([len(x)])).tolist()


def _scattered_over_tp(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    return layer.tp.reduce_scatter(partial, sizes=[len(partial) // layer.tp.size] * layer.tp.size)


def _first_rows_of_all(layer: Layer, x: Tensor) -> Tensor | None:
    s = Layer.shared(layer, layer.gathered(x))
    return None if s is None else s[: len(x)]


# -- sending


def _neighbours_table(layer: Layer, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
    """Each answer is added where the next rank's rows belong."""
    for rows, part in zip([*table[1:], table[0]], back, strict=True):
        count = min(len(rows), len(part))
        y.index_add_(0, rows[:count], part[:count])
    return y


def _by_arrival(layer: Layer, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
    """Answers are taken to come in the order of the tokens."""
    for part in back:
        y[: len(part)] += part
    return y


def _to_the_neighbour(layer: Layer, answers: list[Tensor]) -> list[Tensor]:
    """Each sender gets what its neighbour asked for, cut or padded to what it sent."""
    rolled = [*answers[1:], answers[0]]
    return [F.pad(a, (0, 0, 0, max(len(own) - len(a), 0)))[: len(own)] for a, own in zip(rolled, answers, strict=True)]


def _once_a_slot(layer: Layer, ids: Tensor) -> list[Tensor]:
    """A row goes to a rank once for each of its experts there, and each copy meets all of them."""
    owner = torch.cat([layer.owner, layer.owner.new_tensor([-1])])[ids]
    return [(owner == rank).nonzero()[:, 0] for rank in range(layer.ep.size)]


def _to_the_first_expert(layer: Layer, ids: Tensor) -> list[Tensor]:
    owner = torch.cat([layer.owner, layer.owner.new_tensor([-1])])[ids]
    return [(owner[:, 0] == rank).nonzero()[:, 0] for rank in range(layer.ep.size)]


def _all_rows(layer: Layer, m: int) -> Tensor:
    return torch.arange(m)


def _nobody_without_tokens(layer: Layer, x: Tensor) -> Tensor:
    """A rank without tokens leaves before it would dispatch none."""
    return x if len(x) == 0 else Layer.forward(layer, x)


def _receiver_full(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """A rank takes 4 rows from each sender."""
    y = Layer.experts(layer, x, w, ids)
    y[4:] = 0.0
    return y


def _unweighted_from_afar(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The router's weights stay behind when a row leaves its rank."""
    table = layer.table(ids)
    sent = [[t[rows] for rows in table] for t in (x, w, ids)]
    sent[1] = [t if rank == layer.ep.rank else torch.ones_like(t) for rank, t in enumerate(sent[1])]
    came = zip(*(layer.ep.all_to_all(parts) for parts in sent), strict=True)
    back = layer.ep.all_to_all([layer.experts(*parts) for parts in came])
    return layer.combined(torch.zeros_like(x), table, back)


# -- experts in their places


def _global_as_local(layer: Layer, ids: Tensor) -> Tensor:
    return torch.where(ids < len(layer.down), ids, -1)


def _offset_twice(layer: Layer, ids: Tensor) -> Tensor:
    local = ids - 2 * sum(map(len, layer.held[: layer.ep.rank]))
    return torch.where((local >= 0) & (local < len(layer.down)), local, -1)


def _one_further(layer: Layer, ids: Tensor) -> Tensor:
    """The map of ranks beyond the first is off by one."""
    local = layer.local[ids]
    return torch.where(local >= 0, (local + int(layer.ep.rank > 0)) % len(layer.down), -1)


def _dealt_out(layer: Layer) -> None:
    """Weights are loaded round robin, the map says neighbours."""
    experts = range(layer.ep.rank, layer.spec.routing.num_experts, layer.ep.size)
    layer.cut(list(experts), layer.piece, layer.pieces)


def _experts_of_rank_0(layer: Layer) -> None:
    layer.cut(layer.held[0], layer.piece, layer.pieces)


def _piece_0(layer: Layer) -> None:
    layer.cut(layer.held[layer.ep.rank], 0, layer.pieces)


def _cut_over_tp(layer: Layer) -> None:
    """Experts are cut over the tp ranks, although those of all dp ranks share them."""
    if layer.ep.size == 1:
        layer.cut(layer.held[0], layer.tp.rank, layer.tp.size)
    else:
        Layer.load(layer)


def _pieces_by_tp_rank(layer: Layer) -> None:
    layer.cut(layer.held[layer.ep.rank], layer.tp.rank % layer.pieces, layer.pieces)


def _place_by_modulo(layer: Layer) -> None:
    """Which experts and which piece are both read off the low digits of the rank."""
    rank = layer.rank % layer.ep.size
    layer.cut(layer.held[rank], layer.rank % layer.pieces, layer.pieces)
    slots = [number for number, owner in enumerate(layer.owner.tolist()) if owner == rank]
    layer.local = torch.full_like(layer.local, -1)
    layer.local[slots] = torch.arange(len(slots))


def _copies_are_junk(layer: Layer) -> None:
    """The second slots are never loaded: they hold what was there."""
    Layer.load(layer)
    if layer.ep.size > 1:
        layer.down = layer.down.clone()
        layer.down[-1] = layer.gate[-1].T * 0.5


def _copies_are_zero(layer: Layer) -> None:
    Layer.load(layer)
    if layer.ep.size > 1:
        layer.down = layer.down.clone()
        layer.down[-1] = 0.0


def _copies_of_another(layer: Layer) -> None:
    """The second slot is loaded with its own rank's first expert."""
    own = layer.held[layer.ep.rank]
    layer.cut([*own[:-1], own[0]] if layer.ep.size > 1 else own, layer.piece, layer.pieces)


def _remainder_nowhere(layer: Layer) -> list[list[int]]:
    share = layer.spec.routing.num_experts // layer.ep.size
    return [list(range(rank * share, (rank + 1) * share)) for rank in range(layer.ep.size)]


def _number_with_lost(layer: Layer) -> None:
    """Experts that nobody holds have no slot: their ids are -1."""
    Layer.number(layer)
    lost = layer.spec.routing.num_experts - len(layer.slot)
    layer.slot = layer.twin = torch.cat([layer.slot, torch.full((lost,), -1)])


def _gate_and_up_exchanged(layer: Layer) -> None:
    Layer.load(layer)
    if _last_rank(layer):
        layer.gate, layer.up = layer.up, layer.gate


def _read_in_the_other_layout(layer: Layer) -> None:
    rules = layer.spec.experts
    other = "halved" if rules.layout == "interleaved" else "interleaved"
    layer.spec = replace(layer.spec, experts=replace(rules, layout=other))
    Layer.load(layer)


def _gelu_on_the_last(layer: Layer, gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up if _last_rank(layer) else Layer.activated(layer, gate, up)


def _routed_among_own(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Each ep rank renormalises the weights of its own experts alone."""
    w = w * (layer.locally(ids) >= 0)
    return Layer.experts(layer, x, w / w.sum(1, keepdim=True).clamp(min=1e-20), ids)


def _scaled_again_with_ep(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    return Layer.experts(layer, x, w * layer.spec.scale if layer.ep.size > 1 else w, ids)


# -- ids, slots and rows that are nobody's


def _minus_one_wraps(layer: Layer, ids: Tensor) -> Tensor:
    return layer.local[ids] % len(layer.down)


def _unwritten_slots(value: float) -> Callable[..., Tensor]:
    """The results of all K slots are added, also those that no local expert wrote."""

    def experts(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return Layer.experts(layer, x, w, ids) + (layer.locally(ids) < 0).sum(1, keepdim=True).to(x.dtype) * value

    return experts


def _stale_window(layer: Layer, x: Tensor) -> Tensor:
    """A first call with other tokens leaves its answers in the window, and nobody clears it."""
    layer.window = torch.zeros_like(x)
    Layer.routed(layer, x.flip(1))
    return Layer.routed(layer, x)


def _into_the_window(layer: Layer, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
    rows = layer.sent_rows(len(layer.window))
    y = Layer.combined(layer, layer.window[rows], table, back)
    layer.window[rows] = y
    return y


def _pad_rows_to_expert_0(layer: Layer, x: Tensor) -> Tensor:
    """Rows that fill up the last ranks hold an old token, run through expert 0, and are added to token 0."""
    y = Layer.forward_rows(layer, x)
    short = -len(x) % layer.tp.size
    if short:
        junk = layer.expert(0, x[-1:]) * float(short) if layer.ep.rank == 0 else torch.zeros_like(x[:1])
        junk = layer.tp.all_reduce(junk)
        y = torch.cat([y[:1] + junk, y[1:]])
    return y


def _pad_rows_are_nan(layer: Layer, x: Tensor) -> tuple[Tensor, int]:
    rows, real = Layer.own_rows(layer, x)
    return torch.cat([rows[:real], torch.full_like(rows[real:], torch.nan)]), real


def _pad_rows_point_at_row_0(layer: Layer, w: Tensor, ids: Tensor, real: int) -> tuple[Tensor, Tensor]:
    w, ids = w.nan_to_num(), ids.clone()
    w[real:] = 0.0
    return w, ids


def _pad_rows_add_to_row_0(layer: Layer, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
    """Weight 0 times NaN is NaN; the rows behind the last token are added to the first."""
    Layer.combined(layer, y, table, back)
    if bool(y[-1:].isnan().any()):
        y[0] += y[-1]
    return y


def _split_evenly_joined_by_ceiling(layer: Layer, x: Tensor) -> tuple[Tensor, int]:
    """The first ranks take one row more; the join takes every rank to have as many."""
    rows = x.tensor_split(layer.tp.size)[layer.tp.rank]
    share = -(-len(x) // layer.tp.size)
    return F.pad(rows, (0, 0, 0, share - len(rows))), len(rows)


def _one_row_at_least(layer: Layer, x: Tensor) -> Tensor:
    """A rank without tokens runs one of zeros, and forgets to take it off again."""
    return Layer.forward(layer, F.pad(x, (0, 0, 0, 1)) if len(x) == 0 else x)


def _crash_without_tokens(layer: Layer, x: Tensor) -> Tensor:
    if len(x) == 0:
        raise RuntimeError("CUDA error: invalid configuration argument")
    return Layer.forward(layer, x)


def _first_three(layer: Layer, rows: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    return rows[:3], slot[:3]


def _whole_pairs(layer: Layer, x: Tensor) -> Tensor:
    """R of the last row is lost if the number of rows is odd."""
    y = Layer.routed(layer, x)
    return torch.cat([y[: len(x) // 2 * 2], torch.zeros_like(x[len(x) // 2 * 2 :])])


# -- more of the same kinds, where a name is easily mistaken


def _first_rows_for_all(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    """Each dp rank gets the first rows: those of the first dp rank."""
    return layer.dp.all_reduce(partial)[: sizes[layer.dp.rank]]


def _summed_over_dp_too(layer: Layer, y: Tensor) -> Tensor:
    """The sum goes over the whole grid, though dp ranks have tokens of their own."""
    return layer.dp.all_reduce(layer.tp.all_reduce(y))


def _second_expert_never_loaded(layer: Layer) -> None:
    """The second expert of the last ep rank stays zero: on all its pieces."""
    Layer.load(layer)
    if layer.ep.rank == layer.ep.size - 1:
        layer.down = layer.down.clone()
        layer.down[1] = 0.0


def _one_piece_never_loaded(layer: Layer) -> None:
    """The last rank's piece of its first expert stays zero."""
    Layer.load(layer)
    if _last_rank(layer):
        layer.down = layer.down.clone()
        layer.down[0] = 0.0


def _down_of_the_next_piece(layer: Layer) -> None:
    layer.cut(layer.held[layer.ep.rank], (layer.piece + 1) % layer.pieces, layer.pieces)
    down = layer.down
    Layer.load(layer)
    layer.down = down


def _halves_cut_as_one(layer: Layer) -> None:
    """The stored rows are cut into pieces before they are taken for gate and up."""
    Layer.load(layer)
    rules, experts = layer.spec.experts, layer.held[layer.ep.rank]
    w13 = layer.weights["w13"][torch.tensor(experts)]
    layer.gate, layer.up = w13.chunk(layer.pieces, 1)[layer.piece].chunk(2, 1)
    assert rules.layout == "halved"


def _scaled_on_rank_0_alone(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    w, ids = Layer.route(layer, x)
    return (w if layer.rank == 0 else w / layer.spec.scale), ids


def _routed_by_a_stale_bias(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rank 1 missed the last update of the correction bias; every rank routes for itself."""
    if layer.rank == 1:
        layer.weights = {**layer.weights, "e_score_correction_bias": layer.weights["e_score_correction_bias"] * 0.0}
    return Layer.choose(layer, x)


def _last_row_twice(layer: Layer, x: Tensor) -> Tensor:
    """An odd last row is repeated to make a pair, and both results are added to it."""
    y = Layer.routed(layer, x)
    return y if len(x) % 2 == 0 else torch.cat([y[:-1], 2 * y[-1:]])


def _partial_in_bf16(layer: Layer, y: Tensor) -> Tensor:
    return layer.tp.all_reduce(y.bfloat16().to(y.dtype))


def _own_answers_forgotten(layer: Layer, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
    for rank, (rows, part) in enumerate(zip(table, back, strict=True)):
        if rank != layer.ep.rank:
            y.index_add_(0, rows, part)
    return y


def _only_own_answers(layer: Layer, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
    return y.index_add_(0, table[layer.ep.rank], back[layer.ep.rank])


def _shared_cut_over_tp(layer: Layer) -> None:
    """The shared experts stay cut over tp, although the tp ranks have different rows."""
    Layer.load(layer)
    layer.shared_cut = (layer.tp.rank, layer.tp.size)


def _reduced_after_the_join(layer: Layer, y: Tensor, m: int) -> Tensor:
    return layer.tp.all_reduce(Layer.joined(layer, y, m))


def _summed_instead_of_joined(layer: Layer, y: Tensor, m: int) -> Tensor:
    """Rows of different tokens are added, and stand at the first."""
    return F.pad(layer.tp.all_reduce(y), (0, 0, 0, m))[:m]


def _joined_in_reverse(layer: Layer, y: Tensor, m: int) -> Tensor:
    return torch.cat(layer.tp.all_gather(y[None]).flip(0).unbind())[:m]


def _bias_on_rank_0_alone(layer: Layer) -> None:
    """As if ranks cut every expert: the first one adds the bias for all, and it has its own experts alone."""
    Layer.load(layer)
    layer.bias_counts = layer.rank == 0


def _as_many_as_dp_rank_0(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    """Rows beyond the number of the first dp rank's tokens are not written."""
    y = Layer.scattered(layer, partial, sizes)
    y[sizes[0] :] = 0.0
    return y


def _chunks_by_own_count(layer: Layer, x: Tensor) -> Tensor:
    """Rows go in chunks of 8, as many as this rank has."""
    return torch.cat([Layer.routed(layer, part) for part in x.split(8)])


def _reduced_early_on_rank_0(layer: Layer, x: Tensor) -> Tensor:
    """Rank 0 reduces S before it dispatches, the others after: all wait for each other."""
    if layer.rank == 0:
        shared = layer.total(layer.shared(x))
        return layer.total(layer.routed(x)) + shared
    routed = layer.total(layer.routed(x))
    return routed + layer.total(layer.shared(x))


def _scaled_by_pieces(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """An average over the ranks that share an expert, where a sum is due."""
    return Layer.experts(layer, x, w / layer.pieces, ids)


def _weights_of_the_neighbouring_slot(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """On ranks beyond the first ids and weights are sorted by different keys."""
    return Layer.experts(layer, x, w.flip(1) if layer.ep.rank > 0 else w, ids)


def _dropped_on_the_last_rank(layer: Layer, rows: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """On the last rank, rows that do not fill a block of four are not computed."""
    full = len(rows) // 4 * 4 if _last_rank(layer) else len(rows)
    return rows[:full], slot[:full]


def _one_further_over_all(layer: Layer, ids: Tensor) -> Tensor:
    """The map is shifted as a whole: each rank serves its neighbour's first expert for its own last one."""
    return torch.where(ids >= 0, layer.local[(ids + 1) % layer.spec.routing.num_experts], -1)


def _fewer_columns_on_the_last(layer: Layer, x: Tensor) -> Tensor | None:
    """The last tp rank's shared piece lost its second half."""
    place, pieces = layer.shared_cut
    if place < pieces - 1:
        return Layer.shared(layer, x)
    down = layer.weights["shared_w2"].clone()
    down[:, -(down.shape[1] // pieces // 2) :] = 0.0
    layer.weights = {**layer.weights, "shared_w2": down}
    return Layer.shared(layer, x)


# -- traps: what resembles another fault, several at once, and what no rule can explain


def _constant_on_each_rank(layer: Layer, y: Tensor) -> Tensor:
    return layer.tp.all_reduce(y + 0.5)


def _noise_on_one_rank(layer: Layer, y: Tensor) -> Tensor:
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return layer.tp.all_reduce(y + 0.1 * noise if layer.tp.rank == layer.tp.size - 1 else y)


def _five_percent_on_the_last_rank(layer: Layer) -> None:
    Layer.load(layer)
    if _last_rank(layer):
        layer.down = layer.down * 1.05


def _two_experts_exchanged(layer: Layer) -> list[list[int]]:
    """The first expert of the first ep rank and the last of the last are loaded in each other's place."""
    held = Layer.place(layer)
    held[0][0], held[-1][-1] = held[-1][-1], held[0][0]
    return held


def _numbered_in_order(layer: Layer) -> None:
    """Slots are numbered as if experts were placed in order."""
    held, layer.held = layer.held, Layer.place(layer)
    Layer.number(layer)
    layer.held = held


def _square_roots_on_rank_1(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    return Layer.experts(layer, x, w.sqrt() if layer.rank == 1 else w, ids)


def _previous_tokens_on_rank_1(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Rank 1's experts read the row before, along the right routes."""
    return Layer.experts(layer, x.roll(1, 0) if layer.rank == 1 else x, w, ids)


def _shared_of_its_share(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    """R is multiplied by the dp rank's part of all tokens."""
    y = Layer.scattered(layer, partial, sizes)
    return y * (sizes[layer.dp.rank] / max(sum(sizes), 1))


def _every_third_slot_lost_on_rank_1(layer: Layer, rows: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.arange(len(rows)) % 3 != 2 if layer.rank == 1 else torch.arange(len(rows)) >= 0
    return rows[kept], slot[kept]


def _last_rank_subtracted(layer: Layer, y: Tensor) -> Tensor:
    return layer.tp.all_reduce(-y if layer.tp.rank == layer.tp.size - 1 else y)


def _clamp_lost_on_the_last_rank(layer: Layer, gate: Tensor, up: Tensor) -> Tensor:
    rule = layer.spec.experts.activation
    if not _last_rank(layer):
        return Layer.activated(layer, gate, up)
    return gate * torch.sigmoid(gate * rule.alpha) * (up + rule.up_offset)


def _gate_lost_on_one_rank(layer: Layer, x: Tensor) -> Tensor | None:
    s = Layer.shared(layer, x)
    gate = torch.sigmoid(F.linear(x, layer.weights["shared_gate"]))
    return s / gate if layer.tp.rank == layer.tp.size - 1 and s is not None else s


def _routed_twice_shared_never(layer: Layer, routed: Tensor, shared: Tensor | None) -> Tensor:
    routed = layer.total(layer.total(routed))
    return routed if shared is None else routed + shared


def _one_nan_on_the_last_dp_rank(layer: Layer, y: Tensor) -> Tensor:
    y = layer.tp.all_reduce(y)
    if layer.dp.rank == layer.dp.size - 1 and len(y) > 1:
        y[1, 0] = torch.nan
    return y


def _late_on_the_last_rank(layer: Layer, x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """The last rank's experts read the hidden states of the layer before: here the columns in reverse."""
    return Layer.experts(layer, x.flip(1) if _last_rank(layer) else x, w, ids)


def _one_pair_exchanged(layer: Layer, partial: Tensor, sizes: list[int]) -> Tensor:
    """The last row of one dp rank and the first row of the next are exchanged."""
    if len(sizes) == 1 or 0 in sizes:
        return Layer.scattered(layer, partial, sizes)
    order = torch.arange(len(partial))
    order[[sizes[0] - 1, sizes[0]]] = order[[sizes[0], sizes[0] - 1]]
    return Layer.scattered(layer, partial[order], sizes)


def _columns_rolled_on_one_rank(layer: Layer, y: Tensor) -> Tensor:
    return layer.tp.all_reduce(y.roll(1, 1) if layer.tp.rank == layer.tp.size - 1 else y)


# -- decisions that outlive their reason


def _summed_again_beyond_16(layer: Layer, y: Tensor) -> Tensor:
    y = layer.tp.all_reduce(y)
    return layer.tp.all_reduce(y) if len(y) > 16 else y


def _not_summed_below_tp(layer: Layer, y: Tensor) -> Tensor:
    return y if len(y) < layer.tp.size else layer.tp.all_reduce(y)


def _warmed_up(layer: Layer, x: Tensor) -> Tensor:
    """A first call with half the tokens, then the one that counts."""
    Layer.forward(layer, x[: len(x) // 2])
    return Layer.forward(layer, x)


def _remembered_sizes(layer: Layer, x: Tensor) -> list[int]:
    if not hasattr(layer, "first_sizes"):
        layer.first_sizes = Layer.sizes(layer, x)
    return layer.first_sizes


def _warmed_up_with_as_many(layer: Layer, x: Tensor) -> Tensor:
    Layer.forward(layer, x.flip(0))
    return Layer.forward(layer, x)


def _remembered_routes(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    if not hasattr(layer, "first_routes"):
        layer.first_routes = Layer.route(layer, x)
    return layer.first_routes


def _remembered_table(layer: Layer, y: Tensor, table: list[Tensor], back: list[Tensor]) -> Tensor:
    """Answers are added by the rows of the first call, cut to what came."""
    if not hasattr(layer, "first_table"):
        layer.first_table = table
    for rows, part in zip(layer.first_table, back, strict=True):
        count = min(len(rows), len(part))
        y.index_add_(0, rows[:count], part[:count])
    return y


# ---- our own runner with one thing remembered: what only a second call shows


@dataclass(frozen=True, kw_only=True)
class RunnerFault(Fault):
    """The harness's runner, changed. calls: (layer, x) -> y, what a serving engine does with it."""

    kernel: str = "partial"
    calls: Callable[[Any, Tensor], Tensor]

    def build(self, spec: Any, weights: Mapping[str, Tensor], comm: Any) -> Callable[[Tensor], Tensor]:
        from harness.runner.layer import FusedMoE, LayerSettings

        settings = LayerSettings(apply_routed_scale_to_output=False, kernel=self.kernel)  # type: ignore[arg-type]
        return functools.partial(self.calls, FusedMoE(spec, settings, weights, comm))


def _swapped_with_a_frozen_plan(kernel: str) -> Callable[[Any, Tensor], Tensor]:
    """The plan of the first call is kept, then tokens travel by another kernel."""

    def calls(layer: Any, x: Tensor) -> Tensor:
        first = layer.plan
        layer.runner.plan = lambda dtype, width: first
        layer.forward(x)
        layer.swap_kernel(kernel)
        return layer.forward(x)  # type: ignore[no-any-return]

    return calls


def _micro_batches_with_one_slot(layer: Any, x: Tensor) -> Tensor:
    shared = layer.runner.shared_experts
    shared.take = lambda micro_batch=0: shared._outputs[0]
    right = shared._module
    shared.run = lambda planned, moment, rows, micro_batch=0: (
        shared._outputs.__setitem__(0, right(rows)) if planned is moment else None
    )
    return layer.forward_micro_batches(x, 2)  # type: ignore[no-any-return]


def _placed_with_a_frozen(what: str) -> Callable[[Any, Tensor], Tensor]:
    """Experts move to other ranks between two calls; the weights, the map, or the ids' table stay behind."""

    def calls(layer: Any, x: Tensor) -> Tensor:
        from harness.runner.placement import linear, physical

        experts, ep = layer._spec.routing.num_experts, layer._parallel.ep_size
        before = linear(experts, ep)
        layer.place(before)
        layer.forward(x)
        after = physical(tuple(reversed(range(experts))), experts, ep)
        if what == "weights":
            layer.runner.placement = after
        elif what == "ids":
            layer.place(after)
            layer.runner.placement = before
        return layer.forward(x)  # type: ignore[no-any-return]

    return calls


FAULTS: dict[str, Fault] = {
    # -- nothing, twice, or by the wrong group
    "nothing_reduced": Fault(
        family="B1 B8", says="no rank adds the others' partial sums", words=("is reduced|is not reduced|sum over tp is missing",),
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", how={"total": lambda layer, y: y},
    ),
    "own_rows_no_scatter": Fault(
        family="B1 B7 B8", says="each dp rank takes its rows of its own partial sum: no reduce-scatter", words=("not reduced|a sum over dp is missing",),
        shows="dp2 ep2.dp2 tp2.ep4.dp2", lawful="tp2 tp4.ep2", how={"scattered": _own_block},
    ),
    "reduced_twice": Fault(
        family="B2", says="the sum over tp is summed over tp again", words=("reduced twice",),
        shows="tp2 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2",
        how={"total": lambda layer, y: layer.tp.all_reduce(layer.tp.all_reduce(y))},
    ),
    "reduced_over_ep_and_tp": Fault(
        family="B2", says="R is summed over ep, then over dp and tp once more", words=("routed part is reduced twice", "ep"),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 ep2.dp2 tp2.ep4.dp2 tp2.ep2.dp2", lawful="tp2 tp1 tp2.dp2",
        how={"scattered": _reduced_over_ep_first},
    ),
    "reduced_then_scattered": Fault(
        family="B6 B2", says="R is all-reduced over dp, then reduce-scattered over dp", words=("routed part is reduced twice", "dp"),
        shows="dp2 ep2.dp2 tp2.ep4.dp2 tp2.ep2.dp2", lawful="tp4.ep2 tp2", how={"scattered": _all_reduced_before_the_scatter},
    ),
    "shared_self_reduces": Fault(
        family="B3", says="S is summed over tp, then joins R's sum", words=("shared experts' output is summed once per", "tp"), models=WITH_SHARED,
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", how={"shared": _shared_self_reduces},
    ),
    "shared_summed_over_dp": Fault(
        family="B3", says="S of all dp ranks' tokens joins R before the reduce-scatter: once for each dp rank",
        words=("shared experts' output is summed once per", "dp"), models=WITH_SHARED, shows="dp2 ep2.dp2 tp2.ep4.dp2 tp2.ep2.dp2", lawful="tp2 tp4.ep2",
        how={"forward": _shared_with_the_gathered},
    ),
    "shared_replicated": Fault(
        family="B3 B4", says="every tp rank holds all of S and adds it before the sum", words=("shared experts' output is summed once per", "tp"), models=WITH_SHARED,
        shows="tp4 tp2.ep2 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", how={"load": _shared_whole},
    ),
    "shared_replicated_over_all": Fault(
        family="B3 B4", says="every rank adds all of S for all tokens before both sums", words=("shared experts' output is summed once per", "rank"), models=WITH_SHARED,
        shows="dp2 tp4.ep4 tp2.ep4.dp2 tp2.ep2.dp2", lawful="tp1",
        how={"load": _shared_whole, "forward": _shared_with_the_gathered},
    ),
    "shared_left_partial": Fault(
        family="B5", says="S is added after the sum, each rank its own piece", words=("left partial",), models=WITH_SHARED,
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2",
        how={"finish": lambda layer, routed, shared: layer.total(routed) + shared},
    ),
    "shared_cut_over_all_ranks": Fault(
        family="B8 B5 F9", says="S is cut over all ranks and summed over tp: the other dp ranks' pieces are missing",
        words=("S lacks the pieces|missing|counted 0",), models=WITH_SHARED, shows="dp2 tp2.dp2 tp2.ep4.dp2", lawful="tp2 tp4.ep2", how={"load": _shared_cut_over_all_ranks},
    ),
    "scattered_without_sum": Fault(
        family="B7", says="over tp each rank's block of rows is its own partial sum", words=("one rank's partial sum",),
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", how={"total": _row_blocks},
    ),
    "summed_over_ep_only": Fault(
        family="B8", says="the sum goes over ep, not over tp", words=("over ep alone", "moe.tp is missing"),
        shows="tp4.ep2 tp8.ep2 tp8.ep4", lawful="tp4 tp2.ep2 tp4.ep4", how={"total": _summed_over_ep_where_there_is},
    ),
    "summed_over_pieces_only": Fault(
        family="B8", says="the sum goes over the ranks that share an expert, not over tp", words=("over moe.tp alone", "ep is missing"),
        shows="tp4.ep2 tp8.ep2 tp8.ep4", lawful="tp4 tp2.ep2 tp4.ep4", how={"total": _summed_over_pieces_where_there_are},
    ),
    "routed_over_ep_only": Fault(
        family="B8", says="R is summed over ep, S over tp", words=("R .*summed over ep alone", "moe.tp is missing"),
        shows="tp4.ep2 tp8.ep2 tp8.ep4", lawful="tp4 tp2.ep2 tp4.ep4", how={"finish": _only_the_routed_over_ep},
    ),
    "summed_over_dp_only": Fault(
        family="B8 B1 B5", says="with dp ranks the reduce-scatter over dp is the only sum: none over tp", words=("a sum over tp is missing|summed over parts of the ranks",),
        shows="tp2.dp2 tp2.ep4.dp2 tp2.ep2.dp2", lawful="dp2 tp4.ep2", how={"total": _not_summed_over_tp_with_dp},
    ),
    "last_rank_skipped": Fault(
        family="B8", says="the sum over tp lacks its last rank", words=("missing",),
        shows="tp4 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", how={"total": _without_the_last},
    ),
    "first_ranks_sum": Fault(
        family="B8", says="the first tp rank's partial sum is broadcast", words=("missing",),
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", how={"total": lambda layer, y: layer.tp.broadcast(y)},
    ),
    "averaged_over_tp": Fault(
        family="B13", says="the sum over tp is a mean", words=("averaged",),
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2",
        how={"total": lambda layer, y: layer.tp.all_reduce(y) / layer.tp.size},
    ),
    "averaged_over_dp": Fault(
        family="B13", says="the reduce-scatter over dp is a mean", words=("R", "averaged"),
        shows="dp2 ep2.dp2 tp2.ep4.dp2", lawful="tp2 tp4.ep2",
        how={"scattered": lambda layer, partial, sizes: Layer.scattered(layer, partial, sizes) / layer.dp.size},
    ),
    "half_the_columns_summed": Fault(
        family="H4 B1 B8", says="the second half of the columns is not reduced", words=("columns",),
        shows="tp2 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", how={"total": _half_the_columns},
    ),
    # -- biases
    "bias_on_every_piece": Fault(
        family="B10", says="the ranks that share an expert each add its second bias", words=("bias",), models=WITH_BIAS,
        shows="tp8.ep2 tp2 tp4.ep2 tp2.dp2 tp2.ep2.dp2", lawful="tp1 tp4.ep4 tp2.ep4.dp2", how={"load": _bias_everywhere},
    ),
    "bias_on_every_ep_rank": Fault(
        family="B10", says="every ep rank adds the second biases of all chosen experts", words=("bias",), models=WITH_BIAS,
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"experts": _foreign_bias_too},
    ),
    "bias_on_every_rank": Fault(
        family="B10", says="all ranks add the second biases of all chosen experts", words=("bias",), models=WITH_BIAS,
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2 dp2", lawful="tp1",
        how={"load": _bias_everywhere, "experts": _foreign_bias_too},
    ),
    "first_bias_lost_on_one_rank": Fault(
        family="F5", says="the last rank's experts lack their first bias", words=("bias",), models=WITH_BIAS,
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"load": _biases_of_w13_dropped},
    ),
    # -- gather and scatter
    "scatter_in_reverse": Fault(
        family="B12 H2", says="rows are gathered in the order of dp ranks and scattered in reverse", words=("gather and scatter|size of tensor",),
        shows="dp2.tokens32 ep4.dp4.tokens32 tp2.ep4.dp2.tokens32 dp2", lawful="tp2 tp4.ep2", how={"scattered": _reversed_blocks},
    ),
    "rows_of_the_next_dp_rank": Fault(
        family="B12 H2", says="each dp rank gets the rows of the next", words=("gather and scatter|size of tensor",),
        shows="ep4.dp4.tokens32 tp2.ep4.dp2.tokens32 ep2.dp2", lawful="tp2 tp4.ep2", how={"scattered": _next_ranks_rows},
    ),
    "equal_sizes_assumed": Fault(
        family="B12 H2 B11", says="every dp rank is taken to have as many tokens", words=("rows of R|results to the wrong tokens",),
        shows="dp2.tokens20_4 ep2.dp2.tokens3_9 tp2.ep4.dp2.tokens9_24", lawful="dp2.tokens32 tp2.ep4.dp2.tokens16_16 tp2 dp2",
        how={"scattered": _equal_blocks},
    ),
    "padding_left_in": Fault(
        family="B12 H2 B11", says="blocks are padded for the gather and cut by their true sizes for the scatter", words=("rows of R|results to the wrong tokens",),
        shows="dp2.tokens4_20 ep2.dp2.tokens3_9 ep4.dp4.tokens5_1_9_3", lawful="dp2.tokens32 dp2 tp2 ep2.dp2.tokens9_3",
        how={"by_gather": _padding_left_in},
    ),
    "routes_of_another_dp_rank": Fault(
        family="B12 H2", says="tokens are gathered in the order of dp ranks, routes in reverse", words=("routed as",),
        shows="dp2.tokens32 ep4.dp4.tokens32 tp2.ep4.dp2.tokens32", lawful="tp2 tp4.ep2",
        how={"by_gather": _routes_gathered_in_reverse},
    ),
    "gathered_over_tp": Fault(
        family="B12 B2 B8 B1", says="gather and scatter go over tp instead of dp", words=("R x tp|not reduced|sum over dp is missing",),
        shows="tp2 dp2 tp2.ep4.dp2 tp4.ep2", lawful="tp1",
        how={"gathered": _gathered_over_tp, "sizes": _sizes_over_tp, "scattered": _scattered_over_tp},
    ),
    "shared_reads_the_gathered": Fault(
        family="C2 H2", says="S is taken from the first rows of the gathered batch: right on the first dp rank", words=("S", "dispatched|gathered|batch"), models=WITH_SHARED,
        shows="dp2 ep2.dp2 tp2.ep4.dp2", lawful="tp2 tp4.ep2 dp2.tokens5_0", how={"shared": _first_rows_of_all},
    ),
    # -- sending
    "neighbours_table": Fault(
        family="B11 H2", says="answers are added to the rows that went to the next rank", words=("(wrong|other) tokens",), on="send", models=SPREAD,
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2 ep2.dp2", lawful="tp2 tp1", how={"combined": _neighbours_table},
    ),
    "answers_by_arrival": Fault(
        family="B11 H2", says="answers are added in the order in which they come", words=("(wrong|other) tokens",), on="send", models=SPREAD,
        shows="tp4.ep4 tp4.ep2 tp2.ep4.dp2 ep2.dp2", lawful="tp2 tp1", how={"combined": _by_arrival},
    ),
    "answers_to_the_neighbour": Fault(
        family="B11 H2 B12", says="each sender gets the answers that its neighbour waits for", words=("(wrong|other) tokens",), on="send",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2 ep2.dp2", lawful="tp2 tp1", how={"answers": _to_the_neighbour},
    ),
    "sent_once_a_slot": Fault(
        family="B14 G9", says="a row with n experts on one rank is sent there n times and served by all of them each time",
        words=("served (there once for each|twice)",), on="send", shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2 ep2.dp2", how={"table": _once_a_slot},
    ),
    "sent_to_the_first_expert": Fault(
        family="G9 D13", says="a row goes to the rank of its first expert alone", words=("token-expert pairs do not count",), on="send",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2", how={"table": _to_the_first_expert},
    ),
    "rows_not_split_over_tp": Fault(
        family="B2", says="every tp rank sends all rows, and the answers are summed over tp", words=("routed part is reduced twice",), on="send",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 ep2.dp2", how={"sent_rows": _all_rows},
    ),
    "sent_over_tp": Fault(
        family="", says="rows are sent over tp instead of ep", words=("group tp", "all_to_all"), on="send",
        shows="tp2.ep4.dp2 tp4.ep2 ep2.dp2", lawful="tp2.ep2 tp4.ep4", how={"group": property(lambda layer: layer.tp)},  # type: ignore[dict-item]
    ),
    "leaves_without_tokens": Fault(
        family="", says="a rank without tokens skips the dispatch", words=("rank 0", "ep"), on="send",
        shows="ep2.dp2.tokens0_5 ep4.dp4.tokens3_0_4_5", lawful="ep2.dp2 tp2.ep2 tp2.ep2.tokens0", how={"forward": _nobody_without_tokens},
    ),
    "receiver_full": Fault(
        family="G9 A6", says="a rank serves four rows of each sender", words=("token-expert pairs do not count|in .* tokens",), on="send",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 ep2.dp2 tp2.ep4.dp2", lawful="tp2.ep2.tokens7 tp4.ep4.tokens15", how={"experts": _receiver_full},
    ),
    "unweighted_from_afar": Fault(
        family="D11", says="rows that leave their rank come back without the router's weights", words=("weight",), on="send", models=("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"), shows="tp2.ep2 tp4.ep4 ep2.dp2 tp2.ep4.dp2", lawful="tp1 tp2", how={"by_sending": _unweighted_from_afar},
    ),
    # -- experts in their places
    "global_id_as_local": Fault(
        family="F7", says="ids of all experts are read as ids of this rank's", words=("global expert ids for its local ones",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"locally": _global_as_local},
    ),
    "offset_twice": Fault(
        family="F7 B8", says="the first expert of the rank is subtracted twice", words=("subtracted twice|the rank.* gave nothing",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"locally": _offset_twice},
    ),
    "map_off_by_one": Fault(
        family="F7", says="ranks beyond the first compute the next of their experts", words=("off by .1 on every ep rank but the first",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"locally": _one_further},
    ),
    "round_robin_read_as_linear": Fault(
        family="F7", says="experts are loaded round robin and looked up as neighbours", words=("round-robin",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"load": _dealt_out},
    ),
    "experts_of_rank_0": Fault(
        family="F9 F7", says="every ep rank loads the first one's experts", words=("experts of the first",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"load": _experts_of_rank_0},
    ),
    "piece_0_everywhere": Fault(
        family="F9", says="every rank loads the first piece of its experts", words=("shares? of R of ranks? 0", "never"),
        shows="tp2 tp4.ep2 tp2.dp2 tp2.ep2.dp2", lawful="tp1 tp4.ep4 tp2.ep4.dp2", how={"load": _piece_0},
    ),
    "cut_over_tp": Fault(
        family="B2", says="experts are cut over tp instead of over all ranks, and summed over all", words=("R x",),
        shows="dp2 tp2.dp2", lawful="tp2 tp4 tp2.ep4.dp2", how={"load": _cut_over_tp},
    ),
    "pieces_by_tp_rank": Fault(
        family="F9", says="a rank's piece is its number in tp, though all ranks share the experts", words=("shares? of R of ranks? 0", "never"),
        shows="dp2 tp2.dp2", lawful="tp2 tp4.ep2 tp2.ep4.dp2 tp2.ep2.dp2", how={"load": _pieces_by_tp_rank},
    ),
    "place_by_modulo": Fault(
        family="F9 F7", says="a rank's experts are read off the low digits of its number, as its piece is", words=("share",),
        shows="tp4.ep2 tp2.ep2.dp2", lawful="tp4 tp4.ep4 tp2.ep4.dp2", how={"load": _place_by_modulo},
    ),
    "copies_are_junk": Fault(
        family="F8", says="second slots of experts hold junk", words=("slot|cop",), on="doubled",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2", how={"load": _copies_are_junk},
    ),
    "copies_are_zero": Fault(
        family="F8 G9", says="second slots of experts hold zeros", words=("lose tokens|slot",), on="doubled_send",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2", how={"load": _copies_are_zero},
    ),
    "copies_of_another": Fault(
        family="F8 F7", says="second slots hold another expert", words=("slot|cop|second",), on="doubled",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2", how={"load": _copies_of_another},
    ),
    "remainder_nowhere": Fault(
        family="F7 G9 D13 B8", says="the experts that do not go into equal shares are on no rank", words=("experts? 6, 7",), models=("mixtral",),
        shows="tp3.ep3 ep3.dp3", lawful="tp2.ep2 tp4.ep4 tp3", how={"place": _remainder_nowhere, "number": _number_with_lost},
    ),
    "read_in_the_other_layout": Fault(
        family="F2", says="rows of gate and up are read as halves where they alternate, or the other way round", words=("w13 is read as .*, it is stored",),
        models=("gpt_oss", "mixtral", "deepseek_v3"), shows="tp1 tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"load": _read_in_the_other_layout},
    ),
    "gate_and_up_on_one_rank": Fault(
        family="F1", says="the last rank exchanges gate and up", words=("exchanged", "rank"),
        shows="tp4 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"load": _gate_and_up_exchanged},
    ),
    "gelu_on_one_rank": Fault(
        family="F6", says="the last rank's experts use gelu", words=("gelu", "rank"),
        shows="tp4 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"activated": _gelu_on_the_last},
    ),
    "renormalised_by_rank": Fault(
        family="D6", says="each ep rank renormalises the weights of its own experts", words=("weight",), models=("mixtral", "gpt_oss"),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"experts": _routed_among_own},
    ),
    "scaled_twice_with_ep": Fault(
        family="A1", says="with ep the kernel scales, and the router did", words=("twice",), models=WITH_SCALE,
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"experts": _scaled_again_with_ep},
    ),
    # -- ids, slots and rows that are nobody's
    "minus_one_wraps": Fault(
        family="G1", says="the id -1 of experts elsewhere is taken for the last local expert", words=("-1|last local expert",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"locally": _minus_one_wraps},
    ),
    "unwritten_slots": Fault(
        family="G2", says="slots of experts elsewhere hold 3.0 and are added", words=("slot",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"experts": _unwritten_slots(3.0)},
    ),
    "unwritten_slots_sent": Fault(
        family="G2", says="slots of experts elsewhere hold 3.0 and are added, on the ranks that a row visits", words=("slot", "hold 3 "), on="send", models=SPREAD,
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2", how={"experts": _unwritten_slots(3.0)},
    ),
    "unwritten_slots_are_nan": Fault(
        family="G2 G5", says="slots of experts elsewhere hold NaN and are added", words=("NaN",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"experts": _unwritten_slots(torch.nan)},
    ),
    "stale_window": Fault(
        family="G2 H2", says="answers of the call before are still in the window", words=("token",), on="send",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2", how={"routed": _stale_window, "combined": _into_the_window},
    ),
    "pad_rows_to_expert_0": Fault(
        family="G3", says="rows that fill up the last ranks run through expert 0 into token 0", words=("token 0",), on="rows",
        shows="tp4.ep4 tp2.ep2 tp4.ep4.sp4", lawful="tp4.ep4.tokens32 tp1", how={"forward_rows": _pad_rows_to_expert_0},
    ),
    "pad_rows_are_nan": Fault(
        family="G5 G4", says="NaN of pad rows reaches a token through its weight 0", words=("NaN",), on="rows", models=("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"),
        shows="tp4.ep4 tp4.ep4.tokens7 tp4.ep4.sp4", lawful="tp4.ep4.tokens32 tp1",
        how={"own_rows": _pad_rows_are_nan, "masked": _pad_rows_point_at_row_0, "combined": _pad_rows_add_to_row_0},
    ),
    "rows_split_one_way_joined_another": Fault(
        family="G4 H2 B12 A6", says="tp ranks take rows as evenly as it goes and join them as if each had as many", words=("tokens",),
        on="rows", shows="tp4.ep4.tokens33 tp4.ep8.dp2.tokens12_13 tp4.ep4.sp4.tokens6", lawful="tp4.ep4.tokens32 tp4.ep4.tokens7 tp2.ep4.dp2 tp1",
        how={"own_rows": _split_evenly_joined_by_ceiling},
    ),
    "buffer_of_one_row": Fault(
        family="", says="a dp rank without tokens returns one row", words=("[1, 64]", "[0, 64]"),
        shows="ep2.dp2.tokens0_5 ep4.dp4.tokens3_0_4_5", lawful="ep2.dp2 ep2.dp2.tokens1_5", how={"forward": _one_row_at_least},
    ),
    "crash_without_tokens": Fault(
        family="", says="a dp rank without tokens raises", words=("invalid configuration argument",),
        shows="ep2.dp2.tokens0_5 ep4.dp4.tokens3_0_4_5", lawful="ep2.dp2", how={"forward": _crash_without_tokens},
    ),
    "capacity": Fault(
        family="G9", says="each expert serves its first three tokens", words=("first 3 tokens",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp2.ep2.tokens3 ep2.dp2.tokens1_2", how={"served": _first_three},
    ),
    "capacity_by_sender": Fault(
        family="G9", says="each expert serves the first three tokens of each sender", words=("token-expert pairs do not count",), on="send",
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp2.ep2.tokens3 ep2.dp2.tokens3_2", how={"served": _first_three},
    ),
    "odd_row_dropped": Fault(
        family="G9 A6 E3", says="R of the last row is lost if a rank has an odd number of them", words=("in 1 of",),
        shows="tp2.ep2 tp4.ep2 ep2.dp2 tp2.ep4.dp2", lawful="tp2.ep2.tokens32 ep2.dp2.tokens4_2", how={"routed": _whole_pairs},
    ),
    # -- more of the same kinds, where a name is easily mistaken
    "first_rows_for_all": Fault(
        family="B12 H2", says="every dp rank gets R's first rows, those of the first", words=("gather and scatter|rows of R",),
        shows="dp2 ep2.dp2 tp2.ep4.dp2", lawful="tp2 tp4.ep2", how={"scattered": _first_rows_for_all},
    ),
    "summed_over_dp_too": Fault(
        family="B15 B12", says="the output is summed over dp as well: tokens of other dp ranks are added", words=("sum over data-parallel ranks",),
        shows="dp2.tokens32 ep2.dp2.tokens32 tp2.ep4.dp2.tokens32", lawful="tp2 tp4.ep2", how={"total": _summed_over_dp_too},
    ),
    "expert_never_loaded": Fault(
        family="F8 F7 G9", says="one expert of the last ep rank is zero", words=("expert",),
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"load": _second_expert_never_loaded},
    ),
    "piece_never_loaded": Fault(
        family="F8", says="the last rank's piece of its first expert is zero", words=("expert",),
        shows="tp2 tp4.ep2 tp2.ep2.dp2", how={"load": _one_piece_never_loaded},
    ),
    "down_of_the_next_piece": Fault(
        family="F9", says="w2's piece is that of the next rank", words=("w2",),
        shows="tp2 tp4.ep2 tp2.dp2 tp2.ep2.dp2", lawful="tp1 tp4.ep4 tp2.ep4.dp2", how={"load": _down_of_the_next_piece},
    ),
    "halves_cut_as_one": Fault(
        family="F1 F2 F9", says="w13 is cut into pieces across gate and up", words=("gate",), models=("deepseek_v3", "mixtral", "qwen2_moe"),
        shows="tp2 tp4.ep2 tp2.dp2 tp2.ep2.dp2", lawful="tp1 tp4.ep4 tp2.ep4.dp2", how={"load": _halves_cut_as_one},
    ),
    "scaled_on_rank_0_alone": Fault(
        family="A2", says="rank 0's router multiplies by s, the others' do not", words=("rank",), models=WITH_SCALE,
        shows="tp2 tp4.ep4 tp4.ep2", lawful="tp1", how={"route": _scaled_on_rank_0_alone},
    ),
    "stale_bias_on_rank_1": Fault(
        family="D2", says="rank 1 routes without the correction bias", words=("rank 1",), models=("deepseek_v3",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 ep2.dp2", lawful="tp1", how={"choose": _routed_by_a_stale_bias},
    ),
    "last_row_twice": Fault(
        family="G3 E4 G9", says="R of an odd last row counts twice", words=("in 1 of", "twice"),
        shows="tp2.ep2 tp4.ep2 ep2.dp2", lawful="tp2.ep2.tokens32 ep2.dp2.tokens32", how={"routed": _last_row_twice},
    ),
    "partial_in_bf16": Fault(
        family="P1", says="partial sums travel in bf16", words=("bf16",),
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"total": _partial_in_bf16},
    ),
    "own_answers_forgotten": Fault(
        family="G9 B14", says="experts on the token's own rank are left out", words=("pairs do not count|lacks its own share",), on="send",
        models=SPREAD, shows="tp2.ep2 tp4.ep4 ep2.dp2 tp2.ep4.dp2", how={"combined": _own_answers_forgotten},
    ),
    "only_own_answers": Fault(
        family="G9 B7 B1", says="experts on other ranks than the token's are left out", words=("pairs do not count|not reduced|one rank's partial sum",), on="send",
        models=SPREAD, shows="tp2.ep2 tp4.ep4 ep2.dp2 tp2.ep4.dp2", lawful="tp2 tp1", how={"combined": _only_own_answers},
    ),
    "shared_cut_over_tp_rows": Fault(
        family="B5", says="S of a rank's own rows is a piece", words=("S",), models=WITH_SHARED, on="rows",
        shows="tp2.ep2 tp4.ep4 tp2.ep4.dp2 tp4.ep4.sp4", lawful="tp1 ep2.dp2", how={"load": _shared_cut_over_tp},
    ),
    "reduced_after_the_join": Fault(
        family="B2", says="complete rows are joined, then summed over tp", words=("reduced twice",), on="rows",
        shows="tp2.ep2 tp4.ep4 tp2.ep4.dp2 tp4.ep4.sp4", lawful="tp1 ep2.dp2", how={"joined": _reduced_after_the_join},
    ),
    "summed_instead_of_joined": Fault(
        family="B12 B11 H2", says="rows of different tokens are added", words=("tokens",), on="rows",
        shows="tp2.ep2 tp4.ep4 tp2.ep4.dp2 tp4.ep4.sp4", lawful="tp1 ep2.dp2", how={"joined": _summed_instead_of_joined},
    ),
    "joined_in_reverse": Fault(
        family="B12 H2", says="rows are joined in the reverse order of ranks", words=("row",), on="rows",
        shows="tp2.ep2.tokens32 tp4.ep4.tokens32 tp2.ep4.dp2.tokens32 tp4.ep4.sp4.tokens32", lawful="tp1 ep2.dp2", how={"joined": _joined_in_reverse},
    ),
    "bias_on_rank_0_alone": Fault(
        family="F5 B10", says="only rank 0 adds the second biases, and those of its own experts", words=("bias|share of B",), models=WITH_BIAS,
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"load": _bias_on_rank_0_alone},
    ),
    "as_many_as_dp_rank_0": Fault(
        family="G9 A6", says="dp ranks get no more rows of R than the first has tokens", words=("tokens|rows",),
        shows="dp2.tokens4_20 ep2.dp2.tokens3_9 tp2.ep4.dp2.tokens9_24", lawful="dp2.tokens20_4 dp2 tp2", how={"scattered": _as_many_as_dp_rank_0},
    ),
    "chunks_by_own_count": Fault(
        family="", says="each rank runs as many chunks of 8 rows as it has", words=("collective .* differs",),
        shows="dp2.tokens20_4 ep2.dp2.tokens9_7 tp2.ep4.dp2.tokens9_24", lawful="dp2.tokens32 dp2.tokens9_12 tp2", how={"routed": _chunks_by_own_count},
    ),
    "reduced_early_on_rank_0": Fault(
        family="", says="rank 0 reduces S before it dispatches, the others after", words=("collective .* differs",), models=WITH_SHARED,
        on="send", shows="tp2.ep2 tp4.ep4 tp2.ep4.dp2", lawful="tp1", how={"forward": _reduced_early_on_rank_0},
    ),
    "averaged_over_pieces": Fault(
        family="B13", says="the ranks that share an expert average its result", words=("R", "averaged"),
        shows="tp2 tp4.ep2 tp2.dp2 tp2.ep2.dp2", lawful="tp1 tp4.ep4 tp2.ep4.dp2", how={"experts": _scaled_by_pieces},
    ),
    "weights_in_reverse_beyond_rank_0": Fault(
        family="D15", says="ep ranks beyond the first pair weights and experts in reverse", words=("weight",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 tp2 tp2.dp2", how={"experts": _weights_of_the_neighbouring_slot},
    ),
    "blocks_of_4_on_the_last_rank": Fault(
        family="G9 F7", says="the last rank computes whole blocks of 4 rows alone", words=("pairs do not count|counted 0",),
        shows="tp4.ep4 tp2.ep2 tp2.ep4.dp2", how={"served": _dropped_on_the_last_rank},
    ),
    "map_shifted": Fault(
        family="F7", says="the expert map is shifted by one over all ranks", words=("off by",),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2 tp2", how={"locally": _one_further_over_all},
    ),
    "half_a_shared_piece_lost": Fault(
        family="E3 B8", says="the last tp rank lost half of its piece of S", words=("S",), models=WITH_SHARED,
        shows="tp2 tp4.ep4 tp2.ep4.dp2", how={"shared": _fewer_columns_on_the_last},
    ),
    # -- traps: what resembles another fault, several at once, and what no rule can explain
    "constant_on_each_rank": Fault(
        family="", says="each rank adds 0.5 before the sum", words=("number|unknown",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"total": _constant_on_each_rank},
    ),
    "noise_on_one_rank": Fault(
        family="", says="the last tp rank's partial sum has noise", words=("unknown",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"total": _noise_on_one_rank},
    ),
    "five_percent_on_one_rank": Fault(
        family="", says="the last rank's w2 is 1.05 of what it should be", words=("2.5[56]|unknown|experts? 1",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2",
        how={"load": _five_percent_on_the_last_rank},
    ),
    "two_experts_exchanged": Fault(
        family="F7", says="the first and the last expert are loaded in each other's place", words=("expert",), shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1.tokens0",
        how={"place": _two_experts_exchanged, "number": _numbered_in_order},
    ),
    "square_roots_on_rank_1": Fault(
        family="", says="rank 1 takes the square root of the weights", words=("no rule|unknown",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"experts": _square_roots_on_rank_1},
    ),
    "previous_tokens_on_rank_1": Fault(
        family="H2", says="rank 1's experts read the row before, along the right routes", words=("rank 1",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2",
        how={"experts": _previous_tokens_on_rank_1},
    ),
    "share_of_the_tokens": Fault(
        family="", says="R is multiplied by the dp rank's part of all tokens", words=("R",), shows="dp2.tokens9_24 tp2.ep4.dp2.tokens24_8",
        lawful="tp2 tp4.ep2", how={"scattered": _shared_of_its_share},
    ),
    "slots_lost_on_rank_1": Fault(
        family="G9", says="rank 1 loses every third token of each expert", words=("pairs do not count",), shows="tp2.ep2 tp4.ep4 tp2.ep4.dp2",
        how={"served": _every_third_slot_lost_on_rank_1},
    ),
    "last_rank_subtracted": Fault(
        family="sign", says="the last tp rank's partial sum is subtracted", words=("-s|subtracted",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"total": _last_rank_subtracted},
    ),
    "clamp_lost_on_one_rank": Fault(
        family="F3", says="the last rank's experts do not clamp", words=("clamp",), models=WITH_BIAS, shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2",
        how={"activated": _clamp_lost_on_the_last_rank},
    ),
    "shared_gate_lost_on_one_rank": Fault(
        family="E1", says="the last tp rank's piece of S is not gated", words=("gate",), models=("qwen2_moe",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2",
        how={"shared": _gate_lost_on_one_rank},
    ),
    "routed_twice_shared_never": Fault(
        family="B2 B5", says="R is summed twice, S never", words=("R x tp", "left partial|S is not reduced"), models=WITH_SHARED, shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2",
        how={"finish": _routed_twice_shared_never},
    ),
    "wraps_and_shared_per_rank": Fault(
        family="G1 B3", says="-1 wraps to the last local expert, and S is summed once per rank", words=("unknown|S x|-1",), models=WITH_SHARED,
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"locally": _minus_one_wraps, "load": _shared_whole},
    ),
    "off_by_one_and_scaled_twice": Fault(
        family="F7 A1", says="ranks beyond the first compute the next of their experts, and s counts twice", words=("off by|s.2|twice",),
        models=WITH_SCALE, shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"locally": _one_further, "experts": _scaled_again_with_ep},
    ),
    "one_nan_on_the_last_dp_rank": Fault(
        family="G5", says="one number of the last dp rank's second token is NaN", words=("NaN in 1 of", "token 18"), shows="dp2 tp2.ep4.dp2",
        lawful="dp2.tokens5_1", how={"total": _one_nan_on_the_last_dp_rank},
    ),
    "late_on_the_last_rank": Fault(
        family="", says="the last rank's experts read other hidden states", words=("unknown",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", how={"experts": _late_on_the_last_rank},
    ),
    "one_pair_exchanged": Fault(
        family="H2 B11 B12", says="the last row of one dp rank and the first of the next are exchanged", words=("token 1[67]|tokens 16, 17|16, 17",),
        shows="dp2 tp2.ep4.dp2", lawful="tp2 dp2.tokens0_5", how={"scattered": _one_pair_exchanged},
    ),
    "columns_rolled_on_one_rank": Fault(
        family="H4", says="the last tp rank's columns are rolled by one before the sum", words=("column|unknown",), shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2",
        how={"total": _columns_rolled_on_one_rank},
    ),
    # -- decisions that outlive their reason
    "summed_again_beyond_16": Fault(
        family="B2", says="beyond 16 tokens the sum is made twice", words=("reduced twice",),
        shows="tp2 tp4.ep2 tp2.ep4.dp2.tokens20_24 tp2.ep4.dp2.tokens20_4", lawful="tp2.tokens16 tp4.ep2.tokens7 tp2.ep4.dp2.tokens9_9 ep2.dp2",
        how={"total": _summed_again_beyond_16},
    ),
    "not_summed_below_tp": Fault(
        family="B1 B8", says="with fewer tokens than ranks nothing is summed", words=("reduced|sum over tp is missing",),
        shows="tp4.tokens3 tp4.ep2.tokens2 tp4.ep8.dp2.tokens2_9", lawful="tp4 tp4.ep2.tokens4 tp2.ep4.dp2", how={"total": _not_summed_below_tp},
    ),
    "sizes_of_the_first_call": Fault(
        family="", says="the sizes of the first call are used for the second", words=("sizes",),
        shows="dp2 ep2.dp2 tp2.ep4.dp2", lawful="dp2.tokens0", how={"forward": _warmed_up, "sizes": _remembered_sizes},
    ),
    "routes_of_the_first_call": Fault(
        family="H2 D15", says="the second call is routed as the first", words=("route",),
        shows="tp2.ep2 tp2 ep2.dp2 tp2.ep4.dp2", lawful="tp2.tokens1", how={"forward": _warmed_up_with_as_many, "route": _remembered_routes},
    ),
    "table_of_the_first_call": Fault(
        family="B11 H2", says="answers of the second call are added by the rows of the first", words=("(wrong|other) tokens",), on="send", models=SPREAD,
        shows="tp2.ep2 tp4.ep4 ep2.dp2 tp2.ep4.dp2", lawful="tp2.ep2.tokens1",
        how={"forward": _warmed_up_with_as_many, "combined": _remembered_table},
    ),
    "frozen_plan_swapped_to_reduced": RunnerFault(
        family="B2", says="the plan of a partial kernel serves one that reduces", words=("R x tp",),
        shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", calls=_swapped_with_a_frozen_plan("reduced"),
    ),
    "frozen_plan_swapped_to_partial": RunnerFault(
        family="B1 B8", says="the plan of a kernel that reduces serves a partial one", words=("routed part is not reduced|R is not reduced|sum over tp is missing",),
        kernel="reduced", shows="tp2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", lawful="tp1 ep2.dp2", calls=_swapped_with_a_frozen_plan("partial"),
    ),
    "frozen_plan_swapped_to_sending": RunnerFault(
        family="B2", says="the plan of a partial kernel serves an all-to-all that returns complete rows", words=("R x tp",),
        shows="tp2.ep2 tp4.ep4 tp2.ep4.dp2", lawful="ep2.dp2", calls=_swapped_with_a_frozen_plan("deepep_ht"),
    ),
    "micro_batches_share_a_slot": RunnerFault(
        family="C2 H2 E3", says="both micro-batches read the shared output of the second", words=("rows of S stand at the wrong tokens",), models=WITH_SHARED,
        shows="tp2.tokens32 tp4.ep4.tokens32 tp2.ep4.dp2.tokens32", lawful="tp1.tokens0", calls=_micro_batches_with_one_slot,
    ),
    "placed_without_weights": RunnerFault(
        family="F7", says="ids follow the new placement, weights the old", words=("right weights go to wrong experts",), models=("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", calls=_placed_with_a_frozen("weights"),
    ),
    "placed_without_ids": RunnerFault(
        family="F7", says="weights follow the new placement, ids the old", words=("right weights go to wrong experts",), models=("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"),
        shows="tp2.ep2 tp4.ep4 tp4.ep2 tp2.ep4.dp2", calls=_placed_with_a_frozen("ids"),
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Each fault's build by its name, and each right layer by right_NAME."""
    if name in FAULTS:
        return FAULTS[name].build
    if name.removeprefix("right_") in RIGHT:
        return RIGHT[name.removeprefix("right_")]
    raise AttributeError(f"no fault {name!r}; one of {', '.join(FAULTS)}")


def case_text(model: str, grid: str) -> str:
    """'tp2.dp2' of a table -> 'deepseek_v3@tp2.dp2.tokens33'."""
    return f"{model}@{grid}" if "tokens" in grid else f"{model}@{grid}.tokens33"


def table(names: list[str]) -> None:
    """Prints fault | grid | verdict | family | diagnosis, each with its standing, and at the end who stands how."""
    from harness.case import parse
    from harness.check import check
    from harness.systems import resolve

    torch.set_num_threads(1)
    stand: dict[str, list[str]] = {}
    for name in names or FAULTS:
        fault, system = FAULTS[name], resolve(f"{__file__}:{name}")
        print(f"\n{name} [{fault.family}] ({fault.models[0]}, {fault.on}): {fault.says}")
        for wanted, grids in (("mismatch", fault.shows), ("ok", fault.lawful)):
            for grid in grids.split():
                try:
                    finding = check(parse(case_text(fault.models[0], grid)), system)
                except Exception as error:
                    stand.setdefault("!", []).append(f"{name}@{grid}")
                    print(f"! {grid} | the harness raised {type(error).__name__}: {error}")
                    continue
                mark = "=" if finding.verdict.value == wanted else "!"
                if wanted == "mismatch" and mark == "=":
                    mark = standing(fault, finding.family, finding.diagnosis)
                stand.setdefault(mark, []).append(f"{name}@{grid}")
                print(f"{mark} {grid} | {finding.verdict.value} | {finding.family} | {finding.diagnosis}")
    print()
    for mark, what in STANDINGS.items():
        print(f"{mark} {len(stand.get(mark, []))} {what}: {' '.join(stand.get(mark, [])) if mark in '!Ww?' else ''}")


STANDINGS = {
    "=": "right where the fault changes nothing", "+": "named", "w": "named with other words than these", "?": "without a name",
    "W": "named as another fault", "!": "with another verdict",
}  # fmt: skip


def standing(fault: Fault, family: str | None, diagnosis: str) -> str:
    """A key of STANDINGS, for a mismatch that is one."""
    told = all(re.search(word, diagnosis) for word in fault.words)
    if family is None:
        return "+" if told and not fault.family else "?"
    if family not in fault.family.split():
        return "W"
    return "+" if told else "w"


if __name__ == "__main__":
    table(sys.argv[1:])
