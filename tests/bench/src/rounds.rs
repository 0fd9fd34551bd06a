//! Interleaved rounds: every case once a round, each round beginning with another case.

use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};

/// One thing that is measured: a name and what gives one figure.
pub struct Case<'a> {
    /// The row's name.
    pub name: &'static str,
    /// The row that its ratio is against; its own where it is the first of a group.
    pub against: &'static str,
    /// Measures once.
    pub once: Box<dyn FnMut() -> Result<f64> + 'a>,
}

impl<'a> Case<'a> {
    /// A case whose ratio is against `against`.
    pub fn new(
        name: &'static str,
        against: &'static str,
        once: impl FnMut() -> Result<f64> + 'a,
    ) -> Self {
        Self {
            name,
            against,
            once: Box::new(once),
        }
    }
}

/// How many rounds a bench runs.
pub struct Rounds {
    bench: String,
    count: u32,
    only: Vec<String>,
}

/// The figures of one case, in the order of the rounds.
pub struct Samples {
    /// The case's name.
    pub name: &'static str,
    /// The case that its ratio is against.
    pub against: &'static str,
    /// One figure a round.
    pub figures: Vec<f64>,
}

impl Rounds {
    /// `only` names the cases to run, each with the one that its ratio is against; all where it
    /// is empty.
    pub fn new(bench: &str, count: u32, only: &[String]) -> Self {
        Self {
            bench: bench.to_owned(),
            count,
            only: only.to_vec(),
        }
    }

    /// As many, up to `most`, of `bench`.
    pub fn at_most(&self, bench: &str, most: u32) -> Self {
        Self::new(bench, self.count.min(most), &self.only)
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether the case was asked for: those that are not need not be set up.
    pub fn wants(&self, case: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == case)
    }

    /// Runs all cases, after one round that does not count.
    pub fn run(&self, mut cases: Vec<Case>) -> Result<Vec<Samples>> {
        if !self.only.is_empty() {
            let named = |name: &str| self.only.iter().any(|only| only == name);
            let bases: Vec<_> = cases
                .iter()
                .filter(|case| named(case.name))
                .map(|case| case.against)
                .collect();
            cases.retain(|case| named(case.name) || bases.contains(&case.name));
        }
        let mut samples: Vec<_> = cases
            .iter()
            .map(|case| Samples {
                name: case.name,
                against: case.against,
                figures: Vec::new(),
            })
            .collect();
        let shown = std::io::stdout().is_terminal();
        let count = cases.len();
        for round in 0..=self.count {
            if shown {
                print!("\rbench: {} round {round} of {}", self.bench, self.count);
                std::io::stdout().flush()?;
            }
            for step in 0..count {
                let index = (step + round as usize) % count;
                let case = &mut cases[index];
                let figure = (case.once)().with_context(|| format!("case {}", case.name))?;
                if round > 0 {
                    samples[index].figures.push(figure);
                }
            }
        }
        if shown {
            print!("\r\x1b[K");
        }
        Ok(samples)
    }
}
