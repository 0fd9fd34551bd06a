//! The machine's whole file system: busybox, `ip`, the modules and the test executables, as a
//! cpio archive of the "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::kernel::Kernel;
use crate::package;
use crate::suite::{self, Suite};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const INIT: &[u8] = include_bytes!("../init");

/// Writes the archive to `path`.
pub fn build(kernel: &Kernel, suites: &[Suite], environment: &str, path: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(path)?));
    archive.file("init", INIT)?;
    archive.file("environment", environment.as_bytes())?;
    archive.file("bin/busybox", &fs::read(&kernel.busybox)?)?;
    let mut order = String::new();
    for (name, bytes) in &kernel.modules {
        archive.file(&format!("modules/{name}.ko"), bytes)?;
        order += &format!("{name}\n");
    }
    archive.file("modules/order", order.as_bytes())?;

    // What the tests call. busybox knows `ip` in part; this one goes before it.
    let mut libraries = BTreeSet::new();
    for program in ["ip", "tc", "bridge", "ethtool", "wg"] {
        let path = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
            .map(|directory| Path::new(directory).join(program))
            .into_iter()
            .find(|path| path.exists())
            .with_context(|| format!("{program} is missing: run 'make setup'"))?;
        archive.file(&format!("bin/{program}"), &fs::read(&path)?)?;
        libraries.extend(self::libraries(&path)?);
    }
    let mut order = String::new();
    for suite in suites {
        // A quarter of the size; strip can only write to a file.
        let stripped = path.with_extension("stripped");
        package::run(
            Command::new("strip")
                .args(["-S", "-o"])
                .args([&stripped, &suite.path]),
        )?;
        let bytes = fs::read(&stripped)?;
        fs::remove_file(&stripped)?;
        archive.file(&format!("tests/{}", suite.name), &bytes)?;
        let arguments = suite::arguments(&kernel.series, &suite.name);
        order += &format!("{}{arguments}\n", suite.name);
        libraries.extend(self::libraries(&suite.path)?);
    }
    archive.file("tests/order", order.as_bytes())?;
    for library in libraries {
        let name = library.to_string_lossy();
        archive.file(name.trim_start_matches('/'), &fs::read(&library)?)?;
    }
    archive.finish()?;
    Ok(())
}

/// The loader and the libraries of a program, as this host's loader finds them.
fn libraries(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let listed = package::run(Command::new("ldd").arg(program))?;
    let listed = String::from_utf8_lossy(&listed).into_owned();
    let paths = listed.lines().filter_map(|line| {
        let path = line.split_whitespace().find(|word| word.starts_with('/'))?;
        Some(PathBuf::from(path))
    });
    Ok(paths.collect())
}

struct Archive<W> {
    out: W,
    directories: BTreeSet<String>,
    written: usize,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            directories: BTreeSet::new(),
            written: 0,
            inode: 0,
        }
    }

    /// Adds an executable file, and the directories above it.
    fn file(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            if self.directories.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY, &[])?;
            }
        }
        self.entry(path, PROGRAM, bytes)
    }

    fn finish(mut self) -> io::Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()
    }

    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(bytes.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let name_size = name.len() as u32 + 1;
        let mut header = String::from("070701");
        // ino, mode, uid, gid, nlink, mtime, filesize, dev (2), rdev (2), namesize, check.
        for field in [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0,
        ] {
            header += &format!("{field:08x}");
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(bytes)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..missing])
    }
}
