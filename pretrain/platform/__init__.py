"""The machine: devices, process groups, optional parts, and megatron-core on a CPU."""
