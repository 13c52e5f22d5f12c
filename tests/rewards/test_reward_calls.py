"""The one way in which rewards are called: with copies, in one thread, and whatever they do is a sentence."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from diffusion_align.background import background
from diffusion_align.data.text_rows import PromptRow
from diffusion_align.interrupt import InterruptFlag
from diffusion_align.llm.collection import WeightedRewards
from diffusion_align.pipelines.pairs import ImageCandidates
from diffusion_align.pipelines.scoring import score_images
from diffusion_align.report.grids import to_pil
from diffusion_align.rewards import IMAGES as IMAGES_KIND
from diffusion_align.rewards import (
    RewardError,
    build_reward,
    build_text_reward,
    call_reward,
    call_text_reward,
    check_reward,
    declare,
)
from diffusion_align.rewards.base import check_prompts, reward_name, reward_parts, runs_in_background
from diffusion_align.training.collection import BatchScores
from tests.helpers.rewarding import refusal

IMAGES = torch.randint(256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)) / 255
PROMPTS = ["a", "b", "c", "d"]
BACKGROUND = [False, True]


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


def noted(images, prompts, metadata):
    return [m["tags"]["n"] + len(p) for m, p in zip(metadata, prompts)]


def spoils(images, prompts, metadata):
    images.mul_(0)
    prompts[:] = ["spoilt"] * len(prompts)
    for one in metadata:
        one["tags"]["n"] = -1
        one.pop("tags")
    metadata.clear()
    return [0.0] * len(images)


def notes():
    shared = {"tags": {"n": 1}}
    return [shared, shared, {"tags": {"n": 2}}, {"tags": {"n": 3}}]


def scores_of_parts(reward, images, prompts, metadata):
    """(B, K): each part asked by itself, as training does."""
    return torch.stack([call_reward(part, images, prompts, metadata) for part in reward_parts(reward).values()], dim=1)


def every_path(reward):
    """Scores of the four images by each way in which a reward is called without a model."""
    images, prompts, metadata = IMAGES.clone(), list(PROMPTS), notes()
    drawn = to_pil(images)
    yield "training", scores_of_parts(reward, images, prompts, metadata).sum(1)
    yield "evaluation", call_reward(reward, images, prompts, metadata)
    yield "score", score_images(reward, drawn, prompts, metadata)
    candidates = ImageCandidates("emoji-sd", steps=None, guidance_scale=None, eta=None)
    candidates.reward, candidates.pipeline = reward, lambda texts, seed, **_: SimpleNamespace(images=[drawn[seed]])
    found = [candidates.sample(p, m, [i])[1][0] for i, (p, m) in enumerate(zip(prompts, metadata))]
    yield "pairs", torch.tensor(found)
    yield "directly", reward(images, prompts, metadata)
    assert torch.equal(images, IMAGES)
    assert prompts == PROMPTS
    assert metadata == notes()


@pytest.mark.parametrize("in_background", BACKGROUND)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_reward_that_changes_what_it_is_given_changes_nothing_for_others(first, in_background):
    parts = [brightness, noted]
    parts.insert(first, {"name": spoils, "background": in_background})
    wanted = brightness(IMAGES, PROMPTS, notes()) + torch.tensor(noted(IMAGES, PROMPTS, notes()))
    for path, found in every_path(build_reward(parts)):
        torch.testing.assert_close(found.float(), wanted, msg=path)


def test_images_shown_and_a_scaled_reward_are_copies_too():
    images = IMAGES.clone()
    both = build_reward([{"name": spoils, "scale": 2.0}, {"name": "combine", "rewards": [spoils, brightness]}])
    for _ in range(2):
        torch.testing.assert_close(call_reward(both, images, PROMPTS, notes()).float(), brightness(IMAGES, [], []))
    check_prompts(SimpleNamespace(check_prompts=lambda p, m: (p.clear(), m[0].clear())), PROMPTS, known := notes())
    assert known == notes()


def test_what_cannot_be_copied_is_passed_on():
    lock = threading.Lock()
    metadata = [{"lock": lock, "tags": [1]}] * 4

    def looks(images, prompts, metadata):
        assert all(m["lock"] is lock for m in metadata)
        metadata[0]["tags"].append(2)
        return [float(len(m["tags"])) for m in metadata]

    assert call_reward(looks, IMAGES, PROMPTS, metadata).tolist() == [2, 1, 1, 1]
    assert metadata[0]["tags"] == [1]


ROWS = [
    PromptRow([{"role": "user", "content": "one"}], [], {"answer": ["1"], "notes": {"n": 1}}),
    PromptRow([{"role": "user", "content": "two"}], [], {"answer": ["2"], "notes": {"n": 2}}),
]


def spoils_text(prompts, completions, answer, notes, completion_ids):
    for conversation, completion in zip(prompts, completions):
        conversation[0]["content"] = completion[0]["content"] = "spoilt"
    answer[0].append("spoilt")
    notes[0].pop("n")
    completion_ids[0].clear()
    scores = [0.0] * len(completions)
    for column in (prompts, answer, notes, completion_ids):
        column.clear()
    return scores


def matches(prompts, completions, answer, notes, completion_ids):
    return [
        float(c[0]["content"] in a) + n["n"] + len(p[0]["content"]) + len(ids)
        for p, c, a, n, ids in zip(prompts, completions, answer, notes, completion_ids)
    ]


@pytest.mark.parametrize("functions", [[spoils_text, matches], [matches, spoils_text]])
def test_a_text_reward_that_changes_what_it_is_given_changes_nothing_for_others(functions):
    rewards, ids = WeightedRewards(functions, torch.ones(2)), [[1, 2], [3]]
    for _ in range(2):
        scores = rewards.scores(ROWS, ["1", "x"], ids)
        assert rewards.total(ROWS, scores).tolist() == [1 + 1 + 3 + 2, 0 + 2 + 3 + 1]
    assert ids == [[1, 2], [3]]
    assert ROWS[0].prompt == [{"role": "user", "content": "one"}]
    assert ROWS[0].columns == {"answer": ["1"], "notes": {"n": 1}}


# -- threads -----------------------------------------------------------------------------------------------------------


class Batches(BatchScores):
    """Without a run."""

    def __init__(self):
        def raise_together(failure, kind):
            if failure is not None:
                raise failure

        processes = SimpleNamespace(
            stop_if_interrupted=lambda *, failed: failed,
            raise_together=raise_together,
            gather_in_order=lambda parts: parts,
        )
        super().__init__(processes, RewardError)


def collected(reward, batches=3):
    """Scores of some batches, as an epoch has them."""
    with Batches() as scoring:
        for _ in range(batches):
            assert scoring.go_on()
            scoring.submit([(runs_in_background(reward), lambda: call_reward(reward, IMAGES, PROMPTS, notes()))])
        return scoring.gather()


class Sqlite:
    """Keeps a connection, which sqlite3 lets only one thread use."""

    def __init__(self):
        self.connection = None

    def __call__(self, images, prompts, metadata):
        if self.connection is None:
            self.connection = sqlite3.connect(":memory:")
            self.connection.execute("create table scores (n)")
        self.connection.execute("insert into scores values (1)")
        return [self.connection.execute("select count(*) from scores").fetchone()[0]] * len(images)


class EventLoop:
    """Asks for this thread's event loop, which only the main one has, unless it was made; it is kept."""

    def __call__(self, images, prompts, metadata):
        try:
            loop = asyncio.get_event_loop()
        except RuntimeError:
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
        return [loop.run_until_complete(asyncio.sleep(0, result=1.0))] * len(images)


class Alarm:
    """Bounds its own time by a signal, whose handlers belong to the main thread."""

    def __call__(self, images, prompts, metadata):
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(5)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        return [1.0] * len(images)


def made_at_import(images, prompts, metadata):
    return [CONNECTION.execute("select 2").fetchone()[0]] * len(images)


CONNECTION = sqlite3.connect(":memory:")


@pytest.mark.filterwarnings("ignore:There is no current event loop")
@pytest.mark.parametrize("make", [Sqlite, EventLoop, Alarm, lambda: made_at_import])
def test_what_wants_one_thread_or_the_main_one_runs(make):
    reward = build_reward(make())
    check_reward(reward, image_size=8)
    for _ in range(2):  # epochs
        assert collected(reward).shape == (12, 1)
    call_reward(reward, IMAGES, PROMPTS, notes())  # evaluation
    score_images(reward, to_pil(IMAGES), PROMPTS)


@pytest.mark.parametrize("make", [Sqlite, EventLoop])
def test_in_the_background_it_is_one_thread_the_check_included(make):
    reward = build_reward({"name": make(), "background": True})
    check_reward(reward, image_size=8)
    assert collected(reward).shape == (12, 1)
    call_reward(reward, IMAGES, PROMPTS, notes())
    assert collected(reward).shape == (12, 1)
    with pytest.raises(RewardError, match=r"raised .*(thread|loop)") if make is Sqlite else contextlib.nullcontext():
        call_reward(reward if make is EventLoop else lambda *given: reward(*given), IMAGES, PROMPTS, notes())


def test_what_cannot_work_in_the_background_fails_in_the_check():
    for spec in (Alarm(), made_at_import):
        with pytest.raises(RewardError, match=r"raised .*thread"):
            check_reward(build_reward({"name": spec, "background": True}), image_size=8)


def where(images, prompts, metadata):
    WHERE.append(threading.current_thread())
    return [float(torch.get_num_threads())] * len(images)


async def waits(images, prompts, metadata):
    await asyncio.sleep(0)
    return where(images, prompts, metadata)


WHERE: list[threading.Thread] = []


@pytest.mark.parametrize("function", [where, waits])
@pytest.mark.parametrize("in_background", BACKGROUND)
def test_a_reward_is_always_called_in_its_thread_and_scores_with_one(function, in_background):
    WHERE.clear()
    reward = build_reward({"name": function, "background": in_background, "scale": 3.0})
    assert runs_in_background(reward) is in_background
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check_reward(reward, image_size=8)
        call_reward(reward, IMAGES, PROMPTS, notes())
        score_images(reward, to_pil(IMAGES), PROMPTS)
        assert collected(reward).tolist() == [[3.0]] * 12
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(set(WHERE)) == 1
    assert (WHERE[0] is threading.main_thread()) is not in_background


@pytest.mark.parametrize("in_background", BACKGROUND)
def test_a_part_of_a_sum_is_called_without_gradients_in_either_thread(in_background):
    network = torch.nn.Linear(3, 1)

    def scored(images, prompts, metadata):
        return network(images.mean(dim=(2, 3))).squeeze(1).numpy()  # which a tensor with a graph refuses

    reward = build_reward([{"name": scored, "background": in_background}, brightness])
    check_reward(reward, image_size=8)
    assert not call_reward(reward, IMAGES, PROMPTS, notes()).requires_grad


def test_the_same_bits_in_both_threads():
    weights = torch.randn(3 * 64, 64, generator=torch.Generator().manual_seed(1))

    def network(images, prompts, metadata):
        return (images.flatten(1) @ weights).tanh().sum(1)

    here, in_background = (
        collected(build_reward({"name": network, "background": in_background})) for in_background in BACKGROUND
    )
    assert torch.equal(here, in_background)
    assert torch.equal(here[:4, 0], call_reward(network, IMAGES, PROMPTS, notes()))


def test_those_in_the_background_and_those_here_are_one_batch_in_their_order():
    order = []

    def slow(images, prompts, metadata):
        done.wait(10)
        order.append("in_background")
        return brightness(images, prompts, metadata)

    def quick(images, prompts, metadata):
        order.append("here")
        done.set()
        return [0.1] * len(images)

    done = threading.Event()
    with Batches() as scoring:
        in_background, here = (partial(call_reward, f, IMAGES, PROMPTS, notes()) for f in (slow, quick))
        for _ in range(2):
            scoring.submit([(True, in_background), (False, here)])
        scores = scoring.gather()
    assert order[0] == "here"
    assert scores.dtype == torch.float64
    assert scores[:, 1].tolist() == [0.1] * 8
    assert torch.equal(scores[:4, 0].float(), call_reward(brightness, IMAGES, PROMPTS, notes()))


@pytest.mark.parametrize("in_background", BACKGROUND)
def test_a_failure_ends_the_epoch_at_the_next_batch(in_background):
    def fails(images, prompts, metadata):
        calls.append(1)
        raise SystemExit(0)

    calls = []
    with Batches() as scoring:
        scoring.submit([(in_background, partial(call_reward, fails, IMAGES, PROMPTS, notes()))])
        background.run(int)
        assert not scoring.go_on()
        with pytest.raises(RewardError, match=r"reward 'fails' raised SystemExit: 0"):
            scoring.gather()
    assert len(calls) == 1


def test_options_that_say_where():
    assert not runs_in_background(build_reward("jpeg_compressibility"))
    both = build_reward(
        {"name": "combine", "rewards": [brightness, {"name": noted, "background": False}], "background": True}
    )
    assert [runs_in_background(part) for part in both.parts] == [True, False]
    assert not runs_in_background(brightness), "the function is left as it is"
    assert runs_in_background(build_text_reward({"name": matches, "background": True, "scale": 2.0}))
    wrong = "reward.background='yes' is not allowed: it must be true or false"
    assert refusal(declare, IMAGES_KIND, {"name": brightness, "background": "yes"}) == wrong
    said = refusal(declare, IMAGES_KIND, [{"name": brightness, "background": 1}])
    assert wrong.replace("'yes'", "1") in said
    from diffusion_align.rewards.image.vlm_judge import VlmJudge
    from diffusion_align.rewards.remote import Remote

    assert Remote.background
    assert VlmJudge.background


class Mine:
    """An object of the user's, with state, a class attribute and methods."""

    __slots__ = ("asked", "seen")
    differentiable = True

    def __init__(self):
        self.asked, self.seen = 0, []

    def check_prompts(self, prompts, metadata):
        self.seen += prompts

    def __call__(self, images, prompts):
        self.asked += 1
        return images.mean(dim=(1, 2, 3))


class Network(torch.nn.Module):
    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("make_it", [Mine, Network, lambda: partial(with_option, gain=2.0), lambda: two])
def test_where_it_is_called_is_no_change_of_the_users_object(make_it):
    mine = make_it()
    reward = build_reward({"name": mine, "background": True, "scale": 2.0})
    assert runs_in_background(reward)
    assert not runs_in_background(mine)
    assert reward.name == f"2*{reward_name(mine)}"
    alone = build_reward({"name": mine, "background": True})
    before = call_reward(mine, IMAGES, PROMPTS, notes())
    assert torch.equal(call_reward(alone, IMAGES, PROMPTS, notes()), before)
    if isinstance(mine, Mine):
        check_prompts(alone, ["a"], [{}])
        assert (mine.asked, mine.seen) == (2, ["a"]), "its state is one, whoever calls it"
        assert call_reward(alone, IMAGES, PROMPTS, notes(), differentiable=True).shape == (4,)
    if isinstance(mine, Network):
        assert alone.to("cpu") is mine
    assert not runs_in_background(build_reward(mine))


def test_options_of_a_users_partial_stay_known_in_the_background():
    def scored(completions, gain):
        return [gain] * len(completions)

    mine = partial(scored, gain=3.0)
    text = build_text_reward({"name": mine, "background": True})
    assert call_text_reward(text, ["p"], ["x"], {"gain": ["a column"]}).tolist() == [3.0]
    assert not hasattr(mine, "background")


# -- what rewards may look like ----------------------------------------------------------------------------------------


def two(images, prompts):
    return [1.0] * len(images)


def by_name(images, prompts, *, metadata):
    return [float(m["tags"]["n"]) for m in metadata]


def with_option(images, prompts, gain=1.0):
    return [gain] * len(images)


def trl(images, prompts, prompt_metadata):
    return images.mean(dim=(1, 2, 3)), {"raw": 1}


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (two, [1.0] * 4),
        (by_name, [1.0, 1.0, 2.0, 3.0]),
        (with_option, [1.0] * 4),
        ({"name": with_option, "gain": 3}, [3.0] * 4),
        (trl, IMAGES.mean(dim=(1, 2, 3)).tolist()),
        ([two, {"name": by_name, "scale": 2.0}], [3.0, 3.0, 5.0, 7.0]),
    ],
)
def test_two_arguments_and_trls_pair(spec, wanted):
    assert call_reward(build_reward(spec), IMAGES, PROMPTS, notes()).tolist() == pytest.approx(wanted)


async def later(images, prompts, metadata):
    await asyncio.sleep(0)
    return [float(len(p)) for p in prompts]


class LaterObject:
    async def __call__(self, prompts, completions, answer):
        await asyncio.gather(*(asyncio.sleep(0) for _ in completions))
        return [float(c == a) for c, a in zip(completions, answer)]


async def later_fails(images, prompts, metadata):
    await asyncio.sleep(0)
    raise SystemExit(3)


@pytest.mark.parametrize("in_background", BACKGROUND)
def test_async_rewards_are_run_also_where_a_loop_runs(in_background):
    reward = build_reward({"name": later, "background": in_background})
    text = build_text_reward({"name": LaterObject(), "background": in_background})

    def both():
        images = call_reward(reward, IMAGES, ["a", "bb", "c", "d"], notes()).tolist()
        return images, call_text_reward(text, ["p", "q"], ["x", "y"], {"answer": ["x", "x"]}).tolist()

    async def inside():  # as a notebook is
        return both()

    wanted = [1.0, 2.0, 1.0, 1.0], [1.0, 0.0]
    assert both() == wanted
    assert asyncio.run(inside()) == wanted
    assert both() == wanted
    with pytest.raises(RewardError, match="reward 'later_fails' raised SystemExit: 3"):
        call_reward(later_fails, IMAGES, PROMPTS, notes())


def test_float64_is_kept_to_the_sum():
    fine = [1.0, 1.0 + 1e-12, 1.0, 1.0]
    reward = build_reward([lambda images, prompts: fine, "jpeg_compressibility"])
    apart = scores_of_parts(reward, IMAGES, PROMPTS, notes())
    assert apart[:, 0].tolist() == fine
    assert call_text_reward(lambda completions: fine, PROMPTS, PROMPTS, {}).tolist() == fine
    assert call_reward(build_reward("jpeg_compressibility"), IMAGES, PROMPTS, notes()).dtype == torch.float32


# -- what is none of its business --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_keyboard_interrupt_is_a_ctrl_c_only_where_one_was_given(kind):
    def fails(*_, **__):
        raise KeyboardInterrupt

    def call():
        if kind == "text":
            call_text_reward(fails, PROMPTS, PROMPTS, {})
        else:
            call_reward(fails, IMAGES, PROMPTS, notes())

    with pytest.raises(KeyboardInterrupt):  # no loop that would have taken it as a flag
        call()
    with InterruptFlag() as flag:
        with pytest.raises(RewardError, match="reward 'fails' raised KeyboardInterrupt"):
            call()
        flag.raised = True
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reward_that_closes_a_stream(name, monkeypatch, tmp_path):
    def closes(images, prompts):
        getattr(sys, name).close()
        return [0.0] * len(images)

    with open(tmp_path / "stream", "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        with pytest.raises(RewardError, match=rf"^reward 'closes' closed {name}: a reward must leave it open$"):
            call_reward(closes, IMAGES, PROMPTS, notes())
        assert not getattr(sys, name).closed, "the error can be printed"

    def closes_file(images, prompts):
        os.close(getattr(sys, name).fileno())
        return [0.0] * len(images)

    stream = open(os.open(tmp_path / "stream", os.O_WRONLY), "w", closefd=False)  # noqa: SIM115
    monkeypatch.setattr(sys, name, stream)
    with pytest.raises(RewardError, match=f"closed {name}"):
        call_reward(closes_file, IMAGES, PROMPTS, notes())


def test_code_that_leaves_when_it_is_imported_built_or_shown_prompts(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\n\nsys.exit(0)\n")
    said = refusal(build_reward, f"{tmp_path}/leaves.py:f")
    assert said.endswith("cannot be imported (SystemExit: 0 (leaves.py, line 3))")

    class Leaves:
        def __init__(self):
            raise SystemExit

        def __call__(self, images, prompts, metadata): ...

    with pytest.raises(RewardError, match=r"^reward 'Leaves' .* built: SystemExit \(test_reward_calls.py, line"):
        build_reward(Leaves)

    def refuses(prompts, metadata):
        raise SystemExit(2)

    shown = SimpleNamespace(name="shown", check_prompts=refuses)
    with pytest.raises(RewardError, match=r"^reward 'shown' refused the prompts: SystemExit"):
        check_prompts(shown, PROMPTS, notes())
