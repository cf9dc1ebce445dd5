"""The refactored runner as a system under test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.runner.layer import FusedMoE, LayerSettings
from harness.systems import Layer
from reference.spec import MoESpec, RouterPrecision


class RunnerSystem:
    """Runs every case; its router scores and weighs in fp32 whatever the page says, only its logits follow the page."""

    name = "runner"
    foreign = False

    def supports(self, case: Case) -> str | None:
        if case.backend != "model":
            return "backend=transformers is a variant of legacy"
        if case.order != "1" and case.spec.shared is None:
            return f"order={case.order}: {case.model} has no shared experts to order"
        if case.scale != "page" and case.spec.routing.routed_scaling_factor is None:
            return f"scale={case.scale}: {case.model} has no routed_scaling_factor"
        return None

    def precision(self, spec: MoESpec) -> RouterPrecision:
        return RouterPrecision(logits=spec.routing.precision.logits, scores="fp32", weights="fp32")

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        settings = LayerSettings(
            apply_routed_scale_to_output=case.scaled_by == "output",
            kernel_scales=case.scaled_by == "kernel" and case.spec.routing.routed_scaling_factor is not None,
            kernel_reduces=case.kernel == "reduced",
            kernel_runs_shared=case.order == "2",
            side_stream=case.order == "3",
            padding=int(case.pad),
        )
        if case.spec.vision is not None:
            return TwoBranches(case.spec, settings, weights, comm)
        return FusedMoE(case.spec, settings, weights, comm)


class TwoBranches:
    """ERNIE-VL: two routed layers and one set of shared experts; each token passes one layer, so it meets S once."""

    def __init__(
        self, spec: MoESpec, settings: LayerSettings, weights: Mapping[str, Tensor], comm: Communicator
    ) -> None:
        assert spec.vision is not None
        vision = replace(spec, routing=spec.vision.routing, experts=spec.vision.experts, vision=None)
        own = {n.removeprefix("vision_"): t for n, t in weights.items() if n.startswith(("vision_", "shared_"))}
        self._text = FusedMoE(replace(spec, vision=None), settings, weights, comm)
        self._vision = FusedMoE(vision, settings, own, comm)
        self._vision.runner.shared_experts = self._text.runner.shared_experts
        self.plan = self._text.plan
        self.output_unit = self.plan.output_unit

    def __call__(self, hidden_states: Tensor, *, modality: Tensor) -> Tensor:
        """modality: int64 [M], 1 for the tokens of an image."""
        self._is_vision = modality.bool()
        output = torch.empty_like(hidden_states)
        output[~self._is_vision] = self._text(hidden_states[~self._is_vision])
        output[self._is_vision] = self._vision(hidden_states[self._is_vision])
        return output

    def stages(self) -> dict[str, Tensor]:
        text, vision = self._text.stages(), self._vision.stages()
        joined = {name: text[name].new_empty(len(self._is_vision), text[name].shape[1]) for name in text}
        for name, whole in joined.items():
            whole[~self._is_vision], whole[self._is_vision] = text[name], vision[name]
        return joined
