//! Whether the host translates source addresses, which what passes its stack by would miss.

use std::fs;
use std::process::{Command, Stdio};

/// Whether a table of this network namespace is found that may translate source addresses. One that
/// cannot be looked for (`nft` is not installed) is not found.
pub fn is_found() -> bool {
    let legacy = fs::read_to_string("/proc/thread-self/net/ip_tables_names");
    if legacy.is_ok_and(|tables| tables.lines().any(|table| table == "nat")) {
        return true;
    }
    let chains = Command::new("nft")
        .args(["list", "chains"])
        .stdin(Stdio::null())
        .output();
    chains.is_ok_and(|chains| has_translation(&String::from_utf8_lossy(&chains.stdout)))
}

fn has_translation(chains: &str) -> bool {
    chains
        .lines()
        .any(|line| line.trim_start().starts_with("type nat hook postrouting"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_that_translates_sources_is_told_from_others() {
        let chain = |kind: &str| {
            format!(
                "table ip t {{\n\tchain c {{\n\t\t{kind} priority srcnat; policy accept;\n\t}}\n}}\n"
            )
        };
        assert!(has_translation(&chain("type nat hook postrouting")));
        assert!(!has_translation(&chain("type nat hook prerouting")));
        assert!(!has_translation(&chain("type filter hook postrouting")));
        assert!(!has_translation(""));
    }
}
