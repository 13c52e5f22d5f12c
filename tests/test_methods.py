"""A method is one object: a trainer class in a stranger's file runs everywhere that a shipped one does."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from diffusion_align import methods
from diffusion_align.errors import ConfigError
from diffusion_align.methods import SHIPPED, describe_methods, method_name, method_of
from diffusion_align.pipelines.configuration import read_config

ROOT = Path(__file__).parent.parent
SOURCES = [path for part in ("diffusion_align", "pipelines", "rewards") for path in sorted((ROOT / part).rglob("*.py"))]
IMAGES = '''
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from diffusion_align.data.prompts import PromptsConfig, items_of_epoch
from diffusion_align.diffusion.rollout import replay
from diffusion_align.diffusion.settings import DenoisingConfig
from diffusion_align.diffusion.trainer import DenoisingTrainer
from diffusion_align.rewards.setting import RewardSetting
from diffusion_align.training.context import Metric
from diffusion_align.training.trainer import TrainingPlan


class WeightedConfig(DenoisingConfig):
    prompts: PromptsConfig = Field(description="what to sample")
    reward: RewardSetting = Field(description="what weighs the samples")
    sharpness: float = Field(1.0, gt=0, description="of the weights")


@dataclass(frozen=True)
class Batch:
    x_t: Tensor
    x_s: Tensor
    steps: Tensor
    weights: Tensor
    conditioning: dict


class WeightedTrainer(DenoisingTrainer[Batch]):
    """Reward-weighted regression: the log-prob of each sample, weighted by its reward."""

    config_class = WeightedConfig
    metrics = {"weight_largest": Metric("Largest weight", "times the mean", "Near the number of samples one decides.")}

    def collect(self):
        config = self.config
        samples = items_of_epoch(self.prompts, config.seed, self.epoch, config.samples_per_epoch)
        steps = self.schedule.stochastic_steps
        collected = self.sample(self.schedule, samples, record=lambda sample: steps, reduction="mean")
        return collected, collected.metrics

    def estimate(self, collected):
        path, own, count = collected.trajectory, self.local_samples, len(collected.rewards)
        weights = count * torch.softmax(self.config.sharpness * collected.rewards, 0)
        local = weights[own.start : own.stop].to(path.x_t)
        batch = Batch(path.x_t, path.x_s, path.steps, local, collected.conditioning)
        return batch, TrainingPlan(torch.arange(count), path.steps.shape[1]), {"weight_largest": float(weights.max())}

    def loss(self, batch, samples, actions):
        conditioning = {name: value[samples] for name, value in batch.conditioning.items()}
        places = samples, actions
        x_t, x_s, steps = batch.x_t[places], batch.x_s[places], batch.steps[places]
        logp, _ = replay(self.policy, self.schedule, x_t, x_s, steps, conditioning)
        return -batch.weights[samples] * logp, {"logp": logp.detach()}
'''
TEXT = '''
import torch
from pydantic import Field

from diffusion_align.estimators import leave_one_out_advantages, masked_sum, score_function_loss
from diffusion_align.llm.policy_gradient import PolicyGradientConfig, PolicyGradientTrainer
from diffusion_align.training.trainer import TrainingPlan


class RLOOConfig(PolicyGradientConfig):
    scale: float = Field(1.0, gt=0, description="of the advantages")


class RLOOTrainer(PolicyGradientTrainer):
    """REINFORCE with the mean of a prompt's other completions as its baseline."""

    config_class = RLOOConfig

    def estimate(self, collected):
        groups = torch.arange(len(collected.rewards)) // self.config.num_generations
        advantages = self.config.scale * leave_one_out_advantages(collected.rewards, groups)
        own = advantages[self.local_samples.start : self.local_samples.stop]
        return (collected.completions.sequences, own), TrainingPlan(torch.arange(len(advantages))), {}

    def loss(self, batch, samples, actions):
        sequences, advantages = batch[0][samples], batch[1][samples]
        logp = self.policy.log_probs(self.policy.score(sequences))
        losses = score_function_loss(logp, advantages[:, None].to(logp).expand_as(logp))
        return masked_sum(losses, sequences.mask, 1), {"logp": masked_sum(logp, sequences.mask, 1).detach()}
'''
STOPPER = """
from diffusion_align.training.callbacks import Callback

class Stopper(Callback):
    def on_epoch_end(self, trainer, row):
        row["seen"] = trainer.epoch
        return "enough" if trainer.epoch == 2 else None

not_one = 3
"""
SETTINGS = {
    "epochs": 1,
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "micro_batch_size": 4,
    "updates_per_epoch": 1,
    "lora": {"rank": 2},
    "num_threads": 1,
}
OF_IMAGES = {"sampler": {"steps": 2, "guidance_scale": 1.0}, "reward": "jpeg_compressibility", "prompts": ["a", "b"]}
OF_TEXT = {"reward": "length", "prompts": ["the cat", "a dog"], "num_generations": 2, "max_completion_length": 8}


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """A folder outside the repository, where we are, with files of other people."""
    for name, source in (("weighted", IMAGES), ("rloo", TEXT), ("stopper", STOPPER)):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder, model, method, **settings):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "method": method, "output_dir": "run", **settings}))
    return path


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_strangers_file_runs_through_every_command(kind, strangers, call_cli, request):
    reference, own = ("weighted.py:WeightedTrainer", OF_IMAGES) if kind == "image" else ("rloo.py:RLOOTrainer", OF_TEXT)
    model = request.getfixturevalue("tiny_sd" if kind == "image" else "tiny_language_model")
    path = recipe(strangers, model, reference, **SETTINGS, **own)
    code, out, err = call_cli("doctor", path)
    assert code == 0, err
    assert "no problem found" in out
    code, out, err = call_cli("train", path)
    assert code == 0, err
    written = yaml.safe_load((strangers / "run" / "config.yaml").read_text())
    assert written["method"] == f"{strangers}/{reference}"
    assert (strangers / "run" / "final").is_dir()
    code, out, err = call_cli("report", "run")
    assert code == 0, err
    page = (strangers / "run" / "report.html").read_text()
    assert ("Near the number of samples one decides." in page) == (kind == "image")
    described = json.loads((strangers / "run" / "metrics.json").read_text())
    assert described["kl"]["unit"] == ("nats a step" if kind == "image" else "nats a token")
    code, out, err = call_cli("train", "run/config.yaml", "resume=true", "epochs=2")
    assert code == 0, err
    rows = [json.loads(line) for line in (strangers / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "time/epoch" in row] == [1, 2]
    assert all("logp" in row for row in rows if "loss" in row)
    # Its code is part of what the run is made of.
    file = strangers / reference.partition(":")[0]
    file.write_text(file.read_text() + "\nchanged = True\n")
    code, out, err = call_cli("train", "run/config.yaml", "resume=true", "epochs=3")
    assert code == 2
    assert "accept_changed=[method]" in err
    code, out, err = call_cli("train", "run/config.yaml", "resume=true", "epochs=3", "accept_changed=[method]")
    assert code == 0, err


def test_a_run_whose_methods_file_was_moved_is_resumed_if_that_is_accepted(strangers, tiny_language_model, call_cli):
    path = recipe(strangers, tiny_language_model, "rloo.py:RLOOTrainer", **SETTINGS, **OF_TEXT)
    code, _, err = call_cli("train", path)
    assert code == 0, err
    (strangers / "rloo.py").rename(strangers / "moved.py")
    again = ["train", "run/config.yaml", "resume=true", "epochs=2", "method=moved.py:RLOOTrainer"]
    code, _, err = call_cli(*again)
    assert code == 2
    assert "accept_changed=[method]" in err
    code, _, err = call_cli(*again, "accept_changed=[method]")
    assert code == 0, err
    code, _, err = call_cli(*again, "method=weighted.py:WeightedTrainer")
    assert code == 2
    assert "is a run of method=" in err


@pytest.mark.parametrize("kind", ["image", "text"])
def test_align_takes_a_strangers_class_or_file(kind, strangers, request):
    from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline

    if kind == "image":
        pipe = ImageAlignmentPipeline.from_pretrained(request.getfixturevalue("tiny_sd"), device="cpu")
        reference, settings = "weighted.py:WeightedTrainer", SETTINGS | OF_IMAGES
    else:
        pipe = TextAlignmentPipeline.from_pretrained(request.getfixturevalue("tiny_language_model"), device="cpu")
        reference, settings = "rloo.py:RLOOTrainer", SETTINGS | OF_TEXT
    with pytest.raises(ConfigError, match="unknown setting 'sharpnes'"):
        pipe.align(reference, output_dir="run", sharpnes=2.0, **settings)
    pipe.align(reference, output_dir="run", **settings)
    assert (strangers / "run" / "report.html").is_file()
    other = "rloo.py:RLOOTrainer" if kind == "image" else "weighted.py:WeightedTrainer"
    with pytest.raises(ConfigError, match=r"does not train .*: use one of "):
        pipe.align(other, output_dir="other", **settings)


def test_callbacks_are_objects_or_are_found_by_reference(strangers, tiny_language_model, call_cli):
    from diffusion_align.pipelines import TextAlignmentPipeline
    from diffusion_align.training.callbacks import Callback

    class Counter(Callback):
        epochs = 0

        def on_epoch_end(self, trainer, row):
            self.epochs += 1

    counter = Counter()
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    settings = SETTINGS | OF_TEXT | {"epochs": 3}
    pipe.align("grpo", output_dir="run", callbacks=[counter, "stopper.py:Stopper"], **settings)
    assert counter.epochs == 2
    rows = [json.loads(line) for line in (strangers / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["seen"] for row in rows if "seen" in row] == [1, 2]
    written = yaml.safe_load((strangers / "run" / "config.yaml").read_text())
    assert written["callbacks"] == [f"{strangers}/stopper.py:Stopper"]
    path = recipe(
        strangers, tiny_language_model, "grpo", **settings, callbacks=["stopper.py:Stoper", "stopper.py:not_one"]
    )
    code, _, err = call_cli("train", path, "output_dir=other")
    assert code == 2
    assert "did you mean 'Stopper'" in err
    assert "is no Callback" in err
    assert not (strangers / "other").exists()


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("dppo", "method='dppo' is unknown: did you mean 'ppo'?"),
        ("nowhere.py:Trainer", "method file 'nowhere.py' does not exist"),
        ("rloo.py:RLOTrainer", "'rloo.py' has no 'RLOTrainer': did you mean 'RLOOTrainer'?"),
        ("rloo.py:RLOOConfig", "method='rloo.py:RLOOConfig' is not a trainer: write a subclass of"),
        ("half.py:Half", "method='half.py:Half' lacks estimate, loss: a trainer must define them"),
        ("odd.py:Odd", "method='odd.py:Odd' has config_class=3: it must be a subclass of TrainingConfig"),
        (3, "method=3 is unknown: known are ddpo, diffusion_dpo"),
    ],
)
def test_what_is_no_method_is_one_sentence(strangers, method, sentence):
    head = "from diffusion_align.llm.policy_gradient import PolicyGradientTrainer\n"
    (strangers / "half.py").write_text(f"{head}class Half(PolicyGradientTrainer):\n    pass\n")
    (strangers / "odd.py").write_text(
        (strangers / "rloo.py").read_text() + "\nclass Odd(RLOOTrainer): config_class = 3\n"
    )
    with pytest.raises(ConfigError) as error:
        method_of(method)
    assert len(error.value.problems) == 1
    assert str(error.value).startswith(sentence)


def test_an_installed_package_brings_methods(strangers, monkeypatch):
    from importlib.metadata import EntryPoint

    (strangers / "brought.py").write_text(TEXT)
    monkeypatch.syspath_prepend(str(strangers))
    points = [
        EntryPoint(name, f"brought:{cls}", methods.GROUP) for name, cls in (("rloo", "RLOOTrainer"), ("bad", "No"))
    ]
    monkeypatch.setattr(methods, "entry_points", lambda group: points if group == methods.GROUP else [])
    assert method_of("rloo").__name__ == "RLOOTrainer"
    with pytest.raises(ConfigError, match="method 'bad' cannot be imported"):
        method_of("bad")
    with pytest.raises(ConfigError, match="did you mean 'rloo'"):
        method_of("rlo")
    listed = dict(describe_methods())
    about = "REINFORCE with the mean of a prompt's other completions as its baseline"
    assert listed["rloo"] == [about, "trains: a language model"]
    [problem] = listed["bad"]
    assert problem.startswith("method 'bad' cannot be imported")


def test_a_class_is_written_by_its_name():
    assert [method_name(method_of(name)) for name in SHIPPED] == list(SHIPPED)


def test_the_model_of_a_method_that_loads_its_own_is_not_looked_for(strangers):
    source = (strangers / "rloo.py").read_text()
    (strangers / "alone.py").write_text(source + "\n    model_kind = None\n")
    given = ["model=nothing_here", f"output_dir={strangers / 'alone'}"]
    file = strangers / "alone.yaml"
    file.write_text("method: alone.py:RLOOTrainer\nprompts: [a, b]\nreward: nobody_knows\n")
    assert read_config(str(file), given).model == "nothing_here"


def test_the_methods_are_listed(call_cli):
    code, out, err = call_cli("list", "methods")
    assert code == 0, err
    assert all(name in out for name in SHIPPED)
    assert "trains: a text-to-image model" in out


# -- method= switches a recipe -----------------------------------------------------------------------------------------


SWITCHES = [
    ("quickstart", ["method=diffusion_dpo", "beta_dpo=2000"], "advantages, timestep_fraction, clip_range_nats"),
    ("ddpo_emoji_jpeg", ["method=diffusion_dpo", "beta_dpo=2000"], "advantages, timestep_fraction, clip_range_nats"),
    ("dpo_emoji_online", ["method=ddpo"], "beta_dpo, decisions_per_pair"),
    ("ppo_tiny", ["method=grpo"], "missing_eos_penalty, kl_coef"),
    ("grpo_tiny", ["method=ppo"], "beta"),
    ("grpo_tiny", ["method=kto"], ""),
    ("dpo_multi_negative_tiny", ["method=kto"], "pair_selection"),
    ("kto_tiny", ["method=dpo", "loss_type=ipo"], "desirable_above, desirable_weight"),
]


@pytest.mark.parametrize(("name", "overrides", "left_out"), SWITCHES)
def test_a_recipe_is_switched_by_its_method(name, overrides, left_out, tmp_path, capsys):
    config = read_config(name, [*overrides, f"output_dir={tmp_path / 'run'}"])
    assert overrides[0] == f"method={config.method}"
    line = f"{overrides[0]} leaves out of the recipe: {left_out}\n" if left_out else ""
    assert capsys.readouterr().err == line


def test_a_setting_that_was_typed_must_be_one_of_the_method(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"^unknown setting 'value_coef': "):
        read_config("grpo_tiny", ["method=ppo", "method=grpo", "value_coef=0.2"])
    with pytest.raises(ConfigError, match=r"^unknown setting 'kl_coef': "):
        read_config("ppo_tiny", ["method=grpo", "kl_coef=0.2", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"^unknown setting 'kl_coef': "):  # the recipe's own method is no switch
        read_config("grpo_tiny", ["method=grpo", "kl_coef=0.2", f"output_dir={tmp_path / 'run'}"])


# -- nobody else names them --------------------------------------------------------------------------------------------


def names_in(path):
    """Names of methods that stand in a file as texts of their own; what a docstring says is prose."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in SHIPPED}


def test_no_other_file_lists_the_methods():
    listing = {str(path.relative_to(ROOT)): found for path in SOURCES if len(found := names_in(path)) > 1}
    assert listing.keys() == {"diffusion_align/methods.py"}


def test_nothing_asks_what_kind_of_trainer_or_configuration_it_has():
    kinds = ("Trainer", "Config")
    asked = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                named = [one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)]
                asked += [f"{path}:{node.lineno}" for name in named if name.endswith(kinds)]
    assert not asked
