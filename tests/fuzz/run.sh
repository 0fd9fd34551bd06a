#!/usr/bin/env bash
# Fuzzes every target in turn with libFuzzer and ends in one line: `fuzz: N targets, N executions, N findings`.
#
#   tests/fuzz/run.sh SECONDS [TARGET...]
#
# The stable compiler instruments for coverage; findings and the growing corpora are in target/fuzz. A finding, made small
# (OMERTA_FUZZ=TARGET target/fuzz/.../omerta-fuzz -minimize_crash=1 FILE), belongs into tests/fuzz/regressions/TARGET.
set -euo pipefail
cd "$(dirname "$0")/../.."

each=${1:?usage: tests/fuzz/run.sh SECONDS [TARGET...]}
shift
triple=$(rustc -vV | sed -n 's/^host: //p')
target=$PWD/target/fuzz
flags="--cfg fuzzing -Ccodegen-units=1 -Cdebug-assertions -Cpasses=sancov-module"
for option in level=4 inline-8bit-counters pc-table trace-compares; do
    flags+=" -Cllvm-args=-sanitizer-coverage-$option"
done
echo "fuzz: build"
cargo build --quiet --locked -p omerta-fuzz --bin omerta-fuzz-seeds
# With --target the flags reach no build script.
RUSTFLAGS=$flags CARGO_TARGET_DIR=$target cargo build --quiet --release --locked -p omerta-fuzz --bin omerta-fuzz --features libfuzzer --target "$triple"
fuzzer=$target/$triple/release/omerta-fuzz

frames=$target/frames
mkdir -p "$frames"
"${CARGO_TARGET_DIR:-target}/debug/omerta-fuzz-seeds" "$frames"

targets=("$@")
[ $# -gt 0 ] || mapfile -t targets < <(ls tests/fuzz/seeds)
executions=0 findings=0
for name in "${targets[@]}"; do
    corpus=$target/corpus/$name found=$target/findings/$name log=$target/$name.log
    mkdir -p "$corpus" "$found"
    inputs=("$corpus" "tests/fuzz/seeds/$name")
    [ ! -d "tests/fuzz/regressions/$name" ] || inputs+=("tests/fuzz/regressions/$name")
    case $name in egress | ingress | answer_for_guest | c_abi) inputs+=("$frames") ;; esac
    if OMERTA_FUZZ=$name "$fuzzer" -max_total_time="$each" -timeout=10 -max_len=4096 -print_final_stats=1 \
        -artifact_prefix="$found/" "${inputs[@]}" >"$log" 2>&1; then
        result="no finding"
    else
        findings=$((findings + 1))
        result="A FINDING in target/fuzz/findings/$name: $(grep -m1 -E 'panicked|ERROR' "$log" || tail -1 "$log")"
    fi
    ran=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    covered=$(sed -n 's/.* cov: \([0-9]*\).*/\1/p' "$log" | tail -1)
    executions=$((executions + ${ran:-0}))
    echo "fuzz: $name: ${ran:-?} executions, ${covered:-?} edges, $result"
done
echo "fuzz: ${#targets[@]} targets, $executions executions, $findings findings"
[ "$findings" = 0 ]
