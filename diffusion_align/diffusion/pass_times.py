"""How long a policy takes to sample and to train batches of any size: what a run's batch sizes and precision come from.

The passes are those of the run: its shapes, guidance, attention, memory format, precision and number of graphs. Their
inputs come from a generator of their own and gradients are returned, not accumulated, so nothing of the run changes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_align.diffusion.policy import PROMPT_BATCH, Autocast, Conditioning, DenoisingPolicy
from diffusion_align.diffusion.settings import DenoisingConfig, passes_as_counted
from diffusion_align.training.batch_sizes import Sizes, Stopwatch, Work, decide
from diffusion_align.training.config import AUTO, BATCH_SIZES
from diffusion_align.training.launch import FASTER, Decided
from diffusion_align.training.optimizers import STATE_BYTES
from diffusion_align.training.precision import matrix_products_in_tf32

if TYPE_CHECKING:
    from diffusion_align.diffusion.trainer import DenoisingTrainer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(mixed_precision: str | None, device: torch.device) -> Autocast:
    """What an ``Accelerator`` of this precision has as its ``autocast``; none for one that is not decided."""
    dtype = _DTYPES.get(str(mixed_precision))
    return lambda: torch.autocast(device.type, dtype, enabled=dtype is not None)


def is_measured(config: DenoisingConfig) -> bool:
    """Whether any of its settings is known only after passes of the network."""
    return AUTO in (config.mixed_precision, *(getattr(config, name) for name in BATCH_SIZES))


def measure_policy(
    config: DenoisingConfig,
    method: type[DenoisingTrainer[Any]],
    policy: DenoisingPolicy,
    prompts: Sequence[str],
    processes: int = 1,
) -> Decided:
    """The batch sizes and the precision that ``config`` leaves to a measurement, and a line about them.

    The policy, its gradients and every random stream are left as they were; CUDA's peak statistics begin again.

    Args:
        config: checked settings; ``mixed_precision`` is "auto" on a CPU alone.
        method: what will train.
        policy: on its device, in the precision of ``config`` if that is known.
        prompts: a few of the run's.
        processes: of the run.
    """
    begun = time.perf_counter()
    precisions = ["no", "bf16"] if config.mixed_precision == AUTO else [config.mixed_precision]
    given = [getattr(config, name) for name in BATCH_SIZES]
    found: dict[Any, Sizes] = {}
    with _undisturbed(policy), matrix_products_in_tf32(config.tf32):
        for precision in precisions:
            policy.autocast = autocast(precision, policy.device) if len(precisions) > 1 else policy.autocast
            passes = PolicyPasses(config, method, policy, prompts, processes)
            found[precision] = decide(passes.work, *given, compared=len(precisions) > 1)
    chosen, told = precisions[0], []
    if len(precisions) > 1:
        gain = found["no"].seconds / found["bf16"].seconds
        chosen = "bf16" if FASTER * gain > 1 else "no"
        told = [f"mixed_precision={chosen} (bf16 is {gain:.2g}x of no)"]
    sizes = found[chosen]
    values = dict(zip(BATCH_SIZES, sizes[:2], strict=True)) | {"mixed_precision": chosen}
    line = f"measured in {time.perf_counter() - begun:.2g} s: {', '.join([*sizes.told, *told])}"
    return values, line


@contextlib.contextmanager
def _undisturbed(policy: DenoisingPolicy) -> Iterator[None]:
    """Inside, random numbers and passes leave no trace."""
    before, on_gpu = policy.autocast, policy.device.type == "cuda"
    with torch.random.fork_rng(devices=[policy.device] if on_gpu else []):
        try:
            yield
        finally:
            policy.autocast = before
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(policy.device)


class PolicyPasses:
    """The passes of one process in a run; see ``Work`` for what is measured of them."""

    def __init__(
        self,
        config: DenoisingConfig,
        method: type[DenoisingTrainer[Any]],
        policy: DenoisingPolicy,
        prompts: Sequence[str],
        processes: int = 1,
    ) -> None:
        self.config, self.policy, self.prompts = config, policy, list(prompts[:PROMPT_BATCH])
        scheduler, setter = policy.pipeline.scheduler, policy.timesteps_setter()
        steps = method.steps_trained_on(config, method.trained_schedule(config, scheduler, setter))
        self.cost = method.epoch_cost(passes_as_counted(config, policy.family), steps)
        sampling = config.sampler.preview.schedule(scheduler, setter)
        self.steps, self.timestep = len(sampling), sampling.table.timestep[:1].to(policy.device)
        self.stopwatch = {name: Stopwatch(policy.device) for name in ("sampling", "decoding", "encoding", "training")}
        narrow = policy.device.type != "cpu" or _is_narrow(policy)
        each = self.cost.actions * config.inner_epochs / config.samples_per_epoch
        self.work = Work(
            self.sampling,
            self.training,
            samples=max(1, config.samples_per_epoch // processes),
            actions=max(1, self.cost.actions // config.updates_per_epoch // processes),
            passes=each,
            unit=getattr(config, "members", 1),
            # Only equal shapes round alike there, and the ratio of a step to itself is 1.
            together=config.trains_sampled_steps and narrow,
        )

    def sampling(self, size: int) -> float:
        """Seconds to sample and decode ``size`` images."""
        policy, x_t = self.policy, self._latents(size)
        timestep, conditioning = self.timestep.expand(size), self._conditioning(size)
        with torch.no_grad(), policy.weights_kept():
            seconds = self.steps * self._time("sampling", lambda: policy.predict(x_t, timestep, conditioning), size)
            seconds += self._time("decoding", lambda: policy.decode(x_t), size)
            if getattr(self.config, "pairs", None) is not None:  # of as many pairs at once
                images = torch.full((2 * size, 3, *policy.image_size), 0.5)
                self._time("encoding", lambda: policy.encode_images(images), size)
        return seconds

    def training(self, size: int) -> float:
        """Seconds of the passes with a gradient for ``size`` actions."""
        policy, rows = self.policy, size * self.cost.width
        x_t, timestep, conditioning = self._latents(rows), self.timestep.expand(rows), self._conditioning(rows)
        parameters = list(policy.trainable.values())

        def run() -> None:
            latents = x_t
            for _ in range(self.cost.graphs):  # guidance is in the width
                latents = x_t + 0.01 * policy.predict(latents, timestep, conditioning, guidance_scale=1)
            if self.cost.differentiated:
                latents = policy.decode(latents[:size], grad=True)
            torch.autograd.grad(latents.square().mean(), parameters, allow_unused=True)

        beside = self._beside()
        seconds = self._time("training", run, size)
        del beside
        return seconds

    def _time(self, name: str, run: Callable[[], object], size: int) -> float:
        return self.stopwatch[name].time(run, size)

    def _latents(self, rows: int) -> Tensor:
        stream = torch.Generator().manual_seed(0)
        return torch.randn(rows, *self.policy.latent_shape, generator=stream).to(self.policy.device)

    def _conditioning(self, rows: int) -> Conditioning:
        """Of a few prompts, again and again; they cost no more encoding than the run's first batch."""
        encoded = self.policy.encode(self.prompts)
        again = torch.arange(rows, device=self.policy.device) % len(self.prompts)
        return {name: value[again] for name, value in encoded.items()}

    def _beside(self) -> Tensor | None:
        """On a GPU, room for what a run has in its updates beside the weights: gradients, state, copies, latents."""
        if self.policy.device.type != "cuda":
            return None
        copies = 4 * self.cost.snapshots + (4 if self.config.ema_decay and not self.config.ema_offload else 0)
        trained = sum(one.numel() for one in self.policy.trainable.values())
        latents = 4 * self.cost.recorded * self._latents(1).numel()
        size = (4 + STATE_BYTES[self.config.optimizer] + copies) * trained + latents
        return torch.empty(size, dtype=torch.uint8, device=self.policy.device)


def _is_narrow(policy: DenoisingPolicy) -> bool:
    with policy.autocast():
        kind = policy.device.type
        return bool(torch.is_autocast_enabled(kind)) or policy.network.dtype != torch.float32
