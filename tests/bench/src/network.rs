//! A lane: one namespace in which a guest's tap is routed to an uplink that swallows everything,
//! with one way of filtering on the path.

use std::fs;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::time::{ClockId, clock_gettime};
use omerta_dataplane::Guard;
use omerta_kernel_tests::{CONSUMER, CONSUMER_PORT, GATEWAY_MAC, GUEST, GUEST_MAC, config};
use omerta_test_support::{Namespace, Tap, index_of};
use omerta_verdict::Mode;

use crate::kernel::{self, Hook, Kind, SendOn};

/// What stands between the tap and the uplink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Nothing.
    None,
    /// The guard.
    Guard,
    /// The guard, and what it allows past the stack.
    GuardRedirect,
    /// An XDP program that drops everything: the least that a drop can cost.
    XdpFloor,
    /// A TCX program that drops everything: the least that a drop can cost where the guard stands.
    TcxFloor,
    /// A TCX program that sends everything past the stack unseen: the least that redirecting can cost.
    RedirectFloor,
    /// nftables at the tap's netdev hook.
    NftNetdev,
    /// nftables in the forward chain.
    NftForward,
    /// The same behind connection tracking.
    NftForwardConntrack,
    /// iptables with an ipset in the forward chain.
    IptablesIpset,
}

/// Where the guest's frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To a neighbour behind an uplink.
    Uplink,
    /// To another network namespace, by a veth.
    Local,
}

/// The namespace, the guest's end of its tap and the filter.
pub struct Lane {
    namespace: Namespace,
    // Where the uplink ends.
    other: Option<Namespace>,
    guest: Tap,
    filter: Filter,
    // Programs that are detached when these are closed.
    _links: Vec<OwnedFd>,
}

/// `struct virtio_net_hdr` (include/uapi/linux/virtio_net.h), ten bytes before each frame.
pub type OffloadHeader = [u8; 10];

/// A frame as it is, without offload.
pub const PLAIN: OffloadHeader = [0; 10];

impl Lane {
    pub fn new(filter: Filter, way: Way) -> Result<Self> {
        let namespace = Namespace::new("omerta-bench")?;
        namespace.disable_ipv6()?;
        namespace.enable_forwarding()?;
        // As libvirt makes them.
        let guest = namespace.enter(|| Tap::create_with_offload_header("guest"))??;
        // What is written to a descriptor that blocks becomes a socket buffer before XDP sees it
        // (`tun_can_build_skb` in drivers/net/tun.c); the floor is measured on that path.
        fcntl(&guest, FcntlArg::F_SETFL(OFlag::O_RDWR))?;
        for step in [
            &format!("link set guest address {GATEWAY_MAC}"),
            "link add uplink type veth peer name sink",
        ] {
            namespace.ip(step)?;
        }
        let other = match way {
            Way::Uplink => None,
            Way::Local => {
                let other = Namespace::new("omerta-bench-local")?;
                other.disable_ipv6()?;
                namespace.ip(&format!("link set sink netns {}", other.name()))?;
                Some(other)
            }
        };
        let sinks = other.as_ref().unwrap_or(&namespace);
        sinks.ip("link set sink address 52:54:00:00:00:cc")?;
        sinks.ip("link set sink up")?;
        for step in ["link set uplink up", "addr add 203.0.113.1/24 dev uplink"] {
            namespace.ip(step)?;
        }
        let mut links = vec![sinks.enter(|| drop_all("sink"))??];
        links.extend(namespace.enter(|| attach(filter, way))??);
        for step in [
            "link set guest up",
            "addr add 10.77.0.1/32 dev guest",
            "route add 10.77.0.2/32 dev guest",
            "route add default via 203.0.113.9",
            "neigh replace 203.0.113.9 lladdr 52:54:00:00:00:cc dev uplink nud permanent",
        ] {
            namespace.ip(step)?;
        }
        for (program, arguments) in rules(filter) {
            let output = namespace
                .command(program)
                .args(arguments)
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot run {program} (make bench installs it)"))?;
            if !output.status.success() {
                let complaint = String::from_utf8_lossy(&output.stderr);
                let first = complaint.lines().next().unwrap_or("no message");
                bail!("{program} refused the rules of {filter:?}: {first}");
            }
        }
        Ok(Self {
            namespace,
            other,
            guest,
            filter,
            _links: links,
        })
    }

    /// Does `work` in the namespace of the guest's tap.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.namespace.enter(work)?
    }

    /// Nanoseconds of this thread for one frame, over `count` frames; fails unless the uplink's end got
    /// exactly the frames that the filter lets through.
    pub fn send(
        &self,
        header: &OffloadHeader,
        frame: &[u8],
        count: u32,
        passes: bool,
    ) -> Result<f64> {
        let buffer = [&header[..], frame].concat();
        let (sent_before, redirected_before) = (self.sent()?, self.redirected()?);
        let before = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        for _ in 0..count {
            self.guest.send(&buffer)?;
        }
        let after = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        let sent = self.sent()? - sent_before;
        let expected = if passes { u64::from(count) } else { 0 };
        if sent != expected {
            bail!(
                "{:?}: the uplink's end got {sent} frames, not {expected}",
                self.filter
            );
        }
        let redirected = self.redirected()? - redirected_before;
        if self.filter == Filter::GuardRedirect && redirected != expected {
            bail!("{redirected} of {expected} frames passed the stack by");
        }
        let spent = std::time::Duration::from(after - before);
        Ok(spent.as_nanos() as f64 / f64::from(count))
    }

    /// Frames that have passed the stack by.
    fn redirected(&self) -> Result<u64> {
        if self.filter != Filter::GuardRedirect {
            return Ok(0);
        }
        let status = self
            .namespace
            .enter(|| Guard::open("guest").and_then(|guard| guard.status()))??;
        let redirect = status.redirect.context("nothing is redirected")?;
        Ok(redirect.to_neighbours + redirect.to_peers)
    }

    /// Frames that have reached the uplink's other end.
    fn sent(&self) -> Result<u64> {
        // /proc/thread-self/net shows the namespace of the thread.
        let table = self
            .other
            .as_ref()
            .unwrap_or(&self.namespace)
            .enter(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
        table
            .lines()
            .find_map(|line| line.trim_start().strip_prefix("sink:"))
            .and_then(|fields| fields.split_whitespace().nth(1))
            .and_then(|field| field.parse().ok())
            .context("the sink's count in /proc/net/dev")
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if matches!(self.filter, Filter::Guard | Filter::GuardRedirect) {
            // Pins outlive the namespace; a drop cannot report.
            let _ = self
                .namespace
                .enter(|| Guard::open("guest").and_then(Guard::detach));
        }
    }
}

/// A program of two instructions that drops all that `interface` receives.
fn drop_all(interface: &str) -> Result<OwnedFd> {
    /// `TC_ACT_SHOT`.
    const SHOT: i32 = 2;
    let program = kernel::constant(Kind::Classifier, SHOT)?;
    kernel::attach(&program, index_of(interface)?, Hook::TcxIngress)
}

/// The filter's program where it is one.
fn attach(filter: Filter, way: Way) -> Result<Option<OwnedFd>> {
    const XDP_DROP: i32 = 1;
    match filter {
        Filter::Guard => drop(Guard::attach("guest", &config(Mode::Filtered))?),
        Filter::GuardRedirect => {
            let peers: &[&str] = match way {
                Way::Uplink => &[],
                Way::Local => &["uplink"],
            };
            Guard::attach("guest", &config(Mode::Filtered))?.redirect(peers)?;
        }
        Filter::XdpFloor => {
            let program = kernel::constant(Kind::Xdp, XDP_DROP)?;
            return Ok(Some(kernel::attach(
                &program,
                index_of("guest")?,
                Hook::Xdp,
            )?));
        }
        Filter::TcxFloor => return Ok(Some(drop_all("guest")?)),
        Filter::RedirectFloor => {
            let how = match way {
                Way::Uplink => SendOn::Out,
                Way::Local => SendOn::IntoPeer,
            };
            let program = kernel::redirect(index_of("uplink")?, how)?;
            let link = kernel::attach(&program, index_of("guest")?, Hook::TcxIngress)?;
            return Ok(Some(link));
        }
        _ => {}
    }
    Ok(None)
}

/// The guard's policy in another tool's words.
fn rules(filter: Filter) -> Vec<(&'static str, Vec<String>)> {
    let nft = |family: &str, hook: &str, before: &str| {
        let script = format!(
            "table {family} bench {{
                set peers {{
                    type ipv4_addr . inet_service
                    elements = {{ {CONSUMER} . {CONSUMER_PORT}, {CONSUMER} . 443 }}
                }}
                chain guest {{
                    type filter hook {hook} priority 0; policy drop;
                    {before}
                    iifname \"guest\" ether saddr {GUEST_MAC} ip saddr {GUEST} meta l4proto {{ tcp, udp }} ip daddr . th dport @peers accept
                }}
            }}"
        );
        vec![("nft", vec![script])]
    };
    match filter {
        Filter::None
        | Filter::Guard
        | Filter::GuardRedirect
        | Filter::XdpFloor
        | Filter::TcxFloor
        | Filter::RedirectFloor => Vec::new(),
        Filter::NftNetdev => nft("netdev", "ingress device guest", ""),
        Filter::NftForward => nft("ip", "forward", ""),
        Filter::NftForwardConntrack => nft("ip", "forward", "ct state established,related accept"),
        Filter::IptablesIpset => {
            let words = |text: &str| text.split(' ').map(str::to_owned).collect();
            vec![
                ("ipset", words("create peers hash:ip,port")),
                (
                    "ipset",
                    words(&format!("add peers {CONSUMER},udp:{CONSUMER_PORT}")),
                ),
                ("iptables", words("-P FORWARD DROP")),
                (
                    "iptables",
                    words(&format!(
                        "-A FORWARD -i guest -s {GUEST} -m mac --mac-source {GUEST_MAC} \
                         -m set --match-set peers dst,dst -j ACCEPT"
                    )),
                ),
            ]
        }
    }
}
