"""Meristem: pretraining of mixture-of-experts language models on megatron-core.

Imports point one way:
errors, config -> platform -> model -> parallel, data, optim -> checkpoint, metrics -> train -> cli
(`tests/test_imports.py` holds this).
"""

__version__ = "0.1.0"
