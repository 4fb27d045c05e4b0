"""Every shipped configuration loads and plans, and the shapes of the papers have their published counts."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from pretrain.config.load import dump_config, load_config
from pretrain.config.rules import check, smallest_world_size
from pretrain.errors import ConfigError
from pretrain.model.counts import count_parameters
from pretrain.plan import decimal_bytes, format_plan, make_plan, quantity
from pretrain.tuning.sweep_file import load_sweep

CONFIGS = Path(__file__).parent.parent / "configs"
SWEEPS = [CONFIGS / "sweeps" / "dense.toml", CONFIGS / "studies" / "optimizers.toml"]
FILES = sorted(set(CONFIGS.rglob("*.toml")) - set(SWEEPS))


def counts(name):
    return count_parameters(load_config(CONFIGS / "models" / f"{name}.toml").model)


def names(files):
    return [str(path.relative_to(CONFIGS)) for path in files]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_loads_plans_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    smallest = smallest_world_size(config)
    assert make_plan(config).world_size == smallest
    assert check(config, 2 * smallest + 1) or smallest == 1
    (tmp_path / "resolved.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_says_what_it_is_and_how_to_run_it(path):
    text = path.read_text()
    head = text[: re.search(r"^[^#]", text, re.MULTILINE).start()]
    assert "pretrain plan configs/" in head or "pretrain train configs/" in head or "-m pretrain train configs/" in head
    assert f"configs/{path.relative_to(CONFIGS)}" in head
    ranks = re.search(r"--(?:world-size|nproc-per-node) (\d+)", head)
    assert make_plan(load_config(path), int(ranks[1]) if ranks else 1)


def test_the_folder_is_complete():
    wanted = {"debug-1gpu.toml", "moe-8gpu.toml", "moe-multinode.toml"}
    wanted |= {f"decentral/{name}.toml" for name in (*DEMO_SITES, *SPES)}
    wanted |= {f"{name}.toml" for name in GROWTH} | {"sweeps/dense-run.toml"}
    wanted |= {f"studies/{name}.toml" for name in ("growth", "decentral")}
    wanted |= {f"studies/optimizers-{name}.toml" for name in ("run", "moe")}
    shapes = [*SPARKLING, *ORTHOGONAL, *SPES, *QWEN, *DENSE, *GROWN]
    assert set(names(FILES)) == wanted | {f"models/{name}.toml" for name in shapes}


@pytest.mark.parametrize("path", SWEEPS, ids=names(SWEEPS))
def test_sweeps_load_and_say_how_to_run_them(path):
    assert f"pretrain sweep configs/{path.relative_to(CONFIGS)}" in path.read_text().partition("\n\n")[0]
    sweep = load_sweep(path)
    for cell in sweep.cells:
        # Names tell size and data ratio.
        size, ratio = cell.name.removesuffix("x").split("-")
        assert cell.ratio == pytest.approx(float(ratio), rel=1e-3)
        assert round(cell.model_size / 1e3) == int(size.removesuffix("k"))
    with pytest.raises(ConfigError):  # a run's file is none
        load_sweep(CONFIGS / "demo.toml")


# What the growths of the demo's model make of it: key -> factor at each point.
GROWTH = {
    "demo": [{"hidden_size": 2, "expert_ffn_size": 2}],
    "growth/depth": [{"num_layers": 2}],
    "growth/experts": [{"num_experts": 2, "top_k": 2}],
    "growth/all": [{"num_layers": 2, "num_experts": 2, "top_k": 2}, {"hidden_size": 2, "expert_ffn_size": 2}],
}


@pytest.mark.parametrize("name", GROWTH)
def test_growth_of_the_demo(name):
    config = load_config(CONFIGS / f"{name}.toml")
    plan = make_plan(config, 2)
    for (before, after), factors in zip(pairwise(plan.stages), GROWTH[name], strict=True):
        found = {key: size / before.shape[key] for key, size in after.shape.items() if size != before.shape[key]}
        assert found == factors
        assert f"-> {after.shape[next(iter(factors))]}" in after.growth.grows
    layouts = {(stage.layout.expert, stage.layout.pipeline) for stage in plan.stages}
    assert (len(layouts) > 1) is (name == "growth/all")
    demo = load_config(CONFIGS / "demo.toml")
    assert (config.run.directory == demo.run.directory) is (name == "demo")
    assert config.data == demo.data
    # Minutes: 400 steps of a model with 1.1 M active parameters, which take four, are 1.2e13 FLOPs.
    assert plan.total_flops < 1.5e13


# arXiv 2602.02472, section 5: active / total as printed, 450M/2.56B, 751M/5B, 900M/5.13B and 1.5B/9.96B; one more
# digit from its configuration table by hand.
SPARKLING = {
    "sparkling-small": ("449.5 M", "2.563 B"),
    "sparkling-inner2x": ("751.5 M", "4.979 B"),
    "sparkling-hidden2x": ("899.0 M", "5.127 B"),
    "sparkling-joint": ("1.503 B", "9.959 B"),
}


@pytest.mark.parametrize("name", SPARKLING)
def test_sparkling(name):
    active, total = SPARKLING[name]
    assert (quantity(counts(name).active), quantity(counts(name).total)) == (active, total)


def test_sparkling_compute_of_the_papers_convention():
    """Table 2 of arXiv 2602.02472: 5.40, 9.01, 10.80 and 18.00 e20 FLOPs for 200B tokens."""
    for name, printed in zip(SPARKLING, (5.40e20, 9.01e20, 10.80e20, 18.00e20), strict=True):
        plan = make_plan(load_config(CONFIGS / "models" / f"{name}.toml"))
        assert plan.stages[0].total_flops_6nd == pytest.approx(printed, rel=0.003), name


# arXiv 2510.08008 prints 2.1B/18.0B, 3.5B/35.2B, 5.6B/69.0B; the digits are those of the shape inferred from them.
ORTHOGONAL = {
    "orthogonal-17b": (2.18, 18.03),
    "orthogonal-35b": (3.53, 35.24),
    "orthogonal-70b": (5.66, 69.07),
}


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_orthogonal(name):
    active, total = ORTHOGONAL[name]
    assert (round(counts(name).active / 1e9, 2), round(counts(name).total / 1e9, 2)) == (active, total)


# Runs that grow from one of these shapes to others: what they pass through, and the share of compute saved as the
# papers count it (35 % in table 2 of arXiv 2602.02472).
GROWN = {
    "sparkling-grown": (["sparkling-small", "sparkling-joint"], "35.0 %"),
    "orthogonal-17b-to-70b": (["orthogonal-17b", "orthogonal-35b", "orthogonal-70b"], "48.2 %"),
}


@pytest.mark.parametrize("name", GROWN)
def test_grown(name):
    shapes, saved = GROWN[name]
    plan = make_plan(load_config(CONFIGS / "models" / f"{name}.toml"))
    assert [stage.parameters for stage in plan.stages] == [counts(shape) for shape in shapes]
    assert f"{100 * plan.saved_6nd:.1f} %" == saved
    totals, actives = (
        " -> ".join(quantity(getattr(stage.parameters, key)) for stage in plan.stages) for key in ("total", "active")
    )
    assert f"| `{name}` | {totals} | {actives} | {saved} |" in (CONFIGS / "README.md").read_text()


# arXiv 2602.11543: shared S, routed experts X and T = S + X of the released configurations, and active parameters, in
# billions.
SPES = {
    "spes-1b": (0.261, 0.906, 1.167, 0.37),
    "spes-7b": (0.891, 6.442, 7.333, 1.70),
    "spes-9b": (0.975, 8.456, 9.431, 3.09),
}


@pytest.mark.parametrize("name", SPES)
def test_spes(name):
    shared, routed, total, active = SPES[name]
    found = counts(name)
    assert round((found.total - found.by_part["routed_experts"]) / 1e9, 3) == shared
    assert round(found.by_part["routed_experts"] / 1e9, 3) == routed
    assert round(found.total / 1e9, 3) == total
    assert round(found.active / 1e9, 2) == active


# The model cards of Qwen3 (arXiv 2505.09388): parameters and non-embedding parameters, in billions.
QWEN = {"qwen3-1.7b": (1.7, 1.4)}


@pytest.mark.parametrize("name", QWEN)
def test_qwen(name):
    found = counts(name)
    assert (round(found.total / 1e9, 1), round(found.non_embedding / 1e9, 1)) == QWEN[name]
    assert found.active == found.total


# Sites, and the experts that each of them trains in a layer.
DEMO_SITES = {"two-sites": (2, 4), "four-sites": (4, 2)}


@pytest.mark.parametrize("name", DEMO_SITES)
def test_sites_of_the_demo(name):
    config, demo = (load_config(CONFIGS / f"{path}.toml") for path in (f"decentral/{name}", "demo"))
    plan = make_plan(config, 1).decentral
    assert (plan.sites, plan.trained_experts) == DEMO_SITES[name]
    assert (config.model, config.data, config.growth) == (demo.model, demo.data, ())
    assert config.run.directory != demo.run.directory
    # All sites see the same model when they are compared, saved and at the end.
    steps = (config.eval.every_steps, config.checkpoint.every_steps, config.total_steps)
    assert {every % config.decentral.sync_every_steps for every in steps} == {0}
    assert make_plan(load_config(CONFIGS / "decentral" / f"{name}.toml", ["parallel.expert=2"]), 2)


@pytest.mark.parametrize(("name", "trained"), zip(SPES, (4, 8, 2), strict=True))
def test_sites_of_spes(name, trained):
    config = load_config(CONFIGS / "decentral" / f"{name}.toml")
    assert config.model == load_config(CONFIGS / "models" / f"{name}.toml").model
    plan = make_plan(config, 8)
    sites = plan.decentral
    assert (sites.sites, sites.trained_experts, plan.stages[0].layout.experts_per_rank) == (4, trained, 4)
    sizes = (sites.site_memory, sites.replica_memory, sites.traffic, sites.replica_traffic)
    row = " | ".join(decimal_bytes(size.total) for size in sizes)
    assert f"| `{name}` | {row} | arXiv 2602.11543 |" in (CONFIGS / "README.md").read_text()


# arXiv 2509.02046: non-embedding parameters, L (3 d ffn + 4 d^2), and tokens at 20 for each of them.
DENSE = {
    "dense-130m": (134_217_728, 2.68),
    "dense-300m": (301_989_888, 6.04),
    "dense-520m": (536_870_912, 10.74),
    "dense-1.2b": (1_207_959_552, 24.16),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    parameters, tokens = DENSE[name]
    assert counts(name).non_embedding == parameters
    plan = make_plan(load_config(CONFIGS / "models" / f"{name}.toml"))
    assert round(plan.tokens / 1e9, 2) == tokens
    assert plan.tokens == pytest.approx(20 * parameters, rel=1e-3)


def test_a_changed_shape_is_noticed():
    """Negative control of the comparisons above: one key/value head more, and the digits differ."""
    model = load_config(CONFIGS / "models" / "sparkling-small.toml").model
    other = count_parameters(model.model_copy(update={"num_query_groups": 8}))
    assert (quantity(other.active), quantity(other.total)) != SPARKLING["sparkling-small"]


@pytest.mark.parametrize("name", [*SPARKLING, *ORTHOGONAL, *SPES, *QWEN, *DENSE])
def test_readme_table_is_what_the_plan_prints(name):
    found = counts(name)
    row = f"| `{name}` | {quantity(found.total)} | {quantity(found.active)} | {quantity(found.non_embedding)} |"
    assert row in (CONFIGS / "README.md").read_text()
    text = format_plan(make_plan(load_config(CONFIGS / "models" / f"{name}.toml")))
    assert all(quantity(value) in text for value in (found.total, found.active, found.non_embedding))
