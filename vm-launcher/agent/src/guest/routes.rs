//! What decides where the guest's packets go: interfaces, addresses, routes, rules, forwarding.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;

use netlink_sys::protocols::NETLINK_ROUTE;

use super::SealError;
use super::netlink::{Netlink, attributes};

/// Groups that tell of a change: links, and addresses, routes and rules of IPv4 and IPv6
/// (`linux/rtnetlink.h`).
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
const GET_LINK: u16 = 18;
const GET_ADDRESS: u16 = 22;
const GET_ROUTE: u16 = 26;
const GET_RULE: u16 = 34;
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;
/// Of a link: what it is, and what it hangs on (address, name, MTU, what it is a part of). All else counts or changes by itself.
const LINK_ATTRIBUTES: [u16; 4] = [1, 3, 4, 10];
const UP: u32 = 1;
/// Times of an address, of a route, and when a route expires.
const ADDRESS_TIMES: u16 = 6;
const ROUTE_TIMES: [u16; 2] = [12, 23];
const DESTINATION: u16 = 1;
const CLONED: u32 = 0x200;
const FORWARDING: [&str; 2] = [
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv6/conf/all/forwarding",
];

/// What is known of the way of packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    facts: BTreeSet<Vec<u8>>,
}

impl Known {
    /// Whether `now` is the same but for one route more, to that address alone, if any.
    pub(crate) fn is_but_for_a_route_to(&self, address: Ipv4Addr, now: &Self) -> bool {
        let mut more = now.facts.difference(&self.facts);
        let added = more.next();
        self.facts.is_subset(&now.facts)
            && more.next().is_none()
            && added.is_none_or(|fact| leads_to(fact, address))
    }
}

fn leads_to(fact: &[u8], address: Ipv4Addr) -> bool {
    let Some((kind, route)) = fact.split_first_chunk() else {
        return false;
    };
    let Some((head, rest)) = route.split_at_checked(ROUTE_HEADER) else {
        return false;
    };
    // Family, the prefix's length, and in a fact attributes are kind, length and value without padding.
    u16::from_be_bytes(*kind) == GET_ROUTE
        && head.first() == Some(&(libc::AF_INET as u8))
        && head.get(1) == Some(&32)
        && destination(rest) == Some(&address.octets())
}

fn destination(mut rest: &[u8]) -> Option<&[u8]> {
    loop {
        let (kind, after) = rest.split_first_chunk()?;
        let (length, after) = after.split_first_chunk()?;
        let (value, after) = after.split_at_checked(u16::from_be_bytes(*length).into())?;
        if u16::from_be_bytes(*kind) == DESTINATION {
            return Some(value);
        }
        rest = after;
    }
}

/// Asks, and is told of changes.
pub(crate) struct Routes {
    questions: Netlink,
    /// What tells of changes.
    pub(crate) changes: Netlink,
}

impl Routes {
    pub(crate) fn open() -> Result<Self, SealError> {
        Ok(Self {
            questions: Netlink::open(NETLINK_ROUTE, &[])?,
            changes: Netlink::open(NETLINK_ROUTE, &GROUPS)?,
        })
    }

    /// All that this is about.
    pub(crate) fn look(&mut self) -> Result<Known, SealError> {
        // The kernel's order is not said to mean anything.
        let mut facts = BTreeSet::new();
        for (kind, header, keep) in [
            (
                GET_LINK,
                LINK_HEADER,
                link as fn(&[u8], &[u8]) -> Option<Vec<u8>>,
            ),
            (GET_ADDRESS, ADDRESS_HEADER, address),
            (GET_ROUTE, ROUTE_HEADER, route),
            (GET_RULE, ROUTE_HEADER, rule),
        ] {
            let answers = self
                .questions
                .dump(kind, &vec![0; header])?
                .unwrap_or_default();
            for answer in answers {
                let Some((head, attributes)) = answer.split_at_checked(header) else {
                    return Err(SealError::Short);
                };
                if let Some(fact) = keep(head, attributes) {
                    facts.insert([&kind.to_be_bytes()[..], &fact].concat());
                }
            }
        }
        for file in FORWARDING {
            // Without IPv6 there is no such file.
            facts.insert([file.as_bytes(), &fs::read(file).unwrap_or_default()].concat());
        }
        Ok(Known { facts })
    }
}

/// Family, type, index and whether it is up.
fn link(head: &[u8], rest: &[u8]) -> Option<Vec<u8>> {
    let flags = u32::from_ne_bytes(*head.get(8..)?.first_chunk()?);
    let mut fact = head.get(..8)?.to_vec();
    fact.extend((flags & UP).to_be_bytes());
    Some(with_attributes(fact, rest, |kind| {
        LINK_ATTRIBUTES.contains(&kind)
    }))
}

fn address(head: &[u8], rest: &[u8]) -> Option<Vec<u8>> {
    Some(with_attributes(head.to_vec(), rest, |kind| {
        kind != ADDRESS_TIMES
    }))
}

/// `None` for what is remembered of the path to one host.
fn route(head: &[u8], rest: &[u8]) -> Option<Vec<u8>> {
    let flags = u32::from_ne_bytes(*head.get(8..)?.first_chunk()?);
    if flags & CLONED != 0 {
        return None;
    }
    Some(with_attributes(head.to_vec(), rest, |kind| {
        !ROUTE_TIMES.contains(&kind)
    }))
}

fn rule(head: &[u8], rest: &[u8]) -> Option<Vec<u8>> {
    Some(with_attributes(head.to_vec(), rest, |_| true))
}

fn with_attributes(mut fact: Vec<u8>, rest: &[u8], keep: impl Fn(u16) -> bool) -> Vec<u8> {
    for attribute in attributes(rest) {
        if keep(attribute.kind()) {
            fact.extend(attribute.kind().to_be_bytes());
            fact.extend((attribute.value().len() as u16).to_be_bytes());
            fact.extend(attribute.value());
        }
    }
    fact
}
