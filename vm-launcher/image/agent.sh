# shellcheck shell=sh
# shellcheck disable=SC2154
# Read by build.sh and debian.sh: the agent, as $agent. OMERTA_AGENT names one that is there already; in the source tree
# it is built, with all that it needs in it, so that it runs in any image. They give $recipe and die.
find_agent() {
    agent=${OMERTA_AGENT-}
    if [ -z "$agent" ]; then
        tree=$(cd "$recipe/../.." && pwd)
        [ -s "$tree/vm-launcher/agent/Cargo.toml" ] ||
            die "there is no agent to put into the image: OMERTA_AGENT=FILE names omerta-agent"
        command -v cargo >/dev/null || die "cargo is missing, which builds the agent (or OMERTA_AGENT=FILE names one)"
        triple=x86_64-unknown-linux-gnu
        built=${CARGO_TARGET_DIR:-$tree/target}/agent
        # Its size counts in each guest, and where it was built is nobody's business. With --target the flags reach no
        # build script.
        RUSTFLAGS="-Ctarget-feature=+crt-static -Copt-level=z -Ccodegen-units=1 -Clto=fat -Cembed-bitcode=yes -Cpanic=abort -Cstrip=symbols -Cdebuginfo=0 \
            --remap-path-prefix=$tree=. --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo" CARGO_TARGET_DIR=$built \
            cargo build --quiet --release --locked --manifest-path "$tree/Cargo.toml" -p omerta-agent --target "$triple" ||
            die "cannot build the agent"
        agent=$built/$triple/release/omerta-agent
    fi
    [ -s "$agent" ] || die "$agent is no agent"
    [ "$(stat -c %s "$agent")" -le $((3 << 20)) ] || die "the agent has $(stat -c %s "$agent") bytes, more than 3 MiB"
}
