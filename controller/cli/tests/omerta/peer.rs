//! `omerta peer`: consumers that move, and their .conf files.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use crate::omertad::{Omertad, guest};
use crate::run::{command, fed, omerta};

const KEY: &str = "QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=";
const PRIVATE: &str = "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=";

#[test]
fn a_move_is_put_to_the_guest_and_a_bad_endpoint_never_leaves() {
    let omertad = Omertad::always(200, guest("alpha", "running"));
    let ran = omertad
        .omerta("peer set alpha --endpoint 198.51.100.7:4500")
        .done();
    assert!(ran.stdout.starts_with("alpha "), "{}", ran.stdout);
    let asked = omertad.asked();
    assert_eq!(
        (asked[0].method.as_str(), asked[0].path.as_str()),
        ("PUT", "/v1/guests/alpha/peer")
    );
    omertad
        .omerta("peer set alpha --endpoint vpn.example.org:1")
        .done();
    let body: Value = serde_json::from_str(&omertad.asked()[1].body).unwrap();
    assert_eq!(body, json!({"endpoint": "vpn.example.org:1"}));
    omerta("peer set alpha --endpoint vpn.example.org").failed(2, &["vpn.example.org"]);
}

#[test]
fn consumers_are_listed_with_what_has_passed() {
    let peer = |guest: &str, bytes: Value| {
        json!({"guest": guest, "state": "running", "public_key": KEY, "endpoint": "192.0.2.10:51820",
            "former_endpoints": [], "guest_public_key": null, "handshake": true, "sent_bytes": bytes, "received_bytes": bytes})
    };
    let mut told = peer("gamma", json!(null));
    told["tunnel"] = json!({"witness": "guest", "seen_seconds": 3, "handshake_seconds": 70, "endpoint": "192.0.2.10:51820",
        "keepalive_seconds": 25, "sent_bytes": 5000, "received_bytes": 6000});
    let peers = json!({"peers": [peer("alpha", json!(1250)), peer("beta", json!(null)), told]});
    let omertad = Omertad::always(200, peers);
    let text = omertad.omerta("peer list").done().stdout;
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[1][..4],
        ["alpha", "running", "192.0.2.10:51820", "yes"]
    );
    assert_eq!(lines[1][4..8], ["1.2", "kB", "1.2", "kB"]);
    assert_eq!(lines[2][4..6], ["-", "-"]);
    // Of whom nothing is known nothing is said, and of the others whose word it is.
    assert_eq!(lines[1][8..], ["-", "-", "-", KEY]);
    assert_eq!(
        lines[3][3..],
        ["70", "s", "ago", "-", "-", "-", "25", "s", "guest", KEY]
    );
    let shown = omertad.omerta("peer list -o json").done().stdout;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown[0]["sent_bytes"], 1250);
    assert_eq!(shown[0]["tunnel"], json!(null));
    assert_eq!(shown[2]["tunnel"]["received_bytes"], 6000);
}

#[test]
fn a_conf_becomes_a_spec_without_its_private_key_and_its_commands() {
    let conf = format!(
        "[Interface]\nPrivateKey = {PRIVATE}\nAddress = 10.9.0.7/24\nPostUp = touch /tmp/omerta-was-here\n[Peer]\nPublicKey = {KEY}\nEndpoint = 192.0.2.10:51820\n"
    );
    let ran = fed(command("peer import -"), conf.as_bytes());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(
        ran.stdout,
        format!(
            "consumer = \"{KEY}@192.0.2.10:51820\"\ntunnel_address = \"10.9.0.7/24\"\ntunnel_peer = \"10.9.0.1\"\n"
        )
    );
    assert!(ran.stderr.contains("line 4: PostUp is not used"), "{ran:?}");
    assert!(!format!("{ran:?}").contains(PRIVATE), "{ran:?}");
    assert!(
        ran.stderr
            .contains("PersistentKeepalive, which is off, is not used"),
        "{ran:?}"
    );
    let typo = conf.replace("PostUp", "PostUpp");
    fed(command("peer import -"), typo.as_bytes()).failed(2, &["line 4", "`PostUpp`"]);
    omerta("peer import /nonexistent.conf").failed(3, &["/nonexistent.conf"]);
}

#[test]
fn a_preshared_key_goes_into_a_file_that_nobody_else_reads_and_nowhere_else() {
    const PRESHARED: &str = "Q0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0NDQ0M=";
    let conf = format!(
        "[Interface]\nAddress = 10.9.0.7/24, fd00::7/64\nMTU = 1380\nListenPort = 7\n[Peer]\nPublicKey = {KEY}\nPresharedKey = {PRESHARED}\nEndpoint = 192.0.2.10:51820\nPersistentKeepalive = 15\n"
    );
    let printed = fed(command("peer import -"), conf.as_bytes()).failed(2, &["--write"]);
    assert!(!format!("{printed:?}").contains(PRESHARED), "{printed:?}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("consumer.toml");
    let import = format!("peer import - --write {}", file.display());
    let ran = fed(command(&import), conf.as_bytes());
    assert_eq!((ran.code, ran.stdout.as_str()), (0, ""), "{ran:?}");
    assert!(!ran.stderr.contains(PRESHARED), "{ran:?}");
    for not_used in [
        "MTU is not used",
        "ListenPort is not used",
        "Address fd00::7/64 is not used",
    ] {
        assert!(ran.stderr.contains(not_used), "{not_used}: {ran:?}");
    }
    assert_eq!(
        std::fs::metadata(&file).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains(PRESHARED) && text.contains("keepalive_seconds = 15"));
    // In nobody's place.
    fed(command(&import), conf.as_bytes()).failed(1, &["consumer.toml"]);
    // It is what a guest is run by, while nobody else may read it.
    let omertad = Omertad::always(201, guest("alpha", "running"));
    let run = format!("vm run --name alpha --image i --spec {}", file.display());
    omertad.omerta(&run).done();
    let body: Value = serde_json::from_str(&omertad.asked()[0].body).unwrap();
    assert_eq!(body["preshared_key"], PRESHARED);
    assert_eq!(body["keepalive_seconds"], 15);
    std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    let refused = omertad.omerta(&run).failed(2, &["chmod 600"]);
    assert!(!refused.stderr.contains(PRESHARED), "{refused:?}");
    // A file that is no TOML is not quoted.
    let broken = text.replace(&format!("\"{PRESHARED}\""), &format!("\"{PRESHARED}"));
    std::fs::write(&file, broken).unwrap();
    let refused = omertad.omerta(&run).failed(2, &["not TOML: line"]);
    assert!(!refused.stderr.contains(PRESHARED), "{refused:?}");
}
