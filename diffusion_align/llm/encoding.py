"""Texts and conversations: their form, the prompt that completions share, and their tokens within the limits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError

from diffusion_align.training.errors import ConfigError, first_line
from diffusion_align.training.rows import BadRow
from diffusion_align.training.tables import short

Messages = list[dict[str, Any]]
Text = str | Messages


@dataclass(frozen=True)
class Encoded:
    """Tokens of a prompt and its completions, and whether they were shortened."""

    ids: list[int]
    completions: list[list[int]]
    prompt_cut: bool
    completion_cut: bool


class TextEncoder:
    """Texts and conversations to tokens that fit the limits; prompt and completions are tokenized apart.

    A tokenizer that puts a beginning-of-sequence token before a text by default puts it before a text prompt. Before a
    conversation only the chat template does, as in ``apply_chat_template``.

    Args:
        tokenizer: of transformers; one without a padding token will do.
        max_completion_length: tokens that have to fit behind the prompt, at least 1; longer completions keep their
            beginning, and the end of sequence as last token.
        max_prompt_length: longer prompts keep their end, and the beginning-of-sequence token.
        context_length: the most tokens of prompt and completion together.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_completion_length: int,
        max_prompt_length: int | None = None,
        context_length: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt, self.max_completion, self.context = max_prompt_length, max_completion_length, context_length
        bos, plain, default = tokenizer.bos_token_id, tokens_of(tokenizer, "a"), tokenizer("a").input_ids
        self.bos = bos if default[:1] == [bos] and plain[:1] != [bos] else None

    def problems(self) -> list[str]:
        """Sentences about the tokenizer and the limits, whatever the rows hold."""
        problems = []
        if self.tokenizer.eos_token_id is None:
            problems.append("the tokenizer has no end-of-sequence token: set tokenizer.eos_token and save it again")
        if self.max_prompt is not None and self.max_prompt < 1:
            problems.append(f"max_prompt_length={self.max_prompt} is not allowed: give at least 1")
        if self.max_completion < 1:
            problems.append(f"max_completion_length={self.max_completion} is not allowed: give at least 1")
        if self.context is not None and self.max_completion >= self.context:
            problems.append(
                f"max_completion_length={self.max_completion} leaves no room for a prompt in the model's context of "
                f"{self.context} tokens: set it lower"
            )
        return problems

    def encode(self, prompt: Text, completions: Sequence[Text]) -> Encoded:
        """Tokens of a prompt and its completions, all texts or all conversations.

        Raises:
            BadRow: one that the tokenizer cannot read, or that leaves no room.
            ConfigError: conversations, and no chat template.
        """
        if isinstance(prompt, str):
            text, ends = prompt, cast(list[str], completions)
        else:
            text, ends = self._rendered(prompt, cast(list[Messages], completions))
        whole = tokens_of(self.tokenizer, text)
        if not whole:
            raise BadRow("the prompt holds nothing that the tokenizer knows")
        if isinstance(prompt, str) and self.bos is not None and whole[0] != self.bos:
            whole = [self.bos, *whole]
        ids, tokens = self._end_of(whole), [self._ended(end) for end in ends]
        kept = [these if len(these) <= self.max_completion else self._start_of(these) for these in tokens]
        self._check_room(len(ids), max(map(len, kept)) if kept else self.max_completion)
        return Encoded(ids, kept, ids != whole, kept != tokens)

    def _end_of(self, ids: list[int]) -> list[int]:
        if self.max_prompt is None or len(ids) <= self.max_prompt:
            return ids
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id and self.max_prompt > 1 else []
        return head + ids[len(ids) - self.max_prompt + len(head) :]

    def _start_of(self, ids: list[int]) -> list[int]:
        return [*ids[: self.max_completion - 1], self.tokenizer.eos_token_id]

    def _ended(self, text: str) -> list[int]:
        """Tokens up to and with an end of sequence; white space that a chat template writes behind it is left out."""
        if text.rstrip().endswith(self.tokenizer.eos_token):
            text = text.rstrip()
        ids = ended_tokens_of(self.tokenizer, text)
        if ids == [self.tokenizer.eos_token_id]:
            raise BadRow("a completion holds nothing that the tokenizer knows before its end")
        return ids

    def _rendered(self, prompt: Messages, completions: Sequence[Messages]) -> tuple[str, list[str]]:
        """The template's text of a prompt and what it adds for each completion.

        As in TRL the prompt ends where its own text, with the opening of an answer, and those of the whole
        conversations part: some templates open an answer with more than they write before one that is there.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            lack = "the rows hold conversations but the tokenizer has no chat template"
            raise ConfigError([f"{lack}: give plain texts, or set tokenizer.chat_template"])
        role = prompt[-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise BadRow(f"the prompt ends with a message of role {short(role)}: end it with the user's")
        going_on = role == "assistant"
        render = self.tokenizer.apply_chat_template
        try:
            alone = render(prompt, tokenize=False, add_generation_prompt=not going_on, continue_final_message=going_on)
            wholes = [render(prompt + completion, tokenize=False) for completion in completions]
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow(
                f"the tokenizer's chat template does not take the conversation ({first_line(error)})"
            ) from None
        length = _alike([alone, *wholes])
        return alone[:length], [whole[length:] for whole in wholes]

    def _check_room(self, prompt: int, completion: int) -> None:
        if self.context is not None and prompt + completion > self.context:
            lengths = f"a completion of {completion} in the model's context of {self.context}"
            remedy = f"set max_prompt_length={self.context - self.max_completion} or less"
            raise BadRow(f"a prompt of {prompt} tokens leaves no room for {lengths}: {remedy}")


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text and nothing besides."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def ended_tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a whole completion, with an end of sequence as one has that was sampled to its end."""
    ids, eos = tokens_of(tokenizer, text), tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def completion_of(text: str, like_prompt: Text) -> Text:
    """``text`` in the form of its prompt: a conversation of one assistant message, or as it is."""
    return text if isinstance(like_prompt, str) else [{"role": "assistant", "content": text}]


def checked_text(value: Any, what: str) -> Text:
    """A text that is not blank, or messages that are not all blank, without their keys that hold None."""
    messages = value if isinstance(value, list | tuple) else [{"role": "", "content": value}]
    if value is None or not messages:
        raise BadRow(f"{what} is empty")
    for message in messages:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise BadRow(f"{what} is {short(value)}, neither a text nor messages with a role and a text as content")
        try:
            "".join(map(str, parts)).encode()
        except UnicodeEncodeError:
            raise BadRow(f"{what} {short(value)} is not valid Unicode") from None
    if _blank(value):
        raise BadRow(f"{what} is empty")
    return value if isinstance(value, str) else [{k: v for k, v in m.items() if v is not None} for m in messages]


def checked_texts(value: Any, what: str) -> list[Text]:
    """The texts of a cell that holds one, or a list of them, each as in ``checked_text``."""
    several = isinstance(value, list | tuple) and not (value and isinstance(value[0], Mapping))
    if several and not value:
        raise BadRow(f"{what} is empty")
    return [checked_text(one, what) for one in (value if several else [value])]


def split_prompt(cells: Mapping[str, Any], sides: Sequence[Text]) -> tuple[Text, list[Text]]:
    """The prompt of a row and what each side adds to it."""
    prompt = checked_text(cells["prompt"], "the prompt") if "prompt" in cells else None
    if isinstance(prompt, list):
        sides = [completion_of(side, prompt) if isinstance(side, str) else side for side in sides]
        repeated = len(prompt) if all(side[: len(prompt)] == prompt for side in sides) else 0
        sides = [side[repeated:] for side in sides]
    elif len({isinstance(side, str) for side in sides}) > 1:
        raise BadRow("some of chosen and rejected are texts and some conversations: give all in one form")
    elif prompt is None or isinstance(sides[0], list):
        length = _shared(sides)
        prompt, sides = sides[0][:length], [side[length:] for side in sides]
    if any(map(_blank, sides)):
        raise BadRow("a completion adds nothing to the prompt")
    return prompt, list(sides)


def _shared(sides: Sequence[Text]) -> int:
    """How much all sides begin with: messages, or characters up to the end of a word; never all of a side."""
    length = min(_alike(sides), *(len(side) - 1 for side in sides))
    start = sides[0][:length]
    if isinstance(start, str):
        # A space begins the word after it in the tokenizers at hand; a line end or tab does not.
        word = max(start.rfind(" "), start.rfind("\n") + 1, start.rfind("\t") + 1)
        length = word if word > 0 else length
        start = start[:length].strip()
    if not start:
        raise BadRow("chosen and rejected do not begin alike and there is no prompt: give a column prompt")
    return length


def _alike(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements all of them begin with."""
    lengths = range(1, min(map(len, sequences)) + 1)
    return bisect_left(lengths, True, key=lambda n: any(one[:n] != sequences[0][:n] for one in sequences))


def _blank(text: Text) -> bool:
    return not (text if isinstance(text, str) else "".join(message["content"] for message in text)).strip()
