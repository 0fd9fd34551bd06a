//! What the programs tell of a failure, in words.

use std::io;

use omerta_verdict::Failure;

/// In words what a program told, a failure's number and an error's; as it is where it told anything
/// else.
pub fn line(told: String) -> String {
    let numbers = told.split_once(' ').and_then(|(failure, error)| {
        let failure: usize = failure.parse().ok()?;
        Some((Failure::ALL.get(failure)?.words(), error.parse().ok()?))
    });
    match numbers {
        Some((words, 0_i64)) => words.to_owned(),
        Some((words, error)) => {
            let error = i32::try_from(error.unsigned_abs()).map(io::Error::from_raw_os_error);
            match error {
                Ok(error) => format!("{words}: {error}"),
                Err(_) => told,
            }
        }
        None => told,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_in_words_with_the_error_of_the_helper() {
        let line = |told: &str| line(told.to_owned());
        assert_eq!(
            line("0 -12"),
            "a frame could not be made readable: Cannot allocate memory (os error 12)"
        );
        assert_eq!(
            line("2 0"),
            "no room for the event of a frame: events are lost"
        );
        assert_eq!(line("3 -12"), "3 -12");
        assert_eq!(line("something else"), "something else");
    }
}
