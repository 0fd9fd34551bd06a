//! `tap`: a guest's frame from the tap through the host's stack to an uplink, and back from there in the
//! rows `to-guest`, in nanoseconds of the sending thread, in which the whole path runs.

use anyhow::Result;
use omerta_dataplane::UplinkHook;
use omerta_kernel_tests::{
    CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, STRANGER, ethernet, udp,
};

use crate::network::{Filter, Lane, OffloadHeader, PLAIN, Way};
use crate::report::Bench;
use crate::rounds::{Case, Rounds};
use crate::to_guest::{Dropper, Road};

/// Frames in one measurement.
const SMALL: u32 = 20_000;
const LARGE: u32 = 4_000;
const LARGE_BYTES: usize = 60_000;
/// TCP payload of each segment at an MTU of 1500.
const SEGMENT: u16 = 1448;

/// A datagram of the guest's, 64 bytes long.
pub fn small(to: std::net::Ipv4Addr) -> Vec<u8> {
    let packet = Ipv4::new(GUEST, to, 17).packet(&udp(40000, CONSUMER_PORT, &[0; 22]));
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet)
}

/// A TCP segment that the host or its card is to cut, and the header that says so.
fn large() -> (OffloadHeader, Vec<u8>) {
    const TRANSPORT: u16 = 34;
    let mut segment = vec![0; LARGE_BYTES];
    segment[..2].copy_from_slice(&40000_u16.to_be_bytes());
    segment[2..4].copy_from_slice(&443_u16.to_be_bytes());
    // Data offset 5, ACK.
    segment[12..14].copy_from_slice(&[0x50, 0x10]);
    let packet = Ipv4::new(GUEST, CONSUMER, 6).packet(&segment);
    let mut header = PLAIN;
    // VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_TCPV4, lengths, checksum's place.
    header[0] = 1;
    header[1] = 1;
    header[2..4].copy_from_slice(&(TRANSPORT + 20).to_ne_bytes());
    header[4..6].copy_from_slice(&SEGMENT.to_ne_bytes());
    header[6..8].copy_from_slice(&TRANSPORT.to_ne_bytes());
    header[8..10].copy_from_slice(&16_u16.to_ne_bytes());
    (header, ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet))
}

/// (row, against, filter)
type Plan = (&'static str, &'static str, Filter);

const ALLOWED: [Plan; 7] = [
    ("allow64-none", "allow64-none", Filter::None),
    ("allow64-guard", "allow64-none", Filter::Guard),
    ("allow64-redirect", "allow64-none", Filter::GuardRedirect),
    (
        "allow64-redirect-floor",
        "allow64-none",
        Filter::RedirectFloor,
    ),
    ("allow64-nft-forward", "allow64-none", Filter::NftForward),
    (
        "allow64-nft-forward-ct",
        "allow64-none",
        Filter::NftForwardConntrack,
    ),
    (
        "allow64-iptables-ipset",
        "allow64-none",
        Filter::IptablesIpset,
    ),
];
const LOCAL: [Plan; 4] = [
    ("local64-none", "local64-none", Filter::None),
    ("local64-guard", "local64-none", Filter::Guard),
    ("local64-redirect", "local64-none", Filter::GuardRedirect),
    (
        "local64-redirect-floor",
        "local64-none",
        Filter::RedirectFloor,
    ),
];
const DROPPED: [Plan; 5] = [
    ("drop64-xdp-floor", "drop64-xdp-floor", Filter::XdpFloor),
    ("drop64-tcx-floor", "drop64-xdp-floor", Filter::TcxFloor),
    ("drop64-guard", "drop64-xdp-floor", Filter::Guard),
    ("drop64-nft-netdev", "drop64-xdp-floor", Filter::NftNetdev),
    (
        "drop64-nft-forward-ct",
        "drop64-xdp-floor",
        Filter::NftForwardConntrack,
    ),
];
const TO_GUEST: [(&str, &str, Dropper); 5] = [
    (
        "to-guest-nft-forward",
        "to-guest-nft-forward",
        Dropper::NftForward,
    ),
    (
        "to-guest-nft-forward-ct",
        "to-guest-nft-forward",
        Dropper::NftForwardConntrack,
    ),
    ("to-guest-guard", "to-guest-nft-forward", Dropper::Guard),
    (
        "to-guest-uplink-tcx",
        "to-guest-nft-forward",
        Dropper::Uplink(UplinkHook::Tcx),
    ),
    (
        "to-guest-uplink-xdp",
        "to-guest-nft-forward",
        Dropper::Uplink(UplinkHook::Xdp),
    ),
];
const LARGE_ROWS: [Plan; 4] = [
    ("gso-none", "gso-none", Filter::None),
    ("gso-guard", "gso-none", Filter::Guard),
    ("gso-redirect", "gso-none", Filter::GuardRedirect),
    (
        "gso-nft-forward-ct",
        "gso-none",
        Filter::NftForwardConntrack,
    ),
];

const LOCAL_LARGE: [Plan; 3] = [
    ("gso-local-none", "gso-local-none", Filter::None),
    (
        "gso-local-redirect",
        "gso-local-none",
        Filter::GuardRedirect,
    ),
    (
        "gso-local-redirect-floor",
        "gso-local-none",
        Filter::RedirectFloor,
    ),
];

pub fn measure(rounds: Rounds) -> Result<Bench> {
    let mut missing = Vec::new();
    let mut lanes = |plans: &[Plan], way: Way| -> Vec<(Plan, Lane)> {
        plans
            .iter()
            .filter_map(|plan| match Lane::new(plan.2, way) {
                Ok(lane) => Some((*plan, lane)),
                Err(error) => {
                    missing.push(format!("{}: {error:#}", plan.0));
                    None
                }
            })
            .collect()
    };
    let mut allowed = lanes(&ALLOWED, Way::Uplink);
    allowed.extend(lanes(&LOCAL, Way::Local));
    let dropped = lanes(&DROPPED, Way::Uplink);
    let mut gso = lanes(&LARGE_ROWS, Way::Uplink);
    gso.extend(lanes(&LOCAL_LARGE, Way::Local));
    let mut roads = Vec::new();
    for plan in TO_GUEST {
        match Road::new(plan.2) {
            Ok(road) => roads.push((plan, road)),
            Err(error) => missing.push(format!("{}: {error:#}", plan.0)),
        }
    }
    let (to_consumer, to_stranger, (header, segments)) =
        (small(CONSUMER), small(STRANGER), large());
    let mut cases = Vec::new();
    for ((name, against, _), lane) in &allowed {
        cases.push(Case::new(name, against, || {
            lane.send(&PLAIN, &to_consumer, SMALL, true)
        }));
    }
    for ((name, against, _), lane) in &dropped {
        cases.push(Case::new(name, against, || {
            lane.send(&PLAIN, &to_stranger, SMALL, false)
        }));
    }
    for ((name, against, _), road) in &roads {
        cases.push(Case::new(name, against, || road.send(SMALL)));
    }
    for ((name, against, _), lane) in &gso {
        cases.push(Case::new(name, against, || {
            lane.send(&header, &segments, LARGE, true)
        }));
    }
    let samples = rounds.run(cases)?;
    Ok(Bench::of("tap", "ns", &rounds, &samples, missing))
}
