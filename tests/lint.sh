#!/usr/bin/env bash
# Everything that reads the source without running it: formatting, clippy, the kernel programs, dependencies, shell
# scripts, deploy files. Goes through all of them, then fails if any did.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/bpf-toolchain.sh
. deploy/bpf-toolchain.sh

# Promtool, which setup leaves here.
export PATH=$PATH:$PWD/target/tools/bin

failed=() passed=0 skipped=0

# check NAME COMMAND...
check() {
    local name=$1 before=$SECONDS
    shift
    echo "lint: $name"
    if "$@" </dev/null; then
        passed=$((passed + 1))
        echo "lint: $name ok ($((SECONDS - before)) s)"
    else
        failed+=("$name")
        echo "lint: $name FAILED ($((SECONDS - before)) s)" >&2
    fi
}

skip() { # NAME REASON
    skipped=$((skipped + 1))
    echo "lint: $1 skipped: $2"
}

has() { command -v "$1" >/dev/null 2>&1; }

# clippy where the toolchain that builds the programs has it, else the compiler's own warnings.
kernel_programs() {
    local rustc verb=check
    rustc=$(find_bpf_rustc) || {
        echo "no rustc with rust-src: run 'make setup'" >&2
        return 1
    }
    local run=(env "RUSTC=$rustc")
    if [[ $rustc != /usr/bin/* && -x ${rustc%/rustc}/cargo-clippy ]]; then
        verb=clippy
        run=(env "PATH=${rustc%/rustc}:$PATH")
    fi
    "${run[@]}" RUSTC_BOOTSTRAP=1 RUSTFLAGS="--cfg=bpf_target_arch=\"$(uname -m)\" -Dwarnings" \
        cargo "$verb" --quiet --release --locked --manifest-path ebpf/programs/Cargo.toml \
        --features bench -Z build-std=core --target bpfel-unknown-none --target-dir target/lint-programs
}

dependencies() {
    local report
    cargo deny --log-level error check bans licenses sources || return 1
    # The kernel programs are a workspace of their own.
    cargo deny --log-level error --config deny.toml --manifest-path ebpf/programs/Cargo.toml check bans licenses sources ||
        return 1
    # The advisories come from a database on the network; without it, say so and go on.
    report=$(cargo deny --log-level error check advisories 2>&1) || {
        if grep -q 'failed to fetch advisory database' <<<"$report"; then
            skip "advisories" "the advisory database cannot be reached"
        else
            echo "$report"
            return 1
        fi
    }
}

shell_scripts() {
    local ours guests
    local inside=(vm-launcher/image/rootfs vm-launcher/image/debian controller/daemon/tests/omertad/red_team)
    mapfile -t ours < <(scripts "${inside[@]/#/:!}")
    mapfile -t guests < <(scripts "${inside[@]}")
    shellcheck --external-sources --severity=warning "${ours[@]}" || return 1
    # The guest's get their variables by name from a file that is read at boot.
    shellcheck --severity=warning --exclude=SC2034,SC2154 "${guests[@]}"
}

scripts() { # PATHSPEC...: those that begin with a shell's name
    git ls-files -z -- "$@" | xargs -0 grep -lE '^#!(/usr/bin/env bash|/bin/(ba)?sh)' --
}

# omertad itself reads the example: it gets as far as its socket, in a network namespace of its own.
example_configuration() {
    local directory omertad status=1
    directory=$(mktemp -d)
    unshare --net target/release/omertad --config deploy/omertad.toml --metrics off --accel tcg \
        --socket "$directory/omertad.sock" --run-dir "$directory/run" >"$directory/log" 2>&1 &
    omertad=$!
    for _ in {1..50}; do
        if [ -S "$directory/omertad.sock" ]; then
            status=0
            break
        fi
        kill -0 "$omertad" 2>/dev/null || break
        sleep 0.1
    done
    kill "$omertad" 2>/dev/null || true
    wait "$omertad" || true
    [ "$status" = 0 ] || cat "$directory/log"
    rm -rf "$directory"
    return "$status"
}

check "formatting" cargo fmt --all --check
check "formatting of the kernel programs" cargo fmt --manifest-path ebpf/programs/Cargo.toml --check
check "clippy" cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
check "kernel programs" kernel_programs
if has cargo-deny; then
    check "dependencies" dependencies
else
    skip "dependencies" "cargo-deny is not installed"
fi
if has shellcheck; then
    check "shell scripts" shell_scripts
else
    skip "shell scripts" "shellcheck is not installed"
fi
if has promtool; then
    check "Prometheus rules" promtool check rules deploy/prometheus/omerta.rules.yml
    check "Prometheus alerts" promtool test rules deploy/prometheus/omerta.rules.test.yml
    check "Prometheus configuration" promtool check config --syntax-only deploy/prometheus/prometheus.yml
else
    skip "Prometheus files" "promtool is not installed"
fi

if [ "$(id -u)" = 0 ] && [ -x target/release/omertad ]; then
    check "example configuration" example_configuration
else
    skip "example configuration" "it takes root and target/release/omertad (make build)"
fi

if [ ${#failed[@]} -gt 0 ]; then
    printf 'lint: failed: %s\n' "${failed[@]}" >&2
fi
echo "lint: $passed passed, ${#failed[@]} failed, $skipped skipped"
[ ${#failed[@]} = 0 ]
