"""Resume knows a run by the content of its model, data and rewards; what a failed run leaves; in this process."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_align.errors import CheckpointError, ConfigError, UserError
from diffusion_align.folder_lock import LOCK_FILE, FolderLock
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.rewards.base import RewardError
from diffusion_align.training.reading import load_yaml
from tests.helpers.tiny_runs import TINY

REWARD = """import scale_of_mine

def f(images, prompts, metadata):
    return scale_of_mine.SCALE * images.mean((1, 2, 3))
"""

SAMPLER = """from diffusion_align.diffusion.samplers import ddim

def sampler(scheduler, steps, options):
    return ddim(scheduler, steps, {"eta": 0.5})
"""


@pytest.fixture
def run(run_here):
    return lambda **settings: run_here(TINY | settings)


@pytest.fixture
def place(tmp_path, tiny_sd, monkeypatch):
    """A folder with a model, prompts, a reward in two files, and prompts and a reward to evaluate with."""
    shutil.copytree(tiny_sd, tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red apple\na cat\n")
    (tmp_path / "judged.txt").write_text("a dog\n")
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "steps.py").write_text(SAMPLER)
    (tmp_path / "gold.py").write_text("def g(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "scale_of_mine.py").write_text("SCALE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(os.sys.modules, "scale_of_mine", raising=False)
    return tmp_path


def settings_in(folder, **changes):
    evaluation = {"reward": f"{folder}/gold.py:g", "prompts": f"{folder}/judged.txt", "pictures": 2}
    return {
        "model": f"{folder}/model",
        "prompts": f"{folder}/prompts.txt",
        "reward": f"{folder}/mine.py:f",
        "sampler": TINY["sampler"] | {"name": f"{folder}/steps.py:sampler"},
        "evaluation": evaluation | {"diversity": "pixels"},
        "output_dir": f"{folder}/run",
    } | changes


@pytest.fixture
def begun(place, run):
    """That folder, with a run of one epoch in it."""
    run(**settings_in(place))
    return place


def scaled(folder):
    file = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


CHANGES = {
    "model": (scaled, "model"),
    "prompts": (write("prompts.txt", "a red apple\na dog\n"), "prompts.txt"),
    "reward": (write("mine.py", REWARD.replace("return ", "return -100 * ")), "mine.py"),
    "reward's other file": (write("scale_of_mine.py", "SCALE = 3\n"), "scale_of_mine.py"),
    "sampler": (write("steps.py", SAMPLER.replace("0.5", "0.4")), "steps.py"),
    "evaluation": (write("judged.txt", "a cat\n"), "judged.txt"),
    "evaluation's reward": (write("gold.py", "def g(images, *_):\n    return images.sum((1, 2, 3))\n"), "gold.py"),
}


def test_changed_content_is_another_run(begun, run):
    """Each change alone, under the same names, is refused and named; the state of the run stays as it was."""
    keep = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and "__pycache__" not in str(path)}
    for what, (change, file) in CHANGES.items():
        change(begun)
        with pytest.raises(CheckpointError) as refused:
            run(**settings_in(begun, resume=True, epochs=2))
        setting, sentence = what.partition("'")[0], str(refused.value)
        assert f"belongs to a run with other content of {setting} ({begun / file}): put it back" in sentence, what
        assert sentence.endswith(f"or set accept_changed=[{setting}] to resume with what is there now"), what
        assert "\n" not in sentence
        for path, content in keep.items():
            path.write_bytes(content)
    for path in keep:
        os.utime(path, (1, 1))  # dates do not count
    assert run(**settings_in(begun, resume=True, epochs=2)).epoch == 2


def test_the_same_content_elsewhere_is_the_same_run_and_a_change_can_be_accepted(begun, run, capfd):
    """Moved to another folder, and the prompts in another kind of file; then the reward is corrected."""
    moved = begun / "moved"
    moved.mkdir()
    shutil.move(begun / "model", moved / "model")
    (begun / "prompts.txt").unlink()
    (moved / "prompts.jsonl").write_text('{"prompt": "a red apple"}\n{"prompt": "a cat"}\n')
    changes = {"model": f"{moved}/model", "prompts": f"{moved}/prompts.jsonl", "resume": True, "epochs": 2}
    changes |= {"micro_batch_size": 1, "sample_batch_size": 1}
    assert run(**settings_in(begun, **changes)).epoch == 2
    said = capfd.readouterr().err
    assert (
        "resumed with sample_batch_size=1 (was 2), micro_batch_size=1 (was 2): from here on, results may differ" in said
    )

    (begun / "mine.py").write_text(REWARD + "# corrected\n")
    changes |= {"epochs": 3}
    with pytest.raises(CheckpointError, match=r"accept_changed=\[reward\]"):
        run(**settings_in(begun, **changes))
    assert run(**settings_in(begun, **changes, accept_changed=["reward"])).epoch == 3
    assert load_yaml(begun / "run" / "config.yaml")["accept_changed"] == [], "it accepts nothing that comes later"
    changes |= {"epochs": 4}
    capfd.readouterr()
    assert run(**settings_in(begun, **changes)).epoch == 4  # it belongs to the run from now on
    assert "resumed with" not in capfd.readouterr().err

    newest = sorted((begun / "run" / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_text())
    assert set(state.pop("identity")) == {"model", "prompts", "reward", "sampler", "evaluation"}
    state["config"] = {
        k: v for k, v in state["config"].items() if k != "accept_changed"
    }  # as an older version wrote it
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    from diffusion_align.training.checkpoint import _sha256

    (newest / "manifest.json").write_text(json.dumps(manifest | {"state.json": _sha256(newest / "state.json")}))
    assert run(**settings_in(begun, **(changes | {"epochs": 5}))).epoch == 5
    lines = [line for line in capfd.readouterr().err.splitlines() if "a change was not checked for" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"warning: {newest} does not record the content of its model, data and rewards")


def pairs_folder(folder):
    (folder / "pairs").mkdir()
    rows = []
    for i in range(2):
        for side in ("chosen", "rejected"):
            Image.new("RGB", (16, 16), (100 * i, 80 if side == "chosen" else 160, 0)).save(
                folder / "pairs" / f"{i}_{side}.png"
            )
        rows.append({"prompt": f"a {i}", "chosen": f"{i}_chosen.png", "rejected": f"{i}_rejected.png"})
    (folder / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_overwritten_images_of_pairs(place, run):
    pairs_folder(place)
    settings = {"method": "diffusion_dpo", "model": f"{place}/model", "pairs": f"{place}/pairs", "beta": 1.0}
    settings |= {"output_dir": f"{place}/run"}
    run(**settings)
    latents = (place / "run" / "latents" / "00000.safetensors").read_bytes()
    path = place / "pairs" / "1_rejected.png"
    kept = path.read_bytes()
    Image.new("RGB", (16, 16), (1, 2, 3)).save(path)
    resumed = settings | {"resume": True, "epochs": 2}
    with pytest.raises(CheckpointError, match=rf"other content of pairs \({place}/pairs\)"):
        run(**resumed)
    assert (place / "run" / "latents" / "00000.safetensors").read_bytes() == latents
    run(**resumed, accept_changed=["pairs"])  # their latents are made again
    assert (place / "run" / "latents" / "00000.safetensors").read_bytes() != latents
    path.write_bytes(kept)
    shutil.rmtree(place / "run" / "checkpoints")  # as after a kill while encoding: other images, and another model
    run(**resumed)
    assert (place / "run" / "latents" / "00000.safetensors").read_bytes() == latents
    shutil.rmtree(place / "run" / "checkpoints")
    vae = place / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(vae).items()}, vae, metadata={"format": "pt"})
    run(**resumed)
    assert (place / "run" / "latents" / "00000.safetensors").read_bytes() != latents


def test_a_run_that_fails_before_anything_is_trained_leaves_no_folder(place, run):
    """And none is advised to be resumed; one that fails later is, also where it failed before."""
    calls = []

    def fails_after(count):
        def reward(images, prompts, metadata):
            calls.append(1)
            if len(calls) > count:
                raise ValueError("no")
            return images.mean((1, 2, 3))

        return reward

    settings = settings_in(place, evaluation=None, epochs=3, output_dir=f"{place}/deep/run")
    with pytest.raises(RewardError) as failed:
        run(**settings | {"reward": fails_after(1)})  # the check, and not once more
    assert not getattr(failed.value, "__notes__", [])
    assert not (place / "deep").exists()
    (place / "deep" / "run").mkdir(parents=True)
    with pytest.raises(RewardError):
        run(**settings | {"reward": fails_after(0)})
    calls.clear()
    with pytest.raises(RewardError):
        run(**settings | {"reward": fails_after(1)})
    assert not list((place / "deep" / "run").iterdir())  # it was there before

    calls.clear()
    with pytest.raises(RewardError) as failed:
        run(**settings | {"reward": fails_after(2)})
    advised = [f"resume with: build_trainer(DDPOConfig(..., output_dir='{place}/deep/run', resume=True)).train()"]
    assert failed.value.__notes__ == advised
    calls.clear()
    with pytest.raises(RewardError) as failed:
        run(**settings | {"reward": fails_after(1), "resume": True})
    assert failed.value.__notes__ == advised
    calls.clear()
    assert run(**settings | {"reward": fails_after(99), "resume": True}).epoch == 3


def test_a_kill_while_trackers_start_leaves_a_run_that_can_be_resumed(place, run, monkeypatch):
    def killed(self, *arguments, **options):
        (place / "run" / "diffusion-align").mkdir()
        raise KeyboardInterrupt  # as a kill: nothing is tidied up

    settings = settings_in(place, evaluation=None, trackers=["tensorboard"])
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "init_trackers", killed)
        with pytest.raises(KeyboardInterrupt):
            run(**settings)
    with pytest.raises(ConfigError, match="is already used: choose another, or set resume=true"):
        check_config(TINY | settings)
    assert run(**settings, resume=True).epoch == 1


def test_a_folder_in_use_is_refused_before_anything_is_loaded_and_a_free_one_is_new(place, run, run_here):
    settings = settings_in(place, evaluation=None)
    folder = Path(settings["output_dir"])
    folder.mkdir()
    in_use = rf"is in use by process {os.getpid()} on .*: wait until it ends"
    with FolderLock(folder), pytest.raises(ConfigError, match=in_use):
        check_config(TINY | settings | {"resume": True})
    (folder / LOCK_FILE).write_text("1 elsewhere\n")  # of a process that was killed
    config = check_config(TINY | settings)
    with FolderLock(folder), pytest.raises(UserError, match="is in use by process"):
        run_here(config)  # both began at once
    assert not list(folder.iterdir())
    seen = []

    def reward(images, prompts, metadata):
        seen.append((folder / LOCK_FILE).is_file())
        return torch.zeros(len(images))

    run(**settings | {"reward": reward})
    assert seen[-1]
    assert not (folder / LOCK_FILE).exists()
