//! What probes found, kept across restarts: an answer is good for one boot of this host, one QEMU and
//! one kernel as they were when it was found.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use omerta_vm_launcher::{Accel, AccelReport, MachineType, qemu_program};
use serde::{Deserialize, Serialize};

/// The file in the state directory.
const FILE: &str = "probed.json";
/// How many kernels are remembered; the oldest goes first.
const MAX_KERNELS: usize = 64;
/// The most that is read of the file, in bytes.
const MAX_BYTES: u64 = 256 << 10;

/// A file as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct FileIdentity {
    device: u64,
    inode: u64,
    length: u64,
    changed_s: i64,
    changed_ns: i64,
}

impl FileIdentity {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|found| Self {
            device: found.dev(),
            inode: found.ino(),
            length: found.len(),
            changed_s: found.ctime(),
            changed_ns: found.ctime_nsec(),
        })
    }
}

/// What became of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tried {
    microvm: bool,
    pub(crate) why: String,
}

impl Tried {
    pub(crate) const fn q35(why: String) -> Self {
        let microvm = false;
        Self { microvm, why }
    }

    pub(crate) const fn microvm(why: String) -> Self {
        let microvm = true;
        Self { microvm, why }
    }

    pub(crate) const fn machine(&self) -> MachineType {
        if self.microvm {
            MachineType::Microvm
        } else {
            MachineType::Q35
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Acceleration {
    kvm: bool,
    why: String,
}

/// The file's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    boot: String,
    qemu: Option<FileIdentity>,
    accel: Option<Acceleration>,
    kernels: Vec<(FileIdentity, Tried)>,
}

/// What is known of this boot.
#[derive(Debug)]
pub(crate) struct Probed {
    path: PathBuf,
    kept: Kept,
    /// What is not certain enough for the file: a busy host may have been the reason.
    remembered: Vec<(FileIdentity, Tried)>,
}

impl Probed {
    /// What the file says, if it speaks of this boot and of this QEMU.
    pub(crate) fn of_this_boot(state_dir: &Path) -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let qemu = qemu_program().and_then(|path| FileIdentity::of(&path).ok());
        Self::read(state_dir.join(FILE), boot.trim().to_owned(), qemu)
    }

    fn read(path: PathBuf, boot: String, qemu: Option<FileIdentity>) -> Self {
        let kept = read(&path)
            .filter(|kept| !boot.is_empty() && kept.boot == boot && kept.qemu == qemu)
            .unwrap_or_else(|| Kept {
                boot,
                qemu,
                ..Kept::default()
            });
        Self {
            path,
            kept,
            remembered: Vec::new(),
        }
    }

    /// Whether KVM works, if that was found out.
    pub(crate) fn accel(&self) -> Option<AccelReport> {
        self.kept.accel.as_ref().map(|found| AccelReport {
            accel: if found.kvm { Accel::Kvm } else { Accel::Tcg },
            why: found.why.clone(),
        })
    }

    /// What became of a kernel, if it was tried.
    pub(crate) fn kernel(&self, kernel: &FileIdentity) -> Option<&Tried> {
        let mut all = self.kept.kernels.iter().chain(&self.remembered);
        all.find(|(tried, _)| tried == kernel)
            .map(|(_, tried)| tried)
    }

    /// Keeps how guests execute. What kernels did was under the acceleration before.
    pub(crate) fn keep_accel(&mut self, report: &AccelReport) {
        self.kept.accel = Some(Acceleration {
            kvm: report.accel == Accel::Kvm,
            why: report.why.clone(),
        });
        self.kept.kernels.clear();
        self.remembered.clear();
        self.write();
    }

    /// Keeps what became of a kernel, also for the next omertad.
    pub(crate) fn keep_kernel(&mut self, kernel: FileIdentity, tried: Tried) {
        push(&mut self.kept.kernels, kernel, tried);
        self.write();
    }

    /// Keeps it for as long as this omertad lives.
    pub(crate) fn remember(&mut self, kernel: FileIdentity, tried: Tried) {
        push(&mut self.remembered, kernel, tried);
    }

    /// What cannot be kept is found out again by the next omertad.
    fn write(&self) {
        let written = serde_json::to_vec(&self.kept)
            .map_err(io::Error::from)
            .and_then(|text| {
                if let Some(parent) = self.path.parent() {
                    fs::create_dir_all(parent)?;
                }
                let aside = self.path.with_extension("new");
                fs::write(&aside, text)?;
                fs::rename(&aside, &self.path)
            });
        if let Err(error) = written {
            let path = self.path.display();
            tracing::warn!(%path, %error, "what probes found cannot be kept: they run again at the next start");
        }
    }
}

fn push(list: &mut Vec<(FileIdentity, Tried)>, kernel: FileIdentity, tried: Tried) {
    if list.len() == MAX_KERNELS {
        list.remove(0);
    }
    list.push((kernel, tried));
}

/// The file's content, or nothing where it cannot be understood.
fn read(path: &Path) -> Option<Kept> {
    let length = fs::metadata(path).ok()?.len();
    if length > MAX_BYTES {
        return None;
    }
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(n: u64) -> FileIdentity {
        FileIdentity {
            device: 1,
            inode: n,
            length: 3,
            changed_s: 4,
            changed_ns: 5,
        }
    }

    fn kvm() -> AccelReport {
        AccelReport {
            accel: Accel::Kvm,
            why: "it ran".to_owned(),
        }
    }

    #[test]
    fn what_was_found_is_good_for_the_same_boot_and_qemu_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state").join(FILE);
        let open = |boot: &str, qemu| Probed::read(path.clone(), boot.to_owned(), Some(file(qemu)));
        let mut first = open("boot-1", 1);
        first.keep_accel(&kvm());
        first.keep_kernel(file(7), Tried::microvm("it came up".to_owned()));
        first.remember(file(8), Tried::q35("busy".to_owned()));

        let again = open("boot-1", 1);
        assert_eq!(again.accel(), Some(kvm()));
        let machine = again.kernel(&file(7)).map(Tried::machine);
        assert_eq!(machine, Some(MachineType::Microvm));
        assert_eq!(again.kernel(&file(8)), None, "it was not certain");
        for (boot, qemu) in [("boot-2", 1), ("boot-1", 2), ("", 1)] {
            let other = open(boot, qemu);
            assert_eq!(other.accel(), None, "{boot} {qemu}");
            assert_eq!(other.kernel(&file(7)), None, "{boot} {qemu}");
        }
    }

    #[test]
    fn another_acceleration_forgets_what_kernels_did_under_the_one_before() {
        let directory = tempfile::tempdir().unwrap();
        let mut probed = Probed::read(directory.path().join(FILE), "boot".to_owned(), None);
        probed.keep_kernel(file(7), Tried::microvm(String::new()));
        probed.keep_accel(&AccelReport {
            accel: Accel::Tcg,
            ..kvm()
        });
        assert_eq!(probed.kernel(&file(7)), None);
    }

    #[test]
    fn a_file_that_cannot_be_understood_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        for text in ["", "{", "{\"boot\":\"boot\",\"unknown\":1}", "[]"] {
            fs::write(&path, text).unwrap();
            let probed = Probed::read(path.clone(), "boot".to_owned(), None);
            assert_eq!(probed.accel(), None, "{text}");
        }
    }

    #[test]
    fn so_many_kernels_are_kept_and_no_more() {
        let directory = tempfile::tempdir().unwrap();
        let mut probed = Probed::read(directory.path().join(FILE), "boot".to_owned(), None);
        for n in 0..=MAX_KERNELS as u64 {
            probed.keep_kernel(file(n), Tried::q35(String::new()));
        }
        assert_eq!(probed.kept.kernels.len(), MAX_KERNELS);
        assert_eq!(probed.kernel(&file(0)), None);
    }
}
