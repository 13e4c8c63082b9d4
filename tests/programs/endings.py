"""Three ranks as a command starts them, without torch: ``python tests/programs/endings.py KIND``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from commgraph.commands import ended_well, run_ranks


def rank(rank: int, ranks: int, folder: Path, kind: str) -> int:
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < ranks:
        time.sleep(0.01)
    if rank == 0:
        print("all are here", flush=True)
    if kind == "ends":
        return 0
    if kind == "fails":
        return 3 if rank == 1 else 0
    if kind == "killed" and rank == 1:
        os.abort()
    for line in range(6000):  # a minute
        if rank == 0:
            print(line, flush=True)
        time.sleep(0.01)
    return 0


if __name__ == "__main__":
    sys.exit(ended_well("endings", lambda: run_ranks("endings", rank, 3, sys.argv[1])))
