"""``python -m commgraph.demo``, also under torchrun."""

import sys

from commgraph.commands import ended_well
from commgraph.demo.main import main

sys.exit(ended_well("commgraph demo", main))
