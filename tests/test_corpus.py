"""The public bugs: each has a family or a reason, each family a fault, and the listing shows both."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from harness.case import Grid
from harness.check import check
from harness.errors import UsageError
from harness.faults.bank import bank
from harness.faults.corpus import FAMILIES, NOT_PLANTED, REASONS, Thread, threads
from harness.faults.fault import Fault, FaultyRunner
from harness.faults.listing import listing
from harness.faults.plant import put
from harness.finding import Verdict
from tests.drawn_layers import ZeroExpertCase

STAGES = {"scale", "reduce", "order", "routing", "shared", "expert", "shape"}
WITHOUT_A_THREAD = {"nemotron-latent-bias-times-tp"}


def named(thread: Thread) -> str:
    return thread.id


def test_the_corpus_has_192_public_bugs_and_no_id_twice():
    ids = [thread.id for thread in threads()]
    assert len(ids) == 192
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in ids)


@pytest.mark.parametrize("thread", threads(), ids=named)
def test_each_public_bug_has_a_family_or_a_reason_and_a_reference_well_formed(thread):
    assert (thread.family is None) != (thread.reason is None)
    assert thread.family is None or thread.family in FAMILIES
    assert thread.reason is None or thread.reason in REASONS
    assert thread.stage in STAGES
    assert (thread.ref is None) == (thread.id in WITHOUT_A_THREAD)
    assert thread.ref is None or re.fullmatch(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+#[1-9]\d*", thread.ref)


@pytest.mark.parametrize("thread", threads(), ids=named)
def test_each_public_bug_is_told_in_one_short_sentence(thread):
    assert thread.wrong[0].isupper()
    assert thread.wrong.endswith(".")
    assert ". " not in thread.wrong
    assert 5 <= len(thread.wrong.split()) <= 25


def test_every_reason_is_the_reason_of_some_public_bug():
    assert {thread.reason for thread in threads()} - {None} == set(REASONS)


def test_every_family_of_a_public_bug_is_planted_or_listed_as_not_planted():
    planted = {fault.family for fault in bank()}
    assert planted <= set(FAMILIES), "families of the bank that corpus.py has no words for"
    asked = {thread.family for thread in threads()} - {None}
    assert asked - planted - set(NOT_PLANTED) == set(), "plant these, or say in NOT_PLANTED why not"
    assert set(NOT_PLANTED) & planted == set(), "planted by now: take these from NOT_PLANTED"
    assert set(NOT_PLANTED) <= set(FAMILIES)


def _real_ones_too(layer, comm):
    """Tokens of an identity expert reach a real one as well."""
    split, count = layer.runner.router.split, layer._spec.routing.num_experts

    def wrong(x_MH, weights_MK, ids_MK):
        zero_MH, _, _ = split(x_MH, weights_MK, ids_MK)
        return zero_MH, weights_MK, ids_MK % count

    put(layer.runner, "router", _Splitting(layer.runner.router, wrong))


def _columns_left_out(layer, comm):
    """The identity kernel writes whole blocks of 48 columns alone."""
    split = layer.runner.router.split

    def wrong(x_MH, weights_MK, ids_MK):
        zero_MH, *rest = split(x_MH, weights_MK, ids_MK)
        zero_MH[:, 48:] = 0.0
        return zero_MH, *rest

    put(layer.runner, "router", _Splitting(layer.runner.router, wrong))


class _Splitting:
    """A router of identity experts that splits them off in its own way."""

    scales = True

    def __init__(self, right, split):
        self.select_experts, self.split = right.select_experts, split


@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2, ep=2), Grid(tp=2, ep=4, dp=2)], ids=str)
@pytest.mark.parametrize("layer", [None, _real_ones_too, _columns_left_out])
def test_identity_experts_are_shown_wrong_on_a_page_patched_to_have_them(grid, layer):
    case = ZeroExpertCase(model="deepseek_v3", grid=grid, tokens=33, scale="router")
    fault = Fault(name="", family="D14", computes="", references=(), case="", words="", layer=layer)
    finding = check(case, FaultyRunner(fault), alone=True)
    assert finding.verdict is (Verdict.OK if layer is None else Verdict.MISMATCH), finding.diagnosis
    assert finding.family is None


def test_every_family_of_the_table_is_planted_or_has_a_public_bug_or_a_reason():
    seen = {fault.family for fault in bank()} | {thread.family for thread in threads()} | set(NOT_PLANTED)
    assert [family for family in FAMILIES if family not in seen] == []


def test_the_listing_counts_every_fault_and_every_public_bug(capsys):
    assert listing((), as_json=False) == 0
    printed = capsys.readouterr().out
    assert all(fault.name in printed for fault in bank())
    counts = re.findall(r"^([A-HP]\d+)  .*  (\d+|-) +(\d+|-)$", printed, re.MULTILINE)
    assert sum(int(planted) for _, planted, _ in counts if planted != "-") == len(bank())
    shown = sum(thread.family is not None for thread in threads())
    assert sum(int(found) for _, _, found in counts if found != "-") == shown
    told = re.search(r"192 public bugs: (\d+) of .*, (\d+) of .*, (\d+) that no layer", printed)
    assert [int(told[1]) + int(told[2]), int(told[3])] == [shown, 192 - shown]


def test_the_listing_of_a_family_shows_its_faults_and_its_public_bugs_alone(capsys):
    assert listing(("B3",), as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["kind"] for line in lines} == {"fault", "thread"}
    assert {line["family"] for line in lines} == {"B3"}


def test_the_listing_of_a_reason_shows_what_no_layer_here_can_show(capsys):
    assert listing(("size",), as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("size ") for line in lines) == sum(thread.reason == "size" for thread in threads()) == 7


def test_the_listing_of_a_fault_shows_it_and_the_public_bugs_of_its_family(capsys):
    fault = next(fault for fault in bank() if fault.family == "B3")
    assert listing((fault.name,), as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines if line["kind"] == "fault"] == [fault.name]
    assert {line["family"] for line in lines} == {"B3"}


def test_json_lines_of_the_listing_are_one_for_each_fault_and_each_public_bug(capsys):
    assert listing((), as_json=True) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert Counter(line["kind"] for line in lines) == {"fault": len(bank()), "thread": len(threads())}
    assert lines[-1]["wrong"] == threads()[-1].wrong


def test_a_name_that_nobody_has_is_refused_with_the_nearest_ones():
    with pytest.raises(UsageError, match=r"unknown fault 'B33': nearest: .*B3"):
        listing(("B33",), as_json=False)
