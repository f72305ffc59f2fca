"""Make ``simulated_small.h5ad``, which lies beside this script: ``python data/make_simulated.py``."""

from pathlib import Path

from anndata import AnnData

from scvae.datasets import simulated_batches


def make() -> AnnData:
    """Simulate 400 cells x 100 genes: four types in three batches."""
    return simulated_batches(
        n_cells=400,
        n_genes=100,
        n_types=4,
        n_batches=3,
        n_latent=5,
        type_scale=1.5,
        batch_scale=0.5,
        library_size=500,
        library_scale=0.3,
        dispersion=2,
        dropout=0.1,
        seed=0,
    )


if __name__ == "__main__":
    path = Path(__file__).with_name("simulated_small.h5ad")
    make().write_h5ad(path, compression="gzip")
    print(path)
