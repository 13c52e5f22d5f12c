"""Models in one file with the original names of its tensors.

How such a model is built stands in none of them, so it is read from the configuration files of a pipeline built like
it: ``base_config``, or the one on the Hub that diffusers guesses.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from diffusion_align.errors import UserError, first_line
from diffusion_align.pretrained import load_in_dtype

if TYPE_CHECKING:
    import torch

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
# What names the text encoders; of two of them both have to be there.
_TEXT_ENCODERS = {
    "Stable Diffusion 1": ("cond_stage_model.transformer.",),
    "Stable Diffusion 2": ("cond_stage_model.model.",),
    "Stable Diffusion XL": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
_PICKLES = {".ckpt", ".pt", ".pth", ".bin"}


def is_one_file(model: str) -> bool:
    """Whether ``model`` names a file, which need not be there, rather than a folder or a Hub id."""
    return Path(model).suffix.lower() in {".safetensors", *_PICKLES} or os.path.isfile(os.path.expanduser(model))


def check_single_file(model: str, *, has_base_config: bool) -> None:
    """UserError if the file ``model`` cannot be loaded; of its content only the names are read."""
    suffix = Path(model).suffix.lower()
    if suffix in _PICKLES:
        why = "which can run code when it is read: use the model's .safetensors file"
        raise UserError(f"model={model!r} is a pickle, {why}")
    if suffix != ".safetensors":
        raise UserError(f"model={model!r} is a file that does not end in .safetensors: use one that does, or a folder")
    if not os.path.isfile(os.path.expanduser(model)):
        raise UserError(f"model={model!r}: there is no such file")
    try:
        layout = _layout(_names(model))
    except (OSError, SafetensorError) as error:
        raise UserError(f"model={model!r} could not be read: {first_line(error)}") from None
    if layout is None:
        raise UserError(
            f"model={model!r} does not hold a UNet, a VAE and the text encoders of Stable Diffusion 1, 2 or XL under "
            "their original names: use a whole checkpoint, or a folder in the diffusers layout"
        )
    if layout == "Stable Diffusion 2" and not has_base_config:
        raise UserError(
            f"model={model!r} is a {layout}, whose file does not say whether it predicts the noise or v: set "
            "base_config to a folder or Hub id of a diffusers pipeline built like it"
        )


def class_of_file(model: str) -> str:
    """The diffusers pipeline class of a file that ``check_single_file`` lets pass."""
    is_xl = _layout(_names(model)) == "Stable Diffusion XL"
    return "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"


def load_single_file(model: str, *, dtype: torch.dtype, base_config: str | None, options: Mapping[str, Any]) -> Any:
    """The diffusers pipeline in the file ``model``, its VAE in float32; ``options`` are for ``from_single_file``."""
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    file = os.path.expanduser(model)
    source: dict[str, Any] = {"config": base_config}
    source["local_files_only"] = base_config is not None and os.path.isdir(base_config)
    told = f"base_config={base_config!r}" if base_config else "the configuration that diffusers guesses"
    advice = "set base_config to a local folder of a diffusers pipeline built like it"
    try:
        part = {"subfolder": "vae"} if base_config else {}
        vae = load_in_dtype(diffusers.AutoencoderKL.from_single_file, file, dtype=torch.float32, **source, **part)
        kind = getattr(diffusers, class_of_file(model))
        pipeline = load_in_dtype(kind.from_single_file, file, dtype=dtype, vae=vae, **source, **options)
    except NotImplementedError as error:  # of torch, about a weight that nothing was put into
        raise UserError(f"model={model!r} does not fit {told}: the file lacks weights of it; {advice}") from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SingleFileComponentError) as error:
        raise UserError(f"model={model!r} could not be loaded with {told}: {first_line(error)}; {advice}") from error
    networks = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    empty = any(parameter.is_meta for part in networks for parameter in part.parameters())
    held, used = sum(name.startswith(_UNET) for name in _names(model)), len(pipeline.unet.state_dict())
    # diffusers leaves out what it finds no place for.
    if empty or held > used:
        what = "lacks weights of it" if empty else f"holds {held} tensors of a UNet, not {used}"
        raise UserError(f"model={model!r} does not fit {told}: the file {what}; {advice}")
    return pipeline


def _names(model: str) -> list[str]:
    with safe_open(os.path.expanduser(model), framework="pt") as file:
        return list(file.keys())


def _layout(names: list[str]) -> str | None:
    def held(*prefixes: str) -> bool:
        return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)

    if not held(_UNET, _VAE):
        return None
    return next((layout for layout, prefixes in _TEXT_ENCODERS.items() if held(*prefixes)), None)
