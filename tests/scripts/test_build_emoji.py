"""The parts of scripts/build_emoji that need neither npm nor training, and the shipped preference data and head."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from build_emoji import augment, captions, clip, common, data, evaluate, head, models, preferences, tokenizer
from PIL import Image
from safetensors import safe_open
from torch import nn

from diffusion_align.assets import ASSETS, asset_path
from diffusion_align.data.drawings import (
    BACKGROUNDS,
    composite,
    decode_drawing,
    encode_drawing,
    load_drawing_pairs,
    load_preferences,
)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def settings(folder: Path, **changes) -> common.Build:
    return common.Build(**({"work": folder, "out": folder / "out", "device": torch.device("cpu")} | changes))


def drawing(seed: int = 0) -> torch.Tensor:
    """A premultiplied square of random colours with a half-transparent rim."""
    rgba = torch.zeros(64, 64, 4, dtype=torch.uint8)
    rgba[8:56, 8:56] = torch.randint(0, 120, (48, 48, 4), generator=torch.Generator().manual_seed(seed)).byte()
    rgba[8:56, 8:56, 3] = 128
    rgba[16:48, 16:48, 3] = 255
    return rgba


def test_every_asset_exists_and_an_unknown_one_is_refused():
    for name in ASSETS:
        assert asset_path(name).exists(), name
    with pytest.raises(ValueError, match="emoji-sd"):
        asset_path("emoji-sdd")


def test_captions_say_what_they_are_told():
    assert captions.caption("fox") == "a fox"
    assert captions.caption("fox", colour="orange", style="3d") == "a fox on an orange background, 3d style"
    seen = captions.Look(3, "blue", "flat")
    assert captions.matches(captions.Look(3), seen)
    assert captions.matches(captions.Look(3, "blue", "flat"), seen)
    assert not captions.matches(captions.Look(3, "red"), seen)
    assert not captions.matches(captions.Look(3, None, "3d"), seen)
    assert not captions.matches(captions.Look(4), seen)


def test_random_captions_match_their_image_and_repeat_with_the_seed():
    seen = captions.Look(0, "blue", "flat")

    def some(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        odds = {"colour_probability": 0.5, "style_probability": 0.5, "tag_probability": 0.5}
        return [captions.random_caption(generator, ["fox", "vixen"], seen, **odds) for _ in range(100)]

    assert some(0) == some(0) != some(1)
    for text, said in some(0):
        assert captions.matches(said, seen)
        assert ("blue" in text, "flat" in text) == (said.colour == "blue", said.style == "flat")
        assert "fox" in text or "vixen" in text


def test_composite_is_the_over_operator():
    rgba = torch.zeros(64, 64, 4, dtype=torch.uint8)
    rgba[0, 0] = torch.tensor([255, 0, 0, 255])
    rgba[0, 1] = torch.tensor([51, 0, 0, 102])
    image = composite(rgba, (0, 0, 255))
    assert image.shape == (3, 64, 64)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 0, 0]))
    torch.testing.assert_close(image[:, 0, 1], torch.tensor([0.2, 0, 0.6]))
    torch.testing.assert_close(image[:, 5, 5], torch.tensor([0.0, 0, 1]))
    batch = composite(torch.stack([rgba, rgba]), torch.tensor([[0, 0, 255], [255, 255, 255]]))
    torch.testing.assert_close(batch[0], image)
    assert batch[1, :, 5, 5].tolist() == [1, 1, 1]


def test_fit_crops_to_the_drawing_and_premultiplies():
    image = Image.new("RGBA", (100, 100))
    image.paste((200, 100, 0, 128), (10, 20, 50, 40))
    fitted = torch.from_numpy(data.fit(image))
    rows, columns = (fitted[..., 3] > 0).nonzero(as_tuple=True)
    assert (columns.min().item(), columns.max().item()) == (4, 59)
    assert (rows.min().item(), rows.max().item()) == (18, 45)
    assert fitted[32, 32].tolist() == [100, 50, 0, 128]
    with pytest.raises(ValueError, match="empty"):
        data.fit(Image.new("RGBA", (8, 8)))


def test_tags_that_help_are_kept():
    tags = {"fox face": ["face", "vixen", "af", "t-rex", "animal"]} | {f"beast {i}": ["animal"] for i in range(4)}
    assert data.useful_tags(tags)["fox face"] == ("vixen",)


def test_slugs():
    assert data.slug("piñata") == "pinata"
    assert data.slug("jack-o-lantern") == "jack-o-lantern"
    assert data.slug("ear of corn") == "ear-of-corn"


def test_augmentation_keeps_shape_and_range_and_follows_its_seed():
    batch = torch.stack([drawing(i) for i in range(3)])
    moved = [augment.move(batch, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert moved[0].shape == batch.shape
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    still = augment.move(batch, torch.Generator().manual_seed(0), degrees=0, zoom=0, shift=0)
    for before, after in zip(batch, still):
        assert torch.equal(after, before) or torch.equal(after, before.flip(1))
    images = augment.degrade(composite(moved[0], (255, 255, 255)), torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1


def test_tokenizer_is_read_alike_by_transformers(tmp_path):
    from transformers import CLIPTokenizerFast

    learned = tokenizer.learn_tokenizer(["a red fox", "a fox on a blue background, 3d style"] * 5, vocabulary=600)
    assert learned.get_vocab_size() <= 600
    tokenizer.save_tokenizer(learned, tmp_path)
    fast = CLIPTokenizerFast.from_pretrained(tmp_path)
    ids = models.tokenize(fast, ["A  red fox", "an unknown wörd " * 20])
    assert ids.shape == (2, 24)
    assert ids[0].tolist() == learned.encode("a red fox").ids
    assert (ids[:, 0] == learned.token_to_id(tokenizer.START)).all()
    assert ids[1, -1] == learned.token_to_id(tokenizer.END)
    assert fast.decode(ids[0], skip_special_tokens=True).strip() == "a red fox"


def test_contrastive_loss_by_hand():
    eye = torch.eye(2, dtype=torch.float64)
    scale = torch.tensor(2.0, dtype=torch.float64)
    own = clip.contrastive_loss(eye, eye, torch.eye(2, dtype=torch.bool), scale)
    torch.testing.assert_close(own, torch.log1p(torch.exp(-scale)))
    both = clip.contrastive_loss(eye, eye, torch.ones(2, 2, dtype=torch.bool), scale)
    torch.testing.assert_close(both, torch.log1p(torch.exp(-scale)) + scale / 2)


def test_text_encoder_keys_have_the_old_prefix_once():
    weights = {"embeddings.x": torch.zeros(1), "text_model.encoder.y": torch.ones(1)}
    assert sorted(clip.with_text_model_prefix(weights)) == ["text_model.embeddings.x", "text_model.encoder.y"]
    with safe_open(asset_path("emoji-sd") / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118


def test_recall_and_grid():
    texts = torch.eye(6)
    images = torch.stack([texts[0], texts[1], texts[2] + 2 * texts[3]])
    assert evaluate.recall(images, texts, [0, 1, 2]) == {"R@1": pytest.approx(2 / 3), "R@5": 1.0}
    image = evaluate.grid(torch.zeros(3, 3, 64, 64), columns=2)
    assert image.size == (130, 130)


def test_training_resumes_bit_for_bit(tmp_path):
    def fresh() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(4, 1)

    def loss_of(module, stop_at=None):
        calls = []

        def loss_at(generator):
            calls.append(1)
            if stop_at is not None and len(calls) == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, generator=generator)
            return (module(x) - x.sum(1, keepdim=True)).square().mean()

        return loss_at

    options = {"steps": 12, "lr": 0.05, "warmup": 2, "ema_decay": 0.9, "save_every_s": 0.0}
    whole = fresh()
    losses = common.train(settings(tmp_path / "a"), "x", whole, loss_of(whole), **options)
    assert losses[-1] < losses[0]
    broken = fresh()
    with pytest.raises(KeyboardInterrupt):
        common.train(settings(tmp_path / "b"), "x", broken, loss_of(broken, stop_at=7), **options)
    resumed = fresh()
    assert common.train(settings(tmp_path / "b"), "x", resumed, loss_of(resumed), **options) == losses
    assert torch.equal(resumed.weight, whole.weight)
    with pytest.raises(common.BuildError, match="12 steps"):
        common.train(settings(tmp_path / "b"), "x", fresh(), loss_of(resumed), **(options | {"steps": 13}))


def test_drawings_survive_packing_bit_for_bit():
    assert torch.equal(decode_drawing(encode_drawing(drawing())), drawing())
    packed, ends = preferences.pack([drawing(0), drawing(1)])
    assert torch.equal(decode_drawing(packed[ends[0] : ends[1]].numpy().tobytes()), drawing(1))
    assert len(packed) == ends[-1]
    with Image.open(io.BytesIO(packed[: ends[0]].numpy().tobytes())) as image:
        assert image.format == "WEBP"


def test_shipped_preferences_split_by_concept():
    train, heldout = load_preferences("train"), load_preferences("heldout", backgrounds=("white", "orange"))
    assert (len(train), len(heldout)) == (235, 118)
    assert not {p.label for p in train} & {p.label for p in heldout}
    assert heldout[1].prompt == f"a {heldout[1].label} on an orange background"
    assert train[0].chosen.shape == train[0].rejected.shape == (3, 64, 64)
    assert not torch.equal(train[0].chosen, train[0].rejected)
    prompts = set(asset_path("emoji-prompts").read_text(encoding="utf-8").splitlines())
    assert prompts == {p.prompt for p in load_preferences("all")}
    assert asset_path("preferences").stat().st_size < 4e6
    with pytest.raises(ValueError, match="heldout"):
        load_preferences("test")
    with pytest.raises(ValueError, match="white"):
        load_preferences("train", backgrounds=("mauve",))


def test_fitted_head_recovers_a_direction_and_centres_its_scores():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 8, generator=generator)
    chosen, rejected = base + torch.eye(8)[2], base - torch.eye(8)[2]
    fitted, loss = head.fit_head(chosen, rejected)
    direction = fitted.weight[0] / fitted.weight.norm()
    assert direction[2] > 0.95
    assert loss < 0.2
    assert abs(fitted(torch.cat([chosen, rejected])).mean()) < 1e-4


def test_shipped_head_is_as_accurate_as_it_says():
    from transformers import CLIPModel

    with safe_open(asset_path("aesthetic-head"), "pt") as file:
        weight, bias, stated = file.get_tensor("weight"), file.get_tensor("bias"), file.metadata()
    assert (weight.shape, bias.shape) == ((1, 128), (1,))
    scorer = nn.Linear(128, 1).requires_grad_(False)
    scorer.load_state_dict({"weight": weight, "bias": bias})
    model = CLIPModel.from_pretrained(asset_path("emoji-clip"), dtype=torch.float32).eval()
    pairs = load_drawing_pairs("heldout")
    sides = tuple(torch.stack([pair[side] for pair in pairs]) for side in (2, 3))
    margins = head.clean_margins(model, scorer, sides)
    assert margins.shape == (len(BACKGROUNDS), 59)
    accuracy = (margins > 0).float().mean().item()
    assert accuracy >= float(stated["heldout_pair_accuracy"].split()[0]) - 0.005
    assert accuracy >= 0.89


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scale", "0"], "above 0"),
        (["--threads", "0"], "at least 1"),
        (["--stages", "clip"], "run the stage data first"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, arguments, sentence):
    folders = ["--work-dir", str(tmp_path / "w"), "--out-dir", str(tmp_path / "o"), "--device", "cpu"]
    command = [sys.executable, str(SCRIPTS / "build_emoji_sd.py"), *folders, *arguments]
    environment = {"PATH": "", "PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_missing_npm_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(common.BuildError, match=r"npm is not on PATH.*Node"):
        data.fetch("emojibase-data@17.0.0", tmp_path)


def test_missing_resvg_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "icons.json").write_text('{"icons": {}}')
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(common.BuildError, match=r"diffusion-align\[build-emoji\]"):
        data.IconSet(tmp_path).image(data.Concept("fox", "1f98a", True))
