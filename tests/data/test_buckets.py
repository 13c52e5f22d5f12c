"""Aspect-ratio buckets against the published lists, and by what they promise; how images are fitted to them."""

import itertools
import math
import random

import pytest

from diffusion_align.data.buckets import aspect_buckets, bucket_line, fit, nearest_bucket

SIDES = [(512, 64), (1024, 64), (768, 32), (64, 16), (64, 8), (96, 40)]
SHAPES = [(512, 64, 512), (640, 64, 384), (64, 8, 48), (1024, 64, 768), (100, 8, 300)]


def drawn(count, seed=0):
    """Sizes of images, with ratios up to 8."""
    stream = random.Random(seed)
    for _ in range(count):
        area, ratio = stream.uniform(20, 4000) ** 2, math.exp(stream.uniform(-2, 2))
        yield max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))


def test_buckets_of_512_are_those_of_sd_scripts():
    tall = [(1024, 256), (960, 256), (896, 256), (832, 256), (768, 320), (704, 320), (640, 384), (576, 448)]
    assert set(aspect_buckets((512, 512), 64)) == {(512, 512), *tall, *((width, height) for height, width in tall)}


@pytest.mark.parametrize(("height", "step", "width"), SHAPES + [(side, step, side) for side, step in SIDES])
def test_what_buckets_promise(height, step, width):
    area = height * width
    buckets = aspect_buckets((height, width), step)
    assert buckets == sorted(set(buckets))
    assert {(b, a) for a, b in buckets} == set(buckets)
    assert buckets == aspect_buckets((width, height), step)
    side = math.isqrt(area) // step * step
    assert (side, side) in buckets
    assert ((height, width) in buckets) == (height % step == width % step == 0 and max(height, width) <= 4 * side)
    for a, b in buckets:
        assert a % step == b % step == 0
        assert a * b <= area
        assert math.sqrt(area) / 2 <= min(a, b) <= max(a, b) <= 2 * math.sqrt(area)
        # One side is as long as the other allows, but for the square.
        assert a == b == side or a * (b + step) > area or (a + step) * b > area


def test_without_room_there_are_no_buckets():
    assert aspect_buckets((64, 64), 64) == [(64, 64)]
    assert aspect_buckets((64, 64), 128) == aspect_buckets((64, 64), 72) == []
    assert len(aspect_buckets((128, 128), 64)) == 5


def pixels_kept(image, size):
    """Share of the pixels of ``image`` that are in what is cut out, found without ``nearest_bucket``'s arithmetic."""
    scale = max(size[0] / image[0], size[1] / image[1])
    return size[0] * size[1] / (scale * image[0] * scale * image[1])


@pytest.mark.parametrize(("side", "step"), SIDES)
def test_the_nearest_bucket_keeps_most_of_the_image(side, step):
    buckets = aspect_buckets((side, side), step)
    for image in itertools.chain(drawn(200), buckets):
        found = nearest_bucket(image, buckets)
        kept = [pixels_kept(image, bucket) for bucket in buckets]
        assert pixels_kept(image, found) == pytest.approx(max(kept), rel=1e-12)
        logs = [abs(math.log(image[0] * b[1] / (image[1] * b[0]))) for b in buckets]
        assert abs(math.log(image[0] * found[1] / (image[1] * found[0]))) == pytest.approx(min(logs), abs=1e-12)
        assert nearest_bucket(image[::-1], buckets) == found[::-1]  # of an image on its side
        assert nearest_bucket((3 * image[0], 3 * image[1]), buckets) == found
        if image in buckets:
            assert found == image


def test_of_equal_buckets_the_largest_is_taken():
    assert nearest_bucket((30, 60), [(16, 32), (32, 64), (24, 48)]) == (32, 64)


def test_the_fullest_buckets_are_named():
    sizes = [(64, 64)] * 5 + [(80, 48)] * 9 + [(48, 80)] * 5
    most = "pairs in buckets of height x width: 9 in 80 x 48, 5 in 48 x 80"
    assert bucket_line(sizes) == f"{most}, 5 in 64 x 64"
    assert bucket_line([*sizes, (32, 96)], named=2) == f"{most}, 6 in 2 others"


def test_an_image_is_scaled_evenly_and_cut_in_the_middle():
    buckets = aspect_buckets((512, 512), 64)
    for image in drawn(300):
        size = nearest_bucket(image, buckets)
        (tall, wide), (top, left) = fit(image, size)
        assert tall >= size[0]
        assert wide >= size[1]
        assert tall == size[0] or wide == size[1]
        scale = max(size[0] / image[0], size[1] / image[1])
        assert abs(tall - scale * image[0]) <= 1
        assert abs(wide - scale * image[1]) <= 1
        assert 0 <= (tall - size[0]) - 2 * top <= 1
        assert 0 <= (wide - size[1]) - 2 * left <= 1
    assert fit((48, 64), (48, 64)) == ((48, 64), (0, 0))
    assert fit((1000, 500), (512, 512)) == ((1024, 512), (256, 0))
