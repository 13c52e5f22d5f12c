"""`diffusion-align score`: the numbers of ``score_images``, whatever the image and its name are like."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from diffusion_align.pipelines import scoring
from diffusion_align.rewards import build_reward, scored_by
from diffusion_align.rewards.image import aesthetic
from tests.helpers.rewarding import save_clip

MANY = """
def wanted(images, prompts, metadata):
    return [float(len(text)) * notes["wanted"] for text, notes in zip(prompts, metadata)]

def times(images, prompts, metadata, factor=1.0):
    return [factor * float(x.mean()) for x in images]
"""


@pytest.fixture
def score(tmp_path, monkeypatch, call_cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MANY)

    def call(*arguments):
        status, out, error = call_cli("score", *arguments)
        return (status, error.strip()) if status else [float(line.split()[0]) for line in out.splitlines()]

    return call


def drawn(mode="RGB", size=(48, 40)):
    image = Image.new(mode, size, (0, 0, 0, 0) if mode == "RGBA" else "white")
    ImageDraw.Draw(image).ellipse((8, 8, 36, 30), fill="red")
    return image


def test_what_is_transparent_is_on_white(score, tmp_path):
    drawn("RGBA").save(tmp_path / "clear.png")
    drawn().save(tmp_path / "white.png")
    reward = build_reward("jpeg_compressibility")
    one = scoring.score_images(reward, [drawn()], [""]).item()
    assert score("jpeg_compressibility", "clear.png", "white.png") == pytest.approx([one] * 3, abs=1e-4)


def test_paths_are_printed_as_they_are(tmp_path, monkeypatch, call_cli):
    monkeypatch.chdir(tmp_path)
    names = ["a[bold]b.png", "run[/final].png", "x" * 150 + ".png"]
    for name in names:
        drawn().save(tmp_path / name.replace("/", "_"))
    status, out, _ = call_cli("score", "jpeg_compressibility", *(name.replace("/", "_") for name in names))
    assert status == 0
    assert [line.split(maxsplit=1)[1] for line in out.splitlines()[:3]] == [name.replace("/", "_") for name in names]
    (tmp_path / "run[").mkdir()
    drawn().save(tmp_path / names[1])
    status, out, _ = call_cli("score", "jpeg_compressibility", names[1])
    assert (status, out.splitlines()[0].split()[1]) == (0, names[1])


def test_prompts_bring_their_metadata_and_rewards_their_options(score, tmp_path):
    drawn().save(tmp_path / "a.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "four", "wanted": 2.5}) + "\n")
    assert score("mine.py:wanted", "a.png", "a.png", "--prompts", "p.jsonl") == [10.0, 10.0, 10.0]
    plain, triple = (score("mine.py:times", "a.png", *more)[0] for more in ((), ("--option", "factor=3.0")))
    assert triple == pytest.approx(3 * plain, abs=2e-4)


def test_images_that_cannot_be_read(score, tmp_path):
    drawn().save(tmp_path / "whole.png")
    data = bytearray((tmp_path / "whole.png").read_bytes())
    data[data.index(b"IDAT") + 1] = 0x01  # a chunk of no known kind, at which PIL raises a SyntaxError
    (tmp_path / "broken.png").write_bytes(data)
    Image.new("L", (30000, 30000)).save(tmp_path / "bomb.png")
    Image.fromarray(torch.full((8, 8), 4095).numpy().astype("uint16")).save(tmp_path / "deep.png")
    assert score("jpeg_compressibility", "broken.png") == (
        2,
        "error: broken.png is not a readable PNG, JPEG, WEBP, GIF, BMP or TIFF image",
    )
    status, error = score("jpeg_compressibility", "bomb.png")
    assert (status, error.count("\n")) == (2, 0)
    assert error == "error: bomb.png has more pixels than the 178956970 that are read"
    assert score("jpeg_compressibility", "deep.png")[1].startswith(
        "error: deep.png has 16 bits per channel and uses less"
    )
    assert score("jpeg_compressibility", "none.png") == (2, "error: there is no image none.png")


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A CLIP and a head of the published kind, and 512 x 384 and 64 x 64 images, in the folder we are in."""
    monkeypatch.chdir(tmp_path)
    save_clip(tmp_path / "clip", projection=32)
    torch.save({"weight": torch.ones(1, 32), "bias": torch.ones(1)}, "head.pth")
    for name, size in (("photo", (512, 384)), ("emoji", (64, 64))):
        drawn(size=size).save(f"{name}.png")


def test_the_images_choose_the_networks_and_score_names_them(published, monkeypatch, call_cli):
    monkeypatch.setitem(aesthetic.VARIANTS, "v2", "clip")
    monkeypatch.setattr(aesthetic, "head_file", lambda variant, real=aesthetic.head_file: (
        Path("head.pth") if variant == "v2" else real(variant)
    ))  # fmt: skip
    v2 = f"scored by aesthetic: {aesthetic.HEADS['v2']}, on CLIP clip"
    embedded = f"scored by aesthetic: {aesthetic.HEADS['embedded']}, on CLIP emoji-clip, trained on emoji drawings"
    for files, options, named in (
        (["photo.png"], [], v2),
        (["emoji.png"], [], embedded),
        (["emoji.png", "photo.png"], [], v2),
        (["photo.png"], ["--model", "emoji-sd"], embedded),
        (["emoji.png"], ["--model", "sd15"], v2),
    ):
        status, out, err = call_cli("score", "aesthetic", *files, *options)
        assert (status, err) == (0, named + "\n")
        opened = [Image.open(file) for file in files]
        scores = scoring.score_images("aesthetic", opened, [""] * len(files), model=options[1] if options else None)
        assert [float(line.split()[0]) for line in out.splitlines()[:-1]] == pytest.approx(scores.tolist(), abs=1e-4)


def test_local_copies_of_the_published_networks(published, call_cli):
    status, _, err = call_cli("score", "aesthetic", "photo.png")
    assert status == 2
    assert err.endswith("connect once, or set the options head and clip to local copies\n")
    status, _, err = call_cli("score", "aesthetic", "photo.png", "--option", "head=head.pth", "--option", "clip=clip")
    assert (status, err) == (0, "scored by aesthetic: the head in head.pth, on CLIP clip\n")


def test_what_scores_is_named_through_scale_and_sum(published):
    parts = ["jpeg_compressibility", {"name": "clip_score", "clip": "clip", "scale": 2.0, "offload": True}]
    assert scored_by(build_reward(parts)) == "combine: jpeg_compressibility; 2*clip_score: CLIP clip"


def test_compare_gives_the_judge_the_metadata(tmp_path, monkeypatch, call_cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MANY)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "four", "wanted": 2.5}) + "\n")
    model = ["emoji-sd", "emoji-sd"]
    status, out, error = call_cli("compare", *model, "--judge", "mine.py:wanted", "--prompts", "p.jsonl", "-o", "c.png")
    assert (status, out.split(",")[0]) == (0, "A 10.0000"), error
