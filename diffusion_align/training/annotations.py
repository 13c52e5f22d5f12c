"""What a setting's annotation allows."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any

from pydantic import BaseModel


def section_of(annotation: Any) -> type[Any] | None:
    """The section of settings that a field may hold, if it may hold one."""
    kinds = kinds_of(annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def kinds_of(annotation: Any) -> list[Any]:
    """The types that a union stands for, without what is only annotated."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return kinds_of(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for one in typing.get_args(annotation) for kind in kinds_of(one)]
    return [annotation]
