"""A beta for each prompt: what the network sees, what trains it, and where its weights are kept."""

import pytest
import torch
from safetensors.torch import load_file

from diffusion_align.data.text_rows import PreferenceRow
from diffusion_align.estimators import dpo_loss
from diffusion_align.llm.dpo import DPOConfig, DPOTrainer
from diffusion_align.llm.dynamic_beta import DynamicBeta, DynamicBetaConfig, prompt_features
from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig, pack
from tests.helpers.hard_runs import rows_of
from tests.helpers.oracles import F64
from tests.helpers.problems import assert_problem
from tests.helpers.text_trainers import estimated, preference_trainer, problems_of

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20], [4, 4]]
CHOSEN = [[30, 31, 3], [14, 3], [21, 22, 23, 3], [35, 3]]
REJECTED = [[12, 3], [21, 22, 23, 24, 25, 3], [9, 9, 9, 3], [36, 3]]
ROWS = [PreferenceRow("x", p, w, [r]) for p, w, r in zip(PROMPTS, CHOSEN, REJECTED)]


@pytest.fixture
def make(make_language_policy, tmp_path):
    def build(policy=None, *, beta=None, folder=tmp_path, **settings):
        settings = {"dynamic_beta": beta or {}, "updates_per_epoch": 2} | settings
        policy = policy or make_language_policy(noise=0.1, dtype=F64)
        trainer = preference_trainer(DPOTrainer, policy, folder, ROWS, **settings)
        if trainer.policy.model.dtype == F64:
            trainer.dynamic_beta.network.double()
        return trainer

    return build


def moved(trainer, seed=0):
    """The network away from its beginning, where beta is the same for every prompt."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.dynamic_beta.trainable.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return trainer


def network_gradient(value, trainer):
    parameters = list(trainer.dynamic_beta.trainable.values())
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found)])


ALL = torch.arange(4)
NO_PENALTY = {"range_weight": 0.0, "smoothness_weight": 0.0, "entropy_weight": 0.0}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_features_are_the_references_at_the_last_token_of_the_prompt(make, make_language_policy, family):
    trainer = make(make_language_policy(family, noise=0.2, dtype=F64, temperature=0.7), sample_batch_size=2)
    batch, policy = estimated(trainer)[0], trainer.policy
    for i, start in enumerate(batch.sequences.starts[batch.chosen].tolist()):
        prompt = batch.sequences.ids[batch.chosen[i], :start][None]
        with torch.no_grad(), policy.reference():
            output = policy.model(prompt, output_hidden_states=True)
        logp = (output.logits[0, -1] / 0.7).log_softmax(-1)
        torch.testing.assert_close(batch.embeddings[i], output.hidden_states[-1][0, -1], atol=1e-10, rtol=0)
        torch.testing.assert_close(batch.entropy[i], -(logp.exp() * logp).sum(), atol=1e-10, rtol=0)


def test_features_do_not_depend_on_the_completions_or_the_batch(make_language_policy):
    policy = make_language_policy(dtype=F64)
    one = prompt_features(policy, pack(PROMPTS, CHOSEN, pad=policy.pad))
    other = prompt_features(policy, pack(PROMPTS, REJECTED, pad=policy.pad))
    alone = [prompt_features(policy, pack([p], [c], pad=policy.pad)) for p, c in zip(PROMPTS, CHOSEN)]
    for a, b, c in zip(one, other, zip(*alone)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
        torch.testing.assert_close(a, torch.cat(c), atol=1e-12, rtol=0)


def test_another_reference_may_have_another_size(make, tiny_lm, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=64, n_embd=16, n_layer=1, n_head=2, eos_token_id=3))
    trainer = make(LanguagePolicy(tiny_lm(), tokenizer, lora=LoRAConfig(rank=2), reference=small))
    batch = estimated(trainer)[0]
    assert batch.embeddings.shape == (4, 16)
    assert trainer.loss(batch, ALL, ALL * 0)[0].isfinite().all()


def test_before_training_it_is_dpo_with_beta_and_its_penalties(make):
    trainer = make(beta=NO_PENALTY | {"range_weight": 2.0, "entropy_weight": 0.5, "alpha": 0.2, "beta_max": 0.05})
    batch = estimated(trainer)[0]
    losses, statistics = trainer.loss(batch, ALL, ALL * 0)
    preference = statistics["loss/preference"]
    gap = (statistics["rewards/margins"] / 0.1).detach()
    torch.testing.assert_close(preference, dpo_loss(gap, torch.zeros_like(gap), 0.1), atol=1e-8, rtol=0)
    penalty = 2.0 * (0.1 - 0.05) + 0.5 * (0.1 - 0.2 * batch.entropy.double()).square()
    torch.testing.assert_close(losses - preference, penalty, atol=1e-8, rtol=0)
    torch.testing.assert_close(statistics["loss/beta"], penalty, atol=1e-8, rtol=0)


@pytest.mark.parametrize("convention", ["product", "inverse"])
def test_every_prompt_has_its_own_beta(make, convention):
    trainer = moved(make(beta={"convention": convention}))
    batch = estimated(trainer)[0]
    _, statistics = trainer.loss(batch, ALL, ALL * 0)
    beta = trainer.dynamic_beta.network(batch.embeddings).detach()
    assert beta.max() > 1.1 * beta.min()
    factor = beta if convention == "product" else 1 / beta
    gap = statistics["rewards/margins"] / factor
    expected = dpo_loss(gap, torch.zeros_like(gap), factor)
    torch.testing.assert_close(statistics["loss/preference"], expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(statistics["beta/mean"], beta)
    assert statistics["beta/min"].min() == beta.min()
    assert statistics["beta/max"].max() == beta.max()


def test_detached_the_preference_loss_gives_the_network_nothing(make):
    detached = moved(make(beta=NO_PENALTY | {"range_weight": 1.0, "beta_min": 0.0, "beta_max": 1e9}))
    attached = moved(make(detached.policy, beta=NO_PENALTY | {"detach": False}))
    for trainer, expected in ((detached, False), (attached, True)):
        losses, _ = trainer.loss(estimated(trainer)[0], ALL, ALL * 0)
        found = network_gradient(losses.sum(), trainer)
        assert bool((found.abs() > 1e-8).any()) == expected, expected
        policy = list(trainer.policy.trainable.values())
        grads = torch.autograd.grad(losses.sum(), policy, allow_unused=True)
        assert max(g.abs().max() for g in grads if g is not None) > 1e-4


@pytest.mark.parametrize(
    "weights",
    [
        {"range_weight": 1.5, "beta_max": 0.02},
        {"smoothness_weight": 1.5},
        {"entropy_weight": 1.5, "alpha": 0.3},
    ],
)
def test_each_penalty_trains_the_network_alone(make, weights):
    """Its gradient, against differences of the penalty; the policy gets none of it."""
    trainer = moved(make(beta=NO_PENALTY | weights))
    batch = estimated(trainer)[0]

    def penalty():
        losses, statistics = trainer.loss(batch, ALL, ALL * 0)
        return (losses - trainer.loss(batch, ALL, ALL * 0)[1]["loss/preference"]).sum(), statistics

    value, _ = penalty()
    found = network_gradient(value, trainer)
    assert found.abs().max() > 1e-5
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in trainer.dynamic_beta.trainable.values()]

    def shifted(size):
        with torch.no_grad():
            for parameter, d in zip(trainer.dynamic_beta.trainable.values(), direction):
                parameter.add_(size * d)
        return penalty()[1]["loss/beta"].sum().item()

    step = 1e-5
    slope = (shifted(step) - shifted(-2 * step)) / (2 * step)
    expected = (found * torch.cat([d.flatten() for d in direction])).sum().item()
    assert slope == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_every_process_starts_with_the_same_network_and_draws_nothing():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    nets = [DynamicBeta(DynamicBetaConfig(), dimensions=8, beta=0.1, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (torch.cat([p.flatten() for p in net.trainable.values()]) for net in nets)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert all(name.startswith("beta_network.") for name in nets[0].trainable)


def test_checkpoints_hold_the_network_and_final_does_not(make, make_language_policy, tmp_path):
    """A resumed run equals an uninterrupted one; beta comes nearer to alpha times the entropy."""
    beta = {"alpha": 0.3, "smoothness_weight": 0.01, "beta_max": 2.0}

    def run(folder, epochs, **more):
        settings = {"beta": beta, "folder": tmp_path / folder, "checkpoint_every": 1, "learning_rate": 2e-2}
        trainer = make(make_language_policy(), epochs=epochs, **settings, **more)
        trainer.train()
        return trainer

    run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume=True)
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    newest = sorted((tmp_path / "whole" / "checkpoints").glob("step_*"))[-1]
    saved = load_file(newest / "trained.safetensors")
    for name, parameter in resumed.dynamic_beta.trainable.items():
        assert torch.equal(saved[name], parameter)
    final = load_file(tmp_path / "whole" / "final" / "adapter_model.safetensors")
    assert not any("beta_network" in name for name in final)
    rows = [r for r in rows_of(tmp_path / "whole") if "beta/mean" in r]
    assert rows[0]["beta/mean"] == pytest.approx(0.1, abs=1e-4)
    assert rows[-1]["beta/mean"] > 0.2
    assert rows[-1]["loss/beta"] < 0.7 * rows[0]["loss/beta"]
    assert rows[-1]["beta/min"] <= rows[-1]["beta/mean"] <= rows[-1]["beta/max"]


def test_precomputed_features_are_the_live_ones(make, make_language_policy):
    live = make(make_language_policy(dtype=F64))
    kept = make(
        make_language_policy(dtype=F64, lora=None, needs_reference=False), precompute_ref_log_probs=True, epochs=2
    )
    mine, theirs = estimated(kept)[0], estimated(live)[0]
    torch.testing.assert_close(mine.embeddings, theirs.embeddings, atol=1e-12, rtol=0)
    torch.testing.assert_close(mine.entropy, theirs.entropy, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("settings", "name", "kind"),
    [
        (
            {"dynamic_beta": NO_PENALTY},
            "experimental.dynamic_beta.range_weight, smoothness_weight and entropy_weight",
            "all 0",
        ),
        ({"dynamic_beta": {}, "loss_type": "simpo"}, "loss_type=simpo", "leave experimental.dynamic_beta out"),
        ({"dynamic_beta": {"hiden": 3}}, "unknown setting 'experimental.dynamic_beta.hiden'", "did you mean 'hidden'"),
    ],
)
def test_settings_that_do_not_fit_are_one_sentence_each(settings, name, kind):
    assert_problem(*problems_of(DPOConfig, **settings), name, kind)
