"""Predicted over measured communication of a step, on four ranks of one host and of two simulated ones.

Prints the table of docs/explanation/plan.md. Exits with 1 where the predictions are more than a quarter off in the median.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import hosts

PROGRAM = str(Path(__file__).with_name("planned_steps.py"))
RANKS = 4
WORST = 0.25


def on_one_host(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), PROGRAM]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"RESULT_FILE": str(folder / "one.json")})
    found: dict[str, Any] = json.loads((folder / "one.json").read_text())
    return found


def on_two_hosts() -> dict[str, Any]:
    with hosts.joined(2) as made:
        facts = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS // 2), "MASTER_ADDR": made[0].address, "MASTER_PORT": "29533"}
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank % (RANKS // 2))} for rank in range(RANKS)]
        ranks = [made[rank * 2 // RANKS].start(sys.executable, PROGRAM, environ=facts | place) for rank, place in enumerate(places)]
        said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("\n".join(said))
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = [on_one_host(Path(folder))]
    if (why := hosts.why_impossible()) is None:
        runs.append(on_two_hosts())
    else:
        print(f"two hosts are not simulated: {why}")
    heads = [f"{run['hosts']} host{'s' * (run['hosts'] > 1)}: predicted, measured, ratio" for run in runs]
    print(f"| model | step | tp x pp | {' | '.join(heads)} |")
    print("|---|---|---|" + "---|" * len(runs))
    off: list[list[float]] = [[] for _ in runs]
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        cells = []
        for row, mine in zip(rows, off, strict=True):
            ratio = row["predicted"] / row["measured"]
            mine.append(abs(ratio - 1))
            cells.append(f"{row['predicted'] * 1e3:.2f} ms, {row['measured'] * 1e3:.2f} ms, {ratio:.2f}")
        first = rows[0]
        print(f"| {first['model']} | {first['phase']} | {first['tp']} x {first['pp']} | {' | '.join(cells)} |")
    for run, mine in zip(runs, off, strict=True):
        print(f"{run['hosts']} host(s): {statistics.median(mine):.0%} off in the median, load average {run['load']:.0f}")
    sys.exit(int(max(statistics.median(mine) for mine in off) > WORST))


if __name__ == "__main__":
    main()
