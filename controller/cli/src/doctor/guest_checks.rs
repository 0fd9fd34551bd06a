//! What guests need of this host beside their guards.

use std::io::{self, IsTerminal};
use std::process::{Command, Stdio};

use omerta_api::{Version, route};
use omerta_vm_launcher::{Accel, lacking_parts, probe_accel};

use super::Check;
use super::checks::{as_line, read_setting};
use crate::client::{Client, ClientError};

/// What QEMU's command is called.
const QEMU: &str = "qemu-system-x86_64";
/// The oldest QEMU that the tests have run with: major and minor number.
const OLDEST_QEMU: (u32, u32) = (7, 2);
/// What a guest takes of them, and for how many guests there should be enough.
const INOTIFY_EACH: u64 = 1;
const GUESTS: u64 = 256;

/// What `omerta vm` needs. Where omertad runs it has tried KVM, and says itself what came of it.
pub(super) async fn guests(omertad_is_there: bool) -> Vec<Check> {
    let mut checks = vec![qemu(), jail(), inotify()];
    if !omertad_is_there {
        checks.push(kvm().await);
    }
    checks
}

fn qemu() -> Check {
    const NAME: &str = "QEMU";
    let output = Command::new(QEMU)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            let said = String::from_utf8_lossy(&output.stdout);
            of_version(NAME, said.lines().next().unwrap_or_default().trim())
        }
        Ok(output) => Check::warning(
            NAME,
            format!("`{QEMU} --version` ended with {}", output.status),
            "install qemu-system-x86 anew",
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::warning(
            NAME,
            format!("{QEMU} is not on the PATH: guards work, `omerta vm` does not"),
            "apt install qemu-system-x86",
        ),
        Err(error) => Check::warning(
            NAME,
            format!("{QEMU} cannot be run ({error})"),
            "see its permissions",
        ),
    }
}

fn of_version(name: &'static str, said: &str) -> Check {
    let version = said
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        .and_then(|word| {
            let mut numbers = word.split(|c: char| !c.is_ascii_digit());
            let major: u32 = numbers.next()?.parse().ok()?;
            Some((major, numbers.next()?.parse().ok()?))
        });
    match version {
        Some(version) if version >= OLDEST_QEMU => Check::ok(name, said),
        _ => {
            let (major, minor) = OLDEST_QEMU;
            Check::warning(
                name,
                format!("{said}: guests have been tried with {major}.{minor} and later"),
                "install a newer qemu-system-x86",
            )
        }
    }
}

/// What holds a QEMU that its guest has taken over.
fn jail() -> Check {
    const NAME: &str = "jail";
    match lacking_parts() {
        Ok(lacking) if lacking.is_empty() => Check::ok(
            NAME,
            "cgroup controllers cpu, memory, pids and io, and Landlock",
        ),
        Ok(lacking) => {
            let words: Vec<String> = lacking.iter().map(|(part, _)| part.to_string()).collect();
            let mut remedies: Vec<&str> = lacking.iter().map(|(_, remedy)| *remedy).collect();
            remedies.dedup();
            Check::warning(
                NAME,
                format!(
                    "this host has no {}: no guest is run without, unless [jail] says so",
                    words.join(", ")
                ),
                remedies.join("; "),
            )
        }
        Err(error) => Check::warning(
            NAME,
            as_line(&error),
            "see that /proc and /sys/fs/cgroup are mounted",
        ),
    }
}

/// omertad has an inotify instance for each guest's guard, and root's are bounded.
fn inotify() -> Check {
    const NAME: &str = "inotify";
    let path = "/proc/sys/fs/inotify/max_user_instances";
    let found = read_setting(path).map(|value| value.parse::<u64>());
    match found {
        Ok(Ok(most)) if most >= GUESTS * INOTIFY_EACH => {
            Check::ok(NAME, format!("{most} instances a user"))
        }
        Ok(Ok(most)) => Check::warning(
            NAME,
            format!("{most} instances a user: a guest takes one, other programs of root's some"),
            "sysctl -w fs.inotify.max_user_instances=1024",
        ),
        Ok(Err(_)) | Err(_) => Check::warning(
            NAME,
            format!("{path} cannot be read"),
            "see that /proc/sys is mounted",
        ),
    }
}

/// Has KVM run a guest of a few instructions.
async fn kvm() -> Check {
    const NAME: &str = "KVM";
    if !nix::unistd::geteuid().is_root() {
        return Check::warning(
            NAME,
            "not tried: a guest takes root",
            "run `sudo omerta doctor`",
        );
    }
    if io::stderr().is_terminal() {
        eprintln!("omerta: having KVM run a guest, which takes up to 8 s");
    }
    let report = probe_accel().await;
    match report.accel {
        Accel::Kvm => Check::ok(
            NAME,
            format!(
                "{}; omertad has each image's kernel boot as well",
                report.why
            ),
        ),
        Accel::Tcg => Check::warning(
            NAME,
            format!("{}, which is several times slower", report.why),
            "see that virtualisation is on in the firmware (in a virtual machine: at its host), kvm_intel or kvm_amd is loaded, and group kvm may use /dev/kvm",
        ),
    }
}

/// What became of asking omertad.
pub(super) struct Omertad {
    pub(super) check: Check,
    /// Whether one answered.
    pub(super) is_there: bool,
}

/// The daemon, which is not needed for guards alone.
pub(super) async fn omertad(client: &Client) -> Omertad {
    const NAME: &str = "omertad";
    let answer: Result<Version, ClientError> = client.get(route::VERSION).await;
    let is_there = answer.is_ok();
    let check = match answer {
        Ok(version) => Check::ok(
            NAME,
            format!(
                "{}, pid {}; {}: {}; {}",
                version.version, version.pid, version.accel, version.accel_why, version.machine_why
            ),
        ),
        Err(error @ (ClientError::NotRunning(_) | ClientError::Forbidden(_))) => {
            let line = as_line(&error);
            let (found, remedy) = line
                .split_once("; ")
                .or(line.split_once(": "))
                .unwrap_or((&line, "start it"));
            Check::warning(NAME, found, remedy)
        }
        Err(error) => Check::warning(NAME, as_line(&error), "see omertad's log, or restart it"),
    };
    Omertad { check, is_there }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Standing;

    #[test]
    fn an_old_qemu_is_told_from_one_that_was_tried() {
        for (said, status) in [
            (
                "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)",
                Standing::Ok,
            ),
            ("QEMU emulator version 10.0.2", Standing::Ok),
            ("QEMU emulator version 6.2.0", Standing::Warning),
            ("QEMU emulator version 7.1", Standing::Warning),
            ("something else", Standing::Warning),
        ] {
            assert_eq!(of_version("QEMU", said).status, status, "{said}");
        }
    }
}
