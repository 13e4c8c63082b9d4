"""Other libraries on commgraph's contexts, a package each. None is imported before it is asked for."""
