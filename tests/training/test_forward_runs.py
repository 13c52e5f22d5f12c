"""Forward-process training as runs: resumed bit for bit, in two processes, and what is refused before it begins."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.flow_models import SIDE
from tests.helpers.problems import assert_problem
from tests.helpers.tiny_runs import IMAGE_RUN

FORWARD = IMAGE_RUN | {
    "method": "forward",
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "micro_batch_size": 4,
    "updates_per_epoch": 2,
    "group_size": 2,
    "advantages": "group",
    "learning_rate": 0.01,
    "consistency_images": 0,
    "mixed_precision": "no",
    "checkpoint_every": 1,
}
RUNS = {
    "lora, text encoder": ("tiny_sd", {"lora": {"rank": 2, "text_encoder": True}, "ema_decay": 0.5}),
    "all weights": ("tiny_sd", {"lora": None, "learning_rate": 1e-3, "objective": "dgpo", "kl_coef": 0.1}),
    "flow": ("tiny_sd3", {"objective": "crd", "consistency_images": 2, "gradient_checkpointing": True}),
    "flow, all weights": ("tiny_sd3", {"lora": None, "learning_rate": 1e-3, "objective": "awm", "ema_decay": 0.5}),
}


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.mark.parametrize(("model", "changes"), RUNS.values(), ids=RUNS)
def test_a_run_resumes_bit_for_bit(model, changes, model_path, run_here, tmp_path):
    settings = FORWARD | {"model": model_path(model), "epochs": 2, "old_decay": 0.5} | changes
    folders = [tmp_path / "whole", tmp_path / "parts"]
    trainer = run_here(settings | {"output_dir": str(folders[0])})
    parts = settings | {"output_dir": str(folders[1])}
    run_here(parts | {"epochs": 1})
    run_here(parts | {"resume": True})
    assert rows_of(folders[0]) == rows_of(folders[1])
    newest = [sorted((folder / "checkpoints").iterdir())[-1] for folder in folders]
    names = {path.name for path in newest[0].glob("*.safetensors")}
    assert names == {"trained.safetensors", "snapshot_old.safetensors"} | (
        {"ema.safetensors"} if "ema_decay" in changes else set()
    )
    found = {}
    for name in names:
        found[name], again = (load_file(folder / name) for folder in newest)
        assert found[name].keys() == again.keys() == trainer.trainable.keys()
        assert all(torch.equal(value, again[key]) for key, value in found[name].items())
    old, new = found["snapshot_old.safetensors"], found["trained.safetensors"]
    assert any(not torch.equal(old[key], new[key]) for key in new)
    assert all(torch.equal(new[key], value) for key, value in trainer.trainable.items())
    updates = [row for row in rows_of(folders[0]) if "kl_old" in row]
    assert updates[0]["kl_old"] == 0 < updates[-1]["kl_old"]
    used = {row["samples_used"] for row in rows_of(folders[0]) if "samples_used" in row}
    assert used == {settings["samples_per_epoch"]}  # images, also where groups are trained on together
    if trainer.policy.has_reference:
        assert [row for row in rows_of(folders[0]) if "kl_path" in row][-1]["kl_path"] > 0
    if "consistency_images" in changes:
        assert "self_consistency" in rows_of(folders[0])[0]


REFUSED = [
    ({"objective": "dgpo", "micro_batch_size": 3}, "objective", "whole groups in a micro-batch: set micro_batch_size"),
    ({"objective": "crd", "micro_batch_size": 1}, "objective", "whole groups in a micro-batch: set micro_batch_size"),
    (
        {"objective": "crd", "group_size": 1, "advantages": "prompt_history"},
        "objective",
        "compares images of one prompt: set group_size to 2 or more",
    ),
    ({"objective": "crd", "updates_per_epoch": 3}, "updates_per_epoch", "each update needs at least one group"),
    ({"samples_per_epoch": 6, "group_size": 4, "sample_batch_size": 6}, "samples_per_epoch", "multiple of group_size"),
    ({"objective": "awm", "beta": 0.5}, "beta", "no effect with objective=awm: leave it out"),
    ({"clip_range_nats": 1.0}, "clip_range_nats", "no effect with objective=nft: leave it out"),
    ({"advantage_clip": float("inf")}, "advantage_clip", "leaves objective=nft no scale of the advantages"),
    ({"timestep_range": [0.6, 0.5]}, "timestep_range", "must be two numbers 0 <= first < last <= 1"),
    ({"lora": {"rank": 2, "dropout": 0.1}}, "lora.dropout", ""),
    ({"consistency_images": 1}, "consistency_images", "set 2 or more, or 0"),
    ({"sampler": {"steps": 2, "noisy_steps": 1}}, "sampler.noisy_steps", "leave it out"),
    ({"old_decay": 1.0}, "old_decay", "less than 1"),
]


@pytest.mark.parametrize(("changes", "setting", "kind"), REFUSED)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, setting, kind, call_cli, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FORWARD | changes))
    status, _, errors = call_cli("train", tmp_path / "tiny.yaml", f"output_dir={tmp_path}/run")
    assert status == 2
    assert_problem(errors, setting, kind)
    assert not (tmp_path / "run").exists()


def test_more_draws_than_noise_levels_are_refused_before_training(call_cli, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FORWARD | {"steps_per_image": 1200}))
    arguments = [tmp_path / "tiny.yaml", f"output_dir={tmp_path}/run"]
    for command in ("doctor", "train"):
        status, output, errors = call_cli(command, *arguments)
        assert status == 2 or command == "doctor"
        assert "fewer than steps_per_image=1200" in " ".join((output + errors).split())
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_guidance_distilled_model_is_refused_before_it_is_loaded(model_path, call_cli, tmp_path, monkeypatch):
    """Its configuration is enough: without weights the sentence is the same. Of FLUX.1-dev none is here."""
    shutil.copytree(model_path("tiny_flux"), tmp_path / "flux")
    for weights in (tmp_path / "flux").rglob("*.safetensors"):
        weights.unlink()
    settings = FORWARD | {"model": str(tmp_path / "flux"), "resolution": SIDE}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    status, _, errors = call_cli("train", tmp_path / "tiny.yaml", f"output_dir={tmp_path}/run")
    assert status == 2
    assert_problem(errors, "this model", "is guidance-distilled (guidance_embeds=true, as in FLUX.1-dev)")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("diffusion_align.doctor.describe.describe_costs", lambda *_: [])  # which take a minute
    for model in (str(tmp_path / "flux"), "black-forest-labs/FLUX.1-dev"):
        _, output, errors = call_cli("doctor", tmp_path / "tiny.yaml", f"model={model}")
        assert (output + errors).count("guidance-distilled") == 1, model


def test_a_distilled_policy_is_refused_in_python(make_policy, tmp_path):
    from diffusion_align.diffusion.forward import ForwardTrainer
    from diffusion_align.diffusion.forward_settings import ForwardConfig
    from diffusion_align.errors import ConfigError

    policy = make_policy("tiny_flux", height=SIDE, width=SIDE)
    given = {"model": "emoji-flow", "output_dir": tmp_path, "prompts": ["a"], "reward": "jpeg_compressibility"}
    config = ForwardConfig(**given, sampler={"steps": 2})
    with pytest.raises(ConfigError, match="this model is guidance-distilled"):
        ForwardTrainer(config, policy, lambda *_: 0, [("a", {})])
