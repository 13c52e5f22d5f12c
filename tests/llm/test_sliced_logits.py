"""Log-probs and entropies from slices of the vocabulary: the same as from whole logits, in every trainer, and no tensor
has an entry for each token and each entry of the vocabulary."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_align.data.text_rows import LabelledRow, PreferenceRow
from diffusion_align.errors import UserError
from diffusion_align.llm import policy as policy_file
from diffusion_align.llm.dpo import DPOTrainer
from diffusion_align.llm.grpo import GRPOTrainer
from diffusion_align.llm.kto import KTOTrainer
from diffusion_align.llm.policy import LanguagePolicy, LoRAConfig, pack, plain_head
from diffusion_align.llm.ppo import PPOTrainer
from diffusion_align.llm.settings import SLICED_FROM, GRPOConfig
from tests.helpers.text_trainers import PROMPTS, estimated, online_trainer, preference_trainer, short
from tests.llm.test_families import FAMILIES, Tokens, model_of

PAIRS = [PreferenceRow(row.prompt, row.ids, [7, 8, 9 + i], [[10, 11]]) for i, row in enumerate(PROMPTS)]
LABELLED = [LabelledRow(row.prompt, row.ids, [7, 8, 9 + i], i % 2 == 0) for i, row in enumerate(PROMPTS)]
TRAINERS = {
    "grpo": (GRPOTrainer, {"kl_coef": 0.1}),
    "grpo, kl in the loss": (GRPOTrainer, {"kl_coef": 0.1, "kl": "k2_loss"}),
    "grpo, recomputed": (GRPOTrainer, {"logp_old": "recomputed"}),
    "ppo": (PPOTrainer, {}),
    "dpo": (DPOTrainer, {}),
    "simpo": (DPOTrainer, {"loss_type": "simpo"}),
    "kto": (KTOTrainer, {}),
}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(policy_file, "_SLICE", 7)


def make_trainer(kind, policy, folder, settings):
    if kind in (DPOTrainer, KTOTrainer):
        return preference_trainer(kind, policy, folder, PAIRS if kind is DPOTrainer else LABELLED, **settings)
    return online_trainer(kind, policy, folder, short, **settings)


class Largest(TorchDispatchMode):
    """The most rows of any (B, T, vocabulary) that an operation returns."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **kwargs or {})
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.ndim == 3 and x.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, x.numel() // self.vocabulary)
        return found


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_the_same_loss_and_gradient_without_whole_logits(make_language_policy, tmp_path, name):
    kind, settings = TRAINERS[name]
    found = {}
    for logits in ("whole", "sliced"):
        torch.manual_seed(0)
        policy = make_language_policy(noise=0.1, dtype=torch.float64, logits=logits)
        trainer = make_trainer(kind, policy, tmp_path / logits, settings)
        if kind is PPOTrainer:
            trainer.value_head.double()
        batch, plan, metrics = estimated(trainer)
        samples = plan.sample_indices[:5]
        with Largest(40) as seen:
            losses, statistics = trainer.loss(batch, samples, torch.zeros(5))
            gradients = torch.autograd.grad(losses.sum(), list(trainer.trainable.values()))
        assert (seen.rows > 5) == (logits == "whole")  # a row per scored token
        found[logits] = losses, *gradients, *statistics.values(), torch.tensor(list(metrics.values())[:1])
    assert any(g.abs().max() > 1e-4 for g in found["whole"][1:-1])
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_kl_over_the_whole_vocabulary_has_its_logits(make_language_policy, tmp_path):
    found = []
    for logits in ("whole", "sliced"):
        policy = make_language_policy(noise=0.1, dtype=torch.float64, logits=logits)
        settings = {"kl_coef": 0.1, "kl": "full_vocabulary"}
        trainer = make_trainer(GRPOTrainer, policy, tmp_path / logits, settings)
        batch, plan, _ = estimated(trainer)
        found.append(trainer.loss(batch, plan.sample_indices[:5], torch.zeros(5))[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["gpt2", "phi"])  # tied; with a bias
def test_heads_that_are_tied_or_have_a_bias(family, lora):
    options = {"n_embd": 32, "n_layer": 1, "n_head": 4} if family == "gpt2" else FAMILIES[family]
    found = []
    for logits in ("whole", "sliced"):
        model = model_of(family, options)
        if family == "phi":
            torch.nn.init.normal_(model.lm_head.bias)
        policy = LanguagePolicy(model.double(), Tokens(), lora=lora, temperature=0.7, logits=logits)
        policy.model.double()
        sequences = pack([[5, 6, 7], [20]], [[30, 31], [21, 22, 2]], pad=0)
        scored = policy.score(sequences, with_entropy=True)
        logp = policy.log_probs(scored)
        gradients = torch.autograd.grad(logp.square().sum(), list(policy.trainable.values()), allow_unused=True)
        found.append([logp, policy.entropy(scored), *(g for g in gradients if g is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_logits_that_a_model_caps_or_scales_are_whole(family):
    options = FAMILIES[family] | ({"logits_scaling": 2.0} if family == "granite" else {})
    model = model_of(family, options)
    assert plain_head(model) is None
    settings = {"lora": None, "needs_reference": False}
    with pytest.raises(UserError, match="so they cannot be sliced: use logits=auto or logits=whole"):
        LanguagePolicy(model, Tokens(), logits="sliced", **settings)
    policy = LanguagePolicy(model, Tokens(), **settings)
    assert policy.score(pack([[5, 6]], [[7, 8]], pad=0)).logits.shape == (1, 2, 64)


def test_an_adapter_or_a_hook_on_the_head_is_seen(tiny_lm):
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny_lm()
    assert plain_head(model) is model.lm_head
    assert "forward" not in vars(model.lm_head)
    hook = model.lm_head.register_forward_hook(lambda module, given, found: 2 * found)
    assert plain_head(model) is None
    hook.remove()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)
    assert plain_head(model) is None


def test_what_is_sliced_by_itself_is_decided_by_the_vocabulary(tiny_lm, make_language_policy):
    assert GRPOConfig.model_fields["logits"].default == "auto"
    assert 99 < SLICED_FROM <= 8192  # the embedded model's; the smallest that docs/text.md has figures of
    few = make_language_policy()
    assert few.score(pack([[5, 6]], [[7, 8]], pad=3)).logits.shape == (1, 2, 40)
    model = tiny_lm()
    model.resize_token_embeddings(SLICED_FROM)
    many = LanguagePolicy(model, few.tokenizer, lora=LoRAConfig(rank=2))
    scored = many.score(pack([[5, 6]], [[7, 8]], pad=3))
    assert scored.logits.shape == (1, 2, 0)
    with pytest.raises(ValueError, match=r"the entropy needs score\(..., with_entropy=True\)"):
        many.entropy(scored)
