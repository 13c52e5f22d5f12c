"""Two processes with half the batch each do what one does with all of it; neither ever waits for the other in vain."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.training.reading import load_yaml
from tests.helpers.flow_models import SIDE
from tests.helpers.hard_runs import rows_of
from tests.helpers.kills import QUICK, resumed_with
from tests.helpers.problems import assert_problem
from tests.helpers.two_processes import assert_same_gradients, end_in_a_sentence, run_both

PROMPTS = ["a red apple", "a cat", "a dog", "a blue car"]
REWARD = """
import torch
from diffusion_align.rewards.image.jpeg import jpeg_sizes

def sometimes(images, prompts, metadata):
    flat = torch.tensor([bool(m.get("flat")) for m in metadata])
    return torch.where(flat, torch.ones(len(images)), images.mean(dim=(1, 2, 3)))  # no two images tie

def only_one_fails(images, prompts, metadata):
    import os
    if os.environ.get("RANK") == "1" and not metadata == [{}, {}, {}]:  # the dummy batch passes
        raise RuntimeError("no answer")
    return -jpeg_sizes(images)

def only_one_hangs(images, prompts, metadata):
    import os, pathlib, time
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 5:  # of the second epoch, after the dummy batch and two batches
        (pathlib.Path(__file__).parent / "hangs").touch()
        time.sleep(600)
    return -jpeg_sizes(images)

calls = []

def noisy(images, prompts, metadata):
    return torch.rand(len(images)) - jpeg_sizes(images)
"""


def assert_same_rows(folders, tolerance):
    one, two = (rows_of(folder) for folder in folders)
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "sdpa", "channels_last": True},
        {"model": "emoji-sd", "samples_per_epoch": 4, "sampler": {"steps": 2, "guidance_scale": 1.0}},
        {
            "advantages": "group",
            "group_size": 2,
            "kl_coef": 0.1,
            "timestep_fraction": 0.7,
            "micro_batch_size": 3,
            "height": 8,
            "width": 24,
            "negative_prompt": "dark",
        },
        {"sampler": {"steps": 5, "guidance_scale": 1.0, "noisy_steps": 2}},
        {"method": "rwr", "timestep_fraction": 0.7, "micro_batch_size": 3},
        {"model": "tiny_sd3", "sampler": {"steps": 5, "guidance_scale": 2.0, "noisy_steps": 2}},
        {"model": "tiny_flux", "resolution": SIDE, "kl_coef": 0.1},
        {"ratio": "guard", "sampler": {"steps": 3, "guidance_scale": 5.0}},
        {"kl_bound_nats": 0.01, "micro_batch_size": 3},
        {"optimizer": "adafactor", "ema_decay": 0.9, "ema_offload": True},
        {"lora": {"rank": 2, "text_encoder": True}, "negative_prompt": "dark"},
        {"gradient_checkpointing": True, "vae_slicing": True, "vae_tiling": True, "height": 24},
        {
            "reward": ["jpeg_compressibility", "jpeg_incompressibility"],
            "reward_weights": [1.0, 3.0],
            "evaluation": {"reward": "jpeg_incompressibility", "samples": 5, "every": 1, "diversity": "pixels"},
        },
    ],
    ids=[
        "history",
        "sdpa, channels last",
        "emoji-sd",
        "groups, kl, some steps, a size and a negative prompt",
        "a window of steps",
        "reward-weighted regression",
        "a window of SD3's steps",
        "FLUX",
        "guarded ratios",
        "a bound on the KL",
        "adafactor, averaged",
        "text encoders",
        "saving memory",
        "two rewards, five images evaluated",
    ],
)
def test_half_the_batch_each_gives_the_same_gradient(forked, settings, model_path, tmp_path, changes):
    changes = changes | {"model": model_path(changes.get("model", "tiny_sd"))}
    folders, gradients = run_both(forked, settings(**changes), tmp_path)
    assert_same_gradients(gradients, 1e-6)
    assert_same_rows(folders, 1e-5)
    one, two = (load_file(folder / "final" / "pytorch_lora_weights.safetensors") for folder in folders)
    # After one step of Adam a gradient of exactly 0 stays where it was; others move by the rate, whatever their size.
    moved = gradients[0][0].abs() > 1e-4
    a, b = (torch.cat([v.flatten() for v in weights.values()]) for weights in (one, two))
    assert moved.any()
    assert ((a - b).abs() <= 1e-6).float().mean() > 0.95


@pytest.mark.parametrize(
    "fault",
    [
        "Accelerator.reduce = lambda self, tensor, reduction: tensor",
        "reduce = Accelerator.reduce\nAccelerator.reduce = lambda self, tensor, reduction: reduce(self, tensor) / 2",
        "from diffusion_align.training.processes import Processes\n"
        "Processes.gather_in_order = lambda self, parts: self.count * parts",
    ],
    ids=["gradients not summed", "gradients averaged", "rewards not gathered"],
)
def test_the_comparison_notices(forked, settings, tmp_path, fault):
    _, gradients = run_both(forked, settings(), tmp_path, fault)
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients, 1e-6)


def test_all_weights_without_a_reference(forked, settings, tmp_path):
    folders, gradients = run_both(forked, settings(lora=None, grid_every=1), tmp_path)
    assert_same_gradients(gradients, 1e-6)
    assert_same_rows(folders, 1e-5)
    assert all((folder / "samples/before_after.png").is_file() for folder in folders)


def test_the_first_process_chooses_the_precision_of_both(forked, settings, tmp_path):
    one_gpu = """
import os
from diffusion_align.training import launch
launch.this_machine = lambda: launch.Machine(gpu=True, bf16=os.environ.get("RANK") != "1")
"""
    folders, gradients = run_both(forked, settings(), tmp_path, one_gpu)
    assert_same_gradients(gradients, 1e-2)
    for folder in folders:
        config = load_yaml(folder / "config.yaml")
        assert (config["mixed_precision"], config["dtype"]) == ("bf16", "bfloat16")
        assert rows_of(folder)[0]["ratio/first_pass_deviation"] == 0


def test_the_first_process_measures_the_batch_sizes_of_both(forked, settings, tmp_path):
    """They divide a process's own samples; the second would have found that nothing is gained."""
    seconds = """
import os
from diffusion_align.training.batch_sizes import Stopwatch
def time(self, run, size):
    run()
    return float(size) if os.environ.get("RANK") == "1" else 1.0
Stopwatch.time = time
"""
    config = settings(sample_batch_size="auto", micro_batch_size="auto")
    folders, gradients = run_both(forked, config, tmp_path, seconds)
    assert_same_gradients(gradients, 1e-6)
    written = [load_yaml(folder / "config.yaml") for folder in folders]
    assert [(one["sample_batch_size"], one["micro_batch_size"]) for one in written] == [(8, 24), (4, 12)]


@pytest.mark.parametrize("case", ["one flat on rank 1", "rank 1 flat", "rank 0 flat", "all flat"])
def test_processes_with_unequal_work_do_not_wait_for_each_other(forked, settings, tmp_path, case):
    """Images without advantage are dropped: 8, 6, 4 or none are left, on one process perhaps none."""
    (tmp_path / "mine.py").write_text(REWARD)
    order = [text for text, _ in items_of_epoch([(p, {}) for p in PROMPTS], 0, 0, 4)]
    flat = {"one flat on rank 1": order[3:], "rank 1 flat": order[2:], "rank 0 flat": order[:2], "all flat": order}[
        case
    ]
    prompts = [{"prompt": p, "flat": p in flat} for p in PROMPTS]
    config = settings(
        prompts=prompts, reward=f"{tmp_path}/mine.py:sometimes", advantages="group", group_size=2, updates_per_epoch=2
    )
    folders, gradients = run_both(forked, config, tmp_path)
    for folder in folders:
        assert rows_of(folder)[-1]["samples_used"] == 8 - 2 * len(flat)
        assert rows_of(folder)[-1]["frac_reward_zero_std"] == len(flat) / 4
    if case == "all flat":
        assert gradients == [[], [], []]
    else:
        assert_same_gradients([g[:1] for g in gradients], 1e-6)
        assert [len(g) for g in gradients] == [2, 2, 2]


def test_a_killed_run_of_two_processes_resumes_bit_for_bit(forked, settings, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    config = settings(
        reward=f"{tmp_path}/mine.py:noisy",
        epochs=3,
        checkpoint_every=1,
        ema_decay=0.9,
        lr_schedule="cosine",
        history_size=4,
        history_min_count=2,
    )
    calm, harried = tmp_path / "calm", tmp_path / "harried"
    die = """
import os, signal
from diffusion_align.training.optimization import Optimization
step, calls = Optimization.step, [0]
def die_at_the_second(self, number):
    calls[0] += 1
    if calls[0] == 2 and self.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
Optimization.step = die_at_the_second
"""
    forked.finish("train", config, f"output_dir={calm}", processes=2, prelude=QUICK)
    killed = forked("train", config, f"output_dir={harried}", processes=2, prelude=die, timeout=60)
    assert not killed.timed_out, "a process went on waiting for one that is gone"
    assert killed.statuses[1] == -signal.SIGKILL
    assert killed.statuses[0] != 0
    resumed = forked("train", config, f"output_dir={harried}", "resume=true", processes=2, prelude=QUICK)
    assert resumed.statuses == [0, 0], resumed.errors
    assert rows_of(harried) == rows_of(calm)
    for name in ("trained", "ema"):
        a, b = (load_file(f / "checkpoints" / "step_00000003" / f"{name}.safetensors") for f in (calm, harried))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_each_process_gets_its_own_random_state_back(forked, settings, tmp_path):
    config = settings()
    forked.finish("train", config, f"output_dir={tmp_path}/run", processes=2)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert len(torch.load(newest / "tensors.pt", weights_only=True)["rng"]) == 2


def test_a_signal_to_one_process_stops_both_with_a_checkpoint(forked, settings, tmp_path):
    folder = tmp_path / "run"
    pids = forked.start("train", settings(epochs=100, checkpoint_every=100), f"output_dir={folder}", processes=2)
    log, deadline = folder / "metrics.jsonl", time.monotonic() + 60
    while not (log.exists() and '"reward"' in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pids[1], signal.SIGTERM)
    run = forked.wait(pids, timeout=60)
    assert run.statuses == [130, 130], run.errors
    epochs = sum("reward" in json.loads(line) for line in log.read_text().splitlines())
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{epochs:08d}"]


def test_a_reward_that_hangs_on_one_process_is_left_on_both(forked, settings, tmp_path):
    """The launcher asks all processes to stop; one waits for its reward, the other for that one."""
    (tmp_path / "mine.py").write_text(REWARD)
    config = settings(reward=f"{tmp_path}/mine.py:only_one_hangs", epochs=9, checkpoint_every=9, interrupt_grace=0.5)
    pids = forked.start("train", config, f"output_dir={tmp_path}/run", processes=2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    run = forked.wait(pids, timeout=60)
    assert run.statuses == [130, 130], run.errors
    newest = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(newest) == 1
    finished = int(newest[0].removeprefix("step_"))
    assert finished in (1, 2)
    said = f"stopped after epoch {finished} of 9\n{resumed_with('train', config, f'output_dir={tmp_path}/run')}\n"
    assert [said in error for error in run.errors] == [True, False], run.errors
    assert ["epoch 1/9" in output for output in run.outputs] == [True, False], run.outputs


FULL = """
import errno, os
import diffusion_align.writing as writing
rename = writing.rename
def full(source, target):
    if "checkpoints" in str(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rename(source, target)
writing.rename = full
"""


def test_a_full_disk_ends_both_processes_with_the_sentence(forked, settings, tmp_path):
    for said in end_in_a_sentence(forked, settings(), tmp_path, prelude=FULL):
        assert f"{tmp_path}/run/checkpoints/step_00000001 cannot be written (No space left" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_reward_that_fails_on_one_process_ends_both(forked, settings, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    _, said = end_in_a_sentence(forked, settings(reward=f"{tmp_path}/mine.py:only_one_fails"), tmp_path)
    assert "reward 'only_one_fails' raised" in said


def test_batches_that_do_not_fit_the_processes_are_refused(forked, settings, tmp_path):
    for said in end_in_a_sentence(forked, settings(samples_per_epoch=6), tmp_path):
        assert_problem([said], "samples_per_epoch", "multiple of 2 processes x sample_batch_size=2")
    assert not (tmp_path / "run").exists()


def test_an_empty_output_folder_is_free_for_both_processes(forked, settings, tmp_path):
    (tmp_path / "run").mkdir()
    forked.finish("train", settings(), f"output_dir={tmp_path}/run", processes=2)


def test_accelerate_launch(settings, tmp_path):
    """The documented launch line."""
    launch = ["--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "diffusion_align", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, settings(), f"output_dir={tmp_path}/run"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == [1, 1]
    assert result.stdout.count("\nreport: ") == 1


RECORD_SHARES = """
import json, os
from diffusion_align.diffusion import evaluation
sample_images = evaluation.sample_images
def recorded(policy, schedule, prompts, seed, purpose="show", *, first=0, **more):
    with open(f"{SCRATCH}/shares_{os.environ.get('WORLD_SIZE', 1)}_{os.environ.get('RANK', 0)}.jsonl", "a") as file:
        file.write(json.dumps([purpose, first, len(prompts)]) + "\\n")
    return sample_images(policy, schedule, prompts, seed, purpose, first=first, **more)
evaluation.sample_images = recorded
import diffusion_align.diffusion.trainer as trainer
trainer.sample_images = recorded
"""


def test_previews_and_evaluations_are_shared_and_every_image_stays_the_same(forked, settings, tmp_path):
    """Whole batches are divided: 5 previews in batches of 2 are 3 batches, 5 of the evaluation too."""
    prompts = [*PROMPTS, "a green car"]
    config = settings(
        grid_every=1,
        prompts=prompts,
        evaluation={"reward": "jpeg_incompressibility", "samples": 5, "every": 1, "diversity": "pixels"},
    )
    folders, _ = run_both(forked, config, tmp_path, RECORD_SHARES)
    one, first, second = (
        [tuple(json.loads(line)) for line in (tmp_path / f"shares_{name}.jsonl").read_text().splitlines()]
        for name in ("1_0", "2_0", "2_1")
    )
    for purpose, times in (("show", 4), ("evaluation", 2)):  # before, after, and both side by side
        whole, *shares = ([share for share in part if share[0] == purpose] for part in (one, first, second))
        assert whole == [(purpose, 0, 2), (purpose, 2, 2), (purpose, 4, 1)] * times
        assert shares == [[(purpose, 0, 2), (purpose, 2, 2)] * times, [(purpose, 4, 1)] * times]
    images = [(folder / "samples" / "epoch_0000.png").read_bytes() for folder in folders]
    assert images[0] == images[1]
    before = [rows_of(folder)[0] for folder in folders]  # of the weights before training, which are the same bits
    assert before[0]["gold"] == before[1]["gold"]
    assert before[0]["diversity"] == before[1]["diversity"]
    for name in ("epoch_0001.png", "before_after.png"):
        assert (folders[1] / "samples" / name).is_file()


def test_a_preview_that_fails_on_one_process_ends_both(forked, settings, tmp_path):
    failing = """
import os
from diffusion_align.diffusion import evaluation
from diffusion_align.errors import TrainingError
def fails(*arguments, **more):
    if os.environ["RANK"] == "1":
        raise TrainingError("the latents are not finite: lower learning_rate")
    return sample_images(*arguments, **more)
sample_images, evaluation.sample_images = evaluation.sample_images, fails
"""
    sentences = end_in_a_sentence(forked, settings(grid_every=1), tmp_path, prelude=failing)
    assert len(set(sentences)) == 1
    assert "the latents are not finite" in sentences[0]
