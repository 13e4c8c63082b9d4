"""Records of calls, read: from files, and from the memory of processes that run, hang or were stopped."""
