//! The verdict, against the oracle.

use std::net::IpAddr;
use std::sync::LazyLock;

use omerta_corpus::Cast;
use omerta_verdict::{
    ANSWER_CAPACITY, Bucket, Direction, MemoryGuard, Mode, Policy, Table, Verdict, egress, ingress,
    is_answer_for_guest,
};

use crate::oracle::Owner;

/// The guest of the corpus, and its guard.
pub struct Stage {
    pub owner: Owner,
    pub policy: Policy,
    pub buckets: Vec<Bucket>,
}

pub static STAGE: LazyLock<Stage> = LazyLock::new(|| {
    let cast = Cast::load().unwrap();
    let owner = Owner {
        mac: cast.mac("guest").unwrap(),
        gateway_mac: cast.mac("gateway").unwrap(),
        addresses: ["guest", "guest-too", "guest6"]
            .map(|n| cast.address(n).unwrap())
            .into(),
        gateways: ["gateway", "gateway6"]
            .map(|n| cast.address(n).unwrap())
            .into(),
        allow: [
            "udp:192.0.2.10:51820",
            "udp:[2001:db8:0:2::10]:51820",
            "tcp:192.0.2.10:443",
            "icmp:192.0.2.10",
            "icmp:[2001:db8:0:2::10]",
        ]
        .map(|text| text.parse().unwrap())
        .into(),
    };
    let mut policy = Policy {
        table_seed: 0x5eed,
        table_mask: 15,
        sample_every: 16,
        mac: owner.mac,
        gateway_mac: owner.gateway_mac,
        ..Policy::EMPTY
    };
    for (place, address) in policy.addresses.iter_mut().zip(&owner.addresses) {
        *place = (*address).into();
    }
    for (place, gateway) in policy.gateways.iter_mut().zip(&owner.gateways) {
        *place = (*gateway).into();
    }
    let mut buckets = vec![Bucket::EMPTY; 16];
    let mut table = Table::new(&mut buckets, policy.table_seed).unwrap();
    assert!(owner.allow.iter().all(|endpoint| table.insert(endpoint)));
    Stage {
        owner,
        policy,
        buckets,
    }
});

/// The verdict on a frame in one mode.
pub fn judge(frame: &[u8], direction: Direction, mode: Mode) -> Verdict {
    let policy = Policy {
        mode: mode as u32,
        ..STAGE.policy
    };
    let guard = MemoryGuard {
        // Sampled mode spares the frame the allowlist.
        random: 1,
        ..MemoryGuard::new(&policy, &STAGE.buckets)
    };
    match direction {
        Direction::Egress => egress(frame, &guard),
        Direction::Ingress => ingress(frame, &guard),
    }
}

fn check(frame: &[u8], direction: Direction) {
    let owner = &STAGE.owner;
    for mode in Mode::ALL {
        let listed = matches!(mode, Mode::Filtered | Mode::Conntrack);
        match judge(frame, direction, mode) {
            Verdict::Allow => assert!(owner.may_pass(frame, direction, listed), "{mode}"),
            Verdict::Answer(answer) => {
                let mut bytes = [0; ANSWER_CAPACITY];
                answer.compose(&mut bytes);
                assert!(answer.length() <= ANSWER_CAPACITY);
                let (from, claimed) = match direction {
                    Direction::Egress => (owner.gateway_mac, &owner.gateways),
                    Direction::Ingress => (owner.mac, &owner.addresses),
                };
                assert_eq!(bytes[6..12], from.0);
                assert_eq!(Some(&bytes[..6]), frame.get(6..12));
                assert!(claimed.contains(&claim(&bytes)), "{mode}");
            }
            Verdict::Drop(_) => {}
        }
    }
}

/// The address that an ARP reply or neighbour advertisement claims.
fn claim(answer: &[u8; ANSWER_CAPACITY]) -> IpAddr {
    if answer[12..14] == [0x08, 0x06] {
        <[u8; 4]>::try_from(&answer[28..32]).unwrap().into()
    } else {
        <[u8; 16]>::try_from(&answer[62..78]).unwrap().into()
    }
}

/// Frames of the guest.
pub fn egress_target(frame: &[u8]) {
    check(frame, Direction::Egress);
}

/// Frames to the guest.
pub fn ingress_target(frame: &[u8]) {
    check(frame, Direction::Ingress);
}

/// What passes unjudged as the guard's own answer for the guest.
pub fn answer_target(frame: &[u8]) {
    if is_answer_for_guest(frame, &MemoryGuard::new(&STAGE.policy, &STAGE.buckets)) {
        assert_eq!(frame[6..12], STAGE.owner.mac.0);
        let claimed: IpAddr = if frame[12..14] == [0x08, 0x06] {
            assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 2]);
            <[u8; 4]>::try_from(&frame[28..32]).unwrap().into()
        } else {
            assert_eq!(frame[54..56], [136, 0]);
            <[u8; 16]>::try_from(&frame[62..78]).unwrap().into()
        };
        assert!(STAGE.owner.addresses.contains(&claimed));
    }
}
