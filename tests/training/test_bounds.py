"""Every setting has a description, every number two bounds, and what overflows is refused by its own name."""

import math
import types
import typing
from typing import Annotated

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from diffusion_align.methods import SHIPPED, method_of
from diffusion_align.training.config import Section

# Bounds and limits that .inf takes away.
MAY_BE_INFINITE = {
    "max_grad_norm",
    "stop_when.kl_above",
    "clip_range_nats",
    "clip_std",
    "advantage_clip",
    "loser_clip",
    "max_winner_error",
    "value_clip",
}


def numbers(model, path=""):
    """(dotted name, the numeric type with its constraints) of every number in a settings class and its sections."""
    for name, field in model.model_fields.items():
        whole = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        for kind in kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers(kind, f"{path}{name}.")
            elif kind in (int, float):
                yield f"{path}{name}", whole, lambda value: value
            elif typing.get_origin(kind) in (tuple, list):
                inner = typing.get_args(kind)
                if {int, float} & {one for arg in inner for one in kinds(arg)}:
                    count = 1 if typing.get_origin(kind) is list else len(inner)
                    yield f"{path}{name}", whole, lambda value, count=count: [value] * count


def kinds(annotation):
    if typing.get_origin(annotation) is Annotated:
        return kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for arg in typing.get_args(annotation) for kind in kinds(arg)]
    return [annotation]


CASES = {
    f"{method}.{name}": (kind, wrap)
    for method in SHIPPED
    for name, kind, wrap in numbers(method_of(method).config_class)
}


def allowed(kind, value):
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError:
        return False
    return True


def sections_of(model):
    inner = [kind for field in model.model_fields.values() for kind in kinds(field.annotation)]
    return [model, *(one for kind in inner if _is_section(kind) for one in sections_of(kind))]


def _is_section(kind):
    return isinstance(kind, type) and issubclass(kind, Section)


@pytest.mark.parametrize("method", SHIPPED)
def test_every_setting_has_a_description(method):
    classes = sections_of(method_of(method).config_class)
    assert len(classes) > 2
    fields = [(one.__name__, name, field) for one in classes for name, field in one.model_fields.items()]
    assert [(section, name) for section, name, field in fields if not field.description] == []


def test_the_walk_finds_numbers_of_every_depth():
    assert {"ddpo.epochs", "ddpo.sampler.eta", "grpo.lora.rank", "dpo.dynamic_beta.hidden"} <= CASES.keys()
    assert {"ddpo.adam_betas", "grpo.reward_weights", "ppo.num_generations", "kto.dataset.max_rows"} <= CASES.keys()
    assert len(CASES) > 150


@pytest.mark.parametrize("case", CASES)
def test_every_number_has_two_finite_bounds(case):
    kind, wrap = CASES[case]
    for value in (1e300, -1e300, 10**12, -(10**12), 10**5000, math.nan, -math.inf):
        assert not allowed(kind, wrap(value)), value
    name = case.partition(".")[2]
    assert allowed(kind, wrap(math.inf)) == (name in MAY_BE_INFINITE)
