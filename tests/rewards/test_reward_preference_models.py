"""pick_score and hps_v2 on tiny random networks, against PIL and the networks called directly."""

import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from diffusion_align.rewards import RewardError, build_reward, check_reward
from diffusion_align.rewards.image import hps_v2 as hps
from diffusion_align.rewards.image import pick_score as pick
from diffusion_align.rewards.image.clip import CLIP_MEAN, CLIP_STD, load_transformers
from diffusion_align.rewards.image.clip_score import ClipScore
from tests.helpers.rewarding import PROMPTS, check_gradient, refusal, save_clip, save_open_clip, smooth_images
from tests.helpers.rewarding import score as score_of

SIZE, LOGIT_SCALE = 32, 3.9


def score(reward, images):
    return score_of(reward, images, PROMPTS)


def fitted(image, fit, rounded):
    """One PIL image as the network's input by PIL alone: resized in 8 bits if ``rounded``, else in floats."""
    resize, box, offset = {"crop": cropped, "pad": padded}[fit](image)
    planes = []
    for plane in image.split():
        plane = plane if rounded else Image.fromarray(np.asarray(plane, dtype=np.float32))
        canvas = np.zeros((SIZE, SIZE))
        part = np.asarray(plane.resize(resize, Image.Resampling.BICUBIC), dtype=np.float64) / 255
        part = part.clip(0, 1) if fit == "crop" else part
        part = part[box[1] : box[1] + SIZE, box[0] : box[0] + SIZE]
        canvas[offset[1] : offset[1] + part.shape[0], offset[0] : offset[0] + part.shape[1]] = part
        planes.append(canvas)
    return (torch.tensor(np.stack(planes)) - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(
        3, 1, 1
    )


def cropped(image):
    """(width, height), the corner of the crop, and where it lies: the shorter side fits."""
    width, height = (side * SIZE // min(image.size) for side in image.size)
    return (width, height), (round((width - SIZE) / 2), round((height - SIZE) / 2)), (0, 0)


def padded(image):
    """The longer side fits."""
    width, height = (round(side * SIZE / max(image.size)) for side in image.size)
    return (width, height), (0, 0), ((SIZE - width) // 2, (SIZE - height) // 2)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIPModel with its tokenizer and a scale of its own."""
    folder = tmp_path_factory.mktemp("tiny-pick")
    return save_clip(folder, projection=8, layers=2, length=24, logit_scale_init_value=LOGIT_SCALE)


@pytest.fixture(scope="module")
def hps_files(tmp_path_factory):
    """A tiny architecture known to open_clip, and its random weights as the authors publish theirs."""
    import open_clip

    folder = tmp_path_factory.mktemp("tiny-hps")
    config = save_open_clip("tiny-hps", folder, layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.CLIP(**config)
        state = {key: value.half() for key, value in network.state_dict().items()}  # "compressed"
    torch.save({"epoch": 3, "name": "x", "state_dict": state}, folder / "weights.pt")
    save_file(state, folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def picker(clip_folder):
    return build_reward({"name": "pick_score", "clip": str(clip_folder)})


def hps_spec(folder, **options):
    return {"name": "hps_v2", "architecture": "tiny-hps", "weights": str(folder / "weights.pt"), **options}


@pytest.fixture(scope="module")
def preferrer(hps_files):
    return build_reward(hps_spec(hps_files))


def pick_score_by_hand(folder, inputs):
    """exp(logit_scale) times the cosine, in float64."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).double().eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        output = model(pixel_values=inputs.double(), **tokenizer(PROMPTS, padding=True, return_tensors="pt"))
    cosine = functional.cosine_similarity(output.image_embeds, output.text_embeds)
    return math.exp(LOGIT_SCALE) * cosine


def hps_by_hand(folder, inputs):
    """The cosine, in float64, with the weights read by open_clip itself."""
    import open_clip

    model = open_clip.create_model("tiny-hps", pretrained=str(folder / "weights.pt")).double().eval()
    tokens = open_clip.get_tokenizer("tiny-hps")(PROMPTS)
    with torch.no_grad():
        return functional.cosine_similarity(model.encode_image(inputs.double()), model.encode_text(tokens))


SHAPES = [(32, 32), (64, 64), (48, 80), (77, 40), (20, 26)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_pick_score_is_the_scaled_cosine(height, width, picker, clip_folder):
    drawn, images = smooth_images(height, width)
    expected = pick_score_by_hand(clip_folder, torch.stack([fitted(p, "crop", rounded=False) for p in drawn]))
    assert expected.std() > 1
    torch.testing.assert_close(score(picker, images).double(), expected, rtol=0, atol=2e-4)
    in_8_bits = pick_score_by_hand(clip_folder, torch.stack([fitted(p, "crop", rounded=True) for p in drawn]))
    assert (in_8_bits - expected).abs().max() < 0.02 * expected.std()  # what rounding after the resize amounts to


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_hps_is_the_cosine_of_an_image_with_borders(height, width, preferrer, hps_files):
    drawn, images = smooth_images(height, width)
    expected = hps_by_hand(hps_files, torch.stack([fitted(p, "pad", rounded=False) for p in drawn]))
    torch.testing.assert_close(score(preferrer, images).double(), expected, rtol=0, atol=5e-6)
    in_8_bits = hps_by_hand(hps_files, torch.stack([fitted(p, "pad", rounded=True) for p in drawn]))
    assert (in_8_bits - expected).abs().max() < 0.02 * expected.std()
    if height != width:
        crop = hps_by_hand(hps_files, torch.stack([fitted(p, "crop", rounded=False) for p in drawn]))
        assert (crop - expected).abs().max() > 1e-3  # the borders count


@pytest.mark.parametrize("name", ["picker", "preferrer"])
def test_scores_do_not_depend_on_the_batch(name, request, clip_folder, hps_files):
    reward, (_, images) = request.getfixturevalue(name), smooth_images(40, 48)
    spec = {"name": "pick_score", "clip": str(clip_folder)} if name == "picker" else hps_spec(hps_files)
    small = build_reward({**spec, "batch_size": 3})
    assert small.batch_size == 3
    assert small.encoder is reward.encoder
    torch.testing.assert_close(score(small, images), score(reward, images), rtol=0, atol=2e-4)
    assert torch.equal(score(reward, images), score(reward, images))
    assert check_reward(reward, image_size=(40, 56)).shape == (3,)


@pytest.mark.parametrize("name", ["picker", "preferrer"])
def test_gradients_flow_to_the_pixels_and_to_nothing_else(name, request):
    reward = request.getfixturevalue(name)
    check_gradient(reward, smooth_images(48, 40)[1] * 0.5 + 0.25, PROMPTS, step=0.05, rtol=0.02)
    assert all(parameter.grad is None for parameter in reward.encoder.module.parameters())


def test_half_precision_changes_the_scores_little_and_the_scale_not_at_all(picker, preferrer, clip_folder, hps_files):
    _, images = smooth_images()
    encoder = load_transformers(str(clip_folder), torch.device("cpu"), torch.bfloat16)
    assert next(encoder.module.parameters()).dtype == torch.bfloat16
    assert encoder.scale == picker.encoder.scale == pytest.approx(math.exp(LOGIT_SCALE), rel=1e-6)
    difference = score(ClipScore(encoder, scale=encoder.scale), images) - score(picker, images)
    assert 0 < difference.abs().max() < 0.1 * score(picker, images).std()
    encoder = hps.load_hps(hps_files / "weights.pt", "tiny-hps", torch.device("cpu"), torch.bfloat16)
    difference = score(ClipScore(encoder), images) - score(preferrer, images)
    assert 0 < difference.abs().max() < 0.1 * score(preferrer, images).std()


def test_a_pick_score_folder_without_a_tokenizer_borrows_one(picker, clip_folder, tmp_path, monkeypatch):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path / name)
    spec = {"name": "pick_score", "clip": str(tmp_path)}
    assert "comes without a tokenizer, and the tokenizer of 'laion/CLIP-ViT-H-14" in refusal(build_reward, spec)
    monkeypatch.setattr(pick, "VIT_H_14", str(clip_folder))
    _, images = smooth_images()
    assert torch.equal(score(build_reward(spec), images), score(picker, images))


def test_clip_score_refuses_a_folder_without_a_tokenizer(clip_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, tmp_path / name)
    with pytest.raises(RewardError, match="has 2 tokens, not 3538: give a folder"):
        build_reward({"name": "clip_score", "clip": str(tmp_path)})


def test_safetensors_weights_are_the_same(preferrer, hps_files):
    other = build_reward(hps_spec(hps_files, weights=str(hps_files / "weights.safetensors")))
    assert torch.equal(score(other, smooth_images()[1]), score(preferrer, smooth_images()[1]))


@pytest.mark.parametrize("version", ["v2.1", "v2"])
def test_the_version_names_the_file_to_download(version, preferrer, hps_files, monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(hps_files / "weights.pt")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    reward = build_reward({"name": "hps_v2", "architecture": "tiny-hps", "version": version})
    assert asked == [("xswu/HPSv2", {"v2.1": "HPS_v2.1_compressed.pt", "v2": "HPS_v2_compressed.pt"}[version])]
    assert torch.equal(score(reward, smooth_images()[1]), score(preferrer, smooth_images()[1]))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"name": "pick_score"}, "clip='yuvalkirstain/PickScore_v1' could not be loaded"),
        ({"name": "hps_v2"}, r"HPS_v2.1_compressed.pt could not be downloaded from xswu/HPSv2 \(.*local file"),
    ],
)
def test_offline_one_sentence_names_the_repository(spec, sentence):
    assert re.search(sentence, refusal(build_reward, spec))


def test_an_architecture_that_open_clip_does_not_know(hps_files):
    with pytest.raises(RewardError, match="architecture='ViT-Q-99' is not known to open_clip"):
        build_reward(hps_spec(hps_files, architecture="ViT-Q-99"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda state: {}, "holds no tensors"),
        (lambda state: {"state_dict": {"x": 1.0}}, "holds no tensors"),
        (lambda state: {k: v for k, v in state.items() if k != "visual.proj"}, r"lacks 'visual.proj': give the pub"),
        (lambda state: {k: v for k, v in state.items() if "proj" not in k}, r"\(and \d+ more faults\): give"),
        (lambda state: {**state, "visual.proj": torch.zeros(4, 4)}, r"'visual.proj' of shape \(4, 4\) instead of \(32"),
        (lambda state: {**state, "visual.more": torch.zeros(4)}, "has 'visual.more', which the network does not have"),
        (lambda state: b"not a file of tensors", r"is not a file of tensors \(UnpicklingError"),
        (lambda state: b"", r"is not a file of tensors \(EOFError"),
        (lambda state: torch.zeros(3), r"is not a file of tensors \(AttributeError"),
        (lambda state: {"x": ClipScore}, r"is not a file of tensors \(UnpicklingError"),
    ],
)
def test_files_that_hold_no_hps_weights_are_refused(damage, sentence, hps_files, tmp_path):
    content = damage(torch.load(hps_files / "weights.pt", weights_only=True)["state_dict"])
    path = tmp_path / "weights.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert re.search(sentence, refusal(build_reward, hps_spec(hps_files, weights=str(path))))


def test_building_leaves_the_global_rng_alone(hps_files):
    before = torch.get_rng_state()
    hps.load_hps(hps_files / "weights.pt", "tiny-hps", torch.device("cpu"), torch.float32)
    assert torch.equal(before, torch.get_rng_state())
