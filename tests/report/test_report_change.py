"""What a run changed, in standard errors: one line, which says what is compared."""

import math

import pytest

from diffusion_align.report.change import change_of_epochs, change_of_updates, result_line

REWARDS = [
    {"step": 2, "epoch": 1, "reward": -0.5, "reward_stderr": 0.3},
    {"step": 4, "epoch": 2, "reward": 9.0, "reward_stderr": 0.1},
    {"step": 6, "epoch": 3, "reward": 1.5, "reward_stderr": 0.4},
]
HELD_OUT = [
    {"step": 0, "epoch": 0, "gold": 0.25, "gold_stderr": 0.03},
    {"step": 6, "epoch": 3, "gold": 0.05, "gold_stderr": 0.04},
]


def test_the_difference_is_in_standard_errors_of_independent_means():
    change = change_of_epochs(REWARDS, "reward")
    assert (change.before, change.after, change.places) == (-0.5, 1.5, (1, 3))
    assert change.standard_errors == pytest.approx(2 / math.hypot(0.3, 0.4))
    assert change_of_epochs(REWARDS, "gold") is None


def test_the_updates_of_the_first_and_the_last_tenth():
    rows = [{"step": i, "accuracy": i / 100} for i in range(100)]
    change = change_of_updates(rows, "accuracy")
    error = math.sqrt(sum((i - 4.5) ** 2 for i in range(10)) / 9 / 10) / 100
    assert (change.before, change.after) == (pytest.approx(0.045), pytest.approx(0.945))
    assert change.errors == (pytest.approx(error), pytest.approx(error))
    assert change.standard_errors == pytest.approx(0.9 / (error * math.sqrt(2)))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (REWARDS, "reward -0.50 ± 0.30 → 1.50 ± 0.40, +4.0 standard errors (samples trained on in epochs 1 and 3)"),
        (
            REWARDS + HELD_OUT,
            "held-out reward 0.250 ± 0.030 → 0.050 ± 0.040, -4.0 standard errors (after epochs 0 and 3)",
        ),
        (REWARDS[:1] + HELD_OUT[:1], None),
        (
            [{"epoch": 1, "reward": 1}, {"epoch": 2, "reward": 2.5}],
            "reward 1 → 2.5 (samples trained on in epochs 1 and 2)",
        ),
        (
            [{"step": i, "rewards/accuracies": 0.5 + i / 10} for i in range(4)],
            "implicit accuracy 0.5 → 0.8 (the first and the last of 4 updates)",
        ),
        (
            [{"step": i, "accuracy": 0.5 + i / 100} for i in range(20)],
            "accuracy 0.505 → 0.685 (the first and the last tenth of 20 updates)",
        ),
        ([{"step": 1, "accuracy": 0.5}], None),
        ([], None),
    ],
)
def test_a_result_says_what_is_compared(rows, line):
    assert result_line(rows) == line
