//! What the kernel itself knows of a guard, asked past omerta: its pins in bpffs, and the ids of
//! its programs and links.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use aya::programs::{ProgramInfo, loaded_links, loaded_programs};
use omerta_test_support::Namespace;

use crate::interrupt;

/// How long the kernel may take to free what nobody holds any more.
const GRACE: Duration = Duration::from_secs(3);

/// Where the guards of one namespace are pinned.
pub fn pins_of(namespace: &Namespace) -> Result<PathBuf> {
    Ok(Path::new("/sys/fs/bpf/omerta").join(namespace.inode()?.to_string()))
}

/// The names in a directory; none where it does not exist.
pub fn entries(directory: &Path) -> Result<Vec<String>> {
    let listed = match fs::read_dir(directory) {
        Ok(listed) => listed,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot list {}", directory.display()));
        }
    };
    let names = listed.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names
        .collect::<std::io::Result<_>>()
        .with_context(|| format!("cannot list {}", directory.display()))
}

/// A guard as the kernel has it.
pub struct Traces {
    pins: PathBuf,
    programs: Vec<u32>,
    links: Vec<u32>,
}

impl Traces {
    /// Finds the guard of an interface. One that cannot be found cannot be seen to go either.
    pub fn find(namespace: &Namespace, interface: &str) -> Result<Self> {
        let pins = pins_of(namespace)?.join(interface);
        let names = entries(&pins)?;
        // Filters of a clsact qdisc are no links; they go with their interface.
        let by_links = !names.iter().any(|name| name == "clsact");
        let mut programs = Vec::new();
        for name in names {
            if name.starts_with("program_") {
                let info = ProgramInfo::from_pin(pins.join(&name));
                programs.push(info.with_context(|| format!("cannot ask for {name}"))?.id());
            }
        }
        let links = loaded_links().flatten();
        let links = links.filter(|link| programs.contains(&link.program_id()));
        let links: Vec<_> = links.map(|link| link.id()).collect();
        let found = Self {
            pins,
            programs,
            links,
        };
        if found.programs.len() != 2 || found.programs_loaded() != found.programs {
            bail!("no two programs are pinned in {}", found.pins.display());
        }
        if by_links && found.links.len() != 2 {
            bail!(
                "{} links hold the programs pinned in {}, and not two",
                found.links.len(),
                found.pins.display()
            );
        }
        Ok(found)
    }

    /// The guard's programs and links by their ids.
    pub fn describe(&self) -> String {
        let list = |ids: &[u32]| {
            ids.iter()
                .map(u32::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        };
        format!(
            "programs {}; links {}",
            list(&self.programs),
            list(&self.links)
        )
    }

    /// What of it is still there, after a moment's grace.
    pub fn left(&self) -> Result<Vec<String>> {
        let deadline = std::time::Instant::now() + GRACE;
        loop {
            let left = self.left_now()?;
            if left.is_empty() || std::time::Instant::now() >= deadline {
                return Ok(left);
            }
            interrupt::sleep(Duration::from_millis(20))?;
        }
    }

    fn left_now(&self) -> Result<Vec<String>> {
        let mut left = Vec::new();
        if self.pins.try_exists()? {
            left.push(format!("{}", self.pins.display()));
        }
        for id in self.programs_loaded() {
            left.push(format!("program {id}"));
        }
        // One that goes while the kernel lists it is none.
        for link in loaded_links().flatten() {
            if self.links.contains(&link.id()) {
                left.push(format!("link {}", link.id()));
            }
        }
        Ok(left)
    }

    fn programs_loaded(&self) -> Vec<u32> {
        let loaded: Vec<_> = loaded_programs()
            .flatten()
            .map(|program| program.id())
            .collect();
        let is_loaded = |id: &&u32| loaded.contains(id);
        self.programs.iter().filter(is_loaded).copied().collect()
    }
}
