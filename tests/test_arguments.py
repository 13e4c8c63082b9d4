"""Arguments that many public calls have: each takes the same values of them, and refuses the others alike."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.coordinator import GroupCoordinator
from commgraph.testing import spmd
from tests.helpers import on, on_ctx

ALONE: dict[str, str] = {}
TIMES: tuple[Any, ...] = (timedelta(seconds=30), 30, 30.5, np.float32(30), np.int64(30))
NO_TIMES: tuple[Any, ...] = ("30", True, -1, float("nan"), float("inf"), timedelta(0), [30])


def public_calls(argument: str) -> Iterator[str]:
    """Names of the public functions and methods that have `argument`."""
    for name in cg.__all__:
        owner = getattr(cg, name)
        if not isinstance(owner, type) or issubclass(owner, BaseException):
            continue
        if argument in inspect.signature(owner).parameters:
            yield name
        for member, raw in inspect.getmembers_static(owner):
            function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
            if (
                not member.startswith("_")
                and isinstance(function, types.FunctionType)
                and argument in inspect.signature(function).parameters
            ):
                yield f"{name}.{member}"
    for name in cg.testing.__all__:
        if argument in inspect.signature(getattr(cg.testing, name)).parameters:
            yield f"testing.{name}"


def is_backend(name: str) -> bool:
    """Whether it is called by commgraph only: the hooks of platforms, and the constructor of deadlines."""
    return name.endswith(".make_backend") or name == "Deadline.of"


def in_queue(use: Callable[[cg.MessageQueue, cg.MessageQueue], Any]) -> None:
    with cg.MessageQueue.create(1) as writer, cg.MessageQueue.attach(writer.handle, 0) as reader:
        use(writer, reader)


def take_one(writer: cg.MessageQueue, reader: cg.MessageQueue, timeout: Any) -> None:
    writer.enqueue(1)
    reader.dequeue(timeout)


def work(use: Callable[[cg.Work[Any]], Any]) -> None:
    on(2, lambda group: use(group.all_reduce_async(torch.ones(2))))


# Every public call with a deadline that is no method of a group (those are in coordinator/test_bad_input.py), given that deadline.
CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "World.from_env": lambda timeout, _: cg.World.from_env(ALONE, timeout=timeout),
    "World.connect": lambda timeout, place: cg.World.connect(f"file://{place}/meet", rank=0, world_size=1, timeout=timeout),
    "World.from_store": lambda timeout, _: cg.World.from_store(dist.HashStore(), rank=0, world_size=1, timeout=timeout),
    "World.from_torch": lambda timeout, place: joined(place, timeout=timeout),
    "World.join": lambda timeout, _: grown({}, {"timeout": timeout}),
    "World.grow": lambda timeout, _: grown({"timeout": timeout}, {}),
    "World.survivors": lambda timeout, _: cg.World.from_env(ALONE).survivors(timeout=timeout).close(),
    "World.close": lambda timeout, _: spmd(lambda world: world.close(timeout=timeout), 2),
    "ParallelContext.close": lambda timeout, _: on_ctx(2, lambda context: context.close(timeout=timeout)),
    "CommunicatorOptions": lambda timeout, _: cg.CommunicatorOptions(timeout=timeout),
    "CommunicatorOptions(host_timeout)": lambda timeout, _: cg.CommunicatorOptions(host_timeout=timeout),
    "MessageQueue.wait_until_ready": lambda timeout, _: in_queue(lambda writer, reader: writer.wait_until_ready(timeout)),
    "MessageQueue.enqueue": lambda timeout, _: in_queue(lambda writer, reader: writer.enqueue(1, timeout)),
    "MessageQueue.dequeue": lambda timeout, _: in_queue(lambda writer, reader: take_one(writer, reader, timeout)),
    "MessageQueue.close": lambda timeout, _: in_queue(lambda writer, reader: writer.close(timeout)),
    "Work.wait": lambda timeout, _: work(lambda one: one.wait(timeout)),
    "testing.spmd": lambda timeout, _: spmd(lambda world: world.rank, 2, timeout=timeout),
}


def joined(place: Path, **how: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}/torch", rank=0, world_size=1)
    try:
        cg.World.from_torch(**how).close()
    finally:
        dist.destroy_process_group()


def grown(grow: dict[str, Any], join: dict[str, Any]) -> None:
    """A World of one that grows by a newcomer, a thread here; both with some arguments."""
    with ThreadPoolExecutor(1) as pool, cg.World.from_env(ALONE) as world:
        came: list[Future[cg.World]] = []

        def announce(ticket: str) -> None:
            came.append(pool.submit(lambda: cg.World.join(ticket, **join)))
            with contextlib.suppress(TimeoutError):  # it has begun to wait
                if (error := came[0].exception(0.1)) is not None:
                    raise error

        with world.grow(1, announce=announce, **grow) as larger:
            assert (larger.size, came[0].result().size) == (2, 2)
            pool.submit(came[0].result().close)


def test_every_call_with_a_deadline_is_in_the_table() -> None:
    groups = {name for name in public_calls("timeout") if name.startswith("GroupCoordinator.")}
    others = {name for name in public_calls("timeout") if not is_backend(name)} - groups
    assert others == set(CALLS) - {"CommunicatorOptions(host_timeout)"}
    annotations = {
        name: inspect.signature(getattr(GroupCoordinator, name.partition(".")[2])).parameters["timeout"].annotation for name in groups
    }
    assert set(annotations.values()) == {"Timeout"}


@pytest.mark.parametrize("call", CALLS)
def test_a_deadline_is_a_timedelta_or_seconds(call: str, tmp_path: Path) -> None:
    for number, timeout in enumerate(TIMES):
        (place := tmp_path / str(number)).mkdir()
        CALLS[call](timeout, place)


@pytest.mark.parametrize("call", CALLS)
def test_all_else_is_no_deadline(call: str, tmp_path: Path) -> None:
    queue = call.startswith("MessageQueue")
    for number, timeout in enumerate(NO_TIMES):
        looks = queue or call in ("Work.wait", "World.close", "ParallelContext.close", "World.grow", "World.survivors", "testing.spmd")
        if (timeout == timedelta(0) and looks) or (timeout == float("inf") and queue):
            continue  # these may look and not wait, and a queue may wait for ever
        (place := tmp_path / str(number)).mkdir()
        with pytest.raises((ValueError, TypeError), match="timeout"):
            CALLS[call](timeout, place)


KEYED: dict[str, Callable[[Any, Path], Any]] = {
    "World.from_env": lambda key, _: cg.World.from_env(ALONE, authkey=key),
    "World.connect": lambda key, place: cg.World.connect(f"file://{place}/meet", rank=0, world_size=1, authkey=key),
    "World.from_store": lambda key, _: cg.World.from_store(dist.HashStore(), rank=0, world_size=1, authkey=key),
    "World.from_torch": lambda key, place: joined(place, authkey=key),
    "World.join": lambda key, _: grown({}, {"authkey": key}),
    "MessageQueue.create": lambda key, _: cg.MessageQueue.create(1, authkey=key).close(),
    "MessageQueue.attach": lambda key, _: in_queue(lambda writer, reader: cg.MessageQueue.attach(writer.handle, 0, authkey=key)),
}


def test_every_call_with_an_authkey_is_in_the_table() -> None:
    assert set(public_calls("authkey")) == set(KEYED)


@pytest.mark.parametrize("call", KEYED)
def test_an_authkey_is_bytes_and_not_empty(call: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"^{call}: authkey is a str; bytes are needed; a text is made bytes by .encode\(\)$"):
        KEYED[call]("secret", tmp_path)
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match=rf"^{call}: authkey is empty; None means that there is none$"):
        KEYED[call](b"", tmp_path / "again")


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (cg.World, TypeError, "World.from_env"),
        (lambda: cg.World(authkey=b"x"), TypeError, "World.from_env"),  # type: ignore[call-arg]
        (lambda: cg.MessageQueue(2), TypeError, "MessageQueue.create"),  # type: ignore[call-arg]
        (lambda: cg.World.from_store(None, rank=0, world_size=2), TypeError, "store is a NoneType"),
        (lambda: cg.World.from_env(ALONE, platform="cpu"), TypeError, "platform is a str; .*CpuPlatform"),
        (lambda: cg.World.connect("tcp://localhost:1", rank="0", world_size=2), cg.LaunchError, "rank='0' is a str"),
        (lambda: cg.World.connect("tcp://localhost:1", rank=0, world_size=2.0), cg.LaunchError, "world_size=2.0 is a float"),
        (lambda: context(groups="tp"), cg.ConfigurationError, r"groups='tp' is one string.*groups=\('tp',\)"),
        (lambda: context(platform=3), TypeError, "platform is a int"),
        (lambda: context().all_reduce, AttributeError, "no 'all_reduce'; operations are those of a group, e.g. context.tp.all_reduce"),
    ],
)
def test_a_newcomers_mistake_is_told_what_to_do(call: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def context(**how: Any) -> Any:
    return cg.World.from_env(ALONE).context(cg.Layout(1), name="a", **how)
