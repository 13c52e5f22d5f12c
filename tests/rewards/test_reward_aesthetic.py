"""The LAION heads on their authors' rating embeddings, the embedded head, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_align.assets import asset_path
from diffusion_align.rewards import RewardError, build_reward, check_reward
from diffusion_align.rewards.image import aesthetic as module
from diffusion_align.rewards.image.aesthetic import Aesthetic, load_head
from tests.helpers.rewarding import check_gradient, levels, refusal, save_clip, score

HEADS = Path(__file__).resolve().parents[3] / "shared" / "data" / "aesthetic"
V2, V1 = HEADS / "sac+logos+ava1-l14-linearMSE.pth", HEADS / "sa_0_4_vit_l_14_linear.pth"
published = pytest.mark.skipif(not HEADS.is_dir(), reason="the published heads are not in ../shared/data/aesthetic")


def ratings(tower):
    files = [HEADS / f"vit_{tower}_embeddings_rating{bucket}.npy" for bucket in range(10)]
    return torch.from_numpy(np.stack([np.load(file).reshape(-1) for file in files]).astype(np.float32))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random CLIP with ViT-L/14's 768 dimensions and nothing else of it."""
    return str(save_clip(tmp_path_factory.mktemp("clip-768"), projection=768))


@published
@pytest.mark.parametrize(
    ("file", "tower", "low", "high"),
    [("sa_0_4_vit_l_14_linear.pth", "l_14", -2.46, 11.30), ("sa_0_4_vit_b_32_linear.pth", "b_32", -1.47, 11.01)],
)
def test_v1_rises_over_the_ten_rating_buckets(file, tower, low, high):
    scores = load_head(HEADS / file)(ratings(tower)).squeeze(-1)
    assert (scores.diff() > 0).all()
    torch.testing.assert_close(scores[[0, -1]], torch.tensor([low, high]), rtol=0, atol=0.005)


@published
def test_v2_over_the_ten_rating_buckets():
    scores = load_head(V2)(ratings("l_14")).squeeze(-1)
    torch.testing.assert_close(scores[[0, -1]], torch.tensor([1.66, 5.75]), rtol=0, atol=0.005)
    state = torch.load(V2, weights_only=True, map_location="cpu")
    expected = ratings("l_14").double()
    for number in (0, 2, 4, 6, 7):
        expected = expected @ state[f"layers.{number}.weight"].double().T + state[f"layers.{number}.bias"].double()
    torch.testing.assert_close(scores.double(), expected.squeeze(-1), rtol=0, atol=1e-5)


@published
def test_the_relu_variant_is_recognised_by_its_numbering():
    file = HEADS / "ava+logos-l14-reluMSE.pth"
    state = torch.load(file, weights_only=True, map_location="cpu")
    expected = ratings("l_14").double()
    for number in (0, 3, 6, 9, 11):
        expected = expected @ state[f"layers.{number}.weight"].double().T + state[f"layers.{number}.bias"].double()
        expected = expected.relu() if number != 11 else expected
    actual = load_head(file)(ratings("l_14"))
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
    assert not any(isinstance(layer, nn.ReLU) for layer in load_head(V2))


@published
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_the_whole_reward_with_a_local_head(variant, tiny):
    head = {"v1": V1, "v2": V2}[variant]
    reward = build_reward({"name": "aesthetic", "variant": variant, "head": str(head), "clip": tiny})
    embeddings = reward.encoder.embed_images(levels(3, 32))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(score(reward, levels(3, 32)), load_head(head)(embeddings).squeeze(-1).detach())
    assert check_reward(reward, image_size=48).shape == (3,)


@published
def test_gradients_flow_to_the_pixels(tiny):
    reward = build_reward({"name": "aesthetic", "head": str(V2), "clip": tiny})
    check_gradient(reward, levels(3, 32), step=0.05, rtol=0.05)
    assert all(parameter.grad is None for parameter in reward.head.parameters())


@published
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_download_is_compared_with_the_authors_file(variant, tiny, monkeypatch, tmp_path):
    spec = {"name": "aesthetic", "variant": variant, "clip": tiny}
    for source, accepted in (({"v1": V1, "v2": V2}[variant], True), (HEADS / "sa_0_4_vit_b_32_linear.pth", False)):
        folder = tmp_path / str(accepted)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file, source=source: str(source))
        monkeypatch.setattr(torch.hub, "get_dir", lambda folder=folder: str(folder))
        monkeypatch.setattr(
            torch.hub,
            "download_url_to_file",
            lambda url, to, progress, source=source: Path(to).write_bytes(source.read_bytes()),
        )
        if accepted:
            assert build_reward(spec).head[0].in_features == 768
        else:
            with pytest.raises(RewardError, match=f"is not the published aesthetic head '{variant}': delete it"):
                build_reward(spec)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_offline_the_sentence_says_what_to_do_and_no_clip_is_loaded(variant, monkeypatch, tmp_path):
    def offline(*args, **options):
        raise OSError("no route to host\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(module, "load_clip", None)
    said = refusal(build_reward, {"name": "aesthetic", "variant": variant})
    assert re.search(r"could not be downloaded .*OSError: no route.*set the options head and clip", said)


def test_the_model_chooses_the_variant(monkeypatch):
    asked = []

    def stop(variant):
        asked.append(variant)
        raise RewardError("stop")

    monkeypatch.setattr(module, "head_file", stop)
    for model in ("emoji-sd", "some/sdxl", None):
        with pytest.raises(RewardError, match="stop"):
            build_reward("aesthetic", model=model)
    assert asked == ["embedded", "v2", "v2"]


def test_a_head_for_another_clip_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(RewardError, match="takes 768 numbers but CLIP 'emoji-clip' gives 128"):
        build_reward({"name": "aesthetic", "clip": "emoji-clip", "head": str(tmp_path / "head.safetensors")})


@pytest.mark.parametrize(
    "content",
    [
        b"not a file of tensors",
        b"",
        {"weight": torch.zeros(1, 8)},
        {"weight": torch.zeros(3, 8), "bias": torch.zeros(3)},
        {"conv.weight": torch.zeros(3, 8)},
        {f"layers.{n}.{k}": torch.zeros(1, 8)[: None if k == "weight" else 1, 0 if k == "bias" else slice(None)]
         for n in (0, 1) for k in ("weight", "bias")},
    ],
    ids=["bytes", "empty", "no bias", "three scores", "other keys", "sizes that do not chain"],
)  # fmt: skip
def test_files_that_hold_no_head_are_refused(content, tmp_path):
    path = tmp_path / "head.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    sentence = "is not a file of tensors" if isinstance(content, bytes) else "does not hold an aesthetic head"
    assert sentence in refusal(build_reward, {"name": "aesthetic", "clip": "emoji-clip", "head": str(path)})


def test_an_arbitrary_pickle_is_not_run(tmp_path):
    torch.save({"weight": Path("x")}, tmp_path / "head.pth")
    with pytest.raises(RewardError, match="UnpicklingError"):
        build_reward({"name": "aesthetic", "clip": "emoji-clip", "head": str(tmp_path / "head.pth")})


def test_reading_a_head_leaves_the_global_rng_alone(tmp_path):
    torch.save({"weight": torch.ones(1, 4), "bias": torch.ones(1)}, tmp_path / "head.pth")
    before = torch.get_rng_state()
    assert load_head(tmp_path / "head.pth")(torch.ones(1, 4)).item() == 5
    assert torch.equal(before, torch.get_rng_state())


def test_the_head_is_applied_to_the_unit_embedding():
    from diffusion_align.rewards.image.clip import load_clip

    head = nn.Sequential(nn.Linear(128, 1))
    reward = Aesthetic(load_clip("emoji-clip"), head, batch_size=2)
    unit = reward.encoder.embed_images(levels(3, 64))
    expected = unit.double() @ head[0].weight[0].double() + head[0].bias.double()
    torch.testing.assert_close(score(reward, levels(3, 64)).double(), expected.detach(), rtol=0, atol=1e-5)


def test_the_embedded_head_is_the_default_for_emoji_sd():
    reward = build_reward("aesthetic", model="emoji-sd")
    state = load_file(asset_path("aesthetic-head"))
    unit = reward.encoder.embed_images(levels(3, 64))
    expected = unit @ state["weight"][0].float() + state["bias"].float()
    torch.testing.assert_close(score(reward, levels(3, 64)), expected, rtol=0, atol=1e-4)


def test_the_embedded_head_prefers_the_chosen_drawings_of_unseen_concepts():
    from diffusion_align.data.drawings import composite, load_drawing_pairs

    reward = build_reward("aesthetic", model="emoji-sd")
    pairs = load_drawing_pairs("heldout")
    chosen, rejected = (torch.stack([composite(p[side], (255, 255, 255)) for p in pairs]) for side in (2, 3))
    assert (score(reward, chosen) > score(reward, rejected)).float().mean() > 0.8
