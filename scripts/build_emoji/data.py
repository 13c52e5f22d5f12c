"""Stage ``data``: npm packages -> ``drawings.safetensors`` (every drawing, 64x64 premultiplied RGBA) and their names.

A drawing is cropped to what is drawn, fitted to 56 px and centred in 64; premultiplied alpha makes every later
resize and composite a linear operation.
"""

import io
import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .common import Build, BuildError, written_atomically

SIZE, FIT = 64, 56

PACKAGES = {
    "emojibase": "emojibase-data@17.0.0",
    "noto": "emoji-datasource-google@16.0.0",
    "noto_v1": "@iconify-json/noto-v1@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "gradient": "@iconify-json/fluent-emoji@1.2.7",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
"""Source -> npm package and the version the shipped model was made from; the licences are in ``assets/NOTICE``."""

SOURCES = ("noto", "noto_v1", "flat", "gradient", "3d")
STYLE_WORD = {"noto": "cartoon", "noto_v1": "cartoon", "flat": "flat", "3d": "3d"}
"""Source -> the word captions use; "gradient" has none: it is the style that CLIP never sees."""

# Tags that are rude, or name no thing that can be drawn.
UNWANTED_TAGS = """
    af ass bae bs drugs drunk dung fml gay genderqueer glbt glbtq ily lesbian lgbt lgbtq lgbtqia lit litaf lmao lol lust
    menstruation omg queer rofl roflmao sexy slay smh stroke tbt thong thongs trans transgender turd ugly yolo
"""


@dataclass(frozen=True)
class Concept:
    """One row of ``emoji-concepts.tsv``; ``trained`` marks those that CLIP and the UNet learn."""

    label: str
    hexcode: str
    trained: bool
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawings:
    """All drawings: (N, 64, 64, 4) uint8 premultiplied RGBA, and for each its concept and source."""

    concepts: list[Concept]
    rgba: torch.Tensor
    concept: torch.Tensor
    source: torch.Tensor

    def table(self, sources: tuple[str, ...], trained_only: bool) -> dict[int, dict[str, int]]:
        """Concept index -> source -> row of ``rgba``, of the sources asked for."""
        rows: dict[int, dict[str, int]] = {}
        for row, (concept, source) in enumerate(zip(self.concept.tolist(), self.source.tolist())):
            if SOURCES[source] in sources and (self.concepts[concept].trained or not trained_only):
                rows.setdefault(concept, {})[SOURCES[source]] = row
        return rows


def read_concepts(path: Path) -> list[Concept]:
    """Rows of a concepts table (label, hexcode, group, trained; tab-separated, one header line)."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [Concept(label, hexcode, trained == "1") for label, hexcode, _, trained in rows]


def useful_tags(tags: dict[str, list[str]], most: int = 3) -> dict[str, tuple[str, ...]]:
    """Tags that say which concept is meant: plain words of at most ``most`` concepts, not rude, not in the label."""
    unwanted = frozenset(UNWANTED_TAGS.split())
    counts = Counter(tag for each in tags.values() for tag in set(each))

    def keep(label: str, tag: str) -> bool:
        plain = re.fullmatch(r"[a-z]{3,}", tag) is not None
        return plain and counts[tag] <= most and tag not in unwanted and tag not in label.split()

    return {label: tuple(tag for tag in each if keep(label, tag)) for label, each in tags.items()}


def fetch(package: str, cache: Path) -> Path:
    """Folder of an unpacked npm package, downloaded with ``npm pack`` unless the cache has it."""
    folder = cache / re.sub(r"[^a-z0-9.]+", "-", package.removeprefix("@"))
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        raise BuildError(f"npm is not on PATH and {folder} does not exist: install Node.js, or unpack {package} there")
    cache.mkdir(parents=True, exist_ok=True)
    packed = subprocess.run(
        ["npm", "pack", package, "--silent", "--pack-destination", str(cache)], capture_output=True, encoding="utf-8"
    )
    if packed.returncode != 0:
        last = (packed.stderr.strip().splitlines() or ["no message"])[-1]
        raise BuildError(f"npm could not download {package} ({last}): check the network, or unpack it into {folder}")
    archive = cache / packed.stdout.strip().splitlines()[-1]
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(temporary, filter="data")
    (temporary / "package").rename(folder)
    shutil.rmtree(temporary)
    archive.unlink()
    return folder


def fit(image: Image.Image) -> np.ndarray:
    """(64, 64, 4) uint8 premultiplied RGBA of a drawing, cropped to what is drawn and fitted to 56 px."""
    rgba = np.asarray(image.convert("RGBA"), dtype=np.float32)
    seen = rgba[..., 3] > 8
    if not seen.any():
        raise ValueError("the drawing is empty")
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    rgba = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    rgba[..., :3] *= rgba[..., 3:] / 255
    scale = FIT / max(rgba.shape[:2])
    width, height = (max(1, round(side * scale)) for side in (rgba.shape[1], rgba.shape[0]))
    # Channel by channel in floats: Pillow would round the premultiplied colours of an RGBA image twice.
    planes = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS) for plane in np.moveaxis(rgba, 2, 0)
    ]
    fitted = np.clip(np.stack([np.asarray(plane) for plane in planes], -1), 0, 255)
    fitted[..., :3] = np.minimum(fitted[..., :3], fitted[..., 3:])
    canvas = np.zeros((SIZE, SIZE, 4), np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    canvas[top : top + height, left : left + width] = np.round(fitted)
    return canvas


def slug(label: str) -> str:
    """The name an icon set gives to an emoji's label: "ear of corn" -> "ear-of-corn"."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", ascii_label).strip("-")


class IconSet:
    """SVG drawings of an Iconify package, found by hexcode where it has a table of them, else by label."""

    def __init__(self, folder: Path):
        self.icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        chars = folder / "chars.json"
        self.names = json.loads(chars.read_text(encoding="utf-8")) if chars.exists() else {}

    def image(self, concept: Concept) -> Image.Image | None:
        try:
            import resvg_py
        except ImportError as error:
            raise BuildError("rendering SVGs needs resvg_py: pip install 'diffusion-align[build-emoji]'") from error
        hexcode = concept.hexcode
        for name in (self.names.get(hexcode), self.names.get(hexcode.replace("-fe0f", "")), slug(concept.label)):
            name = self.icons.get("aliases", {}).get(name, {}).get("parent", name)
            icon = self.icons["icons"].get(name)
            if icon is not None:
                width = icon.get("width", self.icons.get("width", 16))
                height = icon.get("height", self.icons.get("height", 16))
                svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
                return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE))))
        return None


class ImageFolder:
    """Drawings stored as one image a hexcode."""

    def __init__(self, folder: Path, suffix: str):
        self.folder, self.suffix = folder, suffix

    def image(self, concept: Concept) -> Image.Image | None:
        for name in (concept.hexcode, concept.hexcode + "-fe0f", concept.hexcode.replace("-fe0f", "")):
            path = self.folder / f"{name}{self.suffix}"
            if path.exists():
                return Image.open(path)
        return None


def build_data(build: Build) -> None:
    """Writes ``drawings.safetensors``; its metadata hold the concepts with their tags."""
    target = build.work / "drawings.safetensors"
    if target.exists():
        return
    cache = build.work / "npm"
    folders = {source: fetch(package, cache) for source, package in tqdm(PACKAGES.items(), "npm", unit="package")}
    names = {
        e["hexcode"].lower(): e for e in json.loads((folders["emojibase"] / "en" / "data.json").read_text("utf-8"))
    }
    concepts = read_concepts(build.concepts)
    tags = useful_tags({c.label: names.get(c.hexcode, {}).get("tags", []) for c in concepts})
    concepts = [Concept(c.label, c.hexcode, c.trained, tags[c.label]) for c in concepts]
    sets = {
        "noto": ImageFolder(folders["noto"] / "img" / "google" / "64", ".png"),
        "3d": ImageFolder(folders["3d"] / "assets", ".webp"),
    } | {source: IconSet(folders[source]) for source in ("noto_v1", "flat", "gradient")}
    rgba, concept_of, source_of = [], [], []
    for index, concept in enumerate(tqdm(concepts, "drawings", unit="concept")):
        for source in SOURCES:
            image = sets[source].image(concept)
            if image is not None:
                rgba.append(fit(image))
                concept_of.append(index)
                source_of.append(SOURCES.index(source))
    tensors = {
        "rgba": torch.from_numpy(np.stack(rgba)),
        "concept": torch.tensor(concept_of, dtype=torch.int32),
        "source": torch.tensor(source_of, dtype=torch.int32),
    }
    table = json.dumps([[c.label, c.hexcode, c.trained, c.tags] for c in concepts])
    with written_atomically(target) as temporary:
        save_file(tensors, temporary, metadata={"concepts": table, "sources": json.dumps(SOURCES)})


def load_drawings(build: Build) -> Drawings:
    """What stage ``data`` wrote."""
    path = build.work / "drawings.safetensors"
    if not path.exists():
        raise BuildError(f"{path} is missing: run the stage data first (--stages data)")
    with safe_open(path, "pt") as file:
        rows = json.loads(file.metadata()["concepts"])
        concepts = [Concept(label, hexcode, trained, tuple(tags)) for label, hexcode, trained, tags in rows]
        return Drawings(concepts, file.get_tensor("rgba"), file.get_tensor("concept"), file.get_tensor("source"))
