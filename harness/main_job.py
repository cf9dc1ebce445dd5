"""The main job: which cases `check` runs when nothing is asked for. Data first; imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from harness import models
from harness.case import Case, Grid, parse, parse_grid

TP_SIZES = (1, 2, 3, 4, 8)
DTYPES = ("fp32", "bf16", "fp16")
TOKENS = (0, 1, 7, 33)
WIDE_TP_SIZES = (1, 2)

# Every model runs on each of them. tp3.ep3 and ep3.dp3 do not divide most numbers of experts; tp4.ep2, tp8.ep4 and
# tp2.ep2.dp2 lie between the two ends of expert parallelism.
GRIDS = (
    "tp2.ep2", "tp4.ep2", "tp4.ep4", "tp3.ep3", "dp2", "tp2.dp2", "tp2.ep2.dp2", "tp2.ep4.dp2", "ep3.dp3", "tp8.ep4",
    "tp4.ep8.dp2", "tp2.ep2.sp2", "tp4.ep4.sp4", "tp2.ep4.dp2.sp2",
)  # fmt: skip
# ... and each of these: no tokens at all or on one data-parallel rank, fewer than ranks, rows that do not divide.
UNEVEN = (
    "dp2.tokens0_7", "tp2.dp2.tokens5_2", "tp4.ep8.dp2.tokens7_0", "ep3.dp3.tokens4_0_3", "tp2.ep4.dp2.tokens0",
    "tp4.ep4.sp4.tokens0", "tp4.ep4.sp4.tokens1", "tp2.ep4.dp2.sp2.tokens6_1", "tp2.ep4.dp2.sp2.tokens0_1",
)  # fmt: skip
UNEVEN_BY_KERNEL = (
    "tp4.ep8.dp2.tokens7_0+kernel=deepep_ht", "ep3.dp3.tokens4_0_3+kernel=deepep_ll",
    "tp2.ep4.dp2.tokens0_3+kernel=nvlink_one_sided", "tp2.ep4.dp2.tokens9_2+kernel=nvlink_two_sided",
    "tp2.ep4.dp2.tokens0+kernel=deepep_ll", "tp4.ep4.sp4.tokens3+kernel=deepep_ht",
    "tp2.ep4.dp2.sp2.tokens0_5+kernel=deepep_ll", "tp4.ep8.dp2.sp4.tokens2_5+kernel=nvlink_one_sided",
)  # fmt: skip

# The routed experts stored as int8.
QUANTISED = ("tp1", "tp4.bf16", "tp4.ep2.fp16", "tp2.ep4.dp2")
# State and hazards: a script of some forty calls. Kernels and grids keep state, not a model's rules: of the runner's, and of
# the files before it, each model takes one in turn.
CALLED_OFTEN = (
    "tp1", "tp2.bf16", "tp2.ep4.dp2+kernel=deepep_ht", "tp4.ep4.sp4.fp16", "tp4+experts=slots", "ep3.dp3+kernel=deepep_ll",
)  # fmt: skip
CALLED_OFTEN_BY_OTHERS = ("tp1", "tp2.bf16", "tp2.ep4.dp2", "tp4.ep4.sp4")

# Every pair of option values, and of a value and a grid, that a layer with s and shared experts can have together;
# written by tests/combinations.py. Each row runs with _TURNS of COMBINED, in turn.
COMBINATIONS = (
    "tp2+scale=kernel.order=1.pad=8.swap=partial.reduce=caller",
    "tp4.ep2+scale=output.kernel=reduced.experts=batched.placement=round_robin.junk=3.swap=reduced",
    "tp4.ep4+scale=router.experts=monolithic.order=3",
    "tp2.ep4.dp2+kernel=nvlink_one_sided.experts=slots.placement=permuted.order=2.pad=8.junk=3.swap=nvlink_one_sided",
    "dp2+experts=slots.shared=fused.junk=3.reduce=caller",
    "ep3.dp3+scale=kernel.kernel=deepep_ht.placement=replicas.order=2.junk=3.swap=deepep_ht",
    "tp2.dp2+scale=router.kernel=reduced.experts=batched.shared=fused.pad=8.swap=partial",
    "tp2.ep2.dp2+scale=output.experts=batched.placement=moved.order=2.pad=8.reduce=caller",
    "tp2.ep2.sp2+kernel=nvlink_two_sided.experts=slots.placement=moved.order=1.swap=nvlink_two_sided",
    "tp2.ep4.dp2.sp2+kernel=deepep_ll.placement=round_robin.order=3.pad=8.swap=deepep_ll",
    "tp2.ep4.dp2+scale=router.kernel=deepep_ht.placement=permuted.order=1.pad=8.batches=2.swap=reduced",
    "tp2.ep4.dp2+scale=kernel.kernel=deepep_ll.experts=batched.placement=replicas.batches=2.swap=deepep_ll",
    "ep3.dp3+scale=output.experts=monolithic.placement=round_robin.order=1.pad=8.batches=2.swap=partial.reduce=caller",
    "tp4.ep4+scale=output.kernel=nvlink_two_sided.experts=slots.placement=replicas.order=3.pad=8.batches=2.swap=deepep_ht",
    "dp2+scale=kernel.kernel=reduced.experts=slots.order=2.pad=8.batches=2.swap=reduced",
    "tp2+scale=output.kernel=reduced.shared=fused.batches=2",
    "tp2.dp2+kernel=reduced.experts=monolithic.order=3.batches=2.swap=reduced",
    "tp2.ep2.dp2+scale=router.experts=slots.placement=permuted.order=3.batches=2.swap=partial.reduce=caller",
    "tp4.ep2+experts=batched.placement=replicas.order=1.pad=8.batches=2.reduce=caller",
    "tp4.ep4+scale=kernel.kernel=nvlink_one_sided.placement=moved.order=3.batches=2.swap=nvlink_one_sided",
    "tp4.ep4+scale=router.kernel=deepep_ht.experts=slots.placement=round_robin.order=2.pad=8.batches=2.swap=nvlink_two_sided",
    "dp2+scale=router.kernel=reduced.order=1.junk=3.swap=partial",
    "tp2.dp2+scale=kernel.order=2.junk=3.reduce=caller",
    "tp2.ep2.dp2+scale=kernel.kernel=reduced.placement=moved.junk=3.swap=reduced",
    "tp2.ep2.sp2+scale=kernel.kernel=nvlink_two_sided.placement=permuted.pad=8.swap=nvlink_two_sided",
    "tp4.ep2+scale=router.placement=moved.order=2.swap=partial.reduce=caller",
    "dp2+scale=output.experts=batched.order=3.pad=8.junk=3.swap=reduced",
    "ep3.dp3+scale=router.kernel=deepep_ll.experts=batched.order=2.junk=3.swap=deepep_ll",
    "tp2+scale=router.kernel=reduced.experts=batched.order=3.junk=3.swap=reduced",
    "tp2.ep2.sp2+scale=output.kernel=deepep_ll.experts=batched.placement=permuted.order=1.swap=deepep_ll",
    "tp2.ep4.dp2.sp2+scale=router.kernel=reduced.experts=batched.placement=replicas.order=1.swap=partial",
    "tp4.ep4+kernel=reduced.experts=batched.placement=permuted.junk=3.swap=partial",
    "dp2+scale=kernel.experts=monolithic.swap=reduced",
    "tp2+kernel=reduced.experts=monolithic.batches=2",
    "tp2.ep2.dp2+experts=monolithic.placement=round_robin.order=1.reduce=caller",
    "tp2.ep2.sp2+scale=router.experts=monolithic.order=3",
    "tp2.ep4.dp2+scale=output.experts=monolithic.placement=round_robin.order=3.pad=8.batches=2.swap=partial.reduce=caller",
    "tp2.ep4.dp2.sp2+scale=output.experts=monolithic.pad=8.swap=reduced",
    "tp4.ep2+scale=kernel.experts=monolithic.order=3.swap=reduced",
    "ep3.dp3+kernel=deepep_ht.experts=slots.placement=moved.pad=8.junk=3.swap=deepep_ht",
    "tp2+scale=kernel.experts=slots.shared=fused.pad=8.batches=2.swap=reduced",
    "tp2.dp2+scale=output.experts=slots.order=1.pad=8.reduce=caller",
    "tp2.ep4.dp2.sp2+scale=router.kernel=nvlink_two_sided.experts=slots.placement=round_robin.order=2.swap=nvlink_one_sided",
    "tp4.ep2+scale=kernel.experts=slots.placement=permuted.order=3.pad=8.junk=3",
    "ep3.dp3+scale=output.kernel=nvlink_one_sided.experts=slots.placement=replicas.order=3.junk=3.swap=nvlink_two_sided",
    "ep3.dp3+scale=output.kernel=nvlink_two_sided.pad=8.junk=3.swap=nvlink_one_sided",
    "ep3.dp3+scale=router.kernel=reduced.placement=round_robin.order=1.junk=3.swap=deepep_ht",
    "ep3.dp3+scale=router.kernel=nvlink_one_sided.placement=round_robin.order=1.pad=8.junk=3",
    "ep3.dp3+scale=kernel.kernel=nvlink_one_sided.placement=replicas.pad=8.junk=3.swap=reduced",
    "tp2+scale=output.experts=batched.order=2.junk=3.swap=partial",
    "tp2.ep2.dp2+scale=output.experts=monolithic.order=3.batches=2.swap=partial.reduce=caller",
    "tp2.ep2.dp2+scale=router.kernel=reduced.placement=replicas.order=2",
    "tp2.ep2.sp2+scale=output.kernel=deepep_ht.experts=slots.placement=replicas.order=2.pad=8.swap=nvlink_one_sided",
    "tp2.ep2.sp2+scale=kernel.kernel=nvlink_one_sided.experts=slots.placement=round_robin.swap=deepep_ht",
    "tp2.ep2.sp2+scale=output.kernel=reduced.placement=round_robin.order=1.swap=nvlink_one_sided",
    "tp2.ep2.sp2+scale=router.kernel=deepep_ht.experts=slots.order=3.swap=partial",
    "tp2.ep2.sp2+scale=output.kernel=deepep_ll.experts=batched.placement=moved.pad=8.swap=reduced",
    "tp2.ep4.dp2+scale=kernel.kernel=nvlink_two_sided.placement=moved.order=3.junk=3",
    "tp2.ep4.dp2+scale=kernel.kernel=reduced.experts=slots.batches=2.swap=nvlink_two_sided",
    "tp2.ep4.dp2+scale=output.kernel=nvlink_one_sided.order=1.junk=3.swap=deepep_ht",
    "tp2.ep4.dp2.sp2+scale=kernel.kernel=deepep_ht.placement=permuted.order=1.pad=8",
    "tp2.ep4.dp2.sp2+scale=output.kernel=nvlink_one_sided.placement=moved.order=2.pad=8.swap=deepep_ll",
    "tp2.ep4.dp2.sp2+scale=router.placement=permuted.order=2.swap=deepep_ht",
    "tp2.ep4.dp2.sp2+scale=router.kernel=deepep_ll.placement=moved.pad=8.swap=nvlink_two_sided",
    "tp4.ep4+kernel=deepep_ll.placement=replicas.order=1",
    "tp4.ep4+scale=output.experts=batched.placement=permuted.order=1.junk=3.swap=partial.reduce=caller",
    "tp4.ep4+scale=output.kernel=reduced.experts=batched.placement=permuted.swap=deepep_ll",
    "tp4.ep4+scale=router.kernel=nvlink_two_sided.experts=slots.placement=permuted.order=2.batches=2.swap=reduced",
    "tp4.ep4+scale=output.kernel=deepep_ht.placement=replicas.order=2.pad=8.swap=deepep_ll",
    "tp4.ep4+kernel=deepep_ll.placement=round_robin.batches=2.swap=deepep_ht",
    "tp4.ep4+scale=router.kernel=deepep_ll.placement=moved.swap=nvlink_one_sided",
    "tp4.ep4+scale=output.kernel=deepep_ll.experts=batched.placement=replicas.order=3.pad=8.junk=3.swap=partial",
    "tp4.ep4+scale=router.kernel=nvlink_one_sided.experts=slots.placement=replicas.order=3.pad=8.junk=3.swap=partial",
    "tp4.ep4+kernel=nvlink_two_sided.order=3.pad=8.swap=deepep_ll",
    "tp4.ep4+scale=kernel.kernel=nvlink_two_sided.placement=moved.order=3.pad=8.batches=2.swap=partial",
    "tp4.ep4+experts=batched.placement=replicas.order=1.pad=8.junk=3.swap=deepep_ll",
    "tp4.ep4+scale=kernel.placement=permuted.order=3.swap=nvlink_one_sided",
    "tp4.ep4+scale=kernel.placement=moved.pad=8.batches=2.swap=nvlink_two_sided",
)
COMBINED = (
    "deepseek_v3", "deepseek_v2", "dots1", "glm4_moe_lite", "sarvam_moe", "exaone_moe", "kimi_linear", "afmoe",
)  # fmt: skip

# The same for a layer without either; the others have to leave out what they cannot do.
PLAIN_COMBINATIONS = (
    "tp2+pad=8.swap=partial.reduce=caller",
    "tp4.ep2+kernel=reduced.experts=batched.placement=round_robin.junk=3.swap=reduced",
    "tp4.ep4+kernel=reduced.experts=monolithic.pad=8",
    "tp2.ep4.dp2+kernel=nvlink_one_sided.experts=slots.placement=permuted.swap=nvlink_one_sided",
    "dp2+experts=slots.junk=3.reduce=caller",
    "ep3.dp3+kernel=deepep_ll.placement=moved.junk=3.swap=deepep_ll",
    "tp2.dp2+experts=batched.pad=8.swap=reduced",
    "tp2.ep2.dp2+kernel=reduced.experts=slots.placement=replicas.pad=8.junk=3.swap=partial",
    "tp2.ep2.sp2+kernel=deepep_ht.placement=replicas.swap=nvlink_two_sided",
    "tp2.ep4.dp2.sp2+kernel=nvlink_two_sided.placement=round_robin.pad=8.swap=deepep_ht",
    "tp4.ep2+placement=moved.pad=8.batches=2.swap=partial.reduce=caller",
    "tp2.ep4.dp2+kernel=deepep_ll.experts=batched.placement=permuted.pad=8.batches=2.swap=deepep_ll",
    "tp2.ep2.dp2+experts=monolithic.placement=round_robin.batches=2.reduce=caller",
    "ep3.dp3+kernel=nvlink_two_sided.experts=slots.pad=8.batches=2.swap=nvlink_two_sided",
    "dp2+kernel=reduced.pad=8.batches=2.swap=reduced",
    "tp2+kernel=reduced.experts=batched.batches=2",
    "tp2.dp2+kernel=reduced.experts=monolithic.batches=2.swap=partial",
    "tp4.ep4+kernel=deepep_ht.experts=slots.placement=moved.batches=2.swap=deepep_ht",
    "tp4.ep4+kernel=nvlink_one_sided.placement=replicas.pad=8.batches=2.swap=nvlink_one_sided",
    "tp2.dp2+junk=3.reduce=caller",
    "tp2.ep2.dp2+placement=permuted.pad=8.junk=3.swap=reduced",
    "tp2.ep4.dp2+kernel=nvlink_two_sided.placement=replicas.junk=3.swap=reduced",
    "dp2+experts=batched.pad=8.junk=3.swap=partial.reduce=caller",
    "ep3.dp3+experts=batched.placement=replicas.pad=8.batches=2.reduce=caller",
    "tp2.ep2.dp2+kernel=reduced.experts=batched.placement=moved.pad=8.batches=2.swap=reduced",
    "tp2.ep2.sp2+kernel=deepep_ll.experts=batched.placement=round_robin.pad=8.swap=partial",
    "tp2.ep4.dp2.sp2+kernel=deepep_ll.experts=batched.placement=permuted",
    "tp4.ep4+experts=batched.placement=permuted.pad=8.junk=3.swap=partial.reduce=caller",
    "dp2+kernel=reduced.experts=monolithic.pad=8.batches=2.swap=reduced",
    "ep3.dp3+kernel=reduced.experts=monolithic.placement=round_robin.swap=partial",
    "tp2+experts=monolithic.pad=8.batches=2.swap=reduced",
    "tp2.ep2.sp2+experts=monolithic.swap=reduced",
    "tp2.ep4.dp2+experts=monolithic.pad=8.reduce=caller",
    "tp2.ep4.dp2.sp2+kernel=reduced.experts=monolithic.pad=8.swap=reduced",
    "tp4.ep2+experts=monolithic.pad=8.reduce=caller",
    "tp2+experts=slots.pad=8.junk=3.swap=reduced",
    "tp2.dp2+experts=slots.pad=8.batches=2",
    "tp2.ep2.sp2+kernel=deepep_ht.experts=slots.placement=round_robin.pad=8.swap=nvlink_one_sided",
    "tp2.ep4.dp2.sp2+kernel=nvlink_one_sided.experts=slots.placement=moved.swap=nvlink_two_sided",
    "tp4.ep2+kernel=reduced.experts=slots.placement=permuted.pad=8.batches=2",
    "ep3.dp3+kernel=deepep_ht.pad=8.junk=3.swap=deepep_ht",
    "ep3.dp3+kernel=nvlink_one_sided.junk=3.swap=nvlink_one_sided",
    "ep3.dp3+kernel=deepep_ll.junk=3.swap=reduced",
    "tp2.ep2.dp2+experts=monolithic.batches=2",
    "tp2.ep2.sp2+kernel=nvlink_one_sided.placement=round_robin.swap=deepep_ll",
    "tp2.ep2.sp2+kernel=nvlink_two_sided.experts=slots.placement=moved.pad=8",
    "tp2.ep2.sp2+kernel=reduced.experts=slots.placement=permuted.pad=8.swap=deepep_ht",
    "tp2.ep4.dp2+kernel=deepep_ht.placement=permuted.pad=8.junk=3.swap=nvlink_two_sided",
    "tp2.ep4.dp2+kernel=reduced.placement=round_robin.swap=nvlink_two_sided",
    "tp2.ep4.dp2+experts=slots.placement=moved.pad=8.batches=2.swap=deepep_ht",
    "tp2.ep4.dp2+kernel=nvlink_two_sided.experts=slots.placement=permuted.pad=8.junk=3.swap=partial",
    "tp2.ep4.dp2.sp2+kernel=deepep_ht.placement=replicas.pad=8.swap=deepep_ll",
    "tp2.ep4.dp2.sp2+experts=slots.placement=moved.swap=nvlink_one_sided",
    "tp2.ep4.dp2.sp2+kernel=nvlink_one_sided.placement=moved.swap=partial",
    "tp4.ep2+placement=replicas.junk=3.swap=reduced",
    "tp4.ep4+kernel=deepep_ll.placement=replicas.junk=3.swap=deepep_ht",
    "tp4.ep4+kernel=nvlink_two_sided.placement=round_robin.pad=8.batches=2.swap=deepep_ll",
    "tp4.ep4+kernel=deepep_ll.placement=round_robin.swap=nvlink_two_sided",
    "tp4.ep4+kernel=deepep_ht.placement=moved.pad=8.junk=3.swap=reduced",
    "tp4.ep4+kernel=deepep_ht.placement=moved.pad=8.batches=2",
    "tp4.ep4+kernel=deepep_ht.experts=slots.placement=permuted.pad=8.batches=2.swap=partial",
    "tp4.ep4+kernel=deepep_ll.placement=permuted.pad=8.batches=2.swap=nvlink_one_sided",
    "tp4.ep4+kernel=nvlink_one_sided.placement=replicas.batches=2.swap=deepep_ht",
    "tp4.ep4+kernel=nvlink_one_sided.placement=moved.junk=3",
    "tp4.ep4+kernel=nvlink_one_sided.experts=slots.placement=moved.junk=3.swap=reduced",
    "tp4.ep4+kernel=nvlink_two_sided.placement=moved.pad=8.batches=2.swap=nvlink_one_sided",
    "tp4.ep4+pad=8.batches=2.swap=deepep_ll",
    "tp4.ep4+placement=moved.pad=8.batches=2.swap=nvlink_two_sided",
    "tp4.ep4+kernel=reduced.placement=round_robin.pad=8.batches=2.swap=deepep_ll",
    "tp4.ep4+kernel=reduced.experts=slots.placement=round_robin.batches=2.swap=nvlink_one_sided",
)
PLAIN_COMBINED = (
    "mixtral", "olmoe", "gpt_oss", "qwen2_moe", "jamba", "llama4", "phimoe", "aria", "minimax_m2", "granitemoehybrid",
    "qwen3_next", "lfm2_moe", "step3p5", "ernie4_5_moe", "gemma4", "nemotron_h", "glm4_moe", "ernie4_5_vl_moe",
)  # fmt: skip
_CANNOT = {
    "ernie4_5_vl_moe": ("batches=2", "swap=", "placement=moved"),  # it has two routers
    "nemotron_h": ("reduce=caller",),  # its latent bias needs the complete sum
    "glm4_moe": ("placement=permuted",),  # 10 experts, and load balancing gives every rank as many
}
_TURNS = 2

# Files that, before the refactoring, took rows of their own wherever they could (systems/legacy.py).
LEGACY_BY_ROWS = ("deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "nemotron_h", "qwen3_next")
LEGACY_GRIDS = (
    "tp2.ep2", "tp4.ep4", "dp2", "tp2.dp2", "ep3.dp3", "ep3.dp3+kernel=deepep_ht", "tp2.ep4.dp2+kernel=nvlink_one_sided",
    "tp2.ep4.dp2+kernel=nvlink_two_sided",
)  # fmt: skip
# ... and these, with sp=2 where the file took rows of its own.
LEGACY_KERNELS = ("partial", "deepep_ht", "deepep_ll")


def cases_of(model: str, system: str) -> list[Case]:
    """The cases of one model on one system, each once; a layer from outside has no option of ours."""
    page = models.load(model)
    tp_sizes = (1,) if system == "transformers" else TP_SIZES
    cases = [
        Case(model=model, grid=Grid(tp=tp), dtype=dtype, tokens=tokens)
        for tp, dtype, tokens in itertools.product(tp_sizes, DTYPES, TOKENS)
    ]
    turn = models.names().index(model)
    often = {
        "runner": (CALLED_OFTEN[turn % len(CALLED_OFTEN)],), "legacy": (CALLED_OFTEN_BY_OTHERS[turn % 2],),
        "transformers": CALLED_OFTEN_BY_OTHERS[:1],
    }  # fmt: skip
    cases += [replace(parse(f"{model}@{text}"), calls="many") for text in often.get(system, CALLED_OFTEN_BY_OTHERS)]
    if system != "transformers":
        cases += _factors(page)
    if page.wide is not None:
        sizes = WIDE_TP_SIZES if system != "transformers" else (1,)
        cases += [Case(model=model, size="wide", grid=Grid(tp=tp), tokens=m) for tp in sizes for m in TOKENS]
    if system == "runner":
        cases += [replace(parse(f"{model}@{text}"), quant="int8") for text in QUANTISED]
        cases += [*_placements(page), *_on_grids(model), *_combined(model)]
    elif system == "legacy":
        cases += _files(page)
    elif system != "transformers":
        cases += _on_grids(model)
    return list(dict.fromkeys(cases))


def _factors(page: models.Model) -> Iterator[Case]:
    """The real s of a model whose twin has another."""
    if page.real.routing.routed_scaling_factor not in (None, page.twin.routing.routed_scaling_factor):
        yield from (Case(model=page.model_type, grid=Grid(tp=tp), s="real") for tp in TP_SIZES)


def _placements(page: models.Model) -> Iterator[Case]:
    """Without ep and dp: who scales, a kernel that reduces, when the shared experts run."""
    for tp in TP_SIZES:
        plain = Case(model=page.model_type, grid=Grid(tp=tp))
        yield replace(plain, kernel="reduced")
        if page.twin.routing.routed_scaling_factor is not None:
            yield from (replace(plain, scale=who) for who in ("router", "kernel", "output"))
            yield replace(plain, dtype="fp16", scale="output")
        if page.twin.shared is not None:
            yield from (replace(plain, order=order, pad="8") for order in ("2", "3"))
        yield replace(plain, pad="8")


def _on_grids(model: str) -> Iterator[Case]:
    """What any layer can be asked."""
    for text in GRIDS:
        grid = parse_grid(text)
        yield from (Case(model=model, grid=grid, tokens=tokens) for tokens in (7, 1))
        yield from (Case(model=model, grid=grid, dtype=dtype) for dtype in ("bf16", "fp16"))
    yield from (parse(f"{model}@{text}") for text in UNEVEN)


def _combined(model: str) -> Iterator[Case]:
    """The model's part of what only the runner has."""
    yield from (parse(f"{model}@{text}") for text in UNEVEN_BY_KERNEL)
    for rows, takers in ((COMBINATIONS, COMBINED), (PLAIN_COMBINATIONS, PLAIN_COMBINED)):
        for number, text in enumerate(rows):
            start = number * _TURNS % len(takers)
            able = [name for name in (*takers[start:], *takers[:start]) if not _cannot(name, text)]
            if model in able[:_TURNS]:
                yield replace(parse(f"{model}@{text}"), dtype=DTYPES[number % 3])


def _cannot(model: str, text: str) -> bool:
    return any(word in text for word in _CANNOT.get(model, ()))


def _files(page: models.Model) -> Iterator[Case]:
    """What the model's file met before the refactoring."""
    model = page.model_type
    rows = "tp2.ep4.dp2.sp2" if model in LEGACY_BY_ROWS else "tp2.ep4.dp2"
    yield from (parse(f"{model}@{text}") for text in LEGACY_GRIDS)
    for kernel in LEGACY_KERNELS:
        yield from (parse(f"{model}@{rows}.{dtype}+kernel={kernel}") for dtype in ("fp32", "bf16"))
    if page.wrapped:
        grids = [*(Grid(tp=tp) for tp in TP_SIZES), parse_grid("tp2.dp2"), parse_grid("tp2.ep4.dp2")]
        yield from (Case(model=model, grid=grid, backend="transformers") for grid in grids)
