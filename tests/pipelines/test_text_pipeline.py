"""TextAlignmentPipeline: load, align, write, score, save; and what plain transformers and peft make of the result."""

import hashlib
import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion_align.assets import asset_path
from diffusion_align.errors import CheckpointError, ConfigError, UserError
from diffusion_align.models.lora import add_lora
from diffusion_align.pipelines.compare import judged_texts
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.run import run
from diffusion_align.pipelines.text import TextAlignmentPipeline
from diffusion_align.rewards.base import RewardError
from tests.helpers.hard_runs import rows_of
from tests.helpers.problems import problems

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


def assert_same_model(a, b, tolerance=5e-5):
    torch.testing.assert_close(logits(a), logits(b), atol=tolerance, rtol=0)


# -- training ----------------------------------------------------------------------------------------------------------

DPO = {"method": "dpo", "dataset": PAIRS}
KINDS = {
    "grpo": ONLINE | {"method": "grpo", "reward": letters, "beta": 0.1},
    "ppo": ONLINE | {"method": "ppo", "reward": letters},
    "dpo": DPO | {"dynamic_beta": {"hidden": 8}},
    "dpo, online": ONLINE | {"method": "dpo", "reward": letters},
    "kto": {"method": "kto", "dataset": LABELS},
    "grpo, all weights": ONLINE | {"method": "grpo", "reward": letters, "beta": 0.1, "lora": None},
    "dpo, all weights": DPO | {"lora": None},
    "dpo, all weights, reference asked once": DPO | {"lora": None, "precompute_ref_log_probs": True},
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
        adapter = json.loads((final / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(tiny_language_model)
    else:
        assert_same_model(plain(final), pipe.model)
    assert_same_model(TextAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu").model, pipe.model)
    pipe.save_pretrained(tmp_path / "saved")
    assert_same_model(plain(tmp_path / "saved"), pipe.model, tolerance=0)


def test_where_a_model_is_saved(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = load()
    pipe.save_pretrained("~/new/saved")
    assert_same_model(plain(tmp_path / "new" / "saved"), pipe.model, tolerance=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        pipe.save_pretrained("~/file")


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
    epochs = [row for row in rows_of(tmp_path / "run") if "reward" in row]
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
    rewards = [row["reward"] for row in rows_of(tmp_path / "run") if "reward" in row]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    texts = pipe(PROMPTS * 16, max_new_tokens=6).texts
    assert sum(share(texts)) / 32 > 0.1


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_bf16_trains_and_says_how_far_the_ratio_is_off(load, tmp_path, lora):
    """Sampling and scoring may round differently in bf16: how far is logged, and small; weights stay float32."""
    pipe = load()
    settings = SETTINGS | ONLINE | {"lora": lora, "mixed_precision": "bf16", "reward": letters}
    pipe.align("grpo", output_dir=tmp_path / "run", **settings)
    found = [
        row["ratio/first_pass_deviation"] for row in rows_of(tmp_path / "run") if "ratio/first_pass_deviation" in row
    ]
    assert len(found) == 2
    assert all(0 <= deviation < 0.3 for deviation in found)  # on some CPUs they round alike
    assert {p.dtype for p in pipe.model.parameters()} == {torch.float32}
    exact = load()
    exact.align("grpo", output_dir=tmp_path / "exact", **settings | {"mixed_precision": "no"})
    assert all(row.get("ratio/first_pass_deviation", 0) < 1e-4 for row in rows_of(tmp_path / "exact"))


def test_weights_of_half_width_are_trained_in_full(tiny_language_model, tmp_path):
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, dtype=torch.bfloat16, device="cpu")
    pipe.align("dpo", dataset=PAIRS, output_dir=tmp_path / "run", **SETTINGS)
    loss = [row["loss/preference"] for row in rows_of(tmp_path / "run") if "loss/preference" in row]
    assert loss[-1] < loss[0]
    assert pipe("the cat", max_new_tokens=3).texts


def test_dtype_is_that_of_frozen_weights(tiny_language_model, tmp_path):
    settings = {"method": "dpo", "dataset": PAIRS, "model": str(tiny_language_model), **SETTINGS, "lora": {"rank": 2}}
    other = {"reference_model": str(tiny_language_model), "dtype": "bfloat16"}
    policy = run(check_config(settings | other | {"output_dir": str(tmp_path / "run")})).policy
    kinds = {name: p.dtype for name, p in policy.model.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".lora_" not in name} == {torch.bfloat16}
    assert {p.dtype for p in policy._frozen.parameters()} == {torch.bfloat16}
    saved = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_run_of_an_older_version_on_a_model_of_half_width_is_resumed(tiny_language_model, tmp_path, dtype):
    """Those versions said "float32" of it; what they trained was the model as it was in memory."""

    def align(name, **settings):
        pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, dtype=dtype, device="cpu")
        pipe.align("grpo", output_dir=tmp_path / name, reward=letters, **SETTINGS | ONLINE | settings)

    align("whole", epochs=3)
    align("run", epochs=1)
    run_folder, newer = tmp_path / "run", ("tf32", "gradient_checkpointing", "ema_offload", "attention", "optimizer")
    state_file = next(run_folder.glob("checkpoints/*/state.json"))
    state, config = json.loads(state_file.read_text()), yaml.safe_load((run_folder / "config.yaml").read_text())
    for settings in (state["config"], config):
        assert settings["dtype"] == dtype
        settings["dtype"] = "float32"
        for name in newer:
            settings.pop(name, None)
    state_file.write_text(json.dumps(state))
    digest = hashlib.sha256(state_file.read_bytes()).hexdigest()
    manifest = state_file.with_name("manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"state.json": digest}))
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    elsewhere = {"method": "grpo", "model": str(tiny_language_model), "reward": "length", "output_dir": str(run_folder)}
    # Of a run by ``train``, the frozen weights were in float32.
    with pytest.raises(CheckpointError, match="dtype was 'float32' and is"):
        run(check_config(SETTINGS | ONLINE | elsewhere | {"resume": True, "dtype": dtype}))
    for epochs in (2, 3):  # the first of them writes what the model's dtype is
        align("run", epochs=epochs, resume=True)
        assert yaml.safe_load((run_folder / "config.yaml").read_text())["dtype"] == dtype
    ends = [load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("whole", "run")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    pipe = TextAlignmentPipeline.from_pretrained(tiny_language_model, device="cpu")
    with pytest.raises(CheckpointError, match=f"dtype was '{dtype}' and is 'float32'"):
        pipe.align("grpo", output_dir=run_folder, reward=letters, resume=True, **SETTINGS | ONLINE | {"epochs": 4})


def test_training_on_a_run_warns_of_nothing(load, tmp_path, recwarn):
    load().align("dpo", dataset=PAIRS, output_dir=tmp_path / "a", **SETTINGS)
    settings = SETTINGS | {"method": "dpo", "dataset": PAIRS, "model": str(tmp_path / "a")}
    run(check_config(settings | {"output_dir": str(tmp_path / "b")}))
    assert [str(w.message) for w in recwarn if "peft" in w.filename] == []


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_a_run_that_fails_leaves_the_model_as_it_was(load, tmp_path, lora):
    """So that it can be resumed, and then ends as if nothing had been."""
    calls = []

    def reward(completions):
        calls.append(len(completions))
        return [float("nan")] * len(completions) if len(calls) == 4 else letters(completions)  # in the second epoch

    settings = SETTINGS | ONLINE | {"lora": lora, "beta": 0.1, "epochs": 3, "reward": reward}
    pipe = load()
    before, names = logits(pipe.model), list(pipe.model.state_dict())
    with pytest.raises(RewardError, match="returned nan"):
        pipe.align("grpo", output_dir=tmp_path / "run", **settings)
    assert len(calls) >= 4
    assert torch.equal(logits(pipe.model), before)
    assert list(pipe.model.state_dict()) == names
    pipe.align("grpo", output_dir=tmp_path / "run", resume=True, **settings)
    calm = load().align("grpo", output_dir=tmp_path / "calm", **settings)
    assert torch.equal(logits(pipe.model), logits(calm.model))
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "calm")


def test_a_finished_run_is_not_resumed_by_its_own_result(load, tmp_path):
    """Its adapters would be added once more."""
    pipe = load().align("dpo", dataset=PAIRS, output_dir=tmp_path / "run", **SETTINGS)
    with pytest.raises(UserError, match="resume=True needs the reference"):
        pipe.align("dpo", dataset=PAIRS, output_dir=tmp_path / "run", resume=True, **SETTINGS | {"epochs": 3})
    load().align("dpo", dataset=PAIRS, output_dir=tmp_path / "run", resume=True, **SETTINGS | {"epochs": 3})
    assert rows_of(tmp_path / "run")[-1]["epoch"] == 3
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"the run folder '.*run' is not there any more"):
        pipe.report()


def test_a_model_that_carries_adapters_keeps_them(load, tmp_path):
    from peft import LoraConfig

    pipe = load()
    add_lora(pipe.model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    before = logits(pipe.model)
    with pytest.raises(UserError, match="carries adapters already"):
        pipe.align("dpo", dataset=PAIRS, output_dir=tmp_path / "run", **SETTINGS)
    assert torch.equal(logits(pipe.model), before)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_prompts_in_every_form(load, chat):
    pipe = load()
    one = pipe("the cat", max_new_tokens=8).texts
    assert one == pipe(["the cat"], max_new_tokens=8).texts == pipe(("the cat",), max_new_tokens=8).texts
    assert len(one) == 1
    assert len(pipe(PROMPTS, max_new_tokens=8).texts) == 2
    assert pipe([]).texts == []
    assert chat(TALKS[0], max_new_tokens=8).texts == chat([TALKS[0]], max_new_tokens=8).texts
    assert chat(TALKS, max_new_tokens=8).texts[:1] == chat(TALKS[:1], max_new_tokens=8).texts
    longer = [*TALKS[0], {"role": "assistant", "content": "me"}, {"role": "user", "content": "and"}]
    assert len(chat([TALKS[0], longer], max_new_tokens=8).texts) == 2
    assert len(chat(longer, max_new_tokens=8).texts) == 1
    mixed = chat(["the cat", TALKS[0]], max_new_tokens=8).texts
    assert mixed[0] == chat("the cat", max_new_tokens=8).texts[0]


def test_a_text_depends_on_its_prompt_the_seed_and_its_place(load):
    pipe = load()
    prompts = [*PROMPTS, "who?", "one and two", "x"] * 2
    texts = pipe(prompts, seed=3, max_new_tokens=8).texts
    for batch_size in (1, 3, 10):
        assert pipe(prompts, seed=3, max_new_tokens=8, batch_size=batch_size).texts == texts
    assert pipe([*prompts[:4], "another", *prompts[5:]], seed=3, max_new_tokens=8).texts[5:] == texts[5:]
    assert pipe(prompts[:3], seed=3, max_new_tokens=8).texts == texts[:3]
    assert pipe(prompts, seed=4, max_new_tokens=8).texts != texts
    assert texts[:5] != texts[5:], "the same prompts at other places"
    torch.rand(3)
    assert pipe(prompts, seed=3, max_new_tokens=8).texts == texts


def test_a_low_temperature_is_greedy(load):
    pipe = load()
    tokens = pipe.tokenizer("the cat", return_tensors="pt").input_ids
    model = plain(pipe.name)
    for _ in range(8):
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    expected = pipe.tokenizer.decode(tokens[0, len("the cat") :]).split("</s>")[0]
    assert pipe("the cat", temperature=1e-4, max_new_tokens=8).texts == [expected]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 0},
        {"temperature": 0},
        {"temperature": float("nan")},
        {"batch_size": 0},
        {"max_new_tokens": 60},
        {"max_new_tokens": 100},
        {"prompts": ["the cat", " "]},
        {"prompts": ["the cat", 3]},
        {"prompts": TALKS},
    ],
    ids=str,
)
def test_what_cannot_be_written(load, golden, arguments):
    with pytest.raises(UserError) as caught:
        load()(**{"prompts": "the cat", "max_new_tokens": 8} | arguments)
    golden(f"pipe: {arguments}", problems(caught))


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_scores_with_columns(load):
    pipe = load()

    def found(completions, answer):
        return [None if one is None else float(one in text) for text, one in zip(completions, answer)]

    scores = pipe.score(PROMPTS, ["a b", "c d"], found, answer=["b", "x"])
    assert scores.tolist() == [1.0, 0.0]
    assert pipe.score(PROMPTS, ["a b", "c d"], found, answer=["b", None]).isnan().tolist() == [False, True]
    words = pipe.score(PROMPTS, ["a b", "c d e"], {"name": "length", "unit": "words"})
    assert words.tolist() == [2.0, 3.0]
    assert pipe.score([], [], "length").shape == (0,)


def test_columns_may_be_called_as_arguments_are(load):
    def rated(completions, reward, texts):
        return [a + b for a, b in zip(reward, texts)]

    scores = judged_texts(load(), PROMPTS, ["a", "b"], rated, [{"reward": 1, "texts": 2}, {"reward": 3, "texts": 4}])
    assert scores.tolist() == [3.0, 7.0]


def test_scores_of_conversations(chat):
    def roles(prompts, completions):
        return [float(p[-1]["role"] == "user" and c[0]["role"] == "assistant") for p, c in zip(prompts, completions)]

    assert chat.score(TALKS, ["a", "b", "c"], roles).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        ((PROMPTS, ["a"], "length"), {}),
        ((PROMPTS, ["a", "b"], "length"), {"answer": ["b"]}),
        (("ab", ["a", "b"], "length"), {}),
        ((PROMPTS, ["a", "b"], "lenght"), {}),
        ((PROMPTS, ["a", "b"], "exact_match"), {}),
    ],
)
def test_what_cannot_be_scored(load, golden, arguments, columns):
    with pytest.raises((UserError, RewardError)) as caught:
        load().score(*arguments, **columns)
    golden(f"score: {arguments} {columns}", problems(caught))


# -- wrong arguments of align ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "grop"},
        {"method": "ddpo"},
        {"method": "reward_model"},
        {"model": "tiny-lm"},
        {"dtype": "bfloat16"},
        {"reward": len},
        {"prompts": ["a" * 70]},
    ],
    ids=str,
)
def test_what_cannot_be_aligned(load, golden, tmp_path, arguments):
    pipe = load()
    before = logits(pipe.model)
    settings = {"method": "grpo", "reward": "length", "output_dir": tmp_path / "run"} | SETTINGS | ONLINE | arguments
    with pytest.raises((UserError, RewardError)) as caught:
        pipe.align(**settings)
    golden(f"align: {arguments}", problems(caught))
    assert not (tmp_path / "run").exists()
    assert torch.equal(logits(pipe.model), before)


def test_several_faults_at_once(load, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load().align("grpo", reward="lenght", prompts="absent.jsonl", output_dir=tmp_path / "run", beta=-1)
    assert len(caught.value.problems) == 3


# -- the Hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [PROMPTS, [{"prompt": talk} for talk in TALKS]])
def test_the_lines_of_a_card_load_what_was_trained(load, chat, tmp_path, prompts):
    settings = SETTINGS | ONLINE | {"prompts": prompts, "epochs": 1}
    first = (load() if prompts is PROMPTS else chat).align(reward="length", output_dir=tmp_path / "one", **settings)
    second = TextAlignmentPipeline.from_pretrained(tmp_path / "one", device="cpu")
    second.align(reward="length", output_dir=tmp_path / "two", **settings)
    second.save_pretrained(tmp_path / "merged")
    for folder, pipe in (("one/final", first), ("two/final", second), ("merged", second)):
        card = (tmp_path / folder / "README.md").read_text()
        found: dict = {}
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1), found)
        assert isinstance(found["text"], str)
        assert_same_model(found["model"], pipe.model)
    assert "| mean per epoch | first | last |" in card
    assert yaml.safe_load(card.split("---\n")[1]) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["text-generation", "transformers", "grpo", "diffusion-align"],
    }


def test_the_card_of_a_run_shows_its_texts_and_figures(tmp_path):
    pipe = TextAlignmentPipeline.from_pretrained("tiny-lm", device="cpu")
    settings = SETTINGS | {"dataset": PAIRS, "epochs": 1, "evaluation": {"reward": "length", "samples": 2}}
    pipe.align("dpo", output_dir=tmp_path / "run", **settings)
    card = (tmp_path / "run/final/README.md").read_text()
    shown = json.loads((tmp_path / "run/samples/before_after.jsonl").read_text().splitlines()[0])
    assert "# tiny-lm aligned with DPO" in card
    assert "A LoRA adapter for the language model `tiny-lm`" in card
    assert f"| `{shown['prompt']}` |" in card
    assert " ".join(shown["after"].split())[:20].replace("|", "\\|") in card
    assert "| rows trained on | 8 |" in card
    assert "| held-out reward |" in card
    assert "nats, per completion" in card
    assert 'AutoModelForCausalLM.from_pretrained(asset_path("tiny-lm"))' in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["tags"][2:]) == ("peft", ["lora", "dpo", "diffusion-align"])


def test_an_adapter_is_uploaded_with_its_card(tmp_path, hub):
    from peft import PeftModel

    pipe = TextAlignmentPipeline.from_pretrained("tiny-lm", device="cpu")
    with pytest.raises(UserError, match="no adapter to upload"):
        pipe.push_to_hub("me/a")
    settings = SETTINGS | ONLINE | {"epochs": 1}
    pipe.align(reward=letters, output_dir=tmp_path / "run", **settings)
    assert pipe.push_to_hub("me/a", token="hf_x") == "https://example.org/me/a"
    files = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"} <= files
    everything = "".join(p.read_text() for p in (tmp_path / "hub").iterdir() if p.suffix in (".md", ".json"))
    assert str(tmp_path) not in everything
    assert str(asset_path("tiny-lm").parent) not in everything
    assert "hf_x" not in everything
    assert 'PeftModel.from_pretrained(model, "me/a")' in everything
    theirs = PeftModel.from_pretrained(plain(asset_path("tiny-lm")).float(), tmp_path / "hub").merge_and_unload()
    assert_same_model(theirs, pipe.model)
    pipe.align(reward=letters, output_dir=tmp_path / "second", **settings)
    with pytest.raises(UserError, match="not on the Hub"):
        pipe.push_to_hub("me/a")
    shutil.rmtree(tmp_path / "hub")
    pipe.push_to_hub("me/b", merged=True)
    assert_same_model(plain(tmp_path / "hub").float(), pipe.model)


def test_the_best_weights_on_a_base_of_this_machine_are_loaded_and_uploaded(load, tiny_language_model, tmp_path, hub):
    golds = [0.0, 0.0, 3.0, 1.0]  # of a dummy batch, before the run, and of its two epochs

    def held_out(completions, **columns):
        return [golds.pop(0)] * len(completions)

    settings = SETTINGS | ONLINE | {"evaluation": {"reward": held_out, "samples": 2, "every": 1}}
    pipe = load().align(reward=letters, output_dir=tmp_path / "best", **settings)
    pipe.save_pretrained(tmp_path / "whole")
    assert "weights with the highest held-out reward" not in (tmp_path / "whole/README.md").read_text()
    best = TextAlignmentPipeline.from_pretrained(tmp_path / "best/best", device="cpu")
    best.push_to_hub("me/best")
    weights = load_file(tmp_path / "hub/adapter_model.safetensors")
    for which, same in (("best", True), ("final", False)):
        theirs = load_file(tmp_path / "best" / which / "adapter_model.safetensors")
        assert all(torch.equal(weights[name], theirs[name]) for name in weights) is same
    card = (tmp_path / "hub/README.md").read_text()
    assert "weights with the highest held-out reward" in card
    everything = card + (tmp_path / "hub/adapter_config.json").read_text()
    assert str(tiny_language_model.parent) not in everything
    assert '"base_model_name_or_path": "lm"' in everything
