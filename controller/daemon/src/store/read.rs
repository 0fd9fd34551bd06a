//! Rows, read: one that cannot be is told as broken, with what of it can be.

use std::path::PathBuf;

use omerta_engine::GuestId;
use omerta_vm_launcher::Traces;
use rusqlite::types::FromSql;
use rusqlite::{Connection, Row};

use super::StoreError;
use super::row::{Grant, Kept, Seen, Stands, Step};

const COLUMNS: &str = "id, name, request, slot, accel, machine, run_dir, boot, step, uid, pid, \
     pid_start, cgroups, tap, guard_egress, guard_ingress, stands, resumed_at, ends_at, stop_by, public_key, handshake, agent_key, endpoints, \
     consumer_name";

/// What is left of a row in which somebody, or the disk, has changed what omertad had written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    /// The row's number, which is no guest's where it is negative.
    pub(crate) row: i64,
    pub(crate) name: Option<String>,
    pub(crate) slot: Option<u32>,
    pub(crate) request: Option<String>,
    /// What its guest would be removed by, where all of that can be read.
    pub(crate) remains: Option<Remains>,
    /// The columns that cannot be.
    pub(crate) columns: String,
}

/// What a guest is removed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remains {
    pub(crate) id: GuestId,
    pub(crate) name: String,
    pub(crate) run_dir: String,
    pub(crate) boot: String,
    pub(crate) traces: Traces,
}

/// Every guest, oldest first.
pub(super) fn all(connection: &Connection) -> Result<(Vec<Kept>, Vec<Broken>), StoreError> {
    let mut statement = connection.prepare(&format!("SELECT {COLUMNS} FROM guests ORDER BY id"))?;
    let mut rows = statement.query([])?;
    let (mut all, mut broken) = (Vec::new(), Vec::new());
    while let Some(row) = rows.next()? {
        let id = row.get("id")?;
        let mut columns = Columns {
            row,
            broken: Vec::new(),
        };
        match columns.read(id) {
            Ok(kept) => all.push(kept),
            Err(found) => broken.push(*found),
        }
    }
    Ok((all, broken))
}

/// A row, and which of its columns cannot be read.
struct Columns<'a> {
    row: &'a Row<'a>,
    broken: Vec<&'static str>,
}

impl Columns<'_> {
    fn read(&mut self, row: i64) -> Result<Kept, Box<Broken>> {
        // All of them, whatever the first is like: what can be read of a broken row is used.
        let id = self.checked("id", u64::try_from(row).ok().map(GuestId));
        let (name, request) = (self.get::<String>("name"), self.get::<String>("request"));
        let slot = self.get("slot");
        let (run_dir, boot) = (self.get::<String>("run_dir"), self.get::<String>("boot"));
        let step = self.word("step", Step::of);
        let traces = self.traces(step);
        let grant = self.grant_of(id, &name, &request, slot, &run_dir, &boot);
        let agent = self.get("agent_key");
        let seen = self.seen();
        match (grant, step, traces.clone(), agent, seen) {
            (Some(grant), Some(step), Some(traces), Some(agent), Some(seen)) => Ok(Kept {
                grant,
                step,
                traces: Traces { agent, ..traces },
                seen,
            }),
            _ => Err(Box::new(Broken {
                row,
                remains: remains_of(id, name.clone(), run_dir, boot, traces),
                name,
                slot,
                request,
                columns: self.broken.join(", "),
            })),
        }
    }

    fn grant_of(
        &mut self,
        id: Option<GuestId>,
        name: &Option<String>,
        request: &Option<String>,
        slot: Option<u32>,
        run_dir: &Option<String>,
        boot: &Option<String>,
    ) -> Option<Grant> {
        let (accel, machine) = (self.get("accel"), self.get("machine"));
        let consumer_name = self.get("consumer_name");
        Some(Grant {
            id: id?,
            name: name.clone()?,
            request: request.clone()?,
            slot: slot?,
            accel: accel?,
            machine: machine?,
            run_dir: run_dir.clone()?,
            boot: boot.clone()?,
            consumer_name: consumer_name?,
        })
    }

    /// What was made for the guest. One that runs had all of it made before.
    fn traces(&mut self, step: Option<Step>) -> Option<Traces> {
        let uid = self.get("uid");
        let cgroups: Option<Option<Vec<PathBuf>>> = self.json("cgroups");
        let (pid, start) = (self.get::<Option<u32>>("pid"), self.number("pid_start"));
        let tap = self.get("tap");
        let egress = self.get::<Option<u32>>("guard_egress");
        let ingress = self.get::<Option<u32>>("guard_ingress");
        let traces = Traces {
            uid: uid?,
            cgroups: cgroups?,
            process: self.both("pid, pid_start", pid?, start?)?,
            tap: tap?,
            guard: self
                .both("guard_egress, guard_ingress", egress?, ingress?)?
                .map(|(egress, ingress)| [egress, ingress]),
            agent: None,
        };
        let lacking = [
            ("uid", traces.uid.is_none()),
            ("pid", traces.process.is_none()),
            ("tap", traces.tap.is_none()),
            ("guard_egress", traces.guard.is_none()),
        ];
        for (column, lacks) in lacking {
            if lacks && step.is_none_or(|step| step == Step::Running) {
                return self.checked(column, None);
            }
        }
        Some(traces)
    }

    fn seen(&mut self) -> Option<Seen> {
        let stands = self.word("stands", Stands::of);
        let (resumed_at, ends_at) = (self.number("resumed_at"), self.number("ends_at"));
        let stop_by = self.number("stop_by");
        let (public_key, handshake) = (self.get("public_key"), self.get("handshake"));
        let endpoints: Option<Option<_>> = self.json("endpoints");
        Some(Seen {
            stands: stands?,
            resumed_at: resumed_at?,
            ends_at: ends_at?,
            stop_by: stop_by?,
            public_key: public_key?,
            handshake: handshake?,
            endpoints: endpoints?.unwrap_or_default(),
        })
    }

    fn get<T: FromSql>(&mut self, column: &'static str) -> Option<T> {
        let found = self.row.get(column).ok();
        self.checked(column, found)
    }

    /// A number that SQLite has with a sign, or none.
    fn number(&mut self, column: &'static str) -> Option<Option<u64>> {
        let found: Option<i64> = self.get(column)?;
        let number = found.map(u64::try_from).transpose().ok();
        self.checked(column, number)
    }

    fn word<T>(&mut self, column: &'static str, of: impl Fn(&str) -> Option<T>) -> Option<T> {
        let word: String = self.get(column)?;
        self.checked(column, of(&word))
    }

    fn json<T: serde::de::DeserializeOwned>(&mut self, column: &'static str) -> Option<Option<T>> {
        let text: Option<String> = self.get(column)?;
        let value = text.map(|text| serde_json::from_str(&text)).transpose();
        self.checked(column, value.ok())
    }

    /// Both, or neither.
    fn both<A, B>(
        &mut self,
        column: &'static str,
        one: Option<A>,
        other: Option<B>,
    ) -> Option<Option<(A, B)>> {
        let found = match (one, other) {
            (Some(one), Some(other)) => Some(Some((one, other))),
            (None, None) => Some(None),
            _ => None,
        };
        self.checked(column, found)
    }

    fn checked<T>(&mut self, column: &'static str, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.broken.push(column);
        }
        value
    }
}

fn remains_of(
    id: Option<GuestId>,
    name: Option<String>,
    run_dir: Option<String>,
    boot: Option<String>,
    traces: Option<Traces>,
) -> Option<Remains> {
    Some(Remains {
        id: id?,
        name: name?,
        run_dir: run_dir?,
        boot: boot?,
        traces: traces?,
    })
}
