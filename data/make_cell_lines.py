"""Make ``cell_lines.h5ad``, which lies beside this script, from the tables that the authors of the cells published.

    git clone https://github.com/LuyiTian/sc_mixology
    python data/make_cell_lines.py sc_mixology/data/csv

Needs scikit-misc beside the package, for the choice of genes: ``pip install "scvae-pyro[workflow]"``.
"""

import argparse
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from scipy import sparse

N_GENES = 2000
EXPERIMENTS = {"celseq2": "sc_celseq2", "dropseq": "sc_dropseq", "celseq2_5cl_p1": "sc_celseq2_5cl_p1"}


def read(folder: Path) -> AnnData:
    """Read the cells of the three experiments, with the genes that all three have."""
    experiments = {}
    for batch, name in EXPERIMENTS.items():
        counts = pd.read_csv(folder / f"{name}.count.csv.gz", index_col=0).T  # published as genes × cells
        cells = pd.read_csv(folder / f"{name}.metadata.csv.gz", index_col=0).loc[counts.index]
        obs = pd.DataFrame({"cell_line": cells["cell_line"], "doublet": cells["demuxlet_cls"] == "DBL"})
        obs.index = f"{batch}-" + counts.index.astype(str)
        experiments[batch] = AnnData(
            sparse.csr_matrix(counts.to_numpy(np.float32)), obs, pd.DataFrame(index=counts.columns.astype(str))
        )
    adata = anndata.concat(experiments, label="batch", join="inner")
    adata.obs["cell_line"] = adata.obs["cell_line"].astype("category")
    adata.obs["batch"] = pd.Categorical(adata.obs["batch"].astype(str))
    return adata


def make(adata: AnnData, n_genes: int = N_GENES) -> AnnData:
    """Choose the genes that vary most within the experiments, and the tenth of the cells that is held out."""
    adata = adata.copy()
    sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=n_genes, batch_key="batch")
    split = np.full(adata.n_obs, "train")
    split[np.random.default_rng(0).permutation(adata.n_obs)[: adata.n_obs // 10]] = "test"
    counts = sparse.csr_matrix(adata.X[:, adata.var["highly_variable"].to_numpy()], dtype=np.uint16)
    obs = adata.obs[["batch", "cell_line", "doublet"]].assign(split=pd.Categorical(split))
    return AnnData(counts, obs, pd.DataFrame(index=adata.var_names[adata.var["highly_variable"]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make cell_lines.h5ad from the tables of sc_mixology.")
    parser.add_argument("folder", type=Path, help="with the published *.count.csv.gz and *.metadata.csv.gz")
    path = Path(__file__).with_name("cell_lines.h5ad")
    made = make(read(parser.parse_args().folder))
    with h5py.File(path, "w") as file:
        packed = {"compression": "gzip", "compression_opts": 9, "shuffle": True}
        anndata.io.write_elem(file, "/", made, dataset_kwargs=packed)
    print(path)
