# Sourced, not run: which rustc builds the BPF programs, and whether bpf-linker fits it.
#
# Building core for bpfel-unknown-none takes a rustc with its library sources. rustup does not bring them unasked, and
# Debian's own rustc is too old, so the first of these that has them is taken: OMERTA_BPF_RUSTC, rustup's nightly,
# Debian's rustc-web in /usr/bin. ebpf/dataplane/build.rs looks in the same order.
# Ubuntu's versioned ones (rustc-1.91 and later in 24.04) have their LLVM inside, with which bpf-linker cannot be linked.
# shellcheck shell=bash

# The first release whose LLVM (21) bpf-linker 0.13 reads.
readonly MINIMUM_BPF_RUST=1.90

# Prints the path of the rustc to use; fails where there is none.
find_bpf_rustc() {
    local candidate
    while read -r candidate; do
        if builds_core "$candidate"; then
            echo "$candidate"
            return 0
        fi
    done < <(bpf_rustc_candidates)
    return 1
}

bpf_rustc_candidates() {
    if [ -n "${OMERTA_BPF_RUSTC:-}" ]; then
        echo "$OMERTA_BPF_RUSTC"
        return
    fi
    rustup which rustc --toolchain nightly 2>/dev/null || true
    echo /usr/bin/rustc
}

builds_core() { # RUSTC
    [ -x "$1" ] || return 1
    local release
    release=$("$1" --version 2>/dev/null | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$MINIMUM_BPF_RUST" "${release%%-*}" | sort -V | head -n 1)" = "$MINIMUM_BPF_RUST" ] || return 1
    [ -e "$("$1" --print sysroot)/lib/rustlib/src/rust/library/core/src/lib.rs" ]
}

describe_rustc() { # RUSTC
    printf '%s, %s, LLVM %s' "$1" "$("$1" --version | cut -d' ' -f1-2)" "$(llvm_major "$1")"
}

llvm_major() { "$1" -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p'; } # RUSTC

rustc_llvm() { ldd "$1" | sed -n 's/.* => \(.*libLLVM[^ ]*\) .*/\1/p' | head -n 1 | xargs -r readlink -f; } # RUSTC

# Whether bpf-linker is there, runs, and is linked with this LLVM. One that has LLVM inside is taken at its word.
linker_fits() { # LLVM-MAJOR
    local linked
    bpf-linker --version >/dev/null 2>&1 || return 1
    linked=$(ldd "$(command -v bpf-linker)" 2>/dev/null | grep -o 'libLLVM[^ ]*' | head -n 1 | grep -oE '[0-9]+' | head -n 1)
    [ -z "$linked" ] || [ "$linked" = "$1" ]
}
