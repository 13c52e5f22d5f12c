"""What the start of pair training costs before the first update, without the passes of the VAE (for ``benchmark.py``).

Images are sums of noise at several scales, for codecs about as hard as photographs. A few of them make all pairs.
"""

from __future__ import annotations

import csv
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_align.data import image_pairs
from diffusion_align.data.image_pairs import PairsConfig, open_pairs
from diffusion_align.diffusion.latent_cache import LatentCache

DIFFERENT = 16
"""Images in a folder of pairs: files are read again and again, as on a machine that has them in memory."""


def write_pairs(folder: Path, count: int, size: int, kind: str) -> Path:
    """A folder of ``count`` pairs of images of ``size`` x ``size`` in files of a ``kind``, png or jpg."""
    folder.mkdir(parents=True)
    for k in range(DIFFERENT):
        image(k, size).save(folder / f"{k}.{kind}", **({"quality": 92} if kind == "jpg" else {}))
    write_rows(folder / "pairs.jsonl", count, kind)
    return folder


def write_rows(path: Path, count: int, kind: str) -> Path:
    """A list of ``count`` pairs of images 0 to 15."""
    rows = (
        {
            "prompt": f"a photo, number {i}",
            "chosen": f"{i % DIFFERENT}.{kind}",
            "rejected": f"{(i + 1) % DIFFERENT}.{kind}",
        }
        for i in range(count)
    )
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def image(seed: int, size: int) -> Image.Image:
    draw, total = np.random.default_rng(seed), np.zeros((size, size, 3))
    for scale in (6, 24, 96, 384, size):
        planes = [Image.fromarray(draw.standard_normal((scale, scale)).astype(np.float32)) for _ in range(3)]
        smooth = [np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC)) for plane in planes]
        total += np.stack(smooth, -1) * (6 / scale) ** 0.75
    low, high = total.min(), total.max()
    return Image.fromarray(((total - low) / (high - low) * 255).astype(np.uint8))


class _Policy:
    """Encodes images at no cost."""

    def __init__(self, size: int) -> None:
        self.image_size = size, size

    def encode(self, prompts: Any, sizes: Any) -> dict[str, torch.Tensor]:
        return {"text": torch.zeros(len(prompts), 1)}

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::8, ::8].contiguous()


def _raise(failure: BaseException | None, _: type[Exception]) -> None:
    if failure is not None:
        raise failure


def start(folder: Path, latents: Path, size: int) -> dict[str, Any]:
    """Stage -> (CPU-seconds, seconds) of one start, and how many images were decoded.

    ``rows``: the list is read; ``files``: images are looked at; ``identity``: digests of all pairs; ``images``: they
    are decoded, fitted, and what a VAE makes of them is written.
    """
    found: dict[str, Any] = {"decoded": 0}
    plain: Callable[..., Any] = image_pairs.open_image

    def counted(source: Any) -> Any:
        found["decoded"] += 1
        return plain(source)

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        before = time.process_time(), time.perf_counter()
        yield
        found[stage] = time.process_time() - before[0], time.perf_counter() - before[1]

    processes = SimpleNamespace(
        index=0,
        count=1,
        wait=lambda: None,
        stop_if_interrupted=lambda: False,
        raise_together=_raise,
        from_main=lambda x: x,
    )
    bars = SimpleNamespace(task=lambda *_: nullcontext(lambda count: None), print_start=lambda line: None)
    image_pairs.open_image = counted
    try:
        with timed("rows"):
            pairs = open_pairs(PairsConfig(source=str(folder)))
        with timed("files"):
            pairs = pairs.check_images()
        with timed("identity"):
            for i in range(len(pairs)):
                pairs.identity(i)
        with timed("images"):
            cache = LatentCache(latents, pairs, _Policy(size))  # type: ignore[arg-type]
            cache.fill({}, batch_size=8, processes=processes, bars=bars)  # type: ignore[arg-type]
    finally:
        image_pairs.open_image = plain
    return found


def open_rows(path: Path) -> dict[str, float]:
    """CPU-seconds, seconds, and MiB that opening a list of pairs takes, over what is resident before."""
    before = time.process_time(), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pairs = open_pairs(PairsConfig(source=str(path)))
    return {
        "rows": len(pairs),
        "cpu": time.process_time() - before[0],
        "seconds": time.perf_counter() - before[1],
        "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[2]) / 1024,
    }
