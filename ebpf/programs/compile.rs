//! Builds kernel programs, for the build scripts of what loads them.
//!
//! A toolchain with the standard library's source is needed to build `core` for BPF. The first of
//! these is used: `OMERTA_BPF_RUSTC` (path of a rustc), a rustup nightly that has `rust-src`,
//! Debian's `/usr/bin/rustc` with `rust-web-src`. `make setup` provides one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The object of `binary`, one of the crate `ebpf/programs`, built with `features` below OUT_DIR.
/// `ebpf` is the way there from the crate that is built.
pub fn compile(ebpf: &str, binary: &str, features: &str) -> Result<PathBuf, String> {
    let programs = Path::new(&variable("CARGO_MANIFEST_DIR")?)
        .join(ebpf)
        .join("programs");
    let out = PathBuf::from(variable("OUT_DIR")?);
    for source in ["programs", "verdict/src", "verdict/Cargo.toml"] {
        println!("cargo::rerun-if-changed={ebpf}/{source}");
    }
    println!("cargo::rerun-if-env-changed=OMERTA_BPF_RUSTC");

    let rustc = find_rustc()?;
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    let endian = variable("CARGO_CFG_TARGET_ENDIAN")?;
    let target = if endian == "big" {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    };
    let flags = [
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        // 32-bit arithmetic and comparisons (Linux 5.1), and loads of words that are not aligned,
        // which headers are: both save a fifth of the instructions.
        "-Ctarget-cpu=v3".into(),
        "-Clink-arg=--cpu-features=+allows-misaligned-mem-access".into(),
        format!("--remap-path-prefix={}=ebpf/programs", programs.display()),
    ]
    .join("\u{1f}");
    let mut cargo = Command::new(variable("CARGO")?);
    // What cargo set for the host must not leak into a build for another target.
    for name in [
        "RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTUP_TOOLCHAIN",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo
        .current_dir(&programs)
        .args([
            "build",
            "--release",
            "--locked",
            "-Z",
            "build-std=core",
            "--target",
            target,
            "--bin",
            binary,
            "--features",
            features,
        ])
        .arg("--target-dir")
        .arg(&out)
        .env("RUSTC", &rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("PATH", path_with_cargo_bin())
        .status()
        .map_err(|error| format!("cannot run cargo for the kernel programs: {error}"))?;
    if !status.success() {
        return Err(format!(
            "the kernel programs did not build with {}: see above; `make setup` installs the toolchain and bpf-linker",
            rustc.display()
        ));
    }
    Ok(out.join(target).join("release").join(binary))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn find_rustc() -> Result<PathBuf, String> {
    if let Some(rustc) = env::var_os("OMERTA_BPF_RUSTC") {
        return Ok(rustc.into());
    }
    let nightly = Command::new("rustup")
        .args(["which", "rustc", "--toolchain", "nightly"])
        .output();
    let nightly = nightly
        .ok()
        .filter(|output| output.status.success())
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim().to_owned()));
    nightly
        .into_iter()
        .chain([PathBuf::from("/usr/bin/rustc")])
        .find(|rustc| has_core_source(rustc))
        .ok_or_else(|| {
            "no Rust toolchain with the standard library's source: run `make setup`".into()
        })
}

fn has_core_source(rustc: &Path) -> bool {
    let Ok(output) = Command::new(rustc).args(["--print", "sysroot"]).output() else {
        return false;
    };
    let sysroot = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success()
        && Path::new(&sysroot)
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists()
}

/// bpf-linker is installed with cargo, whose directory may not be on PATH (sudo, services).
fn path_with_cargo_bin() -> std::ffi::OsString {
    let mut path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    if let Some(home) = home {
        path.push(":");
        path.push(home.join("bin"));
    }
    path
}
