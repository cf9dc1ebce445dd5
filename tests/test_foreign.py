"""Anybody's own layer: found without importing, imported once, and blamed with the line of its own code."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from harness.case import OPTIONS, Grid, parse
from harness.comm.simulated import run_ranks
from harness.errors import CouldNotRun, UsageError
from harness.systems import OUR_OPTIONS, foreign
from harness.systems.foreign import ForeignSystem

CASE = parse("mixtral")
GOOD = "def build(spec, weights, comm):\n    return lambda hidden_states: hidden_states\n"


@pytest.fixture(autouse=True)
def _keep_sys_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def layer(folder: Path, source: str, name: str = "layer.py") -> str:
    (folder / name).write_text(textwrap.dedent(source))
    return f"{folder / name}:build"


def refusal(system: ForeignSystem) -> str:
    with pytest.raises(CouldNotRun) as caught:
        system.build(CASE, {}, None)
    return str(caught.value)


# ---- without importing


@pytest.mark.parametrize("target", ["x.py", "x.py:", ":build", "x.py:build()", "a.b:c.d", "a b:build"])
def test_a_target_of_another_form_is_refused_with_the_form(target):
    with pytest.raises(UsageError, match=r"Type .*package\.module:build"):
        ForeignSystem(target)


def test_a_missing_file_is_refused_with_the_nearest_files(tmp_path):
    for name in ("my_layer.py", "other.py", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError) as caught:
        ForeignSystem(f"{tmp_path}/my_layr.py:build")
    assert str(caught.value) == (
        f"system '{tmp_path}/my_layr.py:build': {tmp_path}/my_layr.py does not exist. Type {tmp_path}/my_layer.py:build"
    )


def test_a_missing_folder_and_an_empty_one_and_a_folder_are_told_apart(tmp_path):
    for where, text in {"no/x.py": "there is no folder", "x.py": "has no .py file", ".": "is a folder"}.items():
        with pytest.raises(UsageError, match=text):
            ForeignSystem(f"{tmp_path}/{where}:build")


def test_a_package_that_is_not_installed_is_refused_by_name():
    with pytest.raises(UsageError, match="no package 'surely_not_there' is installed"):
        ForeignSystem("surely_not_there.sub:build")


def test_making_a_system_imports_neither_the_file_nor_torch(tmp_path):
    target = layer(tmp_path, "raise SystemExit('imported')\ndef build(spec, weights, comm): ...")
    code = f"import sys; from harness.systems import check_name; check_name({target!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- what a module offers


def test_build_receives_spec_weights_and_communicator_and_runs_on_ranks(tmp_path):
    source = """
        from dataclasses import dataclass
        @dataclass
        class Forward:
            comm: object
            scale: float
            def __call__(self, hidden_states):
                return self.comm.all_reduce(hidden_states * self.scale)
        def build(spec, weights, comm):
            return Forward(comm, weights["scale"] * spec.hidden_size)
    """
    system = ForeignSystem(layer(tmp_path, source))
    body = lambda comm: system.build(CASE, {"scale": 2.0}, comm)(1.0 + comm_tensor())  # noqa: E731
    results = run_ranks(Grid(tp=2), body, threads=True).unwrap()
    assert [result.item() for result in results] == [4.0 * CASE.spec.hidden_size] * 2


def test_a_layer_finds_its_groups_on_a_grid_and_talks_over_each(tmp_path):
    source = """
        def build(spec, weights, comm):
            assert comm.tp.size == 2 and comm.ep.size == 4 and comm.dp.size == 2
            return lambda x: [group.all_gather(x + comm.rank).tolist() for group in (comm.tp, comm.ep, comm.dp)]
    """
    system = ForeignSystem(layer(tmp_path, source))
    body = lambda comm: system.build(CASE, {}, comm)(comm_tensor())  # noqa: E731
    results = run_ranks(Grid(tp=2, ep=4, dp=2), body, threads=True).unwrap()
    assert results[2] == [[2.0, 3.0], [0.0, 1.0, 2.0, 3.0], [0.0, 2.0]]


@pytest.mark.parametrize("option", OUR_OPTIONS)
def test_an_option_of_our_own_systems_is_not_applicable_to_a_layer_from_outside(tmp_path, option):
    case = replace(parse("deepseek_v3@tp2.ep2"), **{option: OPTIONS[option][0][-1]})
    expected = f"a layer from outside has no {option}={OPTIONS[option][0][-1]}"
    assert ForeignSystem(layer(tmp_path, GOOD)).supports(case) == expected


def comm_tensor():
    import torch

    return torch.zeros(1)


def test_supports_is_asked_where_a_module_has_it(tmp_path):
    assert ForeignSystem(layer(tmp_path, GOOD)).supports(CASE) is None
    source = GOOD + "def supports(case):\n    return None if case.grid.tp == 1 else f'not tp={case.grid.tp}'\n"
    system = ForeignSystem(layer(tmp_path, source, "other.py"))
    assert system.supports(CASE) is None
    assert system.supports(parse("mixtral@tp2")) == "not tp=2"


def test_supports_that_answers_something_else_could_not_run(tmp_path):
    system = ForeignSystem(layer(tmp_path, GOOD + "supports = lambda case: True\n"))
    with pytest.raises(CouldNotRun, match="returned True, expected None or the reason as text"):
        system.supports(CASE)


def test_precision_is_that_of_the_models_page(tmp_path):
    system = ForeignSystem(layer(tmp_path, GOOD))
    assert system.precision(CASE.spec) == CASE.spec.routing.precision
    assert (system.name, system.foreign) == (f"{tmp_path}/layer.py:build", True)


def test_the_file_is_imported_once_for_all_cases(tmp_path):
    count = tmp_path / "count"
    system = ForeignSystem(layer(tmp_path, f"open({str(count)!r}, 'a').write('x')\n" + GOOD))
    for _ in range(3):
        system.load()
        system.build(CASE, {}, None)
    assert count.read_text() == "x"


def test_files_beside_the_layer_can_be_imported_now_and_later(tmp_path):
    (tmp_path / "beside_now.py").write_text("value = 1\n")
    (tmp_path / "beside_later.py").write_text("value = 2\n")
    source = """
        from beside_now import value
        def build(spec, weights, comm):
            from beside_later import value as later
            return lambda x: (value, later)
    """
    assert ForeignSystem(layer(tmp_path, source)).build(CASE, {}, None)(0) == (1, 2)
    assert sys.path[0] != str(tmp_path)  # a random.py beside the layer must not become everybody's random


def test_two_versions_of_a_layer_each_get_their_own_neighbours(tmp_path):
    source = "import kernels_of_mine\ndef build(spec, weights, comm):\n    return lambda x: kernels_of_mine.version\n"
    layers = []
    for version in ("old", "new"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "kernels_of_mine.py").write_text(f"version = {version!r}\n")
        layers.append(ForeignSystem(layer(tmp_path / version, source)).build(CASE, {}, None))
    assert [forward(0) for forward in layers] == ["old", "new"]


def test_a_file_named_like_a_library_does_not_replace_it(tmp_path):
    source = "import torch\ndef build(spec, weights, comm):\n    return torch.relu\n"
    import torch

    assert ForeignSystem(layer(tmp_path, source, "torch_like.py")).build(CASE, {}, None) is torch.relu
    assert ForeignSystem(layer(tmp_path, GOOD, "json.py")).build(CASE, {}, None)(5) == 5
    assert hasattr(__import__("json"), "dumps")


def test_a_module_in_the_current_folder_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "pack_of_mine").mkdir()
    (tmp_path / "pack_of_mine" / "__init__.py").touch()
    layer(tmp_path / "pack_of_mine", GOOD)
    monkeypatch.chdir(tmp_path)
    assert ForeignSystem("pack_of_mine.layer:build").build(CASE, {}, None)(5) == 5
    assert "No module named 'pack_of_mine.nothing'" in refusal(ForeignSystem("pack_of_mine.nothing:build"))


def test_an_installed_plugin_is_found_by_its_entry_points_name(tmp_path, monkeypatch):
    folder = tmp_path / "plug-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[moe_harness.systems]\nplug = plug_of_mine:make\n")
    (tmp_path / "plug_of_mine.py").write_text(GOOD.replace("build", "make"))
    monkeypatch.syspath_prepend(tmp_path)
    system = foreign.installed("plug")
    assert system is not None
    assert system.name == "plug"
    assert system.build(CASE, {}, None)(5) == 5
    assert foreign.installed("plugg") is None
    assert foreign.installed_names() == ["plug"]


# ---- blame


def test_an_error_while_importing_names_type_message_and_line(tmp_path):
    text = refusal(ForeignSystem(layer(tmp_path, "import os\n\nimport surely_not_there\ndef build(a, b, c): ...\n")))
    assert text == (
        f"{tmp_path}/layer.py:build: importing it raised ModuleNotFoundError: "
        f"No module named 'surely_not_there' ({tmp_path}/layer.py:3)"
    )


def test_an_import_that_failed_is_not_tried_again(tmp_path):
    count = tmp_path / "count"
    system = ForeignSystem(layer(tmp_path, f"open({str(count)!r}, 'a').write('x')\n1 / 0\nbuild = print\n"))
    assert refusal(system) == refusal(system)
    assert count.read_text() == "x"


def test_a_syntax_error_and_an_exit_at_import_could_not_run(tmp_path):
    assert f"({tmp_path}/a.py:2)" in refusal(ForeignSystem(layer(tmp_path, "x = 1\ndef build(:\n", "a.py")))
    assert f"SystemExit: 3 ({tmp_path}/b.py:2)" in refusal(
        ForeignSystem(layer(tmp_path, "import sys\nsys.exit(3)\nbuild = print\n", "b.py"))
    )


def test_an_error_in_build_names_the_line_of_the_layer_not_of_torch(tmp_path):
    source = """
        import torch
        def shard(weights):
            return torch.stack([torch.zeros(1), torch.zeros(2)])
        def build(spec, weights, comm):
            return shard(weights)
    """
    text = refusal(ForeignSystem(layer(tmp_path, source)))
    assert "build(spec, weights, comm) raised RuntimeError: stack expects each tensor to be equal size" in text
    assert text.endswith(f"({tmp_path}/layer.py:4)")


def test_a_build_with_other_parameters_is_named_by_its_definition(tmp_path):
    text = refusal(ForeignSystem(layer(tmp_path, "\ndef build(config):\n    return 1\n")))
    assert "takes 1 positional argument but 3 were given" in text
    assert text.endswith(f"({tmp_path}/layer.py:2)")


def test_a_missing_function_is_answered_with_those_that_the_file_has(tmp_path):
    source = "from os.path import join\nLIMIT = 3\ndef make_layer(a, b, c): ...\nclass Block: ...\n"
    with pytest.raises(UsageError) as refused:
        ForeignSystem(layer(tmp_path, source))
    where = f"{tmp_path}/layer.py"
    assert str(refused.value) == (
        f"system '{where}:build': no build in {where}. Functions that it has: make_layer, Block. Type {where}:make_layer"
    )


@pytest.mark.parametrize(
    "source",
    [
        "from elsewhere import build",
        "from elsewhere import *",
        "try:\n    from elsewhere import build\nexcept ImportError:\n    build = None",
        "build = make()",
        "if True:\n    def build(spec, weights, comm): ...",
        "def __getattr__(name): ...",
        "this is no Python",
    ],
)
def test_a_function_that_only_importing_can_tell_is_not_refused_before(tmp_path, source):
    ForeignSystem(layer(tmp_path, source))


def test_a_function_deleted_at_import_is_answered_with_those_left(tmp_path):
    source = "def build(a, b, c): ...\ndef make_layer(a, b, c): ...\ndel build\n"
    assert "no build in" in refusal(ForeignSystem(layer(tmp_path, source)))


def test_what_is_no_function_is_named_by_its_type(tmp_path):
    assert "build is an int, expected a function" in refusal(ForeignSystem(layer(tmp_path, "build = 3\n", "a.py")))
    for returned, kind in {"None": "None", "{}": "a dict", "1": "an int"}.items():
        source = f"def build(spec, weights, comm):\n    return {returned}\n"
        text = refusal(ForeignSystem(layer(tmp_path, source, f"r{kind[-1]}.py")))
        assert f"build returned {kind}, expected a function forward(hidden_states)" in text
