"""One call from an AnnData to its latent space."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anndata import AnnData

from scvae.boundary.containers import are_files, check_anndata
from scvae.boundary.keys import check_key
from scvae.boundary.options import Options, bytes_of, seed_of
from scvae.boundary.process import alone, device_of
from scvae.boundary.ranks import rank_here, ranks_of
from scvae.data import results
from scvae.data.cells import Cells
from scvae.data.reading import read_cells, read_schema, some
from scvae.data.shuffling import shuffled
from scvae.data.store import Store
from scvae.data.stored import cells_of
from scvae.data.tables import open_tables
from scvae.fitted import Files, Fitted, check_writable
from scvae.inference.checkpoints import checkpoints_in
from scvae.inference.progress import Progress, say
from scvae.inference.svi import NonFiniteLoss, Training, train
from scvae.kernels.operations import loops_are_compiled
from scvae.programs import PROGRAMS, Program

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
        Passes through the cells; by default as many as make a fixed number of steps.
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
        If an option is not known, or `adata` is not an AnnData.
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
    tables = None
    if are_files(adata) or (memory is not None and isinstance(adata, AnnData) and adata.isbacked):
        tables = open_tables(adata, layer)
        if output is not None:
            results.check_output(output, tables)
    else:
        check_anndata(adata, to_write=True)
        _check_in_memory(memory=memory, output=output, n_top_genes=n_top_genes, store=store)
    n_cells = adata.n_obs if tables is None else tables.n_obs
    if n_cells < 2:
        raise ValueError(f"The AnnData has {n_cells or 'no'} cell: a latent space needs at least two.")
    budget = _MEMORY if memory is None else bytes_of("memory", memory)
    where, seed, key_added = device_of(device), seed_of(seed), check_key("key_added", key_added)
    kind, chosen = program_of(program)
    given = {"max_epochs": max_epochs, "n_latent": n_latent, "batch_size": batch_size}
    options = {**chosen, **{name: value for name, value in given.items() if value is not None}, **options}
    if size_factor_key is not None:
        if kind.kind != "counts" or kind.of_images:
            models = "images" if kind.of_images else "real numbers"
            raise ValueError(f"size_factor_key belongs to models of counts; {kind.name!r} models {models}.")
        options = {"library": "size_factor", **options}
    if labels_key is not None:
        if not kind.takes_labels:
            able = " and ".join(repr(name) for name, each in PROGRAMS.items() if each.takes_labels)
            raise ValueError(
                f"labels_key belongs to programs with a mixture prior, {able}; {kind.name!r} takes no labels: leave "
                "labels_key out, or name another program."
            )
        options = {"prior": "mixture", **options}
    training, options = split_options(kind, options)
    if kind.of_images and image_key is None:
        raise ValueError(f"{kind.name!r} models images: name the key of adata.obsm that holds them, image_key=….")
    if image_key is not None and not kind.of_images:
        raise ValueError(f"image_key belongs to models of images; {kind.name!r} models the values of genes.")
    how: dict[str, Any] = {
        "kind": kind.kind_of(options),
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
    is_first = rank_here() == 0  # of several processes, one speaks and writes
    with ranks_of(where) as ranks, checkpoints_in(checkpoint, checkpoint_minutes, resume) as checkpoints:
        stored = None
        if tables is None:
            schema = read_schema(adata, **how)
        else:
            bar = partial(Progress, disable=not (progress and is_first))
            how |= {"store": store, "n_top_genes": n_top_genes, "memory": budget, "seed": seed, "progress": bar}
            stored = ranks.in_turn(partial(shuffled, adata, **how))  # which the first one makes
            schema = stored.schema
        with alone(seed, where, gradient=True):
            made = kind(schema, **options)
            if stored is None:
                cells = read_cells(adata, schema, device=where, mask_var=mask_var, with_labels=True)
            else:
                cells = cells_of(stored, where, budget, training.batch_size)
            if is_first and schema.kind == "counts" and image_key is None and (unexpressed := cells.unexpressed()):
                warnings.warn(
                    f"No cell has a count of {some(unexpressed, 'gene')}: leave such genes out.", stacklevel=2
                )
            made.to(where).initialise(cells)
            check_writable(adata if tables is None else results.there_will_be(tables), made, cells, key_added)
            if progress and is_first:
                _say_what_is_fitted(made, cells, (adata if tables is None else tables).n_vars, mask_var)
            try:
                if checkpoints is not None:
                    checkpoints.belong_to(made, cells, training, seed, ranks)
                course = train(made, cells, training, ranks=ranks, progress=progress, checkpoints=checkpoints)
            except NonFiniteLoss as error:
                names = ", ".join(_names_of(error.rows[:5], adata, stored))
                error.args = (
                    f"The loss is not finite at step {error.step}, site {error.site!r}, in {len(error.rows)} cells "
                    f"({names}). Look at those cells, or pass a smaller learning_rate. "
                    + ("The AnnData is unchanged." if stored is None else "No result was written."),
                )
                raise
        fitted = Fitted(made, course, {"seed": seed, **training.as_dict()}, key_added)
        if tables is None:
            fitted._write(adata, cells)
        elif output is not None and is_first:
            fitted._write_files(tables, output, key_added, budget, progress=progress)
    return fitted


_MEMORY = 2_000_000_000  # bytes for cells in files


def _check_in_memory(**given: Any) -> None:
    """Refuse what belongs to cells in files."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} belongs to cells in files, fit('cells.h5ad', …); this AnnData is in memory: leave {name} out."
            )


def _names_of(rows: Sequence[int], adata: Any, stored: Store | None) -> list[str]:
    """Return what cells at fault are called in a message."""
    if stored is None:
        return [repr(str(name)) for name in adata.obs_names[rows]]
    return [f"row {row:,} of {stored.files[file]}" for file, row in zip(*stored.origin(rows), strict=True)]


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


def program_of(program: str | type[Program] | Options) -> tuple[type[Program], dict[str, Any]]:
    """Return the class of a program, and the options that it was named with."""
    if isinstance(program, Options) and program.program is not None:
        return program.program, program.as_dict()
    if isinstance(program, str):
        if program not in PROGRAMS:
            raise ValueError(
                f"There is no program {program!r}{_meant(program, PROGRAMS)}; there are "
                f"{', '.join(map(repr, PROGRAMS))}."
            )
        return PROGRAMS[program], {}
    if not (isinstance(program, type) and issubclass(program, Program)):
        raise TypeError(
            "program is a name, the options of a program, or a class derived from scvae.programs.Program, not "
            f"{program!r}."
        )
    return program, {}


def split_options(kind: type[Program], options: Mapping[str, Any]) -> tuple[Training, dict[str, Any]]:
    """Return the training, and what is left for the program.

    Raises
    ------
    TypeError
        If neither has an option of that name.
    ValueError
        If one is of another type or out of its range.
    """
    of_training, of_program = Training.names(), kind.option_names()
    for name in options:
        if name not in of_training and of_program is not None and name not in of_program:
            raise TypeError(
                f"There is no option {name!r}{_meant(name, [*of_program, *of_training])}. Options of the program "
                f"{kind.name!r}: {', '.join(of_program)}; of the training: {', '.join(of_training)}."
            )
    given = {name: value for name, value in options.items() if name in of_training}
    rest = {name: value for name, value in options.items() if name not in of_training}
    if kind.Options is not None:
        known = {name: value for name, value in rest.items() if name in kind.Options.names()}
        rest |= {name: getattr(kind.Options(**known), name) for name in known}
    return Training(**{**kind.defaults, **given}), rest


#: What is called otherwise elsewhere.
_ELSEWHERE = {
    "early_stopping": "patience; training ends by itself when the bound of held-out cells has stopped rising",
    "early_stopping_patience": "patience",
    "train_size": "validation_fraction",
    "validation_size": "validation_fraction",
    "epochs": "max_epochs",
    "n_epochs": "max_epochs",
    "lr": "learning_rate",
    "gene_likelihood": "likelihood",
    "use_observed_lib_size": "library='observed'",
    "n_epochs_kl_warmup": "kl_warmup, a fraction of the steps",
    "use_gpu": "device",
    "accelerator": "device",
    "random_state": "seed",
}


def _meant(name: str, names: Any) -> str:
    """Return what a name may have been meant for, for a message."""
    near = difflib.get_close_matches(name, list(names), 1)
    found = _ELSEWHERE.get(name) or (repr(near[0]) if near else "")
    return f" (did you mean {found}?)" if found else ""
