"""Niches that do not depend on how a tissue lay: ``python tests/benchmarks/tissue.py FILE.h5ad``.

FILE holds cells with ``obsm["spatial"]`` and ``obs["cell_type"]``. The neighbourhood of each cell, itself left out, is
made an image with a channel for each cell type, once as it is and once turned by a random angle. Two models are fitted
to the first: ``pose``, and a VAE with the same networks that knows no poses. Printed: the correlation of the content of
both sets of images (of each dimension of the embedding, averaged); and how well a classifier tells the type of the cell
in the middle from the content, from the composition of its neighbourhood, and from the most frequent type (balanced
accuracy and accuracy, five-fold cross-validation).

With ``--picture FILE.png``, ``pose`` alone is fitted, and a map of the cells is drawn, by type and by niche, which are
clusters of the content. Printed is how many cells have the same niche once all neighbourhoods are turned at random.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scvae


def predicted(features: np.ndarray, types: np.ndarray) -> str:
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, class_weight="balanced"))
    scores = cross_validate(classifier, features, types, cv=5, scoring=["balanced_accuracy", "accuracy"])
    return f"balanced {scores['test_balanced_accuracy'].mean():.3f}, accuracy {scores['test_accuracy'].mean():.3f}"


def draw(adata: anndata.AnnData, file: Path) -> None:
    """Draw the cells at their positions, the longer side across, by type and by niche."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    across, down = sorted(adata.obsm["spatial"].T, key=np.ptp, reverse=True)
    figure, axes = plt.subplots(2, 1, figsize=(8.4, 7.6), layout="constrained")
    colours = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999933", "#332288"]
    for ax, key, title in zip(
        axes, ["cell_type", "niche"], ["cell types", "niches, clusters of the content"], strict=True
    ):
        groups = adata.obs[key].astype(str).to_numpy()
        for group, colour in zip(sorted(set(groups)), colours, strict=False):
            of = groups == group
            ax.scatter(across[of], down[of], s=4, linewidths=0, color=colour, label=group)
        ax.set(title=title, aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=4)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--neighbors", type=int, default=30)
    parser.add_argument("--size", type=int, default=20)
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--pixels", default="gaussian")
    parser.add_argument("--picture", type=Path, help="draw a map of the niches to this file, and nothing else")
    parser.add_argument("--niches", type=int, default=6, help="on the map")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adata = anndata.read_h5ad(arguments.file)
    types = adata.obs["cell_type"].astype(str).to_numpy()
    how = {"cell_type_key": "cell_type", "n_neighbors": arguments.neighbors, "size": arguments.size}
    scvae.pp.neighborhood_images(adata, **how)
    turned = adata.copy()
    angles = np.random.default_rng(0).uniform(-np.pi, np.pi, adata.n_obs)
    scvae.pp.neighborhood_images(turned, angles=angles, **how)
    print(f"{adata.n_obs} cells, images {adata.obsm['neighborhood'].shape[1:]}")
    if arguments.picture is not None:
        how = {"pixels": arguments.pixels, "n_latent": arguments.latent, "max_epochs": arguments.epochs}
        model = scvae.fit(adata, "pose", image_key="neighborhood", translate=False, progress=False, **how)
        scvae.tl.cluster(adata, arguments.niches, method="kmeans", key_added="niche")
        centres = adata.uns["niche"]["means"]
        nearest = np.linalg.norm(model.embed(turned)[:, None] - centres, axis=-1).argmin(1)
        same = nearest == adata.obs["niche"].astype(int)
        print(f"{same.mean():.3f} of the cells have the same niche when each neighbourhood is turned at random")
        print(pd.crosstab(adata.obs["niche"], adata.obs["cell_type"]).to_string())
        draw(adata, arguments.picture)
        return
    composition = adata.obsm["neighborhood"].sum((2, 3))
    composition = composition / np.maximum(composition.sum(1, keepdims=True), 1e-9)
    print("composition:", predicted(composition, types))
    for name, options in {"pose": {"translate": False}, "no pose": {"rotate": False, "translate": False}}.items():
        start = time.perf_counter()
        model = scvae.fit(
            adata,
            "pose",
            image_key="neighborhood",
            pixels=arguments.pixels,
            n_latent=arguments.latent,
            max_epochs=arguments.epochs,
            progress=False,
            **options,
        )
        seconds = time.perf_counter() - start
        z, of_turned = adata.obsm["X_scvae"], model.embed(turned)
        each = [np.corrcoef(z[:, i], of_turned[:, i])[0, 1] for i in range(z.shape[1])]
        together = np.corrcoef((z - z.mean(0)).ravel(), (of_turned - of_turned.mean(0)).ravel())[0, 1]
        print(
            f"{name}: correlation {np.nanmean(each):.3f} (of all numbers together {together:.3f}), "
            f"-ELBO {-model.elbo(adata).mean():.1f}, {seconds:.0f} s; {predicted(z, types)}; "
            f"with the composition: {predicted(np.hstack([z, composition]), types)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
