"""The tolerances by which others judge such layers, put to our outputs: which faults would they let pass?

What is taken over is a rule: its figures, the side that the relative part is of, and the share of elements that has to
agree. They are *their* bars on *our* data: outputs of order 1 and a float64 oracle that shares no code with what it
judges, where theirs may have outputs of 1e-7 or a baseline with the same router. Where the size of their outputs is
known, the bar is asked once more about our outputs made as small: "its size". A fault that passes here passes a test
with this bar and these numbers; it says nothing of other tests that a project has. Bars made for bf16 are asked in
fp32 too, where they see least. docs/kill_matrix.md has the table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor

from harness.case import parse
from harness.errors import HarnessError, UsageError
from harness.execution import run_system
from harness.problem import problem
from harness.systems.runner import RunnerSystem

Rule = Callable[[Tensor, Tensor, torch.dtype], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Close:
    """|found - expected| <= atol + rtol * |of|, for a share of the elements at least.

    of: the side that the relative part is taken of. With "found", a result that is too large excuses itself: any factor
    up to 1 / (1 - rtol) passes.    nan_counts: NaN disagrees; False where a rule counts what is *beyond* the limit,
    which NaN is not.
    """

    atol: float
    rtol: float
    of: Literal["found", "expected"] = "expected"
    share: float = 1.0
    nan_counts: bool = True

    def __call__(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        if found.numel() == 0:
            return True
        if self.nan_counts:
            one, other = (found, expected) if self.of == "expected" else (expected, found)
            close = torch.isclose(one, other, rtol=self.rtol, atol=self.atol)
        else:
            relative = expected if self.of == "expected" else found
            close = ~((found - expected).abs() > self.atol + self.rtol * relative.abs())
        return close.double().mean().item() >= self.share


@dataclass(frozen=True, slots=True)
class Finite:
    """No NaN and no infinity, and then a rule."""

    rule: Rule

    def __call__(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        return bool(found.isfinite().all()) and self.rule(found, expected, dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine:
    """The cosine between all elements taken as one vector, and the worst one of a token, are above a limit."""

    whole: float
    token: float = -2.0

    def __call__(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        if found.numel() == 0:
            return True
        whole = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
        token_M = torch.cosine_similarity(found, expected, dim=-1)
        return whole.item() > self.whole and token_M.min().item() > self.token


@dataclass(frozen=True, slots=True)
class AtSize:
    """A rule asked about the same outputs, all of them multiplied until the expected have this root mean square."""

    rms: float
    rule: Rule

    def __call__(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        size = expected.square().mean().sqrt()
        factor = self.rms / size if size > 0 else torch.ones(())
        return self.rule(found * factor, expected * factor, dtype)


@dataclass(frozen=True, slots=True)
class Every:
    """All of several rules: a test that runs several shapes."""

    rules: tuple[Rule, ...]

    def __call__(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        return all(rule(found, expected, dtype) for rule in self.rules)


@dataclass(frozen=True, slots=True)
class ByDtype:
    """Another rule for each dtype of the layer."""

    rules: Mapping[torch.dtype, Rule]

    def __call__(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        return self.rules[dtype](found, expected, dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One tolerance that a project's tests use.    told: the rule in a few words.    source: file of its repository."""

    name: str
    told: str
    source: str
    rule: Rule

    def passes(self, found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
        """found, expected: float64 [M, H] of one rank.    dtype: the layer's.    Whether a test with this bar is green."""
        return self.rule(found, expected, dtype)


_HALF, _BF16 = torch.float16, torch.bfloat16
_VLLM, _VLLM_2048 = Close(atol=3.5e-2, rtol=3.5e-2, of="found"), Close(atol=7.6e-2, rtol=7.6e-2, of="found")
_SGLANG = ByDtype(
    {
        torch.float64: Close(atol=1e-2, rtol=1e-2),
        torch.float32: Close(atol=1e-5, rtol=1e-3),
        _BF16: Close(atol=1e-2, rtol=1e-1),
        _HALF: Close(atol=1e-2, rtol=1e-1),
    }
)

BARS: tuple[Bar, ...] = (
    Bar(
        name="torch",
        told="assert_close's own: rtol 1.3e-6 in fp32, 1.6e-2 in bf16, 1e-3 in fp16; atol 1e-5",
        source="pytorch: torch/testing/_comparison.py",
        rule=ByDtype(
            {
                torch.float64: Close(atol=1e-7, rtol=1e-7),
                torch.float32: Close(atol=1e-5, rtol=1.3e-6),
                _BF16: Close(atol=1e-5, rtol=1.6e-2),
                _HALF: Close(atol=1e-5, rtol=1e-3),
            }
        ),
    ),
    Bar(
        name="vLLM layer",
        told="atol = rtol = 3.5e-2, of the found; hidden size below 2048, bf16",
        source="vllm-project/vllm: tests/kernels/moe/test_moe_layer.py",
        rule=_VLLM,
    ),
    Bar(
        name="vLLM layer 2048",
        told="atol = rtol = 7.6e-2, of the found; hidden size from 2048, bf16",
        source="vllm-project/vllm: tests/kernels/moe/test_moe_layer.py",
        rule=_VLLM_2048,
    ),
    Bar(
        name="vLLM layer, its size",
        told="both, each on outputs as large as its shapes give with shared experts: 0.0036, 0.019; 0.11 from 2048",
        source="vllm-project/vllm: tests/kernels/moe/test_moe_layer.py",
        rule=Every((AtSize(0.0036, _VLLM), AtSize(0.019, _VLLM), AtSize(0.11, _VLLM_2048))),
    ),
    Bar(
        name="vLLM modular",
        told="atol = rtol = 3e-2, of the found; all formats but nvfp4",
        source="vllm-project/vllm: tests/kernels/moe/test_modular_kernel_combinations.py",
        rule=Close(atol=3e-2, rtol=3e-2, of="found"),
    ),
    Bar(
        name="SGLang",
        told="rtol 1e-1, atol 1e-2 in bf16 and fp16; rtol 1e-3, atol 1e-5 in fp32",
        source="sgl-project/sglang: test/registered/moe/test_fused_moe.py",
        rule=_SGLANG,
    ),
    Bar(
        name="SGLang, its size",
        told="the same on outputs as large as its shapes give at most: 3e-7",
        source="sgl-project/sglang: test/registered/moe/test_fused_moe.py",
        rule=AtSize(3e-7, _SGLANG),
    ),
    Bar(
        name="FlashInfer",
        told="atol 0.1, rtol 0.85, of the found, on 92.5 % of the elements; all finite",
        source="flashinfer-ai/flashinfer: tests/moe/trtllm_gen_fused_moe_utils.py, BF16Moe",
        rule=Finite(Close(atol=0.1, rtol=0.85, of="found", share=0.925)),
    ),
    Bar(
        name="TensorRT-LLM",
        told="atol = rtol = 0.2 on more than 96 % of the elements; NaN agrees with everything",
        source="NVIDIA/TensorRT-LLM: tests/unittest/_torch/modules/moe/quantize_utils.py, tests/unittest/utils/util.py",
        rule=Close(atol=0.2, rtol=0.2, share=0.96 + 1e-9, nan_counts=False),
    ),
    Bar(
        name="cosine",
        told="cosine above 0.99 over all elements, and above 0.9 in each token",
        source="vllm-project/vllm: tests/kernels/moe/test_flashinfer_nvfp4_cosine_similarity.py",
        rule=Cosine(whole=0.99, token=0.90),
    ),
)  # fmt: skip


def judge(
    outputs: Sequence[Tensor], expected: Tensor, dtype: torch.dtype, rows: Sequence[slice] | None = None
) -> dict[str, bool]:
    """Which bars are met on every rank: the name of each bar, and whether its test would be green.

    outputs: one [M, H] a rank, float64, in units of y.    expected: the law's [M, H], float64.
    rows: which of the M tokens each rank holds, all by default. Rows of other ranks hold the law's own values and would
    count as agreeing elements where a bar asks for a share.
    """
    held = [slice(None)] * len(outputs) if rows is None else rows
    pairs = [(found[own], expected[own]) for found, own in zip(outputs, held, strict=True)]
    return {bar.name: all(bar.passes(found, right, dtype) for found, right in pairs) for bar in BARS}


# What no test should let pass, and what a layer that was tuned on it would be.
NONSENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "the negation": lambda y: -y,
    "x1.01": lambda y: 1.01 * y,
    "x1.05": lambda y: 1.05 * y,
    "x1.5": lambda y: 1.5 * y,
    "x6": lambda y: 6 * y,
    "x1000": lambda y: 1000 * y,
    "NaN": lambda y: torch.full_like(y, torch.nan),
}

STAGES = {
    "A": "scale", "B": "reduce", "C": "order", "D": "routing", "E": "shared", "F": "expert", "G": "shape",
}  # fmt: skip
CLEAN = "right layers"
OURS = "moe-harness"


@dataclass(frozen=True, slots=True)
class Count:
    passed: int = 0
    planted: int = 0

    def __str__(self) -> str:
        return f"{self.passed}/{self.planted}"


@dataclass(frozen=True, slots=True)
class Matrix:
    """cells[row][bar]: how many of the outputs planted in this row the bar let pass. A row is a fault family, or CLEAN."""

    cells: Mapping[str, Mapping[str, Count]]

    @property
    def bars(self) -> tuple[str, ...]:
        """In the order of BARS, then any other judge in the order it came."""
        seen = {bar: None for counts in self.cells.values() for bar in counts}
        known = [bar.name for bar in BARS if bar.name in seen]
        return (*known, *(bar for bar in seen if bar not in known))

    @property
    def wrong(self) -> Mapping[str, Count]:
        """For each bar all rows but CLEAN together."""
        rows = [counts for row, counts in self.cells.items() if row != CLEAN]
        return {bar: _sum(counts.get(bar, Count()) for counts in rows) for bar in self.bars}

    def lines(self) -> list[tuple[str, ...]]:
        """A row's name and its counts: right layers, the families, all of them together, the same in per cent."""
        rows = sorted(self.cells, key=_order)
        told = [(row, *(str(self.cells[row].get(bar, "")) for bar in self.bars)) for row in rows]
        total = self.wrong
        told.append(("all", *(str(total[bar]) for bar in self.bars)))
        return [*told, ("let pass", *(_per_cent(total[bar]) for bar in self.bars))]

    @property
    def by_stage(self) -> Matrix:
        """Families of one stage of the layer together."""
        cells: dict[str, list[Mapping[str, Count]]] = {}
        for row, counts in self.cells.items():
            cells.setdefault(f"{row[0]} {STAGES[row[0]]}" if _is_family(row) else row, []).append(counts)
        return Matrix(
            {
                row: {bar: _sum(each.get(bar, Count()) for each in listed) for bar in self.bars}
                for row, listed in cells.items()
            }
        )

    def markdown(self) -> str:
        head = ("passes", *self.bars)
        lines = [head, ("---",) * len(head), *self.lines()]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def table(self) -> Table:
        """For a console."""
        table = Table(title="faulty outputs that a test with this bar lets pass, of those planted")
        table.add_column("family", no_wrap=True)
        for bar in self.bars:
            table.add_column(bar, justify="right")
        for number, line in enumerate(self.lines()):
            table.add_row(*line, end_section=number == len(self.cells) - 1)
        return table


def tally(judged: Iterable[tuple[str, Mapping[str, bool]]]) -> Matrix:
    """Count pairs of a row (a family such as "B3", or CLEAN) and what judge() said of one output planted there."""
    cells: dict[str, dict[str, Count]] = {}
    for row, verdicts in judged:
        counts = cells.setdefault(row, {})
        for bar, passed in verdicts.items():
            old = counts.get(bar, Count())
            counts[bar] = Count(old.passed + bool(passed), old.planted + 1)
    return Matrix(cells)


def of_summary(text: str) -> Matrix:
    """The matrix in what `moe-harness faults --json` printed. UsageError if its last line has none."""
    lines = text.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "nothing")
    try:
        cells = json.loads(last)["summary"]["bars"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"no kill matrix in the last of {len(lines)} lines, {last[:60]!r}: "
            "expected the summary that moe-harness faults --json ends with"
        ) from error
    return Matrix({row: {bar: Count(*counts) for bar, counts in told.items()} for row, told in cells.items()})


def of_cases(cases: Sequence[str]) -> Matrix:
    """What each bar makes of the right layer of some cases, and of NONSENSE in place of its output."""
    runner = RunnerSystem()

    def judged() -> Iterator[tuple[str, Mapping[str, bool]]]:
        for case in map(parse, cases):
            given = problem(case)
            y_MH = given.stages.output_MH
            outputs = [y_MH.clone() for _ in range(case.grid.ranks)]
            for whole_MH, out in zip(outputs, run_system(case, runner, given).ranks, strict=True):
                whole_MH[out.rows] = out.output.double() / out.unit
            yield CLEAN, judge(outputs, y_MH, given.tokens.hidden_states.dtype, case.rows)
            for name, make in NONSENSE.items():
                yield name, judge([make(y_MH)], y_MH, given.tokens.hidden_states.dtype)

    return tally(judged())


def _sum(counts: Iterable[Count]) -> Count:
    listed = list(counts)
    return Count(sum(count.passed for count in listed), sum(count.planted for count in listed))


def _per_cent(count: Count) -> str:
    return f"{100 * count.passed / count.planted:.1f} %" if count.planted else ""


def _is_family(row: str) -> bool:
    return re.fullmatch(r"[A-G]\d+", row) is not None


def _order(row: str) -> tuple[int, str, int]:
    """CLEAN first, then B3 before B10, then words in the order of NONSENSE."""
    if row == CLEAN:
        return (0, "", 0)
    if _is_family(row):
        return (1, row[0], int(row[1:]))
    return (2, "", list(NONSENSE).index(row)) if row in NONSENSE else (3, row, 0)


def main(arguments: Sequence[str]) -> int:
    """Print a matrix as markdown. Returns the exit code."""
    parser = argparse.ArgumentParser("python -m harness.faults.bars", description="the kill matrix as markdown")
    parser.add_argument(
        "what", nargs="+", help="a file that moe-harness faults --json wrote, or cases to ask the bars about"
    )
    parser.add_argument("--stages", action="store_true", help="one row for a stage of the layer, not for each family")
    asked = parser.parse_args(arguments)
    try:
        file = Path(asked.what[0])
        matrix = of_cases(asked.what) if "@" in asked.what[0] else of_summary(file.read_text())
    except (HarnessError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print((matrix.by_stage if asked.stages else matrix).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
