"""What ``diffusion-align estimators`` prints: two tables of the KL estimators, each with a line that says what of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from diffusion_align.report.estimator_gradients import ExpectedGradient, Softmax, expected_gradients
from diffusion_align.report.estimator_values import EstimatorError, Normal, estimator_errors

NEGLIGIBLE_KL = 1e-12  # nats: below it the rounding of a log-prob is no longer small beside the KL
SHOWN_ACTIONS = 4


def value_report(q: Normal, p: Normal, *, samples: int, seed: int) -> Iterator[str | Table]:
    """The estimators' values for samples from q; ``ValueError`` as ``estimator_errors``."""
    kl, rows = estimator_errors(q, p, samples=samples, seed=seed)
    yield (
        f"Values. The policy q is sampled, p is the reference; {samples:,} samples, seed {seed}.\n"
        f"  q has mean {q.mean:g}, std {q.std:g}; p has mean {p.mean:g}, std {p.std:g}; KL(q||p) = {kl:.7g} nats\n"
    )
    if kl <= NEGLIGIBLE_KL:
        yield "The KL is 0, or too small to divide by: bias and std are in nats.\n"
    yield value_table(kl, rows)
    if any(row.exact_log_std == math.inf for row in rows):
        yield "\ninfinite: p²/q has no integral; a sample mean of k3 is then mostly too low."


def gradient_report(example: Softmax) -> Iterator[str | Table]:
    """The expected gradients of a softmax policy, on-policy and off-policy."""
    yield f"Gradients. Softmax policy of {len(example.policy)} actions, exact by enumeration. Logits:"
    for name, logits in zip(("policy", "reference", "old policy"), example):
        more = " …" if len(logits) > SHOWN_ACTIONS else ""
        yield f"  {name:<12}" + " ".join(f"{_number(x):>7}" for x in logits[:SHOWN_ACTIONS]) + more
    yield "\nOn-policy: samples of the policy itself.\n"
    yield gradient_table(expected_gradients(example, off_policy=False))
    yield (
        "\nOff-policy: samples of the old policy. The penalty in the reward is frozen and\n"
        "weighed by pi/pi_old; with k1 that is grad KL(pi||ref) - grad KL(pi||old).\n"
    )
    yield gradient_table(expected_gradients(example, off_policy=True))


def value_table(kl: float, rows: Sequence[EstimatorError]) -> Table:
    """Bias and standard deviation of each estimator over the KL; in nats where there is next to no KL."""
    relative = kl > NEGLIGIBLE_KL
    scale, unit = (kl, "/KL") if relative else (1.0, "")
    shown = _number if relative else "{:.3g}".format
    table = _table("estimator", f"sampled bias{unit}", f"sampled std{unit}", f"exact bias{unit}", f"exact std{unit}")
    for row in rows:
        spread = _exponential(row.exact_log_std - math.log(scale)) if relative else shown(math.exp(row.exact_log_std))
        table.add_row(row.kind, *(shown(x / scale) for x in row[1:4]), spread)
    return table


def gradient_table(rows: Sequence[ExpectedGradient]) -> Table:
    """Every form's expected gradient beside the true one; of more than four actions the first four."""
    table = _table("form", "expected gradient in the logits", "cosine", "norm ratio")
    placement = ""
    for row in rows:
        if row.placement != placement:
            placement = row.placement
            table.add_row(placement)
        gradient = " ".join(f"{_number(x):>7}" for x in row.gradient[:SHOWN_ACTIONS])
        gradient += " …" if len(row.gradient) > SHOWN_ACTIONS else ""
        cosine = "none" if row.cosine is None else _number(row.cosine)
        table.add_row(f"  {row.form}", gradient, cosine, _number(row.norm_ratio))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(x: float) -> str:
    text = f"{x:.4f}" if abs(x) < 1e5 else f"{x:.3e}"
    return "0.0000" if text == "-0.0000" else text


def _exponential(log: float) -> str:
    """exp(log), also where that is beyond any float."""
    if log == math.inf:
        return "infinite"
    return _number(math.exp(log)) if log < 34 else f"10^{log / math.log(10):.5g}"
