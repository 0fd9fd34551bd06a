//! The kernel matrix: the guard's tests on real interfaces, run by the kernels of Debian 12
//! (with clsact alone, and with TCX) in emulated machines, and by the running one. Ends in one table and
//! one line, `vm: N passed, N failed, N skipped`, which counts the machines alone: the running
//! kernel's tests are counted where they are run among the others.
//!
//! ```text
//! omerta-vm-matrix [SERIES...]      6.1, 6.12, running; all of them if none is named
//! ```
//!
//! `OMERTA_PARITY_FRAMES` reaches the tests; it is 20000 unless set.

mod initramfs;
mod kernel;
mod machine;
mod package;
mod suite;
mod table;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::kernel::Kernel;
use crate::suite::Suite;
use crate::table::Row;

/// The kernels that are fetched: Debian 12's own, and its newer one, which is Debian 13's.
const SERIES: [&str; 2] = ["6.1", "6.12"];
const RUNNING: &str = "running";
const PARITY_FRAMES: &str = "OMERTA_PARITY_FRAMES";
/// For one machine, from power on to power off.
const DEADLINE: Duration = Duration::from_secs(1200);

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool> {
    let wanted = series_from_arguments()?;
    let root = workspace();
    let cache = root.join("target/vm");
    let frames = std::env::var(PARITY_FRAMES).unwrap_or_else(|_| "20000".into());
    let suites = suite::build(&root)?;

    // Side by side: a machine seldom keeps two processors busy.
    let rows: Result<Vec<Vec<Row>>> = thread::scope(|scope| {
        let running: Vec<_> = wanted
            .iter()
            .map(|series| scope.spawn(|| on_kernel(series, &suites, &frames, &cache)))
            .collect();
        running
            .into_iter()
            .map(|one| one.join().unwrap_or_else(|cause| resume_unwind(cause)))
            .collect()
    });
    let rows: Vec<Row> = rows?.into_iter().flatten().collect();
    print!("{}", table::render(&rows));
    let machines = rows.iter().filter(|row| row.series != RUNNING);
    let (passed, failed, skipped) = machines.fold((0, 0, 0), |sum, row| {
        (sum.0 + row.passed, sum.1 + row.failed, sum.2 + row.skipped)
    });
    println!("vm: {passed} passed, {failed} failed, {skipped} skipped");
    Ok(rows.iter().all(|row| row.failed == 0) && passed + skipped > 0)
}

fn series_from_arguments() -> Result<Vec<String>> {
    let known = || SERIES.into_iter().chain([RUNNING]).map(str::to_owned);
    let named: Vec<String> = std::env::args().skip(1).collect();
    if let Some(stranger) = named.iter().find(|name| !known().any(|it| it == **name)) {
        bail!("{stranger}: no such kernel; one of 6.1, 6.12, running is meant");
    }
    Ok(if named.is_empty() {
        known().collect()
    } else {
        named
    })
}

fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

fn on_kernel(series: &str, suites: &[Suite], frames: &str, cache: &Path) -> Result<Vec<Row>> {
    if series == RUNNING {
        return on_this_kernel(suites, frames);
    }
    if let Some(kernel) = Kernel::fetch(series, cache)? {
        return in_a_machine(&kernel, suites, frames, cache);
    }
    let reason = format!("this distribution offers no Linux {series} for a machine");
    println!("vm: skipped: {reason}");
    Ok(vec![Row::skipped(series, &reason)])
}

fn in_a_machine(kernel: &Kernel, suites: &[Suite], frames: &str, cache: &Path) -> Result<Vec<Row>> {
    let initrd = cache.join(format!("initrd-{}.img", kernel.series));
    let suites: Vec<Suite> = suites
        .iter()
        .filter(|suite| suite::is_run(&kernel.series, &suite.name))
        .cloned()
        .collect();
    // By the hook that the kernel's guards use, and no other: the running kernel tries both.
    let environment = format!("{PARITY_FRAMES}={frames} OMERTA_HOOKS=own OMERTA_UPGRADES=4\n");
    initramfs::build(kernel, &suites, &environment, &initrd)
        .with_context(|| format!("cannot assemble {}", initrd.display()))?;
    println!("vm: Linux {} boots", kernel.release);
    let said = machine::run(&kernel.image, &initrd, DEADLINE)?;
    let console = cache.join(format!("console-{}.log", kernel.series));
    std::fs::write(&console, &said)?;
    let rows = table::read(&kernel.series, &said, &suites);
    for reason in table::skips(&said) {
        println!("vm: skipped: Linux {}: {reason}", kernel.series);
    }
    for line in table::noteworthy(&said) {
        println!("vm: {}: {line}", kernel.series);
    }
    if rows.iter().any(|row| row.failed > 0) {
        println!(
            "vm: all that Linux {} said is in {}",
            kernel.release,
            console.display()
        );
    }
    Ok(rows)
}

fn on_this_kernel(suites: &[Suite], frames: &str) -> Result<Vec<Row>> {
    let mut said = String::new();
    for suite in suites {
        said += &suite.run_here((PARITY_FRAMES, frames))?;
    }
    let rows = table::read(RUNNING, &said, suites);
    for line in table::noteworthy(&said) {
        println!("vm: {RUNNING}: {line}");
    }
    Ok(rows)
}
