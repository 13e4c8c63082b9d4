"""How torch finds the backend, and its front ends over it, in processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, free_port
from tests.processes import PROGRAMS, Processes, environment

# Prints which modules of commgraph `import torch` has imported, and what makes a group of the backend, if it is known.
FOUND = """
import sys
import torch.distributed as dist
print("commgraph.world" in sys.modules, dist.is_backend_available("commgraph"))
if dist.is_backend_available("commgraph"):
    dist.init_process_group("cpu:commgraph", store=dist.HashStore(), rank=0, world_size=1)
    print(type(dist.group.WORLD).__module__)
"""


def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=170, env=environment, check=False)


def test_torchs_front_ends_over_the_backend(tmp_path: Path, processes: Processes) -> None:
    """DDP, FSDP2, DTensor, checkpoints, pipelining and more, against unsharded runs of the same models."""
    first, _ = processes.launch(2, PROGRAMS / "torch_front_ends.py", tmp_path, timeout=170)
    assert first.split() == [
        "ddp",
        "ddp_with_a_hook",
        "fsdp",
        "tensor_parallel",
        "dtensor",
        "meshes",
        "pipelining",
        "layers_of_commgraph",
        "functional_and_compiled",
        "objects_and_messages",
        "groups_of_groups",
        "nobody_comes",
    ]


def installed(folder: Path) -> str:
    """Make a folder in which commgraph's entry points are installed, as far as torch looks at them; return it."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["torch.backends"]
    info = folder / "commgraph-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: commgraph\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\n" + "".join(f"{name} = {value}\n" for name, value in points.items()))
    return f"{folder}{os.pathsep}{ROOT}"


@pytest.mark.parametrize("asked", [True, False])
def test_torch_finds_the_backend_by_its_entry_point_where_it_is_asked_for(tmp_path: Path, asked: bool) -> None:
    """Without being asked the entry point registers nothing: a registration changes torch's groups "cpu:gloo" of the process."""
    done = run("-c", FOUND, COMMGRAPH_TORCH_BACKEND="1" if asked else "", PYTHONPATH=installed(tmp_path))
    assert done.stdout == ("True True\ncommgraph.torch_backend.group\n" if asked else "False False\n"), done.stderr


def test_the_program_of_the_page_runs(processes: Processes) -> None:
    text = (ROOT / "docs/how-to/torch-backend.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    meeting = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = processes.run("-c", f"{program}print(model.module.weight.grad.sum().item())", env=environment(meeting))
    assert done.stdout == "128.0\n", done.stderr
