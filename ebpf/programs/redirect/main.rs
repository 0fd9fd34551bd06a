//! The way past the host's stack for what the guard has allowed: a program behind the guard on the
//! tap's ingress hook, which looks the next hop up as the kernel's forwarding does and hands the frame to
//! its interface. It judges nothing, and sends no frame of which it has no proof that the guard of
//! this interface allowed it. What it does not send, for whatever reason, goes on to the stack as if the
//! program were not there.
#![no_std]
#![no_main]

use aya_ebpf::{
    bindings::{__sk_buff, bpf_fib_lookup as FibLookup, bpf_redir_neigh},
    helpers::{bpf_fib_lookup, bpf_jiffies64, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer},
    macros::{classifier, map},
    maps::PerCpuArray,
    programs::TcContext,
};
use omerta_verdict::{COUNTER_ROWS, DIRECTION_COUNTERS, Direction, OWN_ANSWERS_COUNTER, Outcome};

/// `TCX_NEXT`.
const NEXT: i32 = -1;
const AF_INET: u8 = 2;
/// `PACKET_HOST`: sent to the interface's own MAC.
const TO_HOST: u32 = 0;
const ETHERNET: usize = 14;
const IPV4: usize = 20;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_HEADER: usize = 20;
const UDP_HEADER: u32 = 8;
/// Bits of the type of service that have the stack give the frame another priority
/// (`ip_tos2prio` in net/ipv4/route.c).
const PRIORITY: u8 = 0x1c;
/// Once in two to the power of this many ticks (0.26 to 2.6 s) a frame goes by way of the neighbour
/// table, which so learns that its entry is used and asks the neighbour again in time. All others get
/// the MAC that the route's lookup found there.
const REFRESH_TICKS: u32 = 8;
/// Interfaces whose peers are handed frames at once.
const PEER_PLACES: usize = 8;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Count {
    packets: u64,
    bytes: u64,
}

/// The guard's own counters, which it pinned.
#[map]
static COUNTERS: PerCpuArray<[Count; DIRECTION_COUNTERS]> =
    PerCpuArray::with_max_entries(COUNTER_ROWS as u32, 0);

/// What this program keeps on each CPU.
#[repr(C)]
pub struct Row {
    /// What the guard had allowed when this program ran last.
    seen: Count,
    /// How many of the guard's own answers had come by.
    answers: u64,
    /// To whom a frame was last sent by way of the neighbour table, and when: [`is_fresh`].
    refreshed: u64,
    /// By [`Way`].
    ways: [Count; 4],
}

#[map]
static REDIRECTED: PerCpuArray<Row> = PerCpuArray::with_max_entries(1, 0);

/// The way that this CPU found last, which holds for frames like the one it was asked for, until the
/// kernel's next tick: so a change of routes, rules or neighbours is followed within 1 to 10 ms, and a stream
/// asks once a tick, not for every frame.
#[repr(C)]
pub struct Found {
    /// All that the lookup goes by but the length: [`Found::question`].
    question: [u64; 3],
    /// `jiffies`; 0 is never.
    tick: u64,
    /// The longest packet that may go.
    largest: u32,
    ifindex: u32,
    next_hop: u32,
    destination: [u8; 6],
    source: [u8; 6],
}

#[map]
static FOUND: PerCpuArray<Found> = PerCpuArray::with_max_entries(1, 0);

/// What became of a frame. As in ebpf/dataplane/src/redirect.rs.
#[derive(Clone, Copy)]
enum Way {
    /// Sent by an interface, to a neighbour.
    Neighbour = 0,
    /// Handed to the peer of a veth in another network namespace.
    Peer = 1,
    /// Left to the stack.
    Stack = 2,
    /// Left to the stack, since it was not proven that the guard has allowed it.
    Unproven = 3,
}

/// Indices of veths of which the peers, in other network namespaces, are handed frames; 0 is none.
/// Set at load.
#[unsafe(no_mangle)]
static PEERS: [u32; PEER_PLACES] = [0; PEER_PLACES];

#[classifier]
pub fn guest_redirect(context: TcContext) -> i32 {
    let Some(row) = REDIRECTED.get_ptr_mut(0) else {
        return NEXT;
    };
    let length = context.len();
    match proof(row, length) {
        Proof::Allowed => match send(&context, row) {
            Some((way, action)) => take(row, way, length, action),
            None => take(row, Way::Stack, length, NEXT),
        },
        // For the stack, which asked, and nothing that the guest sent.
        Proof::OwnAnswer => NEXT,
        Proof::None => take(row, Way::Unproven, length, NEXT),
    }
}

#[inline(always)]
fn take(row: *mut Row, way: Way, length: u32, action: i32) -> i32 {
    // SAFETY: the element is this CPU's own, and programs do not preempt one another on a CPU while
    // the network stack runs them (bottom halves are off).
    unsafe {
        let count = &raw mut (*row).ways[way as usize];
        (*count).packets += 1;
        (*count).bytes += length as u64;
    }
    action
}

/// What the guard has done with this very frame, as far as that is proven.
enum Proof {
    Allowed,
    /// It is an answer of the guard's own on its way in.
    OwnAnswer,
    None,
}

/// The guard counts what it lets pass last of all, on this CPU, and the next frame of this interface is not
/// judged on this CPU before this program has run. So one frame more than when this program ran last,
/// of this frame's length, is this frame. Where the guard is cut off, exchanged or has expired nothing is
/// counted, and what another program behind the guard consumed makes the next frame one too many.
#[inline(always)]
fn proof(row: *mut Row, length: u32) -> Proof {
    let Some(counters) = COUNTERS.get_ptr(Direction::Egress as u32) else {
        return Proof::None;
    };
    // SAFETY: as in [`take`]; the guard's element is of this CPU, too.
    unsafe {
        let allowed = (*counters)[Outcome::Allowed.index()];
        let seen = (*row).seen;
        (*row).seen = allowed;
        if allowed.packets == seen.packets.wrapping_add(1)
            && allowed.bytes == seen.bytes.wrapping_add(length as u64)
        {
            return Proof::Allowed;
        }
        let answers = (*counters)[OWN_ANSWERS_COUNTER].packets;
        let seen = (*row).answers;
        (*row).answers = answers;
        if answers == seen.wrapping_add(1) {
            Proof::OwnAnswer
        } else {
            Proof::None
        }
    }
}

/// The `N` bytes at `offset` of a frame's linear part.
#[inline(always)]
fn bytes<const N: usize>(start: usize, end: usize, offset: usize) -> Option<[u8; N]> {
    if start + offset + N > end {
        return None;
    }
    // SAFETY: the part holds them (just compared, and proven again by the verifier).
    Some(unsafe { ((start + offset) as *const [u8; N]).read_unaligned() })
}

/// Whether the header's checksum is right. The stack drops what has a wrong one.
#[inline(always)]
fn is_sound(header: &[u8; IPV4]) -> bool {
    let mut sum = 0_u64;
    let mut at = 0;
    while at < IPV4 {
        sum +=
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as u64;
        at += 4;
    }
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum == 0xffff
}

/// Sends the frame; `None`, with the frame as it was, where that is for the stack to do.
#[inline(always)]
fn send(context: &TcContext, row: *mut Row) -> Option<(Way, i32)> {
    let skb = context.skb.skb;
    // SAFETY: the context is valid for the whole run; the verifier rewrites these loads.
    let (mark, kind, ifindex, cut_into, tag) = unsafe {
        (
            (*skb).mark,
            (*skb).pkt_type,
            (*skb).ifindex,
            (*skb).gso_size,
            (*skb).vlan_present,
        )
    };
    // A mark may choose another route; what is not sent to this interface is for a bridge.
    if mark != 0 || kind != TO_HOST || tag != 0 {
        return None;
    }
    let (start, end) = (context.data(), context.data_end());
    if bytes::<2>(start, end, 12)? != [0x08, 0x00] {
        return None;
    }
    let header = bytes::<IPV4>(start, end, ETHERNET)?;
    let total = u16::from_be_bytes([header[2], header[3]]) as u32;
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff;
    let (tos, ttl, protocol) = (header[1], header[8], header[9]);
    // Options are for the stack; so is padding behind the packet, which it cuts off, and a packet at the
    // end of its life, of which it tells the guest.
    if header[0] != 0x45
        || fragment != 0
        || ttl <= 1
        || tos & PRIORITY != 0
        || total + ETHERNET as u32 != context.len()
        || !is_sound(&header)
    {
        return None;
    }
    let mut ports = [0_u8; 4];
    if protocol == UDP || protocol == TCP {
        ports = bytes::<4>(start, end, ETHERNET + IPV4)?;
    } else if protocol != ICMP {
        return None;
    }
    let largest = match cut_into {
        0 => total,
        size => {
            let transport = match protocol {
                UDP => UDP_HEADER,
                TCP => {
                    let tcp = bytes::<TCP_HEADER>(start, end, ETHERNET + IPV4)?;
                    (tcp[12] >> 4) as u32 * 4
                }
                _ => return None,
            };
            IPV4 as u32 + transport + size
        }
    };
    if largest > u16::MAX as u32 {
        return None;
    }

    let found = FOUND.get_ptr_mut(0)?;
    let addresses = bytes::<8>(start, end, ETHERNET + 12)?;
    let question = [
        u64::from_ne_bytes(addresses),
        u32::from_ne_bytes(ports) as u64,
        (protocol as u64) << 8 | tos as u64,
    ];
    // SAFETY: the helper has no preconditions (on 64 bits it is no call).
    let tick = unsafe { bpf_jiffies64() };
    if !is_known(found, &question, tick, largest) {
        look_up(skb, found, ifindex, &header, ports, largest)?;
        // SAFETY: as in [`take`].
        unsafe {
            (*found).question = question;
            (*found).tick = tick;
        }
    }
    // SAFETY: as in [`take`].
    let (to, next_hop, destination, source) = unsafe {
        (
            (*found).ifindex,
            (*found).next_hop,
            (*found).destination,
            (*found).source,
        )
    };
    let checksum = [header[10], header[11]];
    if is_fresh(row, tick, to, next_hop) {
        forward(skb, ttl, checksum, Some((&destination, &source)))?;
        // SAFETY: the helpers have no preconditions.
        return Some(unsafe {
            if is_peer(to) {
                (Way::Peer, bpf_redirect_peer(to, 0) as i32)
            } else {
                (Way::Neighbour, bpf_redirect(to, 0) as i32)
            }
        });
    }
    forward(skb, ttl, checksum, None)?;
    // SAFETY: integers only; all zero is valid.
    let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    neighbour.nh_family = AF_INET as u32;
    neighbour.__bindgen_anon_1.ipv4_nh = next_hop;
    // SAFETY: the helper reads `neighbour`.
    let action = unsafe {
        bpf_redirect_neigh(
            to,
            &raw mut neighbour,
            size_of::<bpf_redir_neigh>() as i32,
            0,
        )
    };
    Some((Way::Neighbour, action as i32))
}

/// Whether `found` is the answer to `question`, found in this `tick`, for a packet as long as `largest`.
#[inline(always)]
fn is_known(found: *const Found, question: &[u64; 3], tick: u64, largest: u32) -> bool {
    // SAFETY: as in [`take`].
    unsafe {
        (*found).tick == tick
            && (*found).question[0] == question[0]
            && (*found).question[1] == question[1]
            && (*found).question[2] == question[2]
            && largest <= (*found).largest
    }
}

/// Asks the kernel for the way of a packet, of which the longest piece is `largest` bytes; `None` where the
/// stack has something to say to it.
#[inline(always)]
fn look_up(
    skb: *mut __sk_buff,
    found: *mut Found,
    ifindex: u32,
    header: &[u8; IPV4],
    ports: [u8; 4],
    largest: u32,
) -> Option<()> {
    // Nothing is known while it is written, and where nothing is found.
    // SAFETY: as in [`take`].
    unsafe { (*found).tick = 0 };
    // SAFETY: integers only; all zero is valid.
    let mut route: FibLookup = unsafe { core::mem::zeroed() };
    route.family = AF_INET;
    route.l4_protocol = header[9];
    let (source, destination) = (
        u16::from_ne_bytes([ports[0], ports[1]]),
        u16::from_ne_bytes([ports[2], ports[3]]),
    );
    // SAFETY: both are fields of `route`. Volatile, or the two become one store that is not aligned, which
    // verifiers refuse.
    unsafe {
        (&raw mut route.sport).write_volatile(source);
        (&raw mut route.dport).write_volatile(destination);
    }
    // Longer than the route's MTU fails: the stack then tells the guest.
    route.__bindgen_anon_1.tot_len = largest as u16;
    route.ifindex = ifindex;
    route.__bindgen_anon_2.tos = header[1];
    route.__bindgen_anon_3.ipv4_src =
        u32::from_ne_bytes([header[12], header[13], header[14], header[15]]);
    route.__bindgen_anon_4.ipv4_dst =
        u32::from_ne_bytes([header[16], header[17], header[18], header[19]]);
    // SAFETY: the context is valid for the whole run, and the helper writes within `route`.
    let answer =
        unsafe { bpf_fib_lookup(skb.cast(), &raw mut route, size_of::<FibLookup>() as i32, 0) };
    // Not forwarded, to the host itself, no neighbour yet, too long: all of it for the stack, and so is
    // what would leave as it came, of which the stack tells the guest.
    if answer != 0 || route.family != AF_INET || route.ifindex == ifindex {
        return None;
    }
    // SAFETY: as in [`take`]; every variant of the union is of integers.
    unsafe {
        (*found).largest = largest;
        (*found).ifindex = route.ifindex;
        (*found).next_hop = route.__bindgen_anon_4.ipv4_dst;
        (*found).destination = route.dmac;
        (*found).source = route.smac;
    }
    Some(())
}

/// Whether a frame to this neighbour has gone by way of the neighbour table of late. It does now where
/// not.
#[inline(always)]
fn is_fresh(row: *mut Row, tick: u64, ifindex: u32, next_hop: u32) -> bool {
    let period = tick >> REFRESH_TICKS;
    let word = period << 32 | (next_hop ^ ifindex) as u64;
    // SAFETY: as in [`take`].
    unsafe {
        let is_fresh = (*row).refreshed == word;
        (*row).refreshed = word;
        is_fresh
    }
}

#[inline(always)]
fn is_peer(ifindex: u32) -> bool {
    let mut place = 0;
    while place < PEER_PLACES {
        // SAFETY: the constant is this program's own; the read is volatile because the loader may have
        // replaced the value that the compiler saw.
        let peer = unsafe { (&raw const PEERS[place]).read_volatile() };
        if peer == 0 {
            return false;
        }
        if peer == ifindex {
            return true;
        }
        place += 1;
    }
    false
}

/// What forwarding changes in a frame: its time to live with the checksum (RFC 1624), and, where
/// nobody else does, its MACs. `None` where it cannot be written.
#[inline(always)]
fn forward(
    skb: *mut __sk_buff,
    ttl: u8,
    checksum: [u8; 2],
    macs: Option<(&[u8; 6], &[u8; 6])>,
) -> Option<()> {
    // SAFETY: the context is valid for the whole run.
    let (start, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    if start + ETHERNET + IPV4 > end {
        return None;
    }
    let sum = u16::from_be_bytes(checksum) as u32 + 0x0100;
    let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
    // SAFETY: the linear part holds both headers (just compared, and proven again by the verifier), and
    // the kernel made it this frame's own before the program ran.
    unsafe {
        if let Some((destination, source)) = macs {
            (start as *mut [u8; 6]).write_unaligned(*destination);
            ((start + 6) as *mut [u8; 6]).write_unaligned(*source);
        }
        ((start + ETHERNET + 8) as *mut u8).write(ttl - 1);
        ((start + ETHERNET + 10) as *mut [u8; 2]).write_unaligned(sum.to_be_bytes());
    }
    Some(())
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
