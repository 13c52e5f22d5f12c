"""Labelled image grids, before/after images, and an atomic PNG writer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_align.images import UnreadableImage, to_rgb
from diffusion_align.writing import make_folder, write_bytes

Images = torch.Tensor | Sequence[Image.Image]

MARGIN = 8
FONT_SIZE = 12
LINE_HEIGHT = 15
CAPTION_LINES = 2
VISIBLE_WIDTH = 128  # smaller images are enlarged to about this width
PAIRS_PER_ROW = 8
BACKGROUND = (255, 255, 255)
INK = (34, 34, 34)
MUTED = (110, 110, 110)
FRAME = (221, 221, 221)


def to_pil(images: Images) -> list[Image.Image]:
    """RGB images from a float tensor (B, 3, H, W) in [0, 1] or from PIL images; NaN becomes black.

    Values outside [0, 1] are clamped, transparent pixels are put on white.
    """
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be a float tensor (B, 3, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}"
            )
        pixels = torch.nan_to_num(images.detach().float()).clamp(0, 1).mul(255).round().to(torch.uint8)
        return [Image.fromarray(each.permute(1, 2, 0).cpu().numpy()) for each in pixels]
    converted = []
    for i, image in enumerate(images):
        try:
            converted.append(to_rgb(image))
        except UnreadableImage as problem:
            raise ValueError(f"image {i} {problem}") from None
    return converted


def image_grid(images: Images, *, captions: Sequence[str] | None = None, columns: int | None = None) -> Image.Image:
    """One image holding all of them, row by row, each with its caption beneath; small ones (64 px) are enlarged.

    Args:
        images: float tensor (B, 3, H, W) in [0, 1], or B PIL images.
        captions: B strings; wrapped to two lines, the rest an ellipsis.
        columns: images per row; by default the near-square number that leaves the fewest holes.

    Raises:
        ValueError: no images, another shape, or not as many captions as images.
    """
    images = _enlarged(to_pil(images))
    _check_count("captions", captions, len(images))
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")
    columns = min(columns or _balanced_columns(len(images)), len(images))
    width, height = _cell(images)
    blocks = [_wrap(caption, width) for caption in captions] if captions is not None else []
    text_height = LINE_HEIGHT * max((len(block) for block in blocks), default=0)
    text_height += MARGIN // 2 if text_height else 0
    n_rows = -(-len(images) // columns)
    canvas = Image.new(
        "RGB", (MARGIN + columns * (width + MARGIN), MARGIN + n_rows * (height + text_height + MARGIN)), BACKGROUND
    )
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        left = MARGIN + (i % columns) * (width + MARGIN)
        top = MARGIN + (i // columns) * (height + text_height + MARGIN)
        _paste(canvas, image, left, top, width, height)
        if blocks:
            _centred(draw, blocks[i], left, top + height + MARGIN // 2, width, INK)
    return canvas


def before_after(
    before: Images,
    after: Images,
    *,
    captions: Sequence[str] | None = None,
    rewards_before: Sequence[float] | torch.Tensor | None = None,
    rewards_after: Sequence[float] | torch.Tensor | None = None,
    labels: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """One column per prompt: the image before training on top, the one after beneath it, rows labelled at the left.

    Rewards stand under their images, the prompt under the pair. More than eight prompts continue in a further block.

    Args:
        before, after: the same prompts and seeds in the same order; (B, 3, H, W) floats in [0, 1] or B PIL images.
        captions: B prompts.
        rewards_before, rewards_after: B rewards each.
        labels: what is written beside the upper and the lower row.

    Raises:
        ValueError: no images, or lengths that differ.
    """
    top_row, bottom_row = _enlarged(to_pil(before)), _enlarged(to_pil(after))
    count = len(top_row)
    if len(bottom_row) != count:
        raise ValueError(f"before holds {count} images and after {len(bottom_row)}: they must show the same prompts")
    _check_count("captions", captions, count)
    _check_count("rewards_before", rewards_before, count)
    _check_count("rewards_after", rewards_after, count)

    width, height = _cell([*top_row, *bottom_row])
    blocks = [_wrap(caption, width) for caption in captions] if captions is not None else []
    caption_height = LINE_HEIGHT * max((len(block) for block in blocks), default=0)
    gutter = int(max(_font().getlength(word) for word in labels)) + MARGIN
    rows = ((labels[0], top_row, rewards_before), (labels[1], bottom_row, rewards_after))
    row_heights = [height + (LINE_HEIGHT + 2 if rewards is not None else 0) for _, _, rewards in rows]
    block_height = sum(row_heights) + MARGIN + caption_height + 2 * MARGIN
    per_row = min(count, PAIRS_PER_ROW)
    n_blocks = -(-count // per_row)
    canvas = Image.new("RGB", (MARGIN + gutter + per_row * (width + MARGIN), MARGIN + n_blocks * block_height))
    canvas.paste(BACKGROUND, (0, 0, *canvas.size))
    draw = ImageDraw.Draw(canvas)
    for first in range(0, count, per_row):
        top = MARGIN + (first // per_row) * block_height
        for (word, images, rewards), row_height in zip(rows, row_heights):
            draw.text((MARGIN, top + height // 2 - LINE_HEIGHT // 2), word, fill=INK, font=_font())
            for i in range(first, min(first + per_row, count)):
                left = MARGIN + gutter + (i - first) * (width + MARGIN)
                _paste(canvas, images[i], left, top, width, height)
                if rewards is not None:
                    _centred(draw, [f"{float(rewards[i]):.4g}"], left, top + height + 2, width, MUTED)
            top += row_height + MARGIN
        for i in range(first, min(first + per_row, count)) if blocks else ():
            left = MARGIN + gutter + (i - first) * (width + MARGIN)
            _centred(draw, blocks[i], left, top - MARGIN // 2, width, INK)
    return canvas


def save_png(image: Image.Image, path: str | Path) -> Path:
    """Write a PNG, whole or not at all, in a folder that exists or can be made in one that does; returns the path."""
    make_folder(Path(path).parent)
    buffer = io.BytesIO()  # of a full disk Pillow itself says "encoder error"
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
    return Path(path)


def _check_count(name: str, values: Sequence | torch.Tensor | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise ValueError(f"{name} holds {len(values)} entries for {count} images: give one for each image")


def _enlarged(images: list[Image.Image]) -> list[Image.Image]:
    """By the whole number that makes them about ``VISIBLE_WIDTH`` wide."""
    if not images:
        raise ValueError("there are no images to show: give at least one")
    factor = max(1, round(VISIBLE_WIDTH / _cell(images)[0]))
    if factor == 1:
        return images
    sizes = [(image.width * factor, image.height * factor) for image in images]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(images, sizes)]


def _cell(images: Sequence[Image.Image]) -> tuple[int, int]:
    return max(image.width for image in images), max(image.height for image in images)


def _balanced_columns(count: int) -> int:
    side = 1
    while side * side < count:
        side += 1
    return min(range(side, 2 * side + 1), key=lambda columns: (-count % columns, columns))


def _paste(canvas: Image.Image, image: Image.Image, left: int, top: int, width: int, height: int) -> None:
    """Centre the image in its cell, with a hairline around it: many images are as white as the page."""
    left += (width - image.width) // 2
    top += (height - image.height) // 2
    frame = (left - 1, top - 1, left + image.width, top + image.height)
    ImageDraw.Draw(canvas).rectangle(frame, outline=FRAME)
    canvas.paste(image, (left, top))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def _wrap(text: str, width: int) -> list[str]:
    """At most ``CAPTION_LINES`` lines no wider than ``width`` pixels; what does not fit becomes an ellipsis."""
    font = _font()
    if not isinstance(font, ImageFont.FreeTypeFont):  # the bitmap font of a Pillow without FreeType is Latin-1 only
        text = text.encode("latin-1", "replace").decode("latin-1")
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < CAPTION_LINES:
        if font.getlength(rest) <= width:
            return [*lines, rest]
        if len(lines) == CAPTION_LINES - 1:
            end = _fitting(rest + " ", width - font.getlength("..."))
            return [*lines, rest[:end].rstrip(" ,;.") + "..."]
        end = _fitting(rest, width)
        space = rest.rfind(" ", 0, end + 1)
        cut = space if space > 0 else max(end, 1)
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, width: float) -> int:
    """How many leading characters are at most ``width`` pixels wide."""
    font = _font()
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


def _centred(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int, width: int, fill: tuple[int, int, int]
) -> None:
    font = _font()
    for n, line in enumerate(lines):
        offset = max(0.0, (width - font.getlength(line)) / 2)
        draw.text((left + offset, top + n * LINE_HEIGHT), line, fill=fill, font=font)
