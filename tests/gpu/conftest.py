"""The device of these tests: a GPU, without which they are skipped.

``GPU_TESTS_ON=cpu`` runs those that can be on the CPU, to see that they are right before a GPU sees them.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    kind = os.environ.get("GPU_TESTS_ON", "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(kind)
