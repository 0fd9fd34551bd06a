//! A guest in which root attacks: with everything of the guest's own disabled, and the witnesses themselves. Each attack
//! is noticed by those that the table names, which is the one in SECURITY.md.

mod attacks;
pub mod guest;

use std::time::{Duration, Instant};

use omerta_incidents::{What, Witness as RecordedWitness, read};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use attacks::{Attack, ENDING, ENDING_BY_AGENT, TOLD, Witness, table};
use guest::{Console, Image, start};

/// How long a witness may take that looks once a second, on a busy machine.
const NOTICED: Duration = Duration::from_secs(20);
/// The same for what its agent does not answer: the deadline of the test's configuration, and as much again.
const MISSED: Duration = Duration::from_secs(40);
/// From the frame to the end of the process, for the machine that runs all tests at once; `make bench BENCH=response`
/// measures what it takes.
const ENDED_US: u64 = 2_000_000;

#[test]
fn table_in_security_md_is_the_one_that_is_tested() {
    let security = include_str!("../../../../../SECURITY.md");
    assert!(
        security.contains(&table()),
        "SECURITY.md lacks this table:\n\n{}",
        table()
    );
}

#[test]
fn four_scenarios_end_the_guest_by_its_first_frame_and_a_killed_agent_by_its_silence() {
    // Nothing but the attack must end the one whose agent is asked.
    let Some(daemon) = start(15) else { return };
    let kernel_alone = |attack: &Attack| {
        let image = match attack.name {
            "broken_vpn_at_boot" => Image::BrokenVpn,
            _ => Image::RedTeam,
        };
        let name = attack.name.replace('_', "-");
        let more = json!({ "on_violation": "terminate", "agent": false });
        let guest = guest::run(&daemon, &name, image, more);
        (name, Console::of(&guest))
    };
    // They boot all at once.
    let guests: Vec<_> = ENDING.iter().map(kernel_alone).collect();
    let more = json!({ "on_violation": "terminate", "agent": true });
    let by_agent = guest::run(&daemon, "agent-killed", Image::RedTeam, more);
    let mut its_console = Console::of(&by_agent);

    for (attack, (name, mut console)) in ENDING.iter().zip(guests) {
        let name = name.as_str();
        // That one attacks by itself.
        if attack.name != "broken_vpn_at_boot" {
            console.say(attack.name);
        }
        let ended = ended(&daemon, name, Duration::from_secs(240));
        assert_eq!(ended["cause"], "rogue", "{name}: {ended}");
        let us = |name: &str| ended[name].as_u64().unwrap();
        println!(
            "measured: {name}: paused {} us, ended {} us, tap gone {} us after its frame",
            us("frame_to_paused_us"),
            us("frame_to_ended_us"),
            us("frame_to_tap_removed_us")
        );
        assert!(us("frame_to_ended_us") < ENDED_US, "{name}: {ended}");
        let told = events(&daemon, name);
        for witness in attack.noticed_by {
            assert!(
                told.iter().any(|event| witness.is(event)),
                "{name}: {told:?}"
            );
        }
    }

    await_agent(&daemon, "agent-killed", "sound", 0);
    its_console.say(ENDING_BY_AGENT.name);
    let ended = ended(&daemon, "agent-killed", MISSED);
    assert_eq!(ended["cause"], "agent", "{ended}");
    assert_eq!(ended["message"], "its agent: missed", "{ended}");
}

#[test]
fn every_other_attack_is_noticed_by_those_whom_the_table_names() {
    let Some(daemon) = start(5) else { return };
    let name = "alpha";
    let more = json!({ "on_violation": "alert", "agent": true });
    let guest = guest::run(&daemon, name, Image::RedTeam, more);
    let mut console = Console::of(&guest);
    await_agent(&daemon, name, "sound", 0);
    for attack in &TOLD {
        // Of each reason one frame a second is told.
        std::thread::sleep(Duration::from_millis(1100));
        let before = events(&daemon, name);
        let began = Instant::now();
        console.ask(attack.name);
        println!(
            "measured: {}: done after {:?}",
            attack.name,
            began.elapsed()
        );
        let patience = match attack.noticed_by {
            [Witness::Agent { .. }, ..] => MISSED,
            _ => NOTICED,
        };
        for witness in attack.noticed_by {
            noticed(&daemon, name, attack, witness, &before, patience);
        }
        match attack.name {
            "rules_flushed" => console.ask("disarm"),
            "agent_stopped" => {
                let before = events(&daemon, name).len();
                console.ask("agent_goes_on");
                await_agent(&daemon, name, "changed", before);
                console.ask("agent_killed");
            }
            _ => {}
        }
    }
    let shown = daemon.get("/v1/guests/alpha").json();
    assert_eq!(shown["state"], "running", "{shown}");
    let mut witnesses = Vec::new();
    let state = daemon.path().join("state/incidents");
    read(&state, |entry| {
        if let What::Incident(incident) = &entry.what {
            witnesses.extend(incident.witnesses.clone());
        }
    })
    .unwrap();
    for witness in [
        RecordedWitness::Kernel,
        RecordedWitness::Agent,
        RecordedWitness::Console,
    ] {
        assert!(witnesses.contains(&witness), "{witness:?}: {witnesses:?}");
    }
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

/// How a guest has ended, by then.
fn ended(daemon: &Daemon, name: &str, limit: Duration) -> Value {
    let end = Instant::now() + limit;
    loop {
        let guest = daemon.get(&format!("/v1/guests/{name}")).json();
        if guest["state"] == "ended" {
            return guest["ended"].clone();
        }
        let log = || daemon.get(&format!("/v1/guests/{name}/log")).body;
        assert!(
            Instant::now() < end,
            "{name} has not ended: {guest}\n{}",
            log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn events(daemon: &Daemon, name: &str) -> Vec<Value> {
    let lines = daemon.get(&format!("/v1/events?guest={name}")).body;
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Waits until the agent is told to be so, in an event that is not of the first `known`.
fn await_agent(daemon: &Daemon, name: &str, report: &str, known: usize) {
    let end = Instant::now() + Duration::from_secs(240);
    let is_so = |event: &Value| event["kind"] == "agent" && event["report"] == report;
    while !events(daemon, name).iter().skip(known).any(is_so) {
        let log = || daemon.get(&format!("/v1/guests/{name}/log")).body;
        assert!(Instant::now() < end, "its agent is not {report}: {}", log());
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn noticed(
    daemon: &Daemon,
    name: &str,
    attack: &Attack,
    witness: &Witness,
    before: &[Value],
    limit: Duration,
) {
    let began = Instant::now();
    loop {
        let now = events(daemon, name);
        let known = |event: &Value| before.contains(event);
        if now.iter().any(|event| witness.is(event) && !known(event)) {
            println!(
                "measured: {}: noticed {:?} after it",
                attack.name,
                began.elapsed()
            );
            return;
        }
        let new: Vec<_> = now.iter().filter(|event| !known(event)).collect();
        let log = || daemon.get(&format!("/v1/guests/{name}/log")).body;
        assert!(
            began.elapsed() < limit,
            "{} is not noticed by {}: {new:?}\n{}",
            attack.name,
            witness.words(),
            log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

impl Witness {
    /// Whether it is this one that an event tells of.
    fn is(&self, event: &Value) -> bool {
        let says = |key: &str, part: &str| event[key].as_str().unwrap_or("").contains(part);
        match self {
            Self::Kernel {
                reason,
                attempt,
                frame,
            } => {
                event["kind"] == "rogue"
                    && event["reason"] == *reason
                    && (event["attempt"] == *attempt || event["attempt"] == "scan")
                    && says("frame", frame)
            }
            Self::Agent { report, what } => {
                event["kind"] == "agent" && event["report"] == *report && says("what", what)
            }
            Self::Console { line } => event["kind"] == "console" && says("line", line),
        }
    }
}
