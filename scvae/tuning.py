"""The options that suit the data, found by trying some on cells that are left out, within a budget of time."""

from __future__ import annotations

import html
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae.boundary.containers import check_anndata
from scvae.boundary.keys import check_free, check_key
from scvae.boundary.options import Range, real, seed_of, whole
from scvae.boundary.process import device_of
from scvae.boundary.ranks import check_alone
from scvae.data.order import n_minibatches
from scvae.fits.choices import program_of, split_options
from scvae.fits.configurations import arguments_of, drawn_split, naming, needed, schemas_of
from scvae.fitted import Fitted
from scvae.fitting import fit
from scvae.inference.progress import Progress
from scvae.inference.svi import NonFiniteLoss, Training
from scvae.kernels.operations import loops_are_compiled

__all__ = ["Tuned", "small_changes", "tune"]

_DEFAULT = "default"
_CHANGES: tuple[tuple[str, Any], ...] = (
    ("n_latent", 10),
    ("n_latent", 30),
    ("prior", "normal"),
    ("likelihood", "nb"),
    ("dispersion", "gene-batch"),
    ("n_hidden", 256),
    ("n_layers", 1),
    ("learning_rate", 5e-3),
)
_TEST_CELLS = 1000  # at most, by default: the rest of the time is better spent on training
_FIRST_STEPS = 250  # of the fits of the first round, at most
_FINALISTS = 2  # beside the default
_NOISE = 2.0  # standard errors
_LIKELY = 1.75  # of the fewest steps, within which the data may have ended a fit
_MARGIN = 1.2  # by which what was measured may be exceeded


@dataclass(frozen=True, eq=False, repr=False)
class Tuned:
    """What :func:`scvae.tune` found.

    Parameters
    ----------
    table
        A row for each configuration and round, as :func:`scvae.tune` describes it.
    chosen
        Name of the configuration that was chosen.
    options
        Its arguments of :func:`scvae.fit`, those that all configurations share counted in.
    model
        The model with these options, fitted to all cells.
    seconds
        That all of it took.
    """

    table: pd.DataFrame
    chosen: str
    options: dict[str, Any]
    model: Fitted
    seconds: float

    @property
    def ranking(self) -> pd.DataFrame:
        """The last row of each configuration: those that came furthest first, and of these the best first."""
        last = self.table.drop_duplicates("configuration", keep="last").set_index("configuration")
        return last.sort_values(["round", "difference"], ascending=False, kind="stable", na_position="last")

    def __repr__(self) -> str:
        shown = self.ranking.rename_axis(None).to_string(float_format="{:,.2f}".format)
        return "\n    ".join([self._title(), *shown.splitlines(), *repr(self.model).splitlines()])

    def _repr_html_(self) -> str:
        shown = self.ranking.rename_axis(None).to_html(float_format="{:,.2f}".format)
        return f"<p>{html.escape(self._title())}</p>{shown}{self.model._repr_html_()}"

    def _title(self) -> str:
        n, n_rounds = self.table["configuration"].nunique(), int(self.table["round"].max())
        among = f"{n:,} configuration{'s' * (n > 1)} in {n_rounds} round{'s' * (n_rounds != 1)}"
        return f"Tuned: {str(self.chosen)!r} is chosen among {among}, in {self.seconds:.1f} s"


def tune(
    adata: AnnData,
    configurations: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    budget: float = 60.0,
    test_fraction: float | None = None,
    n_samples: int = 64,
    seed: int = 0,
    progress: bool = True,
    **shared: Any,
) -> Tuned:
    r"""Find the options that suit the data within a budget of time, and fit a model with them to all cells.

    Configurations go through rounds of successive halving. All of them are first fitted for a few hundred steps; each
    round keeps the better half, those that may be as good within the noise where there is time for them, and trains it
    for longer; in the last one about two are fitted with the default length of training. Some cells are left out of all
    these fits, and the importance-weighted estimate of :math:`\log p(x \mid s)` of these cells, the same for all,
    decides. The default takes part in every round, and another configuration is chosen only if its paired difference to
    the default, in the last round, is above two standard errors. The standard error covers the choice of cells, not
    that of seeds, and the best of several differences is a little flattered.

    The time of a step and of an evaluation, and the length that the data ask for, are measured in the fits themselves,
    those of the default first. A fit begins only if it, a fit of the last round and the final one can be expected to
    end within the budget, and is cut short where it takes longer than that; nor is a configuration chosen whose final
    fit would. A short budget therefore leaves out configurations, makes the last round shorter than the default length,
    or ends the search after an earlier round. The choice is then among shorter fits, which favours what learns fast:
    the column ``steps`` tells; after the first round alone it is the default. The default is fitted in the first round,
    and the model chosen to all cells, however small the budget; five times what a fit takes allows for a comparison,
    ten times for all of it.

    The same seed gives the same numbers for a fit of the same number of steps, and the same fits wherever time does not
    run short. On a slower or a busier machine the budget, which is in seconds, may end rounds earlier, and so lead to
    another choice.

    Ctrl-C ends the search: the choice is among the fits that were complete by then. Another Ctrl-C ends the final fit.

    Parameters
    ----------
    adata
        Cells by genes, as for :func:`scvae.fit`. The final fit writes to it; the search is on copies.
    configurations
        The keyword arguments of :func:`scvae.fit` for each candidate, by a name of your choice. ``"default"``, the
        arguments that all share, is added unless one has this name, which then takes its place. By default the
        candidates are small changes of one option each: :func:`scvae.tuning.small_changes`.
    budget
        Seconds that all of it may take.
    test_fraction
        Of the cells, those left out of the search to judge by, drawn at random in equal parts from all batches and
        other categories. Each category keeps a training cell. By default 0.1, and at most 1,000 cells.
    n_samples
        Draws per cell for the importance weighting.
    seed
        Of the choice of cells, the evaluation, and every fit whose configuration does not name its own.
    progress
        Whether to show how far the search has come, and then the final fit.
    **shared
        Arguments of :func:`scvae.fit` for all configurations, each of which can override them: ``batch_key``,
        ``layer``, ``key_added``, …

    Returns
    -------
    Tuned
        The name of the configuration that was ``chosen``, its ``options``, the ``model`` that was fitted with them to
        all cells, and a ``table`` with a row for each configuration and round:

        ``configuration``, ``round``
            Rounds are counted from 1; 0 is that of a configuration for which no time was left.
        ``steps``, ``seconds``
            Of training, and of training and evaluation together.
        ``log_likelihood``
            Importance-weighted estimate, mean over the cells left out, nats a cell; NaN where the loss became NaN or
            infinite in training, which puts a configuration out of the race.
        ``difference``, ``difference_se``
            To the default in the same round: mean over these cells of the paired difference and its standard error.
        ``chosen``
            Whether the row is of the configuration that was chosen.

        To the AnnData is written what :func:`scvae.fit` writes. After an error it is as it was.

    Raises
    ------
    TypeError
        If `adata` is not an AnnData, `configurations` or one of them not a mapping, or an option is not known.
    KeyError
        If a layer or column is missing.
    ValueError
        If `budget` is not above 0; if there is no configuration; if two of them model different data or take the
        library size from different places, which makes their likelihoods incomparable; if there are too few cells to
        leave some out; if what is to be written would overwrite something of the user's; or in one of several processes
        that torchrun started, as the time that is left is not the same in all.
    Exception
        Whatever :func:`scvae.fit` raises, with the name of the configuration in front of the message.

    References
    ----------
    Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization, AISTATS.

    Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders, ICLR.

    Examples
    --------
    >>> import scvae
    >>> from scvae.tuning import tune
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> small = {"n_latent=5": {"n_latent": 5}}
    >>> tuned = tune(adata, small, batch_key="batch", max_epochs=20, n_samples=8, progress=False)
    >>> tuned.chosen in ("default", "n_latent=5"), "X_scvae" in adata.obsm
    (True, True)
    """
    start = perf_counter()
    check_alone("scvae.tune")
    check_anndata(adata, to_write=True)
    budget = real("budget", budget, Range(0, open_least=True))
    n_samples, seed = whole("n_samples", n_samples), seed_of(seed)
    if configurations is None:
        configurations = small_changes(shared)
    if isinstance(configurations, Mapping) and configurations:
        configurations = {_DEFAULT: {}, **configurations}
    arguments = arguments_of(configurations, {"seed": seed, **shared})
    schemas = schemas_of(adata, arguments)
    for (name, options), schema in zip(arguments.items(), schemas, strict=True):
        with naming(name):
            key = check_key("key_added", options.get("key_added", "X_scvae"))
            read: dict[str, list[Any]] = {"obs": schema.columns, "obsm": [schema.use_rep, schema.image_key]}
            check_free(adata, key, obsm=[key, f"{key}_std"], read=read)
    keys = list(dict.fromkeys(key for schema in schemas for key in schema.categories))
    if test_fraction is None:
        test_fraction = min(0.1, _TEST_CELLS / max(1, adata.n_obs))
    is_test = drawn_split(adata, keys, test_fraction, seed)
    train, test = (needed(adata, cells, schemas, arguments) for cells in (~is_test, is_test))

    with Progress(total=_n_fits(len(arguments) - 1), disable=not progress, desc="scvae.tune", unit="fit") as bar:
        search = _Search(arguments, train, test, n_samples, seed, start + budget, bar)
        chosen = search.choice()
    with naming(chosen):
        model = fit(adata, **{**arguments[chosen], "progress": progress})
    table = search.table()
    table["chosen"] = table["configuration"] == chosen
    options = {**shared, **configurations[chosen]}
    return Tuned(table, chosen, options, model, perf_counter() - start)


def small_changes(shared: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configurations that :func:`scvae.tune` tries where none are given.

    Parameters
    ----------
    shared
        The arguments of :func:`scvae.fit` that all of them share.

    Returns
    -------
    dict
        ``"default"``, which changes nothing, and changes of one option each, named after it: those that the program
        knows, and that differ from what is shared.

    Raises
    ------
    TypeError, ValueError
        If there is no such program.

    Examples
    --------
    >>> for name, options in small_changes({"n_latent": 10, "batch_key": "batch"}).items():
    ...     print(name, options)
    default {}
    n_latent=30 {'n_latent': 30}
    prior=normal {'prior': 'normal'}
    likelihood=nb {'likelihood': 'nb'}
    dispersion=gene-batch {'dispersion': 'gene-batch'}
    n_hidden=256 {'n_hidden': 256}
    n_layers=1 {'n_layers': 1}
    learning_rate=0.005 {'learning_rate': 0.005}
    """
    program, chosen = program_of(shared.get("program", "zinb"))
    of_program = program.Options
    usual = {} if of_program is None else {each.name: each.default for each in fields(of_program)}
    given = {name: value for name, value in {**chosen, **shared}.items() if value is not None}
    usual = {**Training(**program.defaults).as_dict(), **usual, **given}
    known = {*Training.names(), *(program.option_names() or ())}
    changes: dict[str, dict[str, Any]] = {_DEFAULT: {}}
    for name, value in _CHANGES:
        if name not in known or usual.get(name) == value:
            continue
        if name == "dispersion" and ("batch_key" not in given or usual.get("likelihood") == "poisson"):
            continue
        if of_program is not None and name in of_program.names():
            try:
                of_program(**{name: value})
            except ValueError:  # another program's word
                continue
        changes[f"{name}={value}"] = {name: value}
    return changes


@dataclass
class _Search:
    """Rounds of fits to the same training cells, judged by the same other cells, until the time is used up."""

    arguments: dict[str, dict[str, Any]]  # the default is among them
    train: AnnData
    test: AnnData
    n_samples: int
    seed: int
    ends: float  # on the clock of perf_counter
    bar: Progress

    rows: list[dict[str, Any]] = field(default_factory=list)
    n_rounds: int = 0
    interrupted: bool = False
    library: str = ""  # where the default takes the library size from
    #: By name and rung: the row of a fit, and the log likelihood of each cell that was left out.
    done: dict[tuple[str, int], tuple[dict[str, Any], np.ndarray]] = field(default_factory=dict)
    #: Steps and seconds of the last fit of each; seconds of the first fit of all beside its training, and of the
    #: fastest one of the first length.
    measured: dict[str, tuple[int, float]] = field(default_factory=dict)
    beside: float = 0.0
    shortest: float = math.inf

    def __post_init__(self) -> None:
        self.planned = {}
        for name, options in self.arguments.items():
            with naming(name):
                self.planned[name] = _planned_steps(options, self.train.n_obs)
        self.expected = {name: most for name, (_, most) in self.planned.items()}
        self.lengths = _lengths(*self.planned[_DEFAULT])
        self.top = len(self.lengths) - 1  # the rung of the default length

    def choice(self) -> str:
        """Return the name of the configuration that is best, or of the default where none is better."""
        with naming(_DEFAULT):
            if _starts_slowly(self.arguments[_DEFAULT]):
                self.fitted(_DEFAULT, 1)  # so that what is compiled is not taken for the time of a step
        self.judge(_DEFAULT, 0)
        fewest, most = self.planned[_DEFAULT]
        if not self.interrupted and self.limit(_DEFAULT) >= min(most, _LIKELY * fewest):
            self.judge(_DEFAULT, self.top)
        others = [name for name in self.arguments if name != _DEFAULT]
        found, rung, is_last = self.round(others, 0), 0, False
        decisive = found if self.top == 0 else pd.DataFrame()  # the first steps of a training say too little of its end
        while not (is_last or self.interrupted) and (following := self.following(found, rung)) is not None:
            names, rung, is_last = following
            found = self.round(names, rung)
            if len(found.columns) > 1:
                decisive = found
        self.bar.total = self.bar.n
        return _better_than_default(decisive.drop(columns=[n for n in _ranked(decisive) if self.is_slow(n)]))

    def is_slow(self, name: str) -> bool:
        """Whether a final fit would end too late, and that of the default would not, or not as late."""
        default = self.takes(_DEFAULT, self.expected[_DEFAULT])
        return not self.affords([name]) and self.takes(name, self.expected[name]) > _MARGIN * default

    def round(self, names: Sequence[str], rung: int) -> pd.DataFrame:
        """Fit the default and others while time is left; return their log likelihoods, ``[n_test, n_fitted]``."""
        found: dict[str, np.ndarray] = {}
        rows = []
        for name in [_DEFAULT, *names]:
            if name != _DEFAULT and not self.affords([name], rung, later=self.aim(name, rung)):
                continue
            self.judge(name, rung)
            if (name, rung) not in self.done:  # it was interrupted
                break
            row, found[name] = self.done[name, rung]
            paired = pd.Series(found[name] - found[_DEFAULT])
            difference = {"difference": paired.mean(skipna=False), "difference_se": paired.sem(skipna=False)}
            rows.append({**row, "round": self.n_rounds + 1, **difference})
        if rows:
            self.n_rounds += 1
        self.rows += rows
        return pd.DataFrame(found)

    def aim(self, name: str, rung: int) -> float:
        """Return the seconds to be kept, in the first round, for a later one with one configuration at least."""
        if rung > 0 or self.top == 0:
            return 0.0
        return _MARGIN * self.seconds([_DEFAULT, name], self.top if (_DEFAULT, self.top) in self.done else 1)

    def judge(self, name: str, rung: int) -> None:
        """Fit one configuration, unless that is done, and evaluate the cells that were left out."""
        if self.interrupted or (name, rung) in self.done:
            return
        self.bar.set_postfix_str(f"round {self.n_rounds + 1}, {name}")
        log_likelihood = np.full(self.test.n_obs, np.nan)
        start = perf_counter()
        with naming(name):
            try:
                model = self.fitted(name, self.lengths[rung])
            except NonFiniteLoss as error:
                if name == _DEFAULT:
                    raise
                n_steps = error.step
            else:
                if model.stopped == "interrupted":
                    return
                n_steps = model.course.n_steps
                self.check_library(name, model)
                given = model.log_likelihood(self.test, n_samples=self.n_samples, seed=self.seed)
                log_likelihood = given.astype(np.float64)
                seconds = perf_counter() - start
                if not self.measured:
                    self.beside = seconds - model.course.seconds
                if rung == 0:
                    self.shortest = min(seconds, self.shortest)
                self.measured[name] = max(1, n_steps), seconds
                if self.lengths[rung] is None and not self.learn_length(name, model):
                    return
        row = {"configuration": name, "steps": n_steps, "seconds": perf_counter() - start}
        self.done[name, rung] = {**row, "log_likelihood": log_likelihood.mean()}, log_likelihood
        self.bar.update()

    def learn_length(self, name: str, model: Fitted) -> bool:
        """Learn from a fit of the default length how long others will be; False if the default was cut short."""
        cut = model.stopped == "finished" and model.course.n_steps < self.planned[name][1]
        likely = math.ceil(_MARGIN * model.course.n_steps)
        if not cut:
            for other, (fewest, most) in self.planned.items():
                if name in (_DEFAULT, other):
                    self.expected[other] = max(fewest, min(most, likely))
        elif name != _DEFAULT:
            self.expected[name] = self.planned[name][1]
        return not cut or name != _DEFAULT

    def fitted(self, name: str, length: int | None) -> Fitted:
        """Return a model of the training cells, after so many steps or the default length of training."""
        options = {**self.arguments[name], "progress": False}
        if length is not None:
            steps = min(length, self.planned[name][1])
            options |= {"max_epochs": None, "min_steps": steps, "max_steps": steps}
        fewest, most = self.planned[name]
        if length is None and fewest < most:
            options["max_steps"] = max(fewest, min(most, self.limit(name)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the final fit gives those that matter
            model = fit(self.train.copy(), **options)
        self.interrupted = model.stopped == "interrupted"
        return model

    def check_library(self, name: str, model: Fitted) -> None:
        """Refuse a configuration that takes the library size from elsewhere than the default does."""
        library = getattr(model.program, "library_kind", "unstated")
        if name == _DEFAULT:
            self.library = library
        elif library != self.library:
            raise ValueError(
                f"It has library={library!r}, the default library={self.library!r}: likelihoods are not comparable "
                "between kinds of library size. Give the kind to all configurations, tune(adata, …, library=…)."
            )

    def following(self, found: pd.DataFrame, rung: int) -> tuple[list[str], int, bool] | None:
        """Return the next round: who stays beside the default, how long they train, and whether it is the last.

        None if there is nobody left, or no time for a round of longer fits.
        """
        top = self.top
        names = [name for name in _ranked(found) if rung < top and self.affords([name], rung + 1)]
        half = names[: max(_FINALISTS, math.ceil(len(names) / 2))]
        if len(half) > _FINALISTS and rung + 2 <= top:
            if self.affords([_DEFAULT, *half], rung + 1, later=self.seconds([_DEFAULT, half[0]], rung + 2)):
                final = self.seconds([_DEFAULT, *half[:_FINALISTS]], top)
                return self.widened(half, found, rung + 1, later=final), rung + 1, False
        for longer in range(top, rung, -1):
            if names and self.affords([_DEFAULT, names[0]], longer):  # the others as far as there is time
                return self.widened(names[:_FINALISTS], found, longer), longer, True
        return None

    def widened(self, kept: list[str], found: pd.DataFrame, rung: int, later: float = 0.0) -> list[str]:
        """Return those that are kept, and those that may be as good as the best, as far as there is time for them."""
        best = found.mean(skipna=False).idxmax()
        for name in _ranked(found)[len(kept) :]:
            paired = found[name] - found[best]
            if paired.mean() + _NOISE * paired.sem() < 0 or not self.affords([_DEFAULT, *kept, name], rung, later):
                break
            kept = [*kept, name]
        return kept

    def affords(self, names: Sequence[str], rung: int | None = None, later: float = 0.0) -> bool:
        """Whether fits, what is to come later, and the final fit of one of them can be expected to end in time."""
        final = max(self.takes(name, self.expected[name]) for name in {_DEFAULT, *names})
        fits = 0.0 if rung is None else self.seconds(names, rung)
        return perf_counter() + fits + later + final <= self.ends

    def limit(self, name: str) -> int:
        """Return after how many steps, from now on, there is just time for the final fit of the default."""
        fixed, final = self.fixed(), self.takes(_DEFAULT, self.expected[_DEFAULT])
        pace = max(self.takes(name, 1) - fixed, 1e-9)
        return int((self.ends - perf_counter() - final - fixed) / pace)

    def seconds(self, names: Sequence[str], rung: int) -> float:
        """Return how long fits and their evaluation can be expected to take, but for those that are done."""
        length, total = self.lengths[rung], 0.0
        for name in names:
            if (name, rung) not in self.done:
                steps = self.expected[name] if length is None else min(length, self.expected[name])
                total += self.takes(name, steps)
        return total

    def takes(self, name: str, steps: int) -> float:
        """Return the seconds that a fit of so many steps can be expected to take, no fewer than those of the default.

        What was not measured is expected to be as fast as the default.
        """
        fixed = self.fixed()
        paces = [(seconds - fixed) / n for who, (n, seconds) in self.measured.items() if who in (_DEFAULT, name)]
        return fixed + max(paces) * steps

    def fixed(self) -> float:
        """Return the seconds of a fit and its evaluation that do not depend on its length.

        Reading, compiling and capturing are told apart from the steps by a long fit of the default and the fastest of
        the short ones, as the very first may have compiled what the others find.
        """
        fits = {rung: row for (name, rung), (row, _) in self.done.items() if name == _DEFAULT}
        long, short, n_short = fits[max(fits)], self.shortest, self.lengths[0]
        if n_short is None or long["steps"] <= n_short or long["seconds"] <= short:
            return self.beside
        slope = (long["seconds"] - short) / (long["steps"] - n_short)
        return min(max(0.0, short - slope * n_short), long["seconds"] / 2)

    def table(self) -> pd.DataFrame:
        """Return the rows, after those of configurations that no time was left for."""
        tried = {row["configuration"] for row in self.rows}
        untried = [
            {"configuration": name, "round": 0, "steps": 0, "seconds": 0.0}
            for name in self.arguments
            if name not in tried
        ]
        columns = ["configuration", "round", "steps", "seconds", "log_likelihood", "difference", "difference_se"]
        return pd.DataFrame([*untried, *self.rows], columns=columns)


def _starts_slowly(options: Mapping[str, Any]) -> bool:
    """Whether the first fit of the process takes much longer than others: a GPU is set up, or loops are compiled."""
    if device_of(options.get("device", "auto")).type != "cpu":
        return True
    return options["program"].kind == "counts" and not options["program"].of_images and not loops_are_compiled()


def _planned_steps(options: Mapping[str, Any], n_cells: int) -> tuple[int, int]:
    """Return the fewest and the most steps of a fit with these arguments."""
    given = {name: value for name, value in options.items() if name in Training.names() and value is not None}
    training, _ = split_options(options["program"], given)
    n_trained = n_cells - training.n_held_out(n_cells)
    return training.n_steps(n_minibatches(n_trained, training.batch_size))


def _lengths(fewest: int, most: int) -> list[int | None]:
    """Return lengths of training, in steps, each twice the one before; None, the last, is the default length."""
    lengths: list[int | None] = []
    steps = max(1, min(_FIRST_STEPS, fewest // 4))
    while steps < fewest:
        lengths.append(steps)
        steps *= 2
    return [*lengths, *([fewest] if fewest < most else []), None]


def _n_fits(n: int) -> int:
    """Return how many fits there are where `n` configurations and the default go through all the rounds."""
    total = n + 1
    while n:
        n, is_last = max(min(n, _FINALISTS), math.ceil(n / 2)), n <= 2 * _FINALISTS
        total += n + 1
        if is_last:
            break
    return total


def _ranked(found: pd.DataFrame) -> list[str]:
    """Return the names beside the default's, the best first, without those whose loss was not finite."""
    means = found.drop(columns=_DEFAULT, errors="ignore").mean(skipna=False)
    return list(means[np.isfinite(means)].sort_values(ascending=False, kind="stable").index)


def _better_than_default(found: pd.DataFrame) -> str:
    """Return the best of those that are better than the default beyond the noise, or the default."""
    for name in _ranked(found):
        paired = found[name] - found[_DEFAULT]
        if paired.mean() > _NOISE * paired.sem():
            return name
    return _DEFAULT
