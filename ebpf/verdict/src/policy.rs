//! A guard's policy: whose tap it is and how frames are judged.

use core::fmt;
use core::str::FromStr;

use crate::{Address, Mac, Meter, Rate};

/// How many addresses a guest may own.
pub const MAX_ADDRESSES: usize = 8;
/// One gateway for each family: IPv4, then IPv6.
pub const MAX_GATEWAYS: usize = 2;

/// How much of the allowlist's judgement a frame gets. Source and shape are judged in every mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u32)]
pub enum Mode {
    /// Every frame against the allowlist, in both directions.
    #[default]
    Filtered = 1,
    /// As filtered, and what comes in must belong to a flow that the guest opened.
    Conntrack = 2,
    /// The allowlist on a random one of every [`Policy::sample_every`] frames.
    Sampled = 3,
    /// Source and shape only; any unicast peer.
    Direct = 4,
}

impl Mode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Filtered, Self::Conntrack, Self::Sampled, Self::Direct];

    /// The word used in flags, JSON and documents.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Filtered => "filtered",
            Self::Conntrack => "conntrack",
            Self::Sampled => "sampled",
            Self::Direct => "direct",
        }
    }

    /// The mode whose discriminant is `number`.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Filtered),
            2 => Some(Self::Conntrack),
            3 => Some(Self::Sampled),
            4 => Some(Self::Direct),
            _ => None,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for Mode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.word() == text)
            .ok_or("the mode must be filtered, conntrack, sampled or direct")
    }
}

/// The map value that the programs read. All zero is a policy that drops everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Policy {
    /// The version of the policy, raised by one with each change.
    pub epoch: u64,
    /// Seed of the allowlist's hash.
    pub table_seed: u64,
    /// Number of buckets in the allowlist less one; the number is a power of two.
    pub table_mask: u32,
    /// A [`Mode`]; any other number drops everything.
    pub mode: u32,
    /// Sampled mode: one in this many frames is judged against the allowlist; 0 is taken as 1.
    pub sample_every: u32,
    /// Zero.
    pub reserved: u32,
    /// The guest's addresses; unused places are [`Address::UNSPECIFIED`].
    pub addresses: [Address; MAX_ADDRESSES],
    /// The gateway of each family (IPv4, IPv6), or [`Address::UNSPECIFIED`].
    pub gateways: [Address; MAX_GATEWAYS],
    /// How much of what each [`Meter`] counts is let through, by its index.
    pub rates: [Rate; Meter::COUNT],
    /// What the rates were made of, to be shown: for each direction frames and bits a second; 0 is
    /// without limit. No program reads it.
    pub limits: [[u64; 2]; 2],
    /// The guest's MAC.
    pub mac: Mac,
    /// Zero, as all padding here: each MAC starts at a word, and the allowlist behind the policy at
    /// a cache line.
    pub padding: [u8; 2],
    /// Where the guest's IP frames must go, and who answers for the gateway.
    pub gateway_mac: Mac,
    /// Zero.
    pub padding_too: [u8; 2],
}

impl Policy {
    /// A policy that drops everything.
    pub const EMPTY: Self = Self {
        epoch: 0,
        table_seed: 0,
        table_mask: 0,
        mode: 0,
        sample_every: 0,
        reserved: 0,
        addresses: [Address::UNSPECIFIED; MAX_ADDRESSES],
        gateways: [Address::UNSPECIFIED; MAX_GATEWAYS],
        rates: [Rate::UNLIMITED; Meter::COUNT],
        limits: [[0; 2]; 2],
        mac: Mac([0; 6]),
        padding: [0; 2],
        gateway_mac: Mac([0; 6]),
        padding_too: [0; 2],
    };

    /// Whether the guest owns `address`. Nobody owns the unspecified address.
    #[inline(always)]
    pub fn owns(&self, address: Address) -> bool {
        if address.is_unspecified() {
            return false;
        }
        let mut index = 0;
        while index < MAX_ADDRESSES {
            if self.addresses[index].equals(address) {
                return true;
            }
            index += 1;
        }
        false
    }

    /// Whether `address` is the gateway of its family.
    #[inline(always)]
    pub fn is_gateway(&self, address: Address) -> bool {
        !address.is_unspecified()
            && (self.gateways[0].equals(address) || self.gateways[1].equals(address))
    }
}
