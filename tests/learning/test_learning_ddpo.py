"""Reinforcement learning improves what it is told to, and worsens it when the sign is turned. Run with -m slow."""

from pathlib import Path

import pytest

from diffusion_align.pipelines.compare import compare_models
from diffusion_align.pipelines.configuration import read_config
from diffusion_align.pipelines.run import run
from diffusion_align.report import read_metrics

PROMPTS = ["a lion", "a panda", "a red apple", "a pizza", "a rocket", "a guitar", "a crab", "an umbrella"]


def train(folder: Path, *overrides: str, recipe: str = "ddpo_emoji_jpeg") -> list[dict]:
    settings = [f"output_dir={folder}", "epochs=12", "grid_every=0", f"prompts={PROMPTS}", "mixed_precision=no"]
    run(read_config(recipe, [*settings, *overrides]))
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "sign"),
    [
        ("ddpo_emoji_jpeg", 1),
        ("ddpo_emoji_jpeg", -1),
        ("flow_emoji_jpeg", 1),
        ("flow_emoji_jpeg", -1),
        ("flow_emoji_window", 1),
        ("nft_emoji_jpeg", 1),
        ("nft_emoji_jpeg", -1),
    ],
)
def test_jpeg_size_follows_the_reward_and_its_sign(tmp_path: Path, recipe: str, sign: int) -> None:
    epochs = 8 if recipe.startswith("nft") else 12
    train(tmp_path / "run", f"reward={{name: jpeg_compressibility, scale: {sign}}}", f"epochs={epochs}", recipe=recipe)
    model = read_config(recipe, []).model
    judged = compare_models(model, str(tmp_path / "run"), PROMPTS * 4, "jpeg_compressibility")
    assert sign * (judged.mean_second - judged.mean_first) > 0.2  # kB, of about 2.7


@pytest.mark.slow
def test_a_large_kl_coefficient_holds_the_policy_at_the_reference(tmp_path: Path) -> None:
    free = train(tmp_path / "free", "epochs=6")
    held = train(tmp_path / "held", "epochs=6", "kl_coef=1000")
    last = [[row["kl"] for row in rows if row["epoch"] == 6 and "kl" in row] for rows in (free, held)]
    assert sum(last[1]) / len(last[1]) < 0.1 * sum(last[0]) / len(last[0])
