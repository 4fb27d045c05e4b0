"""The ledger: one hash for what learns the same, rows that survive whatever ends a sweep."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.schema import Config
from pretrain.errors import RunDirectoryError
from pretrain.tuning.ledger import LEDGER_FILE, Row, data_hash, open_ledger, trial_key
from tests.helpers.configs import make_config
from tests.helpers.runs import make_corpus
from tests.tuning.sweeps import base_values

ROW = Row("0123", "adamw", "one", 1, {"optim.lr": 1e-3, "optim.kind": "adamw"}, 2.5, "", 1.5, 1000)
FAILED = Row("4567", "adamw", "one", 2, {"optim.lr": 1e9}, math.inf, "diverged", 0.5, 1000)


def config_of(corpus: Path, **changes: Any) -> Config:
    return make_config(base_values(corpus), {key.replace("__", "."): value for key, value in changes.items()})


def test_the_key_is_that_of_what_is_learned(corpus: Path, tmp_path: Path) -> None:
    key = trial_key(config_of(corpus))
    assert len(key) == 16
    copied = make_corpus(tmp_path)  # the same text at another place
    same = [
        config_of(corpus, run__directory="elsewhere"),
        config_of(corpus, checkpoint__every_steps=3, metrics__log_every_steps=7),
        config_of(copied),
        config_of(copied, data__tokenizer=str(copied / "tokenizer.json")),
        make_config(dict(reversed(base_values(corpus).items()))),
        config_of(corpus, optim__lr=3e-4),  # the default, spelled out
    ]
    assert {trial_key(config) for config in same} == {key}
    other = [
        config_of(corpus, run__seed=2),
        config_of(corpus, optim__lr=1e-3),
        config_of(corpus, model__num_layers=3),
        config_of(corpus, budget__tokens=1024),
        config_of(corpus, data__train=[{"prefix": str(corpus / "valid")}]),
        config_of(corpus, eval__batches=2),  # the loss is that of other batches
    ]
    assert len({key, *map(trial_key, other)}) == 1 + len(other)


def test_data_without_a_sidecar_is_told_by_its_documents(corpus: Path, tmp_path: Path) -> None:
    for suffix in ("idx", "bin"):
        (tmp_path / f"train.{suffix}").write_bytes((corpus / f"train.{suffix}").read_bytes())
    assert data_hash(tmp_path / "train") != data_hash(corpus / "train")
    (tmp_path / "other.idx").write_bytes((corpus / "valid.idx").read_bytes())
    assert data_hash(tmp_path / "other") != data_hash(tmp_path / "train")


def test_rows_come_back(tmp_path: Path) -> None:
    for row in (ROW, FAILED):
        with open_ledger(tmp_path, writing=True) as ledger:
            ledger.add(row)
    with open_ledger(tmp_path, writing=False) as ledger:
        assert [*ledger.rows.values()] == [ROW, FAILED]
        with pytest.raises(AssertionError):
            ledger.add(ROW)


def test_half_a_line_is_dropped_with_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_ledger(tmp_path, writing=True) as ledger:
        ledger.add(ROW)
        ledger.add(FAILED)
    path, whole = tmp_path / LEDGER_FILE, (tmp_path / LEDGER_FILE).read_bytes()
    assert capsys.readouterr().out == ""
    path.write_bytes(whole[:-10])
    with open_ledger(tmp_path, writing=True) as ledger:
        assert [*ledger.rows.values()] == [ROW]
        assert "the last line was cut off" in capsys.readouterr().out
        ledger.add(FAILED)
    with open_ledger(tmp_path, writing=False) as ledger:
        assert [*ledger.rows.values()] == [ROW, FAILED]
    assert capsys.readouterr().out == ""

    # A line in the middle was not cut off by a crash: somebody has to look at it.
    path.write_bytes(whole.replace(b'"adamw"', b'"adamw', 1))
    with pytest.raises(RunDirectoryError, match="line 1: not a JSON object"), open_ledger(tmp_path, writing=False):
        pass
