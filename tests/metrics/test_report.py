"""Reports of real run directories; what is drawn is read back from the figures."""

import numpy as np
import pytest

from pretrain.config.schema import MetricsConfig
from pretrain.errors import RunDirectoryError
from pretrain.metrics.drawing import growth_breaks, smooth
from pretrain.metrics.history import layered, read_histories, series
from pretrain.metrics.plots import draw_loss
from pretrain.metrics.recorder import Recorder
from pretrain.metrics.report import summary, write_report
from tests.metrics.synthetic import train_row, write_run


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
    assert "| parameters, total / active | 12.3M / 4.56M |" in table
    assert "| best validation | 3.100 at step 40 (1.240 bits/byte) |" in table
    assert "| tokens | 41k |" in table
    assert "![loss](loss.png)" in table


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
    table = layered(history.train, "entropy")
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
