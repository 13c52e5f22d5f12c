"""The Diffusion-DPO trainer where the optimum of RLHF is known, see scripts/dpo_toy.py. Run with -m slow."""

import runpy
from pathlib import Path

import pytest

TOY = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "dpo_toy.py"))
train, EVEN = TOY["train"], TOY["EVEN"]
pytestmark = pytest.mark.slow


def test_the_original_reaches_the_optimum():
    outcome = train(EVEN, with_slope=True)
    assert outcome.stopped is None
    assert outcome.reward[-1] == pytest.approx(1, rel=0.05)
    assert outcome.variance[-1] == pytest.approx(1, rel=0.05)
    assert outcome.kl[-1] == pytest.approx(0.5, rel=0.1)


def test_swapped_labels_go_as_far_the_other_way():
    outcome = train(EVEN, swapped=True)
    assert outcome.reward[-1] == pytest.approx(-1, rel=0.05)
    assert outcome.kl[-1] == pytest.approx(0.5, rel=0.1)


def test_the_corrected_loss_without_a_kl_term_diverges_and_the_guard_stops_it():
    outcome = train(EVEN, with_slope=True, variant="corrected", kl_coef=0.0)
    assert len(outcome.reward) < 400
    assert outcome.stopped.startswith("the policy diverges: its error on the chosen pictures is")
    assert "raise kl_coef (2 beta or more)" in outcome.stopped


def test_the_corrected_loss_with_its_default_kl_term_comes_to_rest():
    outcome = train(EVEN, with_slope=True, variant="corrected")
    assert outcome.stopped is None
    assert outcome.reward[-1] == pytest.approx(0.181, rel=0.15)  # E(x_w - x_l) beta / (2 kl_coef)
    assert outcome.variance[-1] == pytest.approx(1, rel=0.1)
    assert outcome.kl[-1] < 0.05
    middle = len(outcome.reward) // 2
    assert abs(outcome.reward[-1] - outcome.reward[middle]) < 0.05
