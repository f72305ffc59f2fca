"""Draws the figures of the pages of the programs: ``python docs/figures.py``, in about a minute, offline.

Each is drawn from a fit that is made here, and written beside the pages, ``docs/programs/NAME.png``. Names on the
command line draw only these.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import scanpy as sc
import torch
from anndata import AnnData
from matplotlib import pyplot as plt

import scvae

FOLDER = Path(__file__).parent / "programs"
WIDE = (8.4, 3.2)


def gaussian():
    """Evidence of a linear fit, beside that of probabilistic principal components, which is known."""
    adata = scvae.datasets.pbmc68k()
    values = np.log1p(1e4 * adata.X.toarray() / adata.obs["n_counts"].to_numpy()[:, None])
    variable = np.argsort(-values.var(0))[:60]
    cells = AnnData(values[:, variable].astype(np.float32))
    n, d = cells.n_obs, 5
    model = scvae.fit(
        cells, "gaussian", n_hidden=0, noise="shared", n_latent=d, max_epochs=200, validation_fraction=0, progress=False
    )
    variances = np.linalg.eigvalsh(np.cov(cells.X.T, bias=True).astype(float))[::-1]
    noise = variances[d:].mean()  # Tipping and Bishop 1999, equations 8 and 12
    of_all = np.log(variances[:d]).sum() + (len(variances) - d) * np.log(noise)
    known = -0.5 * (len(variances) * np.log(2 * np.pi) + of_all + len(variances))
    print(f"gaussian: {model.elbo(cells, n_samples=16).mean():.2f} nats a cell of {n}, known maximum {known:.2f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=WIDE, layout="constrained")
    left.plot(model.history["step"], model.history["elbo"], label="ELBO of the fit")
    left.axhline(known, color="black", linestyle="--", linewidth=1, label="evidence of probabilistic PCA")
    left.set(xlabel="step of the training", ylabel="nats a cell", ylim=(known - 12, known + 1.5))
    left.legend(frameon=False, loc="lower right")
    z = cells.obsm["X_scvae"] - cells.obsm["X_scvae"].mean(0)
    scores = np.linalg.svd(cells.X - cells.X.mean(0), full_matrices=False)[0][:, :d]
    fitted = z @ np.linalg.lstsq(z, scores, rcond=None)[0]
    right.scatter(scores[:, 0], fitted[:, 0], s=5, linewidths=0)
    right.set(xlabel="first principal component", ylabel="the same, out of the\nfive latent dimensions")
    return figure, (left, right)


def vq():
    """Codes by type, and how many are in use."""
    adata = scvae.datasets.pbmc68k()
    model = scvae.fit(adata, "vq", n_codes=8, max_epochs=100, progress=False)
    codes = adata.obs["scvae_code"].astype(int).to_numpy()
    types = adata.obs["cell_type"].value_counts().index[:7]
    shares = np.array([np.bincount(codes[adata.obs["cell_type"] == each], minlength=8) for each in types], dtype=float)
    shares /= shares.sum(1, keepdims=True)
    order = np.argsort(shares.argmax(0), kind="stable")

    figure, (left, right) = plt.subplots(1, 2, figsize=WIDE, layout="constrained", width_ratios=(3, 2))
    picture = left.imshow(shares[:, order], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set_xticks(range(8), order)
    left.set_yticks(range(len(types)), types)
    left.set_xlabel("code")
    figure.colorbar(picture, ax=left, label="share of the type's cells")
    right.plot(model.history["step"], model.history["perplexity"])
    right.axhline(8, color="black", linestyle="--", linewidth=1)
    right.set(xlabel="step of the training", ylabel="perplexity of eight codes", ylim=(0, 8.4))
    return figure, (right,)


STROKES = {
    "L": [((-0.3, -0.6), (-0.3, 0.6)), ((-0.3, 0.6), (0.4, 0.6))],
    "T": [((0.0, -0.6), (0.0, 0.6)), ((-0.5, -0.6), (0.5, -0.6))],
    "F": [((-0.3, -0.6), (-0.3, 0.6)), ((-0.3, -0.6), (0.4, -0.6)), ((-0.3, 0.0), (0.3, 0.0))],
}


def letters(n, turned):
    """Images of letters, upright or turned by any angle, ``[n, 16, 16]``, their names and angles."""
    rng = np.random.default_rng(0)
    names = rng.choice(list(STROKES), n)
    angles = rng.uniform(-np.pi, np.pi, n) if turned else np.zeros(n)
    moved = rng.uniform(-0.25, 0.25, (n, 2)) * (not turned)
    y, x = (np.mgrid[:16, :16] - 7.5) / 8
    images = np.zeros((n, 16, 16), dtype=np.float32)
    for image, name, angle, (right, down) in zip(images, names, angles, moved, strict=True):
        u, v = x - right, y - down
        points = np.stack([np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u], -1)
        for start, end in np.array(STROKES[name]):
            along = ((points - start) @ (end - start) / ((end - start) ** 2).sum()).clip(0, 1)
            distance = np.linalg.norm(points - start - along[..., None] * (end - start), axis=-1)
            image[:] = np.maximum(image, 1 / (1 + np.exp((distance - 0.13) / 0.03)))
    return AnnData(shape=(n, 0), obsm={"image": images}), names, angles


def pose():
    """Turned letters, the same upright, and the angles that were found."""
    adata, names, angles = letters(300, turned=True)
    model = scvae.fit(
        adata, "pose", image_key="image", n_latent=2, n_hidden=64, max_epochs=50, batch_size=32, progress=False
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=WIDE, layout="constrained", width_ratios=(3, 2))
    scvae.pl.reconstructions(model, adata, n=8, ax=left)
    for name in STROKES:
        right.scatter(angles[names == name], adata.obs["scvae_angle"][names == name], s=6, linewidths=0, label=name)
    right.set(xlabel="angle of the image (radians)", ylabel="angle found (radians)")
    right.legend(frameon=False, markerscale=2, loc="upper left", bbox_to_anchor=(1, 1))
    return figure, (right,)


def matrix_normal():
    """The posterior of a latent map: its mean, the standard deviations of its entries, and a draw."""
    adata, names, _ = letters(400, turned=False)
    options = {"n_latent": 4, "n_hidden": 16, "n_layers": 2, "max_epochs": 40, "batch_size": 32}
    model = scvae.fit(adata, "matrix_normal", image_key="image", progress=False, **options)
    cell = adata[[list(names).index("F")]].copy()
    draws = model.embed(cell, n_samples=4000)[:, 0].reshape(-1, 4, 4, 4)
    mean = model.embed(cell).reshape(4, 4, 4)
    k = int(np.abs(mean).sum((1, 2)).argmax())
    images = [model.decode(each.reshape(1, -1))[0].reshape(16, 16) for each in (mean, draws[0])]
    panels = {
        "image": cell.obsm["image"][0],
        f"mean $M_{k + 1}$": mean[k],
        "standard deviations": draws[:, k].std(0),
        f"a draw of $F_{k + 1}$": draws[0, k],
        "image of the draw": images[1],
        "image of the mean": images[0],
    }
    limit = max(np.abs(mean[k]).max(), np.abs(draws[0, k]).max())
    figure, axes = plt.subplots(1, 6, figsize=(8.4, 1.7), layout="constrained")
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        if "image" in title:
            ax.imshow(panel, cmap="Greys", vmin=0, vmax=1)
        elif "deviations" in title:
            ax.imshow(panel, cmap="Blues", vmin=0)
            for i, row in enumerate(panel):
                for j, value in enumerate(row):
                    colour = "white" if value > 0.6 * panel.max() else "black"
                    ax.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=6, color=colour)
        else:
            ax.imshow(panel, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(title, fontsize="small")
        ax.set(xticks=[], yticks=[])
    return figure, ()


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    plt.rcParams.update({"font.size": 9})
    sc.settings.verbosity = 0
    drawn = {each.__name__: each for each in (gaussian, vq, pose, matrix_normal)}
    for name in sys.argv[1:] or drawn:
        figure, axes = drawn[name]()
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
        figure.savefig(FOLDER / f"{name}.png", dpi=110, pil_kwargs={"optimize": True})
        plt.close(figure)


if __name__ == "__main__":
    main()
