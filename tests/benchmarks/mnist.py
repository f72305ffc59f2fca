"""Families of posteriors on handwritten digits: ``python tests/benchmarks/mnist.py FOLDER``.

FOLDER holds ``mnist_10k.npz``, with ``images``, uint8, ``[10000, 28, 28]``. They are made binary once; the first 9,000
are for training, the last 1,000 for testing. The same model, x ~ Bernoulli(f(z)), and the same encoder are trained with
each family. Printed, for each family and seed: ELBO and importance-weighted likelihood of the test images (nats an
image), the gain over the diagonal normal with the same seed and its standard error over images, and seconds.
"""

from __future__ import annotations

import argparse
import ast
import time
from pathlib import Path

import numpy as np
import pyro
import torch
from anndata import AnnData
from pyro.distributions import Bernoulli, Normal

import scvae
from scvae.modules.nets import Layers
from scvae.modules.posteriors import posterior_of
from scvae.programs import Program


class Digits(Program):
    """z ~ N(0, I), x ~ Bernoulli(f(z)), one pixel at a time."""

    name = "digits"
    kind = "real"

    def __init__(self, schema, *, n_latent=10, n_hidden=300, n_layers=2, dropout_rate=0.0, **posterior):
        widths = {"n_latent": n_latent, "n_hidden": n_hidden, "n_layers": n_layers}
        super().__init__(schema, **widths, dropout_rate=dropout_rate, **posterior)
        n_pixels = len(schema.genes)
        self.encoder = Layers(n_pixels, 0, n_hidden, n_layers, dropout_rate, sparse_input=True)
        self.q_z = posterior_of(posterior.pop("posterior"), self.encoder.n_out, n_latent, **posterior)
        self.decoder = Layers(n_latent, 0, n_hidden, n_layers)
        self.f = torch.nn.Linear(n_hidden, n_pixels)
        self.register_buffer("zero", torch.zeros(n_latent))

    def initialise(self, cells):
        mean, _ = cells.moments()
        with torch.no_grad():
            self.f.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())

    def decayed(self):
        return [*self.decoder.weights(), self.f.weight]

    def model(self, batch):
        with pyro.plate("images", len(batch)):
            z = pyro.sample("z", Normal(self.zero, 1.0).to_event(1))  # [n, d]
            pyro.sample("x", Bernoulli(logits=self.f(self.decoder(z))).to_event(1), obs=batch.values)  # [n, 784]

    def guide(self, batch):
        with pyro.plate("images", len(batch)):
            pyro.sample("z", self.q_z(self.encoder(batch.counts)))  # [n, d]

    def embed(self, batch):
        return self.q_z.moments(self.encoder(batch.counts))

    def decode(self, z, batch):
        return self.f(self.decoder(z)).sigmoid()


#: Chosen with ``--choose``.
SETTINGS = {
    "n_latent": 20,
    "n_hidden": 300,
    "n_layers": 2,
    "dropout_rate": 0.3,
    "max_epochs": 150,
    "learning_rate": 1e-3,
    "weight_decay": 0.3,
}
FLOW = {"flow_depth": 2, "flow_width": 320}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--posteriors", nargs="+", default=["normal", "full", "iaf", "iaf_stable"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--choose", action="store_true", help="train on 7,500 images and test on the next 1,500")
    parser.add_argument("--options", type=ast.literal_eval, default={}, help="a dict of further arguments of scvae.fit")
    parser.add_argument("--flow", type=ast.literal_eval, default=FLOW, help="a dict of options of the IAF")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images = np.load(arguments.folder / "mnist_10k.npz")["images"].reshape(-1, 784)
    images = (np.random.default_rng(0).random(images.shape) < images / 255).astype(np.float32)
    ends = (7500, 9000) if arguments.choose else (9000, 10000)
    train, test = AnnData(images[: ends[0]]), AnnData(images[ends[0] : ends[1]])
    print(
        f"{'posterior':11} {'seed':>4} {'ELBO':>9} {f'IW {arguments.samples}':>9} {'gain':>14} {'seconds':>8}",
        flush=True,
    )
    normal: dict[int, np.ndarray] = {}
    for posterior in arguments.posteriors:
        for seed in arguments.seeds:
            options = {**SETTINGS, **arguments.options, **(arguments.flow if "iaf" in posterior else {})}
            start = time.perf_counter()
            model = scvae.fit(train.copy(), Digits, posterior=posterior, seed=seed, progress=False, **options)
            seconds = time.perf_counter() - start
            likelihood = model.log_likelihood(test, n_samples=arguments.samples)
            elbo = model.elbo(test, n_samples=8).mean()
            if posterior == "normal":
                normal[seed] = likelihood
            gain = likelihood - normal.get(seed, likelihood)
            gained = f"{gain.mean():6.2f} ± {gain.std() / len(gain) ** 0.5:5.2f}"
            print(
                f"{posterior:11} {seed:4} {elbo:9.2f} {likelihood.mean():9.2f} {gained:>14} {seconds:8.0f}", flush=True
            )


if __name__ == "__main__":
    main()
