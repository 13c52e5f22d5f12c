"""Stage ``head``: a Bradley-Terry head on the emoji-clip image embedding, from the preference pairs.

The two drawings of a pair are moved, tinted, blurred and made noisy independently of each other, every other pair is
put on two different backgrounds, and half of them pass through the VAE: what is left to tell them apart is the style.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import trange

from diffusion_align.data.drawings import BACKGROUNDS, composite, decode_drawing
from diffusion_align.estimators import bradley_terry_loss
from diffusion_align.pretrained import load_in_dtype

from .augment import degrade, move
from .captions import COLOURS, caption
from .common import Build, choose, written_atomically
from .data import load_drawings
from .models import draw, embed_images, existing, load_clip, load_pipeline

Pairs = tuple[Tensor, Tensor]


def read_pairs(build: Build, split: str) -> tuple[list[str], Pairs]:
    """Labels and (chosen, rejected) drawings (N, 64, 64, 4) of one split of the build's own preference files."""
    from safetensors import safe_open

    table = existing(build.out / "preferences.tsv", "preferences").read_text(encoding="utf-8").splitlines()[1:]
    chosen_rows = [(int(row), label) for row, label, _, part in (line.split("\t") for line in table) if part == split]
    with safe_open(existing(build.out / "preferences.safetensors", "preferences"), "pt") as file:

        def side(name: str) -> Tensor:
            data, ends = file.get_tensor(name).numpy(), [0, *file.get_tensor(f"{name}_ends").tolist()]
            return torch.stack([decode_drawing(data[ends[r] : ends[r + 1]].tobytes()) for r, _ in chosen_rows])

        return [label for _, label in chosen_rows], (side("chosen"), side("rejected"))


def through_vae(vae, images: Tensor) -> Tensor:
    """Images in [0, 1] encoded and decoded: the softness that every generated image has."""
    with torch.no_grad():
        chunks = images.to(vae.device).split(32)
        decoded = [vae.decode(vae.encode(chunk * 2 - 1).latent_dist.mode()).sample for chunk in chunks]
        return ((torch.cat(decoded) + 1) / 2).clamp(0, 1).cpu()


def embed_rounds(clip, vae, pairs: Pairs, rounds: int, seed: int) -> Pairs:
    """((R·N, 128), (R·N, 128)) embeddings of augmented pairs; every round looks at every pair once."""
    colours = torch.tensor(list(BACKGROUNDS.values()))
    chosen, rejected = [], []
    for r in trange(rounds, desc="embed pairs", unit="round"):
        generator = torch.Generator().manual_seed(seed + r)
        N = len(pairs[0])
        first = torch.tensor(choose(generator, COLOURS, N))
        other = torch.tensor(choose(generator, COLOURS, N)) if r % 2 else first
        for side, background, out in ((pairs[0], first, chosen), (pairs[1], other, rejected)):
            images = degrade(composite(move(side, generator), colours[background]), generator)
            out.append(embed_images(clip, through_vae(vae, images) if r % 4 >= 2 else images))
    return torch.cat(chosen), torch.cat(rejected)


def clean_margins(clip, head: nn.Linear, pairs: Pairs) -> Tensor:
    """(12, N) score of chosen minus score of rejected, unaltered, on every background."""
    with torch.no_grad():
        margins = []
        for colour in BACKGROUNDS.values():
            a, b = (head(embed_images(clip, composite(side, colour))).squeeze(-1) for side in pairs)
            margins.append(a - b)
    return torch.stack(margins)


def fit_head(
    chosen: Tensor, rejected: Tensor, *, across: float = 0.3, ridge: float = 3e-4, iterations: int = 300
) -> tuple[nn.Linear, float]:
    """The linear head that minimises the Bradley-Terry loss + ridge·‖w‖²/2, and its loss in nats on the pairs.

    A weight of ``across`` goes to comparisons across concepts, any chosen drawing against any rejected one: without
    them the score varies more between concepts than between styles, which a reward's baseline would have to undo.
    Only differences of scores are seen, so that the bias is free: it is set to make the mean score 0.

    Args:
        chosen: (N, D) embeddings.
        rejected: (N, D) embeddings; row i is compared with row i of ``chosen``, and with four others.
        across: weight in [0, 1] of the comparisons across concepts.
        ridge: strength of the quadratic penalty.
        iterations: at most, of L-BFGS.
    """
    weight = torch.zeros(chosen.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=iterations, line_search_fn="strong_wolfe")
    generator = torch.Generator().manual_seed(0)
    others = torch.cat([torch.randperm(len(rejected), generator=generator) for _ in range(4)])

    def closure() -> Tensor:
        optimizer.zero_grad()
        winners, losers = chosen @ weight, rejected @ weight
        within = bradley_terry_loss(winners, losers).mean()
        between = bradley_terry_loss(winners.repeat(4), losers[others]).mean()
        loss = (1 - across) * within + across * between + ridge * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    head = nn.Linear(chosen.shape[1], 1).requires_grad_(False)
    head.weight.copy_(weight.detach()[None])
    head.bias.copy_(-(torch.cat([chosen, rejected]) @ weight.detach()).mean()[None])
    return head, bradley_terry_loss(chosen @ weight, rejected @ weight).mean().item()


def generated_check(build: Build, clip, head: nn.Linear, labels: list[str], guidance: float) -> dict[str, float]:
    """How the head ranks emoji-sd's own "3d style" and "flat style" images of the same concept and seed."""
    pipe = load_pipeline(build)
    score = {}
    for style in ("3d", "flat", None):
        prompts = [caption(label, style=style) for label in labels]
        images = draw(pipe, prompts, steps=10, guidance=guidance, eta=1.0, seed=build.seed)
        with torch.no_grad():
            score[style] = head(embed_images(clip, images)).squeeze(-1)
    wins = (score["3d"][:, None] > score["flat"][None]).float().mean().item()
    return {
        "same_concept_accuracy": (score["3d"] > score["flat"]).float().mean().item(),
        "any_concept_accuracy": wins,
        "mean_3d": score["3d"].mean().item(),
        "mean_flat": score["flat"].mean().item(),
        "mean_no_style": score[None].mean().item(),
        "std_no_style": score[None].std().item(),
        "images_a_style": len(labels),
    }


def build_head(build: Build) -> None:
    """Writes ``aesthetic_head.safetensors`` (weight (1, 128), bias (1)) and ``aesthetic_head.json`` (its figures)."""
    target = build.out / "aesthetic_head.safetensors"
    if target.exists():
        return
    from diffusers import AutoencoderKL

    clip, _ = load_clip(build)
    folder = existing(build.out / "emoji-sd" / "vae", "vae")
    vae = load_in_dtype(AutoencoderKL.from_pretrained, folder, dtype=torch.float32)
    vae = vae.to(build.device).eval()
    labels, train_pairs = read_pairs(build, "train")
    heldout_labels, heldout_pairs = read_pairs(build, "heldout")
    chosen, rejected = embed_rounds(clip, vae, train_pairs, build.steps(24), 1_000_003 * (build.seed + 1))
    head, loss = fit_head(chosen, rejected)

    drawings = load_drawings(build)
    never = drawings.table(("3d", "flat"), trained_only=False)
    never = [of for index, of in never.items() if not drawings.concepts[index].trained and len(of) == 2]
    never_pairs = tuple(drawings.rgba[[of[style] for of in never]] for style in ("3d", "flat"))
    altered = [m.squeeze(-1) for m in map(head, embed_rounds(clip, vae, heldout_pairs, 8, 17))]
    heldout, unseen = clean_margins(clip, head, heldout_pairs), clean_margins(clip, head, never_pairs)
    figures = {
        "train_loss_nats": loss,
        "train_pairs": len(labels),
        "heldout_pairs": heldout.numel(),
        "heldout_concepts": len(heldout_labels),
        "heldout_accuracy": (heldout > 0).float().mean().item(),
        "heldout_accuracy_white": (heldout[0] > 0).float().mean().item(),
        "heldout_loss_nats": F.softplus(-heldout).mean().item(),
        "heldout_altered_accuracy": (altered[0] > altered[1]).float().mean().item(),
        "unseen_concepts": unseen.shape[1],
        "unseen_accuracy": (unseen > 0).float().mean().item(),
        "generated": {f"guidance_{g}": generated_check(build, clip, head, heldout_labels, g) for g in (1.0, 3.0)},
    }
    metadata = {
        "architecture": "one linear layer: score = weight @ (image embedding of emoji-clip, scaled to length 1) + bias",
        "input": "emoji-clip embedding (128) of a 64x64 RGB image scaled to [-1, 1]",
        "trained_on": f"{len(labels)} concepts of preferences.safetensors, 3-D over flat drawing, Bradley-Terry",
        "heldout_pair_accuracy": f"{figures['heldout_accuracy']:.4f} of {figures['heldout_pairs']} pairs "
        f"({len(heldout_labels)} concepts x {len(BACKGROUNDS)} backgrounds)",
        "unit": "log-odds of being preferred (nats); 0 is the mean over altered training drawings",
    }
    with written_atomically(build.out / "aesthetic_head.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    with written_atomically(target) as temporary:
        save_file({"weight": head.weight.data, "bias": head.bias.data}, temporary, metadata=metadata)
