#!/usr/bin/env bash
# Compares the contract with what users have: the main branch, or, on main itself, the commit before.
set -euo pipefail
cd "$(dirname "$0")/.."
buf=${BUF:-.venv/bin/buf}
base=main
if [ "$(git rev-parse --abbrev-ref HEAD)" = main ] && git diff --quiet HEAD -- proto; then
    # Nothing is uncommitted, so it is the last change of the contract that is looked at.
    last=$(git rev-list -1 HEAD -- proto)
    base=$(git rev-parse --verify --quiet "$last^" || true)
fi
if [ -z "$base" ] || ! git cat-file -e "$base:proto" 2>/dev/null; then
    echo "breaking: there is no earlier contract to compare with"
    exit 0
fi
"$buf" breaking --against ".git#ref=$(git rev-parse "$base")"
