"""One call from an AnnData to its latent space."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anndata import AnnData

from scvae.boundary.containers import Files
from scvae.boundary.keys import check_key
from scvae.boundary.options import Options, seed_of
from scvae.boundary.process import alone, device_of
from scvae.boundary.ranks import ranks_of
from scvae.data.cells import Cells
from scvae.data.reading import some
from scvae.fits.choices import choice_of
from scvae.fits.sources import source_of
from scvae.fits.writing import check_writable
from scvae.fitted import Fitted
from scvae.inference.checkpoints import checkpoints_in
from scvae.inference.progress import say
from scvae.inference.svi import NonFiniteLoss, train
from scvae.kernels.operations import loops_are_compiled
from scvae.programs import Program

__all__ = ["fit"]


def fit(
    adata: AnnData | Files,
    program: str | type[Program] | Options = "zinb",
    *,
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
    n_latent: int | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
    seed: int = 0,
    key_added: str = "X_scvae",
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    resume: bool = False,
    memory: str | int | None = None,
    output: str | Path | None = None,
    n_top_genes: int | None = None,
    store: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Fitted:
    """Fit a generative model to raw counts, and write the cells' latent coordinates to the AnnData.

    The processes that ``torchrun`` started train one model together: each has to make the same call, and gets the same.

    Parameters
    ----------
    adata
        Cells by genes. Raw counts, or what the program models, in ``.X`` or in `layer`: CSR, CSC, dense, backed, dask.
        Or, where they are too many for the memory, the path of an ``.h5ad`` file, a ``.zarr`` folder or an annbatch
        collection, or several paths; see *Cells in files* below.
    program
        Name of a program (``"zinb"`` for counts, ``"gaussian"`` for real numbers, ``"vq"`` and ``"vq_gaussian"`` for
        discrete codes of either, ``"pose"`` and ``"matrix_normal"`` for images), its options
        (``scvae.programs.ZINB.Options(prior="normal")``), or a :class:`~scvae.programs.Program` class of your own.
    layer
        Key of ``adata.layers`` that holds the counts; by default they are in ``adata.X``.
    use_rep
        Key of ``adata.obsm`` that holds what is to be modelled, in place of the genes: ``"X_pca"``, a protein panel.
    image_key
        Key of ``adata.obsm`` that holds an image of each cell, ``[n_cells, height, width]`` or ``[n_cells, channels,
        height, width]``, for the programs of images.
    batch_key
        Column of ``adata.obs`` whose effect is to be taken out of the latent space. Of several columns, each
        combination that occurs is a batch.
    categorical_covariate_keys, continuous_covariate_keys
        Further columns whose effect is to be taken out. Continuous ones are standardised.
    labels_key
        Column of ``adata.obs`` with labels, such as cell types, of some of the cells or all. Components of the mixture
        prior then stand for labels, and labels tell cells apart that counts alone do not. A label may be wrong: the
        rate of errors is learnt.
    unlabeled
        What that column says of cells whose label is not known; missing values say so in any case.
    size_factor_key
        Column of ``adata.obs`` with size factors, for ``library="size_factor"``, which it implies.
    mask_var
        Column of ``adata.var`` that marks the genes to model. By default ``"highly_variable"`` where there is such a
        column, else all genes; None takes all of them in any case.
    check_counts
        False accepts counts that are not whole numbers (corrected for ambient RNA, say).
    n_latent
        Dimensions of the latent space; by default what the program takes, 20 of ``"zinb"``.
    max_epochs
        Passes through the cells; by default the data decide when the training ends.
    batch_size
        Cells in a minibatch, at least 2; of several processes together, two for each.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …; ``torchrun`` gives each process a
        GPU of its own.
    seed
        Makes the fit repeatable on the same machine and device, whatever else runs there; programs of images with the
        same number of threads (``torch.get_num_threads()``). The caller's random state is left as it was.
    key_added
        Key of ``adata.obsm`` to write to, such as ``"X_mine"``; all else that is written is named after it. What an
        earlier fit wrote under the same key is replaced.
    checkpoint
        Folder for checkpoints of the training, which is made if need be and else is to be empty. With it, SIGTERM,
        SIGHUP and SIGUSR1 end the fit in order, within seconds: a checkpoint is written, and ``SystemExit`` is raised
        with the exit code 75. After Ctrl-C a checkpoint is written too, and the model is returned as it is then.
    checkpoint_minutes
        Between two checkpoints.
    resume
        Whether to go on from the newest checkpoint in that folder; where there is none, the training begins. The data
        and all arguments are to be those of before, and then the weights come out as they would have without an
        interruption: on a CPU the same numbers, bit by bit.
    memory
        Of cells in files: how much memory they may take, such as ``"500MB"``; by default ``"2GB"``. An AnnData that is
        backed by a file is read into memory as a whole unless this is given.
    output
        Of cells in files: the ``.h5ad`` file or ``.zarr`` folder to which the results are written. A file that is there
        is replaced.
    n_top_genes
        Of cells in files: so many highly variable genes are chosen, as
        ``scanpy.pp.highly_variable_genes(flavor="seurat_v3")`` does, of those that `mask_var` marks, and modelled.
    store
        Of cells in files: the folder of their store; by default beside the file, with ``.scvae`` after its name, or
        where that cannot be, in the user's cache folder.
    progress
        Whether to say what is fitted and to show a progress bar.
    **options
        Options of the program (:class:`scvae.programs.ZINB.Options`: ``likelihood``, ``dispersion``, ``library``,
        ``posterior``, ``prior``, ``n_hidden``, …) and of the training (:class:`scvae.inference.svi.Training`:
        ``learning_rate``, ``kl_weight``, ``validation_fraction``, …).

    Returns
    -------
    Fitted
        The fitted model. To the AnnData are written, and nothing else: ``.obsm[key_added]``, the posterior mean of
        each cell, ``[n_cells, n_latent]``; ``.obsm[key_added + "_std"]``, its standard deviation; what else the program
        infers of each cell in ``.obs["scvae_…"]`` (the library latent, as counts; the cluster, with
        ``prior="mixture"``) or ``.obsm[key_added + "_…"]``; with a linear decoder the loadings of the genes,
        ``.varm[key_added + "_loadings"]``; ``.uns["scvae"]``, parameters and history. With
        `labels_key`, ``.obs["scvae_label"]`` is the likeliest label of each cell by its counts, whatever label it was
        given, ``.obs["scvae_label_probability"]`` its probability, and ``.obsm[key_added + "_label_probability"]`` that
        of each label, ``[n_cells, n_labels]``, in the order of the categories of ``.obs["scvae_label"]``. With
        ``key_added="X_mine"`` these are ``.obs["mine_…"]`` and ``.uns["mine"]``.

    Notes
    -----
    *Cells in files* are checked and written, in an order drawn at random and in types as narrow as can be, to a store
    (:mod:`scvae.data.shuffling`), which a later fit to the same files uses again. Where that takes no more than half of
    `memory` it is loaded, and else read a window at a time while the model is trained (:mod:`scvae.data.stored`). The
    results, if they are wanted, go to `output`: a copy of the file, to which is written what would be written to the
    AnnData; of several files, what is known of their cells, without the counts. Files that are given are left as they
    are.

    Raises
    ------
    KeyError
        If a layer or column is missing.
    ValueError
        If the counts or covariates cannot be modelled, the message naming the first cells or genes at fault; if an
        option is out of its range; if what is to be written would overwrite something of the user's; if the
        checkpoints are of other data, of another training or of another version of the package, or cannot be read; or
        if several processes were not given the same, or are too many for `batch_size`.
    OSError
        If the folder of checkpoints is not empty and `resume` is not set, cannot be written to, or another training
        writes to it.
    SystemExit
        If a signal ended the training and it can be gone on with; its code is 75.
    TypeError
        If an option is not known, or `adata` is neither an AnnData nor names files of cells.
    scvae.inference.svi.NonFiniteLoss
        If the loss becomes NaN or infinite. The AnnData is then as it was.

    Examples
    --------
    >>> import scvae
    >>> adata = scvae.datasets.simulated_batches(n_cells=200, n_genes=50, seed=0)
    >>> model = scvae.fit(adata, batch_key="batch", max_epochs=2, progress=False)
    >>> adata.obsm["X_scvae"].shape
    (200, 20)
    """
    source = source_of(adata, layer, memory=memory, output=output, n_top_genes=n_top_genes, store=store)
    where, seed, key_added = device_of(device), seed_of(seed), check_key("key_added", key_added)
    how: dict[str, Any] = {
        "layer": layer,
        "use_rep": use_rep,
        "image_key": image_key,
        "batch_key": batch_key,
        "categorical_covariate_keys": categorical_covariate_keys,
        "continuous_covariate_keys": continuous_covariate_keys,
        "size_factor_key": size_factor_key,
        "labels_key": labels_key,
        "unlabeled": unlabeled,
        "mask_var": mask_var,
        "check_counts": check_counts,
    }
    given = {"max_epochs": max_epochs, "n_latent": n_latent, "batch_size": batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    kind, training, options = choice_of(program, given | options, how)
    with ranks_of(where) as ranks, checkpoints_in(checkpoint, checkpoint_minutes, resume) as checkpoints:
        is_first = ranks.rank == 0  # of several processes, one speaks
        schema = source.schema({"kind": kind.kind_of(options), **how}, ranks, seed, progress)
        with alone(seed, where, gradient=True):
            made = kind(schema, **options)
            cells = source.cells(schema, where, mask_var, training.batch_size)
            if is_first and schema.kind == "counts" and image_key is None and (unexpressed := cells.unexpressed()):
                warnings.warn(
                    f"No cell has a count of {some(unexpressed, 'gene')}: leave such genes out.", stacklevel=2
                )
            made.to(where).initialise(cells)
            check_writable(source.written_to, made, cells, key_added)
            if progress and is_first:
                _say_what_is_fitted(made, cells, source.n_vars, mask_var)
            try:
                if checkpoints is not None:
                    checkpoints.belong_to(made, cells, training, seed, ranks)
                course = train(made, cells, training, ranks=ranks, progress=progress, checkpoints=checkpoints)
            except NonFiniteLoss as error:
                error.args = (
                    f"The loss is not finite at step {error.step}, site {error.site!r}, in {len(error.rows)} cells "
                    f"({', '.join(source.names(error.rows[:5]))}). Look at those cells, or pass a smaller "
                    f"learning_rate. {source.unchanged}",
                )
                raise
        fitted = Fitted(made, course, {"seed": seed, **training.as_dict()}, key_added)
        source.write(fitted, is_first, progress)
    return fitted


def _say_what_is_fitted(program: Program, cells: Cells, n_vars: int, mask_var: str | None) -> None:
    schema, n_genes = program.schema, f"{cells.n_genes:,}"
    if schema.image_key is not None:
        what = f"images of {' × '.join(map(str, schema.image_shape or ()))} pixels"
    elif schema.use_rep is not None:
        what = f"{n_genes} features of {schema.use_rep!r}"
    elif cells.n_genes < n_vars:
        what = f"{n_genes} of {n_vars:,} genes ({'highly_variable' if mask_var == 'auto' else mask_var})"
    else:
        what = f"{n_genes} genes"
    batches = "" if schema.batch_key is None else f", {len(schema.batches):,} batches"
    say(f"scvae: {program.name}, {len(cells):,} cells × {what}{batches}, on {cells.device}")
    if schema.kind == "counts" and cells.device.type == "cpu" and not loops_are_compiled():
        say("scvae: compiling, once after an installation, which takes some ten seconds")
