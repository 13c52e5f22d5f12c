"""The scripts behind docs/text.md on runs that are written, not trained."""

import json
import statistics
from pathlib import Path

import experiments_text
import kl_forms
import pytest
import torch

from diffusion_align.pipelines.configuration import read_config


def test_the_held_out_reward_is_the_mean_over_all_completions_with_its_interval(tmp_path, monkeypatch):
    held_out = tmp_path / "sums.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": f"{i}: ", "answer": str(i)}) + "\n" for i in range(3)))
    recipe = {"model": "tiny-lm", "max_completion_length": 4, "reward": "exact_match"}
    monkeypatch.setattr(experiments_text, "load_yaml", lambda path: recipe)
    monkeypatch.setattr(experiments_text, "shipped_text_prompts", lambda: {"verses_heldout": held_out})
    seen = {}

    def score(self, prompts, texts, reward, **columns):
        seen.update(prompts=prompts, texts=texts, reward=reward, **columns)
        return torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])

    monkeypatch.setattr(experiments_text.TextAlignmentPipeline, "score", score)
    # Prompts have the means 1/2, 1 and 0, whose standard deviation is 1/2.
    assert experiments_text._held_out("kto_tiny", None, 2) == f"0.500 ± {1.96 * 0.5 / 3**0.5:.3f}"
    assert seen["prompts"] == ["0: ", "0: ", "1: ", "1: ", "2: ", "2: "]
    assert seen["answer"] == ["0", "0", "1", "1", "2", "2"]
    assert seen["reward"] == "exact_match"
    assert len(set(seen["texts"])) > 1
    assert all(1 <= len(text) <= 4 for text in seen["texts"])


def test_every_form_of_the_kl_is_trained_in_both_regimes_and_its_end_printed(tmp_path, monkeypatch, capsys):
    asked = {}

    def train(folder: Path, recipe: str, overrides: list[str]) -> Path:
        asked[folder.name] = overrides
        folder.mkdir()
        rows = [{"step": i, "epoch": i, "reward": i / 10, "kl_path": 2.0 * i} for i in range(1, 8)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    monkeypatch.setattr(kl_forms, "train", train)
    kl_forms.main(runs=tmp_path, epochs=7, beta=0.5, draw=False)
    for regime, passes in (("on-policy", (1, 1, 7)), ("off-policy", (2, 4, 3))):
        trained = {}
        for form in kl_forms.FORMS:
            overrides = asked.pop(kl_forms.folder_name(regime, form, 0))
            config = read_config("grpo_tiny", [*overrides, f"output_dir={tmp_path / 'new'}"])
            assert (config.updates_per_epoch, config.inner_epochs, config.epochs) == passes
            assert config.beta == (0 if form == "no KL" else 0.5)
            trained[form] = (config.beta, config.kl, config.kl_gradient)
        assert len(set(trained.values())) == len(kl_forms.FORMS)
        assert trained["k2 as the loss, weighed"] == (0.5, "k2_loss", "unbiased")
        assert trained["k3 as the loss"] == (0.5, "k3_loss", "direct")
    assert not asked
    lines = capsys.readouterr().out.splitlines()[1:]
    ends = [float(statistics.mean(range(3, 8))) * 2, statistics.mean(range(3, 8)) / 10]
    assert len(lines) == 18
    assert all([float(x) for x in line.split()[-2:]] == pytest.approx(ends) for line in lines)
