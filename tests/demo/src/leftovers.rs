//! What must not be there when the demo has ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use omerta_test_support::Namespace;

use crate::report::Report;
use crate::traces;

/// How long the kernel may take to let go of the last process.
const GRACE: Duration = Duration::from_secs(3);

/// Where an omertad keeps what no option moves, and a guard what no namespace has.
const PLACES: [&str; 4] = [
    "/run/omerta",
    "/run/omerta-bpf",
    "/var/lib/omerta",
    "/var/lib/omerta/guest-pools.lock",
];

/// Everything that the demo set up, by name.
#[derive(Default)]
pub struct Leftovers {
    namespaces: Vec<(PathBuf, u64)>,
    /// Where the guards of each namespace would be pinned, and what another run had left there: the
    /// kernel uses the numbers of namespaces again.
    pins: Vec<(PathBuf, Vec<String>)>,
    paths: Vec<PathBuf>,
    /// The product's own places on this machine that were not there before.
    places: Vec<PathBuf>,
    links_before: Option<Vec<String>>,
}

impl Leftovers {
    /// Whether anything was set up.
    pub fn watched(&self) -> bool {
        !self.namespaces.is_empty() || !self.paths.is_empty()
    }

    /// Notes the machine's own interfaces and places, before the first change.
    pub fn note_machine(&mut self) {
        let new = PLACES
            .iter()
            .map(PathBuf::from)
            .filter(|path| !path.exists());
        self.places = new.collect();
        self.links_before = traces::entries(Path::new("/sys/class/net")).ok();
    }

    pub fn watch_namespace(&mut self, namespace: &Namespace) -> Result<()> {
        self.namespaces.push((namespace.path(), namespace.inode()?));
        self.watch_pins(traces::pins_of(namespace)?)
    }

    fn watch_pins(&mut self, directory: PathBuf) -> Result<()> {
        let before = traces::entries(&directory)?;
        self.pins.push((directory, before));
        Ok(())
    }

    /// The guards' pins of a namespace that this run has made and that are there.
    pub fn pins_of(&self, namespace: &Namespace) -> Result<Vec<String>> {
        let pins = traces::pins_of(namespace)?;
        let before = self.pins.iter().find(|(directory, _)| *directory == pins);
        let before = before.map_or(&[][..], |(_, before)| before);
        let now = traces::entries(&pins)?.into_iter();
        Ok(now.filter(|name| !before.contains(name)).collect())
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
        tell(report, "interface on the machine itself", &self.new_links());
        tell(report, "pin", &self.new_pins());
        tell(
            report,
            "file",
            &names(
                self.paths
                    .iter()
                    .chain(&self.places)
                    .filter(|path| path.exists()),
            ),
        );
    }

    fn new_links(&self) -> Vec<String> {
        let now = traces::entries(Path::new("/sys/class/net"));
        let (Some(before), Ok(now)) = (&self.links_before, now) else {
            return vec!["/sys/class/net cannot be read".to_owned()];
        };
        now.into_iter()
            .filter(|link| !before.contains(link))
            .collect()
    }

    fn new_pins(&self) -> Vec<String> {
        let mut new = Vec::new();
        for (directory, before) in &self.pins {
            match traces::entries(directory) {
                Ok(now) => {
                    let here = now.into_iter().filter(|name| !before.contains(name));
                    new.extend(here.map(|name| directory.join(name).display().to_string()));
                }
                Err(error) => new.push(format!("{error:#}")),
            }
            // A directory that was not there, or was empty, has nothing to stay for.
            if before.is_empty() && directory.exists() {
                new.push(directory.display().to_string());
            }
        }
        new
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
            let [command, environment] = ["cmdline", "environ"].map(|file| {
                let read = fs::read(process.path().join(file)).unwrap_or_default();
                String::from_utf8_lossy(&read).replace('\0', " ")
            });
            let inside = namespaces.iter().any(|name| Path::new(name) == namespace);
            let names = |path: &String| command.contains(path) || environment.contains(path);
            if inside || paths.iter().any(names) {
                found.push(format!("{pid} ({})", command.trim()));
            }
        }
        found
    }
}

fn names<'a>(paths: impl Iterator<Item = &'a PathBuf>) -> Vec<String> {
    paths.map(|path| path.display().to_string()).collect()
}

fn tell(report: &mut Report, kind: &str, left: &[String]) {
    if left.is_empty() {
        report.check(true, &format!("no {kind}"));
    } else {
        report.check(false, &format!("a {kind} is left: {}", few(left)));
    }
}

/// The first of `names`, and how many more there are.
pub fn few(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).map(String::as_str);
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_former_run_left_is_not_this_ones() {
        let directory = tempfile::tempdir().unwrap();
        let pins = directory.path().join("pins");
        fs::create_dir_all(pins.join("former")).unwrap();
        let mut leftovers = Leftovers::default();
        leftovers.watch_pins(pins.clone()).unwrap();
        assert_eq!(leftovers.new_pins(), [""; 0]);
        fs::create_dir(pins.join("new")).unwrap();
        let new = pins.join("new").display().to_string();
        assert_eq!(leftovers.new_pins(), [new]);
    }

    #[test]
    fn a_long_list_is_cut() {
        let names: Vec<_> = (1..=7).map(|number: u8| number.to_string()).collect();
        assert_eq!(few(&names[..5]), "1, 2, 3, 4, 5");
        assert_eq!(few(&names), "1, 2, 3, 4, 5 and 2 more");
    }
}
