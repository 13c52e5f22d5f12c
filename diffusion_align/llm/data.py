"""Prompts, preferences and labelled completions as tokens, from rows with TRL's columns.

``prompt``; ``prompt, chosen, rejected`` or ``chosen, rejected``; ``prompt, completion, label``: texts, or conversations
(lists of messages with role and content) that go through the tokenizer's chat template. The other columns stay with
the row, for rewards. Differences from TRL are said where they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

from jinja2 import TemplateError
from pydantic import Field, field_validator, model_validator

from diffusion_align.training.config import Section
from diffusion_align.training.errors import ConfigError
from diffusion_align.training.tables import (
    FILES,
    Layouts,
    Table,
    TableSource,
    check_hub,
    first_rows,
    is_hub,
    listed,
    mapping,
    mapping_problems,
    open_table,
    short,
)

Messages = list[dict[str, Any]]
Text = str | Messages
Row = TypeVar("Row")
_PAIR = {"chosen": "chosen", "rejected": "rejected"}
_PROMPT, _LABEL = {"prompt": "prompt"}, {"label": "label"}
LAYOUTS: dict[str, Layouts] = {
    "prompts": (_PROMPT,),
    "preferences": (_PROMPT | _PAIR | _LABEL, _PROMPT | _PAIR, _PAIR | _LABEL, _PAIR),
    "labels": (_PROMPT | {"completion": "completion"} | _LABEL,),
}
"""The columns of each kind of row, under the names that are looked for by default."""


class TextDataConfig(Section):
    """Where the rows come from."""

    source: str | list[Any] = Field(description=f"a list of rows, a .txt file of prompts, {FILES}")
    split: str = Field("train", min_length=1, description="a dataset's own split")
    columns: dict[str, str] | None = Field(
        None, description="our name -> the source's: prompt, chosen, rejected, completion, label"
    )
    skip_bad_rows: bool = Field(False, strict=True, description="leave rows out that cannot be used")
    max_rows: int | None = Field(
        None, ge=1, description="use the first so many rows only; of a Hub dataset no more than these are downloaded"
    )

    @model_validator(mode="before")
    @classmethod
    def _source_alone(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str | Path | list) else value

    @field_validator("source", mode="before")
    @classmethod
    def _a_place_or_rows(cls, value: Any) -> Any:
        if not isinstance(value, str | Path | list) or value in ("", []):
            raise ValueError(f"give a list of rows, {FILES}")
        return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class PromptRow:
    """A prompt as the source has it, its tokens and the row's other columns."""

    prompt: Text
    ids: list[int]
    columns: dict[str, Any]


@dataclass(frozen=True)
class PreferenceRow:
    """Tokens of one preferred and one or more other completions; ``label`` is P(chosen is preferred)."""

    prompt: Text
    ids: list[int]
    chosen: list[int]
    rejected: list[list[int]]
    label: float = 1.0
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledRow:
    """Tokens of a completion that is desirable or not."""

    prompt: Text
    ids: list[int]
    completion: list[int]
    desirable: bool
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Truncation:
    """How many rows there are, how many of them were shortened, and how many bad ones were left out."""

    rows: int
    prompts: int
    completions: int
    left_out: int = 0

    def __str__(self) -> str:
        cut = f"of {self.rows} rows, {self.prompts} had the prompt cut on the left and {self.completions} a completion"
        return f"{cut} cut on the right" + (f"; left out: {self.left_out} bad rows" if self.left_out else "")


class Rows(NamedTuple, Generic[Row]):
    """The usable rows in the order of the source, and what became of their lengths."""

    rows: list[Row]
    truncation: Truncation


def prompt_rows(
    config: TextDataConfig,
    tokenizer: Any,
    *,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    context_length: int | None = None,
    name: str = "data",
) -> Rows[PromptRow]:
    """The prompts of ``config.source``, ready for ``rollout``; a bare text in a list of rows is a prompt.

    A tokenizer that puts a beginning-of-sequence token before a text by default puts it before a text prompt. Before a
    conversation only the chat template does, as in ``apply_chat_template``.

    Args:
        config: where the rows are.
        tokenizer: of transformers; one without a padding token will do.
        max_completion_length: tokens that have to fit behind the prompt, at least 1.
        max_prompt_length: longer prompts keep their end, and the beginning-of-sequence token.
        context_length: the most tokens of prompt and completion together.
        name: what the setting behind ``config`` is called, for messages.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    encoder = _Encoder(name, tokenizer, max_prompt_length, max_completion_length, context_length)

    def make(cells: dict[str, Any], columns: dict[str, Any]) -> tuple[PromptRow, _Encoded]:
        prompt = _text(cells["prompt"], "the prompt")
        encoded = encoder.encode(prompt, [])
        return PromptRow(prompt, encoded.ids, columns), encoded

    return _rows(config, encoder, LAYOUTS["prompts"], make)


def preference_rows(
    config: TextDataConfig,
    tokenizer: Any,
    *,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    context_length: int | None = None,
    name: str = "data",
) -> Rows[PreferenceRow]:
    """Preferences; ``rejected`` may be a list of several, and a column ``label`` holds P(chosen is preferred).

    Without a column ``prompt``, or with a text there beside conversations, the prompt is what ``chosen`` and every
    ``rejected`` begin with, as in TRL. Of texts it ends with a word; TRL cuts inside words but tokenizes prompt and
    completion together. Conversations that repeat the prompt's messages are taken without them, which TRL does not do.

    Args: as of ``prompt_rows``; longer completions keep their beginning, and the end of sequence as last token.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    encoder = _Encoder(name, tokenizer, max_prompt_length, max_completion_length, context_length)

    def make(cells: dict[str, Any], columns: dict[str, Any]) -> tuple[PreferenceRow, _Encoded]:
        label = _probability(cells.get("label", 1.0))
        sides = [_text(cells["chosen"], "chosen"), *(_text(one, "rejected") for one in _several(cells["rejected"]))]
        if sides[0] in sides[1:]:
            raise _BadRow("chosen and rejected are the same")
        prompt, sides = _split(cells, sides)
        encoded = encoder.encode(prompt, sides)
        chosen, *rejected = encoded.completions
        return PreferenceRow(prompt, encoded.ids, chosen, rejected, label, columns), encoded

    return _rows(config, encoder, LAYOUTS["preferences"], make)


def labelled_rows(
    config: TextDataConfig,
    tokenizer: Any,
    *,
    max_completion_length: int,
    max_prompt_length: int | None = None,
    context_length: int | None = None,
    name: str = "data",
) -> Rows[LabelledRow]:
    """Completions with a ``label``, true or false (or 1 or 0), that says whether they are desirable.

    Args: as of ``prompt_rows``; longer completions keep their beginning, and the end of sequence as last token.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    encoder = _Encoder(name, tokenizer, max_prompt_length, max_completion_length, context_length)

    def make(cells: dict[str, Any], columns: dict[str, Any]) -> tuple[LabelledRow, _Encoded]:
        desirable = _truth(cells["label"])
        completion = _text(cells["completion"], "the completion")
        if isinstance(cells["prompt"], str) and not isinstance(completion, str):
            raise _BadRow("the prompt is a text and the completion a conversation: give both in one form")
        prompt, sides = _split(cells, [completion])
        encoded = encoder.encode(prompt, sides)
        return LabelledRow(prompt, encoded.ids, encoded.completions[0], desirable, columns), encoded

    return _rows(config, encoder, LAYOUTS["labels"], make)


def columns_problems(config: TextDataConfig, kind: str, *, name: str = "data") -> list[str]:
    """Sentences about what can be seen without a tokenizer and without a download; [] if all is well.

    ``kind`` is one of ``LAYOUTS``.
    """
    source = _source(config, name)
    try:
        if not is_hub(source.source):
            _opened(config, source, LAYOUTS[kind], [])
            return []
        check_hub(source)
    except ConfigError as error:
        return error.problems
    return mapping_problems(name, LAYOUTS[kind], config.columns)


def completion_of(text: str, like_prompt: Text) -> Text:
    """``text`` in the form of its prompt: a conversation of one assistant message, or as it is."""
    return text if isinstance(like_prompt, str) else [{"role": "assistant", "content": text}]


class _BadRow(Exception):
    """What is wrong with a row."""


@dataclass(frozen=True)
class _Encoded:
    """Tokens of a prompt and its completions, and whether they were shortened."""

    ids: list[int]
    completions: list[list[int]]
    prompt_cut: bool
    completion_cut: bool


class _Encoder:
    """Texts and conversations to tokens that fit the limits; prompt and completions are tokenized apart."""

    def __init__(
        self, name: str, tokenizer: Any, max_prompt: int | None, max_completion: int, context: int | None
    ) -> None:
        self.name, self.tokenizer = name, tokenizer
        self.max_prompt, self.max_completion, self.context = max_prompt, max_completion, context
        bos, plain, default = tokenizer.bos_token_id, self._tokens("a"), tokenizer("a").input_ids
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

    def encode(self, prompt: Text, completions: Sequence[Text]) -> _Encoded:
        """Tokens of a prompt and its completions, all texts or all conversations."""
        if isinstance(prompt, str):
            text, ends = prompt, cast(list[str], completions)
        else:
            text, ends = self._rendered(prompt, cast(list[Messages], completions))
        whole = self._tokens(text)
        if not whole:
            raise _BadRow("the prompt holds nothing that the tokenizer knows")
        if isinstance(prompt, str) and self.bos is not None and whole[0] != self.bos:
            whole = [self.bos, *whole]
        ids, tokens = self._end_of(whole), [self._ended(end) for end in ends]
        kept = [these if len(these) <= self.max_completion else self._start_of(these) for these in tokens]
        self._check_room(len(ids), max(map(len, kept)) if kept else self.max_completion)
        return _Encoded(ids, kept, ids != whole, kept != tokens)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

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
        ids, eos = self._tokens(text), self.tokenizer.eos_token_id
        if ids in ([], [eos]):
            raise _BadRow("a completion holds nothing that the tokenizer knows before its end")
        return ids if ids[-1] == eos else [*ids, eos]

    def _rendered(self, prompt: Messages, completions: Sequence[Messages]) -> tuple[str, list[str]]:
        """The template's text of a prompt and what it adds for each completion.

        As in TRL the prompt ends where its own text, with the opening of an answer, and those of the whole
        conversations part: some templates open an answer with more than they write before one that is there.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            lack = f"{self.name}: the rows hold conversations but the tokenizer has no chat template"
            raise ConfigError([f"{lack}: give plain texts, or set tokenizer.chat_template"])
        role = prompt[-1]["role"]
        if role not in ("user", "tool", "assistant"):
            raise _BadRow(f"the prompt ends with a message of role {short(role)}: end it with the user's")
        going_on = role == "assistant"
        render = self.tokenizer.apply_chat_template
        try:
            alone = render(prompt, tokenize=False, add_generation_prompt=not going_on, continue_final_message=going_on)
            wholes = [render(prompt + completion, tokenize=False) for completion in completions]
        except (TemplateError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise _BadRow(f"the tokenizer's chat template does not take the conversation ({reason})") from None
        length = _alike([alone, *wholes])
        return alone[:length], [whole[length:] for whole in wholes]

    def _check_room(self, prompt: int, completion: int) -> None:
        if self.context is not None and prompt + completion > self.context:
            lengths = f"a completion of {completion} in the model's context of {self.context}"
            remedy = f"set max_prompt_length={self.context - self.max_completion} or less"
            raise _BadRow(f"a prompt of {prompt} tokens leaves no room for {lengths}: {remedy}")


def _source(config: TextDataConfig, name: str) -> TableSource:
    rows = config.source
    if isinstance(rows, list):
        rows = [{"prompt": row} if isinstance(row, str) else row for row in rows]
    allowed = f"a list of rows, a .txt file of prompts, {FILES}"
    return TableSource(name, rows, config.split, config.max_rows, allowed=allowed, lines="prompt")


def _opened(
    config: TextDataConfig, source: TableSource, layouts: Layouts, problems: list[str]
) -> tuple[Table, dict[str, str]]:
    """The table and its names of our columns, {} if it is empty; what is wrong comes after ``problems``."""
    problems = problems + mapping_problems(source.name, layouts, config.columns)
    try:
        table = open_table(source)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    return table, mapping(source.name, layouts, config.columns, table.names) if table.names else {}


def _rows(
    config: TextDataConfig,
    encoder: _Encoder,
    layouts: Layouts,
    make: Callable[[dict[str, Any], dict[str, Any]], tuple[Row, _Encoded]],
) -> Rows[Row]:
    """What ``make`` makes of the cells, by our names, and of the other columns of each row."""
    name = encoder.name
    source = _source(config, name)
    table, names = _opened(config, source, layouts, encoder.problems())
    made: list[tuple[Row, _Encoded]] = []
    bad: list[str] = []
    for number, row in enumerate(first_rows(table, config.max_rows) if names else ()):
        cells = {ours: row.pop(theirs) for ours, theirs in names.items()}
        try:
            made.append(make(cells, row))
        except _BadRow as problem:
            bad.append(f"{name}: row {number}: {problem}")
    if made and (config.skip_bad_rows or not bad):
        encoded = [one for _, one in made]
        cuts = (sum(one.prompt_cut for one in encoded), sum(one.completion_cut for one in encoded))
        return Rows([row for row, _ in made], Truncation(len(made), *cuts, left_out=len(bad)))
    problems = listed(bad, name)
    if made:
        problems.append(f"{name}: mend the rows above, or set {name}.skip_bad_rows=true to leave them out")
    else:
        problems.append(f"{source} holds no usable row ({len(bad)} bad rows): give at least one")
    raise ConfigError(problems)


def _text(value: Any, what: str) -> Text:
    """A text that is not blank, or messages that are not all blank, without their keys that hold None."""
    messages = value if isinstance(value, list | tuple) else [{"role": "", "content": value}]
    if value is None or not messages:
        raise _BadRow(f"{what} is empty")
    for message in messages:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise _BadRow(f"{what} is {short(value)}, neither a text nor messages with a role and a text as content")
        try:
            "".join(map(str, parts)).encode()
        except UnicodeEncodeError:
            raise _BadRow(f"{what} {short(value)} is not valid Unicode") from None
    if _blank(value):
        raise _BadRow(f"{what} is empty")
    return value if isinstance(value, str) else [{k: v for k, v in m.items() if v is not None} for m in messages]


def _blank(text: Text) -> bool:
    return not (text if isinstance(text, str) else "".join(message["content"] for message in text)).strip()


def _several(rejected: Any) -> Sequence[Any]:
    """The rejected completions of a cell that holds one, or a list of them."""
    if not isinstance(rejected, list | tuple) or (rejected and isinstance(rejected[0], Mapping)):
        return [rejected]
    if not rejected:
        raise _BadRow("rejected is empty")
    return rejected


def _split(cells: Mapping[str, Any], sides: Sequence[Text]) -> tuple[Text, list[Text]]:
    """The prompt of a row and what each side adds to it."""
    prompt = _text(cells["prompt"], "the prompt") if "prompt" in cells else None
    if isinstance(prompt, list):
        sides = [completion_of(side, prompt) if isinstance(side, str) else side for side in sides]
        repeated = len(prompt) if all(side[: len(prompt)] == prompt for side in sides) else 0
        sides = [side[repeated:] for side in sides]
    elif len({isinstance(side, str) for side in sides}) > 1:
        raise _BadRow("some of chosen and rejected are texts and some conversations: give all in one form")
    elif prompt is None or isinstance(sides[0], list):
        length = _shared(sides)
        prompt, sides = sides[0][:length], [side[length:] for side in sides]
    if any(map(_blank, sides)):
        raise _BadRow("a completion adds nothing to the prompt")
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
        raise _BadRow("chosen and rejected do not begin alike and there is no prompt: give a column prompt")
    return length


def _alike(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements all of them begin with."""
    lengths = range(1, min(map(len, sequences)) + 1)
    return bisect_left(lengths, True, key=lambda n: any(one[:n] != sequences[0][:n] for one in sequences))


def _probability(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= 1:
        raise _BadRow(f"label is {short(value)}, not a number from 0 to 1")
    return number


def _truth(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}  # a CSV file holds texts
    found = known.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool | int | float) or found not in (0, 1):
        raise _BadRow(f"label is {short(value)}, not true, false, 1 or 0")
    return bool(found)
