"""The command line gives what the functions give, refuses before it works, and explains itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest

import scvae
import scvae.__main__ as command_line
import scvae.programs

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


def test_every_option_reaches_the_function(run, monkeypatch):
    passed = {}

    class Model:
        def save(self, path, **how):
            passed.update(path=path, **how)

    monkeypatch.setattr(
        scvae, "fit", lambda adata, program, **options: passed.update(options, program=program) or Model()
    )
    code, _, err = run(
        "fit", DATA, "--model", "model", "--layer", "counts",
        "--categorical-covariate-key", "donor", "--categorical-covariate-key", "sex",
        "--continuous-covariate-key", "age", "--size-factor-key", "size", "--mask-var", "chosen",
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
        (["fit", DATA, "--model", "m", "--library", "size_factor"], "size_factor_key"),
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
