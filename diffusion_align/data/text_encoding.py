"""Texts and conversations: their form, the prompt that completions share, and their tokens within the limits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from diffusion_align.data.schemas import BadRow, check_length
from diffusion_align.data.sources import short
from diffusion_align.errors import ConfigError, first_line
from diffusion_align.rewards.text.base import words_left_out

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
    """Texts and conversations to tokens that fit the limits.

    A prompt has the tokens that it has alone, as it is sampled from. A completion has those that it has behind its
    prompt, see ``continuation_tokens``: up to and with the first token that ends a sample of the model, or with the
    tokenizer's end of sequence behind it where it holds none.

    A tokenizer that puts a beginning-of-sequence token before a text by default puts it before a text prompt. Before a
    conversation only the chat template does, as in ``apply_chat_template``.

    Args:
        tokenizer: of transformers; one without a padding token will do.
        max_completion_length: tokens that have to fit behind the prompt, at least 1; longer completions keep their
            beginning, and have no end.
        max_prompt_length: longer prompts keep their end, and the beginning-of-sequence token.
        context_length: the most tokens of prompt and completion together.
        ends: tokens that end a sample (``eos_token_ids``); the tokenizer's end of sequence when not given. () for a
            classifier, which samples nothing: completions keep all their turns then.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_completion_length: int,
        max_prompt_length: int | None = None,
        context_length: int | None = None,
        ends: Collection[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_prompt, self.max_completion, self.context = max_prompt_length, max_completion_length, context_length
        self.ends = frozenset(eos_token_ids(tokenizer) if ends is None else ends)
        bos, plain, default = tokenizer.bos_token_id, tokenize(tokenizer, "a"), tokenizer("a").input_ids
        self.bos = bos if default[:1] == [bos] and plain[:1] != [bos] else None

    def check(self) -> None:
        """Look at the tokenizer and the limits, whatever the rows hold.

        Raises:
            ConfigError: everything that is wrong with them.
        """
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
        if problems:
            raise ConfigError(problems)

    def encode(self, prompt: Text, completions: Sequence[Text]) -> Encoded:
        """Tokens of a prompt and its completions, all texts or all conversations.

        Raises:
            BadRow: one that the tokenizer cannot read, or that leaves no room.
            ConfigError: conversations, and no chat template.
        """
        if isinstance(prompt, str):
            text, rests = prompt, cast(list[str], completions)
        else:
            text, rests = self._rendered(prompt, cast(list[Messages], completions))
        alone = tokenize(self.tokenizer, text)
        if not alone:
            raise BadRow("the prompt has no token that the tokenizer knows")
        tokens = [self._tokenize_with_eos(text, alone, rest) for rest in rests]
        whole = [self.bos, *alone] if isinstance(prompt, str) and self.bos not in (None, alone[0]) else alone
        ids, kept = self._last_tokens(whole), [these[: self.max_completion] for these, _ in tokens]
        self._check_room(len(ids), max(map(len, kept)) if kept else self.max_completion)
        cut = any(more or len(these) > self.max_completion for these, more in tokens)
        return Encoded(ids, kept, ids != whole, cut)

    def answer_ids(self, prompt: Text, answer: str) -> list[int]:
        """Tokens of an answer of any length as they would be sampled behind ``prompt``, with their end.

        Raises:
            BadRow: a conversation that the chat template does not take.
        """
        opening = prompt if isinstance(prompt, str) else ""
        if not isinstance(prompt, str) and getattr(self.tokenizer, "chat_template", None):
            opening = self._rendered(prompt, [])[0]
        return self._up_to_end(continuation_tokens(self.tokenizer, opening, answer))[0]

    def _last_tokens(self, ids: list[int]) -> list[int]:
        if self.max_prompt is None or len(ids) <= self.max_prompt:
            return ids
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id and self.max_prompt > 1 else []
        return head + ids[len(ids) - self.max_prompt + len(head) :]

    def _tokenize_with_eos(self, prompt: str, ids: list[int], text: str) -> tuple[list[int], bool]:
        """Tokens of a completion with their end, and whether words stood behind the end."""
        if text.rstrip().endswith(self.tokenizer.eos_token):
            text = text.rstrip()  # white space that a chat template writes behind the end
        ids, more = self._up_to_end(continuation_tokens(self.tokenizer, prompt, text, ids))
        if len(ids) == 1:
            raise BadRow("a completion has no token that the tokenizer knows before its end")
        return ids, more

    def _up_to_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """``ids`` to the first end, one added where there is none, and whether words stood behind it."""
        end = next((i for i, token in enumerate(ids) if token in self.ends), None)
        if end is not None:
            rest = ids[end + 1 :]
            more = bool(rest) and bool(self.tokenizer.decode(rest, skip_special_tokens=True).strip())
            return ids[: end + 1], more
        eos = self.tokenizer.eos_token_id
        return (ids if eos is None or ids[-1:] == [eos] else [*ids, eos]), False

    def _rendered(self, prompt: Messages, completions: Sequence[Messages]) -> tuple[str, list[str]]:
        """The template's text of a prompt and what it adds for each completion.

        As in TRL the prompt ends where its own text, with the opening of an answer, and those of the whole
        conversations part: some templates open an answer with more than they write before one that is there.
        """
        from jinja2 import TemplateError

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
            chats = [prompt + completion for completion in completions]
            wholes = [render(chat, tokenize=False) for chat in chats]
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow(
                f"the tokenizer's chat template does not take the conversation ({first_line(error)})"
            ) from None
        answers = [len(completion) for completion in completions]
        for chat, text, last in zip([prompt, *chats], [alone, *wholes], [int(going_on), *answers]):
            if (lost := words_left_out(chat, text, in_full=last)) is not None:
                raise BadRow(
                    f"the tokenizer's chat template leaves the words of a message out ({short(lost)}): set another "
                    "tokenizer.chat_template, or give plain texts"
                )
        length = _alike([alone, *wholes])
        return alone[:length], [whole[length:] for whole in wholes]

    def _check_room(self, prompt: int, completion: int) -> None:
        if self.context is not None and prompt + completion > self.context:
            lengths = f"a completion of {completion} in the model's context of {self.context}"
            remedy = f"set max_prompt_length={self.context - self.max_completion} or less"
            raise BadRow(f"a prompt of {prompt} tokens leaves no room for {lengths}: {remedy}")


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text and nothing besides."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def continuation_tokens(tokenizer: Any, prompt: str, text: str, prompt_ids: list[int] | None = None) -> list[int]:
    """The token ids of ``text`` behind those of ``prompt``.

    Both are tokenized together, and what stands behind the prompt's own tokens is the text's. (SentencePiece writes a
    space before a text that stands alone, which nobody would sample behind a line break.) Where a token crosses the
    border ("a" and "b" are one token, or a prompt's last blank and the word behind it), the prompt keeps the tokens it
    has alone, since those are what is sampled from, and the text is tokenized apart; if that adds or loses a character,
    as it stands behind a line break.

    Args:
        prompt_ids: the tokens of ``prompt`` alone, if they are known.
    """
    ids = tokenize(tokenizer, prompt) if prompt_ids is None else prompt_ids
    together = tokenize(tokenizer, prompt + text)
    if together[: len(ids)] == ids:
        return together[len(ids) :]
    apart, line_end = tokenize(tokenizer, text), tokenize(tokenizer, "\n")
    wanted = tokenizer.decode(together)
    if tokenizer.decode([*ids, *apart]) == wanted:
        return apart
    behind = tokenize(tokenizer, "\n" + text)
    if behind[: len(line_end)] == line_end:
        behind = behind[len(line_end) :]
        if tokenizer.decode([*ids, *behind]) == wanted:
            return behind
    return apart


def eos_token_ids(tokenizer: Any, generation_config: Any = None) -> list[int]:
    """The tokens that end a sample: the tokenizer's end of sequence, and those that a model's settings name besides.

    Some models end a turn with another token than their tokenizer's end of sequence.
    """
    ends: set[int] = set()
    for named in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        ends.update(named if isinstance(named, list | tuple) else [] if named is None else [named])
    return sorted(map(int, ends))


def context_length(config: Any) -> int | None:
    """The most tokens of a text that a model's configuration says it takes; None where it says nothing."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def as_completion_message(text: str, like_prompt: Text) -> Text:
    """``text`` in the form of its prompt: a conversation of one assistant message, or as it is."""
    return text if isinstance(like_prompt, str) else [{"role": "assistant", "content": text}]


def checked_text(value: Any, what: str) -> Text:
    """A text that is not blank, or messages that are not all blank, without their keys that hold None.

    A message's content may be given in parts, ``[{"type": "text", "text": ...}]``, and is one text from then on.
    """
    if isinstance(value, Mapping):
        raise BadRow(f"{what} is a mapping, {short(value)}: quote the text, or give a list of messages")
    messages = value if isinstance(value, list | tuple) else [{"role": "", "content": value}]
    if value is None or not messages:
        raise BadRow(f"{what} is empty")
    read = []
    for message in messages:
        role, content = (
            [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None] * 2
        )
        content = _of_parts(content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(f"{what} is {short(value)}, neither a text nor messages with a role and a text as content")
        try:
            (role + content).encode()
        except UnicodeEncodeError:
            raise BadRow(f"{what} {short(value)} is not valid Unicode") from None
        read.append({**message, "content": content})
    check_length(sum(len(message["content"]) for message in read), what)
    if _blank(read):
        raise BadRow(f"{what} is empty")
    return value if isinstance(value, str) else [{k: v for k, v in m.items() if v is not None} for m in read]


def _of_parts(content: Any) -> Any:
    """The text of a content in parts that are all texts; any other content as it is."""
    if not isinstance(content, list | tuple) or not content:
        return content
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content  # type: ignore[arg-type]


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
        sides = [as_completion_message(side, prompt) if isinstance(side, str) else side for side in sides]
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
        raise BadRow("there is no prompt, and chosen and rejected have no common beginning: add a column prompt")
    return length


def _alike(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements all of them begin with."""
    lengths = range(1, min(map(len, sequences)) + 1)
    return bisect_left(lengths, True, key=lambda n: any(one[:n] != sequences[0][:n] for one in sequences))


def _blank(text: Text) -> bool:
    return not (text if isinstance(text, str) else "".join(message["content"] for message in text)).strip()
