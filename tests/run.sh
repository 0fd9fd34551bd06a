#!/usr/bin/env bash
# Runs every test of the workspace and ends in one line: `test: N passed, N failed, N skipped`.
#
#   tests/run.sh [FILTER]     only the tests whose name contains FILTER
#
# A test that cannot run here prints `skipped: REASON` and returns. The runner takes it as passed; here the output tells
# the two apart. Run as root: without it, whatever needs a namespace or a tap is skipped. Where CI is set, a skip that is
# not on the list below fails the run.
set -euo pipefail
cd "$(dirname "$0")/.."

# Promtool, which setup leaves here.
export PATH=$PATH:$PWD/target/tools/bin

# Skips that continuous integration accepts, as regular expressions, each with why.
readonly ACCEPTED_SKIPS=(
    # Debian and Ubuntu tell their kernel's version in a second place, where a test cannot disguise it.
    "this distribution's kernel version cannot be disguised"
    # Debian 13 and Ubuntu have no kernel that old; Debian 12 has, and runs it.
    'this distribution offers no Linux 6\.1 for a machine'
    # What is asked of a kernel that has both hooks is asked of the running one.
    'Linux 6\.1: this kernel has no TCX'
    # It takes ten minutes to make, and its guest four to boot: `vm-launcher/image/debian.sh`, then the test by hand.
    'target/debian has no disk\.qcow2'
    # Kernels may be built without them. WireGuard's is tested on Linux 6.12 in any case.
    'this host has no old iptables'
    'this kernel has no WireGuard'
    # Another test's namespace may get it first.
    'the kernel gives the number of a network namespace to no other'
    # Those of the emulated machines have.
    '^skipped: this kernel has no WireGuard$'
    # Ubuntu names its kernels otherwise.
    'this distribution offers no Linux 6\.12 for a machine'
)

started=$SECONDS
log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0 skipped=0 broken=no
skips=()

# phase NAME COMMAND...: runs the command, shows and reads what it prints.
phase() {
    local name=$1 status=0 before=$SECONDS line
    shift
    echo "test: $name"
    "$@" </dev/null 2>&1 | tee "$log" || status=$?
    read_counts
    while IFS= read -r line; do skips+=("$line"); done < <(read_skips)
    echo "test: $name took $((SECONDS - before)) s"
    # A build that fails runs no test and so counts none.
    [ "$status" = 0 ] || broken=yes
}

# The first reason of each test that says it is skipped. A test's name stands before what it printed: in nextest's status
# line, in a heading of cargo test's. The kernel matrix prints one line a test by itself.
read_skips() {
    sed 's/\x1b\[[0-9;]*m//g' "$log" | awk '
        /^ *[A-Z]+( [A-Z0-9]+)* \[ *[0-9.]+s\]/ { passed = $1 == "PASS" || $1 == "LEAK"; open = passed }
        /^successes:$/ { passed = 1 }
        /^failures:$/ { passed = 0; open = 0 }
        /^---- .* ----$/ { open = passed }
        /^ *skipped: / && open { open = 0; sub(/^ */, ""); print }
        /^vm: skipped: / { sub(/^vm: /, ""); print }'
}

# Adds up what the runner says: a summary line of nextest, one line of cargo test for each binary, the last line of the
# others.
read_counts() {
    local p f
    read -r p f < <(sed 's/\x1b\[[0-9;]*m//g' "$log" | awk '
        /^ *Summary \[/ {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed/) p += $(i - 1)
                if ($i ~ /^(failed|timed|exec)/) f += $(i - 1)
            }
        }
        /^test result: / {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed/) p += $(i - 1)
                if ($i ~ /^failed/) f += $(i - 1)
            }
        }
        /^(demo|runner): [0-9]+ checks passed, [0-9]+ failed/ { p += $2; f += $5 }
        /^vm: [0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$/ { p += $2 + $6; f += $4 }
        END { print p + 0, f + 0 }')
    passed=$((passed + p))
    failed=$((failed + f))
}

end_to_end() {
    cargo build --workspace --bins --locked --quiet
    target/debug/omerta-demo
}

accepted() { # SKIP
    local pattern
    for pattern in "${ACCEPTED_SKIPS[@]}"; do
        if [[ $1 =~ $pattern ]]; then return 0; fi
    done
    return 1
}

[ "$(id -u)" = 0 ] || echo "test: not root, so tests that need namespaces, taps or guests are skipped (sudo make test)"

if cargo nextest --version >/dev/null 2>&1; then
    phase "unit, property, kernel and guest tests (nextest)" \
        cargo nextest run --workspace --locked --no-fail-fast --success-output immediate --no-tests fail ${1:+"$1"}
    phase "documentation examples" cargo test --workspace --locked --no-fail-fast --doc -- ${1:+"$1"}
else
    phase "unit, property, kernel and guest tests, documentation examples (cargo test)" \
        cargo test --workspace --locked --no-fail-fast -- --show-output ${1:+"$1"}
fi

if [ -z "${1:-}" ]; then
    phase "this runner" tests/run_test.sh
    phase "the guard on other kernels (emulated machines)" cargo run --locked --quiet -p omerta-vm-matrix -- 6.1 6.12
fi

# The demo is the end-to-end test: real guests, captures on every other interface.
if [ -n "${1:-}" ]; then
    echo "test: only tests named *$1*, so no end-to-end run"
elif [ "$(id -u)" != 0 ]; then
    skips+=("skipped: the end-to-end run needs root")
    passed=$((passed + 1))
elif [ ! -s target/image/vmlinuz ]; then
    skips+=("skipped: the end-to-end run needs make image")
    passed=$((passed + 1))
else
    # What the tests above were built with; make demo shows the same of the release build.
    phase "end to end, with real guests (omerta-demo)" end_to_end
fi

skipped=${#skips[@]}
if [ "$skipped" -gt 0 ]; then
    echo "test: skipped, by reason:"
    printf '%s\n' "${skips[@]}" | sort | uniq -c
fi
echo "test: took $((SECONDS - started)) s in all"
echo "test: $((passed - skipped)) passed, $failed failed, $skipped skipped"
if [ "$broken" = yes ] || [ "$failed" -gt 0 ]; then
    [ "$failed" -gt 0 ] || echo "test: a phase failed before or after its tests: see above" >&2
    exit 1
fi
if [ -n "${CI:-}" ] && [ "$CI" != false ]; then
    unaccepted=0
    for skip in "${skips[@]}"; do
        accepted "$skip" && continue
        echo "test: may not be skipped here: ${skip#skipped: }" >&2
        unaccepted=$((unaccepted + 1))
    done
    [ "$unaccepted" = 0 ] || exit 1
fi
[ "$passed" -gt "$skipped" ] || {
    echo "test: no test ran" >&2
    exit 1
}
