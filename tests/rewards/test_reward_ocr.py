"""OCR of drawn text, what counts as the target, and the score's arithmetic."""

import functools
import logging
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from diffusion_align.rewards import RewardError, build_reward, call_reward, check_reward
from diffusion_align.rewards.image import ocr as module
from diffusion_align.rewards.image.ocr import edit_distance, target_text, text_score
from tests.helpers.rewarding import refusal


def drawn(text, *, size=256, font_size=40):
    """(3, size, size) in [0, 1]: black on white, in the middle."""
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).text(
        (size / 2, size / 2), text, fill="black", anchor="mm", font=ImageFont.load_default(size=font_size)
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def reward():
    return build_reward({"name": "ocr", "min_side": 256})


def score(reward, images, prompts, metadata=None):
    return call_reward(reward, torch.stack(images), prompts, metadata or [{}] * len(images)).tolist()


def test_what_is_drawn_is_read(reward):
    images = [drawn("HELLO"), drawn("HELLO"), drawn("HELLO"), drawn("HELLO")]
    prompts = ['a sign "HELLO"', 'a sign "hello"', 'a sign "HELPO"', 'a sign "QUIZ"']
    assert score(reward, images, prompts) == pytest.approx([1, 1, 0.8, 0])


def test_several_words_and_lines(reward):
    images = [drawn("GOOD DAY"), drawn("GOOD\nDAY"), drawn("GOOD")]
    assert score(reward, images, ['"GOOD DAY"', '"GOOD" above "DAY"', '"GOOD DAY"']) == pytest.approx([1, 1, 4 / 7])


def test_images_as_small_as_emoji_sd_draws_are_read(reward):
    assert score(reward, [drawn("HELLO", size=64, font_size=16)], ['"HELLO"']) == [1]


def test_text_upside_down_is_not_turned_round(reward):
    upright = drawn("A quiz at nine", font_size=30)
    straight, turned = score(reward, [upright, upright.flip(1, 2)], ['"A quiz at nine"'] * 2)
    assert straight == 1
    assert turned < 0.8


def test_nothing_to_read_scores_0(reward):
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = [torch.ones(3, 64, 64), torch.zeros(3, 64, 64), torch.full((3, 64, 64), 0.5), noise]
    assert score(reward, images, ['"HELLO"'] * 4) == [0] * 4
    assert score(reward, [torch.ones(3, 8, 8)], ['"HELLO"']) == [0]


def test_extra_text_counts_unless_it_is_ignored(reward):
    images, prompts = [drawn("HELLO YOU"), drawn("HELPO")], ['"HELLO"'] * 2
    assert score(reward, images, prompts) == pytest.approx([0.4, 0.8])
    ignoring = build_reward({"name": "ocr", "min_side": 256, "extra_text": "ignore"})
    assert score(ignoring, images, prompts) == pytest.approx([1, 0.8])


def test_metadata_comes_before_the_prompt(reward):
    assert score(reward, [drawn("HELLO")] * 2, ['"HELLO"', "no marks"], [{"text": "QUIZ"}, {"text": "HELLO"}]) == [0, 1]


def test_a_second_call_and_half_precision_change_nothing(reward):
    image = drawn("HELLO")
    assert reward.read(np.ascontiguousarray((image * 255).byte().permute(1, 2, 0))) == "HELLO"
    images = [image, image]
    assert score(reward, images, ['"HELPO"'] * 2) == score(reward, images, ['"HELPO"'] * 2) == pytest.approx([0.8] * 2)
    assert score(reward, [image.bfloat16()], ['"HELPO"']) == pytest.approx([0.8])


def test_colours_are_clipped_and_in_the_order_that_the_engine_takes(reward, monkeypatch):
    seen = []

    def engine(image):
        seen.append(image)
        return type("Found", (), {"txts": None})

    monkeypatch.setattr(module, "load_engine", lambda **options: engine)
    score(build_reward("ocr"), [torch.tensor([1.4, 0.5, -0.4])[:, None, None].expand(3, 8, 8)], ['"A"'])
    assert seen[0].dtype == np.uint8
    assert seen[0].flags["C_CONTIGUOUS"]
    assert seen[0][0, 0].tolist() == [0, 128, 255]  # BGR


def test_the_engine_is_made_once_when_first_needed_and_serves_worker_threads(reward, monkeypatch):
    made = []
    load = module.load_engine
    monkeypatch.setattr(module, "load_engine", lambda **options: made.append(options) or load(**options))
    lazy = build_reward({"name": "ocr", "min_side": 256})
    assert not made
    words = ["ONE", "TWO", "SIX", "TEN"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda word: score(lazy, [drawn(word)], [f'"{word}"']), words))
    assert found == [[1]] * 4
    assert made == [{"min_side": 256, "num_threads": 1}]


def test_it_is_quiet_uses_one_thread_and_no_network(monkeypatch, capfd, caplog):
    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(logging.getLogger("RapidOCR"), "handlers", [caplog.handler])
    fresh = build_reward({"name": "ocr", "min_side": 64})
    assert score(fresh, [drawn("HELLO"), torch.ones(3, 256, 256)], ['"HELLO"'] * 2) == [1, 0]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    for part in (fresh._engine.text_det, fresh._engine.text_rec):
        options = part.session.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "Open late"', "Open late"),
        ("a sign that says 'Open late'", "Open late"),
        ("a sign that says “Open late”", "Open late"),
        ("a sign that says ‘Open late’", "Open late"),
        ("ein Schild „Guten Tag“, ‚dort‘", "Guten Tag"),
        ("un panneau «Bonjour»", "Bonjour"),
        ("写着“你好”的牌子", "你好"),
        ("it's Joe's sign: 'Don't stop'", "Don't stop"),
        ("the dogs’ bowl: ‘Don’t bark’", "Don’t bark"),
        ("the dogs' bowl says 'Rex', the cats' 'Tom'", "Rex Tom"),
        ("'tis \"Rock 'n' Roll\"", "Rock 'n' Roll"),
        ('"A" and "B" and “C”', "A B C"),
        ('a 5" pipe with "HELLO"', "HELLO"),
        ('"" and " " and "B"', "B"),
    ],
)
def test_the_target_is_what_is_quoted(prompt, target):
    assert target_text(prompt, {}) == target
    assert target_text(prompt, {"text": "other"}) == "other"
    assert target_text(prompt, {"text": None}) == target


@pytest.mark.parametrize(
    "prompt", ["a red apple", "", "it's the dogs' bowl", '""', '"  "', 'a 5" pipe', "don’t, can’t"]
)
def test_a_prompt_without_a_text_is_one_sentence_before_anything_is_read(prompt, monkeypatch):
    monkeypatch.setattr(module, "load_engine", None)
    said = refusal(check_reward, build_reward("ocr"), image_size=64, prompts=['"A"', prompt])
    assert f"{prompt!r} names no text: put it in quotation marks" in said


@pytest.mark.parametrize("text", ["", " ", 3, ["A"]])
def test_metadata_without_a_text_is_refused(text):
    with pytest.raises(RewardError, match="the metadata 'text' of prompt '\"A\"' is"):
        target_text('"A"', {"text": text})


@pytest.mark.parametrize(
    ("found", "target", "counted", "ignored"),
    [
        ("Hello World", "helloworld", 1, 1),
        ("STRASSE", "Straße", 1, 1),
        ("ＯＫ！ don't", "OK! don’t", 1, 1),
        ("xxHELLOxx", "HELLO", 0.2, 1),
        ("HELXO", "HELLO", 0.8, 0.8),
        ("", "HELLO", 0, 0),
        ("a long text that has nothing to do with it", "HELLO", 0, 0),
    ],
)
def test_scores_by_hand(found, target, counted, ignored):
    assert text_score(found, target) == pytest.approx(counted)
    assert text_score(found, target, extra_text="ignore") == pytest.approx(ignored)


@settings(deadline=None, max_examples=100)
@given(st.text("ab c", max_size=7), st.text("ab c", max_size=7))
def test_edit_distance_is_the_recursion(a, b):
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        change = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, change)

    assert edit_distance(a, b) == edit_distance(b, a) == distance(len(a), len(b))


def test_every_prompt_is_looked_at_before_anything_is_drawn(reward):
    prompts = ['a sign that says "STOP"'] * 3 + ["a sign without"]
    for whole in (reward, build_reward([reward, {"name": "ocr", "scale": 2.0}])):
        with pytest.raises(RewardError, match="prompt 'a sign without' names no text"):
            check_reward(whole, image_size=32, prompts=prompts)
    assert len(check_reward(reward, image_size=32)) == 3
