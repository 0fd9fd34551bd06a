//! omertad with images of its store.

use std::fs;

use minisign::KeyPair;
use omerta_images::{DiskFormat, RootDevice, Seed, Source, Sources, Store, Trust, TrustedKeys};
use omerta_test_support::{IDLE, write_bare_guest};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::guests::request;

/// An omertad whose store has `disked`, a guest of a few instructions with a disk, signed by a key that it
/// trusts, and `unsigned`, the same without a signature.
fn start() -> (Daemon, Store) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name| directory.path().join(name);
    write_bare_guest(&path("bare"), IDLE).unwrap();
    fs::write(path("disk"), vec![7; 1 << 20]).unwrap();
    let pair = KeyPair::generate_unencrypted_keypair().unwrap();
    fs::create_dir(path("keys")).unwrap();
    let public = pair.pk.to_box().unwrap().into_string();
    fs::write(path("keys/key.pub"), public).unwrap();
    let config = format!("[images]\ntrusted_keys = \"{}\"\n", path("keys").display());
    fs::write(path("omertad.toml"), config).unwrap();

    let mut sources = Sources::within(&path("bare"));
    sources.disk = Some(Source {
        path: path("disk"),
        format: DiskFormat::Raw,
        root: RootDevice::DISK,
    });
    let store = Store::at(path("state/images"));
    for (name, is_signed) in [("disked", true), ("unsigned", false)] {
        let manifest = sources.measure(name.parse().unwrap(), Seed::Facts, &mut |_| ());
        let manifest = manifest.unwrap().to_bytes().unwrap();
        let signature = minisign::sign(None, &pair.sk, &manifest[..], None, None).unwrap();
        let signature = is_signed.then(|| signature.into_string());
        let trust = Trust {
            keys: TrustedKeys::read(&path("keys")).unwrap(),
            require_signature: is_signed,
        };
        store
            .import(
                &manifest,
                signature.as_deref(),
                &sources,
                &trust,
                &mut |_| (),
            )
            .unwrap();
    }
    let config = path("omertad.toml").display().to_string();
    let arguments = ["--metrics", "off", "--config", &config];
    (Daemon::start_with(directory, &arguments), store)
}

#[test]
fn a_signed_image_with_a_disk_runs_is_held_while_it_does_and_its_disk_is_scrubbed() {
    let (daemon, store) = start();
    run_with_disk(&daemon);
    let name = "disked".parse().unwrap();
    assert!(store.remove(&name).is_err(), "a guest runs it");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    store.remove(&name).unwrap();
    let bytes = scrubbed_bytes(&daemon);
    assert!(bytes >= 32 << 20, "{bytes}");
    let left = fs::read_dir(daemon.path().join("state/disks")).unwrap();
    assert_eq!(left.count(), 0);
}

fn run_with_disk(daemon: &Daemon) {
    let mut body: Value = serde_json::from_str(&request("alpha", "disked")).unwrap();
    body["disk_mib"] = json!(32);
    let answer = daemon.post("/v1/guests", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
}

fn scrubbed_bytes(daemon: &Daemon) -> u64 {
    let events = daemon.get("/v1/events?guest=alpha").body;
    let scrubbed = events
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|event| event["kind"] == "scrubbed");
    let scrubbed = scrubbed.unwrap_or_else(|| panic!("{events}"));
    scrubbed["bytes"].as_u64().unwrap()
}

fn start_again(daemon: Daemon) -> Daemon {
    let (namespace, directory) = daemon.die();
    let config = directory.path().join("omertad.toml").display().to_string();
    let arguments = ["--metrics", "off", "--config", &config];
    Daemon::start_in(namespace, directory, &arguments)
}

#[test]
fn a_guest_with_a_disk_is_taken_over_with_it_and_its_disk_is_scrubbed_at_its_end() {
    let (daemon, _) = start();
    run_with_disk(&daemon);
    let before = daemon.get("/v1/guests/alpha").json();
    let daemon = start_again(daemon);
    let after = daemon.get("/v1/guests/alpha").json();
    assert_eq!(after["state"], "running", "{after}: {}", daemon.log());
    assert_eq!(
        (&after["id"], &after["pid"]),
        (&before["id"], &before["pid"])
    );
    // Its QEMU has the layer open, and nobody else once this one has let go of it.
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    let bytes = scrubbed_bytes(&daemon);
    assert!(bytes >= 32 << 20, "{bytes}");
}

#[test]
fn the_disk_of_a_guest_that_cannot_be_taken_over_is_scrubbed_and_that_is_recorded() {
    let (daemon, _) = start();
    run_with_disk(&daemon);
    let (namespace, directory) = daemon.die();
    let store = rusqlite::Connection::open(directory.path().join("state/guests.db")).unwrap();
    let taken = store.execute("UPDATE guests SET guard_egress = guard_egress + 1", []);
    assert_eq!(taken.unwrap(), 1);
    drop(store);
    let config = directory.path().join("omertad.toml").display().to_string();
    let arguments = ["--metrics", "off", "--config", &config];
    let daemon = Daemon::start_in(namespace, directory, &arguments);
    let ended = daemon.get("/v1/guests/alpha").json()["ended"].clone();
    assert_eq!(ended["cause"], "abandoned", "{ended}");
    let bytes = scrubbed_bytes(&daemon);
    assert!(bytes >= 32 << 20, "{bytes}");
}

#[test]
fn an_image_that_is_revoked_is_refused_at_the_next_start_with_why_and_guests_that_run_it_go_on() {
    let (daemon, store) = start();
    run_with_disk(&daemon);
    let digest = store.digest(&"disked".parse().unwrap()).unwrap();
    let keys = daemon.path().join("keys");
    omerta_images::Revoked::add(&keys, digest, "its kernel lets guests out").unwrap();
    let refused = daemon.post("/v1/guests", &request("beta", "disked"));
    let message = refused.refusal(409, "refused");
    assert!(message.contains("its kernel lets guests out"), "{message}");
    let daemon = start_again(daemon);
    let alpha = daemon.get("/v1/guests/alpha").json();
    assert_eq!(alpha["state"], "running", "{alpha}");
    // A list that cannot be understood revokes nothing in particular, so nothing is run.
    fs::write(keys.join("revoked"), "disked\n").unwrap();
    let message = daemon
        .post("/v1/guests", &request("beta", "disked"))
        .refusal(409, "refused");
    assert!(message.contains("line 1"), "{message}");
}

#[test]
fn images_and_disks_that_may_not_be_are_refused_with_their_cause() {
    let (daemon, _store) = start();
    let unsigned = daemon.post("/v1/guests", &request("alpha", "unsigned"));
    let message = unsigned.refusal(409, "refused");
    assert!(message.contains("not signed"), "{message}");
    let mut body: Value = serde_json::from_str(&request("alpha", "disked")).unwrap();
    body["disk_mib"] = json!(1 << 20);
    let message = daemon
        .post("/v1/guests", &body.to_string())
        .refusal(409, "refused");
    assert!(message.contains("no room"), "{message}");
    body["disk_mib"] = json!(0);
    let message = daemon
        .post("/v1/guests", &body.to_string())
        .refusal(400, "usage");
    assert!(message.contains("disk_mib"), "{message}");
}
