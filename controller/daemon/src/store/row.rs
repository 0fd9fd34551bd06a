//! What is kept of one guest.

use std::net::SocketAddr;
use std::path::PathBuf;

use omerta_engine::GuestId;
use omerta_vm_launcher::Traces;
use rusqlite::{Connection, OptionalExtension, params};

use super::StoreError;

/// How far a guest has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It has a row, and nothing else.
    Admitted,
    /// Its user is known; its process may exist.
    Launching,
    /// Its process and its tap are known.
    Launched,
    /// Its guard is known, and it may run.
    Guarded,
    /// It runs: whoever finds it takes it over.
    Running,
    /// It is to be gone.
    Ending,
}

/// How a guest that runs stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stands {
    Running,
    Held,
    Suspended,
    Stopping,
}

macro_rules! words {
    ($name:ident: $($variant:ident = $word:literal),+ $(,)?) => {
        impl $name {
            pub(crate) const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            pub(super) fn of(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

words!(Step: Admitted = "admitted", Launching = "launching", Launched = "launched",
    Guarded = "guarded", Running = "running", Ending = "ending");
words!(Stands: Running = "running", Held = "held", Suspended = "suspended", Stopping = "stopping");

/// What was asked for and given: the same for all of a guest's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Grant {
    pub(crate) id: GuestId,
    pub(crate) name: String,
    /// The API's request, in JSON.
    pub(crate) request: String,
    pub(crate) slot: u32,
    pub(crate) accel: String,
    pub(crate) machine: String,
    pub(crate) run_dir: String,
    pub(crate) boot: String,
    /// What its consumer is known by, if by name. It may change: see [`Change::ConsumerName`].
    pub(crate) consumer_name: Option<String>,
}

/// What was seen of a guest since it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) stands: Stands,
    pub(crate) resumed_at: Option<u64>,
    pub(crate) ends_at: Option<u64>,
    pub(crate) stop_by: Option<u64>,
    pub(crate) public_key: Option<String>,
    pub(crate) handshake: bool,
    /// Where its consumer is, was, or is about to be, latest first, where it has moved.
    pub(crate) endpoints: Vec<SocketAddr>,
}

/// All that is kept of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) grant: Grant,
    pub(crate) step: Step,
    pub(crate) traces: Traces,
    pub(crate) seen: Seen,
}

/// A change of a row.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// The guest is admitted.
    Admit(Box<Grant>),
    /// It has come so far, and has left these traces.
    Reach(GuestId, Step, Traces),
    /// It runs since then, and may until then.
    Run {
        id: GuestId,
        resumed_at: u64,
        ends_at: Option<u64>,
    },
    /// It stands so; where it is stopping, it has until then.
    Stand(GuestId, Stands, Option<u64>),
    /// It has told its key, or forgotten it.
    Key(GuestId, Option<String>),
    /// It has told of a handshake.
    Handshake(GuestId),
    /// Its agent has come, and proves its answers with this.
    Agent(GuestId, [u8; 32]),
    /// Its consumer is about to be at the first of these, and was at the others.
    Endpoints(GuestId, Vec<SocketAddr>),
    /// Its consumer is known by this name from now on, or by none.
    ConsumerName(GuestId, Option<String>),
    /// It is to be gone.
    End(GuestId),
    /// Nothing is left of it.
    Remove(GuestId),
}

/// Makes one change, in one transaction.
pub(super) fn apply(connection: &Connection, change: Change) -> Result<(), StoreError> {
    let changed = match change {
        Change::Admit(grant) => connection.execute(
            "INSERT INTO guests (id, name, request, slot, accel, machine, run_dir, boot, consumer_name, step)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'admitted')",
            params![
                number(grant.id.0)?,
                grant.name,
                grant.request,
                grant.slot,
                grant.accel,
                grant.machine,
                grant.run_dir,
                grant.boot,
                grant.consumer_name,
            ],
        )?,
        Change::Reach(id, step, traces) => connection.execute(
            "UPDATE guests SET step = ?2, uid = ?3, pid = ?4, pid_start = ?5, tap = ?6,
             guard_egress = ?7, guard_ingress = ?8, cgroups = ?9 WHERE id = ?1",
            params![
                number(id.0)?,
                step.word(),
                traces.uid,
                traces.process.map(|(pid, _)| pid),
                traces.process.map(|(_, start)| number(start)).transpose()?,
                traces.tap,
                traces.guard.map(|[egress, _]| egress),
                traces.guard.map(|[_, ingress]| ingress),
                traces.cgroups.map(|all| text_of(&all)).transpose()?,
            ],
        )?,
        Change::Run {
            id,
            resumed_at,
            ends_at,
        } => connection.execute(
            "UPDATE guests SET step = 'running', resumed_at = ?2, ends_at = ?3 WHERE id = ?1",
            params![
                number(id.0)?,
                number(resumed_at)?,
                ends_at.map(number).transpose()?
            ],
        )?,
        Change::Stand(id, stands, stop_by) => connection.execute(
            "UPDATE guests SET stands = ?2, stop_by = ?3 WHERE id = ?1",
            params![
                number(id.0)?,
                stands.word(),
                stop_by.map(number).transpose()?
            ],
        )?,
        Change::Key(id, key) => connection.execute(
            "UPDATE guests SET public_key = ?2, handshake = 0 WHERE id = ?1",
            params![number(id.0)?, key],
        )?,
        Change::Handshake(id) => connection.execute(
            "UPDATE guests SET handshake = 1 WHERE id = ?1",
            params![number(id.0)?],
        )?,
        Change::Agent(id, key) => connection.execute(
            "UPDATE guests SET agent_key = ?2 WHERE id = ?1",
            params![number(id.0)?, key],
        )?,
        Change::Endpoints(id, endpoints) => connection.execute(
            "UPDATE guests SET endpoints = ?2 WHERE id = ?1",
            params![
                number(id.0)?,
                serde_json::to_string(&endpoints)
                    .map_err(|_| StoreError::Nonsense("a list of endpoints"))?
            ],
        )?,
        Change::ConsumerName(id, name) => connection.execute(
            "UPDATE guests SET consumer_name = ?2 WHERE id = ?1",
            params![number(id.0)?, name],
        )?,
        Change::End(id) => connection.execute(
            "UPDATE guests SET step = 'ending' WHERE id = ?1",
            params![number(id.0)?],
        )?,
        // That it is gone already changes nothing.
        Change::Remove(id) => {
            connection.execute("DELETE FROM guests WHERE id = ?1", params![number(id.0)?])?;
            1
        }
    };
    if changed == 1 {
        Ok(())
    } else {
        Err(StoreError::NoRow)
    }
}

/// The first id that no guest has had.
pub(super) fn first_free(connection: &Connection) -> Result<GuestId, StoreError> {
    let last: Option<i64> = connection
        .query_row(
            "SELECT seq FROM sqlite_sequence WHERE name = 'guests'",
            [],
            |row| row.get(0),
        )
        .optional()?;
    let last = last
        .map(u64::try_from)
        .transpose()
        .map_err(|_| StoreError::Nonsense("an id"))?;
    Ok(GuestId(last.unwrap_or(0) + 1))
}

/// Paths as JSON; the kernel lets names of cgroups be anything.
fn text_of(paths: &[PathBuf]) -> Result<String, StoreError> {
    serde_json::to_string(paths).map_err(|_| StoreError::Nonsense("a cgroup that is no text"))
}

/// SQLite's numbers have a sign.
fn number(number: u64) -> Result<i64, StoreError> {
    i64::try_from(number).map_err(|_| StoreError::Nonsense("a number beyond 63 bits"))
}
