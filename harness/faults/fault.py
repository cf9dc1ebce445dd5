"""What a fault is: data with a public reference, and what to change in a right layer to have it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from harness.case import Case
from harness.comm import Communicator
from harness.runner.layer import FusedMoE
from harness.systems import Layer
from harness.systems.runner import RunnerSystem, TwoBranches
from reference.spec import MoESpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One mistake, planted when a rank has built its layer. Where a hook is None, nothing is changed there.

    family: as in docs/faults.md ("A1").    also: families that compute the same, where a diagnosis may say either.
    computes: the wrong formula.    references: public threads, "owner/repository#number".
    case: a case that shows it.    words: what the diagnosis of that case has to contain.
    applies: whether the layer of a case has what the fault breaks.    grids: what follows the model in the cases where
    `moe-harness faults` plants it, as in "tp2.ep2.tokens33+kernel=deepep_ht"; () for those of its stage (bank.py).
    spec: the layer is built by other rules.    weights: from other weights, per rank.    layer: changed once built, on
    each branch of a layer that has two.    block: the model around the layer is changed.
    """

    name: str
    family: str
    computes: str
    references: tuple[str, ...]
    case: str
    words: str
    also: tuple[str, ...] = ()
    applies: Callable[[Case], bool] = lambda case: True
    spec: Callable[[MoESpec], MoESpec] | None = None
    weights: Callable[[MoESpec, dict[str, Tensor], Communicator], dict[str, Tensor]] | None = None
    layer: Callable[[FusedMoE, Communicator], None] | None = None
    block: Callable[[Layer, Communicator], Layer] | None = None
    grids: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


class FaultyRunner(RunnerSystem):
    """The runner with one fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        fault = self.fault
        if fault.weights is not None:
            weights = fault.weights(case.spec, dict(weights), comm)
        built = super().build(case if fault.spec is None else OtherRules.of(case, fault.spec), weights, comm)
        if fault.layer is not None:
            for layer in layers_of(built):
                fault.layer(layer, comm)
        return built if fault.block is None else fault.block(built, comm)


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherRules(Case):
    """A case whose layer is built by a changed spec."""

    changed: MoESpec | None = None

    @classmethod
    def of(cls, case: Case, change: Callable[[MoESpec], MoESpec]) -> OtherRules:
        fields = {name: getattr(case, name) for name in Case.__dataclass_fields__}
        return cls(**fields, changed=change(case.spec))

    @property
    def spec(self) -> MoESpec:
        assert self.changed is not None
        return self.changed


def layers_of(built: Layer) -> list[FusedMoE]:
    """The routed layers behind a runner's block: one, or one for each branch."""
    layer = built._layer  # type: ignore[attr-defined]
    return [layer._text, layer._vision] if isinstance(layer, TwoBranches) else [layer]
