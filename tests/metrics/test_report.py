"""Reports of real run directories; what is drawn is read back from the figures."""

import numpy as np
import pytest

from pretrain.config.schema import MetricsConfig
from pretrain.errors import RunDirectoryError
from pretrain.metrics.drawing import growth_breaks, smooth
from pretrain.metrics.history import listed, read_histories, series
from pretrain.metrics.plots import draw_loss, draw_lr_and_grad_norm, draw_throughput
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.report import summary, write_report
from tests.metrics.synthetic import GROWTH, train_row, write_run


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def horizontal_lines(ax):
    return sorted({line.get_ydata()[0] for line in ax.lines if list(line.get_xdata()) == [0, 1]})


def test_report_of_one_grown_run(tmp_path):
    run = write_run(tmp_path / "grown", grow_at=20)
    folder = write_report([run])
    assert folder == run / "report"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["loss.png", "lr_gradnorm.png", "moe.png", "report.md", "throughput.png"]
    for name in names:
        if name.endswith(".png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    table = (folder / "report.md").read_text()
    assert "| parameters, total / active | 23.4M / 8.12M |" in table
    assert (
        "| 20 | 2 to 4 layers | 12.3M -> 23.4M | 4.56M -> 8.12M | 977M -> 1.71G | 3.300 -> 3.412 | 18.3% | 1.3 "
        "| asymmetric |"
    ) in table
    assert "| best validation | 3.100 at step 40 (1.240 bits/byte) |" in table
    assert "| tokens | 41k |" in table
    assert "![loss](loss.png)" in table


def test_summary_has_a_line_for_each_growth_in_force(tmp_path):
    grown, plain = write_run(tmp_path / "grown", grow_at=20), write_run(tmp_path / "plain")
    assert "12.3M / 4.56M" in summary([plain])
    assert "grow" not in summary([plain])

    def last_lines(*runs):
        return [" ".join(line.split()) for line in summary(runs).splitlines()[-2:]]

    line = "20 2 to 4 layers 12.3M -> 23.4M 3.300 -> 3.412 1.3"
    assert last_lines(grown) == ["grown after step what grew parameters validation loss seconds", line]
    assert last_lines(plain, grown)[1] == f"grown {line}"
    # A later growth without validation data, its duration lost; what is shown of the model is what it grew to.
    recorder = Recorder(grown, metrics=MetricsConfig(), config={}, total_steps=40, restored_step=40)
    later = {"summary": "wider", "parameters_before": 23_400_000, "parameters_after": 51e6, "active_after": 9e6}
    later |= {"valid_loss_before": None, "valid_loss_after": None}
    recorder.event("growth", step=30, **{name: value for name, value in (GROWTH | later).items() if name != "seconds"})
    assert last_lines(grown) == [line, "30 wider 23.4M -> 51M - -"]
    assert "51M / 9M" in summary([grown])
    # A restart takes it back, and the report with it.
    recorder.event("restart", step=25, checkpoint="step_00000025")
    recorder.close()
    assert last_lines(grown)[1] == line
    assert "23.4M / 8.12M" in summary([grown])


def test_learning_rates_of_new_entries_are_further_lines(tmp_path):
    grown, plain = write_run(tmp_path / "grown", grow_at=20), write_run(tmp_path / "plain")

    def curves(*runs):
        ax = draw_lr_and_grad_norm(read_histories(runs)).axes[0]
        return ax, [line for line in ax.lines if len(line.get_xdata()) == 40]

    ax, (old, new) = curves(grown)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [old.get_label(), new.get_label()]
    assert new.get_label() == "entries that growth 1 brought in"
    np.testing.assert_array_equal(old.get_ydata(), 1e-3)
    assert np.isnan(new.get_ydata()[:20]).all()
    np.testing.assert_allclose(new.get_ydata()[20:26], 1.3e-3 * np.array([0.2, 0.4, 0.6, 0.8, 1.0, 1.0]))
    ax, both = curves(plain, grown)
    assert [line.get_linestyle() for line in both] == ["-", "-", ":"]
    assert both[1].get_color() == both[2].get_color()
    ax, (_,) = curves(plain)
    assert ax.get_legend() is None


def test_the_curve_over_flops_bends_where_the_model_grew(tmp_path):
    for grow_at, expected in ((20, [20e12, 20e12 + 20 * 1.75e12]), (0, [20e12, 40e12])):
        (history,) = read_histories([write_run(tmp_path / str(grow_at), grow_at=grow_at)])
        flops = series(history.train, "flops")
        np.testing.assert_allclose(flops[[19, 39]], expected)
        if grow_at:
            over_flops = draw_loss([history]).axes[2]
            dashed = next(line for line in over_flops.lines if line.get_linestyle() == "--")
            assert dashed.get_xdata()[0] == 20e12
            assert over_flops.lines[0].get_xdata()[-1] == flops[-1]


def test_rates_are_those_of_the_model_as_it_is_now(tmp_path):
    recorder = Recorder(tmp_path, metrics=MetricsConfig(), config={}, total_steps=30)
    for step in range(1, 31):
        recorder.train(train_row(step, tokens_per_second=12_000 if step <= 20 else 4_000))
    assert " 12,000" in summary([tmp_path])
    recorder.event("growth", step=20, **GROWTH)
    assert " 4,000" in summary([tmp_path])
    upper = draw_throughput(read_histories([tmp_path])).axes[0]
    assert upper.get_title(loc="left") == "Tokens per second, all ranks (median since the last growth 4k)"
    # Before the larger model has a row there is only the smaller one's rate.
    recorder.event("growth", step=30, **GROWTH)
    recorder.close()
    assert " 12,000" in summary([tmp_path])


def test_words_of_an_early_growth_stay_in_the_panel(tmp_path):
    for grow_at, side in ((2, "left"), (20, "right")):
        figure = draw_loss(read_histories([write_run(tmp_path / str(grow_at), grow_at=grow_at)]))
        words = [text for ax in figure.axes for text in ax.texts if text.get_text() == "2 to 4 layers"]
        assert [text.get_ha() for text in words] == [side] * 3


def test_report_of_several_runs_without_experts(tmp_path):
    runs = [write_run(tmp_path / name, experts=0, steps=12) for name in ("first", "second")]
    folder = write_report(runs)
    assert folder == tmp_path / "report"
    assert not (folder / "moe.png").exists()
    lines = summary(runs).splitlines()
    assert lines[0].split() == ["first", "second"]
    assert any(line.startswith("steps ") and line.split()[1:] == ["12", "12"] for line in lines)


def test_loss_is_drawn_in_bits_per_byte_with_baselines_and_growth(tmp_path):
    run = write_run(tmp_path / "run", grow_at=20)
    figure = draw_loss(read_histories([run]))
    assert [ax.get_xlabel() for ax in figure.axes] == ["optimizer steps", "training tokens", "training compute, FLOP"]
    assert figure.axes[0].get_ylabel() == "loss, bits per byte"
    assert horizontal_lines(figure.axes[0]) == [2.0, 2.5]
    assert {"unigram baseline 2.50", "bigram baseline 2.00", "2 to 4 layers"} <= set(texts(figure))
    dots = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    np.testing.assert_allclose(dots.get_ydata(), [1.36, 1.32, 1.28, 1.24])
    growth = next(line for line in figure.axes[1].lines if line.get_linestyle() == "--")
    assert growth.get_xdata()[0] == 20 * 1024  # in tokens


def test_loss_without_baselines_or_growth_is_one_panel(tmp_path):
    run = write_run(tmp_path / "run", baselines=False)
    figure = draw_loss(read_histories([run]))
    assert len(figure.axes) == 1
    assert horizontal_lines(figure.axes[0]) == []


def test_a_run_that_has_only_begun_or_never_was_finite(tmp_path):
    begun = Recorder(tmp_path, metrics=MetricsConfig(), config={}, total_steps=9)
    begun.train(train_row(1, loss=float("nan"), grad_norm=float("nan"), skipped=True))
    begun.event("skip", step=1)
    folder = write_report([tmp_path], tmp_path / "elsewhere")
    begun.close()
    assert folder == tmp_path / "elsewhere"
    table = (folder / "report.md").read_text()
    assert "| final training loss | - |" in table
    assert "| best validation | - |" in table
    assert "| skipped steps | 1 |" in table


def test_wall_time_and_goodput_are_those_the_clock_told(tmp_path):
    run = write_run(tmp_path / "run")
    assert "wall time                   0s" in summary([run])
    recorder = Recorder(run, metrics=MetricsConfig(), config={}, total_steps=40, restored_step=40)
    seconds = {"step": 3000.0, "eval": 500.0, "start": 100.0}
    recorder.event("goodput", step=40, wall_seconds=3600.0, goodput=0.8333, seconds=seconds)
    recorder.close()
    text = summary([run])
    assert "wall time                   1h00m" in text
    assert "goodput                     83.3% (eval 13.9%, start 2.8%)" in text


def test_smoothing_is_a_mean_that_skips_nan_and_stops_at_breaks():
    values = np.arange(240.0)
    np.testing.assert_allclose(smooth(values)[:236], values[:236])  # a straight line stays, from the first value on
    holes = values.copy()
    holes[::2] = np.nan
    assert np.isfinite(smooth(holes)[1:]).all()
    stairs = np.where(values < 100, 0.0, 1.0)
    np.testing.assert_array_equal(smooth(stairs, breaks=[100]), stairs)
    assert not np.array_equal(smooth(stairs), stairs)


def test_growth_breaks_are_the_first_rows_of_the_grown_model(tmp_path):
    (history,) = read_histories([write_run(tmp_path / "run", grow_at=20)])
    assert growth_breaks(history) == [20]
    assert history.train[20]["step"] == 21
    table = listed(history.train, "moe.entropy")
    assert table.shape == (4, 40)
    assert np.isnan(table[2:, :20]).all()
    assert np.isfinite(table[:, 20:]).all()
    assert np.isnan(series(history.train, "moe.nothing")).all()


def test_folders_that_are_no_run_are_named(tmp_path):
    with pytest.raises(RunDirectoryError, match="missing: no such run directory"):
        write_report([tmp_path / "missing"])
    with pytest.raises(RunDirectoryError, match=r"no metrics.jsonl in it"):
        write_report([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunDirectoryError, match="no training rows yet"):
        write_report([tmp_path])
    run = write_run(tmp_path / "a" / "run", steps=3)
    with pytest.raises(RunDirectoryError, match="given twice"):
        write_report([run, run])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="the report cannot be written"):
        write_report([run], tmp_path / "file")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / parent / "run", steps=3) for parent in "ab"]
    assert [history.name for history in read_histories(runs)] == ["a/run", "b/run"]
