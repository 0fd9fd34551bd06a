//! Where one peer is, where it was, and how often it may move.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

/// The way of one peer from endpoint to endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roaming {
    at: SocketAddr,
    /// Latest first.
    former: Vec<SocketAddr>,
    /// When it moved of late, by a clock that only goes forwards.
    moves: VecDeque<Duration>,
}

/// Why a peer does not move now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "it has moved {} times within {} s: try again in {} s",
    Roaming::MOST,
    Roaming::WITHIN.as_secs(),
    wait.as_secs() + 1
)]
pub struct TooOften {
    /// How long until it may.
    pub wait: Duration,
}

impl Roaming {
    /// How often a peer may move within [`Roaming::WITHIN`].
    pub const MOST: usize = 20;
    /// See [`Roaming::MOST`].
    pub const WITHIN: Duration = Duration::from_secs(60);
    /// How many of its former endpoints are known.
    pub const KEPT: usize = 32;

    /// A peer that has been nowhere else.
    pub const fn at(endpoint: SocketAddr) -> Self {
        Self {
            at: endpoint,
            former: Vec::new(),
            moves: VecDeque::new(),
        }
    }

    /// The same peer, which was at these endpoints before, latest first.
    pub fn after(mut self, former: impl IntoIterator<Item = SocketAddr>) -> Self {
        let at = self.at;
        let former = former.into_iter().filter(|endpoint| *endpoint != at);
        self.former = former.take(Self::KEPT).collect();
        self
    }

    /// Where it is.
    pub const fn endpoint(&self) -> SocketAddr {
        self.at
    }

    /// Where it was, latest first.
    pub fn former(&self) -> &[SocketAddr] {
        &self.former
    }

    /// Whether it was there, and is not any more: what is still sent there is sent in good faith.
    pub fn was_at(&self, endpoint: SocketAddr) -> bool {
        endpoint != self.at && self.former.contains(&endpoint)
    }

    /// Whether it may move now.
    ///
    /// # Errors
    /// Where it has moved too often.
    pub fn may_move(&self, now: Duration) -> Result<(), TooOften> {
        match self.moves.front() {
            Some(first) if self.moves.len() >= Self::MOST => {
                match Self::WITHIN.checked_sub(now.saturating_sub(*first)) {
                    None | Some(Duration::ZERO) => Ok(()),
                    Some(wait) => Err(TooOften { wait }),
                }
            }
            _ => Ok(()),
        }
    }

    /// It has moved.
    pub fn moved(&mut self, now: Duration, to: SocketAddr) {
        let from = std::mem::replace(&mut self.at, to);
        self.former
            .retain(|former| *former != from && *former != to);
        self.former.insert(0, from);
        self.former.truncate(Self::KEPT);
        self.moves.push_back(now);
        if self.moves.len() > Self::MOST {
            self.moves.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(n: u16) -> SocketAddr {
        ([192, 0, 2, 1], n).into()
    }

    #[test]
    fn where_it_was_is_known_and_where_it_is_is_not_one_of_them() {
        let mut roaming = Roaming::at(endpoint(1));
        for port in [2, 3, 1, 2] {
            roaming.moved(Duration::ZERO, endpoint(port));
        }
        assert_eq!(roaming.endpoint(), endpoint(2));
        assert_eq!(roaming.former(), [endpoint(1), endpoint(3)]);
        assert!(
            roaming.was_at(endpoint(1))
                && !roaming.was_at(endpoint(2))
                && !roaming.was_at(endpoint(9))
        );
        for port in 100..200 {
            roaming.moved(Duration::ZERO, endpoint(port));
        }
        assert_eq!(roaming.former().len(), Roaming::KEPT);
        let again = Roaming::at(endpoint(199)).after(roaming.former().to_vec());
        assert_eq!(again.former(), roaming.former());
    }

    #[test]
    fn it_moves_so_often_and_again_when_the_first_move_is_long_past() {
        let mut roaming = Roaming::at(endpoint(1));
        let begin = Duration::from_secs(1000);
        for port in 0..Roaming::MOST {
            let now = begin + Duration::from_secs(port as u64);
            assert_eq!(roaming.may_move(now), Ok(()));
            roaming.moved(now, endpoint(2 + port as u16));
        }
        let wait = Duration::from_secs(10);
        assert_eq!(
            roaming.may_move(begin + Roaming::WITHIN - wait),
            Err(TooOften { wait })
        );
        // A clock that seems to have gone backwards gives nothing away.
        assert!(roaming.may_move(Duration::ZERO).is_err());
        assert_eq!(roaming.may_move(begin + Roaming::WITHIN), Ok(()));
    }
}
