"""Embeddings of captions on disk: the bits of encoding them again, made once, found again."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_align.diffusion import policy as policies
from diffusion_align.diffusion import prompt_files
from diffusion_align.diffusion.latent_cache import LatentCache
from diffusion_align.diffusion.prompt_files import PromptFiles
from diffusion_align.diffusion.settings import LoRAConfig
from diffusion_align.errors import Interrupted
from tests.diffusion.test_latent_cache import BARS, Alone

SIZES = [(16, 16), (8, 24)]
PROMPTS = [(f"{what} on {where}", size) for what in ("a cat", "a dog", "") for where in "abc" for size in SIZES]


class Processes(Alone):
    def from_main(self, value):
        return value


def encode(policy, prompts):
    return policy.encode(*zip(*prompts, strict=True))


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)


def count_passes(policy):
    """A list that grows with every pass of the first text encoder."""
    passes = []
    policy.pipeline.text_encoder.register_forward_hook(lambda *_: passes.append(1) and None)
    return passes


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_files_hold_the_bits_of_encoding_again(model, make_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "FILE", 7)
    monkeypatch.setattr(policies, "CACHED_PROMPTS", 4)
    policy = make_policy(model)
    passes = count_passes(policy)
    files = PromptFiles(tmp_path / "prompts", PROMPTS, ["model"])
    files.fill(policy, Processes(), BARS)
    assert len(list(files.folder.iterdir())) == 3
    mixed = [PROMPTS[i] for i in (17, 0, 5, 17, 3, 9)]
    plain = encode(policy, mixed)
    again = PromptFiles(tmp_path / "prompts", PROMPTS, ["model"])
    passes.clear()
    again.fill(policy, Processes(), BARS)
    policy.prompt_files = again
    assert_equal(encode(policy, mixed), plain)
    one_by_one = [encode(policy, [one]) for one in PROMPTS[::-1]]
    assert_equal(encode(policy, PROMPTS[::-1]), {name: torch.cat([one[name] for one in one_by_one]) for name in plain})
    assert passes == []
    assert len(encode(policy, [*PROMPTS, ("new", (16, 16))])[next(iter(plain))]) == 19
    assert len(passes) == 1


def test_what_was_interrupted_is_finished_and_what_is_damaged_made_again(make_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "FILE", 8)
    policy = make_policy("tiny_sd")
    files = PromptFiles(tmp_path / "prompts", PROMPTS, ["model"])
    with pytest.raises(Interrupted):
        files.fill(policy, Processes(rounds=1), BARS)
    assert [path.name for path in files.folder.iterdir()] == ["00000.safetensors"]
    encoded, method = [], policy.encode
    monkeypatch.setattr(policy, "encode", lambda *given: encoded.append(len(given[0])) or method(*given))
    files.fill(policy, Processes(), BARS)
    assert encoded == [8, 2]
    path = files.folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    files.fill(policy, Processes(), BARS)
    assert encoded == [8, 2, 8]
    PromptFiles(files.folder, [("other", (16, 16)), *PROMPTS[1:]], ["model"]).fill(policy, Processes(), BARS)
    assert encoded == [8, 2, 8, 8]
    PromptFiles(files.folder, PROMPTS, ["another model"]).fill(policy, Processes(), BARS)
    assert encoded[4:] == [8, 8, 2]


def test_they_take_half_of_the_free_disk_at_most(tmp_path, monkeypatch):
    files = PromptFiles(tmp_path / "prompts", PROMPTS, ["model"])
    like = {"text": torch.zeros(2, 10), "pooled": torch.zeros(2, 5, dtype=torch.bfloat16)}  # 50 bytes each
    for free, fits in ((1801, True), (1800, False)):
        monkeypatch.setattr(prompt_files.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert files.fits(like) == fits
    files.folder.mkdir()  # a run that is resumed: what it has written is not free
    files._path(0).write_bytes(bytes(900))
    monkeypatch.setattr(prompt_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=901))
    assert files.fits(like)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_more_captions_than_memory_keeps(text_encoder, make_policy, tmp_path, monkeypatch):
    """Few are kept in memory alone; of many, files are made unless text encoders are trained or it is not wanted."""
    policy = make_policy("tiny_sd", lora=LoRAConfig(rank=2, text_encoder=text_encoder))
    pairs = SimpleNamespace(prompts=[text for text, _ in PROMPTS], rows=list(range(18)))

    def fill(prompts):
        cache = LatentCache(tmp_path / "latents", pairs, policy, [size for _, size in PROMPTS], prompts=prompts)
        cache._fill_prompts(Processes(), BARS)

    fill(tmp_path / "prompts")
    monkeypatch.setattr(policies, "CACHED_PROMPTS", 17)
    fill(None)
    assert not (tmp_path / "prompts").exists()
    fill(tmp_path / "prompts")
    assert (tmp_path / "prompts").exists() == (policy.prompt_files is not None) == (not text_encoder)
