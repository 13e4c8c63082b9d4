"""Checksummed messages of all sizes through one queue to several readers, each process asleep now and then."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import zlib
from typing import Any

import torch

import commgraph as cg
from commgraph.shm.message_queue import QueueHandle

POOL_BYTES = 1 << 18


def payloads(seed: int) -> list[tuple[Any, int]]:
    """Messages with their checksums: mostly small, some large enough to travel beside the pickle, a few larger than the ring."""
    source = random.Random(seed)
    pool = source.randbytes(POOL_BYTES)
    made: list[tuple[Any, int]] = []
    for _ in range(256):
        kind = source.random()
        size = source.randrange(200) if kind < 0.9 else source.randrange(4096, 20000) if kind < 0.98 else source.randrange(POOL_BYTES)
        at = source.randrange(POOL_BYTES - size + 1)
        data = pool[at : at + size]
        made.append((torch.frombuffer(bytearray(data), dtype=torch.uint8) if size >= 4096 else data, zlib.crc32(data)))
    return made


def checksum(payload: Any) -> int:
    return zlib.crc32(payload if isinstance(payload, bytes) else payload.numpy())


def nap(source: random.Random) -> None:
    if source.random() < 1 / 2000:
        time.sleep(source.random() * 0.004)


def read(handle: QueueHandle, reader: int, messages: int, seed: int) -> None:
    source = random.Random(seed + 1 + reader)
    with cg.MessageQueue.attach(handle, reader) as queue:
        kept: list[tuple[Any, int]] = []
        for number in range(messages):
            got, payload, expected = queue.dequeue(60)
            assert got == number, f"reader {reader}: message {got} in the place of {number}"
            assert checksum(payload) == expected, f"reader {reader}: message {number} is damaged"
            if number % 1000 == 0:
                kept = [*kept[-20:], (payload, expected)]
            nap(source)
        # Nothing that came later has touched them.
        for payload, expected in kept:
            assert checksum(payload) == expected, f"reader {reader}: a result was changed"


def stress(messages: int, *, readers: int = 4, n_local_readers: int | None = None, seed: int = 0, chunks: int = 64) -> float:
    """Messages a second. Raises where a reader found anything wrong."""
    context = multiprocessing.get_context("fork")
    source, made = random.Random(seed), payloads(seed)
    with cg.MessageQueue.create(readers, n_local_readers=n_local_readers, chunk_bytes=1024, chunks=chunks) as queue:
        processes = [context.Process(target=read, args=(queue.handle, reader, messages, seed), daemon=True) for reader in range(readers)]
        for process in processes:
            process.start()
        try:
            queue.wait_until_ready(60)
            started = time.monotonic()
            for number in range(messages):
                payload, expected = made[source.randrange(len(made))]
                queue.enqueue((number, payload, expected), 60)
                nap(source)
            for process in processes:
                process.join(120)
            took = time.monotonic() - started
        finally:
            for process in processes:
                process.kill()
                process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * readers, f"readers ended with {codes}"
    return messages / took


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rate = stress(options.messages, readers=options.readers, seed=options.seed)
    print(f"{options.messages} messages to {options.readers} readers without error, {rate:.0f} a second")
    sys.exit(0)
