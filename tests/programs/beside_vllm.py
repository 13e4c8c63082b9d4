"""Two live engines of vLLM, tp=2, one served by commgraph and one by vLLM's own communicator, asked in turns: ratios of medians.

    python tests/programs/beside_vllm.py FOLDER [--bind "0|1"] [--busy 2] [--rounds 10] [--eager]

In an environment with vLLM (`nox -s engines`); FOLDER as of tests/engines/models.py. A line each of decoding (one stream, and eight) and of
prefill: milliseconds a step of either engine, median and least, and their ratio. Then the share of a step that communication takes on rank
0, by torch's profiler, and the load of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parent.parent.parent
KINDS = {
    "decode, 1 stream": {"streams": 1, "length": 16, "tokens": 24},
    "decode, 8 streams": {"streams": 8, "length": 16, "tokens": 24},
    "prefill, 200 tokens": {"streams": 1, "length": 200, "tokens": 1},
}
PROFILED = {"streams": 1, "length": 16, "tokens": 12}
COMMUNICATION = ("vllm::all_reduce", "vllm::all_gather", "_C::shm_", "/all_reduce", "/gather", "/all_gather", "commgraph::")


# An engine.


def served(worker: Any) -> str:
    from vllm.distributed import parallel_state

    return type(parallel_state.get_tp_group().device_communicator).__name__


def begin_profile(worker: Any) -> None:
    import torch

    worker.profiled = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    worker.profiled.__enter__()
    worker.began = time.perf_counter()


def end_profile(worker: Any) -> tuple[float, dict[str, float]]:
    """Seconds since the begin, and within the outermost calls of communication, by name."""
    seconds = time.perf_counter() - worker.began
    worker.profiled.__exit__(None, None, None)
    found: dict[str, float] = {}
    end = 0.0
    events = sorted((event for event in worker.profiled.events()), key=lambda event: (event.time_range.start, -event.time_range.end))
    for event in events:
        if event.time_range.start >= end and any(word in event.name for word in COMMUNICATION):
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
            end = event.time_range.end
    return seconds, found


def engine(folder: str, eager: bool) -> None:
    """Answers each line of JSON with another, behind the word `said`."""
    from vllm import LLM, SamplingParams

    made = LLM(
        folder, tensor_parallel_size=2, max_model_len=256, enforce_eager=eager, disable_log_stats=True, seed=0, enable_prefix_caching=False
    )

    def generate(streams: int, length: int, tokens: int) -> None:
        prompts: list[Any] = [{"prompt_token_ids": [3 + (7 * stream + at) % 900 for at in range(length)]} for stream in range(streams)]
        made.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)

    for kind in KINDS.values():  # what is compiled or allocated when it is first run
        generate(**kind)
    print("said " + json.dumps(made.collective_rpc(served)), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        profiled = asked.pop("profiled", False)
        if profiled:
            made.collective_rpc(begin_profile)
        begin = time.perf_counter()
        generate(**asked)
        said: dict[str, Any] = {"seconds": time.perf_counter() - begin}
        if profiled:
            said["profile"] = made.collective_rpc(end_profile)[0]
        print("said " + json.dumps(said), flush=True)


# The one who asks.


class Running:
    """An engine in a session of its own."""

    def __init__(self, words: list[str], environ: dict[str, str], log: TextIO) -> None:
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, __file__, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environ,
            start_new_session=True,
        )

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("said "):
                return json.loads(line.removeprefix("said "))
        raise SystemExit(f"an engine has ended: {self.log.name} says why")

    def ask(self, **what: Any) -> Any:
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        answer = self.answer()
        self.pause()
        return answer

    def pause(self) -> None:
        """Stop it until it is asked again: the workers of an idle engine poll, and would take the processors from the other one."""
        os.killpg(self.process.pid, signal.SIGSTOP)


@contextlib.contextmanager
def running(given: argparse.Namespace, place: Path) -> Iterator[dict[str, Running]]:
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of the functions that profile
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": given.bind,
        "VLLM_NO_USAGE_STATS": "1",
    }
    engines: dict[str, Running] = {}
    try:
        for name, more in (("commgraph", {"COMMGRAPH_VLLM": "1"}), ("vLLM", {})):
            words = [given.folder, "--engine", *(["--eager"] if given.eager else [])]
            own = {"VLLM_CACHE_ROOT": str(place / name)}  # vLLM's cache of graphs does not know who serves them
            engines[name] = Running(words, environ | more | own, (place / f"{name}.log").open("w"))
        for name, one in engines.items():
            by = one.answer()
            print(f"{name} has started, served by {by}", flush=True)
            assert all(("CommGraph" in kind) == (name == "commgraph") for kind in by), by
            one.pause()
        yield engines
    finally:
        for one in engines.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """Programs beside them that never sleep."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(engines: dict[str, Running], rounds: int, heading: str) -> None:
    print(f"{heading}; load before: {os.getloadavg()[0]:.0f}")
    for kind, what in KINDS.items():
        found: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds):
            for name in sorted(engines, reverse=bool(turn % 2)):
                found[name].append(engines[name].ask(**what)["seconds"] * 1e3 / what["tokens"])
        middle = {name: statistics.median(values) for name, values in found.items()}
        listed = ", ".join(f"{name} {middle[name]:.1f} (least {min(found[name]):.1f})" for name in found)
        print(f"  {kind}: ms a step: {listed}; vLLM / commgraph = {middle['vLLM'] / middle['commgraph']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--bind", default="nobind", help="VLLM_CPU_OMP_THREADS_BIND")
    parser.add_argument("--busy", type=int, default=0, help="busy loops for a second measurement")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        engine(given.folder, given.eager)
        return
    place = Path(tempfile.mkdtemp(prefix="beside-vllm-"))
    with running(given, place) as engines:
        for loops in dict.fromkeys((0, given.busy)):
            with busy(loops):
                measure(engines, given.rounds, f"bind {given.bind!r}, {loops} busy loops beside")
        for name, one in engines.items():
            seconds, calls = one.ask(**PROFILED, profiled=True)["profile"]
            listed = ", ".join(f"{what} {took / seconds:.1%}" for what, took in sorted(calls.items(), key=lambda item: -item[1]))
            print(f"share of communication, {name}: {sum(calls.values()) / seconds:.1%} of {seconds * 1e3:.0f} ms ({listed})", flush=True)
    print(f"load after: {os.getloadavg()[0]:.0f}")


if __name__ == "__main__":
    main()
