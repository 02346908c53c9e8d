#!/usr/bin/env bash
# Resolves requirements/*.in into pinned requirements/*.txt, without the addresses of any package index.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
    "$PYTHON" -m piptools compile -q --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
        --no-header --annotation-style=line -o "requirements/$1.txt" "${@:2}" "requirements/$1.in"
    # A local build of torch carries a suffix that the package index does not know.
    sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/; s/, -c requirements\/.constraints\|-c requirements\/.constraints, //; s/-c requirements\/.constraints//' \
        "requirements/$1.txt"
}
PYTHON=${PYTHON:-.venv/bin/python}
compile dev --upgrade
# The demonstration and the benchmarks run exactly what the tests ran.
grep -v '^-e' requirements/dev.txt | sed 's/ *#.*//' >requirements/.constraints
trap 'rm -f requirements/.constraints' EXIT
compile run -c requirements/.constraints
compile bench -c requirements/.constraints
compile integrations -c requirements/.constraints
# Flower asks for older releases of some of the rest, so it has an environment of its own.
grep -E '^(grpcio|numpy|platformdirs|protobuf|threadpoolctl)==' requirements/dev.txt | sed 's/ *#.*//' >requirements/.constraints
compile federated -c requirements/.constraints
