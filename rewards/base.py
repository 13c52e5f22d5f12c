"""The reward protocol, and the one place where rewards are called: with copies, in a known thread, answers checked.

A reward scores finished images. Any callable will do::

    def redness(images, prompts, metadata):
        return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

Nothing a reward answers is trusted: `call_reward` checks it at every call, `check_reward` once before training starts.
Rewards for images and text, their checks and their construction all come here, whoever calls them: training, held-out
evaluation, ``compare``, ``pairs``, ``score``, a server, Python. Every end but an answer is a sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import functools
import inspect
import io
import itertools
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from diffusion_align import errors
from diffusion_align.background import LongLivedThread, background
from diffusion_align.errors import RewardError
from diffusion_align.interrupt import Overdue, breakable

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Result = TypeVar("Result")

_PROMPTS = ('a sign that says "stop"', 'a red apple, called "Jonagold"', 'a blue car with the letters "AB"')
_PLAIN = (str, int, float, bool, bytes, type(None))
_local = threading.local()
_asynchronous = LongLivedThread("diffusion-align event loop")  # where this thread has a loop that runs: notebooks
foreign_code = functools.partial(errors.foreign_code, error=RewardError)


class Reward(Protocol):
    """What a reward looks like. Plain functions are rewards; the attributes below are optional.

    ``name: str`` is what logs and errors call it; ``differentiable: bool`` (False when absent) promises that the
    scores carry a gradient with respect to ``images``; ``to(device)`` moves whatever model it holds.
    """

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor | Sequence[float] | np.ndarray:
        """One score per image, (B,); more is better. ``images`` is float (B, 3, H, W), multiples of 1/255 in [0, 1]."""
        ...


def call_reward(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    *,
    differentiable: bool = False,
) -> Tensor:
    """Scores of one batch, (B,) on the CPU, checked: exactly B of them and every one finite.

    float32 where the reward returns that or less, else float64. It gets copies: what it changes in place is its own.

    Without gradients the images are rounded to 8 bits, as their files hold them: training, a reward behind HTTP and
    a later look at the saved files then give one and the same score.

    Gradients are off unless ``differentiable=True``, which only a reward
    with ``differentiable = True`` accepts; the scores then keep their graph.

    Raises:
        RewardError: the reward raised, or answered a wrong type, shape or length, or a value that is not finite.
        ValueError: images, prompts and metadata do not belong together.
    """
    import torch

    name, batch = reward_name(reward), len(images)
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if not len(prompts) == len(metadata) == batch:
        raise ValueError(f"{batch} images, {len(prompts)} prompts and {len(metadata)} metadata entries do not match")
    if differentiable and not getattr(reward, "differentiable", False):
        raise RewardError(no_gradient(name))

    if not differentiable:
        images = (images.detach().float() * 255).round().clamp(0, 255) / 255

    def called() -> Tensor:
        with torch.set_grad_enabled(differentiable):
            return ask_reward(reward, images, prompts, metadata)

    scores = in_its_thread(reward, called)
    if differentiable and images.requires_grad and not scores.requires_grad:
        raise RewardError(f"reward '{name}' says it is differentiable but its scores carry no gradient")
    return scores if differentiable else scores.detach()


def no_gradient(name: str) -> str:
    """The sentence about a reward that has none."""
    return f"reward '{name}' is not differentiable: choose one that is, or train it with DDPO"


def ask_reward(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """Scores (B,) on the CPU as ``as_scores`` has them, finite; called with copies, its graph kept.

    What every call of a reward for images comes to, those inside of other rewards too. A reward may leave out
    ``metadata``, or take it by that name alone.

    Raises:
        RewardError: see `call_reward`.
    """
    name = reward_name(reward)
    place = metadata_place(parameters_of(reward))
    more = [list(metadata)] if place == "third" else []
    named = {"metadata": list(metadata)} if place == "named" else {}
    answer = in_its_thread(reward, lambda: answer_of(reward, images, list(prompts), *more, **named))
    with foreign_code(f"reward '{name}' returned what cannot be read: "):
        scores = as_scores(answer, len(images), name)
    check_finite(scores, name, lambda i: f"image {i} (prompt {str(prompts[i])[:80]!r})")
    return scores


def metadata_place(parameters: Sequence[inspect.Parameter] | None) -> str | None:
    """How a reward of these parameters takes its metadata: as the "third" argument, "named", or not at all (None).

    A third one that has a default is metadata if that is None or its name says so, and an option otherwise.
    """
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return "third"
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) > 2 and (
        positional[2].default in (inspect.Parameter.empty, None) or "meta" in positional[2].name
    ):
        return "third"
    return "named" if any(p.name == "metadata" and p.kind is p.KEYWORD_ONLY for p in parameters) else None


def reward_parts(reward: Reward) -> dict[str, Reward]:
    """Name -> each of the K rewards that ``reward`` sums (see `combine`), or itself alone; equal names get numbers."""
    parts = list(getattr(reward, "parts", ())) if _is_sum(reward) else [reward]
    names = [reward_name(part) for part in parts]
    named: dict[str, Reward] = {}
    for name, part in zip(names, parts, strict=True):
        others = (f"{name}_{number}" for number in itertools.count(2))
        named[next(one for one in itertools.chain([name], others) if one not in named)] = part
    return named


def part_weights(reward: Reward) -> Tensor:
    """(K,) float64: what the scores of ``reward_parts`` are multiplied with, in their dtype, before they are summed."""
    import torch

    return torch.tensor(list(getattr(reward, "weights", ())) if _is_sum(reward) else [1.0], dtype=torch.float64)


def _is_sum(reward: Any) -> bool:
    """Whether it is a `combine.Combined`; rewards of your own may have parts and weights of their own."""
    return getattr(reward, "is_weighted_sum", False) is True


def to_uint8(images: Tensor) -> Tensor:
    """Images as files hold them, uint8 (B, H, W, 3) on the CPU, from float (B, 3, H, W) in [0, 1]; no gradient.

    Rounded as diffusers does; what lies outside [0, 1] is cut off.
    """
    import torch

    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def without_info(answer: Any) -> Any:
    """Of TRL's ``(scores, info)`` the scores; any other answer as it is."""
    return answer[0] if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict) else answer


def as_scores(answer: Any, batch: int, name: str, subject: str = "images") -> Tensor:
    """``answer`` of a reward as (B,) on the CPU; its graph is kept, nothing is broadcast.

    float32 of what is float32 or narrower; float64 of all else, so of Python's own numbers. Of TRL's ``(scores, info)``
    the scores. ``subject`` says in sentences what the B things are.

    Raises:
        RewardError: not numbers, or not of shape (B,).
    """
    import numpy as np
    import torch
    from torch import Tensor

    wanted = f"return a tensor, a list of floats or a numpy array of shape ({batch},)"
    answer = without_info(answer)
    if isinstance(answer, list | tuple):
        if any(value is None for value in answer):
            raise RewardError(f"reward '{name}' returned None at index {list(answer).index(None)}: {wanted}")
        if answer and all(isinstance(value, Tensor) and value.ndim == 0 for value in answer):
            answer = torch.stack(list(answer))  # keeps the graph, which a conversion through numpy would cut
    if not isinstance(answer, Tensor):
        if not isinstance(answer, list | tuple | np.ndarray) and not hasattr(answer, "__array__"):
            raise RewardError(f"reward '{name}' returned {type(answer).__name__}: {wanted}")
        kind = type(answer).__name__
        try:
            array = np.asarray(answer)
            if array.dtype.kind == "O" and array.ndim == 1 and all(isinstance(v, Real | Decimal) for v in array):
                array = array.astype(np.float64)
        except Exception as error:
            raise RewardError(f"reward '{name}' returned a {kind} of unequal parts: {wanted}") from error
        if array.dtype.kind not in "biufc":
            raise RewardError(f"reward '{name}' returned a {kind} that is not all numbers: {wanted}")
        narrow = array.dtype.kind == "f" and array.dtype.itemsize <= 4
        answer = torch.from_numpy(
            array if array.dtype.kind == "c" else array.astype("float32" if narrow else "float64")
        )
    if answer.is_complex():
        raise RewardError(f"reward '{name}' returned complex numbers: {wanted}")
    if answer.layout != torch.strided or answer.is_meta or answer.is_quantized:
        odd = "meta" if answer.is_meta else "quantized" if answer.is_quantized else "sparse or nested"
        raise RewardError(f"reward '{name}' returned a {odd} tensor: {wanted}")
    if answer.ndim != 1:
        raise RewardError(f"reward '{name}' returned shape {tuple(answer.shape)} for {batch} {subject}: {wanted}")
    if len(answer) != batch:
        hint = "; a single value is not broadcast" if len(answer) == 1 else ""
        scores = "1 score" if len(answer) == 1 else f"{len(answer)} scores"
        raise RewardError(f"reward '{name}' returned {scores} for {batch} {subject}: {wanted}{hint}")
    narrow = answer.is_floating_point() and answer.dtype.itemsize <= 4
    # A copy: the reward may reuse its buffer at the next call.
    return answer.to("cpu", torch.float32 if narrow else torch.float64, copy=True)


def check_finite(scores: Tensor, name: str, where: Callable[[int], str], otherwise: str = "") -> None:
    """RewardError at the first of scores (B,) that is not finite or beyond float32; ``where(i)`` says what it is of."""
    import torch

    good = scores.detach().abs() <= torch.finfo(torch.float32).max
    if not good.all():
        first = int((~good).nonzero()[0])
        raise RewardError(
            f"reward '{name}' returned {scores[first].item()} for {where(first)}: every score must be finite{otherwise}"
        )


def check_reward(
    reward: Reward,
    *,
    image_size: int | tuple[int, int],
    device: str | torch.device = "cpu",
    prompts: Sequence[str] | None = None,
    metadata: Sequence[dict[str, Any]] | None = None,
) -> Tensor:
    """Scores (3,) of a dummy batch (a flat grey image, a ramp, noise): run once before training starts.

    Args:
        image_size: side in pixels, or (height, width), of the images to come.
        prompts, metadata: all the real ones, for a reward that reads them. Three are scored; all are shown to a
            reward with a method ``check_prompts(prompts, metadata)``. The global RNG is not touched.

    Raises:
        RewardError: see `call_reward`.
    """
    import torch

    if not callable(reward):
        raise RewardError(f"a reward must be callable, got {type(reward).__name__}")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, width).expand(3, height, width)
    images = torch.stack([torch.full_like(noise, 0.5), ramp, noise]).to(device)
    check_prompts(reward, prompts or (), metadata or [{} for _ in prompts or ()])
    texts = [(prompts or _PROMPTS)[i % len(prompts or _PROMPTS)] for i in range(3)]
    notes = [dict((metadata or [{}])[i % len(metadata or [{}])]) for i in range(3)]
    return call_reward(reward, images, texts, notes)


def check_prompts(reward: Any, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
    """Let a reward look at the prompts that it will score, if it has a method ``check_prompts``.

    Raises:
        RewardError: it cannot score them.
    """
    look = getattr(reward, "check_prompts", None)
    if look is None:
        return

    def called() -> None:
        with foreign_code(f"reward '{reward_name(reward)}' refused the prompts: "):
            look(copied(list(prompts)), copied(list(metadata)))

    in_its_thread(reward, called)


def parameters_of(reward: Any) -> list[inspect.Parameter] | None:
    """What a reward, or what builds one, can be called with; None for a builtin that does not say."""
    torch = sys.modules.get("torch")  # where it is not imported, nothing is a module of it
    is_module = torch is not None and isinstance(reward, torch.nn.Module)
    target = reward.forward if is_module else reward  # whose __call__ takes anything
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None


def reward_name(reward: Any) -> str:
    """The name of a reward: its ``name`` attribute, else the function's or the class's name."""
    if isinstance(getattr(reward, "name", None), str):
        return reward.name
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return getattr(reward, "__name__", type(reward).__name__)


def scored_by(reward: Any) -> str:
    """What scores: the reward's name and, where its attribute ``scorer`` says so, the network that it runs."""
    scorer = getattr(reward, "scorer", None)
    return f"{reward_name(reward)}: {scorer}" if isinstance(scorer, str) and scorer else reward_name(reward)


def runs_in_background(reward: Any) -> bool:
    """Whether every call of ``reward`` is made in the long-lived thread: its attribute ``background``."""
    return getattr(reward, "background", False) is True


def in_its_thread(reward: Any, function: Callable[[], Result]) -> Result:
    """``function()`` in the thread where ``reward`` is called: this one, or the long-lived one; gradients as here."""
    import torch

    if not runs_in_background(reward):
        return function()
    gradients = torch.is_grad_enabled()  # each thread has its own switch

    def called() -> Result:
        with torch.set_grad_enabled(gradients):
            return function()

    with _breakable(reward):
        return background.run(called)


def answer_of(reward: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
    """What a reward answers, called here and now with copies of its arguments; what it awaits is waited for.

    Raises:
        RewardError: it raised, or closed a standard stream.
    """
    name = reward_name(reward)
    positional, by_name = map(copied, arguments), {key: copied(value) for key, value in named.items()}
    were_closed = _closed_streams()
    with _breakable(reward), foreign_code(f"reward '{name}' raised "):
        try:
            answer = reward(*positional, **by_name)
            if inspect.isawaitable(answer):
                answer = _awaited(answer)
        finally:
            closed = _closed_streams() - were_closed
            _reopen(closed)
    if closed:
        raise RewardError(f"reward '{name}' closed {' and '.join(sorted(closed))}: a reward must leave it open")
    return answer


@contextlib.contextmanager
def _breakable(reward: Any) -> Iterator[None]:
    """Inside, what does not come back is abandoned once a run was interrupted and its grace period is over."""
    try:
        with breakable():
            yield
    except Overdue as error:
        raise RewardError(f"reward '{reward_name(reward)}' did not answer when the run was interrupted") from error


def copied(value: Any) -> Any:
    """A copy that shares nothing that can be changed, item by item of a list; what cannot be copied is as it is."""
    if isinstance(value, _PLAIN):
        return value
    from torch import Tensor

    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    try:
        return copy.deepcopy(value)
    except Exception:
        return {key: copied(one) for key, one in value.items()} if type(value) is dict else value


def _awaited(answer: Awaitable[Any]) -> Any:
    """The result of an awaitable, in an event loop that is kept: sessions may belong to it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return _asynchronous.run(_awaited, answer)
    if getattr(_local, "loop", None) is None or _local.process != os.getpid():
        _local.loop, _local.process = asyncio.new_event_loop(), os.getpid()
    task = asyncio.ensure_future(answer, loop=_local.loop)
    try:
        return _local.loop.run_until_complete(task)
    except BaseException:
        if not task.done():
            task.cancel()
            with contextlib.suppress(BaseException):
                _local.loop.run_until_complete(task)
        raise


def _closed_streams() -> set[str]:
    return {name for name in ("stdout", "stderr") if _is_closed(getattr(sys, name))}


def _is_closed(stream: Any) -> bool:
    try:
        if stream.closed:
            return True
        os.fstat(stream.fileno())
    except OSError as error:
        return error.errno == errno.EBADF
    except Exception:  # nothing, or something without a file behind it
        return False
    return False


def _reopen(names: set[str]) -> None:
    """So that an error can still be printed; only where the file behind a closed stream is there."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if name in names:
            with contextlib.suppress(OSError):
                os.fstat(number)
                file = io.FileIO(number, "w", closefd=False)
                setattr(sys, name, io.TextIOWrapper(file, "utf-8", errors="backslashreplace", write_through=True))
