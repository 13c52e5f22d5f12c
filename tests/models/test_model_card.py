"""The model card: what it says is what the run has logged, and the lines it shows load the result."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion_align import __version__
from diffusion_align.assets import asset_path
from diffusion_align.diffusion.rollout import TableScheduler
from diffusion_align.errors import ConfigError
from diffusion_align.models.adapters import LORA_FILE
from diffusion_align.models.language_models import load_sequence_classifier
from diffusion_align.models.model_card import LARGEST_ETA, PipelineFacts, facts_of, model_card, write_model_card
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.report import write_report

SETTINGS = {
    "model": "owner/sd",
    "output_dir": "/home/somebody/runs/a",
    "method": "ddpo",
    "prompts": ["a red apple", "a cat"],
    "reward": {"name": "clip_score", "scale": 2.0},
    "samples_per_epoch": 8,
    "kl_coef": 0.25,
    "lora": {"rank": 4, "alpha": None, "layers": "attention"},
    "sampler": {"name": "ddim", "steps": 7, "eta": 0.5, "guidance_scale": 3.0},
    "ema_decay": None,
    "num_threads": 1,
}
ROWS = [
    {"step": 1, "epoch": 1, "loss": 0.1, "kl": 0.0, "kl_path": 0.0},
    {"step": 1, "epoch": 1, "reward": 1.23456, "reward_stderr": 0.1, "gold": 0.5, "diversity": 0.75, "time/epoch": 1.0},
    {"step": 2, "epoch": 2, "loss": 0.1, "kl": 0.5, "kl_path": 1.0},
    {"step": 3, "epoch": 2, "loss": 0.1, "kl": 1.5, "kl_path": 3.5},
    {"step": 3, "epoch": 2, "reward": 7.5, "time/epoch": 1.0},
    {"step": 4, "epoch": 3, "loss": 0.1, "kl": 1.0, "kl_path": 2.0},
    {"step": 5, "epoch": 3, "loss": 0.1, "kl": 3.0, "kl_path": 5.0},
    {"step": 5, "epoch": 3, "reward": -2.5, "gold": 0.25, "diversity": float("nan"), "time/epoch": 1.0},
]


@pytest.fixture
def card(tmp_path):
    """``card(rows, **settings)``: the card of a run that has logged these rows, and its metadata."""

    def make(rows=ROWS, *, image=False, options=None, **settings):
        folder = tmp_path / "run"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS | settings))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if image:
            Image.new("RGB", (4, 4)).save(folder / "samples" / "before_after.png")
        text = model_card(folder, **options or {})
        _, front, body = text.split("---\n", 2)
        return body, yaml.safe_load(front)

    return make


def table(body):
    """First cell -> the others, of every row of every table."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def code_of(body):
    return re.search(r"```python\n(.*?)```", body, re.DOTALL).group(1)


def settings_of(body):
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL).group(1))


def test_the_figures_are_those_of_the_run(card):
    body, _ = card()
    said = table(body)
    assert said["reward"] == ["1.235 (epoch 1)", "-2.5 (epoch 3)"]  # the second table's row comes last
    assert said["held-out reward"] == ["0.5 (epoch 1)", "0.25 (epoch 3)"]
    assert said["diversity"] == ["0.75 (epoch 1)", "the same"]
    assert said["KL to the reference, last epoch"] == ["3.5 nats, over all trained steps per image"]
    assert said["kl_coef, the price of a nat of KL"] == ["`0.25`"]
    assert said["epochs"] == ["3"]
    assert said["images sampled"] == ["24"]
    assert said["method"] == ["`ddpo`"]
    assert said["base model"] == ["`owner/sd`"]
    assert '| reward | `{"name": "clip_score", "scale": 2.0}` |' in body
    assert f"diffusion-align {__version__}" in body
    assert "Licence: that of the base model" in body
    assert "average over the updates" not in body
    assert "average over the updates (ema_decay=0.9)" in card(ema_decay=0.9)[0]


def test_nothing_is_said_that_was_not_logged(card):
    body, _ = card([])
    assert not {"held-out reward", "diversity", "KL to the reference, last epoch"} & table(body).keys()
    assert table(body)["epochs"] == ["0"]
    assert table(body)["images sampled"] == ["0"]
    assert "mean per epoch" not in body
    assert "before_after.png" not in body
    short, _ = card(ROWS[:2])
    assert table(short)["reward"] == ["1.235 (epoch 1)", "the same"]
    assert table(short)["images sampled"] == ["8"]


def test_how_it_ended_and_where_it_was_best(card, tmp_path):
    assert not {"ended early", "highest held-out reward"} & table(card()[0]).keys()
    found = {"best": {"epoch": 2, "gold": 0.98765}, "stopped": "the KL is 9 nats"}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(found))
    said = table(card()[0])
    assert said["highest held-out reward"] == ["0.9877, after epoch 2"]
    assert said["ended early"] == ["the KL is 9 nats"]


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "[" * 100_000, '{"best": 3}', '{"best": {"epoch": 1}}', '{"best": {"epoch": 1, "gold": "x"}}'],
)
def test_an_evaluation_that_is_none_is_one_sentence(card, tmp_path, content):
    card()
    (tmp_path / "run" / "evaluation.json").write_text(content)
    for read in (card, lambda: write_report(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"evaluation\.json was not written by a run: remove it$"):
            read()


def test_how_a_run_was_watched_is_left_out(card):
    watched = {"checkpoint_minutes": 3.0, "interrupt_grace": 9.0, "trackers": ["wandb"], "grid_every": 7, "epochs": 5}
    assert "num_threads" in SETTINGS
    assert settings_of(card(**watched)[0]).keys() == (SETTINGS.keys() | {"epochs"}) - {"num_threads", "output_dir"}


def test_a_run_from_pairs(card):
    rows = [
        {"step": s, "epoch": e, "rewards/accuracies": a, "rewards/margins": m, "kl_path": 0.5}
        for s, e, a, m in [(1, 1, 0.5, 0.0), (2, 1, 0.25, 1.0), (3, 2, 1.0, 2.0), (4, 2, 0.5, 3.0)]
    ]
    rows += [{"step": 2 * e, "epoch": e, "beta_nats": 0.125, "time/epoch": 1.0} for e in (1, 2)]
    pairs = {"source": "emoji_style"}
    body, front = card(
        rows, method="diffusion_dpo", reward=None, prompts=None, pairs=pairs, beta_dpo=2000.0, kl_coef=None
    )
    said = table(body)
    assert said["implicit accuracy"] == ["0.375 (epoch 1)", "0.75 (epoch 2)"]
    assert said["implicit margin"] == ["0.5 (epoch 1)", "2.5 (epoch 2)"]
    assert said["beta per nat"] == ["0.125"]
    assert said["beta_dpo"] == ["`2000.0`"]
    assert said["pairs"] == ['`{"source": "emoji_style"}`']
    assert said["pairs trained on"] == ["16"]
    assert "reward" not in said
    assert "has sampled" not in body
    assert "diffusion-dpo" in front["tags"]


def test_the_metadata_is_what_the_hub_takes(card, tmp_path):
    _, front = card()
    assert front == {
        "base_model": "owner/sd",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "ddpo", "diffusion-align"],
    }
    for changes, options in (({"lora": None}, {}), ({}, {"merged": True})):
        _, front = card(options=options, **changes)
        assert front["base_model_relation"] == "finetune"
        assert "lora" not in front["tags"]
    for model in ("emoji-sd", str(tmp_path), "./sd", "sd.safetensors"):
        body, front = card(model=model)
        assert "base_model" not in front
        assert "license" not in front
        assert table(body)["base model"] == [f"`{model}`"]


def test_the_settings_without_what_is_nobody_elses_business(card):
    body, _ = card()
    left_out = {"output_dir", "num_threads"}
    assert settings_of(body) == {k: v for k, v in SETTINGS.items() if k not in left_out}
    assert "somebody" not in body.replace(code_of(body), "")
    many = [f"a {i}" for i in range(40)]
    assert settings_of(card(prompts=many)[0])["prompts"] == [*many[:12], "... 40 in all"]


def test_awkward_names_break_neither_the_table_nor_the_code(card):
    prompt = 'a "red" \\ apple\nx'
    body, _ = card(reward="a|b\nc", prompts=[prompt])
    assert table(body)["images sampled"] == ["24"]
    assert "| reward | `a\\|b c` |" in body
    compile(code_of(body), "card", "exec")


EVIL = "x\n```\n<script>alert(1)</script> `<b>` [a](javascript:1)"


def test_markup_in_settings_is_shown_and_not_obeyed(card, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"stopped": EVIL}))
    body, _ = card(prompts=[EVIL], reward=EVIL, model="a/<b>`c`")
    code, settings = re.findall(r"^(`{3,})(?:python|yaml)$(.*?)^\1$", body, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(settings[1])["prompts"] == [EVIL]
    rest = body.replace(code[1], "").replace(settings[1], "")
    rest = re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", rest)  # spans of code
    rest = re.sub(r"\\[<>`\[\]]", "", rest)  # and what is escaped
    assert not re.search(r"[<>]|\]\(j", rest)
    assert "ended early" in rest


FULL = ", torch_dtype=torch.float32)"
FILE = "StableDiffusionPipeline.from_single_file"
ONE_FILE = {"model": "x.safetensors", "base_config": "a/b"}


@pytest.mark.parametrize(
    ("changes", "options", "wanted"),
    [
        ({}, {}, f'DiffusionPipeline.from_pretrained("owner/sd"{FULL}'),
        ({"weights_variant": "fp16"}, {}, f'DiffusionPipeline.from_pretrained("owner/sd", variant="fp16"{FULL}'),
        ({"model": "x.safetensors"}, {}, f'{FILE}("x.safetensors"{FULL}'),
        (ONE_FILE, {"pipeline": PipelineFacts("Own")}, f'Own.from_single_file("x.safetensors", config="a/b"{FULL}'),
        ({}, {"location": "me/red", "merged": True}, f'DiffusionPipeline.from_pretrained("me/red"{FULL}'),
        ({}, {"location": "me/red"}, f'load_lora_weights("me/red", weight_name="{LORA_FILE}")'),
        ({"sampler": {"name": "ddpm", "steps": 4}}, {}, "DDPMScheduler.from_config"),
        ({"sampler": {"name": "ddim", "steps": 4, "eta": 1.0}}, {}, f"eta={LARGEST_ETA})"),
        ({"sampler": {"steps": 4, "noisy_steps": 2}}, {}, "num_inference_steps=4, guidance_scale=5.0, eta=0.0)"),
        ({}, {}, 'pipeline("a red apple", num_inference_steps=7, guidance_scale=3.0, eta=0.5)'),
        ({"show_prompts": ["a dog"]}, {}, 'pipeline("a dog"'),
        ({"show_prompts": ["/imagine a dog/cat"]}, {}, 'pipeline("/imagine a dog/cat"'),
        ({"prompts": {"source": ["/imagine a dog/cat"]}}, {}, 'pipeline("/imagine a dog/cat"'),
        ({"prompts": "animals"}, {}, 'pipeline("a cat"'),
    ],
)
def test_the_lines_that_load_it(card, changes, options, wanted):
    body, _ = card(options=options, **changes)
    code = code_of(body)
    assert wanted in code
    names = re.search(r"from diffusers import (.*)", code).group(1).split(", ")
    assert all(code.count(name) >= 2 for name in names), "imported and used"
    compile(code, "card", "exec")


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        model_card(tmp_path)


def test_the_image_lies_beside_the_card(card, tmp_path):
    body, _ = card(image=True)
    assert "](before_after.png)" in body
    target = tmp_path / "target"
    target.mkdir()
    write_model_card(tmp_path / "run", target, location="me/red")
    assert (target / "before_after.png").read_bytes() == (
        tmp_path / "run" / "samples" / "before_after.png"
    ).read_bytes()
    assert (target / "README.md").read_text() == model_card(tmp_path / "run", location="me/red")


# -- real runs ---------------------------------------------------------------------------------------------------------

TINY = {
    "prompts": ["a cat", "a dog"],
    "epochs": 1,
    "samples_per_epoch": 2,
    "sample_batch_size": 2,
    "updates_per_epoch": 1,
    "learning_rate": 0.02,
    "lora": {"rank": 2},
    "sampler": {"steps": 3, "guidance_scale": 2.0},
    "grid_every": 0,
    "num_threads": 1,
}


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


SIZED = {"height": 24, "width": 40, "negative_prompt": 'dark, "blurry"'}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_sdxl):
    """Pipelines of a run on emoji-sd, of one on that run, and of one of a whole UNet of an XL at a size of its own."""
    from accelerate.state import AcceleratorState

    scratch, made = tmp_path_factory.mktemp("runs"), {}
    plan = [("one", "emoji-sd", TINY), ("two", scratch / "one", TINY)]
    plan += [("whole", tiny_sdxl, TINY | {"lora": None, "grid_every": 1, **SIZED})]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_align.report.write_report", lambda folder: None)
        for name, model, settings in plan:
            pipe = ImageAlignmentPipeline.from_pretrained(model, device="cpu")
            made[name] = pipe.align(reward=brightness, output_dir=scratch / name, **settings)
    yield made
    AcceleratorState._reset_state(reset_partial_state=True)


def drawn(pipeline, **options):
    noise = torch.Generator().manual_seed(5)
    return np.asarray(pipeline("a cat", num_inference_steps=3, generator=noise, **options).images[0], int)


@pytest.mark.parametrize("name", ["one", "two", "whole"])
def test_the_lines_of_a_real_card_draw_the_runs_image(runs, name):
    pipe = runs[name]
    folder = pipe.run
    text = (folder / "final" / "README.md").read_text()
    assert text == model_card(folder, pipeline=facts_of(pipe.pipeline))
    assert (folder / "final" / "before_after.png").read_bytes() == (
        folder / "samples" / "before_after.png"
    ).read_bytes()
    assert text.count(".fuse_lora()") == (name == "two")
    if name == "whole":
        said = table(text)
        assert [said[f"{side} of images, in pixels"] for side in ("height", "width")] == [["`24`"], ["`40`"]]
        assert said["negative prompt"] == ['`dark, "blurry"`']
    found: dict = {}
    exec(code_of(text), found)
    assert isinstance(found["image"], Image.Image)
    networks = [part for part in found["pipeline"].components.values() if isinstance(part, torch.nn.Module)]
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}  # emoji-sd is in float16
    options = {"guidance_scale": 2.0, "eta": LARGEST_ETA} | (SIZED if name == "whole" else {})
    ours = np.asarray(pipe("a cat", seed=5).images[0], int)
    assert ours.shape == np.asarray(found["image"]).shape == ((24, 40, 3) if name == "whole" else (64, 64, 3))
    assert np.abs(drawn(found["pipeline"], **options) - ours).max() <= 1
    found["pipeline"].unload_lora_weights()
    if name == "one":
        assert np.abs(drawn(found["pipeline"], **options) - ours).max() > 1, "the adapter does nothing"


def test_the_card_of_a_merged_pipeline_loads_it(runs, tmp_path):
    runs["two"].save_pretrained(tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    found: dict = {}
    exec(code_of(text), found)
    ours = np.asarray(runs["two"]("a cat", seed=5).images[0], int)
    assert np.abs(drawn(found["pipeline"], guidance_scale=2.0, eta=LARGEST_ETA) - ours).max() <= 1
    last = json.loads((runs["two"].run / "metrics.jsonl").read_text().splitlines()[-1])
    assert table(text)["reward"][0].startswith(f"{last['reward']:.4g} (epoch 1)")


def test_what_is_of_no_run_has_no_card(tiny_sd, tmp_path):
    ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu").save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


def test_folders_of_this_machine_are_not_published(tmp_path):
    settings = {"method": "ddpo", "model": "emoji-sd", "prompts": "/home/me/secret/prompts.txt"}
    settings |= {"reward": {"name": "/home/me/secret/mine.py:f", "weights": "/home/me/secret/head.pt"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    card = model_card(tmp_path, location="owner/name")
    assert "prompts.txt" in card
    assert "mine.py:f" in card
    assert "secret" not in card


def test_a_merged_model_names_no_folder_of_the_runs_below_it(tmp_path):
    below, folder = tmp_path / "secret" / "one", tmp_path / "two"
    (below / "final").mkdir(parents=True)
    (below / "final" / LORA_FILE).touch()
    (below / "config.yaml").write_text(yaml.safe_dump({"method": "ddpo", "model": "emoji-sd", "lora": {"rank": 4}}))
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": "ddpo", "model": str(below), "lora": {"rank": 4}}))
    card = model_card(folder, location="owner/name", merged=True)
    assert "`one/final`" in card
    assert "secret" not in card
    assert str(below / "final") in model_card(folder), "an adapter is loaded on the one below"


def test_an_adapter_that_is_published_names_no_folder_of_its_base(card, tmp_path):
    base = str(tmp_path / "secret" / "base")
    assert base in code_of(card(model=base)[0]), "on this machine it is loaded from there"
    body, front = card(model=base, options={"location": "owner/name"})
    assert "secret" not in body
    assert "base_model" not in front
    assert 'from_pretrained("base", torch_dtype' in code_of(body)


def test_a_sampler_of_ones_own_is_sampled_with_and_not_called_ddim(card, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from diffusion_align.diffusion.samplers import ddim as own\n")
    sampler = {"name": str(tmp_path / "mine.py:own"), "steps": 2, "eta": 0.0, "guidance_scale": 1.0}
    code = code_of(card(model="emoji-sd", lora=None, sampler=sampler, options={"location": "emoji-sd"})[0])
    assert not re.search("DDIM|DDPM", code)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    code = code.replace('"emoji-sd"', repr(str(asset_path("emoji-sd"))))
    exec(code, found)
    assert isinstance(found["pipeline"].scheduler, TableScheduler)
    assert isinstance(found["image"], Image.Image)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_card_of_a_reward_model(card, tmp_path, lora):
    pairs = [
        {"step": 1, "epoch": 1, "accuracy": 0.5, "margin": 0.0, "time/epoch": 1.0},
        {"step": 2, "epoch": 2, "accuracy": 0.75, "margin": 1.5, "eval/accuracy": 0.625, "time/epoch": 1.0},
    ]
    settings = {"method": "reward_model", "model": "tiny-lm", "dataset": "a/b", "prompts": None, "lora": lora}
    body, front = card(pairs, options={"kind": "classifier"}, **settings)
    said = table(body)
    assert said["accuracy"] == ["0.5 (epoch 1)", "0.75 (epoch 2)"]
    assert said["held-out accuracy"] == ["0.625 (epoch 2)", "the same"]
    assert (front["pipeline_tag"], "lora" in front["tags"]) == ("text-classification", lora is not None)
    assert ("PeftModel" in code_of(body)) == (lora is not None)
    compile(code_of(body), "card", "exec")
    if lora is None:
        for part in load_sequence_classifier("tiny-lm"):
            part.save_pretrained(tmp_path / "run" / "final")
        found: dict = {}
        exec(code_of(body), found)
        assert found["score"] == 0, "a new head"


def test_the_card_of_the_best_weights_says_so(card):
    body, _ = card(options={"weights": "best"})
    assert "weights with the highest held-out reward" in body
    assert "/best" in code_of(body)
