"""`moe-harness models` and the help: they answer at once, and say of each model what it is."""

from __future__ import annotations

import json

from conftest import Command
from harness import models


def test_the_table_has_one_line_for_each_model_and_says_why_it_is_there(command: Command):
    done = command("models")
    header, *lines = done.stdout.splitlines()
    rows = [line.split() for line in lines[: len(models.names())]]
    assert header.split()[:6] == ["model", "listed", "H", "I", "E", "K"]
    assert sorted(row[0] for row in rows) == list(models.names())
    order = [("rewritten" in line) + ("our 17th" in line) * 0.5 for line in lines[: len(rows)]]
    assert order == sorted(order)
    assert lines[-1].startswith("26 models: 16 evaluated in PR #35949, 1 ours")
    assert (done.returncode, done.stderr) == (0, "")


def test_pages_of_named_models_come_in_full_and_in_the_order_asked_for(command: Command):
    done = command("models", "step3p5", "mixtral")
    step, mixtral = (done.stdout.index(f"{name}: ") for name in ("step3p5", "mixtral"))
    assert step < mixtral
    for part in ("real:", "twin:", "wide:", "note: ", "figures (", "confidence", "scale in the engine: ", "top_k="):
        assert part in done.stdout
    assert done.returncode == 0


def test_json_has_one_object_for_each_model_with_the_fields_of_its_page(command: Command):
    pages = [json.loads(line) for line in command("models", "--json").stdout.splitlines()]
    assert [page["model_type"] for page in pages] == list(models.names())
    for page in pages:
        real = models.load(page["model_type"]).real
        assert page["real"]["hidden_size"] == real.hidden_size
        assert page["real"]["routing"]["routed_scaling_factor"] == real.routing.routed_scaling_factor


def test_help_names_each_verb_and_each_option_of_check(command: Command):
    assert all(f" {verb} " in command("--help").stdout for verb in ("check", "models", "explain", "bench"))
    said = command("check", "--help").stdout
    for option in (
        "model",
        "tp",
        "ep",
        "dp",
        "sp",
        "dtype",
        "tokens",
        "seed",
        "system",
        "size",
        "scale",
        "json",
        "jobs",
    ):
        assert f"--{option}" in said
