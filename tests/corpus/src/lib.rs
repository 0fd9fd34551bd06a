//! Frames that must not pass and frames that must: `cases/*.toml`, one file for each class.
//!
//! A case starts from a frame that is right and says what differs, so that it can be read, and
//! why that matters and where it comes from, so that it can be judged. `README.md` has the format.

mod cast;
mod compose;
mod spec;

use std::collections::BTreeSet;

use omerta_verdict::{Mode, Outcome, Reason};
use serde::Deserialize;
use toml::{Table, Value};

pub use cast::Cast;
pub use spec::{Hex, Spec, Template};

macro_rules! classes {
    ($($class:literal),+ $(,)?) => {
        /// The files, without `.toml`, and their text.
        const FILES: &[(&str, &str)] =
            &[$(($class, include_str!(concat!("../cases/", $class, ".toml")))),+];
    };
}

classes!(
    "arp",
    "classes",
    "endpoint",
    "ethertype",
    "fragments",
    "good",
    "guard",
    "guests",
    "icmp",
    "length",
    "metadata",
    "nd",
    "shape-ipv4",
    "shape-ipv6",
    "source",
    "transport",
    "tunnels",
    "vlan",
);

/// The keys of a case that do not describe its frame.
const CASE_KEYS: [&str; 13] = [
    "name",
    "why",
    "source",
    "way",
    "mode",
    "guard",
    "before",
    "expect",
    "today",
    "at_neighbour",
    "tap",
    "vlan",
    "vnet",
];

/// Which way a frame travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The guest sends it.
    FromGuest,
    /// It is on its way to the guest.
    ToGuest,
    /// The guest sends it to the other guest, where it is judged once more.
    Between,
}

/// What the kernel does with a frame on a real tap before any guard can judge it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Sending it fails.
    Refused,
    /// It vanishes uncounted.
    Unseen,
}

/// What about the guard is not as usual. Such cases go through no real tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Special {
    /// Nothing.
    #[default]
    Usual,
    /// No policy was ever committed.
    NoPolicy,
    /// Its lease has ended.
    LeaseOver,
    /// Every rate is used up.
    RatesUsedUp,
    /// The guest has all the flows open that it may have, none of which is a case's.
    FlowsFull,
    /// Its IPv6 gateway is fe80::1.
    LinkGateway,
}

/// `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VnetHeader {
    /// 1: a checksum is still to be written; 2: the data is valid.
    pub flags: u8,
    /// 0 none, 1 TCP over IPv4, 3 UDP fragmentation, 4 TCP over IPv6, 5 UDP segmentation.
    pub gso_type: u8,
    /// Length of all headers, which the kernel makes linear.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the checksum starts.
    pub csum_start: u16,
    /// Where it is written, from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// The header as a tap with `IFF_VNET_HDR` takes it.
    pub fn bytes(&self) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        let words = [
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
        ];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// One frame and what must become of it.
#[derive(Clone, Debug)]
pub struct Case {
    /// The file that it stands in.
    pub class: &'static str,
    /// Its name, of its own in the whole corpus.
    pub name: String,
    /// Why it matters.
    pub why: String,
    /// Where it comes from.
    pub source: String,
    /// Which way it travels.
    pub way: Way,
    /// The guard's mode.
    pub mode: Mode,
    /// What else about the guard is not as usual.
    pub guard: Special,
    /// The case whose frame is sent first, and allowed.
    pub before: Option<String>,
    /// What must become of it.
    pub expect: Outcome,
    /// What becomes of it at present, where that is not what must.
    pub today: Option<Outcome>,
    /// What must become of it at the other guest's guard ([`Way::Between`]).
    pub at_neighbour: Option<Outcome>,
    /// What the kernel does with it on a real tap, before the guard.
    pub tap: Option<Fate>,
    /// A VLAN tag beside the bytes.
    pub vlan: Option<u16>,
    /// An offload header beside the bytes.
    pub vnet: Option<VnetHeader>,
    /// Its bytes, from the Ethernet header on.
    pub frame: Vec<u8>,
}

impl Case {
    /// The outcome that a test should see: [`Case::today`] where it is given.
    pub fn present(&self) -> Outcome {
        self.today.unwrap_or(self.expect)
    }
}

/// Why the corpus cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// A file is not what its parser takes.
    #[error("tests/corpus/{file}")]
    File {
        /// The file.
        file: &'static str,
        /// What is wrong with it.
        source: Box<toml::de::Error>,
    },
    /// A case is wrong.
    #[error("tests/corpus/cases/{class}.toml, case {name}: {problem}")]
    Case {
        /// The file.
        class: &'static str,
        /// The case.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCase {
    name: String,
    why: String,
    source: String,
    way: Way,
    mode: Option<String>,
    #[serde(default)]
    guard: Special,
    before: Option<String>,
    expect: String,
    today: Option<String>,
    at_neighbour: Option<String>,
    tap: Option<Fate>,
    vlan: Option<u16>,
    vnet: Option<VnetHeader>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    defaults: Table,
    case: Vec<Table>,
}

/// Every case, by file and then as written.
///
/// # Errors
/// Where a file has unknown keys, a case is incomplete, or two have one name.
pub fn cases() -> Result<Vec<Case>, CorpusError> {
    let cast = Cast::load()?;
    let mut cases: Vec<Case> = Vec::new();
    for (class, text) in FILES {
        let file: File = toml::from_str(text).map_err(|source| CorpusError::File {
            file: class,
            source: Box::new(source),
        })?;
        for table in file.case {
            let name = table
                .get("name")
                .and_then(Value::as_str)
                .unwrap_or("without a name");
            let name = name.to_owned();
            let wrong = |problem| CorpusError::Case {
                class,
                name: name.clone(),
                problem,
            };
            let mut whole = file.defaults.clone();
            merge(&mut whole, table);
            cases.push(read(&cast, class, whole).map_err(wrong)?);
        }
    }
    let mut names = BTreeSet::new();
    for case in &cases {
        if !names.insert(case.name.clone()) {
            return Err(CorpusError::Case {
                class: case.class,
                name: case.name.clone(),
                problem: "another case has this name".to_owned(),
            });
        }
    }
    Ok(cases)
}

fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn read(cast: &Cast, class: &'static str, table: Table) -> Result<Case, String> {
    let (own, frame): (Table, Table) = table
        .into_iter()
        .partition(|(key, _)| CASE_KEYS.contains(&key.as_str()));
    let raw: RawCase = own.try_into().map_err(|error| error.to_string())?;
    let spec: Spec = frame.try_into().map_err(|error| error.to_string())?;
    if raw.why.is_empty() || raw.source.is_empty() {
        return Err("says neither why it matters nor where it comes from".to_owned());
    }
    if (raw.way == Way::Between) != raw.at_neighbour.is_some() {
        return Err("at_neighbour belongs to cases between guests, and to all of them".to_owned());
    }
    let frame = compose::compose(cast, &spec, raw.way)?;
    Ok(Case {
        class,
        name: raw.name,
        why: raw.why,
        source: raw.source,
        way: raw.way,
        mode: raw.mode.as_deref().unwrap_or("filtered").parse()?,
        guard: raw.guard,
        before: raw.before,
        expect: outcome(&raw.expect)?,
        today: raw.today.as_deref().map(outcome).transpose()?,
        at_neighbour: raw.at_neighbour.as_deref().map(outcome).transpose()?,
        tap: raw.tap,
        vlan: raw.vlan,
        vnet: raw.vnet,
        frame,
    })
}

fn outcome(word: &str) -> Result<Outcome, String> {
    match word {
        "allowed" => Ok(Outcome::Allowed),
        "answered" => Ok(Outcome::Answered),
        _ => Reason::from_word(word)
            .map(Outcome::Dropped)
            .ok_or_else(|| format!("no outcome: {word}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_corpus_is_read_whole() {
        let cases = cases()
            .unwrap_or_else(|error| panic!("{error}: {:?}", std::error::Error::source(&error)));
        for (class, _) in FILES {
            assert!(
                cases.iter().any(|case| case.class == *class),
                "{class} is empty"
            );
        }
        for case in &cases {
            if let Some(name) = &case.before {
                let before = cases.iter().find(|before| before.name == *name);
                let before = before.unwrap_or_else(|| panic!("{}: no case {name}", case.name));
                assert_eq!(
                    (before.expect, before.mode, before.guard),
                    (Outcome::Allowed, case.mode, case.guard),
                    "{}",
                    case.name
                );
            }
        }
        println!("{} cases in {} files", cases.len(), FILES.len());
    }

    #[test]
    fn no_two_cases_are_one() {
        let cases = cases().unwrap();
        let mut twins = Vec::new();
        for (index, case) in cases.iter().enumerate() {
            let same = |other: &&Case| {
                other.frame == case.frame
                    && (other.way, other.mode, &other.before) == (case.way, case.mode, &case.before)
                    && other.guard == case.guard
                    && (other.vlan, other.vnet) == (case.vlan, case.vnet)
            };
            if let Some(twin) = cases[..index].iter().find(same) {
                twins.push((&twin.name, &case.name));
            }
        }
        assert!(twins.is_empty(), "{twins:#?}");
    }

    #[test]
    fn every_file_is_read() {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
        for entry in std::fs::read_dir(directory).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(
                FILES
                    .iter()
                    .any(|(class, _)| format!("{class}.toml") == name),
                "{name}"
            );
        }
    }

    #[test]
    fn what_is_misspelled_is_refused() {
        let good = "name = 'x'\nwhy = 'x'\nsource = 'x'\nway = 'from_guest'\nexpect = 'allowed'\nframe = 'udp4'\n";
        let cast = Cast::load().unwrap();
        let read = |text: &str| read(&cast, "test", toml::from_str(text).unwrap());
        assert!(read(good).is_ok());
        for wrong in [
            "ip4.destination = 'guest'",
            "ip6.dst = 'guest6'",
            "expects = 'allowed'",
            "mode = 'open'",
            "ip4.dst = 'nobody'",
            "ip4.dst = 'guest6'",
            "l4 = '0'",
            "truncate = 1000",
            "poke = [[1000, '00']]",
            "at_neighbour = 'allowed'",
            "vnet = { gso = 1 }",
            "arp.operation = 1",
            "today = 'dropped'",
        ] {
            assert!(read(&format!("{good}{wrong}")).is_err(), "{wrong}");
        }
    }
}
