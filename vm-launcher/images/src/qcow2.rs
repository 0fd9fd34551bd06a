//! qcow2 headers: read before QEMU reads them, and written for a guest's own layer.
//!
//! A header can name other files for QEMU to open (a backing file, an external data file), and its
//! tables have been a source of errors in QEMU. So little of the format is let in: what plain
//! `qemu-img convert -O qcow2` writes. All numbers are big-endian.

/// The largest virtual disk, in bytes.
pub const MAX_VIRTUAL_BYTES: u64 = 1 << 40;
/// A disk's size is a multiple of this.
pub const SECTOR: u64 = 512;
/// How much of a file [`Header::parse`] looks at.
pub const HEAD_BYTES: usize = 64 << 10;

const MAGIC: u32 = 0x5146_49fb;
const LENGTH_2: usize = 72;
const LENGTH_3: usize = 104;
/// QEMU's own bounds.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

const EXTENSION_END: u32 = 0;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;

/// What of a header is left to say once it is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The disk's size as the guest sees it.
    pub virtual_bytes: u64,
    /// A cluster's size as a power of two.
    pub cluster_bits: u32,
}

/// Why a header is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Too short, or another format.
    #[error("it is no qcow2 file: convert it by `qemu-img convert -O qcow2`")]
    NotQcow2,
    /// Neither version 2 nor 3.
    #[error("qcow2 version {0} is not known: convert it by `qemu-img convert -O qcow2`")]
    Version(u32),
    /// It names another file, of which it is a layer.
    #[error("it has a backing file: flatten it by `qemu-img convert -O qcow2`")]
    BackingFile,
    /// Its data are in another file.
    #[error("its data are in an external file: convert it by `qemu-img convert -O qcow2`")]
    ExternalData,
    /// It is encrypted.
    #[error(
        "it is encrypted, and nobody here has a key: convert it by `qemu-img convert -O qcow2`"
    )]
    Encrypted,
    /// It has snapshots.
    #[error("it has internal snapshots: convert it by `qemu-img convert -O qcow2`")]
    Snapshots,
    /// It was not closed, or is known to be broken.
    #[error("it is marked dirty or corrupt: repair it by `qemu-img check -r all`")]
    Unclean,
    /// It needs or has something else.
    #[error(
        "it uses a feature of qcow2 that is not let in ({0}): convert it by `qemu-img convert -O qcow2`"
    )]
    Feature(&'static str),
    /// The disk is empty, not whole sectors, or larger than any.
    #[error("its virtual size is {0} bytes: a disk has whole sectors of 512, and at most 1 TiB")]
    VirtualSize(u64),
    /// A number is out of its bounds.
    #[error("its header is malformed ({0}): convert it by `qemu-img convert -O qcow2`")]
    Malformed(&'static str),
}

impl Header {
    /// Reads the header in `head`, the first [`HEAD_BYTES`] of a file of `file_bytes`, or all of it.
    ///
    /// # Errors
    /// What is not let in.
    pub fn parse(head: &[u8], file_bytes: u64) -> Result<Self, HeaderError> {
        use HeaderError as E;
        let head = Bytes(head);
        if head.word(0) != Some(MAGIC)
            || head.0.len() < LENGTH_2
            || head.0.len() as u64 > file_bytes
        {
            return Err(E::NotQcow2);
        }
        let word = |at| head.word(at).ok_or(E::NotQcow2);
        let long = |at| head.long(at).ok_or(E::NotQcow2);
        let version = word(4)?;
        if !(2..=3).contains(&version) {
            return Err(E::Version(version));
        }
        if long(8)? != 0 || word(16)? != 0 {
            return Err(E::BackingFile);
        }
        if word(32)? != 0 {
            return Err(E::Encrypted);
        }
        if word(60)? != 0 || long(64)? != 0 {
            return Err(E::Snapshots);
        }
        let header_bytes = if version == 3 {
            check_features(long(72)?, long(88)?)?;
            if word(96)? > 6 {
                return Err(E::Malformed("refcount order"));
            }
            word(100)? as usize
        } else {
            LENGTH_2
        };
        let cluster_bits = word(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(E::Malformed("cluster size"));
        }
        let cluster = 1u64 << cluster_bits;
        if header_bytes < if version == 3 { LENGTH_3 } else { LENGTH_2 }
            || !header_bytes.is_multiple_of(8)
            || header_bytes as u64 > cluster
        {
            return Err(E::Malformed("header length"));
        }
        let virtual_bytes = long(24)?;
        if !is_disk_size(virtual_bytes) {
            return Err(E::VirtualSize(virtual_bytes));
        }
        // The compression type, and whatever later versions put behind it, must be 0.
        if head
            .0
            .get(LENGTH_3.min(header_bytes)..header_bytes)
            .is_none_or(|rest| rest.iter().any(|byte| *byte != 0))
        {
            return Err(E::Feature("compression type"));
        }
        check_extensions(head, header_bytes, cluster)?;

        let table = |offset: u64, bytes: u64, most: u64, what| {
            let end = offset.checked_add(bytes).ok_or(E::Malformed(what))?;
            let is_sound = bytes > 0
                && bytes <= most
                && offset >= cluster
                && offset.is_multiple_of(cluster)
                && end <= file_bytes;
            is_sound.then_some((offset, end)).ok_or(E::Malformed(what))
        };
        let l1_entries = u64::from(word(36)?);
        // One entry is a cluster of 8-byte entries, each of which is a cluster of data.
        let needed = virtual_bytes.div_ceil(cluster * (cluster / 8));
        if l1_entries < needed {
            return Err(E::Malformed("L1 table"));
        }
        let l1 = table(long(40)?, l1_entries * 8, MAX_L1_BYTES, "L1 table")?;
        let refcount_bytes = u64::from(word(56)?) << cluster_bits;
        let refcounts = table(
            long(48)?,
            refcount_bytes,
            MAX_REFCOUNT_TABLE_BYTES,
            "refcount table",
        )?;
        if l1.0 < refcounts.1 && refcounts.0 < l1.1 {
            return Err(E::Malformed("tables that overlap"));
        }
        Ok(Self {
            version,
            virtual_bytes,
            cluster_bits,
        })
    }
}

/// Whether a disk may have this size.
pub const fn is_disk_size(bytes: u64) -> bool {
    bytes > 0 && bytes.is_multiple_of(SECTOR) && bytes <= MAX_VIRTUAL_BYTES
}

fn check_features(incompatible: u64, autoclear: u64) -> Result<(), HeaderError> {
    match incompatible {
        0 => {}
        bits if bits & 0b100 != 0 => return Err(HeaderError::ExternalData),
        bits if bits & 0b011 != 0 => return Err(HeaderError::Unclean),
        bits if bits & 0b1000 != 0 => return Err(HeaderError::Feature("compression type")),
        _ => return Err(HeaderError::Feature("incompatible")),
    }
    match autoclear {
        0 => Ok(()),
        bits if bits & 0b10 != 0 => Err(HeaderError::ExternalData),
        _ => Err(HeaderError::Feature("bitmaps")),
    }
}

/// Names of features are for messages alone; every other extension makes QEMU do something.
fn check_extensions(head: Bytes<'_>, from: usize, cluster: u64) -> Result<(), HeaderError> {
    let mut at = from;
    // A header's cluster may end without an end of the extensions.
    while (at as u64) < cluster {
        let (Some(kind), Some(length)) = (head.word(at), head.word(at + 4)) else {
            return Err(HeaderError::Malformed("extensions"));
        };
        match kind {
            EXTENSION_END => return Ok(()),
            EXTENSION_FEATURE_NAMES => {}
            0xe279_2aca => return Err(HeaderError::BackingFile),
            0x4441_5441 => return Err(HeaderError::ExternalData),
            0x0537_be77 => return Err(HeaderError::Encrypted),
            0x2385_2875 => return Err(HeaderError::Feature("bitmaps")),
            _ => return Err(HeaderError::Feature("unknown extension")),
        }
        // Within the head, so that neither sum overflows.
        let padded = (length as usize).min(HEAD_BYTES).next_multiple_of(8);
        at += 8 + padded;
        if length as usize > HEAD_BYTES || at as u64 > cluster {
            return Err(HeaderError::Malformed("extensions"));
        }
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn word(self, at: usize) -> Option<u32> {
        let bytes = self.0.get(at..at.checked_add(4)?)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    }

    fn long(self, at: usize) -> Option<u64> {
        let bytes = self.0.get(at..at.checked_add(8)?)?;
        Some(u64::from_be_bytes(bytes.try_into().ok()?))
    }
}

/// An empty layer: what a guest writes, above an image that it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    virtual_bytes: u64,
}

impl Layer {
    const CLUSTER_BITS: u32 = 16;
    const CLUSTER: u64 = 1 << Self::CLUSTER_BITS;
    /// Header, refcount table, refcount block, L1 table: a cluster each.
    const CLUSTERS: usize = 4;

    /// A layer of a disk of that size, or `None` where no disk has it.
    pub const fn new(virtual_bytes: u64) -> Option<Self> {
        if is_disk_size(virtual_bytes) {
            Some(Self { virtual_bytes })
        } else {
            None
        }
    }

    /// The disk's size as the guest sees it.
    pub const fn virtual_bytes(self) -> u64 {
        self.virtual_bytes
    }

    /// The longest that its file becomes when all of it is written: data, their L2 tables and
    /// refcounts, and as much again of those for what QEMU allocates ahead.
    pub const fn max_file_bytes(self) -> u64 {
        let data = self.virtual_bytes.div_ceil(Self::CLUSTER);
        let l2 = data.div_ceil(Self::CLUSTER / 8);
        let refcounts = (data + l2).div_ceil(Self::CLUSTER / 2) + 1;
        (data + 2 * (l2 + refcounts) + Self::CLUSTERS as u64) << Self::CLUSTER_BITS
    }

    /// The file's content. It names no file below it: QEMU is told that on its command line.
    pub fn content(self) -> Vec<u8> {
        let cluster = Self::CLUSTER as usize;
        let mut file = vec![0; Self::CLUSTERS * cluster];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        // A cluster of L1 entries stands for 4 TiB.
        let l1_entries = self
            .virtual_bytes
            .div_ceil(Self::CLUSTER * Self::CLUSTER / 8) as u32;
        put(0, &MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(20, &Self::CLUSTER_BITS.to_be_bytes());
        put(24, &self.virtual_bytes.to_be_bytes());
        put(36, &l1_entries.to_be_bytes());
        put(40, &(3 * Self::CLUSTER).to_be_bytes());
        put(48, &Self::CLUSTER.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        // Refcounts of 16 bits.
        put(96, &4u32.to_be_bytes());
        put(100, &(LENGTH_3 as u32).to_be_bytes());
        // The table's first block, and in it a count for each cluster of this file.
        put(cluster, &(2 * Self::CLUSTER).to_be_bytes());
        for used in 0..Self::CLUSTERS {
            put(2 * cluster + 2 * used, &1u16.to_be_bytes());
        }
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use HeaderError as E;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn parse(file: &[u8]) -> Result<Header, HeaderError> {
        Header::parse(&file[..file.len().min(HEAD_BYTES)], file.len() as u64)
    }

    fn with(at: usize, bytes: &[u8]) -> Result<Header, HeaderError> {
        let mut file = Layer::new(GIB).unwrap().content();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        parse(&file)
    }

    #[test]
    fn a_layer_of_ours_is_let_in() {
        for size in [SECTOR, 4 << 20, GIB, 3 * GIB + SECTOR, MAX_VIRTUAL_BYTES] {
            let header = parse(&Layer::new(size).unwrap().content()).unwrap();
            assert_eq!((header.version, header.virtual_bytes), (3, size));
        }
        for size in [0, 1, SECTOR + 1, MAX_VIRTUAL_BYTES + SECTOR, u64::MAX] {
            assert_eq!(Layer::new(size), None);
        }
    }

    #[test]
    fn what_makes_qemu_open_another_file_is_refused() {
        assert_eq!(with(8, &[0, 0, 0, 0, 0, 0, 2, 0]), Err(E::BackingFile));
        assert_eq!(with(16, &[0, 0, 0, 9]), Err(E::BackingFile));
        assert_eq!(with(79, &[4]), Err(E::ExternalData));
        assert_eq!(with(95, &[2]), Err(E::ExternalData));
        for (kind, error) in [
            (0xe279_2acau32, E::BackingFile),
            (0x4441_5441, E::ExternalData),
            (0x0537_be77, E::Encrypted),
            (0x2385_2875, E::Feature("bitmaps")),
            (0x1234_5678, E::Feature("unknown extension")),
        ] {
            assert_eq!(with(104, &kind.to_be_bytes()), Err(error));
            // Behind one that is let in.
            let mut two = EXTENSION_FEATURE_NAMES.to_be_bytes().to_vec();
            two.extend([0, 0, 0, 3, b'a', b'b', b'c', 0, 0, 0, 0, 0]);
            two.extend(kind.to_be_bytes());
            assert_eq!(with(104, &two), Err(error));
        }
    }

    #[test]
    fn each_unsound_number_is_refused_with_its_name() {
        let long = |value: u64| value.to_be_bytes();
        for (at, bytes, error) in [
            (0, &b"QFI\xfa"[..], E::NotQcow2),
            (4, &[0, 0, 0, 1], E::Version(1)),
            (4, &[0, 0, 0, 4], E::Version(4)),
            (20, &[0, 0, 0, 8], E::Malformed("cluster size")),
            (20, &[0, 0, 0, 22], E::Malformed("cluster size")),
            (20, &[255; 4], E::Malformed("cluster size")),
            (24, &[0; 8], E::VirtualSize(0)),
            (24, &[255; 8], E::VirtualSize(u64::MAX)),
            (
                24,
                &long(MAX_VIRTUAL_BYTES + SECTOR),
                E::VirtualSize(MAX_VIRTUAL_BYTES + SECTOR),
            ),
            (24, &long(GIB + 1), E::VirtualSize(GIB + 1)),
            (32, &[0, 0, 0, 2], E::Encrypted),
            (36, &[0, 0, 0, 1], E::Malformed("L1 table")),
            (36, &[255; 4], E::Malformed("L1 table")),
            (40, &[0; 8], E::Malformed("L1 table")),
            (40, &[255; 8], E::Malformed("L1 table")),
            (40, &long(0x30001), E::Malformed("L1 table")),
            (40, &long(0x10000), E::Malformed("tables that overlap")),
            (48, &[0; 8], E::Malformed("refcount table")),
            (48, &long(0x40000), E::Malformed("refcount table")),
            (56, &[0; 4], E::Malformed("refcount table")),
            (56, &[255; 4], E::Malformed("refcount table")),
            (60, &[0, 0, 0, 1], E::Snapshots),
            (64, &[0, 0, 0, 0, 0, 4, 0, 0], E::Snapshots),
            (79, &[1], E::Unclean),
            (79, &[2], E::Unclean),
            (79, &[8], E::Feature("compression type")),
            (79, &[16], E::Feature("incompatible")),
            (72, &[128], E::Feature("incompatible")),
            (95, &[1], E::Feature("bitmaps")),
            (96, &[0, 0, 0, 7], E::Malformed("refcount order")),
            (100, &[0, 0, 0, 72], E::Malformed("header length")),
            (100, &[0, 0, 0, 105], E::Malformed("header length")),
            (100, &[0, 2, 0, 0], E::Malformed("header length")),
            (
                104,
                &[0x68, 0x03, 0xf8, 0x57, 255, 255, 255, 255],
                E::Malformed("extensions"),
            ),
        ] {
            assert_eq!(with(at, bytes), Err(error), "{at}: {bytes:?}");
        }
        for length in [0, 4, 71, 103, 4096] {
            let file = &Layer::new(GIB).unwrap().content()[..length];
            assert!(parse(file).is_err(), "{length}");
        }
    }

    proptest! {
        #[test]
        fn a_header_with_any_bytes_changed_is_refused_or_within_bounds(
            changes in prop::collection::vec((0usize..256, any::<u8>()), 0..12),
            length in 0usize..300_000,
        ) {
            let mut file = Layer::new(GIB).unwrap().content();
            for (at, byte) in changes {
                file[at] = byte;
            }
            file.truncate(length);
            if let Ok(header) = parse(&file) {
                prop_assert!(is_disk_size(header.virtual_bytes));
                prop_assert!((9..=21).contains(&header.cluster_bits));
            }
        }
    }
}
