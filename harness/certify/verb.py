"""The two verbs: `certify` runs everything, `replay` some of it again."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness.case import parse_grid
from harness.certify import certificate, pieces, states
from harness.certify.dispatch import axes
from harness.certify.dispatch import walk as dispatch
from harness.certify.law import Ledger
from harness.certify.ranks import on_ranks
from harness.certify.walk import Walked, Wrong, difference, walk
from harness.errors import HarnessError
from harness.pool import Batch, Outcome, run_all

LIMIT_S = 900.0  # for one grid; it takes 4, or 300 if every state has to be run rank by rank
TOLD = 10  # wrong states that are printed


# of each space, what walks over one of its grids
WALKS: dict[str, Callable[[str], Walked]] = {"decisions": walk, "dispatch": dispatch.walk}


def prepared(_: str) -> Callable[[str], object]:
    """For a worker: 'SPACE GRID' -> what it gave."""
    torch.set_num_threads(1)
    gc.freeze()
    gc.set_threshold(50_000)  # layers are freed by their counts; a collection every 700 objects takes 5 % of the time

    def run(text: str) -> Walked:
        space, _, grid = text.partition(" ")
        return WALKS[space](grid)

    return run


def certify(path: str, *, jobs: int, as_json: bool) -> int:
    started = time.perf_counter()
    certificate.check_writable(path)
    parts = {f"{space} {grid}": space for space in WALKS for grid in states.LAYER_AXES["grid"]}
    walks, judged, lost = _run(tuple(parts), pieces.cases(), jobs)
    wrong = [each for walked in walks.values() for each in walked.wrong]
    failed = [
        Wrong(case, f"{verdict}: {told}") for case, (verdict, told) in judged.items() if verdict not in pieces.RIGHT
    ]
    legal = sum(walked.states for walked in walks.values())
    figures: dict[str, Any] = {
        "product": states.PRODUCT + axes.PRODUCT,
        "legal": legal,
        "refused": states.PRODUCT + axes.PRODUCT - legal,
        "dispatch_product": axes.PRODUCT,
        "dispatch_legal": sum(walked.states for part, walked in walks.items() if parts[part] == "dispatch"),
        "runs": sum(walked.runs for walked in walks.values()),
        "rank_by_rank": sum(walked.apart for walked in walks.values()),
        "after_a_swap_alike": sum(walked.alike for walked in walks.values()),
        "pieces": len(judged),
        "wrong": sum(walked.wrongs for walked in walks.values()),
        "wrong_pieces": len(failed),
        "lost": len(lost),
    }
    wrong += failed + lost
    if not wrong:
        verdicts = [[case, verdict] for case, (verdict, _) in sorted(judged.items())]
        found = {space: [walks[part] for part in parts if parts[part] == space] for space in WALKS}
        figures["bytes"] = certificate.write(path, certificate.certificate(found, verdicts))
    figures["seconds"] = round(time.perf_counter() - started, 1)
    if as_json:
        told = [{"state": each.state, "difference": each.text} for each in wrong[:TOLD]]
        print(json.dumps({"verb": "certify", "output": None if wrong else path, **figures, "first_wrong": told}))
    else:
        _print(path, figures, wrong)
    return 1 if wrong else 0


def _run(
    parts: tuple[str, ...], cases: tuple[str, ...], jobs: int
) -> tuple[dict[str, Walked], dict[str, tuple[str, str]], list[Wrong]]:
    """What each part of a space gave, the verdict of each piece, and what nothing came back of."""
    walks: dict[str, Walked] = {}
    judged: dict[str, tuple[str, str]] = {}
    lost: list[Wrong] = []

    def take(outcome: Outcome) -> None:
        if outcome.kind != "finding":
            what = "all states of " if outcome.case in parts else ""
            lost.append(Wrong(f"{what}{outcome.case}", f"{outcome.kind}: {str(outcome.payload).strip()}"))
        elif isinstance(outcome.payload, Walked):
            walks[outcome.case] = outcome.payload
        else:
            judged[outcome.case] = outcome.payload

    batches = [Batch("runner", (part,), "harness.certify.verb:prepared") for part in sorted(parts, key=_size)[::-1]]
    batches += [Batch("runner", part, "harness.certify.pieces:prepared") for part in _parts(cases)]
    run_all(batches, jobs, LIMIT_S, take)
    return walks, judged, lost


def _parts(cases: tuple[str, ...], size: int = 400) -> Iterator[tuple[str, ...]]:
    for first in range(0, len(cases), size):
        yield cases[first : first + size]


def _size(part: str) -> tuple[bool, int]:
    """All-to-all kernels make a grid of whole experts five times as large as another."""
    sizes = parse_grid(part.partition(" ")[2])
    return sizes.ep == sizes.ranks > 1, sizes.ranks


def _print(path: str, figures: dict[str, Any], wrong: list[Wrong]) -> None:
    print(
        f"{figures['product']:,} states: {figures['legal']:,} legal, {figures['refused']:,} refused; of placements, junk and "
        f"transports {figures['dispatch_legal']:,} of {figures['dispatch_product']:,}\n"
        f"{figures['runs']:,} calls of the runner, {figures['rank_by_rank']:,} states rank by rank, "
        f"{figures['pieces']:,} layers of models; {figures['seconds']:.1f} s"
    )
    for each in wrong[:TOLD]:
        print(f"wrong: {each.state}\n    {each.text}")
    if wrong:
        count = figures["wrong"] + figures["wrong_pieces"] + figures["lost"]
        print(f"{count:,} wrong. No certificate is written, {path} stays as it was")
    else:
        print(f"every legal state gives exactly what the law demands\n{path}: {figures['bytes']:,} bytes")
        print(f"check it: {certificate.check(path)}")


def replay(path: str, *, count: int, seed: int, as_json: bool) -> int:
    body = certificate.read(path)
    started = time.perf_counter()
    torch.set_num_threads(1)
    drawn = random.Random(seed)
    wrong: list[Wrong] = []
    for number in range(count):
        space = body[("decisions", "dispatch")[number % 2]]
        layer, table = drawn.choice(space["layers"])
        call, values, ledger = drawn.choice(space["tables"][table])
        said = space["coefficients"][values], tuple((op, group) for op, group in space["ledgers"][ledger])
        name, told = _dispatched(layer, call, *said) if number % 2 else _decided(layer, call, *said)
        if told:
            wrong.append(Wrong(name, told))
    seconds = round(time.perf_counter() - started, 1)
    if as_json:
        first = [{"state": each.state, "difference": each.text} for each in wrong[:TOLD]]
        print(json.dumps({"verb": "replay", "certificate": path, "states": count, "seed": seed, "wrong": len(wrong),
                          "seconds": seconds, "first_wrong": first}))  # fmt: skip
    else:
        for each in wrong[:TOLD]:
            print(f"differs: {each.state}\n    {each.text}")
        print(f"{count:,} states run again rank by rank in {seconds:.1f} s: {len(wrong):,} differ from {path}")
    return 1 if wrong else 0


def _decided(layer: int, call: int, coefficients: list[list[float]], ledger: Ledger) -> tuple[str, str]:
    """A state's name, and what differs between a run now and what the certificate says, in words."""
    state = (states.layer_at(layer), states.call_at(call))
    try:
        with torch.inference_mode():
            batches, ledgers = on_ranks(state)
    except (HarnessError, ValueError, RuntimeError) as error:
        return states.told(state), f"{type(error).__name__}: {error}"
    return states.told(state), difference((tuple(map(tuple, coefficients)), ledger), batches, ledgers)


def _dispatched(layer: int, call: int, coefficients: list[list[list[float]]], ledger: Ledger) -> tuple[str, str]:
    """The same of a state of the other space."""
    state, rows = axes.state_at(layer, call), tuple(tuple(map(tuple, rank)) for rank in coefficients)
    return axes.told(state), dispatch.differs(state, (rows, ledger))
