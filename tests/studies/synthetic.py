"""Made-up results of a study, ordered as the papers on growth say."""

from __future__ import annotations

from pathlib import Path

from pretrain.config.load import load_config
from pretrain.data.baselines import Baselines
from pretrain.studies.arms import ARMS, Rates
from pretrain.studies.command import CONFIG_FILE, seed_configs
from pretrain.studies.report import Study
from pretrain.studies.results import Outcome, Twins

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3)

# Best peak learning rates.
RATES: Rates = {"small": 8e-3, "width": 7e-3, "depth": 6e-3, "experts": 5e-3}

# Final losses, the better the lower; gaps from arXiv 2602.02472 (table 1 and figure 2) times ten.
FINAL = {
    "small": 3.00,
    "width-scratch": 2.42,
    "width-scratch-short": 2.55,
    "width-full": 2.48,
    "width-asymmetric": 2.60,
    "width-copied": 2.88,
    "width-dropped": 2.89,
    "width-rewarm-all": 2.52,
    "width-zero-copy": 2.481,
    "width-random": 2.56,
    "depth-scratch": 2.30,
    "depth-scratch-short": 2.60,
    "depth-interpose-early": 2.40,
    "depth-stack-early": 2.401,
    "depth-interpose-late": 2.50,
    "depth-stack-late": 2.70,
    "experts-scratch": 2.50,
    "experts-noise": 2.60,
    "experts-plain": 2.601,
    "experts-exact": 2.80,
}


def losses_as_in_the_papers() -> dict[str, dict[int, float]]:
    """Arm -> seed -> loss. A seed moves all arms alike, and each a little by itself."""
    return {
        name: {seed: loss + 0.2 * seed + 0.001 * ((seed * (index + 1)) % 3) for seed in SEEDS}
        for index, (name, loss) in enumerate(FINAL.items())
    }


def synthetic_study() -> Study:
    """All arms with these losses."""
    base = load_config(ROOT / CONFIG_FILE)
    losses = losses_as_in_the_papers()

    def outcome(name: str, seed: int, *, grows: bool) -> Outcome:
        locked = name in ("width-copied", "width-dropped", "experts-exact")
        twins = {"decoder.layers.3.mlp.experts.linear_fc2.weight": Twins(1.0, 0.0) if locked else Twins(0.9, 0.4)}
        return Outcome(
            seed=seed,
            steps=base.total_steps,
            tokens=base.total_steps * base.batch.tokens_per_step,
            flops=2e12,
            loss=losses[name][seed],
            bits_per_byte=losses[name][seed] / 2,
            loss_before=3.5 if grows else None,
            loss_after=3.6 if grows else None,
            twins=twins if grows and not name.startswith("depth") else {},
        )

    return Study(
        base=base,
        configs=seed_configs(base, 1, Path("out"), rates=RATES),
        outcomes={arm.name: [outcome(arm.name, seed, grows=arm.grows) for seed in SEEDS] for arm in ARMS},
        sweep={size: {2.5e-3: 3.2, rate: 3.1, 2e-2: 3.3} for size, rate in RATES.items()},
        baselines=Baselines(unigram_nats_per_token=6.0, bigram_nats_per_token=4.0, bytes_per_token=2.7, tokens=100),
        command=["pretrain", "study", "growth", "--seeds", "3"],
        machine={"date": "2026-01-01"},
    )
