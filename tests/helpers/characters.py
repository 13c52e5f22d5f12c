"""A tokenizer of single characters."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def character_tokenizer(known, *, template=None, **special):
    """Token i is ``known[i]``: a character, "<unk>", or what ``special`` gives a role, ``eos_token="</s>"`` say."""
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)
    tokenizer.chat_template = template
    return tokenizer
