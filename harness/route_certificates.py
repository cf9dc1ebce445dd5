"""For a token on a near tie: which choices of experts are legal, and on which of them its output is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.problem import Problem, Ways
from reference.moe import Choice, forward
from reference.rounding import analyse, router_error
from reference.routes import legal_routes
from reference.spec import RouterPrecision


@dataclass(frozen=True, slots=True)
class Route:
    """experts: best first.    weights: before s."""

    experts: tuple[int, ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        """'3:0.4112 7:0.5888'."""
        return " ".join(f"{e}:{weight:.4f}" for e, weight in zip(self.experts, self.weights, strict=True))


@dataclass(frozen=True, slots=True)
class Certificate:
    """routes: all legal ones; None if they are too many to list.    nearest_R: for each rank, the one nearest to its output.

    holds: whether every rank's output is right on its route; None if nobody can say.
    excess: error of the worst rank over what its nearest route allows; None without routes.
    """

    token: int
    routes: tuple[Route, ...] | None
    nearest_R: tuple[int, ...]
    holds: bool | None
    excess: float | None

    def as_dict(self) -> dict[str, object]:
        """Plain data for a report: equals is the number of a route, or of one for each rank, or "none" or "unknown"."""
        equals: object = "unknown" if self.holds is None else "none"
        if self.holds:
            equals = self.nearest_R[0] if len(set(self.nearest_R)) == 1 else list(self.nearest_R)
        told = [
            {"experts": list(route.experts), "weights": [float(f"{weight:.6g}") for weight in route.weights]}
            for route in self.routes or ()
        ]
        return {"token": self.token, "legal_routes": told, "equals": equals}

    def lines(self) -> Iterator[str]:
        """For people: what the output is, then every legal choice."""
        if self.routes is None or self.excess is None:
            yield f"token {self.token}: more legal choices of experts than can be listed"
            return
        if self.holds:
            said = f"equals {', '.join(f'choice {j}' for j in dict.fromkeys(self.nearest_R))}"
        else:
            said = f"equals none; nearest is choice {self.nearest_R[0]}, {self.excess:.3g} times too far"
        yield f"token {self.token}: {len(self.routes)} legal choice{'s' if len(self.routes) > 1 else ''} of experts; the output {said}"
        for number, route in enumerate(self.routes):
            yield f"  choice {number}: {route}"


def certificate(
    given: Problem, token: int, found_RH: Tensor, allowed: float, limit: float, ways: Ways, precision: RouterPrecision
) -> Certificate:
    """Compare what each rank has for a token with each of its legal routes.

    allowed: the error that the token may have on the oracle's own route. Another one may weigh its experts more, as where
    a sparsemixer's mask changes, and then has a larger deviation: up to limit deviations of its own are allowed there.
    """
    spec, weights = given.spec, given.exact
    routes = routes_of(given, token, precision)
    if routes is None:
        return Certificate(token, None, (), None, None)
    every = Choice(*(torch.cat(parts) for parts in zip(*map(_parts, routes), strict=True)))
    x_NH = given.tokens.hidden_states[token].expand(len(routes), -1)  # N routes, as if they were as many tokens
    vision_N = None if given.tokens.is_vision is None else given.tokens.is_vision[token].expand(len(routes))
    stages = forward(spec, weights, x_NH, is_vision_M=vision_N, choice=every)
    error_R, nearest_R = (found_RH[:, None] - stages.output_MH).norm(dim=-1).min(1)
    allowed_R = torch.full_like(error_R, allowed)
    if not bool((error_R <= allowed_R).all()) and bool(
        (error_R <= 10 * allowed).all()
    ):  # else none can excuse it, or NaN
        cut, shared = ways.routed, ways.shared
        rounding = analyse(spec, weights, x_NH, stages, cut, precision, vision_N, nearest_R, shared_tp=shared)
        allowed_R = (limit * rounding.deviation_M).clamp(min=allowed)
    told = tuple(Route(tuple(r.topk_ids_MK[0].tolist()), tuple(r.topk_weights_MK[0].tolist())) for r in routes)
    holds, excess = bool((error_R <= allowed_R).all()), float((error_R / allowed_R).amax())
    return Certificate(token, told, tuple(nearest_R.tolist()), holds, excess)


def routes_of(given: Problem, token: int, precision: RouterPrecision) -> list[Choice] | None:
    """The legal choices of one token; None if they are too many to list."""
    spec, weights, is_vision = given.spec, given.exact, given.tokens.is_vision
    routing, prefix = spec.routing, ""
    if spec.vision is not None and is_vision is not None and bool(is_vision[token]):
        routing, prefix = spec.vision.routing, "vision_"
    x_1H = given.tokens.hidden_states[token : token + 1]
    vision_1 = None if is_vision is None else is_vision[token : token + 1]
    delta_E = router_error(spec, weights, x_1H, precision, vision_1)[0]
    bias_E, factor_E = (weights.get(prefix + name) for name in ("e_score_correction_bias", "per_expert_scale"))
    return legal_routes(routing, given.stages.logits_ME[token], bias_E, delta_E, factor_E)


def _parts(choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    return choice.topk_ids_MK, choice.topk_weights_MK, choice.margin_M
