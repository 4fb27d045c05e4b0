"""The Triton expert layer: its numbers in Triton's interpreter, and its machine code, both without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.triton_process import run_cases

pytest.importorskip("triton", reason="Triton is not installed")
FOLDER = Path(__file__).parent
NUMBERS = FOLDER / "triton_experts_cases.py"
MACHINE_CODE = FOLDER / "triton_compile_cases.py"

# Before any kernel is launched, change arguments of all launches that have them.
CHANGE_ARGUMENTS = """
from dataclasses import replace
from pretrain_kernels.triton_support import Launch
run = Launch.run
def changed(launch):
    new = {name: value for name, value in CHANGES.items() if name in launch.arguments}
    run(replace(launch, arguments={**launch.arguments, **new}))
Launch.run = changed
"""


def test_numbers_in_the_interpreter(tmp_path: Path) -> None:
    results = run_cases(NUMBERS, tmp_path, interpret=True)
    assert len(results) > 35
    assert not {name: message for name, message in results.items() if message}


def test_wrong_numbers_are_noticed(tmp_path: Path) -> None:
    """Without what the interpreter needs for bf16, the mask of experts that train, and adding to main_grad."""
    first = "CHANGES = {'UPCAST': False, 'trainable': None, 'ACCUMULATE': False}" + CHANGE_ARGUMENTS
    right = "test_equals_fp64[grouped-torch.float32]"
    wrong = {
        "test_equals_fp64[grouped-torch.bfloat16]",
        "test_frozen_experts_have_no_weight_gradient_and_pass_gradients_on",
        "test_main_grad_collects_two_micro_batches",
    }
    only = "frozen or main_grad or (equals_fp64 and grouped and not float16) or (equals_fp64 and grouped and bfloat16)"
    results = run_cases(NUMBERS, tmp_path, interpret=True, only=only, first=first)
    assert {name for name, message in results.items() if message} == wrong
    assert results[right] == ""


def test_machine_code(tmp_path: Path) -> None:
    """No spills, tensor-core instructions, bulk loads, shared memory within the limit; a bad tile is noticed."""
    results = run_cases(MACHINE_CODE, tmp_path, interpret=False)
    assert len(results) == 10
    assert not {name: message for name, message in results.items() if message}
