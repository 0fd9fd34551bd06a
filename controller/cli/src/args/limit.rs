//! How limits are typed.

use std::num::NonZero;
use std::str::FromStr;

use omerta_api::GuestLimits;
use omerta_dataplane::{DirectionLimits, Limits};

/// What is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limited {
    EgressPackets,
    EgressBits,
    IngressPackets,
    IngressBits,
}

impl Limited {
    const ALL: [Self; 4] = [
        Self::EgressPackets,
        Self::EgressBits,
        Self::IngressPackets,
        Self::IngressBits,
    ];

    const fn word(self) -> &'static str {
        match self {
            Self::EgressPackets => "egress-packets",
            Self::EgressBits => "egress-bits",
            Self::IngressPackets => "ingress-packets",
            Self::IngressBits => "ingress-bits",
        }
    }

    fn of(self, limits: &mut DirectionLimits) -> &mut Option<NonZero<u64>> {
        let Limits {
            packets_per_second,
            bits_per_second,
        } = match self {
            Self::EgressPackets | Self::EgressBits => &mut limits.egress,
            Self::IngressPackets | Self::IngressBits => &mut limits.ingress,
        };
        match self {
            Self::EgressPackets | Self::IngressPackets => packets_per_second,
            Self::EgressBits | Self::IngressBits => bits_per_second,
        }
    }
}

/// One limit: `egress-packets=20k`, `ingress-bits=none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    what: Limited,
    per_second: Option<NonZero<u64>>,
}

/// Text that is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Not two parts, or of a thing that cannot be limited.
    #[error(
        "a limit is egress-packets=N, egress-bits=N, ingress-packets=N or ingress-bits=N, with N for each second, such as 500, 20k, 100M, 10G, or `none`"
    )]
    Form,
    /// No number.
    #[error("the number for each second is one such as 500, 20k, 100M or 10G, or `none`")]
    Number,
    /// Nothing would pass.
    #[error("0 would let nothing pass: write `none` to lift the limit, or revoke endpoints")]
    Zero,
}

impl FromStr for Limit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (what, number) = text.split_once('=').ok_or(LimitError::Form)?;
        let what = Limited::ALL
            .into_iter()
            .find(|limited| limited.word() == what)
            .ok_or(LimitError::Form)?;
        if number == "none" {
            return Ok(Self {
                what,
                per_second: None,
            });
        }
        let number = number.strip_suffix("/s").unwrap_or(number);
        let (digits, factor) = match number.char_indices().last() {
            Some((at, 'k')) => (&number[..at], 1_000),
            Some((at, 'M')) => (&number[..at], 1_000_000),
            Some((at, 'G')) => (&number[..at], 1_000_000_000),
            _ => (number, 1),
        };
        let number = whole(digits)
            .and_then(|number| number.checked_mul(factor))
            .ok_or(LimitError::Number)?;
        Ok(Self {
            what,
            per_second: Some(NonZero::new(number).ok_or(LimitError::Zero)?),
        })
    }
}

/// `digits` and nothing else, as a number.
fn whole(digits: &str) -> Option<u64> {
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// Puts `new` into `limits`; what `new` does not name stays.
pub fn put(new: &[Limit], limits: &mut DirectionLimits) {
    for limit in new {
        *limit.what.of(limits) = limit.per_second;
    }
}

/// `limits` as omertad is asked for them.
pub fn requested(limits: &[Limit]) -> GuestLimits {
    let mut all = DirectionLimits::default();
    put(limits, &mut all);
    let of = |limits: Limits| omerta_api::Limits {
        packets_per_second: limits.packets_per_second,
        bits_per_second: limits.bits_per_second,
    };
    GuestLimits {
        egress: of(all.egress),
        ingress: of(all.ingress),
    }
}

/// A guest's limits as they are typed.
pub fn shown_of_guest(limits: GuestLimits) -> Vec<String> {
    let of = |limits: omerta_api::Limits| Limits {
        packets_per_second: limits.packets_per_second,
        bits_per_second: limits.bits_per_second,
    };
    shown(DirectionLimits {
        egress: of(limits.egress),
        ingress: of(limits.ingress),
    })
}

/// The first thing that is limited twice in `limits`.
pub fn limited_twice(limits: &[Limit]) -> Option<&'static str> {
    limits.iter().enumerate().find_map(|(index, limit)| {
        let before = &limits[..index];
        let twice = before.iter().any(|other| other.what == limit.what);
        twice.then(|| limit.what.word())
    })
}

/// `limits` as they are typed, those that are there.
pub fn shown(mut limits: DirectionLimits) -> Vec<String> {
    let mut shown = Vec::new();
    for what in Limited::ALL {
        if let Some(number) = *what.of(&mut limits) {
            shown.push(format!("{}={}/s", what.word(), rounded(number.get())));
        }
    }
    shown
}

/// `number` with the largest suffix under which it is whole.
fn rounded(number: u64) -> String {
    for (factor, suffix) in [(1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")] {
        if number.is_multiple_of(factor) {
            return format!("{}{suffix}", number / factor);
        }
    }
    number.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_shown_as_they_are_typed() {
        let typed = [
            "egress-packets=20k/s",
            "egress-bits=100M/s",
            "ingress-packets=1001/s",
            "ingress-bits=10G/s",
        ];
        let mut limits = DirectionLimits::default();
        put(&typed.map(|text| text.parse().unwrap()), &mut limits);
        assert_eq!(shown(limits), typed);
        put(&["egress-bits=none".parse().unwrap()], &mut limits);
        assert_eq!(shown(limits), [typed[0], typed[2], typed[3]]);
        assert_eq!(
            limited_twice(&["egress-bits=1", "egress-bits=2"].map(|text| text.parse().unwrap())),
            Some("egress-bits")
        );
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        for (text, error) in [
            ("", LimitError::Form),
            ("egress-packets", LimitError::Form),
            ("egress=5", LimitError::Form),
            ("egress-packets=", LimitError::Number),
            ("egress-packets=k", LimitError::Number),
            ("egress-packets=-1", LimitError::Number),
            ("egress-packets=+1", LimitError::Number),
            ("egress-packets=1.5k", LimitError::Number),
            ("egress-packets=5K", LimitError::Number),
            ("egress-bits=18446744073709551615G", LimitError::Number),
            ("egress-bits=0", LimitError::Zero),
            ("egress-bits=0M/s", LimitError::Zero),
        ] {
            assert_eq!(text.parse::<Limit>(), Err(error), "{text}");
        }
    }
}
