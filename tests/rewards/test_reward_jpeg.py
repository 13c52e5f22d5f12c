"""JPEG sizes against PIL called directly."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_align.rewards import build_reward, call_reward


def arrays():
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, 56).astype(np.uint8)[None, :, None], (40, 56, 3))
    flat = np.full((40, 56, 3), 130, dtype=np.uint8)
    return [flat, ramp, noise]


def pil_size(array, quality):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array), "RGB").save(buffer, format="JPEG", quality=quality)
    return len(buffer.getvalue()) / 1000


def as_tensor(arrays):
    return torch.stack([torch.from_numpy(np.array(a)).permute(2, 0, 1).float() / 255 for a in arrays])


@pytest.mark.parametrize("quality", [None, 50, 100])
@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_sizes_are_pils_and_both_signs(quality):
    spec = {} if quality is None else {"quality": quality}
    images, prompts, metadata = as_tensor(arrays()), [""] * 3, [{}] * 3
    expected = torch.tensor([pil_size(a, quality or 95) for a in arrays()])
    up = call_reward(build_reward({"name": "jpeg_incompressibility", **spec}), images, prompts, metadata)
    down = call_reward(build_reward({"name": "jpeg_compressibility", **spec}), images, prompts, metadata)
    torch.testing.assert_close(up, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(down, -expected, rtol=0, atol=1e-6)
    assert up[0] < up[1] < up[2]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 255), st.floats(-0.49, 0.49))
def test_pixels_are_rounded_not_truncated(level, offset):
    noise = np.random.default_rng(level).integers(0, 256, (16, 16, 3))
    exact = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    reward = build_reward("jpeg_compressibility")
    moved = call_reward(reward, ((exact + offset) / 255).clamp(0, 1), [""], [{}])
    assert torch.equal(moved, call_reward(reward, exact / 255, [""], [{}]))


def test_half_precision_and_values_outside_the_range():
    reward = build_reward("jpeg_compressibility")
    images = torch.full((2, 3, 16, 16), 0.5, dtype=torch.bfloat16)
    assert call_reward(reward, images, ["", ""], [{}, {}]).shape == (2,)
    white, beyond = torch.ones(1, 3, 16, 16), torch.full((1, 3, 16, 16), 1.2)
    assert torch.equal(call_reward(reward, white, [""], [{}]), call_reward(reward, beyond, [""], [{}]))
