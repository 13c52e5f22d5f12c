"""BRISQUE's features of an image (Mittal, Moorthy and Bovik 2012, IEEE TIP 21(12)), as its support vectors expect them.

The steps are those of the authors' C++ release, because the support vectors were fitted to its features: 8-bit luma,
local normalisation with a 7x7 Gaussian (sigma 7/6, edges repeated), asymmetric generalised Gaussians fitted to the
result and to its products with four neighbours, all again at half size (bicubic without antialiasing: a = -0.75).

One departure: where an image is flat, the release sees rounding errors of either sign. Here values below 1e-12 are 0
and count half on each side, so that scores do not depend on the machine; a wholly flat image scores 123.14.
"""

import torch
from torch import Tensor
from torch.nn import functional

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # rows down, columns right


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
