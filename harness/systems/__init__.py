"""The systems under test, and what each of them has to offer: the one contract that check.py knows.

`resolve` turns a name into a System: "runner", "legacy", "transformers", or "path/to/file.py:build" and
"package.module:build" for anybody's own layer (the contract is in the README, "Bring your own layer").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from harness.case import OPTIONS
from harness.errors import unknown

if TYPE_CHECKING:
    from torch import Tensor

    from harness.case import Case
    from harness.comm import Communicator
    from reference.spec import MoESpec, RouterPrecision

NAMES = ("runner", "legacy", "transformers")
# Options of a case that only our own runner has a place for; legacy has two more, and the sizes are everybody's.
RUNNER_OPTIONS = (
    "quant", "scale", "experts", "placement", "shared", "order", "pad", "junk", "batches", "swap", "reduce",
)  # fmt: skip
OUR_OPTIONS = (*RUNNER_OPTIONS, "kernel", "backend")


# One rank's built layer: hidden states [M, H] -> [M, H], complete on every rank; modality=int64 [M], 1 for images, is
# passed where the spec has a vision branch. Optional attributes: output_unit (float, 1.0), stages() -> dict of the last
# call by the names of docs/instruments.md, stage_factors (how often each counts the law's), plan (a dataclass that explain
# prints).
Layer = Callable[..., "Tensor"]


class System(Protocol):
    """name: as typed.    foreign: not our code, so it runs on threads in a supervised process."""

    name: str
    foreign: bool

    def __hash__(self) -> int:
        """What a system was probed for is remembered by the object."""

    def supports(self, case: Case) -> str | None:
        """None if the system has this layer, else the reason in a few words: the case is then not-applicable."""

    def precision(self, spec: MoESpec) -> RouterPrecision:
        """Where its router rounds, for the yardstick of the naive runs."""

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> Layer:
        """Called once on each rank with the whole weights; the system shards them as it does in life."""


def beyond(case: Case, options: Sequence[str], system: str) -> str | None:
    """The reason why a system that has none of these options does not have this case; None if the case uses none."""
    for option in options:
        if getattr(case, option) != OPTIONS[option][0][0]:
            return f"{system} has no {option}={getattr(case, option)}"
    return None


def check_name(name: str) -> None:
    """UsageError unless `name` can be resolved; imports neither torch nor the system."""
    if name not in NAMES:
        resolve(name)


def resolve(name: str) -> System:
    """The system of that name. UsageError if there is none; a foreign file is looked for, but not yet imported."""
    if name == "runner":
        from harness.systems.runner import RunnerSystem

        return RunnerSystem()
    if name == "legacy":
        from harness.systems.legacy import LegacySystem

        return LegacySystem()
    if name == "transformers":
        from harness.systems.hf import TransformersSystem

        return TransformersSystem()
    from harness.systems.foreign import ForeignSystem, installed, installed_names

    if ":" in name:
        return ForeignSystem(name)
    plugin = installed(name)
    if plugin is None:
        listing = f"{', '.join((*NAMES, *installed_names()))}, or your own as path/to/file.py:build"
        raise unknown("system", name, (*NAMES, *installed_names()), listing)
    return plugin
