"""Bits and values made again from docs/numbers.md, in plain Python: the document, its vectors and the code agree."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness import models
from harness.philox import philox, uint16, uniform
from harness.weights import DTYPES, make_tokens, make_weight, make_weights
from reference.spec import MoESpec, weight_shapes

TEXT = (Path(__file__).parents[1] / "docs" / "numbers.md").read_text()
TWINS = {name: models.load(name).twin for name in models.names()}
each_twin = pytest.mark.parametrize("spec", TWINS.values(), ids=TWINS)
MASK = 0xFFFFFFFF


def table(*header: str) -> list[list[str]]:
    """The rows of the document's table with this header."""
    lines = TEXT.splitlines()
    rows = []
    for line in lines[lines.index(f"| {' | '.join(header)} |") + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


# ---- the document in plain Python


@cache
def block(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = product1 >> 32 ^ c1 ^ k0, product1 & MASK, product0 >> 32 ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def bits(name: str, seed: int, i: int) -> int:
    tensor = struct.unpack("<II", hashlib.sha256(name.encode()).digest()[:8])
    counter = (i // 8 % 2**32, i // 8 // 2**32, *tensor)
    word = block(counter, (seed % 2**32, seed // 2**32))[i % 8 // 2]
    return word % 65536 if i % 2 == 0 else word // 65536


def offset_and_width(spec: MoESpec, name: str) -> tuple[Fraction, Fraction]:
    rows = {tensor: (offset, width) for tensor, offset, width in table("tensor", "offset", "width")}
    q = 2 ** (len(f"{spec.hidden_size:b}") // 2)
    bare = name.removeprefix("vision_")
    if bare == "e_score_correction_bias":
        bare += f", {spec.routing.scoring_func}"
    if bare in rows:
        known = {"q": Fraction(q), "q/2": Fraction(q, 2)}
        offset, width = (known.get(text) or Fraction(text) for text in rows[bare])
        return offset, width
    shape = weight_shapes(spec)[name]
    terms = shape[-2] if spec.experts.transposed and bare in ("w13", "w2") else shape[-1]
    p = max(Fraction(1, 2**k) for k in range(20) if Fraction(1, 4**k) <= Fraction(4, terms))
    return Fraction(0), p


def value(spec: MoESpec, name: str, seed: int, i: int) -> Fraction:
    offset, width = offset_and_width(spec, name)
    return offset + width * Fraction(2 * bits(name, seed, i) - 65535, 65536)


# ---- bits


@pytest.mark.parametrize(("counter", "key", "result"), table("counter", "key", "result"))
def test_the_published_answers_of_philox_come_out(counter, key, result):
    counter, key, result = ([int(word, 16) for word in text.split()] for text in (counter, key, result))
    assert [int(word) for word in philox(tuple(map(torch.tensor, counter)), tuple(key))] == result
    assert list(block(tuple(counter), tuple(key))) == result


def test_the_published_answers_are_those_of_the_authors():
    """kat_vectors of Random123; the document could be wrong together with the code."""
    results = [result for _, _, result in table("counter", "key", "result")]
    assert results == [
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ]


@given(
    name=st.sampled_from(["w13", "hidden_states", "vision_w2", "überall"]),
    seed=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**40),
    count=st.integers(0, 20),
)
def test_each_element_has_the_bits_that_its_address_says(name, seed, start, count):
    expected = [bits(name, seed, i) for i in range(start, start + count)]
    assert uint16(name, seed, start, start + count).tolist() == expected


def test_addresses_go_on_past_the_32_bits_of_the_first_counter_word():
    edge = 8 * 2**32
    assert uint16("w13", 3, edge - 5, edge + 5).tolist() == [bits("w13", 3, i) for i in range(edge - 5, edge + 5)]


def test_seeds_that_agree_in_their_lower_half_give_other_numbers():
    first, second = (uint16("w13", seed, 0, 64) for seed in (7, 2**32 + 7))
    assert (first == second).sum() < 4


def test_numbers_between_minus_one_and_one_are_exact_symmetric_and_never_zero():
    scaled = uniform("w13", 0, 0, 200_000).double() * 65536
    assert torch.equal(scaled, scaled.round())
    assert (scaled.long() % 2 == 1).all()
    assert scaled.abs().max() == 65535
    assert scaled.mean().abs() < 65536 * 0.005
    assert uniform("w13", 0, 0, 8).dtype is torch.float32


# ---- values


@each_twin
@pytest.mark.parametrize("seed", [0, 2**40 + 7])
def test_each_tensor_has_the_offset_and_width_of_the_documents_table(spec, seed):
    for name, stored in make_weights(spec, seed, torch.float32).items():
        flat = stored.flatten()
        places = [*range(min(9, len(flat))), len(flat) - 1]
        exact = [value(spec, name, seed, i) for i in places]
        assert [Fraction(flat[i].item()) for i in places] == exact, name


def test_the_documents_table_has_no_row_that_no_tensor_needs():
    used = {name.removeprefix("vision_") for spec in TWINS.values() for name in weight_shapes(spec)}
    named = {tensor.split(",")[0] for tensor, _, _ in table("tensor", "offset", "width")}
    assert named - used == {"hidden_states", "any other"}


@pytest.mark.parametrize("seed", [0, 2**32, 2**40 + 7])
def test_tokens_are_made_like_tensors_and_half_of_them_are_images(seed):
    spec = TWINS["ernie4_5_vl_moe"]
    tokens = make_tokens(spec, 200, seed, torch.float32)
    flat = tokens.hidden_states.flatten()
    assert [Fraction(v.item()) for v in flat[:99]] == [value(spec, "hidden_states", seed, i) for i in range(99)]
    assert tokens.is_vision.tolist() == [bits("is_vision", seed, i) < 32768 for i in range(200)]
    assert 70 < tokens.is_vision.sum() < 130
    assert make_tokens(TWINS["mixtral"], 3, seed, torch.float32).is_vision is None


@given(count=st.integers(0, 40), seed=st.integers(0, 2**64 - 1))
def test_the_first_tokens_do_not_depend_on_how_many_follow(count, seed):
    spec = TWINS["ernie4_5_vl_moe"]
    few, many = (make_tokens(spec, m, seed, torch.bfloat16) for m in (count, 41))
    assert few.hidden_states.shape == (count, spec.hidden_size)
    assert torch.equal(few.hidden_states, many.hidden_states[:count])
    assert torch.equal(few.is_vision, many.is_vision[:count])


@each_twin
def test_an_expert_made_alone_is_the_slice_of_all_experts(spec):
    for name in weight_shapes(spec):
        if name.removeprefix("vision_") in ("w13", "w2", "b13", "b2", "per_expert_scale"):
            whole = make_weight(spec, name, 5, torch.float32)
            for e in (0, 1, len(whole) - 1):
                assert torch.equal(make_weight(spec, name, 5, torch.float32, expert=e), whole[e]), (name, e)


def to_bfloat16(number: float) -> float:
    low, high = divmod(struct.unpack("<I", struct.pack("<f", number))[0], 65536)[::-1]
    up = low > 32768 or (low == 32768 and high % 2 == 1)
    return struct.unpack("<f", struct.pack("<I", (high + up) * 65536))[0]


def to_float16(number: float) -> float:
    return struct.unpack("<e", struct.pack("<e", number))[0]


@pytest.mark.parametrize(("dtype", "rounded"), [("bf16", to_bfloat16), ("fp16", to_float16)])
@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss", "gemma4"])
def test_stored_values_are_rounded_once_to_nearest_even(model: str, dtype: str, rounded: Callable[[float], float]):
    spec = TWINS[model]
    stored, exact = make_weights(spec, 1, DTYPES[dtype]), make_weights(spec, 1, torch.float32)
    for name, tensor in stored.items():
        if name == "e_score_correction_bias":
            assert tensor.dtype is torch.float32
            assert torch.equal(tensor, exact[name])
            continue
        assert tensor.dtype is DTYPES[dtype]
        expected = [rounded(number) for number in exact[name].flatten()[:500].tolist()]
        assert tensor.flatten()[:500].tolist() == expected, name


# ---- the vectors in the document


@pytest.mark.parametrize(("name", "seed", "numbers"), table("tensor", "seed", "bits"))
def test_the_documents_bits_are_those_that_the_code_makes(name, seed, numbers):
    assert list(map(int, numbers.split())) == uint16(name, int(seed), 0, 8).tolist()


@pytest.mark.parametrize(("name", "seed", "numbers"), table("tensor", "seed", "values"))
def test_the_documents_values_are_those_that_the_code_makes(name, seed, numbers):
    spec = TWINS["deepseek_v3"]
    if name == "hidden_states":
        made = make_tokens(spec, 1, int(seed), torch.float32).hidden_states
    else:
        made = make_weight(spec, name, int(seed), torch.float32)
    assert list(map(float, numbers.split())) == made.flatten()[:8].tolist()


def test_the_document_has_vectors_of_three_tensors_and_two_seeds():
    expected = {(name, seed) for name in ("w13", "hidden_states", "e_score_correction_bias") for seed in (0, 2**40 + 7)}
    for column in ("bits", "values"):
        assert {(name, int(seed)) for name, seed, _ in table("tensor", "seed", column)} == expected
