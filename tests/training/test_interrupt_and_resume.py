"""A run that is killed and resumed ends as the one that was left alone, bit for bit (CPU, float32)."""

import contextlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

_shared = runpy.run_path(str(Path(__file__).parent / "conftest.py"))
SETTINGS, NOISY = _shared["SETTINGS"], _shared["NOISY"]


def epochs_logged(folder):
    log = folder / "metrics.jsonl"
    with contextlib.suppress(OSError, ValueError):
        return sum("reward" in json.loads(line) for line in log.read_text().splitlines())
    return 0


def epochs_kept(folder):
    """Epochs that no resume runs again. A row may be logged and its checkpoint not yet written when the kill comes."""
    newest = max((path.name for path in (folder / "checkpoints").glob("step_*")), default="step_0")
    return int(newest.removeprefix("step_")) // SETTINGS["updates_per_epoch"]


QUICK = "import diffusion_align.report as report\nreport.write_report = lambda folder: None\n"


def test_three_kills_at_random_moments_change_nothing(forked, settings, tiny_sd, tmp_path, assert_same_run):
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


KILL = "import os, signal\ndie = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
# Each is run in the process before the command and kills it at one exact place, at the n-th pass through it.
MOMENTS = {
    "while sampling": """
from diffusion_align.diffusion.policy import DenoisingPolicy as owner
name, n, after = "decode", 4, False
""",
    "between two optimizer steps": """
from diffusion_align.training.optimization import Optimization as owner
name, n, after = "step", 2, False
""",
    "after the row, before the checkpoint": """
from diffusion_align.training.trainer import Trainer as owner
name, n, after = "save", 1, False
""",
    "before a checkpoint is renamed": """
import diffusion_align.writing as writing
rename = writing.rename
class owner: chosen = staticmethod(rename)
name, n, after = "chosen", 1, False
writing.rename = lambda a, b: (owner.chosen if "checkpoints/step_" in str(b) else rename)(a, b)
""",
    "after a checkpoint is renamed, the old ones still there": """
import diffusion_align.writing as writing
rename = writing.rename
class owner: chosen = staticmethod(rename)
name, n, after = "chosen", 1, True
writing.rename = lambda a, b: (owner.chosen if "checkpoints/step_" in str(b) else rename)(a, b)
""",
    "within a row": """
from diffusion_align.training.callbacks import MetricsLog as owner
def torn(self, row):
    with self.path.open("a") as file:
        file.write('{"step": 1')
name, n, after = "write", 2, False
die_now = die
def die():
    torn(self_of[0], {})
    die_now()
""",
}
HOOK = """
original, passes, self_of = getattr(owner, name), [0], [None]
def hooked(*arguments, **options):
    self_of[0] = arguments[0]
    passes[0] += 1
    if passes[0] == n and not after:
        die()
    result = original(*arguments, **options)
    if passes[0] == n:
        die()
    return result
setattr(owner, name, staticmethod(hooked) if isinstance(owner.__dict__[name], staticmethod) else hooked)
"""


@pytest.fixture(scope="module")
def calm(forked, tiny_sd, tmp_path_factory):
    """(config, folder) of a run on a tiny model that was left alone; its reward draws from the global random states."""
    scratch = tmp_path_factory.mktemp("calm")
    (scratch / "noisy.py").write_text(NOISY)
    config = scratch / "tiny.yaml"
    changes = {"model": str(tiny_sd), "reward": f"{scratch}/noisy.py:noisy", "keep_checkpoints": 1, "epochs": 7}
    config.write_text(yaml.safe_dump(SETTINGS | changes))
    run = forked("train", config, f"output_dir={scratch}/run")
    assert run.status == 0, run.error
    return config, scratch / "run"


def test_kills_at_every_delicate_place_change_nothing(forked, calm, tmp_path, assert_same_run, read_rows):
    """One run, killed once at each of the moments, every time within the first epoch or two after the resume."""
    (config, left_alone), harried = calm, tmp_path / "harried"
    expected = read_rows(left_alone)
    for moment, hook in MOMENTS.items():
        run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=KILL + hook + HOOK)
        assert run.status == -signal.SIGKILL, (moment, run)
        written = [json.loads(line) for line in whole_lines(harried / "metrics.jsonl")]
        untimed = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in written]
        assert untimed == expected[: len(untimed)], moment
    run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK)
    assert run.status == 0, run.error
    assert_same_run(harried, left_alone)
    assert not list(harried.rglob(".*")), "something aside was left behind"


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
    moment = KILL + MOMENTS["between two optimizer steps"].replace("2, False", "6, False") + HOOK
    assert forked("train", config, f"output_dir={harried}", prelude=moment).status == -signal.SIGKILL
    run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=QUICK + FAULTS[part])
    assert run.status == 0, run.error
    with pytest.raises(AssertionError):
        assert_same_run(harried, left_alone)


def test_signals_leave_a_checkpoint_and_resume_goes_on(forked, calm, tmp_path, assert_same_run):
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
        said = run.error.strip().splitlines()[-1]
        finished = epochs_logged(stopped)
        assert said == f"stopped after epoch {finished} of 7; go on with resume=true output_dir={stopped}"
        assert [p.name for p in (stopped / "checkpoints").iterdir()] == [f"step_{2 * finished:08d}"]
    run = forked(*arguments, prelude=QUICK)
    assert run.status == 0, run.error
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
    run = forked("train", config, f"output_dir={folder}", "resume=true")
    assert run.status == 0, run.error


def test_more_epochs_can_be_added_to_a_finished_run(forked, settings, tiny_sd, tmp_path, read_rows):
    config = settings(model=str(tiny_sd), epochs=1, lr_schedule="constant", warmup_steps=0)
    folder, straight = tmp_path / "run", tmp_path / "straight"
    for arguments in ([folder], [folder, "resume=true", "epochs=2"], [straight, "epochs=2"]):
        run = forked("train", config, f"output_dir={arguments[0]}", *arguments[1:], prelude=QUICK)
        assert run.status == 0, run.error
    assert read_rows(folder) == read_rows(straight)


def test_the_average_is_what_final_holds_and_the_checkpoint_keeps_both(calm):
    folder = calm[1]
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    trained, ema = (load_file(newest / f"{name}.safetensors") for name in ("trained", "ema"))
    final = load_file(folder / "final" / "pytorch_lora_weights.safetensors")
    assert any(not torch.equal(trained[k], ema[k]) for k in ema)
    assert sorted(v.sum().item() for v in final.values()) == sorted(v.sum().item() for v in ema.values())
    assert (folder / "report.html").stat().st_size > 1000
