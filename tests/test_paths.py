"""Parity with the released model, whichever way a step is computed: `make slow-parity`."""

import os
import subprocess
import sys

import pytest

from tests.conftest import PATHS, PATHS_VARIABLE
from tests.model_folder import REPOSITORY

SUITE = [
    "tests/model/test_parity.py",
    "tests/model/test_generation.py",
    "tests/model/test_checkpointing.py",
    "tests/quantization/test_linear.py",
    "tests/adapters",
    "tests/training/test_trajectories.py",
    "tests/training/test_batches.py",
    "tests/test_bare_clone.py",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PATHS))
def test_the_parity_suite_passes_however_a_step_is_computed(name):
    environment = {**os.environ, PATHS_VARIABLE: name}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITE]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    print(name, done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-5000:]
