"""What the UNet and the transformer are trained on: drawings on backgrounds, their latents and random captions."""

from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffusion_align.data.drawings import BACKGROUNDS, composite

from .captions import COLOURS, Look, random_caption
from .common import Build, chance, choose, written_atomically
from .data import STYLE_WORD, Drawings

SOURCES = ("noto", "flat", "3d")
HELDOUT_COLOURS, WHITE, DROPPED = 0.1, 0.3, 0.1


@dataclass(frozen=True)
class Example:
    """A training image by its place in the latents, what its caption says, and the caption: empty if it was dropped."""

    place: tuple[int, int, int]
    said: Look
    text: str


def heldout_pairs(drawings: Drawings, seed: int) -> set[tuple[int, int]]:
    """(concept, colour) index pairs that no training image shows: a tenth of them; white is never held out."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand((len(drawings.concepts), len(COLOURS)), generator=generator) < HELDOUT_COLOURS
    drawn[:, COLOURS.index("white")] = False
    return {(concept, colour) for concept, colour in drawn.nonzero().tolist() if drawings.concepts[concept].trained}


class Examples:
    """The drawings of the trained concepts with every background, minus the held-out pairs.

    ``drawn`` holds (concept, source, row of ``drawings.rgba``) for each.
    """

    def __init__(self, drawings: Drawings, seed: int):
        self.drawings, self.heldout = drawings, heldout_pairs(drawings, seed)
        table = drawings.table(SOURCES, trained_only=True)
        self.drawn = [(concept, source, row) for concept, of in table.items() for source, row in of.items()]

    def random(self, generator: torch.Generator, n: int) -> list[Example]:
        """``n`` examples: every drawing and background alike, white more often, half mirrored; a tenth of the captions
        is dropped, which teaches guidance."""
        found: list[Example] = []
        while len(found) < n:
            drawing, colour = choose(generator, self.drawn, 1)[0], choose(generator, COLOURS, 1)[0]
            colour = COLOURS.index("white") if chance(generator, WHITE) else colour
            concept, source, _ = self.drawn[drawing]
            if (concept, colour) in self.heldout:
                continue
            look, names = Look(concept, COLOURS[colour], STYLE_WORD[source]), [self.drawings.concepts[concept].label]
            text, said = random_caption(generator, names, look, colour_probability=1.0, style_probability=0.5)
            place = (drawing, colour, int(chance(generator, 0.5)))
            found.append(Example(place, said, "" if chance(generator, DROPPED) else text))
        return found

    @torch.no_grad()
    def latents(self, build: Build, vae) -> Tensor:
        """(drawings, 12, 2, 4, 16, 16) scaled latents (modes), float16: on all backgrounds, as drawn and mirrored.

        Kept in ``<work>/latents.safetensors``.
        """
        kept = build.work / "latents.safetensors"
        if kept.exists():
            return load_file(kept)["latents"]
        latents = []
        for part in tqdm(torch.tensor([row for _, _, row in self.drawn]).split(16), desc="latents", unit="batch"):
            images = torch.stack([composite(self.drawings.rgba[part], colour) for colour in BACKGROUNDS.values()], 1)
            images = torch.stack([images, images.flip(-1)], 2).flatten(0, 2).to(build.device)
            modes = [vae.encode(chunk * 2 - 1).latent_dist.mode() for chunk in images.split(64)]
            latents.append(torch.cat(modes).cpu().half().view(len(part), len(BACKGROUNDS), 2, 4, 16, 16))
        scaled = torch.cat(latents) * vae.config.scaling_factor
        with written_atomically(kept) as temporary:
            save_file({"latents": scaled}, temporary)
        return scaled
