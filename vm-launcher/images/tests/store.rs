//! The store: what comes in, what is refused, and what stays when somebody is killed half-way.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use minisign::KeyPair;
use omerta_images::qcow2::Layer;
use omerta_images::{
    Collected, DiskFormat, ImportError, Imported, Manifest, RootDevice, Seed, Source, Sources,
    Store, StoreError, Trust, TrustError, TrustedKeys,
};

struct Stage {
    directory: tempfile::TempDir,
    store: Store,
    pair: KeyPair,
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let pair = KeyPair::generate_unencrypted_keypair().unwrap();
        fs::create_dir(directory.path().join("keys")).unwrap();
        let public = pair.pk.to_box().unwrap().into_string();
        fs::write(directory.path().join("keys/ours.pub"), public).unwrap();
        let store = Store::at(directory.path().join("store"));
        fs::write(directory.path().join("vmlinuz"), b"kernel").unwrap();
        fs::write(directory.path().join("initrd.img"), b"initrd").unwrap();
        Self {
            directory,
            store,
            pair,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn trust(&self) -> Trust {
        Trust {
            keys: TrustedKeys::read(&self.path("keys")).unwrap(),
            require_signature: true,
        }
    }

    fn sources(&self) -> Sources {
        Sources::within(self.directory.path())
    }

    fn manifest(&self, name: &str) -> Vec<u8> {
        let name = name.parse().unwrap();
        let measured = self.sources().measure(name, Seed::Facts, &mut |_| ());
        measured.unwrap().to_bytes().unwrap()
    }

    fn signature(&self, manifest: &[u8]) -> String {
        let signed = minisign::sign(None, &self.pair.sk, manifest, None, None);
        signed.unwrap().into_string()
    }

    fn import(&self, manifest: &[u8]) -> Result<Imported, ImportError> {
        let signature = self.signature(manifest);
        let (sources, trust) = (self.sources(), self.trust());
        self.store
            .import(manifest, Some(&signature), &sources, &trust, &mut |_| ())
    }

    fn files(&self) -> Vec<String> {
        fn walk(path: &Path, found: &mut Vec<String>) {
            for entry in fs::read_dir(path).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    walk(&entry.path(), found);
                } else {
                    found.push(entry.path().display().to_string());
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.path("store"), &mut found);
        found.sort();
        found
    }
}

#[test]
fn a_signed_image_is_imported_listed_verified_and_removed() {
    let stage = Stage::new();
    let manifest = stage.manifest("small");
    let imported = stage.import(&manifest).unwrap();
    assert_eq!(imported.signer.unwrap().0, "ours.pub");
    assert!(!imported.was_there);
    assert!(
        stage.import(&manifest).unwrap().was_there,
        "once more changes nothing"
    );

    let trust = stage.trust();
    let name = "small".parse().unwrap();
    let verified = stage.store.verify(&name, &trust, &mut |_| ()).unwrap();
    assert_eq!(verified.bytes, 12);
    let opened = stage.store.open(&name, &trust).unwrap();
    assert_eq!(
        fs::read(opened.path(opened.manifest.kernel)).unwrap(),
        b"kernel"
    );
    drop((opened, verified));
    let listed = stage.store.list(&trust).unwrap();
    assert_eq!(listed.len(), 1);
    assert!(listed[0].found.is_ok());
    drop(listed);

    assert_eq!(stage.store.collect().unwrap(), Collected::default());
    stage.store.remove(&name).unwrap();
    assert!(matches!(
        stage.store.open(&name, &trust),
        Err(StoreError::NotFound { .. })
    ));
    let collected = stage.store.collect().unwrap();
    assert_eq!((collected.blobs, collected.bytes), (2, 12));
    assert_eq!(stage.files(), [""; 0]);
}

#[test]
fn unsigned_and_otherwise_signed_images_are_refused_and_leave_nothing() {
    let stage = Stage::new();
    let manifest = stage.manifest("small");
    let (sources, trust) = (stage.sources(), stage.trust());
    let import = |signature: Option<&str>, manifest: &[u8]| {
        stage
            .store
            .import(manifest, signature, &sources, &trust, &mut |_| ())
    };
    let untrusted = |result: Result<Imported, ImportError>| {
        assert!(
            matches!(result, Err(ImportError::Store(StoreError::Trust(_)))),
            "{result:?}"
        );
    };
    untrusted(import(None, &manifest));
    let stranger = KeyPair::generate_unencrypted_keypair().unwrap();
    let theirs = minisign::sign(None, &stranger.sk, &manifest[..], None, None).unwrap();
    untrusted(import(Some(&theirs.into_string()), &manifest));
    let ours = stage.signature(&manifest);
    untrusted(import(Some(&ours), &stage.manifest("other")));
    assert_eq!(stage.files(), [""; 0]);
}

#[test]
fn an_image_imported_without_a_signature_is_not_opened_where_one_is_required() {
    let stage = Stage::new();
    let lax = Trust {
        keys: TrustedKeys::default(),
        require_signature: false,
    };
    let (manifest, name) = (stage.manifest("small"), "small".parse().unwrap());
    let imported = stage
        .store
        .import(&manifest, None, &stage.sources(), &lax, &mut |_| ());
    assert_eq!(imported.unwrap().signer, None);
    let refused = stage.store.open(&name, &stage.trust());
    assert!(matches!(
        refused,
        Err(StoreError::Trust(TrustError::Unsigned(_)))
    ));
    assert_eq!(stage.store.open(&name, &lax).unwrap().signer, None);
}

#[test]
fn files_that_are_not_what_the_manifest_says_are_refused() {
    for (file, content) in [
        ("vmlinuz", &b"kerneL"[..]),
        ("initrd.img", b"initrd and more"),
        ("vmlinuz", b"k"),
    ] {
        let stage = Stage::new();
        let manifest = stage.manifest("small");
        fs::write(stage.path(file), content).unwrap();
        let refused = stage.import(&manifest);
        assert!(
            matches!(refused, Err(ImportError::Altered { .. })),
            "{refused:?}"
        );
        assert_eq!(stage.files(), [""; 0]);
    }
}

#[test]
fn an_image_altered_in_the_store_is_noticed() {
    let stage = Stage::new();
    let manifest = stage.manifest("small");
    stage.import(&manifest).unwrap();
    let (name, trust) = ("small".parse().unwrap(), stage.trust());
    let opened = stage.store.open(&name, &trust).unwrap();
    let (kernel, initrd) = (
        opened.path(opened.manifest.kernel),
        opened.path(opened.manifest.initrd),
    );
    fs::set_permissions(&kernel, Permissions::from_mode(0o644)).unwrap();
    fs::write(&kernel, b"kerneL").unwrap();
    let found = stage.store.verify(&name, &trust, &mut |_| ());
    assert!(
        matches!(found, Err(StoreError::Altered { what: "kernel", .. })),
        "{found:?}"
    );
    fs::write(&kernel, b"longer than it was").unwrap();
    let found = stage.store.open(&name, &trust);
    assert!(
        matches!(found, Err(StoreError::Altered { what: "kernel", .. })),
        "{found:?}"
    );
    fs::remove_file(initrd).unwrap();
    assert!(stage.store.open(&name, &trust).is_err());
    let listed = stage.store.list(&trust).unwrap();
    assert!(listed[0].found.is_err(), "listed, with what is wrong");

    let place = stage.path("store/manifests/small/manifest.json");
    fs::set_permissions(&place, Permissions::from_mode(0o644)).unwrap();
    fs::write(&place, stage.manifest("small")).unwrap();
    assert!(stage.store.open(&name, &trust).is_err());
}

#[test]
fn one_image_does_not_pass_for_another() {
    let stage = Stage::new();
    stage.import(&stage.manifest("old")).unwrap();
    fs::rename(
        stage.path("store/manifests/old"),
        stage.path("store/manifests/new"),
    )
    .unwrap();
    let found = stage.store.open(&"new".parse().unwrap(), &stage.trust());
    assert!(
        matches!(found, Err(StoreError::Misplaced { .. })),
        "{found:?}"
    );
    fs::rename(
        stage.path("store/manifests/new"),
        stage.path("store/manifests/old"),
    )
    .unwrap();
    fs::write(stage.path("vmlinuz"), b"another").unwrap();
    let refused = stage.import(&stage.manifest("old"));
    assert!(
        matches!(refused, Err(ImportError::Store(StoreError::Exists(_)))),
        "{refused:?}"
    );
}

#[test]
fn an_image_in_use_is_not_removed_also_when_a_copy_of_the_lease_alone_is_left() {
    let stage = Stage::new();
    stage.import(&stage.manifest("small")).unwrap();
    let name = "small".parse().unwrap();
    let opened = stage.store.open(&name, &stage.trust()).unwrap();
    // As a QEMU has it that outlives its launcher.
    let inherited = opened.lease.copy().unwrap();
    drop(opened);
    assert!(matches!(
        stage.store.remove(&name),
        Err(StoreError::InUse(_))
    ));
    assert_eq!(stage.store.collect().unwrap().blobs, 0);
    drop(inherited);
    stage.store.remove(&name).unwrap();
}

#[test]
fn what_a_killed_import_leaves_counts_for_nothing_and_is_swept() {
    let stage = Stage::new();
    stage.import(&stage.manifest("small")).unwrap();
    let before = stage.files();
    // Killed while it copied; and between the blobs and the manifest.
    let half = stage.path("store/incoming/import-dead");
    fs::create_dir(&half).unwrap();
    fs::write(half.join("lock"), b"").unwrap();
    fs::write(half.join("kernel"), b"ker").unwrap();
    let orphan = stage.path("store/blobs/sha256").join("0".repeat(64));
    fs::write(orphan, b"orphan").unwrap();
    assert_eq!(stage.store.list(&stage.trust()).unwrap().len(), 1);
    let collected = stage.store.collect().unwrap();
    assert_eq!(
        (collected.imports, collected.blobs, collected.bytes),
        (1, 1, 6)
    );
    assert_eq!(stage.files(), before);
}

#[test]
fn where_a_manifest_cannot_be_read_nothing_is_collected() {
    let stage = Stage::new();
    stage.import(&stage.manifest("small")).unwrap();
    let blobs = fs::read_dir(stage.path("store/blobs/sha256"))
        .unwrap()
        .count();
    let place = stage.path("store/manifests/small/manifest.json");
    fs::set_permissions(&place, Permissions::from_mode(0o644)).unwrap();
    fs::write(&place, b"{").unwrap();
    assert!(matches!(
        stage.store.collect(),
        Err(StoreError::Manifest(..))
    ));
    let left = fs::read_dir(stage.path("store/blobs/sha256"))
        .unwrap()
        .count();
    assert_eq!(left, blobs);
    stage.store.remove(&"small".parse().unwrap()).unwrap();
    assert_eq!(stage.store.collect().unwrap().blobs, blobs);
}

#[test]
fn a_store_that_others_may_write_into_is_refused() {
    let stage = Stage::new();
    stage.import(&stage.manifest("small")).unwrap();
    fs::set_permissions(stage.path("store"), Permissions::from_mode(0o777)).unwrap();
    let refused = stage.store.open(&"small".parse().unwrap(), &stage.trust());
    assert!(
        matches!(refused, Err(StoreError::Trust(TrustError::NotPrivate(_)))),
        "{refused:?}"
    );
}

#[test]
fn a_disk_is_imported_by_its_declared_format_and_its_header_is_judged() {
    let stage = Stage::new();
    let qcow2 = Layer::new(1 << 30).unwrap().content();
    fs::write(stage.path("disk.qcow2"), &qcow2).unwrap();
    let manifest = stage.manifest("debian");
    let disk = Manifest::parse(&manifest).unwrap().disk.unwrap();
    assert_eq!(
        (disk.format, disk.virtual_bytes),
        (DiskFormat::Qcow2, 1 << 30)
    );
    stage.import(&manifest).unwrap();

    // The same bytes as a raw disk are that, and no layer of anything.
    let mut sources = stage.sources();
    sources.disk = Some(Source {
        path: stage.path("disk.qcow2"),
        format: DiskFormat::Raw,
        root: RootDevice::DISK,
    });
    let raw = sources.measure("raw".parse().unwrap(), Seed::Facts, &mut |_| ());
    assert_eq!(raw.unwrap().disk.unwrap().virtual_bytes, qcow2.len() as u64);

    let mut backed = qcow2.clone();
    backed[14] = 2;
    fs::write(stage.path("disk.qcow2"), &backed).unwrap();
    let refused = stage
        .sources()
        .measure("bad".parse().unwrap(), Seed::Facts, &mut |_| ());
    assert!(
        matches!(refused, Err(ImportError::Header { .. })),
        "{refused:?}"
    );

    // A manifest that lies about it, signed by a key that is trusted.
    let mut lying = Manifest::parse(&manifest).unwrap();
    lying.name = "lying".parse().unwrap();
    lying.disk.as_mut().unwrap().sha256 = omerta_images::Digest::of(&backed);
    let refused = stage.import(&lying.to_bytes().unwrap());
    assert!(
        matches!(refused, Err(ImportError::Header { .. })),
        "{refused:?}"
    );
    fs::write(stage.path("disk.qcow2"), &qcow2).unwrap();
    let mut lying = Manifest::parse(&manifest).unwrap();
    lying.name = "lying".parse().unwrap();
    lying.disk.as_mut().unwrap().virtual_bytes = 1 << 31;
    let refused = stage.import(&lying.to_bytes().unwrap());
    assert!(
        matches!(refused, Err(ImportError::Altered { .. })),
        "{refused:?}"
    );
}

#[test]
fn a_source_that_is_no_file_is_refused_and_not_waited_for() {
    let stage = Stage::new();
    fs::remove_file(stage.path("vmlinuz")).unwrap();
    let measure = || {
        stage
            .sources()
            .measure("x".parse().unwrap(), Seed::Facts, &mut |_| ())
    };
    assert!(matches!(measure(), Err(ImportError::Missing(_))));
    nix::unistd::mkfifo(&stage.path("vmlinuz"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(measure(), Err(ImportError::Source { .. })));
}
