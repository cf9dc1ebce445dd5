"""Family B: partial sums that are added never, twice, over other ranks than those that hold them, or to other rows.

M tokens of a rank, N of all ranks together, H hidden, K top-k; R routed sum, S shared experts' output; x_r one rank's share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.case import Case
from harness.comm import Communicator, Group
from harness.faults.applies import has_shared, unreduced
from harness.faults.fault import Fault, layers_of
from harness.faults.plant import Plant, answering, around, kernels, planning, replanned, sharing, summed
from harness.runner.block import sequence_parallel_chunk
from harness.runner.experts import shard
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import ALL_TO_ALL, FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.plan import OutputPlan, Reduced
from harness.runner.prepare_finalize import Prepared
from harness.runner.shared_experts import SharedMLP
from harness.systems import Layer

# What follows the model where a fault needs more than the grids of its stage: rows that are sent, another kernel before,
# data-parallel ranks, rows of each tp rank's own, experts that some of the tp ranks cut among them.
SENT = (
    "tp2.ep4.dp2.tokens33+kernel=deepep_ht", "tp4.ep4+kernel=deepep_ll", "tp2.ep2+kernel=nvlink_two_sided",
    "tp2.ep4.dp2.bf16.tokens33+kernel=nvlink_one_sided", "tp2.ep4.dp2.sp2.tokens32+kernel=deepep_ht",
)  # fmt: skip
SWAPS = (
    "tp1+swap=reduced", "tp2+swap=reduced", "tp2+kernel=reduced.swap=partial", "tp4.ep2+kernel=reduced.swap=partial",
    "tp2.ep4.dp2+kernel=deepep_ht.swap=partial", "tp2.ep4.dp2.bf16.tokens33+swap=deepep_ht",
)  # fmt: skip
GATHERED = ("tp2", "dp2.bf16.tokens8", "tp2.ep4.dp2.tokens5_2", "ep4.dp4.tokens32", "tp2.ep2.dp2.tokens32")
OWN_ROWS = (
    "tp2.ep2.sp2.tokens8",
    "tp4.ep4.sp4.tokens32",
    "tp2.ep4.dp2.sp2.tokens32",
    "tp2.ep2.sp2.tokens32+kernel=deepep_ht",
)
PIECES = ("tp4", "tp4.ep4", "tp4.ep2", "tp8.ep4.tokens33", "tp8.ep2.bf16")
REDUCING = (*SENT, "tp1+kernel=reduced", "tp4.ep2+kernel=reduced")


def _unreduced_and_shared(case: Case) -> bool:
    return unreduced(case) and has_shared(case)


def _shared_and_reduced(case: Case) -> bool:
    return has_shared(case) and case.grid.sp == 1 and case.reduce == "layer"


def _kernel_reduces(case: Case) -> bool:
    return case.kernel != "partial" and case.grid.sp == 1


def _gathered(case: Case) -> bool:
    """Tokens of dp ranks are gathered and R is scattered back."""
    return case.kernel in ("partial", "reduced") and case.grid.sp == 1


def _gathered_in_one_branch(case: Case) -> bool:
    """Where a second branch takes the images, all of them may be on one dp rank, which is then right."""
    return _gathered(case) and case.spec.vision is None


def _over_pieces(case: Case) -> bool:
    return unreduced(case) and case.grid.dp == 1


def _sent(case: Case) -> bool:
    return case.kernel in ALL_TO_ALL


def _sent_to_be_added(case: Case) -> bool:
    """What comes back is weighed already; else weights would meet the wrong results as well."""
    return _sent(case) and case.kernel != "deepep_ll"


# ---- who reduces


NOTHING_REDUCED = planning(lambda plan, layer: {
    "routed_reduced": Reduced.NOT_NEEDED,
    "shared_reduced": None if plan.shared_reduced is None else Reduced.NOT_NEEDED,
})  # fmt: skip


def reducing(how: Callable[[Tensor, Communicator], Tensor]) -> Plant:
    """The runner's all-reduces over tp done in another way: (the rank's own share, comm) -> the sum."""

    def plant(layer: FusedMoE, comm: Communicator) -> None:
        if comm.tp.size > 1:
            other: Any = SimpleNamespace(tp=SimpleNamespace(all_reduce=lambda partial: how(partial, comm)))
            layer.runner.comm = other

    return plant


def _wrong_about(reduced: bool) -> Plant:
    """The kernel tells the runner that its output is reduced, or that it is not."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        kernel.prepare_finalize.output_is_reduced = reduced

    return kernels(change)


def _frozen(layer: FusedMoE, comm: Communicator) -> None:
    """The first plan decides for all calls."""
    right, first = layer.runner.plan, []

    def wrong(dtype: torch.dtype, width: int) -> Any:
        plan = right(dtype, width)
        first.append(plan)
        return replanned(plan, routed_reduced=first[0].routed_reduced, shared_reduced=first[0].shared_reduced)

    layer.runner.plan = wrong  # type: ignore[method-assign]


def _asked_when_built(block: Layer, comm: Communicator) -> Layer:
    """The kernel that the layer was built with, here that of the first call, decides for the one that follows."""
    case: Case = block._case  # type: ignore[attr-defined]
    for layer in layers_of(block):
        first = layer.make_kernel(case.swap, layer.runner.placement)  # type: ignore[arg-type]
        _wrong_about(first.output_is_reduced)(layer, comm)
    return block


def _decided_while_profiling(routed: Reduced, shared: Reduced) -> Plant:
    """The profile run had a large batch, which went through another kernel; its decision was compiled in."""

    def change(plan: OutputPlan, layer: FusedMoE) -> dict[str, object]:
        if plan.routed_reduced is Reduced.NOT_NEEDED:
            return {}
        return {"routed_reduced": routed, "shared_reduced": plan.shared_reduced and shared}

    return planning(change)


def _model_reduces_again(comm: Communicator, block: Layer, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
    return summed(comm.tp, block(hidden_states, **inputs))


def _model_scatters_and_gathers(comm: Communicator, block: Layer, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
    """The complete y goes through a reduce-scatter, and each rank's rows are gathered again."""
    y_MH = block(hidden_states, **inputs)
    if comm.tp.size == 1:
        return y_MH
    sizes = [len(rows) for rows in y_MH.tensor_split(comm.tp.size)]
    return comm.tp.all_gather(comm.tp.reduce_scatter(y_MH, 0, sizes))


def _whole_experts_need_no_sum(layer: FusedMoE, comm: Communicator) -> None:
    """moe.tp = 1 is taken for "nothing to reduce", though ep cuts the experts among the ranks."""
    if layer.runner.facts.moe_tp == 1:
        NOTHING_REDUCED(layer, comm)


# ---- the shared experts


def _shared_kept_partial(layer: FusedMoE, comm: Communicator) -> None:
    """S joins R after R's sum, as the rank's own share."""
    right = layer.runner._maybe_apply_routed_scale_to_output
    kept: dict[str, Tensor] = {}

    def without(shared_MH: Tensor | None, routed_ML: Tensor, plan: Any) -> tuple[Tensor | None, Tensor]:
        shared_MH, routed_ML = right(shared_MH, routed_ML, plan)
        if shared_MH is not None:
            kept["shared"] = shared_MH
        return None, routed_ML

    layer.runner._maybe_apply_routed_scale_to_output = without  # type: ignore[method-assign]
    answering(lambda y, x, layer, comm: y + kept["shared"] * layer._spec.output.share)(layer, comm)


def _whole_shared(layer: FusedMoE, comm: Communicator) -> None:
    """Every rank holds all of the shared experts."""
    shared, spec = layer.runner.shared_experts, layer._spec.shared
    if shared is not None and spec is not None:
        shared._module = SharedMLP(layer._weights, spec, 0, 1)


def _shared_cut_over_tp(layer: FusedMoE, comm: Communicator) -> None:
    """The shared experts stay cut over tp although the tp ranks have different rows."""
    shared, spec = layer.runner.shared_experts, layer._spec.shared
    if shared is not None and spec is not None and spec.intermediate_size % comm.tp.size == 0:
        shared._module = SharedMLP(layer._weights, spec, comm.tp.rank, comm.tp.size)


# ---- biases and residuals


def _bias_of_every_rank(layer: FusedMoE, comm: Communicator) -> None:
    """Each rank that cuts an expert keeps its second bias."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        parallel, settings = layer._parallel, layer._settings
        held = None if placement is None else placement.experts_of(parallel.ep_rank)
        first = shard(layer._weights, layer._spec.experts, 0, parallel.moe_tp_size, settings.padding, held)
        experts = kernel.experts._inner if kernel.is_monolithic else kernel.experts  # type: ignore[union-attr]
        experts.weights = replace(experts.weights, b2_EP=first.b2_EP)  # type: ignore[union-attr]

    kernels(change)(layer, comm)


def _shared_bias_of_every_rank(layer: FusedMoE, comm: Communicator) -> None:
    shared = layer.runner.shared_experts
    if isinstance(shared and shared._module, SharedMLP):
        b2 = layer._weights["shared_b2"]
        shared._module._b2 = b2 if b2.dtype is torch.float64 else b2.float()  # type: ignore[union-attr]


# ---- over which ranks


def _over_ep_alone(y_MH: Tensor, comm: Communicator) -> Tensor:
    """Right in both pure layouts, where one of both groups holds all peers."""
    return (comm.ep if 1 < comm.ep.size < comm.tp.size else comm.tp).all_reduce(y_MH)


def _over_pieces_alone(y_MH: Tensor, comm: Communicator) -> Tensor:
    pieces = comm.tp.size // comm.ep.size
    if pieces in (1, comm.tp.size):
        return comm.tp.all_reduce(y_MH)
    first = comm.tp.rank // pieces * pieces
    return comm.tp.all_gather(y_MH[None])[first : first + pieces].sum(0)


def _without_the_last(y_MH: Tensor, comm: Communicator) -> Tensor:
    return comm.tp.all_gather(y_MH[None])[:-1].sum(0)


def _of_the_first(y_MH: Tensor, comm: Communicator) -> Tensor:
    return comm.tp.broadcast(y_MH)


def _not_beside_dp(y_MH: Tensor, comm: Communicator) -> Tensor:
    """The reduce-scatter over dp is taken for the whole sum."""
    return y_MH if comm.dp.size > 1 else comm.tp.all_reduce(y_MH)


def _row_blocks(y_MH: Tensor, comm: Communicator) -> Tensor:
    """Scattered and gathered where reduce-scattered was meant."""
    return comm.tp.all_gather(y_MH.tensor_split(comm.tp.size)[comm.tp.rank])


def _average(y_MH: Tensor, comm: Communicator) -> Tensor:
    return comm.tp.all_reduce(y_MH) / comm.tp.size


def _own_share_again(y_MH: Tensor, comm: Communicator) -> Tensor:
    return comm.tp.all_reduce(y_MH) + y_MH


def _by_number_of_rows(y_MH: Tensor, comm: Communicator) -> Tensor:
    """Batches of at least as many rows as ranks are scattered by another method, which this one is taken to be."""
    return y_MH if len(y_MH) >= comm.tp.size else comm.tp.all_reduce(y_MH)


def _residual_before_the_sum(layer: FusedMoE, comm: Communicator) -> None:
    """Each rank adds its copy of x, in the unit of the call, to what is then summed."""
    right, given = layer.runner.reduce_and_trunc, list[Tensor]()
    steps = layer.runner.steps

    def kept(x_MH: Tensor, *rest: Any) -> Any:
        given[:] = [x_MH]
        return steps(x_MH, *rest)

    def added(states: Tensor, width: int, plan: OutputPlan) -> Tensor:
        x_MH = functional.pad(given[0], (0, states.shape[1] - width))
        return right(states + x_MH * plan.output_unit, width, plan)

    layer.runner.steps, layer.runner.reduce_and_trunc = kept, added  # type: ignore[assignment, method-assign]


# ---- gather and scatter


def scattering(how: Callable[[Group, Tensor, list[int]], Tensor]) -> Plant:
    """The naive combine done in another way: (group, results [N, P], rows of each rank) -> [M, P]."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        transport: Any = kernel.prepare_finalize
        transport = getattr(transport, "_inner", transport)  # of a kernel that reduces by itself
        group = getattr(transport, "_group", None)
        if group is None or group.size == 1 or hasattr(transport, "_owner_E"):
            return
        transport.scatter = lambda out_NP, home: how(group, out_NP, home)

    return kernels(change)


def _own_block(group: Group, out_NP: Tensor, sizes: list[int]) -> Tensor:
    """Scattered where reduce-scattered was meant."""
    return out_NP.split(sizes)[group.rank]


def _reduced_before(group: Group, out_NP: Tensor, sizes: list[int]) -> Tensor:
    return group.reduce_scatter(group.all_reduce(out_NP), 0, sizes)


def _in_reverse(group: Group, out_NP: Tensor, sizes: list[int]) -> Tensor:
    """Gathered in the order of ranks, scattered in the reverse one; a rank cuts or fills what it gets to its own number."""
    mine = group.reduce_scatter(torch.cat(out_NP.split(sizes)[::-1]), 0, sizes[::-1])
    return functional.pad(mine, (0, 0, 0, max(sizes[group.rank] - len(mine), 0)))[: sizes[group.rank]]


def _one_row_off(group: Group, out_NP: Tensor, sizes: list[int]) -> Tensor:
    return group.reduce_scatter(out_NP.roll(1, 0), 0, sizes)


def _as_if_not_gathered(group: Group, out_NP: Tensor, sizes: list[int]) -> Tensor:
    """The first rows of the sum, as where nothing had been gathered."""
    return group.all_reduce(out_NP)[: sizes[group.rank]]


def _equal_shares(group: Group, out_NP: Tensor, sizes: list[int]) -> Tensor:
    """Every rank is taken to have as many rows as the average, rounded up."""
    share, mine = -(-sum(sizes) // len(sizes)), sizes[group.rank]
    padded = functional.pad(out_NP, (0, 0, 0, share * len(sizes) - sum(sizes)))
    got = group.reduce_scatter(padded)
    return functional.pad(got, (0, 0, 0, max(mine - share, 0)))[:mine]


def _next_chunk(comm: Communicator, block: Layer, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
    """Each rank takes the rows of the next one, and gathers them as its own."""
    layer: Any = block._layer  # type: ignore[attr-defined]
    share = -(-len(hidden_states) // comm.tp.size)
    padded = share * comm.tp.size - len(hidden_states)

    def chunk(rows: Tensor) -> Tensor:
        rows = functional.pad(rows, (0, 0) * (rows.dim() - 1) + (0, padded)).roll(-share, 0)
        return sequence_parallel_chunk(rows, comm)

    y_mH = layer(chunk(hidden_states), **{name: chunk(rows) for name, rows in inputs.items()})
    return comm.tp.all_gather(y_mH)[: len(hidden_states)]


def _gathered_in_reverse(comm: Communicator, block: Layer, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
    layer: Any = block._layer  # type: ignore[attr-defined]
    chunks = {name: sequence_parallel_chunk(rows, comm) for name, rows in inputs.items()}
    y_mH = layer(sequence_parallel_chunk(hidden_states, comm), **chunks)
    return torch.cat(comm.tp.all_gather(y_mH[None]).flip(0).unbind())[: len(hidden_states)]


def _rows_summed(comm: Communicator, block: Layer, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
    """The runner's all-reduce stays on although the ranks' rows are different tokens."""
    layer: Any = block._layer  # type: ignore[attr-defined]
    chunks = {name: sequence_parallel_chunk(rows, comm) for name, rows in inputs.items()}
    y_mH = summed(comm.tp, layer(sequence_parallel_chunk(hidden_states, comm), **chunks))
    return comm.tp.all_gather(y_mH)[: len(hidden_states)]


# ---- the combine of an all-to-all


def combining(how: Callable[[Tensor, Prepared], tuple[Tensor, Any]]) -> Plant:
    """The results that came back, and the table of whose they are, before the right combine adds them."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        transport: Any = kernel.prepare_finalize
        right = transport.receive

        def receive(sent: Tensor, prepared: Prepared) -> Tensor:
            sent, home = how(sent, prepared)
            return right(sent, replace_home(prepared, home))

        transport.receive = receive

    return kernels(change)


def replace_home(prepared: Prepared, home: Any) -> Prepared:
    return Prepared(prepared.x, prepared.weights_NK, prepared.local_NK, prepared.batch, home)


def _by_arrival(sent: Tensor, prepared: Prepared) -> tuple[Tensor, Any]:
    """Results are taken to come in the order of the tokens."""
    from_each, row_D, *rest = prepared.home
    return sent, (from_each, row_D.sort().values, *rest)


def _one_result_late(sent: Tensor, prepared: Prepared) -> tuple[Tensor, Any]:
    return sent.roll(1, 0), prepared.home


def _ids_of_the_batch(sent: Tensor, prepared: Prepared) -> tuple[Tensor, Any]:
    """The combine reads rows of the dispatched batch where those of its own tokens are due."""
    from_each, row_D, *rest = prepared.home
    return sent, (from_each, row_D.flip(0), *rest)


FAULTS: tuple[Fault, ...] = (
    # -- B1
    Fault(
        name="nothing_reduced", family="B1", also=("B8",), computes="R_r + S_r",
        references=("flagos-ai/vllm-plugin-FL#219", "vllm-project/vllm-ascend#10557"),
        case="deepseek_v3@tp4", words="nothing is reduced",
        applies=unreduced, layer=NOTHING_REDUCED,
    ),
    Fault(
        name="kernel_wrongly_says_reduced", family="B1", also=("B8",), computes="R_r + S",
        references=("vllm-project/vllm#40668", "vllm-project/vllm-ascend#16550"),
        case="deepseek_v3@tp4.ep4", words="the routed part is not reduced",
        applies=unreduced, layer=_wrong_about(True),
    ),
    Fault(
        name="whole_experts_need_no_sum", family="B1", also=("B8",), computes="R_r + S_r where ep > 1",
        references=("vllm-project/vllm-ascend#10557", "NVIDIA/TensorRT-LLM#1367"),
        case="mixtral@tp4.ep4", words="reduced",
        applies=unreduced, layer=_whole_experts_need_no_sum,
    ),
    Fault(
        name="left_to_a_caller_who_does_not", family="B1", also=("B8",), computes="R_r + S_r",
        references=("vllm-project/tpu-inference#3151", "sgl-project/sglang#32511"),
        case="deepseek_v3@tp2+reduce=caller", words="nothing is reduced",
        applies=lambda case: case.reduce == "caller", layer=NOTHING_REDUCED,
        grids=("tp1+reduce=caller", "tp2+reduce=caller", "tp4.ep4+reduce=caller", "tp2.ep4.dp2+reduce=caller"),
    ),
    # -- B2
    Fault(
        name="model_reduces_again", family="B2", computes="tp*(R + S)",
        references=("vllm-project/vllm-ascend#6710", "vllm-project/vllm-ascend#10443", "vllm-project/vllm-gaudi#1451"),
        case="deepseek_v3@tp4", words="reduced twice (R, S x tp)",
        applies=lambda case: case.grid.sp == 1, block=around(_model_reduces_again),
    ),
    Fault(
        name="reducing_kernel_says_partial", family="B2", computes="tp*R + S",
        references=("vllm-project/vllm#41382", "vllm-project/vllm-ascend#9485"),
        case="deepseek_v3@tp2.ep4.dp2+kernel=nvlink_one_sided", words="what the kernel had reduced is reduced again",
        applies=_kernel_reduces, layer=_wrong_about(False),
        grids=REDUCING,
    ),
    # -- B3
    Fault(
        name="shared_reduces_itself", family="B3", computes="R + tp*S",
        references=("vllm-project/tpu-inference#3151", "vllm-project/vllm#49122", "vllm-project/vllm#49366"),
        case="aria@tp4", words="summed once per rank (S x tp)",
        applies=_shared_and_reduced, layer=sharing(lambda module, x_MH, comm: summed(comm.tp, module(x_MH))),
    ),
    Fault(
        name="shared_reduced_early_and_finally", family="B3", computes="R + tp*S",
        references=("vllm-project/tpu-inference#3151", "vllm-project/vllm-ascend#16550"),
        case="deepseek_v3@tp4.ep2", words="summed once per rank (S x tp)",
        applies=_unreduced_and_shared,
        layer=planning(lambda plan, layer: {"shared_reduced": Reduced.EARLY} if plan.shared_reduced is Reduced.FINAL else {}),
    ),
    # -- B4
    Fault(
        name="replicated_shared_added_before_the_sum", family="B4", also=("B3",), computes="R + G*S",
        references=("sgl-project/sglang#31475", "NVIDIA/TensorRT-LLM#15922", "RBLN-SW/vllm-rbln#960"),
        case="deepseek_v3@tp4.ep4", words="it was complete on every rank before the sum",
        applies=_shared_and_reduced, layer=_whole_shared,
    ),
    # -- B5
    Fault(
        name="shared_added_after_the_sum", family="B5", computes="R + S_r",
        references=("vllm-project/vllm#39181",),
        case="deepseek_v3@tp4", words="left partial",
        applies=_unreduced_and_shared, layer=_shared_kept_partial,
    ),
    Fault(
        name="shared_not_reduced_beside_a_reducing_kernel", family="B5", computes="R + S_r",
        references=("vllm-project/vllm#39181", "vllm-project/vllm-ascend#16550"),
        case="deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht", words="left partial",
        applies=lambda case: _kernel_reduces(case) and has_shared(case),
        layer=planning(lambda plan, layer: {"shared_reduced": Reduced.NOT_NEEDED} if plan.shared_reduced else {}),
        grids=REDUCING,
    ),
    Fault(
        name="shared_cut_although_rows_are_apart", family="B5", also=("B8",), computes="R + S_r",
        references=("vllm-project/vllm#39181", "vllm-project/vllm#37856"),
        case="deepseek_v3@tp2.ep2.sp2.tokens33", words="S",
        applies=lambda case: case.grid.sp > 1 and has_shared(case), layer=_shared_cut_over_tp, grids=OWN_ROWS,
    ),
    # -- B6
    Fault(
        name="reduced_then_reduce_scattered_over_dp", family="B6", also=("B2",), computes="dp*R on the rank's rows",
        references=("sgl-project/sglang#37199", "sgl-project/sglang#23257"),
        case="deepseek_v3@tp2.ep4.dp2", words="what the kernel had reduced is reduced again",
        applies=_gathered, layer=scattering(_reduced_before), grids=GATHERED,
    ),
    Fault(
        name="complete_sum_reduce_scattered_over_tp", family="B6", also=("B2",), computes="tp*(R + S)",
        references=("sgl-project/sglang#37199", "sgl-project/sglang#23257"),
        case="deepseek_v3@tp4", words="reduced twice (R, S x tp)",
        applies=lambda case: case.grid.sp == 1, block=around(_model_scatters_and_gathers),
    ),
    # -- B7
    Fault(
        name="scattered_over_dp_without_a_sum", family="B7", also=("B1", "B8"), computes="slice of R_r",
        references=("sgl-project/sglang#27191",),
        case="deepseek_v3@tp2.ep4.dp2.tokens33", words="sum",
        applies=_gathered, layer=scattering(_own_block), grids=GATHERED,
    ),
    Fault(
        name="scattered_over_tp_without_a_sum", family="B7", computes="slices of R_r + S_r, gathered",
        references=("sgl-project/sglang#27191",),
        case="deepseek_v3@tp4.tokens33", words="each of them one rank's partial sum",
        applies=unreduced, layer=reducing(_row_blocks),
    ),
    # -- B8
    Fault(
        name="summed_over_ep_alone", family="B8", computes="sum over ep of R_r + S_r",
        references=("sgl-project/sglang#32511", "sgl-project/sglang#32963", "sgl-project/sglang#32012"),
        case="deepseek_v3@tp4.ep2", words="a sum over moe.tp is missing",
        applies=_over_pieces, layer=reducing(_over_ep_alone), grids=PIECES,
    ),
    Fault(
        name="summed_over_pieces_alone", family="B8", computes="sum over moe.tp of R_r + S_r",
        references=("sgl-project/sglang#32511", "sgl-project/sglang#32963"),
        case="deepseek_v3@tp4.ep2", words="a sum over ep is missing",
        applies=_over_pieces, layer=reducing(_over_pieces_alone), grids=PIECES,
    ),
    Fault(
        name="not_summed_over_tp_beside_dp", family="B8", also=("B1",), computes="sum over dp of R_r, + S_r",
        references=("sgl-project/sglang#29155", "sgl-project/sglang#32012"),
        case="deepseek_v3@tp2.ep4.dp2.tokens33", words="a sum over tp is missing",
        applies=unreduced, layer=reducing(_not_beside_dp), grids=GATHERED,
    ),
    Fault(
        name="last_rank_skipped", family="B8", computes="sum of all ranks but the last",
        references=("vllm-project/vllm-ascend#863", "deepspeedai/DeepSpeed#7551"),
        case="deepseek_v3@tp4.tokens33", words="missing",
        applies=unreduced, layer=reducing(_without_the_last),
    ),
    Fault(
        name="first_rank_broadcast", family="B8", computes="R_0 + S_0 on every rank",
        references=("flagos-ai/vllm-plugin-FL#219",),
        case="deepseek_v3@tp4.tokens33", words="missing",
        applies=unreduced, layer=reducing(_of_the_first),
    ),
    # -- B9
    Fault(
        name="decision_kept_from_the_first_call", family="B9", also=("B1", "B2", "B5", "B8", "B3"), computes="tp*R + S, or R_r + S, after a swap",
        references=("vllm-project/vllm-ascend#16459", "vllm-project/vllm-ascend#16476"),
        case="deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht.swap=partial", words="reduced again",
        applies=lambda case: case.swap != "none", layer=_frozen, grids=SWAPS,
    ),
    Fault(
        name="kernel_asked_when_the_layer_is_built", family="B9", also=("B1", "B2", "B8"), computes="tp*R + S, or R_r + S, after a swap",
        references=("vllm-project/vllm#40668", "vllm-project/vllm#40673"),
        case="deepseek_v3@tp2.ep4.dp2+swap=deepep_ht", words="R",
        applies=lambda case: case.swap != "none", block=_asked_when_built, grids=SWAPS,
    ),
    Fault(
        name="sum_compiled_out_by_the_profile_run", family="B9", also=("B1", "B8"), computes="R_r + S",
        references=("vllm-project/vllm-ascend#10557", "vllm-project/vllm-ascend#16459"),
        case="deepseek_v3@tp4.ep4", words="the routed part is not reduced",
        applies=unreduced, layer=_decided_while_profiling(Reduced.BY_KERNEL, Reduced.EARLY),
    ),
    Fault(
        name="sum_compiled_in_by_the_profile_run", family="B9", also=("B2",), computes="tp*R + S",
        references=("vllm-project/vllm-ascend#16476", "vllm-project/vllm-ascend#16459"),
        case="deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht", words="reduced again",
        applies=_kernel_reduces, layer=_decided_while_profiling(Reduced.FINAL, Reduced.FINAL),
        grids=REDUCING,
    ),
    Fault(
        name="sum_left_out_of_large_batches", family="B9", also=("B1", "B8"), computes="R_r + S_r from M = tp on",
        references=("vllm-project/vllm-ascend#16459", "vllm-project/vllm-ascend#10557"),
        case="deepseek_v3@tp4.tokens33", words="nothing is reduced",
        applies=lambda case: unreduced(case) and case.tokens > case.grid.ranks, layer=reducing(_by_number_of_rows),
        grids=("tp1", "tp2", "tp4.bf16", "tp4.ep4.tokens33", "tp2.ep4.dp2.tokens33"),
    ),
    # -- B10
    Fault(
        name="second_bias_of_every_rank", family="B10", computes="R + (tp-1)*sum of w*b + S",
        references=("pytorch/torchtitan#4245",),
        case="gpt_oss@tp4", words="the second expert bias is added on every rank (x tp)",
        applies=lambda case: case.spec.experts.bias, layer=_bias_of_every_rank,
        grids=("tp1", "tp2", "tp4", "tp4.bf16", "tp4.ep2", "tp4.ep4", "tp2.dp2", "tp8.ep4", "tp2.ep2.dp2"),
    ),
    Fault(
        name="second_shared_bias_of_every_rank", family="B10", computes="R + S + (tp-1)*c",
        references=("pytorch/torchtitan#4245",),
        case="nemotron_h@tp4", words="the second shared bias is added on every rank (x tp)",
        applies=lambda case: has_shared(case) and case.spec.shared is not None and case.spec.shared.bias,
        layer=_shared_bias_of_every_rank,
    ),
    Fault(
        name="residual_added_on_every_rank", family="B10", also=("H1",), computes="R + S + tp*x",
        references=("deepspeedai/DeepSpeed#2834",),
        case="mixtral@tp4", words="tp*x",
        applies=lambda case: unreduced(case) and case.grid.tp > 1 and not case.spec.experts.latent_bias,
        layer=_residual_before_the_sum,
    ),
    # -- B11
    Fault(
        name="results_added_by_arrival", family="B11", also=("H2", "B12"), computes="each token the sum of others' results",
        references=("vllm-project/vllm#52639",),
        case="deepseek_v3@tp2.ep4.dp2.tokens33+kernel=deepep_ht", words="wrong tokens",
        applies=_sent, layer=combining(_by_arrival), grids=SENT,
    ),
    Fault(
        name="combine_reads_ids_of_the_dispatched_batch", family="B11", also=("H2", "B12"), computes="each token the sum of others' results",
        references=("vllm-project/vllm#52639",),
        case="deepseek_v3@tp2.ep4.dp2.tokens33+kernel=deepep_ht", words="wrong tokens",
        applies=_sent, layer=combining(_ids_of_the_batch), grids=SENT,
    ),
    Fault(
        name="results_one_place_late", family="B11", also=("H2", "B12"), computes="each token the sum of others' results",
        references=("vllm-project/vllm#52639",),
        case="deepseek_v3@tp2.ep4.dp2.tokens33+kernel=deepep_ht", words="wrong tokens",
        applies=_sent_to_be_added, layer=combining(_one_result_late), grids=SENT,
    ),
    # -- B12
    Fault(
        name="scattered_in_reverse", family="B12", also=("H2",), computes="rows of another dp rank",
        references=("vllm-project/vllm-ascend#11921",),
        case="deepseek_v3@tp2.ep4.dp2.tokens32", words="those of another dp rank",
        applies=_gathered_in_one_branch, layer=scattering(_in_reverse), grids=GATHERED,
    ),
    Fault(
        name="scattered_as_if_not_gathered", family="B12", also=("H2",), computes="the first rows of all ranks",
        references=("vllm-project/vllm-gaudi#1618",),
        case="deepseek_v3@tp2.ep4.dp2.tokens32", words="rows of R stand at the wrong tokens",
        applies=_gathered_in_one_branch, layer=scattering(_as_if_not_gathered), grids=GATHERED,
    ),
    Fault(
        name="scattered_one_row_off", family="B12", also=("H2",), computes="rows of the neighbouring token",
        references=("vllm-project/vllm-ascend#11921",),
        case="deepseek_v3@tp2.ep4.dp2.tokens32", words="rows of R stand at the wrong tokens",
        applies=_gathered, layer=scattering(_one_row_off), grids=GATHERED,
    ),
    Fault(
        name="scattered_in_equal_shares", family="B12", also=("H2", "B11"), computes="rows of another dp rank where numbers differ",
        references=("vllm-project/vllm-ascend#16477",),
        case="deepseek_v3@dp2.tokens20_4", words="rows of R",
        applies=_gathered, layer=scattering(_equal_shares),
        grids=("dp2.tokens8", "dp2.tokens20_4", "tp2.dp2.tokens3_9", "tp2.ep4.dp2.tokens9_24"),
    ),
    Fault(
        name="rows_of_the_next_tp_rank", family="B12", also=("H2",), computes="rows of another tp rank",
        references=("vllm-project/vllm-gaudi#1618", "vllm-project/vllm-ascend#16477"),
        case="deepseek_v3@tp4.ep4.sp4.tokens32", words="another tp rank",
        applies=lambda case: case.grid.sp > 1, block=around(_next_chunk), grids=OWN_ROWS,
    ),
    Fault(
        name="rows_gathered_in_reverse", family="B12", also=("H2",), computes="rows of another tp rank",
        references=("vllm-project/vllm-ascend#11921",),
        case="deepseek_v3@tp4.ep4.sp4.tokens32", words="stand at the wrong tokens",
        applies=lambda case: case.grid.sp > 1, block=around(_gathered_in_reverse), grids=OWN_ROWS,
    ),
    # -- what the public table has no row for, and a reimplementation may do
    Fault(
        name="averaged_over_tp", family="B13", computes="(R + S) / tp",
        references=("vllm-project/vllm#35949",),
        case="deepseek_v3@tp4", words="averaged instead of added",
        applies=unreduced, layer=reducing(_average),
    ),
    Fault(
        name="own_share_added_again", family="B14", computes="R + S + R_r + S_r",
        references=("vllm-project/vllm#35949",),
        case="deepseek_v3@tp4.tokens33", words="adds its own share of R and S again",
        applies=_over_pieces, layer=reducing(_own_share_again),
    ),
    Fault(
        name="rows_of_different_tokens_summed", family="B15", computes="sum over tp of rows of different tokens",
        references=("vllm-project/vllm#35949", "vllm-project/vllm-ascend#16477"),
        case="deepseek_v3@tp4.ep4.sp4.tokens32", words="tokens of other ranks are added",
        applies=lambda case: case.grid.sp > 1, block=around(_rows_summed), grids=OWN_ROWS,
    ),
)  # fmt: skip
