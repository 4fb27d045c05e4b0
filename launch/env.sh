# shellcheck shell=bash
# Environment of a training process, sourced by the launch scripts. A value that is already set stays.

# Ranks share the cores of a node, and maths libraries would each start one thread per core.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Log lines reach the file of a job when they are written, not when a buffer is full.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"

# One hardware queue makes kernels start in the order of issue. megatron-core issues the communication of tensor and
# sequence parallelism just before the matrix product it is to overlap with, and counts on that order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Routing changes the sizes of MoE activations at every step. Segments that can grow keep the freed pieces usable,
# where fixed ones fragment until an allocation fails with memory still free.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

# A failed or timed-out collective ends its process (1: abort, then exit), so that a lost node becomes a restart
# and not a hang. torch's default does the same; sites that set the old NCCL_ASYNC_ERROR_HANDLING=0 undo it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Keep the last 2000 collectives of every rank and write them out when one times out: the trace names the rank that
# is missing and the call it never made.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"

# NCCL is silent about its errors by default.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Seconds torchrun waits, after it passed a signal on, before it kills its workers. They are saving a checkpoint;
# the default of 30 is too short for a large one.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# torchrun makes a new store for every start of its workers. By default it keeps the first, in which workers that were
# started again read the addresses of the dead ones and hang (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
