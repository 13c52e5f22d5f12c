"""The toy of scripts/dpo_toy.py still trains with the package's trainer; where it gets to is a slow test."""

import runpy
from pathlib import Path

TOY = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "dpo_toy.py"))


def test_a_few_updates():
    outcome = TOY["train"](TOY["EVEN"], updates=4)
    assert outcome.stopped is None
    assert len(outcome.reward) == 5
    assert outcome.reward[0] == 0 < outcome.reward[-1]
