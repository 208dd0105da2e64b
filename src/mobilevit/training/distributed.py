"""Several processes that train one model, as torchrun starts them; a process on its own needs none of this.

    torchrun --standalone --nproc-per-node 8 -m mobilevit train ...

Each process has a rank, from 0 up. The first writes the run folder and logs; the others log errors only.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mobilevit.devices import pick_device
from mobilevit.errors import MobileViTError

log = logging.getLogger("mobilevit")

T = TypeVar("T")

TIME_TO_MEET = timedelta(minutes=10)
"""For processes of one round to find each other, and for each exchange between them."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes that train one model, seen from one of them."""

    rank: int = 0
    size: int = 1
    is_restart: bool = False
    """Whether torchrun has started these processes after others that failed, or that were more or fewer."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


@contextmanager
def joined(device: str) -> Iterator[tuple[World, torch.device]]:
    """Meet the other processes, if torchrun has started any, and part from them in the end.

    Of the devices that `TrainConfig` has, "auto" and "cuda" give each process a GPU of its own.

    Raises:
        MobileViTError: no such device, or more processes than GPUs.
        SystemExit: another process has ended.
    """
    chosen = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        world = _meet()[1] if distributed.is_torchelastic_launched() else World()
        # What is told no device, such as a stream, takes the current one, which else is the first GPU.
        with torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext():
            yield world, chosen
        return
    if chosen.type == "cuda":
        chosen = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(chosen)
    # What is not on a GPU (settings, states, agreements) goes through gloo.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    store, world = _meet()
    distributed.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIME_TO_MEET)
    level = log.level
    if not world.is_first:
        log.setLevel(logging.ERROR)
    try:
        [is_restart] = any_of(world, world.is_restart)  # machines count their own restarts only
        yield replace(world, is_restart=is_restart), chosen
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


def _meet() -> tuple[PrefixStore, World]:
    """Find the other processes; return a store that these processes and no others share.

    torchrun starts all processes anew when one fails, but may keep the store in which they find each other (it does
    in PyTorch 2.15): gloo and NCCL then look for processes that have ended. So the first process numbers the round,
    and tells the number to each that asks by a name that was never used before.
    """
    store, rank, size = next(rendezvous("env://", timeout=TIME_TO_MEET))
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"mobilevit/asks/{rank}", name)
        number = int(store.get(f"mobilevit/answer/{name}"))
        store.set(f"mobilevit/knows/{number}/{rank}", "")
    else:
        number = store.add("mobilevit/rounds", 1)
        missing = list(range(1, size))
        end = time.monotonic() + TIME_TO_MEET.total_seconds()
        while missing:
            if time.monotonic() > end:
                raise RuntimeError(f"processes {', '.join(map(str, missing))} of {size} have not come")
            for other in missing:
                if store.check([f"mobilevit/asks/{other}"]):  # or its predecessor did, which does no harm
                    store.set(f"mobilevit/answer/{store.get(f'mobilevit/asks/{other}').decode()}", str(number))
            time.sleep(0.01)
            missing = [other for other in missing if not store.check([f"mobilevit/knows/{number}/{other}"])]
    is_restart = number > 1 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return PrefixStore(f"mobilevit/{number}", store), World(rank=rank, size=size, is_restart=is_restart)


def _is_lost_connection(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset", "Broken pipe", "gloo")
    is_networks = isinstance(error, distributed.DistNetworkError | distributed.DistBackendError)
    return is_networks or any(word in str(error) for word in words)


def end_soon() -> None:
    """End this process in a while, whatever it is waiting for.

    For SIGTERM, which torchrun sends when another process has died, and follows by SIGKILL after 30 seconds.
    """
    timer = threading.Timer(20, os._exit, (1,))
    timer.daemon = True
    timer.start()


def speaks() -> bool:
    """Whether this process is the first or alone, also before processes meet and after they part."""
    return os.environ.get("RANK", "0") == "0"


def seed_of(world: World, seed: int) -> int:
    """Derive a seed of this process's own; of 32 bits, as PyTorch's generator on the CPU looks at no more."""
    return random.Random(f"{seed}/{world.rank}").getrandbits(32)


def local_size() -> int:
    """Count the processes on this machine that train together."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def on_first(world: World, function: Callable[[], T]) -> T:
    """Call a function in the first process and return its result in all.

    Raises:
        MobileViTError: in the first process; the others end without a message.
    """
    if world.size == 1:
        return function()
    message: list[list[T]] = [[]]
    error: MobileViTError | None = None
    if world.is_first:
        try:
            message = [[function()]]
        except MobileViTError as raised:
            error = raised
    distributed.broadcast_object_list(message)
    if error is not None:
        raise error
    if not message[0]:
        raise SystemExit(2)
    return message[0][0]


def require_same(world: World, what: str, values: dict[str, object]) -> None:
    """Compare values of all processes.

    Raises:
        MobileViTError: they differ; in the first process, naming what and where. The others end.
    """
    everyone = gathered(world, values)

    def compare() -> None:
        for rank, theirs in enumerate(everyone):
            for name, value in theirs.items():
                if value != everyone[0][name]:
                    raise MobileViTError(
                        f"process {rank} has {what} {name} = {value}, process 0 has {everyone[0][name]}; start all "
                        "processes with the same command"
                    )

    on_first(world, compare)


def gathered(world: World, value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    if world.size == 1:
        return [value]
    values = [value] * world.size
    distributed.all_gather_object(values, value)
    return values


def any_of(world: World, *wishes: bool) -> list[bool]:
    """Say of each wish whether any process has it."""
    if world.size == 1:
        return list(wishes)
    votes = torch.tensor([int(wish) for wish in wishes])
    distributed.all_reduce(votes, distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def spread(world: World, module: nn.Module) -> None:
    """Make a module's weights and statistics those of the first process."""
    if world.size > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            distributed.broadcast(tensor.data, src=0)


def wrap(world: World, forward: nn.Module, device: torch.device, *, accumulates: bool) -> nn.Module:
    """Make a module's backward pass average the gradients of all processes."""
    if world.size == 1:
        return forward
    return nn.parallel.DistributedDataParallel(
        forward,
        device_ids=[device] if device.type == "cuda" else None,
        static_graph=not accumulates,  # which cannot leave out the exchange of gradients in the first step
        gradient_as_bucket_view=True,
    )
