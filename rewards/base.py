"""The reward protocol, and the two functions through which every reward is called.

A reward scores finished pictures. Any callable will do::

    def redness(images, prompts, metadata):
        return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

Nothing a reward answers is trusted: `call_reward` checks it at every call, `check_reward` once before training starts.
"""

import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_align.interrupt import Overdue, breakable

_PROMPTS = ('a sign that says "stop"', 'a red apple, called "Jonagold"', 'a blue car with the letters "AB"')


class RewardError(ValueError):
    """A reward that cannot be built, raised, or answered something other than one finite score a picture."""


class Reward(Protocol):
    """What a reward looks like. Plain functions are rewards; the attributes below are optional.

    ``name: str`` is what logs and errors call it; ``differentiable: bool`` (False when absent) promises that the
    scores carry a gradient with respect to ``images``; ``to(device)`` moves whatever model it holds.
    """

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> Tensor | Sequence[float] | np.ndarray:
        """One score a picture, (B,); more is better. ``images`` is float (B, 3, H, W), multiples of 1/255 in [0, 1]."""
        ...


def reward_name(reward: Any) -> str:
    """The name of a reward: its ``name`` attribute, else the function's or the class's name."""
    if isinstance(getattr(reward, "name", None), str):
        return reward.name
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    return getattr(reward, "__name__", type(reward).__name__)


def call_reward(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    *,
    differentiable: bool = False,
) -> Tensor:
    """Scores of one batch, float32 (B,) on the CPU, checked: exactly B of them and every one finite.

    Without gradients the pictures are rounded to 8 bits, as their files hold them: training, a reward behind HTTP and
    a later look at the saved files then give one and the same score.

    Gradients are off (in this thread, so it may run in a worker) unless ``differentiable=True``, which only a reward
    with ``differentiable = True`` accepts; the scores then keep their graph.

    Raises:
        RewardError: the reward raised, or answered a wrong type, shape or length, or a value that is not finite.
        ValueError: images, prompts and metadata do not belong together.
    """
    name, batch = reward_name(reward), len(images)
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images must be float (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
    if not len(prompts) == len(metadata) == batch:
        raise ValueError(f"{batch} images, {len(prompts)} prompts and {len(metadata)} metadata entries do not match")
    if differentiable and not getattr(reward, "differentiable", False):
        raise RewardError(f"reward '{name}' is not differentiable: choose one that is, or train it with DDPO")

    if not differentiable:
        images = (images.detach().float() * 255).round().clamp(0, 255) / 255
    with torch.set_grad_enabled(differentiable):
        try:
            with breakable():
                answer = reward(images, list(prompts), list(metadata))
        except RewardError:
            raise
        except Overdue as error:
            raise RewardError(f"reward '{name}' did not answer when the run was asked to stop") from error
        except Exception as error:
            raise RewardError(f"reward '{name}' raised {describe_exception(error)}") from error
        scores = as_scores(answer, batch, name)

    finite = torch.isfinite(scores)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise RewardError(
            f"reward '{name}' returned {scores[first].item()} for image {first} (prompt {str(prompts[first])[:80]!r}): "
            "every score must be finite"
        )
    if differentiable and images.requires_grad and not scores.requires_grad:
        raise RewardError(f"reward '{name}' says it is differentiable but its scores carry no gradient")
    return scores if differentiable else scores.detach()


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
    """(K,) float32: what the scores of ``reward_parts`` are multiplied with before they are summed."""
    return torch.tensor(list(getattr(reward, "weights", ())) if _is_sum(reward) else [1.0])


def _is_sum(reward: Any) -> bool:
    """Whether it is a `combine.Combined`; rewards of your own may have parts and weights of their own."""
    return getattr(reward, "is_weighted_sum", False) is True


def call_reward_parts(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> Tensor:
    """Scores (B, K) of ``reward_parts``, each checked as ``call_reward`` does; without gradients."""
    parts = reward_parts(reward).values()
    return torch.stack([call_reward(part, images, prompts, metadata) for part in parts], dim=1)


def to_uint8(images: Tensor) -> Tensor:
    """Pictures as files hold them, uint8 (B, H, W, 3) on the CPU, from float (B, 3, H, W) in [0, 1]; no gradient.

    Rounded as diffusers does; what lies outside [0, 1] is cut off.
    """
    return (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def as_scores(answer: Any, batch: int, name: str, subject: str = "images") -> Tensor:
    """``answer`` of a reward as float32 (B,) on the CPU; its graph is kept, nothing is broadcast.

    ``subject`` says in sentences what the B things are.

    Raises:
        RewardError: not numbers, or not of shape (B,).
    """
    wanted = f"return a tensor, a list of floats or a numpy array of shape ({batch},)"
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
        raise RewardError(f"reward '{name}' returned a pair (scores, info): return the scores alone")
    if isinstance(answer, list | tuple):
        if any(value is None for value in answer):
            raise RewardError(f"reward '{name}' returned None at index {list(answer).index(None)}: {wanted}")
        if answer and all(isinstance(value, Tensor) and value.ndim == 0 for value in answer):
            answer = torch.stack(list(answer))  # keeps the graph, which a conversion through numpy would cut
    if not isinstance(answer, Tensor):
        if not isinstance(answer, list | tuple | np.ndarray):
            raise RewardError(f"reward '{name}' returned {type(answer).__name__}: {wanted}")
        try:
            array = np.asarray(answer)
        except Exception as error:
            raise RewardError(
                f"reward '{name}' returned a {type(answer).__name__} of unequal parts: {wanted}"
            ) from error
        if array.dtype.kind not in "biuf":
            raise RewardError(f"reward '{name}' returned a {type(answer).__name__} that is not all numbers: {wanted}")
        answer = torch.from_numpy(array.astype(np.float32))
    if answer.is_complex():
        raise RewardError(f"reward '{name}' returned complex numbers: {wanted}")
    if answer.ndim != 1:
        raise RewardError(f"reward '{name}' returned shape {tuple(answer.shape)} for {batch} {subject}: {wanted}")
    if len(answer) != batch:
        hint = "; a single value is not broadcast" if len(answer) == 1 else ""
        scores = "1 score" if len(answer) == 1 else f"{len(answer)} scores"
        raise RewardError(f"reward '{name}' returned {scores} for {batch} {subject}: {wanted}{hint}")
    return answer.to("cpu", torch.float32, copy=True)  # a copy: the reward may reuse its buffer at the next call


def check_reward(
    reward: Reward,
    *,
    image_size: int | tuple[int, int],
    device: str | torch.device = "cpu",
    prompts: Sequence[str] | None = None,
    metadata: Sequence[dict[str, Any]] | None = None,
) -> Tensor:
    """Scores (3,) of a dummy batch (a flat grey picture, a ramp, noise): run once before training starts.

    Args:
        image_size: side in pixels, or (height, width), of the pictures to come.
        prompts, metadata: all the real ones, for a reward that reads them. Three are scored; all are shown to a
            reward with a method ``check_prompts(prompts, metadata)``. The global RNG is not touched.

    Raises:
        RewardError: see `call_reward`.
    """
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
    """Let a reward look at the prompts that it will be asked about, if it has a method ``check_prompts``.

    Raises:
        RewardError: it cannot score them.
    """
    look = getattr(reward, "check_prompts", None)
    if look is None:
        return
    try:
        look(prompts, metadata)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward '{reward_name(reward)}' refused the prompts: {describe_exception(error)}") from error


def parameters_of(reward: Any) -> list[inspect.Parameter] | None:
    """What a reward, or what builds one, can be called with; None for a builtin that does not say."""
    target = reward.forward if isinstance(reward, nn.Module) else reward  # whose __call__ takes anything
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return None


def describe_exception(error: BaseException) -> str:
    """``TypeError: the first line of its message``, for one-sentence errors."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
