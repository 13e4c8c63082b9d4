"""``python -m commgraph.demo``, also under torchrun."""

import sys

from commgraph.demo.main import run_demo

sys.exit(run_demo(sys.argv[1:]))
