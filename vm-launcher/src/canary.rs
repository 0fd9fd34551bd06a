//! The canary: one frame with a forged source, sent into the tap as the guest would send it. The
//! guard is proven only if it counts exactly one more dropped forgery.

use std::time::Duration;

use omerta_dataplane::{Guard, GuardError};
use omerta_verdict::{Mac, Reason};
use tokio::time::{Instant, sleep};

use crate::TapError;
use crate::tap::Tap;

/// How long the guard may take to count a frame that was sent in the same moment.
const DEADLINE: Duration = Duration::from_secs(1);

/// IEEE 802's first EtherType for local experiments: should the guard fail, no host stack and no
/// switch does anything with the frame.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Why the canary did not prove the guard.
#[derive(Debug, thiserror::Error)]
pub enum CanaryError {
    /// The frame could not be sent.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The guard's counters or events could not be read.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The guard did not see the frame, or did not drop it for its source.
    #[error(
        "the guard of {interface} is not working: of one frame with a forged source it dropped {dropped}; the guest stays stopped"
    )]
    NotDropped {
        /// The tap.
        interface: String,
        /// By how much the counter of forged sources rose; 1 is right.
        dropped: u64,
    },
}

/// Sends the canary and waits until the guard has dropped it.
pub(crate) async fn prove(
    tap: &Tap,
    guard: &Guard,
    guest: Mac,
    gateway: Mac,
) -> Result<(), CanaryError> {
    let before = forged_sources_dropped(guard)?;
    let frame = frame(guest, gateway);
    tap.send_as_guest(&frame)?;
    let deadline = Instant::now() + DEADLINE;
    let dropped = loop {
        // The guest has not run, so nobody else can raise this counter.
        let dropped = forged_sources_dropped(guard)?.wrapping_sub(before);
        if dropped != 0 || Instant::now() >= deadline {
            break dropped;
        }
        sleep(Duration::from_millis(2)).await;
    };
    if dropped != 1 {
        return Err(CanaryError::NotDropped {
            interface: guard.interface().to_owned(),
            dropped,
        });
    }
    swallow_event(guard, &frame)?;
    Ok(())
}

/// Takes the canary's own event, so that whoever reads the guard's events next sees only the
/// guest's.
fn swallow_event(guard: &Guard, frame: &[u8]) -> Result<(), GuardError> {
    let mut events = guard.events()?;
    while let Some(event) = events.next() {
        if !frame.starts_with(&event.head) {
            tracing::warn!(frame = event.describe(), "a frame before the guest has run");
        }
    }
    Ok(())
}

fn forged_sources_dropped(guard: &Guard) -> Result<u64, GuardError> {
    Ok(guard
        .counters()?
        .egress
        .dropped_for(Reason::SourceMac)
        .packets)
}

/// The smallest Ethernet frame, from a neighbour of the guest's MAC to the gateway.
fn frame(guest: Mac, gateway: Mac) -> Vec<u8> {
    let Mac([a, b, c, d, e, last]) = guest;
    let mut frame = Vec::with_capacity(60);
    frame.extend_from_slice(&gateway.0);
    frame.extend_from_slice(&[a, b, c, d, e, last ^ 0x01]);
    frame.extend_from_slice(&ETHERTYPE);
    frame.extend_from_slice(b"omerta canary");
    frame.resize(60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_canary_is_forged_in_its_source_alone() {
        let guest = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        let gateway = Mac([0x56, 0x54, 0, 0x12, 0x34, 0x56]);
        let frame = frame(guest, gateway);
        assert_eq!(frame.len(), 60);
        assert_eq!(frame[..6], gateway.0);
        let source = Mac(frame[6..12].try_into().unwrap());
        assert!(source.is_unicast());
        assert_ne!(source, guest);
        assert_ne!(source, gateway);
    }

    use std::net::Ipv4Addr;

    use omerta_dataplane::{GuardConfig, Limits};
    use omerta_test_support::Namespace;
    use omerta_verdict::Mode;

    const GUEST: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    const GATEWAY: Mac = Mac([0x56, 0x54, 0, 0x12, 0x34, 0x56]);
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
    const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

    /// What the canary says of a guarded tap to which `harm` was done.
    fn verdict_after(harm: impl FnOnce(&Tap, &Guard) + Send) -> Result<(), CanaryError> {
        let namespace = Namespace::new("vmlc").expect("a namespace takes root");
        let test = || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let tap = Tap::create("omcanary", GATEWAY).await.unwrap();
                let config = GuardConfig {
                    mac: GUEST,
                    addresses: vec![ADDRESS.into()],
                    gateways: vec![GATEWAY_ADDRESS.into()],
                    gateway_mac: Some(GATEWAY),
                    mode: Mode::Filtered,
                    allow: vec!["udp:192.0.2.10:51820".parse().unwrap()],
                    egress: Limits::default(),
                    ingress: Limits::default(),
                    lease: None,
                    owner: None,
                };
                let guard = Guard::attach("omcanary", &config).unwrap();
                tap.bring_up(GATEWAY_ADDRESS, ADDRESS, GUEST).await.unwrap();
                harm(&tap, &guard);
                let verdict = prove(&tap, &guard, GUEST, GATEWAY).await;
                guard.detach().unwrap();
                verdict
            })
        };
        namespace.enter(test).unwrap()
    }

    #[test]
    fn a_guarded_tap_passes() {
        verdict_after(|_, _| {}).unwrap();
    }

    /// With an offload header a guest could have a frame rewritten or cut after the verdict.
    #[test]
    fn a_guest_has_no_offload_header_to_forge() {
        verdict_after(|tap, _| {
            // SAFETY: all zero is a valid `ifreq`.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            let handle = tap.handle().unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&handle);
            // SAFETY: TUNGETIFF writes one `ifreq`, which outlives the call.
            let got = unsafe { libc::ioctl(fd, libc::TUNGETIFF as _, &mut request) };
            assert_eq!(got, 0);
            // SAFETY: TUNGETIFF fills the flags member of the union.
            let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
            assert_ne!(flags & libc::IFF_TAP, 0);
            assert_eq!(flags & libc::IFF_VNET_HDR, 0);
        })
        .unwrap();
    }

    /// The counters are all there and only the programs are gone, as after a stray `bpftool link
    /// detach`: reading the pins alone would not tell.
    #[test]
    fn a_tap_whose_programs_are_cut_off_fails() {
        let verdict = verdict_after(|tap, guard| {
            let namespace = std::fs::metadata("/proc/thread-self/ns/net").unwrap();
            let inode = std::os::unix::fs::MetadataExt::ino(&namespace);
            for link in ["link_egress", "link_ingress"] {
                let pin = format!("/sys/fs/bpf/omerta/{inode}/omcanary/{link}");
                std::fs::remove_file(pin).unwrap();
            }
            // The kernel lets go of a link some time after its last pin is removed.
            let started = std::time::Instant::now();
            loop {
                let before = forged_sources_dropped(guard).unwrap();
                tap.send_as_guest(&frame(GUEST, GATEWAY)).unwrap();
                if forged_sources_dropped(guard).unwrap() == before {
                    break;
                }
                assert!(
                    started.elapsed() < Duration::from_secs(10),
                    "the link stays"
                );
            }
        });
        let error = verdict.unwrap_err();
        assert!(
            matches!(error, CanaryError::NotDropped { dropped: 0, .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains("omcanary"));
    }

    #[test]
    fn a_tap_whose_guard_is_detached_fails() {
        verdict_after(|_, _| Guard::open("omcanary").unwrap().detach().unwrap()).unwrap_err();
    }
}
