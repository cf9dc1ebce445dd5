"""int8 experts: what is stored, what the oracle makes of it, that right layers pass and loaders with one fault are found."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import main_job, models
from harness.case import DTYPES, Case, parse
from harness.check import check
from harness.errors import UsageError
from harness.finding import Finding, Verdict
from harness.problem import problem
from harness.quantised import LARGEST, dequantise, input_dim, quantise
from harness.runner.experts import shard
from harness.systems import resolve
from harness.systems.foreign import ForeignSystem
from reference.spec import weight_shapes
from tests.int8_faults import BIASED, FAULTS, GATED, SHARDED, SINGLE, FaultyLoader, Int8Fault
from tests.int8_layers import WAYS
from tests.test_numbers import bits

HERE = Path(__file__).parent
NUMBERS = (HERE.parent / "docs" / "numbers.md").read_text()
RUNNER = resolve("runner")
GRIDS = ("tp1", "tp2", "tp4", "tp2.ep2", "tp4.ep2", "tp2.ep4.dp2", "tp4.ep4.sp4")

# ---- what is stored


def by_hand(name: str, seed: int, first: int, step: int, count: int, channel: int) -> tuple[list[int], Fraction]:
    """q of a channel whose `count` numbers stand `step` apart from element `first` on, and 127 * scale over the width."""
    m = [2 * bits(name, seed, first + k * step) - 65535 for k in range(count)]
    amax = max(map(abs, m))
    gain = 1 + Fraction(2 * bits(f"{name}_scale", seed, channel) - 65535, 2 * 65536)
    return [round(Fraction(127 * each, amax)) for each in m], gain * Fraction(amax, 65536)


@pytest.mark.parametrize("seed", [0, 1099511627783])
@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss", "ernie4_5_vl_moe"])
def test_int8_numbers_and_their_scales_follow_from_the_bits_in_plain_integers(model: str, seed: int) -> None:
    given = problem(parse(f"{model}@seed{seed}.tokens1+quant=int8"))
    plain = problem(parse(f"{model}@seed{seed}.tokens1")).weights
    for name in (n for n in given.weights if given.weights[n].dtype is torch.int8):
        q, scale = given.weights[name], given.weights[f"{name}_scale"]
        summed = input_dim(given.spec, name)
        inputs, outputs = q.shape[summed], q.shape[3 - summed]
        width = Fraction(2) ** round(math.log2(float(plain[name].abs().max())))
        for e, channel in ((0, 0), (3, 1), (len(q) - 1, outputs - 1)):
            first = e * inputs * outputs + (channel * inputs if summed == 2 else channel)
            step = 1 if summed == 2 else outputs
            wanted, size = by_hand(name, seed, first, step, inputs, e * outputs + channel)
            assert q[e].movedim(summed - 1, 1)[channel].tolist() == wanted
            exact = size * width / 127
            stored = Fraction(float(scale[e, channel]))
            above, below = (float(torch.nextafter(scale[e, channel], torch.tensor(end))) for end in (9.0, 0.0))
            assert all(abs(stored - exact) < abs(Fraction(other) - exact) for other in (above, below))


def test_the_document_has_the_first_numbers_of_a_channel() -> None:
    weights = problem(parse("deepseek_v3@tokens1+quant=int8")).weights
    row = next(line for line in NUMBERS.splitlines() if line.startswith("| `w2` | 0 |"))
    _, _, _, first, scale, _ = (cell.strip() for cell in row.split("|"))
    assert first == " ".join(map(str, weights["w2"][0, 0, :8].tolist()))
    assert float(scale) == float(weights["w2_scale"][0, 0])


def test_a_channel_is_symmetric_and_its_largest_number_is_127() -> None:
    w = torch.tensor([[[0.5, -0.25, 0.125, -1.0], [0.0, 0.0, 0.0, 0.0]]])
    spec = models.load("mixtral").twin
    stored = quantise(spec, {"w2": w}, {"w2": w}, 0)
    # 127 * w / 1.0 = 63.5, -31.75, 15.875, -127: a tie goes to the even number
    assert stored["w2"].tolist() == [[[64, -32, 16, -127], [0, 0, 0, 0]]]
    gains = [1 + (2 * bits("w2_scale", 0, i) - 65535) / 131072 for i in range(2)]
    assert stored["w2_scale"].tolist() == torch.tensor([[gains[0] / 127, gains[1] / 127]]).tolist()


@pytest.mark.parametrize("model", models.names())
def test_only_routed_matrices_are_int8_and_they_are_the_same_in_every_dtype(model: str) -> None:
    kept = {dtype: problem(parse(f"{model}@{dtype}.tokens1+quant=int8")).weights for dtype in DTYPES}
    plain = problem(parse(f"{model}@bf16.tokens1")).weights
    packed = {name for name, tensor in kept["bf16"].items() if tensor.dtype is torch.int8}
    assert {name.removeprefix("vision_") for name in packed} == {"w13", "w2"}
    assert kept["bf16"].keys() == plain.keys() | {f"{name}_scale" for name in packed}
    for name, tensor in kept["bf16"].items():
        if name in packed:
            assert tensor.shape == plain[name].shape
            assert int(tensor.abs().max()) == LARGEST
        if name in packed or name.endswith(("w13_scale", "w2_scale")):
            assert all(torch.equal(tensor, kept[dtype][name]) for dtype in DTYPES)
        else:
            assert torch.equal(tensor, plain[name])


def test_another_channels_scale_is_another_number() -> None:
    scale = problem(parse("deepseek_v3@tokens1+quant=int8")).weights["w2_scale"].double()
    for dim in (0, 1):
        ratio = (scale / scale.roll(1, dim)).log().abs()
        assert float(ratio.median()) > 0.2


# ---- the oracle


@pytest.mark.parametrize("model", models.names())
def test_the_oracle_reads_the_stored_numbers_exactly_under_their_plain_names(model: str) -> None:
    given = problem(parse(f"{model}@bf16.tokens1+quant=int8"))
    assert {name: tuple(t.shape) for name, t in given.exact.items()} == weight_shapes(given.spec)
    for name in (n for n in given.weights if given.weights[n].dtype is torch.int8):
        q, scale = given.weights[name], given.weights[f"{name}_scale"]
        across = input_dim(given.spec, name) - 1
        for e, i, o in ((0, 0, 0), (1, 2, 3), (-1, -1, -1)):
            exact = Fraction(float((given.exact[name][e]).movedim(across, 0)[i, o]))
            assert exact == int(q[e].movedim(across, 0)[i, o]) * Fraction(float(scale[e, o]))


def channel_by_channel(case: Case) -> Tensor:
    """R of a plain layer in float64 with each scale after its sum, where the oracle has it in the matrix."""
    given = problem(case)
    x_MH, stages, stored = given.tokens.hidden_states.double(), given.stages, given.weights
    routed_MH = torch.zeros_like(x_MH)
    for m, (ids, weights) in enumerate(zip(stages.topk_ids_MK.tolist(), stages.topk_weights_MK.tolist(), strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            h = (stored["w13"][e].double() @ x_MH[m]) * stored["w13_scale"][e].double()
            gate, up = h.chunk(2)
            y = (stored["w2"][e].double() @ (gate * torch.sigmoid(gate) * up)) * stored["w2_scale"][e].double()
            routed_MH[m] += weight * y
    return routed_MH


@pytest.mark.parametrize("text", ["deepseek_v3@bf16+quant=int8", "mixtral@fp16+quant=int8", "qwen2_moe+quant=int8"])
def test_the_oracle_is_a_float64_forward_of_what_the_bytes_stand_for(text: str) -> None:
    case = parse(text)
    assert torch.allclose(channel_by_channel(case), problem(case).stages.routed_MH, rtol=1e-12, atol=1e-12)


def test_unpacking_and_packing_again_changes_nothing_but_the_scale() -> None:
    given = problem(parse("gpt_oss@tokens1+quant=int8"))
    again = quantise(given.spec, given.exact, given.exact, 0)
    assert torch.equal(again["w13"], given.weights["w13"])
    assert dequantise(given.spec, given.weights)["w2"].equal(given.exact["w2"])


# ---- right layers


@pytest.mark.parametrize("model", models.names())
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_runner_is_right_on_every_grid(model: str, dtype: str) -> None:
    for grid in GRIDS:
        try:
            case = parse(f"{model}@{grid}.{dtype}.tokens33+quant=int8")
        except UsageError:  # a width that this model's tp does not divide
            continue
        finding = check(case, RUNNER)
        assert finding.verdict is Verdict.OK, f"{case}: {finding.diagnosis}"


@pytest.mark.parametrize("combination", main_job.COMBINATIONS[::4])
def test_the_runner_is_right_with_every_other_option(combination: str) -> None:
    case = parse(f"deepseek_v3@{combination}.quant=int8")
    finding = check(case, RUNNER)
    assert finding.verdict is Verdict.OK, f"{case}: {finding.diagnosis}"


@pytest.mark.parametrize("way", WAYS)
def test_right_layers_of_others_pass_however_they_unpack(way: str) -> None:
    system = ForeignSystem(f"{HERE / 'int8_layers.py'}:{way}")
    for model in ("deepseek_v3", "gpt_oss", "nemotron_h", "ernie4_5_vl_moe"):
        for dtype in DTYPES:
            for grid in ("tp1", "tp4"):
                finding = check(parse(f"{model}@{grid}.{dtype}.tokens33.seed3+quant=int8"), system)
                assert finding.verdict is Verdict.OK, f"{finding.case}: {finding.diagnosis}"


def test_a_rank_cuts_the_scales_of_w13_with_its_rows_and_leaves_those_of_w2() -> None:
    for model in ("deepseek_v3", "gpt_oss", "nemotron_h"):
        given = problem(parse(f"{model}@tokens1+quant=int8"))
        plain = {name: tensor.float() for name, tensor in given.exact.items()}
        for rank in range(2):
            mine, wanted = (shard(w, given.spec.experts, rank, 2, 8, (3, 0)) for w in (given.weights, plain))
            assert mine.w13_EnP.dtype is torch.float32
            assert torch.equal(mine.w13_EnP, wanted.w13_EnP)
            assert torch.equal(mine.w2_EPi, wanted.w2_EPi)


# ---- who has no such experts


def test_systems_that_cannot_load_int8_say_so(tmp_path: Path) -> None:
    case = parse("mixtral+quant=int8")
    (tmp_path / "layer.py").write_text("def build(spec, weights, comm): ...\n")
    for system in (resolve("legacy"), resolve("transformers"), ForeignSystem(f"{tmp_path / 'layer.py'}:build")):
        assert "quant=int8" in (system.supports(case) or "")
    (tmp_path / "other.py").write_text('quant = ("int8",)\ndef build(spec, weights, comm): ...\n')
    assert ForeignSystem(f"{tmp_path / 'other.py'}:build").supports(case) is None


# ---- loaders with a fault

# of 0.2 and 0.8 %: within what bf16 rounds itself
SMALL = ("rounded to bf16", "divided by 128")


def found(fault: Int8Fault, text: str) -> Finding:
    finding = check(parse(f"{text}.tokens33+quant=int8"), FaultyLoader(fault))
    assert finding.verdict is Verdict.MISMATCH, f"{fault} on {text}"
    return finding


def assert_named(fault: Int8Fault, text: str) -> None:
    finding = found(fault, text)
    assert fault.words in finding.diagnosis
    assert finding.family == "F10"


@pytest.mark.parametrize("grid", ["tp1", "tp4"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=str)
def test_a_scale_lost_doubled_or_misplaced_is_named_in_fp32(fault: Int8Fault, grid: str) -> None:
    if "w13 and w2 are applied twice" in fault.words:  # what is left of R is less than a rounding of S
        assert "y = S instead of s*R + S" in found(fault, f"deepseek_v3@{grid}.fp32").diagnosis
    else:
        assert_named(fault, f"deepseek_v3@{grid}.fp32")


@pytest.mark.parametrize(
    ("dtype", "fault"),
    [("fp16", fault) for fault in FAULTS.values()]
    + [("bf16", fault) for fault in FAULTS.values() if not any(words in fault.words for words in SMALL)],
    ids=str,
)
def test_the_same_faults_are_found_in_short_dtypes_but_for_those_of_the_size_of_a_rounding(dtype, fault) -> None:
    found(fault, f"deepseek_v3@tp4.{dtype}")


@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("fault", GATED.values(), ids=GATED)
def test_scales_at_the_wrong_rows_are_named(fault: Int8Fault, model: str) -> None:
    assert_named(fault, f"{model}@tp1.fp32")


@pytest.mark.parametrize("fault", SHARDED.values(), ids=SHARDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_not_cut_as_their_rows_are_named(fault: Int8Fault, dtype: str) -> None:
    assert_named(fault, f"deepseek_v3@tp4.{dtype}")


def test_a_scale_on_the_bias_is_named() -> None:
    assert_named(BIASED["bias"], "gpt_oss@tp1.fp32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", SINGLE.values(), ids=SINGLE)
def test_one_wrong_channel_is_found_and_its_expert_or_column_told(fault: Int8Fault, dtype: str) -> None:
    told = found(fault, f"deepseek_v3@tp4.{dtype}").diagnosis
    assert fault.words in told or dtype == "bf16", told  # where some of the expert's tokens hide it


def test_the_loader_without_a_fault_is_right() -> None:
    nothing = Int8Fault("nothing", lambda spec, weights, comm: None)
    for dtype in DTYPES:
        assert check(parse(f"deepseek_v3@tp4.{dtype}.tokens33+quant=int8"), FaultyLoader(nothing)).verdict is Verdict.OK
