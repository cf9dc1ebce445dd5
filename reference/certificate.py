"""Checks a certificate of the runner's states with nothing but Python: `python -m reference.certificate FILE`.

The certificate says, for every legal way to build a layer and to call it, with which coefficient each source entered the
output of each rank and which collectives took place. This file decides by itself which states are legal, what the law
y = s * R + S + Z demands of each, and who reduces what; it shares no line with the code that wrote the certificate.

A state is (layer, call), each one word from every axis below. Sources are columns: the token itself (zero experts), the
routed shard that each rank computes, the expert bias as each rank would add it, the shared shard of each rank, the bias of
the output transform. Exit code 0: the certificate holds; 1: it does not; 2: it cannot be read.
"""

import functools
import gzip
import hashlib
import itertools
import json
import struct
import sys
from collections import Counter

S = 2.5  # the routed scaling factor of every layer that has one

# ---- the space


def all_grids():
    """(tp, ep, dp, sp) by text. tp * dp ranks; ep of them, or groups of them, have experts of their own."""
    grids = {}
    for ranks in (1, 2, 3, 4, 8):
        divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
        for tp in divisors:
            for ep in divisors:
                for sp in (1, tp):
                    if sp > 1 and ep != ranks or (sp, tp) == (1, 1) and (tp, ep, ranks // tp, 1) in grids.values():
                        continue  # rows may be split only over ranks with whole experts
                    sizes = {"tp": tp, "ep": ep, "dp": ranks // tp, "sp": sp}
                    text = ".".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "tp1"
                    grids[text] = tuple(sizes.values())
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


def may_be_built(grid, experts, scaling, shared, order, latent, bias, zero, reduce, kernel):
    """Whether a layer of this kind with this kernel is legal; everything refused would compute something else."""
    tp, ep, dp, sp = GRIDS[grid]
    whole = ep == tp * dp > 1
    if kernel in ALL_TO_ALL and (not whole or experts == "monolithic"):
        return False  # tokens travel to whole experts, chosen by a router outside the kernel
    if experts == "monolithic" and (zero == "yes" or order == "2"):
        return False  # it never sees Z, and has no finalize to run shared experts in
    if zero == "yes" and scaling in ("plain", "kernel", "output"):
        return False  # Z must be scaled with R, and only a router that scales does both
    if shared == "none" and order in ("2", "3"):
        return False  # nothing to order
    if shared == "fused":  # more slots of the routed kernel: of the same kind, in one piece with it
        if (experts, order, latent, bias, zero) != ("modular", "auto", "none", "no", "no") or ep > 1:
            return False
    if reduce == "caller":  # a partial sum must be left for the caller to reduce
        return kernel == "partial" and latent != "bias" and zero == "no" and sp == 1
    return True


# ---- the law


@functools.cache
def coefficients(grid, scaling, shared, latent, zero, share, dtype):
    """For each rank a list of coefficients, column by column."""
    tp, ep, dp, sp = GRIDS[grid]
    ranks = tp * dp
    s = 1.0 if scaling.startswith("absent") else S
    mlp = shared in ("sharded", "gated")  # a sigmoid gate commutes with the sum over tp
    unit = 1.0
    if dtype == "fp16" and scaling == "output" and mlp:
        (unit,) = struct.unpack("e", struct.pack("e", 1 / S))  # s * R might leave fp16: the layer returns R + S/s
        s = 1.0
    cut = ranks // ep  # ranks that share an expert; the first of them holds its bias
    rows = []
    for rank in range(ranks):
        if shared == "fused":
            mine = range(ranks)  # cut over all ranks, as the routed experts are
        elif mlp and sp > 1:
            mine = [rank]  # whole on every rank, for that rank's rows
        else:
            mine = range(rank - rank % tp, rank - rank % tp + tp) if mlp else ()
        row = [s if zero == "yes" else 0.0]
        row += [s] * ranks
        row += [s if other % cut == 0 else 0.0 for other in range(ranks)]
        row += [unit if other in mine else 0.0 for other in range(ranks)]
        row += [unit if latent == "bias" else 0.0]
        rows.append([value * float(share) for value in row])
    return rows


@functools.cache
def ledger(grid, experts, kernel, shared, latent, history):
    """The collectives of a call, in order: the kernel's own, then what is left to reduce. The same on every rank."""
    tp, ep, dp, sp = GRIDS[grid]
    swap, gather = ["all_to_all_single", "ep"], ["all_gather", "ep"]
    own = {
        "deepep_ht": [swap] * 4,  # rows, weights, ids; results
        "deepep_ll": [swap] * 3,  # rows, ids; results, weighed at home
        "nvlink_one_sided": [gather] + [swap] * 4,  # the size of the window first
        "nvlink_two_sided": [gather] * 3 + [swap] * 2,  # sizes, weights, ids of all; rows; results
        "partial": [],
        "reduced": [],
    }[kernel]
    if kernel in PLAIN:
        if dp > 1 or sp > 1:  # everybody gathers everybody's rows: sizes, rows and logits, or rows, weights and ids
            over = "dp" if sp == 1 else "ep"
            own = [["all_gather", over]] * (3 if experts == "monolithic" else 4) + [["reduce_scatter", over]]
        if kernel == "reduced" and sp == 1:
            own = [*own, ["all_reduce", "tp"]]
    if sp > 1 or tp * dp == 1:
        left = 0  # complete rows of its own on every rank
    elif kernel != "partial":
        left = int(shared in ("sharded", "gated"))  # R is complete, S alone is not
    elif latent == "bias":
        left = 1 + (shared in ("sharded", "gated"))  # R before the biased transform, S beside it
    else:
        left = 1  # both at once, by the layer or by its caller
    batches = 2 if history == "two_batches" else 1
    return own * batches + [["all_reduce", "tp"]] * left * batches


# ---- the check


def number(words, axes):
    """The place of a choice in the product of the axes, the last axis fastest."""
    place = 0
    for word, values in zip(words, axes.values(), strict=True):
        place = place * len(values) + values.index(word)
    return place


def legal_layers():
    """(number, words, kernels) of every layer that some kernel may serve, in the order of the numbers."""
    kinds = [values for name, values in LAYER_AXES.items() if name not in ("pad", "share")]
    rest = list(itertools.product(LAYER_AXES["pad"], LAYER_AXES["share"]))  # decide nothing about what is legal
    for place, kind in enumerate(itertools.product(*kinds)):
        kernels = tuple(kernel for kernel in KERNELS if may_be_built(*kind, kernel))
        if kernels:
            for step, words in enumerate(rest):
                yield place * len(rest) + step, kind + words, kernels


@functools.cache
def legal_calls(kernels):
    """(number, words) of every call that these kernels allow; a swap is from another kernel that may serve the layer."""
    calls = []
    for dtype, kernel in itertools.product(CALL_AXES["dtype"], kernels):
        histories = ["first", *(f"after_{other}" for other in kernels if other != kernel), "two_batches"]
        calls += [(number((dtype, kernel, history), CALL_AXES), (dtype, kernel, history)) for history in histories]
    return calls


class Wrong(Exception):
    """The first thing that does not hold."""


def told(words, call=()):
    names = [*LAYER_AXES, *CALL_AXES]
    return " ".join(f"{name}={word}" for name, word in zip(names, (*words, *call), strict=False))


def check(body):
    """The number of states. Raises Wrong."""
    bare = {name: value for name, value in body.items() if name != "hash"}
    found = hashlib.sha256(json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    if body.get("hash") != found:
        raise Wrong(f"hash: the file says {body.get('hash')}, its content has {found}")
    for name, axes in (("layer_axes", LAYER_AXES), ("call_axes", CALL_AXES)):
        if body[name] != [[axis, list(values)] for axis, values in axes.items()]:
            raise Wrong(f"{name}: not the axes of the space of states")
    if body["routed_scaling_factor"] != S:
        raise Wrong(f"routed_scaling_factor {body['routed_scaling_factor']}: expected {S}")
    given = {}
    for layer, table in body["layers"]:
        if layer in given:
            raise Wrong(f"layer {layer} is there twice")
        given[layer] = table
    states, held = 0, set()
    for place, words, kernels in legal_layers():
        if place not in given:
            raise Wrong(f"missing: every state of {told(words)}")
        table = given.pop(place)
        grid, experts, scaling, shared, _, latent, _, zero, _, _, share = words
        key = (table, kernels, grid, experts, scaling, shared, latent, zero, share)
        if key not in held:
            check_table(body, body["tables"][table], words, kernels)
            held.add(key)
        states += len(legal_calls(kernels))
    if given:
        raise Wrong(f"{len(given)} layers that no rule allows, first number {min(given)}")
    return states


def check_table(body, table, words, kernels):
    """Every call of one layer, once each and no other."""
    grid, experts, scaling, shared, _, latent, _, zero, _, _, share = words
    doubled = [call for call, count in Counter(call for call, _, _ in table).items() if count > 1]
    if doubled:
        raise Wrong(f"call {doubled[0]} is there twice: {told(words)}")
    rows = {call: (values, calls) for call, values, calls in table}
    for place, call in legal_calls(kernels):
        if place not in rows:
            raise Wrong(f"missing: {told(words, call)}")
        values, calls = rows.pop(place)
        dtype, kernel, history = call
        due = coefficients(grid, scaling, shared, latent, zero, share, dtype)
        if body["coefficients"][values] != due:
            raise Wrong(f"coefficients {body['coefficients'][values]}, the law demands {due}: {told(words, call)}")
        due = ledger(grid, experts, kernel, shared, latent, history)
        if body["ledgers"][calls] != due:
            raise Wrong(f"ledger {body['ledgers'][calls]}, expected {due}: {told(words, call)}")
    if rows:
        raise Wrong(f"call {min(rows)} is one that no rule allows: {told(words)}")


def main(arguments):
    if len(arguments) != 1:
        print("type: python -m reference.certificate FILE", file=sys.stderr)
        return 2
    try:
        with gzip.open(arguments[0]) as file:
            body = json.load(file)
    except (OSError, EOFError, ValueError) as error:
        print(f"{arguments[0]}: cannot be read: {error}. Make one: moe-harness certify --output FILE", file=sys.stderr)
        return 2
    try:
        states = check(body)
    except Wrong as wrong:
        print(f"{arguments[0]}: DOES NOT HOLD: {wrong}")
        return 1
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        print(f"{arguments[0]}: DOES NOT HOLD: not a certificate: {type(error).__name__} {error}")
        return 1
    print(
        f"{arguments[0]}: holds. {states:,} legal states, each once, with the coefficients of the law and the collectives of "
        f"the tables; {len(body['layers']):,} layers, {len(body['coefficients']):,} lists of coefficients, "
        f"{len(body['ledgers'])} ledgers. Harness {body['harness']}, torch {body['torch']}, sha256 {body['hash'][:16]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
