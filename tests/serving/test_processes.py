"""Starting, stopping and dying."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from mobilevit.serving.server import _accept_all, listen
from running_server import Server, image, until


class Load:
    """Connections that ask again and again until the service is gone."""

    def __init__(self, server: Server, connections: int = 8) -> None:
        self.outcomes: Counter[str] = Counter()
        self._server, self._data, self._on = server, image(0, (200, 160), "JPEG"), True
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(connections)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        count = 0
        while self._on:
            connection = http.client.HTTPConnection(self._server.host, self._server.port, timeout=30)
            try:
                connection.connect()
            except OSError:
                self.outcomes["not accepted"] += 1
                time.sleep(0.05)
                continue
            with contextlib.closing(connection):
                while self._on:
                    count += 1
                    headers = {"Content-Type": "image/jpeg", "X-Request-ID": f"{number}.{count}"}
                    try:
                        connection.request("POST", "/v1/predict", self._data, headers)
                        answer = connection.getresponse()
                        answer.read()
                    except (OSError, http.client.HTTPException):
                        self.outcomes["lost"] += 1
                        break
                    self.outcomes[str(answer.status)] += 1
                    if answer.will_close:
                        break

    def stop(self) -> None:
        self._on = False
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_under_load_loses_nothing(checkpoints: dict[str, Path], workers: int) -> None:
    server = Server([checkpoints["classification"], "--workers", workers, "--threads", "1"])
    load = Load(server)
    until(lambda: load.outcomes["200"] > 50)
    status = server.stop()
    load.stop()
    assert status == 0
    assert load.outcomes["lost"] == 0, load.outcomes
    assert set(load.outcomes) <= {"200", "not accepted", "lost"}
    assert sum(line["path"] == "/v1/predict" for line in server.access()) == load.outcomes["200"]


def test_a_worker_that_is_killed_is_replaced(checkpoints: dict[str, Path]) -> None:
    server = Server([checkpoints["classification"], "--workers", "2", "--threads", "1"])
    parent = psutil.Process(server.process.pid)
    try:
        data = image()
        for _ in range(20):
            assert server.post("/v1/predict", data).status == 200
        assert server.metric("mobilevit_images_total") == 20  # over both
        workers = [
            child for child in parent.children() if child.name() != "resource_tracker" and child.num_threads() > 2
        ]
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        assert server.post("/v1/predict", data).status == 200  # by the other
        until(lambda: sum("ready in" in line for line in list(server.log)) == 3)
        assert any("died (-9); starting another" in line for line in server.log)
        assert server.metric("mobilevit_images_total") == 21  # nothing forgotten
    finally:
        assert server.stop() == 0
    assert not psutil.pid_exists(workers[1].pid)


def test_workers_do_not_outlive_their_parent(checkpoints: dict[str, Path]) -> None:
    server = Server([checkpoints["classification"], "--workers", "2", "--threads", "1"])
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert alive == []


def test_connections_in_the_systems_queue_are_accepted() -> None:
    """Closing the socket would reset them, as they are established for their clients."""
    with listen("127.0.0.1", 0) as sock, contextlib.ExitStack() as held:
        sock.setblocking(False)
        clients = [held.enter_context(socket.create_connection(sock.getsockname())) for _ in range(3)]
        accepted = [held.enter_context(connection) for connection in _accept_all(sock)]
        assert [one.getpeername() for one in accepted] == [client.getsockname() for client in clients]
        assert list(_accept_all(sock)) == []
