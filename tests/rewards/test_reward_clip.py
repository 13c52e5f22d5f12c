"""CLIP embeddings and clip_score against PIL, numpy and the models called directly."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.nn import functional

from diffusion_align.assets import EMBEDDED_PIPELINES, asset_path
from diffusion_align.rewards import RewardError, build_reward, check_reward
from diffusion_align.rewards.image.clip import VIT_L_14, default_clip, load_clip, preprocess
from tests.helpers.rewarding import check_gradient, refusal, save_clip, save_open_clip, score

COLOURS = {
    "white": (255, 255, 255),
    "red": (226, 20, 51),
    "yellow": (243, 234, 70),
    "green": (44, 173, 67),
    "blue": (59, 118, 226),
    "purple": (142, 77, 205),
    "black": (20, 16, 30),
    "pink": (246, 170, 199),
}


def smiling_face(background, size=64):
    """A drawing no model made."""
    image = Image.new("RGB", (64, 64), background)
    pen = ImageDraw.Draw(image)
    pen.ellipse((8, 8, 56, 56), fill=(255, 200, 40))
    for left in (20, 38):
        pen.ellipse((left, 22, left + 6, 32), fill=(60, 40, 20))
    pen.arc((18, 22, 46, 48), 20, 160, fill=(60, 40, 20), width=3)
    return image.resize((size, size), Image.Resampling.BICUBIC)


def as_tensor(images):
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in images])


def faces():
    return as_tensor([smiling_face(colour) for colour in COLOURS.values()])


@pytest.fixture(scope="module")
def emoji():
    return build_reward("clip_score", model="emoji-sd")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random CLIPModel with its own mean and std, saved as transformers does (tokenizer beside the weights)."""
    folder = save_clip(tmp_path_factory.mktemp("tiny-clip"), projection=8)
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_emoji_clip_knows_the_background_of_a_hand_made_drawing(emoji):
    table = torch.stack([score(emoji, faces(), f"a smiling face on a {name} background") for name in COLOURS])
    assert table.argmax(0).tolist() == list(range(len(COLOURS)))
    assert (table.diagonal() > 0.4).all()
    assert table.abs().max() <= 1
    for wrong in ("a car", "a tree"):
        assert (score(emoji, faces(), "a smiling face") > score(emoji, faces(), wrong)).all()


def test_real_drawings_fit_their_own_caption_better_than_anothers(emoji):
    from diffusion_align.data.drawings import composite, load_drawing_pairs

    pairs = load_drawing_pairs("heldout")
    captions = [f"a {label}" for label, *_ in pairs]
    for side in (2, 3):
        drawings = torch.stack([composite(pair[side], (255, 255, 255)) for pair in pairs])
        right, wrong = score(emoji, drawings, captions), score(emoji, drawings, captions[1:] + captions[:1])
        assert (right > wrong).float().mean() > 0.95
        assert right.mean() > wrong.mean() + 0.4


def test_emoji_clip_equals_the_model_called_directly(emoji):
    from transformers import CLIPModel, CLIPTokenizer

    folder = asset_path("emoji-clip")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        "a smiling face on a red background", padding="max_length", max_length=24, return_tensors="pt"
    )
    pixels = np.stack([np.array(smiling_face(colour), dtype=np.float64) for colour in COLOURS.values()])
    pixels = torch.from_numpy((pixels / 127.5 - 1).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        output = model(pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    expected = output.logits_per_image[:, 0] / model.logit_scale.exp()
    actual = score(emoji, faces(), "a smiling face on a red background")
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=2e-6)


def test_scores_do_not_depend_on_the_batch(emoji):
    images, prompts = faces(), [f"a {name} heart" for name in COLOURS]
    together = score(emoji, images, prompts)
    assert torch.equal(together, score(emoji, images, prompts))
    alone = torch.cat([score(emoji, images[i : i + 1], prompts[i : i + 1]) for i in range(len(images))])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    mixed = score(emoji, images[order], [prompts[i] for i in order])
    torch.testing.assert_close(mixed, together[order], rtol=0, atol=2e-6)
    small = build_reward({"name": "clip_score", "batch_size": 3}, model="emoji-sd")
    torch.testing.assert_close(score(small, images, prompts), together, rtol=0, atol=2e-6)


def test_repeated_and_very_long_prompts(emoji):
    prompts = ["a dog", "a cat", "a dog", "a cat", "a dog", "a dog", "a cat", ""]
    repeated = score(emoji, faces(), prompts)
    single = torch.stack([score(emoji, faces(), p)[i] for i, p in enumerate(prompts)])
    torch.testing.assert_close(repeated, single, rtol=0, atol=2e-6)
    assert torch.isfinite(score(emoji, faces(), "a smiling face " * 50)).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (20, 20), (47, 33), (50, 32), (32, 32)])
def test_preprocessing_is_pils_bicubic_resize_and_a_centre_crop(height, width):
    size, mean, std = 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    short = min(height, width)
    target = (size * width // short, size * height // short)
    top, left = round((target[1] - size) / 2), round((target[0] - size) / 2)
    for image, result in zip(images, preprocess(images, size, mean, std), strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[channel].numpy()).resize(target, Image.Resampling.BICUBIC)
            plane = np.clip(np.array(plane), 0, 1)[top : top + size, left : left + size]
            np.testing.assert_allclose(result[channel], (plane - mean[channel]) / std[channel], atol=1e-5)


def test_a_transformers_folder_with_its_own_mean_and_std(tiny):
    from transformers import AutoTokenizer, CLIPModel

    reward = build_reward({"name": "clip_score", "clip": str(tiny)}, model="emoji-sd")
    images, prompts = faces()[:, :, 16:48, 16:48], [f"a {name} face" for name in COLOURS]
    model, tokenizer = CLIPModel.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    with torch.no_grad():
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        output = model(pixel_values=(images - mean) / std, **tokens)
    expected = functional.cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(score(reward, images, prompts), expected.detach(), rtol=0, atol=2e-6)
    assert check_reward(reward, image_size=(40, 50)).shape == (3,)


def test_older_transformers_return_a_bare_tensor(tiny, emoji):
    from diffusion_align.rewards.image.clip import _pooled

    value = torch.ones(2, 3)
    assert _pooled(value) is value


def test_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="needs diffusion-align[open-clip]")
    save_open_clip("tiny-for-tests", tmp_path, layers=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _, transform = open_clip.create_model_and_transforms("tiny-for-tests")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    reward = build_reward({"name": "clip_score", "clip": f"open_clip:tiny-for-tests/{tmp_path / 'weights.pt'}"})
    images = [smiling_face(colour, 32) for colour in COLOURS.values()]
    prompts = [f"a {name} face" for name in COLOURS]
    with torch.no_grad():
        texts = model.eval().encode_text(open_clip.get_tokenizer("tiny-for-tests")(prompts))
        expected = functional.cosine_similarity(model.encode_image(torch.stack([transform(p) for p in images])), texts)
    torch.testing.assert_close(score(reward, as_tensor(images), prompts), expected, rtol=0, atol=2e-6)
    with pytest.raises(RewardError, match="'open_clip:no-such-model/x' could not be loaded"):
        build_reward({"name": "clip_score", "clip": "open_clip:no-such-model/x"})


def test_open_clip_weights_are_used_as_they_were_trained(tmp_path, monkeypatch):
    """OpenAI's tags mean QuickGELU and SigLIP's another resize, neither of which the architecture's name says."""
    open_clip = pytest.importorskip("open_clip", reason="needs diffusion-align[open-clip]")
    config = save_open_clip("quick-for-tests", tmp_path, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = open_clip.CLIP(**config, quick_gelu=True).eval()
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    tag = {"url": "x", "quick_gelu": True, "mean": [0.5] * 3, "std": [0.25] * 3}
    tags = {"mine": tag | {"interpolation": "bilinear", "resize_mode": "squash"}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "quick-for-tests", tags)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    encoder = load_clip("open_clip:quick-for-tests/mine")
    with torch.no_grad():
        square, wide = faces()[:2, :, :32, :32], faces()[:2, :, :20]
        for images in (square, functional.interpolate(wide, size=(32, 32), mode="bilinear", antialias=True)):
            seen = trained.encode_image((images - 0.5) / 0.25)
            given = square if images is square else wide
            torch.testing.assert_close(encoder.embed_images(given), functional.normalize(seen, dim=-1))


def test_gradients_flow_to_the_pixels_and_to_nothing_else(emoji):
    images = faces()[:2] * 0.5 + 0.25  # away from 0 and 1, where the resize clamps
    images = functional.interpolate(images, size=(96, 80), mode="bilinear")
    prompts = ["a dog", "a smiling face"]
    check_gradient(emoji, images, prompts, step=0.01, rtol=0.02)
    assert all(parameter.grad is None for parameter in emoji.encoder.module.parameters())
    assert not score(emoji, images.requires_grad_(), prompts).requires_grad


def test_the_model_chooses_the_clip():
    for name in EMBEDDED_PIPELINES:
        assert default_clip(name) == default_clip(str(asset_path(name))) == "emoji-clip"
    assert default_clip("stabilityai/stable-diffusion-2-1") == default_clip(None) == VIT_L_14


def test_rewards_that_ask_for_the_same_clip_share_it(emoji):
    assert build_reward("clip_score", model="emoji-sd").encoder is emoji.encoder
    assert build_reward({"name": "clip_score", "clip": "emoji-clip"}).encoder is emoji.encoder


def test_building_leaves_the_global_rng_alone(tiny, tmp_path):
    before = torch.get_rng_state()
    load_clip(str(tiny))
    assert torch.equal(before, torch.get_rng_state())


def test_folders_that_hold_no_clip_are_refused(tiny, tmp_path):
    def problem(folder):
        return refusal(build_reward, {"name": "clip_score", "clip": str(folder)})

    assert "could not be loaded" in problem(tmp_path)
    assert "holds a model of type 'clip_text_model'" in problem(asset_path("emoji-sd") / "text_encoder")

    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    weights = load_file(tiny / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights (visual_projection.weight" in problem(tmp_path)


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    import transformers

    def offline(*args, **options):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(RewardError, match=r"clip='openai/clip-vit-large-patch14' could not be loaded \(OSError: We"):
        build_reward("clip_score", model="stable-diffusion-v1-5/stable-diffusion-v1-5")


def test_the_hub_out_of_reach_is_one_clause_of_the_sentence(monkeypatch):
    import transformers
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **options):
        raise OSError("We couldn't connect to the Hub. Check it.") from LocalEntryNotFoundError("Not there. Try again.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    said = refusal(build_reward, {"name": "clip_score", "clip": "a/b"})
    assert said.startswith("clip='a/b' could not be loaded (it is not in the cache and the Hub is out of reach")
