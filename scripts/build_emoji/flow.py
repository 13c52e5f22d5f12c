"""Stage ``flow``: a small SD3 transformer on the latents of emoji-sd, rectified flow with velocity prediction.

The VAE, the tokenizer and the text tower are those of emoji-sd and emoji-clip. ``StableDiffusion3Pipeline`` wants two
more text encoders; theirs are tiny and all their weights are zero.
"""

import copy
import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_align.pretrained import load_in_dtype

from .clip import with_text_model_prefix
from .common import Build, mean_of_last, train, written_atomically
from .data import load_drawings
from .examples import Examples
from .models import existing, load_clip, tokenize
from .velocity import Velocities

BATCH = 64
ZERO_WIDTH = 8
"""Width of the second text encoder, whose embeddings are zeros."""
MOST_ZERO_TOKENS = 512
CONFIG = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 128 + ZERO_WIDTH,
    "caption_projection_dim": 128,
    "pooled_projection_dim": 128 + ZERO_WIDTH,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}
PARTS = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
    "image_encoder": (None, None),
    "feature_extractor": (None, None),
}


@torch.no_grad()
def initialise(network) -> None:
    """DiT's weights: Xavier, and zeros in the gates of the blocks and in the output: blocks start as the identity."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(network.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(network.pos_embed.proj.bias)
    embedder = network.time_text_embed.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02)
    for block in network.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1_context.linear.weight)
    nn.init.zeros_(network.norm_out.linear.weight)
    nn.init.zeros_(network.proj_out.weight)


class CountedAttention:
    """The attention of diffusers' ``JointAttnProcessor2_0``, where the last text token stands for ``count`` equal ones.

    The pipeline appends the states of its third text encoder, here ``max_sequence_length`` tokens of zeros. Without
    positions they stay equal to each other throughout, so N of them act as one whose weight in the softmax is N:
    training sees any number of them at the price of one. Plain matrix products, as the backward pass of fused attention
    is slow on a CPU. ``log_count`` is (B, 1, 1, 1) or a number; −inf for none.
    """

    log_count: Tensor | float = 0.0

    def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
        def heads(image: Tensor, text: Tensor, image_norm=None, text_norm=None) -> Tensor:
            split = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (image, text)]
            norms = (image_norm, text_norm)
            return torch.cat([x if norm is None else norm(x) for x, norm in zip(split, norms)], 2)

        x, y = hidden_states, encoder_hidden_states
        q = heads(attn.to_q(x), attn.add_q_proj(y), attn.norm_q, attn.norm_added_q)
        k = heads(attn.to_k(x), attn.add_k_proj(y), attn.norm_k, attn.norm_added_k)
        v = heads(attn.to_v(x), attn.add_v_proj(y))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        last = torch.arange(scores.shape[-1], device=x.device) == scores.shape[-1] - 1
        scores = scores + torch.where(last, self.log_count, 0.0)
        out = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        image, text = out.split([x.shape[1], y.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](image)), text if attn.context_pre_only else attn.to_add_out(text)


def projected_text_tower(clip):
    """emoji-clip's text tower with its projection, as the ``CLIPTextModelWithProjection`` of the pipeline."""
    from transformers import CLIPTextModelWithProjection

    config = copy.deepcopy(clip.config.text_config)
    config.projection_dim = clip.config.projection_dim
    encoder = CLIPTextModelWithProjection(config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    return encoder.to(clip.device).eval().requires_grad_(False)


@torch.no_grad()
def encode(encoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 25, 136) token states, the last one zeros, and (B, 136) pooled embeddings, as the pipeline computes them."""
    output = encoder(tokens, output_hidden_states=True)
    states, pooled = output.hidden_states[-2].float(), output.text_embeds.float()
    return F.pad(states, (0, ZERO_WIDTH, 0, 1)), F.pad(pooled, (0, ZERO_WIDTH))


def build_flow(build: Build) -> None:
    """Writes the whole ``emoji-flow`` pipeline (fp16) and ``flow.json``."""
    folder = build.out / "emoji-flow"
    if (build.work / "flow.json").exists() and (folder / "model_index.json").exists():
        return
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    vae = existing(build.out / "emoji-sd" / "vae", "vae")
    vae = load_in_dtype(AutoencoderKL.from_pretrained, vae, dtype=torch.float32).to(build.device)
    clip, tokenizer = load_clip(build)
    encoder = projected_text_tower(clip)
    examples = Examples(load_drawings(build), build.seed)
    velocities = Velocities(examples, examples.latents(build, vae))
    torch.manual_seed(build.seed)
    network = SD3Transformer2DModel(**CONFIG)
    initialise(network)
    network.to(build.device)
    attention = CountedAttention()
    network.set_attn_processor(attention)

    def loss_at(generator: torch.Generator) -> Tensor:
        batch = velocities.batch(generator, BATCH)
        # Two in five without tokens of zeros, the others with 1 to 512.
        log_count = torch.rand(BATCH, generator=generator) * math.log(MOST_ZERO_TOKENS)
        log_count[torch.rand(BATCH, generator=generator) < 0.4] = -torch.inf
        attention.log_count = log_count.view(-1, 1, 1, 1).to(build.device)
        with build.autocast():
            states, pooled = encode(encoder, tokenize(tokenizer, batch.captions).to(build.device))
            x_t, timestep = batch.x_t.to(build.device), 1000 * batch.t.to(build.device)
            v = network(x_t, encoder_hidden_states=states, pooled_projections=pooled, timestep=timestep).sample
        return F.mse_loss(v.float(), batch.velocity.to(build.device))

    steps = build.steps(6300)
    losses = train(build, "flow", network, loss_at, steps=steps, lr=1.5e-3, warmup=95, ema_decay=0.998)
    save_pipeline(build, network, encoder)
    with written_atomically(build.work / "flow.json") as temporary:
        figures = {"loss": mean_of_last(losses), "steps": steps, "images": BATCH * steps}
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def save_pipeline(build: Build, network, encoder) -> None:
    """``emoji-flow`` in fp16: this transformer and text tower, the VAE and the tokenizer of ``emoji-sd``, and zeros."""
    import diffusers

    folder, shared = build.out / "emoji-flow", build.out / "emoji-sd"
    network.half().save_pretrained(folder / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    for copied, name in (("vae", "vae"), ("tokenizer", "tokenizer"), ("tokenizer", "tokenizer_2")):
        shutil.copytree(shared / copied, folder / name, dirs_exist_ok=True)
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    _write_json(folder / "vae" / "config.json", vae | {"shift_factor": 0.0})  # the pipeline cannot add null
    for name, part in (("text_encoder", encoder), ("text_encoder_2", _zero_encoder(encoder))):
        part.config.name_or_path = ""
        part.half().save_pretrained(folder / name)
        weights = folder / name / "model.safetensors"
        with written_atomically(weights) as temporary:
            save_file(with_text_model_prefix(load_file(weights)), temporary, metadata={"format": "pt"})
    _zero_t5(network.config.joint_attention_dim).half().save_pretrained(folder / "text_encoder_3")
    _save_zero_tokenizer(folder / "tokenizer_3")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes its files private
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": diffusers.__version__, **PARTS}
    _write_json(folder / "model_index.json", index)


def _zero_encoder(encoder):
    """A text encoder of one layer, ``ZERO_WIDTH`` wide, whose weights are zero."""
    config = copy.deepcopy(encoder.config)
    config.hidden_size = config.intermediate_size = config.projection_dim = ZERO_WIDTH
    config.num_attention_heads = config.num_hidden_layers = 1
    return _zeroed(type(encoder)(config))


def _zero_t5(width: int):
    """A T5 encoder whose weights are zero: its states are the zeros that the pipeline uses where there is no T5."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=4, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    return _zeroed(T5EncoderModel(config))


def _zeroed(module: nn.Module) -> nn.Module:
    module.requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    return module


def _save_zero_tokenizer(folder: Path) -> None:
    """A T5 tokenizer of three tokens, in the two files that transformers 4 and 5 read."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in special.values()], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(special.values()))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": MOST_ZERO_TOKENS, "extra_ids": 0} | special
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
