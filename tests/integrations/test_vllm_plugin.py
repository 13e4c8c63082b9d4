"""The vLLM plugin as far as no vLLM is needed: what it imports, and its communicator's operations on a stand-in for vLLM's base."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commgraph as cg
from commgraph.integrations import vllm
from commgraph.integrations.vllm.communicator import Operations
from commgraph.integrations.vllm.queue import EngineQueue
from commgraph.testing import spmd
from tests.helpers import ROOT, again_if_late, in_time

PLUGIN = "commgraph.integrations.vllm"


@pytest.mark.parametrize("value", [None, "", "0", "1"])
def test_the_platform_is_there_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("COMMGRAPH_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("COMMGRAPH_VLLM", value)
    assert vllm.platform() == (f"{PLUGIN}.cpu.make_platform" if value == "1" else None)


def test_to_say_no_imports_neither_torch_nor_vllm() -> None:
    """Every vLLM of an environment reads the entry points of every package."""
    program = f"import sys, {PLUGIN} as plugin; plugin.platform(); plugin.message_queue_patch(); print(sorted(sys.modules))"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "COMMGRAPH_VLLM": "", "COMMGRAPH_VLLM_MESSAGE_QUEUE": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environ, check=True)
    modules = set(ast.literal_eval(done.stdout))
    assert not {"torch", "attr", "commgraph.world"} & modules
    assert "vllm" not in modules


def test_the_entry_points_name_what_is_there() -> None:
    import tomllib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["vllm.platform_plugins"] == {"commgraph": f"{PLUGIN}:platform"}
    assert points["vllm.general_plugins"] == {"commgraph_message_queue": f"{PLUGIN}:message_queue_patch"}
    assert vllm.platform.__name__ == "platform"
    assert callable(vllm.message_queue_patch)


class Base:
    """Of vLLM's base what the operations use."""

    def __init__(self, world: cg.World, unique_name: str) -> None:
        self.unique_name = unique_name
        self._world = world
        self.coordinator = world.group._joined(unique_name)
        self.all2all_manager: Any = None


class Communicator(Operations, Base):
    pass


class Manager:
    """As vLLM's `AgRsAll2AllManager`: gathers rows of uneven sizes, and scatters their sums."""

    def __init__(self, group: Communicator, sizes: list[int]) -> None:
        self.group, self.sizes = group, sizes

    def dispatch_router_logits(self, x: torch.Tensor, logits: torch.Tensor, parallel: bool, extra: Any) -> Any:
        assert not parallel
        assert extra is None
        return self.group.all_gatherv([x, logits], 0, self.sizes)

    def dispatch(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, parallel: bool, extra_tensors: Any) -> Any:
        assert not parallel
        assert extra_tensors is None
        return self.group.all_gatherv([x, weights, ids], 0, self.sizes)

    def combine(self, x: torch.Tensor, parallel: bool) -> torch.Tensor:
        assert not parallel
        return self.group.reduce_scatterv(x, 0, self.sizes)


def test_every_operation_of_a_device_communicator() -> None:
    def body(world: cg.World) -> None:
        group, me, n = Communicator(world, "tp:0"), world.rank, world.size
        x = torch.arange(6.0).view(2, 3) + 10 * me
        each = [torch.arange(6.0).view(2, 3) + 10 * rank for rank in range(n)]
        total = group.all_reduce(x)
        assert torch.equal(total, sum(each))  # type: ignore[arg-type]  # of tensors
        assert torch.equal(x, each[me])
        assert torch.equal(group.all_gather(x), torch.cat(each, 1))
        assert torch.equal(group.all_gather(x, 0), torch.cat(each, 0))
        assert torch.equal(group.reduce_scatter(torch.cat([x] * n), 0), total)
        gathered = group.gather(x, 1, 0)
        assert (gathered is None) == (me != 1)
        assert gathered is None or torch.equal(gathered, torch.cat(each))
        sent = group.broadcast(x.clone(), 2)
        assert torch.equal(sent, each[2])
        if me == 0:
            group.send(x)
            group.send_tensor_dict({"hidden": x, "number": 3}, 2)
        elif me == 1:
            assert torch.equal(group.recv(x.shape, x.dtype), each[0])
        else:
            got = group.recv_tensor_dict(0)
            assert torch.equal(got["hidden"], each[0])
            assert got["number"] == 3
        sizes = [1, 2, 3]
        rows, ids = torch.full((sizes[me], 2), float(me)), torch.full((sizes[me], 1), me)
        everything = torch.cat([torch.full((size, 2), float(rank)) for rank, size in enumerate(sizes)])
        group.all2all_manager = Manager(group, sizes)
        a, b = group.dispatch_router_logits(rows, rows + 1)
        assert torch.equal(a, everything)
        assert torch.equal(b, everything + 1)
        a, b, c = group.dispatch(rows, rows, ids)
        assert torch.equal(c, everything[:, :1].long())
        assert torch.equal(group.combine(a), rows * n)
        assert group.coordinator.bytes_sent > 0
        assert "tp:0" in repr(group.coordinator)

    spmd(body, 3)


def test_messages_in_a_batch() -> None:
    def body(world: cg.World) -> None:
        group, out = Communicator(world, "pp:0"), torch.zeros(2)

        class Op:  # of torch's `P2POp`, which needs a default group
            def __init__(self, op: Any, tensor: torch.Tensor, peer: int) -> None:
                self.op, self.tensor, self.group_peer = op, tensor, peer

        other = 1 - world.rank
        batch: Any = [Op(dist.irecv, out, other), Op(dist.isend, torch.full((2,), float(world.rank)), other)]
        group.batch_isend_irecv(batch)
        assert out.tolist() == [float(other)] * 2

    spmd(body, 2)


@again_if_late
def test_destroying_is_bounded_where_the_others_do_not_come() -> None:
    destroyed = threading.Event()

    def body(world: cg.World) -> float:
        group = Communicator(world, "tp:0")
        begun = time.monotonic()
        if world.rank == 0:
            group.destroy()
            destroyed.set()
        else:
            assert destroyed.wait(50)
        return time.monotonic() - begun

    first, _ = spmd(body, 2)
    in_time(first, 7)


def test_uneven_sizes_are_compiled_without_a_break() -> None:
    """As in vLLM's graph of experts: dynamo does not know the sizes, and vLLM asks whether there are rows."""

    def body(world: cg.World) -> None:
        group = Communicator(world, "dp:0")

        def run(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            y = group.all_gatherv(x, 0, sizes.tolist())
            assert isinstance(y, torch.Tensor)
            return y if y.shape[0] == 0 else y + 1

        compiled = torch.compile(run, backend="eager", fullgraph=True)
        assert compiled(torch.ones(2 - world.rank, 3), torch.tensor([2, 1])).tolist() == [[2.0] * 3] * 3

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        spmd(body, 2)


def test_the_queue_of_the_patch() -> None:
    writer = EngineQueue(2, 2, max_chunk_bytes=1 << 16, connect_ip="127.0.0.1")
    readers = [EngineQueue.create_from_handle(writer.export_handle(), rank) for rank in range(2)]
    handle = writer.export_handle()
    assert len(handle.local_reader_ranks) > 0  # as vLLM asks
    assert handle.remote_subscribe_addr is None
    seen: list[Any] = []
    threads = [threading.Thread(target=lambda reader=reader: seen.append(reader.dequeue(indefinite=True))) for reader in readers]
    for thread in threads:
        thread.start()
    writer.wait_until_ready()
    writer.enqueue(("execute", (1, 2), {"big": b"x" * 200_000}))
    for thread in threads:
        thread.join()
    assert seen == [("execute", (1, 2), {"big": b"x" * 200_000})] * 2
    with pytest.raises(TimeoutError):
        readers[0].dequeue(timeout=0.05)
    for reader in readers:
        reader.shutdown()
    writer.shutdown()
    with pytest.raises(cg.ContextClosedError):
        readers[0].dequeue()
    with pytest.raises(ValueError, match="workers of one host"):
        EngineQueue(4, 2)


def test_a_group_is_reached_from_torchs_own(tmp_path: Any) -> None:
    """By `connect`, in a process with a default group, as in a worker of vLLM."""
    program = f"""
import torch, torch.distributed as dist
from datetime import timedelta
from {PLUGIN}.communicator import Operations
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = Operations()
group.device_group = group.cpu_group = dist.group.WORLD
group.unique_name = "tp:0"
group.connect(timedelta(seconds=33))
assert group.coordinator._state.timeouts.host == 33
assert group.all_reduce(torch.ones(2)).tolist() == [1, 1]
group.destroy()
print("done")
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environ, check=False)
    assert done.stdout == "done\n", done.stderr
