//! What is heard on a guest's console.

/// What a guest's own firewall says there of what it blocked. It is the guest's word, which the guest can forge and
/// keep back: it is told and recorded, and never ends a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleReport {
    /// Lines of blocked packets, since the guest is watched.
    pub attempts: u64,
    /// Bytes that the guest printed faster than its console is read, since it is watched.
    pub unread: u64,
    /// The last of the lines.
    pub line: String,
}
