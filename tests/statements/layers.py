"""What the tests of statements share: a layer of any spec on any grid, and the verdict of a case."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.case import Case, parse, parse_grid
from harness.check import check
from harness.comm import Communicator
from harness.comm.simulated import run_ranks
from harness.finding import Verdict
from harness.runner.layer import FusedMoE, LayerSettings
from harness.systems.runner import RunnerSystem
from harness.weights import make_tokens, make_weights
from reference.moe import forward
from reference.spec import MoESpec

RUNNER = RunnerSystem()
ROUTER_SCALES = LayerSettings(apply_routed_scale_to_output=False)
RUNNER_SCALES = LayerSettings(apply_routed_scale_to_output=True)
Use = Callable[[FusedMoE, Tensor, Communicator], Tensor]


def ok(case: Case | str) -> None:
    """The runner has the case and computes it rightly."""
    finding = check(parse(case) if isinstance(case, str) else case, RUNNER)
    assert finding.verdict is Verdict.OK, (str(case), finding.verdict, finding.diagnosis)


def on_ranks(
    spec: MoESpec, settings: LayerSettings, grid: str, use: Use = lambda layer, x, comm: layer(x), tokens: int = 9
) -> list[Tensor]:
    """What each rank returns for the same tokens in fp32, as float64 in units of y; `use` gets the layer."""
    weights, x = make_weights(spec, 1, torch.float32), make_tokens(spec, tokens, 1, torch.float32).hidden_states

    def body(comm: Communicator) -> Tensor:
        layer = FusedMoE(spec, settings, weights, comm)
        return use(layer, x.clone(), comm).double() / layer.output_unit

    with torch.inference_mode():
        return list(run_ranks(parse_grid(grid), body).unwrap())


def lawful(spec: MoESpec, tokens: int = 9) -> Tensor:
    """The oracle's y for the same tokens."""
    weights, x = make_weights(spec, 1, torch.float32), make_tokens(spec, tokens, 1, torch.float32).hidden_states
    return forward(spec, weights, x).output_MH


def agrees(got: Tensor, expected: Tensor, limit: float = 2e-6) -> bool:
    return bool(((got - expected).norm(dim=-1) <= limit * expected.norm(dim=-1)).all())
