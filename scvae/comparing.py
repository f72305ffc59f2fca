"""Models side by side, by what they say of cells that they have not seen."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae.boundary.containers import check_anndata
from scvae.boundary.options import Range, real, seed_of, whole
from scvae.data.cells import Key, Schema
from scvae.data.reading import categories_of, column_of, matrix_of, read_schema, rows_of, some, where_of
from scvae.fitting import fit, program_of, split_options
from scvae.inference.progress import Progress

__all__ = ["compare"]

_ELBO_SAMPLES = 16  # for the test cells, of which there may be few; the KL terms need no draws


def compare(
    adata: AnnData,
    configurations: Mapping[str, Mapping[str, Any]],
    *,
    test_fraction: float = 0.1,
    split_key: str | None = None,
    n_samples: int = 256,
    seed: int = 0,
    progress: bool = True,
    **shared: Any,
) -> pd.DataFrame:
    r"""Fit several configurations to the same cells, and tell how likely each makes the same other cells.

    Models are compared by the importance-weighted estimate of :math:`\log p(x \mid s)` of the test cells. Cells differ
    far more among themselves than models do, so that the standard error of a mean says little about which model is
    better; that of the *paired* difference, cell by cell, does: two models differ where their difference is several
    times its standard error. It covers the choice of cells, not of seeds: to see what a fit owes to its seed, give the
    same configuration several times, with ``"seed": 1``, ``"seed": 2``, …. Covariates are given, not predicted: one
    that was computed from the counts (their total, say) flatters its model.

    Parameters
    ----------
    adata
        Cells by genes, as for :func:`scvae.fit`; left as it is, for copies are fitted.
    configurations
        The keyword arguments of :func:`scvae.fit` for each model, by a name of your choice.
    test_fraction
        Of the cells, drawn at random to be tested, in equal parts from all batches and other categories that a
        configuration names. Each category keeps a training cell. Evaluation takes time in proportion to the test
        cells and `n_samples`; a few thousand are enough.
    split_key
        Column of ``adata.obs`` that says ``"train"`` or ``"test"`` of each cell, in place of a random split.
    n_samples
        Draws per cell for the importance weighting.
    seed
        Of the split, the evaluation, and every fit whose configuration does not name its own.
    progress
        Whether to show a progress bar.
    **shared
        Arguments of :func:`scvae.fit` for all configurations, each of which can override them.

    Returns
    -------
    pandas.DataFrame
        A row for each configuration, the best first:

        ``log_likelihood``, ``log_likelihood_se``
            Importance-weighted estimate (Burda et al. 2016, equation 8), mean over test cells and its standard error,
            nats a cell: a lower bound in expectation, which tightens with `n_samples`.
        ``difference``, ``difference_se``
            To the best, mean over test cells of the paired difference and its standard error, nats a cell.
        ``elbo``, ``train_elbo``
            Evidence lower bound, mean over test and training cells, nats a cell. Overfitting drives them apart.
        ``seconds``
            That the fit took.
        ``n_parameters``
            Numbers that were fitted.
        ``stopped``
            Why training ended: ``"converged"``, ``"finished"`` or ``"interrupted"`` (Ctrl-C goes on to the next one).
        ``library``
            Where the program takes the library size from: its attribute ``library_kind``, of
            :class:`~scvae.programs.ZINB` its option ``library``; ``"unstated"`` of a program without it. A library size
            that is taken from the data says something of the counts before their likelihood is asked for, so
            likelihoods are comparable within one kind of library only: each kind is ranked by itself, below the other,
            with differences to the best of its kind, and a warning names them.

    Raises
    ------
    TypeError
        If `adata` is not an AnnData, `configurations` or one of them not a mapping, or an option is not known.
    KeyError
        If a layer or column is missing.
    ValueError
        If there is no configuration; if two of them model different data (another layer or representation, other
        genes, counts and real numbers), which makes their likelihoods incomparable; if the split leaves fewer than two
        cells on one side, has other values than ``"train"`` and ``"test"``, or tests a category that is not trained;
        if `n_samples` is below 1.
    Exception
        Whatever :func:`scvae.fit` raises, with the name of the configuration in front of the message.

    References
    ----------
    Burda, Grosse and Salakhutdinov 2016, Importance Weighted Autoencoders, ICLR.

    Examples
    --------
    >>> import scvae
    >>> from scvae.comparing import compare
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> likelihoods = {"counts without spread": {"likelihood": "poisson"}, "with spread": {"likelihood": "nb"}}
    >>> table = compare(adata, likelihoods, batch_key="batch", max_epochs=20, n_samples=8, progress=False)
    >>> list(table.index)
    ['with spread', 'counts without spread']
    """
    check_anndata(adata)
    n_samples, seed = whole("n_samples", n_samples), seed_of(seed)
    arguments = _arguments(configurations, {"seed": seed, "progress": False, **shared})
    schemas = _schemas(adata, arguments)
    keys = list(dict.fromkeys(key for schema in schemas for key in schema.categories))
    if split_key is None:
        is_test = _drawn_split(adata, keys, test_fraction, seed)
    else:
        is_test = _given_split(adata, keys, split_key)

    train, test = (_needed(adata, cells, schemas, arguments) for cells in (~is_test, is_test))
    log_likelihoods, rows = {}, {}
    bar = Progress(arguments.items(), disable=not progress, desc="scvae.compare", unit="fit")
    for name, options in bar:
        bar.set_postfix_str(str(name))
        with _naming(name):
            start = perf_counter()
            model = fit(train.copy(), **options)
            seconds = perf_counter() - start
            log_likelihoods[name] = model.log_likelihood(test, n_samples=n_samples, seed=seed).astype(np.float64)
            rows[name] = {
                "elbo": model.elbo(test, n_samples=_ELBO_SAMPLES, seed=seed).mean(dtype=np.float64),
                "train_elbo": model.elbo(train, seed=seed).mean(dtype=np.float64),
                "seconds": seconds,
                "n_parameters": sum(parameter.numel() for parameter in model.program.parameters()),
                "stopped": model.stopped,
                "library": getattr(model.program, "library_kind", "unstated"),
            }
    return _ranked(pd.DataFrame(log_likelihoods), pd.DataFrame.from_dict(rows, orient="index"))


def _arguments(configurations: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Merge each configuration with what all share; the names of the options are known, the program is its class."""
    if not isinstance(configurations, Mapping):
        raise TypeError(
            "configurations maps names to arguments of scvae.fit, as in {'nb': {'likelihood': 'nb'}}; it is not "
            f"{configurations!r}."
        )
    if not configurations:
        raise ValueError("There is no configuration to fit: give at least one, {'a name': {arguments of scvae.fit}}.")
    of_fit = inspect.signature(fit).parameters.keys() - {"adata"}
    arguments = {}
    for name, configuration in configurations.items():
        with _naming(name):
            if not isinstance(configuration, Mapping):
                raise TypeError(f"It maps arguments of scvae.fit to values; it is not {configuration!r}.")
            options = {"program": "zinb", **shared, **configuration}
            options["program"], chosen = program_of(options["program"])
            options = {**chosen, **options}
            split_options(options["program"], {k: v for k, v in options.items() if k not in of_fit})
            arguments[name] = options
    return arguments


def _schemas(adata: AnnData, arguments: dict[str, dict[str, Any]]) -> list[Schema]:
    """Return how each configuration reads the cells; all of them model the same numbers."""
    of_schema = inspect.signature(read_schema).parameters.keys() - {"adata", "kind"}
    schemas = {}
    for name, options in arguments.items():
        with _naming(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit gives them
            how = {k: v for k, v in options.items() if k in of_schema}
            schemas[name] = read_schema(adata, kind=options["program"].kind_of(options), **how)
    (first, data), *others = [(name, _without_covariates(schema)) for name, schema in schemas.items()]
    for name, other in others:
        if other != data:
            what = [field.name for field in fields(Schema) if getattr(other, field.name) != getattr(data, field.name)]
            raise ValueError(
                f"Configurations {first!r} and {name!r} model different data ({', '.join(what)}): their likelihoods "
                "are not comparable. Let all read the same values (layer, use_rep) of the same genes (mask_var)."
            )
    return list(schemas.values())


def _needed(adata: AnnData, cells: np.ndarray, schemas: list[Schema], arguments: dict[str, dict[str, Any]]) -> AnnData:
    """Return a copy of some cells with what the models read, and with nothing else."""
    (schema, *_), masks = schemas, {options.get("mask_var", "auto") for options in arguments.values()}
    obs = adata.obs.loc[cells, list(dict.fromkeys(column for each in schemas for column in each.columns))].copy()
    var = adata.var[[column for column in adata.var if column in masks or column == "highly_variable"]].copy()
    needed = AnnData(obs=obs, var=var)
    key = schema.use_rep or schema.image_key
    if key is not None:
        needed.obsm[key] = adata.obsm[key][cells].copy()
        return needed
    matrix, _ = matrix_of(adata, schema.layer)
    rows = rows_of(matrix, cells)
    if schema.layer is None:
        needed.X = rows
    else:
        needed.layers[schema.layer] = rows
    return needed


def _without_covariates(schema: Schema) -> Schema:
    """Return what is modelled: the rest of a schema is what the model is told."""
    return replace(schema, batch_key=None, size_factor_key=None, categories={}, continuous={}, check_counts=True)


def _drawn_split(adata: AnnData, keys: list[Key], test_fraction: float, seed: int) -> np.ndarray:
    """Draw the test cells, ``[n_cells]`` of booleans, stratified by all keys together."""
    test_fraction = real("test_fraction", test_fraction, Range(0, 1, open_least=True, open_most=True))
    order = np.random.default_rng(seed).permutation(adata.n_obs)
    columns = pd.DataFrame({str(key): categories_of(adata, key)[order] for key in keys}, index=range(len(order)))
    is_only = np.zeros(adata.n_obs, dtype=bool)  # the cell by which a category stays in the training
    for key in columns:
        is_only |= ~columns[key].duplicated().to_numpy()
    strata = columns.groupby(list(columns)).ngroup().to_numpy() if keys else np.zeros(adata.n_obs)
    by_stratum = np.argsort(strata, kind="stable")
    free = order[by_stratum][~is_only[by_stratum]]
    n_test = round(test_fraction * adata.n_obs)
    if not 2 <= n_test <= min(len(free), adata.n_obs - 2):
        raise ValueError(
            f"test_fraction={test_fraction} would take {n_test} of {adata.n_obs} cells: at least two are needed on "
            "either side, and one of each category in the training."
        )
    is_test = np.zeros(adata.n_obs, dtype=bool)
    is_test[free[np.arange(n_test) * len(free) // n_test]] = True  # evenly spread, so each stratum gives its share
    return is_test


def _given_split(adata: AnnData, keys: list[Key], split_key: str) -> np.ndarray:
    """Read the test cells off a column, ``[n_cells]`` of booleans."""
    column = column_of(adata, split_key).astype(str)
    if wrong := sorted(set(column) - {"train", "test"}):
        raise ValueError(f"adata.obs[{split_key!r}] says 'train' or 'test' of each cell, not {some(wrong)}.")
    is_test = (column == "test").to_numpy()
    if min(is_test.sum(), (~is_test).sum()) < 2:
        raise ValueError(
            f"adata.obs[{split_key!r}] has {is_test.sum()} test cells and {(~is_test).sum()} training cells: at least "
            "two of each are needed."
        )
    for key in keys:
        names = categories_of(adata, key)
        if unseen := sorted(set(names[is_test]) - set(names[~is_test])):
            raise ValueError(
                f"{where_of(key)} is {some(unseen)} in test cells but in no training cell: a model knows only the "
                f"categories that it was fitted to. Move some of those cells to 'train' in adata.obs[{split_key!r}]."
            )
    return is_test


def _ranked(log_likelihoods: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Put together the table out of the log likelihoods, ``[n_test, n_configurations]``, and what else is known."""
    parts = []
    for _, kind in rows.groupby("library", sort=False):
        names = log_likelihoods[kind.index].mean().sort_values(ascending=False, kind="stable").index
        cells = log_likelihoods[names]
        paired = cells.sub(cells[names[0]], axis=0)
        evidence = {
            "log_likelihood": cells.mean(),
            "log_likelihood_se": cells.sem(),
            "difference": paired.mean(),
            "difference_se": paired.sem(),
        }
        parts.append(pd.DataFrame(evidence).join(kind))
    if len(parts) > 1:
        kinds = "; ".join(f"library={part['library'].iloc[0]!r}: {', '.join(map(repr, part.index))}" for part in parts)
        warnings.warn(
            f"Likelihoods are not comparable between kinds of library size, for one that is taken from the data tells "
            f"of the counts beforehand ({kinds}). Each kind is ranked by itself.",
            stacklevel=3,
        )
    parts.sort(key=lambda part: part["log_likelihood"].iloc[0], reverse=True)
    return pd.concat(parts).rename_axis("configuration")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of a configuration in front of the message of whatever is raised within the block."""
    try:
        yield
    except Exception as error:
        message, *rest = error.args or ("",)
        error.args = (f"Configuration {name!r}: {message}", *rest)
        raise
