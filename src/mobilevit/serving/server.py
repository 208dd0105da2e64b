"""The processes of the service: one, or several on one listening socket; starting and stopping them."""

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
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import uvicorn

from mobilevit.errors import MobileViTError, one_line
from mobilevit.serving.observing import Observed, set_up_logs
from mobilevit.serving.settings import ServeConfig

log = logging.getLogger("mobilevit")

_IDLE_GRACE_S = 1.0
"""How long open but idle connections may still send a request when the service stops."""


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; connections wait until a worker accepts them.

    Raises:
        MobileViTError: the address is in use, not allowed, or not an address of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen()
        return sock
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use; stop the program that uses it, or choose another `port`"
        elif error.errno == errno.EACCES:
            message = f"port {port} of {host} is not allowed; choose a `port` from 1024 on"
        else:
            message = f"`host` is {host!r}: {one_line(error)}; give an address of this machine"
        raise MobileViTError(message) from None


def serve(config: ServeConfig, models: Mapping[str, Path], on_ready: Callable[[str], None]) -> int:
    """Serve the models, files by name, until SIGTERM or SIGINT, then answer the accepted requests.

    `on_ready` is called once, with the address, when requests are accepted. Returns the exit status.

    Raises:
        MobileViTError: the address is not free, or a file is not a model.
    """
    sock = listen(config.host, config.port)
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if config.workers > 1:
        return _Supervisor(config, models, sock, lambda: on_ready(address)).run()
    _leave_quietly()
    return _run_one(config, models, sock, lambda: on_ready(address))


class _Server(uvicorn.Server):
    """Uvicorn's server, with a shutdown that loses no request.

    Uvicorn closes idle connections at once, although their next request may be on its way. This server stops accepting
    connections, closes each one after its next answer, and gives idle ones a second.
    """

    def __init__(self, config: uvicorn.Config, app: Observed, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._app, self._on_ready, self._supervisor = app, on_ready, parent_process()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        if self._supervisor is not None and not self._supervisor.is_alive():  # nothing else would stop this worker
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping; %d connections open", len(self.server_state.connections))
        self._app.draining = True
        waiting = [client for sock in sockets or [] for client in _accept_all(sock)]
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for client in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, client)
        deadline = time.monotonic() + _IDLE_GRACE_S
        while self.server_state.connections and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets=sockets)

    def _protocol(self) -> asyncio.Protocol:
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _accept_all(sock: socket.socket) -> Iterator[socket.socket]:
    """Accept the connections that wait in the system's queue; closing the socket would reset them."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield sock.accept()[0]


def _run_one(config: ServeConfig, models: Mapping[str, Path], sock: socket.socket, on_ready: Callable[[], None]) -> int:
    # Not at the top: the supervisor of several workers needs neither FastAPI nor models.
    from mobilevit.serving.app import create_app
    from mobilevit.serving.service import open_predictors

    set_up_logs(config.log_format)
    # Other threads need the interpreter for short moments only; the event loop need not wait 5 ms for it.
    sys.setswitchinterval(0.001)
    app = create_app(config, models, open_predictors(config, models))
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
    except SystemExit as stop:  # the reason is in the log
        return int(stop.code or 0)
    return 0


def _leave_quietly() -> None:
    """Exit on signals before uvicorn handles them, and on those that it raises again at its end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))


def _worker(config: ServeConfig, models: Mapping[str, Path], sock: socket.socket, ready: Connection) -> None:
    _leave_quietly()
    try:
        status = _run_one(config, models, sock, lambda: ready.send(""))
    except MobileViTError as error:
        ready.send(str(error))
        status = 2
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is exiting already
    sys.exit(status)


class _Supervisor:
    """Several workers that accept connections from one socket; one that dies is replaced.

    Uvicorn's own supervisor keeps the socket open while its workers finish, so it accepts connections that get no
    answer, and it checks only every half second whether a worker has died.
    """

    def __init__(
        self, config: ServeConfig, models: Mapping[str, Path], sock: socket.socket, on_ready: Callable[[], None]
    ) -> None:
        self._config, self._models, self._sock, self._on_ready = config, models, sock, on_ready
        self._workers: dict[BaseProcess, Connection] = {}
        self._ready: set[BaseProcess] = set()
        self._announced = False

    def run(self) -> int:
        set_up_logs(self._config.log_format)
        signaled, note = socket.socketpair()  # a signal makes the first of them readable
        with _metrics_folder() as folder:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: note.send(b"!"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            try:
                for _ in range(self._config.workers):
                    self._start()
                return self._watch(signaled, folder)
            finally:
                self._stop()

    def _start(self) -> None:
        context = get_context("spawn")
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_worker, args=(self._config, self._models, self._sock, there), name="worker")
        worker.start()
        there.close()
        self._workers[worker] = here

    def _watch(self, signaled: socket.socket, folder: str) -> int:
        """Replace workers that die until a signal arrives. Return the exit status."""
        from prometheus_client.multiprocess import mark_process_dead

        while True:
            starting = [pipe for worker, pipe in self._workers.items() if worker not in self._ready]
            happened = connection.wait([signaled, *(worker.sentinel for worker in self._workers), *starting])
            if signaled in happened:
                return 0
            for worker, pipe in list(self._workers.items()):
                if pipe in happened:
                    self._receive(worker, pipe)
                if worker.sentinel not in happened:
                    continue
                worker.join()
                del self._workers[worker]
                mark_process_dead(worker.pid, folder)  # type: ignore[no-untyped-call]  # its counts stay in the sums
                if not self._announced:
                    log.error("a worker could not start; stopping")
                    return 1
                log.error("worker %s died (%s); starting another", worker.pid, worker.exitcode)
                if worker not in self._ready:
                    time.sleep(1)  # it died early; do not restart it in a tight loop
                self._start()
            if not self._announced and self._ready.issuperset(self._workers):
                self._announced = True
                self._on_ready()

    def _receive(self, worker: BaseProcess, pipe: Connection) -> None:
        """Receive a worker's message: empty if it is ready, otherwise its error."""
        with contextlib.suppress(EOFError):  # it died before it sent one
            problem: str = pipe.recv()
            if problem and not self._announced:
                raise MobileViTError(problem)
            if problem:
                log.error("%s", problem)
            else:
                self._ready.add(worker)

    def _stop(self) -> None:
        self._sock.close()
        for worker in self._workers:
            worker.terminate()
        deadline = time.monotonic() + self._config.shutdown_s + 2 * _IDLE_GRACE_S + 5
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                log.error("worker %s does not stop; killing it", worker.pid)
                worker.kill()
                worker.join()


def _metrics_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="mobilevit-metrics-")
    except OSError as error:
        raise MobileViTError(
            f"several `workers` need a temporary folder for their metrics, which cannot be made ({one_line(error)}); "
            "set TMPDIR to a folder that can be written"
        ) from error
