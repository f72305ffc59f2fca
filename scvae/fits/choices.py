"""What is fitted, and how: the program, its options and the training, out of what a user names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from scvae.boundary.options import Options
from scvae.inference.svi import Training
from scvae.programs import PROGRAMS, Program

__all__ = ["choice_of", "program_of", "split_options"]


def choice_of(
    program: str | type[Program] | Options, given: Mapping[str, Any], read: Mapping[str, Any]
) -> tuple[type[Program], Training, dict[str, Any]]:
    """Return the class of a program, how it is trained, and its options.

    Parameters
    ----------
    program
        As :func:`scvae.fit` takes it.
    given
        Options of the program and of the training, by name.
    read
        What is to be read of the cells, by the arguments of :func:`scvae.fit`: some of it belongs to some programs.

    Raises
    ------
    TypeError
        If there is no such program or option.
    ValueError
        If an option is out of its range, or what is to be read is not what the program models.
    """
    kind, options = program_of(program)
    options |= given
    if read["size_factor_key"] is not None:
        if kind.kind != "counts" or kind.of_images:
            models = "images" if kind.of_images else "real numbers"
            raise ValueError(f"size_factor_key belongs to models of counts; {kind.name!r} models {models}.")
        options = {"library": "size_factor", **options}
    if read["labels_key"] is not None:
        if not kind.takes_labels:
            able = " and ".join(repr(name) for name, each in PROGRAMS.items() if each.takes_labels)
            raise ValueError(
                f"labels_key belongs to programs with a mixture prior, {able}; {kind.name!r} takes no labels: leave "
                "labels_key out, or name another program."
            )
        options = {"prior": "mixture", **options}
    training, options = split_options(kind, options)
    if kind.of_images and read["image_key"] is None:
        raise ValueError(f"{kind.name!r} models images: name the key of adata.obsm that holds them, image_key=….")
    if read["image_key"] is not None and not kind.of_images:
        raise ValueError(f"image_key belongs to models of images; {kind.name!r} models the values of genes.")
    return kind, training, options


def program_of(program: str | type[Program] | Options) -> tuple[type[Program], dict[str, Any]]:
    """Return the class of a program, and the options that it was named with."""
    if isinstance(program, Options) and program.program is not None:
        return program.program, program.as_dict()
    if isinstance(program, str):
        if program not in PROGRAMS:
            raise ValueError(
                f"There is no program {program!r}{_meant(program, PROGRAMS)}; there are "
                f"{', '.join(map(repr, PROGRAMS))}."
            )
        return PROGRAMS[program], {}
    if not (isinstance(program, type) and issubclass(program, Program)):
        raise TypeError(
            "program is a name, the options of a program, or a class derived from scvae.programs.Program, not "
            f"{program!r}."
        )
    return program, {}


def split_options(kind: type[Program], options: Mapping[str, Any]) -> tuple[Training, dict[str, Any]]:
    """Return the training, and what is left for the program.

    Raises
    ------
    TypeError
        If neither has an option of that name.
    ValueError
        If one is of another type or out of its range.
    """
    of_training, of_program = Training.names(), kind.option_names()
    for name in options:
        if name not in of_training and of_program is not None and name not in of_program:
            raise TypeError(
                f"There is no option {name!r}{_meant(name, [*of_program, *of_training])}. Options of the program "
                f"{kind.name!r}: {', '.join(of_program)}; of the training: {', '.join(of_training)}."
            )
    given = {name: value for name, value in options.items() if name in of_training}
    rest = {name: value for name, value in options.items() if name not in of_training}
    if kind.Options is not None:
        known = {name: value for name, value in rest.items() if name in kind.Options.names()}
        rest |= {name: getattr(kind.Options(**known), name) for name in known}
    return Training(**{**kind.defaults, **given}), rest


#: What is called otherwise elsewhere.
_ELSEWHERE = {
    "early_stopping": "patience; training ends by itself when the bound of held-out cells has stopped rising",
    "early_stopping_patience": "patience",
    "train_size": "validation_fraction",
    "validation_size": "validation_fraction",
    "epochs": "max_epochs",
    "n_epochs": "max_epochs",
    "lr": "learning_rate",
    "gene_likelihood": "likelihood",
    "use_observed_lib_size": "library='observed'",
    "n_epochs_kl_warmup": "kl_warmup, a fraction of the steps",
    "use_gpu": "device",
    "accelerator": "device",
    "random_state": "seed",
}


def _meant(name: str, names: Any) -> str:
    """Return what a name may have been meant for, for a message."""
    near = difflib.get_close_matches(name, list(names), 1)
    found = _ELSEWHERE.get(name) or (repr(near[0]) if near else "")
    return f" (did you mean {found}?)" if found else ""
