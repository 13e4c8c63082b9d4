"""vLLM with its groups served by commgraph: the same tokens as its own, by `nox -s engines`.

Each engine is a process group of its own, started in the environment that this test runs in. One that commgraph serves shows the bytes that
its groups have carried, since an engine that fell back to its own communicators would give the same tokens.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import free_port

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(1500),  # seconds; on a busy machine an engine needs minutes to start
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: nox -s engines"),
]

HERE = Path(__file__).parent
FOR_AN_ENGINE = 600  # seconds
Engine = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, str(HERE / "models.py"), str(folder)], check=True, timeout=300)
    return folder


@pytest.fixture(scope="session")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without automatic binding, which wants a NUMA node for each rank."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of the function that reads what the groups have carried
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextlib.contextmanager
def started(words: list[str], environ: dict[str, str], log: Path, *, piped: bool = True) -> Iterator[subprocess.Popen[str]]:
    """Run a program as a session of its own, and end all of its processes afterwards."""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE if piped else errors,
            stderr=errors,
            text=True,
            env=environ,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def said(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """Return what `generate.py` says."""
    out, _ = process.communicate(timeout=FOR_AN_ENGINE)
    lines = [line for line in out.splitlines() if line.startswith("said ")]
    assert lines, out[-4000:] + log.read_text()[-8000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("said "))
    return found


@pytest.fixture(scope="session")
def engine(models: Path, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Runs an engine; one and the same only once."""
    seen: dict[str, dict[str, Any]] = {}
    logs = tmp_path_factory.mktemp("logs")

    def run(model: str, settings: dict[str, Any], *words: str, **more: str) -> dict[str, Any]:
        key = repr((model, settings, words, more))
        if key not in seen:
            log = logs / f"{len(seen)}.log"
            program = [str(HERE / "generate.py"), str(models / model), json.dumps(settings), *words]
            with started(program, environ | more, log) as process:
                seen[key] = said(process, log)
        return seen[key]

    return run


PLUGIN = {"COMMGRAPH_VLLM": "1"}
EAGER = {"enforce_eager": True}
EXACT = {**EAGER, "dtype": "float32"}  # where the sum has another order than the reference
TWO: dict[str, Any] = {"tensor_parallel_size": 2}
STAGES: dict[str, Any] = {"pipeline_parallel_size": 2}


def carries(result: dict[str, Any], *groups: str) -> bool:
    """Whether commgraph has carried bytes of these groups on every worker that sends."""
    found = result["carried"]
    return all(
        all(worker[group][0] == "CommGraphCommunicator" for worker in found) and any(worker[group][1] > 0 for worker in found)
        for group in groups
    )


@pytest.mark.parametrize(
    ("settings", "groups", "more"),
    [
        pytest.param(TWO | EAGER, ("tp",), {}, id="tp=2 eager"),
        pytest.param(TWO, ("tp",), {}, id="tp=2 compiled"),
        pytest.param(TWO, ("tp",), {"COMMGRAPH_VLLM_TRACED": "1"}, id="tp=2 compiled, operators of commgraph"),
        pytest.param(TWO | EAGER, ("tp",), {"COMMGRAPH_VLLM_MESSAGE_QUEUE": "1"}, id="tp=2 eager, the queue replaced"),
        pytest.param(STAGES, ("pp",), {}, id="pp=2 compiled"),
        pytest.param(TWO | STAGES, ("tp", "pp"), {}, id="tp=2 pp=2 compiled"),
    ],
)
def test_tokens_as_of_vllm_itself(
    engine: Engine, tmp_path: Path, settings: dict[str, Any], groups: tuple[str, ...], more: dict[str, str]
) -> None:
    cache = {"VLLM_CACHE_ROOT": str(tmp_path)} if "COMMGRAPH_VLLM_TRACED" in more else {}
    own, ours = engine("llama", settings), engine("llama", settings, **PLUGIN, **more, **cache)
    assert ours["tokens"] == own["tokens"]
    assert carries(ours, *groups)


@pytest.mark.parametrize("ranks", [3, 6])
def test_numbers_of_ranks_that_vllm_itself_refuses_or_not(engine: Engine, ranks: int) -> None:
    own, ours = engine("llama", EXACT), engine("llama", EXACT | {"tensor_parallel_size": ranks}, **PLUGIN)
    assert ours["tokens"] == own["tokens"]
    assert carries(ours, "tp")


def test_a_mixture_of_experts_on_two_data_parallel_ranks(models: Path, environ: dict[str, str], engine: Engine, tmp_path: Path) -> None:
    """vLLM's own communicator for CPUs has no `all_gatherv`."""
    own, port = engine("moe", EXACT), str(free_port())
    with contextlib.ExitStack() as stack:
        running = []
        for rank in range(2):
            place = {"VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank), "VLLM_DP_SIZE": "2"}
            meeting = {"VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}
            log = tmp_path / f"{rank}.log"
            program = [str(HERE / "generate.py"), str(models / "moe"), json.dumps(EXACT)]
            running.append((stack.enter_context(started(program, environ | PLUGIN | place | meeting, log)), log))
        results = [said(process, log) for process, log in running]
    for result in results:
        assert result["tokens"] == own["tokens"]
        assert carries(result, "dp")


def test_the_server_with_parallel_clients(models: Path, environ: dict[str, str], engine: Engine, tmp_path: Path) -> None:
    own, port, log = engine("llama", TWO), free_port(), tmp_path / "server.log"
    where = f"http://127.0.0.1:{port}"
    serve = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(models / "llama"), "--port", str(port)]
    serve += ["--tensor-parallel-size", "2", "--max-model-len", "256", "--served-model-name", "llama", "--seed", "0"]
    answers: list[str] = [""] * 6

    def ask(number: int) -> None:
        body = {"model": "llama", "prompt": own["prompts"][number], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(f"{where}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as reply:
            answers[number] = json.load(reply)["choices"][0]["text"]

    with started(serve, environ | PLUGIN, log, piped=False) as process:
        deadline = time.monotonic() + FOR_AN_ENGINE
        while True:
            assert process.poll() is None, log.read_text()[-8000:]
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{where}/health", timeout=5):
                break
            time.sleep(0.5)
        clients = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert answers == own["texts"]
    assert "served by commgraph" in log.read_text()


def test_a_caller_hears_of_a_killed_worker(engine: Engine) -> None:
    """vLLM's own ranks spin, deaf to signals, until they are killed: its caller hears after 9 s."""
    assert engine("llama", TWO | EAGER, "kill", **PLUGIN)["heard"] < 2
