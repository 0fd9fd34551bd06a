//! What userspace reads of a guard: counters, notes among its pins, lines of its programs.

use omerta_verdict::{DIRECTION_COUNTERS, Failure};

use crate::count::{Count, Row};
use crate::failure_line::line;
use crate::note_text::{Filters, Layout, numbers};

/// Rows of counters, one of each CPU.
pub fn counters(bytes: &[u8]) {
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect();
    let rows = words.chunks_exact(2 * DIRECTION_COUNTERS).map(|row| {
        let counts = row.chunks_exact(2).map(|count| Count {
            packets: count[0],
            bytes: count[1],
        });
        Row(counts.collect::<Vec<_>>().try_into().unwrap())
    });
    let (mut sum, mut are_settled) = (Row::NOTHING, true);
    for row in rows {
        are_settled &= row.is_settled();
        sum.add(&row);
    }
    let read = sum.direction();
    // What is exact on each CPU is exact in all.
    if are_settled {
        assert!(sum.is_settled());
        assert_eq!(read.rx(), read.outcomes());
    }
    for (reason, count) in &read.dropped {
        assert_eq!(read.dropped_for(*reason), *count);
    }
}

/// Symbolic links among the pins of a guard.
pub fn notes(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    if let Ok(filters) = text.parse::<Filters>() {
        assert_eq!(filters.to_string().parse(), Ok(filters));
    }
    if let Ok(layout) = text.parse::<Layout>() {
        assert_eq!(layout.to_string().parse(), Ok(layout));
    }
    if let Some(numbers) = numbers(text) {
        assert_eq!(numbers.len(), text.split(',').count());
    }
}

/// A line that a guard's programs have logged.
pub fn failure_line(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else {
        return;
    };
    let (place, words) = line(text.to_owned());
    let is_known = |failure: &Failure| words.starts_with(failure.words());
    match place {
        None => assert_eq!(words, text),
        Some(_) => assert!(Failure::ALL.iter().any(is_known), "{words}"),
    }
}
