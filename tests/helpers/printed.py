"""Commands and code as pages print them, only shorter: fewer epochs, samples, steps, pairs and prompts."""

import re

from diffusion_align.assets import shipped_prompts
from diffusion_align.methods import method_of
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.training.reading import load_yaml

SHORT = ["samples_per_epoch=8", "updates_per_epoch=1", "mixed_precision=no", "grid_every=0"]
SHORT_IMAGES = [*SHORT, "sampler.steps=2", "group_size=4"]
SHORT_TEXTS = [*SHORT, "sample_batch_size=8", "max_completion_length=12"]
SHORTER = {
    "epochs=2": "epochs=1",
    "samples_per_epoch=16": "samples_per_epoch=8",
    '"steps": 10': '"steps": 2',
    'pairs="emoji_style"': 'pairs={"source": "emoji_style", "max_pairs": 16}',
}

# Before a command: doctor runs no network, neither to count its costs nor to time it, which takes 5 to 15 seconds.
# tests/doctor compares what it counts and prints, of the same recipes.
UNCOUNTED = """
from diffusion_align.doctor import cost_report, estimate
from diffusion_align.doctor.memory import NetworkCost
estimate.network_cost = lambda *_: NetworkCost(10, 10, 10, 10, 10, 10)
cost_report._time_here = lambda *_: []
"""


def blocks(text, languages):
    """(language, content) of the fenced blocks in one of ``languages``, "bash|python" say, in their order."""
    return re.findall(rf"^```({languages})\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shorter_code(block):
    for printed, run in SHORTER.items():
        block = block.replace(printed, run)
    return block


def shorter(words, folder):
    """The words behind ``diffusion-align``; of a list of prompts the first few, written to ``folder``."""
    if "--prompts" in words:
        place = words.index("--prompts") + 1
        few = folder / f"{words[place]}.txt"
        few.write_text("\n".join(shipped_prompts()[words[place]].read_text().splitlines()[:6]))
        words = [*words[:place], str(few), *words[place + 1 :]]
    if words[0] == "pairs" and "--max-new-tokens" not in words:
        return [*words, "--steps=2", "--guidance-scale=1"]
    if words[0] != "train":
        return words
    recipe = load_yaml(shipped_configs()[words[1]])
    method = method_of(recipe["method"])
    image = method.model_kind == "image"
    if "noisy_steps" in recipe.get("sampler", {}) or any(word.startswith("sampler.noisy") for word in words):
        words = [word for word in words if not word.startswith("sampler.noisy")]
        words += ["sampler.noisy_steps=1", "sampler.noisy_range=null"]  # of the two steps one is noisy
    few = ["pairs.max_pairs=16"] if words[1:] in (["dpo_emoji_style"], ["flow_emoji_dpo"]) else []
    few += ["evaluation.samples=4"] if "evaluation" in recipe else []
    few += ["consistency_images=4"] if "consistency_images" in method.config_class.model_fields else []
    epochs = "epochs=2" if "resume=true" in words else "epochs=1"
    asked = [word.replace("samples: 32", "samples: 4") for word in words if not word.startswith("epochs=")]
    short = SHORT_IMAGES if image else SHORT_TEXTS
    known = [
        one for one in short if not one.startswith("group_size") or "group_size" in method.config_class.model_fields
    ]
    return [*asked, epochs, *few, *known]
