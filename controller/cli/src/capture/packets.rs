//! Frames as pcapng (draft-ietf-opsawg-pcapng): one Ethernet interface, times in nanoseconds, with each
//! packet its direction and a comment.

use std::borrow::Cow;
use std::io::{self, BufWriter, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use omerta_verdict::Direction;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pcap_file::pcapng::blocks::opt_common::CommonOption;
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, Endianness, PcapError};

/// Nanoseconds: 10 to the power of minus this.
const RESOLUTION: u8 = 9;

/// A frame to be written.
pub struct Seen<'a> {
    /// When, since 1970.
    pub at: Duration,
    /// Which way it went.
    pub direction: Direction,
    /// As much of it as is kept.
    pub bytes: &'a [u8],
    /// Its whole length.
    pub length: u32,
    /// What became of it.
    pub comment: &'a str,
}

/// Writes one section of one interface.
pub struct PacketWriter<W: Write> {
    inner: PcapNgWriter<BufWriter<W>>,
    written: u64,
}

impl<W: Write> PacketWriter<W> {
    /// Begins the section. Nothing is written until it is flushed.
    pub fn new(stream: W, interface: &str) -> io::Result<Self> {
        let application = concat!("omerta ", env!("CARGO_PKG_VERSION"));
        let section = SectionHeaderBlock {
            endianness: Endianness::native(),
            options: vec![SectionHeaderOption::UserApplication(application.into())],
            ..SectionHeaderBlock::default()
        };
        let inner =
            PcapNgWriter::with_section_header(BufWriter::new(stream), section).map_err(io_error)?;
        let mut writer = Self { inner, written: 64 };
        let description = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: 0,
            options: vec![
                InterfaceDescriptionOption::IfName(interface.into()),
                InterfaceDescriptionOption::IfTsResol(RESOLUTION),
            ],
        };
        let bytes = writer.inner.write_pcapng_block(description);
        writer.count(bytes)?;
        Ok(writer)
    }

    /// Writes one frame.
    pub fn write(&mut self, seen: &Seen<'_>) -> io::Result<()> {
        // The lowest two bits: in or out, seen from the host's interface.
        let direction = match seen.direction {
            Direction::Egress => 1,
            Direction::Ingress => 2,
        };
        let packet = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: seen.at,
            original_len: seen.length,
            data: Cow::Borrowed(seen.bytes),
            options: vec![
                EnhancedPacketOption::Common(CommonOption::Comment(seen.comment.into())),
                EnhancedPacketOption::Flags(direction),
            ],
        };
        let bytes = self.inner.write_pcapng_block(packet);
        self.count(bytes)
    }

    /// Says how many frames there were, how many the kernel lost and how many were left out.
    pub fn statistics(&mut self, seen: u64, lost: u64, left_out: u64) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let statistics = InterfaceStatisticsBlock {
            interface_id: 0,
            timestamp: now.unwrap_or_default(),
            options: vec![
                InterfaceStatisticsOption::IsbIfRecv(seen.saturating_add(lost)),
                InterfaceStatisticsOption::IsbOsDrop(lost),
                InterfaceStatisticsOption::Common(CommonOption::Comment(
                    format!("{left_out} frames beyond the rate were left out").into(),
                )),
            ],
        };
        let bytes = self.inner.write_pcapng_block(statistics);
        self.count(bytes)
    }

    /// Hands on what is written.
    pub fn flush(&mut self) -> io::Result<()> {
        self.inner.get_mut().flush()
    }

    /// Bytes written so far.
    pub const fn written(&self) -> u64 {
        self.written
    }

    fn count(&mut self, written: Result<usize, PcapError>) -> io::Result<()> {
        self.written += written.map_err(io_error)? as u64;
        Ok(())
    }
}

fn io_error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
