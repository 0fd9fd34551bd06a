//! The first guest's root tries to get out.

use std::time::{Duration, Instant};

use anyhow::Result;
use omerta_test_support::mac_of;

use super::{Scene, TENANT_A};
use crate::attempt::{self, Attempt};
use crate::console::Console;
use crate::guest::Guest;
use crate::interrupt;
use crate::omerta::Egress;
use crate::report::Report;
use crate::stage::{CONSUMER_A, CONSUMER_B};
use crate::witness::{SETTLING, Sighting, Tunnel, Witness};

/// How long one attempt may take; each ends itself after a second.
const LIMIT: Duration = Duration::from_secs(15);

/// How long frames that a capture saw may take to be counted by the guard, and the reverse.
const COUNTING: Duration = Duration::from_secs(2);

/// Every frame that left the guest outside its tunnel, by the capture and by the guard.
struct Account {
    /// What the guard had counted when the captures began.
    before: Egress,
    captured: u64,
}

impl Account {
    fn agrees(&self, now: &Egress) -> bool {
        self.kept_back(now) == self.captured
    }

    fn kept_back(&self, now: &Egress) -> u64 {
        now.kept_back().saturating_sub(self.before.kept_back())
    }
}

impl Scene<'_> {
    pub(super) fn attack(&self, guest: &Guest, other: &Guest, report: &mut Report) -> Result<()> {
        report.act(&format!(
            "Root in {TENANT_A} flushes its firewall and tries to get out"
        ));
        let mut console = guest.console()?;
        let before = console.run("nft list ruleset | wc -l", LIMIT)?;
        let open = format!(
            "nft flush ruleset; ip route replace default via {} dev eth0",
            guest.gateway
        );
        console.run(&open, LIMIT)?;
        // busybox takes no notice of `show default` and lists every route.
        let rules = console.run(
            "nft list ruleset | wc -l; ip route show exact 0.0.0.0/0",
            LIMIT,
        )?;
        let lines: u32 = before.output.parse().unwrap_or_default();
        let route = format!("default via {} dev eth0", guest.gateway);
        let left: Vec<_> = rules.output.lines().map(str::trim).collect();
        report.check(
            lines > 0 && left == ["0", route.as_str()],
            &format!(
                "of {lines} lines of firewall none is left in the guest, and its default route leads to the provider"
            ),
        );

        let tunnels = vec![
            Tunnel {
                guest: guest.address,
                consumer: CONSUMER_A,
            },
            Tunnel {
                guest: other.address,
                consumer: CONSUMER_B,
            },
        ];
        let witness = Witness::post(self.stage, guest, other, tunnels)?;
        report.remark(&format!(
            "captures: on {}, for what left the guest; on {} other interfaces, for what arrived",
            guest.interface,
            witness.posts()
        ));
        report.say(&format!(
            "{:<46} {:>4}  {:<30} {}",
            "tried", "left", "dropped by the kernel as", "arrived"
        ));
        let gateway_mac = self.stage.provider.enter(|| mac_of(&guest.interface))??;
        let gateway_mac = gateway_mac.map(|byte| format!("{byte:02x}")).join(":");
        let mut account = self.open_account(guest, &witness)?;
        for attempt in attempt::all(guest, other, &gateway_mac, CONSUMER_A) {
            self.try_out(
                &attempt,
                (guest, other),
                &mut console,
                &witness,
                &mut account,
                report,
            )?;
        }
        drop(console);
        report.check(
            account.captured > 0 && account.agrees(&self.daemon.omerta.egress(&guest.interface)?),
            &format!(
                "the sums agree: {} frames left the guest outside its tunnel, and the guard dropped or answered as many",
                account.captured
            ),
        );

        self.fetch_page(guest, &self.consumer_a, report, " all the same")?;
        self.fetch_page(other, &self.consumer_b, report, " meanwhile")?;
        let asleep = witness.asleep()?;
        let awake = format!(
            "each of the {} captures is awake: it has just seen a frame of its own",
            witness.posts()
        );
        if asleep.is_empty() {
            report.check(true, &awake);
        } else {
            report.check(
                false,
                &format!("captures that see nothing: {}", asleep.join(", ")),
            );
        }
        Ok(())
    }

    /// Begins to count, at a moment when nothing is on its way.
    fn open_account(&self, guest: &Guest, witness: &Witness) -> Result<Account> {
        loop {
            witness.look(witness.delivered_to_host()?)?;
            let before = self.daemon.omerta.egress(&guest.interface)?;
            interrupt::sleep(SETTLING)?;
            let quiet = witness
                .look(witness.delivered_to_host()?)?
                .left_guest
                .is_empty();
            let now = self.daemon.omerta.egress(&guest.interface)?;
            if quiet && now.kept_back() == before.kept_back() {
                return Ok(Account {
                    before,
                    captured: 0,
                });
            }
        }
    }

    fn try_out(
        &self,
        attempt: &Attempt,
        (guest, other): (&Guest, &Guest),
        console: &mut Console,
        witness: &Witness,
        account: &mut Account,
        report: &mut Report,
    ) -> Result<()> {
        let omerta = &self.daemon.omerta;
        let before = omerta.egress(&guest.interface)?;
        // A capture on the other guest's tap sees only what that guest's own guard lets through.
        let kept_before = omerta.kept_from_guest(&other.interface)?;
        let delivered_before = witness.delivered_to_host()?;
        let told = console.run(&attempt.command, LIMIT)?;
        interrupt::sleep(SETTLING)?;
        let mut sighting = witness.look(delivered_before)?;
        account.captured += sighting.left_guest.len() as u64;
        let mut now = omerta.egress(&guest.interface)?;
        let deadline = Instant::now() + COUNTING;
        while !account.agrees(&now) && Instant::now() < deadline {
            interrupt::sleep(SETTLING)?;
            let more = witness.look(delivered_before)?;
            account.captured += more.left_guest.len() as u64;
            sighting.extend(more);
            now = omerta.egress(&guest.interface)?;
        }
        let accounted = account.agrees(&now);
        let risen = now.risen_since(&before);

        let left = sighting
            .left_guest
            .iter()
            .filter(|packet| (attempt.is_its)(packet))
            .count();
        let dropped: u64 = risen.iter().map(|(_, n)| n).sum();
        let expected = !risen.is_empty()
            && risen
                .iter()
                .all(|(reason, _)| attempt.expected.contains(&reason.as_str()));
        let all_dropped = usize::try_from(dropped).is_ok_and(|dropped| dropped >= left);
        let reasons: Vec<_> = risen
            .iter()
            .map(|(reason, n)| format!("{reason} ×{n}"))
            .collect();
        let reasons = if reasons.is_empty() {
            "nothing".to_owned()
        } else {
            reasons.join(", ")
        };

        let kept = omerta.kept_from_guest(&other.interface)?;
        let at_other = kept.saturating_sub(kept_before);
        let arrived = sighting.strays.len() as u64 + sighting.delivered_to_host + at_other;
        let line = format!("{:<46} {left:>4}  {reasons:<30} {arrived}", attempt.what);
        let what = &attempt.what;
        report.checks(
            &[
                (
                    left > 0,
                    &format!(
                        "{what}: nothing left the guest; it said: {}",
                        told.output.replace('\n', " | ")
                    ),
                ),
                (
                    expected && all_dropped,
                    &format!(
                        "{what}: dropped as {reasons}, expected {}",
                        attempt.expected.join(" or ")
                    ),
                ),
                (
                    accounted,
                    &format!(
                        "{what}: {} frames have left the guest by now, and {} were dropped or answered",
                        account.captured,
                        account.kept_back(&now)
                    ),
                ),
                (
                    arrived == 0,
                    &format!("{what}: {}", arrivals(&sighting, at_other)),
                ),
            ],
            &line,
        );
        Ok(())
    }
}

fn arrivals(sighting: &Sighting, at_other: u64) -> String {
    let strays = sighting
        .strays
        .iter()
        .map(|(place, packet)| format!("{packet} arrived at {place}"));
    let host = format!(
        "the host itself took in {} packets, and the other guest's guard kept {at_other} from it",
        sighting.delivered_to_host
    );
    strays.take(5).chain([host]).collect::<Vec<_>>().join("; ")
}
