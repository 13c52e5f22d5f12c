"""Our training, an epoch whenever one is wanted: ``peer_ours.py JSON`` with ``recipe`` and ``overrides``."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bare_passes import called_before_collecting
from peer_side import Enough, Side, finish, memory


def watch_classes(side: Side) -> None:
    """Name what is called by functions and classes of ours, whoever has made the objects."""
    import diffusion_align.diffusion.ddpo as ddpo
    import diffusion_align.diffusion.rollout as rollout
    import diffusion_align.llm.policy as language
    from diffusion_align.diffusion.transitions import GaussianTransition
    from diffusion_align.training.collection import BatchScores
    from diffusion_align.training.statistics import UpdateStatistics

    side.time_part(rollout, "denoise", "denoising step and log-prob")
    side.time_part(GaussianTransition, "log_prob", "denoising step and log-prob")
    for function in ("normal_noise", "_draws"):
        side.time_part(rollout, function, "noise")
    for method in ("submit", "gather"):
        side.time_part(BatchScores, method, "reward")
    for function in ("linear_token_log_probs", "token_log_probs"):
        side.time_part(language, function, "log-probs of tokens")
    side.time_part(ddpo, "ratio_statistics", "metrics and report")
    side.time_part(UpdateStatistics, "add", "metrics and report")


def watch(side: Side, trainer: Any, given: dict[str, Any]) -> None:
    """Name what this trainer's own objects do."""
    policy = trainer.policy
    of_images = trainer.model_kind == "image"
    side.watch_network(policy.network if of_images else policy.model)
    side.time_sampling(trainer, "collect")
    if given.get("rise"):
        side.watch_rise(trainer, "loss", trainer.optimization, "backward")
    side.time_part(trainer.optimization, "backward", "backward pass")
    side.time_part(trainer.optimization, "step", "optimizer")
    side.time_part(policy, "decode", "VAE" if of_images else "texts")
    if of_images:
        side.time_part(policy, "encode", "prompts")
    else:
        side.time_part(policy, "log_probs", "log-probs of tokens")
    side.time_part(trainer, "_each", "metrics and report")
    if not given.get("monitor") and hasattr(trainer, "watch_kl"):
        trainer.watch_kl = lambda *_: None


def main(given: dict[str, Any]) -> None:
    side, seen = Side(), list[Any]()

    def before_collecting(trainer: Any) -> None:
        if not seen:
            seen.append(trainer)
            watch(side, trainer, given)
            config = trainer.config
            side.tell(
                torch=torch.__version__,
                threads=torch.get_num_threads(),
                start=time.process_time(),
                **memory(),
                settings={
                    "sample_batch_size": config.sample_batch_size,
                    "micro_batch_size": config.micro_batch_size,
                    "mixed_precision": trainer.accelerator.mixed_precision,
                },
            )
        side.next_epoch()

    from diffusion_align.methods import method_of
    from diffusion_align.pipelines.configuration import read_config
    from diffusion_align.pipelines.run import run

    watch_classes(side)
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["epochs=100000", "checkpoint_every=100000", "checkpoint_minutes=null"]
        settings = [f"output_dir={Path(folder) / 'run'}", *fixed, *given["overrides"]]
        config: Any = read_config(given["recipe"], settings)
        method_of(config.method)  # its class must be there
        with called_before_collecting(before_collecting):
            run(config)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Enough:
        finish()
