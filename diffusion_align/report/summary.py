"""The run in one paragraph: what its metrics say from start to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_align.report.change import Change, change_of_epochs, change_of_updates, mean_of_tenth
from diffusion_align.report.metrics import (
    IMAGE_KL,
    Described,
    Row,
    numeric_keys,
    plus_minus,
    read_evaluation,
    series,
)
from diffusion_align.report.status import RunStatus


def summary(rows: Sequence[Row], described: Described = IMAGE_KL) -> str:
    """The run in one paragraph: reward or accuracy from start to end, cost, KL, largest ratio deviation.

    A text run says how long its completions were; one that logs neither rewards nor ratios says nothing of them.
    """
    if not rows:
        return "No metrics have been written yet."
    preference = _preference_sentences(rows)
    has_reward = len(series(rows, "reward", x="epoch")[0]) > 0
    has_ratio = len(series(rows, "ratio/first_pass_deviation")[0]) > 0
    samples = has_reward or any(key.startswith("ratio/") for key in numeric_keys(rows))
    compares = bool(preference) or not samples
    has_kl = len(series(rows, "kl")[0]) > 0
    sentences = [_reward_sentence(rows)] if has_reward or not compares else []
    sentences += preference + _completion_sentences(rows)
    if compares and not has_reward and (cost := _cost(rows)):
        sentences.append(f"The run took {cost}.")
    if has_kl or not compares:
        sentences.append(_kl_sentence(rows, described))
    if has_ratio:
        sentences.append(_ratio_sentence(rows))
    return " ".join(sentences)


def evaluation_sentences(rows: Sequence[Row], path: Path, status: RunStatus) -> list[str]:
    """The held-out reward at the start, at its best and at the end; and why the run stopped early, if it did and its
    status does not tell."""
    sentences = []
    epochs, rewards = series(rows, "gold", x="epoch")
    if len(rewards):
        best = rewards.argmax()
        sentences.append(
            f"The held-out reward was {rewards[0]:.4g} after epoch {epochs[0]:.0f}, {rewards[best]:.4g} at its best "
            f"after epoch {epochs[best]:.0f} and {rewards[-1]:.4g} after epoch {epochs[-1]:.0f}."
        )
    if (stopped := read_evaluation(path).get("stopped")) and status.state != "stopped":
        sentences.append(f"The run was stopped by a rule: {stopped}.")
    return sentences


def _reward_sentence(rows: Sequence[Row]) -> str:
    change, cost = change_of_epochs(rows, "reward"), _cost(rows)
    if change is None:
        return f"No reward was logged; the run took {cost}." if cost else "No reward was logged."
    first, last = _both(change)
    note = " (± 2 standard errors)" if "±" in first + last else ""
    if change.places[0] == change.places[1]:
        return f"The mean reward of the only epoch so far is {first}{note}" + (f", after {cost}." if cost else ".")
    sentence = f"The mean reward {_verb(change)} from {first} to {last}{note}"
    if math.isfinite(change.standard_errors):
        sentence += f", a change of {abs(change.standard_errors):.1f} standard errors"
    return f"{sentence}, over {cost}."


def _both(change: Change) -> tuple[str, str]:
    """Before and after, with two standard errors."""
    first, last = (plus_minus(one, 2 * error) for one, error in zip((change.before, change.after), change.errors))
    return first, last


def _verb(change: Change) -> str:
    return "rose" if change.after > change.before else "fell" if change.after < change.before else "went"


def _preference_sentences(rows: Sequence[Row]) -> list[str]:
    """Accuracy from the first to the last tenth of the updates; margin and errors in the last tenth."""
    name, key = "implicit accuracy", "rewards/accuracies"
    if not len(series(rows, key)[0]):
        name, key = "accuracy", "accuracy"
    change = change_of_updates(rows, key)
    if change is None:
        return []
    (first, last), count = _both(change), int(change.places[0])
    if count == 1:
        sentence = f"The {name} of the only update so far is {last}"
    else:
        part = "first tenth" if count >= 20 else "first"
        sentence = f"The {name} {_verb(change)} from {first} in the {part} of {count} updates to {last} in the last"
    note = "; ± 2 standard errors" if "±" in first + last else ""
    sentences = [f"{sentence} (chance is 0.5{note})."]
    phrases = {
        "rewards/margins": "the implicit reward margin was {}",
        "margin": "the chosen one scored {} more",
        "error/winner": "the winner's error minus the reference's was {} nats",
        "error/loser": "the loser's error minus the reference's was {} nats",
    }
    ends = {key: series(rows, key)[1] for key in phrases}
    found = [phrases[key].format(_last_tenth(values)) for key, values in ends.items() if len(values)]
    if found:
        sentences.append(f"There {_listed(found)}.")
    return sentences + _held_out_sentences(rows)


def _completion_sentences(rows: Sequence[Row]) -> list[str]:
    """How long the completions were in the first epoch and in the last, and how many were cut off."""
    _, lengths = series(rows, "completions/mean_length", x="epoch")
    _, clipped = series(rows, "completions/clipped_ratio", x="epoch")
    if not len(lengths):
        return []
    change = f"went from {lengths[0]:.3g} to {lengths[-1]:.3g}" if len(lengths) > 1 else f"was {lengths[0]:.3g}"
    cut = f"; the limit cut {100 * clipped[-1]:.3g} % of them off in the last epoch" if len(clipped) else ""
    return [f"The mean length of completions {change} tokens{cut}."]


def _held_out_sentences(rows: Sequence[Row]) -> list[str]:
    """The accuracy of a reward model on pairs it was not trained on."""
    _, accuracy = series(rows, "eval/accuracy", x="epoch")
    if not len(accuracy):
        return []
    last = f" and {accuracy[-1]:.3g} after the last" if len(accuracy) > 1 else ""
    return [f"On the held-out pairs it was {accuracy[0]:.3g} after the first epoch{last}."]


def _last_tenth(values: np.ndarray) -> str:
    mean, error = mean_of_tenth(values, first=False)
    return plus_minus(mean, 2 * error)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _cost(rows: Sequence[Row]) -> str:
    """Epochs, pairs or else samples, and minutes, as far as they were logged."""
    parts = []
    n_epochs = len({row["epoch"] for row in rows if row.get("epoch") and not _is_update(row)})
    if n_epochs:
        parts.append(_count(n_epochs, "epoch"))
    for noun in ("pair", "sample"):
        _, used = series(rows, f"{noun}s_used", x="epoch")
        if len(used):
            parts.append(f"{_count(int(used.sum()), noun)} trained on")
            break
    _, seconds = series(rows, "time/epoch", x="epoch")
    if len(seconds):
        parts.append(f"{seconds.sum() / 60:.1f} minutes")
    return _listed(parts)


def _is_update(row: Row) -> bool:
    return "loss" in row or "grad_norm" in row


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _kl_sentence(rows: Sequence[Row], described: Described) -> str:
    found, count = [], 0
    for key in ("kl", "kl_path"):
        with_key = [row for row in rows if key in row]
        last_epoch = [row for row in with_key if row.get("epoch") == with_key[-1].get("epoch")]
        _, values = series(last_epoch, key)
        if len(values):
            found.append(f"{values.mean():.3g} {described[key][1] if key in described else 'nats'}")
            count = len(values)
    if not found:
        return "KL to the reference was not logged."
    mean = "over its samples" if count == 1 else "over its updates"
    return f"In the last epoch the policy was {' and '.join(found)} away from the reference (KL, mean {mean})."


def _ratio_sentence(rows: Sequence[Row]) -> str:
    _, deviations = series(rows, "ratio/first_pass_deviation")
    largest = deviations.max()
    if largest == 0:
        return "On the first pass over its samples the importance ratio was exactly 1 everywhere."
    return f"On the first pass over its samples the importance ratio strayed from 1 by at most {largest:.2g}."
