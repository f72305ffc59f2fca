"""Small real and simulated data, and well-known public sets by download.

:func:`cell_lines`, :func:`pbmc68k` and :func:`simulated_batches` work offline. :func:`pbmc3k`, :func:`bone_marrow` and
:func:`lymph_node` fetch a public file once, check it against its published SHA-256 and keep it in the
user's cache folder; they need the extra ``datasets``: ``pip install "scvae-pyro[datasets]"``.

Every function returns an :class:`~anndata.AnnData` with raw counts in ``.X`` (CSR, float32).
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.special import expit, logit, softmax

__all__ = ["bone_marrow", "cell_lines", "lymph_node", "pbmc3k", "pbmc68k", "simulated_batches"]


def cell_lines() -> AnnData:
    """Raw counts of 796 cells of five human lung cancer lines, in three experiments, offline.

    A batch effect of which the truth is known: cells of the same lines went through three experiments, two by CEL-seq2
    and one by Drop-seq, and the genotype of each cell tells its line. Three of the lines are in all three experiments,
    and two, A549 and H838, in one of them. The genes are the 2,000 that vary most within the experiments.

    Returns
    -------
    AnnData
        796 cells × 2,000 genes. ``.obs``: ``batch``, the experiment (``celseq2``, ``celseq2_5cl_p1``, ``dropseq``);
        ``cell_line`` (A549, H1975, H2228, H838, HCC827); ``doublet``, whether the genotypes are of two lines, as of a
        quarter of the cells, whose ``cell_line`` is one of the two; ``split``, a fixed one: 717 cells to fit a model
        to (``train``) and 79 to judge it by (``test``). ``.var_names`` are Ensembl ids.

    References
    ----------
    Tian et al. (2019), Benchmarking single cell RNA-sequencing analysis pipelines using mixture control experiments,
    Nature Methods 16:479; GSE118767. The tables are those of https://github.com/LuyiTian/sc_mixology (MIT License,
    © 2018 Luyi Tian).

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.cell_lines()
    >>> adata.shape, list(adata.obs["batch"].cat.categories)
    ((796, 2000), ['celseq2', 'celseq2_5cl_p1', 'dropseq'])
    """
    import anndata

    shipped = Path(__file__).parent / "data" / "cell_lines.h5ad"
    if not shipped.exists():  # it is put there when the package is built, and lies beside the package in a checkout
        shipped = Path(__file__).parents[1] / "data" / "cell_lines.h5ad"
    return _raw_counts(anndata.read_h5ad(shipped))


def pbmc68k() -> AnnData:
    """Raw counts of 700 human blood cells, with their cell types, offline.

    Scanpy ships these cells log-normalised to 10,000 counts, ``x = log1p(1e4 y / n)``, where ``n`` is the
    cell's total over all genes of the assay, and keeps ``n`` in ``.obs["n_counts"]``. This inverts the
    normalisation, ``y = expm1(x) n / 1e4``. The file holds ``x`` to three decimals, which leaves no doubt
    about any integer ``y`` below 1,000: normalising the recovered counts again gives back ``x`` to within
    that rounding, and this is checked for every value.

    Returns
    -------
    AnnData
        700 cells x 765 genes. ``.obs``: ``cell_type`` (10 types), ``n_counts`` (total of the cell over all
        genes of the assay, of which the 765 are a part), ``n_genes``, ``percent_mito``, ``phase`` (cell
        cycle). ``.var_names`` are gene symbols.

    Raises
    ------
    RuntimeError
        The installed scanpy ships other values, from which integer counts cannot be recovered.

    References
    ----------
    Zheng et al. (2017), Massively parallel digital transcriptional profiling of single cells, Nature
    Communications 8:14049. The file is that of :func:`scanpy.datasets.pbmc68k_reduced`.

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.pbmc68k()
    >>> adata.shape, float(adata.X.max())
    ((700, 765), 259.0)
    """
    import scanpy

    source = scanpy.datasets.pbmc68k_reduced()
    columns = {"bulk_labels": "cell_type"}
    obs = source.obs[["bulk_labels", "n_counts", "n_genes", "percent_mito", "phase"]].rename(columns=columns)
    counts = _counts_from_log_normalised(source.raw.X, obs["n_counts"].to_numpy(), decimals=3)
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=source.raw.var_names.copy()))


def _counts_from_log_normalised(values, n_counts: np.ndarray, decimals: int) -> sparse.csr_matrix:
    """Integer counts ``y`` with ``round(log1p(1e4 y / n_counts), decimals) == values``, or RuntimeError."""
    values = sparse.csr_matrix(values, dtype=np.float64)
    scale = np.repeat(n_counts.astype(np.float64) / 1e4, np.diff(values.indptr))
    counts = np.rint(np.expm1(values.data) * scale)
    error = np.abs(np.log1p(counts / scale) - values.data)
    tolerance = 0.5 * 10.0**-decimals * 1.001  # the values are float32 numbers
    # An integer further off than half a count would be another integer: the tolerance must tell them apart.
    unsure = (error > tolerance) | (tolerance * (counts + scale) >= 0.5) | (counts < 1)
    if unsure.any():
        first = int(np.flatnonzero(unsure)[0])
        cell = int(np.searchsorted(values.indptr, first, side="right")) - 1
        raise RuntimeError(
            f"raw counts cannot be recovered: {int(unsure.sum())} of {unsure.size} values are not the "
            f"logarithm of a normalised integer; the first is {values.data[first]:.6g} in cell {cell}, "
            f"gene {values.indices[first]}. The installed scanpy ships another version of this file: "
            "use another data set, or scanpy 1.10 or 1.11."
        )
    counts = counts.astype(np.float32)
    return sparse.csr_matrix((counts, values.indices, values.indptr), shape=values.shape).sorted_indices()


def simulated_batches(
    n_cells: int = 1000,
    n_genes: int = 200,
    n_types: int = 5,
    n_batches: int = 3,
    *,
    n_latent: int = 5,
    type_scale: float = 2.0,
    batch_scale: float = 0.3,
    library_size: float = 1000.0,
    library_scale: float = 0.3,
    dispersion: float = 2.0,
    dropout: float = 0.1,
    seed: int = 0,
) -> AnnData:
    r"""Draw counts from the zero-inflated negative binomial model itself, with everything known.

    For cell ``n`` of type ``k`` and batch ``s``, and gene ``g``:

    .. math::

        \mu_k &\sim \mathrm{Normal}(0, \mathtt{type\_scale}^2 I), \qquad z_n \sim \mathrm{Normal}(\mu_k, I) \\
        b_s &\sim \mathrm{Normal}(0, \mathtt{batch\_scale}^2 I), \qquad
               \rho_n = \mathrm{softmax}(a + W z_n + b_s) \\
        \ell_n &\sim \mathrm{LogNormal}(m_s, \mathtt{library\_scale}^2) \\
        w_{ng} &\sim \mathrm{Gamma}(\theta_g, \mathrm{rate} = \theta_g / (\ell_n \rho_{ng})) \\
        y_{ng} &\sim \mathrm{Poisson}(w_{ng}), \qquad h_{ng} \sim \mathrm{Bernoulli}(\pi_g) \\
        x_{ng} &= (1 - h_{ng}) \, y_{ng}

    A cell whose counts are all zero is drawn again, counts only, until one is not: the counts of a cell
    follow the model given that the cell is not empty, as in data from which empty droplets were removed.
    At the default library size this changes nothing.

    Cells are simulated in chunks, so that memory is needed for the non-zero counts only.

    Parameters
    ----------
    n_cells, n_genes, n_types, n_batches
        Sizes. Types and batches are assigned at random: types in unequal proportions, alike in all batches.
    n_latent
        Dimensions of ``z``.
    type_scale
        Spread of the type centres, in units of the spread of the cells within a type.
    batch_scale
        Standard deviation of the batch effect on log expression.
    library_size
        Median total count of a cell before dropout; each batch has its own, spread by ``library_scale``.
    library_scale
        Standard deviation of log library size, between batches and within one.
    dispersion
        Median inverse dispersion ``theta`` over genes; large means Poisson.
    dropout
        Median probability over genes that a count is lost; 0 gives the negative binomial.
    seed
        The same seed and sizes give the same data.

    Returns
    -------
    AnnData
        ``.X`` counts, CSR float32 ``[n_cells, n_genes]``; ``.obs``: ``batch``, ``cell_type`` (categorical),
        ``library`` (true ``l``, in counts); ``.obsm["latent"]`` true ``z``; ``.var``: ``log_expression``
        (``a``), ``dispersion`` (``theta``), ``dropout`` (``pi``); ``.varm``: ``loadings`` (``W``),
        ``batch_effect`` (``b``, one column a batch); ``.uns["library_location"]`` (``m``, one a batch).

    Raises
    ------
    ValueError
        A size below one, a negative scale, a probability outside [0, 1), or a model under which cells are
        almost always empty.

    References
    ----------
    Lopez et al. (2018), Deep generative modeling for single-cell transcriptomics, Nature Methods 15:1053.

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.simulated_batches(n_cells=50, n_genes=20, seed=1)
    >>> adata.shape, adata.obs["batch"].nunique(), bool((adata.X.sum(1) > 0).all())
    ((50, 20), 3, True)
    """
    sizes = dict(n_cells=n_cells, n_genes=n_genes, n_types=n_types, n_batches=n_batches, n_latent=n_latent)
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    scales = dict(type_scale=type_scale, batch_scale=batch_scale, library_scale=library_scale)
    for name, scale in scales.items():
        if not 0 <= scale < np.inf:
            raise ValueError(f"{name} must be zero or positive and finite, not {scale}")
    for name, scale in dict(library_size=library_size, dispersion=dispersion).items():
        if not 0 < scale < np.inf:
            raise ValueError(f"{name} must be positive and finite, not {scale}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability in [0, 1), not {dropout}")

    rng = np.random.default_rng(seed)
    log_expression = rng.normal(0, 1, n_genes)
    loadings = rng.normal(0, 1 / np.sqrt(n_latent), (n_genes, n_latent))
    batch_effect = rng.normal(0, batch_scale, (n_genes, n_batches))
    theta = dispersion * np.exp(rng.normal(0, 0.5, n_genes))
    pi = expit(logit(dropout) + rng.normal(0, 0.5, n_genes))
    centres = rng.normal(0, type_scale, (n_types, n_latent))
    library_location = np.log(library_size) + rng.normal(0, library_scale, n_batches)

    cell_type = rng.choice(n_types, n_cells, p=rng.dirichlet(np.full(n_types, 5.0)))
    batch = rng.integers(n_batches, size=n_cells)
    latent = (centres[cell_type] + rng.normal(size=(n_cells, n_latent))).astype(np.float32)
    library = np.exp(rng.normal(library_location[batch], library_scale))

    chunk = max(1, 2**21 // n_genes)
    blocks = []
    for start in range(0, n_cells, chunk):
        cells = slice(start, start + chunk)
        logits = log_expression + latent[cells] @ loadings.T + batch_effect.T[batch[cells]]
        mean = library[cells, None] * softmax(logits, axis=1)
        blocks.append(sparse.csr_matrix(_nonempty_counts(rng, mean, theta, pi)))

    return AnnData(
        sparse.vstack(blocks, format="csr"),
        obs=pd.DataFrame(
            {
                "batch": _named_categories("batch", batch, n_batches),
                "cell_type": _named_categories("type", cell_type, n_types),
                "library": library,
            },
            index=[f"cell_{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(
            {"log_expression": log_expression, "dispersion": theta, "dropout": pi},
            index=[f"gene_{i}" for i in range(n_genes)],
        ),
        obsm={"latent": latent},
        varm={"loadings": loadings, "batch_effect": batch_effect},
        uns={"library_location": library_location},
    )


def _nonempty_counts(
    rng: np.random.Generator, mean: np.ndarray, theta: np.ndarray, pi: np.ndarray, max_draws: int = 1000
) -> np.ndarray:
    """Draw ZINB counts by Gamma, Poisson and Bernoulli, ``[n, G]``; all-zero rows are drawn again."""
    counts = np.zeros(mean.shape, dtype=np.float32)
    empty = np.arange(len(mean))
    for _ in range(max_draws):
        rate = rng.standard_gamma(theta, size=(len(empty), len(theta))) * (mean[empty] / theta)
        rate[rng.random(rate.shape) < pi] = 0
        counts[empty] = rng.poisson(rate)
        empty = empty[~counts[empty].any(axis=1)]
        if not len(empty):
            return counts
    raise ValueError(
        f"{len(empty)} cells stayed without a single count in {max_draws} draws: "
        "raise library_size or n_genes, or lower dropout"
    )


def _named_categories(prefix: str, codes: np.ndarray, n: int) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, [f"{prefix}_{i}" for i in range(n)])


# name of the file in the cache: address, SHA-256
_REGISTRY = {
    "pbmc3k_raw.h5ad": (
        "https://exampledata.scverse.org/scanpy/pbmc3k_raw.h5ad",
        "89a96f1beaa2dd83a687666d3f19a4513ac27a2a2d12581fcd77afed7ea653a1",
    ),
    "bone_marrow_s1d1.h5": (
        "https://exampledata.scverse.org/tutorials/neurips-2021/s1d1_filtered_feature_bc_matrix.h5",
        "322c30a7a4905f7f113472442d4aa2c81a1ad736c86651f6c0b81e5b2ff94ac8",
    ),
    "bone_marrow_s1d3.h5": (
        "https://exampledata.scverse.org/tutorials/neurips-2021/s1d3_filtered_feature_bc_matrix.h5",
        "ca40b287fac57ac2048f11f56f1b630c7c188718908fc217c6baf2e49bdb1982",
    ),
    "lymph_node.h5": (
        "https://cf.10xgenomics.com/samples/spatial-exp/1.1.0/V1_Human_Lymph_Node/"
        "V1_Human_Lymph_Node_filtered_feature_bc_matrix.h5",
        "86fd533eb907450e7125b9820183a0ca73776eeafcc5eddae5695b6aabfd9139",
    ),
}


def pbmc3k(cache_dir: str | Path | None = None) -> AnnData:
    """Raw counts of 2,700 blood cells of one healthy donor (5.9 MB download).

    Parameters
    ----------
    cache_dir
        Folder that keeps the file; the user's cache folder if None.

    Returns
    -------
    AnnData
        2,700 cells x 32,738 genes.

    Raises
    ------
    ValueError
        The file that arrived is not the published one; it is not kept.
    ImportError
        pooch is not installed.

    References
    ----------
    10x Genomics, 3k PBMCs from a healthy donor, Cell Ranger 1.1.0, as hosted for scanpy.
    """
    import anndata

    return _raw_counts(anndata.read_h5ad(_fetch("pbmc3k_raw.h5ad", cache_dir)))


def bone_marrow(cache_dir: str | Path | None = None) -> AnnData:
    """Raw counts of 17,125 bone marrow cells of two donors, one batch each (43 MB download).

    Parameters
    ----------
    cache_dir
        Folder that keeps the files; the user's cache folder if None.

    Returns
    -------
    AnnData
        17,125 cells x 36,601 genes, ``.obs["batch"]`` (``s1d1``, ``s1d3``).

    Raises
    ------
    ValueError
        A file that arrived is not the published one; it is not kept.
    ImportError
        pooch is not installed.

    References
    ----------
    Luecken et al. (2021), A sandbox for prediction and integration of DNA, RNA, and proteins in single cells,
    NeurIPS datasets and benchmarks; GSE194122, site 1, donors 1 and 3, doi:10.6084/m9.figshare.22716739.
    """
    import anndata

    samples = {name: _read_10x(_fetch(f"bone_marrow_{name}.h5", cache_dir)) for name in ("s1d1", "s1d3")}
    adata = anndata.concat(samples, label="batch", index_unique="-", merge="same")
    return _raw_counts(adata)


def lymph_node(cache_dir: str | Path | None = None) -> AnnData:
    """Raw counts of 4,035 Visium spots of a human lymph node; every spot covers several cells.

    Parameters
    ----------
    cache_dir
        Folder that keeps the file; the user's cache folder if None.

    Returns
    -------
    AnnData
        4,035 spots x 36,601 genes.

    Raises
    ------
    ValueError
        The file that arrived is not the published one; it is not kept.
    ImportError
        pooch is not installed.

    References
    ----------
    10x Genomics, V1_Human_Lymph_Node, Space Ranger 1.1.0.
    """
    return _raw_counts(_read_10x(_fetch("lymph_node.h5", cache_dir)))


def _fetch(name: str, cache_dir: str | Path | None) -> str:
    """Path of a file of the registry, downloaded if the cache does not hold it with the right checksum."""
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ImportError('downloads need pooch: pip install "scvae-pyro[datasets]"') from error
    url, sha256 = _REGISTRY[name]
    path = pooch.os_cache("scvae") if cache_dir is None else cache_dir
    return pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=name, path=path)


def _read_10x(path: str) -> AnnData:
    import scanpy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")  # mended in the next line
        adata = scanpy.read_10x_h5(path)
    adata.var_names_make_unique()
    return adata


def _raw_counts(adata: AnnData) -> AnnData:
    adata.X = sparse.csr_matrix(adata.X, dtype=np.float32)
    return adata
