"""What doctor says before anything is downloaded or loaded, against what trainers and files say."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save_file

from diffusion_align.assets import EMBEDDED_PIPELINES
from diffusion_align.diffusion.schedule import select_step_range
from diffusion_align.doctor import cost_report as costs
from diffusion_align.doctor import describe as doctor
from diffusion_align.doctor import estimate
from diffusion_align.doctor.memory import NetworkCost
from diffusion_align.doctor.model_files import gigabytes
from diffusion_align.errors import ConfigError
from diffusion_align.pipelines import text_context
from tests.helpers.problems import assert_problem, assert_problems
from tests.helpers.problems import problems as sentences_of
from tests.helpers.tiny_runs import edit_json

SETTINGS = {
    "method": "ddpo",
    "reward": "jpeg_compressibility",
    "prompts": ["a red apple", "a cat"],
    "epochs": 3,
    "samples_per_epoch": 8,
    "sample_batch_size": 4,
    "micro_batch_size": 2,
    "sampler": {"steps": 6, "guidance_scale": 5.0},
    "lora": {"rank": 2},
    "num_threads": 1,
}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """What HF_HOME=(a new folder) gives; the variable itself is read when the Hub's package is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def write(tmp_path):
    def to_file(**changes):
        path, settings = tmp_path / "config.yaml", SETTINGS | {"output_dir": str(tmp_path / "run")} | changes
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not ...}))
        return str(path)

    return to_file


@pytest.fixture
def report(write):
    """``report(**settings)``: (name -> value, problems); values of one name are joined."""

    def examine(*overrides, **settings):
        source = settings.pop("source", None) or write(**settings)
        lines, problems = doctor.describe_config(source, overrides)
        found = {}
        for name, value in ((name, value) for name, value in lines if value):
            found[name] = f"{found[name]}; {value}" if name in found else value
        return found, problems

    return examine


@pytest.fixture
def quick(monkeypatch):
    """Nothing is counted or timed, for tests about something else."""
    monkeypatch.setattr(estimate, "network_cost", lambda *_: NetworkCost(10, 10, 10, 10, 10, 10))
    monkeypatch.setattr(costs, "_time_here", lambda config, model, *_: [("this CPU", "fast")] if model.here else [])


# -- a model that is here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sd2", "tiny_sdxl"])
def test_a_folder(report, make_policy, model_path, name):
    from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer

    whole = {"mixed_precision": "no", "offload_text_encoders": False}
    found, problems = report(model=model_path(name), timestep_range=[0.2, 1.0], **whole)
    assert problems == []
    assert found["settings"] == "no problem found"
    assert found["unet"].startswith("found, ")
    assert ("text_encoder_2" in found) == (name == "tiny_sdxl")
    policy = make_policy(name, lora=None)
    settings = SETTINGS | {"model": model_path(name), "output_dir": "run", "timestep_range": [0.2, 1.0]}
    trainer = DDPOTrainer(DDPOConfig(**settings), policy, lambda *_: None, [("a", {})])
    actions = 8 * len(trainer.trained_steps)
    assert found["steps per update"].startswith(f"{actions // 2} of all processes")
    assert found["micro-batches per update"].startswith(f"{actions // 4} of 2,")
    looked = 2 * 2 * len(trainer.trained_steps)  # one per step is more than 1 % here; guided, and the reference too
    assert found["UNet passes per epoch"] == (
        f"{2 * 8 * 6} forward while sampling, {looked} forward to estimate kl_path, "
        f"{2 * actions} forward and backward while training"
    )
    assert found["clip in nats"].startswith(f"{trainer.clip_nats:.3g}, the joint bound on an action's 256 dimensions")
    parameters = {
        part: sum(p.numel() for p in network.parameters())
        for part, network in policy.pipeline.components.items()
        if isinstance(network, torch.nn.Module)
    }
    assert found["frozen weights"].startswith(gigabytes(4 * sum(parameters.values())) + ": UNet ")
    assert f"vae {gigabytes(4 * parameters['vae'])}" in found["frozen weights"]
    assert found["recorded latents"].startswith(gigabytes(2 * 4 * 256 * actions))
    assert re.match(r"\d.* in float32, 4 samples", found["training pass"])
    assert found["this CPU"].endswith(" for 3 epochs")
    assert found["parameters"] == "as many in the files as the configurations describe, in float32"
    assert found[""].startswith("from a pass of 8 samples timed now")


def test_reward_weighted_regression_has_no_reference_pass_and_no_clip(report, tiny_sd, quick):
    found, problems = report(method="rwr", model=str(tiny_sd), softmax_over="group", group_size=2)
    assert problems == []
    assert found["UNet passes per epoch"].endswith(" 96 forward and backward while training")
    assert "reference" not in found["UNet passes per epoch"]
    assert "clip in nats" not in found


def test_a_shift_that_cannot_be_computed_does_not_end_the_report(report, tiny_flux, tmp_path):
    folder = shutil.copytree(tiny_flux, tmp_path / "model")
    edit_json("scheduler/scheduler_config.json", base_image_seq_len=256, max_image_seq_len=256)(folder)
    found, _ = report(model=str(folder), height=16, width=16)
    assert found["tokens"] == "not known: float division by zero"
    assert "at the peak" in found


@pytest.mark.parametrize(("name", "scale"), [("tiny_sd3", 5.0), ("tiny_flux", 3.5), ("tiny_schnell", 1.0)])
def test_a_folder_of_a_flow_model(report, make_policy, model_path, name, scale):
    """Embedded guidance is an input and costs no second pass; all tensors of the files are counted."""
    from diffusion_align.diffusion.ddpo import DDPOConfig, DDPOTrainer

    settings = {"model": model_path(name), "height": 16, "width": 16, "sampler": {"steps": 6, "guidance_scale": scale}}
    whole = {"mixed_precision": "no", "offload_text_encoders": False}
    found, problems = report(**settings, **whole)
    assert problems == []
    policy = make_policy(name, lora=None, height=16, width=16, guidance_scale=scale)
    config = DDPOConfig(**SETTINGS | settings | {"output_dir": "run"})
    trainer = DDPOTrainer(config, policy, lambda *_: None, [("a", {})])
    actions, passes = 8 * len(trainer.trained_steps), 2 if name == "tiny_sd3" else 1
    assert found["transformer passes per epoch"].startswith(f"{passes * 8 * 6} forward while sampling, ")
    assert found["transformer passes per epoch"].endswith(f" {passes * actions} forward and backward while training")
    assert f" {2 * passes} samples with" in found["training pass"]
    assert found["clip in nats"].startswith(f"{trainer.clip_nats:.3g}, the joint bound on an action's 256 dimensions")
    prompt = policy.encode(["a cat"])["encoder_hidden_states"]
    assert found["tokens"].startswith(f"16 per image and {prompt.shape[1]} per prompt")
    assert ("mu=0.459" in found["tokens"]) == (name == "tiny_flux")  # .5 at 256 tokens, 1.15 at 4096
    assert found["parameters"] == "as many in the files as the configurations describe, in float32"
    held = sum(
        tensor.numel()
        for part in policy.pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for tensor in {one.data_ptr(): one for one in part.state_dict().values() if one.is_floating_point()}.values()
    )
    assert found["frozen weights"].startswith(gigabytes(4 * held) + ": transformer ")
    assert found["this CPU"].endswith(" for 3 epochs")


def test_stable_diffusion_3_without_t5(report, tiny_sd3, quick):
    """It is neither counted nor missed, and reads as many tokens, which are zeros then."""
    folder = str(tiny_sd3)
    full, problems = report(model=folder, offload_text_encoders=False)
    assert problems == []
    without, problems = report(model=folder, offload_text_encoders=False, t5=False)
    assert problems == []
    assert full["text_encoder_3"].startswith("found, ")
    assert "text_encoder_3" not in without
    assert "text_encoder_3" in full["frozen weights"]
    assert "text_encoder_3" not in without["frozen weights"]
    assert full["tokens"] == without["tokens"] == "16 per image and 280 per prompt"  # 24 of CLIP


def test_adapters_on_text_encoders(report, tiny_sdxl):
    settings = {"model": str(tiny_sdxl), "mixed_precision": "no", "dtype": "float32"}
    plain, adapted = (report(**settings, lora={"rank": 2, "text_encoder": on})[0] for on in (False, True))
    assert adapted["trained"].split(": ")[1].startswith("LoRA of rank 2 on the text encoders too, ")
    assert "text_encoder_2" in adapted["frozen weights"]  # on the GPU
    assert "text_encoder" not in plain["frozen weights"]
    assert "encoding prompts" in plain
    assert "encoding prompts" not in adapted
    bigger = [float(one["training pass"].split(" MB")[0]) for one in (plain, adapted)]
    assert bigger[0] < bigger[1] < 2 * bigger[0]


@pytest.mark.parametrize("target", ["posterior_mean", "logged"])
def test_diffusion_dpo_on_a_folder(report, tiny_sd, make_policy, tmp_path, target, quick):
    from diffusion_align.diffusion.dpo import DiffusionDPOConfig, DiffusionDPOTrainer

    settings = {"method": "diffusion_dpo", "beta_dpo": 2000, "group_size": 4, "target": target, "kl_coef": 0.1}
    found, problems = report(model=str(tiny_sd), **settings)
    assert problems == []
    config = DiffusionDPOConfig(**SETTINGS | settings | {"model": "emoji-sd", "output_dir": tmp_path / "x"})
    trainer = DiffusionDPOTrainer(config, make_policy("tiny_sd"), reward=lambda *_: None, prompts=[("a", {})])
    assert found["beta in nats"].startswith(f"{trainer.beta:.3g}, which beta_dpo=2000 is")
    assert found["pairs per epoch"] == "2, the best and the worst of 4 images each"
    guided = 2 if target == "logged" else 1
    assert f"{2 * 2 * guided} forward for the reference" in found["UNet passes per epoch"]
    assert f"{2 * 2 * guided} samples with" in found["training pass"]


def test_the_vae_is_given_both_images_of_pairs_as_it_is_counted(report, make_policy, tmp_path, quick, monkeypatch):
    """``sample_batch_size`` pairs at once."""
    from diffusion_align.data.image_pairs import open_pairs
    from diffusion_align.diffusion.dpo import DiffusionDPOConfig, DiffusionDPOTrainer

    counted, given, cost = [], [], estimate.encoding_cost
    monkeypatch.setattr(estimate, "encoding_cost", lambda *how: (counted.append(how[2]), cost(*how))[1])
    pairs = {"method": "diffusion_dpo", "beta": 0.1, "pairs": {"source": "emoji_style", "max_pairs": 8}}
    settings = pairs | {"prompts": None, "reward": None, "samples_per_epoch": 8, "sample_batch_size": 4}
    report(model="emoji-sd", **settings)
    folder = tmp_path / "run"
    folder.mkdir()
    config = DiffusionDPOConfig(**SETTINGS | settings | {"model": "emoji-sd", "output_dir": folder})
    policy = make_policy("tiny_sd")
    policy.pipeline.vae.encoder.register_forward_pre_hook(lambda _, images: given.append(len(images[0])))
    DiffusionDPOTrainer(config, policy, pairs=open_pairs(config.pairs).check_images()).collect()
    assert set(given) == set(counted) == {2 * 4}


def test_the_whole_network_needs_a_copy_and_adams_moments(report, tiny_sd, make_policy):
    from diffusion_align.diffusion.policy import LoRAConfig

    found, _ = report(model=str(tiny_sd), lora=None, kl_coef=0.1)
    alone, _ = report(model=str(tiny_sd), lora=None)
    adapted, _ = report(model=str(tiny_sd))
    averaged, _ = report(model=str(tiny_sd), ema_decay=0.9)
    copied, _ = report(model=str(tiny_sd), method="forward", ema_decay=0.9)
    whole = make_policy("tiny_sd", lora=None).trainable.values()
    adapter = make_policy("tiny_sd", lora=LoRAConfig(rank=2)).trainable.values()
    whole, adapter = (sum(p.numel() for p in parameters) for parameters in (whole, adapter))
    assert f"reference UNet {gigabytes(4 * whole)}," in found["frozen weights"]
    assert "reference" not in alone["frozen weights"]  # nothing asks for it
    assert "kl_path" not in alone["UNet passes per epoch"]
    assert found["trained"].startswith(f"{gigabytes(16 * whole)}: whole UNet")
    assert adapted["trained"].startswith(f"{gigabytes(16 * adapter)}: LoRA of rank 2")
    assert averaged["trained"].startswith(f"{gigabytes(20 * adapter)}: ")
    assert copied["trained"].startswith(f"{gigabytes(24 * adapter)}: ")  # the old policy as well
    assert "3 forward passes" in found["operations"]
    assert "2 forward passes" in adapted["operations"]


def test_the_embedded_model_fits_in_a_hundred_columns(call_cli, tmp_path):
    shorter = ["num_threads=1", "sample_batch_size=1", "mixed_precision=no"]
    status, out, err = call_cli("doctor", "ddpo_emoji_aesthetic", f"output_dir={tmp_path / 'run'}", *shorter)
    assert (status, err) == (0, "")
    assert "no problem found" in out
    assert max(map(len, out.splitlines())) <= 100
    assert re.search(r"^  unet +found, 11 MB$", out, re.MULTILINE)
    assert re.search(r"^  clip in nats +1\.64, ", out, re.MULTILINE)
    assert re.search(r"^  this CPU +[\d.]+ (s|min), ", out, re.MULTILINE)
    assert "one A100" not in out  # a network this small does not keep one busy


def test_long_names_widen_the_column(call_cli, tmp_path):
    status, out, err = call_cli("doctor", "flow_emoji_jpeg", f"output_dir={tmp_path / 'run'}")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert re.search(r"^  transformer passes per epoch  \d+ forward while sampling", out, re.MULTILINE)
    assert re.search(r"^  tokens {24}64 per image and 25 per prompt$", out, re.MULTILINE)


def test_what_the_kl_is_estimated_from_is_counted(report, tiny_sd, quick):
    """Nothing where every action is compared; else 1 % of 8 * 6 + 3 * 20 * 40 passes, more than one per step."""
    settings = {"model": str(tiny_sd), "timestep_range": [0.2, 1.0], "inner_epochs": 20}
    priced, _ = report(**settings, kl_coef=0.1)
    assert priced["UNet passes per epoch"] == (
        f"{2 * 8 * 6} forward while sampling, {2 * 40} forward for the reference, "
        f"{2 * 20 * 40} forward and backward while training"
    )
    assert f", {2 * 2 * 24} forward to estimate kl_path, " in report(**settings)[0]["UNet passes per epoch"]


def test_the_evaluation_is_counted(report, tiny_sd, quick):
    found, _ = report(model=str(tiny_sd), evaluation={"pictures": 6, "every": 2, "reward": "jpeg_incompressibility"})
    assert f"{2 * 6 * 6 // 2} forward for the evaluation" in found["UNet passes per epoch"]
    assert found["jpeg_incompressibility"] == "installed, held out"


def test_dtype_halves_frozen_weights_only(report, tiny_sd, quick):
    wide, _ = report(model=str(tiny_sd), offload_text_encoders=False, dtype="float32")
    narrow, _ = report(model=str(tiny_sd), offload_text_encoders=False)
    encoder = [float(re.search(r"text_encoder ([\d.]+) MB", found["frozen weights"])[1]) for found in (wide, narrow)]
    assert encoder[1] == pytest.approx(encoder[0] / 2, rel=0.3)
    vae = [re.search(r"vae ([\d.]+ MB)", found["frozen weights"])[1] for found in (wide, narrow)]
    assert vae[0] == vae[1]  # force_upcast
    assert wide["trained"] == narrow["trained"]


# -- a model that is not here ------------------------------------------------------------------------------------------


def test_a_published_model_that_would_be_downloaded(call_cli, tmp_path):
    """4.3 GB are the float32 files of the UNet, the VAE and the text encoder."""
    status, out, err = call_cli("doctor", "ddpo_sd15_aesthetic", f"output_dir={tmp_path / 'run'}")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert "missing: 4.3 GB will be downloaded" in out
    assert re.search(r"^  unet +missing, 3\.4 GB$", out, re.MULTILINE)
    assert re.search(r"^  aesthetic +installed", out, re.MULTILINE)
    assert re.search(r"^  clip in nats +1\.64, the joint bound on an action's 16384 dimensions", out, re.MULTILINE)
    assert "1600 of 4" in out
    assert re.search(r"^  recorded latents +1\.7 GB", out, re.MULTILINE)
    # 256 images of 50 guided steps, sampled (one pass) and trained on (two), at 0.8 TFLOPs; 512 of their actions
    # again, and by the reference, for kl_path; and their decoding
    operations = float(re.search(r"operations +([\d.]+) PFLOPs", out)[1]) * 1e15
    passes = 256 * 50 * 2 * 3 + 512 * 2 * 2
    assert operations == pytest.approx(passes * 0.803e12 + 256 * 2.51e12, rel=0.01)
    minutes = float(re.search(r"one A100, 80 GB +([\d.]+) min", out)[1])
    assert minutes == pytest.approx(operations / (0.4 * 312e12) / 60, rel=0.05)
    assert not list(tmp_path.iterdir())


def test_a_published_flow_model_with_and_without_t5(report, quick, monkeypatch):
    """Its files have 2 bytes per parameter; T5-XXL's encoder has 4.76 G, the largest part but FLUX's transformer."""
    monkeypatch.setattr(estimate, "network_cost", lambda *_: NetworkCost(10**9, 10, 10, 10, 10, 10))
    settings = {"model": "stabilityai/stable-diffusion-3.5-medium", "resolution": 512}
    full, problems = report(**settings)
    assert problems == []
    without, problems = report(**settings, t5=False)
    assert problems == []
    assert full["files"].startswith("missing: 16.3 GB will be downloaded")
    assert without["files"].startswith("missing: 6.7 GB will be downloaded")
    assert full["text_encoder_3"] == "missing, 9.5 GB"
    assert "text_encoder_3" not in without
    assert full["encoding prompts"].startswith("11.2 GB, ")
    assert without["encoding prompts"].startswith("1.6 GB, ")
    assert without["t5"].startswith("false saves ")
    assert full["t5"].startswith("false would save ")
    assert full["clip in nats"] == "6.55, the joint bound on an action's 65536 dimensions"
    assert full["tokens"] == without["tokens"] == "1024 per image and 333 per prompt"
    flux, problems = report(**settings | {"model": "black-forest-labs/FLUX.1-dev"})
    assert problems == []
    assert flux["files"].startswith("missing: 33.7 GB will be downloaded")
    assert flux["tokens"] == "1024 per image and 512 per prompt; noise levels are shifted for so many, mu=0.63"
    assert flux["transformer passes per epoch"].startswith(f"{8 * 6} forward while sampling, ")
    schnell = {"model": "black-forest-labs/FLUX.1-schnell", "resolution": 1024}
    found, problems = report(**schnell, sampler={"steps": 4, "guidance_scale": 1.0})
    assert problems == []
    assert found["tokens"] == "4096 per image and 512 per prompt"
    assert found["clip in nats"].startswith("26.2, ")


def test_diffusion_dpo_of_a_published_flow_model_in_nats(report, quick):
    """2000 / (2 d sum of weights), whose sum over the 1000 steps of shift 3 is 4.0695."""
    online = {"method": "diffusion_dpo", "beta_dpo": 2000, "group_size": 4, "resolution": 512}
    found, problems = report(model="stabilityai/stable-diffusion-3.5-large", **online)
    assert problems == []
    assert found["beta in nats"].startswith(f"{2000 / (2 * 65536 * 4.0695):.3g}, ")


DOCS = Path(__file__).parents[2] / "docs" / "ddpo.md"
CARDS = {
    "ddpo_sd15_aesthetic": 24,
    "ddpo_sd15_aesthetic_12gb": 12,
    "ddpo_sdxl_aesthetic": 24,
    "dpo_sd15_pickapic": 24,
    "dpo_sdxl_pickapic": 24,
    "flow_sd35_aesthetic": 24,
    "flow_flux_pickscore": 40,
    "nft_sd35_aesthetic": 24,
}
"""Recipe of a real model -> GB of the card that it must fit."""


def head_of(found):
    """What the head of a recipe says, from what doctor says of it."""
    card, needed = re.match(r"(\d+) GB: ([\d.]+ GB) with CUDA", found["fits a card of"]).groups()
    times = {name: re.match(r".*?, (.+) for \d+ epochs", found[name])[1] for name in found if name.startswith("one ")}
    shown = [name for name in ("one RTX 4090, 24 GB", "one A100, 80 GB") if "more than its" not in found[name]]
    hours = [f"{times[name]} on {name.split(',')[0]}" for name in shown]
    return f"{needed}, for a card of {card} GB; {' or '.join(hours)}"


@pytest.mark.parametrize("name", CARDS)
def test_the_head_of_a_recipe_says_what_doctor_estimates(report, tmp_path, monkeypatch, name):
    monkeypatch.setattr(estimate.Estimator, "savings", lambda *_: ([], []))
    found, problems = report(f"output_dir={tmp_path / 'run'}", source=name)
    assert problems == []
    assert dict(doctor.describe_recipes())[name] == head_of(found)
    assert re.search(rf"^{name} +{re.escape(head_of(found))}$", DOCS.read_text(), re.MULTILINE)
    assert int(found["fits a card of"].split()[0]) <= CARDS[name]


@pytest.mark.parametrize(
    ("name", "needed", "card"), [("dpo_sdxl_pickapic", "10.9", 12), ("ddpo_sdxl_aesthetic", "13.5", 16)]
)
def test_what_stable_diffusion_xl_needs_at_least(report, tmp_path, monkeypatch, name, needed, card):
    monkeypatch.setattr(estimate.Estimator, "savings", lambda *_: ([], []))
    single = ["micro_batch_size=1", "sample_batch_size=1"]
    found, _ = report(*single, f"output_dir={tmp_path / 'run'}", source=name)
    assert found["fits a card of"].startswith(f"{card} GB: {needed} GB with CUDA")
    assert re.search(rf"`{name}`[^.]* needs\s+{needed} GB", DOCS.read_text())


FLOW_DOCS = DOCS.with_name("flow.md").read_text()
FLOW_MEMORY = re.findall(r"^\| `(flow_[^`]+)` \| ([\d.]+ GB) \| (\d+ GB) \|$", FLOW_DOCS, re.MULTILINE)


@pytest.mark.parametrize(("command", "needed", "card"), FLOW_MEMORY)
def test_what_flow_models_need_with_and_without_t5(report, tmp_path, monkeypatch, command, needed, card):
    monkeypatch.setattr(estimate.Estimator, "savings", lambda *_: ([], []))
    assert len(FLOW_MEMORY) == 5
    name, *settings = command.split()
    found, problems = report(*settings, f"output_dir={tmp_path / 'run'}", source=name)
    assert problems == []
    assert found["fits a card of"].startswith(f"{card}: {needed} with CUDA")
    phases = [found[name] for name in ("training pass", "sampling pass", "decoding", "encoding prompts")]
    assert (max(phases, key=megabytes) == found["encoding prompts"]) == ("t5=false" not in settings)


def megabytes(text):
    size, unit = re.match(r"([\d.]+) (MB|GB)", text).groups()
    return float(size) * {"MB": 1, "GB": 1000}[unit]


def test_every_recipe_of_a_real_model_has_an_estimate(call_cli):
    assert {name for name, _ in doctor.describe_recipes()[1:-1]} == set(CARDS)
    status, out, err = call_cli("doctor")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert re.search(r"^  ddpo_sd15_aesthetic_12gb +[\d.]+ GB, for a card of 12 GB; ", out, re.MULTILINE)


def test_what_settings_save(report, tmp_path):
    """Each on top of those before it, so that together they make the card that is named."""
    plain, _ = report(f"output_dir={tmp_path / 'run'}", source="ddpo_sd15_aesthetic")
    saving = re.match(r"true would save ([\d.]+) GB; an epoch takes (\d+)% longer", plain["gradient_checkpointing"])
    checkpointed, _ = report(
        "gradient_checkpointing=true", f"output_dir={tmp_path / 'run'}", source="ddpo_sd15_aesthetic"
    )
    assert checkpointed["gradient_checkpointing"] == saving[0].replace("would save", "saves")
    before, after = (float(found["at the peak"].split()[0]) for found in (plain, checkpointed))
    assert before - after == pytest.approx(float(saving[1]), abs=0.11)
    operations = [float(found["operations"].split()[0]) for found in (plain, checkpointed)]
    assert operations[1] / operations[0] == pytest.approx(1 + int(saving[2]) / 100, abs=0.01)
    assert "3 forward passes" in checkpointed["operations"]


def test_embeddings_of_prompts_stay_on_the_gpu(report, tmp_path, monkeypatch):
    """Per prompt 77 tokens of 768 numbers in bf16; 20000 pairs have more prompts than are kept, ``animals`` has 45."""
    monkeypatch.setattr(estimate.Estimator, "savings", lambda *_: ([], []))
    counted = {"dpo_sd15_pickapic": 2048, "ddpo_sd15_aesthetic_12gb": 45}
    for name, prompts in counted.items():
        found, _ = report(f"output_dir={tmp_path / 'run'}", source=name)
        size = gigabytes(prompts * 77 * 768 * 2)
        assert found["prompt embeddings"] == f"{size} at most, of {prompts} prompts"
    one, _ = report("pairs.max_pairs=1", f"output_dir={tmp_path / 'run'}", source="dpo_sd15_pickapic")
    assert one["prompt embeddings"].endswith(" of 1 prompt")


def test_an_unknown_hub_id(report, quick):
    found, problems = report(model="somebody/something")
    assert problems == []
    assert found["files"].startswith("missing, size unknown")
    assert found["memory and time"] == "not estimated: the model's configuration is not here"
    assert found["images per epoch"] == "8, each 6 steps"


def cache(hub, folder, model):
    snapshot = hub / f"models--{model.replace('/', '--')}" / "snapshots" / "0123"
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    return snapshot


def test_a_hub_id_in_the_cache(report, empty_cache, tiny_sd, quick):
    snapshot = cache(empty_cache, tiny_sd, "somebody/something")
    found, problems = report(model="somebody/something")
    assert problems == []
    assert found["model"] == "somebody/something (Hub id, in the cache)"
    assert found["unet"].startswith("found, ")
    assert "this CPU" in found
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    found, problems = report(model="somebody/something")
    assert problems == []
    assert found["unet"] == "missing: it will be downloaded"
    assert "at the peak" in found
    assert "this CPU" not in found


def test_a_published_model_half_in_the_cache(report, empty_cache, tiny_sd, quick):
    snapshot = cache(empty_cache, tiny_sd, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    shutil.rmtree(snapshot / "vae")
    found, problems = report(model="stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert problems == []
    assert found["vae"] == "missing, 335 MB: it will be downloaded"


# -- files that are missing --------------------------------------------------------------------------------------------


def test_a_folder_that_lacks_a_part(call_cli, write, tiny_sd, tmp_path, quick):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    shutil.rmtree(folder / "vae")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    status, out, err = call_cli("doctor", write(model=str(folder)))
    assert status == 2
    assert_problems(sentences_of(err), ("model", "unet/ has no .safetensors file"), ("model", "no vae/"))
    assert re.search(r"^  vae +missing: no folder$", out, re.MULTILINE)
    assert re.search(r"^  text_encoder +found, ", out, re.MULTILINE)
    assert "2 problems, see below" in out


def test_variants(report, tiny_sd, tmp_path, quick):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(bytes(20_000_000))
    plain, _ = report(model=str(folder))
    assert plain["unet"] == f"found, {gigabytes((unet / 'diffusion_pytorch_model.safetensors').stat().st_size)}"
    found, problems = report(model=str(folder), weights_variant="fp16")
    assert problems == []
    assert found["unet"] == "found, 20 MB, fp16"
    assert found["vae"] == plain["vae"]  # diffusers takes the plain files of a part without the variant


def test_a_family_that_cannot_be_trained(report, tiny_sd, tmp_path, quick):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    edit_json("model_index.json", _class_name="KandinskyPipeline")(folder)
    _, problems = report(model=str(folder))
    assert_problem(problems, "model", "KandinskyPipeline")


def test_a_damaged_configuration_is_no_traceback(report, tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    edit_json("unet/config.json", block_out_channels=[8, 17])(folder)
    found, _ = report(model=str(folder))
    assert found["memory and time"].startswith("not estimated: ")
    (folder / "unet" / "config.json").write_text("{")
    found, _ = report(model=str(folder))
    assert found["memory and time"] == "not estimated: the model's configuration is not here"


def test_weights_that_are_others_than_the_configuration_describes(report, tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    edit_json("unet/config.json", layers_per_block=2)(folder)
    found, _ = report(model=str(folder))
    assert re.match(r"unet has [\d.]+ M, and its config.json describes [\d.]+ M: ", found["parameters"])


def test_a_checkpoint_in_one_file(report, tiny_sd, tmp_path, quick):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(500_000)}, path)
    found, _ = report(model=str(path), base_config=str(tiny_sd))
    assert found["model"] == f"{path} (one file, 2.0 MB)"
    assert found["base_config"] == f"{tiny_sd} (found)"
    assert "at the peak" in found
    found, _ = report(model=str(path))
    assert found["base_config"] == "not given: diffusers looks it up on the Hub"
    assert "at the peak" not in found


# -- settings and rewards ----------------------------------------------------------------------------------------------


def test_a_run_is_known_by_its_base(report, tiny_sd, tmp_path, quick):
    base, none = report(model=str(tiny_sd))
    below, above = tmp_path / "below", tmp_path / "above"
    for folder, model in ((below, tiny_sd), (above, below)):
        (folder / "final").mkdir(parents=True)
        (folder / "final" / "pytorch_lora_weights.safetensors").touch()
        (folder / "config.yaml").write_text(yaml.safe_dump({"method": "ddpo", "model": str(model)}))
    found, problems = report(model=str(above))
    assert problems == none == []
    assert found.pop("model") == f"{above} (a run: LoRA of 2 on its base)"
    assert found.pop("base") == base.pop("model") == f"{tiny_sd} (a folder)"
    assert found == base
    shutil.rmtree(above / "final")
    shutil.copytree(tiny_sd, above / "final")
    found, _ = report(model=str(above))
    assert found["model"] == f"{above} (a run that trained the whole UNet)"
    assert found["base"] == f"{above / 'final'} (a folder)"
    shutil.rmtree(above / "final")
    found, problems = report(model=str(above))
    assert found["model"] == f"{above} (a run that cannot be used)"
    assert [problem for problem in problems if "is an unfinished run" in problem]


def test_the_reward_of_a_run_is_that_of_what_it_was(report, tmp_path, quick):
    for name, trained in (("lora", "pytorch_lora_weights.safetensors"), ("whole", "model_index.json")):
        final = tmp_path / name / "final"
        final.mkdir(parents=True)
        (final / trained).write_text("{}")
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"method": "ddpo", "model": "emoji-sd"}))
        found, _ = report(model=str(tmp_path / name), reward="aesthetic", evaluation={"reward": "jpeg_compressibility"})
        assert "  files" not in found, "the embedded CLIP is taken"
        assert found["diversity"] == "by emoji-clip"
    found, _ = report(model="nobody/model", reward="jpeg_compressibility", evaluation={"diversity": "clip"})
    assert found["diversity"] == "by openai/clip-vit-large-patch14"
    assert found["  files"] == "openai/clip-vit-large-patch14: not in the cache"


def test_too_few_steps_for_a_pair(report, tiny_sd, quick):
    settings = {"method": "diffusion_dpo", "beta_dpo": 2000.0, "group_size": 2, "target": "logged"}
    _, problems = report(model=str(tiny_sd), **settings, steps_per_pair=20)
    assert_problem(problems, "timestep_range", "fewer than steps_per_pair=20")


def test_an_update_takes_whole_images(report, tiny_sd, quick):
    settings = {"timestep_fraction": 0.34, "updates_per_epoch": 3}  # 2 of 6 steps
    found, _ = report(model=str(tiny_sd), samples_per_epoch=10, sample_batch_size=2, **settings)
    assert found["steps per update"].startswith("8 ")
    online = {"method": "diffusion_dpo", "beta_dpo": 2000.0, "group_size": 16}
    found, problems = report(model=str(tiny_sd), **online)
    assert found["pairs per epoch"].startswith("0, ")
    assert problems


def test_configurations_that_leave_things_out(report, tiny_sd, tmp_path, quick):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    edit_json("unet/config.json", sample_size=...)(folder)
    edit_json("scheduler/scheduler_config.json", num_train_timesteps=...)(folder)
    found, problems = report(model=str(folder))
    assert problems == []
    assert found["memory and time"].startswith("not estimated")
    assert found["UNet passes per epoch"] == report(model=str(tiny_sd))[0]["UNet passes per epoch"]


def test_a_typo_does_not_hide_the_rest(call_cli, write, tiny_sd):
    status, out, err = call_cli("doctor", write(model=str(tiny_sd), learning_rat=1), "sampler.step=3", "epochs=none")
    assert status == 2
    wanted = [("epochs", "not allowed"), ("unknown setting 'learning_rat'", ""), ("unknown setting 'sampler.step'", "")]
    assert_problems(sentences_of(err), *wanted)
    assert "3 problems, see below" in out
    assert re.search(r"^  images per epoch +8, each 6 steps$", out, re.MULTILINE)
    assert "at the peak" in out
    assert "no problem found" not in out


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"prompts": ...}, "prompts is required"),
        ({"prompts": "nowhere.txt"}, "'nowhere.txt': there is no such file"),
        ({"reward": "beauty"}, "reward='beauty' is unknown"),
        ({"sampler": {"steps": 6, "eta": 0.0}}, "sampler.eta=0 makes every step deterministic"),
        ({"sampler": {"steps": 2000}}, "sampler.steps=2000 must lie between 1 and"),
        ({"clip_range": "2e-4", "learning_rate": -1}, "learning_rate=-1 is not allowed"),
    ],
)
def test_what_is_wrong_is_listed_beside_the_rest(report, tiny_sd, quick, changes, wanted):
    found, problems = report(**{"model": str(tiny_sd)} | changes)
    assert any(wanted in problem for problem in problems), problems
    assert found["unet"].startswith("found")
    assert found["settings"].endswith("see below")
    if changes.get("clip_range"):
        assert found["clip in nats"].startswith(f"{256 * math.log1p(2e-4):.3g},")


@pytest.mark.parametrize("changes", [{"model": ...}, {"model": [3]}, {"method": "magic"}])
def test_without_a_model_there_is_nothing_to_say(report, changes):
    with pytest.raises(ConfigError):
        report(**{"model": "emoji-sd"} | changes)


def test_a_missing_extra(report, tiny_sd, monkeypatch, quick):
    from diffusion_align.rewards.image import clip

    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda name: None)
    spec = [{"name": "clip_score", "clip": "open_clip:ViT-B-32/laion2b_s34b_b79k"}, "jpeg_compressibility"]
    found, problems = report(model=str(tiny_sd), reward=spec)
    assert found["clip_score"] == "missing: pip install 'diffusion-align[open-clip]'"
    assert found["jpeg_compressibility"] == "installed"
    assert any("pip install 'diffusion-align[open-clip]'" in problem for problem in problems)
    assert "at the peak" in found


def test_the_models_of_rewards(report, tiny_sd, tmp_path, empty_cache, monkeypatch, quick):
    from diffusion_align.rewards.image import aesthetic

    about = {"model": "openai/clip-vit-large-patch14 and a head from owner/heads; emoji-clip for emoji-sd"}
    monkeypatch.setattr(aesthetic.AestheticSettings, "about", about)
    cache(empty_cache, tiny_sd, "owner/heads")
    found, _ = report(model=str(tiny_sd), reward="aesthetic")
    assert found["  model"] == about["model"]
    first, second = found["  files"].split("; ")
    assert first == "openai/clip-vit-large-patch14: not in the cache"
    assert re.fullmatch(r"owner/heads: in the cache, [\d.]+ MB", second)
    for name in EMBEDDED_PIPELINES:
        found, _ = report(model=name, reward="aesthetic")
        assert "  files" not in found
        assert found["parameters"] == "as many in the files as the configurations describe, in float16"
    head = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)}, head)
    found, _ = report(model=str(tiny_sd), reward={"name": "aesthetic", "head": str(head), "clip": "some/clip"})
    assert found["  head"] == f"{head} (here)"
    assert found["  files"] == "some/clip: not in the cache"


def test_a_reward_of_ones_own(report, tiny_sd, tmp_path, quick):
    (tmp_path / "mine.py").write_text("def score(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    found, problems = report(model=str(tiny_sd), reward=f"{tmp_path / 'mine.py'}:score")
    assert problems == []
    assert found[f"{tmp_path / 'mine.py'}:score"] == "installed"


def test_text_methods(report, tmp_path):
    found, problems = report(f"output_dir={tmp_path / 'run'}", source="grpo_tiny")
    assert problems == []
    assert found["model"] == "tiny-lm (here)"
    assert found["text per epoch"] == "64 completions of at most 96 tokens, of verses"
    assert found["settings"] == "no problem found"


def test_rows_of_text_recipes_are_read_as_a_run_reads_them(report, tmp_path, monkeypatch):
    out = f"output_dir={tmp_path / 'run'}"
    found, problems = report(out, "prompts=[a: b, c]", "show_prompts=['']", source="grpo_tiny")
    wanted = [("prompts", "row 0: the prompt is a mapping"), ("prompts", "fix the rows"), ("show_prompts", "empty")]
    assert_problems(problems, *wanted)
    assert found["settings"] == "3 problems, see below"
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    settings = {"model": "tiny-lm", "output_dir": str(tmp_path / "run"), "dataset": str(tmp_path / "pairs.jsonl")}

    def examined(method, *overrides):
        (tmp_path / "text.yaml").write_text(yaml.safe_dump(settings | {"method": method}))
        return report(*overrides, source=str(tmp_path / "text.yaml"))

    for method in ("dpo", "reward_model"):
        found, problems = examined(method)
        assert_problems(problems, ("dataset", "row 1"), ("dataset", "fix the rows"))
        found, problems = examined(method, "dataset.skip_bad_rows=true")
        assert (problems, found["rows checked"]) == ([], "1 of dataset")
    monkeypatch.setattr(text_context, "MOST_CHECKED", 1)
    found, problems = examined("dpo")
    assert (problems, found["rows checked"]) == ([], "1 of dataset")
    for on_the_hub in ("model=some/one", "dataset=some/rows"):
        assert "rows checked" not in examined("dpo", on_the_hub)[0]


ONLINE = {"prompts": ["a", "b"], "reward": "length"}
LABELS = [{"prompt": text, "completion": "c", "label": True} for text in "ab"]


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (ONLINE | {"method": "grpo", "beta": 0.1}, "64 forward while sampling, 64 forward for the reference, "),
        (
            ONLINE | {"method": "grpo", "beta": 0.1, "kl": "full_vocabulary", "inner_epochs": 3},
            "64 forward while sampling, 256 forward for the reference, ",  # once, and in each inner epoch
        ),
        # 2 % of 64 * (1 + 3 * 2) passes
        (ONLINE | {"method": "grpo", "inner_epochs": 2}, "64 forward while sampling, 9 forward for the reference, "),
        (ONLINE | {"method": "grpo", "lora": None, "inner_epochs": 20_000}, "64 forward while sampling, "),
        (
            ONLINE | {"method": "ppo", "logp_old": "recomputed"},
            "64 forward while sampling, 64 forward for the reference, 128 forward before the updates, ",
        ),
        (
            {"method": "kto", "dataset": LABELS, "kl_samples": 10},
            "74 forward for the reference, 10 forward before the updates, ",
        ),
        # 6 held-out completions every other epoch, which the reference scores as well: DPO logs no KL
        (
            {"method": "dpo", "dataset": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}
            | {"evaluation": {"reward": "length", "samples": 6, "every": 2, "prompts": ["a", "b", "c"]}}
            | {"dynamic_beta": {}},
            "128 forward for the reference, 64 forward before the updates, 6 forward for the evaluation, ",
        ),
    ],
)
def test_passes_of_text_methods(report, tmp_path, settings, passes):
    more = {"model": "tiny-lm", "output_dir": str(tmp_path / "run"), "samples_per_epoch": 64, "micro_batch_size": 8}
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(more | {"lora": {"rank": 2}} | settings))
    found, problems = report(source=str(tmp_path / "text.yaml"))
    assert problems == []
    trained = (2 if settings["method"] == "dpo" else 1) * 64 * settings.get("inner_epochs", 1)
    assert found["passes per epoch"] == f"{passes}{trained} forward and backward while training"
    if "evaluation" in settings:
        assert found["evaluation"] == "6 completions, every 2 epochs"
        assert found["rows checked"] == "1 of dataset, 3 of evaluation.prompts"


def test_a_callback_that_cannot_be_had(report, tiny_sd, quick, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    _, problems = report(model=str(tiny_sd), callbacks=[f"{tmp_path / 'mine.py'}:Mine", "nowhere.py:Mine"])
    assert_problems(problems, ("callback", "is not a Callback"), ("callback file 'nowhere.py'", "does not exist"))


def test_a_text_recipe_without_its_prompts(report, tmp_path):
    found, problems = report(f"output_dir={tmp_path / 'run'}", "prompts=", source="grpo_tiny")
    assert problems == ["prompts and reward must both be given"]
    assert found["text per epoch"] == "64 rows of nothing"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("samples", "size"), [(64, 8), (9, 3)])
def test_batch_sizes_that_a_run_measures(report, model_path, samples, size):
    sizes = dict.fromkeys(("sample_batch_size", "micro_batch_size"), "auto")
    found, problems = report(model=model_path("tiny_sd"), samples_per_epoch=samples, **sizes)
    assert not problems
    for name in sizes:
        said = f"auto: measured when the run starts, and written to its config.yaml; estimated above with {size}"
        assert found[name] == said
    assert f"of {size}," in found["micro-batches per update"]


def test_part_of_the_steps():
    assert select_step_range(torch.arange(10, 20), (0.2, 0.7)).tolist() == [12, 13, 14, 15, 16]


def test_durations_and_sizes_are_readable():
    durations = {0.25: "0.25 s", 7: "7 s", 40: "40 s", 119: "119 s", 300: "5 min", 3600: "60 min", 86400: "24 h"}
    assert {s: costs.duration(s) for s in durations} == durations
    assert costs.duration(1e6) == "12 days"
    assert [gigabytes(n) for n in (1e4, 1_234_567, 335e6, 3.44e9)] == ["0.1 MB", "1.2 MB", "335 MB", "3.4 GB"]


@pytest.mark.gpu
def test_the_gpu_of_this_machine(report, tiny_sd):
    assert 1e12 < costs._gpu_rate() < 1e16


def test_the_pass_that_is_timed_is_of_the_runs_size(report, model_path, monkeypatch):
    from diffusion_align.doctor import cost_report

    seen = []
    monkeypatch.setattr(cost_report, "time_forward", lambda forward, use_bf16: seen.append(forward().shape) or 1.0)
    found, _ = report(model=model_path("tiny_sd"), height=32)
    assert "this CPU" in found
    assert {tuple(shape[2:]) for shape in seen} == {(16, 8)}
