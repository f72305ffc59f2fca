"""Models side by side, by what they say of cells that they have not seen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae.boundary.containers import check_anndata
from scvae.boundary.options import seed_of, whole
from scvae.fits.configurations import arguments_of, drawn_split, given_split, naming, needed, schemas_of
from scvae.fitting import fit
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
    arguments = arguments_of(configurations, {"seed": seed, "progress": False, **shared})
    schemas = schemas_of(adata, arguments)
    keys = list(dict.fromkeys(key for schema in schemas for key in schema.categories))
    if split_key is None:
        is_test = drawn_split(adata, keys, test_fraction, seed)
    else:
        is_test = given_split(adata, keys, split_key)

    train, test = (needed(adata, cells, schemas, arguments) for cells in (~is_test, is_test))
    log_likelihoods, rows = {}, {}
    bar = Progress(arguments.items(), disable=not progress, desc="scvae.compare", unit="fit")
    for name, options in bar:
        bar.set_postfix_str(str(name))
        with naming(name):
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
