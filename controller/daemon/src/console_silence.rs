//! Whether a guest's own firewall keeps silent where its image says that it speaks: its guard drops what the guest sends,
//! so that firewall is gone, got around or kept from the console.

use std::time::Duration;

use omerta_engine::GuestEvent;
use tokio::time::{Instant, sleep_until};

/// What a guest prints is read once a second, and an emulated one takes its time.
const PATIENCE: Duration = Duration::from_secs(5);

/// Of one guest. A single line that was ever heard ends the silence, and anyone in the guest can print it.
#[derive(Debug)]
pub(crate) struct ConsoleSilence {
    is_expected_to_speak: bool,
    due: Option<Instant>,
}

impl ConsoleSilence {
    /// Of a guest of whose image it is said that its firewall is heard on the console, or not.
    pub(crate) const fn new(is_expected_to_speak: bool) -> Self {
        Self {
            is_expected_to_speak,
            due: None,
        }
    }

    /// Its guard dropped a frame that is held against it.
    pub(crate) fn dropped(&mut self) {
        if self.is_expected_to_speak {
            self.due.get_or_insert_with(|| Instant::now() + PATIENCE);
        }
    }

    /// Its firewall was heard.
    pub(crate) const fn heard(&mut self) {
        *self = Self::new(false);
    }

    /// Comes where a frame was dropped and nothing was heard for a while. Safe to cancel.
    pub(crate) async fn found(&mut self) -> GuestEvent {
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
        // The next frame asks again: a guest that stood still could not speak.
        self.due = None;
        GuestEvent::ConsoleSilent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn silence_is_found_once_for_a_frame_where_a_line_was_promised() {
        let mut silence = ConsoleSilence::new(true);
        assert_eq!(silence.due, None);
        for _ in 0..2 {
            silence.dropped();
            let due = silence.due;
            assert!(due.is_some());
            // Another one puts it off no longer.
            silence.dropped();
            assert_eq!(silence.due, due);
            silence.due = Some(Instant::now());
            assert_eq!(silence.found().await, GuestEvent::ConsoleSilent);
            assert_eq!(silence.due, None);
        }
    }

    #[test]
    fn a_guest_that_was_heard_or_that_promised_nothing_is_not_silent() {
        let mut heard = ConsoleSilence::new(true);
        heard.dropped();
        heard.heard();
        assert_eq!(heard.due, None);
        heard.dropped();
        assert_eq!(heard.due, None);
        let mut silence = ConsoleSilence::new(false);
        silence.dropped();
        assert_eq!(silence.due, None);
    }
}
