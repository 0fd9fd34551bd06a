//! What outlives omertad: a row for each guest, in SQLite, written before what it speaks of is made.
//!
//! One thread owns the connection. Whoever changes a row waits until the change is on the disk
//! (`synchronous = FULL`): what a change announces may be made from then on, not before.

mod read;
mod row;
mod schema;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use omerta_engine::GuestId;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use thiserror::Error;
use tokio::sync::oneshot;

pub(crate) use read::{Broken, Remains};
pub(crate) use row::{Change, Grant, Kept, Stands, Step};

/// The database's file in the state directory.
const FILE: &str = "guests.db";
/// How long another omertad that is just ending may take to let go of it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why something cannot be kept, or read.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    #[error("the store {} is another omertad's: stop that one, or give this one another --state-dir", .0.display())]
    InUse(PathBuf),
    #[error(
        "the store is of version {found}, and this omertad knows up to {last}: run the later omertad again, or move the store away"
    )]
    Newer { found: i64, last: usize },
    #[error("the disk of the store is full: make room in the state directory")]
    Full,
    #[error("the store cannot be written: it, its directory or its file system is read-only")]
    ReadOnly,
    #[error(
        "the store holds {0} that this omertad does not understand: move it away once no guest of it lives"
    )]
    Nonsense(&'static str),
    #[error(
        "a guest of that name, or with its address, has left something behind: see the log, and `omerta vm show`"
    )]
    Taken,
    #[error("the store has no row of the guest: another program has changed it")]
    NoRow,
    #[error("the store's thread has ended: see the log")]
    Ended,
    #[error("cannot {action} {}", path.display())]
    Path {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the store")]
    Sqlite(#[source] rusqlite::Error),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full,
            Some(ErrorCode::ConstraintViolation) => Self::Taken,
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen) => Self::ReadOnly,
            _ => Self::Sqlite(error),
        }
    }
}

type Answer = oneshot::Sender<Result<(), StoreError>>;

/// The store, open, and this omertad's alone until dropped.
#[derive(Debug)]
pub(crate) struct Store {
    changes: Mutex<mpsc::Sender<(Change, Answer)>>,
    boot: String,
}

/// What was found in a store.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) guests: Vec<Kept>,
    /// Rows that cannot be read: each is a guest's, and in nobody else's way.
    pub(crate) broken: Vec<Broken>,
    /// The first id that no guest has had.
    pub(crate) first_free: GuestId,
}

impl Store {
    /// Opens the store of a state directory, made where it is not there, and reads it.
    pub(crate) fn open(state_dir: &Path) -> Result<(Self, Contents), StoreError> {
        let connection = connect(state_dir)?;
        let (guests, broken) = read::all(&connection)?;
        let contents = Contents {
            guests,
            broken,
            first_free: row::first_free(&connection)?,
        };
        let (changes, received) = mpsc::channel::<(Change, Answer)>();
        let serve = move || {
            // Rows of guests that are gone, which the disk had no room to remove.
            let mut owed = Vec::new();
            for (change, answer) in received {
                owed.retain(|id| row::apply(&connection, Change::Remove(*id)).is_err());
                let removed = match &change {
                    Change::Remove(id) => Some(*id),
                    _ => None,
                };
                let made = row::apply(&connection, change);
                owed.extend(removed.filter(|_| made.is_err()));
                // Whoever asked may have gone.
                let _ = answer.send(made);
            }
        };
        let path = state_dir.join(FILE);
        std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(serve)
            .map_err(|source| StoreError::Path {
                action: "start a thread for",
                path,
                source,
            })?;
        let store = Self {
            changes: Mutex::new(changes),
            boot: boot(),
        };
        Ok((store, contents))
    }

    /// This boot of the host.
    pub(crate) fn boot(&self) -> &str {
        &self.boot
    }

    /// Makes a change, and returns when it is on the disk.
    pub(crate) async fn change(&self, change: Change) -> Result<(), StoreError> {
        self.begin(change).await.unwrap_or(Err(StoreError::Ended))
    }

    /// Makes a change, in the order in which changes are begun, whether or not its end is waited for.
    pub(crate) fn begin(&self, change: Change) -> oneshot::Receiver<Result<(), StoreError>> {
        let (answer, made) = oneshot::channel();
        let changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        // A thread that has ended drops the answer, which tells.
        let _ = changes.send((change, answer));
        made
    }
}

/// What makes one boot of the host another than the last. Where it is not known each omertad's is one.
fn boot() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    boot.trim().to_owned()
}

fn connect(state_dir: &Path) -> Result<Connection, StoreError> {
    let path = state_dir.join(FILE);
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| StoreError::Path {
            action,
            path,
            source,
        }
    };
    std::fs::create_dir_all(state_dir).map_err(failed("create", state_dir))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NOFOLLOW
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let directory = state_dir
        .canonicalize()
        .map_err(failed("look at", state_dir))?;
    let mut connection = Connection::open_with_flags(directory.join(FILE), flags)?;
    if connection.is_readonly("main")? {
        return Err(StoreError::ReadOnly);
    }
    connection.busy_timeout(PATIENCE)?;
    // Held from the first statement to the end of this process: one omertad, one store.
    connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    let begun: Result<(), rusqlite::Error> = (|| {
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.execute_batch("BEGIN EXCLUSIVE; COMMIT")
    })();
    begun.map_err(|error| match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            StoreError::InUse(path.clone())
        }
        _ => error.into(),
    })?;
    // It names guests' consumers, which are nobody else's business.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .map_err(failed("restrict", &path))?;
    schema::migrate(&mut connection)?;
    Ok(connection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use omerta_vm_launcher::Traces;

    fn grant(id: u64, name: &str, slot: u32) -> Grant {
        Grant {
            id: GuestId(id),
            name: name.to_owned(),
            request: "{}".to_owned(),
            slot,
            accel: "tcg".to_owned(),
            machine: "q35".to_owned(),
            run_dir: "/run/omerta/alpha".to_owned(),
            boot: "boot".to_owned(),
            consumer_name: None,
        }
    }

    fn admit(id: u64, name: &str, slot: u32) -> Change {
        Change::Admit(Box::new(grant(id, name, slot)))
    }

    fn traces() -> Traces {
        Traces {
            uid: Some(7),
            cgroups: Some(vec!["/sys/fs/cgroup/a \"b\"/omerta-guest-7".into()]),
            process: Some((42, 4242)),
            tap: Some(3),
            guard: Some([1, 2]),
            agent: None,
        }
    }

    #[tokio::test]
    async fn what_was_changed_is_there_for_the_next_and_ids_are_never_given_again() {
        let directory = tempfile::tempdir().unwrap();
        let (store, contents) = Store::open(directory.path()).unwrap();
        assert!(contents.guests.is_empty());
        assert_eq!(contents.first_free, GuestId(1));
        let id = GuestId(1);
        for change in [
            admit(1, "alpha", 5),
            admit(2, "beta", 6),
            Change::Reach(id, Step::Guarded, traces()),
            Change::Run {
                id,
                resumed_at: 9,
                ends_at: Some(10),
            },
            Change::Stand(id, Stands::Stopping, Some(11)),
            Change::Key(id, Some("key".to_owned())),
            Change::Handshake(id),
            Change::Agent(id, [3; 32]),
            Change::Endpoints(id, vec![([192, 0, 2, 7], 1).into()]),
            Change::Remove(GuestId(2)),
            Change::Remove(GuestId(2)),
        ] {
            store.change(change).await.unwrap();
        }
        drop(store);
        let (_, contents) = Store::open(directory.path()).unwrap();
        let seen = row::Seen {
            stands: Stands::Stopping,
            resumed_at: Some(9),
            ends_at: Some(10),
            stop_by: Some(11),
            public_key: Some("key".to_owned()),
            handshake: true,
            endpoints: vec![([192, 0, 2, 7], 1).into()],
        };
        let kept = Kept {
            grant: grant(1, "alpha", 5),
            step: Step::Running,
            traces: Traces {
                agent: Some([3; 32]),
                ..traces()
            },
            seen,
        };
        assert_eq!(contents.guests, [kept]);
        assert_eq!(
            contents.first_free,
            GuestId(3),
            "2 is gone, and was somebody"
        );
    }

    #[tokio::test]
    async fn a_name_and_an_address_are_held_once_and_free_when_the_row_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(directory.path()).unwrap();
        store.change(admit(1, "alpha", 5)).await.unwrap();
        for (name, slot) in [("alpha", 6), ("beta", 5)] {
            let taken = store.change(admit(2, name, slot)).await;
            assert!(matches!(taken, Err(StoreError::Taken)), "{taken:?}");
        }
        store.change(Change::Remove(GuestId(1))).await.unwrap();
        store.change(admit(2, "alpha", 5)).await.unwrap();
    }

    #[tokio::test]
    async fn change_of_a_guest_without_a_row_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(directory.path()).unwrap();
        let changed = store.change(Change::Reach(GuestId(9), Step::Launching, traces()));
        assert!(matches!(changed.await, Err(StoreError::NoRow)));
    }

    /// A database as each earlier version left it, with a guest in it.
    #[test]
    fn every_earlier_version_is_brought_to_the_last_with_its_guests() {
        for version in 0..schema::MIGRATIONS.len() {
            let directory = tempfile::tempdir().unwrap();
            let old = Connection::open(directory.path().join(FILE)).unwrap();
            for step in schema::MIGRATIONS.iter().take(version) {
                old.execute_batch(step).unwrap();
            }
            old.pragma_update(None, "user_version", version as i64)
                .unwrap();
            if version > 0 {
                let row = "INSERT INTO guests (name, request, slot, accel, machine, run_dir, boot, step, uid, pid, pid_start, tap,
                    guard_egress, guard_ingress)
                    VALUES ('alpha', '{}', 5, 'tcg', 'q35', '/run/omerta/alpha', 'boot', 'running', 7, 42, 4242, 3, 1, 2)";
                old.execute(row, []).unwrap();
            }
            drop(old);
            let (_, contents) = Store::open(directory.path()).unwrap();
            let names: Vec<_> = contents
                .guests
                .iter()
                .map(|kept| &kept.grant.name)
                .collect();
            assert_eq!(names, vec!["alpha"; usize::from(version > 0)], "{version}");
            let stands = contents.guests.iter().map(|kept| kept.seen.stands);
            assert!(stands.into_iter().all(|stands| stands == Stands::Running));
        }
    }

    #[test]
    fn a_later_version_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        let later = Connection::open(&path).unwrap();
        later.pragma_update(None, "user_version", 99).unwrap();
        drop(later);
        let error = Store::open(directory.path()).unwrap_err();
        assert!(
            matches!(error, StoreError::Newer { found: 99, .. }),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_database_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        std::fs::write(&path, "precious, and no database at all").unwrap();
        Store::open(directory.path()).unwrap_err();
        let found = std::fs::read_to_string(&path).unwrap();
        assert_eq!(found, "precious, and no database at all");
    }
}
