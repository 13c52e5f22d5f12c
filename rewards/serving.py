"""A reward behind HTTP: what `diffusion-align serve-reward` runs and the reward `remote` calls.

``POST /score`` takes ``{"prompts": [text], "metadata": [object], "images": [base64 of an 8-bit RGB PNG]}``, all of one
length and the images of one size, and answers ``{"scores": [number], "dtype": "float32" or "float64"}``, each the
shortest decimal that gives the same bits back. ``GET /health`` says what is served and the limits. Errors are
``{"detail": one sentence}``: 401 token, 403 another host's name, 408 too slow, 413 too large, 415 not JSON, 422
malformed, 500 the reward raised, 503 try later.

With a token every request needs ``Authorization: Bearer``; without one only requests that name this machine's own
address are answered, as a page in a browser could otherwise have its own name point here. Whoever connects and says
nothing, or sends slowly, is dropped in favour of others. There is no TLS here: between machines put it behind an SSH
tunnel or a proxy.

Needs ``pip install 'diffusion-align[serve]'``.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hmac
import ipaddress
import queue
import re
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import h11
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from diffusion_align import __version__
from diffusion_align.images import UnreadableImage, open_image
from diffusion_align.rewards.base import Reward, RewardError, call_reward, reward_name
from diffusion_align.rewards.endpoints import is_loopback
from diffusion_align.rewards.remote import TOKEN, Limits
from diffusion_align.streams import printable

BODY_SECONDS = 60.0  # to send a request; whoever takes longer would keep the server from ending
VALUES = 1_000_000  # of a request besides its images; each takes some hundred bytes of memory and a microsecond
_HOST = re.compile(r"(?:\[[\da-f:.]+\]|[\w.-]+)(?::\d*)?", re.ASCII | re.IGNORECASE)  # of RFC 9110, what has our names
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # then width, height, depth and kind of colours
HEADER_SECONDS = 10.0  # to say what is wanted
BODIES = 8  # of the largest size, in memory at a time
CONNECTIONS = 128  # with a request that is being answered; more are answered 503, which the client takes as "later"
SPARE = 8  # of them, kept free by dropping whoever has been silent for longest


class ScoreRequest(BaseModel):
    """Body of ``POST /score``."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompts: list[str]
    metadata: list[dict[str, Any]]
    images: list[str]


def create_app(
    reward: Reward,
    *,
    token: str | None = None,
    limits: Limits | None = None,
    threads: int = 1,
    device: str | torch.device = "cpu",
    calls: Executor | None = None,
) -> FastAPI:
    """The application that serves ``reward``, one request at a time.

    Args:
        token: what every request must bring; None for open doors.
        limits: of one request.
        threads: of torch while it scores; with 1 the scores equal those of a training run, which scores with one.
        device: where the reward gets its images.
        calls: where the reward is called; a thread of its own if not given.
    """
    limits = limits or Limits()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    worker = calls or ThreadPoolExecutor(1, "reward", initializer=_set_threads, initargs=(threads,))
    turn, bodies = asyncio.Lock(), Bodies(BODIES * limits.max_bytes)

    def check_access(request: Request) -> None:
        host = request.headers.get("host", "")
        if token is None and not (_HOST.fullmatch(host) and is_loopback(f"http://{host}")):
            raise HTTPException(403, "without a token only this machine's own address is served: use 127.0.0.1")
        given = request.headers.get("authorization", "").encode()
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, f"the token is missing or wrong: give the server's as token_file or in {TOKEN}")

    @app.get("/health")
    async def health(request: Request) -> Response:
        check_access(request)
        about = {"status": "ok", "reward": reward_name(reward), "version": __version__, "differentiable": False}
        return JSONResponse(about | limits._asdict())

    @app.post("/score")
    async def score(request: Request) -> Response:
        check_access(request)
        # A page in a browser cannot send this type to another site without permission.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "the body must be JSON: send Content-Type: application/json")
        with bodies.hold() as held:
            try:
                body = await read_body(request, limits.max_bytes, held)
            except ClientDisconnect:
                return Response(status_code=400)
            async with turn:
                if await request.is_disconnected():  # it gave up waiting and may have sent it again
                    return Response(status_code=400)
                try:
                    scored = await asyncio.get_running_loop().run_in_executor(worker, answer, body)
                except asyncio.CancelledError:  # of a second Ctrl-C: the client may send it again
                    return JSONResponse({"detail": "the server is stopping"}, 503)
        return JSONResponse(scored)

    def answer(body: bytes) -> dict[str, Any]:
        images, prompts, metadata = parse_request(body, limits)
        try:
            scores = call_reward(reward, images.to(device), prompts, metadata)
        except RewardError as error:
            raise HTTPException(500, str(error)) from error
        except KeyboardInterrupt as error:  # not of a Ctrl-C, which the server has handlers for
            raise HTTPException(500, f"reward '{reward_name(reward)}' raised KeyboardInterrupt") from error
        return {"scores": scores.tolist(), "dtype": str(scores.dtype).removeprefix("torch.")}

    return app


class Bodies:
    """The bodies of requests in memory, ``most`` bytes of them; one too many costs the most silent sender its place.

    So those who send slowly, or stop sending, keep nobody out.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: list[_Held] = []

    @contextlib.contextmanager
    def hold(self) -> Iterator[_Held]:
        """The place of one body, until it has been answered."""
        held = _Held(self)
        self._held.append(held)
        try:
            yield held
        finally:
            self._held.remove(held)

    def make_room(self, held: _Held) -> None:
        """Drop senders until the bodies fit.

        Raises:
            HTTPException: 503, there is no room as all others have been sent and wait for their turn.
        """
        while sum(one.size for one in self._held) > self.most:
            arriving = [one for one in self._held if one.arriving is not None and one is not held]
            if not arriving:
                raise _BUSY
            min(arriving, key=lambda one: one.heard).drop()


class _Held:
    """One body: its size so far, when some of it was last heard, and how its sender is dropped."""

    def __init__(self, bodies: Bodies) -> None:
        self.size, self.heard, self.dropped = 0, 0.0, False
        self.arriving: asyncio.Timeout | None = None
        self._bodies = bodies

    def grow(self, size: int) -> None:
        self.size, self.heard = self.size + size, asyncio.get_running_loop().time()
        self._bodies.make_room(self)

    def drop(self) -> None:
        """Its reader is told by the end of its time."""
        assert self.arriving is not None
        self.arriving.reschedule(asyncio.get_running_loop().time())
        self.size, self.dropped, self.arriving = 0, True, None


_BUSY = HTTPException(503, "the server holds as many requests as it can: try again", headers={"Retry-After": "1"})


async def read_body(request: Request, max_bytes: int, held: _Held | None = None) -> bytes:
    """The body, refused as soon as it is known to be too long.

    Args:
        max_bytes: of this body.
        held: its place among others.

    Raises:
        HTTPException: 413 too long, 408 too slow, 503 no room.
    """
    held = held or _Held(Bodies(max_bytes))
    too_long = HTTPException(413, f"the request is longer than max_bytes={max_bytes}: send fewer images at once")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS) as held.arriving:
            held.heard = asyncio.get_running_loop().time()
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_long
                held.grow(len(chunk))
    except TimeoutError:
        if held.dropped:
            raise _BUSY from None
        raise HTTPException(408, f"the request took longer than {BODY_SECONDS:g} s to arrive") from None
    finally:
        held.arriving = None
    return bytes(body)


def parse_request(body: bytes, limits: Limits) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Images float (B, 3, H, W) in [0, 1], prompts and metadata of a request.

    Raises:
        HTTPException: 413 for too many images, pixels or values, 422 for whatever is malformed.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > VALUES:  # each value but the first is behind one of these
        raise HTTPException(413, f"the request holds more than {VALUES} values: send less metadata, or fewer at once")
    try:
        content = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = printable(".".join(map(str, first["loc"])))[:80] or "the body"
        raise HTTPException(422, f"{place}: {first['msg']}") from None
    counts = {len(content.prompts), len(content.metadata), len(content.images)}
    if len(counts) > 1 or counts == {0}:
        raise HTTPException(
            422,
            f"{len(content.images)} images, {len(content.prompts)} prompts and {len(content.metadata)} metadata "
            "entries: send as many of each, and at least one",
        )
    if len(content.images) > limits.max_batch:
        raise HTTPException(413, f"{len(content.images)} images are more than max_batch={limits.max_batch}")
    images: list[np.ndarray] = []
    for index, text in enumerate(content.images):
        image = decode(text, index, limits.max_pixels // len(content.images))
        if images and image.shape != images[0].shape:
            sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in (images[0], image))
            raise HTTPException(422, f"images 0 and {index} are {sizes}: all must be of one size")
        images.append(image)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # as in a run
    return pixels.float() / 255, content.prompts, content.metadata


def decode(text: str, index: int, max_pixels: int) -> np.ndarray:
    """An image, uint8 (H, W, 3), from the base64 of a PNG file; nothing is decoded before its size is known."""
    unreadable = HTTPException(422, f"image {index} is not a readable PNG image")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise unreadable from None
    if not data.startswith(_PNG_START) or len(data) < len(_PNG_START) + 13:
        raise unreadable
    width, height, depth, colours = struct.unpack_from(">IIBB", data, len(_PNG_START))
    if (depth, colours) != (8, 2):
        raise HTTPException(422, f"image {index} must be RGB with 8 bits per channel: convert it before it is sent")
    if width * height > max_pixels:
        raise HTTPException(413, f"image {index} is {width} x {height}: at most {max_pixels} pixels each may be sent")
    try:
        return np.array(open_image(data, max_pixels=width * height))  # a file may hold two headers
    except UnreadableImage:
        raise unreadable from None


def bind(host: str, port: int, *, token: str | None) -> socket.socket:
    """A socket bound to the address, not yet listening; port 0 takes a free one.

    Raises:
        RewardError: no such address, not free, or open to others without a token.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise RewardError(f"host={host!r} is not an address of this machine: give one, such as 127.0.0.1") from error
    if token is None and not ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback:
        raise RewardError(
            f"host={host!r} can be reached from other machines: give a token with --token-file or in {TOKEN}, "
            "or bind 127.0.0.1"
        )
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed can come back at once
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise RewardError(f"host={host!r} port={port} cannot be used: {error.strerror}") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """``http://host:port`` of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Connection(H11Protocol):
    """uvicorn's, which waits for a request's first lines without end and refuses everybody once it is full.

    Here the lines have a deadline, and a new connection costs the one its place that has been silent for longest, of
    those that have no whole request.
    """

    _deadline: asyncio.TimerHandle | None = None
    _heard = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._heard = self.loop.time()
        self._deadline = self.loop.call_later(HEADER_SECONDS, transport.abort)
        others = [one for one in self.connections if isinstance(one, _Connection) and one is not self]
        idle = [one for one in others if not one._is_answered() and not one.transport.is_closing()]
        if len(others) >= CONNECTIONS - SPARE and idle:
            min(idle, key=lambda one: one._heard).transport.abort()

    def data_received(self, data: bytes) -> None:
        self._heard = self.loop.time()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._unset_deadline()
        elif self._deadline is None:  # the beginning of a further request
            self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self._unset_deadline()
        super().connection_lost(error)

    def _unset_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_answered(self) -> bool:
        """Whether there is a whole request, and no whole answer yet."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body


class RewardServer(uvicorn.Server):
    """Serves an application on a bound socket until ``should_exit``, Ctrl-C or SIGTERM; requests begun are answered."""

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=CONNECTIONS,
                timeout_keep_alive=75,  # longer than the client keeps a connection, so that the client ends it
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # another server was bound to the address at the same time and was faster
            raise RewardError(f"the address cannot be used: {error.strerror}") from error
        self._on_ready()

    def serve_on(self, bound: socket.socket, calls: CallsHere | None = None) -> None:
        """Returns when it is over. uvicorn raises a signal that ended it again afterwards; it finds a deaf ear.

        Args:
            calls: those of the application, which are then made in this thread while the server runs in another.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._leave)
        if calls is None:
            self.run(sockets=[bound])
            return
        with ThreadPoolExecutor(1, "server") as pool:
            running = pool.submit(self.run, [bound])
            running.add_done_callback(lambda _: calls.stop())
            calls.work()
        running.result()

    def _leave(self, number: int, frame: object) -> None:
        self.force_exit = self.should_exit and number == signal.SIGINT  # as uvicorn does in the main thread
        self.should_exit = True


class CallsHere(Executor):
    """Runs what is submitted in the thread that calls ``work``: rewards are code that may want the main one."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((future, functools.partial(function, *arguments, **named)))
        return future

    def stop(self) -> None:
        """``work`` returns after what has been submitted so far."""
        self._jobs.put(None)

    def work(self) -> None:
        """Until ``stop``."""
        while job := self._jobs.get():
            future, function = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)


def _set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.get_num_threads()  # reading it also fixes it for this thread
