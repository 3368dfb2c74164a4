"""What a machine is and what it wants: the Machine, its environment settings, and what lets a CPU run megatron-core."""
