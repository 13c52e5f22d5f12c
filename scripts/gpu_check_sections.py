"""The sections of ``gpu_check.py``, each run in a process of its own: python gpu_check_sections.py NAME FILE SETTINGS.

What a section finds is appended to FILE at once, a line of JSON each, so that nothing is lost where it is ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gpu_check_meters as meters
import torch
from gpu_check_models import (
    IMAGE_SIZES,
    TEXT_SIZES,
    TINY_SIDE,
    ImageSize,
    parameters,
    random_language_model,
    random_pipeline,
    vae_dtype,
)

from diffusion_align.errors import UserError
from diffusion_align.training.callbacks import Callback

ROOT = Path(__file__).parent.parent
GIB = 2**30
ROOM = 1.07
"""Measured over estimated memory, at most: ``doctor`` leaves 7 % of a card to the allocator's gaps."""
KILLED_IN = 3
"""The epoch in which the run of the section "resume" is killed."""


class Skipped(Exception):
    """Why a section, or the rest of it, is not for this machine."""


@dataclass(frozen=True)
class Where:
    """How a section is run.

    Attributes:
        device: "cuda" or "cpu".
        tiny: whether models are tiny, for a machine without a GPU.
        folder: the section's own, for runs; deleted afterwards.
        until: when it must have ended, in the seconds of ``time.time``.
    """

    device: str
    tiny: bool
    folder: str
    until: float

    @property
    def left(self) -> float:
        return self.until - time.time()

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)


class Findings:
    """Appends what is found to a file: figures with their units, and checks with a sentence each."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def figure(self, name: str, value: Any, unit: str = "") -> None:
        self._write({"figure": name, "value": value, "unit": unit})

    def check(self, sentence: str, passed: bool) -> None:
        self._write({"check": sentence, "passed": bool(passed)})

    def note(self, sentence: str) -> None:
        """What was left out, and why."""
        self._write({"note": sentence})

    def skipped(self, reason: str) -> None:
        self._write({"skipped": reason})

    def failed(self, error: BaseException) -> None:
        sentence = f"{type(error).__name__}: {error}".strip()
        self._write({"failed": sentence, "traceback": "".join(traceback.format_exception(error))})

    def _write(self, row: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class Numbered:
    """A reward that no two images of a batch share, so that every image has an advantage; it costs nothing."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: Any, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
        self.count += len(prompts)
        return [float((self.count + i) % 17) for i in range(len(prompts))]


def numbered_texts(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """The same for texts."""
    return [float(i % 17) for i in range(len(completions))]


class Deterministic(Callback):
    """Lets torch choose algorithms that give the same bits every time, as far as it has them."""

    def on_start(self, trainer: Any) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)


class KilledByItself(Callback):
    """Ends its process at the first update after the last checkpoint, as a power cut would."""

    def on_update(self, trainer: Any, row: Any) -> None:
        if trainer.epoch == KILLED_IN - 1:
            os.kill(os.getpid(), signal.SIGKILL)


# -- the machine -------------------------------------------------------------------------------------------------------


def machine(find: Findings, where: Where) -> None:
    """What this machine and its software are, and how fast matrix products and copies are at best."""
    for package in ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers"):
        with contextlib.suppress(PackageNotFoundError):
            find.figure(package, version(package))
    find.figure("Python", platform.python_version())
    find.figure("CPU cores", os.cpu_count())
    if where.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        find.figure("GPU", about.name)
        find.figure("memory of the GPU", round(about.total_memory / GIB, 2), "GiB")
        find.figure("free memory of the GPU", round(torch.cuda.mem_get_info()[0] / GIB, 2), "GiB")
        find.figure("compute capability", f"{about.major}.{about.minor}")
        find.figure("multiprocessors", about.multi_processor_count)
        find.figure("driver", _driver() or "nvidia-smi does not say")
        find.figure("CUDA of torch", torch.version.cuda)
        find.figure("bfloat16 without emulation", torch.cuda.is_bf16_supported(including_emulation=False))
        find.figure("TF32 in convolutions", torch.backends.cudnn.allow_tf32)
        find.figure("float32 matrix products", torch.get_float32_matmul_precision())
    side = 64 if where.tiny else 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        rate = meters.matrix_rate(where.place, dtype, side if dtype == torch.bfloat16 else side // 2)
        find.figure(f"matrix products in {name}", round(rate / 1e12, 3), "TFLOP/s")
    copied = meters.copy_rate(where.place, 2**20 if where.tiny else 2**31)
    find.figure("copies on the device", round(copied / 1e9, 1), "GB/s read and written")


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=20).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


# -- image models of the published sizes -------------------------------------------------------------------------------


def image_size(find: Findings, where: Where, name: str) -> None:
    """An epoch of its recipe from memory, and what one pass costs, bare and as the trainer makes it."""
    size, device = IMAGE_SIZES[name], where.place
    settings, estimate = _fitting(find, where, size)
    begun = time.perf_counter()
    pipeline = random_pipeline(size, device, small=where.tiny)
    meters.synchronize(device)
    find.figure("building the model", round(time.perf_counter() - begun, 1), "s")
    find.figure("parameters", round(parameters(pipeline) / 1e9, 3), "10^9")
    rate = meters.matrix_rate(device, torch.bfloat16, 64 if where.tiny else 8192)
    find.figure("matrix products in bfloat16", round(rate / 1e12, 3), "TFLOP/s")
    bare = _bare_passes(find, where, size, pipeline, settings, rate)

    meter = meters.EpochMeter(at_end=lambda trainer: _our_passes(find, where, trainer, bare, rate))
    _align(where, size, pipeline, settings | {"epochs": 2, "callbacks": [meter]})
    samples, steps = settings["samples_per_epoch"], settings["sampler"]["steps"]
    sampling, training = meter.last("sampling"), meter.last("training")
    find.figure("images", samples, f"of {settings['height']} pixels a side, {steps} steps")
    find.figure("sampling", round(samples / sampling.seconds, 4), "images/s, decoding and reward too")
    find.figure("sampling", round(samples * steps / sampling.seconds, 3), "samples x steps/s")
    find.figure("training", round(meter.actions[-1] / training.seconds, 3), "samples x steps/s")
    if where.device == "cuda":
        of_phases = {"sampling": [p for n, p in estimate.phases.items() if n != "training"]}
        of_phases["training"] = [estimate.phases["training"]]
        always = estimate.peak - max(estimate.phases.values())
        for phase, measured in (("sampling", sampling), ("training", training)):
            expected = always + max(of_phases[phase])
            find.figure(f"peak memory, {phase}", round(measured.bytes / GIB, 3), "GiB in tensors")
            find.figure(f"peak memory, {phase}, by doctor", round(expected / GIB, 3), "GiB")
            find.figure(f"peak memory, {phase}, over doctor's", round(measured.bytes / expected, 3), "ratio")
        most = max(sampling.bytes, training.bytes) / estimate.peak
        find.check(f"the peak is {most:.3f} of doctor's estimate, at most {ROOM}", most <= ROOM)
    _check_ratio(find, meter, f"{size.title}, bfloat16")


def _fitting(find: Findings, where: Where, size: ImageSize) -> tuple[dict[str, Any], Any]:
    """Settings of ``size``'s recipe with the largest batch that fits here by doctor's estimate, and that estimate.

    Raises:
        Skipped: not even one image at a time fits.
    """
    batch = _recipe(size)["sample_batch_size"]
    while True:
        settings = _settings(where, size, batch)
        estimate = _estimate(where, size, settings)
        needed = ROOM * max(estimate.peak, _weights(size, where))
        free = torch.cuda.mem_get_info()[0] if where.device == "cuda" else needed
        if needed <= free:
            find.figure("batch", settings["sample_batch_size"], "images in sampling, (image, step) pairs in training")
            return settings, estimate
        if batch == 1:
            raise Skipped(
                f"it needs {needed / GIB:.1f} GiB by doctor's estimate with a batch of one, and {free / GIB:.1f} GiB "
                "are free on this GPU"
            )
        batch //= 2


def _weights(size: ImageSize, where: Where) -> int:
    """Bytes of all parts, which are on the GPU together while they are built."""
    from diffusion_align.doctor.memory import parameter_counts
    from diffusion_align.models.families import family_of_class

    configs = size.configs(small=where.tiny)
    counts = parameter_counts(family_of_class(size.kind), configs)
    narrow = torch.bfloat16
    return sum(
        count * (vae_dtype(configs[part], narrow) if part == "vae" else narrow).itemsize
        for part, count in counts.items()
    )


def _recipe(size: ImageSize) -> dict[str, Any]:
    from diffusion_align.pipelines.configuration import shipped_configs
    from diffusion_align.training.reading import load_yaml

    return dict(load_yaml(shipped_configs()[size.recipe]))


def _settings(where: Where, size: ImageSize, batch: int) -> dict[str, Any]:
    """Those of its recipe, fewer images and steps, and a reward that costs nothing."""
    settings = {
        name: value
        for name, value in _recipe(size).items()
        if name not in ("method", "model", "output_dir", "resolution", "history_size", "history_min_count")
        and not name.startswith("clip_range")
    }
    side, samples = TINY_SIDE if where.tiny else size.side, 4 if where.tiny else max(8, 2 * batch)
    batch = min(batch, samples)
    settings |= {
        "reward": Numbered(),
        "prompts": ["a red apple", "a cat"],
        "clip_range": 0.2,  # a run whose ratio leaves the recipe's range before any update would end there
        "height": side,
        "width": side,
        "samples_per_epoch": samples,
        "sample_batch_size": batch,
        "micro_batch_size": batch,
        "grid_every": 0,
        "checkpoint_every": 100,
        "checkpoint_minutes": None,
        "sampler": settings["sampler"] | {"steps": 4 if where.tiny else 10},
    }
    if settings["advantages"] == "group":
        settings["group_size"] = samples // 2
    if where.tiny and "noisy_steps" in settings["sampler"]:  # a window of fewer steps, anywhere
        settings["sampler"] |= {"noisy_steps": 2, "noisy_range": None}
    return settings


def _estimate(where: Where, size: ImageSize, settings: dict[str, Any]) -> Any:
    """What doctor expects of them."""
    from diffusion_align.doctor.estimate import CPU, GPU, Estimator
    from diffusion_align.doctor.model_files import ModelFiles
    from diffusion_align.methods import method_of
    from diffusion_align.models.families import family_of_class
    from diffusion_align.pipelines.configuration import check_config

    named = {"method": "ddpo", "model": size.model, "output_dir": Path(where.folder) / "estimated", "dtype": "bfloat16"}
    config: Any = check_config(named | settings)
    files = ModelFiles(size.configs(small=where.tiny), [], family=family_of_class(size.kind))
    cost = method_of("ddpo").epoch_cost(config)
    return Estimator(files, cost).estimate(config, GPU if where.device == "cuda" else CPU)


def _align(where: Where, size: ImageSize, pipeline: Any, settings: dict[str, Any], folder: str = "run") -> Any:
    from diffusion_align import ImageAlignmentPipeline

    pipe = ImageAlignmentPipeline.from_pipe(pipeline, model=size.model)
    return pipe.align(method="ddpo", output_dir=Path(where.folder) / folder, **settings)


def _bare_passes(
    find: Findings, where: Where, size: ImageSize, pipeline: Any, settings: dict[str, Any], rate: float
) -> tuple[int | None, int]:
    """Kernels and operators of one forward pass of the network as diffusers has it, its weights and inputs bfloat16."""
    from diffusion_align.models.families import family_of

    family, device = family_of(pipeline), where.place
    network = getattr(pipeline, family.network)
    sides = {name: settings[name] for name in ("height", "width")}
    latents = family.latent_size(network.config, pipeline.vae.config, **sides)
    tokens = family.prompt_tokens(size.configs(small=where.tiny))
    rows = settings["sample_batch_size"] * (2 if family.guidance == "free" else 1)
    with torch.no_grad():
        kind = {"device": device, "dtype": torch.bfloat16}
        x_t, timestep, conditioning = family.zeros(network.config, rows, tokens=tokens, latent_size=latents, **kind)

        def forward() -> object:
            return family.predict(network, torch.randn_like(x_t), timestep, conditioning)

        taken, done = meters.seconds(forward, device), meters.operations(forward)
        counted, dispatched = meters.kernels(forward, device), meters.operators(forward)
    find.figure("bare forward pass", round(1e3 * taken, 2), f"ms for {rows} rows")
    find.figure("bare forward pass", round(done / 1e12, 4), "TFLOP")
    find.figure("bare forward pass", round(100 * done / taken / rate, 2), "% of the measured bfloat16 rate")
    find.figure("bare forward pass", dispatched, "operators")
    _kernel_figures(find, where, "bare forward pass", counted, taken)
    return None if counted is None else counted.count, dispatched


def _our_passes(find: Findings, where: Where, trainer: Any, bare: tuple[int | None, int], rate: float) -> None:
    """Passes of the run's policy: sampling, training, and how often the host waits for the GPU in each sampler step."""
    from diffusion_align.diffusion.rollout import rollout
    from diffusion_align.models.lora import adapter_layers

    policy, config, device = trainer.policy, trainer.config, where.place
    batch = config.sample_batch_size
    with torch.no_grad():
        conditioning = policy.encode([f"a cat on a table, {i}" for i in range(batch)])
        prepared = policy.prepare(conditioning)
    x_t = torch.randn(batch, *policy.latent_shape, device=device)
    steps = torch.zeros(batch, dtype=torch.int64, device=device)
    timestep = trainer.schedule.table.timestep[steps]

    def forward() -> object:
        with torch.no_grad():
            return policy.predict(x_t, timestep, prepared)

    def training() -> object:
        policy.predict(x_t, timestep, conditioning).square().mean().backward()
        return policy.network.zero_grad()

    with policy.weights_cast_once():  # as in a rollout, and in the passes of an update
        for title, call in (("sampling pass", forward), ("training pass", training)):
            taken, done = meters.seconds(call, device), meters.operations(call)
            find.figure(title, round(1e3 * taken, 2), f"ms for {batch} images, guidance too")
            find.figure(title, round(done / 1e12, 4), "TFLOP, recomputed ones too")
            find.figure(title, round(100 * done / taken / rate, 2), "% of the measured bfloat16 rate")
            counted, dispatched = meters.kernels(call, device), meters.operators(call)
            find.figure(title, dispatched, "operators")
            _kernel_figures(find, where, title, counted, taken)
            if title == "sampling pass":
                of_pass = taken
                over = "of a sampling pass over the bare ones"
                find.figure(f"operators {over}", round(dispatched / bare[1], 3), "ratio")
                if counted is not None and bare[0]:
                    find.figure(f"kernels {over}", round(counted.count / bare[0], 3), "ratio")
    find.figure("adapted layers", len(adapter_layers(policy.network)))

    schedule = trainer.sampling_schedule
    streams = [torch.Generator().manual_seed(i) for i in range(batch)]
    seen: list[int] = []
    with meters.waits() as waited:
        rollout(policy, schedule, conditioning, streams, record=None, on_step=lambda: seen.append(waited.count))
    each = (seen[-1] - seen[0]) / max(1, len(seen) - 1)
    if where.device == "cuda":
        find.figure("waits of the host for the GPU", round(each, 2), "per sampler step")
        find.figure("lines that waited", waited.lines(), "times in a batch")
    else:
        find.note("waits of the host for the GPU are counted on a GPU only")
    taken = meters.seconds(lambda: rollout(policy, schedule, conditioning, streams), device) / len(schedule)
    find.figure("a sampler step over its pass", round(taken / of_pass, 3), "ratio of wall-clock times")


def _kernel_figures(find: Findings, where: Where, title: str, counted: meters.Kernels | None, taken: float) -> None:
    """``taken``: the seconds of the same call without the profiler."""
    if counted is not None:
        find.figure(title, counted.count, "kernels")
        find.figure(title, counted.copies, "copies and fills")
        find.figure(title, round(100 * counted.seconds / taken, 1), "% of the time the GPU is busy")
    elif where.device == "cuda":
        find.note(f"{title}: the profiler saw no kernel")


def _check_ratio(find: Findings, meter: meters.EpochMeter, what: str) -> None:
    if not (found := meter.deviations()):
        find.check(f"a ratio before any update was logged ({what})", False)
        return
    worst = max(found)
    find.figure(f"ratio before any update, {what}", worst, "largest deviation from 1")
    find.check(f"the ratio before any update is exactly 1 ({what}), it deviates by {worst:.3g}", worst == 0)


# -- ratio 1, batch sizes, resume --------------------------------------------------------------------------------------


def ratio(find: Findings, where: Where) -> None:
    """Stable Diffusion 1.5 in bfloat16: the ratio of the first pass, in every way to run the network."""
    from diffusion_align.diffusion.ddpo_settings import DDPOConfig

    size = IMAGE_SIZES["sd15"]
    settings, _ = _fitting(find, where, size)
    ways: dict[str, dict[str, Any]] = {"contiguous": {}, "channels_last": {"channels_last": True}}
    if "compile" in DDPOConfig.model_fields:
        ways["compile"] = {"compile": True}
    else:
        find.note("compile is no setting of this version")
    for name, chosen in ways.items():
        if where.left < 20:
            find.note(f"{name} was left out: {where.left:.0f} s were left")
            continue
        meter = meters.EpochMeter()
        pipeline = random_pipeline(size, where.place, small=where.tiny)
        try:
            _align(where, size, pipeline, settings | chosen | {"epochs": 1, "callbacks": [meter]}, folder=name)
        except UserError as error:  # the other ways are measured all the same
            find.check(f"an epoch in this way: {name}: {error}", False)
            continue
        sampling, training = meter.last("sampling"), meter.last("training")
        find.figure(f"first epoch, {name}", round(sampling.seconds + training.seconds, 2), "s, warm-up too")
        _check_ratio(find, meter, name)


def batch_sizes(find: Findings, where: Where) -> None:
    """Stable Diffusion 1.5 in bfloat16 with LoRA: samples x steps per second at doubling batch sizes."""
    from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
    from diffusion_align.training.launch import make_accelerator

    size, device = IMAGE_SIZES["sd15"], where.place
    side = TINY_SIDE if where.tiny else size.side
    accelerator = make_accelerator("bf16")
    policy = DenoisingPolicy(
        random_pipeline(size, device, small=where.tiny),
        lora=LoRAConfig(rank=16),
        guidance_scale=5.0,
        height=side,
        width=side,
        device=device,
        autocast=accelerator.autocast,
    )
    batch, best = 1, {"sampling": 0.0, "training": 0.0}
    while batch <= (4 if where.tiny else 256) and where.left > 15:
        with torch.no_grad():
            conditioning = policy.encode(["a red apple"] * batch)
        x_t = torch.randn(batch, *policy.latent_shape, device=device)
        timestep = torch.full((batch,), 500, device=device)

        def forward() -> object:
            with torch.no_grad():
                return policy.predict(x_t, timestep, conditioning)  # noqa: B023, called within this pass of the loop

        def training() -> object:
            policy.predict(x_t, timestep, conditioning).square().mean().backward()  # noqa: B023
            return policy.network.zero_grad()

        gained = False
        try:
            for phase, call in (("sampling", forward), ("training", training)):
                with meters.peak(device) as used, policy.weights_cast_once():
                    rate = batch / meters.seconds(call, device, most=1.0)
                find.figure(f"{phase}, batch {batch}", round(rate, 3), "samples x steps/s")
                if where.device == "cuda":
                    find.figure(f"{phase}, batch {batch}", round(used() / GIB, 3), "GiB in tensors")
                gained |= rate > 1.03 * best[phase]
                best[phase] = max(best[phase], rate)
        except torch.OutOfMemoryError:
            policy.network.zero_grad()
            find.note(f"a batch of {batch} does not fit")
            break
        if not gained:
            find.note(f"a batch of {batch} is no faster than half of it")
            break
        batch *= 2
    for phase, rate in best.items():
        find.figure(f"{phase}, best", round(rate, 3), "samples x steps/s")
    find.check("throughput was measured at two batch sizes or more", batch > 1)


def resume(find: Findings, where: Where) -> None:
    """The quickstart by the command line, twice whole and once killed after a checkpoint and resumed: equal tensors.

    With deterministic algorithms; where two whole runs differ all the same, it is a matter of how far.
    """
    settings = [
        *("epochs=4", "samples_per_epoch=8", "sample_batch_size=4", "micro_batch_size=4", "sampler.steps=4"),
        *("timestep_range=[0,1]", "timestep_fraction=1", "grid_every=0", "checkpoint_every=1", "keep_checkpoints=1"),
        "mixed_precision=bf16",
    ]
    folders = {name: Path(where.folder) / name for name in ("first", "second", "killed")}
    same, kill = "gpu_check_sections:Deterministic", "gpu_check_sections:KilledByItself"
    calls = {"first": [same], "second": [same], "killed": [same, kill]}
    started = {
        name: _train(folder, [*settings, f"callbacks=[{','.join(calls[name])}]"]) for name, folder in folders.items()
    }
    ended = {name: _ended(process, where) for name, process in started.items()}
    for name in ("first", "second"):
        if ended[name]:
            raise RuntimeError(f"the run ended with status {ended[name]}: {_tail(folders[name])}")
    find.check(f"a run killed in epoch {KILLED_IN} left a checkpoint", ended["killed"] == -signal.SIGKILL)
    again = _ended(_train(folders["killed"], [*settings, f"callbacks=[{same}]", "resume=true"]), where)
    if again:
        raise RuntimeError(f"the resumed run ended with status {again}: {_tail(folders['killed'])}")
    tensors = {name: _tensors(folder) for name, folder in folders.items()}
    noise = _distance(tensors["first"], tensors["second"])
    apart = _distance(tensors["first"], tensors["killed"])
    find.figure("two equal runs", noise, "largest difference of their tensors, over the largest number")
    find.figure("whole and resumed", apart, "largest difference of their tensors, over the largest number")
    find.figure("tensors compared", len(tensors["first"]))
    if noise == 0:
        find.check(f"the resumed run has the bits of the whole one, they differ by {apart:.3g}", apart == 0)
    else:
        find.note("two equal runs differ on this GPU, so no bits can be compared")
        find.check(f"the resumed run is no further from it than ten times that, {apart:.3g}", apart <= 10 * noise)


def _train(folder: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "diffusion_align", "train", "quickstart", f"output_dir={folder}", *settings]
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # which deterministic algorithms need
    with _log(folder).open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _ended(process: subprocess.Popen[bytes], where: Where) -> int:
    """Its exit status; a process that is late is killed, and TimeoutExpired raised."""
    try:
        return process.wait(max(1.0, where.left))
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def _log(folder: Path) -> Path:
    return folder.with_name(folder.name + ".log")


def _tail(folder: Path) -> str:
    return _log(folder).read_text(encoding="utf-8", errors="replace")[-1500:]


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of a run's last checkpoint, the optimizer's too, but for random states; and of its ``final/``."""
    from safetensors.torch import load_file

    newest = max((run / "checkpoints").glob("step_*"))
    files = [*newest.glob("*.safetensors"), *(run / "final").glob("*.safetensors")]
    found = {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    state = torch.load(newest / "tensors.pt", map_location="cpu", weights_only=True)
    _walk("tensors.pt", {name: value for name, value in state.items() if name != "rng"}, found)
    return found


def _walk(name: str, value: Any, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _walk(f"{name} {key}", inner, found)


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """0 for the same bits; else the largest difference in a tensor over the largest number in it."""
    if one.keys() != other.keys():
        raise RuntimeError(f"they hold other tensors: {sorted(one.keys() ^ other.keys())[:5]}")
    apart = 0.0
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            a, b = tensor.double(), other[name].double()
            apart = max(apart, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return apart


# -- text --------------------------------------------------------------------------------------------------------------


def text_size(find: Findings, where: Where, name: str) -> None:
    """An epoch of GRPO on a random Llama: tokens per second in sampling and in training."""
    from diffusion_align import TextAlignmentPipeline

    size, device = TEXT_SIZES[name], where.place
    model, tokenizer = random_language_model(size, device, small=where.tiny)
    find.figure("parameters", round(parameters(model) / 1e9, 4), "10^9")
    samples, length = (8, 16) if where.tiny else (64, 256)
    meter = meters.EpochMeter()
    TextAlignmentPipeline.from_pipe(model, tokenizer, model=size.model).align(
        method="grpo",
        output_dir=Path(where.folder) / "run",
        prompts=["And he", "In the beginning", "The king", "Behold"],
        reward=numbered_texts,
        epochs=2,
        samples_per_epoch=samples,
        group_size=samples // 4,
        sample_batch_size=samples,
        micro_batch_size=samples // 4,
        updates_per_epoch=1,
        max_completion_length=length,
        mixed_precision="bf16",
        lora={"rank": 16},
        grid_every=0,
        checkpoint_every=100,
        checkpoint_minutes=None,
        callbacks=[meter],
    )
    sampling, training = meter.last("sampling"), meter.last("training")
    tokens = meter.epochs[-1]["completions/tokens"]
    find.figure("completions", samples, f"of at most {length} tokens, {samples} at once")
    find.figure("sampling", round(tokens / sampling.seconds, 1), "tokens/s")
    find.figure("training", round(tokens / training.seconds, 1), "tokens of completions/s")
    if where.device == "cuda":
        for phase, measured in (("sampling", sampling), ("training", training)):
            find.figure(f"peak memory, {phase}", round(measured.bytes / GIB, 3), "GiB in tensors")
    if found := meter.deviations():  # a rollout is token by token, with a cache
        find.figure("ratio before any update", max(found), "largest deviation from 1")
    trained = [row for row in meter.updates if row.get("grad_norm", 0) > 0]
    find.check(
        f"{len(trained)} of {len(meter.updates)} updates have a gradient", len(trained) == len(meter.updates) > 0
    )


# -- the tests ---------------------------------------------------------------------------------------------------------


def tests(find: Findings, where: Where) -> None:
    """``pytest -m gpu tests/gpu``."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed: pip install pytest")
    results = Path(where.folder) / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    process = subprocess.Popen(
        [*command, f"--junitxml={results}", "--tb=short"],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    try:
        printed, _ = process.communicate(timeout=max(1.0, where.left - 2))
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        raise RuntimeError(f"the tests did not end in time: {printed[-3000:]}") from None
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", printed)}
    for word, count in counts.items():
        find.figure(f"tests {word}", count)
    if process.returncode not in (0, 5):
        find.note(printed[-6000:])
    find.check(f"pytest ended with status {process.returncode}", process.returncode == 0)


Section = Callable[[Findings, Where], None]


def _sized(section: Callable[[Findings, Where, str], None], name: str) -> Section:
    return lambda find, where: section(find, where, name)


SECTIONS: dict[str, Section] = {
    "machine": machine,
    **{name: _sized(image_size, name) for name in IMAGE_SIZES},
    "ratio": ratio,
    "resume": resume,
    "batch-sizes": batch_sizes,
    **{name: _sized(text_size, name) for name in TEXT_SIZES},
    "tests": tests,
}


def main(name: str, file: str, settings: str) -> int:
    find, where = Findings(Path(file)), Where(**json.loads(settings))
    Path(where.folder).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1 if where.device == "cpu" else torch.get_num_threads())
    try:
        if where.device == "cuda" and name != "machine" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise Skipped("this GPU does not compute in bfloat16")
        SECTIONS[name](find, where)
    except Skipped as reason:
        find.skipped(str(reason))
    except BaseException as error:
        find.failed(error)
        return 1
    finally:
        shutil.rmtree(where.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
