"""``python -m commgraph.bench``: what launchers start."""

import sys

from commgraph.bench.main import main

sys.exit(main())
