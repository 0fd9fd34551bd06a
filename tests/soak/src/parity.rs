//! Kernel and native verdict on random frames, on every CPU.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use fastrand::Rng;
use omerta_kernel_tests::{Generator, Pair, test_run_takes};
use omerta_verdict::{Direction, Mode};

/// Streams of frames, each judged twice in both directions.
pub struct Parity {
    streams: Vec<Stream>,
    busy: Duration,
}

/// One stream: it has guards and a seed of its own.
struct Stream {
    pairs: Vec<Pair>,
    generator: Generator,
    time: Rng,
    seed: u64,
    frames: u64,
}

impl Parity {
    /// As many streams as there are CPUs, with the seeds from `seed` on.
    ///
    /// # Errors
    /// Where the kernel does not take the programs.
    pub fn new(seed: u64) -> anyhow::Result<Self> {
        let count = thread::available_parallelism()?.get() as u64;
        let streams = (0..count).map(|index| Stream::new(seed.wrapping_add(index)));
        Ok(Self {
            streams: streams.collect::<anyhow::Result<_>>()?,
            busy: Duration::ZERO,
        })
    }

    /// Judges until then, or until `most` frames were judged in all.
    ///
    /// # Errors
    /// At the first difference.
    pub fn run(&mut self, until: Instant, most: Option<u64>) -> anyhow::Result<()> {
        let begun = Instant::now();
        let most = most.map(|most| most.div_ceil(self.streams.len() as u64));
        thread::scope(|scope| {
            let streams: Vec<_> = self
                .streams
                .iter_mut()
                .map(|stream| scope.spawn(move || stream.run(until, most)))
                .collect();
            streams.into_iter().try_for_each(|stream| {
                stream
                    .join()
                    .unwrap_or_else(|_| Err(anyhow!("a stream of frames panicked")))
            })
        })?;
        self.busy += begun.elapsed();
        Ok(())
    }

    /// How many frames were judged.
    pub fn frames(&self) -> u64 {
        self.streams.iter().map(|stream| stream.frames).sum()
    }

    /// Frames and rate, in words.
    pub fn summary(&self) -> String {
        let frames = self.frames();
        let rate = frames as f64 / self.busy.as_secs_f64().max(f64::EPSILON);
        format!("parity {frames} frames in both directions, {rate:.0}/s")
    }
}

impl Stream {
    fn new(seed: u64) -> anyhow::Result<Self> {
        Ok(Self {
            // They take turns, so filtered and conntrack mode get most frames: the others differ
            // in one step only.
            pairs: vec![
                Pair::new(Mode::Filtered)?,
                Pair::new(Mode::Conntrack)?,
                Pair::limited(Mode::Filtered)?,
                Pair::new(Mode::Filtered)?,
                Pair::limited(Mode::Conntrack)?,
                Pair::sampled(0)?,
                Pair::sampled(1)?,
                Pair::new(Mode::Direct)?,
            ],
            generator: Generator::new(seed),
            time: Rng::with_seed(seed),
            seed,
            frames: 0,
        })
    }

    fn run(&mut self, until: Instant, most: Option<u64>) -> anyhow::Result<()> {
        let done = |frames| most.is_some_and(|most| frames >= most);
        while Instant::now() < until && !done(self.frames) {
            for index in 0..self.pairs.len() {
                self.turn(index)?;
            }
        }
        Ok(())
    }

    /// Some frames for one pair while time passes, then a look at what its guards remember.
    fn turn(&mut self, index: usize) -> anyhow::Result<()> {
        let pair = &mut self.pairs[index];
        for number in 0..1024 {
            let frame = self.generator.frame();
            if number % 64 == 0 {
                pair.pass_time(&mut self.time)?;
            }
            if !test_run_takes(&frame) {
                continue;
            }
            self.frames += 1;
            for direction in Direction::ALL {
                if let Err(difference) = pair.judge(direction, &frame) {
                    let (seed, number, way) = (self.seed, self.frames, direction.word());
                    bail!("parity, seed {seed}, frame {number}, {way}: {difference}\n{frame:02x?}");
                }
            }
        }
        if let Err(difference) = pair.compare_state() {
            let (seed, number) = (self.seed, self.frames);
            bail!("parity, seed {seed}, after frame {number}: {difference}");
        }
        Ok(())
    }
}
