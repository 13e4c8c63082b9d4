"""``python -m commgraph.demo``, also under torchrun."""

import sys

from commgraph.demo.main import main

sys.exit(main())
