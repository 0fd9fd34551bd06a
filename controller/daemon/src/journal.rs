//! The history of events, and its readers.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use omerta_api::{Event, Occurrence};
use omerta_engine::ENDED_KEPT;
use tokio::sync::watch;

use crate::clock;

/// How many events of each guest are kept, so that none pushes out another's. Guests that live are
/// bounded, and so are the histories of those that have ended.
pub(crate) const KEPT: usize = 256;
/// How many events a reader is handed at once.
const HANDFUL: usize = 64;

/// The last events of every guest, one line of JSON each.
///
/// Writing never waits for a reader: a reader keeps its own place, and one that falls out of the
/// history is told how many events it missed.
#[derive(Debug)]
pub(crate) struct Journal {
    lines: Mutex<Lines>,
    /// The number of the next event; closed when the daemon stops.
    next: Mutex<Option<watch::Sender<u64>>>,
    lost: AtomicU64,
}

#[derive(Debug, Default)]
struct Lines {
    /// What is kept, by number; the numbers between are of events that are not kept any more.
    kept: BTreeMap<u64, Line>,
    next: u64,
    histories: HashMap<Arc<str>, History>,
    /// Whose history ended, longest ago first.
    ended: VecDeque<Arc<str>>,
}

#[derive(Debug)]
struct Line {
    /// Which of its guest's events it is.
    place: u64,
    json: Arc<str>,
}

/// What a reader is handed: a line, or nothing more for now, and how many it missed before.
type Unread = (u64, Option<Arc<str>>);

/// One guest's events.
#[derive(Debug)]
struct History {
    /// The number of its first event, which tells it from an earlier one of the same guest.
    begun: u64,
    /// The numbers of what is kept, oldest first.
    kept: VecDeque<u64>,
    /// How many there were.
    told: u64,
}

impl Lines {
    fn append(&mut self, event: &Event, json: Arc<str>) {
        let number = self.next;
        self.next += 1;
        let guest: Arc<str> = event.guest.as_deref().unwrap_or_default().into();
        let history = self.histories.entry(Arc::clone(&guest));
        let history = history.or_insert_with(|| History {
            begun: number,
            kept: VecDeque::new(),
            told: 0,
        });
        let place = history.told;
        history.told += 1;
        history.kept.push_back(number);
        if history.kept.len() > KEPT
            && let Some(oldest) = history.kept.pop_front()
        {
            self.kept.remove(&oldest);
        }
        self.ended.retain(|ended| *ended != guest);
        if matches!(event.what, Occurrence::Ended(_)) {
            self.ended.push_back(Arc::clone(&guest));
        }
        self.kept.insert(number, Line { place, json });
        if self.ended.len() > ENDED_KEPT
            && let Some(forgotten) = self.ended.pop_front()
            && let Some(history) = self.histories.remove(&forgotten)
        {
            for number in history.kept {
                self.kept.remove(&number);
            }
        }
    }
}

impl Journal {
    /// An empty history.
    pub(crate) fn new() -> Self {
        Self {
            lines: Mutex::default(),
            next: Mutex::new(Some(watch::Sender::new(0))),
            lost: AtomicU64::new(0),
        }
    }

    /// The number of the next event, as it changes; `None` once the journal is closed.
    pub(crate) fn numbers(&self) -> Option<watch::Receiver<u64>> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.as_ref().map(watch::Sender::subscribe)
    }

    /// Adds an event.
    pub(crate) fn append(&self, event: &Event) {
        let json = match serde_json::to_string(event) {
            Ok(json) => json,
            Err(error) => {
                tracing::error!(%error, "an event could not be written as JSON and is left out");
                return;
            }
        };
        let next = {
            let mut lines = lock(&self.lines);
            lines.append(event, json.into());
            lines.next
        };
        if let Some(sender) = lock(&self.next).as_ref() {
            sender.send_replace(next);
        }
    }

    /// Whether there are events of the guest.
    pub(crate) fn knows(&self, guest: &str) -> bool {
        lock(&self.lines).histories.contains_key(guest)
    }

    /// Ends every reader that follows.
    pub(crate) fn close(&self) {
        lock(&self.next).take();
    }

    /// How many events readers were told that they missed.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// A reader at the beginning of the history, of one guest's events or all.
    pub(crate) fn reader(self: &Arc<Self>, guest: Option<String>, follow: bool) -> Reader {
        // Before the history is looked at: what comes between is news.
        let news = lock(&self.next)
            .as_ref()
            .filter(|_| follow)
            .map(watch::Sender::subscribe);
        let lines = lock(&self.lines);
        let history = guest
            .as_deref()
            .and_then(|guest| lines.histories.get(guest));
        let (begun, due) = match (&guest, history) {
            (Some(_), Some(history)) => (history.begun, history.told),
            (Some(_), None) => (0, 0),
            (None, _) => (0, lines.next),
        };
        Reader {
            journal: Arc::clone(self),
            place: 0,
            begun,
            due,
            guest,
            news,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One reader's place in the history.
#[derive(Debug)]
pub(crate) struct Reader {
    journal: Arc<Journal>,
    /// The number of the next event to read.
    place: u64,
    /// Which history of its guest it reads, for a reader of one guest.
    begun: u64,
    /// The next event of its own kind that it can miss: what was gone before it came it never had.
    due: u64,
    guest: Option<String>,
    /// Absent for a reader that does not follow.
    news: Option<watch::Receiver<u64>>,
}

impl Reader {
    /// The next lines, each ended by a newline; none at the end of the history, or, when
    /// following, once the journal is closed.
    pub(crate) async fn next(&mut self) -> Option<String> {
        loop {
            let text = self.unread();
            if !text.is_empty() {
                return Some(text);
            }
            // `changed` also returns for what was appended between reading and waiting.
            self.news.as_mut()?.changed().await.ok()?;
        }
    }

    fn unread(&mut self) -> String {
        let journal = Arc::clone(&self.journal);
        let unread = {
            let lines = lock(&journal.lines);
            match self.guest.clone() {
                Some(guest) => self.of_guest(&lines, &guest),
                None => self.of_all(&lines),
            }
        };
        let mut text = String::new();
        for (missed, line) in unread {
            if missed > 0 {
                journal.lost.fetch_add(missed, Ordering::Relaxed);
                let event = Event {
                    at: clock::rfc3339(clock::now()),
                    guest: None,
                    what: Occurrence::Lost { events: missed },
                };
                text.push_str(&serde_json::to_string(&event).unwrap_or_default());
                text.push('\n');
            }
            if let Some(line) = line {
                text.push_str(&line);
                text.push('\n');
            }
        }
        text
    }

    /// The next lines of all guests, in the order in which they were written.
    fn of_all(&mut self, lines: &Lines) -> Vec<Unread> {
        let mut unread = Vec::new();
        for (&number, line) in lines.kept.range(self.place..).take(HANDFUL) {
            self.place = number + 1;
            unread.push((self.missed_before(number), Some(Arc::clone(&line.json))));
        }
        if unread.len() < HANDFUL {
            self.place = lines.next;
            unread.push((self.missed_at_end(lines.next), None));
        }
        unread
    }

    /// The next lines of one guest.
    fn of_guest(&mut self, lines: &Lines, guest: &str) -> Vec<Unread> {
        let mut unread = Vec::new();
        let Some(history) = lines.histories.get(guest) else {
            return unread;
        };
        if history.begun != self.begun {
            (self.begun, self.due) = (history.begun, 0);
        }
        let from = history.kept.partition_point(|number| *number < self.place);
        for &number in history.kept.range(from..).take(HANDFUL) {
            let Some(line) = lines.kept.get(&number) else {
                continue;
            };
            self.place = number + 1;
            unread.push((self.missed_before(line.place), Some(Arc::clone(&line.json))));
        }
        if unread.len() < HANDFUL {
            unread.push((self.missed_at_end(history.told), None));
        }
        unread
    }

    /// How many were missed before the `place`-th.
    fn missed_before(&mut self, place: u64) -> u64 {
        if place < self.due {
            return 0;
        }
        let missed = place - self.due;
        self.due = place + 1;
        missed
    }

    /// How many were missed where nothing more is kept and there were `told`.
    fn missed_at_end(&mut self, told: u64) -> u64 {
        let missed = told.saturating_sub(self.due);
        self.due = self.due.max(told);
        missed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(guest: &str, key: usize) -> Event {
        Event {
            at: "2026-01-01T00:00:00.000000Z".into(),
            guest: Some(guest.into()),
            what: Occurrence::PublicKey {
                public_key: key.to_string(),
            },
        }
    }

    fn parse(text: &str) -> Vec<Event> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn history_is_read_once_and_ends() {
        let journal = Arc::new(Journal::new());
        journal.append(&event("a", 1));
        journal.append(&event("b", 2));
        let mut reader = journal.reader(None, false);
        assert_eq!(
            parse(&reader.next().await.unwrap()),
            [event("a", 1), event("b", 2)]
        );
        assert_eq!(reader.next().await, None);
        let mut reader = journal.reader(Some("b".into()), false);
        assert_eq!(parse(&reader.next().await.unwrap()), [event("b", 2)]);
    }

    async fn read(reader: &mut Reader) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(text) = reader.next().await {
            events.extend(parse(&text));
        }
        events
    }

    fn ended(guest: &str) -> Event {
        let ended = r#"{"at":"2026-01-01T00:00:00Z","kind":"ended","cause":"killed"}"#;
        Event {
            guest: Some(guest.into()),
            ..serde_json::from_str(ended).unwrap()
        }
    }

    #[tokio::test]
    async fn flood_of_one_guest_leaves_the_events_of_others() {
        let journal = Arc::new(Journal::new());
        journal.append(&event("quiet", 1));
        for key in 0..20 * KEPT {
            journal.append(&event("noisy", key));
            if key == 10 {
                journal.append(&event("quiet", 2));
            }
        }
        let quiet = [event("quiet", 1), event("quiet", 2)];
        let mut reader = journal.reader(Some("quiet".into()), false);
        assert_eq!(read(&mut reader).await, quiet);
        let all = read(&mut journal.reader(None, false)).await;
        assert_eq!(all[..2], quiet);
        assert_eq!(all.len(), 2 + KEPT);
        assert_eq!(all.last(), Some(&event("noisy", 20 * KEPT - 1)));
        assert_eq!(journal.lost(), 0, "what was gone before is no loss");
    }

    #[tokio::test]
    async fn follower_of_a_quiet_guest_misses_nothing_of_it_in_a_flood() {
        let journal = Arc::new(Journal::new());
        let mut quiet = journal.reader(Some("quiet".into()), false);
        let mut all = journal.reader(None, false);
        journal.append(&event("quiet", 1));
        for key in 0..2 * KEPT {
            journal.append(&event("noisy", key));
        }
        journal.append(&event("quiet", 2));
        let own = [event("quiet", 1), event("quiet", 2)];
        assert_eq!(read(&mut quiet).await, own);
        let seen = read(&mut all).await;
        let lost = Occurrence::Lost {
            events: KEPT as u64,
        };
        assert_eq!((&seen[0], &seen[1].what), (&own[0], &lost), "in its place");
        assert_eq!(seen.len(), 3 + KEPT);
    }

    #[tokio::test]
    async fn histories_of_ended_guests_are_bounded_and_the_newest_kept() {
        let journal = Arc::new(Journal::new());
        journal.append(&event("alive", 0));
        for number in 0..2 * ENDED_KEPT {
            let name = format!("g{number}");
            journal.append(&event(&name, number));
            journal.append(&ended(&name));
        }
        assert!(journal.knows("alive") && !journal.knows("g0"));
        assert!(journal.knows(&format!("g{}", 2 * ENDED_KEPT - 1)));
        let all = read(&mut journal.reader(None, false)).await;
        assert_eq!(all.len(), 1 + 2 * ENDED_KEPT);
        // A guest that lives again is none of the ended ones.
        let reused = format!("g{ENDED_KEPT}");
        journal.append(&event(&reused, 7));
        for number in 0..2 * ENDED_KEPT {
            journal.append(&ended(&format!("h{number}")));
        }
        let mut reader = journal.reader(Some(reused), false);
        assert_eq!(read(&mut reader).await.len(), 3);
    }

    #[tokio::test]
    async fn follower_of_a_forgotten_guest_reads_the_next_of_that_name() {
        let journal = Arc::new(Journal::new());
        journal.append(&event("a", 1));
        let mut reader = journal.reader(Some("a".into()), false);
        assert_eq!(read(&mut reader).await, [event("a", 1)]);
        journal.append(&ended("a"));
        for number in 0..ENDED_KEPT {
            journal.append(&ended(&format!("h{number}")));
        }
        assert!(!journal.knows("a"));
        journal.append(&event("a", 2));
        assert_eq!(read(&mut reader).await, [event("a", 2)]);
    }

    #[tokio::test]
    async fn slow_reader_is_told_how_many_it_missed_and_blocks_nobody() {
        let journal = Arc::new(Journal::new());
        let mut reader = journal.reader(None, false);
        for key in 0..KEPT + 7 {
            journal.append(&event("a", key));
        }
        let events = read(&mut reader).await;
        assert_eq!(events[0].what, Occurrence::Lost { events: 7 });
        assert_eq!(events[1], event("a", 7));
        assert_eq!(events.len(), KEPT + 1);
        assert_eq!(journal.lost(), 7);
    }

    #[tokio::test]
    async fn follower_waits_for_news_and_ends_with_the_journal() {
        let journal = Arc::new(Journal::new());
        let mut reader = journal.reader(None, true);
        let writer = Arc::clone(&journal);
        let write = async move {
            tokio::task::yield_now().await;
            writer.append(&event("a", 1));
        };
        let (text, ()) = tokio::join!(reader.next(), write);
        assert_eq!(parse(&text.unwrap()), [event("a", 1)]);
        journal.close();
        assert_eq!(reader.next().await, None);
    }
}
