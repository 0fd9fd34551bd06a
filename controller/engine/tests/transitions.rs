//! Every state against every event: which state follows and what is to be done.

// Helpers outside of test functions may fail the test, too.
#![allow(clippy::unwrap_used, clippy::panic)]

use omerta_engine::{
    Action, AgentReport, Cause, ConsoleReport, Engine, Event, GuestEvent, GuestId, GuestState,
    Monotonic, OnSilence, OnViolation, Record, RogueFrame, TunnelReport, Witness,
};
use omerta_verdict::{Direction, Reason};

const ID: GuestId = GuestId(0);
const ORDERED: u64 = 1_000;

fn frame_at(at: u64) -> RogueFrame {
    RogueFrame {
        at: Monotonic(at),
        direction: Direction::Egress,
        reason: Reason::Endpoint,
        length: 98,
        description: "udp 10.77.0.2:1234 → 198.51.100.1:53".into(),
        target: None,
    }
}

fn tell(engine: &mut Engine, event: GuestEvent) -> Vec<Action> {
    engine.handle(Monotonic(ORDERED), Event::Guest(ID, event))
}

fn rogue() -> GuestEvent {
    GuestEvent::RogueFrameSeen(frame_at(ORDERED + 1))
}

fn console() -> GuestEvent {
    GuestEvent::ConsoleHeard(ConsoleReport {
        attempts: 1,
        unread: 0,
        line: "OUT=eth0".into(),
    })
}

fn agent(report: AgentReport) -> GuestEvent {
    GuestEvent::AgentReported(report)
}

fn stop() -> GuestEvent {
    GuestEvent::StopRequested {
        deadline_seconds: 10,
    }
}

fn kill() -> GuestEvent {
    GuestEvent::EndRequested(Cause::Killed)
}

fn paused() -> GuestEvent {
    GuestEvent::Paused {
        at: Monotonic(ORDERED + 5_000),
    }
}

fn failed() -> GuestEvent {
    GuestEvent::LaunchFailed {
        message: "no".into(),
        leftovers: Vec::new(),
    }
}

/// An engine whose only guest is in the state.
fn engine_in(state: GuestState, on_violation: OnViolation) -> Engine {
    use GuestEvent::{Guarded, Launched, Resumed};
    use GuestState as S;
    let mut engine = Engine::new(8);
    engine.handle(
        Monotonic(ORDERED),
        Event::GuestRequested {
            name: "alpha".into(),
            on_violation,
        },
    );
    let suspended = match on_violation {
        OnViolation::Pause => vec![rogue(), paused()],
        _ => vec![GuestEvent::Panicked],
    };
    let path = match state {
        S::Launching => vec![],
        S::Paused => vec![Launched],
        S::Guarded => vec![Launched, Guarded],
        S::Running => vec![Launched, Guarded, Resumed],
        S::Condemned => vec![Launched, Guarded, Resumed, rogue()],
        S::Held => vec![
            Launched,
            Guarded,
            Resumed,
            GuestEvent::HoldRequested,
            paused(),
        ],
        S::Suspended => [vec![Launched, Guarded, Resumed], suspended].concat(),
        S::Stopping => vec![Launched, Guarded, Resumed, stop()],
        S::Ending => vec![Launched, Guarded, Resumed, kill()],
        S::Ended => vec![failed()],
    };
    for event in path {
        tell(&mut engine, event);
    }
    assert_eq!(engine.find("alpha").unwrap().state(), state);
    engine
}

/// What an action is, without what it says.
fn words(actions: &[Action]) -> Vec<&'static str> {
    actions
        .iter()
        .map(|action| match action {
            Action::Launch(_) => "launch",
            Action::Guard(_) => "guard",
            Action::Resume(_) => "resume",
            Action::Pause(_) => "pause",
            Action::Hold(_) => "hold",
            Action::Release(_) => "release",
            Action::PowerDown { .. } => "power down",
            Action::Kill(_) => "kill",
            Action::Forget(_) => "forget",
            Action::Refuse { .. } => "refuse",
            Action::Publish { record, .. } => match record {
                Record::Requested => "requested",
                Record::Launched => "launched",
                Record::Guarded => "guarded",
                Record::Adopted => "adopted",
                Record::Started => "started",
                Record::PublicKey(_) => "public key",
                Record::Handshake => "handshake",
                Record::Tunnel(_) => "tunnel",
                Record::Agent(_) => "agent",
                Record::Console(_) => "console",
                Record::ConsoleSilent => "console_silent",
                Record::Outside(_) => "outside",
                Record::TunnelSilent { .. } => "silent",
                Record::TunnelBack => "back",
                Record::ConsumerMoved { .. } => "consumer moved",
                Record::ConsumerStays { .. } => "consumer stays",
                Record::Rogue { .. } => "rogue",
                Record::Paused(_) => "paused",
                Record::PauseFailed { .. } => "pause failed",
                Record::Held => "held",
                Record::Released => "released",
                Record::ReleaseFailed { .. } => "release failed",
                Record::Reset => "reset",
                Record::Panicked => "panicked",
                Record::Stopping { .. } => "stopping",
                Record::Scrubbed { .. } => "scrubbed",
                Record::Ended(_) => "ended",
            },
        })
        .collect()
}

#[test]
fn table_of_transitions_under_terminate() {
    use GuestState::*;
    type Row = (GuestState, GuestEvent, GuestState, &'static [&'static str]);
    let guard_lost = || GuestEvent::GuardLost {
        message: "detached".into(),
    };
    let removed = || GuestEvent::Undone {
        tap_removed_at: Some(Monotonic(9_000)),
        leftovers: Vec::new(),
    };
    let rows: Vec<Row> = vec![
        (
            Launching,
            GuestEvent::Launched,
            Paused,
            &["launched", "guard"],
        ),
        (Launching, failed(), Ended, &["ended"]),
        (Launching, rogue(), Launching, &[]),
        (Launching, stop(), Launching, &[]),
        (Launching, kill(), Launching, &[]),
        (Launching, GuestEvent::Resumed, Launching, &[]),
        (Paused, GuestEvent::Guarded, Guarded, &["guarded", "resume"]),
        (Paused, failed(), Ended, &["ended"]),
        (Paused, rogue(), Paused, &[]),
        (Paused, kill(), Paused, &[]),
        (Paused, GuestEvent::Resumed, Paused, &[]),
        (Guarded, GuestEvent::Resumed, Running, &["started"]),
        (Guarded, failed(), Ended, &["ended"]),
        (Guarded, rogue(), Condemned, &["pause", "rogue"]),
        (Guarded, kill(), Guarded, &[]),
        (Running, rogue(), Condemned, &["pause", "rogue"]),
        (Running, agent(AgentReport::Sound), Running, &["agent"]),
        (
            Running,
            agent(AgentReport::Missed),
            Ending,
            &["agent", "kill"],
        ),
        (Held, agent(AgentReport::Forged), Ending, &["agent", "kill"]),
        // Its console is the guest's word: told, and nothing is done for it.
        (Running, console(), Running, &["console"]),
        (Condemned, console(), Condemned, &["console"]),
        (Ending, console(), Ending, &["console"]),
        // What stands still cannot speak.
        (
            Running,
            GuestEvent::ConsoleSilent,
            Running,
            &["console_silent"],
        ),
        (Suspended, GuestEvent::ConsoleSilent, Suspended, &[]),
        (Ending, GuestEvent::ConsoleSilent, Ending, &[]),
        (
            Running,
            GuestEvent::FoundOutside("a route".into()),
            Running,
            &["outside"],
        ),
        // Who powers down takes its agent along.
        (Stopping, agent(AgentReport::Missed), Stopping, &[]),
        (Stopping, agent(AgentReport::Sound), Stopping, &["agent"]),
        (Suspended, agent(AgentReport::Missed), Suspended, &[]),
        (Condemned, agent(AgentReport::Missed), Condemned, &[]),
        (Guarded, agent(AgentReport::Missed), Guarded, &[]),
        (Ending, agent(AgentReport::Missed), Ending, &[]),
        (Running, stop(), Stopping, &["power down", "stopping"]),
        (Running, kill(), Ending, &["kill"]),
        (
            Running,
            GuestEvent::Exited { message: None },
            Ending,
            &["kill"],
        ),
        (Running, guard_lost(), Ending, &["kill"]),
        (Running, GuestEvent::Panicked, Suspended, &["panicked"]),
        (Running, GuestEvent::Reset, Running, &["reset"]),
        (Running, paused(), Running, &[]),
        (
            Running,
            GuestEvent::PublicKeyReported("k".into()),
            Running,
            &["public key"],
        ),
        (Running, GuestEvent::HandshakeSeen, Running, &[]),
        (Running, GuestEvent::StopDeadlinePassed, Running, &[]),
        (Running, failed(), Running, &[]),
        (Running, GuestEvent::HoldRequested, Running, &["hold"]),
        (Running, GuestEvent::ReleaseRequested, Running, &[]),
        (Running, GuestEvent::Released, Running, &[]),
        (Paused, GuestEvent::HoldRequested, Paused, &[]),
        (Held, GuestEvent::HoldRequested, Held, &[]),
        (Held, GuestEvent::ReleaseRequested, Held, &["release"]),
        (Held, GuestEvent::Released, Running, &["released"]),
        (
            Held,
            GuestEvent::ReleaseFailed {
                message: "no".into(),
            },
            Held,
            &["release failed"],
        ),
        (Held, GuestEvent::Resumed, Held, &[]),
        // Sent before it stood still, and told late.
        (Held, rogue(), Condemned, &["pause", "rogue"]),
        (Held, GuestEvent::Panicked, Suspended, &["panicked"]),
        (Held, guard_lost(), Ending, &["kill"]),
        (Held, stop(), Ending, &["kill"]),
        (Held, kill(), Ending, &["kill"]),
        (Suspended, GuestEvent::ReleaseRequested, Suspended, &[]),
        (Suspended, GuestEvent::Released, Suspended, &[]),
        (Condemned, GuestEvent::ReleaseRequested, Condemned, &[]),
        (Condemned, paused(), Ending, &["paused", "kill"]),
        (
            Condemned,
            GuestEvent::PauseFailed {
                message: "no".into(),
            },
            Ending,
            &["pause failed", "kill"],
        ),
        (Condemned, rogue(), Condemned, &[]),
        (Condemned, kill(), Ending, &["kill"]),
        (Condemned, stop(), Condemned, &[]),
        (Condemned, GuestEvent::Resumed, Condemned, &[]),
        (
            Condemned,
            GuestEvent::Exited { message: None },
            Ending,
            &["kill"],
        ),
        (Suspended, rogue(), Condemned, &["pause", "rogue"]),
        (Suspended, stop(), Ending, &["kill"]),
        (Suspended, kill(), Ending, &["kill"]),
        (Suspended, GuestEvent::Resumed, Suspended, &[]),
        (Stopping, rogue(), Condemned, &["pause", "rogue"]),
        (Stopping, GuestEvent::StopDeadlinePassed, Ending, &["kill"]),
        (
            Stopping,
            GuestEvent::Exited { message: None },
            Ending,
            &["kill"],
        ),
        (Stopping, stop(), Stopping, &[]),
        (Stopping, kill(), Ending, &["kill"]),
        (Ending, removed(), Ended, &["ended"]),
        (Ending, kill(), Ending, &[]),
        (Ending, rogue(), Ending, &[]),
        (Ending, paused(), Ending, &[]),
        (Ending, GuestEvent::Exited { message: None }, Ending, &[]),
        (Ended, removed(), Ended, &[]),
        (Ended, kill(), Ended, &[]),
        (Ended, rogue(), Ended, &[]),
        (Ended, GuestEvent::Launched, Ended, &[]),
    ];
    for (before, event, after, expected) in rows {
        let mut engine = engine_in(before, OnViolation::Terminate);
        let label = format!("{before} + {event:?}");
        let actions = tell(&mut engine, event);
        assert_eq!(words(&actions), expected, "{label}");
        assert_eq!(engine.find("alpha").unwrap().state(), after, "{label}");
    }
}

fn tunnel(witness: Witness, handshake: Option<u64>) -> GuestEvent {
    GuestEvent::TunnelSeen(TunnelReport {
        witness,
        handshake: handshake.map(Monotonic),
        endpoint: None,
        keepalive: None,
        sent_bytes: 1,
        received_bytes: 1,
    })
}

#[test]
fn a_tunnel_is_known_once_the_guest_runs_and_told_when_it_is_another() {
    for state in [GuestState::Guarded, GuestState::Ending, GuestState::Ended] {
        let mut engine = engine_in(state, OnViolation::Drop);
        assert!(tell(&mut engine, tunnel(Witness::Guest, None)).is_empty());
        assert_eq!(engine.find("alpha").unwrap().tunnel(), None, "{state}");
    }
    let mut engine = engine_in(GuestState::Running, OnViolation::Drop);
    assert_eq!(
        words(&tell(&mut engine, tunnel(Witness::Guest, None))),
        ["tunnel"]
    );
    assert!(tell(&mut engine, tunnel(Witness::Guest, None)).is_empty());
    let known = engine.find("alpha").unwrap().tunnel().unwrap();
    assert_eq!(known.report.received_bytes, 1);
}

#[test]
fn a_guest_that_boots_again_has_another_tunnel_and_a_tunnel_of_the_hosts_stays() {
    for witness in Witness::ALL {
        let mut engine = engine_in(GuestState::Running, OnViolation::Drop);
        tell(&mut engine, GuestEvent::PublicKeyReported("key".into()));
        tell(&mut engine, GuestEvent::HandshakeSeen);
        tell(&mut engine, tunnel(witness, Some(1)));
        tell(&mut engine, GuestEvent::Reset);
        let guest = engine.find("alpha").unwrap();
        let stays = witness == Witness::Host;
        assert_eq!(guest.tunnel().is_some(), stays, "{witness}");
        assert_eq!(guest.handshake(), stays, "{witness}");
        assert_eq!(guest.public_key().is_some(), stays, "{witness}");
    }
}

fn silent(never: bool, action: OnSilence) -> GuestEvent {
    GuestEvent::TunnelSilent {
        seconds: 180,
        never,
        action,
    }
}

#[test]
fn a_silent_tunnel_is_told_and_the_guest_paused_or_ended_as_is_wished() {
    for (action, said, state) in [
        (OnSilence::Alert, &["silent"][..], GuestState::Running),
        (OnSilence::Pause, &["silent", "hold"], GuestState::Running),
        (OnSilence::End, &["silent", "kill"], GuestState::Ending),
    ] {
        let mut engine = engine_in(GuestState::Running, OnViolation::Terminate);
        assert_eq!(words(&tell(&mut engine, silent(false, action))), said);
        assert_eq!(engine.find("alpha").unwrap().state(), state);
    }
    let mut engine = engine_in(GuestState::Running, OnViolation::Terminate);
    tell(&mut engine, silent(false, OnSilence::Pause));
    tell(&mut engine, paused());
    assert_eq!(engine.find("alpha").unwrap().state(), GuestState::Held);
    // It stands still: that nothing comes is no wonder.
    assert!(tell(&mut engine, silent(false, OnSilence::End)).is_empty());
    assert_eq!(
        words(&tell(&mut engine, GuestEvent::ReleaseRequested)),
        ["release"]
    );
}

#[test]
fn a_tunnel_is_back_only_once_it_was_told_as_silent() {
    let mut engine = engine_in(GuestState::Running, OnViolation::Terminate);
    assert!(tell(&mut engine, GuestEvent::TunnelBack).is_empty());
    tell(&mut engine, silent(false, OnSilence::Alert));
    assert_eq!(words(&tell(&mut engine, GuestEvent::TunnelBack)), ["back"]);
    assert!(tell(&mut engine, GuestEvent::TunnelBack).is_empty());
}

#[test]
fn a_guest_whose_consumer_never_answered_ends_for_that() {
    let mut engine = engine_in(GuestState::Running, OnViolation::Terminate);
    tell(&mut engine, silent(true, OnSilence::End));
    let undone = GuestEvent::Undone {
        tap_removed_at: None,
        leftovers: Vec::new(),
    };
    tell(&mut engine, undone);
    let ending = engine.find("alpha").unwrap().ending().unwrap();
    assert_eq!(ending.cause, Cause::Silent);
    assert!(
        ending
            .message
            .as_ref()
            .unwrap()
            .contains("has not answered within 180 s")
    );
}

#[test]
fn a_hold_that_a_rogue_frame_overtakes_is_no_way_back() {
    let mut engine = engine_in(GuestState::Running, OnViolation::Pause);
    assert_eq!(
        words(&tell(&mut engine, GuestEvent::HoldRequested)),
        ["hold"]
    );
    tell(&mut engine, rogue());
    tell(&mut engine, paused());
    tell(&mut engine, paused());
    assert_eq!(engine.find("alpha").unwrap().state(), GuestState::Suspended);
    assert!(tell(&mut engine, GuestEvent::ReleaseRequested).is_empty());
}

#[test]
fn a_hold_that_fails_leaves_the_guest_running_and_says_so() {
    let mut engine = engine_in(GuestState::Running, OnViolation::Terminate);
    tell(&mut engine, GuestEvent::HoldRequested);
    let failed = GuestEvent::PauseFailed {
        message: "no".into(),
    };
    assert_eq!(words(&tell(&mut engine, failed)), ["pause failed"]);
    assert_eq!(engine.find("alpha").unwrap().state(), GuestState::Running);
    assert!(tell(&mut engine, paused()).is_empty());
}

#[test]
fn a_process_that_dies_while_it_is_to_stop_is_not_a_guest_that_powered_down() {
    for (message, cause) in [
        (None, Cause::Stopped),
        (Some("signal 9".to_owned()), Cause::Exited),
    ] {
        let mut engine = engine_in(GuestState::Stopping, OnViolation::Alert);
        tell(
            &mut engine,
            GuestEvent::Exited {
                message: message.clone(),
            },
        );
        let gone = GuestEvent::Undone {
            tap_removed_at: None,
            leftovers: Vec::new(),
        };
        tell(&mut engine, gone);
        let ending = engine.find("alpha").unwrap().ending().unwrap();
        assert_eq!((ending.cause, &ending.message), (cause, &message));
    }
}

#[test]
fn each_policy_answers_a_rogue_frame_in_its_way() {
    for (policy, after, expected) in [
        (OnViolation::Drop, GuestState::Running, &[] as &[&str]),
        (OnViolation::Alert, GuestState::Running, &["rogue"]),
        (
            OnViolation::Pause,
            GuestState::Condemned,
            &["pause", "rogue"],
        ),
        (
            OnViolation::Terminate,
            GuestState::Condemned,
            &["pause", "rogue"],
        ),
    ] {
        let mut engine = engine_in(GuestState::Running, policy);
        assert_eq!(words(&tell(&mut engine, rogue())), expected, "{policy}");
        let guest = engine.find("alpha").unwrap();
        assert_eq!(guest.state(), after, "{policy}");
        assert_eq!(
            guest.rogue_frames().collect::<Vec<_>>(),
            [(Reason::Endpoint, 1)]
        );
    }
}

#[test]
fn policy_pause_holds_the_guest_until_it_is_ended() {
    let mut engine = engine_in(GuestState::Condemned, OnViolation::Pause);
    assert_eq!(words(&tell(&mut engine, paused())), ["paused"]);
    assert_eq!(words(&tell(&mut engine, rogue())), [] as [&str; 0]);
    assert_eq!(words(&tell(&mut engine, kill())), ["kill"]);
}

#[test]
fn stopping_guest_that_turns_rogue_under_pause_is_ended_once_paused() {
    let mut engine = engine_in(GuestState::Stopping, OnViolation::Pause);
    assert_eq!(words(&tell(&mut engine, rogue())), ["pause", "rogue"]);
    assert_eq!(
        words(&tell(&mut engine, GuestEvent::StopDeadlinePassed)),
        [] as [&str; 0]
    );
    assert_eq!(words(&tell(&mut engine, paused())), ["paused", "kill"]);
}

#[test]
fn what_a_stock_kernel_sends_by_itself_and_what_the_provider_bounds_is_no_violation() {
    for policy in [
        OnViolation::Alert,
        OnViolation::Pause,
        OnViolation::Terminate,
    ] {
        for reason in Reason::ALL {
            let own = matches!(
                reason,
                Reason::AddressProbe
                    | Reason::MulticastListener
                    | Reason::RouterSolicitation
                    | Reason::IcmpType
                    | Reason::Policed
                    | Reason::FlowQuota
                    | Reason::LeaseExpired
                    | Reason::NoPolicy
                    | Reason::PolicyChanging
                    | Reason::Unreadable
                    | Reason::AnswerFailed
            );
            let mut engine = engine_in(GuestState::Running, policy);
            let frame = RogueFrame {
                reason: *reason,
                ..frame_at(ORDERED + 1)
            };
            let actions = tell(&mut engine, GuestEvent::RogueFrameSeen(frame));
            assert_eq!(actions.is_empty(), own, "{policy} {reason}");
            let counted = engine.find("alpha").unwrap().rogue_frames().count();
            assert_eq!(counted, usize::from(!own), "{policy} {reason}");
        }
    }
}

#[test]
fn the_canary_and_what_comes_in_are_no_violation() {
    for state in [GuestState::Guarded, GuestState::Running] {
        let mut engine = engine_in(state, OnViolation::Terminate);
        let canary = frame_at(ORDERED - 1);
        let ingress = RogueFrame {
            direction: Direction::Ingress,
            ..frame_at(ORDERED + 1)
        };
        for frame in [canary, ingress] {
            assert!(tell(&mut engine, GuestEvent::RogueFrameSeen(frame)).is_empty());
        }
        assert_eq!(engine.find("alpha").unwrap().rogue_frames().count(), 0);
    }
}

#[test]
fn kill_wanted_while_launching_happens_when_the_step_is_over() {
    for state in [
        GuestState::Launching,
        GuestState::Paused,
        GuestState::Guarded,
    ] {
        let mut engine = engine_in(state, OnViolation::Alert);
        assert!(tell(&mut engine, kill()).is_empty());
        let done = match state {
            GuestState::Launching => GuestEvent::Launched,
            GuestState::Paused => GuestEvent::Guarded,
            _ => GuestEvent::Resumed,
        };
        assert_eq!(words(&tell(&mut engine, done))[1..], ["kill"]);
        tell(
            &mut engine,
            GuestEvent::Undone {
                tap_removed_at: Some(Monotonic(2_000)),
                leftovers: Vec::new(),
            },
        );
        let guest = engine.find("alpha").unwrap();
        assert_eq!(guest.ending().unwrap().cause, Cause::Killed, "{state}");
    }
}

#[test]
fn the_end_tells_the_frame_and_how_long_each_step_took() {
    let mut engine = engine_in(GuestState::Condemned, OnViolation::Terminate);
    tell(&mut engine, paused());
    tell(
        &mut engine,
        GuestEvent::Reaped {
            at: Monotonic(ORDERED + 7_001),
        },
    );
    tell(
        &mut engine,
        GuestEvent::Undone {
            tap_removed_at: Some(Monotonic(ORDERED + 9_001)),
            leftovers: Vec::new(),
        },
    );
    let ending = engine.find("alpha").unwrap().ending().unwrap();
    assert_eq!(ending.cause, Cause::Rogue);
    let incident = ending.incident.as_ref().unwrap();
    assert_eq!(incident.frame, frame_at(ORDERED + 1));
    assert_eq!(incident.frame_to_paused_us(), Some(4));
    assert_eq!(incident.frame_to_ended_us(), Some(7));
    assert_eq!(incident.frame_to_tap_removed_us(), Some(9));
}

#[test]
fn what_could_not_be_removed_is_told_apart_from_what_went_wrong() {
    let left = || vec!["process: stuck".to_owned(), "directory /run/x".to_owned()];
    let mut engine = engine_in(GuestState::Condemned, OnViolation::Terminate);
    tell(&mut engine, paused());
    tell(
        &mut engine,
        GuestEvent::Undone {
            tap_removed_at: None,
            leftovers: left(),
        },
    );
    let ending = engine.find("alpha").unwrap().ending().unwrap();
    assert_eq!((&ending.message, &ending.leftovers), (&None, &left()));
    let incident = ending.incident.as_ref().unwrap();
    assert_eq!(incident.frame_to_ended_us(), None, "it was not reaped");
    assert_eq!(incident.frame_to_tap_removed_us(), None);

    let mut engine = engine_in(GuestState::Paused, OnViolation::Terminate);
    tell(
        &mut engine,
        GuestEvent::LaunchFailed {
            message: "no guard".into(),
            leftovers: left(),
        },
    );
    let ending = engine.find("alpha").unwrap().ending().unwrap();
    assert_eq!(ending.message.as_deref(), Some("no guard"));
    assert_eq!(ending.leftovers, left());
}

#[test]
fn a_reboot_forgets_the_key_and_takes_the_next() {
    let mut engine = engine_in(GuestState::Running, OnViolation::Alert);
    let key = |text: &str| GuestEvent::PublicKeyReported(text.into());
    assert_eq!(words(&tell(&mut engine, key("one"))), ["public key"]);
    assert_eq!(words(&tell(&mut engine, key("one"))), [] as [&str; 0]);
    assert_eq!(
        words(&tell(&mut engine, GuestEvent::HandshakeSeen)),
        ["handshake"]
    );
    assert_eq!(
        words(&tell(&mut engine, GuestEvent::HandshakeSeen)),
        [] as [&str; 0]
    );
    tell(&mut engine, GuestEvent::Reset);
    assert_eq!(engine.find("alpha").unwrap().public_key(), None);
    let later = Monotonic(ORDERED + 2 * Monotonic::SECOND);
    let actions = engine.handle(later, Event::Guest(ID, key("two")));
    assert_eq!(words(&actions), ["public key"]);
    assert!(!engine.find("alpha").unwrap().handshake());
}

#[test]
fn name_is_refused_while_taken_and_free_once_ended() {
    let request = || Event::GuestRequested {
        name: "alpha".into(),
        on_violation: OnViolation::Drop,
    };
    let mut engine = engine_in(GuestState::Running, OnViolation::Drop);
    assert_eq!(words(&engine.handle(Monotonic(0), request())), ["refuse"]);
    let mut engine = engine_in(GuestState::Ended, OnViolation::Drop);
    let actions = engine.handle(Monotonic(0), request());
    assert_eq!(words(&actions), ["forget", "requested", "launch"]);
    assert_eq!(engine.find("alpha").unwrap().id(), GuestId(1));
}

#[test]
fn limit_and_shutdown_refuse_new_guests() {
    let mut engine = Engine::new(1);
    let request = |name: &str| Event::GuestRequested {
        name: name.into(),
        on_violation: OnViolation::Drop,
    };
    assert_eq!(
        words(&engine.handle(Monotonic(0), request("a"))),
        ["requested", "launch"]
    );
    assert_eq!(
        words(&engine.handle(Monotonic(0), request("b"))),
        ["refuse"]
    );
    tell(&mut engine, failed());
    engine.handle(Monotonic(0), Event::ShutdownBegan);
    assert_eq!(
        words(&engine.handle(Monotonic(0), request("b"))),
        ["refuse"]
    );
}

#[test]
fn only_so_many_ended_guests_are_remembered() {
    let mut engine = Engine::new(1);
    let total = omerta_engine::ENDED_KEPT as u64 + 3;
    for id in 0..total {
        engine.handle(
            Monotonic(0),
            Event::GuestRequested {
                name: format!("g{id}"),
                on_violation: OnViolation::Drop,
            },
        );
        engine.handle(Monotonic(0), Event::Guest(GuestId(id), failed()));
    }
    assert_eq!(engine.guests().count(), omerta_engine::ENDED_KEPT);
    assert!(engine.find("g0").is_none() && engine.find(&format!("g{}", total - 1)).is_some());
}
