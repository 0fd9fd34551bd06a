//! At the host's uplink: drops what is for a guest and of none of its endpoints, before the stack sees it.
//! The judgement is the guard's own, of the state that the guard judges by, of the frame as it would
//! arrive at the tap. Only what the guard would drop for its endpoint is dropped here; all else goes on
//! and is judged at the tap. So where this program is not, or is mistaken in letting a frame go on,
//! nothing is open.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

use core::arch::asm;
use core::net::{IpAddr, Ipv4Addr};

use aya_ebpf::{
    bindings::BPF_F_MMAPABLE,
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    btf_maps::{self, ArrayOfMaps},
    macros::{btf_map, classifier, map, xdp},
    maps::{HashMap, PerCpuArray},
    programs::{TcContext, XdpContext},
};
use omerta_verdict::{
    Address, Bucket, Flow, Frame, Guard, INLINE_BUCKETS, Meter, Mode, PendingChecksum, Policy,
    Rate, Reason, Segments, Slot, State, Verdict, usual_ingress,
};

/// `TCX_NEXT`.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;
/// `PACKET_HOST`: sent to the interface's own MAC.
const TO_HOST: u32 = 0;
const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
/// Where the destination stands in an IPv4 header behind Ethernet's.
const DESTINATION: usize = ETHERNET + 16;

/// How many guests there may be. As in ebpf/dataplane/src/uplink.rs.
const PLACES: usize = 4096;

/// The place of the guest that has an address.
#[map]
static GUESTS: HashMap<Address, u32> = HashMap::with_max_entries(PLACES as u32, 0);

/// The `STATE` of the guest's guard, by place.
#[btf_map]
static STATES: ArrayOfMaps<btf_maps::Array<Words, 1, STATE_FLAGS>, PLACES> = ArrayOfMaps::new();

/// A state as the pattern names it: guards' are made without type information.
type Words = [u64; size_of::<State>() / size_of::<u64>()];
const STATE_FLAGS: usize = BPF_F_MMAPABLE as usize;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Count {
    packets: u64,
    bytes: u64,
}

/// What was dropped here, by place.
#[map]
static DROPPED: PerCpuArray<Count> = PerCpuArray::with_max_entries(PLACES as u32, 0);

/// MACs of the uplinks. Set at load; an interface whose MAC is changed later
/// has nothing dropped by XDP, which does not know what is for this host.
#[unsafe(no_mangle)]
static MACS: [[u8; 6]; MAC_PLACES] = [[0; 6]; MAC_PLACES];
/// As in ebpf/dataplane/src/uplink.rs.
const MAC_PLACES: usize = 8;

/// By TCX, where the stack has made a socket buffer of the frame.
#[classifier]
pub fn uplink_ingress(context: TcContext) -> i32 {
    // SAFETY: the context's socket buffer is valid for the whole run, and the verifier rewrites these
    // loads to the kernel's own fields.
    let (kind, tagged) = unsafe {
        (
            (*context.skb.skb).pkt_type,
            (*context.skb.skb).vlan_present != 0,
        )
    };
    let length = context.len();
    if kind != TO_HOST || tagged || !drops(context.data(), context.data_end(), length) {
        return NEXT;
    }
    SHOT
}

/// By XDP, in the interface's driver.
#[xdp]
pub fn uplink_xdp(context: XdpContext) -> u32 {
    let (start, end) = (context.data(), context.data_end());
    // A frame of which more is elsewhere does not reach programs that do not ask for such.
    if is_to_host(start, end) && drops(start, end, (end - start) as u32) {
        return XDP_DROP;
    }
    XDP_PASS
}

#[inline(always)]
fn is_to_host(start: usize, end: usize) -> bool {
    let Some(to) = bytes::<6>(start, end, 0) else {
        return false;
    };
    // Free places hold it, and no interface has it.
    if *to == [0; 6] {
        return false;
    }
    let mut place = 0;
    while place < MAC_PLACES {
        // SAFETY: the constant is this program's own; the read is volatile because the loader has
        // replaced the value that the compiler saw.
        let mac = unsafe { core::ptr::read_volatile(&raw const MACS[place]) };
        if mac == *to {
            return true;
        }
        place += 1;
    }
    false
}

/// Whether the frame is dropped here, which is then counted.
#[inline(always)]
fn drops(start: usize, end: usize, length: u32) -> bool {
    let Some(place) = refused(start, end, length) else {
        return false;
    };
    if let Some(count) = DROPPED.get_ptr_mut(place) {
        // SAFETY: the element is this CPU's own, and programs do not preempt one another on a CPU while
        // the network stack or a driver runs them (bottom halves are off).
        unsafe {
            (*count).packets += 1;
            (*count).bytes += length as u64;
        }
    }
    true
}

/// The place of the guest whose guard would drop the frame for its endpoint.
#[inline(always)]
fn refused(start: usize, end: usize, length: u32) -> Option<u32> {
    // Where loads may be reordered a policy that is being written could be taken for one in force.
    if cfg!(not(bpf_target_arch = "x86_64")) {
        return None;
    }
    if *bytes::<2>(start, end, ETHERNET - 2)? != IPV4 {
        return None;
    }
    let destination = Ipv4Addr::from(*bytes::<4>(start, end, DESTINATION)?);
    let address = Address::from(IpAddr::V4(destination));
    // SAFETY: the value is a word, which userspace writes whole.
    let place = unsafe { *GUESTS.get(address)? };
    let state: *const State = core::ptr::from_ref(STATES.get_value(place, &0)?).cast();
    // SAFETY: as long as a state and aligned as one (the map's value starts at a page); this is one
    // aligned load of it.
    let generation = unsafe { (&raw const (*state).generation).read_volatile() };
    keep_order();
    // SAFETY: the index is 0 or 1. Userspace may write the slot meanwhile: what is read are integers, of
    // which any is valid, and counts only where the generation is still the same.
    let slot = unsafe { &(*state).slots[(generation & 1) as usize] };
    let guard = TapsGuard::of(slot)?;
    let frame = AtTheTap::of((start, end), length, &slot.policy);
    let verdict = usual_ingress(&frame, &guard);
    keep_order();
    // SAFETY: as above.
    let holds = unsafe { (&raw const (*state).generation).read_volatile() } == generation;
    (holds && matches!(verdict, Some(Verdict::Drop(Reason::Endpoint)))).then_some(place)
}

/// Keeps the loads before it before those after it, as in the guard's programs: x86 does so by itself, the
/// compiler is told.
#[inline(always)]
fn keep_order() {
    // SAFETY: no instruction at all.
    unsafe { asm!("", options(nostack, preserves_flags)) }
}

#[inline(always)]
fn bytes<'a, const N: usize>(start: usize, end: usize, offset: usize) -> Option<&'a [u8; N]> {
    let from = start + offset;
    if from + N > end {
        return None;
    }
    // SAFETY: the linear part holds `N` bytes at `from` (just compared, and proven again by the
    // verifier), to which nothing writes while the program runs.
    Some(unsafe { &*(from as *const [u8; N]) })
}

/// A frame at the uplink as the host's stack would send it to the guest: with the link's header of the
/// tap. The host has put segments together that it takes apart again on the way, and has checked and
/// will write what sums it has to, so nothing is pending that a peer has chosen.
struct AtTheTap {
    ethernet: [u8; ETHERNET],
    start: usize,
    end: usize,
    length: u32,
}

impl AtTheTap {
    #[inline(always)]
    fn of((start, end): (usize, usize), length: u32, policy: &Policy) -> Self {
        let (to, from) = (policy.mac.0, policy.gateway_mac.0);
        Self {
            ethernet: [
                to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3],
                from[4], from[5], IPV4[0], IPV4[1],
            ],
            start,
            end,
            length,
        }
    }
}

impl Frame for AtTheTap {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.length
    }

    #[inline(always)]
    fn mtu(&self) -> u32 {
        u32::MAX
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        false
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn is_cut_into(&self, _kind: Segments) -> bool {
        false
    }

    #[inline(always)]
    fn pending_checksum(&self) -> Option<PendingChecksum> {
        None
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        match self.ethernet.get(offset..) {
            Some(rest) if offset + N <= ETHERNET => rest.first_chunk(),
            _ => bytes(self.start, self.end, offset),
        }
    }
}

/// The guard of the tap, as far as the allowlist goes: one that judges every frame by a list that stands
/// beside its policy. Leases, rates and flows are left to the tap.
struct TapsGuard<'a> {
    policy: &'a Policy,
    buckets: &'a [Bucket; INLINE_BUCKETS],
}

impl<'a> TapsGuard<'a> {
    #[inline(always)]
    fn of(Slot { policy, buckets }: &'a Slot) -> Option<Self> {
        let judges_all =
            policy.mode == Mode::Filtered as u32 || policy.mode == Mode::Conntrack as u32;
        (judges_all && policy.table_mask < INLINE_BUCKETS as u32)
            .then_some(Self { policy, buckets })
    }
}

impl Guard for TapsGuard<'_> {
    #[inline(always)]
    fn policy(&self) -> Option<&Policy> {
        Some(self.policy)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        let mut place = index as u64;
        // The compiler may know the bound and leave the mask out; the verifier, which does not, is shown it.
        // SAFETY: arithmetic on the function's own variable, which is then less than the mask's next.
        unsafe {
            asm!("{0} &= {1}", inout(reg) place, const INLINE_BUCKETS - 1,
                options(pure, nomem, nostack, preserves_flags));
            Some(self.buckets.get_unchecked(place as usize))
        }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        0
    }

    #[inline(always)]
    fn lease_until(&self) -> u64 {
        0
    }

    #[inline(always)]
    fn take(&self, _meter: Meter, _rate: Rate, _units: u32) -> bool {
        true
    }

    #[inline(always)]
    fn put_back(&self, _meter: Meter, _rate: Rate, _units: u32) {}

    #[inline(always)]
    fn open_flow(&self, _flow: &Flow) -> bool {
        false
    }

    #[inline(always)]
    fn flow_seen(&self, _flow: &Flow) -> Option<u64> {
        None
    }

    #[inline(always)]
    fn note_sent(&self, _flow: &Flow) {}

    #[inline(always)]
    fn last_sent(&self, _flow: &Flow) -> Option<u64> {
        None
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
