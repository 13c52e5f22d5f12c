"""The pages of the command line: lists, help, versions, completion; at 80 columns, and in a pipe."""

import io
import os
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image
from rich.console import Console

from diffusion_align.cli import app, listing, terminal
from diffusion_align.methods import SHIPPED
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.rewards import REWARDS, TEXT_REWARDS
from diffusion_align.streams import print_warning
from tests.helpers.printed import shorter


@pytest.fixture
def on_a_terminal(monkeypatch):
    """``on_a_terminal(parts)``: what a terminal of 80 columns, or of ``width``, shows of a listing."""

    def shown(parts, width=80):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        monkeypatch.setattr(terminal, "console", console)
        terminal.print_listing(parts)
        return console.file.getvalue()

    return shown


def words(text):
    return text.split()


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_aligned_values_fit_the_terminal_and_at_most_100_columns(monkeypatch, columns):
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, color_system=None)
    monkeypatch.setattr(terminal, "console", console)
    value = "a training pass counts as 3 forward passes " * 4
    terminal.print_aligned([("time", ""), ("operations", value)])
    _, _, *lines = console.file.getvalue().splitlines()
    assert columns - 12 < max(map(len, lines)) <= columns or 90 < max(map(len, lines)) <= 100
    assert words(" ".join(lines)) == ["operations", *words(value)]


@pytest.mark.parametrize("name", listing.LISTINGS)
def test_a_list_is_whole_on_a_terminal_and_a_line_for_each_entry_in_a_pipe(name, call_cli, on_a_terminal):
    parts = listing.LISTINGS[name]()
    status, out, _ = call_cli("list", name)
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == sum(1 + len(part.rows) + isinstance(part, terminal.Table) for part in parts)
    shown = on_a_terminal(parts)
    assert max(map(len, shown.splitlines())) <= 80
    for part in parts:
        for row in part.rows:
            assert any(line.split() == words(" ".join(row)) for line in lines)
            assert f"  {row[0]} " in shown
            assert set(words(" ".join(row))) <= set(words(shown))


def test_a_narrow_terminal_shows_the_rows_of_a_table_one_below_the_other(on_a_terminal):
    tables = listing.LISTINGS["rewards"]()
    shown = on_a_terminal(tables, width=40)
    assert max(map(len, shown.splitlines())) <= 40
    for table in tables:
        for row in table.rows:
            assert f"\n  {row[0]}" in shown
            assert {*words(row[1]), *words(row[3].rstrip(","))} <= set(words(shown))


@pytest.mark.parametrize("method", SHIPPED)
def test_the_settings_of_a_method_are_whole_at_80_columns(method, on_a_terminal):
    groups = listing.settings_of(method)
    shown = on_a_terminal(groups)
    assert max(map(len, shown.splitlines())) <= 80
    for group in groups:
        assert group.title in " ".join(words(shown))
        for name, text, note in group.rows:
            assert re.search(rf"^  {re.escape(name)}( |$)", shown, re.MULTILINE)
            assert {*words(text), *words(note)} <= set(words(shown))
    names = [row.name for group in groups for row in group.rows]
    assert len(names) == len(set(names))
    assert {"learning_rate", "model", "lora.rank"} <= set(names)


def test_recipes_are_described_by_what_their_comment_says_up_to_the_launch(tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text("# What it does,\n# on two lines. And what it needs.\n# Launch: so\nmodel: m\n# no\n")
    assert listing.describe_recipe(recipe) == "What it does, on two lines. And what it needs."
    for path in shipped_configs().values():
        assert len(listing.describe_recipe(path)) > 40


def test_rewards_are_a_table_and_each_is_a_page(call_cli):
    _, out, note = call_cli("list", "rewards")
    assert {line.split()[0] for line in out.splitlines()} == {"rewards", "name", *REWARDS, *TEXT_REWARDS}
    assert "option " in note or "list rewards NAME" in note
    hps = next(line for line in out.splitlines() if line.split()[0] == "hps_v2")
    assert re.split(r"  +", hps.strip()) == [
        "hps_v2",
        "How much people prefer the image for its prompt",
        "-1 to 1",
        "extra open-clip, 2 GB download, prompts",
    ]
    status, out, _ = call_cli("list", "rewards", "numeric_match")
    assert status == 0
    assert "  range  0 or 1\n" in out
    assert re.search(r"^  column  \(text, default 'answer'\): ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rewards", "aesthetc"], ["no reward 'aesthetc'", "did you mean 'aesthetic'"]),
        (["rewards", ""], []),
        (["settings", "dppo"], ["method='dppo'", "did you mean"]),
        (["models", "emoji-sd"], ["list settings", "leave 'emoji-sd' out"]),
        (["reward"], ["no list 'reward'", "rewards"]),
    ],
)
def test_what_cannot_be_listed(call_cli, arguments, parts):
    status, out, err = call_cli("list", *arguments)
    if not parts:
        assert status == 0
        return
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert all(part in err for part in parts), err


def ask(monkeypatch, capfd, shell, line):
    """What ``shell`` is told of the completions of a command line."""
    from diffusion_align.cli import main

    words = line.split(" ")
    for name, value in {
        "_DIFFUSION_ALIGN_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line.replace("=", " = ") if shell == "bash" else line,  # as readline splits words
        "COMP_CWORD": str(len(line.replace("=", " = ").split(" ")) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", words[:1])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    assert (stop.value.code, err) == (0, "")
    return {line.partition("\t")[0] for line in out.splitlines() if line} if shell != "zsh" else out


@pytest.fixture
def complete(monkeypatch, capfd, tmp_path):
    """``complete(shell, "train qui")``, in a folder with two runs, a recipe and a file that is none."""
    monkeypatch.chdir(tmp_path)
    for run in ("runs/first", "second"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").touch()
    (tmp_path / "quick.yaml").write_text("method: grpo\nclip_range: 0.25\nlora: {rank: 3}\n")
    (tmp_path / "quick.txt").touch()
    (tmp_path / "empty").mkdir()
    return lambda shell, line: ask(monkeypatch, capfd, shell, f"diffusion-align {line}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tra", {"train"}),
        ("train qui", {"quickstart", "quick.yaml"}),
        ("doctor dpo_sdxl", {"dpo_sdxl_pickapic"}),
        ("train e", {"empty/"}),
        ("train quickstart learning_r", {"learning_rate=", "learning_rate=0.009"}),
        ("train quick.yaml clip_range_", {"clip_range_high=", "clip_range_high=null"}),
        ("train quick.yaml lora.ra", {"lora.rank=", "lora.rank=3"}),
        ("train missing.yaml lora.ra", set()),
        ("report ", {"second", "runs/first"}),
        ("sample runs/f", {"runs/first"}),
        ("complete tiny", {"tiny-lm"}),
        ("score cl", {"clip_score"}),
        ("serve-reward oc", {"ocr"}),
        ("compare emoji-sd runs/first --judge numeric", {"numeric_match"}),
        ("sample emoji-sd --prompts emoji_c", {"emoji_concepts"}),
        ("list pai", {"pairs"}),
        ("list settings gr", {"grpo"}),
        ("list rewards pick", {"pick_score"}),
        ("list models e", set()),
    ],
)
def test_a_shell_is_told_the_words(complete, shell, line, words):
    told = complete(shell, line)
    if shell != "zsh":
        assert told == words
        return
    assert all(f'"{word}"' in told for word in words)
    assert told.count("\n") == max(len(words), 1)
    assert words or told == "_files\n"


@pytest.mark.parametrize(
    ("shell", "line", "words"),
    [
        ("bash", "train quick.yaml clip_range=", {"0.25"}),
        ("bash", "train quick.yaml kl=k3_g", {"k3_gradient_reward"}),
        ("bash", "train quick.yaml clip_range=0.1 resume=", {"false", "true"}),
        ("fish", "train quick.yaml clip_range=", {"clip_range=0.25"}),
        ("fish", "train quick.yaml kl=k3_g", {"kl=k3_gradient_reward"}),
        ("fish", "train quick.yaml method=ddpo clip_range_", {"clip_range_nats=", "clip_range_nats=null"}),
    ],
)
def test_values_are_what_is_set_and_the_choices(complete, shell, line, words):
    assert complete(shell, line) == words


def test_a_folder_that_may_not_be_entered_hides_no_other(complete, tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    stat = os.stat

    def refuse(path, *args, **options):
        if "secret/" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr("os.stat", refuse)
    assert complete("fish", "sample ") >= {"emoji-sd", "second", "runs/first"}


@pytest.mark.parametrize(
    "line", ["train quickstart learning_r", "compare emoji-sd run", "score cl", "list settings gr"]
)
def test_completing_imports_no_torch(line, tmp_path):
    code = (
        "import sys\nfrom diffusion_align.cli import main\nsys.argv = ['diffusion-align']\ntry:\n    main()\n"
        "except SystemExit:\n    print(sorted({'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys()))\n"
    )
    asked = {"_DIFFUSION_ALIGN_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    env = os.environ | asked | {"_TYPER_COMPLETE_ARGS": f"diffusion-align {line}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(monkeypatch, call_cli, shell):
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: (shell, f"/bin/{shell}"))
    status, out, err = call_cli("--show-completion")
    assert (status, err) == (0, "")
    assert "_DIFFUSION_ALIGN_COMPLETE=complete_" + shell in out


@pytest.mark.parametrize("option", ["--version", "-V", "-v"])
def test_the_version(call_cli, option):
    from diffusion_align import __version__

    assert call_cli(option) == (0, f"diffusion-align {__version__}\n", "")


def test_an_error_is_red_on_a_terminal_only(monkeypatch, call_cli):
    def shown(**options):
        console = Console(file=io.StringIO(), width=80, soft_wrap=True, highlight=False, **options)
        monkeypatch.setattr(terminal, "errors", console)
        assert terminal.print_error("model=[/x] is wrong") == 2
        return console.file.getvalue()

    assert shown(force_terminal=True, color_system="standard") == "\x1b[1;31merror:\x1b[0m model=[/x] is wrong\n"
    assert "31m" not in shown(force_terminal=True, color_system="standard", no_color=True)
    assert shown() == "error: model=[/x] is wrong\n"
    monkeypatch.undo()
    assert call_cli("train", "no_such")[2].startswith("error: config 'no_such'")


def test_a_warning_is_yellow_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(stream):
        monkeypatch.setattr("sys.stderr", stream)
        print_warning("it is late")
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shown(Terminal()) == "\x1b[1;33mwarning:\x1b[0m it is late\n"
    assert shown(io.StringIO()) == "warning: it is late\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(Terminal()) == "warning: it is late\n"


COMMANDS = [
    "train",
    "sample",
    "complete",
    "export",
    "score",
    "serve-reward",
    "compare",
    "pairs",
    "report",
    "estimators",
]
COMMANDS += ["list"]


def examples():
    """The commands at the end of each command's help."""
    found = [re.findall(r"Example: (.*)", command.epilog or "") for command in app.registered_commands]
    return [line for lines in found for line in lines]


def test_every_command_says_what_it_is_for_and_ends_in_an_example(call_cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert {line.split()[1] for line in examples()} == {*COMMANDS, "doctor"}
    for name in [*COMMANDS, "doctor"]:
        status, out, _ = call_cli(name, "--help")
        assert status == 0
        assert max(map(len, out.splitlines())) <= 80
        about, _, end = out.partition("╭")
        assert len(about.split()) > 10
        assert f"Example: diffusion-align {name} " in end.rpartition("╯")[2]
    status, out, _ = call_cli()
    assert "diffusion-align train quickstart" in out


def test_the_examples_run(tmp_path, forked):
    """As they are printed, only shorter; serve-reward, which does not end, is run by the pages on rewards."""
    first = {"train": 0, "sample": 1}  # what the others need
    for line in sorted(examples(), key=lambda line: first.get(line.split()[1], 2)):
        words = shlex.split(line)
        if words[1] != "serve-reward":
            run = forked(*shorter(words[1:], tmp_path), cwd=tmp_path, timeout=300)
            assert run.status == 0, f"{line}\n{run.error[-2000:]}"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("-x", "-x"),
        ("--versionn", "--version"),
        ("trian quickstart", "train"),
        ("train", "CONFIG"),
        ("train quickstart lr", "'lr' is not of the form key=value"),
        ("train ~/no_such.yaml", "no_such.yaml"),
        ("train quickstart --epochs 3", "--epochs"),
        ("list settings list", "method='list'"),
        ("list rewards combin", "combine"),
        ("list rewards module:function", "module:function"),
        ("list models emoji-sd more", "more"),
        ("score aesthetic a.png --model", "--model"),
        ("score aesthetic a.png --option head=none.pth", "head"),
        ("score aesthetic a.png --option variant=v3", "variant"),
        ("score aesthetic a.png --option clip=./none", "clip"),
        ("score length a.png", "text"),
        ("score aesthetic", "IMAGES"),
        ("serve-reward sentiment", "text"),
        ("report runs", "runs"),
        ("doctor quickstart epochs", "'epochs' is not of the form key=value"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(line, named, call_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("a.png")
    status, out, err = call_cli(*line.split())
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert named in err
