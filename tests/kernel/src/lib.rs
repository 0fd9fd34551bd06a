//! Frames and guards for the kernel tests.

mod frame;
mod generate;
mod hook;
mod native;
mod pair;
mod stage;
pub mod victim;

pub use frame::{Ipv4, Ipv6, arp, checksum, ethernet, icmp_echo, icmp_unreachable, tcp, udp};
pub use generate::Generator;
pub use hook::{hooks, judging, tc};
pub use native::NativeGuard;
pub use pair::{NEXT, Pair, SHOT, test_run_takes};
pub use stage::*;
