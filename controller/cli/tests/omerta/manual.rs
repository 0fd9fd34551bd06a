//! Completions, manual pages, and the end of a pipe.

use std::fs;
use std::process::Stdio;

use crate::run::{command, omerta};

#[test]
fn every_shell_gets_a_completion_script() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let ran = omerta(&format!("completions {shell}")).done();
        assert!(ran.stdout.contains("omerta"), "{shell}");
        assert!(ran.stdout.contains("gateway-mac"), "{shell}");
    }
    omerta("completions sh").failed(2, &["sh", "bash"]);
}

#[test]
fn every_command_gets_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("made/man1");
    omerta(&format!("man --dir {}", pages.display())).done();
    for (page, words) in [
        ("omerta.1", "OMERTA_SOCKET"),
        ("omerta-guard-attach.1", "gateway"),
        ("omerta-guard-limit.1", "egress"),
        ("omerta-guard-lease.1", "renew"),
        ("omerta-vm-run.1", "consumer"),
        ("omerta-vm-console.1", "detaches"),
        ("omerta-events.1", "follow"),
    ] {
        let text = fs::read_to_string(pages.join(page)).unwrap();
        assert!(text.contains(words), "{page}");
    }
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    omerta(&format!("man --dir {}", file.display()))
        .failed(1, &["cannot write the manual", "file"]);
}

#[test]
fn a_reader_that_has_seen_enough_ends_the_command_quietly() {
    for arguments in [
        "guard reasons",
        "guard reasons -o json",
        "completions bash",
        "version",
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = command(arguments)
            .stdout(Stdio::from(writer))
            .output()
            .unwrap();
        assert_eq!(ran.status.code(), Some(0), "{arguments}: {ran:?}");
        assert_eq!(ran.stderr, b"", "{arguments}");
    }
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let ran = command("guard reasons").stdout(full).output().unwrap();
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
    assert!(
        ran.stderr
            .starts_with(b"omerta: cannot write to standard output"),
        "{ran:?}"
    );
}

#[test]
fn reasons_are_one_vocabulary_in_every_form() {
    let text = omerta("guard reasons").done().stdout;
    let json = omerta("guard reasons -o json").done().stdout;
    let markdown = omerta("guard reasons -o markdown").done().stdout;
    let json: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(text.lines().count(), json.len() + 1);
    assert_eq!(markdown.lines().count(), json.len() + 2);
    for reason in omerta_verdict::Reason::ALL {
        let word = reason.word();
        assert!(json.iter().any(|entry| entry["reason"] == word), "{word}");
        assert!(markdown.contains(&format!("| `{word}` | ")), "{word}");
        assert!(text.contains(word), "{word}");
    }
}
