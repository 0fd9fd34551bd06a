//! Captures everywhere, which tell independently of the guard what left the guest and what
//! arrived anywhere.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, bail};
use omerta_test_support::{Capture, CapturedFrame, Namespace, Travel};

use crate::consumer::PORT;
use crate::guest::Guest;
use crate::packet::{Body, Packet, UDP};
use crate::stage::Stage;

/// Text that the guest's attempts carry: a frame with it is never a tunnel's.
pub const MARK: &str = "omerta-demo-mark";

/// The one conversation that a guest may have.
pub struct Tunnel {
    pub guest: Ipv4Addr,
    pub consumer: Ipv4Addr,
}

impl Tunnel {
    /// Whether a packet belongs to this tunnel: between its two ends alone, and WireGuard.
    fn carries(&self, packet: &Packet) -> bool {
        let Body::Ipv4 {
            source,
            destination,
            protocol: UDP,
            ports: Some((from, to)),
            fragment: false,
        } = packet.body
        else {
            return false;
        };
        let out = source == self.guest && destination == self.consumer && to == PORT;
        let back = source == self.consumer && destination == self.guest && from == PORT;
        // WireGuard's four message types, each followed by three zero bytes.
        let is_wireguard = matches!(packet.payload.get(..4), Some([1..=4, 0, 0, 0]));
        (out || back) && is_wireguard && !packet.holds(MARK)
    }
}

/// One interface that is watched.
struct Post {
    place: String,
    capture: Capture,
}

/// All captures but the guest's own, and the guest's own apart.
pub struct Witness<'a> {
    provider: &'a Namespace,
    own: Capture,
    gateway: Ipv4Addr,
    posts: Vec<Post>,
    tunnels: Vec<Tunnel>,
}

/// What was seen since the last look.
pub struct Sighting {
    /// What the guest sent that is no tunnel traffic.
    pub left_guest: Vec<Packet>,
    /// What arrived elsewhere, or was sent to the guest, that is no tunnel traffic: where, and what.
    pub strays: Vec<(String, Packet)>,
    /// Frames of the tunnels, seen elsewhere than on the guest's own interface.
    pub tunnel_frames: usize,
    /// IP packets that the provider's own stack took in.
    pub delivered_to_host: u64,
}

impl<'a> Witness<'a> {
    /// Posts captures on the guest's interface and on every other of the stage.
    pub fn post(
        stage: &'a Stage,
        guest: &Guest,
        other: &Guest,
        tunnels: Vec<Tunnel>,
    ) -> Result<Self> {
        let provider = &stage.provider;
        let own = provider.enter(|| Capture::open(&guest.interface))??;
        let mut posts = Vec::new();
        for (role, namespace, interfaces) in [
            (
                "provider",
                provider,
                &["lo", "uplink", "lan", "neighbour", &other.interface][..],
            ),
            (
                "internet",
                &stage.internet,
                &["lo", "provider", "consumer-a", "consumer-b"][..],
            ),
            ("lan", &stage.lan, &["lo", "eth0"][..]),
            ("consumer-a", &stage.consumer_a, &["lo", "eth0"][..]),
            ("consumer-b", &stage.consumer_b, &["lo", "eth0"][..]),
            ("neighbour", &stage.neighbour, &["lo", "eth0"][..]),
        ] {
            for interface in interfaces {
                let capture = namespace.enter(|| Capture::open(interface))??;
                posts.push(Post {
                    place: format!("{role}/{interface}"),
                    capture,
                });
            }
        }
        Ok(Self {
            provider,
            own,
            gateway: guest.gateway,
            posts,
            tunnels,
        })
    }

    /// On how many interfaces other than the guest's own something would be seen.
    pub fn posts(&self) -> usize {
        self.posts.len()
    }

    /// How many IP packets the provider's own stack has taken in so far.
    pub fn delivered_to_host(&self) -> Result<u64> {
        let snmp = self
            .provider
            .enter(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))?;
        let snmp = snmp.context("cannot read the provider's IP counters")?;
        let mut lines = snmp.lines().filter(|line| line.starts_with("Ip:"));
        let (names, values) = (
            lines.next().unwrap_or_default(),
            lines.next().unwrap_or_default(),
        );
        let counter = names
            .split_whitespace()
            .zip(values.split_whitespace())
            .find(|(name, _)| *name == "InDelivers");
        counter
            .and_then(|(_, value)| value.parse().ok())
            .context("the kernel does not tell InDelivers")
    }

    /// Takes in what was seen since the last look; `delivered_before` is the counter's value then.
    pub fn look(&self, delivered_before: u64) -> Result<Sighting> {
        let mut sighting = Sighting {
            left_guest: Vec::new(),
            strays: Vec::new(),
            tunnel_frames: 0,
            delivered_to_host: self.delivered_to_host()?.saturating_sub(delivered_before),
        };
        for frame in self.frames(&self.own)? {
            let Some(packet) = read(&frame)? else {
                continue;
            };
            match frame.travel {
                _ if self.is_tunnel(&packet) => {}
                Travel::Incoming => sighting.left_guest.push(packet),
                // The guard itself answers for the gateway, by ARP alone.
                Travel::Outgoing if matches!(packet.body, Body::Arp { sender, .. } if sender == self.gateway) =>
                    {}
                Travel::Outgoing => sighting
                    .strays
                    .push(("the guest itself, as an answer".to_owned(), packet)),
            }
        }
        for post in &self.posts {
            for frame in self.frames(&post.capture)? {
                let Some(packet) = read(&frame)? else {
                    continue;
                };
                if self.is_tunnel(&packet) {
                    sighting.tunnel_frames += 1;
                } else {
                    sighting.strays.push((post.place.clone(), packet));
                }
            }
        }
        Ok(sighting)
    }

    fn is_tunnel(&self, packet: &Packet) -> bool {
        self.tunnels.iter().any(|tunnel| tunnel.carries(packet))
    }

    fn frames(&self, capture: &Capture) -> Result<Vec<CapturedFrame>> {
        let frames = capture.frames()?;
        let lost = capture.lost()?;
        if lost > 0 {
            bail!(
                "the capture on {} lost {lost} frames: it proves nothing",
                capture.interface()
            );
        }
        Ok(frames)
    }
}

/// A frame too short to be read is a fault of the capture: the kernel pads none away.
fn read(frame: &CapturedFrame) -> Result<Option<Packet>> {
    match Packet::parse(&frame.bytes) {
        Some(packet) => Ok(Some(packet)),
        None => bail!(
            "a capture holds a frame of {} bytes that cannot be read",
            frame.bytes.len()
        ),
    }
}
