"""A training script of Hugging Face's accelerate over the backend commgraph, against the same in one process: two ranks under a launcher.

accelerated.py FOLDER
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import commgraph.torch_backend

ROWS, BATCH, ACCUMULATED = 44, 4, 2  # 11 batches: the last step has one rank's rows alone, and the other's are repeated


def model() -> nn.Sequential:
    set_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


def rows() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(ROWS, 8, generator=generator), torch.randint(3, (ROWS,), generator=generator))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.02)


def alone(steps: int) -> nn.Sequential:
    """What accelerate's loop computes, written for one process: a step takes the rows of both ranks, of two batches each."""
    module, (x, y) = model(), rows().tensors
    optimizer = optimizer_of(module)
    for step in range(steps):
        loss = torch.zeros(())
        for part in range(ACCUMULATED):
            begin = (step * ACCUMULATED + part) * 2 * BATCH
            chosen = slice(begin, begin + 2 * BATCH)
            loss = loss + nn.functional.cross_entropy(module(x[chosen]), y[chosen]) / ACCUMULATED
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return module


def main() -> None:
    folder, steps = sys.argv[1], 2
    torch.set_num_threads(1)
    dist.init_process_group("cpu:commgraph")  # accelerate takes a default group that is there
    group = dist.group.WORLD
    assert isinstance(group, commgraph.torch_backend.ProcessGroup)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    assert accelerator.num_processes == 2
    made = model()
    module, optimizer, loader = accelerator.prepare(made, optimizer_of(made), DataLoader(rows(), BATCH))
    done = 0
    for x, y in loader:
        if done == steps:
            break
        with accelerator.accumulate(module):
            loss = nn.functional.cross_entropy(module(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(module.parameters(), 0.5)
                done += 1
            optimizer.step()
            optimizer.zero_grad()
    assert done == steps
    expected = alone(steps)
    for name, tensor in accelerator.unwrap_model(module).state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], msg=partial("{0}: {1}".format, name))

    # Metrics over rows that do not divide: each row counts once.
    with torch.no_grad():
        found = torch.cat([accelerator.gather_for_metrics(module(x)) for x, _ in loader])
        torch.testing.assert_close(found, expected(rows().tensors[0]))
    rank = accelerator.process_index
    assert float(accelerator.reduce(torch.tensor(rank + 1.0), "sum")) == 3
    assert accelerator.pad_across_processes(torch.ones(rank + 1, 2)).shape == (2, 2)
    assert gather_object([{"rank": rank}]) == [{"rank": 0}, {"rank": 1}]
    assert broadcast_object_list([f"of {rank}"]) == ["of 0"]
    accelerator.wait_for_everyone()

    # Its checkpoints: saved, spoilt and restored.
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    for parameter in module.parameters():
        parameter.data.zero_()
    accelerator.load_state(folder)
    for name, tensor in accelerator.unwrap_model(module).state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], msg=partial("{0}: {1}".format, name))
    assert group.world.group.bytes_sent > 0
    accelerator.end_training()  # which destroys the group
    assert not dist.is_initialized()
    print("done")


if __name__ == "__main__":
    main()
