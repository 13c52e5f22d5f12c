"""What Stable Diffusion 3, FLUX and Z-Image share: a transformer, trained by flow matching, that reads long prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from diffusion_align.bounds import MOST_PROMPT_TOKENS
from diffusion_align.errors import UserError
from diffusion_align.models.families.contract import ATTENTION, FEED_FORWARD, ModelFamily
from diffusion_align.models.families.flow_matching import is_flow


class FlowFamily(ModelFamily):
    """A transformer that predicts eps - x_0 of latents ``(1 - sigma) x_0 + sigma eps`` at timestep ``1000 sigma``.

    Args:
        max_sequence_length: tokens of the states of T5 or Qwen3; the pipeline's own default where None.
        t5: False loads no T5, whose states are zeros then.
    """

    network: ClassVar[str] = "transformer"
    network_title: ClassVar[str] = "transformer"
    cpu_attention: ClassVar[Literal["eager", "sdpa"]] = "sdpa"  # emoji-flow: 0.37 CPU-seconds, eager 0.53
    tokens: ClassVar[int]
    """Of those states by default."""
    lora_layers: ClassVar[Mapping[str, Sequence[str]]] = {
        "attention": (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        "feed_forward": (*FEED_FORWARD, *(layer.replace("ff.", "ff_context.", 1) for layer in FEED_FORWARD)),
    }

    def __init__(self, *, max_sequence_length: int | None = None, t5: bool = True) -> None:
        self.max_sequence_length, self.t5 = max_sequence_length, t5

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        return type(self)(**{name: settings[name] for name in ("max_sequence_length", "t5") if name in settings})

    @property
    def call_options(self) -> Mapping[str, Any]:  # type: ignore[override]
        chosen = self.max_sequence_length
        return {} if chosen is None else {"max_sequence_length": chosen}

    @property
    def text_tokens(self) -> int:
        return self.max_sequence_length or self.tokens

    def check(self, pipeline: Any) -> None:
        config, channels = getattr(pipeline, self.network).config, pipeline.vae.config.latent_channels
        if self.latent_shape(config)[0] != channels:
            raise UserError(
                f"this {self.network_title} takes more than the latent of {channels} channels: use a text-to-image "
                "checkpoint"
            )
        if not is_flow(pipeline.scheduler.config):
            raise UserError(
                f"the scheduler is a {type(pipeline.scheduler).__name__}, and this model needs the "
                "FlowMatchEulerDiscreteScheduler that it comes with"
            )
        super().check(pipeline)

    def setting_checks(self, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
        length = settings.get("max_sequence_length")
        if length is not None and not (isinstance(length, int) and 1 <= length <= MOST_PROMPT_TOKENS):
            yield f"max_sequence_length={length} must lie between 1 and {MOST_PROMPT_TOKENS}, a whole number"
        if settings.get("attention") == "xformers":
            yield f"attention=xformers is for UNets, and this model has a {self.network_title}: set attention=sdpa"
        if settings.get("channels_last"):
            yield (
                f"channels_last is for convolutions, and this model has a {self.network_title} of linear layers: leave "
                "it out"
            )

    def image_tokens(self, config: Mapping[str, Any], latent_size: tuple[int, int]) -> int:
        patch = self.patch_size(config)
        return (latent_size[0] // patch) * (latent_size[1] // patch)

    def use_eager_attention(self, network: Any) -> None:
        self.use_attention(network, "eager")

    def use_attention(self, network: Any, name: str) -> None:
        """Diffusers' joint processors call torch's fused attention, which "eager" has compute by its matrices."""
        plain = {key: getattr(own, "fused", own) for key, own in network.attn_processors.items()}
        network.set_attn_processor({key: WithMatrices(own) for key, own in plain.items()} if name == "eager" else plain)


class WithMatrices:
    """A processor of diffusers under which torch's attention keeps its matrices; ``fused`` is the one as it comes."""

    def __init__(self, fused: Any) -> None:
        self.fused = fused

    def __call__(self, attn: Any, *given: Any, **named: Any) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.MATH):
            return self.fused(attn, *given, **named)
