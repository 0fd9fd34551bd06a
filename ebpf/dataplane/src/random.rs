//! Random words from the kernel.

use std::fs::File;
use std::io::{self, Read};

/// A source of words. One that could not be read is told by [`Random::finish`], so that words can
/// be asked for where no error can be returned.
pub struct Random {
    file: File,
    failure: Option<io::Error>,
}

impl Random {
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            file: File::open("/dev/urandom")?,
            failure: None,
        })
    }

    pub fn word(&mut self) -> u64 {
        let mut bytes = [0; 8];
        if let Err(error) = self.file.read_exact(&mut bytes) {
            self.failure = Some(error);
        }
        u64::from_ne_bytes(bytes)
    }

    /// Fails where any of the words was none.
    pub fn finish(self) -> io::Result<()> {
        self.failure.map_or(Ok(()), Err)
    }
}
