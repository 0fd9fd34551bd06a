//! `policy`: from the call that changes an allowlist until the kernel enforces it.
//!
//! The commit is a store to a map that the programs read, so the call's return is the moment of
//! enforcement. `replace` rows begin with endpoints in memory, and make the guard's handle before;
//! `file` rows are a whole `omerta guard replace --file`, from the process' start to its end.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use omerta_dataplane::{Guard, PolicyStore};
use omerta_kernel_tests::{GATEWAY_MAC, config};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::{Endpoint, Mode};

use crate::machine::beside;
use crate::report::{Bench, median};
use crate::rounds::{Case, Rounds};
use crate::verdict::loaded;

/// Commits in one round.
const COMMITS: usize = 101;
/// Switches in one round.
const SWITCHES: u32 = 10_000;

fn many(count: usize) -> Vec<Endpoint> {
    (0..count)
        .filter_map(|index| {
            let [_, high, middle, low] = (index as u32).to_be_bytes();
            format!("udp:100.{}.{middle}.{low}:51820", 64 + high)
                .parse()
                .ok()
        })
        .collect()
}

fn microseconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_secs_f64() * 1e6)
}

pub fn measure(rounds: Rounds) -> Result<Bench> {
    let namespace = Namespace::new("omerta-bench")?;
    let _tap = namespace.enter(|| Tap::create("guest"))??;
    namespace.ip(&format!("link set guest address {GATEWAY_MAC}"))?;
    let samples = namespace.enter(|| -> Result<_> {
        let attach_once = || {
            microseconds(|| {
                Guard::attach("guest", &config(Mode::Filtered))?;
                Ok(())
            })
        };
        attach_once()?;
        let endpoint: Endpoint = "udp:203.0.113.7:4433".parse()?;
        let all = many(1_000_000);
        let commits = || -> Result<Vec<f64>> {
            let guard = Guard::open("guest")?;
            let mut figures = Vec::with_capacity(COMMITS);
            for turn in 0..COMMITS {
                figures.push(microseconds(|| {
                    if turn % 2 == 0 {
                        guard.allow(&[endpoint])?;
                    } else {
                        guard.revoke(&[endpoint])?;
                    }
                    Ok(())
                })?);
            }
            figures.sort_by(f64::total_cmp);
            Ok(figures)
        };
        let replace = |list: &[Endpoint]| -> Result<f64> {
            let guard = Guard::open("guest")?;
            let took = microseconds(|| {
                guard.replace(list)?;
                Ok(())
            })?;
            guard.replace(&omerta_kernel_tests::allowlist())?;
            Ok(took)
        };
        let directory = tempfile::tempdir()?;
        let replace_by_file = |list: &[Endpoint]| -> Result<f64> {
            let file = directory.path().join("allowlist");
            let lines: Vec<_> = list
                .iter()
                .map(|endpoint| format!("{endpoint}\n"))
                .collect();
            std::fs::write(&file, lines.concat())?;
            let mut command = Command::new(beside("omerta")?);
            command
                .args(["guard", "replace", "guest", "--file"])
                .arg(&file);
            let took = microseconds(|| {
                let output = command.output().context("run omerta")?;
                if !output.status.success() {
                    bail!("omerta: {}", String::from_utf8_lossy(&output.stderr));
                }
                Ok(())
            })?;
            Guard::open("guest")?.replace(&omerta_kernel_tests::allowlist())?;
            Ok(took)
        };
        let unattached = loaded(Mode::Filtered)?;
        let samples = rounds.run(vec![
            Case::new("commit-p50", "commit-p50", || Ok(median(&commits()?))),
            Case::new("commit-p99", "commit-p50", || {
                let figures = commits()?;
                Ok(figures[figures.len() * 99 / 100])
            }),
            Case::new("replace-1k", "commit-p50", || replace(&all[..1000])),
            Case::new("replace-100k", "commit-p50", || replace(&all[..100_000])),
            Case::new("replace-1m", "commit-p50", || replace(&all)),
            Case::new("file-100k", "commit-p50", || {
                replace_by_file(&all[..100_000])
            }),
            Case::new("file-1m", "commit-p50", || replace_by_file(&all)),
            // A policy with its short allowlist is written, and the word that puts it in force.
            Case::new("switch", "commit-p50", || {
                let mut store = PolicyStore::of(&unattached, "bench")?;
                let took = microseconds(|| {
                    for _ in 0..SWITCHES {
                        store.repeat();
                    }
                    Ok(())
                })?;
                Ok(took / f64::from(SWITCHES))
            }),
            Case::new("attach", "commit-p50", || {
                Guard::open("guest")?.detach()?;
                attach_once()
            }),
        ]);
        // Pins outlive the namespace.
        Guard::open("guest")?.detach()?;
        samples
    })??;
    Ok(Bench::of("policy", "us", &rounds, &samples, Vec::new()))
}
