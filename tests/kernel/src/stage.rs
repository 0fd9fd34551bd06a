//! The one guest that the kernel tests judge.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

use omerta_dataplane::{Guard, GuardConfig, GuardError, Limits};
use omerta_verdict::{Endpoint, Mac, Mode};

/// The guest's MAC.
pub const GUEST_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0x01]);
/// The gateway's MAC.
pub const GATEWAY_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0xfe]);
/// A MAC that nobody in the test owns.
pub const STRANGER_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0x66]);
/// The guest's IPv4 address.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// The guest's second IPv4 address.
pub const GUEST_TOO: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 3);
/// The IPv4 gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The consumer's IPv4 address.
pub const CONSUMER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The consumer's WireGuard port.
pub const CONSUMER_PORT: u16 = 51820;
/// An IPv4 address that is on no allowlist.
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The guest's IPv6 address.
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 2);
/// The IPv6 gateway.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1);
/// The consumer's IPv6 address.
pub const CONSUMER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 2, 0, 0, 0, 0x10);

/// The consumer's endpoints: UDP on both families, one TCP port, echo.
pub fn allowlist() -> Vec<Endpoint> {
    [
        "udp:192.0.2.10:51820",
        "udp:[2001:db8:0:2::10]:51820",
        "tcp:192.0.2.10:443",
        "icmp:192.0.2.10",
        "icmp:[2001:db8:0:2::10]",
    ]
    .iter()
    .filter_map(|text| text.parse().ok())
    .collect()
}

/// Whether what was pinned at `path` goes: another test's command, which looks whether a namespace is gone, holds a
/// lock in its directory for a moment, and then removes the directory itself.
pub fn goes(path: impl AsRef<Path>) -> bool {
    let end = Instant::now() + Duration::from_secs(5);
    while path.as_ref().exists() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Removes what a killed test has left pinned for a network namespace whose number this thread's
/// has now.
///
/// # Errors
/// As [`Guard::remove_stale`].
pub fn remove_left_overs() -> Result<(), GuardError> {
    for left in Guard::pinned()? {
        Guard::remove_stale(&left.interface, None)?;
    }
    Ok(())
}

/// A guard for the guest, in `mode`.
pub fn config(mode: Mode) -> GuardConfig {
    GuardConfig {
        mac: GUEST_MAC,
        addresses: vec![IpAddr::V4(GUEST), IpAddr::V4(GUEST_TOO), IpAddr::V6(GUEST6)],
        gateways: vec![IpAddr::V4(GATEWAY), IpAddr::V6(GATEWAY6)],
        gateway_mac: Some(GATEWAY_MAC),
        mode,
        allow: allowlist(),
        egress: Limits::default(),
        ingress: Limits::default(),
        lease: None,
        owner: None,
    }
}
