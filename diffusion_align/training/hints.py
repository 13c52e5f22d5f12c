"""What to write for an unknown setting: our name for one of diffusers, TRL or transformers, or the nearest of ours."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion_align.errors import did_you_mean

HERE: dict[str, str] = {
    "adam_beta1": "adam_betas",
    "adam_beta2": "adam_betas",
    "adam_weight_decay": "weight_decay",
    "allow_tf32": "tf32",
    "aspect_ratio_buckets": "bucket_step",
    "attention_backend": "attention",
    "attn_implementation": "attention",
    "base_model": "model",
    "batch_size": "micro_batch_size samples_per_epoch",
    "bf16": "mixed_precision",
    "cfg_scale": "sampler.guidance_scale",
    "checkpointing_steps": "checkpoint_every",
    "center_rewards_coefficient": "center_coef",
    "cliprange": "clip_range",
    "cliprange_value": "value_clip",
    "clip_eps": "clip_range",
    "data_seed": "seed",
    "dataset_name": "dataset pairs prompts",
    **dict.fromkeys(
        ("cpu_offload", "enable_model_cpu_offload", "enable_sequential_cpu_offload", "offload", "text_encoder_offload"),
        "offload_text_encoders",
    ),
    "enable_bucket": "bucket_step",
    "enable_xformers_memory_efficient_attention": "attention",
    **dict.fromkeys(("enable_slicing", "enable_vae_slicing", "use_slicing", "vae_batch_size"), "vae_slicing"),
    **dict.fromkeys(("enable_tiling", "enable_vae_tiling", "use_tiling"), "vae_tiling"),
    **dict.fromkeys(("force_upcast", "no_half_vae", "vae_dtype"), "upcast_vae"),
    "eval_steps": "evaluation.every",
    "eval_strategy": "evaluation.every",
    "fp16": "mixed_precision",
    **dict.fromkeys(
        (
            "activation_checkpointing",
            "enable_gradient_checkpointing",
            "train_gradient_checkpointing",
            "unet_gradient_checkpointing",
            "use_gradient_checkpointing",
        ),
        "gradient_checkpointing",
    ),
    "guidance_scale": "sampler.guidance_scale",
    "horizon": "experimental.kl_horizon",
    "image_size": "resolution height width",
    "importance_sampling_level": "ratio_level",
    "init_kl_coef": "kl_coef",
    "kl_beta": "kl_coef beta",
    "learning_rate_scheduler": "lr_schedule",
    "local_rollout_forward_batch_size": "sample_batch_size",
    "log_with": "trackers",
    "logging_dir": "output_dir",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_layers": "lora.layers",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_target_modules": "lora.layers",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "lr_scheduler_type": "lr_schedule",
    "lr_warmup_steps": "warmup_steps",
    "max_length": "max_prompt_length max_completion_length",
    "max_new_tokens": "max_completion_length",
    "max_steps": "epochs",
    "max_tokens": "max_completion_length",
    "max_train_steps": "epochs",
    "mini_batch_size": "micro_batch_size",
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_path": "model",
    "negative_prompts": "negative_prompt",
    "num_epochs": "epochs",
    "num_images_per_prompt": "group_size",
    "num_inference_steps": "sampler.steps",
    "num_iterations": "inner_epochs",
    "num_inner_epochs": "inner_epochs",
    "num_ppo_epochs": "inner_epochs",
    "num_train_epochs": "epochs",
    "offload_ema": "ema_offload",
    "optim": "optimizer",
    "optimizer_type": "optimizer",
    "output": "output_dir",
    "per_prompt_stat_tracking": "advantages",
    "per_prompt_stat_tracking_buffer_size": "history_size",
    "per_prompt_stat_tracking_min_count": "history_min_count",
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "sample_batch_size",
    "precision": "mixed_precision",
    "pretrained_model_name_or_path": "model",
    "prompt": "prompts",
    "prompt_fn": "prompts",
    "r": "lora.rank",
    "rank": "lora.rank",
    "ref_model": "reference_model",
    "report_to": "trackers",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
    "reward_fn": "reward",
    "reward_funcs": "reward",
    "reward_model": "reward",
    "sample_eta": "sampler.eta",
    "sample_guidance_scale": "sampler.guidance_scale",
    "sample_num_batches_per_epoch": "samples_per_epoch",
    "sample_num_steps": "sampler.steps",
    "save_freq": "checkpoint_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "scheduler": "sampler.name lr_schedule",
    "steps": "sampler.steps epochs",
    "target_kl": "experimental.kl_target",
    "target_modules": "lora.layers",
    "torch_dtype": "dtype",
    "use_flash_attention_2": "attention",
    "use_xformers": "attention",
    "train_adv_clip_max": "advantage_clip",
    "train_batch_size": "micro_batch_size",
    "train_text_encoder": "lora.text_encoder",
    "train_clip_range": "clip_range",
    "train_max_grad_norm": "max_grad_norm",
    "train_num_inner_epochs": "inner_epochs",
    "train_timestep_fraction": "timestep_fraction",
    "train_dataset": "dataset pairs prompts",
    "train_learning_rate": "learning_rate",
    "train_data_dir": "pairs prompts",
    "use_8bit_adam": "optimizer",
    "use_dora": "lora.dora",
    "use_ema": "ema_decay",
    "use_lora": "lora.rank",
    "vf_coef": "value_coef",
    "wandb": "trackers",
    "warmup_ratio": "warmup_steps",
}
"""A name from diffusers, TRL or peft -> the settings that replace it; a hint names those the configuration has."""
ELSEWHERE: dict[str, str] = {
    "device": "the GPU is used where there is one; CUDA_VISIBLE_DEVICES says which",
    "device_map": "the GPU is used where there is one; CUDA_VISIBLE_DEVICES says which",
    "gpus": "start one process per GPU with `accelerate launch`",
    "num_gpus": "start one process per GPU with `accelerate launch`",
    "num_processes": "start one process per GPU with `accelerate launch`",
    "gradient_accumulation_steps": "it follows from samples_per_epoch, updates_per_epoch and micro_batch_size",
    "train_gradient_accumulation_steps": "it follows from samples_per_epoch, updates_per_epoch and micro_batch_size",
    "gradient_checkpointing_kwargs": "leave it out; checkpointing is never reentrant",
    "logging_steps": "every update is logged to metrics.jsonl",
    "use_vllm": "completions are sampled by the trained model itself",
}
"""A name from diffusers, TRL or peft without a setting here -> a sentence about it."""


def hint(word: str, known: Sequence[str], sections: Sequence[str] = (), others: Sequence[str] = ()) -> str:
    """What to write for a setting ``word`` that is unknown.

    Args:
        word: what was written.
        known: the settings that could have stood there.
        sections: those below them, as ``section.setting``.
        others: other names of settings, which could have stood there too.
    """
    theirs = HERE.get(word, "").split()
    ours = [name for name in theirs if name in sections or name.rpartition(".")[2] in known]
    if ours:
        return f"set {' or '.join(ours)}"
    if word in ELSEWHERE:
        return ELSEWHERE[word]
    # What it stands for is not here; what has a name like it is something else.
    if not theirs and (meant := did_you_mean(word, [*known, *others], cutoff=0.7)):
        return meant
    few = len(known) <= 12
    return f"known are {', '.join(sorted(known))}" if few else "`diffusion-align list settings` shows what can be set"
