"""The plan: numbers by hand, the text, JSON, and that it needs no torch."""

import json
import subprocess
import sys

import pytest

from pretrain.errors import ConfigError
from pretrain.plan import binary_bytes, format_plan, make_plan, quantity, scientific
from tests.helpers.configs import DENSE, MOE, make_config

LAYOUT = {
    "parallel.tensor": 2,
    "parallel.pipeline": 2,
    "parallel.expert": 4,
    "batch.global_batch_size": 24,
    "batch.micro_batch_size": 2,
}


def test_numbers_by_hand():
    plan = make_plan(make_config(MOE, {**LAYOUT, "budget.steps": 7}), world_size=8)
    (stage,) = plan.stages
    assert plan.tokens_per_step == 24 * 32
    assert (plan.steps, plan.tokens) == (7, 7 * 24 * 32)
    assert stage.layout.data_parallel == 2
    assert stage.layout.expert_data_parallel == 1
    assert stage.layout.microbatches == 24 // (2 * 2)
    # 8 experts, top-2; 2 * 32 tokens on each of 2 data-parallel ranks meet in the expert-parallel group.
    assert stage.tokens_per_expert_per_microbatch == 2 * (2 * 32) * 2 / 8
    assert stage.tokens_per_expert_per_step == 24 * 32 * 2 / 8
    # Both count the same rows: one group of experts over all micro-batches.
    assert stage.tokens_per_expert_per_step == stage.tokens_per_expert_per_microbatch * stage.layout.microbatches
    assert plan.total_flops == stage.total_flops == stage.flops.per_token * plan.tokens
    assert stage.total_flops_6nd == 6 * stage.parameters.active * plan.tokens


def test_token_budget_is_rounded_up_to_steps():
    plan = make_plan(make_config(DENSE, {"budget.steps": 0, "budget.tokens": 8 * 32 * 3 + 1}))
    assert (plan.steps, plan.tokens) == (4, 4 * 8 * 32)


def test_smallest_world_size_is_the_default():
    assert make_plan(make_config(MOE, LAYOUT)).world_size == 8
    assert make_plan(make_config(DENSE)).world_size == 1


def test_broken_rules_are_one_error():
    with pytest.raises(ConfigError) as caught:
        make_plan(make_config(MOE, {"parallel.expert": 3, "model.top_k": 9}), world_size=3)
    assert [line.split(" = ")[0] for line in caught.value.problems][:2] == ["model.top_k", "parallel.expert"]


def test_json_holds_every_number():
    plan = make_plan(make_config(MOE, LAYOUT), world_size=8)
    read = json.loads(json.dumps(plan.to_json()))
    assert read["stages"][0]["parameters"]["total"] == plan.stages[0].parameters.total
    assert read["stages"][0]["memory"]["optimizer"] == plan.stages[0].memory.optimizer
    assert read["stages"][0]["layout"]["pipeline"] == 2
    assert read["world_size"] == 8


def test_text_shows_the_numbers():
    plan = make_plan(make_config(MOE, LAYOUT), world_size=8)
    (stage,) = plan.stages
    text = format_plan(plan)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    for number in (stage.parameters.total, stage.parameters.active, plan.tokens_per_step):
        assert f"{number:,}" in text
    assert binary_bytes(stage.memory.weights) in text
    assert "8 experts of ffn 16, top-2" in text
    assert "data 2 x tensor 2 x pipeline 2 x context 1" in text
    dense = format_plan(make_plan(make_config(DENSE)))
    assert "expert" not in dense
    assert "1 rank," in dense


def test_text_describes_the_rarer_parts_of_a_model():
    changes = {"model.first_dense_layers": 1, "model.ffn_size": 48, "model.shared_expert_ffn_size": 24}
    text = format_plan(make_plan(make_config(MOE, changes)))
    assert "shared expert of ffn 24, first 1 layers dense with ffn 48" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2_563_429_888, "2.563 B"),
        (449_500_672, "449.5 M"),
        (18_029_740_032, "18.03 B"),
        (4.19e12, "4.190 T"),
        (262_144, "262,144"),
        (85.333, "85.3"),
        (16, "16"),
    ],
)
def test_quantity(value, text):
    assert quantity(value) == text


def test_other_units():
    assert scientific(5.394e20) == "5.39e20"
    assert binary_bytes(45 * 2**30) == "45.0 GiB"
    assert binary_bytes(1536) == "1.5 KiB"
    assert binary_bytes(0) == "0 B"


def test_planning_imports_neither_torch_nor_megatron():
    """What keeps it fast on any machine, in a fresh interpreter; numpy imported first is the negative control."""
    program = (
        "import sys; {first}from pathlib import Path\n"
        "from pretrain.config.load import load_config\n"
        "from pretrain.plan import format_plan, make_plan\n"
        "print(format_plan(make_plan(load_config(Path('configs/models/orthogonal-70b.toml')), 256)))\n"
        "heavy = [name for name in sys.modules if name.split('.')[0] in ('torch', 'megatron', 'numpy')]\n"
        "sys.exit(3 if heavy else 0)"
    )
    clean = subprocess.run([sys.executable, "-c", program.format(first="")], capture_output=True, text=True)
    assert clean.returncode == 0, clean.stderr
    assert "69.07 B" in clean.stdout
    heavy = subprocess.run([sys.executable, "-c", program.format(first="import numpy; ")], capture_output=True)
    assert heavy.returncode == 3
