"""The processes of the service: one, or several on one listening socket, and how they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn

from mobilevit.errors import MobileViTError
from mobilevit.serving.logs import set_up_logs
from mobilevit.serving.settings import ServeConfig, ServedModel

log = logging.getLogger("mobilevit")

_LAST_WORD_S = 1.0
"""How long connections that are open but silent may still send a request when the service stops."""


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address, bound and not yet listening.

    Raises:
        ValueError: the address is taken, not allowed, or not of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        return sock
    except socket.gaierror as error:
        raise MobileViTError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(host, port) from None
        if error.errno == errno.EACCES:
            raise MobileViTError(f"port {port} of {host} is not allowed; give a --port from 1024 on") from None
        raise MobileViTError(f"--host {host}: {error.strerror}; give an address of this machine") from None


def _in_use(host: str, port: int) -> MobileViTError:
    return MobileViTError(f"port {port} of {host} is in use; stop what uses it, or give another --port")


def address_of(sock: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    config: ServeConfig, models: Sequence[ServedModel], pages: Mapping[str, bytes], on_ready: Callable[[str], None]
) -> int:
    """Answer requests until SIGTERM or SIGINT, then finish what was accepted. Returns the exit status.

    Args:
        config: settings.
        models: what to serve.
        pages: files of the web page.
        on_ready: called once with the address when requests are answered.

    Raises:
        ValueError: the address is not free, or a file is no model.
    """
    sock = listen(config.host, config.port)
    if config.workers > 1:
        return _Workers(config, models, pages, sock, on_ready).run()
    _leave_quietly()
    return _run_one(config, models, pages, sock, lambda: on_ready(address_of(sock)))


class _Server(uvicorn.Server):
    """Uvicorn's, with an end at which no request is lost.

    By itself it closes connections that wait for their next request, which may be under way already. This one closes
    the door, says on every answer that it is the connection's last, and gives silent connections a second.
    """

    def __init__(self, config: uvicorn.Config, app: Any, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._on_ready, self._supervisor = app, on_ready, parent_process()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        if self._supervisor is not None and not self._supervisor.is_alive():  # nobody would stop this worker any more
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping; %d connections open", len(self.server_state.connections))
        self._app.draining = True
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        deadline = time.monotonic() + _LAST_WORD_S
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets=sockets)


def _run_one(
    config: ServeConfig,
    models: Sequence[ServedModel],
    pages: Mapping[str, bytes],
    sock: socket.socket,
    on_ready: Callable[[], None],
) -> int:
    # Not before, as PROMETHEUS_MULTIPROC_DIR is read when it is imported, and as it brings PyTorch along.
    from mobilevit.serving.app import create_app
    from mobilevit.serving.service import open_predictors

    set_up_logs(config.log_format)
    # Threads that compute hold the interpreter for short moments only; the event loop need not wait for 5 ms.
    sys.setswitchinterval(0.001)
    app = create_app(config, models, open_predictors(config, models), pages)
    try:
        sock.listen()  # two services can be bound to one address, but only the first one to listen gets it
    except OSError:
        raise _in_use(config.host, config.port) from None
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        limit_concurrency=config.max_connections,
        timeout_graceful_shutdown=max(1, round(config.shutdown_s)),
    )
    try:
        _Server(settings, app, on_ready).run(sockets=[sock])
    except SystemExit as stop:  # the log says why it could not start
        return int(stop.code or 0)
    return 0


def _leave_quietly() -> None:
    """For signals before uvicorn handles them, and for those that it raises again when it is done."""

    def leave(*_: object) -> None:
        sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)


def _worker(
    config: ServeConfig,
    models: Sequence[ServedModel],
    pages: Mapping[str, bytes],
    sock: socket.socket,
    ready: Connection,
) -> None:
    _leave_quietly()
    try:
        status = _run_one(config, models, pages, sock, lambda: ready.send(""))
    except ValueError as error:
        ready.send(str(error))
        status = 2
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is leaving already
    sys.exit(status)


class _Workers:
    """Several processes that accept from one socket; one that dies is replaced.

    Uvicorn has such a supervisor, too. It keeps the socket open while its workers finish, so that connections are
    accepted which nobody will answer, and looks only every half second whether a worker has died.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Sequence[ServedModel],
        pages: Mapping[str, bytes],
        sock: socket.socket,
        on_ready: Callable[[str], None],
    ) -> None:
        self._config, self._models, self._pages, self._sock = config, models, pages, sock
        self._on_ready, self._address = on_ready, address_of(sock)
        self._processes: dict[BaseProcess, Connection] = {}
        self._told = False
        self._ready: set[BaseProcess] = set()

    def run(self) -> int:
        set_up_logs(self._config.log_format)
        with tempfile.TemporaryDirectory(prefix="mobilevit-metrics-") as folder, _signals() as signaled:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            try:
                for _ in range(self._config.workers):
                    self._start()
                return self._watch(signaled, Path(folder))
            finally:
                self._stop()

    def _start(self) -> None:
        context = get_context("spawn")
        here, there = context.Pipe(duplex=False)
        arguments = (self._config, self._models, self._pages, self._sock, there)
        process = context.Process(target=_worker, args=arguments, name="worker")
        process.start()
        there.close()
        self._processes[process] = here

    def _watch(self, signaled: socket.socket, folder: Path) -> int:
        """Until told to stop. Returns the exit status."""
        while True:
            sentinels = {process.sentinel: process for process in self._processes}
            starting = [pipe for process, pipe in self._processes.items() if process not in self._ready]
            happened = connection.wait([signaled, *sentinels, *starting])
            if signaled in happened:
                return 0
            for process, pipe in list(self._processes.items()):
                if pipe in happened and process not in self._ready:
                    self._hear(process, pipe)
                if process.sentinel not in happened:
                    continue
                process.join()
                del self._processes[process]
                self._forget(process, folder)
                if not self._told:
                    log.error("a worker could not start; stopping")
                    return 1
                log.error("worker %s died (%s); starting another", process.pid, process.exitcode)
                if process not in self._ready:
                    time.sleep(1)  # it did not live long; do not spin
                self._start()
            if not self._told and self._ready.issuperset(self._processes):
                self._told = True
                self._on_ready(self._address)

    def _hear(self, process: BaseProcess, pipe: Connection) -> None:
        """A worker is ready, or says why not."""
        with contextlib.suppress(EOFError):  # it died without a word
            problem: str = pipe.recv()
            if problem and not self._told:
                raise MobileViTError(problem)
            if problem:
                log.error("%s", problem)
            else:
                self._ready.add(process)

    def _forget(self, process: BaseProcess, folder: Path) -> None:
        from mobilevit.serving.metrics import forget_worker

        if process.pid is not None:
            forget_worker(process.pid, folder)

    def _stop(self) -> None:
        self._sock.close()
        for process in self._processes:
            process.terminate()
        deadline = time.monotonic() + self._config.shutdown_s + 2 * _LAST_WORD_S + 5
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                log.error("worker %s does not stop; killing it", process.pid)
                process.kill()
                process.join()


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that can be read from as soon as SIGTERM or SIGINT has come."""
    here, there = socket.socketpair()
    there.setblocking(False)

    def tell(*_: object) -> None:
        with contextlib.suppress(OSError):
            there.send(b"!")

    before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield here
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        here.close()
        there.close()
