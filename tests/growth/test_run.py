"""Runs that grow on the way: what they write, how they go on, and what they refuse."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import pretrain.metrics
from pretrain.checkpoint import read_state
from pretrain.config.schema import Config
from pretrain.config.stages import stages
from pretrain.metrics.events import events_in_force
from pretrain.model.counts import count_flops, count_parameters
from pretrain.run import open_data
from tests.helpers.commands import CommandProcess, Result, command_process, contents
from tests.helpers.distributed import run_ranks
from tests.helpers.growing_runs import checkpoint, forget_after, growing_config, tensor_bytes, written
from tests.helpers.runs import events, make_corpus, rows

WIDER = {
    "at_step": 3,
    "experts": {"factor": 2, "noise": 0.05},
    "hidden": {"factor": 2},
    "expert_ffn": {"factor": 2},
    "rewarm": {"steps": 2, "ratio": 1.3},
}
DEEPER = {
    "at_step": 5,
    "depth": {"identity": True},
    "query_groups": {"factor": 2},
    "rewarm": {"steps": 1, "ratio": 1.2},
}
RUN = {"budget": {"steps": 8}, "checkpoint": {"every_steps": 2, "keep": 20}, "schedule": {"warmup_steps": 2}}
TOKENS_PER_STEP = 8 * 32
# Losses of two layouts after a few steps, as for runs that do not grow: fp32 sums in another order, amplified by AdamW.
LAYOUT_TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def command() -> Iterator[CommandProcess]:
    with command_process() as process:
        yield process


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory, command: CommandProcess) -> tuple[Config, Result]:
    """A run that grows twice, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    config = growing_config(corpus, folder / "run", [WIDER, DEEPER], **RUN)
    result = command("train", written(config, folder))
    assert result.code == 0, result.err
    return config, result


def losses(config: Config) -> list[float]:
    return [row["loss"] for row in rows(config.run.directory, "train")]


def test_rows_go_on(whole: tuple[Config, Result]) -> None:
    config, _ = whole
    train = rows(config.run.directory, "train")
    assert [row["step"] for row in train] == [*range(1, 9)]
    assert train[-1]["loss"] < train[0]["loss"] - 0.5
    # Layers and experts of the balance figures are those of the model at that step.
    shapes = [(len(row["moe"]["load"]), len(row["moe"]["load"][0])) for row in train]
    assert shapes == [(2, 4)] * 3 + [(2, 8)] * 2 + [(4, 8)] * 3
    assert [len(row["moe"]["dead_experts"]) for row in train] == [2] * 5 + [4] * 3
    assert [row["tokens"] for row in train] == [step * TOKENS_PER_STEP for step in range(1, 9)]


def test_new_entries_have_a_learning_rate_of_their_own(whole: tuple[Config, Result]) -> None:
    config, _ = whole
    train = rows(config.run.directory, "train")
    assert [len(row.get("lr_new", [])) for row in train] == [0] * 3 + [1] * 2 + [2] * 3
    # Relative to the rate of step 3 after 2 steps, and to that of step 5 after 1.
    assert train[4]["lr_new"][0] == pytest.approx(1.3 * train[2]["lr"])
    assert train[5]["lr_new"][1] == pytest.approx(1.2 * train[4]["lr"])
    assert train[5]["lr_new"][0] != pytest.approx(1.3 * train[2]["lr"])


def test_the_flops_ledger_adds_up_the_stages(whole: tuple[Config, Result]) -> None:
    config, _ = whole
    costs = [count_flops(stage.config.model, 32).per_token for stage in stages(config)]
    assert len(set(costs)) == 3
    per_step = [costs[0]] * 3 + [costs[1]] * 2 + [costs[2]] * 3
    spent = [row["flops"] for row in rows(config.run.directory, "train")]
    assert spent == [float(TOKENS_PER_STEP * sum(per_step[: step + 1])) for step in range(8)]
    # Negative control: not the tokens at the price of the last model.
    assert spent[-1] != 8 * TOKENS_PER_STEP * costs[-1]


def documented_fields() -> set[str]:
    """Fields of the growth event in the README: the rows of its table, and the words of its second entry."""
    readme = (Path(pretrain.metrics.__file__).parent / "README.md").read_text()
    table = readme[readme.index("A growth:") : readme.index("Goodput is the time")]
    first, second = table.split("The report does not read these:")
    first = first[: first.index("A `sync`, or `joined`, of the site")]
    (more,) = [line for line in second.splitlines() if line.startswith("| growth |")]
    cells = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", first, flags=re.MULTILINE)
    return {name for text in (*cells, more) for name in re.findall(r"`(\w+)`", text)}


def test_the_event_tells_what_grew(whole: tuple[Config, Result]) -> None:
    config, _ = whole
    first, second = events(config.run.directory, "growth")
    models = [stage.config.model for stage in stages(config)]
    for event, before, after in ((first, models[0], models[1]), (second, models[1], models[2])):
        small, large = count_parameters(before), count_parameters(after)
        assert (event["parameters_before"], event["parameters_after"]) == (small.total, large.total)
        assert (event["active_before"], event["active_after"]) == (small.active, large.active)
        assert event["flops_per_token_before"] == count_flops(before, 32).per_token
        assert event["flops_per_token_after"] == count_flops(after, 32).per_token
        assert event["preserves_function"] is True
        assert event["state"] == "asymmetric"
        assert 0 < event["move_seconds"] < event["seconds"]
        assert event["moved_bytes"] == 0, "a single rank gets nothing from others"
        assert event["local_bytes"] > 4 * 3 * small.total, "weights and two moments in fp32 at least"
        assert event["valid_loss_after"] == pytest.approx(event["valid_loss_before"], abs=0.01)
    # Noise on the copies of the first; nothing but rounding in the second.
    assert 1e-4 < first["logits_change"] < 0.1
    assert second["logits_change"] < 1e-5
    assert first["summary"] == (
        "experts 4 -> 8 (top-k 2 -> 4, noise 0.05), hidden 32 -> 64 (copy), expert ffn 32 -> 64 (copy)"
    )
    (valid,) = [row for row in rows(config.run.directory, "valid") if row["step"] == 3]
    assert first["valid_loss_before"] == valid["valid_loss"]
    assert [event["checkpoint"] for event in (first, second)] == ["step_00000003_grown", "step_00000005_grown"]
    growing = events(config.run.directory, "growing")
    assert [event["summary"] for event in growing] == [first["summary"], second["summary"]]
    assert [event["checkpoint"] for event in growing] == ["step_00000003", "step_00000005"]
    written_fields = {*first} - {"event", "time", "step"}
    assert written_fields | {"extra_memory_bytes"} == documented_fields()


def test_the_growth_is_shown(whole: tuple[Config, Result]) -> None:
    _, result = whole
    start = result.out.index("growth 1: experts 4 -> 8")
    block = result.out[start:].splitlines()[:8]
    heads = [line[:15].strip() for line in block[1:]]
    assert heads == ["parameters", "FLOPs/token", "valid loss", "logits", "optimizer", "rates", "took"]
    assert "(function preserved by design)" in block[4]
    assert "old entries keep their state" in block[5]
    assert re.search(r"MiB of extra memory|extra memory not measured", block[7])
    assert result.out.count("growth 2: layers 2 -> 4 (interpose, identity at the start), query groups 2 -> 4") == 1


def test_checkpoints_say_what_grew(whole: tuple[Config, Result]) -> None:
    config, _ = whole
    names = sorted(path.name for path in (config.run.directory / "checkpoints").iterdir())
    plain = [2, 3, 4, 5, 6, 8]
    assert names == sorted([f"step_{n:08d}" for n in plain] + [f"step_{n:08d}_grown" for n in (3, 5)])
    for name, done in (("3", 0), ("3_grown", 1), ("5", 1), ("5_grown", 2), ("8", 2)):
        records = read_state(checkpoint(config, name))["growths"]
        assert len(records) == done
        for record, stage, step in zip(records, stages(config)[1:], (3, 5), strict=False):
            assert (record["step"], record["parent"]) == (step, f"step_{step:08d}")
            assert record["model"] == stage.config.model.model_dump(mode="json")


def test_a_report_on_a_run_that_grew(whole: tuple[Config, Result], command: CommandProcess) -> None:
    config, _ = whole
    result = command("report", config.run.directory)
    assert result.code == 0, result.err
    assert "hidden 32 -> 64 (copy)" in result.out
    report = (config.run.directory / "report" / "report.md").read_text()
    assert "layers 2 -> 4 (interpose, identity at the start)" in report


@pytest.mark.parametrize(
    "name", ["step_00000002", "step_00000003", "step_00000003_grown", "step_00000004", "step_00000005_grown"]
)
def test_resumed_it_ends_the_same(
    whole: tuple[Config, Result], corpus: Path, tmp_path: Path, command: CommandProcess, name: str
) -> None:
    config, _ = whole
    forget_after(config.run.directory, tmp_path / "run", name)
    again = growing_config(corpus, tmp_path / "run", [WIDER, DEEPER], **RUN)
    result = command("train", written(again, tmp_path))
    assert result.code == 0, result.err
    final = tensor_bytes(checkpoint(config, "8"))
    assert tensor_bytes(checkpoint(again, "8")) == final
    assert losses(again) == losses(config)
    # Nothing of a growth is done twice, and the events in force tell of each once.
    found = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events_in_force(found, "growth")] == [3, 5]
    assert ("growth 1:" in result.out) == (name in ("step_00000002", "step_00000003"))
    # Negative control: the comparison tells steps apart.
    assert tensor_bytes(checkpoint(again, "6")) != final


def test_at_tokens_is_the_step_that_has_them(
    whole: tuple[Config, Result], corpus: Path, tmp_path: Path, command: CommandProcess
) -> None:
    """A token less than three steps, and what makes two steps and a token."""
    config, _ = whole
    points = [{**WIDER, "at_tokens": 2 * TOKENS_PER_STEP + 1}, {**DEEPER, "at_tokens": 5 * TOKENS_PER_STEP}]
    by_tokens = growing_config(corpus, tmp_path / "run", [{**point, "at_step": 0} for point in points], **RUN)
    assert command("train", written(by_tokens, tmp_path)).code == 0
    assert tensor_bytes(checkpoint(by_tokens, "8")) == tensor_bytes(checkpoint(config, "8"))


# Across ranks.


def _train_watching(configs: list[Config]) -> tuple[list[list[Any]], str]:
    """Train, and tell which tokens every step took, on all ranks together, and what this rank printed. The host tells
    nothing of its memory."""
    from pretrain import train as module
    from pretrain.platform import memory

    seen: list[list[Any]] = []
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        next_batch = module.next_batch

        def watched(run: Any) -> Any:
            batch, mesh = next_batch(run), run.mesh
            mine = {mesh.data_rank + j * mesh.data_size: micro["tokens"].tolist() for j, micro in enumerate(batch)}
            everyone: list[Any] = [None] * mesh.world_size
            dist.all_gather_object(everyone, mine)
            micros = {number: tokens for of_one in everyone for number, tokens in of_one.items()}
            seen[-1].append([sample for number in sorted(micros) for sample in micros[number]])
            return batch

        patch.setattr(module, "next_batch", watched)
        patch.setattr(memory, "CLEAR_REFS", configs[0].run.directory / "none" / "clear_refs")
        for config in configs:
            seen.append([])
            assert module.train(config) == 0
    return seen, printed.getvalue()


@pytest.mark.slow
def test_layouts_change_in_a_run(
    whole: tuple[Config, Result],
    corpus: Path,
    tmp_path: Path,
    command: CommandProcess,
) -> None:
    config, _ = whole
    moving = [
        {**WIDER, "parallel": {"tensor": 1, "pipeline": 2}},
        {**DEEPER, "parallel": {"tensor": 4, "pipeline": 1, "expert": 1}},
    ]
    four = growing_config(corpus, tmp_path / "four", moving, **RUN, parallel={"tensor": 2, "expert": 2})
    forget_after(config.run.directory, tmp_path / "spread", "step_00000003_grown")
    spread = growing_config(corpus, tmp_path / "spread", [WIDER, DEEPER], **RUN, parallel={"expert": 4})
    ((of_four, of_spread), printed), *_ = run_ranks(_train_watching, 4, [four, spread])
    # The samples in the order that the data has, whatever the model and layout.
    train_data, _ = open_data(config)
    steps = [[train_data[n][:-1].tolist() for n in range(8 * step, 8 * step + 8)] for step in range(8)]
    assert of_four == steps
    assert of_spread == steps[3:]
    # Grown on layouts, or by one process and gone on with by four: the same but for rounding.
    for run in (four, spread):
        assert losses(run) == pytest.approx(losses(config), abs=LAYOUT_TOLERANCE)
    (restart,) = events(spread.run.directory, "restart")
    assert restart["checkpoint"] == "step_00000003_grown"
    growth, alone = (events(run.run.directory, "growth")[0] for run in (four, config))
    assert growth["moved_bytes"] > 0
    assert growth["logits_change"] == pytest.approx(alone["logits_change"], rel=0.02)
    # On hosts that do not tell, the figure is left out.
    assert "extra_memory_bytes" not in growth
    assert "extra memory not measured" in printed
    # Grown by four, gone on with by one.
    forget_after(four.run.directory, tmp_path / "joined", "step_00000005_grown")
    joined = growing_config(corpus, tmp_path / "joined", [WIDER, DEEPER], **RUN)
    assert command("train", written(joined, tmp_path)).code == 0
    assert losses(joined) == pytest.approx(losses(config), abs=LAYOUT_TOLERANCE)
    # Negative control: the comparison sees the learning rate of the new entries.
    steeper = [WIDER, {**DEEPER, "rewarm": {"steps": 1, "ratio": 2.0}}]
    forget_after(config.run.directory, tmp_path / "steeper", "step_00000005")
    other = growing_config(corpus, tmp_path / "steeper", steeper, **RUN)
    assert command("train", written(other, tmp_path)).code == 0
    assert losses(other) != pytest.approx(losses(config), abs=LAYOUT_TOLERANCE)


# What is refused.


EDITED = {**WIDER, "experts": {"factor": 2, "noise": 0.02}}
REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "the past was edited": (
        "step_00000004",
        [EDITED, DEEPER],
        r"growth\[0\]: .*step_00000004 has been through it already, with other keys \(experts: .*\); restore them",
    ),
    "the past was moved": ("step_00000004", [{**WIDER, "at_step": 2}, DEEPER], r"growth\[0\]: .*at_step: 3 -> 2"),
    "the growth is over": (
        "step_00000003",
        [{**WIDER, "at_step": 2}],
        r"growth\[0\]: due at step 2, but .*step_00000003 is at step 3 and has not been through it",
    ),
    "fewer growths": ("step_00000006", [WIDER], r"growth: 1 points, but .*step_00000006 has grown 2 times already"),
    "none at all": ("step_00000006", [], r"growth: 0 points, but .*step_00000006 has grown 2 times already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changes(
    whole: tuple[Config, Result], corpus: Path, tmp_path: Path, command: CommandProcess, case: str
) -> None:
    config, _ = whole
    name, points, words = REFUSED[case]
    forget_after(config.run.directory, tmp_path / "run", name)
    before = contents(tmp_path / "run")
    result = command("train", written(growing_config(corpus, tmp_path / "run", points, **RUN), tmp_path))
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert re.search(words, line)
    assert contents(tmp_path / "run") == before


def test_a_growth_due_right_at_the_checkpoint_is_done(
    whole: tuple[Config, Result], corpus: Path, tmp_path: Path, command: CommandProcess
) -> None:
    """Negative control of the refusals: a later growth that is new, or moved to the step of the checkpoint."""
    config, _ = whole
    forget_after(config.run.directory, tmp_path / "run", "step_00000004")
    moved = growing_config(corpus, tmp_path / "run", [WIDER, {**DEEPER, "at_step": 4}], **RUN)
    assert command("train", written(moved, tmp_path)).code == 0
    assert [event["step"] for event in events(tmp_path / "run", "growth")][-1] == 4


def test_utility_needs_scores(
    whole: tuple[Config, Result], corpus: Path, tmp_path: Path, command: CommandProcess
) -> None:
    config, _ = whole
    utility = {"at_step": 2, "experts": {"top_k": "hold", "utility": {"steps": 2}}}
    forget_after(config.run.directory, tmp_path / "run", "step_00000002")
    before = contents(tmp_path / "run")
    result = command("train", written(growing_config(corpus, tmp_path / "run", [utility], **RUN), tmp_path))
    assert result.code == 2
    assert "growth[0].experts.utility" in result.err
    assert "has not measured its experts in the 2 steps before it" in result.err
    assert contents(tmp_path / "run") == before
    # A step later, one of two steps is measured, and that serves.
    later = {**utility, "at_step": 3}
    assert command("train", written(growing_config(corpus, tmp_path / "run", [later], **RUN), tmp_path)).code == 0
    record = read_state(checkpoint(growing_config(corpus, tmp_path / "run", [later], **RUN), "3_grown"))["growths"][0]
    assert {layer: sum(copies) for layer, copies in record["copies"].items()} == {"0": 4, "1": 4}
