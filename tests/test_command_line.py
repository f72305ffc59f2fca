"""The command line gives what the functions give, refuses before it works, and explains itself."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import typer.core

import scvae
import scvae.__main__ as command_line
import scvae.programs
from scvae.boundary import formats
from scvae.commands import app
from scvae.commands.results import end_if_interrupted

DATA = Path(__file__).parents[1] / "data" / "simulated_small.h5ad"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scvae", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.main()
        code = exit.value.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # what the interpreter prints for it
            code, err = 1, err + code + "\n"
        return code or 0, out, err

    return run


@pytest.fixture
def no_fit(monkeypatch):
    """Any training is a failure."""
    monkeypatch.setattr(scvae, "fit", lambda *_, **__: pytest.fail("it trained before it refused"))


def test_fit_writes_what_the_function_writes(run, tmp_path):
    code, out, _ = run(
        "fit", DATA, "--batch-key", "batch", "--output", "out.h5ad", "--model", "model", "--max-epochs", 2,
        "--n-latent", 4, "--likelihood", "nb", "--dispersion", "gene-batch", "--library", "observed",
        "--batch-size", 64, "--seed", 3, "--device", "cpu", "--key-added", "X_mine",
    )  # fmt: skip
    assert code == 0
    assert "out.h5ad" in out
    adata = anndata.read_h5ad(DATA)
    scvae.fit(
        adata, batch_key="batch", max_epochs=2, n_latent=4, likelihood="nb", dispersion="gene-batch",
        library="observed", batch_size=64, seed=3, device="cpu", key_added="X_mine", progress=False,
    )  # fmt: skip
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(written.obsm["X_mine"], adata.obsm["X_mine"])
    np.testing.assert_array_equal(written.obsm["X_mine_std"], adata.obsm["X_mine_std"])
    assert (written.X != anndata.read_h5ad(DATA).X).nnz == 0
    assert scvae.load(tmp_path / "model").program.options["likelihood"] == "nb"


@pytest.mark.parametrize("program", ["pose", "matrix_normal"])
def test_programs_of_images_are_fitted_too(run, tmp_path, program):
    images = np.random.default_rng(0).uniform(size=(40, 8, 8)).astype(np.float32)
    anndata.AnnData(shape=(40, 0), obsm={"image": images}).write_h5ad("images.h5ad")
    code, _, err = run(
        "fit", "images.h5ad", "--program", program, "--image-key", "image", "--output", "out.h5ad", "--model", "model",
        "--n-latent", 2, "--max-epochs", 1, "--option", "n_hidden=8",
    )  # fmt: skip
    assert code == 0, err
    written = anndata.read_h5ad("out.h5ad")
    assert ("scvae_angle" in written.obs) == (program == "pose")
    defaults = scvae.programs.PROGRAMS[program].defaults
    expected = {**defaults, "max_epochs": 1}
    assert {k: written.uns["scvae"]["training"][k] for k in expected} == expected
    code, _, err = run("embed", "images.h5ad", "--model", "model", "--output", "embedded.h5ad")
    assert code == 0, err
    again = anndata.read_h5ad("embedded.h5ad")
    assert np.array_equal(again.obsm["X_scvae"], written.obsm["X_scvae"])


def test_embed_repeats_the_embedding_of_the_fit(run, tmp_path):
    assert run("fit", DATA, "--output", "fitted.h5ad", "--model", "model", "--max-epochs", 2)[0] == 0
    code, out, _ = run("embed", DATA, "--model", "model", "--output", "embedded.h5ad")
    assert code == 0
    assert "embedded.h5ad" in out
    fitted, embedded = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("fitted", "embedded"))
    np.testing.assert_allclose(embedded.obsm["X_scvae"], fitted.obsm["X_scvae"], rtol=1e-5, atol=1e-6)


def test_embed_refuses_new_batches_and_missing_genes_unless_told(run, tmp_path):
    assert run("fit", DATA, "--batch-key", "batch", "--model", "model", "--max-epochs", 1)[0] == 0
    adata = anndata.read_h5ad(DATA)[:, 5:].copy()
    adata.obs["batch"] = "batch_9"
    adata.write_h5ad(tmp_path / "new.h5ad")

    embed = ("embed", "new.h5ad", "--model", "model", "--output", "out.h5ad", "--key-added", "X_new")
    code, _, err = run(*embed, "--missing-genes", "zero")
    assert (code, "batch_9" in err) == (1, True)
    code, _, err = run(*embed, "--unknown-batch", "ignore")
    assert (code, "gene_0" in err) == (1, True)
    assert not (tmp_path / "out.h5ad").exists()
    assert run(*embed, "--missing-genes", "zero", "--unknown-batch", "ignore")[0] == 0
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_new"].shape == (400, 20)


def test_extend_and_transfer_write_what_the_functions_write(run, tmp_path):
    adata = anndata.read_h5ad(DATA)
    is_new = (adata.obs["batch"] == adata.obs["batch"].iloc[0]).to_numpy()
    reference, query = adata[~is_new].copy(), adata[is_new].copy()
    reference.write_h5ad("reference.h5ad")
    query.write_h5ad("query.h5ad")
    assert run("fit", "reference.h5ad", "--batch-key", "batch", "--model", "model", "--max-epochs", 2)[0] == 0
    code, out, err = run(
        "extend", "query.h5ad", "--model", "model", "--extended", "extended", "--output", "out.h5ad", "--max-steps", 9,
        "--batch-size", 32, "--learning-rate", 0.02, "--deviation-scale", 0.3, "--seed", 4, "--quiet",
    )  # fmt: skip
    assert (code, out, err) == (0, "", "")
    options = {"max_steps": 9, "batch_size": 32, "learning_rate": 0.02, "deviation_scale": 0.3, "seed": 4}
    extended = scvae.load("model").extend(query, progress=False, **options)
    np.testing.assert_array_equal(anndata.read_h5ad("out.h5ad").obsm["X_scvae"], extended.embed(query))
    assert scvae.load("extended").training["max_steps"] == 9
    code, out, err = run(
        "transfer", "query.h5ad", "--reference", "reference.h5ad", "--labels-key", "cell_type", "--model", "extended",
        "--output", "labelled.h5ad", "--coverage", 0.8, "--key-added", "mine",
    )  # fmt: skip
    assert code == 0, err
    table = scvae.tl.transfer_labels(extended, reference, query, "cell_type", coverage=0.8, key_added="mine")
    n_out = table["out_of_reference"].sum()
    assert out == f'labels: .obs["mine"] in labelled.h5ad; {n_out} of {len(table)} cells are out of the reference\n'
    written = anndata.read_h5ad("labelled.h5ad")
    assert (written.obs["mine"] == table["label"]).all()
    np.testing.assert_array_equal(written.obs["mine_score"], table["score"])
    reference[:, 1:].write_h5ad("few_genes.h5ad")
    code, _, err = run(
        "transfer", "query.h5ad", "--reference", "few_genes.h5ad", "--labels-key", "cell_type", "--model", "extended",
        "--output", "no.h5ad",
    )  # fmt: skip
    assert (code, "few_genes.h5ad: The reference lacks 1 gene" in err, Path("no.h5ad").exists()) == (1, True, False)
    code, _, err = run("extend", "query.h5ad", "--model", "model")
    assert (code, "nothing would be kept: name --output, --extended or both" in err) == (2, True)
    code, _, err = run("extend", "reference.h5ad", "--model", "model", "--output", "no.h5ad")
    assert (code, "knows all batches of these cells" in err, Path("no.h5ad").exists()) == (1, True, False)
    where = ("--unknown-batch", "marginal", "--missing-genes", "impute", "--output", "embedded.h5ad")
    assert run("embed", "query.h5ad", "--model", "model", *where)[0] == 0


def test_every_option_reaches_the_function(run, monkeypatch):
    passed = {}

    class Model:
        stopped = "finished"

        def save(self, path, **how):
            passed.update(path=path, **how)

    monkeypatch.setattr(
        scvae, "fit", lambda adata, program, **options: passed.update(options, program=program) or Model()
    )
    code, _, err = run(
        "fit", DATA, "--model", "model", "--layer", "counts",
        "--categorical-covariate-key", "donor", "--categorical-covariate-key", "sex",
        "--continuous-covariate-key", "age", "--size-factor-key", "size", "--mask-var", "chosen",
        "--labels-key", "cell_type", "--unlabeled", "?",
        "--no-check-counts", "--overwrite", "--program", "vq_gaussian", "--use-rep", "panel", "--posterior", "iaf",
        "--prior", "vamp", "--likelihood", "nb", "--dispersion", "gene-batch", "--option", "n_hidden=64",
        "--option", "encode_covariates=false", "--option", "noise=gene", "--option", "noise_scale=null",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert (passed["program"], passed["use_rep"]) == ("vq_gaussian", "panel")
    assert (passed["posterior"], passed["prior"]) == ("iaf", "vamp")
    assert (passed["likelihood"], passed["dispersion"]) == ("nb", "gene-batch")
    assert (passed["n_hidden"], passed["encode_covariates"]) == (64, False)
    assert (passed["noise"], passed["noise_scale"]) == ("gene", None)
    assert passed["layer"] == "counts"
    assert list(passed["categorical_covariate_keys"]) == ["donor", "sex"]
    assert list(passed["continuous_covariate_keys"]) == ["age"]
    assert passed["size_factor_key"] == "size"
    assert (passed["labels_key"], passed["unlabeled"]) == ("cell_type", "?")
    assert passed["mask_var"] == "chosen"
    assert passed["check_counts"] is False
    assert passed["overwrite"] is True
    assert "library" not in passed  # so that the size factors imply it
    passed.clear()
    assert run("fit", DATA, "--model", "model", "--all-genes")[0] == 0
    assert passed["mask_var"] is None
    assert not {"posterior", "prior", "likelihood", "dispersion", "library"} & passed.keys()


@pytest.mark.parametrize("text", ["n_hidden", "=64", "n-hidden=64"])
def test_an_option_without_name_or_value_is_refused(run, no_fit, text):
    code, _, err = run("fit", DATA, "--model", "model", "--option", text)
    assert code == 2
    assert "NAME=VALUE" in err


def test_fit_refuses_to_keep_nothing(run, no_fit):
    code, _, err = run("fit", DATA)
    assert code == 2
    assert "--output" in err
    assert "--model" in err


@pytest.mark.parametrize("option", ["--output", "--model"])
def test_fit_refuses_a_missing_folder_before_training(run, no_fit, option):
    code, _, err = run("fit", DATA, option, "nowhere/result")
    assert code == 1
    assert re.fullmatch(rf"scvae: {option} nowhere/result: the folder \S+nowhere does not exist.*\n", err)


def test_fit_refuses_a_model_that_is_there_before_training(run, no_fit, tmp_path):
    (tmp_path / "model").mkdir()
    code, _, err = run("fit", DATA, "--model", "model")
    assert (code, err) == (1, "scvae: --model model exists: name another folder, or add --overwrite\n")


def test_embed_refuses_a_missing_folder(run):
    code, _, err = run("embed", DATA, "--model", "model", "--output", "nowhere/out.h5ad")
    assert (code, "nowhere does not exist" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "absent.h5ad", "--model", "m"], "no such file: absent.h5ad"),
        (["fit", "text.h5ad", "--model", "m"], "text.h5ad is not an .h5ad file"),
        (["fit", DATA, "--model", "m", "--batch-key", "plate"], "plate"),
        (["fit", DATA, "--model", "m", "--layer", "raw"], "raw"),
        (["fit", DATA, "--model", "m", "--mask-var", "chosen"], "chosen"),
        (["fit", DATA, "--model", "m", "--device", "tpu"], "tpu"),
        (["fit", DATA, "--model", "m", "--library", "size_factor"], "--library size_factor needs --size-factor-key …"),
        (["embed", DATA, "--model", "absent", "--output", "out.h5ad"], "absent"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_1(run, tmp_path, arguments, message):
    (tmp_path / "text.h5ad").write_text("this is no HDF5 file")
    code, out, err = run(*arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("scvae: ")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit"],
        ["fit", DATA, "--n-latent", "0"],
        ["fit", DATA, "--likelihood", "normal"],
        ["foot"],
        ["embed", DATA],
    ],
)
def test_wrong_usage_is_exit_code_2(run, no_fit, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage: scvae" in err


def test_a_failure_that_is_no_bad_input_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise AssertionError("a defect")

    monkeypatch.setattr(scvae, "fit", broken)
    monkeypatch.setattr(sys, "argv", ["scvae", "fit", str(DATA), "--model", "absent_model"])
    with pytest.raises(AssertionError, match="a defect"):
        command_line.main()


def test_a_warning_is_one_line_too(run, tmp_path):
    adata = anndata.read_h5ad(DATA)
    adata.obs["batch"] = "one"
    adata.write_h5ad(tmp_path / "in.h5ad")
    code, _, err = run("fit", "in.h5ad", "--batch-key", "batch", "--model", "m", "--max-epochs", 1)
    assert code == 0
    assert next(line for line in err.splitlines() if "single category" in line).startswith("scvae: warning: ")


@pytest.mark.parametrize("command", [(), ("fit",), ("embed",), ("demo",)])
def test_help_teaches(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage: scvae" in out
    if command in [(), ("fit",), ("embed",)]:
        assert f"  scvae {' '.join(command) or 'fit'} " in out  # an example, on a line of its own


def test_demo_calls_the_function(run, monkeypatch):
    import scvae.demo

    folders = []
    monkeypatch.setattr(scvae.demo, "demo", folders.append)
    assert run("demo", "--output-dir", "there")[0] == 0
    assert run("demo")[0] == 0
    assert folders == [Path("there"), Path("scvae_demo")]


def test_version(run):
    assert run("--version") == (0, f"scvae {scvae.__version__}\n", "")


def in_a_fresh_process(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_python_m_scvae_is_the_command_line():
    done = in_a_fresh_process("-m", "scvae", "--version")
    assert (done.returncode, done.stdout) == (0, f"scvae {scvae.__version__}\n")


def test_without_typer_it_says_how_to_install_it():
    done = in_a_fresh_process("-c", "import sys; sys.modules['typer'] = None; import scvae.__main__")
    assert done.returncode == 1
    assert done.stderr == 'scvae: the command line needs typer: pip install "scvae-pyro[cli]"\n'


# ---- What is refused before the work -----------------------------------------------------------------------


@pytest.fixture
def cells(tmp_path):
    """A copy of the data, under several names, and what it holds."""
    path = tmp_path / "a.h5ad"
    path.write_bytes(DATA.read_bytes())
    (tmp_path / "soft.h5ad").symlink_to("a.h5ad")
    os.link(path, tmp_path / "hard.h5ad")
    (tmp_path / "sub").mkdir()
    return path


@pytest.fixture
def no_work(monkeypatch, no_fit):
    """To read a file or a model is a failure."""
    for module, name in ((formats, "read"), (scvae, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it worked before it refused"), raising=False)


def commands(model="model"):
    """Yield the start of each command that writes an AnnData, but for its output."""
    yield ("fit", "a.h5ad")
    yield ("embed", "a.h5ad", "--model", model)
    yield ("denoise", "a.h5ad", "--model", model)
    yield ("generate", "--model", model, "--n", 3)
    yield ("differential", "a.h5ad", "--model", model, "--groupby", "cell_type")
    yield ("extend", "a.h5ad", "--model", model)
    yield ("transfer", "a.h5ad", "--reference", "b.h5ad", "--labels-key", "cell_type", "--model", model)
    yield ("cluster", "a.h5ad", "--n-clusters", 2)
    yield ("tune", "a.h5ad")


@pytest.mark.parametrize("name", ["a.h5ad", "sub/../a.h5ad", "soft.h5ad", "hard.h5ad"])
def test_an_output_that_is_the_input_is_refused(run, cells, no_work, name):
    for command in commands():
        if command[0] == "generate":
            continue
        code, out, err = run(*command, "--output", name, "--overwrite")
        assert (code, out) == (1, "")
        assert err == f"scvae: --output {name} is the same as a.h5ad, which it would change: name another file\n"
    assert cells.read_bytes() == DATA.read_bytes()


def test_a_model_that_is_the_input_or_holds_it_is_refused(run, cells, no_work):
    for arguments, how in (
        (("a.h5ad", "--model", "a.h5ad"), "is the same as"),
        (("a.h5ad", "--model", "."), "holds"),
        (("sub/../a.h5ad", "--model", "../" + cells.parent.name), "holds"),
        (("a.h5ad", "--model", "out.h5ad", "--output", "out.h5ad"), "is the same as"),
    ):
        code, _, err = run("fit", *arguments, "--overwrite")
        assert (code, how in err, err.count("\n")) == (1, True, 1), err
    assert cells.read_bytes() == DATA.read_bytes()


def test_an_output_in_a_model_or_in_an_input_is_refused(run, cells, no_work, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "b.zarr").mkdir()
    for command in commands():
        if "--model" in command:
            code, _, err = run(*command, "--output", "model/out.h5ad")
            assert (code, "lies in model" in err) == (1, True), err
    for output in ("--output", "--model"):
        code, _, err = run("fit", "b.zarr", output, "b.zarr/out.h5ad")
        assert (code, "lies in b.zarr" in err) == (1, True), err


def test_an_output_of_another_kind_is_refused(run, cells, no_work):
    for command in commands():
        code, _, err = run(*command, "--output", "x.txt")
        assert (code, err.count("\n")) == (1, 1)
        assert "name it x.h5ad" in err
    for option, name in (("--output", "t.txt"), ("--figure", "f.xyz"), ("--output", "t.h5ad")):
        code, _, err = run("compare", "a.h5ad", "c.json", option, name)
        assert (code, "name it" in err) == (1, True), err


def test_an_output_that_is_there_is_refused_unless_told(run, cells, no_work, tmp_path):
    for name in ("out.h5ad", "t.csv", "f.png"):
        (tmp_path / name).write_text("mine")
    told = "exists: name another file, or add --overwrite\n"
    for command in commands():
        assert run(*command, "--output", "out.h5ad") == (1, "", f"scvae: --output out.h5ad {told}")
    assert run("compare", "a.h5ad", "c.json", "--output", "t.csv") == (1, "", f"scvae: --output t.csv {told}")
    assert run("compare", "a.h5ad", "c.json", "--figure", "f.png") == (1, "", f"scvae: --figure f.png {told}")
    for name in ("out.h5ad", "t.csv", "f.png"):
        assert (tmp_path / name).read_text() == "mine"
    folder = tmp_path / "scvae_demo"
    folder.mkdir()
    for name in ("umap.png", "cell_lines.h5ad", "model"):
        (folder / name).write_text("mine")
        code, _, err = run("demo")
        assert (code, f"{name} exists" in err) == (1, True)
        (folder / name).unlink()


def test_a_folder_of_other_things_is_refused_for_a_model_before_training(run, cells, no_work, tmp_path):
    (tmp_path / "sub" / "thesis.txt").write_text("mine")
    code, _, err = run("fit", "a.h5ad", "--model", "sub", "--overwrite")
    assert (code, "other things than a saved model (thesis.txt)" in err) == (1, True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("n_latents=3", "There is no option 'n_latents'"),
        ("n_hidden=abc", "n_hidden is a whole number"),
        ("n_hidden=", "n_hidden is a whole number"),
        ("n_hidden=2.5", "n_hidden is a whole number"),
        ("n_hidden=true", "n_hidden is a whole number"),
        ("n_hidden=[1]", "n_hidden is a whole number"),
        ("n_components=x", "n_components is a whole number of at least 1, or None"),
        ("dropout_rate=NaN", "dropout_rate is a number"),
        ("learning_rate=fast", "learning_rate is a number"),
        ("encode_covariates=yes", "encode_covariates is True or False"),
        ("prior=", "prior is one of 'normal'"),
        ("batch_size=10", "it is no option of the program; pass --batch-size for it"),
        ("batch_key=batch", "it is no option of the program; pass --batch-key for it"),
        ("adata=3", "it is no option of the program; see scvae fit --help"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_those_there_are(run, no_work, option, message):
    code, out, err = run("fit", DATA, "--model", "m", "--option", option)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"scvae: --option {option}: ")
    assert message in err
    assert "Options of zinb: n_hidden, n_layers, " in err
    assert "of the training: learning_rate, " in err


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("pass layer='my counts'.", "pass --layer 'my counts'."),
        ("name it, layer=…, or pass check_counts=False.", "name it, --layer …, or pass --no-check-counts."),
        ("a = f(a, layer='counts') and program='gaussian'", "a = f(a, layer='counts') and --program gaussian"),
        ("adata.layer='x', no_such='x', mask_var=None", "adata.layer='x', no_such='x', mask_var=None"),
    ],
)
def test_a_message_names_the_options_of_the_command(told, expected):
    command = typer.main.get_command(app.app).commands["fit"]
    assert app._with_options(told, {option.name: option for option in command.params}) == expected


def test_the_remedy_for_counts_in_a_layer_is_that_of_the_command_line(run, tmp_path):
    adata = anndata.read_h5ad(DATA)
    adata.layers["my counts"] = adata.X.copy()
    adata.X = adata.X * 0.3
    adata.write_h5ad("cells.h5ad")
    code, _, err = run("fit", "cells.h5ad", "--model", "m")
    assert (code, "pass --layer 'my counts'" in err) == (1, True)
    assert run("fit", "cells.h5ad", "--model", "m", "--layer", "my counts", "--max-epochs", 1)[0] == 0


def test_an_option_that_is_given_twice_is_refused(run, no_work):
    fit = ("fit", DATA, "--model", "m")
    for options in (
        ("--option", "n_hidden=3", "--option", "n_hidden=4"),
        ("--prior", "vamp", "--option", "prior=vamp"),
    ):
        code, _, err = run(*fit, *options)
        assert (code, "is given twice" in err) == (1, True)
    for option in ("--layer", "--output", "--model", "--seed"):
        code, _, err = run(*fit, *(2 * (option, "1")))
        assert (code, f"{option} is given" in err) == (2, True)
    assert run("--help", "--help")[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--prior", "flat"), ("--posterior", "iad"), ("--program", "scvi"), ("--device", "cuda:99"), ("--device", ""),
        ("--batch-size", 1), ("--mask-var", ""), ("--layer", ""), ("--batch-key", ""), ("--use-rep", "X_umap"),
        ("--kl-weight", "nan"), ("--option", "dropout_rate=7"), ("--option", "prior=3"), ("--seed", 1.5),
        ("--size-factor-key", "batch"), ("--continuous-covariate-key", "batch"), ("--image-key", "x"), ("--what",),
        ("--labels-key", "nothing"),
    ],
)  # fmt: skip
def test_no_wrong_argument_is_a_traceback(run, options):
    code, _, err = run("fit", DATA, "--model", "m", "--max-epochs", 1, *options)
    assert code in (1, 2)  # and no exception, which the fixture would show
    assert err.startswith("scvae: " if code == 1 else "Usage: ")


def test_a_type_error_of_a_check_is_one_line_and_that_of_a_defect_keeps_its_traceback(run, monkeypatch):
    import scvae.fits.configurations

    monkeypatch.setattr(scvae, "fit", lambda *_, **__: scvae.fits.configurations.arguments_of(3, {}))
    code, _, err = run("fit", DATA, "--model", "m")
    assert (code, err.count("\n")) == (1, 1)
    assert "configurations maps names to arguments" in err
    for defect in (lambda *_, **__: None + 1, lambda *_, **__: scvae.datasets.simulated_batches("a", wrong=3)):
        monkeypatch.setattr(scvae, "fit", defect)
        with pytest.raises(TypeError, match="unsupported operand|unexpected keyword"):
            run("fit", DATA, "--model", "m")


# ---- What is written is whole ------------------------------------------------------------------------------


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.fixture
def fitted_model(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def test_outputs_are_as_they_were_when_the_writing_fails(run, cells, fitted_model, tmp_path, monkeypatch, adata):
    adata.write_h5ad(cells)
    before = cells.read_bytes()
    (tmp_path / "c.json").write_text(json.dumps({"nb": {"likelihood": "nb", "n_hidden": 8}}))
    names = {"out.h5ad", "t.csv", "f.png"}
    for name in names:
        (tmp_path / name).write_text("mine")
    everything = sorted(tmp_path.rglob("*"))
    few = ("--max-epochs", 1, "--n-latent", 3)
    for patched in ("replace", "fsync"):
        monkeypatch.setattr(os, patched, no_space)
        for command in [
            ("fit", "a.h5ad", "--output", "out.h5ad", *few),
            ("fit", "a.h5ad", "--model", "model", *few),
            ("embed", "a.h5ad", "--model", "model", "--output", "out.h5ad"),
            ("denoise", "a.h5ad", "--model", "model", "--output", "out.h5ad"),
            ("generate", "--model", "model", "--n", 3, "--output", "out.h5ad"),
            ("cluster", "a.h5ad", "--n-clusters", 2, "--use-rep", "latent", "--output", "out.h5ad"),
            ("differential", "a.h5ad", "--model", "model", "--groupby", "cell_type", "--table", "t.csv"),
            ("compare", "a.h5ad", "c.json", "--output", "t.csv", "--max-epochs", 1, "--n-samples", 1),
            ("compare", "a.h5ad", "c.json", "--figure", "f.png", "--max-epochs", 1, "--n-samples", 1),
        ]:
            code, _, err = run(*command, "--overwrite")
            assert code == 1, command
            assert re.search(r"scvae: \S+ could not be written: No space left on device.", err), err
            assert sorted(tmp_path.rglob("*")) == everything
            assert all((tmp_path / name).read_text() == "mine" for name in names)
            assert cells.read_bytes() == before
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    scvae.load(fitted_model)


def test_overwrite_replaces_both(run, cells, fitted_model, tmp_path):
    (tmp_path / "out.h5ad").write_text("old")
    before = scvae.load(fitted_model).program.options
    command = ("fit", "a.h5ad", "--output", "out.h5ad", "--model", "model", "--overwrite", "--max-epochs", 1)
    code, _, err = run(*command)
    assert code == 0, err
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scvae"].shape == (400, 20)
    assert scvae.load(fitted_model).program.options != before


def test_keys_that_cannot_be_written_or_are_taken_are_refused(run, cells, fitted_model, adata, tmp_path, monkeypatch):
    adata.obsm["X_pca"] = np.ones((80, 2))
    adata.write_h5ad(cells)
    embed = ("embed", "a.h5ad", "--model", "model", "--output", "out.h5ad", "--key-added")
    code, _, err = run(*embed, "X_pca")
    assert (code, "would overwrite adata.obsm['X_pca']" in err, err.count("\n")) == (1, True, 1)
    monkeypatch.setattr(scvae, "load", lambda *_, **__: pytest.fail("it worked before it refused"), raising=False)
    denoise = ("denoise", "a.h5ad", "--model", "model", "--output", "out.h5ad", "--layer-added")
    for command in (embed, denoise):
        for key, told in (("a/b", "is 'a/b', which a file cannot hold"), ("", "is empty: name the key")):
            code, _, err = run(*command, key)
            assert (code, told in err, command[-1] in err, err.count("\n")) == (1, True, True, 1), err
    assert not (tmp_path / "out.h5ad").exists()


@pytest.mark.parametrize("name", ["cells.h5", "cells.loom", "cells.zarr"])
def test_cells_come_in_other_files_too(run, adata, tmp_path, name):
    genes, cells = (np.array(names, dtype="S") for names in (adata.var_names, adata.obs_names))
    if name == "cells.zarr":
        adata.write_zarr(name)
    else:
        with h5py.File(name, "w") as file:
            if name == "cells.loom":
                file["matrix"] = adata.X.toarray().T
                file["row_attrs/Gene"], file["col_attrs/CellID"] = genes, cells
            else:
                of_features = {"id": genes, "name": genes, "feature_type": np.array([b"Gene Expression"] * len(genes))}
                of_features["genome"] = np.array([b"GRCh38"] * len(genes))
                counts = {key: getattr(adata.X, key) for key in ("data", "indices", "indptr")}
                for key, value in {"barcodes": cells, "shape": np.array(adata.shape[::-1]), **counts}.items():
                    file[f"matrix/{key}"] = value
                for key, value in of_features.items():
                    file[f"matrix/features/{key}"] = value
    few = ("--max-epochs", 1, "--option", "n_hidden=8", "--device", "cpu")
    code, _, err = run("fit", name, "--output", "out.h5ad", "--model", "model", *few)
    assert code == 0, err
    written = anndata.read_h5ad("out.h5ad")
    assert list(written.var_names) == list(adata.var_names)
    np.testing.assert_array_equal(written.X.toarray(), adata.X.toarray())
    assert run("embed", name, "--model", "model", "--output", "again.h5ad", "--device", "cpu")[0] == 0
    np.testing.assert_array_equal(anndata.read_h5ad("again.h5ad").obsm["X_scvae"], written.obsm["X_scvae"])


# ---- denoise and generate ----------------------------------------------------------------------------------


def test_denoise_writes_what_the_function_returns(run, cells, model, fitted_model, adata, tmp_path):
    adata.write_h5ad(cells)
    genes = list(adata.var_names[:2])
    code, out, err = run(
        "denoise", "a.h5ad", "--model", "model", "--output", "out.h5ad", "--layer-added", "clean",
        "--batch", "batch_0", "--batch", "batch_1", "--genes", genes[0], "--genes", genes[1], "--library-size", "cell",
        "--n-samples", 2, "--seed", 5, "--device", "cpu",
    )  # fmt: skip
    assert (code, out) == (0, 'expression: .layers["clean"] in out.h5ad\n'), err
    expected = model.denoise(adata, batch=["batch_0", "batch_1"], genes=genes, library_size="cell", n_samples=2, seed=5)
    written = anndata.read_h5ad("out.h5ad")
    np.testing.assert_array_equal(written.layers["clean"][:, :2], expected)
    assert np.isnan(written.layers["clean"][:, 2:]).all()
    code, _, err = run("denoise", "out.h5ad", "--model", "model", "--output", "o2.h5ad", "--layer-added", "clean")
    assert (code, "name another" in err) == (1, True)
    for wrong in (("--library-size", "all"), ("--library-size", "-1"), ("--batch", "batch_9"), ("--genes", "XIST")):
        code, _, err = run("denoise", "a.h5ad", "--model", "model", "--output", "o2.h5ad", *wrong)
        assert (code, err.count("\n"), wrong[1] in err) == (1, 1, True), err
    assert not (tmp_path / "o2.h5ad").exists()


def test_generate_writes_what_the_function_returns(run, model, fitted_model):
    generate = ("generate", "--model", "model", "--n", 30, "--batch", "batch_1", "--seed", 2, "--device", "cpu")
    code, out, err = run(*generate, "--output", "g.h5ad")
    assert (code, out) == (0, "cells: 30 in g.h5ad\n"), err
    expected, written = model.generate(30, batch="batch_1", seed=2), anndata.read_h5ad("g.h5ad")
    assert (written.X != expected.X).nnz == 0
    assert set(written.obs["batch"]) == {"batch_1"}
    assert run(*generate, "--output", "g.zarr")[0] == 0
    assert (anndata.read_zarr("g.zarr").X != expected.X).nnz == 0
    code, _, err = run(*generate, "--output", "g.zarr")
    assert (code, "exists: name another folder, or add --overwrite" in err) == (1, True), err
    assert run(*generate, "--output", "g.zarr", "--overwrite")[0] == 0
    assert (anndata.read_zarr("g.zarr").X != expected.X).nnz == 0
    assert run("generate", "--model", "model", "--n", 0, "--output", "h.h5ad")[0] == 2


# ---- Several batch keys, quiet, progress -------------------------------------------------------------------


def test_several_batch_keys_are_passed_together(run, monkeypatch):
    passed = []
    monkeypatch.setattr(
        scvae,
        "fit",
        lambda *_, batch_key, **__: (
            passed.append(batch_key) or SimpleNamespace(save=lambda *_, **__: None, stopped="finished")
        ),
    )
    keys = ("--batch-key", "batch")
    for given in ((), keys, (*keys, "--batch-key", "cell_type"), (*keys, *keys)):
        assert run("fit", DATA, "--model", "m", *given)[0] == 0
    assert passed == [None, "batch", ["batch", "cell_type"], "batch"]


def test_quiet_says_nothing_and_without_it_a_log_stays_short(run, fitted_model, adata, cells):
    adata.write_h5ad(cells)
    fit = ("fit", "a.h5ad", "--output", "o.h5ad", "--overwrite", "--max-epochs", 3, "--option", "n_hidden=8")
    code, out, err = run(*fit)
    assert (code, out) == (0, 'embedding: .obsm["X_scvae"] in o.h5ad\n')
    assert re.fullmatch(r"scvae: zinb, .*\nscvae: step 3 of 3 \(100%\), elbo=\S+ validation=\S+, \d s\n", err)
    assert run(*fit, "--quiet") == (0, "", "")
    assert run("embed", "a.h5ad", "--model", "model", "--output", "e.h5ad", "-q") == (0, "", "")
    assert run("denoise", "a.h5ad", "--model", "model", "--output", "d.h5ad", "-q") == (0, "", "")
    assert run("generate", "--model", "model", "--n", 3, "--output", "g.h5ad", "-q") == (0, "", "")
    cluster = ("cluster", "a.h5ad", "--use-rep", "latent", "--n-clusters", 2, "--output", "c.h5ad", "-q")
    assert run(*cluster) == (0, "", "")
    Path("c.json").write_text(json.dumps({"nb": {"likelihood": "nb", "n_hidden": 8}}))
    compare = ("compare", "a.h5ad", "c.json", "--max-epochs", 1, "--n-samples", 1, "-q")
    assert run(*compare, "--output", "t.csv") == (0, "", "")
    code, out, err = run(*compare)
    assert (code, err, "log_likelihood" in out) == (0, "", True)  # the table is what was asked for


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def interrupted(arguments, cwd, when, number=signal.SIGINT, first=""):
    """Run the command line in a process of its own and send it a signal once `when` is written to stderr."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from scvae.inference import progress; progress._FRACTION = progress._SECONDS = 0\n"
        f"{first}\n"
        "from scvae.__main__ import main; main()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    guard = threading.Timer(120, child.kill)
    guard.start()
    lines = io.StringIO()
    for line in child.stderr:
        lines.write(line)
        if when in line:
            child.send_signal(number)
            break
    out, err = child.communicate()
    guard.cancel()
    return child.returncode, out, lines.getvalue() + err


def test_ctrl_c_in_the_training_writes_what_was_fitted(tmp_path):
    code, _, err = interrupted(
        ("fit", DATA, "--output", "out.h5ad", "--model", "model", "--max-epochs", 100_000), tmp_path, "scvae: step 300 "
    )
    assert code == 130, err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    told = r"scvae: training was interrupted at step 3\d\d of [\d,]+; the result is that of unfinished training"
    assert re.fullmatch(told, last), last
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert np.isfinite(written.obsm["X_scvae"]).all()
    assert scvae.load(tmp_path / "model").stopped == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.h5ad"]


def test_where_the_training_was_interrupted_is_said(capsys):
    course = SimpleNamespace(n_steps=589, n_planned=3400)
    for stopped in ("finished", "converged"):
        end_if_interrupted(SimpleNamespace(stopped=stopped, course=course))
    assert capsys.readouterr() == ("", "")
    with pytest.raises(typer.Exit) as exit:
        end_if_interrupted(SimpleNamespace(stopped="interrupted", course=course))
    assert exit.value.exit_code == 130
    assert capsys.readouterr().err.startswith("scvae: training was interrupted at step 589 of 3,400; ")


@pytest.mark.parametrize("where", ["fit", "read", "write"])
def test_ctrl_c_elsewhere_is_one_line_and_leaves_nothing(run, cells, monkeypatch, tmp_path, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def half(adata, path):
        path.write_text("half")
        raise KeyboardInterrupt

    if where == "write":
        monkeypatch.setattr(formats, "_write_h5ad", half)
    else:
        monkeypatch.setattr(*{"fit": (scvae, "fit"), "read": (formats, "read")}[where], interrupt)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("fit", "a.h5ad", "--output", "out.h5ad", "--max-epochs", 1, "--quiet")
    assert (code, out, err) == (130, "", "scvae: interrupted; nothing is half-written\n")
    assert sorted(tmp_path.rglob("*")) == before


HALF = """
import pathlib, sys, time
from scvae.boundary import formats

def half(adata, path):
    pathlib.Path(path).write_text("half")
    print("half", file=sys.stderr, flush=True)
    time.sleep(60)

formats._write_h5ad = half
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_the_writing_leaves_nothing(cells, tmp_path, name):
    number = getattr(signal, name)
    before = sorted(tmp_path.iterdir())
    arguments = ("cluster", "a.h5ad", "--n-clusters", 2, "--use-rep", "latent", "--output", "out.h5ad")
    code, _, err = interrupted(arguments, tmp_path, "half", number, first=HALF)
    how = "interrupted" if name == "SIGINT" else f"ended by {name}"
    assert (code, err) == (128 + number, f"half\nscvae: {how}; nothing is half-written\n")
    assert sorted(tmp_path.iterdir()) == before


def test_signals_are_as_they_were_afterwards(run):
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    assert run("--version")[0] == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_ctrl_c_in_a_comparison_is_said(run, cells, monkeypatch, tmp_path):
    import pandas as pd

    import scvae.comparing

    table = pd.DataFrame({"stopped": ["finished", "interrupted"]}, index=["a", "b"])
    monkeypatch.setattr(scvae.comparing, "compare", lambda *_, **__: table)
    (tmp_path / "c.json").write_text("{}")
    code, _, err = run("compare", "a.h5ad", "c.json", "--output", "t.csv")
    assert (code, err) == (130, "scvae: the training of b was interrupted\n")
    assert (tmp_path / "t.csv").exists()


def test_the_command_line_stays_light():
    code = "import sys, scvae.__main__; print({'torch', 'anndata', 'pandas', 'scanpy'} & sys.modules.keys())"
    assert in_a_fresh_process("-c", code).stdout == "set()\n"


@pytest.mark.parametrize("where", ["typer.core", "tqdm.auto"])
def test_ctrl_c_while_it_starts_is_one_line_too(where):
    code = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {where!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "import scvae.__main__"
    )
    done = in_a_fresh_process("-c", code)
    assert (done.returncode, done.stderr) == (130, "scvae: interrupted; nothing is half-written\n")


def test_ctrl_c_while_arguments_are_read_is_one_line_too(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(typer.core.TyperGroup, "make_context", interrupt)
    assert run("fit", DATA, "--model", "m") == (130, "", "scvae: interrupted; nothing is half-written\n")


# ---- check and scores --------------------------------------------------------------------------------------


def test_check_writes_what_the_function_returns(run, cells, model, fitted_model, adata, tmp_path):
    adata.write_h5ad(cells)
    code, out, err = run(
        "check", "a.h5ad", "--model", "model", "--output", "genes.csv", "--cells", "cells.csv", "--figure", "check.png",
        "--residuals", "out.h5ad", "--layer-added", "pit", "--n-samples", 3, "--heldout-fraction", 0.2,
        "--split", "binomial", "--seed", 5, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    expected = scvae.tl.posterior_check(
        model, adata, n_samples=3, heldout_fraction=0.2, split="binomial", layer_added="pit", seed=5
    )
    pd.testing.assert_frame_equal(pd.read_csv("genes.csv", index_col=0), expected.genes)
    np.testing.assert_allclose(pd.read_csv("cells.csv", index_col=0), expected.cells)
    np.testing.assert_array_equal(anndata.read_h5ad("out.h5ad").layers["pit"], adata.layers["pit"])
    assert Path("check.png").read_bytes().startswith(b"\x89PNG")
    assert repr(expected) in out
    assert "genes: genes.csv\ncells: cells.csv\nfigure: check.png\nresiduals: out.h5ad\n" in out
    code, out, _ = run("check", "a.h5ad", "--model", "model", "--n-samples", 1, "--quiet")
    assert (code, "worst genes" in out) == (0, True)  # there is nothing else to show for it
    code, _, err = run("check", "out.h5ad", "--model", "model", "--residuals", "o2.h5ad", "--layer-added", "pit")
    assert (code, "name another" in err) == (1, True)
    assert not (tmp_path / "o2.h5ad").exists()


def test_scores_writes_what_the_function_returns(run):
    arguments = ("scores", DATA, "--batch-key", "batch", "--labels-key", "cell_type", "--use-rep", "latent")
    code, out, err = run(
        *arguments, "--metric", "transfer", "--metric", "cilisi", "--output", "scores.csv", "--figure", "scores.pdf"
    )
    assert code == 0, err
    table = scvae.tl.integration_scores(
        anndata.read_h5ad(DATA), "latent", "batch", "cell_type", metrics=["transfer", "cilisi"]
    )
    pd.testing.assert_frame_equal(pd.read_csv("scores.csv", index_col=0), table)
    assert Path("scores.pdf").read_bytes().startswith(b"%PDF")
    assert "shuffled within type" in out
    code, _, err = run(*arguments, "--metric", "cilisy")
    assert (code, "Did you mean 'cilisi'?" in err) == (1, True)


@pytest.mark.parametrize("option", ["--output", "--cells", "--figure", "--residuals"])
def test_check_refuses_results_of_another_kind_before_the_work(run, cells, no_work, option):
    code, _, err = run("check", "a.h5ad", "--model", "model", option, "out.docx")
    assert (code, option in err) == (1, True)
