"""Configurations of a fit, by name, the data that they ask for, and cells that none of them is fitted to."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvae.boundary.options import Range, real
from scvae.data.cells import Key, Schema
from scvae.data.reading import categories_of, column_of, matrix_of, read_schema, rows_of, some, where_of
from scvae.fits.choices import program_of, split_options
from scvae.fitting import fit

__all__ = ["arguments_of", "drawn_split", "given_split", "naming", "needed", "schemas_of"]


def arguments_of(configurations: Any, shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
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
        with naming(name):
            if not isinstance(configuration, Mapping):
                raise TypeError(f"It maps arguments of scvae.fit to values; it is not {configuration!r}.")
            options = {"program": "zinb", **shared, **configuration}
            options["program"], chosen = program_of(options["program"])
            options = {**chosen, **options}
            split_options(options["program"], {k: v for k, v in options.items() if k not in of_fit})
            arguments[name] = options
    return arguments


def schemas_of(adata: AnnData, arguments: dict[str, dict[str, Any]]) -> list[Schema]:
    """Return how each configuration reads the cells; all of them model the same numbers."""
    of_schema = inspect.signature(read_schema).parameters.keys() - {"adata", "kind"}
    schemas = {}
    for name, options in arguments.items():
        with naming(name), warnings.catch_warnings():
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


def needed(adata: AnnData, cells: np.ndarray, schemas: list[Schema], arguments: dict[str, dict[str, Any]]) -> AnnData:
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
    data = replace(schema, batch_key=None, size_factor_key=None, categories={}, continuous={}, check_counts=True)
    return replace(data, labels_key=None, unlabeled=None, labels=(), n_labelled=0)


def drawn_split(adata: AnnData, keys: list[Key], test_fraction: float, seed: int) -> np.ndarray:
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


def given_split(adata: AnnData, keys: list[Key], split_key: str) -> np.ndarray:
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


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a configuration in front of the message of whatever is raised within the block."""
    try:
        yield
    except Exception as error:
        message, *rest = error.args or ("",)
        error.args = (f"Configuration {name!r}: {message}", *rest)
        raise
