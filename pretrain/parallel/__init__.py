"""Process groups (mesh), the wrapped model and one forward-backward pass over a global batch (engine)."""
