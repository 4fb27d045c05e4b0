"""Growth of a model in the middle of a run. `pull` moves the tensors between ranks."""
