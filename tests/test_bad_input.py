"""Bad input is answered by a message that names the key, the first cells or genes at fault, and the way out."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse

import scvae
from scvae.inference.svi import NonFiniteLoss


@pytest.fixture
def refused(fit, unchanged):
    """``refused(adata, error, message, **options)``: fit fails with that message and leaves the AnnData alone."""

    def check(adata, error, message, **options):
        with unchanged(adata), pytest.raises(error) as caught:
            fit(adata, **options)
        assert re.search(message, str(caught.value.args[0])), caught.value.args[0]

    return check


# ---- Counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, r"adata.X holds negative values, 2 of them, the first: -1.0 in cell 'cell_3', gene 'gene_5'; -1.0 in"),
        (np.nan, r"adata.X holds NaN or infinite values, 2 of them, the first: nan in cell 'cell_3', gene 'gene_5'"),
        (np.inf, r"adata.X holds NaN or infinite values, 2 of them, the first: inf in cell 'cell_3', gene 'gene_5'"),
        (0.5, r"not whole numbers, 2 of them, the first: 0.5 in cell 'cell_3', gene 'gene_5'; 0.5 in"),
    ],
)
def test_values_that_are_not_counts_are_named(adata, refused, cast, value, message):
    x = adata.X.toarray()
    x[3, 5] = x[7, 2] = value
    adata.X = cast(x)
    refused(adata, ValueError, message)
    refused(adata, ValueError, r"wants raw counts\. Whole numbers are in adata.layers\['counts'\]: pass layer='counts'")
    del adata.layers["counts"]
    refused(adata, ValueError, r"raw counts: name the layer that has them, layer=…, or .* program='gaussian'")


def test_all_values_at_fault_are_counted_and_the_first_three_are_named(adata, refused, monkeypatch):
    monkeypatch.setattr(scvae.data.reading, "_BLOCK", 7)
    adata.X = adata.X * 0.001
    refused(adata, ValueError, rf", {adata.X.nnz} of them, the first: [^;]+cell_0[^;]+;[^;]+;[^;]+\. A count model")


def test_values_at_fault_in_a_layer_are_named_with_it(adata, refused):
    adata.layers["counts"] = adata.layers["counts"] * 0.3
    message = r"adata.layers\['counts'\] holds values that are not whole numbers, .* are in adata.X: leave layer=… out"
    refused(adata, ValueError, message, layer="counts")
    adata.X = adata.layers["counts"]
    refused(
        adata, ValueError, r"raw counts: name the layer .* corrected upstream, .* check_counts=False", layer="counts"
    )


def test_negative_integers_are_refused(adata, refused):
    x = adata.X.toarray().astype(int)
    x[3, 5] = -2
    adata.X = x
    refused(adata, ValueError, r"negative values, 1 of them, the first: -2 in cell 'cell_3', gene 'gene_5'")


def test_values_at_fault_in_genes_that_are_not_modelled_do_not_matter(adata, fit):
    adata.var["highly_variable"] = np.arange(adata.n_vars) != 5
    x = adata.X.toarray()
    x[3, 5] = np.nan
    adata.X = x
    assert np.isfinite(fit(adata).elbo(adata)).all()


def test_corrected_counts_are_taken_if_so_asked_for(adata, fit, refused):
    adata.X = adata.X * 0.9
    model = fit(adata, check_counts=False)
    assert np.isfinite(model.elbo(adata)).all()
    for value, message in ((-0.5, "negative values"), (np.nan, "NaN or infinite values")):
        adata.X.data[2] = value
        refused(adata, ValueError, message, check_counts=False)


def test_true_and_false_are_counts(adata, fit):
    expected = fit(AnnData((adata.X > 0).astype(np.float32), obs=adata.obs)).embed
    for x in (adata.X > 0, adata.X.toarray() > 0):
        cells = AnnData(x, obs=adata.obs)
        assert np.array_equal(fit(cells).embed(cells), expected(cells))


@pytest.mark.parametrize("dtype", [object, complex, "U3"])
def test_a_matrix_that_is_not_numeric_is_refused(adata, refused, dtype):
    cells = AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X.toarray().astype(dtype)})
    refused(cells, ValueError, r"adata.layers\['counts'\] is not numeric", layer="counts")


def test_empty_cells_are_named(adata, refused):
    x = adata.X.toarray()
    x[[4, 9]] = 0
    adata.X = x
    refused(
        adata,
        ValueError,
        r"adata.X is empty in 2 cells \('cell_4', 'cell_9'\).*has_counts\(adata, mask_var='auto'\)\].*mask_var=None",
    )


def test_cells_without_a_count_in_the_modelled_genes_are_empty(adata, refused):
    adata.var["few"] = adata.var_names == "gene_1"
    refused(adata, ValueError, r"empty in \d+ cells \('cell_0', .*, …\): none of the 1 genes", mask_var="few")


def test_genes_that_no_cell_expresses_are_named_in_a_warning_of_fit_alone(adata, fit, no_warning):
    x = adata.X.toarray()
    x[:, [3, 6]] = 0
    adata.X = x
    with pytest.warns(UserWarning, match=r"No cell has a count of 2 genes \('gene_3', 'gene_6'\)") as caught:
        model = fit(adata)
    assert [warning.filename for warning in caught] == [__file__]
    with no_warning():
        assert np.isfinite(model.elbo(adata)).all()
        assert np.isfinite(model.log_likelihood(adata[:5], n_samples=2)).all()
        assert np.isfinite(model.embed(adata[:1])).all()


def test_without_counts_the_layer_is_asked_for(adata, refused):
    del adata.X
    refused(adata, ValueError, r"adata.X is empty: name the layer that holds the counts, layer=…")


# ---- Keys and covariates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "raw"}, r"adata.layers has no 'raw'; it has 'counts'\."),
        ({"batch_key": "plate"}, r"adata.obs has no column 'plate'; it has 'batch', 'cell_type', 'library'"),
        ({"categorical_covariate_keys": ["plate"]}, r"adata.obs has no column 'plate'"),
        ({"continuous_covariate_keys": ["depth"]}, r"adata.obs has no column 'depth'"),
        ({"size_factor_key": "factor"}, r"adata.obs has no column 'factor'"),
        ({"mask_var": "hvg"}, r"adata.var has no column 'hvg'; it has 'log_expression'"),
    ],
)
def test_a_missing_key_is_named_with_those_that_there_are(adata, refused, options, message):
    refused(adata, KeyError, message, **options)


def test_that_there_are_no_keys_at_all_is_said(adata, refused):
    cells = AnnData(adata.X)
    refused(cells, KeyError, r"adata.layers has no 'raw'; it has none", layer="raw")
    refused(cells, KeyError, r"adata.obs has no column 'batch'; it has none", batch_key="batch")
    refused(cells, KeyError, r"adata.var has no column 'hvg'; it has none", mask_var="hvg")


@pytest.mark.parametrize(
    "option", ["batch_key", "categorical_covariate_keys", "continuous_covariate_keys", "size_factor_key"]
)
def test_covariates_that_are_missing_in_some_cells_are_refused(adata, refused, option):
    column = "donor" if "cat" in option or "batch" in option else "age"
    adata.obs.loc[["cell_2", "cell_5"], column] = np.nan
    message = (
        rf"adata.obs\['{column}'\] is missing \(NaN\) in 2 cells \('cell_2', 'cell_5'\): fill it in, or leave .*notna"
    )
    refused(adata, ValueError, message, **{option: column})


@pytest.mark.parametrize("column", ["donor", "words", "digits"])
def test_a_continuous_covariate_that_is_not_numeric_is_refused(adata, refused, column):
    adata.obs["words"] = pd.array(["long"] * adata.n_obs, dtype="string")
    adata.obs["digits"] = pd.Series(["1", "2"] * 40, index=adata.obs_names, dtype=object)
    message = rf"adata.obs\['{column}'\] is not numeric \(\w+\): convert it, or name it as a categorical covariate"
    refused(adata, ValueError, message, continuous_covariate_keys=column)


def test_a_continuous_covariate_that_is_infinite_is_refused(adata, refused):
    adata.obs.loc["cell_2", "age"] = np.inf
    refused(adata, ValueError, r"'age'\] is not finite in 1 cell \('cell_2'\)", continuous_covariate_keys=["age"])


@pytest.mark.parametrize("value", [0, -2])
def test_size_factors_that_are_not_positive_are_refused(adata, refused, value):
    adata.obs.loc["cell_2", "size"] = value
    refused(adata, ValueError, r"'size'\] is not positive in 1 cell \('cell_2'\): leave", size_factor_key="size")


def test_a_library_of_size_factors_needs_their_key(adata, refused):
    refused(adata, ValueError, r"library='size_factor' needs size_factor_key=…", library="size_factor")


def test_a_single_category_is_warned_of(adata, fit):
    with pytest.warns(UserWarning, match=r"adata.obs\['dye'\] has the single category 'red'") as caught:
        fit(adata, batch_key="dye")
    assert [warning.filename for warning in caught] == [__file__]


def test_a_covariate_that_does_not_vary_is_warned_of(adata, fit):
    adata.obs["dose"] = 0.1
    with pytest.warns(UserWarning, match=r"adata.obs\['dose'\] is 0.1 in all cells"):
        model = fit(adata, continuous_covariate_keys=["dose"])
    assert model.program.schema.continuous["dose"][1] == 1


@pytest.mark.parametrize("values", [["yes", "no"] * 12, [True, None] * 12, [0.5, 1.0] * 12])
def test_mask_var_must_be_of_true_and_false(adata, refused, values):
    adata.var["mask"] = pd.Series(values, index=adata.var_names, dtype=object)
    refused(adata, ValueError, r"adata.var\['mask'\] is not a column of True and False", mask_var="mask")


def test_mask_var_must_leave_a_gene(adata, refused):
    adata.var["highly_variable"] = False
    refused(adata, ValueError, r"No gene is selected by mask_var='auto'; the AnnData has 24")
    refused(AnnData(np.empty((3, 0))), ValueError, r"No gene is selected by .*; the AnnData has 0")


def test_repeated_names_of_genes_are_refused(adata, fit, refused):
    expected = fit(adata)
    adata.var_names = ["gene_2" if name == "gene_3" else name for name in adata.var_names]
    message = r"adata.var_names has repeats, 'gene_2'.*Call adata.var_names_make_unique\(\) first"
    del adata.obsm["X_scvae"], adata.obsm["X_scvae_std"], adata.obs["scvae_library"], adata.uns["scvae"]
    refused(adata, ValueError, message)
    with pytest.raises(ValueError, match=message):
        expected.embed(adata)
    adata.var["mask"] = adata.var_names != "gene_2"
    fit(adata, mask_var="mask")


# ---- Cells that the model has not seen ---------------------------------------------------------------------


def test_new_batches_are_listed(adata, model):
    adata.obs["batch"] = ["batch_0", "x", "y", "batch_1"] * 20
    message = r"adata.obs\['batch'\] has categories that the model was not fitted to: 'x', 'y'; it knows 'batch_0', "
    for ask in (model.embed, model.denoise, model.elbo, model.log_likelihood):
        with pytest.raises(ValueError, match=message + r"'batch_1'. Pass unknown_batch='ignore'"):
            ask(adata)


@pytest.mark.parametrize("encode_covariates", [False, True])
def test_cells_of_new_batches_are_embedded_without_it_and_others_as_ever(adata, fit, encode_covariates):
    model = fit(adata, batch_key="batch", categorical_covariate_keys=["donor"], encode_covariates=encode_covariates)
    known, fractions = model.embed(adata), model.denoise(adata)
    new = adata.copy()
    new.obs["batch"] = new.obs["batch"].cat.rename_categories({"batch_1": "x"})
    is_known = (new.obs["batch"] != "x").to_numpy()
    embedded = model.embed(new, unknown_batch="ignore")
    assert np.array_equal(embedded[is_known], known[is_known])
    assert np.isfinite(embedded).all()
    assert np.array_equal(embedded, known) == (not encode_covariates)
    ignored = model.denoise(new, unknown_batch="ignore")
    assert np.allclose(ignored[is_known], fractions[is_known], rtol=1e-5)
    assert not np.allclose(ignored[~is_known], fractions[~is_known], rtol=1e-3)
    new.obs["batch"] = "z"
    assert np.allclose(model.denoise(new, unknown_batch="ignore")[~is_known], ignored[~is_known], rtol=1e-5)


def test_what_to_do_with_unknowns_is_one_of_three_things(adata, model):
    with pytest.raises(ValueError, match=r"unknown_batch is one of 'error', 'ignore', 'marginal', not 'skip'"):
        model.embed(adata, unknown_batch="skip")
    with pytest.raises(ValueError, match=r"missing_genes is one of 'error', 'zero', 'impute', not 'skip'"):
        model.embed(adata, missing_genes="skip")


def test_missing_genes_are_named_and_are_zero_if_so_asked_for(adata, model):
    fewer = adata[:, ~adata.var_names.isin(["gene_4", "gene_9"])].copy()
    message = r"The AnnData lacks 2 genes \('gene_4', 'gene_9'\) of the 24 that .* Pass missing_genes='zero'"
    with pytest.raises(ValueError, match=message):
        model.embed(fewer)
    keep = fewer.X.sum(1).A1 > 0
    zero = adata[keep].copy()
    zero.X = zero.X.multiply(~adata.var_names.isin(["gene_4", "gene_9"])).tocsr()
    assert np.array_equal(model.embed(fewer[keep], missing_genes="zero"), model.embed(zero))
    assert np.array_equal(model.denoise(fewer[keep], missing_genes="zero"), model.denoise(zero))


def test_genes_that_are_all_missing_leave_the_cells_empty(adata, model):
    adata.var_names = [f"other_{name}" for name in adata.var_names]
    for how in ("error", "zero"):
        with pytest.raises(ValueError, match=r"None of the 24 genes .* called 'other_gene_0', .*: ids or symbols\?"):
            model.embed(adata, missing_genes=how)
    with pytest.raises(ValueError, match=r"None of the 24 genes of the model is in the AnnData, which has none"):
        model.embed(adata[:, :0].copy(), missing_genes="zero")


def test_new_cells_are_checked_as_those_of_the_fit(adata, model):
    bad = adata.copy()
    bad.X = bad.X * 0.3
    with pytest.raises(ValueError, match="not whole numbers"):
        model.embed(bad)
    with pytest.raises(KeyError, match="no column 'batch'"):
        model.embed(AnnData(adata.X, var=adata.var))
    with pytest.raises(ValueError, match="The AnnData has no cells"):
        model.embed(adata[:0])


# ---- Few cells, few genes ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:No cell has a count")
@pytest.mark.parametrize("n", [2, 3, 20])
def test_fewer_cells_than_a_minibatch_will_do(adata, fit, n):
    cells = adata[:n].copy()
    model = fit(cells)
    assert np.isfinite(cells.obsm["X_scvae"]).all()
    assert np.isfinite(model.elbo(cells)).all()


@pytest.mark.filterwarnings("ignore:No cell has a count")
def test_two_cells_can_be_fitted_with_two_batches_and_held_out_cells(adata, fit):
    cells = adata[[np.argmax(adata.obs["batch"] == batch) for batch in ("batch_0", "batch_1")]].copy()
    fit(cells, batch_key="batch", validation_fraction=0.5, batch_size=2)
    assert np.isfinite(cells.obsm["X_scvae"]).all()


def test_a_single_cell_is_refused(adata, refused):
    refused(adata[:1].copy(), ValueError, "The AnnData has 1 cell: a latent space needs at least two")
    refused(adata[:0].copy(), ValueError, "The AnnData has no cell", continuous_covariate_keys="age")


def test_a_fitted_model_takes_a_single_cell(adata, model):
    for ask in (model.embed, model.denoise, model.elbo, model.log_likelihood):
        assert np.allclose(ask(adata[:1]), ask(adata[:1].copy()))
        assert len(ask(adata[:1])) == 1


def test_one_gene_will_do(adata, fit):
    cells = adata[adata[:, "gene_0"].X.toarray()[:, 0] > 0, ["gene_0"]].copy()
    model = fit(cells, batch_key="batch")
    assert np.isfinite(cells.obsm["X_scvae"]).all()
    assert np.array_equal(model.denoise(cells), np.ones((cells.n_obs, 1)))


# ---- Arguments ---------------------------------------------------------------------------------------------


def test_an_unknown_option_is_answered_by_all_that_there_are(adata, refused):
    message = (
        r"'n_hiden' \(did you mean 'n_hidden'\?\)\. Options of the program 'zinb': n_latent, n_hidden, .*; "
        r"of the training: max_epochs, .*kl_w"
    )
    refused(adata, TypeError, message, n_hiden=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "gaussian"}, "likelihood is one of 'zinb', 'nb', 'poisson', not 'gaussian'"),
        ({"dispersion": "cell"}, "dispersion is one of 'gene', 'gene-batch', 'gene-cell', not 'cell'"),
        ({"library": "total"}, "library is one of 'latent', 'observed', 'size_factor', not 'total'"),
        ({"program": "vae"}, "There is no program 'vae'; there are 'zinb'"),
        ({"device": "tpu9"}, "device is 'auto', 'cpu' or 'cuda', not 'tpu9'"),
        ({"device": "mps"}, "device is 'auto', 'cpu' or 'cuda', not 'mps': others lack double precision"),
        ({"max_epochs": 0}, "max_epochs is a whole number of at least 1, or None, not 0"),
        ({"batch_size": 1}, "batch_size is a whole number of at least 2, not 1"),
        ({"learning_rate": 0}, "learning_rate is a number above 0, not 0"),
        ({"kl_weight": -1}, "kl_weight is a number of at least 0, not -1"),
        ({"kl_warmup": 1.5}, "kl_warmup is a number from 0 to 1, not 1.5"),
        ({"validation_fraction": 1}, "validation_fraction is a number from 0 to below 1, not 1"),
        ({"patience": 0}, "patience is a whole number of at least 1, not 0"),
        ({"min_steps": 0}, "min_steps is a whole number of at least 1, not 0"),
        ({"weight_decay": -1}, "weight_decay is a number of at least 0, not -1"),
    ],
)
def test_an_argument_out_of_range_is_answered_by_the_range(adata, refused, options, message):
    refused(adata, ValueError, message, **options)


@pytest.mark.parametrize("program", [3, dict, ZeroDivisionError("x")])
def test_a_program_is_a_name_or_a_program(adata, refused, program):
    refused(
        adata,
        TypeError,
        "program is a name, the options of a program, or a class derived from scvae.programs.Program",
        program=program,
    )


def test_what_is_not_an_anndata_is_refused(fit):
    with pytest.raises(TypeError, match="adata is an AnnData, not a "):
        fit(np.ones((3, 2)))
    with pytest.raises(FileNotFoundError, match="no such file: cells.h5ad"):
        fit("cells.h5ad")


def test_a_gpu_that_is_not_there_is_refused(adata, refused, model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = "device='cuda', but torch sees no GPU; device='auto' takes one"
    refused(adata, ValueError, message, device="cuda")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        scvae.load(tmp_path / "model", device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(adata, ValueError, "device='cuda:1', but torch sees 1 GPU", device="cuda:1")


def test_a_view_of_a_file_cannot_be_written_to(adata, fit, model, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    message = r"A view of a backed AnnData cannot be written to: call .to_memory\(\) on it first"
    with pytest.raises(ValueError, match=message):
        fit(backed[:40])
    with pytest.raises(ValueError, match=message):
        model.denoise(backed[:40], layer_added="denoised")
    assert np.array_equal(model.embed(backed[:40]), model.embed(adata[:40]))
    backed.file.close()


def test_questions_about_what_the_model_does_not_know_are_refused(adata, fit, model):
    with pytest.raises(ValueError, match="The model knows no batch 'x'; it knows 'batch_0', 'batch_1'"):
        model.denoise(adata, batch="x")
    with pytest.raises(ValueError, match="The model knows no batch 'x'"):
        model.generate(3, batch="x")
    with pytest.raises(ValueError, match="The model knows no gene 'ACTB', 'TP53'; it knows 'gene_0', .*, …"):
        model.denoise(adata, genes=["gene_1", "ACTB", "TP53"])
    without = fit(adata)
    for ask in (lambda: without.denoise(adata, batch="batch_0"), lambda: without.generate(3, batch="batch_0")):
        with pytest.raises(ValueError, match="The model was fitted without batch_key: it knows no batches"):
            ask()


def test_questions_that_make_no_sense_are_refused(adata, model):
    with pytest.raises(ValueError, match="library_size is a number above 0 or 'cell', not 'median'"):
        model.denoise(adata, library_size="median")
    with pytest.raises(ValueError, match="method is one of 'importance', 'prior', not 'harmonic'"):
        model.log_likelihood(adata, method="harmonic")
    for ask in (model.denoise, model.elbo, model.log_likelihood):
        with pytest.raises(ValueError, match="n_samples is a whole number of at least 1, not 0"):
            ask(adata, n_samples=0)
    with pytest.raises(ValueError, match="n is a whole number of at least 1, not 0"):
        model.generate(0)


# ---- A loss that is not finite -----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_training_and_names_step_site_and_cells(adata, breaking, refused):
    message = r"not finite at step 4, site 'x', in \d+ cells \('cell_\d+', .*learning_rate. The AnnData is unchanged"
    refused(adata, NonFiniteLoss, message, program=breaking, batch_key="batch", validation_fraction=0)


def test_the_cells_named_are_those_at_fault(adata, breaking, fit):
    with pytest.raises(NonFiniteLoss) as caught:
        fit(adata, breaking, batch_key="batch", validation_fraction=0)
    assert caught.value.step == 4
    assert set(adata.obs["batch"].iloc[caught.value.rows]) == {"batch_1"}
    names = re.findall(r"'(cell_\d+)'", str(caught.value))
    assert names == adata.obs_names[caught.value.rows[:5]].tolist()


def test_a_gradient_that_is_not_finite_stops_the_training_too(adata, breaking, refused):
    message = r"not finite at step 4, site 'gradient'"
    refused(adata, NonFiniteLoss, message, program=breaking, where="gradient", validation_fraction=0)


def test_a_learning_rate_that_is_far_too_high_is_named_or_survived(adata, fit, unchanged):
    with unchanged(adata), pytest.raises(NonFiniteLoss, match="pass a smaller learning_rate"):
        fit(adata, learning_rate=1e30, max_epochs=10)


# ---- Saved files -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def weights_of(saved):
    (path,) = saved.glob("weights*.safetensors")
    return path


def test_a_missing_file_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere holds no scvae model: model.json is missing"):
        scvae.load(tmp_path / "nowhere")
    weights_of(saved).unlink()
    with pytest.raises(FileNotFoundError, match=r"weights-\w{16}.safetensors is missing"):
        scvae.load(saved)


@pytest.mark.parametrize("name", ["model.json", "weights"])
@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(saved, name, fraction):
    path = weights_of(saved) if name == "weights" else saved / name
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match="is damaged"):
        scvae.load(saved)


def test_weights_that_were_edited_are_refused(saved):
    content = bytearray(weights_of(saved).read_bytes())
    content[-5] ^= 1
    weights_of(saved).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its contents are not those that were saved. Save the model anew"):
        scvae.load(saved)


@pytest.mark.parametrize(
    "edit",
    [
        lambda file: file["content"]["schema"]["genes"].reverse(),
        lambda file: file["content"]["options"].update(n_latent=4),
        lambda file: file["content"].update(program="other"),
        lambda file: file.update(content=None),
        lambda file: file.update(sha256={}),
        lambda file: file.pop("content"),
        lambda file: file.pop("sha256"),
    ],
)
def test_a_description_that_was_edited_is_refused(saved, edit):
    file = json.loads((saved / "model.json").read_text())
    edit(file)
    (saved / "model.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="is damaged"):
        scvae.load(saved)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "{}", "null", "\N{SNOWMAN}"])
def test_json_of_another_kind_is_refused(saved, text):
    (saved / "model.json").write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"model.json is damaged: it is not the JSON that scvae writes"):
        scvae.load(saved)
    (saved / "model.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.json is damaged"):
        scvae.load(saved)


def test_a_later_format_is_refused_whatever_else_is_in_the_file(saved):
    (saved / "model.json").write_text(json.dumps({"format": 4, "contents": {}}))
    with pytest.raises(ValueError, match="is in format 4; this version of scvae reads format 3: read it with"):
        scvae.load(saved)


def test_a_program_of_ones_own_has_to_be_passed_on(adata, poisson_factors, breaking, tmp_path):
    scvae.fit(adata, poisson_factors, max_epochs=1, progress=False).save(tmp_path / "model")
    for kind in (None, breaking):
        with pytest.raises(ValueError, match="holds the program 'poisson_factors': pass its class, program=…"):
            scvae.load(tmp_path / "model", program=kind)


def test_what_exists_is_not_overwritten_unasked(model, saved):
    with pytest.raises(FileExistsError, match="exists: pass overwrite=True to replace it"):
        model.save(saved)
    model.save(saved, overwrite=True)
    scvae.load(saved)


def test_a_folder_of_other_things_is_never_overwritten(model, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter_1.txt").write_text("It was a dark and stormy night.")
    for path in (tmp_path / "thesis", tmp_path / "thesis" / "chapter_1.txt"):
        with pytest.raises(FileExistsError, match="holds other things than a saved model"):
            model.save(path, overwrite=True)
    assert (tmp_path / "thesis" / "chapter_1.txt").read_text().startswith("It was")
