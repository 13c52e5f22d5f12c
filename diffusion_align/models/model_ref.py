"""What a model is made of: a base, the adapters on it, and the run they come from.

A run with LoRA is its adapter on the model it was trained on, which may be a run as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusion_align.assets import EMBEDDED_PIPELINES
from diffusion_align.errors import UserError, short
from diffusion_align.inputs import check_path
from diffusion_align.models.families import find_family
from diffusion_align.models.image_pipelines import check_folder, check_pipeline_name
from diffusion_align.training.places import absolute_paths, found_from
from diffusion_align.training.reading import load_yaml

LORA_FILE = "pytorch_lora_weights.safetensors"
"""In the folder of an image model's adapter, as diffusers writes it."""


@dataclass(frozen=True)
class ModelRef:
    """What has to be loaded for a model.

    Attributes:
        base: an embedded model, a folder or file, or a Hub id.
        adapters: folders of the LoRA weights that go on it, one merged after the other.
        below: the model under the last adapter, as it is called in its run's configuration; the model itself if it
            has none.
        origin: what it was before anything was trained, by which rewards choose their CLIP.
        run: the run folder, if the model is one; with its ``settings``.
        variant, base_config: with which the base has to be loaded.
        family: of the run, the user's own family of pipelines, if it has one.
    """

    base: str
    adapters: tuple[Path, ...] = ()
    below: str = ""
    origin: str = ""
    run: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    base_config: str | None = None
    family: str | None = None


def image_model_ref(model: str, *, above: tuple[Path, ...] = ()) -> ModelRef:
    """What to load for ``model``: whatever ``load_pipeline`` takes, or a run folder, or its ``final/`` or ``best/``.

    Args:
        model: as in a configuration.
        above: the runs that led here.

    Raises:
        UserError: a run that is not finished, of a language model, or whose base cannot be found. Nothing is printed
            here about models that are no runs.
    """
    check_path(model, f"model={short(model)}")
    found = _run_folder(model)
    if found is None:
        return ModelRef(model, below=model, origin=_saved_from(model))
    (run, which), subject = found, f"model={model!r}"
    final = run / which
    if run.resolve() in above:
        raise UserError(f"{subject} is a run trained on itself: correct model in {run / 'config.yaml'}")
    settings = load_yaml(run / "config.yaml")
    below = settings.get("model")
    named, below = below, found_from(run, below) if isinstance(below, str) else below
    family = absolute_paths({"family": settings.get("family")}, run)["family"]
    if (final / "model_index.json").is_file():
        origin = str(below or named)
        ref = ModelRef(str(final), below=model, origin=origin, run=run, settings=settings, family=family)
        try:
            return replace(ref, origin=image_model_ref(ref.origin, above=(*above, run.resolve())).origin)
        except UserError:  # what it was trained on is not needed any more
            return ref
    if which == "best" and not final.is_dir():
        raise UserError(
            f"{subject}: the run has no best/, which a held-out reward (evaluation.reward) leaves once it rises above "
            f"where it began: use {str(run)!r}"
        )
    if not final.is_dir():
        raise UserError(f"{subject} is an unfinished run without {which}/: resume it first (resume=true)")
    if not (final / LORA_FILE).is_file():
        method = settings.get("method")
        raise UserError(
            f"{subject} is a run of method={method!r} without weights of a text-to-image pipeline in {which}/: name "
            "another model"
        )
    if named is not None and below is None:
        raise UserError(
            f"{subject} is a run whose base model {named!r} was found neither near the run nor in the current folder: "
            f"correct model in {run / 'config.yaml'}"
        )
    if not isinstance(below, str):
        raise UserError(f"{subject} does not say what it was trained on: set model in {run / 'config.yaml'}")
    try:
        ref = image_model_ref(below, above=(*above, run.resolve()))
    except UserError as error:
        raise UserError(f"{subject} is a run whose base model cannot be used: {error}") from None
    own = ref.run is None  # a run below says itself how its base is loaded
    return ModelRef(
        ref.base,
        (*ref.adapters, final),
        below=below,
        origin=ref.origin,
        run=run,
        settings=settings,
        variant=settings.get("weights_variant") if own else ref.variant,
        base_config=_found(run, settings.get("base_config")) if own else ref.base_config,
        family=family,
    )


def _saved_from(model: str) -> str:
    """What a folder's pipeline was loaded from before it was saved there, as diffusers notes; else ``model`` itself."""
    seen: list[str] = []
    while model not in seen:
        seen.append(model)
        try:
            index = json.loads((Path(model).expanduser() / "model_index.json").read_text(encoding="utf-8"))
            model = str(index["_name_or_path"] or model)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError):  # no such user (~name) is a RuntimeError
            break
    return model


def check_image_model(
    model: str,
    *,
    variant: str | None = None,
    base_config: str | None = None,
    family: str | None = None,
    lora_layers: str | None = None,
    lora_text_encoder: bool = False,
    height: int | None = None,
    width: int | None = None,
    bucket_step: int | None = None,
    settings: Mapping[str, Any] | None = None,
    to_train: bool = True,
) -> None:
    """UserError if ``model`` can be neither a text-to-image pipeline nor a run of one; nothing is loaded.

    Args:
        model, variant, base_config, family: as in a configuration; those of a run if not given.
        lora_layers, lora_text_encoder: of the adapters to train, if any.
        height, width, bucket_step, settings, to_train: see ``check_folder``.
    """
    ref = image_model_ref(model)
    chosen = find_family(family or ref.family)
    if chosen is not None and lora_layers is not None:
        chosen.adapted_layers(lora_layers)
    if chosen is not None and lora_text_encoder:
        chosen.adapted_encoder_layers()
    variant = ref.variant if variant is None else variant
    base_config = ref.base_config if base_config is None else base_config
    try:
        check_pipeline_name(ref.base, variant=variant, base_config=base_config)
        sizes: Any = {"height": height, "width": width, "bucket_step": bucket_step}
        described = {"model": ref.base} if base_config is None else {"base_config": base_config}
        adapted: Any = {"lora_layers": lora_layers, "lora_text_encoder": lora_text_encoder}
        for name, folder in described.items():
            check_folder(folder, chosen, **sizes, **adapted, settings=settings, to_train=to_train, name=name)
    except UserError as error:
        if ref.run is None:
            raise
        raise UserError(f"model={model!r} is a run whose base model cannot be used: {error}") from None


def _run_folder(model: str) -> tuple[Path, str] | None:
    """The run, and which of its weights are meant."""
    folder = Path(os.path.expanduser(model))
    if folder.name in ("final", "best") and os.path.isfile(folder.parent / "config.yaml"):
        return folder.parent, folder.name
    if model in EMBEDDED_PIPELINES or os.path.isfile(folder / "model_index.json"):  # they answer about any text
        return None
    if os.path.isfile(folder / "config.yaml"):
        return folder, "final"
    return None


def _found(run: Path, place: Any) -> Any:
    return (found_from(run, place) or place) if isinstance(place, str) else place
