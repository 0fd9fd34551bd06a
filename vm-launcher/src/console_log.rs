//! What a guest's serial console has printed: a log that QEMU appends to by a descriptor, and the one before it.
//!
//! QEMU goes on without a launcher, so it writes the log itself, and cannot be given another file. A log that
//! has grown long is therefore copied to the one before it and cut to nothing; QEMU appends, and so goes on at
//! the start. What a guest prints between the last look at the log and the cut, microseconds, is lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::console_watch::{ConsoleReport, ConsoleWatch};

/// From this length on a log becomes the one before.
const LONG: u64 = 4 << 20;
/// How often what was printed meanwhile is copied too, before the log is cut.
const ROUNDS: u32 = 8;
/// How often a log is read that is cut meanwhile.
const TRIES: u32 = 3;
/// How much of what was printed since the last look is read; what was printed before that is not.
const MOST_READ: u64 = 256 << 10;

/// The log of a guest's console.
#[derive(Clone, Debug)]
pub struct ConsoleLog {
    path: PathBuf,
}

impl ConsoleLog {
    /// The one whose file is `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The file of what was printed before what is in the log.
    pub(crate) fn before(&self) -> PathBuf {
        self.with_suffix(".1")
    }

    /// Where a copy is made.
    pub(crate) fn copying(&self) -> PathBuf {
        self.with_suffix(".new")
    }

    fn with_suffix(&self, suffix: &str) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    /// How much is in it.
    pub(crate) fn length(&self) -> u64 {
        fs::symlink_metadata(&self.path).map_or(0, |log| log.len())
    }

    /// Whether it is time to rotate it.
    pub(crate) fn is_long(&self) -> bool {
        self.length() >= LONG
    }

    /// Has what is in the log be what was before it, at most the last [`LONG`] bytes and what is printed
    /// meanwhile, and begins the log anew. Killed at any point it has lost nothing.
    pub(crate) fn rotate(&self) -> io::Result<()> {
        let mut log = open(OpenOptions::new().read(true).write(true), &self.path)?;
        let copying = self.copying();
        let mut anew = OpenOptions::new();
        anew.write(true).create(true).truncate(true).mode(0o600);
        let mut copy = open(&mut anew, &copying)?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LONG)))?;
        // What a guest prints as fast as it can has no end.
        let mut most = 2 * LONG;
        for _ in 0..ROUNDS {
            match io::copy(&mut Read::by_ref(&mut log).take(most), &mut copy)? {
                0 => break,
                copied => most = most.saturating_sub(copied),
            }
        }
        fs::rename(&copying, self.before())?;
        io::copy(&mut Read::by_ref(&mut log).take(most), &mut copy)?;
        log.set_len(0)
    }

    /// The last `most` bytes that were printed.
    ///
    /// # Errors
    /// When the log is not there, or is no file.
    pub fn end(&self, most: u64) -> io::Result<Vec<u8>> {
        let mut end = Vec::new();
        for _ in 0..TRIES {
            let (log, length) = end_of(&self.path, most)?;
            let rest = most.saturating_sub(log.len() as u64);
            end = match end_of(&self.before(), rest) {
                Ok((before, _)) if rest > 0 => before,
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => Vec::new(),
            };
            end.extend(log);
            // Where it was rotated meanwhile, what was read is neither the one nor the other.
            if fs::metadata(&self.path)?.len() >= length {
                break;
            }
        }
        Ok(end)
    }
}

/// Reads on in a log where it has stopped, and listens to what the guest's firewall says there.
#[derive(Debug)]
pub(crate) struct ConsoleReader {
    log: ConsoleLog,
    /// How far it has read.
    at: u64,
    watch: ConsoleWatch,
}

impl ConsoleReader {
    /// One that reads what is printed from now on.
    pub(crate) fn of(log: ConsoleLog) -> Self {
        let at = log.length();
        Self {
            log,
            at,
            watch: ConsoleWatch::default(),
        }
    }

    /// Reads what was printed since, and rotates the log where it is time to. What is to be told of it.
    pub(crate) fn look(&mut self) -> io::Result<Option<ConsoleReport>> {
        let read = self.read();
        // A log that cannot be read is held to its length all the same.
        if self.log.is_long() {
            self.log.rotate()?;
            self.at = 0;
        }
        read.map(|()| self.watch.take())
    }

    fn read(&mut self) -> io::Result<()> {
        let mut file = open(OpenOptions::new().read(true), &self.log.path)?;
        let length = file.metadata()?.len();
        if length < self.at {
            self.at = 0;
        }
        let skipped = length.saturating_sub(MOST_READ).saturating_sub(self.at);
        if skipped > 0 {
            self.watch.skipped(skipped);
            self.at += skipped;
        }
        file.seek(SeekFrom::Start(self.at))?;
        // What a guest prints meanwhile is for the next look.
        let mut file = file.take(length - self.at);
        let mut buffer = [0; 8192];
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                return Ok(());
            }
            self.watch.receive(buffer.get(..read).unwrap_or_default());
            self.at += read as u64;
        }
    }
}

/// The end of one file, and the file's length.
fn end_of(path: &Path, most: u64) -> io::Result<(Vec<u8>, u64)> {
    let mut file = open(OpenOptions::new().read(true), path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok((bytes, length))
}

/// Opens a regular file: whatever else is in its place is not followed, nor waited for.
fn open(how: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = how
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is no regular file"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A log, and it open as QEMU has it.
    fn log() -> (tempfile::TempDir, ConsoleLog, File) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let mut how = OpenOptions::new();
        let file = how.create_new(true).append(true).open(&path).unwrap();
        (directory, ConsoleLog::at(path), file)
    }

    fn sizes(log: &ConsoleLog) -> [u64; 2] {
        [log.before(), log.path.clone()].map(|path| fs::metadata(path).map_or(0, |file| file.len()))
    }

    #[test]
    fn what_was_printed_is_read_across_a_rotation_and_none_of_it_twice() {
        let (_directory, log, mut file) = log();
        file.write_all(b"first ").unwrap();
        assert_eq!(log.end(100).unwrap(), b"first ");
        log.rotate().unwrap();
        assert_eq!(log.end(100).unwrap(), b"first ");
        file.write_all(b"second").unwrap();
        assert_eq!(log.end(100).unwrap(), b"first second");
        assert_eq!(log.end(8).unwrap(), b"t second");
        assert_eq!(log.end(6).unwrap(), b"second");
        log.rotate().unwrap();
        assert_eq!(log.end(100).unwrap(), b"second");
    }

    #[test]
    fn logs_are_bounded_however_much_was_printed_and_their_end_is_kept() {
        let (_directory, log, mut file) = log();
        assert!(!log.is_long());
        file.write_all(&vec![b'a'; 5 << 20]).unwrap();
        file.write_all(b"end").unwrap();
        assert!(log.is_long());
        log.rotate().unwrap();
        assert_eq!(sizes(&log), [LONG, 0]);
        assert_eq!(log.end(5).unwrap(), b"aaend");
        file.write_all(&vec![b'b'; 30 << 20]).unwrap();
        log.rotate().unwrap();
        assert_eq!(sizes(&log), [LONG, 0]);
    }

    #[test]
    fn a_reader_hears_each_line_once_also_where_the_log_is_rotated() {
        let (_directory, log, mut file) = log();
        file.write_all(b"ROGUE-ATTEMPT: before\n").unwrap();
        let mut reader = ConsoleReader::of(log.clone());
        assert_eq!(reader.look().unwrap(), None);
        file.write_all(b"ROGUE-ATT").unwrap();
        assert_eq!(reader.look().unwrap(), None);
        file.write_all(b"EMPT: one\n").unwrap();
        assert_eq!(reader.look().unwrap().unwrap().line, "one");
        assert_eq!(reader.look().unwrap(), None);
        file.write_all(&vec![b'x'; 5 << 20]).unwrap();
        file.write_all(b"\nROGUE-ATTEMPT: two\n").unwrap();
        let heard = reader.look().unwrap().unwrap();
        assert_eq!((heard.attempts, heard.line.as_str()), (2, "two"));
        assert_eq!(heard.unread, (5 << 20) + 20 - MOST_READ);
        assert_eq!(sizes(&log)[1], 0);
        file.write_all(b"ROGUE-ATTEMPT: three\nROGUE-ATTEMPT: four\n")
            .unwrap();
        let heard = reader.look().unwrap().unwrap();
        assert_eq!((heard.attempts, heard.line.as_str()), (4, "four"));
    }

    #[test]
    fn a_guest_that_prints_as_fast_as_it_can_keeps_no_rotation_from_ending() {
        let (_directory, log, mut file) = log();
        let is_over = AtomicBool::new(false);
        std::thread::scope(|threads| {
            threads.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    file.write_all(&[b'x'; 4096]).unwrap();
                }
            });
            for _ in 0..20 {
                log.rotate().unwrap();
                let [before, _] = sizes(&log);
                assert!(before <= 3 * LONG, "{before}");
                let end = log.end(1 << 20).unwrap();
                assert!(end.iter().all(|byte| *byte == b'x'));
            }
            is_over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn what_is_no_file_is_neither_read_nor_written_through() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        let log = ConsoleLog::at(&path);
        assert_eq!(log.end(1).unwrap_err().kind(), io::ErrorKind::NotFound);
        let precious = directory.path().join("precious");
        fs::write(&precious, "data").unwrap();
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        log.rotate().unwrap_err();
        log.end(9).unwrap_err();
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        log.rotate().unwrap_err();
        log.end(9).unwrap_err();
        assert_eq!(fs::read(&precious).unwrap(), b"data");
    }
}
