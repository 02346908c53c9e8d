#!/usr/bin/env bash
# Generates what follows from the contract into this tree (or the folder given): the Python stubs, the client's value
# objects, what the server has to know of each method, and docs/methods.md.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
stubs=$out/client/python
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
mkdir -p "$stubs"
descriptors=$(mktemp)
trap 'rm -f "$descriptors"' EXIT
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -Iproto \
    --python_out="$stubs" --pyi_out="$stubs" --grpc_python_out="$stubs" --mypy_grpc_out="$stubs" \
    --descriptor_set_out="$descriptors" --include_imports --include_source_info \
    proto/optserve/v1/*.proto
# Files without a service have no gRPC code.
find "$stubs/optserve/v1" -name '*_pb2_grpc.py*' ! -name 'service_pb2_grpc.py*' -delete
touch "$stubs/optserve/v1/__init__.py"
"$python" scripts/generate_methods.py "$descriptors" "$out"
