"""Configuration keys of `[optim]`: the optimizers, their hyperparameters and defaults, and which keys each reads.

Defaults beyond AdamW's and Muon's usual ones are the settled values of a large tuning study of dense models of 130M to
1.2B parameters (arXiv 2509.02046); `pretrain plan` shows its values for the size nearest to a run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pretrain.config.base import Beta, Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section

Kind = Literal[
    "adamw",
    "nadamw",
    "mars",
    "cautious",
    "lion",
    "adam_mini",
    "sophia",
    "muon",
    "scion",
    "kron",
    "soap",
    "muonh",
    "adamh",
]
RuleName = Literal[Kind, "signum"]
"""How one tensor is updated; an optimizer uses one or several."""


class NewtonSchulzConfig(Section):
    """How momentum is orthogonalised."""

    newton_schulz_steps: PositiveInt = 5
    newton_schulz_dtype: Literal["float32", "bfloat16"] = "float32"
    newton_schulz_coefficients: Literal["keller_jordan", "polar_express", "deepseek_v4"] = "keller_jordan"
    newton_schulz_eps: PositiveFloat = 1e-7
    """Smallest Frobenius norm that is scaled up to one."""


class MuonConfig(NewtonSchulzConfig):
    """Muon on hidden matrices; everything else gets AdamW with the keys of [optim]."""

    lr: PositiveFloat | None = None
    """Learning rate of the Muon matrices (default: optim.lr, which suits scale = "moonshot")."""
    momentum: Beta = 0.95
    nesterov: bool = True
    scale: Literal["moonshot", "keller_jordan", "spectral"] = "moonshot"
    """Factor on the orthogonalised update: 0.2 sqrt(max(out, in)), so that AdamW's lr and decay carry over;
    sqrt(max(1, out/in)); or sqrt(out/in)."""


class ScionConfig(NewtonSchulzConfig):
    """Scion on hidden matrices: orthogonalised average of gradients. The sign of theirs elsewhere, at optim.lr."""

    lr: PositiveFloat | None = 8e-3
    """Learning rate of the matrices."""
    momentum: Beta = 0.95
    """Share of the average that stays each step."""
    scale: Literal["moonshot", "keller_jordan", "spectral"] = "keller_jordan"
    newton_schulz_steps: PositiveInt = 10


class MarsConfig(Section):
    """MARS: Adam on a gradient corrected by its change since the step before."""

    gamma: NonNegativeFloat = 0.025
    """Strength of the correction."""


class SoapConfig(Section):
    """SOAP on hidden matrices: Adam in the eigenbasis of Shampoo's preconditioners, block by block."""

    lr: PositiveFloat | None = None
    """Learning rate of the matrices (default: optim.lr)."""
    shampoo_beta: Beta = 0.95
    """Share of the preconditioners that stays each step."""
    block_size: PositiveInt = 256
    """Largest side of a block; blocks have the largest divisor of a matrix's side up to this."""
    every_steps: PositiveInt = 10
    """Steps between updates of the eigenbases."""


class KronConfig(Section):
    """Kron (PSGD with Kronecker factors) on hidden matrices, block by block."""

    lr: PositiveFloat | None = None
    """Learning rate of the matrices (default: optim.lr)."""
    preconditioner_lr: PositiveFloat = 0.2
    update_share: Fraction = 0.1
    """Share of steps that update the preconditioners, in the end."""
    full_steps: Count = 2000
    """Steps at the start of a run all of which update them; then the share falls as exp(-0.001 n)."""
    block_size: PositiveInt = 256
    normalize_gradients: bool = True
    """Whether every block's gradient is scaled to norm one first."""


class SophiaConfig(Section):
    """Sophia-H: momentum over an estimate of the Hessian's diagonal, clipped."""

    gamma: PositiveFloat = 0.0125
    every_steps: PositiveInt = 10
    """Steps between estimates of the curvature; each costs two more passes over the batch."""


class HyperballConfig(Section):
    """muonh, adamh: steps on the sphere of a matrix's initial norm; everything else gets AdamW at optim.lr."""

    lr: PositiveFloat = 0.02
    """Length of a step over the norm of the matrix."""


_MATRIX_SECTIONS = {"muon": ["muon"], "scion": ["scion"], "kron": ["kron"], "soap": ["soap"]}
SECTIONS: Mapping[str, list[str]] = {
    **{kind: [] for kind in get_args(Kind)},
    **_MATRIX_SECTIONS,
    "mars": ["mars"],
    "sophia": ["sophia"],
    "muonh": ["muon", "hyperball"],
    "adamh": ["hyperball"],
}
"""Subsections that a kind reads."""

_NOT_READ: Mapping[str, set[str]] = {"lion": {"eps"}, "scion": {"beta2", "eps"}}
_MUONH_NOT_READ = {"lr", "scale"}
"""Keys of [optim.muon] that are hyperball's matter in muonh."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "nadamw": {"lr": 4e-3, "beta1": 0.95, "beta2": 0.98, "eps": 1e-10},
    "mars": {"lr": 4e-3, "beta1": 0.95, "beta2": 0.98, "eps": 1e-25},
    "cautious": {"lr": 4e-3, "beta1": 0.98, "beta2": 0.98, "eps": 1e-15},
    "lion": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.7},
    "adam_mini": {"lr": 4e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-10},
    "sophia": {"lr": 2e-3, "beta1": 0.95, "beta2": 0.9, "eps": 1e-7},
    "scion": {"lr": 8e-4, "beta1": 0.98},
    "kron": {"lr": 1e-3, "beta1": 0.95, "beta2": 0.98, "eps": 1e-10, "weight_decay": 0.5},
    "soap": {"lr": 4e-3, "beta1": 0.95, "beta2": 0.99, "eps": 1e-10},
    "muonh": {"lr": 2e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-10, "weight_decay": 0.0},
    "adamh": {"lr": 4e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-10, "weight_decay": 0.0},
}
"""What a kind has where nothing is said, if it is not what AdamW has: the study's values for 520M parameters."""


class OptimConfig(Section):
    """The optimizer and its hyperparameters, gradient clipping and skipping."""

    kind: Kind = "adamw"
    lr: PositiveFloat = 3e-4
    """Peak learning rate. This and other defaults are AdamW's; each kind has its own, see DEFAULTS above."""
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay, multiplied by the current learning rate."""
    decay_embeddings: bool = False
    """Whether token embeddings decay (a tied output layer counts as one)."""
    decay_norms: bool = False
    """Whether norm gains decay."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm (0: no clipping)."""
    max_skipped_steps: Count = 10
    """Consecutive steps with a non-finite gradient that are skipped before the run gives up."""
    routes: dict[str, RuleName] = Field(default_factory=dict)
    """Patterns of tensor names -> update rule, where the kind's own choice is not wanted; the last match counts. For
    example { "*.router.weight" = "muon" }."""
    drop_other_state: bool = False
    """Whether to go on from a checkpoint of another kind of optimizer without its state, instead of refusing it."""
    muon: MuonConfig = MuonConfig()
    scion: ScionConfig = ScionConfig()
    mars: MarsConfig = MarsConfig()
    soap: SoapConfig = SoapConfig()
    kron: KronConfig = KronConfig()
    sophia: SophiaConfig = SophiaConfig()
    hyperball: HyperballConfig = HyperballConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**DEFAULTS.get(str(given.get("kind")), {}), **given}

    def unread(self) -> dict[str, set[str]]:
        """Keys that this kind of optimizer does not read: of `[optim]` itself under "", else by subsection."""
        sections = {name for name, field in OptimConfig.model_fields.items() if _is_subsection(field.annotation)}
        unread = {"": (sections - set(SECTIONS[self.kind])) | _NOT_READ.get(self.kind, set())}
        return unread | ({"muon": _MUONH_NOT_READ} if self.kind == "muonh" else {})

    @model_serializer(mode="wrap")
    def _without_unread(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written down has no keys that would be refused when it is read again."""
        values: dict[str, Any] = dump(self)
        for section, keys in self.unread().items():
            table = values.get(section, {}) if section else values
            for key in keys:
                table.pop(key, None)
        return values


def _is_subsection(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)
