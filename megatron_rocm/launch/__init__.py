"""From a RunConfig to processes: checks before the start, the run folder's lock, torchrun, the log."""
