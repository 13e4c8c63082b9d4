"""The conformance suite: every strategy of ours passes it, and it finds the mistakes of those that do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph import compat
from commgraph.accelerators.host_staged import HostStagedCommunicator
from commgraph.accelerators.torch_backend import TorchCommunicator
from commgraph.communicators.base import Communicator, Refused
from commgraph.communicators.endpoint import Endpoint
from commgraph.communicators.gloo import GlooCommunicator
from commgraph.communicators.hierarchical import HierarchicalCommunicator
from commgraph.communicators.shm import ShmCommunicator
from commgraph.communicators.tcp import TcpCommunicator
from commgraph.communicators.tcp_transport import TcpTransport
from commgraph.deadline import Deadline
from commgraph.platforms import GroupFacts
from commgraph.shm import native_module
from commgraph.testing import check_communicator


def torch_gloo(facts: GroupFacts, host: GlooCommunicator) -> Communicator:
    """The strategy of NCCL and XCCL, on the backend of torch's that needs no device."""
    n, me = len(facts.ranks), facts.rank_in_group
    store = dist.PrefixStore("own", facts.store)
    backend = compat.make_gloo(store, me, n, timedelta(seconds=20), compat.gloo_device("127.0.0.1"))
    return TorchCommunicator("torch gloo", backend, torch.device("cpu"), me, n, store)


def tcp(facts: GroupFacts, host: GlooCommunicator) -> TcpCommunicator:
    """Over links of an endpoint of its own."""
    native = native_module.load()
    assert native is not None
    endpoint, store, me = Endpoint("127.0.0.1"), facts.store, facts.rank_in_group
    endpoint.trust(b"secret")
    store.set(f"port/{me}", str(endpoint.address[1]))
    addresses = [("127.0.0.1", int(store.get(f"port/{peer}"))) for peer in range(len(facts.ranks))]

    class Owner(TcpCommunicator):
        def close(self) -> None:
            super().close()
            endpoint.close()

    return Owner(TcpTransport(native, endpoint, bytes(16), addresses, me, spins=False))


def over_tcp(facts: GroupFacts, host: GlooCommunicator) -> Communicator | Refused:
    """Two hosts of two ranks."""
    whole = tcp(facts, host)
    made = HierarchicalCommunicator.build(whole, [rank // 2 for rank in range(len(facts.ranks))], facts.options, facts.limits)
    assert isinstance(made, HierarchicalCommunicator)

    class Owner(HierarchicalCommunicator):
        def close(self) -> None:
            super().close()
            whole.close()

    made.__class__ = Owner
    return made


STRATEGIES: dict[str, Callable[[GroupFacts, GlooCommunicator], Communicator | Refused]] = {
    "gloo": lambda facts, host: GlooCommunicator(host.transport),
    "tcp": tcp,
    "shm": lambda facts, host: ShmCommunicator.build(host, facts.options, facts.limits),
    "hierarchical": lambda facts, host: HierarchicalCommunicator.build(
        host, (0, *[1] * (len(facts.ranks) - 1)), facts.options, facts.limits
    ),
    "hierarchical, even": lambda facts, host: HierarchicalCommunicator.build(
        host, [rank % 2 for rank in range(len(facts.ranks))], facts.options, facts.limits
    ),
    "hierarchical over tcp": over_tcp,
    "staged": lambda facts, host: HostStagedCommunicator(torch.device("cpu"), [host]),
    "torch": torch_gloo,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_of_ours_passes(name: str) -> None:
    sizes = {"shm": (2, 3), "torch": (2, 3), "hierarchical, even": (4,), "hierarchical over tcp": (4,)}.get(name, (3,))
    check_communicator(STRATEGIES[name], world_sizes=sizes, ends_waits=name != "torch")


class Wrapped(GlooCommunicator):
    """gloo with one mistake."""


class WrongOrder(Wrapped):
    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int], out: torch.Tensor, *, tag: int, deadline: Deadline) -> None:
        super().all_gather(x, dim, sizes, out, tag=tag, deadline=deadline)
        out.copy_(torch.cat(list(out.split(list(sizes), dim))[::-1], dim) if len(set(sizes)) == 1 else out)


class InPlace(Wrapped):
    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return super().all_reduce_(x, op, tag=tag, deadline=deadline)


class OwnFirst(Wrapped):
    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        y = super().all_reduce(x, op, tag=tag, deadline=deadline)
        return y * (1 + 1e-7) if self.rank_in_group == 1 and y.dtype == torch.float32 else y


class Fickle(Wrapped):
    def accepts(self, operation: str, shape: Sequence[int], dtype: torch.dtype | None, device: torch.device, *, capturing: bool) -> bool:
        return self.rank_in_group == 0 or operation != "broadcast"


class Unending(Wrapped):
    def all_reduce(self, x: torch.Tensor, op: str, *, tag: int, deadline: Deadline) -> torch.Tensor:
        return x.clone() if deadline.seconds < 1 else super().all_reduce(x, op, tag=tag, deadline=deadline)


class NoSuchOperation(Wrapped):
    operations = frozenset({"all_reduce", "scan"})


class Half(Wrapped):
    def broadcast(self, x: torch.Tensor, src: int, *, tag: int, deadline: Deadline) -> None:
        if x.is_contiguous():
            super().broadcast(x, src, tag=tag, deadline=deadline)


MISTAKES: list[tuple[type[Wrapped], str]] = [
    (WrongOrder, "not joined in rank order"),
    (InPlace, "its input was changed"),
    (OwnFirst, "the ranks' results differ"),
    (Fickle, "it has to answer alike on all ranks"),
    (Unending, "returned though no other rank called it"),
    (NoSuchOperation, r"operations that do not exist: \['scan'\]"),
    (Half, "not what the source has"),
]


@pytest.mark.parametrize(("wrong", "words"), MISTAKES, ids=lambda value: getattr(value, "__name__", None))
def test_mistakes_are_found(wrong: type[Wrapped], words: str) -> None:
    with pytest.raises(AssertionError, match=words) as caught:
        check_communicator(lambda facts, host: wrong(host.transport), world_sizes=(2,))
    assert wrong.__name__ in str(caught.value)


def test_one_that_refuses() -> None:
    def picky(facts: GroupFacts, host: GlooCommunicator) -> Communicator | Refused:
        n = len(facts.ranks)
        return Refused("picky", f"{n} ranks, needs 2") if n != 2 else GlooCommunicator(host.transport)

    check_communicator(picky)
    with pytest.raises(AssertionError, match=r"it refused every number of ranks of \(3, 4\): 3 ranks, needs 2; 4 ranks, needs 2"):
        check_communicator(picky, world_sizes=(3, 4))

    def odd(facts: GroupFacts, host: GlooCommunicator) -> Any:
        return Refused("odd", "no") if facts.rank_in_group else GlooCommunicator(host.transport)

    with pytest.raises(AssertionError, match=r"do not agree whether there is one: \['made', 'refused'\]"):
        check_communicator(odd, world_sizes=(2,))
    assert cg.Communicator is Communicator
