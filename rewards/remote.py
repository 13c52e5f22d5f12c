"""A reward that another process or machine computes, asked over HTTP: the client of `diffusion-align serve-reward`.

So a reward with awkward dependencies lives in an environment of its own. Pictures travel as 8-bit PNG and scores as
numbers that keep every bit, so a reward answers as it would in this process as long as it sees the same batches.
"""

import base64
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion_align.rewards.base import RewardError, to_uint8
from diffusion_align.rewards.endpoints import (
    Endpoint,
    ask,
    in_parallel,
    png,
    read_token,
    token_problem,
    url_problem,
)
from diffusion_align.rewards.options import number_problem
from diffusion_align.streams import printable

ABOUT = {
    "remote": {
        "model": "no model here; the server's",
        "range": "that of the reward served",
        "cost": "nothing to download; one request a batch and server",
        "extra": None,
        "licence": "that of the reward served",
        "differentiable": False,
    },
}
URL = "http://127.0.0.1:8901"
TOKEN = "DIFFUSION_ALIGN_TOKEN"
# 500 is not among them: the served reward raised, and would again.
TRANSIENT = (408, 429, 502, 503, 504)
_LARGEST_INT = 2**127  # within float32
_ROOM = 100  # bytes of a request besides its rows


class Limits(NamedTuple):
    """The most that a server takes in one request: images, bytes of the body, pixels of all images together.

    The pixels are what one CPU core decodes and scores as JPEG files in about a second; the client cuts its batches
    accordingly.
    """

    max_batch: int = 64
    max_bytes: int = 64_000_000
    max_pixels: int = 8 * 1024 * 1024


class Remote:
    """Scores from servers. Build it with `remote`."""

    name = "remote"
    differentiable = False
    background = True  # it waits for others while this process samples

    def __init__(self, endpoints: Sequence[Endpoint], limits: Limits, *, patience: float) -> None:
        self.endpoints, self.limits, self.patience = list(endpoints), limits, patience

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        rows = [
            _row(prompt, notes, picture)
            for prompt, notes, picture in zip(prompts, metadata, to_uint8(images).numpy(), strict=True)
        ]
        if not rows:
            return torch.empty(0)
        pixels = images.shape[-2] * images.shape[-1]
        limit = min(
            self.limits.max_batch,
            self.limits.max_pixels // pixels,
            (self.limits.max_bytes - _ROOM) // max(sum(map(len, row)) + 2 * len(row) for row in rows),
        )
        if limit < 1:
            raise RewardError(
                f"a picture of {images.shape[-1]} x {images.shape[-2]} is more than the reward server takes at once "
                f"(max_bytes={self.limits.max_bytes}, max_pixels={self.limits.max_pixels})"
            )
        parts = split(len(rows), limit, len(self.endpoints))

        def score(part: int, stop: Any) -> Tensor:
            start, end = parts[part]
            first = part % len(self.endpoints)
            body = _body(rows[start:end])
            answer = ask(self.endpoints, "POST", "/score", body, patience=self.patience, first=first, stop=stop)
            return _scores(answer, end - start, self.endpoints)

        return torch.cat(in_parallel(score, range(len(parts)), len(self.endpoints)))


def remote(
    *,
    url: str | Sequence[str] = URL,
    token_file: str | None = None,
    timeout: float = 300.0,
    patience: float = 300.0,
) -> Remote:
    """Scores from one or several `diffusion-align serve-reward`.

    A batch is cut into equal contiguous parts, one for each server (and smaller where a server's limits say so), which
    are sent at the same time; the part of a server that is away goes to the others. How it is cut depends on the
    number of servers and their limits alone, never on which of them answers.

    Args:
        url: address of a server, or a list of them; all must serve the same reward.
        token_file: file with the servers' token; without it the environment's ``DIFFUSION_ALIGN_TOKEN``, if set.
        timeout: seconds a request may take, the time it waits for its turn included; a server whose machine is gone is
            noticed within ten.
        patience: seconds to wait for a server that is down or restarting, before the reward fails.

    Raises:
        RewardError: a server does not answer, refuses the token, or is no reward server.
    """
    problem = remote_problem(url=url, token_file=token_file, timeout=timeout, patience=patience)
    if problem:
        raise RewardError(problem)
    token = read_token(token_file, TOKEN)
    urls = [url] if isinstance(url, str) else list(url)
    endpoints = [
        Endpoint(one, label="reward server", token=token, timeout=timeout, transient=TRANSIENT) for one in urls
    ]
    found = in_parallel(lambda one, stop: _served(one, patience, stop), endpoints, len(endpoints))
    names = sorted({name for name, _ in found})
    if len(names) > 1:
        raise RewardError(f"the reward servers serve different rewards ({', '.join(names)}): all must serve the same")
    limits = [limits for _, limits in found]
    return Remote(endpoints, Limits(*map(min, zip(*limits, strict=True))), patience=patience)


def remote_problem(
    *,
    url: Any = URL,
    token_file: Any = None,
    timeout: Any = 300.0,
    patience: Any = 300.0,
) -> str | None:
    """What is wrong with these options, in one sentence, or None. Asks no server."""
    urls = [url] if isinstance(url, str) else url
    if not isinstance(urls, list | tuple) or not urls:
        return f"url={url!r} must be an address like {URL}, or a list of them"
    wrong = [problem for problem in map(url_problem, urls) if problem]
    if wrong:
        return wrong[0]
    return number_problem(timeout=timeout, patience=patience) or token_problem(token_file, TOKEN)


def split(count: int, limit: int, servers: int) -> list[tuple[int, int]]:
    """(start, end) of contiguous parts of ``count``: as many for each of ``servers``, at most ``limit`` in each.

    Sizes differ by one at most; there are fewer parts where there are not enough to give.
    """
    parts = min(count, servers * math.ceil(count / (servers * limit)))
    edges = [part * count // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def _row(prompt: str, notes: dict[str, Any], pixels: Any) -> tuple[str, str, str]:
    """Prompt, metadata and picture, each as JSON."""
    try:
        described = json.dumps(notes)
    except (TypeError, ValueError) as error:
        raise RewardError(f"metadata of prompt {prompt[:80]!r} cannot be sent as JSON: {error}") from error
    return json.dumps(prompt), described, f'"{base64.b64encode(png(pixels)).decode()}"'


def _body(rows: Sequence[tuple[str, str, str]]) -> bytes:
    columns = zip(("prompts", "metadata", "images"), zip(*rows, strict=True), strict=True)
    return ("{" + ", ".join(f'"{name}": [{", ".join(column)}]' for name, column in columns) + "}").encode()


def _scores(answer: Any, count: int, endpoints: Sequence[Endpoint]) -> Tensor:
    """(B,) in the dtype that the reward returned over there; an older server does not say it."""
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count or not all(map(_is_score, scores)):
        who = ", ".join(map(str, endpoints))
        raise RewardError(f"{who} did not answer {count} scores: is it a diffusion-align serve-reward?")
    return torch.tensor(scores, dtype=torch.float64 if answer.get("dtype") == "float64" else torch.float32)


def _is_score(value: Any) -> bool:
    """Whether it is a number that a float can hold; nan and infinity are looked at where every reward's are."""
    return type(value) is float or (type(value) is int and abs(value) <= _LARGEST_INT)


def _served(endpoint: Endpoint, patience: float, stop: Any) -> tuple[str, Limits]:
    """Which reward the server says it has, and what it takes; proof that it is there."""
    health = ask([endpoint], "GET", "/health", patience=patience, stop=stop)
    found: list[Any] = [health.get(name) for name in Limits._fields] if isinstance(health, dict) else []
    if not found or health.get("status") != "ok" or not all(type(one) is int and one > 0 for one in found):
        raise RewardError(f"{endpoint} is there but is no reward server: start one with diffusion-align serve-reward")
    return printable(str(health.get("reward")))[:200], Limits(*found)
