"""How trained weights move: optimizer and learning-rate schedule, gradients of all processes, clipping, and EMA."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.errors import TrainingError
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.finite import all_finite, largest
from diffusion_align.training.optimizers import make_optimizer
from diffusion_align.training.processes import Processes


class Optimization:
    """The optimizer of a run.

    Args:
        trainable: name -> parameter of all that is trained.
        config: the optimizer and its settings, schedule, ``max_grad_norm``, ``ema_decay``.
        processes: whose gradients are summed.

    Attributes:
        steps: optimizer steps taken; one that fp16's loss scaling skips is none.
    """

    def __init__(self, trainable: Mapping[str, nn.Parameter], config: TrainingConfig, processes: Processes) -> None:
        from transformers import get_scheduler

        self.config, self.processes, self.accelerator = config, processes, processes.accelerator
        self.names, self.parameters = list(trainable), list(trainable.values())
        self.steps = 0
        optimizer = make_optimizer(config, self.parameters, self.accelerator.device)
        steps = config.epochs * config.updates_per_epoch * config.inner_epochs
        schedule = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self._schedule = get_scheduler(schedule, optimizer, config.warmup_steps, steps)
        self._optimizer = self.accelerator.prepare_optimizer(optimizer)
        self._ema: Any = None
        if config.ema_decay is not None:
            from diffusers.training_utils import EMAModel

            self._ema = EMAModel(self._beside_ema(), decay=config.ema_decay)
            if config.ema_offload and self.accelerator.device.type == "cuda":
                self._ema.pin_memory()

    def _beside_ema(self) -> list[nn.Parameter] | list[Tensor]:
        """The trained weights where their EMA is, which with ``ema_offload`` is main memory."""
        if not self.config.ema_offload:
            return self.parameters
        # EMAModel copies what needs no gradient instead of averaging it.
        return [parameter.detach().cpu().requires_grad_() for parameter in self.parameters]

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return self._schedule.get_last_lr()[0]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a 0-d loss to those there are."""
        self.accelerator.backward(loss)

    def gradients(self, value: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool = False) -> Sequence[Tensor]:
        """Of a 0-d value, for each of ``inputs``; 0 where there is none.

        In fp16 it is scaled as in ``backward``, or by less where that overflows, so that what is small does not vanish.
        """
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        while True:
            keep = retain_graph or scale > 1
            found = torch.autograd.grad(value * scale, inputs, retain_graph=keep, materialize_grads=True)
            if scale <= 1 or all(all_finite(*found)):
                return found if scale == 1 else torch._foreach_div(found, scale)
            scale = max(1.0, scale / 2)

    def step(self, number: int) -> float:
        """Sum the gradients of all processes, clip, step; returns the norm before clipping.

        Args:
            number: of this step, for the sentence.

        Raises:
            TrainingError: gradient or weights are not finite, but for a step that fp16's loss scaling skips.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.processes.count > 1:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        total, weights = torch.stack([norm.float(), largest(self.parameters).to(norm.device).float()]).tolist()
        if not math.isfinite(weights):
            rate, decay = self.config.learning_rate, self.config.weight_decay
            remedy = "lower learning_rate"
            # All multiply the weights by 1 minus this, but Prodigy, whose learning rate is not the setting.
            if not rate * decay <= 1 and self.config.optimizer != "prodigy":
                remedy = f"weight_decay={decay:g} times learning_rate={rate:g} is above 1, so lower one of them"
            raise TrainingError(
                f"the trained weights are not finite after step {number}, and were not written: {remedy}"
            )
        if not (math.isfinite(total) or self.accelerator.scaler):
            raise TrainingError(f"the norm of the gradient is not finite at step {number}: lower learning_rate")
        # accelerate's ``step_was_skipped`` does not know: a fused optimizer is called and skips the step by itself.
        if math.isfinite(total):
            self.steps += 1
            if self._ema is not None:
                self._ema.step(self._beside_ema())
        return total

    def advance_schedule(self) -> None:
        """The learning rate of the step after this one."""
        self._schedule.step()

    @property
    def scale_may_fall(self) -> bool:
        """Whether fp16's loss scaling is still on its way down to a scale at which steps do not overflow."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the trained parameters are their EMA, if one is kept."""
        if self._ema is None:
            yield
            return
        self._ema.store(self.parameters)
        self._ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self._ema.restore(self.parameters)

    def load_ema_weights(self) -> None:
        """Make the weights in memory their EMA, if one is kept, for good."""
        if self._ema is not None:
            self._ema.copy_to(self.parameters)

    # -- for checkpoints -------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> name -> tensor: the trained weights and, if it is kept, their EMA."""
        weights: dict[str, dict[str, Tensor]] = {"trained": dict(zip(self.names, self.parameters, strict=True))}
        if self._ema is not None:
            weights["ema"] = dict(zip(self.names, self._ema.shadow_params, strict=True))
        return weights

    def tensors(self) -> dict[str, Any]:
        """The states of optimizer, schedule and fp16's loss scaling."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
        }

    @property
    def ema_steps(self) -> int:
        return self._ema.optimization_step if self._ema is not None else 0

    @torch.no_grad()
    def load(
        self, weights: Mapping[str, Mapping[str, Tensor]], tensors: Mapping[str, Any], *, steps: int, ema_steps: int
    ) -> None:
        """Take back ``weights()``, ``tensors()``, ``steps`` and ``ema_steps``; shapes have been checked."""
        self.steps = steps
        for name, parameter in zip(self.names, self.parameters, strict=True):
            parameter.copy_(weights["trained"][name])
        if self._ema is not None:
            for name, shadow in zip(self.names, self._ema.shadow_params, strict=True):
                shadow.copy_(weights["ema"][name])
            self._ema.optimization_step = ema_steps
        self._optimizer.load_state_dict(tensors["optimizer"])
        self._schedule.load_state_dict(tensors["schedule"])
        if tensors["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(tensors["scaler"])
