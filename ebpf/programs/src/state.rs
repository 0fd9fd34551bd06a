//! The guard's maps. Each guard has its own set; userspace pins them beside the links.

use aya_ebpf::{
    bindings::{BPF_F_INNER_MAP, BPF_F_MMAPABLE},
    btf_maps::{self, ArrayOfMaps},
    helpers::{bpf_get_prandom_u32, bpf_ktime_get_ns},
    macros::{btf_map, map},
    maps::{Array, LruHashMap},
};
use omerta_verdict::{Bucket, Flow, Guard, Policy};

/// The generation of the policy: its lowest bit names the slot in force. Written last in a
/// commit, one aligned word, so that a program sees the old policy or the new one, never a mix.
#[map]
static GENERATION: Array<u64> = Array::with_max_entries(1, 0);

/// Two slots, of which one is in force.
#[map]
static POLICY: Array<Policy> = Array::with_max_entries(2, 0);

/// The bank of the allowlist that belongs to each slot. Userspace makes a bank of the size that
/// the allowlist needs for each commit; this one is the pattern that the kernel holds it to.
#[btf_map]
static RULES: ArrayOfMaps<btf_maps::Array<Bucket, 1, BANK_FLAGS>, 2> = ArrayOfMaps::new();

/// A bank is mapped by userspace, so it starts at a page and each bucket is one cache line; and
/// its size is its own, not the pattern's.
const BANK_FLAGS: usize = (BPF_F_MMAPABLE | BPF_F_INNER_MAP) as usize;

/// Conntrack mode: when each flow was last seen, nanoseconds of `CLOCK_MONOTONIC`. The least
/// recently used gives way, so one guest's flood evicts its own flows only. Userspace sets the
/// size at load.
#[map]
static FLOWS: LruHashMap<Flow, u64> = LruHashMap::with_max_entries(1, 0);

const SECOND_NS: u64 = 1_000_000_000;
/// RFC 4787, REQ-5 asks for two minutes or more for UDP; WireGuard rekeys within them.
const UDP_TIMEOUT_NS: u64 = 180 * SECOND_NS;
const ICMP_TIMEOUT_NS: u64 = 60 * SECOND_NS;
/// RFC 5382, REQ-5: two hours and four minutes.
const TCP_TIMEOUT_NS: u64 = 7440 * SECOND_NS;

/// The policy and allowlist of one generation, chosen once per frame.
pub struct KernelGuard {
    slot: Option<u32>,
}

impl KernelGuard {
    #[inline(always)]
    pub fn read() -> Self {
        // SAFETY: an array map's element lives as long as the map; this is one aligned load.
        let slot = GENERATION
            .get_ptr(0)
            .map(|word| unsafe { word.read_volatile() } as u32 & 1);
        Self { slot }
    }
}

impl Guard for KernelGuard {
    #[inline(always)]
    fn policy(&self) -> Option<&Policy> {
        POLICY.get(self.slot?)
    }

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<&Bucket> {
        RULES.get_value(self.slot?, &index)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes no arguments and has no preconditions.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn open_flow(&self, flow: &Flow) -> bool {
        FLOWS.insert(flow, now(), 0).is_ok()
    }

    #[inline(always)]
    fn flow_is_live(&self, flow: &Flow) -> bool {
        let timeout = match flow.protocol {
            6 => TCP_TIMEOUT_NS,
            17 => UDP_TIMEOUT_NS,
            _ => ICMP_TIMEOUT_NS,
        };
        // SAFETY: the value is one aligned word that other CPUs replace whole.
        match unsafe { FLOWS.get(flow) } {
            Some(seen) => now().wrapping_sub(*seen) < timeout,
            None => false,
        }
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes no arguments and has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}
