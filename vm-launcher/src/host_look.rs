//! What the host itself has towards guests' addresses, and what their taps have counted: one look for all guests.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
use netlink_packet_route::route::{RouteAddress, RouteAttribute};
use omerta_verdict::Mac;
use rtnetlink::{Handle, RouteMessageBuilder};

/// Where the kernel lists its sockets, and what they are.
const SOCKETS: [(&str, &str); 6] = [
    ("tcp", "tcp"),
    ("tcp6", "tcp"),
    ("udp", "udp"),
    ("udp6", "udp"),
    ("raw", "raw"),
    ("raw6", "raw"),
];

/// Whose address it is, and where it is to be reached.
#[derive(Clone, Copy, Debug)]
pub struct Whereabouts {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Its MAC.
    pub mac: Mac,
    /// Its tap's index.
    pub tap: u32,
}

/// The network namespace of this process, as it was at one moment.
#[derive(Clone, Debug, Default)]
pub struct HostLook {
    taps: HashMap<String, (u32, u64)>,
    /// Of single addresses, with the interface that they lead to.
    routes: Vec<(Ipv4Addr, Option<u32>)>,
    /// With the interface and the MAC.
    neighbours: Vec<(Ipv4Addr, u32, Option<Vec<u8>>)>,
    /// Whom sockets are connected to, and what they are.
    sockets: Vec<(Ipv4Addr, &'static str)>,
}

impl HostLook {
    /// Looks, by three dumps of rtnetlink and the kernel's lists of sockets.
    ///
    /// # Errors
    /// When the kernel does not answer, or not what it should.
    pub async fn take() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let looked = Self::ask(&handle).await;
        connection.abort();
        let mut look = looked.map_err(io::Error::other)?;
        for (list, kind) in SOCKETS {
            let path = format!("/proc/thread-self/net/{list}");
            match fs::read_to_string(path) {
                Ok(text) => look.sockets.extend(
                    text.lines()
                        .skip(1)
                        .filter_map(connected_to)
                        .map(|to| (to, kind)),
                ),
                // A kernel without IPv6 has no such list.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(look)
    }

    async fn ask(handle: &Handle) -> Result<Self, rtnetlink::Error> {
        let mut look = Self::default();
        // First of all: what taps count later, guards have not judged when they are read next.
        let mut links = handle.link().get().execute();
        while let Some(link) = links.try_next().await? {
            let (mut name, mut received) = (None, None);
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(found) => name = Some(found),
                    LinkAttribute::Stats64(stats) => received = Some(stats.rx_packets),
                    _ => {}
                }
            }
            if let (Some(name), Some(received)) = (name, received) {
                look.taps.insert(name, (link.header.index, received));
            }
        }
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let mut routes = handle.route().get(all).execute();
        while let Some(route) = routes.try_next().await? {
            if route.header.destination_prefix_length != 32 {
                continue;
            }
            let (mut to, mut by) = (None, None);
            for attribute in route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(address),
                    RouteAttribute::Oif(index) => by = Some(index),
                    _ => {}
                }
            }
            look.routes.extend(to.map(|to| (to, by)));
        }
        let mut neighbours = handle.neighbours().get().execute();
        while let Some(neighbour) = neighbours.try_next().await? {
            let (mut address, mut mac) = (None, None);
            for attribute in neighbour.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                        address = Some(found);
                    }
                    NeighbourAttribute::LinkLayerAddress(found) => mac = Some(found),
                    _ => {}
                }
            }
            let index = neighbour.header.ifindex;
            look.neighbours
                .extend(address.map(|address| (address, index, mac)));
        }
        Ok(look)
    }

    /// The index of the tap `name`, and how many frames it has received.
    pub fn tap(&self, name: &str) -> Option<(u32, u64)> {
        self.taps.get(name).copied()
    }

    /// What there is towards a guest but its own route and neighbour entry, one line each.
    pub fn strange(&self, guest: Whereabouts) -> Vec<String> {
        let Whereabouts { address, mac, tap } = guest;
        let routes = self
            .routes
            .iter()
            .filter(|(to, by)| *to == address && *by != Some(tap))
            .map(|(_, by)| match by {
                Some(index) => format!("a route to {address} by interface {index}"),
                None => format!("a route to {address} by no interface"),
            });
        let neighbours = self
            .neighbours
            .iter()
            .filter(|(of, index, found)| {
                let is_its_own = *index == tap && found.as_deref() == Some(&mac.0[..]);
                *of == address && found.is_some() && !is_its_own
            })
            .map(|(_, index, _)| format!("a neighbour entry of {address} on interface {index}"));
        let sockets = self
            .sockets
            .iter()
            .filter(|(to, _)| *to == address)
            .map(|(_, kind)| format!("a {kind} socket to {address}"));
        let mut found: Vec<_> = routes.chain(neighbours).chain(sockets).collect();
        found.sort();
        found.dedup();
        found
    }
}

/// Whom a socket is connected to, by a line of the kernel's list (proc(5)): words in hexadecimal, each in the
/// byte order of the machine.
fn connected_to(line: &str) -> Option<Ipv4Addr> {
    let (address, _) = line.split_whitespace().nth(2)?.split_once(':')?;
    let word = |from: usize| {
        let word = u32::from_str_radix(address.get(from..from + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match address.len() {
        8 => Some(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (at, to) in bytes.chunks_mut(4).enumerate() {
                to.copy_from_slice(&word(at * 8)?);
            }
            match IpAddr::from(bytes).to_canonical() {
                IpAddr::V4(address) => Some(address),
                IpAddr::V6(_) => None,
            }
        }
        _ => None,
    }
    .filter(|address| !address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: Whereabouts = Whereabouts {
        address: Ipv4Addr::new(10, 77, 0, 2),
        mac: Mac([0x52, 0x54, 0, 1, 2, 3]),
        tap: 7,
    };

    fn its_own() -> HostLook {
        HostLook {
            routes: vec![
                (GUEST.address, Some(7)),
                (Ipv4Addr::new(10, 77, 0, 3), Some(8)),
            ],
            neighbours: vec![(GUEST.address, 7, Some(GUEST.mac.0.to_vec()))],
            sockets: vec![(Ipv4Addr::new(192, 0, 2, 1), "tcp")],
            ..HostLook::default()
        }
    }

    #[test]
    fn a_guests_own_route_and_entry_and_what_is_for_others_are_not_strange() {
        assert_eq!(its_own().strange(GUEST), [""; 0]);
    }

    #[test]
    fn a_route_an_entry_and_a_socket_that_are_not_its_own_are() {
        let mut look = its_own();
        look.routes.push((GUEST.address, Some(2)));
        look.routes.push((GUEST.address, None));
        look.neighbours.push((GUEST.address, 2, Some(vec![1; 6])));
        // One that was asked for in vain leads nowhere.
        look.neighbours.push((GUEST.address, 3, None));
        look.sockets.push((GUEST.address, "udp"));
        look.sockets.push((GUEST.address, "udp"));
        let found = look.strange(GUEST);
        assert_eq!(found.len(), 4, "{found:?}");
        let mut look = its_own();
        look.neighbours[0].2 = Some(vec![9; 6]);
        assert_eq!(
            look.strange(GUEST),
            ["a neighbour entry of 10.77.0.2 on interface 7"]
        );
    }

    #[test]
    fn the_kernels_lists_of_sockets_are_read_and_what_is_no_line_of_them_is_not() {
        let local = u32::from_ne_bytes([127, 0, 0, 1]);
        for (line, to) in [
            (
                format!("   0: {local:08X}:1F90 {local:08X}:0016 01 00"),
                Some(Ipv4Addr::LOCALHOST),
            ),
            (
                format!(
                    "   0: {0:032X}:1F90 {0:08X}{0:08X}{1:08X}{local:08X}:0016 01",
                    0,
                    u32::from_ne_bytes([0, 0, 0xff, 0xff])
                ),
                Some(Ipv4Addr::LOCALHOST),
            ),
            ("   0: 0100007F:1F90 00000000:0000 0A".to_owned(), None),
            ("   0: 0100007F:1F90 zz:0000 0A".to_owned(), None),
            ("garbage".to_owned(), None),
            (String::new(), None),
        ] {
            assert_eq!(connected_to(&line), to, "{line}");
        }
    }
}
