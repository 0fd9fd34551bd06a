//! `make bench`: what a guard costs. Every figure is the median of interleaved rounds in one run,
//! so that a busy machine slows all cases alike, and is given beside its ratio to the case that
//! the table names. Load goes to namespaces that the benches make, without a way out.

mod capture;
mod kernel;
mod machine;
mod network;
mod plot;
mod policy;
mod report;
mod rounds;
mod table;
mod tap;
mod verdict;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

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
}

const NAMES: [&str; 5] = ["verdict", "table", "tap", "policy", "capture"];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
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
    let mut written = 0;
    for name in &wanted {
        let rounds = Rounds::new(name, arguments.rounds, &arguments.cases);
        for bench in measure(name, rounds).with_context(|| format!("bench {name}"))? {
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

fn measure(name: &str, rounds: Rounds) -> Result<Vec<Bench>> {
    Ok(match name {
        "verdict" => vec![verdict::measure(rounds)?],
        "table" => vec![table::measure(rounds)?],
        "tap" => vec![tap::measure(rounds)?],
        "capture" => vec![capture::measure(rounds)?],
        _ => vec![policy::measure(rounds)?],
    })
}
