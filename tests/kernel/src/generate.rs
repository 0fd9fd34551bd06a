//! Structure-aware random frames: mostly right, so that judgement gets deep, then bent.

use std::net::{Ipv4Addr, Ipv6Addr};

use fastrand::Rng;
use omerta_verdict::Mac;

use crate::frame::{Ipv4, Ipv6, arp, ethernet, icmp_echo, tcp, udp};
use crate::stage::*;

/// A reproducible stream of frames.
#[derive(Debug)]
pub struct Generator {
    rng: Rng,
}

impl Generator {
    /// The stream that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self {
            rng: Rng::with_seed(seed),
        }
    }

    /// The next frame, at least an Ethernet header long.
    pub fn frame(&mut self) -> Vec<u8> {
        let mut frame = match self.rng.u8(..16) {
            0..=5 => self.v4(),
            6 => self.error(),
            7..=10 => self.v6(),
            11..=12 => self.arp(),
            13..=14 => self.discovery(),
            _ => self.noise(),
        };
        self.bend(&mut frame);
        frame
    }

    fn pick<T: Copy>(&mut self, usual: T, odd: &[T]) -> T {
        if odd.is_empty() || self.rng.u8(..12) < 11 {
            usual
        } else {
            odd[self.rng.usize(..odd.len())]
        }
    }

    fn macs(&mut self) -> (Mac, Mac) {
        let odd = [
            STRANGER_MAC,
            Mac::BROADCAST,
            Mac([0; 6]),
            Mac([1, 0, 0x5e, 0, 0, 1]),
        ];
        if self.rng.bool() {
            (self.pick(GUEST_MAC, &odd), self.pick(GATEWAY_MAC, &odd))
        } else {
            (self.pick(GATEWAY_MAC, &odd), self.pick(GUEST_MAC, &odd))
        }
    }

    fn v4_pair(&mut self) -> (Ipv4Addr, Ipv4Addr) {
        let odd = [
            GUEST_TOO,
            GATEWAY,
            STRANGER,
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::BROADCAST,
            Ipv4Addr::LOCALHOST,
            Ipv4Addr::new(224, 0, 0, 1),
            Ipv4Addr::new(169, 254, 169, 254),
        ];
        let (guest, peer) = (self.pick(GUEST, &odd), self.pick(CONSUMER, &odd));
        if self.rng.bool() {
            (guest, peer)
        } else {
            (peer, guest)
        }
    }

    fn v6_pair(&mut self) -> (Ipv6Addr, Ipv6Addr) {
        let odd = [
            GATEWAY6,
            Ipv6Addr::UNSPECIFIED,
            Ipv6Addr::LOCALHOST,
            GUEST.to_ipv6_mapped(),
            CONSUMER.to_ipv6_mapped(),
            Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1),
            Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1),
        ];
        let (guest, peer) = (self.pick(GUEST6, &odd), self.pick(CONSUMER6, &odd));
        if self.rng.bool() {
            (guest, peer)
        } else {
            (peer, guest)
        }
    }

    fn port(&mut self) -> u16 {
        self.pick(CONSUMER_PORT, &[443, 53, 0, 65535])
    }

    fn segment(&mut self, echo: [u8; 2], icmp: u8) -> (u8, Vec<u8>) {
        let (from, to) = (self.port(), self.port());
        let payload = vec![0xaa; self.rng.usize(..80)];
        match self.rng.u8(..8) {
            0..=3 => (17, udp(from, to, &payload)),
            4..=5 => (6, tcp(from, to)),
            6 => (
                icmp,
                icmp_echo(self.pick(echo[0], &[echo[1], 3, 5, 11, 13, 134, 137]), 7),
            ),
            _ => (self.rng.u8(..), payload),
        }
    }

    fn v4(&mut self) -> Vec<u8> {
        let ((from_mac, to_mac), (from, to)) = (self.macs(), self.v4_pair());
        let (protocol, payload) = self.segment([8, 0], 1);
        let mut header = Ipv4::new(
            from,
            to,
            self.pick(protocol, &[1, 2, 4, 41, 47, 50, 58, 132]),
        );
        header.fragment = self.pick(0x4000, &[0, 0x2000, 0x0001, 0x8000, 0x1fff]);
        header.ttl = self.pick(64, &[0, 1, 255]);
        ethernet(
            from_mac,
            to_mac,
            self.pick(0x0800, &[0x86dd, 0x0806]),
            &header.packet(&payload),
        )
    }

    /// An ICMP or ICMPv6 error to the guest, which quotes a packet that it may have sent.
    fn error(&mut self) -> Vec<u8> {
        let v4 = self.rng.bool();
        let (number, echo) = if v4 { (1, [8, 0]) } else { (58, [128, 129]) };
        let (protocol, mut payload) = self.segment(echo, number);
        payload.truncate(self.rng.usize(6..40));
        let (kind, code) = if v4 {
            (
                self.pick(3, &[11, 12, 5, 4, 0]),
                self.pick(4, &[0, 1, 15, 16]),
            )
        } else {
            (self.pick(2, &[1, 3, 4, 5]), self.pick(0, &[1, 3, 9]))
        };
        let mut message = vec![kind, code, 0, 0, 0, 0, 0, 0];
        let (kind, packet) = if v4 {
            let odd = [GUEST_TOO, STRANGER, GATEWAY];
            let (guest, peer) = (self.pick(GUEST, &odd), self.pick(CONSUMER, &odd));
            message.extend(Ipv4::new(guest, peer, protocol).packet(&payload));
            let router = self.pick(STRANGER, &[CONSUMER, GUEST, Ipv4Addr::LOCALHOST]);
            (0x0800, Ipv4::new(router, GUEST, 1).packet(&message))
        } else {
            let odd = [GATEWAY6, Ipv6Addr::LOCALHOST];
            let (guest, peer) = (self.pick(GUEST6, &odd), self.pick(CONSUMER6, &odd));
            message.extend(Ipv6::new(guest, peer, protocol).packet(&payload));
            let router = self.pick(GATEWAY6, &[CONSUMER6, GUEST6, Ipv6Addr::LOCALHOST]);
            (0x86dd, Ipv6::new(router, GUEST6, 58).icmp(message))
        };
        ethernet(GATEWAY_MAC, GUEST_MAC, kind, &packet)
    }

    fn v6(&mut self) -> Vec<u8> {
        let ((from_mac, to_mac), (from, to)) = (self.macs(), self.v6_pair());
        let (protocol, payload) = self.segment([128, 129], 58);
        let mut header = Ipv6::new(
            from,
            to,
            self.pick(protocol, &[0, 43, 44, 50, 51, 59, 60, 135, 1, 4, 41]),
        );
        header.hops = self.pick(64, &[0, 1, 255]);
        ethernet(
            from_mac,
            to_mac,
            self.pick(0x86dd, &[0x0800]),
            &header.packet(&payload),
        )
    }

    fn arp(&mut self) -> Vec<u8> {
        let ((from_mac, to_mac), (from, to)) = (self.macs(), self.v4_pair());
        let to_mac = self.pick(Mac::BROADCAST, &[to_mac, STRANGER_MAC]);
        let operation = self.pick(1, &[2, 3, 8, 0]);
        let sender = self.pick(from_mac, &[STRANGER_MAC, GUEST_MAC, GATEWAY_MAC]);
        let target = self.pick(to, &[GATEWAY, GUEST, STRANGER]);
        ethernet(
            from_mac,
            to_mac,
            0x0806,
            &arp(operation, (sender, from), (to_mac, target)),
        )
    }

    fn discovery(&mut self) -> Vec<u8> {
        let ((from_mac, to_mac), (from, _)) = (self.macs(), self.v6_pair());
        let target = self.pick(GATEWAY6, &[GUEST6, GUEST6, CONSUMER6, from]);
        let low = target.octets();
        let group = Ipv6Addr::new(
            0xff02,
            0,
            0,
            0,
            0,
            1,
            0xff00 | u16::from(low[13]),
            u16::from_be_bytes([low[14], low[15]]),
        );
        let mut message = vec![
            self.pick(135, &[136, 133, 134, 137]),
            self.pick(0, &[1]),
            0,
            0,
        ];
        message.extend([self.pick(0, &[0x60, 0xe0]), 0, 0, 0]);
        message.extend(target.octets());
        if self.rng.u8(..4) > 0 {
            message.extend([self.pick(1, &[2, 14]), self.pick(1, &[0, 2])]);
            message.extend(self.pick(from_mac, &[STRANGER_MAC]).0);
        }
        let to = self.pick(group, &[target, CONSUMER6]);
        let to_mac = if to == group {
            Mac([0x33, 0x33, 0xff, low[13], low[14], low[15]])
        } else {
            to_mac
        };
        let mut header = Ipv6::new(from, to, 58);
        header.hops = self.pick(255, &[64, 254]);
        ethernet(
            from_mac,
            self.pick(to_mac, &[Mac::BROADCAST]),
            0x86dd,
            &header.icmp(message),
        )
    }

    fn noise(&mut self) -> Vec<u8> {
        let (from, to) = self.macs();
        let kind = self.pick(
            0x0800,
            &[
                0x8100, 0x88a8, 0x86dd, 0x0806, 0x0004, 0x05ff, 0x0600, 0x88cc,
            ],
        );
        let payload: Vec<u8> = (0..self.rng.usize(..100))
            .map(|_| self.rng.u8(..))
            .collect();
        ethernet(from, to, kind, &payload)
    }

    /// Half of the frames are left alone; the rest lose, gain or change some bytes.
    fn bend(&mut self, frame: &mut Vec<u8>) {
        match self.rng.u8(..10) {
            0 | 1 => {
                let at = self.rng.usize(..frame.len());
                frame[at] = self.rng.u8(..);
            }
            2 => {
                let at = self.rng.usize(..frame.len());
                frame[at] ^= 1 << self.rng.u8(..8);
            }
            3 => frame.truncate(14.max(self.rng.usize(..=frame.len()))),
            4 => frame.extend((0..self.rng.usize(1..40)).map(|_| 0)),
            _ => {}
        }
    }
}
