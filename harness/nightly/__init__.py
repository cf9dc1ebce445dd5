"""The verb `check --profile nightly`: right layers at random, in all legal ways. None of them may be accused.

Cases are drawn by (seed, number) in `draw.py`, from all that the runner has and from the ways of `ways.py`; `varied.py`
builds them, `harness.check.check` judges them by the limits that judge every other layer. A layer is named by its case
and its way, and `python -m harness.nightly 'CASE WAY'` judges it again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from harness import models as pages
from harness.errors import UsageError

_BLOCKS_A_BATCH = 4
_BLOCK_LIMIT_S = 600.0


def nightly(count: int, *, seed: int, models: Sequence[str] | None, jobs: int, as_json: bool) -> int:
    """Draw and judge `count` right layers of the named models, all by default, on `jobs` workers, and report.

    Returns 0; 1 if one was accused; 3 if some could not run, or too many could not be decided.
    """
    if count < 1:
        raise UsageError(f"--cases {count}: no layer would be judged. Type 1 or more, as in --cases 20000")
    if not 0 <= seed < 2**64:
        raise UsageError(f"--seed {seed}: expected 0 to 2**64 - 1")
    from harness.finding import Verdict
    from harness.nightly.numbers import Numbers, blocks
    from harness.nightly.report import Report, bar, line
    from harness.pool import Batch, Outcome, run_all

    names = tuple(models or pages.names())
    texts = [str(numbers) for numbers in blocks(seed, count, names)]
    batches = [
        Batch("runner", tuple(texts[start : start + _BLOCKS_A_BATCH]), "harness.nightly.blocks:prepared")
        for start in range(0, len(texts), _BLOCKS_A_BATCH)
    ]
    report = Report(seed, len(names), max(1, min(jobs, len(batches))))
    started = time.perf_counter()
    with bar(count) as advance:

        def take(outcome: Outcome) -> None:
            for odd in report.take(outcome):
                if as_json:
                    print(line(odd), flush=sys.stdout.isatty())
            numbers = Numbers.parse(outcome.case)
            advance(numbers.stop - numbers.first, report.tally.of(Verdict.MISMATCH))

        run_all(batches, jobs, _BLOCK_LIMIT_S, take)
    report.seconds = time.perf_counter() - started
    print(report.summary() if as_json else report.text())
    return report.exit_code
