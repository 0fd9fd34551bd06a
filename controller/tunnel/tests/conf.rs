//! `.conf` files: what is read, what is refused, and that no secret is told.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::process::Command;

use omerta_tunnel::{Conf, Ignored, PeerEndpoint, Problem};
use proptest::prelude::*;

const KEY_A: &str = "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=";
const KEY_B: &str = "QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=";
const KEY_C: &str = "Q0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0M=";

fn parse(text: &str) -> Conf {
    Conf::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn refused(text: &str) -> (usize, Problem) {
    let error = Conf::parse(text.as_bytes()).expect_err(text);
    (error.line, error.problem)
}

#[test]
fn a_clients_file_for_wg_quick_is_read_whole() {
    let conf = parse(&format!(
        "# my tunnel\n[Interface]\nPrivateKey = {KEY_A}\nAddress = 10.66.0.2/24, fd00::2/64\nDNS = 10.66.0.1\nMTU=1380\n\
         PostUp = iptables -A FORWARD -i %i -j ACCEPT; echo a=b\n\n[Peer] # home\nPublicKey = {KEY_B}\nPresharedKey = {KEY_C}\n\
         AllowedIPs = 10.66.0.0/24,\n AllowedIPs = ::/0 \nEndpoint = vpn.example.org:51820\nPersistentKeepalive = 25\n"
    ));
    assert_eq!(conf.interface.private_key, Some(KEY_A.parse().unwrap()));
    assert_eq!(
        conf.interface.addresses,
        [
            ("10.66.0.2".parse().unwrap(), 24),
            ("fd00::2".parse().unwrap(), 64)
        ]
    );
    assert_eq!(conf.interface.mtu, Some(1380));
    assert_eq!(
        conf.ignored,
        [
            Ignored {
                line: 5,
                key: "DNS"
            },
            Ignored {
                line: 7,
                key: "PostUp"
            }
        ]
    );
    let [peer] = &conf.peers[..] else {
        panic!("{:?}", conf.peers)
    };
    assert_eq!(peer.public_key, KEY_B.parse().unwrap());
    assert_eq!(peer.preshared_key, Some(KEY_C.parse().unwrap()));
    let host = "vpn.example.org".to_owned();
    assert_eq!(
        peer.endpoint,
        Some(PeerEndpoint::Name { host, port: 51820 })
    );
    assert_eq!(peer.keepalive.unwrap().get(), 25);
    let allowed: Vec<_> = peer.allowed_ips.iter().map(ToString::to_string).collect();
    assert_eq!(allowed, ["10.66.0.0/24", "::/0"]);
}

#[test]
fn keys_and_sections_are_read_in_any_case_and_crlf_is_no_matter() {
    let conf = parse(&format!(
        "[interface]\r\nLISTENPORT=1\r\n[PEER]\r\npublickey={KEY_A}\r\npersistentkeepalive=off\r\n"
    ));
    assert_eq!(conf.interface.listen_port.unwrap().get(), 1);
    assert_eq!(conf.peers[0].keepalive, None);
}

#[test]
fn what_is_wrong_is_refused_with_its_line() {
    let peer = format!("[Peer]\nPublicKey={KEY_A}\n");
    for (text, line) in [
        (String::new(), 1),
        ("[Interface]\nPrivateKeys = x\n".into(), 2),
        ("[Interface]\nPublicKey = x\n".into(), 2),
        ("[Interface]\nPrivateKey = x\n".into(), 2),
        ("[Interface]\nListenPort = 0\n".into(), 2),
        ("[Interface]\nMTU = 9\n".into(), 2),
        ("[Interface]\nAddress = 10.0.0.1/33\n".into(), 2),
        ("[Interface]\n[Interface]\n".into(), 2),
        ("[Wireguard]\n".into(), 1),
        ("PrivateKey = x\n".into(), 1),
        ("[Peer]\nAllowedIPs = 10.0.0.0/8\n".into(), 1),
        (format!("{peer}PublicKey={KEY_A}\n"), 3),
        (format!("{peer}Endpoint = 192.0.2.1\n"), 3),
        (format!("{peer}Endpoint = 127.1:1\n"), 3),
        (format!("{peer}PersistentKeepalive = 65536\n"), 3),
        (format!("{peer}AllowedIPs = nowhere\n"), 3),
        (format!("{peer}MTU = 1380\n"), 3),
        (format!("{peer}nonsense\n"), 3),
        (format!("{peer}{peer}"), 3),
        (
            format!(
                "{peer}AllowedIPs = 10.0.0.1/24\n[Peer]\nPublicKey={KEY_B}\nAllowedIPs=10.0.0.2/24\n"
            ),
            4,
        ),
    ] {
        assert_eq!(refused(&text).0, line, "{text:?}: {:?}", refused(&text));
    }
    assert_eq!(Conf::parse(b"[Interface]\n\xff\n").unwrap_err().line, 2);
    let long = vec![b'#'; Conf::MAX_BYTES + 1];
    assert_eq!(Conf::parse(&long).unwrap_err().problem, Problem::TooLong);
}

#[test]
fn neither_errors_nor_debug_text_tell_a_secret() {
    let cut = &KEY_A[..40];
    for text in [
        format!("[Interface]\nPrivateKey = {cut}\n"),
        format!("[Interface]\n{cut}\n"),
        format!("[Interface]\nPrivateKey = {KEY_A}\nPrivateKey = {KEY_A}\n"),
        format!("[Peer]\nPresharedKey = {cut}\n"),
    ] {
        let error = Conf::parse(text.as_bytes()).unwrap_err();
        assert!(
            !format!("{error} {error:?}").contains(&cut[..8]),
            "{error:?}"
        );
    }
    let conf = parse(&format!(
        "[Interface]\nPrivateKey={KEY_A}\n[Peer]\nPublicKey={KEY_B}\nPresharedKey={KEY_C}\n"
    ));
    let text = format!("{conf:?}");
    assert!(!text.contains(KEY_A) && !text.contains(KEY_C), "{text}");
}

/// `wg-quick` takes away what is its own; what it leaves is what is used.
#[test]
fn what_wg_quick_leaves_of_a_file_says_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("omtest0.conf");
    let text = format!(
        "[Interface]\nPrivateKey = {KEY_A}\nAddress = 10.66.0.2/24\nDNS = 10.66.0.1\nMTU = 1380\nListenPort = 7\nTable = off\n\
         PostUp = true\nSaveConfig = false\n[Peer]\nPublicKey = {KEY_B}\nPresharedKey = {KEY_C}\nAllowedIPs = 10.66.0.0/24, ::/0\n\
         Endpoint = [2001:db8::1]:51820\nPersistentKeepalive = 15\n"
    );
    std::fs::write(&file, &text).unwrap();
    let stripped = Command::new("wg-quick")
        .arg("strip")
        .arg(&file)
        .output()
        .expect("wireguard-tools");
    assert!(stripped.status.success(), "{stripped:?}");
    let (whole, stripped) = (parse(&text), Conf::parse(&stripped.stdout).unwrap());
    assert_eq!(stripped.peers, whole.peers);
    assert_eq!(stripped.interface.private_key, whole.interface.private_key);
    assert_eq!(stripped.interface.listen_port, whole.interface.listen_port);
    assert_eq!(stripped.ignored, []);
    assert_eq!(whole.ignored.len(), 4);
}

proptest! {
    /// What is read back of a file is what was put into it.
    #[test]
    fn what_was_written_is_read(
        keys in proptest::collection::btree_set(any::<[u8; 32]>(), 1..8),
        port in 1u16..,
        keepalive in any::<u16>(),
        address in any::<std::net::IpAddr>(),
    ) {
        use base64::Engine;
        let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        let mut text = format!("[Interface]\nListenPort = {port}\nAddress = {address}\n");
        let keys: Vec<_> = keys.iter().filter(|key| **key != [0; 32]).map(|key| encode(key)).collect();
        for key in &keys {
            text += &format!("[Peer]\nPublicKey = {key}\nEndpoint = 192.0.2.1:{port}\nPersistentKeepalive = {keepalive}\n");
        }
        let conf = parse(&text);
        prop_assert_eq!(conf.interface.listen_port.unwrap().get(), port);
        prop_assert_eq!(conf.interface.addresses[0].0, address);
        let read: Vec<_> = conf.peers.iter().map(|peer| peer.public_key.to_string()).collect();
        prop_assert_eq!(read, keys);
        for peer in conf.peers {
            prop_assert_eq!(peer.keepalive.map_or(0, std::num::NonZero::get), keepalive);
        }
    }
}
