//! The hierarchies of cgroups that this process is in, and where in them guests' are made. Version 2 where
//! its controllers are, version 1 where they are still there.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;

use super::Part;
use crate::PathError;

/// Where mounts and our own cgroups are listed.
const MOUNTS: &str = "/proc/self/mountinfo";
const OWN: &str = "/proc/self/cgroup";

/// Where whoever is in a cgroup that is divided goes: version 2 has processes in leaves alone.
const LEAF: &str = "omertad";

/// The unit whose cgroup is for guests, beside omertad's own.
const GUESTS_UNIT: &str = "omerta-guests.service";

pub(super) const PARTS: [Part; 4] = [Part::Cpu, Part::Memory, Part::Pids, Part::Io];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

/// A cgroup in which guests' are made, and what can be limited there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) directory: PathBuf,
    pub(super) version: Version,
    pub(super) parts: Vec<Part>,
}

/// Where guests' cgroups are made. Found once; on version 2 this moves the process into a leaf.
pub(super) fn bases() -> Result<Vec<Base>, PathError> {
    static FOUND: Mutex<Option<Vec<Base>>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(bases) = &*found {
        return Ok(bases.clone());
    }
    let mut bases = Vec::new();
    for hierarchy in own_hierarchies()? {
        let taken: Vec<Part> = bases
            .iter()
            .flat_map(|base: &Base| base.parts.clone())
            .collect();
        if let Some(base) = hierarchy.base(&taken)? {
            bases.push(base);
        }
    }
    *found = Some(bases.clone());
    Ok(bases)
}

/// This process's cgroup in each hierarchy that is mounted.
pub(super) fn own_hierarchies() -> Result<Vec<Own>, PathError> {
    let read =
        |path: &str| fs::read_to_string(path).map_err(PathError::of("read", Path::new(path)));
    Ok(own_cgroups(&read(MOUNTS)?, &read(OWN)?))
}

/// The parts that this host's controllers give. Looks, and changes nothing.
pub(super) fn host_parts() -> Result<BTreeSet<Part>, PathError> {
    let read = |path: &Path| fs::read_to_string(path).map_err(PathError::of("read", path));
    let mut parts = BTreeSet::new();
    for own in own_hierarchies()? {
        let controllers = match own.controllers {
            Some(controllers) => controllers,
            None => {
                let text = read(&own.mount.join("cgroup.controllers"))?;
                text.split_whitespace().map(str::to_owned).collect()
            }
        };
        parts.extend(parts_of(&controllers, &[]));
    }
    Ok(parts)
}

/// The parts that `controllers` give, without those that are taken.
fn parts_of(controllers: &[String], taken: &[Part]) -> Vec<Part> {
    let has = |part: &Part| {
        let names = [part.word(), "blkio"];
        let names = if *part == Part::Io {
            &names[..]
        } else {
            &names[..1]
        };
        !taken.contains(part) && controllers.iter().any(|c| names.contains(&c.as_str()))
    };
    PARTS.into_iter().filter(has).collect()
}

/// This process's cgroup in one hierarchy.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Own {
    pub(super) mount: PathBuf,
    directory: PathBuf,
    /// Of version 1; version 2 says itself.
    controllers: Option<Vec<String>>,
}

impl Own {
    /// Where guests' cgroups go, for the parts that no other hierarchy has taken.
    fn base(self, taken: &[Part]) -> Result<Option<Base>, PathError> {
        let parts_of = |controllers: &[String]| parts_of(controllers, taken);
        let base = match &self.controllers {
            Some(controllers) => Base {
                parts: parts_of(controllers),
                directory: self.directory,
                version: Version::One,
            },
            None => {
                let words = |path: PathBuf| -> Result<Vec<String>, PathError> {
                    let text = fs::read_to_string(&path).map_err(PathError::of("read", &path))?;
                    Ok(text.split_whitespace().map(str::to_owned).collect())
                };
                let wanted = parts_of(&words(self.mount.join("cgroup.controllers"))?);
                if wanted.is_empty() {
                    return Ok(None);
                }
                let directory = self.divided(&wanted)?;
                let enabled = words(directory.join("cgroup.subtree_control"))?;
                Base {
                    parts: parts_of(&enabled),
                    directory,
                    version: Version::Two,
                }
            }
        };
        Ok((!base.parts.is_empty()).then_some(base))
    }

    /// The cgroup of version 2 that can have guests' below it: as a service that of the unit which is there
    /// for them, or that of our own unit whose leaf we are in (`DelegateSubgroup=`); else our own where we are
    /// alone in it, else the uppermost. A service manager that puts us into our unit's own cgroup could not
    /// do so again while guests divide it.
    fn divided(&self, parts: &[Part]) -> Result<PathBuf, PathError> {
        let processes = self.directory.join("cgroup.procs");
        let alone = std::process::id().to_string();
        let unit = self.directory.parent().filter(|unit| {
            self.directory.ends_with(LEAF) && unit.starts_with(&self.mount) && *unit != self.mount
        });
        let is_service = std::env::var_os("INVOCATION_ID").is_some();
        let for_guests = self.directory.parent().map(|slice| slice.join(GUESTS_UNIT));
        let for_guests = for_guests.filter(|directory| is_service && directory.is_dir());
        let directory = if let Some(for_guests) = &for_guests {
            vacate(for_guests)?;
            for_guests
        } else if let Some(unit) = unit {
            unit
        } else if self.directory != self.mount
            && !is_service
            && fs::read_to_string(&processes).is_ok_and(|all| all.trim() == alone)
        {
            vacate(&self.directory)?;
            &self.directory
        } else {
            &self.mount
        };
        // One by one: what cannot be had is told as missing, with the rest in force.
        let control = directory.join("cgroup.subtree_control");
        for part in parts {
            let enabled = OpenOptions::new()
                .write(true)
                .open(&control)
                .and_then(|mut file| file.write_all(format!("+{part}").as_bytes()));
            if let Err(error) = enabled {
                tracing::warn!(path = %control.display(), %part, %error, "cannot have a controller");
            }
        }
        Ok(directory.to_owned())
    }
}

/// Puts everybody in a cgroup into a leaf of it, so that it can be divided.
fn vacate(directory: &Path) -> Result<(), PathError> {
    let inside = directory.join("cgroup.procs");
    let pids = fs::read_to_string(&inside).map_err(PathError::of("read", &inside))?;
    if pids.is_empty() {
        return Ok(());
    }
    let leaf = directory.join(LEAF);
    match fs::create_dir(&leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(PathError::of("create", &leaf)(error));
        }
        _ => {}
    }
    let door = leaf.join("cgroup.procs");
    for pid in pids.lines() {
        match fs::write(&door, pid) {
            // It has ended.
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {}
            written => written.map_err(PathError::of("write", &door))?,
        }
    }
    Ok(())
}

/// This process's cgroups, from /proc/self/mountinfo and /proc/self/cgroup: version 1 first, whose
/// controllers version 2 cannot have. See cgroups(7), proc_pid_mountinfo(5).
fn own_cgroups(mounts: &str, own: &str) -> Vec<Own> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let (&[_, _, _, root, mount, ..], &[kind, _, options, ..]) = (&*before, &*after) else {
            continue;
        };
        let is_two = kind == "cgroup2";
        if !is_two && kind != "cgroup" {
            continue;
        }
        let options: Vec<&str> = options.split(',').collect();
        let path = own.lines().find_map(|line| {
            let (_, line) = line.split_once(':')?;
            let (controllers, path) = line.split_once(':')?;
            let is_this = match (is_two, controllers) {
                (true, controllers) => controllers.is_empty(),
                (false, "") => false,
                (false, controllers) => controllers.split(',').all(|c| options.contains(&c)),
            };
            is_this.then_some(path)
        });
        // Out of what is mounted: of another namespace, and not ours to divide.
        let Some(below) = path.and_then(|path| Path::new(path).strip_prefix(root).ok()) else {
            continue;
        };
        let own = Own {
            mount: mount.into(),
            directory: Path::new(mount).join(below),
            controllers: (!is_two).then(|| options.iter().map(|o| (*o).to_owned()).collect()),
        };
        // A hierarchy may be mounted at several places.
        if !found.iter().any(|o: &Own| o.controllers == own.controllers) {
            found.push(own);
        }
    }
    found.sort_by_key(|own| own.controllers.is_none());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "\
        30 24 0:26 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n\
        31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        32 24 0:27 / /elsewhere rw - cgroup cgroup rw,memory\n";
    const TWO: &str = "25 24 0:22 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn hierarchies_of_both_versions_are_found_once_each_and_version_one_first() {
        let mounts = [TWO, ONE].concat();
        let own = "4:memory:/a\n3:cpu,cpuacct:/a/b\n1:name=systemd:/c\n0::/system.slice/omertad.service\n";
        let found = own_cgroups(&mounts, own);
        let places: Vec<_> = found
            .iter()
            .map(|own| own.directory.to_str().unwrap())
            .collect();
        assert_eq!(
            places,
            [
                "/sys/fs/cgroup/cpu,cpuacct/a/b",
                "/sys/fs/cgroup/memory/a",
                "/sys/fs/cgroup/system.slice/omertad.service"
            ]
        );
        let given = |own: &Own| parts_of(own.controllers.as_deref().unwrap_or_default(), &[]);
        assert_eq!(given(&found[0]), [Part::Cpu]);
        assert_eq!(given(&found[1]), [Part::Memory]);
        assert_eq!(found[2].controllers, None);
    }

    #[test]
    fn cgroup_out_of_what_is_mounted_is_not_ours_to_divide() {
        let mounts = TWO.replace("/ /sys", "/container /sys");
        assert_eq!(own_cgroups(&mounts, "0::/another\n"), []);
        let found = own_cgroups(&mounts, "0::/container/inside\n");
        assert_eq!(found[0].directory, Path::new("/sys/fs/cgroup/inside"));
    }

    #[test]
    fn lines_that_are_none_are_passed_over() {
        for mounts in [
            "",
            "\n",
            " - ",
            "a b - cgroup2",
            "1 2 3 / /x rw - ext4 /dev/x rw\n",
        ] {
            assert_eq!(own_cgroups(mounts, "0::/\n:\nx\n"), []);
        }
        assert_eq!(own_cgroups(TWO, "no line of it"), []);
    }
}
