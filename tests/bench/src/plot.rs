//! A bar for each case, with its spread, as SVG.

use std::fmt::Write;

use crate::report::Bench;

const LABELS: f64 = 210.0;
const BARS: f64 = 460.0;
const ROW: f64 = 26.0;
const HEAD: f64 = 44.0;

/// Horizontal bars of the medians; a thin line spans the least and the greatest.
pub fn bars(bench: &Bench) -> String {
    let widest = bench.rows.iter().map(|row| row.max).fold(1.0, f64::max);
    let scale = |figure: f64| figure / widest * BARS;
    let (width, height) = (
        LABELS + BARS + 140.0,
        HEAD + ROW * bench.rows.len() as f64 + 14.0,
    );
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">
<rect width="{width}" height="{height}" fill="#ffffff"/>
<text x="10" y="20" font-size="15" font-weight="bold">{} ({}, median of {} rounds)</text>
<text x="10" y="36" font-size="11" fill="#666666">{}</text>"##,
        escape(bench.name),
        escape(bench.unit),
        bench.rounds,
        escape(&bench.machine),
    );
    for (index, row) in bench.rows.iter().enumerate() {
        let top = HEAD + ROW * index as f64;
        let middle = top + ROW / 2.0;
        let colour = if row.case == row.against {
            "#9aa5b1"
        } else {
            "#2f6f9f"
        };
        let _ = writeln!(
            svg,
            r##"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>
<rect x="{LABELS}" y="{:.1}" width="{:.1}" height="{:.1}" fill="{colour}"/>
<line x1="{:.1}" x2="{:.1}" y1="{middle:.1}" y2="{middle:.1}" stroke="#111111"/>
<text x="{:.1}" y="{:.1}">{:.1} × {:.2}</text>"##,
            LABELS - 8.0,
            middle + 4.0,
            escape(row.case),
            top + 4.0,
            scale(row.median),
            ROW - 8.0,
            LABELS + scale(row.min),
            LABELS + scale(row.max),
            LABELS + scale(row.max) + 8.0,
            middle + 4.0,
            row.median,
            row.ratio,
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
