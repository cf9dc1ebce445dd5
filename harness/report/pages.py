"""The model pages as text: one table of all, whole pages of some, or JSON. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from harness import models
from reference.spec import MoESpec, Routing, Shared


def text(names: Sequence[str] | None, *, as_json: bool) -> str:
    """All models as a table, or the named ones in full."""
    chosen = [models.load(name) for name in names or models.names()]
    if as_json:
        return "\n".join(json.dumps(_without_infinity(asdict(page))) for page in chosen)
    return "\n\n".join(map(_page, chosen)) if names else _table(chosen)


def _table(pages: Sequence[models.Model]) -> str:
    rows = [("model", "listed", "H", "I", "E", "K", "routing", "s", "shared experts", "confidence")]
    order = ("evaluated", "ours", "rewritten")
    for page in sorted(pages, key=lambda page: (order.index(page.reason), page.model_type)):
        spec, routing = page.real, page.real.routing
        rows.append((
            page.model_type, _REASONS[page.reason], str(spec.hidden_size), str(spec.experts.intermediate_size),
            str(routing.num_experts), str(routing.top_k), _routing(routing),
            "-" if routing.routed_scaling_factor is None else f"{routing.routed_scaling_factor:g}",
            _shared(spec.shared), min((figure.confidence for figure in page.figures), key=_CONFIDENCE.index, default="-"),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    evaluated = sum(page.reason == "evaluated" for page in pages)
    lines.append(
        f"\n{len(pages)} models: {evaluated} evaluated in PR #35949, {sum(p.reason == 'ours' for p in pages)} ours in place of "
        "its unnamed 17th, the others rewritten by it. H, I, E, K of the real checkpoint. A whole page: moe-harness models NAME"
    )
    return "\n".join(lines)


_REASONS = {"evaluated": "PR #35949", "ours": "our 17th", "rewritten": "rewritten"}
_CONFIDENCE = ("low", "medium", "medium-high", "high")


def _routing(routing: Routing) -> str:
    score = routing.scoring_func + (" after top-k" if routing.score_after_topk else "")
    told = [score + (" + bias" if routing.correction_bias else "")]
    if routing.n_group > 1:
        told.append(f"{routing.topk_group} of {routing.n_group} groups by {routing.group_score}")
    if routing.renormalize:
        told.append("renormalised")
    if routing.weight_on == "input":
        told.append("weight on input")
    return ", ".join(told)


def _shared(shared: Shared | None) -> str:
    if shared is None:
        return "-"
    return f"{shared.n_shared_experts} x {shared.intermediate_size // shared.n_shared_experts}" + (
        ", sigmoid gate" if shared.sigmoid_gate else ""
    )


def _page(page: models.Model) -> str:
    lines = [
        f"{page.model_type}: {page.checkpoint}",
        f"listed: {_REASONS[page.reason]}",
        f"scale in the engine: {'the runner, on the routed output' if page.apply_routed_scale_to_output else 'the router, in its weights'}",
        *(f"figures ({figure.what}): {figure.source}; confidence {figure.confidence}" for figure in page.figures),
        *(f"note: {note}" for note in page.notes),
    ]
    for name, spec in (("real", page.real), ("twin", page.twin), ("wide", page.wide)):
        if spec is not None:
            lines += [f"{name}:", *(f"  {line}" for line in _spec_lines(spec))]
    return "\n".join(lines)


def _spec_lines(spec: MoESpec) -> list[str]:
    lines = [f"hidden_size={spec.hidden_size}"]
    for subject in ("routing", "experts", "shared", "output", "vision"):
        value = getattr(spec, subject)
        if value is None:
            lines.append(f"{subject}: none")
            continue
        fields = ", ".join(f"{name}={entry}" for name, entry in asdict(value).items())
        lines.append(f"{subject}: {fields}")
    return lines


def _without_infinity(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_infinity(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinity(entry) for entry in value]
    return str(value) if isinstance(value, float) and abs(value) == float("inf") else value
