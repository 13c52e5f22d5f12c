"""Stage ``clip``: tokenizer and a small CLIP over the trained concepts; its text tower becomes the pipeline's."""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_align.data.drawings import BACKGROUNDS, composite

from .augment import degrade, move
from .captions import COLOURS, TEMPLATES, Look, caption, matches, random_caption
from .common import Build, choose, mean_of_last, train, written_atomically
from .data import STYLE_WORD, Concept, Drawings, load_drawings
from .models import embed_captions, embed_images, features, tokenize
from .tokenizer import learn_tokenizer, save_tokenizer

SOURCES = ("noto", "noto_v1", "flat", "3d")
CONCEPTS_A_BATCH, VIEWS = 96, 2


def tokenizer_corpus(concepts: list[Concept]) -> list[str]:
    """Captions that spell every label and tag of all concepts in every template, and every colour and style."""
    names = [name for c in concepts for name in (c.label, *c.tags)]
    plain = [template.format(name) for template in dict.fromkeys(TEMPLATES) for name in names]
    coloured = [
        caption(c.label, colour=colour, style=style) for c in concepts for colour in COLOURS for style in STYLES
    ]
    return plain + coloured


STYLES = tuple(dict.fromkeys(STYLE_WORD.values()))


def contrastive_loss(images: Tensor, texts: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
    """Multi-positive contrastive loss in nats: cross-entropy to the uniform distribution over the positives.

    Args:
        images: (N, D) embeddings, normalised here.
        texts: (N, D) embeddings, normalised here.
        positive: (N, N) bool, ``positive[i, j]``: caption j contradicts nothing of image i.
        scale: () the inverse temperature.
    """
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = positive.to(logits.dtype)
    rows = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, (target / target.sum(0, keepdim=True)).T)
    return (rows + columns) / 2


def retrieval(clip, tokenizer, drawings: Drawings, sources: tuple[str, ...]) -> dict[str, float]:
    """R@1 and R@5 of a drawing's label among all trained labels, and of its background among the 12 colours."""
    rows = drawings.table(sources, trained_only=True)
    index = {concept: i for i, concept in enumerate(sorted(rows))}
    labels = [drawings.concepts[concept].label for concept in index]
    texts = embed_captions(clip, tokenizer, [caption(label) for label in labels])
    picked = [(concept, row) for concept, of in rows.items() for row in of.values()]
    colours = torch.arange(len(picked)) % len(COLOURS)
    images = composite(drawings.rgba[[row for _, row in picked]], torch.tensor(list(BACKGROUNDS.values()))[colours])
    embedded = embed_images(clip, images)
    truth = torch.tensor([index[concept] for concept, _ in picked])[:, None]
    top = (embedded @ texts.T).topk(5, dim=1).indices
    right = 0
    for i, (concept, _) in enumerate(picked):
        told = [caption(drawings.concepts[concept].label, colour=colour) for colour in COLOURS]
        right += int((embed_captions(clip, tokenizer, told) @ embedded[i]).argmax() == colours[i])
    return {
        "R@1": (top[:, :1] == truth).any(1).float().mean().item(),
        "R@5": (top == truth).any(1).float().mean().item(),
        "colour": right / len(picked),
        "images": len(picked),
    }


def clip_config(vocabulary: int):
    """The shipped architecture: a 3-layer text tower and a 4-layer ViT on 8x8 patches, 128 wide, 128 shared."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    shared = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    text = CLIPTextConfig(vocab_size=vocabulary, max_position_embeddings=24, num_hidden_layers=3, **shared, **special)
    vision = CLIPVisionConfig(image_size=64, patch_size=8, num_hidden_layers=4, **shared)
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)


def build_clip(build: Build) -> None:
    """Writes ``emoji-clip``, and ``text_encoder`` and ``tokenizer`` of ``emoji-sd``, all fp16; ``clip.json``."""
    if (build.work / "clip.json").exists() and (build.out / "emoji-clip" / "model.safetensors").exists():
        return
    from transformers import CLIPModel, CLIPTextModel

    drawings = load_drawings(build)
    tokenizer = learn_tokenizer(tokenizer_corpus(drawings.concepts))
    for folder in (build.out / "emoji-clip" / "tokenizer", build.out / "emoji-sd" / "tokenizer"):
        save_tokenizer(tokenizer, folder)
    fast = _clip_tokenizer(build)
    torch.manual_seed(build.seed)
    clip = CLIPModel._from_config(clip_config(tokenizer.get_vocab_size()), attn_implementation="eager")
    clip = clip.to(build.device)
    rows = drawings.table(SOURCES, trained_only=True)
    trained = sorted(rows)
    colours = torch.tensor(list(BACKGROUNDS.values()))

    def loss_at(generator: torch.Generator) -> Tensor:
        picked = torch.randperm(len(trained), generator=generator)[:CONCEPTS_A_BATCH].tolist()
        seen, said, texts, sampled = [], [], [], []
        for concept in (trained[i] for i in picked for _ in range(VIEWS)):
            options = list(rows[concept].items())
            source, row = options[choose(generator, options, 1)[0]]
            look = Look(concept, COLOURS[choose(generator, COLOURS, 1)[0]], STYLE_WORD[source])
            names = [drawings.concepts[concept].label, *drawings.concepts[concept].tags]
            text, told = random_caption(
                generator, names, look, colour_probability=0.5, style_probability=0.4, tag_probability=0.2
            )
            seen.append(look), said.append(told), texts.append(text), sampled.append(row)
        positive = torch.tensor([[matches(told, look) for told in said] for look in seen])
        background = colours[[COLOURS.index(look.colour) for look in seen]]
        images = degrade(composite(move(drawings.rgba[sampled], generator), background), generator)
        with build.autocast():
            image = features(clip.get_image_features((images * 2 - 1).to(build.device)))
            text = features(clip.get_text_features(tokenize(fast, texts).to(build.device)))
        scale = clip.logit_scale.clamp(max=4.6).exp()
        return contrastive_loss(image.float(), text.float(), positive.to(build.device), scale)

    losses = train(build, "clip", clip, loss_at, steps=build.steps(1300), lr=1.5e-3, warmup=100, ema_decay=0.99)
    figures = {
        "loss": mean_of_last(losses),
        "seen_styles": retrieval(clip, fast, drawings, ("noto", "flat", "3d")),
        "unseen_style": retrieval(clip, fast, drawings, ("gradient",)),
    }
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(_text_tower(clip, text_encoder))
    clip.half().save_pretrained(build.out / "emoji-clip")
    folder = build.out / "emoji-sd" / "text_encoder"
    text_encoder.half().save_pretrained(folder)
    weights = folder / "model.safetensors"
    with written_atomically(weights) as temporary:
        save_file(with_text_model_prefix(load_file(weights)), temporary, metadata={"format": "pt"})
    with written_atomically(build.work / "clip.json") as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _clip_tokenizer(build: Build):
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(build.out / "emoji-clip" / "tokenizer")


def _text_tower(clip, text_encoder) -> dict[str, Tensor]:
    """CLIP's text weights under the names of this transformers version's CLIPTextModel."""
    tower = {k.removeprefix("text_model."): v for k, v in clip.text_model.state_dict().items()}
    wanted = text_encoder.state_dict()
    return {name: tower[name.removeprefix("text_model.")] for name in wanted}


def with_text_model_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text-encoder weights as transformers 4 names them; transformers 5 reads both and writes them without prefix."""
    named = ("text_model.", "text_projection.")
    return {name if name.startswith(named) else f"text_model.{name}": w for name, w in weights.items()}
