//! Reading the record, and proving that it is whole.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::{Digest, Entry, What};

/// The longest line that is written or taken, in bytes, without its line break.
pub(crate) const MAX_LINE: usize = 256 << 10;
/// How number and hash of the last entry stand in the file `head`: of one length, so that writing it again
/// needs no room.
const HEAD_BYTES: u64 = 20 + 1 + 64 + 1;

/// A record that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The number of the first entry that is kept; 0 where there is none.
    pub first: u64,
    /// The number of the last; 0 where there is none.
    pub last: u64,
    /// The hash of the last.
    pub hash: Digest,
    /// Damage that the writer itself has found and recorded, with the entries' numbers.
    pub damage: Vec<(u64, String)>,
    /// Entries that could not be written.
    pub lost: u64,
}

/// Where a record is broken.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", place.display())]
pub struct Fault {
    /// Which file.
    pub place: PathBuf,
    /// What is wrong.
    #[source]
    pub problem: Problem,
}

/// What is wrong with a record.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    /// A line is no entry.
    #[error("line {line} is no entry: {why}")]
    NoEntry {
        /// Counted from 1.
        line: u64,
        /// Why not.
        why: String,
    },
    /// The last line has no end: its writer died, or it was cut.
    #[error("its last line, {bytes} bytes, is cut short")]
    Torn {
        /// How many there are of it.
        bytes: u64,
    },
    /// A line is not the one that follows.
    #[error(
        "line {line} is entry {found} where entry {expected} was expected: entries are missing, or were exchanged"
    )]
    Number {
        /// Counted from 1.
        line: u64,
        /// What number it has.
        found: u64,
        /// What number it should have.
        expected: u64,
    },
    /// A line does not follow from the one before.
    #[error(
        "entry {number} does not follow from the one before it: that one was altered, or this one was put in"
    )]
    Chain {
        /// Of the later one.
        number: u64,
    },
    /// The record begins in the midst, and does not say why.
    #[error(
        "the record begins with entry {first}, and no entry says that those before were removed"
    )]
    Beginning {
        /// The first entry's number.
        first: u64,
    },
    /// The end is missing.
    #[error(
        "the record ends with entry {last}, and entry {noted} was noted as the last: entries were cut off, or the note was"
    )]
    Cut {
        /// The last entry's number.
        last: u64,
        /// The number that was noted.
        noted: u64,
    },
    /// The last entry that was noted is another.
    #[error("entry {number} is not the one that was noted: it was altered")]
    Head {
        /// Which.
        number: u64,
    },
    /// What is noted of the last entry cannot be read.
    #[error("is no number and hash: it was altered")]
    NoHead,
}

/// The segments of the record, oldest first, with the number of the first entry that each should have.
pub(crate) fn segments(directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut segments = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(".ndjson"))
            .and_then(|name| name.parse().ok());
        if let Some(number) = number {
            segments.push((number, path));
        }
    }
    segments.sort();
    Ok(segments)
}

pub(crate) fn segment_path(directory: &Path, first: u64) -> PathBuf {
    directory.join(format!("{first:020}.ndjson"))
}

pub(crate) fn head_path(directory: &Path) -> PathBuf {
    directory.join("head")
}

pub(crate) fn head_text(number: u64, hash: Digest) -> String {
    format!("{number:020} {hash}\n")
}

/// Number and hash of the last entry, as they were noted; `None` where nothing is noted.
pub(crate) fn head(directory: &Path) -> Result<Option<(u64, Digest)>, Problem> {
    let file = match File::open(head_path(directory)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut text = String::new();
    file.take(HEAD_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|_| Problem::NoHead)?;
    let parsed = text
        .strip_suffix('\n')
        .and_then(|line| line.split_once(' '))
        .and_then(|(number, hash)| Some((number.parse().ok()?, hash.parse().ok()?)));
    match parsed {
        Some((number, hash)) if head_text(number, hash) == text => Ok(Some((number, hash))),
        _ => Err(Problem::NoHead),
    }
}

/// Hands every entry to `each`, oldest first, and proves meanwhile that the record is whole.
///
/// # Errors
/// The first fault; what came before it has been handed over.
pub fn read(directory: &Path, mut each: impl FnMut(&Entry)) -> Result<Verified, Fault> {
    let fault = |place: &Path| {
        let place = place.to_owned();
        move |problem: Problem| Fault { place, problem }
    };
    let segments = segments(directory).map_err(|e| fault(directory)(e.into()))?;
    let head_place = head_path(directory);
    let head = head(directory).map_err(fault(&head_place))?;
    let mut state = Chained::default();
    for (first, path) in &segments {
        state
            .segment(*first, path, head, &mut each)
            .map_err(fault(path))?;
    }
    state.end(head).map_err(|problem| {
        let last = segments.last().map_or(directory, |(_, path)| path);
        fault(last)(problem)
    })
}

/// Proves that the record is whole.
///
/// # Errors
/// The first fault.
pub fn verify(directory: &Path) -> Result<Verified, Fault> {
    read(directory, |_| {})
}

/// How far the record has been followed.
struct Chained {
    first: u64,
    last: u64,
    hash: Digest,
    /// What the first entry says of the one before it.
    before: Digest,
    removed: bool,
    noted_seen: bool,
    damage: Vec<(u64, String)>,
    lost: u64,
}

impl Default for Chained {
    fn default() -> Self {
        Self {
            first: 0,
            last: 0,
            hash: Digest::NONE,
            before: Digest::NONE,
            removed: false,
            noted_seen: false,
            damage: Vec::new(),
            lost: 0,
        }
    }
}

impl Chained {
    fn segment(
        &mut self,
        first: u64,
        path: &Path,
        head: Option<(u64, Digest)>,
        each: &mut impl FnMut(&Entry),
    ) -> Result<(), Problem> {
        let mut lines = BufReader::new(File::open(path)?);
        let mut line = Vec::new();
        for count in 1.. {
            line.clear();
            let most = MAX_LINE as u64 + 1;
            if (&mut lines).take(most).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            if line.pop() != Some(b'\n') {
                let bytes = line.len() as u64 + 1;
                return Err(if bytes > MAX_LINE as u64 {
                    let why = "it is too long".to_owned();
                    Problem::NoEntry { line: count, why }
                } else {
                    Problem::Torn { bytes }
                });
            }
            let entry: Entry = serde_json::from_slice(&line).map_err(|e| Problem::NoEntry {
                line: count,
                why: e.to_string(),
            })?;
            let named = count > 1 || entry.number == first;
            let expected = if self.last > 0 { self.last + 1 } else { first };
            if !named || entry.number != expected {
                return Err(Problem::Number {
                    line: count,
                    found: entry.number,
                    expected,
                });
            }
            self.take(&entry, Digest::of(&line), head)?;
            each(&entry);
        }
        Ok(())
    }

    fn take(
        &mut self,
        entry: &Entry,
        hash: Digest,
        head: Option<(u64, Digest)>,
    ) -> Result<(), Problem> {
        let number = entry.number;
        if self.last == 0 {
            (self.first, self.before) = (number, entry.previous);
        } else if entry.previous != self.hash {
            return Err(Problem::Chain { number });
        }
        match &entry.what {
            What::Removed { through, hash } => {
                self.removed |= through + 1 == self.first && *hash == self.before;
            }
            What::Damaged { problem } => self.damage.push((number, problem.clone())),
            What::Lost { entries } => self.lost += entries,
            What::Incident(_) | What::Outcome(_) => {}
        }
        if head.is_some_and(|(noted, _)| noted == number) {
            if head != Some((number, hash)) {
                return Err(Problem::Head { number });
            }
            self.noted_seen = true;
        }
        (self.last, self.hash) = (number, hash);
        Ok(())
    }

    fn end(self, head: Option<(u64, Digest)>) -> Result<Verified, Problem> {
        let begins = self.last == 0 || (self.first == 1 && self.before == Digest::NONE);
        if !begins && !self.removed {
            return Err(Problem::Beginning { first: self.first });
        }
        // The writer notes each entry once it is written: the last may not have been.
        let (noted, is_noted) = match head {
            None => (0, self.last == 0),
            Some((0, _)) => (0, self.last <= 1),
            Some((noted, _)) => (noted, self.noted_seen),
        };
        if !is_noted {
            return Err(Problem::Cut {
                last: self.last,
                noted,
            });
        }
        Ok(Verified {
            first: self.first,
            last: self.last,
            hash: self.hash,
            damage: self.damage,
            lost: self.lost,
        })
    }
}
