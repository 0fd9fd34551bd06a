//! The small image's recipe, as `omerta image build` has it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use omerta_images::{Digest, Recipe};

/// Builds in a directory of its own, from packages that another build has downloaded.
fn build(cache: &Path, agent: &Path, umask: &str) -> (Digest, Digest) {
    let recipe = Recipe::unpack().unwrap();
    let out = tempfile::tempdir().unwrap();
    fs::create_dir(out.path().join("cache")).unwrap();
    for package in fs::read_dir(cache).unwrap() {
        let package = package.unwrap();
        let copy = out.path().join("cache").join(package.file_name());
        fs::copy(package.path(), copy).unwrap();
    }
    let built = Command::new("sh")
        .arg("-c")
        .arg(format!("umask {umask}; exec sh \"$0\" \"$1\""))
        .arg(recipe.path("build.sh"))
        .arg(out.path())
        .env("OMERTA_AGENT", agent)
        .output()
        .unwrap();
    assert!(built.status.success(), "{built:?}");
    let digest = |name| Digest::of(&fs::read(out.path().join(name)).unwrap());
    (digest("vmlinuz"), digest("initrd.img"))
}

#[test]
fn the_small_image_built_twice_is_the_same_image() {
    let target = std::env::var_os("OMERTA_IMAGE_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/image"),
        PathBuf::from,
    );
    let cache = target.join("cache");
    if !cache.is_dir() {
        println!("skipped: {} has no packages: `make image`", cache.display());
        return;
    }
    let agent = target.join("omerta-agent");
    assert_eq!(build(&cache, &agent, "022"), build(&cache, &agent, "077"));
}
