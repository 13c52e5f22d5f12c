"""A policy whose network is linear, of flow matching or a UNet's kind, with all that the forward trainer asks of it."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.snapshots import Snapshots
from diffusion_align.diffusion.transitions import nats_per_squared_error
from tests.helpers.linear_flow import LinearFlow

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
KINDS = {
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "v_prediction": DDIMScheduler(**BETAS, prediction_type="v_prediction"),
    "epsilon": DDIMScheduler(**BETAS, prediction_type="epsilon"),
}


class LinearPolicy(LinearFlow):
    """``seen``: (rows, who) of every pass; who is "reference", "old", "sampling" or, with a gradient, "trained"."""

    family = SimpleNamespace(guidance="free", setting_checks=lambda config, settings: ())
    scale, is_old = 1.0, False

    def __init__(self, kind="flow", seed=0):
        super().__init__(KINDS[kind], seed)
        with torch.no_grad():
            for name, value in self.network.items():  # small, so that samples are
                value.mul_(0.3)
                self.frozen[name] = 0.3 * self.frozen[name]
        self.network.config = {}
        self.snapshots = Snapshots(self.trainable)

    @contextlib.contextmanager
    def as_snapshot(self, name):
        self.is_old = True
        with self.snapshots.active(name):
            yield
        self.is_old = False

    def weights(self):
        """The trained ones beside each other, (C, 2 C + TEXT)."""
        return torch.cat([self.network[name] for name in "ABC"], dim=1).detach()

    def predict(self, x_t, timestep, conditioning, *, guidance_scale=None):
        scale = self.scale if guidance_scale is None else guidance_scale
        who = "reference" if self.is_reference else "old" if self.is_old else "sampling"
        self.seen.append((len(x_t), "trained" if torch.is_grad_enabled() else who))
        weights = self.frozen if self.is_reference else self.network
        u, text = timestep.to(x_t.dtype) / 1000, conditioning["text"]
        output = self.velocity(weights, x_t, u, text)
        if scale == 1:
            return output
        without = self.velocity(weights, x_t, u, torch.zeros_like(text))
        return without + scale * (output - without)


def in_float64(trainer, batch):
    """Trainer and batch with what they round to float32 in float64; ``old`` is taken again where it is the policy."""
    trainer.policy.double()
    for kept in trainer.policy.snapshots._kept.values():
        kept.update({name: value.double() for name, value in kept.items()})
    steps, own = trainer.trained_steps, nats_per_squared_error(trainer.exact_schedule)
    importance = torch.zeros_like(own)
    importance[steps] = own[steps] / trainer.nats / trainer.probabilities
    torch.testing.assert_close(trainer._importance.double(), importance, atol=0, rtol=1e-6)
    trainer._importance, trainer.schedule = importance, trainer.exact_schedule
    wide = {name: getattr(batch, name).double() for name in ("x_0", "advantages", "noise")}
    return replace(batch, **wide)
