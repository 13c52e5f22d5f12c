"""Aspect-ratio buckets: the sizes at which images of many shapes are trained, and how an image is fitted to one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

Size = tuple[int, int]
"""(height, width) in pixels."""


def aspect_buckets(size: Size, step: int) -> list[Size]:
    """The buckets whose sides are multiples of ``step``, none larger in area than ``size``; [] if there are none.

    For each side from half to twice that of the square of this area, the longest other side that fits, in both
    orientations: the buckets of kohya's sd-scripts (``make_bucket_resolutions``). Ratios go up to about 1:4.
    """
    area = size[0] * size[1]
    sides = {side for side in range(step, math.isqrt(4 * area) + 1, step) if 4 * side**2 >= area}
    square = math.isqrt(area) // step * step
    found = {(square, square)} if square in sides else set()
    for side in sides:
        longest = area // side // step * step
        if longest in sides:
            found |= {(side, longest), (longest, side)}
    return sorted(found)


def nearest_bucket(image: Size, buckets: Sequence[Size]) -> Size:
    """The bucket that keeps most of an image that is scaled to cover it; of equals the largest.

    That is the bucket with the nearest logarithm of the aspect ratio, so a rotated image is in the rotated bucket.
    """

    def share_kept(bucket: Size) -> Fraction:
        across, along = image[0] * bucket[1], image[1] * bucket[0]
        return Fraction(min(across, along), max(across, along))

    return max(buckets, key=lambda bucket: (share_kept(bucket), bucket[0] * bucket[1], bucket))


def bucket_line(sizes: Sequence[Size], named: int = 6) -> str:
    """How many of the pairs with these buckets are in each: the ``named`` fullest ones, and the others together."""
    counts = sorted(Counter(sizes).items(), key=lambda one: (-one[1], one[0]))
    parts = [f"{count} in {height} x {width}" for (height, width), count in counts[:named]]
    if rest := counts[named:]:
        parts.append(f"{sum(count for _, count in rest)} in {len(rest)} others")
    return f"pairs in buckets of height x width: {', '.join(parts)}"


class Fit(NamedTuple):
    """How an image is fitted to a size without distortion.

    Attributes:
        scaled: (height, width) of the image scaled to cover the size.
        corner: (top, left) of the centre crop in it.
    """

    scaled: Size
    corner: Size


def fit(image: Size, size: Size) -> Fit:
    """How an ``image`` of (height, width) is fitted to ``size``."""
    scale = max(size[0] / image[0], size[1] / image[1])
    tall, wide = (max(wanted, round(scale * side)) for wanted, side in zip(size, image))
    return Fit((tall, wide), ((tall - size[0]) // 2, (wide - size[1]) // 2))
