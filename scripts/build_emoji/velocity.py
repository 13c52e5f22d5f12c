"""Batches for flow matching, with the exact velocity that the data ask for.

A caption is told of at most six images (three drawings of a concept, as drawn and mirrored), an empty one of all. The
mean of the clean latents given the noisy ones and the caption, which is what a squared error teaches, is therefore a
softmax over few candidates. With it in place of the one image behind the noise, the minimiser is the same and the
target has no variance left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .captions import COLOURS
from .data import STYLE_WORD
from .examples import WHITE, Example, Examples

SMALLEST_T = 1e-3


@dataclass(frozen=True)
class Batch:
    """Noisy latents (B, 4, 16, 16), their times (B,), the velocity noise − clean to be predicted, and the captions."""

    x_t: Tensor
    t: Tensor
    velocity: Tensor
    captions: list[str]


def random_times(generator: torch.Generator, n: int, uniform: float = 0.3) -> Tensor:
    """(n,) times in (0, 1], one in each of n equal strips of their distribution: logistic normal, a part uniform."""
    strips = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    normal = torch.sigmoid(torch.erfinv((2 * strips - 1).clamp(-0.99999, 0.99999)) * 2**0.5)
    others = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    return torch.where(torch.rand(n, generator=generator) < uniform, others, normal).clamp(SMALLEST_T, 1.0)


class Velocities:
    """Batches from ``examples`` and their latents (drawings, 12, 2, 4, 16, 16)."""

    def __init__(self, examples: Examples, latents: Tensor):
        self.examples, self.shape = examples, latents.shape[:3]
        self.clean = latents.flatten(0, 2).flatten(1).float()
        self.squares = self.clean.square().sum(1)
        colour = torch.full((len(COLOURS),), (1 - WHITE) / len(COLOURS))
        colour[COLOURS.index("white")] += WHITE
        shown = [[(c, k) not in examples.heldout for k in range(len(COLOURS))] for c, _, _ in examples.drawn]
        self.log_prior = (torch.tensor(shown) * colour).log()[:, :, None].expand(self.shape).flatten()
        self.drawings: dict[int, list[int]] = {}
        for drawing, (concept, _, _) in enumerate(examples.drawn):
            self.drawings.setdefault(concept, []).append(drawing)

    def candidates(self, example: Example) -> list[int] | slice:
        """The images that its caption may have been told of, as an index into ``clean``."""
        if not example.text:
            return slice(None)
        said, colour = example.said, example.place[1]
        styles = {drawing: STYLE_WORD[self.examples.drawn[drawing][1]] for drawing in self.drawings[said.concept]}
        alike = [drawing for drawing, style in styles.items() if said.style in (None, style)]
        return [self._index(drawing, colour, mirrored) for drawing in alike for mirrored in (0, 1)]

    def posterior_mean(self, x_t: Tensor, t: Tensor, candidates: list[int] | slice) -> Tensor:
        """(n, D) E[clean | x_t, caption] of flat noisy latents (n, D) at times t (n, 1)."""
        options = self.clean[candidates]
        inner = (1 - t) * (x_t @ options.T) - 0.5 * (1 - t) ** 2 * self.squares[candidates]
        return (self.log_prior[candidates] + inner / t**2).softmax(1) @ options

    def batch(self, generator: torch.Generator, n: int) -> Batch:
        chosen = self.examples.random(generator, n)
        clean = self.clean[[self._index(*example.place) for example in chosen]]
        times = random_times(generator, n)
        t, noise = times[:, None], torch.randn(clean.shape, generator=generator)
        x_t = (1 - t) * clean + t * noise
        mean = torch.empty_like(clean)
        empty = [i for i, example in enumerate(chosen) if not example.text]
        mean[empty] = self.posterior_mean(x_t[empty], t[empty], slice(None))
        for i in set(range(n)) - set(empty):
            mean[i] = self.posterior_mean(x_t[i : i + 1], t[i : i + 1], self.candidates(chosen[i]))[0]
        # Not (x_t - mean) / t, which would enlarge rounding errors at small t.
        velocity = noise - clean + (clean - mean) / t
        x_t, velocity = x_t.view(n, 4, 16, 16), velocity.view(n, 4, 16, 16)
        return Batch(x_t, times, velocity, [example.text for example in chosen])

    def _index(self, drawing: int, colour: int, mirrored: int) -> int:
        return (drawing * self.shape[1] + colour) * self.shape[2] + mirrored
