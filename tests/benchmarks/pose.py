"""Content, angle and shift of digits in random poses: ``python tests/benchmarks/pose.py FOLDER``.

FOLDER holds ``mnist_10k.npz``, with ``images``, uint8, ``[10000, 28, 28]``, and ``labels``. Every digit is turned by a
normal angle (standard deviation pi / 4; or by any angle, ``--uniform``) and shifted by normal numbers of pixels (1.4),
once; the first 9,000 are for training, the last 1,000 for testing. The content is two numbers, as in the paper, and ten
with uniform angles. Printed, for the program ``pose``, for it with the plain encoder, and for a VAE with the same
networks that knows no poses: the negative ELBO of the test images (nats an image), correlations of the inferred angle
with the true one, circular, within each digit, and of the shift, and how many test images k-means with ten clusters on
the content puts with their digit.

``--speed`` measures instead a step of the training beside its floor, the forward and backward pass of the decoder
alone, at as many poses (ms, medians).
"""

from __future__ import annotations

import argparse
import ast
import time
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from scipy.ndimage import map_coordinates
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

import scvae
from scvae.inference.svi import Training
from scvae.inference.svi import train as train_program
from scvae.modules.poses import to_object

#: Chosen with ``--choose``.
SETTINGS = {
    "normal": {"n_latent": 2, "angle_scale": np.pi / 4},
    "uniform": {"n_latent": 10, "angle_scale": None},
}
MODELS = {
    "pose": {},
    "plain encoder": {"encoder": "plain"},
    "no pose": {"rotate": False, "translate": False},
}
LOOK_DIFFERENT_UPSIDE_DOWN = (2, 3, 4, 5, 6, 7, 9)


def posed(images: np.ndarray, uniform: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turn and shift images, ``[n, 28, 28]``; return them, the angles, and the shifts to the right and down, pixels."""
    rng, n = np.random.default_rng(seed), len(images)
    angle = rng.uniform(-np.pi, np.pi, n) if uniform else rng.normal(0, np.pi / 4, n)
    shift = rng.normal(0, 1.4, (n, 2))
    y, x = np.mgrid[:28, :28] - 13.5
    result = np.empty(images.shape, np.float32)
    for i in range(n):
        dx, dy, cos, sin = x - shift[i, 0], y - shift[i, 1], np.cos(angle[i]), np.sin(angle[i])
        at = np.stack([dy * cos - dx * sin, dx * cos + dy * sin]) + 13.5
        result[i] = map_coordinates(images[i], at, order=1)
    return result.clip(0, 1), angle, shift


def circular_correlation(a: np.ndarray, b: np.ndarray, uniform: bool) -> float:
    """Of angles around a mean, Jammalamadaka and SenGupta 2001, section 8.2; of uniform ones, Fisher and Lee 1983."""
    if not uniform:
        a, b = (np.sin(angle - np.angle(np.exp(1j * angle).mean())) for angle in (a, b))
        return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    (p, q, r, s), n = [(f(a) * g(b)).sum() for f in (np.cos, np.sin) for g in (np.cos, np.sin)], len(a)
    spread = [n**2 - abs(np.exp(2j * angle).sum()) ** 2 for angle in (a, b)]
    return float(4 * (p * s - q * r) / np.sqrt(spread[0] * spread[1]))


def accuracy(z: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of cells in the right one of ten clusters by k-means, clusters being matched to labels."""
    clusters = KMeans(10, n_init=10, random_state=0).fit_predict(z)
    counts = np.zeros((10, 10))
    np.add.at(counts, (clusters, labels), 1)
    return counts[linear_sum_assignment(-counts)].sum() / len(labels)


def speed(train: AnnData, decoder: str, batch_size: int, n: int = 30) -> None:
    model = scvae.fit(
        train[: n * batch_size].copy(),
        "pose",
        image_key="image",
        decoder=decoder,
        batch_size=batch_size,
        max_epochs=1,
        progress=False,
    )
    program, cells = model.program.train(), model._cells(train[: n * batch_size])
    start = time.perf_counter()
    train_program(program, cells, Training(max_epochs=1, batch_size=batch_size), progress=False)
    step = (time.perf_counter() - start) / n
    z = torch.randn(batch_size, program.options["n_latent"])
    theta, delta = torch.randn(8, batch_size), torch.randn(8, batch_size, 2)
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        pose = to_object(theta, delta).requires_grad_()
        program.decoder(z.clone().requires_grad_(), torch.zeros(batch_size, 0), program.points, pose).sum().backward()
        seconds.append(time.perf_counter() - start)
    floor = float(np.median(seconds))
    print(
        f"{decoder:11} minibatch {batch_size}: step {1e3 * step:.1f} ms, decoder {1e3 * floor:.1f} ms, "
        f"ratio {step / floor:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--choose", action="store_true", help="train on 7,500 images and test on the next 1,500")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--options", type=ast.literal_eval, default={}, help="a dict of further arguments of scvae.fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = np.load(arguments.folder / "mnist_10k.npz")
    images, angle, shift = posed(data["images"].astype(np.float32) / 255, arguments.uniform)
    labels = data["labels"].astype(int)
    middle, end = (7500, 9000) if arguments.choose else (9000, 10000)
    train, test = (AnnData(shape=(len(i), 0), obsm={"image": i}) for i in (images[:middle], images[middle:end]))
    if arguments.speed:
        speed(train, "map", 128)
        speed(train, "coordinates", 32, n=5)
        return
    angle, shift, labels = (part[middle:end] for part in (angle, shift, labels))
    for name in arguments.models:
        for seed in arguments.seeds:
            options = {**SETTINGS["uniform" if arguments.uniform else "normal"], **MODELS[name]}
            start = time.perf_counter()
            model = scvae.fit(
                train, "pose", image_key="image", seed=seed, progress=False, **{**options, **arguments.options}
            )
            seconds = time.perf_counter() - start
            cells = test.copy()
            model.transform(cells)
            line = f"{name:13} seed {seed}: -ELBO {-model.elbo(test, n_samples=8).mean():.1f}"
            line += f", k-means {accuracy(cells.obsm['X_scvae'], labels):.3f}, {seconds:.0f} s"
            if "scvae_angle" in cells.obs:
                found = cells.obs["scvae_angle"].to_numpy()
                within = [
                    circular_correlation(found[labels == k], angle[labels == k], arguments.uniform) for k in range(10)
                ]
                line += f"\n  angle {np.mean(within):.3f}, of the digits that look different upside down "
                line += f"{np.mean([within[k] for k in LOOK_DIFFERENT_UPSIDE_DOWN]):.3f}; "
                line += " ".join(f"{k}: {value:.2f}" for k, value in enumerate(within))
            if "X_scvae_shift" in cells.obsm:
                along = [np.corrcoef(cells.obsm["X_scvae_shift"][:, i], shift[:, i])[0, 1] for i in (0, 1)]
                line += f"\n  shift {along[0]:.3f} {along[1]:.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
