"""Samplers by name, made so that what they suggest depends on the study, not on the process."""

from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial

from placesearch.errors import InputError, did_you_mean
from placesearch.search.space import SearchSpace

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
"""Every sampler by its name on the command line, made from a seed."""

PLACEMENT = "placement"
"""Name of the trial attribute that holds the text of the placement."""

LAG = 7
"""A suggestion never depends on the last so many trials; so it is the same for one worker and for LAG + 1."""

ATTEMPTS = 20
"""How often a sampler may suggest a placement that was tried before, until an untried one is drawn at random."""


def sampler_named(name: str) -> Callable[[int], BaseSampler]:
    """Return what makes a sampler from a seed.

    Raises:
        InputError: If there is no such sampler.
    """
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler '{name}'{did_you_mean(name, SAMPLERS)}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


class _Earlier(optuna.Study):
    """A study as it looks to a sampler that may see only the trials before a position."""

    def __init__(self, study: optuna.Study, position: int) -> None:
        super().__init__(study_name=study.study_name, storage=study._storage, sampler=study.sampler)
        self._position = position

    def _get_trials(self, *arguments: Any, **options: Any) -> list[FrozenTrial]:
        return [trial for trial in super()._get_trials(*arguments, **options) if trial.number < self._position]


class UntriedSampler(BaseSampler):
    """Lets another sampler suggest, seeded anew for each trial number, and passes on what is untried and affordable.

    A suggestion over the budget loses blocks at random until it fits. A study that was interrupted, or run by several
    workers, gets the same suggestions as one that was not, and no candidate is trained twice.

    Args:
        make: Makes the inner sampler from a seed.
        seed: The study's seed.
        space: What there is to choose from.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, space: SearchSpace) -> None:
        self._make, self._seed, self._space = make, seed, space
        self._distributions = {site: CategoricalDistribution(texts) for site, texts in space.choices.items()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space, also after trials that lie outside of it."""
        return dict(self._distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Suggest a choice for each site. The space has to hold a placement that is untried."""
        earlier = _Earlier(study, trial.number - LAG)
        tried = {
            other.user_attrs[PLACEMENT]
            for other in study.get_trials(deepcopy=False)
            if PLACEMENT in other.user_attrs and other.number < trial.number
        }
        for attempt in range(ATTEMPTS):
            inner = self._make(derived_seed(self._seed, trial.number, attempt))
            inner.before_trial(earlier, trial)
            chosen = inner.sample_relative(earlier, trial, search_space)
            for site, distribution in search_space.items():
                if site not in chosen:
                    chosen[site] = inner.sample_independent(earlier, trial, site, distribution)
            chosen = self._space.trimmed(chosen, np.random.default_rng(derived_seed(self._seed, trial.number, attempt)))
            if str(self._space.placement(chosen)) not in tried:
                return chosen
        return self._any_untried(tried, derived_seed(self._seed, trial.number, ATTEMPTS))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: every choice is made by `sample_relative`."""
        raise KeyError(param_name)

    def _any_untried(self, tried: set[str], seed: int) -> dict[str, str]:
        random = np.random.default_rng(seed)
        shuffled = {site: random.permutation(texts).tolist() for site, texts in self._space.choices.items()}
        every = self._space.within_budget(shuffled)
        return next(chosen for chosen in every if str(self._space.placement(chosen)) not in tried)


def derived_seed(*parts: int) -> int:
    """Mix numbers into a seed of 32 bits, the same on every machine."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:4])
