"""One call from an AnnData to its latent space."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from anndata import AnnData

from scvae.data.reading import read_cells, read_schema, some
from scvae.fitted import Fitted
from scvae.inference.devices import device_of, seeded
from scvae.inference.svi import NonFiniteLoss, Training, train
from scvae.programs import PROGRAMS, Program

__all__ = ["fit"]


def fit(
    adata: AnnData,
    program: str | type[Program] = "zinb",
    *,
    layer: str | None = None,
    use_rep: str | None = None,
    image_key: str | None = None,
    batch_key: str | None = None,
    categorical_covariate_keys: Sequence[str] = (),
    continuous_covariate_keys: Sequence[str] = (),
    size_factor_key: str | None = None,
    mask_var: str | None = "auto",
    check_counts: bool = True,
    n_latent: int | None = None,
    max_epochs: int | None = None,
    batch_size: int = 128,
    device: str = "auto",
    seed: int = 0,
    key_added: str = "X_scvae",
    progress: bool = True,
    **options: Any,
) -> Fitted:
    """Fit a generative model to raw counts, and write the cells' latent coordinates to the AnnData.

    Parameters
    ----------
    adata
        Cells by genes. Raw counts, or what the program models, in ``.X`` or in `layer`: CSR, CSC, dense, backed, dask.
    program
        Name of a program (``"zinb"`` for counts, ``"gaussian"`` for real numbers, ``"vq"`` and ``"vq_gaussian"`` for
        discrete codes of either, ``"pose"`` and ``"matrix_normal"`` for images), or a
        :class:`~scvae.programs.Program` class of your own.
    layer
        Key of ``adata.layers`` that holds the counts; by default they are in ``adata.X``.
    use_rep
        Key of ``adata.obsm`` that holds what is to be modelled, in place of the genes: ``"X_pca"``, a protein panel.
    image_key
        Key of ``adata.obsm`` that holds an image of each cell, ``[n_cells, height, width]`` or ``[n_cells, channels,
        height, width]``, for the programs of images.
    batch_key
        Column of ``adata.obs`` whose effect is to be taken out of the latent space.
    categorical_covariate_keys, continuous_covariate_keys
        Further columns whose effect is to be taken out. Continuous ones are standardised.
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
        Cells in a minibatch, at least 2.
    device
        ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, …
    seed
        Makes the fit repeatable on the same machine and device with the same number of threads
        (``torch.get_num_threads()``); the caller's random state is left as it was.
    key_added
        Key of ``adata.obsm`` to write to.
    progress
        Whether to show a progress bar.
    **options
        Options of the program (:class:`scvae.programs.ZINB`: ``likelihood``, ``dispersion``, ``library``,
        ``posterior``, ``prior``, ``n_hidden``, …) and of the training (:class:`scvae.inference.svi.Training`:
        ``learning_rate``, ``kl_weight``, ``validation_fraction``, …).

    Returns
    -------
    Fitted
        The fitted model. To the AnnData are written, and nothing else: ``.obsm[key_added]``, the posterior mean of
        each cell, ``[n_cells, n_latent]``; ``.obsm[key_added + "_std"]``, its standard deviation; what else the program
        infers of each cell in ``.obs["scvae_…"]`` (the library latent, as counts; the cluster, with
        ``prior="mixture"``) or ``.obsm[key_added + "_…"]``; ``.uns["scvae"]``, parameters and history.

    Raises
    ------
    KeyError
        If a layer or column is missing.
    ValueError
        If the counts or covariates cannot be modelled; the message names the first cells or genes at fault.
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
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata is an AnnData, not {type(adata).__name__}: read a file with anndata.read_h5ad first.")
    if adata.isbacked and adata.is_view:
        raise ValueError("A view of a backed AnnData cannot be written to: call .to_memory() on it first.")
    if adata.n_obs < 2:
        raise ValueError(f"The AnnData has {adata.n_obs or 'no'} cell: a latent space needs at least two.")
    where = device_of(device)
    kind = _program(program)
    training_names = [field.name for field in fields(Training)]
    given = {name: options.pop(name) for name in list(options) if name in training_names}
    if max_epochs is not None:
        given["max_epochs"] = max_epochs
    training = Training(batch_size=batch_size, **{**kind.defaults, **given})
    if size_factor_key is not None:
        if kind.kind != "counts" or kind.of_images:
            models = "images" if kind.of_images else "real numbers"
            raise ValueError(f"size_factor_key belongs to models of counts; {kind.name!r} models {models}.")
        options.setdefault("library", "size_factor")
    if n_latent is not None:
        options["n_latent"] = n_latent
    _check_options(kind, options, training_names)
    if kind.of_images and image_key is None:
        raise ValueError(f"{kind.name!r} models images: name the key of adata.obsm that holds them, image_key=….")
    if image_key is not None and not kind.of_images:
        raise ValueError(f"image_key belongs to models of images; {kind.name!r} models the values of genes.")
    schema = read_schema(
        adata,
        kind=kind.kind_of(options),
        layer=layer,
        use_rep=use_rep,
        image_key=image_key,
        batch_key=batch_key,
        categorical_covariate_keys=categorical_covariate_keys,
        continuous_covariate_keys=continuous_covariate_keys,
        size_factor_key=size_factor_key,
        mask_var=mask_var,
        check_counts=check_counts,
    )
    with seeded(seed, where):
        made = kind(schema, **options)
        cells = read_cells(adata, schema, device=where)
        if schema.kind == "counts" and image_key is None and (unexpressed := cells.unexpressed()):
            warnings.warn(f"No cell has a count of {some(unexpressed, 'gene')}: leave such genes out.", stacklevel=2)
        made.to(where).initialise(cells)
        try:
            history = train(made, cells, training, progress=progress)
        except NonFiniteLoss as error:
            names = ", ".join(repr(str(name)) for name in adata.obs_names[error.rows[:5]])
            error.args = (
                f"The loss is not finite at step {error.step}, site {error.site!r}, in {len(error.rows)} cells "
                f"({names}). Look at those cells, or pass a smaller learning_rate. The AnnData is unchanged.",
            )
            raise
    fitted = Fitted(made, history, {"seed": seed, **asdict(training)}, key_added)
    fitted._write(adata, cells)
    return fitted


def _program(program: str | type[Program]) -> type[Program]:
    if isinstance(program, str):
        if program not in PROGRAMS:
            raise ValueError(f"There is no program {program!r}; there are {', '.join(map(repr, PROGRAMS))}.")
        return PROGRAMS[program]
    if not (isinstance(program, type) and issubclass(program, Program)):
        raise TypeError(f"program is a name or a class derived from scvae.programs.Program, not {program!r}.")
    return program


def _check_options(kind: type[Program], options: dict[str, Any], training_names: list[str]) -> None:
    signature = inspect.signature(kind)
    try:
        signature.bind(None, **options)
    except TypeError as error:
        _, *names = signature.parameters
        raise TypeError(
            f"{error}. Options of the program {kind.name!r}: {', '.join(names)}; of the training: "
            f"{', '.join(training_names)}."
        ) from None
