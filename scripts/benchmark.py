"""How much a training epoch costs on top of the bare network passes it needs. Not a test: run it on a quiet machine.

    python scripts/benchmark.py ddpo                # the embedded model, as the quickstart trains it
    python scripts/benchmark.py ddpo --growth       # and how time and memory grow with pictures and steps

Every epoch is followed by exactly the UNet passes it made (same batch sizes, same adapter, with or without a backward
pass), so that both see the same machine; the median of the ratios is what counts.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def benchmarks() -> None:
    """Benchmarks, one command a trainer."""


@app.command()
def ddpo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe")] = None,
    recipe: str = "quickstart",
    epochs: int = 5,
    growth: Annotated[
        bool, typer.Option(help="also other numbers of pictures and steps, each in its own process")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """DDPO's epoch time over the time of its UNet passes, and the peak memory."""
    if growth:
        rows = [
            _in_own_process(recipe, [*(overrides or []), f"samples_per_epoch={samples}", f"sampler.steps={steps}"])
            for samples, steps in ((16, 10), (32, 10), (64, 10), (32, 5), (32, 20))
        ]
    else:
        rows = [measure(recipe, overrides or [], epochs)]
    if as_json:
        print(json.dumps(rows[0]))
        return
    print("pictures  steps  epoch s  bare s  ratio (median, min-max)  peak MiB")
    for row in rows:
        print(
            f"{row['samples']:8d}  {row['steps']:5d}  {row['epoch']:7.2f}  {row['bare']:6.2f}  "
            f"{row['ratio']:5.3f} ({row['low']:.3f}-{row['high']:.3f})  {row['peak_mib']:18.0f}"
        )


def measure(recipe: str, overrides: list[str], epochs: int) -> dict[str, Any]:
    """Run ``epochs`` epochs after one to warm up; seconds, ratios and peak memory."""
    from diffusion_align.diffusion.ddpo import DDPOTrainer
    from diffusion_align.diffusion.policy import DenoisingPolicy
    from diffusion_align.pipelines.configuration import read_config
    from diffusion_align.pipelines.image import run

    passes: Counter[tuple[int, bool, bool]] = Counter()
    run_unet = DenoisingPolicy._run_unet
    collect = DDPOTrainer.collect
    marks: list[float] = []
    results: list[tuple[float, float]] = []

    def counted(policy: Any, x_t: torch.Tensor, *args: Any) -> torch.Tensor:
        is_reference = policy.lora is not None and not _adapter_is_on(policy)
        passes[(len(x_t), torch.is_grad_enabled(), is_reference)] += 1
        return run_unet(policy, x_t, *args)

    def marked(trainer: Any) -> Any:
        now = time.perf_counter()
        if marks:
            results.append((now - marks[-1], _bare(trainer.policy, passes, run_unet)))
        passes.clear()
        marks.append(time.perf_counter())
        return collect(trainer)

    DenoisingPolicy._run_unet, DDPOTrainer.collect = counted, marked  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output_dir={folder}/run",
            f"epochs={epochs + 2}",
            "grid_every=0",
            "checkpoint_every=1000",
            *overrides,
        ]
        config: Any = read_config(recipe, settings)
        run(config)
    measured = results[1:]  # the first epoch warms up
    ratios = [epoch / bare for epoch, bare in measured]
    return {
        "samples": config.samples_per_epoch,
        "steps": config.sampler.steps,
        "epoch": statistics.median(epoch for epoch, _ in measured),
        "bare": statistics.median(bare for _, bare in measured),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "peak_mib": _peak_mib(),
    }


def _bare(policy: Any, passes: Counter[tuple[int, bool, bool]], run_unet: Callable[..., torch.Tensor]) -> float:
    """Seconds for the same passes and nothing else."""
    inputs = {batch: _inputs(policy, batch) for batch, _, _ in passes}
    _synchronize()
    start = time.perf_counter()
    for (batch, with_gradient, is_reference), count in passes.items():
        if is_reference:
            policy.unet.disable_adapters()
        for _ in range(count):
            with torch.set_grad_enabled(with_gradient):
                output = run_unet(policy, *inputs[batch])
            if with_gradient:
                output.sum().backward()
        if is_reference:
            policy.unet.enable_adapters()
    _synchronize()
    seconds = time.perf_counter() - start
    policy.unet.zero_grad()
    return seconds


def _inputs(policy: Any, batch: int) -> tuple[Any, ...]:
    latents = torch.randn(batch, *policy.latent_shape, device=policy.device)
    return latents, torch.full((batch,), 500, device=policy.device), policy.encode(["a lion"] * batch)


def _adapter_is_on(policy: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return not next(m for m in policy.unet.modules() if isinstance(m, BaseTunerLayer)).disable_adapters


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_own_process(recipe: str, overrides: list[str]) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "ddpo", "--json", "--epochs", "3", "--recipe", recipe, *overrides]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    app()
