"""Prompts that a function gives: a fixed list, the same for every process and on resume."""

import random

import numpy as np
import pytest
import torch

from diffusion_align.data.prompt_functions import rows_of_calls
from diffusion_align.data.prompts import load_prompts
from diffusion_align.errors import UserError


def drawn():
    return f"{random.random():.6f} {np.random.random():.6f} {torch.rand(()):.6f}", {"side": random.choice("ab")}  # noqa: NPY002


def test_the_list_is_the_same_every_time_and_leaves_random_numbers_alone():
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    before = drawn()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)  # noqa: NPY002
    first = rows_of_calls(drawn, 5)
    assert drawn() == before
    assert rows_of_calls(drawn, 5) == first
    assert len({row["prompt"] for row in first}) == 5
    assert all(row.keys() == {"prompt", "side"} for row in first)


def test_how_many_and_what_columns():
    assert len(load_prompts({"source": drawn, "max_prompts": 7})) == 7
    assert len(load_prompts(drawn)) == 1000
    assert load_prompts(lambda: ("a cat", {"n": 2})) == [("a cat", {"n": 2})]
    assert load_prompts({"source": lambda: {"what": "a cat", "n": 2}, "columns": {"prompt": "what"}}) == [
        ("a cat", {"n": 2})
    ]
    talk = [{"role": "user", "content": "hi"}]
    assert rows_of_calls(lambda: talk, 3) == [{"prompt": talk}]


def test_metadata_that_are_arrays_are_reported_where_rows_are_read():
    with pytest.raises(UserError, match="row 0: 'box' holds"):
        load_prompts({"source": lambda: ("a cat", {"box": np.arange(4)}), "max_prompts": 2})


@pytest.mark.parametrize("wrong", [None, 3, ("a", 3), ("a", {}, 1), {"text": "a"}, [], ["a", "b"]])
def test_what_is_no_prompt(wrong):
    with pytest.raises(UserError, match=r"the function <lambda> returned .*: let it return a prompt, or"):
        load_prompts(lambda: wrong)


def test_a_generator_function_is_to_be_called():
    def one_after_the_other():
        yield from "ab"

    with pytest.raises(UserError, match=r"returned an iterator: .* one_after_the_other\(\)$"):
        load_prompts(one_after_the_other)
    assert len(load_prompts(one_after_the_other())) == 2


def test_a_function_that_fails():
    with pytest.raises(UserError, match="the function <lambda> raised ZeroDivisionError"):
        load_prompts(lambda: 1 / 0)
