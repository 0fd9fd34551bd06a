//! What guards need of this host.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use omerta_dataplane::{Guard, GuardError, Hook, Programs, outer_process};
use omerta_verdict::Mode;

use super::Check;
use crate::exit::explain;

/// What the guard's programs need of the kernel.
pub(super) fn kernel() -> Vec<Check> {
    let mut checks = vec![hooks(), programs(), jit(), unprivileged(), bpffs()];
    checks.extend(mounts());
    checks.extend(places());
    checks
}

/// What a guest's frames need.
pub(super) fn network() -> Vec<Check> {
    vec![tun(), forwarding()]
}

fn hooks() -> Check {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_else(|_| "unknown release".to_owned());
    hooks_of(&release, Hook::of_this_kernel())
}

fn hooks_of(release: &str, hook: Result<Hook, GuardError>) -> Check {
    const NAME: &str = "kernel hooks";
    match hook {
        Ok(Hook::Tcx) => Check::ok(
            NAME,
            format!("TCX: Linux {release} has it, as 6.6 and later have; guards are pinned links"),
        ),
        Ok(Hook::Clsact) => Check::warning(
            NAME,
            format!(
                "clsact: Linux {release} has no TCX (6.6 and later have), so guards are filters; \
                 they judge the same, but go when an interface moves to another namespace or its \
                 qdisc is removed"
            ),
            "boot Linux 6.6 or later where you can",
        ),
        Err(error) => Check::failed(NAME, format!("Linux {release}"), as_line(&error)),
    }
}

/// Loads the programs and attaches them to nothing.
fn programs() -> Check {
    const NAME: &str = "kernel programs";
    if !nix::unistd::geteuid().is_root() {
        return Check::failed(
            NAME,
            "not tried: loading them needs root",
            "run `sudo omerta doctor`",
        );
    }
    let began = Instant::now();
    match Programs::load("doctor", Mode::Filtered) {
        Ok(_) => Check::ok(
            NAME,
            format!(
                "the kernel verified and loaded them in {} ms",
                began.elapsed().as_millis()
            ),
        ),
        Err(error) => Check::failed(
            NAME,
            as_line(&error),
            match error {
                GuardError::NotPermitted => "run as root (CAP_SYS_ADMIN), outside of the container",
                _ => "report this with the output of `omerta version` and `uname -a`",
            },
        ),
    }
}

/// Only where something was dropped so.
fn places() -> Option<Check> {
    const NAME: &str = "guards' places";
    let unguarded = Guard::unguarded().ok()?;
    (unguarded.packets > 0).then(|| {
        Check::warning(
            NAME,
            format!(
                "{} frames were dropped at interfaces whose guards are gone and whose programs are not",
                unguarded.packets
            ),
            "look for interfaces that pass nothing (`omerta guard list`), and attach their guards again",
        )
    })
}

fn jit() -> Check {
    const NAME: &str = "BPF JIT";
    match read_setting("/proc/sys/net/core/bpf_jit_enable") {
        Ok(value) if value != "0" => Check::ok(NAME, "on"),
        Ok(_) => Check::warning(
            NAME,
            "off: every frame is judged by the interpreter",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        // Kernels that are built with CONFIG_BPF_JIT_ALWAYS_ON may not show it in a namespace.
        Err(error) => Check::warning(
            NAME,
            format!("cannot be told ({error})"),
            "look in the host's own network namespace",
        ),
    }
}

fn unprivileged() -> Check {
    const NAME: &str = "unprivileged BPF";
    match read_setting("/proc/sys/kernel/unprivileged_bpf_disabled") {
        Ok(value) if value == "0" => Check::warning(
            NAME,
            "any user may load programs",
            "sysctl -w kernel.unprivileged_bpf_disabled=1",
        ),
        Ok(_) => Check::ok(NAME, "off"),
        Err(error) => Check::warning(
            NAME,
            format!("cannot be told ({error})"),
            "see that only root may load programs",
        ),
    }
}

/// Told where this process does not see the host's mounts: `ip netns exec` gives its command a /sys of its
/// own, without bpffs and cgroups. (Commands about guards find bpffs all the same.)
fn mounts() -> Option<Check> {
    outer_process()?;
    let own = fs::metadata("/proc/self/ns/net").ok()?.ino();
    let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let name = names
        .filter(|entry| entry.metadata().is_ok_and(|found| found.ino() == own))
        .find_map(|entry| entry.file_name().into_string().ok());
    Some(Check::warning(
        "mounts",
        "this process has mounts of its own (as within `ip netns exec`): what is said here of the JIT, of \
         cgroups and of the jail is not of the host",
        match name {
            Some(name) => format!("nsenter --net=/run/netns/{name} omerta doctor"),
            None => {
                "enter the network namespace alone: `nsenter --net=FILE omerta doctor`".to_owned()
            }
        },
    ))
}

fn bpffs() -> Check {
    const NAME: &str = "bpffs";
    // Where guards are pinned, whatever this process has mounted.
    let root = outer_process().map_or_else(String::new, |outer| format!("/proc/{outer}/root"));
    let path = format!("{root}/sys/fs/bpf");
    /// include/uapi/linux/magic.h.
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    match nix::sys::statfs::statfs(path.as_str()) {
        Ok(found) if found.filesystem_type() == nix::sys::statfs::FsType(BPF_FS_MAGIC) => {
            Check::ok(NAME, "mounted at /sys/fs/bpf")
        }
        Ok(_) => Check::warning(
            NAME,
            "not mounted yet: the first guard mounts it",
            "mount it at boot, so that every tool sees the same one: `mount -t bpf bpf /sys/fs/bpf`",
        ),
        Err(error) => Check::failed(
            NAME,
            format!("/sys/fs/bpf cannot be looked at ({error})"),
            "mount sysfs at /sys and bpffs at /sys/fs/bpf",
        ),
    }
}

fn tun() -> Check {
    const NAME: &str = "taps";
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::ok(NAME, "/dev/net/tun opens"),
        Err(error) => Check::warning(
            NAME,
            format!("/dev/net/tun cannot be opened ({error}), so no guest can have a tap"),
            if error.kind() == io::ErrorKind::PermissionDenied {
                "run this as root"
            } else {
                "modprobe tun"
            },
        ),
    }
}

fn forwarding() -> Check {
    const NAME: &str = "forwarding";
    match read_setting("/proc/sys/net/ipv4/ip_forward") {
        Ok(value) if value == "0" => Check::warning(
            NAME,
            "IPv4 forwarding is off: a routed guest does not reach its consumer",
            "sysctl -w net.ipv4.ip_forward=1 (a bridged guest does not need it)",
        ),
        Ok(_) => Check::ok(NAME, "IPv4 forwarding is on"),
        Err(error) => Check::warning(
            NAME,
            format!("cannot be told ({error})"),
            "see that /proc/sys is mounted",
        ),
    }
}

pub(super) fn as_line(error: &dyn Error) -> String {
    explain(error)
}

pub(super) fn read_setting(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Standing;

    #[test]
    fn each_kernels_hook_is_named_with_why() {
        let tcx = hooks_of("6.12.1", Ok(Hook::Tcx));
        assert_eq!(tcx.status, Standing::Ok);
        assert!(tcx.found.contains("TCX"), "{tcx:?}");
        let clsact = hooks_of("6.1.9", Ok(Hook::Clsact));
        assert_eq!(clsact.status, Standing::Warning);
        assert!(clsact.found.starts_with("clsact: Linux 6.1.9 has no TCX"));
        assert!(clsact.remedy.unwrap().contains("6.6"));
        let release = "5.10.0".to_owned();
        let old = hooks_of("5.10.0", Err(GuardError::KernelTooOld { release }));
        assert_eq!(old.status, Standing::Failed);
        assert!(old.remedy.unwrap().contains("5.15"));
    }
}
