//! What a guest's root tries in order to get past its guard.

use std::net::Ipv4Addr;

use crate::consumer::PORT;
use crate::guest::Guest;
use crate::packet::{Body, ICMP, Packet, TCP, UDP};
use crate::stage::{DNS_SERVER, LAN_HOST, PROVIDER, WEB_SERVER};
use crate::witness::MARK;

const FORGED_ADDRESS: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 99);
const FORGED_MAC: &str = "02:00:00:00:66:66";

/// One attempt.
pub struct Attempt {
    /// What it is, for the reader.
    pub what: String,
    /// The line that the guest's root types.
    pub command: String,
    /// The reasons that the guard may give; it must give one of these and no other.
    pub expected: &'static [&'static str],
    /// Whether a packet seen on the guest's own interface is the attempt's.
    pub is_its: Box<dyn Fn(&Packet) -> bool>,
}

/// All attempts, against the `other` guest too. `gateway_mac` is what the guest knows of its gateway.
pub fn all(guest: &Guest, other: &Guest, gateway_mac: &str, consumer: Ipv4Addr) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    let mut add = |what: &str, command: String, expected, is_its: Box<dyn Fn(&Packet) -> bool>| {
        attempts.push(Attempt {
            what: what.to_owned(),
            command,
            expected,
            is_its,
        });
    };
    let (address, gateway, other_address) = (guest.address, guest.gateway, other.address);
    let (mac, other_mac) = (guest.mac.clone(), other.mac.clone());
    let not_allowed = &["endpoint"][..];

    let ping = |to: Ipv4Addr| {
        (
            format!("timeout 1 ping -c1 -W1 {to}"),
            sent_to(to, ICMP, None),
        )
    };
    let connect = |to: Ipv4Addr, port| {
        (
            format!("timeout 1 nc -w1 {to} {port} </dev/null"),
            sent_to(to, TCP, Some(port)),
        )
    };
    // A read request for a file whose name is the mark: UDP with a payload of our own.
    let send = |to: Ipv4Addr, port| format!("timeout 1 tftp -g -l /dev/null -r {MARK} {to} {port}");

    let (command, is_its) = ping(WEB_SERVER);
    add("the internet, ping", command, not_allowed, is_its);
    let (command, is_its) = connect(WEB_SERVER, 443);
    add("the internet, TCP 443", command, not_allowed, is_its);
    let dns = format!("timeout 1 nslookup -type=a omerta.example {DNS_SERVER}");
    add("DNS", dns, not_allowed, sent_to(DNS_SERVER, UDP, Some(53)));
    let (command, is_its) = connect(LAN_HOST, 22);
    add("the provider's LAN, TCP 22", command, not_allowed, is_its);
    let (command, is_its) = connect(gateway, 22);
    add(
        "the host by its gateway address, TCP 22",
        command,
        not_allowed,
        is_its,
    );
    let (command, is_its) = ping(PROVIDER);
    add(
        "the host by its uplink address, ping",
        command,
        not_allowed,
        is_its,
    );
    let (command, is_its) = ping(other_address);
    add("the other guest, ping", command, not_allowed, is_its);
    add(
        "another port of the consumer, UDP",
        send(consumer, PORT + 1),
        not_allowed,
        sent_to(consumer, UDP, Some(PORT + 1)),
    );
    let (command, is_its) = connect(consumer, PORT);
    add("TCP to the WireGuard port", command, not_allowed, is_its);

    // traceroute counts the port up by one before its first probe.
    let trace_from = |from: Ipv4Addr| {
        format!(
            "ip addr add {from}/32 dev eth0; timeout 1 traceroute -n -q1 -w1 -f64 -m64 -p{} -s {from} {consumer}; \
             ip addr del {from}/32 dev eth0",
            PORT - 1
        )
    };
    for (what, from) in [
        (
            "a forged source address, to the allowed port",
            FORGED_ADDRESS,
        ),
        ("the other guest's address as source", other_address),
    ] {
        let is_its = move |packet: &Packet| {
            packet.comes_from(from) && packet.goes_to(consumer, UDP, Some(PORT))
        };
        add(
            what,
            trace_from(from),
            &["source_address"],
            Box::new(is_its),
        );
    }
    for (what, forged) in [
        (
            "a forged source MAC, to the allowed port",
            FORGED_MAC.to_owned(),
        ),
        ("the other guest's MAC as source", other_mac),
    ] {
        // The guard answers no ARP for a stranger's MAC: root enters the gateway's by hand.
        let command = format!(
            "ip link set eth0 address {forged}; arp -i eth0 -s {gateway} {gateway_mac}; {}; \
             ip link set eth0 address {mac}",
            send(consumer, PORT)
        );
        let is_its = move |packet: &Packet| packet.source_mac == forged && packet.holds(MARK);
        add(what, command, &["source_mac"], Box::new(is_its));
    }
    add(
        "IPv6",
        "cd /proc/sys/net/ipv6/conf/eth0; echo 0 >accept_dad; echo 10 >mldv2_unsolicited_report_interval; echo 0 >disable_ipv6; \
         ip -6 addr add 2001:db8::66/64 dev eth0; timeout 1 ping6 -c1 -W1 2001:db8::1; echo 1 >disable_ipv6; cd"
            .to_owned(),
        &[
            "source_address",
            "endpoint",
            "neighbour",
            "extension_header",
            // What the guest's own stack says where IPv6 comes up.
            "multicast_listener",
            "router_solicitation",
            "address_probe",
            "destination_mac",
            "icmp_type",
        ],
        Box::new(|packet| matches!(packet.body, Body::Ipv6 { .. })),
    );
    add(
        "fragments, to the consumer",
        format!("timeout 1 ping -c1 -W1 -s 3000 {consumer}"),
        &["fragment"],
        Box::new(
            move |packet| matches!(packet.body, Body::Ipv4 { fragment: true, destination, .. } if destination == consumer),
        ),
    );
    add(
        "ARP for a stranger",
        format!("timeout 1 arping -c1 -w1 -I eth0 {LAN_HOST}"),
        &["arp_target"],
        Box::new(move |packet| {
            packet.body
                == Body::Arp {
                    sender: address,
                    target: LAN_HOST,
                }
        }),
    );
    add(
        "ARP in the gateway's name",
        format!(
            "ip addr add {gateway}/32 dev eth0; timeout 1 arping -A -c1 -w1 -I eth0 -s {gateway} {gateway}; \
             ip addr del {gateway}/32 dev eth0"
        ),
        &["arp_sender"],
        Box::new(move |packet| {
            packet.body
                == Body::Arp {
                    sender: gateway,
                    target: gateway,
                }
        }),
    );
    add(
        "a broadcast for DHCP",
        "timeout 1 udhcpc -i eth0 -n -q -t1 -T1 -s /bin/true".to_owned(),
        &["source_address", "destination_mac", "endpoint"],
        Box::new(|packet| packet.goes_to(Ipv4Addr::BROADCAST, UDP, Some(67))),
    );
    attempts
}

fn sent_to(to: Ipv4Addr, protocol: u8, port: Option<u16>) -> Box<dyn Fn(&Packet) -> bool> {
    Box::new(move |packet| packet.goes_to(to, protocol, port))
}
