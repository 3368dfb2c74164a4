"""What a machine is and what it wants: the Machine, its environment settings, and what lets megatron-core run on a CPU."""
