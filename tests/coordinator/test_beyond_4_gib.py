"""Tensors, dicts and objects of more bytes than 32 bits count, on one host and between hosts."""

from __future__ import annotations

import os

import pytest
import torch

import commgraph as cg
from tests.helpers import on

SIZE = 2**32 + 2**28
# Where each number is written: at both ends, and beyond what 31 and 32 bits count.
PLACES = {0: 7, 2**31: 3, 2**32: 5, SIZE - 1: 9}


def _is_right(x: torch.Tensor) -> bool:
    return len(x) == SIZE and all(int(x[place]) == number for place, number in PLACES.items())


pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 14 * 2**30, reason="needs 14 GiB of memory"),
]


@pytest.mark.parametrize("nodes", [1, 2])
def test_more_than_4_gib_arrive_whole(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMGRAPH_AUTHKEY", "a secret")

    def body(group: cg.GroupCoordinator) -> None:
        if group.rank == 0:
            x = torch.zeros(SIZE, dtype=torch.uint8)
            for place, number in PLACES.items():
                x[place] = number
            group.send(x, 1)
            group.send_tensor_dict({"x": x, "one": torch.ones(3)}, 1)
            group.send_object({"x": x}, 1)
        else:
            x = group.recv(SIZE, torch.uint8, 0)
            assert _is_right(x)
            assert _is_right(group.recv_tensor_dict(0)["x"])
            assert _is_right(group.recv_object(0)["x"])
        assert _is_right(group.broadcast_object(x if group.rank == 0 else None, src=0))
        x[100] = group.rank + 1
        group.all_reduce_(x, op="max")
        assert int(x[100]) == 2
        assert _is_right(x)
        x[2**32] = group.rank
        group.broadcast(x, src=1)
        assert int(x[2**32]) == 1

    on(2, body, nodes=nodes, timeout=200)


def test_plain_data_of_more_than_4_gib_in_one_piece_is_refused() -> None:
    def body(group: cg.GroupCoordinator) -> None:
        if group.rank == 0:
            with pytest.raises(ValueError, match=r"send_object.*too large.*authkey.*Nothing was sent"):
                group.send_object({"x": torch.zeros(SIZE, dtype=torch.uint8)}, 1)
            group.send_object("the next", 1)
        else:
            assert group.recv_object(0) == "the next"

    on(2, body, nodes=2, timeout=200)
