//! The record as its writer leaves it, and as somebody may have left it since.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::fs;
use std::path::{Path, PathBuf};

use omerta_incidents::{
    Book, BookError, Bounds, Deed, Digest, Entry, Frame, Incident, Outcome, Problem, What, Witness,
    read, verify,
};
use proptest::prelude::*;

const AT: &str = "2026-01-01T00:00:00.000000Z";
const ROOMY: Bounds = Bounds::of_bytes(1 << 20);

fn frame(number: u8) -> Frame {
    Frame {
        at_ns: u64::from(number),
        direction: "egress".into(),
        reason: "endpoint".into(),
        length: 98,
        bytes: format!("5254{number:02x}"),
        text: "udp 10.77.0.2:1 → 198.51.100.1:53".into(),
    }
}

fn incident(number: u8) -> What {
    What::Incident(Box::new(Incident {
        case: format!("7-{number}"),
        guest: "alpha".into(),
        interface: "omalpha".into(),
        consumer: "KEY@192.0.2.10:51820".into(),
        witnesses: vec![Witness::Kernel],
        attempt: "dns".into(),
        inferred_from: "udp to port 53".into(),
        action: "terminate".into(),
        epoch: Some(1),
        frame: Some(frame(number)),
        before: vec![frame(1), frame(2)],
    }))
}

fn outcome(number: u8) -> What {
    What::Outcome(Box::new(Outcome {
        case: format!("7-{number}"),
        guest: "alpha".into(),
        deed: Deed::Ended,
        frame_to_paused_us: Some(900),
        frame_to_ended_us: Some(9000),
        frame_to_tap_removed_us: None,
        message: None,
        since: Vec::new(),
    }))
}

fn open(directory: &Path, bounds: Bounds) -> Book {
    Book::open(directory, bounds, "omertad 0.1.0", AT).unwrap()
}

/// A record of `count` incidents.
fn recorded(directory: &Path, count: u8) {
    let mut book = open(directory, ROOMY);
    for number in 0..count {
        book.append(AT, incident(number)).unwrap();
    }
}

fn segments(directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "ndjson"))
        .collect();
    found.sort();
    found
}

fn entries(directory: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    read(directory, |entry| entries.push(entry.clone())).unwrap();
    entries
}

#[test]
fn what_is_written_is_read_again_and_goes_on_where_it_ended() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("incidents");
    let first = {
        let mut book = open(&directory, ROOMY);
        assert_eq!(book.append(AT, incident(1)).unwrap(), 1);
        book.append(AT, outcome(1)).unwrap();
        book.last()
    };
    let mut book = open(&directory, ROOMY);
    assert_eq!(book.last(), first);
    assert_eq!(book.append(AT, incident(2)).unwrap(), 3);
    let read = entries(&directory);
    let what: Vec<_> = read.into_iter().map(|entry| entry.what).collect();
    assert_eq!(what, [incident(1), outcome(1), incident(2)]);
    let found = verify(&directory).unwrap();
    assert_eq!((found.first, found.last, found.hash), (1, 3, book.last().1));
    assert_eq!((found.damage, found.lost), (Vec::new(), 0));
}

#[test]
fn an_empty_record_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path(), ROOMY));
    let found = verify(directory.path()).unwrap();
    assert_eq!((found.first, found.last, found.hash), (0, 0, Digest::NONE));
}

#[test]
fn one_process_writes() {
    let directory = tempfile::tempdir().unwrap();
    let book = open(directory.path(), ROOMY);
    let second = Book::open(directory.path(), ROOMY, "other", AT);
    assert!(matches!(second, Err(BookError::InUse(_))));
    drop(book);
    assert!(Book::open(directory.path(), ROOMY, "other", AT).is_ok());
}

#[test]
fn every_byte_that_changes_is_found() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path(), 3);
    let files = [
        segments(directory.path())[0].clone(),
        directory.path().join("head"),
    ];
    for path in files {
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            for flip in [1, 0x20, 0x80] {
                let mut changed = whole.clone();
                changed[at] ^= flip;
                fs::write(&path, &changed).unwrap();
                assert!(
                    verify(directory.path()).is_err(),
                    "{} byte {at}",
                    path.display()
                );
            }
        }
        fs::write(&path, &whole).unwrap();
    }
    verify(directory.path()).unwrap();
}

#[test]
fn every_cut_is_found() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path(), 3);
    let path = &segments(directory.path())[0];
    let whole = fs::read(path).unwrap();
    for length in 0..whole.len() {
        fs::write(path, &whole[..length]).unwrap();
        assert!(verify(directory.path()).is_err(), "cut at {length}");
    }
    fs::remove_file(path).unwrap();
    assert!(verify(directory.path()).is_err(), "removed");
}

#[test]
fn lines_that_go_or_change_places_are_found() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path(), 4);
    let path = &segments(directory.path())[0];
    let whole = fs::read_to_string(path).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    for gone in 0..lines.len() {
        let mut left = lines.clone();
        left.remove(gone);
        fs::write(path, left.concat()).unwrap();
        assert!(verify(directory.path()).is_err(), "without line {gone}");
        for other in 0..gone {
            let mut exchanged = lines.clone();
            exchanged.swap(gone, other);
            fs::write(path, exchanged.concat()).unwrap();
            assert!(verify(directory.path()).is_err(), "{gone} for {other}");
        }
        let mut twice = lines.clone();
        twice.insert(gone, lines[gone]);
        fs::write(path, twice.concat()).unwrap();
        assert!(verify(directory.path()).is_err(), "line {gone} twice");
    }
}

#[test]
fn the_record_is_bounded_and_the_chain_goes_on_over_what_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        segment_bytes: 4096,
        segments: 3,
    };
    let mut book = open(directory.path(), bounds);
    for number in 0..200 {
        book.append(AT, incident(number)).unwrap();
        let size: u64 = segments(directory.path())
            .iter()
            .map(|path| path.metadata().unwrap().len())
            .sum();
        assert!(size <= 4 * 4096, "{size}");
        verify(directory.path()).unwrap();
    }
    let found = verify(directory.path()).unwrap();
    assert!(found.first > 1 && found.last > 200, "{found:?}");
    assert_eq!(segments(directory.path()).len(), 4);
    // A writer that comes later finds the same.
    drop(book);
    assert_eq!(
        open(directory.path(), bounds).last(),
        (found.last, found.hash)
    );
    // Who removes a segment without a word is found out.
    fs::remove_file(&segments(directory.path())[0]).unwrap();
    let fault = verify(directory.path()).unwrap_err();
    assert!(
        matches!(fault.problem, Problem::Beginning { .. }),
        "{fault}"
    );
}

#[test]
fn a_line_that_its_writer_did_not_finish_is_taken_off() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path(), 2);
    let path = &segments(directory.path())[0];
    let mut torn = fs::read(path).unwrap();
    torn.extend(br#"{"number":3,"prev"#);
    fs::write(path, torn).unwrap();
    let fault = verify(directory.path()).unwrap_err();
    assert!(
        matches!(fault.problem, Problem::Torn { bytes: 17 }),
        "{fault}"
    );
    let mut book = open(directory.path(), ROOMY);
    assert_eq!(book.append(AT, incident(3)).unwrap(), 3);
    assert_eq!(verify(directory.path()).unwrap().damage, []);
}

#[test]
fn a_writer_that_died_before_it_noted_its_entry_loses_none() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path(), 2);
    let head = fs::read(directory.path().join("head")).unwrap();
    open(directory.path(), ROOMY)
        .append(AT, incident(3))
        .unwrap();
    fs::write(directory.path().join("head"), head).unwrap();
    assert_eq!(verify(directory.path()).unwrap().last, 3);
    assert_eq!(open(directory.path(), ROOMY).last().0, 3);
}

#[test]
fn a_broken_record_is_put_aside_whole_and_the_next_one_says_so() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path(), 3);
    let path = &segments(directory.path())[0];
    let altered = fs::read_to_string(path)
        .unwrap()
        .replacen("alpha", "omega", 1);
    fs::write(path, &altered).unwrap();
    let mut book = open(directory.path(), ROOMY);
    book.append(AT, incident(9)).unwrap();
    let found = verify(directory.path()).unwrap();
    assert_eq!(found.damage.len(), 1);
    assert!(found.damage[0].1.contains("does not follow"), "{found:?}");
    let aside = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.is_dir())
        .unwrap();
    let kept = fs::read_to_string(aside.join(path.file_name().unwrap())).unwrap();
    assert_eq!(kept, altered);
}

#[test]
fn an_entry_that_cannot_be_written_leaves_the_record_whole() {
    let directory = tempfile::tempdir().unwrap();
    let bounds = Bounds {
        segment_bytes: 1,
        segments: 100,
    };
    let mut book = open(directory.path(), bounds);
    book.append(AT, incident(1)).unwrap();
    // The next segment's place is taken.
    let place = directory.path().join(format!("{:020}.ndjson", 2));
    fs::create_dir(&place).unwrap();
    assert!(book.append(AT, incident(2)).is_err());
    fs::remove_dir(&place).unwrap();
    assert_eq!(book.append(AT, What::Lost { entries: 1 }).unwrap(), 2);
    let found = verify(directory.path()).unwrap();
    assert_eq!((found.last, found.lost), (2, 1));
}

proptest! {
    // Each line waits for the disk.
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_record_of_anything_is_whole_and_bounded(texts in prop::collection::vec(".{0,400}", 0..16), segment in 1..4000_u64) {
        let directory = tempfile::tempdir().unwrap();
        let bounds = Bounds { segment_bytes: segment, segments: 4 };
        let mut book = open(directory.path(), bounds);
        for text in &texts {
            book.append(AT, What::Damaged { problem: text.clone() }).unwrap();
        }
        let found = verify(directory.path()).unwrap();
        prop_assert_eq!((found.last, found.hash), book.last());
        prop_assert!(segments(directory.path()).len() <= 5);
    }

    #[test]
    fn whatever_stands_in_a_segment_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(format!("{:020}.ndjson", 1)), &bytes).unwrap();
        prop_assert_eq!(verify(directory.path()).is_ok(), bytes.is_empty());
    }
}

/// A file system in memory of 64 KiB, gone with it.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let disk = Self(tempfile::tempdir().unwrap());
        disk.mount("size=64k");
        disk
    }

    fn mount(&self, options: &str) {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "omerta-test"]);
        assert!(mount.arg(self.0.path()).status().unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let mut unmount = std::process::Command::new("umount");
        let _ = unmount.arg(self.0.path()).status();
    }
}

#[test]
fn a_disk_that_is_full_refuses_entries_breaks_none_and_takes_them_once_there_is_room() {
    let disk = SmallDisk::new();
    let directory = disk.0.path().join("incidents");
    let mut book = Book::open(&directory, ROOMY, "test", AT).unwrap();
    let refused = (0..1000).find_map(|_| book.append(AT, incident(1)).err());
    let refused = format!("{:?}", refused.expect("64 KiB are full"));
    assert!(refused.contains("StorageFull"), "{refused}");
    // What it has is whole, for a reader and for the next writer.
    let full = verify(&directory).unwrap().last;
    book.append(AT, incident(2)).unwrap_err();
    assert_eq!(verify(&directory).unwrap().last, full);
    drop(book);
    let mut book = Book::open(&directory, ROOMY, "test", AT).unwrap();
    disk.mount("remount,size=1m");
    book.append(AT, incident(3)).unwrap();
    assert_eq!(verify(&directory).unwrap().last, full + 1);
}
