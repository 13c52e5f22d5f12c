"""From a name, folder, file or Hub id to a diffusers pipeline. Weights are read from safetensors only."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.assets import EMBEDDED_MODELS, EMBEDDED_PIPELINES, LANGUAGE_MODELS, asset_path
from diffusion_align.errors import UserError, first_line, nearest, short
from diffusion_align.inputs import check_path
from diffusion_align.models.families import ModelFamily, check_settings, family_of_class, give_family
from diffusion_align.models.families.flow_matching import is_flow
from diffusion_align.models.pipeline_configurations import NETWORKS, check_configurations, check_loaded
from diffusion_align.models.single_file import check_single_file, class_of_file, is_one_file, load_single_file
from diffusion_align.pretrained import hub_or_cache, load_in_dtype
from diffusion_align.writing import write_text

if TYPE_CHECKING:
    import torch

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # whose classes model_index.json may name
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
            f"weights_variant={variant!r} is for a folder or a Hub id, and model={model!r} is a file: leave it out"
        )
    if base_config is not None:
        if is_one_file(base_config):
            raise UserError(f"base_config={base_config!r} is a file: give a folder or Hub id of a diffusers pipeline")
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
        raise UserError(f"{subject} is neither an embedded model, nor a folder, nor a Hub id 'owner/name': {hint}")


def _check_variant(model: str, variant: str | None) -> None:
    """Whether a folder lacks the requested weights but has others."""
    folder = Path(_source(model))
    parts = [folder / name for name in NETWORKS if os.path.isdir(folder / name)]
    held = {
        part.name: {m["variant"] for f in part.iterdir() if (m := WEIGHTS_FILE.fullmatch(f.name))} for part in parts
    }
    variants = sorted(set().union(*held.values()) - {None})
    if variant is not None and held and variant not in variants:
        remedy = f"use one of {', '.join(variants)}" if variants else "leave it out"
        raise UserError(f"weights_variant={variant!r}: the folder {model!r} has no such weights: {remedy}")
    lacking = [name for name, found in held.items() if found and not found & {None, variant}]
    if lacking:
        raise UserError(
            f"weights_variant={variant!r}: {lacking[0]}/ of the folder {model!r} has weights of other variants only: "
            f"use one of {', '.join(sorted(held[lacking[0]] - {None}))}"
        )


def check_folder(
    model: str,
    family: ModelFamily | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    bucket_step: int | None = None,
    lora_layers: str | None = None,
    lora_text_encoder: bool = False,
    settings: Mapping[str, Any] | None = None,
    to_train: bool = True,
    name: str = "model",
) -> None:
    """UserError if a folder or an embedded model cannot be trained, as far as its configuration is at hand.

    Args:
        family: the user's own, if one was named.
        height, width: of its images in pixels; its own where None.
        bucket_step: of their buckets, if any.
        lora_layers, lora_text_encoder: of the adapters to train, if any.
        settings: of the run, see ``ModelFamily.setting_checks``.
        to_train: False to check only what sampling needs.
        name: of the setting that ``model`` is.
    """
    folder, subject = Path(_source(model)), f"{name}={model!r}"
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        of_model = family_of_class(kind, family, subject)
        config, vae = (
            json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
            for part in (of_model.network, "vae")
        )
        if to_train:
            of_model.check_network(subject, config)
        of_model.latent_size(config, vae, height=height, width=width)
        if bucket_step is not None:
            of_model.buckets(config, vae, bucket_step, height=height, width=width)
        if lora_layers is not None:
            of_model.adapted_layers(lora_layers)
        if lora_text_encoder:
            of_model.adapted_encoder_layers()
        check_settings(of_model, config, settings or {})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):  # which loading will say
        return


def scheduler_at_hand(model: str) -> dict[str, Any] | None:
    """The configuration of the scheduler of a folder or an embedded model; None where it cannot be read."""
    try:
        file = Path(_source(model)) / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # which loading will say
        return None
    return config if isinstance(config, dict) else None


def load_pipeline(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    base_config: str | None = None,
    family: ModelFamily | None = None,
    upcast_vae: bool | None = None,
    to_train: bool = False,
    height: int | None = None,
    width: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """The diffusers pipeline ``model`` stands for, without a safety checker, on the CPU.

    Args:
        model: "emoji-sd", "emoji-flow", a folder written by ``save_pretrained``, a Hub id, or a ``.safetensors`` file
            with the original names of its tensors.
        dtype: of the weights, float32 if not given.
        variant: weight files of a folder or Hub id to choose, e.g. "fp16".
        base_config: of a model in one file, folder or Hub id of a pipeline whose configuration files describe it, the
            scheduler's too; by default diffusers' guess, loaded from the Hub.
        family: the user's own, of a class of pipelines that is not shipped.
        upcast_vae: keep the VAE in float32, as in the file, whatever ``dtype``; if not given, one that overflows in
            half precision is kept so (``force_upcast`` of its configuration).
        to_train: refuse a network that cannot be trained before its weights are read.
        height, width: of its images in pixels, which are then checked as well; its own where None.
        settings: of the run, as far as they say how its family reads prompts, see ``ModelFamily.with_settings``.

    Raises:
        UserError: the model is not there, cannot be read, or is of a class that is not supported.
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    check_pipeline_name(model, variant=variant, base_config=base_config)
    described_by = base_config if is_one_file(model) else _source(model)
    size = {"height": height, "width": width} if to_train else {}
    with quiet(), hub_or_cache(*([] if described_by is None else [_source(described_by)])):
        if is_one_file(model):
            kind, base = class_of_file(model), None
            of_file = family_of_class(kind, family, f"model={model!r}")
            if base_config is not None:
                base = _source(base_config)
                described = _checked_index(base_config, base, family, {}, name="base_config")["_class_name"]
                if described != kind:
                    raise UserError(f"base_config={base_config!r} is a {described}, but model={model!r} a {kind}")
                _check_size(of_file, base, size)
            pipeline = load_single_file(model, dtype=dtype, base_config=base, options=of_file.load_options)
        else:
            pipeline = _load_folder(
                model,
                dtype,
                variant,
                family,
                settings or {},
                to_train=to_train,
                size=size,
            )
        family = family_of_class(type(pipeline).__name__, family)
        give_family(pipeline, family.with_settings(settings or {}))
        check_settings(family, getattr(pipeline, family.network).config, settings or {})
        check_loaded(f"model={model!r}", pipeline)
        if pipeline.vae.config.force_upcast if upcast_vae is None else upcast_vae:
            _accept_any_dtype(pipeline.vae)
        else:
            pipeline.vae.to(dtype)
    return pipeline


def _load_folder(
    model: str,
    dtype: torch.dtype,
    variant: str | None,
    family: ModelFamily | None,
    settings: Mapping[str, Any],
    *,
    to_train: bool,
    size: Mapping[str, int | None],
) -> Any:
    """The pipeline of a folder or Hub id, its VAE in float32."""
    import diffusers
    import torch

    source = _source(model)
    index, requested = _checked_index(model, source, family, settings, name="model"), settings
    kind = str(index["_class_name"])
    if not (index.get("text_encoder_3") or [None])[0]:  # of a pipeline that was saved without T5
        settings = {**settings, "t5": False}
    of_model = family_of_class(kind, family).with_settings(settings)
    try:
        if to_train:
            network = getattr(diffusers, of_model.network_class).load_config(source, subfolder=of_model.network)
            of_model.check_network(f"model={model!r}", network)
            check_settings(of_model, network, requested)
            _check_size(of_model, source, size)
        return load_in_dtype(
            getattr(diffusers, kind).from_pretrained,
            source,
            # float32 as it is in the file, not as it comes back from half precision
            dtype={"default": dtype, "vae": torch.float32},
            variant=variant,
            use_safetensors=True,
            **of_model.load_options,
        )
    except UserError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a wrong value leads to
        raise UserError(f"model={model!r} could not be loaded: {first_line(error)}") from error


def _check_size(family: ModelFamily, source: str, size: Mapping[str, int | None]) -> None:
    """UserError if images cannot have this height and width, by the configuration in a folder or on the Hub."""
    import diffusers

    if any(size.values()):
        network = getattr(diffusers, family.network_class).load_config(source, subfolder=family.network)
        vae = diffusers.AutoencoderKL.load_config(source, subfolder="vae")
        family.latent_size(network, vae, **size)


def _source(model: str) -> str:
    """What diffusers is given for ``model``: a folder that exists, or a Hub id."""
    folder = asset_path(model) if model in EMBEDDED_PIPELINES else Path(os.path.expanduser(model))
    return str(folder) if os.path.isdir(folder) else model


def _checked_index(
    model: str, source: str, family: ModelFamily | None, settings: Mapping[str, Any], *, name: str
) -> Mapping[str, Any]:
    """model_index.json of a folder or Hub id: of a supported class, all of whose parts are there."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(source)
    except Exception as error:  # of a file that holds something else
        raise UserError(f"{name}={model!r} could not be loaded: {first_line(error)}") from error
    kind: Any = index.get("_class_name") if isinstance(index, dict) else None
    options = family_of_class(kind, family, f"{name}={model!r}").with_settings(settings).load_options
    # transformers makes up an empty tokenizer where there is none.
    parts = [part for part, kind in index.items() if isinstance(kind, list) and kind[:1] and kind[0]]
    foreign = [(part, index[part][0]) for part in parts if index[part][0] not in _LIBRARIES]
    if foreign:
        part, library = foreign[0]
        raise UserError(
            f"{name}={model!r}: its {part} is from {short(library)}: use one from diffusers or transformers"
        )
    parts = [part for part in parts if options.get(part, part) is not None]
    absent = [part for part in parts if not os.path.isdir(os.path.join(source, part))] if os.path.isdir(source) else []
    if absent:
        raise UserError(f"{name}={model!r} is incomplete: the folder has no {absent[0]}/")
    check_configurations(f"{name}={model!r}", Path(source))
    return dict(index)


def save_pipeline(pipeline: Any, folder: Path) -> None:
    """Write a pipeline as diffusers does, but for what its scheduler has by default of its class.

    diffusers carries settings from one scheduler to another, here to a sampler's, unless they are such defaults:
    written out they would be settings, and a pipeline that is read back would be sampled at other timesteps.
    """
    pipeline.save_pretrained(str(folder))
    defaults = pipeline.scheduler.config.get("_use_default_values", ())
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in defaults}
    write_text(file, json.dumps(kept, indent=2, sort_keys=True) + "\n")


def takes_eta(pipeline: Any) -> bool:
    """Whether a diffusers pipeline's own call has DDIM's ``eta``."""
    return "eta" in inspect.signature(pipeline.__call__).parameters


def diffusers_scheduler(sampler: str | None, config: Mapping[str, Any]) -> str | None:
    """The diffusers class that samples as ``sampler`` does, None if there is none; ``config``: the model's scheduler's.

    Of flow matching's it depends on the noise, see ``rollout.scheduler_of``. With ``timestep_spacing="linspace"``
    diffusers' DDIM leaves the list of timesteps, see ``samplers.ddim``.
    """
    if is_flow(config):
        return None
    if sampler in (None, "ddim") and config.get("timestep_spacing") == "linspace":
        return None
    return {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}.get(sampler or "ddim")


def _accept_any_dtype(vae: Any) -> None:
    """Let a VAE in float32 be given latents and images in the dtype of the network, as diffusers' pipelines do."""
    for part in (vae.encoder, vae.quant_conv, vae.post_quant_conv, vae.decoder):
        if part is not None:
            part.register_forward_pre_hook(_cast_to_weights)


def _cast_to_weights(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if isinstance(value, torch.Tensor) else value for value in inputs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the tracebacks that diffusers logs before it raises, what it makes huggingface_hub warn of, and its
    warnings about long prompts."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        logging.set_verbosity(verbosity)
