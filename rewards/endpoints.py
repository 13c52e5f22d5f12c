"""What rewards that call a server share: its address, the token, images as PNG, and patience while it is away.

Nothing a server sends is trusted: an answer is read up to a bound, as it is on the wire (nothing is decompressed), and
one deadline holds for all of a request, so that neither an endless nor a dribbling answer is waited for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import functools
import io
import ipaddress
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from PIL import Image
from pydantic import PlainValidator

from diffusion_align.errors import describe_exception, short
from diffusion_align.inputs import check_path
from diffusion_align.interrupt import interrupted
from diffusion_align.rewards.base import RewardError
from diffusion_align.streams import printable

if TYPE_CHECKING:
    import numpy as np

LARGEST_ANSWER = 1_000_000  # bytes
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts; doubled each time
REST = 30.0  # seconds for which a server that failed is called after the others
CONNECT_TIMEOUT = 10.0

_starting = threading.Lock()

Job = TypeVar("Job")
Result = TypeVar("Result")


class Unanswered(Exception):
    """No answer this time; another attempt may get one.

    Attributes:
        pause: seconds that the server asks to wait, 0 if it gave none.
    """

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Endpoint:
    """One server, called over connections that are kept; any number of threads may call.

    Args:
        url: http(s)://host[:port][/path].
        label: what it is, for sentences.
        token: sent as a bearer token.
        timeout: seconds that a whole request may take, from the connection to the last byte of the answer.
        transient: status codes after which the same request may succeed.
    """

    def __init__(self, url: str, *, label: str, token: str | None, timeout: float, transient: Iterable[int]) -> None:
        self.url, self.label, self.transient = url.rstrip("/"), label, frozenset(transient)
        self.timeout = timeout
        self.failed_at = -float("inf")
        self._away, self._lock = False, threading.Lock()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that the client's connections belong to

    def __str__(self) -> str:
        return f"{self.label} {self.url}"

    def ask_once(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The JSON answer to one request, which is abandoned where the loop it works for is interrupted.

        Raises:
            Unanswered: no connection, no answer in time, or a transient status.
            RewardError: any other status than 200, with what the server says about it; no JSON; more of it than
                ``LARGEST_ANSWER``; an interruption.
        """
        import httpx2

        loop = _event_loop()
        exchange = asyncio.run_coroutine_threadsafe(self._exchange(loop, method, path, body), loop)
        try:
            while not concurrent.futures.wait([exchange], timeout=0.1).done:
                raise_if_interrupted(str(self))
            status, headers, content = exchange.result()
        except TimeoutError as error:
            raise Unanswered(f"no answer within timeout={self.timeout:g} s, too short for a slow server") from error
        except httpx2.TransportError as error:
            raise Unanswered(describe_exception(error)) from error
        except httpx2.RequestError as error:
            raise RewardError(f"{self} gave an answer that cannot be read ({describe_exception(error)})") from error
        finally:
            exchange.cancel()
        if status in self.transient:
            raise Unanswered(f"{status}: {_said(content)}", retry_after(headers.get("Retry-After")))
        if status != 200:
            raise RewardError(f"{self} answered {status}: {_said(content)}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"{self} did not answer in JSON: is this the right address?") from error

    async def _exchange(
        self, loop: asyncio.AbstractEventLoop, method: str, path: str, body: bytes | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of an answer. TimeoutError after ``timeout`` seconds, wherever they went."""
        headers = {"Accept-Encoding": "identity"} | ({"Content-Type": "application/json"} if body else {})
        content = bytearray()
        async with (
            asyncio.timeout(self.timeout),
            self._client_on(loop).stream(method, self.url + path, content=body, headers=headers) as answer,
        ):
            encoding = answer.headers.get("Content-Encoding", "identity")
            if encoding.strip().lower() != "identity":
                raise RewardError(f"{self} compressed its answer ({printable(encoding)[:40]}), which was not requested")
            async for chunk in answer.aiter_raw():
                content += chunk
                if len(content) > LARGEST_ANSWER:
                    raise RewardError(f"{self} answered more than {LARGEST_ANSWER} bytes: is this the right address?")
        return answer.status_code, answer.headers, bytes(content)

    def _client_on(self, loop: asyncio.AbstractEventLoop) -> Any:
        """The client, whose connections live as long as its loop does."""
        import httpx2

        if self._loop is not loop:
            self._loop = loop
            self._client = httpx2.AsyncClient(
                headers=self._headers,
                timeout=httpx2.Timeout(None, connect=min(self.timeout, CONNECT_TIMEOUT)),
                limits=httpx2.Limits(keepalive_expiry=30.0),
                trust_env=not is_loopback(self.url),  # a proxy of the environment cannot reach this machine's own
            )
            weakref.finalize(self, _close, self._client, loop).atexit = False
        return self._client

    def note(self, failure: Unanswered | None, patience: float) -> None:
        """Remember whether it answered; the first failure in a row is printed on stderr."""
        with self._lock:
            reported, self._away = self._away, failure is not None
        if failure is not None:
            self.failed_at = time.monotonic()
            if not reported:
                sentence = printable(f"{self} does not answer ({failure}): trying again for up to {patience:g} s")
                print(sentence, file=sys.stderr, flush=True)


def ask(
    endpoints: Sequence[Endpoint],
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    patience: float,
    first: int = 0,
    stop: threading.Event | None = None,
) -> Any:
    """The JSON answer of the first endpoint that gives one; all are called in turn, with growing pauses between rounds.

    Args:
        endpoints: of equal worth; those that failed lately come last.
        patience: seconds until it gives up, or until the loop it works for is interrupted.
        first: index of the endpoint to begin with.
        stop: ends the waiting from another thread.

    Raises:
        RewardError: an endpoint refused, or none answered for ``patience`` seconds.
    """
    started, pause = time.monotonic(), FIRST_PAUSE
    stop = stop or threading.Event()
    while True:
        raise_if_interrupted(_names(endpoints))
        wanted = 0.0
        turned = [*endpoints[first:], *endpoints[:first]]
        for endpoint in sorted(turned, key=lambda one: time.monotonic() - one.failed_at < REST):
            try:
                answer = endpoint.ask_once(method, path, body)
            except Unanswered as error:
                endpoint.note(error, patience)
                wanted, reason = max(wanted, error.pause), str(error)
            else:
                endpoint.note(None, patience)
                return answer
        waited = time.monotonic() - started
        if waited >= patience or stop.is_set():
            raise RewardError(
                f"{_names(endpoints)} gave no answer for {waited:.0f} s ({reason}): start it and try again (a training "
                f"run with resume=true), or set patience above {patience:g} s"
            )
        again = time.monotonic() + min(max(pause, wanted), patience - waited)
        while time.monotonic() < again and not stop.wait(min(0.2, again - time.monotonic())) and not interrupted():
            pass
        pause = min(2 * pause, LONGEST_PAUSE)


def raise_if_interrupted(names: str) -> None:
    """RewardError where the loop that calls the servers ``names`` was interrupted."""
    if interrupted():
        raise RewardError(f"interrupted while calling {names}: resume with resume=true")


def _close(client: Any, loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(client.aclose(), loop)


@functools.cache
def _loop_of(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="requests", daemon=True).start()
    return loop


def _event_loop() -> asyncio.AbstractEventLoop:
    """Where this process makes its requests: in a thread of its own, as a blocking read cannot be interrupted."""
    with _starting:
        return _loop_of(os.getpid())


def _names(endpoints: Sequence[Endpoint]) -> str:
    return f"{endpoints[0].label} {', '.join(endpoint.url for endpoint in endpoints)}"


def in_parallel(function: Callable[[Job, threading.Event], Result], jobs: Sequence[Job], threads: int) -> list[Result]:
    """``function(job, stop)`` of every job, in their order; ``stop`` is set when one of them has failed."""
    stop = threading.Event()
    if min(len(jobs), threads) <= 1:  # in this thread, so that Ctrl-C ends it
        return [function(job, stop) for job in jobs]
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(function, job, stop) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception()]
            return [future.result() for future in failed or futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def png(pixels: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3), as the bytes of a PNG file; nothing is lost."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def check_url(url: str) -> str:
    """The address of a server as it is; no request is made.

    Raises:
        RewardError: it is none; a password in it is not repeated.
    """
    _, at, host = repr(url).rpartition("@")
    shown = f"'...@{host}" if at else host
    wrong = RewardError(f"url={shown} is not an address of a server: give one like http://127.0.0.1:8901")
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        raise wrong
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
        raise wrong
    if parts.username is not None or parts.password is not None:
        raise RewardError(
            f"url must not contain a user, here {parts.username!r}: put the token into a file and set token_file to it"
        )
    return url


def is_loopback(url: str) -> bool:
    """Whether the address is this machine's own, so that nobody else can listen or answer."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: str | Path | None, variable: str) -> str | None:
    """The token in ``file``, else in the environment's ``variable``, else None.

    Raises:
        RewardError: the file cannot be read, or the token has characters that no header may hold.
    """
    if file is not None:
        place = f"token_file={short(str(file))}"
        if isinstance(file, str | Path):
            check_path(file, place, "file", error=RewardError)
        try:
            token = Path(file).expanduser().read_text(encoding="ascii").strip()
        except (OSError, ValueError, TypeError) as error:
            raise RewardError(f"{place} cannot be read ({describe_exception(error)})") from error
        if not token:
            raise RewardError(f"{place} is empty: write the token into it")
    else:
        place, token = f"the environment's {variable}", os.environ.get(variable, "").strip()
    if not token:
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise RewardError(f"{place} does not hold a token: it must be one line of ASCII without spaces")
    return token


def readable_token(variable: str) -> PlainValidator:
    """For the option ``token_file``: the token is read as ``read_token`` will read it."""

    def check(file: str | Path | None) -> str | Path | None:
        read_token(file, variable)
        return file

    return PlainValidator(check)


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header (seconds or a date, RFC 9110 section 10.2.3) asks to wait; 0 without one."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _said(content: bytes) -> str:
    """What an error's body says, in one line: FastAPI's ``detail``, OpenAI's ``error.message``, else its beginning."""
    text, most = content.decode("utf-8", errors="replace"), 200
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict):
        error = body.get("error")
        known = [body.get("detail"), error.get("message") if isinstance(error, dict) else error]
        text, most = next((one for one in known if isinstance(one, str)), text), 1000
    return " ".join(printable(text).split())[:most] or "(nothing more)"
