//! Whether the process has room for one guest more.

use nix::sys::resource::{Resource, getrlimit};
use serde::Deserialize;

use crate::config::Settings;
use crate::host_memory::HostMemory;
use crate::{exporter, lookups, server};

/// The most descriptors that a guest takes: fourteen while it runs, twenty-three at most were seen while
/// it starts, and all may start at once.
const PER_GUEST: usize = 24;
/// What omertad itself has open: log, locks, event loops, listeners, and some to spare.
const OWN: usize = 48;
/// Where the kernel tells how many inotify instances a user may have; a guest takes one.
const INOTIFY: &str = "/proc/sys/fs/inotify/max_user_instances";
/// Inotify instances left to root's other programs.
const INOTIFY_SPARED: usize = 24;
/// What QEMU takes beside its guest's memory, in MiB: its own, and TCG's translated code.
const QEMU_MIB: u64 = 96;

/// How many guests there is room for, and what is short beyond.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    guests: usize,
    short: String,
    max_vcpus: u64,
    memory_reserve_mib: u64,
}

/// What guests take, or one more would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) guests: usize,
    pub(crate) vcpus: u64,
    /// Of the guests alone, in MiB.
    pub(crate) memory_mib: u64,
}

impl Share {
    /// What a kept request takes, as far as that goes without the rest of it: a later or an earlier omertad may
    /// have written what this one does not know.
    pub(crate) fn of_request(text: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Taken {
            cpus: u8,
            memory_mib: u32,
        }
        let taken: Taken = serde_json::from_str(text).ok()?;
        Some(Self {
            guests: 1,
            vcpus: taken.cpus.into(),
            memory_mib: taken.memory_mib.into(),
        })
    }

    /// With QEMU's own memory, in MiB.
    fn whole_mib(self) -> u64 {
        self.memory_mib + QEMU_MIB * self.guests as u64
    }
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
        Self {
            max_vcpus: settings.max_vcpus,
            memory_reserve_mib: settings.memory_reserve_mib,
            ..Self::within(settings.max_guests, descriptors, inotify)
        }
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
        Self {
            guests,
            short,
            max_vcpus: u64::MAX,
            memory_reserve_mib: 0,
        }
    }

    /// Warns where there is room for fewer guests than are configured.
    pub(crate) fn warn_if_short(&self, settings: &Settings) {
        if self.guests < settings.max_guests {
            tracing::warn!(max_guests = settings.max_guests, "omertad: {}", self.short);
        }
    }

    /// What is short for a guest that takes `wanted`, where living ones take `held`. Memory is never
    /// promised twice, whether or not guests have touched theirs.
    pub(crate) fn short_for(
        &self,
        wanted: Share,
        held: Share,
        memory: Option<HostMemory>,
    ) -> Option<String> {
        if held.guests >= self.guests {
            return Some(self.short.clone());
        }
        let vcpus = held.vcpus + wanted.vcpus;
        if vcpus > self.max_vcpus {
            return Some(format!(
                "it and the living guests would have {vcpus} virtual CPUs of {} (`max_vcpus`): give it fewer, or end one",
                self.max_vcpus
            ));
        }
        let Some(memory) = memory else {
            return Some(
                "how much memory the host has cannot be found out: see /proc/meminfo".to_owned(),
            );
        };
        let (whole, reserve) = (wanted.whole_mib(), self.memory_reserve_mib);
        let for_guests = memory.total_mib.saturating_sub(reserve);
        let promised = held.whole_mib();
        if promised + whole > for_guests {
            return Some(format!(
                "it takes {whole} MiB with QEMU's own, {promised} MiB are promised to living guests, and the host has {} MiB of which {reserve} are its own (`memory_reserve_mib`): give it less, or end one",
                memory.total_mib
            ));
        }
        (whole > memory.available_mib).then(|| {
            format!(
                "it takes {whole} MiB with QEMU's own, and the host has {} MiB available: give it less, or end what takes the rest",
                memory.available_mib
            )
        })
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
            let held = |guests| Share {
                guests,
                ..Share::default()
            };
            let short = |guests| room.short_for(Share::default(), held(guests), PLENTY);
            assert_eq!(short(guests).as_ref(), Some(&room.short));
            assert!(guests == 0 || short(guests - 1).is_none());
        }
    }

    #[test]
    fn what_a_request_takes_is_known_where_nothing_else_of_it_is() {
        let share = |vcpus, memory_mib| {
            Some(Share {
                guests: 1,
                vcpus,
                memory_mib,
            })
        };
        for (text, taken) in [
            (r#"{"cpus":2,"memory_mib":512}"#, share(2, 512)),
            (
                r#"{"name":9,"cpus":2,"memory_mib":512,"hence":[]}"#,
                share(2, 512),
            ),
            (r#"{"cpus":2}"#, None),
            (r#"{"cpus":2,"memory_mib":-1}"#, None),
            (r#"{"cpus":256,"memory_mib":1}"#, None),
            ("{", None),
        ] {
            assert_eq!(Share::of_request(text), taken, "{text}");
        }
    }

    const PLENTY: Option<HostMemory> = Some(HostMemory {
        total_mib: 1 << 20,
        available_mib: 1 << 20,
    });

    #[test]
    fn processors_and_memory_are_promised_once_and_what_is_short_is_named() {
        let room = Room {
            max_vcpus: 4,
            memory_reserve_mib: 500,
            ..Room::within(8, 1 << 20, None)
        };
        let guest = |vcpus, memory_mib| Share {
            guests: 1,
            vcpus,
            memory_mib,
        };
        let host = |total_mib, available_mib| {
            Some(HostMemory {
                total_mib,
                available_mib,
            })
        };
        let held = guest(3, 1000);
        assert_eq!(room.short_for(guest(1, 1000), held, host(2692, 1096)), None);
        for (wanted, memory, named) in [
            (guest(2, 1000), host(4000, 4000), "5 virtual CPUs of 4"),
            (guest(1, 1000), host(2691, 2691), "1096 MiB are promised"),
            (guest(1, 1000), host(4000, 1095), "1095 MiB available"),
            (guest(1, 1000), None, "/proc/meminfo"),
        ] {
            let short = room.short_for(wanted, held, memory).unwrap();
            assert!(short.contains(named), "{short}");
        }
    }
}
