//! The history of events, and its readers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use omerta_api::{Event, Occurrence};
use tokio::sync::watch;

use crate::clock;

/// How many events are kept.
pub(crate) const KEPT: usize = 1024;

/// The last events, one line of JSON each.
///
/// Writing never waits for a reader: a reader keeps its own place, and one that falls out of the
/// history is told how many events it missed.
#[derive(Debug)]
pub(crate) struct Journal {
    lines: Mutex<Lines>,
    /// The number of the next event; closed when the daemon stops.
    next: Mutex<Option<watch::Sender<u64>>>,
    lost: std::sync::atomic::AtomicU64,
}

#[derive(Debug, Default)]
struct Lines {
    kept: VecDeque<Line>,
    /// The number of the oldest line kept.
    first: u64,
}

#[derive(Clone, Debug)]
struct Line {
    guest: Arc<str>,
    json: Arc<str>,
}

impl Journal {
    /// An empty history.
    pub(crate) fn new() -> Self {
        Self {
            lines: Mutex::default(),
            next: Mutex::new(Some(watch::Sender::new(0))),
            lost: std::sync::atomic::AtomicU64::new(0),
        }
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
        let guest = event.guest.as_deref().unwrap_or_default().into();
        let next = {
            let mut lines = lock(&self.lines);
            lines.kept.push_back(Line {
                guest,
                json: json.into(),
            });
            if lines.kept.len() > KEPT {
                lines.kept.pop_front();
                lines.first += 1;
            }
            lines.first + lines.kept.len() as u64
        };
        if let Some(sender) = lock(&self.next).as_ref() {
            sender.send_replace(next);
        }
    }

    /// Ends every reader that follows.
    pub(crate) fn close(&self) {
        lock(&self.next).take();
    }

    /// How many events readers were told that they missed.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// A reader at the beginning of the history, of one guest's events or all.
    pub(crate) fn reader(self: &Arc<Self>, guest: Option<String>, follow: bool) -> Reader {
        Reader {
            place: lock(&self.lines).first,
            news: lock(&self.next)
                .as_ref()
                .filter(|_| follow)
                .map(watch::Sender::subscribe),
            journal: Arc::clone(self),
            guest,
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
    place: u64,
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
        let (missed, lines) = {
            let lines = lock(&self.journal.lines);
            let missed = lines.first.saturating_sub(self.place);
            let skip =
                usize::try_from(self.place.saturating_sub(lines.first)).unwrap_or(usize::MAX);
            let unread: Vec<Line> = lines.kept.iter().skip(skip).cloned().collect();
            self.place = lines.first + lines.kept.len() as u64;
            (missed, unread)
        };
        let mut text = String::new();
        if missed > 0 {
            self.journal
                .lost
                .fetch_add(missed, std::sync::atomic::Ordering::Relaxed);
            let event = Event {
                at: clock::rfc3339(clock::now()),
                guest: None,
                what: Occurrence::Lost { events: missed },
            };
            text.push_str(&serde_json::to_string(&event).unwrap_or_default());
            text.push('\n');
        }
        for line in lines {
            if self
                .guest
                .as_deref()
                .is_none_or(|guest| guest == &*line.guest)
            {
                text.push_str(&line.json);
                text.push('\n');
            }
        }
        text
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

    #[tokio::test]
    async fn slow_reader_is_told_how_many_it_missed_and_blocks_nobody() {
        let journal = Arc::new(Journal::new());
        let mut reader = journal.reader(None, true);
        for key in 0..KEPT + 7 {
            journal.append(&event("a", key));
        }
        let events = parse(&reader.next().await.unwrap());
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
