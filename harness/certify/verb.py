"""The two verbs: `certify` runs everything, `replay` some of it again."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from harness.case import parse_grid
from harness.certify import certificate, pieces, states
from harness.certify.ranks import on_ranks
from harness.certify.walk import Walked, Wrong, difference, walk
from harness.errors import HarnessError
from harness.pool import Batch, Outcome, run_all

LIMIT_S = 900.0  # for one grid; it takes 4, or 200 if every state has to be run rank by rank
TOLD = 10  # wrong states that are printed


def prepared(_: str) -> Callable[[str], object]:
    """For a worker: grid -> what it gave."""
    torch.set_num_threads(1)
    return walk


def certify(path: str, *, jobs: int, as_json: bool) -> int:
    started = time.perf_counter()
    certificate.check_writable(path)
    grids = states.LAYER_AXES["grid"]
    walks, judged, lost = _run(grids, pieces.cases(), jobs)
    wrong = [each for walked in walks.values() for each in walked.wrong]
    failed = [
        Wrong(case, f"{verdict}: {told}") for case, (verdict, told) in judged.items() if verdict not in pieces.RIGHT
    ]
    legal = sum(walked.states for walked in walks.values())
    figures: dict[str, Any] = {
        "product": states.PRODUCT,
        "legal": legal,
        "refused": states.PRODUCT - legal,
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
        figures["bytes"] = certificate.write(path, certificate.certificate((walks[grid] for grid in grids), verdicts))
    figures["seconds"] = round(time.perf_counter() - started, 1)
    if as_json:
        told = [{"state": each.state, "difference": each.text} for each in wrong[:TOLD]]
        print(json.dumps({"verb": "certify", "output": None if wrong else path, **figures, "first_wrong": told}))
    else:
        _print(path, figures, wrong)
    return 1 if wrong else 0


def _run(
    grids: tuple[str, ...], cases: tuple[str, ...], jobs: int
) -> tuple[dict[str, Walked], dict[str, tuple[str, str]], list[Wrong]]:
    """What each grid gave, the verdict of each piece, and what nothing came back of."""
    walks: dict[str, Walked] = {}
    judged: dict[str, tuple[str, str]] = {}
    lost: list[Wrong] = []

    def take(outcome: Outcome) -> None:
        if outcome.kind != "finding":
            what = "all states of " if outcome.case in grids else ""
            lost.append(Wrong(f"{what}{outcome.case}", f"{outcome.kind}: {str(outcome.payload).strip()}"))
        elif isinstance(outcome.payload, Walked):
            walks[outcome.case] = outcome.payload
        else:
            judged[outcome.case] = outcome.payload

    batches = [Batch("runner", (grid,), "harness.certify.verb:prepared") for grid in sorted(grids, key=_size)[::-1]]
    batches += [Batch("runner", part, "harness.certify.pieces:prepared") for part in _parts(cases)]
    run_all(batches, jobs, LIMIT_S, take)
    return walks, judged, lost


def _parts(cases: tuple[str, ...], size: int = 400) -> Iterator[tuple[str, ...]]:
    for first in range(0, len(cases), size):
        yield cases[first : first + size]


def _size(grid: str) -> tuple[bool, int]:
    """All-to-all kernels make a grid of whole experts five times as large as another."""
    sizes = parse_grid(grid)
    return sizes.ep == sizes.ranks > 1, sizes.ranks


def _print(path: str, figures: dict[str, Any], wrong: list[Wrong]) -> None:
    print(
        f"{figures['product']:,} states: {figures['legal']:,} legal, {figures['refused']:,} refused\n"
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
    for _ in range(count):
        layer, table = drawn.choice(body["layers"])
        call, values, ledger = drawn.choice(body["tables"][table])
        state = (states.layer_at(layer), states.call_at(call))
        told = _replayed(state, body["coefficients"][values], body["ledgers"][ledger])
        if told:
            wrong.append(Wrong(states.told(state), told))
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


def _replayed(state: states.State, coefficients: list[list[float]], ledger: list[list[str]]) -> str:
    """What differs between a run now and what the certificate says, in words."""
    try:
        with torch.inference_mode():
            batches, ledgers = on_ranks(state)
    except (HarnessError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    said = tuple(map(tuple, coefficients)), tuple((op, group) for op, group in ledger)
    return difference(said, batches, ledgers)
