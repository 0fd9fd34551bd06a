#!/usr/bin/env bash
# Installs what building and testing Omerta needs, and says what it did, a line a step.
# Idempotent: it looks at the machine, not at a stamp, so a second run changes nothing and takes under two seconds.
#
#   deploy/setup.sh           everything that `make build`, `make demo` and `make test` need
#   deploy/setup.sh --lint    the same, and what only `make lint` needs (cargo-deny, shellcheck)
#   deploy/setup.sh --bench   the same, and what `make bench` compares and sends with (nftables, iptables, ipset, iperf3)
#
# OMERTA_BPF_RUSTC=PATH       use this rustc (it needs its rust-src) for the BPF programs
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=deploy/bpf-toolchain.sh
. deploy/bpf-toolchain.sh

readonly BPF_LINKER_VERSION=0.13.0
readonly MINIMUM_RUST=1.89

installed=0
started=$EPOCHREALTIME

elapsed() { awk -v a="$started" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }'; }

# step ok|installed|working|warning TEXT
step() {
    printf 'setup %6ss  %-9s  %s\n' "$(elapsed)" "$1" "$2"
    if [ "$1" = installed ]; then installed=$((installed + 1)); fi
}

fail() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

# as_root WHAT COMMAND...: runs the command as root, or says why it cannot.
as_root() {
    local what=$1
    shift
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif has sudo; then
        sudo "$@"
    else
        fail "installing $what needs root and there is no sudo here; run 'make setup' as root"
    fi
}

apt_updated=no
# apt_refresh WHAT-FOR: brings the package lists up to date, once a run.
apt_refresh() {
    [ "$apt_updated" = no ] || return 0
    apt_updated=yes
    step working "apt-get update"
    as_root "$1" apt-get update -qq >/dev/null 2>&1 ||
        step warning "apt-get update failed: going on with the package lists that are here"
}

# apt_install PACKAGE...: without the packages that these only recommend.
apt_install() {
    has apt-get || fail "$* missing and there is no apt-get here; install them by hand, then run 'make setup' again"
    apt_refresh "$*"
    step working "apt-get install $*"
    local log
    log=$(mktemp)
    if ! as_root "$*" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

apt_offers() { # PACKAGE
    has apt-cache || return 1
    if apt-cache show "$1" >/dev/null 2>&1; then return 0; fi
    apt_refresh "$1"
    apt-cache show "$1" >/dev/null 2>&1
}

version_at_least() { # HAVE WANT
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}

check_kernel() {
    local release
    release=$(uname -r)
    if version_at_least "${release%%[!0-9.]*}" 6.6; then
        step ok "kernel $release has TCX hooks"
    elif version_at_least "${release%%[!0-9.]*}" 5.15; then
        step ok "kernel $release has no TCX hooks (6.6 and later have), so guards use clsact"
    else
        step warning "kernel $release is too old for guards: they need Linux 5.15 or later, best 6.6 or later"
    fi
    [ -e /dev/net/tun ] || step warning "/dev/net/tun is missing: no guest can have a tap (modprobe tun)"
}

check_rust() {
    has cargo || fail "cargo is missing: install Rust from https://rustup.rs for the user who runs this (with sudo that is root: or name its place, as in CARGO_HOME=~/.cargo RUSTUP_HOME=~/.rustup), then run 'make setup' again"
    local version
    version=$(rustc --version | cut -d' ' -f2)
    version_at_least "${version%%-*}" "$MINIMUM_RUST" ||
        fail "rustc $version is too old, $MINIMUM_RUST or later is needed: run 'rustup update stable'"
    step ok "rustc $version"
}

# One line a need: what shows that it is there (a command, or a path from the root), and the package that brings it.
needs() {
    cat <<'END'
cc gcc
/usr/include/stdio.h libc6-dev
qemu-system-x86_64 qemu-system-x86
ip iproute2
ethtool ethtool
ping iputils-ping
tcpdump tcpdump
clang clang
llc llvm
m4 m4
pkg-config pkg-config
/usr/include/libelf.h libelf-dev
/usr/include/zlib.h zlib1g-dev
wg wireguard-tools
wireguard-go wireguard-go
nft nftables
iptables-legacy iptables
zstd zstd
/etc/ssl/certs/ca-certificates.crt ca-certificates
END
}

install_packages() {
    local sign package missing=() count=0
    # Debian keeps these outside the PATH of ordinary users.
    PATH=$PATH:/usr/sbin:/sbin
    while read -r sign package; do
        count=$((count + 1))
        case $sign in
        /*) [ -e "$sign" ] || missing+=("$package") ;;
        *) has "$sign" || missing+=("$package") ;;
        esac
    done < <(needs)
    if [ ${#missing[@]} = 0 ]; then
        step ok "$count system packages"
    else
        apt_install "${missing[@]}" || fail "apt-get could not install ${missing[*]}: see above"
        step installed "${missing[*]}"
    fi
}

# Finds a rustc that can build core for BPF, bringing its sources if none has them; prints its path in $bpf_rustc.
install_bpf_rustc() {
    if bpf_rustc=$(find_bpf_rustc); then
        step ok "BPF programs: $(describe_rustc "$bpf_rustc")"
        return
    fi
    [ -z "${OMERTA_BPF_RUSTC:-}" ] ||
        fail "OMERTA_BPF_RUSTC=$OMERTA_BPF_RUSTC cannot build core for BPF: it is no rustc $MINIMUM_BPF_RUST or later with rust-src"
    if has rustup && rustup which rustc --toolchain nightly >/dev/null 2>&1; then
        step working "rustup component add rust-src --toolchain nightly"
        timeout 180 rustup component add rust-src --toolchain nightly >/dev/null 2>&1 || true
        bpf_rustc=$(find_bpf_rustc) || true
    fi
    if [ -z "$bpf_rustc" ] && apt_offers rustc-web; then
        apt_install rustc-web rust-web-src || true
        bpf_rustc=$(find_bpf_rustc) || true
    fi
    if [ -z "$bpf_rustc" ] && has rustup; then
        step working "rustup toolchain install nightly --component rust-src"
        timeout 600 rustup toolchain install nightly --profile minimal --component rust-src >/dev/null 2>&1 || true
        bpf_rustc=$(find_bpf_rustc) || true
    fi
    [ -n "$bpf_rustc" ] ||
        fail "no Rust toolchain with rust-src for the BPF programs: run 'rustup toolchain install nightly --component rust-src' (on Debian: apt-get install rustc-web rust-web-src)"
    step installed "BPF programs: $(describe_rustc "$bpf_rustc")"
}

# bpf-linker reads the bitcode that rustc writes, so it is linked with the very libLLVM that this rustc uses: no
# LLVM development packages are needed, and the versions cannot differ.
install_bpf_linker() {
    local major library prefix log
    major=$(llvm_major "$bpf_rustc")
    if linker_fits "$major"; then
        step ok "$(bpf-linker --version) with LLVM $major"
        return
    fi
    library=$(rustc_llvm "$bpf_rustc")
    [ -n "$library" ] ||
        fail "$bpf_rustc has no shared libLLVM to link bpf-linker with: install a bpf-linker $BPF_LINKER_VERSION for LLVM $major by hand"
    prefix=${CARGO_HOME:-$HOME/.cargo}/lib/llvm-$major
    mkdir -p "$prefix/lib"
    ln -sf "$library" "$prefix/lib/libLLVM.so"
    ln -sf "$library" "$prefix/lib/$(basename "$library")"
    step working "cargo install bpf-linker $BPF_LINKER_VERSION with LLVM $major (one to two minutes)"
    log=$(mktemp)
    if ! LLVM_PREFIX=$prefix cargo install bpf-linker --version "$BPF_LINKER_VERSION" --locked --force \
        --no-default-features --features "llvm-$major" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        fail "bpf-linker $BPF_LINKER_VERSION did not build with LLVM $major: see above"
    fi
    rm -f "$log"
    hash -r
    PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    linker_fits "$major" || fail "bpf-linker was installed but does not run: try 'bpf-linker --version'"
    step installed "$(bpf-linker --version) with LLVM $major"
}

# Debian 13 has a package of promtool alone. Before, it comes with the Prometheus server, which would start as a service if
# it were installed: the package is downloaded and this one program taken out.
install_promtool() {
    local tools=target/tools/bin package=promtool work
    if has promtool || [ -x "$tools/promtool" ]; then
        step ok "promtool"
        return
    fi
    apt_offers "$package" || package=prometheus
    apt_offers "$package" || fail "promtool is missing and no package brings it here: put one on PATH, then run 'make setup' again"
    step working "apt-get download $package, for promtool alone"
    mkdir -p "$tools"
    work=$(mktemp -d "$tools/promtool.XXXXXX")
    if (cd "$work" && apt-get -qq -o APT::Sandbox::User="$(id -un)" download "$package" && dpkg -x ./*.deb .) >"$work.log" 2>&1 &&
        mv "$work/usr/bin/promtool" "$tools/promtool"; then
        rm -rf "$work" "$work.log"
        step installed "promtool in $tools"
    else
        cat "$work.log" >&2
        rm -rf "$work" "$work.log"
        fail "$package could not be downloaded and unpacked: see above"
    fi
}

install_lint_tools() {
    if has shellcheck; then
        step ok "shellcheck"
    else
        apt_install shellcheck || fail "apt-get could not install shellcheck: see above"
        step installed "shellcheck"
    fi
    if has cargo-deny; then
        step ok "$(cargo deny --version)"
    else
        step working "cargo install cargo-deny (several minutes)"
        cargo install cargo-deny --locked --quiet </dev/null || fail "cargo-deny did not build: see above"
        step installed "$(cargo deny --version)"
    fi
}

install_bench_tools() {
    local tool missing=()
    for tool in nftables/nft iptables/iptables ipset/ipset iperf3/iperf3; do
        PATH=$PATH:/usr/sbin:/sbin has "${tool#*/}" || missing+=("${tool%/*}")
    done
    if [ ${#missing[@]} = 0 ]; then
        step ok "nft, iptables, ipset, iperf3"
    elif apt_install "${missing[@]}"; then
        step installed "${missing[*]}"
    else
        step warning "${missing[*]} could not be installed: the rows that need them will be missing"
    fi
}

also=
case ${1:-} in
'') ;;
--lint | --bench) also=${1#--} ;;
*)
    printf 'setup: %s: unknown argument; usage: deploy/setup.sh [--lint|--bench]\n' "$1" >&2
    exit 2
    ;;
esac

check_kernel
install_packages
install_promtool
check_rust
install_bpf_rustc
install_bpf_linker
case $also in
lint) install_lint_tools ;;
bench) install_bench_tools ;;
esac
if [ "$installed" = 0 ]; then
    printf 'setup: all in place, nothing to install (%s s)\n' "$(elapsed)"
else
    printf 'setup: done, %s steps installed something (%s s)\n' "$installed" "$(elapsed)"
fi
