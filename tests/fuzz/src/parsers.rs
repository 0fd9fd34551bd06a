//! Records, words, files, and structs of C.

use std::collections::BTreeSet;
use std::path::Path;

use omerta_api::RunRequest;
use omerta_macos_shim::{
    CAddress, CEndpoint, CPolicy, omerta_decide, omerta_guard_free, omerta_guard_new,
    omerta_outcome_word,
};
use omerta_tunnel::Conf;
use omerta_verdict::{ANSWER_CAPACITY, Endpoint, EventRecord, Mac, Mode, Reason};
use serde_json::Map;

use crate::{allowlist, spec};

/// What the kernel's ring buffer may hold.
pub fn event_record(bytes: &[u8]) {
    let Some((record, direction, reason)) = EventRecord::parse(bytes) else {
        return;
    };
    assert_eq!(bytes.len(), EventRecord::SIZE);
    assert_eq!((bytes[16], bytes[17]), (direction as u8, reason as u8));
    assert_eq!(record.head().len(), usize::from(record.captured));
    assert!(record.head().len() as u32 <= record.length);
    assert_eq!(record.head(), &bytes[24..24 + record.head().len()]);
}

/// Text of the command line, files and the API: endpoints, MACs, modes, reasons.
pub fn words(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    if let Ok(endpoint) = text.parse::<Endpoint>() {
        assert!(endpoint.address.is_possible_peer());
        assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
    }
    if let Ok(mac) = text.parse::<Mac>() {
        assert_eq!(mac.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(mode) = text.parse::<Mode>() {
        assert_eq!(mode.word(), text);
    }
    if let Some(reason) = Reason::from_word(text) {
        assert_eq!(reason.word(), text);
    }
}

/// An allowlist's file.
pub fn allowlist_file(bytes: &[u8]) {
    match allowlist::parse(Path::new("list"), bytes) {
        Ok(endpoints) => {
            let lines: String = endpoints.iter().map(|one| format!("{one}\n")).collect();
            let again = allowlist::parse(Path::new("again"), lines.as_bytes()).unwrap();
            assert_eq!(again, endpoints);
            assert!(endpoints.len() <= bytes.split(|b| *b == b'\n').count());
        }
        Err(error) => assert!(error.to_string().len() < 1000),
    }
}

/// A file that says what guest to run, and the body of a request, which is the same in JSON.
pub fn guest_spec(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let parse = |text: &str| spec::parse(Path::new("spec"), text, Map::new());
    match parse(text) {
        Ok(request) => {
            // What the store keeps of it means the same to the next omertad.
            let json = serde_json::to_string(&request).unwrap();
            assert_eq!(parse(&json).unwrap(), request);
            assert_eq!(serde_json::from_str::<RunRequest>(&json).unwrap(), request);
        }
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
}

/// A `.conf` file of WireGuard.
pub fn wireguard_conf(bytes: &[u8]) {
    let lines = bytes.split(|byte| *byte == b'\n').count();
    match Conf::parse(bytes) {
        Ok(conf) => {
            let mut keys = BTreeSet::new();
            let mut networks = BTreeSet::new();
            for peer in &conf.peers {
                assert!(keys.insert(peer.public_key), "a key twice");
                assert!(
                    peer.allowed_ips
                        .iter()
                        .all(|network| networks.insert(*network))
                );
                if let Some(endpoint) = &peer.endpoint {
                    assert_ne!(endpoint.port(), 0);
                    assert_eq!(endpoint.to_string().parse().as_ref(), Ok(endpoint));
                }
            }
            let told = format!("{conf:?}");
            let secrets = conf
                .peers
                .iter()
                .filter_map(|peer| peer.preshared_key.as_ref());
            for secret in secrets.chain(&conf.interface.private_key) {
                // One that is also a public key stands there as that.
                let is_public = conf
                    .peers
                    .iter()
                    .any(|peer| peer.public_key.as_bytes() == secret.expose());
                assert!(
                    is_public || !told.contains(&*secret.base64()),
                    "a secret is told"
                );
            }
        }
        Err(error) => {
            assert!((1..=lines).contains(&error.line));
            assert!(error.to_string().len() < 1000);
        }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    let length = bytes.len().min(N);
    let (head, tail) = bytes.split_at(length);
    taken[..length].copy_from_slice(head);
    *bytes = tail;
    taken
}

fn address(bytes: &mut &[u8]) -> CAddress {
    let [kind] = take(bytes);
    let family = match kind % 8 {
        0 => kind,
        1..=4 => 4,
        _ => 6,
    };
    CAddress {
        family,
        octets: take(bytes),
    }
}

/// A policy and frames by way of the C ABI.
pub fn c_abi(bytes: &[u8]) {
    let mut rest = bytes;
    let [owned, routers, rules, direction] = take(&mut rest);
    let (mac, gateway_mac) = (take(&mut rest), take(&mut rest));
    let addresses: Vec<_> = (0..owned % 10).map(|_| address(&mut rest)).collect();
    let gateways: Vec<_> = (0..routers % 4).map(|_| address(&mut rest)).collect();
    let allow: Vec<_> = (0..rules % 32)
        .map(|_| CEndpoint {
            address: address(&mut rest),
            protocol: [1, 6, 17, 0][usize::from(take::<1>(&mut rest)[0] % 4)],
            port: u16::from_ne_bytes(take(&mut rest)),
        })
        .collect();
    let policy = CPolicy {
        mac,
        gateway_mac,
        addresses: addresses.as_ptr(),
        address_count: addresses.len(),
        gateways: gateways.as_ptr(),
        gateway_count: gateways.len(),
        allow: allow.as_ptr(),
        allow_count: allow.len(),
    };
    let (mut answer, mut length) = ([0; ANSWER_CAPACITY], usize::MAX);
    // SAFETY: the policy's arrays are live and as long as it says, the frame and both results are
    // live for the call, and the guard is freed once and not used again.
    let outcome = unsafe {
        let guard = omerta_guard_new(&raw const policy);
        let outcome = omerta_decide(
            guard,
            i32::from(direction % 3),
            rest.as_ptr(),
            rest.len(),
            &raw mut answer,
            &raw mut length,
        );
        omerta_guard_free(guard);
        outcome
    };
    if outcome >= 0 {
        assert!(!omerta_outcome_word(outcome).is_null());
        assert_eq!(
            length != 0,
            outcome == 1,
            "an answer has a length, nothing else has"
        );
        if outcome == 0 && direction % 3 == 0 {
            assert_eq!(
                rest.get(6..12),
                Some(&mac[..]),
                "an allowed frame's source is the guest"
            );
        }
    }
}
