"""How our time and memory grow with what an epoch is made of, and with the number of epochs: ``peers --growth``.

Every point has its own process. CPU-seconds are compared, which other processes on the machine change least.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import PROMPTS, Images, Process, Variant, shape

EPOCHS_EACH = 3
LONG_RUN = (2, 10, 50, 100, 200)
"""Epochs of one run that are compared, each with those around it."""
AROUND = 4


@dataclass(frozen=True)
class Curve:
    """What grows, the runs, and whether time should grow in proportion or not at all."""

    name: str
    points: Sequence[tuple[int, Variant]]
    linear: bool = True


def curves(folder: Path, threads: int | None) -> Iterator[Curve]:
    """Of small runs; data are written to ``folder``."""

    def images(name: str, samples: int = 8, steps: int = 4, *overrides: str) -> Variant:
        return Images(samples, steps, 1.0, threads).ours(name, [*shape(4, 4, "no"), *overrides])

    yield Curve("samples", [(n, images(f"{n} samples", n)) for n in (8, 16, 32)])
    yield Curve("steps", [(n, images(f"{n} steps", 8, n)) for n in (4, 8, 16)])
    yield Curve("pixels", [(n * n, images(f"{n} x {n}", 8, 4, f"resolution={n}")) for n in (32, 64, 128)])
    some = [(n, images(f"{n} prompts", 8, 4, f"prompts={write_prompts(folder, n)}")) for n in (8, 512, 4096)]
    yield Curve("prompts", some, linear=False)
    yield Curve("pairs", [(n, pair_run(folder, n, threads)) for n in (16, 64, 256)], linear=False)


def write_prompts(folder: Path, count: int) -> Path:
    file = folder / f"prompts{count}.txt"
    lines = [f"{PROMPTS[i % len(PROMPTS)]}, number {i}" for i in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def pair_run(folder: Path, count: int, threads: int | None) -> Variant:
    """Diffusion-DPO on ``count`` pairs of random images, eight pairs per epoch."""
    from PIL import Image

    stream, place = random.Random(0), folder / f"pairs{count}"
    place.mkdir()
    rows = []
    for i in range(count):
        row = {"prompt": PROMPTS[i % len(PROMPTS)]}
        for side in ("chosen", "rejected"):
            Image.frombytes("RGB", (64, 64), stream.randbytes(64 * 64 * 3)).save(place / f"{side}{i}.png")
            row[side] = f"{side}{i}.png"
        rows.append(json.dumps(row))
    (place / "pairs.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = [f"pairs={{source: {place / 'pairs.jsonl'}}}", "samples_per_epoch=8", "grid_every=0", *shape(4, 4, "no")]
    settings += [] if threads is None else [f"num_threads={threads}"]
    given = {"recipe": "dpo_emoji_style", "overrides": settings}
    return Variant(f"{count} pairs", Path(sys.executable), "peer_ours.py", given)


def grow(threads: int | None, epochs: int = LONG_RUN[-1]) -> dict[str, Any]:
    """Curve -> its points: x, CPU-seconds per epoch and of the start, MiB; and of one run of so many epochs."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for curve in curves(Path(scratch), threads):
            points = []
            for x, variant in curve.points:
                with Process(variant) as process:
                    seen = [process.epoch() for _ in range(EPOCHS_EACH + 1)][1:]
                    points.append(point(x, seen) | {"start": process.told["start"]})
            found[curve.name] = {"linear": curve.linear, "points": points}
            print(f"{curve.name} measured", file=sys.stderr, flush=True)
    with Process(Images(4, 2, 1.0, threads).ours("a long run", shape(4, 4, "no"))) as process:
        seen = [process.epoch() for _ in range(epochs)]
    found["epochs"] = {"linear": False, "points": long_run(seen)}
    return found


def point(x: int, epochs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        "x": x,
        "cpu": statistics.median(epoch["cpu"] for epoch in epochs),
        "resident": epochs[-1]["resident"],
        "peak": epochs[-1]["peak"],
    }


def long_run(epochs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Points of one run at ``LONG_RUN``: the median of the epochs around each, but for the first, which warms up."""
    points = []
    for x in LONG_RUN:
        if x <= len(epochs):
            near = epochs[max(1, x - 1 - AROUND) : x + AROUND]
            points.append(point(x, near) | {"start": 0.0, "resident": epochs[x - 1]["resident"]})
    return points


def growth_tables(found: Mapping[str, Any]) -> list[str]:
    """CPU-seconds of each point over those of the first, and over what they should be: in proportion, or equal."""
    lines = []
    for name, curve in found.items():
        first = curve["points"][0]
        lines.append(
            f"{name:>9s}  CPU s/epoch  times the first  {'over linear' if curve['linear'] else 'over constant':>13s}  "
            "start CPU s  resident MiB  peak MiB"
        )
        for one in curve["points"]:
            times = one["cpu"] / first["cpu"]
            over = times / (one["x"] / first["x"]) if curve["linear"] else times
            start = f"{one['start']:11.1f}" if one["start"] else f"{'-':>11s}"
            lines.append(
                f"{one['x']:9d}  {one['cpu']:11.3f}  {times:15.2f}  {over:13.2f}  {start}  {one['resident']:12.0f}  "
                f"{one['peak']:8.0f}"
            )
        lines.append("")
    return lines[:-1]
