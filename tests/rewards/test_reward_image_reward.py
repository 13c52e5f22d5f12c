"""image_reward on random weights in the published format, against the same networks written out in float64.

What is written out follows BLIP's own description, not transformers: the ViT of timm (one matrix for query, key and
value; norms before) and a BERT with cross-attention (norms after).
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusion_align.rewards import build_reward, call_reward, check_reward
from diffusion_align.rewards.image.clip import CLIP_MEAN, CLIP_STD
from diffusion_align.rewards.image.image_reward import ImageReward, load_image_reward
from tests.helpers.rewarding import check_gradient, refusal, smooth_images
from tests.helpers.rewarding import score as score_of

SIZE, PATCH, VISION, TEXT, DEPTH = 32, 8, 192, 128, 2
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "red", "apple", "two", "dogs", "on", "beach", "lake", "at", "dawn", "mountain", "photograph", "of"]
PROMPTS = ["a red apple", "two dogs on a beach", "", "a photograph of a mountain lake at dawn " * 6]
LIMIT = 35


def random_state():
    """Weights under the published names, large enough that every part of the network moves the score."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def tensor(name, *shape, std):
        state[name] = torch.randn(*shape, generator=generator) * std

    def linear(name, out, into):
        tensor(f"{name}.weight", out, into, std=1 / math.sqrt(into))
        tensor(f"{name}.bias", out, std=0.1)

    def norm(name, width):
        tensor(f"{name}.weight", width, std=0.3)
        state[f"{name}.weight"] += 1
        tensor(f"{name}.bias", width, std=0.2)

    eye, words = "blip.visual_encoder", "blip.text_encoder"
    tensor(f"{eye}.cls_token", 1, 1, VISION, std=1)
    tensor(f"{eye}.pos_embed", 1, (SIZE // PATCH) ** 2 + 1, VISION, std=1)
    tensor(f"{eye}.patch_embed.proj.weight", VISION, 3, PATCH, PATCH, std=0.2)
    tensor(f"{eye}.patch_embed.proj.bias", VISION, std=0.1)
    for i in range(DEPTH):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", VISION)
        linear(f"{block}.attn.qkv", 3 * VISION, VISION)
        linear(f"{block}.attn.proj", VISION, VISION)
        norm(f"{block}.norm2", VISION)
        linear(f"{block}.mlp.fc1", 80, VISION)
        linear(f"{block}.mlp.fc2", VISION, 80)
    norm(f"{eye}.norm", VISION)
    state[f"{words}.embeddings.position_ids"] = torch.arange(40).expand(1, -1)
    tensor(f"{words}.embeddings.word_embeddings.weight", len(SPECIAL + WORDS) + 2, TEXT, std=1)
    tensor(f"{words}.embeddings.position_embeddings.weight", 40, TEXT, std=0.5)
    norm(f"{words}.embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        layer = f"{words}.encoder.layer.{i}"
        for attention, source in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}.{attention}.self.query", TEXT, TEXT)
            linear(f"{layer}.{attention}.self.key", TEXT, source)
            linear(f"{layer}.{attention}.self.value", TEXT, source)
            linear(f"{layer}.{attention}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 96, TEXT)
        linear(f"{layer}.output.dense", TEXT, 96)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 16, VISION)  # of BLIP's training; no part of the score
    linear("blip.text_proj", 16, TEXT)
    for number, out, into in ((0, 1024, TEXT), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        linear(f"mlp.layers.{number}", out, into)
    return state


def apply(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def normed(state, name, x, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(query, key, value):
    """Of one sequence each, (N, W); heads of 64."""
    parts = []
    for start in range(0, query.shape[1], 64):
        q, k, v = (x[:, start : start + 64] for x in (query, key, value))
        parts.append((q @ k.T / 8).softmax(dim=-1) @ v)
    return torch.cat(parts, dim=1)


def score_by_hand(state, inputs, prompt):
    """The score of one image, (3, 32, 32) normalised float64, for one prompt; nothing is padded."""
    eye, words = "blip.visual_encoder", "blip.text_encoder"
    kernel = state[f"{eye}.patch_embed.proj.weight"].flatten(1)
    squares = [
        inputs[:, top : top + PATCH, left : left + PATCH].flatten()
        for top in range(0, SIZE, PATCH)
        for left in range(0, SIZE, PATCH)
    ]
    x = torch.stack(squares) @ kernel.T + state[f"{eye}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{eye}.cls_token"][0], x]) + state[f"{eye}.pos_embed"][0]
    for i in range(DEPTH):
        block = f"{eye}.blocks.{i}"
        qkv = apply(state, f"{block}.attn.qkv", normed(state, f"{block}.norm1", x, 1e-6))
        x = x + apply(state, f"{block}.attn.proj", attend(*qkv.chunk(3, dim=-1)))
        hidden = apply(state, f"{block}.mlp.fc1", normed(state, f"{block}.norm2", x, 1e-6))
        x = x + apply(state, f"{block}.mlp.fc2", gelu(hidden))
    x = normed(state, f"{eye}.norm", x, 1e-6)

    ids = [(SPECIAL + WORDS).index(word) for word in ["[CLS]", *prompt.split()[: LIMIT - 2], "[SEP]"]]
    t = state[f"{words}.embeddings.word_embeddings.weight"][ids]
    t = t + state[f"{words}.embeddings.position_embeddings.weight"][: len(ids)]
    t = normed(state, f"{words}.embeddings.LayerNorm", t, 1e-12)
    for i in range(DEPTH):
        layer = f"{words}.encoder.layer.{i}"
        for attention, source in (("attention", None), ("crossattention", x)):
            name = f"{layer}.{attention}"
            source = t if source is None else source
            key, value = (apply(state, f"{name}.self.{part}", source) for part in ("key", "value"))
            answer = apply(state, f"{name}.output.dense", attend(apply(state, f"{name}.self.query", t), key, value))
            t = normed(state, f"{name}.output.LayerNorm", answer + t, 1e-12)
        hidden = gelu(apply(state, f"{layer}.intermediate.dense", t))
        t = normed(state, f"{layer}.output.LayerNorm", apply(state, f"{layer}.output.dense", hidden) + t, 1e-12)
    score = t[0]
    for number in (0, 2, 4, 6, 7):
        score = apply(state, f"mlp.layers.{number}", score)
    return (score[0] - 0.16717362830052426) / 1.0333394966054072


def normalised(x):
    return (x - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def score(reward, images, **options):
    return score_of(reward, images, PROMPTS, **options)


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def exact(state):
    return {name: value.double() for name, value in state.items()}


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """Weights as published, and a BERT tokenizer of a few words."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("image-reward")
    torch.save(state, folder / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(SPECIAL + WORDS)}).save_pretrained(folder / "words")
    return folder


def spec(folder, **options):
    return {
        "name": "image_reward",
        "weights": str(folder / "ImageReward.pt"),
        "tokenizer": str(folder / "words"),
        **options,
    }


@pytest.fixture(scope="module")
def reward(folder):
    return build_reward(spec(folder))


def test_the_score_and_its_gradient_are_those_of_the_networks_written_out(reward, exact):
    images = smooth_images()[1]
    pixels = images.double().requires_grad_()
    expected = torch.stack([score_by_hand(exact, normalised(x), p) for x, p in zip(pixels, PROMPTS)])
    assert expected.std() > 0.1
    torch.testing.assert_close(score(reward, images).double(), expected.detach(), rtol=0, atol=1e-5)

    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), pixels)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad((weights * score(reward, images, differentiable=True)).sum(), images)
    assert (gradient - expected_gradient).norm() < 1e-4 * expected_gradient.norm()
    for part in (reward.vision, reward.text, reward.head):
        assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (77, 40), (20, 26)])
def test_images_are_resized_and_cropped_as_pil_does(height, width, reward, exact):
    drawn, images = smooth_images(height, width)
    width, height = (side * SIZE // min(width, height) for side in (width, height))
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)

    def by_pil(image, kind):
        planes = [Image.fromarray(np.asarray(plane).astype(kind)) for plane in image.split()]
        planes = [np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)) / 255.0 for plane in planes]
        return torch.tensor(np.stack(planes).clip(0, 1)[:, top : top + SIZE, left : left + SIZE]).double()

    expected, in_8_bits = (
        torch.stack([score_by_hand(exact, normalised(by_pil(x, kind)), p) for x, p in zip(drawn, PROMPTS)])
        for kind in (np.float32, np.uint8)
    )
    torch.testing.assert_close(score(reward, images).double(), expected, rtol=0, atol=2e-5)
    assert (in_8_bits - expected).abs().max() < 0.05 * expected.std()  # what rounding after the resize amounts to


def test_finite_differences(reward):
    check_gradient(reward, smooth_images(48, 40)[1] * 0.5 + 0.25, PROMPTS, step=0.02, rtol=0.02)


def test_scores_do_not_depend_on_the_batch(reward, folder):
    images = smooth_images(40, 48)[1]
    together = score(reward, images)
    assert torch.equal(together, score(reward, images))
    torch.testing.assert_close(score(build_reward(spec(folder, batch_size=3)), images), together, rtol=0, atol=1e-5)
    alone = torch.cat([call_reward(reward, images[i : i + 1], [PROMPTS[i]], [{}]) for i in range(4)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    assert check_reward(reward, image_size=(40, 56)).shape == (3,)


def test_prompts_lose_what_is_beyond_35_tokens(reward):
    images = smooth_images()[1][:1]
    words = (WORDS * 4)[:50]

    def scored(prompt):
        return call_reward(reward, images, [" ".join(prompt)], [{}])

    assert torch.equal(scored(words), scored(words[:33]))
    assert not torch.equal(scored(words[:32]), scored(words[:33]))


def test_half_precision_changes_the_scores_little(reward, folder):
    vision, text, head = load_image_reward(folder / "ImageReward.pt")
    half = ImageReward(vision.bfloat16(), text.bfloat16(), head, reward.tokenizer)
    difference = score(half, smooth_images()[1]) - score(reward, smooth_images()[1])
    assert 0 < difference.abs().max() < 0.1 * score(reward, smooth_images()[1]).std()


def test_safetensors_weights_are_the_same(reward, state, folder, tmp_path):
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "w.safetensors")
    other = build_reward(spec(folder, weights=str(tmp_path / "w.safetensors")))
    assert torch.equal(score(other, smooth_images()[1]), score(reward, smooth_images()[1]))


def test_building_leaves_the_global_rng_alone(folder):
    before = torch.get_rng_state()
    load_image_reward(folder / "ImageReward.pt")
    assert torch.equal(before, torch.get_rng_state())


def test_the_published_file_is_asked_for_and_offline_one_sentence_says_so(folder, monkeypatch):
    assert "ImageReward.pt could not be downloaded from zai-org/ImageReward" in refusal(build_reward, "image_reward")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: str(folder / file))
    assert "the tokenizer of 'google-bert/bert-base-uncased' could not be loaded" in refusal(
        build_reward, "image_reward"
    )


def test_a_tokenizer_of_another_network_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 20}))
    assert "the tokenizer of " in refusal(build_reward, spec(folder, tokenizer=str(tmp_path)))


EYE, BERT = "blip.visual_encoder", "blip.text_encoder"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({f"{EYE}.patch_embed.proj.weight": None}, f"lacks '{EYE}.patch_embed.proj.weight': give the published file"),
        ({f"{EYE}.blocks.1.attn.qkv.bias": None}, f"lacks '{EYE}.blocks.1.attn.qkv.bias': give"),
        ({f"{BERT}.encoder.layer.0.crossattention.self.key.bias": None}, "lacks 'blip.text_encoder.encoder.layer.0.cr"),
        ({"mlp.layers.6.weight": None}, "lacks 'mlp.layers.6.weight'"),
        ({f"{EYE}.pos_embed": torch.zeros(1, 16, VISION)}, "position embeddings for 15 patches, which is not a square"),
        ({f"{EYE}.pos_embed": torch.zeros(17, VISION)}, r"of shape \(17, 192\) where 3 dimensions are expected"),
        ({f"{EYE}.norm.weight": torch.zeros(VISION + 1)}, r"norm.weight' of shape \(193,\) instead of \(192,\)"),
        ({f"{EYE}.patch_embed.proj.weight": torch.zeros(100, 3, 8, 8)}, "has a network 100 wide, which is no multiple"),
        ({f"{BERT}.embeddings.word_embeddings.weight": torch.zeros(20, 70)}, "has a network 70 wide"),
        ({"mlp.layers.0.weight": torch.zeros(1024, 64)}, r"of shape \(1024, 64\) instead of \(1024, 128\)"),
    ],
)
def test_files_that_hold_no_image_reward_are_refused(change, sentence, state, folder, tmp_path):
    damaged = {name: value for name, value in (state | change).items() if value is not None}
    torch.save(damaged, tmp_path / "w.pt")
    assert re.search(sentence, refusal(build_reward, spec(folder, weights=str(tmp_path / "w.pt"))))


@pytest.mark.parametrize("content", [b"not a file of tensors", b"", ImageReward], ids=["bytes", "empty", "a pickle"])
def test_files_that_hold_no_tensors_are_refused(content, folder, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save({"x": content}, path)
    assert "is not a file of tensors" in refusal(build_reward, spec(folder, weights=str(path)))
