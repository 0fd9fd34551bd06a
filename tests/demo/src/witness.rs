//! Captures everywhere, which tell independently of the guard what left the guest and what
//! arrived anywhere.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use omerta_test_support::{Capture, CapturedFrame, FrameSender, Namespace, Travel};

use crate::consumer::PORT;
use crate::guest::Guest;
use crate::interrupt;
use crate::packet::{Body, Packet, UDP};
use crate::stage::Stage;

/// How long after something was sent it may still be on its way.
pub const SETTLING: Duration = Duration::from_millis(100);

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
    /// The way to wake it. None on the other guest's tap: what is sent there, its guard drops
    /// before a capture sees it.
    sender: Option<FrameSender>,
}

impl Post {
    /// A frame that nobody else sends and nobody takes in (an EtherType for experiments).
    fn knock(&self) -> Vec<u8> {
        let mut frame = b"\x02\0\0\0\xaa\xaa\x02\0\0\0\xaa\xab\x88\xb5".to_vec();
        frame.extend_from_slice(format!("omerta-demo-knock {}.", self.place).as_bytes());
        frame.resize(60.max(frame.len()), 0);
        frame
    }
}

/// All captures but the guest's own, and the guest's own apart.
pub struct Witness<'a> {
    provider: &'a Namespace,
    own: Capture,
    own_mac: String,
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
    /// IP packets that the provider's own stack took in.
    pub delivered_to_host: u64,
}

impl Sighting {
    /// Adds what was seen later, counted from the same moment.
    pub fn extend(&mut self, later: Self) {
        self.left_guest.extend(later.left_guest);
        self.strays.extend(later.strays);
        self.delivered_to_host = later.delivered_to_host;
    }
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
                let sender = match *interface {
                    tap if tap == other.interface => None,
                    wire => Some(namespace.enter(|| FrameSender::open(wire))??),
                };
                posts.push(Post {
                    place: format!("{role}/{interface}"),
                    capture,
                    sender,
                });
            }
        }
        Ok(Self {
            provider,
            own,
            own_mac: guest.mac.clone(),
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
            delivered_to_host: self.delivered_to_host()?.saturating_sub(delivered_before),
        };
        for frame in self.frames(&self.own)? {
            let Some(packet) = read(&frame)? else {
                continue;
            };
            match frame.travel {
                // Under a forged MAC the tunnel's frames are no tunnel's.
                Travel::Incoming
                    if self.is_tunnel(&packet) && packet.source_mac == self.own_mac => {}
                Travel::Outgoing if self.is_tunnel(&packet) => {}
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
                if !self.is_tunnel(&packet) {
                    sighting.strays.push((post.place.clone(), packet));
                }
            }
        }
        Ok(sighting)
    }

    /// Knocks at every post, and names those that saw nothing of it: their silence proves nothing.
    /// The other guest's tap must have seen frames of its tunnel since the last look.
    pub fn asleep(&self) -> Result<Vec<&str>> {
        for post in &self.posts {
            if let Some(sender) = &post.sender {
                sender.send(&post.knock())?;
            }
        }
        interrupt::sleep(SETTLING)?;
        let mut asleep = Vec::new();
        for post in &self.posts {
            let knock = post.knock();
            let heard = |frame: &CapturedFrame| match &post.sender {
                Some(_) => frame.bytes == knock,
                None => Packet::parse(&frame.bytes).is_some_and(|packet| self.is_tunnel(&packet)),
            };
            if !self.frames(&post.capture)?.iter().any(heard) {
                asleep.push(post.place.as_str());
            }
        }
        Ok(asleep)
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
