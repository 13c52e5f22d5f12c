"""What users, models and servers write reaches a terminal as text: nothing in it steers the terminal."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusion_align.cli import _path, main
from diffusion_align.pipelines import TextAlignmentPipeline
from diffusion_align.streams import printable

STEERS = "\x1b]0;owned\x07\x1b[2J\u202ea\x9b\r\x08b"


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["diffusion-align", *arguments])
    try:
        main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_printable():
    assert printable(STEERS) == " ]0;owned  [2J a   b"
    assert printable("é 猫 🍎\n\tx", keep="\n\t") == "é 猫 🍎\n\tx"


def test_whoever_may_not_write_to_dev_may_write_to_stdout(monkeypatch):
    from diffusion_align import cli, inputs
    from diffusion_align.errors import UserError

    def denied(dir, prefix):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(inputs.tempfile, "TemporaryFile", denied)
    cli._check_output_file(Path("/dev/stdout"))
    with pytest.raises(UserError, match="--output: the folder /dev cannot be used: it is not writable: Permission"):
        cli._check_output_file(Path("/dev/no-stream"))


def test_completions_and_prompts(monkeypatch, capsys):
    def written(texts, **options):
        return SimpleNamespace(texts=[f"{STEERS}\n\tend" for _ in texts])

    monkeypatch.setattr(TextAlignmentPipeline, "from_pretrained", lambda *_: written)
    assert call(monkeypatch, "complete", "tiny-lm", "-p", f"a {STEERS}") == 0
    assert capsys.readouterr().out == f"a {printable(STEERS)}{printable(STEERS)}\n        end\n"  # rich widens tabs


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "jpeg_compressibility", f"{STEERS}.png"],
        ["train", STEERS],
        ["train", "grpo_tiny", f"{STEERS}=1"],
        ["list", STEERS],
        ["report", STEERS],
        [STEERS],
    ],
)
def test_sentences_about_bad_input(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert "error: " in said.err
    assert all(c.isprintable() or c == "\n" for c in said.out + said.err)


def test_a_place_that_no_shell_has_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _path("~/a") == tmp_path / "a"
    assert _path("a~/b") == Path("a~/b")
