//! The store of guest images on a provider's host.
//!
//! An image is a [`Manifest`] (what the image is made of, by digest) and the blobs it names. A
//! manifest is signed as a whole, by minisign; omertad runs what a trusted key has signed. Nothing
//! of an image is handed to QEMU that has not been measured against its manifest right then.
#![forbid(unsafe_code)]

mod digest;
mod image_name;
mod import;
mod manifest;
pub mod qcow2;
mod recipe;
mod revoked;
mod signature;
mod staging;
mod store;

pub use digest::{Digest, DigestError, Digesting};
pub use image_name::{ImageName, ImageNameError};
pub use import::{ImportError, Imported, Progress, Source, Sources};
pub use manifest::{Blob, Disk, DiskFormat, Manifest, ManifestError, RootDevice, Seed};
pub use recipe::{Recipe, RecipeError};
pub use revoked::{RevokeError, Revoked};
pub use signature::{Signer, Trust, TrustError, TrustedKeys};
pub use store::{Collected, Lease, Listed, Opened, Removed, Store, StoreError, Verified};
