"""Two models, the same prompts and seeds, one judge."""

from __future__ import annotations

import base64
import copy
import html
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusion_align.arguments import check_same_length
from diffusion_align.data.prompts import check_image_prompts
from diffusion_align.data.text_encoding import Text
from diffusion_align.errors import ConfigError, UserError, problems_of
from diffusion_align.models.language_models import language_model_ref
from diffusion_align.models.memory import tiled
from diffusion_align.models.model_card import OF_SAMPLES
from diffusion_align.models.model_ref import check_image_model
from diffusion_align.pipelines.image import ImageAlignmentPipeline, png_bytes
from diffusion_align.pipelines.scoring import score_images
from diffusion_align.pipelines.text import IN_MEMORY, TextAlignmentPipeline, several
from diffusion_align.report import before_after, save_png
from diffusion_align.rewards import IMAGES, TEXT, build_reward, build_text_reward, declare, text_of, weighted_sum
from diffusion_align.rewards.build import Kind
from diffusion_align.streams import cell, literal, plain
from diffusion_align.writing import WriteError, make_folder, write_text

_BATCH = 8
_SHOWN = 24


@dataclass(frozen=True)
class Comparison:
    """Mean scores of A and B, and how often B beats A (a tie counts half) with its 95 % interval.

    Attributes:
        low, high: Wilson's interval for ``independent_pairs``.
        independent_pairs: what ``pairs`` are worth: all of them where no prompt occurs twice, else ``effective_pairs``.
        mean_difference: of the scores, B - A.
        standard_error: of ``mean_difference``, clustered by prompt; nan for a single prompt.
        image: of image models, the first 24 pairs side by side, which notebooks show.
        texts: of language models, every pair: ``prompt``, ``a``, ``b``, ``score_a``, ``score_b``.
    """

    mean_first: float
    mean_second: float
    win_rate: float
    low: float
    high: float
    pairs: int
    independent_pairs: float
    mean_difference: float
    standard_error: float
    image: Image.Image | None = field(default=None, compare=False, repr=False)
    texts: Sequence[Mapping[str, Any]] = field(default=(), compare=False, repr=False)

    @property
    def picture(self) -> Image.Image | None:
        """The former name of ``image``."""
        return self.image

    def __str__(self) -> str:
        """One sentence with every number."""
        few = self.independent_pairs < self.pairs
        worth = f" for {self.independent_pairs:.4g} independent pairs" if few else ""
        error = "" if math.isnan(self.standard_error) else f" (standard error {self.standard_error:.2g})"
        return (
            f"A {self.mean_first:.4f}, B {self.mean_second:.4f}, B - A {self.mean_difference:.4f}{error}; "
            f"B wins {self.win_rate:.1%} of {self.pairs} pairs "
            f"(95 % interval {self.low:.1%} to {self.high:.1%}, Wilson{worth})"
        )

    def _repr_html_(self) -> str:
        text = f"<p>{html.escape(str(self))}</p>"
        if self.image is None:
            cells = [[text_of(row["prompt"]), row["a"], row["b"]] for row in self.texts[:_SHOWN]]
            body = ["".join(f"<td>{html.escape(one)}</td>" for one in row) for row in cells]
            head = "<tr><th>prompt</th><th>A</th><th>B</th></tr>"
            return text + f"<table>{head}{''.join(f'<tr>{row}</tr>' for row in body)}</table>"
        data = base64.b64encode(png_bytes(self.image)).decode()
        return f'{text}<img alt="pairs of images, A above B" src="data:image/png;base64,{data}">'


ImageModel = str | Path | ImageAlignmentPipeline
TextModel = str | Path | TextAlignmentPipeline
Metadata = Sequence[Mapping[str, Any]]
Samples = list[Any]


def compare_models(
    first: ImageModel,
    second: ImageModel,
    prompts: Sequence[str],
    judge: Any,
    *,
    metadata: Metadata | None = None,
    seed: int = 0,
    output: Path | None = None,
    per_prompt: int = 1,
    family: str | None = None,
    on_samples: Callable[[int], object] | None = None,
) -> Comparison:
    """Sample every prompt by each image model, from the same noise and as B samples, and judge the pairs.

    The pairs of one prompt are alike, so more of them are worth less than more prompts. The interval of the win rate is
    Wilson's; where a prompt occurs more than once, as with ``per_prompt`` above 1, for the number of independent pairs
    that would give the win rate the variance it has between prompts. In simulations it holds the rate in 91 to 98 % of
    cases from eight prompts on or with four images per prompt; with 16 of five prompts in 88 %.

    Args:
        first, second: A and B: pipelines, or what ``ImageAlignmentPipeline.from_pretrained`` takes.
        prompts: texts.
        judge: what ``build_reward`` takes.
        metadata: of the prompts, for a judge that reads them.
        seed: of the first image; images are sampled round by round, each round every prompt once, and the i-th of all
            uses ``seed + i`` for A and B, so that the first round is the comparison with ``per_prompt=1``.
        output: where to write the first 24 pairs side by side.
        per_prompt: images per prompt.
        family: of models that are not Stable Diffusion, see ``ImageAlignmentPipeline.from_pretrained``.
        on_samples: called with the number of images sampled, of ``2 * per_prompt * len(prompts)``.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    output = None if output is None else Path(output).absolute()  # whatever folder a judge changes to
    texts, notes = _rounds(prompts, metadata, per_prompt)
    check_image_prompts(prompts)
    pipelines = _loaded(ImageAlignmentPipeline, [first, second], check_image_model, (IMAGES, judge), family=family)
    pipelines[0] = copy.copy(pipelines[0])
    for name in ("sampler", *OF_SAMPLES):
        setattr(pipelines[0], name, getattr(pipelines[1], name))
    tiles = pipelines[1].pipeline.vae.use_tiling  # which changes images
    reward = build_reward(judge, model=pipelines[1].origin, device=pipelines[1].pipeline.device)

    def sample(k: int, some: range) -> tuple[Samples, torch.Tensor]:
        batch = [texts[i] for i in some]
        with tiled(pipelines[k].pipeline.vae, tiles):
            images = pipelines[k](batch, seed=seed + some.start, batch_size=_BATCH).images
        return images, score_images(reward, images, batch, [notes[i] for i in some])

    scores, shown = _sampled(len(texts), sample, on_samples)
    above, below = (s[:_SHOWN].tolist() for s in scores)
    captions = texts[:_SHOWN]
    grid = before_after(*shown, captions=captions, rewards_before=above, rewards_after=below, labels=("A", "B"))
    result = replace(_summary(*scores, texts), image=grid)
    _write(result, output, lambda path: save_png(grid, path))
    return result


def compare_texts(
    first: TextModel,
    second: TextModel,
    prompts: Sequence[Text],
    judge: Any,
    *,
    metadata: Metadata | None = None,
    seed: int = 0,
    output: Path | None = None,
    per_prompt: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    on_samples: Callable[[int], object] | None = None,
) -> Comparison:
    """Complete every prompt by each language model, from the same streams of random numbers, and judge the pairs.

    Args:
        first, second: A and B: pipelines, or what ``TextAlignmentPipeline.from_pretrained`` takes.
        prompts: texts or conversations.
        judge: what ``build_text_reward`` takes.
        metadata: of the prompts, the columns that the judge names.
        seed: of the first completion; see ``compare_models``, also for the interval.
        output: .jsonl or .md file of the pairs side by side: all of them, or the first 24.
        per_prompt: completions per prompt.
        max_new_tokens: the maximum number of tokens per completion.
        temperature: of both.
        on_samples: called with the number of completions sampled, of ``2 * per_prompt * len(prompts)``.
    """
    output = None if output is None else Path(output).absolute()
    if output is not None and output.suffix not in (".md", ".jsonl"):
        raise UserError(f"output={str(output)!r} must end in .md or .jsonl")
    texts, notes = _rounds(several(prompts), metadata, per_prompt)
    pipelines = _loaded(TextAlignmentPipeline, [first, second], language_model_ref, (TEXT, judge))
    reward = build_text_reward(judge, device=pipelines[1].model.device)

    def sample(k: int, some: range) -> tuple[Samples, torch.Tensor]:
        batch = [texts[i] for i in some]
        written = pipelines[k].sample_each(
            batch, [seed + i for i in some], max_new_tokens=max_new_tokens, temperature=temperature
        )
        return written, judged_texts(pipelines[k], batch, written, reward, [notes[i] for i in some])

    scores, written = _sampled(len(texts), sample, on_samples, shown=len(texts))
    rows = [
        {"prompt": prompt, "a": a, "b": b, "score_a": score_a, "score_b": score_b}
        for prompt, a, b, score_a, score_b in zip(texts, *written, *(s.tolist() for s in scores), strict=True)
    ]
    result = replace(_summary(*scores, [str(text) for text in texts]), texts=rows)
    names = [str(m.name or IN_MEMORY if isinstance(m, TextAlignmentPipeline) else m) for m in (first, second)]
    _write(result, output, lambda path: write_text(path, _as_text(result, names, path.suffix)))
    return result


def judged_texts(
    pipeline: TextAlignmentPipeline, prompts: Sequence[Text], texts: Sequence[str], judge: Any, notes: Metadata
) -> torch.Tensor:
    """Scores (B,) of completions by a judge that has something to say about each.

    Raises:
        RewardError: it has not, or it cannot score them.
    """
    names = dict.fromkeys(name for row in notes for name in row)
    columns = {name: [row.get(name) for row in notes] for name in names}
    scores = pipeline.score_rows(prompts, texts, judge, columns)
    return weighted_sum(scores[:, None], torch.ones(1), prompts=prompts)


def _rounds(prompts: Sequence[Any], metadata: Metadata | None, per_prompt: int) -> tuple[list[Any], list[Any]]:
    """All prompts and their metadata, ``per_prompt`` times."""
    if not prompts:
        raise UserError("prompts is empty: give at least one")
    if metadata is not None:
        check_same_length(("prompts", prompts), ("metadata", metadata))
    if per_prompt < 1:
        raise UserError(f"per_prompt={per_prompt} must be at least 1")
    return list(prompts) * per_prompt, list(metadata or [{} for _ in prompts]) * per_prompt


def _loaded(
    kind: Any, models: Sequence[Any], check: Callable[..., Any], judge: tuple[Kind, Any], **options: Any
) -> list[Any]:
    """Pipelines of a ``kind``; first, everything wrong with the models and the judge is reported."""
    named = [str(model) for model in models if isinstance(model, str | Path)]
    problems = [one for name in named for one in problems_of(check, name, **options)] + problems_of(declare, *judge)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return [model if isinstance(model, kind) else kind.from_pretrained(model, **options) for model in models]


def _sampled(
    count: int,
    sample: Callable[[int, range], tuple[Samples, torch.Tensor]],
    on_samples: Callable[[int], object] | None,
    shown: int = _SHOWN,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[Samples, Samples]]:
    """Scores (N,) by each of the two models, and the first of their samples; ``sample`` is given which, and indices."""
    kept: tuple[Samples, Samples] = ([], [])
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for start in range(0, count, _BATCH):
        some = range(start, min(start + _BATCH, count))
        for k in range(2):
            samples, scores = sample(k, some)
            parts[k].append(scores)
            kept[k].extend(samples[: shown - len(kept[k])])
            if on_samples is not None:
                on_samples(2 * start + (k + 1) * len(some))
    return (torch.cat(parts[0]).double(), torch.cat(parts[1]).double()), kept


def _write(result: Comparison, output: Path | None, write: Callable[[Path], object]) -> None:
    if output is None:
        return
    try:
        make_folder(output.parent, parents=True)
        write(output)
    except WriteError as error:
        error.add_note(str(result))  # what it took minutes to find out
        raise


def _as_text(result: Comparison, names: Sequence[str], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.texts)
    a, b = (cell(literal(name)) for name in names)
    lines = [plain(str(result)), "", f"| prompt | A: {a} | score | B: {b} | score |", "|---|---|---|---|---|"]
    for row in result.texts[:_SHOWN]:
        prompt, *sides = (cell(literal(text)) for text in (text_of(row["prompt"]), row["a"], row["b"]))
        lines.append(f"| {prompt} | {sides[0]} | {row['score_a']:.4g} | {sides[1]} | {row['score_b']:.4g} |")
    return "\n".join(lines) + "\n"


def _summary(first: torch.Tensor, second: torch.Tensor, prompts: Sequence[str]) -> Comparison:
    wins = ((second > first).double() + 0.5 * (second == first).double()).tolist()
    difference = (second - first).tolist()
    rate, count = sum(wins) / len(wins), effective_pairs(wins, prompts)
    low, high = wilson_interval(rate, count)
    return Comparison(
        mean_first=first.mean().item(),
        mean_second=second.mean().item(),
        win_rate=rate,
        low=low,
        high=high,
        pairs=len(wins),
        independent_pairs=count,
        mean_difference=sum(difference) / len(difference),
        standard_error=clustered_error(difference, prompts),
    )


def wilson_interval(rate: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a proportion of ``count`` independent trials (Wilson 1927)."""
    centre = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Standard error of the mean of values that are independent between clusters only; nan for a single cluster.

    ``sqrt(G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2) / n`` for G clusters of n values; with clusters of equal
    size it is the usual standard error of the mean of the clusters' means. Liang and Zeger 1986.
    """
    mean = sum(values) / len(values)
    sums: dict[str, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return math.nan
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(s**2 for s in sums.values())) / len(values)


def effective_pairs(wins: Sequence[float], clusters: Sequence[str]) -> float:
    """How many independent pairs have a win rate as variable as this one: ``p (1 - p) / clustered_error^2``.

    Between the number of pairs and what they are worth when all of a cluster are the same, ``n^2 / sum_g n_g^2`` (the
    number of clusters when they are of equal size), which also holds where every pair was won or every pair lost. Korn
    and Graubard 1998.
    """
    sizes = Counter(clusters).values()
    least = len(wins) ** 2 / sum(size**2 for size in sizes)
    rate, error = sum(wins) / len(wins), clustered_error(wins, clusters)
    if math.isnan(error) or rate in (0.0, 1.0):
        return least
    return min(max(rate * (1 - rate) / error**2, least), len(wins)) if error > 0 else float(len(wins))
