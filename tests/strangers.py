"""Saved models as a failing disk, or a stranger who makes the checksums right again, may leave them.

A mutant is made by a function of a source of random numbers and of a folder that holds a model. :func:`judged` reads it
and says what became of it; whatever is neither an error of the package's own nor a model fails there.
"""

import hashlib
import json
import math
import os
import random
import resource
import struct
import time
from pathlib import Path

import scvae
from scvae.boundary.models import _FORMAT
from scvae.data.store import open_store
from scvae.inference.svi import NonFiniteLoss

MOST_SECONDS = 1.0  # of the processor
MOST_BYTES = 200 << 20  # of memory, beyond what was there


def files_of(folder):
    """Return the description of a model, and the contents of its file of weights."""
    description = (folder / "model.json").read_bytes()
    return description, (folder / json.loads(description)["weights"]).read_bytes()


def write(folder, description, weights, name=None):
    """Write the files of a model into a folder that holds none, whatever they are."""
    (folder / "model.json").write_bytes(description)
    (folder / (name or json.loads(description)["weights"])).write_bytes(weights)


def sign(folder, content, weights):
    """Write a model with checksums that are right."""
    digest = hashlib.sha256(weights).hexdigest()
    canonical = json.dumps(content, sort_keys=True).encode()
    name = f"weights-{digest[:16]}.safetensors"
    sha256 = {"weights": digest, "content": hashlib.sha256(canonical).hexdigest()}
    head = {"format": _FORMAT, "weights": name, "sha256": sha256, "content": content}
    write(folder, json.dumps(head).encode(), weights)


# ---- Bytes -------------------------------------------------------------------------------------------------


def changed_bytes(draw, content, near=None):
    """Flip a bit, cut the end off, take a part out, put one in, or repeat one."""
    place = draw.randrange(min(len(content), near or len(content)))
    length = draw.choice([1, 4, 8, 64, 512])
    change = draw.randrange(5)
    if change == 0:
        return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    if change == 1:
        return content[:place]
    if change == 2:
        return content[:place] + content[place + length :]
    if change == 3:
        return content[:place] + draw.randbytes(length) + content[place:]
    return content[:place] + content[place : place + length] * 2 + content[place + length :]


def other_length(draw, weights):
    """Let the header of the weights claim another length."""
    true = struct.unpack("<Q", weights[:8])[0]
    claims = [
        0,
        1,
        true - 1,
        true + 1,
        2 * true,
        len(weights),
        100_000_000,
        2**31 - 1,
        2**31,
        2**63 - 1,
        2**63,
        2**64 - 1,
    ]
    return struct.pack("<Q", draw.choice(claims)) + weights[8:]


# ---- Trees of JSON -----------------------------------------------------------------------------------------


def strange(draw):
    """Return a value that a reader may not expect."""
    deep = []
    for _ in range(draw.choice([3, 300])):
        deep = [deep]
    values = [
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        7,
        0.5,
        10**5,
        10**9,
        2**31,
        2**32,
        2**63,
        10**30,
        1e308,
        1e-308,
        math.nan,
    ]
    values += [math.inf, "", " ", "é" * 1000, "../..", "\ud800", "\0", "zinb", [], {}, {"a": {}}, [None], deep]
    values += [list(range(3000)), ["x"] * 3000, [[1, 2], [3]], {str(i): i for i in range(1000)}]
    return draw.choice(values)


def changed_tree(draw, tree):
    """Return a tree in which one value is another, is missing, is there twice or has another's place."""
    tree = json.loads(json.dumps(tree))
    node, key = {"": tree}, ""
    while isinstance(node[key], dict | list) and node[key] and (node[key] is tree or draw.random() < 0.75):
        node, key = node[key], draw.choice(list(node[key]) if isinstance(node[key], dict) else range(len(node[key])))
    change = draw.randrange(8)
    others = [other for other in (node if isinstance(node, dict) else range(len(node))) if other != key]
    if change == 0:
        del node[key]
    elif change == 1 and others:
        other = draw.choice(others)
        node[key], node[other] = node[other], node[key]
    elif change == 2 and isinstance(node, list):
        node.insert(key, node[key])
    elif change == 2:
        node[str(strange(draw))[:50]] = node.pop(key)
    elif change == 3 and isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = draw.choice(
            [node[key] + 1, node[key] - 1, -node[key], node[key] * 10**9, float(node[key]), node[key] * 2]
        )
    else:
        node[key] = strange(draw)
    return tree.get("", tree) if isinstance(tree, dict) else tree


def header_of(weights):
    size = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + size]), weights[8 + size :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed_header(draw, weights):
    """Let a tensor be of another type, shape or place, or two have each other's."""
    header, data = header_of(weights)
    one, other = draw.sample(sorted(header.keys() - {"__metadata__"}), 2)
    change = draw.randrange(7)
    if change == 0:
        header[one]["dtype"] = draw.choice(
            ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", ""]
        )
    elif change == 1:
        shape = header[one]["shape"]
        others = [[], [0], [-1], [2**31], [2**31, 2**33], [2**63], [1] * 100, shape[::-1], [1, *shape]]
        header[one]["shape"] = draw.choice(others)
    elif change == 2:
        place = draw.randrange(2)
        header[one]["data_offsets"][place] = draw.choice([0, 2**31, 2**63, len(data), len(data) + 1, -1, 4, 1.5])
    elif change == 3:
        header[one]["data_offsets"] = header[other]["data_offsets"]
    elif change == 4:
        header[one], header[other] = header[other], header[one]
    elif change == 5:
        header["__metadata__"] = strange(draw)
    else:
        header = changed_tree(draw, header)
    return with_header(header, data)


def changed_numbers(draw, weights):
    """Put NaN, the infinite or the huge into the weights, or exchange the numbers of two tensors."""
    header, data = header_of(weights)
    one = draw.choice([name for name in sorted(header) if header[name].get("dtype") == "F32"])
    start, end = header[one]["data_offsets"]
    number = draw.choice([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45, 0.0, -1.0])
    if draw.random() < 0.3:
        alike = [name for name in header if header[name].get("shape") == header[one]["shape"] and name != one]
        if alike:
            other = draw.choice(alike)
            header[one]["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"],
                header[one]["data_offsets"],
            )
    elif draw.random() < 0.5:
        place = start + 4 * draw.randrange(max(1, (end - start) // 4))
        data = data[:place] + struct.pack("<f", number) + data[place + 4 :]
    else:
        data = data[:start] + struct.pack("<f", number) * ((end - start) // 4) + data[end:]
    return with_header(header, data)


# ---- Mutants of a model ------------------------------------------------------------------------------------


def of_description(draw, folder, description, weights):
    write(folder, changed_bytes(draw, description), weights, json.loads(description)["weights"])


def of_head(draw, folder, description, weights):
    head = json.loads(description)
    name, content = head["weights"], head.pop("content")
    changed = changed_tree(draw, head)
    changed = {**changed, "content": content} if isinstance(changed, dict) else changed
    write(folder, json.dumps(changed).encode(), weights, name)


def of_text(draw, folder, description, weights):
    """Keys that are there twice, deep nesting, numbers of many digits."""
    text, name = description.decode(), json.loads(description)["weights"]
    depth = draw.choice([100, 900, 1100, 5000, 100_000])
    value = draw.choice(
        ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "9" * depth, "1e" + "9" * depth, "NaN", "-"]
    )
    key = draw.choice(['"content":', '"format":', '"options":', '"genes":', '"program":', '"weights":', '"history":'])
    first = draw.random() < 0.5  # of a key that is there twice, the last counts
    text = text.replace(key, f"{key} {value}, " + (key if first else '"x":'), 1)
    write(folder, text.encode(), weights, name)


def of_weights(draw, folder, description, weights):
    near = 8 + struct.unpack("<Q", weights[:8])[0] if draw.random() < 0.7 else None
    write(folder, description, changed_bytes(draw, weights, near))


def of_files(draw, folder, description, weights):
    name = json.loads(description)["weights"]
    write(folder, description, weights)
    path = folder / draw.choice([name, "model.json"])
    path.unlink()
    change = draw.randrange(6)
    if change == 0:
        path.mkdir()
    elif change == 1:
        path.symlink_to("/dev/zero")
    elif change == 2:
        os.mkfifo(path)
    elif change == 3:
        path.symlink_to(path.name)
    elif change == 4:
        path.write_bytes(b"")
        os.truncate(path, draw.choice([0, 1, 2**20, 2**43]))


def signed_content(draw, folder, description, weights):
    sign(folder, changed_tree(draw, json.loads(description)["content"]), weights)


def signed_options(draw, folder, description, weights):
    """Sizes that are huge, in the options and the schema."""
    content = json.loads(description)["content"]
    options, schema = content["options"], content["schema"]
    huge = draw.choice([2000, 10**5, 10**6, 10**9, 2**31, 2**63, 10**18])
    sizes = [name for name, value in options.items() if isinstance(value, int) and not isinstance(value, bool)]
    change = draw.randrange(6)
    if change < 3:
        options[draw.choice(sizes)] = huge
    elif change == 3:
        for name in sizes:
            options[name] = huge
    elif change == 4:
        schema["n_labelled"] = huge
        schema["labels"] = [str(i) for i in range(draw.choice([1, 100, 10_000]))]
    else:
        schema["genes"] = [f"g{i}" for i in range(draw.choice([1, 100, 20_000]))]
    sign(folder, content, weights)


def signed_bytes(draw, folder, description, weights):
    near = 8 + struct.unpack("<Q", weights[:8])[0] if draw.random() < 0.8 else None
    sign(folder, json.loads(description)["content"], changed_bytes(draw, weights, near))


def signed_length(draw, folder, description, weights):
    sign(folder, json.loads(description)["content"], other_length(draw, weights))


def signed_header(draw, folder, description, weights):
    sign(folder, json.loads(description)["content"], changed_header(draw, weights))


def signed_numbers(draw, folder, description, weights):
    sign(folder, json.loads(description)["content"], changed_numbers(draw, weights))


MUTATIONS = (
    of_description, of_head, of_text, of_weights, of_files,
    signed_content, signed_options, signed_bytes, signed_length, signed_header, signed_numbers,
)  # fmt: skip


def numbers_of(model):
    """Return all that a model is, to be compared."""
    state = {name: (tensor.dtype, tensor.numpy().tobytes()) for name, tensor in model.program.state_dict().items()}
    course = {**vars(model.course), "history": repr(model.history.to_dict("list"))}
    return state, model.program.schema, model.program.options, repr(course), model.training, model.key_added


def judged(load, folder, expected, numbers_of=numbers_of, errors=(ValueError, FileNotFoundError)):
    """Load a mutant, and return what became of it: ``error``, ``same``, or ``other``, with the seconds and the bytes.

    Raises
    ------
    AssertionError
        If it took too long or too much, or raised what is not the package's own.
    """
    before, start = peak(reset=True), time.process_time()
    loaded = error = None
    try:
        loaded = load(folder)
    except errors as caught:
        error = caught
    seconds, taken = time.process_time() - start, peak() - before
    assert seconds < MOST_SECONDS, f"{seconds:.2f} s"
    assert taken < MOST_BYTES, f"{taken >> 20} MiB"
    if error is None:
        return "same" if numbers_of(loaded) == expected else "other", seconds, taken
    is_ours = type(error) in errors or type(error).__module__.startswith("scvae.")
    assert is_ours, f"{type(error).__name__}: {error}"
    assert str(folder) in str(error) or isinstance(error, NonFiniteLoss), error
    assert len(str(error)) < 1000, error
    return "error", seconds, taken


def peak(*, reset=False):
    """Return the most memory that this process has held, of late where the system can forget what was before."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def cells():
    """Return cells that have what each of the models reads."""
    adata = scvae.datasets.simulated_batches(n_cells=60, n_genes=12, n_batches=2, library_size=100, seed=0)
    adata.obs["age"] = [float(i % 7) for i in range(adata.n_obs)]
    adata.obs["label"] = ["Unknown" if i % 3 else f"type {i % 2}" for i in range(adata.n_obs)]
    adata.obsm["X_real"] = adata.X.toarray()[:, :6] + 0.5
    adata.obsm["image"] = (adata.X.toarray()[:, :12] > 0).reshape(-1, 3, 4).astype("float32")
    return adata


def models(folder):
    """Save small models of several kinds, and return their folders."""
    small = {"n_hidden": 4, "n_latent": 2, "max_epochs": 1, "progress": False}
    kinds = {
        "zinb": {"batch_key": "batch", "continuous_covariate_keys": ["age"], "categorical_covariate_keys": ["label"]},
        "labelled": {"labels_key": "label", "batch_key": ["batch", "label"], "n_layers": 1},
        "flow": {"program": "gaussian", "use_rep": "X_real", "posterior": "iaf", "flow_depth": 1, "flow_width": 4},
        "codes": {"program": "vq", "n_codes": 4, "n_layers": 1},
        "images": {"program": "matrix_normal", "image_key": "image", "n_layers": 1},
        "turned": {"program": "pose", "image_key": "image", "n_layers": 1, "posterior": "full"},
    }
    paths = []
    for name, options in kinds.items():
        paths.append(Path(folder, name))
        scvae.fit(cells(), **{**small, **options}).save(paths[-1])
    return paths


def mutant(seed, base, folder):
    """Make a mutant of a model in an empty folder, and return the name of the mutation."""
    draw = random.Random(seed)
    change = draw.choice(MUTATIONS)
    change(draw, folder, *files_of(base))
    return change.__name__


# ---- Mutants of a store ------------------------------------------------------------------------------------


def of_manifest(draw, manifest, cells):
    return changed_bytes(draw, manifest), cells


def signed_manifest(draw, manifest, cells):
    head = json.loads(manifest)
    head["content"] = changed_tree(draw, head["content"])
    head["sha256"] = hashlib.sha256(json.dumps(head["content"], sort_keys=True).encode()).hexdigest()
    return json.dumps(head).encode(), cells


def signed_pieces(draw, manifest, cells):
    """Let the arrays of the cells begin, end or be of types elsewhere."""
    head = json.loads(manifest)
    content = head["content"]
    change = draw.randrange(3)
    if change == 0:
        content[draw.choice(["n_cells", "nnz", "block", "most_nonzeros", "n_bytes"])] = strange(draw)
    else:
        piece = content["pieces"][draw.choice(sorted(content["pieces"]))]
        huge = [0, 1, -1, 2**31, 2**40, 2**63, 10**30, 1.5, "1"]
        piece[draw.randrange(3)] = draw.choice([*huge, "<i8", "|O", "<f2", "|S0", "<M8[s]"])
    head["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(head).encode(), cells


def of_cells(draw, manifest, cells):
    return manifest, changed_bytes(draw, cells)


STORE_MUTATIONS = (of_manifest, signed_manifest, signed_pieces, of_cells)


def store_mutant(seed, base, folder):
    """Make a mutant of a store in an empty folder, and return the name of the mutation."""
    draw = random.Random(seed)
    change = draw.choice(STORE_MUTATIONS)
    files = change(draw, *((base / name).read_bytes() for name in ("manifest.json", "cells.h5ad")))
    for name, content in zip(("manifest.json", "cells.h5ad"), files, strict=True):
        (folder / name).write_bytes(content)
    return change.__name__


def read_store(folder):
    """Read all that is in a store."""
    store = open_store(folder)
    try:
        rows = store.read(0, len(store))
        arrays = {**vars(rows), **store.statistics}
        return {name: array.tobytes() for name, array in arrays.items() if array is not None}
    finally:
        store.close()


# ---- Mutants of a checkpoint -------------------------------------------------------------------------------


def checkpoint_mutant(seed, base, folder):
    """Make a mutant of the newest checkpoint of a folder, in an empty one, and return the name of the mutation."""
    draw = random.Random(seed)
    paths = sorted(base.glob("step-*"))
    for path in paths[:-1]:
        (folder / path.name).write_bytes(path.read_bytes())
    content = paths[-1].read_bytes()
    changes = (changed_bytes, other_length, changed_header, changed_numbers, changed_state)
    change = draw.choice(changes)
    near = {"near": 8 + struct.unpack("<Q", content[:8])[0]} if change is changed_bytes and draw.random() < 0.7 else {}
    content = change(draw, content, **near)
    is_signed = draw.random() < 0.7
    name = paths[-1].name
    if is_signed:
        name = f"{name.rsplit('-', 1)[0]}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    (folder / name).write_bytes(content)
    return f"{'signed' if is_signed else 'of'}_{change.__name__}"


def changed_state(draw, checkpoint):
    """Change what a checkpoint says beside its tensors."""
    header, data = header_of(checkpoint)
    content = json.loads(header["__metadata__"]["scvae"])
    if draw.random() < 0.7:
        content["run"] = changed_tree(draw, content["run"])
    else:
        content = changed_tree(draw, content)
    header["__metadata__"]["scvae"] = json.dumps(content)
    return with_header(header, data)
