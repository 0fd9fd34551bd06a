//! Whether the process has room for one guest more.

use nix::sys::resource::{Resource, getrlimit};

use crate::config::Settings;
use crate::{exporter, lookups, server};

/// The most descriptors that a guest takes: twelve while it runs, twenty-three at most were seen while
/// it starts, and all may start at once.
const PER_GUEST: usize = 24;
/// What omertad itself has open: log, locks, event loops, listeners, and some to spare.
const OWN: usize = 48;
/// Where the kernel tells how many inotify instances a user may have; a guest takes one.
const INOTIFY: &str = "/proc/sys/fs/inotify/max_user_instances";
/// Inotify instances left to root's other programs.
const INOTIFY_SPARED: usize = 24;

/// How many guests there is room for, and what is short beyond.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    guests: usize,
    short: String,
}

impl Room {
    /// The room that this process has, at most for the configured number of guests.
    pub(crate) fn of_process(settings: &Settings) -> Self {
        let unlimited = (u64::MAX, u64::MAX);
        let (descriptors, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or(unlimited);
        let inotify = std::fs::read_to_string(INOTIFY)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        Self::within(settings.max_guests, descriptors, inotify)
    }

    fn within(max_guests: usize, descriptors: usize, inotify: Option<usize>) -> Self {
        let reserved = OWN + lookups::AT_ONCE + server::CONNECTIONS + exporter::CONNECTIONS;
        let by_descriptors = descriptors.saturating_sub(reserved) / PER_GUEST;
        let by_inotify = inotify.map_or(usize::MAX, |all| all.saturating_sub(INOTIFY_SPARED));
        let guests = max_guests.min(by_descriptors).min(by_inotify);
        let short = if guests == max_guests {
            format!(
                "max_guests is {max_guests}, and so many live or have left something behind: end one with `omerta vm kill`, or remove what `omerta vm show` lists as left"
            )
        } else if guests == by_descriptors {
            format!(
                "its limit of {descriptors} open files has room for {guests} guests: raise it (LimitNOFILE= in the unit, `ulimit -Hn`), or end one"
            )
        } else {
            let wanted = max_guests + INOTIFY_SPARED;
            format!(
                "the kernel's limit of inotify instances has room for {guests} guests: raise it with `sysctl -w fs.inotify.max_user_instances={wanted}`, or end one"
            )
        };
        Self { guests, short }
    }

    /// Warns where there is room for fewer guests than are configured.
    pub(crate) fn warn_if_short(&self, settings: &Settings) {
        if self.guests < settings.max_guests {
            tracing::warn!(max_guests = settings.max_guests, "omertad: {}", self.short);
        }
    }

    /// What is short for one guest more than `held`.
    pub(crate) fn short_beyond(&self, held: usize) -> Option<&str> {
        (held >= self.guests).then_some(self.short.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_is_scarcest_and_that_is_named() {
        for (descriptors, inotify, guests, named) in [
            (1 << 20, Some(1024), 256, "max_guests is 256"),
            (1 << 20, None, 256, "max_guests is 256"),
            (1 << 20, Some(128), 104, "max_user_instances=280"),
            (1024, Some(1024), 24, "1024 open files"),
            (64, Some(1024), 0, "64 open files"),
        ] {
            let room = Room::within(256, descriptors, inotify);
            assert_eq!(room.guests, guests, "{}", room.short);
            assert!(room.short.contains(named), "{}", room.short);
            assert_eq!(room.short_beyond(guests), Some(room.short.as_str()));
            assert!(guests == 0 || room.short_beyond(guests - 1).is_none());
        }
    }
}
