//! What the record of incidents says of the guests of omertads before this one: how many cases each has had, and which of
//! them have no end. It is read once, before any guest is taken over.

use std::collections::BTreeMap;

use omerta_engine::{GuestId, OnViolation};
use omerta_incidents::{Deed, Entry, Outcome, What};

/// An incident that was acted on, and of whose guest no end is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    /// Its name.
    pub(crate) case: String,
    guest: String,
    /// Whether its guest was to be ended for it, and not only to stand still.
    pub(crate) ends: bool,
    /// Whether anything is recorded of what was done.
    pub(crate) has_outcome: bool,
}

impl Open {
    /// What is done about it by an omertad that was not there when it began. How long that took since is not known.
    pub(crate) fn outcome(&self, deed: Deed, message: &str) -> What {
        What::Outcome(Box::new(Outcome {
            case: self.case.clone(),
            guest: self.guest.clone(),
            deed,
            frame_to_paused_us: None,
            frame_to_ended_us: None,
            frame_to_tap_removed_us: None,
            message: Some(message.to_owned()),
            since: Vec::new(),
        }))
    }
}

/// Of one guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Past {
    /// The number of its last case.
    pub(crate) last: u64,
    /// Its cases that have no end.
    pub(crate) open: Vec<Open>,
}

/// Of every guest that the record knows.
#[derive(Debug, Default)]
pub(crate) struct Cases(BTreeMap<GuestId, Past>);

impl Cases {
    /// Takes in the next entry of the record.
    pub(crate) fn read(&mut self, entry: &Entry) {
        match &entry.what {
            What::Incident(incident) => {
                let Some((id, number)) = numbers(&incident.case) else {
                    return;
                };
                let past = self.0.entry(id).or_default();
                past.last = past.last.max(number);
                let is = |action: OnViolation| incident.action == action.word();
                if is(OnViolation::Pause) || is(OnViolation::Terminate) {
                    past.open.push(Open {
                        case: incident.case.clone(),
                        guest: incident.guest.clone(),
                        ends: is(OnViolation::Terminate),
                        has_outcome: false,
                    });
                }
            }
            What::Outcome(outcome) => {
                let Some(past) = numbers(&outcome.case).and_then(|(id, _)| self.0.get_mut(&id))
                else {
                    return;
                };
                if outcome.deed == Deed::Ended {
                    past.open.retain(|open| open.case != outcome.case);
                }
                for open in &mut past.open {
                    open.has_outcome |= open.case == outcome.case;
                }
            }
            What::Lost { .. } | What::Removed { .. } | What::Damaged { .. } => {}
        }
    }

    /// The first id that no guest in the record has.
    pub(crate) fn first_free(&self) -> GuestId {
        let last = self.0.last_key_value().map_or(0, |(id, _)| id.0);
        GuestId(last.saturating_add(1))
    }

    /// What is known of a guest that there is a row of.
    pub(crate) fn take(&mut self, id: GuestId) -> Past {
        self.0.remove(&id).unwrap_or_default()
    }

    /// The cases that have no end, of guests that were not asked for.
    pub(crate) fn left(self) -> impl Iterator<Item = Open> {
        self.0.into_values().flat_map(|past| past.open)
    }
}

/// The guest's number and its case's own.
fn numbers(case: &str) -> Option<(GuestId, u64)> {
    let (id, number) = case.split_once('-')?;
    Some((GuestId(id.parse().ok()?), number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use omerta_incidents::{Digest, Incident, Witness};

    use super::*;

    fn entry(what: What) -> Entry {
        Entry {
            number: 1,
            previous: Digest::NONE,
            at: String::new(),
            program: String::new(),
            what,
        }
    }

    fn incident(case: &str, action: OnViolation) -> What {
        What::Incident(Box::new(Incident {
            case: case.into(),
            guest: "alpha".into(),
            interface: "omalpha".into(),
            consumer: String::new(),
            witnesses: vec![Witness::Kernel],
            attempt: "dns".into(),
            inferred_from: String::new(),
            action: action.word().into(),
            epoch: None,
            frame: None,
            before: Vec::new(),
        }))
    }

    fn of(entries: impl IntoIterator<Item = What>) -> Cases {
        let mut cases = Cases::default();
        for what in entries {
            cases.read(&entry(what));
        }
        cases
    }

    #[test]
    fn what_was_acted_on_is_open_until_its_guest_has_ended_and_what_was_told_never_is() {
        let open = of([incident("7-1", OnViolation::Terminate)]).take(GuestId(7));
        assert!(open.open[0].ends && !open.open[0].has_outcome, "{open:?}");
        let paused = open.open[0].outcome(Deed::Paused, "");
        let ended = open.open[0].outcome(Deed::Ended, "");
        let mut cases = of([
            incident("7-1", OnViolation::Terminate),
            incident("8-1", OnViolation::Alert),
            incident("9-1", OnViolation::Pause),
            paused,
            ended,
            incident("7-2", OnViolation::Alert),
            incident("not a case", OnViolation::Terminate),
        ]);
        assert_eq!(cases.first_free(), GuestId(10));
        let seven = cases.take(GuestId(7));
        assert_eq!((seven.last, seven.open.len()), (2, 0));
        assert_eq!(cases.take(GuestId(7)), Past::default());
        let left: Vec<_> = cases.left().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert!(left[0].case == "9-1" && !left[0].ends, "{left:?}");
    }

    #[test]
    fn a_guest_that_was_paused_has_an_outcome_and_no_end() {
        let what = incident("7-3", OnViolation::Pause);
        let open = of([what.clone()]).take(GuestId(7)).open;
        let past = of([what, open[0].outcome(Deed::Paused, "")]).take(GuestId(7));
        assert_eq!(past.last, 3);
        assert!(past.open[0].has_outcome, "{past:?}");
    }

    #[test]
    fn a_record_without_guests_leaves_every_number_free() {
        assert_eq!(Cases::default().first_free(), GuestId(1));
    }
}
