"""BRISQUE against loops written from the paper, against libsvm, and on photographs."""

import io
import math
import sys

import numpy as np
import pytest
import torch
from libsvm import svm
from PIL import Image
from skimage import data, filters

from diffusion_align.rewards import RewardError, build_reward, check_reward
from diffusion_align.rewards.image import brisque as module
from diffusion_align.rewards.image.brisque import data_folder, load_regression
from diffusion_align.rewards.image.brisque_features import features, fit, luma, normalise
from tests.helpers.rewarding import score


@pytest.fixture(scope="module")
def reward():
    return build_reward("brisque")


def photograph(name):
    """uint8 (H, W, 3)."""
    return np.array(Image.fromarray(getattr(data, name)()).convert("RGB"))


def as_tensor(array):
    """(1, 3, H, W) in [0, 1] from uint8 (H, W, 3)."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)[None].float() / 255


def noisy(array, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, array.shape)
    return (255 * (array / 255 + noise).clip(0, 1)).round().astype(np.uint8)


def copies(array):
    """The image made worse in seven ways, uint8."""
    for sigma in (1, 2, 3):
        blurred = filters.gaussian(array / 255, sigma, channel_axis=-1)
        yield f"blur {sigma}", (255 * blurred).round().astype(np.uint8)
    for sigma in (0.05, 0.1, 0.2):
        yield f"noise {sigma}", noisy(array, sigma)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=8)
    yield "jpeg 8", np.array(Image.open(buffer))


@pytest.mark.parametrize("name", ["astronaut", "camera", "coffee"])
def test_a_clean_photograph_beats_its_worse_copies(reward, name):
    clean = photograph(name)
    best = score(reward, as_tensor(clean)).item()
    worse = {kind: score(reward, as_tensor(copy)).item() for kind, copy in copies(clean)}
    assert -10 < best < 15
    assert {kind: value for kind, value in worse.items() if value >= best - 10} == {}
    assert worse["noise 0.05"] > worse["noise 0.1"] > worse["noise 0.2"]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("microaneurysms", ["noise 0.05"]),
        ("cell", ["blur 1", "noise 0.05", "noise 0.1"]),
        pytest.param("retina", ["noise 0.05"], marks=pytest.mark.slow),
    ],
)
def test_the_cases_known_to_fail(reward, name, kinds):
    clean = photograph(name)
    best = score(reward, as_tensor(clean))
    assert [kind for kind, copy in copies(clean) if score(reward, as_tensor(copy)) >= best] == kinds
    assert best < -45


def normalised(gray):
    """Equations 1 to 3, pixel by pixel."""
    height, width = gray.shape
    weight = [[math.exp(-(i * i + j * j) / (2 * (7 / 6) ** 2)) for j in range(-3, 4)] for i in range(-3, 4)]
    total = sum(map(sum, weight))
    answer = np.empty_like(gray)
    for y in range(height):
        for x in range(width):
            mean = square = 0.0
            for i in range(7):
                for j in range(7):
                    value = gray[min(max(y + i - 3, 0), height - 1), min(max(x + j - 3, 0), width - 1)]
                    mean += weight[i][j] / total * value
                    square += weight[i][j] / total * value * value
            answer[y, x] = (gray[y, x] - mean) / (math.sqrt(max(square - mean * mean, 0)) + 1 / 255)
    return answer


def fitted(values, beyond=0):
    """Shape, left and right deviation of the asymmetric generalised Gaussian, by search, ``beyond`` zeros added."""
    values = [0.0 if abs(v) < 1e-12 else v for v in values]
    negative, positive = [v for v in values if v < 0], [v for v in values if v > 0]
    zeros = len(values) - len(negative) - len(positive)
    left = math.sqrt(sum(v * v for v in negative) / (len(negative) + zeros / 2))
    right = math.sqrt(sum(v * v for v in positive) / (len(positive) + zeros / 2))
    values = [*values, *[0.0] * beyond]
    ratio = (sum(map(abs, values)) / len(values)) ** 2 / (sum(v * v for v in values) / len(values))
    g = left / right
    wanted = ratio * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
    shapes = [0.2 + 0.001 * k for k in range(9800)]
    rho = [math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) for a in shapes]
    return min(zip((abs(r - wanted) for r in rho), shapes))[1], left, right


def halved(gray):
    """Cubic convolution with a = -0.75 halfway between the pixels 2i and 2i + 1, edges repeated."""
    taps = ((-1, -3 / 32), (0, 19 / 32), (1, 19 / 32), (2, -3 / 32))
    for _ in range(2):
        n = len(gray)
        rows = [sum(w * gray[min(max(2 * i + k, 0), n - 1)] for k, w in taps) for i in range(n // 2)]
        gray = np.array(rows).T
    return gray


def expected_features(gray):
    answer = []
    for image in (gray, halved(gray)):
        x = normalised(image)
        height, width = x.shape
        shape, left, right = fitted(x.flatten().tolist())
        answer += [shape, (left**2 + right**2) / 2]
        for down, across in ((0, 1), (1, 0), (1, 1), (-1, 1)):
            products = [
                x[i, j] * x[i + down, j + across]
                for i in range(height)
                for j in range(width)
                if 0 <= i + down < height and j + across < width
            ]
            shape, left, right = fitted(products, height * width - len(products))
            mean = (right - left) * math.gamma(2 / shape) / math.sqrt(math.gamma(1 / shape) * math.gamma(3 / shape))
            answer += [shape, mean, left**2, right**2]
    return torch.tensor(answer, dtype=torch.float64)


def test_the_36_features_are_those_of_plain_loops():
    images = torch.stack([torch.from_numpy(data.camera()[y : y + 20, 200:226] / 255) for y in (100, 250)])
    images[1, :, :13] = 0.2  # a flat half
    expected = torch.stack([expected_features(image.numpy()) for image in images])
    torch.testing.assert_close(features(images), expected, rtol=0, atol=1e-9)


def test_the_fit_finds_shapes_and_variances_it_was_given():
    levels = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    half_normal = torch.distributions.HalfNormal(torch.tensor(1.0, dtype=torch.float64)).icdf(levels)
    lopsided = torch.cat([-half_normal[::2], 2 * half_normal])  # the density is continuous at 0: mass 1 : 2
    shape, left, right = fit(lopsided[None, None])
    torch.testing.assert_close(torch.cat([shape, left, right]).tolist(), [2.0, 1.0, 4.0], rtol=0, atol=2e-3)
    exponential = -torch.log1p(-levels)
    shape, left, right = fit(torch.cat([-exponential, exponential])[None, None])
    torch.testing.assert_close(torch.cat([shape, left, right]).tolist(), [1.0, 2.0, 2.0], rtol=0, atol=2e-3)


def test_luma_is_in_8_bit_levels():
    images = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [2, -1, 0.5]])[:, :, None, None]
    assert (luma(images) * 255).flatten().tolist() == pytest.approx([76, 150, 29, 255, 91])
    exact = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(luma((exact + 0.4) / 255), luma(exact / 255))


def test_the_regression_is_libsvms():
    regression = load_regression(data_folder())
    model = svm.libsvm.svm_load_model(str(data_folder() / "svm.txt").encode())
    generator = torch.Generator().manual_seed(0)
    scaled = torch.rand(20, 36, generator=generator, dtype=torch.float64) * 2.2 - 1.1
    expected = [svm.libsvm.svm_predict(model, svm.gen_svm_nodearray(row)[0]) for row in scaled.tolist()]
    given = regression.low + (scaled + 1) / 2 * (regression.high - regression.low)
    torch.testing.assert_close(regression(given).tolist(), expected, rtol=0, atol=1e-6)


def test_rounding_errors_are_not_contrast():
    levels = (torch.arange(256, dtype=torch.float64) / 255)[:, None, None].expand(256, 9, 9)
    assert not normalise(levels).any()
    checks = torch.arange(81, dtype=torch.float64).view(9, 9) % 2 / 255  # the least contrast that 8 bits have
    assert normalise(levels + checks).all()


@pytest.mark.parametrize("level", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("size", [(512, 512), (64, 64), (8, 8), (1, 1)])
def test_a_flat_image_is_worse_than_any_distorted_one(reward, level, size):
    assert score(reward, torch.full((1, 3, *size), level)).item() == pytest.approx(-123.1418, abs=1e-3)


def test_odd_and_tiny_images_have_a_finite_score(reward):
    generator = torch.Generator().manual_seed(0)
    for size in ((64, 64), (8, 8), (7, 9), (3, 2), (1, 5)):
        assert -160 < score(reward, torch.rand(1, 3, *size, generator=generator)).item() < 50
    dot, edge = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 3, 64, 64)
    dot[..., 5, 5], edge[..., 32:] = 0.51, 1
    scores = score(reward, torch.cat([dot, edge])).tolist()
    assert scores == pytest.approx([-123.2, -99.8], abs=0.1)
    assert check_reward(reward, image_size=64).tolist()[0] == pytest.approx(-123.1418, abs=1e-3)


def test_a_batch_scores_as_its_images_do(reward, monkeypatch):
    images = as_tensor(data.chelsea()).unfold(2, 64, 64).unfold(3, 64, 64)[0].flatten(1, 2).transpose(0, 1)
    together = score(reward, images)
    assert len(together) == 28
    torch.testing.assert_close(together, torch.cat([score(reward, image[None]) for image in images]))
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 3 * 64 * 64)
    torch.testing.assert_close(together, score(reward, images))
    assert not build_reward("brisque").differentiable


def test_the_package_is_neither_imported_nor_unpickled(reward, monkeypatch):
    import pickle

    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    score(build_reward("brisque"), torch.rand(1, 3, 8, 8))
    assert "brisque" not in sys.modules


def test_other_data_than_the_known_are_refused(tmp_path):
    for name in module.SHA256:
        (tmp_path / name).write_bytes((data_folder() / name).read_bytes())
    assert load_regression(tmp_path).vectors.shape == (770, 36)
    (tmp_path / "normalize.pickle").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(RewardError, match=r"is not the file of brisque 0\.2\.0: pip install 'brisque==0\.2\.0'"):
        load_regression(tmp_path)
