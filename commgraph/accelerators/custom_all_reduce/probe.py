"""A child process's probe of its peers' device memory: ``python -m commgraph.accelerators.custom_all_reduce.probe PORT RANK SIZE DEVICE``.

Prints a `peers.Word`. Not yet run on a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from commgraph.accelerators.custom_all_reduce.kernels import TorchKernels
from commgraph.accelerators.custom_all_reduce.peers import MARK, Word

_BYTES = 8 << 20
_NUMEL = 1024


def main(port: int, rank: int, size: int, device: int) -> None:
    """Meet the other children at a port of this host, run the probe, and print its result."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    torch.cuda.init()  # says what is wrong with it, where something is
    torch.cuda.set_device(device)
    kernels = TorchKernels("probe", dist.PrefixStore("probe", store), rank, size, torch.device("cuda", device), _BYTES)

    def meet(step: str) -> None:
        """Barrier on the host: a barrier on a device shared with other ranks would take time that is measured here."""
        torch.cuda.synchronize(device)
        store.set(f"{step}/{rank}", "")
        store.wait([f"{step}/{peer}" for peer in range(size)])

    word = try_peers(kernels, rank, size, meet)
    print(f"{MARK}{msgspec.json.encode(word).decode()}", flush=True)
    # The memory must not be freed before the last peer has read it.
    meet("done")
    kernels.close()


def try_peers(kernels: TorchKernels, rank: int, size: int, meet: Callable[[str], None]) -> Word:
    """Read and write every peer's memory, and run each reduction kernel; return the result."""
    device = kernels.peer(rank, 1).device
    kernels.peer(rank, _BYTES).copy_(_pattern(rank, device))
    meet("written")
    slowest = float("inf")
    for peer in (other % size for other in range(rank + 1, rank + size)):
        theirs = kernels.peer(peer, _BYTES)
        wrong = int((theirs.clone() != _pattern(peer, device)).sum())
        if wrong:
            return Word(f"{wrong} of {_BYTES} bytes that it read from rank {peer} of the group were wrong")
        slowest = min(slowest, _gigabytes(theirs))
    meet("read")
    # Each rank writes rank + 1 at index rank of every peer's memory.
    for peer in range(size):
        kernels.peer(peer, size)[rank] = rank + 1
    meet("marked")
    written = kernels.peer(rank, size).tolist()
    if written != list(range(1, size + 1)):
        return Word(f"its peers wrote {list(range(1, size + 1))} to it, and {written} came")
    kernels.barrier()
    for kernel in ("one_shot", "two_shot", *(["multimem"] if kernels.multicast else [])):
        x = torch.full((_NUMEL,), float(rank + 1), dtype=torch.float32, device=device)
        out = torch.empty_like(x)
        kernels.all_reduce(kernel, x, out)
        if not bool((out == size * (size + 1) / 2).all()):
            return Word(f"the {kernel} kernel gave a wrong sum")
    torch.cuda.synchronize(device)
    return Word(multicast=kernels.multicast, gigabytes=slowest)


def _pattern(rank: int, device: torch.device) -> torch.Tensor:
    """Return bytes that differ between ranks and offsets."""
    numbers = torch.arange(_BYTES // 4, dtype=torch.int32, device=device)
    return ((numbers * 1640531527 + rank * 40503) ^ (numbers >> 7)).to(torch.int32).view(torch.uint8)


def _gigabytes(theirs: torch.Tensor) -> float:
    """Return the bandwidth of reads, in 10^9 bytes per second: the best of five."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(theirs.device)
        started = time.perf_counter()
        theirs.clone()
        torch.cuda.synchronize(theirs.device)
        best = min(best, time.perf_counter() - started)
    return theirs.nbytes / best / 1e9


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
