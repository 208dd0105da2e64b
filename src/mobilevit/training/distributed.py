"""Several processes that train one model, as torchrun starts them; a process on its own needs none of this.

    torchrun --standalone --nproc-per-node 8 -m mobilevit train ...

Each process has a rank, from 0 up. The first writes the run folder and speaks; the others speak of errors only.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from mobilevit.devices import pick_device

log = logging.getLogger("mobilevit")

T = TypeVar("T")

SECONDS_TO_STOP = 20
"""After SIGTERM, which torchrun sends when another process has died, and which is followed by SIGKILL after 30."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Who else trains this model."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """Meet the other processes, if torchrun has started any, and leave them in the end.

    Args:
        device: as `--device` says; "auto" and "cuda" give each process a GPU of its own.

    Raises:
        ValueError: no such device, or more processes than GPUs.
        SystemExit: another process has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        chosen = pick_device(device)
        # What is told no device, such as a stream, takes the current one, which else is the first GPU.
        with torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext():
            yield World(), chosen
        return
    world = World(rank=int(os.environ["RANK"]), size=size)
    local_rank = int(os.environ["LOCAL_RANK"])
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = pick_device(f"cuda:{local_rank}")
        torch.cuda.set_device(chosen)
    # What is not on a GPU (settings, states, agreements) goes through gloo.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    level = log.level
    if not world.is_first:
        log.setLevel(logging.ERROR)
    distributed.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield world, chosen
        distributed.barrier()
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        print(f"process {world.rank}: stopped, as another process has ended", file=sys.stderr, flush=True)
        # Not by an exception: leaving the group waits for operations that will never end.
        os._exit(1)
    finally:
        log.setLevel(level)
        if sys.exc_info()[0] is None:
            distributed.destroy_process_group()


def _is_lost_connection(error: RuntimeError) -> bool:
    if isinstance(error, distributed.DistNetworkError | distributed.DistBackendError):
        return True
    return any(
        words in str(error) for words in ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo")
    )


def end_soon() -> None:
    """End this process in a while, whatever it is waiting for; for SIGTERM, when others may be gone already."""
    timer = threading.Timer(SECONDS_TO_STOP, os._exit, (1,))
    timer.daemon = True
    timer.start()


def speaks() -> bool:
    """Whether this process is the first or alone, when none has met another yet, or all have left."""
    return os.environ.get("RANK", "0") == "0"


def seed_of(world: World, seed: int) -> int:
    """A seed of this process's own; of 32 bits, as PyTorch's generator on the CPU looks at no more."""
    return random.Random(f"{seed}/{world.rank}").getrandbits(32)


def is_restart() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_size() -> int:
    """Processes on this machine that train together."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_first(world: World, function: Callable[[], T]) -> T:
    """What the first process's call returns, for all.

    Raises:
        ValueError: in the first process; the others end without a word, as it has said all there is to say.
    """
    if world.size == 1:
        return function()
    outcome: list[Any] = [None, False]
    error: ValueError | None = None
    if world.is_first:
        try:
            outcome[0] = function()
        except ValueError as raised:
            error, outcome[1] = raised, True
    distributed.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1]:
        raise SystemExit(2)
    return outcome[0]  # type: ignore[no-any-return]


def require_same(world: World, what: str, values: dict[str, Any]) -> None:
    """See that all processes were told the same.

    Raises:
        ValueError: in the first process, naming what differs where; the others end.
    """
    everyone = gathered(world, values)

    def compare() -> None:
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                if value != everyone[0][name]:
                    raise ValueError(
                        f"process {rank} has {what} {name} = {value}, process 0 has {everyone[0][name]}; start all "
                        "processes with the same command"
                    )

    on_first(world, compare)


def gathered(world: World, value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    distributed.all_gather_object(values, value)
    return values


def any_of(world: World, *wishes: bool) -> list[bool]:
    """Of each wish, whether any process has it."""
    if world.size == 1:
        return list(wishes)
    votes = torch.tensor([int(wish) for wish in wishes])
    distributed.all_reduce(votes, distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def spread(world: World, module: nn.Module) -> None:
    """Make a module's weights and statistics those of the first process."""
    if world.size > 1:
        for tensor in _tensors(module):
            distributed.broadcast(tensor, src=0)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*(parameter.data for parameter in module.parameters()), *module.buffers()]


def wrap(world: World, forward: Any, device: torch.device, *, accumulates: bool) -> Any:
    """A module, perhaps compiled, whose backward pass also averages the gradients of all processes."""
    if world.size == 1:
        return forward
    return nn.parallel.DistributedDataParallel(
        forward,
        device_ids=[device] if device.type == "cuda" else None,
        static_graph=not accumulates,  # which cannot leave out the exchange of gradients in the first step
        gradient_as_bucket_view=True,
    )
