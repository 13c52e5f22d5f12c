"""Without a connection the Hub's files come from the cache, at once and without a word about it."""

import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

import diffusion_align.pretrained as hub
from diffusion_align.pretrained import hub_or_cache


@pytest.fixture
def asked(monkeypatch):
    """``asked(head)``: the Hub's client is ``head``; the list of what it was asked for."""
    monkeypatch.setattr(hub, "_answer", None)
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
    assert calls == [(constants.ENDPOINT, hub.SECONDS)]


def test_a_connection_that_came_back_is_noticed(asked, monkeypatch):
    asked(unreachable)
    with hub_or_cache("some/model"):
        assert constants.HF_HUB_OFFLINE
    calls = asked(lambda: "any answer, an error's too")
    monkeypatch.setattr(hub, "LASTS", 0.0)
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
