//! What an image is made of: JSON, signed as it stands, every key known.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::qcow2::is_disk_size;
use crate::{Digest, ImageName};

/// An image's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The format's version: [`Manifest::VERSION`].
    pub omerta_image: u32,
    /// What the image is called. Signed, so that no image passes for another.
    pub name: ImageName,
    /// The kernel, which QEMU loads.
    pub kernel: Blob,
    /// The initramfs.
    pub initrd: Blob,
    /// The disk, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
    /// How the guest is told what it is.
    pub seed: Seed,
    /// Whether its guests run the agent, which the host then asks. Said where they do.
    #[serde(default, skip_serializing_if = "is_false")]
    pub agent: bool,
    /// Whether its guests' own firewall says on the console what it blocks, which the host then expects to hear. Said
    /// where it does.
    #[serde(default, skip_serializing_if = "is_false")]
    pub firewall_log: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// A file by its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// Its digest.
    pub sha256: Digest,
    /// Its length.
    pub bytes: u64,
}

/// A disk that guests read, each below a layer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Its digest.
    pub sha256: Digest,
    /// Its length.
    pub bytes: u64,
    /// How QEMU reads it. Never guessed from its content, which a guest may have written.
    pub format: DiskFormat,
    /// Its size as the guest sees it.
    pub virtual_bytes: u64,
    /// Where on it the root file system is.
    pub root: RootDevice,
}

impl Disk {
    /// The file.
    pub const fn blob(&self) -> Blob {
        Blob {
            sha256: self.sha256,
            bytes: self.bytes,
        }
    }
}

/// The format of a disk's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk itself.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl DiskFormat {
    /// The word that manifests and QEMU use.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// How the guest is told what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seed {
    /// Facts in QEMU's fw_cfg alone.
    Facts,
    /// These, and a disk for cloud-init's `NoCloud`.
    Nocloud,
}

/// The disk (`vda`) or one of its partitions (`vda1`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootDevice {
    partition: Option<u8>,
}

impl RootDevice {
    /// The whole disk.
    pub const DISK: Self = Self { partition: None };
}

/// Text that names no root device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a root device is vda or a partition of it, vda1 to vda128")]
pub struct RootDeviceError;

impl FromStr for RootDevice {
    type Err = RootDeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = text.strip_prefix("vda").ok_or(RootDeviceError)?;
        if number.is_empty() {
            return Ok(Self::DISK);
        }
        let partition: u8 = number.parse().map_err(|_| RootDeviceError)?;
        if !(1..=128).contains(&partition) || partition.to_string() != number {
            return Err(RootDeviceError);
        }
        Ok(Self {
            partition: Some(partition),
        })
    }
}

impl fmt::Display for RootDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.partition {
            None => f.write_str("vda"),
            Some(partition) => write!(f, "vda{partition}"),
        }
    }
}

impl Serialize for RootDevice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RootDevice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Why bytes are no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Longer than any.
    #[error("the manifest is longer than {} KiB, which none is", Manifest::MAX_BYTES >> 10)]
    TooLong,
    /// Not JSON of the manifest's form.
    #[error("the manifest is malformed: {0}")]
    Malformed(String),
    /// Another version.
    #[error("the manifest is of version {0}, and this is known: {known}", known = Manifest::VERSION)]
    Version(u32),
    /// A file is empty or longer than any.
    #[error("the manifest's {what} has {bytes} bytes: a file has 1 to {most}")]
    Length {
        /// Which.
        what: &'static str,
        /// Its length.
        bytes: u64,
        /// The most.
        most: u64,
    },
    /// The disk's size cannot be one.
    #[error(
        "the manifest's disk has a virtual size of {0} bytes: a disk has whole sectors of 512, at most 1 TiB, and a raw one is as long as it is large"
    )]
    VirtualSize(u64),
}

impl Manifest {
    /// The version that is written and read.
    pub const VERSION: u32 = 1;
    /// The longest manifest.
    pub const MAX_BYTES: u64 = 16 << 10;
    /// The longest kernel or initramfs.
    pub const MAX_BOOT_BYTES: u64 = 512 << 20;
    /// The longest disk.
    pub const MAX_DISK_BYTES: u64 = 1 << 40;

    /// Reads a manifest.
    ///
    /// # Errors
    /// When it is no manifest, or its numbers cannot be.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() as u64 > Self::MAX_BYTES {
            return Err(ManifestError::TooLong);
        }
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| ManifestError::Malformed(error.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks what the fields' types do not say.
    ///
    /// # Errors
    /// The first number that cannot be.
    pub fn check(&self) -> Result<(), ManifestError> {
        if self.omerta_image != Self::VERSION {
            return Err(ManifestError::Version(self.omerta_image));
        }
        for (what, blob, most) in self.parts() {
            if !(1..=most).contains(&blob.bytes) {
                let bytes = blob.bytes;
                return Err(ManifestError::Length { what, bytes, most });
            }
        }
        if let Some(disk) = &self.disk {
            let is_whole = disk.format != DiskFormat::Raw || disk.bytes == disk.virtual_bytes;
            if !is_disk_size(disk.virtual_bytes) || !is_whole {
                return Err(ManifestError::VirtualSize(disk.virtual_bytes));
            }
        }
        Ok(())
    }

    /// The bytes to sign and keep.
    ///
    /// # Errors
    /// When it cannot be written as JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>, ManifestError> {
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| ManifestError::Malformed(error.to_string()))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Its files, what they are, and how long they may be.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, Blob, u64)> {
        let disk = self.disk.as_ref().map(Disk::blob);
        [
            ("kernel", self.kernel, Self::MAX_BOOT_BYTES),
            ("initrd", self.initrd, Self::MAX_BOOT_BYTES),
        ]
        .into_iter()
        .chain(disk.map(|disk| ("disk", disk, Self::MAX_DISK_BYTES)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
        let digest = Digest::of(b"x");
        let mut value = serde_json::json!({
            "omerta_image": 1,
            "name": "debian",
            "kernel": {"sha256": digest, "bytes": 1},
            "initrd": {"sha256": digest, "bytes": 1},
            "disk": {"sha256": digest, "bytes": 1024, "format": "raw", "virtual_bytes": 1024, "root": "vda"},
            "seed": "nocloud",
        });
        change(&mut value);
        serde_json::to_vec(&value).unwrap()
    }

    #[test]
    fn a_sound_manifest_is_taken_and_written_as_it_was() {
        let manifest = Manifest::parse(&text(|_| ())).unwrap();
        assert_eq!(
            Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(),
            manifest
        );
        let small = text(|m| drop(m.as_object_mut().unwrap().remove("disk")));
        assert_eq!(Manifest::parse(&small).unwrap().disk, None);
    }

    #[test]
    fn each_unsound_manifest_is_refused_with_its_cause() {
        type Change = fn(&mut serde_json::Value);
        let cases: [(Change, &str); 13] = [
            (|m| m["omerta_image"] = 2.into(), "version 2"),
            (|m| m["signed"] = true.into(), "unknown field `signed`"),
            (
                |m| m["disk"]["path"] = "/etc/shadow".into(),
                "unknown field `path`",
            ),
            (|m| m["name"] = "../x".into(), "not an image name"),
            (|m| m["kernel"]["sha256"] = "x".into(), "64 of 0-9"),
            (|m| m["kernel"]["bytes"] = 0.into(), "kernel has 0 bytes"),
            (|m| m["initrd"]["bytes"] = (1u64 << 40).into(), "initrd has"),
            (|m| m["kernel"]["bytes"] = (-1).into(), "malformed"),
            (
                |m| m["disk"]["virtual_bytes"] = 1000.into(),
                "virtual size of 1000",
            ),
            (
                |m| m["disk"]["virtual_bytes"] = 2048.into(),
                "as long as it is large",
            ),
            (|m| m["disk"]["format"] = "vmdk".into(), "vmdk"),
            (
                |m| m["disk"]["root"] = "vda1 init=/bin/sh".into(),
                "root device",
            ),
            (|m| m["seed"] = "none".into(), "none"),
        ];
        for (change, names) in cases {
            let error = Manifest::parse(&text(change)).unwrap_err().to_string();
            assert!(error.contains(names), "{names}: {error}");
        }
        let long = vec![b' '; Manifest::MAX_BYTES as usize + 1];
        assert!(matches!(
            Manifest::parse(&long),
            Err(ManifestError::TooLong)
        ));
    }

    #[test]
    fn a_root_device_is_the_disk_or_a_partition() {
        for text in ["vda", "vda1", "vda128"] {
            assert_eq!(text.parse::<RootDevice>().unwrap().to_string(), text);
        }
        for text in [
            "", "vdb", "vda0", "vda01", "vda129", "vda+1", "vda1 x", "sda",
        ] {
            assert_eq!(text.parse::<RootDevice>(), Err(RootDeviceError), "{text}");
        }
    }
}
