"""Random right layers: case number n of a seed, always the same one and drawn without any other.

Cases come in blocks that share one model, dtype and seed of weights and a few numbers of tokens, so that a block needs
the oracle only a few times. All draws are Python's own, seeded by text, and so the same on every machine.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from harness import models
from harness.case import DTYPES, KERNELS, OPTIONS, Case, Grid, parse
from harness.errors import UsageError
from harness.nightly.numbers import BLOCK
from harness.nightly.ways import ORDERS, Way, choices, parse_way
from harness.systems.runner import RunnerSystem

_COUNTS = 3  # different numbers of tokens in a block
_FEW, _SOME, _MANY = (0, 1, 2, 3, 5, 7), (8, 40), (41, 200)
# (tp, dp) and how often, so that a case has 3 ranks on the average: its time goes by them
_RANKS = {
    (1, 1): 4, (2, 1): 4, (1, 2): 3, (3, 1): 3, (4, 1): 3, (2, 2): 2, (1, 3): 2, (8, 1): 1, (1, 4): 1, (2, 3): 1,
    (4, 2): 1, (2, 4): 1,
}  # fmt: skip
_LABELLED = 1 / 12  # of the cases: the labelled twin, whose coefficients are read exactly (`harness.probe`)
_CALLED = (
    1 / 300
)  # of the others: called some forty times, for what only state can get wrong; each costs as much as 40 cases
# how often a step is done in another way than the runner's own; pieces and chunks cost time
_OFTEN = {"layer": 0.1, "product": 0.25, "rows": 0.25}
_TRIES = 200
_RUNNER = RunnerSystem()


@dataclass(frozen=True, slots=True)
class Drawn:
    """One clean layer: a case of the runner and the way in which it is computed. The text names both, and is enough."""

    case: Case
    way: Way

    def __str__(self) -> str:
        return f"{self.case} {self.way}"

    @classmethod
    def parse(cls, text: str) -> Drawn:
        """The layer that 'CASE' or 'CASE WAY' names, as in 'mixtral@tp4.bf16 ranks=ring.sum=dtype'."""
        case, _, way = text.strip().partition(" ")
        return cls(parse(case), parse_way(way.strip() or "plain"))


@dataclass(frozen=True, slots=True)
class _Block:
    """What the cases of a block have in common."""

    model: str
    dtype: str
    weights: int
    size: str
    s: str
    quant: str
    counts: tuple[int, ...]


def draw(seed: int, number: int, names: Sequence[str]) -> Drawn:
    """Case number `number` of that seed, of one of the named models."""
    shared = _block(seed, number // BLOCK, tuple(names))
    rng = random.Random(f"nightly case {seed} {number}")
    for _ in range(_TRIES):
        case = _case(rng, shared)
        if case is not None and _RUNNER.supports(case) is None:
            return Drawn(_called(case, seed, number), _way(rng, case))
    raise UsageError(
        f"no layer of {shared.model} in {_TRIES} draws (seed {seed}, number {number}): a defect of the draw"
    )


@functools.lru_cache(maxsize=8)
def _block(seed: int, block: int, names: tuple[str, ...]) -> _Block:
    rng = random.Random(f"nightly block {seed} {block}")
    page = models.load(rng.choice(names))
    has_scale = page.real.routing.routed_scaling_factor is not None
    return _Block(
        model=page.model_type,
        dtype=rng.choice(DTYPES),
        weights=rng.getrandbits(64) if rng.random() < 0.05 else rng.getrandbits(20),
        size="wide" if page.wide is not None and rng.random() < 0.02 else "twin",
        s="real" if has_scale and rng.random() < 0.2 else "twin",
        quant="int8" if rng.random() < 0.15 else "none",
        counts=tuple(_tokens(rng) for _ in range(_COUNTS)),
    )


def _tokens(rng: random.Random) -> int:
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(_FEW)
    return rng.randint(*(_SOME if kind < 0.85 else _MANY))


def _case(rng: random.Random, shared: _Block) -> Case | None:
    """A case that follows the runner's plainest rules; None if its grid does not fit the widths."""
    grid, count = _grid(rng), rng.choice(shared.counts)
    try:
        plain = Case(
            model=shared.model, grid=grid, dtype=shared.dtype, tokens=count, seed=shared.weights, size=shared.size,
            s=shared.s, quant=shared.quant, split=_split(rng, count, grid.dp),
        )  # fmt: skip
        if rng.random() < _LABELLED:
            plain = replace(plain, size="labels", quant="none")
    except UsageError:
        return None
    routing, ranks = plain.spec.routing, grid.ranks
    kernels = KERNELS if grid.ep == ranks > 1 else ("partial", "reduced")
    kernel = rng.choice(kernels)
    kinds = {"partial": OPTIONS["experts"][0], "reduced": OPTIONS["experts"][0], "deepep_ll": ("auto", "batched")}
    has_scale, one_router = routing.routed_scaling_factor is not None, plain.spec.vision is None

    def option(name: str, where: bool = True, often: float = 0.5) -> str:
        values = OPTIONS[name][0]
        return rng.choice(values[1:]) if where and rng.random() < often else values[0]

    case = replace(
        plain,
        kernel=kernel,
        experts=rng.choice(kinds.get(kernel, ("auto", "slots"))),
        scale=option("scale", has_scale),
        placement=option("placement", grid.ep > 1),
        shared=option("shared", plain.spec.shared is not None and grid.ep == 1 and one_router, 0.2),
        pad=option("pad", often=0.3),
        junk=option("junk", grid.sp == 1, 0.3),
        swap=rng.choice(kernels) if one_router and rng.random() < 0.1 else "none",
    )
    case = replace(case, order=option("order", case.spec.shared is not None and case.shared == "separate"))
    case = replace(case, batches=option("batches", grid.sp == 1 and case.junk == "0" and one_router, 0.15))
    return replace(case, reduce=option("reduce", kernel == "partial" and grid.sp == 1, 0.3))


def _called(case: Case, seed: int, number: int) -> Case:
    """Once, or rarely by the script of many calls. By draws of its own, so that the other cases do not know of it."""
    if case.size == "labels" or random.Random(f"nightly calls {seed} {number}").random() >= _CALLED:
        return case
    return replace(case, calls="many")


def _grid(rng: random.Random) -> Grid:
    tp, dp = rng.choices(list(_RANKS), list(_RANKS.values()))[0]
    ep = rng.choice([n for n in range(1, tp * dp + 1) if tp * dp % n == 0])
    return Grid(tp=tp, ep=ep, dp=dp, sp=rng.choice((1, tp)) if ep == tp * dp else 1)


def _split(rng: random.Random, count: int, dp: int) -> tuple[int, ...] | None:
    """Even; or cut anywhere, so that a rank may have nothing; or all on one rank."""
    kind = rng.random()
    if dp == 1 or kind < 0.3:
        return None
    if kind < 0.5:
        place = rng.randrange(dp)
        return tuple(count if rank == place else 0 for rank in range(dp))
    cuts = [0, *sorted(rng.randint(0, count) for _ in range(dp - 1)), count]
    return tuple(after - before for before, after in itertools.pairwise(cuts))


def _way(rng: random.Random, case: Case) -> Way:
    """Each step on its own. Where all is fp32, nothing is left but orders."""
    found: dict[str, str] = {}
    for step, values in choices(case).items():
        if found.get("layer") == "wide":
            values = tuple(value for value in values if step in ORDERS and value not in ("native", "fp32"))
        if len(values) > 1 and rng.random() < _OFTEN.get(step, 0.5):
            found[step] = rng.choice(values[1:])
    return Way(**found)
