//! The bounded files of a capture: FILE is written until it takes half of what all may take, then becomes
//! FILE.1, in place of the one before. So the newest half, at least, is always there.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::packets::{PacketWriter, Seen};

/// Room for a packet's header and comment, and for the statistics.
const BESIDE: u64 = 1024;

/// Where frames are written.
pub struct CaptureFiles {
    path: PathBuf,
    before: PathBuf,
    interface: String,
    /// What one file may take.
    most: u64,
    writer: PacketWriter<File>,
}

impl CaptureFiles {
    /// Makes `path`, in place of what is there, which together with the file before takes no more than
    /// `ring` bytes.
    pub fn create(path: &Path, interface: &str, ring: u64) -> Result<Self, FilesError> {
        let mut before = OsString::from(path);
        before.push(".1");
        Ok(Self {
            path: path.to_owned(),
            before: before.into(),
            interface: interface.to_owned(),
            most: ring / 2,
            writer: begin(path, interface)?,
        })
    }

    /// The directory that holds the files.
    pub fn directory(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }

    /// Writes one frame, where need be to a new file.
    pub fn write(&mut self, seen: &Seen<'_>) -> Result<(), FilesError> {
        if self.writer.written() + seen.bytes.len() as u64 + 2 * BESIDE > self.most {
            self.flush()?;
            fs::rename(&self.path, &self.before).map_err(failed(&self.path))?;
            self.writer = begin(&self.path, &self.interface)?;
        }
        self.writer.write(seen).map_err(failed(&self.path))
    }

    /// Hands on what is written.
    pub fn flush(&mut self) -> Result<(), FilesError> {
        self.writer.flush().map_err(failed(&self.path))
    }

    /// Ends the file with what is not in it.
    pub fn finish(&mut self, seen: u64, lost: u64, left_out: u64) -> Result<(), FilesError> {
        self.writer
            .statistics(seen, lost, left_out)
            .and_then(|()| self.writer.flush())
            .map_err(failed(&self.path))
    }
}

/// Frames are their owners' secrets: nobody else reads the file.
fn begin(path: &Path, interface: &str) -> Result<PacketWriter<File>, FilesError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed(path))?;
    PacketWriter::new(file, interface).map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    let path = path.to_owned();
    move |source| FilesError { path, source }
}

/// Why a file cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the capture to {}: see to its directory and its room", path.display())]
pub struct FilesError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use omerta_verdict::Direction;
    use pcap_file::pcapng::{Block, PcapNgReader};

    use super::*;

    /// The first byte of each packet in a file.
    fn numbers(path: &Path) -> Vec<u8> {
        let mut reader = PcapNgReader::new(File::open(path).unwrap()).unwrap();
        let mut numbers = Vec::new();
        while let Some(block) = reader.next_block() {
            if let Block::EnhancedPacket(packet) = block.unwrap() {
                numbers.push(packet.data[0]);
            }
        }
        numbers
    }

    #[test]
    fn the_newest_frames_stay_and_all_files_are_within_the_ring() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("trace.pcapng");
        let ring = 256 << 10;
        let mut files = CaptureFiles::create(&path, "tap0", ring).unwrap();
        for number in 0..200_u8 {
            let bytes = [number; 9000];
            files
                .write(&Seen {
                    at: Duration::from_secs(1),
                    direction: Direction::Egress,
                    bytes: &bytes,
                    length: 9000,
                    comment: "allowed",
                })
                .unwrap();
        }
        files.finish(200, 0, 0).unwrap();
        let entries: Vec<_> = fs::read_dir(directory.path()).unwrap().flatten().collect();
        let size: u64 = entries.iter().map(|e| e.metadata().unwrap().len()).sum();
        assert_eq!(entries.len(), 2);
        assert!(size <= ring && size > ring / 4, "{size}");
        let mut kept = numbers(&directory.path().join("trace.pcapng.1"));
        kept.extend(numbers(&path));
        let first = 200 - kept.len() as u8;
        assert_eq!(kept, (first..200).collect::<Vec<_>>());
    }
}
