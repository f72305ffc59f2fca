"""The commands that fit a model and use it: ``fit``, ``embed``, ``denoise`` and ``generate``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import scvae
from scvae.boundary import formats
from scvae.boundary.outputs import check_output
from scvae.boundary.signals import watched
from scvae.commands.parameters import (
    BatchKey,
    Device,
    Embedded,
    EmbeddingKey,
    Input,
    Layer,
    MaxEpochs,
    Memory,
    Missing,
    MissingGenes,
    Model,
    Overwrite,
    Quiet,
    Saved,
    Seed,
    Unknown,
    UnknownBatch,
    one_or_all,
)
from scvae.commands.results import CELLS, MODEL, check, end_if_interrupted, say, write_fitted

__all__ = ["denoise", "embed", "fit", "generate"]


class Likelihood(StrEnum):
    """Likelihood of a count."""

    zinb = "zinb"
    nb = "nb"
    poisson = "poisson"


class Dispersion(StrEnum):
    """What the inverse dispersion depends on."""

    gene = "gene"
    gene_batch = "gene-batch"
    gene_cell = "gene-cell"


class Library(StrEnum):
    """Where the library size comes from."""

    latent = "latent"
    observed = "observed"
    size_factor = "size_factor"


def fit(
    input: Input,
    output: Embedded = None,
    model: Saved = None,
    program: Annotated[
        str,
        typer.Option(
            help="zinb (counts), gaussian (real numbers), vq (counts, discrete codes), vq_gaussian, pose (images), "
            "matrix_normal (images)."
        ),
    ] = "zinb",
    batch_key: BatchKey = None,
    layer: Layer = None,
    use_rep: Annotated[
        str | None,
        typer.Option(help="Key of .obsm to model in place of the genes, such as X_pca.", show_default=False),
    ] = None,
    image_key: Annotated[
        str | None, typer.Option(help="Key of .obsm that holds an image of each cell.", show_default=False)
    ] = None,
    categorical_covariate_key: Annotated[
        list[str] | None, typer.Option(help="Further categorical column of .obs to correct for; repeatable.")
    ] = None,
    continuous_covariate_key: Annotated[
        list[str] | None, typer.Option(help="Numeric column of .obs to correct for; repeatable.")
    ] = None,
    size_factor_key: Annotated[
        str | None, typer.Option(help="Column of .obs with size factors, in place of a library size.")
    ] = None,
    labels_key: Annotated[
        str | None,
        typer.Option(
            help="Column of .obs with labels of some of the cells, which the others are to get.", show_default=False
        ),
    ] = None,
    unlabeled: Annotated[
        str, typer.Option(help="What that column says of cells without a label, beside missing values.")
    ] = "Unknown",
    mask_var: Annotated[
        str,
        typer.Option(
            metavar="COLUMN",
            help="Boolean column of .var: the genes to model. auto: highly_variable where there is one.",
        ),
    ] = "auto",
    all_genes: Annotated[bool, typer.Option("--all-genes", help="Model every gene; overrides --mask-var.")] = False,
    n_latent: Annotated[
        int | None,
        typer.Option(min=1, help="Dimensions of the embedding. [default: 20, of zinb]", show_default=False),
    ] = None,
    posterior: Annotated[
        str | None,
        typer.Option(help="normal, full, low_rank, iaf or iaf_stable. [default: normal]", show_default=False),
    ] = None,
    prior: Annotated[
        str | None,
        typer.Option(help="normal, mixture (which clusters the cells) or vamp. [default: mixture]", show_default=False),
    ] = None,
    likelihood: Annotated[
        Likelihood | None, typer.Option(help="Likelihood of the counts. [default: zinb]", show_default=False)
    ] = None,
    dispersion: Annotated[
        Dispersion | None,
        typer.Option(
            help="One inverse dispersion a gene, a gene and batch, or a gene and cell. [default: gene]",
            show_default=False,
        ),
    ] = None,
    library: Annotated[
        Library | None,
        typer.Option(
            help="Library size: inferred, the observed total, or from --size-factor-key. "
            "[default: latent, or size_factor where its key is given]",
            show_default=False,
        ),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            min=0, help="Weight of the KL terms; below 1, types lie further apart. [default: 1]", show_default=False
        ),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How strongly the decoder's weights are held back; lower mixes batches more. [default: 1.2, of zinb]",
            show_default=False,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other option of the program or of the training, such as n_hidden=64; repeatable.",
        ),
    ] = None,
    max_epochs: MaxEpochs = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Cells in a minibatch.")] = 128,
    seed: Seed = 0,
    device: Device = "auto",
    key_added: EmbeddingKey = "X_scvae",
    check_counts: Annotated[
        bool,
        typer.Option("--check-counts/--no-check-counts", help="Refuse counts that are not whole numbers."),
    ] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints of the training, from which --resume goes on.", show_default=False),
    ] = None,
    checkpoint_minutes: Annotated[float, typer.Option(help="Between two checkpoints.")] = 5.0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint in that folder; begin where there is none."),
    ] = False,
    memory: Memory = None,
    n_top_genes: Annotated[
        int | None,
        typer.Option(min=1, help="With --memory: choose so many highly variable genes.", show_default=False),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="With --memory: the folder of the shuffled cells. [default: beside the file]", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit a model to raw counts; write the embedding, save the model, or both.

    The input is never changed. The output is the input with .obsm["X_scvae"] (posterior mean),
    .obsm["X_scvae_std"], .obs["scvae_library"] and .uns["scvae"]; with --labels-key also .obs["scvae_label"],
    .obs["scvae_label_probability"] and .obsm["X_scvae_label_probability"].

    For example:

      scvae fit cells.h5ad --batch-key batch --output out.h5ad --model model

      scvae fit cells.h5ad --layer counts --likelihood nb --output out.h5ad

      scvae fit cells.h5ad --categorical-covariate-key donor --model model

      scvae fit cells.h5ad --labels-key cell_type --unlabeled Unknown --output out.h5ad

      scvae fit cells.h5ad --prior mixture --option n_components=20 --output out.h5ad

      scvae fit cells.h5ad --memory 2GB --output out.h5ad --model model

      scvae fit cells.h5ad --program gaussian --use-rep X_pca --batch-key batch --output out.h5ad

      scvae fit cells.h5ad --batch-key batch --model model --checkpoint checkpoints --resume

      torchrun --standalone --nproc-per-node=4 -m scvae fit cells.h5ad --batch-key batch --model model

    With --checkpoint, SIGTERM, SIGHUP and SIGUSR1 end the command within seconds, with exit code 75, and Ctrl-C with
    130: a checkpoint is written, and no result. The same command with --resume goes on from there, to the same numbers.
    Where the checkpoint cannot be written, the exit code is 128 and the number of the signal.
    """
    if output is None and model is None:
        raise typer.BadParameter("nothing would be kept: name --output, --model or both")
    inputs = [input] if checkpoint is None else [input, checkpoint]
    check({"--model": (model, MODEL), "--output": (output, CELLS)}, inputs=inputs, overwrite=overwrite)
    from scvae.boundary.ranks import rank_here

    words = {"posterior": posterior, "prior": prior, "likelihood": likelihood}
    words |= {"dispersion": dispersion, "library": library}
    named: dict[str, Any] = {name: str(value) for name, value in words.items() if value is not None}
    numbers = {"kl_weight": kl_weight, "weight_decay": weight_decay}
    named |= {name: value for name, value in numbers.items() if value is not None}
    options = {**named, **_options(program, option or (), named)}
    if memory is None and (n_top_genes is not None or store is not None):
        raise typer.BadParameter("--n-top-genes and --store belong to --memory")
    streamed: dict[str, Any] = {"memory": memory, "output": output, "n_top_genes": n_top_genes, "store": store}
    with nullcontext() if checkpoint is None else watched(checkpoint, gives_back=False):
        adata = formats.read(input) if memory is None else str(input)
        fitted = scvae.fit(
            adata,
            program,
            layer=layer,
            use_rep=use_rep,
            image_key=image_key,
            batch_key=one_or_all(batch_key),
            categorical_covariate_keys=categorical_covariate_key or (),
            continuous_covariate_keys=continuous_covariate_key or (),
            size_factor_key=size_factor_key,
            labels_key=labels_key,
            unlabeled=unlabeled,
            mask_var=None if all_genes else mask_var,
            n_latent=n_latent,
            max_epochs=max_epochs,
            batch_size=batch_size,
            device=device,
            seed=seed,
            key_added=key_added,
            check_counts=check_counts,
            checkpoint=checkpoint,
            checkpoint_minutes=checkpoint_minutes,
            resume=resume,
            progress=not quiet,
            **({} if memory is None else streamed),
            **options,
        )
        if rank_here() == 0:
            write_fitted(
                fitted,
                None if isinstance(adata, str) else adata,
                model=model,
                output=output,
                key_added=key_added,
                overwrite=overwrite,
                quiet=quiet,
            )
    end_if_interrupted(fitted)


def embed(
    input: Input,
    model: Model,
    output: Annotated[Path, typer.Option(help="Where to write the AnnData with its embedding: .h5ad or .zarr.")],
    unknown_batch: Unknown = UnknownBatch.error,
    missing_genes: Missing = MissingGenes.error,
    key_added: Annotated[
        str | None,
        typer.Option(help="Key of the embedding in .obsm. [default: that of the fit]", show_default=False),
    ] = None,
    memory: Memory = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Embed cells, seen or new, with a saved model.

    Genes may come in any order; further genes are ignored. The output is the input with the posterior mean in
    .obsm["X_scvae"], or in --key-added, and with nothing else.

    For example:

      scvae embed new.h5ad --model model --output new_out.h5ad
    """
    check_output(output, "--output", inputs=[input, model], suffixes=CELLS, overwrite=overwrite)
    from scvae.boundary.keys import check_free, check_key

    if key_added is not None:
        check_key("--key-added", key_added)
    fitted = scvae.load(model, device=device)
    key = fitted.key_added if key_added is None else key_added
    how: dict[str, Any] = {"unknown_batch": unknown_batch.value, "missing_genes": missing_genes.value}
    if memory is not None:
        fitted._write_embedding(str(input), output, key, memory, **how)
        say(f'embedding: .obsm["{key}"] in {output}', quiet)
        return
    adata = formats.read(input)
    check_free(adata, key, obsm=[key], read={"obsm": [fitted.program.schema.use_rep, fitted.program.schema.image_key]})
    adata.obsm[key] = fitted.embed(adata, **how)
    formats.write(adata, output)
    say(f'embedding: .obsm["{key}"] in {output}', quiet)


def denoise(
    input: Input,
    model: Model,
    output: Annotated[Path, typer.Option(help="Where to write the AnnData with its new layer: .h5ad or .zarr.")],
    layer_added: Annotated[str, typer.Option(help="Layer to write to.")] = "denoised",
    batch: Annotated[
        list[str] | None,
        typer.Option(
            help="Decode all cells as if of this batch; repeatable: the mean. [default: each as of its own]",
            show_default=False,
        ),
    ] = None,
    genes: Annotated[
        list[str] | None,
        typer.Option(help="A gene that is wanted; repeatable. [default: all of the model]", show_default=False),
    ] = None,
    library_size: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|cell",
            help="What the expression of a cell sums to: 1 gives fractions, 1e4 counts per ten thousand, cell expected "
            "counts.",
        ),
    ] = "1",
    n_samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Average over draws of the posterior. [default: its mean is decoded]", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same draws.")] = 0,
    unknown_batch: Unknown = UnknownBatch.error,
    missing_genes: Missing = MissingGenes.error,
    memory: Memory = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write the expression that a saved model sees behind the counts to a layer.

    The output is the input with .layers["denoised"], which is NaN for genes that are not modelled or not wanted.

    For example:

      scvae denoise cells.h5ad --model model --library-size 1e4 --output denoised.h5ad

      scvae denoise cells.h5ad --model model --batch batch_1 --genes CD3E --genes CD19 --output denoised.h5ad
    """
    check_output(output, "--output", inputs=[input, model], suffixes=CELLS, overwrite=overwrite)
    from scvae.boundary.keys import check_key

    size = _library_size(library_size)
    check_key("--layer-added", layer_added)
    fitted = scvae.load(model, device=device)
    adata = formats.read(input) if memory is None else str(input)
    if not isinstance(adata, str) and layer_added in adata.layers:
        raise ValueError(f"--layer-added {layer_added}: {input} has such a layer; name another")
    streamed: dict[str, Any] = {"output": output, "memory": memory}
    fitted.denoise(
        adata,
        batch=one_or_all(batch),
        genes=genes or None,
        library_size=size,
        n_samples=n_samples,
        layer_added=layer_added,
        seed=seed,
        unknown_batch=unknown_batch.value,
        missing_genes=missing_genes.value,
        **({} if memory is None else streamed),
    )
    if not isinstance(adata, str):
        formats.write(adata, output)
    say(f'expression: .layers["{layer_added}"] in {output}', quiet)


def generate(
    model: Model,
    n: Annotated[int, typer.Option("--n", min=1, help="How many cells.")],
    output: Annotated[Path, typer.Option(help="Where to write the AnnData: .h5ad or .zarr.")],
    batch: Annotated[
        str | None,
        typer.Option(help="Of which batch. [default: drawn for each cell, all equally likely]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same cells.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Draw new cells from the prior of a saved model.

    For example:

      scvae generate --model model --n 1000 --output generated.h5ad
    """
    check_output(output, "--output", inputs=[model], suffixes=CELLS, overwrite=overwrite)
    formats.write(scvae.load(model, device=device).generate(n, batch=batch, seed=seed), output)
    say(f"cells: {n} in {output}", quiet)


def _options(program: str, texts: Sequence[str], named: dict[str, Any]) -> dict[str, Any]:
    """Read ``name=value`` options, each a number, true, false or null as in JSON, or else a word; refuse wrong ones."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--option {text!r} is not of the form NAME=VALUE")
        if name in options or name in named:
            raise ValueError(f"--option {text}: {name} is given twice")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    if options:
        _check_options(program, options)
    return options


def _check_options(program: str, options: dict[str, Any]) -> None:
    """Refuse options that there are not, and values out of their range, before anything is read."""
    import inspect

    from scvae.fits.choices import program_of, split_options
    from scvae.fitting import fit as fit_cells
    from scvae.inference.svi import Training

    kind, _ = program_of(program)
    of_fit, of_command = inspect.signature(fit_cells).parameters, inspect.signature(fit).parameters
    there_are = f"Options of {program}: {', '.join(name for name in kind.option_names() or () if name not in of_fit)}"
    there_are += f"; of the training: {', '.join(name for name in Training.names() if name not in of_fit)}"
    for name, value in options.items():
        text = f"--option {name}={value if isinstance(value, str) else json.dumps(value)}"
        if name in of_fit:
            where = f"pass --{name.replace('_', '-')}" if name in of_command else "see scvae fit --help"
            raise ValueError(f"{text}: it is no option of the program; {where} for it. {there_are}")
        try:
            split_options(kind, {name: value})
        except TypeError as error:
            raise ValueError(f"{text}: {str(error).partition('. ')[0]}. {there_are}") from error
        except ValueError as error:
            raise ValueError(f"{text}: {error} {there_are}") from error


def _library_size(text: str) -> float | str:
    if text == "cell":
        return text
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"--library-size {text}: it is a number above 0, or cell")
    return size
