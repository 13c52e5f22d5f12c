"""Three hundred bad inputs through every command: one sentence or more, exit 2, nothing left behind, no model loaded.

The cases are grouped by kind; a name says the command and what is wrong. All of them share one folder, which has to be
the same after each.
"""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers.tiny_runs import IMAGE_RUN

LONG = "x" * 5000
MEGABYTES = "ab " * 10**6
JPEG = "jpeg_compressibility"
TEXT_RUN = {
    "method": "grpo",
    "model": "tiny-lm",
    "reward": "length",
    "prompts": ["the cat", "a dog"],
    "output_dir": "run",
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "num_generations": 2,
    "num_threads": 1,
}
PAIRS_RUN = {key: value for key, value in IMAGE_RUN.items() if key not in ("prompts", "reward")} | {
    "method": "diffusion_dpo",
    "pairs": "emoji_style",
    "beta_dpo": 2000,
}
DPO_RUN = {key: value for key, value in TEXT_RUN.items() if key not in ("prompts", "reward", "num_generations")} | {
    "method": "dpo",
    "dataset": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4,
}

# -- paths -------------------------------------------------------------------------------------------------------------

PATHS = {
    "NUL": ("a\0b", "NUL character"),
    "surrogate": ("a\udcff", "not valid Unicode|raw data as a unicode string"),
    "empty": ("", "empty|prompts.source='' is not allowed"),
    "blank": ("  ", "empty|unknown reward ''"),
    "nobody": ("~nobody-is-called-so/x", "no user of that name"),
    "dangling": ("dangling", "is a link to nothing"),
    "loop": ("loop", "link that leads back to itself"),
    "pipe": ("pipe", "is a pipe"),
    "socket": ("socket", "is a socket"),
    "device": ("/dev/null", "is a device"),
    "long": (LONG, "File name too long"),
}
NO_FOLDER = {"folder": ("folder", "is a folder|no shipped recipe|nor a shipped recipe|is not an image")}
NO_FILE = {"file": ("note.txt", "is a file|run folder|is a file that does not end in")}
REMOTE = "reward={name: remote, url: 'http://127.0.0.1:9', token_file: ...}"


def words(command):
    """The arguments of a command, which is a list of them, or a text that no blank is in but between them."""
    return command.split() if isinstance(command, str) else command


def places(name, command, more=None, *, but=(), as_yaml=False):
    """A case for each of ``PATHS`` and ``more`` in place of ``...``."""
    for what, (path, wanted) in (PATHS | (more or {})).items():
        put = json.dumps(path) if as_yaml else path
        if what not in but:
            yield f"{name}: {what}", [word.replace("...", put) for word in words(command)], wanted


def settings(name, file, *overrides, more=None, but=()):
    return places(f"train {name}", ["train", f"{file}.yaml", *overrides], more, but=but, as_yaml=True)


PATH_CASES = [
    *places("train config", "train ...", NO_FOLDER),
    *places("doctor config", "doctor ...", NO_FOLDER),
    *settings("output_dir", "image", "output_dir=...", more=NO_FILE),
    *settings("model", "image", "model=...", more=NO_FILE),
    *settings("base_config", "image", "model=m.safetensors", "base_config=..."),
    *settings("prompts", "image", "prompts={source: ...}"),
    *settings("pairs", "pairs", "pairs={source: ...}", but=["empty"]),
    *settings("text model", "text", "model=...", more=NO_FILE),
    *settings("reference_model", "text", "reference_model=...", "beta=0.1", more=NO_FILE),
    *settings("dataset", "dpo", "dataset={source: ...}", but=["empty"]),
    *settings("reward head", "image", "reward={name: aesthetic, head: ...}", more=NO_FOLDER),
    *settings("token_file", "image", REMOTE, more=NO_FOLDER),
    *settings("reward file", "image", "reward=...", but=["empty", "device"]),
    *places("sample -o", "sample emoji-sd -p a -o ...", NO_FILE),
    *places("sample model", "sample ... -p a", NO_FILE),
    *places("sample --prompts", "sample emoji-sd --prompts ..."),
    *places("complete -o", "complete tiny-lm -p a -o ...", NO_FOLDER),
    *places("complete model", "complete ... -p a", NO_FILE),
    *places("complete --prompts", "complete tiny-lm --prompts ..."),
    *places("score image", f"score {JPEG} ...", NO_FOLDER),
    *places("score head", "score aesthetic red.png --option head=...", NO_FOLDER, as_yaml=True),
    *places("compare first", f"compare ... emoji-sd --judge {JPEG} -p a", NO_FILE),
    *places("compare -o", f"compare emoji-sd emoji-sd --judge {JPEG} -p a -o ...", NO_FOLDER),
    *places("pairs -o", f"pairs emoji-sd --judge {JPEG} -p a -o ...", NO_FILE),
    *places("report", "report ...", NO_FILE),
    *places("estimators --plot", "estimators --samples 2 --plot ...", NO_FILE),
    *places("serve-reward --token-file", f"serve-reward {JPEG} --token-file ...", NO_FOLDER),
]

# -- YAML --------------------------------------------------------------------------------------------------------------

YAML = {
    "tag": ("epochs: !!int x", "the tag .* is not read"),
    "python tag": ("epochs: !!python/object/apply:os.system [id]", "the tag .* is not read"),
    "own tag": ("epochs: !env HOME", "the tag .* is not read"),
    "binary tag": ("model: !!binary aGk=", "the tag .* is not read"),
    "anchor": ("epochs: &a 1", "aliases"),
    "alias": ("epochs: &a 1\nseed: *a", "aliases"),
    "laughs": ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "aliases"),
    "merge": ("<<: {epochs: 3}", "unknown setting '<<'"),
    "key twice": ("epochs: 1\nepochs: 2", "line 2.: the key 'epochs' is given twice"),
    "key twice below": ("sampler: {steps: 2, steps: 3}", "the key 'steps' is given twice"),
    "4000 brackets": ("prompts: " + "[" * 4000, "nested more than"),
    "4000 braces": ("prompts: " + "{a: " * 4000, "nested more than"),
    "5000 digits": ("epochs: " + "9" * 5000, "too large or too long"),
    "beyond floats": ("learning_rate: 1e999", "too large or too long"),
    "octal": ("epochs: 010", "epochs='010' is not allowed: 010 is more than one number"),
    "new octal": ("epochs: 0o10", "more than one number"),
    "hexadecimal": ("epochs: 0x10", "more than one number"),
    "binary": ("epochs: 0b11", "more than one number"),
    "underscores": ("epochs: 1_000", "more than one number"),
    "sexagesimal": ("epochs: 1:10", "more than one number"),
    "octal option": (f"reward: {{name: {JPEG}, quality: 010}}", "reward.quality: 010 is more than one number"),
    "date": ("epochs: 2024-11-30", "epochs='2024-11-30' is not allowed: it must be a number"),
    "date that is none": ("epochs: 2024-13-45", "it must be a number"),
    "date for a section": ("sampler: 2024-13-45", "sampler='2024-13-45' is not allowed"),
    "yes for a number": ("epochs: yes", "epochs=True is not allowed: it must be a number"),
    "no for a number": ("epochs: no", "it must be a number"),
    "text for a number": ("epochs: '010'", "more than one number"),
    "NUL": ("model: a\0b", "special characters are not allowed"),
    "escape": ("model: a\x1bb", "special characters are not allowed"),
    "tab": ("sampler:\n\tsteps: 2", r"not valid YAML \(line 2\)"),
    "two documents": ("epochs: 1\n---\nepochs: 2", "single document"),
    "open quote": ("model: 'a", "not valid YAML"),
    "bracket and brace": ("prompts: [a}", "not valid YAML"),
    "list as a key": ("? [a]\n: 1", "a key must be a text"),
    "future": ("%YAML 9.9\n---\nepochs: 1", "not valid YAML"),
    "at sign": ("model: @home", "not valid YAML"),
    "on as a key": ("on: 3", "unknown setting 'on'"),
}
OVERRIDES = ["tag", "python tag", "anchor", "4000 brackets", "5000 digits", "octal", "sexagesimal", "NUL", "date"]
YAML_CASES = [
    *((f"train YAML: {what}", f"train yaml/{i}.yaml", wanted) for i, (what, (_, wanted)) in enumerate(YAML.items())),
    *(
        (f"override: {what}", ["train", "image.yaml", YAML[what][0].replace(": ", "=", 1)], YAML[what][1])
        for what in OVERRIDES
    ),
    ("train UTF-16", "train utf16.yaml", "not text in UTF-8"),
    ("train Latin-1", "train latin1.yaml", r"\(line 2\): it is not text in UTF-8"),
    ("doctor of a text", "doctor note.txt", "must hold a mapping of settings|not valid YAML"),
    ("score option: tag", ["score", JPEG, "red.png", "--option", "quality=!!int 3"], "the tag .* is not read"),
    ("score option: alias", ["score", JPEG, "red.png", "--option", "quality=&a 3"], "aliases"),
    ("score option: octal", f"score {JPEG} red.png --option quality=010", "more than one number"),
    ("score option: no key", f"score {JPEG} red.png --option quality", "not of the form key=value"),
    ("sample a run with a key twice", "sample twice -p a", "the key 'model' is given twice"),
    ("complete by a run with tags", "complete tagged -p a", "the tag .* is not read"),
]

# -- numbers -----------------------------------------------------------------------------------------------------------

COUNTS = [
    "epochs",
    "samples_per_epoch",
    "sample_batch_size",
    "micro_batch_size",
    "updates_per_epoch",
    "inner_epochs",
    "seed",
    "warmup_steps",
    "checkpoint_every",
    "keep_checkpoints",
    "grid_every",
    "num_threads",
    "lora.rank",
    "lora.alpha",
    "sampler.steps",
    "group_size",
]
COEFFICIENTS = [
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "kl_coef",
    "advantage_clip",
    "clip_range",
    "clip_range_nats",
    "sampler.eta",
    "sampler.guidance_scale",
    "timestep_fraction",
    "stop_when.kl_above",
]
OF_TEXT = ["temperature", "epsilon", "epsilon_high", "beta", "max_completion_length", "num_generations"]
REFUSED = "=.* is not allowed"


def option(name, setting, *, text=False):
    """``train`` with an option of a reward."""
    return ["train", "text.yaml" if text else "image.yaml", f"reward={{name: {name}, {setting}}}"]


NUMBER_CASES = [
    *((f"train {name}=2e12", f"train image.yaml {name}=2e12", f"^{name}{REFUSED}") for name in COUNTS),
    *((f"train {name}=1e300", f"train image.yaml {name}=1e300", f"^{name}{REFUSED}") for name in COEFFICIENTS),
    *((f"train {name}=1e300", f"train text.yaml {name}=1e300", f"^{name}{REFUSED}") for name in OF_TEXT),
    *((f"train {name}=.nan", f"train image.yaml {name}=.nan", f"^{name}=nan is not") for name in COEFFICIENTS[:6]),
    ("train lora.rank=2e6", "train image.yaml lora.rank=2e6", "^lora.rank=2000000.0 is not allowed"),
    ("train samples_per_epoch=2e9", "train image.yaml samples_per_epoch=2e9", "^samples_per_epoch=2000000000.0 is not"),
    ("train adam_betas", ["train", "image.yaml", "adam_betas=[0.9, 1e300]"], "^adam_betas.1="),
    ("train reward_weights", "train image.yaml reward_weights=[1e300]", "^reward_weights.0="),
    ("train max_prompts", ["train", "image.yaml", "prompts={source: note.txt, max_prompts: 2e12}"], "max_prompts="),
    ("train evaluation.pictures", ["train", "image.yaml", "evaluation={pictures: 2e12}"], "^evaluation.pictures="),
    ("train dynamic_beta.hidden", ["train", "dpo.yaml", "dynamic_beta={hidden: 2e12}"], "^dynamic_beta.hidden="),
    ("train reward scale", option(JPEG, "scale: 1e300"), r"scale=1e\+300"),
    ("train reward quality", option(JPEG, "quality: 1e9"), "quality="),
    ("train reward batch_size", option("aesthetic", "batch_size: 1000000000000"), "batch_size=.* less than or equal"),
    ("train reward timeout", option("remote", "timeout: 1e300"), "timeout=.* less than or equal to"),
    ("train reward retries", option("vlm_judge", "retries: 1000000000000"), "retries=.* less than or equal to"),
    ("train reward target", option("length", "target: 1e300", text=True), "target="),
    ("train reward tolerance", option("numeric_match", "tolerance: 1e300", text=True), "tolerance="),
    ("sample --steps", "sample emoji-sd -p a --steps 2000000000", "'--steps'"),
    ("sample --guidance-scale nan", "sample emoji-sd -p a --guidance-scale nan", "'--guidance-scale'"),
    ("sample --guidance-scale inf", "sample emoji-sd -p a --guidance-scale inf", "'--guidance-scale'"),
    ("sample --eta nan", "sample emoji-sd -p a --eta nan", "'--eta'"),
    ("sample --seed", f"sample emoji-sd -p a --seed {2**63}", "'--seed'"),
    ("complete --max-new-tokens", "complete tiny-lm -p a --max-new-tokens 2000000000", "'--max-new-tokens'"),
    ("complete beyond the context", "complete tiny-lm -p a --max-new-tokens 5000", "does not fit behind"),
    ("complete --temperature nan", "complete tiny-lm -p a --temperature nan", "'nan' is not a number from 0.01 to"),
    ("complete --temperature 1e300", "complete tiny-lm -p a --temperature 1e300", "'--temperature'"),
    ("compare --per-prompt", f"compare a/b c/d --judge {JPEG} -p a --per-prompt 2000000000", "'--per-prompt'"),
    ("pairs --per-prompt", f"pairs a/b --judge {JPEG} -p a -o x --per-prompt 2000000000", "'--per-prompt'"),
    ("pairs --guidance-scale inf", f"pairs a/b --judge {JPEG} -p a -o x --guidance-scale inf", "'--guidance-scale'"),
    ("serve-reward --port", f"serve-reward {JPEG} --port 70000", "'--port'"),
    ("serve-reward --threads", f"serve-reward {JPEG} --threads 100000", "'--threads'"),
    ("serve-reward --max-bytes", f"serve-reward {JPEG} --max-bytes 999999999999999999999", "'--max-bytes'"),
    ("serve-reward --max-batch", f"serve-reward {JPEG} --max-batch 0", "'--max-batch'"),
    ("estimators --samples", "estimators --samples 2000000000", "'--samples'"),
    ("estimators --actions", "estimators --actions 2000000000", "'--actions'"),
    ("estimators --seed", "estimators --seed -1", "'--seed'"),
    ("estimators --q nan", "estimators --q nan 1", "no Gaussian"),
    ("estimators --q inf", "estimators --q inf 1", "no Gaussian"),
    ("estimators --p of no width", "estimators --p 0 0", "no Gaussian"),
    ("doctor learning_rate", "doctor image.yaml learning_rate=1e300", r"^learning_rate=1e\+300 is not allowed"),
]

# -- devices, prompts, names, run folders ------------------------------------------------------------------------------

REWARD_FILES = {  # what is in them
    "exits": ("import sys\nsys.exit(0)\n", r"cannot be imported \(SystemExit: 0"),
    "broken": ("def f(images\n", "cannot be imported"),
    "needs": ("import no_such_package\n", "cannot be imported"),
    "nothing": ("", "has no 'f'"),
    "short": ("def f(images):\n    return [0.0] * len(images)\n", "must take three arguments"),
}
OTHER_CASES = [
    ("sample without a prompt", "sample emoji-sd", "no prompt given: use --prompt TEXT"),
    ("sample from nothing", "sample ./no -p a", "model='./no' is neither"),
    ("sample from a folder that is no model", "sample folder -p a", "the folder has no model_index.json"),
    ("sample prompts missing", "sample emoji-sd --prompts no.txt", "prompts.source='no.txt': there is no such file"),
    ("sample below a file", "sample emoji-sd -p a -o note.txt/x", "--output: the folder note.txt/x cannot be used"),
    ("sample into /proc", "sample emoji-sd -p a -o /proc", "--output: the folder /proc cannot be used"),
    ("score by a name near another", "score jpeg_compresibility red.png", "'jpeg_compresibility': did you mean"),
    ("score by a missing file", "score no.py:f red.png", "reward file 'no.py' does not exist"),
    ("compare without a prompt", "compare emoji-sd emoji-sd --judge aesthetic", "no prompt given"),
    ("compare below a file", f"compare a/b c/d --judge {JPEG} -p a -o note.txt/x.png", "the folder note.txt cannot be"),
    ("compare into /proc", f"compare a/b c/d --judge {JPEG} -p a -o /proc/x.png", "the folder /proc cannot be used"),
    ("pairs without a prompt", f"pairs emoji-sd --judge {JPEG} -o x", "no prompt given: use --prompt TEXT"),
    ("pairs of a blank prompt", ["pairs", "emoji-sd", "--judge", JPEG, "-o", "x", "-p", " "], "entry 0 is blank: give"),
    ("pairs from nothing", f"pairs ./no --judge {JPEG} -o x -p a", "model='./no' is neither"),
    ("pairs into a used folder", f"pairs emoji-sd --judge {JPEG} -p a -o folder", "='folder' is already used: choose"),
    (
        "pairs below a file",
        f"pairs emoji-sd --judge {JPEG} -p a -o note.txt/x",
        "'note.txt/x' cannot be made: note.txt",
    ),
    ("report of nothing", "report gone", "^gone is not a run folder"),
    ("report of a folder that is no run", "report folder", "^folder is not a run folder"),
    ("doctor of nothing", "doctor no.yaml", "config 'no.yaml' is neither a file nor a shipped recipe"),
    ("doctor of an unknown key", "doctor grpo_tiny epoch=3", "unknown setting 'epoch': did you mean 'epochs'"),
    ("doctor of no override", "doctor quickstart epochs", "'epochs' is not of the form key=value"),
    ("serve-reward --device cuda", f"serve-reward {JPEG} --device cuda:99", "--device cuda:99 cannot be used"),
    ("serve-reward --device word", f"serve-reward {JPEG} --device toaster", "--device toaster cannot be used"),
    ("serve-reward --device empty", ["serve-reward", JPEG, "--device", ""], "must not be empty"),
    ("serve-reward --device of 5000 characters", f"serve-reward {JPEG} --device {LONG}", "cannot be used"),
    ("serve-reward --device meta", f"serve-reward {JPEG} --device meta", "holds no numbers"),
    ("train reward device", option("aesthetic", "device: 'cuda:99'"), "device='cuda:99' cannot be used"),
    ("train reward device list", option("aesthetic", "device: [1]"), "device="),
    ("train text reward device", option("classifier", "model: a/b, device: toaster", text=True), "device='toaster'"),
    ("score device", "score aesthetic red.png --option device=cuda:99", "device='cuda:99' cannot be used"),
    ("sample megabytes", ["sample", "emoji-sd", "-p", MEGABYTES], "3,000,000 characters"),
    ("compare megabytes", [*f"compare a/b a/c --judge {JPEG} -p".split(), MEGABYTES], "3,000,000 characters"),
    ("pairs megabytes", [*f"pairs a/b --judge {JPEG} -o x -p".split(), MEGABYTES], "3,000,000 characters"),
    ("train megabytes", "train image.yaml prompts=long.txt", "row 0: the prompt has 30,0"),
    ("train show_prompts of megabytes", f"train image.yaml show_prompts=['{'ab' * 15000}']", "show_prompts: entry 0"),
    ("sample a surrogate", "sample emoji-sd -p a\udcff", "not valid Unicode"),
    ("complete a surrogate", "complete tiny-lm -p a\udcff", "not valid Unicode"),
    ("pairs a surrogate", f"pairs emoji-sd --judge {JPEG} -o x -p a\udcff", "not valid Unicode"),
    ("score a surrogate", f"score {JPEG} red.png -p a\udcff", "not valid Unicode"),
    ("score option: another name", f"score {JPEG} red.png --option name=aesthetic", "the reward is named already"),
    ("train prompts of two columns of one name", "train image.yaml prompts=twice.csv", "columns are called 'prompt'"),
    ("train prompts of no dataset", "train image.yaml prompts=nobody/no-such", "cannot be loaded .*nobody"),
    (
        "train evaluation prompts of no dataset",
        ["train", "image.yaml", f"evaluation={{prompts: {{source: nobody/no-such}}, reward: {JPEG}}}"],
        "cannot be loaded .*nobody",
    ),
    ("sample no prompt in a file", "sample emoji-sd --prompts empty.txt", "holds no prompt"),
    ("complete no prompt in a file", "complete tiny-lm --prompts empty.txt", "no prompt"),
    ("complete no prompt", "complete tiny-lm", "no prompt"),
    ("score an empty file", f"score {JPEG} empty.png", "empty.png is no PNG, JPEG, WEBP, GIF, BMP or TIFF image"),
    ("score a cut picture", f"score {JPEG} cut.png", "cut.png is no PNG, JPEG, WEBP, GIF, BMP or TIFF image"),
    ("score a text", f"score {JPEG} note.txt", "note.txt is no PNG, JPEG, WEBP, GIF, BMP or TIFF image"),
    ("score 32 bits", f"score {JPEG} float.tiff", "do not say what is white"),
    ("score PostScript", f"score {JPEG} script.png", "script.png is no PNG, JPEG, WEBP, GIF, BMP or TIFF image"),
    (
        "score two prompts for three",
        f"score {JPEG} red.png red.png red.png -p a -p b",
        "2 prompts for 3 images: give one",
    ),
    ("compare by nothing", "compare emoji-sd emoji-sd --judge taste -p a", "unknown reward 'taste'"),
    ("compare with a language model", f"compare emoji-sd tiny-lm --judge {JPEG} -p a", "language model"),
    (
        "compare three mistakes",
        "compare ./no ./neither --judge taste -p a",
        ["model='./no'", "model='./neither'", "unknown reward 'taste'"],
    ),
    ("pairs by nothing", "pairs emoji-sd --judge taste -p a -o x", "unknown reward 'taste'"),
    (
        "pairs resume nothing",
        f"pairs emoji-sd --judge {JPEG} -p a -o folder --resume",
        "cannot be resumed: it has no pairs_settings",
    ),
    ("complete by an image model", "complete emoji-sd -p a", "image model"),
    ("sample by a language model", "sample tiny-lm -p a", "language model"),
    ("list with an option of 5000 characters", f"list --{LONG}", "No such option: --xxx"),
    ("score option: misspelt for all", f"score {JPEG} red.png --option backgruond=true", "did you mean 'background'"),
    ("list of nothing", "list sampler", "'sampler': choose one of methods, configs, models, prompts, p"),
    ("list of 5000 characters", ["list", LONG], "there is no list"),
    ("list of NUL", ["list", "a\0b"], "there is no list"),
    ("report of a damaged run", "report damaged", "metrics.jsonl"),
    ("report of a run with a list for its end", "report odd", "evaluation.json"),
    ("train resume nothing", "train image.yaml output_dir=folder/used resume=true", "is not a run folder"),
    ("train resume a key twice", "train image.yaml output_dir=twice resume=true", "config.yaml"),
    ("train a name near a recipe's", "train quickstrat", "nor a shipped recipe: did you mean 'quickstart'"),
    ("train into a used folder", "train image.yaml output_dir=folder/used", "is already used"),
    *(
        (f"{' '.join(command.split()[:2])}: a reward file, {name}", f"{command}{name}.py:f", wanted)
        for command in (
            "train image.yaml reward=",
            "train text.yaml reward=",
            "compare emoji-sd emoji-sd -p a --judge ",
            "pairs emoji-sd -p a -o x --judge ",
        )
        for name, (_, wanted) in REWARD_FILES.items()
        if "text" not in command or name != "short"
    ),
    ("train method NUL", ["train", "image.yaml", 'method="a\\0b"'], "method="),
    ("train method of 5000 characters", f"train image.yaml method={LONG}", "method="),
    ("train reward of 5000 digits", f"train image.yaml reward={'9' * 5000}", "^reward: 999"),
    ("train reward of 5000 characters", f"train image.yaml reward={LONG}", "^reward 'xxx.*File name too long"),
    ("train an override of 5000 characters", ["train", "image.yaml", LONG], "not of the form key=value"),
    ("train an unknown key of 5000 characters", f"train image.yaml {LONG}=1", "unknown setting"),
    ("train a value of 5000 characters", f"train image.yaml lr_schedule={LONG}", "lr_schedule="),
]

# -- the command line itself -------------------------------------------------------------------------------------------

USAGE_CASES = [
    (command, command, f"(?i){wanted}.*: see diffusion-align( [a-z-]+)? --help$")
    for command, wanted in {
        "trian": "No such command 'trian'",
        "train": "Missing argument 'CONFIG'",
        "train quickstart --epochs 3": "No such option",
        "sample": "Missing argument 'MODEL'",
        "sample emoji-sd -p": "requires an argument",
        "sample emoji-sd -p a --seed -1": "greater than or equal to 0",
        "sample emoji-sd -p a --seed x": "valid integer",
        "sample emoji-sd -p a --steps 0": "greater than or equal to 1",
        "sample emoji-sd -p a --eta 2": "not a number from 0 to 1",
        "sample emoji-sd -p a --guidance-scale -1": "not a number from 0 to",
        "score": "Missing argument 'REWARD'",
        f"score {JPEG}": "Missing argument 'IMAGES",
        "compare a b": "Missing option '--judge'",
        f"compare a b --judge {JPEG} -p a --per-prompt 0": "'--per-prompt'.* greater than or equal to 1",
        f"compare a b --judge {JPEG} -p a --per-prompt many": "valid integer",
        "pairs a -p a -o x": "Missing option '--judge'",
        f"pairs a -p a --judge {JPEG}": "Missing option '--output'",
        f"pairs a -p a --judge {JPEG} -o x --per-prompt 1": "greater than or equal to 2",
        f"pairs a -p a --judge {JPEG} -o x --seed {2**63}": "'--seed'",
        "list a b c": "unexpected extra argument",
    }.items()
]

GROUPS = {"paths": PATH_CASES, "YAML": YAML_CASES, "numbers": NUMBER_CASES, "others": OTHER_CASES, "usage": USAGE_CASES}
CASES = {name: (words(command), wanted) for cases in GROUPS.values() for name, command, wanted in cases}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder that the commands are called in."""
    folder = tmp_path_factory.mktemp("three_hundred")
    for name, run in {"image": IMAGE_RUN, "text": TEXT_RUN, "pairs": PAIRS_RUN, "dpo": DPO_RUN}.items():
        (folder / f"{name}.yaml").write_text(json.dumps(run))
    (folder / "yaml").mkdir()
    for i, (text, _) in enumerate(YAML.values()):
        keys = set(re.findall(r"^\w+", text, re.MULTILINE))
        rest = {key: value for key, value in IMAGE_RUN.items() if key not in keys}
        (folder / "yaml" / f"{i}.yaml").write_text(text + "\n" + ("" if "---" in text else yaml.safe_dump(rest)))
    (folder / "utf16.yaml").write_bytes("epochs: 1\n".encode("utf-16"))
    (folder / "latin1.yaml").write_bytes("epochs: 1\nmodel: größer\n".encode("latin-1"))
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(folder / "red.png")
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:50])
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tiff")
    for name in ("empty.png", "empty.txt", "m.safetensors"):
        (folder / name).write_bytes(b"")
    for name, (text, _) in REWARD_FILES.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "note.txt").write_text("a cat\n- a dog: [\n")
    (folder / "twice.csv").write_text("prompt,prompt\na,b\n")
    (folder / "long.txt").write_text("ab " * 10_000 + "c\n")
    (folder / "folder" / "used").mkdir(parents=True)
    (folder / "folder" / "used" / "thesis.tex").write_text("mine")
    runs = {"twice": "model: a\nmodel: b\n", "tagged": "model: !!str tiny-lm\n", "odd": "model: a\n"}
    for name, text in runs.items():
        (folder / name / "final").mkdir(parents=True)
        (folder / name / "config.yaml").write_text(text)
    (folder / "odd" / "evaluation.json").write_text("[1]")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "metrics.jsonl").write_text('{"step": 1}\n[[[\n{"step": 2}\n')
    os.symlink("nowhere", folder / "dangling")
    os.symlink("loop", folder / "loop")
    os.mkfifo(folder / "pipe")
    before = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # whose whole path may be too long for an address
        server.bind("socket")
        os.chdir(before)
        yield folder


def tree(folder):
    """Every path below and what tells whether it was changed."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            status = os.lstat(os.path.join(place, name))
            changed = status.st_mtime_ns if name in files else 0
            found[os.path.join(place, name)] = (status.st_mode, status.st_size, changed)
    return {path: seen for path, seen in found.items() if "__pycache__" not in path}


def test_there_are_three_hundred_of_every_command():
    assert len(CASES) == sum(map(len, GROUPS.values())) >= 300
    commands = "train sample complete score compare pairs report estimators list doctor serve-reward"
    assert set(commands.split()) <= {arguments[0] for arguments, _ in CASES.values()}


@pytest.mark.parametrize(
    "command",
    ["sample emoji-sd -p a", "complete tiny-lm -p a", "train image.yaml", "train pairs.yaml", "train dpo.yaml"],
)
def test_that_no_model_is_loaded_is_a_claim_that_can_fail(here, no_model, call_cli, monkeypatch, tmp_path, command):
    monkeypatch.chdir(here)
    output = [f"output_dir={tmp_path / 'run'}"] if "train" in command else ["-o", tmp_path / "new"]
    status, _, err = call_cli(*command.split(), *output)
    assert status == 1
    assert "a model was loaded" in err


@pytest.mark.parametrize("case", CASES)
def test_refused(case, here, no_model, call_cli, monkeypatch):
    arguments, wanted = CASES[case]
    monkeypatch.chdir(here)
    before = tree(here)
    status, out, err = call_cli(*arguments)
    assert status == 2, err[:3000]
    assert all(line.startswith("error: ") for line in err.splitlines()), err[:3000]
    sentences = [line.removeprefix("error: ") for line in err.splitlines()]
    for sentence in sentences:
        assert 0 < len(sentence) < 1000, sentence[:1200]
        assert sentence.isprintable(), sentence
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        assert any(re.search(pattern, sentence) for sentence in sentences), err[:3000]
    assert arguments[0] == "doctor" or out == ""
    assert tree(here) == before


@pytest.mark.parametrize(
    "command", ["sample emoji-sd -p a -o x --steps 2000", f"pairs emoji-sd --judge {JPEG} -p a -o x --steps 2000"]
)
def test_what_only_the_model_tells(here, call_cli, monkeypatch, command):
    monkeypatch.chdir(here)
    status, out, err = call_cli(*command.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: steps=2000 must lie between 1 and")
    assert not (here / "x").exists()


def test_no_argument_at_all_is_answered_with_the_help(call_cli):
    status, out, err = call_cli()
    assert status == 2
    assert "train" in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["train no.yaml", "list x", "score aesthetic no.png"])
def test_the_installed_program(here, command):
    """The same by a real process: nothing but the sentence on stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusion_align", *command.split()]
    result = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
