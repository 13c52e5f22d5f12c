"""Weights come in the dtype that is required, by whatever name a library's version knows it."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import diffusion_align.pretrained as pretrained
from diffusion_align.errors import UserError
from diffusion_align.pretrained import load_in_dtype

ROOT = Path(__file__).parent.parent


class Network(nn.Module):
    """Loads as diffusers' and transformers' classes do: unknown keywords are ignored."""

    known = "dtype"

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer, self.norm = nn.Linear(2, 2).to(dtype), nn.LayerNorm(2).to(dtype)

    @classmethod
    def from_pretrained(cls, folder, output_loading_info=False, **options):
        network = cls(options.get(cls.known) or torch.float32)
        return (network, {}) if output_loading_info else network


class Pipeline:
    def __init__(self, unet, vae):
        self.components = {"unet": unet, "vae": vae, "scheduler": None}

    @classmethod
    def from_pretrained(cls, folder, dtype=None, vae=None, **options):
        wanted = dtype if isinstance(dtype, dict) else {"default": dtype}
        return cls(Network(wanted["default"]), vae or Network(wanted.get("vae", wanted["default"])))


@pytest.mark.parametrize(
    ("version", "known"), [("0.36.0", "torch_dtype"), ("0.39.1", "torch_dtype"), ("0.40.0", "dtype")]
)
def test_diffusers_is_told_in_its_own_word(monkeypatch, version, known):
    class OfDiffusers(Network):
        pass

    OfDiffusers.known, OfDiffusers.__module__ = known, "diffusers.models.unet"
    monkeypatch.setattr(pretrained.importlib.metadata, "version", {"diffusers": version}.__getitem__)
    network = load_in_dtype(OfDiffusers.from_pretrained, "folder", dtype=torch.bfloat16)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}


def test_an_argument_that_is_ignored_is_an_error_and_not_float32():
    class Deaf(Network):
        known = "another_word"

    for options in ({}, {"output_loading_info": True}):
        with pytest.raises(UserError, match=r"Deaf was loaded in float32 instead of bfloat16 \(layer.weight\): this v"):
            load_in_dtype(Deaf.from_pretrained, "folder", dtype=torch.bfloat16, **options)
    load_in_dtype(Deaf.from_pretrained, "folder", dtype=torch.float32)


def test_what_a_network_keeps_in_float32_by_its_own_rule_may_be_that():
    class Keeps(Network):
        _keep_in_fp32_modules = ("norm",)

        def __init__(self, dtype=torch.float32):
            super().__init__(dtype)
            self.norm.float()

    network, _ = load_in_dtype(Keeps.from_pretrained, "folder", dtype=torch.bfloat16, output_loading_info=True)
    assert network.norm.weight.dtype == torch.float32
    Keeps._keep_in_fp32_modules = None
    with pytest.raises(UserError, match=r"in float32 instead of float64 \(norm.weight\)"):
        load_in_dtype(Keeps.from_pretrained, "folder", dtype=torch.float64)


def test_every_part_of_a_pipeline_is_looked_at_and_given_parts_are_left_alone():
    both = {"default": torch.bfloat16, "vae": torch.float32}
    parts = load_in_dtype(Pipeline.from_pretrained, "folder", dtype=both).components
    assert (parts["unet"].layer.weight.dtype, parts["vae"].layer.weight.dtype) == (torch.bfloat16, torch.float32)
    given = Network(torch.float32)
    assert load_in_dtype(Pipeline.from_pretrained, "folder", dtype=torch.float16, vae=given).components["vae"] is given
    with pytest.raises(UserError, match="vae was loaded in float16 instead of float32"):
        load_in_dtype(lambda folder, dtype: Pipeline(Network(torch.bfloat16), Network(torch.float16)), "x", dtype=both)


def test_no_other_line_of_the_project_chooses_a_dtype_while_loading():
    loaders, found = ("from_pretrained", "from_single_file", "from_config"), []
    for place in ("diffusion_align", "pipelines", "rewards", "scripts"):
        for file in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in loaders:
                    named = {keyword.arg for keyword in node.keywords}
                    found += [f"{file.name}:{node.lineno}"] if named & {"dtype", "torch_dtype"} else []
    assert not found
