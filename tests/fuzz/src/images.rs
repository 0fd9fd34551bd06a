//! Images: headers of disks, manifests, signatures.

use std::sync::OnceLock;

use omerta_images::qcow2::{HEAD_BYTES, Header, MAX_VIRTUAL_BYTES, SECTOR};
use omerta_images::{Manifest, Revoked, TrustedKeys};

/// A public key whose secret half is not kept.
const KEY: &str = "untrusted comment: minisign public key: 3B589D9012B1D712\n\
    RWQS17ESkJ1YOzpcagIxrx6l7D48nL0r06RfrnryTBQoJCFx1lvQ/+kB\n";

/// The start of a qcow2 file. Its first eight bytes say how long the file is.
pub fn qcow2_header(bytes: &[u8]) {
    let Some((length, head)) = bytes.split_first_chunk() else {
        return;
    };
    let head = &head[..head.len().min(HEAD_BYTES)];
    let length = u64::from_be_bytes(*length);
    if let Ok(header) = Header::parse(head, length) {
        assert!((1..=MAX_VIRTUAL_BYTES).contains(&header.virtual_bytes));
        assert_eq!(header.virtual_bytes % SECTOR, 0);
        assert!((9..=21).contains(&header.cluster_bits));
        // Neither a backing file nor encryption nor snapshots, nor a feature that has to be known.
        assert_eq!(head[8..20], [0; 12]);
        assert_eq!(head[32..36], [0; 4]);
        assert_eq!(head[60..72], [0; 12]);
        assert!(header.version == 2 || head[72..80] == [0; 8]);
    }
}

/// An image's manifest.
pub fn image_manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::parse(bytes) {
        let again = Manifest::parse(&manifest.to_bytes().unwrap()).unwrap();
        assert_eq!(again, manifest);
        assert!(!manifest.name.as_str().contains('/'));
        for (_, blob, most) in manifest.parts() {
            assert!((1..=most).contains(&blob.bytes));
        }
    }
}

/// A signature, of a key that is trusted or not: none that the fuzzer makes is one.
pub fn image_signature(bytes: &[u8]) {
    static KEYS: OnceLock<TrustedKeys> = OnceLock::new();
    let keys = KEYS.get_or_init(|| TrustedKeys::one("fuzz.pub", KEY).unwrap());
    if let Ok(signature) = str::from_utf8(bytes) {
        assert!(keys.signer("fuzz", b"never signed", signature).is_err());
    }
}

/// The list of what is revoked: what it takes for a line that means something is on it.
pub fn revoked_list(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    match Revoked::parse(text) {
        Ok(revoked) => {
            for line in text.lines().map(str::trim) {
                if !line.is_empty() && !line.starts_with('#') {
                    let digest = line.split_whitespace().next().unwrap().parse().unwrap();
                    assert!(revoked.has(digest));
                }
            }
        }
        Err(line) => assert!((1..=text.lines().count()).contains(&line)),
    }
}
