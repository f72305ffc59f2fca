#!/usr/bin/env bash
# The tests and measurements that need a GPU, in a few minutes, with scvae installed beside a torch that sees one:
#   bash tests/benchmarks/gpu.sh [PYTHON OF AN ENVIRONMENT WITH SCVI-TOOLS]
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pytest -q -m gpu
python tests/benchmarks/data.py
python tests/benchmarks/bench.py --device cuda --only step epoch growth --sizes 100000 1000000 --repeats 3 ${1:+--peer "$1"}
