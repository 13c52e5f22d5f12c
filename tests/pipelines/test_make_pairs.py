"""Pairs drawn by a model: who is chosen, what is written, and that a stopped run ends like any other."""

import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_align.assets import asset_path
from diffusion_align.data.drawings import load_preferences
from diffusion_align.data.prompts import load_prompts
from diffusion_align.errors import ConfigError, Interrupted, UserError
from diffusion_align.folder_lock import FolderLock
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.pipelines.compare import compare_models
from diffusion_align.pipelines.pairs import ImageCandidates, PairsWritten, make_pairs
from diffusion_align.rewards import RewardError, build_reward
from tests.helpers.rows_on_disk import read_rows

PROMPTS = [("a cat", {}), ("a red apple", {"fruit": True}), ("a rocket", {}), ("a crab", {})]
FAST = {"steps": 2, "guidance_scale": 1.0}


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def undecided_about_apples(images, prompts, metadata):
    return torch.where(torch.tensor([bool(m.get("fruit")) for m in metadata]), 0.5, brightness(images, prompts, None))


def make(folder, prompts=PROMPTS, judge=brightness, *, sampling=FAST, **settings):
    candidates = ImageCandidates("emoji-sd", **sampling)
    return make_pairs(candidates, prompts, judge, folder, **{"per_prompt": 2, "seed": 10} | settings)


def rows(folder, name="pairs.jsonl"):
    return read_rows(folder / name)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four prompts, the second a tie, that nothing interrupted: what it returned and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "pairs"
    return make(folder, judge=undecided_about_apples), folder


@pytest.fixture
def cli(tmp_path, monkeypatch, call_cli):
    """``cli("pairs", ...)`` in a fresh folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return call_cli


def test_best_and_worst_of_a_prompts_images(tmp_path):
    """Every image is drawn again from its seed and scored: none beats the chosen, the rejected beats none."""
    written = make(tmp_path / "pairs", PROMPTS[:2], "jpeg_compressibility", per_prompt=5)
    pipeline, judge = ImageAlignmentPipeline.from_pretrained("emoji-sd"), build_reward("jpeg_compressibility")
    gaps = []
    for index, (row, (text, _)) in enumerate(zip(rows(tmp_path / "pairs"), PROMPTS[:2], strict=True)):
        seeds = range(10 + 5 * index, 15 + 5 * index)
        images = pipeline([text] * 5, seed=seeds[0], steps=2, guidance_scale=1.0).images
        scores = pipeline.score(images, [text] * 5, judge).tolist()
        assert len(set(scores)) > 2
        assert row["prompt"] == text
        assert row["score_chosen"] == max(scores) == scores[row["seed_chosen"] - seeds[0]]
        assert row["score_rejected"] == min(scores) == scores[row["seed_rejected"] - seeds[0]]
        for side in ("chosen", "rejected"):
            assert row[side] == f"images/{index:05d}_{side}.png"
            with Image.open(tmp_path / "pairs" / row[side]) as image:
                assert image.tobytes() == images[row[f"seed_{side}"] - seeds[0]].tobytes()
        gaps.append(row["score_chosen"] - row["score_rejected"])
    assert written == PairsWritten(2, 0, pytest.approx(sum(gaps) / 2))
    assert min(gaps) > 0


def test_a_prompt_whose_images_score_alike_gives_no_pair(whole):
    written, folder = whole
    assert (written.pairs, written.ties) == (3, 1)
    assert [row["prompt"] for row in rows(folder)] == ["a cat", "a rocket", "a crab"]
    assert rows(folder, "ties.jsonl") == [{"prompt": "a red apple", "score": 0.5, "seed": 12}]
    assert not (folder / "images/00001_chosen.png").exists()
    assert [row["chosen"][7:12] for row in rows(folder)] == ["00000", "00002", "00003"]


def test_nothing_but_ties(tmp_path):
    written = make(tmp_path / "pairs", judge=lambda images, prompts, metadata: [1.0] * len(images))
    assert (written.pairs, written.ties) == (0, 4)
    assert math.isnan(written.mean_gap)
    assert not (tmp_path / "pairs/pairs.jsonl").exists()


def test_the_first_of_equally_good_images_is_taken(tmp_path):
    make(tmp_path / "p", PROMPTS[:1], lambda images, *_: [0.0, 1.0, 1.0, 0.0], per_prompt=4)
    assert (rows(tmp_path / "p")[0]["seed_chosen"], rows(tmp_path / "p")[0]["seed_rejected"]) == (11, 10)


def test_the_judge_receives_the_metadata_of_the_prompt(tmp_path, cli):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "sign": 1}\n{"prompt": "a cat", "sign": -1}\n')
    (tmp_path / "judge.py").write_text(
        "def judge(images, prompts, metadata):\n"
        "    assert prompts == ['a cat'] * 3 and len(metadata) == 3\n"
        "    return [m['sign'] * (i + 1) for i, m in enumerate(metadata)]\n"
    )
    drawing = ["--per-prompt", 3, "--steps", 2, "--guidance-scale", 1]
    status, out, err = cli(
        "pairs", "emoji-sd", "--judge", "judge.py:judge", "--prompts", "p.jsonl", *drawing, "-o", "out"
    )
    assert (status, err) == (0, "")
    assert out == "2 pairs, 0 ties dropped, mean score gap 2; see out/pairs.jsonl\n"
    assert [(row["seed_chosen"], row["seed_rejected"]) for row in rows(tmp_path / "out")] == [(2, 0), (3, 5)]


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_an_interrupted_run_ends_like_any_other(whole, tmp_path, finished):
    def stop(done):
        if done == finished:
            raise KeyboardInterrupt

    with pytest.raises(
        Interrupted,
        match=r"pairs are in .*\nresume with: make_pairs\(\.\.\., output=" if finished else "nothing written",
    ):
        make(tmp_path / "pairs", judge=undecided_about_apples, on_prompt=stop)
    progress = []
    result = make(tmp_path / "pairs", judge=undecided_about_apples, resume=True, on_prompt=progress.append)
    assert result == whole[0]
    assert progress == list(range(finished, 5))
    assert content(tmp_path / "pairs") == content(whole[1])


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_cut_off_by_a_kill_is_drawn_again(whole, tmp_path, cut):
    folder = tmp_path / "pairs"
    make(folder, judge=undecided_about_apples)
    text = (folder / "pairs.jsonl").read_text()
    (folder / "pairs.jsonl").write_text(text[:-cut])
    (folder / "images/00003_chosen.png").unlink()
    (folder / "images/.00003_chosen.png.123.tmp").write_bytes(b"half")
    (folder / "pairs.png").unlink()
    assert make(folder, judge=undecided_about_apples, resume=True) == whole[0]
    assert content(folder) == content(whole[1])


def test_a_finished_run_resumed_draws_nothing(whole, monkeypatch):
    before = content(whole[1])
    monkeypatch.setattr(ImageAlignmentPipeline, "__call__", None)
    assert make(whole[1], judge=undecided_about_apples, resume=True) == whole[0]
    assert content(whole[1]) == before


def test_pairs_are_on_disk_before_the_next_prompt_is_drawn(tmp_path):
    def look(done):
        written = rows(tmp_path / "p") if done else []
        assert len(written) == done
        assert all((tmp_path / "p" / row[side]).is_file() for row in written for side in ("chosen", "rejected"))

    make(tmp_path / "p", PROMPTS[:3], on_prompt=look)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"seed": 11}, "was begun with seed=10, not seed=11"),
        ({"per_prompt": 3, "sampling": FAST | {"steps": 3}}, "per_prompt=2, steps=2, not per_prompt=3, steps=3"),
        ({"sampling": FAST | {"eta": 1.0}}, "was begun with eta=None, not eta=1.0"),
        ({"judge": brightness}, "was begun with judge='undecided_about_apples', not judge='brightness'"),
        ({"prompts": PROMPTS[:3]}, r"was begun with prompts='4 \(sha256 \w+\)', not prompts='3 "),
        ({"prompts": [(text, {}) for text, _ in PROMPTS]}, r"was begun with prompts='4 "),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(whole, change, wanted):
    before = content(whole[1])
    with pytest.raises(UserError, match=wanted):
        make(whole[1], **({"judge": undecided_about_apples, "resume": True} | change))
    assert content(whole[1]) == before


def test_a_judge_whose_code_was_changed_is_another_and_a_folder_in_use_is_refused(tmp_path):
    folder, file = tmp_path / "pairs", tmp_path / "judge.py"
    file.write_text("def f(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n")
    make(folder, PROMPTS[:1], f"{file}:f")
    before = file.read_text()
    file.write_text(before.replace("return ", "return -"))
    with pytest.raises(UserError, match=rf"was begun with other content of judge \({re.escape(str(file))}\)"):
        make(folder, PROMPTS[:1], f"{file}:f", resume=True)
    file.write_text(before)
    kept, half = content(folder), folder / ".pairs.png.1-0.tmp"
    half.write_bytes(b"what the process that holds the lock is writing")
    with FolderLock(folder), pytest.raises(UserError, match="is in use by process"):
        make(folder, PROMPTS[:1], f"{file}:f", resume=True)
    assert half.exists()
    make(folder, PROMPTS[:1], f"{file}:f", resume=True)
    assert content(folder) == kept


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_two_begun_on_one_folder_do_not_mix(whole, tmp_path, monkeypatch, there, resume):
    """The other one begins after this one has looked at the folder, and has ended before this one writes."""
    folder, load = tmp_path / "pairs", FolderLock.__enter__

    def others_first(lock):
        if not (folder / "pairs.jsonl").exists():
            shutil.copytree(whole[1], folder, dirs_exist_ok=True)
        return load(lock)

    monkeypatch.setattr(FolderLock, "__enter__", others_first)
    if there:
        folder.mkdir()
    wanted = "was begun with judge=.*prompts=" if there and resume else "is already used"
    with pytest.raises(UserError, match=wanted):
        make(folder, PROMPTS[:1], resume=resume)
    assert content(folder) == content(whole[1])


def test_a_judge_that_changes_the_folder_sends_nothing_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def goes(images, prompts, metadata):
        os.chdir(tmp_path / "elsewhere")
        return brightness(images, prompts, metadata)

    make("pairs", PROMPTS[:1], goes)
    monkeypatch.chdir(tmp_path)
    compare_models("emoji-sd", "emoji-sd", ["a cat"], goes, output=Path("compared.png"))
    assert {"pairs/pairs.png", "compared.png"} <= content(tmp_path).keys()
    assert not content(tmp_path / "elsewhere")


def test_a_damaged_folder_is_not_resumed(whole, tmp_path):
    folder = tmp_path / "pairs"
    make(folder, PROMPTS[:1])
    for damage in ('{"prompt": "a cat"}\n', "[]\n", "nothing\n"):
        (folder / "pairs.jsonl").write_text(damage)
        with pytest.raises(UserError, match=r"pairs\.jsonl.* fix (or remove )?it, or choose another"):
            make(folder, PROMPTS[:1], resume=True)
    (folder / "pairs_settings.yaml").unlink()
    with pytest.raises(UserError, match=r"has no pairs_settings\.yaml"):
        make(folder, PROMPTS[:1], resume=True)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [(lambda images, *_: [math.nan] * len(images), "nan for image 0"), (lambda *_: [1.0], "1 score for 2 images")],
)
def test_a_judge_that_fails_at_once_leaves_nothing(tmp_path, answer, wanted):
    with pytest.raises(RewardError, match=wanted):
        make(tmp_path / "p", judge=answer)
    assert not (tmp_path / "p").exists()


def test_all_wrong_settings_at_once():
    candidates = ImageCandidates("emoji-sx", steps=0, guidance_scale=math.nan, eta=2)
    with pytest.raises(ConfigError) as caught:
        make_pairs(candidates, [], "taste", "p", per_prompt=1, seed=-1)
    found = [problem.split("=")[0].split(" ")[0] for problem in caught.value.problems]
    assert found == ["prompts", "per_prompt", "seed", "steps", "guidance_scale", "eta", "model", "reward"]
    with pytest.raises(ConfigError, match="prompts: entry 1 is blank"):
        make("p", [("a cat", {}), (" ", {})])


def test_the_grid_holds_chosen_above_rejected(whole):
    with Image.open(whole[1] / "pairs.png") as grid, Image.open(whole[1] / "images/00000_chosen.png") as chosen:
        left = grid.width - 3 * (128 + 8)
        assert grid.crop((left, 8, left + 128, 136)).tobytes() == chosen.resize((128, 128), 3).tobytes()


def test_the_heldout_list_is_the_preferences_held_out_prompts():
    prompts = [text for text, _ in load_prompts("emoji_heldout")]
    assert prompts == [pair.prompt for pair in load_preferences("heldout")]
    assert len(set(prompts)) == 59
    assert not set(prompts) & {pair.prompt for pair in load_preferences("train")}
    assert (asset_path("emoji-prompts").parent / "emoji_heldout.txt").read_bytes().count(b"\n") == 59
