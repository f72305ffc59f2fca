"""Posteriors of latent maps on handwritten digits: ``python tests/benchmarks/maps.py FOLDER``.

FOLDER holds ``mnist_10k.npz``, made binary and parted as in ``mnist.py``. The program ``matrix_normal`` is trained with
each of its posteriors: the same decoder, the same number of latent maps, the same settings. Printed, for each and each
seed: how many numbers the encoder says of an image, ELBO and importance-weighted likelihood of the test images (nats an
image), the gain over independent entries, ``posterior="normal"``, with the same seed and its standard error over
images, and seconds of training; then the same for the mean over seeds.
"""

from __future__ import annotations

import argparse
import ast
import time
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData

import scvae

#: Chosen with ``--choose``, the same for all.
SETTINGS = {
    "n_latent": 8,
    "n_hidden": 16,
    "n_layers": 3,
    "max_epochs": 50,
    "learning_rate": 1e-2,
    "weight_decay": 0.3,
    "kl_warmup": 0.1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--posteriors", nargs="+", default=["normal", "matrix_normal", "low_rank"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--choose", action="store_true", help="train on 7,500 images and test on the next 1,500")
    parser.add_argument("--options", type=ast.literal_eval, default={}, help="a dict of further arguments of scvae.fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = np.load(arguments.folder / "mnist_10k.npz")["images"].reshape(-1, 784)
    images = (np.random.default_rng(0).random(images.shape) < images / 255).astype(np.float32).reshape(-1, 28, 28)
    ends = (7500, 9000) if arguments.choose else (9000, 10000)
    train, test = (AnnData(obsm={"image": part}) for part in (images[: ends[0]], images[ends[0] : ends[1]]))
    print("| posterior | seed | numbers | ELBO | IW | gain | seconds |\n| --- | --- | --- | --- | --- | --- | --- |")
    normal: dict[int, np.ndarray] = {}
    for posterior in arguments.posteriors:
        likelihoods, elbos = {}, []
        for seed in arguments.seeds:
            options = {**SETTINGS, **arguments.options}
            start = time.perf_counter()
            model = scvae.fit(
                train.copy(),
                "matrix_normal",
                image_key="image",
                posterior=posterior,
                seed=seed,
                progress=False,
                **options,
            )
            seconds = time.perf_counter() - start
            likelihoods[seed] = model.log_likelihood(test, n_samples=arguments.samples)
            elbos.append(model.elbo(test, n_samples=8).mean())
            if posterior == "normal":
                normal[seed] = likelihoods[seed]
            gain = likelihoods[seed] - normal.get(seed, likelihoods[seed])
            numbers = model.program.head.out_features
            print(row(posterior, seed, numbers, elbos[-1], likelihoods[seed], gain, f"{seconds:.0f}"), flush=True)
        mean = np.mean(list(likelihoods.values()), 0)
        gain = np.mean([likelihoods[seed] - normal.get(seed, likelihoods[seed]) for seed in likelihoods], 0)
        print(row(posterior, "mean", numbers, np.mean(elbos), mean, gain, ""), flush=True)


def row(posterior, seed, numbers, elbo, likelihood, gain, seconds) -> str:
    gained = f"{gain.mean():.2f} ± {gain.std() / len(gain) ** 0.5:.2f}"
    return f"| {posterior} | {seed} | {numbers} | {elbo:.2f} | {likelihood.mean():.2f} | {gained} | {seconds} |"


if __name__ == "__main__":
    main()
