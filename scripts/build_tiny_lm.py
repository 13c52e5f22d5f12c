"""Trains the embedded language model ``tiny-lm`` (characters, 1.3 M parameters) on verses, and writes its prompt lists.

    apt-get install bible-kjv                               # Debian; the text is in the public domain
    bible -f 'gen1:1-rev22:21' </dev/null > kjv.txt         # one verse per line, its reference first
    python scripts/build_tiny_lm.py kjv.txt --steps 2800    # the embedded one: 17 minutes on one CPU core
    python scripts/build_tiny_lm.py kjv.txt --minutes 2     # a worse one

Any text will do that has one sample a line (``--no-references`` if no reference begins the lines). Every fiftieth line
is held out. The same text, steps, seed and number of threads give the same weights. Results go to --out-dir.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from build_emoji.common import BuildError, cosine_with_warmup, written_atomically
from torch import Tensor, nn
from tqdm import tqdm

from diffusion_align.pretrained import load_in_dtype

CONTEXT = 512
ROWS = 12
PAD, EOS, UNKNOWN = "<|pad|>", "<|eos|>", "<|unk|>"
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""All of printable ASCII, though the text has fewer: any English prompt comes back exactly."""
PACED = 40
"""Steps after which --minutes knows how many there are time for; the warm-up is longer."""


@dataclass(frozen=True)
class Verses:
    """Texts that are trained on, and every fiftieth, which is not."""

    train: list[str]
    heldout: list[str]


def read_verses(files: list[Path], *, references: bool) -> Verses:
    """One text per line, no longer than the context, the reference cut off."""
    texts = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BuildError(f"{file} cannot be read: {error}; give a UTF-8 text with one sample a line") from error
        texts += [line.split(" ", 1)[-1].strip() if references else line.strip() for line in lines]
    texts = [text for text in texts if 0 < len(text) <= CONTEXT - 2]
    heldout = texts[49::50]
    if len(heldout) < ROWS:
        raise BuildError(f"{len(texts)} lines are too few: give a text of {50 * ROWS} lines or more, one sample a line")
    return Verses([text for i, text in enumerate(texts) if i % 50 != 49], heldout)


def build_tokenizer() -> Any:
    """One token per character; what it decodes is the text that was encoded."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=448,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def encoded(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Each text between two ends of sequence."""
    return [[tokenizer.eos_token_id, *ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]


def batches(rows: list[list[int]], seed: int) -> Iterator[list[list[int]]]:
    """Without end: ``ROWS`` rows of about one length, each row once per epoch, in random order.

    Half of the rows come without their first end of sequence, so that the model knows texts with and without one.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.float32)
    while True:
        order = (lengths * (0.95 + 0.1 * torch.rand(len(rows), generator=generator))).argsort().tolist()
        for place in torch.randperm(len(rows) // ROWS, generator=generator).tolist():
            bare = (torch.rand(ROWS, generator=generator) < 0.5).tolist()
            yield [rows[i][b:] for i, b in zip(order[place * ROWS : (place + 1) * ROWS], bare)]


def negative_log_likelihood(model: Any, rows: list[list[int]]) -> tuple[Tensor, int]:
    """Sum in nats over all tokens but the first of each row, and their number."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(row[1:]) for row in rows], batch_first=True, padding_value=-100)
    # Causal attention and padding on the right: no mask is needed, and the fast kernel has none.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return loss, int((labels != -100).sum())


@torch.no_grad()
def heldout_loss(model: Any, rows: list[list[int]]) -> float:
    """Nats per character, the end of sequence counted as one."""
    rows = sorted(rows, key=len)
    parts = [negative_log_likelihood(model, rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)]
    return sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)


def train(model: Any, rows: list[list[int]], *, steps: int | None, minutes: float, lr: float, seed: int) -> int:
    """Trains in place; returns the number of steps, which ``minutes`` decides if none is given."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    typical = ROWS * sum(map(len, rows)) / len(rows)
    source, began, losses = batches(rows, seed), time.monotonic(), []
    model.train()
    with tqdm(total=steps, desc="tiny-lm", unit="step") as bar:
        step = 0
        while steps is None or step < steps:
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine_with_warmup(step, steps or 10**9, warmup=100)
            loss, count = negative_log_likelihood(model, next(source))
            # Divided by one number, not by the batch's own: a character of a short verse counts like any other.
            (loss / typical).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item() / count)
            if not math.isfinite(losses[-1]):
                raise BuildError(f"the loss is {losses[-1]} at step {step}: try another --seed or a lower --lr")
            step += 1
            if steps is None and step == PACED:
                steps = max(PACED, round(PACED * minutes * 60 / (time.monotonic() - began)))
                bar.total = steps
            bar.update()
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
    model.eval()
    return step


@torch.no_grad()
def samples(model: Any, tokenizer: Any, prompts: list[str], seed: int) -> list[str]:
    """One continuation of each prompt ("" for a text of the model's own) at temperature 1."""
    torch.manual_seed(seed)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(prompt)["input_ids"]]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=300)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def beginnings(texts: list[str], count: int, taken: set[str]) -> list[str]:
    """``count`` beginnings of four to seven words without a stop in them, spread over the texts, none in ``taken``."""
    found: list[str] = []
    for number, place in enumerate(range(0, len(texts), max(1, len(texts) // (4 * count)))):
        words = texts[place].split()[: 4 + number % 4]
        text = " ".join(words)
        whole = len(words) == 4 + number % 4 and len(texts[place].split()) > len(words) + 3
        if whole and words[-1].isalpha() and not any(c in text for c in ".;:?!()") and text not in taken:
            found.append(text)
            taken.add(text)
    if len(found) < count:
        raise BuildError(
            f"the text has only {len(found)} of {count} beginnings of four words or more: give a longer one"
        )
    return [found[i * len(found) // count] for i in range(count)]


def write(path: Path, lines: list[str]) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if arguments.steps is not None and arguments.steps < 1:
        raise BuildError(f"--steps is {arguments.steps}: give at least 1")
    if not arguments.minutes > 0:
        raise BuildError(f"--minutes is {arguments.minutes}: give a number above 0")
    torch.set_num_threads(arguments.threads)
    verses = read_verses(arguments.text, references=arguments.references)
    taken: set[str] = set()
    lists = arguments.out_dir / "text-prompts"
    write(lists / "verses.txt", beginnings(verses.train, 64, taken))
    write(lists / "verses_heldout.txt", beginnings(verses.heldout, 32, taken))

    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    heldout = encoded(verses.heldout, tokenizer)
    print(f"{len(verses.train)} verses, {len(heldout)} held out, {model.num_parameters()} parameters", flush=True)
    steps = train(
        model,
        encoded(verses.train, tokenizer),
        steps=arguments.steps,
        minutes=arguments.minutes,
        lr=arguments.lr,
        seed=arguments.seed,
    )
    print(f"{steps} steps, held out: {heldout_loss(model, heldout):.4f} nats per character", flush=True)

    folder = arguments.out_dir / "tiny-lm"
    model.half().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    settings = folder / "tokenizer_config.json"  # transformers 4 knows the class by its older name alone
    text = settings.read_text(encoding="utf-8").replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(text, encoding="utf-8")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes its files private
    load = AutoModelForCausalLM.from_pretrained
    model = load_in_dtype(load, str(folder), dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    print(f"as stored (float16): {heldout_loss(model, heldout):.4f}", flush=True)
    for text in samples(model, tokenizer, ["", "", "", "And the king said", "Blessed is the man that"], arguments.seed):
        print(f"  {text}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("text", type=Path, nargs="+", help="text files, one sample a line")
    p.add_argument("--no-references", dest="references", action="store_false", help="no reference begins the lines")
    p.add_argument("--out-dir", type=Path, default=Path("runs/build-tiny-lm"), help="folder of the results")
    p.add_argument("--steps", type=int, default=None, help="optimizer steps (default: as --minutes allows)")
    p.add_argument("--minutes", type=float, default=15.0, help="how long to train if --steps is not given (default 15)")
    p.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW (default 0.003)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    return p


def main(argv: list[str] | None = None) -> int:
    try:
        run(parser().parse_args(argv))
    except BuildError as error:
        print(f"build_tiny_lm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_tiny_lm: interrupted; nothing was written to tiny-lm", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
