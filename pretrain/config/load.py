"""Configurations from TOML files, with one level of `base` and overrides from the command line.

Every problem of a configuration is found before anything starts and reported at once, in plain words: unknown
keys with the nearest real one, wrong types and limits from the schema, then the rules that tie keys together.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomli_w
from pydantic import ValidationError

from pretrain.config.base import Section
from pretrain.config.rules import check
from pretrain.config.schema import Config
from pretrain.errors import ConfigError

Table = dict[str, Any]


def load_config(path: Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Config:
    """Read, merge and check a configuration.

    Args:
        path: TOML file. Its top-level `base = "other.toml"`, relative to the file, is read first; tables merge
            key by key, arrays and values replace.
        overrides: `section.key=value` strings; the value is TOML, or else a bare string.
        world_size: ranks the run will have, when the rules about it should be checked, too.

    Raises:
        ConfigError: with every problem found.
    """
    source = str(path)
    raw = _read_with_base(path)
    raw = _merge(raw, _parse_overrides(overrides, source))
    config, problems = _validate(raw, world_size)
    if problems or config is None:
        raise ConfigError(problems, source)
    return config


def dump_config(config: Config) -> str:
    """The configuration as TOML, every value that it reads explicit; reading it back gives an equal configuration."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def flat_keys(config: Config) -> dict[str, Any]:
    """`section.key` -> value, as JSON, of every key."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return out

    return flat(config.model_dump(mode="json"))


def changed_keys(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key two configurations differ in, run.directory aside."""
    before, after = flat_keys(old), flat_keys(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key) and key != "run.directory"]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def _read_with_base(path: Path) -> Table:
    raw = read_toml(path)
    if "base" not in raw:
        return raw
    name = raw.pop("base")
    if not isinstance(name, str):
        raise ConfigError([f'base = {_show(name)}: must be the name of a file; write base = "FILE.toml"'], str(path))
    base_path = path.parent / name
    base = read_toml(base_path)
    if "base" in base:
        problem = f'base = "{name}": that file has a base itself ({_show(base["base"])}), and only one level is read'
        raise ConfigError([f"{problem}; put the shared keys in one file"], str(path))
    return _merge(base, raw)


def read_toml(path: Path) -> Table:
    """A TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"not valid TOML: {error}; mend the syntax there"], str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 text (byte {error.start}); save it as UTF-8"], str(path)) from error
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror}; check the path"], str(path)) from error


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """`over` on top of `base`: tables key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _parse_overrides(overrides: Sequence[str], source: str) -> Table:
    tree: Table = {}
    problems = []
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(re.fullmatch(r"[\w-]+", part) for part in parts):
            problems.append(f"--set {text}: must look like section.key=value; for example --set optim.lr=3e-4")
            continue
        leaf: Any = _parse_value(value.strip())
        for part in reversed(parts):
            leaf = {part: leaf}
        tree = _merge(tree, leaf)
    if problems:
        raise ConfigError(problems, source)
    return tree


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (paths and names need no quotes on a command line)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def _validate(raw: Table, world_size: int | None) -> tuple[Config | None, list[str]]:
    try:
        config = _build(raw)
    except ValidationError as error:
        return None, _explain_all(raw, error, world_size)
    return config, check(config, world_size)


def _build(raw: Table) -> Config:
    # Strict JSON rules are the ones that suit TOML: "3" is no number and 1 no boolean, while an array is a tuple
    # and a string a path. Dates, which no key takes, become text.
    return Config.model_validate_json(json.dumps(raw, default=str), strict=True)


def _explain_all(raw: Table, error: ValidationError, world_size: int | None) -> list[str]:
    """One line per problem of a configuration that does not fit the schema, and the rules it breaks besides."""
    errors = error.errors(include_url=False)
    keys = _schema_keys()
    meant: dict[tuple[int | str, ...], str] = {
        e["loc"]: _nearest(dotted(e["loc"]), keys) for e in errors if e["type"] == "extra_forbidden"
    }
    problems = []
    suspects = [*meant.values(), *(dotted(e["loc"]).partition("[")[0] for e in errors)]
    repaired = json.loads(json.dumps(raw, default=str))
    for e in errors:
        key = dotted(e["loc"])
        if e["type"] == "missing":
            if key not in meant.values():  # else the misspelt key's line says it already
                problems.append(_explain_missing(key))
            continue
        _remove(repaired, e["loc"])
        unknown = e["type"] == "extra_forbidden"
        problems.append(_explain_unknown(key, e["input"], meant[e["loc"]], keys) if unknown else explain(key, e))
    # Rules that do not touch a doubtful key hold anyway: report what they find in the same go.
    try:
        broken = check(_build(repaired), world_size)
    except ValidationError:
        return problems
    return problems + [line for line in broken if not any(key and key in line for key in suspects)]


def _explain_missing(key: str) -> str:
    if "." not in key:
        return f"[{key}]: this section is missing; add it"
    return f"{key}: missing; give it a value"


def _explain_unknown(key: str, value: Any, nearest: str, keys: Mapping[str, bool]) -> str:
    what = f"[{key}]: unknown section" if isinstance(value, dict) else f"{key} = {_show(value)}: unknown key"
    if nearest:
        return f"{what}; did you mean {f'[{nearest}]' if keys[nearest] else nearest}?"
    section = key.rpartition(".")[0]
    known = sorted(k for k in keys if k.rpartition(".")[0] == section)
    return f"{what}; known are {', '.join(known)}"


def explain(key: str, error: Mapping[str, Any]) -> str:
    """A wrong type or a broken limit as `key = value: rule; remedy`."""
    value, limits = error["input"], error.get("ctx", {})
    texts = {
        "int_type": "must be a whole number; write it without quotes, point or exponent (200_000 is fine)",
        "float_type": "must be a number; write it without quotes",
        "finite_number": "must be a finite number; give one",
        "bool_type": "must be true or false; write one of these without quotes",
        "string_type": 'must be text; write it in quotes ("...")',
        "path_type": 'must be a path; write it in quotes ("...")',
        "tuple_type": "must be an array; write [ ... ], or [[double brackets]] for an array of tables",
        "model_type": "must be a table; write [section] above its keys, or { key = value }",
    }
    bounds = {
        "greater_than_equal": ("ge", "must be at least {0}; raise it"),
        "greater_than": ("gt", "must be more than {0}; raise it"),
        "less_than_equal": ("le", "must be at most {0}; lower it"),
        "less_than": ("lt", "must be less than {0}; lower it"),
    }
    kind = error["type"]
    if kind in bounds:
        name, text = bounds[kind]
        rule = text.format(f"{limits[name]:g}")
    elif kind == "literal_error":
        choices = limits["expected"].replace("'", '"')
        guess = difflib.get_close_matches(str(value), re.findall(r'"([^"]+)"', choices), n=1)
        rule = f"must be {choices}; " + (f'did you mean "{guess[0]}"?' if guess else "choose one")
    else:
        rule = texts.get(kind) or f"{error['msg']}; see its description in pretrain/config/schema.py"
    return f"{key} = {_show(value)}: {rule}"


def _show(value: Any) -> str:
    """A value as it stands in a TOML file, cut to fit a line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(loc: Sequence[int | str]) -> str:
    """`("data", "train", 0, "prefix")` as `data.train[0].prefix`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _remove(tree: Any, loc: Sequence[int | str]) -> None:
    """Take one entry out of nested tables; an element of an array takes the whole array with it."""
    for depth, part in enumerate(loc):
        if depth == len(loc) - 1 or isinstance(loc[depth + 1], int):
            if isinstance(tree, dict):
                tree.pop(part, None)
            return
        tree = tree.get(part, {})


def _schema_keys(section: type[Section] = Config, prefix: str = "") -> dict[str, bool]:
    """Every dotted key of the schema -> whether it is a section."""
    return dict(_walk_schema(section, prefix))


def _walk_schema(section: type[Section], prefix: str) -> Iterator[tuple[str, bool]]:
    for name, field in section.model_fields.items():
        key = prefix + name
        nested = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)), None)
        yield key, nested is not None
        if nested is not None:
            yield from _walk_schema(nested, key + ".")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _nearest(key: str, keys: Mapping[str, bool]) -> str:
    """The real key that is most like `key`, or ""; the right name in the wrong section counts as very like."""
    plain = re.sub(r"\[\d+\]", "", key)

    def likeness(candidate: str) -> tuple[float, int]:
        whole = difflib.SequenceMatcher(None, plain, candidate).ratio()
        same_name = plain.rpartition(".")[2] == candidate.rpartition(".")[2]
        return max(whole, 0.9 * same_name), -candidate.count(".")

    best = max(keys, key=likeness)
    # difflib's own cutoff for "close" is 0.6; dotted keys share their section, so ask for more.
    return best if likeness(best)[0] >= 0.7 else ""
