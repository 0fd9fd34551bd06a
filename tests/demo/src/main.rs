//! `make demo`: a real guest whose only reachable endpoint is its consumer's WireGuard, what it
//! tries as root to get past that, and what becomes of it when it does not give up.
//!
//! The provider, its LAN, the internet, the consumers and the tenants are namespaces of this
//! program's own, without any route to the machine's uplink. All of it is taken down at the end,
//! also after Ctrl-C, and the last check is that nothing of it is left.

mod act;
mod attempt;
mod bounded;
mod console;
mod consumer;
mod daemon;
mod guest;
mod interrupt;
mod leftovers;
mod metrics;
mod omerta;
mod packet;
mod page;
mod report;
mod requirements;
mod stage;
mod traces;
mod witness;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::interrupt::Interrupted;
use crate::leftovers::Leftovers;
use crate::report::Report;

/// Boots two real guests on a stage of network namespaces and shows what they reach.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where `omerta` and `omertad` are [default: this program's own directory]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,

    /// The guest image: a directory with `vmlinuz` and `initrd.img`
    #[arg(long, value_name = "DIR", default_value = "target/image")]
    image_dir: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut report = Report::new();
    let mut leftovers = Leftovers::default();
    let played = interrupt::install()
        .and_then(|()| requirements::find(&arguments))
        .and_then(|requirements| act::play(&requirements, &mut report, &mut leftovers));
    // Whatever the play set up has been dropped by now, however it ended.
    if leftovers.watched() {
        report.act("Nothing is left");
        leftovers.check(&mut report);
    }
    match played {
        Ok(()) => report.finish(),
        Err(error) => {
            match error.downcast_ref::<Interrupted>() {
                Some(interrupted) => {
                    report.complain(&format!("{interrupted}; everything was taken down"))
                }
                None => report.complain(&format!("{error:#}")),
            }
            report.abort()
        }
    }
}
