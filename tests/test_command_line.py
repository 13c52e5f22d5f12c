"""The pages of the command line: lists, help, versions, completion; at 80 columns, and in a pipe."""

import io
import re

import pytest
from rich.console import Console

from diffusion_align.cli import listing, terminal
from diffusion_align.methods import SHIPPED
from diffusion_align.pipelines.configuration import shipped_configs
from diffusion_align.rewards import REWARDS, TEXT_REWARDS


@pytest.fixture
def on_a_terminal(monkeypatch):
    """``on_a_terminal(parts)``: what a terminal of 80 columns shows of a listing."""

    def shown(parts):
        console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
        monkeypatch.setattr(terminal, "console", console)
        terminal.print_listing(parts)
        return console.file.getvalue()

    return shown


def words(text):
    return text.split()


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
