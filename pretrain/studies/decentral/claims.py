"""What is claimed of decentralized training, and whether the numbers here agree.

The claims of arXiv 2602.11543 (SPES) and their figures are known second-hand: quality like that of centralized
training, an average score of 50.95 with merging against 48.99 without, 35 GB of memory against 55 GB, up to a third
less communication. The others are what this implementation promises.
"""

from __future__ import annotations

from pretrain.studies.decentral.arms import CENTRAL, FOUR, INTERVALS, LOST, SITES
from pretrain.studies.decentral.results import Study
from pretrain.studies.evidence import Claim, Evidence, Judged, judge_claims

EQUAL_SHARE = 0.01
"""An arm counts as good as another one if its loss is above the other's by less than this share of the central run's.
A choice, made when some of the runs had ended."""
PLAN_SHARE = 0.01
"""By how much what is measured may differ from the plan."""
OFTEN, RARELY = INTERVALS


def judge(study: Study) -> tuple[list[Judged[Study]], list[Judged[Study]]]:
    """The verdicts on the paper's claims, and on our own."""
    return judge_claims(PAPER, study), judge_claims(OWN, study)


def _less(study: Study, first: str, second: str) -> Evidence:
    """By how much the first arm's loss is below the second's, by seed; nothing where one was not trained."""
    one, other = study.by_seed(first), study.by_seed(second)
    return {seed: other[seed] - one[seed] for seed in sorted(one.keys() & other.keys())}


def _saved(study: Study, first: str, second: str, figure: str) -> Evidence:
    """Share of a figure of the second arm that the first does without, by seed."""
    one, other = study.by_seed(first, figure), study.by_seed(second, figure)
    return {seed: 1 - one[seed] / other[seed] for seed in sorted(one.keys() & other.keys())}


def _as_good(study: Study, first: str, second: str) -> Evidence:
    """What is left of the margin when the first arm's loss is compared with the second's, by seed."""
    central = study.by_seed(CENTRAL)
    return {seed: EQUAL_SHARE * central[seed] + lead for seed, lead in _less(study, first, second).items()}


def _every_interval(study: Study, method: str, reference: str) -> list[Evidence]:
    """Whether SPES, or SPES with merging, is as good as `reference`, at every interval between rounds."""
    return [_as_good(study, f"{method}-{steps}", reference.format(steps)) for steps in INTERVALS]


def _off_plan(study: Study, measured: str, planned: str) -> Evidence:
    """What is left of the margin when the arm that is furthest from the plan is compared with it, by seed."""
    found: dict[int, float] = {}
    for outcomes in study.outcomes.values():
        for one in outcomes:
            plan = getattr(one, planned)
            if plan:
                share = abs(getattr(one, measured) / plan - 1)
                found[one.seed] = min(found.get(one.seed, PLAN_SHARE), PLAN_SHARE - share)
    return found


def _disagreement(study: Study) -> Evidence:
    """The largest over all arms, by seed."""
    return {
        seed: max(one.disagreement for found in study.outcomes.values() for one in found if one.seed == seed)
        for seed in study.seeds
    }


PAPER: tuple[Claim[Study], ...] = (
    Claim(
        "SPES reaches the quality of central training",
        f"{EQUAL_SHARE:.0%} of the central loss less the gap of SPES with merging to it, H {OFTEN}; H {RARELY}",
        lambda study: _every_interval(study, "merge", CENTRAL),
    ),
    Claim(
        "merging helps",
        f"SPES less SPES with merging, H {OFTEN}; H {RARELY}",
        lambda study: [_less(study, f"merge-{steps}", f"spes-{steps}") for steps in INTERVALS],
    ),
    Claim(
        "SPES reaches the quality of sites that train full replicas",
        f"{EQUAL_SHARE:.0%} of the central loss less what SPES with merging is above full replicas that are averaged "
        f"as well, H {OFTEN}; H {RARELY}",
        lambda study: _every_interval(study, "merge", "average-{}"),
    ),
    Claim(
        "SPES needs less memory than full replicas",
        "share of the weights and optimizer state of a DiLoCo site that an SPES site does without",
        lambda study: [_saved(study, f"spes-{OFTEN}", f"diloco-{OFTEN}", "state_bytes")],
    ),
    Claim(
        "SPES sends less than full replicas",
        f"share of the bytes of a round that an SPES site does not send, H {OFTEN}",
        lambda study: [_saved(study, f"spes-{OFTEN}", f"diloco-{OFTEN}", "bytes_per_round")],
    ),
    Claim(
        "Nesterov momentum as the outer optimizer beats the mean (arXiv 2311.08105)",
        f"full replicas that are averaged less DiLoCo, H {OFTEN}; H {RARELY}",
        lambda study: [_less(study, f"diloco-{steps}", f"average-{steps}") for steps in INTERVALS],
    ),
)

OWN: tuple[Claim[Study], ...] = (
    Claim(
        "fewer rounds cost quality",
        f"H {RARELY} less H {OFTEN}: DiLoCo; SPES",
        lambda study: [_less(study, f"{kind}-{OFTEN}", f"{kind}-{RARELY}") for kind in ("diloco", "spes")],
    ),
    Claim(
        "more sites cost quality",
        f"SPES on four sites less on {SITES}, H {OFTEN}",
        lambda study: [_less(study, f"spes-{OFTEN}", FOUR)],
    ),
    Claim(
        "a site that is lost and comes back costs little",
        f"{EQUAL_SHARE:.0%} of the central loss less what the loss is above that of the run that loses no site",
        lambda study: [_as_good(study, LOST, FOUR)],
    ),
    Claim(
        "all sites end with one model",
        "largest difference of the final losses of two sites",
        lambda study: [_disagreement(study)],
        margin=lambda study: 1e-4,
    ),
    Claim(
        "a site keeps, and sends, as many bytes as the plan says",
        f"{PLAN_SHARE:.0%} less the largest difference of all arms: state; bytes of a round",
        lambda study: [
            _off_plan(study, "state_bytes", "planned_state_bytes"),
            _off_plan(study, "bytes_per_round", "planned_bytes_per_round"),
        ],
    ),
)
