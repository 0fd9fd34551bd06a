//! A cgroup of its own for a process, in every hierarchy that is mounted.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Made below the uppermost cgroups; removed, with what is empty in it, when dropped.
#[derive(Debug)]
pub struct Cgroup(Vec<PathBuf>);

impl Cgroup {
    /// A new one.
    ///
    /// # Errors
    /// Where one cannot be made.
    pub fn new() -> io::Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("omerta-test-{}-{number}", std::process::id());
        let mut made = Self(Vec::new());
        for line in fs::read_to_string("/proc/self/mountinfo")?.lines() {
            let Some((before, after)) = line.split_once(" - cgroup") else {
                continue;
            };
            // A set of processors must be chosen before anybody may be in it.
            if after.contains("cpuset") {
                continue;
            }
            if let Some(mount) = before.split(' ').nth(4) {
                let directory = Path::new(mount).join(&name);
                fs::create_dir(&directory)?;
                made.0.push(directory);
            }
        }
        Ok(made)
    }

    /// Has `command` run in it.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn contain(&self, command: &mut Command) -> io::Result<()> {
        let open = |directory: &PathBuf| {
            File::options()
                .write(true)
                .open(directory.join("cgroup.procs"))
        };
        let doors: Vec<File> = self.0.iter().map(open).collect::<io::Result<_>>()?;
        // SAFETY: the closure runs between fork and exec and only makes the write system call on descriptors
        // that it keeps open itself; it neither allocates nor locks.
        unsafe {
            command.pre_exec(move || doors.iter().try_for_each(|mut door| door.write_all(b"0")));
        }
        Ok(())
    }

    /// All cgroups below it.
    pub fn below(&self) -> Vec<PathBuf> {
        let mut all = Vec::new();
        let mut todo = self.0.clone();
        while let Some(directory) = todo.pop() {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let inner = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            let inner: Vec<_> = inner.map(|entry| entry.path()).collect();
            all.extend(inner.clone());
            todo.extend(inner);
        }
        all
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut all = self.0.clone();
        all.extend(self.below());
        // The kernel lets go of a dead process's a moment after it was reaped.
        for _ in 0..100 {
            all.retain(|directory| {
                fs::remove_dir(directory)
                    .is_err_and(|error| error.kind() != io::ErrorKind::NotFound)
            });
            if all.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
