"""Records of calls: read from files and from the memory of processes, summed, drawn, and written in other formats."""
