use proptest::prelude::*;

use super::*;

const TIMING: Timing = Timing {
    arrival: Duration::from_secs(60),
    interval: Duration::from_secs(5),
    deadline: Duration::from_secs(10),
    silence_seconds: 600,
    enforce: true,
};

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn key() -> Key {
    Key::new([7; 32])
}

fn hello() -> Vec<u8> {
    Message::Hello(Hello {
        key: key(),
        program: [3; 32],
    })
    .encode()
}

fn found(outputs: &[Output]) -> Vec<Finding> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Found(finding) => Some(*finding),
            Output::Send(_) => None,
        })
        .collect()
}

/// The challenge in `outputs`.
fn challenge(outputs: &[Output]) -> Option<Challenge> {
    let mut challenge = None;
    for output in outputs {
        if let Output::Send(bytes) = output {
            Messages::default().receive(bytes, |message| match message {
                Message::Challenge(found) => challenge = Some(found),
                other => panic!("{other:?}"),
            });
        }
    }
    challenge
}

fn answer(challenge: &Challenge, changes: Changes) -> Vec<u8> {
    Message::Answer(Answer::to(challenge, changes, &key())).encode()
}

/// One whose agent has come at 1 s, and its first challenge.
fn arrived() -> (Heartbeat, Challenge) {
    let mut heartbeat = Heartbeat::new(TIMING, at(0));
    let outputs = heartbeat.receive(at(1), &hello());
    assert_eq!(found(&outputs), [Finding::Arrived { program: [3; 32] }]);
    assert_eq!(heartbeat.next(), Some(at(1)));
    let challenge = challenge(&heartbeat.pass(at(1), [1; 32])).unwrap();
    (heartbeat, challenge)
}

#[test]
fn an_agent_that_answers_is_sound_and_told_once() {
    let (mut heartbeat, mut asked) = arrived();
    assert_eq!(
        found(&heartbeat.receive(at(2), &answer(&asked, Changes::NONE))),
        [Finding::Sound]
    );
    for round in 1..100_u64 {
        let now = at(1 + 5 * round);
        assert_eq!(heartbeat.next(), Some(now));
        asked = challenge(&heartbeat.pass(now, [round as u8; 32])).unwrap();
        assert_eq!(heartbeat.receive(now, &answer(&asked, Changes::NONE)), []);
    }
}

#[test]
fn an_agent_that_never_comes_is_missed_once() {
    let mut heartbeat = Heartbeat::new(TIMING, at(0));
    assert_eq!(heartbeat.pass(at(59), [0; 32]), []);
    assert_eq!(found(&heartbeat.pass(at(60), [0; 32])), [Finding::Missed]);
    assert_eq!(heartbeat.pass(at(1000), [0; 32]), []);
    assert_eq!(heartbeat.next(), None);
}

#[test]
fn an_answer_after_its_deadline_is_missed() {
    let (mut heartbeat, asked) = arrived();
    assert_eq!(
        heartbeat.receive(at(11), &answer(&asked, Changes::NONE)),
        []
    );
    assert_eq!(found(&heartbeat.pass(at(11), [2; 32])), [Finding::Missed]);
    // Nor does it count when it has been missed.
    assert_eq!(
        heartbeat.receive(at(12), &answer(&asked, Changes::NONE)),
        []
    );
    assert_eq!(
        found(&heartbeat.receive(at(12), &answer(&asked, Changes::NONE))),
        [Finding::Forged]
    );
}

#[test]
fn a_replayed_answer_is_forged() {
    let (mut heartbeat, first) = arrived();
    heartbeat.receive(at(2), &answer(&first, Changes::NONE));
    challenge(&heartbeat.pass(at(6), [2; 32])).unwrap();
    assert_eq!(
        found(&heartbeat.receive(at(7), &answer(&first, Changes::NONE))),
        [Finding::Forged]
    );
    // And does not serve as the answer.
    assert_eq!(found(&heartbeat.pass(at(16), [3; 32])), [Finding::Missed]);
}

#[test]
fn another_agent_in_the_same_boot_is_no_agent() {
    let (mut heartbeat, asked) = arrived();
    let other = Key::new([9; 32]);
    let outputs = heartbeat.receive(
        at(2),
        &Message::Hello(Hello {
            key: other.clone(),
            program: [3; 32],
        })
        .encode(),
    );
    assert_eq!(found(&outputs), [Finding::Replaced]);
    let by_other = Message::Answer(Answer::to(&asked, Changes::NONE, &other)).encode();
    assert_eq!(
        found(&heartbeat.receive(at(3), &by_other)),
        [Finding::Forged]
    );
    assert_eq!(heartbeat.key(), Some(&key()));
}

#[test]
fn a_reset_guest_has_a_new_agent() {
    let (mut heartbeat, _) = arrived();
    heartbeat.guest_was_reset(at(100));
    assert_eq!(found(&heartbeat.pass(at(159), [0; 32])), []);
    assert_eq!(
        found(&heartbeat.receive(at(159), &hello())),
        [Finding::Arrived { program: [3; 32] }]
    );
}

#[test]
fn what_has_changed_is_told() {
    let (mut heartbeat, asked) = arrived();
    let changes = Changes::FIREWALL.and(Changes::ROUTES);
    assert_eq!(
        found(&heartbeat.receive(at(2), &answer(&asked, changes))),
        [Finding::Changed(changes)]
    );
    assert_eq!(changes.names().collect::<Vec<_>>(), ["firewall", "routes"]);
}

#[test]
fn a_guest_that_stands_still_misses_nothing() {
    let (mut heartbeat, asked) = arrived();
    heartbeat.stand_still(at(5));
    assert_eq!(heartbeat.next(), None);
    assert_eq!(heartbeat.pass(at(1000), [2; 32]), []);
    heartbeat.go_on(at(1005));
    assert_eq!(heartbeat.pass(at(1005), [2; 32]), []);
    assert_eq!(
        found(&heartbeat.receive(at(1006), &answer(&asked, Changes::NONE))),
        [Finding::Sound]
    );
}

#[test]
fn one_that_was_known_before_is_asked_at_once() {
    let mut heartbeat = Heartbeat::known(TIMING, key(), 41, at(0));
    let asked = challenge(&heartbeat.pass(at(0), [5; 32])).unwrap();
    assert_eq!(asked.sequence, 42);
    assert_eq!(
        found(&heartbeat.receive(at(1), &answer(&asked, Changes::NONE))),
        [Finding::Sound]
    );
}

fn hostile() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..300),
        Just(hello()),
        any::<(u64, [u8; 32])>().prop_map(|(sequence, proof)| Message::Answer(Answer {
            sequence,
            changes: Changes::NONE,
            proof,
        })
        .encode()),
    ]
}

proptest! {
    /// Whatever a guest without the key writes, and whenever, it is never sound, and what is told stays
    /// within a few findings a challenge.
    #[test]
    fn without_the_key_nothing_is_sound(said in prop::collection::vec((hostile(), 0..20_u64), 0..60)) {
        let mut heartbeat = Heartbeat::known(TIMING, Key::new([1; 32]), 0, at(0));
        let (mut now, mut told, mut asked) = (0, Vec::new(), 0);
        for (round, (bytes, later)) in said.iter().enumerate() {
            now += later;
            let outputs = heartbeat.pass(at(now), [round as u8; 32]);
            asked += usize::from(challenge(&outputs).is_some());
            told.extend(found(&outputs));
            told.extend(found(&heartbeat.receive(at(now), bytes)));
        }
        prop_assert!(!told.contains(&Finding::Sound));
        prop_assert!(told.len() <= 4 * (asked + 1));
    }
}

#[test]
fn an_agent_is_told_of_a_move_at_once_and_with_each_challenge_from_then_on_also_after_a_reset() {
    let consumer: SocketAddrV4 = "198.51.100.7:4500".parse().unwrap();
    let (mut heartbeat, first) = arrived();
    assert_eq!(first.consumer, None);
    heartbeat.consumer_moved(consumer, at(2));
    // One is asked already, which comes first.
    assert_eq!(challenge(&heartbeat.pass(at(2), [2; 32])), None);
    assert_eq!(
        found(&heartbeat.receive(at(2), &answer(&first, Changes::NONE))),
        [Finding::Sound]
    );
    assert_eq!(heartbeat.next(), Some(at(2)));
    let told = challenge(&heartbeat.pass(at(2), [3; 32])).unwrap();
    assert_eq!(told.consumer, Some(consumer));
    // Who answers as if it had not been told proves nothing.
    let untold = Challenge {
        consumer: None,
        ..told
    };
    let ignoring = heartbeat.receive(at(3), &answer(&untold, Changes::NONE));
    assert_eq!(found(&ignoring), [Finding::Forged]);
    assert_eq!(heartbeat.receive(at(3), &answer(&told, Changes::NONE)), []);
    let again = challenge(&heartbeat.pass(at(7), [4; 32])).unwrap();
    assert_eq!(again.consumer, Some(consumer));
    heartbeat.guest_was_reset(at(20));
    heartbeat.receive(at(30), &hello());
    let anew = challenge(&heartbeat.pass(at(30), [5; 32])).unwrap();
    assert_eq!(anew.consumer, Some(consumer));
}
