"""A case as text: read back as it was written, and refused with the part that is wrong and what to type instead."""

from __future__ import annotations

import random
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import models
from harness.case import DTYPES, MAX_TOKENS, OPTIONS, Case, Grid, parse
from harness.errors import UsageError

TEXT = (Path(__file__).parents[1] / "docs" / "cases.md").read_text()
DEFAULTS = {field.name: field.default for field in fields(Case)}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any legal case; whether a system has the layer is not asked."""
    page = models.load(draw(st.sampled_from(models.names())))
    chosen = {name: draw(st.sampled_from(values)) for name, (values, _) in OPTIONS.items()}
    if page.wide is None and chosen["size"] == "wide":
        chosen["size"] = "twin"
    if page.real.routing.routed_scaling_factor is None:
        chosen["s"] = "twin"
    spec = getattr(page, chosen["size"])
    fits = [tp for tp in range(1, 17) if all(width % tp == 0 for width in spec.tp_widths().values())]
    return Case(
        model=page.model_type,
        grid=Grid(tp=draw(st.sampled_from(fits))),
        dtype=draw(st.sampled_from(DTYPES)),
        tokens=draw(st.integers(0, MAX_TOKENS)),
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
    assert not {"tp1", "fp32", "tokens7", "seed0"} & set(middle)
    for option in options:
        name, _, value = option.partition("=")
        assert value == getattr(case, name) != DEFAULTS[name]
    differing = [name for name in DEFAULTS if name not in ("model", "grid") and getattr(case, name) != DEFAULTS[name]]
    assert len(middle) + len(options) == len(differing) + (case.grid.tp != 1)


@given(case=cases())
def test_the_spec_of_a_case_differs_from_its_page_in_s_alone(case):
    page = models.load(case.model)
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


def test_a_case_is_frozen_so_that_its_text_stays_true():
    with pytest.raises(FrozenInstanceError):
        parse("mixtral").tokens = 3
    with pytest.raises(FrozenInstanceError):
        parse("mixtral").grid.tp = 3


@pytest.mark.parametrize(
    "part", ["tp", "tp-1", "4tp", "tpx", "int8", "BF16", "tokens", "tokens-7", "seed1.5", "x", "size=twin"]
)
def test_a_malformed_field_is_named_with_the_forms_that_fit(part):
    said = refusal(f"mixtral@bf16.{part}")
    wrong = "5" if part == "seed1.5" else part  # a dot joins fields
    assert said == (
        f"case 'mixtral@bf16.{part}': cannot read the part {wrong!r} after '@'. "
        "Expected tpN, epN, dpN, spN, tokensN, seedN or fp32, bf16, fp16, joined by dots"
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
    "text", ["mixtral@tp2.tp2", "mixtral@tp2.tp4", "mixtral@bf16.fp16", "mixtral@seed1.tokens3.seed2"]
)
def test_a_field_given_twice_is_refused_by_name(text):
    name = {"tp": "tp", "bf": "dtype", "se": "seed"}[text[8:10]]
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


@pytest.mark.parametrize(("name", "long"), [("ep", "expert"), ("dp", "data"), ("sp", "sequence")])
def test_what_is_not_simulated_yet_is_refused_by_name(name, long):
    assert refusal(f"mixtral@{name}2") == (
        f"{name}=2: {long} parallelism is not simulated yet, only tensor parallelism is. Leave {name} out, or type --tp 2"
    )


@pytest.mark.parametrize("name", ["tp", "ep", "dp", "sp"])
def test_a_grid_without_ranks_is_refused_by_name(name):
    assert refusal(f"mixtral@{name}0") == f"{name}=0: expected 1 or more"


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
    assert rows.keys() == (DEFAULTS.keys() - OPTIONS.keys() - {"grid"}) | {field.name for field in fields(Grid)}
    for name, (written, default, _) in rows.items():
        if name != "model":
            assert str(parse(f"mixtral@{default}")) == "mixtral"
            assert written == default or str(parse(f"mixtral@{written}")) == f"mixtral@{written}"
    assert rows["dtype"][2] == ", ".join(DTYPES)
    assert rows["tokens"][2].endswith(f"0 to {MAX_TOKENS}")


def test_the_cases_that_the_document_writes_out_are_cases():
    written = [line.strip() for line in TEXT.splitlines() if line.startswith("    ")]
    assert [str(parse(text)) for text in written] == written
    assert parse("mixtral") == parse(re.search(r"`mixtral` is `(\S+)`", TEXT)[1])
