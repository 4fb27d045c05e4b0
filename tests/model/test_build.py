"""What cannot be built says so in one line."""

from __future__ import annotations

import pytest

from pretrain.errors import ConfigError
from pretrain.model.build import choose_backend
from pretrain.model.native import NativeBackend
from tests.helpers.configs import DENSE, make_config


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_context_parallelism_needs_transformer_engine(backend: str) -> None:
    config = make_config(DENSE, {"model.backend": backend, "parallel.context": 2})
    with pytest.raises(ConfigError) as error:
        choose_backend(config.model, config.parallel)
    (problem,) = error.value.problems
    assert problem.startswith("parallel.context = 2: needs")
    assert "\n" not in problem
    assert isinstance(choose_backend(config.model, make_config(DENSE).parallel), NativeBackend)


def test_missing_transformer_engine() -> None:
    config = make_config(DENSE, {"model.backend": "transformer_engine"})
    with pytest.raises(ConfigError, match="not installed here"):
        choose_backend(config.model, config.parallel)
