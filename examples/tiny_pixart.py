"""Write a PixArt-Sigma with 60 000 random weights, to try pixart.py without a download: python tiny_pixart.py FOLDER"""

import sys

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel


def tiny_pixart() -> PixArtSigmaPipeline:
    """A pipeline for images of 16×16 pixels; its tokenizer knows lower-case letters."""
    torch.manual_seed(0)
    known = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    letters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    text = T5Config(vocab_size=len(known), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16],
        norm_num_groups=4,
        sample_size=16,
    )
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="</s>"),
        text_encoder=T5EncoderModel(text),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


if __name__ == "__main__":
    tiny_pixart().save_pretrained(sys.argv[1])
