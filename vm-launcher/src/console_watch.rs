//! What a guest's own firewall says on its console of what it blocked. Everything there is the guest's word: it
//! can be forged, torn and silenced, so a line is counted and told, and nothing is done to the guest for it.

/// What a firewall's line begins with, after the kernel's time.
const PREFIX: &[u8] = b"ROGUE-ATTEMPT: ";
/// Of a line, so much is looked at: the kernel's are shorter.
const MAX_LINE_BYTES: usize = 512;
/// Of what such a line says, so much is kept.
const MAX_TEXT_BYTES: usize = 200;

/// What has been heard of a guest's console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleReport {
    /// Lines of blocked packets, since the guest is watched.
    pub attempts: u64,
    /// Bytes that the guest printed faster than its console is read, since it is watched.
    pub unread: u64,
    /// The last of the lines after its prefix, in printable ASCII.
    pub line: String,
}

/// Reads a console in whatever pieces it comes.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConsoleWatch {
    /// The line under way, as far as it is looked at.
    line: Vec<u8>,
    heard: ConsoleReport,
    told: (u64, u64),
}

impl ConsoleWatch {
    /// The guest has printed `bytes`.
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        let mut pieces = bytes.split(|byte| matches!(byte, b'\n' | b'\r'));
        let last = pieces.next_back().unwrap_or_default();
        for piece in pieces {
            self.extend(piece);
            self.end_line();
        }
        self.extend(last);
    }

    /// The guest has printed `bytes` bytes more that are not read: what comes next begins amid a line.
    pub(crate) fn skipped(&mut self, bytes: u64) {
        self.line.clear();
        self.heard.unread = self.heard.unread.saturating_add(bytes);
    }

    /// What is to be told: the first of either, and then once they have doubled. So a guest that prints for ever is
    /// told of some sixty times.
    pub(crate) fn take(&mut self) -> Option<ConsoleReport> {
        let now = (self.heard.attempts, self.heard.unread);
        let has_doubled = |now: u64, told: u64| now > told && now >= told.saturating_mul(2);
        if !has_doubled(now.0, self.told.0) && !has_doubled(now.1, self.told.1) {
            return None;
        }
        self.told = now;
        Some(self.heard.clone())
    }

    fn extend(&mut self, piece: &[u8]) {
        let room = MAX_LINE_BYTES.saturating_sub(self.line.len());
        self.line
            .extend_from_slice(piece.get(..room).unwrap_or(piece));
    }

    fn end_line(&mut self) {
        let begins = self
            .line
            .windows(PREFIX.len())
            .position(|bytes| bytes == PREFIX);
        if let Some(text) = begins.and_then(|at| self.line.get(at + PREFIX.len()..)) {
            self.heard.attempts = self.heard.attempts.saturating_add(1);
            let shown = text.iter().take(MAX_TEXT_BYTES).map(|byte| match byte {
                b' '..=b'~' => char::from(*byte),
                _ => '?',
            });
            self.heard.line = shown.collect();
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const LINE: &[u8] = b"[    9.1] ROGUE-ATTEMPT: IN= OUT=eth0 SRC=10.0.0.2 DST=192.0.2.9\r\n";

    #[test]
    fn a_line_of_the_firewall_is_told_with_what_it_says() {
        let mut watch = ConsoleWatch::default();
        watch.receive(b"login: ");
        watch.receive(LINE);
        let heard = watch.take().unwrap();
        assert_eq!((heard.attempts, heard.unread), (1, 0));
        assert_eq!(heard.line, "IN= OUT=eth0 SRC=10.0.0.2 DST=192.0.2.9");
        assert_eq!(watch.take(), None);
    }

    #[test]
    fn what_says_nothing_of_the_firewall_is_not_told() {
        let mut watch = ConsoleWatch::default();
        watch.receive(b"ROGUE-ATTEMPT:\nROGUE-\nATTEMPT: x\nrogue-attempt: x\n");
        assert_eq!(watch.take(), None);
        // A line that has not ended says nothing yet.
        watch.receive(b"ROGUE-ATTEMPT: x");
        assert_eq!(watch.take(), None);
        watch.receive(b"\n");
        assert_eq!(watch.take().unwrap().line, "x");
    }

    #[test]
    fn a_guest_that_forges_lines_for_ever_is_told_of_a_few_times() {
        let mut watch = ConsoleWatch::default();
        let told = (0..100_000).filter(|_| {
            watch.receive(LINE);
            watch.take().is_some()
        });
        assert_eq!(told.count(), 17);
    }

    #[test]
    fn what_was_printed_too_fast_to_be_read_is_told_and_joins_no_two_lines() {
        let mut watch = ConsoleWatch::default();
        watch.receive(b"ROGUE-ATT");
        watch.skipped(9000);
        watch.receive(b"EMPT: x\n");
        let heard = watch.take().unwrap();
        assert_eq!((heard.attempts, heard.unread), (0, 9000));
    }

    #[test]
    fn hostile_bytes_in_a_line_are_not_passed_on() {
        let mut watch = ConsoleWatch::default();
        watch.receive(b"ROGUE-ATTEMPT: \x1b]0;x\x07\xff\x9b\n");
        assert_eq!(watch.take().unwrap().line, "?]0;x???");
    }

    fn printed() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let piece = prop_oneof![
            Just(PREFIX.to_vec()),
            Just(LINE.to_vec()),
            Just(b"\n".to_vec()),
            Just(b"\r".to_vec()),
            vec(any::<u8>(), 0..700),
        ];
        vec(piece, 0..20)
    }

    proptest! {
        #[test]
        fn pieces_say_what_the_whole_says_and_no_line_is_kept_beyond_its_bound(
            pieces in printed(),
            cut in 1usize..40,
        ) {
            let all = pieces.concat();
            let (mut whole, mut torn) = (ConsoleWatch::default(), ConsoleWatch::default());
            whole.receive(&all);
            for piece in all.chunks(cut) {
                torn.receive(piece);
                prop_assert!(torn.line.len() <= MAX_LINE_BYTES);
            }
            prop_assert_eq!(&whole.heard, &torn.heard);
            prop_assert!(whole.heard.line.len() <= MAX_TEXT_BYTES);
        }
    }
}
