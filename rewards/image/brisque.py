"""How natural an image's local contrast is, judged without a reference: minus the BRISQUE score.

Mittal, Moorthy and Bovik 2012, "No-Reference Image Quality Assessment in the Spatial Domain" (IEEE TIP 21(12)). The
steps are those of the authors' C++ release, because the support vectors were fitted to its features: 8-bit luma,
local normalisation with a 7x7 Gaussian (sigma 7/6, edges repeated), asymmetric generalised Gaussians fitted to the
result and to its products with four neighbours, all again at half size (bicubic without antialiasing: a = -0.75), and
an RBF support vector regression of these 36 numbers.

Only the data of the package ``brisque`` are used, read as text after comparing their SHA-256: its code wants OpenCV,
unpickles, raises TypeError under NumPy 2.4 and gives NaN for flat images. `piq` and `pyiqa` download their weights.

One departure: where an image is flat, the release sees rounding errors of either sign. Here values below 1e-12 are 0
and count half on each side, so that scores do not depend on the machine; a wholly flat image scores 123.14.

Measured on 20 images that scikit-image ships, against seven worse copies of each (blur of sigma 1, 2, 3, noise of
.05, .1, .2, JPEG of quality 8), all as RGB: the clean one wins 135 times of 140, and always for everyday photographs.
The other five are three medical and microscope images ("retina", "cell", "microaneurysms"), so soft that they score
50 to 70 when clean and that a little noise looks like sharpness. For the first two no other border or luma weighting
changes that; the third would win narrowly with mirrored edges.
"""

import importlib.util
import pickletools
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional

from diffusion_align.rewards.base import RewardError
from diffusion_align.rewards.networks import has_digest
from diffusion_align.rewards.settings import RewardSettings

SHA256 = {
    "svm.txt": "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d",
    "normalize.pickle": "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9",
}
MISSING = "the package brisque, which has the support vectors, is missing: pip install 'diffusion-align[brisque]'"
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # rows down, columns right
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


def luma(images: Tensor) -> Tensor:
    """(B, H, W) float64 on the CPU: BT.601 luma in 8-bit levels, divided by 255, of images (B, 3, H, W) in [0, 1]."""
    red, green, blue = (images.detach().to("cpu", torch.float64).clamp(0, 1) * 255).round().unbind(dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).round() / 255


def features(images: Tensor) -> Tensor:
    """BRISQUE's 36 features, float64 (B, 36), of luma (B, H, W) in [0, 1]: 18 at full and 18 at half size."""
    height, width = images.shape[1:]
    half = functional.interpolate(
        images[:, None], size=(max(height // 2, 1), max(width // 2, 1)), mode="bicubic", align_corners=False
    )
    return torch.cat([_features(images), _features(half[:, 0])], dim=1)


def _features(images: Tensor) -> Tensor:
    x = normalise(images)
    alpha, left, right = fit(x)
    columns = [alpha, (left + right) / 2]
    height, width = x.shape[1:]
    padded = functional.pad(x, (1, 1, 1, 1))
    for down, across in NEIGHBOURS:
        product = x * padded[:, 1 + down : 1 + down + height, 1 + across : 1 + across + width]
        pairs = (height - abs(down)) * (width - across)
        alpha, left, right = fit(product, outside=height * width - pairs)
        first, second, third = (torch.lgamma(k / alpha) for k in (1, 2, 3))
        mean = (right.sqrt() - left.sqrt()) * torch.exp(second - first / 2 - third / 2)
        columns += [alpha, mean, left, right]
    return torch.stack(columns, dim=1)


def normalise(images: Tensor) -> Tensor:
    """(B, H, W): ``(x - mu) / (sigma + 1/255)`` with mean and deviation under a 7x7 Gaussian; eq. 1 to 3."""
    mean, square = blur(images), blur(images.square())
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    x = (images - mean) / (deviation + 1 / 255)
    return torch.where(x.abs() < 1e-12, 0, x)


def blur(x: Tensor) -> Tensor:
    """``x`` (B, H, W) under a 7x7 Gaussian of sigma 7/6, edges repeated."""
    taps = torch.exp(-torch.arange(-3, 4, dtype=x.dtype).square() / (2 * (7 / 6) ** 2))
    taps = (taps / taps.sum()).view(1, 1, 7)
    padded = functional.pad(x[:, None], (3, 3, 3, 3), mode="replicate")
    rows = functional.conv2d(padded, taps[:, :, None])
    return functional.conv2d(rows, taps[..., None])[:, 0]


ALPHAS = torch.arange(0.2, 10, 0.001, dtype=torch.float64)
RATIOS = torch.exp(2 * torch.lgamma(2 / ALPHAS) - torch.lgamma(1 / ALPHAS) - torch.lgamma(3 / ALPHAS))


def fit(x: Tensor, *, outside: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Shape, left and right variance, each (B,), of an asymmetric generalised Gaussian fitted to ``x`` (B, H, W).

    By matching moments: ``E[|x|]^2 / E[x^2] * r(left, right) = ratio(shape)``, solved on a grid of steps of 0.001. Left
    is the mean square of the negative values, right that of the positive ones; a zero counts half on each side, except
    the ``outside`` ones for neighbours beyond the edge, which count in the two moments alone.
    """
    x = x.flatten(1)
    tiny = torch.finfo(x.dtype).tiny
    halves = ((x == 0).sum(dim=1) - outside) / 2
    left = x.clamp(max=0).square().sum(dim=1) / ((x < 0).sum(dim=1) + halves).clamp(min=0.5)
    right = x.clamp(min=0).square().sum(dim=1) / ((x > 0).sum(dim=1) + halves).clamp(min=0.5)
    a, b = left.sqrt(), right.sqrt()
    skew = (a**3 + b**3) * (a + b) / (left + right).square().clamp(min=tiny)
    ratio = x.abs().mean(dim=1).square() / x.square().mean(dim=1).clamp(min=tiny) * skew
    nearest = (RATIOS - ratio[:, None]).abs().argmin(dim=1)
    return ALPHAS[nearest], left, right
