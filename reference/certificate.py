"""Checks a certificate of the runner's states with nothing but Python: `python -m reference.certificate FILE`.

The certificate says, for every legal way to build a layer and to call it, with which coefficient each source entered the
output of each rank and which collectives took place. This file decides by itself which states are legal, what the law
y = s * R + S + Z demands of each, and who reduces what; it shares no line with the code that wrote the certificate.

A state is a layer and a call, each one word from every axis below. Sources are columns: the token itself (zero experts), the
routed shard that each rank computes, the expert bias as each rank would add it, the shared shard of each rank, the bias of
the output transform. Exit code 0: the certificate holds; 1: it does not; 2: it cannot be read.
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

# ---- the space


# tp * dp ranks; ep of them, or groups of them, with experts of their own; sp: 1, or tp ranks with rows of their own
Grid = namedtuple("Grid", "tp ep dp sp")
Layer = namedtuple(
    "Layer", "grid experts scaling shared order latent bias zero reduce pad share"
)  # fixed when it is built
Call = namedtuple("Call", "dtype kernel history")  # may change from one call to the next


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
CALL_AXES = {
    "dtype": ("fp32", "fp16"),
    "kernel": KERNELS,
    "history": ("first", *(f"after_{kernel}" for kernel in KERNELS), "two_batches"),
}


def is_legal(layer: Layer, kernel: str) -> bool:
    """Whether such a layer may be built with this kernel; what is refused would compute something else."""
    tp, ep, dp, sp = GRIDS[layer.grid]
    monolithic, zero = layer.experts == "monolithic", layer.zero == "yes"
    if kernel in ALL_TO_ALL and (monolithic or not ep == tp * dp > 1):
        return False  # tokens travel to whole experts, chosen by a router outside the kernel
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


# ---- the law


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
    """The collectives of a call, in order: the kernel's own, then what is left to reduce. The same on every rank."""
    tp, _, dp, sp = GRIDS[layer.grid]
    swap, gather = ["all_to_all_single", "ep"], ["all_gather", "ep"]
    own = {
        "deepep_ht": [swap] * 4,  # rows, weights, ids; results
        "deepep_ll": [swap] * 3,  # rows, ids; results, weighed at home
        "nvlink_one_sided": [gather] + [swap] * 4,  # the size of the window first
        "nvlink_two_sided": [gather] * 3 + [swap] * 2,  # sizes, weights, ids of all; rows; results
    }.get(kernel, [])
    if kernel in PLAIN and (
        dp > 1 or sp > 1
    ):  # everybody gathers everybody's sizes, rows, and logits or weights and ids
        over = "ep" if sp > 1 else "dp"
        own = [["all_gather", over]] * (3 if layer.experts == "monolithic" else 4) + [["reduce_scatter", over]]
    if kernel == "reduced" and sp == 1:
        own = [*own, ["all_reduce", "tp"]]
    mlp = layer.shared in ("sharded", "gated")
    if sp > 1 or tp * dp == 1:
        left = 0  # complete rows of its own on every rank
    elif kernel != "partial":
        left = int(mlp)  # R is complete, S alone is not
    elif layer.latent == "bias":
        left = 1 + int(mlp)  # R before the biased transform, S beside it
    else:
        left = 1  # both at once, by the layer or by its caller
    batches = 2 if history == "two_batches" else 1
    return own * batches + [["all_reduce", "tp"]] * left * batches


# ---- the check


class Wrong(Exception):
    """The first thing that does not hold."""


def number(words: Sequence[str], axes: Mapping[str, Sequence[str]]) -> int:
    """The place of a choice in the product of the axes, the last axis fastest."""
    place = 0
    for word, values in zip(words, axes.values(), strict=True):
        place = place * len(values) + values.index(word)
    return place


def legal_layers() -> Iterator[tuple[int, Layer, tuple[str, ...]]]:
    """Number, words and kernels of every layer that some kernel may serve, in the order of the numbers."""
    *asked, pads, shares = LAYER_AXES.values()  # pad and share decide nothing about what is legal
    for place, words in enumerate(itertools.product(*asked)):
        kernels = tuple(kernel for kernel in KERNELS if is_legal(Layer._make((*words, "0", "1")), kernel))
        for step, (pad, share) in enumerate(itertools.product(pads, shares)):
            if kernels:
                yield place * len(pads) * len(shares) + step, Layer._make((*words, pad, share)), kernels


@functools.cache
def legal_calls(kernels: tuple[str, ...]) -> dict[int, Call]:
    """By number, every call that these kernels allow; a swap is from another kernel that may serve the layer."""
    calls = {}
    for dtype, kernel in itertools.product(CALL_AXES["dtype"], kernels):
        for history in ("first", *(f"after_{other}" for other in kernels if other != kernel), "two_batches"):
            call = Call(dtype, kernel, history)
            calls[number(call, CALL_AXES)] = call
    return calls


def check(body: dict[str, Any]) -> int:
    """The number of states. Raises Wrong."""
    bare = {name: value for name, value in body.items() if name != "hash"}
    found = hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    if body["hash"] != found:
        raise Wrong(f"hash: the file says {body['hash']}, its content has {found}")
    for name, axes in (("layer_axes", LAYER_AXES), ("call_axes", CALL_AXES)):
        if body[name] != [[axis, list(values)] for axis, values in axes.items()]:
            raise Wrong(f"{name}: not the axes of the space of states")
    if body["routed_scaling_factor"] != S:
        raise Wrong(f"routed_scaling_factor {body['routed_scaling_factor']}: expected {S}")
    once("layer", [layer for layer, _ in body["layers"]])
    given = dict(body["layers"])
    states, held = 0, set()
    for place, layer, kernels in legal_layers():
        if place not in given:
            raise Wrong(f"missing: every state of {layer}")
        table = given.pop(place)
        lawful = layer._replace(order="any", bias="any", reduce="any", pad="any")  # what the law does not look at
        if (table, kernels, lawful) not in held:
            check_calls(body, body["tables"][table], lawful, legal_calls(kernels))
            held.add((table, kernels, lawful))
        states += len(legal_calls(kernels))
    if given:
        raise Wrong(f"{len(given)} layers that no rule allows, the first has the number {min(given)}")
    check_pieces(body["pieces"])
    return states


def once(what: str, names: Sequence[Any]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise Wrong(f"{what} {name} is there {count} times")


def check_calls(body: dict[str, Any], table: list[list[int]], layer: Layer, calls: dict[int, Call]) -> None:
    """Every call of one layer, once each and no other, with what the law demands."""
    once(f"of {layer}: call", [call for call, _, _ in table])
    given = {call: (body["coefficients"][values], body["ledgers"][ops]) for call, values, ops in table}
    for place, call in calls.items():
        if place not in given:
            raise Wrong(f"missing: {layer} {call}")
        values, ops = given.pop(place)
        if values != coefficients(layer, call.dtype):
            raise Wrong(f"coefficients {values}, the law demands {coefficients(layer, call.dtype)}: {layer} {call}")
        if ops != ledger(layer, call.kernel, call.history):
            raise Wrong(f"ledger {ops}, expected {ledger(layer, call.kernel, call.history)}: {layer} {call}")
    if given:
        raise Wrong(f"call {min(given)} is one that no rule allows: {layer}")


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
    print(
        f"{arguments[0]}: holds. {states:,} legal states, each once, with the coefficients of the law and the collectives of "
        f"the tables ({len(body['layers']):,} layers, {len(body['coefficients']):,} lists of coefficients, "
        f"{len(body['ledgers'])} ledgers); {len(body['pieces']):,} layers of models.\n"
        f"Made by harness {body['harness']} on torch {body['torch']}, sha256 {body['hash']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
