"""The bars of others, and what they let pass: the tolerances themselves are tested here."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import torch
from torch import Tensor

from harness.errors import UsageError
from harness.faults.bars import (
    BARS,
    CLEAN,
    NONSENSE,
    OURS,
    AtSize,
    Close,
    Count,
    Matrix,
    judge,
    main,
    of_cases,
    of_summary,
    tally,
)

NAMES = {bar.name for bar in BARS}
BF16, FP32 = torch.bfloat16, torch.float32
CASES = ("deepseek_v3@tp1.{}.tokens33", "mixtral@tp1.{}.tokens33", "gpt_oss@tp1.{}.tokens33")

# What each bar lets pass on the three cases above, in bf16: on all of them, or on some.
ALWAYS = {
    "zeros": {"SGLang, its size"},
    "the negation": {"SGLang, its size"},
    "x1.01": NAMES,
    "x1.05": NAMES - {"torch", "vLLM layer", "vLLM modular"},
    "x1.5": {"SGLang, its size", "FlashInfer", "cosine"},
    "x6": {"SGLang, its size", "FlashInfer", "cosine"},
    "x1000": {"SGLang, its size", "cosine"},
    "NaN": {"TensorRT-LLM"},
}
SOMETIMES = {"x1.05": {"vLLM layer", "vLLM modular"}}


def verdicts(text: str) -> dict[str, bool]:
    """Of the runner, which is right."""
    return {name: count.passed == 1 for name, count in of_cases([text]).cells[CLEAN].items()}


@cache
def nonsense() -> Matrix:
    return of_cases([case.format("bf16") for case in CASES])


def bar(name: str):
    return next(each for each in BARS if each.name == name)


def some(rows: int = 20) -> Tensor:
    return torch.randn(rows, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", ["tp1", "tp4", "tp2.ep4.dp2"])
@pytest.mark.parametrize("model", ["deepseek_v3", "mixtral", "gpt_oss"])
def test_right_layers_in_fp32_pass_every_bar(model, grid):
    assert verdicts(f"{model}@{grid}.tokens33") == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize("model", ["gpt_oss", "qwen2_moe"])
def test_right_layers_with_small_outputs_pass_every_bar_in_bf16_but_torchs_own(model):
    assert verdicts(f"{model}@tp2.bf16.tokens7") == {name: name != "torch" for name in NAMES}


@pytest.mark.parametrize(
    ("case", "accuses"),
    [
        ("deepseek_v3@tp2.bf16.tokens33", {"SGLang"}),  # an absolute part of 0.01, and outputs that reach 4.7
        ("gemma4@tp2.bf16.tokens33", {"SGLang", "vLLM layer", "vLLM modular"}),
        (
            "lfm2_moe@tp2.bf16.tokens33",
            NAMES - {"torch", "SGLang, its size", "FlashInfer", "TensorRT-LLM"},
        ),  # near ties of its router
    ],
)
def test_right_layers_in_bf16_fail_bars_that_know_neither_size_nor_near_ties(case, accuses):
    assert {name for name, passed in verdicts(case).items() if not passed} == {"torch", *accuses}


@pytest.mark.parametrize("name", NONSENSE)
def test_each_bar_lets_pass_the_nonsense_that_the_docs_say_it_does(name):
    counts = nonsense().cells[name]
    passed = {each for each, count in counts.items() if count.passed == count.planted}
    partly = {each for each, count in counts.items() if 0 < count.passed < count.planted}
    assert passed == ALWAYS[name]
    assert partly == SOMETIMES.get(name, set())


def gated(m: int, n: int, k: int, x: float, w: float) -> Tensor:
    """[M, K] of one gated expert, tokens and weights drawn with these deviations."""
    generator = torch.Generator().manual_seed(0)

    def drawn(deviation: float, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(0, deviation, generator=generator)

    gate_MN, up_MN = (drawn(x, m, k) @ drawn(w, k, 2 * n)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_MN) * up_MN) @ drawn(w, n, k)


@pytest.mark.parametrize(("n", "k"), [(128, 128), (1024, 1024)])
@pytest.mark.parametrize("name", ["zeros", "the negation", "x1000"])
def test_sglangs_bar_lets_any_nonsense_pass_on_data_like_its_own(name, n, k):
    """Its test draws tokens and weights of deviation 0.01; the absolute part is 1e-2."""
    y_MH = gated(33, n, k, x=0.01, w=0.01)
    assert y_MH.abs().max() < 1e-5
    assert bar("SGLang").passes(NONSENSE[name](y_MH), y_MH, BF16)
    assert not bar("SGLang").passes(NONSENSE[name](y_MH * 1e7), y_MH * 1e7, BF16)


@pytest.mark.parametrize(
    ("name", "shapes", "x", "w", "weight"),
    [
        (
            "vLLM layer, its size",
            {(1, 128, 256): 0.0036, (32, 512, 512): 0.019, (222, 1024, 2048): 0.11},
            0.1,
            1 / 15,
            1,
        ),
        ("SGLang, its size", {(222, 1024, 1024): 3e-7}, 0.01, 0.01, 2**0.5 / 8),
    ],
)
def test_the_sizes_are_those_of_the_outputs_of_their_shapes(name, shapes, x, w, weight):
    """Of vLLM's the shared experts, which are most of it; of SGLang's two of 8 experts that all weigh about 1/8."""
    rule = bar(name).rule
    assert [each.rms for each in getattr(rule, "rules", (rule,))] == list(shapes.values())
    for (m, n, k), size in shapes.items():
        y_MH = weight * gated(min(m, 33), n, k, x, w)
        assert y_MH.square().mean().sqrt().item() == pytest.approx(size, rel=0.3)


def test_vllms_smallest_shape_lets_zeros_pass_and_its_larger_ones_do_not():
    y_MH = some()
    for size, passes in ((0.0036, True), (0.019, False), (0.11, False)):
        rule = next(each for each in bar("vLLM layer, its size").rule.rules if each.rms == size)
        assert rule(torch.zeros_like(y_MH), y_MH, BF16) == passes


def test_a_size_changes_no_verdict_of_a_rule_that_is_relative_alone():
    y_MH = some()
    for size in (1e-6, 1.0, 1e6):
        assert AtSize(size, Close(atol=0.0, rtol=0.1))(1.09 * y_MH, y_MH, BF16)
        assert not AtSize(size, Close(atol=0.0, rtol=0.1))(1.11 * y_MH, y_MH, BF16)
    assert AtSize(1.0, Close(atol=0.0, rtol=0.1))(0 * y_MH, 0 * y_MH, BF16)


@pytest.mark.parametrize(("factor", "passes"), [(0.16, False), (0.6, True), (6.6, True), (6.8, False)])
def test_a_relative_part_of_the_found_excuses_results_that_are_too_large(factor, passes):
    """|1 - f| <= 0.85 f, so f from 0.54 to 6.67 is close."""
    y_MH = 1e3 * some()
    assert bar("FlashInfer").passes(factor * y_MH, y_MH, BF16) == passes


def test_tensorrt_llms_count_of_what_is_beyond_the_limit_misses_nan_and_no_other_bar_does():
    y_MH = some()
    told = judge([torch.full_like(y_MH, torch.nan)], y_MH, BF16)
    assert {name for name, passed in told.items() if passed} == {"TensorRT-LLM"}
    assert not any(judge([torch.full_like(y_MH, torch.inf)], y_MH, BF16).values())


@pytest.mark.parametrize(
    ("name", "wrong", "passes"),
    [("FlashInfer", 75, True), ("FlashInfer", 76, False), ("TensorRT-LLM", 39, True), ("TensorRT-LLM", 40, False)],
)
def test_the_share_of_elements_that_may_differ_is_met_to_the_element(name, wrong, passes):
    expected_MH = torch.ones(10, 100, dtype=torch.float64)
    found_MH = expected_MH.clone()
    found_MH.flatten()[:wrong] = 100.0
    assert bar(name).passes(found_MH, expected_MH, BF16) == passes


def test_a_wrong_rank_fails_a_bar_that_all_others_pass():
    y_MH = some()
    assert judge([y_MH, y_MH], y_MH, FP32) == dict.fromkeys(NAMES, True)
    assert not any(judge([y_MH, 1e9 * y_MH - 1e9], y_MH, FP32).values())


def test_rows_of_other_ranks_do_not_dilute_the_share_of_wrong_elements():
    y_MH = some(rows=50)
    found_MH = y_MH.clone()
    found_MH[:1] = 0.0
    assert judge([found_MH], y_MH, BF16)["TensorRT-LLM"]
    assert not judge([found_MH], y_MH, BF16, [slice(0, 1)])["TensorRT-LLM"]


def test_no_tokens_pass_every_bar():
    none = torch.empty(0, 64, dtype=torch.float64)
    assert judge([none], none, BF16) == dict.fromkeys(NAMES, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torchs_bar_agrees_with_assert_close_at_its_edge(dtype):
    """Ones against 1 + the limit, a little inside and a little outside, as assert_close itself decides."""
    rule = bar("torch").rule.rules[dtype]
    right = torch.ones(1, 1, dtype=torch.float64)
    for factor, close in ((0.99, True), (1.01, False)):
        found = right + factor * (rule.atol + rule.rtol)
        assert bar("torch").passes(found, right, dtype) == close
        try:
            torch.testing.assert_close(found, right, atol=rule.atol, rtol=rule.rtol)
            agreed = True
        except AssertionError:
            agreed = False
        assert agreed == close
    from torch.testing._comparison import default_tolerances

    assert default_tolerances(dtype) == (rule.rtol, rule.atol)


def test_a_bar_tells_the_file_of_a_repository_that_it_is_taken_from():
    assert len(NAMES) == len(BARS)
    for each in BARS:
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?: [\w/.-]+\.py.*", each.source), each.source


def test_rules_print_as_their_figures():
    assert repr(Close(atol=0.1, rtol=0.85, of="found", share=0.925)).startswith("Close(atol=0.1, rtol=0.85, of='found'")


def test_a_matrix_counts_each_bar_by_family_and_keeps_right_layers_apart():
    matrix = tally(
        [
            ("B10", {"torch": False, "cosine": True}),
            ("B3", {"torch": True, "cosine": True}),
            ("B3", {"torch": False, "cosine": True}),
            (CLEAN, {"torch": False, "cosine": True}),
        ]
    )
    assert matrix.cells["B3"] == {"torch": Count(1, 2), "cosine": Count(2, 2)}
    assert matrix.wrong == {"torch": Count(1, 3), "cosine": Count(3, 3)}
    assert [line[0] for line in matrix.lines()] == [CLEAN, "B3", "B10", "all", "let pass"]
    assert matrix.markdown().splitlines()[-1] == "| let pass | 33.3 % | 100.0 % |"
    assert matrix.table().row_count == 5


SUMMARY = {"faults": 2, "bars": {"A1": {"torch": [0, 3], OURS: [0, 3]}, "A2": {"torch": [1, 2], OURS: [0, 2]}}}
PRINTED = f'{{"fault": "factor_twice", "planted": 3}}\n{json.dumps({"summary": SUMMARY})}\n'


def test_the_summary_of_the_faults_verb_becomes_a_matrix_with_this_harness_as_one_more_judge():
    matrix = of_summary(PRINTED)
    assert matrix.bars == ("torch", OURS)
    assert matrix.cells["A2"]["torch"] == Count(1, 2)
    assert matrix.by_stage.cells == {"A scale": {"torch": Count(1, 5), OURS: Count(0, 5)}}


@pytest.mark.parametrize("text", ["", "not json", '{"summary": {"faults": 3}}', '{"fault": "x"}', "[1]"])
def test_a_file_without_a_matrix_is_refused_with_what_stands_there(text):
    with pytest.raises(UsageError, match="no kill matrix in the last of 1 lines"):
        of_summary(text)


def test_the_module_prints_the_table_of_a_file_as_markdown(tmp_path, capsys):
    file = tmp_path / "faults.jsonl"
    file.write_text(PRINTED)
    assert main([str(file), "--stages"]) == 0
    assert "| A scale | 1/5 | 0/5 |" in capsys.readouterr().out.splitlines()
    assert main([str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


def test_the_module_prints_what_bars_make_of_right_layers_and_of_nonsense(capsys):
    assert main(["gpt_oss@tp2.bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {row}" for row in (CLEAN, *NONSENSE, "all", "let pass")]
