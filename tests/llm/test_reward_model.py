"""Reward models: the loss against plain forward passes, padding, learning, what is saved and who reads it, resume."""

import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from diffusion_align.data.text_encoding import TextEncoder
from diffusion_align.data.text_rows import PreferenceRow, TextDataConfig, preference_rows
from diffusion_align.errors import ConfigError, UserError
from diffusion_align.llm.policy import LoRAConfig, Sequences
from diffusion_align.llm.reward_model import RewardModel, RewardModelConfig, RewardModelTrainer
from diffusion_align.rewards import build_text_reward
from diffusion_align.training.reading import parse_config
from tests.helpers.characters import character_tokenizer
from tests.helpers.hard_runs import rows_of

EOS, PAD = 3, 2
HOW = {"lora": LoRAConfig(rank=4), "full": None}
MESSAGES = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>\n{% endfor %}"
CHATML = MESSAGES + "{% if add_generation_prompt %}a:{% endif %}"
ROWS = [
    PreferenceRow("p", [5, 6, 7], [30, 31, EOS], [[32, EOS]]),
    PreferenceRow("p", [8], [14, EOS], [[15, 16, 17, 18, EOS], [20, 21, EOS]], label=0.75),
    PreferenceRow("p", [9, 10, 11, 12], [22, 23, 24], [[24, EOS]], label=0.0),  # an answer cut without its end
]


@pytest.fixture
def characters():
    """``characters(pad, template)``: a tokenizer of single characters for the 40 tokens of the tiny models."""

    def make(*, pad=None, template=None):
        known = ["<s>", "<unk>", "<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz :.!?\n"]
        assert (known[EOS], known[PAD]) == ("</s>", "<pad>")
        return character_tokenizer(known, template=template, eos_token="</s>", **({"pad_token": pad} if pad else {}))

    return make


@pytest.fixture
def base(tiny_lm, tmp_path):
    """``base(family)``: the folder of a tiny language model."""

    def make(family="llama"):
        folder = tmp_path / f"base_{family}"
        if not folder.is_dir():
            tiny_lm(family).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def make_model(base, characters):
    """``make_model(family, noise=0, **settings)``: a RewardModel; ``noise`` moves what is trained, the head too.

    Without it the head is 0.
    """

    def make(family="llama", *, noise=0.0, lora="lora", dtype=torch.float32, tokenizer=None, device="cpu"):
        scorer = AutoModelForSequenceClassification.from_pretrained(base(family), num_labels=1, dtype=dtype)
        torch.nn.init.zeros_(scorer.score.weight)
        torch.manual_seed(1)  # of the adapters
        model = RewardModel(scorer, tokenizer or characters(), lora=HOW[lora], device=device)
        with torch.no_grad():
            for parameter in model.trainable.values() if noise else ():
                parameter.add_(noise * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def make_trainer(make_model, tmp_path):
    def make(model=None, rows=ROWS, *, eval_rows=(), name="run", **settings):
        changes = {"samples_per_epoch": 4, "sample_batch_size": 2, "learning_rate": 1e-2, "num_threads": 1}
        config = RewardModelConfig(
            **{"model": "tiny-lm", "output_dir": tmp_path / name, "dataset": ["not read here"], **changes, **settings}
        )
        return RewardModelTrainer(config, model or make_model(), rows, eval_rows=eval_rows, accelerator=Accelerator())

    return make


def plain_scores(model, ids):
    """(n,) of token lists: the head's logit at the last token that is no end of sequence, without any padding."""
    scores = []
    for row in ids:
        kept = row[: max(i for i, token in enumerate(row) if token != EOS) + 1]
        backbone = model.model.base_model
        hidden = backbone(torch.tensor([kept])).last_hidden_state
        scores.append(model.model.score(hidden)[0, -1, 0])
    return torch.stack(scores)


def all_pairs(trainer):
    return trainer._packed(trainer.pairs)


def gradient(model):
    found = torch.cat([p.grad.flatten() for p in model.trainable.values()])
    model.model.zero_grad()
    return found


@pytest.mark.parametrize("lora", HOW)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_value_and_gradient_are_those_of_plain_forward_passes(make_model, make_trainer, family, lora):
    model = make_model(family, noise=0.1, lora=lora, dtype=torch.float64)
    trainer = make_trainer(model, center_coef=0.3)
    assert len(trainer.pairs) == 4
    batch = all_pairs(trainer)
    losses, statistics = trainer.loss(batch, torch.arange(4), torch.zeros(4, dtype=torch.int64))
    losses.sum().backward()
    found = gradient(model)

    pairs = [(row, rejected) for row in ROWS for rejected in row.rejected]
    w = plain_scores(model, [row.ids + row.chosen for row, _ in pairs])
    lost = plain_scores(model, [row.ids + rejected for row, rejected in pairs])
    p = torch.tensor([1.0, 0.75, 0.75, 0.0], dtype=torch.float64)
    chance = torch.sigmoid(w - lost)
    expected = -p * chance.log() - (1 - p) * (1 - chance).log()
    torch.testing.assert_close(statistics["loss/preference"], expected.detach(), rtol=1e-9, atol=1e-12)
    expected = expected + 0.3 * (w + lost) ** 2
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    expected.sum().backward()
    assert found.abs().max() > 1e-2
    torch.testing.assert_close(found, gradient(model), rtol=1e-8, atol=1e-10)

    torch.testing.assert_close(statistics["scores/chosen"], w.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(statistics["margin"], (w - lost).detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(statistics["loss/center"], ((w + lost) ** 2).detach(), rtol=1e-9, atol=1e-12)
    right = (w > lost).double()
    torch.testing.assert_close(statistics["accuracy"].double(), p * right + (1 - p) * (1 - right))
    assert not any(value.requires_grad for value in statistics.values())


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_new_head_scores_zero_and_costs_ln_2(make_model, make_trainer, family):
    trainer = make_trainer(make_model(family), center_coef=1.0)
    losses, statistics = trainer.loss(all_pairs(trainer), torch.arange(4), torch.zeros(4, dtype=torch.int64))
    assert losses.tolist() == pytest.approx([math.log(2)] * 4, rel=1e-6)
    assert statistics["scores/chosen"].tolist() == statistics["scores/rejected"].tolist() == [0.0] * 4
    assert statistics["accuracy"].tolist() == [0.5] * 4
    losses.sum().backward()
    head = [p.grad for name, p in trainer.trainable.items() if name.startswith("score.")]
    assert [bool(gradient.abs().max() > 1e-3) for gradient in head] == [True]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("pad", [None, "<pad>"])
def test_neither_padding_nor_the_micro_batch_changes_a_gradient(make_model, make_trainer, characters, family, pad):
    model = make_model(family, noise=0.1, dtype=torch.float64, tokenizer=characters(pad=pad))
    trainer = make_trainer(model)
    batch = all_pairs(trainer)
    sequences = batch.sequences
    wider = Sequences(torch.nn.functional.pad(sequences.ids, (0, 9), value=model.pad), sequences.starts, sequences.mask)

    def of(batch, *micro_batches):
        for samples in micro_batches:
            losses, _ = trainer.loss(batch, torch.tensor(samples), torch.zeros(len(samples), dtype=torch.int64))
            losses.sum().backward()
        return gradient(model)

    together = of(batch, [0, 1, 2, 3])
    assert together.abs().max() > 1e-2
    for other in (of(batch, [0], [1], [2], [3]), of(batch, [3, 0], [2, 1])):
        torch.testing.assert_close(other, together, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(model.score(wider), model.score(sequences), rtol=1e-10, atol=1e-12)


def test_every_rejected_completion_is_a_pair_and_a_pass_shows_each_once(make_model, make_trainer):
    rows = [PreferenceRow("p", [5], [30 + i, EOS], [[10 + i, EOS], [20 + i, EOS]]) for i in range(3)]
    trainer = make_trainer(rows=rows, samples_per_epoch=6, sample_batch_size=3)
    batch, metrics = trainer.collect()
    assert metrics == {"pairs_used": 6.0}
    assert (len(batch.sequences), len(batch.labels)) == (12, 6)
    seen = {tuple(pair) for pair in zip(batch.sequences.ids[:6, 1].tolist(), batch.sequences.ids[6:, 1].tolist())}
    assert seen == {(30 + i, other + i) for i in range(3) for other in (10, 20)}
    batch, (keep, actions, _), _ = trainer.estimate(batch)
    assert (keep.tolist(), actions) == ([0, 1, 2, 3, 4, 5], 1)


def separable(count, start=0):
    """Texts in which the preferred answer has an a where the other has a b, at varying places."""
    rows = []
    for i in range(start, start + count):
        filler = "".join("cdefgh"[(i * k + k) % 6] for k in range(1, 5))
        place = i % 5
        answers = [filler[:place] + letter + filler[place:] for letter in "ab"]
        rows.append({"prompt": f"{'klmn'[i % 4]}:", "chosen": answers[0], "rejected": answers[1]})
    return rows


def encoded(source, tokenizer):
    return preference_rows(TextDataConfig(source=source), TextEncoder(tokenizer, max_completion_length=20)).rows


@pytest.fixture
def train(make_model, make_trainer, characters):
    """``train(**settings)``: the finished trainer of a small run on separable preferences."""

    def run(*, lora="lora", family="llama", flip=False, tokenizer=None, **settings):
        tokenizer = tokenizer or characters(pad="<pad>", template=CHATML)
        source = [
            {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if flip else row for row in separable(40)
        ]
        model = make_model(family, lora=lora, tokenizer=tokenizer, device=Accelerator().device)
        held_out = encoded(separable(20, start=100), tokenizer)
        changes = {"samples_per_epoch": 16, "sample_batch_size": 8, "epochs": 6}
        trainer = make_trainer(model, encoded(source, tokenizer), eval_rows=held_out, **changes | settings)
        trainer.train()
        return trainer

    return run


def test_it_learns_what_separates_the_answers_and_the_opposite_from_the_opposite(train):
    rows = rows_of(train(epochs=8).folder)
    held_out = [row for row in rows if "eval/accuracy" in row]
    assert [row["epoch"] for row in held_out] == list(range(1, 9))
    assert held_out[-1]["eval/accuracy"] > 0.9
    assert held_out[-1]["eval/margin"] > 0.5
    assert held_out[-1]["eval/preference"] < 0.5 * math.log(2)
    updates = [row for row in rows if "accuracy" in row]
    assert updates[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert sum(row["accuracy"] for row in updates[-4:]) / 4 > 0.9
    assert updates[-1]["scores/chosen"] - updates[-1]["scores/rejected"] == pytest.approx(
        updates[-1]["margin"], rel=1e-5
    )
    flipped = rows_of(train(epochs=8, flip=True, name="flipped").folder)
    assert [row for row in flipped if "eval/accuracy" in row][-1]["eval/accuracy"] < 0.1


@pytest.mark.parametrize(
    ("lora", "family", "pad"),
    [("lora", "llama", None), ("lora", "llama", "<pad>"), ("full", "llama", None), ("lora", "gpt2", "<pad>")],
)
def test_what_is_saved_scores_the_same_for_transformers_peft_and_the_reward(train, characters, lora, family, pad):
    trainer = train(lora=lora, family=family, epochs=1, tokenizer=characters(pad=pad, template=CHATML))
    model, final = trainer.model, trainer.folder / "final"
    texts = [
        {"prompt": "k:", "chosen": "abc", "rejected": ["hd b", "a"]},
        {"prompt": "n n:", "chosen": "a", "rejected": "b"},
    ]
    chats = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in texts
    ]
    if lora == "full":
        plain = AutoModelForSequenceClassification.from_pretrained(final)
        assert plain.config.num_labels == 1
    else:
        from peft import AutoPeftModelForSequenceClassification, PeftConfig

        plain = AutoPeftModelForSequenceClassification.from_pretrained(final, num_labels=1)
        assert PeftConfig.from_pretrained(final).base_model_name_or_path == str(
            trainer.folder.parent / f"base_{family}"
        )
        assert any("score" in name for name in load_file(final / "adapter_model.safetensors"))
    assert "AutoModelForSequenceClassification" in (final / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.pad_token_id == model.pad == (EOS if pad is None else PAD)
    plain.config.pad_token_id = tokenizer.pad_token_id
    judge = build_text_reward({"name": "classifier", "model": str(final)})
    for source in (texts, chats):
        rows = [row for row in encoded(source, model.tokenizer) for _ in row.rejected]
        losers = [ids for row in encoded(source, model.tokenizer) for ids in row.rejected]
        sequences = model.pack([*rows, *rows], [*(row.chosen for row in rows), *losers])
        with torch.no_grad():
            mine = model.score(sequences).cpu()
            theirs = plain.to(model.device)(input_ids=sequences.ids, attention_mask=sequences.attention_mask).logits
        torch.testing.assert_close(theirs[:, 0].cpu(), mine, rtol=0, atol=1e-5)
        assert mine.std() > 1e-3
        prompts = [row.prompt for row in rows] * 2
        answers = ["abc", "abc", "a", "hd b", "a", "b"]
        if source is chats:
            answers = [[{"role": "assistant", "content": answer}] for answer in answers]
        judged = judge(prompts=prompts, completions=answers)
        torch.testing.assert_close(torch.as_tensor(judged).cpu(), mine, rtol=0, atol=1e-5)


def test_an_answer_is_read_where_the_reward_reads_it(make_model, characters):
    text, chat = ROWS[0], PreferenceRow([{"role": "user", "content": "a"}], [5, 6], [7, EOS], [[8, EOS]])
    line_break = characters()("\n").input_ids
    model = make_model(tokenizer=characters(template=CHATML))
    sequences = model.pack([text, chat, ROWS[2]], [text.chosen, chat.chosen, ROWS[2].chosen])
    lengths = sequences.attention_mask.sum(1).tolist()
    found = [ids[:length] for ids, length in zip(sequences.ids.tolist(), lengths)]
    assert found == [[5, 6, 7, 30, 31], [5, 6, 7, EOS, *line_break], [9, 10, 11, 12, 22, 23, 24]]
    full = PreferenceRow(chat.prompt, [5] * 60, [7, 7, 7, EOS], [])
    assert model.pack([full], [full.chosen]).ids.tolist() == [[5] * 60 + [7, 7, 7, EOS]]  # the context ends there
    cut = PreferenceRow(chat.prompt, [5, 6], [7, 7], [])
    assert model.pack([cut], [cut.chosen]).ids.tolist() == [[5, 6, 7, 7]]  # it never had an end
    bare = make_model(tokenizer=characters(template=CHATML.replace("</s>\n", "\n")))
    assert bare.pack([chat], [chat.chosen]).ids.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("lora", HOW)
def test_a_run_that_broke_off_ends_as_the_one_that_was_left_alone(train, monkeypatch, lora):
    settings = {"lora": lora, "epochs": 4, "checkpoint_every": 1, "ema_decay": 0.9, "lr_schedule": "cosine"}
    calm = train(name="calm", **settings).folder
    evaluate, calls = RewardModelTrainer._evaluate, []

    def once_fails(self):
        calls.append(self.epoch)
        if len(calls) == 3:
            raise RuntimeError("pulled the plug")
        return evaluate(self)

    monkeypatch.setattr(RewardModelTrainer, "_evaluate", once_fails)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(name="harried", **settings)
    harried = train(name="harried", resume=True, **settings).folder
    assert calls == [1, 2, 3, 3, 4]  # the third epoch's again, with the same weights
    assert rows_of(calm) == rows_of(harried)
    newest = [sorted((folder / "checkpoints").glob("step_*"))[-1] for folder in (calm, harried)]
    files = [(path / f"{stem}.safetensors") for path in newest for stem in ("trained", "ema")]
    weights = [load_file(file) for file in files]
    for mine, theirs in ((weights[0], weights[2]), (weights[1], weights[3])):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    name = "model.safetensors" if lora == "full" else "adapter_model.safetensors"
    mine, theirs = (load_file(folder / "final" / name) for folder in (calm, harried))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_settings_and_models_that_do_not_fit(make_model, characters, base):
    with pytest.raises(ConfigError) as caught:
        parse_config(RewardModelConfig, {"model": "tiny-lm", "output_dir": "run", "center_coef": -1, "temperature": 1})
    assert [problem.split(":")[0].split(" is ")[0] for problem in caught.value.problems] == [
        "dataset",
        "center_coef=-1",
        "unknown setting 'temperature'",
    ]
    config = RewardModelConfig(model="tiny-lm", output_dir="run", dataset="pairs.jsonl", eval_dataset=["row"])
    assert (config.dataset.source, config.eval_dataset.source, config.lora.rank) == ("pairs.jsonl", ["row"], 16)
    several = AutoModelForSequenceClassification.from_pretrained(base(), num_labels=3)
    with pytest.raises(UserError, match="num_labels=3"):
        RewardModel(several, characters(), lora=None)
    with pytest.raises(UserError, match="adapters already"):
        RewardModel(make_model().model, characters(), lora=None)
    tokenizer = characters()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        make_model(tokenizer=tokenizer)
