"""Three hundred bad inputs through every command: one sentence or more, exit 2, nothing left behind, no model loaded.

The cases are grouped by kind; a name says the command and what is wrong. All of them share one folder, which has to be
the same after each.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers.problems import assert_one_sentence
from tests.helpers.tiny_runs import IMAGE_RUN, cases

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
    "NUL": "a\0b",
    "surrogate": "a\udcff",
    "empty": "",
    "blank": "  ",
    "nobody": "~nobody-is-called-so/x",
    "dangling": "dangling",
    "loop": "loop",
    "pipe": "pipe",
    "socket": "socket",
    "device": "/dev/null",
    "long": LONG,
}
NO_FOLDER = {"folder": "folder"}
NO_FILE = {"file": "note.txt"}
REMOTE = "reward={name: remote, url: 'http://127.0.0.1:9', token_file: ...}"


def words(command):
    """The arguments of a command, which is a list of them, or a line as a shell reads it; JPEG stands for a reward."""
    return [word.replace("JPEG", JPEG) for word in shlex.split(command)] if isinstance(command, str) else command


def places(name, command, more=None, *, but=(), as_yaml=False):
    """A case for each of ``PATHS`` and ``more`` in place of ``...``."""
    for what, path in (PATHS | (more or {})).items():
        put = json.dumps(path) if as_yaml else path
        if what not in but:
            yield f"{name}: {what}", [word.replace("...", put) for word in words(command)]


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
    "tag": "epochs: !!int x",
    "python tag": "epochs: !!python/object/apply:os.system [id]",
    "anchor": "epochs: &a 1",
    "alias": "epochs: &a 1\nseed: *a",
    "merge": "<<: {epochs: 3}",
    "key twice": "epochs: 1\nepochs: 2",
    "4000 brackets": "prompts: " + "[" * 4000,
    "5000 digits": "epochs: " + "9" * 5000,
    "beyond floats": "learning_rate: 1e999",
    "octal": "epochs: 010",
    "sexagesimal": "epochs: 1:10",
    "octal option": f"reward: {{name: {JPEG}, quality: 010}}",
    "date": "epochs: 2024-11-30",
    "date that is none": "epochs: 2024-13-45",
    "date for a section": "sampler: 2024-13-45",
    "yes for a number": "epochs: yes",
    "no for a number": "epochs: no",
    "NUL": "model: a\0b",
    "escape": "model: a\x1bb",
    "tab": "sampler:\n\tsteps: 2",
    "open quote": "model: 'a",
    "future": "%YAML 9.9\n---\nepochs: 1",
    "at sign": "model: @home",
    "on as a key": "on: 3",
}
OVERRIDES = ["tag", "python tag", "anchor", "4000 brackets", "5000 digits", "octal", "sexagesimal", "NUL", "date"]
YAML_CASES = [
    *((f"train YAML: {what}", ["train", f"yaml/{what}.yaml"]) for what in YAML),
    *((f"override: {what}", ["train", "image.yaml", YAML[what].replace(": ", "=", 1)]) for what in OVERRIDES),
]

# -- commands ----------------------------------------------------------------------------------------------------------

REWARD_FILES = {  # what is in them
    "exits": "import sys\nsys.exit(0)\n",
    "broken": "def f(images\n",
    "needs": "import no_such_package\n",
    "nothing": "",
    "short": "def f(images):\n    return [0.0] * len(images)\n",
}
WITH_REWARD_FILE = """
    train image.yaml reward=
    train text.yaml reward=
    compare emoji-sd emoji-sd -p a --judge
    pairs emoji-sd -p a -o x --judge
"""
COMMANDS = """
    # files that are no YAML of settings, and options that are none
    train utf16.yaml
    train latin1.yaml
    doctor note.txt
    score JPEG red.png --option 'quality=!!int 3'
    score JPEG red.png --option 'quality=&a 3'
    score JPEG red.png --option quality=010
    score JPEG red.png --option quality
    sample twice -p a
    complete tagged -p a
    # numbers
    train image.yaml lora.rank=2e6
    train image.yaml samples_per_epoch=2e9
    train image.yaml learning_rate=1e300
    train text.yaml max_completion_length=2e12
    train image.yaml 'adam_betas=[0.9, 1e300]'
    train image.yaml reward_weights=[1e300]
    train image.yaml 'prompts={source: note.txt, max_prompts: 2e12}'
    train image.yaml 'evaluation={pictures: 2e12}'
    train dpo.yaml 'dynamic_beta={hidden: 2e12}'
    train image.yaml 'reward={name: JPEG, scale: 1e300}'
    train image.yaml 'reward={name: JPEG, quality: 1e9}'
    train image.yaml 'reward={name: aesthetic, batch_size: 1000000000000}'
    train image.yaml 'reward={name: remote, timeout: 1e300}'
    train image.yaml 'reward={name: vlm_judge, retries: 1000000000000}'
    train text.yaml 'reward={name: length, target: 1e300}'
    train text.yaml 'reward={name: numeric_match, tolerance: 1e300}'
    sample emoji-sd -p a --steps 2000000000
    sample emoji-sd -p a --steps 0
    sample emoji-sd -p a --guidance-scale nan
    sample emoji-sd -p a --guidance-scale inf
    sample emoji-sd -p a --guidance-scale -1
    sample emoji-sd -p a --eta nan
    sample emoji-sd -p a --eta 2
    sample emoji-sd -p a --height 60 --width 66
    sample emoji-sd -p a --width 4
    sample emoji-sd -p a --negative-prompt dark --guidance-scale 1
    sample emoji-sd -p a --seed 9223372036854775808
    sample emoji-sd -p a --seed -1
    sample emoji-sd -p a --seed x
    complete tiny-lm -p a --max-new-tokens 2000000000
    complete tiny-lm -p a --max-new-tokens 5000
    complete tiny-lm -p a --temperature nan
    complete tiny-lm -p a --temperature 1e300
    compare a/b c/d --judge JPEG -p a --per-prompt 2000000000
    compare a b --judge JPEG -p a --per-prompt 0
    compare a b --judge JPEG -p a --per-prompt many
    pairs a/b --judge JPEG -p a -o x --per-prompt 2000000000
    pairs a -p a --judge JPEG -o x --per-prompt 1
    pairs a/b --judge JPEG -p a -o x --guidance-scale inf
    pairs emoji-sd --judge JPEG -p a -o x --height 60
    pairs tiny-lm --judge length -p a -o x --negative-prompt dark
    pairs a -p a --judge JPEG -o x --seed 9223372036854775808
    serve-reward JPEG --port 70000
    serve-reward JPEG --threads 100000
    serve-reward JPEG --max-bytes 999999999999999999999
    serve-reward JPEG --max-batch 0
    estimators --samples 2000000000
    estimators --actions 2000000000
    estimators --seed -1
    estimators --q nan 1
    estimators --q inf 1
    estimators --p 0 0
    doctor image.yaml learning_rate=1e300
    # prompts and texts
    sample emoji-sd
    sample emoji-sd --prompts no.txt
    sample emoji-sd --prompts empty.txt
    sample emoji-sd -p a\udcff
    complete tiny-lm
    complete tiny-lm --prompts empty.txt
    complete tiny-lm -p a\udcff
    compare emoji-sd emoji-sd --judge aesthetic
    pairs emoji-sd --judge JPEG -o x
    pairs emoji-sd --judge JPEG -o x -p ' '
    pairs emoji-sd --judge JPEG -o x -p a\udcff
    score JPEG red.png -p a\udcff
    train image.yaml prompts=twice.csv
    train image.yaml prompts=nobody/no-such
    train image.yaml 'evaluation={prompts: {source: nobody/no-such}, reward: JPEG}'
    train image.yaml prompts=long.txt
    # models
    sample ./no -p a
    sample folder -p a
    sample tiny-lm -p a
    complete emoji-sd -p a
    compare emoji-sd tiny-lm --judge JPEG -p a
    compare ./no ./neither --judge taste -p a
    pairs ./no --judge JPEG -o x -p a
    # rewards, their options, and what they score
    score jpeg_compresibility red.png
    score no.py:f red.png
    score JPEG red.png --option name=aesthetic
    score JPEG red.png --option backgruond=true
    score JPEG empty.png
    score JPEG cut.png
    score JPEG note.txt
    score JPEG float.tiff
    score JPEG script.png
    score JPEG red.png red.png red.png -p a -p b
    compare emoji-sd emoji-sd --judge taste -p a
    pairs emoji-sd --judge taste -p a -o x
    # devices
    serve-reward JPEG --device cuda:99
    serve-reward JPEG --device toaster
    serve-reward JPEG --device ''
    serve-reward JPEG --device meta
    train image.yaml "reward={name: aesthetic, device: 'cuda:99'}"
    train image.yaml 'reward={name: aesthetic, device: [1]}'
    train text.yaml 'reward={name: classifier, model: a/b, device: toaster}'
    score aesthetic red.png --option device=cuda:99
    # places
    sample emoji-sd -p a -o note.txt/x
    sample emoji-sd -p a -o /proc
    compare a/b c/d --judge JPEG -p a -o note.txt/x.png
    compare a/b c/d --judge JPEG -p a -o /proc/x.png
    pairs emoji-sd --judge JPEG -p a -o folder
    pairs emoji-sd --judge JPEG -p a -o folder --resume
    pairs emoji-sd --judge JPEG -p a -o note.txt/x
    train image.yaml output_dir=folder/used
    train image.yaml output_dir=folder/used resume=true
    train image.yaml output_dir=twice resume=true
    report gone
    report folder
    report damaged
    report odd
    # recipes, overrides and names
    train quickstrat
    train image.yaml 'method="a\\0b"'
    doctor no.yaml
    doctor grpo_tiny epoch=3
    doctor quickstart epochs
    # the command line itself
    trian
    train
    train quickstart --epochs 3
    sample
    sample emoji-sd -p
    score
    score JPEG
    compare a b
    pairs a -p a -o x
    pairs a -p a --judge JPEG
    list sampler
    list a b c
"""
LONG_COMMANDS = {
    "sample megabytes": ["sample", "emoji-sd", "-p", MEGABYTES],
    "compare megabytes": [*f"compare a/b a/c --judge {JPEG} -p".split(), MEGABYTES],
    "pairs megabytes": [*f"pairs a/b --judge {JPEG} -o x -p".split(), MEGABYTES],
    "train show_prompts": ["train", "image.yaml", f"show_prompts=['{'ab' * 15000}']"],
    "train method": f"train image.yaml method={LONG}",
    "train reward of digits": f"train image.yaml reward={'9' * 5000}",
    "train reward": f"train image.yaml reward={LONG}",
    "train an override": ["train", "image.yaml", LONG],
    "train an unknown key": f"train image.yaml {LONG}=1",
    "train a value": f"train image.yaml lr_schedule={LONG}",
    "serve-reward --device": f"serve-reward {JPEG} --device {LONG}",
    "list": ["list", LONG],
    "list with an option": f"list --{LONG}",
    "list of NUL": ["list", "a\0b"],
}
COMMAND_CASES = [
    *((command, command) for command in cases(COMMANDS)),
    *((f"long: {name}", command) for name, command in LONG_COMMANDS.items()),
    *(
        (f"{command} {name}", [*words(command)[: -1 if "=" in command else None], f"{end}{name}.py:f"])
        for command in cases(WITH_REWARD_FILE)
        for end in ["reward=" if "=" in command else ""]
        for name in REWARD_FILES
        if "text" not in command or name != "short"
    ),
]

GROUPS = {"paths": PATH_CASES, "YAML": YAML_CASES, "commands": COMMAND_CASES}
CASES = {name: words(command) for group in GROUPS.values() for name, command in group}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The folder that the commands are called in."""
    folder = tmp_path_factory.mktemp("three_hundred")
    for name, run in {"image": IMAGE_RUN, "text": TEXT_RUN, "pairs": PAIRS_RUN, "dpo": DPO_RUN}.items():
        (folder / f"{name}.yaml").write_text(json.dumps(run))
    (folder / "yaml").mkdir()
    for what, text in YAML.items():
        keys = set(re.findall(r"^\w+", text, re.MULTILINE))
        rest = {key: value for key, value in IMAGE_RUN.items() if key not in keys}
        (folder / "yaml" / f"{what}.yaml").write_text(text + "\n" + ("" if "---" in text else yaml.safe_dump(rest)))
    (folder / "utf16.yaml").write_bytes("epochs: 1\n".encode("utf-16"))
    (folder / "latin1.yaml").write_bytes("epochs: 1\nmodel: größer\n".encode("latin-1"))
    Image.fromarray(np.full((16, 16, 3), 200, np.uint8)).save(folder / "red.png")
    (folder / "cut.png").write_bytes((folder / "red.png").read_bytes()[:50])
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tiff")
    for name in ("empty.png", "empty.txt", "m.safetensors"):
        (folder / name).write_bytes(b"")
    for name, text in REWARD_FILES.items():
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
    assert set(commands.split()) <= {arguments[0] for arguments in CASES.values()}


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
def test_refused(case, here, no_model, call_cli, golden, monkeypatch):
    arguments = CASES[case]
    monkeypatch.chdir(here)
    before = tree(here)
    status, out, err = call_cli(*arguments)
    assert status == 2, err[:3000]
    assert all(line.startswith("error: ") for line in err.splitlines()), err[:3000]
    sentences = [line.removeprefix("error: ") for line in err.splitlines()]
    for sentence in sentences:
        assert_one_sentence(sentence)
    golden(case, sentences)
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


def test_the_installed_program(here):
    """The same by a real process: nothing but the sentence on stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusion_align", "score", "aesthetic", "no.png"]
    result = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
