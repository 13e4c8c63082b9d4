"""One rank, in a process of its own, of the programs that come by its standard input: ``player.py RANK SIZE FILE``.

Each is a pickled Program, each answer, saved by torch and pickled, a list of what the rank gave and got, or the error that ended it.
"""

import io
import pickle
import sys

import torch

import commgraph as cg


def main() -> None:
    rank, size, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with cg.World.connect(f"file://{file}", rank=rank, world_size=size, local_rank=rank) as world:
        while True:
            try:
                program = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                answer = program(world)
            except Exception as error:
                answer = error
            saved = io.BytesIO()
            torch.save(answer, saved)
            pickle.dump(saved.getvalue(), sys.stdout.buffer)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
