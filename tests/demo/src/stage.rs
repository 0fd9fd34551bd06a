//! The stage: the provider with an uplink and a LAN, the internet, two consumers, and a neighbour
//! that stands where the guests stand but has no guard.
//!
//! Every neighbour entry is permanent and IPv6 is off, so that the stage itself sends nothing and
//! each frame in a capture means something. The provider forwards from everywhere to everywhere
//! and checks no source: only the guard stands between a guest and the rest.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use omerta_test_support::Namespace;

use crate::bounded;
use crate::leftovers::Leftovers;

pub const PROVIDER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const WEB_SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 80);
pub const DNS_SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 53);
pub const LAN_HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 20);
pub const CONSUMER_A: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
pub const CONSUMER_B: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);

/// One end of a wire.
struct End<'a> {
    namespace: &'a Namespace,
    interface: &'a str,
    mac: &'a str,
    /// With the prefix that is on the link; other hosts need a route.
    address: &'a str,
}

/// The namespaces of the demo.
pub struct Stage {
    pub provider: Namespace,
    pub internet: Namespace,
    pub lan: Namespace,
    pub consumer_a: Namespace,
    pub consumer_b: Namespace,
    pub neighbour: Namespace,
}

impl Stage {
    /// Sets everything up.
    pub fn build(leftovers: &mut Leftovers) -> Result<Self> {
        let mut namespace = |role: &str| -> Result<Namespace> {
            let namespace = Namespace::new(&format!("omdemo-{role}"))?;
            leftovers.watch_namespace(&namespace)?;
            namespace.disable_ipv6()?;
            for scope in ["all", "default"] {
                namespace.set(format!("/proc/sys/net/ipv4/conf/{scope}/rp_filter"), "0")?;
            }
            Ok(namespace)
        };
        let stage = Self {
            provider: namespace("provider")?,
            internet: namespace("internet")?,
            lan: namespace("lan")?,
            consumer_a: namespace("consumer-a")?,
            consumer_b: namespace("consumer-b")?,
            neighbour: namespace("neighbour")?,
        };
        stage.wire().context("cannot wire the stage")?;
        Ok(stage)
    }

    fn wire(&self) -> Result<()> {
        let end = |namespace, interface, mac, address| End {
            namespace,
            interface,
            mac,
            address,
        };
        connect(
            &end(
                &self.provider,
                "uplink",
                "02:00:00:00:01:01",
                "192.0.2.1/32",
            ),
            &end(
                &self.internet,
                "provider",
                "02:00:00:00:01:02",
                "192.0.2.254/32",
            ),
        )?;
        connect(
            &end(
                &self.provider,
                "lan",
                "02:00:00:00:02:01",
                "192.168.50.1/24",
            ),
            &end(&self.lan, "eth0", "02:00:00:00:02:02", "192.168.50.20/24"),
        )?;
        connect(
            &end(
                &self.internet,
                "consumer-a",
                "02:00:00:00:03:01",
                "198.51.100.254/24",
            ),
            &end(
                &self.consumer_a,
                "eth0",
                "02:00:00:00:03:02",
                "198.51.100.10/24",
            ),
        )?;
        connect(
            &end(
                &self.internet,
                "consumer-b",
                "02:00:00:00:04:01",
                "203.0.113.254/24",
            ),
            &end(
                &self.consumer_b,
                "eth0",
                "02:00:00:00:04:02",
                "203.0.113.10/24",
            ),
        )?;
        connect(
            &end(
                &self.provider,
                "neighbour",
                "02:00:00:00:05:01",
                "10.78.0.1/24",
            ),
            &end(&self.neighbour, "eth0", "02:00:00:00:05:02", "10.78.0.2/24"),
        )?;
        for host in [WEB_SERVER, DNS_SERVER] {
            self.internet.ip(&format!("address add {host}/32 dev lo"))?;
        }
        for (namespace, route) in [
            (&self.provider, "192.0.2.254/32 dev uplink"),
            (&self.provider, "default via 192.0.2.254"),
            (&self.internet, "192.0.2.1/32 dev provider"),
            // The way back to the guests and to the neighbour.
            (&self.internet, "10.76.0.0/14 via 192.0.2.1"),
            (&self.lan, "default via 192.168.50.1"),
            (&self.consumer_a, "default via 198.51.100.254"),
            (&self.consumer_b, "default via 203.0.113.254"),
            (&self.neighbour, "default via 10.78.0.1"),
        ] {
            namespace.ip(&format!("route add {route}"))?;
        }
        for router in [&self.provider, &self.internet] {
            router.enable_forwarding()?;
        }
        Ok(())
    }

    /// Which of the targets answer the unguarded neighbour. All should: then it is the guard, and
    /// not the stage, that keeps a guest from them.
    pub fn reached_by_neighbour(&self) -> Result<Vec<(&'static str, Ipv4Addr, bool)>> {
        let targets = [
            ("internet", WEB_SERVER),
            ("DNS", DNS_SERVER),
            ("LAN", LAN_HOST),
            ("host", PROVIDER),
            ("consumer A", CONSUMER_A),
            ("consumer B", CONSUMER_B),
        ];
        let mut answers = Vec::new();
        for (name, address) in targets {
            let mut ping = self.neighbour.command("ping");
            ping.args(["-n", "-q", "-c1", "-W2", &address.to_string()]);
            let answer = bounded::run(ping, "", Duration::from_secs(5))?;
            answers.push((name, address, answer.status.success()));
        }
        Ok(answers)
    }
}

/// Puts a wire between two namespaces, with all neighbours known in advance.
fn connect(near: &End, far: &End) -> Result<()> {
    near.namespace.ip(&format!(
        "link add {} address {} type veth peer name {} address {} netns {}",
        near.interface,
        near.mac,
        far.interface,
        far.mac,
        far.namespace.name(),
    ))?;
    for (own, other) in [(near, far), (far, near)] {
        let host = other.address.split('/').next().unwrap_or_default();
        let (namespace, interface) = (own.namespace, own.interface);
        namespace.ip(&format!("address add {} dev {interface}", own.address))?;
        namespace.ip(&format!("link set {interface} up"))?;
        namespace.ip(&format!(
            "neighbour replace {host} lladdr {} dev {interface} nud permanent",
            other.mac
        ))?;
    }
    Ok(())
}
