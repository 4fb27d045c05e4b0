"""Checkpoints: weights and optimizer state by logical key, loadable on any layout. README.md is the format."""

from pretrain.checkpoint.checkpoints import Checkpoints
from pretrain.checkpoint.listing import LS_HEADER, CheckpointRow, list_checkpoints, verify_checkpoints
from pretrain.checkpoint.read import CheckpointReader, read_checkpoint, read_config, read_state
from pretrain.checkpoint.steps import Moment, moment_of
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.checkpoint.write import write_checkpoint

__all__ = [
    "LS_HEADER",
    "CheckpointReader",
    "CheckpointRow",
    "Checkpoints",
    "Moment",
    "list_checkpoints",
    "moment_of",
    "read_checkpoint",
    "read_config",
    "read_state",
    "verify_checkpoint",
    "verify_checkpoints",
    "write_checkpoint",
]
