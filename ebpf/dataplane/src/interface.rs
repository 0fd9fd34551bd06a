//! Interfaces of the calling thread's network namespace.

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{if_indextoname, if_nametoindex};
use omerta_verdict::Mac;

use crate::GuardError;

/// The index of `interface`.
pub fn index(interface: &str) -> Result<u32, GuardError> {
    if_nametoindex(interface).map_err(|errno| match errno {
        // What could not be asked (no descriptor was left, say) tells nothing of the interface.
        Errno::ENODEV | Errno::ENXIO | Errno::EINVAL => GuardError::NoInterface {
            interface: interface.to_owned(),
        },
        errno => GuardError::System {
            action: "look for the interface",
            interface: interface.to_owned(),
            source: errno.into(),
        },
    })
}

/// The MAC of `interface`, which must be an Ethernet one: other kinds may have addresses of six bytes
/// too, and put other headers before their packets.
pub fn mac(interface: &str) -> Result<Mac, GuardError> {
    // Not /sys/class/net: its mount may belong to another network namespace.
    let addresses = getifaddrs().map_err(|errno| GuardError::System {
        action: "list the interfaces",
        interface: interface.to_owned(),
        source: errno.into(),
    })?;
    addresses
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| {
            let link = *entry.address?.as_link_addr()?;
            (link.hatype() == libc::ARPHRD_ETHER)
                .then(|| link.addr().map(Mac))
                .flatten()
        })
        .filter(|mac| mac.is_unicast())
        .ok_or_else(|| GuardError::Config {
            problem: format!(
                "{interface} has no Ethernet address: only Ethernet interfaces can be guarded"
            ),
        })
}

/// The name of the interface that has `index`, or `None` where this network namespace has none.
pub fn name(index: u32) -> Option<String> {
    // nix 0.32 takes the null of a failed call for success, and leaves the name empty.
    let name = if_indextoname(index).ok()?;
    (!name.is_empty()).then(|| name.to_string_lossy().into_owned())
}
