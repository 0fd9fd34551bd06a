//! Whatever happens in whatever order, what must never be asked of the executor is not asked.

// Helpers outside of test functions may fail the test, too.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use omerta_engine::{
    Action, AgentReport, Cause, ConsoleReport, Engine, Event, GuestEvent, GuestId, GuestState,
    Monotonic, OnSilence, OnViolation, Record, RogueFrame, TunnelReport, Witness,
};
use omerta_verdict::{Direction, Reason};
use proptest::prelude::*;

fn policies() -> impl Strategy<Value = OnViolation> {
    proptest::sample::select(OnViolation::ALL.to_vec())
}

fn frames() -> impl Strategy<Value = RogueFrame> {
    (0u64..400, any::<bool>(), 0..Reason::ALL.len()).prop_map(|(at, egress, reason)| RogueFrame {
        at: Monotonic(at * Monotonic::SECOND / 8),
        direction: if egress {
            Direction::Egress
        } else {
            Direction::Ingress
        },
        reason: Reason::ALL[reason],
        length: 60,
        description: "frame".into(),
        target: None,
    })
}

fn tunnels() -> impl Strategy<Value = TunnelReport> {
    (0u64..400, any::<bool>(), 0u16..3).prop_map(|(at, guest, port)| TunnelReport {
        witness: if guest { Witness::Guest } else { Witness::Host },
        handshake: Some(Monotonic(at * Monotonic::SECOND / 8)),
        endpoint: Some(([192, 0, 2, 10], port).into()),
        keepalive: None,
        sent_bytes: 0,
        received_bytes: 0,
    })
}

fn guest_events() -> impl Strategy<Value = GuestEvent> {
    let at = || (0u64..400).prop_map(|at| Monotonic(at * Monotonic::SECOND / 8));
    prop_oneof![
        3 => Just(GuestEvent::Launched),
        3 => Just(GuestEvent::Guarded),
        3 => Just(GuestEvent::Resumed),
        1 => Just(GuestEvent::LaunchFailed { message: "no".into(), leftovers: Vec::new() }),
        1 => Just(GuestEvent::PublicKeyReported("key".into())),
        1 => Just(GuestEvent::HandshakeSeen),
        1 => proptest::sample::select(OnSilence::ALL.to_vec())
            .prop_map(|action| GuestEvent::TunnelSilent { seconds: 1, never: false, action }),
        1 => Just(GuestEvent::TunnelBack),
        1 => tunnels().prop_map(GuestEvent::TunnelSeen),
        1 => Just(GuestEvent::AgentReported(AgentReport::Sound)),
        1 => Just(GuestEvent::ConsoleHeard(ConsoleReport { attempts: 1, unread: 1, line: "x".into() })),
        1 => Just(GuestEvent::ConsoleSilent),
        1 => Just(GuestEvent::FoundOutside("a route".into())),
        1 => Just(GuestEvent::AgentReported(AgentReport::Missed)),
        6 => frames().prop_map(GuestEvent::RogueFrameSeen),
        2 => at().prop_map(|at| GuestEvent::Paused { at }),
        1 => Just(GuestEvent::PauseFailed { message: "no".into() }),
        1 => Just(GuestEvent::Reset),
        1 => Just(GuestEvent::HoldRequested),
        1 => Just(GuestEvent::ReleaseRequested),
        1 => Just(GuestEvent::Released),
        1 => Just(GuestEvent::ReleaseFailed { message: "no".into() }),
        1 => Just(GuestEvent::Panicked),
        1 => Just(GuestEvent::GuardLost { message: "gone".into() }),
        1 => (1u32..600).prop_map(|seconds| GuestEvent::StopRequested { deadline_seconds: seconds }),
        1 => Just(GuestEvent::StopDeadlinePassed),
        1 => Just(GuestEvent::EndRequested(Cause::Killed)),
        1 => Just(GuestEvent::Exited { message: None }),
        1 => at().prop_map(|at| GuestEvent::Reaped { at }),
        2 => at().prop_map(|at| GuestEvent::Undone { tap_removed_at: Some(at), leftovers: Vec::new() }),
    ]
}

fn events() -> impl Strategy<Value = Event> {
    prop_oneof![
        2 => (0u8..3, policies()).prop_map(|(name, on_violation)| Event::GuestRequested {
            name: format!("g{name}"),
            on_violation,
        }),
        30 => (0u64..6, guest_events()).prop_map(|(id, event)| Event::Guest(GuestId(id), event)),
        1 => Just(Event::ShutdownBegan),
    ]
}

/// What was asked for one guest, in order.
#[derive(Default)]
struct Trace {
    policy: Option<OnViolation>,
    words: Vec<&'static str>,
    rogue_published: BTreeMap<Reason, Vec<Monotonic>>,
    rogue_accounted: u64,
}

impl Trace {
    fn first(&self, word: &str) -> Option<usize> {
        self.words.iter().position(|w| *w == word)
    }

    fn count(&self, word: &str) -> usize {
        self.words.iter().filter(|w| **w == word).count()
    }
}

#[derive(Default)]
struct Watcher {
    traces: BTreeMap<GuestId, Trace>,
    forgotten: BTreeSet<GuestId>,
    shutting_down: bool,
}

impl Watcher {
    fn watch(&mut self, now: Monotonic, event: &Event, actions: &[Action]) {
        for action in actions {
            let (id, word) = match action {
                Action::Launch(id) => {
                    assert!(!self.shutting_down, "launched while shutting down");
                    (id, "launch")
                }
                Action::Publish {
                    guest: id,
                    record: Record::Requested,
                    ..
                } => {
                    let Event::GuestRequested { on_violation, .. } = event else {
                        panic!("admitted without a request")
                    };
                    self.traces.entry(*id).or_default().policy = Some(*on_violation);
                    (id, "publish")
                }
                Action::Guard(id) => (id, "guard"),
                Action::Resume(id) => (id, "resume"),
                Action::Pause(id) => (id, "pause"),
                Action::Hold(id) => (id, "hold"),
                Action::Release(id) => (id, "release"),
                Action::PowerDown { guest, .. } => (guest, "power down"),
                Action::Kill(id) => (id, "kill"),
                Action::Forget(id) => {
                    assert!(self.forgotten.insert(*id), "forgotten twice");
                    (id, "forget")
                }
                Action::Publish {
                    guest: id,
                    record:
                        Record::Rogue {
                            frame, suppressed, ..
                        },
                    ..
                } => {
                    let trace = self.traces.entry(*id).or_default();
                    trace
                        .rogue_published
                        .entry(frame.reason)
                        .or_default()
                        .push(now);
                    trace.rogue_accounted += 1 + suppressed;
                    (id, "rogue")
                }
                Action::Publish {
                    guest: id,
                    record: Record::Agent(_),
                    ..
                } => (id, "agent"),
                Action::Publish {
                    guest: id,
                    record: Record::Ended(_),
                    ..
                } => (id, "ended"),
                Action::Publish { guest: id, .. } => (id, "publish"),
                Action::Refuse { .. } => {
                    assert!(matches!(event, Event::GuestRequested { .. }));
                    continue;
                }
            };
            let trace = self.traces.entry(*id).or_default();
            assert!(
                trace.policy.is_some(),
                "{word} for a guest that was never admitted"
            );
            assert!(
                word == "forget" || !self.forgotten.contains(id),
                "{word} for a forgotten guest"
            );
            trace.words.push(word);
        }
        self.shutting_down |= matches!(event, Event::ShutdownBegan);
    }

    fn check(&self) {
        for (id, trace) in &self.traces {
            let words = &trace.words;
            for once in ["launch", "guard", "resume", "kill", "ended", "forget"] {
                assert!(
                    trace.count(once) <= 1,
                    "{once} more than once for {id:?}: {words:?}"
                );
            }
            let policy = trace.policy.unwrap();
            if policy == OnViolation::Drop {
                assert_eq!(trace.count("rogue"), 0, "{words:?}");
            }
            if matches!(policy, OnViolation::Drop | OnViolation::Alert) {
                assert_eq!(trace.count("pause"), 0, "{words:?}");
            }
            if let Some(pause) = trace.first("pause") {
                assert!(
                    trace.first("kill").is_none_or(|kill| kill > pause),
                    "{words:?}"
                );
                assert!(
                    trace.first("resume").is_some_and(|resume| resume < pause),
                    "{words:?}"
                );
                // Of a rogue frame, or of what its agent said.
                assert!(
                    trace.first("rogue").is_some() || trace.first("agent").is_some(),
                    "paused without a record: {words:?}"
                );
            }
            if policy == OnViolation::Terminate && trace.first("rogue").is_some() {
                assert_eq!(trace.count("pause"), 1, "{words:?}");
            }
            // What was paused for rogue traffic never runs again.
            if let Some(pause) = trace.first("pause") {
                assert!(!words[pause..].contains(&"release"), "{words:?}");
            }
            if let Some(release) = trace.first("release") {
                assert!(
                    trace.first("hold").is_some_and(|hold| hold < release),
                    "{words:?}"
                );
            }
            if let Some(kill) = trace.first("kill") {
                for word in &words[kill + 1..] {
                    assert!(
                        matches!(*word, "publish" | "rogue" | "agent" | "ended" | "forget"),
                        "{words:?}"
                    );
                }
            }
            if let Some(ended) = trace.first("ended") {
                for word in &words[ended + 1..] {
                    assert_eq!(*word, "forget", "{words:?}");
                }
            }
            for times in trace.rogue_published.values() {
                for pair in times.windows(2) {
                    assert!(
                        pair[1].is_after(pair[0], Monotonic::SECOND),
                        "flood published"
                    );
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_interleaving_keeps_the_order_of_actions(
        events in proptest::collection::vec((0u64..Monotonic::SECOND / 2, events()), 0..120),
    ) {
        let mut engine = Engine::new(4);
        let mut watcher = Watcher::default();
        let mut now = 0;
        for (step, event) in events {
            now += step;
            let actions = engine.handle(Monotonic(now), event.clone());
            watcher.watch(Monotonic(now), &event, &actions);
            prop_assert!(engine.guests().filter(|guest| !guest.is_ended()).count() <= 4);
        }
        watcher.check();
        for (id, trace) in &watcher.traces {
            if let Some(guest) = engine.guest(*id) {
                let counted: u64 = guest.rogue_frames().map(|(_, count)| count).sum();
                prop_assert!(trace.rogue_accounted <= counted);
            }
        }
    }

    /// An executor that answers every action, with success or failure, whenever it comes to it.
    #[test]
    fn an_executor_that_answers_brings_every_guest_to_its_end(
        policy in policies(),
        schedule in proptest::collection::vec((any::<bool>(), any::<bool>(), guest_inputs()), 0..60),
    ) {
        let mut engine = Engine::new(1);
        let mut watcher = Watcher::default();
        let mut run = Run { now: 0, pending: Vec::new(), violated: false };
        run.tell(&mut engine, &mut watcher, Event::GuestRequested {
            name: "g".into(),
            on_violation: policy,
        });
        for (answer_first, fails, input) in schedule {
            if answer_first {
                run.answer(&mut engine, &mut watcher, fails);
            }
            let input = match input {
                GuestEvent::RogueFrameSeen(frame) => {
                    GuestEvent::RogueFrameSeen(RogueFrame { at: Monotonic(run.now), ..frame })
                }
                input => input,
            };
            run.tell(&mut engine, &mut watcher, Event::Guest(GuestId(0), input));
        }
        while run.answer(&mut engine, &mut watcher, false) {}
        let guest = engine.find("g").unwrap();
        if policy == OnViolation::Terminate && run.violated {
            prop_assert_eq!(guest.state(), GuestState::Ended);
        }
        prop_assert!(
            !matches!(guest.state(), GuestState::Condemned | GuestState::Ending),
            "stuck in {}", guest.state()
        );
        let end = GuestEvent::EndRequested(Cause::Shutdown);
        run.tell(&mut engine, &mut watcher, Event::Guest(GuestId(0), end));
        while run.answer(&mut engine, &mut watcher, false) {}
        let guest = engine.find("g").unwrap();
        prop_assert_eq!(guest.state(), GuestState::Ended);
        let ending = guest.ending().unwrap();
        if let Some(incident) = &ending.incident {
            prop_assert!(incident.tap_removed_at >= incident.ended_at);
            prop_assert!(incident.ended_at.is_none() || incident.ended_at >= incident.paused_at);
        }
        watcher.check();
    }
}

/// What comes from the guest and from people, not from the executor.
fn guest_inputs() -> impl Strategy<Value = GuestEvent> {
    prop_oneof![
        6 => frames().prop_map(GuestEvent::RogueFrameSeen),
        4 => Just(GuestEvent::PublicKeyReported("key".into())),
        2 => Just(GuestEvent::HandshakeSeen),
        2 => tunnels().prop_map(GuestEvent::TunnelSeen),
        1 => proptest::sample::select(OnSilence::ALL.to_vec())
            .prop_map(|action| GuestEvent::TunnelSilent { seconds: 1, never: false, action }),
        1 => Just(GuestEvent::Reset),
        1 => Just(GuestEvent::Panicked),
        3 => Just(GuestEvent::HoldRequested),
        3 => Just(GuestEvent::ReleaseRequested),
        1 => Just(GuestEvent::StopRequested { deadline_seconds: 5 }),
        1 => Just(GuestEvent::EndRequested(Cause::Killed)),
        1 => Just(GuestEvent::Exited { message: None }),
    ]
}

struct Run {
    now: u64,
    pending: Vec<Action>,
    violated: bool,
}

impl Run {
    fn tell(&mut self, engine: &mut Engine, watcher: &mut Watcher, event: Event) {
        self.now += 1_000_000;
        let actions = engine.handle(Monotonic(self.now), event.clone());
        watcher.watch(Monotonic(self.now), &event, &actions);
        self.violated |= actions.iter().any(|a| matches!(a, Action::Pause(_)));
        self.pending.extend(actions);
    }

    /// Carries out the oldest action; false if there was none.
    fn answer(&mut self, engine: &mut Engine, watcher: &mut Watcher, fails: bool) -> bool {
        if self.pending.is_empty() {
            return false;
        }
        let action = self.pending.remove(0);
        let at = Monotonic(self.now + 500_000);
        let message = || "it failed".to_owned();
        let answers = match (action, fails) {
            (Action::Launch(_) | Action::Guard(_) | Action::Resume(_), true) => {
                vec![GuestEvent::LaunchFailed {
                    message: message(),
                    leftovers: Vec::new(),
                }]
            }
            (Action::Launch(_), false) => vec![GuestEvent::Launched],
            (Action::Guard(_), false) => vec![GuestEvent::Guarded],
            (Action::Resume(_), false) => vec![GuestEvent::Resumed],
            (Action::Pause(_) | Action::Hold(_), true) => {
                vec![GuestEvent::PauseFailed { message: message() }]
            }
            (Action::Pause(_) | Action::Hold(_), false) => vec![GuestEvent::Paused { at }],
            (Action::Release(_), true) => vec![GuestEvent::ReleaseFailed { message: message() }],
            (Action::Release(_), false) => vec![GuestEvent::Released],
            (Action::PowerDown { .. }, true) => vec![GuestEvent::StopDeadlinePassed],
            (Action::PowerDown { .. }, false) => vec![GuestEvent::Exited { message: None }],
            (Action::Kill(_), _) => {
                vec![
                    GuestEvent::Reaped { at },
                    GuestEvent::Undone {
                        tap_removed_at: Some(at),
                        leftovers: Vec::new(),
                    },
                ]
            }
            (Action::Publish { .. } | Action::Forget(_) | Action::Refuse { .. }, _) => vec![],
        };
        for event in answers {
            self.tell(engine, watcher, Event::Guest(GuestId(0), event));
        }
        true
    }
}
