"""A reward that another process or machine computes, called over HTTP: the client of `diffusion-align serve-reward`.

So a reward with awkward dependencies lives in an environment of its own. Images travel as 8-bit PNG and scores as
numbers that keep every bit, so a reward answers as it would in this process as long as it sees the same batches.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field, PlainValidator

from diffusion_align.rewards.base import RewardError, to_uint8
from diffusion_align.rewards.endpoints import Endpoint, ask, check_url, in_parallel, png, read_token, readable_token
from diffusion_align.rewards.settings import RewardSettings, Seconds
from diffusion_align.streams import printable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
    """Scores from servers. `RemoteSettings` builds it."""

    name = "remote"
    differentiable = False
    background = True  # it waits for others while this process samples

    def __init__(self, endpoints: Sequence[Endpoint], limits: Limits, *, patience: float) -> None:
        self.endpoints, self.limits, self.patience = list(endpoints), limits, patience
        self.scorer = f"served at {', '.join(endpoint.url for endpoint in endpoints)}"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        import torch

        rows = [
            _row(prompt, notes, image)
            for prompt, notes, image in zip(prompts, metadata, to_uint8(images).numpy(), strict=True)
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
                f"an image of {images.shape[-1]} x {images.shape[-2]} is more than the reward server takes at once "
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


def _check_urls(url: Any) -> str | list[str]:
    if isinstance(url, str):
        return check_url(url)
    if not isinstance(url, list | tuple) or not url:
        raise RewardError(f"url={url!r} must be an address like {URL}, or a list of them")
    return [check_url(one) for one in url]


class RemoteSettings(RewardSettings):
    """What a reward served elsewhere scores: by one or several `diffusion-align serve-reward`.

    A batch is cut into equal contiguous parts, one for each server (and smaller where a server's limits say so), which
    are sent at the same time; the part of a server that is away goes to the others. How it is cut depends on the
    number of servers and their limits alone, never on which of them answers.
    """

    name: ClassVar[str] = "remote"
    about: ClassVar[dict[str, Any]] = {
        "needs": "a server",
        "model": "no model here; the server's",
        "range": "that of the reward served",
        "cost": "nothing to download; one request per batch and server",
        "licence": "that of the reward served",
    }

    url: Annotated[str | list[str], PlainValidator(_check_urls)] = Field(
        URL, description="address of a server, or a list of them; all must serve the same reward"
    )
    token_file: Annotated[str | Path | None, readable_token(TOKEN)] = Field(
        None, description=f"file with the servers' token; without it the environment's {TOKEN}, if set"
    )
    timeout: Seconds = Field(
        300.0,
        description="seconds per request, including its wait for a turn; a server whose machine is gone is "
        "noticed within ten",
    )
    patience: Seconds = Field(300.0, description="seconds to wait for a server that is down or restarting")

    def build(self, *, model: str | None = None, device: str | torch.device = "cpu") -> Remote:
        """RewardError: a server does not answer, refuses the token, or is no reward server."""
        token = read_token(self.token_file, TOKEN)
        urls = [self.url] if isinstance(self.url, str) else self.url
        endpoints = [
            Endpoint(one, label="reward server", token=token, timeout=self.timeout, transient=TRANSIENT) for one in urls
        ]
        found = in_parallel(lambda one, stop: _served(one, self.patience, stop), endpoints, len(endpoints))
        names = sorted({name for name, _ in found})
        if len(names) > 1:
            raise RewardError(
                f"the reward servers serve different rewards ({', '.join(names)}): all must serve the same"
            )
        limits = Limits(*map(min, zip(*(limits for _, limits in found), strict=True)))
        return Remote(endpoints, limits, patience=self.patience)


def split(count: int, limit: int, servers: int) -> list[tuple[int, int]]:
    """(start, end) of contiguous parts of ``count``: as many for each of ``servers``, at most ``limit`` in each.

    Sizes differ by one at most; there are fewer parts where there are not enough to give.
    """
    parts = min(count, servers * math.ceil(count / (servers * limit)))
    edges = [part * count // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def _row(prompt: str, notes: dict[str, Any], pixels: Any) -> tuple[str, str, str]:
    """Prompt, metadata and image, each as JSON."""
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
    import torch

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
