"""Wrong arguments of every command: one sentence, exit 2, nothing written."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image


@pytest.fixture
def here(tmp_path):
    """Files that commands may be pointed at."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (tmp_path / "cut.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    (tmp_path / "note.txt").write_text("a cat\na dog\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"nothing")
    return tmp_path


CASES = {
    # sample
    "sample without a prompt": (["sample", "emoji-sd"], "no prompt given: use --prompt TEXT"),
    "sample from nothing": (["sample", "./nowhere", "-p", "a cat"], "model='./nowhere' is neither"),
    "sample from a folder that is no model": (
        ["sample", "folder", "-p", "a cat"],
        "the folder has no model_index.json",
    ),
    "sample from an empty run": (["sample", "run", "-p", "a cat"], "the folder has no model_index.json"),
    "sample prompts missing": (
        ["sample", "emoji-sd", "--prompts", "no.txt"],
        "prompts.source='no.txt': there is no such file",
    ),
    "sample into a file": (
        ["sample", "emoji-sd", "-p", "a cat", "-o", "note.txt"],
        "--output: the folder note.txt cannot be used",
    ),
    "sample below a file": (
        ["sample", "emoji-sd", "-p", "a", "-o", "note.txt/x"],
        "--output: the folder note.txt/x cannot be used",
    ),
    "sample too many steps": (["sample", "emoji-sd", "-p", "a cat", "--steps", "2000"], "steps=2000"),
    # score
    "score a missing picture": (["score", "jpeg_compressibility", "no.png"], "there is no picture no.png"),
    "score no picture": (
        ["score", "jpeg_compressibility", "note.txt"],
        "note.txt is no PNG, JPEG, WEBP, GIF, BMP or TIFF image that can be read",
    ),
    "score a broken picture": (["score", "jpeg_compressibility", "broken.png"], "broken.png is no PNG, JPEG"),
    "score a cut picture": (["score", "jpeg_compressibility", "cut.png"], "cut.png is no PNG, JPEG"),
    "score a folder": (["score", "jpeg_compressibility", "folder"], "folder is not a picture"),
    "score with nothing": (
        ["score", "jpeg_compresibility", "red.png"],
        "unknown reward 'jpeg_compresibility': did you mean",
    ),
    "score too few prompts": (
        ["score", "jpeg_compressibility", "red.png", "red.png", "red.png", "--prompts", "note.txt"],
        "2 prompts for 3 pictures: give one prompt, or one for each",
    ),
    "score with a missing file": (["score", "no.py:f", "red.png"], "reward file 'no.py' does not exist"),
    # compare
    "compare without a prompt": (["compare", "emoji-sd", "emoji-sd", "--judge", "aesthetic"], "no prompt given"),
    "compare with nothing": (
        ["compare", "emoji-sd", "./nowhere", "--judge", "jpeg_compressibility", "-p", "a cat"],
        "model='./nowhere' is neither",
    ),
    "compare by nothing": (
        ["compare", "emoji-sd", "emoji-sd", "--judge", "taste", "-p", "a cat"],
        "unknown reward 'taste'",
    ),
    "compare into a place that is not there": (
        ["compare", "emoji-sd", "emoji-sd", "--judge", "jpeg_compressibility", "-p", "a cat", "-o", "note.txt/x.png"],
        "--output: the folder note.txt cannot be used",
    ),
    "compare into a folder": (
        ["compare", "emoji-sd", "emoji-sd", "--judge", "jpeg_compressibility", "-p", "a cat", "-o", "folder"],
        "--output folder is a folder: name the file to write",
    ),
    # report, list, doctor
    "report of nothing": (["report", "nowhere"], "nowhere"),
    "report of a folder that is no run": (["report", "folder"], "folder"),
    "report of a file": (["report", "note.txt"], "note.txt"),
    "list of nothing": (
        ["list", "samplers"],
        "there is no list 'samplers': choose one of methods, configs, models, prompts, pairs, rewards",
    ),
    "doctor for nothing": (["doctor", "nowhere.yaml"], "config 'nowhere.yaml' is neither a file nor a shipped recipe"),
    "doctor with an unknown key": (
        ["doctor", "grpo_tiny", "epoch=3"],
        "unknown setting 'epoch': did you mean 'epochs'?",
    ),
    "doctor with a bad override": (["doctor", "quickstart", "epochs"], "'epochs' is not of the form key=value"),
    "train nothing": (["train", "folder"], "config 'folder' is neither a file nor a shipped recipe"),
}


@pytest.mark.parametrize(("arguments", "wanted"), CASES.values(), ids=CASES.keys())
def test_one_sentence(cli, here, tree, arguments, wanted):
    before = tree()
    outcome = cli(*arguments)
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.sentences) == 1, outcome.err
    assert wanted in outcome.sentences[0]
    assert tree() == before


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'CONFIG'"),
        (["score"], "Missing argument 'REWARD'"),
        (["score", "jpeg_compressibility"], "Missing argument 'IMAGES"),
        (["compare", "a", "b"], "Missing option '--judge'"),
        (["sample"], "Missing argument 'MODEL'"),
        (["sample", "emoji-sd", "-p"], "requires an argument"),
        (["sample", "emoji-sd", "-p", "a", "--seed", "-1"], "greater than or equal to 0"),
        (["sample", "emoji-sd", "-p", "a", "--seed", "x"], "valid integer"),
        (["sample", "emoji-sd", "-p", "a", "--steps", "0"], "greater than or equal to 1"),
        (["sample", "emoji-sd", "-p", "a", "--eta", "2"], "not a number from 0 to 1:"),
        (["sample", "emoji-sd", "-p", "a", "--guidance-scale", "-1"], "not a number from 0 to"),
        (["train", "quickstart", "--epochs", "3"], "No such option"),
        (["list", "a", "b"], "unexpected extra argument"),
    ],
)
def test_usage(cli, here, tree, arguments, wanted):
    before = tree()
    outcome = cli(*arguments)
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.sentences) == len(outcome.err.splitlines()) == 1, outcome.err
    assert wanted.lower() in outcome.sentences[0].lower()
    assert re.search(r": see diffusion-align( \w+)? --help$", outcome.sentences[0])
    assert tree() == before


def test_no_argument_at_all_is_answered_with_the_help(cli):
    outcome = cli()
    assert outcome.status == 2
    assert "train" in outcome.out + outcome.err
    assert "Traceback" not in outcome.err


def test_a_lora_of_another_model(here):
    from diffusion_align.errors import UserError
    from diffusion_align.pipelines import ImageAlignmentPipeline

    for lora, wanted in (("nowhere", "there is no such file or folder"), ("lora", "could not be loaded into emoji-sd")):
        with pytest.raises(UserError, match=wanted) as caught:
            ImageAlignmentPipeline.from_pretrained("emoji-sd", lora=here / lora)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [["train", "no.yaml"], ["list", "x"], ["score", "aesthetic", "no.png"]])
def test_the_installed_program(here, arguments):
    """The same by a real process: nothing but the sentence on stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffusion_align", *arguments]
    result = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
