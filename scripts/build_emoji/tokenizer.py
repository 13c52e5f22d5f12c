"""A byte-pair tokenizer in CLIP's format, learned from captions: 24 tokens, lower case, ``</w>`` ends a word."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LENGTH, START, END, WORD_END = 24, "<|startoftext|>", "<|endoftext|>", "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_level() -> list[str]:
    """The 256 byte symbols in CLIP's order, then the same with the end-of-word mark."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    return symbols + [symbol + WORD_END for symbol in symbols]


def learn_tokenizer(captions: Iterable[str], *, vocabulary: int = 3538) -> Tokenizer:
    """A tokenizer with CLIP's normaliser, pre-tokenizer and template; at most ``vocabulary`` pieces.

    The pieces are the 512 byte symbols, then what was merged, then start and end, as in CLIP's own vocabulary.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in learned["merges"]]
    merges = merges[: vocabulary - 2 - len(_byte_level())]
    pieces = list(dict.fromkeys([*_byte_level(), *("".join(merge) for merge in merges)]))
    pieces = [*pieces, START, END]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer.model = models.BPE(vocab=vocab, merges=merges, unk_token=END, end_of_word_suffix=WORD_END)
    tokenizer.add_special_tokens([START, END])
    # By position: the second one was renamed between versions.
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocab[END]), (START, vocab[START]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=vocab[END], pad_token=END)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """The four files that every version of transformers' CLIPTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    config = {
        "bos_token": START,
        "eos_token": END,
        "model_max_length": LENGTH,
        "pad_token": END,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
