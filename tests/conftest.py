"""Tiny pipelines of the real classes, random weights, written to disk once a session; and helpers on top of them."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set it to 0 for the tests marked network

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers")
pytest_plugins = ["tests.helpers.golden"]
LATENT = 8  # side of the tiny models' latents
# Files of a minute or about it. They start first, so that no core idles while another ends one of them.
LONG_FILES = (
    "test_dpo_runs.py",
    "test_configs.py",
    "test_two_processes.py",
    "test_examples.py",
    "test_readme.py",
    "test_interrupt_and_resume.py",
    "test_docs.py",
    "test_two_processes_text.py",
    "test_two_processes_dpo.py",
    "test_text_runs.py",
    "test_real_folders.py",
    "test_tutorials.py",
    "test_image_pipeline.py",
    "test_doctor.py",
    "test_served_runs.py",
    "test_evaluation_runs.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Long files first; the others keep their order (pytest-xdist hands files out in it, if told not to reorder)."""
    ranks = {name: rank for rank, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums in one order: results do not depend on the machine's core count."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Built from a tree without symbolic links."""
    from tests.helpers.installed import build_wheel, tree_without_links

    return build_wheel(tree_without_links(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory):
    """A folder with the installed copy, to come first on ``PYTHONPATH``."""
    import zipfile

    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """The command line in processes of its own."""
    from tests.helpers.forked_cli import ForkedCli

    with ForkedCli(tmp_path_factory.mktemp("forked")) as client:
        yield client


@pytest.fixture
def call_cli(monkeypatch, capfd):
    """``call_cli("train", "tiny.yaml", ...)`` in this process: exit status, stdout, stderr."""

    def call(*arguments):
        from diffusion_align.cli import main

        monkeypatch.setattr(sys, "argv", ["diffusion-align", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def own_datasets_cache(tmp_path_factory, monkeypatch):
    """An empty cache of ``datasets``, and none of its progress bars."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    yield
    if not before:
        datasets.enable_progress_bars()


@pytest.fixture
def hub_rows(tmp_path, monkeypatch):
    """The folder that stands in for the Hub dataset ``some/rows``."""
    import datasets

    folder, load = tmp_path / "hub", datasets.load_dataset
    folder.mkdir()
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **kw: load(str(folder) if name == "some/rows" else name, **kw)
    )
    return folder


def _unet(**overrides):
    from diffusers import UNet2DConditionModel

    settings = {
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(settings | overrides))


def _vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=2 * LATENT,
        scaling_factor=0.5,
    )


def _tokenizer():
    from transformers import CLIPTokenizer

    from diffusion_align.assets import asset_path

    return CLIPTokenizer.from_pretrained(asset_path("emoji-sd") / "tokenizer")


# The scheduler_config.json of the published models; SD 1.5's and SDXL's carry settings of more than one class.
_SD15 = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
_SD2 = {k: v for k, v in _SD15.items() if k != "skip_prk_steps"} | {"prediction_type": "v_prediction"}
_SDXL = _SD15 | {
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


def _stable_diffusion(scheduler, **unet):
    from diffusers import StableDiffusionPipeline

    from tests.helpers.published import text_encoder

    torch.manual_seed(0)
    tokenizer = _tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=text_encoder(tokenizer, layers=2),
        tokenizer=tokenizer,
        unet=_unet(**unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """Folder of a tiny Stable Diffusion 1.5: epsilon, PNDM with the published settings."""
    from diffusers import PNDMScheduler

    folder = tmp_path_factory.mktemp("tiny") / "sd"
    _stable_diffusion(PNDMScheduler.from_config(_SD15)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory):
    """Folder of a tiny Stable Diffusion 2: v-prediction, DDIM, linear projections in its attention."""
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("tiny") / "sd2"
    scheduler = DDIMScheduler.from_config(_SD2)
    _stable_diffusion(scheduler, use_linear_projection=True, attention_head_dim=(2, 4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_inpainting(tmp_path_factory):
    """Folder of a StableDiffusionPipeline whose UNet takes nine channels."""
    from diffusers import PNDMScheduler

    folder = tmp_path_factory.mktemp("tiny") / "inpainting"
    _stable_diffusion(PNDMScheduler.from_config(_SD15), in_channels=9).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """Folder of a tiny Stable Diffusion XL: two text encoders, size conditioning, zeros for the empty prompt."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from tests.helpers.published import text_encoder

    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    torch.manual_seed(0)
    tokenizer, projection, time = _tokenizer(), 8, 8
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=text_encoder(tokenizer, layers=2),
        text_encoder_2=text_encoder(tokenizer, projection=projection, layers=2),
        tokenizer=tokenizer,
        tokenizer_2=_tokenizer(),
        unet=_unet(
            cross_attention_dim=32,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time,
            projection_class_embeddings_input_dim=projection + 6 * time,
        ),
        scheduler=EulerDiscreteScheduler.from_config(_SDXL),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """Folder of a tiny Stable Diffusion 3.5: two CLIPs and T5, static shift."""
    from tests.helpers.flow_models import sd3

    folder = tmp_path_factory.mktemp("tiny") / "sd3"
    sd3(_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """Folder of a tiny FLUX.1-dev: embedded guidance, dynamic shift. It names no size of images."""
    from tests.helpers.flow_models import flux

    folder = tmp_path_factory.mktemp("tiny") / "flux"
    flux(_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory):
    """Folder of a tiny FLUX.1-schnell: no guidance, no shift."""
    from tests.helpers.flow_models import flux

    folder = tmp_path_factory.mktemp("tiny") / "schnell"
    flux(_tokenizer(), guidance_embeds=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory):
    """Folder of a tiny Z-Image: a Qwen3 reads prompts, static shift. It names no size of images."""
    from tests.helpers.newer_flow_models import z_image

    folder = tmp_path_factory.mktemp("tiny") / "z_image"
    z_image().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """``published(name, form)``: a tiny model built as the published "sd15", "sd2" or "sdxl"; see ``published.py``.

    Forms: "folder"; "fp16", a folder that holds only weights of that variant; "bf16", a folder of such weights under
    the usual names; "file", in one file with the original names, which "folder" describes.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
    from safetensors.torch import save_file

    from tests.helpers import published as made

    root, schedulers = tmp_path_factory.mktemp("published"), {"sd15": PNDMScheduler.from_config(_SD15)}
    schedulers |= {"sd2": DDIMScheduler.from_config(_SD2), "sdxl": EulerDiscreteScheduler.from_config(_SDXL)}

    def path(name, form="folder"):
        target = root / f"{name}.safetensors" if form == "file" else root / f"{name}-{form}"
        if not target.exists():
            pipeline = made.pipeline(name, _tokenizer(), schedulers)
            if form == "file":
                save_file(made.original_layout(pipeline), target)
            else:
                dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
                for part in (p for p in pipeline.components.values() if isinstance(p, torch.nn.Module)):
                    part.to(dtypes.get(form, torch.float32))
                pipeline.save_pretrained(target, variant="fp16" if form == "fp16" else None)
        return target

    return path


@pytest.fixture(scope="session")
def clip_768(tmp_path_factory):
    """Folder of a random CLIP with ViT-L/14's 768 dimensions, which the published aesthetic heads take."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer, folder = _tokenizer(), tmp_path_factory.mktemp("clip") / "768"
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=tower | text, vision_config=vision, projection_dim=768)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_path(request):
    """``model_path(name)``: what to load for "tiny_sd", "tiny_sd2", "tiny_sdxl", "tiny_inpainting" or "emoji-sd"."""
    return lambda name: name if name == "emoji-sd" else str(request.getfixturevalue(name))


@pytest.fixture(scope="session")
def make_policy(model_path):
    """``make_policy(name, noise=0, **settings)``: a new DenoisingPolicy; ``noise`` moves its adapters off zero."""
    from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
    from diffusion_align.models.image_pipelines import load_pipeline

    def make(name, *, noise=0.0, seed=0, **settings):
        pipeline = load_pipeline(model_path(name))  # the first time it is made, which draws random numbers
        torch.manual_seed(seed)
        policy = DenoisingPolicy(pipeline, **({"lora": LoRAConfig(rank=4)} | settings))
        with torch.no_grad():
            for parameter in policy.trainable.values() if noise else ():
                parameter.add_(noise * torch.randn_like(parameter))
        return policy

    return make


@pytest.fixture(scope="session")
def streams():
    """``streams(n, seed=0)``: one CPU generator for each of n samples."""
    return lambda n, seed=0: [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_language_model(folder, *, template=None, seed=0, extra="", context=64):
    """A Llama of two layers with random weights and a character tokenizer, which knows ``extra`` characters too."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = ["<unk>", "</s>", "\n", *" abcdefghijklmnopqrstuvwxyz<>?.+=0123456789", *extra]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(known)}, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(known),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than usual, so that log-probs differ
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory):
    """Folder of a tiny causal language model without a chat template; 64 tokens of context, a character each."""
    return save_language_model(tmp_path_factory.mktemp("tiny") / "lm")


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory):
    """The same with a chat template."""
    return save_language_model(tmp_path_factory.mktemp("tiny") / "chat", template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def make_language_model():
    """``make_language_model(folder, template=None, seed=0, extra="", context=64)``: writes another one."""
    return save_language_model
