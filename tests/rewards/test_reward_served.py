"""A reward behind HTTP and the reward that asks it: same scores, limits, tokens, several servers, servers that die."""

import asyncio
import base64
import contextlib
import gzip
import inspect
import io
import itertools
import json
import os
import re
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import zlib

import httpx2
import numpy as np
import pytest
import torch
from fastapi import HTTPException, Request
from PIL import Image

from diffusion_align.cli import serve_reward
from diffusion_align.interrupt import InterruptFlag
from diffusion_align.rewards import RewardError, build_reward, call_reward
from diffusion_align.rewards.base import to_uint8
from diffusion_align.rewards.endpoints import Endpoint, Unanswered, ask, png, read_token, retry_after
from diffusion_align.rewards.remote import Limits, split
from diffusion_align.rewards.serving import (
    Bodies,
    CallsHere,
    RewardServer,
    address_of,
    bind,
    create_app,
    parse_request,
    read_body,
)
from tests.helpers.rewarding import json_server, refusal, serving


def odd(images, prompts, metadata):
    """Float32 values of every kind of bits: a chain of roundings, and extremes by the metadata."""
    values = images.double().pow(1.7).mean(dim=(1, 2, 3)).float().sin() / 3
    return torch.tensor([m.get("score", v) for m, v in zip(metadata, values.tolist())]) + len(prompts[0]) * 1e-9


def random_images(count, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def body(count=1, **changes):
    image = base64.b64encode(png(np.zeros((8, 8, 3), np.uint8))).decode()
    return {"prompts": ["a cat"] * count, "metadata": [{}] * count, "images": [image] * count} | changes


@pytest.fixture
def serve():
    """``serve(reward, port=0, **options)``: the address of a server in a thread; ``serve.stop(address)`` ends it."""
    running = {}

    def start(reward=odd, port=0, token=None, calls=None, **options):
        bound, ready = bind("127.0.0.1", port, token=token), threading.Event()
        server = RewardServer(create_app(reward, token=token, calls=calls, **options), ready.set)
        thread = threading.Thread(target=server.serve_on, args=(bound, calls))
        thread.start()
        assert ready.wait(60)
        url = address_of(bound)
        running[url] = server, thread
        return url

    def stop(url):
        server, thread = running.pop(url)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()

    start.stop, start.thread = stop, lambda url: running[url][1]
    yield start
    for url in list(running):
        stop(url)


@pytest.fixture
def fake():
    """``fake(answer)``: address of a server; ``answer(request)`` gives status, object and headers.

    ``fake.requests`` are the paths asked for, ``fake.peers`` the connections they came over.
    """

    def start(answer):
        def handle(request):
            start.requests.append(request.path)
            start.peers.add(request.peer)
            return (200, {"status": "ok", **Limits()._asdict()}, {}) if request.path == "/health" else answer(request)

        return servers.enter_context(json_server(handle))

    start.requests, start.peers = [], set()
    with contextlib.ExitStack() as servers:
        yield start


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def remote(url, **options):
    return build_reward({"name": "remote", "url": url, "patience": 30, **options})


def score(reward, count=5, seed=0, **notes):
    prompts = [f"prompt {i}" for i in range(count)]
    return call_reward(reward, random_images(count, seed=seed), prompts, [notes] * count)


def test_a_served_reward_is_called_in_the_thread_that_serves_and_its_exits_are_details(serve):
    def leaves(images, prompts, metadata):
        threads.append(threading.current_thread())
        if prompts[0] == "leave":
            sys.exit(0)
        if prompts[0] == "interrupt":
            raise KeyboardInterrupt
        return [0.1] * len(images)

    threads = []
    url = serve(leaves, calls=CallsHere())
    for prompt, said in (("leave", "SystemExit: 0"), ("interrupt", "KeyboardInterrupt")):
        answer = httpx2.post(url + "/score", json=body(prompts=[prompt]))
        assert answer.status_code == 500
        assert answer.json()["detail"].startswith(f"reward 'leaves' raised {said}")
    assert score(remote(url)).tolist() == [0.1] * 5, "Python's own numbers keep their digits on the way"
    assert set(threads) == {serve.thread(url)}


def test_eight_bits():
    levels = torch.arange(256).float() / 255
    assert to_uint8(levels.expand(1, 3, 1, 256)).tolist() == [[[[i] * 3 for i in range(256)]]]
    outside = torch.tensor([-0.3, 1.2, 0.5 / 255 + 1e-4]).view(1, 3, 1, 1).requires_grad_()
    assert to_uint8(outside).tolist() == [[[[0, 255, 1]]]]
    random = random_images(2).double()
    expected = (
        np.rint(random.float().numpy().astype(np.float32) * np.float32(255)).astype(np.uint8).transpose(0, 2, 3, 1)
    )
    assert np.array_equal(to_uint8(random).numpy(), expected)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 64, 65])
@pytest.mark.parametrize("limit", [1, 3, 64])
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_parts_are_contiguous_equal_and_within_the_limit(count, limit, servers):
    parts = split(count, limit, servers)
    assert [i for start, end in parts for i in range(start, end)] == list(range(count))
    sizes = [end - start for start, end in parts]
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == count or len(parts) % servers == 0
    assert len(parts) == count or len(parts) < servers * (count / (servers * limit) + 1)


def test_scores_come_back_bit_for_bit(serve):
    served = remote(serve())
    for seed in range(3):
        assert torch.equal(score(served, seed=seed), score(odd, seed=seed))
    for extreme in (3.4028234663852886e38, 1.401298464324817e-45, -0.0, 0.1):
        assert torch.equal(score(served, score=extreme), score(odd, score=extreme))


def test_the_reward_sees_what_it_would_see_here(serve):
    seen = []

    def spy(images, prompts, metadata):
        seen.append((images, prompts, metadata, torch.get_num_threads(), torch.is_grad_enabled()))
        return images.mean(dim=(1, 2, 3))

    notes = [{"tags": ["é", None, {"n": 2**60, "x": 0.1}], "ok": True}, {}]
    served = remote(serve(spy))
    for reward in (served, spy):
        call_reward(reward, random_images(2), ['a \U0001f34e\n"red" apple', ""], notes)
    (there, *rest), (here, *expected) = seen
    assert torch.equal(there, here)
    assert (there.dtype, there.stride()) == (torch.float32, here.stride())
    assert rest[:2] == expected[:2]
    assert rest[2:] == [1, False]


def test_health_says_what_is_served(serve):
    health = httpx2.get(serve(limits=Limits(max_batch=7)) + "/health").json()
    assert health["status"] == "ok"
    assert (health["reward"], health["max_batch"], health["differentiable"]) == ("odd", 7, False)
    assert set(health) == {"status", "reward", "version", "differentiable", "max_batch", "max_bytes", "max_pixels"}


def png_header(width, height, depth=8):
    """A PNG that says that it is large, without the pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def as_file(format, mode="RGB", size=(8, 8)):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


MALFORMED = {
    "no JSON": (b"{", 422, "JSON"),
    "deep": (b"[" * 10_000, 422, "JSON"),
    "a list": ([], 422, "the body"),
    "a key missing": ({"prompts": [], "images": []}, 422, "metadata: Field required"),
    "a key too many": (body(prompt="a cat"), 422, "prompt: Extra"),
    "a key that is long and steers a terminal": (body(**{"\x1b" + "k" * 10_000: 1}), 422, f" {'k' * 79}: Extra"),
    "prompts of numbers": (body(prompts=[3]), 422, "prompts.0"),
    "lengths": (body(2, prompts=["a"]), 422, "2 images, 1 prompts and 2 metadata entries"),
    "empty": (body(0), 422, "at least one"),
    "too many": (body(5), 413, "5 images are more than max_batch=4"),
    "no base64": (body(images=["?"]), 422, "image 0 is not a readable PNG"),
    "not ASCII": (body(images=["é"]), 422, "image 0 is not a readable PNG"),
    "a JPEG": (body(images=[as_file("JPEG")]), 422, "image 0 is not a readable PNG"),
    "cut": (body(images=[as_file("PNG", size=(64, 64))[:80]]), 422, "image 0 is not a readable PNG"),
    "grey": (body(images=[as_file("PNG", "L")]), 422, "image 0 must be RGB with 8 bits per channel"),
    "alpha": (body(images=[as_file("PNG", "RGBA")]), 422, "image 0 must be RGB with 8 bits per channel"),
    "16 bits": (
        body(images=[base64.b64encode(png_header(8, 8, 16) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e").decode()]),
        422,
        "8 bits per channel",
    ),
    "a bomb": (body(images=[base64.b64encode(png_header(60_000, 60_000)).decode()]), 413, "60000 x 60000"),
    "sizes": (body(2, images=[as_file("PNG"), as_file("PNG", size=(9, 8))]), 422, "images 0 and 1 are 8 x 8 and 9 x 8"),
}


def test_malformed_requests_are_refused_in_one_sentence_and_the_server_goes_on(serve):
    url = serve(limits=Limits(max_batch=4, max_bytes=20_000)) + "/score"
    with httpx2.Client(headers={"Content-Type": "application/json"}) as client:
        for name, (content, status, sentence) in MALFORMED.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            answer = client.post(url, content=data)
            said = answer.json()["detail"]
            assert (answer.status_code, sentence in said, "\n" in said) == (status, True, False), (name, said)
        assert client.post(url, content=json.dumps(body()), headers={"Content-Type": "text/plain"}).status_code == 415
        assert client.get(url).status_code == 405
        assert client.get(url.replace("/score", "/docs")).status_code == 404
        assert client.post(url, content=json.dumps(body(4))).status_code == 200


def test_a_request_of_many_values_is_refused_before_they_are_made():
    """A value takes up to a hundred times its bytes in memory."""
    values = b"[" + b"[]," * 499_998 + b"[]]"

    def asked(notes):
        return json.dumps(body(metadata=[{"a": 0}])).encode().replace(b'{"a": 0}', notes)

    with pytest.raises(HTTPException, match=r"413: .* more than 1000000 values"):
        parse_request(asked(b'{"a": ' + values + b"}"), Limits())
    with pytest.raises(HTTPException, match="413"):
        parse_request(asked(b"{" + b'"a":0,' * 10**6 + b'"a":0}'), Limits())
    assert len(parse_request(asked(b'{"a": ' + values[:1] + values[-1803:] + b"}"), Limits())[0]) == 1


def test_a_long_request_is_refused(serve):
    url = serve(limits=Limits(max_bytes=20_000)) + "/score"
    with httpx2.Client(headers={"Content-Type": "application/json"}) as client:
        for content in (b" " * 20_001, b" " * 10_000_000, (b" " * 10_000 for _ in range(500))):
            answer = client.post(url, content=content)
            assert answer.status_code == 413
            assert "longer than max_bytes=20000" in answer.json()["detail"]


@pytest.mark.parametrize(("declared", "taken"), [([], 3), ([(b"content-length", b"20001")], 0)])
def test_a_long_request_is_refused_while_it_arrives(declared, taken):
    chunks = []

    async def receive():
        chunks.append(1)
        return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

    request = Request({"type": "http", "headers": declared}, receive)
    with pytest.raises(HTTPException, match="413"):
        asyncio.run(read_body(request, 20_000))
    assert len(chunks) == taken


def test_a_batch_is_cut_to_what_the_server_takes(serve):
    sizes = []

    def spy(images, prompts, metadata):
        sizes.append(len(images))
        return odd(images, ["prompt 0"], metadata)

    expected = score(odd, 10)
    row = max(len(base64.b64encode(png(one))) for one in to_uint8(random_images(10)).numpy()) + 40
    for limits in (Limits(max_batch=4), Limits(max_bytes=100 + 4 * row), Limits(max_pixels=4 * 256 + 100)):
        sizes.clear()
        assert torch.equal(score(remote(serve(spy, limits=limits)), 10), expected)
        assert sizes == [3, 3, 4]
    with pytest.raises(RewardError, match="an image of 16 x 16 is more than the reward server takes"):
        score(remote(serve(limits=Limits(max_pixels=255))))


def test_a_token_is_asked_for_and_compared(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFUSION_ALIGN_TOKEN", raising=False)
    url = serve(token="s3cret")
    (tmp_path / "right").write_text("s3cret\n")
    (tmp_path / "wrong").write_text("s3cre")
    for path in ("/health", "/nothing"):
        assert httpx2.get(url + path).status_code == (401 if path == "/health" else 404)
    assert httpx2.post(url + "/score", json=body()).status_code == 401
    assert httpx2.post(url + "/score", json=body(), headers={"Authorization": "Bearer s3cret"}).status_code == 200
    for options in ({}, {"token_file": str(tmp_path / "wrong")}):
        with pytest.raises(RewardError, match=f"reward server {url} answered 401: the token is missing or wrong"):
            remote(url, **options)
    assert torch.equal(score(remote(url, token_file=str(tmp_path / "right"))), score(odd))
    monkeypatch.setenv("DIFFUSION_ALIGN_TOKEN", "s3cret")
    assert torch.equal(score(remote(url)), score(odd))


def test_open_to_other_machines_only_with_a_token():
    for host in ("0.0.0.0", "::"):
        with pytest.raises(RewardError, match="from other machines: give a token with --token-file"):
            bind(host, 0, token=None)
    bind("0.0.0.0", 0, token="s3cret").close()
    with bind("localhost", 0, token=None) as bound:
        port = bound.getsockname()[1]
        bound.listen()
        with pytest.raises(RewardError, match=f"host='localhost' port={port} cannot be used: Address already in use"):
            bind("localhost", port, token=None)
    with pytest.raises(RewardError, match="is not an address of this machine"):
        bind("no such host", 0, token=None)


def test_requests_are_scored_one_at_a_time_and_those_given_up_are_not(serve):
    inside, most, calls, begun, go_on = [], [], [], threading.Event(), threading.Event()

    def slow(images, prompts, metadata):
        inside.append(1)
        most.append(len(inside))
        calls.append(prompts[0])
        begun.set()
        assert go_on.wait(60)
        time.sleep(0.05)
        inside.pop()
        return images.mean(dim=(1, 2, 3))

    url = serve(slow) + "/score"
    asking = [threading.Thread(target=httpx2.post, args=(url,), kwargs={"json": body(), "timeout": 60}) for _ in "123"]
    asking[0].start()
    assert begun.wait(60)
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(url, json=body(prompts=["given up"]), timeout=0.3)
    for thread in asking[1:]:
        thread.start()
    time.sleep(0.2)
    go_on.set()
    for thread in asking:
        thread.join()
    assert httpx2.post(url, json=body(prompts=["later"]), timeout=60).status_code == 200
    assert max(most) == 1
    assert calls == ["a cat"] * 3 + ["later"]


def test_a_server_that_comes_later_or_back_is_waited_for_and_that_is_said_once(serve, capfd):
    port = free_port()
    later = threading.Timer(0.6, serve, kwargs={"port": port})
    later.start()
    reward = remote(f"http://127.0.0.1:{port}")
    later.join()
    for _ in range(2):
        serve.stop(f"http://127.0.0.1:{port}")
        later = threading.Timer(0.4, serve, kwargs={"port": port})
        later.start()
        assert torch.equal(score(reward), score(odd))
        later.join()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(f"http://127.0.0.1:{port} does not answer (ConnectError" in line for line in said)


def test_patience_ends_in_one_sentence(serve):
    url = serve()
    reward = remote(url, patience=0.5)
    serve.stop(url)
    for call in (lambda: score(reward), lambda: remote(url, patience=0.5)):
        started = time.monotonic()
        said = refusal(call)
        assert 0.4 < time.monotonic() - started < 10
        assert re.match(rf"reward server {url} gave no answer for \d+ s .ConnectError.*resume=true", said)


def test_several_servers_share_a_batch_and_stand_in_for_each_other(serve):
    seen = {}

    def spy(name):
        def reward(images, prompts, metadata):
            seen.setdefault(name, []).append(prompts)
            return odd(images, ["prompt 0"], metadata)

        return reward

    urls = [serve(spy(name), limits=Limits(max_batch=most)) for name, most in (("a", 64), ("b", 4))]
    reward, expected = remote(urls), score(odd, 10)
    assert torch.equal(score(reward, 10), expected)
    names = [f"prompt {i}" for i in range(10)]
    assert sorted(seen.pop("a")) == [names[:2], names[5:7]]
    assert sorted(seen.pop("b")) == [names[2:5], names[7:]]
    serve.stop(urls[0])
    started = time.monotonic()
    assert torch.equal(score(reward, 10), expected)
    assert time.monotonic() - started < 20
    assert sorted(seen["b"]) == [names[:2], names[2:5], names[5:7], names[7:]]
    serve.stop(urls[1])
    reward.patience = 0.3
    with pytest.raises(RewardError, match=f"{urls[0]}, {urls[1]} gave no answer"):
        score(reward)


@pytest.mark.parametrize(
    ("status", "asked"), [(502, 3), (503, 3), (504, 3), (429, 3), (400, 1), (401, 1), (404, 1), (422, 1), (500, 1)]
)
def test_what_is_asked_again(fake, status, asked):
    def answer(request):
        posts = fake.requests.count("/score")
        return (status, {"detail": "not now"}, {}) if posts < 3 else (200, {"scores": [1.5]}, {})

    reward = remote(fake(answer))
    if asked == 3:
        assert score(reward, 1).tolist() == [1.5]
    else:
        with pytest.raises(RewardError, match=f"answered {status}: not now"):
            score(reward, 1)
    assert fake.requests.count("/score") == asked


def test_time_outs_are_retried_and_connections_kept(fake):
    def answer(request):
        if fake.requests.count("/score") == 3:
            time.sleep(2)
        return 200, {"scores": [0.5]}, {}

    reward = remote(fake(answer), timeout=1)
    for _ in range(2):
        score(reward, 1)
    assert len(fake.peers) == 1
    score(reward, 1)
    score(reward, 1)
    assert fake.requests == ["/health"] + ["/score"] * 5
    assert len(fake.peers) == 2


@pytest.mark.parametrize("scores", [[1.0], [1.0, "2"], [1.0, None], [1.0, 10**400], [1.0, 2**128], None])
def test_an_answer_that_is_none_is_refused(fake, scores):
    for content in ({"scores": scores}, scores):
        with pytest.raises(RewardError, match="did not answer 2 scores"):
            score(remote(fake(lambda request, content=content: (200, content, {}))), 2)


def test_another_kind_of_server_is_recognised(serve, fake, monkeypatch):
    with pytest.raises(RewardError, match="answered 404"):
        remote(serve() + "/v1")
    monkeypatch.setattr(Limits, "_asdict", lambda self: {"max_batch": "many"})
    with pytest.raises(RewardError, match="is no reward server"):
        remote(fake(None))


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(serve, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert torch.equal(score(remote(serve())), score(odd))


def test_metadata_that_is_no_json_is_named(serve):
    with pytest.raises(RewardError, match=r"metadata of prompt 'prompt 0' .* JSON: Object of type Tensor"):
        score(remote(serve()), 1, tensor=torch.ones(1))


def test_tokens_that_no_header_can_hold_are_refused(tmp_path, monkeypatch):
    for text, sentence in (
        ("", "is empty"),
        ("a b", "one line of ASCII"),
        ("a\nb", "one line"),
        ("ä", "cannot be read"),
    ):
        (tmp_path / "token").write_text(text, encoding="utf-8")
        with pytest.raises(RewardError, match=sentence):
            read_token(tmp_path / "token", "NOWHERE")
    monkeypatch.setenv("SOME_TOKEN", " x1 ")
    assert read_token(None, "SOME_TOKEN") == "x1"
    monkeypatch.setenv("SOME_TOKEN", "")
    assert read_token(None, "SOME_TOKEN") is None


class Away:
    """An endpoint that asks for a long pause."""

    url, label, failed_at, asked = "http://x", "reward server", -float("inf"), 0

    def ask_once(self, *_):
        self.asked += 1
        raise Unanswered("busy", pause=100.0)

    def note(self, *_):
        pass


def test_an_interruption_ends_the_waiting_and_the_asking():
    away = Away()
    with InterruptFlag() as flag:
        timer = threading.Timer(0.3, lambda: setattr(flag, "raised", True))
        timer.start()
        began = time.monotonic()
        with pytest.raises(RewardError, match=r"^interrupted while calling reward server http://x"):
            ask([away], "GET", "/", patience=100)
        assert time.monotonic() - began < 5
        with pytest.raises(RewardError, match="interrupted"):
            ask([away], "GET", "/", patience=100)
    assert away.asked == 1
    with pytest.raises(RewardError, match=r"gave no answer for 0 s \(busy\)"):
        ask([away], "GET", "/", patience=0)


def test_a_server_that_takes_too_long_is_told_from_one_that_is_away(serve):
    def sleepy(images, prompts, metadata):
        time.sleep(metadata[0].get("pause", 0.0))
        return images.mean((1, 2, 3))

    reward = remote(serve(sleepy), timeout=0.5, patience=0.6)
    with pytest.raises(RewardError, match=r"no answer within timeout=0.5 s, too short for a slow server"):
        score(reward, pause=2.0)


def test_two_servers_bound_to_one_address():
    first = bind("127.0.0.1", 0, token=None)
    second = bind("127.0.0.1", first.getsockname()[1], token=None)  # the first does not listen yet
    first.listen()
    with first, second, pytest.raises(RewardError, match="cannot be used: Address already in use"):
        RewardServer(create_app(odd)).serve_on(second)


def test_retry_after():
    assert [retry_after(header) for header in (None, "3", "0.5", "-1", "soon")] == [0, 3, 0.5, 0, 0]
    assert retry_after("Fri, 01 Jan 2038 00:00:00 GMT") > 1e7
    assert retry_after("Fri, 01 Jan 1999 00:00:00 GMT") == 0


@pytest.fixture
def raw():
    """``raw(*parts, pause=0)``: address of a server that answers every request with these bytes, pauses between them.

    A part may be an endless iterator of bytes. ``raw.sent`` counts them.
    """

    def start(*parts, pause=0.0):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65536)
                with contextlib.suppress(OSError):
                    for part in itertools.chain.from_iterable([p] if isinstance(p, bytes) else p for p in parts):
                        self.request.sendall(part)
                        start.sent += len(part)
                        time.sleep(pause)

        return servers.enter_context(serving(socketserver.ThreadingTCPServer, Handler))

    start.sent = 0
    with contextlib.ExitStack() as servers:
        yield start


def endpoint(url, timeout=5.0):
    return Endpoint(url, label="reward server", token=None, timeout=timeout, transient=(503,))


def asked_of(url, **options):
    return endpoint(url, **options).ask_once("GET", "/x")


OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = OK + b"Content-Length: %d\r\n\r\n"


@pytest.mark.parametrize("start", [OK + b"Connection: close\r\n\r\n", OK.replace(b"200", b"500") + b"\r\n"])
def test_an_endless_answer_is_read_to_a_bound(raw, start):
    url = raw(start, itertools.repeat(b" " * 65536))
    with pytest.raises(RewardError, match="answered more than 1000000 bytes"):
        asked_of(url)
    assert raw.sent < 20_000_000  # what the sockets' buffers hold


@pytest.mark.parametrize("slow", [OK + b"X-Slow: yes\r\n" * 40, LENGTH % 1000 + b" " * 1000])
def test_one_deadline_for_the_whole_request(raw, slow):
    """Every byte comes in time, the answer never ends."""
    url = raw((bytes([byte]) for byte in slow), pause=0.05)
    began = time.monotonic()
    with pytest.raises(Unanswered, match=r"no answer within timeout=0.6 s"):
        asked_of(url, timeout=0.6)
    assert time.monotonic() - began < 3


def test_nothing_is_decompressed(raw):
    bomb = gzip.compress(b" " * 10_000_000)
    url = raw(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)
    with pytest.raises(RewardError, match=r"compressed its answer \(gzip\), which was not requested"):
        asked_of(url)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"scores": ' * 50_000, b"\xff\xfe\x00", b"9" * 5000, b""])
def test_answers_that_no_parser_takes_are_one_sentence(raw, body):
    url = raw(OK + b"Content-Type: application/json; charset=rot13\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert "did not answer in JSON" in refusal(asked_of, url)


@pytest.mark.parametrize("status", [b"500", b"503"])
def test_what_a_server_says_does_not_steer_the_terminal(raw, capfd, status):
    said = json.dumps({"detail": "\x1b]0;owned\x07\x1b[2J\u202egood\x00 news"}).encode()
    url = raw(OK.replace(b"200", status) + b"Content-Length: %d\r\n\r\n" % len(said) + said)
    with pytest.raises(RewardError, match=r"\]0;owned \[2J good news"):
        ask([endpoint(url)], "GET", "/", patience=0.01)
    assert "\x1b" not in capfd.readouterr().err


def test_an_interruption_breaks_a_request_off(raw):
    url = raw(OK, itertools.repeat(b"X: y\r\n"), pause=0.05)
    with InterruptFlag() as flag:
        threading.Timer(0.3, lambda: setattr(flag, "raised", True)).start()
        began = time.monotonic()
        with pytest.raises(RewardError, match="interrupted while calling reward server"):
            asked_of(url, timeout=60)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example:80",
        "[::",
        "",
        "10.0.0.1:8901",
        "localhost/.evil.example",
        "127.0.0.1?.evil.example",
        "evil.example\\@127.0.0.1",
        "127.0.0.1:x",
    ],
)
def test_without_a_token_only_this_machines_own_names_are_answered(serve, host):
    url, own = serve(), {"Host": host}
    for answer in (httpx2.get(url + "/health", headers=own), httpx2.post(url + "/score", json=body(), headers=own)):
        assert answer.status_code in (400, 403)
    for name in ("localhost:1", "127.0.0.1", "[::1]:8901", "127.3.2.1:7"):
        assert httpx2.get(url + "/health", headers={"Host": name}).status_code == 200
    url = serve(token="s3cret")
    known = {"Host": "reward.example", "Authorization": "Bearer s3cret"}
    assert httpx2.get(url + "/health", headers=known).status_code == 200


def lines_to(url, count, said):
    """Connections that have said something and go silent."""
    host, port = url.removeprefix("http://").split(":")
    lines = [socket.create_connection((host, int(port))) for _ in range(count)]
    for line in lines:
        line.sendall(said)
    return lines


HALF = b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        HALF,
        HALF + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
)
def test_two_hundred_silent_lines_shut_nobody_out(serve, said):
    url = serve()
    lines = lines_to(url, 200, said)
    try:
        time.sleep(0.3)
        assert torch.equal(score(remote(url, patience=5)), score(odd))
    finally:
        for line in lines:
            line.close()


def test_a_request_that_never_says_what_it_wants_is_dropped(serve, monkeypatch):
    monkeypatch.setattr("diffusion_align.rewards.serving.HEADER_SECONDS", 0.3)
    url = serve()
    (silent,) = lines_to(url, 1, HALF)
    (second,) = lines_to(url, 1, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    time.sleep(0.4)
    assert second.recv(65536).startswith(b"HTTP/1.1 200")
    second.sendall(HALF)  # kept alive: the second request of a line has a deadline too
    with silent, second:
        for line in (silent, second):
            line.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert line.recv(65536) == b""


def test_bodies_that_stall_are_dropped_for_those_that_arrive():
    async def run():
        bodies, go_on = Bodies(100), asyncio.Event()

        def sender(size, wait):
            sent = []

            async def receive():
                if sent and wait:
                    await go_on.wait()
                sent.append(1)
                return {"type": "http.request", "body": b"x" * size, "more_body": wait and len(sent) < 2}

            return Request({"type": "http", "headers": []}, receive)

        async def answered(size, wait):
            with bodies.hold() as held:
                result = await read_body(sender(size, wait), 100, held)
                await asyncio.sleep(0.05)
                return len(result)

        stalled = [asyncio.create_task(answered(45, True)) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await answered(50, False) == 50  # the first of them has been silent for longer
        with pytest.raises(HTTPException, match="503"):
            await stalled[0]
        full = asyncio.create_task(answered(100, False))  # the second goes as well
        await asyncio.sleep(0.01)
        with pytest.raises(HTTPException, match="503"):  # all that is held waits for its turn
            await answered(10, False)
        assert await full == 100
        with pytest.raises(HTTPException, match="503"):
            await stalled[1]
        assert await answered(100, False) == 100  # nothing is held any more

    asyncio.run(run())


def test_the_command_line_has_the_limits_of_the_server():
    defaults = {name: p.default for name, p in inspect.signature(serve_reward).parameters.items()}
    assert Limits(*(defaults[name] for name in Limits._fields)) == Limits()


SLOW = """
import pathlib, time
def slow(images, prompts, metadata, pause=0.0):
    if prompts[0] == "wait":
        pathlib.Path("asked").touch()
        time.sleep(pause)
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def slow_server(forked, tmp_path):
    """``slow_server(pause)``: the process ids and the address of a server, and the answers of a request under way."""

    def start(pause):
        (tmp_path / "slow.py").write_text(SLOW)
        command = ("serve-reward", "slow.py:slow", "--option", f"pause={pause}", "--port", "0")
        pids = forked.start(*command, cwd=tmp_path)
        output, deadline = forked._files[0].with_name(forked._files[0].name + ".out"), time.monotonic() + 30
        while not (output.is_file() and output.read_text().endswith("\n")):
            assert time.monotonic() < deadline, output.with_suffix(".err").read_text()
            time.sleep(0.02)
        url = output.read_text().split()[-1]
        assert output.read_text() == f"serving slow at {url}\n"
        answers = []
        asked = {"json": body(prompts=["wait"])}
        request = threading.Thread(target=lambda: answers.append(httpx2.post(url + "/score", **asked)))
        request.start()
        while not (tmp_path / "asked").exists():
            time.sleep(0.01)
        return pids, url, request, answers

    return start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_after_the_request_that_it_works_on(forked, slow_server, number):
    pids, url, request, answers = slow_server(0.7)
    with httpx2.Client() as idle:
        idle.get(url + "/health")
        os.kill(pids[0], number)
        request.join()
    run = forked.wait(pids)
    assert answers[0].json() == {"scores": [0.0], "dtype": "float32"}
    assert (run.status, run.error) == (0, "")
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url + "/health")


def test_a_second_signal_tells_the_client_to_ask_again(forked, slow_server):
    """What is cut off is answered 503, which the client takes as "later"."""
    pids, _, request, answers = slow_server(4.0)
    for _ in "12":
        os.kill(pids[0], signal.SIGINT)
        time.sleep(0.3)
    request.join()
    run = forked.wait(pids)
    assert (answers[0].status_code, answers[0].json()) == (503, {"detail": "the server is stopping"})
    assert "Traceback" not in run.error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["jpeg_compresibility"], "did you mean 'jpeg_compressibility'"),
        (["jpeg_compressibility", "--option", "quality=0"], "quality=0 is not allowed: "),
        (["jpeg_compressibility", "--option", "quality"], "'quality' is not of the form key=value"),
        (["jpeg_compressibility", "--host", "0.0.0.0"], "can be reached from other machines"),
        (["jpeg_compressibility", "--token-file", "none"], "token_file='none' cannot be read"),
        (["slow.py:broken"], "reward 'broken' raised KeyError: 'target'"),
        (["jpeg_compressibility", "--max-batch", "0"], "'--max-batch'"),
    ],
)
def test_a_server_that_cannot_start_says_why(tmp_path, monkeypatch, call_cli, arguments, sentence):
    monkeypatch.delenv("DIFFUSION_ALIGN_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text("def broken(i, p, metadata):\n    return metadata[0]['target']\n")
    status, output, error = call_cli("serve-reward", *arguments, "--port", "0")
    assert (status, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert sentence in error


def test_without_the_extra_the_command_names_it(monkeypatch, call_cli):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "diffusion_align.rewards.serving")
    monkeypatch.delattr("diffusion_align.rewards.serving")
    status, _, error = call_cli("serve-reward", "jpeg_compressibility")
    assert status == 2
    assert "serve-reward needs fastapi: pip install 'diffusion-align[serve]'" in error
