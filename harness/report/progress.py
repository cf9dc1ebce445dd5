"""A progress bar on a terminal's stderr; silent everywhere else, so that logs and JSON stay clean."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from harness.finding import Finding, Verdict


class Progress:
    """Context manager. `advance` counts a finding and shows the case that was last done and the mismatches so far."""

    def __init__(self, total: int) -> None:
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._total = total
        self._mismatches = 0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("starting workers", total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, finding: Finding) -> None:
        if self._bar is None:
            return
        self._mismatches += finding.verdict is Verdict.MISMATCH
        wrong = f"[red]{self._mismatches} mismatches[/] " if self._mismatches else ""
        self._bar.update(
            self._task, advance=1, description=f"{wrong}{finding.system.rsplit('/', 1)[-1]} {finding.case}"
        )

    @staticmethod
    def console_for(stream: TextIO) -> Console:
        """Rich on a terminal; elsewhere plain text, wide enough that no row breaks."""
        return Console(file=stream) if stream.isatty() else Console(file=stream, width=160, no_color=True)
