//! Fuzz targets: one function for everything that reads bytes which a guest, the network, a file
//! or another process has written. Each panics where a promise is broken.
//!
//! Borrowed files bring unit tests that belong to other crates, so under `cfg(test)` nothing is
//! left of this library; its own tests are in `tests/`.
//!
//! `make fuzz SECONDS=N` runs each under libFuzzer; `tests/replay.rs` replays the committed inputs.

#![cfg(not(test))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a finding is a panic"
)]

mod agent;
mod images;
mod maps;
mod oracle;
mod parsers;
mod streams;
mod table;
mod verdict;

/// Parsers of binaries and private modules, compiled once more from their own files.
macro_rules! borrowed {
    ($($name:ident = $path:literal),+ $(,)?) => {$(
        #[path = $path]
        #[allow(dead_code, unreachable_pub, missing_docs, reason = "the file belongs to another crate")]
        mod $name;
    )+};
}

borrowed!(
    allowlist = "../../../controller/cli/src/allowlist.rs",
    console_watch = "../../../vm-launcher/src/console_watch.rs",
    control_port = "../../../vm-launcher/src/control_port.rs",
    count = "../../../ebpf/dataplane/src/count.rs",
    exit = "../../../controller/cli/src/exit.rs",
    failure_line = "../../../ebpf/dataplane/src/failure_line.rs",
    guest_text = "../../../controller/cli/src/guest_text.rs",
    note_text = "../../../ebpf/dataplane/src/note_text.rs",
    qmp_lines = "../../../vm-launcher/src/qmp_lines.rs",
    spec = "../../../controller/cli/src/spec.rs",
);
use omerta_tunnel::PublicKey as WgPublicKey;

/// One target: what it reads.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("egress", verdict::egress_target),
    ("ingress", verdict::ingress_target),
    ("answer_for_guest", verdict::answer_target),
    ("event_record", parsers::event_record),
    ("words", parsers::words),
    ("allowlist_file", parsers::allowlist_file),
    ("table", table::model),
    ("qmp_lines", streams::qmp_lines),
    ("control_port", streams::control_port),
    ("console_filter", streams::console_filter),
    ("console_watch", streams::console_watch),
    ("c_abi", parsers::c_abi),
    ("qcow2_header", images::qcow2_header),
    ("image_manifest", images::image_manifest),
    ("image_signature", images::image_signature),
    ("revoked_list", images::revoked_list),
    ("guest_spec", parsers::guest_spec),
    ("agent_messages", agent::messages),
    ("agent_heartbeat", agent::heartbeat),
    ("wireguard_conf", parsers::wireguard_conf),
    ("counters", maps::counters),
    ("notes", maps::notes),
    ("failure_line", maps::failure_line),
];

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, target)| *target)
}
