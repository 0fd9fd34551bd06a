//! The committed inputs, past findings among them, and the frames of the corpus: every target
//! takes them, without a fuzzer.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::fs;
use std::path::Path;

use omerta_fuzz::{TARGETS, target};

fn replay(directory: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    for entry in fs::read_dir(&root).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let run =
            target(&name).unwrap_or_else(|| panic!("{directory}/{name} belongs to no target"));
        let mut count = 0;
        for input in fs::read_dir(entry.path()).unwrap() {
            let path = input.unwrap().path();
            println!("{}", path.display());
            run(&fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{directory}/{name} is empty");
    }
}

#[test]
fn seeds_are_survived() {
    replay("seeds");
    for (name, _) in TARGETS {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(name);
        assert!(seeds.is_dir(), "{name} has no seeds");
    }
}

#[test]
fn past_findings_stay_fixed() {
    replay("regressions");
}

#[test]
fn the_corpus_is_survived_by_every_target() {
    for case in omerta_corpus::cases().unwrap() {
        println!("{}", case.name);
        for (_, run) in TARGETS {
            run(&case.frame);
        }
    }
}
