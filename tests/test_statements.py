"""What a reimplementation of the refactored runner has to do, statement by statement, and the tests that state it.

The numbers are those of the project's list of forty; 34 and 35 are about the kernels' alignment arrays and roundings.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from harness import models
from harness.case import parse
from harness.check import check
from harness.execution import run_system
from harness.finding import Verdict
from harness.problem import problem
from harness.runner.router import make_router
from harness.systems import resolve

RUNNER = resolve("runner")
HERE = Path(__file__).parent

# number -> file::test, without "tests/" and "test_" of the file
STATEMENTS: dict[int, tuple[str, ...]] = {
    1: ("scaling_exactly_once::test_s_enters_the_routed_part_once_and_the_shared_part_never",),
    2: ("plan::test_exactly_the_actor_of_table_a_scales",),
    3: ("plan::test_only_the_routers_of_table_a_fold_s_into_their_weights",
        "plan::test_a_layer_hands_s_to_one_actor_and_1_to_the_others"),
    4: ("plan::test_a_factor_of_one_is_multiplied_by_nobody",),
    5: ("runner::test_a_biased_latent_projection_adds_its_bias_once_and_unscaled",),
    6: ("runner::test_a_kernel_swapped_between_two_calls_changes_the_collectives",
        "plan::test_the_reduced_flag_is_asked_of_the_kernel_that_is_there_at_the_call"),
    7: ("plan::test_the_final_all_reduce_is_made_in_the_cells_of_table_d",
        "plan::test_shared_experts_are_reduced_in_the_rows_of_table_c",
        "ledger::test_every_rank_makes_the_collectives_of_the_table_and_no_other"),
    8: ("plan::test_no_plan_names_ep_or_dp_beyond_the_kernel_s_own_collectives",
        "ledger::test_no_collective_over_ep_or_dp_reduces_anything_but_the_kernel_s_own_combine"),
    9: ("runner::test_the_result_has_width_h_whatever_the_kernel_s_width",),
    10: ("plan::test_padding_is_cut_before_the_sum_only_where_table_e_says",),
    11: ("runner::test_junk_that_the_kernel_leaves_in_padded_columns_does_not_leak",
         "runner::test_id_minus_one_contributes_nothing_even_next_to_nan_rows",
         "statements::test_11_junk_rows_reach_no_token_of_any_rank"),
    12: ("runner::test_shared_experts_run_once_a_call_on_the_untransformed_input",),
    13: ("runner::test_a_kernel_that_overwrites_its_input_cannot_change_s",),
    14: ("runner::test_each_micro_batch_has_its_own_place_for_s",
         "statements::test_14_two_micro_batches_in_flight_do_not_exchange_s"),
    15: ("runner::test_shared_experts_that_reduce_themselves_are_detected",),
    16: ("plan::test_a_layer_decides_by_the_sizes_of_its_grid",),
    17: ("ledger::test_every_rank_makes_the_collectives_of_the_table_and_no_other",
         "exactly_once_on_grids::test_each_source_enters_each_rank_s_output_once_with_its_lawful_factor"),
    18: ("statements::test_18_rows_split_over_tp_come_back_whole",
         "plan::test_nothing_is_reduced_under_sequence_parallelism"),
    19: ("plan::test_an_ordered_transform_gets_its_routed_sum_reduced_before_it",
         "plan::test_a_commutative_transform_keeps_the_one_final_all_reduce"),
    20: ("runner::test_deferring_the_reduction_returns_a_true_partial",),
    21: ("runner::test_zero_experts_are_added_once_and_carry_s",),
    22: ("plan::test_a_shared_expert_in_a_slot_of_the_kernel_nets_to_the_weight_1",),
    23: ("statements::test_23_24_any_placement_gives_the_same_output",),
    24: ("statements::test_23_24_any_placement_gives_the_same_output",),
    25: ("exactly_once_on_grids::test_each_source_enters_each_rank_s_output_once_with_its_lawful_factor",),
    26: ("runner::test_gate_and_up_shard_together_in_both_layouts",),
    27: ("oracle::test_activations_have_the_values_of_their_definitions",
         "oracle::test_a_clamp_before_the_activation_bounds_its_argument_and_one_after_it_its_value"),
    28: ("runner::test_grouped_routing_with_all_biased_scores_below_minus_one_stays_legal",),
    29: ("runner::test_renormalising_a_sum_of_zero_stays_finite",),
    30: ("runner::test_exact_ties_give_distinct_experts_of_the_tied_set",),
    31: ("runner::test_a_row_of_nan_logits_leaves_other_rows_bit_equal",),
    32: ("plan::test_ids_reach_the_kernel_in_the_dtype_it_asks_for", "statements::test_32_router_weights_are_fp32"),
    33: ("statements::test_33_a_kernel_that_routes_by_itself_agrees_with_its_modular_twin",),
    36: ("oracle::test_a_weight_on_the_input_passes_through_the_activation_and_one_on_the_output_does_not",),
    38: ("runner::test_a_combination_that_would_compute_something_else_is_refused",),
    39: ("known::test_*", "bite/faults_on_grids::test_*"),
    40: ("statements::test_40_reruns_are_bit_equal_on_every_grid",),
}  # fmt: skip
# 37, hash routing without input ids, needs a router that no page has: CONTRIBUTING.md says so.
IMPOSSIBLE = (37,)


def functions_in(file: str) -> set[str]:
    folder, _, name = file.rpartition("/")
    tree = ast.parse((HERE / folder / f"test_{name}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_statement_has_a_test_that_exists():
    assert sorted(STATEMENTS.keys() | set(IMPOSSIBLE)) == [*range(1, 34), *range(36, 41)]
    for number, named in STATEMENTS.items():
        for each in named:
            file, _, test = each.partition("::")
            assert functions_in(file) if test == "test_*" else test in functions_in(file), f"statement {number}: {each}"


def ok(text: str) -> None:
    finding = check(parse(text), RUNNER)
    assert finding.verdict is Verdict.OK, (text, finding.diagnosis)


@pytest.mark.parametrize(
    "kernel", ["partial", "reduced", "deepep_ht", "deepep_ll", "nvlink_one_sided", "nvlink_two_sided"]
)
def test_11_junk_rows_reach_no_token_of_any_rank(kernel: str):
    ok(f"deepseek_v3@tp2.ep4.dp2.tokens5_0+kernel={kernel}.junk=3")


@pytest.mark.parametrize("order", ["auto", "1", "2", "3"])
@pytest.mark.parametrize("kernel", ["partial", "deepep_ht", "deepep_ll"])
def test_14_two_micro_batches_in_flight_do_not_exchange_s(kernel: str, order: str):
    ok(f"deepseek_v3@tp2.ep4.dp2.tokens9+kernel={kernel}.order={order}.batches=2")


@pytest.mark.parametrize("tokens", ["tokens0", "tokens1", "tokens3", "tokens9", "tokens0_3", "tokens1_8"])
@pytest.mark.parametrize("kernel", ["partial", "reduced", "deepep_ht", "nvlink_one_sided"])
def test_18_rows_split_over_tp_come_back_whole(kernel: str, tokens: str):
    grid = "tp4.ep8.dp2.sp4" if "_" in tokens else "tp4.ep4.sp4"
    ok(f"deepseek_v3@{grid}.{tokens}+kernel={kernel}")


@pytest.mark.parametrize("placement", ["linear", "round_robin", "replicas", "moved"])
@pytest.mark.parametrize("grid", ["tp4.ep4", "ep3.dp3", "tp4.ep2", "tp2.ep4.dp2"])
def test_23_24_any_placement_gives_the_same_output(grid: str, placement: str):
    ok(f"glm4_moe@{grid}.tokens33+placement={placement}")  # 10 experts: no grid here divides them evenly but tp4.ep2


def test_32_router_weights_are_fp32():
    for name in models.names():
        spec = models.load(name).twin
        routing = replace(spec.routing, correction_bias=False) if spec.routing.correction_bias else spec.routing
        scale = torch.ones(routing.num_experts) if routing.per_expert_scale else None
        weights_MK, ids_MK = make_router(routing, None, scale, 1.0).select_experts(
            torch.randn(3, routing.num_logits).bfloat16()
        )
        assert weights_MK.dtype is torch.float32, name
        assert ids_MK.dtype is torch.int64, name


@pytest.mark.parametrize("model", models.names())
@pytest.mark.parametrize("grid", ["tp2", "tp2.dp2", "tp4.ep4"])
def test_33_a_kernel_that_routes_by_itself_agrees_with_its_modular_twin(model: str, grid: str):
    ok(f"{model}@{grid}.tokens9+experts=monolithic")


@pytest.mark.parametrize(
    "text", ["tp4.ep2", "dp2", "tp2.ep4.dp2+kernel=deepep_ll", "tp4.ep4.sp4+kernel=nvlink_one_sided"]
)
def test_40_reruns_are_bit_equal_on_every_grid(text: str):
    case = parse(f"deepseek_v3@{text}")
    one, other = (run_system(case, RUNNER, problem(case)) for _ in range(2))
    for a, b in zip(one.ranks, other.ranks, strict=True):
        assert torch.equal(a.output, b.output)
