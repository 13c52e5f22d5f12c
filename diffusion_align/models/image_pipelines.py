"""From a name, folder, file or hub id to a diffusers pipeline. Weights are read from safetensors only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_align.assets import EMBEDDED_MODELS, LANGUAGE_MODELS, asset_path
from diffusion_align.errors import UserError, first_line, short
from diffusion_align.inputs import check_path
from diffusion_align.models.part_configs import check_folder, check_pipeline
from diffusion_align.models.single_file import check_single_file, family_of, is_one_file, load_single_file
from diffusion_align.pretrained import hub_or_cache, load_in_dtype
from diffusion_align.training.config import nearest

EMBEDDED_PIPELINES = ["emoji-sd"]
FAMILIES: dict[str, dict[str, Any]] = {  # class -> arguments for what is not used here
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # whose classes model_index.json may name
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
# model.safetensors, model.fp16.safetensors and their shards
WEIGHTS_FILE = re.compile(r"[^.]+?(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?\.safetensors")


def check_pipeline_name(model: str, *, variant: str | None = None, base_config: str | None = None) -> None:
    """Look at what ``model`` names without loading or downloading it.

    Args:
        model, variant, base_config: see ``load_pipeline``. Of a folder the names of its files are read, and of a file
            those of its tensors.

    Raises:
        UserError: it cannot be a text-to-image pipeline.
    """
    check_path(model, f"model={short(model)}")
    if base_config is not None:
        check_path(base_config, f"base_config={short(base_config)}")
    if not is_one_file(model):
        if base_config is not None:
            raise UserError(
                f"base_config={base_config!r} is for a model in one .safetensors file, and model={model!r} is not "
                "one: leave it out"
            )
        _check_folder_or_id(f"model={model!r}", model)
        _check_variant(model, variant)
        return
    if variant is not None:
        raise UserError(
            f"weights_variant={variant!r} is for a folder or a hub id, and model={model!r} is a file: leave it out"
        )
    if base_config is not None:
        if is_one_file(base_config):
            raise UserError(f"base_config={base_config!r} is a file: give a folder or hub id of a diffusers pipeline")
        _check_folder_or_id(f"base_config={base_config!r}", base_config)
    check_single_file(model, has_base_config=base_config is not None)


def _check_folder_or_id(subject: str, model: str) -> None:
    if model in EMBEDDED_PIPELINES:
        return
    if model in LANGUAGE_MODELS:
        raise UserError(f"{subject} is a language model, not a text-to-image pipeline: use a text method such as grpo")
    if model in EMBEDDED_MODELS:
        raise UserError(f"{subject} is not a text-to-image pipeline: embedded are {', '.join(EMBEDDED_PIPELINES)}")
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):  # unlike Path.is_dir it answers about any text
        if (folder / "model_index.json").is_file():
            return
        one_model = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
        hint = ": it holds one model, and a language model needs a text method such as grpo" if one_model else ""
        raise UserError(f"{subject}: the folder has no model_index.json{hint}")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        hint = nearest(model, EMBEDDED_PIPELINES)
        raise UserError(f"{subject} is neither an embedded model, nor a folder, nor a hub id 'owner/name': {hint}")


def _check_variant(model: str, variant: str | None) -> None:
    """Whether a folder lacks the weights asked for but has others."""
    folder = Path(_source(model))
    parts = [folder / name for name in NETWORKS if os.path.isdir(folder / name)]
    held = {
        part.name: {m["variant"] for f in part.iterdir() if (m := WEIGHTS_FILE.fullmatch(f.name))} for part in parts
    }
    variants = sorted(set().union(*held.values()) - {None})
    if variant is not None and held and variant not in variants:
        others = f"only {', '.join(variants)}" if variants else "none at all"
        raise UserError(f"weights_variant={variant!r}: of variants the folder {model!r} has {others}")
    lacking = [name for name, found in held.items() if found and not found & {None, variant}]
    if lacking:
        raise UserError(
            f"weights_variant={variant!r}: {lacking[0]}/ of the folder {model!r} has weights of the variants "
            f"{', '.join(sorted(held[lacking[0]] - {None}))} only: name one of them"
        )


def check_unet(subject: str, family: str | None, unet: Mapping[str, Any]) -> None:
    """Refuse a UNet that takes an input which training does not feed.

    Args:
        subject: of the sentence, what the UNet is of.
        family: class of its pipeline.
        unet: its configuration.

    Raises:
        UserError: it takes one.
    """
    fed = {
        "time_cond_proj_dim": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None, "text_time") if family == "StableDiffusionXLPipeline" else (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
    }
    for name, values in fed.items():
        if unet.get(name) not in values:
            raise UserError(
                f"{subject} has a UNet with {name}={unet[name]!r}, an input that training does not feed: use a plain "
                "Stable Diffusion 1.x, 2 or XL model"
            )


def check_folder_unet(model: str) -> None:
    """``check_unet`` of a folder or an embedded model, as far as its configuration is at hand."""
    folder = Path(_source(model))
    try:
        index, unet = (
            json.loads((folder / name).read_text(encoding="utf-8")) for name in ("model_index.json", "unet/config.json")
        )
        check_unet(f"model={model!r}", index.get("_class_name"), unet)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # which loading will say
        return


def load_pipeline(
    model: str,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    base_config: str | None = None,
    to_train: bool = False,
) -> Any:
    """The diffusers pipeline ``model`` stands for, without a safety checker, on the CPU.

    Args:
        model: "emoji-sd", a folder written by ``save_pretrained``, a hub id, or a ``.safetensors`` file with the
            original names of its tensors.
        dtype: of the weights; a VAE that overflows in half precision is float32 and takes any.
        variant: weight files of a folder or hub id to choose, e.g. "fp16".
        base_config: of a model in one file, folder or hub id of a pipeline whose configuration files describe it, the
            scheduler's too; diffusers' guess, which it asks the hub for, when not given.
        to_train: refuse a UNet that cannot be trained before its weights are read.

    Raises:
        UserError: the model is not there, cannot be read, or is of a class that is not supported.
    """
    check_pipeline_name(model, variant=variant, base_config=base_config)
    described_by = base_config if is_one_file(model) else _source(model)
    with _quiet(), hub_or_cache(*([] if described_by is None else [_source(described_by)])):
        if is_one_file(model):
            family, base = family_of(model), None
            if base_config is not None:
                base = _source(base_config)
                described = _checked_family(base_config, base, name="base_config")
                if described != family:
                    raise UserError(f"base_config={base_config!r} is a {described}, but model={model!r} a {family}")
            pipeline = load_single_file(model, dtype=dtype, base_config=base, options=FAMILIES[family])
        else:
            pipeline = _load_folder(model, dtype, variant, to_train=to_train)
        check_pipeline(f"model={model!r}", pipeline)
        if pipeline.vae.config.force_upcast:
            _accept_any_dtype(pipeline.vae)
        else:
            pipeline.vae.to(dtype)
    return pipeline


def _load_folder(model: str, dtype: torch.dtype, variant: str | None, *, to_train: bool) -> Any:
    """The pipeline of a folder or hub id, its VAE in float32."""
    import diffusers

    source = _source(model)
    family = _checked_family(model, source, name="model")
    try:
        if to_train:
            unet = diffusers.UNet2DConditionModel.load_config(source, subfolder="unet")
            check_unet(f"model={model!r}", family, unet)
        return load_in_dtype(
            getattr(diffusers, family).from_pretrained,
            source,
            # float32 as it is in the file, not as it comes back from half precision
            dtype={"default": dtype, "vae": torch.float32},
            variant=variant,
            use_safetensors=True,
            **FAMILIES[family],
        )
    except UserError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a wrong value leads to
        raise UserError(f"model={model!r} could not be loaded: {first_line(error)}") from error


def _source(model: str) -> str:
    """What diffusers is given for ``model``: a folder that exists, or a hub id."""
    folder = asset_path(model) if model in EMBEDDED_PIPELINES else Path(os.path.expanduser(model))
    return str(folder) if os.path.isdir(folder) else model


def _checked_family(model: str, source: str, *, name: str) -> str:
    """The supported pipeline class of a folder or hub id, all of whose parts are there."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(source)
    except Exception as error:  # of a file that holds something else
        raise UserError(f"{name}={model!r} could not be loaded: {first_line(error)}") from error
    family = index.get("_class_name") if isinstance(index, dict) else None
    if family not in FAMILIES:
        raise UserError(
            f"{name}={model!r} is a {family}, which is not supported: use one of {', '.join(sorted(FAMILIES))}"
        )
    # transformers makes up an empty tokenizer where there is none.
    parts = [part for part, kind in index.items() if isinstance(kind, list) and kind[:1] and kind[0]]
    foreign = [(part, index[part][0]) for part in parts if index[part][0] not in _LIBRARIES]
    if foreign:
        part, library = foreign[0]
        raise UserError(f"{name}={model!r}: its {part} is of {short(library)}, of which nothing is loaded")
    parts = [part for part in parts if part != "safety_checker"]
    absent = [part for part in parts if not os.path.isdir(os.path.join(source, part))] if os.path.isdir(source) else []
    if absent:
        raise UserError(f"{name}={model!r} is incomplete: the folder has no {absent[0]}/")
    check_folder(f"{name}={model!r}", Path(source))
    return family


def _accept_any_dtype(vae: Any) -> None:
    """Let a VAE in float32 be given latents and pictures in the dtype of the UNet, as diffusers' pipelines do."""
    for part in (vae.encoder, vae.quant_conv, vae.post_quant_conv, vae.decoder):
        if part is not None:
            part.register_forward_pre_hook(_cast_to_weights)


def _cast_to_weights(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if isinstance(value, torch.Tensor) else value for value in inputs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that diffusers logs before it raises, and what it makes huggingface_hub warn of."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        logging.set_verbosity(verbosity)
