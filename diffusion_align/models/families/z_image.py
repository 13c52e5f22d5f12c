"""Z-Image (arXiv:2511.22699): a transformer of one stream, which reads the states of a Qwen3 language model.

Three things are its own. Its time runs from noise to image, and what it predicts is the negative of what others do. It
is given each prompt without padding, which the mask of the conditioning leaves out. And its pipeline counts guidance
from 0: ``guidance_scale`` is here, as everywhere, 1 where there is none, and one less in the pipeline's own call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_align.models.families.contract import ATTENTION, Conditioning
from diffusion_align.models.families.flow import FlowFamily
from diffusion_align.models.families.flow_matching import dynamic_shift

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PATCH = 2
"""Latents along the side of a token, by default of the network."""
SIDE = 128
"""Of the latents by default, as in diffusers' pipeline; the network's configuration names none."""


class ZImage(FlowFamily):
    pipelines: ClassVar[Sequence[str]] = ("ZImagePipeline",)
    network_class: ClassVar[str] = "ZImageTransformer2DModel"
    tokens: ClassVar[int] = 512
    lora_layers: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": ATTENTION,
        "feed_forward": ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    }

    def setting_checks(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
        yield from super().setting_checks(config, settings)
        if settings.get("t5") is False:
            yield "t5=false is for Stable Diffusion 3, and Z-Image has no T5: leave it out"

    def call_guidance(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": max(scale - 1, 0.0)}

    def patch_size(self, config: Mapping[str, Any]) -> int:
        return PATCH

    def latent_shape(
        self, config: Mapping[str, Any], latent_size: tuple[int, int] | None = None
    ) -> tuple[int, int, int]:
        return config["in_channels"], *(latent_size or (SIDE, SIDE))

    def set_timesteps(self, scheduler: Any, steps: int, tokens: int | None) -> None:
        """Sigmas 1, ..., 2/N, 1/N, as for FLUX, but in float32 before they are shifted."""
        import torch

        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=dynamic_shift(scheduler.config, tokens))

    def encode(self, pipeline: Any, prompts: list[str], image_size: tuple[int, int]) -> Conditioning:
        """States (B, L, D), zeros after the prompt's own, and the mask (B, L) of these."""
        import torch

        states, _ = pipeline.encode_prompt(
            list(prompts),  # which it changes
            device=pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_tokens,
        )
        padded = [torch.cat([one, one.new_zeros(self.text_tokens - len(one), one.shape[1])]) for one in states]
        lengths = torch.tensor([len(one) for one in states], device=padded[0].device)
        mask = torch.arange(self.text_tokens, device=lengths.device) < lengths[:, None]
        return {"encoder_hidden_states": torch.stack(padded), "mask": mask}

    def read_once(self, conditioning: Conditioning) -> Conditioning:
        """The mask on the CPU, where ``inputs`` reads the prompts' lengths."""
        return {name: value.cpu() if name == "mask" else value for name, value in conditioning.items()}

    def inputs(self, timestep: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, Any]:
        """``conditioning`` without a ``mask`` is of prompts as long as they can be."""
        states = conditioning["encoder_hidden_states"].to(dtype)
        lengths = conditioning["mask"].sum(1).tolist() if "mask" in conditioning else [states.shape[1]] * len(states)
        return {
            "t": (1000 - timestep) / 1000,
            "cap_feats": [one[:length] for one, length in zip(states, lengths, strict=True)],
        }

    def predict(self, network: Any, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        import torch

        frames = list(x_t.unsqueeze(2).unbind(0))  # B of (C, 1, H, W)
        given = self.inputs(timestep, conditioning, x_t.dtype)
        return -torch.stack(network(frames, **given, return_dict=False)[0]).squeeze(2)

    def use_attention(self, network: Any, name: str) -> None:
        """As of other flow families, but by diffusers' own switch: the network lists no processors, and takes from one
        that is wrapped what it does not name, the positions."""
        for part in network.modules():
            if hasattr(part, "set_processor"):
                part.processor._attention_backend = "_native_math" if name == "eager" else None

    def prompt_tokens(self, configs: Mapping[str, Mapping[str, Any]]) -> int:
        return self.text_tokens

    def zero_conditioning(self, config: Mapping[str, Any], batch: int, tokens: int, **kind: Any) -> Conditioning:
        """Without a mask: on a device without data there are no lengths to read."""
        import torch

        return {"encoder_hidden_states": torch.zeros(batch, tokens, config["cap_feat_dim"], **kind)}
