"""From factors to causes: one table from what a reading shows to what went wrong, and the sentence that says so."""

from __future__ import annotations

from dataclasses import dataclass

from harness.algebra import Reading


@dataclass(frozen=True, slots=True)
class Cause:
    """A row of the table below. Symbols a part must have; "own" is the lawful symbol on the rank's own shard alone."""

    family: str
    symbols: dict[str, str]
    sentence: str


# Symbols are written for a layer with s; without one, s reads as 1. The first row that fits is the cause; "S" rows are
# skipped where the layer has no shared experts.
CAUSES = (
    Cause("B1", {"routed": "own", "shared": "own"}, "nothing is reduced: each rank returns its own partial sum"),
    Cause("B1", {"routed": "own"}, "the routed part is not reduced: each rank returns its own share of it"),
    Cause("B5", {"shared": "own"}, "the shared experts' output is left partial: each rank adds only its own share"),
    Cause("B2", {"routed": "s*tp", "shared": "tp"}, "everything is reduced twice (R, S x tp)"),
    Cause("B2", {"routed": "s*tp"}, "the routed part is reduced twice: what the kernel had reduced is reduced again (R x tp)"),
    Cause("B3", {"shared": "tp"}, "the shared experts' output is summed once per rank (S x tp): it was complete on every rank before the sum"),
    Cause("A1", {"routed": "s^2", "shared": "s"}, "the sum is scaled although R carried s already: s^2 on R, s on S"),
    Cause("A1", {"routed": "s^2"}, "the routed scaling factor is applied twice (s^2)"),
    Cause("A5", {"routed": "1", "shared": "1/s"}, "the fp16 form R + S/s is returned and its unit 1/s is not declared"),
    Cause("A3", {"routed": "s", "shared": "s"}, "the routed scaling factor multiplies the shared experts too: s*(R + S)"),
    Cause("A2", {"routed": "1"}, "the routed scaling factor is never applied"),
    Cause("A6", {"routed": "0"}, "the routed part is missing: an absent scaling factor read as 0, or a kernel that wrote nothing"),
    Cause("E2", {"shared": "1/s"}, "the shared experts' output is divided by s although R carries s"),
    Cause("E4", {"shared": "2"}, "the shared experts' output is added twice"),
    Cause("E3", {"shared": "0"}, "the shared experts' output is missing"),
    Cause("B10", {"expert bias": "s*tp"}, "the second expert bias is added on every rank (x tp)"),
    Cause("F5", {"expert bias": "0"}, "the second expert bias is dropped"),
    Cause("C4", {"latent bias": "tp"}, "the latent output projection runs before the sum over ranks: its bias is added tp times"),
    Cause("A3", {"latent bias": "s"}, "the routed scaling factor multiplies the bias of the latent projection"),
    Cause("F5", {"latent bias": "0"}, "the bias of the latent output projection is dropped"),
    Cause("B10", {"shared bias": "tp"}, "the second shared bias is added on every rank (x tp)"),
    Cause("F5", {"shared bias": "0"}, "the second shared bias is dropped"),
    Cause("A2", {"zero": "1"}, "the zero experts' part lacks the routed scaling factor"),
    Cause("B2", {"zero": "s*tp"}, "the zero experts' part is reduced although every rank holds all of it (Z x tp)"),
    Cause("sign", {"routed": "-s"}, "the output has the wrong sign"),
)  # fmt: skip


def find_cause(reading: Reading, lawful: dict[str, str], has_scale: bool) -> Cause | None:
    """The first row of CAUSES that fits the reading and in which something deviates from the law."""
    for cause in CAUSES:
        wanted = {name: _without_s(symbol) if not has_scale else symbol for name, symbol in cause.symbols.items()}
        if not all(name in reading.symbols for name in wanted):
            continue
        if all(_matches(reading, name, symbol, lawful) for name, symbol in wanted.items()):
            deviates = [n for n in wanted if n in reading.own_only or reading.symbols[n] != lawful[n]]
            if deviates:
                return cause
    return None


def _matches(reading: Reading, name: str, wanted: str, lawful: dict[str, str]) -> bool:
    if wanted == "own":
        return name in reading.own_only and reading.symbols[name] == lawful[name]
    return name not in reading.own_only and reading.symbols[name] == wanted


def _without_s(symbol: str) -> str:
    return {"s": "1", "s*tp": "tp", "s^2": "s^2", "-s": "-1"}.get(symbol, symbol)


def uneven_shares(reading: Reading, lawful: dict[str, str]) -> str | None:
    """'rank 2's share counted 0', for a part whose shares count differently."""
    for name, symbols in reading.uneven.items():
        wrong = {shard: symbol for shard, symbol in enumerate(symbols) if symbol != lawful[name]}
        if wrong:
            told = ", ".join(f"rank {shard}'s share counted {symbol}" for shard, symbol in wrong.items())
            return f"{name}: {told} (expected {lawful[name]} each)"
    return None
