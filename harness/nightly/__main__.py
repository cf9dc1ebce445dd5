"""python -m harness.nightly 'CASE WAY' ...: judge layers of a nightly run again, each by its text."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from harness.errors import HarnessError
from harness.finding import exit_code


def main(texts: Sequence[str]) -> int:
    """Print what `check` says of each layer: verdict, figures, cause; returns the exit code."""
    if not texts:
        print(__doc__, file=sys.stderr)
        return 2
    import torch

    from harness.check import check
    from harness.nightly.draw import Drawn
    from harness.nightly.varied import VariedRunner

    torch.set_num_threads(1)
    verdicts = []
    try:
        for text in texts:
            drawn = Drawn.parse(text)
            finding = check(drawn.case, VariedRunner(drawn.way))
            figures = ", ".join(f"{name} {value}" for name, value in finding.figures.items())
            print(f"{finding.verdict.value}: {text}", *filter(None, (figures, finding.diagnosis)), sep="\n  ")
            verdicts.append(finding.verdict)
    except HarnessError as error:
        print(f"harness.nightly: {error}", file=sys.stderr)
        return error.exit_code
    return exit_code(verdicts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
