"""The table a person reads: model by system and grid, then one line for each cause, then what was not covered."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from harness import models
from harness.campaign import Report
from harness.case import Case, Grid, parse
from harness.finding import Finding, Verdict

_STYLE = {
    Verdict.MISMATCH: ("✗", "bold red"),
    Verdict.COULD_NOT_RUN: ("?", "bold yellow"),
    Verdict.UNDECIDED: ("~", "yellow"),
    Verdict.KNOWN: ("k", "cyan"),
}
_REASON = {"evaluated": "PR #35949", "ours": "our 17th", "rewritten": "rewritten"}
MAX_LINES = 40


def show(report: Report, console: Console) -> None:
    """Print the whole report; on a narrow console rows stay whole and the table wraps its cells."""
    pairs = [(parse(finding.case), finding) for finding in report.findings]
    table, grouped = _table(pairs)
    wide = console.options.update(width=Measurement.get(console, console.options.update(max_width=1000), table).maximum)
    lines = Segments(console.render(table, wide))  # as wide as it needs: a cell cut short could hide a mismatch
    console.print(lines, soft_wrap=True, end="")
    console.print(_legend(report.findings, grouped=grouped))
    for verdict in (Verdict.MISMATCH, Verdict.COULD_NOT_RUN, Verdict.UNDECIDED, Verdict.KNOWN):
        _lines(verdict, report.findings, console)
    _not_applicable(report.findings, console)
    _probes(report.findings, console)
    counts = Counter(finding.verdict for finding in report.findings)
    told = ", ".join(
        f"{counts[verdict]} {verdict}"
        for verdict in Verdict
        if counts[verdict] or verdict in (Verdict.OK, Verdict.MISMATCH)
    )
    console.print(
        f"{len(report.findings)} cases, {len(report.findings)} findings: {told}; {report.seconds:.1f} s",
        highlight=False,
    )


def _table(pairs: Sequence[tuple[Case, Finding]]) -> tuple[Table, bool]:
    """The table, and whether grids share a column."""
    grouped = len({case.grid for case, _ in pairs if _kind(case.grid) != "tp"}) > MAX_GRIDS
    cells: dict[tuple[str, str], dict[tuple[str, str], list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    first = min({finding.system for _, finding in pairs}, key=_system_order)
    for case, finding in pairs:
        column = _column(finding.system, case.grid, grouped=grouped, leads=finding.system == first)
        cells[case.model, case.size][column].append(finding.verdict)
    columns = sorted({column for row in cells.values() for column in row}, key=_column_order)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("listed", no_wrap=True)
    for index, (system, name) in enumerate(columns):
        new = index == 0 or columns[index - 1][0] != system
        table.add_column(f"{_short(system) if new else ''}\n{name}", justify="right", no_wrap=True)
    for (model, size), row in sorted(cells.items(), key=lambda item: _row_order(*item[0])):
        name = model if size == "twin" else f"{model} ({size})"
        table.add_row(name, _REASON[models.load(model).reason], *(_cell(row[column]) for column in columns))
    return table, grouped


# Grids by what they have beside tp. Where these are more than MAX_GRIDS, those of a kind share a column, and the tp sizes
# too but those of the first system.
KINDS = ("tp", "+ep", "+dp", "+sp")
MAX_GRIDS = 6


def _kind(grid: Grid) -> str:
    return "+sp" if grid.sp > 1 else "+dp" if grid.dp > 1 else "+ep" if grid.ep > 1 else "tp"


def _column(system: str, grid: Grid, *, grouped: bool, leads: bool) -> tuple[str, str]:
    """The system and the column's name: the grid, or its kind."""
    kind = _kind(grid)
    if grouped and (kind != "tp" or not leads):
        return system, kind
    return system, f"tp{grid.tp}" if kind == "tp" else str(grid)


def _cell(verdicts: Sequence[Verdict]) -> Text:
    """The number of right cases, then the number of each other verdict with its sign."""
    counts = Counter(verdicts)
    if not verdicts or counts[Verdict.NOT_APPLICABLE] == len(verdicts):
        return Text("-", style="dim")
    text = Text(str(counts[Verdict.OK]), style="green" if counts[Verdict.OK] else "dim")
    for verdict, (sign, style) in _STYLE.items():
        if counts[verdict]:
            text.append(f" {counts[verdict]}{sign}", style=style)
    return text


def _legend(findings: Iterable[Finding], *, grouped: bool) -> Text:
    seen = {finding.verdict for finding in findings}
    signs = [f"{sign} {verdict}" for verdict, (sign, _) in _STYLE.items() if verdict in seen]
    return Text(
        "cells: cases that agree with the oracle"
        + "".join(f", {sign}" for sign in signs)
        + "; - not applicable"
        + ("; +ep, +dp, +sp: grids by what they have beside tp" if grouped else ""),
        "dim",
    )


def _lines(verdict: Verdict, findings: Iterable[Finding], console: Console) -> None:
    """One line for each cause: the first case that shows it, the diagnosis, how many cases, the command to see it again."""
    groups: dict[tuple[str, ...], list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.verdict is verdict:
            groups[finding.system, *_cause(finding)].append(finding)
    style = _STYLE[verdict][1]
    for number, group in enumerate(groups.values()):
        if number == MAX_LINES:
            console.print(f"... and {len(groups) - MAX_LINES} more causes; all of them: add --json", style=style)
            break
        first = min(group, key=lambda finding: len(finding.diagnosis))  # without a doubt that another grid settles
        line = Text(f"{verdict} ", style=style)
        line.append(f"{_short(first.system)} {first.case}", style="bold")
        models_of = len({finding.model for finding in group})
        told = f" of {models_of} models" if models_of > 1 else ""
        line.append(f" (one of {len(group)} cases{told})" if len(group) > 1 else "")
        family = f" [{first.family}]" if first.family else ""
        at = f"at {first.stage}: " if first.stage else ""
        line.append(f": {at}{first.diagnosis}{family}")
        if first.reference:
            line.append(f". Known: {first.reference}", style="dim")
        console.print(line, soft_wrap=True)
        if verdict is Verdict.MISMATCH:
            console.print(f"    again: {first.repro}", style="dim", highlight=False, soft_wrap=True)


def _cause(finding: Finding) -> tuple[str, ...]:
    """What findings of one cause have in common, whatever their dtype, grid and numbers: the entry, the family, or the words."""
    if finding.verdict is Verdict.KNOWN:
        return (finding.reference or "",)
    if finding.family is not None:
        return (finding.family,)
    return finding.model, finding.diagnosis.partition(" (labelled probe: ")[0]


def _not_applicable(findings: Iterable[Finding], console: Console) -> None:
    reasons = Counter(f"{f.system}: {f.diagnosis}" for f in findings if f.verdict is Verdict.NOT_APPLICABLE)
    for reason, count in reasons.most_common(8):
        console.print(Text(f"not applicable, {count} cases, {reason}", "dim"), soft_wrap=True)
    rest = sum(count for _, count in reasons.most_common()[8:])
    if rest:
        console.print(
            f"not applicable, {rest} cases for {len(reasons) - 8} other reasons; all of them: add --json", style="dim"
        )


def _probes(findings: Iterable[Finding], console: Console) -> None:
    """What the labelled probes read, all together; those that could not run are lost coverage."""
    probes = {(f.system, probe["case"]): probe for f in findings if isinstance(probe := f.figures.get("probe"), dict)}
    if not probes:
        return
    read = [probe for probe in probes.values() if "coefficients" in probe]
    count, exact = (sum(int(probe[name]) for probe in read) for name in ("coefficients", "exact"))
    worst = max((float(probe["worst_u"]) for probe in read), default=0.0)
    wrong = sum(probe["verdict"] == "wrong" for probe in probes.values())
    told = f"labelled probes: {len(probes)}"
    told += f", {count} coefficients right, {exact} of them exactly, the others within {worst:.3g} u" if count else ""
    told += f"; {wrong} read wrong ones" if wrong else ""
    console.print(told, style="dim", highlight=False, soft_wrap=True)
    unread = Counter(
        f"{system}: {probe['told']}" for (system, _), probe in probes.items() if probe["verdict"] == "not-run"
    )
    for reason, lost in unread.most_common(4):
        console.print(
            f"no labelled probe of {lost} grids and options, {reason}", style="yellow", highlight=False, soft_wrap=True
        )


def _short(system: str) -> str:
    return system.rsplit("/", 1)[-1]


def _system_order(system: str) -> tuple[int, str]:
    order = ("runner", "legacy", "transformers")
    return order.index(system) if system in order else len(order), system


def _column_order(column: tuple[str, str]) -> tuple[object, ...]:
    system, name = column
    grouped = KINDS.index(name) if name in KINDS else 0
    numbers = [int(number) for number in re.findall(r"[0-9]+", name)]
    return *_system_order(system), grouped, "." in name or not name.startswith("tp"), numbers


def _row_order(model: str, size: str) -> tuple[int, str, str]:
    return (("evaluated", "ours", "rewritten").index(models.load(model).reason), model, size)
