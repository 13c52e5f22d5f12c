"""Two models judged: what is drawn, who wins, and how far the win rate can be trusted."""

import math
import sys

import pytest
import torch
from PIL import Image

from diffusion_align.diffusion.schedule import SamplerConfig
from diffusion_align.errors import UserError
from diffusion_align.models.memory import split_decoding
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.pipelines.compare import (
    _summary,
    clustered_error,
    compare_models,
    effective_pairs,
    wilson_interval,
)
from diffusion_align.report import before_after
from diffusion_align.writing import WriteError

PROMPTS = ["a cat", "a red apple", "a rocket"]
FAST = SamplerConfig(steps=2, guidance_scale=1.0, eta=0.0)


@pytest.fixture
def calls(monkeypatch):
    """Models draw in two steps; "brighter" is emoji-sd with lighter images. The list holds (model, texts, seed)."""
    load, draw, made = ImageAlignmentPipeline.from_pretrained, ImageAlignmentPipeline.__call__, []

    def from_pretrained(model, **settings):
        pipeline = load("emoji-sd", **settings)
        pipeline.model, pipeline.sampler = model, FAST
        return pipeline

    def call(self, prompts, *, seed=0, **settings):
        made.append((self.model, list(prompts), seed))
        drawn = draw(self, prompts, seed=seed, **settings)
        if self.model == "brighter":
            drawn.images[:] = [Image.blend(image, Image.new("RGB", image.size, "white"), 0.1) for image in drawn.images]
        return drawn

    monkeypatch.setattr(ImageAlignmentPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(ImageAlignmentPipeline, "__call__", call)
    monkeypatch.setattr("diffusion_align.pipelines.compare.check_image_model", lambda model, **_: None)
    return made


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def test_a_model_against_itself_wins_half(calls, tmp_path):
    result = compare_models("emoji-sd", "emoji-sd", PROMPTS, brightness, seed=3, per_prompt=2)
    assert (result.win_rate, result.pairs, result.mean_difference, result.standard_error) == (0.5, 6, 0.0, 0.0)
    assert result.mean_first == result.mean_second
    assert result.low == pytest.approx(1 - result.high)


@pytest.mark.parametrize("tiles", [True, False])
def test_both_models_decode_in_tiles_where_b_does(calls, monkeypatch, tiles):
    """Tiles change images. A pipeline that is given is afterwards as it was."""
    first, second = (ImageAlignmentPipeline.from_pretrained("emoji-sd") for _ in range(2))
    split_decoding(first.pipeline.vae, slices=True, tiles=not tiles)
    split_decoding(second.pipeline.vae, slices=False, tiles=tiles)
    draw, used = ImageAlignmentPipeline.__call__, []

    def call(self, *given, **settings):
        used.append(self.pipeline.vae.use_tiling)
        return draw(self, *given, **settings)

    monkeypatch.setattr(ImageAlignmentPipeline, "__call__", call)
    compare_models(first, second, PROMPTS, brightness)
    assert used == [tiles] * len(used)
    assert len(used) >= 2
    assert [one.pipeline.vae.use_tiling for one in (first, second)] == [not tiles, tiles]
    assert [one.pipeline.vae.use_slicing for one in (first, second)] == [True, False]


def test_the_judge_gets_the_metadata(calls):
    def wanted(images, prompts, metadata):
        return [notes["wanted"] for notes in metadata]

    notes = [{"wanted": 1.0}, {"wanted": 2.0}, {"wanted": 6.0}]
    result = compare_models("emoji-sd", "emoji-sd", PROMPTS, wanted, metadata=notes, per_prompt=2)
    assert (result.mean_first, result.pairs) == (3.0, 6)
    with pytest.raises(UserError, match="prompts and metadata must be lists of the same length: got 3 and 1"):
        compare_models("emoji-sd", "emoji-sd", PROMPTS, wanted, metadata=notes[:1])


def test_the_better_model_wins_and_b_is_the_second(calls):
    result = compare_models("emoji-sd", "brighter", PROMPTS, brightness)
    assert result.win_rate == 1.0
    assert result.mean_difference == pytest.approx(result.mean_second - result.mean_first)
    assert result.mean_difference > 0.005
    assert result.high == pytest.approx(1.0)
    assert compare_models("brighter", "emoji-sd", PROMPTS, brightness).win_rate == 0.0


def test_both_models_draw_the_same_prompts_from_the_same_seeds(calls):
    progress = []
    compare_models("emoji-sd", "brighter", PROMPTS, brightness, seed=5, per_prompt=4, on_samples=progress.append)
    first, second = ([call[1:] for call in calls if call[0] == model] for model in ("emoji-sd", "brighter"))
    assert first == second
    texts = PROMPTS * 4
    assert first == [(texts[:8], 5), (texts[8:], 13)]
    assert progress == [8, 16, 20, 24]


def test_the_first_round_is_the_comparison_with_one_image_a_prompt(calls, tmp_path):
    drawn = []

    def remember(images, prompts, metadata):
        drawn.append((prompts[0], images.clone()))
        return brightness(images, prompts, metadata)

    one = compare_models("emoji-sd", "brighter", PROMPTS, remember, seed=2)
    single = list(drawn)
    drawn.clear()
    two = compare_models("emoji-sd", "brighter", PROMPTS, remember, seed=2, per_prompt=2)
    rounds = [drawn[:3], drawn[3:6], drawn[6:9], drawn[9:]]  # six by A, six by B
    for (text, image), (same_text, same) in zip(single, rounds[0] + rounds[2], strict=True):
        assert text == same_text
        torch.testing.assert_close(image, same, rtol=0, atol=2 / 255)  # other batches, other rounding
    assert all((a[1] - b[1]).abs().max() > 0.05 for a, b in zip(rounds[0], rounds[1], strict=True))
    assert (one.pairs, two.pairs) == (3, 6)


def test_the_same_arguments_give_the_same_result_and_the_same_image(calls, tmp_path):
    results = [
        compare_models("emoji-sd", "brighter", PROMPTS, brightness, per_prompt=2, output=tmp_path / name)
        for name in ("a.png", "b.png")
    ]
    assert results[0] == results[1]
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert results[0] != compare_models("emoji-sd", "brighter", PROMPTS, brightness, per_prompt=2, seed=1)


def test_at_most_24_pairs_are_shown(calls, tmp_path):
    compare_models("emoji-sd", "emoji-sd", ["a cat"], brightness, per_prompt=25, output=tmp_path / "grid.png")
    blank = [Image.new("RGB", (64, 64))] * 24
    wanted = before_after(blank, blank, captions=["a cat"] * 24, rewards_before=[0.0] * 24, rewards_after=[0.0] * 24)
    assert Image.open(tmp_path / "grid.png").height == wanted.height


def test_what_was_found_out_is_said_where_the_image_cannot_be_written(calls, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot be written") as caught:
        compare_models("emoji-sd", "emoji-sd", PROMPTS, brightness, output=tmp_path / "file" / "grid.png")
    assert caught.value.__notes__ == [str(compare_models("emoji-sd", "emoji-sd", PROMPTS, brightness))]


def test_bad_arguments(calls):
    with pytest.raises(UserError, match="prompts is empty"):
        compare_models("emoji-sd", "emoji-sd", [], brightness)
    with pytest.raises(UserError, match="per_prompt=0 must be at least 1"):
        compare_models("emoji-sd", "emoji-sd", PROMPTS, brightness, per_prompt=0)
    assert calls == []


def test_the_command_says_everything(calls, tmp_path, monkeypatch, capfd):
    from diffusion_align.cli import main

    monkeypatch.chdir(tmp_path)
    models = ["emoji-sd", "brighter", "--judge", "jpeg_compressibility"]
    arguments = ["compare", *models, "-p", "a cat", "-p", "a crab", "--per-prompt", "3", "-o", "grid.png"]
    monkeypatch.setattr(sys, "argv", ["diffusion-align", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capfd.readouterr()
    assert stop.value.code == 0, err
    assert err == ""
    assert len(out.splitlines()) == 1
    for part in ("B - A ", "(standard error ", " of 6 pairs (95 % interval ", "Wilson", "images in grid.png"):
        assert part in out
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    ("rate", "count", "low", "high"),
    [  # Newcombe 1998 (doi 10.1002/(SICI)1097-0258(19980430)17:8<857), table I, method 3
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_newcombes_table(rate, count, low, high):
    assert wilson_interval(rate, count) == pytest.approx((low, high), abs=6e-5)


def test_clustered_error_by_hand():
    """Equal clusters: the standard error of the cluster means 1, 2, 6; unequal ones: the sum written out."""
    values, clusters = [0.0, 2.0, 1.0, 3.0, 5.0, 7.0], list("aabbcc")
    assert clustered_error(values, clusters) == pytest.approx(math.sqrt(7 / 3))
    assert clustered_error(values, list("abcdef")) == pytest.approx(math.sqrt(34 / 5 / 6))
    assert clustered_error([1.0, 2.0, 6.0], list("aab")) == pytest.approx(math.sqrt(2 * (9 + 9)) / 3)
    assert math.isnan(clustered_error([1.0, 2.0], ["a", "a"]))
    assert clustered_error([1.0, 2.0, 6.0], list("abb")) != clustered_error([1.0, 2.0, 6.0], list("aab"))


@pytest.mark.parametrize(
    ("wins", "clusters", "worth"),
    [
        ([1, 1, 0, 0, 1, 1, 0, 0], "aabbccdd", 4),  # all of a prompt alike: 0.25 / (1 / 12) = 3, no fewer than prompts
        ([1, 0, 1, 0], "aabb", 4),  # prompts do not differ at all: every pair counts, and no more than there are
        ([1, 1, 1, 1], "aabb", 2),
        ([0, 0, 0, 0], "aabb", 2),
        ([1, 0, 1], "aaa", 1),
        ([1, 1, 1, 1, 1, 1, 0, 0], "aaaabbbb", 3),  # 3 / 16 over (1 / 4)^2
        ([0.5, 0.5, 0.5, 0.5], "aabb", 4),
        ([1, 1, 1, 1], "aaab", 1.6),
    ],
)
def test_what_repeated_prompts_are_worth(wins, clusters, worth):
    assert effective_pairs(wins, list(clusters)) == pytest.approx(worth)


def test_one_pair_a_prompt_is_wilsons_interval_of_the_pairs():
    first, second = torch.zeros(10).double(), torch.tensor([1.0] * 7 + [-1.0] * 3).double()
    result = _summary(first, second, [str(i) for i in range(10)])
    assert result.independent_pairs == 10
    assert (result.low, result.high) == wilson_interval(0.7, 10)


def test_pairs_of_one_prompt_widen_the_interval_and_the_error():
    first, second = torch.zeros(8).double(), torch.tensor([1.0, 1.0, 1.0, -1.0] * 2).double()
    result = _summary(first, second, list("abcd") * 2)
    assert result.independent_pairs == 4
    assert (result.low, result.high) == wilson_interval(0.75, 4)
    assert result.standard_error == pytest.approx(0.5)  # of the means 1, 1, 1, -1
    assert _summary(first, second, list("abcdefgh")).standard_error == pytest.approx(math.sqrt(6 / 7 / 8))


def test_the_interval_covers_the_rate_where_pairs_of_a_prompt_are_alike():
    """20 prompts of 8 pairs, rates beta(2, 2): 95 % of 500 intervals, give or take 3 standard errors of 1 %.

    Taking all 160 pairs for independent covers about 72 %.
    """
    random = torch.Generator().manual_seed(0)
    clusters = [str(i) for i in range(20)] * 8
    covered = naive = 0
    for _ in range(500):
        uniform = torch.rand(20, 3, generator=random).sort(dim=1).values
        rates = uniform[:, 1]  # the middle of three uniform numbers is beta(2, 2)
        wins = (torch.rand(8, 20, generator=random) < rates).double().flatten().tolist()
        rate = sum(wins) / len(wins)
        low, high = wilson_interval(rate, effective_pairs(wins, clusters))
        covered += low <= 0.5 <= high
        low, high = wilson_interval(rate, len(wins))
        naive += low <= 0.5 <= high
    assert 0.92 <= covered / 500 <= 0.98
    assert naive / 500 < 0.85
