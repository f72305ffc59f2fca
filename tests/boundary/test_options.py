"""Numbers and words as they come: what is meant is taken, all else is named with its range."""

from typing import get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scvae
from scvae.boundary.options import Range, allowed, names_of, one_of, real, seed_of, whole
from scvae.inference.svi import Training
from scvae.modules.posteriors import POSTERIORS
from scvae.modules.priors import PRIORS
from scvae.programs import PROGRAMS, ZINB
from scvae.programs.options import LatentOptions

OPTIONS = [(kind.Options, name) for kind in PROGRAMS.values() for name in kind.Options.names()]
OPTIONS += [(Training, name) for name in Training.names()]


@given(st.integers(1, 2**53), st.sampled_from([int, float, np.int64, np.float64, np.asarray, torch.tensor]))
def test_a_whole_number_is_taken_however_it_is_typed(number, kind):
    found = whole("n", kind(number))
    assert found == number
    assert type(found) is int


@pytest.mark.parametrize("value", [0, -1, 2.5, "20", True, None, float("nan"), float("inf"), [3], np.bool_(True)])
def test_what_is_no_whole_number_in_range_is_named(value):
    with pytest.raises(ValueError, match=r"^n is a whole number of at least 1, not "):
        whole("n", value)


def test_numbers_words_and_seeds():
    assert real("x", np.float32(0.5), Range(0, 1)) == 0.5
    with pytest.raises(ValueError, match=r"x is a number above 0 and below 1, not 1"):
        real("x", 1, Range(0, 1, open_least=True, open_most=True))
    assert one_of("how", np.str_("all"), ("all", "none")) == "all"
    with pytest.raises(ValueError, match=r"how is one of 'all', 'none', not 'al'. Did you mean 'all'\?"):
        one_of("how", "al", ("all", "none"))
    assert seed_of(np.uint64(2**63 - 1)) == 2**63 - 1
    for wrong in (-1, 2**63, 0.5, None, "0"):
        with pytest.raises(ValueError, match=r"seed is a whole number from 0 to 2\*\*63 - 1, not "):
            seed_of(wrong)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        ((), []),
        ("a", ["a"]),
        (0, [0]),
        (["a"], ["a"]),
        (("a", "b"), ["a", "b"]),
        (pd.Index(["a", "b"]), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (["a", "a"], ["a"]),
    ],
)
def test_names_are_taken_one_by_one_or_in_any_list(given, names):
    assert names_of("keys", given) == names


@pytest.mark.parametrize("given", [3.5, [None], [["a"]], {"a": 1}])
def test_what_are_no_names_is_refused(given):
    with pytest.raises(TypeError, match="keys is the name of a column or a list of names, not"):
        names_of("keys", given)


@pytest.mark.parametrize(("options", "name"), OPTIONS, ids=lambda x: x if isinstance(x, str) else x.__qualname__)
@pytest.mark.parametrize("wrong", ["abc", "", -7, -0.5, [1], object()])
def test_every_option_names_itself_and_what_it_may_be(options, name, wrong):
    with pytest.raises(ValueError, match=f"^{name} is ") as caught:
        options(**{name: wrong})
    meaning = allowed(options, name).split(" or ")[0].strip("'")
    assert meaning in str(caught.value)


@pytest.mark.parametrize(("options", "name"), OPTIONS, ids=lambda x: x if isinstance(x, str) else x.__qualname__)
def test_every_default_is_within_its_range_and_comes_back_the_same(options, name):
    default = options().as_dict()[name]
    for value in [default] if default is None else [default, np.asarray(default)[()], np.array(default)[()]]:
        assert options(**{name: value}).as_dict()[name] == default


def test_whole_floats_and_numpy_scalars_fit_the_same_model(adata, fit):
    one = fit(adata.copy(), n_hidden=8)
    other = fit(adata.copy(), n_latent=3.0, n_hidden=np.int32(8), batch_size=np.float64(32), max_epochs=2.0, seed=0.0)
    assert one.program.options == other.program.options
    assert np.array_equal(one.embed(adata), other.embed(adata))


def test_options_of_a_program_say_which_program(adata, fit):
    given = ZINB.Options(prior="normal", n_hidden=8)
    model = scvae.fit(adata, given, n_latent=3, max_epochs=2, batch_size=32, progress=False)
    same = fit(adata.copy(), prior="normal")
    assert model.program.options == {**given.as_dict(), "n_latent": 3} == same.program.options
    assert np.array_equal(model.embed(adata), same.embed(adata))


def test_the_words_of_the_options_are_those_of_the_registries():
    hints = get_type_hints(LatentOptions)
    assert get_args(hints["posterior"]) == tuple(POSTERIORS)
    assert sorted(get_args(hints["prior"])) == sorted(PRIORS)


@pytest.mark.parametrize("name", ["early_stopping", "lr", "n_epochs", "gene_likelihood", "use_gpu"])
def test_what_is_called_otherwise_elsewhere_is_pointed_to(adata, fit, name):
    with pytest.raises(TypeError, match=rf"There is no option '{name}' \(did you mean \w+"):
        fit(adata, **{name: 1})
