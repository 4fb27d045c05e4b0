"""The model: its logical tensors (logical), counts, initialisation, and megatron-core modules (backend, build)."""
