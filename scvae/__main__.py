"""The command line: ``scvae fit``, ``embed``, ``cluster``, ``compare`` and ``demo``; also ``python -m scvae``."""

from __future__ import annotations

import json
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit('scvae: the command line needs typer: pip install "scvae-pyro[cli]"') from error

import scvae

if TYPE_CHECKING:
    from anndata import AnnData

app = typer.Typer(
    name="scvae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


Input = Annotated[Path, typer.Argument(metavar="IN.h5ad", help="AnnData file with raw counts.")]
Layer = Annotated[str | None, typer.Option(help="Layer that holds the raw counts. [default: X]", show_default=False)]
Output = Annotated[Path | None, typer.Option(help="Where to write the AnnData with its embedding.")]


@app.command()
def fit(
    input: Input,
    output: Output = None,
    model: Annotated[Path | None, typer.Option(help="Where to save the fitted model (a folder).")] = None,
    program: Annotated[
        str,
        typer.Option(
            help="zinb (counts), gaussian (real numbers), vq (counts, discrete codes), vq_gaussian, pose (images), "
            "matrix_normal (images)."
        ),
    ] = "zinb",
    batch_key: Annotated[str | None, typer.Option(help="Column of .obs with the batch of each cell.")] = None,
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
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU when there is one.")] = "auto",
    key_added: Annotated[str, typer.Option(help="Key of the embedding in .obsm.")] = "X_scvae",
    check_counts: Annotated[
        bool,
        typer.Option("--check-counts/--no-check-counts", help="Refuse counts that are not whole numbers."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
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
    _check_folder(output, "--output")
    _check_folder(model, "--model")
    if model is not None and model.exists() and not overwrite:
        raise FileExistsError(f"--model {model} exists: name another folder, or add --overwrite")
    named = {"posterior": posterior, "prior": prior, "likelihood": likelihood, "dispersion": dispersion}
    options: dict[str, Any] = {
        **{name: str(value) for name, value in {**named, "library": library}.items() if value is not None},
        **{
            name: value
            for name, value in {"kl_weight": kl_weight, "weight_decay": weight_decay}.items()
            if value is not None
        },
        **dict(_option(text) for text in option or ()),
    }
    adata = _read(input)
    fitted = scvae.fit(
        adata,
        program,
        layer=layer,
        use_rep=use_rep,
        image_key=image_key,
        batch_key=batch_key,
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
        **options,
    )
    if model is not None:
        fitted.save(model, overwrite=overwrite)
        typer.echo(f"model: {model}")
    if output is not None:
        adata.write_h5ad(output)
        typer.echo(f'embedding: .obsm["{key_added}"] in {output}')


@app.command()
def embed(
    input: Input,
    model: Annotated[Path, typer.Option(help="Model saved by `scvae fit --model`.")],
    output: Annotated[Path, typer.Option(help="Where to write the AnnData with its embedding.")],
    unknown_batch: Annotated[
        UnknownBatch,
        typer.Option(help="Batches that the model has not seen: refuse, or embed without batch."),
    ] = UnknownBatch.error,
    missing_genes: Annotated[
        MissingGenes, typer.Option(help="Genes of the model that are absent: refuse, or count as zero.")
    ] = MissingGenes.error,
    key_added: Annotated[
        str | None,
        typer.Option(help="Key of the embedding in .obsm. [default: that of the fit]", show_default=False),
    ] = None,
) -> None:
    """Embed cells, seen or new, with a saved model.

    Genes may come in any order; further genes are ignored.

    For example:

      scvae embed new.h5ad --model model --output new_out.h5ad
    """
    _check_folder(output, "--output")
    fitted = scvae.load(model)
    adata = _read(input)
    key = key_added or fitted.key_added
    adata.obsm[key] = fitted.embed(adata, unknown_batch=unknown_batch.value, missing_genes=missing_genes.value)
    adata.write_h5ad(output)
    typer.echo(f'embedding: .obsm["{key}"] in {output}')


@app.command()
def cluster(
    input: Annotated[Path, typer.Argument(metavar="IN.h5ad", help="AnnData file with an embedding in .obsm.")],
    n_clusters: Annotated[int, typer.Option(min=1, help="Number of clusters.")],
    output: Annotated[Path, typer.Option(help="Where to write the AnnData with its clusters.")],
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
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU when there is one.")] = "auto",
    key_added: Annotated[str, typer.Option(help="Key of the clusters in .obs.")] = "cluster",
) -> None:
    """Cluster cells in an embedding, by a Gaussian mixture or by k-means.

    The output is the input with .obs["cluster"], .obsm["cluster_probability"] (mixture) and
    .uns["cluster"].

    For example:

      scvae cluster out.h5ad --n-clusters 8 --output clusters.h5ad

      scvae cluster pca.h5ad --n-clusters 8 --use-rep X_pca --method kmeans --output clusters.h5ad
    """
    from scvae import tl

    _check_folder(output, "--output")
    adata = _read(input)
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
    adata.write_h5ad(output)
    typer.echo(f'clusters: .obs["{key_added}"] in {output}')


@app.command()
def compare(
    input: Input,
    configurations: Annotated[
        Path, typer.Argument(metavar="CONFIGURATIONS.json", help="The options of each model, by a name of your choice.")
    ],
    output: Annotated[Path | None, typer.Option(help="Where to write the table (.csv).")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw the differences (.png, .pdf, .svg).")] = None,
    batch_key: Annotated[str | None, typer.Option(help="Column of .obs with the batch of each cell.")] = None,
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
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …; auto takes a GPU when there is one.")] = "auto",
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
    from scvae import comparing, pl
    from scvae.pl.axes import pyplot

    _check_folder(output, "--output")
    _check_folder(figure, "--figure")
    if figure is not None:
        pyplot()  # better to say that it is missing before the fits
    given = _read_json(configurations)
    adata = _read(input)
    try:
        table = comparing.compare(
            adata,
            given,
            test_fraction=test_fraction,
            split_key=split_key,
            n_samples=n_samples,
            seed=seed,
            layer=layer,
            batch_key=batch_key,
            max_epochs=max_epochs,
            device=device,
        )
    except TypeError as error:  # an option that is not known
        raise ValueError(f"{configurations}: {error}") from error
    typer.echo(table.round(2).to_string())
    if output is not None:
        table.to_csv(output)
        typer.echo(f"table: {output}")
    if figure is not None:
        pl.compare(table).figure.savefig(figure, dpi=150, bbox_inches="tight")
        typer.echo(f"figure: {figure}")


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("scvae_demo"),
) -> None:
    """Fit 700 real blood cells and show how well it went, offline, in a minute or two."""
    from scvae.demo import demo

    demo(output_dir)


def _option(text: str) -> tuple[str, Any]:
    """Read ``name=value``; the value is a number, true, false or null as in JSON, or else a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"--option {text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _read(path: Path) -> AnnData:
    import anndata

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return anndata.read_h5ad(path)
    except OSError as error:
        raise ValueError(f"{path} is not an .h5ad file, or is damaged: {error}") from error


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _check_folder(path: Path | None, option: str) -> None:
    """Refuse, before the work is done, a result that could not be written after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: the folder {path.absolute().parent} does not exist; make it first")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"scvae: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line. Exit code 1 is for bad input, 2 for wrong usage.

    Raises
    ------
    SystemExit
        Always, with the exit code.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(prog_name="scvae")
    except (ArithmeticError, ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        # str(KeyError) is the repr of its message, which would show quotes and escapes
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f"scvae: {' '.join(str(message).split())}")


if __name__ == "__main__":
    main()
