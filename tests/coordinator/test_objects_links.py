"""Objects between ranks of several hosts, with and without a key."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import commgraph as cg
from commgraph.coordinator.objects_links import LinkObjects
from commgraph.shm import native_module
from tests.helpers import on

pytestmark = pytest.mark.skipif(native_module.load() is None, reason="no native module")

LARGE = bytes(range(256)) * 1000
OBJECTS: list[Any] = [None, {"a": [1]}, LARGE, [LARGE, torch.ones(5000), "é" * 70_000], torch.arange(3.0)]


@pytest.fixture(params=[True, False], ids=["key", "no key"])
def keyed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setenv("COMMGRAPH_AUTHKEY", "k" * 32)
    return bool(request.param)


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted)


def test_objects_of_every_size(keyed: bool) -> None:
    def body(group: cg.GroupCoordinator) -> None:
        me = group.rank_in_group
        assert isinstance(group._objects, LinkObjects)
        for obj in OBJECTS * 2:
            if me == 0:
                group.send_object(obj, 1)
                work = group.isend_object(obj, 2)
                group.send_object("after", 2)
                work.wait()
            elif me == 1:
                assert same(group.recv_object(0), obj)
            else:
                assert same(group.recv_object(0), obj)
                assert group.recv_object(0, timeout=20) == "after"
            assert same(group.broadcast_object(obj if me == 1 else None, 1), obj)
            assert same(group.scatter_object([obj, me, obj] if me == 0 else None, 0), obj if me != 1 else 0)
            assert same(group.all_gather_object(obj), [obj] * 3)

    on(3, body, nodes=3)


def test_a_receive_that_is_late_has_lost_nothing(keyed: bool) -> None:
    def body(group: cg.GroupCoordinator) -> None:
        if group.rank_in_group == 0:
            group.barrier()
            for obj in OBJECTS:
                group.send_object(obj, 1)
            return
        for timeout in (0, 0.05):
            with pytest.raises(cg.CollectiveTimeoutError, match="call again to go on waiting"):
                group.recv_object(0, timeout=timeout)
        group.barrier()
        for obj in OBJECTS:
            assert same(group.recv_object(0), obj)

    on(2, body, nodes=2)


class Unpicklable:
    """Raises where it is unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_one_that_does_not_unpickle_spares_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMGRAPH_AUTHKEY", "k" * 32)

    def body(group: cg.GroupCoordinator) -> None:
        if group.rank_in_group == 0:
            group.send_object([Unpicklable(), torch.ones(5000)], 1)
            with pytest.raises(TypeError, match="Nothing was sent"):
                group.send_object(lambda: 1, 1)
            group.send_object("next", 1)
            return
        with pytest.raises(ValueError, match="came and is used up, but does not unpickle here"):
            group.recv_object(0)
        assert group.recv_object(0) == "next"

    on(2, body, nodes=2)


def test_a_peer_that_is_gone_ends_the_wait(keyed: bool) -> None:
    def body(group: cg.GroupCoordinator) -> None:
        group.barrier()
        if group.rank_in_group == 0:
            group._state.close()
            return
        with pytest.raises(cg.PeerLostError):
            group.recv_object(0)

    on(2, body, nodes=2)
