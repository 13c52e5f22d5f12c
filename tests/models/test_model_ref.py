"""Runs as models: which weights are meant, what they were before, where a base is looked for; trained-on adapters."""

import pytest
import torch
import yaml

from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig, peft_config
from diffusion_align.errors import UserError
from diffusion_align.models.families import family_of
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.models.lora import adapter_layers, add_lora
from diffusion_align.models.model_ref import check_image_model, image_model_ref


@pytest.fixture
def run(tmp_path):
    """``run(name, model, whole=False)``: a finished run's folder with final/ and best/."""

    def make(name, model, *, whole=False):
        folder = tmp_path / "runs" / name
        for which in ("final", "best"):
            (folder / which).mkdir(parents=True)
            (folder / which / ("model_index.json" if whole else "pytorch_lora_weights.safetensors")).write_text("{}")
        sampler = {"steps": 3, "guidance_scale": 1.0}
        (folder / "config.yaml").write_text(yaml.safe_dump({"method": "ddpo", "model": model, "sampler": sampler}))
        return folder

    return make


def test_what_a_run_was_before_it_was_trained(run):
    lora = run("lora", "emoji-sd")
    whole = run("whole", str(lora), whole=True)
    above = run("above", str(whole))
    final = str(whole / "final")
    for folder, base, adapters in ((lora, "emoji-sd", 1), (whole, final, 0), (above, final, 1)):
        plan = image_model_ref(str(folder))
        assert (plan.base, len(plan.adapters), plan.origin, plan.run) == (base, adapters, "emoji-sd", folder)
    orphan = image_model_ref(str(run("orphan", "/gone/model", whole=True)))
    assert (orphan.base.rsplit("/", 1)[1], orphan.origin) == ("final", "/gone/model")


@pytest.mark.parametrize("whole", [False, True])
def test_final_and_best_are_of_their_run(run, whole):
    folder = run("one", "emoji-sd", whole=whole)
    for which in ("final", "best"):
        plan = image_model_ref(str(folder / which))
        assert (plan.run, plan.origin, plan.settings["sampler"]["steps"]) == (folder, "emoji-sd", 3)
        assert (plan.base if whole else str(plan.adapters[0])) == str(folder / which)
        check_image_model(str(folder / which))


def test_a_base_is_looked_for_from_where_the_run_was_started(run, tmp_path, monkeypatch):
    run("first", "emoji-sd")
    second = run("second", "runs/first")
    monkeypatch.chdir("/")
    assert image_model_ref(str(second)).origin == "emoji-sd"
    assert len(image_model_ref(str(second)).adapters) == 2
    monkeypatch.chdir(tmp_path)
    assert image_model_ref("runs/second").adapters[0].parent.name == "first"


@pytest.mark.parametrize(
    ("carried", "asked", "wanted"),
    [
        ({"rank": 2}, {"rank": 2}, None),
        ({"rank": 2, "alpha": 1}, {"rank": 2, "alpha": 1}, None),
        ({"rank": 2, "layers": "attention+convolutions"}, {"rank": 2, "layers": "attention+convolutions"}, None),
        ({"rank": 2, "dora": True, "alpha": 1}, {"rank": 2, "dora": True}, None),
        ({"rank": 2, "layers": "attention+feed_forward"}, {"rank": 2, "layers": "feed_forward+attention"}, None),
        ({"rank": 2, "dora": True}, {"rank": 2}, "a DoRA adapter: set lora.dora=true, or merge it first"),
        ({"rank": 2}, {"rank": 2, "dora": True}, "an adapter without DoRA: set lora.dora=false"),
        ({"rank": 2, "layers": "feed_forward"}, {"rank": 2}, "of other layers than lora.layers="),
        ({"rank": 2}, {"rank": 4}, "adapter of rank 2: set lora.rank"),
        ({"rank": 2, "alpha": 1}, {"rank": 2}, None),
        ({"rank": 2}, {"rank": 2, "alpha": 5}, None),
        ({"rank": 2}, {"rank": 2, "layers": "attention+convolutions"}, "of other layers than lora.layers="),
        ({"rank": 2, "layers": "attention+convolutions"}, {"rank": 2}, "of other layers than lora.layers="),
    ],
)
def test_an_adapter_is_trained_further_only_as_the_settings_say(tiny_sd, carried, asked, wanted):
    """A resumed run builds its adapter from the settings; another alpha than the file's changes no layer."""
    pipeline = load_pipeline(str(tiny_sd))
    add_lora(pipeline.unet, peft_config(LoRAConfig(**carried), family_of(pipeline)))
    if wanted is None:
        layer = next(layer for layer in adapter_layers(pipeline.unet))
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        before = layer.get_delta_weight("default")
        config = LoRAConfig(**asked)
        DenoisingPolicy(pipeline, lora=config)
        torch.testing.assert_close(layer.get_delta_weight("default"), before, rtol=1e-5, atol=1e-7)
        alpha = config.alpha or config.rank
        assert layer.scaling["default"] == alpha / config.rank
        assert pipeline.unet.peft_config["default"].lora_alpha == alpha
        return
    with pytest.raises(UserError, match=wanted):
        DenoisingPolicy(pipeline, lora=LoRAConfig(**asked))


def test_what_a_folder_was_saved_from_may_be_nowhere(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_name_or_path": "~nobody-of-that-name/model"}')
    assert image_model_ref(str(tmp_path)).origin == "~nobody-of-that-name/model"
