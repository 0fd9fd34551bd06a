//! Runs until Ctrl-C, or for `--seconds`: parity of kernel and native verdict, and traffic through
//! a real tap while a controller flips the policy and is killed. Says where it is every ten
//! seconds; ends in a summary, and with status 1 at the first frame that went wrong.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Parser;
use omerta_soak::{Storm, flip_without_end, parity};

#[derive(Parser)]
#[command(name = "omerta-soak")]
struct Arguments {
    /// End after this time, in seconds
    #[arg(long)]
    seconds: Option<u64>,
    /// Where parity's random frames start
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// End after this many frames of parity
    #[arg(long)]
    frames: Option<u64>,
    /// End after this many controllers killed
    #[arg(long)]
    kills: Option<u64>,
    /// Only this part
    #[arg(long)]
    only: Option<Part>,
    /// Flip the policy of the tap of this namespace without end
    #[arg(long, hide = true)]
    controller: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    Parity,
    Flip,
    Kill,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    if arguments.controller {
        return flip_without_end();
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "soak needs root: taps, namespaces, programs"
    );
    let myself = std::env::current_exe().context("cannot find this program")?;
    let end = arguments
        .seconds
        .map(|seconds| Instant::now() + Duration::from_secs(seconds));
    // Parts take turns, so that each sees the whole time.
    let mut turn = Turn::new(myself, &arguments)?;
    loop {
        for part in [Part::Parity, Part::Flip, Part::Kill] {
            if arguments.only.is_none_or(|only| only == part) {
                turn.take(part, Duration::from_secs(10))?;
            }
            if turn.is_over() || end.is_some_and(|end| Instant::now() >= end) {
                println!("soak: {}: no difference, no leak, no loss", turn.summary());
                return Ok(());
            }
        }
        println!("soak: {}", turn.summary());
    }
}

struct Turn {
    parity: parity::Parity,
    storm: Storm,
    controller: PathBuf,
    frames: Option<u64>,
    kills: Option<u64>,
}

impl Turn {
    fn new(controller: PathBuf, arguments: &Arguments) -> anyhow::Result<Self> {
        Ok(Self {
            parity: parity::Parity::new(arguments.seed)?,
            storm: Storm::new()?,
            controller,
            frames: arguments.frames,
            kills: arguments.kills,
        })
    }

    fn take(&mut self, part: Part, time: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + time;
        match part {
            Part::Parity => self.parity.run(until, self.frames),
            Part::Flip => self.storm.run(&self.controller, until),
            Part::Kill => {
                let left = self
                    .kills
                    .map_or(u64::MAX, |kills| kills.saturating_sub(self.storm.kills()));
                self.storm.run_killing(&self.controller, until, left)
            }
        }
    }

    /// Whether as much was done as was asked for.
    fn is_over(&self) -> bool {
        (self.frames.is_some() || self.kills.is_some())
            && self
                .frames
                .is_none_or(|frames| self.parity.frames() >= frames)
            && self.kills.is_none_or(|kills| self.storm.kills() >= kills)
    }

    fn summary(&self) -> String {
        format!("{}; {}", self.parity.summary(), self.storm.summary())
    }
}
