"""``python -m commgraph.bench``: what launchers start."""

import sys

from commgraph.bench.main import main
from commgraph.commands import ended_well

sys.exit(ended_well("commgraph bench", main))
