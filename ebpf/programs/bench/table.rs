//! Looks random keys up in the guard's allowlist, in a hash and in a trie: one program each, and one
//! that makes the keys alone. A run looks up [`LOOKUPS`] keys and returns how many were found.
//! Beside them, the egress program in steps.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features, reason = "compare-and-swap, order of loads")]
#![allow(
    dead_code,
    reason = "the guard's own modules, of which a part is measured"
)]

#[path = "../src/accounting.rs"]
mod accounting;
#[path = "../src/buffer.rs"]
mod buffer;
#[path = "../src/diagnostics.rs"]
mod diagnostics;
#[path = "../src/flows.rs"]
mod flows;
#[path = "../src/state.rs"]
mod state;
mod steps;

use aya_ebpf::{
    macros::{classifier, map},
    maps::{
        Array, HashMap,
        lpm_trie::{Key, LpmTrie},
    },
    programs::TcContext,
};
use omerta_verdict::{Address, Guard, Protocol};

use crate::state::KernelGuard;

/// As in tests/bench/src/table.rs.
const LOOKUPS: i32 = 64;
const PORT: u16 = 51820;
/// What an IPv4 address becomes as a word (RFC 4291, 2.5.5.2).
const MAPPED_PREFIX: u64 = 0xffff_0000_0000;

/// An address in four words and protocol << 16 | port: what the guard's table holds of a rule.
type Words = [u32; 5];
const BITS: u32 = 8 * size_of::<Words>() as u32;

/// On the stack, where the verifier wants each store aligned.
#[repr(C, align(8))]
struct Aligned<T>(T);

/// How many keys there are. Set at load.
#[unsafe(no_mangle)]
static ENTRIES: u32 = 1;

/// Where the sequence of random numbers stands.
#[map]
static RANDOM: Array<u64> = Array::with_max_entries(1, 0);

#[map]
static HASH: HashMap<Words, u32> = HashMap::with_max_entries(1, 0);

#[map]
static TRIE: LpmTrie<Words, u32> = LpmTrie::with_max_entries(1, 0);

/// Counts the random keys that `is_found` finds.
#[inline(always)]
fn count(is_found: impl Fn(u32) -> bool) -> i32 {
    let Some(random) = RANDOM.get_ptr_mut(0) else {
        return -1;
    };
    // SAFETY: the constant is this program's own; the loader may have replaced the value.
    let entries = unsafe { core::ptr::read_volatile(&raw const ENTRIES) };
    // SAFETY: an array map's element lives as long as the map, and one program runs at a time.
    let mut state = unsafe { *random };
    let (mut found, mut turn) = (0, 0);
    while turn < LOOKUPS {
        // xorshift64 (Marsaglia 2003).
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let index = ((state >> 32) * entries as u64) >> 32;
        // The keys lie about as endpoints of many networks do; an odd factor keeps them apart.
        let address = (index as u32).wrapping_mul(0x9e37_79b1);
        if is_found(address) {
            found += 1;
        }
        turn += 1;
    }
    // SAFETY: as above.
    unsafe { *random = state };
    found
}

#[inline(always)]
fn words(address: u32) -> Words {
    [
        0,
        0,
        0xffff,
        address,
        (Protocol::Udp as u32) << 16 | PORT as u32,
    ]
}

/// Makes the keys.
#[classifier]
pub fn keys(_context: TcContext) -> i32 {
    // No key has this address, which the compiler does not know.
    count(|address| address != u32::MAX)
}

/// Looks them up as the guard's programs do.
#[classifier]
pub fn guard(_context: TcContext) -> i32 {
    let Some(guard) = KernelGuard::read(0) else {
        return -1;
    };
    let Some(policy) = guard.policy() else {
        return -1;
    };
    count(|address| {
        let address = Address::from_words(0, MAPPED_PREFIX | address as u64);
        guard.lists(policy, Protocol::Udp, address, PORT)
    })
}

/// Reads one word of a random bucket of the guard's table: the least that a lookup can cost.
#[classifier]
pub fn floor(_context: TcContext) -> i32 {
    let Some(guard) = KernelGuard::read(0) else {
        return -1;
    };
    let Some(policy) = guard.policy() else {
        return -1;
    };
    let mask = policy.table_mask;
    count(|address| {
        let Some(bucket) = guard.bucket(address & mask) else {
            return false;
        };
        // SAFETY: a bucket begins with an aligned word.
        let word = unsafe { core::ptr::from_ref(bucket).cast::<u64>().read_volatile() };
        // No address has this upper half, which the compiler does not know.
        word != u64::MAX
    })
}

/// Looks them up in a hash.
#[classifier]
pub fn hash(_context: TcContext) -> i32 {
    count(|address| {
        let Aligned(key) = &Aligned(words(address));
        // SAFETY: nobody changes the map while programs run.
        unsafe { HASH.get(key) }.is_some()
    })
}

/// Looks them up in a trie of longest prefixes.
#[classifier]
pub fn trie(_context: TcContext) -> i32 {
    count(|address| {
        let key = Aligned(Key::new(BITS, words(address)));
        TRIE.get(&key.0).is_some()
    })
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
