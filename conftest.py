"""Settings of every test: one torch thread, and how hard Hypothesis looks (HYPOTHESIS_PROFILE=nightly looks longer)."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("nightly", deadline=None, derandomize=False, max_examples=2000, print_blob=True)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
settings.load_profile(PROFILE)

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_report_header() -> str:
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}, "
        f"Hypothesis profile {PROFILE}"
    )


@pytest.fixture
def command(tmp_path: Path, pytestconfig: pytest.Config) -> Command:
    """Runs moe-harness with some arguments in a process of its own, in tmp_path; returns what it printed and its code."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath), "COLUMNS": "120"}
        return subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
