"""Samplers by name, made so that what they suggest depends on the study, not on the process."""

import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from placesearch.placement import BlockSetting, Placement
from placesearch.search.evidence import Score
from placesearch.search.space import NONE, Added, SearchSpace
from placesearch.search.suggesting import Suggester
from placesearch.search.threads import ONE_BLAS_THREAD, ONE_OPENMP_THREAD

OF_OPTUNA: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "nsga3": lambda seed: _experimental(NSGAIIISampler, seed),
    "gp": lambda seed: _experimental(GPSampler, seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
"""Optuna's samplers by their names on the command line, made from a seed."""


def _experimental(make: Callable[..., BaseSampler], seed: int) -> BaseSampler:
    """Make a sampler without the warning that it is experimental; it is only taken if a user asks for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return make(seed=seed)


PLACEMENT = "placement"
"""Name of the trial attribute that holds the text of the placement."""

LAG = 7
"""On how many of the last trials a suggestion does not depend; so it is the same for one worker and for LAG + 1."""

SETTLED = 0.9
"""The front has settled when it is expected to reach this share of the best one's area above the plain network."""

SETTLED_EVERY, FEWEST_TO_SETTLE = 10, 20
"""Whether it has is asked every so many trials, from so many scores on."""

ATTEMPTS = 20
"""How often a sampler may suggest a placement that was tried before, until an untried one is drawn at random."""


def make_sampler(
    name: str,
    seed: int,
    space: SearchSpace,
    added: Added,
    references: Sequence[Placement],
    long_epochs: int | None = None,
    lag: int = LAG,
) -> BaseSampler:
    """Return a sampler whose suggestions depend on the study alone.

    Args:
        name: Its name.
        seed: The study's seed.
        space: What there is to choose from.
        added: What a block adds at a site to each cost that is an objective.
        references: Placements that are evaluated whether the space holds them or not.
        long_epochs: How long the longer trainings are; None if all are equally long.
        lag: On how many of the last trials a suggestion does not depend.

    Raises:
        InputError: If there is no such sampler.
    """
    if name == "additive":
        return AdditiveSampler(seed, space, added, references, long_epochs, lag)
    return UntriedSampler(OF_OPTUNA[name], seed, space, lag)


class _Earlier(optuna.Study):
    """A study as it looks to a sampler that may see only the trials before a position, and what the next ones evaluate.

    Those are shown as running, whatever has become of them. References that the space does not hold have no parameters
    and are not seen: Optuna's GP sampler stops at them.
    """

    def __init__(self, study: optuna.Study, position: int, running: Sequence[FrozenTrial]) -> None:
        super().__init__(study_name=study.study_name, storage=study._storage, sampler=study.sampler)
        self._position, self._shown_as_running = position, list(running)

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, states, use_cache)
        earlier = [trial for trial in trials if trial.number < self._position and trial.params]
        return earlier + (self._shown_as_running if states is None or TrialState.RUNNING in states else [])


class UntriedSampler(BaseSampler):
    """Lets another sampler suggest, seeded anew for each trial number, and passes on what is untried and affordable.

    A suggestion over the budget loses blocks at random until it fits. A study that was interrupted, or run by several
    workers, gets the same suggestions as one that was not, and no candidate is trained twice.

    Args:
        make: Makes the inner sampler from a seed.
        seed: The study's seed.
        space: What there is to choose from.
        lag: On how many of the last trials a suggestion does not depend.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, space: SearchSpace, lag: int = LAG) -> None:
        self._make, self._seed, self._space, self._lag = make, seed, space, lag
        self._distributions = {site: CategoricalDistribution(texts) for site, texts in space.choices.items()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space, also after trials that lie outside of it."""
        return dict(self._distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Suggest a choice for each site. The space has to hold a placement that is untried."""
        before = [
            (other.number, other.user_attrs[PLACEMENT])
            for other in study.get_trials(deepcopy=False)
            if PLACEMENT in other.user_attrs and other.number < trial.number
        ]
        tried, seen = {text for _, text in before}, trial.number - self._lag
        earlier = _Earlier(study, seen, self._running([text for number, text in before if number >= seen]))
        chosen: dict[str, str] = {}
        for attempt in range(ATTEMPTS):
            seed = derived_seed(self._seed, trial.number, attempt)
            with ONE_BLAS_THREAD, ONE_OPENMP_THREAD:
                suggested = self._suggested(self._make(seed), earlier, trial, search_space)
            last, chosen = chosen, self._space.trimmed(suggested, np.random.default_rng(seed))
            if str(self._space.placement(chosen)) not in tried:
                return chosen
            if chosen == last:  # as the GP sampler does, at seconds an attempt
                break
        return self._untried_near(chosen, tried, derived_seed(self._seed, trial.number, ATTEMPTS))

    def _running(self, placements: Sequence[str]) -> list[FrozenTrial]:
        """Return running trials of those placements that the space holds."""
        held = [self._space.chosen(Placement.parse(text)) for text in placements]
        return [
            optuna.trial.create_trial(
                state=TrialState.RUNNING, params=dict(chosen), distributions=dict(self._distributions)
            )
            for chosen in held
            if chosen is not None
        ]

    @staticmethod
    def _suggested(
        inner: BaseSampler, earlier: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return what the inner sampler suggests, site by site where it has no view on all of them."""
        inner.before_trial(earlier, trial)
        chosen = inner.sample_relative(earlier, trial, search_space)
        for site, distribution in search_space.items():
            if site not in chosen:
                chosen[site] = inner.sample_independent(earlier, trial, site, distribution)
        return chosen

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: every choice is made by `sample_relative`."""
        raise KeyError(param_name)

    def _untried_near(self, suggested: Mapping[str, str], tried: set[str], seed: int) -> dict[str, str]:
        """Return an untried placement that differs from a suggestion only at the last sites of a random order."""
        random = np.random.default_rng(seed)
        first = {}
        for site in random.permutation(list(self._space.choices)).tolist():
            others = [text for text in self._space.choices[site] if text != suggested[site]]
            first[site] = [suggested[site], *random.permutation(others).tolist()]
        every = self._space.within_budget(first)
        return next(chosen for chosen in every if str(self._space.placement(chosen)) not in tried)


class AdditiveSampler(BaseSampler):
    """Our own sampler, see `placesearch.search.suggesting`.

    Args:
        seed: The study's seed.
        space: What there is to choose from.
        added: What a block adds at a site to each cost that is an objective.
        references: Placements that are evaluated whether the space holds them or not.
        long_epochs: How long the longer trainings are; None if all are equally long.
        lag: On how many of the last trials a suggestion does not depend.
    """

    def __init__(
        self,
        seed: int,
        space: SearchSpace,
        added: Added,
        references: Sequence[Placement],
        long_epochs: int | None = None,
        lag: int = LAG,
    ) -> None:
        self._seed, self._space, self._added, self._long_epochs, self._lag = seed, space, added, long_epochs, lag
        self._references = len(references)
        self._distributions = {site: CategoricalDistribution(texts) for site, texts in space.choices.items()}
        choices = {
            site: [None if text == NONE else BlockSetting.parse(text) for text in texts]
            for site, texts in space.choices.items()
        }
        costs = {
            site: [added(site, setting) for setting in of_site if setting is not None]
            for site, of_site in choices.items()
        }
        limited = {
            site: [space.added[site][text] for text in texts if text != NONE]
            for site, texts in (space.choices.items() if space.room else ())
        }
        self._suggester = Suggester(choices, _by_cost(costs), references, space.room, _by_cost(limited))
        self._known: dict[str, tuple[Placement, tuple[float, ...]]] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole space."""
        return dict(self._distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Suggest a choice for each site. The space has to hold a placement that is untried."""
        scores, tried, waiting = self._seen(study, trial.number)
        random = np.random.default_rng(derived_seed(self._seed, trial.number))
        position = trial.number - self._references
        with ONE_BLAS_THREAD:
            suggested = self._suggester.suggest(scores, tried, waiting, position, random)
        return dict(self._space.chosen(suggested) or {})

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Refuse: every choice is made by `sample_relative`."""
        raise KeyError(param_name)

    def settled(self, study: optuna.Study, position: int) -> bool:
        """Tell whether the front has settled, as far as the trials tell that a suggestion for a position may use."""
        scores, tried, _ = self._seen(study, position)
        if len(scores) < FEWEST_TO_SETTLE or position % SETTLED_EVERY:
            return False
        with ONE_BLAS_THREAD:
            return self._suggester.reached(scores, tried, derived_seed(self._seed, position)) >= SETTLED

    def _seen(
        self, study: optuna.Study, position: int
    ) -> tuple[list[Score], dict[Placement, Sequence[float]], set[Placement]]:
        """Return the scores that a suggestion may use, all that was tried before it with its costs, and the last ones.

        The last ones are those that may still be running, whether they are or not.
        """
        scores: list[Score] = []
        tried: dict[Placement, Sequence[float]] = {}
        last: set[Placement] = set()
        for other in study.get_trials(deepcopy=False):
            if other.number >= position or PLACEMENT not in other.user_attrs:
                continue
            placement, costs = self._read(other.user_attrs[PLACEMENT])
            tried[placement] = costs
            if other.number >= position - self._lag:
                last.add(placement)
            elif other.state in (TrialState.COMPLETE, TrialState.PRUNED):
                seen = other.user_attrs
                brief = self._long_epochs is not None and seen["epochs"] < self._long_epochs
                accuracy = seen["val_accuracy" if other.state == TrialState.COMPLETE else "forecast"]
                scores.append(Score(placement, accuracy, seen["seed"], brief))
        return scores, tried, last

    def _read(self, text: str) -> tuple[Placement, tuple[float, ...]]:
        """Return a placement and what it adds to each cost that is an objective."""
        if text not in self._known:
            placement = Placement.parse(text)
            added = np.array([self._added(site, setting) for site, setting in placement.items()])
            self._known[text] = placement, tuple(added.sum(0).tolist()) if placement else (0.0,) * self._suggester.costs
        return self._known[text]


def _by_cost(added: Mapping[str, Sequence[Sequence[float]]]) -> list[list[np.ndarray]]:
    """Turn what choices add, by site and without `none`, into one array a site for each cost."""
    arrays = [np.array([[0.0] * len(of_site[0]), *of_site]) for of_site in added.values()]
    return [[of_site[:, index] for of_site in arrays] for index in range(arrays[0].shape[1] if arrays else 0)]


def derived_seed(*parts: int) -> int:
    """Mix numbers into a seed of 32 bits, the same on every machine."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:4])
