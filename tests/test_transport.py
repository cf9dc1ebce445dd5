"""Transports apart from the maths: rows that tell where they come from, experts that tell who they are.

A row carries its code, its rank and its place there; a weight is a power of two that tells slot and row; an expert
writes the row's code into a column of its own. All products are exact in every dtype, so each check is an equality with
a table made in plain loops from ids and placement. The wrong transports at the end are held against the same checks.

M rows of a rank, N rows that reach one, K top-k, P columns of a row, E experts of a rank, B rows of a batch.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.case import Grid, parse_grid
from harness.comm import Communicator
from harness.comm.simulated import Ranks, run_ranks
from harness.runner.placement import Placement, linear, physical, replicated, round_robin
from harness.runner.prepare_finalize import Prepared
from harness.runner.prepare_finalize.all_to_all import (
    DeepEPHTPrepareAndFinalize,
    DeepEPLLPrepareAndFinalize,
    NVLinkOneSidedPrepareAndFinalize,
    NVLinkTwoSidedPrepareAndFinalize,
)
from harness.runner.prepare_finalize.local import Batched, NoDPEP
from harness.runner.prepare_finalize.naive import Naive, NaiveBatched
from harness.runner.prepare_finalize.passthrough import Passthrough
from harness.runner.weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)

# ------------------------------------------------------------------------------------------------ data

ALL_TO_ALL = {
    "deepep_ht": DeepEPHTPrepareAndFinalize,
    "deepep_ll": DeepEPLLPrepareAndFinalize,
    "nvlink_one_sided": NVLinkOneSidedPrepareAndFinalize,
    "nvlink_two_sided": NVLinkTwoSidedPrepareAndFinalize,
}
PLAIN = {
    "local": NoDPEP,
    "local_batched": Batched,
    "naive": Naive,
    "naive_batched": NaiveBatched,
    "passthrough": Passthrough,
    "passthrough_batched": Passthrough,
}
CLASSES: dict[str, type[Any]] = {**PLAIN, **ALL_TO_ALL}
INDEX_DTYPES = dict.fromkeys([*PLAIN, "nvlink_one_sided", "nvlink_two_sided"], torch.int32) | {
    "deepep_ht": torch.int64,
    "deepep_ll": torch.int64,
}

# who weighs and adds the K results of a row: the experts; the finalize; or a kernel that routes after a bare gather
WAYS = {
    **{
        kind: ("batched",) if "batched" in kind else ("weighed", "slots", "monolithic")
        for kind in PLAIN
    },
    **{kind: ("batched",) if kind == "deepep_ll" else ("weighed", "slots") for kind in ALL_TO_ALL},
}  # fmt: skip
ROUTES = [(kind, way) for kind, ways in WAYS.items() for way in ways]

LOCAL = ("tp1", "tp2", "tp2.ep2", "tp4.ep2", "tp3.ep3")
DP = ("dp2", "ep2.dp2", "ep3.dp3", "tp2.dp2", "tp2.ep2.dp2", "tp2.ep4.dp2", "tp2.ep3.dp3", "tp2.ep6.dp3")
SP = ("tp2.ep2.sp2", "tp2.ep4.dp2.sp2", "tp3.ep6.dp2.sp3")
WHOLE = ("tp2.ep2", "tp3.ep3", "ep2.dp2", "ep3.dp3", "tp2.ep4.dp2", "tp2.ep6.dp3", *SP)
JUNK = (None, None)  # a row that nobody wrote


class Given(NamedTuple):
    """One rank's rows [M, P], weights [M, K] and physical ids [M, K]."""

    x_MP: Tensor
    weights_MK: Tensor
    ids_MK: Tensor


@dataclass(frozen=True, kw_only=True)
class Freight:
    """What travels, on all ranks. placement: None where each rank holds a piece of all `slots`.    rows: M of each rank."""

    grid: Grid
    slots: int
    placement: Placement | None
    rows: tuple[int, ...]
    top_k: int
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def home_of(self, slot: int, rank: int) -> int:
        """The place of a slot on that rank, -1 if it is not there; counted here, not read from the placement's tables."""
        if self.placement is None:
            return slot
        owners, ep_rank = self.placement.owners, rank // self.grid.moe_tp
        return sum(owner == ep_rank for owner in owners[:slot]) if slot >= 0 and owners[slot] == ep_rank else -1

    def experts(self, rank: int) -> int:
        return sum(self.home_of(slot, rank) >= 0 for slot in range(self.slots))

    @property
    def width(self) -> int:
        """A column for each place on each rank, and 3 at least, to tell rows."""
        return max(3, self.grid.ranks * self.slots)

    @functools.cached_property
    def given(self) -> tuple[Given, ...]:
        """Rows of all ranks; one without an expert is NaN where it does not tell its origin."""
        draw, all_given, code = random.Random(self.seed), [], 0
        for rank, rows in enumerate(self.rows):
            x = torch.empty(rows, self.width)
            weights, ids = torch.empty(rows, self.top_k), torch.empty(rows, self.top_k, dtype=torch.int64)
            for token in range(rows):
                code += 1
                gone = draw.choice((0.0, 0.0, 0.3, 1.0))
                picked = [-1 if draw.random() < gone else s for s in draw.sample(range(self.slots), self.top_k)]
                ids[token] = torch.tensor(picked)
                weights[token] = torch.tensor([2.0 ** ((code * self.top_k + k) % 16 - 8) for k in range(self.top_k)])
                x[token] = code if max(picked) >= 0 else torch.nan
                x[token, 1], x[token, 2] = rank, token
            assert code < 256  # bf16 counts no further
            all_given.append(Given(x.to(self.dtype), weights, ids))
        return tuple(all_given)


class Trip(NamedTuple):
    """What one rank saw: what reached it, and what came home."""

    arrived: Prepared
    home_MP: Tensor


def sources(kind: str, grid: Grid, rank: int) -> list[int]:
    """Whose rows may reach a rank."""
    if kind in ALL_TO_ALL or grid.sp > 1:
        return list(range(grid.ranks))
    return list(range(rank % grid.tp, grid.ranks, grid.tp))  # those of dp; itself alone without


# ------------------------------------------------------------------------------------------------ the journey


def transport(kind: str, freight: Freight, comm: Communicator, cls: type[Any]) -> Any:
    if kind in ALL_TO_ALL:
        return cls(freight.placement, comm.ep)
    local_E = None if freight.placement is None else freight.placement.expert_map(comm.ep.rank)
    experts = [freight.experts(comm.rank)] if "batched" in kind else []
    group = comm.ep if freight.grid.sp > 1 else comm.dp
    moves = freight.grid.dp > 1 or freight.grid.sp > 1
    if not kind.startswith("passthrough"):
        return cls(local_E, *experts, *([group] if kind.startswith("naive") else []))
    plain = NaiveBatched if experts and moves else Batched if experts else Naive if moves else NoDPEP
    inner = plain(local_E, *experts, *([group] if moves else []))  # type: ignore[call-arg]
    return cls(inner, None if freight.grid.sp > 1 else comm.tp)


def work(arrived: Prepared, way: str, rank: int, freight: Freight) -> Tensor:
    """The experts: each writes the row's code into its own column, weighed and added or slot by slot or in batches."""
    first, x = rank * freight.slots, arrived.x
    if way == "batched":
        out = torch.zeros_like(x)
        for e in range(x.shape[0]):
            out[e, :, first + e] = x[e, :, 0]
        return out
    out_NKP = x.new_zeros(*arrived.local_NK.shape, x.shape[1])
    for n, k in (arrived.local_NK >= 0).nonzero().tolist():
        weight = 1.0 if way == "slots" else arrived.weights_NK[n, k]
        out_NKP[n, k, first + int(arrived.local_NK[n, k])] = x[n, 0] * weight
    return out_NKP if way == "slots" else out_NKP.sum(1)


def travel(kind: str, way: str, freights: Sequence[Freight], cls: type[Any] | None = None) -> Ranks[list[Trip]]:
    """All freights of one transport, in flight together: each is sent before the first comes home."""
    cls = cls or CLASSES[kind]

    def body(comm: Communicator) -> list[Trip]:
        carrier, flights = transport(kind, freights[0], comm, cls), []
        for freight in freights:
            x_MP, weights_MK, ids_MK = freight.given[comm.rank]
            ids_MK = ids_MK.to(carrier.topk_indices_dtype)
            if way == "monolithic":
                (x, weights, ids), back = carrier.gather(x_MP.clone(), weights_MK, ids_MK)
                local = torch.tensor([[freight.home_of(s, comm.rank) for s in row] for row in ids.tolist()])
                arrived = Prepared(x, weights, local.view(ids.shape), None, back)
                flights.append((arrived, carrier.scatter(work(arrived, way, comm.rank, freight), back)))
                continue
            arrived = carrier.prepare(x_MP.clone(), weights_MK.clone(), ids_MK)
            how = TopKWeightAndReduceNoOP() if way == "weighed" else TopKWeightAndReduceDelegate()
            flights.append((arrived, carrier.send(work(arrived, way, comm.rank, freight), arrived, how)))
        return [Trip(got, sent if way == "monolithic" else carrier.receive(sent, got)) for got, sent in flights]

    return run_ranks(freights[0].grid, body)


# ------------------------------------------------------------------------------------------------ the checks


def wrong_arrivals(kind: str, freight: Freight, trips: Sequence[Trip]) -> list[str]:
    """What reached each rank against the table of what has to; one sentence for each difference."""
    found = []
    for rank, (arrived, _) in enumerate(trips):
        if arrived.x.dtype is not freight.dtype:
            found.append(f"rank {rank}: rows arrive in {arrived.x.dtype}, they left in {freight.dtype}")
        if arrived.weights_NK.dtype is not torch.float32:
            found.append(f"rank {rank}: weights arrive in {arrived.weights_NK.dtype}")
        flat = due_rows(kind, freight, rank)
        if "batched" in kind or kind == "deepep_ll":
            found += _wrong_batches(freight, rank, arrived.x, flat)
        else:
            found += _wrong_rows(freight, rank, arrived.x, [row for row, _ in flat])
        if kind != "deepep_ll":  # its weights stay at home
            found += _wrong_slots(freight, rank, arrived, flat)
    return found


def due_rows(kind: str, freight: Freight, rank: int) -> list[tuple[tuple[Any, Any], list[int]]]:
    """((source, token), local ids by slot) of each row that this rank is due, in the order of sources and tokens."""
    due: list[tuple[tuple[Any, Any], list[int]]] = []
    for source in sources(kind, freight.grid, rank):
        before = len(due)
        for token, ids in enumerate(freight.given[source].ids_MK.tolist()):
            local = [freight.home_of(slot, rank) for slot in ids]
            if kind not in ALL_TO_ALL or max(local) >= 0:
                due.append(((source, token), local))
        if kind == "nvlink_one_sided":
            written = len(due) - before
            due += [(JUNK, [-1] * freight.top_k)] * (max(freight.rows) - written)
    return due


def _wrong_batches(
    freight: Freight, rank: int, x_EBP: Tensor, flat: Sequence[tuple[tuple[Any, Any], list[int]]]
) -> list[str]:
    experts = freight.experts(rank)
    due = [[row for row, local in flat if e in local] for e in range(experts)]
    longest = max([1, *map(len, due)])
    if x_EBP.shape[:2] != (experts, longest):
        return [f"rank {rank}: batches of shape {list(x_EBP.shape[:2])} arrive, due are [{experts}, {longest}]"]
    found = []
    for e, rows in enumerate(due):
        found += _wrong_rows(freight, rank, x_EBP[e], rows + [JUNK] * (longest - len(rows)), f" for expert {e}")
    return found


def _wrong_rows(freight: Freight, rank: int, x_NP: Tensor, due: list[tuple[Any, Any]], what: str = "") -> list[str]:
    got = [JUNK if row.isnan().all() else (int(row[1]), int(row[2])) for row in x_NP.float()]
    if got != due:
        return [f"rank {rank}: rows (source, token) {got} arrive{what}, due are {due}"]
    whole = [
        place
        for row, place in zip(x_NP, due, strict=True)
        if place != JUNK
        and not torch.equal(row.nan_to_num(-1.0), freight.given[place[0]].x_MP[place[1]].nan_to_num(-1.0))
    ]
    return [f"rank {rank}: the numbers of rows {whole} changed on their way{what}"] if whole else []


def _wrong_slots(
    freight: Freight, rank: int, arrived: Prepared, flat: Sequence[tuple[tuple[Any, Any], list[int]]]
) -> list[str]:
    local, due = arrived.local_NK.tolist(), [slots for _, slots in flat]
    if local != due:
        return [f"rank {rank}: local ids {local} arrive, due are {due}"]
    found = []
    for (place, slots), weights in zip(flat, arrived.weights_NK.tolist(), strict=True):
        for k, slot in enumerate(slots):
            if weights[k] != weights[k]:
                found.append(f"rank {rank}: slot {k} of row {place} has the weight NaN")
            elif slot >= 0 and weights[k] != float(freight.given[place[0]].weights_MK[place[1], k]):
                found.append(f"rank {rank}: slot {k} of row {place} has the weight {weights[k]} of another")
    return found


def wrong_homecomings(kind: str, freight: Freight, trips: Sequence[Trip]) -> list[str]:
    """What came home against the sum over each token's own slots, column by column."""
    grid, found = freight.grid, []
    for home, (_, home_MP) in enumerate(trips):
        rows = freight.rows[home]
        if home_MP.dtype is not freight.dtype or home_MP.shape != (rows, freight.width):
            found.append(
                f"rank {home}: {home_MP.dtype}{list(home_MP.shape)} comes home, due is {freight.dtype}[{rows}, ...]"
            )
            continue
        adds_tp = kind.startswith("passthrough") and grid.sp == 1
        first = home // grid.tp * grid.tp
        due_MP = torch.zeros(rows, freight.width, dtype=torch.float64)
        for source in range(first, first + grid.tp) if adds_tp else [home]:
            x_MP, weights_MK, ids_MK = freight.given[source]
            for rank in (r for r in range(grid.ranks) if source in sources(kind, grid, r)):
                for token, ids in enumerate(ids_MK.tolist()):
                    for k, slot in enumerate(ids):
                        if slot >= 0 and (place := freight.home_of(slot, rank)) >= 0:
                            column = rank * freight.slots + place
                            due_MP[token, column] += float(x_MP[token, 0]) * float(weights_MK[token, k])
        for token in range(rows):
            if not torch.equal(home_MP[token].double(), due_MP[token]):
                got, due = _columns(home_MP[token]), _columns(due_MP[token])
                found.append(f"rank {home}, token {token}: {got} comes home, due is {due}")
    return found


def _columns(row_P: Tensor) -> dict[int, float]:
    return {column: value for column, value in enumerate(row_P.tolist()) if value != 0}


def wrong_announcements(kind: str, freights: Sequence[Freight], run: Ranks[Any], cls: type[Any]) -> list[str]:
    """The ledger against the collectives that the class announces: all dispatches and combines, then nothing."""

    def announced(comm: Communicator) -> list[tuple[str, str]]:
        carrier = transport(kind, freights[0], comm, cls)
        return [*carrier.dispatch, *carrier.combine] * len(freights)

    due, found = run_ranks(freights[0].grid, announced).unwrap(), []
    for rank, entries in enumerate(run.ledger):
        took_place = [(entry.op, entry.group) for entry in entries]
        if took_place != due[rank]:
            found.append(f"rank {rank}: {took_place} took place, announced were {due[rank]}")
    return found


def complaints(kind: str, way: str, freights: Sequence[Freight], cls: type[Any] | None = None) -> dict[str, list[str]]:
    """What the checks of one journey object to, by name of the check, none left empty; "broke" where it ended early."""
    run = travel(kind, way, freights, cls)
    if run.failure is not None:
        return {"broke": [f"rank {run.failed_rank}: {run.failure!r}"]}
    flights = [(freight, [trips[index] for trips in run.results]) for index, freight in enumerate(freights)]
    found = {
        "arrivals": [text for freight, trips in flights for text in wrong_arrivals(kind, freight, trips)],
        "home": [text for freight, trips in flights for text in wrong_homecomings(kind, freight, trips)],
        "ledger": wrong_announcements(kind, freights, run, cls or CLASSES[kind]),
    }
    return {check: texts for check, texts in found.items() if texts}


# ------------------------------------------------------------------------------------------------ right transports


def grids(kind: str) -> tuple[str, ...]:
    if kind in ALL_TO_ALL:
        return WHOLE
    return {"local": LOCAL, "naive": DP + SP, "passthrough": LOCAL + DP + SP}[kind.removesuffix("_batched")]


def make_placement(name: str, experts: int, ep: int, seed: int) -> Placement | None:
    draw = random.Random(seed)
    if ep == 1:
        return None
    if name == "scattered":  # any owner for any slot: some ranks may own nothing
        return Placement(tuple(draw.randrange(ep) for _ in range(experts)), tuple(range(experts)), experts)
    return {
        "linear": lambda: linear(experts, ep),
        "round_robin": lambda: round_robin(experts, ep),
        "permuted": lambda: physical(draw.sample(range(experts), experts), experts, ep),
        "replicas": lambda: replicated(experts, ep, draw.randrange(1, experts + 1)),
    }[name]()


@st.composite
def freight(draw: st.DrawFn, kind: str) -> Freight:
    """Any legal sizes: ranks without rows, ranks without experts, more slots than the ranks divide."""
    grid = parse_grid(draw(st.sampled_from(grids(kind)), label="grid"))
    experts = draw(st.integers(1, 10), label="experts")
    seed = draw(st.integers(0, 2**32), label="seed")
    name = draw(st.sampled_from(["linear", "round_robin", "permuted", "replicas", "scattered"]), label="placement")
    placement = make_placement(name, experts, grid.ep, seed)
    slots = experts if placement is None else len(placement.held)
    holders = grid.ranks if grid.sp > 1 else grid.dp
    rows = draw(st.lists(st.integers(0, 5), min_size=holders, max_size=holders), label="rows")
    return Freight(
        grid=grid,
        slots=slots,
        placement=placement,
        rows=tuple(rows) if grid.sp > 1 else tuple(m for m in rows for _ in range(grid.tp)),
        top_k=draw(st.integers(1, min(4, slots)), label="top_k"),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype"),
        seed=seed,
    )


@pytest.mark.parametrize(("kind", "way"), ROUTES)
@given(data=st.data())
def test_each_rank_gets_the_rows_of_its_experts_and_each_token_the_sum_of_its_slots(kind, way, data):
    assert complaints(kind, way, [data.draw(freight(kind))]) == {}


@pytest.mark.parametrize(("kind", "way"), ROUTES)
@given(data=st.data())
def test_two_calls_in_flight_keep_their_rows_apart(kind, way, data):
    first = data.draw(freight(kind))
    seed = data.draw(st.integers(0, 2**32), label="seed of the second")
    second = replace(first, seed=seed, rows=tuple(5 - m for m in first.rows))
    assert complaints(kind, way, [first, second]) == {}


@pytest.mark.parametrize("kind", CLASSES)
def test_each_transport_asks_for_the_index_dtype_of_its_backend(kind):
    def asked(comm: Communicator) -> torch.dtype:
        return transport(kind, EXAMPLES[kind], comm, CLASSES[kind]).topk_indices_dtype

    assert set(run_ranks(EXAMPLES[kind].grid, asked).unwrap()) == {INDEX_DTYPES[kind]}


def test_the_low_latency_combine_refuses_experts_that_have_weighed_already():
    freight = EXAMPLES["deepep_ll"]

    def body(comm: Communicator) -> None:
        carrier = transport("deepep_ll", freight, comm, DeepEPLLPrepareAndFinalize)
        arrived = carrier.prepare(*freight.given[comm.rank])
        for how in (TopKWeightAndReduceNoOP(), TopKWeightAndReduceContiguous()):
            carrier.send(arrived.x, arrived, how)

    with pytest.raises(TypeError, match="would do it twice"):
        run_ranks(freight.grid, body).unwrap()


# ------------------------------------------------------------------------------------------------ wrong transports


def _example(grid: str, rows: tuple[int, ...]) -> Freight:
    """Seven slots of six experts, bf16; the seed gives every rank rows for itself and others, and rows without any."""
    parsed = parse_grid(grid)
    placement = replicated(6, parsed.ep, 1) if parsed.ep > 1 else None
    return Freight(
        grid=parsed, slots=7, placement=placement, rows=rows, top_k=3, dtype=torch.bfloat16, seed=SEED
    )  # fmt: skip


SEED = 5
EXAMPLES = {
    **{kind: _example("ep3.dp3", (4, 2, 3)) for kind in CLASSES},
    **{kind: _example("tp3.ep3", (4, 4, 4)) for kind in ("local", "local_batched")},
    **{kind: _example("tp2.ep4.dp2", (4, 4, 2, 2)) for kind in ("passthrough", "passthrough_batched")},
}


class RollsIds:
    """Every row asks for the experts of its neighbour."""

    def prepare(self, x_MP, weights_MK, ids_MK):
        return super().prepare(x_MP, weights_MK, ids_MK.roll(1, 0))


class RollsWeights:
    """Every row brings the weights of its neighbour."""

    def prepare(self, x_MP, weights_MK, ids_MK):
        return super().prepare(x_MP, weights_MK.roll(1, 0), ids_MK)


class LosesTheLastRow:
    """The last row that has an expert never leaves."""

    def prepare(self, x_MP, weights_MK, ids_MK):
        ids_MK = ids_MK.clone()
        ids_MK[(ids_MK >= 0).any(1).nonzero().flatten()[-1:]] = -1
        return super().prepare(x_MP, weights_MK, ids_MK)


class SendsInFp32:
    """Rows change their dtype on the way."""

    def prepare(self, x_MP, weights_MK, ids_MK):
        return super().prepare(x_MP.float(), weights_MK, ids_MK)


class SwapsTwoSources:
    """What came from rank 0 is taken for rank 1's and the other way round."""

    def _exchange(self, rows, counts):
        from_each, received = super()._exchange(rows, counts)
        first, second, *rest = received.split(from_each)
        return from_each, torch.cat([second, first, *rest])


class GathersTwoSourcesSwapped:
    """The same after a gather."""

    def gather(self, *rows):
        gathered, sizes = super().gather(*rows)
        swapped = [(b, a, *rest) for a, b, *rest in (each.split(sizes) for each in gathered)]
        return tuple(map(torch.cat, swapped)), sizes


class ReadsIdMinusOneAsTheLastExpert:
    """The tables lack the entry behind the last, which -1 reads."""

    def __init__(self, *given):
        super().__init__(*given)
        self._local_E = self._local_E[:-1]
        if hasattr(self, "_owner_E"):
            self._owner_E = self._owner_E[:-1]


class TellsLocalIdsOfAnyRank:
    """Slots that belong elsewhere keep their local id: an expert here runs for them too."""

    def _local_to(self, ids_DK, rank_D):
        return self._local_E[ids_DK]


class SendsRowsToEverybody:
    """Rows also go where none of their experts is."""

    def _routes(self, ids_MK):
        size, rows = self._group.size, ids_MK.shape[0]
        rank_D = torch.arange(size).repeat_interleave(rows)
        return [rows] * size, torch.arange(rows).repeat(size), rank_D


class FillsWithZeros:
    """Rows that nobody wrote look like rows of zeros, so a sum that reads them does not show it."""

    def prepare(self, x_MP, weights_MK, ids_MK):
        arrived = super().prepare(x_MP, weights_MK, ids_MK)
        nobody = arrived.x.isnan().all(-1, keepdim=True)
        return replace(arrived, x=arrived.x.masked_fill(nobody, 0.0))


class BringsHomeByTheWrongTable:
    """Results are added to the rows as if they had come back in the reverse order."""

    def receive(self, sent, prepared):
        from_each, row_D, *rest = prepared.home
        return super().receive(sent, replace(prepared, home=(from_each, row_D.flip(0), *rest)))


class WeighsByTheWrongTable:
    """The combine at home takes each slot's weight from its neighbour."""

    def receive(self, sent, prepared):
        *rest, weights_J = prepared.home
        return super().receive(sent, replace(prepared, home=(*rest, weights_J.roll(1))))


class ReadsTheWindowInOrder:
    """Results are read from the front of the window, not from where the rows were written."""

    def receive(self, sent, prepared):
        *rest, at_D = prepared.home
        return super().receive(sent, replace(prepared, home=(*rest, torch.arange(len(at_D)))))


class ScattersByTheWrongTable:
    """The sums go home one row too far."""

    def scatter(self, out_NP, home):
        return super().scatter(out_NP.roll(1, 0), home)


class ForgetsTheSizes:
    """Every rank gets an equal share of the sum, whatever it gave."""

    def scatter(self, out_NP, home):
        return self._group.reduce_scatter(out_NP)


class SendsHomeInEqualShares:
    """The same in an all-to-all: as many rows to each rank, whatever came from it."""

    def send(self, out, prepared, how):
        (from_each, *rest), size = prepared.home, self._group.size
        total = sum(from_each)
        even = [total // size + (rank < total % size) for rank in range(size)]
        sent = super().send(out, replace(prepared, home=(even, *rest)), how)
        rows = len(rest[0])
        return torch.cat([sent, sent.new_zeros(rows, sent.shape[1])])[
            :rows
        ]  # cut to size, so that only places are wrong


class LosesTheLastResult:
    """What came home last is dropped."""

    def receive(self, sent, prepared):
        home_MP = super().receive(sent, prepared)
        written = home_MP.abs().sum(1).nonzero().flatten()
        home_MP[written[-1:]] = 0
        return home_MP


class AddsTwice:
    def receive(self, sent, prepared):
        return super().receive(sent, prepared) * 2


class BringsHomeFp32:
    """Results change their dtype on the way."""

    def receive(self, sent, prepared):
        return super().receive(sent, prepared).float()


class ForgetsTheSumOverTp(Passthrough):
    """Calls complete what is a partial sum."""

    def send(self, out, prepared, how):
        return self._inner.receive(self._inner.send(out, prepared, how), prepared)

    def scatter(self, out_NP, home):
        return self._inner.scatter(out_NP, home)


class AsksOnceMore:
    """One collective more than it announces."""

    def receive(self, sent, prepared):
        self._group.all_gather(torch.zeros(1))
        return super().receive(sent, prepared)


class RemembersOneWayHome:
    """The way home is kept in the transport: the second call in flight overwrites the first one's."""

    def prepare(self, x_MP, weights_MK, ids_MK):
        self._last = super().prepare(x_MP, weights_MK, ids_MK)
        return self._last

    def receive(self, sent, prepared):
        rows = prepared.home[2]
        home_MP = super().receive(sent, replace(self._last, home=(*self._last.home[:2], rows, *self._last.home[3:])))
        return home_MP


# the checks that have to object
BOTH = {"arrivals", "home"}
EVERY = tuple(CLASSES)
EXCHANGES, GATHERS = tuple(ALL_TO_ALL), ("naive", "naive_batched")
UNWRAPPED = (*EXCHANGES, *GATHERS, "local", "local_batched")
PLANTED = [
    (RollsIds, EVERY, BOTH),
    (RollsWeights, [kind for kind in EVERY if kind != "deepep_ll"], BOTH),
    (RollsWeights, ["deepep_ll"], {"home"}),  # its weights stay at home
    (LosesTheLastRow, EVERY, BOTH),
    (SendsInFp32, EVERY, BOTH),
    (SwapsTwoSources, EXCHANGES, BOTH),
    (GathersTwoSourcesSwapped, GATHERS, BOTH),
    (ReadsIdMinusOneAsTheLastExpert, [kind for kind in UNWRAPPED if kind != "deepep_ll"], BOTH),
    (ReadsIdMinusOneAsTheLastExpert, ["deepep_ll"], {"broke"}),  # it counts its experts by the same table
    (TellsLocalIdsOfAnyRank, ["deepep_ht", "nvlink_one_sided"], BOTH),
    (SendsRowsToEverybody, ["deepep_ht"], {"arrivals"}),  # a rank without experts for a row adds 0
    (FillsWithZeros, ["nvlink_one_sided", "deepep_ll", "naive_batched", "local_batched"], {"arrivals"}),
    (BringsHomeByTheWrongTable, EXCHANGES, {"home"}),
    (WeighsByTheWrongTable, ["deepep_ll"], {"home"}),
    (ReadsTheWindowInOrder, ["nvlink_one_sided"], {"home"}),
    (ScattersByTheWrongTable, GATHERS, {"home"}),
    (ForgetsTheSizes, GATHERS, {"home"}),
    (SendsHomeInEqualShares, ["deepep_ht", "deepep_ll", "nvlink_two_sided"], {"home"}),
    (LosesTheLastResult, EVERY, {"home"}),
    (AddsTwice, EVERY, {"home"}),
    (BringsHomeFp32, EVERY, {"home"}),
    (ForgetsTheSumOverTp, ["passthrough", "passthrough_batched"], {"home", "ledger"}),
    (AsksOnceMore, (*EXCHANGES, *GATHERS), {"ledger"}),
]
BITES = [(wrong, kind, checks) for wrong, kinds, checks in PLANTED for kind in kinds]


@pytest.mark.parametrize(
    ("wrong", "kind", "checks"), BITES, ids=[f"{wrong.__name__}-{kind}" for wrong, kind, _ in BITES]
)
def test_the_checks_object_to_a_planted_wrong_transport(wrong, kind, checks):
    assert complaints(kind, WAYS[kind][0], [EXAMPLES[kind]]) == {}
    cls = wrong if issubclass(wrong, CLASSES[kind]) else type(wrong.__name__, (wrong, CLASSES[kind]), {})
    assert complaints(kind, WAYS[kind][0], [EXAMPLES[kind]], cls).keys() == checks


@pytest.mark.parametrize("kind", EXCHANGES)
def test_one_way_home_for_two_calls_in_flight_is_found(kind):
    cls = type("Remembers", (RemembersOneWayHome, CLASSES[kind]), {})
    one = EXAMPLES[kind]
    assert complaints(kind, WAYS[kind][0], [one], cls) == {}
    assert complaints(kind, WAYS[kind][0], [one, replace(one, seed=one.seed + 1)], cls)
