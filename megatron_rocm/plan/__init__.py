"""Memory, FLOPs and time of a run, computed without a GPU and without importing torch."""
