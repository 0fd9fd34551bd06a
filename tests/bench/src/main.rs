//! `make bench`: what a guard costs. Every figure is the median of interleaved rounds in one run,
//! so that a busy machine slows all cases alike, and is given beside its ratio to the case that
//! the table names. Load goes to namespaces that the benches make, without a way out.

mod capture;
mod fleet;
mod floor;
mod iperf;
mod kernel;
mod launch;
mod machine;
mod many;
mod network;
mod plot;
mod policy;
mod readme;
mod report;
mod response;
mod rounds;
mod scale;
mod table;
mod tap;
mod to_guest;
mod tunnel;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

use crate::many::Host;
use crate::report::Bench;
use crate::rounds::Rounds;

/// Measures guards and writes JSON, SVG and a table.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    /// Which benches to run; all where none is named.
    #[arg(value_parser = NAMES)]
    names: Vec<String>,
    /// Rounds, each of which runs every case of a bench once. An odd number has a median.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(3..=1001))]
    rounds: u32,
    /// Run only this case and the one that its ratio is against; may be given again
    #[arg(long = "case", value_name = "CASE")]
    cases: Vec<String>,
    /// Where the results go.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Measure nothing: write the table in this file from the results of former runs.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["names", "rounds", "cases"])]
    readme: Option<PathBuf>,
}

const NAMES: [&str; 12] = [
    "verdict", "floor", "table", "tap", "policy", "capture", "scale", "iperf", "tunnel", "fleet",
    "launch", "response",
];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The result files that the README shows.
const SHOWN: [&str; 23] = [
    "verdict",
    "floor",
    "table",
    "tap",
    "policy",
    "capture",
    "capture-kept",
    "scale",
    "scale-load",
    "scale-memory",
    "iperf",
    "tunnel",
    "tunnel-cpu",
    "tunnel-move",
    "fleet",
    "launch",
    "launch-image",
    "launch-many",
    "launch-memory",
    "launch-idle",
    "response",
    "response-end",
    "response-flood",
];

fn run(arguments: &Arguments) -> Result<()> {
    if let Some(readme) = &arguments.readme {
        return readme::write(readme, &arguments.out, &SHOWN);
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("benches load kernel programs and make namespaces: run as root (sudo make bench)");
    }
    let wanted: Vec<&str> = NAMES
        .into_iter()
        .filter(|name| arguments.names.is_empty() || arguments.names.iter().any(|n| n == name))
        .collect();
    std::fs::create_dir_all(&arguments.out)
        .with_context(|| format!("cannot make {}", arguments.out.display()))?;
    println!("bench: {}", machine::describe());
    if let Some(load) = machine::load().filter(|load| *load > 0.5) {
        println!("bench: the machine is busy (load {load:.1}): ratios hold better than figures");
    }
    let mut host = None;
    let mut written = 0;
    for name in &wanted {
        let rounds = Rounds::new(name, arguments.rounds, &arguments.cases);
        for bench in measure(name, rounds, &mut host).with_context(|| format!("bench {name}"))? {
            bench.print();
            bench.write(&arguments.out)?;
            written += 1;
        }
    }
    println!(
        "bench: {} of {} benches done, {written} result files in {}",
        wanted.len(),
        NAMES.len(),
        arguments.out.display()
    );
    Ok(())
}

/// `host` is made by the first bench that needs it: attaching its guards takes minutes.
fn measure(name: &str, rounds: Rounds, host: &mut Option<Host>) -> Result<Vec<Bench>> {
    Ok(match name {
        "verdict" => vec![verdict::measure(rounds)?],
        "floor" => vec![floor::measure(rounds)?],
        "table" => vec![table::measure(rounds)?],
        "tap" => vec![tap::measure(rounds)?],
        "capture" => capture::measure(rounds)?,
        "scale" => scale::measure(rounds, many(host)?)?,
        "launch" => launch::measure(rounds)?,
        "response" => response::measure(rounds)?,
        "tunnel" => tunnel::measure(&rounds)?,
        "iperf" => vec![iperf::measure(rounds)?],
        "fleet" => vec![fleet::measure(rounds, many(host)?)?],
        _ => vec![policy::measure(rounds)?],
    })
}

fn many(host: &mut Option<Host>) -> Result<&Host> {
    if host.is_none() {
        *host = Some(Host::new()?);
    }
    host.as_ref().context("a host of many guards")
}
