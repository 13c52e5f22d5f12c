"""A trainer of two parameters, for what has nothing to do with a model."""

from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from diffusion_align.rewards import RewardError, call_reward
from diffusion_align.training.collection import BatchScores
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.method import TrainingPlan
from diffusion_align.training.randomness import generator
from diffusion_align.training.trainer import Trainer
from diffusion_align.writing import make_folder, new_folder, write_text


def brightness(images):
    return images.mean((1, 2, 3))


def score_of(reward, images):
    return call_reward(lambda images, *_: reward(images), images, [""] * len(images), [{}] * len(images))


def resumed_with(folder, **changes):
    """The line that a run prints which is to be resumed."""
    more = "".join(f", {name}={value!r}" for name, value in changes.items())
    return f"resume with: Toy(TrainingConfig(..., output_dir={str(folder)!r}, resume=True{more}), ...).train()"


class Toy(Trainer):
    """Two parameters are pulled towards what a reward says."""

    measures = False  # before the first epoch

    def __init__(self, folder, reward=brightness, *, background=True, accelerator=None, callbacks=(), **more):
        settings = {
            "epochs": 3,
            "grid_every": 1,
            "samples_per_epoch": 4,
            "sample_batch_size": 2,
            "updates_per_epoch": 2,
        }
        config = TrainingConfig(model="toy", output_dir=folder, **settings | more)
        super().__init__(config, accelerator or Accelerator(cpu=True), callbacks=callbacks)
        self.weights, self.reward, self.background = nn.Parameter(torch.zeros(2)), reward, background

    @property
    def trainable(self):
        return {"weights": self.weights}

    def collect(self):
        images = torch.rand(2, 3, 4, 4, generator=generator(self.config.seed, "images", self.epoch))
        if not self.background:
            failure = None
            try:
                return score_of(self.reward, images), {}
            except RewardError as error:
                failure = error
            self.processes.raise_together(failure, RewardError)
        with BatchScores(self.processes, RewardError) as scores:
            for _ in range(2):
                scores.go_on()
                scores.submit([(True, partial(score_of, self.reward, images))])
            return scores.gather(), {}

    def estimate(self, collected):
        return collected, TrainingPlan(torch.arange(4)), {}

    def loss(self, batch, samples, actions):
        return (self.weights.sum() - batch.mean()).square().expand(len(samples)), {}

    def show(self, name):
        make_folder(self.folder / "samples")
        write_text(self.folder / "samples" / f"{name}.txt", name)

    def measure_first(self):
        if not self.measures:
            return {}
        failure, score = None, torch.zeros(1)
        try:
            score = score_of(self.reward, torch.ones(1, 3, 4, 4))
        except RewardError as error:
            failure = error
        self.processes.raise_together(failure, RewardError)
        return {"held_out": score.item()}

    def finish(self):
        with new_folder(self.folder / "final") as temporary:
            (temporary / "weights.txt").write_text(str(self.weights.tolist()))
