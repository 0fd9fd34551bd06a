//! What notes say ([`crate::notes`]), as text.

use std::fmt;
use std::str::FromStr;

/// Behind the index, where the guard made the qdisc of its filters.
const QDISC_MADE: &str = "+qdisc";

/// Where a guard's filters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filters {
    /// The interface's index, in this network namespace.
    pub ifindex: u32,
    /// Whether the guard made the clsact qdisc, and so removes it.
    pub made_qdisc: bool,
}

impl fmt::Display for Filters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let made = if self.made_qdisc { QDISC_MADE } else { "" };
        write!(f, "{}{made}", self.ifindex)
    }
}

impl FromStr for Filters {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (ifindex, made_qdisc) = match text.strip_suffix(QDISC_MADE) {
            Some(ifindex) => (ifindex, true),
            None => (text, false),
        };
        let ifindex = ifindex
            .parse()
            .map_err(|_| "this is no interface's index")?;
        Ok(Self {
            ifindex,
            made_qdisc,
        })
    }
}

/// The build of the layout of a guard's maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Of what is judged by: policy, allowlist, meters, flows.
    pub policy: u64,
    /// Of what is counted and told.
    pub accounts: u64,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}", self.policy, self.accounts)
    }
}

impl FromStr for Layout {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        text.split_once('-')
            .and_then(|(policy, accounts)| {
                Some(Self {
                    policy: number(policy)?,
                    accounts: number(accounts)?,
                })
            })
            .ok_or("this is no layout")
    }
}

/// Numbers with commas between them.
pub fn numbers(text: &str) -> Option<Vec<u32>> {
    text.split(',').map(|number| number.parse().ok()).collect()
}
