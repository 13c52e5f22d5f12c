"""Backgrounds, compositing and the captions that describe the result."""

from dataclasses import dataclass

import torch

from diffusion_align.data.drawings import BACKGROUNDS, composite

from .common import chance, choose

__all__ = ["BACKGROUNDS", "COLOURS", "Look", "caption", "composite", "matches", "random_caption"]

COLOURS = tuple(BACKGROUNDS)
TEMPLATES = ("a {}", "a {}", "{}", "a picture of a {}", "an image of a {}", "a drawing of a {}", "an emoji of a {}")


@dataclass(frozen=True)
class Look:
    """What is in a image, or what a caption says: None is "not said"."""

    concept: int
    colour: str | None = None
    style: str | None = None


def matches(said: Look, seen: Look) -> bool:
    """Whether a caption contradicts nothing of a image."""
    return (
        said.concept == seen.concept
        and said.colour in (None, seen.colour)
        and (said.style is None or said.style == seen.style)
    )


def caption(name: str, *, colour: str | None = None, style: str | None = None, template: str = "a {}") -> str:
    """A caption: "a fox on a blue background, 3d style"."""
    text = template.format(name)
    if colour is not None:
        text += f" on {'an' if colour == 'orange' else 'a'} {colour} background"
    return text if style is None else f"{text}, {style} style"


def random_caption(
    generator: torch.Generator,
    names: list[str],
    seen: Look,
    *,
    colour_probability: float,
    style_probability: float,
    tag_probability: float = 0.0,
) -> tuple[str, Look]:
    """A caption of a image, and what it says: the colour and style are each told with a probability.

    ``names[0]`` is the label, the others are tags. White is the colour of "no background": it is told less often.
    """
    tell_colour = chance(generator, colour_probability * (0.3 if seen.colour == "white" else 1.0))
    tell_style = seen.style is not None and chance(generator, style_probability)
    name = names[0]
    if len(names) > 1 and chance(generator, tag_probability):
        name = names[1 + choose(generator, names[1:], 1)[0]]
    said = Look(seen.concept, seen.colour if tell_colour else None, seen.style if tell_style else None)
    template = TEMPLATES[choose(generator, list(TEMPLATES), 1)[0]]
    return caption(name, colour=said.colour, style=said.style, template=template), said
