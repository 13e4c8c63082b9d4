"""`commgraph doctor`: what this machine offers, and what a job that runs or hangs on it is doing."""
