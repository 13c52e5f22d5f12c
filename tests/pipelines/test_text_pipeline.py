"""TextAlignmentPipeline: load, align, write, score, save; and what plain transformers and peft make of the result."""

import json

import pytest
import torch

from diffusion_align.pipelines.text import TextAlignmentPipeline
from diffusion_align.rewards.base import RewardError
from diffusion_align.training.errors import ConfigError, UserError

SETTINGS = {
    "epochs": 2,
    "samples_per_epoch": 8,
    "sample_batch_size": 4,
    "micro_batch_size": 4,
    "updates_per_epoch": 2,
    "learning_rate": 0.01,
    "lora": {"rank": 2},
    "max_completion_length": 6,
    "grid_every": 0,
    "num_threads": 1,
}
PROMPTS = ["the cat", "a dog is"]
ONLINE = {"prompts": PROMPTS, "num_generations": 4}
PAIRS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " ran off"},
    {"prompt": "a dog", "chosen": " is here.", "rejected": " no"},
]
LABELS = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i == 0} for i, row in enumerate(PAIRS)]
TALKS = [[{"role": "user", "content": text}] for text in ("who?", "one and two", "a dog")]


def letters(completions, **columns):
    return [float(sum(map(ord, text)) % 17) for text in completions]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No report; and each test with an Accelerator of its own."""
    from accelerate.state import AcceleratorState

    from diffusion_align.llm import trainer

    monkeypatch.setattr(trainer, "write_report", lambda folder: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def load(tiny_language_model):
    return lambda: TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")


@pytest.fixture
def chat(tiny_chat_model):
    return TextAlignmentPipeline.from_pretrained(tiny_chat_model, device="cpu")


def plain(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(3, 23)[None]).logits


def assert_same_model(a, b, tolerance=1e-5):
    torch.testing.assert_close(logits(a), logits(b), atol=tolerance, rtol=0)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- training ----------------------------------------------------------------------------------------------------------

KINDS = {
    "grpo": ONLINE | {"method": "grpo", "reward": letters, "beta": 0.1},
    "ppo": ONLINE | {"method": "ppo", "reward": letters},
    "dpo": {"method": "dpo", "dataset": PAIRS, "dynamic_beta": {"hidden": 8}},
    "dpo, online": ONLINE | {"method": "dpo", "reward": letters},
    "kto": {"method": "kto", "dataset": LABELS},
    "grpo, all weights": ONLINE | {"method": "grpo", "reward": letters, "beta": 0.1, "lora": None},
    "dpo, all weights": {"method": "dpo", "dataset": PAIRS, "lora": None},
    "dpo, all weights, reference asked once": {
        "method": "dpo",
        "dataset": PAIRS,
        "lora": None,
        "precompute_ref_log_probs": True,
    },
    "grpo, average": ONLINE | {"method": "grpo", "reward": letters, "ema_decay": 0.5},
    "kto, all weights, average": {"method": "kto", "dataset": LABELS, "lora": None, "ema_decay": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_everyone_loads(load, tiny_language_model, tmp_path, kind):
    """In memory, from final/ with plain transformers (and peft), from the run folder and from save_pretrained."""
    from peft import PeftModel

    settings = SETTINGS | KINDS[kind]
    pipe = load()
    before = logits(pipe.model)
    assert pipe.align(output_dir=tmp_path / "run", **settings) is pipe
    assert (logits(pipe.model) - before).abs().max() > 1e-3, "nothing was learned"
    assert not any("lora" in name or "base_layer" in name for name in pipe.model.state_dict())
    final = tmp_path / "run" / "final"
    if settings["lora"]:
        assert_same_model(PeftModel.from_pretrained(plain(tiny_language_model), str(final)).eval(), pipe.model)
        assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            tiny_language_model
        )
    else:
        assert_same_model(plain(final), pipe.model)
    assert_same_model(TextAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu").model, pipe.model)
    pipe.save_pretrained(tmp_path / "saved")
    assert_same_model(plain(tmp_path / "saved"), pipe.model, tolerance=0)


def test_a_reward_in_trls_signature(load, tmp_path):
    """Texts, and the other columns of the data as lists; None where it has nothing to say."""
    seen = []

    def reward(prompts, completions, answer, **columns):
        seen.append((prompts, completions, answer, columns))
        return [None if one is None else float(len(text)) for text, one in zip(completions, answer)]

    data = [{"prompt": "the cat", "answer": "a", "n": 1}, {"prompt": "who?", "answer": None, "n": 2}]
    settings = SETTINGS | ONLINE | {"prompts": data}
    load().align("grpo", reward=[reward, letters], reward_weights=[1.0, 0.1], output_dir=tmp_path / "run", **settings)
    trained = [call for call in seen if "" not in call[1][:2]]
    assert trained
    for prompts, completions, answer, columns in trained:
        assert all(isinstance(text, str) for text in (*prompts, *completions))
        assert answer == [{"the cat": "a", "who?": None}[prompt] for prompt in prompts]
        assert columns == {"n": [{"the cat": 1, "who?": 2}[prompt] for prompt in prompts]}
    epochs = [row for row in rows(tmp_path / "run") if "reward" in row]
    assert all({"rewards/reward/mean", "rewards/letters/mean"} <= row.keys() for row in epochs)


def test_conversations_are_trained_on_and_judged_as_conversations(chat, tmp_path):
    seen = []

    def reward(prompts, completions):
        seen.extend(zip(prompts, completions))
        return [float(len(messages[0]["content"])) for messages in completions]

    settings = SETTINGS | {"num_generations": 4, "prompts": [{"prompt": talk} for talk in TALKS]}
    chat.align("grpo", reward=reward, output_dir=tmp_path / "run", **settings)
    assert all(prompt in TALKS for prompt, _ in seen)
    assert all([message["role"] for message in completion] == ["assistant"] for _, completion in seen)
    lines = (tmp_path / "run" / "samples" / "before_after.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["prompt"] == TALKS[0]


def test_a_reward_is_learned(load, tmp_path):
    """The share of one letter rises, by far more than chance; so the right sign reaches the weights."""

    def share(completions):
        return [text.count("e") / max(len(text), 1) for text in completions]

    pipe = load()
    settings = SETTINGS | ONLINE | {"epochs": 12, "samples_per_epoch": 32, "sample_batch_size": 32, "lora": {"rank": 8}}
    pipe.align("grpo", reward=share, output_dir=tmp_path / "run", **settings | {"num_generations": 16})
    rewards = [row["reward"] for row in rows(tmp_path / "run") if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    texts = pipe(PROMPTS * 16, max_new_tokens=6).texts
    assert sum(share(texts)) / 32 > 0.15


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_bf16_trains_and_says_how_far_the_ratio_is_off(load, tmp_path, lora):
    """Sampling and scoring round differently in bf16: that is logged, and small; weights stay float32."""
    pipe = load()
    settings = SETTINGS | ONLINE | {"lora": lora, "mixed_precision": "bf16", "reward": letters}
    pipe.align("grpo", output_dir=tmp_path / "run", **settings)
    found = [row["ratio/first_pass_deviation"] for row in rows(tmp_path / "run") if "ratio/first_pass_deviation" in row]
    assert len(found) == 2
    assert all(1e-5 < deviation < 0.3 for deviation in found)
    assert {p.dtype for p in pipe.model.parameters()} == {torch.float32}
    exact = load()
    exact.align("grpo", output_dir=tmp_path / "exact", **settings | {"mixed_precision": "no"})
    assert all(row.get("ratio/first_pass_deviation", 0) < 1e-4 for row in rows(tmp_path / "exact"))


def test_weights_of_half_width_are_trained_in_full(tiny_language_model, tmp_path):
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, dtype=torch.bfloat16, device="cpu")
    pipe.align("dpo", dataset=PAIRS, output_dir=tmp_path / "run", **SETTINGS)
    loss = [row["loss/preference"] for row in rows(tmp_path / "run") if "loss/preference" in row]
    assert loss[-1] < loss[0]
    assert pipe("the cat", max_new_tokens=3).texts


@pytest.mark.parametrize("second", [{"rank": 2}, None])
@pytest.mark.parametrize("first", [{"rank": 2}, None])
def test_aligning_twice_goes_on_from_the_first(load, tmp_path, first, second):
    """The second run's folder alone gives the model that both have made."""
    pipe = load()
    pipe.align("dpo", dataset=PAIRS, output_dir=tmp_path / "a", **SETTINGS | {"lora": first})
    once = logits(pipe.model)
    pipe.align("grpo", reward=letters, output_dir=tmp_path / "b", **SETTINGS | ONLINE | {"lora": second})
    assert (logits(pipe.model) - once).abs().max() > 1e-3
    assert_same_model(TextAlignmentPipeline.from_pretrained(tmp_path / "b", device="cpu").model, pipe.model)
    assert_same_model(TextAlignmentPipeline.from_pretrained(tmp_path / "b" / "final", device="cpu").model, pipe.model)
    fresh = TextAlignmentPipeline.from_pretrained(tmp_path / "a", device="cpu")
    torch.testing.assert_close(logits(fresh.model), once, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_a_run_that_fails_leaves_the_model_as_it_was(load, tmp_path, lora):
    """So the next one can begin, or go on with the run that failed, as if nothing had been."""
    calls = []

    def breaks(completions):
        calls.append(1)
        return [float(len(text)) if len(calls) < 5 else float("nan") for text in completions]

    pipe = load()
    before, names = logits(pipe.model), list(pipe.model.state_dict())
    settings = SETTINGS | ONLINE | {"lora": lora, "epochs": 4, "checkpoint_every": 1, "output_dir": tmp_path / "run"}
    with pytest.raises(RewardError, match="reward 'breaks' returned nan"):
        pipe.align("grpo", reward=breaks, **settings)
    assert torch.equal(logits(pipe.model), before)
    assert list(pipe.model.state_dict()) == names
    calls[:] = [1] * -100
    calls.clear()
    pipe.align("grpo", reward=lambda completions: [float(len(text)) for text in completions], **settings | RENAMED)
    assert_same_model(TextAlignmentPipeline.from_pretrained(tmp_path / "other", device="cpu").model, pipe.model)


RENAMED = {}
