"""Loading: base files, overrides, every problem at once in plain words, and the round trip."""

from pathlib import Path

import pytest
import tomli_w

from pretrain.config.load import dump_config, load_config
from pretrain.errors import ConfigError
from tests.helpers.configs import MOE, make_config


def write(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def moe_file(tmp_path):
    return write(tmp_path, tomli_w.dumps(MOE), "moe.toml")


def problems(path, overrides=(), **kwargs):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, **kwargs)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


def test_file_gives_its_values_and_the_defaults(moe_file):
    config = load_config(moe_file)
    assert config == make_config(MOE)
    assert config.optim.lr == 3e-4  # from the schema


def test_round_trip_with_every_kind_of_value(moe_file, tmp_path):
    overrides = [
        'data.train=[{prefix="data/a b", weight=0.3}, {prefix="c"}]',
        "data.tokenizer=tokenizers/x.json",
        "optim.kind=muon",
        "optim.muon.lr=0.02",
        "optim.eps=1e-20",
        "optim.lr=1",
        "model.qk_norm=true",
        'run.directory="runs/quote\\"d"',
    ]
    config = load_config(moe_file, overrides)
    text = dump_config(config)
    again = load_config(write(tmp_path, text))
    assert again == config
    assert dump_config(again) == text
    assert "warmup_steps = 0" in text  # defaults are explicit
    assert load_config(moe_file, overrides[:-1]) != config  # equality sees a single differing value


def test_override_values_are_toml_or_bare_strings(moe_file):
    config = load_config(
        moe_file, ["run.directory=runs/x", "optim.lr=3e-4", "optim.kind=muon", "optim.clip_grad=0", " run.seed = 7"]
    )
    assert config.run.directory == Path("runs/x")
    assert config.optim.lr == 3e-4
    assert config.optim.kind == "muon"
    assert config.optim.clip_grad == 0
    assert config.run.seed == 7


def test_later_override_wins_and_newlines_smuggle_no_keys(moe_file):
    assert load_config(moe_file, ["run.seed=1", "run.seed=2"]).run.seed == 2
    (line,) = problems(moe_file, ["run.seed=1\nprecision = 'bf16'"])
    assert line.startswith("run.seed = ")


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim..lr=3", "optim lr=3"])
def test_malformed_override(moe_file, text):
    (line,) = problems(moe_file, [text])
    assert line.startswith(f"--set {text}: must look like section.key=value")


def test_base_merges_tables_and_replaces_arrays(tmp_path, moe_file):
    write(tmp_path, 'base = "moe.toml"\n[data]\ntrain = [{prefix = "a"}, {prefix = "b"}]\n', "middle.toml")
    (tmp_path / "sub").mkdir()
    child = write(
        tmp_path / "sub", 'base = "../moe.toml"\n[model]\ntop_k = 4\n[data]\ntrain = [{prefix = "c"}]\n', "child.toml"
    )
    config = load_config(child)
    assert config.model.top_k == 4
    assert config.model.num_experts == MOE["model"]["num_experts"]
    assert [source.prefix for source in config.data.train] == [Path("c")]
    assert load_config(child, ["model.top_k=1", "model.router.normalize_top_k=false"]).model.top_k == 1


def test_base_of_a_base_is_refused(tmp_path, moe_file):
    write(tmp_path, 'base = "moe.toml"\n', "middle.toml")
    top = write(tmp_path, 'base = "middle.toml"\n', "top.toml")
    (line,) = problems(top)
    assert line.startswith('base = "middle.toml": that file has a base itself ("moe.toml")')
    assert load_config(tmp_path / "middle.toml")


def test_missing_and_malformed_base(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml:\n  cannot be read: No such file"):
        load_config(write(tmp_path, 'base = "absent.toml"\n'))
    (line,) = problems(write(tmp_path, "base = 3\n"))
    assert line.startswith("base = 3: must be the name of a file")


def test_files_that_are_no_toml(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.toml:\n  not valid TOML: .*line 2, column 9"):
        load_config(write(tmp_path, "[model]\ntop_k = = 3\n"))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 5\)"):
        load_config(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.num_layer=3", "model.num_layer = 3: unknown key; did you mean model.num_layers?"),
        ("optim.warmup_steps=3", "optim.warmup_steps = 3: unknown key; did you mean schedule.warmup_steps?"),
        ("schedule.lr=3", "schedule.lr = 3: unknown key; did you mean optim.lr?"),
        ("optim.max_skiped_steps=3", "optim.max_skiped_steps = 3: unknown key; did you mean optim.max_skipped_steps?"),
        ("modle.top_k=3", "[modle]: unknown section; did you mean [model]?"),
        ("paralel={}", "[paralel]: unknown section; did you mean [parallel]?"),
        ("run.zzz=1", "run.zzz = 1: unknown key; known are run.directory, run.precision, run.seed"),
        (
            'data.valid=[{prefix="a"}, {prefix="b", weigth=2}]',
            "data.valid[1].weigth = 2: unknown key; did you mean data.valid.weight?",
        ),
    ],
)
def test_unknown_key_names_the_nearest_real_one(moe_file, override, line):
    assert problems(moe_file, [override]) == (line,)


def test_unknown_key_at_top_level_lists_the_sections(moe_file):
    (line,) = problems(moe_file, ["zzz=1"])
    assert line.startswith("zzz = 1: unknown key; known are batch, budget, checkpoint, data, ")


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ('optim.lr="3e-4"', 'optim.lr = "3e-4": must be a number; '),
        ("optim.lr=nan", "optim.lr = NaN: must be "),
        ("optim.lr=inf", "optim.lr = Infinity: must be a finite number; "),
        ("optim.lr=0", "optim.lr = 0: must be more than 0; "),
        ("optim.beta1=1.0", "optim.beta1 = 1.0: must be less than 1; "),
        ("schedule.min_lr_ratio=2", "schedule.min_lr_ratio = 2: must be at most 1; "),
        ("optim.weight_decay=-1", "optim.weight_decay = -1: must be at least 0; "),
        ("budget.steps=2e3", "budget.steps = 2000.0: must be a whole number; "),
        ("run.seed=true", "run.seed = true: must be a whole number; "),
        ("model.qk_norm=1", "model.qk_norm = 1: must be true or false; "),
        ("run.directory=3", "run.directory = 3: must be text; "),
        (
            "optim.kind=adam",
            'optim.kind = "adam": must be "adamw", "nadamw", "mars", "cautious", "lion", "adam_mini", '
            '"sophia", "muon", "scion", "kron", "soap", "muonh" or "adamh"; did you mean "adamw"?',
        ),
        ("parallel.recompute=3", 'parallel.recompute = 3: must be "none", "selective" or "full"; choose one'),
        ("data.train=x", 'data.train = "x": must be an array; '),
        ("optim=3", "optim = 3: must be a table; "),
        ("run.seed=1979-05-27", 'run.seed = "1979-05-27": must be a whole number; '),
    ],
)
def test_wrong_types_and_limits_in_plain_words(moe_file, override, start):
    (line,) = problems(moe_file, [override])
    assert line.startswith(start)
    assert "Input should" not in line  # pydantic's prose


def test_missing_keys_and_sections(tmp_path):
    lines = problems(write(tmp_path, "[model]\nvocab_size = 8\n"))
    assert lines[0] == "[run]: this section is missing; add it"
    assert "model.hidden_size: missing; give it a value" in lines
    assert "[budget]: this section is missing; add it" in lines


def test_every_problem_at_once(moe_file):
    lines = problems(
        moe_file,
        [
            "model.num_query_groups=3",  # rules
            "batch.global_batch_size=6",
            "parallel.expert=3",
            "optim.lrr=1",  # unknown
            'optim.lr="fast"',  # type
            "schedule.decay_fraction=2",  # limit
        ],
        world_size=6,
    )
    starts = {line.split(" = ")[0] for line in lines}
    assert starts == {
        "model.num_query_groups",
        "parallel.expert",
        "optim.lrr",
        "optim.lr",
        "schedule.decay_fraction",
    }
    assert len(lines) == len(starts)


def test_rules_about_a_misspelt_key_wait_until_it_is_mended(moe_file):
    # Read literally, the mixture has no expert_ffn_size; the typo is the one thing to report.
    text = moe_file.read_text().replace("expert_ffn_size", "expert_fnn_size")
    moe_file.write_text(text)
    assert problems(moe_file) == ("model.expert_fnn_size = 16: unknown key; did you mean model.expert_ffn_size?",)


def test_misspelt_required_key_is_reported_once(moe_file):
    moe_file.write_text(moe_file.read_text().replace("hidden_size", "hiden_size"))
    assert problems(moe_file) == ("model.hiden_size = 32: unknown key; did you mean model.hidden_size?",)


def test_world_size_rules_only_when_it_is_given(moe_file):
    assert load_config(moe_file, ["parallel.tensor=2"])
    (line,) = problems(moe_file, ["parallel.tensor=2"], world_size=3)
    assert "world size = 3" in line


def test_error_names_file_and_count(moe_file):
    with pytest.raises(ConfigError) as caught:
        load_config(moe_file, ["optim.lr=0", "run.seeed=1"])
    assert str(caught.value).startswith(f"2 problems in {moe_file}:\n  ")
