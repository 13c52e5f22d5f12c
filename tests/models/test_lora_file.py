"""LoRA files of others: every layout changes the layers as its writer meant, and what does not fit is said."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_align.diffusion.policy import LoRAConfig
from diffusion_align.errors import UserError
from diffusion_align.models.adapters import (
    LORA_FILE,
    adapter_weights,
    load_lora,
    merge_adapters,
    restore_lora,
    save_lora,
    unload_lora,
)
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.models.lora import lora_layers, rescale_lora, write_tensors

UNET = ["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.mlp.fc1"]


def weight_of(network, layer):
    modules = dict(network.named_modules())
    return modules[layer if layer in modules else f"text_model.{layer}"].weight


def low_rank(weight, rank):
    """A and B of a layer with this weight."""
    a = torch.randn(rank, *weight.shape[1:])
    b = torch.randn(weight.shape[0], rank, *([1] * (weight.ndim - 2)))
    return a, b


def product(a, b):
    return (b.flatten(1) @ a.flatten(1)).view(len(b), *a.shape[1:])


@pytest.fixture
def written(tiny_sd, tmp_path):
    """``written(names, ranks, alphas)``: a file of random weights, and (network, layer) -> the change that is meant.

    ``names(network, layer, "down" | "up" | "alpha")`` is what the layout calls it, None where it has no such thing.
    """

    def write(names, *, ranks=(2, 2, 2, 2), alphas=None, text=True):
        pipeline = load_pipeline(str(tiny_sd))
        torch.manual_seed(0)
        layers = [("unet", layer) for layer in UNET] + [("text_encoder", layer) for layer in TEXT * text]
        tensors, meant = {}, {}
        for i, (network, layer) in enumerate(layers):
            a, b = low_rank(weight_of(getattr(pipeline, network), layer), ranks[i])
            tensors[names(network, layer, "down")], tensors[names(network, layer, "up")] = a, b
            scale = 1.0
            if alphas is not None:
                tensors[names(network, layer, "alpha")] = torch.tensor(float(alphas[i]))
                scale = alphas[i] / ranks[i]
            meant[network, layer] = scale * product(a, b)
        save_file(tensors, tmp_path / "some.safetensors")
        return tmp_path / "some.safetensors", meant

    return write


def kohya(network, layer, what):
    prefix, layer = ("unet", layer) if network == "unet" else ("te", f"text_model.{layer}")
    end = "alpha" if what == "alpha" else f"lora_{what}.weight"
    return f"lora_{prefix}_{layer.replace('.', '_')}.{end}"


def diffusers_of_old(network, layer, what):
    if network == "text_encoder":
        return f"text_encoder.text_model.{layer}.lora_linear_layer.{what}.weight"
    if ".attn" in layer:
        return f"unet.{layer.replace('.to_q', '.processor.to_q_lora')}.{what}.weight"
    return f"unet.{layer}.lora.{what}.weight"


def of_peft(prefix):
    return lambda network, layer, what: f"{prefix}{layer}.lora_{'A' if what == 'down' else 'B'}.weight"


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (kohya, {"alphas": (1, 1, 1, 1)}),
        (kohya, {"alphas": (1, 3, 2, 4), "ranks": (2, 3, 2, 1)}),
        (kohya, {"ranks": (2, 3, 1, 1)}),
        (diffusers_of_old, {}),
        (of_peft("unet."), {"text": False}),
        (of_peft("unet."), {"text": False, "ranks": (3, 1)}),
        (of_peft(""), {"text": False}),
    ],
    ids=["kohya", "kohya of several scales", "kohya without alpha", "older", "today's", "several ranks", "bare"],
)
def test_every_layout_changes_its_layers_as_meant(tiny_sd, tmp_path, written, names, settings):
    file, meant = written(names, **settings)
    plain, pipeline = load_pipeline(str(tiny_sd)), load_pipeline(str(tiny_sd))
    load_lora(pipeline, file, "tiny")
    save_lora(pipeline, tmp_path / "again")
    merge_adapters(pipeline)
    for network in ("unet", "text_encoder"):
        before = getattr(plain, network).state_dict()
        after = getattr(pipeline, network).state_dict()
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert len(changed) == sum(of == network for of, _ in meant)
    for (network, layer), change in meant.items():
        found = weight_of(getattr(pipeline, network), layer) - weight_of(getattr(plain, network), layer)
        torch.testing.assert_close(found, change, atol=1e-5, rtol=1e-4)
    again = load_pipeline(str(tiny_sd))
    load_lora(again, tmp_path / "again", "tiny")
    merge_adapters(again)
    for name, weight in again.unet.state_dict().items():
        torch.testing.assert_close(weight, pipeline.unet.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_kohyas_file_changes_the_layers_as_in_diffusers(tiny_sd, written):
    """Where its scales are one: of several, diffusers keeps one for the attention layers."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Theirs

    file, _ = written(kohya, alphas=(3, 3), ranks=(2, 2), text=False)
    ours, theirs = load_pipeline(str(tiny_sd)), load_pipeline(str(tiny_sd))
    load_lora(ours, file, "tiny")
    state, alphas = Theirs.lora_state_dict(load_file(file))
    theirs.unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="default")
    theirs.unet.fuse_lora()
    for name, layer in lora_layers(ours.unet).items():
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight, theirs.unet.get_submodule(name).weight)


def test_pefts_own_folder_is_read(tiny_sd, tmp_path):
    """With the scale of adapter_config.json."""
    from peft import LoraConfig, get_peft_model

    pipeline = load_pipeline(str(tiny_sd))
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "conv1"], init_lora_weights=False)
    theirs = get_peft_model(load_pipeline(str(tiny_sd)).unet, config)
    theirs.save_pretrained(tmp_path)
    for lora in (tmp_path, tmp_path / "adapter_model.safetensors"):
        load_lora(pipeline, lora, "tiny")
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 4, 16)
        with torch.no_grad():
            torch.testing.assert_close(pipeline.unet(*inputs).sample, theirs(*inputs).sample)
        unload_lora(pipeline)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"whose scale is in adapter_config\.json"):
        load_lora(pipeline, tmp_path, "tiny")


HALF = {
    f"unet.{UNET[0]}.lora_A.weight": torch.zeros(2, 8),
    "unet.down_blocks.7.to_q.lora_A.weight": torch.zeros(2, 8),
    "unet.down_blocks.7.to_q.lora_B.weight": torch.zeros(8, 2),
}
TRANSFORMER = {
    f"transformer.transformer_blocks.{i}.attn.to_q.lora_{which}.weight": torch.zeros(2, 2)
    for i in range(3)
    for which in "AB"
}
ENCODER_2 = {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": torch.zeros(2, 2)}
FLAT = {f"unet.{UNET[1]}.lora_A.weight": torch.zeros(8), f"unet.{UNET[1]}.lora_B.weight": torch.zeros(8)}
DORA, MIDDLE = (
    "lora_unet_mid_block_attentions_0_proj_in.dora_scale",
    "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight",
)
WITH_MIDDLE = {kohya("unet", UNET[1], "down"): torch.zeros(2, 8), kohya("unet", UNET[1], "up"): torch.zeros(8, 2)}
BAD = {
    "of a transformer": (TRANSFORMER, r"none of its 6 tensors fit a layer, with 6 \(transformer\.transformer"),
    "of another text encoder": (ENCODER_2, "none of its 1 tensors fit a layer, with 1 .text_encoder_2"),
    "half": (HALF, r"with 3 \(.*unet\.down_blocks\.7\.to_q\.lora_A\.weight"),
    "no low rank": ({"unet.conv_in.weight": torch.zeros(2, 2)}, r"with 1 \(unet\.conv_in\.weight\)"),
    "empty": ({}, "none of its 0 tensors fit"),
    "with what is not read": ({DORA: torch.zeros(2)}, rf"with 1 \({re.escape(DORA)}\)"),
    "of one dimension": (FLAT, r"none of its 2 tensors fit a layer, with 2"),
    "with a middle": (
        WITH_MIDDLE | {MIDDLE: torch.zeros(2, 2)},
        rf"not been correctly renamed: {re.escape(MIDDLE)}",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named_and_changes_nothing(tiny_sd, tmp_path, case):
    tensors, wanted = BAD[case]
    save_file(tensors, tmp_path / "x.safetensors")
    pipeline = load_pipeline(str(tiny_sd))
    before = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    with pytest.raises(UserError, match=r"^lora='.*' could not be loaded into tiny: [^\n]*" + wanted) as caught:
        load_lora(pipeline, tmp_path, "tiny")
    assert "\n" not in str(caught.value)
    after = pipeline.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_part_of_a_file_that_fits_is_not_enough(tiny_sd, tmp_path, make_policy):
    policy = make_policy("tiny_sd", noise=0.1)
    policy.save_lora(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    known, name = len(tensors), next(iter(tensors))
    tensors["unet.down_blocks.7.to_q.lora_A.weight"] = tensors[name].clone()
    save_file(tensors, tmp_path / LORA_FILE)
    with pytest.raises(UserError, match=rf"not all of its {known + 1} tensors fit a layer, with 1 \(unet"):
        load_lora(load_pipeline(str(tiny_sd)), tmp_path, "tiny")


PEFT_SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv1"]}


@pytest.mark.parametrize(
    "settings",
    [
        "[]",
        "[" * 100_000,
        json.dumps(PEFT_SETTINGS | {"r": "two"}),
        json.dumps(PEFT_SETTINGS | {"lora_alpha": None}),
        json.dumps(PEFT_SETTINGS | {"rank_pattern": ["x"]}),
        json.dumps(PEFT_SETTINGS | {"alpha_pattern": {"(": 2}}),
        json.dumps(PEFT_SETTINGS | {"target_modules": 3}),
    ],
)
@pytest.mark.parametrize("layout", ["peft", "header"])
def test_settings_that_are_none_are_one_sentence(tiny_sd, tmp_path, settings, layout):
    pipeline = load_pipeline(str(tiny_sd))
    a, b = low_rank(weight_of(pipeline.unet, UNET[1]), 2)
    prefix = "base_model.model." if layout == "peft" else "unet."
    tensors = {f"{prefix}{UNET[1]}.lora_{which}.weight": tensor for which, tensor in (("A", a), ("B", b))}
    if layout == "peft":
        (tmp_path / "adapter_config.json").write_text(settings)
        metadata = None
    else:
        given = json.loads(settings) if settings.startswith("{") else None
        header = settings if given is None else json.dumps({f"unet.{name}": v for name, v in given.items()})
        metadata = {"lora_adapter_metadata": header}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata)
    with pytest.raises(UserError, match=r"^lora='.*' could not be loaded into tiny: ") as caught:
        load_lora(pipeline, tmp_path, "tiny")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_which_file_of_a_folder_is_meant(tiny_sd, tmp_path, written):
    file, _ = written(of_peft("unet."), text=False)
    pipeline = load_pipeline(str(tiny_sd))
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match=r"text\.txt' is not a \.safetensors file"):
        load_lora(pipeline, tmp_path / "text.txt", "tiny")
    (tmp_path / "run" / "final").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no \.safetensors file \(.* in its final/\)"):
        load_lora(pipeline, tmp_path / "run", "tiny")
    shutil.copy(file, tmp_path / "optimizer.safetensors")
    load_lora(pipeline, tmp_path, "tiny")
    unload_lora(pipeline)
    shutil.copy(file, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"2 \(other\.safetensors, some\.safetensors\) files"):
        load_lora(pipeline, tmp_path, "tiny")
    shutil.copy(file, tmp_path / LORA_FILE)
    load_lora(pipeline, tmp_path, "tiny")


@pytest.mark.parametrize("lora", [{"rank": 2, "alpha": 8}, {"rank": 3, "alpha": 1, "layers": "attention+convolutions"}])
def test_a_reader_that_ignores_the_header_gets_the_whole_change(tiny_sd, tmp_path, make_policy, lora):
    policy = make_policy("tiny_sd", lora=LoRAConfig(**lora), noise=0.1)
    policy.save_lora(tmp_path)
    plain = load_pipeline(str(tiny_sd))
    plain.load_lora_weights(load_file(tmp_path / LORA_FILE))  # the tensors alone
    layers = lora_layers(policy.network)
    assert 2 * len(layers) == len(policy.trainable) > 0
    for name, layer in layers.items():
        theirs = plain.unet.get_submodule(name)
        change = theirs.get_delta_weight(theirs.active_adapters[0])
        torch.testing.assert_close(change, layer.get_delta_weight("default"), atol=1e-6, rtol=1e-5)


def test_a_loaded_adapter_that_training_has_rescaled_is_put_back(tiny_sd, written):
    file, _ = written(kohya, alphas=(1, 3), text=False)
    pipeline = load_pipeline(str(tiny_sd))
    load_lora(pipeline, file, "tiny")
    before = {name: layer.get_delta_weight("default") for name, layer in lora_layers(pipeline.unet).items()}
    state = adapter_weights(pipeline)
    rescale_lora(pipeline.unet, 5)
    layers = lora_layers(pipeline.unet)
    for name, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), before[name])
    torch.nn.init.zeros_(layers[UNET[0]].lora_B["default"].weight)
    restore_lora(pipeline, state)
    for name, layer in lora_layers(pipeline.unet).items():
        assert torch.equal(layer.get_delta_weight("default"), before[name])
    assert pipeline.unet.peft_config["default"].alpha_pattern


def test_equal_adapters_give_equal_bytes(tmp_path, make_policy):
    """safetensors writes the keys of its header in another order each time, and a set's change with the process."""
    policy = make_policy("tiny_sd", lora=LoRAConfig(rank=2, alpha=8), noise=0.1)
    contents = set()
    for i in range(6):
        policy.save_lora(tmp_path / str(i))
        contents.add((tmp_path / str(i) / LORA_FILE).read_bytes())
    assert len(contents) == 1
    content = contents.pop()
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])["__metadata__"]
    assert list(header) == ["format", "lora_adapter_metadata"]
    settings = json.loads(header["lora_adapter_metadata"])
    assert list(settings) == sorted(settings)
    assert settings["unet.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


def test_the_order_of_what_is_written_does_not_matter(tmp_path):
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2, dtype=torch.float16)}
    notes = {f"note {i}": "ä" * i for i in range(9)}
    write_tensors(tmp_path / "one", tensors, notes)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())), dict(reversed(notes.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "one").items())
