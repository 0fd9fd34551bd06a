//! Names of guests' host-side interfaces.

/// What the name of every interface made by omertad begins with.
pub(crate) const PREFIX: &str = "om";

/// The longest interface name, in bytes (`IFNAMSIZ` less its terminator).
const MAX_BYTES: usize = 15;
/// How many bytes of a long guest name stay readable.
const READABLE: usize = 7;

/// The interface name of a guest: its own name where it fits, else its beginning and a digest of
/// the whole.
pub(crate) fn tap_name(guest: &str) -> String {
    if PREFIX.len() + guest.len() <= MAX_BYTES {
        return format!("{PREFIX}{guest}");
    }
    let head: String = guest.chars().take(READABLE).collect();
    format!("{PREFIX}{head}-{:05x}", fnv1a(guest.as_bytes()) & 0xf_ffff)
}

/// FNV-1a, 32 bits: stable across versions, so that a crashed omertad's interfaces keep the
/// names by which they are found.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_long_ones_differ() {
        assert_eq!(tap_name("web-1"), "omweb-1");
        assert_eq!(tap_name("thirteen-long"), "omthirteen-long");
        let a = tap_name("tenant-with-a-long-name-1");
        let b = tap_name("tenant-with-a-long-name-2");
        assert_ne!(a, b);
        for name in [a, b, tap_name(&"x".repeat(32))] {
            assert!(
                name.len() <= MAX_BYTES && name.starts_with(PREFIX),
                "{name}"
            );
        }
    }

    #[test]
    fn digest_is_fnv1a() {
        assert_eq!(fnv1a(b""), 0x811c_9dc5);
        assert_eq!(fnv1a(b"foobar"), 0xbf9c_f968);
    }
}
