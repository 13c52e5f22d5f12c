"""How natural an image's local contrast is, judged without a reference: minus the BRISQUE score.

Mittal, Moorthy and Bovik 2012, "No-Reference Image Quality Assessment in the Spatial Domain" (IEEE TIP 21(12)). An
RBF support vector regression of the 36 numbers in `brisque_features`, as in the authors' C++ release.

Only the data of the package ``brisque`` are used, read as text after comparing their SHA-256: its code wants OpenCV,
unpickles, raises TypeError under NumPy 2.4 and gives NaN for flat images. `piq` and `pyiqa` download their weights.

Measured on 20 images that scikit-image ships, against seven worse copies of each (blur of sigma 1, 2, 3, noise of
.05, .1, .2, JPEG of quality 8), all as RGB: the clean one wins 135 times of 140, and always for everyday photographs.
The other five are three medical and microscope images ("retina", "cell", "microaneurysms"), so soft that they score
50 to 70 when clean and that a little noise looks like sharpness. For the first two no other border or luma weighting
changes that; the third would win narrowly with mirrored edges.
"""

from __future__ import annotations

import importlib.util
import pickletools
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import model_validator

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.networks import has_digest
from diffusion_align.rewards.settings import RewardSettings

if TYPE_CHECKING:
    from torch import Tensor

SHA256 = {
    "svm.txt": "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d",
    "normalize.pickle": "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9",
}
MISSING = "the package brisque, which has the support vectors, is missing: pip install 'diffusion-align[brisque]'"
PIXELS_AT_ONCE = 2**18  # more falls out of the processor's cache


class Regression(NamedTuple):
    """An RBF support vector regression of 36 features, float64; scaling takes ``low`` to -1 and ``high`` to 1."""

    low: Tensor
    high: Tensor
    vectors: Tensor
    weights: Tensor
    gamma: float
    rho: float

    def __call__(self, features: Tensor) -> Tensor:
        """(B,) from (B, 36): ``sum_i weights_i exp(-gamma |x - vectors_i|^2) - rho``."""
        import torch

        scaled = 2 * (features - self.low) / (self.high - self.low) - 1
        squares = (scaled[:, None] - self.vectors).square().sum(dim=-1)
        return torch.exp(-self.gamma * squares) @ self.weights - self.rho


class Brisque(RewardSettings):
    """How free of blur and noise the image is: minus BRISQUE, how far its local contrast is from clean photographs'."""

    name: ClassVar[str] = "brisque"
    about: ClassVar[dict[str, Any]] = {
        "model": "BRISQUE's support vectors (LIVE, C++ release), from the package brisque",
        "range": "about -100 to 10: clean photographs -40 to 10, a flat image -123; unbounded in principle",
        "cost": "no download (0.4 MB in the package); 50 ms per image of 512x512, 2 ms of 64x64 on one CPU core",
        "extra": "brisque",
        "licence": "Apache-2.0 (brisque); LIVE's own permissive terms (support vectors)",
    }

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if data_folder() is None:
            raise RewardError(MISSING)
        return self

    @cached_property
    def _regression(self) -> Regression:
        folder = data_folder()
        assert folder is not None
        return load_regression(folder)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        import torch

        from diffusion_align.rewards.image.brisque_features import features, luma

        together = max(1, PIXELS_AT_ONCE // images[0, 0].numel())
        return -self._regression(torch.cat([features(luma(part)) for part in images.split(together)]))


def data_folder() -> Path | None:
    """Where the package ``brisque`` keeps its data, found without importing it; None if it is not installed."""
    found = importlib.util.find_spec("brisque")
    folders = [Path(place) / "models" for place in (found and found.submodule_search_locations) or ()]
    return next((folder for folder in folders if all((folder / name).is_file() for name in SHA256)), None)


def load_regression(folder: Path) -> Regression:
    """The regression in ``svm.txt`` (libsvm's text format) and ``normalize.pickle`` (36 minima, then 36 maxima).

    The pickle is not loaded: its opcodes are listed, and the floats among them are the 72 numbers.

    Raises:
        RewardError: a file is not the one that this code was written for.
    """
    import torch

    for name, digest in SHA256.items():
        if not has_digest(folder / name, digest):
            raise RewardError(f"'{folder / name}' is not the file of brisque 0.2.0: pip install 'brisque==0.2.0'")
    header, _, rows = (folder / "svm.txt").read_text(encoding="ascii").partition("\nSV\n")
    settings = dict(line.split(maxsplit=1) for line in header.splitlines())
    numbers = [[float(word.rpartition(":")[2]) for word in row.split()] for row in rows.splitlines()]
    table = torch.tensor(numbers, dtype=torch.float64)
    codes = pickletools.genops((folder / "normalize.pickle").read_bytes())
    bounds = [value for code, value, _ in codes if code.name == "BINFLOAT"]
    low, high = torch.tensor(bounds, dtype=torch.float64).view(2, 36)
    return Regression(low, high, table[:, 1:], table[:, 0], float(settings["gamma"]), float(settings["rho"]))
