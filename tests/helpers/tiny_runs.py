"""Settings of runs of seconds, with models of the package."""

TINY = {
    "epochs": 1,
    "samples_per_epoch": 2,
    "sample_batch_size": 2,
    "micro_batch_size": 2,
    "updates_per_epoch": 1,
    "sampler": {"steps": 2, "guidance_scale": 1.0},
    "lora": {"rank": 2},
    "grid_every": 0,
    "num_threads": 1,
}
IMAGE_RUN = {
    "method": "ddpo",
    "model": "emoji-sd",
    "reward": "jpeg_compressibility",
    "prompts": ["a red apple", "a cat"],
    "output_dir": "run",
    **TINY,
}
