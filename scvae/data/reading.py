"""From an AnnData to :class:`~scvae.data.cells.Cells`: every kind of matrix, every check and message on bad input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from scvae.boundary.containers import check_anndata, check_sparse
from scvae.boundary.options import names_of, one_of
from scvae.data.categories import combined, name_of, named
from scvae.data.cells import Cells, Key, Schema

__all__ = [
    "categories_of",
    "check_not_empty",
    "check_values",
    "column_of",
    "counts_of",
    "covariates_of",
    "labels_of",
    "matrix_of",
    "read_cells",
    "read_schema",
    "rows_of",
    "some",
    "where_of",
    "with_new_batches",
]

_LARGEST = 1e30  # which single precision still squares in the logarithm of a likelihood
_LARGEST_WHOLE = 1 << 24  # up to which single precision holds every whole number
_BLOCK = 1 << 24  # entries looked at in one go, which bounds the memory of the checks and of dense input


def read_schema(
    adata: AnnData,
    *,
    kind: str = "counts",
    layer: str | None = None,
    use_rep: str | None = None,
    image_key: str | None = None,
    batch_key: str | Sequence[str] | None = None,
    categorical_covariate_keys: str | Sequence[str] | None = (),
    continuous_covariate_keys: str | Sequence[str] | None = (),
    size_factor_key: str | None = None,
    labels_key: str | None = None,
    unlabeled: str | None = "Unknown",
    mask_var: str | None = "auto",
    check_counts: bool = True,
) -> Schema:
    """Read the names off an AnnData, which is one, or off :class:`~scvae.data.tables.Tables`.

    The arguments are those of :func:`scvae.fit`, `kind` that of the program.
    """
    batch_keys = names_of("batch_key", batch_key)
    batch: Key | None = tuple(batch_keys) if len(batch_keys) > 1 else batch_keys[0] if batch_keys else None
    image_shape = None
    if image_key is not None:
        if use_rep is not None or layer is not None or mask_var not in (None, "auto"):
            raise ValueError("image_key takes the place of layer, use_rep and mask_var: pass it, or them.")
        image_shape = _images(adata, image_key).shape[1:]
        genes = pd.Index([f"{image_key}_{i}" for i in range(math.prod(image_shape))])
    elif use_rep is None:
        genes = adata.var_names[_gene_mask(adata, mask_var)].astype(str)
        if not len(genes):
            raise ValueError(f"No gene is selected by mask_var={mask_var!r}; the AnnData has {adata.n_vars}.")
        _check_unique(genes)
    elif layer is not None or mask_var not in (None, "auto"):
        raise ValueError("use_rep takes the place of layer and mask_var: pass it, or them.")
    else:
        genes = _representation(adata, use_rep).columns
    categories: dict[Key, tuple[Any, ...]] = {}
    others = names_of("categorical_covariate_keys", categorical_covariate_keys)
    for key in others if batch is None else [batch, *others]:
        _, names = _named(adata, key)
        if len(names) == 1:
            warnings.warn(
                f"{where_of(key)} has the single category {name_of(names[0])!r}, so it explains nothing.", stacklevel=4
            )
        categories[key] = tuple(names)
    continuous = {}
    for key in names_of("continuous_covariate_keys", continuous_covariate_keys):
        values = _numbers(adata, key)
        if values.min() == values.max():
            warnings.warn(f"adata.obs[{key!r}] is {values[0]:g} in all cells, so it explains nothing.", stacklevel=4)
        continuous[key] = (float(values.mean()), float(values.std()) if values.min() < values.max() else 1.0)
    y, labels = (np.empty(0), []) if labels_key is None else labels_of(adata, labels_key, unlabeled)
    if labels_key is not None and len(labels) < 2:
        what = f"the single label {labels[0]!r}, so it tells nothing apart" if labels else "no label"
        warnings.warn(f"{where_of(labels_key)} names {what}.", stacklevel=4)
    return Schema(
        genes=tuple(genes),
        kind=kind,
        layer=layer,
        use_rep=use_rep,
        image_key=image_key,
        image_shape=image_shape,
        batch_key=batch,
        size_factor_key=size_factor_key,
        labels_key=labels_key,
        unlabeled=None if labels_key is None or unlabeled is None else name_of(unlabeled),
        labels=tuple(labels),
        n_labelled=int((y >= 0).sum()),
        categories=categories,
        continuous=continuous,
        check_counts=check_counts,
    )


def read_cells(
    adata: AnnData,
    schema: Schema,
    *,
    device: torch.device | str = "cpu",
    unknown_batch: str = "error",
    missing_genes: str = "error",
    mask_var: str | None = None,
    with_labels: bool = False,
) -> Cells:
    """Read and check an AnnData, which is left as it is.

    Parameters
    ----------
    adata
        CSR, CSC, dense, backed or dask; a view or not; any numeric dtype.
    schema
        Which genes and covariates to read.
    device
        Where to keep them.
    unknown_batch
        What to do with cells of categories that the model has not seen: ``"error"``, or ``"ignore"``, which
        leaves the covariate of such cells out; or ``"marginal"``, which does so with the batch alone.
    missing_genes
        What to do if genes of the model are missing: ``"error"``; ``"zero"``; or ``"impute"``, which marks them as not
        measured.
    mask_var
        By what the genes were chosen, for a message; None where they are those of a fitted model.
    with_labels
        Whether to read the labels, where the schema has any: they are for training only.

    Raises
    ------
    KeyError
        If a layer or column is missing.
    ValueError
        If counts or covariates are not what a count model can be given; the message names the first cells
        or genes that are at fault.
    """
    check_anndata(adata)
    if adata.n_obs == 0:
        raise ValueError("The AnnData has no cells.")
    one_of("unknown_batch", unknown_batch, ("error", "ignore", "marginal"))
    one_of("missing_genes", missing_genes, ("error", "zero", "impute"))
    codes, continuous, size_factor = covariates_of(adata, schema, unknown_batch)
    if schema.image_key is not None:
        images, where = _images(adata, schema.image_key), f"adata.obsm[{schema.image_key!r}]"
        if images.shape[1:] != schema.image_shape:
            raise ValueError(
                f"{where} holds images of shape {images.shape[1:]}; the model was fitted to {schema.image_shape}."
            )
        matrix, names = images.reshape(len(images), -1), pd.Index(schema.genes)
    elif schema.use_rep is None:
        matrix, where = matrix_of(adata, schema.layer)
        names = adata.var_names.astype(str)
    else:
        frame, where = _representation(adata, schema.use_rep), f"adata.obsm[{schema.use_rep!r}]"
        matrix, names = frame.to_numpy(), frame.columns
    columns = _columns(names, schema.genes, missing_genes, adata)
    missing = None
    if columns is not None:
        _warn_of_few(columns, schema.genes, adata)
        missing = columns < 0 if missing_genes == "impute" and (columns < 0).any() else None
    counts = _csr(matrix, columns)
    check_values(counts, adata, schema, where)
    if schema.kind == "counts" and schema.image_key is None:
        check_not_empty(counts, adata, schema, where, mask_var)
    labels = None
    if with_labels and schema.labels_key is not None and schema.labels:
        labels, _ = labels_of(adata, schema.labels_key, schema.unlabeled)
    # Counts that lie in the AnnData as they are wanted take no memory of their own, which no narrower type betters.
    is_shared = sparse.issparse(matrix) and not adata.is_view and np.may_share_memory(counts.data, matrix.data)
    narrow = not is_shared or counts.dtype != np.float32 or torch.device(device).type != "cpu"
    return Cells(counts, codes, continuous, schema, size_factor, device, missing, labels, narrow)


def covariates_of(
    adata: AnnData, schema: Schema, unknown_batch: str = "error"
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return what is known of the cells of an AnnData, or of :class:`~scvae.data.tables.Tables`, beside their counts.

    Returns
    -------
    codes, continuous, size_factor
        Codes of the categories, ``[n_cells, n_keys]``; standardised continuous covariates, ``[n_cells, n_continuous]``;
        size factors, ``[n_cells]``, or None. See :func:`read_cells`.
    """
    codes = np.empty((adata.n_obs, len(schema.categories)), dtype=np.int32)
    for i, (key, names) in enumerate(schema.categories.items()):
        is_left_out = unknown_batch == "ignore" or (unknown_batch == "marginal" and key == schema.batch_key)
        codes[:, i] = _codes(adata, key, names, "ignore" if is_left_out else "error", key == schema.batch_key)
    continuous = np.empty((adata.n_obs, len(schema.continuous)), dtype=np.float32)
    for i, (key, (mean, std)) in enumerate(schema.continuous.items()):
        continuous[:, i] = (_numbers(adata, key) - mean) / std
    size_factor = None
    if schema.size_factor_key is not None:
        size_factor = _numbers(adata, schema.size_factor_key)
        if (size_factor <= 0).any():
            raise ValueError(
                f"adata.obs[{schema.size_factor_key!r}] is not positive in "
                f"{_these(adata, size_factor <= 0, 'leave them out')}."
            )
    return codes, continuous, size_factor


def with_new_batches(adata: AnnData, schema: Schema, batch_key: Key | None = None) -> tuple[Schema, np.ndarray]:
    """Return a schema that knows the batches of other cells too, after its own, and which cells are of new ones.

    Parameters
    ----------
    adata
        The cells.
    schema
        Of a model with batches.
    batch_key
        Where these cells have their batch, if not where those of the model have it.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If it is missing in some cells.
    """
    own: Any = schema.batch_key
    codes, names = _named(adata, own if batch_key is None else batch_key)
    known = set(schema.categories[own])
    new = tuple(name for name in names if name not in known)
    categories = {**schema.categories, own: (*schema.categories[own], *new)}
    return replace(schema, categories=categories), np.isin(codes, [i for i, name in enumerate(names) if name in new])


def counts_of(
    adata: AnnData, *, layer: str | None = None, mask_var: str | None = "auto", schema: Schema | None = None
) -> sparse.csr_matrix:
    """Return the counts of the genes of a layer that are marked, or of those that a schema names, unchecked."""
    if schema is None:
        return _csr(matrix_of(adata, layer)[0], np.flatnonzero(_gene_mask(adata, mask_var)))
    columns = _columns(adata.var_names.astype(str), schema.genes, "zero", adata)
    return _csr(matrix_of(adata, schema.layer)[0], columns)


def some(names: Any, what: str = "") -> str:
    """Return the first few of many names, for a message."""
    names = list(names)
    shown = ", ".join(repr(str(name)) for name in names[:5]) + (", …" if len(names) > 5 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})" if what else shown


def column_of(adata: AnnData, key: str | int) -> pd.Series:
    """Return a column of ``.obs`` without missing values.

    Raises
    ------
    KeyError
        If there is no such column.
    ValueError
        If it is there twice, or is missing in some cells.
    """
    column = _any_column_of(adata, key)
    missing = column.isna().to_numpy()
    if missing.any():
        left_out = f"fill it in, or leave those cells out, adata = adata[adata.obs[{key!r}].notna()].copy()"
        raise ValueError(
            f"adata.obs[{key!r}] is missing (NaN) in "
            f"{_these(adata, missing, left_out, 'fill it in, or name another column')}."
        )
    return column


def _any_column_of(adata: AnnData, key: str | int) -> pd.Series:
    """Return a column of ``.obs``, values of which may be missing."""
    if key not in adata.obs:
        raise KeyError(f"adata.obs has no column {key!r}; it has {some(adata.obs.columns) or 'none'}.")
    column = adata.obs[key]
    if isinstance(column, pd.DataFrame):
        raise ValueError(
            f"adata.obs has {column.shape[1]} columns of the name {key!r}: keep one, "
            "adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]."
        )
    return column


def labels_of(adata: AnnData, key: str, unlabeled: str | None) -> tuple[np.ndarray, list[str]]:
    """Return the code of each cell's label, ``[n_cells]``, -1 where it has none, and the names of the labels."""
    column = _any_column_of(adata, key)
    known = column.notna().to_numpy()
    codes = np.full(adata.n_obs, -1)
    codes[known], names = named(column[known], where_of(key))
    none = None if unlabeled is None else name_of(unlabeled)
    labels = [name for name in names if name != none]
    alike = [name for name in names if none is not None and name.casefold() == none.casefold()]
    if alike and none not in alike:
        raise ValueError(
            f"{where_of(key)} calls cells {alike[0]!r}, which would be a label, as unlabeled={none!r} is written "
            f"otherwise: pass unlabeled={alike[0]!r}, or None if it is a label."
        )
    place = np.array([*(labels.index(name) if name != none else -1 for name in names), -1])
    return place[codes], labels


def _these(adata: AnnData, cells: np.ndarray, remedy: str, remedy_of_all: str = "name another column") -> str:
    """Return which cells are at fault and what to do, for a message."""
    if cells.all():
        return f"all {len(cells)} cells: {remedy_of_all}"
    return f"{some(adata.obs_names[cells], 'cell')}: {remedy}"


def where_of(key: Key) -> str:
    """Return what a covariate is called in a message."""
    return f"adata.obs[{list(key) if isinstance(key, tuple) else key!r}]"


def categories_of(adata: AnnData, key: Key) -> np.ndarray:
    """Return the name of each cell's category, or combination of several, ``[n_cells]``, text."""
    codes, names = _named(adata, key)
    return np.array(list(map(name_of, names)), dtype=object)[codes]


def _named(adata: AnnData, key: Key) -> tuple[np.ndarray, list[Any]]:
    """Return the codes and names of a covariate, or of the combinations of several."""
    if isinstance(key, tuple):
        return combined([named(column_of(adata, each), where_of(each)) for each in key], where_of(key))
    return named(column_of(adata, key), where_of(key))


def _numbers(adata: AnnData, key: str) -> np.ndarray:
    column = column_of(adata, key)
    if not pd.api.types.is_numeric_dtype(column):
        raise ValueError(
            f"adata.obs[{key!r}] is not numeric ({column.dtype}): convert it, or name it as a categorical covariate."
        )
    values = column.to_numpy(dtype=np.float64)
    infinite = ~np.isfinite(values)
    if infinite.any():
        raise ValueError(f"adata.obs[{key!r}] is not finite in {_these(adata, infinite, 'leave those cells out')}.")
    return values


def _codes(adata: AnnData, key: Key, known: Sequence[Any], unknown: str, is_batch: bool) -> np.ndarray:
    """Return the code of each cell among the categories that a model knows, -1 for others."""
    codes, names = _named(adata, key)
    places = {name: i for i, name in enumerate(known)}
    new = [name_of(name) for name in names if name not in places]
    if new and unknown == "error":
        raise ValueError(
            f"{where_of(key)} has categories that the model was not fitted to: {some(new)}; it knows "
            f"{some(map(name_of, known))}. Pass unknown_batch='ignore' to take such cells without it"
            + (", or 'marginal' as of the batches that suit them; or extend the model, model.extend(adata)" * is_batch)
            + "."
        )
    return np.array([places.get(name, -1) for name in names], dtype=np.int64)[codes]


def _gene_mask(adata: AnnData, mask_var: str | None) -> np.ndarray:
    if mask_var == "auto":
        mask_var = "highly_variable" if "highly_variable" in adata.var else None
    if mask_var is None:
        return np.ones(adata.n_vars, dtype=bool)
    if mask_var not in adata.var:
        raise KeyError(f"adata.var has no column {mask_var!r}; it has {some(adata.var.columns) or 'none'}.")
    mask = adata.var[mask_var]
    if isinstance(mask, pd.DataFrame):
        raise ValueError(f"adata.var has {mask.shape[1]} columns of the name {mask_var!r}: keep one of them.")
    if mask.isna().any() or not mask.isin([True, False]).all():
        column = f"adata.var[{mask_var!r}]"
        holds = "missing values, as after a concatenation" if mask.isna().any() else f"values such as {mask.iloc[0]!r}"
        raise ValueError(
            f"{column} is not a column of True and False; it holds {holds}. Take what says true: "
            f"{column} = {column}.astype(str).str.lower() == 'true'. Or model all genes, mask_var=None."
        )
    return mask.to_numpy(dtype=bool)


def _check_unique(names: pd.Index) -> None:
    if not names.is_unique:
        raise ValueError(
            f"adata.var_names has repeats, {some(names[names.duplicated()].unique())}: genes are matched by name. Call "
            "adata.var_names_make_unique() first."
        )


def _representation(adata: AnnData, use_rep: str) -> pd.DataFrame:
    """Return an entry of ``.obsm`` with names of its columns."""
    if use_rep not in adata.obsm:
        raise KeyError(f"adata.obsm has no {use_rep!r}; it has {some(adata.obsm.keys()) or 'none'}.")
    values = adata.obsm[use_rep]
    if isinstance(values, pd.DataFrame):
        values = values.rename(columns=str)
    else:
        values = values.toarray() if sparse.issparse(values) else np.asarray(values)
        if values.ndim != 2:
            raise ValueError(
                f"adata.obsm[{use_rep!r}] is of shape {values.shape}: a table of cells by features is wanted."
            )
        values = pd.DataFrame(values, columns=[f"{use_rep}_{i}" for i in range(values.shape[1])])
    if not all(dtype.kind in "biuf" for dtype in values.dtypes):
        raise ValueError(f"adata.obsm[{use_rep!r}] is not numeric.")
    if not values.shape[1]:
        raise ValueError(f"adata.obsm[{use_rep!r}] has no columns.")
    if not values.columns.is_unique:
        raise ValueError(f"adata.obsm[{use_rep!r}] has repeats, {some(values.columns[values.columns.duplicated()])}.")
    return values


def _images(adata: AnnData, image_key: str) -> np.ndarray:
    """Return an entry of ``.obsm`` that holds an image of each cell."""
    if image_key not in adata.obsm:
        raise KeyError(f"adata.obsm has no {image_key!r}; it has {some(adata.obsm.keys()) or 'none'}.")
    images = np.asarray(adata.obsm[image_key])
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"adata.obsm[{image_key!r}] is of shape {images.shape}: images are wanted, [cells, height, width] or "
            "[cells, channels, height, width]."
        )
    if images.dtype.kind not in "biuf":
        raise ValueError(f"adata.obsm[{image_key!r}] is not numeric ({images.dtype}).")
    return images


def _columns(names: pd.Index, genes: Sequence[str], missing_genes: str, adata: AnnData) -> np.ndarray | None:
    """Column of each gene, -1 where it is missing; None where the columns are the genes."""
    if len(names) == len(genes) and (names == np.asarray(genes)).all():
        return None
    wanted = names.isin(genes)
    _check_unique(names[wanted])
    found = np.flatnonzero(wanted)
    columns = pd.Series(found, index=names[wanted]).reindex(list(genes)).fillna(-1).to_numpy(dtype=np.int64)
    missing = np.asarray(genes)[columns < 0]
    if len(missing) == len(genes):
        raise ValueError(
            f"None of the {len(genes)} genes of the model is in the AnnData, "
            + (f"whose genes are called {some(names)}, " if len(names) else "which has none, ")
            + f"those of the model {some(genes)}: ids or symbols? {_other_names(adata, genes)}"
        )
    if len(missing) and missing_genes == "error":
        raise ValueError(
            f"The AnnData lacks {some(missing, 'gene')} of the {len(genes)} that the model was fitted to. Pass "
            "missing_genes='zero' to take their counts for 0, or 'impute' to take them as not measured."
        )
    return columns


def _warn_of_few(columns: np.ndarray, genes: Sequence[str], adata: AnnData) -> None:
    n_here = int((columns >= 0).sum())
    if 2 * n_here < len(genes):
        warnings.warn(
            f"The AnnData has only {n_here} of the {len(genes)} genes of the model, and what the model says of these "
            f"cells means little. Are the others there by other names? {_other_names(adata, genes)}",
            stacklevel=5,
        )


def _other_names(adata: AnnData, genes: Sequence[str]) -> str:
    """Return how to rename the genes, if a column of ``.var`` has the names that are wanted."""
    best, n_best = "", 0
    for column in adata.var.columns if adata.var.columns.is_unique else ():
        n_known = int(adata.var[column].astype(str).isin(genes).sum())
        best, n_best = (column, n_known) if n_known > n_best else (best, n_best)
    if 2 * n_best < len(genes):
        return "Rename them, adata.var_names = …, to what the model calls them."
    return f"Rename them: adata.var_names = adata.var[{best!r}].astype(str); adata.var_names_make_unique()."


def matrix_of(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    """Return the matrix of values, and what it is called in a message."""
    if layer is None:
        matrix, where = adata.X, "adata.X"
        if matrix is None:
            raise ValueError(
                f"adata.X is empty: name the layer that holds the counts, layer=….{_counts_elsewhere(adata, layer)}"
            )
    else:
        if layer not in adata.layers:
            names = [name for name in adata.layers if name is not None]  # None is .X, from anndata 0.13 on
            raise KeyError(
                f"adata.layers has no {layer!r}; it has {some(names) or 'none'}.{_counts_elsewhere(adata, layer)}"
            )
        matrix, where = adata.layers[layer], f"adata.layers[{layer!r}]"
    if sparse.issparse(matrix) and matrix.format in ("csr", "csc"):
        check_sparse(matrix, where, adata.obs_names if matrix.format == "csr" else adata.var_names)
    if matrix.dtype.kind not in "biuf":
        raise ValueError(f"{where} is not numeric ({matrix.dtype}): name the layer that holds the counts, layer=….")
    return matrix, where


def _counts_elsewhere(adata: AnnData, layer: str | None) -> str:
    """Return where there are counts, if not in the layer that was named (None is ``.X``), and how to have them read."""
    if layer is not None and adata.X is not None and _are_whole(adata.X):
        return f" Whole numbers are in adata.X: leave layer=… out, or adata.layers[{layer!r}] = adata.X."
    for name, matrix in adata.layers.items():
        if name not in (None, layer) and _are_whole(matrix):
            if layer is not None:
                return f" Whole numbers are in adata.layers[{name!r}]: pass layer={name!r}."
            return (
                f" Whole numbers are in adata.layers[{name!r}]: pass layer={name!r}, or, for a model that was fitted "
                f"to adata.X before, adata.X = adata.layers[{name!r}]."
            )
    if adata.raw is None or not _are_whole(adata.raw.X):
        return ""
    if not adata.var_names.isin(adata.raw.var_names).all():
        return " Whole numbers are in adata.raw: adata = adata.raw.to_adata()."
    name = layer or "counts"
    return (
        f" Whole numbers are in adata.raw: adata.layers[{name!r}] = adata.raw[:, adata.var_names].X, and pass "
        f"layer={name!r}."
    )


def _are_whole(matrix: Any) -> bool:
    """Whether the first values of a matrix are counts."""
    some_rows = matrix[: max(1, 100_000 // max(1, matrix.shape[1]))]
    values = some_rows.data if sparse.issparse(some_rows) else np.asarray(some_rows)
    return (
        values.dtype.kind in "biuf" and bool(np.all((values >= 0) & (values == np.rint(values)))) and bool(values.any())
    )


def rows_of(matrix: Any, rows: np.ndarray) -> Any:
    """Return some rows of any kind of matrix, in memory, as CSR or dense."""
    if getattr(matrix, "format", None) == "csc" and not sparse.issparse(matrix):
        matrix = matrix.to_memory()
    chosen = matrix[np.flatnonzero(rows)]
    return chosen.compute() if hasattr(chosen, "compute") else chosen


def _csr(matrix: Any, columns: np.ndarray | None) -> sparse.csr_matrix:
    """Any kind of matrix as canonical CSR of the columns asked for; shares the input's memory where it can."""
    if getattr(matrix, "format", None) == "csc" and not sparse.issparse(matrix):
        matrix = matrix.to_memory()  # on disk, where its rows cannot be read alone
    if sparse.issparse(matrix):
        counts = sparse.csr_matrix(_choose(matrix, columns))
    else:
        blocks = [sparse.csr_matrix(_choose(_storable(block), columns)) for block in _blocks(matrix)]
        counts = blocks[0] if len(blocks) == 1 else sparse.vstack(blocks, format="csr")
    if not counts.has_canonical_format or not counts.data.all():
        # Repeated entries are added up in a type that holds their sum.
        counts = counts.astype(np.int64 if counts.dtype.kind in "biu" else np.float64, copy=True)
        counts.sum_duplicates()
        counts.eliminate_zeros()
    return counts


def _blocks(matrix: Any) -> Iterator[Any]:
    """Go through the rows of a matrix that is dense, on disk or of dask, a block in memory at a time."""
    if hasattr(matrix, "numblocks"):  # dask: chunk by chunk, each of which is computed once
        for i in range(matrix.numblocks[0]):
            yield matrix.blocks[i].compute()
    else:
        step = max(1, _BLOCK // max(1, matrix.shape[1]))
        for i in range(0, matrix.shape[0], step):
            block = matrix[i : i + step]
            if sparse.issparse(block):
                check_sparse(block, "The matrix on disk", range(i, i + step))
            yield block


def _storable(block: Any) -> Any:
    """Half precision and foreign byte orders as what scipy.sparse knows."""
    dtype = np.dtype(np.float32) if block.dtype == np.float16 else block.dtype.newbyteorder("=")
    return block.astype(dtype, copy=False)


def _choose(matrix: Any, columns: np.ndarray | None) -> Any:
    """Select columns, zeros where the column is -1."""
    if columns is None:
        return matrix
    here = columns >= 0
    if here.all():
        return matrix[:, columns]
    counts = sparse.coo_matrix(matrix[:, columns[here]])
    return sparse.csr_matrix(
        (counts.data, (counts.row, np.flatnonzero(here)[counts.col])), shape=(matrix.shape[0], len(columns))
    )


def check_values(counts: sparse.csr_matrix, adata: AnnData, schema: Schema, where: str) -> None:
    """Refuse values that cannot be modelled, ``[n_cells, n_genes]``; the message names the first cells and genes."""
    kind = counts.dtype.kind
    feature = "gene" if schema.image_key is None else "pixel"
    faults: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if kind == "f":
        faults["NaN or infinite values"] = lambda x: ~np.isfinite(x)
    if schema.kind == "unit":
        faults["values outside 0 to 1"] = lambda x: (x < 0) | (x > 1)
    if kind in "if" and schema.kind == "counts":
        faults["negative values"] = lambda x: x < 0
    if kind == "f" and schema.kind == "counts" and schema.check_counts:
        faults["values that are not whole numbers"] = lambda x: x != np.rint(x)
    if kind in "iuf" and counts.dtype.itemsize > 2:
        faults["values that are too large for single precision"] = lambda x: np.abs(x.astype(np.float64)) > _LARGEST
    for what, is_wrong in faults.items():
        first: list[int] = []
        n_wrong = 0
        for i in range(0, counts.nnz, _BLOCK):
            wrong = i + np.flatnonzero(is_wrong(counts.data[i : i + _BLOCK]))
            first = [*first, *wrong[:3]][:3]
            n_wrong += len(wrong)
        if n_wrong:
            cells = np.searchsorted(counts.indptr, first, side="right") - 1
            at = "; ".join(
                f"{counts.data[k]} in cell {adata.obs_names[i]!r}, {feature} {schema.genes[counts.indices[k]]!r}"
                for i, k in zip(cells, first, strict=True)
            )
            remedy = _remedy(what, adata, schema)
            raise ValueError(f"{where} holds {what}, {n_wrong} of them, the first: {at}. {remedy}")
    if schema.kind == "counts" and counts.nnz and counts.data.max() > _LARGEST_WHOLE:
        k = int(counts.data.argmax())
        cell = adata.obs_names[np.searchsorted(counts.indptr, k, side="right") - 1]
        warnings.warn(
            f"{where} holds counts above {_LARGEST_WHOLE:,}, the largest {counts.data[k]} in cell {cell!r}, {feature} "
            f"{schema.genes[counts.indices[k]]!r}: single precision rounds them to some seven digits.",
            stacklevel=4,
        )


def _remedy(what: str, adata: AnnData, schema: Schema) -> str:
    """Return what to do about values that cannot be modelled, for a message."""
    if "large" in what:
        return f"Numbers are taken up to {_LARGEST:.3g}: look at those cells, or change the units."
    if schema.kind == "real" or (schema.kind == "unit" and "NaN" in what):
        return "Fill them in, or leave those cells out."
    if schema.kind == "unit":
        return "Divide the images by their largest value, or model other pixels, pixels=…."
    if schema.image_key is not None:
        return "These pixels are counts, which are whole numbers: model other pixels, pixels=…."
    if elsewhere := _counts_elsewhere(adata, schema.layer):
        return f"A count model wants raw counts.{elsewhere}"
    corrected = " Counts that were corrected upstream, and not normalised, are taken with check_counts=False."
    return (
        "A count model wants raw counts: name the layer that has them, layer=…, or read them from before they were "
        "normalised. Real numbers are modelled by program='gaussian'." + corrected * ("whole" in what)
    )


def check_not_empty(
    counts: sparse.csr_matrix, adata: AnnData, schema: Schema, where: str, mask_var: str | None
) -> None:
    """Refuse cells without a count; the message names the first of them."""
    empty = np.diff(counts.indptr) == 0
    if not empty.any():
        return
    if empty.all():
        raise ValueError(
            f"{where} is empty in all {len(empty)} cells: none of the {len(schema.genes)} genes that are modelled has "
            "a count in any. Name the layer that holds the counts, layer=…, or model other genes, mask_var=…."
        )
    layer = "" if schema.layer is None else f", layer={schema.layer!r}"
    of = ", model=model" if mask_var is None else f"{layer}, mask_var={mask_var!r}"
    raise ValueError(
        f"{where} is empty in {some(adata.obs_names[empty], 'cell')}: none of the {len(schema.genes)} genes that are "
        f"modelled has a count there. Leave such cells out, adata = adata[scvae.pp.has_counts(adata{of})].copy()"
        + (", or model more genes, mask_var=None." if mask_var is not None else ".")
    )
