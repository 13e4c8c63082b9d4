"""One of several ranks that compile: ``compiled.py RANK SIZE FILE CACHE [briefly]``.

Its last line is a digest of the code that inductor wrote for the target. Briefly means without a draft and without torch's own checks of
the operators.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

rank, size, file, cache = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
# Nothing is taken from an earlier run or the other rank: each writes its own code.
os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch  # noqa: E402 - it reads its environment when it is imported
from torch import nn  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402

import commgraph as cg  # noqa: E402
from commgraph.demo.config import LlamaConfig  # noqa: E402
from commgraph.demo.model import ShardedLlama  # noqa: E402
from commgraph.demo.reference import KVCache, rotary  # noqa: E402
from commgraph.nn import ColumnParallelLinear, RowParallelLinear  # noqa: E402

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)


def block(ctx: cg.ParallelContext) -> Callable[[], None]:
    """What compares a decoder layer of the demo's Llama, compiled, with itself in eager."""
    torch.manual_seed(0)
    layer = ShardedLlama(CONFIG, ctx=ctx, dtype=torch.float32).model.layers["0"].requires_grad_(False)
    x = torch.randn(1, 5, CONFIG.hidden_size)
    cos, sin = rotary(torch.arange(5), CONFIG)

    def run(x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        y: torch.Tensor = layer(x, cos, sin, None, cache)
        return y

    eager, compiled = run(x, KVCache()), torch.compile(run, fullgraph=True)

    def compare() -> None:
        torch.testing.assert_close(compiled(x, KVCache()), eager)

    return compare


def _step(call: Any, x: torch.Tensor) -> None:
    call(x).backward()


def training(ctx: cg.ParallelContext) -> list[str]:
    """A step of two parallel layers, forward and backward, equals the same in eager: its code."""
    torch.manual_seed(1)
    model = nn.Sequential(ColumnParallelLinear(8, 12, ctx=ctx), nn.GELU(), RowParallelLinear(12, 8, ctx=ctx))
    x = torch.randn(4, 8, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (model(x) ** 2).sum()
        return y

    results, codes = [], []
    for call in (run, torch.compile(run, fullgraph=True)):
        model.zero_grad()
        x.grad = None
        _, written = run_and_get_code(partial(_step, call, x))
        results.append([x.grad, *(p.grad for p in model.parameters())])
        codes += written
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
    return codes


def operators(tp: cg.GroupCoordinator) -> None:
    """torch's own checks, with peers."""
    ops, n, token = torch.ops.commgraph, tp.world_size, tp._token
    torch.manual_seed(2)
    x = torch.randn(2 * n, 3, requires_grad=True)
    even = [2] * n
    for op, args in (
        (ops.all_reduce, (x, tp, "sum")),
        (ops.reduce_scatter, (x, tp, 0, "avg")),
        (ops.all_gather, (x, tp, 1)),
        (ops.all_to_all, (x, tp, 0, 1)),
        (ops.broadcast, (x, tp, 1)),
        (ops.reduce_on_one, (x, tp, 1)),
        (ops.reduce, (x.detach(), tp, 1, "max", token)),
        (ops.scatter, (x.detach(), tp, 1, 0, None, token)),
        (ops.scatter, (x.detach(), tp, 0, 0, even, token)),
        (ops.all_gatherv, (x, tp, 0, [2 * n] * n, token)),
        (ops.reduce_scatterv, (x, tp, 0, even, "sum", token)),
        (ops.all_to_allv, (x, tp, 0, 0, even, even, token)),
        (ops.gather, (x.detach(), tp, 0, 0, None, token)),
        (ops.gather, (x.detach(), tp, 1, 0, [2 * n] * n, token)),
        (ops.dispatch, ([x, torch.randn(2 * n, 1, requires_grad=True)], tp, None, token)),
        (ops.combine, (x, tp, even, token)),
        (ops.barrier, (tp, token)),
    ):
        torch.library.opcheck(op.default, args)


with cg.World.connect(f"file://{file}", rank=rank, world_size=size, local_rank=rank) as world:
    target = world.context(cg.Layout(size, tp=size), name="target")
    compare = block(target)
    _, codes = run_and_get_code(compare)
    if not sys.argv[5:]:
        compare_draft = block(world.context(cg.Layout(size, tp=1, dp=size), name="draft"))
        compare_draft()
        # The same function with another context is compiled for it, once, and neither takes the other's groups.
        with torch.compiler.set_stance("fail_on_recompile"):
            compare()
            compare_draft()
        operators(target.tp)
    codes += training(target)
text = "\n".join(codes)
assert "commgraph" in text
# Paths of files that hold the kernels, which are in comments.
print(hashlib.sha256(re.sub(r"#.*", "", text).encode()).hexdigest())
