"""Loads a checkpoint cut over tp, under torchrun, and prints for each rank what it asked of the files and held at most, as parts of them.

Argument: the folder.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

import commgraph as cg
from commgraph.integrations.transformers import from_checkpoint


class Counted:
    """``safe_open`` that counts the bytes of what is indexed."""

    def __init__(self, opened: Any, counts: list[int]) -> None:
        self.opened, self.counts = opened, counts

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        file, counts = self.opened(*arguments, **named), self.counts

        class File:
            def __enter__(self) -> Any:
                file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                file.__exit__(*error)

            def keys(self) -> Any:
                return file.keys()

            def get_slice(self, name: str) -> Any:
                whole = file.get_slice(name)

                class Part:
                    def get_shape(self) -> Any:
                        return whole.get_shape()

                    def __getitem__(self, index: Any) -> Any:
                        found = whole[index]
                        counts.append(found.nbytes)
                        return found

                return Part()

        return File()


def anonymous() -> int:
    """Bytes of memory that belong to no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def warm() -> None:
    """Import what loading imports, so that only the model counts as memory of the model."""
    import transformers.conversion_mapping
    import transformers.core_model_loading

    config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    transformers.conversion_mapping.get_model_conversion_mapping(model)


def main() -> None:
    folder = Path(sys.argv[1])
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    warm()
    counts: list[int] = []
    safetensors.safe_open = Counted(safetensors.safe_open, counts)  # type: ignore[misc, assignment]  # for this program alone
    with cg.World.from_env() as world:
        ctx = world.context(cg.Layout(world.size, tp=world.size), name="model")
        before, peak, ended = anonymous(), [0], threading.Event()

        def watch() -> None:
            while not ended.is_set():
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        begin = time.perf_counter()
        model = from_checkpoint(transformers.LlamaForCausalLM, folder, ctx)
        seconds = time.perf_counter() - begin
        ended.set()
        watcher.join()
        assert model is not None
        print(f"rank {world.rank} asked {sum(counts) / size:.4f} peak {(peak[0] - before) / size:.4f} seconds {seconds:.2f}", flush=True)


if __name__ == "__main__":
    main()
