//! `omerta image` on stores of its own.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::run::{OMERTA, Ran};

struct Stage(tempfile::TempDir);

impl Stage {
    /// An image's files, a key, and the trust in it.
    fn new() -> Self {
        let stage = Self(tempfile::tempdir().unwrap());
        fs::create_dir(stage.path("small")).unwrap();
        fs::create_dir(stage.path("keys")).unwrap();
        fs::write(stage.path("small/vmlinuz"), b"kernel").unwrap();
        fs::write(stage.path("small/initrd.img"), b"initrd").unwrap();
        stage.image(&["keygen", "KEY"]).done();
        fs::copy(stage.path("key.pub"), stage.path("keys/key.pub")).unwrap();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arguments(&self, words: &[&str]) -> Vec<String> {
        let path = |name| self.path(name).display().to_string();
        let mut line = vec!["image".to_owned()];
        line.extend(words.iter().map(|word| match *word {
            "KEY" => path("key"),
            "DIR" => path("small"),
            word => word.to_owned(),
        }));
        if words.first() != Some(&"keygen") {
            line.extend(["--store".to_owned(), path("store")]);
            line.extend(["--trusted-keys".to_owned(), path("keys")]);
        }
        line
    }

    fn image(&self, words: &[&str]) -> Ran {
        let line = self.arguments(words);
        Command::new(OMERTA).args(line).output().unwrap().into()
    }

    fn listed(&self) -> Vec<Value> {
        let listed = self.image(&["list", "-o", "json"]);
        serde_json::from_str(&listed.done().stdout).unwrap()
    }
}

#[test]
fn a_revoked_image_is_listed_as_such_and_neither_verified_nor_imported_again() {
    let stage = Stage::new();
    let import = ["import", "DIR", "--name", "small", "--sign-with", "KEY"];
    stage.image(&import).done();
    let told = stage
        .image(&["revoke", "small", "--why", "it leaks"])
        .done();
    assert!(told.stdout.contains("revoked small"), "{}", told.stdout);
    assert!(
        stage
            .image(&["revoke", "small"])
            .done()
            .stdout
            .contains("already")
    );
    let verified = stage.image(&["verify"]);
    assert_eq!(verified.code, 4, "{verified:?}");
    assert!(verified.stderr.contains("it leaks"), "{verified:?}");
    let [image] = &stage.listed()[..] else {
        panic!("one image");
    };
    assert!(image.to_string().contains("it leaks"), "{image}");
    stage.image(&["remove", "small"]).done();
    stage.image(&import).failed(4, &["it leaks"]);
    stage.image(&["revoke", "absent"]).failed(3, &["absent"]);

    // A part alone revokes every image that has it.
    let stage = Stage::new();
    stage.image(&import).done();
    let kernel = omerta_images::Digest::of(b"kernel").to_string();
    stage.image(&["revoke", &kernel]).done();
    let verified = stage.image(&["verify"]);
    assert_eq!(verified.code, 4, "{verified:?}");
    assert!(verified.stderr.contains(&kernel), "{verified:?}");
}

#[test]
fn an_image_is_imported_with_ones_own_key_and_removed() {
    let stage = Stage::new();
    let import = ["import", "DIR", "--name", "small", "--sign-with", "KEY"];
    let told = stage.image(&import).done().stdout;
    assert_eq!(told, "imported small, signed by key.pub\n");
    assert!(
        stage
            .image(&import)
            .done()
            .stdout
            .contains("was there already")
    );
    let [image] = &stage.listed()[..] else {
        panic!("one image");
    };
    assert_eq!(image["name"], "small");
    assert_eq!(
        (&image["kind"], &image["bytes"]),
        (&"initramfs".into(), &12.into())
    );
    assert_eq!(image["signer"], "key.pub");
    stage.image(&["verify"]).done();
    stage.image(&["remove", "small"]).done();
    let freed: Value =
        serde_json::from_str(&stage.image(&["gc", "-o", "json"]).done().stdout).unwrap();
    assert_eq!((&freed["blobs"], &freed["bytes"]), (&2.into(), &12.into()));
    assert!(stage.listed().is_empty());
}

#[test]
fn each_failure_has_its_exit_code_and_tells_the_remedy_in_one_line() {
    let stage = Stage::new();
    let refused = |words: &[&str], code: i32, tells: &str| {
        stage.image(words).failed(code, &[tells]);
    };
    refused(&["import", "DIR", "--name", "small"], 4, "--sign-with");
    refused(&["import", "DIR", "--unsigned"], 2, "--name");
    refused(
        &["import", "DIR", "--name", "../x", "--unsigned"],
        2,
        "image name",
    );
    refused(
        &["import", "/nonexistent", "--name", "x", "--unsigned"],
        3,
        "does not exist",
    );
    refused(
        &[
            "import",
            "DIR",
            "--name",
            "x",
            "--sign-with",
            "/nonexistent",
        ],
        3,
        "keygen",
    );
    refused(&["remove", "small"], 3, "image list");
    refused(&["keygen", "KEY"], 4, "exists");
    stage
        .image(&["import", "DIR", "--name", "small", "--unsigned"])
        .done();
    refused(
        &["import", "DIR", "--name", "small", "--sign-with", "KEY"],
        4,
        "image remove small",
    );
    let unsigned = stage.image(&["verify"]);
    assert_eq!(unsigned.code, 4, "{unsigned:?}");

    fs::write(stage.path("small/manifest.json"), b"{\"omerta_image\": 1}").unwrap();
    refused(&["import", "DIR"], 2, "missing field");
    fs::remove_file(stage.path("small/manifest.json")).unwrap();
    let disk = stage.path("small/disk.qcow2");
    Command::new("truncate")
        .arg("-s1M")
        .arg(&disk)
        .status()
        .unwrap();
    refused(
        &["import", "DIR", "--name", "d", "--sign-with", "KEY"],
        4,
        "qemu-img convert",
    );
    fs::remove_file(stage.path("keys/key.pub")).unwrap();
    fs::remove_file(disk).unwrap();
    refused(
        &["import", "DIR", "--name", "d", "--sign-with", "KEY"],
        4,
        "no trusted key",
    );
}

#[test]
fn an_import_that_is_killed_leaves_the_whole_image_or_nothing_that_counts() {
    let stage = Stage::new();
    fs::write(stage.path("small/initrd.img"), vec![7; 24 << 20]).unwrap();
    let line = stage.arguments(&["import", "DIR", "--name", "small", "--sign-with", "KEY"]);
    let mut whole = 0;
    for step in 0..12 {
        let mut import = Command::new(OMERTA)
            .args(&line)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(25 * step));
        import.kill().unwrap();
        import.wait().unwrap();
        stage.image(&["verify"]).done();
        let listed = stage.listed();
        if !listed.is_empty() {
            whole += 1;
            stage.image(&["remove", "small"]).done();
        }
        stage.image(&["gc"]).done();
        for directory in ["store/incoming", "store/blobs/sha256"] {
            let left = fs::read_dir(stage.path(directory)).into_iter().flatten();
            assert_eq!(left.count(), 0, "{directory} after {step}");
        }
    }
    println!("measured: {whole} of 12 were whole");
    // One that nobody kills is.
    stage
        .image(&["import", "DIR", "--name", "small", "--sign-with", "KEY"])
        .done();
    stage.image(&["verify", "small"]).done();
}
