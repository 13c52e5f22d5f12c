"""Runs by a reward's own gradient, on tiny models: resumed, in two processes, of every variant; what is refused."""

import math

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.diffusion.settings import ImageEvaluationConfig, ImageStopConfig
from diffusion_align.errors import ConfigError, Interrupted, RewardError
from diffusion_align.pipelines.configuration import check_config
from tests.helpers.flow_models import SIDE
from tests.helpers.tiny_runs import TINY
from tests.helpers.two_processes import PLAIN_STEPS, assert_same_gradients, assert_same_weights, run_both

REWARD = """
import os, pathlib, signal

def redness(images, prompts, metadata):
    return 100 * (images[:, 0] - images[:, 1:].mean(1)).mean(dim=(1, 2))

def red(images, prompts, metadata):
    return redness(images, prompts, metadata)

def constant(images, prompts, metadata):
    return images.detach().mean(dim=(1, 2, 3))

def flat(images, prompts, metadata):
    return (0 * images).sum(dim=(1, 2, 3))

def steep(images, prompts, metadata):
    return (images - images.detach()).sqrt().sum(dim=(1, 2, 3))

def silent(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))

def told(images, prompts, metadata):
    marker = pathlib.Path(__file__).with_name("marker")  # after so many calls with a gradient it does what is there
    if images.requires_grad and marker.exists() and os.environ.get("RANK", "1") == "1":
        calls, what = marker.read_text().split()
        marker.write_text(f"{int(calls) - 1} {what}")
        if calls == "0":
            marker.unlink()
            if what == "fail":
                raise RuntimeError("no answer")
            os.kill(os.getpid(), signal.SIGINT)
    return redness(images, prompts, metadata)

for one in (redness, constant, flat, steep, told):
    one.differentiable = True
"""
NO_EVALUATION = {"evaluation": None}
SETTINGS = TINY | {
    "method": "reward_gradient",
    "model": "emoji-sd",
    "prompts": ["a red apple", "a cat", "a dog"],
    "epochs": 2,
    "samples_per_epoch": 4,
    "updates_per_epoch": 2,
    "learning_rate": 1e-2,
    "checkpoint_every": 1,
    "sampler": {"steps": 3, "guidance_scale": 2.0},
}
OF_SD3 = {"resolution": SIDE, "max_sequence_length": 20}
WATCHED = {"reward": "jpeg_compressibility", "samples": 2, "diversity": "pixels"}


@pytest.fixture
def redness(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARD)
    return lambda name="redness": f"{tmp_path}/rewards.py:{name}"


CASES = {
    "draft, tiny_sd": {"last_steps": 2, "kl_coef": 1e-4, "learning_rate": 1e-3},
    "draft, tiny_sd, text encoder": {"lora": {"rank": 2, "text_encoder": True}, "gradient_checkpointing": True},
    "draft, tiny_flux": {**OF_SD3, "last_steps": 1, "low_variance": 2},
    "align_prop, tiny_sd, full": {"variant": "align_prop", "lora": None, "learning_rate": 1e-3, "kl_coef": 1e-4},
    "refl, tiny_sd3, full": {**OF_SD3, "variant": "refl", "late_range": [0, 1], "lora": None, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_learns_and_resumes_bit_for_bit(case, train, redness, model_path):
    settings = SETTINGS | {"reward": redness(), "model": model_path(case.split(", ")[1])} | CASES[case]
    watched = WATCHED | {"reward": redness("red")}
    settings |= {"evaluation": watched, "stop_when": {"gold_falling": None, "kl_above": 1e9}}
    run, rows = train(settings, model=settings["model"])
    train(settings, "again", model=settings["model"], epochs=1)
    again, resumed = train(settings, "again", model=settings["model"], resume=True)
    assert all(torch.equal(p, again.trainable[name]) for name, p in run.trainable.items())
    keep = ("reward", "reward_std", "gold", "kl_path", "loss", "grad_norm")
    assert [{k: row[k] for k in keep if k in row} for row in rows] == [
        {k: row[k] for k in keep if k in row} for row in resumed
    ]
    epochs, updates = ([row for row in rows if key in row] for key in ("time/epoch", "loss"))
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert len(updates) == 4
    assert updates[0]["kl_path"] == 0
    assert updates[-1]["kl_path"] > 0
    assert all(math.isfinite(row["reward"]) for row in epochs)
    gold = [row["gold"] for row in rows if "gold" in row]
    assert len(gold) == 3
    assert gold[-1] > gold[0], "of the same noise"


def test_the_images_are_those_of_a_rollout_of_the_same_seed(train, redness):
    """The first epoch's reward is DDPO's, but for the rounding to 8 bits; and several rewards are reported."""
    short = {"epochs": 1, "updates_per_epoch": 1, "sampler": {"steps": 3, "guidance_scale": 2.0, "eta": 1.0}}
    both = {"reward": [redness(), {"name": redness(), "scale": -0.5}], "reward_weights": [1.0, 1.5]}
    _, mine = train(SETTINGS | short | NO_EVALUATION | both)
    _, theirs = train(SETTINGS | short | both | {"method": "ddpo"}, "ddpo")
    (mine,), (theirs,) = ([row for row in rows if "reward" in row] for rows in (mine, theirs))
    for key in theirs:
        if "reward" in key:
            assert mine[key] == pytest.approx(theirs[key], abs=0.02), key
    assert theirs.keys() - mine.keys() <= {"time/score", "kl_path_stderr", "kl_path", "kl"}


def rows_without_times(rows):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_a_run_stops_between_two_updates_and_resumes_there_bit_for_bit(train, redness, tmp_path):
    """At Ctrl-C, here within the first epoch, after the update; where a reward fails, before it."""
    settings = SETTINGS | NO_EVALUATION | {"reward": redness("told"), "variant": "align_prop", "ema_decay": 0.5}
    settings |= {"samples_per_epoch": 6, "updates_per_epoch": 3, "checkpoint_every": 9}
    calm, rows = train(settings, "calm")
    checkpoints = tmp_path / "harried/checkpoints"
    (tmp_path / "marker").write_text("2 interrupt")  # the probe and an update come before
    with pytest.raises(Interrupted, match="stopped before epoch 1 ended"):
        train(settings, "harried")
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    (tmp_path / "marker").write_text("2 fail")
    with pytest.raises(RewardError, match="no answer") as failed:
        train(settings, "harried", resume=True)
    assert "resume" in "".join(failed.value.__notes__)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000002", "step_00000004"]
    harried, resumed = train(settings, "harried", resume=True)
    assert rows_without_times(resumed) == rows_without_times(rows)
    assert harried.step == calm.step == 6
    assert all(torch.equal(p, harried.trainable[name]) for name, p in calm.trainable.items())
    last = [load_file(tmp_path / name / "checkpoints/step_00000006/ema.safetensors") for name in ("calm", "harried")]
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())


def test_two_processes_stop_between_two_updates_and_one_resumes_there(forked, train, redness, tiny_sd, tmp_path):
    import json

    from diffusion_align.yaml_text import dump
    from tests.helpers.kills import QUICK

    settings = SETTINGS | NO_EVALUATION | {"reward": redness("told"), "epochs": 1, "samples_per_epoch": 8}
    settings |= {"learning_rate": 1e-3, "model": str(tiny_sd), "output_dir": str(tmp_path / "run")}
    _, rows = train(settings, "calm")
    (tmp_path / "tiny.yaml").write_text(dump(settings))
    (tmp_path / "marker").write_text("1 interrupt")
    run = forked("train", tmp_path / "tiny.yaml", processes=2, timeout=90, prelude=QUICK)
    assert not run.timed_out, run.errors
    assert run.statuses == [130, 130], run.errors
    state = json.loads((tmp_path / "run/checkpoints/step_00000001/state.json").read_text())
    scored = [number for order, _, _ in state["extra"]["scored"] for number in order]
    assert len(set(scored)) == len(scored) == 4, "of both processes"
    assert state["updates"][0] == 1
    _, resumed = train(settings, resume=True)
    for mine, theirs in zip(resumed, rows, strict=True):
        assert [mine.get(key) for key in ("step", "epoch")] == [theirs.get(key) for key in ("step", "epoch")]
        assert mine.get("reward") == pytest.approx(theirs.get("reward"), abs=1e-2)


def test_micro_batches_and_checkpointing_change_no_gradient(run_here, redness, tiny_sd, tmp_path):
    settings = SETTINGS | {"epochs": 1, "updates_per_epoch": 1, "reward": redness(), **NO_EVALUATION}
    settings |= {"model": str(tiny_sd), "max_grad_norm": float("inf"), "last_steps": 2, "kl_coef": 0.1}
    norms = []
    for i, change in enumerate(({"micro_batch_size": 4}, {"micro_batch_size": 1}, {"gradient_checkpointing": True})):
        trainer = run_here(settings | change | {"output_dir": str(tmp_path / str(i))})
        norms.append([p.detach().clone() for p in trainer.trainable.values()])
    for other in norms[1:]:
        for mine, theirs in zip(norms[0], other):
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=0)


def test_two_processes_are_one(forked, tmp_path, redness, tiny_sd):
    from diffusion_align.yaml_text import dump

    settings = SETTINGS | {"model": str(tiny_sd), "reward": redness(), "epochs": 2, "variant": "align_prop"}
    (tmp_path / "tiny.yaml").write_text(dump(settings | {"evaluation": WATCHED, "learning_rate": 1e-3}))
    folders, gradients = run_both(forked, tmp_path / "tiny.yaml", tmp_path, prelude=PLAIN_STEPS)
    assert_same_gradients(gradients, 1e-4, least=0.01)
    assert_same_weights(folders)
    assert load_file(folders[0] / "final/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reward": "jpeg_compressibility"}, "reward 'jpeg_compressibility' is not differentiable: choose one"),
        ({"reward": ["aesthetic", "ocr"]}, "reward 'ocr' is not differentiable"),
        ({"reward": {"name": "aesthetic", "offload": True}}, "reward 'aesthetic' has no gradient with offload=true"),
        ({"reward": {"name": "remote", "url": "http://localhost:1"}}, "reward 'remote' is not differentiable"),
        ({"reward": "clip_score"}, "evaluation.reward is the reward that is trained on"),
        ({"evaluation": {"reward": ["pick_score", "aesthetic"]}}, "evaluation.reward is the reward that is trained on"),
        ({"last_steps": 4}, "last_steps=4 is more than sampler.steps=3: lower it"),
        ({"last_steps": 2, "from_sigma": 0.3}, "from_sigma=0.3 has no effect with last_steps"),
        ({"inner_epochs": 2}, "inner_epochs=2 has no effect here, where every update samples its own images"),
        ({"lora": {"dropout": 0.1}}, "lora.dropout=0.1 would also drop out"),
        (
            {"dtype": "float16"},
            "dtype=float16 with mixed_precision=null lets small gradients of the reward vanish: set",
        ),
        ({"variant": "refl", "last_steps": 2}, "last_steps=2 has no effect with variant=refl"),
        ({"variant": "align_prop", "low_variance": 2}, "low_variance=2 has no effect with variant=align_prop"),
        ({"late_range": [0.5, 1]}, r"late_range=\[0.5, 1.0\] has no effect with variant=draft"),
        ({"sampler": {"steps": 3, "noisy_steps": 1}}, "sampler.noisy_steps=1 is for methods that train on the steps"),
        ({"evaluation": None, "stop_when": {"gold_falling": 2}}, "stop_when.gold_falling needs evaluations"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_config(SETTINGS | {"reward": "aesthetic", "output_dir": "run"} | change)


def test_a_held_out_reward_watches_unless_it_is_switched_off():
    def made(**changes):
        return check_config(SETTINGS | {"reward": "aesthetic", "output_dir": "run"} | changes)

    config = made()
    assert (config.evaluation.reward, config.evaluation.every, config.stop_when.gold_falling) == ("clip_score", 1, 3)
    assert (config.sampler.eta, made(sampler={}).sampler.guidance_scale) == (0, 5)
    assert made(evaluation=None).evaluation is None
    assert made(evaluation=None).stop_when.gold_falling is None
    assert made(evaluation={"samples": 4}).evaluation.reward == "clip_score"
    given = made(evaluation=ImageEvaluationConfig(samples=4), stop_when=ImageStopConfig(kl_above=9.0))
    assert (given.evaluation.reward, given.evaluation.samples, given.stop_when.gold_falling) == ("clip_score", 4, 3)
    assert made(evaluation={"reward": None}).stop_when.gold_falling is None
    assert made(stop_when={"gold_falling": None}).stop_when.gold_falling is None
    assert made(stop_when={"kl_above": 3}).stop_when.gold_falling == 3
    assert made(**{"evaluation": {"reward": {"name": "aesthetic", "variant": "v1"}}}).evaluation.reward


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("silent", "reward 'silent' is not differentiable"),
        ("constant", "says it is differentiable but its scores carry no gradient"),
        ("flat", "the gradient of reward 'flat' at an image of the model is 0 everywhere"),
        ("steep", "the gradient of reward 'steep' at an image of the model is not finite"),
    ],
)
def test_a_reward_without_a_gradient_is_one_sentence(name, sentence, call_cli, redness, tiny_sd, tmp_path):
    """``silent`` before the model is loaded, the others when they have seen an image of it; nothing is written."""
    from diffusion_align.yaml_text import dump

    run = {"model": str(tiny_sd), "reward": redness(name), "output_dir": str(tmp_path / "run"), **NO_EVALUATION}
    (tmp_path / "tiny.yaml").write_text(dump(SETTINGS | run))
    status, _, errors = call_cli("train", tmp_path / "tiny.yaml")
    assert status == 2
    assert sentence in " ".join(errors.split())
    assert not (tmp_path / "run").exists()


def test_gradients_are_scaled_in_fp16_and_by_less_where_that_overflows():
    """As training scales them: 1e-9 is 0 in half precision, and 65536 times 10 is more than it holds."""
    from types import SimpleNamespace

    from diffusion_align.training.optimization import Optimization

    latents = torch.ones(3, requires_grad=True)
    images = latents.half().float()  # a decoder in half precision
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=65536.0)):
        optimization = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler))
        for slope in (1e-9, 10.0):
            value = (slope * images).sum()
            (found,) = Optimization.gradients(optimization, value, [latents], retain_graph=True)
            wanted = 0.0 if scaler is None and slope < 1 else slope
            torch.testing.assert_close(found, torch.full((3,), wanted), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"last_steps": 1}, "last_steps=1 leaves no step that begins at sigma 0.05 or above.* sigma 0.00893"),
        ({"from_sigma": 0.01, "sampler": {"steps": 40}}, None),
        ({"from_sigma": 0.005}, "from_sigma=0.005 leaves no step that begins at sigma 0.05"),
        ({"variant": "refl", "late_range": [0.9, 1]}, "late_range=.* leaves no step that begins at sigma 0.05"),
        ({"low_variance": 2}, "low_variance=2 is for a gradient through one step, and from_sigma=0.1 is 2"),
    ],
)
def test_a_tail_that_is_next_to_the_image_is_refused(change, sentence, redness):
    from diffusion_align.diffusion.reward_gradient import RewardGradientTrainer
    from diffusion_align.diffusion.schedule import build_schedule
    from tests.helpers.flow_models import scheduler

    own = {"reward": redness(), "sampler": {"steps": 10}, "output_dir": "run", **NO_EVALUATION}
    config = check_config(SETTINGS | own | change)
    schedule = build_schedule(scheduler(shift=3.0), config.sampler.steps, eta=0.0)
    if sentence is None:
        assert len(RewardGradientTrainer.steps_trained_on(config, schedule)) == 2
        return
    with pytest.raises(ConfigError, match=sentence):
        RewardGradientTrainer.steps_trained_on(config, schedule)


@pytest.mark.parametrize(
    ("kind", "steps", "count", "sigma"), [("sd3", 10, 2, 0.278), ("sd3", 28, 2, 0.111), ("flux", 28, 1, 0.105)]
)
def test_how_many_steps_from_sigma_is(kind, steps, count, sigma):
    """As docs/reward_gradients.md says."""
    from functools import partial

    from diffusion_align.diffusion.reward_gradient import RewardGradientTrainer
    from diffusion_align.diffusion.schedule import build_schedule
    from diffusion_align.models.families.flow_matching import set_linear_timesteps
    from tests.helpers.flow_models import scheduler

    flux = kind == "flux"
    noise = scheduler(use_dynamic_shifting=True) if flux else scheduler(shift=3.0)
    setter = partial(set_linear_timesteps, tokens=4096) if flux else None
    own = {"reward": "aesthetic", "sampler": {"steps": steps}, "output_dir": "run", **NO_EVALUATION}
    schedule = build_schedule(noise, steps, eta=0.0, set_timesteps=setter)
    found = RewardGradientTrainer.steps_trained_on(check_config(SETTINGS | own), schedule)
    assert len(found) == count
    assert schedule.table.sigma_t[found[0]].item() == pytest.approx(sigma, abs=5e-4)


def test_a_failing_reward_ends_both_processes(forked, tmp_path, redness, tiny_sd):
    from diffusion_align.yaml_text import dump
    from tests.helpers.two_processes import end_in_a_sentence

    (tmp_path / "rewards.py").write_text(
        REWARD
        + "\ndef fails(images, prompts, metadata):\n"
        + "    import os\n"
        + "    if os.environ.get('RANK') == '1' and images.requires_grad and len(images) == 2:\n"
        + "        raise RuntimeError('no answer')\n"
        + "    return redness(images, prompts, metadata)\n"
        + "fails.differentiable = True\n"
    )
    settings = SETTINGS | {"model": str(tiny_sd), "reward": redness("fails"), **NO_EVALUATION}
    (tmp_path / "tiny.yaml").write_text(dump(settings | {"samples_per_epoch": 8}))
    for sentence in end_in_a_sentence(forked, tmp_path / "tiny.yaml", tmp_path):
        assert "no answer" in sentence
