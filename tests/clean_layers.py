"""Right layers written in other styles than ours, through the public contract alone: none of them may be accused.

    moe-harness check --system tests/clean_layers.py:loop --seed 1,2,3 --tokens 1,7,33,64
    moe-harness check --system tests/clean_layers.py:sent deepseek_v3@tp2.ep4.dp2.bf16.tokens9_0

Each style is data (STYLES), and each of its names is a build function. All of them are right on every legal grid. They
share no code with the runner, the oracle or the naive runs. M tokens of this rank, N rows that reach it, H hidden,
L latent (H without one), i this rank's share of the width, E experts of this rank, K top-k.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reference.spec import Activation, MoESpec, Routing, Shared

Here = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [N, L], w [N, K], ids [N, K] -> [N, L]


@dataclass(frozen=True, kw_only=True)
class Style:
    """One legal way to write a layer.

    wide: everything in float32, collectives too, and one rounding at the end.
    experts: "loop" over them with index_add, "slots" gathers the weights of each slot, "dense" runs every expert on
        every token, "grouped" sorts the slots and calls torch._grouped_mm (bf16; a loop over the groups elsewhere).
    product: "native" in the dtype; "chain" adds one float32 product after the other.
    reversed: experts from the last to the first.    sum_in: how the K results are added.
    weigh: where the router weight multiplies: the result after it is stored or before, or the activation before w2.
    weights_in: "dtype" casts the router weights.    act: "fused" rounds once, "plain" after every operation.
    scale: who multiplies by s: the weights, the output, w2 and b2 when loaded; "unit" returns R + S/s.
    reduce: all_reduce; reduce_scatter and all_gather; all_gather and a local sum in reversed order.
    shared: reduced with the routed part or apart from it.
    ranks: how the ranks of a grid share the experts. "alone": each tp group computes its own tokens and knows no other.
        "gather": all tokens of the dp group meet this rank's piece of its ep rank's experts, and sums are scattered home.
        "send": rows travel to the ep ranks that hold one of their experts, and home again; tp ranks with the same piece
        take turns. "rows": the same, but the tp ranks take different rows through the whole layer and gather them.
    """

    wide: bool = False
    experts: Literal["loop", "slots", "dense", "grouped"] = "loop"
    product: Literal["native", "chain"] = "native"
    reversed: bool = False
    sum_in: Literal["dtype", "fp32"] = "dtype"
    weigh: Literal["stored", "unstored", "activation"] = "stored"
    weights_in: Literal["dtype", "fp32"] = "fp32"
    act: Literal["fused", "plain"] = "fused"
    scale: Literal["weights", "output", "w2", "unit"] = "weights"
    reduce: Literal["all_reduce", "scatter_gather", "reversed"] = "all_reduce"
    shared: Literal["together", "apart"] = "together"
    ranks: Literal["alone", "gather", "send", "rows"] = "alone"


STYLES = {
    "loop": Style(),
    "slots": Style(experts="slots", scale="output", shared="apart", weights_in="dtype"),
    "wide": Style(wide=True, experts="dense", scale="output"),
    "everything_in_dtype": Style(
        reversed=True, weights_in="dtype", act="plain", scale="output", reduce="reversed", shared="apart"
    ),
    "folded": Style(experts="slots", weigh="activation", scale="w2", reduce="scatter_gather"),
    "dense": Style(experts="dense", weigh="unstored", sum_in="fp32", reduce="reversed"),
    "grouped": Style(experts="grouped", weigh="unstored", sum_in="fp32", reduce="scatter_gather", shared="apart"),
    "chain": Style(product="chain", reversed=True, weights_in="dtype", act="plain", reduce="reversed"),
    "units": Style(scale="unit", weights_in="dtype", act="plain", shared="apart"),
    "gathered": Style(ranks="gather", experts="dense", scale="output"),
    "sent": Style(
        ranks="send", weights_in="dtype", act="plain", sum_in="fp32", reduce="scatter_gather", shared="apart"
    ),
    "rows": Style(ranks="rows", experts="slots", weigh="activation", scale="w2", reversed=True),
}


@dataclass(frozen=True)
class Piece:
    """One of `count` equal pieces of a width."""

    place: int
    count: int

    def of(self, t: Tensor, dim: int) -> Tensor:
        return t.chunk(self.count, dim)[self.place]

    def once(self, t: Tensor) -> Tensor:
        """A bias that only one piece may add."""
        return t if self.place == 0 else torch.zeros_like(t)

    def halves(self, t: Tensor, gated: bool, interleaved: bool) -> tuple[Tensor | None, Tensor]:
        """This piece's gate and up rows of a tensor [E, N, ...]; no gate where there is none."""
        if not gated:
            return None, self.of(t, 1)
        gate, up = (t[:, 0::2], t[:, 1::2]) if interleaved else t.chunk(2, 1)
        return self.of(gate, 1), self.of(up, 1)


class Layer:
    """One rank's layer in one style."""

    def __init__(self, spec: MoESpec, weights: dict[str, Tensor], comm: object, style: Style) -> None:
        self.spec, self.comm, self.style = spec, comm, style
        self.s = spec.scale
        if style.scale == "unit" and self.s != 1.0:
            self.output_unit = 1.0 / self.s
        if style.wide:
            weights = {name: tensor.float() for name, tensor in weights.items()}
        self.weights = weights
        self.expert_piece, self.shared_piece = self.assigned()
        vision = {name.removeprefix("vision_"): t for name, t in weights.items() if name.startswith("vision_")}
        self.branches = [(spec.routing, spec.experts, weights, self.cut(spec.experts, weights))]
        if spec.vision is not None:
            self.branches.append(
                (spec.vision.routing, spec.vision.experts, vision, self.cut(spec.vision.experts, vision))
            )
        self.shared_cut = None if spec.shared is None else self.cut_shared(spec.shared, weights)

    # -- loading -------------------------------------------------------------------------------------------------------

    def assigned(self) -> tuple[Piece, Piece]:
        """This rank's piece of each routed expert that it holds, and of the shared ones."""
        tp, own = self.comm.tp, self.comm.world_size // self.comm.ep.size
        over_tp = Piece(tp.rank, tp.size)
        if self.style.ranks == "gather":
            return Piece(self.comm.rank % own, own), over_tp
        if self.style.ranks == "send":  # only the tp ranks have the token, so its experts' pieces have to be among them
            return Piece(self.comm.rank % own, own) if tp.size % own == 0 else Piece(0, 1), over_tp
        return (Piece(0, 1), Piece(0, 1)) if self.style.ranks == "rows" else (over_tp, over_tp)

    def held(self, count: int) -> range:
        """Which of so many experts this rank has a piece of."""
        return range(count) if self.style.ranks == "alone" else dealt(count, self.comm.ep.size)[self.comm.ep.rank]

    def cut(self, experts, weights: dict[str, Tensor]) -> dict[str, Tensor | None]:
        held, piece = list(self.held(len(weights["w13"]))), self.expert_piece
        w13, w2 = weights["w13"][held], weights["w2"][held]
        if experts.transposed:
            w13, w2 = w13.mT, w2.mT
        gated, interleaved = experts.activation.gated, experts.layout == "interleaved"
        gate, up = piece.halves(w13, gated, interleaved)
        cut = {"gate": gate, "up": up, "w2": piece.of(w2, 2), "gate_b": None, "up_b": None, "b2": None}
        if experts.bias:
            cut["gate_b"], cut["up_b"] = piece.halves(weights["b13"][held], gated, interleaved)
            cut["b2"] = piece.once(weights["b2"][held])
        if self.scale_in == "w2":
            cut["w2"] = cut["w2"] * self.s
            cut["b2"] = None if cut["b2"] is None else cut["b2"] * self.s
        return cut

    def cut_shared(self, shared: Shared, weights: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The shared MLP as an expert, E = 1."""
        piece = self.shared_piece
        gate, up = piece.halves(weights["shared_w13"][None], shared.activation.gated, False)
        cut = {
            "gate": gate,
            "up": up,
            "w2": piece.of(weights["shared_w2"][None], 2),
            "gate_b": None,
            "up_b": None,
            "b2": None,
        }
        if shared.bias:
            cut["gate_b"], cut["up_b"] = piece.halves(weights["shared_b13"][None], shared.activation.gated, False)
            cut["b2"] = piece.once(weights["shared_b2"][None])
        return cut

    @property
    def scale_in(self) -> str:
        """An input weight cannot carry s: the expert is not linear."""
        on_input = self.spec.routing.weight_on == "input" and self.style.scale == "weights"
        return "output" if on_input else self.style.scale

    # -- the layer -----------------------------------------------------------------------------------------------------

    def __call__(self, hidden_states: Tensor, modality: Tensor | None = None) -> Tensor:
        if self.style.ranks != "rows":
            return self.forward(hidden_states, modality)
        tp = self.comm.tp
        mine = [None if t is None else t.tensor_split(tp.size)[tp.rank] for t in (hidden_states, modality)]
        return tp.all_gather(self.forward(*mine))

    def forward(self, hidden_states: Tensor, modality: Tensor | None) -> Tensor:
        spec, style, scale = self.spec, self.style, self.scale_in
        x = hidden_states.float() if style.wide else hidden_states
        if spec.vision is None:
            routed, zero = self.branch(x, *self.branches[0])
        else:
            routed, zero = torch.empty_like(x), torch.zeros_like(x)
            for kind, branch in enumerate(self.branches):
                rows = modality == kind
                routed[rows], zero[rows] = self.branch(x[rows], *branch)
        if scale == "output":
            routed, zero = routed * self.s, zero * self.s
        shared = None if spec.shared is None else self.shared(x, spec.shared)
        bias = self.weights["fc2_latent_bias"] if spec.experts.latent_bias else None
        if scale == "unit":
            shared = None if shared is None else shared * (1.0 / self.s)
            bias = None if bias is None else bias * (1.0 / self.s)
        together = shared is not None and style.shared == "together"
        y = self.reduced(routed + shared if together else routed)
        y = y + zero if spec.routing.num_zero_experts else y
        y = y if bias is None else y + bias
        if shared is not None and style.shared == "apart":
            y = y + self.reduced(shared)
        return (y * spec.output.share).to(hidden_states.dtype)

    def reduced(self, partial: Tensor) -> Tensor:
        tp, rows = self.comm.tp, partial.shape[0]
        if self.style.ranks == "rows":
            return partial
        if self.style.reduce == "all_reduce":
            return tp.all_reduce(partial)
        if self.style.reduce == "scatter_gather":
            padded = F.pad(partial, (0, 0, 0, -rows % tp.size))
            return tp.all_gather(tp.reduce_scatter(padded))[:rows]
        total, *others = reversed(tp.all_gather(partial).chunk(tp.size) if rows else [partial])
        for other in others:
            total = total + other
        return total

    def branch(self, x: Tensor, routing: Routing, experts, named, cut) -> tuple[Tensor, Tensor]:
        """This rank's R and the whole Z, both [M, H], with s where the style has it before the output."""
        w_MK, ids_MK = self.route(x, routing, named)
        if self.scale_in == "weights":
            w_MK = w_MK * self.s
        if self.style.weights_in == "dtype":
            w_MK = w_MK.to(x.dtype)
        zero_MK = ids_MK >= routing.num_experts
        zero = ((w_MK * zero_MK).sum(1, keepdim=True) * x).to(x.dtype)
        w_MK, ids_MK = w_MK.masked_fill(zero_MK, 0.0), ids_MK.clamp(max=routing.num_experts - 1)
        x_ML = x
        if experts.latent_size is not None:
            x_ML = self.linear(x, named["fc1_latent"], named.get("fc1_latent_bias"))
        if routing.weight_on == "input":
            x_ML, w_MK = (x_ML * w_MK).to(x.dtype), torch.ones_like(w_MK)
        held, run = self.held(routing.num_experts), getattr(self, self.style.experts)
        homes = dealt(routing.num_experts, self.comm.ep.size)

        def here(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
            """What this rank's experts add to N rows; another rank's expert weighs nothing here."""
            away = (ids < held.start) | (ids >= held.stop)
            if len(x) == 0 or held.start == held.stop:
                return torch.zeros_like(x)
            w, ids = w.masked_fill(away, 0.0), (ids - held.start).masked_fill(away, 0)
            return run(x, w, ids, cut, experts.activation).to(x.dtype)

        routed = getattr(self, self.style.ranks)(here, homes, x_ML, w_MK, ids_MK)
        if experts.latent_size is not None:
            routed = self.linear(routed, named["fc2_latent"], None)
        return routed, zero

    # -- ranks ---------------------------------------------------------------------------------------------------------
    # here: what this rank's experts add to N rows.    homes: the experts of each ep rank.
    # Each returns [M, L], to be summed over tp, but rows the whole of it.

    def alone(self, here: Here, homes: list[range], x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return here(x, w, ids)

    def gather(self, here: Here, homes: list[range], x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        dp = self.comm.dp
        if dp.size == 1:
            return here(x, w, ids)
        sizes = dp.all_gather(torch.tensor([len(x)])).tolist()
        return dp.reduce_scatter(here(*(dp.all_gather(t) for t in (x, w, ids))), sizes=sizes)

    def send(self, here: Here, homes: list[range], x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        tp, pieces = self.comm.tp, self.expert_piece.count
        mine = torch.arange(len(x)).tensor_split(tp.size // pieces)[tp.rank // pieces]
        y = torch.zeros_like(x)
        y[mine] = self.visit(here, homes, x[mine], w[mine], ids[mine])
        return y

    def rows(self, here: Here, homes: list[range], x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        ep = self.comm.ep
        sent = visitors(ids, homes)
        came = [ep.all_to_all([t[rows] for rows in sent]) for t in (x, w, ids)]
        back = ep.all_to_all([here(*each) for each in zip(*came, strict=True)])
        y = torch.zeros_like(x)
        for rows, answer in zip(sent, back, strict=True):
            y.index_add_(0, rows, answer)
        return y

    def visit(self, here: Here, homes: list[range], x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        """Each row to the ep ranks that hold one of its experts, in one tensor a rank, and their answers added at home."""
        ep = self.comm.ep
        sent = visitors(ids, homes)
        rows, counts = torch.cat(sent), [len(each) for each in sent]
        (x_N, came), (w_N, _), (ids_N, _) = (ep.all_to_all_single(t[rows], counts) for t in (x, w, ids))
        back, _ = ep.all_to_all_single(here(x_N, w_N, ids_N), came)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, rows, back.float()).to(x.dtype)

    # -- experts -------------------------------------------------------------------------------------------------------

    def linear(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        if self.style.product == "native":
            return F.linear(x, w, bias)
        total, wide_x, wide_w = x.new_zeros(*x.shape[:-1], w.shape[0], dtype=torch.float32), x.float(), w.float()
        for column in range(x.shape[-1]):
            total += wide_x[..., column, None] * wide_w[:, column]
        return (total if bias is None else total + bias.float()).to(x.dtype)

    def mlp(self, x: Tensor, cut, e: int, rule: Activation, w: Tensor | None = None) -> Tensor:
        """Expert e on some rows; w [m, 1] weighs the result as the style says."""
        at = {name: None if t is None else t[e] for name, t in cut.items()}
        gate = None if at["gate"] is None else self.linear(x, at["gate"], at["gate_b"])
        a = self.activated(gate, self.linear(x, at["up"], at["up_b"]), rule)
        return self.down(a, lambda a: self.linear(a, at["w2"], None), at["b2"], w, at["w2"])

    def down(
        self, a: Tensor, product: Callable[[Tensor], Tensor], b2: Tensor | None, w: Tensor | None, w2: Tensor
    ) -> Tensor:
        weigh = self.style.weigh
        if w is None:
            return product(a) if b2 is None else product(a) + b2
        if weigh == "activation":
            y = product((a * w).to(a.dtype))
            return y if b2 is None else y + (b2 * w).to(a.dtype)
        if weigh == "unstored" and self.style.experts == "loop":
            y = a.float() @ w2.float().mT
            return ((y if b2 is None else y + b2.float()) * w).to(a.dtype)
        y = product(a)
        return ((y if b2 is None else y + b2) * w).to(a.dtype)

    def activated(self, gate: Tensor | None, up: Tensor, rule: Activation) -> Tensor:
        dtype = up.dtype
        if self.style.act == "fused":
            gate, up = None if gate is None else gate.float(), up.float()
        if gate is None:
            return self.act(up, rule).to(dtype)
        if rule.clamp == "before":
            gate, up = gate.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
        act = self.act(gate, rule)
        if rule.clamp == "after":
            act, up = act.clamp(max=rule.limit), up.clamp(-rule.limit, rule.limit)
        return ((up + rule.up_offset) * act).to(dtype)

    def act(self, x: Tensor, rule: Activation) -> Tensor:
        if rule.kind == "silu":
            return x * torch.sigmoid(x * rule.alpha)
        if rule.kind == "relu2":
            return F.relu(x) ** 2
        return F.gelu(x, approximate="tanh" if rule.kind == "gelu_tanh" else "none")

    def loop(self, x: Tensor, w_MK: Tensor, ids_MK: Tensor, cut, rule: Activation) -> Tensor:
        total = torch.zeros_like(x, dtype=x.dtype if self.style.sum_in == "dtype" else torch.float32)
        experts = range(len(cut["w2"]))
        for e in reversed(experts) if self.style.reversed else experts:
            rows, slots = (ids_MK == e).nonzero(as_tuple=True)
            if len(rows):
                total.index_add_(0, rows, self.mlp(x[rows], cut, e, rule, w_MK[rows, slots, None]).to(total.dtype))
        return total

    def slots(self, x: Tensor, w_MK: Tensor, ids_MK: Tensor, cut, rule: Activation) -> Tensor:
        def into(name: str) -> Tensor | None:
            if cut[name] is None:
                return None
            h = torch.einsum("ml,mkil->mki", x, cut[name][ids_MK])
            return h if cut[name + "_b"] is None else h + cut[name + "_b"][ids_MK]

        a_MKi, w2 = self.activated(into("gate"), into("up"), rule), cut["w2"][ids_MK]
        b2 = None if cut["b2"] is None else cut["b2"][ids_MK]
        y_MKL = self.down(a_MKi, lambda a: torch.einsum("mki,mkli->mkl", a, w2), b2, w_MK[..., None], w2)
        return y_MKL.sum(1)

    def dense(self, x: Tensor, w_MK: Tensor, ids_MK: Tensor, cut, rule: Activation) -> Tensor:
        def into(name: str) -> Tensor | None:
            if cut[name] is None:
                return None
            h = torch.einsum("ml,eil->mei", x, cut[name])
            return h if cut[name + "_b"] is None else h + cut[name + "_b"]

        a_MEi = self.activated(into("gate"), into("up"), rule)
        y_MEL = torch.einsum("mei,eli->mel", a_MEi, cut["w2"])
        y_MEL = y_MEL if cut["b2"] is None else y_MEL + cut["b2"]
        w_ME = w_MK.new_zeros(y_MEL.shape[:2]).scatter_add(1, ids_MK, w_MK)
        return torch.einsum("me,mel->ml", w_ME.float(), y_MEL.float())

    def grouped(self, x: Tensor, w_MK: Tensor, ids_MK: Tensor, cut, rule: Activation) -> Tensor:
        order = ids_MK.flatten().argsort(stable=True)
        token, expert = order // ids_MK.shape[1], ids_MK.flatten()[order]
        ends = expert.bincount(minlength=len(cut["w2"])).cumsum(0)

        def each(rows: Tensor, w: Tensor) -> Tensor:
            aligned = rows.shape[1] % 8 == 0 and w.shape[1] % 8 == 0  # it wants strides of whole 16 bytes
            if rows.dtype == torch.bfloat16 and len(rows) and aligned:
                return torch._grouped_mm(rows, w.contiguous().mT, offs=ends.int())
            parts = rows.tensor_split(ends[:-1])
            return torch.cat([part @ w[e].T for e, part in enumerate(parts)])

        def into(name: str) -> Tensor | None:
            if cut[name] is None:
                return None
            h = each(x[token], cut[name])
            return h if cut[name + "_b"] is None else h + cut[name + "_b"][expert]

        y = each(self.activated(into("gate"), into("up"), rule), cut["w2"])
        y = y if cut["b2"] is None else y + cut["b2"][expert]
        weighed = y.float() * w_MK.flatten()[order, None].float()
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, token, weighed)

    def shared(self, x: Tensor, shared: Shared) -> Tensor:
        y = self.mlp(x, self.shared_cut, 0, shared.activation)
        return y * torch.sigmoid(self.linear(x, self.weights["shared_gate"], None)) if shared.sigmoid_gate else y

    # -- router --------------------------------------------------------------------------------------------------------

    def route(self, x: Tensor, routing: Routing, named: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Weights without s and ids, [M, K]; in the dtype wherever the page says that the model is."""
        rounds = routing.precision

        def at(t: Tensor, where: str) -> Tensor:
            return t.to(x.dtype) if where == "model" else t.float()

        r = at(x, rounds.logits)
        if routing.router_norm_epsilon is not None:
            wide = x.float()
            r = at(wide / (wide.pow(2).mean(-1, keepdim=True) + routing.router_norm_epsilon).sqrt(), rounds.logits)
            r = r * at(named["router_scale"], rounds.logits) * x.shape[1] ** -0.5
        bias = at(named["router_bias"], rounds.logits) if routing.router_bias else None
        logits = at(self.linear(r, at(named["router_weight"], rounds.logits), bias), rounds.scores)
        if routing.scoring_func == "sparsemixer":
            return sparsemixer(logits, routing.sparsemixer_epsilon)
        if routing.score_after_topk:
            best, ids = logits.topk(routing.top_k)
            w = scored(best, routing)
        else:
            scores = scored(logits, routing)
            ranked = scores + named["e_score_correction_bias"] if routing.correction_bias else scores
            ids = best_of_groups(ranked, routing).topk(routing.top_k).indices
            w = scores.gather(1, ids)
        w = at(w, rounds.weights)
        if routing.renormalize:
            total, epsilon = w.sum(1, keepdim=True), routing.renormalize_epsilon
            w = w / (total + epsilon if routing.renormalize_rule == "add" else total.clamp(min=epsilon))
        if routing.per_expert_scale:
            w = w * at(named["per_expert_scale"], rounds.weights)[ids]
        return w, ids


def dealt(count: int, ranks: int) -> list[range]:
    """Experts over ranks: neighbours together, the first ranks one more."""
    base, rest = divmod(count, ranks)
    starts = [rank * base + min(rank, rest) for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def visitors(ids: Tensor, homes: list[range]) -> list[Tensor]:
    """For each ep rank the rows that have an expert there."""
    return [((ids >= home.start) & (ids < home.stop)).any(1).nonzero()[:, 0] for home in homes]


def scored(logits: Tensor, routing: Routing) -> Tensor:
    if routing.scoring_func == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if routing.scoring_func == "sigmoid" else F.softplus(logits).sqrt()


def best_of_groups(ranked: Tensor, routing: Routing) -> Tensor:
    if routing.n_group == 1:
        return ranked
    groups = ranked.unflatten(1, (routing.n_group, -1))
    worth = groups.topk(2 if routing.group_score == "top2" else 1).values.sum(-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(1, worth.topk(routing.topk_group).indices, True)
    return groups.masked_fill(~kept[..., None], routing.group_fill).flatten(1)


def sparsemixer(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    weights, picks, left = [], [], logits
    for _ in range(2):
        best, pick = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * epsilon
        weights.append(left.masked_fill(far, float("-inf")).softmax(-1).gather(1, pick))
        picks.append(pick)
        left = left.scatter(1, pick, float("-inf"))
    return torch.cat(weights, 1), torch.cat(picks, 1)


def _build(spec: MoESpec, weights: dict[str, Tensor], comm: object, *, style: Style) -> Layer:
    return Layer(spec, weights, comm, style)


loop, slots, wide, everything_in_dtype, folded, dense, grouped, chain, units, gathered, sent, rows = (
    functools.partial(_build, style=style) for style in STYLES.values()
)
