"""Stage ``preferences``: the 3-D drawing of a trained concept is chosen over the flat one; packed with a split."""

import torch
from safetensors.torch import save_file

from diffusion_align.data.drawings import encode_drawing

from .common import Build, written_atomically
from .data import Concept, load_drawings

HELDOUT_FRACTION = 0.2


def split_concepts(labels: list[str], seed: int) -> dict[str, str]:
    """Label -> "train" or "heldout": a seeded shuffle, the first fifth is held out."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    heldout = set(order[: round(HELDOUT_FRACTION * len(labels))])
    return {label: "heldout" if index in heldout else "train" for index, label in enumerate(labels)}


def pack(drawings: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, ends): the encoded drawings in one uint8 tensor, and where each one ends."""
    encoded = [encode_drawing(drawing) for drawing in drawings]
    ends = torch.tensor([len(data) for data in encoded]).cumsum(0)
    return torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8), ends


def build_preferences(build: Build) -> None:
    """Writes ``preferences.safetensors`` and ``preferences.tsv`` (columns: row, label, prompt, split)."""
    target, table = build.out / "preferences.safetensors", build.out / "preferences.tsv"
    if target.exists() and table.exists():
        return
    drawings = load_drawings(build)
    rows = drawings.table(("3d", "flat"), trained_only=True)
    pairs: list[tuple[Concept, int, int]] = [
        (drawings.concepts[index], of["3d"], of["flat"]) for index, of in sorted(rows.items()) if len(of) == 2
    ]
    split = split_concepts([concept.label for concept, _, _ in pairs], build.seed)
    tensors = {}
    for side, column in (("chosen", 1), ("rejected", 2)):
        tensors[side], tensors[f"{side}_ends"] = pack([drawings.rgba[pair[column]] for pair in pairs])
    metadata = {
        "format": "lossless WebP, 64x64 premultiplied RGBA; drawing i is bytes ends[i-1] (0 for i=0) to ends[i]",
        "chosen": "Fluent Emoji 3D (Microsoft, MIT)",
        "rejected": "Fluent Emoji Flat (Microsoft, MIT)",
        "split_seed": str(build.seed),
    }
    with written_atomically(table) as temporary:
        lines = [
            f"{row}\t{concept.label}\ta {concept.label}\t{split[concept.label]}"
            for row, (concept, _, _) in enumerate(pairs)
        ]
        temporary.write_text("\n".join(["row\tlabel\tprompt\tsplit", *lines]) + "\n", encoding="utf-8")
    with written_atomically(target) as temporary:
        save_file(tensors, temporary, metadata=metadata)
