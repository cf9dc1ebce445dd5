"""Family C: right steps in the wrong order: what the shared experts read, what runs ahead of the sum, where padding is cut.

M tokens, H hidden, L latent, P kernel width; R routed sum, S shared experts' output, tp ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.faults.applies import has_shared
from harness.faults.fault import Fault
from harness.faults.plant import Plant, around, kernels, planning
from harness.runner.layer import FusedMoE
from harness.runner.modular_kernel import FusedMoEKernel
from harness.runner.placement import Placement
from harness.runner.plan import Reduced, SharedExpertsOrder
from harness.systems import Layer

LATE = (
    "tp1+order=3", "tp2.bf16+order=3", "tp4.ep4+order=3", "tp2+order=2", "tp2+order=1", "tp1+experts=monolithic.order=3",
)  # fmt: skip
PADDED = ("tp1+pad=8", "tp2+pad=8", "tp4.ep4.bf16+pad=8", "tp2.ep4.dp2+kernel=deepep_ht.pad=8")
DISPATCHED = ("dp2.bf16", "tp2.ep4.dp2", "tp2.dp2.tokens5_2", "ep4.dp4.tokens32", "tp2", "tp4.ep4.sp4")

# ---- C1


def _in_place(write: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    """The experts leave write(their input, their output) in the buffer that they were given."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        experts: Any = kernel.experts
        right = experts.apply

        def apply(x: Tensor, *given: Any) -> Tensor:
            out: Tensor = right(x, *given)
            if out.shape == x.shape:
                x.copy_(write(x, out))
            return out

        experts.apply = apply

    return kernels(change)


def _after_the_kernel(write: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    """The whole kernel, transport and all, writes into the hidden states that it got."""

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        name = "monolithic_steps" if kernel.is_monolithic else "steps"
        right = getattr(kernel, name)

        def steps(x_MP: Tensor, *given: Tensor) -> Generator[None, None, Tensor]:
            out_MP: Tensor = yield from right(x_MP, *given)
            x_MP.copy_(write(x_MP, out_MP))
            return out_MP

        setattr(kernel, name, steps)

    return kernels(change)


def _overwritten(x: Tensor, out: Tensor) -> Tensor:
    return out


def _added_to(x: Tensor, out: Tensor) -> Tensor:
    return x + out


def _on_a_copy(comm: Communicator, block: Layer, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
    """The caller's residual is spared: what is overwritten is a copy."""
    return block(hidden_states.clone(), **inputs)


# ---- C2


def _shared_reads_the_dispatched(layer: FusedMoE, comm: Communicator) -> None:
    """The shared experts run after the dispatch, on the first rows of what it gathered."""
    planning(lambda plan, layer: {
        "shared_order": SharedExpertsOrder.MULTI_STREAM_OVERLAPPED if plan.shared_reduced else plan.shared_order,
    })(layer, comm)  # fmt: skip
    gathered: dict[str, Tensor] = {}

    def change(kernel: FusedMoEKernel, placement: Placement | None, layer: FusedMoE) -> None:
        transport: Any = kernel.prepare_finalize
        transport = getattr(transport, "_inner", transport)
        if not hasattr(transport, "gather"):
            return
        right = transport.gather

        def gather(*rows: Tensor) -> Any:
            everyone, home = right(*rows)
            gathered["x"] = everyone[0]
            return everyone, home

        transport.gather = gather

    kernels(change)(layer, comm)
    shared = layer.runner.shared_experts
    if shared is None:
        return
    run = shared.run

    def on_gathered(planned: Any, moment: Any, x_MH: Tensor, micro_batch: int = 0) -> None:
        if planned is moment and "x" in gathered:
            x_MH = gathered["x"][: x_MH.shape[0], : x_MH.shape[1]]
        run(planned, moment, x_MH, micro_batch)

    shared.run = on_gathered  # type: ignore[method-assign]


def _shared_beside_plain_experts(case: Case) -> bool:
    """One router, whose experts read what the shared ones read: in their width, and not weighed before."""
    spec = case.spec
    return (
        has_shared(case)
        and spec.experts.latent_size is None
        and spec.vision is None
        and spec.routing.weight_on == "output"
    )


# ---- C4


LATE_PROJECTION = planning(lambda plan, layer: {
    "routed_reduced": Reduced.FINAL if plan.routed_reduced is Reduced.EARLY else plan.routed_reduced,
    "shared_reduced": Reduced.FINAL if plan.routed_reduced is Reduced.EARLY else plan.shared_reduced,
})  # fmt: skip


# ---- C5


def _cutting(trunc: Callable[[Tensor, int], Tensor]) -> Plant:
    def plant(layer: FusedMoE, comm: Communicator) -> None:
        layer.runner.trunc = trunc  # type: ignore[assignment, method-assign]

    return plant


def _padded(case: Case) -> bool:
    return case.pad != "0"


def _padded_and_summed(case: Case) -> bool:
    return _padded(case) and has_shared(case) and case.spec.experts.latent_size is None


def _padded_and_transformed(case: Case) -> bool:
    return _padded(case) and case.spec.experts.latent_size is not None


NOT_CUT_BEFORE_THE_SUM = planning(lambda plan, layer: {"cut_before_sum": False})


FAULTS: tuple[Fault, ...] = (
    Fault(
        name="experts_overwrite_what_the_shared_read", family="C1", computes="R + S(R_r)",
        references=("vllm-project/vllm#28939", "sgl-project/sglang#10352", "vllm-project/vllm#28942"),
        case="deepseek_v3@tp2.tokens33+order=3", words="the shared experts read",
        applies=has_shared, layer=_in_place(_overwritten), block=around(_on_a_copy), grids=LATE,
    ),
    Fault(
        name="experts_add_to_what_the_shared_read", family="C1", computes="R + S(x + R_r)",
        references=("sgl-project/sglang#10352", "MooreThreads/vllm-musa#56"),
        case="deepseek_v3@tp1.tokens33+order=3.scale=router", words="the shared experts read",
        applies=has_shared, layer=_in_place(_added_to), block=around(_on_a_copy), grids=LATE,
    ),
    Fault(
        name="kernel_overwrites_what_the_shared_read", family="C1", computes="R + S(R)",
        references=("vllm-project/vllm#28430", "vllm-project/vllm#28410"),
        case="deepseek_v3@tp2.tokens33+kernel=reduced.order=3", words="the shared experts read",
        applies=has_shared, layer=_after_the_kernel(_overwritten), block=around(_on_a_copy),
        grids=(*LATE, "tp2.ep4.dp2+kernel=deepep_ht.order=3"),
    ),
    Fault(
        name="kernel_overwrites_what_the_caller_needs", family="C1", computes="the caller's residual is R",
        references=("vllm-project/vllm#28939",),
        case="mixtral@tp2", words="changed its input in place",
        applies=lambda case: case.pad == "0" and case.spec.experts.latent_size is None and case.spec.vision is None,
        layer=_in_place(_overwritten), grids=("tp1", "tp2", "tp4.ep4.bf16", "dp2"),
    ),
    Fault(
        name="shared_read_the_dispatched_batch", family="C2", also=("H2",), computes="R + S(first rows of all ranks)",
        references=("vllm-project/vllm#28740", "vllm-project/vllm#24538"),
        case="deepseek_v3@tp2.ep4.dp2.tokens32", words="dispatched batch",
        applies=_shared_beside_plain_experts, layer=_shared_reads_the_dispatched, grids=DISPATCHED,
    ),
    Fault(
        name="latent_projection_ahead_of_the_sum", family="C4", computes="P*R + S + tp*b",
        references=("vllm-project/vllm-ascend#14345", "vllm-project/vllm#52301"),
        case="nemotron_h@tp4", words="its bias is added tp times",
        applies=lambda case: case.spec.experts.latent_bias and case.grid.sp == 1, layer=LATE_PROJECTION,
    ),
    Fault(
        name="padding_cut_after_the_sum", family="C5", computes="pad(R) + S",
        references=("vllm-project/vllm#40794", "vllm-project/vllm#40865", "vllm-project/vllm#45707"),
        case="deepseek_v3@tp2+pad=8", words="The size of tensor",
        applies=_padded_and_summed, layer=NOT_CUT_BEFORE_THE_SUM, grids=PADDED,
    ),
    Fault(
        name="padding_cut_after_the_transform", family="C5", computes="P*pad(R) + S",
        references=("vllm-project/vllm#40865", "vllm-project/vllm#45707"),
        case="nemotron_h@tp2+pad=8", words="shapes cannot be multiplied",
        applies=_padded_and_transformed, layer=NOT_CUT_BEFORE_THE_SUM, grids=PADDED,
    ),
    Fault(
        name="padding_never_cut", family="C5", computes="pad(R)",
        references=("vllm-project/vllm#40865", "vllm-project/vllm#40794"),
        case="mixtral@tp2+pad=8", words="forward returned",
        applies=lambda case: _padded(case) and not _padded_and_summed(case) and not _padded_and_transformed(case),
        layer=_cutting(lambda states, width: states), grids=PADDED,
    ),
)  # fmt: skip
