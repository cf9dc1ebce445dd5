"""What the README tells a newcomer to type works as pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from conftest import Command
from harness.cli import _parser

README = (Path(__file__).parents[2] / "README.md").read_text()
EXAMPLE = re.search(r"<!-- example: my_layer\.py -->\n```python\n(.*?)```", README, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"moe-harness ((?:check|models|explain|bench)[^`\n|]*)", README)))


def example() -> str:
    assert EXAMPLE, "the README has lost its example"
    return EXAMPLE[1]


def test_the_example_is_complete_in_at_most_25_lines():
    assert len(example().splitlines()) <= 25


def test_the_pasted_example_passes_and_without_its_all_reduce_the_cause_is_named(command: Command, tmp_path: Path):
    (tmp_path / "my_layer.py").write_text(example())
    right = command("check", "--system", "my_layer.py:build", "--model", "deepseek_v3", "--tp", "1,2,4")
    assert right.returncode == 0, right.stdout + right.stderr
    assert "39 cases, 39 findings: 39 ok, 0 mismatch" in right.stdout
    (tmp_path / "my_layer.py").write_text(example().replace("return comm.all_reduce(y)", "return y"))
    wrong = command("check", "--system", "my_layer.py:build", "--model", "deepseek_v3", "--tp", "2")
    assert wrong.returncode == 1
    assert "y = s*R_own + S_own instead of s*R + S" in wrong.stdout
    assert "nothing is reduced: each rank returns its own partial sum [B1]" in wrong.stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_parses_as_printed(line: str):
    placeholders = {"CASE": "mixtral", "...": "", "[NAME]": "", "[--system NAME]": "", "a,b": "mixtral,jamba"}
    words = [placeholders.get(word, word) for word in shlex.split(line.strip())]
    words = [word for word in shlex.split(" ".join(words).replace("[--system NAME]", "")) if word]
    _parser().parse_args(words)


def test_each_file_that_the_readme_links_to_exists():
    root = Path(__file__).parents[2]
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / link).exists(), link
