"""A run that is killed and resumed ends as the one that was left alone, bit for bit (CPU, float32)."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hard_runs import HARD_RUN, SIZED, assert_same_run, rows_of
from tests.helpers.kills import HOOK, KILL, QUICK, STEP, UPDATING, place, resumed_with


def epochs_logged(folder):
    log = folder / "metrics.jsonl"
    with contextlib.suppress(OSError, ValueError):
        return sum("reward" in json.loads(line) for line in log.read_text().splitlines())
    return 0


def epochs_kept(folder):
    """Epochs that no resume runs again. A row may be logged and its checkpoint not yet written when the kill comes."""
    newest = max((path.name for path in (folder / "checkpoints").glob("step_*")), default="step_0")
    return int(newest.removeprefix("step_")) // HARD_RUN["updates_per_epoch"]


def test_three_kills_at_random_moments_change_nothing(forked, settings, tiny_sd, tmp_path):
    """The last to resume is an interpreter of its own, which shares nothing with those before but the files."""
    config = settings(model=str(tiny_sd), epochs=7)  # the kills end at the fifth
    calm, harried = tmp_path / "calm", tmp_path / "harried"
    resume = ["train", str(config), f"output_dir={harried}", "resume=true"]
    left_alone = forked("train", config, f"output_dir={calm}", timeout=200, prelude=QUICK)
    assert left_alone.status == 0, left_alone.error
    epoch_seconds = [
        json.loads(line).get("time/epoch", 0) for line in (calm / "metrics.jsonl").read_text().splitlines()
    ]
    seed = random.randrange(2**32)
    draw = random.Random(seed)
    print(f"kill moments drawn from seed {seed}")
    for lived in (1, 2, 3):
        pids, deadline = forked.start(*resume), time.monotonic() + 60
        while epochs_kept(harried) < lived and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, max(epoch_seconds)))
        os.kill(pids[0], signal.SIGKILL)
        run = forked.wait(pids)
        assert run.status == -signal.SIGKILL, f"the run ended before it was killed\n{run.error}"
        assert epochs_kept(harried) >= lived, "no new checkpoint"
    code = f"{QUICK}import sys\nsys.argv[1:] = {resume}\nfrom diffusion_align.cli import main\nmain()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=200)
    assert_same_run(harried, calm)


MOMENTS = {
    "while sampling": place("diffusion_align.diffusion.policy.DenoisingPolicy", "decode", 4),
    **UPDATING,
    "within a row": place("diffusion_align.training.callbacks.MetricsLog", "write", 2)
    + """
def torn(self, row):
    with self.path.open("a") as file:
        file.write('{"step": 1')
die_now = die
def die():
    torn(self_of[0], {})
    die_now()
""",
}


@pytest.fixture(scope="module")
def calm(left_alone, tiny_sd):
    """(config, folder) of a run on a tiny model that was left alone; its reward draws from the global random states."""
    changes = {"model": str(tiny_sd), "keep_checkpoints": 1, "epochs": 7, **SIZED}
    return left_alone(lambda scratch, _: HARD_RUN | changes | {"reward": f"{scratch}/noisy.py:noisy"})(None)


def test_kills_at_every_delicate_place_change_nothing(forked, calm, tmp_path):
    """One run, killed once at each of the moments, every time within the first epoch or two after the resume."""
    (config, left_alone), harried = calm, tmp_path / "harried"
    expected = rows_of(left_alone)
    for moment, hook in MOMENTS.items():
        run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=KILL + hook + HOOK)
        assert run.status == -signal.SIGKILL, (moment, run)
        written = [json.loads(line) for line in whole_lines(harried / "metrics.jsonl")]
        written = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in written]
        assert written == expected[: len(written)], moment
    forked.finish("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK)
    assert_same_run(harried, left_alone)
    assert not list(harried.rglob(".*")), "a temporary file was left behind"


def whole_lines(path):
    return [line for line in path.read_text().split("\n")[:-1] if line] if path.exists() else []


FAULTS = {
    "prompt statistics": "from diffusion_align.diffusion.ddpo import DDPOTrainer\n"
    "DDPOTrainer.load_extra_state = lambda *a: None",
    "optimizer": "import accelerate.optimizer as o\no.AcceleratedOptimizer.load_state_dict = lambda *a: None",
    "learning rate": "import torch\ntorch.optim.lr_scheduler.LambdaLR.load_state_dict = lambda *a: None",
    "random state": "from diffusion_align.training import checkpoint\ncheckpoint.set_rng_state = lambda s: None",
    "ema": "import diffusers.training_utils as t\nload = t.EMAModel.step\n"
    "import diffusion_align.training.trainer as loop\nkept = loop.checkpoint.load_checkpoint\n"
    "def without(path):\n w, t, s = kept(path)\n w['ema'] = w['trained']\n return w, t, s\n"
    "loop.checkpoint.load_checkpoint = without",
}


@pytest.mark.slow
@pytest.mark.parametrize("part", FAULTS)
def test_the_comparison_notices_a_part_that_is_not_restored(forked, calm, tmp_path, assert_same_run, part):
    (config, left_alone), harried = calm, tmp_path / "harried"
    moment = KILL + place(STEP, "step", 6) + HOOK
    assert forked("train", config, f"output_dir={harried}", prelude=moment).status == -signal.SIGKILL
    forked.finish("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK + FAULTS[part])
    with pytest.raises(AssertionError):
        assert_same_run(harried, left_alone)


def test_signals_leave_a_checkpoint_and_resume_goes_on(forked, calm, tmp_path):
    """Ctrl-C once, SIGTERM once; with checkpoints far apart, so that only the signal can have written one."""
    (config, left_alone), stopped = calm, tmp_path / "stopped"
    arguments = ["train", config, f"output_dir={stopped}", "resume=true", "checkpoint_every=100"]
    for number, epochs in ((signal.SIGINT, 1), (signal.SIGTERM, 3)):
        pids = forked.start(*arguments)
        deadline = time.monotonic() + 60
        while epochs_logged(stopped) < epochs and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pids[0], number)
        run = forked.wait(pids)
        assert run.status == 130, run
        assert "Traceback" not in run.error
        finished = epochs_logged(stopped)
        assert run.error.strip().splitlines()[-2:] == [f"stopped after epoch {finished} of 7", resumed_with(*arguments)]
        assert [p.name for p in (stopped / "checkpoints").iterdir()] == [f"step_{2 * finished:08d}"]
    forked.finish(*arguments, prelude=QUICK)
    assert_same_run(stopped, left_alone)


def test_a_second_signal_says_how_to_resume(forked, calm, tmp_path):
    """It ends the run at once, in the middle of the third epoch; what was saved before stands."""
    # Two at once may arrive as one; and a shell's background job ignores SIGINT, which a process inherits.
    twice = "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    twice += "die = lambda: [(os.kill(os.getpid(), signal.SIGINT), time.sleep(0.2)) for _ in range(2)]\n"
    (config, left_alone), stopped = calm, tmp_path / "stopped"
    arguments = ["train", config, f"output_dir={stopped}", "resume=true"]
    run = forked(*arguments, prelude=QUICK + twice + place(STEP, "step", 6) + HOOK)
    assert run.status == 130, run
    assert run.error.strip().splitlines()[-2:] == ["stopped", f"the last checkpoint stands; {resumed_with(*arguments)}"]
    forked.finish(*arguments, prelude=QUICK)
    assert_same_run(stopped, left_alone)


def test_stopping_twice_in_one_epoch_and_a_kill_while_saving_again_keep_the_checkpoint(
    forked, settings, tiny_sd, tmp_path
):
    """The checkpoint of this step exists already when the second one is written: a kill must not lose it."""
    config = settings(model=str(tiny_sd), epochs=3, keep_checkpoints=1)
    folder = tmp_path / "run"
    stop = """
import os, signal
from diffusion_align.diffusion.policy import DenoisingPolicy
decode, calls = DenoisingPolicy.decode, [0]
def decode_and_signal(self, latents):
    calls[0] += 1
    if calls[0] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return decode(self, latents)
DenoisingPolicy.decode = decode_and_signal
"""
    die = """
import diffusion_align.training.checkpoint as checkpoint
import shutil
def rmtree(path, *a, **k):
    existed = path.exists()
    shutil.rmtree(path, *a, **k)
    if existed and path.name.startswith("step_"):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.shutil = type("shutil", (), {"rmtree": rmtree})
"""
    run = forked("train", config, f"output_dir={folder}", prelude=stop + die)
    assert run.status in (130, -signal.SIGKILL), run  # killed only if it would have deleted the checkpoint
    assert [p.name for p in (folder / "checkpoints").glob("step_*")] == ["step_00000002"]
    forked.finish("train", config, f"output_dir={folder}", "resume=true")


def test_more_epochs_can_be_added_to_a_finished_run(forked, settings, tiny_sd, tmp_path):
    config = settings(model=str(tiny_sd), epochs=1, lr_schedule="constant", warmup_steps=0)
    folder, straight = tmp_path / "run", tmp_path / "straight"
    for arguments in ([folder], [folder, "resume=true", "epochs=2"], [straight, "epochs=2"]):
        forked.finish("train", config, f"output_dir={arguments[0]}", *arguments[1:], prelude=QUICK)
    assert rows_of(folder) == rows_of(straight)


def test_the_average_is_what_final_holds_and_the_checkpoint_keeps_both(calm):
    folder = calm[1]
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    trained, ema = (load_file(newest / f"{name}.safetensors") for name in ("trained", "ema"))
    final = load_file(folder / "final" / "pytorch_lora_weights.safetensors")
    assert any(not torch.equal(trained[k], ema[k]) for k in ema)
    assert sorted(v.sum().item() for v in final.values()) == sorted(v.sum().item() for v in ema.values())
    assert (folder / "report.html").stat().st_size > 1000
