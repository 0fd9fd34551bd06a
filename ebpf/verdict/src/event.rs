//! What programs tell: the record of a dropped frame in the ring buffer, and failures of their own.

use crate::reason::{Direction, Reason};

/// How much of a dropped frame an event carries.
pub const EVENT_FRAME_BYTES: usize = 96;

/// A dropped frame. Numbers are in host byte order, the frame's bytes as on the wire.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EventRecord {
    /// Time of the verdict: nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// The interface.
    pub ifindex: u32,
    /// Length of the whole frame in bytes.
    pub length: u32,
    /// A [`Direction`].
    pub direction: u8,
    /// A [`Reason`].
    pub reason: u8,
    /// How many bytes of `frame` are the frame's.
    pub captured: u16,
    /// Zero.
    pub padding: u32,
    /// The frame's first bytes.
    pub frame: [u8; EVENT_FRAME_BYTES],
}

impl EventRecord {
    /// Length of the record in bytes.
    pub const SIZE: usize = 24 + EVENT_FRAME_BYTES;

    /// Reads a record from the ring buffer, or `None` where the bytes are not one.
    pub fn parse(bytes: &[u8]) -> Option<(Self, Direction, Reason)> {
        let bytes: &[u8; Self::SIZE] = bytes.try_into().ok()?;
        let record = Self {
            at_ns: u64::from_ne_bytes(*bytes.first_chunk()?),
            ifindex: u32::from_ne_bytes(*bytes[8..].first_chunk()?),
            length: u32::from_ne_bytes(*bytes[12..].first_chunk()?),
            direction: bytes[16],
            reason: bytes[17],
            captured: u16::from_ne_bytes([bytes[18], bytes[19]]),
            padding: 0,
            frame: *bytes[24..].first_chunk()?,
        };
        if usize::from(record.captured) > EVENT_FRAME_BYTES
            || u32::from(record.captured) > record.length
        {
            return None;
        }
        Some((
            record,
            Direction::from_index(record.direction)?,
            Reason::from_index(record.reason)?,
        ))
    }

    /// The captured part of the frame.
    pub fn head(&self) -> &[u8] {
        self.frame
            .get(..usize::from(self.captured))
            .unwrap_or(&self.frame)
    }
}

const _: () = assert!(core::mem::size_of::<EventRecord>() == EventRecord::SIZE);

/// What fails in the programs themselves. They tell its number; userspace has the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Failure {
    /// The headers of a frame could not be made readable.
    Unreadable = 0,
    /// The guard's answer could not be written.
    Answer = 1,
    /// The ring of events has no room.
    EventRing = 2,
}

impl Failure {
    /// Every failure, in index order.
    pub const ALL: [Self; 3] = [Self::Unreadable, Self::Answer, Self::EventRing];

    /// What has failed; the helper's error follows where there is one.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Unreadable => "a frame could not be made readable",
            Self::Answer => "the answer to a question could not be written",
            Self::EventRing => "no room for the event of a frame: events are lost",
        }
    }
}
