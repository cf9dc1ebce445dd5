"""Five faults that are in no list, planted in the runner: python -m tests.bite.invented prints what check says of each."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.case import parse
from harness.check import check
from harness.faults.fault import Fault, FaultyRunner
from harness.finding import Finding


def _routed(layer, change) -> None:
    """weights, ids = change(weights, ids) behind the router."""
    right = layer.runner.router

    class Wrong:
        scales = right.scales

        @staticmethod
        def select_experts(logits_ME: Tensor) -> tuple[Tensor, Tensor]:
            return change(*right.select_experts(logits_ME))

    layer.runner.router = Wrong()


def _scale_on_the_best(layer, comm) -> None:
    """s is folded into the weight of the first choice alone."""

    def change(w_MK: Tensor, ids_MK: Tensor) -> tuple[Tensor, Tensor]:
        w_MK = w_MK / layer.runner.facts.scale
        w_MK[:, 0] = w_MK[:, 0] * layer.runner.facts.scale
        return w_MK, ids_MK

    _routed(layer, change)


def _small_weights_pruned(layer, comm) -> None:
    """Slots with less than a fifth of the token's weight are dropped, to save work."""

    def change(w_MK: Tensor, ids_MK: Tensor) -> tuple[Tensor, Tensor]:
        return w_MK.masked_fill(w_MK < 0.2 * w_MK.sum(-1, keepdim=True), 0.0), ids_MK

    _routed(layer, change)


def _mirrored_w2(spec, weights, comm) -> dict[str, Tensor]:
    """A rank that is not the first loads the piece of w2 that lies opposite to its piece of w13."""
    changed = dict(weights)
    if comm.rank:
        changed["w2"] = weights["w2"].flip(-1)
    return changed


def _tilted_logits(layer, comm) -> None:
    """Ties are broken by adding expert / 1000 to every logit."""
    gate = layer.gate

    def tilted(x_MH: Tensor) -> Tensor:
        logits_ME = gate(x_MH)
        return logits_ME + torch.arange(logits_ME.shape[1]) / 1000

    layer.gate = tilted


def _saturating_sum(layer, comm) -> None:
    """The kernel adds in a format that ends at 1/4."""
    kernel = layer.runner.kernel
    right = kernel.steps

    def steps(*given):
        routed_MP = yield from right(*given)
        return routed_MP.clamp(-0.25, 0.25)

    kernel.steps = steps


def _fault(name: str, **hook: object) -> Fault:
    return Fault(name=name, family="", computes="", references=(), case="", words="", **hook)  # type: ignore[arg-type]


FAULTS = {
    "s on the best expert alone": (
        _fault("scale_on_the_best", layer=_scale_on_the_best),
        "deepseek_v3@tp2+scale=router",
    ),
    "small weights pruned": (_fault("small_weights_pruned", layer=_small_weights_pruned), "deepseek_v3@tp4"),
    "w2 mirrored on ranks above 0": (_fault("mirrored_w2", weights=_mirrored_w2), "mixtral@tp2"),
    "ties broken by a tilt": (_fault("tilted_logits", layer=_tilted_logits), "qwen3_next@tp2"),
    "a sum that saturates": (_fault("saturating_sum", layer=_saturating_sum), "dots1@tp4.ep4"),
}


def finding(name: str, tokens: int = 7) -> Finding:
    fault, text = FAULTS[name]
    head, plus, tail = text.partition("+")
    return check(parse(f"{head}.tokens{tokens}{plus}{tail}"), FaultyRunner(fault))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in FAULTS:
        found = finding(each)
        print(f"{each}: {found.verdict} at {found.stage}: {found.diagnosis} [{found.family or 'no family'}]\n")
