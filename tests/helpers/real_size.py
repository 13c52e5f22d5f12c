"""Random models of the published size, and what training them uses of this machine's memory, each in its own process.

    python -m tests.helpers.real_size make sdxl FOLDER
    python -m tests.helpers.real_size train FOLDER RUN key=value ...

``train`` prints one line of JSON: phase -> bytes at its peak beyond what Python and its libraries had before, files
that weights were read from not counted twice; and what ``doctor`` predicts.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from contextlib import suppress
from pathlib import Path

import torch

from diffusion_align.doctor.known_models import SD15, SDXL

PUBLISHED = {"sd15": (SD15, torch.float32), "sdxl": (SDXL, torch.bfloat16)}
SETTINGS = {
    "method": "ddpo",
    "prompts": ["a red apple", "a cat"],
    "reward": "jpeg_compressibility",
    "samples_per_epoch": 2,
    "sample_batch_size": 2,
    "micro_batch_size": 2,
    "updates_per_epoch": 1,
    "epochs": 1,
    "grid_every": 0,
    "sampler": {"steps": 2},
    "timestep_fraction": 1.0,
    "lora": {"rank": 16},
    "gradient_checkpointing": True,
}


def make(name: str, folder: Path) -> None:
    """Write a pipeline of the published configuration, its weights random."""
    import diffusers
    import transformers

    from diffusion_align.assets import asset_path

    configs, dtype = PUBLISHED[name]
    torch.manual_seed(0)
    parts = {"scheduler": diffusers.DDIMScheduler.from_config(configs["scheduler"])}
    for part, config in configs.items():
        if part == "scheduler":
            continue
        if part.startswith("text_encoder"):
            kind = getattr(transformers, config["architectures"][0])
            shape = {key: value for key, value in config.items() if key != "architectures"}
            with torch.device("meta"):
                network = kind(kind.config_class(**shape))
        else:
            kind = diffusers.AutoencoderKL if part == "vae" else diffusers.UNet2DConditionModel
            with torch.device("meta"):
                network = kind.from_config(config)
        parts[part] = _random(network.to(dtype))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(asset_path("emoji-sd") / "tokenizer")
    tokenizer.model_max_length = 77
    if name == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            tokenizer=tokenizer, tokenizer_2=tokenizer, add_watermarker=False, **parts
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    pipeline.save_pretrained(folder)


def _random(network):
    """On the CPU, every layer about as large as its input."""
    network = network.to_empty(device="cpu")
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(float(name.endswith("weight")))
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return network


def train(model: str, folder: str, overrides: list[str]) -> dict:
    """What a run of one epoch used, and what was predicted."""
    from diffusion_align.diffusion.ddpo import DDPOTrainer
    from diffusion_align.doctor.estimate import CPU, Estimator
    from diffusion_align.doctor.model_files import find_model
    from diffusion_align.methods import method_of
    from diffusion_align.pipelines.configuration import check_config
    from diffusion_align.pipelines.run import run
    from diffusion_align.training.reading import apply_overrides

    raw = apply_overrides(SETTINGS | {"model": model, "output_dir": folder}, overrides)
    config = check_config(raw)
    files = find_model(config)
    estimator = Estimator(files, method_of(config.method).epoch_cost(config))
    predicted = estimator.estimate(config, CPU)
    run(check_config(_small(raw)))  # whatever libraries load and allocate once
    watch = Watch()
    with watch, suppress(Done):
        DDPOTrainer.collect = watch.during("sampling", DDPOTrainer.collect)
        DDPOTrainer._update = watch.during("training", DDPOTrainer._update, last=True)
        run(config)
    always = predicted.peak - max(predicted.phases.values())
    return {
        "measured": watch.peaks,
        "predicted": {name: always + size for name, size in predicted.phases.items()},
        "weights": sum(predicted.weights.values()),
        "files": watch.files,
    }


def _small(raw):
    return raw | {"model": "emoji-sd", "output_dir": f"{raw['output_dir']}-small", "height": None, "width": None}


class Done(Exception):
    """Both phases are over; what the run would still sample for its previews is not waited for."""


class Watch:
    """Reads this process's memory again and again; ``peaks``: phase -> bytes beyond those at the beginning."""

    def __init__(self) -> None:
        self.before, self.peaks, self.files = _anonymous_and_files(), {}, {}
        self.phase = "loading"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def during(self, phase, function, *, last=False):
        def watched(*arguments):
            before, self.phase = self.phase, phase
            self.files[phase] = _weight_files()
            found = function(*arguments)
            self.phase = before
            if last:
                raise Done
            return found

        return watched

    def _look(self) -> None:
        while not self._done.wait(0.02):
            used = _anonymous_and_files() - self.before
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), used)


def _anonymous_and_files() -> int:
    status = Path("/proc/self/status").read_text()
    return sum(1024 * int(kb) for kb in re.findall(r"^Rss(?:Anon|File):\s+(\d+) kB$", status, re.MULTILINE))


def _weight_files() -> int:
    """Resident bytes of mapped weight files."""
    total, mapped = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            mapped = line.endswith(".safetensors")
        elif mapped and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


if __name__ == "__main__":
    task, *given = sys.argv[1:]
    torch.set_num_threads(2)
    if task == "make":
        make(given[0], Path(given[1]))
    else:
        print(json.dumps(train(given[0], given[1], given[2:])))
