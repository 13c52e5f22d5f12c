"""Images of people as 8-bit sRGB, by the same rules whoever reads them: pairs, ``score``, notebooks, a reward server.

Upright as EXIF says, colours as the ICC profile says, the first frame, on white where it is transparent. Sixteen bits a
channel are scaled by 65535, or by what the file says that it uses of them; where that cannot be told, or an image holds
32-bit numbers of which nothing says what is white, it is refused and not turned black.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from PIL import Image, ImageCms, ImageOps

# PIL has plug-ins that run other programs (Ghostscript for EPS) or read formats that are no images (FITS, PSD):
# what a file is called, or begins with, must not choose among those.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 178_956_970  # where PIL itself takes an image for a decompression bomb
# Of 0x10000: if the brightest value of 16 bits is lower, it is more likely the white of 10, 12 or 14 bits.
_AMBIGUOUS_DEPTH = 0x4000
_PLAIN_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")


class UnreadableImage(ValueError):
    """What is wrong with an image, to stand behind its name: "has more pixels than …"."""


_silence = contextlib.ExitStack()
_silencing = threading.Lock()
_silent = 0  # how many are inside ``without_warnings``


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Inside, nobody warns: PIL would, of a damaged EXIF block or of many pixels.

    Filters of warnings are those of all threads, so the first one in puts them aside and the last one out puts them
    back. Whoever has threads that read images is inside as long as these are.
    """
    global _silent
    with _silencing:
        if not _silent:
            _silence.enter_context(warnings.catch_warnings(action="ignore"))
        _silent += 1
    try:
        yield
    finally:
        with _silencing:
            _silent -= 1
            if not _silent:
                _silence.close()


def open_image(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file, or in the bytes of one, in RGB.

    Raises:
        UnreadableImage: there is no such file, it is none of ``FORMATS`` or damaged, has more than ``max_pixels``, or
            values that do not say what is white.
    """
    if not isinstance(source, bytes) and not os.path.isfile(source):  # a FIFO would be waited for
        raise UnreadableImage("is not an image file")
    try:
        with (
            without_warnings(),
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as file,
        ):
            if file.width * file.height > max_pixels:
                raise UnreadableImage(f"is {file.width} x {file.height}: at most {max_pixels} pixels are read")
            bits = _bits(file, source)
            file.load()
            return to_rgb(file, bits)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(f"has more pixels than the {MAX_PIXELS} that are read") from None
    except MemoryError:
        raise UnreadableImage("does not fit into this machine's memory") from None
    except Exception:  # PIL's decoders raise whatever they meet in a damaged file
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UnreadableImage(f"is not a readable {known} image") from None


def size_of_whole(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an image that ``open_image`` can be expected to read, told without decoding it.

    A PNG of up to 8 bits whose chunks all have their checksums, a JPEG or a WebP that does not end too early. None of
    anything else: only decoding can tell.
    """
    try:
        with (
            without_warnings(),
            Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as file,
        ):
            width, height = file.size
            turned = 5 <= Image.Image.getexif(file).get(0x0112, 1) <= 8  # PngImageFile's own would decode
            whole = {"PNG": _whole_png, "JPEG": _whole_jpeg, "WEBP": _whole_webp}[str(file.format)](data)
            if not whole or width * height > MAX_PIXELS or file.mode not in _PLAIN_MODES:
                return None
    except Exception:  # whatever is wrong, ``open_image`` has the words for it
        return None
    return (width, height) if turned else (height, width)


def _whole_png(data: bytes) -> bool:
    """Whether a PNG of up to 8 bits per channel ends, every chunk has its checksum, and none after the pixels may say
    how the image is turned."""
    place, pixels = 8, False
    while place + 12 <= len(data):  # length, kind, content, checksum
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if (
            end + 4 > len(data)
            or zlib.crc32(memoryview(data)[place + 4 : end]) != struct.unpack_from(">I", data, end)[0]
        ):
            return False
        if kind == b"IEND":
            return pixels and data[24] <= 8
        if pixels and kind not in (b"IDAT", b"tIME", b"fdAT", b"fcTL"):
            return False
        pixels = pixels or kind == b"IDAT"
        place = end + 4
    return False


def _whole_jpeg(data: bytes) -> bool:
    return b"\xff\xd9" in data[-32:]


def _whole_webp(data: bytes) -> bool:
    return struct.unpack_from("<I", data, 4)[0] + 8 <= len(data)


def to_rgb(image: Image.Image, bits: tuple[int, int] | None = None) -> Image.Image:
    """A PIL image, opened by whomever, in RGB by the rules of this module.

    Args:
        bits: (in the file, of them used) of each channel; None if no file says.

    Raises:
        UnreadableImage: its values do not say what is white.
    """
    import numpy as np

    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the image
        if image.getexif().get(0x0112, 1) != 1:  # it would copy the image all the same
            image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and bits is None):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise UnreadableImage(f"holds {kind}, so it is unknown which value is white: save it with 8 bits per channel")
    if image.mode.startswith("I"):
        return _in_srgb(_from_16_bits(image, bits or (16, 16)))
    if bits is not None and bits[0] == 16:  # PIL keeps the upper eight
        _check_range(int(np.asarray(image.convert("RGB")).max()) << 8, at_zero=False)
    try:
        return _in_srgb(image)
    except ValueError:
        raise UnreadableImage(f"has mode {image.mode!r}, which is not read: convert it to RGB") from None


def _in_srgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel, converted to sRGB."""
    profile, alpha = image.info.get("icc_profile"), None
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA")
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if grey else "RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):  # the modes that profiles are for
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _to_srgb(profile, image.mode) if isinstance(profile, bytes) and profile else None
    if transform is not None:
        image = cast(Image.Image, ImageCms.applyTransform(image, transform))
    image = image.convert("RGB")
    if alpha is None:
        return image
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What turns colours of ``profile`` into sRGB; None where it is sRGB, or damaged, or for images of another mode.

    sRGB is told by what it does: a transform that moves no colour by more than one level would only add its rounding.
    """
    import numpy as np

    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        if mode == "CMYK":
            return transform
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        probe = Image.fromarray(colours if mode == "RGB" else levels[None])
        moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
        return transform if np.abs(moved).max() > 1 else None
    except Exception:  # as browsers do: colours without a usable profile are sRGB
        return None


def _from_16_bits(image: Image.Image, bits: tuple[int, int]) -> Image.Image:
    """Greys of 16 bits in 8, with a mask where one of them stands for transparent."""
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    stored, used = bits
    full = (1 << min(stored, 16)) - 1
    if image.info.get("white_is_zero"):
        values = full - values
    if stored >= 16:
        # The PNG standard has samples of fewer bits spread over all 16; many writers put them in as they are.
        lower = (1 << (16 - used)) - 1
        if used < 16 and values.max() < 1 << used and (values & lower).any():
            full = (1 << used) - 1
        else:
            _check_range(int(values.max()))
    grey = Image.fromarray((values * 255 / full).round().clip(0, 255).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey = Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def _check_range(highest: int, *, at_zero: bool = True) -> None:
    """Refuse 16-bit values of which the highest is such that they are likelier of 8, 10, 12 or 14 bits."""
    if highest < _AMBIGUOUS_DEPTH and not (highest == 0 and at_zero):
        raise UnreadableImage(
            "has 16 bits per channel and uses less than a quarter of their range, so it is unknown which value is "
            "white: save it with 8 bits per channel"
        )


def _bits(file: Image.Image, source: str | Path | bytes) -> tuple[int, int] | None:
    """(in the file, of them used) of each channel of a PNG or TIFF."""
    if file.format == "TIFF":
        if file.mode in ("I", "F"):
            return None
        tags = file.tag_v2  # type: ignore[attr-defined]
        depth = int(max(tags.get(258, (1,))))
        if tags.get(262) == 0 and file.mode.startswith("I;16"):  # PIL turns such an image of 8 bits over, not this one
            file.info["white_is_zero"] = True
        return depth, depth
    if file.format != "PNG":
        return None
    start = source
    if not isinstance(start, bytes):
        with open(start, "rb") as raw:
            start = raw.read(1 << 20)
    depth = used = start[24]
    place = 8
    while place + 8 <= len(start):  # chunks: length, kind, content, checksum
        length, kind = struct.unpack_from(">I4s", start, place)
        if kind == b"sBIT":
            used = max(start[place + 8 : place + 8 + length], default=depth)
        if kind in (b"sBIT", b"PLTE", b"IDAT"):
            break
        place += 12 + length
    return depth, used if 0 < used <= depth else depth
