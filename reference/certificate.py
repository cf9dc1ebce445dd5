"""Checks a certificate of the runner's states with nothing but Python: `python -m reference.certificate FILE`.

The certificate says, for every legal way to build a layer and to call it, with which coefficient each source entered the
output of each rank and which collectives took place. This file decides by itself which states are legal, what the law
y = s * R + S + Z demands of each, and who reduces what; it shares no line with the code that wrote the certificate.

A state is a layer and a call, each one word from every axis of its space. There are two spaces, since what moves rows meets
no scale and no padding, and what scales and reduces meets no row and no expert:
  decisions: one token a rank. Columns: the token itself (zero experts), the routed shard that each rank computes, the
    expert bias as each rank would add it, the shared shard of each rank, the bias of the output transform.
  dispatch: several rows a rank, each with experts of its own, placed anyhow, junk behind the rows. Columns: the token, then
    each expert, in as many pieces as it is cut into, then the shared shard of each rank.
Exit code 0: the certificate holds; 1: it does not; 2: it cannot be read.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import itertools
import json
import struct
import sys
import zlib
from collections import Counter, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

S = 2.5  # the routed scaling factor of every layer that has one

# ---- the grids and the kernels


# tp * dp ranks; ep of them, or groups of them, with experts of their own; sp: 1, or tp ranks with rows of their own
Grid = namedtuple("Grid", "tp ep dp sp")


def all_grids() -> dict[str, Grid]:
    """By text. Rows may be split only over ranks with whole experts."""
    grids = {}
    for ranks in (1, 2, 3, 4, 8):
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        for tp, ep in itertools.product(divisors, divisors):
            for sp in (1, tp) if tp > 1 and ep == ranks else (1,):
                grid = Grid(tp, ep, ranks // tp, sp)
                grids[".".join(f"{name}{n}" for name, n in grid._asdict().items() if n > 1) or "tp1"] = grid
    return grids


GRIDS = all_grids()
PLAIN = ("partial", "reduced")  # every rank sees the tokens; "partial" leaves the sum over tp to the runner
ALL_TO_ALL = ("deepep_ht", "deepep_ll", "nvlink_one_sided", "nvlink_two_sided")
KERNELS = PLAIN + ALL_TO_ALL
# the first call of a layer, or one after a call with another kernel; whole or as two micro-batches in flight together
HISTORIES = ("first", *(f"after_{kernel}" for kernel in KERNELS))
HISTORIES += tuple(f"two_batches_{history}" for history in HISTORIES)


def has_transport(grid: Grid, kernel: str) -> bool:
    """All-to-all sends tokens to whole experts on other ranks."""
    return kernel in PLAIN or grid.ep == grid.tp * grid.dp > 1


def collectives(grid: Grid, kernel: str, monolithic: bool, mlp: bool, biased: bool, history: str) -> list[list[str]]:
    """Of a call, in order: the kernel's own, then what is left to reduce. The same on every rank.

    mlp: shared experts beside the kernel.    biased: the output transform has to see the complete R.
    """
    tp, _, dp, sp = grid
    swap, gather = ["all_to_all_single", "ep"], ["all_gather", "ep"]
    own = {
        "deepep_ht": [swap] * 4,  # rows, weights, ids; results
        "deepep_ll": [swap] * 3,  # rows, ids; results, weighed at home
        "nvlink_one_sided": [gather] + [swap] * 4,  # the size of the window first
        "nvlink_two_sided": [gather] * 3 + [swap] * 2,  # sizes, weights, ids of all; rows; results
    }.get(kernel, [])
    if kernel in PLAIN and (dp > 1 or sp > 1):  # all gather all sizes, rows, and logits or weights and ids
        over = "ep" if sp > 1 else "dp"
        own = [["all_gather", over]] * (3 if monolithic else 4) + [["reduce_scatter", over]]
    if kernel == "reduced" and sp == 1:
        own = [*own, ["all_reduce", "tp"]]
    if sp > 1 or tp * dp == 1:
        left = 0  # complete rows of its own on every rank
    elif kernel != "partial":
        left = int(mlp)  # R is complete, S alone is not
    elif biased:
        left = 1 + int(mlp)  # R before the biased transform, S beside it
    else:
        left = 1  # both at once, by the layer or by its caller
    batches = 2 if history.startswith("two_batches_") else 1
    return own * batches + [["all_reduce", "tp"]] * left * batches


# ---- the space of decisions

Layer = namedtuple(
    "Layer", "grid experts scaling shared order latent bias zero reduce pad share"
)  # fixed when it is built
Call = namedtuple("Call", "dtype kernel history")  # may change from one call to the next
LAYER_AXES = {
    "grid": tuple(GRIDS),
    "experts": ("modular", "monolithic"),
    "scaling": ("router", "plain", "kernel", "output", "absent", "absent_kernel", "absent_output"),
    "shared": ("none", "sharded", "gated", "fused"),
    "order": ("auto", "1", "2", "3"),
    "latent": ("none", "linear", "bias"),
    "bias": ("no", "yes"),
    "zero": ("no", "yes"),
    "reduce": ("layer", "caller"),
    "pad": ("0", "8"),
    "share": ("1", "0.5"),
}
CALL_AXES = {"dtype": ("fp32", "fp16"), "kernel": KERNELS, "history": HISTORIES}


def is_legal(layer: Layer, kernel: str) -> bool:
    """Whether such a layer may be built with this kernel; what is refused would compute something else."""
    _, ep, _, sp = GRIDS[layer.grid]
    monolithic, zero = layer.experts == "monolithic", layer.zero == "yes"
    if not has_transport(GRIDS[layer.grid], kernel) or (kernel in ALL_TO_ALL and monolithic):
        return False  # tokens travel where a router outside the kernel sends them
    if monolithic and (zero or layer.order == "2"):
        return False  # it never sees Z, and has no finalize to run shared experts in
    if zero and layer.scaling in ("plain", "kernel", "output"):
        return False  # Z has to be scaled with R, and only a router that scales does both
    if layer.shared == "none" and layer.order in ("2", "3"):
        return False  # nothing to order
    plain = (layer.order, layer.latent, layer.bias) == ("auto", "none", "no") and not (monolithic or zero)
    if layer.shared == "fused" and not (plain and ep == 1):
        return False  # more slots of the routed kernel: experts of the same kind, in one piece with it
    if layer.reduce == "caller":  # a partial sum has to be left for the caller to reduce
        return kernel == "partial" and layer.latent != "bias" and not zero and sp == 1
    return True


@functools.cache
def coefficients(layer: Layer, dtype: str) -> list[list[float]]:
    """For each rank its coefficients, column by column."""
    tp, ep, dp, sp = GRIDS[layer.grid]
    ranks, mlp = tp * dp, layer.shared in ("sharded", "gated")  # a sigmoid gate commutes with the sum over tp
    s, unit = 1.0 if layer.scaling.startswith("absent") else S, 1.0
    if dtype == "fp16" and layer.scaling == "output" and mlp:
        (unit,) = struct.unpack("e", struct.pack("e", 1 / S))  # s * R might leave fp16: the layer returns R + S/s
        s = 1.0
    cut = ranks // ep  # ranks that share an expert; the first of them holds its bias
    rows = []
    for rank in range(ranks):
        first = rank - rank % tp
        mine = {rank} if sp > 1 else set(range(first, first + tp))  # under sp whole on every rank, for its own rows
        if layer.shared == "fused":
            mine = set(range(ranks))  # cut over all ranks, as the routed experts are
        elif not mlp:
            mine = set()
        row = [s if layer.zero == "yes" else 0.0]
        row += [s] * ranks
        row += [s if other % cut == 0 else 0.0 for other in range(ranks)]
        row += [unit if other in mine else 0.0 for other in range(ranks)]
        row += [unit if layer.latent == "bias" else 0.0]
        rows.append([value * float(layer.share) for value in row])
    return rows


@functools.cache
def ledger(layer: Layer, kernel: str, history: str) -> list[list[str]]:
    mlp = layer.shared in ("sharded", "gated")
    return collectives(GRIDS[layer.grid], kernel, layer.experts == "monolithic", mlp, layer.latent == "bias", history)


def decisions() -> Iterator[tuple[int, Layer, tuple[str, ...]]]:
    """Number, words and kernels of every layer that some kernel may serve, in the order of the numbers."""
    *asked, pads, shares = LAYER_AXES.values()  # pad and share decide nothing about what is legal
    for place, words in enumerate(itertools.product(*asked)):
        kernels = tuple(kernel for kernel in KERNELS if is_legal(Layer._make((*words, "0", "1")), kernel))
        for step, (pad, share) in enumerate(itertools.product(pads, shares)):
            if kernels:
                yield place * len(pads) * len(shares) + step, Layer._make((*words, pad, share)), kernels


def calls(layer: Layer, kernels: tuple[str, ...]) -> Iterator[Call]:
    """Every call that these kernels allow."""
    for dtype, kernel in itertools.product(CALL_AXES["dtype"], kernels):
        for history in histories(kernel, kernels):
            yield Call(dtype, kernel, history)


def histories(kernel: str, kernels: tuple[str, ...]) -> list[str]:
    """A swap is from another kernel that may serve the layer."""
    swaps = {f"after_{other}" for other in kernels if other != kernel} | {"first"}
    return [history for history in HISTORIES if history.removeprefix("two_batches_") in swaps]


# ---- the space of dispatch

# beside: what enters beside the routed experts: shared experts as a module or as slots of the kernel, or zero experts.
# placement: who holds which expert; "moved" is linear in a first call and then placed anew.
Routed = namedtuple("Routed", "grid experts beside placement")
Trip = namedtuple("Trip", "kernel history rows")  # rows: with rows of nobody behind those of each rank, or without
ROUTED_AXES = {
    "grid": tuple(GRIDS),
    "experts": ("auto", "slots", "batched", "monolithic"),
    "beside": ("none", "shared", "fused", "zero"),
    "placement": ("linear", "round_robin", "permuted", "replicas", "moved"),
}
TRIP_AXES = {"kernel": KERNELS, "history": HISTORIES, "rows": ("whole", "junk")}
COUNTS = (6, 3, 0, 1)  # rows of the first ranks that have rows of their own, again and again; 8 where all have the same


def may_travel(layer: Routed, kernel: str) -> bool:
    """Whether such a layer may be built with this kernel, and is asked for."""
    grid, monolithic = GRIDS[layer.grid], layer.experts == "monolithic"
    if not has_transport(grid, kernel):
        return False
    if kernel in ALL_TO_ALL and layer.experts not in ("auto", "slots"):
        return False
    if (kernel, layer.experts) == ("deepep_ll", "slots"):
        return False  # it hands over rows by expert, the others rows
    if layer.placement != "linear" and grid.ep == 1:
        return False  # every rank has a piece of all experts
    if monolithic and (layer.placement in ("permuted", "replicas", "moved") or layer.beside in ("fused", "zero")):
        return False  # it routes by itself, to experts in their own order
    if layer.beside == "fused" and grid.ep > 1:
        return False
    # not asked of these: a module never sees the rows; slots of zero experts come to experts as those of distant ones do
    finalized = layer.experts in ("slots", "batched")
    return not (finalized and (layer.beside == "shared" or (layer.beside == "zero" and grid.ep > 1)))


def dispatch() -> Iterator[tuple[int, Routed, tuple[str, ...]]]:
    """As `decisions`."""
    for place, words in enumerate(itertools.product(*ROUTED_AXES.values())):
        layer = Routed._make(words)
        kernels = tuple(kernel for kernel in KERNELS if may_travel(layer, kernel))
        if kernels:
            yield place, layer, kernels


def trips(layer: Routed, kernels: tuple[str, ...]) -> Iterator[Trip]:
    """Rows are marked as junk for a router outside the kernel, in a whole call of whole rows."""
    for kernel in kernels:
        for history in histories(kernel, kernels):
            marked = not history.startswith("two_batches_") and layer.experts != "monolithic"
            for rows in TRIP_AXES["rows"] if marked and GRIDS[layer.grid].sp == 1 else ("whole",):
                yield Trip(kernel, history, rows)


@functools.cache
def rows_home(layer: Routed) -> list[list[list[float]]]:
    """For each rank and each of its rows the coefficients: every expert that was chosen once, with its weight."""
    tp, ep, dp, sp = GRIDS[layer.grid]
    groups = tp * dp if sp > 1 else dp  # those with rows of their own
    experts, chosen = 2 * ep, max(2, 2 * ep // 4)
    counts = [COUNTS[group % 4] for group in range(groups)] if groups > 1 else [8]
    shared = [1.0 if layer.beside in ("shared", "fused") else 0.0] * (tp * dp)
    ranks = []
    for rank in range(tp * dp):
        group = rank if sp > 1 else rank // tp
        rows = []
        for row in range(sum(counts[:group]), sum(counts[: group + 1])):
            weights = [2.0 * ((row + 2 * slot) % 4) + 1 for slot in range(chosen + 1)]
            routed = [0.0] * experts
            for slot in range(chosen):
                routed[(row // 2 + slot * experts // chosen) % experts] = weights[slot]
            pieces = [weight for weight in routed for _ in range(tp * dp // ep)]
            rows.append([weights[chosen] if layer.beside == "zero" else 0.0, *pieces, *shared])
        ranks.append(rows)
    return ranks


# ---- the check

# what a space is judged by: its axes, its legal layers and calls, what of a layer the law looks at, and what it demands
Space = namedtuple("Space", "layer_axes call_axes layers calls lawful coefficients ledger")
SPACES = {
    "decisions": Space(
        LAYER_AXES, CALL_AXES, decisions, calls,
        lambda layer: layer._replace(order="any", bias="any", reduce="any", pad="any"),
        lambda layer, call: coefficients(layer, call.dtype),
        lambda layer, call: ledger(layer, call.kernel, call.history),
    ),
    "dispatch": Space(
        ROUTED_AXES, TRIP_AXES, dispatch, trips,
        lambda layer: layer._replace(placement="any"),  # nobody who gets a row home can tell where its experts were
        lambda layer, trip: rows_home(layer._replace(experts="any")),
        lambda layer, trip: collectives(
            GRIDS[layer.grid], trip.kernel, layer.experts == "monolithic", layer.beside == "shared", False, trip.history
        ),
    ),
}  # fmt: skip


class Wrong(Exception):
    """The first thing that does not hold."""


def number(words: Sequence[str], axes: Mapping[str, Sequence[str]]) -> int:
    """The place of a choice in the product of the axes, the last axis fastest."""
    place = 0
    for word, values in zip(words, axes.values(), strict=True):
        place = place * len(values) + values.index(word)
    return place


def check(body: dict[str, Any]) -> int:
    """The number of states. Raises Wrong."""
    bare = {name: value for name, value in body.items() if name != "hash"}
    found = hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    if body["hash"] != found:
        raise Wrong(f"hash: the file says {body['hash']}, its content has {found}")
    if body["routed_scaling_factor"] != S:
        raise Wrong(f"routed_scaling_factor {body['routed_scaling_factor']}: expected {S}")
    states = sum(check_space(body[name], space) for name, space in SPACES.items())
    check_pieces(body["pieces"])
    return states


def check_space(given: dict[str, Any], space: Space) -> int:
    """Every legal layer, once each and no other, with every legal call. The number of states."""
    for name, axes in (("layer_axes", space.layer_axes), ("call_axes", space.call_axes)):
        if given[name] != [[axis, list(values)] for axis, values in axes.items()]:
            raise Wrong(f"{name}: not the axes of the space of states")
    once("layer", [layer for layer, _ in given["layers"]])
    tables = dict(given["layers"])
    states, held, legal = 0, {}, {}
    for place, layer, kernels in space.layers():
        if place not in tables:
            raise Wrong(f"missing: every state of {layer}")
        lawful = space.lawful(layer)
        seen = (tables.pop(place), kernels, lawful)
        if seen not in held:
            those = (kernels, *lawful[:2])  # grid and experts: calls depend on no more
            if those not in legal:
                legal[those] = {number(call, space.call_axes): call for call in space.calls(lawful, kernels)}
            held[seen] = check_calls(given, given["tables"][seen[0]], lawful, legal[those], space)
        states += held[seen]
    if tables:
        raise Wrong(f"{len(tables)} layers that no rule allows, the first has the number {min(tables)}")
    return states


def once(what: str, names: Sequence[Any]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise Wrong(f"{what} {name} is there {count} times")


def check_calls(body: dict[str, Any], table: list[list[int]], layer: Any, calls: dict[int, Any], space: Space) -> int:
    """Every call of one layer, once each and no other, with what the law demands. How many."""
    once(f"of {layer}: call", [call for call, _, _ in table])
    given = {call: (body["coefficients"][values], body["ledgers"][ops]) for call, values, ops in table}
    for place, call in calls.items():
        if place not in given:
            raise Wrong(f"missing: {layer} {call}")
        values, ops = given.pop(place)
        due, right = space.coefficients(layer, call), space.ledger(layer, call)
        if values != due:
            raise Wrong(f"coefficients {values}, the law demands {due}: {layer} {call}")
        if ops != right:
            raise Wrong(f"ledger {ops}, expected {right}: {layer} {call}")
    if given:
        raise Wrong(f"call {min(given)} is one that no rule allows: {layer}")
    return len(calls)


def check_pieces(pieces: list[list[str]]) -> None:
    """Routers and experts, layer by layer: none twice, all right, and of every model the same ones."""
    once("piece", [case for case, _ in pieces])
    if wrong := [f"{case} is {verdict}" for case, verdict in pieces if verdict not in ("exact", "rounded", "ok")]:
        raise Wrong(f"piece {wrong[0]}")
    cases = {case for case, _ in pieces}
    models, kinds = ({case.split("@")[place] for case in cases} for place in (0, 1))
    if missing := sorted({f"{model}@{kind}" for model in models for kind in kinds} - cases):
        raise Wrong(f"missing: piece {missing[0]}")
    if not cases:
        raise Wrong("missing: all pieces, so that routers and experts were not looked at")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("type: python -m reference.certificate FILE", file=sys.stderr)
        return 2
    try:
        with gzip.open(arguments[0]) as file:
            body = json.load(file)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        print(f"{arguments[0]}: cannot be read: {error}. Make one: moe-harness certify --output FILE", file=sys.stderr)
        return 2
    try:
        states = check(body)
    except Wrong as wrong:
        print(f"{arguments[0]}: DOES NOT HOLD: {wrong}")
        return 1
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        print(f"{arguments[0]}: DOES NOT HOLD: not a certificate: {type(error).__name__} {error}")
        return 1
    told = "; ".join(
        f"{name}: {len(body[name]['layers']):,} layers, {len(body[name]['coefficients']):,} lists of coefficients, "
        f"{len(body[name]['ledgers'])} ledgers"
        for name in SPACES
    )
    print(
        f"{arguments[0]}: holds. {states:,} legal states, each once, with the coefficients of the law and the collectives of "
        f"the tables ({told}); {len(body['pieces']):,} layers of models.\n"
        f"Made by harness {body['harness']} on torch {body['torch']}, sha256 {body['hash']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
