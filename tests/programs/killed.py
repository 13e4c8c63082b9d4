"""Is killed while it waits for its peers."""

from __future__ import annotations

import os
import signal
import threading

import commgraph as cg

threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
cg.World.from_env()
