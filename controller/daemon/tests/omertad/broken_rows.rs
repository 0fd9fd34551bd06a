//! Rows of the store that somebody, or the disk, has changed: told, kept, and the guests unharmed.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use omerta_dataplane::Guard;
use omerta_test_support::{IDLE, Namespace, Orphans};
use rusqlite::Connection;
use rusqlite::types::Value as Cell;
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::guests::{request, run, start};
use crate::recovery::{show, traces};

fn start_again(stage: (Namespace, TempDir)) -> Daemon {
    Daemon::start_in(stage.0, stage.1, &["--metrics", "off"])
}

fn store(directory: &Path) -> Connection {
    let store = Connection::open(directory.join("state/guests.db")).unwrap();
    // What a disk or a hand does is not held to the table's own checks.
    store
        .pragma_update(None, "ignore_check_constraints", "ON")
        .unwrap();
    store
}

/// A row's cells, to put them back.
fn cells(store: &Connection, name: &str) -> Vec<(String, Cell)> {
    let mut statement = store
        .prepare("SELECT * FROM guests WHERE name = ?1")
        .unwrap();
    let names: Vec<String> = statement.column_names().map(str::to_owned).collect();
    statement
        .query_row([name], |row| {
            let cell = |(index, name): (usize, &String)| Ok((name.clone(), row.get(index)?));
            names.iter().enumerate().map(cell).collect()
        })
        .unwrap()
}

fn put_back(store: &Connection, cells: &[(String, Cell)]) {
    for (column, cell) in cells.iter().filter(|(column, _)| column != "id") {
        let sql = format!("UPDATE guests SET {column} = ?1 WHERE id IN (1, -1)");
        assert_eq!(store.execute(&sql, [cell]).unwrap(), 1, "{column}");
    }
    store
        .execute("UPDATE guests SET id = 1 WHERE id IN (1, -1)", [])
        .unwrap();
}

fn pid_of(daemon: &Daemon, name: &str) -> Pid {
    Pid::from_raw(i32::try_from(show(daemon, name)["pid"].as_i64().unwrap()).unwrap())
}

fn end(pid: Pid, directory: &Path, others: usize) {
    kill(pid, Signal::SIGKILL).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    while Orphans::living(directory).len() > others {
        assert!(Instant::now() < end, "{pid} lives");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Each column that can be broken, how, and whether it is known then what the guest holds.
const BREAKS: [(&str, &str, bool); 24] = [
    ("id", "-1", true),
    ("name", "CAST(x'616cff' AS TEXT)", true),
    ("request", "CAST(x'7bff' AS TEXT)", false),
    ("slot", "-1", false),
    ("slot", "4294967296", false),
    ("accel", "CAST(x'ff' AS TEXT)", true),
    ("machine", "CAST(x'ff' AS TEXT)", true),
    ("run_dir", "CAST(x'ff' AS TEXT)", true),
    ("boot", "CAST(x'ff' AS TEXT)", true),
    ("step", "'flying'", true),
    ("uid", "-1", true),
    ("uid", "NULL", true),
    ("pid", "1099511627776", true),
    ("pid", "NULL", true),
    ("pid_start", "-1", true),
    ("cgroups", "'{'", true),
    ("tap", "-1", true),
    ("guard_egress", "4294967296", true),
    ("guard_ingress", "NULL", true),
    ("stands", "'flying'", true),
    ("resumed_at", "-1", true),
    ("handshake", "9223372036854775807", true),
    ("agent_key", "x'00'", true),
    ("endpoints", "'[9]'", true),
];

#[test]
fn whatever_is_broken_in_a_row_its_guest_and_all_others_run_on_and_nothing_of_theirs_is_given_out()
{
    let daemon = start(IDLE);
    let held = ["alpha", "beta"].map(|name| run(&daemon, name)["address"].clone());
    let [alpha, beta] = ["alpha", "beta"].map(|name| pid_of(&daemon, name));
    let mut stage = daemon.die();
    let whole = cells(&store(stage.1.path()), "alpha");
    for (column, broken, is_known) in BREAKS {
        let what = format!("{column} = {broken}");
        let sql = format!("UPDATE guests SET {what} WHERE id = 1");
        assert_eq!(
            store(stage.1.path()).execute(&sql, []).unwrap(),
            1,
            "{what}"
        );
        let daemon = start_again(stage);
        let log = daemon.log();
        // Any number but 0 is true: that one can be read.
        if column == "handshake" {
            assert_eq!(pid_of(&daemon, "alpha"), alpha, "{what}: {log}");
        } else {
            let told = log.lines().find(|line| line.contains("is broken"));
            assert!(
                told.is_some_and(|line| line.contains(column)),
                "{what}: {log}"
            );
            assert_eq!(daemon.get("/v1/guests/alpha").status, 404, "{what}");
        }
        assert_eq!(pid_of(&daemon, "beta"), beta, "{what}");
        kill(alpha, None).expect("it lives");
        let guarded = || Guard::open("omalpha").and_then(|guard| guard.verify());
        daemon.namespace.enter(guarded).unwrap().unwrap();
        let again = daemon.post("/v1/guests", &request("alpha", "bare"));
        assert!(again.status >= 400, "{what}: {again:?}");
        let other = daemon.post("/v1/guests", &request("gamma", "bare"));
        assert_eq!(
            other.status,
            if is_known { 201 } else { 409 },
            "{what}: {other:?}"
        );
        if is_known {
            assert!(
                !held.contains(&other.json()["address"]),
                "{what}: {other:?}"
            );
            assert_eq!(
                daemon.post("/v1/guests/gamma/kill", "").status,
                200,
                "{what}"
            );
        } else {
            assert!(other.body.contains("given out twice"), "{other:?}");
        }
        stage = daemon.die();
        put_back(&store(stage.1.path()), &whole);
    }
    // Nothing was done to it: with its row as it was it is taken over.
    let daemon = start_again(stage);
    assert_eq!(pid_of(&daemon, "alpha"), alpha, "{}", daemon.log());
    for name in ["alpha", "beta"] {
        let ended = daemon.post(&format!("/v1/guests/{name}/kill"), "");
        assert_eq!(ended.status, 200, "{ended:?}");
    }
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
}

/// What it is removed by can be read, and its process is gone.
#[test]
fn guest_of_a_broken_row_that_has_ended_is_removed_and_its_name_and_memory_are_free() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    let pid = pid_of(&daemon, "alpha");
    let stage = daemon.die();
    let broken = "UPDATE guests SET stands = 'flying'";
    store(stage.1.path()).execute(broken, []).unwrap();
    end(pid, stage.1.path(), 0);
    let daemon = start_again(stage);
    let log = daemon.log();
    assert!(log.contains("removed what was left"), "{log}");
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
    run(&daemon, "alpha");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

/// What it would be removed by cannot be read: its row stays until a person has removed it, by the log's words.
#[test]
fn row_of_which_nothing_can_be_told_stays_until_it_is_deleted_and_the_rest_is_swept() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    let pid = pid_of(&daemon, "alpha");
    let stage = daemon.die();
    let broken = "UPDATE guests SET uid = -1, slot = -1";
    store(stage.1.path()).execute(broken, []).unwrap();
    end(pid, stage.1.path(), 0);
    let stage = start_again(stage).die();
    let log = std::fs::read_to_string(stage.1.path().join("log")).unwrap();
    let (_, rest) = log.split_once("`DELETE").expect("the log says how");
    let (rest, _) = rest.split_once('`').unwrap();
    let delete = &format!("DELETE{rest}");
    assert_eq!(
        store(stage.1.path()).execute(delete, []).unwrap(),
        1,
        "{log}"
    );
    let daemon = start_again(stage);
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
    run(&daemon, "alpha");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

/// A guest that is left alone has its memory and its processors.
#[test]
fn what_a_guest_that_is_left_alone_holds_is_not_given_out_twice() {
    let daemon = start(IDLE);
    run(&daemon, "alpha");
    let stage = daemon.die();
    // As of an omertad that knows more than this one.
    let broken = "UPDATE guests SET request = json_set(request, '$.hence', 1)";
    store(stage.1.path()).execute(broken, []).unwrap();
    let configured = |stage: (Namespace, TempDir), limits: &str| {
        let images = stage.1.path().join("state/images");
        let config = format!("accel = \"tcg\"\nimage_dir = {images:?}\n{limits}");
        crate::recovery::start_configured(stage, &config)
    };
    let refused = |daemon: &Daemon, short: &str| {
        assert!(
            daemon.log().contains("cannot be understood"),
            "{}",
            daemon.log()
        );
        let answer = daemon.post("/v1/guests", &request("beta", "bare"));
        let message = answer.refusal(409, "refused");
        assert!(message.contains(short), "{message}");
    };
    let daemon = configured(stage, "max_vcpus = 1\n");
    refused(&daemon, "2 virtual CPUs of 1");
    let daemon = configured(daemon.die(), "max_guests = 1\n");
    refused(&daemon, "max_guests is 1");
    let daemon = configured(daemon.die(), "memory_reserve_mib = 100000000\n");
    // It has 64 MiB, and its QEMU 96.
    refused(&daemon, "160 MiB are promised");
    let daemon = configured(daemon.die(), "max_vcpus = 2\n");
    let beta = daemon.post("/v1/guests", &request("beta", "bare"));
    assert_eq!(beta.status, 201, "{beta:?}");
}
