"""TRL's GRPO or DPO, a step whenever one is wanted: ``peer_trl_text.py JSON``, in the environment peers.py makes."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from peer_reward import digits
from peer_side import Enough, Side, finish


def main(given: dict[str, Any]) -> None:
    side = Side()
    warnings.filterwarnings("ignore")
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    import trl
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    disable_progress_bars()

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            side.time_part(optimizer, "step", "optimizer")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            side.next_epoch()

    model = AutoModelForCausalLM.from_pretrained(given["model"]).float()
    reference = AutoModelForCausalLM.from_pretrained(given["model"]).float()
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    batch, samples = given["micro_batch_size"], given["samples"]
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": samples // batch,
            "learning_rate": given["learning_rate"],
            "max_steps": 10**6,
            "bf16": given["bf16"],
            "fp16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        rows = {
            "train_dataset": Dataset.from_list(given["rows"]),
            "processing_class": tokenizer,
            "callbacks": [Turns()],
        }
        if given["method"] == "grpo":
            config = trl.GRPOConfig(
                **common,
                num_generations=given["group_size"],
                max_completion_length=given["length"],
                temperature=1.0,
                beta=0.0,
            )
            trainer = trl.GRPOTrainer(model, reward_funcs=digits, args=config, **rows)
            side.time_sampling(trainer, "_generate_and_score_completions")
            side.time_part(trainer, "_calculate_rewards", "reward")
        else:
            config = trl.DPOConfig(**common, max_length=None, beta=0.1)
            trainer = trl.DPOTrainer(model, ref_model=reference, args=config, **rows)
        side.watch_network(model)
        if given["rise"]:
            side.watch_rise(trainer, "compute_loss", trainer.accelerator, "backward")
        side.time_part(trainer.accelerator, "backward", "backward pass")
        side.time_part(trainer.accelerator, "clip_grad_norm_", "optimizer")
        side.tell(version=trl.__version__, torch=torch.__version__, threads=torch.get_num_threads())
        trainer.train()


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Enough:
        finish()
