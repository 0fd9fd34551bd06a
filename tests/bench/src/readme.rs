//! The table in the README, made of the result files.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

const BEGIN: &str = "<!-- bench: begin (make bench-readme) -->\n";
const END: &str = "<!-- bench: end -->";

/// Writes what the result files `names` in `results` say between the marks in `readme`.
pub fn write(readme: &Path, results: &Path, names: &[&str]) -> Result<()> {
    let mut benches = Vec::new();
    for name in names {
        let path = results.join(format!("{name}.json"));
        let text = fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}: run that bench first", path.display()))?;
        let bench: Value = serde_json::from_str(&text)
            .with_context(|| format!("cannot read {}", path.display()))?;
        benches.push(bench);
    }
    let text =
        fs::read_to_string(readme).with_context(|| format!("cannot read {}", readme.display()))?;
    let output = std::process::Command::new("date")
        .args(["--utc", "+%Y-%m-%d"])
        .output()
        .context("cannot run date")?;
    let day = String::from_utf8_lossy(&output.stdout);
    let text = between_marks(&text, &table(&benches, day.trim()))?;
    fs::write(readme, text).with_context(|| format!("cannot write {}", readme.display()))
}

fn table(benches: &[Value], day: &str) -> String {
    let machine = benches.iter().find_map(|bench| bench["machine"].as_str());
    let mut table = format!(
        "{}, {day}. Medians; least and greatest; ratio to the case that the last column names.\n\n\
         | bench | case | median | least – greatest | unit | ratio | against |\n\
         | --- | --- | ---: | ---: | --- | ---: | --- |\n",
        machine.unwrap_or("An unknown machine"),
    );
    for bench in benches {
        let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        for row in bench["rows"].as_array().into_iter().flatten() {
            let number = |name: &str| figure(row[name].as_f64().unwrap_or(f64::NAN));
            // A string takes whatever is written to it.
            let _ = writeln!(
                table,
                "| {} | {} | {} | {} – {} | {} | {:.2} | {} |",
                word(&bench["name"]),
                word(&row["case"]),
                number("median"),
                number("min"),
                number("max"),
                word(&bench["unit"]),
                row["ratio"].as_f64().unwrap_or(f64::NAN),
                word(&row["against"]),
            );
        }
    }
    table
}

/// Three digits, or all that stand before the point.
fn figure(number: f64) -> String {
    match number.abs() {
        size if size < 1.0 => format!("{number:.3}"),
        size if size < 10.0 => format!("{number:.2}"),
        size if size < 100.0 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

fn between_marks(text: &str, new: &str) -> Result<String> {
    let (Some((before, rest)), true) = (text.split_once(BEGIN), text.matches(BEGIN).count() == 1)
    else {
        bail!("there is no single line {}", BEGIN.trim());
    };
    let Some((_, after)) = rest.split_once(END) else {
        bail!("there is no line {END} behind the beginning");
    };
    Ok(format!("{before}{BEGIN}{new}{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let text = format!("above\n{BEGIN}old\n{END}\nbelow\n");
        let new = between_marks(&text, "new\n").unwrap();
        assert_eq!(new, format!("above\n{BEGIN}new\n{END}\nbelow\n"));
        assert_eq!(between_marks(&new, "new\n").unwrap(), new);
    }

    #[test]
    fn a_text_without_both_marks_is_left_alone() {
        for text in ["none", BEGIN, END, &format!("{END}{BEGIN}")] {
            assert!(between_marks(text, "new").is_err(), "{text}");
        }
    }

    #[test]
    fn a_row_of_the_table_has_the_figures_of_the_result() {
        let bench = serde_json::json!({
            "name": "tap", "unit": "ns", "machine": "a machine",
            "rows": [{"case": "guard", "median": 2274.4, "min": 9.996, "max": 0.5, "ratio": 1.036, "against": "none"}],
        });
        let table = table(&[bench], "2026-01-02");
        assert!(table.starts_with("a machine, 2026-01-02."), "{table}");
        let row = "| tap | guard | 2274 | 10.00 – 0.500 | ns | 1.04 | none |\n";
        assert!(table.ends_with(row), "{table}");
    }
}
