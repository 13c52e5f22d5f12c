"""How images are sampled, and which of their steps are trained on: settings, which import no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.diffusion.flow_samplers import FLOW_SAMPLERS, NOISE_LEVELS
from diffusion_align.diffusion.samplers import SAMPLERS, find_sampler
from diffusion_align.errors import UserError, short
from diffusion_align.training.section import Section, Weight

if TYPE_CHECKING:
    from diffusion_align.diffusion.schedule import DiffusionSchedule, SetTimesteps

NoisyOrder = Literal["random", "progressive"]
Weighting = Literal["exact", "uniform", "snr_share"]
StepDraw = Literal["uniform", "logit_normal"]


class SamplerConfig(Section):
    """How images are sampled, in training and for the grids."""

    name: str | None = Field(
        None,
        description="ddim, ddpm, for flow-matching models flow, flow_sde, cps, dance or ddim, or a function of your "
        "own: module:function, file.py:function; null is ddim, or flow for a flow-matching model",
    )
    steps: int = Field(50, ge=1, le=MOST, description="denoising steps per image")
    eta: float = Field(
        1.0, ge=0, le=1, description="noise of ddim and flow; 0 has no density and is refused for training"
    )
    noise_level: float | None = Field(
        None, ge=0, le=LARGEST, description="noise of flow_sde (0.7 if null), cps (0.7, at most 1) and dance (0.3)"
    )
    guidance_scale: float = Field(
        5.0, ge=1, le=LARGEST, description="scale of guidance; 1 switches classifier-free guidance off"
    )
    noisy_steps: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="with ddpo and rwr: only so many steps in a row are noisy and trained on, the others are "
        "deterministic; null is all",
    )
    noisy_range: tuple[Weight, Weight] | None = Field(
        None,
        description="part of the stochastic steps, from noise (0) to image (1), in which those lie; null as of "
        "timestep_range",
    )
    noisy_order: NoisyOrder = Field(
        "random", description="where they lie: random in each epoch, or progressive, one step closer to the image each"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further options of your own sampler")

    @field_validator("name")
    @classmethod
    def _found(cls, name: str | None) -> str | None:
        try:
            if name is not None:
                find_sampler(name)
        except UserError as error:
            raise ValueError(str(error).removeprefix(f"sampler={name!r} is unknown: ")) from error
        return name

    def cross_checks(self) -> Iterator[str]:
        named = "null" if self.name is None else self.name
        if self.options and (self.name is None or self.name in SAMPLERS):
            yield f"options={short(self.options)} is for a sampler of your own, not for name={named}: leave it out"
        if self.name not in NOISE_LEVELS and self.noise_level is not None:
            yield (
                f"noise_level={self.noise_level:g} is for name={', '.join(NOISE_LEVELS)}, not for name={named}: set "
                "one of them, or leave noise_level out"
            )
        if self.name in NOISE_LEVELS and self.eta != type(self).model_fields["eta"].default:
            yield self.no_eta(self.eta)
        if self.name == "cps" and self.noise_level is not None and self.noise_level > 1:
            yield f"noise_level={self.noise_level:g} is more than 1, the most that name=cps has: lower it"
        yield from range_checks(self.noisy_range, "noisy_range")
        if self.noisy_steps is None:
            for name in (name for name, plain in _NO_WINDOW.items() if getattr(self, name) != plain):
                value = getattr(self, name)
                shown = list(value) if isinstance(value, tuple) else value
                yield f"{name}={shown} has no effect without noisy_steps: set that as well, or leave {name} out"
        elif self.noisy_steps > self.steps:
            yield f"noisy_steps={self.noisy_steps} is more than steps={self.steps}: lower it"
        elif self.name == "ddpm":
            yield self.always_noisy

    def no_eta(self, eta: float) -> str:
        """The sentence about an eta where the noise is ``noise_level``."""
        return f"eta={eta:g} has no effect with name={self.name}, whose noise is noise_level: leave it out"

    @property
    def noise_setting(self) -> str:
        """The setting that scales the noise of the sampler: eta or noise_level."""
        return "noise_level" if self.name in NOISE_LEVELS else "eta"

    @property
    def passes(self) -> int:
        """Passes of the network in a step: classifier-free guidance takes a second one."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def always_noisy(self) -> str:
        """Sentence about a sampler whose steps cannot be made deterministic."""
        return (
            f"noisy_steps={self.noisy_steps} needs a sampler that is deterministic with eta=0, and name={self.name} is "
            "not: use name=ddim, or leave noisy_steps out"
        )

    @property
    def quiet(self) -> SamplerConfig:
        """The same steps without any noise."""
        return self.model_copy(update={self.noise_setting: 0.0, **_NO_WINDOW})

    @property
    def preview(self) -> SamplerConfig:
        """How previews, evaluations and the trained pipeline sample: ``quiet`` where training has a window."""
        return self if self.noisy_steps is None else self.quiet

    @property
    def is_deterministic(self) -> bool:
        """Whether no step has a density; of a sampler of one's own its table says so."""
        return self.name in (None, "ddim", "flow", *NOISE_LEVELS) and getattr(self, self.noise_setting) == 0

    def without_noise(self) -> Iterator[str]:
        """Sentences about a sampler none of whose steps has a density, as far as that shows without its model."""
        if self.is_deterministic:
            noise = self.noise_setting
            yield (
                f"sampler.{noise}=0 makes every step deterministic, so there is no log-prob to train on: set "
                f"sampler.{noise} above 0"
            )
        elif self.steps == 1 and self.name in FLOW_SAMPLERS:
            yield (
                "sampler.steps=1 is the last step only, which is deterministic, so there is no log-prob to train on: "
                "set sampler.steps to 2 or more"
            )

    def schedule(self, scheduler: Any, set_timesteps: SetTimesteps | None = None) -> DiffusionSchedule:
        """``build_schedule`` with these settings, which are the sampler's options together with ``options``."""
        from diffusion_align.diffusion.schedule import build_schedule

        noise = {"eta": self.eta} if self.noise_level is None else {"eta": self.eta, "noise_level": self.noise_level}
        options = {**noise, **self.options}
        return build_schedule(scheduler, self.steps, sampler=self.name, options=options, set_timesteps=set_timesteps)


class QuietSamplerConfig(SamplerConfig):
    """A sampler with neither noise nor guidance by default."""

    eta: float = Field(0.0, ge=0, le=1, description="noise of ddim and flow")
    guidance_scale: float = Field(
        1.0, ge=1, le=LARGEST, description="scale of guidance; 1 switches classifier-free guidance off"
    )


_NO_WINDOW: dict[str, Any] = {
    name: SamplerConfig.model_fields[name].default for name in ("noisy_steps", "noisy_range", "noisy_order")
}


def range_checks(steps: tuple[float, float] | None, setting: str = "timestep_range") -> Iterator[str]:
    """A sentence about a part of the steps that is none; ``setting`` is its name."""
    if steps is not None and not 0 <= steps[0] < steps[1] <= 1:
        yield f"{setting}={list(steps)} must be two numbers 0 <= first < last <= 1"


TIMESTEP_RANGE = (
    "part of the stochastic steps, from noise (0) to image (1), that is trained on; null is all of them, but of a "
    "flow-matching model not the last one where it alone holds more than half of the path's KL"
)
