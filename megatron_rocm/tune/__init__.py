"""GEMM tuning: the shapes that a run multiplies, the fastest kernel for each whose result is right, a stamped file."""
