//! What a guard is asked to be, and whether it can be.

use std::net::IpAddr;

use omerta_verdict::{Address, Endpoint, MAX_ADDRESSES, Mac, Mode, Policy};

use crate::{GuardError, Owner, interface};

/// One frame in this many is judged against the allowlist in sampled mode.
const SAMPLE_EVERY: u32 = 16;

/// Whose interface it is and whom its guest may reach.
#[derive(Clone, Debug)]
pub struct GuardConfig {
    /// The guest's MAC.
    pub mac: Mac,
    /// The guest's addresses: one to eight.
    pub addresses: Vec<IpAddr>,
    /// At most one gateway for each family.
    pub gateways: Vec<IpAddr>,
    /// Where the guest's IP frames must go; `None` for the interface's own MAC.
    pub gateway_mac: Option<Mac>,
    /// How frames are judged.
    pub mode: Mode,
    /// The allowlist.
    pub allow: Vec<Endpoint>,
    /// Who alone may change and remove the guard; `None` for everybody.
    pub owner: Option<Owner>,
}

impl GuardConfig {
    /// The policy of a guard of `interface`, checked; its epoch and allowlist are still to come.
    pub fn policy(&self, interface: &str) -> Result<Policy, GuardError> {
        let refuse = |problem: String| Err(GuardError::Config { problem });
        if !self.mac.is_unicast() {
            return refuse(format!(
                "{} is not a unicast MAC: a guest's MAC must be",
                self.mac
            ));
        }
        let gateway_mac = match self.gateway_mac {
            Some(mac) => mac,
            None => interface::mac(interface)?,
        };
        if !gateway_mac.is_unicast() || gateway_mac == self.mac {
            return refuse(format!(
                "{gateway_mac} cannot be the gateway's MAC: give a unicast MAC other than the guest's"
            ));
        }
        let count = self.addresses.len();
        if count == 0 || count > MAX_ADDRESSES {
            return refuse(format!(
                "a guest owns 1 to {MAX_ADDRESSES} addresses, not {count}"
            ));
        }
        let mut policy = Policy {
            mode: self.mode as u32,
            sample_every: SAMPLE_EVERY,
            mac: self.mac,
            gateway_mac,
            ..Policy::EMPTY
        };
        for (index, address) in self.addresses.iter().enumerate() {
            let owned = Address::from(*address);
            let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
            if mapped || !owned.is_possible_peer() {
                return refuse(format!(
                    "{address} cannot be a guest's address: give a unicast address"
                ));
            }
            if policy.addresses.contains(&owned) {
                return refuse(format!("the address {address} is given twice"));
            }
            policy.addresses[index] = owned;
        }
        for gateway in &self.gateways {
            let place = usize::from(gateway.is_ipv6());
            let address = Address::from(*gateway);
            let mapped = matches!(gateway, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
            if mapped || !address.is_possible_peer() || policy.owns(address) {
                return refuse(format!(
                    "{gateway} cannot be a gateway: give a unicast address that is not the guest's"
                ));
            }
            if !policy.gateways[place].is_unspecified() {
                return refuse(format!(
                    "a second gateway of one family: {gateway}; give one for each family"
                ));
            }
            policy.gateways[place] = address;
        }
        Ok(policy)
    }
}
