"""The edits of edits.py can still be made: what they replace is there once, and what they put there is Python."""

from __future__ import annotations

import pytest

from harness.case import parse
from harness.systems.runner import RunnerSystem
from tests.bite.edits import EDITS, ROOT, Edit


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_each_edit_finds_its_line_once_and_leaves_a_file_that_compiles(edit: Edit):
    text = (ROOT / "harness" / "runner" / edit.file).read_text()
    assert text.count(edit.old) == 1
    compile(text.replace(edit.old, edit.new), edit.file, "exec")


def test_the_cases_that_edits_are_shown_in_are_cases_that_the_runner_has():
    for text in {argument for edit in EDITS for argument in edit.arguments}:
        assert RunnerSystem().supports(parse(text)) is None, text


def test_edits_have_names_of_their_own():
    assert len({edit.name for edit in EDITS}) == len(EDITS)
