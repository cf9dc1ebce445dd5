"""The bank and the public bugs behind it, as `moe-harness faults --list` prints them. Nothing is run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from harness.errors import unknown
from harness.faults.bank import bank
from harness.faults.corpus import FAMILIES, NOT_PLANTED, REASONS, Thread, threads
from harness.faults.fault import Fault


def listing(names: Sequence[str], *, as_json: bool) -> int:
    """Print the faults and threads of these families, faults or reasons, all by default; 0. UsageError for other names."""
    faults, read = _chosen(names)
    print("\n".join(_json(faults, read) if as_json else _text(faults, read, whole=not names)))
    return 0


def _chosen(names: Sequence[str]) -> tuple[tuple[Fault, ...], tuple[Thread, ...]]:
    known = {fault.name: fault for fault in bank()}
    for name in names:
        if name not in (*FAMILIES, *REASONS, *known):
            raise unknown("fault", name, (*FAMILIES, *REASONS, *known), "moe-harness faults --list")
    if not names:
        return bank(), threads()
    groups = {known[name].family if name in known else name for name in names}
    faults = tuple(fault for fault in bank() if fault.name in names or fault.family in names)
    read = [thread for thread in threads() if thread.group in groups]
    return faults, tuple(sorted(read, key=lambda thread: _ORDER.index(thread.group)))


_ORDER = (*FAMILIES, *REASONS)


def _json(faults: Sequence[Fault], read: Sequence[Thread]) -> Iterator[str]:
    for fault in faults:
        told = {"kind": "fault", "name": fault.name, "family": fault.family, "computes": fault.computes}
        yield json.dumps({**told, "references": fault.references, "case": fault.case}, ensure_ascii=False)
    for thread in read:
        yield json.dumps({"kind": "thread", **thread.as_dict()}, ensure_ascii=False)


def _text(faults: Sequence[Fault], read: Sequence[Thread], *, whole: bool) -> Iterator[str]:
    """whole: counts of threads by family and reason; else the threads themselves."""
    if faults:
        yield from _table(
            ("family", "fault", "computes", "case", "public references"),
            [(each.family, each.name, each.computes, each.case, ", ".join(each.references)) for each in faults],
        )
        yield ""
    yield from _counted(faults, read) if whole else _threads(read)


def _threads(read: Sequence[Thread]) -> Iterator[str]:
    if not read:
        return
    rows = [(each.group, each.id, each.ref or "no thread", each.wrong) for each in read]
    yield from _table(("group", "public bug", "thread", "what went wrong"), rows)


def _counted(faults: Sequence[Fault], read: Sequence[Thread]) -> Iterator[str]:
    planted, found = Counter(fault.family for fault in faults), Counter(thread.family for thread in read)
    why = Counter(thread.reason for thread in read if thread.reason is not None)
    rows = [
        (family, told + (f" (not planted: {NOT_PLANTED[family]})" if family in NOT_PLANTED else ""),
         str(planted[family] or "-"), str(found[family] or "-"))
        for family, told in FAMILIES.items()
        if planted[family] or found[family] or family in NOT_PLANTED
    ]  # fmt: skip
    yield from _table(("family", "what goes wrong", "faults", "public bugs"), rows)
    yield ""
    reasons = [(key, told, str(why[key])) for key, told in REASONS.items() if why[key]]
    yield from _table(("reason", "why no layer here shows them", "public bugs"), reasons)
    absent = sum(found[family] for family in NOT_PLANTED)
    yield (
        f"\n{len(faults)} faults in {len(planted)} families. {len(read)} public bugs: {len(read) - why.total() - absent} of "
        f"families that are planted, {absent} of families that are not, {why.total()} that no layer here shows. "
        "Those of a family or a reason: moe-harness faults --list B3 size"
    )


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
