//! What comes by the host's uplink for a guest and is of none of its endpoints: dropped where it arrives, by
//! the guard at the tap, or in nftables' forward chain. The uplink is a tap, so that the whole path runs in
//! the thread that sends.

use std::sync::Arc;

use anyhow::{Result, bail};
use nix::time::{ClockId, clock_gettime};
use omerta_dataplane::{AtUplink, Guard, Uplink, UplinkHook};
use omerta_kernel_tests::{
    CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, STRANGER, config, ethernet, udp,
};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::{Mac, Mode};

use crate::network::PLAIN;

const UPLINK: Mac = Mac([0x52, 0x54, 0, 0, 0, 0xdd]);

/// What drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropper {
    /// nftables, where the host forwards.
    NftForward,
    /// The same behind connection tracking.
    NftForwardConntrack,
    /// The guard, at the tap.
    Guard,
    /// The program at the uplink, by this hook.
    Uplink(UplinkHook),
}

/// A host with an uplink and a guest.
pub struct Road {
    namespace: Namespace,
    uplink: Tap,
    _guest: Tap,
    dropper: Dropper,
    at_uplink: Option<AtUplink>,
    _program: Option<Arc<Uplink>>,
}

impl Road {
    pub fn new(dropper: Dropper) -> Result<Self> {
        let namespace = Namespace::new("omerta-bench")?;
        namespace.disable_ipv6()?;
        namespace.enable_forwarding()?;
        // Frames go the way of a descriptor that does not block: as in the driver of a card, XDP sees them
        // before there is a socket buffer.
        let (uplink, guest) = namespace.enter(|| -> Result<_> {
            let uplink = Tap::create_with_offload_header("uplink")?;
            Ok((uplink, Tap::create_with_offload_header("guest")?))
        })??;
        for step in [
            &format!("link set uplink address {UPLINK} up"),
            &format!("link set guest address {GATEWAY_MAC} up"),
            "addr add 203.0.113.1/24 dev uplink",
            "addr add 10.77.0.1/32 dev guest",
            &format!("route add {GUEST}/32 dev guest"),
            "route add default dev uplink",
            &format!("neigh replace {GUEST} lladdr {GUEST_MAC} dev guest nud permanent"),
        ] {
            namespace.ip(step)?;
        }
        let before = match dropper {
            Dropper::NftForward => Some(""),
            Dropper::NftForwardConntrack => Some("ct state established,related accept"),
            Dropper::Guard | Dropper::Uplink(_) => None,
        };
        if let Some(before) = before {
            let script = format!(
                "table ip bench {{
                    set peers {{
                        type ipv4_addr . inet_service
                        elements = {{ {CONSUMER} . {CONSUMER_PORT}, {CONSUMER} . 443 }}
                    }}
                    chain guest {{
                        type filter hook forward priority 0; policy drop;
                        {before}
                        oifname \"guest\" ip daddr {GUEST} meta l4proto {{ tcp, udp }} ip saddr . th sport @peers accept
                    }}
                }}"
            );
            let output = namespace.command("nft").arg(script).output()?;
            if !output.status.success() {
                bail!("nft: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
        let mut road = Self {
            namespace,
            uplink,
            _guest: guest,
            dropper,
            at_uplink: None,
            _program: None,
        };
        if before.is_none() {
            let program = road.namespace.enter(|| -> Result<_> {
                let guard = Guard::attach("guest", &config(Mode::Filtered))?;
                let Dropper::Uplink(hook) = dropper else {
                    return Ok(None);
                };
                let program = Uplink::attach(&["uplink".to_owned()], hook)?;
                let entered = program.enter(&guard)?;
                Ok(Some((program, entered)))
            })??;
            (road._program, road.at_uplink) = program.unzip();
        }
        Ok(road)
    }

    /// Nanoseconds of this thread for one frame, over `count` frames that no endpoint has sent; fails unless
    /// each was dropped where it should be.
    pub fn send(&self, count: u32) -> Result<f64> {
        let packet = Ipv4::new(STRANGER, GUEST, 17).packet(&udp(CONSUMER_PORT, 40000, &[0; 22]));
        let frame = ethernet(Mac([0x52, 0x54, 0, 0, 0, 0xcc]), UPLINK, 0x0800, &packet);
        let buffer = [&PLAIN[..], &frame].concat();
        let before = self.dropped()?;
        let began = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        for _ in 0..count {
            self.uplink.send(&buffer)?;
        }
        let spent = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)? - began;
        if let (Some(before), Some(after)) = (before, self.dropped()?)
            && after - before != u64::from(count)
        {
            bail!("{:?}: {} of {count} dropped", self.dropper, after - before);
        }
        Ok(std::time::Duration::from(spent).as_nanos() as f64 / f64::from(count))
    }

    /// How many frames what drops has counted; `None` of nftables, which is not asked to.
    fn dropped(&self) -> Result<Option<u64>> {
        Ok(match (&self.at_uplink, self.dropper) {
            (Some(at_uplink), _) => Some(at_uplink.dropped()?.packets),
            (None, Dropper::Guard) => Some(
                self.namespace
                    .enter(|| Guard::open("guest").and_then(|guard| guard.counters()))??
                    .ingress
                    .outcomes()
                    .packets,
            ),
            _ => None,
        })
    }
}

impl Drop for Road {
    fn drop(&mut self) {
        if matches!(self.dropper, Dropper::Guard | Dropper::Uplink(_)) {
            // Pins outlive the namespace; a drop cannot report.
            let _ = self
                .namespace
                .enter(|| Guard::open("guest").and_then(Guard::detach));
        }
    }
}
