"""The command line, ``scvae`` or ``python -m scvae``: ``fit``, ``embed``, ``denoise``, ``generate``, ``cluster``, …."""

from __future__ import annotations

import dis
import json
import math
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperCommand, TyperGroup

    import scvae
    from scvae.boundary import files, formats
    from scvae.inference import progress
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    raise SystemExit('scvae: the command line needs typer: pip install "scvae-pyro[cli]"') from error
except KeyboardInterrupt:
    print("scvae: interrupted; nothing is half-written", file=sys.stderr)
    raise SystemExit(130) from None


class _Ended(BaseException):
    """Ended from outside, by Ctrl-C or another signal; what is half-written is removed on the way."""

    def __init__(self, how: str, code: int) -> None:
        super().__init__(how)
        self.how, self.code = how, code


class _Group(TyperGroup):
    """The commands; Ctrl-C ends them with a word, where typer would say "Aborted!", or nothing."""

    def make_context(self, *arguments: Any, **how: Any) -> Any:
        try:
            return super().make_context(*arguments, **how)
        except KeyboardInterrupt:
            raise _Ended("interrupted", 130) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Ended("interrupted", 130) from None


app = typer.Typer(
    name="scvae",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_OUTPUT = formats.WRITTEN
_FIGURE = (".png", ".pdf", ".svg")


class _Command(TyperCommand):
    """A command that can be kept quiet, and of which no option is dropped silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        order: list[Any] = self.make_parser(ctx).parse_args(args=list(args))[2]
        for option, times in Counter(order).items():
            if times > 1 and option.param_type_name == "option" and not (option.multiple or option.is_flag):
                ctx.fail(f"{option.opts[0]} is given {times} times, but takes one value.")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with progress.quiet(bool(ctx.params.get("quiet"))):
            return super().invoke(ctx)


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


class Method(StrEnum):
    """How cells are clustered."""

    mixture = "mixture"
    kmeans = "kmeans"


class Covariance(StrEnum):
    """Form of the covariances of a Gaussian mixture."""

    full = "full"
    diagonal = "diagonal"


class UnknownBatch(StrEnum):
    """What to do with batches that the model has not seen."""

    error = "error"
    ignore = "ignore"


class MissingGenes(StrEnum):
    """What to do when genes of the model are absent."""

    error = "error"
    zero = "zero"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"scvae {scvae.__version__}")
        raise typer.Exit


@app.callback()
def _scvae(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Variational autoencoders for single-cell counts.

    From raw counts in an .h5ad file to a batch-corrected embedding that scanpy reads:

      scvae fit cells.h5ad --batch-key batch --output out.h5ad --model model

      scvae embed new.h5ad --model model --output new_out.h5ad
    """


Input = Annotated[Path, typer.Argument(metavar="IN.h5ad", help="File with raw counts: .h5ad, 10x .h5, .zarr or .loom.")]
Layer = Annotated[str | None, typer.Option(help="Layer that holds the raw counts. [default: X]", show_default=False)]
Batch = Annotated[
    list[str] | None,
    typer.Option(help="Column of .obs with the batch of each cell; repeatable: columns are combined."),
]
Model = Annotated[Path, typer.Option(help="Model saved by `scvae fit --model`.")]
Unknown = Annotated[
    UnknownBatch, typer.Option(help="Batches that the model has not seen: refuse, or go on without batch.")
]
Missing = Annotated[MissingGenes, typer.Option(help="Genes of the model that are absent: refuse, or count as zero.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU when there is one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and say nothing but warnings and errors.")]


@app.command(cls=_Command)
def fit(
    input: Input,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the AnnData with its embedding: .h5ad or .zarr.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Where to save the fitted model (a folder).")] = None,
    program: Annotated[
        str,
        typer.Option(
            help="zinb (counts), gaussian (real numbers), vq (counts, discrete codes), vq_gaussian, pose (images), "
            "matrix_normal (images)."
        ),
    ] = "zinb",
    batch_key: Batch = None,
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
    max_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes through the cells. [default: by their number]", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Cells in a minibatch.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    device: Device = "auto",
    key_added: Annotated[str, typer.Option(help="Key of the embedding in .obsm.")] = "X_scvae",
    check_counts: Annotated[
        bool,
        typer.Option("--check-counts/--no-check-counts", help="Refuse counts that are not whole numbers."),
    ] = True,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit a model to raw counts; write the embedding, save the model, or both.

    The input is never changed. The output is the input with .obsm["X_scvae"] (posterior mean),
    .obsm["X_scvae_std"], .obs["scvae_library"] and .uns["scvae"].

    For example:

      scvae fit cells.h5ad --batch-key batch --output out.h5ad --model model

      scvae fit cells.h5ad --layer counts --likelihood nb --output out.h5ad

      scvae fit cells.h5ad --categorical-covariate-key donor --model model

      scvae fit cells.h5ad --prior mixture --option n_components=20 --output out.h5ad

      scvae fit cells.h5ad --program gaussian --use-rep X_pca --batch-key batch --output out.h5ad
    """
    if output is None and model is None:
        raise typer.BadParameter("nothing would be kept: name --output, --model or both")
    if model is not None:
        files.check_output(model, "--model", inputs=[input], overwrite=overwrite)
    if output is not None:
        others = [input] if model is None else [input, model]
        files.check_output(output, "--output", inputs=others, suffixes=_OUTPUT, overwrite=overwrite)
    words = {"posterior": posterior, "prior": prior, "likelihood": likelihood}
    words |= {"dispersion": dispersion, "library": library}
    named: dict[str, Any] = {name: str(value) for name, value in words.items() if value is not None}
    numbers = {"kl_weight": kl_weight, "weight_decay": weight_decay}
    named |= {name: value for name, value in numbers.items() if value is not None}
    options = {**named, **_options(program, option or (), named)}
    adata = formats.read(input)
    fitted = scvae.fit(
        adata,
        program,
        layer=layer,
        use_rep=use_rep,
        image_key=image_key,
        batch_key=_one_or_all(batch_key),
        categorical_covariate_keys=categorical_covariate_key or (),
        continuous_covariate_keys=continuous_covariate_key or (),
        size_factor_key=size_factor_key,
        mask_var=None if all_genes else mask_var,
        n_latent=n_latent,
        max_epochs=max_epochs,
        batch_size=batch_size,
        device=device,
        seed=seed,
        key_added=key_added,
        check_counts=check_counts,
        progress=not quiet,
        **options,
    )
    if model is not None:
        fitted.save(model, overwrite=overwrite)
        _say(f"model: {model}", quiet)
    if output is not None:
        formats.write(adata, output)
        _say(f'embedding: .obsm["{key_added}"] in {output}', quiet)
    if (where := _interruption(fitted)) is not None:
        typer.echo(f"scvae: training was interrupted {where}; the result is that of unfinished training", err=True)
        raise typer.Exit(130)


@app.command(cls=_Command)
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
    files.check_output(output, "--output", inputs=[input, model], suffixes=_OUTPUT, overwrite=overwrite)
    from scvae.boundary.keys import check_free, check_key

    if key_added is not None:
        check_key("--key-added", key_added)
    fitted = scvae.load(model, device=device)
    adata = formats.read(input)
    key = fitted.key_added if key_added is None else key_added
    check_free(adata, key, obsm=[key], read={"obsm": [fitted.program.schema.use_rep, fitted.program.schema.image_key]})
    adata.obsm[key] = fitted.embed(adata, unknown_batch=unknown_batch.value, missing_genes=missing_genes.value)
    formats.write(adata, output)
    _say(f'embedding: .obsm["{key}"] in {output}', quiet)


@app.command(cls=_Command)
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
    files.check_output(output, "--output", inputs=[input, model], suffixes=_OUTPUT, overwrite=overwrite)
    from scvae.boundary.keys import check_key

    size = _library_size(library_size)
    check_key("--layer-added", layer_added)
    fitted = scvae.load(model, device=device)
    adata = formats.read(input)
    if layer_added in adata.layers:
        raise ValueError(f"--layer-added {layer_added}: {input} has such a layer; name another")
    fitted.denoise(
        adata,
        batch=_one_or_all(batch),
        genes=genes or None,
        library_size=size,
        n_samples=n_samples,
        layer_added=layer_added,
        seed=seed,
        unknown_batch=unknown_batch.value,
        missing_genes=missing_genes.value,
    )
    formats.write(adata, output)
    _say(f'expression: .layers["{layer_added}"] in {output}', quiet)


@app.command(cls=_Command)
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
    files.check_output(output, "--output", inputs=[model], suffixes=_OUTPUT, overwrite=overwrite)
    formats.write(scvae.load(model, device=device).generate(n, batch=batch, seed=seed), output)
    _say(f"cells: {n} in {output}", quiet)


@app.command(cls=_Command)
def cluster(
    input: Annotated[Path, typer.Argument(metavar="IN.h5ad", help="File with an embedding in .obsm: .h5ad or .zarr.")],
    n_clusters: Annotated[int, typer.Option(min=1, help="Number of clusters.")],
    output: Annotated[Path, typer.Option(help="Where to write the AnnData with its clusters: .h5ad or .zarr.")],
    use_rep: Annotated[str, typer.Option(help="Key of the embedding in .obsm.")] = "X_scvae",
    method: Annotated[
        Method, typer.Option(help="A Gaussian mixture, which gives probabilities too, or k-means.")
    ] = Method.mixture,
    covariance: Annotated[
        Covariance, typer.Option(help="Covariances of the mixture; diagonal for many dimensions or few cells.")
    ] = Covariance.full,
    n_starts: Annotated[int, typer.Option(min=1, help="Runs, of which the best is kept.")] = 5,
    max_iter: Annotated[int, typer.Option(min=1, help="Iterations of a run at most.")] = 300,
    tol: Annotated[
        float, typer.Option(min=0, help="Change at which a run stops: nats per cell, or part of the loss of k-means.")
    ] = 1e-4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clusters.")] = 0,
    device: Device = "auto",
    key_added: Annotated[str, typer.Option(help="Key of the clusters in .obs.")] = "cluster",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Cluster cells in an embedding, by a Gaussian mixture or by k-means.

    The output is the input with .obs["cluster"], .obsm["cluster_probability"] (mixture) and
    .uns["cluster"].

    For example:

      scvae cluster out.h5ad --n-clusters 8 --output clusters.h5ad

      scvae cluster pca.h5ad --n-clusters 8 --use-rep X_pca --method kmeans --output clusters.h5ad
    """
    files.check_output(output, "--output", inputs=[input], suffixes=_OUTPUT, overwrite=overwrite)
    from scvae import tl

    adata = formats.read(input)
    tl.cluster(
        adata,
        n_clusters,
        use_rep=use_rep,
        method=method.value,
        covariance=covariance.value,
        n_starts=n_starts,
        max_iter=max_iter,
        tol=tol,
        seed=seed,
        device=device,
        key_added=key_added,
    )
    formats.write(adata, output)
    _say(f'clusters: .obs["{key_added}"] in {output}', quiet)


@app.command(cls=_Command)
def compare(
    input: Input,
    configurations: Annotated[
        Path, typer.Argument(metavar="CONFIGURATIONS.json", help="The options of each model, by a name of your choice.")
    ],
    output: Annotated[Path | None, typer.Option(help="Where to write the table (.csv).")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw the differences (.png, .pdf, .svg).")] = None,
    batch_key: Batch = None,
    layer: Layer = None,
    test_fraction: Annotated[float, typer.Option(help="Fraction of the cells to test, drawn from all batches.")] = 0.1,
    split_key: Annotated[
        str | None, typer.Option(help="Column of .obs that says train or test, in place of a random split.")
    ] = None,
    n_samples: Annotated[int, typer.Option(min=1, help="Importance samples for each test cell.")] = 256,
    max_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes through the cells. [default: by their number]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Fit several models to the same cells, and rank them by the likelihood of the same other cells.

    The file of configurations holds the options of scvae.fit for each model; they override those given here:

      {"nb": {"likelihood": "nb"}, "zinb, 20 dimensions": {"n_latent": 20}}

    The table has the log likelihood of the test cells (importance-weighted, nats a cell), the paired difference to
    the best, and standard errors of both; the ELBO of test and training cells; seconds and parameters.

    For example:

      scvae compare cells.h5ad configurations.json --output table.csv

      scvae compare cells.h5ad configurations.json --figure compare.png
    """
    for path, name, suffixes in ((output, "--output", (".csv",)), (figure, "--figure", _FIGURE)):
        if path is not None:
            others = [input, configurations]
            files.check_output(path, name, inputs=others, suffixes=suffixes, overwrite=overwrite)
    from scvae import comparing, pl
    from scvae.pl.axes import pyplot

    if figure is not None:
        pyplot()  # better to say that it is missing before the fits
    given = _read_json(configurations)
    adata = formats.read(input)
    try:
        table = comparing.compare(
            adata,
            given,
            test_fraction=test_fraction,
            split_key=split_key,
            n_samples=n_samples,
            seed=seed,
            progress=not quiet,
            layer=layer,
            batch_key=_one_or_all(batch_key),
            max_epochs=max_epochs,
            device=device,
        )
    except TypeError as error:  # an option that is not known
        if not _is_refusal(error):
            raise
        raise ValueError(f"{configurations}: {error}") from error
    if output is not None:
        files.write_file(output, table.to_csv)
    if figure is not None:
        drawn = pl.compare(table).figure
        files.write_file(figure, lambda path: drawn.savefig(path, dpi=150, bbox_inches="tight"))
    _say(table.round(2).to_string(), quiet and not (output is None and figure is None))
    for path, name in ((output, "table"), (figure, "figure")):
        if path is not None:
            _say(f"{name}: {path}", quiet)
    if interrupted := [str(name) for name, why in table["stopped"].items() if why == "interrupted"]:
        typer.echo(f"scvae: the training of {', '.join(interrupted)} was interrupted", err=True)
        raise typer.Exit(130)


@app.command(cls=_Command)
def tune(
    input: Input,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the AnnData with its embedding: .h5ad or .zarr.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Where to save the fitted model (a folder).")] = None,
    table: Annotated[Path | None, typer.Option(help="Where to write the table of all rounds (.csv).")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw the differences (.png, .pdf, .svg).")] = None,
    budget: Annotated[float, typer.Option(help="Seconds that all of it may take.")] = 60.0,
    configurations: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIGURATIONS.json",
            help="The options of each candidate, by a name of your choice. [default: small changes of the defaults]",
            show_default=False,
        ),
    ] = None,
    batch_key: Batch = None,
    layer: Layer = None,
    test_fraction: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the cells to judge by, drawn from all batches. [default: 0.1, and at most 1,000 cells]",
            show_default=False,
        ),
    ] = None,
    n_samples: Annotated[int, typer.Option(min=1, help="Importance samples for each of these cells.")] = 64,
    max_epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes through the cells. [default: by their number]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same numbers, where time does not run short.")] = 0,
    device: Device = "auto",
    key_added: Annotated[str, typer.Option(help="Key of the embedding in .obsm.")] = "X_scvae",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Find the options that suit the data within a budget of seconds, and fit a model with them to all cells.

    Candidates are ranked by the likelihood of cells that are left out; the better half of them is trained for longer,
    and so on. Another configuration than the default is chosen only if it is better by two standard errors. A file of
    candidates holds the options of scvae.fit for each:

      {"nb": {"likelihood": "nb"}, "10 dimensions": {"n_latent": 10}}

    For example:

      scvae tune cells.h5ad --batch-key batch --budget 300 --output out.h5ad --model model

      scvae tune cells.h5ad --configurations configurations.json --output out.h5ad --figure tuning.png
    """
    if output is None and model is None:
        raise typer.BadParameter("nothing would be kept: name --output, --model or both")
    inputs = [input] if configurations is None else [input, configurations]
    if model is not None:
        files.check_output(model, "--model", inputs=inputs, overwrite=overwrite)
        inputs = [*inputs, model]
    results = {"--output": (output, _OUTPUT), "--table": (table, (".csv",)), "--figure": (figure, _FIGURE)}
    for name, (path, suffixes) in results.items():
        if path is not None:
            files.check_output(path, name, inputs=inputs, suffixes=suffixes, overwrite=overwrite)
    from scvae import pl, tuning
    from scvae.pl.axes import pyplot

    if figure is not None:
        pyplot()  # better to say that it is missing before the fits
    given = None if configurations is None else _read_json(configurations)
    adata = formats.read(input)
    try:
        tuned = tuning.tune(
            adata,
            given,
            budget=budget,
            test_fraction=test_fraction,
            n_samples=n_samples,
            seed=seed,
            progress=not quiet,
            layer=layer,
            batch_key=_one_or_all(batch_key),
            max_epochs=max_epochs,
            device=device,
            key_added=key_added,
        )
    except TypeError as error:  # an option that is not known
        if configurations is None or not _is_refusal(error):
            raise
        raise ValueError(f"{configurations}: {error}") from error
    if table is not None:
        files.write_file(table, lambda path: tuned.table.to_csv(path, index=False))
    if figure is not None:
        drawn = pl.tuning(tuned).figure
        files.write_file(figure, lambda path: drawn.savefig(path, dpi=150, bbox_inches="tight"))
    _say(tuned.ranking.round(2).to_string(), quiet)
    _say(f"chosen: {tuned.chosen}", quiet)
    if model is not None:
        tuned.model.save(model, overwrite=overwrite)
        _say(f"model: {model}", quiet)
    if output is not None:
        formats.write(adata, output)
        _say(f'embedding: .obsm["{key_added}"] in {output}', quiet)
    for name, path in {"table": table, "figure": figure}.items():
        if path is not None:
            _say(f"{name}: {path}", quiet)
    if (where := _interruption(tuned.model)) is not None:
        typer.echo(f"scvae: training was interrupted {where}; the result is that of unfinished training", err=True)
        raise typer.Exit(130)


@app.command(cls=_Command)
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("scvae_demo"),
    overwrite: Overwrite = False,
) -> None:
    """Fit 700 real blood cells and show how well it went, offline, in a minute or two."""
    for name in ("pbmc68k.h5ad", "umap.png"):
        if output_dir.is_dir():
            files.check_output(output_dir / name, "demo:", suffixes=(Path(name).suffix,), overwrite=overwrite)
    from scvae.demo import demo

    demo(output_dir)


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

    from scvae.fitting import fit, program_of, split_options
    from scvae.inference.svi import Training

    kind, _ = program_of(program)
    of_fit = inspect.signature(fit).parameters
    there_are = f"Options of {program}: {', '.join(name for name in kind.option_names() or () if name not in of_fit)}"
    there_are += f"; of the training: {', '.join(name for name in Training.names() if name not in of_fit)}"
    for name, value in options.items():
        text = f"--option {name}={value if isinstance(value, str) else json.dumps(value)}"
        if name in of_fit:
            raise ValueError(f"{text}: it is no option of the program; see scvae fit --help for it. {there_are}")
        try:
            split_options(kind, {name: value})
        except TypeError as error:
            raise ValueError(f"{text}: {str(error).partition('. ')[0]}. {there_are}") from error
        except ValueError as error:
            raise ValueError(f"{text}: {error} {there_are}") from error


def _one_or_all(values: list[str] | None) -> Any:
    """Return a single value by itself, several as a list, and None of none."""
    values = list(dict.fromkeys(values or ()))
    return values if len(values) > 1 else values[0] if values else None


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


def _interruption(fitted: Any) -> str | None:
    """Say where the training of a model was interrupted, if it was."""
    if fitted.stopped != "interrupted":
        return None
    return f"at step {fitted.course.n_steps:,} of {fitted.course.n_planned:,}"


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        typer.echo(text)


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    with progress.quiet(False):  # which is of what need not be known
        progress.say(f"scvae: warning: {message}")


def _is_refusal(error: TypeError) -> bool:
    """Tell whether a TypeError was raised by a check of arguments in this package, and not by a defect anywhere."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("scvae."):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


@contextmanager
def _ending() -> Iterator[None]:
    """Let the signals that would end the process at once end it in order, so that no temporary file stays."""

    def end(number: int, _: object) -> None:
        raise _Ended(f"ended by {signal.Signals(number).name}", 128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # nohup ignores SIGHUP
    if threading.current_thread() is not threading.main_thread():
        ours = []  # only there a handler can be set
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Run the command line.

    Exit code 1 is for bad input, 2 for wrong usage, 130 for an interruption (Ctrl-C), 128 and its number for another
    signal.

    Raises
    ------
    SystemExit
        Always, with the exit code.
    """
    try:
        with warnings.catch_warnings(), _ending():
            warnings.showwarning = _show_warning
            app(prog_name="scvae")
    except _Ended as end:
        start = "\n" * sys.stderr.isatty()  # which shows ^C
        print(f"{start}scvae: {end.how}; nothing is half-written", file=sys.stderr)
        sys.exit(end.code)
    except (ArithmeticError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and not _is_refusal(error):
            raise
        # str(KeyError) is the repr of its message, which would show quotes and escapes
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f"scvae: {' '.join(str(message).split())}")


if __name__ == "__main__":
    main()
