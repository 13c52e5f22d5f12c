"""TRL's DDPO, an epoch whenever one is wanted: ``peer_trl_ddpo.py JSON``, in the environment that peers.py makes."""

from __future__ import annotations

import io
import itertools
import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from peer_side import Enough, Side, finish
from PIL import Image


def jpeg(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Minus the size in kB of each image as a JPEG file, as our ``jpeg_compressibility``."""
    sizes = []
    for image in (images.float() * 255).nan_to_num().round().clamp(0, 255).to(torch.uint8).cpu():
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
        sizes.append(-buffer.tell() / 1000)
    return torch.tensor(sizes), {}


def main(given: dict[str, Any]) -> None:
    side = Side()
    warnings.filterwarnings("ignore")
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    import trl
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState()  # TRL logs while it loads the model, which accelerate allows only then
    samples, sample_batch, train_batch = (given[key] for key in ("samples", "sample_batch_size", "train_batch_size"))
    with tempfile.TemporaryDirectory() as folder:
        config = DDPOConfig(
            mixed_precision=given["mixed_precision"],
            sample_num_steps=given["steps"],
            sample_guidance_scale=given["guidance"],
            train_cfg=given["guidance"] > 1,
            sample_batch_size=sample_batch,
            sample_num_batches_per_epoch=samples // sample_batch,
            train_batch_size=train_batch,
            train_gradient_accumulation_steps=samples // train_batch // given["updates"],
            save_freq=10**9,
            project_kwargs={"project_dir": folder},
        )
        pipeline = DefaultDDPOStableDiffusionPipeline(given["model"], use_lora=True)
        prompts = itertools.cycle(given["prompts"])
        trainer = DDPOTrainer(config, jpeg, lambda: (next(prompts), {}), pipeline)
        pipeline.set_progress_bar_config(disable=True)
        side.watch_network(pipeline.unet)
        side.time_sampling(trainer, "_generate_samples")
        side.time_part(trainer.accelerator, "backward", "backward pass")
        side.time_part(trainer.optimizer, "step", "optimizer")
        side.time_part(trainer.accelerator, "clip_grad_norm_", "optimizer")
        side.time_part(pipeline.vae, "decode", "VAE")
        side.time_part(pipeline.text_encoder, "forward", "prompts")
        side.time_part(pipeline, "scheduler_step", "denoising step and log-prob")
        side.time_part(trainer, "compute_rewards", "reward")
        side.tell(version=trl.__version__, torch=torch.__version__, threads=torch.get_num_threads())
        step = 0
        for epoch in itertools.count(1):
            side.next_epoch()
            step = trainer.step(epoch, step)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Enough:
        finish()
