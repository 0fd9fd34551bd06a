//! One case through a layout: who counted it, and where it arrived.

use std::time::{Duration, Instant};

use aya::util::KernelVersion;
use omerta_corpus::{Case, Fate, VnetHeader, Way};
use omerta_test_support::Tap;
use omerta_verdict::{Direction, Mode, Outcome};

use crate::layout::{Layout, Link, Tally};
use crate::native::{before, direction};
use crate::word;

const PATIENCE: Duration = Duration::from_secs(2);
const VNET: usize = 10;

/// Sends a case, and the one before it; says what went wrong.
pub fn passes(layout: &mut Layout, case: &Case, all: &[Case]) -> Result<(), String> {
    if case.before.is_some() || case.mode == Mode::Conntrack || case.way == Way::ToGuest {
        layout.forget(case.mode);
    }
    if let Some(first) = before(case, all) {
        alone(layout, first)?;
    }
    alone(layout, case)?;
    if case.way == Way::ToGuest && case.present() == Outcome::Allowed && case.vlan.is_none() {
        by_uplink(layout, case)?;
    }
    Ok(())
}

fn alone(layout: &Layout, case: &Case) -> Result<(), String> {
    let (guest, neighbour) = (layout.tally("guest"), layout.tally("other"));
    let sent = send(layout, case);
    if let Some(fate) = case.tap.or_else(|| refusal(case)) {
        if sent.is_ok() == (fate == Fate::Refused) {
            return Err(format!("the kernel said {sent:?}"));
        }
        expect_tally("guest", &guest, &layout.tally("guest"), &[])?;
        return expect_nothing(layout);
    }
    sent?;
    if case.vlan.is_some() {
        // It has crossed the uplink on its way.
        let elsewhere = |name: &str| !["uplink", "inet"].contains(&name);
        if let Some((name, _)) = layout.seen().into_iter().find(|(name, _)| elsewhere(name)) {
            return Err(format!("{name} saw it"));
        }
    }
    let way = direction(case);
    let mut moved = vec![(way, case.present())];
    if (way, case.present()) == (Direction::Egress, Outcome::Answered) {
        // The guard's answer is judged on its way to the guest like any other frame.
        moved.push((Direction::Ingress, Outcome::Allowed));
    }
    expect_tally("guest", &guest, &layout.tally("guest"), &moved)?;
    expect_tally("other", &neighbour, &layout.tally("other"), &[])?;
    match (case.present(), way) {
        (Outcome::Allowed, Direction::Egress) => expect_outside(layout, case)?,
        (Outcome::Allowed, Direction::Ingress) => {
            expect_inside(&layout.guest, case, &case.frame)?;
        }
        (Outcome::Answered, Direction::Egress) => {
            let answer = receive(&layout.guest, case.vnet)?;
            expect_answer(&case.frame, &answer)?;
        }
        (Outcome::Answered, Direction::Ingress) => return expect_answers_only(layout, case),
        (Outcome::Dropped(_), _) => {}
    }
    expect_nothing(layout)?;
    if let Some(outcome) = case.at_neighbour {
        at_neighbour(layout, case, outcome)?;
    }
    Ok(())
}

/// Taps take UDP that is to be cut into datagrams since Linux 6.2 (`TUN_F_USO4` in
/// include/uapi/linux/if_tun.h), and refuse it before.
fn refusal(case: &Case) -> Option<Fate> {
    const UDP_DATAGRAMS: u8 = 5;
    let cut = case.way != Way::ToGuest
        && case
            .vnet
            .is_some_and(|header| header.gso_type == UDP_DATAGRAMS);
    let old = KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(6, 2, 0));
    (cut && old).then_some(Fate::Refused)
}

fn send(layout: &Layout, case: &Case) -> Result<(), String> {
    match (case.way, case.vlan, case.vnet) {
        (Way::ToGuest, Some(vlan), _) => {
            layout.send_tagged(vlan, &case.frame);
            Ok(())
        }
        (Way::ToGuest, None, _) => {
            // A drop on the way out is told to the sender (ENOBUFS): the counters decide.
            let _ = layout.to_guest.send(&case.frame);
            Ok(())
        }
        (_, _, Some(header)) => {
            let bytes = [&header.bytes()[..], &case.frame].concat();
            layout.guest.send(&bytes).map_err(|e| e.to_string())
        }
        (_, _, None) => layout.guest.send(&case.frame).map_err(|e| e.to_string()),
    }
}

/// The same bytes on their way to the other guest, as if the first guard had let them pass.
fn at_neighbour(layout: &Layout, case: &Case, outcome: Outcome) -> Result<(), String> {
    let before = layout.tally("other");
    let _ = layout.to_neighbour.send(&case.frame);
    expect_tally(
        "other",
        &before,
        &layout.tally("other"),
        &[(Direction::Ingress, outcome)],
    )?;
    match outcome {
        Outcome::Allowed => expect_inside(&layout.neighbour, case, &case.frame)?,
        Outcome::Answered => return expect_answers_only(layout, case),
        Outcome::Dropped(_) => {}
    }
    expect_nothing(layout)
}

/// An allowed frame once more, from the world.
fn by_uplink(layout: &Layout, case: &Case) -> Result<(), String> {
    layout.send_from_world(&case.frame);
    let arrived = receive(&layout.guest, None).map_err(|e| format!("from the world: {e}"))?;
    let same = match layout.link {
        Link::Routed => segment(&arrived) == segment(&case.frame),
        Link::Bridged => arrived == case.frame,
    };
    // The uplink has seen it on its way in.
    layout.seen();
    if same {
        Ok(())
    } else {
        Err(format!("from the world it arrives as {arrived:02x?}"))
    }
}

fn expect_tally(
    tap: &str,
    before: &Tally,
    after: &Tally,
    moved: &[(Direction, Outcome)],
) -> Result<(), String> {
    let mut expected = before.clone();
    for (direction, outcome) in moved {
        *expected.entry((*direction, outcome.index())).or_default() += 1;
    }
    if expected == *after {
        return Ok(());
    }
    let moves: Vec<_> = after
        .iter()
        .filter(|(key, count)| before.get(key) != Some(count))
        .map(|((direction, index), count)| format!("{} {}={count}", direction.word(), name(*index)))
        .collect();
    let wanted: Vec<_> = moved
        .iter()
        .map(|(d, o)| format!("{} {}", d.word(), word(*o)))
        .collect();
    Err(format!(
        "{tap}'s guard counted {moves:?} and not {wanted:?}"
    ))
}

fn name(index: usize) -> &'static str {
    match index {
        0 => "allowed",
        1 => "answered",
        _ => omerta_verdict::Reason::from_index((index - 2) as u8).map_or("?", |r| r.word()),
    }
}

/// An allowed frame of the guest arrives in the world, by the uplink, and nowhere else.
fn expect_outside(layout: &Layout, case: &Case) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    let mut seen = Vec::new();
    while !seen.iter().any(|(name, _)| *name == "inet") && Instant::now() < deadline {
        seen.extend(layout.seen());
    }
    let offloaded = case
        .vnet
        .is_some_and(|header| header != VnetHeader::default());
    for place in ["uplink", "inet"] {
        let here: Vec<_> = seen.iter().filter(|(name, _)| *name == place).collect();
        if here.is_empty() || (here.len() > 1 && !offloaded) {
            return Err(format!("{} frames on {place}", here.len()));
        }
        for (_, bytes) in here {
            let same = if offloaded {
                ports(bytes) == ports(&case.frame)
            } else if layout.link == Link::Bridged {
                // A bridge may take padding off (br_validate_ipv4).
                case.frame.starts_with(bytes) && segment(bytes) == segment(&case.frame)
            } else {
                segment(bytes) == segment(&case.frame)
            };
            if !same {
                return Err(format!("it arrives on {place} as {bytes:02x?}"));
            }
        }
    }
    match seen
        .iter()
        .find(|(name, _)| !["uplink", "inet"].contains(name))
    {
        Some((name, bytes)) => Err(format!("it arrives on {name}: {bytes:02x?}")),
        None => Ok(()),
    }
}

fn expect_inside(tap: &Tap, case: &Case, frame: &[u8]) -> Result<(), String> {
    let arrived = receive(tap, case.vnet)?;
    if arrived == frame {
        Ok(())
    } else {
        Err(format!("it arrives as {arrived:02x?}"))
    }
}

fn receive(tap: &Tap, vnet: Option<VnetHeader>) -> Result<Vec<u8>, String> {
    let arrived = tap
        .recv(PATIENCE)
        .map_err(|e| e.to_string())?
        .ok_or("nothing arrives")?;
    let header = if vnet.is_some() { VNET } else { 0 };
    Ok(arrived.get(header..).unwrap_or_default().to_vec())
}

/// The guard's answer goes to who asked, from the gateway, and carries nothing of the question.
fn expect_answer(question: &[u8], answer: &[u8]) -> Result<(), String> {
    let right = answer.len() <= 86
        && answer.get(..6) == question.get(6..12)
        && answer.get(6..12) == Some(&omerta_kernel_tests::GATEWAY_MAC.0)
        && is_answer(answer);
    if right {
        Ok(())
    } else {
        Err(format!("answered {answer:02x?}"))
    }
}

/// The answer for a guest goes to the host's stack, or by the bridge to who asked.
fn expect_answers_only(layout: &Layout, case: &Case) -> Result<(), String> {
    let strange = layout.seen().into_iter().find(|(_, bytes)| {
        layout.link == Link::Routed || !is_answer(bytes) || bytes.get(..6) != case.frame.get(6..12)
    });
    match strange {
        Some((name, bytes)) => Err(format!("{name} saw {bytes:02x?}")),
        None => Ok(()),
    }
}

/// An ARP reply or a neighbour advertisement.
fn is_answer(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([0x08, 0x06]) => frame.get(20..22) == Some(&[0, 2]),
        Some([0x86, 0xdd]) => frame.get(54) == Some(&136),
        _ => false,
    }
}

fn expect_nothing(layout: &Layout) -> Result<(), String> {
    if let Some((name, bytes)) = layout.seen().into_iter().next() {
        return Err(format!("{name} saw {bytes:02x?}"));
    }
    for (name, tap) in [("guest", &layout.guest), ("other", &layout.neighbour)] {
        if let Some(bytes) = tap.recv(Duration::ZERO).map_err(|e| e.to_string())? {
            return Err(format!("{name} got {bytes:02x?}"));
        }
    }
    Ok(())
}

/// What routers leave alone: the transport segment, by the IP header's length.
fn segment(frame: &[u8]) -> Option<&[u8]> {
    match frame.get(12..14)? {
        [0x08, 0x00] => {
            let total = usize::from(u16::from_be_bytes([*frame.get(16)?, *frame.get(17)?]));
            frame.get(34..14 + total)
        }
        _ => frame.get(54..),
    }
}

fn ports(frame: &[u8]) -> Option<&[u8]> {
    segment(frame)?.get(..4)
}
