#!/usr/bin/env bash
# Proves the kernel programs as `make build` compiles them (README.md here).
#
#   tests/prove/run.sh [--no-mutants | --only-mutants]
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=target/prove/venv
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "prove: python3 is older than 3.11" >&2
    exit 1
}
if ! cmp -s tests/prove/requirements.txt "$venv/requirements.txt"; then
    echo "prove: installing the solver into $venv"
    rm -rf "$venv"
    python3 -m venv "$venv" || {
        echo "prove: python3 -m venv failed: install python3-venv" >&2
        exit 1
    }
    "$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
        -r tests/prove/requirements.txt
    cp tests/prove/requirements.txt "$venv/requirements.txt"
fi

# Runs the same build script as `make build`, which tells where it put the object.
object=$(cargo check --release --locked --quiet -p omerta-dataplane --message-format=json |
    "$venv/bin/python" -c '
import json, sys
for line in sys.stdin:
    for name, value in json.loads(line).get("env", []):
        if name == "OMERTA_PROGRAMS":
            print(value)
')
[ -s "$object" ] || {
    echo "prove: the kernel programs were not built" >&2
    exit 1
}
PYTHONPATH=tests/prove PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python" -m prover \
    --binary target/release/omerta "$@" "${object#"$PWD"/}"
