//! What a bench found: JSON as the contract has it, an SVG and a table.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::machine;
use crate::plot;
use crate::rounds::{Rounds, Samples};

/// One bench's result, as written to `NAME.json`.
#[derive(Serialize)]
pub struct Bench {
    /// The bench's name.
    pub name: &'static str,
    /// The unit of the rows' figures.
    pub unit: &'static str,
    /// How many rounds the figures are the medians of.
    pub rounds: u32,
    /// Which machine.
    pub machine: String,
    /// One a case.
    pub rows: Vec<Row>,
    /// What could not be measured here, and why.
    pub missing: Vec<String>,
}

/// One case's figures.
#[derive(Serialize)]
pub struct Row {
    /// The case.
    pub case: &'static str,
    /// Median over the rounds.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// What ninety-nine of a hundred do not exceed, where there are so many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99: Option<f64>,
    /// Median over the rounds of the ratio to the case `against` in the same round.
    pub ratio: f64,
    /// The case that the ratio is against.
    pub against: &'static str,
}

impl Bench {
    /// The result of `samples`.
    pub fn of(
        name: &'static str,
        unit: &'static str,
        rounds: &Rounds,
        samples: &[Samples],
        missing: Vec<String>,
    ) -> Self {
        let rows = samples
            .iter()
            .filter_map(|case| {
                let base = samples.iter().find(|other| other.name == case.against)?;
                let ratios: Vec<f64> = case
                    .figures
                    .iter()
                    .zip(&base.figures)
                    .map(|(figure, base)| figure / base)
                    .collect();
                let sorted = sorted(&case.figures);
                Some(Row {
                    case: case.name,
                    median: median(&sorted),
                    min: *sorted.first()?,
                    max: *sorted.last()?,
                    p99: p99(&sorted),
                    ratio: median(&self::sorted(&ratios)),
                    against: case.against,
                })
            })
            .collect();
        Self {
            name,
            unit,
            rounds: rounds.count(),
            machine: machine::describe(),
            rows,
            missing,
        }
    }

    /// Prints the table.
    pub fn print(&self) {
        println!("\n{} ({}, {} rounds)", self.name, self.unit, self.rounds);
        println!(
            "  {:<24} {:>10} {:>10} {:>10} {:>8}  against",
            "case", "median", "min", "max", "ratio"
        );
        for row in &self.rows {
            println!(
                "  {:<24} {:>10.1} {:>10.1} {:>10.1} {:>8.3}  {}",
                row.case, row.median, row.min, row.max, row.ratio, row.against
            );
            if let Some(p99) = row.p99 {
                println!("  {:<24} {p99:>10.1}", "  p99");
            }
        }
        for missing in &self.missing {
            println!("  not measured: {missing}");
        }
    }

    /// Writes `NAME.json` and `NAME.svg` into `directory`.
    pub fn write(&self, directory: &Path) -> Result<()> {
        let write = |extension: &str, text: String| {
            let path = directory.join(format!("{}.{extension}", self.name));
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("json", serde_json::to_string_pretty(self)? + "\n")?;
        write("svg", plot::bars(self))
    }
}

fn sorted(figures: &[f64]) -> Vec<f64> {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// The 99th percentile of sorted figures, by nearest rank; of fewer than a hundred it would be the greatest.
fn p99(sorted: &[f64]) -> Option<f64> {
    let rank = (sorted.len() * 99).div_ceil(100);
    (sorted.len() >= 100).then(|| sorted.get(rank - 1).copied())?
}

/// The median of sorted figures; the mean of the middle two where their number is even.
pub fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match (
        sorted.len() % 2,
        sorted.get(middle),
        middle.checked_sub(1).and_then(|below| sorted.get(below)),
    ) {
        (1, Some(one), _) => *one,
        (0, Some(above), Some(below)) => (above + below) / 2.0,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(name: &'static str, figures: &[f64]) -> Samples {
        Samples {
            name,
            against: "base",
            figures: figures.to_vec(),
        }
    }

    #[test]
    fn a_ratio_is_taken_within_each_round() {
        // The second round ran on a machine that was twice as busy.
        let base = samples("base", &[100.0, 200.0, 100.0]);
        let case = samples("case", &[110.0, 220.0, 150.0]);
        let rounds = Rounds::new("test", 3, &[]);
        let bench = Bench::of("test", "ns", &rounds, &[base, case], Vec::new());
        assert_eq!(bench.rows[0].ratio, 1.0);
        assert!((bench.rows[1].ratio - 1.1).abs() < 1e-9);
        assert_eq!(bench.rows[1].median, 150.0);
        assert_eq!((bench.rows[1].min, bench.rows[1].max), (110.0, 220.0));
    }

    #[test]
    fn ninety_nine_of_a_hundred_do_not_exceed_the_p99() {
        let figures: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(p99(&figures), Some(198.0));
        assert_eq!(p99(&figures[..100]), Some(99.0));
        assert_eq!(p99(&figures[..99]), None);
    }

    #[test]
    fn an_even_number_of_figures_has_the_mean_of_the_middle_two() {
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
        assert!(median(&[]).is_nan());
    }
}
