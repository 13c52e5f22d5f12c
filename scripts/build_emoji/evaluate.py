"""Stage ``evaluate``: grids of images, and how well emoji-clip finds the concept and background in them."""

import json
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from .captions import COLOURS, caption
from .common import Build, written_atomically
from .data import Drawings, load_drawings
from .examples import heldout_pairs
from .models import PIPELINES, draw, embed_captions, embed_images, load_clip, load_pipeline

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
    """R@1 and R@5: how often an image's own text is the nearest, or among the nearest five."""
    top = (images @ texts.T).topk(min(5, len(texts)), dim=1).indices
    right = top == torch.tensor(truth)[:, None]
    return {"R@1": right[:, 0].float().mean().item(), "R@5": right.any(1).float().mean().item()}


def recognition(judge, drawings: Drawings, images: Tensor, asked: list[int]) -> dict[str, float]:
    """R@1, R@5 and the mean cosine of images of the concepts ``asked`` among the labels of all trained concepts.

    Args:
        judge: (CLIPModel, tokenizer).
        images: (N, 3, 64, 64) in [0, 1].
        asked: N indices into ``drawings.concepts``.
    """
    trained = [i for i, concept in enumerate(drawings.concepts) if concept.trained]
    texts = embed_captions(*judge, [caption(drawings.concepts[i].label) for i in trained])
    embedded, truth = embed_images(judge[0], images), [trained.index(i) for i in asked]
    score = (embedded * texts[truth]).sum(1).mean().item()
    return recall(embedded, texts, truth) | {"score": score, "images": len(asked)}


def right_backgrounds(judge, drawings: Drawings, images: Tensor, pairs: list[tuple[int, int]]) -> int:
    """For how many images of (concept, colour) pairs the judge ranks the caption with their own colour first of 12."""
    right = 0
    for (concept, colour), image in zip(pairs, embed_images(judge[0], images)):
        told = [caption(drawings.concepts[concept].label, colour=each) for each in COLOURS]
        right += int((embed_captions(*judge, told) @ image).argmax() == colour)
    return right


def build_evaluation(build: Build) -> None:
    """Writes ``evaluation.json`` and a grid for each of the two image models: the same prompts and seeds, eta 0."""
    target = build.out / "evaluation.json"
    if target.exists():
        return
    drawings, judge = load_drawings(build), load_clip(build)
    one_in = max(1, round(3 / min(1.0, 8 * build.scale)))
    asked = [i for i, concept in enumerate(drawings.concepts) if concept.trained][::one_in]
    pairs = sorted(heldout_pairs(drawings, build.seed))[::one_in][:96]
    labels = {concept.label: i for i, concept in enumerate(drawings.concepts) if concept.trained}
    figures: dict[str, dict] = {}
    for name, model in PIPELINES.items():
        pipe, found = load_pipeline(build, name), figures.setdefault(name, {})

        drawn = partial(draw, pipe, seed=build.seed, **model.to_draw)

        plain = [caption(drawings.concepts[i].label) for i in asked]
        for steps, guidance in ((10, 1.0), (10, 2.0), (20, 2.0)):
            images = drawn(plain, steps=steps, guidance=guidance)
            found[f"{steps}_steps_guidance_{guidance:g}"] = recognition(judge, drawings, images, asked)
        if name == "emoji-sd":
            images = drawn(plain, steps=10, guidance=1.0, eta=1.0)
            found["10_steps_guidance_1_eta_1"] = recognition(judge, drawings, images, asked)
        coloured = [caption(drawings.concepts[i].label, colour=COLOURS[colour]) for i, colour in pairs]
        images = drawn(coloured, steps=20, guidance=2.0)
        found["heldout_backgrounds"] = {"right": right_backgrounds(judge, drawings, images, pairs)} | recognition(
            judge, drawings, images, [concept for concept, _ in pairs]
        )
        shown = [label for label in SHOWN if label in labels]
        prompts = [
            *(caption(list(labels)[i]) for i in torch.linspace(0, len(labels) - 1, 24).long().tolist()),
            *(caption(label) for label in shown),
            *(caption(label, colour=COLOURS[1 + i % 11]) for i, label in enumerate(shown)),
            *(caption(label, style=STYLES[i % 3]) for i, label in enumerate(shown)),
        ]
        with written_atomically(build.out / f"{name}-grid.png") as temporary:
            grid(drawn(prompts, steps=20, guidance=2.0), 12).save(temporary, "PNG")
    for stage in ("vae", "clip", "unet", "flow"):
        path = build.work / f"{stage}.json"
        if path.exists():
            figures[stage] = json.loads(path.read_text(encoding="utf-8"))
    with written_atomically(target) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
