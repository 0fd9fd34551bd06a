//! The library as a C program sees it: compiled against the header, linked with the archive.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The archive that cargo built together with this test: the newest, as older builds may stay.
fn archive() -> Option<PathBuf> {
    let test = env::current_exe().ok()?;
    fs::read_dir(test.parent()?)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension() == Some(OsStr::new("a")))
        .filter(|path| path.to_string_lossy().contains("libomerta_macos_shim"))
        .max_by_key(|path| {
            path.metadata()
                .and_then(|metadata| metadata.modified())
                .ok()
        })
}

#[test]
fn c_program_gets_the_verdicts() {
    let directory = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = directory.path().join("verdict");
    let compiled = Command::new("cc")
        .args([
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-I",
        ])
        .arg(source.join("../include"))
        .arg(source.join("tests/verdict.c"))
        .arg(archive().unwrap())
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(&program)
        .output()
        .unwrap();
    assert!(
        compiled.status.success(),
        "cc: {}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let run = Command::new(&program).output().unwrap();
    assert!(
        run.status.success(),
        "{}: {}",
        run.status,
        String::from_utf8_lossy(&run.stdout)
    );
}
