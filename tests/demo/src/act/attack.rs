//! The first guest's root tries to get out.

use std::time::Duration;

use anyhow::Result;
use omerta_test_support::mac_of;

use super::{Scene, TENANT_A};
use crate::attempt::{self, Attempt};
use crate::console::Console;
use crate::guest::Guest;
use crate::interrupt;
use crate::report::Report;
use crate::stage::{CONSUMER_A, CONSUMER_B};
use crate::witness::{Sighting, Tunnel, Witness};

/// How long after an attempt its frames may still be on their way.
const SETTLING: Duration = Duration::from_millis(100);
/// How long one attempt may take; each ends itself after a second.
const LIMIT: Duration = Duration::from_secs(15);

impl Scene<'_> {
    pub(super) fn attack(&self, guest: &Guest, other: &Guest, report: &mut Report) -> Result<()> {
        report.act(&format!(
            "Root in {TENANT_A} flushes its firewall and tries to get out"
        ));
        let mut console = guest.console()?;
        let open = format!(
            "nft flush ruleset; ip route replace default via {} dev eth0",
            guest.gateway
        );
        console.run(&open, LIMIT)?;
        let rules = console.run("nft list ruleset | wc -l; ip route show default", LIMIT)?;
        let opened = rules.output.starts_with("0\n") && rules.output.contains("dev eth0");
        report.check(
            opened,
            "no rule is left in the guest, and its default route leads to the provider",
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
        for attempt in attempt::all(guest, other, &gateway_mac, CONSUMER_A) {
            self.try_out(&attempt, guest, &mut console, &witness, report)?;
        }
        drop(console);

        self.fetch_page(guest, &self.consumer_a, report, " all the same")?;
        let sighting = witness.look(witness.delivered_to_host()?)?;
        report.check(
            sighting.tunnel_frames > 0,
            &format!(
                "the captures are awake: they saw {} frames of that tunnel pass",
                sighting.tunnel_frames
            ),
        );
        Ok(())
    }

    fn try_out(
        &self,
        attempt: &Attempt,
        guest: &Guest,
        console: &mut Console,
        witness: &Witness,
        report: &mut Report,
    ) -> Result<()> {
        let omerta = &self.daemon.omerta;
        let before = omerta.egress(&guest.interface)?;
        let delivered_before = witness.delivered_to_host()?;
        let told = console.run(&attempt.command, LIMIT)?;
        interrupt::sleep(SETTLING)?;
        let sighting = witness.look(delivered_before)?;
        let risen = omerta.egress(&guest.interface)?.risen_since(&before);

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

        let arrived = sighting.strays.len() as u64 + sighting.delivered_to_host;
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
                (arrived == 0, &format!("{what}: {}", arrivals(&sighting))),
            ],
            &line,
        );
        Ok(())
    }
}

fn arrivals(sighting: &Sighting) -> String {
    let strays = sighting
        .strays
        .iter()
        .map(|(place, packet)| format!("{packet} arrived at {place}"));
    let host = format!(
        "the host itself took in {} packets",
        sighting.delivered_to_host
    );
    strays.take(5).chain([host]).collect::<Vec<_>>().join("; ")
}
