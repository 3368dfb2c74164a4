"""Python imports this at its start from PYTHONPATH: the worker that the program itself starts then has the stand-in."""

import sys

if "megatron_rocm.tune.worker" in getattr(sys, "orig_argv", ()):
    from gpu import stand_in

    stand_in()
