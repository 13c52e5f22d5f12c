"""Whatever is written: whole or not at all, one sentence where it cannot be, nothing half-written left."""

import ast
import errno
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_align import writing
from diffusion_align.errors import UserError
from diffusion_align.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from diffusion_align.writing import WriteError, append_line, make_folder, new_file, new_folder, sweep, write_text


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def touch(folder, files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def broken(monkeypatch):
    """``broken(call, number)``: from now on this function of ``os`` fails with that errno."""

    def break_it(call, number):
        def fails(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(writing.os, call, fails)

    return break_it


def written_past_us(text):
    """Lines of calls that write or rename files other than within ``with new_file(...)`` or ``new_folder(...)``."""

    def look(node, inside):
        if isinstance(node, ast.With):
            makers = (item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call))
            inside |= any(ast.unparse(call.func).rpartition(".")[2] in ("new_file", "new_folder") for call in makers)
        if isinstance(node, ast.Call) and not inside:
            name, attribute = ast.unparse(node.func), getattr(node.func, "attr", "")
            mode = str(next((a.value for a in node.args[-1:] if isinstance(a, ast.Constant)), ""))
            if (
                name in ("os.replace", "torch.save", "save_file", "shutil.copyfile", "shutil.copytree")
                or attribute in ("write_text", "write_bytes", "rename")
                or (attribute == "save_pretrained" and name != "self.save_pretrained")
                or (attribute == "open" and mode[:1] in ("w", "a", "x"))
            ):
                yield node.lineno
        for child in ast.iter_child_nodes(node):
            yield from look(child, inside)

    return list(look(ast.parse(text), False))


# writing.py itself; functions that are called within ``new_folder``; ``export``, by a pipeline of our own.
PAST_US = {
    "diffusion_align/writing.py",
    "diffusion_align/cli/commands.py",
    "diffusion_align/models/lora.py",
    "diffusion_align/models/image_pipelines.py",
}


def test_everything_is_written_in_the_one_way():
    assert written_past_us("path.write_text(x)\nwith new_file(path) as temporary:\n    save_file(x, temporary)\n") == [
        1
    ]
    root = Path(__file__).parent.parent
    files = [path for part in ("diffusion_align", "pipelines", "rewards") for path in (root / part).rglob("*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(root)): written_past_us(path.read_text(encoding="utf-8")) for path in files}
    assert {path: lines for path, lines in found.items() if lines and path not in PAST_US} == {}


@contextmanager
def files_of_at_most(count):
    """Every file of this process has at most ``count`` bytes: a disk that is full, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def as_checkpoint(**parts):
    return lambda folder: save_checkpoint(folder, 2, **{"weights": {}, "tensors": {}, "state": {}} | parts, keep=1)


def as_safetensors(folder):
    with new_file(folder / "a.safetensors") as temporary:
        save_file({"a": torch.zeros(4000)}, temporary)


def as_language_model(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, num_attention_heads=2, num_hidden_layers=1))
    with new_folder(folder / "final") as temporary:
        model.save_pretrained(temporary)


def as_image_tensor(folder):
    from PIL import Image

    from diffusion_align.report import save_png

    save_png(Image.effect_noise((128, 128), 90), folder / "samples" / "a.png")


def as_figure(folder):
    from matplotlib.figure import Figure

    from diffusion_align.report.plots import save_figure

    save_figure(Figure(), folder / "a.png")


WRITERS = {
    "a checkpoint's weights": (as_checkpoint(weights={"trained": {"a": torch.zeros(4000)}}), "step_00000002"),
    "a checkpoint's optimizer": (as_checkpoint(tensors={"a": torch.zeros(4000)}), "step_00000002"),
    "a checkpoint's state": (as_checkpoint(state={"a": "b" * 16_000}), "step_00000002"),
    "text": (lambda folder: write_text(folder / "a.txt", "a" * 16_000), "a.txt"),
    "a row": (lambda folder: append_line(folder / "rows.jsonl", "a" * 16_000), "rows.jsonl"),
    "safetensors": (as_safetensors, "a.safetensors"),
    "a language model": (as_language_model, "final"),
    "an image": (as_image_tensor, "a.png"),
    "a figure": (as_figure, "a.png"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_without_room_the_old_stands_and_nothing_half_written_stays(tmp_path, kind):
    write, name = WRITERS[kind]
    save_checkpoint(tmp_path, 1, weights={"trained": {"a": torch.ones(1)}}, tensors={}, state={}, keep=1)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    before = {path: (tmp_path / path).read_bytes() for path in names(tmp_path)}
    elsewhere = tmp_path.parent / f"{tmp_path.name} elsewhere"
    elsewhere.mkdir()
    write(elsewhere)  # what it imports is compiled into files, which the limit would cut off
    with files_of_at_most(3000), pytest.raises(WriteError) as caught:
        write(tmp_path)
    said = str(caught.value)
    assert said.endswith(f"{name} cannot be written (File too large): raise the limit on the size of files (ulimit -f)")
    assert said.startswith(str(tmp_path))
    assert {path: (tmp_path / path).read_bytes() for path in names(tmp_path)} == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    load_checkpoint(tmp_path / "step_00000001")
    write(tmp_path)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device): make room on that disk"),
        (errno.EDQUOT, "Disk quota exceeded): make room within your quota"),
        (errno.EROFS, "Read-only file system): make it writable or choose another place"),
        (errno.EIO, "Input/output error): check the disk or choose another place"),
    ],
)
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_every_reason_is_said_with_what_to_do(tmp_path, broken, number, remedy, call):
    broken(call, number)
    for write in (write_text, append_line) if call == "fsync" else (write_text,):
        with pytest.raises(WriteError, match=r"a\.txt cannot be written") as caught:
            write(tmp_path / "a.txt", "new")
        assert str(caught.value).endswith(remedy)
    with pytest.raises(WriteError), new_folder(tmp_path / "final") as temporary:
        (temporary / "a.txt").write_text("new")
    assert not [path for path in tmp_path.rglob("*") if path.read_bytes()]


def test_torch_does_not_say_why():
    with (
        pytest.raises(WriteError, match=r"x cannot be written \(the write failed\): check the disk"),
        writing.writing("x"),
    ):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")


def half_of(target, error):
    with target as temporary:
        (temporary / "b.txt" if temporary.is_dir() else temporary).write_text("half")
        raise error


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("no number"), RuntimeError("CUDA error"), TimeoutError("no answer"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            half_of(new_file(tmp_path / "a"), error)
    about_another = UserError("the model's file is damaged: load it anew")
    about_another.__context__ = OSError(errno.ENOENT, "No such file or directory")
    with pytest.raises(UserError, match="the model's file is damaged"):
        half_of(new_folder(tmp_path / "a"), about_another)
    assert names(tmp_path) == []


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path):
    run = tmp_path / "run"
    for write, _ in WRITERS.values():
        if write is not as_figure:  # figures are made by commands of their own
            with pytest.raises(WriteError, match=r"\(No such file or directory\): its folder was moved, removed or"):
                write(run / "inside")
    with pytest.raises(WriteError):
        make_folder(run / "samples")
    assert not run.exists()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"\(Not a directory\): its folder was moved"):
        write_text(tmp_path / "file" / "a.txt", "")


def test_a_kill_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_text(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])
    write_text(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("new", ["a.txt"])


def test_a_folder_that_exists_keeps_what_is_not_written_anew(tmp_path):
    for text in ("old", "new"):
        with new_folder(tmp_path / "final") as temporary:
            (temporary / "unet").mkdir()
            (temporary / "unet" / "a.txt").write_text(text)
        (tmp_path / "final" / "mine.txt").write_text("mine")
    assert names(tmp_path) == ["final/mine.txt", "final/unet/a.txt"]
    assert (tmp_path / "final" / "unet" / "a.txt").read_text() == "new"
    with pytest.raises(KeyError):
        half_of(new_folder(tmp_path / "final"), KeyError())
    assert names(tmp_path) == ["final/mine.txt", "final/unet/a.txt"]
    assert not [path for path in tmp_path.rglob(".*")]


def test_text_that_utf8_has_no_place_for(tmp_path):
    write_text(tmp_path / "a", "ä \udcff 🦁")
    append_line(tmp_path / "a", " \ud800")
    assert (tmp_path / "a").read_bytes() == "ä \\udcff 🦁 \\ud800\n".encode()


def test_links_stay_and_pipes_are_written_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "folder" / "a.txt")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "folder" / "b.txt")
    for name, target in (("link.txt", "a.txt"), ("dangling.txt", "b.txt")):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "folder" / target).read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR)
    write_text(tmp_path / "pipe", "new")
    assert os.read(reader, 100) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(WriteError, match=r"folder cannot be written \(Is a directory\): something else of that name"):
        write_text(tmp_path / "folder", "new")
    assert names(tmp_path) == ["dangling.txt", "folder/a.txt", "folder/b.txt", "link.txt"]


def test_a_file_that_is_mounted_itself_is_written_in_place(tmp_path, broken):
    (tmp_path / "mounted.jsonl").write_text("the old, which is longer")
    broken("replace", errno.EBUSY)
    inode = (tmp_path / "mounted.jsonl").stat().st_ino
    write_text(tmp_path / "mounted.jsonl", "new")
    assert (tmp_path / "mounted.jsonl").read_text() == "new"
    assert (tmp_path / "mounted.jsonl").stat().st_ino == inode
    assert names(tmp_path) == ["mounted.jsonl"]


def test_names_of_255_bytes(tmp_path):
    for name in ("x" * 255, "🦁" * 63):
        write_text(tmp_path / name, "whole")
        assert (tmp_path / name).read_text() == "whole"


def test_what_killed_writers_left_is_swept(tmp_path):
    left = [".config.yaml.tmp", ".report.html.7.tmp", "checkpoints/.step_00000002.tmp/a", "latents/.tmpAbC123"]
    left += ["final/.new.7.tmp/unet/a", ".best.tmp/a", "samples/.epoch_0001.png.7.tmp"]
    kept = ["config.yaml", "a.tmp", "samples/.keep", "checkpoints/step_00000001/trained.safetensors"]
    touch(tmp_path, [*left, *kept, "elsewhere/.a.tmp"])
    other = tmp_path / "elsewhere"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(other)
    sweep(tmp_path / "run")
    assert (other / ".a.tmp").exists(), "what a link points to is somebody else's"
    shutil.rmtree(tmp_path / "run")
    (other / ".a.tmp").unlink()
    sweep(tmp_path)
    assert names(tmp_path) == sorted(kept)
    assert not [path for path in tmp_path.rglob("*.tmp") if path.is_dir()]
    sweep(tmp_path / "nowhere")


def test_in_a_folder_of_others_only_what_is_named_is_swept(tmp_path):
    kept = [".a.7-1.tmp", "run/.config.yaml.7-1.tmp", "run/.tmpAbC123"]
    touch(tmp_path, [*kept, ".smollm2.7-1.tmp/model.safetensors"])
    sweep(tmp_path, of="smollm2")
    assert names(tmp_path) == sorted(kept)


def test_commands_say_it_in_one_sentence(call_cli, tiny_language_model, tmp_path, broken):
    """What was computed is printed all the same; nothing is left of what could not be written."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "reward": 0.5}\n')

    broken("replace", errno.ENOSPC)
    before = names(tmp_path)
    options = ["-p", "cat", "--max-new-tokens", "2", "-o", tmp_path / "a.jsonl"]
    commands = {"run/report.html": ["report", tmp_path / "run"], "a.jsonl": ["complete", tiny_language_model, *options]}
    for path, arguments in commands.items():
        status, out, err = call_cli(*arguments)
        assert status == 2
        said = f"error: {tmp_path / path} cannot be written (No space left on device): make room on that disk"
        assert err.splitlines()[-1] == said
        assert out.startswith("cat") or path != "a.jsonl"
    assert names(tmp_path) == before


def test_what_is_written_can_be_read_by_others(tmp_path):
    """As far as the umask says; safetensors alone would keep it for its owner."""
    (tmp_path / "plain").touch()
    with new_folder(tmp_path / "final") as folder:
        save_file({"a": torch.ones(1)}, folder / "a.safetensors")
    with new_file(tmp_path / "b.safetensors") as file:
        save_file({"a": torch.ones(1)}, file)
    wanted = (tmp_path / "plain").stat().st_mode
    assert [(tmp_path / name).stat().st_mode for name in ("final/a.safetensors", "b.safetensors")] == [wanted] * 2
