"""Settings that are paths: absolute in config.yaml, and found around the run where an older version wrote others."""

import os

import pytest

from diffusion_align.errors import ConfigError, UserError
from diffusion_align.models.language_models import language_model_ref
from diffusion_align.models.model_ref import image_model_ref
from diffusion_align.pipelines.configuration import check_config, read_config, read_settings
from diffusion_align.training.places import absolute_paths, found_from
from diffusion_align.training.reading import dump_config, load_yaml
from tests.helpers.problems import problem


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a model, prompts, a reward and its weights in it."""
    folder = tmp_path / "here"
    (folder / "models" / "sd").mkdir(parents=True)
    (folder / "emoji-sd").mkdir()
    for name in ("prompts.txt", "mine.py", "head.pt", "animals"):
        (folder / name).write_text("a cat\n")
    monkeypatch.chdir(folder)
    return folder


def settings(folder, first="./"):
    """Of every kind: those that lead to a file of ``folder``, and those that stay."""
    parts = [
        f"{folder}mine.py:f",
        "jpeg_compressibility",
        {"name": "combine", "rewards": [{"name": f"{folder}mine.py:g", "scale": 2}], "weights": [1]},
        {"name": "aesthetic", "head": f"{folder}head.pt", "clip": "openai/clip-vit-large-patch14"},
        {"name": "exact_match", "column": "animals"},  # a column, though a file is called so
        {"name": "pkg.mod:f", "table": f"{folder}models/sd"},
    ]
    held_out = {"reward": f"{folder}mine.py:g", "prompts": {"source": f"{folder}prompts.txt"}}
    return {
        "model": f"{folder}models/sd",
        "reference_model": "owner/name",
        "prompts": f"{folder}prompts.txt",
        "dataset": {"source": f"{first}prompts.txt", "max_rows": 3},
        "pairs": "emoji_style",
        "reward": parts,
        "evaluation": held_out | {"diversity": f"{folder}models/sd"},
        "output_dir": f"{folder}runs/a",
        "epochs": 3,
    }


def test_paths_become_absolute_and_names_stay(here):
    assert absolute_paths(settings("")) == settings(f"{here}/", f"{here}/")
    rows, function = ["a cat", {"prompt": "a dog"}], len
    given = {"model": "emoji-sd", "prompts": rows, "reward": function, "base_config": None}
    assert absolute_paths(given) == given  # the embedded model, though a folder is called so
    assert absolute_paths({"prompts": "animals"}) == {"prompts": "animals"}  # a shipped list


def test_checked_settings_are_what_config_yaml_holds(here, tmp_path):
    (here / "mine.py").write_text("def f(images, prompts, metadata):\n    return [0.0] * len(prompts)\n")
    raw = {"model": "emoji-sd", "prompts": "prompts.txt", "reward": "mine.py:f", "output_dir": "runs/a"}
    config = check_config(raw)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    written = load_yaml(tmp_path / "config.yaml")
    assert [written[name] for name in ("model", "prompts", "reward", "output_dir")] == [
        "emoji-sd",
        f"{here}/prompts.txt",
        f"{here}/mine.py:f",
        f"{here}/runs/a",
    ]
    assert raw["prompts"] == "prompts.txt"


def test_the_base_of_an_old_run_is_looked_for_around_the_run_first(here, tmp_path):
    """Another folder of the same name in the current folder is another model."""
    run = tmp_path / "project" / "runs" / "a"
    (tmp_path / "project" / "models" / "sd").mkdir(parents=True)
    run.mkdir(parents=True)
    (here / "only").mkdir()
    assert found_from(run, "models/sd") == str(tmp_path / "project" / "models" / "sd")
    assert found_from(run, "./only") == str(here / "only")
    assert found_from(run, "emoji-sd") == "emoji-sd"
    assert found_from(run, "owner/name") == "owner/name"
    assert found_from(run, str(here)) == str(here)
    assert found_from(run, "./gone") is None
    assert found_from(run, "~/no/such/model") == os.path.expanduser("~/no/such/model")
    assert absolute_paths({"model": "models/sd", "output_dir": "x"}, run) == {
        "model": str(tmp_path / "project" / "models" / "sd"),
        "output_dir": "x",
    }


@pytest.mark.parametrize("kind", ["image", "text", "adapter"])
def test_both_kinds_of_run_find_their_base_there(here, tmp_path, tiny_sd, kind):
    project = tmp_path / "project"
    run, base = project / "runs" / "a", project / "models" / "sd"
    (run / "final").mkdir(parents=True)
    (run / "config.yaml").write_text("model: models/sd\n")
    adapter = '{"base_model_name_or_path": "models/sd"}'
    if kind == "image":
        base.parent.mkdir()
        base.symlink_to(tiny_sd)
        (run / "final" / "pytorch_lora_weights.safetensors").touch()
        assert image_model_ref(str(run)).base == str(base)
    else:
        base.mkdir(parents=True)
        for folder in (base, here / "models" / "sd"):
            (folder / "config.json").write_text('{"model_type": "llama"}')
        (run / "final" / "adapter_model.safetensors").touch()
        (run / "final" / "adapter_config.json").write_text(adapter)
        name = str(run if kind == "text" else run / "final")
        assert language_model_ref(name, ("causal",)).base == str(base)
        (run / "config.yaml").write_text("model: ./gone\n")
        (run / "final" / "adapter_config.json").write_text('{"base_model_name_or_path": "./gone"}')
        with pytest.raises(UserError, match="whose base model"):
            language_model_ref(name, ("causal",))


def test_a_run_that_was_moved_does_not_begin_anew_where_it_was(tmp_path):
    moved, raw = tmp_path / "moved", read_settings("grpo_tiny", [f"output_dir={tmp_path / 'run'}"])
    (moved / "checkpoints").mkdir(parents=True)
    (moved / "config.yaml").write_text(dump_config(check_config(raw)))
    source = str(moved / "config.yaml")
    with pytest.raises(ConfigError, match=problem("resume=true", f"set output_dir={moved}")):
        read_config(source, ["resume=true"])
    assert read_config(source).output_dir == tmp_path / "run"
    assert read_config(source, ["resume=true", f"output_dir={moved}"]).output_dir == moved
    assert read_config(source, ["resume=true", f"output_dir={tmp_path / 'new'}"]).output_dir == tmp_path / "new"
