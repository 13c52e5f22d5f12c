"""Whether a name stands for a text-to-image model or a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from diffusion_align.errors import UserError, problems_of
from diffusion_align.models.language_models import language_model_ref
from diffusion_align.models.model_ref import check_image_model
from diffusion_align.pretrained import hub_or_cache


def model_kind(names: Sequence[str]) -> Literal["image", "text"]:
    """Of all of ``names``, as the loaders take them; "image" where nothing says that they are language models.

    Raises:
        UserError: they are of both kinds.
    """
    known = {}
    for name in names:
        text, image = (not problems_of(check, name) for check in (language_model_ref, check_image_model))
        kind = ("image" if image else "text") if text != image else None
        kind = _on_the_hub(name) if text and image else kind
        if kind is not None:
            known[name] = kind
    kinds = set(known.values())
    if len(kinds) == 2:
        of_kind = {kind: next(name for name in known if known[name] == kind) for kind in kinds}
        raise UserError(
            f"{of_kind['image']!r} is a text-to-image model and {of_kind['text']!r} a language model: give models of "
            "one kind"
        )
    return "text" if kinds == {"text"} else "image"


def _on_the_hub(name: str) -> Literal["image", "text"] | None:
    """By the files that a repository of the Hub, or its cache, has; None where that is not known."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_or_cache(name):
        for file, kind in (("model_index.json", "image"), ("config.json", "text")):
            try:
                hf_hub_download(name, file)
            except EntryNotFoundError:
                continue
            except Exception:  # no such repository, say: loading it says so
                return None
            return kind  # type: ignore[return-value]
    return None
