"""Images as the report holds them: within the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_align.images import UnreadableImage, open_image

MAX_GRIDS = 6
MAX_IMAGE_WIDTH = 1600  # wider images are shrunk inside the report; the files keep their size


def grids(samples: Path) -> Iterator[dict[str, Any]]:
    """The grids of some epochs."""
    for path, label in some_epochs(samples, "png"):
        if source := inline(path):
            yield {"source": source, "label": label}


def some_epochs(samples: Path, suffix: str) -> Iterator[tuple[Path, str]]:
    """At most ``MAX_GRIDS`` of the epochs' files, evenly spread, the first and the last among them."""
    numbered = sorted(
        (int(match[1]), path)
        for path in samples.glob(f"epoch_*.{suffix}")
        if (match := re.fullmatch(r"epoch_(\d+)", path.stem))
    )
    count = min(MAX_GRIDS, len(numbered))
    for i in range(count):
        epoch, path = numbered[round(i * (len(numbered) - 1) / max(count - 1, 1))]
        yield path, f"After epoch {epoch}" if epoch else "Before training"


def inline(path: Path) -> str | None:
    """The PNG as a data URI, shrunk if very wide; None if it is missing or cannot be read."""
    if not path.is_file():
        return None
    try:
        image = open_image(path)
        if image.width <= MAX_IMAGE_WIDTH:
            return _data_uri(path.read_bytes())
    except (OSError, UnreadableImage):
        return None
    height = max(1, round(image.height * MAX_IMAGE_WIDTH / image.width))
    small = image.resize((MAX_IMAGE_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
