"""The embedded models, their prompt lists and the preference data: files in ``assets/``, which holds no code.

Sources and licences are in its ``NOTICE``.
"""

from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "assets"
"""Where the files are. Beside this module of the same name, it cannot be imported."""

EMBEDDED_MODELS = {name: name for name in ("emoji-sd", "emoji-flow", "emoji-clip", "tiny-lm")}
"""Model name -> folder below ``FOLDER``."""

EMBEDDED_PIPELINES = ("emoji-sd", "emoji-flow")
"""Names of the image models among them."""

LANGUAGE_MODELS = ("tiny-lm", "smollm2")
"""Names of the language models; the second one comes from a wheel of its own."""

ASSETS = {
    **EMBEDDED_MODELS,
    "emoji-concepts": "emoji-concepts.tsv",
    "emoji-prompts": "prompts/emoji_concepts.txt",
    "verses": "text-prompts/verses.txt",
    "verses_heldout": "text-prompts/verses_heldout.txt",
    "preferences": "preferences.safetensors",
    "preferences-table": "preferences.tsv",
    "aesthetic-head": "aesthetic_head.safetensors",
    "notice": "NOTICE",
}
"""Asset name -> file or folder below ``FOLDER``."""


def asset_path(name: str) -> Path:
    """Path of an embedded asset, by its name in ``ASSETS`` (a model's path is a folder).

    Raises:
        ValueError: ``name`` is not an asset; the sentence lists those there are.
    """
    if name not in ASSETS:
        raise ValueError(f"there is no embedded asset {name!r}: choose one of {', '.join(sorted(ASSETS))}")
    return FOLDER / ASSETS[name]


def shipped_prompts() -> dict[str, Path]:
    """Name -> file of the prompt lists for image models."""
    return {path.stem: path for path in sorted(asset_path("emoji-prompts").parent.iterdir())}


def shipped_text_prompts() -> dict[str, Path]:
    """Name -> file of the prompt lists for language models."""
    return {path.stem: path for path in sorted(asset_path("verses").parent.iterdir())}


@cache
def embedded_names() -> frozenset[str]:
    """What a configuration may name that is neither a path nor a Hub id: models, prompt lists and the pairs."""
    return frozenset([*EMBEDDED_MODELS, *LANGUAGE_MODELS, *shipped_prompts(), *shipped_text_prompts(), "emoji_style"])
