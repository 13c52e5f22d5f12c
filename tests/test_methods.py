"""A method is one object: a trainer class in a stranger's file runs everywhere that a shipped one does."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import yaml

from diffusion_align import methods
from diffusion_align.errors import ConfigError
from diffusion_align.methods import SHIPPED, describe_methods, method_name, method_of, outline_of
from diffusion_align.pipelines.configuration import read_config
from diffusion_align.training.config import PLUG_INS

ROOT = Path(__file__).parent.parent
SOURCES = [path for part in ("diffusion_align", "pipelines", "rewards") for path in sorted((ROOT / part).rglob("*.py"))]
STOPPER = """
from diffusion_align.training.callbacks import Callback

class Stopper(Callback):
    def on_epoch_end(self, trainer, row):
        row["seen"] = trainer.epoch
        return "enough" if trainer.epoch == 2 else None

not_one = 3
"""
SETTINGS = {
    "epochs": 1,
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "micro_batch_size": 4,
    "updates_per_epoch": 1,
    "lora": {"rank": 2},
    "num_threads": 1,
}
OF_IMAGES = {
    "sampler": {"steps": 2, "guidance_scale": 1.0},
    "group_size": 2,
    "reward": "jpeg_compressibility",
    "prompts": ["a", "b"],
}
OF_TEXT = {"reward": "length", "prompts": ["the cat", "a dog"], "num_generations": 2, "max_completion_length": 8}


@pytest.fixture
def strangers(tmp_path, monkeypatch):
    """A folder outside the repository, where we are, with files of other people."""
    for name in ("raft", "rloo"):
        shutil.copy(ROOT / f"examples/{name}.py", tmp_path)
    (tmp_path / "stopper.py").write_text(STOPPER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(folder, model, method, **settings):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "method": method, "output_dir": "run", **settings}))
    return path


RAFT, RLOO = "raft.py:RAFTTrainer", "rloo.py:RLOOTrainer"


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_strangers_method_is_described_and_its_code_is_part_of_the_run(kind, strangers, call_cli, request):
    """What else runs with such a file, in an installed copy too, is in test_examples.py."""
    reference, own = (RAFT, OF_IMAGES) if kind == "image" else (RLOO, OF_TEXT)
    model = request.getfixturevalue("tiny_sd" if kind == "image" else "tiny_language_model")
    code, _, err = call_cli("train", recipe(strangers, model, reference, **SETTINGS, **own))
    assert code == 0, err
    run = strangers / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["method"] == f"{strangers}/{reference}"
    assert ("What the policy is pulled towards." in (run / "report.html").read_text()) == (kind == "image")
    described = json.loads((run / "metrics.json").read_text())
    assert described["kl"]["unit"] == ("nats per step" if kind == "image" else "nats per token")
    file = strangers / reference.partition(":")[0]
    file.write_text(file.read_text() + "\nchanged = True\n")
    again = ["train", "run/config.yaml", "resume=true", "epochs=2"]
    code, _, err = call_cli(*again)
    assert code == 2
    assert "accept_changed=[method]" in err
    code, _, err = call_cli(*again, "accept_changed=[method]")
    assert code == 0, err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "time/epoch" in row] == [1, 2]
    assert all("logp" in row for row in rows if "loss" in row)


def test_a_run_whose_methods_file_was_moved_is_resumed_if_that_is_accepted(strangers, tiny_language_model, call_cli):
    path = recipe(strangers, tiny_language_model, RLOO, **SETTINGS, **OF_TEXT)
    code, _, err = call_cli("train", path)
    assert code == 0, err
    (strangers / "rloo.py").rename(strangers / "moved.py")
    again = ["train", "run/config.yaml", "resume=true", "epochs=2", "method=moved.py:RLOOTrainer"]
    code, _, err = call_cli(*again)
    assert code == 2
    assert "accept_changed=[method]" in err
    code, _, err = call_cli(*again, "accept_changed=[method]")
    assert code == 0, err
    code, _, err = call_cli(*again, f"method={RAFT}")
    assert code == 2
    assert "is a run of method=" in err


def test_align_names_what_a_strangers_method_lacks(strangers, tiny_sd, tiny_language_model):
    from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline

    for pipe, fitting, other, settings in (
        (ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu"), RAFT, RLOO, OF_IMAGES),
        (TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu"), RLOO, RAFT, OF_TEXT),
    ):
        with pytest.raises(ConfigError, match="unknown setting 'sharpnes'"):
            pipe.align(fitting, output_dir="run", sharpnes=2.0, **SETTINGS, **settings)
        with pytest.raises(ConfigError, match=r"does not train .*: use one of "):
            pipe.align(other, output_dir="run", **SETTINGS, **settings)


def test_callbacks_are_objects_or_are_found_by_reference(strangers, tiny_language_model, call_cli):
    from diffusion_align.pipelines import TextAlignmentPipeline
    from diffusion_align.training.callbacks import Callback

    class Counter(Callback):
        epochs = 0

        def on_epoch_end(self, trainer, row):
            self.epochs += 1

    counter = Counter()
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    settings = SETTINGS | OF_TEXT | {"epochs": 3}
    pipe.align(method_of("grpo"), output_dir="run", callbacks=[counter, "stopper.py:Stopper"], **settings)
    assert counter.epochs == 2
    rows = [json.loads(line) for line in (strangers / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["seen"] for row in rows if "seen" in row] == [1, 2]
    written = yaml.safe_load((strangers / "run" / "config.yaml").read_text())
    assert written["callbacks"] == [f"{strangers}/stopper.py:Stopper"]
    path = recipe(
        strangers, tiny_language_model, "grpo", **settings, callbacks=["stopper.py:Stoper", "stopper.py:not_one"]
    )
    code, _, err = call_cli("train", path, "output_dir=other")
    assert code == 2
    assert "did you mean 'Stopper'" in err
    assert "is not a Callback" in err
    assert not (strangers / "other").exists()


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("dppo", "method='dppo' is unknown: did you mean 'ppo'?"),
        ("nowhere.py:Trainer", "method file 'nowhere.py' does not exist"),
        ("rloo.py:RLOTrainer", "'rloo.py' has no 'RLOTrainer': did you mean 'RLOOTrainer'?"),
        ("rloo.py:RLOOConfig", "method='rloo.py:RLOOConfig' is not a trainer: write a subclass of"),
        ("half.py:Half", "method='half.py:Half' lacks estimate, loss: a trainer must define them"),
        ("odd.py:Odd", "method='odd.py:Odd' has config_class=3: it must be a subclass of TrainingConfig"),
        (3, "method=3 is unknown: known are ddpo, diffusion_dpo"),
    ],
)
def test_what_is_no_method_is_one_sentence(strangers, method, sentence):
    head = "from diffusion_align.llm.policy_gradient import PolicyGradientTrainer\n"
    (strangers / "half.py").write_text(f"{head}class Half(PolicyGradientTrainer):\n    pass\n")
    (strangers / "odd.py").write_text(
        (strangers / "rloo.py").read_text() + "\nclass Odd(RLOOTrainer): config_class = 3\n"
    )
    with pytest.raises(ConfigError) as error:
        method_of(method)
    assert len(error.value.problems) == 1
    assert str(error.value).startswith(sentence)


def test_an_installed_package_brings_methods(strangers, monkeypatch):
    from importlib.metadata import EntryPoint

    monkeypatch.syspath_prepend(str(strangers))
    points = [EntryPoint(name, f"rloo:{cls}", PLUG_INS) for name, cls in (("rloo", "RLOOTrainer"), ("bad", "No"))]
    monkeypatch.setattr(methods, "entry_points", lambda group: points if group == PLUG_INS else [])
    assert method_of("rloo").__name__ == "RLOOTrainer"
    with pytest.raises(ConfigError, match="method 'bad' cannot be imported"):
        method_of("bad")
    with pytest.raises(ConfigError, match="did you mean 'rloo'"):
        method_of("rlo")
    listed = dict(describe_methods())
    assert set(SHIPPED) < set(listed)
    assert listed["ddpo"][1] == "trains: a text-to-image model"
    about = "REINFORCE with the mean of a prompt's other completions as the baseline"
    assert listed["rloo"] == [about, "trains: a language model"]
    [problem] = listed["bad"]
    assert problem.startswith("method 'bad' cannot be imported")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_known_of_a_method_before_its_trainer_is_what_the_trainer_says(name):
    trainer, outline = method_of(name), outline_of(name)
    assert outline[:3] == (trainer.config_class, trainer.model_kind, trainer.dataset_kind)
    assert outline.summary.startswith(("Fine-tune a ", "Train a "))
    assert outline_of(trainer)[:3] == outline[:3]


def test_a_class_is_written_by_its_name():
    assert [method_name(method_of(name)) for name in SHIPPED] == list(SHIPPED)


def test_the_model_of_a_method_that_loads_its_own_is_not_looked_for(strangers):
    source = (strangers / "rloo.py").read_text()
    (strangers / "alone.py").write_text(source + "\n    model_kind = None\n")
    given = ["model=nothing_here", f"output_dir={strangers / 'alone'}"]
    file = strangers / "alone.yaml"
    file.write_text("method: alone.py:RLOOTrainer\nprompts: [a, b]\nreward: nobody_knows\n")
    assert read_config(str(file), given).model == "nothing_here"


# -- method= switches a recipe -----------------------------------------------------------------------------------------


SWITCHES = [
    (
        "ddpo_emoji_aesthetic",
        ["method=diffusion_dpo", "beta_dpo=2000"],
        "advantages, timestep_fraction, clip_range_nats",
    ),
    ("ddpo_emoji_jpeg", ["method=diffusion_dpo", "beta_dpo=2000"], "advantages, timestep_fraction, clip_range_nats"),
    ("dpo_emoji_online", ["method=ddpo"], "beta_dpo, steps_per_pair"),
    ("ddpo_emoji_aesthetic", ["method=rwr", "temperature=0.5"], "advantages, kl_coef, clip_range_nats"),
    ("ppo_tiny", ["method=grpo"], "missing_eos_penalty"),
    ("grpo_tiny", ["method=ppo"], ""),
    ("grpo_tiny", ["method=kto"], "kl_coef"),
    ("dpo_multi_negative_tiny", ["method=kto"], "pair_selection"),
    ("kto_tiny", ["method=dpo", "loss_type=ipo"], "desirable_above, desirable_weight"),
]


@pytest.mark.parametrize(("name", "overrides", "left_out"), SWITCHES)
def test_a_recipe_is_switched_by_its_method(name, overrides, left_out, tmp_path, capsys):
    config = read_config(name, [*overrides, f"output_dir={tmp_path / 'run'}"])
    assert overrides[0] == f"method={config.method}"
    line = f"{overrides[0]} does not use from the recipe: {left_out}\n" if left_out else ""
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "rare", ["clip_std: [0, 2]\nkl_gradient: direct", "experimental: {clip_std: [0, 2], kl_gradient: direct}"]
)
def test_experimental_settings_are_switched_one_by_one(rare, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"method: grpo\nmodel: emoji-sd\nprompts: [a]\nreward: jpeg_compressibility\n{rare}\n")
    config = read_config(str(file), ["method=ddpo", "credit=to_go", f"output_dir={tmp_path / 'run'}"])
    assert (config.experimental.clip_std, config.experimental.credit) == ((0, 2), "to_go")
    assert capsys.readouterr().err == "method=ddpo does not use from the recipe: experimental.kl_gradient\n"
    with pytest.raises(ConfigError, match=r"^unknown setting 'experimental\.kl_gradient': "):
        read_config(str(file), ["method=ddpo", "experimental.kl_gradient=direct", f"output_dir={tmp_path / 'run'}"])


def test_a_method_without_experimental_settings_takes_none_of_the_recipe(strangers, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("method: grpo\nmodel: tiny-lm\nprompts: [a]\nreward: length\nexperimental: {clip_std: [0, 2]}\n")
    given = [f"method={strangers / 'rloo.py'}:RLOOTrainer", f"output_dir={tmp_path / 'run'}"]
    read_config(str(file), given)
    assert capsys.readouterr().err.endswith(" does not use from the recipe: experimental.clip_std\n")
    with pytest.raises(ConfigError, match=r"^unknown setting 'experimental': "):
        read_config(str(file), [*given, "experimental.clip_std=[0, 1]"])


def test_a_setting_that_was_typed_must_be_one_of_the_method(tmp_path):
    with pytest.raises(ConfigError, match=r"^unknown setting 'value_coef': "):
        read_config("grpo_tiny", ["method=ppo", "method=grpo", "value_coef=0.2"])
    with pytest.raises(ConfigError, match=r"^unknown setting 'value_coef': "):
        read_config("ppo_tiny", ["method=grpo", "value_coef=0.2", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"^unknown setting 'value_coef': "):  # the recipe's own method is no switch
        read_config("grpo_tiny", ["method=grpo", "value_coef=0.2", f"output_dir={tmp_path / 'run'}"])


# -- nobody else names them --------------------------------------------------------------------------------------------


def names_in(path):
    """Names of methods that stand in a file as texts of their own; what a docstring says is prose.

    A method's own settings say their ``method``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fields = [one for one in ast.walk(tree) if isinstance(one, ast.AnnAssign) and ast.unparse(one.target) == "method"]
    own = {id(constant) for field in fields for constant in ast.walk(field)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in own]
    return {node.value for node in names if node.value in SHIPPED}


def test_no_other_file_lists_the_methods():
    listing = {str(path.relative_to(ROOT)): found for path in SOURCES if len(found := names_in(path)) > 1}
    generated = "pipelines/settings.py"
    assert listing.keys() == {"diffusion_align/methods.py", generated}


def test_nothing_asks_what_kind_of_trainer_or_configuration_it_has():
    """Whether it is a configuration at all may be asked, for a sentence."""
    kinds, any_kind = ("Trainer", "Config"), "TrainingConfig"
    asked = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                named = [one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)]
                asked += [f"{path}:{node.lineno}" for name in named if name.endswith(kinds) and name != any_kind]
    assert not asked
