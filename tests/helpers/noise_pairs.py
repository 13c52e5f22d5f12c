"""A folder of preference pairs of noise images, of one size or of several."""

import json

import numpy as np
from PIL import Image


def write_noise_pairs(folder, sizes, prompts):
    """``folder``, with pairs of images of ``sizes``, (height, width); the chosen are bright. ``prompts`` in turn."""
    draw, rows = np.random.default_rng(0), []
    folder.mkdir(exist_ok=True)
    for i, size in enumerate(sizes):
        for side, low in (("chosen", 128), ("rejected", 0)):
            pixels = draw.integers(low, low + 128, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{side}_{i}.png")
        row = {"prompt": prompts[i % len(prompts)], "chosen": f"chosen_{i}.png", "rejected": f"rejected_{i}.png"}
        rows.append(row)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
