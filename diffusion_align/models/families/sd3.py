"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): two CLIP text encoders and T5, which may be absent.

Guidance is classifier-free, its pooled states included; the pipeline's skip-layer guidance is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_align.errors import ConfigError
from diffusion_align.models.families.contract import Conditioning
from diffusion_align.models.families.flow import FlowFamily
from diffusion_align.models.families.flow_matching import set_spaced_timesteps

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StableDiffusion3(FlowFamily):
    pipelines: ClassVar[Sequence[str]] = ("StableDiffusion3Pipeline",)
    network_class: ClassVar[str] = "SD3Transformer2DModel"
    tokens: ClassVar[int] = 256

    @property
    def load_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        return {} if self.t5 else {"text_encoder_3": None, "tokenizer_3": None}

    def check_sides(self, config: Mapping[str, Any], vae: Mapping[str, Any], sides: Mapping[str, int]) -> None:
        """Also that there is an embedding of every position, of which ``pos_embed_max_size`` is the number."""
        super().check_sides(config, vae, sides)
        if not (positions := config.get("pos_embed_max_size")):
            return
        most = positions * self.patch_size(config) * self.vae_factor(vae)
        problems = [
            f"{name}={side} is too large: this model knows images of up to {most} pixels"
            for name, side in sides.items()
            if side > most
        ]
        if problems:
            raise ConfigError(problems)

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int | None) -> None:
        set_spaced_timesteps(scheduler, steps, tokens)

    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        states, _, pooled, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def inputs(self, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        return {"timestep": timestep, **{name: value.to(dtype) for name, value in conditioning.items()}}

    def prompt_tokens(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Of CLIP, and after them of T5, which are there without T5 too."""
        return super().prompt_tokens(configs) + self.text_tokens

    def zero_conditioning(self, config: Mapping[str, Any], batch: int, tokens: int, **kind: Any) -> Conditioning:
        import torch

        return {
            "encoder_hidden_states": torch.zeros(batch, tokens, config["joint_attention_dim"], **kind),
            "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"], **kind),
        }
