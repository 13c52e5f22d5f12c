"""`diffusion-align score`: the numbers of ``score_images``, whatever the picture and its name are like."""

import json

import pytest
import torch
from PIL import Image, ImageDraw

from diffusion_align.pipelines import image
from diffusion_align.rewards import build_reward

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


def drawn(mode="RGB"):
    picture = Image.new(mode, (48, 40), (0, 0, 0, 0) if mode == "RGBA" else "white")
    ImageDraw.Draw(picture).ellipse((8, 8, 36, 30), fill="red")
    return picture


def test_what_is_transparent_is_on_white(score, tmp_path):
    drawn("RGBA").save(tmp_path / "clear.png")
    drawn().save(tmp_path / "white.png")
    reward = build_reward("jpeg_compressibility")
    one = image.score_images(reward, [drawn()], [""]).item()
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


def test_pictures_that_cannot_be_read(score, tmp_path):
    drawn().save(tmp_path / "whole.png")
    data = bytearray((tmp_path / "whole.png").read_bytes())
    data[data.index(b"IDAT") + 1] = 0x01  # a chunk of no known kind, at which PIL raises a SyntaxError
    (tmp_path / "broken.png").write_bytes(data)
    Image.new("L", (30000, 30000)).save(tmp_path / "bomb.png")
    Image.fromarray(torch.full((8, 8), 4095).numpy().astype("uint16")).save(tmp_path / "deep.png")
    assert score("jpeg_compressibility", "broken.png") == (
        2,
        "error: broken.png is no PNG, JPEG, WEBP, GIF, BMP or TIFF image that can be read",
    )
    status, error = score("jpeg_compressibility", "bomb.png")
    assert (status, error.count("\n")) == (2, 0)
    assert error == "error: bomb.png has more pixels than the 178956970 that are read"
    assert score("jpeg_compressibility", "deep.png")[1].startswith(
        "error: deep.png has 16 bits a channel and uses less"
    )
    assert score("jpeg_compressibility", "none.png") == (2, "error: there is no image none.png")


def test_compare_gives_the_judge_the_metadata(tmp_path, monkeypatch, call_cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MANY)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "four", "wanted": 2.5}) + "\n")
    model = ["emoji-sd", "emoji-sd"]
    status, out, error = call_cli("compare", *model, "--judge", "mine.py:wanted", "--prompts", "p.jsonl", "-o", "c.png")
    assert (status, out.split(",")[0]) == (0, "A 10.0000"), error
