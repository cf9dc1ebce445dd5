"""The legal ways to compute one layer: where results are rounded to the dtype and in which order they are added.

A way is data, and as text it lists what differs from the runner's own: `activation=wide.ranks=ring`, `plain` if nothing
does. All of it is legal by docs/tolerance.md: sums in any order, products accumulated in fp32, and a rounding to the
dtype wherever a released layer stores a result. What is not legal stands in ILLEGAL, can be asked for, and is never drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from harness.case import Case
from harness.errors import UsageError

# Each step, its values (the first is the runner's own) and who does so.
STEPS: dict[str, tuple[tuple[str, ...], str]] = {
    "layer": (("dtype", "wide"), "wide: all of it in fp32, collectives too, and one rounding at the end"),
    "gate": (("page", "fp32"), "fp32: logits in fp32 where the page has them in the dtype, as vLLM's GateLinear"),
    "weights": (("fp32", "dtype"), "router weights that enter the kernel: cast to the dtype, as transformers' blocks do"),
    "product": (("whole", "pieces", "native"), "pieces: two partial products, added in fp32 (split-K); native: operands in "
                "the dtype, as torch.mm takes them"),
    "bias": (("together", "apart"), "apart: the product is stored, then the bias added, then stored again"),
    "activation": (("stored", "each", "wide", "fused"), "each: a rounding after act and after the gate times up "
                   "(SiluAndMul in plain torch); wide: not rounded before the second product; fused: nor before act"),
    "weigh": (("unstored", "stored", "activation"), "where the router weight multiplies: the product in the accumulator, the "
              "stored product, or the activation before the second product"),
    "sum": (("fp32", "dtype", "unstored"), "the K results: each stored, then added in fp32; stored after each addition "
            "(index_add_); or not stored before the sum (atomics in fp32)"),
    "slots": (("router", "reversed", "by_expert", "shuffled"), "in which order the K results are added"),
    "rows": (("whole", "chunks"), "chunks: the experts see a third of the rows at a time, as in a chunked prefill"),
    "combine": (("fp32", "dtype", "reversed"), "an all-to-all's results at home: added in fp32, stored after each addition, or "
                "added from the last rank to the first"),
    "scale": (("asked", "w2", "with_shared"), "w2: s is in the stored weights of the second product; with_shared: one "
              "torch.add(S, R, alpha=s), as in SGLang"),
    "shared": (("together", "apart"), "apart: R and S are reduced one by one, before their sum"),
    "sigmoid": (("fp32", "dtype"), "the gate of the shared experts: rounded before it multiplies, as in plain torch"),
    "ranks": (("in_order", "reversed", "shuffled", "ring", "tree", "fp32"), "the sum over ranks: a ring starts each piece of a "
              "row at another rank; a tree adds pairs; fp32 rounds once (NVLS)"),
}  # fmt: skip
ORDERS = ("product", "slots", "rows", "ranks")  # steps that say in which order numbers are added
ILLEGAL: dict[str, dict[str, str]] = {
    "product": {"split_in_dtype": "two partial products, rounded to the dtype before they are added"},
    "ranks": {"twice": "the sum over ranks counts the last rank twice: a fault, for the test of the profile"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One value for each step of STEPS."""

    layer: str = "dtype"
    gate: str = "page"
    weights: str = "fp32"
    product: str = "whole"
    bias: str = "together"
    activation: str = "stored"
    weigh: str = "unstored"
    sum: str = "fp32"
    slots: str = "router"
    rows: str = "whole"
    combine: str = "fp32"
    scale: str = "asked"
    shared: str = "together"
    sigmoid: str = "fp32"
    ranks: str = "in_order"

    def __str__(self) -> str:
        told = [f"{step}={value}" for step, value in self.steps().items() if value != STEPS[step][0][0]]
        return ".".join(told) or "plain"

    def steps(self) -> dict[str, str]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


def parse_way(text: str) -> Way:
    """The way that a text names. UsageError says which part of it nobody knows."""
    found: dict[str, str] = {}
    for part in () if text == "plain" else text.split("."):
        step, _, value = part.partition("=")
        known = (*STEPS[step][0], *ILLEGAL.get(step, ())) if step in STEPS else ()
        if value not in known:
            expected = f"{step}= one of {', '.join(known)}" if known else f"STEP=VALUE with {', '.join(STEPS)}"
            raise UsageError(f"way {text!r}: cannot read {part!r}. Expected {expected}, joined by dots, or plain")
        if step in found:
            raise UsageError(f"way {text!r}: {step} is given twice")
        found[step] = value
    return Way(**found)


def choices(case: Case) -> dict[str, tuple[str, ...]]:
    """What each step may be in that case, first the runner's own; steps that change nothing there are left out.

    In fp32 nothing is ever rounded to the dtype, so only orders are left.
    """
    spec, half, ranks = case.spec, case.dtype != "fp32", case.grid.ranks
    routing, shared = spec.routing, spec.shared
    apart = shared if case.shared == "separate" else None
    modular, one_router = case.experts != "monolithic", spec.vision is None
    weighs = case.experts in ("auto", "monolithic") and case.kernel != "deepep_ll" and case.swap != "deepep_ll"
    all_to_all = case.kernel not in ("partial", "reduced")
    summed = max(case.grid.tp, case.grid.dp, case.grid.ep if case.grid.sp > 1 else 1)
    one_sum = ranks > 1 and case.grid.sp == 1 and case.kernel == "partial" == case.swap.replace("none", "partial")
    # a fused shared expert may weigh 1/s, one number for all tokens: rounded, it is a systematic error, which the
    # projection sees over many tokens. Engines keep it in fp32.
    constant_slot = case.shared == "fused" and routing.scale != 1.0
    by_output = case.scaled_by == "output" and routing.scale != 1.0
    fits = {
        "layer": {"wide": half},
        "gate": {"fp32": half and routing.precision.logits == "model"},
        "weights": {"dtype": half and modular and not constant_slot},
        "product": {"pieces": True, "native": half},
        "bias": {"apart": half and (spec.experts.bias or bool(shared and shared.bias))},
        "activation": {"each": half and spec.experts.activation.gated, "wide": half, "fused": half},
        "weigh": {"stored": half and weighs, "activation": weighs and routing.weight_on == "output"},
        "sum": {"dtype": half and routing.top_k > 1, "unstored": half and routing.top_k > 1 and weighs},
        "slots": dict.fromkeys(STEPS["slots"][0][1:], modular and routing.top_k > 2),
        "rows": {"chunks": case.tokens > 5 and case.experts in ("auto", "slots")},
        "combine": {"dtype": all_to_all and half, "reversed": all_to_all and ranks > 2},
        "scale": {
            "w2": routing.scale != 1.0 and routing.num_zero_experts == 0 and case.quant == "none",
            "with_shared": by_output and apart is not None and spec.experts.latent_size is None and case.dtype != "fp16",
        },
        "shared": {"apart": apart is not None and one_sum and one_router and case.reduce == "layer"},
        "sigmoid": {"dtype": half and shared is not None and shared.sigmoid_gate},
        "ranks": {value: summed > 2 and (half or value != "fp32") for value in STEPS["ranks"][0][1:]},
    }  # fmt: skip
    found = {step: (STEPS[step][0][0], *(v for v, fit in values.items() if fit)) for step, values in fits.items()}
    return {step: values for step, values in found.items() if len(values) > 1}
