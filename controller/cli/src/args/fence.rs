//! The `[fence]` of `omerta guard watch`'s file.

use serde::Deserialize;

/// The group that guarded interfaces are put into where the file names none: nobody else's by chance.
const GROUP: u32 = 28_525;
/// The longest name of an interface (`IFNAMSIZ` of include/uapi/linux/if.h, less the zero).
const MAX_NAME: usize = 15;

/// Which interfaces are kept from everything until they are guarded.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceConfig {
    /// Names, or how names begin, with a `*` behind.
    pub interfaces: Vec<String>,
    /// The group of those that are let through.
    #[serde(default = "group")]
    pub group: u32,
}

fn group() -> u32 {
    GROUP
}

impl FenceConfig {
    /// Fails with the key, its value and what is wrong with it.
    pub fn check(&self) -> Result<(), (&'static str, String, &'static str)> {
        if self.interfaces.is_empty() {
            return Err((
                "interfaces",
                String::new(),
                "name one at least, such as tap*",
            ));
        }
        for name in &self.interfaces {
            if let Some(why) = wrong(name) {
                return Err(("interfaces", name.clone(), why));
            }
        }
        if self.group == 0 {
            return Err((
                "group",
                "0".into(),
                "every interface begins in it: choose another",
            ));
        }
        Ok(())
    }
}

fn wrong(name: &str) -> Option<&'static str> {
    let (stem, is_open) = match name.strip_suffix('*') {
        Some(stem) => (stem, true),
        None => (name, false),
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if stem.is_empty() {
        Some("it would keep the host itself from everything: say how the names begin")
    } else if is_open && stem.len() == MAX_NAME {
        Some("no name of an interface is longer: leave the `*` out")
    } else if stem.len() > MAX_NAME || !stem.chars().all(fits) {
        Some(
            "write the name of an interface (letters, digits, `.`, `-`, `_`), or its beginning and `*`",
        )
    } else if stem == "lo" || (is_open && "lo".starts_with(stem)) {
        Some("the host's own loopback would be fenced")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(interfaces: &[&str], group: u32) -> Option<&'static str> {
        let interfaces = interfaces.iter().map(|name| (*name).to_owned()).collect();
        let config = FenceConfig { interfaces, group };
        config.check().err().map(|(key, ..)| key)
    }

    #[test]
    fn what_would_fence_the_host_or_say_something_to_nft_is_refused() {
        assert_eq!(checked(&["tap*", "vm-0.1", "lol*"], 1), None);
        assert_eq!(checked(&["abcdefghijklmn*", "abcdefghijklmno"], 1), None);
        assert_eq!(checked(&[], 1), Some("interfaces"));
        for name in [
            "",
            "*",
            "lo",
            "l*",
            "lo*",
            "a*b",
            "tap**",
            "a b",
            "a\"b",
            "a\nb",
            "täp",
            "abcdefghijklmnop",
            // nft takes no more than 15 characters, the `*` among them.
            "abcdefghijklmno*",
        ] {
            assert_eq!(checked(&["tap*", name], 1), Some("interfaces"), "{name}");
        }
        assert_eq!(checked(&["tap*"], 0), Some("group"));
    }
}
