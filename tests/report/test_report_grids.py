import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffusion_align.report import before_after, image_grid, save_png
from diffusion_align.report.grids import MARGIN, _font, _wrap

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


def flat(*colors, size=64):
    pixels = torch.tensor(colors, dtype=torch.float32)[:, :, None, None] / 255
    return pixels.expand(-1, -1, size, size)


def at(image, column, row, *, cell=128, row_pitch=128 + MARGIN, left=MARGIN):
    return image.getpixel((left + column * (cell + MARGIN) + cell // 2, MARGIN + row * row_pitch + cell // 2))


def test_small_images_are_doubled_and_land_in_reading_order():
    image = image_grid(flat(RED, GREEN, BLUE, GREY), columns=3)
    assert image.size == (MARGIN + 3 * (128 + MARGIN), MARGIN + 2 * (128 + MARGIN))
    assert [at(image, 0, 0), at(image, 1, 0), at(image, 2, 0), at(image, 0, 1)] == [RED, GREEN, BLUE, GREY]
    assert at(image, 1, 1) == (255, 255, 255)


@pytest.mark.parametrize(("size", "width"), [(16, 128), (64, 128), (512, 512)])
def test_scale(size, width):
    assert image_grid(flat(RED, size=size)).size == (width + 2 * MARGIN,) * 2


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (4, 2), (6, 3), (8, 4), (12, 4), (16, 4)])
def test_default_columns_leave_few_holes(count, columns):
    image = image_grid(flat(*[RED] * count))
    assert image.size == (MARGIN + columns * (128 + MARGIN), MARGIN + count // columns * (128 + MARGIN))


def test_orientation_of_an_image_is_kept():
    pixels = torch.zeros(1, 3, 128, 128)
    pixels[0, 0, :64, 64:] = 1.0
    image = image_grid(pixels)
    assert image.getpixel((MARGIN + 96, MARGIN + 32)) == RED
    assert image.getpixel((MARGIN + 32, MARGIN + 96)) == (0, 0, 0)


def test_captions_stand_beneath_and_only_there():
    plain, with_captions = image_grid(flat(RED, GREEN)), image_grid(flat(RED, GREEN), captions=["a red square", ""])
    assert with_captions.width == plain.width
    assert with_captions.height > plain.height
    strip = np.asarray(with_captions)[MARGIN + 128 + 2 :]
    assert strip[:, : MARGIN + 128].min() < 100
    assert strip[:, 2 * MARGIN + 128 :].min() == 255
    assert at(with_captions, 0, 0) == RED


def test_long_captions_wrap_then_end_in_an_ellipsis():
    lines = _wrap("a slice of pizza with pepperoni on a wooden table by the sea at night", 128)
    assert len(lines) == 2
    assert lines[0].startswith("a slice of pizza")
    assert lines[1].endswith("...")
    assert all(_font().getlength(line) <= 128 for line in [*lines, *_wrap("x" * 100, 128)])
    assert _wrap("a panda", 128) == ["a panda"]
    assert _wrap("", 128) == []


def test_tensors_are_clamped_and_nan_is_black():
    pixels = flat(RED, RED, RED).clone()
    pixels[0], pixels[1], pixels[2] = 3.0, -1.0, float("nan")
    image = image_grid(pixels.to(torch.bfloat16), columns=3)
    assert [at(image, i, 0) for i in range(3)] == [(255,) * 3, (0,) * 3, (0,) * 3]


def test_pil_images_of_other_modes_and_sizes():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image = image_grid([clear, Image.new("L", (32, 32), 128)])
    assert at(image, 0, 0) == (255, 255, 255)
    assert at(image, 1, 0) == GREY


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(1, 1, 4, 4), {}, "float tensor"),
        (torch.zeros(3, 4, 4), {}, "float tensor"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), {}, "float tensor"),
        (torch.zeros(0, 3, 4, 4), {}, "no images"),
        ([], {}, "no images"),
        (torch.zeros(2, 3, 4, 4), {"captions": ["a"]}, "captions holds 1 entries for 2"),
        (torch.zeros(2, 3, 4, 4), {"columns": 0}, "columns=0"),
    ],
)
def test_bad_grids(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)


def gutter_of(image, count):
    return image.width - count * (128 + MARGIN)


def test_before_is_above_after():
    image = before_after(flat(RED, GREEN), flat(BLUE, GREY))
    left = gutter_of(image, 2)
    assert left > MARGIN
    assert [at(image, i, 0, left=left) for i in range(2)] == [RED, GREEN]
    assert [at(image, i, 1, left=left) for i in range(2)] == [BLUE, GREY]


@pytest.mark.parametrize("words", [("before", "after"), ("chosen", "rejected"), ("A", "B")])
def test_the_rows_are_labelled_beside_them(words):
    labels = {} if words[0] == "before" else {"labels": words}
    image = np.asarray(before_after(flat(RED), flat(BLUE), **labels).convert("L"))
    gutter = image[:, : image.shape[1] - 128 - 2 * MARGIN]
    for row, word in enumerate(words):
        strip = gutter[MARGIN + row * (128 + MARGIN) :][:128]
        written = Image.new("L", (80, 40), 255)
        ImageDraw.Draw(written).text((10, 10), word, fill=34, font=_font())
        np.testing.assert_allclose(inked(strip), inked(np.asarray(written)), atol=2)


def inked(pixels):
    rows, columns = np.nonzero(pixels < 250)
    return pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(int)


def test_rewards_and_captions_stand_under_the_images():
    bare = before_after(flat(RED), flat(BLUE))
    image = before_after(
        flat(RED), flat(BLUE), captions=["a square"], rewards_before=[1.5], rewards_after=torch.tensor([2.5])
    )
    left = gutter_of(image, 1)
    assert image.height > bare.height
    pixels = np.asarray(image.convert("L"))
    under_before = pixels[MARGIN + 130 : MARGIN + 128 + MARGIN + 8, left:]
    assert under_before.min() < 200
    assert image.getpixel((left + 64, MARGIN + 128 + 17 + MARGIN + 64)) == BLUE
    assert pixels[-30:, left:].min() < 100


def test_many_pairs_continue_in_a_further_block():
    image = before_after(flat(*[RED] * 8, GREEN), flat(*[BLUE] * 8, GREY))
    left, pitch = gutter_of(image, 8), 128 + MARGIN
    second = (image.height - MARGIN) // 2
    assert image.getpixel((left + 64, MARGIN + second + 64)) == GREEN
    assert image.getpixel((left + 64, MARGIN + second + pitch + 64)) == GREY
    assert image.getpixel((left + pitch + 64, MARGIN + second + 64)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["captions", "rewards_before", "rewards_after"])
def test_before_after_refuses_other_lengths(name):
    with pytest.raises(ValueError, match=name):
        before_after(flat(RED, GREEN), flat(BLUE, GREY), **{name: ["1"]})
    with pytest.raises(ValueError, match="before holds 2 images and after 1"):
        before_after(flat(RED, GREEN), flat(BLUE))


def test_save_png_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "grid.png"
    assert save_png(Image.new("RGB", (4, 4), RED), path) == path
    save_png(Image.new("RGB", (4, 4), BLUE), path)

    class Broken:
        def save(self, target, format):
            target.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(Broken(), path)
    assert Image.open(path).getpixel((0, 0)) == BLUE
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]
