"""What a run will be, before it runs: every derived number of a configuration on a given number of ranks.

Needs neither torch nor megatron-core nor any device, so it answers in a second for any size.
"""

from pretrain.plan.numbers import GrowthMemory, GrowthPlan, Plan, StagePlan, make_plan
from pretrain.plan.tables import binary_bytes, decimal_bytes, quantity, scientific
from pretrain.plan.text import format_plan

__all__ = [
    "GrowthMemory",
    "GrowthPlan",
    "Plan",
    "StagePlan",
    "binary_bytes",
    "decimal_bytes",
    "format_plan",
    "make_plan",
    "quantity",
    "scientific",
]
