"""The state of torch around a call does not change it: defaults, modes, levels. Worlds, contexts and every operation under each."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import commgraph as cg
from commgraph.testing import spmd
from commgraph.testing._program import LATER, OPERATIONS, Program, Step, TensorSpec
from commgraph.testing.spmd import ThreadStore
from tests.helpers import same

Around = Callable[[Callable[[], Any]], Any]


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeenOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def within(*contexts: Callable[[], Any]) -> Around:
    def around(run: Callable[[], Any]) -> Any:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return run()

    return around


def level(transform: Callable[..., Any]) -> Around:
    """Run within a transform of torch.func of something else."""

    def around(run: Callable[[], Any]) -> Any:
        results = []

        def other(x: torch.Tensor) -> torch.Tensor:
            results.append(run())
            return x.sum()

        transform(other)
        return results[0]

    return around


# By thread, so that each rank enters its own.
OF_THREADS: MappingProxyType[str, Around] = MappingProxyType(
    {
        "set_default_device('meta')": within(lambda: default_device("meta")),
        "with torch.device('meta')": within(lambda: torch.device("meta")),
        "inference_mode": within(torch.inference_mode),
        "no_grad": within(torch.no_grad),
        "autocast": within(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
        "a function mode": within(SeenFunctions),
        "a dispatch mode": within(SeenOperators),
        "several modes": within(lambda: torch.device("meta"), SeenFunctions, SeenOperators, torch.no_grad),
        "a level of grad": level(lambda f: torch.func.grad(f)(torch.ones(3))),
        "a level of vmap": level(lambda f: torch.func.vmap(f)(torch.ones(2, 3))),
        "levels of both": level(lambda f: torch.func.vmap(torch.func.grad(f))(torch.ones(2, 3))),
    }
)


@contextlib.contextmanager
def deterministic_fill() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Of the whole process.
OF_PROCESSES: MappingProxyType[str, Callable[[], Any]] = MappingProxyType(
    {
        "set_default_dtype(float64)": lambda: default_dtype(torch.float64),
        "set_default_dtype(bfloat16)": lambda: default_dtype(torch.bfloat16),
        "deterministic fill": deterministic_fill,
        "warnings as errors": warnings_as_errors,
        "dual_level": torch.autograd.forward_ad.dual_level,
    }
)


def steps(n: int) -> tuple[Step, ...]:
    """Every operation, blocking and begun, on floats, integers and strided tensors."""
    tree = {"a": TensorSpec(shape=(3, 2)), "b": [1, "c"], "d": {"e": TensorSpec("int8", (2000,), bits=True)}}
    found = []
    for operation in OPERATIONS:
        for later in (None, 0) if operation in LATER else (None,):
            for spec in (TensorSpec(shape=(2, 3)), TensorSpec("int32", (3, 2), "transposed"), TensorSpec("bfloat16", (300, 200))):
                common = {"group": "tp", "tensor": spec, "tree": tree, "sizes": (2, 1), "later": later}
                found.append(Step(operation, **common, out=operation == "all_gather"))  # type: ignore[arg-type]  # by name
    return tuple(found)


def program(shm: bool) -> Callable[[cg.World], list[Any]]:
    """A world, a context and every operation on it; results of all operations."""
    whole = Program(cg.Layout(2, tp=2), steps(2))

    def run(world: cg.World) -> list[Any]:
        options = cg.CommunicatorOptions(shm=shm)
        with world.context(whole.layout, name="a", options=options) as context:
            return [result for _, result in whole.perform(context)]

    return run


def worlds(run: Callable[[cg.World], Any], around: Around) -> list[Any]:
    """Build worlds within `around`, and run there; one call on the world itself comes after, outside."""
    store = ThreadStore()

    def body(outer: cg.World) -> Any:
        made: list[cg.World] = []

        def inside() -> Any:
            world = cg.World.from_store(store, rank=outer.rank, world_size=outer.size)
            made.append(world)
            assert world.group.all_gather_object(world.rank) == [0, 1]
            return run(world)

        result = around(inside)
        with made[0] as world:
            x = torch.ones(3, requires_grad=True)
            (world.group.all_reduce(x) * 2).sum().backward()
            assert x.grad is not None
            assert x.grad.tolist() == [4.0] * 3
            with world.context(cg.Layout(2, tp=2), name="after") as context:
                assert context.tp.all_reduce_(torch.ones(3)).tolist() == [2.0] * 3
        return result

    return spmd(body, 2)


@pytest.fixture(scope="module", params=[True, False], ids=["shm", "gloo"])
def right(request: pytest.FixtureRequest) -> tuple[bool, list[Any]]:
    return request.param, worlds(program(request.param), lambda run: run())


@pytest.mark.parametrize("name", OF_THREADS)
def test_state_of_a_thread(name: str, right: tuple[bool, list[Any]]) -> None:
    shm, expected = right
    compare(worlds(program(shm), OF_THREADS[name]), expected)


@pytest.mark.parametrize("name", OF_PROCESSES)
def test_state_of_the_process(name: str, right: tuple[bool, list[Any]]) -> None:
    shm, expected = right
    with OF_PROCESSES[name]():
        found = worlds(program(shm), lambda run: run())
    compare(found, expected)


def compare(found: list[Any], expected: list[Any]) -> None:
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for step, one, other in zip(steps(2), ours, theirs, strict=True):
            assert same(one, other), f"rank {rank}: {step}"
