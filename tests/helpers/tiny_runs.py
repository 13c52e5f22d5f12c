"""Settings of runs of seconds, with models of the package; and models to damage."""

import json

import yaml

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


def edit_json(file, **changes):
    """A function that changes values of the JSON ``file`` of a folder; ``...`` drops one."""

    def edit(folder):
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return edit


def changes(text):
    """``a=1; b=...`` as a mapping of settings, values as YAML; a value of ``...`` stays one."""
    pairs = (setting.partition("=")[::2] for setting in text.split("; "))
    return {key: ... if value == "..." else yaml.safe_load(value) for key, value in pairs}


def cases(text):
    """The lines of a table of inputs, without blank ones and those that begin with "# "."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("# ")]
