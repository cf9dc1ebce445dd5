"""One JSON object a finding, one finding a line."""

from __future__ import annotations

import json
from dataclasses import asdict

from harness.case import parse
from harness.finding import Finding


def line(finding: Finding) -> str:
    """Keys as in Finding, and `grid` with its four sizes; NaN and infinity become text, since JSON has no such numbers."""
    return json.dumps(_plain(finding.as_dict() | {"grid": asdict(parse(finding.case).grid)}), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value
