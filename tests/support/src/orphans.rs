//! QEMUs that outlive the omertad that started them.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Kills, when dropped, the QEMUs whose run directories are below a path.
#[derive(Debug)]
pub struct Orphans(Option<PathBuf>);

impl Orphans {
    /// Those below `path`.
    pub fn below(path: &Path) -> Self {
        Self(Some(path.to_owned()))
    }

    /// Lets them live on.
    pub fn let_live(mut self) {
        self.0 = None;
    }

    /// The pids of the QEMUs whose run directories are below `path`.
    pub fn living(path: &Path) -> Vec<i32> {
        let Ok(processes) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        let wanted = [b"OMERTA_RUN_DIR=", path.as_os_str().as_bytes()].concat();
        processes
            .flatten()
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let environment = fs::read(entry.path().join("environ")).ok()?;
                let is_wanted = environment
                    .split(|byte| *byte == 0)
                    .any(|one| one.starts_with(&wanted));
                is_wanted.then_some(pid)
            })
            .collect()
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        for pid in Self::living(path) {
            // It may have ended.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
