"""Trainers of tiny language models on a few ragged prompts, and what tests ask of them."""

import pytest
import torch

from diffusion_align.data.text_rows import PromptRow
from diffusion_align.errors import ConfigError
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.training.reading import parse_config
from tests.helpers.enumerable import PROMPT, gradient

SIZES = {"model": "tiny-lm", "grid_every": 0, "epochs": 2, "samples_per_epoch": 16, "sample_batch_size": 8}
SIZES |= {"micro_batch_size": 5, "max_completion_length": 6, "learning_rate": 1e-2}
TINY = SIZES | {"prompts": ["x"], "reward": "length"}
RAGGED = [PromptRow(str(ids), ids, {}) for ids in ([4, 5, 6, 7, 8], [9], [10, 11], [12, 13, 14])]
PROMPTS = [PromptRow(f"p{i}", [5 + i, 6, 7 + i][: 1 + i % 3], {}) for i in range(6)]
ONLINE = {"samples_per_epoch": 24, "sample_batch_size": 12, "num_generations": 4}  # of all of PROMPTS


def short(prompts, completions, **columns):
    return [-float(len(text.split())) for text in completions]


def score(completions):
    """The number of the first token: a reward that tests can work out."""
    return [float(text.split()[0]) if text else 0.0 for text in completions]


def scores_of(batch):
    """What ``score`` says; the end of a sequence has no text."""
    first = batch.sequences.completions[:, 0].double()
    return torch.where(first == 3, 0.0, first)


def nothing(prompts, completions, **columns):
    return [0.0] * len(prompts)


def online_trainer(kind, policy, folder, *rewards, prompts=RAGGED, **settings):
    """A trainer of class ``kind``; ``rewards`` are functions, or pairs of one and its weight."""
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in rewards]
    rewards = WeightedRewards([function for function, _ in pairs], torch.tensor([weight for _, weight in pairs]))
    return kind(kind.config_class(**(TINY | {"output_dir": folder} | settings)), policy, prompts, rewards)


def exact_trainer(kind, policy, folder, count, **settings):
    """For ``count`` completions of the enumerable policy."""
    sizes = {"samples_per_epoch": count, "sample_batch_size": count, "max_completion_length": 2}
    return online_trainer(kind, policy, folder, nothing, prompts=[PromptRow("x", PROMPT, {})], **(sizes | settings))


def preference_trainer(kind, policy, folder, rows, *, reward=None, prompts=PROMPTS, accelerator=None, **settings):
    """A trainer of class ``kind`` on ``rows``, all of them an epoch; or online on prompts that ``reward`` judges."""
    defaults = SIZES | {"output_dir": folder, "epochs": 1, "updates_per_epoch": 1, "max_completion_length": 4}
    if reward is None:
        sizes = {"samples_per_epoch": len(rows), "sample_batch_size": len(rows), "micro_batch_size": 3}
        config = kind.config_class(**(defaults | sizes | {"dataset": ["x"]} | settings))
        return kind(config, policy, rows=rows, accelerator=accelerator)
    config = kind.config_class(**(defaults | ONLINE | {"prompts": ["x"], "reward": reward} | settings))
    return kind(config, policy, prompts, WeightedRewards([reward], torch.ones(1)), accelerator=accelerator)


def estimated(trainer):
    """The epoch's batch, its plan, and the metrics of both."""
    collected, metrics = trainer.collect()
    batch, plan, more = trainer.estimate(collected)
    return batch, plan, metrics | more


def losses_of(trainer, batch, *parts):
    """Losses of the samples of each of ``parts``, in their order."""
    return torch.cat([trainer.loss(batch, torch.as_tensor(part), torch.zeros(len(part)))[0] for part in parts])


def assert_micro_batches_do_not_matter(trainer, batch, keep):
    whole = losses_of(trainer, batch, keep).sum()
    slope = gradient(whole, trainer.policy)
    for parts in (keep.split(1), keep.split(3), [keep.flip(0)]):
        value = losses_of(trainer, batch, *parts).sum()
        assert (value - whole).abs() < 1e-9
        assert (gradient(value, trainer.policy) - slope).abs().max() < 1e-8


def plain(policy, ids, completion):
    """(T,) log-probs of one completion, by a forward pass without padding."""
    logits = policy.model(torch.tensor([ids + completion])).logits[0] / policy.temperature
    logp = logits.log_softmax(-1)
    return torch.stack([logp[len(ids) - 1 + t, token] for t, token in enumerate(completion)])


class Part:
    """Stands in for one of two processes; what is reduced stays its own, and is kept."""

    def __init__(self, index):
        self.num_processes, self.process_index, self.device = 2, index, torch.device("cpu")
        self.is_main_process, self.reduced = index == 0, []
        self.mixed_precision = "no"

    def reduce(self, x, reduction):
        self.reduced.append(x)
        return x


def problems_of(kind, **settings):
    """What is wrong with settings of a run on given rows, a sentence each."""
    with pytest.raises(ConfigError) as caught:
        parse_config(kind, {"model": "tiny-lm", "output_dir": "y", "dataset": ["x"]} | settings)
    return caught.value.problems
