"""The plan: numbers by hand, the text, JSON, and that it needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.config.published import suggest
from pretrain.config.stages import BUFFER_BYTES
from pretrain.errors import ConfigError
from pretrain.model.counts import count_flops, count_parameters
from pretrain.plan import binary_bytes, format_plan, make_plan, quantity, scientific
from tests.helpers.configs import DENSE, MOE, make_config

LAYOUT = {
    "parallel.tensor": 2,
    "parallel.pipeline": 2,
    "parallel.expert": 4,
    "batch.global_batch_size": 24,
    "batch.micro_batch_size": 2,
}

# Depth at 3 of 10 steps; experts, on another layout, at the 7th.
GROWTH = {
    "growth": [
        {"at_step": 3, "depth": {}, "rewarm": {"steps": 2}},
        {"at_tokens": 7 * 256 - 1, "experts": {}, "optimizer_state": "reset", "parallel": {"expert": 4, "pipeline": 2}},
    ]
}
MODELS = Path(__file__).parents[1] / "configs" / "models"


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


def test_stages_by_hand():
    config = make_config(MOE, GROWTH)
    plan = make_plan(config)
    assert plan.world_size == 8
    assert [(stage.start_step, stage.steps, stage.tokens) for stage in plan.stages] == [
        (0, 3, 3 * 256),
        (3, 4, 4 * 256),
        (7, 3, 3 * 256),
    ]
    assert (plan.steps, plan.tokens) == (10, 2560)
    assert [stage.shape["num_layers"] for stage in plan.stages] == [4, 8, 8]
    assert [stage.shape["num_experts"] for stage in plan.stages] == [8, 8, 16]
    assert [stage.layout.data_parallel for stage in plan.stages] == [8, 8, 4]
    assert [stage.layout.experts_per_rank for stage in plan.stages] == [8, 8, 4]
    changes_so_far = ({}, {"num_layers": 8}, {"num_layers": 8, "num_experts": 16, "top_k": 4})
    for stage, changes in zip(plan.stages, changes_so_far, strict=True):
        model = config.model.model_copy(update=changes)
        assert stage.parameters == count_parameters(model)
        assert stage.total_flops == count_flops(model, 32).per_token * stage.tokens
        assert stage.total_flops_6nd == 6 * count_parameters(model).active * stage.tokens
    first, second, third = (stage.growth for stage in plan.stages)
    assert first is None
    assert second.grows == "layers 4 -> 8 (interpose)"
    assert third.grows == "experts 8 -> 16 (top-k 2 -> 4, noise 0.01)"
    assert (second.preserves_function, third.preserves_function) == (False, True)
    assert second.optimizer_state != third.optimizer_state
    assert "1.3 times" in second.rewarm
    assert third.rewarm == "goes on as before"


def test_flops_are_a_ledger_over_the_stages():
    """Neither tokens times the last model, nor times the first; these are the negative controls."""
    plan = make_plan(make_config(MOE, GROWTH))
    assert plan.total_flops == sum(stage.total_flops for stage in plan.stages)
    assert plan.total_flops_6nd == sum(stage.total_flops_6nd for stage in plan.stages)
    first, *_, last = plan.stages
    assert first.flops.per_token * plan.tokens < plan.total_flops < last.flops.per_token * plan.tokens
    assert plan.scratch_flops == last.flops.per_token * plan.tokens
    assert plan.saved == 1 - plan.total_flops / plan.scratch_flops
    n = [stage.parameters.active for stage in plan.stages]
    assert plan.saved_6nd == pytest.approx(1 - (0.3 * n[0] + 0.4 * n[1] + 0.3 * n[2]) / n[2], rel=1e-12)
    alone = make_plan(make_config(MOE))
    assert (alone.saved, alone.saved_6nd) == (0, 0)
    assert (alone.scratch_flops, alone.scratch_flops_6nd) == (alone.total_flops, alone.total_flops_6nd)


# Table 2 of arXiv 2602.02472: compute of the grown run at 50 % of 200B tokens, and the share saved; growing the expert
# width twice, from 256 at 25 % and 50 %, is in its appendix O.
@pytest.mark.parametrize(
    ("model", "points", "compute", "saved"),
    [
        ({}, [{"at_tokens": 100e9, "expert_ffn": {}}], 7.21e20, 20.0),
        ({}, [{"at_tokens": 100e9, "hidden": {}}], 8.10e20, 25.0),
        ({}, [{"at_tokens": 100e9, "hidden": {}, "expert_ffn": {}}], 11.70e20, 35.0),
        (
            {"expert_ffn_size": 256},
            [{"at_tokens": 50e9, "expert_ffn": {}}, {"at_tokens": 100e9, "expert_ffn": {}}],
            6.75e20,
            25.0,
        ),
    ],
)
def test_compute_saved_is_that_of_the_paper(model, points, compute, saved):
    raw = load_config(MODELS / "sparkling-small.toml").model_dump(exclude_none=True)
    raw |= {"model": raw["model"] | model, "growth": points}
    plan = make_plan(make_config(raw))
    assert plan.total_flops_6nd == pytest.approx(compute, rel=0.002)
    assert 100 * plan.saved_6nd == pytest.approx(saved, abs=0.15)  # the paper prints whole per cent
    # What the convention leaves out, attention above all, does not grow, or not as much.
    assert plan.saved < plan.saved_6nd - 0.01


def test_compute_of_the_chain_from_17b_to_70b():
    """arXiv 2510.08008 counts 7.0e21 FLOPs up to the first growth, and reads 6.5e21 for the second stage."""
    plan = make_plan(load_config(MODELS / "orthogonal-17b-to-70b.toml"))
    first, second, _ = plan.stages
    assert first.total_flops == pytest.approx(7.0e21, rel=0.03)
    assert second.total_flops == pytest.approx(6.5e21, rel=0.03)
    assert first.total_flops_6nd == pytest.approx(6 * 2.176e9 * 600e9, rel=1e-3)
    # 1.6e22 in all; its last stage was 2.8e21, less than 100B tokens of the counts that are printed.
    assert plan.total_flops == pytest.approx(1.6e22, rel=0.08)


def test_memory_while_growing():
    plan = make_plan(make_config(MOE, {**GROWTH, "run.precision": "bf16"}), world_size=8)
    first, second, third = plan.stages
    memory = second.growth.memory
    # One pipeline rank: that of the stages. Both models, and two buffers that are not larger than what they take.
    assert (memory.old_weights, memory.old_optimizer) == (first.memory.weights, first.memory.optimizer)
    assert (memory.new_weights, memory.new_optimizer) == (second.memory.weights, second.memory.optimizer)
    assert memory.buffers == 2 * (memory.new_weights + memory.new_optimizer) < 2 * BUFFER_BYTES
    held = first.memory.weights + first.memory.optimizer + 3 * (second.memory.weights + second.memory.optimizer)
    assert memory.total == held
    assert third.growth.memory.old_weights == memory.new_weights


def test_memory_while_growing_takes_no_buffers_on_one_rank():
    growth = {"growth": [{"at_step": 3, "depth": {}}]}
    one, two = (make_plan(make_config(DENSE, growth), size).stages[1].growth.memory for size in (1, 2))
    assert one.buffers == 0 < two.buffers
    large = make_plan(load_config(MODELS / "sparkling-grown.toml"), 64)
    assert large.stages[1].growth.memory.buffers == 2 * BUFFER_BYTES


def test_memory_while_growing_is_of_the_rank_that_holds_the_most():
    """Here the second pipeline rank, which has the experts; the first has the most activations, and so the most."""
    changes = {"model.vocab_size": 4, "model.first_dense_layers": 2, "model.ffn_size": 8, "parallel.pipeline": 2}
    changes |= {"batch.micro_batch_size": 8, "batch.global_batch_size": 64, "batch.sequence_length": 4096}
    first, second = make_plan(make_config(MOE, {**changes, "growth": GROWTH["growth"][:1]})).stages
    assert first.memory.pipeline_rank == 0
    assert second.growth.memory.old_weights > first.memory.weights


def test_json_holds_growth():
    plan = make_plan(make_config(MOE, GROWTH))
    read = json.loads(json.dumps(plan.to_json()))
    assert [stage["start_step"] for stage in read["stages"]] == [0, 3, 7]
    assert read["stages"][0]["growth"] is None
    growth = read["stages"][2]["growth"]
    assert growth["grows"] == plan.stages[2].growth.grows
    assert growth["preserves_function"] is True
    assert growth["memory"]["total"] == plan.stages[2].growth.memory.total == sum(growth["memory"].values()) / 2
    assert read["stages"][2]["memory"]["total"] == plan.stages[2].memory.total
    assert read["saved_6nd"] == plan.saved_6nd
    assert read["scratch_flops"] == plan.scratch_flops


def test_text_of_several_stages():
    plan = make_plan(make_config(MOE, GROWTH))
    text = format_plan(plan)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 120
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    cells = [line.split() for line in text.splitlines()]
    assert ["stage", "1", "stage", "2", "stage", "3"] in cells
    assert ["from", "step", "0", "3", "7"] in cells
    assert ["num_layers", "4", "8", "8"] in cells
    assert ["pipeline", "1", "1", "2"] in cells
    assert ["total", *(f"{stage.parameters.total:,}" for stage in plan.stages)] in cells
    assert "Growth at step 3, 768 tokens" in text
    for stage in plan.stages[1:]:
        memory = binary_bytes(stage.growth.memory.total)
        assert ["memory", "per", "rank", *memory.split()] in [row[: 3 + len(memory.split())] for row in cells]
        assert stage.growth.grows in text
        assert stage.growth.rewarm in text
        assert stage.growth.optimizer_state in text
    assert ["saved", f"{100 * plan.saved:.1f}", "%", f"{100 * plan.saved_6nd:.1f}", "%"] in cells
    assert ["final", "size", "from", "scratch", scientific(plan.scratch_flops)] in [row[:5] for row in cells]


def test_text_of_parts_that_only_some_stages_have():
    """Stacking makes dense layers behind others; the words of one stage say so, too."""
    changes = {"model.first_dense_layers": 1, "model.ffn_size": 48}
    growth = [{"at_step": 3, "depth": {"method": "stack"}}]
    text = format_plan(make_plan(make_config(MOE, {**changes, "growth": growth, "parallel.pipeline_chunks": 1})))
    assert ["dense_layers", "-", "1"] in [line.split() for line in text.splitlines()]
    alone = format_plan(make_plan(make_config(MOE, {**changes, "model.dense_layers": [2]})))
    assert "first 1 layers dense with ffn 48, 1 further layers dense" in alone


# The smallest model of the published study, and its cell at ratio 1.
STUDIED = {
    "model.hidden_size": 512,
    "model.num_layers": 32,
    "model.num_attention_heads": 8,
    "model.num_query_groups": 8,
    "model.ffn_size": 2048,
}


def optimizer_lines(text: str) -> list[list[str]]:
    """The words of each line of the last block."""
    block = text[text.index("Optimizer") :]
    assert "\n\n" not in block
    return [line.split() for line in block.splitlines()]


def test_the_settings_of_a_published_cell_differ_in_nothing():
    cell = suggest("muon", 134_217_728, 1).cell
    config = make_config(DENSE, {**STUDIED, **cell.settings, "optim.kind": "muon", "budget.steps": cell.steps})
    optimizer = make_plan(config).optimizer
    assert (optimizer.model_size, optimizer.ratio) == (134_217_728, 1)
    assert (optimizer.published_size, optimizer.published_ratio, optimizer.published_loss) == ("130m", 1, 3.4626)
    assert optimizer.tokens_per_step == optimizer.published_tokens_per_step == 524_288
    assert optimizer.published_steps == config.total_steps == 5120
    assert [(key.key, key.value, key.published) for key in optimizer.keys] == [
        ("optim.muon.lr", 0.016, 0.016),
        ("optim.lr", 0.0032, 0.0032),
    ]
    assert optimizer.notes == ()
    other = make_config(config.model_dump(exclude_none=True), {"optim.beta1": 0.9, "schedule.warmup_steps": 512})
    keys = {key.key: key for key in make_plan(other).optimizer.keys}
    assert keys.keys() == {"optim.muon.lr", "optim.lr", "optim.beta1", "schedule.warmup_steps"}
    assert keys["schedule.warmup_steps"].remark == "0% of 5,120 steps"


def test_rates_of_muon_are_shown_in_the_scale_of_the_run():
    config = make_config(DENSE, {**STUDIED, "optim.kind": "muon", "budget.steps": 5000})
    shown = {key.key: key for key in make_plan(config).optimizer.keys}["optim.muon.lr"]
    assert shown.value == config.optim.lr  # that of the rest, as none is set
    # 0.2 sqrt(512) = 4.525
    assert shown.published == pytest.approx(0.016 / 4.525, rel=1e-3)
    assert shown.remark == '0.016 under scale = "keller_jordan"'
    same = make_config(config.model_dump(exclude_none=True), {"optim.muon.scale": "keller_jordan"})
    shown = {key.key: key for key in make_plan(same).optimizer.keys}["optim.muon.lr"]
    assert (shown.published, shown.remark) == (0.016, "")


def test_text_shows_the_published_settings():
    text = format_plan(make_plan(make_config(DENSE)))
    lines = optimizer_lines(text)
    assert lines[0][:2] == ["Optimizer", "adamw:"]
    assert ["tokens", "per", "step", "256", "524,288"] in lines
    assert ["optim.lr", "0.0003", "0.008"] in lines
    assert ["schedule.warmup_steps", "0", "2,000", "39%", "of", "5,120", "steps"] in lines
    far = [line for line in text.splitlines() if "a place to start a sweep from, no more" in line]
    assert len(far) == 2
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "dense" not in "\n".join(" ".join(line) for line in lines)
    several = optimizer_lines(format_plan(make_plan(make_config(MOE, GROWTH))))
    assert several[-1][:4] == ["the", "published", "models", "are"]


def test_the_model_at_the_end_is_compared():
    grown = make_plan(make_config(MOE, GROWTH))
    assert grown.optimizer.model_size == grown.stages[-1].parameters.active_non_embedding
    assert grown.optimizer.model_size != grown.stages[0].parameters.active_non_embedding
    assert grown.optimizer.ratio == grown.tokens / (20 * grown.optimizer.model_size)
    read = json.loads(json.dumps(grown.to_json()))["optimizer"]
    assert read["model_size"] == grown.optimizer.model_size
    assert [key["key"] for key in read["keys"]] == [key.key for key in grown.optimizer.keys]
    assert read["notes"] == list(grown.optimizer.notes)


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
