"""Generates with vLLM and prints one line of JSON: tokens, and what each worker's groups have carried.

    python tests/engines/generate.py MODEL '{"tensor_parallel_size": 2}' [kill]

Run as a session of its own: an engine whose main process ends early leaves its workers. With `kill` the last worker is killed with SIGKILL
while it generates, and the line says after how many seconds the caller heard of it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

PROMPTS = ["A group of ranks", "The World connects", "def all_reduce(", "Shared memory", "1 2 3 4 5", "Every wait ends"]


def carried(worker: Any) -> dict[str, Any]:
    """Of a worker: group -> who serves it, and the bytes that this rank has sent."""
    from vllm.distributed import parallel_state

    found = {}
    for name in ("tp", "pp", "dp", "ep"):
        group = getattr(parallel_state, f"_{name.upper()}")
        communicator = None if group is None else group.device_communicator
        if communicator is not None:
            served = getattr(communicator, "coordinator", None)
            found[name] = [type(communicator).__name__, 0 if served is None else served.bytes_sent]
    return found


def main() -> None:
    from vllm import LLM, SamplingParams

    model, settings = sys.argv[1], json.loads(sys.argv[2])
    engine = LLM(model, max_model_len=256, disable_log_stats=True, seed=0, **settings)
    said: dict[str, Any] = {}
    if "kill" in sys.argv:
        said["heard"] = killed(engine)
    else:
        greedy = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
        drawn = engine.generate(PROMPTS[:2], SamplingParams(temperature=0.8, seed=7, max_tokens=24, ignore_eos=True), use_tqdm=False)
        said["tokens"] = [list(one.outputs[0].token_ids) for one in (*greedy, *drawn)]
        said["prompts"], said["texts"] = PROMPTS, [one.outputs[0].text for one in greedy]
        said["carried"] = engine.collective_rpc(carried)
    print("said " + json.dumps(said), flush=True)
    if "kill" in sys.argv:
        os.killpg(0, signal.SIGKILL)


def killed(engine: Any) -> float:
    """Kill a worker in mid-generation; return the seconds until the caller gets an error."""
    from vllm import SamplingParams

    pids = engine.collective_rpc(_pid)
    # The first step takes long on a busy machine, and a rank that computes hears of nothing.
    engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    ended = threading.Event()
    when = [0.0]

    def kill() -> None:
        when[0] = time.monotonic()
        os.kill(pids[-1], signal.SIGKILL)
        ended.set()

    threading.Timer(1.5, kill).start()
    try:
        for _ in range(1000):
            engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True), use_tqdm=False)
    except Exception:
        assert ended.is_set(), "an error before the worker was killed"
        return time.monotonic() - when[0]
    raise AssertionError("a worker was killed, and nobody heard of it")


def _pid(worker: Any) -> int:
    return os.getpid()


if __name__ == "__main__":
    main()
