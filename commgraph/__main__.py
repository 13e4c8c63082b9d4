"""``python -m commgraph``: the command line."""

from commgraph.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
