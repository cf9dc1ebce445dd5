from __future__ import annotations

import pytest

from harness.finding import Verdict
from tests.bite.invented import FAULTS, finding


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_nobody_listed_is_found_by_many_tokens_and_by_seven(name: str):
    for tokens in (33, 7):
        assert finding(name, tokens).verdict is Verdict.MISMATCH
