"""The runner with a memory that it must not have, or with tensors written that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.faults.fault import Fault, FaultyRunner
from tests.bite.state_faults import as_found


@dataclass(frozen=True, kw_only=True)
class RunnerStateFault:
    """plant: changes a built FusedMoE.    case: that shows it.    named, words, family: of the hazard that has to name it."""

    says: str
    plant: Callable[[Any, Any], None]
    case: str
    named: str
    words: tuple[str, ...] = ()
    family: str | None = None

    def system(self, name: str) -> FaultyRunner:
        return FaultyRunner(
            Fault(name=name, family="", computes=self.says, references=(), case=self.case, words="", layer=self.plant)
        )


def _with_call(layer: Any, call: Callable[..., Tensor]) -> None:
    """layer(x, num_tokens) becomes call(right, x, num_tokens)."""
    right = layer.forward

    def forward(x_MH: Tensor, num_tokens: int | None = None) -> Tensor:
        return call(right, x_MH, num_tokens)

    layer.forward = forward
    layer.__class__ = type(
        "Wrong", (type(layer),), {"__call__": lambda self, *args, **named: self.forward(*args, **named)}
    )


def _frozen_plan(layer: Any, comm: Any) -> None:
    """Beyond 16 tokens another kernel, which reduces; the plan is that of the first call."""
    plans: list[Any] = []
    fresh = layer.runner.plan

    def plan(*facts: Any) -> Any:
        plans.append(fresh(*facts))
        return plans[0]

    layer.runner.plan = plan

    def call(right: Callable[..., Tensor], x_MH: Tensor, num_tokens: int | None) -> Tensor:
        layer.swap_kernel("reduced" if len(x_MH) > 16 else "partial")
        return right(x_MH, num_tokens)

    _with_call(layer, call)


def _shared_output_kept(layer: Any, comm: Any) -> None:
    """The slot of the shared output is filled once for each number of rows."""
    shared, kept = layer.runner.shared_experts, {}
    take = shared.take

    def taken(micro_batch: int) -> Tensor:
        new = take(micro_batch)
        return kept.setdefault(len(new), new)

    layer.runner.shared_experts = _Proxy(shared, take=taken)


class _Proxy:
    """Another object with some attributes replaced."""

    def __init__(self, behind: Any, **replaced: Any) -> None:
        self._behind = behind
        self.__dict__ |= replaced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._behind, name)


def _routes_kept(layer: Any, comm: Any) -> None:
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    router = layer.runner.router

    def select_experts(logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = kept.setdefault(len(logits_ME), router.select_experts(logits_ME))
        return weights.clone(), ids.clone()

    layer.runner.router = _Proxy(router, select_experts=select_experts)


def _input_cleared(layer: Any, comm: Any) -> None:
    """The kernel leaves zeros where the tokens were."""

    def call(right: Callable[..., Tensor], x_MH: Tensor, num_tokens: int | None) -> Tensor:
        y_MH = right(x_MH, num_tokens)
        x_MH.zero_()
        return y_MH

    _with_call(layer, call)


def _one_output_buffer(layer: Any, comm: Any) -> None:
    buffer = torch.zeros(1024, layer._spec.hidden_size, dtype=layer._dtype)

    def call(right: Callable[..., Tensor], x_MH: Tensor, num_tokens: int | None) -> Tensor:
        return buffer[: len(x_MH)].copy_(right(x_MH, num_tokens))

    _with_call(layer, call)


def _scaled_gate(layer: Any, comm: Any) -> None:
    """From the second call on, the router's weights are a tenth larger, in place."""
    calls: list[int] = []

    def call(right: Callable[..., Tensor], x_MH: Tensor, num_tokens: int | None) -> Tensor:
        calls.append(len(x_MH))
        if len(calls) == 2:
            layer.gate.weight_EH.mul_(1.125)
        return right(x_MH, num_tokens)

    _with_call(layer, call)


def _unwritten_output(layer: Any, comm: Any) -> None:
    """The output is added to a tensor that nobody cleared."""

    def call(right: Callable[..., Tensor], x_MH: Tensor, num_tokens: int | None) -> Tensor:
        y_MH = as_found(torch.empty_like(x_MH))
        return y_MH.add_(right(x_MH, num_tokens))

    _with_call(layer, call)


def _block_of_16(layer: Any, comm: Any) -> None:
    def call(right: Callable[..., Tensor], x_MH: Tensor, num_tokens: int | None) -> Tensor:
        y_MH = right(x_MH, num_tokens)
        if len(y_MH) >= 16:
            y_MH[len(y_MH) // 16 * 16 :] = 0
        return y_MH

    _with_call(layer, call)


def _largest_of_the_batch(layer: Any, comm: Any) -> None:
    """Logits are lowered by the largest of the batch, and lifted again: nothing is left beside an infinite one."""
    gate = layer.gate

    def lowered(x_MH: Tensor) -> Tensor:
        logits_ME = gate(x_MH)
        return logits_ME if not len(logits_ME) else logits_ME + 0 * logits_ME.amax()

    layer.gate = lowered


FAULTS: dict[str, RunnerStateFault] = {
    "frozen_plan": RunnerStateFault(
        says="one plan for two kernels", plant=_frozen_plan, case="deepseek_v3@tp4", named="more, then fewer", words=("after a call with 7 tokens", "R x tp"), family="B9",
    ),
    "shared_output_kept": RunnerStateFault(
        says="S is kept by number of rows", plant=_shared_output_kept, case="deepseek_v3@tp2", named="other tokens", words=("computes with S of that call",), family="H2",
    ),
    "routes_kept": RunnerStateFault(
        says="routes are kept by number of rows", plant=_routes_kept, case="deepseek_v3@tp2.ep4.dp2+kernel=deepep_ht", named="other tokens", words=("computes with the routes of that call",), family="H2",
    ),
    "input_cleared": RunnerStateFault(
        says="the hidden states are cleared", plant=_input_cleared, case="gpt_oss@tp2.ep2", named="input unchanged", words=("37 of 37|36 of 37",), family="C1",
    ),
    "one_output_buffer": RunnerStateFault(
        says="the output is a view of a buffer", plant=_one_output_buffer, case="mixtral@ep2.dp2", named="outputs kept", words=("overwritten by a call with",),
    ),
    "scaled_gate": RunnerStateFault(
        says="the gate changes at the second call", plant=_scaled_gate, case="mixtral@tp2", named="weights unchanged", words=("in a later call: router_weight",),
    ),
    "unwritten_output": RunnerStateFault(
        says="the output is added to unwritten memory", plant=_unwritten_output, case="gemma4@tp2", named="poisoned memory", words=("what nobody wrote",), family="G2",
    ),
    "block_of_16": RunnerStateFault(
        says="the rows after the last whole block of 16 are lost", plant=_block_of_16, case="qwen2_moe@tp2", named="M sweep", words=("M = 17",), family="G9",
    ),
    "largest_of_the_batch": RunnerStateFault(
        says="an infinite logit makes all others NaN", plant=_largest_of_the_batch, case="deepseek_v3@tp4.ep4", named="infinite neighbours", words=("all .* other rows",), family="G5",
    ),
}  # fmt: skip
