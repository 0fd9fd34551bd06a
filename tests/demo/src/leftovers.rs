//! What must not be there when the demo has ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use omerta_test_support::Namespace;

use crate::report::Report;

/// How long the kernel may take to let go of the last process.
const GRACE: Duration = Duration::from_secs(3);

/// Everything that the demo set up, by name.
#[derive(Default)]
pub struct Leftovers {
    namespaces: Vec<(PathBuf, u64)>,
    /// Where the guards of each namespace would be pinned.
    pins: Vec<PathBuf>,
    paths: Vec<PathBuf>,
    links_before: Vec<String>,
}

impl Leftovers {
    /// Whether anything was set up.
    pub fn watched(&self) -> bool {
        !self.namespaces.is_empty() || !self.paths.is_empty()
    }

    /// Notes the machine's own interfaces, before the first change.
    pub fn note_links(&mut self) {
        self.links_before = own_links();
    }

    pub fn watch_namespace(&mut self, namespace: &Namespace) -> Result<()> {
        let inode = namespace.inode()?;
        self.namespaces.push((namespace.path(), inode));
        // The kernel uses the numbers of namespaces again: a directory that is there already is
        // what another run left of another namespace.
        let pins = PathBuf::from(format!("/sys/fs/bpf/omerta/{inode}"));
        if !pins.exists() {
            self.pins.push(pins);
        }
        Ok(())
    }

    pub fn watch_path(&mut self, path: &Path) {
        self.paths.push(path.to_owned());
    }

    /// Checks that all of it is gone.
    pub fn check(&self, report: &mut Report) {
        let deadline = Instant::now() + GRACE;
        while !self.processes().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        tell(report, "process", &self.processes());
        let namespaces = self
            .namespaces
            .iter()
            .map(|(path, _)| path)
            .filter(|path| path.exists());
        tell(report, "namespace", &names(namespaces));
        let new_links = own_links()
            .into_iter()
            .filter(|link| !self.links_before.contains(link))
            .collect::<Vec<_>>();
        tell(report, "interface on the machine itself", &new_links);
        tell(
            report,
            "pin",
            &names(self.pins.iter().filter(|path| path.exists())),
        );
        tell(
            report,
            "file",
            &names(self.paths.iter().filter(|path| path.exists())),
        );
    }

    /// Processes inside the demo's namespaces, or started on its files.
    fn processes(&self) -> Vec<String> {
        let mut found = Vec::new();
        let own = std::process::id().to_string();
        let namespaces: Vec<_> = self
            .namespaces
            .iter()
            .map(|(_, inode)| format!("net:[{inode}]"))
            .collect();
        let paths = names(self.paths.iter());
        let Ok(processes) = fs::read_dir("/proc") else {
            return vec!["/proc cannot be read".to_owned()];
        };
        for process in processes.flatten() {
            let pid = process.file_name().to_string_lossy().into_owned();
            if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            // A process that ends while it is looked at is none.
            let namespace = fs::read_link(process.path().join("ns/net")).unwrap_or_default();
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let inside = namespaces.iter().any(|name| Path::new(name) == namespace);
            if inside || paths.iter().any(|path| command.contains(path)) {
                found.push(format!("{pid} ({})", command.trim()));
            }
        }
        found
    }
}

fn names<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Vec<String> {
    paths.map(|path| path.display().to_string()).collect()
}

fn own_links() -> Vec<String> {
    let Ok(links) = fs::read_dir("/sys/class/net") else {
        return Vec::new();
    };
    links
        .flatten()
        .map(|link| link.file_name().to_string_lossy().into_owned())
        .collect()
}

fn tell(report: &mut Report, kind: &str, left: &[String]) {
    if left.is_empty() {
        report.check(true, &format!("no {kind}"));
    } else {
        report.check(false, &format!("a {kind} is left: {}", left.join(", ")));
    }
}
