"""Stage ``evaluate``: a grid of images, and how well emoji-clip finds the concept and background in them."""

import json

import torch
from PIL import Image
from torch import Tensor

from .captions import COLOURS, caption
from .common import Build, written_atomically
from .data import load_drawings
from .models import draw, embed_captions, embed_images, load_clip, load_pipeline
from .unet import heldout_pairs

SHOWN = (
    "lion",
    "panda",
    "red apple",
    "pizza",
    "rocket",
    "bicycle",
    "guitar",
    "snowman",
    "crab",
    "ghost",
    "umbrella",
    "pile of poo",
)
STYLES = ("cartoon", "flat", "3d")


def grid(images: Tensor, columns: int, gap: int = 2) -> Image.Image:
    """Images (N, 3, H, W) in [0, 1] in rows of ``columns``, with white gaps."""
    N, C, H, W = images.shape
    rows = -(-N // columns)
    canvas = torch.ones(C, rows * (H + gap) - gap, columns * (W + gap) - gap)
    for i, image in enumerate(images):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        canvas[:, top : top + H, left : left + W] = image
    return Image.fromarray((canvas * 255).round().byte().movedim(0, -1).numpy())


def recall(images: Tensor, texts: Tensor, truth: list[int]) -> dict[str, float]:
    """R@1 and R@5: how often a image's own text is the nearest, or among the nearest five."""
    top = (images @ texts.T).topk(min(5, len(texts)), dim=1).indices
    right = top == torch.tensor(truth)[:, None]
    return {"R@1": right[:, 0].float().mean().item(), "R@5": right.any(1).float().mean().item()}


def build_evaluation(build: Build) -> None:
    """Writes ``emoji-sd-grid.png`` and ``evaluation.json``."""
    target = build.out / "evaluation.json"
    if target.exists():
        return
    drawings = load_drawings(build)
    pipe, (clip, tokenizer) = load_pipeline(build), load_clip(build)
    labels = [concept.label for concept in drawings.concepts if concept.trained]
    texts = embed_captions(clip, tokenizer, [caption(label) for label in labels])
    asked = list(range(0, len(labels), max(1, round(3 / min(1.0, 8 * build.scale)))))
    figures = {}
    for name, steps, guidance, eta in (
        ("20_steps_guidance_2", 20, 2.0, 0.0),
        ("10_steps_guidance_1_eta_1", 10, 1.0, 1.0),
    ):
        images = draw(
            pipe, [caption(labels[i]) for i in asked], steps=steps, guidance=guidance, eta=eta, seed=build.seed
        )
        figures[name] = recall(embed_images(clip, images), texts, asked) | {"images": len(asked)}
    index = {concept.label: i for i, concept in enumerate(drawings.concepts)}
    pairs = sorted(heldout_pairs(drawings, build.seed))[:: max(1, round(3 / min(1.0, 8 * build.scale)))][:96]
    prompts = [caption(drawings.concepts[concept].label, colour=COLOURS[colour]) for concept, colour in pairs]
    embedded = embed_images(clip, draw(pipe, prompts, steps=20, guidance=2.0, eta=0.0, seed=build.seed))
    right = 0
    for (concept, colour), image in zip(pairs, embedded):
        told = [caption(drawings.concepts[concept].label, colour=each) for each in COLOURS]
        right += int((embed_captions(clip, tokenizer, told) @ image).argmax() == colour)
    figures["heldout_backgrounds"] = {"right": right, "pairs": len(pairs)}

    shown = [label for label in SHOWN if label in index]
    prompts = [
        *(caption(labels[i]) for i in torch.linspace(0, len(labels) - 1, 24).long().tolist()),
        *(caption(label) for label in shown),
        *(caption(label, colour=COLOURS[1 + i % 11]) for i, label in enumerate(shown)),
        *(caption(label, style=STYLES[i % 3]) for i, label in enumerate(shown)),
    ]
    images = draw(pipe, prompts, steps=20, guidance=2.0, eta=0.0, seed=build.seed)
    with written_atomically(build.out / "emoji-sd-grid.png") as temporary:
        grid(images, 12).save(temporary, "PNG")
    for stage in ("vae", "clip", "unet"):
        path = build.work / f"{stage}.json"
        if path.exists():
            figures[stage] = json.loads(path.read_text(encoding="utf-8"))
    with written_atomically(target) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
