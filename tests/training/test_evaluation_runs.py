"""A held-out reward, diversity, the best weights, and rules that end a run: on tiny models in this process."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffusion_align.diffusion import sampled_steps
from diffusion_align.diffusion.evaluation import mean_pairwise_distance, sample_images
from diffusion_align.diffusion.settings import ImageStopConfig
from diffusion_align.errors import ConfigError, Interrupted
from diffusion_align.interrupt import Overdue
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.rewards import RewardError
from diffusion_align.training.checkpoint import list_checkpoints
from diffusion_align.training.evaluation import Evaluation
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from tests.helpers.problems import assert_problem
from tests.helpers.tiny_runs import TINY


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


SETTINGS = TINY | {
    "reward": brightness,
    "prompts": ["a red apple", "a cat"],
    "epochs": 6,
    "samples_per_epoch": 4,
    "micro_batch_size": 8,
    "learning_rate": 1e-2,
    "checkpoint_every": 1,
    "keep_checkpoints": 9,
    "evaluation": {"samples": 2, "every": 1, "diversity": "pixels"},
}


class Scripted:
    """The k-th evaluation of two images gives ``golds[k]``; an exception there is raised, once."""

    def __init__(self, *golds):
        self.golds = list(golds)

    def __call__(self, images, prompts, metadata):
        if len(images) == 3:  # the dummy batch before training
            return [0.0] * 3
        gold = self.golds.pop(0)
        if isinstance(gold, Exception):
            raise gold
        return [gold - 1, gold + 1]


@pytest.fixture
def train(train):
    """``train(name, gold=None, **changes)``: the finished trainer."""

    def run(name="run", gold=None, **changes):
        settings = SETTINGS | changes
        if gold is not None:
            settings["evaluation"] = settings["evaluation"] | {"reward": gold}
        return train(settings, name)[0]

    return run


def rows(folder, key):
    """(epoch, value) of every row with ``key``."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["epoch"], row[key]) for row in found if key in row]


def trained(folder):
    """Name -> weights of the LoRA that a folder of the run holds."""
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    return {name.removeprefix("unet."): value for name, value in weights.items()}


def of_checkpoint(path):
    return {name.replace(".default.", "."): value for name, value in load_file(path / "trained.safetensors").items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_distances_are_those_of_all_pairs():
    embeddings = torch.nn.functional.normalize(torch.randn(5, 7, dtype=torch.float64), dim=1)
    images = torch.rand(5, 3, 4, 6, dtype=torch.float64)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    cosine = sum(1 - float(embeddings[i] @ embeddings[j]) for i, j in pairs) / 10
    pixels = sum(math.sqrt(float((images[i] - images[j]).square().mean())) for i, j in pairs) / 10
    assert mean_pairwise_distance(embeddings) == pytest.approx(cosine, rel=1e-12)
    assert mean_pairwise_distance(images) == pytest.approx(pixels, rel=1e-12)
    assert mean_pairwise_distance(embeddings[:1].expand(4, -1)) == pytest.approx(0, abs=1e-12)
    assert mean_pairwise_distance(images[:1].expand(4, -1, -1, -1)) == 0
    with pytest.raises(ValueError, match="at least two"):
        mean_pairwise_distance(images[:1])


def seen(*golds):
    return Evaluation([], 2, 1, history=list(enumerate(golds)))


@pytest.mark.parametrize(
    ("golds", "falling"),
    [((), 0), ((1,), 0), ((1, 2), 0), ((2, 1), 1), ((1, 3, 2, 2.5), 2), ((1, 1), 0), ((2, 1, 2), 0)],
)
def test_evaluations_below_the_best_are_counted(golds, falling):
    assert seen(*golds).falling == falling


def measured(evaluation, sample, processes):
    return evaluation.measure(sample, epoch=2, batch_size=2, processes=processes, bars=Bars(disable=True))


def test_an_evaluation_that_is_made_up_for_counts_once():
    """A callback failed behind it: the checkpoint has it, and says that its epoch is to be measured."""
    evaluation = seen(2.0, 1.0)
    for _ in range(2):
        measured(evaluation, lambda indices: {"gold": torch.tensor([0.0, 1.0])}, Processes(Accelerator(cpu=True)))
    assert evaluation.history == [(0, 2.0), (1, 1.0), (2, 0.5)]


@pytest.mark.parametrize("error", [Overdue(), RuntimeError("out of memory"), RewardError("gone")])
def test_whatever_ends_an_evaluation_is_told_to_the_other_processes(error, monkeypatch):
    def sample(indices):
        raise error

    processes, told = Processes(Accelerator(cpu=True)), []
    raise_together = processes.raise_together
    monkeypatch.setattr(
        processes, "raise_together", lambda failure, kind: told.append(failure) or raise_together(failure, kind)
    )
    with pytest.raises(type(error)):
        measured(seen(1.0), sample, processes)
    assert told == [error]


def test_an_evaluation_is_left_between_batches_and_counts_for_nothing():
    def sample(indices):
        batches.append(list(indices))
        processes.flag.raised = True
        return {"gold": torch.zeros(len(indices))}

    processes, batches = Processes(Accelerator(cpu=True)), []
    evaluation = Evaluation(["a cat"], 5, 1, history=[(0, 1.0)])
    with pytest.raises(Interrupted):
        measured(evaluation, sample, processes)
    assert batches == [[0, 1]]
    assert evaluation.history == [(0, 1.0)]


def reason(rules, row, evaluation):
    return "; ".join(rules.broken(row, evaluation)) or None


def test_each_rule_and_its_sentence():
    nothing, row = ImageStopConfig(), {"kl_path": 9.0, "diversity": 0.2, "gold": 1.0}
    falling = seen(1.0, 3.0, 2.5, 2.0)
    assert reason(nothing, row, falling) is None
    assert "KL to the reference is 9 nats, above stop_when.kl_above=8" in reason(ImageStopConfig(kl_above=8), row, None)
    assert reason(ImageStopConfig(kl_above=9), row, None) is None
    assert "below its best, 3 after epoch 1, in the last 2" in reason(ImageStopConfig(gold_falling=2), row, falling)
    assert reason(ImageStopConfig(gold_falling=3), row, falling) is None
    from_the_first = reason(ImageStopConfig(gold_falling=2), row, seen(3.0, 2.5, 2.7))
    assert "has been below that before training, 3, in all 2 evaluations (stop_when.gold_falling=2)" in from_the_first
    assert "so there is no best/: lower learning_rate, raise kl_coef or beta, or choose another" in from_the_first
    assert "diversity is 0.2, below" in reason(ImageStopConfig(diversity_below=0.3), row, None)
    assert reason(ImageStopConfig(diversity_below=0.2), row, None) is None
    assert reason(ImageStopConfig(kl_above=1, diversity_below=1), {}, None) is None, "not every epoch is evaluated"
    assert reason(ImageStopConfig(kl_above=1, diversity_below=1), row, None).count(";") == 1


def test_what_is_logged_is_what_the_fixed_images_score(train, tmp_path):
    trainer = train(gold=brightness, epochs=2, evaluation={"samples": 5, "diversity": "pixels", "every": 2})
    folder = tmp_path / "run"
    assert [epoch for epoch, _ in rows(folder, "gold")] == [0, 2]
    texts = ["a red apple", "a cat", "a red apple", "a cat", "a red apple"]

    def draw():
        policy, schedule = trainer.policy, trainer.schedule
        return [sample_images(policy, schedule, [text], 0, "evaluation", first=i) for i, text in enumerate(texts)]

    with trainer.policy.reference():
        before = draw()
    after = draw()
    for (_, gold), (_, error), (_, diversity), images in zip(
        rows(folder, "gold"), rows(folder, "gold_stderr"), rows(folder, "diversity"), (before, after), strict=True
    ):
        images = torch.cat(images)
        scores = ((images * 255).round() / 255).mean(dim=(1, 2, 3)).double()
        assert gold == pytest.approx(scores.mean().item(), rel=1e-5)
        assert error == pytest.approx(scores.std().item() / math.sqrt(5), rel=1e-3)
        assert diversity == pytest.approx(mean_pairwise_distance(images), rel=1e-4)


def test_evaluation_changes_nothing_of_the_training(train, tmp_path):
    train("with", gold=brightness, epochs=2)
    train("without", epochs=2, evaluation={"samples": 9, "every": 2, "diversity": "pixels"})
    assert same(trained(tmp_path / "with/final"), trained(tmp_path / "without/final"))
    assert rows(tmp_path / "without", "diversity")
    assert not rows(tmp_path / "without", "gold")


def test_the_best_weights_are_kept_and_a_falling_gold_reward_ends_the_run(train, tmp_path):
    trainer = train(gold=Scripted(0.0, 1.0, 3.0, 2.0, 2.9, 7.0), stop_when={"gold_falling": 2})
    folder = tmp_path / "run"
    assert trainer.epoch == 4
    assert "below its best, 3 after epoch 2" in trainer.stopped
    checkpoints = list_checkpoints(folder / "checkpoints")
    assert [path.name for path in checkpoints] == [f"step_{n:08d}" for n in (1, 2, 3, 4)]
    assert same(trained(folder / "best"), of_checkpoint(checkpoints[1]))
    assert same(trained(folder / "final"), of_checkpoint(checkpoints[3]))
    assert not same(trained(folder / "best"), trained(folder / "final"))
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["best"] == {"epoch": 2, "gold": 3.0}
    assert summary["stopped"] == trainer.stopped
    assert not (folder / ".best.tmp").exists()


def test_a_model_that_only_gets_worse_leaves_no_best(train, tmp_path):
    train(gold=Scripted(9.0, 1.0, 2.0), epochs=2)
    assert not (tmp_path / "run/best").exists()
    summary = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert summary == {"best": {"epoch": 0, "gold": 9.0}, "stopped": None}


def test_a_stopped_run_stays_stopped_until_the_rules_change(train, tmp_path):
    rules = {"gold_falling": 1}
    train(gold=Scripted(0.0, 3.0, 2.0), stop_when=rules)
    again = train(gold=Scripted(), stop_when=rules, resume=True)
    assert (again.epoch, "below its best, 3" in again.stopped) == (2, True)
    onwards = train(gold=Scripted(4.0, 5.0), stop_when={}, resume=True, epochs=4)
    assert (onwards.epoch, onwards.stopped) == (4, None)
    assert rows(tmp_path / "run", "gold") == list(enumerate([0.0, 3.0, 2.0, 4.0, 5.0]))


def test_a_run_that_goes_on_is_no_longer_called_stopped(train, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled_steps, "path_kl", lambda *known: (1.0, 0.4))
    train(stop_when={"kl_above": 1e-9}, evaluation=None)
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["stopped"]
    train(stop_when={}, resume=True, epochs=4, evaluation=None)
    assert json.loads((tmp_path / "run/evaluation.json").read_text()) == {"best": None, "stopped": None}


def test_the_history_of_the_gold_reward_survives_a_resume(train, tmp_path):
    train("cut", gold=Scripted(0.0, 3.0, 2.0), epochs=2)
    trainer = train("cut", gold=Scripted(1.0), stop_when={"gold_falling": 2}, epochs=6, resume=True)
    assert (trainer.epoch, "3 after epoch 1, in the last 2" in trainer.stopped) == (3, True)


def test_a_gold_reward_that_fails_costs_only_its_evaluation(train, tmp_path):
    train("calm", gold=Scripted(0.0, 1.0, 2.0, 3.0), epochs=3)
    with pytest.raises(RewardError, match="raised OSError: gone"):
        train("hurt", gold=Scripted(0.0, 1.0, OSError("gone")), epochs=3, checkpoint_every=9)
    assert rows(tmp_path / "hurt", "reward")[-1][0] == 1, "the row of the epoch is in the checkpoint"
    trainer = train("hurt", gold=Scripted(2.0, 3.0), epochs=3, checkpoint_every=9, resume=True)
    assert trainer.evaluation.history == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    for key in ("gold", "reward", "loss", "diversity"):
        assert rows(tmp_path / "hurt", key) == rows(tmp_path / "calm", key), key
    assert same(trained(tmp_path / "hurt/final"), trained(tmp_path / "calm/final"))
    assert same(trained(tmp_path / "hurt/best"), trained(tmp_path / "calm/best"))


def test_an_epoch_without_its_evaluation_is_resumed_any_number_of_times(train, tmp_path):
    settings = {"epochs": 2, "checkpoint_every": 9}
    train("calm", gold=Scripted(0.0, 1.0, 2.0), **settings)
    with pytest.raises(RewardError, match="gone"):
        train("hurt", gold=Scripted(0.0, 1.0, OSError("gone")), **settings)
    for _ in range(3):
        train("hurt", gold=Scripted(2.0), resume=True, **settings)
    for key in ("gold", "reward", "loss"):
        assert rows(tmp_path / "hurt", key) == rows(tmp_path / "calm", key), key


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"kl_above": 0.1}, "the KL to the reference is 1 nats (standard error 0.4), above stop_when.kl_above"),
        ({"diversity_below": 0.9}, "below stop_when.diversity_below"),
    ],
)
def test_the_other_rules_end_a_run(train, rules, expected, monkeypatch):
    monkeypatch.setattr(sampled_steps, "path_kl", lambda *known: (1.0, 0.4))
    trainer = train(stop_when=rules)
    assert trainer.epoch == 1
    assert expected in trainer.stopped


def test_diffusion_dpo_is_evaluated_too(train, tmp_path):
    method = {"method": "diffusion_dpo", "beta_dpo": 2000.0, "group_size": 2}
    trainer = train(**method, gold=Scripted(0.0, 2.0, 1.0), stop_when={"gold_falling": 1})
    assert trainer.epoch == 2
    assert (tmp_path / "run/best/pytorch_lora_weights.safetensors").is_file()


def test_the_average_is_what_is_evaluated_and_kept(train, tmp_path):
    trainer = train(gold=Scripted(0.0, 1.0), epochs=1, ema_decay=0.5)
    with trainer.ema_weights():
        average = {n.replace(".default.", "."): p.detach().clone() for n, p in trainer.trainable.items()}
    assert same(trained(tmp_path / "run/best"), average)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"evaluation": None, "stop_when": {"gold_falling": 2}}, ("stop_when.gold_falling", "needs evaluations")),
        ({"stop_when": {"gold_falling": 2}}, ("stop_when.gold_falling", "set evaluation.reward")),
        (
            {"evaluation": {"reward": "aesthtic"}},
            ("evaluation.reward='aesthtic' is unknown", "did you mean 'aesthetic'"),
        ),
        ({"evaluation": {"reward": []}}, ("evaluation.reward", "empty")),
        ({"evaluation": {"prompts": "nowhere.txt"}}, ("evaluation.prompts.source", "no such file")),
        ({"evaluation": {"samples": 1}}, ("evaluation.samples", "not allowed")),
        ({"evaluation": {"diversity": "/no/such/clip"}}, ("evaluation.diversity", "not a folder")),
        ({"evaluation": {"rewrad": "aesthetic"}}, ("unknown setting 'evaluation.rewrad'", "did you mean 'reward'")),
        ({"stop_when": {"kl_above": -1}}, ("stop_when.kl_above", "not allowed")),
        ({"stop_when": {"gold": 3}}, ("unknown setting 'stop_when.gold'", "")),
    ],
)
def test_settings_that_make_no_sense(changes, expected, tmp_path):
    with pytest.raises(ConfigError) as caught:
        check_config(SETTINGS | {"model": "emoji-sd", "output_dir": str(tmp_path / "x")} | changes)
    assert_problem(caught, *expected)
