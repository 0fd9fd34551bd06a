//! Kernel and native verdict on random frames.

use std::time::{Duration, Instant};

use anyhow::bail;
use omerta_kernel_tests::{Generator, Pair, test_run_takes};
use omerta_verdict::{Direction, Mode};

/// A stream of frames, judged twice in both directions.
pub struct Parity {
    pairs: [Pair; 2],
    generator: Generator,
    seed: u64,
    frames: u64,
    busy: Duration,
}

impl Parity {
    /// Filtered and direct mode, on the stream that belongs to `seed`.
    ///
    /// # Errors
    /// Where the kernel does not take the programs.
    pub fn new(seed: u64) -> anyhow::Result<Self> {
        Ok(Self {
            pairs: [Pair::new(Mode::Filtered)?, Pair::new(Mode::Direct)?],
            generator: Generator::new(seed),
            seed,
            frames: 0,
            busy: Duration::ZERO,
        })
    }

    /// Judges until then.
    ///
    /// # Errors
    /// At the first difference.
    pub fn run(&mut self, until: Instant) -> anyhow::Result<()> {
        let begun = Instant::now();
        while Instant::now() < until {
            for _ in 0..1000 {
                let frame = self.generator.frame();
                if test_run_takes(&frame) {
                    self.judge(&frame)?;
                }
            }
        }
        self.busy += begun.elapsed();
        Ok(())
    }

    fn judge(&mut self, frame: &[u8]) -> anyhow::Result<()> {
        // Direct mode differs in one step only: one frame in eight is enough.
        let [filtered, direct] = &mut self.pairs;
        let pair = if self.frames.is_multiple_of(8) {
            direct
        } else {
            filtered
        };
        self.frames += 1;
        for direction in Direction::ALL {
            if let Some(difference) = pair.differs(direction, frame) {
                let (seed, number, way) = (self.seed, self.frames, direction.word());
                bail!("parity, seed {seed}, frame {number}, {way}: {difference}\n{frame:02x?}");
            }
        }
        Ok(())
    }

    /// How many frames were judged.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Frames and rate, in words.
    pub fn summary(&self) -> String {
        let rate = self.frames as f64 / self.busy.as_secs_f64().max(f64::EPSILON);
        format!(
            "parity {} frames in both directions, {rate:.0}/s",
            self.frames
        )
    }
}
