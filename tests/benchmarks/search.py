"""Which search strategy finds the best placements? Simulated landscapes with known truth under noise.

Truth: accuracy in points above the plain network, for each choice of block and settings at 8, 16 or 50 sites, standard
deviation 0.15 points over random placements; an observed score adds noise of one or two times that. Six kinds of
landscape, each of them also with a biased brief score at a quarter of the cost (`+brief`), and with one whose bias is
2.5 times as large (`+far`). Cost is the exact number of parameters. Every strategy is given the references, then
suggests; what it trained is turned into a front by each recommendation. Scores are the true hypervolume of that front,
as a share of the best there is, and the true regret of the pick. Rows are added to `reports/benchmarks/search.csv` one
run after the other, so that the benchmark goes on where it was stopped; to run something again, delete its rows.
`reports/benchmarks/search.md` is written from all of them.

    python tests/benchmarks/search.py --minutes 60 --processes 2
    python tests/benchmarks/search.py --minutes 10 --strategies random,nsga2 --sites 8 --seeds 5
    python tests/benchmarks/search.py                  write the report again

`--keep FOLDER` keeps the trials of each run there, so that a changed recommendation needs no new runs.
"""

import argparse
import csv
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np
import optuna
import pandas as pd
import scipy
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from scipy.stats import wilcoxon

from placesearch.models.blocks import hidden_channels
from placesearch.placement import BlockSetting, Placement
from placesearch.search.effects import Model
from placesearch.search.evidence import Evidence, Score, Vocabulary
from placesearch.search.findings import REACH
from placesearch.search.samplers import LAG, SETTLED
from placesearch.search.suggesting import Suggester, long_number

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
SCORES = REPORTS / "search.csv"

# ---------------------------------------------------------------- what there is to choose, and what it costs

SETTINGS = [BlockSetting("se", r) for r in (4, 8, 16)] + [
    BlockSetting("cbam", r, k) for r in (4, 8, 16) for k in (3, 7)
]
TEXTS = ("none", *map(str, SETTINGS))
"""The choices at every site; elsewhere here a choice is its position in this list."""

BLOCK = np.array([0, *({"se": 1, "cbam": 2}[setting.block] for setting in SETTINGS)])
REDUCTION = np.array([0, *({4: 1, 8: 2, 16: 3}[setting.reduction or 0] for setting in SETTINGS)])
KERNEL = np.array([0, *({None: 0, 3: 1, 7: 2}[setting.kernel_size] for setting in SETTINGS)])
"""Block, reduction and kernel size of each choice as numbers; 0 is none."""

Choices = dict[str, str]
"""What stands at each site, as text; `none` included."""


def params_of(setting: BlockSetting, channels: int) -> int:
    """Count the parameters of SE or CBAM by the formulas in their docstrings."""
    hidden = hidden_channels(channels, setting.reduction or 1)
    window = 2 * setting.kernel_size**2 + 1 if setting.kernel_size else 0
    return 2 * channels * hidden + hidden + channels + window


@dataclass(frozen=True)
class Space:
    """What a strategy or recommendation may know of a landscape.

    Args:
        sites: Names of the sites, in the order in which data pass them.
        params: Parameters that each choice adds at each site, (sites, 10).
        units: What one score costs, by fidelity, in units of the budget.
    """

    sites: tuple[str, ...]
    params: np.ndarray
    units: dict[str, int]

    @property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """The texts to choose from at each site; the first is `none`."""
        return dict.fromkeys(self.sites, TEXTS)

    @property
    def cheapest(self) -> str:
        """The fidelity that costs least."""
        return min(self.units, key=lambda name: self.units[name])

    @property
    def dearest(self) -> int:
        """Parameters of the dearest placement."""
        return int(self.params.max(axis=1).sum())

    def matrix(self, placements: Sequence[Choices]) -> np.ndarray:
        """Turn placements into positions of choices, (n, sites)."""
        position = {text: index for index, text in enumerate(TEXTS)}
        rows = [[position[chosen[site]] for site in self.sites] for chosen in placements]
        return np.array(rows, dtype=np.int64).reshape(-1, len(self.sites))

    def texts(self, row: Sequence[int]) -> Choices:
        """Turn the positions of one placement back into texts."""
        return {site: TEXTS[index] for site, index in zip(self.sites, row, strict=True)}

    def cost(self, matrix: np.ndarray) -> np.ndarray:
        """Return the parameters that placements add, (n,)."""
        return self.params[np.arange(len(self.sites)), matrix].sum(axis=1)

    def references(self) -> list[Choices]:
        """List what every strategy evaluates first: plain, SE and CBAM everywhere, CBAM in the last stage."""
        return [
            dict.fromkeys(self.sites, "none"),
            dict.fromkeys(self.sites, "se(r=16)"),
            dict.fromkeys(self.sites, "cbam(r=16,k=7)"),
            {site: "cbam(r=16,k=7)" if site.startswith("layer4") else "none" for site in self.sites},
        ]


def make_space(sites: int, *, brief: bool) -> Space:
    """Build the space of a network of four stages with 64, 128, 256 and 512 channels."""
    stages = [4 * index // sites for index in range(sites)]
    names = tuple(f"layer{stage + 1}.{stages[:index].count(stage)}.bn2" for index, stage in enumerate(stages))
    params = np.array([[0, *(params_of(setting, 64 * 2**stage) for setting in SETTINGS)] for stage in stages])
    return Space(names, params, {"long": 4, "brief": 1} if brief else {"long": 1})


# ---------------------------------------------------------------- the truth

SIGNAL = 0.15
"""Standard deviation of the truth over random placements, in points."""

PLAIN = {"long": 90.0, "brief": 65.0}
"""Expected score of the plain network in points, by fidelity."""

BRIEF_SCALE = 0.7
"""How much of a true difference is left in the brief score."""

BRIEF_RISE = 4.0
"""What blocks everywhere add to the brief score by mere fast learning, in units of SIGNAL, on average."""

FAR = 2.5
"""How many times as large the bias of a brief score is on `+far`."""

KINDS = ("additive", "interaction20", "interaction50", "saturating", "deceptive", "concentrated")
LANDSCAPES = tuple(kind + brief for kind in KINDS for brief in ("", "+brief", "+far"))
SITES = (8, 16, 50)
NOISES = (1, 2)
"""Standard deviation of the noise in units of SIGNAL."""

PROBABILITIES = np.array([1 / 2, 1 / 6, 1 / 3])
"""How often a site of a random placement has none, SE, CBAM."""


def random_placements(number: int, sites: int, random: np.random.Generator) -> np.ndarray:
    """Draw placements: at each site `none` with probability 1/2, else any other choice."""
    drawn = random.integers(1, len(TEXTS), size=(number, sites))
    return np.where(random.random((number, sites)) < 0.5, 0, drawn)


@dataclass(frozen=True)
class Landscape:
    """A known truth.

    Args:
        space: What there is to choose from.
        main: Effect of each choice at each site in points, (sites, 10); zero for `none`.
        pairs: Effect of two blocks at two sites in points, (sites, 3, sites, 3), symmetric; None without.
        bend: Where gains level off, in points: a sum z > 0 counts as bend * tanh(z / bend); None for straight ones.
        bias: What each block at each site adds to the brief score alone, in points, (sites, 3).
    """

    space: Space
    main: np.ndarray
    pairs: np.ndarray | None = None
    bend: float | None = None
    bias: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def sums(self, matrix: np.ndarray) -> np.ndarray:
        """Return the effects of placements added up, before they level off; the plain network has 0."""
        total = self.main[np.arange(len(self.main)), matrix].sum(axis=1)
        if self.pairs is None:
            return total
        shown = _one_hot(np.vstack([np.zeros_like(matrix[:1]), matrix]))
        flat = self.pairs.reshape(shown.shape[1], shown.shape[1])
        pairwise = 0.5 * ((shown @ flat) * shown).sum(axis=1)
        return total + pairwise[1:] - pairwise[0]

    def bent(self, sums: np.ndarray) -> np.ndarray:
        """Let sums of effects level off."""
        return sums if self.bend is None else np.where(sums > 0, self.bend * np.tanh(sums / self.bend), sums)

    def gains(self, matrix: np.ndarray) -> np.ndarray:
        """Return the true accuracy of placements above the plain network, in points, (n,)."""
        return self.bent(self.sums(matrix))

    def expected(self, matrix: np.ndarray, fidelity: str) -> np.ndarray:
        """Return the score of placements without its noise, in points, (n,)."""
        if fidelity == "long":
            return PLAIN["long"] + self.gains(matrix)
        own = self.bias[np.arange(len(self.main)), BLOCK[matrix]].sum(axis=1)
        return PLAIN["brief"] + BRIEF_SCALE * self.gains(matrix) + own

    def truth(self, placements: Sequence[Choices]) -> np.ndarray:
        """Return the true (long) accuracy of placements in points, (n,)."""
        return self.expected(self.space.matrix(placements), "long")


def _one_hot(matrix: np.ndarray) -> np.ndarray:
    """Show which block stands where, (n, sites * 3)."""
    return np.eye(3)[BLOCK[matrix]].reshape(len(matrix), -1)


def seed_of(*parts: object) -> int:
    """Turn anything with a stable text into a seed of 32 bits."""
    return crc32(" ".join(map(str, parts)).encode())


def make_landscape(name: str, sites: int, seed: int) -> Landscape:
    """Draw a landscape.

    Main effects are hierarchical: at each site a block's effect (common mean of the block, part of the site, part of
    block and site), small parts for reduction and kernel size. They are drawn again until the best of them add up to
    at least SIGNAL, so that there is something to find. With and without `+brief`
    or `+far`, and at any noise, truths are equal.

    `interactionN`: N % of the variance are purely pairwise terms between the blocks at all pairs of sites (they
    average to zero over either site's random choices). `saturating`: gains level off at half of what the best
    main effects add up to. `deceptive`: a third of the sites is good one by one, bad together; a third slightly bad one
    by one, the best together. `concentrated`: all but two sites have no effect.

    Args:
        name: One of LANDSCAPES.
        sites: Number of sites.
        seed: Which of the many.
    """
    kind, _, brief = name.partition("+")
    random = np.random.default_rng(seed_of(kind, sites, seed))
    order = random.permutation(sites)
    main = _main_effects(kind, order, random)
    while np.maximum(main.max(axis=1), 0).sum() < _spread(main) or not main.any():
        main = _main_effects(kind, order, random)
    pairs = None
    if kind.startswith("interaction"):
        share = int(kind.removeprefix("interaction")) / 100
        raw = _pure_pairs(sites, random)
        sample = random_placements(20_000, sites, np.random.default_rng(0))
        nothing = Landscape(make_space(sites, brief=False), np.zeros_like(main), raw)
        main = main / _spread(main) * np.sqrt(1 - share)
        pairs = raw / nothing.sums(sample).std() * np.sqrt(share)
    if kind == "deceptive":
        pairs = _deceptive_pairs(order)
    bend = np.maximum(main.max(axis=1), 0).sum() / 2 if kind == "saturating" else None

    space = make_space(sites, brief=bool(brief))
    raw_truth = Landscape(space, main, pairs, bend)
    sample = random_placements(20_000, sites, np.random.default_rng(1))
    unit = SIGNAL / raw_truth.gains(sample).std()
    own = np.concatenate([np.zeros((sites, 1)), random.normal(size=(sites, 2))], axis=1)
    own *= SIGNAL / own[np.arange(sites), BLOCK[sample]].sum(axis=1).std()
    own[:, 1:] += BRIEF_RISE * SIGNAL * random.uniform(0.5, 1.5, size=2) / sites
    own *= FAR if brief == "far" else 1
    return Landscape(
        space, unit * main, None if pairs is None else unit * pairs, None if bend is None else unit * bend, own
    )


def _spread(main: np.ndarray) -> float:
    """Return the standard deviation of main effects over random placements."""
    mean = main[:, 1:].mean(axis=1) / 2
    return float(np.sqrt(((main[:, 1:] ** 2).mean(axis=1) / 2 - mean**2).sum()))


def _main_effects(kind: str, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
    sites = len(order)
    of_block = random.normal(0.2, 0.2, size=2) + random.normal(0, 0.7, size=(sites, 1))
    of_block = of_block + random.normal(0, 0.7, size=(sites, 2))
    if kind == "deceptive":  # alone, good in the first third, slightly bad in the second
        third = (sites + 1) // 3
        of_block[order[:third]] = random.uniform(0.7, 1.3, size=(third, 2))
        of_block[order[third : 2 * third]] = random.uniform(-0.4, -0.2, size=(third, 2))
    small = 0.1 if kind == "deceptive" else 0.25  # small enough there to keep the sign
    of_reduction = random.normal(0, small, size=(sites, 2, 3))
    of_kernel = random.normal(0, small, size=(sites, 2))
    main = np.zeros((sites, len(TEXTS)))
    for index in range(1, len(TEXTS)):
        block = BLOCK[index] - 1
        main[:, index] = of_block[:, block] + of_reduction[:, block, REDUCTION[index] - 1]
        if KERNEL[index]:
            main[:, index] += of_kernel[:, KERNEL[index] - 1]
    if kind == "concentrated":
        main[order[2:]] = 0
    return main


def _pure_pairs(sites: int, random: np.random.Generator) -> np.ndarray:
    """Draw pairwise terms that average to zero over the block at either site."""
    centre = np.eye(3) - PROBABILITIES  # rows: a block against the average
    pairs = random.normal(size=(sites, 3, sites, 3))
    pairs = np.einsum("ab,ibjc,dc->iajd", centre, pairs, centre)
    pairs = pairs + pairs.transpose(2, 3, 0, 1)
    pairs[np.arange(sites), :, np.arange(sites), :] = 0
    return pairs


def _deceptive_pairs(order: np.ndarray) -> np.ndarray:
    """Let the first third of the sites hurt each other, the second help each other, whatever the blocks."""
    sites, third = len(order), (len(order) + 1) // 3
    strength = np.zeros((sites, sites))
    strength[np.ix_(order[:third], order[:third])] = -2.5 / (third - 1)
    strength[np.ix_(order[third : 2 * third], order[third : 2 * third])] = 3.2 / (third - 1)
    np.fill_diagonal(strength, 0)
    present = np.array([0.0, 1.0, 1.0])
    return np.einsum("ij,a,b->iajb", strength, present, present)


# ---------------------------------------------------------------- the best front there is


class Front(NamedTuple):
    """Placements that no other one dominates, by rising cost.

    Args:
        matrix: Positions of choices, (n, sites).
        gains: Accuracy above plain in points, (n,).
        costs: Parameters above plain, (n,).
    """

    matrix: np.ndarray
    gains: np.ndarray
    costs: np.ndarray


def hypervolume(gains: np.ndarray, costs: np.ndarray, dearest: float) -> float:
    """Return the area between a front and the reference point (plain accuracy, cost of the dearest placement).

    Cost is linear. What is below the plain network adds nothing.

    Args:
        gains: Accuracy above plain in points.
        costs: Parameters above plain.
        dearest: Parameters of the dearest placement above plain.

    Returns:
        Points times parameters.
    """
    order = np.lexsort((-gains, costs))
    height = np.maximum.accumulate(np.maximum(gains[order], 0.0))
    width = np.diff(np.append(costs[order], dearest))
    return float((height * width).sum())


def _pareto(gains: np.ndarray, costs: np.ndarray, dearest: float, keep: int) -> np.ndarray:
    """Return positions of the front by rising cost; if it is long, only the best in each of `keep` slices of cost."""
    order = np.lexsort((-gains, costs))
    before = np.concatenate([[-np.inf], np.maximum.accumulate(gains[order])[:-1]])
    order = order[gains[order] > before]
    if len(order) > keep:
        part = (costs[order] * keep / dearest).astype(int)
        order = order[np.append(part[1:] != part[:-1], True)]
    return order


def additive_front(main: np.ndarray, space: Space, keep: int = 4000) -> Front:
    """Return the front of a sum of effects: exact, but for thinning to `keep` slices of cost, by merging site by site.

    Every member is real: nothing of its gain or cost is rounded.
    """
    front = Front(np.zeros((1, len(main)), dtype=np.int64), np.zeros(1), np.zeros(1))
    for site, (effects, params) in enumerate(zip(main, space.params, strict=True)):
        gains = (front.gains[:, None] + effects).ravel()
        costs = (front.costs[:, None] + params).ravel()
        best = _pareto(gains, costs, space.dearest, keep)
        matrix = front.matrix[best // len(TEXTS)]
        matrix[:, site] = best % len(TEXTS)
        front = Front(matrix, gains[best], costs[best])
    return front


def searched_front(landscape: Landscape, seed: int = 0, weights: int = 40, starts: int = 20, keep: int = 1500) -> Front:
    """Return a strong approximation of the front where pairs of sites interact.

    From the front of the main effects and from random placements, sparse to full, single choices are changed to the
    best of gain - weight * cost, for many weights, until nothing improves. From the front of all that, single choices
    of every member are changed in every way as long as the front grows.
    """
    space, sites = landscape.space, len(landscape.main)
    random = np.random.default_rng(seed)
    guess = additive_front(landscape.main, space, keep)
    price = np.concatenate([[0.0], np.geomspace(0.01, 300, weights - 1)])
    price = price * max(float(guess.gains.max()), SIGNAL) / space.dearest
    full = np.linspace(0, 1, starts)[:, None, None]
    drawn = random.integers(1, len(TEXTS), size=(starts, weights, sites))
    matrix = np.where(random.random(drawn.shape) < full, drawn, 0).reshape(-1, sites)
    price = np.tile(price, starts)
    for _ in range(30):
        before = matrix.copy()
        for site in random.permutation(sites):
            values = _changes(landscape, matrix, site)
            matrix[:, site] = (values - price[:, None] * space.params[site]).argmax(axis=1)
        if (matrix == before).all():
            break
    matrix = np.unique(np.vstack([matrix, guess.matrix, np.zeros_like(matrix[:1])]), axis=0)
    front = _front_of(landscape, matrix, keep)
    for _ in range(40):
        reached = hypervolume(front.gains, front.costs, space.dearest)
        front = _with_neighbours(landscape, front, keep)
        if hypervolume(front.gains, front.costs, space.dearest) < reached * (1 + 1e-6):
            break
    return front


def _changes(landscape: Landscape, matrix: np.ndarray, site: int) -> np.ndarray:
    """Return what each choice at a site would contribute, (n, 10), up to a constant for each placement."""
    sites = len(landscape.main)
    pairs = landscape.pairs.reshape(sites, 3, sites * 3)[site]  # type: ignore[union-attr]
    return landscape.main[site] + (_one_hot(matrix) @ pairs.T)[:, BLOCK]


def _front_of(landscape: Landscape, matrix: np.ndarray, keep: int) -> Front:
    gains, costs = landscape.sums(matrix), landscape.space.cost(matrix).astype(float)
    best = _pareto(gains, costs, landscape.space.dearest, keep)
    return Front(matrix[best], gains[best], costs[best])


def _with_neighbours(landscape: Landscape, front: Front, keep: int) -> Front:
    """Add all changes of a single choice of all members and return the front."""
    matrix, gains, costs = front
    number, sites = matrix.shape
    flat = landscape.pairs.reshape(sites * 3, sites * 3)  # type: ignore[union-attr]
    values = landscape.main + (_one_hot(matrix) @ flat).reshape(number, sites, 3)[:, :, BLOCK]
    now = np.take_along_axis(values, matrix[:, :, None], axis=2)
    params = landscape.space.params
    now_params = params[np.arange(sites), matrix][:, :, None]
    new_gains = (gains[:, None, None] + values - now).ravel()
    new_costs = (costs[:, None, None] + params - now_params).ravel()
    best = _pareto(np.append(new_gains, gains), np.append(new_costs, costs), landscape.space.dearest, keep)
    changed = best < len(new_gains)
    member, site, choice = np.unravel_index(np.where(changed, best, 0), values.shape)
    chosen = matrix[np.where(changed, member, best - len(new_gains))]
    rows = np.flatnonzero(changed)
    chosen[rows, site[rows]] = choice[rows]
    return Front(chosen, landscape.sums(chosen), landscape.space.cost(chosen).astype(float))


def oracle_front(landscape: Landscape) -> Front:
    """Return the best front of true gains: exact up to thinning without interaction, else a strong approximation.

    Levelling off keeps the order of gains, so it keeps the front.
    """
    front = (
        searched_front(landscape) if landscape.pairs is not None else additive_front(landscape.main, landscape.space)
    )
    return front._replace(gains=landscape.bent(front.gains))


@lru_cache(maxsize=64)
def known(name: str, sites: int, seed: int) -> tuple[Landscape, float, float]:
    """Return a landscape, the hypervolume of its best front, and its best gain in points."""
    landscape = make_landscape(name, sites, seed)
    if "+" in name:
        return landscape, *known(name.partition("+")[0], sites, seed)[1:]
    front = oracle_front(landscape)
    return landscape, hypervolume(front.gains, front.costs, landscape.space.dearest), float(front.gains.max())


# ---------------------------------------------------------------- strategies: what to evaluate next


class Trial(NamedTuple):
    """What was evaluated.

    Args:
        choices: The placement.
        fidelity: `long` or `brief`.
        score: Observed accuracy in points.
    """

    choices: Choices
    fidelity: str
    score: float


class Ask(Protocol):
    """Suggests what to evaluate next."""

    def __call__(self, history: Sequence[Trial]) -> tuple[Choices, str]:
        """Return a placement and the fidelity to evaluate it at.

        Args:
            history: All trials so far, the references first, then everything that was asked for, in order.
        """


Strategy = Callable[[Space, int], Ask]
"""Starts a strategy on a space with a seed. A run calls what it returns until the budget is spent."""


def optuna_strategy(make: Callable[[int], BaseSampler], fidelity: str | None = None) -> Strategy:
    """Let an Optuna sampler suggest in a study of its own: accuracy up, parameters down.

    Args:
        make: Makes the sampler from a seed.
        fidelity: What to evaluate at; None for the cheapest one.
    """

    def start(space: Space, seed: int) -> Ask:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(seed))
        distributions = {site: CategoricalDistribution(texts) for site, texts in space.choices.items()}
        told = 0
        pending: list[optuna.Trial] = []

        def ask(history: Sequence[Trial]) -> tuple[Choices, str]:
            nonlocal told
            for trial in history[told:]:
                values = [trial.score, float(space.cost(space.matrix([trial.choices]))[0])]
                if pending:
                    study.tell(pending.pop(), values)
                else:
                    made = optuna.create_trial(params=trial.choices, distributions=distributions, values=values)
                    study.add_trial(made)
            told = len(history)
            pending.append(study.ask(distributions))
            return dict(pending[0].params), fidelity or space.cheapest

        return ask

    return start


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "tpe-multivariate": lambda seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}


def make_suggester(space: Space) -> Suggester:
    """Return what suggests in a study of placesearch."""
    return Suggester({site: [None, *SETTINGS] for site in space.sites}, [list(space.params.astype(float))])


def expected_share(history: Sequence[Trial], space: Space) -> float:
    """Return what `--until settled` goes by: the share of the best hypervolume that is expected to be reached."""
    costs = space.cost(space.matrix([trial.choices for trial in history])).astype(float)
    known = {placement_of(trial.choices): [cost] for trial, cost in zip(history, costs, strict=True)}
    return make_suggester(space).reached(scores_of(history), known, seed_of("share", len(history)))


LATE = 30
"""From which trial on some are long in `additive-late`."""


def late_number(position: int) -> int | None:
    """Return what `long_number` does for a schedule that is brief at first, and then has every third trial long."""
    return (position - LATE) // 3 if position >= LATE and position % 3 == 2 else None


def our_strategy(number_of: Callable[[int], int | None] | None = long_number) -> Strategy:
    """Let placesearch suggest, as in a study: it never goes by the last scores, which workers might still be at.

    Args:
        number_of: Which of the long trials is at a position, where there are two fidelities; first the references
            once more. None for brief trials only.
    """

    def start(space: Space, seed: int) -> Ask:
        suggester = make_suggester(space)
        known: list[tuple[Placement, list[float]]] = []

        def ask(history: Sequence[Trial]) -> tuple[Choices, str]:
            for trial in history[len(known) :]:
                cost = float(space.cost(space.matrix([trial.choices]))[0])
                known.append((placement_of(trial.choices), [cost]))
            position = len(history) - len(space.references())
            number = number_of(position) if number_of else None
            fidelity = "long" if number is not None and len(space.units) > 1 else space.cheapest
            if fidelity != space.cheapest and number is not None and number < len(space.references()):
                return space.references()[number], fidelity
            seen = max(0, len(history) - LAG)
            scores = scores_of(history[:seen])
            if not number_of:
                scores = [replace(score, brief=False) for score in scores]
            random = np.random.default_rng((seed, len(history)))
            waiting = {placement for placement, _ in known[seen:]}
            placement = suggester.suggest(scores, dict(known), waiting, position, random)
            return {site: str(placement.get(site, "none")) for site in space.sites}, fidelity

        return ask

    return start


def scores_of(history: Sequence[Trial]) -> list[Score]:
    """Turn trials into scores; a placement that is repeated has the next seed each time."""
    count: dict[tuple[Placement, str], int] = {}
    scores = []
    for trial in history:
        key = placement_of(trial.choices), trial.fidelity
        scores.append(Score(key[0], trial.score, count.get(key, 0), trial.fidelity == "brief"))
        count[key] = count.get(key, 0) + 1
    return scores


def placement_of(choices: Choices) -> Placement:
    """Turn texts into a placement."""
    return Placement({site: BlockSetting.parse(text) for site, text in choices.items() if text != "none"})


@dataclass(frozen=True)
class Plan:
    """A strategy and where it is run.

    Args:
        strategy: The strategy.
        references: Fidelity at which it is given the references; None for the cheapest one.
        budget: The most units it is run for.
        seeds: Seeds by number of sites, where not SEEDS; with the reason.
        why: The reason for fewer seeds.
        plain_landscapes: Whether it runs on landscapes of one fidelity.
        brief_landscapes: Whether it runs on those of two.
    """

    strategy: Strategy
    references: str | None = None
    budget: int = 300
    seeds: dict[int, int] = field(default_factory=dict)
    why: str = ""
    plain_landscapes: bool = True
    brief_landscapes: bool = True


SEEDS = 20
BUDGETS = (50, 100, 200, 300)
STRATEGIES: dict[str, Plan] = {
    "additive": Plan(our_strategy()),
    "additive-late": Plan(our_strategy(late_number), plain_landscapes=False),
    "additive-brief": Plan(our_strategy(None), plain_landscapes=False),
    "random": Plan(optuna_strategy(SAMPLERS["random"])),
    "random-long": Plan(optuna_strategy(SAMPLERS["random"], "long"), "long", plain_landscapes=False),
    "nsga2": Plan(optuna_strategy(SAMPLERS["nsga2"])),
    "nsga2-long": Plan(optuna_strategy(SAMPLERS["nsga2"], "long"), "long", plain_landscapes=False),
    "tpe-multivariate": Plan(optuna_strategy(SAMPLERS["tpe-multivariate"])),
    "tpe-multivariate-long": Plan(
        optuna_strategy(SAMPLERS["tpe-multivariate"], "long"), "long", plain_landscapes=False
    ),
    "tpe": Plan(optuna_strategy(SAMPLERS["tpe"])),
    "tpe-long": Plan(optuna_strategy(SAMPLERS["tpe"], "long"), "long", plain_landscapes=False),
    "gp": Plan(
        optuna_strategy(SAMPLERS["gp"]),
        budget=100,
        seeds={8: 6, 16: 6, 50: 0},
        why="a run up to budget 100 takes half a minute at 8 sites and more at 16, and ends there",
        brief_landscapes=False,
    ),
}
"""All strategies."""


# ---------------------------------------------------------------- recommendations: what a study says in the end


class Estimates(NamedTuple):
    """What a recommendation believes of trained candidates; its front is the non-dominated ones by value and cost.

    Args:
        choices: The placements, n of them; the same one may appear again.
        values: Estimated accuracy in points, (n,).
        fidelity: Which score the values are estimates of.
        low: Lower end of a 90 % interval for the true accuracy, (n,); None without.
        high: Upper end.
    """

    choices: list[Choices]
    values: np.ndarray
    fidelity: str
    low: np.ndarray | None = None
    high: np.ndarray | None = None


Recommendation = Callable[[Sequence[Trial], Space], Estimates]


def _comparable(history: Sequence[Trial]) -> list[Trial]:
    """Keep the trials of one fidelity: the long ones if there are any."""
    long = [trial for trial in history if trial.fidelity == "long"]
    return long or list(history)


def observed(history: Sequence[Trial], space: Space) -> Estimates:
    """Believe what was observed: the usual recommendation."""
    trials = _comparable(history)
    return Estimates(
        [trial.choices for trial in trials], np.array([trial.score for trial in trials]), trials[0].fidelity
    )


def model_of(history: Sequence[Trial], space: Space) -> Model:
    """Return the model of placesearch of all scores."""
    return Model(Evidence(Vocabulary(dict.fromkeys(space.sites, SETTINGS)), scores_of(history)))


def estimated(model: Model, history: Sequence[Trial], space: Space) -> Estimates:
    """Believe a model. Where all scores are brief it takes them for long ones."""
    placements = list(dict.fromkeys(score.placement for score in model.scores))
    values, deviation = model.estimate(placements)
    fidelity = "long" if any(trial.fidelity == "long" for trial in history) else "brief"
    choices = [{site: str(placement.get(site, "none")) for site in space.sites} for placement in placements]
    return Estimates(choices, values, fidelity, values - REACH * deviation, values + REACH * deviation)


def smoothed(history: Sequence[Trial], space: Space) -> Estimates:
    """Believe the model of placesearch."""
    return estimated(model_of(history, space), history, space)


RECOMMENDATIONS: dict[str, Recommendation] = {"observed": observed, "smoothed": smoothed}


# ---------------------------------------------------------------- runs

COLUMNS = [
    "landscape",
    "sites",
    "noise",
    "seed",
    "strategy",
    "recommendation",
    "budget",
    "hypervolume",
    "regret",
    "overstatement",
    "front",
    "trained",
    "covered_front",
    "covered_all",
    "suggestion_seconds",
    "best_gain",
    "expected_share",
]


class Job(NamedTuple):
    """One run: the first columns of its rows."""

    landscape: str
    sites: int
    noise: int
    seed: int
    strategy: str


def jobs(landscapes: Sequence[str], sites: Sequence[int], seeds: int, strategies: Sequence[str]) -> Iterator[Job]:
    """Yield the runs seed by seed, so that what was reached is balanced."""
    for seed, landscape, size, noise, strategy in product(range(seeds), landscapes, sites, NOISES, strategies):
        plan = STRATEGIES[strategy]
        runs = plan.brief_landscapes if "+" in landscape else plan.plain_landscapes
        if runs and seed < plan.seeds.get(size, SEEDS):
            yield Job(landscape, size, noise, seed, strategy)


def evaluate(job: Job) -> tuple[list[Trial], list[float]]:
    """Spend the budget and return the trials and the seconds that each suggestion took, none for the references.

    The n-th score of a landscape has the same noise in every run, whatever is evaluated.
    """
    landscape = known(job.landscape, job.sites, job.seed)[0]
    space, plan = landscape.space, STRATEGIES[job.strategy]
    noise = np.random.default_rng(seed_of("noise", job.landscape, job.sites, job.seed))
    ask = plan.strategy(space, seed_of(*job))
    first = plan.references or space.cheapest
    history: list[Trial] = []
    seconds: list[float] = []

    def score(chosen: Choices, fidelity: str) -> None:
        expected = landscape.expected(space.matrix([chosen]), fidelity)[0]
        observed_score = float(expected + job.noise * SIGNAL * noise.standard_normal())
        history.append(Trial(chosen, fidelity, observed_score))

    for chosen in space.references():
        score(chosen, first)
    spent = space.units[first] * len(history)
    while spent < plan.budget:
        begin = time.process_time()
        chosen, fidelity = ask(history)
        seconds.append(time.process_time() - begin)
        spent += space.units[fidelity]
        if spent <= plan.budget:
            score(chosen, fidelity)
    return history, seconds


def judge(job: Job, history: Sequence[Trial], seconds: Sequence[float], recommendation: str) -> Iterator[list[object]]:
    """Yield a row for each budget: what the recommendation says after so many units, against the truth."""
    landscape, best_volume, best_gain = known(job.landscape, job.sites, job.seed)
    space = landscape.space
    spent = np.cumsum([space.units[trial.fidelity] for trial in history])
    ours = job.strategy == "additive" and recommendation == "smoothed"
    for budget in (budget for budget in BUDGETS if budget <= STRATEGIES[job.strategy].budget):
        seen = history[: int((spent <= budget).sum())]
        asked = seconds[: len(seen) - len(space.references())]
        estimates = RECOMMENDATIONS[recommendation](seen, space)
        matrix = space.matrix(estimates.choices)
        costs, gains = space.cost(matrix).astype(float), landscape.gains(matrix)
        members = _pareto(estimates.values, costs, space.dearest, len(costs))
        pick = members[-1]  # the dearest member has the highest estimate
        level = PLAIN[estimates.fidelity]  # what the user compares with, so it is given
        covered: list[object] = ["", ""]
        if estimates.low is not None and estimates.high is not None:
            truth = level + gains
            inside = (estimates.low <= truth) & (truth <= estimates.high)
            trained = np.unique(matrix, axis=0, return_index=True)[1]
            covered = [round(float(inside[members].mean()), 4), round(float(inside[trained].mean()), 4)]
        yield [
            *job,
            recommendation,
            budget,
            round(hypervolume(gains[members], costs[members], space.dearest) / best_volume, 5),
            round(best_gain - float(gains[pick]), 5),
            round(float(estimates.values[pick] - level - gains[pick]), 5),
            len(members),
            len(np.unique(matrix, axis=0)),
            *covered,
            round(float(np.mean(asked)), 6) if asked else "",
            round(best_gain, 5),
            round(expected_share(seen, space), 4) if ours else "",
        ]


def _run(job: Job, recommendations: Sequence[str], keep: Path | None) -> list[list[object]]:
    """Run a job, or read its trials if they were kept, and return its rows."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = known(job.landscape, job.sites, job.seed)[0].space
    path = keep / f"{'-'.join(map(str, job))}.npz" if keep else None
    if path and path.exists():
        stored = np.load(path)
        trials = zip(stored["matrix"], stored["fidelity"], stored["score"], strict=True)
        history = [Trial(space.texts(row), str(fidelity), float(score)) for row, fidelity, score in trials]
        seconds = stored["seconds"].tolist()
    else:
        history, seconds = evaluate(job)
        if path:
            matrix = space.matrix([trial.choices for trial in history]).astype(np.int8)
            columns = {"fidelity": [trial.fidelity for trial in history], "score": [trial.score for trial in history]}
            np.savez_compressed(path, matrix=matrix, seconds=seconds, **columns)
    return [row for name in recommendations for row in judge(job, history, seconds, name)]


def _run_one(task: tuple[Job, list[str], Path | None]) -> tuple[Job, float, list[list[object]]]:
    begin = time.perf_counter()
    rows = _run(*task)
    return task[0], time.perf_counter() - begin, rows


def collect(waiting: Sequence[Job], minutes: float, processes: int, keep: Path | None) -> None:
    """Run what is not in the table yet until the time is over."""
    if not SCORES.exists():
        SCORES.write_text(",".join(COLUMNS) + "\n")
    table = pd.read_csv(SCORES)
    done = set(table[[*Job._fields, "recommendation"]].itertuples(index=False, name=None))
    tasks = [(job, [name for name in RECOMMENDATIONS if (*job, name) not in done], keep) for job in waiting]
    tasks = [task for task in tasks if task[1]]
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    pool = get_context("spawn").Pool(processes) if processes > 1 else None
    results = pool.imap_unordered(_run_one, tasks) if pool else map(_run_one, tasks)
    with SCORES.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, (job, seconds, rows) in enumerate(results, start=1):
            writer.writerows(rows)
            file.flush()
            print(
                f"{time.strftime('%H:%M:%S')} {number}/{len(tasks)} {' '.join(map(str, job))}: {seconds:.1f} s",
                flush=True,
            )
            if time.monotonic() > deadline:
                break
    if pool:
        pool.terminate()


# ---------------------------------------------------------------- the report

CELL = ["landscape", "sites", "noise"]
RUN = [*CELL, "seed"]
HOW = ["strategy", "recommendation"]


def report() -> str:
    """Write what the scores say."""
    table = pd.read_csv(SCORES)
    suffix = table.landscape.str.partition("+")[2]
    lines = [
        "# Search strategies on landscapes with known truth",
        "",
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, one thread a run; optuna "
        f"{optuna.__version__}, numpy {np.__version__}, scipy {scipy.__version__}. "
        f"{table.drop_duplicates([*CELL, 'seed', 'strategy']).shape[0]:,} runs. Made by "
        "`python tests/benchmarks/search.py`, whose text says how landscapes are drawn.",
        "",
        f"The truth has a standard deviation of {SIGNAL} points over random placements, a score noise of x1 or x2 "
        "that. Hypervolume: of the true values of the recommended front, as a share of the best front there is; "
        "parameters linear up to the dearest placement, accuracy from that of the plain network. The best front is "
        "exact up to thinning to 4,000 slices of cost; with interaction or deception it is the best found by local "
        "search from 800 starts, so shares are then upper bounds. Regret: best true accuracy minus true accuracy of "
        "the recommended member with the highest estimate, in points. Overstatement: that member's estimate minus its "
        "truth, each against plain. Budgets count the four references, which every strategy is given first. Noise, "
        "landscape and references are the same for all strategies under one seed.",
        "",
        "With two fidelities, `additive` is what a study does: of the first 20 trials every fifth is long, later every "
        f"other one, the references first. In `additive-late` the first {LATE} are brief, then every third is long; "
        "what else a position is for stays, so that half of its long trials go by a draw and most repeats are brief. "
        "`additive-brief` is brief throughout. Of Optuna's samplers those with `-long` are long throughout, the others "
        "brief.",
        "",
    ]
    for title, name in (
        ("One fidelity", ""),
        ("Two fidelities: a brief score at 1 unit, a long one at 4; the truth is the long one", "brief"),
        (f"Two fidelities, with {FAR} times the bias in brief scores", "far"),
    ):
        part = table[suffix == name]
        if len(part):
            parts = (_fewer, _medians, _schedules, _against_random, _coverage, _calibration, _means)
            lines += [f"## {title}", "", *(line for write in parts for line in write(part))]
    return "\n".join([*lines, "## Seconds a suggestion", "", *_speed(table)]) + "\n"


def _fewer(table: pd.DataFrame) -> list[str]:
    """Say how many seeds there are, and which strategies have fewer."""
    counts, every = table.groupby([*CELL, "strategy"]).seed.nunique(), len(KINDS) * len(NOISES)
    parts: dict[str, list[str]] = {}
    for strategy, plan in STRATEGIES.items():
        own = table[table.strategy == strategy]
        few = []
        for size in SITES if len(own) else ():
            seeds = own[own.sites == size].groupby(CELL).seed.nunique()
            if seeds.empty:
                few.append(f"none at {size} sites")
            elif len(seeds) < every or seeds.min() < counts.max():
                some = f" on {len(seeds)} of {every} landscapes and noises" if len(seeds) < every else ""
                few.append(f"{seeds.min()} at {size} sites{some}")
        if few:
            parts.setdefault(f"{', '.join(few)}{f' ({plan.why})' if plan.why else ''}", []).append(f"`{strategy}`")
    lines = [f"{', '.join(names)}: {what}." for what, names in parts.items()]
    most = f"Seeds: {counts.max()} for each landscape, size, noise and strategy"
    return [f"{most}, fewer with these:", "", *(f"- {line}" for line in lines), ""] if lines else [f"{most}.", ""]


def _medians(table: pd.DataFrame) -> list[str]:
    """Write the median over landscapes of the means over seeds, of what most strategies ran on."""
    every, (table, few) = table, _common(table)
    left_out = f"; {', '.join(few)} ran on too few" if few else ""
    means = table.groupby([*CELL, *HOW, "budget"])[["hypervolume", "regret", "overstatement"]].mean()
    lines = [
        f"Median over landscapes, sizes and noises of the mean over seeds, on the {len(table[RUN].drop_duplicates())} "
        f"landscapes and seeds on which all of these ran{left_out}:",
        "",
    ]
    budgets = sorted(table.budget.unique())
    columns = [f"{score} {budget}" for score in means for budget in budgets]
    lines += [
        f"| strategy | recommendation | landscapes | {' | '.join(columns)} |",
        "|---|---|" + "---:|" * (1 + len(columns)),
    ]
    medians = means.groupby([*HOW, "budget"]).median()
    counts = means.groupby([*CELL, *HOW]).size().groupby(HOW).size()
    for how in sorted(counts.index, key=lambda how: -medians.loc[how].hypervolume.iloc[-1]):
        own = medians.loc[how]
        cells = [f"{own[score].get(budget, np.nan):.3f}" for score in means for budget in budgets]
        lines.append(f"| {how[0]} | {how[1]} | {counts[how]} | {' | '.join(cells).replace('nan', '')} |")
    return [*lines, "", *_goals(means.hypervolume), *(_where_it_ran(every, strategy) for strategy in few), ""]


def _where_it_ran(table: pd.DataFrame, strategy: str) -> str:
    """Compare a strategy that ran on few landscapes with ours on these."""
    ran = [pd.MultiIndex.from_frame(table.loc[table.strategy == name, RUN]) for name in (strategy, "additive")]
    own = table[pd.MultiIndex.from_frame(table[RUN]).isin(ran[0].unique().intersection(ran[1].unique()))]
    budget = table[table.strategy == strategy].budget.max()
    means = own[own.budget == budget].groupby(HOW).hypervolume.mean()
    parts = [
        f"`{name}` {means.get((name, 'observed'), np.nan):.3f} observed, "
        f"{means.get((name, 'smoothed'), np.nan):.3f} smoothed"
        for name in (strategy, "additive")
    ]
    runs = len(own[RUN].drop_duplicates())
    return f"- On the {runs} landscapes and seeds of `{strategy}`, mean hypervolume after {budget}: {'; '.join(parts)}."


def _common(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Keep the landscapes and seeds that every strategy ran on, but for strategies that ran on few; say which."""
    runs = table.drop_duplicates([*RUN, "strategy"]).groupby("strategy").size()
    few = list(runs[runs < 0.7 * runs.max()].index)
    table = table[~table.strategy.isin(few)]
    ran = table.drop_duplicates([*RUN, "strategy"]).groupby(RUN).size()
    shared = ran[ran == table.strategy.nunique()].index
    chosen = pd.MultiIndex.from_frame(table[RUN]).isin(shared)
    return table[chosen], few


def _goals(volumes: pd.Series) -> list[str]:
    """Compare few trials of ours with many of Optuna's best sampler, landscape by landscape."""
    if "additive" not in volumes.index.unique("strategy"):
        return []
    optuna_names = [name for name in volumes.index.unique("strategy") if not name.startswith("additive")]
    if set(optuna_names) <= {"random", "random-long"}:
        return []
    own = [name for name in ("additive", "additive-late") if name in volumes.index.unique("strategy")]
    lines = []
    for name, (budget, recommendation) in product(own, ((50, "observed"), (100, "smoothed"))):
        others = volumes.xs((recommendation, 300), level=("recommendation", "budget"))
        others = others[others.index.isin(optuna_names, level="strategy")]
        best = others.groupby("strategy").median().idxmax()
        theirs = others.xs(best, level="strategy")
        ours = volumes.xs((name, "smoothed", budget), level=("strategy", "recommendation", "budget"))
        random = np.random.default_rng(0)
        drawn = random.integers(len(ours), size=(2000, len(ours)))
        differences = np.median(ours.to_numpy()[drawn], axis=1) - np.median(theirs.to_numpy()[drawn], axis=1)
        low, high = np.percentile(differences, [2.5, 97.5])
        lines.append(
            f"`{name}` smoothed after {budget} against `{best}` {recommendation}, Optuna's best so, after 300: "
            f"medians {ours.median():.3f} and {theirs.median():.3f}, difference {ours.median() - theirs.median():+.3f} "
            f"({low:+.3f} to {high:+.3f}, 95 %, bootstrap over {len(ours)} landscapes); ahead on "
            f"{int((ours > theirs).sum())} of them. Goal, at least as high a median: "
            f"{_met(ours.median() >= theirs.median())}."
        )
    return [*lines, ""]


def _met(reached: bool) -> str:
    return "met" if reached else "not met"


def _schedules(table: pd.DataFrame) -> list[str]:
    """Write what other schedules of long trials reach beyond that of a study, run by run."""
    scores = ["hypervolume", "overstatement", "covered_front"]
    own = table[table.recommendation == "smoothed"].set_index(["strategy", *RUN, "budget"])[scores]
    others = [name for name in ("additive-late", "additive-brief") if name in own.index.unique("strategy")]
    lines = [
        "Other schedules against that of a study, `smoothed`, run by run: mean difference of the hypervolume ± its "
        "standard error, of the overstatement in points, and of the percentage of the recommended members' 90 % "
        "intervals that hold the truth.",
        "",
        "| strategy | budget | runs | hypervolume | overstatement | held |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in others:
        for budget, part in (own.loc[name] - own.loc["additive"]).dropna().groupby("budget"):
            lines.append(
                f"| {name} | {budget} | {len(part)} | {part.hypervolume.mean():+.3f} ± {part.hypervolume.sem():.3f} | "
                f"{part.overstatement.mean():+.2f} | {100 * part.covered_front.mean():+.0f} |"
            )
    return [*lines, ""] if others else []


def _against_random(table: pd.DataFrame) -> list[str]:
    """Write on how many landscapes a strategy differs from random search with the same recommendation."""
    lines = [
        "Against random search with the same recommendation: landscapes (kind, size, noise) where the hypervolume is "
        "better / not shown to differ / worse, by Wilcoxon's signed rank test over paired seeds at 5 %, two-sided, "
        "not corrected for the number of landscapes; only those with 6 pairs or more. In brackets those that stay "
        "after Holm's correction.",
        "",
    ]
    budgets = sorted(table.budget.unique())
    lines += [
        f"| strategy | against | recommendation | {' | '.join(map(str, budgets))} |",
        "|---|---|---|" + "---:|" * len(budgets),
    ]
    worse, heads = [], len(lines)
    for other in ("random", "random-long"):
        base = table[table.strategy == other]
        for how, own in table[table.strategy != other].groupby(HOW):
            cells = []
            for budget in budgets:
                results = _paired(own[own.budget == budget], base)
                cells.append(_counted(results))
                worse += [
                    f"{how[0]} against {other}, {how[1]}, {budget}: {cell[0]} {cell[1]} x{cell[2]}, "
                    f"{difference:+.3f}, p = {p:.3g}"
                    for cell, difference, p in results
                    if p < 0.05 and difference < 0
                ]
            if any(cells):
                lines.append(f"| {how[0]} | {other} | {how[1]} | {' | '.join(cells)} |")
    if len(lines) == heads:
        return ["Too few seeds to compare with random search landscape by landscape.", ""]
    ours = sum(line.startswith("additive ") for line in worse)
    lines += [
        "",
        f"Goal, `additive` nowhere significantly worse than random search, before correction: {_met(not ours)}"
        + (f", worse in {ours}." if ours else "."),
        "",
        "<details><summary>Where worse than random</summary>",
        "",
        *([f"- {line}" for line in worse] or ["Nowhere."]),
    ]
    return [*lines, "", "</details>", ""]


def _paired(own: pd.DataFrame, base: pd.DataFrame) -> list[tuple[tuple[str, int, int], float, float]]:
    """Return landscape, mean difference from the base and p-value, where there are enough pairs."""
    joined = own.merge(base, on=[*RUN, "recommendation", "budget"], suffixes=("", "_base"))
    results = []
    for cell, pairs in joined.groupby(CELL):
        difference = (pairs.hypervolume - pairs.hypervolume_base).to_numpy()
        if len(difference) >= 6:
            p = float(wilcoxon(difference).pvalue) if difference.any() else 1.0
            results.append((cell, float(difference.mean()), p))
    return results


def _counted(results: list[tuple[tuple[str, int, int], float, float]]) -> str:
    if not results:
        return ""
    order = np.argsort([p for *_, p in results])
    holm = np.ones(len(results))
    holm[order] = np.maximum.accumulate([(len(results) - rank) * results[index][2] for rank, index in enumerate(order)])
    better, worse, better_holm, worse_holm = (
        sum((sign * difference > 0) and p < 0.05 for (_, difference, _), p in zip(results, values, strict=True))
        for values in ([p for *_, p in results], holm)
        for sign in (1, -1)
    )
    return f"{better} / {len(results) - better - worse} / {worse} ({better_holm} / {worse_holm})"


def _coverage(table: pd.DataFrame) -> list[str]:
    """Write how many of the nominal 90 % intervals hold the truth."""
    own = table.dropna(subset=["covered_front", "covered_all"])
    if own.empty:
        return []
    kinds = [kind for kind in LANDSCAPES if kind in set(own.landscape)]
    lines = [
        "Percentage of 90 % intervals that hold the true long accuracy, mean over sizes, noises, budgets and seeds: of "
        "the recommended members / of all trained candidates. Both are counted from the plain network's level, so that "
        "estimates of brief scores are taken for what a user would take them for.",
        "",
        f"| strategy | recommendation | {' | '.join(kinds)} |",
        "|---|---|" + "---:|" * len(kinds),
    ]
    for how, part in own.groupby(HOW):
        shares = part.groupby("landscape")[["covered_front", "covered_all"]].mean()
        cells = [
            f"{100 * shares.covered_front[kind]:.0f} / {100 * shares.covered_all[kind]:.0f}"
            if kind in shares.index
            else ""
            for kind in kinds
        ]
        lines.append(f"| {how[0]} | {how[1]} | {' | '.join(cells)} |")
    ours = own[(own.strategy == "additive") & own.landscape.str.startswith("additive")]
    if ours.empty:
        return [*lines, ""]
    shares = 100 * ours.groupby("budget").covered_front.agg(["mean", "sem"])
    cells = [
        f"{share:.1f} ± {error:.1f} after {budget} ({_met(abs(share - 90) <= 3)})"
        for budget, share, error in shares.itertuples()
    ]
    runs = len(ours[RUN].drop_duplicates())
    goal = f"Goal, where the model holds, 87 to 93 % of the recommended members by `additive` smoothed ({runs} runs): "
    why = (
        "Of what the model allows for, these landscapes have no pairs of blocks and nothing peculiar to a placement; "
        "[what that widens, and truths that have all of it](calibration.md)."
    )
    return [*lines, "", f"{goal}{', '.join(cells)}; ± standard error over runs. {why}", ""]


def _calibration(table: pd.DataFrame) -> list[str]:
    """Write what the share of the best hypervolume was that `--until settled` goes by, and what it truly was."""
    own = table.dropna(subset=["expected_share"])
    if own.empty:
        return []
    lines = [
        "`--until settled` goes by the share of the best front's hypervolume that the model expects the recommended "
        f"one to cover, and stops at {SETTLED}. What it expected, and what was true, over all landscapes, sizes, "
        "noises, budgets and seeds:",
        "",
        "| expected | times | true, mean | true, 10 % to 90 % of them |",
        "|---|---:|---:|---|",
    ]
    edges = [0.0, 0.5, 0.6, 0.7, 0.8, 0.85, SETTLED, 0.95, 1.01]
    for low, high in pairwise(edges):
        part = own[(own.expected_share >= low) & (own.expected_share < high)].hypervolume
        if len(part):
            spread = f"{part.quantile(0.1):.2f} to {part.quantile(0.9):.2f}"
            lines.append(f"| {low:.2f} to {min(high, 1):.2f} | {len(part)} | {part.mean():.2f} | {spread} |")
    return [*lines, ""]


def _means(table: pd.DataFrame) -> list[str]:
    """Write the hypervolume of each landscape, size and noise: mean, standard error, seeds."""
    lines: list[str] = []
    for budget, part in table.groupby("budget"):
        statistics = part.groupby([*CELL, *HOW]).hypervolume.agg(["mean", "sem", "count"])
        ways = list(dict.fromkeys(zip(part.strategy, part.recommendation, strict=True)))
        lines += [
            f"<details><summary>Hypervolume at budget {budget}: mean ± standard error (seeds)</summary>",
            "",
            f"| landscape | sites | noise | {' | '.join(f'{strategy}, {name}' for strategy, name in ways)} |",
            "|---|---:|---:|" + "---:|" * len(ways),
        ]
        for cell in product(LANDSCAPES, SITES, NOISES):
            if cell not in set(zip(part.landscape, part.sites, part.noise, strict=True)):
                continue
            values = [statistics.loc[(*cell, *how)] if (*cell, *how) in statistics.index else None for how in ways]
            cells = ["" if v is None else f"{v['mean']:.3f} ± {v['sem']:.3f} ({v['count']:.0f})" for v in values]
            lines.append(f"| {cell[0]} | {cell[1]} | x{cell[2]} | {' | '.join(cells).replace(' ± nan', '')} |")
        lines += ["", "</details>", ""]
    return lines


def _speed(table: pd.DataFrame) -> list[str]:
    longest = table[table.budget == table.groupby("strategy").budget.transform("max")]
    seconds = longest.groupby(["strategy", "sites"]).suggestion_seconds.mean().unstack()
    sizes = list(seconds.columns)
    lines = [
        "Of processor time, mean over a run of its largest budget; runs that did not measure it are left out.",
        "",
        f"| strategy | {' | '.join(f'{size} sites' for size in sizes)} |",
        "|---|" + "---:|" * len(sizes),
    ]
    for strategy, row in seconds.iterrows():
        lines.append(f"| {strategy} | {' | '.join(f'{row[size]:.4f}' for size in sizes).replace('nan', '')} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare search strategies on landscapes with known truth.")
    parser.add_argument("--minutes", type=float, default=0.0, help="how long to run; 0 writes the report only")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--landscapes", default=",".join(LANDSCAPES))
    parser.add_argument("--sites", default=",".join(map(str, SITES)))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--keep", type=Path, help="folder for the trials of each run")
    given = parser.parse_args()
    if given.minutes:
        sizes = [int(size) for size in given.sites.split(",")]
        waiting = list(jobs(given.landscapes.split(","), sizes, given.seeds, given.strategies.split(",")))
        collect(waiting, given.minutes, given.processes, given.keep)
    (REPORTS / "search.md").write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
