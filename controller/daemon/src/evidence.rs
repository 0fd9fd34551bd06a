//! What one guest was caught with: the last frames that its guard dropped, and the entries of the record of
//! incidents that follow from what the engine says of it.

use std::collections::{BTreeSet, VecDeque};

use omerta_dataplane::FrameEvent;
use omerta_engine::{GuestId, Incident as Caught, Monotonic, OnViolation, Record};
use omerta_incidents::{Deed, Frame, Incident, Outcome, What, Witness};

use crate::cases::Past;
use crate::clock;

/// How many frames are kept of a guest: before an incident, and after.
const KEPT: usize = 32;

/// Of one guest.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// Frames older than this are not the guest's: it had not run yet.
    since: u64,
    frames: VecDeque<FrameEvent>,
    cases: u64,
    /// What its agent has been recorded for.
    agent: BTreeSet<&'static str>,
    /// Whether what is heard on its console has been recorded.
    console: bool,
    /// The incident that what is done to the guest is about.
    open: Option<String>,
}

/// Whose evidence it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whose<'a> {
    pub(crate) id: GuestId,
    pub(crate) name: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) consumer: &'a str,
    pub(crate) on_violation: OnViolation,
}

impl Evidence {
    /// The guest runs from `at` on.
    pub(crate) fn runs_since(&mut self, at: Monotonic) {
        self.since = at.0;
    }

    /// The same, of a guest that was taken over: its cases are counted on, and the one that has no end is still what is
    /// done to it.
    pub(crate) fn goes_on(&mut self, since: Monotonic, past: Past) {
        self.since = since.0;
        self.cases = past.last;
        self.open = past.open.into_iter().next_back().map(|open| open.case);
    }

    /// Whether a frame of then was sent by the guest.
    pub(crate) const fn is_its_own(&self, at: Monotonic) -> bool {
        at.0 >= self.since
    }

    /// Its guard dropped `frame`.
    pub(crate) fn dropped(&mut self, frame: &FrameEvent) {
        if frame.at_ns < self.since {
            return;
        }
        if self.frames.len() == KEPT {
            self.frames.pop_front();
        }
        self.frames.push_back(frame.clone());
    }

    /// What is to be recorded of `record`. `epoch` is asked where that is an incident.
    pub(crate) fn of(
        &mut self,
        record: &Record,
        whose: Whose<'_>,
        epoch: impl FnOnce() -> Option<u64>,
    ) -> Option<What> {
        match record {
            Record::Rogue {
                frame,
                action,
                inference,
                first,
                ..
            } => {
                let acts = matches!(action, OnViolation::Pause | OnViolation::Terminate);
                // A guest that is only reported gets one entry for each reason: none turns the record over.
                if !acts && !first {
                    return None;
                }
                let case = self.case(whose, acts);
                let mut frames: Vec<_> = self.frames.drain(..).collect();
                let caught = frames
                    .iter()
                    .rposition(|seen| seen.at_ns == frame.at.0 && seen.reason == frame.reason);
                let after = caught.map_or_else(Vec::new, |at| frames.split_off(at + 1));
                let caught = caught.and_then(|_| frames.pop());
                self.frames.extend(after);
                Some(What::Incident(Box::new(Incident {
                    case,
                    guest: whose.name.to_owned(),
                    interface: whose.interface.to_owned(),
                    consumer: whose.consumer.to_owned(),
                    witnesses: vec![Witness::Kernel],
                    attempt: inference.attempt.word().to_owned(),
                    inferred_from: inference.from.clone(),
                    action: action.word().to_owned(),
                    epoch: epoch(),
                    frame: Some(Frame {
                        at_ns: clock::wall_ns(frame.at),
                        direction: frame.direction.word().to_owned(),
                        reason: frame.reason.word().to_owned(),
                        length: frame.length,
                        bytes: caught.map_or_else(String::new, |seen| hex(&seen.head)),
                        text: frame.description.clone(),
                    }),
                    before: frames.iter().map(as_frame).collect(),
                })))
            }
            // As of frames: one entry for each thing that its agent is held to account for.
            Record::Agent(report) if report.is_violation() && self.agent.insert(report.word()) => {
                let action = whose.on_violation;
                let acts = matches!(action, OnViolation::Pause | OnViolation::Terminate);
                let case = self.case(whose, acts);
                let what = report
                    .what()
                    .map_or_else(String::new, |what| format!(": {what}"));
                Some(What::Incident(Box::new(Incident {
                    case,
                    guest: whose.name.to_owned(),
                    interface: whose.interface.to_owned(),
                    consumer: whose.consumer.to_owned(),
                    witnesses: vec![Witness::Agent],
                    attempt: "agent".to_owned(),
                    inferred_from: format!("its agent: {}{what}", report.word()),
                    action: action.word().to_owned(),
                    epoch: epoch(),
                    frame: None,
                    before: self
                        .frames
                        .drain(..)
                        .map(|frame| as_frame(&frame))
                        .collect(),
                })))
            }
            // The guest decides what stands there: one entry, and never what is done to the guest is about it.
            Record::Console(report) if !std::mem::replace(&mut self.console, true) => {
                let said = format!(
                    "its console: {} blocked, {} bytes unread: {}",
                    report.attempts, report.unread, report.line
                );
                Some(self.told(whose, Witness::Console, "console", said, epoch()))
            }
            Record::Outside(found) => {
                let said = format!("this host has {found}");
                Some(self.told(whose, Witness::Outside, "outside", said, epoch()))
            }
            Record::ConsoleSilent => {
                let said = "its guard drops what it sends, and its own firewall says nothing of that on its console";
                Some(self.told(whose, Witness::Console, "silence", said.to_owned(), epoch()))
            }
            Record::Paused(caught) => self.outcome(whose, Deed::Paused, Some(caught), None),
            Record::PauseFailed { message } => {
                self.outcome(whose, Deed::PauseFailed, None, Some(message.clone()))
            }
            Record::Ended(ending) => {
                let mut said: Vec<_> = ending.message.iter().cloned().collect();
                said.extend(ending.leftovers.iter().cloned());
                let message = (!said.is_empty()).then(|| said.join("; "));
                let outcome = self.outcome(whose, Deed::Ended, ending.incident.as_ref(), message);
                self.open = None;
                outcome
            }
            _ => None,
        }
    }

    /// An incident without a frame, of which nothing is done but that it is told.
    fn told(
        &mut self,
        whose: Whose<'_>,
        witness: Witness,
        attempt: &str,
        inferred_from: String,
        epoch: Option<u64>,
    ) -> What {
        What::Incident(Box::new(Incident {
            case: self.case(whose, false),
            guest: whose.name.to_owned(),
            interface: whose.interface.to_owned(),
            consumer: whose.consumer.to_owned(),
            witnesses: vec![witness],
            attempt: attempt.to_owned(),
            inferred_from,
            action: OnViolation::Alert.word().to_owned(),
            epoch,
            frame: None,
            before: Vec::new(),
        }))
    }

    /// The name of a new incident, which what is done from now on is about where it acts.
    fn case(&mut self, whose: Whose<'_>, acts: bool) -> String {
        self.cases += 1;
        let case = format!("{}-{}", whose.id.0, self.cases);
        if acts {
            self.open = Some(case.clone());
        }
        case
    }

    /// What was done, where that is about an incident.
    fn outcome(
        &mut self,
        whose: Whose<'_>,
        deed: Deed,
        caught: Option<&Caught>,
        message: Option<String>,
    ) -> Option<What> {
        let case = self.open.clone()?;
        Some(What::Outcome(Box::new(Outcome {
            case,
            guest: whose.name.to_owned(),
            deed,
            frame_to_paused_us: caught.and_then(Caught::frame_to_paused_us),
            frame_to_ended_us: caught.and_then(Caught::frame_to_ended_us),
            frame_to_tap_removed_us: caught.and_then(Caught::frame_to_tap_removed_us),
            message,
            since: self
                .frames
                .drain(..)
                .map(|frame| as_frame(&frame))
                .collect(),
        })))
    }
}

fn as_frame(frame: &FrameEvent) -> Frame {
    Frame {
        at_ns: clock::wall_ns(Monotonic(frame.at_ns)),
        direction: frame.direction.word().to_owned(),
        reason: frame.reason.word().to_owned(),
        length: frame.length,
        bytes: hex(&frame.head),
        text: frame.describe(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use omerta_engine::{
        AgentReport, Attempt, Cause, ConsoleReport, Ending, Inference, RogueFrame,
    };
    use omerta_verdict::{Direction, Reason};

    use super::*;

    const WHOSE: Whose<'_> = Whose {
        id: GuestId(7),
        name: "alpha",
        interface: "omalpha",
        consumer: "KEY@192.0.2.10:51820",
        on_violation: OnViolation::Terminate,
    };

    fn seen(at: u64) -> FrameEvent {
        FrameEvent {
            at_ns: at,
            ifindex: 1,
            direction: Direction::Egress,
            reason: Reason::Endpoint,
            length: 98,
            head: at.to_be_bytes().to_vec(),
        }
    }

    fn caught(at: u64) -> RogueFrame {
        RogueFrame {
            at: Monotonic(at),
            direction: Direction::Egress,
            reason: Reason::Endpoint,
            length: 98,
            description: "frame".into(),
            target: None,
        }
    }

    fn rogue(at: u64, action: OnViolation, first: bool) -> Record {
        Record::Rogue {
            frame: caught(at),
            action,
            inference: Inference {
                attempt: Attempt::Stranger,
                from: "a test".into(),
            },
            first,
            suppressed: 0,
        }
    }

    #[test]
    fn an_incident_holds_its_frame_and_those_before_and_its_outcome_those_since() {
        let mut evidence = Evidence::default();
        evidence.runs_since(Monotonic(10));
        for at in [1, 11, 12, 13] {
            evidence.dropped(&seen(at));
        }
        let record = rogue(13, OnViolation::Terminate, true);
        let Some(What::Incident(incident)) = evidence.of(&record, WHOSE, || Some(3)) else {
            panic!("no incident");
        };
        assert_eq!((incident.case.as_str(), incident.epoch), ("7-1", Some(3)));
        let frame = incident.frame.as_ref().unwrap();
        assert_eq!(frame.bytes, "000000000000000d");
        let before: Vec<_> = incident.before.iter().map(|f| f.bytes.as_str()).collect();
        assert_eq!(before, ["000000000000000b", "000000000000000c"]);
        evidence.dropped(&seen(14));
        let mut case = Caught::new(caught(13));
        case.paused_at = Some(Monotonic(5013));
        let Some(What::Outcome(outcome)) =
            evidence.of(&Record::Paused(case.clone()), WHOSE, || None)
        else {
            panic!("no outcome");
        };
        assert_eq!((outcome.case.as_str(), outcome.deed), ("7-1", Deed::Paused));
        assert_eq!(
            (outcome.frame_to_paused_us, outcome.since.len()),
            (Some(5), 1)
        );
        let ending = Record::Ended(Ending {
            cause: Cause::Rogue,
            incident: Some(case),
            message: None,
            leftovers: vec!["its tap".into()],
        });
        let Some(What::Outcome(outcome)) = evidence.of(&ending, WHOSE, || None) else {
            panic!("no outcome");
        };
        assert_eq!(
            (outcome.deed, outcome.message.as_deref()),
            (Deed::Ended, Some("its tap"))
        );
    }

    #[test]
    fn a_flood_of_a_guest_that_is_only_reported_is_one_entry_and_a_bounded_one() {
        let mut evidence = Evidence::default();
        let mut entries = Vec::new();
        for at in 0..1000 {
            evidence.dropped(&seen(at));
            entries.extend(evidence.of(&rogue(at, OnViolation::Alert, at == 500), WHOSE, || None));
        }
        assert_eq!(entries.len(), 1);
        let What::Incident(incident) = &entries[0] else {
            panic!("no incident");
        };
        assert_eq!(incident.before.len(), KEPT - 1);
    }

    #[test]
    fn an_agent_that_is_missed_is_an_incident_without_a_frame_and_recorded_once() {
        let mut evidence = Evidence::default();
        let missed = Record::Agent(AgentReport::Missed);
        let sound = Record::Agent(AgentReport::Sound);
        assert_eq!(evidence.of(&sound, WHOSE, || None), None);
        let Some(What::Incident(incident)) = evidence.of(&missed, WHOSE, || Some(1)) else {
            panic!("no incident");
        };
        assert_eq!(incident.witnesses, [Witness::Agent]);
        assert_eq!(
            (incident.frame, incident.action.as_str()),
            (None, "terminate")
        );
        assert_eq!(evidence.of(&missed, WHOSE, || None), None);
        let ending = Record::Ended(Ending {
            cause: Cause::Agent,
            incident: None,
            message: Some("its agent: missed".into()),
            leftovers: Vec::new(),
        });
        let Some(What::Outcome(outcome)) = evidence.of(&ending, WHOSE, || None) else {
            panic!("no outcome");
        };
        assert_eq!((outcome.case, outcome.deed), (incident.case, Deed::Ended));
    }

    #[test]
    fn a_console_is_recorded_once_and_takes_neither_the_frames_nor_the_outcome_of_an_incident() {
        let mut evidence = Evidence::default();
        let heard = Record::Console(ConsoleReport {
            attempts: 1,
            unread: 0,
            line: "OUT=eth0".into(),
        });
        evidence.dropped(&seen(1));
        let Some(What::Incident(told)) = evidence.of(&heard, WHOSE, || Some(1)) else {
            panic!("no incident");
        };
        assert_eq!(told.witnesses, [Witness::Console]);
        assert_eq!(told.action, "alert");
        assert_eq!(evidence.of(&heard, WHOSE, || None), None);
        evidence.dropped(&seen(2));
        let record = rogue(2, OnViolation::Terminate, true);
        let Some(What::Incident(incident)) = evidence.of(&record, WHOSE, || None) else {
            panic!("no incident");
        };
        assert_eq!(incident.before.len(), 1);
        assert_ne!(incident.case, told.case);
    }

    #[test]
    fn what_is_done_for_other_reasons_is_no_outcome() {
        let mut evidence = Evidence::default();
        let ending = Record::Ended(Ending {
            cause: Cause::Killed,
            incident: None,
            message: None,
            leftovers: Vec::new(),
        });
        assert_eq!(evidence.of(&ending, WHOSE, || None), None);
    }
}
