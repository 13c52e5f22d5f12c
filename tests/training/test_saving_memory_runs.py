"""Whole runs with the settings that save memory end with the weights of runs without them, bit for bit (on a CPU), and
are resumed with or without them."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.errors import RewardError
from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline
from tests.helpers.hard_runs import newest
from tests.helpers.tiny_runs import IMAGE_RUN, TINY

PAIRS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
    {"prompt": "a dog", "chosen": "s", "rejected": "t"},
]
OF_TEXT = {name: value for name, value in TINY.items() if name != "sampler"} | {"max_completion_length": 6}
ONLINE = OF_TEXT | {"prompts": ["the cat", "a dog"], "reward": {"name": "length", "target": 4}}
RUNS = {
    "ddpo": IMAGE_RUN | {"kl_coef": 0.1, "sampler": {"steps": 3, "guidance_scale": 2.0}},
    "diffusion_dpo": IMAGE_RUN | {"method": "diffusion_dpo", "beta": 0.1, "group_size": 2},
    "grpo": ONLINE | {"method": "grpo", "group_size": 2, "kl_coef": 0.1},
    "ppo": ONLINE | {"method": "ppo"},
    "dpo": OF_TEXT | {"method": "dpo", "dataset": PAIRS, "beta": 0.1},
    "reward_model": OF_TEXT | {"method": "reward_model", "dataset": PAIRS},
}
DROPPING = {"rank": 2, "dropout": 0.3, "dora": True}
PLAIN = {"gradient_checkpointing": False}
SAVING = {"gradient_checkpointing": True}
PLAIN_IMAGES, SAVING_IMAGES = PLAIN | {"offload_text_encoders": False}, SAVING | {"offload_text_encoders": True}


@pytest.mark.parametrize(
    ("method", "lora"),
    [(method, lora) for method in RUNS for lora in ({"rank": 2}, None)]
    + [(method, DROPPING) for method in ("diffusion_dpo", "dpo", "reward_model")],
)
def test_no_bit_changes_and_a_run_is_resumed_without_them(method, lora, run_here, request, tmp_path, capfd):
    images = RUNS[method].get("model") == "emoji-sd"
    model = "emoji-sd" if images else str(request.getfixturevalue("tiny_language_model"))
    settings = RUNS[method] | {"model": model, "lora": lora, "learning_rate": 1e-3}

    def train(name, **changes):
        run_here(settings | {"output_dir": str(tmp_path / name)} | changes)
        return load_file(newest(tmp_path / name) / "trained.safetensors")

    without, with_them = (PLAIN_IMAGES, SAVING_IMAGES) if images else (PLAIN, SAVING)
    plain, saving = train("plain", epochs=2, **without), train("saving", epochs=2, **with_them)
    train("stopped", epochs=1, **with_them)
    capfd.readouterr()
    resumed = train("stopped", epochs=2, resume=True, **without)
    assert "results may differ" not in capfd.readouterr().err
    for other in (saving, resumed):
        assert plain.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in plain.items())


@pytest.mark.parametrize("fails", [False, True])
def test_align_gives_the_pipeline_back_as_it_was(fails, monkeypatch, tmp_path):
    """The networks keep their activations again, and the text encoders are where the UNet is."""
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device="cpu")
    encoder, moves = pipe.pipeline.text_encoder, []
    monkeypatch.setattr(encoder, "to", lambda place: moves.append(place) or encoder)
    epochs = []

    def reward(images, prompts, metadata):
        epochs.append(pipe.pipeline.unet.is_gradient_checkpointing)
        return images.mean(dim=(1, 2, 3)) if len(epochs) < 3 or not fails else 1 / 0

    settings = {name: value for name, value in IMAGE_RUN.items() if name not in ("model", "output_dir", "reward")}
    with pytest.raises(RewardError) if fails else nullcontext():
        pipe.align(reward=reward, output_dir=tmp_path / "run", gradient_checkpointing=True, **settings | {"epochs": 2})
    assert epochs[-1]
    assert not pipe.pipeline.unet.is_gradient_checkpointing
    assert moves == ["cpu", pipe.pipeline.unet.device]


def test_align_gives_the_language_model_back_as_it_was(tiny_language_model, monkeypatch, tmp_path):
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    given, checkpointed = pipe.model, []

    def reward(completions, **columns):
        checkpointed.append(any("forward" in part.__dict__ for part in given.modules()))
        return [float(len(text)) for text in completions]

    run = RUNS["grpo"] | {"reward": reward, "gradient_checkpointing": True, "output_dir": tmp_path / "run"}
    pipe.align(**run)
    assert checkpointed[-1]
    assert not any("forward" in part.__dict__ for part in pipe.model.modules())
