"""Weights come in the dtype that is required; without a connection from the cache, at once and without a word."""

import ast
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import nn

import diffusion_align.pretrained as pretrained
from diffusion_align.errors import UserError
from diffusion_align.pretrained import hub_or_cache, load_in_dtype

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


@pytest.fixture
def asked(monkeypatch):
    """``asked(head)``: the Hub's client is ``head``; the list of what it was asked for."""
    monkeypatch.setattr(pretrained, "_answer", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)

    def prepare(head):
        calls = []

        class Session:
            def head(self, url, timeout):
                calls.append((url, timeout))
                return head()

        monkeypatch.setattr(huggingface_hub, "get_session", Session)
        return calls

    return prepare


def unreachable():
    raise OSError("[Errno -2] Name or service not known")


def test_out_of_reach_it_is_off_line_within_and_asked_once(asked):
    calls = asked(unreachable)
    for _ in range(2):
        with hub_or_cache("some/model"):
            assert constants.HF_HUB_OFFLINE
            with hub_or_cache("another/model"):
                assert constants.HF_HUB_OFFLINE
        assert not constants.HF_HUB_OFFLINE
    with pytest.raises(ValueError, match="mine"), hub_or_cache():
        raise ValueError("mine")
    assert not constants.HF_HUB_OFFLINE
    assert calls == [(constants.ENDPOINT, pretrained.SECONDS)]


def test_a_connection_that_came_back_is_noticed(asked, monkeypatch):
    asked(unreachable)
    with hub_or_cache("some/model"):
        assert constants.HF_HUB_OFFLINE
    calls = asked(lambda: "any answer, an error's too")
    monkeypatch.setattr(pretrained, "LASTS", 0.0)
    with hub_or_cache("some/model"):
        assert not constants.HF_HUB_OFFLINE
    assert len(calls) == 1


def test_no_answer_is_waited_for_in_vain_no_longer_than_said(asked, monkeypatch):
    release = threading.Event()
    asked(lambda: release.wait(20))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    start = time.monotonic()
    with hub_or_cache("some/model"):
        assert constants.HF_HUB_OFFLINE
    assert time.monotonic() - start < 3
    release.set()


def test_nobody_is_asked_about_what_is_here_or_when_off_line_anyway(asked, tmp_path, monkeypatch):
    calls = asked(unreachable)
    with hub_or_cache(tmp_path, str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub_or_cache("some/model"):
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
    assert calls == []


@pytest.mark.parametrize("what", ["image", "text", "clip", "weights", "judge", "tokenizer", "prompts"])
def test_an_uncached_id_is_one_sentence_at_once(asked, capfd, what):
    from diffusion_align.data.prompts import load_prompts
    from diffusion_align.models.image_pipelines import load_pipeline
    from diffusion_align.models.language_models import load_language_model
    from diffusion_align.rewards.image.clip import load_clip
    from diffusion_align.rewards.networks import load_network, load_tokenizer, weights_file

    calls = asked(unreachable)
    load = {
        "image": lambda: load_pipeline("no/such"),
        "text": lambda: load_language_model("no/such"),
        "clip": lambda: load_clip("no/such", device="cpu"),
        "weights": lambda: weights_file(None, "no/such", "model.pt"),
        "judge": lambda: load_network("AutoModel", "no/such", dtype="float32", device="cpu"),
        "tokenizer": lambda: load_tokenizer("no/such"),
        "prompts": lambda: load_prompts("no/such"),
    }[what]
    with pytest.raises(Exception, match="no/such") as caught:  # of several kinds, each of them printed as a sentence
        load()
    assert type(caught.value).__name__ in ("UserError", "RewardError", "ConfigError")
    assert "\n" not in str(caught.value)
    assert len(calls) == 1
    assert "Retrying" not in "".join(capfd.readouterr())
