//! `table`: one lookup of a random key that is listed, in the guard's allowlist, a BPF hash and a BPF
//! trie, each as long. The keys are of the same 20 bytes. `floor` reads a word of a random bucket of the
//! guard's array and compares nothing.
//!
//! Random keys are made in the kernel, by a program that looks up many in a run; what making them
//! takes is measured beside each figure and taken off. Successive lookups do not wait for each other,
//! so a processor may have several misses of its caches under way at once, in all three alike.

use anyhow::{Context, Result, bail};
use aya::maps::{Array, MapData};
use aya::programs::SchedClassifier;
use omerta_dataplane::{PolicyStore, Programs};
use omerta_kernel_tests::config;
use omerta_verdict::{Address, Endpoint, Mode, Protocol};

use crate::kernel;
use crate::report::Bench;
use crate::rounds::{Case, Rounds};

pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_BENCH_PROGRAMS"));

/// As in ebpf/programs/bench/table.rs.
const LOOKUPS: i32 = 64;
const PORT: u16 = 51820;
/// Runs in one measurement: a million lookups.
const REPEAT: u32 = 16_384;

/// What is looked up in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Guard,
    /// One word of a random bucket of the guard's.
    Floor,
    Hash,
    Trie,
}

const BASE: &str = "guard-1k";
const CASES: [(&str, Kind, u32); 9] = [
    (BASE, Kind::Guard, 1_000),
    ("guard-100k", Kind::Guard, 100_000),
    ("guard-1m", Kind::Guard, 1_000_000),
    ("floor-1k", Kind::Floor, 1_000),
    ("floor-1m", Kind::Floor, 1_000_000),
    ("hash-1k", Kind::Hash, 1_000),
    ("hash-1m", Kind::Hash, 1_000_000),
    ("lpm-1k", Kind::Trie, 1_000),
    ("lpm-1m", Kind::Trie, 1_000_000),
];

/// The table of one case, and the programs that look up in it.
struct Table {
    programs: Programs,
    program: &'static str,
}

/// The IPv4 address of key `index`.
fn address(index: u32) -> u32 {
    index.wrapping_mul(0x9e37_79b1)
}

impl Table {
    fn new(kind: Kind, entries: u32) -> Result<Self> {
        let (program, map) = match kind {
            Kind::Guard => ("guard", None),
            Kind::Floor => ("floor", None),
            Kind::Hash => ("hash", Some("HASH")),
            Kind::Trie => ("trie", Some("TRIE")),
        };
        let sizes: Vec<_> = map.map(|map| (map, entries)).into_iter().collect();
        let mut programs = Programs::fitted(OBJECT, &[("ENTRIES", entries)], &sizes)?;
        let object = programs.object_mut();
        let mut random: Array<&mut MapData, u64> = object
            .map_mut("RANDOM")
            .context("the map RANDOM")?
            .try_into()?;
        random.set(0, 0x9e37_79b9_7f4a_7c15, 0)?;
        match kind {
            Kind::Guard | Kind::Floor => {
                let endpoints: Vec<_> = (0..entries)
                    .map(|index| Endpoint {
                        protocol: Protocol::Udp,
                        address: Address::from(std::net::IpAddr::from(
                            std::net::Ipv4Addr::from_bits(address(index)),
                        )),
                        port: PORT,
                    })
                    .collect();
                PolicyStore::of(&programs, "bench")?
                    .commit(config(Mode::Filtered).policy("bench")?, &endpoints)?;
            }
            Kind::Hash | Kind::Trie => {
                let service = (Protocol::Udp as u32) << 16 | u32::from(PORT);
                let words = |index| [0, 0, 0xffff, address(index), service];
                let ones = vec![1_u32; entries as usize];
                let name = map.context("the table's map")?;
                let data = match programs.object().map(name).context("the table's map")? {
                    aya::maps::Map::HashMap(data) | aya::maps::Map::LpmTrie(data) => data,
                    _ => bail!("the map {name} is of another kind"),
                };
                if kind == Kind::Hash {
                    let keys: Vec<_> = (0..entries).map(words).collect();
                    kernel::fill(data.fd(), &keys, &ones)?;
                } else {
                    /// Bits of the key, ahead of it.
                    const BITS: u32 = 160;
                    let key = |index| {
                        let [a, b, c, d, e] = words(index);
                        [BITS, a, b, c, d, e]
                    };
                    let keys: Vec<_> = (0..entries).map(key).collect();
                    kernel::fill(data.fd(), &keys, &ones)?;
                }
            }
        }
        for name in ["keys", program] {
            let program: &mut SchedClassifier = programs
                .object_mut()
                .program_mut(name)
                .with_context(|| format!("the program {name}"))?
                .try_into()?;
            program
                .load()
                .with_context(|| format!("load the program {name}"))?;
        }
        Ok(Self { programs, program })
    }

    /// Nanoseconds a key of the program `name`, which must find every key.
    fn run(&self, name: &str) -> Result<f64> {
        let program: &SchedClassifier = self
            .programs
            .object()
            .program(name)
            .with_context(|| format!("the program {name}"))?
            .try_into()?;
        // Whatever the frame is, it is not looked at.
        let (found, nanoseconds) = kernel::test_run(program.fd()?, &[0; 64], REPEAT)?;
        if found != LOOKUPS {
            bail!("{name} found {found} of {LOOKUPS} keys");
        }
        Ok(nanoseconds / f64::from(LOOKUPS))
    }

    /// Nanoseconds of one lookup.
    fn look_up(&self) -> Result<f64> {
        let keys = self.run("keys")?;
        Ok(self.run(self.program)? - keys)
    }
}

pub fn measure(rounds: Rounds) -> Result<Bench> {
    let mut tables = Vec::new();
    for (name, kind, entries) in CASES {
        if rounds.wants(name) || name == BASE {
            println!("bench: table: filling {name}");
            let table = Table::new(kind, entries).with_context(|| format!("case {name}"))?;
            tables.push((name, table));
        }
    }
    let cases = tables
        .iter()
        .map(|(name, table)| Case::new(name, BASE, || table.look_up()))
        .collect();
    let samples = rounds.run(cases)?;
    Ok(Bench::of("table", "ns", &rounds, &samples, Vec::new()))
}
