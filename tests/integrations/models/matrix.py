"""Every configuration class of transformers with a plan, made small and cut: the table of docs/reference/transformers-models.md.

Arguments: ``--write`` writes the table; names of classes: only these.
"""

from __future__ import annotations

import functools
import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.integrations.models.examine import TOLERANCE, compared, expected_of
from tests.integrations.models.shrink import HEADS, KEY_VALUE_HEADS, configuration_classes, small_model

PAGE = Path(__file__).parent.parent.parent.parent / "docs/reference/transformers-models.md"
SECONDS = 150
GRADIENT = 1e-3


def tried(run: Callable[[], Any]) -> Any:
    """What a step returns, or in one line why it failed."""
    try:
        return run()
    except Exception as error:
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {text[:240]}"


def examined(kind: type) -> dict[str, Any]:
    """What one class passes: column -> True, or why not."""
    built = tried(lambda: small_model(kind))
    if isinstance(built, str):
        return {"build": built}
    size = sum(parameter.numel() for parameter in built.parameters())
    if size > 12e6:
        return {"build": f"{size / 1e6:.0f} million parameters after shrinking"}
    expected = tried(lambda: expected_of(built))
    if isinstance(expected, str):
        return {"build": f"the whole model: {expected}"}
    row: dict[str, Any] = {"build": True, "generates": expected.tokens is not None}
    runs: dict[str, dict[str, Any]] = {"tp2": {"tp": 2, "gradients": True}, "tp4": {"tp": 4}}
    if built.pp_plan:
        runs["pp2"] = {"pp": 2}
    if built.ep_plan:
        runs["ep2"] = {"tp": 2, "experts": "ep", "gradients": True}
    for name, arguments in runs.items():
        result = tried(functools.partial(compared, built, expected, **arguments))
        if isinstance(result, str):
            row[name] = result
            continue
        row[name] = (
            True
            if result.output < TOLERANCE and result.tokens
            else f"output differs by {result.output:.1e}, tokens {'equal' if result.tokens else 'differ'}"
        )
        if name == "tp2":
            row["gradients"] = True if result.gradient < GRADIENT else f"gradient of {result.worst} differs by {result.gradient:.1e}"
        if name == "ep2" and row[name] is True and result.gradient >= GRADIENT:
            row[name] = f"gradient of {result.worst} differs by {result.gradient:.1e}"
        if name == "tp4":
            row["share"] = round(result.share, 3)
    return row


def apart(kind: type) -> dict[str, Any]:
    """`examined` in a process of its own: one that ends or hangs is one row."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        try:
            answer = json.dumps(examined(kind))
        except BaseException as error:
            answer = json.dumps({"build": f"{type(error).__name__}: {error}"[:300]})
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    found, deadline = b"", time.monotonic() + SECONDS
    while (left := deadline - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        if not (part := os.read(reading, 65536)):
            break
        found += part
    else:
        os.kill(child, 9)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    return json.loads(found) if found else {"build": f"no answer within {SECONDS} s, or the process ended with {status}"}


COLUMNS = ("tp2", "tp4", "gradients", "pp2", "ep2")


def cell(value: Any) -> str:
    return "yes" if value is True else "-" if value is None else "no"


def page(rows: dict[str, dict[str, Any]], version: str) -> str:
    """The table and the reasons."""
    counts = {name: sum(row.get(name) is True for row in rows.values()) for name in COLUMNS}
    generating = sum(bool(row.get("generates")) and row.get("tp2") is True for row in rows.values())
    head = f"""# Models of transformers

Written by `nox -s models -- --write` with transformers {version} and torch {torch.__version__.partition("+")[0]}. Every configuration class
with a plan is made small, its weights are drawn, and the cut model is compared with the whole one in float32: output within 1e-4 of the
greatest value and equal greedy tokens ({generating} of them generate), gradients at tp=2 within 1e-3 of the greatest value of each
parameter. Attention has {HEADS} query heads and {KEY_VALUE_HEADS} key-value heads, so that tp=4 replicates. *Share* is the part of the
parameters that a rank of tp=4 holds: it is large where the plan leaves much whole. A `-`: the class has no such plan.

Right: {counts["tp2"]} at tp=2, {counts["tp4"]} at tp=4, {counts["gradients"]} with gradients, {counts["pp2"]} at pp=2,
{counts["ep2"]} with whole experts on 2 ranks; of {len(rows)} classes.

| configuration | tp=2 | tp=4 | gradients | pp=2 | experts="ep" | share |
|---|---|---|---|---|---|---|
"""
    lines = [
        f"| {name} | {' | '.join(cell(row.get(column)) for column in COLUMNS)} | {row.get('share', '-')} |"
        for name, row in sorted(rows.items())
        if row.get("build") is True
    ]
    reasons = [
        f"- {name}, {column}: {str(row[column]).replace('|', '/')}"
        for name, row in sorted(rows.items())
        for column in ("build", *COLUMNS)
        if isinstance(row.get(column), str)
    ]
    return head + "\n".join(lines) + "\n\n## Why the others are not\n\n" + "\n".join(reasons) + "\n"


def main() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    write, names = "--write" in sys.argv, [name for name in sys.argv[1:] if not name.startswith("-")]
    kinds = {name: kind for name, kind in configuration_classes().items() if not names or name in names}
    rows: dict[str, dict[str, Any]] = {}
    for name, kind in kinds.items():
        rows[name] = apart(kind)
        print(name, json.dumps(rows[name]), flush=True)
    for column in COLUMNS:
        print(column, sum(row.get(column) is True for row in rows.values()))
    if write:
        PAGE.write_text(page(rows, transformers.__version__))


if __name__ == "__main__":
    main()
