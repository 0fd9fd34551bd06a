//! Standard output: tables for people, JSON for programs.

use std::fmt;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};

use serde::Serialize;

use crate::guest_text::visible;

/// Standard output, with colour only where a person looks at it.
pub struct Output {
    stream: BufWriter<StdoutLock<'static>>,
    colour: bool,
}

impl Output {
    /// Standard output of this process. Colour is used on a terminal, unless `NO_COLOR` is set or
    /// the terminal is dumb.
    pub fn stdout() -> Self {
        let stdout = io::stdout();
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let colour = stdout.is_terminal()
            && set("NO_COLOR").is_none()
            && set("TERM").is_none_or(|term| term != "dumb");
        Self {
            stream: BufWriter::new(stdout.lock()),
            colour,
        }
    }

    /// Writes one line and hands it on at once.
    pub fn line(&mut self, line: impl fmt::Display) -> io::Result<()> {
        writeln!(self.stream, "{line}")?;
        self.stream.flush()
    }

    /// Writes bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// Writes one JSON document.
    pub fn json(&mut self, value: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut self.stream, value)?;
        self.line("")
    }

    /// Writes a table.
    pub fn table(&mut self, table: &Table) -> io::Result<()> {
        for line in table.lines(self.colour) {
            writeln!(self.stream, "{line}")?;
        }
        self.stream.flush()
    }

    /// `text` in `style`, if colours are shown.
    pub fn styled(&self, style: Style, text: &str) -> String {
        style.paint(text, self.colour)
    }
}

/// How a piece of text stands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Not at all.
    Plain,
    /// A heading or label.
    Heading,
    /// As it should be.
    Good,
    /// On its way from one state to another.
    Changing,
    /// Not as it should be.
    Bad,
}

impl Style {
    fn paint(self, text: &str, colour: bool) -> String {
        let code = match self {
            Self::Heading => "1",
            Self::Good => "32",
            Self::Changing => "33",
            Self::Bad => "31",
            Self::Plain => "",
        };
        if colour && !code.is_empty() && !text.is_empty() {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// One cell of a table. Control characters in its text are made visible.
#[derive(Clone, Debug)]
pub struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// A cell that stands out.
    pub fn styled(style: Style, text: impl fmt::Display) -> Self {
        Self {
            text: visible(&text.to_string()).into_owned(),
            style,
        }
    }

    /// A cell.
    pub fn new(text: impl fmt::Display) -> Self {
        Self::styled(Style::Plain, text)
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Aligned columns, two blanks apart.
#[derive(Debug)]
pub struct Table {
    sides: Vec<Side>,
    rows: Vec<Vec<Cell>>,
}

impl Table {
    /// An empty table with one column for each side.
    pub fn new(sides: &[Side]) -> Self {
        Self {
            sides: sides.to_vec(),
            rows: Vec::new(),
        }
    }

    /// An empty table below a row of headings.
    pub fn headed(columns: &[(Side, &str)]) -> Self {
        let sides: Vec<Side> = columns.iter().map(|(side, _)| *side).collect();
        let mut table = Self::new(&sides);
        table.row(
            columns
                .iter()
                .map(|(_, heading)| Cell::styled(Style::Heading, heading))
                .collect(),
        );
        table
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<Cell>) {
        self.rows.push(cells);
    }

    /// Adds a row of a label and its value.
    pub fn pair(&mut self, label: &str, value: Cell) {
        self.row(vec![Cell::styled(Style::Heading, label), value]);
    }

    fn lines(&self, colour: bool) -> impl Iterator<Item = String> {
        let widths: Vec<usize> = (0..self.sides.len())
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                cells.map(Cell::width).max().unwrap_or(0)
            })
            .collect();
        self.rows.iter().map(move |row| {
            let mut line = String::new();
            // Blanks are put down only once something follows them, so that no line ends in any.
            let mut pending = 0;
            for ((cell, side), width) in row.iter().zip(&self.sides).zip(&widths) {
                let gap = width - cell.width();
                if *side == Side::Right {
                    pending += gap;
                }
                if !cell.text.is_empty() {
                    line.extend(std::iter::repeat_n(' ', pending));
                    pending = 0;
                    line.push_str(&cell.style.paint(&cell.text, colour));
                } else {
                    pending += cell.width();
                }
                if *side == Side::Left {
                    pending += gap;
                }
                pending += 2;
            }
            line
        })
    }
}

/// A time span in the unit that reads best.
pub fn microseconds(span: u64) -> String {
    match span {
        0..1_000 => format!("{span} µs"),
        1_000..1_000_000 => format!("{}.{} ms", span / 1_000, span % 1_000 / 100),
        _ => format!("{}.{:02} s", span / 1_000_000, span % 1_000_000 / 10_000),
    }
}

/// A number of bytes in the unit that reads best.
pub fn bytes(count: u64) -> String {
    const UNITS: [(u64, &str); 4] = [
        (1_000_000_000_000, "TB"),
        (1_000_000_000, "GB"),
        (1_000_000, "MB"),
        (1_000, "kB"),
    ];
    for (unit, name) in UNITS {
        if count >= unit {
            return format!("{}.{} {name}", count / unit, count % unit / (unit / 10));
        }
    }
    format!("{count} B")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(table: &Table) -> Vec<String> {
        table.lines(false).collect()
    }

    #[test]
    fn columns_line_up_and_no_line_ends_in_blanks() {
        let mut table = Table::headed(&[
            (Side::Left, "NAME"),
            (Side::Right, "N"),
            (Side::Left, "END"),
        ]);
        table.row(vec![Cell::new("a"), Cell::new(100), Cell::new("")]);
        table.row(vec![Cell::new("longer"), Cell::new(7), Cell::new("x → y")]);
        assert_eq!(
            plain(&table),
            ["NAME      N  END", "a       100", "longer    7  x → y"]
        );
    }

    #[test]
    fn colour_does_not_move_columns() {
        let mut table = Table::new(&[Side::Left, Side::Left]);
        table.row(vec![Cell::styled(Style::Bad, "a"), Cell::new("b")]);
        let coloured: Vec<String> = table.lines(true).collect();
        assert_eq!(coloured, ["\x1b[31ma\x1b[0m  b"]);
        assert_eq!(plain(&table), ["a  b"]);
    }

    #[test]
    fn cells_cannot_carry_control_characters() {
        let mut table = Table::new(&[Side::Left]);
        table.row(vec![Cell::new("a\x1b[2J\nb")]);
        assert_eq!(plain(&table), ["a^[[2J^Jb"]);
    }

    #[test]
    fn quantities_read_well() {
        assert_eq!(microseconds(999), "999 µs");
        assert_eq!(microseconds(1_234), "1.2 ms");
        assert_eq!(microseconds(2_345_678), "2.34 s");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_250), "1.2 kB");
        assert_eq!(bytes(98_765_432), "98.7 MB");
    }
}
