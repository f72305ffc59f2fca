"""The command that groups cells."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from scvae.boundary import formats
from scvae.boundary.outputs import check_output
from scvae.commands.parameters import Device, Overwrite, Quiet
from scvae.commands.results import CELLS, say

__all__ = ["cluster"]


class Method(StrEnum):
    """How cells are clustered."""

    mixture = "mixture"
    kmeans = "kmeans"


class Covariance(StrEnum):
    """Form of the covariances of a Gaussian mixture."""

    full = "full"
    diagonal = "diagonal"


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
    check_output(output, "--output", inputs=[input], suffixes=CELLS, overwrite=overwrite)
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
    say(f'clusters: .obs["{key_added}"] in {output}', quiet)
