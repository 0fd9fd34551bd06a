//! What the programs tell of a failure, in words.

use std::io;

use omerta_verdict::Failure;

/// What a program told: the place of the guard that it was about, and in words, of a failure's number and
/// an error's, what failed; as it is where it told anything else.
pub fn line(told: String) -> (Option<u32>, String) {
    let words = || {
        let mut numbers = told.splitn(3, ' ');
        let place: u32 = numbers.next()?.parse().ok()?;
        let failure: usize = numbers.next()?.parse().ok()?;
        let error: i64 = numbers.next()?.parse().ok()?;
        let words = Failure::ALL.get(failure)?.words();
        if error == 0 {
            return Some((place, words.to_owned()));
        }
        let error = i32::try_from(error.unsigned_abs()).ok()?;
        let error = io::Error::from_raw_os_error(error);
        Some((place, format!("{words}: {error}")))
    };
    match words() {
        Some((place, words)) => (Some(place), words),
        None => (None, told),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_in_words_with_the_error_of_the_helper() {
        let line = |told: &str| line(told.to_owned());
        let of = |place, words: &str| (Some(place), words.to_owned());
        assert_eq!(
            line("7 0 -12"),
            of(
                7,
                "a frame could not be made readable: Cannot allocate memory (os error 12)"
            )
        );
        assert_eq!(
            line("0 2 0"),
            of(0, "no room for the event of a frame: events are lost")
        );
        for told in ["7 3 -12", "-1 0 0", "0 -12", "something else"] {
            assert_eq!(line(told), (None, told.to_owned()));
        }
    }
}
