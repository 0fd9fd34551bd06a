//! `omerta incident` on records made here, as omertad makes them.

use std::fs;
use std::path::Path;

use omerta_incidents::{Book, Bounds, Deed, Frame, Incident, Outcome, What, Witness};
use pcap_file::pcapng::{Block, PcapNgReader};
use serde_json::Value;

use crate::run::{Ran, command};

const AT: &str = "2026-01-01T00:00:00.000000Z";

fn frame(number: u8) -> Frame {
    Frame {
        at_ns: 1_700_000_000_000_000_000 + u64::from(number),
        direction: "egress".into(),
        reason: "endpoint".into(),
        length: 98,
        bytes: format!("5254000000fe5254000000{number:02x}0800"),
        text: "udp 10.77.0.2:1 → 198.51.100.1:53".into(),
    }
}

/// A record of two incidents, of which the second was acted on.
fn record(directory: &Path) -> Book {
    let mut book = Book::open(directory, Bounds::of_bytes(1 << 20), "omertad 0.1.0", AT).unwrap();
    for (case, guest, action) in [("7-1", "alpha", "alert"), ("8-1", "beta", "terminate")] {
        let incident = Incident {
            case: case.into(),
            guest: guest.into(),
            interface: format!("om{guest}"),
            consumer: "KEY@192.0.2.10:51820".into(),
            witnesses: vec![Witness::Kernel],
            attempt: "dns".into(),
            inferred_from: "port 53 of 198.51.100.1".into(),
            action: action.into(),
            epoch: Some(1),
            frame: Some(frame(2)),
            before: vec![frame(1)],
        };
        book.append(AT, What::Incident(Box::new(incident))).unwrap();
    }
    let outcome = Outcome {
        case: "8-1".into(),
        guest: "beta".into(),
        deed: Deed::Ended,
        frame_to_paused_us: Some(1_500),
        frame_to_ended_us: Some(13_000),
        frame_to_tap_removed_us: Some(58_000),
        message: None,
        since: vec![frame(3)],
    };
    book.append(AT, What::Outcome(Box::new(outcome))).unwrap();
    book
}

fn incident(verb: &str, directory: &Path) -> Ran {
    let mut command = command(&format!("incident {verb} --record"));
    command.arg(directory).output().unwrap().into()
}

#[test]
fn incidents_are_listed_and_shown_with_what_was_done() {
    let directory = tempfile::tempdir().unwrap();
    // The writer is still there, as omertad is.
    let _book = record(directory.path());
    let listed = incident("list", directory.path()).done().stdout;
    assert_eq!(listed.lines().count(), 3, "{listed}");
    let beta = listed.lines().find(|line| line.starts_with("8-1")).unwrap();
    assert!(beta.contains("dns") && beta.contains("ended"), "{beta}");
    let only = incident("list --guest alpha -o json", directory.path()).done();
    let only: Value = serde_json::from_str(&only.stdout).unwrap();
    assert_eq!(only.as_array().unwrap().len(), 1);
    assert_eq!(only[0]["case"], "7-1");
    let shown = incident("show 8-1", directory.path()).done().stdout;
    for word in [
        "kernel (proof)",
        "1.5 ms",
        "13.0 ms",
        "port 53",
        "before",
        "since",
    ] {
        assert!(shown.contains(word), "{word} is missing in {shown}");
    }
    incident("show 9-1", directory.path()).failed(3, &["9-1", "omerta incident list"]);
    incident("list", &directory.path().join("nowhere")).failed(3, &["nowhere", "--record"]);
}

#[test]
fn a_record_is_proven_whole_up_to_a_hash_that_was_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = record(directory.path());
    let (number, hash) = book.last();
    let said = incident("verify", directory.path()).done().stdout;
    assert!(said.contains(&format!("{number}:{hash}")), "{said}");
    book.append(AT, What::Lost { entries: 2 }).unwrap();
    let anchor = format!("verify -o json --anchor {number}:{hash}");
    let found = incident(&anchor, directory.path()).done();
    let found: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!((&found["last"], &found["lost"]), (&4.into(), &2.into()));
    // The same record, made anew by somebody else.
    drop(book);
    let other = tempfile::tempdir().unwrap();
    let mut book = Book::open(other.path(), Bounds::of_bytes(1 << 20), "x", AT).unwrap();
    for _ in 0..5 {
        book.append(AT, What::Lost { entries: 1 }).unwrap();
    }
    incident(&anchor, other.path()).failed(1, &["entry 3", "exchanged"]);
    incident("verify --anchor 3", other.path()).failed(2, &["NUMBER:HASH"]);
}

#[test]
fn a_record_that_was_altered_is_neither_proven_nor_shown() {
    let directory = tempfile::tempdir().unwrap();
    drop(record(directory.path()));
    let path = directory.path().join(format!("{:020}.ndjson", 1));
    let altered = fs::read_to_string(&path)
        .unwrap()
        .replacen("alpha", "omega", 1);
    fs::write(&path, altered).unwrap();
    for verb in ["verify", "list", "show 7-1"] {
        incident(verb, directory.path()).failed(1, &["broken", "entry 2 does not follow"]);
    }
    // omertad puts it aside, and who verifies the next one is told.
    drop(record(directory.path()));
    let ran = incident("verify", directory.path());
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("put it aside"), "{ran:?}");
}

#[test]
fn the_frames_of_an_incident_are_exported_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let _book = record(directory.path());
    let path = directory.path().join("frames.pcapng");
    let verb = format!("export 8-1 -w {}", path.display());
    incident(&verb, directory.path()).done();
    let mut reader = PcapNgReader::new(fs::File::open(&path).unwrap()).unwrap();
    let mut numbers = Vec::new();
    while let Some(block) = reader.next_block() {
        if let Block::EnhancedPacket(packet) = block.unwrap() {
            assert_eq!(packet.original_len, 98);
            numbers.push(packet.data[11]);
        }
    }
    assert_eq!(numbers, [1, 2, 3]);
    let output = std::process::Command::new("tcpdump")
        .args(["-nn", "-r"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout.split(|byte| *byte == b'\n').count(), 4);
}
