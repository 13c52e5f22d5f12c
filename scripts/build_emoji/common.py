"""What every stage shares: settings, one-sentence errors, and a training loop that survives a kill."""

import math
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm


class BuildError(Exception):
    """One sentence that the person at the terminal can act on."""


@dataclass(frozen=True)
class Build:
    """Settings of one rebuild, the same for every stage."""

    work: Path
    out: Path
    device: torch.device
    scale: float = 1.0
    seed: int = 0
    concepts: Path = Path("emoji-concepts.tsv")

    def steps(self, full: int) -> int:
        """Number of optimizer steps at this scale; never fewer than 4, so that every code path runs."""
        return max(4, round(full * self.scale))

    def autocast(self):
        """bf16 for the forward pass, where it is faster than float32."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16_is_faster(self.device))


@cache
def bf16_is_faster(device: torch.device) -> bool:
    """Measured on a convolution, forward and backward: CPUs without bf16 instructions are many times slower with it."""
    if device.type != "cpu":
        return torch.cuda.is_bf16_supported()
    x, conv = torch.randn(8, 32, 32, 32), nn.Conv2d(32, 32, 3, padding=1)
    seconds = {}
    for enabled in (False, True):
        for _ in range(3):  # the last run counts
            began = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                y = conv(x)
            y.float().square().mean().backward()
            seconds[enabled] = time.process_time() - began
    return seconds[True] < seconds[False]


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name only if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    yield temporary
    temporary.chmod(0o644)  # safetensors makes its files private
    os.replace(temporary, path)


class EMA:
    """Exponential moving average of a module's parameters; ``min(decay, (1+n)/(10+n))`` warms it up."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in module.named_parameters():
            if name in self.shadow:
                self.shadow[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if name in self.shadow:
                parameter.copy_(self.shadow[name])


def cosine_with_warmup(step: int, steps: int, warmup: int, floor: float = 0.03) -> float:
    """Learning-rate factor at ``step``: linear to 1 over ``warmup`` steps, then a half cosine down to ``floor``."""
    warmup = min(warmup, max(1, steps // 4))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    build: Build,
    name: str,
    module: nn.Module,
    loss_at: Callable[[torch.Generator], torch.Tensor],
    *,
    steps: int,
    lr: float,
    warmup: int,
    ema_decay: float,
    weight_decay: float = 0.01,
    save_every_s: float = 30.0,
) -> list[float]:
    """Losses of every step; trains the parameters of ``module`` that require a gradient, then puts the EMA in.

    All randomness of step n comes from a generator seeded with (build.seed, name, n), so that a run resumed from
    ``<work>/progress/<name>.pt`` takes the very batches the uninterrupted one would have taken.

    Args:
        build: settings; the progress file lies in its work folder.
        name: of the phase; also the progress file's.
        module: trained in place.
        loss_at: scalar loss of one step, drawn from the generator it is given.
        steps: optimizer steps (already scaled).
        lr: peak learning rate of AdamW (betas .9, .99), cosine to 3 % after ``warmup`` steps.
        warmup: steps of linear warm-up, at most a quarter of all.
        ema_decay: of the parameters that are kept.
        weight_decay: AdamW's.
        save_every_s: seconds between progress files.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    ema = EMA(module, ema_decay)
    progress = build.work / "progress" / f"{name}.pt"
    losses: list[float] = []
    if progress.exists():
        state = torch.load(progress, map_location=build.device, weights_only=True)
        if state["steps"] != steps:
            raise BuildError(
                f"{progress} was left by a run of {state['steps']} steps and this one has {steps}: "
                "pass the same --scale again or delete the file"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.shadow, ema.updates, losses = state["ema"], state["ema_updates"], state["losses"]

    def save() -> None:
        with written_atomically(progress) as temporary:
            state = {"steps": steps, "module": module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"ema": ema.shadow, "ema_updates": ema.updates, "losses": losses}, temporary)

    module.train()
    saved = time.monotonic()
    with tqdm(total=steps, initial=len(losses), desc=name, unit="step") as bar:
        for step in range(len(losses), steps):
            generator = torch.Generator().manual_seed(seed_of(build.seed, name, step))
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine_with_warmup(step, steps, warmup)
            loss = loss_at(generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            ema.update(module)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise BuildError(f"the loss of stage {name} is {losses[-1]} at step {step}: try another --seed")
            bar.update()
            bar.set_postfix(loss=f"{mean_of_last(losses):.4f}", refresh=False)
            if time.monotonic() - saved > save_every_s:
                save()
                saved = time.monotonic()
    save()
    ema.copy_to(module)
    module.eval()
    return losses


def mean_of_last(losses: list[float], n: int = 50) -> float:
    """Mean of the last ``n`` losses."""
    return sum(losses[-n:]) / max(1, len(losses[-n:]))


def seed_of(seed: int, name: str, step: int) -> int:
    """A seed for one step of one phase; the same on every machine (``hash`` of a string is not)."""
    return ((seed << 32) + zlib.crc32(f"{name} {step}".encode())) % 2**63


def choose(generator: torch.Generator, options: torch.Tensor | list, n: int) -> list[int]:
    """``n`` indices into ``options``, uniform and with replacement."""
    return torch.randint(len(options), (n,), generator=generator).tolist()


def chance(generator: torch.Generator, probability: float) -> bool:
    """True with the given probability."""
    return torch.rand((), generator=generator).item() < probability
