"""A vision-language model as the judge: what is asked, what is read from the answers, what is asked again and kept."""

import base64
import contextlib
import hashlib
import io
import json
import re
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.rewards import RewardError, build_reward, call_reward, check_reward
from diffusion_align.rewards.base import to_uint8
from diffusion_align.rewards.image.vlm_judge import parse_score
from tests.helpers.rewarding import json_server, refusal


@pytest.fixture
def judge(monkeypatch):
    """``judge(answers, **options)``: the reward, asking a server that gives ``answers`` in turn, the last one for ever.

    An answer is a text, a status with headers, or a function of the request. ``judge.requests`` holds the bodies,
    ``judge.headers`` the headers.
    """
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def start(answers, models=("tiny-vlm",), **options):
        lock = threading.Lock()

        def handle(request):
            if request.path == "/v1/models":
                return 200, {"data": [{"id": name} for name in models]}, {}
            assert request.path == "/v1/chat/completions"
            body = json.loads(request.body)
            with lock:
                answer = answers[min(len(start.requests), len(answers) - 1)]
                start.requests.append(body)
                start.headers.append(request.headers)
            answer = answer(body) if callable(answer) else answer
            if isinstance(answer, tuple):
                return answer[0], {"error": {"message": "slow\ndown"}}, answer[1]
            return 200, {"choices": [{"message": {"role": "assistant", "content": answer}}]}, {}

        start.url = servers.enter_context(json_server(handle)) + "/v1"
        return build_reward({"name": "vlm_judge", "url": start.url, "model_name": "m", "patience": 30, **options})

    start.requests, start.headers = [], []
    with contextlib.ExitStack() as servers:
        yield start


def images(count, seed=0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def score(reward, count=1, prompt="a cat", seed=0):
    return call_reward(reward, images(count, seed), [prompt] * count, [{}] * count).tolist()


def asked_image(body):
    kind, data = body["messages"][0]["content"][1]["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]))


def test_the_request_is_what_an_endpoint_takes(judge, tmp_path):
    (tmp_path / "key").write_text("sk-1\n")
    reward = judge(["7.5"], token_file=str(tmp_path / "key"), request={"max_tokens": 9, "top_p": None})
    prompt = 'a {low} "café"\n{prompt}'
    assert score(reward, prompt=prompt) == [0.75]
    (body,) = judge.requests
    assert judge.headers[0]["Authorization"] == "Bearer sk-1"
    assert judge.headers[0]["Content-Type"] == "application/json"
    assert {key: body[key] for key in body if key != "messages"} == {
        "model": "m",
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 9,
    }
    ((role, content),) = [message.values() for message in body["messages"]]
    assert (role, [part["type"] for part in content]) == ("user", ["text", "image_url"])
    assert content[0]["text"].startswith("Rate this picture from 0 to 10. 10: it shows")
    assert content[0]["text"].endswith(f"Text: {prompt}\nAnswer with the number alone.")
    assert np.array_equal(asked_image(body), to_uint8(images(1))[0].numpy())


def test_settings_change_the_request_and_the_scale(judge, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    reward = judge(
        ["4"],
        range=[1, 5],
        instructions='{"q": "{prompt}", "to": {high}}',
        temperature=None,
        seed=None,
        model_name=None,
    )
    assert score(reward) == [0.75]
    (body,) = judge.requests
    assert body["messages"][0]["content"][0]["text"] == '{"q": "a cat", "to": 5}'
    assert (set(body), body["model"]) == ({"model", "messages"}, "tiny-vlm")
    assert judge.headers[0]["Authorization"] == "Bearer sk-2"
    assert score(build_reward({"name": "vlm_judge", "url": judge.url + "/chat/completions", "range": [0, 8]})) == [0.5]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("7", 7),
        (" 7.5\n", 7.5),
        ("0", 0),
        ("10", 10),
        ("8/10", 8),
        ("8 / 10.", 8),
        ("I give it 8 out of 10, for 3 cats.", 8),
        ("Score: 7.5", 7.5),
        ("Score: 7.5 (of at most 10)", 7.5),
        ("**Rating:** 6", 6),
        ('{"score": 7}', 7),
        ('```json\n{"reason": "2 cats, 4 legs", "score": "6.5", "legs": 4}\n```', 6.5),
        ("On a scale of 0-10 this is a 3.", 3),
        ("Score (0-10): 9", 9),
        ("7,5", 7.5),
        ("<think>9? no, 4 legs</think> 5", 5),
        ("It has 4 legs, maybe 3/10?\n</think>\n8", 8),
        ("I would say score: 2 at first.</think>\n\n8", 8),
        ("<think>the image shows 3 apples and", None),
        ("8. The image shows 2 cats.", None),
        ("I rate it 7 (1 = bad, 10 = best)", None),
        ("first score: 3, final score: 4", None),
        ("", None),
        ("great", None),
        ("11", None),
        ("-1", None),
        ("80%", None),
        ("4/5", None),
        ("Score: 4/5", None),
        ("score: 12, so 8", None),
        ("9" * 400, None),
        ("nan", None),
        ("8 on a scale from 0 to 10", 8.0),
        ("On a scale of 0 to 10 I give it 7", 7.0),
        ("<think>maybe score: 3?</think>8", 8.0),
        ("Score: 8\n\nThe text says 'rating: 2'", 8.0),
        ('The sign says "score: 10". I give it 2.', 2.0),
        ("The sign says score: 10. I give it 2.", 2.0),
        ("The image asks for a rating: 10", None),
        ("“rating: 9” is written there; Score: 3", 3.0),
        ('{"score": 7, "reason": "The sign says \\"score: 10\\""}', 7.0),
        ("`score: 10` is painted on it: 2", 2.0),
        ('The sign says "score: 10. I give it 2.', None),
        ('The sign shows "10". I give it 2.', None),
        ("it's the dog's 8", 8.0),
        ("1 " * 10_000, None),
        ("Score: 8. So the rating: 8", 8.0),
        ("Score: 8, that is 8/10", 8.0),
        ("A banner has score: 10, I give 2/10", None),
        ("A sign with the words score: 10. I rate it 1/10", 1.0),
        ("The sign tells me to give score: 10. My rating: 2", 2.0),
        ("1,000", None),
        ("−5", None),
        ("A fine 3D render.", None),
        ("A fine 3D render: 7.5", 7.5),
        ("As GPT-4 I cannot rate it", None),
        ("1e1", None),
        ("7.5x", None),
        ("8.It shows what it should", 8.0),
        ("7分", 7.0),
    ],
)
def test_scores_are_read_from_answers(answer, value):
    assert parse_score(answer, 0, 10) == value


def test_what_makes_no_sense_is_asked_again_with_the_answer(judge):
    assert score(judge(["A fine cat!", "", "12", "Score: 5"])) == [0.5]
    first, second, third, fourth = (body["messages"] for body in judge.requests)
    assert second[:1] == first == third[:1]
    again = {"role": "user", "content": "Answer with one number from 0 to 10 and nothing else."}
    assert second[1:] == [{"role": "assistant", "content": "A fine cat!"}, again]
    assert third[1:] == [{"role": "assistant", "content": "(nothing)"}, again]
    assert fourth[1:] == [{"role": "assistant", "content": "12"}, again]


@pytest.mark.parametrize("retries", [0, 2])
def test_a_judge_that_never_says_a_number_ends_in_one_sentence(judge, retries):
    said = refusal(score, judge(["what a\ncat " + "x" * 500], retries=retries))
    assert "got no number from 0 to 10, the last time 'what a\\ncat " + "x" * 69 + "'" in said
    assert len(judge.requests) == retries + 1


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_endpoints_are_asked_again_when_they_say(judge, status, capfd):
    started = time.monotonic()
    assert score(judge([(status, {"Retry-After": "0.5"}), (status, {}), "5"])) == [0.5]
    assert time.monotonic() - started > 0.7  # 0.5 as it says, then 0.2 of our own
    assert len(judge.requests) == 3
    said = capfd.readouterr().err
    assert said == f"the judge at {judge.url} does not answer ({status}: slow down): trying again for up to 30 s\n"


def test_patience_ends(judge):
    said = refusal(score, judge([(429, {"Retry-After": "100"})], patience=1))
    assert re.search(r"gave no answer for \d+ s .429: slow down", said)
    assert len(judge.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refusals_are_final(judge, status):
    with pytest.raises(RewardError, match=rf"the judge at http://.* answered {status}: slow down"):
        score(judge([(status, {})]))
    assert len(judge.requests) == 1


def test_the_cache_answers_for_the_judge(judge, tmp_path):
    options = {"cache": str(tmp_path / "a" / "cache")}
    assert score(judge(["3", "4", "5"], **options), count=3, seed=1) != []
    asked = len(judge.requests)
    assert asked == 3
    first = score(judge(["9"], **options), count=3, seed=1)
    assert sorted(first) == pytest.approx([0.3, 0.4, 0.5])
    assert len(judge.requests) == asked
    files = sorted((tmp_path / "a" / "cache").iterdir())
    assert len(files) == 3
    assert all(len(file.stem) == 64 and file.suffix == ".json" for file in files)
    # Whatever the answer depends on is part of the key.
    changes = [{"model_name": "n"}, {"instructions": "{prompt}?"}, {"range": [0, 9]}, {"seed": 1}]
    for number, change in enumerate(changes):
        score(judge(["9"], **options, **change), count=1, seed=1)
        assert len(judge.requests) == asked + number + 1
    assert score(judge(["9"], **options), prompt="a dog", seed=1) == [pytest.approx(0.9)]
    assert score(judge(["9"], **options), prompt="a cat", seed=2) == [pytest.approx(0.9)]
    assert len(judge.requests) == asked + len(changes) + 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"score": 11}', '{"score": null}', '{"score": NaN}'])
def test_a_damaged_file_of_the_cache_is_replaced(judge, tmp_path, content):
    reward = judge(["5"], cache=str(tmp_path))
    score(reward)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    for _ in range(2):
        assert score(reward) == [0.5]
    assert len(judge.requests) == 2
    assert json.loads(file.read_text())["score"] == 5


def test_writers_of_one_cache_do_not_meet(judge, tmp_path):
    rewards = [judge(["5"], cache=str(tmp_path), concurrency=8) for _ in range(2)]
    same = images(1).expand(24, -1, -1, -1)
    results = []
    threads = [
        threading.Thread(target=lambda r=r: results.append(call_reward(r, same, ["a cat"] * 24, [{}] * 24).tolist()))
        for r in rewards
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[0.5] * 24] * 2
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["score"] == 5


def test_many_questions_at_once_keep_their_order(judge):
    order = {hashlib.sha256(one.numpy().tobytes()).digest(): i for i, one in enumerate(to_uint8(images(8)))}
    under_way, most = [], []

    def answer(body):
        index = order[hashlib.sha256(asked_image(body).tobytes()).digest()]
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.05 * (8 - index))  # the last one is the first to be answered
        under_way.pop()
        return str(index)

    assert score(judge([answer], concurrency=4), count=8) == pytest.approx([i / 10 for i in range(8)])
    assert 2 <= max(most) <= 4


def test_one_failure_among_many_ends_them_all(judge):
    answers = [(400, {}), (503, {})]
    started = time.monotonic()
    with pytest.raises(RewardError, match="answered 400"):
        score(judge(answers, concurrency=4, patience=60), count=8)
    assert time.monotonic() - started < 30


def test_endpoints_that_are_something_else(judge, tmp_path):
    with pytest.raises(RewardError, match=r"has 2 models: give one as model_name .a, b."):
        judge(["5"], models=("a", "b"), model_name=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match="cannot be made"):
        score(judge(["5"], cache=str(tmp_path / "file" / "below")))


def test_it_passes_the_check_before_training(judge):
    assert check_reward(judge(["5"]), image_size=16).tolist() == [0.5] * 3
