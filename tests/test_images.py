"""One reader of images for everybody: what it makes of every kind of file, and that nobody reads them otherwise."""

import ast
import base64
import hashlib
import io
import json
import os
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, TiffImagePlugin

from diffusion_align.images import MAX_PIXELS, UnreadableImage, open_image, size_of_whole, to_rgb

ROOT = Path(__file__).parent.parent
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(values, *, depth=16, colours=0, significant=None, extra=b""):
    """A PNG of an array (H, W) or (H, W, C), written by hand."""
    rows = values.astype(">u2" if depth == 16 else "u1")
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colours, 0, 0, 0)
    noted = b"" if significant is None else chunk(b"sBIT", bytes(significant))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + noted + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def grey(data):
    """The levels of an image that must be grey."""
    pixels = np.asarray(open_image(data))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def deep(most):
    return np.linspace(0, most, 256).round().astype(np.uint16).reshape(16, 16)


# -- depth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        png(deep(65535)),
        png(deep(65535), significant=[16]),
        png(deep(4095), significant=[12]),  # as they are, against the standard
        png(deep(4095) << 4, significant=[12]),  # shifted, as the standard has it
        encoded(Image.fromarray(deep(65535)), "TIFF"),
    ],
    ids=["16 bits", "all of them used", "12 bits", "12 bits, shifted", "tiff"],
)
def test_sixteen_bits_are_scaled_by_what_white_is(data):
    levels = grey(data).astype(int)
    assert np.abs(levels - RAMP).max() <= 1
    assert (levels[0, 0], levels[-1, -1]) == (0, 255)


def test_greys_of_16_bits_keep_every_level():
    assert (grey(png(RAMP.astype(np.uint16) * 257)) == RAMP).all()
    assert (grey(png(np.zeros((4, 4), np.uint16))) == 0).all()


@pytest.mark.parametrize("most", [255, 1023, 4095, 16383])
def test_sixteen_bits_of_which_few_are_used_are_refused_and_not_black(most):
    for data in (
        png(deep(most)),
        png(deep(most)[..., None].repeat(3, 2), colours=2),
        encoded(Image.fromarray(deep(most)), "TIFF"),
    ):
        with pytest.raises(UnreadableImage, match="less than a quarter of their range"):
            open_image(data)
    with pytest.raises(UnreadableImage, match="16 bits"):
        to_rgb(Image.fromarray(deep(most)))


def test_colours_of_16_bits():
    colours = np.stack([deep(65535), deep(65535)[::-1], np.full((16, 16), 32768, np.uint16)], axis=-1)
    assert (np.asarray(open_image(png(colours, colours=2))) == colours >> 8).all()


def test_a_transparent_grey_of_16_bits_goes_on_white():
    values = deep(65535)
    levels = grey(png(values, extra=chunk(b"tRNS", struct.pack(">H", values[3, 3]))))
    assert levels[3, 3] == 255
    assert levels[3, 4] == round(values[3, 4] / 257)


def test_a_tiff_in_which_0_is_white():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    assert (grey(encoded(Image.fromarray(deep(65535)), "TIFF", tiffinfo=tags)) == 255 - RAMP).all()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.full((8, 8), 200, np.int32), "32-bit integers"),
        (np.full((8, 8), 70000, np.int32), "32-bit integers"),
        (np.full((8, 8), 0.5, np.float32), "floating-point numbers"),
    ],
)
def test_32_bits_do_not_say_what_is_white(values, kind):
    image = Image.fromarray(values)
    for read in (lambda: open_image(encoded(image, "TIFF")), lambda: to_rgb(image)):
        with pytest.raises(
            UnreadableImage, match=f"^holds {kind}, so it is unknown which value is white: save it with 8"
        ):
            read()


# -- modes, transparency, orientation, frames --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("L", (8, 8), 70), (70, 70, 70)),
        (Image.new("LA", (8, 8), (0, 51)), (204, 204, 204)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3)),
        (Image.new("RGB", (8, 8), (1, 2, 3)).convert("P", palette=Image.Palette.ADAPTIVE), (1, 2, 3)),
        (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("YCbCr", (8, 8), (255, 128, 128)), (255, 255, 255)),
        (Image.new("HSV", (8, 8), (0, 0, 100)), (100, 100, 100)),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_every_mode_is_rgb_on_white(image, wanted):
    assert to_rgb(image).getpixel((3, 3)) == wanted
    if image.mode in ("1", "L", "LA", "RGBA", "RGB", "P"):
        assert open_image(encoded(image)).getpixel((3, 3)) == wanted
    if image.mode in ("1", "L", "LA", "RGBA", "RGB", "P", "CMYK"):
        assert open_image(encoded(image, "TIFF")).getpixel((3, 3)) == wanted


def test_transparent_palettes_and_colours():
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([9] * 30)
    assert open_image(encoded(palette, transparency=3)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(Image.new("RGB", (8, 8), "red"), transparency=(255, 0, 0))).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_are_upright(kind, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the upper left quarter
    there = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(there(upright))), kind, exif=exif, **lossless)
    for image in (open_image(data), to_rgb(Image.open(io.BytesIO(data)))):
        assert image.size == (32, 16)
        assert np.abs(np.asarray(image).astype(int) - upright).max() < 8


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 10))  # 9 is none
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_of_a_whole_image_is_known_without_decoding_it(kind, orientation, monkeypatch):
    data = encoded(NOISE.resize((48, 32)), kind, exif=turned(orientation))
    wide, tall = open_image(data).size
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
        patch.setattr(PngImagePlugin.PngImageFile, "getexif", lambda self: pytest.fail("it was decoded"))
        assert size_of_whole(data) == (tall, wide)
    assert [size_of_whole(data[:cut]) for cut in (0, 20, len(data) // 2, len(data) - 1)] == [None] * 4


PLAIN = png(np.zeros((4, 6, 3), np.uint8), depth=8, colours=2)
EXIF = chunk(b"eXIf", turned(6).tobytes())
UNSURE = {
    "16 bits": png(deep(65535)),
    "a wrong checksum": PLAIN[:-20] + b"\0\1\2\3" + PLAIN[-16:],
    "turned after the pixels": PLAIN[:-12] + EXIF + PLAIN[-12:],
    "no pixels": PLAIN[:33] + PLAIN[-12:],
    "no end": PLAIN[:-12],
    "many bytes after a JPEG": encoded(Image.new("RGB", (8, 8)), "JPEG") + bytes(40),
    **{kind: encoded(Image.new("RGB", (8, 8)), kind) for kind in ("GIF", "BMP", "TIFF")},
}


@pytest.mark.parametrize("data", UNSURE.values(), ids=UNSURE)
def test_of_others_only_decoding_can_tell(data):
    assert size_of_whole(data) is None


@pytest.mark.parametrize("data", [PLAIN, PLAIN + b"more", png(np.zeros((4, 6), np.uint8), depth=8, extra=EXIF)])
def test_the_size_of_a_png(data):
    assert size_of_whole(data) == open_image(data).size[::-1]


@pytest.mark.parametrize("read", [open_image, size_of_whole])
def test_threads_that_read_images_leave_the_filters_of_warnings_as_they_were(read, monkeypatch):
    """The first that begins ends first, while the second still reads."""
    began, ended, real = threading.Event(), threading.Event(), Image.open
    first = PLAIN + b"first"

    def slow(file, **options):
        if file.getvalue() == first:
            assert began.wait(10)
        else:
            began.set()
            assert ended.wait(10)
        return real(file, **options)

    monkeypatch.setattr(Image, "open", slow)
    before, filters = warnings.filters, list(warnings.filters)
    with ThreadPoolExecutor(2) as executor:
        jobs = [executor.submit(read, first)]
        while warnings.filters is before and not jobs[0].done():
            time.sleep(0.001)
        jobs.append(executor.submit(read, PLAIN))
        jobs[0].result()
        ended.set()
        jobs[1].result()
    after, warnings.filters = warnings.filters, before
    assert after == filters


def test_a_broken_exif_block_says_nothing():
    data = encoded(Image.new("RGB", (8, 8), (1, 2, 3)), exif=b"Exif\0\0II*\0\xff\xff\xff\x00")
    with warnings.catch_warnings(record=True, action="always") as warned:  # pytest makes errors of warnings
        assert open_image(data).getpixel((0, 0)) == (1, 2, 3)
    assert warned == []


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


# -- colours -----------------------------------------------------------------------------------------------------------


def profile_bytes(red=(0.64, 0.33), gamma=2.19921875):
    """A profile of matrix and curve, by hand: Adobe RGB but for its red."""

    def s15(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    # Columns of Adobe RGB (1998), adapted to D50; sRGB's are the default of nobody here.
    columns = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    tags = {b"wtpt": xyz((0.9642, 1.0, 0.8249)), **{name: xyz(column) for name, column in columns.items()}}
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 6) + b"Adobe\0" + b"\0" * 78
    tags[b"cprt"] = b"text\0\0\0\0none\0"
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    size = place + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + b"\0" * 12
    header += b"acsp" + b"\0" * 28 + s15(0.9642) + s15(1.0) + s15(0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


ADOBE = profile_bytes()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def adobe_to_srgb(colour):
    """By the published matrices, in floats."""
    linear = (np.array(colour) / 255) ** 2.19921875
    to_xyz = [[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]]
    to_srgb = [
        [3.2404542, -1.5371385, -0.4985314],
        [-0.9692660, 1.8760108, 0.0415560],
        [0.0556434, -0.2040259, 1.0572252],
    ]
    x = np.clip(np.array(to_srgb) @ (np.array(to_xyz) @ linear), 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) * 255


@pytest.mark.parametrize("colour", [(120, 180, 60), (200, 100, 150), (128, 128, 128), (0, 0, 0), (255, 255, 255)])
def test_colours_of_a_profile_become_srgb(colour):
    image = Image.new("RGB", (4, 4), colour)
    for data in (encoded(image, icc_profile=ADOBE), encoded(image, "TIFF", icc_profile=ADOBE)):
        assert np.abs(np.array(open_image(data).getpixel((0, 0))) - adobe_to_srgb(colour)).max() < 2
    given = Image.open(io.BytesIO(encoded(image, icc_profile=ADOBE)))
    assert to_rgb(given).getpixel((0, 0)) == open_image(encoded(image, icc_profile=ADOBE)).getpixel((0, 0))


def test_a_profile_and_transparency():
    data = encoded(Image.new("RGBA", (4, 4), (120, 180, 60, 51)), icc_profile=ADOBE)
    wanted = 0.2 * adobe_to_srgb((120, 180, 60)) + 0.8 * 255
    assert np.abs(np.array(open_image(data).getpixel((0, 0))) - wanted).max() < 2


@pytest.mark.parametrize("profile", [SRGB, b"no profile at all", ADOBE[:200]], ids=["sRGB", "garbage", "cut off"])
def test_what_is_srgb_or_has_no_usable_profile_keeps_its_levels(profile):
    colours = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert (np.asarray(open_image(encoded(Image.fromarray(colours), icc_profile=profile))) == colours).all()


@pytest.mark.parametrize("mode", ["L", "LA", "CMYK", "1"])
def test_a_profile_of_another_mode_is_not_applied(mode):
    image = Image.new(mode, (4, 4))
    kind = "TIFF" if mode == "CMYK" else "PNG"
    plain, tagged = (open_image(encoded(image, kind, **more)) for more in ({}, {"icc_profile": ADOBE}))
    assert plain.getpixel((0, 0)) == tagged.getpixel((0, 0))


# -- what is refused ---------------------------------------------------------------------------------------------------

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        encoded(NOISE)[:-2000],
        encoded(NOISE, "JPEG")[:1500],
        encoded(NOISE, "EPS"),
        encoded(NOISE, "PDF"),
        encoded(NOISE, "PPM"),
        encoded(NOISE, "TGA"),
        encoded(NOISE, "ICO"),
        b"8BPS\0\1" + b"\0" * 100,
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "eps", "pdf", "ppm", "tga", "ico", "psd"],
)
def test_what_is_no_image_or_of_no_known_format(data, tmp_path, monkeypatch):
    import PIL.EpsImagePlugin

    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "x.png").write_bytes(data)
    for source in (data, tmp_path / "x.png", str(tmp_path / "x.png")):
        with pytest.raises(UnreadableImage, match=r"^is not a readable PNG, JPEG"):
            open_image(source)


def test_bombs_and_places_that_are_no_files(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(UnreadableImage, match=f"has more pixels than the {MAX_PIXELS} that are read"):
        open_image(bomb)
    with pytest.raises(UnreadableImage, match="is 64 x 64: at most 4095 pixels are read"):
        open_image(encoded(NOISE), max_pixels=4095)
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path, tmp_path / "none", tmp_path / "fifo", "a\0b"):
        with pytest.raises(UnreadableImage, match=r"^is not an image file$"):
            open_image(place)


# -- everybody reads them so -------------------------------------------------------------------------------------------


def test_nobody_else_opens_images():
    """``Image.open`` occurs in one place, and in the reader of the drawings in the package."""
    found = []
    for folder in ("diffusion_align", "pipelines", "rewards"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", "") == "Image":
                    found.append(path.relative_to(ROOT).as_posix())
    assert sorted(set(found)) == ["diffusion_align/data/drawings.py", "diffusion_align/images.py"]


TURNED = Image.Exif()
TURNED[0x0112] = 6
SPECIAL = {
    "turned": encoded(NOISE.resize((48, 64)), "PNG", exif=TURNED),
    "adobe": encoded(NOISE, icc_profile=ADOBE),
    "clear": encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 51))),
    "deep": png(deep(65535)),
}


@pytest.mark.parametrize("data", SPECIAL.values(), ids=SPECIAL)
def test_pairs_score_notebooks_and_the_server_see_the_same(data, tmp_path, call_cli):
    from diffusion_align.data.image_pairs import _decoded
    from diffusion_align.pipelines.scoring import as_image_tensor
    from diffusion_align.report.grids import to_pil
    from diffusion_align.rewards.serving import decode

    wanted = np.asarray(open_image(data))
    (tmp_path / "x.png").write_bytes(data)
    (tmp_path / "mine.py").write_text(
        "def digest(images, prompts, metadata):\n"
        "    import hashlib\n"
        "    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()\n"
        "    return [int(hashlib.sha256(pixels.tobytes()).hexdigest()[:4], 16)]\n"
    )
    number = int(hashlib.sha256(wanted.tobytes()).hexdigest()[:4], 16)
    assert (np.asarray(_decoded({"bytes": data, "path": None}, "chosen", None)) == wanted).all()
    assert (np.asarray(_decoded("x.png", "chosen", tmp_path)) == wanted).all()
    assert torch.equal(
        (as_image_tensor(Image.open(io.BytesIO(data))) * 255).round().byte(),
        torch.from_numpy(wanted.copy()).permute(2, 0, 1),
    )
    assert (np.asarray(to_pil([Image.open(io.BytesIO(data))])[0]) == wanted).all()
    status, out, error = call_cli("score", f"{tmp_path}/mine.py:digest", tmp_path / "x.png")
    assert (status, float(out.split()[0])) == (0, number), error
    if data[24:26] == b"\x08\x02":  # 8 bits of RGB, which is all that a server takes
        assert (decode(base64.b64encode(data).decode(), 0, 10**6) == wanted).all()


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(np.full((8, 8), 300, np.int32)), "TIFF"),
        encoded(Image.fromarray(np.full((8, 8), 0.5, np.float32)), "TIFF"),
        png(deep(4095)),
    ],
    ids=["int32", "float", "12 bits"],
)
def test_pairs_and_score_refuse_the_same(data, side, tmp_path, call_cli):
    from diffusion_align.data.image_pairs import PairsConfig, open_pairs
    from diffusion_align.errors import ConfigError

    (tmp_path / "odd.png").write_bytes(data)
    (tmp_path / "good.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    row = {"prompt": "p", "chosen": "good.png", "rejected": "good.png", side: "odd.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError) as caught:
        open_pairs(PairsConfig(source=str(tmp_path / "a.jsonl"))).check_images()
    assert caught.value.problems[0].startswith(f"pairs: row 0: {side} h")
    assert "so it is unknown which value is white" in caught.value.problems[0]
    status, _, error = call_cli("score", "jpeg_compressibility", tmp_path / "odd.png")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {tmp_path}/odd.png h")
