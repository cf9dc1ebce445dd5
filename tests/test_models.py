"""The model pages as data: complete, alike at every size, and readable without torch."""

from __future__ import annotations

import operator
import pkgutil
import subprocess
import sys
from dataclasses import replace

import pytest

from harness import models
from harness.errors import UsageError
from harness.models import Model
from reference.spec import Activation, Experts, MoESpec, Routing, weight_shapes

PAGES = [models.load(name) for name in models.names()]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.model_type)


def sizes(page: Model) -> dict[str, MoESpec]:
    return {name: spec for name in ("real", "twin", "wide") if (spec := getattr(page, name)) is not None}


def rules(spec: MoESpec) -> MoESpec:
    """The spec with every size, factor and limit put to the same value: what is left are the rules."""

    def routing(of: Routing) -> Routing:
        factor = None if of.routed_scaling_factor is None else 2.0
        groups = 1 if of.n_group == 1 else 4
        return replace(
            of, num_experts=16, top_k=min(of.top_k, 2), n_group=groups, topk_group=groups, routed_scaling_factor=factor
        )

    def activation(of: Activation) -> Activation:
        return of if of.limit is None else replace(of, limit=1.0)

    def experts(of: Experts) -> Experts:
        latent = None if of.latent_size is None else 1
        return replace(of, intermediate_size=1, latent_size=latent, activation=activation(of.activation))

    shared, vision = spec.shared, spec.vision
    return replace(
        spec,
        hidden_size=1,
        routing=routing(spec.routing),
        experts=experts(spec.experts),
        shared=shared and replace(shared, intermediate_size=1, activation=activation(shared.activation)),
        vision=vision and replace(vision, routing=routing(vision.routing), experts=experts(vision.experts)),
    )


def test_seventeen_families_are_in_the_main_job_and_nine_more_were_rewritten():
    reasons = [page.reason for page in PAGES]
    assert (reasons.count("evaluated"), reasons.count("ours"), reasons.count("rewritten")) == (16, 1, 9)


def test_each_file_is_the_page_of_the_model_type_it_is_named_by():
    files = [module.name for module in pkgutil.iter_modules(models.__path__)]
    assert files == [page.model_type for page in PAGES]


def test_listing_the_models_never_imports_torch():
    code = (
        "import sys; from harness import models; pages = [models.load(n) for n in models.names()]; "
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the listing imports {done.stderr}"


def test_an_unknown_model_is_answered_with_the_nearest_names():
    with pytest.raises(UsageError, match=r"unknown model 'deepseek_v4': nearest: deepseek_v[23]"):
        models.load("deepseek_v4")


@each_page
def test_each_page_says_where_its_figures_come_from_and_what_is_odd(page: Model):
    assert "/" in page.checkpoint
    assert page.figures
    assert page.notes
    for figure in page.figures:
        assert figure.what
        assert figure.source
        assert figure.confidence in ("high", "medium-high", "medium", "low")
    assert not any(note.endswith(".") for note in page.notes), "a note is a line of a list"


@each_page
def test_a_twin_is_small_and_tp_1_2_3_4_and_8_cut_each_of_its_widths(page: Model):
    twin = page.twin
    assert twin.routing.num_experts <= 16
    assert twin.hidden_size <= 72
    for name, width in twin.tp_widths().items():
        assert width % 24 == 0, f"{name}={width}"


@each_page
def test_a_twin_scales_by_a_factor_that_no_other_coefficient_resembles(page: Model):
    has_factor = page.real.routing.routed_scaling_factor is not None
    assert page.twin.routing.routed_scaling_factor in ((2.5, 2.4375) if has_factor else (None,))
    assert page.twin.routing.routed_scaling_factor is None or page.twin.scale != page.real.scale


@each_page
def test_all_sizes_of_a_model_follow_the_same_rules(page: Model):
    twin = page.twin
    if page.model_type == "nemotron_h":  # the twin adds biases that the released model could have; its page says why
        assert twin.experts.latent_bias
        assert twin.shared == replace(page.twin.shared, bias=True)
        twin = replace(twin, experts=replace(twin.experts, latent_bias=False), shared=replace(twin.shared, bias=False))
    assert rules(twin) == rules(page.real)
    if page.wide is not None:
        assert rules(page.wide) == rules(page.real)


@each_page
def test_a_twin_keeps_what_is_particular_about_the_sizes_of_the_real_layer(page: Model):
    real, twin = page.real, page.twin
    assert is_power_of_two(twin.routing.num_experts) == is_power_of_two(real.routing.num_experts)
    assert (twin.routing.top_k == 1) == (real.routing.top_k == 1)
    assert 1 < twin.routing.topk_group < twin.routing.n_group or real.routing.n_group == 1
    if real.shared is not None and twin.shared is not None:
        ratio = real.shared.intermediate_size / real.experts.intermediate_size
        assert twin.shared.intermediate_size == ratio * twin.experts.intermediate_size
    if real.vision is not None and twin.vision is not None:
        assert twin.vision.experts.intermediate_size < twin.experts.intermediate_size


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def test_some_twins_are_of_a_hidden_size_that_no_block_of_16_divides():
    assert {page.twin.hidden_size % 16 for page in PAGES} > {0}


def test_wide_twins_have_the_real_numbers_of_experts_and_picks():
    wide = {page.model_type: page for page in PAGES if page.wide is not None}
    assert wide.keys() == {"nemotron_h", "qwen3_next", "step3p5"}
    for page in wide.values():
        assert page.wide is not None
        assert page.wide.routing.num_experts == page.real.routing.num_experts > 256
        assert page.wide.routing.top_k == page.real.routing.top_k
        assert all(width % 2 == 0 for width in page.wide.tp_widths().values())


@each_page
def test_the_runner_scales_only_where_there_is_a_factor(page: Model):
    assert not page.apply_routed_scale_to_output or page.real.routing.routed_scaling_factor is not None


@each_page
def test_upstream_names_each_tensor_and_reads_fields_that_each_size_has(page: Model):
    upstream = page.upstream
    assert upstream is not None
    assert upstream.parameters.keys() == weight_shapes(page.twin).keys()
    for spec in sizes(page).values():
        for value in upstream.fields.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and item.startswith("="):
                    operator.attrgetter(item[1:])(spec)
