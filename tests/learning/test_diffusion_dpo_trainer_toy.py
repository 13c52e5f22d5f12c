"""The Diffusion-DPO trainer itself, run where the optimum of RLHF is known: linear, Gaussian, one-dimensional.

The toy of test_diffusion_dpo_toy.py as a policy, a schedule and a set of pairs; everything else, loss, steps, noise,
guard and optimizer, is the trainer's. Run with -m slow.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import diffusion_align.diffusion.dpo as dpo
from diffusion_align.diffusion.schedule import DiffusionSchedule, Step
from diffusion_align.report import read_metrics

pytestmark = pytest.mark.slow
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
        self.schedule = DiffusionSchedule("ddpm", "sample", 1.0, None, table)

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

    def encode(self, prompts):
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

    def fill(self, trainer):
        pass

    def read(self, indices):
        return self.x_0[0, indices], self.x_0[1, indices]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train(chain, **settings)``: what is attained, and the metrics."""

    def run(chain, *, with_slope=False, updates=400, swapped=False, **settings):
        monkeypatch.setattr(dpo, "training_schedule", lambda _: chain.schedule)
        monkeypatch.setattr(dpo, "build_schedule", lambda *_, **__: chain.schedule)
        monkeypatch.setattr(dpo.DiffusionDPOTrainer, "finish", lambda _: None)
        pairs = ToyPairs(swapped)
        monkeypatch.setattr(dpo, "LatentCache", lambda *_: pairs)
        n = 2048
        config = dpo.DiffusionDPOConfig(
            **{
                "model": "toy",
                "pairs": "emoji_style",
                "output_dir": tmp_path / "run",
                "beta": 1.0,
                "weighting": "exact",
                "samples_per_epoch": n,
                "sample_batch_size": n,
                "micro_batch_size": n,
                "updates_per_epoch": 1,
                "epochs": updates,
                "checkpoint_every": updates,
                "learning_rate": 0.02,
                "lr_schedule": "linear",
                "weight_decay": 0,
                "max_grad_norm": float("inf"),
                "grid_every": 0,
            }
            | settings
        )
        policy = ToyPolicy(chain, with_slope)
        try:
            dpo.DiffusionDPOTrainer(config, policy, pairs=pairs.pairs).train()
        finally:
            change = policy.change.detach().double() * policy.counts
            outcome = chain.attained(*change.unbind(1))
        return *outcome, read_metrics(tmp_path / "run" / "metrics.jsonl")

    return run


@pytest.fixture(scope="module")
def even():
    return Chain(torch.linspace(1, 0, T + 1, dtype=F64))


def test_the_original_reaches_the_optimum(train, even):
    reward, var, kl, rows = train(even, with_slope=True)
    assert reward == pytest.approx(1, rel=0.05)
    assert var == pytest.approx(1, rel=0.05)
    assert kl == pytest.approx(0.5, rel=0.1)
    last = [row for row in rows if "loss" in row][-20:]
    assert sum(row["kl_path"] for row in last) / 20 == pytest.approx(kl, rel=0.2)


def test_swapped_labels_go_as_far_the_other_way(train, even):
    reward, _, kl, _ = train(even, swapped=True)
    assert reward == pytest.approx(-1, rel=0.05)
    assert kl == pytest.approx(0.5, rel=0.1)
