"""Diffusion-DPO where the optimum of RLHF is known, with the trainer itself; draws docs/images/dpo_toy.png.

    python scripts/dpo_toy.py

Data and reference N(0, 1), reward x_0, beta 1: the optimum is N(1, 1), with E r = 1 and a KL of 1/2. A chain of 25
steps whose reference is exact; the policy adds a shift (and a slope) to each step's mean, and what it attains follows
from a recursion, without sampling. Policy, schedule and pairs are this file's; loss, steps, noise, guard and optimizer
are the trainer's. A quarter of a minute per run.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from matplotlib.figure import Figure

import diffusion_align.diffusion.dpo as dpo
from diffusion_align.diffusion.sampler_settings import SamplerConfig
from diffusion_align.diffusion.schedule import DiffusionSchedule
from diffusion_align.diffusion.step import Step
from diffusion_align.errors import TrainingError
from diffusion_align.report import save_figure

F64 = torch.float64
T = 25
N_PAIRS = 2**17


class Chain:
    """The reverse of the noising process for data N(0, 1): x_s | x_t ~ N(sqrt(alpha) x_t, 1 - alpha), exactly."""

    def __init__(self, signal):
        ab_s, ab_t = signal[:-1].flip(0), signal[1:].flip(0)  # from noise to data
        alpha = ab_t / ab_s
        self.ab_s, self.var, self.gain = ab_s, 1 - alpha, alpha.sqrt()
        self.alpha_t = ab_t.sqrt()
        self.x_0_weight = ab_s.sqrt() * (1 - alpha) / (1 - ab_t)
        x_t_weight = alpha.sqrt() * (1 - ab_s) / (1 - ab_t)
        zeros = torch.zeros(T, dtype=F64)
        timestep = torch.arange(T)
        table = Step(timestep, self.alpha_t, (1 - ab_t).sqrt(), self.x_0_weight, zeros, x_t_weight, self.var.sqrt())
        self.schedule = DiffusionSchedule("sample", None, table)

    def attained(self, shift, slope):
        """(E r, variance of x_0, KL of the paths in nats), by recursion."""
        mean, var, kl = 0.0, 1.0, 0.0
        for t in range(T):
            kl += ((slope[t] * mean + shift[t]) ** 2 + slope[t] ** 2 * var) / (2 * self.var[t])
            gain = self.gain[t] + slope[t]
            mean, var = gain * mean + shift[t], gain**2 * var + self.var[t]
        return float(mean), float(var), float(kl)


class ToyPolicy:
    """Adds ``shift + slope x_t`` to the reference's mean of each step; what the UNet would say is x_0."""

    lora, image_size, latent_shape, device = None, (1, 1), (1, 1, 1), torch.device("cpu")
    has_reference, dropout, family = True, None, SimpleNamespace(guidance="free")

    def __init__(self, chain, with_slope):
        self.chain, self.pipeline = chain, SimpleNamespace(scheduler=None)
        self.change = torch.nn.Parameter(torch.zeros(T, 2))
        self.counts = torch.tensor([1.0, float(with_slope)])
        self.is_reference = False

    @property
    def trainable(self):
        return {"change": self.change}

    @contextlib.contextmanager
    def reference(self):
        self.is_reference = True
        yield
        self.is_reference = False

    def timesteps_setter(self, latent_size=None):
        return None

    def weights_cast_once(self):
        return contextlib.nullcontext()

    def return_text_encoders(self):
        pass

    @staticmethod
    def encode(prompts):
        return {"encoder_hidden_states": torch.zeros(len(prompts), 1)}

    def predict(self, x_t, timestep, conditioning, *, guidance_scale=None):
        alpha, weight = (c[timestep].float().view(-1, 1, 1, 1) for c in (self.chain.alpha_t, self.chain.x_0_weight))
        if self.is_reference:
            return alpha * x_t
        shift, slope = (self.change[timestep] * self.counts).view(-1, 2, 1, 1, 1).unbind(1)
        return alpha * x_t + (shift + slope * x_t) / weight


class ToyPairs:
    """Pairs of numbers, preferred by Bradley-Terry with reward x_0."""

    def __init__(self, swapped=False):
        stream = torch.Generator().manual_seed(1)
        x_0 = torch.randn(2, N_PAIRS, generator=stream)
        first_wins = torch.rand(N_PAIRS, generator=stream) < torch.sigmoid(x_0[0] - x_0[1])
        self.x_0 = torch.where(first_wins ^ swapped, x_0, x_0.flip(0)).view(2, N_PAIRS, 1, 1, 1)
        self.pairs, self.prompts, self.ties, self.skipped = self, [""] * N_PAIRS, 0, {}

    def __len__(self):
        return N_PAIRS

    def fill(self, identity, **options):
        pass

    def read(self, indices):
        return list(self.x_0[0, indices]), list(self.x_0[1, indices])

    def conditioning(self, indices, texts):
        return ToyPolicy.encode(texts)


@dataclass
class Outcome:
    """What a run attained, after every update: (U,) each; ``stopped`` is the guard's sentence."""

    reward: list[float]
    variance: list[float]
    kl: list[float]
    stopped: str | None


def train(
    signal: torch.Tensor, *, with_slope: bool = False, swapped: bool = False, updates: int = 400, **settings: Any
) -> Outcome:
    """Train on the toy with ``settings`` of DiffusionDPOConfig; ``signal`` is alphas_cumprod, from 1 (T + 1,)."""
    chain, pairs = Chain(signal), ToyPairs(swapped)
    policy = ToyPolicy(chain, with_slope)
    history: list[tuple[float, float, float]] = []

    class Trainer(dpo.DiffusionDPOTrainer):
        def collect(self) -> Any:
            change = policy.change.detach().double() * policy.counts
            history.append(chain.attained(*change.unbind(1)))
            return super().collect()

        def before_finish(self) -> None:  # there are no images
            pass

        def finish(self) -> None:
            pass

    stopped = None
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        for owner, name in ((dpo, "training_schedule"), (SamplerConfig, "schedule")):
            patches.enter_context(mock.patch.object(owner, name, return_value=chain.schedule))
        patches.enter_context(mock.patch.object(dpo, "LatentCache", return_value=pairs))
        config = dpo.DiffusionDPOConfig(
            **{
                "model": "emoji-sd",
                "pairs": "emoji_style",
                "output_dir": folder,
                "beta": 1.0,
                "weighting": "exact",
                "samples_per_epoch": 512,
                "sample_batch_size": 512,
                "steps_per_pair": 5,
                "micro_batch_size": 2560,
                "updates_per_epoch": 1,
                "epochs": updates,
                "checkpoint_every": updates,
                "learning_rate": 0.02,
                "lr_schedule": "linear",
                "weight_decay": 0.0,
                "max_grad_norm": float("inf"),
                "grid_every": 0,
            }
            | settings
        )
        try:
            Trainer(config, policy, pairs=pairs).train()  # type: ignore[arg-type]
        except TrainingError as error:
            stopped = str(error)
        change = policy.change.detach().double() * policy.counts
        history.append(chain.attained(*change.unbind(1)))
    reward, variance, kl = (list(column) for column in zip(*history, strict=True))
    return Outcome(reward, variance, kl, stopped)


EVEN = torch.linspace(1, 0, T + 1, dtype=F64)


def main() -> None:
    """Draw E r and KL of the runs that docs/mathematics/diffusion_dpo.md speaks of."""
    runs: dict[str, dict[str, Any]] = {
        "original": {},
        "corrected, λ = 2β": {"variant": "corrected"},
        "corrected, λ = β": {"variant": "corrected", "kl_coef": 1.0},
        "corrected, λ = 0: eq. 36 to the letter": {"variant": "corrected", "kl_coef": 0.0},
    }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, settings in runs.items():
        outcome = train(EVEN, with_slope=True, **settings)
        print(f"{name:42s} E r {outcome.reward[-1]:9.3f}  KL {outcome.kl[-1]:9.3f}  {outcome.stopped or ''}")
        (line,) = panels[0].plot(outcome.reward, label=name)
        panels[1].plot(outcome.kl, color=line.get_color())
        if outcome.stopped:
            for axes, values in zip(panels, (outcome.reward, outcome.kl)):
                axes.plot(len(values) - 1, values[-1], "x", color=line.get_color(), markersize=9, markeredgewidth=2)
    for axes, optimum, label in zip(panels, (1.0, 0.5), ("E r", "KL to the reference, nats")):
        axes.axhline(optimum, color="0.5", linestyle="--", linewidth=1)
        axes.set(xlabel="update", ylabel=label)
    panels[1].set(yscale="log", ylim=(1e-3, 10))
    panels[0].legend(frameon=False, fontsize=8)
    save_figure(figure, Path(__file__).parent.parent / "docs" / "images" / "dpo_toy.png")


if __name__ == "__main__":
    main()
