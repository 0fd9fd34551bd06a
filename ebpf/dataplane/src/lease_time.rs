//! How long a lease lasts, as people write it.

use std::str::FromStr;
use std::time::Duration;

/// The longest lease: ten years.
const LONGEST_LEASE: u64 = 3650 * 86_400;

/// A lease as typed; `None` is without end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTime(pub Option<Duration>);

/// Text that is no lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseTimeError {
    /// No time with a unit.
    #[error("a lease is a time such as 90s, 15m, 12h or 7d, or `off`")]
    Form,
    /// Over at once.
    #[error("a lease of no time would drop everything at once: give a longer one, or `off`")]
    Zero,
    /// Longer than anybody means.
    #[error("a lease lasts 3650d at most: give a shorter one, or `off`")]
    TooLong,
}

impl FromStr for LeaseTime {
    type Err = LeaseTimeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self(None));
        }
        let (digits, unit) = match text.char_indices().last() {
            Some((at, 's')) => (&text[..at], 1),
            Some((at, 'm')) => (&text[..at], 60),
            Some((at, 'h')) => (&text[..at], 3600),
            Some((at, 'd')) => (&text[..at], 86_400),
            _ => return Err(LeaseTimeError::Form),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(LeaseTimeError::Form);
        }
        // What does not fit is too long all the more.
        let number = digits.parse().unwrap_or(u64::MAX);
        match number.saturating_mul(unit) {
            0 => Err(LeaseTimeError::Zero),
            1..=LONGEST_LEASE => Ok(Self(Some(Duration::from_secs(number * unit)))),
            _ => Err(LeaseTimeError::TooLong),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_have_units_and_an_end() {
        for (text, seconds) in [
            ("90s", 90),
            ("15m", 900),
            ("12h", 43_200),
            ("3650d", 315_360_000),
        ] {
            let lease = Some(Duration::from_secs(seconds));
            assert_eq!(text.parse(), Ok(LeaseTime(lease)));
        }
        assert_eq!("off".parse(), Ok(LeaseTime(None)));
        for (text, error) in [
            ("", LeaseTimeError::Form),
            ("90", LeaseTimeError::Form),
            ("s", LeaseTimeError::Form),
            ("-1s", LeaseTimeError::Form),
            ("1w", LeaseTimeError::Form),
            ("1h30m", LeaseTimeError::Form),
            ("0s", LeaseTimeError::Zero),
            ("3651d", LeaseTimeError::TooLong),
            ("99999999999999999999s", LeaseTimeError::TooLong),
            ("9999999999999999999d", LeaseTimeError::TooLong),
        ] {
            assert_eq!(text.parse::<LeaseTime>(), Err(error), "{text}");
        }
    }
}
