//! Whether a tunnel lives, by what comes through it.

use std::time::Duration;

/// How long a tunnel may be silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// At the start, before anything has come.
    pub first: Option<Duration>,
    /// Later.
    pub later: Option<Duration>,
}

impl Silence {
    /// Silence is no matter.
    pub const NONE: Self = Self {
        first: None,
        later: None,
    };
}

/// What has become of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing has ever come, for so long.
    NeverCame(Duration),
    /// Nothing has come for so long.
    Died(Duration),
    /// Something comes again, and goes on coming.
    Revived,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Awaited,
    Alive,
    /// And since when something comes again, if it does, counted in time that was looked at.
    Dead {
        steady: Duration,
    },
}

/// The health of one tunnel.
///
/// It is looked at again and again. Time in which nobody looked (the host slept, the clock was set, the process stood still)
/// counts as one step at most: nobody can say that nothing came meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    silence: Silence,
    state: State,
    looked: Duration,
    received: u64,
    silent: Duration,
    told: bool,
}

impl Health {
    /// The longest time between two looks that counts as such.
    pub const STEP: Duration = Duration::from_secs(10);
    /// How long something must come again, with silences no longer than a step, before a dead tunnel is alive.
    pub const STEADY: Duration = Duration::from_secs(20);

    /// A tunnel that begins now, after so many bytes.
    pub const fn new(silence: Silence, now: Duration, received: u64) -> Self {
        Self {
            silence,
            state: State::Awaited,
            looked: now,
            received,
            silent: Duration::ZERO,
            told: false,
        }
    }

    /// The same, of which something has come before.
    pub const fn known(mut self) -> Self {
        self.state = State::Alive;
        self
    }

    /// How many bytes had come when it was last looked at.
    pub const fn received(&self) -> u64 {
        self.received
    }

    /// Looks at how many bytes have come by now.
    pub fn look(&mut self, now: Duration, received: u64) -> Option<Turn> {
        let passed = now.saturating_sub(self.looked).min(Self::STEP);
        self.looked = now;
        let comes = received > self.received;
        self.received = received;
        self.silent = if comes {
            Duration::ZERO
        } else {
            self.silent + passed
        };
        match &mut self.state {
            State::Awaited if comes => {
                self.state = State::Alive;
                None
            }
            State::Awaited => {
                let most = self
                    .silence
                    .first
                    .filter(|most| self.silent >= *most && !self.told)?;
                self.told = true;
                Some(Turn::NeverCame(most))
            }
            State::Alive => {
                let most = self.silence.later.filter(|most| self.silent >= *most)?;
                self.state = State::Dead {
                    steady: Duration::ZERO,
                };
                Some(Turn::Died(most))
            }
            State::Dead { steady } => {
                *steady = match comes || (*steady > Duration::ZERO && self.silent <= Self::STEP) {
                    true => *steady + passed,
                    false => Duration::ZERO,
                };
                if *steady < Self::STEADY {
                    return None;
                }
                self.state = State::Alive;
                Some(Turn::Revived)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Silence = Silence {
        first: Some(Duration::from_secs(60)),
        later: Some(Duration::from_secs(180)),
    };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Looks every five seconds until `end`; `comes` says whether something has come by then. Gives what was told, and when.
    fn watch(
        health: &mut Health,
        from: u64,
        end: u64,
        comes: impl Fn(u64) -> bool,
    ) -> Vec<(u64, Turn)> {
        let mut received = health.received;
        (from + 5..=end)
            .step_by(5)
            .filter_map(|at| {
                received += u64::from(comes(at));
                health.look(seconds(at), received).map(|turn| (at, turn))
            })
            .collect()
    }

    #[test]
    fn a_tunnel_that_never_comes_is_told_once() {
        let mut health = Health::new(SILENCE, seconds(1000), 0);
        let told = watch(&mut health, 1000, 2000, |_| false);
        assert_eq!(told, [(1060, Turn::NeverCame(seconds(60)))]);
    }

    #[test]
    fn a_tunnel_that_dies_is_told_when_it_has_been_silent_so_long_and_is_alive_again_when_it_is_steady()
     {
        let mut health = Health::new(SILENCE, seconds(0), 0);
        // Alive until 100, one packet at 400, and steadily from 500.
        let told = watch(&mut health, 0, 1000, |at| {
            at <= 100 || at == 400 || at >= 500
        });
        assert_eq!(
            told,
            [(280, Turn::Died(seconds(180))), (515, Turn::Revived)]
        );
    }

    #[test]
    fn a_tunnel_that_speaks_now_and_then_lives() {
        let mut health = Health::new(SILENCE, seconds(0), 0);
        assert_eq!(watch(&mut health, 0, 10_000, |at| at % 175 == 5), []);
    }

    #[test]
    fn what_is_not_asked_for_is_not_told() {
        let never = Silence {
            first: None,
            later: None,
        };
        let mut health = Health::new(never, seconds(0), 0);
        assert_eq!(watch(&mut health, 0, 1000, |at| at == 500), []);
    }

    #[test]
    fn a_clock_that_jumps_and_a_host_that_slept_kill_no_tunnel() {
        let mut health = Health::new(SILENCE, seconds(1000), 0).known();
        // Nine hours that nobody saw, then back to before the beginning.
        assert_eq!(health.look(seconds(33_400), 0), None);
        assert_eq!(health.look(seconds(10), 0), None);
        assert_eq!(health.look(seconds(33_400), 0), None);
        // Two steps have counted, and not more.
        let told = watch(&mut health, 33_400, 34_000, |_| false);
        assert_eq!(told, [(33_560, Turn::Died(seconds(180)))]);
    }

    #[test]
    fn counters_that_begin_anew_are_no_sign_of_life() {
        let mut health = Health::new(SILENCE, seconds(0), 500);
        assert_eq!(health.look(seconds(5), 0), None);
        assert_eq!(
            watch(&mut health, 5, 100, |_| false),
            [(60, Turn::NeverCame(seconds(60)))]
        );
    }
}
