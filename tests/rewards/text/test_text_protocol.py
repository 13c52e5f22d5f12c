"""call_text_reward, check_text_reward, weighted_sum and text_of: what they let through, and what they refuse."""

import asyncio
import functools
import math
import re

import numpy as np
import pytest
import torch

from diffusion_align.rewards import RewardError, call_text_reward, check_text_reward, text_of, weighted_sum
from diffusion_align.rewards.text.base import TrainerState, extras_of
from tests.helpers.rewarding import refusal

PROMPTS = ["add one and one", "name a fruit", "say hello"]
COMPLETIONS = ["2", "a pear", ""]
IDS = [[5, 1], [6, 7, 1], [1]]
STATE = TrainerState(global_step=3, epoch=1.0, max_steps=12)
NAN = math.nan
HERE = r"\(test_text_protocol.py, line \d+\)"


def call(answer, **columns):
    def probe(prompts, completions, **columns):
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return call_text_reward(probe, PROMPTS, COMPLETIONS, columns)


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ([1.0, 2.0, 3.0], [1, 2, 3]),
        ([1.0, None, 3], [1, NAN, 3]),
        ((None, None, None), [NAN, NAN, NAN]),
        ([True, False, None], [1, 0, NAN]),
        ([torch.tensor(1.5), None, np.float32(2.5)], [1.5, NAN, 2.5]),
        (torch.arange(3, dtype=torch.bfloat16), [0, 1, 2]),
        (np.arange(3), [0, 1, 2]),
    ],
)
def test_documented_answers_become_numbers_on_the_cpu_with_nan_for_none(answer, scores):
    found = call(answer)
    assert found.dtype == (torch.float32 if isinstance(answer, torch.Tensor) else torch.float64)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, torch.tensor(scores, dtype=found.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(  # the others: see the protocol of rewards of images, which is the same code
    ("answer", "sentence"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([None, 2.0], "returned None at index 0"),
        (["good", None, "bad"], "not all numbers"),
        ([[1.0], None, [2.0]], "unequal parts"),
        ([0.0, NAN, 1.0], r"nan for completion 1 \(prompt 'name a fruit'\): .* or None"),
        ([None, 1.0, -math.inf], r"returned -inf for completion 2 \(prompt 'say hello'\)"),
        (KeyError("label"), f"raised KeyError: 'label' {HERE}$"),
        (asyncio.CancelledError(), f"raised CancelledError {HERE}$"),
    ],
)
def test_every_other_answer_is_refused_in_one_sentence_naming_the_reward(answer, sentence):
    said = refusal(call, answer)
    assert said.startswith("reward 'probe' ")
    assert re.search(sentence, said)


def test_a_reward_gets_the_columns_that_it_names_by_name():
    columns = {"answer": ["2", "pear", "hi"], "level": [1, 2, 3]}

    def one(completions, answer):
        return [float(a in c) for c, a in zip(completions, answer, strict=True)]

    def all_of_them(completions, **columns):
        assert sorted(columns) == ["answer", "level", "prompts"]
        return [0.0] * len(completions)

    def optional(*, completions, prompts, level=None, other="nothing"):
        assert (prompts, level, other) == (PROMPTS, [1, 2, 3], "nothing")
        return level

    class Callable:
        def __call__(self, level, completions):
            return level

    class Network(torch.nn.Module):
        def forward(self, completions, level):
            assert not torch.is_grad_enabled()
            return torch.tensor(level).float()

    assert call_text_reward(one, PROMPTS, COMPLETIONS, columns).tolist() == [1, 1, 0]
    assert call_text_reward(all_of_them, PROMPTS, COMPLETIONS, columns).tolist() == [0, 0, 0]
    for reward in (optional, Callable(), Network()):
        assert call_text_reward(reward, PROMPTS, COMPLETIONS, columns).tolist() == [1, 2, 3]


def test_an_option_is_not_replaced_by_a_column_of_its_name():
    def gain(completions, level=1, **columns):
        assert "level" not in columns
        return [float(level)] * len(completions)

    bound = functools.partial(gain, level=7)
    assert call_text_reward(bound, PROMPTS, COMPLETIONS, {"level": [1, 2, 3]}).tolist() == [7, 7, 7]


def test_a_missing_column_is_named_with_those_that_are_there():
    def needy(completions, answer):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"needs 'answer', but the data has 'Answer', 'level': set it as"):
        call_text_reward(needy, PROMPTS, COMPLETIONS, {"level": [1, 2, 3], "Answer": ["", "", ""]})
    with pytest.raises(RewardError, match=r"but the data has only prompts: set it as an option, or add the column$"):
        call_text_reward(needy, PROMPTS, COMPLETIONS, {})


def lengths_and_steps(completion_ids, completions, trainer_state):
    return [len(ids) + trainer_state.global_step / trainer_state.max_steps for ids in completion_ids]


def call_with_extras(reward, columns=None):
    return call_text_reward(
        reward, PROMPTS, COMPLETIONS, columns or {}, completion_ids=IDS, trainer_state=STATE
    ).tolist()


def test_tokens_and_the_state_of_the_run_are_for_rewards_that_name_them():
    class Callable:
        def __call__(self, completions, *, trainer_state, completion_ids):
            return lengths_and_steps(completion_ids, completions, trainer_state)

    class Network(torch.nn.Module):
        def forward(self, completions, completion_ids, trainer_state=None, **columns):
            assert columns == {"prompts": PROMPTS}
            return lengths_and_steps(completion_ids, completions, trainer_state)

    def plain(completions):
        return [1.0] * len(completions)

    def all_columns(completions, **columns):
        assert sorted(columns) == ["answer", "prompts"]
        return [2.0] * len(completions)

    for reward in (lengths_and_steps, Callable(), Network()):
        assert extras_of(reward) == ["completion_ids", "trainer_state"]
        assert call_with_extras(reward) == [2.25, 3.25, 1.25]
    assert extras_of(plain) == extras_of(all_columns) == []
    assert call_with_extras(plain) == [1, 1, 1]
    assert call_with_extras(all_columns, {"answer": [1, 2, 3]}) == [2, 2, 2]


def test_without_tokens_the_default_is_taken_or_the_reward_refused():
    def optional(completions, completion_ids="none", trainer_state="none"):
        assert (completion_ids, trainer_state) == ("none", None)
        return [0.0] * len(completions)

    assert call_text_reward(optional, PROMPTS, COMPLETIONS, {}).tolist() == [0, 0, 0]
    with pytest.raises(RewardError, match=r"'lengths_and_steps' needs 'completion_ids'"):
        call_text_reward(lengths_and_steps, PROMPTS, COMPLETIONS, {}, trainer_state=STATE)


def test_an_option_is_not_replaced_by_tokens_or_the_state():
    bound = functools.partial(lengths_and_steps, trainer_state=TrainerState(1, 0.0, 2))
    assert extras_of(bound) == ["completion_ids"]
    assert call_with_extras(bound) == [2.5, 3.5, 1.5]


def test_a_column_of_the_same_name_is_refused_where_the_tokens_are_meant():
    def any_column(completions, **columns):
        return columns["completion_ids"]

    column = {"completion_ids": [7, 8, 9]}
    with pytest.raises(RewardError, match=r"column 'completion_ids', .*: rename it"):
        call_with_extras(lengths_and_steps, column)
    assert call_with_extras(any_column, column) == [7, 8, 9]


def test_what_does_not_belong_together_is_refused():
    def zero(completions):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"3 completions do not match .*'prompts': 2"):
        call_text_reward(zero, PROMPTS[:2], COMPLETIONS, {})
    with pytest.raises(ValueError, match=r"3 completions do not match .*'answer': 1"):
        call_text_reward(zero, PROMPTS, COMPLETIONS, {"answer": ["x"]})
    with pytest.raises(ValueError, match=r"3 completions do not match .*'completion_ids': 2"):
        call_text_reward(zero, PROMPTS, COMPLETIONS, {}, completion_ids=IDS[:2])
    with pytest.raises(RewardError, match=r"column 'completions', .*: rename it"):
        call_text_reward(zero, PROMPTS, COMPLETIONS, {"completions": COMPLETIONS})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "said"}], "said"),
        ([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "be kind\nhi"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}], "what is it?"),
        ([], ""),
    ],
)
def test_the_words_of_text_and_messages(text, words):
    assert text_of(text) == words


@pytest.mark.parametrize("wrong", [3, None, ["text"], [{"role": "user"}], {"role": "user", "content": "x"}])
def test_neither_text_nor_messages_is_one_sentence(wrong):
    with pytest.raises(RewardError, match="must be text or a list of messages"):
        text_of(wrong)


def test_a_prompt_of_messages_is_shown_as_words():
    def bad(completions):
        return [NAN]

    messages = [{"role": "user", "content": "name a fruit"}]
    with pytest.raises(RewardError, match=r"prompt 'name a fruit'"):
        call_text_reward(bad, [messages], [[{"role": "assistant", "content": "x"}]], {})


def test_weighted_sum_ignores_nan():
    scores = torch.tensor([[1.0, 2.0, NAN], [NAN, NAN, -4.0], [0.5, 0.25, 0.125]], dtype=torch.float64)
    weights = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    expected = torch.tensor([0.0, -8.0, 0.5 - 0.125 + 0.25], dtype=torch.float64)
    torch.testing.assert_close(weighted_sum(scores, weights), expected, rtol=0, atol=1e-15)
    assert weighted_sum(scores.float(), weights).dtype == torch.float32


def test_weighted_sum_refuses_a_sample_that_no_reward_speaks_about():
    scores = torch.tensor([[1.0, NAN], [NAN, NAN]])
    with pytest.raises(RewardError, match=r"returned None for sample 1 \(prompt 'name a fruit'\): at least one"):
        weighted_sum(scores, torch.ones(2), prompts=PROMPTS[:2])
    with pytest.raises(RewardError, match="returned None for sample 1: at least one"):
        weighted_sum(scores, torch.ones(2))
    for weights in (torch.ones(3), torch.ones(()), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"must be \(B, K\)"):
            weighted_sum(scores, weights)


def test_check_text_reward_shows_empty_and_other_completions_in_the_form_of_the_prompts():
    seen = []

    def spy(prompts, completions, answer):
        seen.append(completions)
        return [float(len(text_of(c))) for c in completions]

    scores = check_text_reward(spy, PROMPTS, columns={"answer": [1, 2, 3]})
    assert 0 in scores
    assert scores.max() > 0
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert torch.equal(check_text_reward(spy, chats, columns={"answer": [1, 2, 3]}), scores)
    assert seen[1][0] == [{"role": "assistant", "content": seen[0][0]}]
    assert check_text_reward(spy, PROMPTS, COMPLETIONS, {"answer": [1, 2, 3]}).tolist() == [1, 6, 0]


def test_check_text_reward_gives_the_tokens_of_its_completions():
    seen = []

    def spy(completions, completion_ids, trainer_state):
        seen.append(([text_of(c) for c in completions], completion_ids, trainer_state))
        return [0.0] * len(completions)

    def codes(text):
        return [*map(ord, text), 1]

    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    for prompts in (PROMPTS, chats):
        check_text_reward(spy, prompts, tokenize=codes, trainer_state=STATE)
        [(words, ids, state)] = seen
        assert ids == [codes(text) for text in words]
        assert [1] in ids  # of the empty one
        assert state == STATE
        seen.clear()
    with pytest.raises(RewardError, match="needs 'completion_ids'"):
        check_text_reward(spy, PROMPTS)


def test_check_text_reward_makes_no_tokens_for_nothing():
    def never(text):
        raise AssertionError

    scores = check_text_reward(lambda completions, **columns: [0.0] * len(completions), PROMPTS, tokenize=never)
    assert scores.tolist() == [0, 0, 0]


def test_check_text_reward_refuses_what_call_text_reward_refuses():
    with pytest.raises(RewardError, match="needs 'answer'"):
        check_text_reward(lambda completions, answer: answer, PROMPTS)
    with pytest.raises(RewardError, match="raised IndexError"):  # an empty completion
        check_text_reward(lambda completions: [float(ord(c[0])) for c in completions], PROMPTS)
    with pytest.raises(RewardError, match="must be callable, got int"):
        check_text_reward(3, PROMPTS)
