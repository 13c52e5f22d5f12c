"""Titles and units of metrics in plots."""

from __future__ import annotations

import re

_NAMES = {
    "reward": ("Reward", "mean reward"),
    "reward_std": ("Spread of the reward", "standard deviation"),
    "reward_stderr": ("Uncertainty of the mean reward", "standard error"),
    "frac_reward_zero_std": ("Groups with equal rewards", "fraction of groups"),
    "frac_without_reward": ("Completions without a reward", "fraction of completions"),
    "untrained_epochs": ("Epochs in a row without training", "epochs"),
    "ratio/rollout_deviation": ("Sampling against scoring", "max |ratio − 1|"),
    "gold": ("Held-out reward", "mean reward"),
    "gold_stderr": ("Uncertainty of the held-out reward", "standard error"),
    "diversity": ("Diversity of the evaluation images", "mean distance of two"),
    "kl": ("KL to the reference, per step", "nats"),
    "kl_path": ("KL to the reference, all trained steps", "nats"),
    "kl_path_stderr": ("Uncertainty of the trained steps' KL", "standard error"),
    "clip_ratio/region_mean": ("Clipped actions", "fraction"),
    "clip_ratio/low_mean": ("Clipped actions, ratio too low", "fraction"),
    "clip_ratio/high_mean": ("Clipped actions, ratio too high", "fraction"),
    "clip_nats": ("Clip range", "nats"),
    "kl_old": ("KL to the policy that sampled, per step", "nats"),
    "kl_old/max": ("KL to the policy that sampled, largest", "nats"),
    "kl_bound/dropped": ("Actions dropped by the KL bound", "fraction"),
    "ratio/mean": ("Importance ratio, mean", "ratio"),
    "ratio/min": ("Importance ratio, smallest", "ratio"),
    "ratio/max": ("Importance ratio, largest", "ratio"),
    "ratio/clamped": ("Log-ratios beyond the clamp", "fraction"),
    "ratio/first_pass_deviation": ("Ratio on the first pass", "max |ratio − 1|"),
    "grad_norm": ("Gradient norm", "L2 norm"),
    "learning_rate": ("Learning rate", "learning rate"),
    "loss": ("Loss", "loss"),
    "entropy": ("Entropy", "nats"),
    "samples_used": ("Samples trained on", "samples"),
    "pairs_used": ("Pairs trained on", "pairs"),
    "loss/preference": ("Preference loss", "loss"),
    "rewards/accuracies": ("Implicit accuracy", "fraction of pairs"),
    "rewards/margins": ("Implicit reward, chosen − rejected", "beta × nats"),
    "rewards/chosen": ("Implicit reward, chosen", "beta × nats"),
    "rewards/rejected": ("Implicit reward, rejected", "beta × nats"),
    "error/winner": ("Winner's error − the reference's", "nats"),
    "error/loser": ("Loser's error − the reference's", "nats"),
    "error/winner_ratio": ("Winner's error / the reference's", "ratio"),
    "kl/winner": ("KL to the reference at the winner, per step", "nats"),
    "kl/loser": ("KL to the reference at the loser, per step", "nats"),
    "weight": ("Weight of the corrected loss", "mean weight"),
    "beta_nats": ("Beta", "per nat"),
    "completions/mean_length": ("Length of the completions", "tokens"),
    "completions/min_length": ("Shortest completion", "tokens"),
    "completions/max_length": ("Longest completion", "tokens"),
    "completions/tokens": ("Tokens sampled", "tokens"),
    "completions/clipped_ratio": ("Completions without an end", "fraction"),
    "kl_coef": ("Price of the KL to the reference", "per nat"),
    "drift": ("Distance from the reference on the data", "nats per token"),
    "accuracy": ("Accuracy", "fraction of pairs"),
    "margin": ("Score, chosen − rejected", "score"),
    "scores/chosen": ("Score, chosen", "score"),
    "scores/rejected": ("Score, rejected", "score"),
    "eval/accuracy": ("Accuracy, held-out pairs", "fraction of pairs"),
    "eval/margin": ("Score, chosen − rejected, held-out pairs", "score"),
    "eval/preference": ("Preference loss, held-out pairs", "nats"),
    "loss/policy": ("Policy loss", "loss"),
    "loss/value": ("Value loss", "loss"),
    "loss/center": ("Centring loss", "score²"),
    "value/mean": ("Value, mean", "reward"),
    "returns/mean": ("Return, mean", "reward"),
}
_REWARD_COMPONENT = re.compile(r"rewards/(.+)/mean")
X_NAMES = {"step": "optimizer update", "epoch": "epoch"}


def describe(key: str) -> tuple[str, str]:
    """``(title, unit)`` of a metric, for an axis; an unknown key stands for itself."""
    if key in _NAMES:
        return _NAMES[key]
    if match := _REWARD_COMPONENT.fullmatch(key):
        return f"Reward: {match[1]}", "mean reward"
    if key.startswith("time/"):
        return f"Time: {key.removeprefix('time/')}", "seconds"
    return key, ""


def is_reward_component(key: str) -> bool:
    """Whether it is the mean of one of several rewards, ``rewards/<name>/mean``; not ``rewards/accuracies``."""
    return _REWARD_COMPONENT.fullmatch(key) is not None
