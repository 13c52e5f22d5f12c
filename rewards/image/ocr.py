"""Whether the image shows the required text: it is read by PP-OCRv6 (PaddleOCR's small models).

The score is Flow-GRPO's (Liu et al. 2025, arXiv:2505.05470): ``max(0, 1 - edit distance / length of the target)``. As
there, white space and case do not count, lines are joined in the order in which they are read, from top to bottom, and
images are not turned round (a word upside down is read in parts). Beyond that, compatibility forms (full-width
letters, ligatures) and curly quotation marks count as the plain ones: the reader does not keep them apart.

The target is ``metadata["text"]`` if there is one, else what stands in quotation marks in the prompt: `target_text`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from diffusion_align.rewards.base import RewardError, to_uint8
from diffusion_align.rewards.settings import RewardSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PLAIN = str.maketrans("‘’‚“”„«»", '\'\'\'"""""')
DOUBLE = re.compile(r'(?<!\d)"([^"]*)"|“([^“”]*)”|„([^„“”]*)[“”]|«([^«»]*)»')  # not after a digit: 5" is a length
SINGLE = re.compile(r"(?<!\w)['‘‚](?!\s)(.*?)(?<!\s)['‘’](?!\w)")  # not inside a word: don't


class Ocr(RewardSettings):
    """How much of the required text the image shows: text in quotation marks in the prompt, or metadata "text"."""

    name: ClassVar[str] = "ocr"
    about: ClassVar[dict[str, Any]] = {
        "needs": "prompts with text",
        "model": "PP-OCRv6 small, from the package rapidocr",
        "range": "0 to 1",
        "cost": "no download (31 MB in the package); 0.2 s per image of any size up to 512x512 on one CPU core",
        "extra": "ocr",
        "licence": "Apache-2.0 (rapidocr, PP-OCRv6)",
    }

    # With "ignore" an image crowded with letters is as good as the required one, which a policy finds out.
    extra_text: Literal["count", "ignore"] = Field(
        "count",
        description="whatever else is read adds to the edit distance; or 1 for an image whose text contains the target",
    )
    min_side: int = Field(
        512,
        ge=32,
        le=2000,
        description="pixels to which the shorter side is enlarged first; more finds smaller letters and takes longer",
    )
    num_threads: int = Field(
        1, ge=1, le=1024, description="threads of the reader; one leaves the other cores to the sampler"
    )
    _engine: Any = None
    _lock: Any = PrivateAttr(default_factory=threading.Lock)  # the engine keeps state between its steps

    @model_validator(mode="after")
    def _installed(self) -> Self:
        for package in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise RewardError(f"{package} is not installed: pip install 'diffusion-align[ocr]'")
        return self

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        targets = [target_text(prompt, notes) for prompt, notes in zip(prompts, metadata)]  # fails before anything runs
        return [
            text_score(self.read(image), target, extra_text=self.extra_text)
            for image, target in zip(to_uint8(images).numpy(), targets)
        ]

    def check_prompts(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """RewardError if one of them names no text."""
        for prompt, notes in zip(prompts, metadata, strict=True):
            target_text(prompt, notes)

    def read(self, image: np.ndarray) -> str:
        """All text in ``image``, uint8 RGB (H, W, 3); lines are joined by newlines, "" if nothing is read."""
        import numpy as np

        with self._lock:
            if self._engine is None:
                self._engine = load_engine(min_side=self.min_side, num_threads=self.num_threads)
            lines = self._engine(np.ascontiguousarray(image[..., ::-1])).txts  # it wants BGR
        return "\n".join(lines or ())


def load_engine(*, min_side: int, num_threads: int) -> Any:
    """rapidocr with the models that come with it; silent."""
    from rapidocr import RapidOCR

    threads = min(num_threads, os.cpu_count() or 1)  # above the number of cores it would take all of them
    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Det.limit_side_len": min_side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def target_text(prompt: str, metadata: dict[str, Any]) -> str:
    """The text that the image should show.

    ``metadata["text"]``, else the quoted pieces of ``prompt``, joined by a space. Marks are straight or typographic,
    double or single; single ones count only where no double pair holds a text. An apostrophe inside or at the end of
    a word (don't, dogs') opens nothing, and neither does a straight double mark after a digit (5").

    Raises:
        RewardError: there is no such text, or it is empty.
    """
    if metadata.get("text") is not None:
        text = metadata["text"]
        if not isinstance(text, str) or not plain(text):
            raise RewardError(
                f"reward 'ocr': the metadata 'text' of prompt {prompt[:200]!r} is {text!r}, not a text to show"
            )
        return text
    for marks in (DOUBLE, SINGLE):
        pieces = [match[match.lastindex or 0] for match in marks.finditer(prompt)]
        text = " ".join(piece for piece in pieces if plain(piece))
        if text:
            return text
    raise RewardError(
        f"reward 'ocr': prompt {prompt[:200]!r} names no text: put it in quotation marks or into the metadata 'text'"
    )


def text_score(found: str, target: str, *, extra_text: str = "count") -> float:
    """Score in [0, 1] of having read ``found`` where ``target`` was required; see `Ocr`."""
    found, target = plain(found), plain(target)
    if extra_text == "ignore" and target in found:
        return 1.0
    return max(0.0, 1 - edit_distance(found, target) / len(target))


def plain(text: str) -> str:
    """``text`` as it is compared: compatibility forms and marks made plain, no case, no white space."""
    return "".join(unicodedata.normalize("NFKC", text.translate(PLAIN)).casefold().split())


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))  # distances from the empty beginning of a to every beginning of b
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
