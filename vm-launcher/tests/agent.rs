//! The agent in the project's guest image: it answers, it tells of changes, and whoever is root in the guest
//! gets around it only by being noticed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use omerta_verdict::Reason;
use omerta_vm_launcher::{
    AgentFinding, AgentTiming, Consumer, GuestEvent, Image, Paused, Running, Spec,
};
use stage::{IDLE, Stage, event};

/// Patient: an emulated guest takes its time where other work keeps the processors busy.
const TIMING: AgentTiming = AgentTiming {
    arrival: Duration::from_secs(170),
    interval: Duration::from_secs(1),
    deadline: Duration::from_secs(20),
    silence_seconds: 600,
    enforce: true,
};

/// A guest of the image that is built, with a shell for root; `None`, said aloud, if there is none.
fn guest(spec: Spec) -> Option<Spec> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/image");
    let directory = std::env::var_os("OMERTA_IMAGE_DIR").map_or_else(built, PathBuf::from);
    match Image::open(&directory) {
        Ok(image) => Some(Spec {
            image,
            memory_mib: 256,
            console_shell: true,
            agent: Some(TIMING),
            ..spec
        }),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

async fn sound(spec: Spec) -> Running {
    let started = Instant::now();
    let paused = Paused::launch(spec).await.unwrap();
    let mut running = paused.guard().await.unwrap().resume().await.unwrap();
    event(&mut running, |e| {
        matches!(e, GuestEvent::AgentArrived { .. })
    })
    .await;
    println!(
        "measured: arrived after {} ms",
        started.elapsed().as_millis()
    );
    found(&mut running, AgentFinding::Sound).await;
    running
}

async fn found(running: &mut Running, finding: AgentFinding) {
    event(running, |e| *e == GuestEvent::AgentFound(finding)).await;
}

/// Types `command` at the guest's shell, until it echoes its end.
async fn at_the_console(running: &Running, command: &str) {
    let (socket, line) = (
        running.console_socket().to_owned(),
        format!("{command}; echo the-\"end\"\n"),
    );
    let told = tokio::task::spawn_blocking(move || type_at(&socket, &line))
        .await
        .unwrap();
    assert!(told.contains("the-end"), "{told}");
}

fn type_at(socket: &Path, line: &str) -> String {
    let mut console = UnixStream::connect(socket).unwrap();
    console
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    let (mut told, mut buffer, mut typed) = (String::new(), [0; 4096], false);
    while Instant::now() < until && !told.contains("the-end") {
        match console.read(&mut buffer) {
            Ok(length) => told.push_str(&String::from_utf8_lossy(&buffer[..length])),
            // It is silent, so the shell waits.
            Err(_) if !typed => {
                typed = true;
                console.write_all(line.as_bytes()).unwrap();
            }
            Err(_) => {}
        }
    }
    told
}

#[test]
fn a_guest_whose_firewall_is_changed_tells_so_and_goes_off() {
    Stage::new(IDLE).run(|spec| async move {
        let Some(spec) = guest(spec) else { return };
        let mut running = sound(spec).await;
        // Nothing of its own doing counts as a change.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let changed = std::time::Instant::now();
        let socket = running.console_socket().to_owned();
        let line = "nft flush ruleset; echo the-\"end\"\n";
        let typed = tokio::task::spawn_blocking(move || type_at(&socket, line));
        let told = event(&mut running, |e| {
            matches!(
                e,
                GuestEvent::AgentFound(AgentFinding::Changed(_)) | GuestEvent::Shutdown
            )
        })
        .await;
        let GuestEvent::AgentFound(AgentFinding::Changed(changes)) = told else {
            panic!("{told:?}");
        };
        assert_eq!(changes.names().collect::<Vec<_>>(), ["firewall"]);
        println!(
            "measured: told {} ms after it was typed",
            changed.elapsed().as_millis()
        );
        let off =
            async { while !matches!(running.next_event().await, GuestEvent::Exited { .. }) {} };
        tokio::time::timeout(Duration::from_secs(60), off)
            .await
            .expect("it went off");
        typed.await.unwrap();
        let log = fs::read_to_string(running.console_log()).unwrap();
        assert!(
            log.contains("changed since the start: firewall; powering off"),
            "{log}"
        );
        running.kill().await;
    });
}

#[test]
fn a_guest_follows_its_consumer_by_its_agent_which_seals_that_and_nothing_else() {
    Stage::new(IDLE).run(|spec| async move {
        let Some(spec) = guest(spec) else { return };
        let consumer = Consumer {
            endpoint: "198.51.100.7:4500".parse().unwrap(),
            ..spec.consumer
        };
        let mut running = sound(spec).await;
        let control = running.control();
        control.allow(&consumer).unwrap();
        control.tell(&consumer);
        let log = || fs::read_to_string(running.console_log()).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !log().contains("omerta: the consumer is at 198.51.100.7:4500 now") {
            assert!(Instant::now() < until, "{}", log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // It answers some times from then on, and finds nothing changed.
        tokio::time::sleep(Duration::from_secs(5)).await;
        at_the_console(
            &running,
            "nft list ruleset | grep -q 198.51.100.7 && wg show wg0 endpoints | grep -q 198.51.100.7:4500 && echo it-\"follows\"",
        )
        .await;
        let told = fs::read_to_string(running.console_log()).unwrap();
        assert!(told.contains("it-follows"), "{told}");
        let socket = running.console_socket().to_owned();
        let line = "ip route add 203.0.113.0/24 dev wg0; echo the-\"end\"\n";
        let typed = tokio::task::spawn_blocking(move || type_at(&socket, line));
        let told = event(&mut running, |e| matches!(e, GuestEvent::AgentFound(_))).await;
        let GuestEvent::AgentFound(AgentFinding::Changed(changes)) = told else {
            panic!("{told:?}");
        };
        assert_eq!(changes.names().collect::<Vec<_>>(), ["routes"]);
        typed.await.unwrap();
        running.kill().await;
    });
}

#[test]
fn an_agent_that_is_killed_is_missed_and_no_other_takes_its_place() {
    Stage::new(IDLE).run(|spec| async move {
        let Some(spec) = guest(spec) else { return };
        let mut running = sound(spec).await;
        at_the_console(&running, "kill -9 $(pidof omerta-agent); omerta-agent").await;
        found(&mut running, AgentFinding::Replaced).await;
        found(&mut running, AgentFinding::Missed).await;
        running.kill().await;
    });
}

#[test]
fn an_agent_that_is_stopped_is_missed() {
    Stage::new(IDLE).run(|spec| async move {
        let Some(spec) = guest(spec) else { return };
        let mut running = sound(spec).await;
        at_the_console(&running, "kill -STOP $(pidof omerta-agent)").await;
        found(&mut running, AgentFinding::Missed).await;
        running.kill().await;
    });
}

#[test]
fn what_the_guests_own_firewall_blocks_is_heard_on_the_console_and_is_no_frame_for_the_guard() {
    Stage::new(IDLE).run(|spec| async move {
        let Some(spec) = guest(spec) else { return };
        let mut running = sound(spec).await;
        at_the_console(&running, "ping -c 1 -W 1 -I eth0 203.0.113.9").await;
        let heard = event(&mut running, |e| matches!(e, GuestEvent::ConsoleHeard(_))).await;
        let GuestEvent::ConsoleHeard(heard) = heard else {
            panic!("{heard:?}");
        };
        assert!(heard.line.contains("DST=203.0.113.9"), "{heard:?}");
        assert_eq!(heard.unread, 0);
        let dropped = running.guard().counters().unwrap().egress.dropped;
        let strangers = dropped.iter().find(|(r, _)| *r == Reason::Endpoint);
        assert!(
            strangers.is_none_or(|(_, count)| count.packets == 0),
            "{dropped:?}"
        );
        running.kill().await;
    });
}
