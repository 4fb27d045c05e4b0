"""The Triton backend of the routed experts. Importing it needs Triton, and no GPU."""

from pretrain_kernels.triton_experts.layer import swiglu_experts_triton
from pretrain_kernels.triton_experts.tiles import Tiles, choose_tiles

__all__ = ["Tiles", "choose_tiles", "swiglu_experts_triton"]
