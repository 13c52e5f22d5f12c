"""Diffusion-DPO in two processes: the same rows and weights as in one, every latent encoded once, nobody waits."""

import json

import pytest

from tests.helpers.flow_models import SIDE
from tests.helpers.hard_runs import rows_of
from tests.helpers.kills import QUICK
from tests.helpers.noise_pairs import write_noise_pairs
from tests.helpers.problems import assert_problem
from tests.helpers.two_processes import (
    PLAIN_STEPS,
    assert_same_gradients,
    assert_same_weights,
    end_in_a_sentence,
    run_both,
)

PROMPTS = ["a red apple", "a cat", "a dog", "a blue car"]
DPO = {
    "method": "diffusion_dpo",
    "reward": ...,
    "prompts": ...,
    "beta": 0.5,
    "epochs": 2,
    "updates_per_epoch": 2,
    "show_prompts": ["a cat"],
    "timestep_range": [0, 0.6],  # near the image errors are thousands of nats, and so is what float32 rounds
    "learning_rate": 0.01,
}
OFFLINE = DPO | {"seed": 2, "pairs": {"source": "emoji_style", "max_pairs": 10}}
ONLINE = DPO | {"prompts": PROMPTS, "reward": "jpeg_compressibility", "group_size": 4, "samples_per_epoch": 16}
# Two pairs per file; a line for each file that is encoded and by whom.
FILES = """
import time
import diffusion_align.diffusion.latent_cache as cache
cache._SHARD = 2
write = cache.LatentCache._write
def noted(self, number, *latents):
    with open(f"{SCRATCH}/written", "a") as file:
        file.write(f"{os.environ.get('WORLD_SIZE', 1)} {os.environ.get('RANK', 0)} {number}\\n")
    if number == 4:  # the last one, which the other process needs and does not write
        time.sleep(2)
    write(self, number, *latents)
cache.LatentCache._write = noted
"""
# mixed_precision=auto means what is faster, and a busy machine would choose by chance.
SAME_PRECISION = (
    "import diffusion_align.pipelines.image_context as context\n"
    "context.measure_policy = lambda *_: ({'mixed_precision': 'no'}, '')\n"
)
PRELUDE = FILES + PLAIN_STEPS + SAME_PRECISION
REWARD = """
def only_one_fails(images, prompts, metadata):
    import os
    if os.environ.get("RANK") == "1" and len(images) == 2:  # the dummy batch is of three
        raise RuntimeError("no answer")
    return images.mean(dim=(1, 2, 3))

def by_place(images, prompts, metadata):
    import torch
    flat = torch.tensor([bool(m.get("flat")) for m in metadata])
    return torch.where(flat, torch.ones(len(images)), images.mean(dim=(1, 2, 3)))
"""


@pytest.fixture
def write(settings):
    """``write(**changes)``: the path of a configuration; a value of ``...`` drops the key."""
    import yaml

    def make(**changes):
        path = settings(**{k: None if v is ... else v for k, v in changes.items()})
        raw = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump({k: v for k, v in raw.items() if changes.get(k) is not ...}))
        return path

    return make


def assert_same(folders, gradients):
    """Rows and weights to 1e-6, and gradients that are there to compare."""
    assert_same_gradients(gradients, 5e-4, least=0)  # a small difference of large errors
    a, b = (rows_of(folder) for folder in folders)
    assert [row.keys() for row in a] == [row.keys() for row in b]
    for mine, theirs in zip(a, b):
        # A pair of four that rounding decides: at the start all margins are about 0.
        assert mine.pop("rewards/accuracies", 0) == pytest.approx(theirs.pop("rewards/accuracies", 0), abs=0.26)
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6 * max(1, mine.get("error/reference", 0)))
    weights = assert_same_weights(folders)
    assert any(value.abs().max() > 1e-5 for name, value in weights.items() if "lora_B" in name), "they have not moved"


CASES = {
    "offline": OFFLINE,
    "offline, corrected": OFFLINE
    | {
        "variant": "corrected",
        "mixed_precision": "auto",  # measured before there is an Accelerator
        "old_refresh": "epoch",
        "inner_epochs": 2,
        "updates_per_epoch": 1,
        "caption_dropout": 0.4,
        "decisions_per_pair": 2,
        "target": "posterior_sample",
        "micro_batch_size": 3,
    },
    "offline, buckets": OFFLINE | {"pairs": ..., "bucket_step": 8, "inner_epochs": 2, "micro_batch_size": 3},
    "offline, buckets, adapters drop out": OFFLINE
    | {"pairs": ..., "bucket_step": 8, "micro_batch_size": 3, "lora": {"rank": 2, "dropout": 0.3}, "steps_per_pair": 2},
    "online": ONLINE,
    # One pair a pass: rounding is the same on any process until the gradients are summed.
    "offline, buckets of FLUX": OFFLINE
    | {"pairs": ..., "bucket_step": 8, "resolution": SIDE, "step_draw": "logit_normal"}
    | {"epochs": 1, "micro_batch_size": 1, "timestep_range": [0, 0.3]},
    "offline, adapters drop out": OFFLINE | {"lora": {"rank": 2, "dropout": 0.3, "dora": True}, "steps_per_pair": 2},
}
# Of the model's 16 x 16 pixels: four in that bucket, and two in each of three others.
SIZES = [(64, 64), (20, 60), (64, 16), (90, 90), (60, 20), (10, 31), (64, 64), (80, 20), (70, 70), (24, 8)]


@pytest.mark.parametrize("case", CASES)
def test_half_the_pairs_each_is_the_same_run(forked, write, model_path, tmp_path, case):
    changes = CASES[case] | {"model": model_path("tiny_flux" if "FLUX" in case else "tiny_sd")}
    if "buckets" in case:
        changes = changes | {"pairs": str(write_noise_pairs(tmp_path / "pairs", SIZES, PROMPTS))}
    folders, gradients = run_both(forked, write(**changes), tmp_path, PRELUDE)
    assert_same(folders, gradients)
    if "online" in case:
        return
    lines = sorted((tmp_path / "written").read_text().splitlines())
    # Files in turn: one process writes 0 to 4, of two the first 0, 2, 4 and the second 1, 3.
    assert lines == [f"1 0 {n}" for n in range(5)] + ["2 0 0", "2 0 2", "2 0 4", "2 1 1", "2 1 3"]
    one, two = (sorted((folder / "latents").iterdir()) for folder in folders)
    assert [p.name for p in one] == [p.name for p in two] == [f"{n:05d}.safetensors" for n in range(5)]
    for a, b in zip(one, two):
        assert a.read_bytes() == b.read_bytes()


FAULTS = {
    "streams by place in the process": "import diffusion_align.diffusion.dpo as dpo\n"
    "real = dpo.generator\n"
    "dpo.generator = lambda seed, name, epoch, i: real(seed, name, epoch, i % 4 if os.environ.get('RANK') else i)\n",
    "gradients not summed": "Accelerator.reduce = lambda self, tensor, reduction: tensor\n",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices(forked, write, tmp_path, fault):
    folders, gradients = run_both(forked, write(**OFFLINE | {"epochs": 1}), tmp_path, PRELUDE + FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_same(folders, gradients)


def test_groups_stay_on_one_process(forked, write, tmp_path):
    """Every pair is two images of one prompt, drawn where it is trained on."""
    note = f"""
import json, os
from diffusion_align.diffusion.dpo import DiffusionDPOTrainer
judged = DiffusionDPOTrainer._judged
def noted(self):
    batch, metrics = judged(self)
    own, kept = self.local_samples, batch.keep.tolist()
    pairs = [(i, own.start + int(batch.rejected[i - own.start])) for i in kept if i in own]
    with open({str(tmp_path)!r} + f"/{{self.accelerator.process_index}}", "w") as file:
        json.dump({{"own": [own.start, own.stop], "keep": kept, "pairs": pairs}}, file)
    return batch, metrics
DiffusionDPOTrainer._judged = noted
"""
    config = write(**ONLINE | {"epochs": 1, "updates_per_epoch": 1})
    forked.finish("train", config, f"output_dir={tmp_path}/run", processes=2, prelude=QUICK + note, timeout=90)
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert found[0]["keep"] == found[1]["keep"]
    assert len(found[0]["keep"]) == 4
    assert sorted(i for part in found for i, _ in part["pairs"]) == found[0]["keep"]
    for part in found:
        for chosen, rejected in part["pairs"]:
            assert chosen // 4 == rejected // 4
            assert chosen != rejected
            assert part["own"][0] <= rejected < part["own"][1]


@pytest.mark.parametrize("flat", [PROMPTS[:3], PROMPTS], ids=["three", "all"])
def test_tied_groups_leave_processes_with_unequal_work(forked, write, tmp_path, flat):
    (tmp_path / "mine.py").write_text(REWARD)
    prompts = [{"prompt": p, "flat": p in flat} for p in PROMPTS]
    changes = {"prompts": prompts, "reward": f"{tmp_path}/mine.py:by_place", "epochs": 1, "ema_decay": 0.5}
    config = write(**ONLINE | changes)
    forked.finish("train", config, f"output_dir={tmp_path}/run", processes=2, prelude=QUICK, timeout=90)
    last = rows_of(tmp_path / "run")[-1]
    assert last["samples_used"] == 4 - len(flat)
    assert last["frac_reward_zero_std"] == len(flat) / 4


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (ONLINE | {"samples_per_epoch": 12}, "multiple of 2 processes x group_size=4"),
        (OFFLINE | {"samples_per_epoch": 6}, "multiple of 2 processes x sample_batch_size=2"),
    ],
    ids=["groups", "pairs"],
)
def test_a_division_without_a_rest_is_asked_for(forked, write, tmp_path, changes, kind):
    for said in end_in_a_sentence(forked, write(**changes), tmp_path):
        assert_problem([said], "samples_per_epoch", kind)
    assert not (tmp_path / "run").exists()


def test_a_judge_that_fails_on_one_process_stops_both(forked, write, tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    config = write(**ONLINE | {"reward": f"{tmp_path}/mine.py:only_one_fails"})
    for said in end_in_a_sentence(forked, config, tmp_path):
        assert_problem([said], "reward 'only_one_fails'", "raised")
    assert not (tmp_path / "run").exists()  # nothing was trained, so the same command can be run again


def test_divergence_stops_both_processes(forked, write, tmp_path):
    changes = {"variant": "corrected", "kl_coef": 0, "learning_rate": 1.0, "max_winner_error": 1.05}
    config = write(**OFFLINE | changes | {"updates_per_epoch": 1, "checkpoint_every": 1})
    for said in end_in_a_sentence(forked, config, tmp_path, "lora=null"):
        assert_problem([said], "the policy diverges", "max_winner_error=1.05")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]


def test_a_run_killed_while_encoding_goes_on_in_two_processes(forked, write, tmp_path):
    """One process encodes some files and is stopped; two finish; the run is as one that was left alone."""
    config = write(**OFFLINE | {"checkpoint_every": 1})
    stop = """
import os, signal
import diffusion_align.diffusion.latent_cache as cache
cache._SHARD = 2
write, calls = cache.LatentCache._write, [0]
def stopped(self, number, *latents):
    write(self, number, *latents)
    calls[0] += 1
    if calls[0] == 2 and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.SIGINT)
cache.LatentCache._write = stopped
"""
    small = QUICK + "import diffusion_align.diffusion.latent_cache as cache\ncache._SHARD = 2\n"
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    forked.finish("train", config, f"output_dir={calm}", processes=2, prelude=small)
    run = forked("train", config, f"output_dir={stopped}", processes=2, prelude=stop, timeout=60)
    assert run.statuses == [130, 130], run.errors
    assert len(list((stopped / "latents").iterdir())) == 4
    assert [p.name for p in (stopped / "checkpoints").iterdir()] == ["step_00000000"]
    forked.finish("train", config, f"output_dir={stopped}", "resume=true", processes=2, prelude=small)
    assert rows_of(stopped) == rows_of(calm)
    a, b = (sorted((f / "checkpoints").iterdir())[-1] / "trained.safetensors" for f in (calm, stopped))
    assert a.read_bytes() == b.read_bytes()
