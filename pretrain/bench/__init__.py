"""The benchmark command: our training step beside its peers on the same model, weights and data. See README.md."""
