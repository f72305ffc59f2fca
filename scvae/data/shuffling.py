"""Cells of files, checked and written once to a store in an order drawn at random.

Each cell goes to one of some bins, drawn for it, which lie on the disk; then each bin is loaded, permuted and written
after the others. Every order of the cells is equally likely, and what is in memory is a block of a file or a bin,
however many cells there are: each cell is read, written, read and written once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse, special

from scvae.boundary import files
from scvae.boundary.options import names_of, seed_of, whole
from scvae.data.categories import name_of
from scvae.data.cells import Key, Schema
from scvae.data.reading import check_not_empty, check_values, covariates_of, labels_of, read_schema
from scvae.data.store import CELLS, Store, checksum, open_store, write_manifest
from scvae.data.tables import Block, Table, Tables, open_tables
from scvae.data.variable_genes import chosen_genes
from scvae.kernels import rows as loops

__all__ = ["find_store", "shuffled"]

_BLOCK = 64  # cells that have a checksum together
_MOST_BINS = 256  # files that are open at once
_MEMORY = 1 << 30
