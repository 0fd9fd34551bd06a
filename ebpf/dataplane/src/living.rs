//! Which network namespaces live, and which one this is.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

/// The inodes of the network namespaces that a process is in or that a mount in any process's mount
/// namespace holds (`ip netns`). One that is held by a descriptor alone is not found.
pub fn namespaces() -> HashSet<u64> {
    let (mut living, mut mounts) = (HashSet::new(), HashSet::new());
    let own = [PathBuf::from("/proc/thread-self")];
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in own
        .into_iter()
        .chain(processes.map(|process| process.path()))
    {
        // Of a process that ends meanwhile there is nothing to tell.
        let inode = |kind| Some(fs::metadata(process.join(kind)).ok()?.ino());
        living.extend(inode("ns/net"));
        if inode("ns/mnt").is_some_and(|namespace| mounts.insert(namespace)) {
            let lines = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
            living.extend(lines.lines().filter_map(of_mount));
        }
    }
    living
}

/// Whether a process holds the network namespace of that inode by a descriptor.
pub fn is_held(inode: u64) -> bool {
    let held = format!("net:[{inode}]");
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let descriptors = processes
        .filter_map(|process| fs::read_dir(process.path().join("fd")).ok())
        .flat_map(Iterator::flatten);
    descriptors
        .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
        .any(|leads_to| leads_to.as_os_str() == held.as_str())
}

/// The number of this thread's network namespace that no other is ever given, as inodes are
/// (`SO_NETNS_COOKIE`, Linux 5.14).
pub fn cookie() -> io::Result<u64> {
    let socket = UnixDatagram::unbound()?;
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, and how many to `length`; both
    // outlive the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match (result, length as usize) {
        (0, 8) => Ok(cookie),
        (0, _) => Err(io::Error::other("the namespace's cookie is no number")),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The namespace of a line of mountinfo whose fourth field, the root of the mount, is `net:[INODE]`
/// (proc_pid_mountinfo(5)).
fn of_mount(line: &str) -> Option<u64> {
    let root = line.split(' ').nth(3)?;
    root.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_threads_namespace_lives_and_mounts_are_read() {
        let own = fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        assert!(namespaces().contains(&own));
        let line = "620 27 0:4 net:[4026532178] /run/netns/a rw shared:9 - nsfs nsfs rw";
        assert_eq!(of_mount(line), Some(4_026_532_178));
        let other = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw";
        assert_eq!(of_mount(other), None);
        assert_eq!(cookie().unwrap(), cookie().unwrap());
        let _held = fs::File::open("/proc/thread-self/ns/net").unwrap();
        assert!(is_held(own) && !is_held(1));
    }
}
