//! Edits of the allowlist in force. One that changes nothing keeps the epoch.

use omerta_verdict::{Endpoint, Policy, Table};

use crate::rules::refuse_unreachable;
use crate::{GuardError, PolicyStore, buckets};

/// A list up to this long is freed of what it names twice before its table's size is chosen; in a longer
/// one that shows as it is filled.
const SHORT: usize = 1024;

/// Each returns the epoch in force. Callers hold the guard's lock.
impl PolicyStore {
    /// Adds `endpoints`.
    pub(crate) fn allow(&mut self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        let listed = self.listed()?;
        let mut new: Vec<_> = endpoints
            .iter()
            .filter(|e| !listed.holds(e))
            .copied()
            .collect();
        if new.is_empty() {
            return Ok(listed.policy().epoch);
        }
        refuse_unreachable(self.interface(), listed.policy(), &new)?;
        new.sort_unstable();
        new.dedup();
        let length = buckets::count(listed.buckets()) + new.len();
        self.commit_each(*listed.policy(), length, || {
            Table::endpoints(listed.buckets()).chain(new.iter().copied())
        })
    }

    /// Removes `endpoints`, all or none.
    pub(crate) fn revoke(&mut self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        let listed = self.listed()?;
        if let Some(endpoint) = endpoints.iter().find(|e| !listed.holds(e)) {
            return Err(GuardError::NotListed {
                interface: self.interface().to_owned(),
                endpoint: endpoint.to_string(),
            });
        }
        if endpoints.is_empty() {
            return Ok(listed.policy().epoch);
        }
        let mut gone = endpoints.to_vec();
        gone.sort_unstable();
        gone.dedup();
        let length = buckets::count(listed.buckets()) - gone.len();
        self.commit_each(*listed.policy(), length, || {
            Table::endpoints(listed.buckets()).filter(|e| gone.binary_search(e).is_err())
        })
    }

    /// Puts `endpoints` in place of all that are listed.
    pub(crate) fn replace(&mut self, endpoints: &[Endpoint]) -> Result<u64, GuardError> {
        let listed = self.listed()?;
        let policy = *listed.policy();
        if buckets::hold_exactly(
            listed.buckets(),
            policy.table_seed,
            endpoints.iter().copied(),
        ) {
            return Ok(policy.epoch);
        }
        refuse_unreachable(self.interface(), &policy, endpoints)?;
        if endpoints.len() > SHORT {
            return self.commit(policy, endpoints);
        }
        let mut endpoints = endpoints.to_vec();
        endpoints.sort_unstable();
        endpoints.dedup();
        self.commit(policy, &endpoints)
    }

    /// Puts `policy` in force with the endpoints that are listed.
    pub(crate) fn amend(&mut self, policy: Policy) -> Result<u64, GuardError> {
        let listed = self.listed()?;
        let length = buckets::count(listed.buckets());
        self.commit_each(policy, length, || Table::endpoints(listed.buckets()))
    }
}
