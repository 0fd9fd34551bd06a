//! How much memory this host has, for guests and everything else.

use std::fs::read_to_string;

/// Where the kernel tells.
const MEMINFO: &str = "/proc/meminfo";
/// The memory that this process and its children may take, where a control group says so.
const CGROUP_LIMITS: [&str; 2] = [
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
];

/// Memory of the host, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostMemory {
    /// All of it, or as much as a control group grants.
    pub(crate) total_mib: u64,
    /// What programs could take now without swapping.
    pub(crate) available_mib: u64,
}

impl HostMemory {
    /// As it is now; `None` where the kernel does not tell.
    pub(crate) fn now() -> Option<Self> {
        let mut memory = Self::parse(&read_to_string(MEMINFO).ok()?)?;
        for limit in CGROUP_LIMITS {
            // "max", or a number of bytes beyond any host's, means that there is no limit.
            let bytes = read_to_string(limit)
                .ok()
                .and_then(|text| text.trim().parse::<u64>().ok());
            if let Some(bytes) = bytes {
                memory.total_mib = memory.total_mib.min(bytes >> 20);
            }
        }
        Some(memory)
    }

    /// Of lines as `MemTotal:       24576000 kB` (proc_meminfo(5)).
    fn parse(meminfo: &str) -> Option<Self> {
        let mib = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(kib >> 10)
        };
        Some(Self {
            total_mib: mib("MemTotal:")?,
            available_mib: mib("MemAvailable:")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read_and_nothing_else_is() {
        let text = "MemTotal:       24576000 kB\nMemFree:  1 kB\nMemAvailable:   20480000 kB\n";
        let memory = HostMemory {
            total_mib: 24_000,
            available_mib: 20_000,
        };
        assert_eq!(HostMemory::parse(text), Some(memory));
        for text in [
            "",
            "MemTotal: 1 kB\n",
            "MemTotal: x kB\nMemAvailable: 1 kB\n",
            "MemTotal: 1\n",
        ] {
            assert_eq!(HostMemory::parse(text), None, "{text}");
        }
        let now = HostMemory::now().unwrap();
        assert!(now.total_mib > 0, "{now:?}");
    }
}
