"""Images and texts are trained by the same functions, and their formulas stand in ``estimators`` alone."""

import ast
import sys
from pathlib import Path

import pytest
import torch

from diffusion_align import estimators
from diffusion_align.estimators import diffusion_preference, kl, policy, preference

ROOT = Path(__file__).parent.parent
PREFERENCES = {"dpo_loss", "ipo_loss", "hinge_loss"}
IMAGES = ROOT / "diffusion_align" / "diffusion"
TEXTS = ROOT / "diffusion_align" / "llm"
# Operations that only a formula needs. Sigmoid is a weight that Diffusion-DPO logs.
FORMULAS = {"logsigmoid", "log_softmax", "softmax", "softplus", "logsumexp", "cross_entropy", "relu"}


def called_in(work):
    """The estimators' functions that run inside ``work()``, by name."""
    own = {
        function.__code__: name
        for module in (estimators, policy, kl, preference, diffusion_preference)
        for name, function in vars(module).items()
        if hasattr(function, "__code__") and function.__module__.startswith("diffusion_align.estimators")
    }
    seen = set()

    def look(frame, event, argument):
        if event == "call" and frame.f_code in own:
            seen.add(own[frame.f_code])

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


@pytest.fixture
def train(tmp_path, monkeypatch):
    """``train(**settings)``: what a run of one epoch calls, but for its report."""
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)

    def run_with(**settings):
        from diffusion_align.pipelines.configuration import check_config
        from diffusion_align.pipelines.run import run

        common = {"epochs": 1, "samples_per_epoch": 4, "sample_batch_size": 4, "grid_every": 0, "lora": {"rank": 2}}
        config = check_config(common | {"output_dir": tmp_path / settings["method"]} | settings)
        return called_in(lambda: run(config))

    return run_with


@pytest.fixture
def images(tiny_sd):
    sampling = {"prompts": ["a red apple"], "sampler": {"steps": 2, "guidance_scale": 1.0}, "group_size": 4}
    return {"model": str(tiny_sd), "reward": "jpeg_compressibility", **sampling}


@pytest.fixture
def texts():
    sampling = {"prompts": ["And he said"], "num_generations": 4, "max_completion_length": 8}
    return {"model": "tiny-lm", "reward": "length", **sampling}


def test_policy_gradients_share_ratio_surrogate_advantages_and_kl(train, images, texts):
    drawn = train(method="ddpo", advantages="group", kl="k1_reward", kl_coef=0.1, **images)
    written = train(method="grpo", beta=0.1, **texts)
    shared = {"importance_ratio", "clipped_ratio_loss", "clipped_ratios", "group_advantages", "kl_reward"}
    assert shared <= drawn & written
    assert {"gaussian_log_prob"} <= drawn - written
    assert {"token_log_probs", "categorical_log_probs"} <= written - drawn
    assert {"clipped_ratio_loss", "kl_reward", "gae", "value_loss"} <= train(method="ppo", kl_coef=0.1, **texts)


def test_preferences_share_their_loss(train, images, texts):
    drawn = train(method="diffusion_dpo", beta=0.1, **images)
    written = train(method="dpo", **texts)
    assert "dpo_loss" in drawn & written


def test_names_in_both_are_the_same_objects():
    """Whatever a trainer imports from the estimators is theirs, not a namesake."""
    from diffusion_align.diffusion import ddpo
    from diffusion_align.diffusion import dpo as diffusion_dpo
    from diffusion_align.llm import dpo, grpo, kto, ppo

    shared = 0
    for module in (ddpo, diffusion_dpo, grpo, ppo, dpo, kto):
        for name in set(vars(module)) & set(vars(estimators)):
            if callable(getattr(estimators, name)):
                assert getattr(module, name) is getattr(estimators, name), f"{module.__name__}.{name}"
                shared += 1
    assert shared > 20
    assert set(vars(dpo)) & set(vars(estimators)) >= PREFERENCES
    assert {"ipo_loss", "hinge_loss"} <= set(vars(diffusion_dpo))


def formulas_in(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        if name in FORMULAS:
            yield f"{path.name}:{node.lineno} {name}"


def defined_in(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_no_formula_stands_twice():
    outside = [
        path
        for folder in (IMAGES, TEXTS, ROOT / "diffusion_align" / "training", ROOT / "pipelines")
        for path in sorted(folder.rglob("*.py"))
    ]
    assert len(outside) > 30
    assert [found for path in outside for found in formulas_in(path)] == []
    public = {name for name, value in vars(estimators).items() if callable(value) and not name.startswith("_")}
    assert [f"{path.name}: {name}" for path in outside for name in defined_in(path) & public] == []
    inside = [found for path in (ROOT / "diffusion_align" / "estimators").glob("*.py") for found in formulas_in(path)]
    assert inside  # the search finds what it looks for


def test_both_kinds_of_action_give_one_loss():
    """The surrogate of one-dimensional Gaussians and of tokens with the same log-probs is the same number."""
    logp, logp_old = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.3, -1.8]).double()
    advantages = torch.tensor([1.0, -0.5]).double()
    std, logits = torch.ones(2).double(), torch.stack([logp, (-logp.expm1()).log()], 1)[:, None]
    distance = (2 * (-logp - 0.5 * torch.log(torch.tensor(2 * torch.pi).double()))).sqrt()
    drawn = estimators.gaussian_log_prob(distance[1:, None], torch.zeros(1, 1).double(), std[1:])
    written = estimators.token_log_probs(logits, torch.zeros(2, 1, dtype=torch.int64)).squeeze(1)
    torch.testing.assert_close(drawn, logp[1:])
    torch.testing.assert_close(written, logp)
    losses = [estimators.clipped_surrogate(x, logp_old[1:], advantages[1:], clip=0.2) for x in (drawn, written[1:])]
    torch.testing.assert_close(*losses)
