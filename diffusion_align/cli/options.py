"""Arguments and options that several commands take, and what they name: prompts, images, rewards, places to write."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

import typer

from diffusion_align.bounds import LARGEST, LARGEST_SIDE, MOST
from diffusion_align.errors import UserError, short


def completed_by(name: str) -> Callable[[typer.Context, str], Any]:
    """The function ``name`` of `completion`, imported when a shell asks; what fails there completes to nothing."""

    def complete(context: typer.Context, typed: str) -> Any:
        try:
            from diffusion_align.cli import completion

            found = getattr(completion, name)(context, typed)
            # Some shells take every line of a help for a completion, and typer wraps long ones.
            return [one if isinstance(one, str) else (one[0], shorten(one[1], 60, placeholder=" ...")) for one in found]
        except Exception:  # a shell would show a traceback as a completion
            return []

    return complete


def number_option(low: float, high: float, *, help: str | None = None) -> Any:
    """An option that is a number; nan, which some comparisons let through, lies between no two bounds."""

    def number(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise typer.BadParameter(f"{str(text)[:40]!r} is not a number from {low:g} to {high:g}")
        return value

    return typer.Option(parser=number, metavar=f"FLOAT from {low:g} to {high:g}", help=help)


def to_path(text: str | Path) -> Path:
    """Of an option: ``Path("")`` would be the folder that we are in, and no shell expands the ~ of ``--output=~/a``."""
    if not str(text).strip():
        raise typer.BadParameter("the path is empty")
    return Path(os.path.expanduser(text))


def path_option(*names: str, help: str | None = None) -> Any:
    """An option that is a path."""
    return typer.Option(*names, parser=to_path, metavar="PATH", help=help)


Config = Annotated[
    str,
    typer.Argument(help="a shipped recipe or a YAML file", metavar="CONFIG", autocompletion=completed_by("recipes")),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="settings to change, with a dot for those of sections and values in YAML: learning_rate=1e-4 lora.rank=8",
        metavar="KEY=VALUE",
        autocompletion=completed_by("overrides"),
    ),
]
Model = Annotated[
    str, typer.Argument(help="embedded name, folder, Hub id or run folder", autocompletion=completed_by("models"))
]
ImageReward = Annotated[
    str,
    typer.Argument(help="name, module:function or file.py:function", autocompletion=completed_by("image_rewards")),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="a prompt; repeat for more")]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="file (.txt, .jsonl, .jsonl.gz, .json, .csv, .parquet), folder, Hub dataset or shipped list",
        autocompletion=completed_by("prompt_lists"),
    ),
]
RewardOptions = Annotated[
    list[str] | None,
    typer.Option("--option", help="an option of the reward, key=value (`list rewards NAME`); repeat for more"),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="the same seed gives the same samples")]
Steps = Annotated[int | None, typer.Option(min=1, max=MOST, help="denoising steps per image")]
GuidanceScale = Annotated[
    float | None, number_option(0, LARGEST, help="classifier-free guidance scale, for image models")
]
Eta = Annotated[float | None, number_option(0, 1, help="noise that DDIM adds; 1 is as much as DDPM")]
NegativePrompt = Annotated[str | None, typer.Option(help="what guidance leads away from, for image models")]
Height = Annotated[
    int | None, typer.Option(min=8, max=LARGEST_SIDE, help="height of images in pixels; as in training if not given")
]
Width = Annotated[int | None, typer.Option(min=8, max=LARGEST_SIDE, help="width of images in pixels, likewise")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="tokens per completion, for language models; 128 if not given")
]
Temperature = Annotated[float | None, number_option(0.01, 1000, help="sampling temperature, for language models")]
Family = Annotated[str | None, typer.Option(help="model family, if not Stable Diffusion: file.py:Class")]
Judge = Annotated[str, typer.Option(help="reward that judges the samples", autocompletion=completed_by("rewards"))]
Gaussian = tuple[float, float]


def read_reward(name: str, options: list[str] | None, model: str | None, device: str) -> Any:
    from diffusion_align.rewards import build_reward
    from diffusion_align.training.reading import apply_overrides

    given = apply_overrides({}, options or [])
    if "name" in given:
        raise UserError(f"--option name={given['name']!r}: the reward is '{name}' already: leave this option out")
    return build_reward(given | {"name": name}, model=model, device=device)


def read_prompts(
    prompt: list[str] | None, prompts: str | None, kind: Literal["image", "text"] = "image"
) -> list[tuple[Any, dict[str, Any]]]:
    """Texts, for language models also conversations, with their metadata: the other columns of their rows."""
    if kind == "image":
        from diffusion_align.data.prompts import check_image_prompts as check
        from diffusion_align.data.prompts import load_prompts as read
    else:
        from diffusion_align.data.prompts import check_unicode as check
        from diffusion_align.pipelines.text import read_prompts as read  # type: ignore[assignment]
    check(prompt or [])
    found: list[tuple[Any, dict[str, Any]]] = [(text, {}) for text in prompt or []]
    if prompts is not None:
        found += read(prompts)
    if not found:
        raise UserError("no prompt given: use --prompt TEXT (repeatable) or --prompts FILE")
    return found


def read_image(path: Path) -> Any:
    from diffusion_align.images import UnreadableImage, open_image
    from diffusion_align.inputs import check_path

    check_path(path, f"image {short(str(path))}")
    if not path.exists():
        raise UserError(f"there is no image {path}")
    try:
        return open_image(path)
    except UnreadableImage as problem:
        raise UserError(f"{path} {problem}") from None


def check_output_path(path: Path, want: Literal["file", "folder"], option: str = "--output") -> None:
    """Whether it can be written, or made; nothing is left behind."""
    from diffusion_align.inputs import check_output

    shown = path if len(str(path)) <= 80 and str(path).isprintable() else short(str(path))
    check_output(path, f"{option}: the {want} {shown} cannot be used: it", want)


def check_output_file(path: Path) -> None:
    """Its folder first, unless all is well: into that of /dev/stdout nobody else may write."""
    try:
        check_output_path(path, "file")
    except UserError:
        check_output_path(path.parent, "folder")
        raise


def given_options(**options: Any) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def check_kind(kind: str, of_images: dict[str, Any], of_text: dict[str, Any]) -> None:
    unfit, what = (of_images, "image models") if kind == "text" else (of_text, "language models")
    for name in unfit:
        raise UserError(f"--{name.replace('_', '-')} is for {what}: leave it out")
