"""A case as text: read back as it was written, and refused with the part that is wrong and what to type instead."""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import models
from harness.case import DTYPES, MAX_RANKS, MAX_TOKENS, OPTIONS, Case, Grid, parse, parse_grid
from harness.errors import UsageError
from reference.spec import MoESpec

TEXT = (Path(__file__).parents[1] / "docs" / "cases.md").read_text()
DEFAULTS = {field.name: field.default for field in fields(Case)}


GRIDS = tuple(
    Grid(tp=tp, dp=dp, ep=ep, sp=sp)
    for tp, dp in itertools.product(range(1, MAX_RANKS + 1), repeat=2)
    if tp * dp <= MAX_RANKS
    for ep in range(1, tp * dp + 1)
    if tp * dp % ep == 0
    for sp in ({1, tp} if ep == tp * dp else {1})
)


@functools.cache
def fitting(spec: MoESpec) -> list[Grid]:
    """The grids that cut every width of the layer into equal pieces: shared experts over tp, the others over moe_tp."""
    widths = spec.tp_widths()
    shared = widths.pop("shared intermediate_size", 0)
    return [
        grid
        for grid in GRIDS
        if all(width % (grid.tp * grid.dp // grid.ep) == 0 for width in widths.values())
        and shared % (1 if grid.sp > 1 else grid.tp) == 0
    ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any legal case; whether a system has the layer is not asked."""
    page = models.load(draw(st.sampled_from(models.names())))
    chosen = {name: draw(st.sampled_from(values)) for name, (values, _) in OPTIONS.items()}
    if page.wide is None and chosen["size"] == "wide":
        chosen["size"] = "twin"
    if page.real.routing.routed_scaling_factor is None:
        chosen["s"] = "twin"
    if chosen["size"] == "labels":
        chosen |= {"quant": "none", "calls": "one"}
    fit = GRIDS if chosen["size"] == "labels" else fitting(getattr(page, chosen["size"]))
    grid, split = draw(st.sampled_from(fit)), None
    if grid.dp > 1 and draw(st.booleans()):
        counts = st.integers(0, draw(st.sampled_from((1, 9, MAX_TOKENS // grid.dp))))
        split = tuple(draw(st.lists(counts, min_size=grid.dp, max_size=grid.dp)))
    return Case(
        model=page.model_type,
        grid=grid,
        dtype=draw(st.sampled_from(DTYPES)),
        tokens=draw(st.integers(0, MAX_TOKENS)) if split is None else sum(split),
        split=split,
        seed=draw(st.integers(0, 2**64 - 1)),
        **chosen,
    )


def parts(text: str) -> tuple[str, list[str], list[str]]:
    head, _, options = text.partition("+")
    model, _, middle = head.partition("@")
    return model, middle.split(".") if middle else [], options.split(".") if options else []


def refusal(text: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(text)
    return str(caught.value)


@given(case=cases())
def test_a_case_is_read_back_as_it_was_written(case):
    assert parse(str(case)) == case
    assert hash(parse(str(case))) == hash(case)


@given(case=cases(), seed=st.integers(0, 2**32))
def test_parts_in_any_order_mean_the_same_case(case, seed):
    model, middle, options = parts(str(case))
    random.Random(seed).shuffle(middle)
    random.Random(seed).shuffle(options)
    text = model + (f"@{'.'.join(middle)}" if middle else "") + (f"+{'.'.join(options)}" if options else "")
    assert parse(text) == case


@given(case=cases())
def test_each_part_of_a_text_says_what_the_default_does_not(case):
    _, middle, options = parts(str(case))
    assert not {"tp1", "ep1", "dp1", "sp1", "fp32", "tokens7", "seed0"} & set(middle)
    for option in options:
        name, _, value = option.partition("=")
        assert value == getattr(case, name) != DEFAULTS[name]
    alone = [name for name in DEFAULTS if name not in ("model", "grid", "tokens", "split")]
    differing = [name for name in alone if getattr(case, name) != DEFAULTS[name]]
    sizes = [size for size in (case.grid.tp, case.grid.ep, case.grid.dp, case.grid.sp) if size != 1]
    planned = case.size == "labels" or case.calls != "one"  # its tokens go without saying
    rows = not planned and (case.split is not None or case.tokens != DEFAULTS["tokens"])
    assert len(middle) + len(options) == len(differing) + len(sizes) + rows


@given(case=cases())
def test_the_spec_of_a_case_differs_from_its_page_in_s_alone(case):
    page = models.load(case.model)
    if case.size == "labels":
        assert case.spec == replace(case.labels.spec)
        return
    spec = getattr(page, case.size)
    factor = (page.real if case.s == "real" else spec).routing.routed_scaling_factor
    with_factor = replace(spec, routing=replace(spec.routing, routed_scaling_factor=factor))
    assert replace(case.spec, vision=None) == replace(with_factor, vision=None)
    assert case.scaled_by in ("router", "kernel", "output")
    assert case.scale in ("page", case.scaled_by)


def test_defaults_may_be_written_and_are_left_out_again():
    assert (
        str(parse("mixtral@tp1.ep1.dp1.sp1.fp32.tokens7.seed0+size=twin.s=twin.scale=page.kernel=partial")) == "mixtral"
    )
    text = "deepseek_v3@tp4.bf16.tokens0.seed42+scale=output.kernel=reduced.order=2"
    assert str(parse(text)) == text
    text = "deepseek_v3@tp2.ep6.dp3.sp2.fp16.tokens3_0_4.seed1+kernel=deepep_ht.placement=replicas.junk=3"
    assert str(parse(text)) == text


def test_a_case_is_frozen_so_that_its_text_stays_true():
    with pytest.raises(FrozenInstanceError):
        parse("mixtral").tokens = 3
    with pytest.raises(FrozenInstanceError):
        parse("mixtral").grid.tp = 3


@pytest.mark.parametrize(
    "part",
    [
        "tp",
        "tp-1",
        "4tp",
        "tpx",
        "int8",
        "BF16",
        "tokens",
        "tokens-7",
        "tokens_3",
        "tokens3_",
        "tokens3__4",
        "tokens3_-1",
        "seed1.5",
        "x",
        "size=twin",
    ],
)
def test_a_malformed_field_is_named_with_the_forms_that_fit(part):
    said = refusal(f"mixtral@bf16.{part}")
    wrong = "5" if part == "seed1.5" else part  # a dot joins fields
    assert said == (
        f"case 'mixtral@bf16.{part}': cannot read the part {wrong!r} after '@'. "
        "Expected tpN, epN, dpN, spN, tokensN, tokensN_N for each data-parallel rank, seedN or fp32, bf16, fp16, "
        "joined by dots"
    )


@pytest.mark.parametrize("text", ["mixtral@", "mixtral@tp2.", "mixtral@.tp2", "mixtral@+pad=8"])
def test_an_empty_field_is_named_as_empty(text):
    assert refusal(text).startswith(f"case {text!r}: cannot read the part '' after '@'. Expected tpN")


@pytest.mark.parametrize("part", ["", "pad", "pad8", "tp2", "width=3", "=3"])
def test_a_malformed_option_is_named_with_the_options_there_are(part):
    assert refusal(f"mixtral@tp2+{part}") == (
        f"case 'mixtral@tp2+{part}': cannot read the part {part!r} after '+'. "
        f"Expected NAME=VALUE with {', '.join(OPTIONS)}"
    )


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", ["", "none", "0.0"])
def test_an_unknown_value_of_an_option_is_answered_with_the_values_that_fit(name, value):
    wrong = value.partition(".")[0]
    if wrong in OPTIONS[name][0]:
        return
    with pytest.raises(UsageError) as caught:
        replace(parse("mixtral"), **{name: wrong})
    assert str(caught.value) == f"{name}={wrong}: expected one of {', '.join(OPTIONS[name][0])}"


@pytest.mark.parametrize("text", ["", "@tp2", "+pad=8"])
def test_a_case_without_a_model_is_shown_how_one_begins(text):
    expected = f"case {text!r}: it starts with a model, as in mixtral@tp2.bf16.tokens7. See moe-harness models"
    assert refusal(text) == expected


def test_an_unknown_model_is_answered_with_the_nearest_names():
    assert refusal("deepseek_v4@tp2") == (
        "unknown model 'deepseek_v4': nearest: deepseek_v3, deepseek_v2. All of them: moe-harness models"
    )
    assert refusal("zzz") == "unknown model 'zzz': All of them: moe-harness models"


@pytest.mark.parametrize(
    "text",
    [
        "mixtral@tp2.tp2", "mixtral@tp2.tp4", "mixtral@ep2.tp2.ep2", "mixtral@dp2.dp2", "mixtral@sp1.sp2.tp2",
        "mixtral@bf16.fp16", "mixtral@seed1.tokens3.seed2", "mixtral@tokens7.dp2.tokens3_4", "mixtral@tokens3_4.dp2.tokens3_4",
    ],
)  # fmt: skip
def test_a_field_given_twice_is_refused_by_name(text):
    name = {"bf": "dtype", "se": "seed", "to": "tokens"}.get(text[8:10], text[8:10])
    assert refusal(text) == f"case {text!r}: {name} is given twice"


def test_an_option_given_twice_is_refused_by_name():
    assert refusal("mixtral+pad=8.pad=8") == "case 'mixtral+pad=8.pad=8': pad is given twice"


@pytest.mark.parametrize(
    ("text", "width", "fit"),
    [
        ("mixtral@tp5", "intermediate_size 48", "1, 2, 3, 4, 6, 8"),
        ("mixtral@tp3+size=real", "intermediate_size 14336", "1, 2, 4, 7, 8"),
        ("ernie4_5_vl_moe@tp48", "vision intermediate_size 24", "1, 2, 3, 4, 6, 8"),
    ],
)
def test_a_tp_that_does_not_divide_a_width_is_answered_with_those_that_do(text, width, fit):
    tp, model = re.search(r"tp\d+", text)[0][2:], text.partition("@")[0]
    assert refusal(text) == f"tp={tp} does not divide {model}'s {width}. tp up to 8 that do: {fit}"


@pytest.mark.parametrize(
    ("text", "cut", "width", "ranks"),
    [
        ("aria@tp4.dp4", "tp*dp/ep=16", "intermediate_size 24", 16),
        ("mixtral@dp5", "tp*dp/ep=5", "intermediate_size 48", 5),
        ("mixtral@tp5.ep3.dp3", "tp*dp/ep=5", "intermediate_size 48", 15),
        ("ernie4_5_vl_moe@tp4.ep2.dp8", "tp*dp/ep=16", "vision intermediate_size 24", 32),
    ],
)
def test_a_grid_that_does_not_divide_a_width_is_answered_with_what_does(text, cut, width, ranks):
    said = refusal(text)
    assert said.startswith(f"{cut} does not divide {text.partition('@')[0]}'s {width}. tp up to 8 that do: 1, 2, 3, 4,")
    assert said.endswith(f"; or whole experts: ep{ranks}")
    sizes = re.sub(r"\.?ep\d+", "", text)
    assert parse(f"{sizes}.ep{ranks}").grid.moe_tp == 1


def test_whole_experts_leave_the_shared_ones_to_be_cut_over_tp():
    said = refusal("deepseek_v3@tp5.ep5")
    assert said.startswith("tp=5 does not divide deepseek_v3's shared intermediate_size ")
    assert "whole experts" not in said
    assert parse("deepseek_v3@tp5.ep5.sp5").grid.shared_tp == 1  # each rank holds them whole


@pytest.mark.parametrize("name", ["tp", "ep", "dp", "sp"])
def test_a_grid_without_ranks_is_refused_by_name(name):
    assert refusal(f"mixtral@{name}0") == f"{name}=0: expected 1 or more"


ILLEGAL = {
    "tp65": "tp=65 and dp=1 are 65 ranks: expected at most 64",
    "tp8.dp9": "tp=8 and dp=9 are 72 ranks: expected at most 64",
    "ep2": "ep=2: expected a divisor of tp*dp=1, the ranks that hold experts. Type one of ep 1",
    "tp2.ep3": "ep=3: expected a divisor of tp*dp=2, the ranks that hold experts. Type one of ep 1, 2",
    "tp3.ep5.dp4": "ep=5: expected a divisor of tp*dp=12, the ranks that hold experts. Type one of ep 1, 2, 3, 4, 6, 12",
    "tp2.ep8.dp2": "ep=8: expected a divisor of tp*dp=4, the ranks that hold experts. Type one of ep 1, 2, 4",
    "tp4.ep4.sp2": "sp=2: sequence parallelism splits the rows over the tp ranks, so sp is 1 or tp=4. Type sp1 or sp4",
    "tp2.ep2.sp4": "sp=4: sequence parallelism splits the rows over the tp ranks, so sp is 1 or tp=2. Type sp1 or sp2",
    "tp4.ep2.sp4": "sp=4 with ep=2: under sequence parallelism each rank's rows need whole experts, on all 4 ranks. "
    "Type ep4, or leave sp out",
    "tp2.ep2.dp2.sp2": "sp=2 with ep=2: under sequence parallelism each rank's rows need whole experts, on all 4 ranks. "
    "Type ep4, or leave sp out",
}


@pytest.mark.parametrize("sizes", ILLEGAL)
def test_a_grid_that_cannot_be_is_answered_with_sizes_that_can(sizes):
    assert refusal(f"mixtral@{sizes}") == ILLEGAL[sizes]
    with pytest.raises(UsageError) as caught:
        parse_grid(sizes)
    assert str(caught.value) == f"grid {sizes!r}: {ILLEGAL[sizes]}"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("", ""), ("tp", "tp"), ("tp2..ep2", ""), ("tp2.", ""), ("tp2,ep2", "tp2,ep2"), ("TP2", "TP2"), ("tp2.tokens7", "tokens7"),
     ("tp-2", "tp-2"), ("tp2.sp", "sp"), ("tp2 .ep2", "tp2 "), (f"tp{'9' * 5000}", f"tp{'9' * 5000}")],
)  # fmt: skip
def test_a_malformed_grid_is_named_with_the_part_that_is_wrong(text, wrong):
    with pytest.raises(UsageError) as caught:
        parse_grid(text)
    assert str(caught.value) == (
        f"grid {text!r}: cannot read {wrong!r}. Expected sizes joined by dots, as in tp2.ep4.dp2.sp1"
    )


@pytest.mark.parametrize("name", ["tp", "ep", "dp", "sp"])
def test_a_size_given_twice_in_a_grid_is_refused_by_name(name):
    with pytest.raises(UsageError, match=rf"grid '{name}1.{name}1': {name} is given twice"):
        parse_grid(f"{name}1.{name}1")


@given(grid=st.sampled_from(GRIDS), seed=st.integers(0, 2**32))
def test_a_grid_is_read_back_as_it_was_written_in_any_order(grid, seed):
    assert parse_grid(str(grid)) == grid
    sizes = [f"{name}{getattr(grid, name)}" for name in ("tp", "ep", "dp", "sp")]
    random.Random(seed).shuffle(sizes)
    assert parse_grid(".".join(sizes)) == grid
    assert grid.ranks == grid.tp * grid.dp == grid.ep * grid.moe_tp


@pytest.mark.parametrize(
    ("text", "expected"),
    [("tokens3_4", "dp=1 data-parallel ranks. Type tokens7"), ("dp2.tokens1_2_3", "dp=2 data-parallel ranks. Type tokens7_7"),
     ("tp2.dp3.tokens3_4", "dp=3 data-parallel ranks. Type tokens7_7_7")],
)  # fmt: skip
def test_shares_of_tokens_for_another_number_of_ranks_are_refused_with_a_form_that_fits(text, expected):
    field = text.split(".")[-1]
    assert refusal(f"mixtral@{text}") == f"{field}: expected one number for each of the {expected}"
    remedy, grid = expected.rpartition(" ")[2], text.rpartition(".")[0]
    assert (
        parse(f"mixtral@{grid}.{remedy}" if grid else f"mixtral@{remedy}").tokens
        == 7 * parse(f"mixtral@{grid or 'tp1'}").grid.dp
    )


def test_shares_that_do_not_add_up_to_the_tokens_are_refused():
    with pytest.raises(UsageError, match="tokens3_4: expected 2 numbers of 0 or more that add up to tokens=6"):
        Case(model="mixtral", grid=Grid(dp=2), tokens=6, split=(3, 4))


def test_shares_below_zero_are_refused_and_even_ones_have_one_spelling():
    with pytest.raises(UsageError, match="2 numbers of 0 or more"):
        Case(model="mixtral", grid=Grid(dp=2), split=(-1, 8))
    assert str(Case(model="mixtral", grid=Grid(dp=2), split=(4, 3))) == "mixtral@dp2"
    assert parse("mixtral@dp2.tokens4_3") == parse("mixtral@dp2")


def test_shares_count_together_against_the_limit_on_tokens():
    half = MAX_TOKENS // 2
    assert parse(f"mixtral@dp2.tokens{half}_{half}").tokens == MAX_TOKENS
    assert refusal(f"mixtral@dp2.tokens{half}_{half + 1}") == f"tokens={MAX_TOKENS + 1}: expected 0 to {MAX_TOKENS}"


@given(case=cases())
def test_every_token_belongs_to_all_ranks_of_one_data_parallel_rank(case):
    grid, covered = case.grid, 0
    assert len(case.rows) == grid.ranks
    for dp_rank in range(grid.dp):
        mine = case.rows[dp_rank * grid.tp]
        assert case.rows[dp_rank * grid.tp : (dp_rank + 1) * grid.tp] == (mine,) * grid.tp
        assert mine.start == covered
        covered = mine.stop
        if case.split is not None:
            assert mine.stop - mine.start == case.split[dp_rank]
    assert covered == case.tokens
    if case.split is None:
        counts = [rows.stop - rows.start for rows in case.rows]
        assert counts == sorted(counts, reverse=True)
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp2.tokens5", [(0, 5), (0, 5)]),
        ("dp3.tokens7", [(0, 3), (3, 5), (5, 7)]),
        ("tp2.dp2.tokens1", [(0, 1), (0, 1), (1, 1), (1, 1)]),
        ("dp3.tokens3_0_4", [(0, 3), (3, 3), (3, 7)]),
        ("tp2.dp2.tokens0_2", [(0, 0), (0, 0), (0, 2), (0, 2)]),
        ("dp2.tokens0_0", [(0, 0), (0, 0)]),
        ("tp2.ep4.dp2.sp2.tokens5_2", [(0, 5), (0, 5), (5, 7), (5, 7)]),
    ],
)
def test_the_rows_of_each_rank_are_those_of_its_share(text, expected):
    assert [(rows.start, rows.stop) for rows in parse(f"mixtral@{text}").rows] == expected


@pytest.mark.parametrize(("tokens", "fits"), [(0, True), (65536, True), (65537, False), (10**12, False)])
def test_tokens_beyond_a_layers_reach_are_refused(tokens, fits):
    if fits:
        assert parse(f"mixtral@tokens{tokens}").tokens == tokens
    else:
        assert refusal(f"mixtral@tokens{tokens}") == f"tokens={tokens}: expected 0 to 65536"
    with pytest.raises(UsageError, match="tokens=-1: expected 0 to 65536"):
        Case(model="mixtral", tokens=-1)


def test_a_seed_has_to_fit_the_64_bits_of_a_key():
    assert parse(f"mixtral@seed{2**64 - 1}").seed == 2**64 - 1
    assert refusal(f"mixtral@seed{2**64}") == f"seed={2**64}: expected 0 to 2**64 - 1, the keys of Philox"


@pytest.mark.parametrize("field", ["tp", "seed"])
def test_a_number_longer_than_python_reads_is_refused_like_any_other(field):
    assert len(refusal(f"mixtral@{field}{'9' * 5000}")) > 0


def test_a_size_or_factor_that_a_model_lacks_is_answered_with_a_way_out():
    assert refusal("mixtral+size=wide") == (
        "mixtral has no wide twin. Models that have one: nemotron_h, qwen3_next, step3p5"
    )
    assert refusal("mixtral+s=real") == "s=real: mixtral has no routed_scaling_factor. Leave s out"


# ---- the document


def table(*header: str) -> list[list[str]]:
    lines = TEXT.splitlines()
    rows = []
    for line in lines[lines.index(f"| {' | '.join(header)} |") + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


def test_the_document_lists_each_option_with_its_values_as_the_code_has_them():
    documented = {
        name: (values, what) for name, values, what in table("option", "values, the default first", "what it changes")
    }
    assert documented == {name: (", ".join(values), what) for name, (values, what) in OPTIONS.items()}
    assert {name: values[0] for name, (values, _) in OPTIONS.items()} == {name: DEFAULTS[name] for name in OPTIONS}


def test_the_document_lists_each_field_and_what_it_says_can_be_parsed():
    rows = {
        name: (written, default, values)
        for name, written, default, values in table("field", "written", "default", "values")
    }
    grid = {field.name for field in fields(Grid)}
    assert rows.keys() == (DEFAULTS.keys() - OPTIONS.keys() - {"grid", "split"}) | grid
    for name, (_, default, _) in rows.items():
        assert name == "model" or str(parse(f"mixtral@{default}")) == "mixtral"
    written = [cells[0] for name, cells in rows.items() if name != "model" and cells[0] != cells[1]]
    assert str(parse(f"mixtral@{'.'.join(written)}")) == f"mixtral@{'.'.join(written)}"
    assert re.search(r"`tokens\d+(_\d+)+`", TEXT)  # how a split is written
    assert rows["dtype"][2] == ", ".join(DTYPES)
    assert rows["tokens"][2].endswith(f"0 to {MAX_TOKENS}")


def test_the_cases_that_the_document_writes_out_are_cases():
    written = [line.strip() for line in TEXT.splitlines() if line.startswith("    ")]
    assert [str(parse(text)) for text in written] == written
    assert parse("mixtral") == parse(re.search(r"`mixtral` is `(\S+)`", TEXT)[1])
