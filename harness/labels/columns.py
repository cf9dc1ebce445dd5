"""Whose column is whose in a labelled layer, and the layer's spec.

Input and output columns are apart, so that a layer that adds its input, or reads what it has written, shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from reference.spec import Activation, Experts, MoESpec, VisionBranch

# Input columns: 1 in every token; the token's label; what the shared experts' sigmoid gate reads; then the router's.
CONST, LABEL, GATE, ROUTER = 0, 1, 2, 3
# A clamp that saturated gates reach and small labels do not, whatever the twin's own is.
LIMIT = 7.0


@dataclass(frozen=True, slots=True)
class Block:
    """Columns of one kind, from `first` on: of expert e (0 for the shared ones), piece or copy i, column first + e * each + i.

    part: "routed", "shared", "expert bias", "latent bias", "shared bias".    tensor: which holds them.
    copied: i is the rank whose copy it is; else i is the row of the intermediate dimension.
    """

    part: str
    tensor: str
    first: int
    count: int
    each: int
    copied: bool

    @property
    def stop(self) -> int:
        return self.first + self.count * self.each


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """spec: the labelled layer's.    ranks: of the grid, as many copies as there are of a bias."""

    spec: MoESpec
    ranks: int
    blocks: tuple[Block, ...]

    def block(self, tensor: str) -> Block:
        return next(block for block in self.blocks if block.tensor == tensor)


def labels(twin: MoESpec, ranks: int) -> Labels:
    """The labelled twin for grids of that many ranks: the same rules, experts ranks wide, or twice that on few ranks.

    Two rows for each rank keep apart what is halved and what is interleaved.
    """
    width = ranks if ranks > 4 else 2 * ranks
    fused = 1 if twin.shared is None else max(1, min(2, twin.shared.n_shared_experts))
    shared = None if twin.shared is None else replace(
        twin.shared, intermediate_size=fused * width, activation=_reached(twin.shared.activation)
    )  # fmt: skip
    vision = None if twin.vision is None else replace(twin.vision, experts=_sized(twin.vision.experts, width))
    spec = replace(twin, experts=_sized(twin.experts, width), shared=shared, vision=vision)
    blocks: list[Block] = []
    first = ROUTER + twin.routing.num_logits

    def put(part: str, tensor: str, count: int, each: int, *, copied: bool = False) -> None:
        nonlocal first
        blocks.append(Block(part, tensor, first, count, each, copied))
        first = blocks[-1].stop

    branches: tuple[tuple[str, MoESpec | VisionBranch | None], ...] = (("", spec), ("vision_", spec.vision))
    for prefix, branch in branches:
        if branch is None:
            continue
        put("routed", f"{prefix}w2", branch.routing.num_experts, width)
        if branch.experts.bias:
            put("expert bias", f"{prefix}b2", branch.routing.num_experts, ranks, copied=True)
    if spec.experts.latent_bias:
        put("latent bias", "fc2_latent_bias", 1, ranks, copied=True)
    if shared is not None:
        put("shared", "shared_w2", 1, fused * width)
        if shared.bias:
            put("shared bias", "shared_b2", 1, ranks, copied=True)
    hidden = -(-first // 32) * 32  # transformers' configurations want a multiple of their 32 heads
    latent = None if spec.experts.latent_size is None else hidden
    spec = replace(spec, hidden_size=hidden, experts=replace(spec.experts, latent_size=latent))
    return Labels(spec, ranks, tuple(blocks))


def _sized(experts: Experts, width: int) -> Experts:
    return replace(experts, intermediate_size=width, activation=_reached(experts.activation))


def _reached(activation: Activation) -> Activation:
    return activation if activation.limit is None else replace(activation, limit=LIMIT)
