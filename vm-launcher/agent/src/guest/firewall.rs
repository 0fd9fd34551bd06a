//! The rules of nftables, by the number of their last change, and of the older iptables, byte by byte.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use sha2::{Digest, Sha256};

use super::SealError;
use super::netlink::{Netlink, attribute};

/// NFNLGRP_NFTABLES (`linux/netfilter/nfnetlink.h`).
const GROUP: u32 = 7;
/// NFNL_SUBSYS_NFTABLES and NFT_MSG_GETGEN.
const GET_GENERATION: u16 = 10 << 8 | 16;
/// Family, version and resource of a message to netfilter.
const HEADER: usize = 4;
const GENERATION_ID: u16 = 1;

/// Asks, and is told of changes.
pub(crate) struct Firewall {
    questions: Netlink,
    /// What tells of changes.
    pub(crate) changes: Netlink,
}

/// What is known of the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    /// The number of nftables' last change, which the kernel counts up with each; `None` where there is no nftables.
    generation: Option<Vec<u8>>,
    /// SHA-256 of iptables' tables, without their counters.
    tables: [u8; 32],
}

impl Known {
    /// Whether `now` is the same but for one change of nftables' rules, whichever that was.
    pub(crate) fn is_one_change_before(&self, now: &Self) -> bool {
        let number = |known: &Self| {
            let bytes = known.generation.as_deref()?.first_chunk()?;
            Some(u32::from_be_bytes(*bytes))
        };
        // The kernel's number is never 0.
        let next = |number: u32| number.checked_add(1).unwrap_or(1);
        self.tables == now.tables
            && number(self)
                .map(next)
                .is_some_and(|next| Some(next) == number(now))
    }
}

impl Firewall {
    pub(crate) fn open() -> Result<Self, SealError> {
        Ok(Self {
            questions: Netlink::open(NETLINK_NETFILTER, &[])?,
            changes: Netlink::open(NETLINK_NETFILTER, &[GROUP])?,
        })
    }

    pub(crate) fn look(&mut self) -> Result<Known, SealError> {
        let answer = self.questions.get(GET_GENERATION, &[0; HEADER])?;
        let generation = match answer {
            Some(answer) => {
                let fields = answer.get(HEADER..).ok_or(SealError::Short)?;
                Some(attribute(fields, GENERATION_ID).ok_or(SealError::Short)?)
            }
            None => None,
        };
        Ok(Known {
            generation,
            tables: tables()?,
        })
    }
}

/// One of the two families that iptables has rules for.
struct Family {
    names: &'static str,
    domain: AddressFamily,
    level: libc::c_int,
    /// Where the number of bytes to the next rule stands in one, and where its counters do
    /// (`struct ipt_entry`, `struct ip6t_entry`).
    next: usize,
    counters: usize,
}

const FAMILIES: [Family; 2] = [
    Family {
        names: "/proc/net/ip_tables_names",
        domain: AddressFamily::Inet,
        level: libc::SOL_IP,
        next: 90,
        counters: 96,
    },
    Family {
        names: "/proc/net/ip6_tables_names",
        domain: AddressFamily::Inet6,
        level: libc::SOL_IPV6,
        next: 142,
        counters: 152,
    },
];
const COUNTERS: usize = 16;
/// IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES; IPv6 has the same numbers.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
const NAME: usize = 32;
/// `struct ipt_getinfo`, and where in it the length of the rules stands.
const INFO: usize = 84;
const INFO_SIZE: usize = 80;
/// `struct ipt_get_entries` up to the rules.
const ENTRIES: usize = 40;

fn tables() -> Result<[u8; 32], SealError> {
    let mut digest = Sha256::new();
    // Of ARP's only whether there are any.
    digest.update(fs::read("/proc/net/arp_tables_names").unwrap_or_default());
    for family in &FAMILIES {
        // No file: no such rules.
        let Ok(names) = fs::read_to_string(family.names) else {
            continue;
        };
        let mut names: Vec<&str> = names.lines().filter(|name| name.len() < NAME).collect();
        names.sort_unstable();
        for name in names {
            digest.update(name.as_bytes());
            digest.update([0]);
            digest.update(rules(family, name)?);
        }
        digest.update([1]);
    }
    Ok(digest.finalize().into())
}

/// The rules of one table, with their counters at 0.
fn rules(family: &Family, table: &str) -> Result<Vec<u8>, SealError> {
    let socket = socket(
        family.domain,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        nix::sys::socket::SockProtocol::Raw,
    )
    .map_err(SealError::Tables)?;
    let mut info = vec![0; INFO];
    info[..table.len()].copy_from_slice(table.as_bytes());
    ask(&socket, family.level, GET_INFO, &mut info)?;
    let size = info
        .get(INFO_SIZE..)
        .and_then(|size| size.first_chunk())
        .map_or(0, |size| u32::from_ne_bytes(*size));
    let mut entries = vec![0; ENTRIES + size as usize];
    entries[..table.len()].copy_from_slice(table.as_bytes());
    entries[NAME..NAME + 4].copy_from_slice(&size.to_ne_bytes());
    ask(&socket, family.level, GET_ENTRIES, &mut entries)?;
    let mut rules = entries.split_off(ENTRIES);
    let mut at = 0;
    while let Some(rule) = rules.get_mut(at..).filter(|rule| !rule.is_empty()) {
        let (Some(next), Some(_)) = (
            rule.get(family.next..).and_then(|next| next.first_chunk()),
            rule.get(family.counters + COUNTERS..),
        ) else {
            return Err(SealError::Short);
        };
        let next = u16::from_ne_bytes(*next) as usize;
        rule[family.counters..family.counters + COUNTERS].fill(0);
        if next == 0 {
            return Err(SealError::Short);
        }
        at += next;
    }
    Ok(rules)
}

fn ask(
    socket: &OwnedFd,
    level: libc::c_int,
    name: libc::c_int,
    bytes: &mut [u8],
) -> Result<(), SealError> {
    let mut length = bytes.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes, which is what the buffer has.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            bytes.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    nix::errno::Errno::result(done).map_err(SealError::Tables)?;
    Ok(())
}
