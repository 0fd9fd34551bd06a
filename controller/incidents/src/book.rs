//! Writing the record: one writer, one line at a time, each on the disk before the next.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::read::{Fault, MAX_LINE, Problem, head_path, head_text, segment_path, segments, verify};
use crate::{Digest, Entry, What};

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of one segment; a line more where it has just begun.
    pub segment_bytes: u64,
    /// Segments, and one more that has just begun.
    pub segments: usize,
}

impl Bounds {
    /// So many bytes in all.
    pub const fn of_bytes(bytes: u64) -> Self {
        Self {
            segment_bytes: bytes / 9,
            segments: 8,
        }
    }
}

/// Why nothing was recorded.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// A file cannot be made, read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another process writes it.
    #[error("{} is being written by another process: end that one first", .0.display())]
    InUse(PathBuf),
    /// The entry cannot be a line.
    #[error("an entry of {0} bytes is too long")]
    TooLong(usize),
    /// The entry cannot be written as JSON.
    #[error("an entry cannot be encoded")]
    Encode(#[source] serde_json::Error),
}

impl BookError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

/// The record's one writer.
#[derive(Debug)]
pub struct Book {
    directory: PathBuf,
    bounds: Bounds,
    program: String,
    /// The numbers of the segments' first entries, oldest first.
    segments: VecDeque<u64>,
    /// The newest segment, with its length.
    file: Option<(File, u64)>,
    head: File,
    last: u64,
    hash: Digest,
    _lock: File,
}

impl Book {
    /// Opens the record in `directory`, which is made where it does not exist, for `program`. What is
    /// broken is put aside, and recorded as such; `at` is the time, RFC 3339.
    ///
    /// # Errors
    /// Where the directory cannot be made or written, or another process writes it.
    pub fn open(
        directory: &Path,
        bounds: Bounds,
        program: &str,
        at: &str,
    ) -> Result<Self, BookError> {
        make(directory)?;
        let lock = lock(directory)?;
        let mut damage = None;
        let found = match verify(directory) {
            Err(Fault {
                place,
                problem: Problem::Torn { bytes },
            }) => {
                // Its writer died: that line was never noted, unless it was cut.
                cut(&place, bytes)?;
                verify(directory)
            }
            found => found,
        };
        let (last, hash) = match found {
            Ok(found) => (found.last, found.hash),
            Err(fault) => {
                damage = Some(fault.to_string());
                put_aside(directory)?;
                (0, Digest::NONE)
            }
        };
        let found = segments(directory).map_err(BookError::io("read", directory))?;
        let head = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(head_path(directory))
            .map_err(BookError::io("open", &head_path(directory)))?;
        let mut book = Self {
            directory: directory.to_owned(),
            bounds,
            program: program.to_owned(),
            segments: found.iter().map(|(first, _)| *first).collect(),
            file: None,
            head,
            last,
            hash,
            _lock: lock,
        };
        if let Some((_, path)) = found.last() {
            let file = OpenOptions::new()
                .append(true)
                .open(path)
                .map_err(BookError::io("open", path))?;
            let length = file
                .metadata()
                .map_err(BookError::io("measure", path))?
                .len();
            book.file = Some((file, length));
        }
        book.note()?;
        if let Some(problem) = damage {
            book.append(at, What::Damaged { problem })?;
        }
        Ok(book)
    }

    /// Records `what` at the time `at`, RFC 3339. It is on the disk when this returns; returns its number.
    ///
    /// # Errors
    /// Where it cannot be written: nothing of it then stays.
    pub fn append(&mut self, at: &str, what: What) -> Result<u64, BookError> {
        while self.segments.len() > self.bounds.segments {
            self.remove_oldest(at)?;
        }
        let line = self.line(at, what)?;
        let full = self.file.as_ref().is_none_or(|(_, length)| {
            *length > 0 && length + line.len() as u64 > self.bounds.segment_bytes
        });
        if full {
            self.begin(self.last + 1)?;
        }
        self.write(&line)
    }

    /// The number and hash of the last entry.
    pub const fn last(&self) -> (u64, Digest) {
        (self.last, self.hash)
    }

    fn line(&self, at: &str, what: What) -> Result<Vec<u8>, BookError> {
        let entry = Entry {
            number: self.last + 1,
            previous: self.hash,
            at: at.to_owned(),
            program: self.program.clone(),
            what,
        };
        let mut line = serde_json::to_vec(&entry).map_err(BookError::Encode)?;
        if line.len() > MAX_LINE {
            return Err(BookError::TooLong(line.len()));
        }
        line.push(b'\n');
        Ok(line)
    }

    /// Begins a segment.
    fn begin(&mut self, first: u64) -> Result<(), BookError> {
        let path = segment_path(&self.directory, first);
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(BookError::io("make", &path))?;
        // What a failed attempt may have left of it.
        file.set_len(0).map_err(BookError::io("empty", &path))?;
        if self.segments.back() != Some(&first) {
            self.segments.push_back(first);
        }
        self.file = Some((file, 0));
        Ok(())
    }

    fn write(&mut self, line: &[u8]) -> Result<u64, BookError> {
        let path = self.segments.back().map_or_else(
            || self.directory.clone(),
            |first| segment_path(&self.directory, *first),
        );
        let Some((file, length)) = &mut self.file else {
            return Err(BookError::io("write", &path)(
                io::ErrorKind::NotFound.into(),
            ));
        };
        let written = file.write_all(line).and_then(|()| file.sync_data());
        if let Err(error) = written {
            // Half a line would break the chain. Where it cannot be cut now, it is at the next opening.
            let _ = file.set_len(*length);
            return Err(BookError::io("write", &path)(error));
        }
        *length += line.len() as u64;
        self.last += 1;
        self.hash = Digest::of(line.strip_suffix(b"\n").unwrap_or(line));
        self.note()?;
        Ok(self.last)
    }

    /// Notes which entry is the last. The file keeps its length, so that a full disk has room for it.
    fn note(&mut self) -> Result<(), BookError> {
        let text = head_text(self.last, self.hash);
        self.head
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.head.write_all(text.as_bytes()))
            .and_then(|()| self.head.sync_data())
            .map_err(BookError::io("write", &head_path(&self.directory)))
    }

    /// Removes the oldest segment, once the record says so.
    fn remove_oldest(&mut self, at: &str) -> Result<(), BookError> {
        let (Some(&oldest), Some(&next)) = (self.segments.front(), self.segments.get(1)) else {
            return Ok(());
        };
        let hash = previous_of(&segment_path(&self.directory, next))?;
        let through = next - 1;
        let line = self.line(at, What::Removed { through, hash })?;
        self.write(&line)?;
        let path = segment_path(&self.directory, oldest);
        fs::remove_file(&path).map_err(BookError::io("remove", &path))?;
        self.segments.pop_front();
        Ok(())
    }
}

/// What the first entry of a segment says of the one before it.
fn previous_of(path: &Path) -> Result<Digest, BookError> {
    let read = || {
        let file = File::open(path)?;
        let first: Entry = serde_json::Deserializer::from_reader(io::BufReader::new(file))
            .into_iter()
            .next()
            .ok_or(io::ErrorKind::UnexpectedEof)??;
        io::Result::Ok(first.previous)
    };
    read().map_err(BookError::io("read", path))
}

fn make(directory: &Path) -> Result<(), BookError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(BookError::io("make", directory))
}

fn lock(directory: &Path) -> Result<File, BookError> {
    let path = directory.join("lock");
    let lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(BookError::io("open", &path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(BookError::InUse(directory.to_owned())),
        Err(TryLockError::Error(error)) => Err(BookError::io("lock", &path)(error)),
    }
}

/// Takes the last `bytes` off a segment.
fn cut(path: &Path, bytes: u64) -> Result<(), BookError> {
    let cut = || {
        let file = OpenOptions::new().write(true).open(path)?;
        let length = file.metadata()?.len();
        file.set_len(length.saturating_sub(bytes))
    };
    cut().map_err(BookError::io("mend", path))
}

/// Keeps a broken record for whoever looks into it, out of the way of a new one.
fn put_aside(directory: &Path) -> Result<(), BookError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let aside = directory.join(format!("damaged-{}", now.unwrap_or_default().as_nanos()));
    make(&aside)?;
    let kept = segments(directory).map_err(BookError::io("read", directory))?;
    let head = [head_path(directory)];
    let files = kept.iter().map(|(_, path)| path).chain(&head);
    for path in files {
        let Some(name) = path.file_name() else {
            continue;
        };
        match fs::rename(path, aside.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(BookError::io("put aside", path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}
