"""The process is shared: threads get the numbers of one after the other, and a caller's switches change nothing."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pytest
import torch

import scvae


def answers(model, adata):
    return {
        "embed": lambda: model.embed(adata),
        "draws": lambda: model.embed(adata, n_samples=2),
        "denoise": lambda: model.denoise(adata, n_samples=3),
        "log_likelihood": lambda: model.log_likelihood(adata, n_samples=3),
        "generate": lambda: model.generate(9).X.toarray(),
        "elbo": lambda: model.elbo(adata),
    }


@pytest.mark.slow
def test_fits_in_threads_give_the_numbers_of_one_after_the_other(adata, fit, process_unchanged):
    def embedded(seed):
        cells = adata.copy()
        fit(cells, batch_key="batch", seed=seed)
        return cells.obsm["X_scvae"]

    alone = [embedded(seed) for seed in range(6)]
    with process_unchanged(), ThreadPoolExecutor(3) as pool:
        together = list(pool.map(embedded, range(6)))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_questions_in_threads_give_the_numbers_of_one_after_the_other(adata, model, process_unchanged):
    asked = answers(model, adata)
    alone = {name: ask() for name, ask in asked.items()}
    with process_unchanged(), ThreadPoolExecutor(4) as pool:
        names = [*asked] * 5
        together = list(pool.map(lambda name: asked[name](), names))
    for name, found in zip(names, together, strict=True):
        assert np.array_equal(found, alone[name]), name


def test_a_user_who_draws_in_another_thread_does_not_change_where_the_state_ends(adata, model, process_unchanged):
    with process_unchanged(), ThreadPoolExecutor(1) as pool:
        pool.submit(model.elbo, adata).result()


def in_inference_mode(ask):
    with torch.inference_mode():
        return ask()


def without_gradient(ask):
    with torch.no_grad():
        return ask()


def under_autocast(ask):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ask()


def in_double_precision(ask):
    torch.set_default_dtype(torch.float64)
    try:
        return ask()
    finally:
        torch.set_default_dtype(torch.float32)


def on_another_device(ask):
    with torch.device("meta"):
        return ask()


def in_a_plate(ask):
    with pyro.plate("cells", 3), pyro.plate("others", 2):
        return ask()


def in_a_program(ask):
    found = []

    def model():
        pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        found.append(ask())

    with torch.random.fork_rng(devices=[]):
        trace = pyro.poutine.trace(pyro.poutine.enum(model, first_available_dim=-3)).get_trace()
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["z"]
    return found[0]


def with_strict_numpy(ask):
    with np.errstate(all="raise"):
        return ask()


def with_checks(ask):
    with pyro.validation_enabled(True):
        return ask()


CALLERS = [
    in_inference_mode,
    without_gradient,
    under_autocast,
    in_double_precision,
    on_another_device,
    in_a_plate,
    in_a_program,
    with_strict_numpy,
    with_checks,
]


@pytest.mark.parametrize("caller", CALLERS)
def test_a_callers_switches_and_handlers_change_no_number(adata, fit, model, tmp_path, caller, process_unchanged):
    expected = fit(adata.copy(), batch_key="batch").embed(adata)
    with process_unchanged():
        assert np.array_equal(caller(lambda: fit(adata.copy(), batch_key="batch")).embed(adata), expected)
    for name, ask in answers(model, adata).items():
        plain = ask()
        with process_unchanged():
            assert np.array_equal(caller(ask), plain), name
    model.save(tmp_path / "model", overwrite=True)
    loaded = caller(lambda: scvae.load(tmp_path / "model"))
    assert np.array_equal(loaded.embed(adata), model.embed(adata))


@pytest.mark.parametrize("program", ["gaussian", "vq", "pose"])
def test_other_programs_are_fitted_from_within_a_users_program(adata, fit, program):
    adata.obsm["image"] = np.random.default_rng(0).uniform(size=(80, 8, 8)).astype(np.float32)
    options = {"image_key": "image"} if program == "pose" else {}
    plain = fit(adata.copy(), program, **options).embed(adata)
    for caller in (in_double_precision, in_a_program, without_gradient):
        assert np.array_equal(caller(lambda: fit(adata.copy(), program, **options).embed(adata)), plain)


def test_a_failure_leaves_the_process_as_it_was_and_lets_others_in(adata, breaking, fit, model, process_unchanged):
    with process_unchanged(), pytest.raises(FloatingPointError):
        in_double_precision(lambda: fit(adata, breaking, batch_key="batch", where="x"))
    done = threading.Event()
    thread = threading.Thread(target=lambda: (model.embed(adata), done.set()))
    thread.start()
    thread.join(60)
    assert done.is_set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_does_not_wait_for_a_thread_of_its_parent(adata, model):
    from scvae.boundary import process

    entered, leave = threading.Event(), threading.Event()

    def hold():
        with process.alone(0, torch.device("cpu")):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 and later warn of every fork beside threads
        child = os.fork()
    if not child:  # the lock is free here: nobody holds it
        os._exit(0 if process._LOCK.acquire(timeout=10) else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
