"""The simulated ranks: lock step, mismatches, sums, snapshots, ledgers, and torch's mode state kept apart."""

from __future__ import annotations

import contextvars
import gc
import threading
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.case import Grid
from harness.comm import Call, Communicator, Entry, Group
from harness.comm.collectives import resolve
from harness.comm.lockstep import Abandoned, Lockstep
from harness.comm.modes import current
from harness.comm.simulated import run_ranks
from harness.errors import CollectiveMismatch, UsageError

BOTH = pytest.mark.parametrize("threads", [False, True], ids=["greenlets", "threads"])
X = torch.arange(12.0).view(4, 3)


def mismatch(grid: int | Grid, body, threads=False) -> CollectiveMismatch:
    """The failure of a run on so many tp ranks, or on a grid."""
    ranks = run_ranks(grid if isinstance(grid, Grid) else Grid(tp=grid), body, threads=threads)
    assert isinstance(ranks.failure, CollectiveMismatch), ranks.failure
    assert ranks.failed_rank is None
    return ranks.failure


# ---- what collectives give


@BOTH
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_every_collective_gives_what_its_name_says(tp, threads):
    def body(comm):
        own = X + 100 * comm.rank
        return {
            "all_reduce": comm.all_reduce(own),
            "all_gather": comm.all_gather(own[:, : comm.rank + 1], dim=-1),
            "reduce_scatter": comm.reduce_scatter(own.repeat(1, comm.world_size), dim=1),
            "unequal": comm.reduce_scatter(own.repeat(tp, 1)[: tp + 3], sizes=[4, *[1] * (tp - 1)]),
            "all_to_all": comm.all_to_all([torch.full((comm.rank + 1, 2), 10.0 * comm.rank + to) for to in range(tp)]),
            "single": comm.all_to_all_single(
                torch.cat([torch.full((to, 2), 10.0 * comm.rank + to) for to in range(tp)]), list(range(tp))
            ),
            "broadcast": comm.broadcast(own, source=tp - 1),
        }

    ranks = run_ranks(Grid(tp=tp), body, threads=threads)
    given = [X + 100 * rank for rank in range(tp)]
    for rank, got in enumerate(ranks.unwrap()):
        assert torch.equal(got["all_reduce"], sum(given))
        assert torch.equal(got["all_gather"], torch.cat([x[:, : r + 1] for r, x in enumerate(given)], 1))
        assert torch.equal(got["reduce_scatter"], sum(given))
        assert got["reduce_scatter"].untyped_storage().nbytes() == X.numel() * 4  # its share only, not a view of all
        shares = sum(x.repeat(tp, 1)[: tp + 3] for x in given).split([4, *[1] * (tp - 1)])
        assert torch.equal(got["unequal"], shares[rank])
        rows, counts = got["single"]
        assert counts == [rank] * tp
        assert rows.tolist() == [[10.0 * r + rank] * 2 for r in range(tp) for _ in range(rank)]
        assert [t.tolist() for t in got["all_to_all"]] == [[[10.0 * r + rank] * 2] * (r + 1) for r in range(tp)]
        assert torch.equal(got["broadcast"], given[-1])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sums_are_rounded_in_rank_order_to_the_bit(dtype, threads):
    given = [torch.randn(50, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(8)]
    in_order, reversed_order = given[0], given[7]
    for rank in range(1, 8):
        in_order, reversed_order = in_order + given[rank], reversed_order + given[7 - rank]
    assert not torch.equal(in_order, reversed_order)  # else the order could not be seen
    ranks = run_ranks(Grid(tp=8), lambda comm: comm.all_reduce(given[comm.rank]), threads=threads)
    for result in ranks.unwrap():
        assert torch.equal(result, in_order)
    scattered = run_ranks(Grid(tp=8), lambda comm: comm.reduce_scatter(given[comm.rank][:48]), threads=threads)
    assert torch.equal(torch.cat(scattered.unwrap()), in_order[:48])


COLLECTIVES = {
    "all_reduce": lambda comm, x: comm.all_reduce(x),
    "all_gather": lambda comm, x: comm.all_gather(x),
    "reduce_scatter": lambda comm, x: comm.reduce_scatter(x),
    "reduce_scatter in shares": lambda comm, x: comm.reduce_scatter(x, sizes=[len(x), *[0] * (comm.world_size - 1)]),
    "all_to_all": lambda comm, x: comm.all_to_all([x] * comm.world_size)[0],
    "all_to_all_single": lambda comm, x: comm.all_to_all_single(x, [len(x), *[0] * (comm.world_size - 1)])[0],
    "broadcast": lambda comm, x: comm.broadcast(x),
}


@BOTH
@pytest.mark.parametrize("op", COLLECTIVES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_changing_given_or_received_tensors_in_place_reaches_no_other_rank(tp, op, threads):
    def body(comm, spoil):
        given = X + comm.rank
        received = COLLECTIVES[op](comm, given)
        if spoil:
            given.fill_(-1)
            kept = received.clone()
            received.fill_(comm.rank - 1000)
            comm.all_reduce(torch.zeros(1))  # everybody has spoiled its tensors before anybody looks
            assert (received == comm.rank - 1000).all()
            return kept
        return received

    clean = run_ranks(Grid(tp=tp), lambda comm: body(comm, False), threads=threads).unwrap()
    spoiled = run_ranks(Grid(tp=tp), lambda comm: body(comm, True), threads=threads).unwrap()
    for one, other in zip(clean, spoiled, strict=True):
        assert torch.equal(one, other)


def test_no_gradient_flows_through_a_collective():
    leaf = torch.ones(2, requires_grad=True)
    for tp in (1, 2):
        for result in run_ranks(Grid(tp=tp), lambda comm: comm.all_reduce(leaf * 2)).unwrap():
            assert not result.requires_grad
    assert torch.is_grad_enabled()


@BOTH
def test_empty_tensors_pass_through_every_collective(threads):
    empty = torch.zeros(0, 3)
    for call in COLLECTIVES.values():
        ranks = run_ranks(Grid(tp=2), lambda comm, call=call: call(comm, empty), threads=threads)
        assert [tuple(t.shape) for t in ranks.unwrap()] == [(0, 3)] * 2


# ---- groups and the ledger


@BOTH
@pytest.mark.parametrize("tp", [1, 4])
def test_ledger_holds_every_collective_of_every_rank_in_order(tp, threads):
    def body(comm):
        comm.all_reduce(X.bfloat16())
        comm.all_gather(X[: comm.rank])
        comm.dp.broadcast(X.long())

    everybody = tuple(range(tp))
    for rank, entries in enumerate(run_ranks(Grid(tp=tp), body, threads=threads).ledger):
        assert entries == (
            Entry("tp", "all_reduce", everybody, "bf16", (4, 3)),
            Entry("tp", "all_gather", everybody, "fp32", (rank, 3)),
            Entry("dp", "broadcast", (rank,), "int64", (4, 3)),
        )


def test_a_collective_that_never_met_is_not_in_the_ledger():
    ranks = run_ranks(Grid(tp=2), lambda comm: [comm.all_reduce(X), comm.all_reduce(X) if comm.rank else None])
    assert [len(entries) for entries in ranks.ledger] == [1, 1]


def test_groups_of_one_rank_copy_and_count_their_calls():
    def body(comm):
        copy = comm.ep.all_reduce(X)
        assert copy.data_ptr() != X.data_ptr()
        assert torch.equal(copy, X)
        return comm.ep.size, comm.ep.calls, comm.tp.calls, comm.tp.rank, comm.rank, comm.world_size

    assert run_ranks(Grid(tp=2), body).unwrap() == ((1, 1, 0, 0, 0, 2), (1, 1, 0, 1, 1, 2))


def test_groups_of_two_kinds_meet_and_are_told_apart():
    """Two rows of two ranks, as tp2 x dp2 will be: the state machine needs no more than groups as data."""
    lockstep = Lockstep(4)

    def call(rank, name):
        ranks = {"tp": (rank // 2 * 2, rank // 2 * 2 + 1), "dp": (rank % 2, rank % 2 + 2)}[name]
        group = Group(name, ranks, ranks.index(rank), lambda call: ())
        return Call(rank, group, 0, "all_reduce", (torch.tensor([float(rank)]),), 0)

    for rank in range(4):
        assert lockstep.next() == rank
        lockstep.arrive(call(rank, "tp"))
    for rank, expected in enumerate([1.0, 1.0, 5.0, 5.0]):
        assert lockstep.next() == rank
        assert lockstep.take(rank)[0].item() == expected
        lockstep.arrive(call(rank, "tp" if rank == 1 else "dp"))  # 0 and 2 meet; 1 and 3 never can
    for rank in (0, 2):
        assert lockstep.next() == rank
        assert lockstep.take(rank)[0].item() == 2.0
        lockstep.finish(rank, "done")
    assert lockstep.next() == 1
    assert str(lockstep.failure) == ("collective 0 of group tp differs: rank 0: returned, rank 1: all_reduce(fp32[1])")
    with pytest.raises(Abandoned):
        lockstep.take(1)
    lockstep.fail(1, Abandoned())
    assert (lockstep.next(), lockstep.next()) == (3, None)


# ---- the groups of a grid

GRIDS = tuple(
    Grid(tp=tp, dp=dp, ep=ep)
    for tp, dp in [(1, 1), (4, 1), (1, 4), (2, 2), (2, 3), (3, 2), (4, 2), (2, 4), (4, 4)]
    for ep in range(1, tp * dp + 1)
    if tp * dp % ep == 0
)
EACH_GRID = pytest.mark.parametrize("grid", GRIDS, ids=str)


def groups_of(grid: Grid) -> tuple[dict[str, Group], ...]:
    """By rank: each of its groups by name."""
    return run_ranks(grid, lambda comm: {"tp": comm.tp, "ep": comm.ep, "dp": comm.dp}).unwrap()


@EACH_GRID
def test_each_rank_is_in_one_group_of_each_kind_and_knows_its_place(grid):
    for rank, groups in enumerate(groups_of(grid)):
        for name, group in groups.items():
            assert group.name == name
            assert group.size == len(group.ranks) == getattr(grid, name)
            assert group.ranks[group.rank] == rank
            assert list(group.ranks) == sorted(set(group.ranks))


@EACH_GRID
@pytest.mark.parametrize("name", ["tp", "ep", "dp"])
def test_the_groups_of_a_kind_share_no_rank_and_leave_none_out(name, grid):
    found = {groups[name].ranks for groups in groups_of(grid)}
    assert sorted(rank for ranks in found for rank in ranks) == list(range(grid.ranks))
    for rank, groups in enumerate(groups_of(grid)):
        assert all(groups_of(grid)[other][name].ranks == groups[name].ranks for other in groups[name].ranks), rank


@EACH_GRID
def test_the_ranks_of_an_ep_group_hold_every_expert_once(grid):
    """Rank = ep rank * moe_tp + moe_tp rank, and a rank holds its moe_tp rank's piece of its ep rank's experts."""
    for rank, groups in enumerate(groups_of(grid)):
        experts = [other // grid.moe_tp for other in groups["ep"].ranks]
        assert experts == list(range(grid.ep))
        assert {other % grid.moe_tp for other in groups["ep"].ranks} == {rank % grid.moe_tp}
        assert groups["ep"].rank == rank // grid.moe_tp


@pytest.mark.parametrize(
    ("grid", "tp", "ep", "dp"),
    [
        (Grid(tp=4, ep=2), [(0, 1, 2, 3)], [(0, 2), (1, 3)], [(0,), (1,), (2,), (3,)]),
        (Grid(tp=2, dp=2), [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)]),
        (Grid(tp=2, ep=2, dp=2), [(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 2), (1, 3)]),
        (Grid(tp=2, ep=4, dp=2), [(0, 1), (2, 3)], [(0, 1, 2, 3)], [(0, 2), (1, 3)]),
        (Grid(tp=1, ep=2, dp=4), [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)], [(0, 1, 2, 3)]),
        (Grid(tp=3, ep=2, dp=2), [(0, 1, 2), (3, 4, 5)], [(0, 3), (1, 4), (2, 5)], [(0, 3), (1, 4), (2, 5)]),
        (Grid(tp=3, ep=3, dp=2), [(0, 1, 2), (3, 4, 5)], [(0, 2, 4), (1, 3, 5)], [(0, 3), (1, 4), (2, 5)]),
        (Grid(tp=2, ep=2, dp=4), [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 4), (1, 5), (2, 6), (3, 7)], [(0, 2, 4, 6), (1, 3, 5, 7)]),
        (Grid(tp=2, ep=2, dp=1, sp=2), [(0, 1)], [(0, 1)], [(0,), (1,)]),
    ],
    ids=str,
)  # fmt: skip
def test_the_groups_of_a_grid_are_these(grid, tp, ep, dp):
    for name, expected in {"tp": tp, "ep": ep, "dp": dp}.items():
        assert sorted({groups[name].ranks for groups in groups_of(grid)}) == expected


@BOTH
@EACH_GRID
def test_each_group_sums_gathers_and_exchanges_among_its_own_ranks(grid, threads):
    def body(comm):
        told = {}
        for group in (comm.dp, comm.tp, comm.ep):
            own = torch.tensor([float(2**comm.rank)])
            told[group.name] = (
                group.all_reduce(own).item(),
                group.all_gather(own).tolist(),
                group.reduce_scatter(own.repeat(group.size + 1), sizes=[*[1] * (group.size - 1), 2]).tolist(),
                torch.cat(group.all_to_all([own + 0.5 * to for to in group.ranks])).tolist(),
                group.broadcast(own, source=group.size - 1).item(),
            )
        return told

    ranks = run_ranks(grid, body, threads=threads)
    for rank, (told, groups) in enumerate(zip(ranks.unwrap(), groups_of(grid), strict=True)):
        for name, (total, gathered, share, came, last) in told.items():
            group = groups[name]
            assert gathered == [2.0**other for other in group.ranks]
            assert total == sum(gathered)
            assert share == [total] * (2 if group.rank == group.size - 1 else 1)
            assert came == [each + 0.5 * rank for each in gathered]
            assert last == gathered[-1]
        entries = ranks.ledger[rank]
        assert [entry.group for entry in entries] == ["dp"] * 5 + ["tp"] * 5 + ["ep"] * 5
        assert all(entry.ranks == groups[entry.group].ranks for entry in entries)


@BOTH
def test_groups_of_a_grid_may_run_ahead_of_each_other(threads):
    """dp rank 1 makes ten calls of its own while dp rank 0 still waits in its first."""
    order = []

    def body(comm):
        for step in range(10 if comm.dp.rank else 1):
            comm.tp.all_reduce(X)
            order.append((comm.dp.rank, step))
        return comm.dp.all_reduce(torch.ones(1)).item()

    assert run_ranks(Grid(tp=2, dp=2), body, threads=threads).unwrap() == (2.0,) * 4
    assert len(order) == 22


# ---- disagreement


@BOTH
def test_a_rank_that_returns_early_is_named_at_once(threads):
    error = mismatch(4, lambda comm: None if comm.rank == 2 else comm.all_reduce(X), threads)
    assert error.calls == {
        0: "all_reduce(fp32[4, 3])",
        1: "all_reduce(fp32[4, 3])",
        2: "returned",
        3: "all_reduce(fp32[4, 3])",
    }
    assert str(error) == "collective 0 of group tp differs: rank 2: returned, ranks 0, 1, 3: all_reduce(fp32[4, 3])"


@BOTH
@pytest.mark.parametrize("wrong", range(4))
def test_one_rank_that_calls_on_another_group_is_named_with_both_groups(wrong, threads):
    error = mismatch(Grid(tp=2, dp=2), lambda comm: (comm.dp if comm.rank == wrong else comm.tp).all_reduce(X), threads)
    partner = wrong ^ 1  # of its tp group
    if wrong in (1, 3):  # the lowest rank that waits is the partner, or another one
        assert error.group == "tp"
        assert error.calls == {partner: "all_reduce(fp32[4, 3])", wrong: "all_reduce(fp32[4, 3]) of group dp"}
        assert str(error) == (
            f"collective 0 of group tp differs: rank {partner}: all_reduce(fp32[4, 3]), "
            f"rank {wrong}: all_reduce(fp32[4, 3]) of group dp"
        )
    elif wrong == 0:
        assert str(error) == "collective 0 of group dp differs: rank 0: all_reduce(fp32[4, 3]), rank 2: returned"
    else:
        assert str(error) == "collective 0 of group dp differs: rank 0: returned, rank 2: all_reduce(fp32[4, 3])"


@BOTH
def test_ranks_that_wait_for_each_other_in_two_groups_are_told_at_once(threads):
    """Rank 0 reduces over tp before dp, rank 1 over dp before tp, and so on round the square."""

    def body(comm):
        first, second = (comm.tp, comm.dp) if comm.rank in (0, 3) else (comm.dp, comm.tp)
        first.all_reduce(X)
        second.all_reduce(X)

    error = mismatch(Grid(tp=2, dp=2), body, threads)
    assert str(error) == (
        "collective 0 of group tp differs: rank 0: all_reduce(fp32[4, 3]), rank 1: all_reduce(fp32[4, 3]) of group dp"
    )


@BOTH
@pytest.mark.parametrize("goes_on", [False, True])
def test_a_rank_that_skips_its_all_to_all_is_named_with_what_it_does_instead(goes_on, threads):
    def body(comm):
        comm.dp.all_gather(X)
        if comm.rank != 2:
            comm.ep.all_to_all([X] * comm.ep.size)
        if goes_on:
            comm.tp.all_reduce(X)

    sent = f"all_to_all({', '.join(['fp32[4, 3]'] * 4)})"
    instead = "all_reduce(fp32[4, 3]) of group tp" if goes_on else "returned"
    error = mismatch(Grid(tp=2, ep=4, dp=2), body, threads)
    assert str(error) == f"collective 0 of group ep differs: rank 2: {instead}, ranks 0, 1, 3: {sent}"


@BOTH
def test_a_rank_that_skips_an_exchange_of_rows_in_a_cut_grid_stops_its_own_ep_group_alone(threads):
    """tp4.ep2: ranks 0, 2 and 1, 3 exchange among themselves, and 1, 3 have met when 2 turns out to be missing."""

    def body(comm):
        if comm.rank != 2:
            comm.ep.all_to_all_single(X, [1, 3])
        comm.tp.all_reduce(X)

    error = mismatch(Grid(tp=4, ep=2), body, threads)
    assert error.calls == {0: "all_to_all_single(fp32[4, 3], sizes=[1, 3])", 2: "all_reduce(fp32[4, 3]) of group tp"}
    assert (error.index, error.group) == (0, "ep")


@BOTH
def test_a_missing_call_in_the_middle_names_its_index(threads):
    def body(comm):
        comm.all_reduce(X)
        if comm.rank != 1:
            comm.all_reduce(X)
        comm.all_gather(X)

    error = mismatch(2, body, threads)
    assert (error.index, error.group) == (1, "tp")
    assert error.calls == {0: "all_reduce(fp32[4, 3])", 1: "all_gather(fp32[4, 3])"}


DIFFERENT = {
    "op": (lambda comm: comm.all_gather(X), "all_gather(fp32[4, 3])"),
    "dtype": (lambda comm: comm.all_reduce(X.half()), "all_reduce(fp16[4, 3])"),
    "shape": (lambda comm: comm.all_reduce(X[1:]), "all_reduce(fp32[3, 3])"),
    "None": (lambda comm: comm.all_reduce(None), "all_reduce(NoneType)"),
    "list": (lambda comm: comm.all_reduce([1.0]), "all_reduce(list)"),
}


@BOTH
@pytest.mark.parametrize("what", DIFFERENT)
def test_a_rank_that_calls_something_else_is_named(what, threads):
    other, text = DIFFERENT[what]
    error = mismatch(3, lambda comm: other(comm) if comm.rank == 1 else comm.all_reduce(X), threads)
    assert error.calls == {0: "all_reduce(fp32[4, 3])", 1: text, 2: "all_reduce(fp32[4, 3])"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda comm: comm.all_gather(X, dim=0), lambda comm: comm.all_gather(X, dim=1)),
        (lambda comm: comm.all_gather(X, dim=0), lambda comm: comm.all_gather(X[:, :2], dim=0)),
        (lambda comm: comm.all_gather(X, dim=0), lambda comm: comm.all_gather(X.double(), dim=0)),
        (lambda comm: comm.reduce_scatter(X, dim=0), lambda comm: comm.reduce_scatter(X, dim=1)),
        (lambda comm: comm.reduce_scatter(X, dim=0), lambda comm: comm.reduce_scatter(X[:2], dim=0)),
        (lambda comm: comm.reduce_scatter(X, sizes=[1, 3]), lambda comm: comm.reduce_scatter(X, sizes=[3, 1])),
        (lambda comm: comm.reduce_scatter(X, sizes=[2, 2]), lambda comm: comm.reduce_scatter(X)),
        (lambda comm: comm.reduce_scatter(X, sizes=[0, 4]), lambda comm: comm.reduce_scatter(X[:2], sizes=[0, 2])),
        (lambda comm: comm.all_to_all_single(X, [1, 3]), lambda comm: comm.all_to_all([X, X])),
        (lambda comm: comm.all_to_all_single(X, [1, 3]), lambda comm: comm.all_to_all_single(X[:, :2], [1, 3])),
        (lambda comm: comm.all_to_all_single(X, [1, 3]), lambda comm: comm.all_to_all_single(X.half(), [1, 3])),
        (lambda comm: comm.all_to_all_single(X, [1, 3]), lambda comm: comm.all_to_all_single(None, [1, 3])),
        (lambda comm: comm.broadcast(X, source=0), lambda comm: comm.broadcast(X, source=1)),
        (lambda comm: comm.broadcast(X), lambda comm: comm.broadcast(X[1:])),
        (lambda comm: comm.all_to_all([X, X]), lambda comm: comm.all_to_all([X, X, X])),
        (lambda comm: comm.all_to_all([X, X]), lambda comm: comm.all_to_all([X, X.half()])),
        (lambda comm: comm.all_to_all([X, X]), lambda comm: comm.all_to_all([X, None])),
    ],
)
def test_every_argument_that_has_to_agree_is_compared(one, other):
    error = mismatch(2, lambda comm: other(comm) if comm.rank else one(comm))
    assert error.calls[0] != error.calls[1]


def test_dims_counted_from_either_end_are_the_same_dim():
    def body(comm):
        return comm.all_gather(X, dim=-1 if comm.rank else 1), comm.reduce_scatter(X, dim=0 if comm.rank else -2)

    assert run_ranks(Grid(tp=2), body).failure is None


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda comm: comm.all_reduce("x"), "all_reduce(str): expected tensors, got str"),
        (lambda comm: comm.all_gather(X, dim=2), "all_gather(fp32[4, 3], dim=2): expected a dim from -2 to 1"),
        (lambda comm: comm.broadcast(X, source=5), "broadcast(fp32[4, 3], source=5): expected a source from 0 to "),
        (lambda comm: comm.all_to_all([X] * 3), "expected {tp} tensors, one for each rank; got 3"),
    ],
)
def test_a_call_that_no_rank_could_make_is_refused_with_what_fits(call, text, tp):
    failure = run_ranks(Grid(tp=tp), call).failure
    assert isinstance(failure, UsageError)
    assert text.format(tp=tp) in str(failure)


@BOTH
def test_shares_that_are_not_equal_are_refused_with_the_padded_width(threads):
    failure = run_ranks(Grid(tp=2), lambda comm: comm.reduce_scatter(X, dim=1), threads=threads).failure
    assert isinstance(failure, UsageError)
    assert str(failure) == (
        "collective 0 of group tp: ranks 0, 1: reduce_scatter(fp32[4, 3], dim=1): "
        "dim 1 of width 3 has no 2 equal shares; pad it to 4"
    )


@BOTH
@pytest.mark.parametrize("sizes", [(4, 0, 0), (0, 4, 0), (0, 0, 4), (0, 1, 3), (2, 0, 2)])
def test_a_sum_is_scattered_in_shares_of_which_some_may_be_empty(sizes, threads):
    """Each rank's share, also along a dim counted from the end, and of its own memory."""

    def body(comm):
        return comm.reduce_scatter(X + comm.rank, sizes=sizes), comm.reduce_scatter((X + comm.rank).T, -1, sizes)

    total = X + (X + 1) + (X + 2)
    for rank, (rows, columns) in enumerate(run_ranks(Grid(tp=3), body, threads=threads).unwrap()):
        assert torch.equal(rows, total.split(list(sizes))[rank])
        assert torch.equal(columns, total.split(list(sizes))[rank].T)
        assert rows.untyped_storage().nbytes() == rows.numel() * 4


@BOTH
def test_ranks_that_disagree_about_the_shares_are_named_with_theirs(threads):
    def body(comm):
        return comm.dp.reduce_scatter(X, sizes=[3, 1] if comm.rank == 3 else [1, 3])

    error = mismatch(Grid(tp=2, dp=2), body, threads)
    assert str(error) == (
        "collective 0 of group dp differs: rank 1: reduce_scatter(fp32[4, 3], sizes=[1, 3]), "
        "rank 3: reduce_scatter(fp32[4, 3], sizes=[3, 1])"
    )


@BOTH
@pytest.mark.parametrize("sizes", [(1, 2), (4, 1), (4,), (2, 1, 1), (-1, 5)])
def test_shares_that_do_not_add_up_are_refused_with_what_would(sizes, threads):
    failure = run_ranks(Grid(tp=2), lambda comm: comm.reduce_scatter(X, sizes=sizes), threads=threads).failure
    assert isinstance(failure, UsageError)
    assert str(failure) == (
        f"collective 0 of group tp: ranks 0, 1: reduce_scatter(fp32[4, 3], sizes={list(sizes)}): "
        "expected 2 sizes of 0 or more that add up to 4"
    )


@BOTH
@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("sizes", [(1, 2), (4, 1), (4,), (2, 1, 1), (-1, 5)])
def test_rows_that_the_sizes_of_one_rank_do_not_cover_are_refused_by_that_rank(sizes, wrong, threads):
    def body(comm):
        return comm.ep.all_to_all_single(X, sizes if comm.ep.rank == wrong else [1, 3])

    failure = run_ranks(Grid(dp=2, ep=2), body, threads=threads).failure
    assert isinstance(failure, UsageError)
    assert str(failure) == (
        f"collective 0 of group ep: rank {wrong}: all_to_all_single(fp32[4, 3], sizes={list(sizes)}): "
        "expected 2 sizes of 0 or more that add up to its 4 rows"
    )


def test_a_call_on_another_ranks_communicator_is_refused():
    comms: dict[int, Communicator] = {}

    def body(comm):
        comms[comm.rank] = comm
        comms[0].all_reduce(X)

    failure = run_ranks(Grid(tp=2), body).failure
    assert isinstance(failure, UsageError)
    assert "on the communicator of rank 0, but rank 1 is running" in str(failure)


@BOTH
@pytest.mark.parametrize("tp", [1, 2])
def test_a_communicator_is_refused_after_its_run(tp, threads):
    comm, *_ = run_ranks(Grid(tp=tp), lambda comm: comm, threads=threads).unwrap()
    with pytest.raises(UsageError, match="whose run is over"):
        comm.all_reduce(X)


@BOTH
@pytest.mark.parametrize("tp", [1, 2])
def test_a_collective_from_a_thread_of_the_layer_is_refused(tp, threads):
    def body(comm):
        errors = []

        def call():
            try:
                comm.all_reduce(X)
            except UsageError as error:
                errors.append(str(error))

        helper = threading.Thread(target=call)
        helper.start()
        helper.join()
        return errors[0]

    assert all("from another thread" in text for text in run_ranks(Grid(tp=tp), body, threads=threads).unwrap())


# ---- failures of one rank


@BOTH
@pytest.mark.parametrize("error", [ValueError("a b"), SystemExit(3), GeneratorExit()], ids=repr)
def test_a_raise_on_one_rank_is_the_failure_and_others_are_unwound(error, threads):
    ended = []

    def body(comm):
        try:
            comm.all_reduce(X)
            if comm.rank == 1:
                raise error
            comm.all_reduce(X)
        except Exception:
            ended.append(f"caught {comm.rank}")  # what unwinds the others is no Exception
            raise
        finally:
            ended.append(comm.rank)

    ranks = run_ranks(Grid(tp=3), body, threads=threads)
    assert ranks.failure is error
    assert ranks.failed_rank == 1
    assert ranks.results == (None, None, None)
    assert ended == (["caught 1"] if isinstance(error, Exception) else []) + [1, 0, 2]
    with pytest.raises(type(error)) as caught:
        ranks.unwrap()
    assert caught.value.__notes__[-1] == "raised on rank 1 of 3"


@BOTH
def test_ranks_that_never_started_are_not_started_after_a_raise(threads):
    started = []

    def body(comm):
        started.append(comm.rank)
        raise ValueError(comm.rank)

    assert run_ranks(Grid(tp=4), body, threads=threads).failed_rank == 0
    assert started == [0]


@BOTH
def test_a_finally_block_that_calls_again_cannot_stop_the_unwinding(threads):
    def body(comm):
        try:
            comm.all_reduce(X)
        finally:
            comm.all_reduce(X)

    error = mismatch(2, lambda comm: None if comm.rank else body(comm), threads)
    assert error.calls[1] == "returned"


@BOTH
def test_a_keyboard_interrupt_passes_through(threads):
    def body(comm):
        comm.all_reduce(X)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ranks(Grid(tp=2), body, threads=threads)


@BOTH
def test_two_hundred_mismatches_leave_the_scheduler_usable(threads):
    before = threading.active_count()
    for _ in range(200):
        mismatch(4, lambda comm: None if comm.rank == 3 else comm.all_reduce(X), threads)
    assert run_ranks(Grid(tp=4), lambda comm: comm.all_reduce(X), threads=threads).failure is None
    assert threading.active_count() <= before + 4  # the threads are pooled


@BOTH
def test_a_run_inside_a_rank_is_a_run_of_its_own(threads):
    def inner(comm):
        return comm.all_reduce(torch.ones(1)).item()

    def body(comm):
        inside = run_ranks(Grid(tp=3), inner, threads=threads).unwrap()
        return inside, comm.all_reduce(torch.ones(1)).item()

    assert run_ranks(Grid(tp=2), body, threads=threads).unwrap() == (((3.0,) * 3, 2.0),) * 2


@BOTH
def test_exactly_one_rank_runs_at_a_time_and_in_rank_order(threads):
    order = []

    def body(comm):
        for step in range(3):
            order.append((step, comm.rank))
            comm.all_reduce(X)

    assert run_ranks(Grid(tp=3), body, threads=threads).failure is None
    assert order == [(step, rank) for step in range(3) for rank in range(3)]


@BOTH
@pytest.mark.parametrize("tp", [1, 3])
def test_a_kept_layer_keeps_neither_results_nor_inputs_of_its_run(tp, threads):
    kept, tensors = [], []

    def body_with(given):
        def body(comm):
            kept.append(comm)
            result = comm.all_reduce(given)
            tensors.extend(map(weakref.ref, (given, result)))
            return result

        return body

    gc.collect()
    gc.disable()
    try:
        run_ranks(Grid(tp=tp), body_with(torch.ones(1)), threads=threads)
        assert [ref() for ref in tensors] == [None] * (2 * tp)
    finally:
        gc.enable()


# ---- torch's state


class Counting(TorchDispatchMode):
    """Counts the operators that its owner runs."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


class CountingFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


SETTINGS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "inference_mode off": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "dispatch mode": Counting,
    "function mode": CountingFunctions,
    "default device": lambda: torch.device("cpu"),
}
CALLERS = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "dispatch mode": Counting,
    "function mode": CountingFunctions,
}


@BOTH
@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_held_across_a_collective_stays_on_its_rank(setting, caller, threads):
    seen = []

    def body(comm):
        start = current()
        if comm.rank == 1:
            with SETTINGS[setting]():
                inside = current()
                comm.all_reduce(torch.ones(2) * 2)
                seen.append(current() == inside)
            seen.append(current() == start)
            comm.all_reduce(torch.ones(2))
        else:
            for _ in range(2):
                comm.all_reduce(torch.ones(2))
                seen.append(current() == start)
        return start

    with CALLERS[caller]():
        before = current()
        starts = run_ranks(Grid(tp=3), body, threads=threads).unwrap()
        assert current() == before
        assert set(starts) == {before}  # threads start in the caller's state, too
    assert seen == [True] * 6
    assert not torch.ones(2).is_inference()
    assert (torch.ones(2, requires_grad=True) * 2).requires_grad


@BOTH
def test_autocast_of_one_rank_rounds_nothing_of_another(threads):
    def body(comm):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=comm.rank == 1):
            comm.all_reduce(X)
            return (X @ X.T).dtype

    assert run_ranks(Grid(tp=3), body, threads=threads).unwrap() == (torch.float32, torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run_ranks(Grid(tp=2), lambda comm: (X @ X.T).dtype, threads=threads).unwrap() == (torch.bfloat16,) * 2
    assert (X @ X.T).dtype == torch.float32


@BOTH
def test_ranks_may_leave_their_settings_in_any_order(threads):
    def body(comm):
        with torch.inference_mode(comm.rank % 2 == 0):
            comm.all_reduce(torch.ones(2))
            with torch.inference_mode(comm.rank % 2 == 1):
                for _ in range(comm.rank % 3):
                    torch.ones(2) + 1
                made = comm.all_reduce(torch.ones(2))
                assert torch.is_inference_mode_enabled() == (comm.rank % 2 == 1)
                assert made.is_inference() == (comm.rank % 2 == 1)
                made += 1  # torch refuses this for an inference tensor outside inference mode
            assert torch.is_inference_mode_enabled() == (comm.rank % 2 == 0)
            comm.all_reduce(torch.ones(2))
        return (torch.ones(2, requires_grad=True) * 2).requires_grad

    before = current()
    assert run_ranks(Grid(tp=5), body, threads=threads).unwrap() == (True,) * 5
    assert current() == before


@BOTH
@pytest.mark.parametrize("mode_class", [Counting, CountingFunctions])
def test_a_mode_of_one_rank_sees_neither_other_ranks_nor_the_sum(mode_class, threads):
    def body(comm):
        ones = torch.ones(2)
        if comm.rank != 3:
            for _ in range(2):
                ones = comm.all_reduce(ones * 1)
            return 0
        with mode_class() as mode:
            for _ in range(2):
                ones = comm.all_reduce(ones * 1)
        return mode.seen

    assert run_ranks(Grid(tp=4), body, threads=threads).unwrap() == (0, 0, 0, 2)


@BOTH
@pytest.mark.parametrize("tp", [1, 3])
def test_settings_are_undone_when_the_ranks_are_unwound(tp, threads):
    def body(comm):
        with torch.inference_mode(), Counting(), CountingFunctions(), torch.autocast("cpu", dtype=torch.bfloat16):
            comm.all_reduce(X)
            if comm.rank == tp - 1:
                raise ValueError("here")
            comm.all_reduce(X)

    before = current()
    assert str(run_ranks(Grid(tp=tp), body, threads=threads).failure) == "here"
    assert current() == before
    assert not torch.ones(1).is_inference()


NEVER_EXITED: list[object] = []  # torch ends a guard when it is collected, which nobody can take back


@BOTH
@pytest.mark.parametrize("tp", [1, 2])
def test_settings_that_a_rank_never_undoes_end_with_it(tp, threads):
    def body(comm):
        start = current()
        torch.set_grad_enabled(False)
        for context in (torch.inference_mode(), Counting(), CountingFunctions()):
            context.__enter__()
            NEVER_EXITED.append(context)
        comm.all_reduce(X)
        return start

    before = current()
    starts = run_ranks(Grid(tp=tp), body, threads=threads).unwrap()
    assert set(starts) == {before}
    gc.collect()
    assert current() == before
    assert (torch.ones(2, requires_grad=True) * 2).requires_grad


@BOTH
@pytest.mark.parametrize("tp", [1, 3])
def test_a_rank_that_changes_the_default_dtype_is_named(tp, threads):
    def body(comm):
        if comm.rank == tp - 1:
            torch.set_default_dtype(torch.bfloat16)
        assert comm.all_reduce(torch.ones(2, dtype=torch.float32)).dtype == torch.float32
        return torch.ones(1).dtype

    ranks = run_ranks(Grid(tp=tp), body, threads=threads)
    assert torch.get_default_dtype() == torch.float32
    assert isinstance(ranks.failure, UsageError)
    assert ranks.failed_rank == tp - 1
    assert f"rank {tp - 1} returned with the default dtype changed from torch.float32 to torch.bf" in str(ranks.failure)
    assert all(dtype == torch.float32 for dtype in ranks.results[: tp - 1])


def test_a_default_dtype_held_across_a_collective_and_set_back_is_allowed():
    def body(comm):
        if comm.rank == 0:
            torch.set_default_dtype(torch.bfloat16)
        comm.all_reduce(torch.zeros(1, dtype=torch.float32))
        made = torch.ones(1).dtype
        torch.set_default_dtype(torch.float32)
        return made

    assert run_ranks(Grid(tp=2), body).unwrap() == (torch.bfloat16, torch.float32)


@BOTH
def test_context_variables_come_from_the_caller_and_stay_on_their_rank(threads):
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("caller")

    def body(comm):
        seen = variable.get()
        variable.set(f"rank {comm.rank}")
        comm.all_reduce(X)
        return seen, variable.get()

    assert run_ranks(Grid(tp=2), body, threads=threads).unwrap() == (("caller", "rank 0"), ("caller", "rank 1"))
    assert variable.get() == "caller"


def test_a_collective_inside_a_library_operator_meets_on_threads():
    comms: dict[int, Communicator] = {}

    @torch.library.custom_op("moe_harness_test::reduce", mutates_args=())
    def reduce(x: torch.Tensor, rank: int) -> torch.Tensor:
        return comms[rank].all_reduce(x)

    def body(comm):
        comms[comm.rank] = comm
        with torch.no_grad() if comm.rank == 1 else torch.enable_grad():
            return torch.ops.moe_harness_test.reduce(X * comm.rank, comm.rank)

    for caller in (torch.enable_grad, torch.inference_mode):
        with caller():
            before = current()
            for result in run_ranks(Grid(tp=4), body, threads=True).unwrap():
                assert torch.equal(result, X * 6)
            assert current() == before

    def one_returns_early(comm):
        return None if comm.rank == 0 else body(comm)

    error = mismatch(3, one_returns_early, threads=True)
    assert error.calls[0] == "returned"


def test_resolving_reads_calls_only_and_changes_none():
    group = Group("tp", (0, 1), 0, lambda call: ())
    given = [X.clone(), X + 1]
    results = resolve([Call(rank, group, 0, "all_reduce", (tensor,), 0) for rank, tensor in enumerate(given)])
    assert torch.equal(given[0], X)
    assert torch.equal(given[1], X + 1)
    assert len({result[0].data_ptr() for result in results} | {tensor.data_ptr() for tensor in given}) == 4
