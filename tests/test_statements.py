"""What a reimplementation of the refactored runner has to do, statement by statement, and the tests that state it.

The numbers are those of the project's list of forty; 34 and 35 are about the kernels' alignment arrays and roundings.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from harness import models
from harness.case import parse
from harness.execution import run_system
from harness.problem import problem
from tests.statements.layers import RUNNER, ok

HERE = Path(__file__).parent

# number -> file::test, where the file is tests/test_FILE.py or tests/FOLDER/test_FILE.py
STATEMENTS: dict[int, tuple[str, ...]] = {
    1: ("scaling_exactly_once::test_s_enters_the_routed_part_once_and_the_shared_part_never",
        "scaling_exactly_once::test_the_fit_sees_a_factor_that_is_not_lawful"),
    2: ("plan::test_exactly_the_actor_of_table_a_scales",
        "statements/output::test_2_fp16_with_s_at_the_output_returns_r_plus_shared_over_s_and_says_so"),
    3: ("plan::test_only_the_routers_of_table_a_fold_s_into_their_weights",
        "plan::test_a_layer_hands_s_to_one_actor_and_1_to_the_others",
        "scaling_exactly_once::test_whoever_scales_the_output_is_the_same_up_to_rounding"),
    4: ("plan::test_a_factor_of_one_is_multiplied_by_nobody",
        "statements/output::test_4_a_factor_of_one_issues_no_multiplication"),
    5: ("runner::test_a_biased_latent_projection_adds_its_bias_once_and_unscaled",
        "scaling_exactly_once::test_s_enters_the_routed_part_once_and_the_shared_part_never"),
    6: ("runner::test_a_kernel_swapped_between_two_calls_changes_the_collectives",
        "plan::test_the_reduced_flag_is_asked_of_the_kernel_that_is_there_at_the_call"),
    7: ("plan::test_the_final_all_reduce_is_made_in_the_cells_of_table_d",
        "plan::test_shared_experts_are_reduced_in_the_rows_of_table_c",
        "ledger::test_every_rank_makes_the_collectives_of_the_table_and_no_other"),
    8: ("plan::test_no_plan_names_ep_or_dp_beyond_the_kernel_s_own_collectives",
        "ledger::test_no_collective_over_ep_or_dp_reduces_anything_but_the_kernel_s_own_combine",
        "statements/output::test_8_no_tensor_is_all_reduced_twice"),
    9: ("runner::test_the_result_has_width_h_whatever_the_kernel_s_width",
        "statements/output::test_9_a_latent_layer_returns_width_h_with_and_without_shared_experts"),
    10: ("plan::test_padding_is_cut_before_the_sum_only_where_table_e_says",
         "plan::test_a_layer_pads_from_the_width_its_experts_work_in",
         "ledger::test_each_collective_takes_the_tensor_that_the_tables_name"),
    11: ("runner::test_junk_that_the_kernel_leaves_in_padded_columns_does_not_leak",
         "runner::test_id_minus_one_contributes_nothing_even_next_to_nan_rows",
         "statements::test_11_junk_rows_reach_no_token_of_any_rank"),
    12: ("runner::test_shared_experts_run_once_a_call_on_the_untransformed_input",
         "statements/output::test_12_shared_experts_run_once_on_rows_that_were_neither_transformed_nor_dispatched"),
    13: ("runner::test_a_kernel_that_overwrites_its_input_cannot_change_s",
         "statements/output::test_13_a_kernel_that_overwrites_what_it_is_given_changes_neither_shared_experts_nor_input"),
    14: ("runner::test_each_micro_batch_has_its_own_place_for_s",
         "statements::test_14_two_micro_batches_in_flight_do_not_exchange_s"),
    15: ("runner::test_shared_experts_that_reduce_themselves_are_detected",
         "statements/output::test_15_a_shared_module_that_reduces_itself_over_any_group_is_refused"),
    16: ("plan::test_a_layer_decides_by_the_sizes_of_its_grid",
         "comm::test_the_ranks_of_an_ep_group_hold_every_expert_once"),
    17: ("ledger::test_every_rank_makes_the_collectives_of_the_table_and_no_other",
         "reduction_exactly_once::test_each_rank_s_part_enters_each_rank_s_output_once"),
    18: ("statements::test_18_rows_split_over_tp_come_back_whole",
         "plan::test_nothing_is_reduced_under_sequence_parallelism"),
    19: ("plan::test_an_ordered_transform_gets_its_routed_sum_reduced_before_it",
         "plan::test_a_commutative_transform_keeps_the_one_final_all_reduce",
         "statements/output::test_19_a_commutative_transform_gives_the_same_reduced_first_or_last"),
    20: ("runner::test_deferring_the_reduction_returns_a_true_partial",
         "statements/output::test_20_a_deferred_reduction_returns_a_true_partial_on_grids",
         "statements/output::test_20_the_caller_completes_a_deferred_reduction_over_tp_alone"),
    21: ("runner::test_zero_experts_are_added_once_and_carry_s",
         "statements/output::test_21_zero_experts_count_once_times_s_on_every_grid",
         "statements/output::test_21_zero_experts_are_neither_sent_nor_reduced",
         "statements/output::test_21_zero_experts_take_any_width_and_no_flag"),
    22: ("plan::test_a_shared_expert_in_a_slot_of_the_kernel_nets_to_the_weight_1",
         "statements/output::test_22_fused_shared_slots_net_to_the_weight_1_whoever_scales"),
    23: ("statements/experts::test_23_any_table_of_replicas_with_equal_weights_leaves_the_output_unchanged",
         "statements/experts::test_23_an_id_that_is_no_expert_becomes_minus_one",
         "statements::test_23_24_any_placement_gives_the_same_output"),
    24: ("statements/experts::test_24_linear_and_round_robin_placement_agree_where_experts_do_not_divide",
         "statements::test_23_24_any_placement_gives_the_same_output"),
    25: ("statements/experts::test_25_the_bias_of_w2_enters_once_times_its_router_weight",
         "reduction_exactly_once::test_each_rank_s_part_enters_each_rank_s_output_once"),
    26: ("runner::test_gate_and_up_shard_together_in_both_layouts",
         "statements/experts::test_26_interleaved_and_halved_gate_and_up_rows_are_cut_by_pairs"),
    27: ("oracle::test_activations_have_the_values_of_their_definitions",
         "oracle::test_a_clamp_before_the_activation_bounds_its_argument_and_one_after_it_its_value",
         "statements/experts::test_27_each_activation_has_its_formula_at_and_beyond_its_clamp",
         "statements/experts::test_27_a_clamp_bounds_the_gate_from_above_alone_and_the_other_half_on_both_sides",
         "statements/experts::test_27_a_whole_layer_with_each_activation_keeps_the_law_beyond_the_clamp"),
    28: ("runner::test_grouped_routing_with_all_biased_scores_below_minus_one_stays_legal",
         "statements/routers::test_28_negative_biased_scores_choose_the_same_experts_as_positive_ones",
         "statements/routers::test_28_experts_of_dropped_groups_are_never_chosen_however_negative_the_others"),
    29: ("runner::test_renormalising_a_sum_of_zero_stays_finite",
         "statements/routers::test_29_renormalising_a_sum_of_zero_stays_finite"),
    30: ("runner::test_exact_ties_give_distinct_experts_of_the_tied_set",
         "statements/routers::test_30_ties_give_distinct_experts_of_the_tied_set",
         "statements/routers::test_30_tied_groups_give_experts_of_as_many_groups_as_are_kept"),
    31: ("runner::test_a_row_of_nan_logits_leaves_other_rows_bit_equal",
         "statements/routers::test_31_logits_that_are_no_numbers_give_legal_ids_and_leave_other_rows_bit_equal"),
    32: ("plan::test_ids_reach_the_kernel_in_the_dtype_it_asks_for",
         "statements/routers::test_32_router_weights_are_fp32_whatever_the_logits_are"),
    33: ("statements::test_33_a_kernel_that_routes_by_itself_agrees_with_its_modular_twin",
         "statements/experts::test_33_monolithic_and_modular_twins_agree_for_the_same_rule_and_s"),
    36: ("oracle::test_a_weight_on_the_input_passes_through_the_activation_and_one_on_the_output_does_not",
         "statements/experts::test_36_a_weight_on_the_input_equals_one_on_the_output_only_through_a_linear_map",
         "statements/experts::test_36_a_weight_on_the_input_of_more_than_one_expert_is_refused"),
    38: ("runner::test_a_combination_that_would_compute_something_else_is_refused",
         "statements/refusals::test_38_a_combination_that_would_compute_something_else_is_refused_when_it_is_built",
         "statements/refusals::test_38_what_is_nearest_to_each_refused_layer_can_be_built"),
    39: ("statements/defects::test_39_each_defect_is_found_when_it_is_planted",
         "statements/defects::test_39_every_defect_of_the_list_is_planted",
         "statements/defects::test_39_a_sum_in_another_order_each_time_shows_in_the_bits_of_a_second_run"),
    40: ("statements::test_40_reruns_are_bit_equal_on_every_grid",
         "reduction_exactly_once::test_ranks_with_the_same_tokens_return_the_same_bits_and_so_does_a_second_run"),
}  # fmt: skip
# 37, hash routing without input ids, needs a router that no page has: CONTRIBUTING.md says so.
IMPOSSIBLE = (37,)


def functions_in(file: str) -> set[str]:
    folder, _, name = file.rpartition("/")
    tree = ast.parse((HERE / folder / f"test_{name}.py").read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_statement_has_a_test_that_exists():
    assert not STATEMENTS.keys() & set(IMPOSSIBLE)
    assert sorted(STATEMENTS.keys() | set(IMPOSSIBLE)) == [*range(1, 34), *range(36, 41)]
    for number, named in STATEMENTS.items():
        assert named, number
        for each in named:
            file, _, test = each.partition("::")
            assert test in functions_in(file), f"statement {number}: {each}"


def test_every_test_that_bears_a_statement_s_number_is_listed_there():
    files = ["statements", *(f"statements/{path.stem[5:]}" for path in (HERE / "statements").glob("test_*.py"))]
    for file in files:
        for test in functions_in(file):
            for number in map(int, re.findall(r"(?<=_)\d+(?=_)", re.match(r"test((_\d+)*_)", test)[1])):  # type: ignore[index]
                assert f"{file}::{test}" in STATEMENTS[number], f"{file}::{test}"


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
