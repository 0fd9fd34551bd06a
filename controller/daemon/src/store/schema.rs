//! The versions of the database, and the way from each to the last.

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;

/// Each takes the database from the version of its place to the next. What was released is never changed.
pub(super) const MIGRATIONS: [&str; 6] = [
    include_str!("migrations/0001_guests.sql"),
    include_str!("migrations/0002_observed.sql"),
    include_str!("migrations/0003_cgroups.sql"),
    include_str!("migrations/0004_agent.sql"),
    include_str!("migrations/0005_endpoints.sql"),
    include_str!("migrations/0006_consumer_name.sql"),
];

/// Brings the database to the last version: each step whole or not at all, whenever this is killed.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let last = MIGRATIONS.len();
    loop {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let found: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let version = usize::try_from(found).unwrap_or(usize::MAX);
        if version == last {
            return Ok(());
        }
        let Some(step) = MIGRATIONS.get(version) else {
            return Err(StoreError::Newer { found, last });
        };
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "user_version", found + 1)?;
        transaction.commit()?;
    }
}
