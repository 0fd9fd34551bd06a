//! The allowlist's table against a set.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use omerta_verdict::{
    Bucket, Endpoint, MemoryGuard, Mode, Policy, Protocol, Table, Verdict, egress,
};

use crate::verdict::STAGE;

/// The first byte is the number of buckets, the next eight the seed; then eight bytes for each
/// operation: insert or look up, protocol, address, port.
pub fn model(bytes: &[u8]) {
    let Some((head, operations)) = bytes.split_first_chunk::<9>() else {
        return;
    };
    let count = 1_usize << (head[0] % 6);
    let seed = u64::from_le_bytes(*head.last_chunk().unwrap());
    let mut buckets = vec![Bucket::EMPTY; count];
    let mut table = Table::new(&mut buckets, seed).unwrap();
    let mut model = BTreeSet::new();
    let mut asked = Vec::new();
    for operation in operations.as_chunks::<8>().0 {
        let endpoint = endpoint(operation);
        if operation[0] & 1 == 0 {
            if table.insert(&endpoint) {
                model.insert(endpoint);
            } else {
                assert!(
                    !model.contains(&endpoint),
                    "an endpoint that is there is not inserted"
                );
            }
        }
        asked.push(endpoint);
    }
    assert_eq!(Table::endpoints(&buckets).collect::<BTreeSet<_>>(), model);
    let policy = Policy {
        table_seed: seed,
        table_mask: count as u32 - 1,
        mode: Mode::Filtered as u32,
        ..STAGE.policy
    };
    let guard = MemoryGuard::new(&policy, &buckets);
    for endpoint in asked {
        let allowed = egress(&frame(&endpoint)[..], &guard) == Verdict::Allow;
        assert_eq!(allowed, model.contains(&endpoint), "{endpoint}");
    }
}

fn endpoint(o: &[u8; 8]) -> Endpoint {
    let protocol = [Protocol::Icmp, Protocol::Tcp, Protocol::Udp][usize::from(o[1] % 3)];
    // Few addresses of few bytes, so that operations meet.
    let address = Ipv4Addr::new(192 + (o[2] & 1), o[3], 0, o[4]);
    let port = if protocol == Protocol::Icmp {
        0
    } else {
        u16::from_be_bytes([o[5] & 3, o[6]])
    };
    Endpoint {
        protocol,
        address: IpAddr::from(address).into(),
        port,
    }
}

/// A frame of the guest to `endpoint`.
fn frame(endpoint: &Endpoint) -> Vec<u8> {
    let IpAddr::V4(peer) = IpAddr::from(endpoint.address) else {
        panic!("only IPv4 is made here");
    };
    let [high, low] = endpoint.port.to_be_bytes();
    let segment: Vec<u8> = match endpoint.protocol {
        Protocol::Udp => vec![1, 0, high, low, 0, 8, 0, 0],
        Protocol::Tcp => [
            &[1, 0, high, low][..],
            &[0; 8],
            &[0x50, 2, 0, 0, 0, 0, 0, 0],
        ]
        .concat(),
        Protocol::Icmp => vec![8, 0, 0, 0, 0, 0, 0, 0],
    };
    let owner = &STAGE.owner;
    let mut frame = [&owner.gateway_mac.0[..], &owner.mac.0, &[8, 0, 0x45, 0, 0]].concat();
    frame.push(20 + segment.len() as u8);
    frame.extend([
        0,
        0,
        0x40,
        0,
        64,
        endpoint.protocol as u8,
        0,
        0,
        10,
        77,
        0,
        2,
    ]);
    frame.extend(peer.octets());
    frame.extend(segment);
    frame
}
