"""What `diffusion-align list` says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diffusion_align.assets import LANGUAGE_MODELS, shipped_prompts, shipped_text_prompts
from diffusion_align.data.image_pairs import EMBEDDED, PairsConfig, open_pairs
from diffusion_align.data.prompts import Prompt, load_prompts
from diffusion_align.data.sources import FILES, TableSource, open_table
from diffusion_align.methods import describe_methods
from diffusion_align.models.image_pipelines import EMBEDDED_PIPELINES
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.rewards import describe_rewards, describe_text_rewards

Entries = list[tuple[str, list[str]]]
"""(name, lines about it)."""


def _configs() -> Entries:
    return [(name, [_first_comment(path)]) for name, path in shipped_configs().items()]


def _models() -> Entries:
    about = {
        "emoji-sd": "pictures: draws 64x64 emoji-like pictures of 294 concepts, small enough for a CPU",
        "tiny-lm": "text: writes English sentences letter by letter, small enough for a CPU",
        "smollm2": "text: SmolLM2-135M-Instruct, from a wheel; see the README",
    }
    return [
        *((name, [about[name]]) for name in (*EMBEDDED_PIPELINES, *LANGUAGE_MODELS)),
        ("any other", ["an SD1.x, SD2 or SDXL diffusers folder or Hub id, or a causal language model's"]),
    ]


def _prompts() -> Entries:
    pictures = [(name, _for_pictures(load_prompts(path))) for name, path in shipped_prompts().items()]
    texts = [
        (name, f"{len(open_table(TableSource('prompts', str(path), lines='prompt')))} prompts for text")
        for name, path in shipped_text_prompts().items()
    ]
    return [(name, [about]) for name, about in pictures + texts]


def _for_pictures(prompts: Sequence[Prompt]) -> str:
    keys = ", ".join(dict.fromkeys(key for _, metadata in prompts for key in metadata))
    return f"{len(prompts)} prompts for pictures" + (f", with the metadata {keys}" if keys else "")


def _pairs() -> Entries:
    counts = " and ".join(f"{len(open_pairs(PairsConfig(source=EMBEDDED, split=s)))} {s}" for s in ("train", "heldout"))
    return [
        (EMBEDDED, [f"{counts} pairs of drawings of one concept: shaded 3-D, chosen, and flat"]),
        ("any other", [FILES]),
    ]


def _rewards() -> Entries:
    entries = []
    for row in describe_rewards() + describe_text_rewards():
        shown = {key: value for key, value in row.items() if key not in ("name", "description", "options")}
        about = [f"{key}: {value}" for key, value in shown.items() if value is not None]
        options = [f"option {name} {option}" for name, option in row["options"].items()]
        entries.append((row["name"], [row["description"], *about, *options]))
    return entries


LISTINGS: dict[str, Callable[[], Entries]] = {
    "methods": describe_methods,
    "configs": _configs,
    "models": _models,
    "prompts": _prompts,
    "pairs": _pairs,
    "rewards": _rewards,
}


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip()
